"""VICReg: keep every channel's variance up and the channels uncorrelated, branch by branch.

Adrien Bardes, Jean Ponce, Yann LeCun: "VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning",
ICLR 2022, arXiv 2105.04906. Official code: facebookresearch/vicreg.

The idea. Three terms say what is wanted, each on its own. Invariance: two views have the same embedding. Variance: every channel
varies over the batch, so the embeddings are not one point. Covariance: the channels of a branch are uncorrelated, so they do
not all say the same. Each regulariser looks at one branch, so the branches need not share anything.

The loss (Eq. 1 to 6, in the official code's scaling) for embeddings Z, Z' [N, d] of two views:

    s(Z, Z') = mean square of Z - Z'                                     invariance
    v(Z) = 1/d sum_j max(0, 1 - sqrt(Var(z_j) + 1e-4))                   variance, hinge at 1
    c(Z) = 1/d sum_{i != j} Cov(Z)_ij^2                                  covariance, both with N - 1
    L = lambda s(Z, Z') + mu (v(Z) + v(Z')) / 2 + nu (c(Z) + c(Z'))      lambda, mu, nu = 25, 25, 1

One step:
    z1, z2 = projector(backbone(x1)), projector(backbone(x2))
    loss = 25 * mse(z1, z2) + 25 * (v(z1) + v(z2)) / 2 + c(z1) + c(z2)

What prevents collapse: the variance term (one point) and the covariance term (few dimensions). No negatives, predictor, stop-gradient
or EMA. Watch --var 0 (one point) and --cov 0 (one dimension).
Diff it against barlow.py: there one correlation matrix between the branches, here two regularisers in each.

Deviations: heads 1024 and 512, those of barlow.py (paper: 8192, 8192, 8192; solo-learn on CIFAR-10: 2048 three times); the cosine ends at 0
(official: 0.001 of the peak); the official code's scaling: half the sum of the variance terms, mean square over N and d (the paper's Eq. 5
and 6: the whole sum, squared distance summed over d: --scaling paper; the paper's pseudo-code: the whole sum and the mean square:
--var 50); more than two views: the mean over pairs of views.
The recipe is that of the other files, so that a diff shows the idea: batches of 256, bf16 where the processor has it, Adam at 3e-3
(SimSiam: 2e-3; BYOL, Barlow Twins: 1e-3) with weight decay 1e-6, a warm-up of a tenth of the run, at most 500 steps (MoCo: 150), cosine
step by step to 0, the W-MSE augmentation, batch norm view by view in the backbone, a ResNet's residual blocks start as the identity.

    python methods/vicreg.py                             # some minutes on a laptop, offline
    torchrun --nproc_per_node=8 methods/vicreg.py --dataset folder --data-dir imagenet --image-size 224 --backbone resnet50 \
        --proj-hidden 8192 --proj-dim 8192 --proj-layers 3 --augment byol --optimizer lars --batch-size 2048 --lr 1.6 \
        --weight-decay 1e-6 --warmup 6250 --epochs 1000
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
    parser = common.shared_arguments("vicreg", __doc__)
    parser.set_defaults(proj_hidden=1024, proj_dim=512, proj_layers=2)  # as barlow.py, shuffled_dbn.py and cw_rgp.py; the paper on ImageNet: 8192, 8192, 3
    parser.add_argument("--inv", type=common.number(float, 0, example=25), default=25.0, help="lambda, of the invariance term; the paper's 25")
    parser.add_argument("--var", type=common.number(float, 0, example=25), default=25.0, help="mu, of the variance term; the paper's 25; 0 collapses")
    parser.add_argument("--cov", type=common.number(float, 0, example=1), default=1.0, help="nu, of the covariance term; the paper's 1; 0: few dimensions")
    parser.add_argument("--scaling", choices=("code", "paper"), default="code", help="the official code's, or the paper's Eq. 5 and 6")
    return common.finish_arguments(parser, argv)


# ==============================================================================
# 3. Loss
# ==============================================================================


def vicreg_loss(z1, z2, inv_weight=25.0, var_weight=25.0, cov_weight=1.0, scaling="code"):
    """VICReg (Eq. 6), a scalar. z1, z2: [N, d].

    scaling `code`: mean square over N and d, and half the sum of the variance terms, as in the official code; `paper`: squared distance
    summed over d (Eq. 5) and the whole sum (Eq. 6)."""
    z1, z2 = (z.to(torch.promote_types(z.dtype, torch.float32)) for z in (z1, z2))
    n, d = z1.shape
    invariance = (z1 - z2).square().mean() * (1 if scaling == "code" else d)  # Eq. 5

    def variance(z):
        return F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean()  # Eq. 1 and 2, Var with N - 1

    def covariance(z):
        z = z - z.mean(0)
        c = z.T @ z / (n - 1)  # [d, d], Eq. 3
        return (c.square().sum() - c.diagonal().square().sum()) / d  # Eq. 4

    half = 0.5 if scaling == "code" else 1.0
    return (inv_weight * invariance + var_weight * half * (variance(z1) + variance(z2))
            + cov_weight * (covariance(z1) + covariance(z2)))  # Eq. 6


# ==============================================================================
# 4. Model
# ==============================================================================


class VICReg(nn.Module):
    """Backbone and projector ("expander"). `forward(views)`: s views [n, 3, H, W] (n images here, N in all) -> scalar loss."""

    def __init__(self, backbone, feature_dim, proj_hidden=1024, proj_dim=512, proj_layers=2, inv=25.0, var=25.0, cov=1.0, scaling="code"):
        super().__init__()
        self.backbone = backbone
        widths = [feature_dim] + [proj_hidden] * (proj_layers - 1)
        hidden = [layer for a, b in zip(widths, widths[1:]) for layer in (nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU(inplace=True))]
        self.projector = nn.Sequential(*hidden, nn.Linear(widths[-1], proj_dim, bias=False))
        self.weights, self.scaling = (inv, var, cov), scaling

    def forward(self, views):
        h = [self.backbone(x) for x in views]  # s x [n, feature_dim]
        z = [self.projector(v) for v in h]  # s x [n, d]
        with torch.autocast(h[0].device.type, enabled=False):  # the loss: float32 or better, over the global batch
            z = [common.gather(v) for v in z]  # s x [N, d]
            pairs = [(i, j) for j in range(len(views)) for i in range(j)]
            return sum(vicreg_loss(z[i], z[j], *self.weights, self.scaling) for i, j in pairs) / len(pairs)


def build(args):
    backbone, feature_dim = common.build_backbone(args.backbone, args.image_size)
    return VICReg(backbone, feature_dim, args.proj_hidden, args.proj_dim, args.proj_layers, args.inv, args.var, args.cov, args.scaling)


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
