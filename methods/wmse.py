"""W-MSE: whiten the embeddings over the batch, then make the views equal.

Aleksandr Ermolov, Aliaksandr Siarohin, Enver Sangineto, Nicu Sebe: "Whitening for Self-Supervised Representation Learning",
ICML 2021, arXiv 2007.06346. Official code: htdt/self-supervised.

The idea. Two views of an image shall have the same embedding, once the embeddings are whitened: mean 0 and covariance I over the
batch scatter them in a ball, so they cannot all be equal. Whitening is a linear map computed from the batch itself, and the
gradient flows through it. The matrix of one slice is noisy; averaging the loss over the random slices of the batch (and over
several partitions of it, --w-iter) evens that out.

The loss for views Z1, Z2 of a slice of w images, Z [w, d]:

    S = (Z - mean)^T (Z - mean) / (w - 1)                [d, d] covariance of the channels over the samples
    Y = (Z - mean) L^(-T),  L L^T = S                    Cholesky whitening: Y^T Y / (w - 1) = I
    L = mean over the images of |y1/|y1| - y2/|y2||^2    = 2 - 2 cos(y1, y2), over all pairs of views

One step:
    x1, x2 = augment(x), augment(x)                      # N images
    z1, z2 = projector(backbone(x1)), projector(backbone(x2))
    for rows in random_partition(N, w):                  # the same images in both views
        y1, y2 = whiten(z1[rows]), whiten(z2[rows])      # each view by itself
    loss = mean(2 - 2 cos(y1, y2))

What prevents collapse: whitening; fewer than d dimensions cannot be whitened. No negatives, predictor, stop-gradient or EMA.
Diff it against cw_rgp.py: the whitened axis (channels here, samples there). Watch --whitening bn (what it makes is no point but has few
dimensions; Z before it, which the figures show, is nearly a point), none (all collapses) and pca (its axes jump from batch to batch:
the loss cannot fall, few dimensions are left): sections 3.2 and 3.3 of arXiv 2210.03586.

Deviations: cosine schedule (the paper: --schedule step); batch 256 (the paper's two-view runs on CIFAR-10: 512); residual blocks start as
the identity, as in all nine files (official: not); ZCA has a backward of its own, stable for equal eigenvalues; non-finite gradients of
PCA are set to 0; bf16 where the processor has it (official: --precision fp32), and its rounding can fill a missing dimension; the command
for ImageNet-100 crops before it changes colours (official: after). As in the official code each view alone sets the backbone's batch
statistics, and the projector sees all views as one batch.

    python methods/wmse.py                               # some minutes on a laptop, offline
    torchrun --nproc_per_node=4 methods/wmse.py --dataset cifar10 --backbone resnet18 --batch-size 512 --epochs 1000 --schedule step --warmup 500
    torchrun --nproc_per_node=4 methods/wmse.py --dataset folder --data-dir imagenet100 --image-size 224 --backbone resnet18 --proj-dim 128 \
        --w-size 256 --views 4 --augment simclr --lr 2e-3 --epochs 240 --schedule step --warmup 500
"""

import os
import sys

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(1, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # common.py: beside this file, or one folder up
import common  # noqa: E402

# ==============================================================================
# 2. Hyper-parameters
# ==============================================================================


def parse_args(argv=None):
    parser = common.shared_arguments("wmse", __doc__)
    parser.set_defaults(proj_hidden=1024, proj_dim=64, proj_layers=2)  # the paper's; for larger images 1024, 128, 2
    parser.add_argument("--whitening", choices=KINDS, default="cholesky", help="`bn` only standardises, `none` does nothing: both collapse")
    parser.add_argument("--w-size", type=common.number(int, 3, example=128), default=128,
                        help="w, images whitened together: divides --batch-size, above --proj-dim; the paper's 2 d")
    parser.add_argument("--w-iter", type=common.number(int, 1), default=1, help="random partitions per step; official 1 (STL-10, Tiny-ImageNet, two views: 4)")
    parser.add_argument("--eps", type=common.number(float, 0, below=1), default=0.0, help="S becomes (1 - eps) S + eps I; the official code's 0")
    parser.add_argument("--one-way", action="store_true", help="the second view of a pair is a fixed target: L1' of Eq. 6 in arXiv 2210.03586")
    return common.finish_arguments(parser, argv, size_rules)


# ==============================================================================
# 3. Loss
# ==============================================================================


KINDS = ("cholesky", "zca", "pca", "bn", "none")


def size_rules(args):
    """What the loss demands of the sizes. Raises UserError that names a flag and a value that works."""
    common.check(args.batch_size > 2, "--batch-size 2 is too small to whiten; try --batch-size 256")
    any_dim, near = args.whitening in ("bn", "none") or args.eps > 0, common.divisor_near(args.batch_size, args.w_size, 3)
    common.check(args.batch_size % args.w_size == 0, f"--w-size {args.w_size} does not divide --batch-size {args.batch_size}; "
                 f"try --w-size {near}" + ("" if any_dim or near > args.proj_dim else f" --proj-dim {max(2, near // 2)}"))
    common.check(any_dim or args.w_size > args.proj_dim, f"--w-size {args.w_size} is too small for "
                 f"--proj-dim {args.proj_dim} dimensions; try --proj-dim {max(2, args.w_size // 2)} or --eps 1e-3")


class InverseSquareRoot(torch.autograd.Function):
    """S^(-1/2) = U diag(lambda^(-1/2)) U^T of symmetric positive-definite matrices S [..., n, n] (ZCA).

    Autograd through eigh has 1 / (lambda_i - lambda_j): NaN for equal eigenvalues, that is for nearly white data, where training
    leads. In the derivative of S^(-1/2) itself these cancel: with G = dL/dS^(-1/2), symmetric,
    dL/dS = U [K * (U^T G U)] U^T,  K_ij = -1 / (sqrt(lambda_i) sqrt(lambda_j) (sqrt(lambda_i) + sqrt(lambda_j)))."""

    @staticmethod
    def forward(ctx, s):
        eigenvalues, u = torch.linalg.eigh(s)  # [..., n], [..., n, n]
        root = eigenvalues.sqrt()  # NaN if S is not positive-definite: the run stops and says so
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
    """Whiten the channels over the samples: z [..., w, d] -> [..., w, d] with mean 0 and covariance I (divisor w - 1).

    kind: `cholesky` L^(-1) (W-MSE), `zca` U Lambda^(-1/2) U^T, `pca` Lambda^(-1/2) U^T, `bn` each channel's variance to 1 without
    decorrelation, `none`: z as it is. eps: covariance becomes (1 - eps) S + eps I. Needs w > d or eps > 0, else S is singular: ValueError."""
    if kind not in KINDS:
        raise ValueError(f"kind = {kind!r} is none of {', '.join(KINDS)}")
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    if kind == "none":
        return z
    w, d = z.shape[-2:]
    x = z - z.mean(-2, keepdim=True)  # centred over the samples
    if kind == "bn":
        return x / ((1 - eps) * x.square().sum(-2, keepdim=True) / (w - 1) + eps).sqrt()
    if eps == 0 and w <= d:  # eigenvalues of 0, or of rounding noise
        raise ValueError(f"w = {w} samples cannot fill {d} dimensions")
    covariance = x.mT @ x / (w - 1)  # [..., d, d]
    covariance = (1 - eps) * covariance + eps * torch.eye(d, dtype=x.dtype, device=x.device)
    if kind == "cholesky":
        factor, info = torch.linalg.cholesky_ex(covariance)  # L; unlike cholesky it does not wait for the device to look for errors
        factor = torch.where((info == 0)[..., None, None], factor, float("nan"))  # not positive-definite: the run stops and says so
        return torch.linalg.solve_triangular(factor, x.mT, upper=False).mT  # rows L^(-1) x
    if kind == "zca":
        return x @ InverseSquareRoot.apply(covariance)  # symmetric: rows U Lambda^(-1/2) U^T x
    if covariance.requires_grad:  # PCA: its gradient has 1 / (lambda_i - lambda_j), infinite for equal eigenvalues
        covariance.register_hook(lambda gradient: torch.nan_to_num(gradient, 0.0, 0.0, 0.0))
    eigenvalues, u = torch.linalg.eigh(covariance)
    return x @ u / eigenvalues.sqrt().unsqueeze(-2)  # rows Lambda^(-1/2) U^T x


def wmse_loss(views, w_size=128, w_iter=1, kind="cholesky", eps=0.0, generator=None, one_way=False):
    """Mean squared distance of the normalised, whitened views (W-MSE), a scalar in [0, 4].

    views: list of s >= 2 embeddings [N, d] of the same N images. The batch is cut at random into N / w_size slices, alike for all
    views, `w_iter` times; all s (s - 1) / 2 pairs of views count alike. Raises ValueError if w_size does not divide N."""
    z = torch.stack(list(views))  # [s, N, d]
    s, n, d = z.shape
    if n % w_size:
        raise ValueError(f"w_size = {w_size} does not divide the batch of {n}")

    def random_order(*shape):  # independent random permutations along the last axis
        return torch.rand(shape, device=z.device, generator=generator).argsort(-1)

    partitions = random_order(w_iter, n).flatten()  # [w_iter N]
    slices = z[:, partitions].unflatten(1, (-1, w_size))  # [s, w_iter N/w, w, d], the same images in all views
    y = F.normalize(whiten(slices, kind, eps), dim=-1)
    target = y.detach() if one_way else y
    distances = [(2 - 2 * (y[i] * target[j]).sum(-1)).mean() for j in range(s) for i in range(j)]  # a scalar for each pair of views
    return sum(distances) / len(distances)


# ==============================================================================
# 4. Model
# ==============================================================================


class WMSE(nn.Module):
    """Backbone and projector. `forward(views)`: s views [n, 3, H, W] (n images here, N in all) -> scalar loss."""

    def __init__(self, backbone, feature_dim, proj_hidden=1024, proj_dim=64, proj_layers=2, whitening="cholesky", w_size=128, w_iter=1,
                 eps=0.0, one_way=False):
        super().__init__()
        self.backbone = backbone
        widths = [feature_dim] + [proj_hidden] * (proj_layers - 1)
        hidden = [layer for a, b in zip(widths, widths[1:]) for layer in (nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU(inplace=True))]
        self.projector = nn.Sequential(*hidden, nn.Linear(widths[-1], proj_dim))
        self.whitening = dict(w_size=w_size, w_iter=w_iter, kind=whitening, eps=eps, one_way=one_way)

    def forward(self, views):
        h = [self.backbone(x) for x in views]  # s x [n, feature_dim]
        z = self.projector(torch.cat(h)).chunk(len(views))  # s x [n, d]
        with torch.autocast(h[0].device.type, enabled=False):  # the loss: float32 or better, over the global batch
            return wmse_loss([common.gather(v) for v in z], **self.whitening)


def build(args):
    backbone, feature_dim = common.build_backbone(args.backbone, args.image_size)
    return WMSE(backbone, feature_dim, args.proj_hidden, args.proj_dim, args.proj_layers, args.whitening, args.w_size, args.w_iter, args.eps,
                args.one_way)


# ==============================================================================
# 5. Training
# ==============================================================================


def train(args):
    # ---- Set up --------------------------------------------------------------
    device = common.set_up(args)  # GPU or CPU, precision, torchrun
    data = common.load_data(args, device)  # uint8 images, on the device where they fit
    torch.manual_seed(args.seed)  # the same initial weights in every process
    model = build(args).to(device, memory_format=torch.channels_last)
    optimizer = common.build_optimizer(model, args)
    run = common.Run(args, model, optimizer, data)  # its folder: config.json, metrics.csv, checkpoints
    network = common.distribute(model, args)  # torchrun: global batch statistics, averaged gradients; --compile
    autocast = dict(device_type=device.type, dtype=torch.bfloat16, enabled=args.precision == "bf16")
    step = run.resume()  # 0, or with --resume where the last checkpoint was

    while step < run.total_steps:
        # ---- One epoch -------------------------------------------------------
        model.train()
        epoch, first_batch = divmod(step, data.steps_per_epoch)
        for batch in data.batches(epoch, first_batch):  # uint8 [n, 3, H, W], this process's part of the global batch
            # Every random draw is a function of (seed, step), the learning rate of the step: a resumed run is the same run.
            torch.manual_seed(common.step_seed(args.seed, step))
            views = data.augment(batch, step)  # s x [n, 3, size, size]
            factor = common.learning_rate(args, step, run.total_steps, data.steps_per_epoch)
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * (1.0 if group["constant"] else factor)

            with run.guard(step), torch.autocast(**autocast):
                loss = network(views)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            run.watch(step, loss)  # notes on the device whether loss and gradients are finite, without waiting for it
            step += 1

            if step % args.log_every == 0:
                run.progress(step, loss)  # the only wait for the device: status line, stop on a non-finite number
            if step % data.steps_per_epoch:
                run.save_if_due(step)  # --save-every; after Ctrl-C or SIGTERM it saves and leaves

        # ---- Measure: fixed images, no augmentation, eval mode ---------------
        epoch += 1
        row = {"epoch": epoch, "step": step, "loss": run.mean_loss(), "lr": factor * args.lr, "knn": ""}
        if epoch == args.epochs or (args.eval_every and epoch % args.eval_every == 0):
            h = common.extract(model.backbone, data, data.queries, args.precision)  # [M, feature_dim], at most 1000 test images
            z = common.project(model.projector, h, args.precision)  # [M, d]
            row.update(common.collapse_metrics(z), rank_h=common.collapse_metrics(h)["rank_1pct"])
            if data.labelled:
                bank = common.extract(model.backbone, data, data.bank, args.precision)  # at most 5000 training images
                row["knn"] = common.knn_accuracy(bank, data.bank_labels, h, data.query_labels)
        run.end_epoch(step, row)  # metrics.csv, last.pt, a line on the screen, and a word if the figures show a collapse

    # ---- Close: kNN of all test images, beside two baselines -----------------
    run.save_backbone()
    scores = {}
    if data.labelled:
        torch.manual_seed(args.seed)
        pixels = nn.Sequential(nn.AdaptiveAvgPool2d(min(32, data.size)), nn.Flatten())  # at most 32 x 32 of them
        networks = {"kNN": model.backbone, "raw pixels": pixels, "untrained backbone": build(args).backbone.to(device)}
        for name, encoder in networks.items():
            bank, queries = (common.extract(encoder, data, images, args.precision) for images in (data.large_bank, data.test))
            scores[name] = common.knn_accuracy(bank, data.large_bank_labels, queries, data.test_labels)
    run.close(scores)


# ==============================================================================
# 6. Start
# ==============================================================================

if __name__ == "__main__":
    common.main(train, parse_args)
