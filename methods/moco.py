"""MoCo: contrast every view with a queue of earlier keys from a slowly moving encoder.

Kaiming He, Haoqi Fan, Yuxin Wu, Saining Xie, Ross Girshick: "Momentum Contrast for Unsupervised Visual Representation Learning",
CVPR 2020, arXiv 1911.05722; v2: Xinlei Chen, Haoqi Fan, Ross Girshick, Kaiming He: "Improved Baselines with
Momentum Contrastive Learning", 2020, arXiv 2003.04297.
Official code: facebookresearch/moco.

The idea. A query shall match the key of the same image among many keys of other images. The other keys are taken from a queue of
the last steps, so their number does not depend on the batch. For the queue to be consistent, keys come from a second encoder
that follows the first one slowly.

The loss (InfoNCE, Eq. 1) for a query q, its key k+ and K keys k_i of the queue, all of unit length, tau the temperature:

    L = -log( exp(q.k+ / tau) / (exp(q.k+ / tau) + sum_i exp(q.k_i / tau)) )             q, k [N, d], queue [K, d]
    theta_k <- m theta_k + (1 - m) theta_q                                               Eq. 2

One step:                                                (the official code's order)
    q = projector(backbone(x1))
    key encoder <- m * key encoder + (1 - m) * encoder   # parameters only; with the encoder as it was before this step
    k = key_projector(key_backbone(shuffle(x2)))         # no gradient; un-shuffled afterwards
    loss = cross_entropy([q.k, q @ queue.T] / tau, 0)    # with the queue as it was before this step
    queue: the oldest N keys are replaced by k

Shuffling BN. If a query's batch and its key's batch hold the same images, their batch-norm statistics betray which belong together,
and the network can cheat. The official code normalises on each GPU separately and shuffles the keys among the GPUs. Here `--bn-splits`
parts of the batch are normalised separately on one device, as in the authors' CIFAR-10 demo, and the keys are shuffled among the parts.

What prevents collapse: the negatives in the queue. Stop-gradient and EMA on the key side; no predictor, no whitening.
Diff it against simclr.py: where the negatives come from. Against byol.py: a predictor in place of the negatives.

Deviations: sizes of the authors' CIFAR-10 demo (queue 4096, m 0.99, tau 0.1, one linear layer); more than two views: the mean over pairs,
view i asking for view j > i; a warm-up of 150 steps even in a shorter run; each view's batch norm in --bn-splits parts.
The recipe is that of the other files, so that a diff shows the idea: batches of 256, bf16 where the processor has it, Adam at 3e-3
(SimSiam: 2e-3; BYOL, Barlow Twins: 1e-3) with weight decay 1e-6, a warm-up of a tenth of the run, at most 500 steps (MoCo: 150), cosine
step by step to 0, the W-MSE augmentation, batch norm view by view in the backbone, a ResNet's residual blocks start as the identity.

    python methods/moco.py                               # some minutes on a laptop, offline
    torchrun --nproc_per_node=8 methods/moco.py --dataset folder --data-dir imagenet --image-size 224 --backbone resnet50 \
        --proj-layers 2 --proj-hidden 2048 --queue-size 65536 --momentum 0.999 --temperature 0.2 --augment moco-v2 \
        --optimizer sgd --lr 0.03 --weight-decay 1e-4 --warmup 0 --epochs 200
"""

import copy
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
    parser = common.shared_arguments("moco", __doc__)
    parser.set_defaults(warmup=150)  # ours: at a high rate all embeddings fall together while the queue still holds its random start
    parser.set_defaults(proj_hidden=512, proj_dim=128, proj_layers=1)  # the authors' CIFAR-10 demo and v1: one linear layer; v2: 2048, 128, 2
    parser.add_argument("--queue-size", type=common.number(int, 1, example=4096), default=4096, help="K, keys in the queue; 65536 on ImageNet")
    parser.add_argument("--momentum", type=common.number(float, 0, 1, example=0.99), default=0.99, help="m of the key encoder; 0.999 on ImageNet")
    parser.add_argument("--temperature", type=common.number(float, above=0, example=0.1), default=0.1, help="tau; v1 0.07, v2 0.2")
    parser.add_argument("--symmetric", action="store_true", help="sum of both directions, all keys into the queue")
    parser.add_argument("--bn-splits", type=common.number(int, 1, example=8), default=8, help="parts of the batch with their own batch norm; 1: ordinary")
    parser.add_argument("--no-shuffle", action="store_true", help="leave the keys in the queries' order: batch norm then leaks")
    return common.finish_arguments(parser, argv, size_rules)


# ==============================================================================
# 3. Loss
# ==============================================================================


def size_rules(args):
    """What the loss demands of the sizes. Raises UserError that names a flag and a value that works."""
    keys, splits, processes = args.batch_size * (args.views - 1 + args.symmetric), args.bn_splits, common.world_size()
    common.check(args.queue_size % keys == 0, f"--queue-size {args.queue_size} is not a multiple of the {keys} keys of a step; "
                 f"try --queue-size {max(1, args.queue_size // keys) * keys}")
    fits = [n for n in range(1, args.batch_size) if args.batch_size % n == 0 and (n == 1 or n % processes == 0)]
    common.check(splits in fits, f"--bn-splits {splits} does not cut --batch-size {args.batch_size} and {processes} processes evenly; "
                 f"try --bn-splits {min(fits, key=lambda n: abs(n - splits))}")


def info_nce_loss(q, k, queue, temperature=0.1):
    """InfoNCE (MoCo Eq. 1), the mean over the batch, a scalar.

    q: queries [N, d], k: their keys [N, d], both normalised here; queue: [K, d] unit rows. Only q gets a gradient."""
    q = F.normalize(q.to(torch.promote_types(q.dtype, torch.float32)), dim=1)
    k = F.normalize(k.to(q.dtype), dim=1).detach()
    q = q / temperature
    positive = (q * k).sum(1, keepdim=True)  # [N, 1], q.k+ / tau
    negatives = q @ queue.to(q.dtype).detach().T  # [N, K], q.k_i / tau
    logits = torch.cat([positive, negatives], dim=1)
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=q.device))  # Eq. 1: the key is column 0


# ==============================================================================
# 4. Model
# ==============================================================================


class SplitBatchNorm(nn.BatchNorm2d):
    """Batch norm that normalises `splits` equal parts of the batch separately, as that many GPUs would. Evaluation is unchanged."""

    splits = 1

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        parts = x.chunk(self.splits // common.world_size())
        means, variances = self.running_mean.repeat(len(parts), 1), self.running_var.repeat(len(parts), 1)
        out = torch.cat([F.batch_norm(part, mean, variance, self.weight, self.bias, True, self.momentum, self.eps)
                         for part, mean, variance in zip(parts, means, variances)])
        mean, variance = common.mean_over_ranks(torch.stack([means.mean(0), variances.mean(0)]))  # batch_norm has moved every part's row
        self.running_mean.copy_(mean)
        self.running_var.copy_(variance)
        self.num_batches_tracked += 1
        return out


def split_batch_norm(network, splits):
    """Turn every BatchNorm2d of a network into a SplitBatchNorm, in place; names, weights and buffers stay."""
    for module in network.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__, module.splits = SplitBatchNorm, splits


class MoCo(nn.Module):
    """Backbone, projector, their slow copies and the queue. `forward(views)`: s views [n, 3, H, W] (n images here, N in all) -> scalar loss."""

    def __init__(self, backbone, feature_dim, proj_hidden=512, proj_dim=128, proj_layers=1, queue_size=4096, momentum=0.99, temperature=0.1,
                 symmetric=False, bn_splits=8, shuffle=True):
        super().__init__()
        if bn_splits > 1:
            split_batch_norm(backbone, bn_splits)
        self.backbone = backbone
        widths = [feature_dim] + [proj_hidden] * (proj_layers - 1)
        hidden = [layer for a, b in zip(widths, widths[1:]) for layer in (nn.Linear(a, b), nn.ReLU(inplace=True))]
        self.projector = nn.Sequential(*hidden, nn.Linear(widths[-1], proj_dim))  # no batch norm
        self.key_backbone = copy.deepcopy(self.backbone).requires_grad_(False)
        self.key_projector = copy.deepcopy(self.projector).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(queue_size, proj_dim), dim=1))  # [K, d]
        self.register_buffer("position", torch.zeros((), dtype=torch.long))  # row of the oldest keys
        self.momentum, self.temperature, self.symmetric, self.shuffle = momentum, temperature, symmetric, shuffle

    @torch.no_grad()
    def update_key_encoder(self):
        """theta_k <- m theta_k + (1 - m) theta_q (Eq. 2): parameters only, batch norm statistics are the key encoder's own."""
        for network, key_network in ((self.backbone, self.key_backbone), (self.projector, self.key_projector)):
            for theta_q, theta_k in zip(network.parameters(), key_network.parameters()):
                theta_k.lerp_(theta_q, 1 - self.momentum)

    @torch.no_grad()
    def keys(self, x):
        """[n, 3, H, W] on each process -> keys [N, d] of the global batch in its order, encoded in a shuffled order (shuffling BN)."""
        x = common.gather(x)  # [N, 3, H, W]
        order = torch.randperm(len(x), device=x.device) if self.shuffle else torch.arange(len(x), device=x.device)
        mine = order.chunk(common.world_size())[common.rank()]
        k = self.key_projector(self.key_backbone(x[mine].contiguous(memory_format=torch.channels_last)))  # [n, d]
        return F.normalize(common.gather(k), dim=1)[order.argsort()]

    @torch.no_grad()
    def enqueue(self, k):
        """The keys [M, d] take the places of the oldest M in the queue."""
        if len(self.queue) % len(k):
            raise ValueError(f"the queue of {len(self.queue)} is not a multiple of the {len(k)} keys of a step")
        rows = (self.position + torch.arange(len(k), device=k.device)) % len(self.queue)
        self.queue[rows] = k.to(self.queue.dtype)
        self.position.copy_((self.position + len(k)) % len(self.queue))

    def forward(self, views):
        s = len(views)
        # View i asks, a later view j answers; with --symmetric every view does both.
        h = [self.backbone(x) for x in views[: s if self.symmetric else s - 1]]  # the views that ask, [n, feature_dim] each
        q = [self.projector(v) for v in h]
        self.update_key_encoder()
        k = {j: self.keys(views[j]) for j in range(0 if self.symmetric else 1, s)}  # [N, d] each
        with torch.autocast(h[0].device.type, enabled=False):  # the loss: float32 or better, over the global batch
            q = [common.gather(v) for v in q]  # [N, d] each
            queue = self.queue.clone()  # as it was before this step; backward still needs it when the new keys are in
            pairs = [(i, j) for j in range(len(views)) for i in range(j)]
            loss = sum(info_nce_loss(q[i], k[j], queue, self.temperature) for i, j in pairs) / len(pairs)
            if self.symmetric:  # the sum of both directions, not their mean
                loss = loss + sum(info_nce_loss(q[j], k[i], queue, self.temperature) for i, j in pairs) / len(pairs)
        self.enqueue(torch.cat(list(k.values())))
        return loss


def build(args):
    backbone, feature_dim = common.build_backbone(args.backbone, args.image_size)
    return MoCo(backbone, feature_dim, args.proj_hidden, args.proj_dim, args.proj_layers, args.queue_size, args.momentum, args.temperature,
                args.symmetric, args.bn_splits, not args.no_shuffle)


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
