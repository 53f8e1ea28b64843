"""Barlow Twins: make the cross-correlation of two views the identity.

Jure Zbontar, Li Jing, Ishan Misra, Yann LeCun, Stephane Deny: "Barlow Twins: Self-Supervised Learning via Redundancy Reduction",
ICML 2021, arXiv 2103.03230. Official code: facebookresearch/barlowtwins.

The idea. Correlate every channel of one view with every channel of the other, over the batch. A channel shall correlate fully with
itself, which makes it invariant to the augmentation, and not at all with the others, which makes the channels say different things.
A constant channel correlates with nothing, and equal channels correlate with each other: the loss forbids both kinds of collapse.

The loss (Eq. 1 and 2) for embeddings standardised over the batch, channel by channel:

    C = Z1^T Z2 / N                                      [d, d], Z1, Z2 [N, d] with mean 0 and variance 1 per channel
    L = sum_i (1 - C_ii)^2 + lambda sum_i sum_{j != i} C_ij^2

One step:
    z1, z2 = projector(backbone(x1)), projector(backbone(x2))
    c = standardise(z1).T @ standardise(z2) / N
    loss = sum((1 - diagonal(c))^2) + lambda * sum(off_diagonal(c)^2)

Its value is large and should be: independent random embeddings give about d + lambda d (d - 1) / N.

What prevents collapse: decorrelation (soft whitening of the channels). No negatives, predictor, stop-gradient or EMA.
Diff it against vicreg.py: here one correlation matrix between the branches, there two regularisers in each.

Deviations: heads 1024 and 512, the CW-RGP authors' on CIFAR-10 (paper: 8192, 8192, 8192; solo-learn: 2048 three times); the cosine ends at
0 (official: 0.001 of the peak); biased variance with 1e-5 inside the root, as the official code's batch norm; C over all processes with
gradient (the official in-place sum over W processes hides from autograd: its gradient is 1 / W of ours, which LARS hides but in biases,
norm layers and the decay's share: hence their official rate 0.0384 / 32 and the decay 32 * 1e-6 below, for the authors' 32 GPUs); more
than two views: the mean over pairs.
The recipe is that of the other files, so that a diff shows the idea: batches of 256, bf16 where the processor has it, Adam at 3e-3
(SimSiam: 2e-3; BYOL, Barlow Twins: 1e-3) with weight decay 1e-6, a warm-up of a tenth of the run, at most 500 steps (MoCo: 150), cosine
step by step to 0, the W-MSE augmentation, batch norm view by view in the backbone, a ResNet's residual blocks start as the identity.

    python methods/barlow.py                             # some minutes on a laptop, offline
    torchrun --nproc_per_node=8 methods/barlow.py --dataset folder --data-dir imagenet --image-size 224 --backbone resnet50 \
        --proj-hidden 8192 --proj-dim 8192 --proj-layers 3 --augment byol --optimizer lars --batch-size 2048 --lr 1.6 \
        --lr-bias 0.0012 --weight-decay 3.2e-5 --warmup 6250 --epochs 1000
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
    parser = common.shared_arguments("barlow", __doc__)
    parser.set_defaults(proj_hidden=1024, proj_dim=512, proj_layers=2, lr=1e-3)  # the CW-RGP authors' on CIFAR-10; the paper on ImageNet: 8192, 8192, 3
    parser.add_argument("--lambd", type=common.number(float, 0, example=0.0051), default=0.0051, help="lambda, of the off-diagonal terms; official 0.0051")
    parser.add_argument("--standardize", choices=("batch", "l2"), default="batch", help="`l2`: rows of length sqrt(d), not channels of variance 1")
    return common.finish_arguments(parser, argv)


# ==============================================================================
# 3. Loss
# ==============================================================================


def barlow_twins_loss(z1, z2, lambd=0.0051, standardize="batch"):
    """Barlow Twins (Eq. 1 and 2), a scalar: the sum over all d^2 entries of the cross-correlation, not divided by d.

    z1, z2: [N, d]. standardize: `batch`, every channel to mean 0 and variance 1 over the batch (biased, 1e-5 added to the variance); or
    `l2`, every row to length sqrt(d) (after UniGrad, arXiv 2112.05141, which has length 1 and lambd 50)."""

    def normalised(z):
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        if standardize == "l2":
            return F.normalize(z, dim=1) * z.shape[1] ** 0.5
        return (z - z.mean(0)) / (z.var(0, unbiased=False) + 1e-5).sqrt()

    n, d = z1.shape
    c = normalised(z1).T @ normalised(z2) / n  # [d, d], Eq. 2
    on_diagonal = (1 - c.diagonal()).square().sum()  # invariance
    off_diagonal = c.square().sum() - c.diagonal().square().sum()  # redundancy reduction
    return on_diagonal + lambd * off_diagonal  # Eq. 1


# ==============================================================================
# 4. Model
# ==============================================================================


class BarlowTwins(nn.Module):
    """Backbone and projector. `forward(views)`: s views [n, 3, H, W] (n images here, N in all) -> scalar loss."""

    def __init__(self, backbone, feature_dim, proj_hidden=1024, proj_dim=512, proj_layers=2, lambd=0.0051, standardize="batch"):
        super().__init__()
        self.backbone = backbone
        widths = [feature_dim] + [proj_hidden] * (proj_layers - 1)
        hidden = [layer for a, b in zip(widths, widths[1:]) for layer in (nn.Linear(a, b, bias=False), nn.BatchNorm1d(b), nn.ReLU(inplace=True))]
        self.projector = nn.Sequential(*hidden, nn.Linear(widths[-1], proj_dim, bias=False))
        self.lambd, self.standardize = lambd, standardize

    def forward(self, views):
        h = [self.backbone(x) for x in views]  # s x [n, feature_dim]
        z = [self.projector(v) for v in h]  # s x [n, d]
        with torch.autocast(h[0].device.type, enabled=False):  # the loss: float32 or better, over the global batch
            z = [common.gather(v) for v in z]  # s x [N, d]
            pairs = [(i, j) for j in range(len(views)) for i in range(j)]
            return sum(barlow_twins_loss(z[i], z[j], self.lambd, self.standardize) for i, j in pairs) / len(pairs)


def build(args):
    backbone, feature_dim = common.build_backbone(args.backbone, args.image_size)
    return BarlowTwins(backbone, feature_dim, args.proj_hidden, args.proj_dim, args.proj_layers, args.lambd, args.standardize)


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
