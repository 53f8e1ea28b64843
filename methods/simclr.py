"""SimCLR: contrast every view with all other images of the batch.

Ting Chen, Simon Kornblith, Mohammad Norouzi, Geoffrey Hinton: "A Simple Framework for Contrastive Learning of Visual
Representations", ICML 2020, arXiv 2002.05709. Official code: google-research/simclr.

The idea. Two views of an image shall be more similar to each other than to the views of any other image in the batch.
Telling the images apart needs embeddings that are spread out, so the negatives prevent collapse. Needs no second network
and no memory, but batches large enough to hold hard negatives.

The loss (NT-Xent, Eq. 1) for 2N embeddings, N images in two views, tau the temperature, sim the cosine:

    l(i, j) = -log( exp(sim(z_i, z_j) / tau) / sum over k != i of exp(sim(z_i, z_k) / tau) )     z [2N, d]
    L = 1 / (2N) * sum over the 2N ordered positive pairs (i, j) of l(i, j)

The denominator has 2N - 1 terms: the positive is one of them, the view itself is not.

One step:
    x1, x2 = augment(x), augment(x)                      # N images
    z1, z2 = projector(backbone(x1)), projector(backbone(x2))
    z = normalise(concat(z1, z2))                        # [2N, d]
    logits = z @ z.T / tau; diagonal of logits = -inf    # [2N, 2N]
    loss = cross_entropy(logits, row of the other view)

What prevents collapse: the negatives. No predictor, stop-gradient, EMA or whitening.
Diff it against moco.py: where the negatives come from (this batch, or a queue filled by a slowly moving encoder).

Deviations: the paper's value, the mean over 2N anchors (the official code returns twice that, which LARS hides but in biases, norm layers
and the decay's share: hence twice the rate 4.8 and half the decay 1e-6 below); each view alone sets the backbone's batch statistics (the
official code sends both views through as one batch); the projector's batch norms are the official code's, its initial weights torch's
own; LARS as in BYOL's code (the rate applied after the momentum); jitter and blur as torchvision's (official: TensorFlow's, zeros around
the blur, one sigma for all images of a device); more than two views: the mean over pairs.
The recipe is that of the other files, so that a diff shows the idea: batches of 256, bf16 where the processor has it, Adam at 3e-3
(SimSiam: 2e-3; BYOL, Barlow Twins: 1e-3) with weight decay 1e-6, a warm-up of a tenth of the run, at most 500 steps (MoCo: 150), cosine
step by step to 0, the W-MSE augmentation, batch norm view by view in the backbone, a ResNet's residual blocks start as the identity.

    python methods/simclr.py                             # some minutes on a laptop, offline
    torchrun --nproc_per_node=8 methods/simclr.py --dataset folder --data-dir imagenet --image-size 224 --backbone resnet50 \
        --proj-hidden 2048 --temperature 0.1 --augment simclr --optimizer lars --batch-size 4096 --lr 4.8 \
        --lr-bias 9.6 --weight-decay 5e-7 --warmup 3120 --epochs 100
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
    parser = common.shared_arguments("simclr", __doc__)
    parser.set_defaults(proj_hidden=512, proj_dim=128, proj_layers=2)  # the paper's two layers; the official code's default is 3
    parser.add_argument("--temperature", type=common.number(float, above=0, example=0.5), default=0.5, help="tau; CIFAR-10 0.5, ImageNet 0.1")
    parser.add_argument("--stop-gradient", action="store_true", help="no gradient through the targets: MoCo without queue and slow encoder")
    return common.finish_arguments(parser, argv)


# ==============================================================================
# 3. Loss
# ==============================================================================


def nt_xent_loss(z1, z2, temperature=0.5, stop_gradient=False):
    """NT-Xent (SimCLR Eq. 1), the mean over the 2N anchors, a scalar.

    z1, z2: embeddings [N, d] of two views of the same N images, normalised here. stop_gradient: the positives and negatives that
    an anchor is compared with get no gradient (the link to MoCo, UniGrad arXiv 2112.05141)."""
    z = torch.cat([z1, z2])  # [2N, d]
    z = F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=1)
    targets = z.detach() if stop_gradient else z
    logits = z @ targets.T / temperature  # [2N, 2N], sim(z_i, z_k) / tau
    logits = logits.masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), float("-inf"))  # k != i
    positive = torch.arange(len(z), device=z.device).roll(len(z1))  # row i + N for i < N, row i - N for the others
    return F.cross_entropy(logits, positive)  # Eq. 1 by log-sum-exp, mean over 2N


# ==============================================================================
# 4. Model
# ==============================================================================


class SimCLR(nn.Module):
    """Backbone and projector. `forward(views)`: s views [n, 3, H, W] (n images here, N in all) -> scalar loss."""

    def __init__(self, backbone, feature_dim, proj_hidden=512, proj_dim=128, proj_layers=2, temperature=0.5, stop_gradient=False):
        super().__init__()
        self.backbone = backbone
        widths = [feature_dim] + [proj_hidden] * (proj_layers - 1)
        hidden = [layer for a, b in zip(widths, widths[1:]) for layer in (nn.Linear(a, b, bias=False), nn.BatchNorm1d(b), nn.ReLU(inplace=True))]
        self.projector = nn.Sequential(*hidden, nn.Linear(widths[-1], proj_dim, bias=False), nn.BatchNorm1d(proj_dim))  # as in the official code
        self.projector[-1].bias.requires_grad_(False)  # the last norm scales, but does not shift
        self.temperature, self.stop_gradient = temperature, stop_gradient

    def forward(self, views):
        h = [self.backbone(x) for x in views]  # s x [n, feature_dim]
        z = self.projector(torch.cat(h)).chunk(len(views))  # s x [n, d]
        with torch.autocast(h[0].device.type, enabled=False):  # the loss: float32 or better, over the global batch
            z = [common.gather(v) for v in z]  # s x [N, d]
            pairs = [(i, j) for j in range(len(views)) for i in range(j)]
            return sum(nt_xent_loss(z[i], z[j], self.temperature, self.stop_gradient) for i, j in pairs) / len(pairs)


def build(args):
    backbone, feature_dim = common.build_backbone(args.backbone, args.image_size)
    return SimCLR(backbone, feature_dim, args.proj_hidden, args.proj_dim, args.proj_layers, args.temperature, args.stop_gradient)


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
