"""Every experiment: value and gradient against slow float64 references, what it changes and what
it leaves alone, the lines that --show prints, and that it trains and resumes under its name."""

import ast
import copy
import csv
import functools
import inspect
import itertools
import math
import os
import re
import subprocess
import sys
import textwrap
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
import systems
import torch
import torch.nn.functional as F
import vicreg
import wmse
from conftest import METHODS, ROOT, SMALL, SMALL_OF, is_one_line_error, run_here, run_script
from torch import nn

import common

pytestmark = pytest.mark.usefixtures("narrow_backbone")
NAMES = list(experiments.EXPERIMENTS)
MUST_HAVE = {
    "simclr": "stop-gradient predictor swav deepcluster",
    "moco": "symmetric no-shuffle slow-keys",
    "byol": "linear-predictor direct-predictor group-norm no-batch-statistics dino unigrad",
    "simsiam": "fixed-predictor decayed-predictor-lr softmax-similarity asymmetric "
    "head-norm-none head-norm-hidden head-norm-all alternating moving-average-target",
    "barlow": "l2 without-a cca-ssg",
    "vicreg": "paper-scaling two-branches",
    "wmse": "one-way shuffled-channels",
    "cw_rgp": "shared-permutation fixed-permutation detached-whitening covariance-term icl",
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
    "byol/no-batch-statistics": dict(proj_hidden=64),
    "byol/dino": dict(bottleneck=5),
    "simclr/swav": dict(prototypes=3),
    "simclr/deepcluster": dict(clusters=3, bank_size=16),
    "simsiam/moving-average-target": dict(bank_size=16),
    "cw_rgp/icl": dict(groups=1, w_size=8),
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
        if isinstance(layer, experiments.StandardisedLinear):
            weight = standardised_rows(weight)
        if isinstance(layer, systems.Prototypes):
            x = unit(x) @ unit(weight).T
        elif isinstance(layer, nn.Linear):
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


def standardised_rows(weight):
    rows = weight.reshape(len(weight), -1)
    deviation = rows - rows.mean(1, keepdims=True)
    return (deviation / (rows.std(1, keepdims=True) + 1e-5)).reshape(weight.shape)


def softmax(x):
    return np.exp(x - x.max(1, keepdims=True)) / np.exp(x - x.max(1, keepdims=True)).sum(1)[:, None]


def cross_entropy_book(scores, targets, temperature):
    total = 0.0
    for s, t in zip(scores / temperature, targets):
        total -= sum(t[k] * (s[k] - ref.log_sum_exp(s)) for k in range(len(s)))
    return total / len(scores)


def sinkhorn_book(scores, eps=0.05, rounds=3):
    """As in the authors' code: Q is K x N and sums to 1; equal rows, then equal columns."""
    q = np.exp(scores / eps).T
    q /= q.sum()
    for _ in range(rounds):
        q /= q.sum(1, keepdims=True) * len(q)
        q /= q.sum(0, keepdims=True) * len(scores)
    return (q * len(scores)).T


def sample_correlation_book(views, partition):
    """Squared covariances of two samples, over w; the mean over slices, the sum over views."""
    total = 0.0
    for view, index in itertools.product(views, partition):
        x = view[index] - view[index].mean(1, keepdims=True)
        s = ref.second_moment(x.T, x.shape[1] - 1)
        off = sum(s[i, j] ** 2 for i in range(len(s)) for j in range(len(s)) if i != j)
        total += off / len(index) / len(partition)
    return total


def icl_book(live, frozen, partitions, eps):
    """Sum over a slice of (1 - y1.y2 / d)^2, the mean over slices."""
    def white(part, constant):
        part, constant = ((v - v.mean(1, keepdims=True)) / v.std(1, ddof=1, keepdims=True)
                          for v in (part, constant))
        s = ref.second_moment(constant.T, constant.shape[1] - 1)
        s = (1 - eps) * s + (eps + 1e-5) * np.eye(len(s))
        return ref.inverse_root(s) @ part

    slices, total = [index for partition in partitions for index in partition], 0.0
    for i, j in pairs_of(live):
        for index in slices:
            y1, y2 = (white(live[v][index], frozen[v][index]) for v in (i, j))
            total += sum((1 - ref.dot(a, b) / len(a)) ** 2 for a, b in zip(y1, y2))
    return total / len(slices) / len(pairs_of(live))


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

    def __init__(self, name, book, arrays, bare=False, network=nn.Identity, prepare=None, **flags):
        d = arrays[0].shape[1] if bare else 6
        self.model = make(name, network, features=d, **({"proj_dim": d} if bare else {}), **flags)
        if prepare:
            prepare(self.model)
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
    n, d = (9, 3) if w == 9 else (2 * w, 2)

    def book(m, live, frozen):
        g, losses = generator(1), []
        for i, j in pairs_of(live):  # each pair draws its own partition
            orders = torch.rand(rounds, n, generator=g).argsort(-1).numpy()
            partition = [order.reshape(-1, w) for order in orders]
            losses.append(ref.wmse([live[i], frozen[j]], partition, kind, eps))
        return sum(losses) / len(losses)
    flags = dict(whitening=kind, w_size=w, w_iter=rounds, eps=eps, batch_size=n)
    return Case("wmse/one-way", book, embeddings(n, d, s), bare=True, **flags)


def cw_case(name, mode, groups=2, n=3, w=3, d=12, s=2, rounds=1, eps=0.0):
    def book(m, live, frozen):
        draws = replay_cw(s, n, d, w, rounds, 1, mode)
        if name == "detached-whitening":
            return detached_cw_book(live, frozen, *draws, groups, eps)
        return ref.cw_rgp(live, *draws, groups, eps)
    flags = dict(groups=groups, w_size=w, w_iter=rounds, eps=eps, batch_size=n)
    return Case(f"cw_rgp/{name}", book, embeddings(n, d, s), bare=True, **flags)


def predictor_case(s=2, stop=False):
    def book(m, live, frozen):
        p = np.split(head(m.predictor, np.concatenate(live)), s)
        z = frozen if stop else live
        losses = [anchor_book(p[i], p[j], z[i], z[j], 0.2) for i, j in pairs_of(live)]
        return sum(losses) / len(losses)
    arrays = embeddings(5, 4, s)
    return Case("simclr/predictor", book, arrays, bare=True, stop_gradient=stop, temperature=0.2)


def swav_case(s=2, **flags):
    def book(m, live, frozen):
        scores, fixed = ([head(m.prototypes, v) for v in views] for views in (live, frozen))
        fixed = scores if m.args.no_stop_gradient else fixed
        codes = [softmax(v / 0.05) if m.args.no_sinkhorn else sinkhorn_book(v) for v in fixed]
        losses = [cross_entropy_book(scores[i], codes[j], m.args.temperature) for i, j in
                  itertools.permutations(range(s), 2)]
        return sum(losses) / len(losses)
    return Case("simclr/swav", book, embeddings(5, 4, s), bare=True, **flags)


def deepcluster_case(s=2):
    def prepare(m):
        m.labels.copy_(torch.arange(16) * 7 % 3)
        m.sizes.copy_(torch.tensor([3.0, 1, 2]))

    def book(m, live, frozen):
        total, weights = 0.0, 0.0
        for v, (i, row) in itertools.product(live, enumerate(live[0])):
            label = int(m.labels[i])
            logits = head(m.classifier, v[i:i + 1])[0]
            weight = 1 / float(m.sizes[label])
            total += weight * (ref.log_sum_exp(logits) - logits[label])
            weights += weight
        return total / weights
    return Case("simclr/deepcluster", book, embeddings(5, 4, s), bare=True, prepare=prepare)


def slow_keys_case(slow, s=2):
    def book(m, live, frozen):
        weight, bias, queue = moco_parameters(m)
        q = [head(m.projector, v.reshape(4, 6)) for v in live]
        k = [v.reshape(4, 6) @ weight.T + bias for v in frozen]
        if slow == "negatives":
            k = [head(m.projector, v.reshape(4, 6)) for v in frozen]
        losses = [ref.info_nce(q[i], k[j], queue, 0.2) for i, j in pairs_of(live)]
        return sum(losses) / len(losses)
    arrays = [v.reshape(4, 3, 2, 1) for v in embeddings(4, 6, s)]
    return Case("moco/slow-keys", book, arrays, network=nn.Flatten, slow=slow)


def dino_case(s=2, temperature=0.04, **flags):
    def prepare(m):
        m.centre.copy_(torch.tensor(0.1 * randn(4)))

    def book(m, live, frozen):
        centre = m.centre.numpy()
        t = [softmax((head(m.target_projector, v) - centre) / temperature) for v in frozen]
        p = [head(m.predictor, head(m.projector, v)) for v in live]
        losses = [cross_entropy_book(p[i], t[j], 0.1) for i, j in
                  itertools.permutations(range(s), 2)]
        return sum(losses) / len(losses)
    return Case("byol/dino", book, embeddings(5, 6, s), prepare=prepare, **flags)


def unigrad_case(s=2, lambd=100.0):
    def book(m, live, frozen):
        t = [unit(head(m.target_projector, v)) for v in frozen]
        rows = np.concatenate(t)
        f = 0.99 * np.eye(4) / 4 + 0.01 * ref.second_moment(rows, len(rows))
        z = [unit(head(m.projector, v)) for v in live]
        losses = [-ref.dot(a, b) + lambd / 2 * ref.dot(a, f @ a) for i, j in
                  itertools.permutations(range(s), 2) for a, b in zip(z[i], t[j])]
        return sum(losses) / len(losses)
    return Case("byol/unigrad", book, embeddings(5, 6, s), lambd=lambd)


def alternating_case(s=2, renewed=False):
    def prepare(m):
        m.steps.fill_(6 if renewed else 4)
        with torch.no_grad():
            for i, p in enumerate(targets(m)):
                p.add_(0.3 * torch.tensor(randn(*p.shape, seed=i)))

    def book(m, live, frozen):
        eta = m.projector if renewed else m.target_projector
        t = [head(eta, v) for v in frozen]
        p = [head(m.predictor, head(m.projector, v)) for v in live]
        losses = [ref.negative_cosine(p[i], t[j]) for i, j in itertools.permutations(range(s), 2)]
        return sum(losses) / len(losses)
    return Case("simsiam/alternating", book, embeddings(5, 6, s), prepare=prepare, every=3)


def moving_average_case(s=2, **flags):
    def prepare(m):
        m.bank.copy_(torch.tensor(randn(16, 4)))
        m.rows = torch.tensor([7, 0, 15, 3, 9])

    def book(m, live, frozen):
        share = m.args.target_momentum
        bank = share * m.bank[m.rows].numpy()
        t = [bank + (1 - share) * unit(head(m.projector, v)) for v in frozen]
        p = [head(m.predictor, head(m.projector, v)) for v in live]
        losses = [ref.negative_cosine(p[i], t[j]) for i, j in itertools.permutations(range(s), 2)]
        return sum(losses) / len(losses)
    name = "simsiam/moving-average-target"
    return Case(name, book, embeddings(5, 6, s), prepare=prepare, **flags)


def of_correlation_case(name, loss, s=2, lambd=0.3):
    """loss(q, k, lambd) of standardised views."""
    def book(m, live, frozen):
        return mean_over_pairs(lambda a, b: loss(a, b, lambd), [ref.standardise(v) for v in live])
    return Case(name, book, embeddings(6, 4, s), bare=True, lambd=lambd)


def without_a_book(q, k, lambd):
    c = ref.cross_correlation(q, k)
    return -2 * sum(c[i, i] for i in range(len(c))) + lambd * (c**2).sum()


def cca_ssg_book(q, k, lambd):
    c = ref.cross_correlation(q, k)
    loss = -sum(c[i, i] for i in range(len(c)))
    for z in (q, k):
        loss += lambd * ((np.eye(len(c)) - ref.second_moment(z, len(z))) ** 2).sum()
    return loss


def two_branches_case(s=2):
    def book(m, live, frozen):
        z = [head(m.other_projector if i % 2 else m.projector, v) for i, v in enumerate(live)]
        return mean_over_pairs(lambda a, b: ref.vicreg(a, b, 3, 5, 7), z)
    return Case("vicreg/two-branches", book, embeddings(6, 6, s), inv=3, var=5, cov=7)


def shuffled_channels_case(kind, s=2, n=8, d=3, w=8):
    def book(m, live, frozen):
        g = generator(1)
        orders = torch.rand(1, n, generator=g).argsort(-1).numpy().reshape(-1, w)
        channels = torch.rand(s, n // w, d, generator=g).argsort(-1).numpy()
        white = [np.zeros_like(v) for v in live]
        for v, (i, index) in itertools.product(range(s), enumerate(orders)):
            order = channels[v, i]
            white[v][np.ix_(index, order)] = ref.whiten(live[v][np.ix_(index, order)], kind)
        return ref.mean_pair_distance(white)
    flags = dict(whitening=kind, w_size=w, batch_size=n)
    return Case("wmse/shuffled-channels", book, embeddings(n, d, s), bare=True, **flags)


def covariance_term_case(s=2, n=4, w=2, d=8, alpha=0.7):
    def book(m, live, frozen):
        draws = replay_cw(s, n, d, w, 1, 1, "per-view")
        rows = np.arange(n).reshape(-1, w)
        return ref.cw_rgp(live, *draws, 2) + alpha * sample_correlation_book(live, rows)
    flags = dict(groups=2, w_size=w, w_iter=1, batch_size=n, alpha=alpha)
    return Case("cw_rgp/covariance-term", book, embeddings(n, d, s), bare=True, **flags)


def icl_case(s=2, n=4, w=4, d=6, rounds=1, eps=0.1):
    def book(m, live, frozen):
        orders = torch.rand(rounds, n, generator=generator(1)).argsort(-1).numpy()
        return icl_book(live, frozen, orders.reshape(rounds, -1, w), eps)
    flags = dict(w_size=w, w_iter=rounds, batch_size=n, eps=eps)
    return Case("cw_rgp/icl", book, embeddings(n, d, s), bare=True, **flags)


CASES = {
    "simclr/predictor": predictor_case(),
    "simclr/predictor, stop": predictor_case(stop=True),
    "simclr/predictor, views": predictor_case(s=3),
    "simclr/swav": swav_case(),
    "simclr/swav, views": swav_case(s=3),
    "simclr/swav, softmax": swav_case(no_sinkhorn=True),
    "simclr/swav, gradient": swav_case(no_stop_gradient=True),
    "simclr/deepcluster": deepcluster_case(),
    "simclr/deepcluster, views": deepcluster_case(s=3),
    "moco/slow-keys": slow_keys_case("positives"),
    "moco/slow-keys, negatives": slow_keys_case("negatives", s=3),
    "byol/no-batch-statistics": byol_case("no-batch-statistics"),
    "byol/dino": dino_case(),
    "byol/dino, views": dino_case(s=3),
    "byol/dino, predictor": dino_case(predictor="mlp"),
    "byol/dino, soft": dino_case(temperature=0.1, no_sharpening=True),
    "byol/unigrad": unigrad_case(),
    "byol/unigrad, views": unigrad_case(s=3, lambd=3.0),
    "simsiam/alternating": alternating_case(),
    "simsiam/alternating, renewed": alternating_case(s=3, renewed=True),
    "simsiam/moving-average-target": moving_average_case(),
    "simsiam/moving-average-target, views": moving_average_case(s=3, predictor="mlp"),
    "barlow/without-a": of_correlation_case("barlow/without-a", without_a_book),
    "barlow/without-a, views": of_correlation_case("barlow/without-a", without_a_book, 3, 0.0051),
    "barlow/cca-ssg": of_correlation_case("barlow/cca-ssg", cca_ssg_book),
    "barlow/cca-ssg, views": of_correlation_case("barlow/cca-ssg", cca_ssg_book, 3, 2.0),
    "vicreg/two-branches": two_branches_case(),
    "vicreg/two-branches, views": two_branches_case(s=3),
    "wmse/shuffled-channels": shuffled_channels_case("cholesky"),
    "wmse/shuffled-channels, slices": shuffled_channels_case("cholesky", s=3, n=10, d=3, w=5),
    "wmse/shuffled-channels, zca": shuffled_channels_case("zca"),
    "cw_rgp/covariance-term": covariance_term_case(),
    "cw_rgp/covariance-term, views": covariance_term_case(s=3),
    "cw_rgp/icl": icl_case(),
    "cw_rgp/icl, slices": icl_case(s=3, w=2, rounds=2, eps=0.3),
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
LAYERS_BEHIND_Z = "simclr/predictor", "simclr/deepcluster"  # of which autocast takes care
BARE = pytest.mark.parametrize("name", [name for name in CASES if CASES[name].bare
                                        and not name.startswith(LAYERS_BEHIND_Z)])


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


WITHOUT_FROZEN_PARTS = [name for name in CASES if name.startswith((
    "barlow/", "vicreg/paper-scaling", "cw_rgp/shared", "cw_rgp/fixed", "cw_rgp/covariance",
    "wmse/shuffled"))]


@pytest.mark.parametrize("name", WITHOUT_FROZEN_PARTS)
def test_gradcheck(name):
    case = CASES[name]
    assert torch.autograd.gradcheck(case.ours, leaves(*case.arrays), atol=1e-7, rtol=1e-6)


@PER_CASE
def test_float32_is_close_to_float64(name):
    case = CASES[name]
    inputs = leaves(*case.arrays, dtype=torch.float32)
    loss = case.ours(*inputs)
    assert loss.dtype == torch.float32 and loss.dim() == 0
    assert close(loss, case.book(case.arrays, case.arrays), 2e-5)
    exact = value_and_gradients(case.ours, case.arrays)[1]
    for got, want in zip(torch.autograd.grad(loss, inputs, allow_unused=True), exact):
        assert got is None or got.dtype == torch.float32
        assert close(np.zeros_like(want) if got is None else got, want, 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@BARE
def test_half_precision_embeddings_give_the_loss_of_the_same_numbers_in_float32(name, dtype):
    case = CASES[name]
    half = leaves(*case.arrays, dtype=dtype)
    loss = case.ours(*half)
    assert loss.dtype == torch.float32
    assert close(loss, case.ours(*[h.detach().float() for h in half]).item(), 1e-6)
    for gradient in torch.autograd.grad(loss, half, allow_unused=True):
        assert gradient is None or (gradient.dtype == dtype and gradient.isfinite().all())


@PER_CASE
def test_loss_leaves_its_inputs_alone(name):
    case = CASES[name]
    inputs = tensors(*case.arrays)
    case.ours(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(inputs, tensors(*case.arrays)))


def test_every_experiment_has_a_case():
    assert {name.split(",")[0] for name in CASES} == set(NAMES)


# ---------------------------------------------------------------------- invariances
def unchanged(name, change, tolerance=1e-9):
    case = CASES[name]
    changed = case.ours(*tensors(*[change(a) for a in case.arrays])).item()
    return close(changed, case.ours(*tensors(*case.arrays)).item(), tolerance)


@pytest.mark.parametrize("name", ["simclr/stop-gradient", "barlow/l2"])
def test_scale_of_each_row_is_void_and_the_gradient_orthogonal_to_it(name):
    assert unchanged(name, lambda a: a * np.exp(randn(len(a), 1)))
    case = CASES[name]
    for z, g in zip(case.arrays, value_and_gradients(case.ours, case.arrays)[1]):
        assert np.abs((z * g).sum(1)).max() < 1e-12 < np.abs(g).max()


@pytest.mark.parametrize("name", ["simclr/stop-gradient", "simsiam/softmax-similarity", "barlow/l2",
                                  "vicreg/paper-scaling"])
def test_order_of_the_images_is_void_but_pairs_stay_together(name):
    case, order = CASES[name], np.roll(np.arange(len(CASES[name].arrays[0])), 1)
    assert unchanged(name, lambda a: a[order])
    other = case.ours(*tensors(case.arrays[0][order], *case.arrays[1:])).item()
    assert not close(other, case.ours(*tensors(*case.arrays)).item(), 1e-3)


@pytest.mark.parametrize("name", ["cw_rgp/fixed-permutation", "cw_rgp/shared-permutation"])
def test_cw_rgp_shift_of_each_sample_is_void(name):
    """Each sample is centred over its channels: gradient rows sum to zero."""
    assert unchanged(name, lambda a: a + randn(len(a), 1))
    assert not unchanged(name, lambda a: a + randn(1, a.shape[1]), 1e-3)
    case = CASES[name]
    gradients = value_and_gradients(case.ours, case.arrays)[1]
    assert all(np.abs(g.sum(1)).max() < 1e-11 for g in gradients)


# ---------------------------------------------------------------------- by hand, closed forms
def bare(name, *views, **flags):
    """The loss of an experiment whose H and Z are the views themselves."""
    model = make(name, nn.Identity, features=views[0].shape[1], batch_size=len(views[0]),
                 proj_dim=views[0].shape[1], **flags)
    model.projector = nn.Identity()
    return model(list(views))


def test_softmax_similarity_by_hand():
    p, z = tensors([[0.0, math.log(3)]], [[5.0, 5.0]])
    similarity = experiments.softmax_similarity
    assert close(similarity(p, z), -(math.log(0.25) + math.log(0.75)) / 2, 1e-12)
    assert close(similarity(z, p), math.log(2), 1e-12)


def test_softmax_similarity_is_the_book_and_leaves_the_stop_gradient_to_the_caller():
    arrays = embeddings(5, 4)
    value, gradients = value_and_gradients(experiments.softmax_similarity, arrays)
    assert close(value, softmax_book(*arrays), 1e-11)
    for got, want in zip(gradients, ref.numeric_gradient(softmax_book, arrays)):
        assert np.abs(got).max() > 1e-3 and close(got, want, 2e-8)
    assert torch.autograd.gradcheck(experiments.softmax_similarity, leaves(*arrays))


def test_barlow_l2_by_hand():
    z = tensors([[1.0, 1], [-1, 1], [1, -1], [-1, -1]])[0]  # rows of length sqrt(2) already
    assert close(experiments.l2_loss(5 * z, z[:, [1, 0]], 0.3), 2 + 0.3 * 2, 1e-12)
    assert close(bare("barlow/l2", 5 * z, z[:, [1, 0]], lambd=0.3), 2 + 0.3 * 2, 1e-12)


def test_vicreg_paper_scaling_by_hand():
    def loss(a, b, inv, var, cov):
        return bare("vicreg/paper-scaling", a, b, inv=inv, var=var, cov=cov)
    z, constant = tensors([[0.0, 0], [2, 2]], np.ones((4, 3)))
    assert close(loss(z, z + 3, 1, 0, 0), 18, 1e-12)  # 2 channels of 9
    assert close(loss(constant, constant, 0, 1, 0), 1.98, 1e-12)  # twice 1 - sqrt(1e-4)
    assert close(loss(z, z, 0, 0, 5), 5 * 2 * 4, 1e-12)  # all four covariances are 2


def test_simclr_stop_gradient_closed_form():
    """The bracket of being others' target is gone, and the value is the same."""
    z1, z2 = embeddings(5, 4)
    value, got = value_and_gradients(lambda a, b: experiments.anchor_loss(a, b, 0.3), [z1, z2])
    want = ref.simclr_gradient(unit(z1), unit(z2), 0.3, "own")
    for g, z, w in zip(got, (z1, z2), want):
        assert close(g, ref.through_unit_rows(z, w), 1e-12)
    plain = simclr.nt_xent_loss(*tensors(z1, z2), 0.3).item()
    assert value == plain and close(value, ref.nt_xent([z1, z2], 0.3), 1e-12)


def test_barlow_l2_closed_form():
    z1, z2 = embeddings(6, 4)
    got = value_and_gradients(lambda a, b: experiments.l2_loss(a, b, 0.2), [z1, z2])[1][0]
    free = ref.barlow_gradient(rows_of_length_root_d(z1), rows_of_length_root_d(z2), 0.2)
    assert close(got, 2 * ref.through_unit_rows(z1, free), 1e-12)  # 2 = sqrt(d)


def unigrad_gradient(z1, z2, lambd):
    """UniGrad's Barlow form of unit rows: -z2 + lambda / N sum_b (z2_n.z2_b) z1_b, A dropped."""
    q, k = unit(z1), unit(z2)
    return ref.through_unit_rows(z1, (-k + lambd * (k @ k.T / len(q)) @ q) / len(q))


def test_barlow_l2_is_unigrads_only_loosely():
    """Another objective: nearer to UniGrad's form with lambda = 50 / d, but not the same."""
    z1, z2 = embeddings(64, 32)
    book = unigrad_gradient(z1, z2, 50)

    def likeness(lambd):
        g = value_and_gradients(lambda a, b: experiments.l2_loss(a, b, lambd), [z1, z2])[1][0]
        return (g * book).sum() / math.sqrt((g**2).sum() * (book**2).sum())
    assert likeness(0.0051) < likeness(50 / 32) < 0.999


# ---------------------------------------------------------------------- W-MSE, one way
@pytest.mark.parametrize("kind", ["cholesky", "zca", "bn"])
def test_two_way_loss_is_two_one_way_losses(kind):
    """A6: grad L = grad L' with L' = L1' + L2', whose value is 2 L."""
    views = embeddings(8, 2)
    sizes = dict(batch_size=8, proj_dim=2, w_size=4, w_iter=2, whitening=kind)
    model = make("wmse/one-way", nn.Identity, features=2, **sizes)
    model.projector = nn.Identity()

    def loss(forward):
        def seeded(a, b):
            torch.manual_seed(3)
            return forward([a, b])
        return seeded
    value, gradients = value_and_gradients(loss(lambda z: wmse.WMSE.forward(model, z)), views)
    first, (g1, zero1) = value_and_gradients(loss(model), views)
    second, (g2, zero2) = value_and_gradients(loss(model), views[::-1])
    assert close(first, value, 1e-12) and close(second, value, 1e-12)  # so L' = 2 L
    assert np.abs(zero1).max() == np.abs(zero2).max() == 0
    assert min(np.abs(g1).max(), np.abs(g2).max()) > 0
    assert close(g1, gradients[0], 1e-12) and close(g2, gradients[1], 1e-12)


def test_one_way_targets_are_the_later_views():
    views, slices = embeddings(9, 3, 3), [[np.arange(9)]]
    got = value_and_gradients(lambda *v: bare("wmse/one-way", *v, w_size=9), views)[1]
    for i, others in {0: (1, 2), 1: (2,)}.items():
        def book(a):
            return sum(ref.wmse([a, views[j]], slices) for j in others) / 3
        assert close(got[i], ref.numeric_gradient(book, [views[i]])[0], 1e-8)
    assert np.abs(got[2]).max() == 0


# ---------------------------------------------------------------------- CW-RGP
CW_LOSS = {"per-view": cw_rgp.cw_rgp_loss, "shared": experiments.shared_loss,
           "fixed": experiments.fixed_loss, "detached": experiments.detached_loss}


@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_detached_whitening_has_the_value_but_not_the_gradient_of_the_matrix(eps):
    z, weights = embeddings(3, 12)[0], randn(3, 12, seed=3)
    x = z - z.mean(1, keepdims=True)
    phi = ref.inverse_root((1 - eps) * x @ x.T / 11 + eps * np.eye(3))

    def weighted(a):
        return (experiments.detached_whiten(a, 1, None, eps) * torch.tensor(weights)).sum()
    want = phi @ weights
    got = value_and_gradients(weighted, [z])[1][0]
    assert close(got, want - want.mean(1, keepdims=True), 1e-12)
    value = experiments.detached_whiten(torch.tensor(z), 1, None, eps)
    assert torch.equal(value, cw_rgp.channel_whiten(torch.tensor(z), 1, None, eps))


def test_detached_loss_has_the_methods_value_and_another_gradient():
    def loss(name):
        return lambda a, b: CW_LOSS[name]([a, b], 2, 2, 1, 0, generator(1))
    views = embeddings(4, 8)
    plain, detached = (value_and_gradients(loss(name), views) for name in ("per-view", "detached"))
    assert plain[0] == detached[0] and not close(plain[1][0], detached[1][0], 1e-3)


def test_shared_and_fixed_groups_have_no_floor():
    """Groups of their own leave identical views apart; shared or fixed groups do not."""
    z = torch.tensor(embeddings(6, 16)[0])

    def loss(name):
        return CW_LOSS[name]([z, z.clone()], 2, 3, 2, 0, generator(2)).item()
    assert loss("per-view") > 0.02 and loss("detached") > 0.02
    assert max(abs(loss("shared")), abs(loss("fixed"))) < 1e-12


def test_groups_are_drawn_as_the_names_say():
    views = tensors(*embeddings(4, 16))

    def draw(name, seed):
        return round(CW_LOSS[name](views, 2, 4, 1, 0, generator(seed)).item(), 10)
    counts = {name: len({draw(name, seed) for seed in range(12)}) for name in CW_LOSS}
    assert counts == {"fixed": 1, "shared": 12, "per-view": 12, "detached": 12}  # one slice


@pytest.mark.parametrize("name", CW_LOSS)
def test_one_embedding_for_all_images_is_not_a_number(name):
    one = torch.tensor(randn(1, 64), dtype=torch.float32).repeat(16, 1)
    assert not CW_LOSS[name]([one, one], 2, 16).isfinite()
    assert CW_LOSS[name]([one, one], 2, 16, eps=0.1).isfinite()


@pytest.mark.parametrize("name", CW_LOSS)
def test_wrong_sizes_are_named(name):
    views = tensors(*embeddings(10, 8))
    with pytest.raises(ValueError, match="w_size"):
        CW_LOSS[name](views, 1, 4)
    with pytest.raises(ValueError, match="groups"):
        CW_LOSS[name](views, 3, 5)
    with pytest.raises(ValueError, match="10 samples"):
        CW_LOSS[name](views, 2, 10)


# ---------------------------------------------------------------------- DirectPred's matrix
@pytest.mark.parametrize("eps", [0.1, 0.3])
def test_direct_predictor_shares_the_eigenvectors_of_the_correlation(eps):
    correlation = symmetric([4, 2, 1, 0.25])
    w = experiments.direct_predictor(torch.tensor(correlation), eps).numpy()
    assert close(w, w.T, 1e-12) and close(w @ correlation, correlation @ w, 1e-12)
    assert close(np.linalg.eigvalsh(w), np.sqrt([0.0625, 0.25, 0.5, 1]) + eps, 1e-12)
    root = symmetric(np.sqrt([1, 0.5, 0.25, 0.0625]))
    assert close(w.T @ w, correlation / 4 + 2 * eps * root + eps**2 * np.eye(4), 1e-12)
    larger = experiments.direct_predictor(torch.tensor(1e6 * correlation), eps)
    assert close(larger, w, 1e-12)


def test_direct_predictor_survives_rank_deficiency_and_zero():
    assert close(experiments.direct_predictor(torch.zeros(3, 3)), 0.1 * np.eye(3), 1e-6)
    one = torch.ones(3, 3)  # rank 1; the other eigenvalues may come out as -1e-8
    assert close(experiments.direct_predictor(one) @ torch.ones(3), 1.1 * np.ones(3), 1e-4)


# ---------------------------------------------------------------------- models
def agrees(model, views, by_hand, tolerance=1e-9):
    """model(views) and by_hand(its copy): the same loss, parameter gradients and buffers."""
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


def separately(model, views):
    return [model.projector(model.backbone(x)) for x in views]


def jointly(model, views):
    return model.projector(torch.cat([model.backbone(x) for x in views])).chunk(len(views))


VIEWS = pytest.mark.parametrize("s", [2, 4])


@VIEWS
def test_simclr_stop_gradient_model(s):
    views = images(8, s)
    agrees(make("simclr/stop-gradient", temperature=0.2), views, lambda m: mean_over_pairs(
        lambda a, b: experiments.anchor_loss(a, b, 0.2), jointly(m, views)))


@VIEWS
def test_barlow_l2_model(s):
    views = images(8, s)
    agrees(make("barlow/l2", lambd=0.1), views, lambda m: mean_over_pairs(
        lambda a, b: experiments.l2_loss(a, b, 0.1), separately(m, views)))


@VIEWS
def test_vicreg_paper_scaling_model(s):
    views = images(8, s)

    def loss(a, b):  # d = 4
        return vicreg.vicreg_loss(a, b, 12.0, 10.0, 7.0)
    model = make("vicreg/paper-scaling", inv=3.0, var=5.0, cov=7.0)
    agrees(model, views, lambda m: mean_over_pairs(loss, separately(m, views)))


@VIEWS
def test_wmse_one_way_model(s):
    views = images(16, s)

    def loss(a, b):
        return wmse.wmse_loss([a, b.detach()], 8)
    agrees(make("wmse/one-way"), views, lambda m: mean_over_pairs(loss, jointly(m, views)))


@VIEWS
@pytest.mark.parametrize("name,flags", [
    ("shared", dict(w_iter=2)), ("fixed", dict(eps=0.1)), ("detached", dict())])
def test_cw_rgp_model(s, name, flags):
    views = images(8, s)
    full = next(n for n in NAMES if n.startswith(f"cw_rgp/{name}"))
    sizes = dict(groups=2, w_size=4, w_iter=1)
    agrees(make(full, batch_size=8, **flags), views,
           lambda m: CW_LOSS[name](jointly(m, views), **{**sizes, **flags}))


def simsiam_by_hand(views, loss=simsiam.negative_cosine, both=True, stop=True):
    def by_hand(m):
        z = separately(m, views)
        p = [m.predictor(v) for v in z]
        target = [v.detach() for v in z] if stop else z
        one = [loss(p[i], target[j]) for i, j in pairs_of(z)]
        other = [loss(p[j], target[i]) for i, j in pairs_of(z)]
        return sum((a + b) / 2 if both else a for a, b in zip(one, other)) / len(one)
    return by_hand


SOFTMAX = dict(loss=experiments.softmax_similarity)


@VIEWS
@pytest.mark.parametrize("name,flags,hand", [
    ("asymmetric", dict(), dict(both=False)),
    ("asymmetric", dict(no_stop_gradient=True), dict(both=False, stop=False)),
    ("softmax-similarity", dict(), SOFTMAX),
    ("softmax-similarity", dict(no_stop_gradient=True), dict(stop=False, **SOFTMAX)),
    ("softmax-similarity", dict(predictor="none"), SOFTMAX),
    ("fixed-predictor", dict(), dict()),
    ("decayed-predictor-lr", dict(), dict()),
    ("head-norm-none", dict(), dict()),
    ("head-norm-none", dict(predictor="none"), dict()),
    ("head-norm-hidden", dict(), dict()),
    ("head-norm-all", dict(), dict())], ids=lambda value: str(value).split(" at 0x")[0])
def test_simsiam_model(s, name, flags, hand):
    views = images(8, s)
    model = make(f"simsiam/{name}", **flags)
    assert isinstance(model.predictor, nn.Identity) == (flags.get("predictor") == "none")
    agrees(model, views, simsiam_by_hand(views, **hand))


def head_structure(layers):
    """"L": linear without bias, "Lb": with bias, "N": norm, "Na": affine norm, "R": ReLU."""
    names = {nn.ReLU: "R", nn.Identity: ""}
    words = []
    for m in layers:
        word = names.get(type(m))
        if isinstance(m, nn.Linear):
            word = "L" if m.bias is None else "Lb"
        if isinstance(m, nn.BatchNorm1d):
            word = "Na" if m.affine else "N"
        words.append(word)
    return " ".join(filter(None, words))


@pytest.mark.parametrize("name,projector,predictor", [
    ("head-norm-none", "Lb R Lb", "Lb R Lb"), ("head-norm-hidden", "L Na R Lb", "L Na R Lb"),
    ("asymmetric", "L Na R L N", "L Na R Lb"), ("head-norm-all", "L Na R L N", "L Na R L Na")])
def test_simsiam_norms_of_the_heads(name, projector, predictor):
    model = make(f"simsiam/{name}")
    assert head_structure(model.projector) == projector
    assert head_structure(model.predictor) == predictor
    linear = [m for m in [*model.projector, *model.predictor] if isinstance(m, nn.Linear)]
    widths = [(m.in_features, m.out_features) for m in linear]
    assert widths == [(6, 16), (16, 4), (4, 5), (5, 4)]


def test_simsiam_fixed_predictor_does_not_train():
    model = make("simsiam/fixed-predictor")
    predictor = list(model.predictor.parameters())
    assert predictor and not any(p.requires_grad for p in predictor)
    assert all(p.requires_grad for p in online(model))


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("simsiam/")])
def test_simsiam_predictor_rate(name):
    model = make(name)
    args = SimpleNamespace(lr=0.1, lr_bias=0.1, weight_decay=0.0, optimizer="sgd")
    groups = common.build_optimizer(model, args).param_groups
    constant = {id(p) for group in groups if group["constant"] for p in group["params"]}
    decays = name.endswith(("fixed-predictor", "decayed-predictor-lr"))
    assert constant == (set() if decays else {id(p) for p in model.predictor.parameters()})


def byol_by_hand(views, predict=None):
    def by_hand(m):
        z = separately(m, views)
        p = predict(m, z) if predict else [m.predictor(v) for v in z]
        with torch.no_grad():
            target = [m.target_projector(m.target_backbone(x)) for x in views]
        losses = [byol.byol_loss(p[i], target[j]) + byol.byol_loss(p[j], target[i])
                  for i, j in pairs_of(z)]
        return sum(losses) / len(losses)
    return by_hand


@VIEWS
@pytest.mark.parametrize("name,flags", [
    ("linear-predictor", dict()),
    ("group-norm", dict()), ("group-norm", dict(predictor="none"))], ids=str)
def test_byol_model(s, name, flags):
    views = images(8, s)
    model = make(f"byol/{name}", **flags)
    agrees(model, views, byol_by_hand(views))
    assert all(p.grad is None and not p.requires_grad for p in targets(model))


@VIEWS
def test_byol_direct_predictor_model(s):
    """F starts at I and takes in all views of the step at once; W is constant for the gradient."""
    views = images(8, s)

    def predict(m, z):
        second = sum(v.detach().T @ v.detach() / 8 for v in z) / len(z)
        m.correlation.copy_(0.3 * m.correlation + 0.7 * second)
        return [v @ experiments.direct_predictor(m.correlation) for v in z]
    model = make("byol/direct-predictor")
    assert close(model.correlation, np.eye(4), 0) and not list(model.predictor.parameters())
    agrees(model, views, byol_by_hand(views, predict))
    assert "correlation" in model.state_dict()
    assert "correlation" not in make("byol/linear-predictor").state_dict()


def test_byol_direct_predictor_correlates_in_float32():
    """Not rounded to bf16's three digits, even if the embeddings are bf16."""
    model = make("byol/direct-predictor", dtype=torch.float32)
    z = torch.tensor(randn(32, 4)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        model.predict([z, z])
    exact = 0.3 * torch.eye(4) + 0.7 * z.float().T @ z.float() / 32
    assert close(model.correlation, exact, 1e-6)


@pytest.mark.parametrize("name,structure", [("linear-predictor", "L"), ("direct-predictor", "")])
def test_byol_predictors(name, structure):
    model = make(f"byol/{name}")
    assert head_structure(model.predictor.modules()) == structure
    assert head_structure(model.projector) == "L Na R L"


@pytest.mark.parametrize("name", ["byol/direct-predictor", "byol/linear-predictor", "simsiam/fixed-predictor",
                                  "simsiam/decayed-predictor-lr", "simsiam/head-norm-all"])
def test_an_experiment_on_the_predictor_refuses_that_it_is_removed(name):
    with pytest.raises(common.UserError, match="--predictor none"):
        make(name, predictor="none")


def test_no_batch_statistics_standardises_all_layers_of_tiny():
    """The convolutions of `tiny` are of a class of ours."""
    model = make("byol/no-batch-statistics", lambda: common.build_backbone("tiny", 16)[0], features=common.build_backbone("tiny", 16)[1])
    kinds = [type(module).__name__ for module in model.modules()]
    assert kinds.count("StandardisedConv2d") == 2 * 5  # online and target
    assert not {"Conv2d", "PatchConv2d", "Linear", "BatchNorm1d", "BatchNorm2d"} & set(kinds)


def test_the_command_of_an_experiment_can_be_run():
    assert common.script_of(experiments.find("simclr/swav").Args()) == "experiments.py simclr/swav"


def test_deepcluster_has_no_temperature():
    with pytest.raises(common.UserError, match="--temperature is not used"):
        common.check_rules(experiments.find("simclr/deepcluster").Args(temperature=0.1))


@pytest.mark.parametrize("name,flag", [("simclr/swav", "prototypes"), ("simclr/deepcluster", "clusters"), ("simsiam/moving-average-target", "bank_size"),
                                       ("simclr/deepcluster", "bank_size"), ("simsiam/alternating", "every")])
def test_sizes_of_experiments_have_an_end(name, flag):
    with pytest.raises(common.UserError, match=common.option_of(flag)):
        common.check_values(experiments.find(name).Args(**{flag: 10**17}))


def test_byol_group_norm_heads_see_no_batch():
    model = make("byol/group-norm", lambda: nn.Sequential(nn.Flatten(), nn.Linear(48, 6)))
    assert not [m for m in model.modules() if isinstance(m, nn.BatchNorm1d)]
    heads = model.projector, model.predictor, model.target_projector
    assert all(isinstance(h[1], nn.GroupNorm) and h[1].num_groups == 16 for h in heads)
    views = images(6)
    one_by_one = [model([v[i:i + 1] for v in views]).item() for i in range(6)]
    assert close(model(views), np.mean(one_by_one), 1e-12)


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("byol/")])
def test_byol_target_starts_as_a_copy_and_follows(name):
    experiment = experiments.find(name)
    sizes = {**SIZES, "momentum": 0.7, **OWN_SIZES.get(name, {})}
    model = experiment.model(backbone(), 6, experiment.Args(**sizes)).double()
    pairs = list(zip(online(model), targets(model), strict=True))
    assert all(torch.equal(a, b) and a.data_ptr() != b.data_ptr() for a, b in pairs)
    before = [b.clone() for _, b in pairs]
    with torch.no_grad():
        for a, _ in pairs:
            a.add_(1.0)
    model.update_target(0.4)
    tau = ref.byol_momentum(0.7, 0.4)
    for old, (theta, new) in zip(before, pairs):
        assert close(new, (tau * old + (1 - tau) * theta).detach(), 1e-12)


@pytest.mark.parametrize("s", [2, 4])
def test_moco_symmetric_model(s):
    """Query forward, moving average, keys, logits with the old queue, then the keys join it."""
    views = images(4, s)

    def by_hand(m):
        q = separately(m, views)
        with torch.no_grad():
            for k, p in zip(targets(m), online(m), strict=True):
                k.copy_(0.6 * k + 0.4 * p)
            keys = [m.target_projector(m.target_backbone(x)) for x in views]
            keys = [F.normalize(k, dim=1) for k in keys]
        queue = m.queue.clone()
        both = itertools.permutations(range(s), 2)
        loss = sum(moco.info_nce_loss(q[i], keys[j], queue, 0.2) for i, j in both)
        m.queue.copy_(torch.cat([queue, *keys])[4 * s:])
        return loss / len(pairs_of(views))
    model = make("moco/symmetric")
    agrees(model, views, by_hand)
    assert all(p.grad is None and not p.requires_grad for p in targets(model))
    assert not model.queue.requires_grad


def test_moco_symmetric_is_the_sum_of_both_directions():
    views, both = images(4), make("moco/symmetric")
    torch.manual_seed(1)
    forth = moco.MoCo(backbone(), 6, both.args).double().train()
    forth.load_state_dict(both.state_dict())
    back = copy.deepcopy(forth)
    total = forth(views).item() + back(views[::-1]).item()
    assert close(both(views), total, 1e-9)
    assert close(both.queue[-8:], torch.cat([back.queue[-4:], forth.queue[-4:]]), 1e-9)


@pytest.mark.parametrize("splits,changes", [(1, False), (2, True)])
def test_moco_shuffling_returns_the_keys_in_order(splits, changes):
    """One batch norm over all: the order is void. Parts of the batch: other parts, other keys."""
    x = images(8)[0]
    plain = make("moco/no-shuffle", conv_backbone, bn_splits=splits)
    shuffled = moco.MoCo(conv_backbone(), 6, plain.args).double().train()
    shuffled.load_state_dict(plain.state_dict())
    torch.manual_seed(0)
    keys = plain.keys(x), shuffled.keys(x)
    difference = (keys[0] - keys[1]).abs().max()
    assert (difference > 1e-3) if changes else (difference < 1e-9)
    similarity = keys[0] @ keys[1].T  # each key is its own image's, shuffled or not
    assert similarity.diagonal().mean() > similarity.mean() + 0.2


# ---------------------------------------------------------------------- all experiments
PER_EXPERIMENT = pytest.mark.parametrize("name", NAMES)


@PER_EXPERIMENT
def test_model_under_autocast_returns_a_float32_loss(name):
    """bf16 up to the embeddings, the loss in float32; finite gradients everywhere."""
    plain, mixed = (make(name, conv_backbone, torch.float32) for _ in range(2))
    views = [x.float() for x in images(16)]
    torch.manual_seed(2)
    exact = plain(views)
    torch.manual_seed(2)
    with torch.autocast("cpu", torch.bfloat16):
        loss = mixed(views)
    loss.backward()
    assert loss.dtype == torch.float32 and close(loss, exact.item(), 0.1)
    assert loss.item() != exact.item()
    for p in mixed.parameters():
        assert not p.requires_grad or (p.grad.dtype == torch.float32 and p.grad.isfinite().all())


@PER_EXPERIMENT
def test_every_trainable_parameter_gets_a_gradient(name):
    model = make(name)
    loss = model(images(16))
    loss.backward()
    assert loss.dim() == 0
    for parameter_name, p in model.named_parameters():
        assert not p.requires_grad or p.grad.isfinite().all(), parameter_name
    assert all(p.grad.abs().max() > 0 for p in model.backbone.parameters() if p.dim() > 1)


@PER_EXPERIMENT
def test_model_has_a_backbone_and_a_projector_that_give_h_and_z(name):
    model = make(name).eval()
    assert isinstance(model, experiments.find(name).method.__dict__[type(model).__base__.__name__])
    h = model.backbone(images(4)[0])
    assert h.shape == (4, 6) and model.projector(h).shape == (4, model.args.proj_dim)


# ---------------------------------------------------------------------- --show
def blocks(name):
    """[(shown lines, text, parent's text)] of an experiment."""
    shown = [[]]
    for line in experiments.show(experiments.find(name)).split("\n"):
        if line:
            shown[-1].append(line)
        else:
            shown.append([])
    found = experiments.parts(experiments.find(name))
    assert [lines[0] for lines in shown] == [f"{title}:" for title, _, _ in found]
    return [(lines[1:], new, old) for lines, (_, new, old) in zip(shown, found)]


def patched(old, shown, new):
    """Apply the shown lines to the parent's text: `-` leave, `+` come, in this order. A `+` comes
    where the child has it."""
    out, old, shown = [], list(old), list(shown)
    while shown or old:
        if shown and shown[0][0] == "-" and old and old[0] == shown[0][1:]:
            old.pop(0)
            shown.pop(0)
        elif shown and shown[0][0] == "+" and new[len(out):][:1] == [shown[0][1:]]:
            out.append(shown.pop(0)[1:])
        else:
            assert old, "a shown line has no place"
            out.append(old.pop(0))
    return out


def longest_common_subsequence(a, b):
    best = np.zeros((len(a) + 1, len(b) + 1), dtype=int)
    for i, j in itertools.product(range(len(a)), range(len(b))):
        longer = max(best[i, j + 1], best[i + 1, j])
        best[i + 1, j + 1] = best[i, j] + 1 if a[i] == b[j] else longer
    return best[-1, -1]


@PER_EXPERIMENT
def test_show_is_complete_and_minimal(name):
    """The shown lines turn the parent's text into the child's, and no fewer lines would."""
    for shown, new, old in blocks(name):
        new, old = new.splitlines(), old.splitlines()
        assert all(line[0] in "+-" for line in shown)
        assert patched(old, shown, new) == new
        kept = longest_common_subsequence(old, new)
        assert len(shown) == len(old) + len(new) - 2 * kept


@PER_EXPERIMENT
def test_what_is_copied_is_a_copy_and_the_change_is_small(name):
    for shown, new, old in blocks(name):
        if old:
            left = sum(line[0] == "-" for line in shown)
            assert left <= 7 and left <= 0.6 * len(old.splitlines())


@PER_EXPERIMENT
def test_show_leaves_out_no_function(name):
    """Every function and class of this file that the experiment uses is among its parts."""
    experiment = experiments.find(name)
    shown = {new for _, new, _ in experiments.parts(experiment)}
    inside = [f for f in vars(experiment.model).values() if inspect.isfunction(f)]
    for function in [*inside, *experiment.beside]:
        assert experiments.source_of(function) in shown
        file = sys.modules[function.__module__]
        for used in ast.walk(ast.parse(textwrap.dedent(experiments.source_of(function)))):
            value = vars(file).get(used.id) if isinstance(used, ast.Name) else None
            if getattr(value, "__module__", "") in ("experiments", "systems"):
                assert value in experiment.beside, used.id
    assert experiment.model.__mro__[1] in vars(experiment.method).values()


def test_show_on_the_command_line():
    assert is_one_line_error(run_here("experiments", ["simsiam/softmax-similarity", "--show", "--bogus"]))
    result = run_here("experiments", ["simsiam/softmax-similarity", "--show"])
    lines = result.out.splitlines()
    assert result.status == 0 and not result.err
    assert "-            D = negative_cosine" in lines
    assert "+            D = softmax_similarity" in lines
    assert "SimSiam.forward:" in lines and "softmax_similarity (new):" in lines
    assert not [line for line in lines if line[:1] not in ("", "+", "-") and line[-1] != ":"]


# ---------------------------------------------------------------------- the file, the list, names
SOURCES = [(ROOT / "tests" / name).read_text() for name in ("experiments.py", "systems.py")]


def test_experiments_are_those_that_left_the_method_files():
    expected = [f"{method}/{name}" for method, names in MUST_HAVE.items() for name in names.split()]
    assert sorted(NAMES) == sorted(expected)
    for name, experiment in experiments.EXPERIMENTS.items():
        assert experiment.name == name and experiment.sentence and experiment.source
        assert experiment.method.__name__ == name.split("/")[0]


@pytest.mark.parametrize("source", SOURCES, ids=["experiments", "systems"])
def test_no_module_global_is_assigned(source):
    """Nothing of a method or of common is replaced, by an assignment or otherwise."""
    modules = {*METHODS, "common", "torch", "nn", "F"}
    for node in ast.walk(ast.parse(source)):
        assert not isinstance(node, (ast.Global, ast.Delete))
        if isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign)):
            for target in getattr(node, "targets", None) or [node.target]:
                names = {n.id for n in ast.walk(target) if isinstance(n, ast.Name)}
                assert not modules & names, ast.unparse(node)
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in ("setattr", "exec", "eval", "patch")


@pytest.mark.parametrize("source", SOURCES, ids=["experiments", "systems"])
def test_the_files_have_100_columns_and_one_statement_a_line(source):
    assert max(map(len, source.splitlines())) <= 100
    statements = [n.lineno for n in ast.walk(ast.parse(source)) if isinstance(n, ast.stmt)]
    assert len(statements) == len(set(statements))


def test_list_is_grouped_and_fits_on_a_screen():
    result = run_here("experiments", [])
    lines = result.out.splitlines()
    assert result.status == 0 and not result.err and max(map(len, lines)) <= 100
    assert [line for line in lines if line in METHODS] == list(MUST_HAVE)
    assert [line.split()[0] for line in lines if line.startswith("  ") and line[2] != " "] == NAMES
    text = " ".join(result.out.split())
    for experiment in experiments.EXPERIMENTS.values():
        assert " ".join(experiment.sentence.split()) in text
        assert experiment.source in text
    assert run_here("experiments", ["--help"]).out == result.out


@pytest.mark.parametrize("name,near", [
    ("simsiam/softmax", ["simsiam/softmax-similarity"]), ("asymmetric", ["simsiam/asymmetric"]),
    ("moco", ["moco/symmetric", "moco/no-shuffle"]), ("byol/", ["byol/group-norm"]),
    ("cw_rgp/shared_permutation", ["cw_rgp/shared-permutation"]), ("xyz", ["lists them"]),
    ("--epochs", ["name comes first"]), ("", ["lists them"])])
def test_unknown_name_is_one_line_that_names_near_ones(name, near):
    result = run_here("experiments", [name, "--epochs", "1"])
    assert is_one_line_error(result) and all(word in result.err for word in near), result.err


def test_find_raises_a_user_error():
    with pytest.raises(common.UserError, match="moco/symmetric"):
        experiments.find("moco/symetric")
    assert experiments.find("moco/symmetric").name == "moco/symmetric"


@pytest.mark.parametrize("line,words", [
    ("simsiam/asymmetric --pred-hidden 0", "--pred-hidden"),
    ("simsiam/asymmetric --asymmetric", "--asymmetric"),
    ("byol/group-norm --proj-hidden 100", "try --proj-hidden 96"),
    ("byol/group-norm --proj-hidden 16", "try --proj-hidden 64"),
    ("byol/linear-predictor --predictor linear", "--predictor"),
    ("moco/symmetric --bn-splits 3", "--bn-splits 3 --batch-size 256"),
    ("cw_rgp/shared-permutation --groups 3", "--groups 3 --proj-dim 512"),
    ("wmse/one-way --w-size 100", "--w-size 100 --batch-size 256")])
def test_bad_flags_are_one_line_as_in_the_method(line, words):
    result = run_here("experiments", line.split())
    assert is_one_line_error(result) and words in result.err, result.err


def test_group_norm_takes_the_sizes_that_it_proposes():
    for line in ("--proj-hidden 96", "--proj-hidden 64", "--proj-hidden 128"):
        assert experiments.find("byol/group-norm").parse_args(line.split())


@PER_EXPERIMENT
def test_help_has_the_sentence_and_the_methods_flags(name):
    result = run_here("experiments", [name, "--help"])
    text = " ".join(result.out.split())
    assert result.status == 0 and not result.err
    assert f"{name}: {experiments.find(name).sentence}" in text
    for flag in ("--epochs", "--batch-size", *SMALL_OF[name.split("/")[0]][::2]):
        assert flag in text
    assert "--experiment" not in text and "--method" not in text


def test_args_belong_to_one_experiment():
    """Args of the method itself would leave a run under the plain method's name."""
    experiment = experiments.find("simsiam/asymmetric")
    assert experiment.Args(epochs=3).experiment == "asymmetric"
    assert experiment.Args().method == "simsiam"
    for args in (simsiam.Args(), experiments.find("simsiam/head-norm-all").Args()):
        with pytest.raises(common.UserError, match="simsiam/asymmetric"):
            experiment.build(args)


def test_an_experiment_may_have_a_training_loop_of_its_own():
    """It gets `build`, and --show prints its marked lines."""
    def train(args, build=None):
        return build(args)  # <- no training at all

    parts = dict(sentence="No training.", source="none", model=simsiam.SimSiam, train=train)
    experiment = experiments.Experiment("simsiam/untrained", **parts, whiten=lambda args, z: z)
    assert isinstance(experiment.train(experiment.Args(image_size=32)), simsiam.SimSiam)
    assert "+        return build(args)  # <- no training at all" in experiments.show(experiment)
    assert experiment.whiten(None, 3) == 3
    others = [e.name for e in experiments.EXPERIMENTS.values() if hasattr(e, "whiten")]
    assert others == ["cw_rgp/icl"]


# ---------------------------------------------------------------------- runs
QUICK = ["--epochs", "1", "--image-size", "16", "--proj-hidden", "64", "--eval-every", "0",
         "--warmup", "0", "--weight-decay", "0", "--save-every", "1"]
TWO_EPOCHS = ["--batch-size", "64", "--epochs", "2", "--save-every", "0"]


QUICK_OF = {"simclr/deepcluster": ["--clusters", "4"],
            "cw_rgp/icl": ["--groups", "1", "--w-size", "32"]}


@pytest.fixture
def argv(flags):
    """The flags of a run of two steps; later ones win."""
    return lambda name, *more: [*flags(name.split("/")[0], *QUICK), *QUICK_OF.get(name, []), *more]


def losses(folder):
    with open(folder / "metrics.csv") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def checkpoint(folder, file="last.pt"):
    return torch.load(folder / file, weights_only=True)


# Nothing but the model's loss or layers is changed in these, which is tested above without a run.
LOSS_ALONE = ["simclr/predictor", "moco/slow-keys", "byol/no-batch-statistics", "byol/unigrad",
              "barlow/without-a", "barlow/cca-ssg", "vicreg/two-branches", "wmse/shuffled-channels",
              "cw_rgp/covariance-term"]
PER_RUN = pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.slow) if name in LOSS_ALONE else name for name in NAMES])


@PER_RUN
def test_two_steps_end_to_end(name, argv, tmp_path):
    """A checkpoint with its name, which `build` reads, and which resumes to the same weights."""
    method, _, short = name.partition("/")
    result = run_here("experiments", [name, *argv(name)])
    assert result.status == 0 and not result.err, result.err
    last, run = checkpoint(tmp_path / "run"), tmp_path / "run"
    assert (last["args"]["method"], last["args"]["experiment"], last["step"]) == (method, short, 2)
    assert all(map(math.isfinite, losses(run)))

    experiment = experiments.find(name)
    flags = {field: last["args"][field] for field in experiment.Args.__dataclass_fields__}
    model = experiment.build(SimpleNamespace(**flags))  # as eval.py does
    model.load_state_dict(last["model"])
    assert type(model) is experiment.model
    trained = {k: v for k, v in model.named_parameters() if v.requires_grad}
    torch.manual_seed(0)
    start = experiment.build(experiment.Args(**flags)).state_dict()
    still = {k for k, v in trained.items() if torch.equal(v, start[k])}
    assert still == ({"prototypes.weight"} if name == "simclr/swav" else set())

    (run / "previous.pt").replace(run / "last.pt")  # the checkpoint of step 1
    assert checkpoint(run)["step"] == 1
    result = run_here("experiments", [name, *argv(name, "--resume")])
    assert result.status == 0 and not result.err, result.err
    again = checkpoint(run)
    assert all(torch.equal(v, again["model"][k]) for k, v in last["model"].items())
    assert last["rows"][0]["loss"] == again["rows"][0]["loss"]


THE_STEP = ["simclr/stop-gradient", "moco/slow-keys", "simsiam/fixed-predictor",
            "simsiam/decayed-predictor-lr", "simsiam/alternating", "wmse/one-way",
            "cw_rgp/detached-whitening"]


@pytest.fixture(scope="module")
def plain(small_folder, tmp_path_factory):
    """plain("moco") -> losses of the method itself, two epochs of a step; each run once."""
    @functools.cache
    def run(method):
        out = tmp_path_factory.mktemp("plain") / method
        flags = [*SMALL, *SMALL_OF[method], "--dataset", "folder", "--data-dir", small_folder]
        result = run_here(method, [*flags, *QUICK, *TWO_EPOCHS, "--out", out])
        assert result.status == 0, result.err
        return losses(out)
    return run


@PER_RUN
def test_what_an_experiment_changes(name, argv, plain, tmp_path):
    """The loss from the first step on, or only what the first step does."""
    first, second = plain(name.split("/")[0])
    result = run_here("experiments", [name, *argv(name, *TWO_EPOCHS)])
    assert result.status == 0, result.err
    own_first, own_second = losses(tmp_path / "run")
    if name not in THE_STEP:
        assert abs(first - own_first) > 1e-4 * abs(first)
    else:
        assert abs(first - own_first) <= 1e-5 * abs(first)
        if name != "simsiam/decayed-predictor-lr":  # the first step of a cosine is at the peak
            assert abs(second - own_second) > 1e-6 * abs(second)


def test_simsiam_predictor_rate_decays_only_in_its_experiment(argv, tmp_path):
    """After two steps of a cosine the rate is half; the predictor's stays."""
    def rates(script, *more):
        out = tmp_path / script
        words = argv("simsiam", *TWO_EPOCHS, "--out", out)
        assert run_here(script, [*more, *words]).status == 0
        groups = checkpoint(out)["optimizer"]["param_groups"]
        return sorted({round(group["lr"] / group["peak_lr"], 6) for group in groups})
    assert rates("simsiam") == [0.5, 1.0]
    assert rates("experiments", "simsiam/decayed-predictor-lr") == [0.5]


def test_folder_without_out_has_the_experiments_name(argv, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = argv("simsiam/asymmetric")
    at = words.index("--out")
    del words[at:at + 2]
    result = run_here("experiments", ["simsiam/asymmetric", *words])
    assert result.status == 0, result.err
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["simsiam-asymmetric-folder-s0"]
    assert "runs/simsiam-asymmetric-folder-s0" in result.out


@pytest.mark.parametrize("before,now", [
    (["simsiam"], ["experiments", "simsiam/asymmetric"]),
    (["experiments", "simsiam/asymmetric"], ["simsiam"]),
    (["experiments", "simsiam/asymmetric"], ["experiments", "simsiam/decayed-predictor-lr"]),
    (["moco"], ["experiments", "moco/symmetric"]),
    (["experiments", "moco/no-shuffle"], ["moco"])], ids=" ".join)
def test_resume_refuses_to_mix(before, now, argv, tmp_path):
    """The states have the same shapes, so only the name tells them apart."""
    method = before[-1].split("/")[0]
    script, *name = before
    assert run_here(script, [*name, *argv(method)]).status == 0
    kept = (tmp_path / "run" / "last.pt").read_bytes()
    script, *name = now
    result = run_here(script, [*name, *argv(method, "--resume")])
    assert is_one_line_error(result), result.err
    names = [re.escape(name[-1]).replace("/", "[/-]") for name in (before, now)]  # as in the folder's name
    assert re.search(f"is a run of {names[0]}, not of {names[1]}; try another --out", result.err)
    assert (tmp_path / "run" / "last.pt").read_bytes() == kept


@pytest.mark.slow
def test_as_a_user_runs_it(argv, tmp_path):
    script = ROOT / "tests" / "experiments.py"
    result = run_script(script, "vicreg/paper-scaling", *argv("vicreg"), cwd=tmp_path)
    assert result.status == 0 and not result.err, result.err
    assert checkpoint(tmp_path / "run")["args"]["experiment"] == "paper-scaling"
    result = run_script(script, "vicreg/scaling", cwd=tmp_path)
    assert is_one_line_error(result) and result.err.startswith("experiments.py: error: ")
    result = run_script(script, cwd=tmp_path)
    assert result.status == 0 and "vicreg/paper-scaling" in result.out


# ---------------------------------------------------------------------- no waiting, many processes
@pytest.mark.slow
@pytest.mark.parametrize("name", ["moco/symmetric", "moco/no-shuffle", "byol/direct-predictor",
                                  "byol/group-norm", "simsiam/softmax-similarity", "barlow/l2",
                                  "cw_rgp/shared-permutation", "cw_rgp/detached-whitening",
                                  "simclr/swav", "moco/slow-keys", "byol/dino", "byol/unigrad",
                                  "simsiam/alternating", "simsiam/moving-average-target",
                                  "barlow/cca-ssg", "cw_rgp/icl"])
def test_no_step_waits_for_the_device(name, argv, tmp_path, monkeypatch):
    from test_determinism import NoWaiting, every_step_under

    mode = NoWaiting()
    with every_step_under(monkeypatch, mode) as steps:
        result = run_here("experiments", [name, *argv(name, "--save-every", "0")])
    assert result.status == 0, result.err
    assert steps == [0, 1] and mode.count > 500


RANK_SIZES = {"moco": dict(queue_size=48, bn_splits=6), "simsiam": dict(pred_hidden=4),
              "wmse": dict(w_size=12, w_iter=2), "byol/group-norm": dict(proj_hidden=64),
              "cw_rgp": dict(proj_dim=32, groups=2, w_size=6, w_iter=2),
              "cw_rgp/icl": dict(groups=1, w_size=12),
              "simclr/deepcluster": dict(bank_size=24),
              "simsiam/moving-average-target": dict(bank_size=24)}


def three_steps(name):
    """Three steps on fixed random views, 24 in all processes -> losses and state."""
    method, (n, r) = name.split("/")[0], (24 // common.world_size(), common.rank())
    sizes = {"batch_size": 24, **RANK_SIZES.get(method, {}), **RANK_SIZES.get(name, {})}
    model = make(name, conv_backbone, **sizes)
    network = common.distribute(model, SimpleNamespace(compile=False))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.05, momentum=0.9)
    found = []
    for step in range(3):
        views = [x[r * n:(r + 1) * n] for x in images(24, seed=step)]
        views = [x.contiguous(memory_format=torch.channels_last) for x in views]
        torch.manual_seed(common.step_seed(0, step))
        loss = network(views)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if method == "byol":
            model.update_target(step / 3)
        found.append(loss.item())
    return {"losses": torch.tensor(found, dtype=torch.float64), **model.state_dict()}


def worker(rank, world, port, folder):
    import os

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    states = {name: three_steps(name) for name in NAMES}
    torch.save(states, f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(worker, (2, port, str(tmp_path)), nprocs=2)
    for rank in (0, 1):
        states = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        for name in NAMES:
            one = three_steps(name)
            assert one.keys() == states[name].keys()
            for key, value in one.items():
                assert close(states[name][key], value, 1e-6), (name, key)


def test_a_python_that_leaves_the_scripts_folder_out_of_its_path_runs_them_too():
    command = [sys.executable, ROOT / "tests" / "experiments.py", "byol/dino", "--show"]
    result = subprocess.run(command, env={**os.environ, "PYTHONSAFEPATH": "1"}, capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout, result.stderr
