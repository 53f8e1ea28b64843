"""Claims of the documents that are exact: each checked in float64, in a moment, without training.

`python tests/claims.py exact` runs them. Each is a function that returns the error of what its
sentence is about. It takes what the sentence rests on as an argument, so that a test can take that
away and see the claim fail. The closed forms of the gradients are here too.
"""

import functools
import math
import os
import sys
from dataclasses import dataclass

import numpy as np

ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
sys.path[1:1] = [os.path.join(ROOT, "tests"), ROOT, os.path.join(ROOT, "methods")]
import common  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from barlow import barlow_twins_loss  # noqa: E402
from byol import byol_loss  # noqa: E402
from cw_rgp import channel_whiten, cw_rgp_loss  # noqa: E402
from experiments import (  # noqa: E402
    anchor_loss,
    detached_whiten,
    direct_predictor,
    l2_loss,
    shared_loss,
)
from moco import info_nce_loss  # noqa: E402
from simclr import nt_xent_loss  # noqa: E402
from simsiam import negative_cosine  # noqa: E402
from systems import sinkhorn, unigrad_loss  # noqa: E402
from vicreg import vicreg_loss  # noqa: E402
from wmse import whiten  # noqa: E402

EXACT = {}  # id -> Exact, in the order of this file


@dataclass
class Exact:
    """A claim that holds to rounding. check(**without) must fail, check() must hold.

    error: check() returns it. tolerance: the largest that holds. missing: what `without` takes
    away, in words."""

    id: str
    source: str
    sentence: str
    check: object
    tolerance: float
    missing: str
    without: dict

    def holds(self, **changed):
        """True if the error is within the tolerance; NaN is not."""
        return bool(self.check(**changed) <= self.tolerance)


def exact(id, source, sentence, missing, tolerance=1e-9, **without):
    """Enter a function into EXACT."""
    def enter(check):
        EXACT[id] = Exact(id, source, sentence, check, tolerance, missing, without)
        return check
    return enter


# ==============================================================================
# Numbers to check on
# ==============================================================================


def embeddings(n, d, views=2, seed=0):
    """`views` tensors [n, d] of the same images: alike, correlated channels, not centred."""
    g = torch.Generator().manual_seed(seed)
    shared = torch.randn(n, d, generator=g, dtype=torch.float64)
    mix = torch.eye(d, dtype=torch.float64)
    mix += 0.3 * torch.randn(d, d, generator=g, dtype=torch.float64)
    noise = torch.randn(views, n, d, generator=g, dtype=torch.float64)
    return [((shared + 0.5 * e) @ mix + 0.3).requires_grad_() for e in noise]


def white(n, d, seed=0):
    """[n, d] with mean 0 and covariance exactly I (divisor n - 1)."""
    with torch.no_grad():
        return whiten(embeddings(n, d, 1, seed)[0], "zca")


def unchanged(x):
    """x itself, in the place of what should change it."""
    return x


def largest(*differences):
    """The largest absolute entry of all tensors, a float; NaN if there is one."""
    errors = [float(x.detach().abs().max()) for x in differences]
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def of_length_1(z):
    return F.normalize(z, dim=1)


def standardised(z):
    return (z - z.mean(0)) / (z.var(0, unbiased=False) + 1e-5).sqrt()


# ==============================================================================
# Document 000: whitening
# ==============================================================================


@exact("A6", "Weng et al. 2022, Eq. 5 to 7",
       "The two-way loss has the gradient of two one-way losses with fixed targets. Their sum has "
       "twice its value.", missing="the stop-gradient", stop=unchanged)
def two_way_is_two_one_way(stop=torch.Tensor.detach):
    errors = []
    for kind in ("zca", "cholesky", "bn"):
        z = embeddings(12, 4)
        y1, y2 = (whiten(v, kind) for v in z)
        both = (y1 - y2).square().sum() / 12
        halves = ((y1 - stop(y2)).square().sum() + (stop(y1) - y2).square().sum()) / 12
        wanted = torch.autograd.grad(both, z, retain_graph=True)
        got = torch.autograd.grad(halves, z)
        errors += [halves - 2 * both, *(a - b for a, b in zip(got, wanted))]
    return largest(*errors)


@exact("A7", "Weng et al. 2022, Proposition 1",
       "Every Z1 = U diag(sigma) V^T with the target's singular vectors and any sigma > 0 is a "
       "minimum of the one-way loss with ZCA, however far it is from white.",
       missing="ZCA (Cholesky in its place)", tolerance=1e-6,
       kind="cholesky")
def any_spectrum_is_optimal(kind="zca"):
    target = white(40, 6)
    u, _, v = torch.linalg.svd(target, full_matrices=False)  # rows are samples
    errors = []
    for sigma in ([1, 1, 1, 1, 1, 1.0], [100, 10, 1, 1, 0.1, 0.01], [9, 1, 1, 1, 1, 1.0]):
        spectrum = torch.tensor(sigma, dtype=torch.float64)
        z1 = u @ torch.diag(spectrum) @ v
        stable_rank = common.collapse_metrics(z1)["stable_rank"]
        errors += [(whiten(z1, kind) - target).square().sum() / 40]
        errors += [torch.tensor(stable_rank) - spectrum.sum() / spectrum[0]]
    return largest(*errors)


def centred(z):
    return z - z.mean(0)


@exact("A9", "Weng et al. 2022, sections 1 and 4",
       "Batch whitening needs more samples than channels; channel whitening works with few.",
       missing="the centring", centre=unchanged)
def smallest_batch(centre=centred):
    def smallest(x):
        eigenvalues = torch.linalg.eigvalsh(x.mT @ x).detach()
        return float(eigenvalues[0] / eigenvalues[-1])

    with torch.no_grad():
        enough, too_few = (centre(embeddings(w, 8, 1)[0]) for w in (9, 8))
        few = embeddings(4, 16, 1)[0].detach()
    works = smallest(enough) > 1e-6
    works &= smallest((few - few.mean(1, keepdim=True)).mT) > 1e-6
    works &= bool(channel_whiten(few, 1).isfinite().all())
    return abs(smallest(too_few)) if works else math.inf


def scaled_channels(z, groups):
    """Channels of variance 1, still correlated."""
    return whiten(z, "bn")


@exact("A9-ones", "Weng et al. 2022, section 2",
       "Channel whitening makes all singular values equal, and each row's length is sqrt(d - g).",
       missing="the whitening (a batch norm in its place)", whitening=scaled_channels)
def channel_whitened_spectrum(whitening=channel_whiten):
    d, groups = 32, 2
    y = whitening(embeddings(6, d, 1)[0], groups)
    errors = [y.square().sum(1) - (d - groups)]
    for part in y.chunk(groups, dim=1):
        errors += [torch.linalg.svdvals(part) - math.sqrt(d / groups - 1)]
    return largest(*errors)


@exact("A10", "Weng et al. 2022, section 4, for the groups; the floor is our observation",
       "With separate random groups for each view, the loss of equal views stays above zero; "
       "with the same groups it is zero.", missing="the separate groups", own=shared_loss)
def floor_of_random_groups(own=cw_rgp_loss):
    z = embeddings(8, 32, 1)[0].detach()

    def loss(function):
        g = torch.Generator().manual_seed(0)
        return float(function([z, z.clone()], 4, 4, 2, 0.0, g))
    return abs(loss(shared_loss)) if loss(own) > 0.02 else math.inf


@exact("A11", "Weng et al. 2022, section 2; the form is ours",
       "Channel whitening propagates through the whitening matrix: its gradient has no part along "
       "Z, whose scale has no effect. That of ICL has.", missing="the gradient through the matrix",
       whitening=detached_whiten)
def gradient_through_the_matrix(whitening=channel_whiten):
    z = embeddings(4, 12, 1)[0]
    target = embeddings(4, 12, 1, seed=5)[0].detach()
    loss = (whitening(z, 1) - target).square().sum()
    gradient, = torch.autograd.grad(loss, z)
    x = (z - z.mean(1, keepdim=True)).detach()
    return abs(float((gradient * x).sum() / gradient.norm() / x.norm()))


@exact("A12", "Weng et al. 2022, Definition 1",
       "A fully whitened matrix has stable-rank = Rank = d.",
       missing="the decorrelation (batch norm in its place)", kinds=("bn",))
def whitened_rank(kinds=("zca", "cholesky", "pca")):
    errors = []
    for kind in kinds:
        figures = common.collapse_metrics(whiten(embeddings(40, 8, 1)[0], kind))
        errors += [torch.tensor([figures["stable_rank"] - 8, figures["rank"] - 8])]
    return largest(*errors)


def stable_rank_of(z):
    return common.collapse_metrics(z)["stable_rank"]


def sum_of_singular_values(z):
    return torch.linalg.svdvals(z - z.mean(0)).sum().item()


@exact("A12-order", "Weng et al. 2022, Definition 1", "stable-rank(A) <= Rank(A) <= d.",
       missing="the division by the largest singular value", stable_rank=sum_of_singular_values)
def order_of_ranks(stable_rank=stable_rank_of):
    error = 0.0
    for seed in range(20):
        rank, d = 1 + seed % 8, 8
        z = embeddings(30, rank, 1, seed)[0] @ embeddings(rank, d, 1, seed + 50)[0]
        found = common.collapse_metrics(z)["rank"]
        error = max(error, stable_rank(z) - found, found - d, abs(found - rank))
    return error


# ==============================================================================
# Document 001: the unified gradient, as positive term, negative term and balance
# ==============================================================================
#
# gradient = positive + balance * negative, for the rows that the loss sees (of unit length in
# SimCLR, MoCo and UniGrad, standardised in Barlow Twins), each [N, d].


def simclr_terms(z1, z2, temperature=0.5):
    """Of all 2N anchors: each row as its own anchor, and as a target of the others."""
    u = of_length_1(torch.cat([z1, z2])).detach()
    s = (u @ u.T / temperature).fill_diagonal_(-math.inf).softmax(1)
    scale = 1 / (len(u) * temperature)
    return -2 * scale * u.roll(len(z1), 0), scale * (s @ u + s.T @ u), 1.0


def moco_terms(q, k, queue, temperature=0.1):
    """Of the queries. The negatives' sum has the positive key too."""
    q, k = of_length_1(q).detach(), of_length_1(k).detach()
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], dim=1) / temperature
    s = logits.softmax(1)
    scale = 1 / (len(q) * temperature)
    return -scale * k, scale * (s[:, :1] * k + s[:, 1:] @ queue), 1.0


def byol_terms(z, target, w):
    """Of BYOL's loss 2 - 2 cos with a symmetric linear predictor W [d, d], for rows z as they are.

    balance [N, 1] = z^T W z' / z^T W^2 z, z' the target of unit length."""
    z, t = z.detach(), of_length_1(target).detach()
    p = z @ w
    scale = 2 / (len(z) * p.norm(dim=1, keepdim=True))
    balance = (p * t).sum(1, keepdim=True) / p.square().sum(1, keepdim=True)
    return -scale * (t @ w), scale * (p @ w), balance


def barlow_terms(z1, z2, lambd=0.0051):
    """Of view 1. A = I - (1 - lambda) diag(C). The negatives are the batch's other rows."""
    q, k = standardised(z1).detach(), standardised(z2).detach()
    n = len(q)
    a = 1 - (1 - lambd) * (q * k).mean(0)  # the diagonal of A
    return -2 / n * k * a, 2 / n * (k @ k.T / n) @ q, lambd


def vicreg_terms(z1, z2, inv=25.0, var=25.0, cov=1.0):
    """Of view 1: invariance, and covariance with variance. The weights are in the terms."""
    x, y = z1.detach(), z2.detach()
    n, d = x.shape
    x_c = centred(x)
    sigma = (x.var(0) + 1e-4).sqrt()
    covariance = x_c.T @ x_c / (n - 1)
    off_diagonal = covariance - torch.diag(covariance.diagonal())
    spread = -x_c / sigma * (sigma < 1) / (d * (n - 1))
    return (2 * inv / (n * d) * (x - y),
            4 * cov / (d * (n - 1)) * x_c @ off_diagonal + var / 2 * spread, 1.0)


def unigrad_terms(z, target, correlation, lambd=100.0):
    """Of rows z of unit length."""
    u, t = of_length_1(z).detach(), of_length_1(target).detach()
    return -t / len(u), u @ correlation / len(u), lambd


def added(positive, negative, balance):
    """The gradient."""
    return positive + balance * negative


def positive_only(positive, negative, balance):
    """The gradient without its negative term."""
    return positive


def pulled_back(z, rows, gradient):
    """The gradient of z for that of rows(z), such as unit rows."""
    return torch.autograd.grad(rows(z), z, gradient)[0]


UNIFIED = "Tao et al. 2022 (UniGrad), arXiv 2112.05141; document 001, section "
THREE = "The gradient is a positive term, weighted negatives and a balance between the two: "


def relative(got, wanted):
    return largest(got - wanted) / largest(wanted)


@exact("B1-simclr", UNIFIED + "2.1.2", THREE + "SimCLR.", missing="the negatives",
       tolerance=1e-10, gradient=positive_only)
def simclr_gradient(gradient=added):
    z1, z2 = embeddings(10, 6)
    wanted = torch.cat(torch.autograd.grad(nt_xent_loss(z1, z2, 0.2), (z1, z2)))
    z = torch.cat([z1, z2])
    got = pulled_back(z, of_length_1, gradient(*simclr_terms(z1, z2, 0.2)))
    return relative(got, wanted)


@exact("B1-moco", UNIFIED + "2.1.1", THREE + "MoCo.", missing="the negatives",
       tolerance=1e-10, gradient=positive_only)
def moco_gradient(gradient=added):
    q, k = embeddings(10, 6)
    queue = of_length_1(embeddings(20, 6, 1, seed=1)[0]).detach()
    wanted, = torch.autograd.grad(info_nce_loss(q, k, queue, 0.1), q)
    got = pulled_back(q, of_length_1, gradient(*moco_terms(q, k, queue, 0.1)))
    return relative(got, wanted)


@exact("B1-byol", UNIFIED + "2.2.1", THREE + "BYOL with DirectPred's predictor.",
       missing="the correlation, which stands for negatives", tolerance=1e-10,
       gradient=positive_only)
def byol_gradient(gradient=added):
    z, target = embeddings(10, 6)
    w = direct_predictor((z.T @ z / 10).detach())
    wanted, = torch.autograd.grad(byol_loss(z @ w, target), z)
    return relative(gradient(*byol_terms(z, target, w)), wanted)


@exact("B1-barlow", UNIFIED + "2.3.1", THREE + "Barlow Twins.",
       missing="the negatives", tolerance=1e-10, gradient=positive_only)
def barlow_gradient(gradient=added):
    z1, z2 = embeddings(10, 6)
    wanted, = torch.autograd.grad(barlow_twins_loss(z1, z2, 0.2), z1)
    got = pulled_back(z1, standardised, gradient(*barlow_terms(z1, z2, 0.2)))
    return relative(got, wanted)


@exact("B1-vicreg", UNIFIED + "1; VICReg's form is ours", THREE + "VICReg.",
       missing="variance and covariance", tolerance=1e-10, gradient=positive_only)
def vicreg_gradient(gradient=added):
    z1, z2 = (0.6 * z for z in embeddings(10, 6))
    wanted, = torch.autograd.grad(vicreg_loss(z1, z2, 3.0, 5.0, 7.0), z1)
    return relative(gradient(*vicreg_terms(z1, z2, 3.0, 5.0, 7.0)), wanted)


@exact("B1-unigrad", "Tao et al. 2022 (UniGrad), arXiv 2112.05141, section 3",
       THREE + "UniGrad's own loss.",
       missing="the correlation", tolerance=1e-10, gradient=positive_only)
def unigrad_gradient(gradient=added):
    z, target = embeddings(10, 6)
    rows = of_length_1(embeddings(30, 6, 1, seed=2)[0]).detach()
    correlation = rows.T @ rows / 30
    wanted, = torch.autograd.grad(unigrad_loss(z, target, correlation, 9.0), z)
    terms = unigrad_terms(z, target, correlation, 9.0)
    return relative(pulled_back(z, of_length_1, gradient(*terms)), wanted)


@exact("B2", UNIFIED + "2.1.2",
       "SimCLR with a stop-gradient on the target branch is MoCo with the rest of the batch as "
       "queue.", missing="the stop-gradient", loss=nt_xent_loss)
def detached_simclr_is_moco(loss=anchor_loss):
    z1, z2 = embeddings(5, 4)
    value = loss(z1, z2, 0.2)
    got = torch.cat(torch.autograd.grad(value, (z1, z2)))
    z = torch.cat([z1, z2])
    keys = of_length_1(z).detach()
    losses = []
    for n in range(10):
        positive = (n + 5) % 10
        rest = [m for m in range(10) if m not in (n, positive)]
        losses += [info_nce_loss(z[n:n + 1], z[positive:positive + 1], keys[rest], 0.2)]
    wanted = sum(losses) / 10
    return largest(value - wanted, got - torch.cat(torch.autograd.grad(wanted, (z1, z2))))


@exact("B10", UNIFIED + "2.3.1, note",
       "If the representation is the same across the batch, standardising makes C zero: the loss "
       "is d and its gradient 0.", missing="the standardisation (rows of length sqrt(d))",
       tolerance=1e-7, loss=l2_loss)
def constant_in_barlow(loss=barlow_twins_loss):
    z1, z2 = (torch.ones(9, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    value = loss(z1, z2, 0.0051)
    return largest(value - 6, *torch.autograd.grad(value, (z1, z2)))


@exact("B10-l2", UNIFIED + "2.3.1, note; the form is ours",
       "With rows of length sqrt(d) in place of the standardising, a constant of equal entries "
       "has no loss but lambda d (d - 1).",
       missing="the rows of length sqrt(d) (the standardisation in its place)",
       loss=barlow_twins_loss)
def constant_in_the_l2_variant(loss=l2_loss):
    z = torch.ones(9, 6, dtype=torch.float64)
    return largest(loss(z, z, 0.0051) - 0.0051 * 6 * 5)


# ==============================================================================
# Document 002: collapse and information
# ==============================================================================


@exact("C2", "document 002, tools for avoiding collapse",
       "If the last layer's weight has vanishing singular values, so has the covariance C.",
       missing="the layer being the last", after=torch.relu)
def rank_of_the_last_layer(after=unchanged):
    error = 0.0
    for rank in (1, 3, 5):
        weight = embeddings(16, rank, 1, rank)[0] @ embeddings(rank, 12, 1, 9)[0]  # [16, 12]
        z = after(embeddings(60, 12, 1, 7)[0] @ weight.T)
        error = max(error, abs(common.collapse_metrics(z)["rank"] - rank))
    return error


@exact("C3", "document 002, entropy of embeddings",
       "The prediction term alone has its minimum, 0, at a constant; with an entropy term a "
       "constant is no longer a minimum.", missing="the entropy term (VICReg's variance)",
       tolerance=1e-6, var=0.0)
def constant_without_entropy(var=25.0):
    z = torch.ones(8, 4, dtype=torch.float64, requires_grad=True)
    alone, both = vicreg_loss(z, z, 25.0, 0.0, 0.0), vicreg_loss(z, z, 25.0, var, 0.0)
    return largest(alone, torch.autograd.grad(alone, z)[0], both - 25.0 * (1 - math.sqrt(1e-4)))


def log_determinant(covariance):
    return torch.linalg.slogdet(covariance)[1]


def log_trace(covariance):
    """The same if all eigenvalues are equal."""
    return torch.log(covariance.diagonal().mean()) * len(covariance)


@exact("C5", "document 002, entropy of embeddings",
       "A Gaussian's entropy is 1/2 log det(2 pi e Sigma): it falls without bound as a dimension "
       "collapses.", missing="the determinant (the trace in its place)", tolerance=1e-6,
       log_size=log_trace)
def entropy_of_a_gaussian(log_size=log_determinant):
    errors = []
    for smallest in (1.0, 1e-2, 1e-4):
        spread = torch.tensor([2.0, 1.0, 0.5, smallest], dtype=torch.float64)
        z = white(50, 4) * spread
        covariance = torch.diag(spread.square())
        wanted = (4 * math.log(2 * math.pi * math.e) + log_size(covariance)) / 2
        entropy = common.collapse_metrics(z, eps=0.0)["entropy"]
        errors += [torch.tensor(entropy) - wanted]
    return largest(*errors)


def around_the_image(z):
    """z [images, views, d] without the mean of each image's views."""
    return z - z.mean(1, keepdim=True)


@exact("C6", "document 002, information bottleneck",
       "For a Gaussian Z that depends on X through its mean, log|C_Z| - E log|C_(Z given X)| is "
       "twice the information about X. For beta > 1, H(Z|X) + (1 - beta) / beta H(Z) falls as it "
       "grows.",
       missing="the term that is conditioned on X", tolerance=1e-9, within=unchanged)
def information_bottleneck(within=around_the_image):
    signal, noise = white(20, 3), white(16, 3, seed=1)  # 20 images, 16 views of each
    surrogates, error = [], 0.0
    for scale in (1.0, 2.0, 4.0):
        gain = scale * torch.tensor([1.0, 0.5, 0.25], dtype=torch.float64)
        z = (signal * gain)[:, None] + noise  # [20, 16, 3]
        total = z.flatten(0, 1)
        total = total - total.mean(0)
        inner = within(z).flatten(0, 1)
        log_total = torch.linalg.slogdet(total.T @ total / len(total))[1]
        log_inner = torch.linalg.slogdet(inner.T @ inner / len(inner))[1]
        ratio = gain.square() * (19 / 20) / (15 / 16)  # variances of signal and noise
        error = max(error, abs(float(log_total - log_inner - torch.log1p(ratio).sum())))
        beta = 4.0
        surrogates += [float(log_inner + (1 - beta) / beta * log_total)]
    falls = surrogates[0] > surrogates[1] > surrogates[2]
    return error if falls else math.inf


@exact("C10", "document 002, Barlow Twins",
       "The loss is 0 if the cross-correlation of the views is the identity. A pair of equal "
       "channels costs 2 lambda.", missing="the redundancy term", tolerance=1e-3, lambd=0.0)
def identity_is_the_minimum(lambd=0.5):
    z = white(40, 4)
    equal = z[:, [0, 1, 2, 2]]
    loss = barlow_twins_loss
    return largest(loss(z, z, lambd), loss(equal, equal, lambd) - 2 * 0.5)


# ==============================================================================
# Document 003: SimSiam
# ==============================================================================


def std_of_unit_rows(z):
    return common.collapse_metrics(z)["std_sqrt_d"]


def std_as_it_is(z):
    return z.std(0, unbiased=False).mean().item() * z.shape[1] ** 0.5


@exact("D2", "Chen and He 2021, section 4.1",
       "The standard deviation of an l2-normalised output is 1 / sqrt(d) in each channel if it is "
       "isotropic, and 0 if it is constant.", missing="the l2-normalisation",
       std=std_as_it_is)
def isotropic_and_constant(std=std_of_unit_rows):
    axes = torch.cat([torch.eye(8), -torch.eye(8)]).double()
    lengths = 1 + torch.arange(16.0).double()[:, None]
    z = embeddings(30, 8, 1)[0].detach()
    u = of_length_1(z)
    identity = u.var(0, unbiased=False).sum() - (1 - u.mean(0).square().sum())
    return largest(torch.tensor(std(lengths * axes) - 1), torch.tensor(std(u[:1] * lengths)),
                   identity)


@exact("D3", "Chen and He 2021, section 4.2",
       "Without a predictor, the symmetric loss with stop-gradient has half the gradient of the "
       "loss without, so it collapses too.", missing="the symmetry", symmetric=False)
def half_the_gradient(symmetric=True):
    z1, z2 = embeddings(10, 6)
    stopped = negative_cosine(z1, z2.detach())
    if symmetric:
        stopped = stopped / 2 + negative_cosine(z2, z1.detach()) / 2
    half = torch.autograd.grad(stopped, (z1, z2), allow_unused=True, materialize_grads=True)
    whole = torch.autograd.grad(negative_cosine(z1, z2), (z1, z2))
    return largest(*(2 * a - b for a, b in zip(half, whole)))


# ==============================================================================
# Document 004: contrast, teachers, clusters
# ==============================================================================


def gaussian_pairs(count, d, rho, seed=0):
    """x, y [count, d], each pair of coordinates with correlation rho; their information in nats."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, d))
    y = rho * x + math.sqrt(1 - rho**2) * rng.standard_normal((count, d))
    return torch.tensor(x), torch.tensor(y), -d / 2 * math.log(1 - rho**2)


def log_density(x, y, rho):
    """log p(y_j | x_i) up to a constant: [N, N]."""
    distances = y.square().sum(1) - 2 * rho * x @ y.T + rho**2 * x.square().sum(1)[:, None]
    return -distances / (2 * (1 - rho**2))


def log_ratio(x, y, rho):
    """log p(y_j | x_i) / p(y_j): [N, N], up to a constant."""
    return log_density(x, y, rho) + y.square().sum(1) / 2


def contrast(scores, k, positive=True):
    """InfoNCE in batches of K: the mean of -log softmax of the positive. scores: [N, N].

    positive=False leaves the positive out of the denominator."""
    losses = []
    for rows in torch.arange(len(scores)).split(k):
        block = scores[rows][:, rows]
        terms = block if positive else block.clone().fill_diagonal_(-math.inf)
        losses += [terms.logsumexp(1) - block.diagonal()]
    return float(torch.cat(losses).mean())


@exact("E8", "document 004, InfoNCE; van den Oord et al. 2018",
       "log K - L is at most the information of x and y and at most log K, which it reaches where "
       "there is much more information; with enough negatives it reaches the information.",
       missing="the positive in the denominator", tolerance=0.05,
       loss=functools.partial(contrast, positive=False))
def info_nce_bound(loss=contrast):
    errors = []
    for d, rho in ((1, 0.6), (20, 0.8)):  # 0.2 and 10 nats
        x, y, information = gaussian_pairs(2048, d, rho)
        scores = log_ratio(x, y, rho)
        for k in (2, 16, 256):
            bound = math.log(k) - loss(scores, k)
            errors += [bound - information, bound - math.log(k)]
            if information > 2 * math.log(k) or (k == 256 and information < 1):
                errors += [min(information, math.log(k)) - bound]
    return max(errors)


@exact("E8-critic", "document 004, InfoNCE",
       "The score log(p(y|x) / p(y)) has a lower loss than others, whatever the number of "
       "negatives.",
       missing="the density p(y)", tolerance=0.0, best=log_density)
def best_critic(best=log_ratio):
    x, y, _ = gaussian_pairs(1024, 2, 0.7, seed=1)
    others = [a * log_ratio(x, y, 0.7) for a in (0.5, 0.8, 1.25, 2.0)]
    others += [log_ratio(x, y, 0.6), log_ratio(x, y, 0.8), log_density(x, y, 0.7)]
    error = 0.0
    for k in (2, 16, 128):
        lowest = min(contrast(scores, k) for scores in others)
        error = max(error, contrast(best(x, y, 0.7), k) - lowest + 1e-12)
    return error


@exact("E6", "Caron et al. 2021 (DINO), section 5.3",
       "Centring keeps a constant target from becoming one-hot: it becomes uniform, with entropy "
       "log K.", missing="the centring", tolerance=1e-6, share=0.0)
def centred_constant(share=0.1):
    teacher = embeddings(1, 12, 1)[0].detach()
    centre = torch.zeros_like(teacher)
    for _ in range(400):
        target = ((teacher - centre) / 0.04).softmax(1)
        centre = centre.lerp(teacher, share)
    entropy = float(-(target * target.clamp_min(1e-300).log()).sum())
    return abs(entropy - math.log(12))


def softmax_codes(scores):
    return (scores / 0.05).softmax(1)


@exact("E9", "document 004, SwAV",
       "Equal partition prevents collapse: even if all images prefer one prototype, Sinkhorn's "
       "codes use all of them alike.", missing="Sinkhorn-Knopp (a softmax in its place)",
       tolerance=0.02, codes=softmax_codes)
def equal_partition(codes=sinkhorn):
    g = torch.Generator().manual_seed(0)
    scores = 0.02 * torch.randn(64, 8, generator=g, dtype=torch.float64)
    scores[:, 3] += 0.9
    usage = codes(scores).mean(0)
    return math.log(8) + float((usage * usage.clamp_min(1e-300).log()).sum())
