"""What a training step costs beside the bare backbone: a script, not a test.

    python tests/benchmark.py                                    # all nine, tiny, batch 256
    python tests/benchmark.py --methods cw_rgp byol --backbone resnet18 --repeats 3
    python tests/benchmark.py --methods wmse --flags "--proj-dim 128 --w-size 256 --views 4"
    python tests/benchmark.py --grow                             # step time and peak memory as batch, d and views grow (a Markdown table)

(a) bare: forward and backward of the backbone on the same views, in the same precision and memory layout; for MoCo and BYOL their own
bare passes, the second encoder's forward included. (b) step: augmentation, forward, loss, backward, optimizer, the watch for
non-finite numbers. Both are timed in turn, `--repeats` times after a warm-up; the medians and their ratio are printed, and where
the rest of the step goes: `loss` is the step's forward and backward with the outputs of all networks given (whitening, logits, queue),
`heads` what then remains of forward and backward (MoCo's includes the update of its target).
Times are wall-clock milliseconds: run it on a machine that does nothing else.
"""

import argparse
import concurrent.futures
import copy
import importlib
import multiprocessing
import shlex
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "methods")]
import common  # noqa: E402

METHODS = ("simclr", "moco", "byol", "simsiam", "barlow", "vicreg", "wmse", "shuffled_dbn", "cw_rgp")


class Given(torch.nn.Module):
    """Stands for a network: gives the outputs that it once had, whatever the input."""

    def __init__(self, outputs):
        super().__init__()
        self.outputs, self.calls = outputs, 0

    def forward(self, _):
        self.calls += 1
        return self.outputs[(self.calls - 1) % len(self.outputs)]


def only_the_loss(model, views, autocast):
    """A copy of the model in which every network is a `Given`: its forward and backward are those of the loss alone."""
    outputs, hooks = {name: [] for name, _ in model.named_children()}, []
    for name, child in model.named_children():
        hooks.append(child.register_forward_hook(lambda module, inputs, output, name=name: outputs[name].append(output)))
    with torch.autocast(**autocast):
        model(views)
    for hook in hooks:
        hook.remove()
    model = copy.copy(model)
    model._modules = {name: Given([v.detach().requires_grad_(v.requires_grad) for v in values]) for name, values in outputs.items()}
    model._buffers = {name: buffer if buffer is None else buffer.clone() for name, buffer in model._buffers.items()}
    model.update_target = lambda: None  # MoCo
    return model


def measure(name, backbone, flags, repeats, with_loss=True):
    """Median milliseconds of each part of a step, and of the bare passes."""
    module = importlib.import_module(name)
    args = module.parse_args(["--backbone", backbone, *shlex.split(flags)])
    common.check(not args.compile, "--flags: --compile is not measured here; remove it")
    args, device = common.set_up(args)
    args.image_size = args.image_size or 32
    torch.manual_seed(0)
    images = torch.randint(0, 256, (args.batch_size, 3, args.image_size, args.image_size), dtype=torch.uint8, device=device)
    numbers = torch.full((3, 1, 1), 0.5, device=device)
    data = SimpleNamespace(args=args, device=device, size=args.image_size, mean=numbers, std=numbers, steps_per_epoch=100)
    model = module.build(args).to(device, memory_format=torch.channels_last).train()
    optimizer = common.build_optimizer(model, args)
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    watch = SimpleNamespace(finite=common.FiniteWatch(model, device, ""), loss_sum=loss_sum)  # what Run.watch uses of a run
    autocast = dict(device_type=device.type, dtype=torch.bfloat16, enabled=args.precision == "bf16")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    slow = getattr(model, "target_backbone", None)
    parts, loss_only = {}, None

    def clock(part, start):
        if device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        parts.setdefault(part, []).append(1000 * (now - start))
        return now

    for step in range(repeats + 2):
        optimizer.zero_grad(set_to_none=True)  # of the step before: the bare pass, like the step, has nothing to add to
        now = time.perf_counter()
        views = common.Data.augment(data, images, step)
        now = clock("augment", now)
        with torch.autocast(**autocast):
            h = [model.backbone(x) for x in views[: len(views) - (name == "moco")]]  # MoCo's last view only answers
            if slow is not None:
                with torch.no_grad():
                    [slow(x) for x in (views if name == "byol" else views[1:])]
        torch.autograd.backward(h, [torch.ones_like(v) for v in h])
        clock("bare", now)
        optimizer.zero_grad(set_to_none=True)
        for outputs in watch.finite.outputs.values():
            outputs.clear()
        del h
        now = time.perf_counter()
        with torch.autocast(**autocast):
            loss = model(views)
        now = clock("forward", now)
        loss.backward()
        now = clock("backward", now)
        optimizer.step()
        if name == "byol":
            model.update_target(0.5)
        now = clock("optimizer", now)
        common.Run.watch(watch, step, loss)
        clock("watch", now)
        if with_loss:
            loss_only = loss_only or only_the_loss(model, views, autocast)
            now = time.perf_counter()
            with torch.autocast(**autocast):
                loss = loss_only(views)
            loss.backward()
            clock("loss", now)
    medians = {part: statistics.median(times[2:]) for part, times in parts.items()}
    medians["step"] = sum(medians[part] for part in ("augment", "forward", "backward", "optimizer", "watch"))
    memory = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else None
    return medians, args, memory


# method -> what grows beside the backbone's share, which is linear in batch and views
WHY = {
    "simclr": "logits (s N)^2",
    "moco": "N x queue logits; the queue is queue x d",
    "byol": "a second network's forward; linear in d",
    "simsiam": "linear in N; d^2 in the projector",
    "barlow": "one d x d matrix per pair of views: d^2",
    "vicreg": "one d x d covariance per view: d^2",
    "wmse": "d x d Cholesky per slice: d^3, and it needs w > d",
    "shuffled_dbn": "g eigen-decompositions of (d / g)^2: d^3 / g^2",
    "cw_rgp": "w_iter N g / w eigen-decompositions of w x w: N g w^2, hence d only through g",
}


def step_and_memory(name, backbone, flags, repeats):
    """(milliseconds of a step, MiB at its peak beyond the process's own) - or the words of the refusal. Run in a fresh process."""
    import resource  # not on Windows

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)  # MiB

    before = peak()
    try:
        ms, _, on_gpu = measure(name, backbone, flags, repeats, with_loss=False)
    except common.UserError as refusal:
        return str(refusal)
    return ms["step"], on_gpu or peak() - before


def grow(options):
    columns = {"default": "", "batch 128": "--batch-size 128", "batch 512": "--batch-size 512", "batch 1024": "--batch-size 1024",
               "d 32": "--proj-dim 32", "d 128": "--proj-dim 128", "d 512": "--proj-dim 512", "3 views": "--views 3", "4 views": "--views 4"}
    refusals = []
    print("milliseconds of a step / MiB at its peak\n")
    print("| method | " + " | ".join(columns) + " | what grows beside the backbone |")
    print("|---" * (len(columns) + 2) + "|")
    for name in options.methods:
        cells = []
        for column, flags in columns.items():
            with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                found = process.submit(step_and_memory, name, options.backbone, f"{options.flags} {flags}", options.repeats).result()
            if isinstance(found, str):
                refusals.append(f"{name}, {column}: {found}")
            cells.append("refused" if isinstance(found, str) else f"{found[0]:.0f} / {found[1]:.0f}")
        print(f"| {name} | " + " | ".join(cells) + f" | {WHY[name]} |", flush=True)
    print("\n".join(["", *refusals]))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--backbone", default="tiny")
    parser.add_argument("--flags", default="", help="further flags for the method, in one string")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--grow", action="store_true", help="vary batch, embedding size and views instead; every cell in a fresh process")
    options = parser.parse_args()
    print(f"{common.processor_name(torch.device('cuda' if torch.cuda.is_available() else 'cpu'))}, {torch.get_num_threads()} threads, torch {torch.__version__}; milliseconds, medians of {options.repeats}")
    if options.grow:
        return grow(options)
    print(f"{'method':13}{'backbone':>10}{'bare':>9}{'step':>9}{'step/bare':>10}{'images/s':>10}{'augment':>9}{'heads':>8}{'loss':>8}{'optimizer':>10}{'watch':>7}  augment, loss %")
    for name in options.methods:
        try:
            ms, args, memory = measure(name, options.backbone, options.flags, options.repeats)
        except common.UserError as error:  # sizes that this method does not take; the others go on
            print(f"{name:13}refused: {error}", flush=True)
            continue
        heads = ms["forward"] + ms["backward"] - ms["bare"] - ms["loss"]
        print(f"{name:13}{options.backbone:>10}{ms['bare']:9.1f}{ms['step']:9.1f}{ms['step'] / ms['bare']:10.2f}{1000 * args.batch_size / ms['step']:10.0f}"
              f"{ms['augment']:9.1f}{heads:8.1f}{ms['loss']:8.1f}{ms['optimizer']:10.1f}{ms['watch']:7.1f}{100 * ms['augment'] / ms['step']:7.1f} %{100 * ms['loss'] / ms['step']:6.1f} %"
              + (f"  {memory:.0f} MiB" if memory else ""), flush=True)


if __name__ == "__main__":
    main()
