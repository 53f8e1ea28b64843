"""Every experiment: value and gradient against the slow float64 references, what it changes and what
it leaves alone, the lines that --show prints, and that it trains, is named and resumes as itself."""

import ast
import copy
import csv
import difflib
import inspect
import itertools
import math
from types import SimpleNamespace

import barlow
import byol
import cw_rgp
import experiments
import moco
import numpy as np
import pytest
import reference as ref
import simclr
import simsiam
import torch
import torch.nn.functional as F
import vicreg
import wmse
from conftest import METHODS, ROOT, SMALL_OF, is_one_line_error, run_here, run_script
from torch import nn

import common

NAMES = list(experiments.EXPERIMENTS)
MUST_HAVE = {
    "simclr": "stop-gradient",
    "moco": "symmetric no-shuffle",
    "byol": "linear-predictor direct-predictor group-norm",
    "simsiam": "fixed-predictor decayed-predictor-lr softmax-similarity asymmetric "
    "head-norm-none head-norm-hidden head-norm-all",
    "barlow": "l2",
    "vicreg": "paper-scaling",
    "wmse": "one-way",
    "cw_rgp": "shared-permutation fixed-permutation detached-whitening",
}


# ---------------------------------------------------------------------- helpers
def randn(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def embeddings(n, d, s=2, seed=0):
    """s views [n, d] of the same images: alike but not equal, correlated channels, not centred."""
    shared, mix = randn(n, d, seed=seed), np.eye(d) + 0.3 * randn(d, d, seed=seed + 1)
    return [(shared + 0.5 * randn(n, d, seed=seed + 10 + i)) @ mix + 0.3 for i in range(s)]


def tensors(*arrays, dtype=torch.float64):
    return [torch.tensor(np.asarray(a), dtype=dtype) for a in arrays]


def leaves(*arrays, dtype=torch.float64):
    return [a.requires_grad_() for a in tensors(*arrays, dtype=dtype)]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def value_and_gradients(f, arrays, dtype=torch.float64):
    """A view without gradient has a gradient of zeros."""
    inputs = leaves(*arrays, dtype=dtype)
    loss = f(*inputs)
    gradients = torch.autograd.grad(loss, inputs, allow_unused=True)
    return loss.item(), [np.zeros_like(a) if g is None else g.double().numpy() for a, g in
                         zip(arrays, gradients)]


def close(a, b, tolerance):
    """Largest difference, relative to the largest entry of b (or to 1)."""
    a, b = (x.detach() if isinstance(x, torch.Tensor) else x for x in (a, b))
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    near = a.shape == b.shape and np.abs(a - b).max() <= tolerance * max(1.0, np.abs(b).max())
    return bool(np.isfinite(a).all() and near)


def unit(z):
    return ref.unit_rows(z)


def rows_of_length_root_d(z):
    return unit(z) * math.sqrt(np.shape(z)[1])


def symmetric(eigenvalues, seed=0):
    turn = np.linalg.qr(randn(len(eigenvalues), len(eigenvalues), seed=seed))[0]
    return turn @ np.diag(eigenvalues) @ turn.T


def pairs_of(views):
    return list(itertools.combinations(range(len(views)), 2))


def mean_over_pairs(loss, z):
    return sum(loss(z[i], z[j]) for i, j in pairs_of(z)) / len(pairs_of(z))


SIZES = dict(batch_size=16, proj_hidden=16, proj_dim=4)
OWN_SIZES = {
    "moco": dict(queue_size=16, momentum=0.6, temperature=0.2, bn_splits=1),
    "simsiam": dict(pred_hidden=5),
    "wmse": dict(w_size=8),
    "cw_rgp": dict(proj_dim=16, groups=2, w_size=4, w_iter=1),
    "byol/group-norm": dict(proj_hidden=64),
}


def backbone():
    """[n, 3, 4, 4] -> [n, 6]; its batch norm tells which images went through together."""
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 6), nn.BatchNorm1d(6))


def conv_backbone():
    convolution = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU())
    return nn.Sequential(*convolution, nn.Flatten(), nn.Linear(20, 6))


def targets(model):
    return [*model.target_backbone.parameters(), *model.target_projector.parameters()]


def online(model):
    return [*model.backbone.parameters(), *model.projector.parameters()]


def make(name, network=backbone, dtype=torch.float64, features=6, **flags):
    """The model of an experiment, small. A target network is moved away from the online one."""
    torch.manual_seed(1)
    experiment, method = experiments.find(name), name.split("/")[0]
    sizes = {**SIZES, **OWN_SIZES.get(method, {}), **OWN_SIZES.get(name, {}), **flags}
    model = experiment.model(network(), features, experiment.Args(**sizes)).to(dtype).train()
    if method in ("moco", "byol"):
        with torch.no_grad():
            for i, p in enumerate(targets(model)):
                p.add_(0.3 * torch.tensor(randn(*p.shape, seed=i)).to(p.dtype))
    return model


def images(n, s=2, seed=0):
    shared = randn(n, 3, 4, 4, seed=seed)
    return tensors(*(shared + randn(n, 3, 4, 4, seed=seed + 1 + i) for i in range(s)))


# ---------------------------------------------------------------------- references
# A book is the loss in numpy, of (live, frozen): the views twice, with and without gradient.
def head(layers, x):
    """Linear layers, norms and ReLU in numpy, batch statistics: [n, inputs] -> [n, outputs]."""
    for layer in layers if isinstance(layers, nn.Sequential) else [layers]:
        weight, bias = (getattr(layer, name, None) for name in ("weight", "bias"))
        weight, bias = (None if t is None else t.detach().double().numpy() for t in (weight, bias))
        if isinstance(layer, nn.Linear):
            x = x @ weight.T
        elif isinstance(layer, nn.BatchNorm1d):
            x = (x - x.mean(0)) / np.sqrt(x.var(0) + layer.eps)
            x = x if weight is None else x * weight
        elif isinstance(layer, nn.GroupNorm):
            groups = x.reshape(len(x), layer.num_groups, -1)
            mean, variance = groups.mean(2, keepdims=True), groups.var(2, keepdims=True)
            x = ((groups - mean) / np.sqrt(variance + layer.eps)).reshape(x.shape) * weight
        elif isinstance(layer, nn.ReLU):
            x = np.maximum(x, 0)
        else:
            assert isinstance(layer, (nn.Identity, nn.Flatten)), layer
        x = x if bias is None else x + bias
    return x


def softmax_book(p, z):
    """SimSiam section 4.5: -sum softmax(z) log softmax(p), the mean over rows."""
    total = 0.0
    for a, b in zip(p, z):
        norm_a, norm_b = ref.log_sum_exp(a), ref.log_sum_exp(b)
        total -= sum(math.exp(b[j] - norm_b) * (a[j] - norm_a) for j in range(len(a)))
    return total / len(p)


def anchor_book(z1, z2, t1, t2, temperature):
    """NT-Xent of anchors z with targets t."""
    z, t = unit(np.concatenate([z1, z2])), unit(np.concatenate([t1, t2]))
    n, total = len(z1), 0.0
    for i in range(2 * n):
        others = [ref.dot(z[i], t[k]) / temperature for k in range(2 * n) if k != i]
        total += ref.log_sum_exp(others) - ref.dot(z[i], t[(i + n) % (2 * n)]) / temperature
    return total / (2 * n)


def detached_book(live, frozen, groups, permutation, eps=0.0):
    """channel_whiten with the matrix of `frozen`, both [w, d]."""
    x, constant = (z - z.mean(1, keepdims=True) for z in (live, frozen))
    out = np.zeros_like(x)
    for channels in ref.group_channels(x.shape[1], groups, permutation):
        s = constant[:, channels] @ constant[:, channels].T / (len(channels) - 1)
        out[:, channels] = ref.inverse_root(ref.shrink(s, eps)) @ x[:, channels]
    return out


def replay_cw(s, n, d, w, rounds, seed, mode):
    """(partitions[round][slice], permutations[round][view][slice]) that the losses draw."""
    g = generator(seed)
    partitions = torch.rand(rounds, n, generator=g).argsort(-1).numpy().reshape(rounds, -1, w)
    if mode == "fixed":
        return partitions, [[[None] * (n // w)] * s] * rounds
    sets = 1 if mode == "shared" else s
    channels = torch.rand(sets, rounds * n // w, d, generator=g).argsort(-1).numpy()
    channels = np.broadcast_to(channels, (s, *channels.shape[1:])).reshape(s, rounds, n // w, d)
    return partitions, channels.swapaxes(0, 1)


def detached_cw_book(live, frozen, partitions, permutations, groups, eps=0.0):
    """ref.cw_rgp with the matrices of `frozen`."""
    rounds = []
    for r, slices in enumerate(partitions):
        white = [np.zeros_like(v) for v in live]
        for v, s in itertools.product(range(len(live)), range(len(slices))):
            index = slices[s]
            part = live[v][index], frozen[v][index], groups, permutations[r][v][s]
            white[v][index] = detached_book(*part, eps)
        rounds.append(ref.mean_pair_distance(white))
    return sum(rounds) / len(rounds)


def numeric_gradient(book, arrays):
    """Of the live views; the frozen ones stay."""
    return ref.numeric_gradient(lambda *live: book(list(live), arrays), arrays)


# ---------------------------------------------------------------------- one case per experiment
class Case:
    """An experiment's `forward` as a function of its input, without or with its heads.

    bare: H and Z are the input itself. Otherwise the input is H."""

    def __init__(self, name, book, arrays, bare=False, network=nn.Identity, **flags):
        d = arrays[0].shape[1] if bare else 6
        self.model = make(name, network, features=d, **({"proj_dim": d} if bare else {}), **flags)
        self.arrays, self.bare, model = arrays, bare, copy.deepcopy(self.model)
        self.book = lambda live, frozen: book(model, live, frozen)
        if bare:
            self.model.projector = nn.Identity()

    def ours(self, *views):
        model = copy.deepcopy(self.model)
        torch.manual_seed(1)
        return model.to(torch.promote_types(views[0].dtype, torch.float32))(list(views))


def simsiam_case(name, distance=ref.negative_cosine, both=True, s=2, **flags):
    def book(m, live, frozen):
        z = [head(m.projector, v) for v in frozen]
        p = [head(m.predictor, head(m.projector, v)) for v in live]
        z = [head(m.projector, v) for v in live] if m.args.no_stop_gradient else z
        one = [distance(p[i], z[j]) for i, j in pairs_of(z)]
        other = [distance(p[j], z[i]) for i, j in pairs_of(z)]
        losses = [(a + b) / 2 if both else a for a, b in zip(one, other)]
        return sum(losses) / len(losses)
    return Case(f"simsiam/{name}", book, embeddings(5, 6, s), **flags)


def byol_case(name, s=2, weight=None, **flags):
    def book(m, live, frozen):
        t = [head(m.target_projector, v) for v in frozen]
        p = [head(m.projector, v) for v in live]
        w = weight([head(m.projector, v) for v in frozen]) if weight else None
        p = [head(m.predictor, v) if w is None else v @ w for v in p]
        return mean_over_pairs(lambda i, j: ref.byol(p[i], t[j]) + ref.byol(p[j], t[i]),
                               list(range(s)))
    return Case(f"byol/{name}", book, embeddings(5, 6, s), **flags)


def direct_weight(z):
    """F = 0.3 I + 0.7 z^T z / (s N), W = U diag(sqrt(s / max s) + 0.1) U^T."""
    rows = np.concatenate(z)
    f = 0.3 * np.eye(4) + 0.7 * ref.second_moment(rows, len(rows))
    values, u = np.linalg.eigh(f)
    return sum((math.sqrt(values[k] / max(values)) + 0.1) * np.outer(u[:, k], u[:, k])
               for k in range(4))


def moco_parameters(m):
    """The target after its move, and the queue, as numpy: (W, b, queue)."""
    with torch.no_grad():
        weight, bias = (0.6 * t + 0.4 * p for t, p in zip(targets(m)[-2:], online(m)[-2:]))
    return weight.numpy(), bias.numpy(), m.queue.double().numpy()


def symmetric_case(s):
    def book(m, live, frozen):
        weight, bias, queue = moco_parameters(m)
        q = [head(m.projector, v.reshape(4, 6)) for v in live]
        k = [v.reshape(4, 6) @ weight.T + bias for v in frozen]
        both = itertools.permutations(range(s), 2)
        losses = [ref.info_nce(q[i], k[j], queue, 0.2) for i, j in both]
        return sum(losses) / len(pairs_of(live))
    arrays = [v.reshape(4, 3, 2, 1) for v in embeddings(4, 6, s)]
    return Case("moco/symmetric", book, arrays, network=nn.Flatten)


def norm_then_flat():
    return nn.Sequential(nn.BatchNorm2d(3), nn.Flatten())


def no_shuffle_case():
    """Images [8, 3, 2, 1], normalised in halves: queries and keys in the same halves."""
    def halves(x):
        parts = []
        for part in np.split(x, 2):
            mean, variance = (f((0, 2, 3), keepdims=True) for f in (part.mean, part.var))
            parts.append((part - mean) / np.sqrt(variance + 1e-5))
        return np.concatenate(parts).reshape(8, 6)

    def norm(m, x, gain, shift):
        return x * np.repeat(gain.numpy(), 2) + np.repeat(shift.numpy(), 2)

    def book(m, live, frozen):
        weight, bias, queue = moco_parameters(m)
        with torch.no_grad():
            gain, shift = (0.6 * t + 0.4 * p for t, p in zip(targets(m)[:2], online(m)[:2]))
        q = head(m.projector, halves(live[0]))  # the online norm is new: gain 1, shift 0
        k = norm(m, halves(frozen[1]), gain, shift) @ weight.T + bias
        return ref.info_nce(q, k, queue, 0.2)
    arrays = [randn(8, 3, 2, 1, seed=i) + np.arange(8).reshape(8, 1, 1, 1) for i in range(2)]
    return Case("moco/no-shuffle", book, arrays, network=norm_then_flat, bn_splits=2)


def stop_gradient_case(s=2, temperature=0.5):
    def book(m, live, frozen):
        losses = [anchor_book(live[i], live[j], frozen[i], frozen[j], temperature)
                  for i, j in pairs_of(live)]
        return sum(losses) / len(losses)
    arrays = embeddings(5, 4, s)
    return Case("simclr/stop-gradient", book, arrays, bare=True, temperature=temperature)


def barlow_case(s=2, lambd=0.5):
    def book(m, live, frozen):
        z = [rows_of_length_root_d(v) for v in live]
        return mean_over_pairs(lambda a, b: ref.barlow_from_standardised(a, b, lambd), z)
    return Case("barlow/l2", book, embeddings(6, 4, s), bare=True, lambd=lambd)


def vicreg_case(*weights, s=2):
    def book(m, live, frozen):
        return mean_over_pairs(lambda a, b: ref.vicreg(a, b, *weights, official=False), live)
    arrays = [0.6 * z for z in embeddings(6, 4, s)]
    flags = dict(zip(("inv", "var", "cov"), weights))
    return Case("vicreg/paper-scaling", book, arrays, bare=True, **flags)


def one_way_case(kind="cholesky", w=9, rounds=1, s=2, eps=0.0):
    n = 9 if w == 9 else 2 * w

    def book(m, live, frozen):
        g, losses = generator(1), []
        for i, j in pairs_of(live):  # each pair draws its own partition
            orders = torch.rand(rounds, n, generator=g).argsort(-1).numpy()
            partition = [order.reshape(-1, w) for order in orders]
            losses.append(ref.wmse([live[i], frozen[j]], partition, kind, eps))
        return sum(losses) / len(losses)
    flags = dict(whitening=kind, w_size=w, w_iter=rounds, eps=eps, batch_size=n)
    return Case("wmse/one-way", book, embeddings(n, 3, s), bare=True, **flags)


def cw_case(name, mode, groups=2, n=3, w=3, d=12, s=2, rounds=1, eps=0.0):
    def book(m, live, frozen):
        draws = replay_cw(s, n, d, w, rounds, 1, mode)
        if name == "detached-whitening":
            return detached_cw_book(live, frozen, *draws, groups, eps)
        return ref.cw_rgp(live, *draws, groups, eps)
    flags = dict(groups=groups, w_size=w, w_iter=rounds, eps=eps, batch_size=n)
    return Case(f"cw_rgp/{name}", book, embeddings(n, d, s), bare=True, **flags)


CASES = {
    "simclr/stop-gradient": stop_gradient_case(),
    "simclr/stop-gradient, cold": stop_gradient_case(temperature=0.1),
    "simclr/stop-gradient, views": stop_gradient_case(s=3),
    "moco/symmetric": symmetric_case(2),
    "moco/symmetric, views": symmetric_case(3),
    "moco/no-shuffle": no_shuffle_case(),
    "byol/linear-predictor": byol_case("linear-predictor"),
    "byol/direct-predictor": byol_case("direct-predictor", weight=direct_weight),
    "byol/direct-predictor, views": byol_case("direct-predictor", s=3, weight=direct_weight),
    "byol/group-norm": byol_case("group-norm"),
    "simsiam/fixed-predictor": simsiam_case("fixed-predictor"),
    "simsiam/decayed-predictor-lr": simsiam_case("decayed-predictor-lr"),
    "simsiam/softmax-similarity": simsiam_case("softmax-similarity", softmax_book),
    "simsiam/softmax-similarity, gradient": simsiam_case("softmax-similarity", softmax_book,
                                                         no_stop_gradient=True),
    "simsiam/asymmetric": simsiam_case("asymmetric", both=False),
    "simsiam/asymmetric, views": simsiam_case("asymmetric", both=False, s=3),
    "simsiam/head-norm-none": simsiam_case("head-norm-none"),
    "simsiam/head-norm-hidden": simsiam_case("head-norm-hidden"),
    "simsiam/head-norm-all": simsiam_case("head-norm-all"),
    "barlow/l2": barlow_case(),
    "barlow/l2, views": barlow_case(s=3, lambd=0.0051),
    "vicreg/paper-scaling": vicreg_case(25, 25, 1),
    "vicreg/paper-scaling, inv": vicreg_case(1, 0, 0),
    "vicreg/paper-scaling, var": vicreg_case(0, 1, 0),
    "vicreg/paper-scaling, cov": vicreg_case(0, 0, 1),
    "vicreg/paper-scaling, views": vicreg_case(3, 5, 7, s=3),
    "wmse/one-way": one_way_case(),
    "wmse/one-way, views": one_way_case(w=4, rounds=2, s=3),
    "wmse/one-way, zca": one_way_case("zca", eps=0.1),
    "cw_rgp/shared-permutation": cw_case("shared-permutation", "shared"),
    "cw_rgp/shared-permutation, slices": cw_case("shared-permutation", "shared", n=4, w=2, d=8),
    "cw_rgp/shared-permutation, views": cw_case("shared-permutation", "shared", n=4, w=2, d=8, s=3,
                                                rounds=2),
    "cw_rgp/fixed-permutation": cw_case("fixed-permutation", "fixed"),
    "cw_rgp/fixed-permutation, eps": cw_case("fixed-permutation", "fixed", n=4, w=2, d=8, s=3,
                                             rounds=2, eps=0.1),
    "cw_rgp/detached-whitening": cw_case("detached-whitening", "per-view"),
    "cw_rgp/detached-whitening, slices": cw_case("detached-whitening", "per-view", n=4, w=2, d=8,
                                                 s=3, rounds=2, eps=0.1),
}
PER_CASE = pytest.mark.parametrize("name", CASES)
BARE = pytest.mark.parametrize("name", [name for name in CASES if CASES[name].bare])


@PER_CASE
def test_value_is_the_papers(name):
    case = CASES[name]
    book = case.book(case.arrays, case.arrays)
    assert close(case.ours(*tensors(*case.arrays)), book, 1e-11)


@PER_CASE
def test_gradient_is_the_references_numeric_gradient(name):
    """With what is frozen held still."""
    case = CASES[name]
    ours = value_and_gradients(case.ours, case.arrays)[1]
    wanted = numeric_gradient(case.book, case.arrays)
    assert max(np.abs(want).max() for want in wanted) > 1e-4
    for got, want in zip(ours, wanted, strict=True):
        assert close(got, want, 2e-8)
