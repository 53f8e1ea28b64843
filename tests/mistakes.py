"""The usual mistakes, computed: every loss a third time, with a word that chooses a mistake.

handout.py writes the wrong values of these functions, with their sentences, beside the right ones
of reference.py, so that a check can say which mistake it sees. Nothing here is handed out. With
`mistake=None` each function agrees with reference.py (tests/test_handout.py).
`python tests/mistakes.py` prints all sentences.

A function whose loss draws at random gives a list: the loss of every possible draw.
A sentence goes on after "This is what one gets when ...".
"""

import contextlib
import importlib
import io
import itertools
import math
import os
import sys
from dataclasses import dataclass, field

ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
sys.path[1:1] = [ROOT, os.path.join(ROOT, "methods")]
import common  # noqa: E402
import check  # noqa: E402
import reference as ref  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

# ==============================================================================
# What is asked, and its cases
# ==============================================================================


@dataclass(kw_only=True)
class Function:
    """A function that students write: how it is called, what is right, what goes wrong.

    variant(**inputs, **settings, mistake): a tensor or, if the loss draws, the list of all
    outcomes. reference: the same in numpy, without mistakes. order: the arguments by their place.
    cases(rng): pairs (inputs, settings), the smallest first. held: inputs that should get no
    gradient. lists: inputs that are passed as lists. large: shapes and settings of a case that
    takes too long in a loop over entries. values_only: numbers of cases that have too many draws
    for gradients, each with the mistakes that it is for. tensor: the result is not a scalar.
    share: of the ten points of a part. hint: said of a gradient that is not finite, or huge."""

    call: str
    order: str
    asked: str
    variant: object
    reference: object
    cases: object
    mistakes: dict
    held: tuple = ()
    lists: tuple = ()
    large: object = None
    values_only: dict = field(default_factory=dict)
    tensor: bool = False
    share: int = 10
    hint: str = ""


def integers(rng, *shape):
    """Small whole numbers, no row of zeros: a case to redo by hand."""
    while True:
        z = rng.integers(-2, 4, shape).astype(float)
        if (np.abs(z).sum(-1) > 0).all():
            return z


def pair(rng, n, d, s=2):
    """s views [n, d]: alike but not equal, correlated channels, not centred, one decimal."""
    shared, mix = rng.standard_normal((n, d)), np.eye(d) + 0.3 * rng.standard_normal((d, d))
    views = [(shared + 0.5 * rng.standard_normal((n, d))) @ mix + 0.3 for _ in range(s)]
    return [view.round(1) for view in views]


def identity(s):
    return torch.eye(len(s), dtype=s.dtype)


def unit(z, dim=1):
    return z / z.norm(dim=dim, keepdim=True)


EQUAL = ("Where eigenvalues of S are equal, autograd's gradient of eigh divides by 0: "
         "InverseSquareRoot says what to do.")

# ==============================================================================
# SimCLR and MoCo
# ==============================================================================


def nt_xent(z1, z2, temperature, mistake=None):
    n = len(z1)
    z = torch.cat([z1, z2])
    if mistake == "channels":
        z = unit(z, 0)
    elif mistake != "length":
        z = unit(z)
    keys = z.detach() if mistake == "detached" else z
    scale = {"times": temperature, "no temperature": 1.0}.get(mistake, 1 / temperature)
    logits = z @ keys.T * scale
    itself = torch.eye(2 * n, dtype=torch.bool)
    other = itself.roll(n, 0)
    positive = logits[other]
    hidden = itself
    if mistake == "self":
        hidden = torch.zeros_like(itself)
    if mistake == "no positive":
        hidden = itself | other
    if mistake == "across":
        hidden = torch.eye(2, dtype=torch.bool).repeat_interleave(n, 0).repeat_interleave(n, 1)
    if mistake == "wrong pair":
        positive = logits[torch.eye(2 * n, dtype=torch.bool).roll(1, 0)]
    logits = logits.masked_fill(hidden, 0.0 if mistake == "zero" else -math.inf)
    losses = logits.logsumexp(1) - positive
    if mistake == "sign":
        losses = -losses
    if mistake == "half":
        losses = losses[:n]
    if mistake == "twice":
        losses = 2 * losses
    return losses.sum() if mistake == "sum" else losses.mean()


def simclr_cases(rng):
    yield dict(z1=integers(rng, 2, 2), z2=integers(rng, 2, 2)), dict(temperature=0.5)
    yield dict(zip(("z1", "z2"), pair(rng, 5, 4))), dict(temperature=0.5)
    yield dict(zip(("z1", "z2"), pair(rng, 3, 3))), dict(temperature=0.2)


SIMCLR = [Function(
    call="nt_xent_loss", order="z1 z2 temperature",
    asked="Eq. 1, the mean over all 2N anchors",
    variant=nt_xent, cases=simclr_cases,
    reference=lambda z1, z2, temperature: ref.nt_xent([z1, z2], temperature),
    large=(dict(z1=(512, 16), z2=(512, 16)), dict(temperature=0.5)),
    mistakes={
        "self": "a view is compared with itself: mask k = i (Eq. 1)",
        "length": "the embeddings do not have length 1: divide each row by its length",
        "channels": "columns instead of rows are brought to length 1: a row is an embedding",
        "times": "similarities are multiplied by the temperature: divide by it (Eq. 1)",
        "no temperature": "the temperature is left out: divide every similarity by it (Eq. 1)",
        "sign": "the sign is wrong: Eq. 1 begins with a minus",
        "sum": "the anchors are added up: take the mean over the 2N anchors",
        "no positive": "the positive is not in the denominator: only k = i is left out (Eq. 1)",
        "half": "only the N views of z1 are anchors: those of z2 are anchors too",
        "across": "an anchor is compared with the other view of the images only: "
                  "the denominator has 2N - 1 terms, other images of the same view among them",
        "zero": "k = i is masked with a logit of 0, which still adds exp(0) = 1: "
                "mask it with minus infinity",
        "wrong pair": "the neighbouring row is taken as the positive: "
                      "the other view of image i is N rows away",
        "twice": "both views are added: L is the mean over 2N anchors, not twice that",
        "detached": "no gradient flows into the embeddings that an anchor is compared with: "
                    "SimCLR has no stop-gradient",
    })]


def info_nce(q, k, queue, temperature, mistake=None):
    if mistake != "q length":
        q = unit(q)
    if mistake != "k length":
        k = unit(k)
    if mistake not in ("k gradient", "q detached"):
        k = k.detach()
    if mistake == "q detached":
        q = q.detach()
    queue = queue if mistake == "queue gradient" else queue.detach()
    positive, negatives = (q * k).sum(1, keepdim=True), q @ queue.T
    if mistake == "batch":
        negatives = q @ k.T
        negatives = negatives.masked_fill(torch.eye(len(q), dtype=torch.bool), -math.inf)
    if mistake == "batch too":
        others = (q @ k.T).masked_fill(torch.eye(len(q), dtype=torch.bool), -math.inf)
        negatives = torch.cat([negatives, others], 1)
    if mistake == "times":
        positive, negatives = positive * temperature, negatives * temperature
    elif mistake == "positive only":
        positive = positive / temperature
    elif mistake == "negatives only":
        negatives = negatives / temperature
    elif mistake != "no temperature":
        positive, negatives = positive / temperature, negatives / temperature
    logits = torch.cat([positive, negatives], 1)
    if mistake == "no positive":
        logits = negatives
    label = negatives[:, :1] if mistake == "last" else positive
    losses = logits.logsumexp(1) - label[:, 0]
    if mistake == "sign":
        losses = -losses
    return losses.sum() if mistake == "sum" else losses.mean()


def moco_cases(rng):
    for n, d, size, temperature in ((2, 2, 2, 0.5), (5, 4, 7, 0.1), (3, 3, 5, 0.2)):
        q, k = pair(rng, n, d) if d > 2 else (integers(rng, n, d), integers(rng, n, d))
        queue = ref.unit_rows(rng.standard_normal((size, d)))
        if d == 2:
            queue = np.array([[1.0, 0.0], [0.6, 0.8]])
        yield dict(q=q, k=k, queue=queue), dict(temperature=temperature)


MOCO = [Function(
    call="info_nce_loss", order="q k queue temperature",
    asked="Eq. 1; only q gets a gradient",
    variant=info_nce, cases=moco_cases, held=("k", "queue"), reference=ref.info_nce,
    large=(dict(q=(512, 16), k=(512, 16), queue=(2048, 16)), dict(temperature=0.5)),
    mistakes={
        "q length": "the queries do not have length 1: divide each row by its length",
        "k length": "the keys do not have length 1: divide each row by its length",
        "times": "logits are multiplied by the temperature: divide by it (Eq. 1)",
        "no temperature": "the temperature is left out: divide every logit by it (Eq. 1)",
        "positive only": "only the positive is divided by the temperature: divide all logits",
        "negatives only": "only the negatives are divided by the temperature: divide all logits",
        "sign": "the sign is wrong: Eq. 1 is minus a logarithm",
        "sum": "the queries are added up: take their mean",
        "no positive": "the positive is not in the denominator: it is one of K + 1 terms (Eq. 1)",
        "batch": "the negatives are the other keys of the batch: they are the K keys of the queue",
        "batch too": "the other keys of the batch are negatives besides the queue: "
                     "the denominator has K + 1 terms (Eq. 1)",
        "last": "the first key of the queue is taken as the positive: "
                "the positive is the query's own key k",
        "k gradient": "gradient flows into the keys: detach k, the target gets none",
        "queue gradient": "gradient flows into the queue: detach it, the queue gets none",
        "q detached": "the queries are detached and the keys are not: it is the other way round",
    })]

# ==============================================================================
# BYOL and SimSiam
# ==============================================================================


def normalised_distance(p, z, mistake=None):
    if mistake == "columns":
        p, z = unit(p, 0), unit(z, 0)
    elif mistake != "length":
        p, z = (p if mistake == "p length" else unit(p)), (z if mistake == "z length" else unit(z))
    if mistake == "p detached":
        p = p.detach()
    elif mistake != "z gradient":
        z = z.detach()
    squares = (p - z).square()
    if mistake == "entries":
        return squares.mean()
    losses = squares.sum(1)
    if mistake == "half":
        losses = losses / 2
    if mistake == "sign":
        losses = 4 - losses
    if mistake == "cosine":
        losses = losses / 2 - 1
    if mistake == "root":
        losses = losses.sqrt()
    return losses.sum() if mistake == "sum" else losses.mean()


def p_and_z(rng):
    yield dict(p=integers(rng, 2, 2), z=integers(rng, 2, 2)), {}
    yield dict(zip("pz", pair(rng, 5, 4))), {}


BYOL = [Function(
    call="byol_loss", order="p z",
    asked="Eq. 2 in one direction, the mean over the batch; no gradient into z",
    variant=normalised_distance, cases=p_and_z, held=("z",), reference=ref.byol,
    large=(dict(p=(50_000, 4), z=(50_000, 4)), {}),
    mistakes={
        "length": "p and z do not have length 1: divide each row by its length (Eq. 2)",
        "p length": "p does not have length 1: divide each row by its length (Eq. 2)",
        "z length": "z does not have length 1: divide each row by its length (Eq. 2)",
        "columns": "columns instead of rows are brought to length 1: a row is an embedding",
        "half": "the loss is 1 - cos: Eq. 2 is 2 - 2 cos",
        "cosine": "the loss is -cos, SimSiam's: Eq. 2 is 2 - 2 cos",
        "sign": "the sign of the cosine is wrong: Eq. 2 is 2 - 2 cos, not 2 + 2 cos",
        "sum": "the images are added up: take the mean over the batch",
        "entries": "the mean is over all N d entries: add up the d squares of each image (Eq. 2)",
        "root": "the root of the squared distance is taken: Eq. 2 has the square",
        "z gradient": "gradient flows into z: detach z, the target gets none",
        "p detached": "p is detached instead of z: the gradient goes through the prediction",
    })]


def minus_cosine(p, z, mistake=None):
    if mistake == "columns":
        p, z = unit(p, 0), unit(z, 0)
    elif mistake != "length":
        p, z = (p if mistake == "p length" else unit(p)), (z if mistake == "z length" else unit(z))
    p = p.detach() if mistake == "p detached" else p
    z = z.detach() if mistake == "z detached" else z
    if mistake == "entries":
        return -(p * z).mean()
    losses = -(p * z).sum(1)
    if mistake == "sign":
        losses = -losses
    if mistake == "one":
        losses = 1 + losses
    if mistake == "byol":
        losses = 2 + 2 * losses
    if mistake == "all pairs":
        return -(p @ z.T).mean()
    return losses.sum() if mistake == "sum" else losses.mean()


SIMSIAM = [Function(
    call="negative_cosine", order="p z",
    asked="D(p, z) of Eq. 1, the mean over the batch; z is not detached here",
    variant=minus_cosine, cases=p_and_z, reference=ref.negative_cosine,
    large=(dict(p=(50_000, 4), z=(50_000, 4)), {}),
    mistakes={
        "length": "p and z do not have length 1: divide each row by its length (Eq. 1)",
        "p length": "p does not have length 1: divide each row by its length (Eq. 1)",
        "z length": "z does not have length 1: divide each row by its length (Eq. 1)",
        "columns": "columns instead of rows are brought to length 1: a row is an embedding",
        "sign": "the sign is wrong: D is minus the cosine (Eq. 1)",
        "one": "1 is added: D is minus the cosine, at least -1 (Eq. 1)",
        "byol": "the loss is 2 - 2 cos, BYOL's: D is minus the cosine (Eq. 1)",
        "sum": "the images are added up: take the mean over the batch",
        "entries": "the mean is over all N d entries: add up the d products of each image",
        "all pairs": "each prediction is compared with all targets: compare row n with row n",
        "z detached": "z is detached inside: this function differentiates both, forward detaches z",
        "p detached": "p is detached: the gradient goes through the prediction",
    })]

# ==============================================================================
# Barlow Twins and VICReg
# ==============================================================================


def cross_correlation(z1, z2, lambd, mistake=None):
    n, d = z1.shape
    if mistake == "itself":
        z2 = z1
    divisor = n - 1 if mistake in ("unbiased", "std") else n
    if mistake == "rows":
        z1, z2 = unit(z1) * math.sqrt(d), unit(z2) * math.sqrt(d)
    else:
        standard = []
        for z in (z1, z2):
            x = z - z.mean(0)
            variance = x.square().sum(0) / divisor
            if mistake == "outside":
                spread = variance.sqrt() + 1e-5
            else:
                spread = (variance + (0 if mistake in ("no eps", "std") else 1e-5)).sqrt()
            if mistake == "variance":
                spread = spread.square()
            if mistake == "not scaled":
                spread = 1.0
            standard += [(z if mistake == "not centred" else x) / spread]
        z1, z2 = standard
    if mistake == "samples":
        c = z1 @ z2.T / d
    else:
        c = z1.T @ z2 / (1 if mistake == "not divided" else n)
    if mistake == "detached":
        c = z1.T @ z2.detach() / n
    on = (1 - c.diagonal()).square().sum()
    all_ = c.square().sum()
    off = all_ - c.diagonal().square().sum()
    if mistake == "diagonal too":
        off = all_
    if mistake == "not squared":
        off = c.abs().sum() - c.diagonal().abs().sum()
    if mistake == "lambda on":
        return lambd * on + off
    if mistake == "no lambda":
        return on + off
    if mistake == "sum not square":
        on = (1 - c.diagonal()).sum()
    total = on + lambd * off
    return total / d if mistake == "over d" else total


def barlow_cases(rng):
    yield dict(z1=integers(rng, 3, 2), z2=integers(rng, 3, 2)), dict(lambd=0.5)
    yield dict(zip(("z1", "z2"), pair(rng, 6, 4))), dict(lambd=0.5)
    z1, z2 = pair(rng, 6, 3)
    z1[:, 0] *= 0.005  # a channel that has nearly collapsed: eps matters
    yield dict(z1=z1, z2=z2), dict(lambd=0.1)


BARLOW = [Function(
    call="barlow_twins_loss", order="z1 z2 lambd",
    asked="Eq. 1 and 2; each channel has mean 0, and is divided by sqrt(variance + 1e-5), "
          "the variance with divisor N",
    variant=cross_correlation, cases=barlow_cases, reference=ref.barlow,
    large=(dict(z1=(128, 512), z2=(128, 512)), dict(lambd=0.005)),
    mistakes={
        "unbiased": "the variance has the divisor N - 1: a batch norm has N",
        "not centred": "the channels are not centred: subtract each channel's mean",
        "not scaled": "the channels are not scaled: divide by their standard deviation",
        "variance": "the channels are divided by the variance: divide by its root",
        "no eps": "1e-5 is not added to the variance: a constant channel would give 0 / 0",
        "std": "std() is taken: its variance has the divisor N - 1, where a batch norm has N, "
               "and 1e-5 is not added to it",
        "outside": "1e-5 is added to the standard deviation: add it to the variance, in the root",
        "rows": "rows are brought to one length: standardise each channel over the batch instead",
        "not divided": "C is not divided by N (Eq. 2)",
        "over d": "the loss is divided by d: Eq. 1 is a sum",
        "samples": "samples are correlated with samples: C is Z1^T Z2 / N, of [d, d] (Eq. 2)",
        "itself": "z1 is correlated with itself: C is between the two views (Eq. 2)",
        "lambda on": "lambda weights the diagonal: it weights the other entries (Eq. 1)",
        "no lambda": "lambda is left out: it weights the entries off the diagonal (Eq. 1)",
        "diagonal too": "the diagonal is in the second sum too: there i and j differ (Eq. 1)",
        "not squared": "the entries off the diagonal are not squared (Eq. 1)",
        "sum not square": "1 - C_ii is not squared (Eq. 1)",
        "detached": "no gradient flows into z2: Barlow Twins has no stop-gradient",
    })]


def three_terms(z1, z2, inv_weight, var_weight, cov_weight, mistake=None):
    n, d = z1.shape
    below = n if mistake == "biased" else n - 1

    def variance(z):
        var = (z - z.mean(0)).square().sum(0) / below
        eps = 0 if mistake == "no eps" else 1e-4
        spread = var if mistake == "no root" else (var + eps).sqrt()
        if mistake == "outside":
            spread = var.clamp(min=1e-24).sqrt() + 1e-4
        gap = 1 - spread
        gap = gap if mistake == "no hinge" else gap.clamp(min=0)
        gap = gap.square() if mistake == "squared hinge" else gap
        return gap.sum() if mistake == "variance sum" else gap.mean()

    def covariance(z):
        x = z if mistake == "not centred" else z - z.mean(0)
        c = x.T @ x / (n if mistake == "covariance over n" else below)
        total = c.square().sum()
        if mistake != "diagonal too":
            total = total - c.diagonal().square().sum()
        return total if mistake == "covariance sum" else total / d

    if mistake == "detached":
        z2 = z2.detach()
    s = (z1 - z2).square().mean() * (d if mistake == "paper" else 1)
    if mistake == "invariance sum":
        s = (z1 - z2).square().sum()
    v, c = variance(z1) + variance(z2), covariance(z1) + covariance(z2)
    if mistake == "one branch":
        v, c = 2 * variance(z1), covariance(z1)
    if mistake == "covariance half":
        c = c / 2
    v = v if mistake in ("not halved", "paper") else v / 2
    if mistake == "swapped":
        inv_weight, cov_weight = cov_weight, inv_weight
    if mistake == "sign":
        v = -v
    return inv_weight * s + var_weight * v + cov_weight * c


def vicreg_cases(rng):
    weights = dict(inv_weight=3.0, var_weight=2.0, cov_weight=1.0)
    yield dict(z1=integers(rng, 3, 2) / 2, z2=integers(rng, 3, 2) / 2), weights
    yield dict(zip(("z1", "z2"), (0.6 * z for z in pair(rng, 6, 4)))), weights
    z1, z2 = (0.6 * z for z in pair(rng, 5, 3))
    z1[:, 0] *= 0.005  # a channel that has nearly collapsed: eps matters
    yield dict(z1=z1, z2=z2), dict(inv_weight=25.0, var_weight=25.0, cov_weight=1.0)


VICREG = [Function(
    call="vicreg_loss", order="z1 z2 inv_weight var_weight cov_weight",
    asked="Eq. 1 to 6 in the official code's scale: s is a mean over N and d, "
          "and the two variance terms are halved",
    variant=three_terms, cases=vicreg_cases, reference=ref.vicreg,
    large=(dict(z1=(128, 512), z2=(128, 512)),
                       dict(inv_weight=25.0, var_weight=25.0, cov_weight=1.0)),
    mistakes={
        "biased": "variance and covariance have the divisor N: it is N - 1 (Eq. 1 and 3)",
        "covariance over n": "the covariance has the divisor N: it is N - 1 (Eq. 3)",
        "paper": "the terms have the scale of the paper's equations: this task takes the code's, "
                 "s as a mean over N and d, and half the sum of the variance terms",
        "not halved": "the variance terms are added: take half of their sum",
        "covariance half": "the covariance terms are halved: they are added",
        "no root": "the hinge takes the variance: it takes the standard deviation (Eq. 1)",
        "no hinge": "the hinge is missing: a standard deviation above 1 costs nothing (Eq. 1)",
        "squared hinge": "the hinge is squared (Eq. 1 has no square)",
        "no eps": "1e-4 is not added to the variance (Eq. 1)",
        "outside": "1e-4 is added to the standard deviation: add it to the variance, in the root",
        "variance sum": "the hinges of the channels are added up: take their mean (Eq. 1)",
        "diagonal too": "the variances are in the covariance term: there i and j differ (Eq. 4)",
        "not centred": "the covariance is not centred: subtract each channel's mean (Eq. 3)",
        "covariance sum": "the covariance term is not divided by d (Eq. 4)",
        "invariance sum": "the squared differences are added up: take their mean over N and d",
        "one branch": "variance and covariance of z1 alone are taken: z2 has them too (Eq. 6)",
        "swapped": "inv_weight and cov_weight have changed places",
        "sign": "the variance term has a minus: Eq. 6 adds it",
        "detached": "no gradient flows into z2: VICReg has no stop-gradient",
    })]

# ==============================================================================
# W-MSE
# ==============================================================================


def whiten(z, kind, eps, mistake=None):
    if kind == "none" and mistake != "none centred":
        return z
    w, d = z.shape
    if mistake == "axis":
        x = z - z.mean(1, keepdim=True)
        s = x @ x.T / (d - 1)
        s = (1 - eps) * s + (eps + 1e-3) * identity(s)
        return torch.linalg.solve(torch.linalg.cholesky(s), x)
    x = z if mistake == "not centred" else z - z.mean(0)
    if kind == "none":
        return x
    s = x.T @ x / (w if mistake == "biased" else w - 1)
    if mistake == "detached":
        s = s.detach()
    if mistake == "added":
        s = s + eps * identity(s)
    elif mistake != "no eps":
        s = (1 - eps) * s + eps * identity(s)
    if kind == "bn":
        spread = s.diagonal().sqrt()
        return x / (spread.square() if mistake == "variance" else spread)
    if kind == "zca":
        return x @ inverse_root(s, mistake)
    low = torch.linalg.cholesky(s)
    if mistake == "coloured":
        return x @ low
    if mistake == "transposed":
        return x @ torch.linalg.inv(low)
    if mistake == "inverse":
        return x @ torch.linalg.cholesky(torch.linalg.inv(s)).mT
    if mistake == "no root":
        return x @ torch.linalg.inv(s)
    return x @ torch.linalg.inv(low).mT


def inverse_root(s, mistake=None):
    """S^(-1/2). Autograd's gradient of eigh divides by differences of eigenvalues: where two are
    equal, Newton's iteration takes its place."""
    if mistake == "no root":
        return torch.linalg.inv(s)
    values, u = torch.linalg.eigh(s)
    if len(s) > 1 and values.diff().min() < 1e-3 * values.max():
        scale = s.detach().norm()
        y, root = s / scale, identity(s)
        for _ in range(25):
            t = (3 * identity(s) - root @ y) / 2
            y, root = y @ t, t @ root
        root = root / scale.sqrt()
    else:
        root = u / values.sqrt() @ u.T
    return s @ root if mistake == "coloured" else root


def whiten_cases(rng):
    yield dict(z=np.array([[0.0, 0], [2, 0], [0, 2]]) + rng.integers(-1, 2, 2)), \
        dict(kind="cholesky", eps=0.0)
    for kind in ("cholesky", "zca", "bn", "none"):
        yield dict(z=pair(rng, 6, 3, 1)[0]), dict(kind=kind, eps=0.0)
    yield dict(z=pair(rng, 6, 3, 1)[0]), dict(kind="cholesky", eps=0.2)
    yield dict(z=pair(rng, 6, 3, 1)[0]), dict(kind="zca", eps=0.2)
    yield dict(z=equal_rows(rng)), dict(kind="zca", eps=0.0)


def equal_rows(rng, rows=4, columns=3):
    """Columns of mean 0 with covariance I: all eigenvalues are equal, up to rounding."""
    z = np.linalg.qr(rng.standard_normal((rows + 1, columns + 1)))[0]
    z = np.linalg.qr(np.c_[np.ones(rows + 1), z[:, :columns]])[0][:, 1:]
    return z * math.sqrt(rows + 1)


WHITEN = {
    "not centred": "the samples are not centred: subtract each channel's mean over the samples",
    "biased": "the covariance has the divisor w: it is w - 1",
    "axis": "samples instead of channels are whitened: S is X^T X / (w - 1), of [d, d]",
    "transposed": "the Cholesky factor is on the wrong side: the rows are L^(-1) x, "
                  "hence Y = X L^(-T)",
    "inverse": "the Cholesky factor of S^(-1) is taken: take that of S, and Y = X L^(-T)",
    "coloured": "the data are multiplied by the root of S: multiply by its inverse",
    "no root": "the data are multiplied by S^(-1): multiply by the inverse of its root",
    "added": "eps I is added to S: S becomes (1 - eps) S + eps I",
    "no eps": "eps is left out: S becomes (1 - eps) S + eps I",
    "detached": "no gradient flows through S: it does, through the mean too",
    "variance": "for `bn`, the channels are divided by the variance: divide by its root",
    "none centred": "for `none`, the mean is subtracted: `none` returns z",
}


def cuts(n, w):
    """All ways to cut n rows into slices of w rows."""
    if n == 0:
        yield []
        return

    def below(rows):
        if not rows:
            yield []
            return
        for rest in itertools.combinations(rows[1:], w - 1):
            left = [row for row in rows[1:] if row not in rest]
            for more in below(left):
                yield [[rows[0], *rest], *more]

    yield from below(list(range(n)))


def mean_distance(views, mistake=None):
    """Mean over images and pairs of 2 - 2 cos."""
    if mistake not in ("length", "euclid"):
        views = [unit(v) for v in views]
    pairs = list(itertools.combinations(views, 2))
    if mistake == "first pair":
        pairs = pairs[:1]
    losses = [(a - b).square().sum(1).mean() for a, b in pairs]
    if mistake == "entries":
        losses = [loss / views[0].shape[1] for loss in losses]
    if mistake == "half":
        losses = [loss / 2 for loss in losses]
    if mistake == "sign":
        losses = [4 - loss for loss in losses]
    return sum(losses) / (1 if mistake == "pairs added" else len(losses))


def in_slices(view, slices, transform):
    """transform(rows of a slice, number of the slice), put back where the rows were."""
    out = torch.zeros_like(view)
    for number, rows in enumerate(slices):
        out = out.index_copy(0, torch.tensor(rows), transform(view[rows], number))
    return out


def whitened_views(views, w_size, w_iter, kind, eps, mistake=None):
    views = list(views)
    n = len(views[0])
    possible = list(cuts(n, w_size))
    if mistake == "neighbours":
        possible = [[list(range(i, i + w_size)) for i in range(0, n, w_size)]]
    if mistake == "whole":
        possible = [[list(range(n))]]
    if mistake == "length first":
        views = [unit(v) for v in views]
    one_round = []
    choices = itertools.product(possible, repeat=len(views))
    if mistake != "own slices":
        choices = ([slices] * len(views) for slices in possible)
    for choice in choices:
        white = [in_slices(v, slices, lambda x, _: whiten(x, kind, eps, mistake))
                 for v, slices in zip(views, choice)]
        if mistake == "one-way":
            white[1:] = [v.detach() for v in white[1:]]
        one_round.append(mean_distance(white, mistake))
    if mistake == "one round":
        w_iter = 1
    rounds = itertools.combinations_with_replacement(one_round, w_iter)
    if mistake == "rounds added":
        return [sum(losses) for losses in rounds]
    return [sum(losses) / w_iter for losses in rounds]


def wmse_reference(views, w_size, w_iter, kind, eps):
    one_round = [ref.wmse(views, [slices], kind, eps) for slices in cuts(len(views[0]), w_size)]
    rounds = itertools.combinations_with_replacement(one_round, w_iter)
    return [sum(losses) / w_iter for losses in rounds]


def wmse_cases(rng):
    def case(n, w, d, s=2, rounds=1, kind="cholesky", eps=0.0):
        settings = dict(w_size=w, w_iter=rounds, kind=kind, eps=eps)
        return dict(views=np.array(pair(rng, n, d, s))), settings

    yield case(4, 4, 2)
    yield case(6, 6, 3, s=3, kind="zca", eps=0.2)
    yield case(4, 2, 2, eps=0.3)
    yield case(4, 2, 2, rounds=2, eps=0.3)


LOSS_OF_WHITE = {
    "length": "the whitened embeddings do not have length 1: divide each row by its length",
    "first pair": "with three views, only the first pair counts: take the mean over all pairs",
    "pairs added": "with three views, the pairs are added up: take their mean",
    "entries": "the mean is over all entries: add up the d squares of each image",
    "half": "the loss is 1 - cos: it is 2 - 2 cos",
    "sign": "the sign of the cosine is wrong: the loss is 2 - 2 cos",
    "one-way": "gradient flows into the first view only: it flows into all",
    "whole": "the whole batch is whitened at once: whiten slices of w_size rows",
    "own slices": "each view is cut into slices of its own: the cut is the same for all views",
    "neighbours": "the slices are neighbouring rows, always the same: cut at random",
    "one round": "w_iter is ignored, or all rounds have the same cut: cut anew in each of w_iter "
                 "rounds, take the mean",
    "rounds added": "the rounds are added up: take the mean of w_iter rounds",
}

WMSE = [
    Function(
        call="whiten", order="z kind eps",
        asked="Y with mean 0 and covariance I for `cholesky` and `zca`, variance 1 for `bn`, and z "
              "itself for `none`; the gradient of `zca` is finite where eigenvalues are equal "
              "(`pca` is not checked: its signs are free)",
        variant=whiten, cases=whiten_cases, reference=ref.whiten, tensor=True, share=5, hint=EQUAL,
        large=(dict(z=(20_000, 8)), dict(kind="cholesky", eps=0.0)),
        mistakes=WHITEN),
    Function(
        call="wmse_loss", order="views w_size w_iter kind eps generator",
        asked="2 - 2 cos of the whitened slices, the mean over images, pairs of views and rounds",
        variant=whitened_views, cases=wmse_cases, reference=wmse_reference, lists=("views",),
        share=5,
        mistakes={**LOSS_OF_WHITE,
                  "length first": "the embeddings are brought to length 1 before they are "
                                  "whitened: it is the other way round",
                  **{key: WHITEN[key] for key in ("not centred", "axis", "transposed", "inverse",
                                                  "coloured", "no root", "added", "no eps",
                                                  "detached")}}),
]

# ==============================================================================
# Shuffled-DBN
# ==============================================================================


def decorrelate(z, groups, permutation=None, mistake=None):
    n, d = z.shape
    x = z if mistake == "not centred" else z - z.mean(0)
    order = torch.arange(d) if permutation is None else torch.as_tensor(permutation).long()
    if mistake == "not shuffled":
        order = torch.arange(d)
    if mistake == "one group":
        groups = 1
    x = x[:, order.argsort() if mistake == "inverse order" else order]
    out = []
    for part in x.chunk(groups, 1):
        s = part.T @ part / (n - 1 if mistake == "unbiased" else n)
        if mistake == "detached":
            s = s.detach()
        if mistake == "eps":
            s = s + 1e-3 * identity(s)
        if mistake == "cholesky":
            out += [part @ torch.linalg.inv(torch.linalg.cholesky(s)).mT]
        elif mistake == "bn":
            out += [part / s.diagonal().sqrt()]
        else:
            out += [part @ inverse_root(s, mistake)]
    y = torch.cat(out, 1)
    if mistake == "not put back":
        return y
    if mistake == "permuted twice":
        return y[:, order]
    return y[:, order if mistake == "inverse order" else order.argsort()]


def decorrelate_cases(rng):
    hand = np.array([[3.0, 0], [-3, 0], [0, 1], [0, -1]]) + rng.integers(-1, 2, 2)
    yield dict(z=hand), dict(groups=1, permutation=None)
    for d, groups in ((4, 2), (6, 3)):
        inputs = dict(z=pair(rng, 7, d, 1)[0], permutation=rng.permutation(d))
        yield inputs, dict(groups=groups)
    yield dict(z=equal_rows(rng)), dict(groups=1, permutation=None)


def some_cuts(d, groups):
    """Cuts of d channels into groups, each as an order of the channels."""
    return [[channel for group in cut for channel in group] for cut in cuts(d, d // groups)]


def decorrelated_distance(z1, z2, groups, shuffle=True, mistake=None):
    d = z1.shape[1]
    orders = some_cuts(d, groups) if shuffle and groups < d else [None]
    if mistake == "neighbours":
        orders = [None]
    if mistake == "always shuffled":
        orders = some_cuts(d, groups)
    if mistake == "one group":
        orders = [None]
    choices = itertools.product(orders, repeat=2)
    if mistake == "shared":
        choices = [(order, order) for order in orders]
    outcomes = []
    for first, second in choices:
        a, b = decorrelate(z1, groups, first, mistake), decorrelate(z2, groups, second, mistake)
        if mistake == "one-way":
            b = b.detach()
        if mistake == "length":
            a, b = unit(a), unit(b)
        losses = (a - b).square().sum(1)
        if mistake == "root":
            losses = losses.sqrt()
        if mistake == "entries":
            losses = losses / d
        if mistake == "sign":
            losses = -losses
        outcomes.append(losses.sum() if mistake == "sum" else losses.mean())
    return outcomes


def dbn_reference(z1, z2, groups, shuffle=True):
    orders = some_cuts(len(z1[0]), groups) if shuffle else [None]
    both = itertools.product(orders, repeat=2)
    return [ref.shuffled_dbn(z1, z2, groups, first, second) for first, second in both]


def dbn_cases(rng):
    yield dict(zip(("z1", "z2"), pair(rng, 5, 2))), dict(groups=1, shuffle=False)
    yield dict(zip(("z1", "z2"), pair(rng, 6, 4))), dict(groups=2, shuffle=False)
    yield dict(zip(("z1", "z2"), pair(rng, 6, 4))), dict(groups=2, shuffle=True)


DECORRELATE = {
    "not centred": "the samples are not centred: subtract each channel's mean over the samples",
    "unbiased": "the covariance has the divisor N - 1: it is N",
    "cholesky": "the Cholesky factor is taken: take the symmetric root, Y_k = X_k S_k^(-1/2)",
    "bn": "the channels are only scaled: S_k^(-1/2) mixes those of a group",
    "coloured": "the data are multiplied by the root of S: multiply by its inverse",
    "no root": "the data are multiplied by S^(-1): multiply by S^(-1/2)",
    "eps": "the identity is mixed into S, with 1e-3: S has no eps here",
    "detached": "no gradient flows through S: it does, through the mean too",
    "one group": "all channels are whitened together: cut them into groups",
}

SHUFFLED_DBN = [
    Function(
        call="decorrelate", order="z groups permutation",
        asked="Y_k = X_k S_k^(-1/2) for each group k of permuted channels, all back in place; "
              "the gradient is finite where eigenvalues are equal",
        variant=decorrelate, cases=decorrelate_cases, reference=ref.decorrelate, tensor=True,
        share=5, large=(dict(z=(20_000, 8)), dict(groups=2, permutation=None)),
        hint=EQUAL,
        mistakes={**DECORRELATE,
                  "not shuffled": "the permutation is ignored: it orders the channels before they "
                                  "are cut into groups",
                  "not put back": "the channels stay permuted: bring them back to their places",
                  "permuted twice": "the permutation is applied once more: undo it",
                  "inverse order": "the inverse permutation orders the channels: "
                                   "position i takes channel permutation[i]"}),
    Function(
        call="shuffled_dbn_loss", order="z1 z2 groups generator shuffle",
        asked="the mean over the images of |y1 - y2|^2, with random groups of its own for each "
              "view, or neighbouring channels if shuffle is False",
        variant=decorrelated_distance, cases=dbn_cases, reference=dbn_reference, share=5,
        mistakes={
            "length": "the decorrelated embeddings are brought to length 1: they keep theirs",
            "entries": "the mean is over all N d entries: add up the d squares of each image",
            "sum": "the images are added up: take the mean over the batch",
            "root": "the root of the squared distance is taken: the loss has the square",
            "sign": "the sign is wrong: the distance should become small",
            "one-way": "no gradient flows into z2: there is no stop-gradient",
            "shared": "both views have the same groups: draw groups for each view",
            "neighbours": "the groups are never random: draw a permutation for each view",
            "always shuffled": "shuffle=False is ignored: it means groups of neighbouring channels",
            **{key: DECORRELATE[key] for key in ("unbiased", "cholesky", "bn", "coloured",
                                                 "no root", "detached", "one group")}}),
]

# ==============================================================================
# CW-RGP
# ==============================================================================


def channel_whiten(z, groups, permutation=None, eps=0.0, mistake=None):
    w, d = z.shape
    order = torch.arange(d) if permutation is None else torch.as_tensor(permutation).long()
    if mistake == "not shuffled":
        order = torch.arange(d)
    if mistake == "one group":
        groups = 1
    x = z
    if mistake == "over samples":
        x = z - z.mean(0)
    elif mistake not in ("not centred", "group mean"):
        x = z - z.mean(1, keepdim=True)
    x = x[:, order.argsort() if mistake == "inverse order" else order]
    out = []
    for part in x.chunk(groups, 1):
        if mistake == "group mean":
            part = part - part.mean(1, keepdim=True)
        width = part.shape[1]
        if mistake == "axis":
            s = part.T @ part / max(1, w - 1)
        else:
            s = part @ part.T / (width if mistake == "biased" else width - 1)
        if mistake == "detached":
            s = s.detach()
        if mistake == "added":
            s = s + eps * identity(s)
        elif mistake != "no eps":
            s = (1 - eps) * s + eps * identity(s)
        if mistake == "axis":
            s = s + 1e-3 * identity(s)
            out += [part @ inverse_root(s)]
        elif mistake == "cholesky":
            out += [torch.linalg.solve(torch.linalg.cholesky(s), part)]
        else:
            out += [inverse_root(s, mistake) @ part]
    y = torch.cat(out, 1)
    if mistake == "not put back":
        return y
    if mistake == "permuted twice":
        return y[:, order]
    return y[:, order if mistake == "inverse order" else order.argsort()]


def channel_whiten_cases(rng):
    hand = np.array([[3.0, 1, -1, -3], [1, -3, 3, -1]])[:, rng.permutation(4)]
    plain = dict(groups=1, permutation=None, eps=0.0)
    yield dict(z=hand + rng.integers(-1, 2)), plain
    inputs = dict(z=pair(rng, 2, 8, 1)[0], permutation=rng.permutation(8))
    yield inputs, dict(groups=2, eps=0.0)
    inputs = dict(z=pair(rng, 3, 12, 1)[0], permutation=rng.permutation(12))
    yield inputs, dict(groups=3, eps=0.2)
    yield dict(z=equal_rows(rng, 6, 3).T), plain


def in_rounds(views, groups, w_size, w_iter, eps, mistake=None):
    """The outcomes of one round: cuts of the rows, and of the channels of each slice and view."""
    views = list(views)
    d = views[0].shape[1]
    orders = some_cuts(d, groups)
    if mistake in ("neighbours", "one group"):
        orders = [None]
    row_cuts = list(cuts(len(views[0]), w_size))
    if mistake == "same rows":
        row_cuts = [[list(range(i, i + w_size)) for i in range(0, len(views[0]), w_size)]]
    if mistake == "whole":
        row_cuts = [[list(range(len(views[0])))]]
    if mistake == "length first":
        views = [unit(v) for v in views]
    for slices in row_cuts:
        each = itertools.product(orders, repeat=len(views) * len(slices))
        if mistake == "shared":
            each = (c * len(views) for c in itertools.product(orders, repeat=len(slices)))
        if mistake == "all slices":
            each = ([order for order in c for _ in slices]
                    for c in itertools.product(orders, repeat=len(views)))
        for choice in each:
            white = []
            for v, view in enumerate(views):
                mine = choice[v * len(slices):(v + 1) * len(slices)]
                white += [in_slices(view, slices, lambda x, i, mine=mine: channel_whiten(
                    x, groups, mine[i], eps, mistake))]
            if mistake == "one-way":
                white[1:] = [v.detach() for v in white[1:]]
            yield mean_distance(white, mistake)


def channel_whitened_views(views, groups, w_size, w_iter, eps, mistake=None):
    one_round = list(in_rounds(views, groups, w_size, w_iter, eps, mistake))
    if mistake == "one round":
        w_iter = 1
    rounds = itertools.combinations_with_replacement(one_round, w_iter)
    if mistake == "rounds added":
        return [sum(losses) for losses in rounds]
    return [sum(losses) / w_iter for losses in rounds]


def cw_reference(views, groups, w_size, w_iter, eps):
    s, n, d = np.shape(views)
    one_round = []
    for slices in cuts(n, w_size):
        for choice in itertools.product(some_cuts(d, groups), repeat=s * len(slices)):
            orders = [choice[v * len(slices):(v + 1) * len(slices)] for v in range(s)]
            one_round.append(ref.cw_rgp(views, [slices], [orders], groups, eps))
    rounds = itertools.combinations_with_replacement(one_round, w_iter)
    return [sum(losses) / w_iter for losses in rounds]


def cw_cases(rng):
    def case(n, w, d, groups, s=2, rounds=1, eps=0.0):
        settings = dict(groups=groups, w_size=w, w_iter=rounds, eps=eps)
        return dict(views=np.array(pair(rng, n, d, s))), settings

    yield case(2, 2, 5, 1)
    yield case(3, 3, 6, 1, s=3, eps=0.2)
    yield case(4, 2, 4, 1, eps=0.1)
    yield case(4, 2, 4, 1, rounds=2, eps=0.1)
    yield case(2, 2, 4, 2, eps=0.2)
    yield case(4, 2, 4, 2, eps=0.2)


CHANNEL_WHITEN = {
    "not centred": "the samples are not centred: subtract from each its mean over all d channels",
    "over samples": "the mean over the samples is subtracted: "
                    "subtract from each sample its mean over all d channels",
    "group mean": "each group is centred by itself: the mean is over the channels of all groups",
    "biased": "the covariance has the divisor d / g: it is d / g - 1",
    "axis": "channels instead of samples are whitened: S_k is X_k X_k^T / (d / g - 1), of [w, w]",
    "cholesky": "the Cholesky factor is taken: take the symmetric root, Y_k = S_k^(-1/2) X_k",
    "coloured": "the data are multiplied by the root of S: multiply by its inverse",
    "no root": "the data are multiplied by S^(-1): multiply by S^(-1/2)",
    "added": "eps I is added to S: S becomes (1 - eps) S + eps I",
    "no eps": "eps is left out: S becomes (1 - eps) S + eps I",
    "detached": "no gradient flows through S: it does, through the mean too",
    "one group": "all channels are in one group: cut them into groups",
}

CW_RGP = [
    Function(
        call="channel_whiten", order="z groups permutation eps",
        asked="Y_k = S_k^(-1/2) X_k for each group k of permuted channels, all back in place; "
              "the gradient is finite where eigenvalues are equal",
        variant=channel_whiten, cases=channel_whiten_cases, reference=ref.channel_whiten,
        tensor=True, share=5, hint=EQUAL,
        large=(dict(z=(8, 20_000)), dict(groups=2, permutation=None, eps=0.0)),
        mistakes={**CHANNEL_WHITEN,
                  "not shuffled": "the permutation is ignored: it orders the channels before they "
                                  "are cut into groups",
                  "not put back": "the channels stay permuted: bring them back to their places",
                  "permuted twice": "the permutation is applied once more: undo it",
                  "inverse order": "the inverse permutation orders the channels: "
                                   "position i takes channel permutation[i]"}),
    Function(
        call="cw_rgp_loss", order="views groups w_size w_iter eps generator",
        asked="2 - 2 cos of the whitened slices, with random groups of its own for each slice and "
              "view; the mean over images, pairs of views and rounds",
        variant=channel_whitened_views, cases=cw_cases, reference=cw_reference, lists=("views",),
        share=5, values_only={5: ("all slices",)},
        mistakes={
            **{key: LOSS_OF_WHITE[key] for key in (
                "length", "first pair", "pairs added", "entries", "half", "sign", "one-way",
                "one round", "rounds added")},
            "whole": "the whole batch is whitened at once: whiten slices of w_size rows",
            "same rows": "the slices are neighbouring rows, always the same: cut at random",
            "shared": "all views have the same groups: draw groups for each view and slice",
            "all slices": "all slices have the same groups: draw groups for each slice too",
            "neighbours": "the groups are neighbouring channels, always the same: draw them",
            **{key: CHANNEL_WHITEN[key] for key in ("not centred", "over samples", "group mean",
                                                    "axis", "cholesky", "coloured", "no root",
                                                    "added", "no eps", "detached", "one group")}}),
]

LOSSES = {"simclr": SIMCLR, "moco": MOCO, "byol": BYOL, "simsiam": SIMSIAM, "barlow": BARLOW,
          "vicreg": VICREG, "wmse": WMSE, "shuffled_dbn": SHUFFLED_DBN, "cw_rgp": CW_RGP}

# ==============================================================================
# Models: forward, slow copy, queue
# ==============================================================================

IMAGE = (3, 1, 2)  # of the views; the backbone is one linear layer
FEATURES = 4  # channels of H
ONE_BATCH = ("simclr", "wmse", "cw_rgp")  # their heads see all views as one batch
HEADS = {"simclr": "LBRLB", "moco": "L", "byol": "LBRL", "simsiam": "LBRLB", "barlow": "LBRL",
         "vicreg": "LBRL", "wmse": "LBRL", "shuffled_dbn": "LBRL", "cw_rgp": "LBRL"}
CLASSES = {"simclr": "SimCLR", "moco": "MoCo", "byol": "BYOL", "simsiam": "SimSiam",
           "barlow": "BarlowTwins", "vicreg": "VICReg", "wmse": "WMSE",
           "shuffled_dbn": "ShuffledDBN", "cw_rgp": "CWRGP"}
ARGS = {"simclr": dict(temperature=0.3, proj_dim=3), "byol": dict(momentum=0.9, proj_dim=3),
        "moco": dict(temperature=0.3, momentum=0.9, queue_size=7, bn_splits=1, proj_dim=3),
        "simsiam": dict(pred_hidden=4, proj_dim=3), "barlow": dict(lambd=0.3, proj_dim=3),
        "vicreg": dict(inv=3.0, var=2.0, cov=1.5, proj_dim=3),
        "wmse": dict(whitening="zca", batch_size=6, w_size=6, w_iter=1, eps=0.2, proj_dim=3),
        "shuffled_dbn": dict(groups=1, no_shuffle=True, proj_dim=4),
        "cw_rgp": dict(groups=1, batch_size=6, w_size=6, w_iter=1, eps=0.2, proj_dim=8)}


@dataclass(kw_only=True)
class Model(Function):
    """A method of a model that students write. The inputs are its weights, by name, and views.

    variant(inputs, args, stand_in, mistake) -> {name: tensor} or a list of those, reference the
    same without mistake. stand_in: with check.STAND_INS in the place of the loss. values: what is
    compared besides gradients; a name of weights means those after the call. wrt: the weights
    whose gradient is compared. does: `forward`, called `times` times, or `update_target`."""

    method: str
    points: dict
    does: str = "forward"
    times: int = 1
    wrt: tuple = ()
    values: tuple = ("value",)
    progress: tuple = ((), ())  # of update_target, in each of two cases


def torch_head(x, weights, prefix, layers):
    """L is linear, B a batch norm in training, R a ReLU; weights by torch's names."""
    for i, layer in enumerate(layers):
        weight, bias = (weights.get(f"{prefix}.{i}.{name}") for name in ("weight", "bias"))
        if layer == "L":
            x = x @ weight.T
        if layer == "B":
            x = x - x.mean(0)
            x = x / (x.square().mean(0) + 1e-5).sqrt()
            x = x if weight is None else x * weight
        if layer == "R":
            x = x.clamp(min=0)
        x = x if bias is None else x + bias
    return x


def numpy_head(x, weights, prefix, layers):
    """The same for the right answers."""
    for i, layer in enumerate(layers):
        weight, bias = (weights.get(f"{prefix}.{i}.{name}") for name in ("weight", "bias"))
        if layer == "R":
            x = np.maximum(x, 0)
        elif layer == "L":
            x = np.array([[ref.dot(row, w) for w in weight] for row in x])
        else:
            x = ref.standardise(x)
            x = x if weight is None else x * weight
        x = x if bias is None else x + bias
    return x


def torch_loss(method, args, stand_in, mistake=None):
    """The loss as the model should call it: of (z1, z2), (p, z), (q, k, queue) or (views)."""
    args = dict(args)
    defaults = {"temperature": {"simclr": 0.5, "moco": 0.1}.get(method), "lambd": 0.0051,
                "inv": 25.0, "var": 25.0, "cov": 1.0, "whitening": "cholesky", "eps": 0.0}
    if mistake in args:  # it keeps its default
        args[mistake] = defaults[mistake]
    if mistake == "weights":
        args.update(inv=25.0, var=25.0, cov=1.0)
    names = {"simclr": ["temperature"], "moco": ["temperature"], "byol": [], "simsiam": [],
             "barlow": ["lambd"], "vicreg": ["inv", "var", "cov"],
             "wmse": ["w_size", "w_iter", "whitening", "eps"],
             "cw_rgp": ["groups", "w_size", "w_iter", "eps"], "shuffled_dbn": ["groups"]}[method]
    settings = [args[name] for name in names]
    function = LOSSES[method][-1]
    shuffle = [not args["no_shuffle"]] if method == "shuffled_dbn" else []
    if stand_in:
        settings += [None] * bool(shuffle) + shuffle
        return lambda *z: check.STAND_INS[function.call](*z, *settings)

    def loss(*z):
        out = function.variant(*z, *settings, *shuffle)
        return out[0] if isinstance(out, list) else out

    return loss


def numpy_loss(method, args, stand_in):
    """The same by reference.py."""
    if stand_in:
        loss = torch_loss(method, args, True)
        return lambda *z: float(loss(*(torch.tensor(np.array(v)) for v in z)))
    function = LOSSES[method][-1]
    settings = {"simclr": ["temperature"], "moco": ["temperature"], "barlow": ["lambd"],
                "vicreg": ["inv", "var", "cov"], "wmse": ["w_size", "w_iter", "whitening", "eps"],
                "cw_rgp": ["groups", "w_size", "w_iter", "eps"], "shuffled_dbn": ["groups"]}
    settings = [args[name] for name in settings.get(method, [])]
    settings += [False] if method == "shuffled_dbn" else []

    def loss(*z):
        out = function.reference(*z, *settings)
        return out[0] if isinstance(out, list) else out

    return loss


# ---- Without predictor and slow copy -----------------------------------------


def plain_variant(method, inputs, args, stand_in, mistake=None):
    """views -> H -> Z -> the loss, the mean over all pairs."""
    loss = torch_loss(method, args, stand_in, mistake)
    h = [x.flatten(1) @ inputs["backbone.1.weight"].T for x in inputs["views"]]
    if mistake == "no gradient":
        h = [v.detach() for v in h]
    if (method in ONE_BATCH) != (mistake == "batches"):
        z = torch_head(torch.cat(h), inputs, "projector", HEADS[method]).chunk(len(h))
    else:
        z = [torch_head(v, inputs, "projector", HEADS[method]) for v in h]
    z = h if mistake == "h" else z
    if mistake == "two views":
        z = z[:2]
    if method in ("wmse", "cw_rgp"):
        return {"value": loss(torch.stack(list(z)))}
    pairs = list(itertools.combinations(z, 2))
    losses = [loss(a, b) for a, b in pairs]
    return {"value": sum(losses) / (1 if mistake == "pairs added" else len(losses))}


def plain_reference(method, inputs, args, stand_in, held):
    loss = numpy_loss(method, args, stand_in)
    h = [x.reshape(len(x), -1) @ inputs["backbone.1.weight"].T for x in inputs["views"]]
    if method in ONE_BATCH:
        z = np.split(numpy_head(np.concatenate(h), inputs, "projector", HEADS[method]), len(h))
    else:
        z = [numpy_head(v, inputs, "projector", HEADS[method]) for v in h]
    if method in ("wmse", "cw_rgp"):
        return {"value": loss(z)}
    losses = [loss(a, b) for a, b in itertools.combinations(z, 2)]
    return {"value": sum(losses) / len(losses)}


IGNORED = "{} is not passed to the loss: it keeps its default, whatever the flag says"
PLAIN = {
    "h": "the loss is computed from H: it is computed from Z = projector(H)",
    "two views": "with three views, only the first two count: take the mean over all pairs",
    "pairs added": "with three views, the pairs are added up: take their mean",
    "no gradient": "no gradient flows into the backbone: nothing should be detached here",
}
TOGETHER = {"batches": "each view passes the projector by itself: its batch norms should see all "
                       "views as one batch"}
APART = {"batches": "all views pass the projector as one batch: each view has its own statistics "
                    "in the batch norms"}


def plain_mistakes(method):
    own = {"simclr": ["temperature"], "barlow": ["lambd"], "wmse": ["whitening", "eps"],
           "cw_rgp": ["eps"]}.get(method, [])
    found = {**PLAIN, **(TOGETHER if method in ONE_BATCH else APART)}
    found.update({name: IGNORED.format(f"args.{name}") for name in own})
    if method == "vicreg":
        found["weights"] = "the weights are not passed to the loss: they keep their defaults"
    if method in ("wmse", "cw_rgp"):
        del found["pairs added"]
    return found


# ---- SimSiam -----------------------------------------------------------------


def simsiam_variant(method, inputs, args, stand_in, mistake=None):
    loss = torch_loss(method, args, stand_in)
    h = [x.flatten(1) @ inputs["backbone.1.weight"].T for x in inputs["views"]]
    if mistake == "batches":
        z = torch_head(torch.cat(h), inputs, "projector", HEADS[method]).chunk(len(h))
    else:
        z = [torch_head(v, inputs, "projector", HEADS[method]) for v in h]
    p = [torch_head(v.detach() if mistake == "early" else v, inputs, "predictor", "LBRL")
         for v in z]
    p = z if mistake == "no predictor" else p
    z = h if mistake == "h" else z
    if mistake == "wrong side":
        p = [v.detach() for v in p]
    elif mistake != "gradient":
        z = [v.detach() for v in z]
    return {"value": both_directions(p, z, loss, 1 / 2, mistake)}


def both_directions(p, z, loss, weight, mistake):
    """The mean over pairs of both directions, each with a weight."""
    pairs = list(itertools.combinations(zip(p, z), 2))
    if mistake == "first pair":
        pairs = pairs[:1]
    weight = {"halved": weight / 2, "not halved": 2 * weight}.get(mistake, weight)
    losses = []
    for (p1, z1), (p2, z2) in pairs:
        if mistake == "same view":
            losses.append(weight * (loss(p1, z1) + loss(p2, z2)))
        elif mistake == "one direction":
            losses.append(2 * weight * loss(p1, z2))
        else:
            losses.append(weight * (loss(p1, z2) + loss(p2, z1)))
    return sum(losses) / (1 if mistake == "pairs added" else len(losses))


def simsiam_reference(method, inputs, args, stand_in, held):
    """The targets are those of the weights `held`: the gradient does not see them move."""
    loss = numpy_loss(method, args, stand_in)
    z, targets = ([numpy_head(x.reshape(len(x), -1) @ weights["backbone.1.weight"].T, weights,
                              "projector", HEADS[method]) for x in inputs["views"]]
                  for weights in (inputs, held))
    p = [numpy_head(v, inputs, "predictor", "LBRL") for v in z]
    pairs = list(itertools.combinations(zip(p, targets), 2))
    return {"value": sum(loss(p1, z2) / 2 + loss(p2, z1) / 2
                         for (p1, z1), (p2, z2) in pairs) / len(pairs)}


DIRECTIONS = {
    "one direction": "only one view of a pair predicts: each predicts the other",
    "same view": "a view predicts itself: it predicts the other view",
    "no predictor": "the predictor is left out: p = predictor(z)",
    "first pair": PLAIN["two views"],
    "pairs added": PLAIN["pairs added"],
    **APART,
}
SIMSIAM_MISTAKES = {
    **DIRECTIONS,
    "gradient": "gradient flows into the targets: detach z (stop-gradient), or it collapses",
    "wrong side": "the predictions are detached instead of the targets: detach z, not p",
    "early": "z is detached before the predictor: detach only the z that are targets",
    "not halved": "the two directions are added: each counts half (Eq. 4)",
}

# ---- BYOL --------------------------------------------------------------------


def byol_variant(method, inputs, args, stand_in, mistake=None):
    loss = torch_loss(method, args, stand_in)
    h = [x.flatten(1) @ inputs["backbone.1.weight"].T for x in inputs["views"]]
    if mistake == "batches":
        z = torch_head(torch.cat(h), inputs, "projector", HEADS[method]).chunk(len(h))
    else:
        z = [torch_head(v, inputs, "projector", HEADS[method]) for v in h]
    p = z if mistake == "no predictor" else [torch_head(v, inputs, "predictor", "LBRL") for v in z]
    targets = [torch_head(x.flatten(1) @ inputs["target_backbone.1.weight"].T, inputs,
                          "target_projector", HEADS[method]) for x in inputs["views"]]
    if mistake == "online":
        targets = z
    if mistake == "half target":
        targets = [torch_head(v, inputs, "target_projector", HEADS[method]) for v in h]
    if mistake == "predicted target":
        targets = [torch_head(v, inputs, "predictor", "LBRL") for v in targets]
    targets = [v.detach() for v in targets]
    return {"value": both_directions(p, targets, loss, 1, mistake)}


def byol_reference(method, inputs, args, stand_in, held):
    loss = numpy_loss(method, args, stand_in)
    flat = [x.reshape(len(x), -1) for x in inputs["views"]]
    p, z = [], []
    for x in flat:
        online = numpy_head(x @ inputs["backbone.1.weight"].T, inputs, "projector", HEADS[method])
        p.append(numpy_head(online, inputs, "predictor", "LBRL"))
        slow = x @ held["target_backbone.1.weight"].T
        z.append(numpy_head(slow, held, "target_projector", HEADS[method]))
    pairs = list(itertools.combinations(zip(p, z), 2))
    return {"value": sum(loss(p1, z2) + loss(p2, z1) for (p1, z1), (p2, z2) in pairs) / len(pairs)}


def update_variant(method, inputs, args, stand_in, mistake=None):
    """The slow copy after update_target. BYOL's momentum rises with progress, MoCo's is fixed."""
    base, progress = args["momentum"], args.get("progress")
    momentum = base
    if method == "byol":
        progress = 1 - progress if mistake == "reversed" else progress
        momentum = 1 - (1 - base) * (math.cos(math.pi * progress) + 1) / 2
        momentum = {"constant": base, "not halved": 1 - (1 - base) * (math.cos(
            math.pi * progress) + 1), "linear": base + (1 - base) * progress}.get(mistake, momentum)
    out = {}
    for name, slow in inputs.items():
        if name.startswith("target_"):
            online = inputs[name.removeprefix("target_")]
            m = 1 - momentum if mistake == "wrong way" else momentum
            m = {"copied": 0.0, "not moved": 1.0}.get(mistake, m)
            if mistake == "backbone only" and "projector" in name:
                m = 1.0
            out[name] = m * slow + (1 - m) * online
            if mistake == "added":
                out[name] = slow + (1 - m) * online
    return out


def update_reference(method, inputs, args, stand_in, held):
    momentum = args["momentum"]
    if method == "byol":
        momentum = ref.byol_momentum(momentum, args["progress"])
    return {name: momentum * slow + (1 - momentum) * inputs[name.removeprefix("target_")]
            for name, slow in inputs.items() if name.startswith("target_")}


BYOL_MISTAKES = {
    **DIRECTIONS,
    "online": "the targets come from the online network: they come from the slow copy",
    "half target": "the targets come from the online backbone: they come from target_backbone",
    "predicted target": "the targets pass the predictor too: only the online side has one",
    "halved": "each direction counts half, as in SimSiam: BYOL adds both directions",
}
UPDATE_MISTAKES = {
    "wrong way": "the moving average is the wrong way round: "
                 "the slow copy keeps the share `momentum` of itself",
    "copied": "the slow copy becomes the online network: it keeps the share `momentum` of itself",
    "not moved": "the slow copy does not move: change its weights in place",
    "backbone only": "only the slow backbone moves: the slow projector moves too",
    "added": "the online weights are added: the slow ones are not multiplied by the momentum",
}
BYOL_UPDATE_MISTAKES = {
    **UPDATE_MISTAKES,
    "constant": "the momentum is always tau_base: it rises with progress (the third equation)",
    "reversed": "the momentum falls with progress: it rises from tau_base to 1",
    "not halved": "the cosine's sum is not halved: tau = 1 - (1 - tau_base) (cos(..) + 1) / 2",
    "linear": "the momentum rises linearly: it rises along a cosine (the third equation)",
}

# ---- MoCo --------------------------------------------------------------------


def moco_variant(method, inputs, args, stand_in, mistake=None, times=1):
    loss = torch_loss(method, args, stand_in, mistake)
    weights = dict(inputs)
    views, queue = inputs["views"], inputs["queue"]

    def embed(x, prefix=""):
        h = x.flatten(1) @ weights[f"{prefix}backbone.1.weight"].T
        return torch_head(h, weights, f"{prefix}projector", "L")

    for _ in range(times):
        moved = update_variant("moco", weights, args, False,
                               mistake if mistake in UPDATE_MISTAKES else None)
        if mistake not in ("target late", "no update"):
            weights.update({name: value.detach() for name, value in moved.items()})
        q = [embed(x) for x in views]
        k = [unit(embed(x, "" if mistake == "online keys" else "target_")) for x in views]
        k = [v.detach() for v in k]
        if mistake == "target late":
            weights.update({name: value.detach() for name, value in moved.items()})
        new = {"queries": [unit(v).detach() for v in q[1:]], "all views": k,
               "last view": k[-1:], "first view": k[:1]}.get(mistake, k[1:])
        if mistake == "long keys":
            new = [embed(x, "target_").detach() for x in views[1:]]
        longer = torch.cat([queue, *new])[-len(queue):]
        if mistake == "newest first":
            longer = torch.cat([*new, queue])[:len(queue)]
        if mistake == "newest leave":
            longer = torch.cat([queue, *new])[:len(queue)]
        seen = longer if mistake == "queue first" else queue
        pairs = list(itertools.combinations(range(len(views)), 2))
        if mistake == "first pair":
            pairs = pairs[:1]
        losses = [loss(q[i], k[i if mistake == "same view" else j], seen) for i, j in pairs]
        if mistake == "both":
            losses += [loss(q[j], k[i], seen) for i, j in pairs]
        value = sum(losses) / (1 if mistake == "pairs added" else len(losses))
        queue = longer
    return {"value": value, "queue": queue}


def moco_reference(method, inputs, args, stand_in, held, times=1):
    loss = numpy_loss(method, args, stand_in)
    slow, queue = dict(held), inputs["queue"]
    flat = [x.reshape(len(x), -1) for x in inputs["views"]]
    for _ in range(times):
        slow.update(update_reference("moco", slow, args, False, None))
        q = [numpy_head(x @ inputs["backbone.1.weight"].T, inputs, "projector", "L") for x in flat]
        k = [ref.unit_rows(numpy_head(x @ slow["target_backbone.1.weight"].T, slow,
                                      "target_projector", "L")) for x in flat]
        pairs = list(itertools.combinations(range(len(flat)), 2))
        value = sum(loss(q[i], k[j], queue) for i, j in pairs) / len(pairs)
        queue = np.concatenate([queue, *k[1:]])[-len(queue):]
    return {"value": value, "queue": queue}


def keys_variant(method, inputs, args, stand_in, mistake=None):
    """MoCo's keys of the first view, in the order of its images."""
    prefix = "" if mistake == "online keys" else "target_"
    h = inputs["views"][0].flatten(1) @ inputs[f"{prefix}backbone.1.weight"].T
    k = torch_head(h, inputs, f"{prefix}projector", "L")
    k = k if mistake == "long keys" else unit(k)
    return {"keys": k, "shuffled": torch.tensor(float(mistake != "not shuffled"))}


def keys_reference(method, inputs, args, stand_in, held):
    images = inputs["views"][0]
    h = images.reshape(len(images), -1) @ inputs["target_backbone.1.weight"].T
    k = ref.unit_rows(numpy_head(h, inputs, "target_projector", "L"))
    return {"keys": k, "shuffled": 1.0}


KEYS_MISTAKES = {
    "not shuffled": "the images are not shuffled at random: with batch norm, batch statistics "
                    "would then tell which key belongs to which query (section 3.3 of the paper)",
    "long keys": "the keys do not have length 1: divide each row by its length",
    "online keys": "the keys come from the online network: they come from the target",
}
MOCO_MISTAKES = {
    "queue first": "the keys join the queue before the logits are computed: afterwards",
    "no update": "the keys come from the target before it moves: call update_target first (Eq. 2)",
    "online keys": "the keys come from the online network: they come from the target",
    "same view": "query and key are of one view: the key is of the other view",
    "both": "both directions of a pair are taken: the earlier view is the query, "
            "the later one the key",
    "temperature": IGNORED.format("args.temperature"),
    "first pair": PLAIN["two views"],
    "pairs added": PLAIN["pairs added"],
}
QUEUE_MISTAKES = {
    "newest first": "new keys join at the front: the oldest key is first, the newest last",
    "newest leave": "the queue does not change: new keys join it, and the oldest leave",
    "long keys": "the keys in the queue do not have length 1: divide each by its length",
    "queries": "queries join the queue: keys join it",
    "all views": "the first view's keys join the queue too: that view is only a query",
    "last view": "with three views, only the last view's keys join: all but the first view's do",
    "target late": "the target moves after the keys are computed: it moves before (Eq. 2)",
    "no update": "the target does not move: call update_target before the keys are computed",
}


def model_cases(method):
    def cases(rng):
        for n, s in ((6, 2), (6, 3)):
            yield {"views": np.array([pair(rng, n, 6, 1)[0] for _ in range(s)]).reshape(
                s, n, *IMAGE)}, dict(ARGS[method])

    return cases


def model_of(method, **more):
    rest = dict(method=method, call=CLASSES[method], order="", cases=model_cases(method))
    return Model(**{**rest, **more})


def forward_of(method, variant, reference, known, points, wrt, asked):
    return model_of(
        method, asked=asked, mistakes=known, points=points, wrt=wrt,
        variant=lambda *given, **more: variant(method, *given, **more),
        reference=lambda *given, **more: reference(method, *given, **more))


TARGET_BIAS = {"moco": "target_projector.0.bias", "byol": "target_projector.1.bias"}


def update_of(method, known, progress):
    names = ["target_backbone.1.weight", "target_projector.0.weight", TARGET_BIAS[method]]
    return model_of(
        method, does="update_target", mistakes=known, points={"value": 2}, values=tuple(names),
        asked="moves the weights of the slow copy in place", progress=progress,
        variant=lambda *given, **more: update_variant(method, *given, **more),
        reference=lambda *given, **more: update_reference(method, *given, **more))


SEEN_AS = {True: "all views pass the projector as one batch",
           False: "each view passes the projector by itself"}
BACKBONE = ("backbone.1.weight", "projector.0.weight")
MODELS = {method: [forward_of(
    method, plain_variant, plain_reference, plain_mistakes(method), {"value": 6, "gradient": 4},
    BACKBONE, f"views -> H -> Z -> the mean loss of all pairs of views; "
    f"{SEEN_AS[method in ONE_BATCH]}")]
    for method in ("simclr", "barlow", "vicreg", "wmse", "shuffled_dbn", "cw_rgp")}
MODELS["simsiam"] = [forward_of(
    "simsiam", simsiam_variant, simsiam_reference, SIMSIAM_MISTAKES, {"value": 5, "gradient": 5},
    (*BACKBONE, "predictor.0.weight"),
    "Eq. 4, the mean over all pairs of views; each view passes the heads by itself")]
MODELS["byol"] = [
    forward_of("byol", byol_variant, byol_reference, BYOL_MISTAKES, {"value": 5, "gradient": 3},
               (*BACKBONE, "predictor.0.weight"),
               "Eq. 2 in both directions, the mean over all pairs of views; "
               "each view passes the heads by itself"),
    update_of("byol", BYOL_UPDATE_MISTAKES, ((0.3,), (0.8,)))]
MODELS["moco"] = [
    forward_of("moco", moco_variant, moco_reference, MOCO_MISTAKES, {"value": 2, "gradient": 2},
               BACKBONE, "Eq. 1, the mean over pairs of views: the earlier is the query, the later "
               "the key; target, keys, logits and queue in this order"),
    update_of("moco", UPDATE_MISTAKES, ((), ())),
    model_of("moco", does="forward", times=2, mistakes=QUEUE_MISTAKES, points={"value": 2},
             values=("queue",), asked="the queue after two calls of forward: the keys of all views "
             "but the first join at its end, and the oldest leave",
             variant=lambda *given, **more: moco_variant("moco", *given, times=2, **more),
             reference=lambda *given, **more: moco_reference("moco", *given, times=2, **more)),
    model_of("moco", does="keys", mistakes=KEYS_MISTAKES, points={"value": 2},
             values=("keys", "shuffled"), asked="the keys of some images, in their order; the "
             "target sees the images in a random order",
             variant=lambda *given, **more: keys_variant("moco", *given, **more),
             reference=lambda *given, **more: keys_reference("moco", *given, **more))]

# ==============================================================================
# Training: the step of train()
# ==============================================================================

# What is compared, with points: outputs of check.call_training.
STEP = {"the views and random draws": (("views", "draws"), 3),
        "the weights": (("weights", "progress", "target"), 5),
        "the loss that is written": (("loss",), 2)}
STEP_MISTAKES = {
    "no seed": "the random draws are not seeded: torch.manual_seed(common.step_seed(..)) comes "
               "first",
    "run seed": "each step has the seed of the run: common.step_seed gives each step its own",
    "same views": "all steps have the views of step 0: data.augment takes the step",
    "next views": "a step has the views of the next one: add 1 to `step` at the end",
    "no zero_grad": "the gradients of all steps add up: zero_grad comes before backward",
    "no rate": "the learning rate does not change: set group['lr'] in each step",
    "constant too": "the predictor's rate changes: a group with group['constant'] keeps its peak",
    "late rate": "the learning rate is that of the step before: set it before optimizer.step()",
    "no step": "the weights do not move: optimizer.step() is missing, or there is no gradient yet "
               "or no more (in order: zero_grad, backward, step)",
    "not watched": "the loss is not added up: run.watch(step, loss) does it",
}
UPDATE_STEP_MISTAKES = {
    "no update": "update_target is not called: it follows optimizer.step()",
    "early update": "update_target comes before optimizer.step(): the target moves towards the "
                    "new weights",
    "late progress": "the progress is that of the next step: it is step / run.total_steps",
}


def training_data(method, folder, settings):
    """The images in `folder` as train() reads them."""
    args = importlib.import_module(method).Args(**settings, **check.RECIPE, data_dir=str(folder))
    args, device = common.set_up(args)
    with contextlib.redirect_stdout(io.StringIO()):
        return common.load_data(args, device)


def training_variant(method, data, mistake=None):
    """What check.recording_model notes in a training, and the mean loss of each epoch."""
    args = data.args
    model = check.recording_model(method == "byol")
    torch.manual_seed(args.seed)
    optimizer = common.build_optimizer(model, args)
    total = args.epochs * data.steps_per_epoch
    step, means = 0, []
    for epoch in range(args.epochs):
        losses = []
        for batch in data.batches(epoch):
            if mistake not in ("no seed", "run seed"):
                torch.manual_seed(common.step_seed(args.seed, step))
            if mistake == "run seed":
                torch.manual_seed(args.seed)
            shown = {"same views": 0, "next views": step + 1}.get(mistake, step)
            views = data.augment(batch, shown)
            before = step - 1 if mistake == "late rate" and step else step
            factor = common.learning_rate(args, before, total, data.steps_per_epoch)
            for group in optimizer.param_groups:
                fixed = group["constant"] and mistake != "constant too" or mistake == "no rate"
                group["lr"] = group["peak_lr"] * (1.0 if fixed else factor)
            loss = model(views)
            if mistake != "no zero_grad":
                optimizer.zero_grad()
            progress = (step + (mistake == "late progress")) / total
            if method == "byol" and mistake == "early update":
                model.update_target(progress)
            loss.backward()
            if mistake != "no step":
                optimizer.step()
            if method == "byol" and mistake not in ("early update", "no update"):
                model.update_target(progress)
            losses.append(0.0 if mistake == "not watched" else loss.item())
            step += 1
        means.append(sum(losses) / len(losses))
    return {**{name: np.array(array) for name, array in model.seen.items()}, "loss": means}


# ==============================================================================
# The table
# ==============================================================================


def table():
    """All mistakes with their sentences, in Markdown."""
    text = "| what | mistake | This is what one gets when ... |\n|---|---|---|\n"
    for method, losses in LOSSES.items():
        for asked in [*losses, *MODELS[method]]:
            queue = ", the queue" if getattr(asked, "values", ()) == ("queue",) else ""
            name = f"{asked.call}.{asked.does}{queue}" if isinstance(asked, Model) else asked.call
            for key, sentence in asked.mistakes.items():
                text += f"| `{name}` | {key} | {sentence} |\n"
    for key, sentence in {**STEP_MISTAKES, **UPDATE_STEP_MISTAKES}.items():
        text += f"| `train` | {key} | {sentence} |\n"
    return text


if __name__ == "__main__":
    print(table(), end="")
