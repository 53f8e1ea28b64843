"""Backbones, the learning rate as a function of the step, LARS, Muon and the groups of the optimizer."""

import copy
import math
from types import SimpleNamespace

import common
import cw_rgp
import numpy as np
import pytest
import torch
import torch.nn as nn
import torchvision
from conftest import METHODS, ROOT, is_one_line_error, run_here, run_script
from torch.utils._python_dispatch import TorchDispatchMode

# ---- backbones -----------------------------------------------------------------------------------


def images(n, size, seed=0):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize("size, kernel, stride, padding, pool", [
    (8, 3, 1, 1, False), (32, 3, 1, 1, False), (33, 3, 1, 1, True), (64, 3, 1, 1, True), (65, 7, 2, 3, True), (224, 7, 2, 3, True)])
def test_the_stem_of_a_resnet_follows_the_image_size(name, size, kernel, stride, padding, pool):
    network, _ = common.build_backbone(name, size)
    stem = network.conv1
    assert (stem.kernel_size, stem.stride, stem.padding, stem.bias) == ((kernel, kernel), (stride, stride), (padding, padding), None)
    assert isinstance(network.maxpool, nn.MaxPool2d) == pool and isinstance(network.fc, nn.Identity)


@pytest.mark.parametrize("name, size, feature_dim", [("tiny", 32, 1024), ("tiny", 64, 1024), ("tiny", 8, 1024), ("resnet18", 32, 512),
                                                     ("resnet18", 64, 512), ("resnet34", 32, 512), ("resnet50", 32, 2048)])
def test_features_are_rows_of_the_announced_width(name, size, feature_dim):
    network, announced = common.build_backbone(name, size)
    with torch.no_grad():
        h = network.eval()(images(2, size))
    assert announced == feature_dim and h.shape == (2, feature_dim) and h.isfinite().all() and h.std() > 0


@pytest.mark.parametrize("size", [32, 64, 224])
def test_every_resnet_has_torchvisions_parameter_names_and_shapes_but_for_stem_and_fc(size):
    for name in ("resnet18", "resnet50"):
        ours = {key: value.shape for key, value in common.build_backbone(name, size)[0].state_dict().items()}
        theirs = {key: value.shape for key, value in torchvision.models.get_model(name).state_dict().items() if not key.startswith("fc.")}
        assert list(ours) == list(theirs)
        assert [key for key in ours if ours[key] != theirs[key]] == (["conv1.weight"] if size <= 64 else [])


@pytest.mark.parametrize("name, last", [("resnet18", "bn2"), ("resnet50", "bn3")])
def test_the_last_batch_norm_of_every_block_starts_at_zero(name, last):
    network = common.build_backbone(name, 32)[0]
    blocks = [block for layer in (network.layer1, network.layer2, network.layer3, network.layer4) for block in layer]
    for block in blocks:
        assert not getattr(block, last).weight.any() and (block.bn1.weight == 1).all()
    assert len(blocks) == {"resnet18": 8, "resnet50": 16}[name]


def test_the_new_stem_is_initialised_like_torchvisions():
    """Kaiming, fan out: standard deviation sqrt(2 / (64 * 9))."""
    torch.manual_seed(0)
    weight = common.build_backbone("resnet18", 32)[0].conv1.weight
    assert float(weight.detach().std()) == pytest.approx(math.sqrt(2 / (64 * 9)), rel=0.1)


@pytest.mark.parametrize("name", ["tiny", "resnet18"])
def test_the_seed_decides_the_weights(name):
    states = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        states.append(torch.cat([p.detach().flatten() for p in common.build_backbone(name, 32)[0].parameters()]))
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


def test_an_unknown_backbone_is_one_line_with_names_that_exist():
    with pytest.raises(common.UserError, match="resnet19.*tiny.*resnet18") as raised:
        common.build_backbone("resnet19", 32)
    assert "\n" not in str(raised.value)


def test_tiny_has_the_announced_layers():
    layers = [type(layer).__name__.removeprefix("Patch") for layer in common.build_backbone("tiny", 32)[0].layers]
    assert layers.count("Conv2d") == layers.count("BatchNorm2d") == layers.count("ReLU") == 5 and layers.count("MaxPool2d") == 1
    widths = [layer.out_channels for layer in common.build_backbone("tiny", 32)[0].layers if isinstance(layer, nn.Conv2d)]
    assert widths == [32, 96, 96, 192, 256]


def test_tinys_features_are_the_means_of_the_four_quarters():
    network, _ = common.build_backbone("tiny", 32)
    with torch.no_grad():
        x = images(2, 32)
        maps, h = network.eval().layers[:-1](x), network(x).view(2, 256, 2, 2)  # maps [2, 256, 4, 4]
    for i in (0, 1):
        for j in (0, 1):
            quarter = maps[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean((2, 3))
            torch.testing.assert_close(h[:, :, i, j], quarter)


class PoolGradients(TorchDispatchMode):
    """Notes whether each gradient that arrives at the average pooling is channels_last."""

    def __init__(self):
        super().__init__()
        self.last = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._adaptive_avg_pool2d_backward.default:
            self.last.append(args[0].is_contiguous(memory_format=torch.channels_last))
        return function(*args, **kwargs or {})


def test_the_gradient_of_tinys_pooling_is_channels_last():
    """In the layout that the heads send, it takes several times as long on a CPU."""
    h = common.build_backbone("tiny", 32)[0](images(4, 32).contiguous(memory_format=torch.channels_last))
    with PoolGradients() as seen:
        h.square().sum().backward()
    assert seen.last == [True]


@pytest.mark.parametrize("c, filters, k, stride, padding, side", [(3, 5, 2, 2, 0, 8), (2, 6, 3, 2, 1, 9), (4, 3, 3, 1, 1, 5), (2, 2, 3, 2, 0, 8), (2, 3, 1, 2, 0, 5)])
def test_a_convolution_by_patches_has_the_value_and_the_gradients_of_torchs(c, filters, k, stride, padding, side):
    """In float64. The sides are such that some strides leave pixels at the edge out."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(4, c, side, side, generator=generator).double(), torch.randn(filters, c, k, k, generator=generator).double()
    for layout in (torch.contiguous_format, torch.channels_last):
        inputs = [t.contiguous(memory_format=layout).requires_grad_() for t in (x, weight)]
        ours = common.PatchConvolution.apply(*inputs, stride, padding)
        torchs = torch.nn.functional.conv2d(*inputs, None, stride, padding)
        assert torch.equal(ours, torchs)
        direction = torch.randn(ours.shape, generator=generator).double()
        for found, expected in zip(torch.autograd.grad(ours, inputs, direction), torch.autograd.grad(torchs, inputs, direction)):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("changed", [
    {}, {"bias": False}, {"groups": 2}, {"dilation": 2}, {"padding_mode": "reflect"}, {"padding": "same"}, {"kernel_size": (3, 2)},
    {"stride": (1, 2)}, {"padding": (0, 1)}, {"dtype": torch.float64}], ids=str)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_a_borrowed_convolution_is_torchs_whatever_its_arguments(changed, autocast):
    """Value and gradients; where the fast path knows nothing of an argument, torch's own is taken."""
    given = {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "padding": 1, **changed}
    ours, torchs = common.PatchConv2d(**given), nn.Conv2d(**given)
    torchs.load_state_dict(ours.state_dict())
    found = []
    for layer in (ours, torchs):
        x = torch.randn(3, 4, 8, 8, dtype=ours.weight.dtype, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            y = layer(x)
        y.float().square().sum().backward()
        found.append((y, x.grad, layer.weight.grad))
    for mine, theirs in zip(*found):
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
        torch.testing.assert_close(mine.double(), theirs.double(), rtol=0.03, atol=0.03 * theirs.abs().max().item())


def test_a_borrowed_convolution_takes_one_image():
    layer, x = common.PatchConv2d(4, 6, 3), torch.randn(4, 8, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.float().sum().backward()
    assert y.shape == (6, 6, 6) and x.grad.shape == x.shape


class ConvolutionGradients(TorchDispatchMode):
    """Notes the channels of each convolution whose weights' gradient torch itself computes."""

    def __init__(self):
        super().__init__()
        self.channels = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.convolution_backward.default and args[-1][1]:
            self.channels.append(tuple(args[2].shape[:2]))
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("name, by_torch", [("tiny", [(96, 96)]), ("vit_tiny", [])])
def test_weights_gradients_by_onednn_in_bfloat16_are_avoided(name, by_torch):
    """Its threads spin while they wait for each other: with a busy program in another terminal, a
    step of SimCLR took 3.5 s and not 0.2. From 96 to 96 channels it is faster, and does not wait."""
    network, x = common.build_backbone(name, 32)[0], images(16, 32)
    x = x.contiguous(memory_format=torch.channels_last)
    gradients = {}
    for bf16 in (True, False):
        network.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16), torch.random.fork_rng():
            torch.manual_seed(0)
            loss = network(x).float().square().mean()
        with ConvolutionGradients() as seen:
            loss.backward()
        count = sum(isinstance(module, nn.Conv2d) for module in network.modules())
        assert seen.channels == by_torch if bf16 else len(seen.channels) == count
        gradients[bf16] = {name: p.grad.clone() for name, p in network.named_parameters()}
    for name, exact in gradients[False].items():
        assert (gradients[True][name] - exact).norm() < 0.25 * exact.norm() + 1e-6, name


@pytest.mark.parametrize("name", ["tiny", "resnet18"])
@pytest.mark.parametrize("training", [True, False])
def test_bf16_is_close_to_fp32(name, training):
    torch.manual_seed(0)
    network = common.build_backbone(name, 32)[0].train(training)
    if name != "tiny":
        for module in network.modules():  # leave the start, where the residual branches are 0
            if isinstance(module, nn.BatchNorm2d):
                nn.init.ones_(module.weight)
    x = images(16, 32)
    with torch.no_grad():
        exact = network(x)
        with torch.autocast("cpu", torch.bfloat16):
            rough = network(x).float()
    assert not torch.equal(exact, rough)
    assert float((rough - exact).norm() / exact.norm()) < 0.03


@pytest.mark.slow
def test_a_compiled_tiny_computes_the_same():
    torch.manual_seed(0)
    plain, x = common.build_backbone("tiny", 32)[0], images(8, 32)
    args = SimpleNamespace(compile=True)
    model = nn.Module()
    model.backbone = common.build_backbone("tiny", 32)[0]
    model.backbone.load_state_dict(plain.state_dict())
    compiled = common.distribute(model, args).backbone
    results = []
    for network in (plain, compiled):
        out = network(x)
        out.square().mean().backward()
        results.append([out.detach(), *(p.grad for p in network.parameters()), *(b.float() for b in network.buffers())])
    assert list(compiled.state_dict()) == list(plain.state_dict())
    for a, b in zip(*results):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_compiled_run_ends_like_an_uncompiled_one(method, flags, tmp_path):
    """Up to 5 % of what the run changed: rounding turns some ReLUs over. With SGD: Adam's first steps have the sign of each
    gradient alone, which rounding decides where a gradient is next to 0."""
    models = []
    for rate, more in ((0.01, []), (0.01, ["--compile"]), (1e-12, [])):  # the last stays where all three start
        out = tmp_path / f"run{len(models)}"
        rates = ("--optimizer", "sgd", "--lr", rate, "--lr-bias", rate, "--warmup", 0)  # MoCo's 150 steps would leave next to no change
        assert run_here(method, flags(method, *rates, "--epochs", 1, "--out", out, *more)).status == 0
        models.append(torch.load(out / "last.pt", weights_only=True)["model"])
    plain, compiled, start = models
    assert list(plain) == list(compiled)
    for name, tensor in plain.items():
        difference, change = (tensor - compiled[name]).double().norm(), (tensor - start[name]).double().norm()
        assert difference <= 0.05 * change + 1e-4 * tensor.double().norm() + 1e-6, name


@pytest.mark.slow
def test_compile_without_a_compiler_is_one_line(flags, tmp_path):
    result = run_script(ROOT / "methods" / "vicreg.py", *flags("vicreg", "--compile"), CXX=str(tmp_path / "no-compiler"),
                        TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    assert is_one_line_error(result) and "--compile does not work here" in result.err and "try it without --compile" in result.err, result.err


def test_backbone_pt_of_a_run_loads_strictly_into_torchvision(flags, tmp_path):
    result = run_here("cw_rgp", flags("cw_rgp", "--backbone", "resnet18", "--image-size", 8, "--epochs", 1, "--views", 2))
    assert result.status == 0, result.err
    state = torch.load(tmp_path / "run" / "backbone.pt", weights_only=True)
    network = torchvision.models.resnet18()
    network.conv1, network.maxpool, network.fc = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity(), nn.Identity()
    network.load_state_dict(state, strict=True)
    trained = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["model"]
    assert all(torch.equal(value, trained[f"backbone.{name}"]) for name, value in state.items())
    assert int(state["bn1.num_batches_tracked"]) == 4  # two steps of two views
    ours = common.build_backbone("resnet18", 8)[0]
    ours.load_state_dict(state, strict=True)
    with torch.no_grad():
        assert torch.equal(network.eval()(images(2, 8)), ours.eval()(images(2, 8)))


# ---- learning rate -------------------------------------------------------------------------------


def factors(schedule, total, steps_per_epoch=10, warmup=None):
    args = SimpleNamespace(schedule=schedule, warmup=warmup)
    return [common.learning_rate(args, step, total, steps_per_epoch) for step in range(total)]


@pytest.mark.parametrize("schedule", ["cosine", "step", "constant"])
def test_warm_up_is_linear_and_reaches_the_peak(schedule):
    f = factors(schedule, 2000, warmup=100)
    assert f[:100] == pytest.approx([(i + 1) / 100 for i in range(100)]) and f[99] == f[100] == 1.0 and max(f) == 1.0


def test_the_default_warm_up_is_500_steps_or_a_tenth_of_a_shorter_run():
    f = factors("constant", 10_000)
    assert f[498:501] == pytest.approx([499 / 500, 1, 1]) and f[0] == pytest.approx(1 / 500)
    assert factors("constant", 1000)[0] == pytest.approx(1 / 100)
    assert factors("constant", 5) == [1.0] * 5


def test_without_warm_up_the_first_step_has_the_peak():
    for schedule in ("cosine", "step", "constant"):
        assert factors(schedule, 1000, warmup=0)[0] == 1.0


def test_cosine_halves_in_the_middle_and_ends_next_to_zero():
    f = factors("cosine", 1100, warmup=100)
    assert f[600] == pytest.approx(0.5) and f[-1] == pytest.approx((1 + math.cos(math.pi * 999 / 1000)) / 2) and 0 < f[-1] < 1e-5
    assert all(a > b for a, b in zip(f[100:], f[101:]))
    f = factors("cosine", 1000, warmup=0)
    assert f[250] == pytest.approx((1 + math.sqrt(0.5)) / 2)


def test_step_falls_50_and_25_epochs_before_the_end():
    f = factors("step", 1000, steps_per_epoch=10, warmup=0)  # 100 epochs
    assert f[:500] == [1.0] * 500 and f[500:750] == pytest.approx([0.2] * 250) and f[750:] == pytest.approx([0.04] * 250)


@pytest.mark.parametrize("epochs, last", [(15, 1.0), (25, 1.0), (30, 0.2), (50, 0.2), (51, 0.04)])
def test_a_short_run_with_step_starts_at_the_peak(epochs, last):
    """A fall that would come before the run or at its first step does not come (MultiStepLR ignores negative milestones)."""
    f = factors("step", 10 * epochs, warmup=0)
    assert f[0] == 1.0 and f[-1] == pytest.approx(last)


def test_constant_stays():
    assert set(factors("constant", 500, warmup=0)) == {1.0}


@pytest.mark.parametrize("schedule", ["cosine", "step", "constant"])
@pytest.mark.parametrize("total, warmup", [(1, None), (1, 0), (3, 10), (7, 7), (100, 99)])
def test_every_step_of_a_very_short_run_has_a_factor_between_0_and_1(schedule, total, warmup):
    assert all(0 <= f <= 1 and math.isfinite(f) for f in factors(schedule, total, warmup=warmup))


@pytest.mark.parametrize("schedule", ["cosine", "step", "constant"])
def test_the_factor_is_a_pure_function_of_the_step(schedule):
    args = SimpleNamespace(schedule=schedule, warmup=20)
    forwards = [common.learning_rate(args, step, 900, 10) for step in range(900)]
    backwards = [common.learning_rate(args, step, 900, 10) for step in reversed(range(900))]
    assert forwards == backwards[::-1] and vars(args) == {"schedule": schedule, "warmup": 20}


# ---- optimizer -----------------------------------------------------------------------------------


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.predictor = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.frozen = nn.Linear(4, 4).requires_grad_(False)


def optimizer_of(name="lars", model=None, **more):
    args = SimpleNamespace(optimizer=name, lr=0.4, lr_bias=0.02, weight_decay=0.1)
    model = model or Small()
    return model, common.build_optimizer(model, SimpleNamespace(**{**vars(args), **more}))


@pytest.mark.parametrize("name, kind", [("adam", torch.optim.Adam), ("sgd", torch.optim.SGD), ("lars", common.LARS)])
def test_weights_and_biases_form_groups_with_their_own_peak(name, kind):
    model, optimizer = optimizer_of(name)
    assert isinstance(optimizer, kind) and len(optimizer.param_groups) == 2
    for group in optimizer.param_groups:
        flat = group["params"][0].dim() == 1
        assert all((p.dim() == 1) == flat for p in group["params"])
        assert group["peak_lr"] == (0.02 if flat else 0.4) and group["excluded"] == flat
        assert not group["constant"] and group["weight_decay"] == 0.1
    owned = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(owned) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    if name == "sgd":
        assert all(group["momentum"] == 0.9 for group in optimizer.param_groups)


def test_a_module_with_a_constant_rate_has_groups_of_its_own():
    model = Small()
    model.predictor.constant_lr = True
    _, optimizer = optimizer_of("sgd", model)
    constant = {id(p) for group in optimizer.param_groups if group["constant"] for p in group["params"]}
    assert constant == {id(p) for p in model.predictor.parameters()} and len(optimizer.param_groups) == 4
    assert sorted(group["peak_lr"] for group in optimizer.param_groups if group["constant"]) == [0.02, 0.4]


def test_lr_bias_is_lr_where_it_is_not_given():
    rates = [common.set_up(cw_rgp.parse_args(["--lr", "0.7", *more]))[0].lr_bias for more in ([], ["--lr-bias", "0.1"])]
    assert rates == [0.7, 0.1]


def numpy_lars(w, gradients, lr, decay, excluded, momentum=0.9, trust=0.001):
    w, velocity = w.astype(np.float64), np.zeros(w.shape)
    for g in gradients:
        update = g.astype(np.float64)
        if not excluded:
            update = update + decay * w
            norms = np.linalg.norm(w), np.linalg.norm(update)
            if norms[0] > 0 and norms[1] > 0:
                update = update * trust * norms[0] / norms[1]
        velocity = momentum * velocity + update
        w = w - lr * velocity
    return w


@pytest.mark.parametrize("case", ["plain", "zero weights", "zero gradients", "both zero", "no decay"])
def test_lars_takes_the_steps_of_a_numpy_reference(case):
    rng = np.random.default_rng(0)
    model = nn.Linear(5, 7)
    shapes = {"weight": (7, 5), "bias": (7,)}
    start = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    gradients = {name: [rng.normal(size=shape).astype(np.float32) for _ in range(3)] for name, shape in shapes.items()}
    if case in ("zero weights", "both zero"):
        start["weight"][:] = 0
    if case in ("zero gradients", "both zero"):
        gradients["weight"] = [0 * g for g in gradients["weight"]]
    decay = 0.0 if case == "no decay" else 0.1
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.from_numpy(start[name]))
    _, optimizer = optimizer_of("lars", model, weight_decay=decay)
    for step in range(3):
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"]
        for name, p in model.named_parameters():
            p.grad = torch.from_numpy(gradients[name][step].copy())
        optimizer.step()
    for name, p in model.named_parameters():
        expected = numpy_lars(start[name], gradients[name], 0.02 if name == "bias" else 0.4, decay, excluded=name == "bias")
        assert np.allclose(p.detach().numpy(), expected, rtol=1e-5, atol=1e-7), name
        assert np.array_equal(p.grad.numpy(), gradients[name][2])  # a gradient is not decayed in place


def test_lars_leaves_parameters_without_a_gradient_alone():
    model, optimizer = optimizer_of("lars")
    before = {name: p.clone() for name, p in model.named_parameters()}
    for p in model.predictor.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (not name.startswith("predictor")), name


@pytest.mark.parametrize("name", ["lars", "muon"])
def test_lars_and_muon_go_on_exactly_from_their_state(name):
    def steps(model, optimizer, seeds):
        for seed in seeds:
            torch.manual_seed(seed)
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            optimizer.step()
        return [p.detach().clone() for p in model.parameters()]

    torch.manual_seed(0)
    rates = {"lr_filters": 0.1, "precision": "fp32"}
    model, optimizer = optimizer_of(name, nn.Conv2d(3, 3, 2), **rates)
    first = steps(model, optimizer, [1, 2])
    saved = {"model": {k: v.clone() for k, v in model.state_dict().items()}, "optimizer": optimizer.state_dict()}
    saved["optimizer"] = {"state": {k: {n: t.clone() for n, t in s.items()} for k, s in saved["optimizer"]["state"].items()},
                          "param_groups": saved["optimizer"]["param_groups"]}
    whole = steps(model, optimizer, [3, 4])
    other, resumed = optimizer_of(name, nn.Conv2d(3, 3, 2), **rates)
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    assert all(torch.equal(a, b) for a, b in zip(steps(other, resumed, [3, 4]), whole))
    assert not any(torch.equal(a, b) for a, b in zip(first, whole))


def numpy_orthogonalise(m, iterations=3):
    """The polynomial of Jordan et al. on the singular values, one by one."""
    u, s, vt = np.linalg.svd(m.astype(np.float64), full_matrices=False)
    s = s / np.sqrt((s**2).sum())
    for _ in range(iterations):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ np.diag(s) @ vt


@pytest.mark.parametrize("shape", [(5, 12), (12, 5), (8, 8), (1, 9)])
def test_orthogonalise_changes_the_singular_values_only(shape):
    m = 7.0 * torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u = common.orthogonalise(m)
    assert np.allclose(u.numpy(), numpy_orthogonalise(m.numpy()), atol=1e-12)
    assert torch.allclose(common.orthogonalise(1e3 * m), u) and torch.equal(common.orthogonalise(0 * m), 0 * m)
    singular, start = torch.linalg.svdvals(u), torch.linalg.svdvals(m)
    assert singular[start > 0.02 * m.norm()].sub(0.95).abs().max() < 0.27


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason=f"torch {torch.__version__} has no torch.optim.Muon to compare with")
@pytest.mark.parametrize("shape", [(16, 40), (40, 16)])
def test_orthogonalise_is_that_of_torchs_own_muon(shape):
    """Which takes matrices only, computes in bf16 and leaves the length of the weights to their decay."""
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    w = nn.Parameter(torch.zeros(shape))
    w.grad = gradient.clone()
    torch.optim.Muon([w], lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False, ns_steps=3, adjust_lr_fn="match_rms_adamw").step()
    assert torch.allclose(-w.detach() / (0.2 * math.sqrt(max(shape))), common.orthogonalise(gradient), atol=0.02)


def muon_of(model, **more):
    return optimizer_of("muon", model, **{"lr_filters": 0.1, "precision": "fp32", "weight_decay": 0.0, **more})


def test_muon_takes_the_steps_of_a_numpy_reference_on_filters_and_adams_elsewhere():
    torch.manual_seed(0)
    model, optimizer = muon_of(Small(), weight_decay=0.1)
    twin = copy.deepcopy(model)
    adam = common.build_optimizer(twin, SimpleNamespace(optimizer="adam", lr=0.4, lr_bias=0.02, weight_decay=0.1))
    filters = model.backbone[0].weight
    w, average = filters.detach().double().numpy().reshape(4, 27), np.zeros((4, 27))
    for step in range(3):
        for group in optimizer.param_groups + adam.param_groups:
            group["lr"] = group["peak_lr"] / (1 + step)
        for a, b in zip(model.parameters(), twin.parameters()):
            if a.requires_grad:
                a.grad = torch.randn_like(a)
                b.grad = a.grad.clone()
        g = filters.grad.double().numpy().reshape(4, 27)
        average = 0.6 * average + 0.4 * g
        w = w * np.sqrt(4) / np.linalg.norm(w) - 0.1 / (1 + step) * numpy_orthogonalise(0.6 * average + 0.4 * g)
        optimizer.step()
        adam.step()
        assert np.allclose(filters.detach().numpy().reshape(4, 27), w, atol=1e-5)
    for (name, a), b in zip(model.named_parameters(), twin.parameters()):
        assert torch.equal(a, b) == (name != "backbone.0.weight"), name


def test_muon_gives_filters_a_group_and_a_rate_of_their_own():
    model, optimizer = muon_of(Small())
    rates = {id(p): group["peak_lr"] for group in optimizer.param_groups for p in group["params"]}
    expected = {name: 0.1 if p.dim() == 4 else 0.4 if p.dim() == 2 else 0.02 for name, p in model.named_parameters() if p.requires_grad}
    assert {name: rates.get(id(p)) for name, p in model.named_parameters() if p.requires_grad} == expected and set(expected.values()) == {0.1, 0.4, 0.02}


def test_muon_does_not_depend_on_the_layout_of_filters_and_survives_zeros():
    layout = torch.channels_last
    torch.manual_seed(0)
    start, gradient = torch.randn(6, 4, 3, 3), torch.randn(6, 4, 3, 3)
    ends = []
    for w, g in ((start, gradient), (start.to(memory_format=layout), gradient.to(memory_format=layout)), (0 * start, gradient), (start, 0 * gradient)):
        conv = nn.Conv2d(4, 6, 3, bias=False)
        conv.weight = nn.Parameter(w.clone())
        _, optimizer = muon_of(conv)
        conv.weight.grad = g.clone()
        optimizer.step()
        ends.append(conv.weight.detach())
    assert torch.allclose(ends[0], ends[1], atol=1e-6) and all(bool(end.isfinite().all()) for end in ends)
    assert torch.allclose(ends[3], start * math.sqrt(6) / start.norm())


@pytest.mark.parametrize("backbone", ["tiny", "resnet18", "resnet50"])
def test_a_norm_layer_follows_every_convolution_as_muon_assumes(backbone):
    """The length of a filter is without effect then; Muon sets it as it likes."""
    network = common.build_backbone(backbone, 32)[0].double().train()
    for name, parameter in network.named_parameters():
        if parameter.dim() == 1 and name.endswith("weight"):
            nn.init.ones_(parameter)  # a ResNet's last norm of a block starts at 0, which would hide the block
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-15  # its weight beside the variance is all that the length of a filter changes
    x = images(4, 32).double()
    before = network(x)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                assert module.bias is None
                module.weight *= 3
        assert torch.allclose(network(x), before, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["adam", "sgd", "lars"])
def test_the_learning_rate_of_each_group_scales_its_step(flags, tmp_path, name):
    """A run whose weights do not move while its biases do: --lr tiny, --lr-bias large."""
    more = ["--optimizer", name, "--lr", "1e-12", "--lr-bias", "0.1", "--weight-decay", 0, "--epochs", 1, "--warmup", 0, "--image-size", 16]
    assert run_here("cw_rgp", flags("cw_rgp", *more)).status == 0
    torch.manual_seed(0)
    start = cw_rgp.build(cw_rgp.parse_args(flags("cw_rgp", *more))).state_dict()
    end = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["model"]
    for key in ("backbone.layers.0.weight", "projector.0.weight"):
        assert torch.allclose(start[key], end[key], atol=1e-8)
    assert not torch.allclose(start["backbone.layers.1.bias"], end["backbone.layers.1.bias"], atol=1e-4)
