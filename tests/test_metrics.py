"""kNN and collapse figures on data whose answer is known beforehand."""

import math

import common
import numpy as np
import pytest
import reference
import torch
from conftest import run_here

FIGURES = ("dim", "std_sqrt_d", "rank", "rank_1pct", "stable_rank", "stable_rank_sq", "rankme", "corr", "entropy", "uniformity")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def cross(d, scale=1.0):
    """2 d rows, +- the unit vectors: mean 0, all channels alike and uncorrelated."""
    return scale * torch.cat([torch.eye(d), -torch.eye(d)])


def with_covariance(covariance, n=200, seed=0):
    """n rows [n, d] in float64 with mean 0 and exactly this covariance (divided by n - 1)."""
    d = len(covariance)
    z = torch.randn(n, d, generator=seeded(seed), dtype=torch.float64)
    q = torch.linalg.qr(z - z.mean(0))[0]  # orthonormal, and orthogonal to the constant
    return math.sqrt(n - 1) * q @ torch.linalg.cholesky(covariance).T


@pytest.mark.parametrize("offset", [0, 3000])
def test_euclidean_neighbours_do_not_depend_on_where_the_embeddings_lie(offset):
    """In |x|^2 - 2 x.y + |y|^2 the offset would take all digits of float32."""
    bank = torch.randn(300, 16, generator=seeded(), dtype=torch.float64) + offset
    queries = torch.randn(80, 16, generator=seeded(1), dtype=torch.float64) + offset
    nearest = (queries[:, None] - bank).square().sum(2).argmin(1)
    assert common.knn_accuracy(bank, torch.arange(300), queries, nearest, k=1, temperature=None) > 0.98


# ---- collapse_metrics ----------------------------------------------------------------------------


@pytest.mark.parametrize("n, d, dtype", [(40, 7, torch.float64), (9, 12, torch.float64), (30, 5, torch.float32)])
@pytest.mark.parametrize("kind", ["full", "shifted", "low rank", "steep", "dead channel"])
def test_figures_agree_with_the_reference(n, d, dtype, kind):
    z = torch.randn(n, d, generator=seeded(3), dtype=torch.float64)
    if kind == "shifted":
        z += torch.linspace(-5, 5, d)
    if kind == "low rank":
        z = z[:, :3] @ torch.randn(3, d, generator=seeded(4), dtype=torch.float64)
    if kind == "steep":
        z *= 0.3 ** torch.arange(d)
    if kind == "dead channel":
        z[:, 2] = 0.25
    z = z.to(dtype)
    figures = common.collapse_metrics(z)
    for name in FIGURES[1:]:
        assert figures[name] == pytest.approx(getattr(reference, name)(z), rel=1e-9, abs=1e-9), name


@pytest.mark.parametrize("d", [2, 16, 65])
def test_isotropic_embeddings_fill_their_space(d):
    figures = common.collapse_metrics(cross(d, 3.0))
    assert tuple(figures) == FIGURES and all(type(value) is float for value in figures.values())
    for name in ("rank", "rank_1pct", "stable_rank", "stable_rank_sq"):
        assert figures[name] == pytest.approx(d, abs=1e-9)
    assert figures["std_sqrt_d"] == pytest.approx(1, abs=1e-6) and figures["corr"] == pytest.approx(0, abs=1e-9)
    assert figures["rankme"] == pytest.approx(d, rel=1e-4)
    variance = 2 * 9 / (2 * d - 1)
    assert figures["entropy"] == pytest.approx(d / 2 * math.log(2 * math.pi * math.e * (variance + 1e-4)), rel=1e-6)


@pytest.mark.parametrize("value", [1.0, 0.1, -1e-3, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant_embeddings_are_one_point(value, dtype):
    """The rounding that is left after centring is no rank: 0.1 has no exact mean in binary."""
    figures = common.collapse_metrics(torch.full((300, 64), value, dtype=dtype) * torch.arange(1, 65, dtype=dtype))
    assert figures["rank"] == 0 and figures["rank_1pct"] == 0 and figures["stable_rank"] == 0 and figures["stable_rank_sq"] == 0
    shares = np.array([1.0] + [0.0] * 63) + 1e-7  # Garrido et al. add it to each
    assert figures["rankme"] == pytest.approx(math.exp(-(shares * np.log(shares)).sum()), rel=1e-6)
    assert figures["std_sqrt_d"] == pytest.approx(0, abs=1e-6) and figures["corr"] == 1
    assert figures["entropy"] == pytest.approx(32 * math.log(2 * math.pi * math.e * 1e-4), rel=1e-4)


@pytest.mark.parametrize("r", [1, 3, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rank_counts_the_dimensions_that_are_filled(r, dtype):
    basis = torch.linalg.qr(torch.randn(64, r, generator=seeded(1), dtype=torch.float64))[0].T
    z = (with_covariance(torch.eye(r, dtype=torch.float64), 500) @ basis).to(dtype)
    figures = common.collapse_metrics(z)
    for name in ("rank", "rank_1pct", "stable_rank", "stable_rank_sq"):
        assert figures[name] == pytest.approx(r, rel=1e-5)
    assert figures["rankme"] == pytest.approx(r, rel=1e-3)


def test_stable_ranks_of_known_singular_values():
    """Singular values 4, 2, 2, 0.02: sum 8.02 / 4, squares 24.0004 / 16; a hundredth of the largest is 0.04."""
    z = torch.linalg.qr(with_covariance(torch.eye(4, dtype=torch.float64), 50))[0] * torch.tensor([4, 2, 2, 0.02])
    figures = common.collapse_metrics(z)
    assert figures["rank"] == 4 and figures["rank_1pct"] == 3
    assert figures["stable_rank"] == pytest.approx(8.02 / 4) and figures["stable_rank_sq"] == pytest.approx(24.0004 / 16)
    p = np.array([4, 2, 2, 0.02]) / 8.02
    assert figures["rankme"] == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-4)


def test_rankme_is_of_the_uncentred_embeddings_and_the_ranks_are_of_the_centred():
    z = with_covariance(torch.eye(16, dtype=torch.float64), 400)
    plain, shifted = common.collapse_metrics(z), common.collapse_metrics(z + 50)
    assert plain["rankme"] == pytest.approx(16, rel=1e-3) and shifted["rankme"] < 2
    for name in ("rank", "rank_1pct", "stable_rank", "stable_rank_sq", "corr", "entropy"):
        assert shifted[name] == pytest.approx(plain[name], rel=1e-6, abs=1e-9), name


@pytest.mark.parametrize("rho", [0.3, -0.3, 0.0, 0.999, -1.0])
def test_correlation_of_two_channels(rho):
    a = with_covariance(torch.eye(2, dtype=torch.float64))
    z = torch.stack([5 * a[:, 0], 0.01 * (rho * a[:, 0] + math.sqrt(1 - rho**2) * a[:, 1])], 1)
    assert common.collapse_metrics(z)["corr"] == pytest.approx(abs(rho), abs=1e-9)


def test_one_channel_that_is_there_twice():
    """5 channels, one pair of 10 fully correlated."""
    z = with_covariance(torch.eye(4, dtype=torch.float64))
    assert common.collapse_metrics(torch.cat([z, -3 * z[:, :1] + 1], 1))["corr"] == pytest.approx(0.1, abs=1e-9)


def test_a_constant_channel_counts_as_correlated_with_all():
    """4 channels, one dead: 3 of 6 pairs."""
    z = with_covariance(torch.eye(3, dtype=torch.float64))
    figures = common.collapse_metrics(torch.cat([z, torch.full((len(z), 1), 0.1, dtype=z.dtype)], 1))
    assert figures["corr"] == pytest.approx(0.5, abs=1e-9) and figures["rank"] == 3


@pytest.mark.parametrize("eps", [1e-4, 0.5])
def test_entropy_is_that_of_a_gaussian_with_this_covariance(eps):
    a = torch.randn(6, 6, generator=seeded(2), dtype=torch.float64)
    covariance = a @ a.T + 0.1 * torch.eye(6)
    expected = 0.5 * np.log(np.linalg.det(2 * np.pi * np.e * (covariance.numpy() + eps * np.eye(6))))
    assert common.collapse_metrics(with_covariance(covariance) + 7, eps)["entropy"] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("d", [2, 5, 40])
def test_the_variances_of_unit_rows_sum_up_to_one_minus_the_square_of_their_mean(d):
    """One-hot rows: |mean|^2 = 1/d and all channels alike, so (std * sqrt(d))^2 is the sum of the variances; lengths do not matter."""
    z = torch.eye(d) * torch.arange(1, d + 1)
    assert common.collapse_metrics(z)["std_sqrt_d"] ** 2 == pytest.approx(1 - 1 / d, abs=1e-6)


@pytest.mark.parametrize("offset", [0.0, 0.5, 3.0])
def test_the_same_identity_bounds_the_deviation_of_any_unit_rows(offset):
    z = torch.randn(500, 32, generator=seeded(3), dtype=torch.float64) + offset
    unit = z / z.norm(dim=1, keepdim=True)
    variances = unit.var(0, unbiased=False)
    assert float(variances.sum()) == pytest.approx(1 - float(unit.mean(0).square().sum()), abs=1e-12)
    figure = common.collapse_metrics(z)["std_sqrt_d"]
    assert figure == pytest.approx(float(variances.sqrt().mean() * math.sqrt(32)), abs=1e-9)
    assert figure <= math.sqrt(float(variances.sum())) + 1e-12


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_all_figures_but_the_entropy_ignore_the_scale(scale):
    z = torch.randn(100, 12, generator=seeded(4), dtype=torch.float64) @ torch.diag(torch.arange(1.0, 13, dtype=torch.float64)) + 1
    one, other = common.collapse_metrics(z), common.collapse_metrics(scale * z)
    for name in set(FIGURES) - {"entropy"}:
        assert other[name] == pytest.approx(one[name], rel=1e-6), name


@pytest.mark.parametrize("n, kept", [(2, 2), (37, 37), (500, 500), (501, 251), (1000, 500)])
def test_uniformity_is_the_log_mean_kernel_over_all_pairs_of_unit_rows(n, kept):
    """Written out; above 500 rows every second one, or third, and so on."""
    z = torch.randn(n, 5, generator=seeded(5), dtype=torch.float64) + 0.5
    unit = (z / z.norm(dim=1, keepdim=True)).numpy()[:: -(-n // 500)]
    assert len(unit) == kept
    kernels = np.concatenate([np.exp(-2 * np.square(unit[i] - unit[:i]).sum(1)) for i in range(kept)])
    assert len(kernels) == kept * (kept - 1) / 2
    assert common.collapse_metrics(z)["uniformity"] == pytest.approx(math.log(kernels.mean()), rel=1e-9)


def test_uniformity_of_one_point_and_of_two_opposite_ones():
    assert common.collapse_metrics(torch.ones(9, 4))["uniformity"] == pytest.approx(0, abs=1e-9)
    assert common.collapse_metrics(torch.tensor([[3.0, 4.0], [-0.3, -0.4]]))["uniformity"] == pytest.approx(-8)  # distance 2


class TwoPoints(torch.nn.Module):
    """A network whose output is its mean brightness, moved by a batch norm that would give away training mode."""

    def __init__(self):
        super().__init__()
        self.backbone = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 64, 6), torch.nn.BatchNorm1d(6))
        self.projector = torch.nn.Linear(6, 4)


@pytest.mark.parametrize("recipe, zero", [("none", True), ("crop-flip", False)])
def test_alignment_is_the_mean_squared_distance_of_two_views_of_the_first_queries(recipe, zero):
    args = common.Args(device="cpu", precision="fp32", augment=recipe, image_size=8, batch_size=2, views=3, seed=3)
    images = torch.randint(0, 256, (300, 3, 8, 8), dtype=torch.uint8, generator=seeded(6))
    data = common.Data(args, torch.device("cpu"), images[:20], None, images, None, [])
    torch.manual_seed(0)
    model = TwoPoints().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    found = common.alignment(model, data, args)
    assert torch.equal(state, torch.get_rng_state()) and model.backbone.training and model.projector.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert common.alignment(model, data, args) == found and (found == 0) == zero
    index = np.linspace(0, 299, 256).astype(int)
    views = common.augment(data.test[index], recipe, 2, 8, data.mean, data.std, seed=3, step=0)
    with torch.no_grad():
        z1, z2 = (model.eval().projector(model.backbone(x)).double().numpy() for x in views)
    rows = [np.square(a / np.linalg.norm(a) - b / np.linalg.norm(b)).sum() for a, b in zip(z1, z2)]
    assert found == pytest.approx(np.mean(rows), rel=1e-4, abs=1e-12)


@pytest.mark.parametrize("shape", [(1, 8), (8, 1), (1, 1), (2, 8), (5, 50)])
@pytest.mark.parametrize("fill", [0.0, 1.0, "random"])
def test_figures_are_finite_for_every_shape(shape, fill):
    z = torch.randn(shape, generator=seeded(5)) if fill == "random" else torch.full(shape, fill)
    figures = common.collapse_metrics(z)
    assert all(math.isfinite(value) for value in figures.values())
    assert figures["rank"] <= min(shape[0] - 1, shape[1])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_embeddings_that_are_not_finite_are_refused_in_words(value):
    z = torch.randn(20, 4)
    z[7, 2] = value
    with pytest.raises(common.UserError, match="not finite.*try a smaller --lr"):
        common.collapse_metrics(z)


def test_half_precision_and_gradients_do_no_harm():
    z = torch.randn(200, 8, generator=seeded(6)).bfloat16().requires_grad_()
    figures = common.collapse_metrics(z)
    expected = common.collapse_metrics(z.detach().double())
    assert figures == expected and figures["rank"] == 8


# ---- collapse_in_words ---------------------------------------------------------------------------


def in_words(figures):
    """As a run says it."""
    return common.collapse_in_words(figures | {"rank_h": 100}, figures["dim"], 128)


def words(z):
    return in_words(common.collapse_metrics(z))


def test_words_for_one_point():
    z = torch.randn(500, 64, generator=seeded(0)) * 1e-3 + torch.randn(64, generator=seeded(1))
    assert "nearly one point" in words(z) and "COLLAPSE" in words(z) and "\n" not in words(z)


@pytest.mark.parametrize("r", [1, 2, 4])
def test_words_for_few_dimensions(r):
    z = torch.randn(500, r, generator=seeded(0)) @ torch.randn(r, 64, generator=seeded(1))
    assert "DIMENSIONAL COLLAPSE" in words(z) and " 64 dimensions" in words(z)


def test_words_for_one_direction_that_drowns_the_others():
    z = torch.randn(500, 64, generator=seeded(0))
    z[:, 0] *= 200
    assert "DIMENSIONAL COLLAPSE" in words(z)


def test_no_words_for_healthy_embeddings():
    z = torch.randn(500, 64, generator=seeded(0))
    assert words(z) == "" and words(z + 1) == "" and words(z * torch.linspace(0.2, 1, 64)) == "" and words(cross(16)) == ""


@pytest.mark.parametrize("n", [8, 24, 64])
def test_a_small_test_set_is_not_taken_for_a_collapse(n):
    """24 points span at most 23 dimensions of 512, however healthy; and few points of few dimensions are still a collapse."""
    z = torch.randn(n, 512, generator=seeded(0))
    assert words(z) == "" and common.collapse_metrics(z)["rank"] == n - 1
    assert "COLLAPSE" in words(z[:, :1] @ torch.randn(1, 512, generator=seeded(1))) and "COLLAPSE" in words(torch.ones(n, 512))


def test_a_run_with_few_test_images_does_not_speak_of_a_collapse_and_a_collapsed_one_does(flags, tmp_path, monkeypatch):
    result = run_here("cw_rgp", flags("cw_rgp", "--proj-dim", 512, "--epochs", 1, "--image-size", 16))
    assert result.status == 0 and "COLLAPSE" not in result.out
    monkeypatch.setattr(common, "project", lambda projector, h, precision="fp32": torch.ones(len(h), 64))
    result = run_here("cw_rgp", flags("cw_rgp", "--epochs", 1, "--image-size", 16, "--out", tmp_path / "other"))
    assert result.status == 0 and "COLLAPSE: all embeddings are nearly one point" in result.out


@pytest.mark.parametrize("rank, word", [(8, False), (2, True)])
def test_a_backbone_of_eight_features_is_judged_by_its_own_width(rank, word, flags, monkeypatch):
    """All eight are full, and fewer than ten: no collapse. Two of eight are one."""
    wide = torch.nn.Linear(3 * 64, rank), torch.nn.Linear(rank, 8)
    monkeypatch.setattr(common, "build_backbone", lambda *_: (torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(8), torch.nn.Flatten(), *wide), 8))
    noise = torch.randn(1000, 64, generator=seeded())
    monkeypatch.setattr(common, "project", lambda projector, h, precision="fp32": noise[: len(h)])
    result = run_here("simclr", flags("simclr", "--epochs", 1, "--image-size", 16, "--optimizer", "adam"))
    assert result.status == 0 and ("H fills few dimensions (rank_h 2)" in result.out) == word and ("COLLAPSE" in result.out) == word


# ---- knn_accuracy --------------------------------------------------------------------------------


def knn(bank, bank_labels, queries, labels, k, temperature=0.07):
    to_rows = lambda x: torch.tensor(x, dtype=torch.float32)
    return common.knn_accuracy(to_rows(bank), torch.tensor(bank_labels), to_rows(queries), torch.tensor(labels), k, temperature)


def at(*degrees):
    """Unit vectors."""
    return [[math.cos(math.radians(a)), math.sin(math.radians(a))] for a in degrees]


def test_knn_of_hand_made_neighbours():
    bank, labels = at(0, 10, 90, 100, 180), [0, 0, 1, 1, 2]
    assert knn(bank, labels, at(5, 95, 170), [0, 1, 2], k=1) == 1.0
    assert knn(bank, labels, at(5, 95, 170), [1, 1, 2], k=1) == pytest.approx(2 / 3)
    assert knn(bank, labels, at(5, 95, 170), [2, 2, 0], k=1) == 0.0


def test_knn_compares_directions_with_a_temperature_and_positions_without():
    bank, labels = [[10.0, 0.0], [0.5, 0.5]], [0, 1]
    query = [[1.0, 0.1]]
    assert knn(bank, labels, query, [0], k=1, temperature=0.07) == 1.0
    assert knn(bank, labels, query, [1], k=1, temperature=None) == 1.0


def test_knn_weights_can_outvote_the_majority():
    """One neighbour at cos 1 against two at cos 0.5: e^(1/T) > 2 e^(0.5/T) for T < 0.72; plain votes see two against one."""
    bank, labels, query = at(0, 60, -60), [1, 0, 0], at(0)
    assert knn(bank, labels, query, [1], k=3, temperature=0.07) == 1.0
    assert knn(bank, labels, query, [1], k=3, temperature=0.7) == 1.0
    assert knn(bank, labels, query, [0], k=3, temperature=0.75) == 1.0
    assert knn(bank, labels, query, [0], k=3, temperature=None) == 1.0


def test_knn_with_a_very_small_temperature_does_not_overflow():
    assert knn(at(0, 60, -60), [1, 0, 0], at(0), [1], k=3, temperature=1e-4) == 1.0


@pytest.mark.parametrize("temperature", [0.07, None])
@pytest.mark.parametrize("labels", [[3, 1], [1, 3]])
def test_knn_ties_go_to_the_smallest_label(labels, temperature):
    assert knn(at(20, -20), labels, at(0), [1], k=2, temperature=temperature) == 1.0


@pytest.mark.parametrize("temperature", [0.07, None])
def test_knn_with_k_beyond_the_bank_asks_the_whole_bank(temperature):
    bank, labels = at(0, 90, 91), [0, 1, 1]
    assert [knn(bank, labels, at(80), [1], k, temperature) for k in (3, 4, 20)] == [1.0] * 3


def test_knn_with_classes_missing_on_either_side():
    bank = at(0, 90)
    assert knn(bank, [0, 5], at(1, 89), [0, 5], k=1) == 1.0
    assert knn(bank, [0, 5], at(1), [0], k=1) == 1.0  # class 5 is in no query
    assert knn(bank, [0, 1], at(1, 2, 89), [0, 7, 1], k=1) == pytest.approx(2 / 3)  # class 7 is not in the bank


def slow_knn(bank, bank_labels, queries, labels, k, temperature):
    right = 0
    for query, label in zip(queries, labels):
        if temperature is None:
            closeness = -((bank - query) ** 2).sum(1)
        else:
            closeness = (bank @ query) / (np.linalg.norm(bank, axis=1) * np.linalg.norm(query))
        nearest = np.argsort(-closeness, kind="stable")[:k]
        votes = np.zeros(20)
        for i in nearest:
            votes[bank_labels[i]] += 1 if temperature is None else math.exp(closeness[i] / temperature)
        right += votes.argmax() == label
    return right / len(queries)


@pytest.mark.parametrize("bank_size, query_size, k", [(7, 3, 20), (999, 1, 5), (1000, 1000, 1), (1037, 1001, 20), (2500, 2013, 5)])
@pytest.mark.parametrize("temperature", [0.07, 0.5, None])
def test_knn_equals_a_slow_loop_for_sizes_that_are_no_multiples_of_1000(bank_size, query_size, k, temperature):
    rng = np.random.default_rng(bank_size)
    centres = rng.normal(size=(12, 6))
    bank_labels, labels = rng.integers(0, 10, bank_size), rng.integers(0, 12, query_size)
    bank = centres[bank_labels] + 1.2 * rng.normal(size=(bank_size, 6)) + 0.3
    queries = centres[labels] + 1.2 * rng.normal(size=(query_size, 6)) + 0.3
    expected = slow_knn(bank, bank_labels, queries, labels, k, temperature)
    tensors = (torch.from_numpy(x) for x in (bank.astype(np.float32), bank_labels, queries.astype(np.float32), labels))
    found = common.knn_accuracy(*tensors, k, temperature)
    assert found == pytest.approx(expected, abs=1.01 / query_size if query_size > 1000 else 1e-9)  # one may hang on float32's last digit


def test_knn_leaves_its_inputs_alone():
    bank, queries = torch.randn(30, 4, generator=seeded(0)), torch.randn(10, 4, generator=seeded(1))
    copies = bank.clone(), queries.clone()
    common.knn_accuracy(bank, torch.arange(30) % 3, queries, torch.arange(10) % 3)
    assert torch.equal(bank, copies[0]) and torch.equal(queries, copies[1])


@pytest.mark.parametrize("images, word", [(11, False), (24, True)])
def test_few_test_images_lower_what_h_can_fill(images, word, flags, tmp_path, monkeypatch):
    """Nine of the ten dimensions that eleven images can fill are no collapse; nine of twenty-three are."""
    wide = torch.nn.Linear(3 * 64, 9), torch.nn.Linear(9, 64)
    monkeypatch.setattr(common, "build_backbone", lambda *_: (torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(8), torch.nn.Flatten(), *wide), 64))
    noise = torch.randn(100, 64, generator=seeded())
    monkeypatch.setattr(common, "project", lambda projector, h, precision="fp32": noise[: len(h)])
    plain = common.Data.__init__

    def few(self, *args, **more):
        plain(self, *args, **more)
        self.queries, self.query_labels = self.queries[:images], self.query_labels[:images]

    monkeypatch.setattr(common.Data, "__init__", few)
    result = run_here("simclr", flags("simclr", "--epochs", 1, "--image-size", 16, "--optimizer", "adam"))
    assert result.status == 0 and ("H fills few dimensions (rank_h 9)" in result.out) == word and ("COLLAPSE" in result.out) == word
