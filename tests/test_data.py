"""The data sets: what arrives on the device, what is said when it cannot, and in which order images are seen."""

import hashlib
import http.client
import io
import os
import pickle
import random
import shutil
import signal
import tarfile
import urllib.error
import zipfile
from types import SimpleNamespace

import common
import cw_rgp
import numpy as np
import pytest
import torch
import torchvision
from conftest import draw_image, is_one_line_error, make_folder, run_here, write_image
from PIL import Image

CPU = torch.device("cpu")
# Of the bytes of the four arrays of make_patterns(), in its order
PATTERNS_SHA256 = "670a7eea1a5f0bd811b4b332dade59c327d7494e9a28cd16aa603b2df7032eb9"


def parse(*argv):
    """Arguments of cw_rgp for a small data set: batches of 4."""
    return cw_rgp.parse_args(["--batch-size", "4", "--w-size", "4", *map(str, argv)])


def load(*argv):
    return common.load_data(parse(*argv), CPU)


def load_folder(root, *argv):
    """Without a hold-out, of which test_folders.py tells."""
    return load("--dataset", "folder", "--data-dir", root, "--test-fraction", 0, *argv)


def failure(*argv):
    """The one line that `load` ends with."""
    with pytest.raises(common.UserError) as raised:
        load(*argv)
    message = str(raised.value)
    assert "\n" not in message
    return message


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def random_images(count, side, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 3, side, side), dtype=np.uint8)


def same(images, expected):
    return images.dtype == torch.uint8 and np.array_equal(images.numpy(), expected)


# ---- cifar10, cifar100, stl10, tinyimagenet by name ---------------------------------------------


def write_pickle(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content, protocol=2))
    return [path.name, md5(path)]


def pack_and_register(monkeypatch, kind, root, folder):
    """Packs root/folder as the official archive beside it and makes torchvision expect this archive's checksum."""
    archive = root / kind.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(root / folder, folder)
    monkeypatch.setattr(kind, "tgz_md5", md5(archive))


def make_cifar(monkeypatch, root, kind, train_files, test_file, meta_file, label_key, names):
    """Six images per file in the layout of the official archive: rows of 3072 bytes, red plane first. -> images and labels by file."""
    folder, content, sums = root / kind.base_folder, {}, {}
    for seed, name in enumerate([*train_files, test_file]):
        images, labels = random_images(6, 32, seed), [(seed + 3 * i) % len(names) for i in range(6)]
        sums[name] = write_pickle(folder / name, {"data": images.reshape(6, 3072), label_key: labels, "coarse_labels": [0] * 6})
        content[name] = images, labels
    meta = write_pickle(folder / meta_file, {kind.meta["key"]: names})
    monkeypatch.setattr(kind, "train_list", [sums[name] for name in train_files])
    monkeypatch.setattr(kind, "test_list", [sums[test_file]])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "filename": meta[0], "md5": meta[1]})
    pack_and_register(monkeypatch, kind, root, kind.base_folder)
    return content


def make_cifar10(monkeypatch, root):
    return make_cifar(monkeypatch, root, torchvision.datasets.CIFAR10, [f"data_batch_{i}" for i in range(1, 6)], "test_batch",
                      "batches.meta", "labels", [f"name{i}" for i in range(10)])


def make_cifar100(monkeypatch, root):
    return make_cifar(monkeypatch, root, torchvision.datasets.CIFAR100, ["train"], "test", "meta", "fine_labels",
                      [f"name{i}" for i in range(100)])


def make_stl10(monkeypatch, root):
    """The official binary files: images column by column, labels 1 ... 10. -> images by split, labels by split from 0."""
    kind = torchvision.datasets.STL10
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    images = {split: random_images(count, 96, seed) for seed, (split, count) in enumerate((("train", 8), ("test", 5), ("unlabeled", 7)))}
    labels = {"train": np.array([9, 0, 1, 2, 3, 4, 5, 9]), "test": np.array([0, 9, 2, 2, 5])}
    for split, x in images.items():
        (folder / f"{split}_X.bin").write_bytes(np.ascontiguousarray(x.transpose(0, 1, 3, 2)).tobytes())
    for split, y in labels.items():
        (folder / f"{split}_y.bin").write_bytes((y + 1).astype(np.uint8).tobytes())
    (folder / "class_names.txt").write_text("".join(f"name{i}\n" for i in range(10)))
    files = {"train_list": ["train_X.bin", "train_y.bin", "unlabeled_X.bin"], "test_list": ["test_X.bin", "test_y.bin"]}
    for attribute, names in files.items():
        monkeypatch.setattr(kind, attribute, [[name, md5(folder / name)] for name in names])
    pack_and_register(monkeypatch, kind, root, kind.base_folder)
    return images, labels


def make_tinyimagenet(root):
    """Classes of one colour each; val/ is annotated in another order than its files'. -> (wnid, colour) of val, colour by wnid."""
    folder = root / "tiny-imagenet-200"
    colours = {"n01443537": (200, 30, 30), "n01629819": (30, 200, 30), "n01641577": (30, 30, 200)}
    for wnid, colour in colours.items():
        (folder / "train" / wnid / "images").mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (64, 64), colour).save(folder / "train" / wnid / "images" / f"{wnid}_{i}.JPEG")
        (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t0\t62\t62\n")
    (folder / "val" / "images").mkdir(parents=True)
    val = [(wnid, colours[wnid]) for wnid in ("n01641577", "n01443537", "n01629819", "n01641577")]
    for i, (wnid, colour) in enumerate(val):
        Image.new("RGB", (64, 64), colour).save(folder / "val" / "images" / f"val_{3 - i}.JPEG")
    annotations = [f"val_{3 - i}.JPEG\t{wnid}\t0\t0\t62\t62\n" for i, (wnid, _) in enumerate(val)]
    (folder / "val" / "val_annotations.txt").write_text("".join(annotations) + "\n")  # an editor's last line
    (folder / "wnids.txt").write_text("\n".join(reversed(colours)))
    (folder / "test" / "images").mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(folder / "test" / "images" / "test_0.JPEG")
    with zipfile.ZipFile(root / "tiny-imagenet-200.zip", "w") as archive:
        for path in folder.rglob("*"):
            archive.write(path, path.relative_to(root))
    return val, colours


@pytest.fixture
def no_network(monkeypatch):
    """Any attempt to reach the network fails as it does without one."""
    def refuse(*_, **__):
        raise urllib.error.URLError("[Errno -3] Temporary failure in name resolution")
    monkeypatch.setattr("urllib.request.urlopen", refuse)


def assert_cifar_arrived(data, content, train_files, test_file, names):
    assert same(data.train, np.concatenate([content[name][0] for name in train_files]))
    assert data.train_labels.tolist() == sum((content[name][1] for name in train_files), [])
    assert same(data.test, content[test_file][0]) and data.test_labels.tolist() == content[test_file][1]
    assert data.train_labels.dtype == torch.int64 and list(data.class_names) == names and data.size == 32


def test_cifar10_from_its_own_files(monkeypatch, tmp_path, no_network):
    content = make_cifar10(monkeypatch, tmp_path)
    data = load("--dataset", "cifar10", "--data-dir", tmp_path)
    assert_cifar_arrived(data, content, [f"data_batch_{i}" for i in range(1, 6)], "test_batch", [f"name{i}" for i in range(10)])
    assert data.mean.flatten().tolist() == pytest.approx([0.4914, 0.4822, 0.4465])


def test_cifar100_from_its_own_files_with_fine_labels(monkeypatch, tmp_path, no_network):
    content = make_cifar100(monkeypatch, tmp_path)
    data = load("--dataset", "cifar100", "--data-dir", tmp_path)
    assert_cifar_arrived(data, content, ["train"], "test", [f"name{i}" for i in range(100)])


def test_stl10_pretrains_on_train_and_unlabeled_with_the_labelled_part_as_bank(monkeypatch, tmp_path, no_network):
    images, labels = make_stl10(monkeypatch, tmp_path)
    data = load("--dataset", "stl10", "--data-dir", tmp_path)
    assert same(data.train, np.concatenate([images["train"], images["unlabeled"]]))
    assert same(data.labelled_train, images["train"]) and data.train_labels.tolist() == labels["train"].tolist()
    assert same(data.bank, images["train"]) and data.bank_labels.tolist() == labels["train"].tolist()
    assert same(data.test, images["test"]) and data.test_labels.tolist() == labels["test"].tolist()
    assert data.size == 64 and data.steps_per_epoch == 15 // 4 and list(data.class_names) == [f"name{i}" for i in range(10)]
    assert data.augment(data.train[:4], 0)[0].shape == (4, 3, 64, 64)


def test_tinyimagenet_from_its_own_files(tmp_path, no_network):
    val, colours = make_tinyimagenet(tmp_path)
    data = load("--dataset", "tinyimagenet", "--data-dir", tmp_path)
    assert data.class_names == sorted(colours) and data.train.shape == (9, 3, 64, 64) and data.test.shape == (4, 3, 64, 64)
    parts = (data.train, data.train_labels, sorted(colours) * 3), (data.test, data.test_labels, [wnid for wnid, _ in val])
    for images, labels, wnids in parts:
        seen = [data.class_names[i] for i in labels]
        assert sorted(seen) == sorted(wnids)
        for image, wnid in zip(images, seen):
            assert image.float().mean((1, 2)).tolist() == pytest.approx(colours[wnid], abs=4)
    assert [data.class_names[i] for i in data.test_labels] == [wnid for wnid, _ in val]


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "stl10", "tinyimagenet"])
def test_an_archive_put_there_by_hand_is_unpacked_offline(monkeypatch, tmp_path, no_network, name):
    """The remedy that the message proposes works."""
    {"cifar10": make_cifar10, "cifar100": make_cifar100, "stl10": make_stl10,
     "tinyimagenet": lambda _, root: make_tinyimagenet(root)}[name](monkeypatch, tmp_path)
    for path in tmp_path.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
    assert len(load("--dataset", name, "--data-dir", tmp_path).test) >= 4


# ---- refused and interrupted downloads -----------------------------------------------------------


class CutShort(io.BytesIO):
    """A response that announces more bytes than it has."""
    headers, length = {"Content-Length": "1000"}, 1000
    url = "https://somewhere/file"

    def read(self, size=-1):
        part = super().read(size)
        if not part:
            raise http.client.IncompleteRead(b"", 500)
        return part


def refuse_with(fault):
    def urlopen(*_, **__):
        if isinstance(fault, Exception):
            raise fault
        response = fault()
        response.geturl = lambda: response.url
        return response
    return urlopen


FAULTS = {
    "no name server": urllib.error.URLError("[Errno -3] Temporary failure in name resolution"),
    "forbidden": urllib.error.HTTPError("https://somewhere", 403, "Forbidden", {}, None),
    "reset": ConnectionResetError(104, "Connection reset by peer"),
    "timeout": TimeoutError("timed out"),
    "corrupted": RuntimeError("File not found or corrupted."),
    "two lines": RuntimeError("first line\nsecond line"),
    "cut short": lambda: CutShort(b"x" * 500),
    "a web page instead": lambda: type("Page", (CutShort,), {"read": io.BytesIO.read})(b"<html>Sign in to this network</html>"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name, archive", [("cifar10", "cifar-10-python.tar.gz"), ("cifar100", "cifar-100-python.tar.gz"),
                                           ("stl10", "stl10_binary.tar.gz"), ("tinyimagenet", "tiny-imagenet-200.zip")])
def test_a_failed_download_is_one_line_with_two_ways_out(monkeypatch, tmp_path, capfd, name, archive, fault):
    monkeypatch.setattr("urllib.request.urlopen", refuse_with(FAULTS[fault]))
    message = failure("--dataset", name, "--data-dir", tmp_path / "data")
    for needed in (name, archive, str(tmp_path / "data"), "--dataset patterns"):
        assert needed in message


def test_a_failed_download_ends_the_script_with_status_2(monkeypatch, tmp_path, no_network):
    result = run_here("cw_rgp", ["--dataset", "cifar10", "--data-dir", tmp_path / "data", "--out", tmp_path / "run"])
    assert is_one_line_error(result) and not (tmp_path / "run").exists()


def test_an_archive_cut_short_by_an_interrupted_download_is_named(tmp_path, no_network):
    """Tiny ImageNet has no checksum in torchvision: half a zip file is not taken for the whole."""
    make_tinyimagenet(tmp_path)
    shutil.rmtree(tmp_path / "tiny-imagenet-200")
    archive = tmp_path / "tiny-imagenet-200.zip"
    archive.write_bytes(archive.read_bytes()[:1000])
    message = failure("--dataset", "tinyimagenet", "--data-dir", tmp_path)
    assert "not a zip file" in message and "put tiny-imagenet-200.zip there," in message


# ---- folder: layouts -----------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["train+test", "train+val", "classes only"])
def test_folder_layouts_with_labels(tmp_path, layout):
    make_folder(tmp_path, train=12, test=8)
    if layout == "train+val":
        (tmp_path / "test").rename(tmp_path / "val")
    if layout == "classes only":
        shutil.rmtree(tmp_path / "test")
        for path in (tmp_path / "train").iterdir():
            path.rename(tmp_path / path.name)
        (tmp_path / "train").rmdir()
    data = load_folder(tmp_path)
    assert data.train.shape == (12, 3, 32, 32) and data.class_names == [f"class{i}" for i in range(4)]
    rng = np.random.default_rng(0)
    drawn = [draw_image(rng, i % 4, 32).transpose(2, 0, 1) for i in range(20)]
    assert data.labelled == (layout != "classes only")
    parts = [(data.train, data.train_labels, drawn[:12]), (data.test, data.test_labels, drawn[12:])]
    for images, labels, expected in parts[: 1 + data.labelled]:
        order = [i for k in range(4) for i in range(len(expected)) if i % 4 == k]  # sorted by class, then by name
        assert same(images, np.stack([expected[i] for i in order])) and labels.tolist() == [i % 4 for i in order]


def test_flat_folder_trains_without_labels_and_keeps_the_other_monitors(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(40):
        write_image(tmp_path / "images" / f"{i:03d}.png", draw_image(rng, i % 2, 16))
    result = run_here("cw_rgp", ["--dataset", "folder", "--data-dir", tmp_path / "images", "--out", tmp_path / "run", "--batch-size", 20,
                                 "--w-size", 10, "--proj-dim", 64, "--groups", 1, "--w-iter", 1, "--epochs", 1, "--precision", "fp32"])
    assert result.status == 0 and result.err == "" and "no kNN" in result.out
    header, row = (line.split(",") for line in (tmp_path / "run" / "metrics.csv").read_text().splitlines())
    row = dict(zip(header, row))
    assert row["knn"] == "" and all(np.isfinite(float(row[name])) for name in ("loss", "std_sqrt_d", "rank", "stable_rank", "corr"))


def test_flat_test_folder_beside_labelled_training_images(tmp_path):
    make_folder(tmp_path, train=12, test=4)
    for path in list((tmp_path / "test").rglob("*.png")):
        path.rename(tmp_path / "test" / path.name)
    data = load_folder(tmp_path)
    assert data.test_labels is None and len(data.test) == 4 and data.train_labels is not None and not data.labelled


def test_images_in_deeper_folders_belong_to_the_class_at_the_top(tmp_path):
    for i in range(8):
        write_image(tmp_path / f"class{i % 2}" / f"session{i}" / "image.png", draw_image(np.random.default_rng(i), 0, 16))
    data = load_folder(tmp_path)
    assert data.class_names == ["class0", "class1"] and data.train_labels.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


def test_hidden_files_and_other_files_are_not_images(tmp_path):
    make_folder(tmp_path, train=8, test=0)
    for name in ("._0000.png", ".hidden.jpg", "notes.txt", "Thumbs.db"):
        (tmp_path / "train" / "class0" / name).write_bytes(b"not an image")
    assert len(load_folder(tmp_path).train) == 8


def test_upper_case_and_unusual_names_are_read(tmp_path):
    for name in ("A.PNG", "b c.Png", "ü-漢.png", "d.e.png"):
        write_image(tmp_path / "x.png", draw_image(np.random.default_rng(0), 0, 16))
        (tmp_path / "x.png").rename(tmp_path / name)
    assert len(load_folder(tmp_path).train) == 4


# ---- folder: kinds of images ---------------------------------------------------------------------


def gradient(side=64):
    """Red grows to the right, green grows downwards, blue is 100: tells orientation and channel order."""
    ramp = np.linspace(0, 250, side).astype(np.uint8)
    return np.stack([np.tile(ramp, (side, 1)), np.tile(ramp[:, None], (1, side)), np.full((side, side), 100, np.uint8)], -1)


def save_kinds(folder):
    folder.mkdir(parents=True)
    rgb = Image.fromarray(gradient())
    grey = Image.fromarray(gradient()[..., 0])
    rgb.save(folder / "rgb.png")
    rgb.save(folder / "jpeg.jpg", quality=95)
    grey.save(folder / "grey.png")
    grey.save(folder / "grey.jpg", quality=95)
    rgb.quantize(256).save(folder / "palette.png")
    rgb.convert("RGBA").save(folder / "rgba.png")
    Image.merge("LA", (grey, Image.new("L", grey.size, 255))).save(folder / "grey_alpha.png")
    rgb.convert("CMYK").save(folder / "cmyk.jpg", quality=95)
    sixteen = gradient()[..., 0].astype(np.uint16) * 257
    Image.fromarray(sixteen).save(folder / "sixteen.png")
    Image.fromarray(sixteen).save(folder / "sixteen.tif")
    Image.fromarray(gradient()[..., 0] > 125).save(folder / "bilevel.png")
    rgb.save(folder / "web.webp", lossless=True)
    rgb.save(folder / "bitmap.bmp")


GREY = ("grey.png", "grey.jpg", "grey_alpha.png", "sixteen.png", "sixteen.tif")


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    root, deep = (tmp_path_factory.mktemp("kinds") / name for name in ("images", "deep"))
    save_kinds(root)
    deep.mkdir()
    found = {}
    for path in list(root.glob("sixteen.*")):  # of another kind than 8 bits
        path.rename(deep / path.name)
    for folder in (root, deep):
        found.update(zip(sorted(path.name for path in folder.iterdir()), load_folder(folder, "--batch-size", 2, "--w-size", 2).train))
    return found


@pytest.mark.parametrize("name", ["rgb.png", "jpeg.jpg", "palette.png", "rgba.png", "cmyk.jpg", "web.webp", "bitmap.bmp"])
def test_colour_images_of_every_kind_arrive_as_rgb(kinds, name):
    expected = torch.from_numpy(gradient()).permute(2, 0, 1)
    tolerance = 8 if name in ("jpeg.jpg", "palette.png", "cmyk.jpg") else 0
    assert kinds[name].shape == (3, 64, 64)
    assert (kinds[name].int() - expected.int()).abs().float().mean((1, 2)).max() <= tolerance


@pytest.mark.parametrize("name", GREY)
def test_grey_images_of_every_kind_arrive_as_three_equal_channels(kinds, name):
    expected = torch.from_numpy(gradient()[..., 0]).int()
    if name.startswith("sixteen"):
        expected = (expected * 255 / 250).int()  # the range of these files, 0 ... 250 * 257, fills all 8 bits
    assert all((channel.int() - expected).abs().max() <= 4 for channel in kinds[name])


def test_bilevel_images_are_black_and_white(kinds):
    assert kinds["bilevel.png"].unique().tolist() == [0, 255] and kinds["bilevel.png"][:, 5, 60].tolist() == [255] * 3


def test_different_sizes_become_squares_of_the_centre(tmp_path):
    for i, (width, height) in enumerate(((64, 64), (200, 100), (100, 200), (65, 64), (640, 64), (33, 77), (20, 20))):
        x, y = np.meshgrid(np.linspace(-1, 1, width), np.linspace(-1, 1, height))
        square = np.stack([x * width / min(width, height), y * height / min(width, height), 0 * x], -1)  # the centre square is -1 ... 1
        Image.fromarray(np.clip(127.5 + 80 * square, 0, 255).astype(np.uint8)).save(tmp_path / f"{i}.png")
    data = load_folder(tmp_path, "--image-size", 32)
    assert data.train.shape == (7, 3, 37, 37)
    expected = 127.5 + 80 * torch.linspace(-1 + 1 / 37, 1 - 1 / 37, 37)
    for image in data.train.float():
        assert (image[0].mean(0) - expected).abs().max() < 6 and (image[1].mean(1) - expected).abs().max() < 6


def test_image_size_defaults_to_the_images_own_up_to_64(tmp_path):
    for side in (24, 100):
        make_folder(tmp_path / str(side), train=6, test=4, side=side)
    assert load_folder(tmp_path / "24").size == 24 and load_folder(tmp_path / "24").train.shape[-1] == 24
    data = load_folder(tmp_path / "100")
    assert data.size == 64 and data.train.shape[-1] == 74
    assert next(data.eval_views(data.test, torch.arange(2), 2)).shape == (2, 3, 64, 64)


# ---- folder: broken files ------------------------------------------------------------------------


def save_broken(folder):
    """Files that look like images and are none. -> their names."""
    good = io.BytesIO()
    Image.fromarray(gradient()).save(good, "JPEG")
    png = io.BytesIO()
    Image.fromarray(gradient()).save(png, "PNG")
    tiff = io.BytesIO()
    Image.fromarray(gradient()).save(tiff, "TIFF")
    content = {
        "empty.png": b"", "text.jpg": b"<html>404</html>", "noise.png": random.Random(0).randbytes(2000),
        "truncated.jpg": good.getvalue()[: len(good.getvalue()) // 2], "header.jpg": good.getvalue()[:20],
        "truncated.png": png.getvalue()[: len(png.getvalue()) // 2],
        "flipped.png": png.getvalue()[:60] + b"\xff" * 40 + png.getvalue()[100:],  # inside the picture: torchvision's own decoder crashes
        "truncated.tif": tiff.getvalue()[:200], "header.webp": b"RIFF\x10\x00\x00\x00WEBPVP8 ", "header.bmp": b"BM\x00\x00",
    }
    for name, data in content.items():
        (folder / name).write_bytes(data)
    return list(content)


def test_broken_files_among_good_ones_are_skipped_counted_and_named(tmp_path, capsys):
    make_folder(tmp_path, train=8, test=4)
    broken = save_broken(tmp_path / "train" / "class1")
    data = load_folder(tmp_path)
    assert len(data.train) == 8 and data.train_labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and f"skipped {len(broken)} unreadable: " in lines[0]
    assert sum(name in lines[0] for name in broken) >= 3


@pytest.mark.parametrize("name", ["truncated.jpg", "truncated.png", "flipped.png", "truncated.tif", "empty.png", "noise.png", "header.bmp"])
def test_each_kind_of_broken_file_is_named(tmp_path, capsys, name):
    make_folder(tmp_path, train=8, test=0)
    save_broken(tmp_path / "train" / "class0")
    for path in (tmp_path / "train" / "class0").iterdir():
        if path.name != name and not path.name.startswith("000"):
            path.unlink()
    assert len(load_folder(tmp_path).train) == 8
    assert f"skipped 1 unreadable: {tmp_path}/train/class0/{name}" in capsys.readouterr().err


def test_a_picture_too_large_for_pillow_is_called_so(tmp_path, capsys, monkeypatch):
    make_folder(tmp_path, train=8, test=0)
    write_image(tmp_path / "train" / "class0" / "huge.png", np.zeros((100, 100, 3), np.uint8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)  # Pillow raises DecompressionBombError above twice this
    assert len(load_folder(tmp_path).train) == 8
    assert capsys.readouterr().err == f"skipped 1 too large: {tmp_path}/train/class0/huge.png\n"


def test_a_class_whose_images_are_all_broken_does_not_shift_the_other_labels(tmp_path, capsys):
    make_folder(tmp_path, train=8, test=4)
    for path in (tmp_path / "train" / "class1").iterdir():
        path.write_bytes(b"broken")
    data = load_folder(tmp_path)
    assert data.train_labels.tolist() == [0, 0, 2, 2, 3, 3] and data.test_labels.tolist() == [0, 1, 2, 3]


def test_all_files_broken_is_one_line(tmp_path):
    save_broken(tmp_path)
    message = failure("--dataset", "folder", "--data-dir", tmp_path)
    assert str(tmp_path) in message and "skipped: 10 unreadable" in message


def test_one_readable_image_among_broken_ones_is_one_line(tmp_path, capsys):
    save_broken(tmp_path)
    write_image(tmp_path / "good.png", gradient())
    assert str(tmp_path) in failure("--dataset", "folder", "--data-dir", tmp_path)


def test_all_test_images_broken_leaves_training_without_a_test_set(tmp_path, capsys):
    make_folder(tmp_path, train=8, test=4)
    for path in (tmp_path / "test").rglob("*.png"):
        path.write_bytes(b"broken")
    data = load_folder(tmp_path)
    assert not data.labelled and data.test_labels is None and data.test is data.labelled_train and "skipped 4 unreadable" in capsys.readouterr().err


# ---- folder: too little or not fitting -----------------------------------------------------------


def test_one_class_is_refused_with_a_way_out_that_works(tmp_path):
    make_folder(tmp_path, train=8, test=0, classes=1)
    message = failure("--dataset", "folder", "--data-dir", tmp_path)
    assert "class0" in message and "one class" in message and str(tmp_path / "train") in message
    for path in list((tmp_path / "train" / "class0").iterdir()):
        path.rename(tmp_path / "train" / path.name)
    (tmp_path / "train" / "class0").rmdir()
    assert load_folder(tmp_path).train_labels is None


def test_one_image_is_refused(tmp_path):
    write_image(tmp_path / "only.png", gradient())
    assert "one image" in failure("--dataset", "folder", "--data-dir", tmp_path)


@pytest.mark.parametrize("more", [[], ["--stream", "--num-workers", "0"]])
def test_images_below_8_pixels_are_skipped_counted_and_named(tmp_path, capsys, more):
    make_folder(tmp_path, train=8, test=0)
    for name, shape in (("small", (7, 20, 3)), ("0", (20, 7, 3))):  # 0.png is the first of all
        write_image(tmp_path / "train" / "class0" / f"{name}.png", np.zeros(shape, np.uint8))
    data = load_folder(tmp_path, *more)
    out, err = capsys.readouterr()
    assert len(data.train) == 8 and data.size == 32 and "skipped: 2 smaller than 8x8" in out
    assert err == f"skipped 2 smaller than 8x8: {tmp_path}/train/class0/0.png, {tmp_path}/train/class0/small.png\n"


@pytest.mark.parametrize("inside", [[], ["train"], ["train/class0", "train/class1", "test"]])
def test_an_empty_folder_is_named(tmp_path, inside):
    for name in inside:
        (tmp_path / name).mkdir(parents=True)
    message = failure("--dataset", "folder", "--data-dir", tmp_path)
    assert str(tmp_path) in message and "no images" in message


def test_an_unknown_folder_is_named(tmp_path):
    assert str(tmp_path / "nowhere") in failure("--dataset", "folder", "--data-dir", tmp_path / "nowhere")


def test_a_file_instead_of_a_folder_is_named(tmp_path):
    write_image(tmp_path / "image.png", gradient())
    assert "image.png" in failure("--dataset", "folder", "--data-dir", tmp_path / "image.png")


def test_a_class_of_the_test_set_that_is_not_in_train_is_named(tmp_path):
    make_folder(tmp_path, train=8, test=8)
    (tmp_path / "test" / "class3").rename(tmp_path / "test" / "stranger")
    assert "test/stranger" in failure("--dataset", "folder", "--data-dir", tmp_path)


def test_classes_missing_in_test_keep_the_numbers_of_train(tmp_path):
    make_folder(tmp_path, train=8, test=8)
    shutil.rmtree(tmp_path / "test" / "class0")
    shutil.rmtree(tmp_path / "test" / "class2")
    assert load_folder(tmp_path).test_labels.tolist() == [1, 1, 3, 3]


# ---- streaming -----------------------------------------------------------------------------------


def stream_flags(root, out, *more):
    return ["--dataset", "folder", "--data-dir", root, "--out", out, "--batch-size", 16, "--w-size", 16, "--proj-dim", 64, "--groups", 2,
            "--w-iter", 1, "--epochs", 1, "--precision", "fp32", "--log-every", 1, "--optimizer", "adam", *more]


@pytest.fixture(scope="module")
def large_folder(tmp_path_factory):
    """32 training and 8 test images, not square, larger than the views."""
    root, rng = tmp_path_factory.mktemp("large"), np.random.default_rng(0)
    for i in range(40):
        write_image(root / ("train" if i < 32 else "test") / f"class{i % 2}" / f"{i}.png", draw_image(rng, i % 2, 56)[:, : 48 + i % 3])
    return root


def test_streamed_runs_are_bit_identical_for_any_number_of_workers(large_folder, tmp_path):
    models = []
    for workers in (0, 1, 2):
        out = tmp_path / f"run{workers}"
        result = run_here("cw_rgp", stream_flags(large_folder, out, "--image-size", "16", "--stream", "--num-workers", workers))
        assert result.status == 0, result.err
        models.append(torch.load(out / "last.pt", weights_only=True)["model"])
    for name in models[0]:
        assert torch.equal(models[0][name], models[1][name]) and torch.equal(models[0][name], models[2][name]), name


@pytest.mark.parametrize("side, size", [(32, 32), (64, 32), (20, 32)])
def test_streaming_measures_on_the_same_views_as_from_memory(tmp_path, side, size):
    make_folder(tmp_path, train=8, test=6, side=side)
    flags = (tmp_path, "--image-size", size, "--num-workers", 0)
    memory, stream = load_folder(*flags), load_folder(*flags, "--stream")
    assert isinstance(stream.train, common.Files) and torch.is_tensor(memory.train)
    assert torch.equal(memory.mean, stream.mean) and torch.equal(memory.std, stream.std)
    for images in ("train", "test"):
        index = torch.tensor([5, 0, 3])
        a, b = (torch.cat(list(data.eval_views(getattr(data, images), index, 2))) for data in (memory, stream))
        assert torch.equal(a, b)
    assert torch.equal(memory.test_labels, stream.test_labels) and torch.equal(memory.train_labels, stream.train_labels)


def boxes_of(views):
    """[n, 4]: left, top, width, height in pixels of the crops of 64-pixel `gradient` images, read from their colours. Mirrored or not."""
    red, green = views[:, 0].mean(1), views[:, 1].mean(2)  # [n, size]
    stretch = red.shape[1] / (red.shape[1] - 1)
    width, height = (red[:, -1] - red[:, 0]).abs() * stretch, (green[:, -1] - green[:, 0]).abs() * stretch
    return (torch.stack([red.mean(1) - width / 2, green.mean(1) - height / 2, width, height], 1) * 64 / 250).round()


@pytest.mark.parametrize("recipe", ["crop-flip", "moco-cifar"])
def test_streamed_crops_have_the_distribution_of_those_from_memory(tmp_path, monkeypatch, recipe):
    """The boxes are read from pictures of coordinates; Kolmogorov-Smirnov distance of 1200 boxes each way (0.1 %: 0.08)."""
    for i in range(100):
        write_image(tmp_path / f"{i:03d}.png", gradient())
    crop_only = [tuple(op for op in view if op[0] in ("crop", "flip")) for view in common.RECIPES[recipe]]
    monkeypatch.setitem(common.RECIPES, recipe, crop_only)
    found = []
    for stream in ([], ["--stream", "--num-workers", "0"]):
        data = load_folder(tmp_path, "--image-size", 64, "--augment", recipe, "--batch-size", 100, "--w-size", 100, *stream)
        views = [view for epoch in range(6) for batch in data.batches(epoch) for view in data.augment(batch, epoch)]
        assert all(view.shape == (100, 3, 64, 64) for view in views)
        boxes = boxes_of((torch.cat(views) * data.std + data.mean) * 255)
        found.append((boxes[:, 2] * boxes[:, 3], *boxes.T, boxes[:, 2] / boxes[:, 3]))
    for memory, stream in zip(*found):
        assert len(memory) == len(stream) == 1200
        points = torch.cat([memory, stream])[:, None]
        assert ((memory < points).float().mean(1) - (stream < points).float().mean(1)).abs().max() < 0.08


@pytest.mark.parametrize("recipe", ["crop-flip", "w-mse", "byol"])
@pytest.mark.parametrize("box", [[5, 9, 40, 33], [0, 0, 64, 64], [50, 3, 9, 12]])
def test_a_streamed_crop_of_a_given_box_has_the_pixels_of_the_one_from_memory(tmp_path, monkeypatch, recipe, box):
    """Bilinear and bicubic alike, but for the rounding to 8 bits."""
    rng = np.random.default_rng(0)
    for i in range(4):
        write_image(tmp_path / f"{i}.png", draw_image(rng, i, 64))
    monkeypatch.setitem(common.RECIPES, recipe, [tuple(op for op in view if op[0] == "crop") for view in common.RECIPES[recipe]])
    monkeypatch.setattr(common, "draw_boxes", lambda n, *_: np.tile(np.array([box]), (n, 1)))
    views = []
    for stream in ([], ["--stream", "--num-workers", "0"]):
        data = load_folder(tmp_path, "--image-size", 32, "--augment", recipe, *stream)
        monkeypatch.setattr(data, "size", 32)
        if not stream:  # keep the files' own 64 pixels instead of 8/7 of the view
            data.train = torch.stack([common.read_image(str(tmp_path / f"{i}.png")) for i in range(4)])
        views.append([view * data.std + data.mean for batch in data.batches(0) for view in data.augment(batch, 0)])
    for memory, stream in zip(*views):
        assert (memory - stream).abs().max() < 1.01 / 255


def test_streamed_views_of_one_image_differ_and_those_of_the_next_epoch_too(large_folder):
    data = load_folder(large_folder, "--image-size", 16, "--stream", "--num-workers", 0, "--batch-size", 32, "--w-size", 32)
    (first,), (again,), (later,) = list(data.batches(0)), list(data.batches(0)), list(data.batches(1))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], first[1])
    where = lambda epoch: np.random.default_rng((0, 1, epoch)).permutation(32).argsort()[0]  # row of image 0
    assert not torch.equal(first[0][where(0)], later[0][where(1)])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_breaks_during_a_streamed_run_is_one_line_that_names_it(small_folder, tmp_path, workers):
    root = tmp_path / "images"
    shutil.copytree(small_folder, root)
    broken = next((root / "train").rglob("0007.png"))
    data = load_folder(root, "--image-size", 16, "--stream", "--num-workers", workers, "--batch-size", 64, "--w-size", 64)
    broken.write_bytes(b"broken")
    with pytest.raises(common.UserError) as raised:
        list(data.batches(0))
    message = str(raised.value)
    assert message.startswith(f"{broken} vanished or broke; put it back and go on with --resume") and "\n" not in message


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_vanishes_during_a_streamed_run_is_one_line_that_names_it(small_folder, tmp_path, monkeypatch, workers):
    root = tmp_path / "images"
    shutil.copytree(small_folder, root)
    gone = next((root / "train").rglob("0007.png"))
    real = common.Run.progress

    def vanish(self, step, loss):
        gone.unlink(missing_ok=True)
        real(self, step, loss)

    monkeypatch.setattr(common.Run, "progress", vanish)
    flags = stream_flags(root, tmp_path / "run", "--image-size", "16", "--stream",
                         "--num-workers", workers, "--epochs", 2, "--eval-every", 0)
    result = run_here("cw_rgp", flags)
    assert is_one_line_error(result) and str(gone) in result.err, result.err


def test_a_loader_process_that_dies_is_one_line(large_folder, tmp_path, monkeypatch):
    """As the system ends one that finds no memory, or no shared memory (a container often has 64 MB of it)."""

    def die(*_):
        assert torch.utils.data.get_worker_info() is not None  # not the process of this test
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(common, "crop_one", die)
    result = run_here("cw_rgp", stream_flags(large_folder, tmp_path / "run", "--image-size", "16", "--stream", "--num-workers", "1"))
    assert is_one_line_error(result) and "a loader process died" in result.err and "try fewer --num-workers" in result.err


def test_the_way_out_for_a_vanished_file_works(small_folder, tmp_path, monkeypatch):
    """The message says what to do and then to --resume: put back, the run ends as if nothing had happened."""
    root = tmp_path / "images"
    shutil.copytree(small_folder, root)
    gone = next((root / "train").rglob("0007.png"))
    flags = stream_flags(root, tmp_path / "run", "--image-size", "16", "--stream", "--num-workers", "0", "--epochs", "2")
    end_epoch = common.Run.end_epoch
    monkeypatch.setattr(common.Run, "end_epoch", lambda self, step, lr: (end_epoch(self, step, lr), gone.rename(tmp_path / "aside")))
    result = run_here("cw_rgp", flags)
    assert is_one_line_error(result) and "--resume" in result.err and "remove it from the folder and go on" not in result.err
    monkeypatch.setattr(common.Run, "end_epoch", end_epoch)
    (tmp_path / "aside").rename(gone)
    assert run_here("cw_rgp", [*flags, "--resume"]).status == 0


# ---- order ---------------------------------------------------------------------------------------


def numbered(*argv):
    """A data set of 50 images whose pixels hold their number; batches of 8."""
    images = torch.arange(50, dtype=torch.uint8).view(50, 1, 1, 1).expand(50, 3, 8, 8)
    args = parse("--image-size", "8", "--batch-size", "8", "--w-size", "8", *argv)
    return common.Data(args, CPU, images, None, None, None, [])


def rows(data, epoch, first=0):
    return [batch[:, 0, 0, 0].tolist() for batch in data.batches(epoch, first)]


def test_an_epoch_is_a_permutation_without_the_last_incomplete_batch():
    data = numbered()
    seen = rows(data, 3)
    assert data.steps_per_epoch == 6 and [len(batch) for batch in seen] == [8] * 6
    flat = sum(seen, [])
    assert len(set(flat)) == 48 and set(flat) <= set(range(50)) and flat != sorted(flat)


def test_which_images_are_left_out_changes_with_the_epoch():
    left_out = {frozenset(range(50)) - set(sum(rows(numbered(), epoch), [])) for epoch in range(8)}
    assert len(left_out) > 4


def test_the_order_is_a_function_of_seed_and_epoch():
    torch.manual_seed(1)
    np.random.seed(1)
    first = rows(numbered("--seed", "5"), 2)
    torch.manual_seed(2)
    np.random.seed(2)
    assert rows(numbered("--seed", "5"), 2) == first
    others = [rows(numbered("--seed", "5"), epoch) for epoch in (0, 1, 3)] + [rows(numbered("--seed", "6"), 2)]
    assert all(other != first for other in others) and len({str(other) for other in others}) == 4


def test_batches_go_on_at_any_batch_with_the_same_rows():
    data = numbered()
    whole = rows(data, 4)
    for first in range(data.steps_per_epoch + 1):
        assert rows(data, 4, first) == whole[first:]


@pytest.mark.parametrize("world", [2, 4])
def test_the_rows_of_all_ranks_are_those_of_one_process(monkeypatch, world):
    alone = rows(numbered(), 1, 2)
    monkeypatch.setenv("WORLD_SIZE", str(world))
    parts = []
    for rank in range(world):
        monkeypatch.setenv("RANK", str(rank))
        parts.append(rows(numbered(), 1, 2))
    assert [sum(step, []) for step in zip(*parts)] == alone


@pytest.mark.parametrize("world", [2, 4])
def test_the_streamed_rows_and_crops_of_all_ranks_are_those_of_one_process(monkeypatch, large_folder, world):
    flags = (large_folder, "--image-size", 16, "--stream", "--num-workers", 0, "--batch-size", 8, "--w-size", 8)
    alone = list(load_folder(*flags).batches(1, 1))
    monkeypatch.setenv("WORLD_SIZE", str(world))
    parts = []
    for rank in range(world):
        monkeypatch.setenv("RANK", str(rank))
        parts.append(list(load_folder(*flags).batches(1, 1)))
    assert len(alone) == 3
    for step, views in enumerate(alone):
        for v, view in enumerate(views):
            assert torch.equal(torch.cat([part[step][v] for part in parts]), view)


def test_streamed_batches_go_on_at_any_batch_with_the_same_crops(large_folder):
    data = load_folder(large_folder, "--image-size", 16, "--stream", "--num-workers", 0, "--batch-size", 8, "--w-size", 8)
    whole, rest = list(data.batches(1)), list(data.batches(1, 2))
    assert len(whole) == 4 and len(rest) == 2
    assert all(torch.equal(a, b) for x, y in zip(whole[2:], rest) for a, b in zip(x, y))


def test_the_pictures_of_a_memory_batch_are_those_of_its_rows(small_folder):
    data = load_folder(small_folder, "--batch-size", 32, "--w-size", 32)
    order = np.random.default_rng((0, 1, 7)).permutation(64)
    assert torch.equal(torch.cat(list(data.batches(7))), data.train[order])


# ---- patterns ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def patterns():
    return common.make_patterns()


def test_patterns_have_the_promised_shapes_and_balanced_shuffled_labels(patterns):
    train, train_labels, test, test_labels = patterns
    assert train.shape == (10_000, 3, 32, 32) and test.shape == (2_000, 3, 32, 32) and train.dtype == test.dtype == np.uint8
    assert np.bincount(train_labels).tolist() == [1000] * 10 and np.bincount(test_labels).tolist() == [200] * 10
    for labels in (train_labels, test_labels):
        assert len(common.PATTERN_CLASSES) == 10 and 0.05 < (labels[1:] == labels[:-1]).mean() < 0.15
        assert all(len(set(part)) == 10 for part in np.array_split(labels, 20))


def test_patterns_use_their_range_and_no_image_comes_twice(patterns):
    images = np.concatenate([patterns[0], patterns[2]])
    assert len({image.tobytes() for image in images}) == 12_000
    assert (images == 0).mean() < 0.1 and (images == 255).mean() < 0.1 and images.std((1, 2, 3)).min() > 5


def test_patterns_are_the_same_bytes_everywhere(patterns):
    assert hashlib.sha256(b"".join(np.ascontiguousarray(part).tobytes() for part in patterns)).hexdigest() == PATTERNS_SHA256


def test_patterns_change_with_the_seed():
    assert not np.array_equal(common.make_patterns(0, 100, 10)[0], common.make_patterns(1, 100, 10)[0])


def test_patterns_cannot_be_told_by_raw_pixels(patterns, monkeypatch):
    """By the protocol of a run's closing line."""
    monkeypatch.setattr(common, "make_patterns", lambda: patterns)
    data = load()
    bank, queries = (common.extract(torch.nn.Flatten(), data, images) for images in (data.labelled_train, data.test))
    accuracy = common.knn_accuracy(bank, data.train_labels, queries, data.test_labels)
    assert 0.08 < accuracy <= 0.25


def test_patterns_colours_do_not_tell_the_class(patterns):
    """A linear guess from each image's mean and deviation of the colours stays near chance: only the texture tells."""
    x = np.concatenate([patterns[0].mean((2, 3)), patterns[0].std((2, 3))], 1)
    features = [np.c_[np.ones(len(part)), part] for part in (x, np.concatenate([patterns[2].mean((2, 3)), patterns[2].std((2, 3))], 1))]
    weights = np.linalg.lstsq(features[0], np.eye(10)[patterns[1]], rcond=None)[0]
    assert ((features[1] @ weights).argmax(1) == patterns[3]).mean() < 0.30


def test_patterns_is_the_default_and_needs_no_files(tmp_path, monkeypatch, no_network):
    monkeypatch.chdir(tmp_path)
    small = common.make_patterns(0, 200, 40)
    monkeypatch.setattr(common, "make_patterns", lambda: small)
    data = load()
    assert data.train.shape == (200, 3, 32, 32) and data.size == 32 and data.class_names == common.PATTERN_CLASSES
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("count", [1, 2, 1000, 5000, 49_976, 49_999])
def test_evenly_spaced_takes_no_image_twice(count):
    """As floor(i (N - 1) / (count - 1)), in whole numbers: a spacing in float32 took one of 49,976 twice."""
    found = common.evenly_spaced(torch.arange(50_000), None, count)[0].tolist()
    assert found == [i * 49_999 // max(1, count - 1) for i in range(count)] and len(set(found)) == count


def test_evenly_spaced_copies_nothing_that_is_already_few_and_spares_no_class_otherwise():
    """The kNN at the end of a run sees all images up to 100,000: the very tensor, not a second copy of the data set."""
    images, labels = torch.arange(60).view(60, 1, 1, 1), torch.arange(60) // 6
    all_images, all_labels = common.evenly_spaced(images, labels, 60)
    assert all_images is images and all_labels is labels
    few, few_labels = common.evenly_spaced(images, labels, 20)
    assert len(few) == 20 and torch.equal(few.flatten() // 6, few_labels) and few_labels.bincount().tolist() == [2] * 10


@pytest.mark.parametrize("size, most", [(32, 500), (64, 500), (224, 41), (1024, 2)])
def test_measuring_takes_fewer_large_images_at_a_time(size, most):
    """500 images at once of any size: at 224 pixels that is more than a training step of the recipes for them holds."""
    seen = []
    data = SimpleNamespace(size=size, device=torch.device("cpu"), eval_views=lambda images, index, n: seen.append(n) or [images])
    assert common.extract(torch.nn.Flatten(), data, torch.zeros(3, 2)).shape == (3, 2) and seen == [most]
    common.extract(torch.nn.Flatten(), data, torch.zeros(3, 2), batch_size=7)
    assert seen == [most, 7]
