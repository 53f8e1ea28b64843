"""Experiments: what happens to a method if one thing in it is changed.

    python tests/experiments.py                                   list them
    python tests/experiments.py simsiam/softmax-similarity        train one; flags of simsiam.py
    python tests/experiments.py simsiam/softmax-similarity --show the lines that differ

In a program: `experiment = find("simsiam/softmax-similarity")`, then
`experiment.train(experiment.Args(dataset="cifar10", epochs=5))`.

An experiment is a subclass of the method's model that overrides as little as it can, with changed
loss functions beside it. Most of its text is the method's own, copied: --show prints the rest.
systems.py has the models of those that are a system by themselves, such as DINO and SwAV.
"""

import copy
import dataclasses
import difflib
import functools
import importlib
import inspect
import itertools
import math
import os
import sys
import textwrap
from dataclasses import dataclass

ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
sys.path[1:1] = [ROOT, os.path.join(ROOT, "methods"), os.path.join(ROOT, "tests")]
import barlow  # noqa: E402
import byol  # noqa: E402
import common  # noqa: E402
import cw_rgp  # noqa: E402
import moco  # noqa: E402
import simclr  # noqa: E402
import simsiam  # noqa: E402
import systems  # noqa: E402
import vicreg  # noqa: E402
import torch  # noqa: E402
import torch.nn as nn  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import wmse  # noqa: E402
from byol import byol_loss  # noqa: E402
from cw_rgp import InverseSquareRoot, channel_whiten, cw_rgp_loss  # noqa: E402
from moco import info_nce_loss  # noqa: E402
from simsiam import mlp, negative_cosine  # noqa: E402
from vicreg import vicreg_loss  # noqa: E402
from wmse import whiten, wmse_loss  # noqa: E402

# ==============================================================================
# What an experiment is
# ==============================================================================

EXPERIMENTS = {}  # name -> Experiment, in the order of this file


class Experiment:
    """A method with one change. `train(args)` trains it, `args` being an instance of its `Args`.

    name: method/experiment. model: a subclass of the method's model.
    beside: the functions that the model calls, each with the function that it is a changed copy
    of, or None if it is new. Args: flags or rules of its own, a subclass of the method's Args.
    train: a training loop of its own, in which the changed lines carry the mark `# <-`.
    whiten: a function of (args, z) for eval.py, if Z is whitened otherwise than in the method."""

    def __init__(
        self, name, sentence, source, model, beside=None, Args=None, train=None, whiten=None
    ):
        method, self.experiment = name.split("/")
        self.method = importlib.import_module(method)
        self.name, self.sentence, self.source = name, sentence, source
        self.model, self.beside, self.own_args = model, dict(beside or {}), Args
        if train:
            self.beside[train] = self.method.train
        field = ("experiment", str, self.experiment)
        bases = (Args or self.method.Args,)
        self.Args = dataclasses.make_dataclass("Args", [field], bases=bases, kw_only=True)
        self.train = functools.partial(train or self.method.train, build=self.build)
        if whiten:
            self.whiten = whiten

    def build(self, args):
        """The model on a new backbone."""
        mine = (args.method, args.experiment) == tuple(self.name.split("/"))
        common.check(mine, f'these are not the Args of {self.name}; try find("{self.name}").Args()')
        backbone, feature_dim = common.build_backbone(args.backbone, args.image_size)
        model = self.model(backbone, feature_dim, args)
        model.experiment = self.experiment  # which common.Run compares with args
        return model

    def parse_args(self, argv=None):
        """Its Args from a command line, a list of words. Raises UserError."""
        return common.parse_args(self.Args, argv, f"{self.name}: {self.sentence}")


def add(name, **rest):
    """Enter an experiment into EXPERIMENTS."""
    EXPERIMENTS[name] = Experiment(name, **rest)


def find(name):
    """The experiment of that name. Raises UserError, which names near ones, if there is none."""
    near = [known for known in EXPERIMENTS if known.startswith(f"{name.rstrip('/')}/")]
    near += [known for known in EXPERIMENTS if known.endswith(f"/{name}")]
    near = near or difflib.get_close_matches(name, EXPERIMENTS, cutoff=0.4)
    remedy = f"try {', '.join(near)}" if near else "experiments.py without a name lists them"
    common.check(name in EXPERIMENTS, f"{name}: there is no such experiment; {remedy}")
    return EXPERIMENTS[name]


# ==============================================================================
# SimCLR
# ==============================================================================


def anchor_loss(z1, z2, temperature=0.5):
    """SimCLR's NT-Xent (Eq. 1) with a gradient for the anchors only. The value is the same.

    z1, z2: embeddings [N, d] of two views of the same images, normalised here."""
    z = torch.cat([z1, z2])  # [2N, d]
    z = F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=1)
    logits = (z @ z.detach().T / temperature).fill_diagonal_(float("-inf"))  # [2N, 2N], k != i
    positive = (z * z.detach().roll(len(z1), 0)).sum(1) / temperature  # [2N], with the other view
    return (logits.logsumexp(1) - positive).mean()  # Eq. 1


class StopGradient(simclr.SimCLR):
    def forward(self, views):
        """s views [n, 3, size, size] of the same images -> the global batch's loss, a scalar."""
        args = self.args
        h = [self.backbone(x) for x in views]  # s x [n, feature_dim]
        z = self.projector(torch.cat(h)).chunk(len(h))  # s x [n, d], all views as one batch
        with torch.autocast(h[0].device.type, enabled=False):  # the loss in float32 or better
            z = [common.gather(v) for v in z]  # s x [N, d]
            pairs = itertools.combinations(z, 2)
            losses = [anchor_loss(z1, z2, args.temperature) for z1, z2 in pairs]
            return sum(losses) / len(losses)


add(
    "simclr/stop-gradient",
    sentence="No gradient flows into the embeddings that an anchor is compared with, as in MoCo.",
    source="Tao et al. (UniGrad), arXiv 2112.05141",
    model=StopGradient,
    beside={anchor_loss: simclr.nt_xent_loss},
)


def predicted_loss(p1, p2, z1, z2, temperature=0.5):
    """NT-Xent (Eq. 1) with predictions as anchors: p_i against z_k, k != i.

    p1, p2, z1, z2: predictions and embeddings [N, d] of two views, normalised here."""
    p, z = torch.cat([p1, p2]), torch.cat([z1, z2])  # [2N, d]
    p = F.normalize(p.to(torch.promote_types(p.dtype, torch.float32)), dim=1)
    z = F.normalize(z.to(p.dtype), dim=1)
    logits = (p @ z.T / temperature).fill_diagonal_(float("-inf"))  # [2N, 2N], k != i
    positive = (p * z.roll(len(z1), 0)).sum(1) / temperature  # [2N], with the other view
    return (logits.logsumexp(1) - positive).mean()  # Eq. 1


@dataclass(kw_only=True)
class PredictorArgs(simclr.Args):
    stop_gradient: bool = common.flag(False, "no gradient into what a prediction is compared with")


class Predictor(simclr.SimCLR):
    def __init__(self, backbone, feature_dim, args):
        super().__init__(backbone, feature_dim, args)
        self.predictor = mlp(args.proj_dim, args.proj_hidden, args.proj_dim, layers=2, bias=True)

    def forward(self, views):
        """s views [n, 3, size, size] of the same images -> the global batch's loss, a scalar."""
        h = [self.backbone(x) for x in views]  # s x [n, feature_dim]
        z = self.projector(torch.cat(h)).chunk(len(h))  # s x [n, d], all views as one batch
        p = self.predictor(torch.cat(z)).chunk(len(z))  # s x [n, d]
        if self.args.stop_gradient:
            z = [v.detach() for v in z]
        with torch.autocast(h[0].device.type, enabled=False):  # the loss in float32 or better
            p, z = [common.gather(v) for v in p], [common.gather(v) for v in z]  # s x [N, d]
            pairs = itertools.combinations(zip(p, z), 2)
            tau = self.args.temperature
            losses = [predicted_loss(p1, p2, z1, z2, tau) for (p1, z1), (p2, z2) in pairs]
            return sum(losses) / len(losses)


add(
    "simclr/predictor",
    sentence="A predictor makes the anchors, as in SimSiam (paper: 66.4 %, with --stop-gradient "
    "66.0 %, against 66.5 %).",
    source="Chen and He, arXiv 2011.10566, section 6.2",
    model=Predictor,
    beside={predicted_loss: None},
    Args=PredictorArgs,
)

add(
    "simclr/swav",
    sentence="SwAV: an image is described by its similarity to prototypes, and each view predicts "
    "the other's description. Sinkhorn-Knopp over the global batch makes the prototypes equally "
    "frequent. They rest in the first epoch. One crop size, no queue.",
    source="Caron et al., arXiv 2006.09882; facebookresearch/swav",
    model=systems.SwAV,
    beside={
        systems.cross_entropy: None,
        systems.sinkhorn: None,
        systems.Prototypes: None,
    },
    Args=systems.SwAVArgs,
    train=systems.train,
)

add(
    "simclr/deepcluster",
    sentence="DeepCluster: in each epoch, k-means gives every image a label, which a new "
    "classifier learns. Clusters have equal weight in the loss; the authors draw images of all "
    "clusters alike, cluster PCA-whitened features and start the optimizer again too.",
    source="Caron et al., arXiv 1807.05520; facebookresearch/deepcluster",
    model=systems.DeepCluster,
    beside={
        systems.cluster_loss: None,
        systems.k_means: None,
        systems.rows_of: None,
        systems.check_room: None,
    },
    Args=systems.DeepClusterArgs,
    train=systems.train,
)

# ==============================================================================
# MoCo
# ==============================================================================


class Symmetric(moco.MoCo):
    def forward(self, views):
        """s views [n, 3, size, size] of the same images -> the global batch's loss, a scalar."""
        args = self.args
        h = [self.backbone(x) for x in views]  # every view is a query
        q = [self.projector(v) for v in h]  # s x [n, d]
        self.update_target()  # Eq. 2, with the weights before this step
        k = [self.keys(x) for x in views]  # s x [N, d]; every view is a key
        with torch.autocast(h[0].device.type, enabled=False):  # the loss in float32 or better
            q = [common.gather(v) for v in q]  # s x [N, d]
            pairs = itertools.permutations(range(len(views)), 2)  # (i, j) and (j, i)
            losses = [info_nce_loss(q[i], k[j], self.queue, args.temperature) for i, j in pairs]
            self.queue = torch.cat([self.queue, *k])[-len(self.queue):].clone()  # the oldest leave
            return 2 * sum(losses) / len(losses)  # both directions are added


add(
    "moco/symmetric",
    sentence="Every view is query and key: the losses of both directions are added, and all keys "
    "join the queue.",
    source="facebookresearch/moco, the authors' CIFAR-10 demo, option `symmetric`",
    model=Symmetric,
)


class NoShuffle(moco.MoCo):
    @torch.no_grad()
    def keys(self, x):
        """Images [n, 3, H, W] -> keys [N, d] of the global batch, without shuffling BN: a query
        and its key share batch statistics, which tell that they match."""
        x = common.gather(x)  # [N, 3, H, W]
        order = torch.arange(len(x), device=x.device)
        mine = order.chunk(common.world_size())[common.rank()]
        x = x[mine].contiguous(memory_format=torch.channels_last)
        k = self.target_projector(self.target_backbone(x))  # [n, d]
        return F.normalize(common.gather(k), dim=1)[order.argsort()]  # in the order of x again


add(
    "moco/no-shuffle",
    sentence="The keys keep the order of the queries, so that the two share batch statistics.",
    source="He et al., arXiv 1911.05722, section 3.3; 4 points worse in the authors' demo",
    model=NoShuffle,
)


@dataclass(kw_only=True)
class SlowKeysArgs(moco.Args):
    slow: str = common.flag("positives", "keys of the slow network", choices="positives negatives")


class SlowKeys(moco.MoCo):
    @torch.no_grad()
    def fast_keys(self, x):
        """As `keys`, by the online network: images [n, 3, H, W] -> keys [N, d], shuffled BN."""
        x = common.gather(x)  # [N, 3, H, W]
        order = torch.randperm(len(x), device=x.device)
        mine = order.chunk(common.world_size())[common.rank()]
        x = x[mine].contiguous(memory_format=torch.channels_last)
        k = self.projector(self.backbone(x))  # [n, d]
        return F.normalize(common.gather(k), dim=1)[order.argsort()]  # in the order of x again

    def forward(self, views):
        """s views [n, 3, size, size] of the same images -> the global batch's loss, a scalar."""
        h = [self.backbone(x) for x in views[:-1]]  # the last view is not a query
        q = [self.projector(v) for v in h]  # (s - 1) x [n, d]
        self.update_target()  # Eq. 2, with the weights before this step
        k = [self.keys(x) for x in views[1:]]  # (s - 1) x [N, d]; the first view is not a key
        negatives = [self.fast_keys(x) for x in views[1:]]
        if self.args.slow == "negatives":
            k, negatives = negatives, k
        with torch.autocast(h[0].device.type, enabled=False):  # the loss in float32 or better
            q = [common.gather(v) for v in q]  # (s - 1) x [N, d]
            pairs = itertools.combinations(range(len(views)), 2)
            tau = self.args.temperature
            losses = [info_nce_loss(q[i], k[j - 1], self.queue, tau) for i, j in pairs]
            queue = torch.cat([self.queue, *negatives])
            self.queue = queue[-len(self.queue):].clone()  # the oldest leave
            return sum(losses) / len(losses)


add(
    "moco/slow-keys",
    sentence="Only the positive keys come from the slow network, or with --slow negatives only "
    "those in the queue. The others come from the online network, as it is when they are made.",
    source="Tao et al. (UniGrad), arXiv 2112.05141: slow positives are enough",
    model=SlowKeys,
    Args=SlowKeysArgs,
)

# ==============================================================================
# BYOL
# ==============================================================================


class LinearPredictor(byol.BYOL):
    def __init__(self, backbone, feature_dim, args):
        super().__init__(backbone, feature_dim, args)
        common.check(args.predictor == "mlp", "--predictor none leaves nothing to change; try mlp")
        self.predictor = nn.Linear(args.proj_dim, args.proj_dim, bias=False)


add(
    "byol/linear-predictor",
    sentence="The predictor is one matrix; its eigenvectors come to agree with those of the "
    "embeddings' correlation.",
    source="Tian et al. (DirectPred), arXiv 2102.06810",
    model=LinearPredictor,
)


def direct_predictor(correlation, eps=0.1):
    """DirectPred's W [d, d] for the correlation F [d, d] of the embeddings.

    F = U diag(s) U^T  ->  W = U diag(sqrt(s / max s) + eps) U^T
    This is the authors' code; the paper has sqrt(s) + eps max s. Here F starts as the identity and
    W knows the present batch. In their code F starts from the first batch and W lags one step."""
    s, u = torch.linalg.eigh(correlation)
    root = (s / s.max().clamp_min(1e-12)).clamp_min(0).sqrt() + eps
    return (u * root) @ u.mT


class DirectPredictor(byol.BYOL):
    def __init__(self, backbone, feature_dim, args):
        super().__init__(backbone, feature_dim, args)
        common.check(args.predictor == "mlp", "--predictor none leaves nothing to set; try mlp")
        self.predictor = nn.Identity()
        self.register_buffer("correlation", torch.eye(args.proj_dim))  # F [d, d]

    @torch.no_grad()
    def predict(self, z):
        """s views z [n, d] -> W [d, d], after F <- 0.3 F + 0.7 z^T z / (s N)."""
        with torch.autocast(z[0].device.type, enabled=False):
            rows = torch.cat([common.gather(v) for v in z])  # [s N, d]
            self.correlation.mul_(0.3).add_(0.7 * rows.T @ rows / len(rows))
            return direct_predictor(self.correlation)

    def forward(self, views):
        """s views [n, 3, size, size] of the same images -> the global batch's loss, a scalar."""
        h = [self.backbone(x) for x in views]  # s x [n, feature_dim]
        z = [self.projector(v) for v in h]  # s x [n, d]
        w = self.predict(z)  # [d, d], without gradient
        p = [v.to(w.dtype) @ w for v in z]  # s x [n, d]
        with torch.no_grad():
            z = [self.target_projector(self.target_backbone(x)) for x in views]  # the targets
        with torch.autocast(h[0].device.type, enabled=False):  # the loss in float32 or better
            p, z = [common.gather(v) for v in p], [common.gather(v) for v in z]  # s x [N, d]
            pairs = itertools.combinations(zip(p, z), 2)
            losses = [byol_loss(p1, z2) + byol_loss(p2, z1) for (p1, z1), (p2, z2) in pairs]
            return sum(losses) / len(losses)


add(
    "byol/direct-predictor",
    sentence="The predictor is a matrix that is not trained but set in every step, from the "
    "eigenvectors of the embeddings' correlation.",
    source="Tian et al. (DirectPred), arXiv 2102.06810; facebookresearch/luckmatters",
    model=DirectPredictor,
    beside={direct_predictor: None},
)


@dataclass(kw_only=True)
class GroupNormArgs(byol.Args):
    def rules(self):
        whole = self.proj_hidden % 16 == 0 and self.proj_hidden >= 64
        yield whole, "--proj-hidden must be a multiple of 16 from 64 on, for 16 groups"


def group_norm(width):
    """16 groups of channels, each image by itself. As before a batch norm, `mlp` has no bias."""
    return nn.GroupNorm(16, width)


class GroupNorm(byol.BYOL):
    def __init__(self, backbone, feature_dim, args):
        super().__init__(backbone, feature_dim, args)
        sizes = feature_dim, args.proj_hidden, args.proj_dim, args.proj_layers
        self.projector = mlp(*sizes, norm=group_norm)
        self.target_projector = copy.deepcopy(self.projector).requires_grad_(False)
        if args.predictor == "mlp":
            sizes = args.proj_dim, args.proj_hidden, args.proj_dim
            self.predictor = mlp(*sizes, layers=2, norm=group_norm)


add(
    "byol/group-norm",
    sentence="Group norm in the heads, which then use no batch statistics.",
    source="Richemond et al., arXiv 2010.10241: in the backbone too, with standardised weights; no "
    "collapse",
    model=GroupNorm,
    beside={group_norm: None},
    Args=GroupNormArgs,
)


def standardised(weight):
    """Weights [outputs, ...], each output's with mean 0 and variance 1."""
    w = weight.flatten(1)
    w = (w - w.mean(1, keepdim=True)) / (w.std(1, keepdim=True, unbiased=False) + 1e-5)
    return w.view_as(weight)


class StandardisedConv2d(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, standardised(self.weight), self.bias)


class StandardisedLinear(nn.Linear):
    def forward(self, x):
        return F.linear(x, standardised(self.weight), self.bias)


class ImageNorm2d(nn.BatchNorm2d):
    """Group norm under a batch norm's names, each image by itself; its running figures idle."""

    def forward(self, x):
        groups = math.gcd(16, self.num_features)
        return F.group_norm(x, groups, self.weight, self.bias, self.eps)


def without_batch_statistics(network):
    """Change a network's layers in place: group norm and standardised weights."""
    changed = {
        nn.BatchNorm2d: ImageNorm2d,
        nn.Conv2d: StandardisedConv2d,
        common.PatchConv2d: StandardisedConv2d,
        nn.Linear: StandardisedLinear,
    }
    for module in network.modules():
        module.__class__ = changed.get(type(module), type(module))


class NoBatchStatistics(byol.BYOL):
    def __init__(self, backbone, feature_dim, args):
        super().__init__(backbone, feature_dim, args)
        sizes = feature_dim, args.proj_hidden, args.proj_dim, args.proj_layers
        self.projector = mlp(*sizes, norm=group_norm)
        self.target_projector = copy.deepcopy(self.projector).requires_grad_(False)
        if args.predictor == "mlp":
            sizes = args.proj_dim, args.proj_hidden, args.proj_dim
            self.predictor = mlp(*sizes, layers=2, norm=group_norm)
        without_batch_statistics(self)


add(
    "byol/no-batch-statistics",
    sentence="Group norm and standardised weights everywhere, in the backbone too, so that no "
    "image knows of the others in its batch.",
    source="Richemond et al., arXiv 2010.10241: 73.9 % against 74.3 %",
    model=NoBatchStatistics,
    beside={
        without_batch_statistics: None,
        standardised: None,
        StandardisedConv2d: None,
        StandardisedLinear: None,
        ImageNorm2d: None,
        group_norm: None,
    },
    Args=GroupNormArgs,
)

add(
    "byol/dino",
    sentence="DINO: no predictor, but a softmax over K prototypes (--proj-dim). The target is "
    "centred and sharpened. One crop size, and the prototypes learn in the first epoch too.",
    source="Caron et al., arXiv 2104.14294; facebookresearch/dino",
    model=systems.DINO,
    beside={systems.cross_entropy: None, systems.Prototypes: None},
    Args=systems.DINOArgs,
)

add(
    "byol/unigrad",
    sentence="UniGrad: no predictor. The loss is -cos(z, target) + lambda / 2 z^T F z for the "
    "targets' moving correlation F, which starts as I / d (the authors' with the first batch).",
    source="Tao et al. (UniGrad), arXiv 2112.05141; fundamentalvision/UniGrad",
    model=systems.UniGrad,
    beside={systems.unigrad_loss: None},
    Args=systems.UniGradArgs,
)

# ==============================================================================
# SimSiam: the ablations of the paper's section 4, accuracies on ImageNet, 100 epochs
# ==============================================================================


class FixedPredictor(simsiam.SimSiam):
    def __init__(self, backbone, feature_dim, args):
        super().__init__(backbone, feature_dim, args)
        common.check(args.predictor == "mlp", "--predictor none leaves nothing to change; try mlp")
        self.predictor.requires_grad_(False)


add(
    "simsiam/fixed-predictor",
    sentence="The predictor keeps its random start (paper: the loss stays high, which is not "
    "collapse).",
    source="Chen and He, arXiv 2011.10566, section 4.2",
    model=FixedPredictor,
)


class DecayedPredictorLR(simsiam.SimSiam):
    def __init__(self, backbone, feature_dim, args):
        super().__init__(backbone, feature_dim, args)
        common.check(args.predictor == "mlp", "--predictor none leaves nothing to change; try mlp")
        self.predictor.constant_lr = False


add(
    "simsiam/decayed-predictor-lr",
    sentence="The predictor's learning rate warms up and decays like the other layers' (paper: "
    "67.7 % against 68.1 %).",
    source="Chen and He, arXiv 2011.10566, section 4.2",
    model=DecayedPredictorLR,
)


def softmax_similarity(p, z):
    """D(p, z) = -softmax(z) . log softmax(p), a cross-entropy, the mean over the batch.

    p: predictions [N, d] of one view. z: targets [N, d], embeddings of the other view."""
    p, z = (v.to(torch.promote_types(v.dtype, torch.float32)) for v in (p, z))
    return -(z.softmax(1) * p.log_softmax(1)).sum(1).mean()


class SoftmaxSimilarity(simsiam.SimSiam):
    def forward(self, views):
        """s views [n, 3, size, size] of the same images -> the global batch's loss, a scalar."""
        h = [self.backbone(x) for x in views]  # s x [n, feature_dim]
        z = [self.projector(v) for v in h]  # s x [n, d]
        p = [self.predictor(v) for v in z]  # s x [n, d]
        if not self.args.no_stop_gradient:
            z = [v.detach() for v in z]
        with torch.autocast(h[0].device.type, enabled=False):  # the loss in float32 or better
            p, z = [common.gather(v) for v in p], [common.gather(v) for v in z]  # s x [N, d]
            pairs = itertools.combinations(zip(p, z), 2)
            D = softmax_similarity
            losses = [D(p1, z2) / 2 + D(p2, z1) / 2 for (p1, z1), (p2, z2) in pairs]  # Eq. 4
            return sum(losses) / len(losses)


add(
    "simsiam/softmax-similarity",
    sentence="A cross-entropy of softmaxes instead of the cosine (paper: 63.2 % against 68.1 %, no "
    "collapse).",
    source="Chen and He, arXiv 2011.10566, section 4.5",
    model=SoftmaxSimilarity,
    beside={softmax_similarity: None},
)


class Asymmetric(simsiam.SimSiam):
    def forward(self, views):
        """s views [n, 3, size, size] of the same images -> the global batch's loss, a scalar."""
        h = [self.backbone(x) for x in views]  # s x [n, feature_dim]
        z = [self.projector(v) for v in h]  # s x [n, d]
        p = [self.predictor(v) for v in z]  # s x [n, d]
        if not self.args.no_stop_gradient:
            z = [v.detach() for v in z]
        with torch.autocast(h[0].device.type, enabled=False):  # the loss in float32 or better
            p, z = [common.gather(v) for v in p], [common.gather(v) for v in z]  # s x [N, d]
            pairs = itertools.combinations(zip(p, z), 2)
            D = negative_cosine
            losses = [D(p1, z2) for (p1, z1), (p2, z2) in pairs]  # one direction
            return sum(losses) / len(losses)


add(
    "simsiam/asymmetric",
    sentence="Only the first view of a pair predicts the second (paper: 64.8 % against 68.1 %).",
    source="Chen and He, arXiv 2011.10566, section 4.6",
    model=Asymmetric,
)


class HeadNormNone(simsiam.SimSiam):
    def __init__(self, backbone, feature_dim, args):
        super().__init__(backbone, feature_dim, args)
        sizes = feature_dim, args.proj_hidden, args.proj_dim, args.proj_layers
        self.projector = mlp(*sizes, norm=nn.Identity, bias=True)
        if args.predictor == "mlp":
            sizes = args.proj_dim, args.pred_hidden, args.proj_dim
            self.predictor = mlp(*sizes, layers=2, norm=nn.Identity, bias=True)
            self.predictor.constant_lr = True


add(
    "simsiam/head-norm-none",
    sentence="No batch norm in the heads (paper: 34.6 % against 68.1 %, no collapse).",
    source="Chen and He, arXiv 2011.10566, section 4.4",
    model=HeadNormNone,
)


class HeadNormHidden(simsiam.SimSiam):
    def __init__(self, backbone, feature_dim, args):
        super().__init__(backbone, feature_dim, args)
        sizes = feature_dim, args.proj_hidden, args.proj_dim, args.proj_layers
        self.projector = mlp(*sizes, bias=True)  # no norm on its output


add(
    "simsiam/head-norm-hidden",
    sentence="Batch norm on the hidden layers of the heads only (paper: 67.4 % against 68.1 %).",
    source="Chen and He, arXiv 2011.10566, section 4.4",
    model=HeadNormHidden,
)


class HeadNormAll(simsiam.SimSiam):
    def __init__(self, backbone, feature_dim, args):
        super().__init__(backbone, feature_dim, args)
        common.check(args.predictor == "mlp", "--predictor none leaves nothing to change; try mlp")
        self.predictor = mlp(args.proj_dim, args.pred_hidden, args.proj_dim, layers=2)
        self.predictor.append(nn.BatchNorm1d(args.proj_dim))
        self.predictor.constant_lr = True


add(
    "simsiam/head-norm-all",
    sentence="Batch norm on the predictor's output too (paper: the training is unstable).",
    source="Chen and He, arXiv 2011.10566, section 4.4",
    model=HeadNormAll,
)


@dataclass(kw_only=True)
class AlternatingArgs(simsiam.Args):
    every: int = common.flag(10, "steps between two new sets of targets", least=1, most=10**6)

    def rules(self):
        common.check(not self.no_stop_gradient, "--no-stop-gradient has no use; try it without")
        return super().rules()


class Alternating(simsiam.SimSiam):
    def __init__(self, backbone, feature_dim, args):
        super().__init__(backbone, feature_dim, args)
        self.target_backbone = copy.deepcopy(self.backbone).requires_grad_(False)
        self.target_projector = copy.deepcopy(self.projector).requires_grad_(False)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def renew(self):
        """In every k-th step, the targets' network becomes a copy of the present one."""
        now = self.steps % self.args.every == 0
        online = [*self.backbone.parameters(), *self.projector.parameters()]
        target = [*self.target_backbone.parameters(), *self.target_projector.parameters()]
        for theta, xi in zip(online, target):
            xi.copy_(torch.where(now, theta, xi))
        self.steps += 1

    def forward(self, views):
        """s views [n, 3, size, size] of the same images -> the global batch's loss, a scalar."""
        h = [self.backbone(x) for x in views]  # s x [n, feature_dim]
        z = [self.projector(v) for v in h]  # s x [n, d]
        p = [self.predictor(v) for v in z]  # s x [n, d]
        self.renew()
        with torch.no_grad():
            z = [self.target_projector(self.target_backbone(x)) for x in views]  # the targets
        with torch.autocast(h[0].device.type, enabled=False):  # the loss in float32 or better
            p, z = [common.gather(v) for v in p], [common.gather(v) for v in z]  # s x [N, d]
            pairs = itertools.combinations(zip(p, z), 2)
            D = negative_cosine
            losses = [D(p1, z2) / 2 + D(p2, z1) / 2 for (p1, z1), (p2, z2) in pairs]  # Eq. 4
            return sum(losses) / len(losses)


add(
    "simsiam/alternating",
    sentence="The network of the targets is renewed in every k-th step (--every), so that theta "
    "and eta are optimised in turn (paper: k of 1, 10, 100 give 68.1, 68.7, 68.9 %).",
    source="Chen and He, arXiv 2011.10566, section 5.2",
    model=Alternating,
    Args=AlternatingArgs,
)

add(
    "simsiam/moving-average-target",
    sentence="No predictor: the target is a moving average of the image's embeddings, kept for "
    "each image (paper: 55.0 %, where no predictor alone gives 0.1 %).",
    source="Chen and He, arXiv 2011.10566, section 5.2",
    model=systems.MovingAverageTarget,
    beside={systems.rows_of: None, systems.check_room: None},
    Args=systems.MovingAverageTargetArgs,
    train=systems.train,
)

# ==============================================================================
# Barlow Twins
# ==============================================================================


def l2_loss(z1, z2, lambd=0.0051):
    """Barlow Twins (Eq. 1 and 2) of rows of length sqrt(d) instead of standardised channels.

    z1, z2: embeddings [N, d] of two views, brought to that length here. UniGrad's rows have length
    1, so that its lambda of 50 is 50 / d here: --lambd 0.098 for d = 512."""
    n, d = z1.shape
    z1, z2 = (z.to(torch.promote_types(z.dtype, torch.float32)) for z in (z1, z2))
    z1 = F.normalize(z1, dim=1) * d**0.5
    z2 = F.normalize(z2, dim=1) * d**0.5
    c = z1.T @ z2 / n  # [d, d], Eq. 2
    on_diagonal = (1 - c.diagonal()).square().sum()  # invariance
    off_diagonal = c.square().sum() - c.diagonal().square().sum()  # redundancy reduction
    return on_diagonal + lambd * off_diagonal  # Eq. 1


class L2(barlow.BarlowTwins):
    def forward(self, views):
        """s views [n, 3, size, size] of the same images -> the global batch's loss, a scalar."""
        args = self.args
        h = [self.backbone(x) for x in views]  # s x [n, feature_dim]
        z = [self.projector(v) for v in h]  # s x [n, d]
        with torch.autocast(h[0].device.type, enabled=False):  # the loss in float32 or better
            z = [common.gather(v) for v in z]  # s x [N, d]
            pairs = itertools.combinations(z, 2)
            losses = [l2_loss(z1, z2, args.lambd) for z1, z2 in pairs]
            return sum(losses) / len(losses)


add(
    "barlow/l2",
    sentence="Rows are brought to length sqrt(d), instead of channels to mean 0 and variance 1.",
    source="only loosely after Tao et al. (UniGrad), arXiv 2112.05141, whose objective is another",
    model=L2,
    beside={l2_loss: barlow.barlow_twins_loss},
)


def without_a_loss(z1, z2, lambd=0.0051):
    """-2 sum of C_ii + lambda sum of C_ij^2 over all i, j, a scalar: A of UniGrad's form is I.

    z1, z2: embeddings [N, d] of two views, standardised here as a batch norm does."""
    n, d = z1.shape
    z1, z2 = (z.to(torch.promote_types(z.dtype, torch.float32)) for z in (z1, z2))
    z1 = (z1 - z1.mean(0)) / (z1.var(0, unbiased=False) + 1e-5).sqrt()
    z2 = (z2 - z2.mean(0)) / (z2.var(0, unbiased=False) + 1e-5).sqrt()
    c = z1.T @ z2 / n  # [d, d], Eq. 2
    return lambd * c.square().sum() - 2 * c.diagonal().sum()


class WithoutA(barlow.BarlowTwins):
    def forward(self, views):
        """s views [n, 3, size, size] of the same images -> the global batch's loss, a scalar."""
        h = [self.backbone(x) for x in views]  # s x [n, feature_dim]
        z = [self.projector(v) for v in h]  # s x [n, d]
        with torch.autocast(h[0].device.type, enabled=False):  # the loss in float32 or better
            z = [common.gather(v) for v in z]  # s x [N, d]
            pairs = itertools.combinations(z, 2)
            losses = [without_a_loss(z1, z2, self.args.lambd) for z1, z2 in pairs]
            return sum(losses) / len(losses)


add(
    "barlow/without-a",
    sentence="The positive term of the gradient is the other view itself: its factor "
    "A = I - (1 - lambda) diag(C) is dropped.",
    source="Tao et al. (UniGrad), arXiv 2112.05141: no loss in accuracy",
    model=WithoutA,
    beside={without_a_loss: barlow.barlow_twins_loss},
)

add(
    "barlow/cca-ssg",
    sentence="CCA-SSG: each view is decorrelated by itself, softly, and the diagonal of C counts "
    "linearly.",
    source="Zhang et al., arXiv 2106.12484; there for graphs, without a projector",
    model=systems.CCASSG,
    beside={systems.cca_ssg_loss: barlow.barlow_twins_loss},
    Args=systems.CCASSGArgs,
)

# ==============================================================================
# VICReg
# ==============================================================================


class PaperScaling(vicreg.VICReg):
    def forward(self, views):
        """s views [n, 3, size, size] of the same images -> the global batch's loss, a scalar."""
        args = self.args
        h = [self.backbone(x) for x in views]  # s x [n, feature_dim]
        z = [self.projector(v) for v in h]  # s x [n, d]
        with torch.autocast(h[0].device.type, enabled=False):  # the loss in float32 or better
            z = [common.gather(v) for v in z]  # s x [N, d]
            pairs = itertools.combinations(z, 2)
            inv = args.inv * z[0].shape[1]
            losses = [vicreg_loss(z1, z2, inv, 2 * args.var, args.cov) for z1, z2 in pairs]
            return sum(losses) / len(losses)


add(
    "vicreg/paper-scaling",
    sentence="As printed: the squared distance is summed over the d channels, and the variance "
    "terms of the two views are added, not averaged.",
    source="Bardes et al., arXiv 2105.04906, Eq. 5 and 6",
    model=PaperScaling,
)


class TwoBranches(vicreg.VICReg):
    def __init__(self, backbone, feature_dim, args):
        super().__init__(backbone, feature_dim, args)
        sizes = feature_dim, args.proj_hidden, args.proj_dim
        self.other_projector = mlp(*sizes, layers=args.proj_layers + 1)

    def forward(self, views):
        """s views [n, 3, size, size] of the same images -> the global batch's loss, a scalar."""
        h = [self.backbone(x) for x in views]  # s x [n, feature_dim]
        heads = itertools.cycle([self.projector, self.other_projector])
        z = [head(v) for head, v in zip(heads, h)]  # s x [n, d]
        with torch.autocast(h[0].device.type, enabled=False):  # the loss in float32 or better
            z = [common.gather(v) for v in z]  # s x [N, d]
            pairs = itertools.combinations(z, 2)
            weights = self.args.inv, self.args.var, self.args.cov
            losses = [vicreg_loss(z1, z2, *weights) for z1, z2 in pairs]
            return sum(losses) / len(losses)


add(
    "vicreg/two-branches",
    sentence="Every other view goes through a second projector, with one layer more.",
    source="Bardes et al., arXiv 2105.04906: the branches need not share weights or architecture",
    model=TwoBranches,
)

# ==============================================================================
# W-MSE
# ==============================================================================


class OneWay(wmse.WMSE):
    """With more than two views, each pair has its own partition of the batch."""

    def forward(self, views):
        """s views [n, 3, size, size] of the same images -> the global batch's loss, a scalar."""
        args = self.args
        h = [self.backbone(x) for x in views]  # s x [n, feature_dim]
        z = self.projector(torch.cat(h)).chunk(len(h))  # s x [n, d], all views as one batch
        with torch.autocast(h[0].device.type, enabled=False):  # the loss in float32 or better
            z = [common.gather(v) for v in z]  # s x [N, d]
            pairs = [(z1, z2.detach()) for z1, z2 in itertools.combinations(z, 2)]
            sizes = args.w_size, args.w_iter
            losses = [wmse_loss(pair, *sizes, args.whitening, args.eps) for pair in pairs]
            return sum(losses) / len(losses)


add(
    "wmse/one-way",
    sentence="The second view of a pair is a fixed target, which halves the expected gradient. "
    "With more than two views, each pair has its own slices.",
    source="Weng et al., arXiv 2210.03586, L1' of Eq. 6",
    model=OneWay,
)


def shuffled_loss(views, w_size=128, w_iter=1, kind="pca", eps=0.0, generator=None):
    """Mean squared distance of the whitened, normalised views, a scalar in [0, 4].

    views: s >= 2 embeddings [N, d] of the same images. The batch is cut at random into slices of
    w_size, the same for all views, w_iter times. If w_size does not divide N: ValueError."""
    z = torch.stack(list(views))  # [s, N, d]
    s, n, d = z.shape
    if n % w_size:
        raise ValueError(f"w_size = {w_size} does not divide the batch of {n}")
    order = torch.rand(w_iter, n, device=z.device, generator=generator).argsort(-1)
    slices = z[:, order.flatten()].unflatten(1, (-1, w_size))  # [s, w_iter N / w, w, d]
    draws = torch.rand(s, slices.shape[1], d, device=z.device, generator=generator)
    permutation = draws.argsort(-1).unsqueeze(-2).expand(slices.shape)  # own for each view
    y = whiten(slices.gather(-1, permutation), kind, eps)
    y = F.normalize(torch.zeros_like(y).scatter(-1, permutation, y), dim=-1)
    pairs = itertools.combinations(y, 2)
    losses = [(2 - 2 * (y1 * y2).sum(-1)).mean() for y1, y2 in pairs]
    return sum(losses) / len(losses)


@dataclass(kw_only=True)
class ShuffledChannelsArgs(wmse.Args):
    whitening: str = "pca"


class ShuffledChannels(wmse.WMSE):
    def forward(self, views):
        """s views [n, 3, size, size] of the same images -> the global batch's loss, a scalar."""
        args = self.args
        h = [self.backbone(x) for x in views]  # s x [n, feature_dim]
        z = self.projector(torch.cat(h)).chunk(len(h))  # s x [n, d], all views as one batch
        with torch.autocast(h[0].device.type, enabled=False):  # the loss in float32 or better
            z = [common.gather(v) for v in z]  # s x [N, d]
            return shuffled_loss(z, args.w_size, args.w_iter, args.whitening, args.eps)


add(
    "wmse/shuffled-channels",
    sentence="PCA whitening as the released CW-RGP code does it: each view's channels are "
    "permuted before and put back after. Cholesky and PCA then disagree on equal views.",
    source="winci-ai/CW-RGP, without its --no_rg, whitening channels (axis 1)",
    model=ShuffledChannels,
    beside={shuffled_loss: wmse.wmse_loss},
    Args=ShuffledChannelsArgs,
)

# ==============================================================================
# CW-RGP
# ==============================================================================


def shared_loss(views, groups=4, w_size=64, w_iter=4, eps=0.0, generator=None):
    """Mean squared distance of the whitened, normalised views, a scalar in [0, 4].

    views: s >= 2 embeddings [N, d] of the same images. The batch is cut at random into slices of
    w_size, the same for all views, w_iter times. If w_size does not divide N: ValueError."""
    z = torch.stack(list(views))  # [s, N, d]
    s, n, d = z.shape
    if n % w_size:
        raise ValueError(f"w_size = {w_size} does not divide the batch of {n}")
    order = torch.rand(w_iter, n, device=z.device, generator=generator).argsort(-1)
    slices = z[:, order.flatten()].unflatten(1, (-1, w_size))  # [s, w_iter N / w, w, d]
    draws = torch.rand(1, slices.shape[1], d, device=z.device, generator=generator)
    permutation = draws.argsort(-1).expand(s, -1, -1)  # the groups of a slice, for all views
    y = F.normalize(channel_whiten(slices, groups, permutation, eps), dim=-1)
    pairs = itertools.combinations(y, 2)
    losses = [(2 - 2 * (y1 * y2).sum(-1)).mean() for y1, y2 in pairs]  # Eq. 2
    return sum(losses) / len(losses)


class SharedPermutation(cw_rgp.CWRGP):
    def forward(self, views):
        """s views [n, 3, size, size] of the same images -> the global batch's loss, a scalar."""
        args = self.args
        h = [self.backbone(x) for x in views]  # s x [n, feature_dim]
        z = self.projector(torch.cat(h)).chunk(len(h))  # s x [n, d], all views as one batch
        with torch.autocast(h[0].device.type, enabled=False):  # the loss in float32 or better
            z = [common.gather(v) for v in z]  # s x [N, d]
            return shared_loss(z, args.groups, args.w_size, args.w_iter, args.eps)


add(
    "cw_rgp/shared-permutation",
    sentence="All views of a slice share their random groups of channels: equal views then have a "
    "loss of 0, where the method's loss has a positive floor.",
    source="Weng et al., arXiv 2210.03586, section 4; the variant is ours",
    model=SharedPermutation,
    beside={shared_loss: cw_rgp.cw_rgp_loss},
)


def fixed_loss(views, groups=4, w_size=64, w_iter=4, eps=0.0, generator=None):
    """Mean squared distance of the whitened, normalised views, a scalar in [0, 4].

    views: s >= 2 embeddings [N, d] of the same images. The batch is cut at random into slices of
    w_size, the same for all views, w_iter times. If w_size does not divide N: ValueError."""
    z = torch.stack(list(views))  # [s, N, d]
    s, n, d = z.shape
    if n % w_size:
        raise ValueError(f"w_size = {w_size} does not divide the batch of {n}")
    order = torch.rand(w_iter, n, device=z.device, generator=generator).argsort(-1)
    slices = z[:, order.flatten()].unflatten(1, (-1, w_size))  # [s, w_iter N / w, w, d]
    permutation = None  # groups of neighbouring channels
    y = F.normalize(channel_whiten(slices, groups, permutation, eps), dim=-1)
    pairs = itertools.combinations(y, 2)
    losses = [(2 - 2 * (y1 * y2).sum(-1)).mean() for y1, y2 in pairs]  # Eq. 2
    return sum(losses) / len(losses)


class FixedPermutation(cw_rgp.CWRGP):
    def forward(self, views):
        """s views [n, 3, size, size] of the same images -> the global batch's loss, a scalar."""
        args = self.args
        h = [self.backbone(x) for x in views]  # s x [n, feature_dim]
        z = self.projector(torch.cat(h)).chunk(len(h))  # s x [n, d], all views as one batch
        with torch.autocast(h[0].device.type, enabled=False):  # the loss in float32 or better
            z = [common.gather(v) for v in z]  # s x [N, d]
            return fixed_loss(z, args.groups, args.w_size, args.w_iter, args.eps)


add(
    "cw_rgp/fixed-permutation",
    sentence="The groups are always the same neighbouring channels.",
    source="Weng et al., arXiv 2210.03586, section 4; in the official code --no_rg",
    model=FixedPermutation,
    beside={fixed_loss: cw_rgp.cw_rgp_loss},
)


def detached_whiten(z, groups=4, permutation=None, eps=0.0):
    """Whiten samples over the channels of each group: z [..., w, d] -> [..., w, d].

    permutation [..., d]: order of the channels before they are cut into equal groups.
    eps: S becomes (1 - eps) S + eps I. With eps = 0, w must be at most d / g (below d if g = 1),
    else S is singular: ValueError. Take half of that: near the limit gradients explode."""
    if z.shape[-1] % groups:
        raise ValueError(f"groups = {groups} does not divide the {z.shape[-1]} channels")
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    x = z - z.mean(-1, keepdim=True)  # centred over all channels
    if permutation is not None:
        permutation = permutation.unsqueeze(-2).expand(x.shape)
        x = x.gather(-1, permutation)
    x = x.unflatten(-1, (groups, -1)).transpose(-2, -3)  # [..., g, w, d/g]
    w, width = x.shape[-2:]
    if width == 1 or (eps == 0 and w > width - (groups == 1)):  # centring takes one dimension
        raise ValueError(f"S is singular: w = {w} samples of {width} channels")
    s = x @ x.mT / (width - 1)  # [..., g, w, w]
    s = (1 - eps) * s + eps * torch.eye(s.shape[-1], dtype=s.dtype, device=s.device)
    y = InverseSquareRoot.apply(s).detach() @ x  # ZCA, its matrix a constant for the gradient
    y = y.transpose(-2, -3).flatten(-2)  # [..., w, d]
    return y if permutation is None else torch.zeros_like(y).scatter(-1, permutation, y)


def detached_loss(views, groups=4, w_size=64, w_iter=4, eps=0.0, generator=None):
    """Mean squared distance of the whitened, normalised views, a scalar in [0, 4].

    views: s >= 2 embeddings [N, d] of the same images. The batch is cut at random into slices of
    w_size, the same for all views, w_iter times. If w_size does not divide N: ValueError."""
    z = torch.stack(list(views))  # [s, N, d]
    s, n, d = z.shape
    if n % w_size:
        raise ValueError(f"w_size = {w_size} does not divide the batch of {n}")
    order = torch.rand(w_iter, n, device=z.device, generator=generator).argsort(-1)
    slices = z[:, order.flatten()].unflatten(1, (-1, w_size))  # [s, w_iter N / w, w, d]
    draws = torch.rand(s, slices.shape[1], d, device=z.device, generator=generator)
    permutation = draws.argsort(-1)  # own groups for each slice and view, so L stays above 0
    y = F.normalize(detached_whiten(slices, groups, permutation, eps), dim=-1)
    pairs = itertools.combinations(y, 2)
    losses = [(2 - 2 * (y1 * y2).sum(-1)).mean() for y1, y2 in pairs]  # Eq. 2
    return sum(losses) / len(losses)


class DetachedWhitening(cw_rgp.CWRGP):
    def forward(self, views):
        """s views [n, 3, size, size] of the same images -> the global batch's loss, a scalar."""
        args = self.args
        h = [self.backbone(x) for x in views]  # s x [n, feature_dim]
        z = self.projector(torch.cat(h)).chunk(len(h))  # s x [n, d], all views as one batch
        with torch.autocast(h[0].device.type, enabled=False):  # the loss in float32 or better
            z = [common.gather(v) for v in z]  # s x [N, d]
            return detached_loss(z, args.groups, args.w_size, args.w_iter, args.eps)


add(
    "cw_rgp/detached-whitening",
    sentence="No gradient flows through the whitening matrix, as in the ICL of Zero-CL (there with "
    "--groups 1 --eps 0.1).",
    source="Zero-CL, ICLR 2022; Weng et al., arXiv 2210.03586",
    model=DetachedWhitening,
    beside={detached_whiten: cw_rgp.channel_whiten, detached_loss: cw_rgp.cw_rgp_loss},
)


def sample_correlation(views, w_size=64):
    """Mean over the slices of w_size rows, and sum over s views, of the squared covariances of two
    samples, divided by w: a scalar. views: s embeddings [N, d], N a multiple of w_size."""
    z = torch.stack(list(views)).unflatten(1, (-1, w_size))  # [s, N / w, w, d]
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    x = z - z.mean(-1, keepdim=True)
    s = x @ x.mT / (x.shape[-1] - 1)  # [s, N / w, w, w]
    off_diagonal = s.square().sum((-1, -2)) - s.diagonal(dim1=-2, dim2=-1).square().sum(-1)
    return (off_diagonal / w_size).mean(1).sum()


@dataclass(kw_only=True)
class CovarianceTermArgs(cw_rgp.Args):
    alpha: float = common.flag(0.005, "weight of the covariance of samples", least=0, most=10**6)


class CovarianceTerm(cw_rgp.CWRGP):
    def forward(self, views):
        """s views [n, 3, size, size] of the same images -> the global batch's loss, a scalar."""
        args = self.args
        h = [self.backbone(x) for x in views]  # s x [n, feature_dim]
        z = self.projector(torch.cat(h)).chunk(len(h))  # s x [n, d], all views as one batch
        with torch.autocast(h[0].device.type, enabled=False):  # the loss in float32 or better
            z = [common.gather(v) for v in z]  # s x [N, d]
            loss = cw_rgp_loss(z, args.groups, args.w_size, args.w_iter, args.eps)
            return loss + args.alpha * sample_correlation(z, args.w_size)


add(
    "cw_rgp/covariance-term",
    sentence="A soft whitening beside the exact one: the covariances of two samples are penalised "
    "too.",
    source="winci-ai/CW-RGP, the ImageNet recipe (alpha 0.005 or 0.01, in its first half)",
    model=CovarianceTerm,
    beside={sample_correlation: None},
    Args=CovarianceTermArgs,
)

add(
    "cw_rgp/icl",
    sentence="ICL: no gradient through the whitening matrix, whose covariance is regularised. "
    "Samples are standardised, the batch is one slice, and the loss is a square.",
    source="Zero-CL, ICLR 2022, as in winci-ai/CW-RGP",
    model=systems.ICL,
    beside={systems.icl_loss: cw_rgp.cw_rgp_loss, systems.icl_whiten: None},
    Args=systems.ICLArgs,
    whiten=systems.icl_whitening,
)

# ==============================================================================
# List, show, train
# ==============================================================================


def listing():
    """All experiments with sentence and source, grouped by method, in 100 columns."""
    lines = ["experiments.py NAME [flags of the method]  or  experiments.py NAME --show"]
    method = ""
    for experiment in EXPERIMENTS.values():
        if experiment.method.__name__ != method:
            method = experiment.method.__name__
            lines += ["", method]
        text = f"{experiment.sentence} [{experiment.source}]"
        first, *rest = textwrap.wrap(text, width=68, break_on_hyphens=False)
        lines += [f"  {experiment.name:29} {first}"]
        lines += [f"{'':32}{line}" for line in rest]
    return "\n".join(lines)


source_of = functools.cache(inspect.getsource)  # of a class it reads the whole file


def parts(experiment):
    """[(what it is, its text, the text that it is a changed copy of)] of all that is not the
    method's own. Of a function that is new, or that calls its parent's, the last text is empty."""
    found = []
    if experiment.own_args:
        found.append(("Args", source_of(experiment.own_args), ""))
    for function, parent in experiment.beside.items():
        name = parent.__name__ if parent else "new"
        old = source_of(parent) if parent else ""
        found.append((f"{function.__name__} ({name})", source_of(function), old))
    model, base = experiment.model, experiment.model.__base__
    for name, function in vars(model).items():
        if inspect.isfunction(function):
            title, text = f"{base.__name__}.{name}", source_of(function)
            parent = getattr(base, name, None)
            old = source_of(parent) if parent else ""
            if f"super().{name}(" in text:
                title, old = f"{title}, which it calls first", ""
            found.append((title if parent else f"{title} (new)", text, old))
    return found


def show(experiment):
    """The lines that differ from the method file: `-` the method's, `+` the experiment's."""
    lines = []
    for title, new, old in parts(experiment):
        lines += ["", f"{title}:"]
        changes = difflib.unified_diff(old.splitlines(), new.splitlines(), n=0, lineterm="")
        lines += [line for line in list(changes)[2:] if not line.startswith("@@")]
    return "\n".join(lines[1:])


def parse_args(argv=None):
    """What the command line asks for, as a function to call. Raises UserError."""
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] in ("-h", "--help"):
        return functools.partial(common.say, listing())
    common.check(not words[0].startswith("-"), f"{words[0]}: the experiment's name comes first")
    experiment = find(words[0])
    if "--show" in words:
        common.check(len(words) == 2, f"--show takes no other words; try {words[0]} --show")
        return functools.partial(common.say, show(experiment))
    return functools.partial(experiment.train, experiment.parse_args(words[1:]))


def run(job):
    """Do what `parse_args` returned."""
    job()


if __name__ == "__main__":
    common.main(run, parse_args)
