"""Shuffled-DBN (Hua et al., ICCV 2021): whiten random groups of channels, then match the views.

Paper: "On Feature Decorrelation in Self-Supervised Learning", arXiv 2105.00470
Code: PatrickHua/FeatureDecorrelationSSL (the first author's)

Idea: Two views of an image should have the same embedding once the embeddings are whitened.
    Decorrelated batch norm (DBN) whitens groups of channels, so a batch may be smaller than d.
    The groups change with every batch and view, so that no two channels can stay correlated.

Loss: for views of a batch, Z [N, d], and each of g random groups k of channels
    X = Z - mean over the samples
    S_k = X_k^T X_k / N                                                              [d/g, d/g]
    Y_k = X_k S_k^(-1/2), all groups back in place: Y                                    [N, d]
    L = mean over the images of |y1 - y2|^2, about 2 d for unrelated views

What prevents collapse:
    negatives       no
    predictor       no
    stop-gradient   no
    moving average  no
    decorrelation   yes, whitening of channels over samples
Diff it with: wmse.py (slices of the batch instead of groups of channels)

Deviations:
    ZCA's gradient is written out, since autograd's is NaN for equal eigenvalues.
    Whitening and batch norms see the global batch; in the authors' code, one GPU's images.

Recipe: the same in all nine files, so that a diff shows ideas; methods/README.md has the papers'.
    Batches of 256 (BYOL: 128), two views by W-MSE's augmentation, bf16 where the processor has it.
    With more than two views, the loss is the mean over all pairs of views.
    Muon at 0.1 for filters of `tiny`, the default: it learns weak features as fast as strong ones.
    Adam at 3e-3 with weight decay 1e-6 for all else, and for other backbones.
    Rates rise for a tenth of the run, at most 500 steps (MoCo, BYOL: 150), and fall as a cosine.
    SimSiam's predictor keeps its peak rate at all steps.
    The backbone sees one view at a time. A ResNet's residual blocks start as the identity, but
    not in the official code of MoCo, W-MSE, Shuffled-DBN and (below ResNet-50) BYOL.

Run: python methods/shuffled_dbn.py    (one to four minutes on two CPU cores, offline)
"""

import itertools
import os
import sys
from dataclasses import dataclass

# common.py lies one folder up, or beside a copy of this file. It comes before torch, because it
# says how torch's threads wait for each other.
FOLDER = os.path.dirname(os.path.realpath(__file__))
if not os.path.isfile(os.path.join(FOLDER, "common.py")):
    FOLDER = os.path.dirname(FOLDER)
sys.path.insert(1, FOLDER)
import common  # noqa: E402

import torch  # noqa: E402
import torch.nn as nn  # noqa: E402
import torch.nn.functional as F  # noqa: E402

# ==============================================================================
# 2. Hyper-parameters: one line each; common.Args has those that all nine share
# ==============================================================================


@dataclass(kw_only=True)
class Args(common.Args):
    method: str = "shuffled_dbn"
    proj_hidden: int = 1024
    proj_dim: int = 512
    proj_layers: int = 2
    groups: int = common.flag(0, "random groups of channels; 0: about 2 d / batch size", least=0)
    no_shuffle: bool = common.flag(False, "groups of neighbouring channels, always the same")

    def rules(self):
        groups = self.groups or self.proj_dim  # 0 always fits
        yield self.proj_dim % groups == 0, "--groups must divide --proj-dim"
        full = self.batch_size > self.proj_dim // groups
        yield full, "--proj-dim / --groups must be below --batch-size"


def parse_args(argv=None):
    """Args from the command line, or from a list of words. Raises common.UserError."""
    return common.parse_args(Args, argv, __doc__)


# ==============================================================================
# 3. Loss
# ==============================================================================


class InverseSquareRoot(torch.autograd.Function):
    """S^(-1/2) = U diag(lambda^(-1/2)) U^T of symmetric positive-definite S [..., n, n].

    Autograd through eigh divides by lambda_i - lambda_j, which gives NaN where two eigenvalues
    are equal, and training makes them equal. In the gradient of S^(-1/2) these terms cancel.
    For G = dL/dS^(-1/2), made symmetric, and r_i = sqrt(lambda_i):
        dL/dS = U (K * (U^T G U)) U^T,    K_ij = -1 / (r_i r_j (r_i + r_j))"""

    @staticmethod
    def forward(ctx, s):
        eigenvalues, u = torch.linalg.eigh(s)  # [..., n], [..., n, n]
        root = eigenvalues.sqrt()  # NaN if S is not positive-definite; the run then stops
        ctx.save_for_backward(root, u)
        return (u / root.unsqueeze(-2)) @ u.mT

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        root, u = ctx.saved_tensors
        g = (gradient + gradient.mT) / 2
        r_i, r_j = root.unsqueeze(-1), root.unsqueeze(-2)
        return u @ (u.mT @ g @ u * (-1 / (r_i * r_j * (r_i + r_j)))) @ u.mT


def decorrelate(z, groups=0, permutation=None):
    """Whiten groups of channels over the samples: z [N, d] -> [N, d], covariance I (divisor N).

    permutation [d]: order of the channels before they are cut into equal groups.
    groups: 0 takes 2 d / N (the authors' code) or the next divisor of d. N <= d / g: ValueError."""
    n, d = z.shape
    groups = groups or next(g for g in range(min(d, -(-2 * d // n)), d + 1) if d % g == 0)
    if d % groups:
        raise ValueError(f"groups = {groups} does not divide the {d} channels")
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    x = z - z.mean(-2, keepdim=True)  # centred over the samples
    if permutation is not None:
        x = x[:, permutation]
    x = x.unflatten(-1, (groups, -1)).transpose(-2, -3)  # [g, N, d/g]
    if n <= d // groups:
        raise ValueError(f"S is singular: N = {n} samples of {d // groups} channels")
    s = x.mT @ x / n  # [g, d/g, d/g]
    y = x @ InverseSquareRoot.apply(s)  # ZCA: rows U Lambda^(-1/2) U^T x
    y = y.transpose(-2, -3).flatten(-2)  # [N, d]
    return y if permutation is None else y[:, permutation.argsort()]


def shuffled_dbn_loss(z1, z2, groups=0, generator=None, shuffle=True):
    """Mean over the images of |y1 - y2|^2 of the decorrelated views, a scalar.

    z1, z2: embeddings [N, d] of two views. shuffle=False: groups of neighbouring channels."""
    y = []
    for z in (z1, z2):
        draws = torch.rand(z.shape[1], device=z.device, generator=generator)
        permutation = draws.argsort() if shuffle else None  # own groups for each view
        y += [decorrelate(z, groups, permutation)]
    return (y[0] - y[1]).square().sum(1).mean()


# ==============================================================================
# 4. Model
# ==============================================================================


def mlp(inputs, hidden, outputs, layers, norm=nn.BatchNorm1d, bias=False):
    """`layers` linear layers, with norm and ReLU between them: [n, inputs] -> [n, outputs]."""
    modules = []
    for _ in range(layers - 1):
        modules += [nn.Linear(inputs, hidden, bias=norm is nn.Identity)]  # a norm has its own bias
        modules += [norm(hidden), nn.ReLU(inplace=True)]
        inputs = hidden
    return nn.Sequential(*modules, nn.Linear(inputs, outputs, bias=bias))


class ShuffledDBN(nn.Module):
    """H = backbone(x) [n, feature_dim], Z = projector(H) [n, d]; forward gives the loss."""

    def __init__(self, backbone, feature_dim, args):
        super().__init__()
        self.args = args
        self.backbone = backbone
        sizes = feature_dim, args.proj_hidden, args.proj_dim, args.proj_layers
        self.projector = mlp(*sizes, bias=True)

    def forward(self, views):
        """s views [n, 3, size, size] of the same images -> the global batch's loss, a scalar."""
        args = self.args
        h = [self.backbone(x) for x in views]  # s x [n, feature_dim]
        z = [self.projector(v) for v in h]  # s x [n, d]
        with torch.autocast(h[0].device.type, enabled=False):  # the loss in float32 or better
            z = [common.gather(v) for v in z]  # s x [N, d]
            pairs = itertools.combinations(z, 2)
            shuffle = not args.no_shuffle
            losses = [shuffled_dbn_loss(z1, z2, args.groups, shuffle=shuffle) for z1, z2 in pairs]
            return sum(losses) / len(losses)


def build(args):
    """The model on a new backbone."""
    backbone, feature_dim = common.build_backbone(args.backbone, args.image_size)
    return ShuffledDBN(backbone, feature_dim, args)


# ==============================================================================
# 5. Training: the same text in all nine files, but for lines marked "# <-"
# ==============================================================================


@common.gives_back  # signal handlers and the lock on the folder, however it ends
def train(args, build=build):
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
            views = data.augment(batch, step)  # s x [n, 3, size, size]
            factor = common.learning_rate(args, step, run.total_steps, data.steps_per_epoch)
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * (1.0 if group["constant"] else factor)

            with run.guard(step), torch.autocast(**bf16):
                loss = network(views)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            run.watch(step, loss)  # adds up the loss, notes what is not finite; it rarely waits
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
            h = common.extract(model.backbone, data, data.queries, args.precision)  # [M, features]
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
        torch.manual_seed(args.seed)  # the random weights of this seed, without --init
        untrained = build(args).backbone.to(device)
        pixels = nn.Sequential(nn.AdaptiveAvgPool2d(min(32, data.size)), nn.Flatten())
        networks = {"kNN": model.backbone, "raw pixels": pixels, "untrained backbone": untrained}
        labels = data.large_bank_labels
        for name, encoder in networks.items():
            bank = common.extract(encoder, data, data.large_bank, args.precision)  # [N, features]
            queries = common.extract(encoder, data, data.test, args.precision)  # [M, features]
            scores[name] = common.knn_accuracy(bank, labels, queries, data.test_labels)
    run.close(scores)
    return run


# ==============================================================================
# 6. Start
# ==============================================================================

if __name__ == "__main__":
    common.main(train, parse_args)
