"""W-MSE (Ermolov et al., ICML 2021): whiten the embeddings, then match the views.

Paper: "Whitening for Self-Supervised Representation Learning", arXiv 2007.06346
Code: htdt/self-supervised (official)

Idea: Two views of an image should have the same embedding once the embeddings are whitened.
    Whitened channels have variance 1 and are uncorrelated, so embeddings cannot all be equal.
    The whitening matrix comes from a random slice of the batch, and gradient flows through it.

Loss: for views of a slice of w images, Z [w, d]
    X = Z - mean over the samples
    S = X^T X / (w - 1)                                                                  [d, d]
    Y = X A^(-T) with A A^T = S, the Cholesky factor                                     [w, d]
    L = mean over the images of |y1 / |y1| - y2 / |y2||^2 = 2 - 2 cos(y1, y2)

What prevents collapse:
    negatives       no
    predictor       no
    stop-gradient   no
    moving average  no
    decorrelation   yes, whitening of channels over samples
Diff it with: cw_rgp.py (samples over channels), shuffled_dbn.py (groups of channels)

Deviations:
    ZCA's gradient is written out, since autograd's is NaN for equal eigenvalues.
    The paper's rate falls in two steps at the end, ours as a cosine.
    For `pca`, non-finite gradients become 0. Its loss did not fall in our runs on `patterns`.

Recipe: the same in all nine files, so that a diff shows ideas; methods/README.md has the papers'.
    Batches of 256 (BYOL: 128), two views by W-MSE's augmentation, bf16 where the processor has it.
    With more than two views, the loss is the mean over all pairs of views.
    Muon at 0.1 for filters of `tiny`, the default: it learns weak features as fast as strong ones.
    Adam at 3e-3 with weight decay 1e-6 for all else, and for other backbones.
    Rates rise for a tenth of the run, at most 500 steps (MoCo, BYOL: 150), and fall as a cosine.
    SimSiam's predictor keeps its peak rate at all steps.
    The backbone sees one view at a time. A ResNet's residual blocks start as the identity, but
    not in the official code of MoCo, W-MSE, Shuffled-DBN and (below ResNet-50) BYOL.

Run: python methods/wmse.py    (one to four minutes on two CPU cores, offline)
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
    method: str = "wmse"
    proj_hidden: int = 1024
    proj_dim: int = 64
    proj_layers: int = 2
    whitening: str = common.flag("cholesky", "how channels are made uncorrelated; bn only scales "
                                 "them, none does nothing", choices="cholesky zca pca bn none")
    w_size: int = common.flag(128, "images whitened together, more than --proj-dim", least=3)
    w_iter: int = common.flag(1, "times a step cuts the batch into slices", least=1, most=100)
    eps: float = common.flag(0.0, "share of the identity in the covariance", least=0, below=1)

    def rules(self):
        yield self.batch_size % self.w_size == 0, "--w-size must divide --batch-size"
        full = self.whitening in ("bn", "none") or self.eps > 0 or self.w_size > self.proj_dim
        yield full, "--w-size must be above --proj-dim, or --eps above 0"


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


def whiten(z, kind="cholesky", eps=0.0):
    """Whiten channels over samples: z [..., w, d] -> [..., w, d], mean 0 and covariance I.

    kind: `cholesky` (the paper), `zca` or `pca`; `bn` only makes the variances 1, `none` returns
    z. eps: S becomes (1 - eps) S + eps I. If it is 0, the first three need w > d (ValueError)."""
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    if kind == "none":
        return z
    x = z - z.mean(-2, keepdim=True)  # centred over the samples
    if kind == "bn":
        return x / ((1 - eps) * x.var(-2, keepdim=True) + eps).sqrt()
    w, width = x.shape[-2:]
    if eps == 0 and w <= width:  # centring takes one dimension
        raise ValueError(f"S is singular: w = {w} samples of {width} channels")
    s = x.mT @ x / (w - 1)  # [..., d, d]
    s = (1 - eps) * s + eps * torch.eye(s.shape[-1], dtype=s.dtype, device=s.device)
    if kind == "cholesky":
        factor, info = torch.linalg.cholesky_ex(s)  # cholesky itself would wait for the device
        factor = torch.where((info == 0)[..., None, None], factor, float("nan"))
        return torch.linalg.solve_triangular(factor, x.mT, upper=False).mT  # rows A^(-1) x
    if kind == "zca":
        return x @ InverseSquareRoot.apply(s)  # rows U Lambda^(-1/2) U^T x
    if kind != "pca":
        raise ValueError(f"kind = {kind!r}; try cholesky, zca, pca, bn or none")
    if s.requires_grad:  # the gradient has 1 / (lambda_i - lambda_j): infinite if they are equal
        s.register_hook(lambda gradient: torch.nan_to_num(gradient, 0.0, 0.0, 0.0))
    eigenvalues, u = torch.linalg.eigh(s)
    return x @ u / eigenvalues.sqrt().unsqueeze(-2)  # rows Lambda^(-1/2) U^T x


def wmse_loss(views, w_size=128, w_iter=1, kind="cholesky", eps=0.0, generator=None):
    """Mean squared distance of the whitened, normalised views, a scalar in [0, 4].

    views: s >= 2 embeddings [N, d] of the same images. The batch is cut at random into slices of
    w_size, the same for all views, w_iter times. If w_size does not divide N: ValueError."""
    z = torch.stack(list(views))  # [s, N, d]
    s, n, d = z.shape
    if n % w_size:
        raise ValueError(f"w_size = {w_size} does not divide the batch of {n}")
    order = torch.rand(w_iter, n, device=z.device, generator=generator).argsort(-1)
    slices = z[:, order.flatten()].unflatten(1, (-1, w_size))  # [s, w_iter N / w, w, d]
    y = F.normalize(whiten(slices, kind, eps), dim=-1)
    pairs = itertools.combinations(y, 2)
    losses = [(2 - 2 * (y1 * y2).sum(-1)).mean() for y1, y2 in pairs]
    return sum(losses) / len(losses)


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


class WMSE(nn.Module):
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
        z = self.projector(torch.cat(h)).chunk(len(h))  # s x [n, d], all views as one batch
        with torch.autocast(h[0].device.type, enabled=False):  # the loss in float32 or better
            z = [common.gather(v) for v in z]  # s x [N, d]
            return wmse_loss(z, args.w_size, args.w_iter, args.whitening, args.eps)


def build(args):
    """The model on a new backbone."""
    backbone, feature_dim = common.build_backbone(args.backbone, args.image_size)
    return WMSE(backbone, feature_dim, args)


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
