"""Shuffled-DBN: decorrelate random groups of channels over the batch, then make the views equal.

Tianyu Hua, Wenxiao Wang, Zihui Xue, Sucheng Ren, Yue Wang, Hang Zhao: "On Feature Decorrelation in Self-Supervised Learning",
ICCV 2021, arXiv 2105.00470. The first author's code: PatrickHua/FeatureDecorrelationSSL.

The idea. Batch norm on the embedding prevents the collapse to a point, but lets the channels repeat each other: dimensional collapse.
Decorrelated batch norm (DBN) whitens them. To whiten many channels with a small batch they are cut into groups, and the groups are
drawn anew for every batch and view, so that in the long run no two channels can stay correlated.

The loss for views Z1, Z2 [N, d], d channels in g random groups of d/g:

    S_k = X_k^T X_k / N                                  [d/g, d/g] covariance of group k, X_k [N, d/g] centred over the batch
    Y_k = X_k S_k^(-1/2)                                 ZCA whitening; the groups back in place are Y [N, d]
    L = mean over the images of |y1 - y2|^2              summed over the channels; about 2d for unrelated views

One step:
    z1, z2 = projector(backbone(x1)), projector(backbone(x2))
    y1 = decorrelate(z1, g, random order of the channels)
    y2 = decorrelate(z2, g, another random order)
    loss = mean(sum((y1 - y2)^2))

What prevents collapse: whitening, in groups that change. No negatives, predictor, stop-gradient or EMA.
Diff it against wmse.py: groups of shuffled channels, the whole batch, ZCA, plain distance; there slices of the batch, Cholesky, cosine.

Deviations: the code is the authority where the paper is silent: biased covariance without eps, other permutations for the two views,
plain squared distance; heads 1024 and 512 as in its covnorm.yaml for CIFAR-10 (there 16 groups at batch 64; here automatic); whitening
and batch norms over the global batch, in the authors' code over each GPU's images (hence --groups 32 below); ZCA has a backward of its
own, stable for equal eigenvalues; more than two views: the mean over pairs.
With other groups per view the loss has a positive floor, even for equal views: the partition acts as noise.
The recipe is that of the other files, so that a diff shows the idea: batches of 256, bf16 where the processor has it, Adam at 3e-3
(SimSiam: 2e-3; BYOL, Barlow Twins: 1e-3) with weight decay 1e-6, a warm-up of a tenth of the run, at most 500 steps (MoCo: 150), cosine
step by step to 0, the W-MSE augmentation, batch norm view by view in the backbone, a ResNet's residual blocks start as the identity.

    python methods/shuffled_dbn.py                       # some minutes on a laptop, offline
    torchrun --nproc_per_node=8 methods/shuffled_dbn.py --dataset folder --data-dir imagenet --image-size 224 --backbone resnet50 \
        --proj-layers 3 --proj-hidden 2048 --groups 32 --augment moco-v2 --optimizer sgd --batch-size 256 --lr 0.02 \
        --weight-decay 5e-4 --warmup 25020 --epochs 200
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
    parser = common.shared_arguments("shuffled_dbn", __doc__)
    parser.set_defaults(proj_hidden=1024, proj_dim=512, proj_layers=2)  # the authors' CIFAR-10 configuration; on ImageNet 2048, 512, 3
    parser.add_argument("--groups", type=common.number(int, 0), default=0,
                        help="g, random groups of channels; 0: the least divisor of d that is at least 2 d / batch size")
    parser.add_argument("--no-shuffle", action="store_true", help="groups of neighbouring channels, always the same: plain DBN")
    return common.finish_arguments(parser, argv, size_rules)


# ==============================================================================
# 3. Loss
# ==============================================================================


def size_rules(args):
    """What the loss demands of the sizes. Raises UserError that names a flag and a value that works."""
    args.groups = args.groups or automatic_groups(args.proj_dim, args.batch_size)  # 0: automatic
    common.check(args.proj_dim % args.groups == 0, f"--groups {args.groups} does not divide --proj-dim {args.proj_dim}; "
                 f"try --groups {common.divisor_near(args.proj_dim, args.groups, automatic_groups(args.proj_dim, args.batch_size))}")
    common.check(args.batch_size > args.proj_dim // args.groups, f"--batch-size {args.batch_size} is too small for the "
                 f"{args.proj_dim // args.groups} channels of a group; try --groups {automatic_groups(args.proj_dim, args.batch_size)}")


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


def automatic_groups(d, n):
    """g = ceil(2 d / N), about N / 2 channels in a group (official code), rounded up to a divisor of d."""
    return next(g for g in range(min(d, -(-2 * d // n)), d + 1) if d % g == 0)


def decorrelate(z, groups, permutation=None):
    """Decorrelated batch norm of groups of channels: z [N, d] -> [N, d], each group with mean 0 and covariance I (divisor N).

    permutation: [d], order of the channels before they are cut into `groups` equal groups; None keeps their own. No eps, no affine map, as in
    the official code. Needs N > d/g, else the covariance is singular: ValueError."""
    if z.shape[1] % groups:
        raise ValueError(f"groups = {groups} does not divide the {z.shape[1]} channels")
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    x = z - z.mean(0)  # centred over the batch
    x = x if permutation is None else x[:, permutation]
    x = x.unflatten(1, (groups, -1)).transpose(0, 1)  # [g, N, d/g]
    if len(z) <= x.shape[2]:  # eigenvalues of 0, or of rounding noise
        raise ValueError(f"N = {len(z)} samples cannot fill the {x.shape[2]} channels of a group")
    covariance = x.mT @ x / len(z)  # [g, d/g, d/g], biased
    y = x @ InverseSquareRoot.apply(covariance)  # ZCA
    y = y.transpose(0, 1).flatten(1)  # [N, d]
    return y if permutation is None else y[:, permutation.argsort()]


def shuffled_dbn_loss(z1, z2, groups, generator=None, shuffle=True):
    """Mean over the images of |y1 - y2|^2, summed over the channels, of the decorrelated views (official code), a scalar.

    z1, z2: [N, d]. Each view has its own random permutation of the channels; none with one group or shuffle=False."""

    def view(z):
        shuffled = shuffle and groups > 1
        permutation = torch.rand(z.shape[1], device=z.device, generator=generator).argsort() if shuffled else None
        return decorrelate(z, groups, permutation)

    return (view(z1) - view(z2)).square().sum(1).mean()


# ==============================================================================
# 4. Model
# ==============================================================================


class ShuffledDBN(nn.Module):
    """Backbone and projector. `forward(views)`: s views [n, 3, H, W] (n images here, N > d / g in all) -> scalar loss."""

    def __init__(self, backbone, feature_dim, proj_hidden=1024, proj_dim=512, proj_layers=2, groups=4, shuffle=True):
        super().__init__()
        self.backbone = backbone
        widths = [feature_dim] + [proj_hidden] * (proj_layers - 1)
        hidden = [layer for a, b in zip(widths, widths[1:]) for layer in (nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU(inplace=True))]
        self.projector = nn.Sequential(*hidden, nn.Linear(widths[-1], proj_dim))
        self.groups, self.shuffle = groups, shuffle

    def forward(self, views):
        h = [self.backbone(x) for x in views]  # s x [n, feature_dim]
        z = [self.projector(v) for v in h]  # s x [n, d]
        with torch.autocast(h[0].device.type, enabled=False):  # the loss: float32 or better, over the global batch
            z = [common.gather(v) for v in z]  # s x [N, d]
            pairs = [(i, j) for j in range(len(views)) for i in range(j)]
            return sum(shuffled_dbn_loss(z[i], z[j], self.groups, shuffle=self.shuffle) for i, j in pairs) / len(pairs)


def build(args):
    backbone, feature_dim = common.build_backbone(args.backbone, args.image_size)
    return ShuffledDBN(backbone, feature_dim, args.proj_hidden, args.proj_dim, args.proj_layers, args.groups, not args.no_shuffle)


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
