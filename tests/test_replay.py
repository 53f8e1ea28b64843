"""Two epochs of `train()` of each method, done a second time in plain numpy and torch, step by step: which images, which views,
which draws, the gradient, the rate, Adam, the slow copy, the queue; and at the end of each epoch what is measured and written.

Each step is replayed from the weights that `train()` had before it, so rounding does not add up and tolerances are tight."""

import functools
import importlib
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import METHODS
from test_metrics import slow_knn
from torch import nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

import common

pytestmark = pytest.mark.usefixtures("narrow_backbone")
SEED, BATCH, STEPS, EPOCHS, SIDE, SIZE = 3, 8, 3, 2, 10, 8  # three steps an epoch, images of 10 pixels, views of 8
TOTAL = STEPS * EPOCHS
RATES = dict(optimizer="adam", lr=0.01, lr_bias=0.02, weight_decay=0.1, warmup=2)
MOMENTUM = 0.9
OWN = {
    "simclr": dict(proj_dim=8), "moco": dict(proj_dim=8, queue_size=20, bn_splits=2, momentum=MOMENTUM),
    "byol": dict(proj_dim=8, momentum=MOMENTUM), "simsiam": dict(proj_dim=8, pred_hidden=4), "barlow": dict(proj_dim=8),
    "vicreg": dict(proj_dim=8), "wmse": dict(proj_dim=4, w_size=8), "shuffled_dbn": dict(proj_dim=16, groups=8),
    "cw_rgp": dict(proj_dim=32, groups=2, w_size=8, w_iter=1),
}


@functools.cache
def pictures():
    """28 training and 13 test images of three classes; 28 = 3 x 8 + 4, so four are left out in each epoch."""
    rng = np.random.default_rng(0)
    labels = np.arange(41) % 3
    base = rng.integers(0, 256, (3, 3, SIDE, SIDE))
    images = np.clip(0.4 * base[labels] + 0.6 * rng.integers(0, 256, (41, 3, SIDE, SIDE)), 0, 255).astype(np.uint8)
    return images[:28], labels[:28], images[28:], labels[28:]


def few_for_the_monitor(data):
    """Other images for the kNN after an epoch than for the one at the end, as in a large data set."""
    data.bank, data.bank_labels = data.train[:21], data.train_labels[:21]
    data.queries, data.query_labels = data.test[:10], data.test_labels[:10]
    return data


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """recorded("moco") -> what train() did: args, start, steps (views, rng, loss, gradients, rates, state), rows, scores, run."""
    known = {}

    def get(method):
        if method not in known:
            known[method] = record(method, tmp_path_factory.mktemp("replay") / method)
        return known[method]

    return get


def copied(tensors):
    return {name: t.detach().clone() for name, t in tensors}


def record(method, out):
    module, seen = importlib.import_module(method), SimpleNamespace(steps=[], rows=[], ends=[])
    args = module.Args(device="cpu", precision="fp32", image_size=SIZE, batch_size=BATCH, epochs=EPOCHS, seed=SEED, log_every=2, out=out,
                       proj_hidden=16, **RATES, **OWN[method])

    def build(args):
        model = module.build(args)
        if not hasattr(seen, "start"):
            seen.start = copied(model.state_dict().items())
            model.register_forward_pre_hook(note_views)
        return model

    def note_views(model, inputs):
        seen.steps.append(SimpleNamespace(views=[x.clone() for x in inputs[0]], rng=torch.get_rng_state(), training=model.training))

    def watch(run, step, loss):
        now = seen.steps[-1]
        now.number, now.loss = step, loss.item()
        now.gradients = copied((name, p.grad) for name, p in run.model.named_parameters() if p.grad is not None)
        now.state = copied(run.model.state_dict().items())
        now.rates = {id(p): group["lr"] for group in run.optimizer.param_groups for p in group["params"]}
        now.rates = {name: now.rates[id(p)] for name, p in run.model.named_parameters() if id(p) in now.rates}
        original["watch"](run, step, loss)

    def end_epoch(run, step, row):
        original["end_epoch"](run, step, row)
        seen.rows.append(dict(row))
        assert run.model.training  # measuring leaves the network in training mode

    def close(run, scores):
        seen.scores = dict(scores)

    original = {"watch": common.Run.watch, "end_epoch": common.Run.end_epoch}
    load = common.load_data
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.signal, "signal", lambda *_: None)
        patch.setattr(common, "make_patterns", pictures)
        patch.setattr(common, "load_data", lambda args, device: few_for_the_monitor(load(args, device)))
        for name, function in (("watch", watch), ("end_epoch", end_epoch), ("close", close)):
            patch.setattr(common.Run, name, function)
        seen.run = module.train(args, build=build)
    seen.args, seen.module = args, module
    return seen


# ---- the same once more --------------------------------------------------------------------------


def colours():
    x = pictures()[0].astype(np.float64) / 255
    return x.mean((0, 2, 3)), np.sqrt(((x - x.mean((0, 2, 3), keepdims=True)) ** 2).mean((0, 2, 3)))


def normalised(x):
    mean, std = (torch.tensor(c, dtype=torch.float32).view(3, 1, 1) for c in colours())
    return (x - mean) / std


def images_of(step):
    """The images of a step: a permutation of its epoch, cut into batches."""
    epoch, batch = divmod(step, STEPS)
    return np.random.default_rng((SEED, 1, epoch)).permutation(28)[BATCH * batch:BATCH * (batch + 1)]


def box(i, area, aspect, place):
    """RandomResizedCrop's box of image i, from its draws: top, left, height, width."""
    for a, r in zip(area[:, i], aspect[:, i]):
        w, h = round(math.sqrt(SIDE * SIDE * a * math.exp(r))), round(math.sqrt(SIDE * SIDE * a / math.exp(r)))
        if 0 < w <= SIDE and 0 < h <= SIDE:
            return int(place[0, i] * (SIDE - h + 1)), int(place[1, i] * (SIDE - w + 1)), h, w
    return 0, 0, SIDE, SIDE  # a square image: the central box is the whole


@functools.cache
def views_of(step, number):
    """View `number` of a step by W-MSE's recipe, image by image with torchvision."""
    rng = np.random.default_rng((SEED, 0, step, number))
    order = rng.random((BATCH, 4)).argsort(1)
    factor = rng.uniform([0.6, 0.6, 0.6, -0.1], [1.4, 1.4, 1.4, 0.1], (BATCH, 4))
    jittered, grey = rng.random(BATCH) < 0.8, rng.random(BATCH) < 0.1
    area, aspect = rng.uniform(0.2, 1, (10, BATCH)), rng.uniform(math.log(3 / 4), math.log(4 / 3), (10, BATCH))
    place = rng.random((2, BATCH))
    flipped = rng.random(BATCH) < 0.5
    change = functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation, functional.adjust_hue
    views = []
    for i, image in enumerate(torch.from_numpy(pictures()[0])[images_of(step)]):
        x = image.float() / 255
        for operation in order[i] if jittered[i] else ():
            x = change[operation](x, float(factor[i, operation]))
        x = functional.rgb_to_grayscale(x, 3) if grey[i] else x
        x = functional.resized_crop(x, *box(i, area, aspect, place), [SIZE, SIZE], InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
        views.append(x.flip(-1) if flipped[i] else x)
    return normalised(torch.stack(views))


def factor_of(step):
    """Two steps of warm-up, then half a cosine over the other four."""
    return (step + 1) / 2 if step < 2 else 0.5 + 0.5 * math.cos(math.pi * (step - 2) / 4)


def close(a, b, tolerance=1e-5):
    return a.shape == b.shape and bool((a - b).abs().max() <= tolerance * max(1e-3, float(b.abs().max())))


def model_of(seen, state):
    """A new model with these weights, in the layout of training."""
    model = seen.module.build(seen.args).to(memory_format=torch.channels_last)
    model.load_state_dict(state)
    return model.train()


def before(seen, step):
    return seen.steps[step - 1].state if step else seen.start


@pytest.mark.parametrize("method", METHODS)
def test_each_step_sees_its_own_images_views_and_draws(recorded, method):
    seen = recorded(method)
    torch.manual_seed(SEED)
    assert all(torch.equal(seen.start[name], t) for name, t in seen.module.build(seen.args).state_dict().items())
    assert [s.number for s in seen.steps] == list(range(TOTAL)) and all(s.training for s in seen.steps)
    for step, now in enumerate(seen.steps):
        assert len(now.views) == 2
        for number, view in enumerate(now.views):
            assert (view - views_of(step, number)).abs().max() < 2e-3, (step, number)
        seed = int(np.random.SeedSequence((SEED, 3, step)).generate_state(1)[0])
        assert torch.equal(now.rng, torch.Generator().manual_seed(seed).get_state())


@pytest.mark.parametrize("method", METHODS)
def test_each_step_has_the_gradient_of_its_own_loss(recorded, method):
    seen = recorded(method)
    for step, now in enumerate(seen.steps):
        model = model_of(seen, before(seen, step))
        torch.set_rng_state(now.rng)
        loss = model(now.views)
        wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
        gradients = dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values()))))
        assert loss.item() == pytest.approx(now.loss, rel=1e-5)
        assert set(gradients) == set(now.gradients)
        assert all(close(now.gradients[name], g, 1e-3) for name, g in gradients.items()), step
        for name, buffer in model.named_buffers():  # batch statistics and the queue
            assert close(now.state[name].float(), buffer.float(), 1e-4), (step, name)


@pytest.mark.parametrize("method", METHODS)
def test_each_step_is_adams_at_the_rate_of_the_schedule(recorded, method):
    seen, average, square = recorded(method), {}, {}
    for step, now in enumerate(seen.steps):
        for name, gradient in now.gradients.items():
            w = before(seen, step)[name].double().numpy()
            rate = RATES["lr_bias"] if w.ndim < 2 else RATES["lr"]
            rate *= 1 if method == "simsiam" and name.startswith("predictor") else factor_of(step)
            assert now.rates[name] == pytest.approx(rate)
            g = gradient.double().numpy() + RATES["weight_decay"] * w
            average[name] = 0.9 * average.get(name, 0) + 0.1 * g
            square[name] = 0.999 * square.get(name, 0) + 0.001 * g**2
            m, v = average[name] / (1 - 0.9 ** (step + 1)), square[name] / (1 - 0.999 ** (step + 1))
            expected = w - rate * m / (np.sqrt(v) + 1e-8)
            assert np.abs(now.state[name].double().numpy() - expected).max() < 1e-5, (step, name)


@pytest.mark.parametrize("method", ["moco", "byol"])
def test_each_step_moves_the_slow_copy(recorded, method):
    """MoCo's before the keys are computed, hence towards the weights before the step; BYOL's after it, ever more slowly."""
    seen = recorded(method)
    for step, now in enumerate(seen.steps):
        was = before(seen, step)
        momentum = MOMENTUM if method == "moco" else 1 - (1 - MOMENTUM) * (math.cos(math.pi * step / TOTAL) + 1) / 2
        online = was if method == "moco" else now.state
        for name in (name for name in now.gradients if name.startswith(("backbone", "projector"))):
            expected = momentum * was[f"target_{name}"].double() + (1 - momentum) * online[name].double()
            assert (now.state[f"target_{name}"] - expected).abs().max() < 1e-6, (step, name)


def test_each_step_puts_its_keys_at_the_end_of_the_queue(recorded):
    """In the order of the images, though the slow copy saw them shuffled, half a batch at a time."""
    seen = recorded("moco")
    for step, now in enumerate(seen.steps):
        model = model_of(seen, now.state)
        torch.set_rng_state(now.rng)
        order = torch.randperm(BATCH)
        with torch.no_grad():
            k = model.target_projector(model.target_backbone(now.views[1][order]))
        keys = torch.empty_like(k)
        keys[order] = F.normalize(k, dim=1)
        assert close(now.state["queue"], torch.cat([before(seen, step)["queue"][BATCH:], keys]), 1e-4), step


# ---- what an epoch and a run leave ---------------------------------------------------------------


def measured(images, network):
    """network of images as they are measured: the middle nine of ten pixels, resized to eight."""
    x = images.float() / 255
    x = functional.resize(x[:, :, :9, :9], [SIZE, SIZE], InterpolationMode.BILINEAR, antialias=True)
    with torch.no_grad():
        return network.eval()(normalised(x))


def accuracy(network, bank, bank_labels, queries, labels):
    bank, queries = (measured(torch.from_numpy(x), network).double().numpy() for x in (bank, queries))
    return slow_knn(bank, bank_labels, queries, labels, 20, 0.07)


@pytest.mark.parametrize("method", METHODS)
def test_the_row_of_an_epoch(recorded, method):
    seen = recorded(method)
    train, labels, test, test_labels = pictures()
    for epoch, row in enumerate(seen.rows, 1):
        steps = seen.steps[STEPS * (epoch - 1):STEPS * epoch]
        assert (row["epoch"], row["step"]) == (epoch, STEPS * epoch)
        assert row["loss"] == pytest.approx(np.mean([s.loss for s in steps]), rel=1e-6)
        assert row["lr"] == pytest.approx(RATES["lr"] * factor_of(STEPS * epoch - 1))
        model = model_of(seen, steps[-1].state)
        assert row["knn"] == pytest.approx(accuracy(model.backbone, train[:21], labels[:21], test[:10], test_labels[:10]))
        h = measured(torch.from_numpy(test[:10]), model.backbone)
        with torch.no_grad():
            z = model.projector.eval()(h)
        figures = common.collapse_metrics(z)
        assert {name: row[name] for name in figures} == pytest.approx(figures, rel=1e-2)
        assert row["rank_h"] == common.collapse_metrics(h)["rank_1pct"]
        assert 0 < row["alignment"] < 4 and -4 < row["uniformity"] <= 0
    assert len(seen.rows) == EPOCHS == len(seen.run.rows)


@pytest.mark.parametrize("method", METHODS)
def test_the_closing_scores_are_of_all_images(recorded, method):
    seen = recorded(method)
    torch.manual_seed(SEED)
    untrained = seen.module.build(seen.args).backbone
    networks = {"kNN": seen.run.model.backbone, "raw pixels": nn.Flatten(), "untrained backbone": untrained}
    assert seen.scores == {name: pytest.approx(accuracy(network, *pictures())) for name, network in networks.items()}
    saved = torch.load(f"{seen.run.folder}/backbone.pt", weights_only=True)
    assert set(saved) == {name.removeprefix("backbone.") for name in seen.start if name.startswith("backbone.")}
    assert all(torch.equal(t, seen.steps[-1].state[f"backbone.{name}"]) for name, t in saved.items())
