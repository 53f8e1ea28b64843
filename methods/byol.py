"""BYOL (Grill et al., NeurIPS 2020): predict what a slow copy of the network says of another view.

Paper: "Bootstrap Your Own Latent: A New Approach to Self-Supervised Learning", arXiv 2006.07733
Code: google-deepmind/deepmind-research, folder byol (official)

Idea: An online network learns to predict what a target network says about another view.
    The target is a moving average of the online network, and no gradient flows into it.
    The authors' hypothesis: with predictor and slow target, constant embeddings are not stable.

Loss: for predictions p [N, d] of one view and targets z [N, d] of the other
    L = mean over N of |p / |p| - z / |z||^2 = 2 - 2 cos(p, z), both directions added   (Eq. 2)
    target <- tau target + (1 - tau) online, after each step                            (Eq. 1)
    tau = 1 - (1 - tau_base) (cos(pi k / K) + 1) / 2 at step k of K

What prevents collapse:
    negatives       no
    predictor       yes
    stop-gradient   yes, on the target
    moving average  yes, the target network
    decorrelation   no
Diff it with: simsiam.py (no moving average), moco.py (negatives, no predictor)

Deviations:
    The widths are those of the W-MSE authors' BYOL on CIFAR-10; their tau_base is 0.99.
    The target starts as a copy of the online network; the official one has its own random start.
    Jitter, blur and crop are torchvision's; the official crop is clipped and not antialiased.

Recipe: the same in all nine files, so that a diff shows ideas; methods/README.md has the papers'.
    Batches of 256 (BYOL: 128), two views by W-MSE's augmentation, bf16 where the processor has it.
    With more than two views, the loss is the mean over all pairs of views.
    Muon at 0.1 for filters of `tiny`, the default: it learns weak features as fast as strong ones.
    Adam at 3e-3 with weight decay 1e-6 for all else, and for other backbones.
    Rates rise for a tenth of the run, at most 500 steps (MoCo, BYOL: 150), and fall as a cosine.
    SimSiam's predictor keeps its peak rate at all steps.
    The backbone sees one view at a time. A ResNet's residual blocks start as the identity, but
    not in the official code of MoCo, W-MSE, Shuffled-DBN and (below ResNet-50) BYOL.

Run: python methods/byol.py    (one to four minutes on two CPU cores, offline)
"""

import copy
import itertools
import math
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
    method: str = "byol"
    batch_size: int = 128  # with half as many steps, some seeds learned late
    warmup: int = 150  # with fewer steps the embeddings drew together at first
    proj_hidden: int = 1024  # of projector and predictor
    proj_dim: int = 64
    proj_layers: int = 2
    momentum: float = common.flag(0.97, "share of the target kept at first", least=0, most=1)
    predictor: str = common.flag("mlp", "`none` removes it: collapses", choices="mlp none")


def parse_args(argv=None):
    """Args from the command line, or from a list of words. Raises common.UserError."""
    return common.parse_args(Args, argv, __doc__)


# ==============================================================================
# 3. Loss
# ==============================================================================


def byol_loss(p, z):
    """BYOL's loss in one direction (Eq. 2), a scalar in [0, 4]. No gradient flows into z.

    p: predictions [N, d] of one view. z: targets [N, d], embeddings of the other view."""
    p = F.normalize(p.to(torch.promote_types(p.dtype, torch.float32)), dim=1)
    z = F.normalize(z.to(p.dtype), dim=1).detach()
    return (2 - 2 * (p * z).sum(1)).mean()  # Eq. 2


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


class BYOL(nn.Module):
    """H = backbone(x) [n, feature_dim], Z = projector(H) [n, d]; forward gives the loss."""

    def __init__(self, backbone, feature_dim, args):
        super().__init__()
        self.args = args
        self.backbone = backbone
        sizes = feature_dim, args.proj_hidden, args.proj_dim, args.proj_layers
        self.projector = mlp(*sizes)
        self.predictor = mlp(args.proj_dim, args.proj_hidden, args.proj_dim, layers=2)
        if args.predictor == "none":
            self.predictor = nn.Identity()
        self.target_backbone = copy.deepcopy(self.backbone).requires_grad_(False)
        self.target_projector = copy.deepcopy(self.projector).requires_grad_(False)

    @torch.no_grad()
    def update_target(self, progress):
        """Move the target towards the online network: parameters, not batch statistics."""
        momentum = 1 - (1 - self.args.momentum) * (math.cos(math.pi * progress) + 1) / 2
        online = [*self.backbone.parameters(), *self.projector.parameters()]
        target = [*self.target_backbone.parameters(), *self.target_projector.parameters()]
        for theta, xi in zip(online, target):
            xi.lerp_(theta, 1 - momentum)  # xi <- momentum xi + (1 - momentum) theta

    def forward(self, views):
        """s views [n, 3, size, size] of the same images -> the global batch's loss, a scalar."""
        h = [self.backbone(x) for x in views]  # s x [n, feature_dim]
        z = [self.projector(v) for v in h]  # s x [n, d]
        p = [self.predictor(v) for v in z]  # s x [n, d]
        with torch.no_grad():
            z = [self.target_projector(self.target_backbone(x)) for x in views]  # the targets
        with torch.autocast(h[0].device.type, enabled=False):  # the loss in float32 or better
            p, z = [common.gather(v) for v in p], [common.gather(v) for v in z]  # s x [N, d]
            pairs = itertools.combinations(zip(p, z), 2)
            losses = [byol_loss(p1, z2) + byol_loss(p2, z1) for (p1, z1), (p2, z2) in pairs]
            return sum(losses) / len(losses)


def build(args):
    """The model on a new backbone."""
    backbone, feature_dim = common.build_backbone(args.backbone, args.image_size)
    return BYOL(backbone, feature_dim, args)


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
            model.update_target(step / run.total_steps)  # <- BYOL: towards the new weights
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
