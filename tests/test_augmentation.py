"""Augmentation: pixel by pixel against torchvision for given parameters, by distribution for the drawn ones."""
import inspect
import itertools

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import InterpolationMode, RandomResizedCrop

import common as A          # in the repository: import common as A

INTERPOLATION = {"bilinear": InterpolationMode.BILINEAR, "bicubic": InterpolationMode.BICUBIC}
MEAN, STD = (0.49, 0.48, 0.44), (0.20, 0.21, 0.22)
ADJUST = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The pictures are small: threads only wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pictures(n=6, height=32, width=32, seed=0):
    """uint8 [n, 3, height, width] with flat, saturated, dark and grey regions beside noise: where colour formulas go wrong."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (n, 3, height, width), generator=g, dtype=torch.uint8)
    x[:, :, :4, :4] = torch.randint(0, 2, (n, 3, 4, 4), generator=g, dtype=torch.uint8) * 255     # pure colours, black, white
    x[:, :, 4:8] = x[:, :1, 4:8]                                                                   # greys
    x[:, :, 8:10] //= 32                                                                           # dark
    x[:, 1, 10:12] = x[:, 0, 10:12]                                                                # two channels tie
    x[:, 2, 12:14] = x[:, 1, 12:14]
    return x


def unit(x):
    return x.float() / 255


def close(ours, reference, atol=1e-5):
    torch.testing.assert_close(ours.contiguous(), reference.contiguous(), atol=atol, rtol=0)


def jitter_params(orders, factors, on=None):
    on = np.ones(len(orders), bool) if on is None else on
    return [{"on": np.asarray(on), "order": np.asarray(orders), "factor": np.asarray(factors, dtype=float)}]


# ---- the pixel operations ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("height,width,size", [(32, 32, 32), (40, 28, 64), (96, 80, 32)])
def test_crop_and_resize_is_torchvisions(interpolation, height, width, size):
    x = pictures(8, height, width)
    h, w = height, width
    box = np.array([[0, 0, h, w], [3, 5, 17, 11], [h - 7, 0, 7, w], [0, w - 9, h, 9], [5, 2, 1, 1], [1, 1, h - 1, w - 1],
                    [h // 2, w // 2, h - h // 2, w - w // 2], [2, 9, 13, 19]])
    ours = A.apply((("crop", 0.2, 1.0, interpolation),), x, [{"box": box}], size)
    for i, (top, left, bh, bw) in enumerate(box.tolist()):
        reference = F.resized_crop(unit(x[i]), top, left, bh, bw, [size, size], INTERPOLATION[interpolation], antialias=True)
        close(ours[i], reference.clamp(0, 1))
    if interpolation == "bicubic":
        assert ours.min() >= 0 and ours.max() <= 1


@pytest.mark.parametrize("after", ["crop", "blur", "nothing"])
def test_flip_mirrors_exactly_the_chosen(after):
    x, on = pictures(5), np.array([1, 0, 1, 1, 0], bool)
    view, params = [("flip", 0.5)], [{"on": on}]
    if after != "nothing":                                  # then the flip is folded into the crop
        view.insert(0, ("crop", 0.2, 1.0, "bicubic"))
        params.insert(0, {"box": np.array([[2, 3, 20, 15]] * 5)})
    if after == "blur":                                     # ... and a blur between them must not matter
        view.insert(1, ("blur", 1.0, 0.1, 2.0))
        params.insert(1, {"on": np.ones(5, bool), "sigma": np.full(5, 1.1)})
    flipped, straight = A.apply(view, x, params, 32), A.apply(view[:-1], x, params[:-1], 32)
    for i in range(5):
        close(flipped[i], straight[i].flip(-1) if on[i] else straight[i])


def test_flip_before_the_crop_is_not_folded():
    x, box = pictures(1), np.array([[2, 3, 20, 15]])
    ours = A.apply((("flip", 0.5), ("crop", 0.2, 1.0, "bilinear")), x, [{"on": np.array([True])}, {"box": box}], 32)
    close(ours[0], F.resized_crop(unit(x[0]).flip(-1), 2, 3, 20, 15, [32, 32], antialias=True))


@pytest.mark.parametrize("which,values", [(0, (0.0, 0.6, 1.0, 1.4, 1.8)), (1, (0.0, 0.6, 1.0, 1.4, 1.8)), (2, (0.0, 0.6, 1.0, 1.4, 1.8)),
                                          (3, (-0.5, -0.1, 0.0, 0.07, 0.5))], ids=["brightness", "contrast", "saturation", "hue"])
def test_one_colour_operation_is_torchvisions(which, values):
    x = pictures(len(values))
    factors = np.tile([1.0, 1.0, 1.0, 0.0], (len(values), 1))
    factors[:, which] = values
    ours = A.apply((("jitter",),), x, jitter_params([[0, 1, 2, 3]] * len(values), factors), 32)
    for i, value in enumerate(values):
        close(ours[i], ADJUST[which](unit(x[i]), value))


def test_jitter_in_each_of_the_24_orders():
    orders = list(itertools.permutations(range(4)))
    rng = np.random.default_rng(1)
    factors = rng.uniform([0.2, 0.2, 0.2, -0.2], [1.8, 1.8, 1.8, 0.2], (24, 4))
    on = np.arange(24) % 7 != 3                             # some are left alone
    shuffle = rng.permutation(24)                           # orders and un-jittered samples in no particular sequence
    orders = np.array(orders)[shuffle]
    x = pictures(24)
    ours = A.apply((("jitter",),), x, jitter_params(orders, factors, on), 32)
    different = 0
    for i in range(24):
        reference = unit(x[i])
        for k in orders[i] if on[i] else []:
            reference = ADJUST[k](reference, factors[i, k])
        close(ours[i], reference, atol=2e-5)
        other = unit(x[i])
        for k in orders[i][::-1]:
            other = ADJUST[k](other, factors[i, k])
        different += (other - reference).abs().max() > 0.01
    assert different > 15                                   # so that a wrong order would have shown


@pytest.mark.parametrize("name", ["grey", "solarize"])
def test_grey_and_solarize_change_exactly_the_chosen(name):
    x, on = pictures(5), np.array([1, 0, 0, 1, 0], bool)
    ours = A.apply(((name, 0.5),), x, [{"on": on}], 32)
    change = {"grey": lambda i: F.rgb_to_grayscale(i, 3), "solarize": lambda i: F.solarize(i, 0.5)}[name]
    for i in range(5):
        close(ours[i], change(unit(x[i])) if on[i] else unit(x[i]), atol=1e-6)


@pytest.mark.parametrize("side,kernel", [(32, 3), (64, 7), (96, 9)])
def test_blur_is_torchvisions_with_a_tenth_of_the_side(side, kernel):
    x, on, sigma = pictures(5, side, side), np.array([1, 1, 0, 1, 1], bool), np.array([0.1, 0.5, 9.0, 1.3, 2.0])
    ours = A.apply((("blur", 0.5, 0.1, 2.0),), x, [{"on": on, "sigma": sigma}], side)
    for i in range(5):
        close(ours[i], F.gaussian_blur(unit(x[i]), kernel, sigma[i]) if on[i] else unit(x[i]))


def test_the_operations_run_in_the_recipes_order():
    """A whole W-MSE view is colours, then crop (bicubic overshoot and clamping make the two orders differ)."""
    view, x = A.RECIPES["w-mse"][0], pictures(16)
    assert [op[0] for op in view] == ["jitter", "grey", "crop", "flip"]
    params = A.draw(view, 16, 32, 32, np.random.default_rng(3))
    colour, grey, crop, flip = params

    def colours(image, i):
        for k in colour["order"][i] if colour["on"][i] else []:
            image = ADJUST[k](image, colour["factor"][i, k])
        return F.rgb_to_grayscale(image, 3) if grey["on"][i] else image

    def crops(image, i):
        image = F.resized_crop(image, *crop["box"][i].tolist(), [32, 32], INTERPOLATION["bicubic"], antialias=True).clamp(0, 1)
        return image.flip(-1) if flip["on"][i] else image

    ours, differ = A.apply(view, x, params, 32), 0
    for i in range(16):
        close(ours[i], crops(colours(unit(x[i]), i), i), atol=3e-5)
        differ += (colours(crops(unit(x[i]), i), i) - ours[i]).abs().max() > 0.01
    assert differ > 4


def test_a_float_input_is_left_untouched():
    x = unit(pictures(8))
    before = x.clone()
    for op in ("grey", 1.0), ("solarize", 1.0), ("flip", 1.0), ("blur", 1.0, 1.0, 2.0), ("jitter", 0.4, 0.4, 0.4, 0.1, 1.0):
        A.apply((op,), x, A.draw((op,), 8, 32, 32, np.random.default_rng(0)), 32)
        assert torch.equal(x, before), op


# ---- the draws -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("height,width,least", [(32, 32, 0.2), (32, 32, 0.08), (48, 40, 0.2), (24, 60, 0.5)])
def test_crop_boxes_are_distributed_as_torchvisions(height, width, least):
    """The last case is so long that all ten tries often fail and the central fallback is taken."""
    ours = A.draw_boxes(20000, height, width, least, 1.0, np.random.default_rng(0)).astype(float)
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, [least, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)], dtype=float)

    def features(b):
        top, left, h, w = b.T
        return {"area": h * w / (height * width), "log ratio": np.log(w / h), "middle y": (top + h / 2) / height,
                "middle x": (left + w / 2) / width, "height": h / height, "width": w / width, "top": top / height, "left": left / width}

    ours, theirs = features(ours), features(theirs)
    for name in ours:
        points = np.unique(theirs[name])
        cdf = [np.searchsorted(np.sort(d), points, side="right") / len(d) for d in (ours[name], theirs[name])]
        assert np.abs(cdf[0] - cdf[1]).max() < 0.035, name  # Kolmogorov-Smirnov: 1.63 / sqrt(3333) = 0.028 at 1 %, fixed seeds


@pytest.mark.parametrize("height,width", [(10, 100), (100, 10), (31, 90)])
def test_a_crop_that_cannot_fit_falls_back_to_torchvisions_central_box(height, width):
    expected = RandomResizedCrop.get_params(torch.empty(3, height, width), [1.0, 1.0], [3 / 4, 4 / 3])
    assert (A.draw_boxes(50, height, width, 1.0, 1.0, np.random.default_rng(0)) == expected).all()


@pytest.mark.parametrize("name", sorted(A.RECIPES))
def test_draws_follow_the_recipe(name):
    n = 20000
    for number, view in enumerate(A.RECIPES[name]):
        for (op, *setting), p in zip(view, A.draw(view, n, 32, 32, np.random.default_rng((0, number)))):
            if op == "crop":
                assert (p["box"][:, 2:] > 0).all() and (p["box"] >= 0).all() and (p["box"][:, :2] + p["box"][:, 2:] <= 32).all()
                continue
            chance = setting[{"jitter": 4}.get(op, 0)]
            assert abs(p["on"].mean() - chance) < 0.015, op
            if op == "jitter":
                for k, s in enumerate(setting[:4]):
                    low, high = (-s, s) if k == 3 else (max(0, 1 - s), 1 + s)
                    f = p["factor"][:, k]
                    assert low <= f.min() < low + 0.01 and high - 0.01 < f.max() <= high
                    assert abs(f.mean() - (low + high) / 2) < 0.015 and abs(f.std() - (high - low) / 12**0.5) < 0.015
                counts = np.unique(p["order"] @ [64, 16, 4, 1], return_counts=True)[1]
                assert len(counts) == 24 and abs(counts / n - 1 / 24).max() < 0.006
                assert abs(np.corrcoef(p["factor"].T)[np.triu_indices(4, 1)]).max() < 0.03
            if op == "blur":
                assert abs(p["sigma"].mean() - 1.05) < 0.02 and p["sigma"].min() >= 0.1 and p["sigma"].max() <= 2.0


def test_the_recipes_are_the_papers():
    """The papers' and official codes' operations, typed a second time."""
    j, f = ("jitter", 0.4, 0.4, 0.4, 0.1, 0.8), ("flip", 0.5)
    blur = ("blur", 0.5, 0.1, 2.0)
    by = (("crop", 0.08, 1.0, "bicubic"), f, ("jitter", 0.4, 0.4, 0.2, 0.1, 0.8), ("grey", 0.2))
    assert {k: [tuple(v) for v in views] for k, views in A.RECIPES.items()} == {
        "w-mse": [(j, ("grey", 0.1), ("crop", 0.2, 1.0, "bicubic"), f)],
        "short": [(j, ("grey", 0.1), ("crop", 0.35, 1.0, "bicubic"), f)],
        "moco-v2": [(("crop", 0.2, 1.0, "bilinear"), j, ("grey", 0.2), blur, f)],
        "moco-v1": [(("crop", 0.2, 1.0, "bilinear"), ("grey", 0.2), ("jitter", 0.4, 0.4, 0.4, 0.4, 1.0), f)],
        "moco-cifar": [(("crop", 0.08, 1.0, "bilinear"), f, j, ("grey", 0.2))],
        "simsiam-cifar": [(("crop", 0.2, 1.0, "bilinear"), j, ("grey", 0.2), f)],
        "simclr": [(("crop", 0.08, 1.0, "bicubic"), f, ("jitter", 0.8, 0.8, 0.8, 0.2, 0.8), ("grey", 0.2), blur)],
        "simclr-cifar": [(("crop", 0.08, 1.0, "bicubic"), f, j, ("grey", 0.2))],
        "byol": [by + (("blur", 1.0, 0.1, 2.0), ("solarize", 0.0)), by + (("blur", 0.1, 0.1, 2.0), ("solarize", 0.2))],
        "vicreg-cifar": [(("crop", 0.2, 1.0, "bicubic"), ("jitter", 0.4, 0.4, 0.2, 0.1, 0.8), ("grey", 0.2), ("solarize", 0.1), f)],
        "crop-flip": [(("crop", 0.2, 1.0, "bilinear"), f)],
        "colour-flip": [(j, ("grey", 0.1), f)],
        "none": [()],
    }


def run(x, recipe="w-mse", views=2, seed=0, step=5, **kw):
    return A.augment(x, recipe, views, 32, MEAN, STD, seed, step, **kw)


def test_every_sample_and_every_view_has_its_own_draw():
    same = pictures(1).expand(32, 3, 32, 32)
    flat = torch.cat(run(same, "moco-v2", views=3)).flatten(1)
    assert torch.cdist(flat, flat).fill_diagonal_(9).min() > 0.1


def test_the_byol_views_alternate():
    """Blur always in the first, third ... view: less high-frequency energy there."""
    rough = [(v[..., 1:] - v[..., :-1]).abs().mean() for v in run(pictures(64), "byol", views=4)]
    assert max(rough[0], rough[2]) < 0.8 * min(rough[1], rough[3])


def test_ranks_see_what_one_process_would():
    x = pictures(24)
    whole = run(x, "byol")
    for v in range(2):
        parts = [run(x[8 * r : 8 * r + 8], "byol", rank=r, world_size=3)[v] for r in range(3)]
        close(torch.cat(parts), whole[v])


def test_seed_and_step_alone_decide():
    x = pictures(16)
    first = run(x)
    torch.manual_seed(9), np.random.seed(9)                 # no global generator is used
    assert all(torch.equal(a, b) for a, b in zip(first, run(x)))
    assert not torch.equal(first[0], run(x, step=6)[0]) and not torch.equal(first[0], run(x, seed=1)[0])
    assert torch.equal(first[0], run(x, views=4)[0])        # asking for more views does not change the first


@pytest.mark.parametrize("wrong", [pictures(4).float() / 255, pictures(4).short(), pictures(4).permute(0, 2, 3, 1), pictures(4)[0]], ids=["float", "int16", "NHWC", "one"])
def test_borrowed_functions_refuse_images_that_are_not_uint8(wrong):
    """Others would be taken for numbers in 0 ... 1, or their rows for colours."""
    with pytest.raises(A.UserError, match=r"^images are torch\..* \[.*\]; try torch\.uint8 \[N, 3, H, W\]$"):
        A.augment(wrong, "simclr", 2, 32, MEAN, STD, seed=0, step=0)
    with pytest.raises(A.UserError, match="try torch.uint8"):
        A.colour_statistics(wrong)


def test_output_format_and_normalisation():
    x = pictures(4)
    for v in run(x, "w-mse", views=3) + run(x, "none", views=1):
        assert v.shape == (4, 3, 32, 32) and v.dtype == torch.float32 and v.is_contiguous(memory_format=torch.channels_last)
    close(run(x, "none", views=1)[0], F.normalize(unit(x), MEAN, STD))
    with torch.autocast("cpu", dtype=torch.bfloat16):       # the caller's autocast must not reach the resampling
        close(run(x)[0], run(x)[0], atol=0)
        under = run(x)[0]
    close(under, run(x)[0], atol=0)


def test_cropped_images_are_not_cropped_again():
    x = pictures(8)
    kept = run([x], "crop-flip", views=1)[0]                # a list: the loader has cropped
    reference = F.normalize(unit(x), MEAN, STD)
    flipped = 0
    for a, b in zip(kept, reference):
        flipped += int(torch.equal(a, b.flip(-1)))
        assert (a - b).abs().max() < 1e-5 or (a - b.flip(-1)).abs().max() < 1e-5
    with pytest.raises(ValueError, match="crop"):
        A.augment(pictures(2, 40, 40), "none", 1, 32, MEAN, STD, 0, 0)


# ---- the device ----------------------------------------------------------------------------------------------------

class NoSync(TorchDispatchMode):
    """Counts calls, and refuses all that would make the host wait for the device."""
    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        name = func.name()
        forbidden = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "aten::item", "aten::equal", "unique")
        assert not any(f in name for f in forbidden), name
        if name.startswith(("aten::index.", "aten::index_put")):        # a Boolean index hides a nonzero
            assert all(i is None or i.dtype != torch.bool for i in args[1]), "Boolean index"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", sorted(A.RECIPES))
def test_apply_never_synchronises_nor_loops_over_samples(name):
    calls = []
    for n in (64, 192):
        x = pictures(n)
        for view in A.RECIPES[name]:
            params = A.draw(view, n, 32, 32, np.random.default_rng(0))
            with NoSync() as mode:
                A.apply(view, x, params, 32)
            calls.append(mode.calls)
            out = A.apply(view, x.to("meta"), params, 32)   # a tensor without data: nothing can depend on its values
            assert out.shape == (n, 3, 32, 32) and out.device.type == "meta"
    half = len(calls) // 2
    assert calls[:half] == calls[half:] and max(calls) < 500    # views and scalars are counted too: kernels are about half


def test_the_sync_test_can_fail():
    for bad in (lambda x: x[x > 0.5], lambda x: x.sum().item(), lambda x: x.nonzero(), lambda x: bool(x.any())):
        with pytest.raises(AssertionError), NoSync():
            bad(torch.rand(4))


def test_the_random_numbers_come_from_the_host():
    """Nothing on the device draws: a GPU and a CPU must see the same augmentation."""
    assert "torch.rand" not in inspect.getsource(A.augment) + inspect.getsource(A.apply) + inspect.getsource(A.jitter)
