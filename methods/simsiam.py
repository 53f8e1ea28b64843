"""SimSiam: two views, one network, a predictor and a stop-gradient.

Xinlei Chen, Kaiming He: "Exploring Simple Siamese Representation Learning", CVPR 2021, arXiv 2011.10566.
Official code: facebookresearch/simsiam.

The idea. A predictor on one view learns to predict the embedding of the other view by the same network, and the gradient flows
through the predicting side alone. Take the stop-gradient away and everything collapses at once. The authors' hypothesis: with
it, the training alternates as EM does; the targets are held fixed while the network moves towards them.

The loss (Eq. 1 and 4) for predictions p and embeddings z of two views:

    D(p, z) = -(p / |p|) . (z / |z|)                                                     p, z [N, d]
    L = D(p1, stopgrad(z2)) / 2 + D(p2, stopgrad(z1)) / 2                                mean over the batch, at least -1

One step:
    z1, z2 = projector(backbone(x1)), projector(backbone(x2))
    p1, p2 = predictor(z1), predictor(z2)
    loss = D(p1, z2.detach()) / 2 + D(p2, z1.detach()) / 2

What prevents collapse: predictor and stop-gradient. No negatives, EMA or whitening.
Diff it against byol.py: the EMA target. Watch --no-stop-gradient and --predictor none collapse: loss towards -1.

Deviations: the CIFAR-10 projector of the paper's appendix D (two layers, 2048 channels) and its ImageNet predictor (512); more than two
views: the mean over pairs of views. Adam (the paper: SGD at 0.03 times batch / 256, weight decay 5e-4), at 2e-3: at 3e-3 Z comes to fill
few of its dimensions, with some seeds at 2e-3 too. The predictor's rate is its peak from the first step to the last: no decay, as in
the official command (which has no warm-up at all).
The recipe is that of the other files, so that a diff shows the idea: batches of 256, bf16 where the processor has it, Adam at 3e-3
(SimSiam: 2e-3; BYOL, Barlow Twins: 1e-3) with weight decay 1e-6, a warm-up of a tenth of the run, at most 500 steps (MoCo: 150), cosine
step by step to 0, the W-MSE augmentation, batch norm view by view in the backbone, a ResNet's residual blocks start as the identity.

    python methods/simsiam.py                            # some minutes on a laptop, offline
    torchrun --nproc_per_node=8 methods/simsiam.py --dataset folder --data-dir imagenet --image-size 224 --backbone resnet50 \
        --proj-layers 3 --augment moco-v2 --optimizer sgd --batch-size 512 --lr 0.1 --weight-decay 1e-4 --warmup 0 --epochs 100
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
    parser = common.shared_arguments("simsiam", __doc__)
    parser.set_defaults(proj_hidden=2048, proj_dim=2048, proj_layers=2, lr=2e-3)  # the paper's on CIFAR-10; on ImageNet 2048, 2048, 3
    parser.add_argument("--pred-hidden", type=common.number(int, 1, example=512), default=512, help="width of the predictor's hidden layer; the paper's 512")
    parser.add_argument("--no-stop-gradient", action="store_true", help="let the gradient through the targets: collapses")
    parser.add_argument("--predictor", choices=("mlp", "none", "fixed"), default="mlp", help="`fixed` is random and does not train; `none` collapses")
    parser.add_argument("--predictor-lr", choices=("constant", "decay"), default="constant", help="`constant`, the official: no warm-up, no decay")
    parser.add_argument("--similarity", choices=("cosine", "softmax"), default="cosine", help="`softmax`: a cross-entropy")
    parser.add_argument("--asymmetric", action="store_true", help="one direction only: the first view of a pair predicts the second")
    parser.add_argument("--head-bn", choices=("none", "hidden", "output", "all"), default="output",
                        help="batch norm on hidden layers; `output` (the paper's): also on the projector's output; `all`: also the predictor's")
    return common.finish_arguments(parser, argv)


# ==============================================================================
# 3. Loss
# ==============================================================================


def negative_cosine(p, z):
    """D(p, z) of SimSiam Eq. 1, the mean over the batch, in [-1, 1]. p, z: [N, d]. Both get a gradient: the caller detaches z."""
    p = F.normalize(p.to(torch.promote_types(p.dtype, torch.float32)), dim=1)
    z = F.normalize(z.to(p.dtype), dim=1)
    return -(p * z).sum(1).mean()


def softmax_similarity(p, z):
    """The paper's section 4.5 in place of the cosine: D(p, z) = -softmax(z) . log softmax(p), mean over the batch. p, z: [N, d]."""
    p, z = (v.to(torch.promote_types(v.dtype, torch.float32)) for v in (p, z))
    return -(z.softmax(1) * p.log_softmax(1)).sum(1).mean()


# ==============================================================================
# 4. Model
# ==============================================================================


class SimSiam(nn.Module):
    """Backbone, projector and predictor. `forward(views)`: s views [n, 3, H, W] (n images here, N in all) -> scalar loss."""

    def __init__(self, backbone, feature_dim, proj_hidden=2048, proj_dim=2048, proj_layers=2, pred_hidden=512, stop_gradient=True,
                 predictor="mlp", predictor_lr="constant", similarity="cosine", symmetric=True, head_bn="output"):
        super().__init__()

        def linear(inputs, outputs, norm, affine=True, relu=True):  # a linear layer needs no bias where batch norm follows
            layers = [nn.Linear(inputs, outputs, bias=not norm)] + [nn.BatchNorm1d(outputs, affine=affine)] * norm
            return layers + [nn.ReLU(inplace=True)] * relu

        hidden, output, everywhere = head_bn != "none", head_bn in ("output", "all"), head_bn == "all"
        self.backbone = backbone
        widths = [feature_dim] + [proj_hidden] * (proj_layers - 1)
        layers = [layer for a, b in zip(widths, widths[1:]) for layer in linear(a, b, hidden)]
        self.projector = nn.Sequential(*layers, *linear(widths[-1], proj_dim, output, affine=False, relu=False))
        self.predictor = nn.Sequential(*linear(proj_dim, pred_hidden, hidden), *linear(pred_hidden, proj_dim, everywhere, relu=False))
        self.predictor.constant_lr = predictor_lr == "constant"  # read by common.build_optimizer
        if predictor == "none":
            self.predictor = nn.Identity()
        self.predictor.requires_grad_(predictor != "fixed")
        self.stop_gradient, self.symmetric = stop_gradient, symmetric
        self.similarity = negative_cosine if similarity == "cosine" else softmax_similarity

    def forward(self, views):
        h = [self.backbone(x) for x in views]  # s x [n, feature_dim]
        z = [self.projector(v) for v in h]  # s x [n, d]
        p = [self.predictor(v) for v in z]  # s x [n, d]
        with torch.autocast(h[0].device.type, enabled=False):  # the loss: float32 or better, over the global batch
            p, z = [common.gather(v) for v in p], [common.gather(v) for v in z]  # s x [N, d]
            z = [v.detach() for v in z] if self.stop_gradient else z
            pairs = [(i, j) for j in range(len(views)) for i in range(j)]
            if not self.symmetric:
                return sum(self.similarity(p[i], z[j]) for i, j in pairs) / len(pairs)
            return sum(self.similarity(p[i], z[j]) / 2 + self.similarity(p[j], z[i]) / 2 for i, j in pairs) / len(pairs)  # Eq. 4


def build(args):
    backbone, feature_dim = common.build_backbone(args.backbone, args.image_size)
    return SimSiam(backbone, feature_dim, args.proj_hidden, args.proj_dim, args.proj_layers, args.pred_hidden,
                   not args.no_stop_gradient, args.predictor, args.predictor_lr, args.similarity, not args.asymmetric, args.head_bn)


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
