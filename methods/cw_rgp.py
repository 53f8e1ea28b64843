"""CW-RGP: channel whitening with random group partition.

Xi Weng, Lei Huang, Lei Zhao, Rao Muhammad Anwer, Salman Khan, Fahad Shahbaz Khan: "An Investigation into Whitening
Loss for Self-supervised Learning", NeurIPS 2022, arXiv 2210.03586. Official code: winci-ai/CW-RGP.

The idea. Two views of an image shall have the same embedding, once the embeddings are whitened: whitened embeddings
cannot all be equal, so they cannot collapse to a point. Batch whitening (W-MSE) makes channels uncorrelated over the samples and
needs more samples than channels; channel whitening swaps the axes, makes *samples* uncorrelated over the channels, and
works with small batches. Splitting the channels into random groups demands that every group has full rank.

The loss, for views Z1, Z2 of w images, Z [w, d], d channels in g random groups of d/g (Eq. 2, 4; section 4):

    X = Z - mean over the d channels                     centring, before the grouping
    S_k = X_k X_k^T / (d/g - 1)                          [w, w] covariance of the samples in group k, X_k [w, d/g] (not centred again)
    Y_k = S_k^(-1/2) X_k                                 ZCA whitening; the groups back in place are Y [w, d]
    L = mean over the images of |y1/|y1| - y2/|y2||^2    = 2 - 2 cos(y1, y2)

One step:
    x1, x2 = augment(x), augment(x)                      # N images
    z1, z2 = projector(backbone(x1)), projector(backbone(x2))
    for rows in random_partition(N, w):                  # the same images in both views
        y1 = channel_whiten(z1[rows], random groups)     # other random groups for every slice and view
        y2 = channel_whiten(z2[rows], random groups)
    loss = mean(2 - 2 cos(y1, y2))

What prevents collapse: whitening; equal or low-rank embeddings cannot be whitened. No negatives, predictor, stop-gradient or EMA.
Diff it against wmse.py: the whitened axis (samples here, channels there) and the random groups.

Deviations: cosine schedule, step by step (official: by the epoch; the paper on CIFAR-10: --schedule step); the whitening has a backward of
its own, stable for equal eigenvalues; bf16 where the processor has it (official: --precision fp32); no covariance term, which the
official ImageNet script offers. As in the official code each view alone sets the backbone's batch statistics, and the projector sees
all views as one batch. With random groups per view the loss has a positive floor, even for equal views: the partition acts as noise.

    python methods/cw_rgp.py                             # some minutes on a laptop, offline
    torchrun --nproc_per_node=4 methods/cw_rgp.py --dataset cifar10 --backbone resnet18 --epochs 1000 --schedule step --warmup 500
    torchrun --nproc_per_node=4 methods/cw_rgp.py --dataset folder --data-dir imagenet --image-size 224 --backbone resnet50 \
        --proj-layers 3 --proj-hidden 2048 --proj-dim 1024 --groups 2 --w-size 128 --w-iter 1 --views 4 --augment moco-v2 \
        --optimizer sgd --batch-size 512 --lr 0.1 --weight-decay 1e-4 --warmup 500 --epochs 100
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
    parser = common.shared_arguments("cw_rgp", __doc__)
    parser.set_defaults(proj_hidden=1024, proj_dim=512, proj_layers=2)  # the paper's; on ImageNet 2048, 1024, 3
    parser.add_argument("--groups", type=common.number(int, 1), default=4, help="g, random groups of channels; the paper's 4 (Tiny-ImageNet 2)")
    parser.add_argument("--w-size", type=common.number(int, 2, example=64), default=64,
                        help="w, images whitened together: divides --batch-size, at most d / g; the paper's 64")
    parser.add_argument("--w-iter", type=common.number(int, 1), default=4, help="random partitions per step; official on CIFAR-10: 4 (four views: 1)")
    parser.add_argument("--eps", type=common.number(float, 0, below=1), default=0.0, help="S becomes (1 - eps) S + eps I; the official code's 0")
    parser.add_argument("--permutation", choices=("per-view", "shared", "fixed"), default="per-view",
                        help="random groups: for every slice and view (official); the same for all views; or neighbouring channels, always")
    parser.add_argument("--detach-whitening", action="store_true", help="no gradient through the whitening matrix, as in Zero-CL's ICL (ICLR 2022)")
    return common.finish_arguments(parser, argv, size_rules)


# ==============================================================================
# 3. Loss
# ==============================================================================


def size_rules(args):
    """What the loss demands of the sizes. Raises UserError that names a flag and a value that works."""
    width, near = args.proj_dim // args.groups, common.divisor_near
    common.check(args.proj_dim % args.groups == 0, f"--groups {args.groups} does not divide --proj-dim {args.proj_dim}; "
                 f"try --groups {near(args.proj_dim, min(args.groups, max(2, args.proj_dim // args.w_size)))}")
    common.check(width > 1, f"--groups {args.groups} leaves one channel of --proj-dim {args.proj_dim} to a group, which has no covariance; "
                 f"try --proj-dim {args.groups * args.w_size}")
    common.check(args.batch_size % args.w_size == 0, f"--w-size {args.w_size} does not divide --batch-size {args.batch_size}; "
                 f"try --w-size {near(args.batch_size, args.w_size)}")
    limit = width - 1 if args.groups == 1 else width  # no more samples can be uncorrelated over so many channels
    fits = [w for w in range(2, limit + 1) if args.batch_size % w == 0]
    wish = f"--w-size {min(fits, key=lambda w: abs(w - width // 2))} or " if fits else ""
    common.check(args.w_size <= limit or args.eps > 0, f"--w-size {args.w_size} is too large for --proj-dim / --groups = {width} channels; "
                 f"try {wish}--eps 1e-3")


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


def channel_whiten(z, groups, permutation=None, eps=0.0, detach=False):
    """Whiten samples over the channels of each group (CW-RGP section 4; official code).

    z: [..., w, d], embeddings of w samples. permutation: [..., d], order of the channels before they are cut into `groups`
    equal groups; None keeps their own. eps: covariance becomes (1 - eps) S + eps I. Returns [..., w, d]; with eps = 0, |row|^2 = d - g
    and, in every group, orthogonal rows. Needs w <= d/g (w < d where g = 1) or eps > 0 (and d/g > 1), else S is singular: ValueError. Take
    w <= d / (2 g): near the limit the smallest eigenvalue nears 0 and the gradient grows without bound."""
    if z.shape[-1] % groups:
        raise ValueError(f"groups = {groups} does not divide the {z.shape[-1]} channels")
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    x = z - z.mean(-1, keepdim=True)  # every sample: zero mean over all its channels, before grouping
    if permutation is not None:
        permutation = permutation.unsqueeze(-2).expand(x.shape)
        x = x.gather(-1, permutation)
    x = x.unflatten(-1, (groups, -1)).transpose(-2, -3)  # [..., g, w, d/g]
    w, width = x.shape[-2:]
    if width < 2 or eps == 0 and w > (width - 1 if groups == 1 else width):  # no covariance; eigenvalues of 0, or of rounding noise
        raise ValueError(f"w = {w} samples cannot be uncorrelated over {width} channels")
    covariance = x @ x.mT / (width - 1)  # [..., g, w, w], instance by instance
    covariance = (1 - eps) * covariance + eps * torch.eye(w, dtype=x.dtype, device=x.device)
    phi = InverseSquareRoot.apply(covariance)  # ZCA: U Lambda^(-1/2) U^T
    y = (phi.detach() if detach else phi) @ x  # [..., g, w, d/g]
    y = y.transpose(-2, -3).flatten(-2)  # [..., w, d]
    return y if permutation is None else torch.zeros_like(y).scatter(-1, permutation, y)


def cw_rgp_loss(views, groups=4, w_size=64, w_iter=4, eps=0.0, generator=None, permutation="per-view", detach=False):
    """Mean squared distance of the normalised, channel-whitened views (CW-RGP Eq. 2 and 4), a scalar in [0, 4].

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
    channels = None  # "fixed": groups of neighbouring channels
    if permutation != "fixed" and groups > 1:
        channels = random_order(1 if permutation == "shared" else s, slices.shape[1], d).expand(s, -1, -1)  # one for each slice and view
    y = F.normalize(channel_whiten(slices, groups, channels, eps, detach), dim=-1)  # Eq. 2
    distances = [(2 - 2 * (y[i] * y[j]).sum(-1)).mean() for j in range(s) for i in range(j)]  # Eq. 4, a scalar for each pair of views
    return sum(distances) / len(distances)


# ==============================================================================
# 4. Model
# ==============================================================================


class CWRGP(nn.Module):
    """Backbone and projector. `forward(views)`: s views [n, 3, H, W] (n images here, N in all) -> scalar loss."""

    def __init__(self, backbone, feature_dim, proj_hidden=1024, proj_dim=512, proj_layers=2, groups=4, w_size=64, w_iter=4,
                 eps=0.0, permutation="per-view", detach_whitening=False):
        super().__init__()
        self.backbone = backbone
        widths = [feature_dim] + [proj_hidden] * (proj_layers - 1)
        hidden = [layer for a, b in zip(widths, widths[1:]) for layer in (nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU(inplace=True))]
        self.projector = nn.Sequential(*hidden, nn.Linear(widths[-1], proj_dim))
        self.whitening = dict(groups=groups, w_size=w_size, w_iter=w_iter, eps=eps, permutation=permutation, detach=detach_whitening)

    def forward(self, views):
        h = [self.backbone(x) for x in views]  # s x [n, feature_dim]
        z = self.projector(torch.cat(h)).chunk(len(views))  # s x [n, d]
        with torch.autocast(h[0].device.type, enabled=False):  # the loss: float32 or better, over the global batch
            return cw_rgp_loss([common.gather(v) for v in z], **self.whitening)


def build(args):
    backbone, feature_dim = common.build_backbone(args.backbone, args.image_size)
    return CWRGP(backbone, feature_dim, args.proj_hidden, args.proj_dim, args.proj_layers, args.groups, args.w_size, args.w_iter,
                 args.eps, args.permutation, args.detach_whitening)


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
