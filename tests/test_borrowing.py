"""What a borrower takes out of a run and brings into one: features, a network with its preparation, weights, other backbones."""

import contextlib
import functools
import io
import json
import os
import pickle
import re
import shutil
import sys
import warnings

import common
import numpy as np
import pytest
import torch
import torch.nn as nn
import torchvision
from PIL import Image
from conftest import METHODS, ROOT, SMALL, SMALL_OF, is_one_line_error, run_here, save_edited, write_image

pytestmark = pytest.mark.usefixtures("narrow_backbone")
QUICK = ["--probe-epochs", "0", "--precision", "fp32", "--features", "H"]


def blocks(page, heading, language="python"):
    """The texts of the code blocks below a heading of a page."""
    section = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    return re.findall(rf"^```{language}\n(.*?)^```", section[1], re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def trained(narrow_backbone, small_folder, tmp_path_factory):
    """The folder of a run of SimCLR on 64 + 24 images of 32x32."""
    out = tmp_path_factory.mktemp("runs") / "simclr-folder-s0"
    result = run_here("simclr", [*SMALL, *SMALL_OF["simclr"], "--dataset", "folder", "--data-dir", small_folder, "--out", out])
    assert result.status == 0, result.err
    return out


def saved(path, *argv):
    """The arrays that eval.py writes."""
    result = run_here("eval", [*QUICK, *argv, "--save", path])
    assert result.status == 0, result.err
    with np.load(path) as file:
        return dict(file), result


# ---- features out --------------------------------------------------------------------------------


def test_the_defaults_of_a_notebook_do_not_change_a_loaded_backbone(trained):
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    network, prepare = common.load_backbone(trained)
    expected = network(prepare(images))
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            network, prepare = common.load_backbone(trained)
            h = network(prepare(images))
    finally:
        torch.set_default_dtype(torch.float32)
    assert h.dtype == torch.float32 and torch.equal(h, expected)


def test_saved_features_are_those_of_the_files_in_their_order(trained, small_folder, tmp_path):
    found, result = saved(tmp_path / "f.npz", trained)
    names = [path.relative_to(small_folder) for split in ("train", "test") for path in sorted((small_folder / split).rglob("*.png"))]
    assert found["file_names"].tolist() == [str(name) for name in names] and "88 images: H, Z, labels" in result.out
    assert found["split"].tolist() == [name.parts[0] for name in names]
    classes = found["class_names"].tolist()
    assert [classes[label] for label in found["labels"]] == [name.parts[1] for name in names]
    assert found["H"].dtype == found["Z"].dtype == np.float32 and found["labels"].dtype == np.int64
    network, prepare = common.load_backbone(trained)
    h = network(prepare([small_folder / name for name in names]))
    np.testing.assert_allclose(found["H"], h.numpy(), rtol=1e-4, atol=1e-5)
    import simclr
    checkpoint = common.load_checkpoint(str(trained / "last.pt"))
    model = simclr.build(simclr.Args(**{**checkpoint["args"]["given"], "image_size": 32}))
    model.load_state_dict(checkpoint["model"])
    np.testing.assert_allclose(found["Z"], common.project(model.projector, h).numpy(), rtol=1e-3, atol=1e-4)


def test_the_split_that_is_asked_for(trained, tmp_path):
    whole, _ = saved(tmp_path / "all.npz", trained)
    for split, rows in (("train", slice(64)), ("test", slice(64, None))):
        part, _ = saved(tmp_path / f"{split}.npz", trained, "--split", split)
        for name in ("H", "Z", "labels", "file_names", "split"):
            assert np.array_equal(part[name], whole[name][rows]), (split, name)


def test_a_held_out_part_and_images_without_labels(trained, small_folder, tmp_path):
    """Held-out images are the split `test`; without labels there is none, and each label is -1."""
    shutil.copytree(small_folder / "train", tmp_path / "classes")
    found, result = saved(tmp_path / "held.npz", trained, "--data-dir", tmp_path / "classes")
    assert "classes has other images than the run saw" in result.err
    assert set(found["split"]) == {"train", "test"} and len(set(found["file_names"])) == 64
    test = found["file_names"][found["split"] == "test"]
    assert 8 <= len(test) <= 16 and {os.path.dirname(name) for name in test} == {f"class{i}" for i in range(4)}
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in (small_folder / "test").rglob("*.png"):
        shutil.copy(path, flat)
    found, _ = saved(tmp_path / "flat.npz", trained, "--data-dir", flat)
    assert set(found["labels"]) == {-1} and set(found["split"]) == {"train"} and found["file_names"].tolist() == sorted(os.listdir(flat))
    assert found["class_names"].tolist() == []
    result = run_here("eval", [*QUICK, trained, "--data-dir", flat, "--save", tmp_path / "no.npz", "--split", "test"])
    assert is_one_line_error(result) and "no test images; try --split train" in result.err and not (tmp_path / "no.npz").exists()


def test_a_data_set_without_files_has_no_file_names(trained, tmp_path, monkeypatch):
    draw = common.make_patterns
    monkeypatch.setattr(common, "make_patterns", lambda: draw(0, 50, 20))
    found, _ = saved(tmp_path / "p.npz", trained, "--dataset", "patterns")
    assert found["file_names"].shape == (0,) and found["H"].shape[0] == 70 and found["class_names"].tolist() == common.PATTERN_CLASSES


def test_streamed_images_have_their_names_too(trained, tmp_path, monkeypatch):
    whole, _ = saved(tmp_path / "a.npz", trained)
    monkeypatch.setattr(common, "MEMORY_LIMIT", 0)
    streamed, _ = saved(tmp_path / "b.npz", trained, "--num-workers", "0")
    assert np.array_equal(whole["file_names"], streamed["file_names"])
    np.testing.assert_allclose(whole["H"], streamed["H"], rtol=1e-4, atol=1e-5)


# ---- a trained backbone --------------------------------------------------------------------------


def test_a_loaded_backbone_is_ready(trained, small_folder):
    """In eval mode, without gradients, the weights of backbone.pt, images as the run measured them."""
    network, prepare = common.load_backbone(str(trained / "last.pt"))
    assert not network.training and not any(p.requires_grad for p in network.parameters())
    for name, value in torch.load(trained / "backbone.pt", weights_only=True).items():
        assert torch.equal(value, network.state_dict()[name])
    paths = sorted((small_folder / "test").rglob("*.png"))
    config = json.loads((trained / "config.json").read_text())["data_statistics"]
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(path))) for path in paths]).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(config[name]).view(3, 1, 1) for name in ("mean", "std"))
    torch.testing.assert_close(prepare(paths), (pixels / 255 - mean) / std)
    torch.testing.assert_close(prepare(pixels), prepare(paths))
    assert torch.equal(prepare(paths[0]), prepare(paths[:1])) and torch.equal(prepare(str(paths[0])), prepare(paths[:1]))  # one file


def test_large_long_and_deep_images_are_prepared_too(trained, tmp_path):
    """The middle 7/8 of the shorter side, resized; of one side and another; each by itself."""
    network, prepare = common.load_backbone(trained)
    rng = np.random.default_rng(0)
    paths = []
    for i, shape in enumerate([(40, 90), (200, 64), (20, 20)]):
        smooth = np.kron(rng.integers(0, 256, (4, 4, 3)), np.ones((50, 50, 1)))[: shape[0], : shape[1]]
        paths.append(tmp_path / f"{i}.png")
        write_image(paths[-1], smooth.astype(np.uint8))
    x = prepare(paths)
    assert x.shape == (3, 3, 32, 32) and torch.equal(x[1:2], prepare(paths[1:2]))
    assert network(x).isfinite().all()


@pytest.mark.parametrize("sides", [(100, 100, 40), (40, 40, 200)], ids=str)
def test_files_of_many_sizes_are_prepared_as_for_knn(tmp_path, sides):
    """Also one on the other side of --image-size than the median, which decides for all."""
    import simclr

    for i in range(12):
        side = sides[i % 3]
        write_image(tmp_path / "images" / "ab"[i % 2] / f"{i}.png", np.random.default_rng(i).integers(0, 256, (side, side, 3), dtype=np.uint8))
    given = {"dataset": "folder", "data_dir": tmp_path / "images", "image_size": 48, "batch_size": 8, "epochs": 1, "precision": "fp32"}
    run = simclr.train(simclr.Args(**given, test_fraction=0, out=str(tmp_path / "run")))
    _, prepare = common.load_backbone(tmp_path / "run")
    (measured,) = run.data.eval_views(run.data.train, torch.arange(12), 12)
    torch.testing.assert_close(prepare([tmp_path / "images" / name for name in run.data.files[0]]), measured.contiguous())


@pytest.mark.parametrize("side", [20, 100])
def test_files_of_another_folder_are_measured_as_they_are_prepared(trained, tmp_path, side):
    """Whatever the sizes there: the run's own decides."""
    for i in range(8):
        pixels = np.random.default_rng(i).integers(0, 256, (side, side + 8, 3), dtype=np.uint8)
        write_image(tmp_path / "images" / "ab"[i % 2] / f"{i}.png", pixels)
    found, _ = saved(tmp_path / "f.npz", trained, "--data-dir", tmp_path / "images")
    network, prepare = common.load_backbone(trained)
    h = network(prepare([tmp_path / "images" / name for name in found["file_names"]]))
    np.testing.assert_allclose(found["H"], h.numpy(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shape", [(32, 60), (60, 32)])
def test_of_an_image_as_short_as_the_views_the_centre_is_taken_as_it_is(trained, tmp_path, shape):
    _, prepare = common.load_backbone(trained)
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    write_image(tmp_path / "long.png", pixels)
    top, left = (side // 2 - 16 for side in shape)
    square = torch.from_numpy(pixels[top:top + 32, left:left + 32]).permute(2, 0, 1)[None]
    assert torch.equal(prepare([tmp_path / "long.png"]), prepare(square))


@pytest.mark.parametrize("images, words", [
    (torch.zeros(2, 3, 32, 32), "torch.float32"), (torch.zeros(3, 32, 32, dtype=torch.uint8), "uint8 [N, 3, H, W]"),
    (["nowhere.png"], "nowhere.png cannot be read"), (np.array(["nowhere.png"]), "nowhere.png cannot be read"),
    ([torch.zeros(3, 32, 32, dtype=torch.uint8)], "try a list of file names"), ([], "try a list of file names")])
def test_images_that_cannot_be_prepared(trained, images, words):
    _, prepare = common.load_backbone(trained)
    with pytest.raises(common.UserError, match=re.escape(words)):
        prepare(images)


def test_what_is_no_run_of_a_known_backbone(trained, tmp_path):
    with pytest.raises(common.UserError, match="no last.pt in this folder; try "):
        common.load_backbone(tmp_path)
    with pytest.raises(common.UserError, match="no such file"):
        common.load_backbone(tmp_path / "last.pt")
    checkpoint = torch.load(trained / "last.pt", weights_only=True)
    checkpoint["model"]["backbone.extra"] = torch.zeros(1)
    save_edited(checkpoint, tmp_path / "last.pt")
    with pytest.raises(common.UserError, match="its backbone is not --backbone tiny; load backbone.pt into your own"):
        common.load_backbone(tmp_path)


class Squared(common.Tiny):
    """A network of the user's own whose weights have the names of `tiny`."""

    def forward(self, x):
        return super().forward(x).square()


@pytest.mark.parametrize("change", [
    lambda x: x.flip(-1), lambda x: x.flip(-2), lambda x: x.flip(1), lambda x: torch.nn.functional.avg_pool2d(x, 3, 1, 1),
    lambda x: torch.nn.functional.interpolate(torch.nn.functional.avg_pool2d(x, 2), scale_factor=2)], ids=["left-right", "upside-down", "BGR", "blur", "coarse"])
def test_the_response_shows_what_a_network_sees_differently(change, trained):
    network, _ = common.load_backbone(trained)
    changed = nn.Sequential(network).eval()
    changed.register_forward_pre_hook(lambda module, inputs: (change(inputs[0]),))
    before, now = common.response(network, 32), common.response(changed, 32)
    assert (now - before).norm() > 0.1 * before.norm()
    assert torch.equal(before, common.response(network, 32)) and not network.training


def test_a_network_with_the_names_of_tiny_is_not_taken_for_it(small_folder, tmp_path):
    """By load_backbone, eval.py and --resume; nor is `tiny` itself after a change of its code."""
    import simclr

    def build(args):
        network, feature_dim = common.build_backbone("tiny", 32)
        network.__class__ = Squared
        return simclr.SimCLR(network, feature_dim, args)

    given = {"dataset": "folder", "data_dir": small_folder, "batch_size": 32, "epochs": 1, "precision": "fp32", "out": str(tmp_path / "run")}
    simclr.train(simclr.Args(**given), build=build)
    with pytest.raises(common.UserError, match="its backbone computed something else in training; try the code"):
        common.load_backbone(tmp_path / "run")
    result = run_here("eval", [*QUICK, str(tmp_path / "run")])
    assert is_one_line_error(result) and "computed something else" in result.err
    given |= {"epochs": 2, "resume": True}
    with pytest.raises(common.UserError, match="--resume: .*computed something else"):
        simclr.train(simclr.Args(**given))
    assert len(simclr.train(simclr.Args(**given), build=build).rows) == 2  # its own build goes on with it


def test_the_page_on_features_runs(trained, small_folder, tmp_path, monkeypatch, capsys):
    """The very text of the page: the image search in a run's features, then the scatter of eval.py's file."""
    pytest.importorskip("matplotlib", reason="the scatter needs it")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, "runs/simclr-folder-s0")
    shutil.copytree(small_folder / "train", "photos")
    shutil.copy("photos/class1/0005.png", "query.png")
    saved("features.npz", "runs/simclr-folder-s0")
    search, scatter = blocks("methods/README.md", "Use the features")
    capsys.readouterr()
    exec(compile(search, "search", "exec"), {})
    first, *others = capsys.readouterr().out.splitlines()
    assert first.split() == ["1.000", os.path.join("photos", "class1", "0005.png")] and len(others) == 4
    exec(compile(scatter, "scatter", "exec"), {})
    assert (tmp_path / "components.png").read_bytes().startswith(b"\x89PNG")


# ---- start from weights --------------------------------------------------------------------------


def start(flags, method, tmp_path, name, file, *more):
    """A run with --init and a rate next to 0: its result and the weights, which are those of the start."""
    out = tmp_path / name
    result = run_here(method, flags(method, "--epochs", 1, "--init", file, "--lr", 1e-12, "--optimizer", "adam", "--warmup", 0, "--out", out, *more))
    return result, torch.load(out / "last.pt", weights_only=True)["model"] if result.status == 0 else None


@pytest.mark.parametrize("method", ["moco", "byol", "vicreg"])
@pytest.mark.parametrize("file", ["last.pt", "backbone.pt"])
def test_a_run_starts_from_the_backbone_of_another(trained, flags, tmp_path, method, file):
    """In its slow copy too, which otherwise would be of other weights than what it follows."""
    result, weights = start(flags, method, tmp_path, "new", trained / file)
    assert result.status == 0, result.err
    given = torch.load(trained / "backbone.pt", weights_only=True)
    assert f"--init {trained / file}: {len(given)} of the backbone's {len(given)} tensors\n" in result.out
    copies = ["backbone."] + ["target_backbone."] * (method != "vicreg")
    for name, tensor in given.items():
        for copy in copies:
            if "running" not in name and "num_batches" not in name:
                torch.testing.assert_close(weights[copy + name], tensor, rtol=0, atol=1e-9)
    assert json.loads((tmp_path / "new" / "config.json").read_text())["init"] == str(trained / file)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("size, fits, stem", [(32, 119, "conv1.weight, "), (224, 120, "")])
def test_torchvisions_own_file_for_the_same_resnet(tmp_path, capsys, legacy, size, fits, stem):
    """The stem for small images has another shape: said, and left as drawn. fc is not used. In both formats of torch.save."""
    torch.manual_seed(1)
    theirs = torchvision.models.resnet18().state_dict()
    torch.save(theirs, tmp_path / "resnet18.pth", _use_new_zipfile_serialization=not legacy)
    model = nn.ModuleDict({"backbone": common.build_backbone("resnet18", size)[0]})
    before = {name: value.clone() for name, value in model["backbone"].state_dict().items()}
    common.start_from(str(tmp_path / "resnet18.pth"), model)
    words = f"resnet18.pth: {fits} of the backbone's 120 tensors; left out: {stem}fc.weight, fc.bias"
    assert capsys.readouterr().out.strip().endswith(words)
    for name, value in model["backbone"].state_dict().items():
        like = before if name == "conv1.weight" and size == 32 else theirs
        assert torch.equal(value, like[name]), name
    assert theirs["layer4.1.bn2.weight"].all() and not before["layer4.1.bn2.weight"].any()  # drawn as 0


def test_with_resume_the_checkpoint_wins(trained, flags, tmp_path):
    """The same end as without the file, which may be gone by then."""
    file = tmp_path / "weights.pt"
    shutil.copy(trained / "backbone.pt", file)
    ends = []
    for out in ("whole", "parts"):
        if out == "parts":
            assert run_here("vicreg", flags("vicreg", "--init", file, "--out", tmp_path / out, "--epochs", 1, "--schedule", "constant")).status == 0
            file.unlink()
        argv = flags("vicreg", "--init", file, "--out", tmp_path / out, "--epochs", 2, "--schedule", "constant", "--resume")
        result = run_here("vicreg", argv)
        assert result.status == 0 and ("--init" in result.out) == (out == "whole"), result.err
        ends.append(torch.load(tmp_path / out / "last.pt", weights_only=True)["model"])
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (open, (self.marker, "w"))


@pytest.mark.parametrize("kind, words", [
    ("missing", "is no file"), ("folder", "is no file"), ("text", "no file of weights"), ("list", "no file of weights"),
    ("cut short", "no file of weights"), ("malicious", "no file of weights"), ("pickle", "no file of weights"), ("nan", "not finite"), ("numbers", "no file of weights"),
    ("other network", "0 of the backbone's 30 tensors fit"), ("other resnet", "of the backbone's 30 tensors fit"), ("empty", "0 of the backbone's")])
def test_a_file_that_does_not_fit_is_one_line_and_leaves_no_folder(trained, flags, tmp_path, kind, words):
    file, given = tmp_path / "weights.pt", torch.load(trained / "backbone.pt", weights_only=True)
    content = {"list": [1, 2], "nan": {name: w * float("nan") for name, w in given.items()}, "numbers": {"a": 1, "b": 2.0}, "empty": {},
               "other network": nn.Linear(3, 4).state_dict(), "malicious": Payload(str(tmp_path / "executed")), "pickle": Payload(str(tmp_path / "executed")),
               "other resnet": torchvision.models.resnet18().state_dict()}.get(kind, given)
    torch.save(content, file)
    if kind in ("missing", "folder"):
        file.unlink()
    if kind == "folder":
        file.mkdir()
    if kind == "text":
        file.write_text("weights")
    if kind == "pickle":
        file.write_bytes(pickle.dumps(content, protocol=4))  # torch has a warning about it, which is not shown
    if kind == "cut short":
        file.write_bytes(file.read_bytes()[:-300])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch's own, which people would read first
        result = run_here("cw_rgp", flags("cw_rgp", "--init", file))
    assert is_one_line_error(result) and f"--init {file}" in result.err and words in result.err and "try " in result.err
    assert not (tmp_path / "run").exists() and not (tmp_path / "executed").exists()


def only_a_backbone(network):
    model = nn.Module()
    model.backbone = network
    return model


def test_weights_of_another_resnet_are_refused_though_most_of_their_names_fit(tmp_path):
    """Batch norms are most tensors of a ResNet, and few of its weights."""
    torch.save(torchvision.models.resnet34().state_dict(), tmp_path / "34.pth")
    model = only_a_backbone(common.build_backbone("resnet18", 224)[0])
    before = {name: w.clone() for name, w in model.state_dict().items()}
    torch.save(torchvision.models.resnet50().state_dict(), tmp_path / "50.pth")
    with pytest.raises(common.UserError, match="97 of the backbone's 120 tensors fit; try the --backbone"):
        common.start_from(str(tmp_path / "50.pth"), model)
    assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items())
    common.start_from(str(tmp_path / "34.pth"), only_a_backbone(common.build_backbone("resnet34", 224)[0]))


def test_weights_packed_by_other_programs_are_found(trained, tmp_path, capsys):
    given = torch.load(trained / "backbone.pt", weights_only=True)
    torch.save({"epoch": 3, "state_dict": {f"module.{name}": w for name, w in given.items()}}, tmp_path / "packed.pt")
    network = common.load_backbone(trained)[0]
    with torch.no_grad():
        for w in network.state_dict().values():
            w.zero_()
    common.start_from(str(tmp_path / "packed.pt"), only_a_backbone(network))
    assert "30 of the backbone's 30 tensors" in capsys.readouterr().out
    assert all(torch.equal(w, given[name]) for name, w in network.state_dict().items())


def test_a_damaged_checkpoint_is_refused_by_init_too(trained, flags, tmp_path):
    damaged = bytearray((trained / "last.pt").read_bytes())
    damaged[len(damaged) // 3] ^= 1
    (tmp_path / "last.pt").write_bytes(damaged)
    result = run_here("cw_rgp", flags("cw_rgp", "--init", tmp_path / "last.pt"))
    assert is_one_line_error(result) and str(tmp_path / "last.pt") in result.err and not (tmp_path / "run").exists()


@pytest.mark.parametrize("images, words", [([], "try a list of file names"), (None, "try a list of file names"),
                                           (Image.new("RGB", (8, 8)), "try a list of file names"), (np.zeros((2, 3, 8, 8)), "try torch.uint8"), (np.zeros((8, 8, 3), np.uint8), "try torch.uint8")])
def test_what_prepare_cannot_take_is_one_line(trained, images, words):
    with pytest.raises(common.UserError, match=words):
        common.load_backbone(trained)[1](images)


def test_prepare_takes_numpys_images(trained):
    images = np.random.default_rng(0).integers(0, 256, (3, 3, 20, 16), dtype=np.uint8)
    prepare = common.load_backbone(trained)[1]
    assert torch.equal(prepare(images), prepare(torch.from_numpy(images)))


# ---- a small Vision Transformer, and any other backbone ------------------------------------------


@pytest.mark.parametrize("size, patch", [(8, 4), (12, 4), (32, 4), (40, 8), (64, 8), (80, 16), (224, 16)])
def test_vit_tiny_is_torchvisions_transformer_and_h_its_class_token(size, patch):
    network, width = common.build_backbone("vit_tiny", size)
    assert isinstance(network, torchvision.models.VisionTransformer) and width == network.hidden_dim == 12  # narrow: 3 times 4
    tokens = (size // patch) ** 2 + 1
    layers = list(network.encoder.layers)
    assert len(layers) == 3 and {layer.self_attention.num_heads for layer in layers} == {3} and {layer.mlp[0].out_features for layer in layers} == {24}
    assert network.conv_proj.kernel_size == (patch, patch) and network.encoder.pos_embedding.shape == (1, tokens, 12)
    seen = []
    network.encoder.register_forward_hook(lambda module, inputs, output: seen.append(output))
    h = network.eval()(torch.randn(2, 3, size, size))
    assert seen[0].shape == (2, tokens, 12) and torch.equal(h, seen[0][:, 0])


@pytest.mark.parametrize("size, better", [(33, 32), (30, 28), (9, 8), (63, 56), (100, 96), (65, 64)])
def test_a_size_that_the_patch_does_not_divide_is_one_line_with_one_that_fits(flags, tmp_path, size, better):
    result = run_here("vicreg", flags("vicreg", "--backbone", "vit_tiny", "--image-size", size))
    assert is_one_line_error(result) and f"--image-size {size} is no multiple of vit_tiny's patch" in result.err and not (tmp_path / "run").exists()
    assert result.err.strip().endswith(f"try --image-size {better}")
    common.build_backbone("vit_tiny", better)


@pytest.mark.parametrize("method", [name if name == "moco" else pytest.param(name, marks=pytest.mark.slow) for name in METHODS])
def test_every_method_trains_a_transformer_and_eval_reads_it(method, flags, tmp_path):
    result = run_here(method, flags(method, "--backbone", "vit_tiny", "--epochs", 1))
    assert result.status == 0 and result.err == "", result.err
    start = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    torch.manual_seed(0)
    drawn = common.build_backbone("vit_tiny", 32)[0].state_dict()
    moved = {name for name, w in drawn.items() if not torch.equal(w, start["model"][f"backbone.{name}"])}
    assert moved >= set(drawn) - {name for name in drawn if "in_proj_bias" in name}  # the bias of the keys has no gradient
    report = run_here("eval", ["--probe-epochs", "5", "--precision", "fp32", tmp_path / "run"])
    assert report.status == 0, report.err
    network, prepare = common.load_backbone(tmp_path / "run")
    assert network(prepare(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))).shape == (1, 12)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["moco", "cw_rgp"])  # BYOL's momentum follows the length of the run
def test_a_resumed_transformer_ends_like_one_that_was_not_stopped(method, flags, tmp_path):
    ends = []
    for out, stops in (("whole", [2]), ("parts", [1, 2])):
        for epochs in stops:
            argv = flags(method, "--backbone", "vit_tiny", "--epochs", epochs, "--schedule", "constant", "--warmup", 0, "--resume", "--out", tmp_path / out)
            assert run_here(method, argv).status == 0
        ends.append(torch.load(tmp_path / out / "last.pt", weights_only=True)["model"])
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.fixture
def few_patterns(monkeypatch):
    """`patterns` has 512 training and 128 test images in place of 12,000, so that a page runs in seconds."""
    monkeypatch.setattr(common, "make_patterns", functools.partial(common.make_patterns, train=512, test=128))


def test_the_page_on_another_backbone_runs(few_patterns, tmp_path, monkeypatch, capsys):
    """The very text: a network from outside trains, its weights come back, and what cannot rebuild it says so."""
    monkeypatch.chdir(tmp_path)
    (text,) = blocks("methods/README.md", "Another backbone")
    names = {}
    exec(compile(text, "page", "exec"), names)
    run = names["run"]
    assert run.rows[-1]["knn"] > 0 and len(run.rows) == run.args.epochs
    weights = torch.load(f"{run.folder}/backbone.pt", weights_only=True)
    network = names["build"](run.args).backbone
    network.load_state_dict(weights)
    assert all(torch.equal(value, run.model.backbone.state_dict()[name]) for name, value in network.state_dict().items())
    with pytest.raises(common.UserError, match="its backbone is not --backbone tiny; load backbone.pt into your own"):
        common.load_backbone(run.folder)
    assert is_one_line_error(run_here("eval", [*QUICK, run.folder]))


@pytest.mark.slow
def test_the_loop_of_the_readme_runs(few_patterns, capsys):
    """The very text: a torchvision network, a loop and an optimizer of one's own."""
    (text,) = [text for text in blocks("README.md", "Copy a method") if "BYOL" in text]
    names = {}
    exec(compile(text, "page", "exec"), names)
    assert names["step"] == 2 and names["loss"].isfinite() and 0 < float(names["loss"].detach()) < 8


# ---- a notebook ----------------------------------------------------------------------------------

Cell = type("OutStream", (io.StringIO,), {"__module__": "ipykernel.iostream"})  # what a kernel puts in the place of stdout


def shown(text):
    """The lines that a cell shows: after \\r, characters take the place of those before them, and the rest stays."""
    lines = []
    for line in text.split("\n"):
        found = ""
        for part in line.split("\r"):
            found = part + found[len(part):]
        lines.append(found.rstrip())
    return lines


def test_the_cells_of_the_page_run_and_progress_is_one_line(few_patterns, tmp_path, monkeypatch):
    """Every cell in its order; a cell ends with a line an epoch and nothing of the line that moved."""
    pytest.importorskip("matplotlib", reason="the last cell draws").use("agg")
    monkeypatch.chdir(tmp_path)
    cells, names, outputs = blocks("methods/README.md", "In a notebook"), {}, []
    assert len(cells) == 5
    for cell in cells:
        output = Cell()
        with contextlib.redirect_stdout(output):
            exec(compile(cell, "cell", "exec"), names)
        outputs.append(output.getvalue())
    assert outputs[1].count("\r") > 4 and "\033" not in outputs[1]
    first, *epochs, scores, folder, end = shown(outputs[1])
    assert first.startswith("512 training images") and end == "" and scores.startswith("kNN ") and folder.startswith("runs/notebook: ")
    assert [line.split("  step")[0] for line in epochs if "COLLAPSE" not in line] == ["epoch 1/2", "epoch 2/2"]
    assert 0 < float(outputs[2].split()[0]) <= 1
    assert "going on with runs/notebook after step 4 of 6" in outputs[3] and len(names["run"].rows) == 3
    assert names["h"].shape == (100, 128) and names["h"].norm(dim=1).allclose(torch.ones(100))


def test_a_shorter_line_leaves_nothing_of_a_longer_one_in_a_cell(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Cell())
    common.STATUS.show("x" * 200)
    common.STATUS.show("step 1")
    assert shown(sys.stdout.getvalue()) == ["step 1"]
    common.say("done")
    assert shown(sys.stdout.getvalue()) == ["done", ""]
