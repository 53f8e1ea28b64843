"""MoCo (He et al., CVPR 2020): tell the other view of an image from a queue of earlier images.

Paper: "Momentum Contrast for Unsupervised Visual Representation Learning", arXiv 1911.05722
Code: facebookresearch/moco (official, in its history)

Idea: Two views of an image should be more similar to each other than to any other image.
    The others are keys of earlier images in a queue, so that small batches have many negatives.
    A slow copy of the network, the target, computes the keys: the queue stays consistent.

Loss: for queries q [N, d], keys k+ [N, d] and the K keys k_i before them, all of unit length
    L = mean over N of -log(exp(q.k+ / tau) / sum over k+ and all k_i of exp(q.k / tau)) (Eq. 1)
    target <- m target + (1 - m) online, before the keys are computed                   (Eq. 2)

What prevents collapse:
    negatives       yes, the queue
    predictor       no
    stop-gradient   yes, on the target
    moving average  yes, the target network
    decorrelation   no
Diff it with: simclr.py (negatives from the batch), byol.py (predictor, no negatives)

Deviations:
    Sizes and head are the authors' CIFAR-10 demo's; MoCo v2 (arXiv 2003.04297) has two layers.
    As in that demo, parts of a batch stand for GPUs: see SplitBatchNorm and `keys`.

Recipe: the same in all nine files, so that a diff shows ideas; methods/README.md has the papers'.
    Batches of 256 (BYOL: 128), two views by W-MSE's augmentation, bf16 where the processor has it.
    With more than two views, the loss is the mean over all pairs of views.
    Muon at 0.1 for filters of `tiny`, the default: it learns weak features as fast as strong ones.
    Adam at 3e-3 with weight decay 1e-6 for all else, and for other backbones.
    Rates rise for a tenth of the run, at most 500 steps (MoCo, BYOL: 150), and fall as a cosine.
    SimSiam's predictor keeps its peak rate at all steps.
    The backbone sees one view at a time. A ResNet's residual blocks start as the identity, but
    not in the official code of MoCo, W-MSE, Shuffled-DBN and (below ResNet-50) BYOL.

Run: python methods/moco.py    (one to four minutes on two CPU cores, offline)
"""

import copy
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
    method: str = "moco"
    warmup: int = 150  # with fewer steps the embeddings drew together at first
    proj_hidden: int = 512
    proj_dim: int = 128
    proj_layers: int = 1
    queue_size: int = common.flag(4096, "keys of earlier images in the queue", least=1, most=2**20)
    momentum: float = common.flag(0.99, "share of the target kept in each step", least=0, most=1)
    temperature: float = common.flag(0.1, "lower: more weight on similar negatives", least=1e-4)
    bn_splits: int = common.flag(8, "parts of a batch, each with its own batch norm", least=1)

    def rules(self):
        whole = self.batch_size % self.bn_splits == 0 and self.batch_size > self.bn_splits
        whole &= self.bn_splits == 1 or self.bn_splits % common.world_size() == 0
        yield whole, "--bn-splits must give each process equal parts of --batch-size, of 2 or more"


def parse_args(argv=None):
    """Args from the command line, or from a list of words. Raises common.UserError."""
    return common.parse_args(Args, argv, __doc__)


# ==============================================================================
# 3. Loss
# ==============================================================================


def info_nce_loss(q, k, queue, temperature=0.1):
    """MoCo's InfoNCE (Eq. 1), a scalar: the mean over N queries. Only q gets a gradient.

    q, k: queries and their keys [N, d], normalised here. queue: other keys [K, d], unit rows."""
    q = F.normalize(q.to(torch.promote_types(q.dtype, torch.float32)), dim=1) / temperature
    k = F.normalize(k.to(q.dtype), dim=1).detach()
    positive = (q * k).sum(1)  # [N]
    negatives = q @ queue.to(q.dtype).detach().T  # [N, K]
    logits = torch.cat([positive[:, None], negatives], dim=1)  # [N, 1 + K]
    return (logits.logsumexp(1) - positive).mean()  # Eq. 1


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


class SplitBatchNorm(nn.BatchNorm2d):
    """Batch norm of each of `splits` parts of a batch by itself, as on that many GPUs."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        parts = x.chunk(self.splits // common.world_size())
        running = torch.stack([self.running_mean, self.running_var]).repeat(len(parts), 1, 1)
        rest = self.weight, self.bias, True, self.momentum, self.eps
        out = [F.batch_norm(part, *own, *rest) for part, own in zip(parts, running)]  # updates own
        mean, variance = common.mean_over_ranks(running.mean(0))
        self.running_mean.copy_(mean)
        self.running_var.copy_(variance)
        self.num_batches_tracked += 1
        return torch.cat(out)


class MoCo(nn.Module):
    """H = backbone(x) [n, feature_dim], Z = projector(H) [n, d]; forward gives the loss."""

    def __init__(self, backbone, feature_dim, args):
        super().__init__()
        self.args = args
        self.backbone = backbone
        for module in backbone.modules():
            if type(module) is nn.BatchNorm2d and args.bn_splits > 1:
                module.__class__, module.splits = SplitBatchNorm, args.bn_splits
        sizes = feature_dim, args.proj_hidden, args.proj_dim, args.proj_layers
        self.projector = mlp(*sizes, norm=nn.Identity, bias=True)
        self.target_backbone = copy.deepcopy(self.backbone).requires_grad_(False)
        self.target_projector = copy.deepcopy(self.projector).requires_grad_(False)
        queue = F.normalize(torch.randn(args.queue_size, args.proj_dim), dim=1)
        self.register_buffer("queue", queue)  # [K, d], the oldest key first

    @torch.no_grad()
    def update_target(self):
        """Move the target towards the online network: parameters, not batch statistics."""
        momentum = self.args.momentum
        online = [*self.backbone.parameters(), *self.projector.parameters()]
        target = [*self.target_backbone.parameters(), *self.target_projector.parameters()]
        for theta, xi in zip(online, target):
            xi.lerp_(theta, 1 - momentum)  # xi <- momentum xi + (1 - momentum) theta

    @torch.no_grad()
    def keys(self, x):
        """Views [n, 3, size, size] -> keys [N, d] of all processes, by shuffling BN (section 3.3):
        if a query and its key shared batch statistics, these would tell that they match."""
        x = common.gather(x)  # [N, 3, size, size]
        order = torch.randperm(len(x), device=x.device)
        mine = order.chunk(common.world_size())[common.rank()]
        x = x[mine].contiguous(memory_format=torch.channels_last)
        k = self.target_projector(self.target_backbone(x))  # [n, d]
        return F.normalize(common.gather(k), dim=1)[order.argsort()]  # in the order of x again

    def forward(self, views):
        """s views [n, 3, size, size] of the same images -> the global batch's loss, a scalar."""
        args = self.args
        h = [self.backbone(x) for x in views[:-1]]  # the last view is not a query
        q = [self.projector(v) for v in h]  # (s - 1) x [n, d]
        self.update_target()  # Eq. 2, with the weights before this step
        k = [self.keys(x) for x in views[1:]]  # (s - 1) x [N, d]; the first view is not a key
        with torch.autocast(h[0].device.type, enabled=False):  # the loss in float32 or better
            q = [common.gather(v) for v in q]  # (s - 1) x [N, d]
            pairs = itertools.combinations(range(len(views)), 2)
            losses = [info_nce_loss(q[i], k[j - 1], self.queue, args.temperature) for i, j in pairs]
            self.queue = torch.cat([self.queue, *k])[-len(self.queue):].clone()  # the oldest leave
            return sum(losses) / len(losses)


def build(args):
    """The model on a new backbone."""
    backbone, feature_dim = common.build_backbone(args.backbone, args.image_size)
    return MoCo(backbone, feature_dim, args)


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
