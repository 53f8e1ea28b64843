"""BYOL: predict the embedding that a slowly moving copy of the network gives to another view.

Jean-Bastien Grill, Florian Strub, Florent Altche, Corentin Tallec, Pierre Richemond, Elena Buchatskaya, Carl Doersch, Bernardo Avila
Pires, Zhaohan Guo, Mohammad Gheshlaghi Azar, Bilal Piot, Koray Kavukcuoglu, Remi Munos, Michal Valko: "Bootstrap Your Own Latent: A New
Approach to Self-Supervised Learning", NeurIPS 2020, arXiv 2006.07733. Official code: google-deepmind/deepmind-research, folder byol.

The idea. An online network with a predictor on top learns to predict what a target network says of another view. The target is a
moving average of the online network and gets no gradient. There are no negatives, and yet nothing collapses: the authors'
hypothesis is that predictor and slow target make constant embeddings unstable.

The loss (Eq. 2) for the prediction p of one view and the target embedding z' of the other; both directions are added:

    L = |p/|p| - z'/|z'||^2 = 2 - 2 cos(p, z')                                           p, z' [N, d]
    xi <- tau xi + (1 - tau) theta (Eq. 1),   tau_k = 1 - (1 - tau_base) (cos(pi k / K) + 1) / 2   at step k of K

One step:
    p1, p2 = predictor(projector(backbone(x1))), the same of x2
    z1, z2 = target_projector(target_backbone(x1)), the same of x2       # no gradient
    loss = mean(2 - 2 cos(p1, z2)) + mean(2 - 2 cos(p2, z1))
    optimizer step
    target <- tau * target + (1 - tau) * online                          # parameters only, with the new online network

What prevents collapse: predictor and stop-gradient; the EMA target steadies them (simsiam.py does without). No negatives, no whitening.
Diff it against simsiam.py: the EMA target. Against moco.py: a predictor in place of the negatives.

Deviations: widths of the heads and tau_base of the W-MSE authors on CIFAR-10 (1024, 64, 0.99; the paper on ImageNet: 4096, 256, 0.996;
their last layers have a bias, the official code's and ours none); the target starts as a copy (official: its own random start); more
than two views: the mean over pairs of views. As in the official code, the target's batch norms use their own batch statistics. Jitter
and blur are torchvision's (official: brightness added, zeros around the blur).
The recipe is that of the other files, so that a diff shows the idea: batches of 256, bf16 where the processor has it, Adam at 3e-3
(SimSiam: 2e-3; BYOL, Barlow Twins: 1e-3) with weight decay 1e-6, a warm-up of a tenth of the run, at most 500 steps (MoCo: 150), cosine
step by step to 0, the W-MSE augmentation, batch norm view by view in the backbone, a ResNet's residual blocks start as the identity.

    python methods/byol.py                               # some minutes on a laptop, offline
    torchrun --nproc_per_node=8 methods/byol.py --dataset folder --data-dir imagenet --image-size 224 --backbone resnet50 \
        --augment byol --optimizer lars --batch-size 4096 --lr 3.2 --weight-decay 1.5e-6 --warmup 3120 --epochs 1000 \
        --proj-hidden 4096 --proj-dim 256 --momentum 0.996
"""

import copy
import math
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
    parser = common.shared_arguments("byol", __doc__)
    parser.set_defaults(proj_hidden=1024, proj_dim=64, proj_layers=2, lr=1e-3)  # the W-MSE authors' on CIFAR-10; the paper's on ImageNet: 4096, 256
    parser.add_argument("--momentum", type=common.number(float, 0, 1, example=0.99), default=0.99, help="tau_base, rising to 1; on ImageNet 0.996")
    parser.add_argument("--predictor", choices=("mlp", "linear", "direct", "none"), default="mlp",
                        help="`direct`: DirectPred, from the embeddings' correlation; `none` with --momentum 0 collapses")
    parser.add_argument("--norm", choices=("bn", "gn"), default="bn", help="norm of the heads: batch norm, or group norm, which sees no batch")
    return common.finish_arguments(parser, argv, size_rules)


# ==============================================================================
# 3. Loss
# ==============================================================================


def size_rules(args):
    """What the loss demands of the sizes. Raises UserError that names a flag and a value that works."""
    common.check(args.norm == "bn" or (args.proj_hidden % 16 == 0 and args.proj_hidden >= 64), "--norm gn has 16 groups and needs a multiple "
                 f"of 16 from 64 on, not --proj-hidden {args.proj_hidden}; try --proj-hidden 1024")


def byol_loss(p, z):
    """One direction of the BYOL loss (Eq. 2), the mean over the batch: 2 - 2 cos, a scalar in [0, 4].

    p: predictions [N, d] of one view; z: target embeddings [N, d] of the other, which get no gradient."""
    p = F.normalize(p.to(torch.promote_types(p.dtype, torch.float32)), dim=1)
    z = F.normalize(z.to(p.dtype), dim=1).detach()
    return (2 - 2 * (p * z).sum(1)).mean()


def momentum_at(base, progress):
    """tau_k = 1 - (1 - tau_base) (cos(pi k / K) + 1) / 2 for progress = k / K in [0, 1]: from tau_base to 1."""
    return 1 - (1 - base) * (math.cos(math.pi * progress) + 1) / 2


def direct_predictor(correlation, eps=0.1):
    """DirectPred (Tian et al. 2021, arXiv 2102.06810): W [d, d] from the correlation F [d, d] of the embeddings.

    F = U diag(s) U^T  ->  W = U diag(sqrt(s / max s) + eps) U^T (the authors' code; the paper: sqrt(s) + eps max s). In training the
    eigenvectors of a linear predictor come to agree with F's, so they are set at once. (Here F starts as the identity and W knows the
    present batch; in the authors' code F starts from the first batch and W is that of the step before.)"""
    s, u = torch.linalg.eigh(correlation)
    root = (s / s.max().clamp_min(1e-12)).clamp_min(0).sqrt() + eps
    return (u * root) @ u.mT


# ==============================================================================
# 4. Model
# ==============================================================================


def head(inputs, hidden, outputs, layers, norm):
    """Linear, norm, ReLU, ..., linear: the shape of BYOL's projector and predictor."""
    widths = [inputs] + [hidden] * (layers - 1)
    norm_layer = {"bn": nn.BatchNorm1d, "gn": lambda width: nn.GroupNorm(16, width)}[norm]
    hidden = [layer for a, b in zip(widths, widths[1:]) for layer in (nn.Linear(a, b), norm_layer(b), nn.ReLU(inplace=True))]
    return nn.Sequential(*hidden, nn.Linear(widths[-1], outputs, bias=False))


class BYOL(nn.Module):
    """Online network, predictor and target network. `forward(views)`: s views [n, 3, H, W] (n images here, N in all) -> scalar loss."""

    def __init__(self, backbone, feature_dim, proj_hidden=1024, proj_dim=64, proj_layers=2, momentum=0.99, predictor="mlp", norm="bn"):
        super().__init__()
        self.backbone = backbone
        self.projector = head(feature_dim, proj_hidden, proj_dim, proj_layers, norm)
        self.predictor = nn.Identity()  # of `direct` and `none`
        if predictor == "mlp":
            self.predictor = head(proj_dim, proj_hidden, proj_dim, 2, norm)
        if predictor == "linear":
            self.predictor = nn.Linear(proj_dim, proj_dim, bias=False)
        self.target_backbone = copy.deepcopy(self.backbone).requires_grad_(False)
        self.target_projector = copy.deepcopy(self.projector).requires_grad_(False)
        self.direct = predictor == "direct"
        self.register_buffer("correlation", torch.eye(proj_dim) if self.direct else None)
        self.momentum = momentum

    @torch.no_grad()
    def update_target(self, progress):
        """xi <- tau xi + (1 - tau) theta, progress = step / total steps: parameters only, batch statistics are the target's own."""
        tau = momentum_at(self.momentum, progress)
        for network, target in ((self.backbone, self.target_backbone), (self.projector, self.target_projector)):
            for theta, xi in zip(network.parameters(), target.parameters()):
                xi.lerp_(theta, 1 - tau)

    def predict(self, z):
        """Predictions, s x [n, d], of the embeddings of all views. DirectPred sets W from the correlation F <- 0.3 F + 0.7 z^T z / (s N)."""
        if not self.direct:
            return [self.predictor(v) for v in z]
        with torch.no_grad(), torch.autocast(z[0].device.type, enabled=False):
            rows = torch.cat([common.gather(v) for v in z])  # [s N, d]
            self.correlation.mul_(0.3).add_(0.7 * rows.T @ rows / len(rows))
            w = direct_predictor(self.correlation)
        return [v.to(w.dtype) @ w for v in z]

    def forward(self, views):
        h = [self.backbone(x) for x in views]  # s x [n, feature_dim]
        p = self.predict([self.projector(v) for v in h])  # s x [n, d]
        with torch.no_grad():
            z = [self.target_projector(self.target_backbone(x)) for x in views]  # s x [n, d]
        with torch.autocast(h[0].device.type, enabled=False):  # the loss: float32 or better, over the global batch
            p, z = [common.gather(v) for v in p], [common.gather(v) for v in z]  # s x [N, d]
            pairs = [(i, j) for j in range(len(views)) for i in range(j)]
            return sum(byol_loss(p[i], z[j]) + byol_loss(p[j], z[i]) for i, j in pairs) / len(pairs)


def build(args):
    backbone, feature_dim = common.build_backbone(args.backbone, args.image_size)
    return BYOL(backbone, feature_dim, args.proj_hidden, args.proj_dim, args.proj_layers, args.momentum, args.predictor, args.norm)


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
            model.update_target(step / run.total_steps)  # <- BYOL: the target follows the new weights
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
