"""Small changes that no other test saw: defaults of a measure, what is fed to the network, times and rates that are printed, what
eval.py counts, whitens and draws. Each test asserts the right value, by a slow reference where there is a formula."""

import importlib
import inspect
import io
import json
import math
import os
import re
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import reference as ref
import torch
import torch.nn.functional as F
from conftest import METHODS, SMALL_OF, write_image
from PIL import Image
from test_metrics import slow_knn
from torch import nn
from torchvision.transforms.v2 import functional

import common

pytestmark = pytest.mark.usefixtures("narrow_backbone")
evaluation = importlib.import_module("eval")
CPU = torch.device("cpu")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def args_of(method="simclr", **values):
    return importlib.import_module(method).Args(**{"device": "cpu", "precision": "fp32", "image_size": 8, "batch_size": 8, **values})


def data_of(train, labels, test=None, test_labels=None, unlabeled=None, **values):
    args, _ = common.set_up(args_of(**values))
    return common.Data(args, CPU, train, labels, test, test_labels, ["a", "b", "c"], unlabeled=unlabeled)


def numbered(count, side=8):
    """uint8 images whose three channels spell their number."""
    number = np.arange(count)
    digits = np.stack([number % 256, number // 256 % 256, number // 65536], 1).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(digits[:, :, None, None], (count, 3, side, side)))


def numbers_of(images):
    return images[:, :, 0, 0].long() @ torch.tensor([1, 256, 65536])


def noise(count, side=8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 3, side, side), dtype=np.uint8)


# ---- kNN -----------------------------------------------------------------------------------------


def test_knn_has_twenty_neighbours_and_a_temperature_of_007_by_default():
    rng = np.random.default_rng(1)
    centres = rng.normal(size=(6, 5))
    labels, test_labels = rng.integers(0, 6, 400), rng.integers(0, 6, 1500)
    bank, queries = centres[labels] + 1.2 * rng.normal(size=(400, 5)), centres[test_labels] + 1.2 * rng.normal(size=(1500, 5))

    def slow(k, temperature):
        return slow_knn(bank, labels, queries, test_labels, k, temperature)

    found = common.knn_accuracy(*(torch.from_numpy(x) for x in (bank, labels, queries, test_labels)))
    assert found == pytest.approx(slow(20, 0.07), abs=1e-6)
    others = [slow(10, 0.07), slow(19, 0.07), slow(21, 0.07), slow(200, 0.07), slow(20, 0.1), slow(20, 0.05), slow(20, None)]
    assert all(other != pytest.approx(found, abs=1e-6) for other in others), (found, others)  # so another default would show


def test_accuracies_are_five_votes_two_hundred_at_01_and_a_probe_on_its_rows(monkeypatch):
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(4, 6))
    labels, test_labels = rng.integers(0, 4, 500), rng.integers(0, 4, 200)
    bank, queries = ((centres[y] + 1.6 * rng.normal(size=(len(y), 6))) * rng.uniform(0.2, 3, (len(y), 1)) for y in (labels, test_labels))
    asked = {}
    monkeypatch.setattr(evaluation, "linear_probe", lambda *args, **more: asked.update(args=args, **more) or (0.5, None))
    data = SimpleNamespace(train_labels=torch.from_numpy(labels), test_labels=torch.from_numpy(test_labels))
    x, rows = [torch.from_numpy(bank), torch.from_numpy(queries)], torch.tensor([3, 5, 8])
    found = evaluation.accuracies(x, data, rows, SimpleNamespace(probe_epochs=7, seed=11), name="H")
    slow = {(k, t): slow_knn(bank, labels, queries, test_labels, k, t) for k in (3, 5, 100, 200) for t in (None, 0.07, 0.1)}
    assert found["5-NN"] == pytest.approx(slow[5, None]) and found["200-NN"] == pytest.approx(slow[200, 0.1])
    assert all(slow[other] != slow[5, None] for other in ((3, None), (5, 0.1)))
    assert all(slow[other] != slow[200, 0.1] for other in ((100, 0.1), (200, 0.07)))
    assert [a is b for a, b in zip(asked["args"], (x[0], data.train_labels, rows, x[1], data.test_labels))] == [True] * 5
    assert (asked["epochs"], asked["seed"]) == (7, 11)


# ---- images --------------------------------------------------------------------------------------


@pytest.mark.parametrize("height, width, size", [(256, 256, 224), (256, 320, 224), (320, 256, 224), (96, 96, 64), (100, 60, 50), (20, 30, 32), (32, 32, 32), (48, 64, 48), (64, 48, 48)])
def test_a_view_to_measure_is_the_middle_seven_eighths(height, width, size):
    x = torch.rand(2, 3, height, width, generator=seeded())
    side = min(height, width)
    side = round(side * 7 / 8) if side > size else side
    top, left = (height - side) // 2, (width - side) // 2
    cut = x[:, :, top:top + side, left:left + side]
    expected = cut if side == size else functional.resize(cut, [size, size], antialias=True)
    assert torch.allclose(common.centre_view(x, size), expected, atol=1e-6)


@pytest.mark.parametrize("count", [150, 5000, 12_001])
def test_measured_colours_are_mean_and_deviation_of_evenly_spaced_images(count):
    """At most 5000: every third one of 12,001. The images darken on the way, so that the first ones alone would be too light."""
    images = (noise(count, 4) * np.linspace(1, 0.3, count)[:, None, None, None] * np.array([1, 0.5, 0.8])[:, None, None]).astype(np.uint8)
    used = images[:: math.ceil(count / 5000)] / 255
    mean, std = common.colour_statistics(torch.from_numpy(images))
    assert np.allclose(mean, used.mean((0, 2, 3)), atol=1e-9) and np.allclose(std, used.std((0, 2, 3)), atol=1e-9)


def test_what_is_measured_on_is_evenly_spaced_and_of_its_size():
    train, test = numbered(100_101), numbered(2500)
    labels, test_labels = np.arange(len(train)) % 7, np.arange(len(test)) % 7
    data = data_of(train, labels, test, test_labels)
    for images, given, count, total in ((data.bank, data.bank_labels, 5000, 100_101), (data.queries, data.query_labels, 1000, 2500),
                                        (data.large_bank, data.large_bank_labels, 100_000, 100_101)):
        index = (torch.arange(count, dtype=torch.float64) * (total - 1) / (count - 1)).floor().long()
        assert len(images) == count and (numbers_of(images) - index).abs().max() <= 1  # rounding may take the one before
        assert torch.equal(given, numbers_of(images) % 7)
        assert numbers_of(images)[-1] == total - 1 and numbers_of(images).unique().numel() == count


@pytest.mark.parametrize("kind", ["labels", "no labels", "test without labels", "no test", "unlabelled images"])
def test_what_data_holds(kind):
    train, test, more = numbered(20), numbered(9), numbered(31)
    labels, test_labels = np.arange(20) % 3, np.arange(9) % 3
    given = {"labels": (train, labels, test, test_labels), "no labels": (train, None, test, None), "test without labels": (train, labels, test, None),
             "no test": (train, labels), "unlabelled images": (train, labels, None, None, more)}[kind]
    data = data_of(*given)
    everything = [*range(20), *range(31)] if kind == "unlabelled images" else list(range(20))
    assert numbers_of(data.train).tolist() == everything and numbers_of(data.labelled_train).tolist() == list(range(20))
    no_test = kind in ("no test", "unlabelled images")
    assert numbers_of(data.test).tolist() == list(range(20 if no_test else 9))
    assert data.labelled == (kind == "labels") and (data.test_labels is None) == (kind != "labels")
    assert evaluation.test_count(data) == (0 if no_test else 9)
    assert data.steps_per_epoch == len(everything) // 8 and data.class_names == ["a", "b", "c"]


@pytest.mark.parametrize("height, width", [(8, 8), (8, 10), (10, 8), (10, 10)])
def test_images_of_another_size_must_be_cropped(height, width):
    images = np.zeros((16, 3, height, width), np.uint8)
    assert data_of(images, None).must_be_cropped == ((height, width) != (8, 8))


@pytest.mark.parametrize("count", [3, 31, 33, 48, 63, 65])
def test_the_batch_size_that_is_proposed_is_the_largest_power_of_two(count):
    with pytest.raises(common.UserError, match=f"at most {count}, the training images; try --batch-size {2 ** int(math.log2(count))}$"):
        data_of(numbered(count), None, batch_size=128)


def test_known_data_sets_have_the_papers_colours_and_sizes():
    """htdt/self-supervised, datasets/*.py, typed a second time."""
    assert common.COLOUR_STATISTICS == {
        "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)), "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
        "stl10": ((0.43, 0.42, 0.39), (0.27, 0.26, 0.27)), "tinyimagenet": ((0.480, 0.448, 0.398), (0.277, 0.269, 0.282))}
    sides = {name: common.DEFAULT_IMAGE_SIZE.get(name, 32) for name in common.DATASETS}
    assert sides == {"patterns": 32, "cifar10": 32, "cifar100": 32, "stl10": 64, "tinyimagenet": 64, "folder": None}


def test_no_draw_of_a_step_is_that_of_another_step_or_view():
    """The second view of a step is not the first view of the next one, for any two steps and views, in memory."""
    image = torch.from_numpy(noise(1, 16)).expand(4, 3, 16, 16)
    seen = [view for step in range(4) for view in common.augment(image, "w-mse", 4, 16, (0.5,) * 3, (0.5,) * 3, seed=1, step=step)]
    flat = torch.stack(seen).flatten(1)
    assert torch.cdist(flat, flat).fill_diagonal_(9).min() > 0.1


def test_no_streamed_crop_is_that_of_another_step_view_or_row(tmp_path):
    """The same image everywhere: each step, view and row of the batch cuts another part of it."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    write_image(tmp_path / "one.png", pixels)
    args, _ = common.set_up(args_of(views=3, augment="crop-flip", num_workers=0, seed=4))
    files = common.Files([str(tmp_path / "one.png")], 8, 8)
    crops = [view for views in files.crops(torch.zeros(4, 3, dtype=torch.long), args, 10, CPU) for view in views]
    flat = torch.cat(crops).flatten(1).float()
    assert len(flat) == 4 * 3 * 3 and torch.cdist(flat, flat).fill_diagonal_(1e9).min() > 10
    again = list(files.crops(torch.zeros(2, 3, dtype=torch.long), args, 12, CPU))
    assert all(torch.equal(a, b) for a, b in zip(crops[6:], [view for views in again for view in views]))


# ---- optimizers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lars", "sgd"])
def test_a_rate_that_changes_scales_the_step_not_what_momentum_remembers(name):
    w = nn.Parameter(torch.randn(4, 3, dtype=torch.float64, generator=seeded()))
    model = nn.ParameterList([w])
    optimizer = common.build_optimizer(model, SimpleNamespace(optimizer=name, lr=0.5, lr_bias=0.5, weight_decay=0.1))
    expected, velocity = w.detach().numpy().copy(), 0
    for step, rate in enumerate((0.5, 0.01, 0.3, 0.0)):
        optimizer.param_groups[0]["lr"] = rate
        w.grad = torch.randn(4, 3, dtype=torch.float64, generator=seeded(step))
        update = w.grad.numpy() + 0.1 * expected
        if name == "lars":
            update = update * 0.001 * np.linalg.norm(expected) / np.linalg.norm(update)
        velocity = 0.9 * velocity + update
        expected = expected - rate * velocity
        optimizer.step()
        assert np.allclose(w.detach().numpy(), expected, rtol=1e-9), step


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_muon_computes_in_the_precision_of_the_networks(precision, monkeypatch):
    seen, original = [], common.orthogonalise
    monkeypatch.setattr(common, "orthogonalise", lambda m: seen.append(m.dtype) or original(m))
    model = nn.Conv2d(3, 4, 3, bias=False)
    args = SimpleNamespace(optimizer="muon", lr=0.1, lr_bias=0.1, lr_filters=0.1, weight_decay=0.0, precision=precision)
    optimizer = common.build_optimizer(model, args)
    model.weight.grad = torch.randn_like(model.weight)
    optimizer.step()
    assert seen == [torch.float32 if precision == "fp32" else torch.bfloat16]


def muon_of_tiny():
    """A backbone with gradients, and Muon as a program makes it from Args that set_up() has not seen."""
    torch.manual_seed(0)
    network, _ = common.build_backbone("tiny", 32, width=2)
    network(torch.randn(4, 3, 32, 32)).square().sum().backward()
    return network, common.build_optimizer(network, importlib.import_module("simclr").Args())


def test_the_optimizer_of_args_that_are_not_completed_is_that_of_training():
    _, optimizer = muon_of_tiny()
    rates = {group["filters"]: group["peak_lr"] for group in optimizer.param_groups}
    assert rates == {True: 0.1, False: 3e-3} and type(optimizer) is common.Muon


def test_a_scaler_that_finds_infinity_skips_the_filters_too():
    network, optimizer = muon_of_tiny()
    before = [w.clone() for w in network.parameters()]
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    for w in network.parameters():
        w.grad.fill_(math.inf)
    scaler.step(optimizer)
    assert all(map(torch.equal, before, network.parameters()))


def test_an_interrupted_step_of_muon_loses_no_group(monkeypatch):
    network, optimizer = muon_of_tiny()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch.optim.Adam, "step", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        optimizer.step()
    assert [group["filters"] for group in optimizer.param_groups].count(True) == 1


def test_tinys_filters_start_with_kaimings_deviation_by_their_outputs():
    torch.manual_seed(0)
    for module in common.build_backbone("tiny", 32, width=32)[0].modules():
        if isinstance(module, nn.Conv2d):
            outputs = module.weight.shape[0] * module.weight[0, 0].numel()
            assert float(module.weight.detach().std()) == pytest.approx(math.sqrt(2 / outputs), rel=0.1)


@pytest.mark.parametrize("flags, fast", [("avx512f avx512_vnni sse2", False), ("avx512_bf16", True), ("amx_tile amx_bf16", True), ("fpu", False), (None, False)])
def test_bf16_is_taken_where_the_processor_computes_in_it(monkeypatch, flags, fast):
    def opened(path, *_):
        if flags is None:
            raise FileNotFoundError(path)
        return io.StringIO(f"processor : 0\nflags\t\t: fpu {flags}\n")

    monkeypatch.setattr("builtins.open", opened)
    assert common.has_fast_bf16(CPU) == fast
    monkeypatch.setattr(common, "has_fast_bf16", lambda device: fast)
    found = common.set_up(args_of(precision="auto"))[0].precision
    assert found == ("bf16" if fast else "fp32")


# ---- the loss under bf16 -------------------------------------------------------------------------

LOSS = {"simclr": "nt_xent_loss", "moco": "info_nce_loss", "byol": "byol_loss", "simsiam": "negative_cosine", "barlow": "barlow_twins_loss",
        "vicreg": "vicreg_loss", "wmse": "wmse_loss", "shuffled_dbn": "shuffled_dbn_loss", "cw_rgp": "cw_rgp_loss"}


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_is_computed_in_float32_outside_autocast(method, monkeypatch):
    """The type of the result proves nothing: cross-entropies and norms give float32 under autocast too."""
    module = importlib.import_module(method)
    args = module.parse_args(["--image-size", "8", "--batch-size", "32", "--proj-hidden", "16", *SMALL_OF[method]])
    torch.manual_seed(0)
    model, seen, loss = module.build(args), [], getattr(module, LOSS[method])

    def noted(*inputs, **more):
        tensors = [t for i in inputs for t in (i if isinstance(i, (list, tuple)) else [i]) if torch.is_tensor(t)]
        seen.append((torch.is_autocast_enabled("cpu"), {t.dtype for t in tensors}, (tensors[0] @ tensors[0].mT).dtype))
        return loss(*inputs, **more)

    monkeypatch.setattr(module, LOSS[method], noted)
    views = [torch.randn(32, 3, 8, 8, generator=seeded(i)) for i in range(2)]
    with torch.autocast("cpu", torch.bfloat16):
        model(views)
    assert seen and all(now == (False, {torch.float32}, torch.float32) for now in seen), seen


# ---- heads ---------------------------------------------------------------------------------------

WIDTHS = {  # the linear layers of projector and predictor, as (inputs, outputs), of H with 128, a hidden width of 24, d of 6 and 10 in SimSiam's predictor
    "simclr": ([(128, 24), (24, 6)], None), "moco": ([(128, 6)], None), "byol": ([(128, 24), (24, 6)], [(6, 24), (24, 6)]),
    "simsiam": ([(128, 24), (24, 6)], [(6, 10), (10, 6)]), "barlow": ([(128, 24), (24, 6)], None), "vicreg": ([(128, 24), (24, 6)], None),
    "wmse": ([(128, 24), (24, 6)], None), "shuffled_dbn": ([(128, 24), (24, 6)], None), "cw_rgp": ([(128, 24), (24, 6)], None)}


@pytest.mark.parametrize("method", METHODS)
def test_the_heads_have_the_widths_of_their_flags(method):
    own = {"simsiam": dict(pred_hidden=10), "moco": dict(bn_splits=1, queue_size=9), "wmse": dict(w_size=8), "cw_rgp": dict(groups=1, w_size=4)}
    model = importlib.import_module(method).build(args_of(method, proj_hidden=24, proj_dim=6, **own.get(method, {})))

    def widths(head):
        return [(m.in_features, m.out_features) for m in head.modules() if isinstance(m, nn.Linear)] if head is not None else None

    assert (widths(model.projector), widths(getattr(model, "predictor", None))) == WIDTHS[method]
    three = importlib.import_module(method).build(args_of(method, proj_hidden=24, proj_dim=6, proj_layers=3, **own.get(method, {})))
    assert widths(three.projector) == [(128, 24), (24, 24), (24, 6)]


# ---- a run with a clock of its own ---------------------------------------------------------------


class Clock:
    """A step takes 10 s, features of a set of images 100 s, a checkpoint 1000 s."""

    def __init__(self, patch):
        self.now = 0.0
        patch.setattr(common.time, "monotonic", lambda: self.now)
        for owner, name, seconds in ((common.Run, "watch", 10), (common, "extract", 100), (common.Run, "save", 1000)):
            patch.setattr(owner, name, self.then(getattr(owner, name), seconds))

    def then(self, function, seconds):
        def timed(*args, **more):
            result = function(*args, **more)
            self.now += seconds
            return result

        return timed


class Terminal(io.StringIO):
    def isatty(self):
        return True


def small_patterns():
    return noise(26), np.arange(26) % 3, noise(10, seed=1), np.arange(10) % 3


@pytest.fixture
def timed(monkeypatch):
    """train(out, **flags) -> the run, two epochs of three steps of 8 images, by the clock above."""
    monkeypatch.setattr(common.signal, "signal", lambda *_: None)
    monkeypatch.setattr(common, "make_patterns", small_patterns)
    clock = Clock(monkeypatch)
    module = importlib.import_module("vicreg")

    def train(out, **flags):
        usual = dict(image_size=8, batch_size=8, epochs=2, log_every=1, proj_dim=8, proj_hidden=8)
        return module.train(module.Args(device="cpu", precision="fp32", out=out, **{**usual, **flags}))

    train.clock = clock
    return train


def test_times_and_rates(timed, tmp_path, capsys):
    """Images a second are those of the steps alone; the time that is left counts the measuring too; the seconds count all."""
    run = timed(tmp_path / "run")
    assert [row["images_per_s"] for row in run.rows] == [24 / 30] * 2
    assert [row["seconds"] for row in run.rows] == [230, 1460]  # 3 x 10 + 2 x 100, and once more after a checkpoint
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch") and "images/s" in line]
    assert [line.split("  ")[0:2] for line in lines] == [["epoch 1/2", "step 3/6"], ["epoch 2/2", "step 6/6"]]
    assert [line.split("  ")[-1] for line in lines] == ["3m50s left", "0m00s left"]
    row = run.rows[0]
    assert f"loss {row['loss']:.4f}  kNN {100 * row['knn']:5.2f} %  std*sqrt(d) {row['std_sqrt_d']:.2f}  rank {row['rank_1pct']:.0f}  1 images/s" in lines[0]


def test_the_status_line_has_the_time_that_is_left_by_the_steps_of_this_epoch(timed, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdout", Terminal())
    timed(tmp_path / "run")
    found = re.findall(r"\repoch (\d)/2  step (\d)/6  loss [\d.]+  (\w+) left", common.sys.stdout.getvalue())
    assert found == [("1", "1", "0m50s"), ("1", "2", "0m40s"), ("1", "3", "0m30s"), ("2", "4", "0m20s"), ("2", "5", "0m10s"), ("2", "6", "0m00s")]


def test_times_go_on_inside_an_epoch(timed, tmp_path, monkeypatch):
    """After a stop in the second step, from the checkpoint of the first: its ten seconds count, the stop's do not."""
    watch = common.Run.watch

    def stop(run, step, loss):
        watch(run, step, loss)
        if step == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(common.Run, "watch", stop)
        with pytest.raises(KeyboardInterrupt):
            timed(tmp_path / "run", save_every=1)
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["step"] == 1
    timed.clock.now += 12_345
    rows = timed(tmp_path / "run", resume=True).rows
    assert [row["images_per_s"] for row in rows] == [24 / 30] * 2 and [row["seconds"] for row in rows] == [230, 1460]


def test_times_go_on_after_an_epoch(timed, tmp_path):
    """The seconds of an epoch that was complete before the stop are not those of the next."""
    timed(tmp_path / "run", epochs=1)
    timed.clock.now += 12_345
    rows = timed(tmp_path / "run", resume=True).rows
    assert [row["images_per_s"] for row in rows] == [24 / 30] * 2


@pytest.mark.parametrize("seconds, text", [(0, "0m00s"), (59.9, "0m59s"), (60, "1m00s"), (187, "3m07s"), (3599, "59m59s"), (3600, "1h00m"), (3720, "1h02m"),
                                           (7384, "2h03m"), (90_000, "25h00m")])
def test_seconds_in_words(seconds, text):
    assert common.format_seconds(seconds) == text


def test_the_closing_line_counts_the_images_it_measured(timed, tmp_path, capsys, monkeypatch):
    load = common.load_data

    def few(args, device):
        data = load(args, device)
        data.bank, data.bank_labels, data.queries, data.query_labels = data.train[:9], data.train_labels[:9], data.test[:4], data.test_labels[:4]
        return data

    monkeypatch.setattr(common, "load_data", few)
    timed(tmp_path / "run")
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("kNN"))
    assert "k = 20, cosine, T = 0.07, 10 test images against 26 training images" in line


@pytest.mark.parametrize("size, pooled", [(24, 24), (48, 32)])
def test_raw_pixels_are_pooled_to_32_if_they_are_more(size, pooled, timed, tmp_path, monkeypatch):
    encoders, extract = [], common.extract
    monkeypatch.setattr(common, "extract", lambda network, *more: encoders.append(network) or extract(network, *more))
    monkeypatch.setattr(common, "make_patterns", lambda: (noise(26, size), np.arange(26) % 3, noise(10, size, 1), np.arange(10) % 3))
    timed(tmp_path / "run", image_size=size, epochs=1)
    (raw,) = {network for network in encoders if not list(network.parameters())}
    x = torch.rand(2, 3, size, size)
    assert torch.equal(raw(x), F.adaptive_avg_pool2d(x, pooled).flatten(1))


def test_the_last_columns_are_the_times(timed, tmp_path):
    timed(tmp_path / "run", eval_every=2)
    header, first, second = ((tmp_path / "run" / "metrics.csv").read_text()).splitlines()
    names = header.split(",")
    assert names[:5] == ["epoch", "step", "loss", "lr", "knn"] and names[-2:] == ["images_per_s", "seconds"]
    assert first.split(",")[4:-2] == [""] * (len(names) - 6) and "" not in second.split(",")


def test_a_damaged_checkpoint_does_not_replace_the_one_before(timed, tmp_path, monkeypatch):
    """After a resume from previous.pt, the first save must not keep the damaged last.pt as previous.pt; the second keeps the first."""
    out = tmp_path / "run"
    timed(out)
    last = (out / "last.pt").read_bytes()
    (out / "last.pt").write_bytes(last[: len(last) // 2])
    steps, save = [], common.Run.save

    def save_and_look(run, step):
        save(run, step)
        steps.append([torch.load(out / name, weights_only=True)["step"] for name in ("previous.pt", "last.pt")])

    monkeypatch.setattr(common.Run, "save", save_and_look)
    timed(out, resume=True, save_every=1)
    assert steps == [[3, 4], [4, 5], [5, 6]]


def test_configuration_says_what_was_used(monkeypatch):
    asked = []
    monkeypatch.setattr(subprocess, "run", lambda command, **_: asked.append(command) or SimpleNamespace(stdout=40 * "a" + "\n"))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    args, _ = common.set_up(args_of())
    monkeypatch.setenv("WORLD_SIZE", "3")
    found = common.configuration(args, SimpleNamespace(device=CPU, statistics={"size": 8}))
    assert found["data_statistics"] == {"size": 8}
    assert (found["processes"], found["threads"], found["git"]) == (3, 77, 40 * "a")
    assert asked[0][:2] == ["git", "-C"] and asked[0][3:] == ["rev-parse", "HEAD"]
    assert (found["torch"], found["numpy"], found["method"], found["batch_size"]) == (torch.__version__, np.__version__, "simclr", 8)


def test_what_is_measured_is_no_output_of_a_step(evaluated):
    """The watch looks at outputs in training only: in eval mode it would keep all of them, and blame the next step for them."""
    run = evaluated[4]
    run.finite = common.FiniteWatch(run.model, run.data, run.folder)  # that of the run has gone with it
    run.model.eval()
    with torch.no_grad():
        run.model.projector(run.model.backbone(torch.full((2, 3, 8, 8), math.nan)))
    assert not any(run.finite.outputs.values())
    run.model.train()
    run.model.backbone(torch.rand(2, 3, 8, 8))
    assert len(run.finite.outputs["backbone"]) == 1


# ---- words about collapse ------------------------------------------------------------------------


@pytest.mark.parametrize("std, rankme, rank, rank_h, dim, word", [
    (0.099, 9, 50, 50, 64, "COLLAPSE"), (0.101, 9, 50, 50, 64, ""), (0.4, 9, 50, 50, 64, ""),
    (0.9, 2.4, 50, 50, 64, "DIMENSIONAL"), (0.9, 2.6, 50, 50, 64, ""), (0.9, 9, 4, 50, 64, "DIMENSIONAL"), (0.9, 9, 5, 50, 64, ""),
    (0.9, 9, 50, 9, 64, "DIMENSIONAL"), (0.9, 9, 50, 10, 64, ""), (0.9, 2.4, 5, 5, 9, ""), (0.9, 2.4, 5, 50, 10, "DIMENSIONAL"),
    (0.9, 9, 2, 4, 4, ""), (0.9, 9, 1, 4, 4, "DIMENSIONAL"), (0.0, 1, 1, 1, 1, ""), (0.0, 1, 1, 1, 2, "COLLAPSE")])
def test_the_limits_of_a_collapse(std, rankme, rank, rank_h, dim, word):
    words = common.collapse_in_words({"std_sqrt_d": std, "rankme": rankme, "rank_1pct": rank, "rank_h": rank_h}, dim, 128)
    assert words.split(" ")[0].rstrip(":") == word


@pytest.mark.parametrize("rank_h, dim_h, word", [(8, 8, ""), (4, 8, ""), (3, 8, "DIMENSIONAL"), (1, 2, ""), (9, 19, "DIMENSIONAL"), (9, 18, ""), (10, 512, "")])
def test_a_narrow_backbone_is_no_collapse_unless_it_fills_less_than_half(rank_h, dim_h, word):
    figures = {"std_sqrt_d": 0.9, "rankme": 9, "rank_1pct": 50, "rank_h": rank_h}
    assert common.collapse_in_words(figures, 64, dim_h).split(" ")[0] == word


# ---- features ------------------------------------------------------------------------------------


class Layer(nn.Module):
    """Notes the type it computes in and whether it trains."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm, self.seen = nn.Linear(192, 4), nn.BatchNorm1d(4), []

    def forward(self, x):
        y = self.linear(x.flatten(1))
        self.seen.append((y.dtype, self.training, len(x)))
        return self.norm(y)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("training", [True, False])
def test_features_are_taken_in_eval_mode_in_the_asked_precision_and_the_mode_comes_back(precision, training):
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    data, images = data_of(noise(30), None), torch.from_numpy(noise(1203, seed=2))
    network = Layer().train(training)
    before = {name: t.clone() for name, t in network.state_dict().items()}
    h = common.extract(network, data, images, precision)
    assert h.dtype == torch.float32 and len(h) == 1203 and network.training == training
    assert network.seen == [(dtype, False, 500), (dtype, False, 500), (dtype, False, 203)]
    network.seen.clear()
    z = common.project(network, torch.randn(2100, 192), precision)
    assert z.shape == (2100, 4) and z.dtype == torch.float32 and network.training == training
    assert {(d, t) for d, t, _ in network.seen} == {(dtype, False)}
    assert all(torch.equal(t, before[name]) for name, t in network.state_dict().items())
    mean, std = ((images.double() / 255 - data.mean) / data.std).flatten(1), network.linear
    expected = (mean @ std.weight.T.double() + std.bias) / math.sqrt(1 + network.norm.eps)
    assert torch.allclose(h.double(), expected, atol=1e-5 if precision == "fp32" else 0.1)


def test_eval_extracts_all_images_with_the_flags_it_was_given(monkeypatch):
    asked = []
    monkeypatch.setattr(common, "extract", lambda network, data, images, **settings: asked.append((images, settings)) or len(images))
    train, test = numbered(1200), numbered(1100)
    data = data_of(train, np.arange(1200) % 3, test, np.arange(1100) % 3)
    args = SimpleNamespace(precision="bf16", batch_size=77)
    assert evaluation.extract("network", data, args, "H") == [1200, 1100]
    assert [images is wanted for (images, _), wanted in zip(asked, (data.labelled_train, data.test))] == [True, True]
    assert all(settings | {"precision": "bf16", "batch_size": 77} == settings for _, settings in asked)


def test_eval_measures_at_the_size_of_training_with_its_own_seed(monkeypatch):
    seen = []
    data = SimpleNamespace(test_note="")
    monkeypatch.setattr(common, "load_data", lambda args, device, statistics: seen.append(args) or data)
    args = SimpleNamespace(dataset=None, data_dir=None, seed=5, num_workers=1)
    flags = {"dataset": "folder", "data_dir": "here", "image_size": 24, "seed": 2, "num_workers": 9, "batch_size": 128, "views": 2}
    evaluation.load_data(SimpleNamespace(args=SimpleNamespace(**flags), statistics=None), args, CPU)
    assert vars(seen[0]) == {**flags, "train_images": None, "test_fraction": 0, "seed": 5, "num_workers": 1, "batch_size": 1, "views": 8}
    args.dataset = "cifar10"
    evaluation.load_data(SimpleNamespace(args=SimpleNamespace(**flags), statistics=None), args, CPU)
    assert (seen[1].dataset, seen[1].data_dir, seen[1].image_size) == ("cifar10", "data", 24)


# ---- the linear probe ----------------------------------------------------------------------------


def test_the_probe_a_second_time_in_numpy(monkeypatch):
    """Two epochs on 1300 of 2000 rows: the draws, the batches, the softmax gradient, Adam with weight decay, the rates."""
    kept, Adam = [], torch.optim.Adam
    monkeypatch.setattr(torch.optim, "Adam", lambda parameters, **more: kept.append(list(parameters)) or Adam(kept[0], **more))
    threads = torch.get_num_threads()
    x, y = torch.randn(2000, 6, generator=seeded()), torch.randint(0, 7, (2000,), generator=seeded(1))
    rows = torch.randperm(2000, generator=seeded(2))[:1300].sort().values
    torch.set_num_threads(2)
    found = evaluation.linear_probe(x, y, rows, x[:500], y[:500], epochs=2, seed=9)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)
    torch.manual_seed(9)
    start = nn.Linear(6, 7)
    w = np.concatenate([start.weight.detach().double().numpy(), start.bias.detach().double().numpy()[:, None]], 1)  # [7, 6 + 1]
    m, v, step = 0, 0, 0
    inputs = np.concatenate([x.double().numpy(), np.ones((2000, 1))], 1)
    for epoch in range(2):
        order = rows[torch.randperm(1300)].numpy()
        for batch in (order[:1000], order[1000:]):
            logits = inputs[batch] @ w.T
            p = np.exp(logits - logits.max(1, keepdims=True))
            p = p / p.sum(1, keepdims=True) - np.eye(7)[y.numpy()[batch]]
            g = p.T @ inputs[batch] / len(batch) + 5e-6 * w
            m, v, step = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2, step + 1
            w = w - 1e-2 * 1e-4 ** (epoch / 2) * (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)
    weight, bias = (p.detach().double().numpy() for p in kept[0])
    assert np.abs(np.concatenate([weight, bias[:, None]], 1) - w).max() < 1e-5
    best = np.argsort(-(inputs[:500] @ w.T), axis=1)[:, :5]
    hits = best == y.numpy()[:500, None]
    assert found == pytest.approx((hits[:, 0].mean(), hits.sum(1).mean()), abs=2.1e-3)


def test_the_probe_decays_its_weights_as_a_penalty(monkeypatch):
    """With features of zero the gradient is the decay's alone in the weights: L2 in Adam moves them at the full rate, AdamW hardly."""
    kept, Adam = [], torch.optim.Adam
    monkeypatch.setattr(torch.optim, "Adam", lambda parameters, **more: kept.append((list(parameters), more)) or Adam(kept[0][0], **more))
    y = torch.arange(100) % 3
    evaluation.linear_probe(torch.zeros(100, 4), y, torch.arange(100), torch.zeros(5, 4), y[:5], epochs=1, seed=0)
    torch.manual_seed(0)
    start = nn.Linear(4, 3).weight.detach()
    expected = start - 1e-2 * 5e-6 * start / ((5e-6 * start).abs() + 1e-8)
    assert torch.allclose(kept[0][0][0].detach(), expected, atol=1e-6) and kept[0][1]["weight_decay"] == 5e-6


def test_classes_without_images_are_not_counted_for_the_first_five():
    """Another folder's classes come after the run's: three of them may be called 5, 6 and 7."""
    y = torch.arange(5, 8).repeat(20)
    assert evaluation.linear_probe(torch.randn(60, 3), y, torch.arange(60), torch.randn(6, 3), y[:6], epochs=1)[1] is None


@pytest.mark.parametrize("classes, top5", [(5, False), (6, True)])
def test_the_first_five_are_counted_where_there_are_more_than_five_classes(classes, top5):
    y = torch.arange(60) % classes
    assert (evaluation.linear_probe(torch.randn(60, 3), y, torch.arange(60), torch.randn(6, 3), y[:6], epochs=1)[1] is not None) == top5


def test_label_fraction_rounds_and_draws():
    labels = torch.tensor([0] * 16 + [1] * 14 + [2] * 1)
    rows = evaluation.labelled_rows(labels, 0.1)
    assert labels[rows].bincount().tolist() == [2, 1, 1]  # 1.6, 1.4 and 0.1
    drawn = {tuple(evaluation.labelled_rows(labels, 0.1, seed).tolist()) for seed in range(6)}
    assert len(drawn) > 3


# ---- whitened Z ----------------------------------------------------------------------------------


def run_of(method, **values):
    return SimpleNamespace(args=SimpleNamespace(method=method, **values), module=importlib.import_module(method), experiment=None)


@pytest.mark.parametrize("kind", ["cholesky", "zca", "bn", "none"])
@pytest.mark.parametrize("eps", [0.0, 0.3])
def test_whitened_z_of_wmse_is_of_the_runs_kind_and_eps(kind, eps):
    z = torch.randn(20, 4, dtype=torch.float64, generator=seeded()) @ torch.randn(4, 4, dtype=torch.float64, generator=seeded(1)) + 2
    found = evaluation.whitening_of(run_of("wmse", whitening=kind, eps=eps))(z)
    assert np.allclose(found.numpy(), ref.whiten(z.numpy(), kind, eps), atol=1e-8)


@pytest.mark.parametrize("groups, eps", [(2, 0.0), (4, 0.0), (2, 0.3)])
def test_whitened_z_of_cw_rgp_is_of_the_runs_groups_and_eps(groups, eps):
    z = torch.randn(5, 32, dtype=torch.float64, generator=seeded())
    found = evaluation.whitening_of(run_of("cw_rgp", groups=groups, eps=eps))(z)
    assert np.allclose(found.numpy(), ref.channel_whiten(z.numpy(), groups, None, eps), atol=1e-8)


@pytest.mark.parametrize("groups", [2, 8])
def test_whitened_z_of_shuffled_dbn_is_of_the_runs_groups(groups):
    z = torch.randn(20, 16, dtype=torch.float64, generator=seeded())
    found = evaluation.whitening_of(run_of("shuffled_dbn", groups=groups))(z)
    assert np.allclose(found.numpy(), ref.decorrelate(z.numpy(), groups), atol=1e-8)


def test_slices_are_of_the_runs_size_and_drawn_by_the_seed(monkeypatch):
    asked = []
    monkeypatch.setattr(evaluation, "whiten_in_slices", lambda z, size, whiten, seed=0: asked.append((len(z), size, seed)) or z)
    z = [torch.zeros(90, 4), torch.zeros(80, 4)]
    evaluation.whitened(run_of("wmse", whitening="zca", eps=0.1, w_size=16, batch_size=64), z, 7)
    evaluation.whitened(run_of("shuffled_dbn", groups=2, batch_size=64), z, 8)
    assert asked == [(90, 16, 7), (80, 16, 7), (90, 64, 8), (80, 64, 8)]


def test_a_sample_is_evenly_spaced():
    x = torch.arange(25_000.0)[:, None]
    assert torch.equal(evaluation.sample(x, 4).flatten(), torch.tensor([0.0, 8333, 16666, 24999]))
    found = evaluation.sample(x).flatten()
    assert len(found) == 10_000 and found[-1] == 24_999 and (found.diff() >= 2).all() and torch.equal(evaluation.sample(x[:7]), x[:7])


# ---- pictures ------------------------------------------------------------------------------------


@pytest.fixture
def sheet(monkeypatch):
    """The tiles of the last sheet, in `sheet[0]`."""
    tiles = []
    monkeypatch.setattr(evaluation, "write_sheet", lambda path, these: tiles.insert(0, these))
    return tiles


@pytest.mark.parametrize("with_test", [True, False])
def test_neighbours_are_the_nearest_by_cosine_in_frames_of_their_class(sheet, with_test):
    """Without test images, an image is not its own neighbour."""
    train, test = noise(40), noise(33, seed=1)
    labels, test_labels = np.arange(40) % 3, (np.arange(33) + 1) % 3
    data = data_of(train, labels, *((test, test_labels) if with_test else ()))
    bank = np.random.default_rng(2).normal(size=(40, 3)) * np.linspace(0.1, 5, 40)[:, None]
    queries = np.random.default_rng(3).normal(size=(33, 3)) if with_test else bank
    evaluation.draw_neighbors("near.png", data, [torch.from_numpy(bank), torch.from_numpy(queries)])
    images, own = (test, test_labels) if with_test else (train, labels)
    cosine = ref.unit_rows(queries) @ ref.unit_rows(bank).T
    for row, i in enumerate(np.floor(np.linspace(0, len(images) - 1, 10) + 1e-9).astype(int)):
        inner, frames = sheet[0][row, :, :, 2:-2, 2:-2], sheet[0][row, :, :, 0, 0]
        nearest = [j for j in np.argsort(-cosine[i]) if with_test or j != i][:9]
        shown = np.concatenate([images[[i]], train[nearest]]) / 255
        assert np.abs(inner.numpy() - shown).max() < 1e-5
        assert (frames[0] == 0).all()
        for j, frame in zip(nearest, frames[1:]):
            assert torch.equal(frame, torch.tensor([0.1, 0.7, 0.2] if labels[j] == own[i] else [0.85, 0.1, 0.1]))


def test_views_are_of_evenly_spaced_training_images(sheet):
    train = noise(50)
    data = data_of(train, None, views=3)
    evaluation.draw_views("views.png", data)
    index = np.floor(np.linspace(0, 49, 8) + 1e-9).astype(int)
    assert sheet[0].shape == (8, 4, 3, 8, 8)
    assert np.abs(sheet[0][:, 0].numpy() - train[index] / 255).max() < 1e-5
    views = common.augment(torch.from_numpy(train[index]), "w-mse", 3, 8, (0, 0, 0), (1, 1, 1), seed=0, step=0)
    assert (sheet[0][:, 1:] - torch.stack(views, 1)).abs().max() < 1e-4


def test_a_sheet_has_each_pixel_where_it_belongs(tmp_path):
    tiles = torch.rand(2, 3, 3, 32, 32, generator=seeded())
    evaluation.write_sheet(str(tmp_path / "sheet.png"), tiles)
    picture = np.asarray(Image.open(tmp_path / "sheet.png")) / 255
    for row in range(2):
        for column in range(3):
            part = picture[row * 66 + 2:row * 66 + 66, column * 66 + 2:column * 66 + 66]
            assert np.abs(part[::2, ::2] - tiles[row, column].permute(1, 2, 0).numpy()).max() < 0.01
            assert np.array_equal(part[::2, ::2], part[1::2, 1::2])


def test_the_plot_shows_the_right_columns(monkeypatch, tmp_path):
    """Without matplotlib: what is drawn in each panel, in minutes, percent and logarithms to base ten, without what was not measured."""
    panels = [SimpleNamespace(drawn=[], words={}, grid=lambda **_: None, legend=lambda *_, **__: None, set_axis_off=lambda: None,
                              get_lines=lambda: [], get_legend_handles_labels=lambda: ([], [])) for _ in range(8)]
    for panel in panels:
        panel.plot = lambda x, y, panel=panel, **_: panel.drawn.append((list(x), list(y)))
        panel.set = panel.words.update
    figure = SimpleNamespace(subplots=lambda *_: SimpleNamespace(flat=panels), savefig=lambda file, **_: file.write(b"png"))
    monkeypatch.setattr(evaluation, "import_figure", lambda: lambda **_: figure)
    (tmp_path / "metrics.csv").write_text("epoch,step,loss,knn,std_sqrt_d,rank_1pct,uniformity,alignment,seconds\n1,3,9.0,,,,,,60\n"
                                          "2,6,8.5,0.25,0.75,4,-2.5,0.5,90\n")
    x = torch.randn(30, 4, generator=seeded()) + 3
    h = evaluation.singular_values(x)
    assert np.allclose(h.numpy(), np.linalg.svd((x - x.mean(0)).double().numpy(), compute_uv=False))
    evaluation.draw_plot(str(tmp_path / "p.png"), [(str(tmp_path), h, torch.tensor([100.0, 10.0, 1.0]))])
    assert panels[0].drawn[0][1] == pytest.approx(np.log10(h.numpy()).tolist()) and panels[1].drawn == [([1, 2, 3], [2.0, 1.0, 0.0])]
    assert [panel.drawn for panel in panels[2:]] == [[([1.5], [25.0])], [([1.0, 2.0], [9.0, 8.5])], [([2.0], [0.75])], [([2.0], [4.0])],
                                                     [([-2.5], [0.5])], []]
    words = [(panel.words["title"].split(" (")[0], panel.words["xlabel"].split(" (")[0]) for panel in panels[:7]]
    assert words == [("singular values of centred H", "k"), ("singular values of centred Z", "k"), ("kNN while training, %", "minutes"), ("loss", "epoch"),
                     ("std sqrt(d) of Z", "epoch"), ("rank of Z", "epoch"), ("alignment", "uniformity")]


# ---- the report of eval.py -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """(report of --json, what was printed, calls, data, run) of a small W-MSE run with other images; the accuracies are made up."""
    out, module = tmp_path_factory.mktemp("evaluated"), importlib.import_module("wmse")
    calls = SimpleNamespace(collapse=[], probe=[], project=[])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.signal, "signal", lambda *_: None)
        patch.setattr(common, "make_patterns", small_patterns)
        args = module.Args(device="cpu", precision="fp32", image_size=8, batch_size=8, epochs=2, out=out / "run", proj_dim=4, w_size=8)
        run = module.train(args)
        metrics, probe, project = common.collapse_metrics, evaluation.linear_probe, common.project
        patch.setattr(common, "collapse_metrics", lambda z: calls.collapse.append(z) or metrics(z))
        patch.setattr(evaluation, "linear_probe", lambda *a, **k: calls.probe.append(a) or (0.123, None))
        patch.setattr(common, "project", lambda *a: calls.project.append(a[2:]) or project(*a))
        printed = io.StringIO()
        patch.setattr("sys.stdout", printed)
        flags = [str(out / "run"), "--precision", "bf16", "--json", str(out / "j.json"), "--label-fraction", "0.25", "--features", "H,Z,W", "--device", "cpu"]
        evaluation.run(evaluation.parse_args(flags))
    return json.loads((out / "j.json").read_text())[0], printed.getvalue(), calls, run.data, run


def test_the_probe_sees_the_labels_that_the_report_counts(evaluated):
    report, printed, calls, data, _ = evaluated
    rows = evaluation.labelled_rows(data.train_labels, 0.25, 0)
    assert len(rows) == 6 and report["labels_for_probe"] == 6  # of 9, 9 and 8 images
    assert len(calls.probe) == 3 and all(torch.equal(arguments[2], rows) for arguments in calls.probe)
    assert "features of 6 of 26 training images" in report["protocols"]["linear"] and "5 nearest of 26 training images" in printed


def test_the_report_has_the_runs_own_facts_and_percent(evaluated):
    report, printed, calls, _, run = evaluated
    assert (report["step"], report["training_images"], report["test_images"], report["precision"]) == (6, 26, 10, "bf16")
    assert (report["dataset"], report["trained_on"], report["method"]) == ("patterns", "patterns", "wmse")
    assert all(figures["linear"] == 0.123 for figures in report["features"].values())
    table = [line.split() for line in printed.splitlines() if line.startswith(("H ", "Z "))]
    assert table[0][1:2] == ["128"] and table[0][4] == "12.30" and table[0][5] == "-"
    assert f"{100 * report['features']['H']['5-NN']:.2f}" == table[0][2]
    assert "26 training images in 10 classes, 10 test images, 8x8" in printed
    assert calls.project == [(), ("bf16",), ("bf16",)]  # the first: of the fixed image, to know the network again


def test_the_protocol_names_all_images():
    data = SimpleNamespace(labelled=True, labelled_train=range(6000), bank=range(5000))
    texts = evaluation.protocols(data, range(60), SimpleNamespace(probe_epochs=9, seed=3))
    assert "5 nearest of 6000 training images" in texts["5-NN"] and "200 nearest of 6000 training images; cosine" in texts["200-NN"]
    assert "of 60 of 6000 training images; Adam" in texts["linear"] and "9 epochs, seed 3" in texts["linear"]


def test_collapse_is_of_the_test_images(evaluated):
    _, printed, calls, _, _ = evaluated
    assert [len(z) for z in calls.collapse[-3:]] == [10, 10, 10] and "10 test images, eval mode" in printed
    words = common.collapse_in_words(common.collapse_metrics(calls.collapse[-2]) | {"rank_h": 128}, 4, 128)
    assert (words in printed) if words else "COLLAPSE" not in printed


@pytest.mark.parametrize("part", [0, 1])
def test_one_number_that_is_not_finite_is_enough(part, evaluated, monkeypatch):
    run = evaluated[4]
    h = [torch.rand(26, 128), torch.rand(10, 128)]
    h[part][7, 3] = math.inf
    monkeypatch.setattr(evaluation, "extract", lambda *_: h)
    trained = SimpleNamespace(path="here", name="wmse", args=run.args, step=6, backbone_only="", model=run.model)
    with pytest.raises(common.UserError, match="^here: the backbone's output is not finite; try "):
        evaluation.evaluate(trained, run.data, SimpleNamespace(precision="fp32", features=["H"], batch_size=None, label_fraction=1.0, seed=0, probe_epochs=0))
    h[part][7, 3] = 0.0
    monkeypatch.setattr(common, "project", lambda _, x, *more: torch.full((len(x), 4), math.nan if len(x) == len(h[part]) else 1.0))
    with pytest.raises(common.UserError, match="^here: the projector's output is not finite; try "):
        evaluation.evaluate(trained, run.data, SimpleNamespace(precision="fp32", features=["H"], batch_size=None, label_fraction=1.0, seed=0, probe_epochs=0))


def test_z_is_what_the_collapse_is_said_of(capsys):
    one, spread = common.collapse_metrics(torch.ones(50, 8)), common.collapse_metrics(torch.randn(50, 8, generator=seeded()))
    evaluation.say_collapse(["H", "Z", "W"], {"H": spread, "Z": one, "W": spread}, "here")
    assert "COLLAPSE: all embeddings are nearly one point" in capsys.readouterr().out
    evaluation.say_collapse(["H", "Z", "W"], {"H": one, "Z": spread, "W": one}, "here")
    assert "COLLAPSE" not in capsys.readouterr().out


@pytest.mark.parametrize("names", [["H"], ["Z"], ["raw"], ["H", "Z"]])
def test_the_word_does_not_depend_on_the_features_in_the_table(names, capsys):
    """A wide Z of an H of three dimensions, or a Z of one point, whatever --features names."""
    narrow, one, spread = (common.collapse_metrics(x) for x in (
        torch.randn(50, 3, generator=seeded()) @ torch.randn(3, 64, generator=seeded(1)), torch.ones(50, 16), torch.randn(50, 16, generator=seeded())))
    evaluation.say_collapse(names, {"H": narrow, "Z": spread}, "here")
    assert "H fills few dimensions (rank_h 3)" in capsys.readouterr().out
    evaluation.say_collapse(names, {"H": spread, "Z": one}, "here")
    out = capsys.readouterr().out
    assert "all embeddings are nearly one point" in out and ("here" in out) == (names != ["raw"])


# ---- batch norm over processes -------------------------------------------------------------------


def test_synchronised_batch_norm_counts_its_batches_and_keeps_torchs_running_statistics(monkeypatch):
    monkeypatch.setattr(common.SumOverRanks, "apply", staticmethod(lambda t: t))
    torch.manual_seed(0)
    plain = nn.Sequential(nn.BatchNorm1d(3, momentum=0.3))
    ours = nn.Sequential(nn.BatchNorm1d(3, momentum=0.3))
    common.synchronise_batch_norm(ours)
    assert type(ours[0]) is common.CPUSyncBatchNorm
    for step in range(3):
        x = torch.randn(5, 3, generator=seeded(step)) + step
        assert torch.allclose(ours(x), plain(x), atol=1e-5)
    for name, t in plain.state_dict().items():
        assert torch.allclose(ours.state_dict()[name].float(), t.float(), atol=1e-6), name
    assert F.mse_loss(ours.eval()(x), plain.eval()(x)) < 1e-10


# ---- seen by changing the code anew, a line at a time --------------------------------------------


def test_the_time_left_of_a_count(monkeypatch):
    """Two of five took 20 s, so the other three take 30."""
    now, shown = [100.0], []
    monkeypatch.setattr(common.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(common.STATUS, "show", shown.append)
    for _ in common.said(range(5), 5, "image"):
        now[0] += 10
    assert shown == ["image 1/5, 0m40s left", "image 2/5, 0m30s left", "image 3/5, 0m20s left", "image 4/5, 0m10s left", "image 5/5, 0m00s left"]


def test_lars_without_groups_scales_and_decays_all():
    """As with other optimizers of torch, plain parameters will do."""
    w = torch.full((2, 2), 3.0, requires_grad=True)
    optimizer = common.LARS([w], lr=0.5, weight_decay=0.1, momentum=0.9, trust=0.02)
    w.grad = torch.tensor([[1.0, 2.0], [2.0, 4.0]])
    optimizer.step()
    update = torch.tensor([[1.3, 2.3], [2.3, 4.3]])
    torch.testing.assert_close(w.detach(), 3 - 0.5 * 0.02 * 6 / update.norm() * update)


def test_lars_leaves_a_weight_without_gradient_and_decay_as_it_is():
    """The trust ratio would be 0 / 0."""
    w = torch.full((2, 2), 3.0, requires_grad=True)
    optimizer = common.LARS([w], lr=0.5, weight_decay=0.0, momentum=0.9, trust=0.02)
    w.grad = torch.zeros(2, 2)
    optimizer.step()
    assert torch.equal(w.detach(), torch.full((2, 2), 3.0))


@pytest.mark.parametrize("values, missing", [(16, ["-9999"]), (15, [])])
def test_a_number_for_missing_pixels_needs_sixteen_other_values(values, missing):
    pixels = np.concatenate([np.full(100, -9999.0), np.tile(np.arange(1.0, values + 1), 10)])
    assert common.grey_range(pixels) == (1.0 if missing else -9999.0, values, missing)


LOSSES = {"simclr": "nt_xent_loss", "moco": "info_nce_loss", "barlow": "barlow_twins_loss", "vicreg": "vicreg_loss", "wmse": "wmse_loss",
          "shuffled_dbn": "shuffled_dbn_loss", "cw_rgp": "cw_rgp_loss"}


@pytest.mark.parametrize("method", LOSSES)
def test_a_loss_alone_has_the_defaults_of_the_flags(method):
    """Who pastes the loss without the model gets the same numbers."""
    module = importlib.import_module(method)
    given = {name: p.default for name, p in inspect.signature(getattr(module, LOSSES[method])).parameters.items() if p.default is not p.empty}
    names = {"kind": "whitening", "inv_weight": "inv", "var_weight": "var", "cov_weight": "cov"}
    args, compared = module.Args(), 0
    for name, value in given.items():
        field = names.get(name, name)
        if hasattr(args, field):
            assert getattr(args, field) == value, name
            compared += 1
    assert compared + len(given.keys() & {"generator", "shuffle"}) == len(given) and compared


def test_a_new_clock_starts_at_zero_and_counts_on_after_a_resume(monkeypatch):
    now = [50.0]
    monkeypatch.setattr(common.time, "monotonic", lambda: now[0])
    clock = common.Clock()
    assert clock.seconds() == clock.epoch_seconds() == 0.0
    now[0] = 53.0
    assert clock.seconds() == clock.epoch_seconds() == 3.0
    clock.start_epoch()
    now[0] = 54.0
    assert clock.seconds() == 4.0 and clock.epoch_seconds() == 1.0
    clock.run_before, clock.epoch_before = 100.0, 7.0
    assert clock.seconds() == 104.0 and clock.epoch_seconds() == 8.0
    clock.start_epoch()
    assert clock.epoch_seconds() == 0.0


def test_images_of_one_colour_have_the_least_deviation():
    """So that nothing is divided by 0."""
    mean, std = common.colour_statistics(torch.full((3, 3, 4, 4), 51, dtype=torch.uint8))
    assert mean == pytest.approx([0.2] * 3) and std == pytest.approx([1e-3] * 3)


def test_the_watch_keeps_no_graph():
    model = nn.ModuleDict({"part": nn.Linear(2, 2)})
    watch = common.FiniteWatch(model, SimpleNamespace(device=CPU), "")
    out = model["part"](torch.ones(3, 2))
    (kept,) = watch.outputs["part"]
    assert out.requires_grad and not kept.requires_grad and torch.equal(kept, out)


def test_the_rate_of_training_with_labels_rises_and_falls(monkeypatch):
    data = data_of(np.random.default_rng(0).integers(0, 256, (64, 3, 8, 8), dtype=np.uint8), np.arange(64) % 3,
                   np.zeros((3, 3, 8, 8), np.uint8), np.arange(3))
    recipe = SimpleNamespace(**evaluation.FINETUNE, seed=0, precision="fp32", batch_size=16, epochs=10, num_workers=0)
    rates, build = [], common.build_optimizer

    def recorded(model, args):
        optimizer = build(model, args)
        step = optimizer.step
        optimizer.step = lambda: rates.append({group["lr"] for group in optimizer.param_groups}) or step()
        return optimizer

    monkeypatch.setattr(common, "build_optimizer", recorded)
    evaluation.train_classifier(nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), 5, data, torch.arange(64), recipe, "test")
    warm = 4  # a tenth of 40 steps
    expected = [1e-3 * (min(1, (s + 1) / warm) if s < warm else 0.5 * (1 + math.cos(math.pi * (s - warm) / (40 - warm)))) for s in range(40)]
    assert len(rates) == 40 and all(len(rate) == 1 for rate in rates)
    found = [rate.pop() for rate in rates]
    assert max(found) == pytest.approx(1e-3) and found.index(max(found)) in (warm - 1, warm) and found[-1] < 1e-5
    assert found == pytest.approx(expected, abs=3e-4)


def test_raw_pixels_are_left_out_beyond_the_memory_limit_exactly(monkeypatch):
    data = data_of(np.zeros((16, 3, 8, 8), np.uint8), np.arange(16) % 3, np.zeros((3, 3, 8, 8), np.uint8), np.arange(3))
    monkeypatch.setattr(common, "MEMORY_LIMIT", 4 * 3 * 8 * 8 * 19)  # float32
    args = SimpleNamespace(precision="fp32", features=["raw"], batch_size=None)
    assert [x.shape for x in evaluation.features("raw", None, data, args)] == [(16, 192), (3, 192)]
    monkeypatch.setattr(common, "MEMORY_LIMIT", 4 * 3 * 8 * 8 * 19 - 1)
    with pytest.raises(common.UserError, match="do not fit in memory"):
        evaluation.features("raw", None, data, args)


def test_spectra_begin_at_one(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="it draws")
    figures, kind = [], evaluation.import_figure()
    monkeypatch.setattr(evaluation, "import_figure", lambda: lambda **more: figures.append(kind(**more)) or figures[-1])
    evaluation.draw_plot(str(tmp_path / "p.png"), [(str(tmp_path), torch.tensor([100.0, 10.0, 1.0]), torch.tensor([1.0]))])
    (line,), (other,) = (panel.get_lines() for panel in figures[0].axes[:2])
    assert line.get_xydata().tolist() == [[1, 2], [2, 1], [3, 0]] and other.get_xydata().tolist() == [[1, 0]]


def test_pca_whitening_of_equal_eigenvalues_has_a_finite_gradient_without_their_terms():
    """Four samples whose covariance is a multiple of the identity: the terms 1 / (lambda_i - lambda_j) are dropped."""
    import wmse

    z = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64, requires_grad=True)
    white = wmse.whiten(z, kind="pca")
    weights = torch.tensor([[1.0, 2.0], [-3.0, 0.5], [2.0, 2.0], [0.5, 1.0]], dtype=torch.float64)
    gradient, = torch.autograd.grad((white * weights).sum(), z)
    assert gradient.isfinite().all()
    centred = weights - weights.mean(0)
    torch.testing.assert_close(gradient, centred @ torch.linalg.lstsq(z.detach(), white.detach()).solution.T, rtol=1e-9, atol=1e-9)


def test_a_recipe_without_crops_needs_images_of_the_size_of_views(tmp_path):
    for i in range(8):
        write_image(tmp_path / "images" / f"{i}.png", np.random.default_rng(i).integers(0, 256, (12, 12, 3), dtype=np.uint8))
    flags = dict(dataset="folder", data_dir=str(tmp_path / "images"), augment="none", out=str(tmp_path / "run"))
    with pytest.raises(common.UserError, match="--augment none does not crop, .* not of --image-size 8; try --augment crop-flip"):
        importlib.import_module("simclr").train(args_of(**flags))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", METHODS)
def test_args_take_names_alone(method):
    with pytest.raises(TypeError):
        importlib.import_module(method).Args("simclr")


@pytest.mark.parametrize("images", [2, 5, 10])
def test_of_few_images_all_others_are_neighbours(sheet, images):
    data = data_of(noise(images), np.arange(images) % 2, batch_size=2)
    h = torch.from_numpy(np.random.default_rng(2).normal(size=(images, 3)))
    evaluation.draw_neighbors("near.png", data, [h, h])
    assert sheet[0].shape[:2] == (images, images)  # itself and the others


def test_neighbours_have_coloured_frames_where_both_sides_have_labels(tmp_path, monkeypatch):
    images, labels = np.full((12, 3, 8, 8), 128, np.uint8), np.arange(12) % 3
    written = []
    monkeypatch.setattr(evaluation, "write_sheet", lambda path, tiles: written.append(tiles))
    for train_labels, test_labels in ((labels, labels), (labels, None), (None, labels), (None, None)):
        data = data_of(images, train_labels, images, test_labels)
        h = [torch.randn(12, 4, generator=seeded()), torch.randn(12, 4, generator=seeded(1))]
        evaluation.draw_neighbors("n.png", data, h)
    coloured = [bool((tiles[:, 1:, :, :2].std(2) > 0.1).any()) for tiles in written]
    assert coloured == [True, False, False, False]


def test_what_is_written_to_nowhere_is_lost_and_the_descriptor_comes_back(tmp_path):
    with open(tmp_path / "log", "wb", buffering=0) as log:
        before = len(os.listdir("/dev/fd"))
        with common.to_nowhere(log.fileno()):
            os.write(log.fileno(), b"lost")
        os.write(log.fileno(), b"kept")
        assert (tmp_path / "log").read_bytes() == b"kept" and len(os.listdir("/dev/fd")) == before


@pytest.mark.parametrize("method", METHODS)
def test_the_help_has_a_methods_own_flags_first_and_by_themselves(method, capsys):
    module = importlib.import_module(method)
    with pytest.raises(SystemExit):
        module.parse_args(["--help"])
    first, second = re.split(r"\n\n(?=[^\n]+:\n  -)", capsys.readouterr().out)[2:4]
    own = [common.option_of(name) for name, *_ in common.flags_of(module.Args) if common.option_of(name) not in shared_options()]
    assert first.startswith(f"{method}'s own:\n") == bool(own)
    if own:
        assert re.findall(r"^  (--[\w-]+)", first, re.MULTILINE) == own
        assert set(re.findall(r"^  (--[\w-]+)", second, re.MULTILINE)) <= shared_options()


def shared_options():
    return {common.option_of(name) for name, *_ in common.flags_of(common.Args)}


@pytest.mark.parametrize("there, asked", [(True, [False]), (False, [False, True])])
def test_a_data_set_that_is_there_is_not_downloaded(there, asked, capsys):
    calls = []

    def open_dataset(download):
        calls.append(download)
        if not there and not download:
            raise RuntimeError("not found or corrupted")
        return "the data"

    args = SimpleNamespace(dataset="cifar10", data_dir="here")
    assert common.local_or_downloaded(args, "cifar.tar.gz", open_dataset) == "the data" and calls == asked
    assert ("downloading it" in capsys.readouterr().out) == (not there)


@pytest.mark.parametrize("rows", [7, 8])
def test_as_many_images_as_a_slice_has_are_whitened(monkeypatch, rows):
    monkeypatch.setattr(evaluation, "whitening_of", lambda run: lambda z: z - z.mean(0))
    run, z = SimpleNamespace(args=SimpleNamespace(w_size=8)), [torch.randn(9, 3), torch.randn(rows, 3)]
    if rows == 8:
        assert [len(part) for part in evaluation.whitened(run, z, 0)] == [9, 8]
        return
    with pytest.raises(common.UserError, match="7 images are fewer than the 8 that are whitened together"):
        evaluation.whitened(run, z, 0)


@pytest.mark.parametrize("method, what, whitens", [
    ("simclr", "the loss", False), ("simclr", "the whitening", True), ("shuffled_dbn", "the loss", True), ("cw_rgp", "the gradient of x", True),
    ("cw_rgp", "the output of the backbone", False)])
def test_identical_images_are_a_cause_where_something_is_whitened(monkeypatch, tmp_path, method, what, whitens):
    monkeypatch.setattr(common, "identical_images", lambda data, step: 9)
    with pytest.raises(common.UserError) as raised:
        common.stop_non_finite(3, what, SimpleNamespace(args=importlib.import_module(method).Args()), str(tmp_path))
    words = "9 of the batch's 256 images are identical" if whitens else "the weights diverged or an input is not finite"
    assert f"step 3: {what} is not finite; likely cause: {words}: try " in str(raised.value)


def test_the_help_of_eval_begins_with_its_first_line(capsys):
    with pytest.raises(SystemExit):
        evaluation.parse_args(["--help"])
    assert evaluation.__doc__.splitlines()[0] in " ".join(capsys.readouterr().out.split())


def test_a_sheet_shows_what_is_too_bright_or_too_dark_as_white_or_black(tmp_path):
    evaluation.write_sheet(str(tmp_path / "sheet.png"), torch.tensor([1.5, -0.5]).view(1, 2, 1, 1, 1).expand(1, 2, 3, 64, 64))
    sheet = np.array(Image.open(tmp_path / "sheet.png"))
    assert (sheet[10, 10] == 255).all() and (sheet[10, 90] == 0).all()
