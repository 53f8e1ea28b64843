"""SimSiam (Chen and He, CVPR 2021): predict your own embedding of another view.

Paper: "Exploring Simple Siamese Representation Learning", arXiv 2011.10566
Code: facebookresearch/simsiam (official)

Idea: A network with a predictor learns to predict its own embedding of another view.
    The gradient flows through the prediction only; without this stop-gradient, Z collapses.
    The authors' hypothesis: training alternates, as EM does, between targets and weights.

Loss: for predictions p [N, d] of one view and targets z [N, d] of the other
    D(p, z) = mean over N of -(p / |p|) . (z / |z|)                                     (Eq. 1)
    L = D(p1, stopgrad(z2)) / 2 + D(p2, stopgrad(z1)) / 2, at least -1                  (Eq. 4)

What prevents collapse:
    negatives       no
    predictor       yes
    stop-gradient   yes, on the target
    moving average  no
    decorrelation   no
Diff it with: byol.py (a moving average as the target)

Deviations:
    The projector is that of the paper's CIFAR-10 runs; the predictor is the ImageNet one.
    On CIFAR-10 the paper takes SGD at 0.03 times batch / 256, with weight decay 5e-4.

Recipe: the same in all nine files, so that a diff shows ideas; methods/README.md has the papers'.
    Batches of 256 (BYOL: 128), two views by W-MSE's augmentation, bf16 where the processor has it.
    With more than two views, the loss is the mean over all pairs of views.
    Muon at 0.1 for filters of `tiny`, the default: it learns weak features as fast as strong ones.
    Adam at 3e-3 with weight decay 1e-6 for all else, and for other backbones.
    Rates rise for a tenth of the run, at most 500 steps (MoCo, BYOL: 150), and fall as a cosine.
    SimSiam's predictor keeps its peak rate at all steps.
    The backbone sees one view at a time. A ResNet's residual blocks start as the identity, but
    not in the official code of MoCo, W-MSE, Shuffled-DBN and (below ResNet-50) BYOL.

Run: python methods/simsiam.py    (one to four minutes on two CPU cores, offline)
"""

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
    method: str = "simsiam"
    proj_hidden: int = 2048
    proj_dim: int = 2048
    proj_layers: int = 2
    pred_hidden: int = common.flag(512, "the predictor's hidden width", least=1, most=2**14)
    predictor: str = common.flag("mlp", "`none` removes it: collapses", choices="mlp none")
    no_stop_gradient: bool = common.flag(False, "let the gradient into the targets too: collapses")


def parse_args(argv=None):
    """Args from the command line, or from a list of words. Raises common.UserError."""
    return common.parse_args(Args, argv, __doc__)


# ==============================================================================
# 3. Loss
# ==============================================================================


def negative_cosine(p, z):
    """SimSiam's D(p, z) (Eq. 1), a scalar in [-1, 1]. Detach z yourself.

    p: predictions [N, d] of one view. z: targets [N, d], embeddings of the other view."""
    p = F.normalize(p.to(torch.promote_types(p.dtype, torch.float32)), dim=1)
    z = F.normalize(z.to(p.dtype), dim=1)
    return -(p * z).sum(1).mean()  # Eq. 1


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


class SimSiam(nn.Module):
    """H = backbone(x) [n, feature_dim], Z = projector(H) [n, d]; forward gives the loss."""

    def __init__(self, backbone, feature_dim, args):
        super().__init__()
        self.args = args
        self.backbone = backbone
        sizes = feature_dim, args.proj_hidden, args.proj_dim, args.proj_layers
        self.projector = mlp(*sizes)
        self.projector.append(nn.BatchNorm1d(args.proj_dim, affine=False))
        self.predictor = mlp(args.proj_dim, args.pred_hidden, args.proj_dim, layers=2, bias=True)
        if args.predictor == "none":
            self.predictor = nn.Identity()
        self.predictor.constant_lr = True  # common.build_optimizer: the peak rate at all steps

    def forward(self, views):
        """s views [n, 3, size, size] of the same images -> the global batch's loss, a scalar."""
        h = [self.backbone(x) for x in views]  # s x [n, feature_dim]
        z = [self.projector(v) for v in h]  # s x [n, d]
        p = [self.predictor(v) for v in z]  # s x [n, d]
        if not self.args.no_stop_gradient:
            z = [v.detach() for v in z]
        with torch.autocast(h[0].device.type, enabled=False):  # the loss in float32 or better
            p, z = [common.gather(v) for v in p], [common.gather(v) for v in z]  # s x [N, d]
            pairs = itertools.combinations(zip(p, z), 2)
            D = negative_cosine
            losses = [D(p1, z2) / 2 + D(p2, z1) / 2 for (p1, z1), (p2, z2) in pairs]  # Eq. 4
            return sum(losses) / len(losses)


def build(args):
    """The model on a new backbone."""
    backbone, feature_dim = common.build_backbone(args.backbone, args.image_size)
    return SimSiam(backbone, feature_dim, args)


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
