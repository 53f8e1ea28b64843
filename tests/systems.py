"""The documents' other systems, told as differences to the nine methods: models, losses, a loop.

experiments.py names them, and `python tests/experiments.py byol/dino --show` prints what differs.
They are in a file of their own since each of them brings more than one change.
"""

import copy
import itertools
import os
import sys
from dataclasses import dataclass

import numpy as np

ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
sys.path[1:1] = [ROOT, os.path.join(ROOT, "methods")]
import barlow  # noqa: E402
import byol  # noqa: E402
import common  # noqa: E402
import cw_rgp  # noqa: E402
import simclr  # noqa: E402
import simsiam  # noqa: E402
import torch  # noqa: E402
import torch.nn as nn  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from byol import mlp  # noqa: E402
from cw_rgp import InverseSquareRoot  # noqa: E402
from simsiam import negative_cosine  # noqa: E402

# ==============================================================================
# Prototypes: DINO and SwAV
# ==============================================================================


class Prototypes(nn.Module):
    """Cosines with K learned directions, in float32 or better: z [n, d] -> scores [n, K]."""

    def __init__(self, dim, count):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(count, dim) / dim**0.5)

    def forward(self, z):
        with torch.autocast(z.device.type, enabled=False):
            z = F.normalize(z.to(self.weight.dtype), dim=1)
            return z @ F.normalize(self.weight, dim=1).T


def cross_entropy(scores, targets, temperature):
    """-sum over K of targets * log softmax(scores / temperature), a scalar: the mean over N.

    scores: [N, K] of one view. targets: [N, K], of the other view, each row with the sum 1."""
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return -(targets * (scores / temperature).log_softmax(1)).sum(1).mean()


@dataclass(kw_only=True)
class DINOArgs(byol.Args):
    predictor: str = common.flag("none", "mlp: a predictor as BYOL's", choices="mlp none")
    proj_dim: int = 256  # K prototypes, which are the last layer of the projector
    bottleneck: int = common.flag(64, "channels that meet the prototypes", least=2, most=2**14)
    no_centering: bool = common.flag(False, "no mean is subtracted: one prototype takes all")
    no_sharpening: bool = common.flag(False, "the target has the student's temperature: uniform")


class DINO(byol.BYOL):
    def __init__(self, backbone, feature_dim, args):
        super().__init__(backbone, feature_dim, args)
        sizes = feature_dim, args.proj_hidden, args.bottleneck, args.proj_layers
        self.projector = mlp(*sizes).append(Prototypes(args.bottleneck, args.proj_dim))
        self.target_projector = copy.deepcopy(self.projector).requires_grad_(False)
        self.register_buffer("centre", torch.zeros(args.proj_dim))  # [K]

    @torch.no_grad()
    def sharpened(self, z):
        """s views of the target's scores [N, K] -> probabilities [N, K]; then the centre moves."""
        temperature = 0.1 if self.args.no_sharpening else 0.04
        targets = [((v - self.centre) / temperature).softmax(1) for v in z]
        if not self.args.no_centering:
            self.centre.lerp_(torch.cat(z).mean(0), 0.1)
        return targets

    def forward(self, views):
        """s views [n, 3, size, size] of the same images -> the global batch's loss, a scalar."""
        h = [self.backbone(x) for x in views]  # s x [n, feature_dim]
        z = [self.projector(v) for v in h]  # s x [n, d]
        p = [self.predictor(v) for v in z]  # s x [n, d]
        with torch.no_grad():
            z = [self.target_projector(self.target_backbone(x)) for x in views]  # the targets
        with torch.autocast(h[0].device.type, enabled=False):  # the loss in float32 or better
            p, z = [common.gather(v) for v in p], [common.gather(v) for v in z]  # s x [N, d]
            z = self.sharpened(z)
            pairs = itertools.combinations(zip(p, z), 2)
            D = cross_entropy
            losses = [D(p1, z2, 0.1) / 2 + D(p2, z1, 0.1) / 2 for (p1, z1), (p2, z2) in pairs]
            return sum(losses) / len(losses)


def sinkhorn(scores, eps=0.05, rounds=3):
    """Codes [N, K] of scores [N, K]: rows with the sum 1, columns nearly with the sum N / K.

    exp(scores / eps) is scaled to equal columns, then to equal rows, in turn. The rows come last.
    In logarithms, since exp(1 / eps) is large."""
    log_q = scores.to(torch.promote_types(scores.dtype, torch.float32)) / eps
    for _ in range(rounds):
        log_q = log_q - log_q.logsumexp(0, keepdim=True)
        log_q = log_q - log_q.logsumexp(1, keepdim=True)
    return log_q.exp()


@dataclass(kw_only=True)
class SwAVArgs(simclr.Args):
    temperature: float = common.flag(0.1, "divides the scores, not those of the codes", least=1e-4)
    prototypes: int = common.flag(100, "K, directions that embeddings are compared with", least=2,
                                  most=2**14)
    no_sinkhorn: bool = common.flag(False, "codes are a softmax: one prototype takes all")
    no_stop_gradient: bool = common.flag(False, "let the gradient into the codes too: NaN in the "
                                         "SimSiam paper")


class SwAV(simclr.SimCLR):
    def __init__(self, backbone, feature_dim, args):
        super().__init__(backbone, feature_dim, args)
        self.prototypes = Prototypes(args.proj_dim, args.prototypes)
        self.resting = None

    @torch.no_grad()
    def start_step(self, data, step):
        """In the first epoch, keep the prototypes as they are. Adam averages their gradients all
        the same; in the official code it does not see them."""
        first = step < data.steps_per_epoch
        self.resting = self.prototypes.weight.clone() if first else None

    @torch.no_grad()
    def after_update(self):
        """Put the prototypes back that rest."""
        if self.resting is not None:
            self.prototypes.weight.copy_(self.resting)

    def codes(self, scores):
        """Scores [N, K] -> codes [N, K], a soft assignment of each image to the prototypes."""
        codes = sinkhorn(scores)
        if self.args.no_sinkhorn:
            codes = (scores / 0.05).softmax(1)
        return codes if self.args.no_stop_gradient else codes.detach()

    def forward(self, views):
        """s views [n, 3, size, size] of the same images -> the global batch's loss, a scalar."""
        h = [self.backbone(x) for x in views]  # s x [n, feature_dim]
        z = self.projector(torch.cat(h)).chunk(len(h))  # s x [n, d], all views as one batch
        with torch.autocast(h[0].device.type, enabled=False):  # the loss in float32 or better
            z = [common.gather(v) for v in z]  # s x [N, d]
            scores = [self.prototypes(v) for v in z]  # s x [N, K]
            pairs = itertools.combinations([(v, self.codes(v)) for v in scores], 2)
            tau = self.args.temperature
            D = cross_entropy
            losses = [D(s1, q2, tau) / 2 + D(s2, q1, tau) / 2 for (s1, q1), (s2, q2) in pairs]
            return sum(losses) / len(losses)


# ==============================================================================
# A loop that tells the model which images a batch has: SwAV, DeepCluster, a bank of targets
# ==============================================================================


def rows_of(data, step):
    """Which training images the global batch of a step has, in the order of `gather`: int64 [N]."""
    epoch, batch = divmod(step, data.steps_per_epoch)
    order = np.random.default_rng((data.args.seed, 1, epoch)).permutation(len(data.train))
    size = data.args.batch_size
    rows = torch.from_numpy(order[batch * size:(batch + 1) * size])
    return rows.to(data.device, non_blocking=data.device.type == "cuda")


def check_room(args, data):
    """Raise UserError if there are more training images than --bank-size."""
    images = len(data.train)
    common.check(images <= args.bank_size, f"--bank-size {args.bank_size} is fewer than the "
                 f"{images} training images; try --bank-size {images}")


Args = common.Args  # for gives_back, which refuses what is none


@common.gives_back  # signal handlers and the lock on the folder, however it ends
def train(args, build):
    """Train the model of build(args). Returns the finished run. Raises common.UserError."""
    # ---- Set up --------------------------------------------------------------
    args, device = common.set_up(args)  # GPU or CPU, precision, torchrun
    data = common.load_data(args, device)  # uint8 images, on the device where they fit
    torch.manual_seed(args.seed)  # the same initial weights in every process
    model = build(args).to(device, memory_format=torch.channels_last)
    optimizer = common.build_optimizer(model, args)
    run = common.Run(args, model, optimizer, data)  # folder, checkpoints, metrics.csv
    network = common.distribute(model, args)  # the model, ready for torchrun and --compile
    bf16 = dict(device_type=device.type, dtype=torch.bfloat16, enabled=args.precision == "bf16")
    step = run.resume()  # 0, or with --resume the step of the last checkpoint

    while step < run.total_steps:
        # ---- One epoch -------------------------------------------------------
        model.train()
        epoch, first_batch = divmod(step, data.steps_per_epoch)
        for batch in data.batches(epoch, first_batch):  # uint8 [n, 3, H, W], this process's share
            # Learning rate and random draws depend on (seed, step) only, so resuming is exact.
            torch.manual_seed(common.step_seed(args.seed, step))
            model.start_step(data, step)  # <- which images these are; new clusters
            views = data.augment(batch, step)  # s x [n, 3, size, size]
            factor = common.learning_rate(args, step, run.total_steps, data.steps_per_epoch)
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * (1.0 if group["constant"] else factor)

            with run.guard(step), torch.autocast(**bf16):
                loss = network(views)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            model.after_update()  # <- puts back what rests
            run.watch(step, loss)  # adds up the loss, notes numbers that are not finite; no waiting
            step += 1

            if step % args.log_every == 0:
                run.progress(step, loss)  # waits for the device; stops if a number was not finite
            if step % data.steps_per_epoch:
                run.save_if_due(step)  # --save-every; after Ctrl-C it saves and leaves

        # ---- Measure: fixed images, no augmentation, eval mode ---------------
        epoch += 1
        row = {"epoch": epoch, "step": step, "loss": run.mean_loss(), "lr": factor * args.lr}
        row["knn"] = ""
        if epoch == args.epochs or (args.eval_every and epoch % args.eval_every == 0):
            h = common.extract(model.backbone, data, data.queries, args.precision)  # [M, dim of H]
            z = common.project(model.projector, h, args.precision)  # [M, d]
            row.update(common.collapse_metrics(z))
            row["rank_h"] = common.collapse_metrics(h)["rank_1pct"]
            if data.labelled:
                bank = common.extract(model.backbone, data, data.bank, args.precision)
                row["knn"] = common.knn_accuracy(bank, data.bank_labels, h, data.query_labels)
        run.end_epoch(step, row)  # metrics.csv, last.pt, a line on the screen

    # ---- Close: kNN on all test images, beside two baselines -----------------
    run.save_backbone()
    scores = {}
    if data.labelled:
        torch.manual_seed(args.seed)  # the weights with which this run started
        untrained = build(args).backbone.to(device)
        pixels = nn.Sequential(nn.AdaptiveAvgPool2d(min(32, data.size)), nn.Flatten())
        networks = {"kNN": model.backbone, "raw pixels": pixels, "untrained backbone": untrained}
        labels = data.large_bank_labels
        for name, encoder in networks.items():
            bank = common.extract(encoder, data, data.large_bank, args.precision)  # [N, dim of H]
            queries = common.extract(encoder, data, data.test, args.precision)  # [M, dim of H]
            scores[name] = common.knn_accuracy(bank, labels, queries, data.test_labels)
    run.close(scores)
    return run


# ==============================================================================
# DeepCluster
# ==============================================================================


def k_means(x, count, rounds=20):
    """Lloyd's algorithm from `count` random rows of x [N, d]: the cluster of each row, int64 [N].

    An empty cluster starts again from a random row."""
    centres = x[torch.randperm(len(x))[:count].to(x.device)]
    for _ in range(rounds):
        labels = torch.cdist(x, centres).argmin(1)
        sizes = torch.bincount(labels, minlength=count)[:, None]
        means = torch.zeros_like(centres).index_add_(0, labels, x) / sizes.clamp_min(1)
        centres = torch.where(sizes > 0, means, x[torch.randperm(len(x))[:count].to(x.device)])
    return torch.cdist(x, centres).argmin(1)


def cluster_loss(scores, labels, sizes):
    """Cross-entropy of scores [N, K] and clusters [N], each cluster with the same weight.

    sizes [K]: images in each cluster. The authors instead draw images of all clusters alike."""
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    losses = scores.logsumexp(1) - scores.gather(1, labels[:, None]).squeeze(1)  # [N]
    weights = 1 / sizes[labels].clamp_min(1).to(scores.dtype)
    return (weights * losses).sum() / weights.sum()


@dataclass(kw_only=True)
class DeepClusterArgs(simclr.Args):
    clusters: int = common.flag(100, "K of k-means, some ten times the classes", least=2,
                                most=2**20)
    bank_size: int = common.flag(10_000, "training images that there is room for", least=2,
                                 most=2**24)

    def rules(self):
        common.check(self.temperature == 0.5, "--temperature is not used; try it without")
        yield self.clusters <= self.bank_size, "--clusters must be at most --bank-size"


class DeepCluster(simclr.SimCLR):
    def __init__(self, backbone, feature_dim, args):
        super().__init__(backbone, feature_dim, args)
        self.classifier = nn.Linear(args.proj_dim, args.clusters)
        self.register_buffer("labels", torch.arange(args.bank_size) % args.clusters)
        self.register_buffer("sizes", torch.ones(args.clusters))
        self.rows = None

    @torch.no_grad()
    def start_step(self, data, step):
        """At the start of an epoch, k-means on the l2-normalised Z of all images, as they are."""
        check_room(self.args, data)
        count, images = self.args.clusters, len(data.train)
        common.check(count <= images, f"--clusters {count} are more than the {images} training "
                     f"images; try --clusters {min(10, images)}")
        self.rows = rows_of(data, step)
        if step % data.steps_per_epoch == 0:
            h = common.extract(self.backbone, data, data.train, self.args.precision)
            z = F.normalize(common.project(self.projector, h, self.args.precision), dim=1)
            labels = k_means(z, count)
            self.labels[:images] = labels
            self.sizes.copy_(torch.bincount(labels, minlength=count))
            self.classifier.reset_parameters()  # the clusters have new numbers

    def after_update(self):
        """No parameter rests."""

    def forward(self, views):
        """s views [n, 3, size, size] of the same images -> the global batch's loss, a scalar."""
        h = [self.backbone(x) for x in views]  # s x [n, feature_dim]
        z = self.projector(torch.cat(h)).chunk(len(h))  # s x [n, d], all views as one batch
        scores = [self.classifier(v) for v in z]  # s x [n, K]
        with torch.autocast(h[0].device.type, enabled=False):  # the loss in float32 or better
            scores = [common.gather(v) for v in scores]  # s x [N, K]
            labels = self.labels[:len(scores[0])] if self.rows is None else self.labels[self.rows]
            losses = [cluster_loss(v, labels, self.sizes) for v in scores]
            return sum(losses) / len(losses)


# ==============================================================================
# SimSiam's hypothesis: a moving average per image in the place of the predictor
# ==============================================================================


@dataclass(kw_only=True)
class MovingAverageTargetArgs(simsiam.Args):
    predictor: str = common.flag("none", "mlp: a predictor as SimSiam's", choices="mlp none")
    proj_dim: int = 256  # the bank is --bank-size x d
    target_momentum: float = common.flag(0.8, "share of an image's average kept", least=0, below=1)
    bank_size: int = common.flag(10_000, "training images that there is room for", least=2,
                                 most=2**24)

    def rules(self):
        common.check(not self.no_stop_gradient, "--no-stop-gradient has no use; try it without")
        return super().rules()


class MovingAverageTarget(simsiam.SimSiam):
    def __init__(self, backbone, feature_dim, args):
        super().__init__(backbone, feature_dim, args)
        self.register_buffer("bank", torch.zeros(args.bank_size, args.proj_dim))
        self.rows = None

    def start_step(self, data, step):
        """Note which images the batch has."""
        check_room(self.args, data)
        self.rows = rows_of(data, step)

    def after_update(self):
        """No parameter rests."""

    @torch.no_grad()
    def averages(self, z):
        """s views z [N, d] -> targets [N, d], each moved by its view. The bank keeps their mean."""
        rows = torch.arange(len(z[0]), device=z[0].device) if self.rows is None else self.rows
        z = [F.normalize(v.to(self.bank.dtype), dim=1) for v in z]
        targets = [self.bank[rows].lerp(v, 1 - self.args.target_momentum) for v in z]
        self.bank[rows] = sum(targets) / len(targets)
        return targets

    def forward(self, views):
        """s views [n, 3, size, size] of the same images -> the global batch's loss, a scalar."""
        h = [self.backbone(x) for x in views]  # s x [n, feature_dim]
        z = [self.projector(v) for v in h]  # s x [n, d]
        p = [self.predictor(v) for v in z]  # s x [n, d]
        with torch.autocast(h[0].device.type, enabled=False):  # the loss in float32 or better
            p, z = [common.gather(v) for v in p], [common.gather(v) for v in z]  # s x [N, d]
            z = self.averages(z)
            pairs = itertools.combinations(zip(p, z), 2)
            D = negative_cosine
            losses = [D(p1, z2) / 2 + D(p2, z1) / 2 for (p1, z1), (p2, z2) in pairs]  # Eq. 4
            return sum(losses) / len(losses)


# ==============================================================================
# UniGrad's own loss
# ==============================================================================


def unigrad_loss(z, target, correlation, lambd=100.0):
    """UniGrad in one direction, a scalar: mean of -cos(z, target) + lambda / 2 z^T F z.

    z: embeddings [N, d] of one view. target: those of the slow network for the other view. Both
    are normalised here. correlation: F [d, d]. Only z gets a gradient: of a unit row z it is
    (-target + lambda F z) / N."""
    z = F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=1)
    target = F.normalize(target.to(z.dtype), dim=1).detach()
    positive = (z * target).sum(1)  # [N]
    negative = (z @ correlation.to(z.dtype) * z).sum(1)  # [N]
    return (lambd / 2 * negative - positive).mean()


@dataclass(kw_only=True)
class UniGradArgs(byol.Args):
    predictor: str = common.flag("none", "mlp: a predictor as BYOL's", choices="mlp none")
    lambd: float = common.flag(100.0, "weight of the correlation", least=0, most=10**6)


class UniGrad(byol.BYOL):
    def __init__(self, backbone, feature_dim, args):
        super().__init__(backbone, feature_dim, args)
        self.register_buffer("correlation", torch.eye(args.proj_dim) / args.proj_dim)  # F [d, d]

    @torch.no_grad()
    def correlate(self, z):
        """s views z [N, d] of the targets: F <- 0.99 F + 0.01 z^T z / (s N) of unit rows."""
        rows = F.normalize(torch.cat(z).to(self.correlation.dtype), dim=1)  # [s N, d]
        self.correlation.lerp_(rows.T @ rows / len(rows), 0.01)
        return self.correlation

    def forward(self, views):
        """s views [n, 3, size, size] of the same images -> the global batch's loss, a scalar."""
        h = [self.backbone(x) for x in views]  # s x [n, feature_dim]
        z = [self.projector(v) for v in h]  # s x [n, d]
        p = [self.predictor(v) for v in z]  # s x [n, d]
        with torch.no_grad():
            z = [self.target_projector(self.target_backbone(x)) for x in views]  # the targets
        with torch.autocast(h[0].device.type, enabled=False):  # the loss in float32 or better
            p, z = [common.gather(v) for v in p], [common.gather(v) for v in z]  # s x [N, d]
            pairs = itertools.combinations(zip(p, z), 2)
            more = self.correlate(z), self.args.lambd
            D = unigrad_loss
            losses = [D(p1, z2, *more) / 2 + D(p2, z1, *more) / 2 for (p1, z1), (p2, z2) in pairs]
            return sum(losses) / len(losses)


# ==============================================================================
# CCA-SSG
# ==============================================================================


def cca_ssg_loss(z1, z2, lambd=1e-3):
    """CCA-SSG, a scalar: invariance, and soft whitening of each view by itself.

    z1, z2: embeddings [N, d] of two views, standardised here as a batch norm does."""
    n, d = z1.shape
    z1, z2 = (z.to(torch.promote_types(z.dtype, torch.float32)) for z in (z1, z2))
    z1 = (z1 - z1.mean(0)) / (z1.var(0, unbiased=False) + 1e-5).sqrt()
    z2 = (z2 - z2.mean(0)) / (z2.var(0, unbiased=False) + 1e-5).sqrt()
    invariance = -(z1 * z2).sum() / n  # -sum of C_ii
    identity = torch.eye(d, dtype=z1.dtype, device=z1.device)
    decorrelation = sum((z.T @ z / n - identity).square().sum() for z in (z1, z2))
    return invariance + lambd * decorrelation


@dataclass(kw_only=True)
class CCASSGArgs(barlow.Args):
    lambd: float = 1e-3


class CCASSG(barlow.BarlowTwins):
    def forward(self, views):
        """s views [n, 3, size, size] of the same images -> the global batch's loss, a scalar."""
        h = [self.backbone(x) for x in views]  # s x [n, feature_dim]
        z = [self.projector(v) for v in h]  # s x [n, d]
        with torch.autocast(h[0].device.type, enabled=False):  # the loss in float32 or better
            z = [common.gather(v) for v in z]  # s x [N, d]
            pairs = itertools.combinations(z, 2)
            losses = [cca_ssg_loss(z1, z2, self.args.lambd) for z1, z2 in pairs]
            return sum(losses) / len(losses)


# ==============================================================================
# ICL, the instance-wise half of Zero-CL
# ==============================================================================


def icl_whiten(z, eps=0.1):
    """Make samples uncorrelated over the channels: z [..., w, d] -> [..., w, d].

    Each sample is standardised over its channels. Their covariance S becomes (1 - eps) S + eps I.
    The whitening matrix (S + 1e-5 I)^(-1/2) is a constant for the gradient."""
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    x = z - z.mean(-1, keepdim=True)
    x = x / x.std(-1, keepdim=True)
    s = x @ x.mT / (x.shape[-1] - 1)  # [..., w, w]
    identity = torch.eye(s.shape[-1], dtype=s.dtype, device=s.device)
    s = (1 - eps) * s + (eps + 1e-5) * identity
    return InverseSquareRoot.apply(s).detach() @ x


def icl_loss(views, w_size=256, w_iter=1, eps=0.1, generator=None):
    """Sum over a slice of (1 - y1.y2 / d)^2, the mean over slices and pairs of views, a scalar.

    views: s >= 2 embeddings [N, d] of the same images. The batch is cut at random into slices of
    w_size, the same for all views, w_iter times. If w_size does not divide N: ValueError."""
    z = torch.stack(list(views))  # [s, N, d]
    s, n, d = z.shape
    if n % w_size:
        raise ValueError(f"w_size = {w_size} does not divide the batch of {n}")
    order = torch.rand(w_iter, n, device=z.device, generator=generator).argsort(-1)
    slices = z[:, order.flatten()].unflatten(1, (-1, w_size))  # [s, w_iter N / w, w, d]
    y = icl_whiten(slices, eps)
    pairs = itertools.combinations(y, 2)
    losses = [(1 - (y1 * y2).sum(-1) / d).square().sum(-1).mean() for y1, y2 in pairs]
    return sum(losses) / len(losses)


@dataclass(kw_only=True)
class ICLArgs(cw_rgp.Args):
    groups: int = 1
    w_size: int = 256
    w_iter: int = 1
    eps: float = 0.1

    def rules(self):
        yield from super().rules()
        yield self.groups == 1, "--groups must be 1"


class ICL(cw_rgp.CWRGP):
    def forward(self, views):
        """s views [n, 3, size, size] of the same images -> the global batch's loss, a scalar."""
        args = self.args
        h = [self.backbone(x) for x in views]  # s x [n, feature_dim]
        z = self.projector(torch.cat(h)).chunk(len(h))  # s x [n, d], all views as one batch
        with torch.autocast(h[0].device.type, enabled=False):  # the loss in float32 or better
            z = [common.gather(v) for v in z]  # s x [N, d]
            return icl_loss(z, args.w_size, args.w_iter, args.eps)


def icl_whitening(args, z):
    """Whitened Z for eval.py: z [w, d] -> [w, d]."""
    return icl_whiten(z, args.eps)
