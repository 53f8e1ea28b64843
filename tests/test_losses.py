"""All nine losses and models, held to the slow float64 references in tests/reference.py: value, gradient, invariances, draws.

Random partitions and permutations are recovered by replaying the draws of a seeded generator. What other implementations get
wrong is in test_peer_bugs.py."""
import copy
import itertools
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import barlow
import byol
import cw_rgp
import moco
import reference as ref
import shuffled_dbn
import simclr
import simsiam
import vicreg
import wmse

import common


# ---------------------------------------------------------------------------------------------- helpers
def randn(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def embeddings(n, d, s=2, seed=0):
    """s views [n, d] of the same images: alike but not equal, correlated channels, not centred, well conditioned for whitening."""
    shared, mix = randn(n, d, seed=seed), np.eye(d) + 0.3 * randn(d, d, seed=seed + 1)
    return [(shared + 0.5 * randn(n, d, seed=seed + 10 + i)) @ mix + 0.3 for i in range(s)]


def tensors(*arrays, dtype=torch.float64):
    return [torch.tensor(np.asarray(a), dtype=dtype) for a in arrays]


def leaves(*arrays, dtype=torch.float64):
    return [a.requires_grad_() for a in tensors(*arrays, dtype=dtype)]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def value_and_gradients(f, arrays, dtype=torch.float64):
    inputs = leaves(*arrays, dtype=dtype)
    loss = f(*inputs)
    return loss.item(), [g.double().numpy() for g in torch.autograd.grad(loss, inputs)]


def close(a, b, tolerance):
    """Largest difference, relative to the largest entry of b (or to 1)."""
    a, b = (np.asarray(x.detach() if isinstance(x, torch.Tensor) else x, dtype=float) for x in (a, b))
    return a.shape == b.shape and bool(np.isfinite(a).all()) and np.abs(a - b).max() <= tolerance * max(1.0, np.abs(b).max())


def rotation(d, seed=0):
    return np.linalg.qr(randn(d, d, seed=seed))[0]


def unit(z):
    return ref.unit_rows(z)


# ---------------------------------------------------------------------------------------------- replayed draws
def replay_partitions(n, w, rounds, seed):
    """The slices that wmse_loss draws: one random order of the images a round."""
    orders = torch.rand(rounds, n, generator=generator(seed)).argsort(-1).numpy()
    return [order.reshape(-1, w) for order in orders]


def replay_cw(s, n, d, w, rounds, seed):
    """(partitions[round][slice], permutations[round][view][slice]) that cw_rgp_loss draws."""
    g = generator(seed)
    partitions = torch.rand(rounds, n, generator=g).argsort(-1).numpy().reshape(rounds, -1, w)
    channels = torch.rand(s, rounds * n // w, d, generator=g).argsort(-1).numpy().reshape(s, rounds, n // w, d)
    return partitions, channels.swapaxes(0, 1)


def replay_dbn(d, seed):
    g = generator(seed)
    return [torch.rand(d, generator=g).argsort().numpy() for _ in range(2)]


# ---------------------------------------------------------------------------------------------- one case per loss and option
def simclr_case(temperature):
    return SimpleNamespace(ours=lambda a, b: simclr.nt_xent_loss(a, b, temperature), book=lambda a, b: ref.nt_xent([a, b], temperature),
                           arrays=embeddings(5, 4))


def moco_case(temperature):
    q, k = embeddings(5, 4)
    queue = unit(randn(7, 4, seed=5))
    return SimpleNamespace(ours=lambda q: moco.info_nce_loss(q, *(t.to(q.dtype) for t in tensors(k, queue)), temperature),
                           book=lambda q: ref.info_nce(q, k, queue, temperature), arrays=[q])


def byol_case():
    p, z = embeddings(5, 4)
    return SimpleNamespace(ours=lambda p: byol.byol_loss(p, tensors(z)[0].to(p.dtype)), book=lambda p: ref.byol(p, z), arrays=[p])


def barlow_case(lambd):
    return SimpleNamespace(ours=lambda a, b: barlow.barlow_twins_loss(a, b, lambd), book=lambda a, b: ref.barlow(a, b, lambd),
                           arrays=embeddings(6, 4))


def vicreg_case(weights):
    return SimpleNamespace(ours=lambda a, b: vicreg.vicreg_loss(a, b, *weights),
                           book=lambda a, b: ref.vicreg(a, b, *weights, official=True),
                           arrays=[0.6 * z for z in embeddings(6, 4)])


def wmse_case(kind, w=9, n=9, d=3, s=2, rounds=1, eps=0.0):
    partitions = replay_partitions(n, w, rounds, seed=1)
    return SimpleNamespace(ours=lambda *views: wmse.wmse_loss(list(views), w, rounds, kind, eps, generator(1)),
                           book=lambda *views: ref.wmse(list(views), partitions, kind, eps), arrays=embeddings(n, d, s))


def dbn_case(groups, shuffle=True, n=9, d=4):
    permutations = replay_dbn(d, seed=1) if shuffle else (None, None)
    return SimpleNamespace(ours=lambda a, b: shuffled_dbn.shuffled_dbn_loss(a, b, groups, generator(1), shuffle),
                           book=lambda a, b: ref.shuffled_dbn(a, b, groups, *permutations), arrays=embeddings(n, d))


def cw_case(groups, n=3, w=3, d=12, s=2, rounds=1, eps=0.0):
    partitions, permutations = replay_cw(s, n, d, w, rounds, 1)
    return SimpleNamespace(ours=lambda *views: cw_rgp.cw_rgp_loss(list(views), groups, w, rounds, eps, generator(1)),
                           book=lambda *views: ref.cw_rgp(list(views), partitions, permutations, groups, eps), arrays=embeddings(n, d, s))


CASES = {
    "simclr": simclr_case(0.5), "simclr_cold": simclr_case(0.1),
    "moco": moco_case(0.1), "moco_v2": moco_case(0.2),
    "byol": byol_case(),
    "simsiam": SimpleNamespace(ours=simsiam.negative_cosine, book=ref.negative_cosine, arrays=embeddings(5, 4)),
    "barlow": barlow_case(0.0051), "barlow_strong": barlow_case(0.5),
    **{f"vicreg_code_{'_'.join(map(str, weights))}": vicreg_case(weights)
       for weights in ((25, 25, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1))},
    **{f"wmse_{kind}": wmse_case(kind) for kind in ("cholesky", "zca", "bn", "none")},
    **{f"wmse_{kind}_eps": wmse_case(kind, eps=0.1) for kind in ("cholesky", "zca", "bn")},
    "wmse_slices": wmse_case("cholesky", w=4, n=8, d=2), "wmse_rounds": wmse_case("cholesky", w=4, n=8, d=2, rounds=2),
    "wmse_zca_views_slices_rounds": wmse_case("zca", w=5, n=10, d=2, s=3, rounds=2), "wmse_views": wmse_case("cholesky", s=4),
    "dbn": dbn_case(1), "dbn_shuffled": dbn_case(2), "dbn_neighbours": dbn_case(2, shuffle=False), "dbn_single_channels": dbn_case(4),
    "dbn_three_groups": dbn_case(3, d=6),
    "cw": cw_case(1), "cw_per_view": cw_case(2), "cw_slices": cw_case(2, n=6, w=2, d=8),
    "cw_rounds": cw_case(2, n=4, w=2, d=8, rounds=3), "cw_views": cw_case(2, n=4, w=2, d=8, s=3), "cw_eps": cw_case(2, eps=0.1),
    "cw_eps_more_samples_than_channels": cw_case(3, n=6, w=6, d=12, eps=0.1),
}
NAMES = sorted(CASES)


@pytest.mark.parametrize("name", NAMES)
def test_value_is_the_papers(name):
    case = CASES[name]
    assert close(case.ours(*tensors(*case.arrays)), case.book(*case.arrays), 1e-11)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_is_the_references_numeric_gradient(name):
    case = CASES[name]
    ours = value_and_gradients(case.ours, case.arrays)[1]
    for got, want in zip(ours, ref.numeric_gradient(case.book, case.arrays), strict=True):
        assert np.abs(want).max() > 1e-4, "the case has no gradient to compare"
        assert close(got, want, 2e-8)


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name):
    case = CASES[name]
    assert torch.autograd.gradcheck(case.ours, leaves(*case.arrays), atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_float32_is_close_to_float64(name):
    case = CASES[name]
    inputs = leaves(*case.arrays, dtype=torch.float32)
    loss = case.ours(*inputs)
    assert loss.dtype == torch.float32 and loss.dim() == 0
    assert close(loss, case.book(*case.arrays), 2e-5)
    exact = value_and_gradients(case.ours, case.arrays)[1]
    for got, want in zip(torch.autograd.grad(loss, inputs), exact):
        assert got.dtype == torch.float32 and close(got, want, 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_embeddings_give_the_loss_of_the_same_numbers_in_float32(name, dtype):
    case = CASES[name]
    half = leaves(*case.arrays, dtype=dtype)
    loss = case.ours(*half)
    same_numbers = [h.detach().float() for h in half]
    if name.startswith("moco") or name == "byol":  # their other side is cut to half precision inside the case
        assert close(loss, case.ours(*same_numbers).item(), 2e-2)
    else:
        assert close(loss, case.ours(*same_numbers).item(), 1e-6)
    assert loss.dtype == torch.float32
    assert all(g.dtype == dtype and g.isfinite().all() for g in torch.autograd.grad(loss, half))


@pytest.mark.parametrize("name", NAMES)
def test_loss_leaves_its_inputs_alone(name):
    case = CASES[name]
    inputs = tensors(*case.arrays)
    case.ours(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(inputs, tensors(*case.arrays)))


# ---------------------------------------------------------------------------------------------- small cases by hand
EYE2 = torch.eye(2, dtype=torch.float64)


def test_nt_xent_by_hand():
    one = tensors([[3.0, 4.0]])[0]
    assert close(simclr.nt_xent_loss(one, -one, 0.5), 0.0, 1e-12)  # a single pair: nothing but the positive in the denominator
    assert close(simclr.nt_xent_loss(EYE2, 5 * EYE2, 0.5), math.log(1 + 2 * math.exp(-2)), 1e-12)
    constant = torch.ones(6, 3).double()
    assert close(simclr.nt_xent_loss(constant, constant, 0.1), math.log(11), 1e-12)  # 2 N - 1 terms


def test_info_nce_by_hand():
    q, queue = tensors([[2.0, 0, 0]], [[0, 1.0, 0], [0, 0, 1.0], [0, -1.0, 0]])
    assert close(moco.info_nce_loss(q, 7 * q, queue, 0.2), math.log(1 + 3 * math.exp(-5)), 1e-12)
    assert close(moco.info_nce_loss(q, -q, queue, 0.5), 2 + math.log(math.exp(-2) + 3), 1e-12)
    same = torch.ones(4, 3).double() / 3**0.5
    assert close(moco.info_nce_loss(same, same, same, 0.07), math.log(5), 1e-12)


def test_cosine_losses_by_hand():
    p, z = tensors([[3.0, 4.0], [0.0, 2.0]], [[1.0, 0.0], [0.0, -5.0]])
    assert close(simsiam.negative_cosine(p, z), (-0.6 + 1) / 2, 1e-12)
    assert close(byol.byol_loss(p, z), ((2 - 1.2) + 4) / 2, 1e-12)
    assert close(byol.byol_loss(p, 3 * p), 0, 1e-12)


def test_barlow_by_hand():
    z = tensors([[1.0, 1], [-1, 1], [1, -1], [-1, -1]])[0]
    shrink = 1 / (1 + 1e-5)
    assert close(barlow.barlow_twins_loss(z, z, 0.3), 2 * (1 - shrink) ** 2, 1e-14)
    assert close(barlow.barlow_twins_loss(z, z[:, [1, 0]], 0.3), 2 + 0.3 * 2 * shrink**2, 1e-12)
    assert close(barlow.barlow_twins_loss(z, -z, 0.3), 2 * (1 + shrink) ** 2, 1e-12)


def test_vicreg_by_hand():
    z = tensors([[0.0, 0], [2, 2]])[0]
    assert close(vicreg.vicreg_loss(z, z + 3, 1, 0, 0), 9, 1e-12)
    assert close(vicreg.vicreg_loss(z, z, 0, 1, 0), 0, 1e-12)  # variance 2: above 1 costs nothing
    constant = torch.ones(4, 3).double()
    assert close(vicreg.vicreg_loss(constant, constant, 0, 1, 0), 0.99, 1e-12)  # 1 - sqrt(1e-4), half the sum of two
    assert close(vicreg.vicreg_loss(z, constant[:2, :2], 0, 0, 1), (2**2 + 2**2) / 2, 1e-12)  # all four covariances are 2


@pytest.mark.parametrize("kind", ["cholesky", "zca", "pca", "bn"])
def test_whiten_one_channel_by_hand(kind):
    white = wmse.whiten(tensors([[1.0], [3], [5]])[0], kind)
    assert close(white.abs(), [[1.0], [0], [1]], 1e-12) and close(white.sum(), 0, 1e-12)


def test_whiten_cholesky_by_hand():
    """Sigma = [[4, 2], [2, 2]] has L = [[2, 0], [1, 1]]: the first channel halved, the second less the first's share."""
    x = torch.tensor([[1.0, 1], [-1, 1], [1, -1], [-1, -1]]).double() * math.sqrt(3 / 4)  # covariance I
    z = x @ torch.tensor([[2.0, 0], [1, 1]]).double().T
    assert close(wmse.whiten(z + 7), x, 1e-12)
    assert not close(wmse.whiten(z, "zca"), x, 1e-2)


def test_whiten_none_does_not_even_centre():
    z = torch.tensor(embeddings(5, 3)[0])
    assert torch.equal(wmse.whiten(z, "none", 0.5), z)


def test_decorrelate_single_channels_by_hand():
    z = tensors([[1.0, 5], [3, 5.5]])[0]
    assert close(shuffled_dbn.decorrelate(z, 2), [[-1.0, -1], [1, 1]], 1e-12)  # divisor N: unit second moment
    assert close(shuffled_dbn.shuffled_dbn_loss(z, z.flip(0), 2, shuffle=False), 8, 1e-12)  # (2^2 + 2^2), summed over channels


def test_channel_whiten_one_sample_by_hand():
    """w = 1: the covariance is one number, so each group gets the length sqrt(d/g - 1)."""
    z = tensors([[5.0, 1, 3, 3]])[0]
    assert close(cw_rgp.channel_whiten(z, 1), [[math.sqrt(3 / 8) * 2, -math.sqrt(3 / 8) * 2, 0, 0]], 1e-12)
    z = tensors([[5.0, 1, 4, 2]])[0]
    assert close(cw_rgp.channel_whiten(z, 2), np.array([[1, -1, 1, -1]]) / math.sqrt(2), 1e-12)
    assert close(cw_rgp.channel_whiten(z, 2, torch.tensor([0, 2, 1, 3])), np.array([[2, -2, 1, -1]]) / math.sqrt(5), 1e-12)


# ---------------------------------------------------------------------------------------------- invariances
ROW_SCALE = ["simclr", "moco", "byol", "simsiam"]
WHITENED = ["wmse_cholesky", "wmse_zca", "wmse_bn", "wmse_slices", "dbn", "dbn_shuffled", "cw", "cw_per_view", "cw_slices", "cw_views"]
SHIFT = ["barlow", "wmse_cholesky", "wmse_zca", "wmse_zca_eps", "wmse_bn", "dbn", "dbn_shuffled", "vicreg_code_0_1_0", "vicreg_code_0_0_1"]
ROTATION = ["simclr", "simsiam", "wmse_zca", "wmse_zca_eps", "wmse_none", "dbn", "vicreg_code_1_0_0"]
WHOLE_BATCH = ["simclr", "simsiam", "barlow", "vicreg_code_25_25_1", "wmse_cholesky", "wmse_zca",
               "wmse_views", "dbn", "dbn_shuffled", "cw", "cw_per_view"]


def loss_of(name, arrays):
    return CASES[name].ours(*tensors(*arrays)).item()


def unchanged(name, change, tolerance=1e-9):
    return close(loss_of(name, [change(a) for a in CASES[name].arrays]), loss_of(name, CASES[name].arrays), tolerance)


@pytest.mark.parametrize("name", WHOLE_BATCH)
def test_order_of_the_images_is_void_but_pairs_stay_together(name):
    arrays = CASES[name].arrays
    order = np.roll(np.arange(len(arrays[0])), 1)
    assert unchanged(name, lambda a: a[order])
    assert not close(loss_of(name, [arrays[0][order], *arrays[1:]]), loss_of(name, arrays), 1e-3)


@pytest.mark.parametrize("name", ROW_SCALE)
def test_scale_of_each_row_is_void(name):
    assert unchanged(name, lambda a: a * np.exp(randn(len(a), 1)))


@pytest.mark.parametrize("name", ROW_SCALE)
def test_gradient_is_orthogonal_to_each_row(name):
    case = CASES[name]
    for z, g in zip(case.arrays, value_and_gradients(case.ours, case.arrays)[1]):
        assert np.abs((z * g).sum(1)).max() < 1e-12 < np.abs(g).max()


@pytest.mark.parametrize("name", WHITENED)
def test_scale_of_a_view_is_void(name):
    assert unchanged(name, lambda a: a * (2 + a[0, 0] ** 2))  # another factor for every view


@pytest.mark.parametrize("name", WHITENED)
def test_total_gradient_is_orthogonal_to_the_embeddings(name):
    case = CASES[name]
    for z, g in zip(case.arrays, value_and_gradients(case.ours, case.arrays)[1]):
        assert abs((z * g).sum()) < 1e-11 < np.abs(g).max()


@pytest.mark.parametrize("name", SHIFT)
def test_shift_of_the_channels_is_void(name):
    assert unchanged(name, lambda a: a + 3 * randn(1, a.shape[1], seed=int(abs(a[0, 0]) * 1e6)))
    case = CASES[name]
    assert all(np.abs(g.sum(0)).max() < 1e-11 for g in value_and_gradients(case.ours, case.arrays)[1])


@pytest.mark.parametrize("name", ["cw", "cw_per_view", "cw_slices", "cw_eps"])
def test_cw_rgp_shift_of_each_sample_is_void(name):
    """Each sample is centred over its channels: gradient rows sum to zero."""
    assert unchanged(name, lambda a: a + randn(len(a), 1))
    assert not unchanged(name, lambda a: a + randn(1, a.shape[1]), 1e-3)
    case = CASES[name]
    assert all(np.abs(g.sum(1)).max() < 1e-11 for g in value_and_gradients(case.ours, case.arrays)[1])


@pytest.mark.parametrize("name", ROTATION)
def test_common_rotation_of_the_channels_is_void(name):
    assert unchanged(name, lambda a: a @ rotation(a.shape[1]))


@pytest.mark.parametrize("name", ["barlow", "vicreg_code_0_0_1", "wmse_cholesky", "wmse_bn", "dbn_neighbours"])
def test_rotation_matters_where_channels_have_a_meaning(name):
    assert not unchanged(name, lambda a: a @ rotation(a.shape[1]), 1e-3)


def test_info_nce_rotates_with_its_queue():
    (q, k), queue, turn = embeddings(5, 4), unit(randn(7, 4)), rotation(4)
    losses = [moco.info_nce_loss(*tensors(q @ r, k @ r, queue @ r), 0.2).item() for r in (np.eye(4), turn)]
    assert close(*losses, 1e-12)
    order = np.roll(np.arange(7), 3)
    assert close(moco.info_nce_loss(*tensors(q, k, queue[order]), 0.2), losses[0], 1e-12)  # the queue is a set


def test_cw_rgp_rotation_that_keeps_the_mean_is_void():
    basis = np.linalg.qr(np.column_stack([np.ones(12), randn(12, 11)]))[0]
    turn = basis @ np.block([[np.eye(1), np.zeros((1, 11))], [np.zeros((11, 1)), rotation(11)]]) @ basis.T
    assert unchanged("cw", lambda a: a @ turn)
    assert not unchanged("cw", lambda a: a @ rotation(12), 1e-3)


def test_cholesky_sees_through_lower_triangular_maps_and_only_those():
    z = embeddings(9, 3)[0]
    lower = np.tril(randn(3, 3), -1) + np.diag([2.0, 0.5, 1.0])
    white = wmse.whiten(torch.tensor(z))
    assert close(wmse.whiten(torch.tensor(z @ lower.T)), white, 1e-10)
    assert not close(wmse.whiten(torch.tensor(z @ lower)), white, 1e-2)


def test_zca_is_the_nearest_whitening():
    """Phi is symmetric: whitened and centred data have a symmetric positive-definite cross-covariance."""
    z = embeddings(9, 3)[0]
    x = ref.centre_columns(z)
    cross = x.T @ wmse.whiten(torch.tensor(z), "zca").numpy()
    assert close(cross, cross.T, 1e-10) and np.linalg.eigvalsh(cross).min() > 0
    white = shuffled_dbn.decorrelate(torch.tensor(z), 1).numpy()
    assert close(x.T @ white, (x.T @ white).T, 1e-10)


def test_moco_and_byol_targets_get_no_gradient():
    q, k, queue = leaves(*embeddings(4, 3), unit(randn(5, 3)))
    for loss, constants in ((moco.info_nce_loss(q, k, queue, 0.2), (k, queue)), (byol.byol_loss(q, k), (k,))):
        gradients = torch.autograd.grad(loss, (q, *constants), allow_unused=True)
        assert gradients[0].abs().max() > 1e-3 and all(g is None for g in gradients[1:])


def test_simsiam_loss_leaves_the_stop_gradient_to_the_caller():
    p, z = leaves(*embeddings(4, 3))
    assert all(g.abs().max() > 1e-3 for g in torch.autograd.grad(simsiam.negative_cosine(p, z), (p, z)))


# ---------------------------------------------------------------------------------------------- closed forms
def test_simclr_closed_form_gradient():
    z1, z2 = embeddings(5, 4)
    got = value_and_gradients(lambda a, b: simclr.nt_xent_loss(a, b, 0.3), [z1, z2])[1]
    want = ref.simclr_gradient(unit(z1), unit(z2), 0.3, "both")
    assert all(close(g, ref.through_unit_rows(z, w), 1e-12) for g, z, w in zip(got, (z1, z2), want))


def test_moco_closed_form_gradient_of_unit_rows():
    (q, k), queue = embeddings(5, 4), unit(randn(7, 4))
    got = value_and_gradients(lambda q: moco.info_nce_loss(q, *tensors(k, queue), 0.07), [q])[1][0]
    assert close(got, ref.through_unit_rows(q, ref.moco_gradient(unit(q), unit(k), queue, 0.07)), 1e-12)


def test_byol_and_simsiam_closed_form_gradient_with_a_linear_predictor():
    z1, z2 = embeddings(5, 4)
    weight = np.eye(4) + 0.4 * randn(4, 4)
    want = ref.linear_predictor_gradient(z1, unit(z2), weight)
    w, target = tensors(weight, z2)
    assert close(value_and_gradients(lambda z: simsiam.negative_cosine(z @ w.T, target), [z1])[1][0], want, 1e-12)
    assert close(value_and_gradients(lambda z: byol.byol_loss(z @ w.T, target), [z1])[1][0], 2 * want, 1e-12)


@pytest.mark.parametrize("lambd", [0.0051, 0.5])
def test_barlow_closed_form_gradient(lambd):
    z1, z2 = embeddings(6, 4)
    got = value_and_gradients(lambda a, b: barlow.barlow_twins_loss(a, b, lambd), [z1, z2])[1]
    q, k = ref.standardise(z1), ref.standardise(z2)
    assert close(got[0], ref.through_standardise(z1, ref.barlow_gradient(q, k, lambd)), 1e-12)
    assert close(got[1], ref.through_standardise(z2, ref.barlow_gradient(k, q, lambd)), 1e-12)


@pytest.mark.parametrize("weights", [(25, 25, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1)])
def test_vicreg_closed_form_gradient(weights):
    z = [0.6 * v for v in embeddings(6, 4)]
    got = value_and_gradients(lambda a, b: vicreg.vicreg_loss(a, b, *weights), z)[1]
    assert all(close(g, w, 1e-12) for g, w in zip(got, ref.vicreg_gradient(*z, *weights)))


def test_vicreg_variance_pushes_only_channels_below_one():
    z = randn(8, 2) / randn(8, 2).std(0, ddof=1) * [0.5, 3.0]
    gradient = value_and_gradients(lambda a: vicreg.vicreg_loss(a, a.detach(), 0, 1, 0), [z])[1][0]
    assert np.abs(gradient[:, 0]).max() > 1e-2 and np.abs(gradient[:, 1]).max() == 0


# ---------------------------------------------------------------------------------------------- S^(-1/2)
OWN_BACKWARD = pytest.mark.parametrize("module", [wmse, shuffled_dbn, cw_rgp], ids=lambda m: m.__name__)


def symmetric(eigenvalues, seed=0):
    turn = rotation(len(eigenvalues), seed)
    return turn @ np.diag(eigenvalues) @ turn.T


def inverse_root(module):
    return lambda a: module.InverseSquareRoot.apply((a + a.mT) / 2)


def plain_inverse_root(a):
    values, vectors = torch.linalg.eigh((a + a.mT) / 2)
    return vectors @ torch.diag_embed(values**-0.5) @ vectors.mT


@OWN_BACKWARD
@pytest.mark.parametrize("eigenvalues", [(4, 2, 1, 0.5), (3, 3, 1, 1), (1, 1, 1, 1), (2, 2 + 1e-9, 2, 0.3)], ids=str)
def test_inverse_square_root_gradcheck(module, eigenvalues):
    s = torch.tensor(symmetric(eigenvalues), requires_grad=True)
    assert close(inverse_root(module)(s), ref.inverse_root(s.detach().numpy()), 1e-12)
    assert torch.autograd.gradcheck(inverse_root(module), (s,), atol=1e-7)


@OWN_BACKWARD
def test_inverse_square_root_gradcheck_at_the_identity_itself(module):
    assert torch.autograd.gradcheck(inverse_root(module), (torch.eye(4).double().requires_grad_(),), atol=1e-7)


@OWN_BACKWARD
@pytest.mark.parametrize("smallest", [1e-2, 1e-5, 1e-8])
def test_inverse_square_root_gradient_near_rank_deficiency(module, smallest):
    """P = S^(-1/2): P^2 = S^(-1), so dP solves P dP + dP P = -S^(-1) dS S^(-1). No eigenvectors in this check."""
    s, dual, step = symmetric([2, 1, 1, smallest]), randn(4, 4, seed=1), randn(4, 4, seed=2)
    step, inverse = step + step.T, np.linalg.inv(s)
    root, eye = ref.inverse_root(s), np.eye(4)
    change = np.linalg.solve(np.kron(root, eye) + np.kron(eye, root), (-inverse @ step @ inverse).ravel()).reshape(4, 4)
    leaf = torch.tensor(s, requires_grad=True)
    (inverse_root(module)(leaf) * torch.tensor(dual)).sum().backward()
    got, want = (leaf.grad.numpy() * step).sum(), (dual * change).sum()
    assert abs(got - want) < max(1e-9, 1e-14 / smallest) * abs(want)
    assert close(leaf.grad, ref.inverse_root_backward(s, dual), max(1e-10, 1e-14 / smallest))


@OWN_BACKWARD
def test_inverse_square_root_is_finite_in_float32_where_plain_autograd_is_not(module):
    s = torch.eye(5, requires_grad=True)
    dual = torch.tensor(randn(5, 5), dtype=torch.float32)
    assert not torch.autograd.grad((plain_inverse_root(s) * dual).sum(), s)[0].isfinite().all()
    gradient = torch.autograd.grad((inverse_root(module)(s) * dual).sum(), s)[0]
    assert close(gradient, -(dual + dual.T) / 4, 1e-6)  # d S^(-1/2) = -dS / 2 at the identity


@OWN_BACKWARD
def test_inverse_square_root_of_a_batch_is_one_by_one(module):
    s = np.array([[symmetric([3, 2, 1], 5 * i + j) for j in range(3)] for i in range(2)])
    dual = torch.tensor(randn(2, 3, 3, 3))
    batch = torch.tensor(s, requires_grad=True)
    out = module.InverseSquareRoot.apply(batch)
    (out * dual).sum().backward()
    for i, j in np.ndindex(2, 3):
        assert close(out[i, j], ref.inverse_root(s[i, j]), 1e-12)
        assert close(batch.grad[i, j], ref.inverse_root_backward(s[i, j], dual[i, j].numpy()), 1e-12)


@OWN_BACKWARD
def test_inverse_square_root_of_an_indefinite_matrix_is_not_a_number(module):
    assert module.InverseSquareRoot.apply(torch.tensor(symmetric([1, 1, -0.1]))).isnan().any()


@OWN_BACKWARD
def test_inverse_square_root_refuses_a_second_derivative(module):
    """Its backward knows nothing of a second one: an error, not a wrong number."""
    s = torch.tensor(symmetric([3, 2, 1]), requires_grad=True)
    gradient = torch.autograd.grad(inverse_root(module)(s).square().sum() * s.sum(), s, create_graph=True)[0]
    with pytest.raises(RuntimeError):
        gradient.square().sum().backward()


# ---------------------------------------------------------------------------------------------- W-MSE
@pytest.mark.parametrize("eps", [0.0, 0.2])
@pytest.mark.parametrize("kind", ["cholesky", "zca", "bn", "none"])
def test_whiten_value_and_gradient(kind, eps):
    z, weights = embeddings(7, 3)[0], randn(7, 3, seed=3)
    assert close(wmse.whiten(torch.tensor(z), kind, eps), ref.whiten(z, kind, eps), 1e-11)
    ours = lambda a: (wmse.whiten(a, kind, eps) * torch.tensor(weights)).sum()
    want = ref.numeric_gradient(lambda a: float((ref.whiten(a, kind, eps) * weights).sum()), [z])[0]
    assert close(value_and_gradients(ours, [z])[1][0], want, 1e-8)


@pytest.mark.parametrize("eps", [0.0, 0.2])
def test_whiten_pca_value_and_gradient_up_to_sign_and_order(eps):
    z, weights = embeddings(7, 3)[0] * [3, 1, 0.3], randn(7, 3, seed=3)
    ours, book = wmse.whiten(torch.tensor(z), "pca", eps).numpy()[:, ::-1], ref.whiten(z, "pca", eps)  # the reference descends
    signs = np.sign((ours * book).sum(0))
    assert close(ours * signs, book, 1e-10)
    want = ref.numeric_gradient(lambda a: float((ref.whiten(a, "pca", eps) * signs * weights).sum()), [z])[0]
    got = value_and_gradients(lambda a: (wmse.whiten(a, "pca", eps).flip(1) * torch.tensor(weights)).sum(), [z])[1][0]
    assert close(got, want, 1e-7)
    assert torch.autograd.gradcheck(lambda a: wmse.whiten(a, "pca", eps), leaves(z), atol=1e-6, check_undefined_grad=False)


def test_wmse_loss_with_pca_is_the_distance_of_its_whitened_views():
    views = embeddings(7, 3, 3)
    order = replay_partitions(7, 7, 1, seed=2)[0][0]
    white = [wmse.whiten(torch.tensor(v[order]), "pca").numpy() for v in views]
    assert close(wmse.wmse_loss(tensors(*views), 7, 1, "pca", 0, generator(2)), ref.mean_pair_distance(white), 1e-12)


def test_pca_gradient_is_finite_for_equal_eigenvalues():
    z = np.array([[1.0, 1], [-1, 1], [1, -1], [-1, -1]])
    with torch.no_grad():
        assert wmse.whiten(torch.tensor(z), "pca").isfinite().all()
    weights = torch.tensor(randn(4, 2))
    assert np.isfinite(value_and_gradients(lambda a: (wmse.whiten(a, "pca") * weights).sum(), [z])[1][0]).all()


@pytest.mark.parametrize("kind", ["cholesky", "zca", "pca"])
def test_whitened_data_are_white_and_of_full_rank(kind):
    """A12: mean 0, covariance I, so that rank = stable rank = d."""
    white = wmse.whiten(torch.tensor(embeddings(40, 6)[0]), kind)
    assert close(white.mean(0), np.zeros(6), 1e-12) and close(white.T @ white / 39, np.eye(6), 1e-10)
    figures = common.collapse_metrics(white)
    assert figures["rank"] == figures["rank_1pct"] == 6
    assert abs(figures["stable_rank"] - 6) < 1e-9 and abs(figures["stable_rank_sq"] - 6) < 1e-9


def test_bn_is_not_white():
    white = wmse.whiten(torch.tensor(embeddings(40, 6)[0]), "bn")
    covariance = (white.T @ white / 39).numpy()
    assert close(np.diag(covariance), np.ones(6), 1e-12) and np.abs(covariance - np.eye(6)).max() > 0.1
    assert common.collapse_metrics(white)["stable_rank"] < 5.9


@pytest.mark.parametrize("kind", ["cholesky", "zca", "bn", "none"])
def test_whiten_takes_slices_along_leading_axes(kind):
    z = torch.tensor(np.array([embeddings(7, 3, 2, seed=s) for s in range(3)]))  # [3, 2, 7, 3]
    white = wmse.whiten(z, kind, 0.1)
    assert all(close(white[i, j], wmse.whiten(z[i, j], kind, 0.1), 1e-12) for i, j in np.ndindex(3, 2))


@pytest.mark.parametrize("kind", ["cholesky", "zca", "pca"])
def test_whiten_of_too_few_samples_is_an_error_unless_eps(kind):
    """w samples, centred, span w - 1 dimensions: w = d is one too few, d + 1 is enough."""
    with pytest.raises(ValueError, match="6 samples"):
        wmse.whiten(torch.tensor(randn(6, 6)), kind)
    assert wmse.whiten(torch.tensor(randn(6, 6)), kind, 0.1).isfinite().all()
    enough = torch.tensor(randn(7, 6))
    assert close(wmse.whiten(enough, kind).square().sum(), 6 * 6, 1e-6)
    assert wmse.whiten(enough[:6], "bn").isfinite().all()


@pytest.mark.parametrize("kind", ["cholesky", "zca"])
def test_whiten_of_collapsed_embeddings_is_not_a_number(kind):
    """Equal channels: what comes out must not look like embeddings. eps cures it."""
    z = torch.tensor(np.repeat(np.sign(randn(32, 1)), 16, 1), dtype=torch.float32)
    assert not wmse.whiten(z, kind).isfinite().all()
    assert wmse.whiten(z, kind, 0.1).isfinite().all()


def test_whiten_and_wmse_name_what_is_wrong():
    with pytest.raises(ValueError, match="kind"):
        wmse.whiten(torch.zeros(4, 2), "newton")
    with pytest.raises(ValueError, match="w_size"):
        wmse.wmse_loss(tensors(*embeddings(10, 2)), 4)


@pytest.mark.parametrize("kind", ["cholesky", "zca", "bn"])
def test_two_way_loss_is_two_one_way_losses(kind):
    """A6: grad L = grad L' with L' = L1' + L2', whose value is 2 L."""
    views = embeddings(8, 2)
    loss = lambda one_way: lambda a, b: wmse.wmse_loss([a, b.detach() if one_way else b], 4, 2, kind, 0, generator(3)) + 0 * b.sum()
    value, gradients = value_and_gradients(loss(False), views)
    first, (g1, zero1) = value_and_gradients(loss(True), views)
    second, (g2, zero2) = value_and_gradients(loss(True), views[::-1])
    assert close(first, value, 1e-12) and close(second, value, 1e-12)  # so L' = 2 L
    assert np.abs(zero1).max() == np.abs(zero2).max() == 0 < min(np.abs(g1).max(), np.abs(g2).max())
    assert close(g1, gradients[0], 1e-12) and close(g2, gradients[1], 1e-12)


@pytest.mark.parametrize("spectrum", [(1, 1, 1), (10, 1, 0.1), (1e3, 1, 1), (7, 3, 0.02)])
def test_proposition_1_any_full_rank_spectrum_is_optimal(spectrum):
    """A7: whitened target Q; Z1 = Q R diag(sigma) R^T for any rotation R has loss 0 with ZCA, and no gradient."""
    z2 = embeddings(20, 3)[1]
    target, turn = ref.whiten(z2, "zca"), rotation(3, seed=4)
    z1 = target @ turn @ np.diag(spectrum) @ turn.T
    loss = lambda kind: value_and_gradients(lambda a: wmse.wmse_loss([a, torch.tensor(z2)], 20, 1, kind, 0, generator()), [z1])
    value, (gradient,) = loss("zca")
    assert abs(value) < 1e-12 and np.abs(gradient).max() < 1e-7
    stable_rank = common.collapse_metrics(torch.tensor(z1))["stable_rank"]
    assert abs(stable_rank - sum(spectrum) / max(spectrum)) < 1e-6
    if spectrum != (1, 1, 1):
        assert loss("cholesky")[0] > 1e-3  # the construct is ZCA's


# ---------------------------------------------------------------------------------------------- Shuffled-DBN
@pytest.mark.parametrize("groups,permutation", [(1, None), (1, [2, 0, 3, 1, 5, 4]), (2, None), (2, [4, 0, 3, 1, 5, 2]),
                                                (3, [5, 3, 0, 1, 2, 4]), (6, None)])
def test_decorrelate_value_and_gradient(groups, permutation):
    z, weights = embeddings(9, 6)[0], randn(9, 6, seed=3)
    order = None if permutation is None else torch.tensor(permutation)
    assert close(shuffled_dbn.decorrelate(torch.tensor(z), groups, order), ref.decorrelate(z, groups, permutation), 1e-11)
    ours = lambda a: (shuffled_dbn.decorrelate(a, groups, order) * torch.tensor(weights)).sum()
    want = ref.numeric_gradient(lambda a: float((ref.decorrelate(a, groups, permutation) * weights).sum()), [z])[0]
    assert close(value_and_gradients(ours, [z])[1][0], want, 1e-8)


def test_decorrelate_whitens_inside_groups_and_only_there():
    order = torch.tensor([4, 0, 3, 1, 5, 2])
    white = shuffled_dbn.decorrelate(torch.tensor(embeddings(30, 6)[0]), 2, order)
    covariance = (white.T @ white / 30).numpy()
    group = np.empty(6, dtype=int)
    group[order.numpy()] = np.arange(6) // 3
    together = group[:, None] == group
    assert close(covariance[together], np.eye(6)[together], 1e-10)
    assert np.abs(covariance[~together]).max() > 0.02


def test_shuffled_dbn_draws_by_the_generator_and_is_fixed_without_shuffle():
    views = tensors(*embeddings(12, 6))
    draw = lambda seed, **kw: shuffled_dbn.shuffled_dbn_loss(*views, 2, generator(seed), **kw).item()
    assert draw(1) == draw(1) and len({round(draw(s), 9) for s in range(10)}) > 5
    assert len({draw(s, shuffle=False) for s in range(5)}) == 1
    same = shuffled_dbn.shuffled_dbn_loss(views[0], views[0], 2, shuffle=False)
    assert same == 0 < shuffled_dbn.shuffled_dbn_loss(views[0], views[0], 2, generator(1))


def test_shuffled_dbn_names_what_is_wrong():
    with pytest.raises(ValueError, match="3 channels"):
        shuffled_dbn.decorrelate(torch.tensor(randn(3, 6)), 2)
    assert shuffled_dbn.decorrelate(torch.tensor(randn(4, 6)), 2).isfinite().all()
    with pytest.raises(ValueError, match="groups"):
        shuffled_dbn.decorrelate(torch.zeros(9, 6), 4)


@pytest.mark.parametrize("d,n,groups", [(512, 64, 16), (512, 256, 4), (512, 512, 2), (512, 1024, 1), (512, 4096, 1), (512, 2, 512),
                                        (512, 100, 16), (512, 300, 4), (96, 64, 3), (96, 40, 6), (10, 7, 5), (7, 4, 7), (13, 100, 1)])
def test_automatic_groups(d, n, groups, automatic_groups):
    """ceil(2 d / N), and the next divisor of d where that does not divide it."""
    assert automatic_groups(d, n) == groups


@pytest.fixture
def automatic_groups(monkeypatch):
    """automatic_groups(d, n) -> the number of groups into which decorrelate cuts d channels of n samples by itself."""
    seen = []
    monkeypatch.setattr(shuffled_dbn, "InverseSquareRoot", SimpleNamespace(apply=lambda s: seen.append(len(s)) or s))
    return lambda d, n: shuffled_dbn.decorrelate(torch.zeros(n, d)).shape == (n, d) and seen[-1]


def test_automatic_groups_always_fit(automatic_groups):
    for d, n in itertools.product((2, 3, 8, 30, 97, 512), (2, 3, 10, 64, 1000)):
        groups = automatic_groups(d, n)
        assert d % groups == 0 and min(d, 2 * d / n) <= groups and d // groups < n


# ---------------------------------------------------------------------------------------------- CW-RGP
PERMUTATION12 = [7, 2, 9, 0, 11, 4, 1, 10, 5, 3, 8, 6]


@pytest.mark.parametrize("groups,permutation,eps", [(1, None, 0.0), (1, PERMUTATION12, 0.0), (2, None, 0.0), (3, PERMUTATION12, 0.0),
                                                    (2, PERMUTATION12, 0.1), (6, PERMUTATION12, 0.3)])
def test_channel_whiten_value_and_gradient(groups, permutation, eps):
    z, weights = embeddings(3, 12)[0], randn(3, 12, seed=3)
    order = None if permutation is None else torch.tensor(permutation)
    assert close(cw_rgp.channel_whiten(torch.tensor(z), groups, order, eps), ref.channel_whiten(z, groups, permutation, eps), 1e-11)
    ours = lambda a: (cw_rgp.channel_whiten(a, groups, order, eps) * torch.tensor(weights)).sum()
    want = ref.numeric_gradient(lambda a: float((ref.channel_whiten(a, groups, permutation, eps) * weights).sum()), [z])[0]
    assert close(value_and_gradients(ours, [z])[1][0], want, 2e-8)


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_channel_whiten_rows_are_orthogonal_in_every_group_and_of_length_root_d_minus_g(groups):
    order = torch.tensor(PERMUTATION12)
    y = cw_rgp.channel_whiten(torch.tensor(embeddings(3, 12)[0]), groups, order).numpy()
    assert close((y**2).sum(1), np.full(3, 12 - groups), 1e-10)
    for channels in ref.group_channels(12, groups, order):
        assert close(y[:, channels] @ y[:, channels].T, (12 // groups - 1) * np.eye(3), 1e-10)


def test_channel_whiten_takes_slices_with_permutations_of_their_own():
    z = torch.tensor(np.array([embeddings(3, 12, 2, seed=s) for s in range(2)]))  # [2, 2, 3, 12]
    orders = torch.rand(2, 2, 12, generator=generator()).argsort(-1)
    y = cw_rgp.channel_whiten(z, 3, orders)
    assert all(close(y[i, j], ref.channel_whiten(z[i, j], 3, orders[i, j]), 1e-11) for i, j in np.ndindex(2, 2))


def test_cw_rgp_floor_of_identical_views():
    """Groups of their own leave identical views apart; one group does not."""
    z = torch.tensor(embeddings(6, 16)[0])
    loss = lambda groups: cw_rgp.cw_rgp_loss([z, z.clone()], groups, 3, 2, 0, generator(2)).item()
    assert loss(2) > 0.02 and loss(4) > loss(2)
    assert abs(loss(1)) < 1e-12


def test_cw_rgp_draws_by_the_generator():
    views = tensors(*embeddings(4, 16))
    draw = lambda seed: round(cw_rgp.cw_rgp_loss(views, 2, 4, 1, 0, generator(seed)).item(), 10)
    assert draw(0) == draw(0) and len({draw(seed) for seed in range(12)}) == 12  # one slice: only the groups are random


@pytest.mark.parametrize("groups,w,d", [(4, 9, 32), (1, 12, 12)])
def test_cw_rgp_more_samples_than_channels_is_an_error_unless_eps(groups, w, d):
    """At most d/g samples are uncorrelated over d/g channels; one fewer with one group, whose channels are centred."""
    views = tensors(*embeddings(w, d), dtype=torch.float32)
    with pytest.raises(ValueError, match=f"{w} samples"):
        cw_rgp.cw_rgp_loss(views, groups, w)
    assert cw_rgp.cw_rgp_loss([v[1:].double() for v in views], groups, w - 1).isfinite()
    inputs = [v.clone().requires_grad_() for v in views]
    loss = cw_rgp.cw_rgp_loss(inputs, groups, w, eps=1e-3)
    assert loss.isfinite() and all(g.isfinite().all() for g in torch.autograd.grad(loss, inputs))


def test_cw_rgp_of_one_embedding_for_all_images_is_not_a_number():
    one = torch.tensor(randn(1, 64), dtype=torch.float32).repeat(16, 1)
    assert not cw_rgp.cw_rgp_loss([one, one], 2, 16).isfinite()
    assert cw_rgp.cw_rgp_loss([one, one], 2, 16, eps=0.1).isfinite()


def test_cw_rgp_works_where_batch_whitening_cannot():
    """A9: fewer images than dimensions."""
    views = tensors(*embeddings(4, 32), dtype=torch.float32)
    assert cw_rgp.cw_rgp_loss(views, 2, 4).isfinite()
    with pytest.raises(ValueError, match="32 channels"):
        wmse.wmse_loss(views, 4)


def test_cw_rgp_names_what_is_wrong():
    with pytest.raises(ValueError, match="w_size"):
        cw_rgp.cw_rgp_loss(tensors(*embeddings(10, 8)), 1, 4)
    with pytest.raises(ValueError, match="groups"):
        cw_rgp.channel_whiten(torch.zeros(2, 8), 3)


# ---------------------------------------------------------------------------------------------- BYOL's schedule
def momentum_at(base, progress):
    """tau with which update_target moves a target of 1 towards an online network of 0."""
    model = make(byol.BYOL, momentum=base)
    with torch.no_grad():
        for online, target in zip(online_parameters(model), target_parameters(model), strict=True):
            online.fill_(0)
            target.fill_(1)
    model.update_target(progress)
    taus = torch.cat([target.flatten() for target in target_parameters(model)])
    assert (taus == taus[0]).all()
    return taus[0].item()


def test_momentum_end_points_and_middle():
    for base in (0.0, 0.9, 0.996):
        assert close([momentum_at(base, p) for p in (0, 0.5, 1)], [base, (1 + base) / 2, 1], 1e-12)
        assert all(momentum_at(base, p) <= momentum_at(base, p + 0.1) for p in np.arange(0, 0.95, 0.1))


# ---------------------------------------------------------------------------------------------- models
SMALL = dict(proj_hidden=16, proj_dim=4)
SMALL_OF = {cw_rgp.CWRGP: dict(groups=2, w_size=2)}  # sizes that suit four channels


def backbone():
    """[n, 3, 4, 4] -> [n, 6], with batch statistics, so that it matters which images go through together."""
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 6), nn.BatchNorm1d(6))


def conv_backbone():
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(20, 6))


def make(cls, network=backbone, dtype=torch.float64, **options):
    torch.manual_seed(1)
    args = sys.modules[cls.__module__].Args(**{**SMALL, **SMALL_OF.get(cls, {}), **options})
    return cls(network(), 6, args).to(dtype).train()


def images(n, s=2, seed=0):
    shared = randn(n, 3, 4, 4, seed=seed)
    return tensors(*(shared + randn(n, 3, 4, 4, seed=seed + 1 + i) for i in range(s)))


def agrees(model, views, by_hand, tolerance=1e-10):
    """model(views) and by_hand(copy of the model): the same loss, parameter gradients and buffers. Returns the loss."""
    hand = copy.deepcopy(model)
    torch.manual_seed(3)
    expected = by_hand(hand)
    expected.backward()
    torch.manual_seed(3)
    loss = model(views)
    loss.backward()
    assert close(loss, expected.item(), tolerance)
    for (name, a), b in zip(model.named_parameters(), hand.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        assert a.grad is None or close(a.grad, b.grad, tolerance), name
    for (name, a), b in zip(model.named_buffers(), hand.buffers(), strict=True):
        assert close(a, b, tolerance), name
    return loss.item()


def separately(model, views):
    return [model.projector(model.backbone(x)) for x in views]


def jointly(model, views):
    return model.projector(torch.cat([model.backbone(x) for x in views])).chunk(len(views))


def pairs_of(z):
    return list(itertools.combinations(range(len(z)), 2))


def mean_over_pairs(loss, z):
    return sum(loss(z[i], z[j]) for i, j in pairs_of(z)) / len(pairs_of(z))


VIEWS = pytest.mark.parametrize("s", [2, 4])


@VIEWS
def test_simclr_model(s):
    views = images(8, s)
    loss = lambda a, b: simclr.nt_xent_loss(a, b, 0.2)
    agrees(make(simclr.SimCLR, temperature=0.2), views, lambda m: mean_over_pairs(loss, jointly(m, views)))


def test_simclr_last_norm_scales_but_does_not_shift():
    model = make(simclr.SimCLR, proj_layers=3)
    kinds = [type(layer).__name__ for layer in model.projector]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear", "BatchNorm1d"]
    last = model.projector[-1]
    assert last.weight.requires_grad and not last.bias.requires_grad and not last.bias.any()
    assert all(layer.bias is None for layer in model.projector if isinstance(layer, nn.Linear))


@VIEWS
def test_barlow_model(s):
    views = images(8, s)
    loss = lambda a, b: barlow.barlow_twins_loss(a, b, 0.1)
    agrees(make(barlow.BarlowTwins, lambd=0.1), views, lambda m: mean_over_pairs(loss, separately(m, views)), 1e-9)


@VIEWS
def test_vicreg_model(s):
    views = images(8, s)
    loss = lambda a, b: vicreg.vicreg_loss(a, b, 3.0, 5.0, 7.0)
    model = make(vicreg.VICReg, inv=3.0, var=5.0, cov=7.0)
    agrees(model, views, lambda m: mean_over_pairs(loss, separately(m, views)))


@VIEWS
@pytest.mark.parametrize("options", [dict(), dict(whitening="zca", eps=0.1), dict(w_iter=3)], ids=str)
def test_wmse_model(s, options):
    views = images(16, s)
    names = {"whitening": "kind"}
    hand_options = {names.get(k, k): v for k, v in options.items()}
    agrees(make(wmse.WMSE, w_size=8, **options), views, lambda m: wmse.wmse_loss(jointly(m, views), w_size=8, **hand_options))


@VIEWS
def test_shuffled_dbn_model(s):
    views = images(8, s)
    loss = lambda a, b: shuffled_dbn.shuffled_dbn_loss(a, b, 2, shuffle=False)
    agrees(make(shuffled_dbn.ShuffledDBN, groups=2, no_shuffle=True), views, lambda m: mean_over_pairs(loss, separately(m, views)), 1e-8)


def test_shuffled_dbn_model_shuffles():
    views = images(8)
    agrees(make(shuffled_dbn.ShuffledDBN, groups=2), views, lambda m: shuffled_dbn.shuffled_dbn_loss(*separately(m, views), 2), 1e-8)
    model = make(shuffled_dbn.ShuffledDBN, groups=2)
    assert len({model(views).item() for _ in range(8)}) > 1  # four channels in two groups: three ways a view


@VIEWS
@pytest.mark.parametrize("options", [dict(w_iter=1), dict(w_iter=2), dict(eps=0.1, w_iter=1)], ids=str)
def test_cw_rgp_model(s, options):
    views = images(8, s)
    model = make(cw_rgp.CWRGP, proj_dim=16, groups=2, w_size=4, **options)
    agrees(model, views, lambda m: cw_rgp.cw_rgp_loss(jointly(m, views), groups=2, w_size=4, **options), 1e-9)


@pytest.mark.parametrize("cls", [wmse.WMSE, cw_rgp.CWRGP, shuffled_dbn.ShuffledDBN, vicreg.VICReg, barlow.BarlowTwins])
def test_plain_projectors(cls):
    """Linear, batch norm, ReLU, ..., linear: nothing after the last."""
    projector = make(cls, proj_layers=3).projector
    assert [type(layer).__name__ for layer in projector] == ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear"]
    assert all(layer.bias is None for layer in projector[:-1] if isinstance(layer, nn.Linear))  # the batch norm has one
    assert (projector[-1].bias is None) == (cls.__name__ in ("BarlowTwins", "VICReg"))
    assert [type(layer).__name__ for layer in make(cls, proj_layers=1).projector] == ["Linear"]


# ---- SimSiam
def simsiam_by_hand(views, stop=True):
    def by_hand(m):
        z = separately(m, views)
        p = [m.predictor(v) for v in z]
        target = [v.detach() for v in z] if stop else z
        one = [simsiam.negative_cosine(p[i], target[j]) for i, j in pairs_of(z)]
        other = [simsiam.negative_cosine(p[j], target[i]) for i, j in pairs_of(z)]
        return sum((a + b) / 2 for a, b in zip(one, other)) / len(one)
    return by_hand


@VIEWS
@pytest.mark.parametrize("options,hand", [
    (dict(), dict()), (dict(no_stop_gradient=True), dict(stop=False)), (dict(predictor="none"), dict())], ids=str)
def test_simsiam_model(s, options, hand):
    views = images(8, s)
    agrees(make(simsiam.SimSiam, pred_hidden=5, **options), views, simsiam_by_hand(views, **hand), 1e-9)


def head_structure(head):
    """"L": linear without bias, "Lb": with bias, "N": norm, "Na": affine norm, "R": ReLU."""
    names = {nn.Linear: lambda m: "Lb" if m.bias is not None else "L", nn.BatchNorm1d: lambda m: "Na" if m.affine else "N",
             nn.ReLU: lambda m: "R"}
    return " ".join(names[type(m)](m) for m in head)


def test_simsiam_norms_of_the_heads():
    model = make(simsiam.SimSiam, pred_hidden=5)
    assert head_structure(model.projector) == "L Na R L N" and head_structure(model.predictor) == "L Na R Lb"
    widths = [(m.in_features, m.out_features) for m in [*model.projector, *model.predictor] if isinstance(m, nn.Linear)]
    assert widths == [(6, 16), (16, 4), (4, 5), (5, 4)]


def test_simsiam_without_a_predictor():
    assert not list(make(simsiam.SimSiam, predictor="none").predictor.parameters())
    assert all(p.requires_grad for p in make(simsiam.SimSiam).parameters())


def test_simsiam_predictor_rate():
    model = make(simsiam.SimSiam, pred_hidden=5)
    args = SimpleNamespace(lr=0.1, lr_bias=0.1, weight_decay=0.0, optimizer="sgd")
    constant = {id(p) for group in common.build_optimizer(model, args).param_groups if group["constant"] for p in group["params"]}
    assert constant == {id(p) for p in model.predictor.parameters()}


# ---- BYOL
def byol_by_hand(views):
    def by_hand(m):
        z = separately(m, views)
        p = [m.predictor(v) for v in z]
        with torch.no_grad():
            target = [m.target_projector(m.target_backbone(x)) for x in views]
        return sum(byol.byol_loss(p[i], target[j]) + byol.byol_loss(p[j], target[i]) for i, j in pairs_of(z)) / len(pairs_of(z))
    return by_hand


def apart(model, targets):
    """Move the slow network away from the fast one, so that they cannot be mistaken for each other."""
    with torch.no_grad():
        for i, p in enumerate(targets(model)):
            p.add_(0.3 * torch.tensor(randn(*p.shape, seed=i)).to(p.dtype))
    return model


def target_parameters(m):
    return [*m.target_backbone.parameters(), *m.target_projector.parameters()]


def online_parameters(m):
    return [*m.backbone.parameters(), *m.projector.parameters()]


@VIEWS
@pytest.mark.parametrize("options", [dict(), dict(predictor="none")], ids=str)
def test_byol_model(s, options):
    views = images(8, s)
    model = apart(make(byol.BYOL, **options), target_parameters)
    agrees(model, views, byol_by_hand(views), 1e-9)
    assert all(p.grad is None and not p.requires_grad for p in target_parameters(model))


@pytest.mark.parametrize("predictor,structure", [("mlp", ["Linear", "BatchNorm1d", "ReLU", "Linear"]), ("none", ["Identity"])])
def test_byol_predictors(predictor, structure):
    model = make(byol.BYOL, predictor=predictor)
    layers = [m for m in model.predictor.modules() if not list(m.children())]
    assert [type(m).__name__ for m in layers] == structure
    assert getattr(layers[-1], "bias", None) is None
    assert [type(m).__name__ for m in model.projector] == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert model.projector[0].bias is None and model.projector[-1].bias is None  # the batch norm between them has one


@pytest.mark.parametrize("progress", [0.0, 0.4, 1.0])
def test_byol_target_update_is_exact(progress):
    model = apart(make(byol.BYOL, momentum=0.7), target_parameters)
    before = [p.clone() for p in target_parameters(model)]
    tau = ref.byol_momentum(0.7, progress)
    model.update_target(progress)
    for old, theta, new in zip(before, online_parameters(model), target_parameters(model), strict=True):
        assert close(new, (tau * old + (1 - tau) * theta).detach(), 1e-12)


def test_byol_target_starts_as_a_copy_and_forward_does_not_move_it():
    model = make(byol.BYOL)
    start = [p.clone() for p in target_parameters(model)]
    assert all(torch.equal(a, b) and a.data_ptr() != b.data_ptr() for a, b in zip(online_parameters(model), target_parameters(model)))
    model(images(8))
    assert all(torch.equal(a, b) for a, b in zip(start, target_parameters(model)))


# ---- MoCo
def make_moco(network=backbone, **options):
    model = make(moco.MoCo, network, **{**dict(queue_size=16, momentum=0.6, temperature=0.2, bn_splits=1), **options})
    return apart(model, target_parameters)


def moco_by_hand(views):
    """Query forward, EMA, keys, logits with the old queue, then the keys into the queue."""
    def by_hand(m):
        q = {i: m.projector(m.backbone(views[i])) for i in range(len(views) - 1)}
        with torch.no_grad():
            for k, p in zip(target_parameters(m), online_parameters(m), strict=True):
                k.copy_(0.6 * k + 0.4 * p)
            keys = {j: F.normalize(m.target_projector(m.target_backbone(views[j])), dim=1) for j in range(1, len(views))}
        queue, n = m.queue.clone(), len(views[0])
        pairs = pairs_of(views)
        loss = sum(moco.info_nce_loss(q[i], keys[j], queue, 0.2) for i, j in pairs) / len(pairs)
        m.queue[:-n * len(keys)] = queue[n * len(keys):]  # the oldest leave, at the front
        m.queue[-n * len(keys):] = torch.cat([keys[j] for j in sorted(keys)])
        return loss
    return by_hand


@pytest.mark.parametrize("s", [2, 3, 4])
def test_moco_model(s):
    views = images(4, s)
    model = make_moco()
    agrees(model, views, moco_by_hand(views), 1e-6)
    assert all(p.grad is None and not p.requires_grad for p in target_parameters(model)) and not model.queue.requires_grad


@pytest.mark.parametrize("s,size", [(2, 12), (2, 4), (2, 10), (2, 5), (2, 3), (2, 1), (3, 24), (3, 20), (3, 11), (3, 8), (3, 7), (4, 1)])
def test_moco_queue_holds_the_newest_keys_in_order(s, size):
    """First in, first out, oldest first: also where the keys of a step do not divide the queue, or are more than it holds."""
    model, views = make_moco(queue_size=size), images(4, s)
    history, keys = [model.queue.clone()], model.keys
    model.keys = lambda x: history.append(keys(x)) or history[-1]
    for step in range(1, 8):
        model(views)
        assert len(history) == 1 + step * (s - 1)  # one row of keys for every view but the first
        assert torch.equal(model.queue, torch.cat(history)[-size:]) and model.queue.shape == (size, 4)
        assert torch.equal(model.state_dict()["queue"], model.queue)
        views = [v + 0.1 for v in views]


@pytest.mark.parametrize("size", [1, 3, 4, 10])
def test_moco_negatives_are_the_queue_before_the_step(size):
    """Whatever its size: a query never meets its own key as a negative."""
    model, views = make_moco(queue_size=size), images(4)
    for _ in range(3):
        agrees(copy.deepcopy(model), views, lambda m: moco_loss_by_hand(m, views, model.queue.clone()), 1e-6)
        model(views)


def moco_loss_by_hand(m, views, queue):
    q = m.projector(m.backbone(views[0]))
    m.update_target()
    k = F.normalize(m.target_projector(m.target_backbone(views[1])).detach(), dim=1)
    m.queue = torch.cat([queue, k])[len(k):]
    return moco.info_nce_loss(q, k, queue, 0.2)


def test_moco_queue_starts_with_unit_rows_and_is_saved():
    model = make(moco.MoCo, queue_size=64)
    assert close(model.queue.norm(dim=1), np.ones(64), 1e-6) and model.queue.mean(0).abs().max() < 0.4
    assert "queue" in model.state_dict()


def test_moco_keys_keep_the_models_precision():
    model, x = make_moco(), images(4)[0]
    assert close(model.keys(x), unit(copy.deepcopy(model.target_projector)(copy.deepcopy(model.target_backbone)(x)).detach().numpy()), 1e-12)


@pytest.mark.parametrize("splits,changes", [(1, False), (2, True)])
def test_moco_shuffling_returns_the_keys_in_order(splits, changes):
    """One batch norm over all: the order is void and the keys come back in place. Parts of the batch: other parts, other keys."""
    x = images(8)[0]
    model = make_moco(conv_backbone, bn_splits=splits)
    hand = copy.deepcopy(model)
    torch.manual_seed(0)
    keys = [F.normalize(hand.target_projector(hand.target_backbone(x)), dim=1).detach(), model.keys(x)]  # as they come; shuffled
    difference = (keys[0] - keys[1]).abs().max()
    assert (difference > 1e-3) if changes else (difference < 1e-6)
    similarity = keys[0] @ keys[1].T
    assert similarity.diagonal().mean() > similarity.mean() + 0.2  # each key is its own image's, shuffled or not


def test_moco_shuffled_split_keys_by_hand():
    x = images(8)[0]
    model = make_moco(conv_backbone, bn_splits=2)
    hand = copy.deepcopy(model)
    torch.manual_seed(6)
    keys = model.keys(x)
    torch.manual_seed(6)
    order = torch.randperm(8)
    want = torch.empty(8, 4).double()
    for part in order.chunk(2):  # each half with a batch norm of its own
        network = copy.deepcopy(hand.target_backbone)
        network[1] = nn.BatchNorm2d(5).double()
        network[1].load_state_dict(hand.target_backbone[1].state_dict())
        want[part] = F.normalize(hand.target_projector(network(x[part])), dim=1).detach()
    assert close(keys, want, 1e-6)


def test_moco_head_has_no_norm():
    head = make_moco(proj_layers=2).projector
    assert [type(m).__name__ for m in head] == ["Linear", "Identity", "ReLU", "Linear"]
    assert head[0].bias is not None and head[-1].bias is not None
    assert [type(m).__name__ for m in make_moco().projector] == ["Linear"] and make_moco().projector[0].bias is not None


# ---- split batch norm
def trained_norm(width=5):
    norm = nn.BatchNorm2d(width, eps=1e-3, momentum=0.3).double()
    with torch.no_grad():
        for i, tensor in enumerate((norm.weight, norm.bias, norm.running_mean)):
            tensor.copy_(torch.tensor(randn(width, seed=i)))
        norm.running_var.copy_(torch.tensor(np.exp(randn(width, seed=3))))
    return norm


def split_norm(norm, splits):
    network = nn.Sequential(copy.deepcopy(norm))
    return moco.MoCo(network, 6, moco.Args(bn_splits=splits)).backbone[0]


@pytest.mark.parametrize("splits", [2, 4])
def test_split_batch_norm_is_one_batch_norm_per_part(splits):
    norm, x = trained_norm(), torch.tensor(randn(8, 5, 3, 3) + np.arange(8).reshape(8, 1, 1, 1))
    split, parts = split_norm(norm, splits), [copy.deepcopy(norm) for _ in range(splits)]
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    weights = torch.tensor(randn(8, 5, 3, 3, seed=1))
    out, want = split(mine), torch.cat([part(piece) for part, piece in zip(parts, theirs.chunk(splits))])
    assert close(out, want, 1e-12) and not close(out, copy.deepcopy(norm)(x), 1e-2)
    (out * weights).sum().backward()
    (want * weights).sum().backward()
    assert close(mine.grad, theirs.grad, 1e-12)
    assert close(split.weight.grad, sum(part.weight.grad for part in parts), 1e-12)
    assert close(split.bias.grad, sum(part.bias.grad for part in parts), 1e-12)
    assert close(split.running_mean, torch.stack([part.running_mean for part in parts]).mean(0), 1e-12)
    assert close(split.running_var, torch.stack([part.running_var for part in parts]).mean(0), 1e-12)
    assert int(split.num_batches_tracked) == 1


def test_split_batch_norm_evaluates_as_before():
    norm, x = trained_norm().eval(), torch.tensor(randn(7, 5, 3, 3))
    split = split_norm(norm, 4).eval()
    assert close(split(x), norm(x), 1e-14)
    assert all(torch.equal(a, b) for a, b in zip(split.state_dict().values(), norm.state_dict().values(), strict=True))


def test_split_batch_norm_keeps_what_the_layer_was():
    plain = nn.BatchNorm2d(5, eps=1e-3, momentum=0.3, affine=False)
    plain_split = split_norm(plain, 2)
    assert (plain_split.eps, plain_split.momentum, plain_split.affine, plain_split.splits) == (1e-3, 0.3, False, 2)
    assert split_norm(trained_norm(), 2).weight.dtype == torch.float64


def test_split_batch_norm_takes_channels_last():
    norm, x = trained_norm(), torch.tensor(randn(8, 5, 3, 3))
    last = x.contiguous(memory_format=torch.channels_last)
    out = split_norm(norm, 2)(last)
    assert close(out, split_norm(norm, 2)(x), 1e-12) and out.is_contiguous(memory_format=torch.channels_last)


def test_split_batch_norm_reaches_every_layer_and_keeps_the_names():
    network, _ = common.build_backbone("resnet18", 32)
    names = list(network.state_dict())
    moco.MoCo(network, 512, moco.Args(bn_splits=4))
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 20 and all(type(m) is moco.SplitBatchNorm and m.splits == 4 for m in norms)
    assert list(network.state_dict()) == names


def test_moco_splits_query_and_key_encoder_alike():
    model = make(moco.MoCo, conv_backbone, queue_size=16, bn_splits=2)
    assert all(isinstance(b[1], moco.SplitBatchNorm) for b in (model.backbone, model.target_backbone))
    assert not isinstance(make(moco.MoCo, conv_backbone, queue_size=16, bn_splits=1).backbone[1], moco.SplitBatchNorm)


# ---- all nine
MODELS = {
    "simclr": (simclr.SimCLR, dict()), "moco": (moco.MoCo, dict(queue_size=32)),
    "byol": (byol.BYOL, dict()), "byol_none": (byol.BYOL, dict(predictor="none")), "simsiam": (simsiam.SimSiam, dict(pred_hidden=5)),
    "barlow": (barlow.BarlowTwins, dict()), "vicreg": (vicreg.VICReg, dict()), "wmse": (wmse.WMSE, dict(w_size=8)),
    "wmse_zca": (wmse.WMSE, dict(w_size=8, whitening="zca")), "shuffled_dbn": (shuffled_dbn.ShuffledDBN, dict(groups=2)),
    "cw_rgp": (cw_rgp.CWRGP, dict(proj_dim=32, groups=2, w_size=8)),
}


def float_images(n):
    return [x.float() for x in images(n)]


@pytest.mark.parametrize("name", MODELS)
def test_model_under_autocast_returns_a_float32_loss(name):
    """bf16 up to the embeddings, the loss in float32: near the loss of the float32 model, finite gradients everywhere."""
    cls, options = MODELS[name]
    plain, mixed = (make(cls, conv_backbone, torch.float32, **options) for _ in range(2))
    torch.manual_seed(2)
    exact = plain(float_images(16))
    torch.manual_seed(2)
    with torch.autocast("cpu", torch.bfloat16):
        loss = mixed(float_images(16))
    loss.backward()
    assert loss.dtype == torch.float32 and close(loss, exact.item(), 0.1) and loss.item() != exact.item()
    wanted = [p for p in mixed.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in wanted)


@pytest.mark.parametrize("name", MODELS)
def test_every_trainable_parameter_gets_a_gradient(name):
    cls, options = MODELS[name]
    model = make(cls, **options)
    loss = model(images(16))
    loss.backward()
    assert loss.dim() == 0
    for parameter_name, p in model.named_parameters():
        assert not p.requires_grad or (p.grad is not None and p.grad.isfinite().all()), parameter_name
    assert all(p.grad.abs().max() > 0 for p in model.backbone.parameters() if p.dim() > 1)


@pytest.mark.parametrize("name", MODELS)
def test_model_has_a_backbone_and_a_projector_that_give_h_and_z(name):
    cls, options = MODELS[name]
    model = make(cls, **options).eval()
    h = model.backbone(images(4)[0])
    assert h.shape == (4, 6) and model.projector(h).shape == (4, options.get("proj_dim", 4))


# ---------------------------------------------------------------------------------------------- size rules
BAD_SIZES = [
    (wmse, "--batch-size 100 --w-size 64"), (wmse, "--batch-size 64 --w-size 64 --proj-dim 64"), (wmse, "--batch-size 33 --w-size 3"),
    (wmse, "--batch-size 64 --w-size 16 --proj-dim 16 --whitening zca"), (cw_rgp, "--groups 3"), (cw_rgp, "--batch-size 100 --w-size 64"),
    (cw_rgp, "--batch-size 256 --w-size 256"), (cw_rgp, "--groups 1 --proj-dim 64 --w-size 64"),
    (cw_rgp, "--batch-size 25 --w-size 25 --proj-dim 16"), (cw_rgp, "--proj-dim 2"), (cw_rgp, "--groups 512 --eps 0.001"), (wmse, "--batch-size 64"),
    (shuffled_dbn, "--groups 7"), (shuffled_dbn, "--groups 1"), (shuffled_dbn, "--groups 1 --batch-size 4 --proj-dim 30"),
    (moco, "--batch-size 100 --queue-size 4000"), (moco, "--bn-splits 3"), (moco, "--bn-splits 256"), (moco, "--batch-size 257"),
]
GOOD_SIZES = [
    (wmse, "--w-size 16 --proj-dim 64 --whitening bn"), (wmse, "--w-size 64 --eps 0.01"), (wmse, "--w-size 256 --proj-dim 255"),
    (cw_rgp, "--w-size 128 --groups 4"), (cw_rgp, "--w-size 256 --eps 0.001"), (cw_rgp, "--groups 1 --proj-dim 65"),
    (shuffled_dbn, "--groups 0 --proj-dim 96"), (moco, "--views 3 --queue-size 512"),
    (moco, "--bn-splits 1 --batch-size 100 --queue-size 200"),
    (moco, "--queue-size 1000"), (moco, "--queue-size 128"), (moco, "--views 3 --queue-size 4096"),
]


@pytest.mark.parametrize("module,line", BAD_SIZES, ids=lambda x: getattr(x, "__name__", x))
def test_size_rule_names_a_flag_and_values_that_work(module, line):
    """Following the advice, at most three times over, leads to sizes that are accepted; so does every alternative offered."""
    def advice(argv):
        with pytest.raises(common.UserError, match="--.*; try --") as error:
            module.parse_args(argv)
        return [option.split() for option in str(error.value).split("; try ")[1].split(" or ")]

    def leads_somewhere(argv, patience):
        try:
            module.parse_args(argv)
            return True
        except common.UserError:
            return patience > 0 and all(leads_somewhere(argv + option, patience - 1) for option in advice(argv))
    argv = line.split()
    assert all(leads_somewhere(argv + option, 2) for option in advice(argv))


@pytest.mark.parametrize("module,line", GOOD_SIZES, ids=lambda x: getattr(x, "__name__", x))
def test_size_rule_lets_sizes_pass_that_work(module, line):
    module.parse_args(line.split())


@pytest.mark.parametrize("options,groups", [(dict(), 2), (dict(groups=0), 2), (dict(groups=4), 4)], ids=str)
def test_shuffled_dbn_automatic_groups_are_those_of_the_batch(options, groups):
    views = images(8)
    assert shuffled_dbn.parse_args(["--batch-size", "64"]).groups == 0
    assert shuffled_dbn.parse_args(["--batch-size", "64", "--groups", "32"]).groups == 32
    agrees(make(shuffled_dbn.ShuffledDBN, proj_dim=8, **options), views,
           lambda m: shuffled_dbn.shuffled_dbn_loss(*separately(m, views), groups), 1e-8)
