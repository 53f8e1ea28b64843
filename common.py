"""Everything that is not a method's idea, for nine scripts that each fit on a few pages.

    1 messages and errors      one line on stderr, exit status 2
    2 command line             the flags that all nine methods share
    3 the machine              device, precision, torchrun, synchronised batch norm, gather with gradient
    4 data                     uint8 images on the device; patterns, cifar10, cifar100, stl10, tinyimagenet, folder
    5 augmentation             batched, every sample with its own draw; the papers' recipes as data
    6 backbones                `tiny` for CPUs, torchvision's ResNets with the papers' stem for small images
    7 optimisation             learning rate as a function of the step, LARS, Muon
    8 measuring                kNN, collapse metrics
    9 the run folder           config.json, metrics.csv, last.pt, backbone.pt; exact resume

To borrow a method, copy its file and this one into a folder of your own.
"""

import argparse
import contextlib
import copy
import csv
import dataclasses
import datetime
import http.client
import inspect
import io
import itertools
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
import typing
import zipfile
import zlib

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image  # comes with torchvision
from torchvision.transforms.v2 import functional

# ==============================================================================
# 1. Messages and errors
# ==============================================================================


class UserError(Exception):
    """Something that the user can mend. `main` prints it as one line on stderr and exits with status 2."""


def check(condition, message):
    """Raise UserError(message) unless `condition` holds. The message names the flag or file, the fault and the remedy."""
    if not condition:
        raise UserError(message)


def say(text, end="\n"):
    """Print on rank 0. A reader that closed the pipe (`| head`) does not end the training."""
    if rank() == 0:
        with _broken_pipe_tolerated(sys.stdout):
            print(text, end=end, flush=True)


def warn(text):
    """One line on stderr, from rank 0; the run goes on."""
    if rank() == 0:
        with _broken_pipe_tolerated(sys.stderr):
            print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _broken_pipe_tolerated(stream):
    try:
        yield
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def main(function, parse):
    """Call function(parse()) and turn every foreseeable fault into one line on stderr and exit status 2."""
    status, message = 2, ""
    try:
        function(parse())
        status = 0
    except UserError as error:
        message = f"error: {error}"
    except KeyboardInterrupt:
        status, message = 130, "interrupted"
    except SystemExit as leave:  # stopped by a signal, or argparse's own words
        status = leave.code or 0
    except (MemoryError, RuntimeError) as error:
        words = " ".join(str(error).split())
        if isinstance(error, torch.cuda.OutOfMemoryError) or "CUDA error: out of memory" in words:
            message = "error: out of GPU memory; try a smaller --batch-size or --precision bf16, and --stream where a folder's images fill it"
        elif isinstance(error, MemoryError) or any(word in words for word in ("can't allocate", "not enough memory")):
            message = "error: out of memory; try a smaller --batch-size, --image-size or --proj-hidden"
        elif world_size() > 1 and any(word in words for word in ("Connection closed", "Connection reset", "Broken pipe", "gloo", "NCCL")):
            message = f"error: process {rank()} lost another process, whose own words say why; go on with --resume"
        elif words.startswith("DataLoader worker"):
            message = "error: a loader process died, perhaps for want of (shared) memory; try a smaller --num-workers or --batch-size, and go on with --resume"
        elif type(error).__module__.startswith(("torch._dynamo", "torch._inductor")) or "torch.compile" in words:
            message = f"error: --compile does not work here ({words[:120]}); try it without --compile"
        else:
            raise
    if message:
        if rank() > 0:
            time.sleep(3)  # the same error on rank 0 ends this process before it repeats the line
        with _broken_pipe_tolerated(sys.stderr):
            print(f"{os.path.basename(sys.argv[0])}: {message}", file=sys.stderr, flush=True)
    with _broken_pipe_tolerated(sys.stdout):
        sys.stdout.flush()
    if dist.is_initialized() and status:
        os._exit(status)  # not sys.exit: taking down a process group with work pending may wait for ever
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(status)


# ==============================================================================
# The flags that all nine methods share
# ==============================================================================

DATASETS = ("patterns", "cifar10", "cifar100", "stl10", "tinyimagenet", "folder")


def flag(default, help, least=None, most=None, above=None, below=None, choices=None, example=None):
    """A field of Args with a help text and bounds; `above` and `below` are exclusive.

    choices: the allowed words, in one string. example: a value for messages that say what to try."""
    metadata = {"help": help, "least": least, "most": most, "above": above, "below": below}
    metadata.update(choices=choices and choices.split(), example=example)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(kw_only=True)
class Args:
    """All hyper-parameters of a run: each field is a flag, `proj_dim` is --proj-dim.

    A method's Args adds its own fields and other defaults; help and bounds are inherited. The
    values are checked when an Args is made, by the command line or by a program:
    `train(Args(dataset="cifar10", epochs=5))`. Raises UserError for a value that does not fit."""

    method: str = ""  # the method's name; no flag
    experiment: str = ""  # its name, if tests/experiments.py made the model; no flag

    dataset: str = flag("patterns", "`patterns` is drawn on the spot, `folder` is your own images, "
                        "the others are downloaded when first used", choices=" ".join(DATASETS))
    data_dir: str = flag("data", "folder of the data set, or where to download it to")
    image_size: int | None = flag(None, "side of a view in pixels (default: that of the images, "
                                  "at most 64)", least=8, most=1024, example=32)
    augment: str = flag("w-mse", "recipe of the random views; common.RECIPES explains them")
    views: int = flag(2, "views of each image", least=2, most=16)

    backbone: str = flag("tiny", "`tiny`, or a torchvision ResNet by name, such as resnet18")
    proj_hidden: int = flag(1024, "width of the hidden layers of the projector", least=1)
    proj_dim: int = flag(128, "d, channels of the embedding Z, the projector's output", least=2)
    proj_layers: int = flag(2, "linear layers of the projector", least=1, most=8)

    epochs: int = flag(10, "passes over the training images", least=1)
    batch_size: int = flag(256, "images in a step, in all processes together", least=2)
    optimizer: str = flag("adam", "sgd and lars have momentum 0.9; muon is Muon for the filters of "
                          "convolutions and Adam for the rest", choices="adam sgd lars muon")
    lr: float = flag(3e-3, "peak learning rate, not scaled by the batch size", above=0, example=3e-3)
    lr_bias: float | None = flag(None, "peak learning rate of biases and norm layers "
                                 "(default: --lr)", above=0, example=3e-3)
    lr_filters: float | None = flag(None, "peak learning rate of the filters of convolutions with "
                                    "--optimizer muon (default: 0.1)", above=0, example=0.1)
    weight_decay: float = flag(1e-6, "weight of the L2 penalty; lars leaves out biases and norm "
                               "layers, muon the filters", least=0)
    warmup: int | None = flag(None, "steps in which the learning rate rises (default: a tenth of "
                              "the run, at most 500)", least=0, example=500)
    schedule: str = flag("cosine", "how the rate falls; `step`: to a fifth when 50 epochs are "
                         "left, and again when 25 are", choices="cosine step constant")
    seed: int = flag(0, "of weights, order, views and every other random draw", least=0,
                     most=2**31 - 1)

    out: str | None = flag(None, "folder of the run (default: runs/METHOD-DATASET-sSEED, with -2, "
                           "-3, ... if it is taken)")
    resume: bool = flag(False, "go on from the last checkpoint in the run folder, if there is one")
    eval_every: int = flag(1, "epochs between two measurements of kNN and collapse; 0: at the end",
                           least=0)
    save_every: int = flag(0, "steps between two extra checkpoints inside an epoch; 0: none",
                           least=0, example=100)
    log_every: int = flag(10, "steps between two looks at the loss, which wait for the device",
                          least=1)

    device: str = flag("auto", "`auto` takes a GPU if there is one", choices="auto cpu cuda")
    precision: str = flag("auto", "of the networks; `auto` takes bf16 if the processor has it. The "
                          "loss is always computed in fp32", choices="auto fp32 bf16")
    compile: bool = flag(False, "compile the backbones with torch.compile")
    stream: bool = flag(False, "read images from disk in each epoch, even if they fit in memory")
    num_workers: int = flag(2, "processes that read images from disk", least=0, most=256)

    def rules(self):
        """What a method demands of the sizes: pairs of a condition and what to say if it fails."""
        return ()

    def __post_init__(self):
        check_args(self)


# ==============================================================================
# Command line: flags from Args, checks, and values to propose
# ==============================================================================

# The first flag of each group of --help. The method's own flags come before them all.
GROUPS = {"dataset": "images and views", "backbone": "network", "epochs": "training",
          "out": "run folder", "device": "machine"}


class OneLineParser(argparse.ArgumentParser):
    """argparse, but a bad flag is one line on stderr (argparse would print the usage first)."""

    def error(self, message):
        remedy = "" if "try" in message else f"; see {self.prog} --help"
        raise UserError(message.removeprefix("argument ") + remedy)


def number(kind, least=None, most=None, above=None, below=None, example=None):
    """A `type` for argparse: int or float within bounds. A value outside gets a message."""
    bounds = {"at least": least, "above": above, "at most": most, "below": below}
    bounds = " and ".join(f"{words} {x}" for words, x in bounds.items() if x is not None)
    wanted = "a whole number" if kind is int else "a number"
    wanted = f"{wanted} {bounds}".strip()

    def parse(text):
        with contextlib.suppress(ValueError, OverflowError, TypeError):
            value = kind(text)
            exact = value == text and not isinstance(text, (bool, np.bool_))
            exact = exact or isinstance(text, str)
            high = (most is None or value <= most) and (below is None or value < below)
            low = (least is None or value >= least) and (above is None or value > above)
            if exact and math.isfinite(value) and high and low:
                return value
        raise argparse.ArgumentTypeError(f"'{text}' is not {wanted}; try {example}")

    return parse


def flags_of(kind):
    """The fields of an Args class as [(name, type, default, metadata)], without those of no flag.

    A field that only changes a default has the metadata of the class above it. Raises TypeError
    for a class that Python would misread in silence: without @dataclass, or a name without type."""
    if "__dataclass_fields__" not in vars(kind):
        raise TypeError(f"{kind.__name__} needs @dataclass(kw_only=True) above it")
    for name, value in vars(kind).items():
        if not name.startswith("_") and not callable(value) and name not in kind.__annotations__:
            raise TypeError(f"{kind.__name__}.{name} needs a type, as in `{name}: int = ...`")
    flags, hints = [], typing.get_type_hints(kind)  # not field.type, which may be text
    for field in dataclasses.fields(kind):
        above = [vars(base).get("__dataclass_fields__", {}).get(field.name) for base in kind.__mro__]
        metadata = next((f.metadata for f in above if f is not None and f.metadata), None)
        if metadata is not None:
            type_ = hints[field.name]
            types = typing.get_args(type_) or (type_,)  # int | None -> (int, NoneType)
            flags.append((field.name, types[0], field.default, metadata))
    return flags


def words_of(name, metadata):
    """The words that a flag may be, or None if it may be any."""
    if name == "augment":
        return sorted(RECIPES)
    return metadata["choices"]


def parser_of(name, type_, default, metadata):
    """The function that turns a flag's text or value into its type, or raises ArgumentTypeError."""
    bounds = {key: metadata[key] for key in ("least", "most", "above", "below")}
    example = metadata["example"] if metadata["example"] is not None else default
    return number(type_, **bounds, example=example)


def parse_args(kind, argv=None, description=None):
    """An Args of class `kind` from the command line (argv: a list of words). Raises UserError.

    description: the method's docstring, whose first line heads --help."""
    flags = flags_of(kind)
    method = kind.method
    first_line = (description or f"{method}.").strip().splitlines()[0]  # python -OO has no docstrings
    parser = OneLineParser(prog=f"{method}.py", description=first_line, allow_abbrev=False)
    shared = {name for name, *_ in flags_of(Args)}
    groups = {"": parser.add_argument_group(f"{method}'s own")}
    current = None
    for name, type_, default, metadata in sorted(flags, key=lambda flag: flag[0] in shared):
        if name in shared and name in GROUPS:
            current = parser.add_argument_group(GROUPS[name])
        group = current if name in shared else groups[""]
        help = metadata["help"].replace("%", "%%")
        if type_ is bool:
            group.add_argument(f"--{name.replace('_', '-')}", action="store_true", help=help)
            continue
        if default is not None:
            help += f" (default: {default})"
        words = words_of(name, metadata)
        parse = parser_of(name, type_, default, metadata) if type_ in (int, float) else str
        metavar = None if words else {int: "N", float: "X", str: "NAME"}[type_]
        group.add_argument(f"--{name.replace('_', '-')}", type=parse, choices=words,
                           default=default, metavar=metavar, help=help)
    return kind(**vars(parser.parse_args(argv)))


def check_args(args):
    """Bring the values of an Args to their types, and check all that needs no data. UserError."""
    for name, type_, default, metadata in flags_of(type(args)):
        value, option = getattr(args, name), "--" + name.replace("_", "-")
        if value is None and default is None:
            continue
        words = words_of(name, metadata)
        if type_ in (int, float):
            try:
                setattr(args, name, parser_of(name, type_, default, metadata)(value))
            except argparse.ArgumentTypeError as error:
                raise UserError(f"{option}: {error}") from None
        elif type_ is bool:
            check(isinstance(value, bool), f"{option}: {value!r} is not True or False; try True")
        else:
            text = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
            known = isinstance(text, str) and (words is None or text in words)
            check(known, f"{option}: {value!r} is not known; try {default or 'a name'}")
            setattr(args, name, str(text))  # numpy's text would not go into a checkpoint
    names = resnet_names()
    check(args.backbone == "tiny" or args.backbone in names,
          f"--backbone {args.backbone} is unknown; try tiny, {', '.join(names[:5])}")
    check(args.dataset != "folder" or args.data_dir != "data" or os.path.isdir("data"),
          "--dataset folder needs --data-dir DIR, the folder of your images")
    check(args.optimizer == "muon" or args.lr_filters is None, "--lr-filters needs --optimizer "
          f"muon; with --optimizer {args.optimizer} the filters' rate is --lr")
    check_rules(args)


def completed(args, device):
    """A copy of args in which flags that were left open have their values, and `given` the rest."""
    args, given = copy.copy(args), dataclasses.asdict(args)
    args.given = given
    if args.precision == "auto":
        args.precision = "bf16" if has_fast_bf16(device) else "fp32"
    if args.lr_bias is None:
        args.lr_bias = args.lr
    if args.optimizer == "muon" and args.lr_filters is None:
        args.lr_filters = 0.1
    return args


def rules_of(args):
    """The rules of sizes that hold for every method, then the method's own."""
    multiple = args.batch_size % world_size() == 0
    return [(multiple, f"--batch-size must be a multiple of the {world_size()} processes"),
            *args.rules()]


def check_rules(args):
    """Raise UserError for the first rule that fails, with the nearest sizes that obey them all."""
    rules = rules_of(args)
    broken = [text for holds, text in rules if not holds]
    if broken:
        sizes = {name: default for name, type_, default, _ in flags_of(type(args)) if type_ is int}
        names = mentioned(broken + [text for _, text in rules], sizes)
        found = nearest_changes(args, names, sizes)
        if found is None:  # more than two have to change: let it be all
            others = copy.copy(args)
            vars(others).update((name, sizes[name]) for name in names)
            nearest = nearest_changes(others, names, sizes) or {}
            found = {name: nearest.get(name, sizes[name]) for name in names}
        now = as_flags({name: getattr(args, name) for name in mentioned(broken, sizes)})
        raise UserError(f"{now}: {broken[0]}; try {as_flags(found)}")


def mentioned(texts, sizes):
    """The flags among `sizes` that the texts mention, in their order."""
    words = re.findall("--([a-z-]+)", " ".join(texts))
    return [n for n in dict.fromkeys(word.replace("-", "_") for word in words) if n in sizes]


def as_flags(sizes):
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in sizes.items())


def nearest_changes(args, names, sizes):
    """New values for at most two of the sizes `names` with which every rule holds, or None.

    Sizes that are at their defaults, `sizes`, go first: the user asked for the others."""
    free = [name for name in names if getattr(args, name) == sizes[name]]
    columns = {name: candidates(args, name, names) for name in names}
    for pool in (free, free + [name for name in names if name not in free]):
        for count, length in ((0, 0), (1, None), (2, 40)):  # so that the search does not take long
            for chosen in itertools.combinations(pool, count):
                found = nearest_that_fits(args, chosen, [columns[n][:length] for n in chosen])
                if found is not None:
                    return dict(zip(chosen, found))
    return None


def nearest_that_fits(args, chosen, columns):
    """Of the values in columns, those for the flags `chosen` that are nearest to the present ones
    and obey every rule, or None."""
    trial, best = copy.copy(args), (math.inf, None)
    for values in itertools.product(*columns):
        distance = sum(abs(math.log(v / max(1, getattr(args, n)))) for n, v in zip(chosen, values))
        if distance < best[0]:
            vars(trial).update(zip(chosen, values))
            if all(holds for holds, _ in rules_of(trial)):
                best = distance, values
    return best[1]


def candidates(args, name, names):
    """Whole numbers that may suit flag `name`, the nearest first: powers of two, and divisors and
    near multiples of the other sizes and of the number of processes."""
    now = max(1, getattr(args, name))
    found = {2**k for k in range(31)}
    for n in {world_size(), *(max(1, getattr(args, other)) for other in names if other != name)}:
        small = [d for d in range(1, min(math.isqrt(n), 10_000) + 1) if n % d == 0]
        found.update(small, (n // d for d in small))
        found.update(n * q for q in range(max(1, now // n - 2), now // n + 4))
    bounds = next(metadata for flag, *_, metadata in flags_of(type(args)) if flag == name)
    fits = [v for v in found - {now} if bounds["least"] <= v <= (bounds["most"] or v)]
    return sorted(fits, key=lambda v: abs(math.log(v / now)))


# ==============================================================================
# 3. The machine: device, precision, torchrun
# ==============================================================================


def world_size():
    """Processes that torchrun started; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank():
    """This process's number among them; 0 without torchrun."""
    return int(os.environ.get("RANK", 0))


def set_up(args):
    """Choose the device and join the other processes. Returns a completed copy of args and the torch.device. Raises UserError."""
    check(args.device != "cuda" or torch.cuda.is_available(), "--device cuda: no GPU that this torch can use; try --device cpu")
    cuda = args.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        gpus = torch.cuda.device_count()
        check(device.index < gpus, f"torchrun started more processes than there are GPUs; try --nproc_per_node={gpus}")
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True  # all batches have one size
        torch.set_float32_matmul_precision("highest")  # whitening in full fp32 whatever the environment says; convolutions may use TF32 (torch's default)
    if world_size() > 1 and not dist.is_initialized():
        patience = datetime.timedelta(hours=3)  # while rank 0 downloads; torchrun ends all when one ends
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None, timeout=patience)
    return completed(args, device), device


def has_fast_bf16(device):
    """True where bf16 is computed, not emulated: CUDA from Ampere on, x86 with AVX512-BF16 or AMX (Linux tells)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        with open("/proc/cpuinfo") as file:
            flags = file.read()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


class GatherRows(torch.autograd.Function):
    """[n, d] on each of W processes -> [W n, d] on all, rows in rank order.

    Each process computes the same loss of the gathered rows. Backward sums the W equal gradients of that loss, and
    DistributedDataParallel then averages the weights' gradients over the W processes: sum / W = the gradient of one loss."""

    @staticmethod
    def forward(ctx, z):
        z = z.contiguous()
        parts = [torch.empty_like(z) for _ in range(world_size())]
        dist.all_gather(parts, z)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)  # sum over the processes
        return gradient.chunk(world_size())[rank()]


def gather(z):
    """[n, d] of this process -> [N, d] of the global batch, with gradient, in float32 or better."""
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    return GatherRows.apply(z) if dist.is_initialized() else z


class SumOverRanks(torch.autograd.Function):
    """Sum of a tensor over the processes; the gradient of a sum used everywhere is the sum of the gradients."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient


def mean_over_ranks(x):
    """Mean of a tensor over the processes, without gradient; x itself in one process."""
    if not dist.is_initialized():
        return x
    x = x.detach().clone()
    dist.all_reduce(x)
    return x / world_size()


class CPUSyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm with the statistics of the global batch, on any device (torch.nn.SyncBatchNorm refuses CPUs)."""

    def _check_input_dim(self, x):
        pass

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        axes = [0, *range(2, x.dim())]  # all but the channels
        shape = [1, -1] + [1] * (x.dim() - 2)
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        count = x.numel() // x.shape[1] * world_size()
        mean = SumOverRanks.apply(exact.sum(axes)) / count
        centred = exact - mean.view(shape)
        variance = SumOverRanks.apply(centred.square().sum(axes)) / count
        if self.track_running_stats:
            with torch.no_grad():
                self.num_batches_tracked += 1
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
                self.running_var.lerp_((variance * count / (count - 1)).to(self.running_var.dtype), self.momentum)
        out = centred * torch.rsqrt(variance.view(shape) + self.eps)
        if self.affine:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out.to(x.dtype)


def step_seed(seed, step):
    """Seed of every random draw of a step that is not an augmentation: permutations and partitions, alike in all processes."""
    return int(np.random.SeedSequence((seed, 3, step)).generate_state(1)[0])  # 32 bits: torch's CPU generator drops what is above


def synchronise_batch_norm(model):
    """Replace plain batch norms, in place, by ones with the statistics of the global batch; parameters and buffers stay."""
    for name, child in model.named_children():
        if type(child) in (nn.BatchNorm1d, nn.BatchNorm2d):
            kind = nn.SyncBatchNorm if next(model.parameters()).is_cuda else CPUSyncBatchNorm
            new = kind(child.num_features, child.eps, child.momentum, child.affine, child.track_running_stats)
            new.weight, new.bias = child.weight, child.bias
            new.running_mean, new.running_var, new.num_batches_tracked = child.running_mean, child.running_var, child.num_batches_tracked
            setattr(model, name, new)
        else:
            synchronise_batch_norm(child)


def distribute(model, args):
    """The model as the loop calls it: compiled with --compile, and under torchrun with global batch statistics and averaged gradients."""
    if world_size() > 1:
        synchronise_batch_norm(model)
    if args.compile:
        for name, module in model.named_children():
            if name.endswith("backbone"):  # the slow one of MoCo and BYOL too
                module.forward = torch.compile(module.forward)  # .forward: the names in the checkpoint stay
    if world_size() == 1:
        return model
    ddp = nn.parallel.DistributedDataParallel
    new_name = "forward_sync_buffers" in inspect.signature(ddp.__init__).parameters  # torch 2.14 renamed the flag
    return ddp(model, **{"forward_sync_buffers" if new_name else "broadcast_buffers": False})  # the buffers are equal as they are


# ==============================================================================
# 4. Data: uint8 images, on the device where they fit
# ==============================================================================

# Mean and standard deviation of the colours, as in the W-MSE code. Other data sets: measured on the training images.
COLOUR_STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "stl10": ((0.43, 0.42, 0.39), (0.27, 0.26, 0.27)),
    "tinyimagenet": ((0.480, 0.448, 0.398), (0.277, 0.269, 0.282)),
}
DEFAULT_IMAGE_SIZE = {"patterns": 32, "cifar10": 32, "cifar100": 32, "stl10": 64, "tinyimagenet": 64}
TINYIMAGENET_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"


class Data:
    """A data set, ready for training and measuring.

    train                         images to train on: uint8 [N, 3, H, W] on the device, or `Files` where they do not fit in memory
    labelled_train, train_labels  the labelled ones among them (all but for STL-10) and their labels, int64 [N]
    test, test_labels             test images, the training images where there are none
    labelled                      True if training and test images have labels, so that kNN means something
    bank, bank_labels, queries, query_labels   at most 5000 training and 1000 test images, evenly spaced, to watch a run by
    large_bank, large_bank_labels              at most 100,000 training images, for the kNN at its end (more would fill a GPU with features)
    size, must_be_cropped         side of a view in pixels; whether images in memory are larger
    mean, std                     of the colours, [3, 1, 1] on the device
    steps_per_epoch, fingerprint, class_names"""

    def __init__(self, args, device, train, labels, test, test_labels, class_names, unlabeled=None):
        self.args, self.device, self.size, self.class_names = args, device, args.image_size, class_names
        self.fingerprint = f"{len(train)} training images"
        self.train = place(train if unlabeled is None else np.concatenate([train, unlabeled]), device)
        self.labelled_train = self.train if unlabeled is None else self.train[: len(train)]
        self.train_labels = None if labels is None else torch.as_tensor(labels, device=device).long()
        self.test = self.labelled_train if test is None else place(test, device)
        self.test_labels = None if test is None or test_labels is None else torch.as_tensor(test_labels, device=device).long()
        self.labelled = self.train_labels is not None and self.test_labels is not None
        self.bank, self.bank_labels = evenly_spaced(self.labelled_train, self.train_labels, 5000)
        self.queries, self.query_labels = evenly_spaced(self.test, self.test_labels, 1000)
        self.large_bank, self.large_bank_labels = evenly_spaced(self.labelled_train, self.train_labels, 100_000)
        statistics = COLOUR_STATISTICS.get(args.dataset) or colour_statistics(self.train, args.num_workers)
        self.mean, self.std = (torch.tensor(numbers, dtype=torch.float32, device=device).view(3, 1, 1) for numbers in statistics)
        self.steps_per_epoch = len(self.train) // args.batch_size
        self.must_be_cropped = not isinstance(self.train, Files) and self.train.shape[2:] != (self.size, self.size)
        check(self.steps_per_epoch > 0, f"--batch-size {args.batch_size} is larger than the data set of {len(self.train)} images; try "
              f"--batch-size {2 ** int(math.log2(max(2, len(self.train))))}")

    def batches(self, epoch, first=0):
        """This process's rows of each global batch of the epoch, from batch `first` on: uint8 [n, 3, H, W].

        The order is a function of (seed, epoch); the last, incomplete batch is left out. From disk: a list of cropped views."""
        order = np.random.default_rng((self.args.seed, 1, epoch)).permutation(len(self.train))
        order = torch.from_numpy(order[: self.steps_per_epoch * self.args.batch_size]).view(self.steps_per_epoch, world_size(), -1)
        if isinstance(self.train, Files):
            yield from self.train.crops(order[first:, rank()], self.args, epoch * self.steps_per_epoch + first, self.device)
        else:
            for index in order[first:, rank()].to(self.device, non_blocking=True):
                yield self.train[index]

    def augment(self, batch, step):
        """The views of a batch: a list of float32 [n, 3, size, size], every sample with its own draw from (seed, step)."""
        args = self.args
        return augment(batch, args.augment, args.views, self.size, self.mean, self.std, args.seed, step, rank(), world_size())

    def eval_views(self, images, index, batch_size):
        """images[index] without randomness, normalised, a batch at a time: float32 [n, 3, size, size]."""
        if isinstance(images, Files):
            parts = images.centres(index, batch_size, self.args.num_workers)
        else:
            parts = (images[i] for i in index.split(batch_size))
        for x in parts:
            x = centre_view(x.to(self.device).float() / 255, self.size)
            yield ((x - self.mean) / self.std).contiguous(memory_format=torch.channels_last)


def place(images, device):
    return images if images is None or isinstance(images, Files) else torch.as_tensor(images).to(device).contiguous()


def evenly_spaced(images, labels, count):
    """At most `count` of the images, evenly spaced, and their labels; all of them uncopied where they are no more."""
    if len(images) <= count:
        return images, labels
    index = torch.linspace(0, len(images) - 1, count).long()
    part = Files([images.paths[i] for i in index], images.size, images.side) if isinstance(images, Files) else images[index.to(images.device)]
    return part, None if labels is None else labels[index.to(labels.device)]


def centre_view(x, size):
    """[n, 3, H, W] in 0 ... 1 -> [n, 3, size, size]: the middle 7/8 of a larger image (the 256 -> 224 convention), resized with antialiasing."""
    height, width = x.shape[-2:]
    if (height, width) != (size, size):
        side = round(min(height, width) * 7 / 8) if min(height, width) > size else min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        x = F.interpolate(x[:, :, top:top + side, left:left + side], (size, size), mode="bilinear", antialias=True)
    return x


def colour_statistics(images, num_workers=0):
    """Mean and standard deviation per channel, in 0 ... 1, of at most 5000 evenly spaced images."""
    index = torch.arange(0, len(images), -(-len(images) // 5000))
    parts = images.centres(index, 100, num_workers) if isinstance(images, Files) else (images[i.to(images.device)] for i in index.split(100))
    sums = [(x.mean((0, 2, 3)) * len(x), x.square().mean((0, 2, 3)) * len(x)) for x in (part.double() / 255 for part in parts)]
    mean, square = (sum(column) / len(index) for column in zip(*sums))
    return mean.tolist(), (square - mean.square()).clamp_min(1e-6).sqrt().tolist()


def load_data(args, device):
    """Read or draw the data set that the flags name; sets args.image_size where the flag was not given. Returns Data, raises UserError."""
    args.image_size = args.image_size or DEFAULT_IMAGE_SIZE.get(args.dataset)
    if args.dataset == "patterns":
        train, labels, test, test_labels = make_patterns()
        return Data(args, device, train, labels, test, test_labels, PATTERN_CLASSES)
    if args.dataset == "folder":
        return load_folder(args, device, args.data_dir)
    if rank() > 0 and dist.is_initialized():
        dist.barrier()  # let rank 0 download; if it fails, torchrun ends the others
    data = load_tinyimagenet(args, device) if args.dataset == "tinyimagenet" else load_torchvision(args, device)
    if rank() == 0 and dist.is_initialized():
        dist.barrier()
    return data


def load_torchvision(args, device):
    """cifar10, cifar100, stl10 by torchvision's own classes: read from --data-dir, or downloaded to it."""
    kind, archive = {"cifar10": (torchvision.datasets.CIFAR10, "cifar-10-python.tar.gz"),
                     "cifar100": (torchvision.datasets.CIFAR100, "cifar-100-python.tar.gz"),
                     "stl10": (torchvision.datasets.STL10, "stl10_binary.tar.gz")}[args.dataset]
    splits = [{"split": name} for name in ("train", "test", "unlabeled")] if args.dataset == "stl10" else [{"train": True}, {"train": False}]
    parts = [local_or_downloaded(args, archive, lambda download: kind(args.data_dir, download=download, **split)) for split in splits]
    images = [part.data if args.dataset == "stl10" else part.data.transpose(0, 3, 1, 2) for part in parts]  # [N, 3, H, W] uint8
    labels = [part.labels if args.dataset == "stl10" else part.targets for part in parts]
    return Data(args, device, images[0], labels[0], images[1], labels[1], parts[0].classes, unlabeled=images[2] if args.dataset == "stl10" else None)


def local_or_downloaded(args, archive, open_dataset):
    """open_dataset(download=False), and if the data is not there open_dataset(download=True); a failure is one line."""
    try:
        with contextlib.suppress(RuntimeError):  # torchvision's word for "not found or corrupted"
            return open_dataset(False)
        say(f"{args.dataset}: not in {args.data_dir}, downloading it")
        return open_dataset(True)
    except (OSError, RuntimeError, EOFError, zipfile.BadZipFile, http.client.HTTPException) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"--dataset {args.dataset}: no complete copy in --data-dir {args.data_dir} and the download failed ({reason}); "
                        f"put {archive} there yourself, or train offline with --dataset patterns") from error


def load_tinyimagenet(args, device):
    """The official archive's layout: train/<wnid>/images/*, val/images/* with val/val_annotations.txt."""
    root = os.path.join(args.data_dir, "tiny-imagenet-200")

    def open_folder(download):
        if download:
            archive = os.path.join(args.data_dir, os.path.basename(TINYIMAGENET_URL))
            if os.path.isfile(archive) and not zipfile.is_zipfile(archive):
                os.remove(archive)  # cut short by an interrupted download
            torchvision.datasets.utils.download_and_extract_archive(TINYIMAGENET_URL, args.data_dir)
        if not os.path.isfile(os.path.join(root, "val", "val_annotations.txt")):
            raise RuntimeError(f"no {root}/val/val_annotations.txt")

    local_or_downloaded(args, "tiny-imagenet-200.zip", open_folder)
    train, labels, class_names = list_images(os.path.join(root, "train"))
    with open(os.path.join(root, "val", "val_annotations.txt")) as file:
        rows = [line.split("\t")[:2] for line in file if line.strip()]
    known = [(name, class_names.index(wnid)) for name, wnid in rows if wnid in class_names]
    test = [os.path.join(root, "val", "images", name) for name, _ in known]
    return data_from_files(args, device, train, labels, test, [label for _, label in known], class_names)


def load_folder(args, device, root):
    """Anyone's images: DIR/train/<class>/* with DIR/test or DIR/val, DIR/<class>/*, or a flat folder without labels."""
    check(os.path.isdir(root), f"--data-dir {root} is not a folder; try the folder that holds your images")
    train_root = os.path.join(root, "train") if os.path.isdir(os.path.join(root, "train")) else root
    train, labels, class_names = list_images(train_root)
    check(train, f"--data-dir {root}: no images in {train_root} (looked for "
          f"{', '.join(torchvision.datasets.folder.IMG_EXTENSIONS[:5])} ...); try the folder that holds your images")
    check(len(train) > 1, f"--data-dir {root}: one image is too few; try a folder with at least some hundreds")
    check(len(class_names) != 1, f"--data-dir {root}: only one class, {(class_names or [''])[0]!r}, so labels measure nothing; "
          f"put the images straight into {train_root} to train without labels")
    test_root = next((p for p in (os.path.join(root, name) for name in ("test", "val")) if train_root != root and os.path.isdir(p)), None)
    test, test_labels = None, None
    if test_root:
        test, local_labels, test_classes = list_images(test_root)
        if class_names and test_classes:
            strangers = sorted(set(test_classes) - set(class_names))
            check(not strangers, f"--data-dir {root}: {test_root}/{(strangers or [''])[0]} has no counterpart in {train_root}")
            test_labels = [class_names.index(test_classes[label]) for label in local_labels]
        test = test or None
    return data_from_files(args, device, train, labels, test, test_labels, class_names)


def list_images(root):
    """(paths, labels, class_names) of the images below root in sorted order; labels None and no names if root holds images itself."""
    extensions = torchvision.datasets.folder.IMG_EXTENSIONS
    paths = sorted(os.path.join(folder, name) for folder, _, names in os.walk(root, followlinks=True) for name in names
                   if name.lower().endswith(extensions) and not name.startswith("."))
    tops = [os.path.relpath(path, root).split(os.sep) for path in paths]
    if any(len(parts) == 1 for parts in tops):
        return paths, None, []
    class_names = sorted({parts[0] for parts in tops})
    number_of = {name: i for i, name in enumerate(class_names)}
    return paths, [number_of[parts[0]] for parts in tops], class_names


MEMORY_LIMIT = 6 * 2**30  # bytes of images kept on a GPU, or by all processes of a machine without; more, or with --stream, are read from disk as needed


def data_from_files(args, device, train, labels, test, test_labels, class_names):
    """Data from lists of files: decoded once into memory where they fit, else read from disk by workers as training goes on."""
    first = next((path for path in train if read_image(path) is not None), None)
    check(first is not None, f"--data-dir {args.data_dir}: none of the {len(train)} files can be read as an image; try another --data-dir")
    shorter = check_large_enough(first, read_image(first))
    args.image_size = args.image_size or min(64, shorter)
    side = args.image_size if shorter <= args.image_size else math.ceil(args.image_size * 8 / 7)
    copies = 1 if device.type == "cuda" else int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # each process keeps all images
    size = 3 * side**2 * (len(train) + len(test or [])) * copies
    stream = args.stream or size > MEMORY_LIMIT
    fingerprint = f"{len(train)} files, {names_crc(os.path.relpath(path, args.data_dir) for path in train)}"
    if stream:
        train, test = Files(train, args.image_size, side), test and Files(test, args.image_size, side)
    else:
        train, labels = decode(train, labels, side)
        check(len(train) > 1, f"--data-dir {args.data_dir}: fewer than two readable images")
        if test:
            test, test_labels = decode(test, test_labels, side)
            test, test_labels = (test, test_labels) if len(test) else (None, None)
    data = Data(args, device, train, labels, test, test_labels, class_names)
    data.fingerprint = fingerprint if stream else f"{len(data.train)} readable of {fingerprint}"
    return data


def names_crc(names):
    """A short fingerprint of a list of file names."""
    return f"{zlib.crc32(chr(10).join(names).replace(os.sep, '/').encode(errors='surrogateescape')):08x}"


def read_image(path):
    """The image as RGB uint8 [3, H, W] (grey, palette, RGBA, CMYK and 16 bits are converted), or None if it cannot be read."""
    try:
        with open(path, "rb") as file:
            image = Image.open(file)
            if image.mode.startswith("I"):  # 16 bits: Pillow's own conversion cuts off what is above 255
                image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # Pillow's ways to say that a file is broken
        return None


def check_large_enough(path, image):
    """The shorter side of an image [3, H, W] in pixels, at least 8. Raises UserError."""
    shorter = min(image.shape[1:])
    check(shorter >= 8, f"{path} is {image.shape[2]}x{image.shape[1]} pixels, too small to learn from; remove images below 8x8")
    return shorter


def to_square(image, side):
    """uint8 [3, H, W] -> [3, side, side]: shorter edge resized to `side` with antialiasing, then the centre."""
    if tuple(image.shape[1:]) == (side, side):
        return image
    image = functional.resize(image, side, antialias=True)
    return functional.center_crop(image, side)


def decode(paths, labels, side):
    """All images in memory: uint8 [N, 3, side, side] and their labels. Broken files are skipped, counted and named."""
    images, kept, broken = torch.empty(len(paths), 3, side, side, dtype=torch.uint8), [], []
    for i, path in enumerate(paths):
        image = read_image(path)
        if image is None:
            broken.append(path)
            continue
        check_large_enough(path, image)
        images[len(kept)] = to_square(image, side)
        kept.append(i)
    if broken:
        warn(f"skipped {len(broken)} of {len(paths)} files that cannot be read as images: {', '.join(broken[:3])}{' ...' if len(broken) > 3 else ''}")
    return images[: len(kept)], None if labels is None else [labels[i] for i in kept]


class Files:
    """Images on disk, decoded and cropped by loader processes; the rest of the augmentation stays batched on the device."""

    def __init__(self, paths, size, side):
        self.paths, self.size, self.side = paths, size, side  # side: of the centre squares for measuring, as in memory

    def __len__(self):
        return len(self.paths)

    def crops(self, batches, args, first_step, device):
        """For each row of `batches` [steps, n] a list of views uint8 [n, 3, size, size], cropped by draws from (seed, step, view, sample)."""
        tasks = ([(first_step + i, rank() * len(row) + j, k) for j, k in enumerate(row.tolist())] for i, row in enumerate(batches))
        recipe = [RECIPES[args.augment][v % len(RECIPES[args.augment])] for v in range(args.views)]
        dataset = _CropTask(self.paths, self.size, recipe, args.seed)
        loader = torch.utils.data.DataLoader(dataset, batch_sampler=tasks, num_workers=args.num_workers, pin_memory=device.type == "cuda",
                                             worker_init_fn=leave_signals_to_the_main_process)
        for views in in_one_line(loader):
            yield [view.to(device, non_blocking=True) for view in views]

    def centres(self, index, batch_size, num_workers):
        """uint8 [n, 3, side, side] centre squares of the images `index`, for measuring."""
        dataset = _CentreTask(self.paths, self.side)
        yield from in_one_line(torch.utils.data.DataLoader(dataset, batch_size, sampler=index.tolist(), num_workers=num_workers,
                                                           worker_init_fn=leave_signals_to_the_main_process))


def leave_signals_to_the_main_process(_worker):
    """Ctrl-C and torchrun's SIGTERM reach the loader's processes too: they go on until the main process has saved, or for five seconds."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: threading.Timer(5, os._exit, (0,)).start())


def in_one_line(loader):
    """The loader's batches; what a worker process wants to tell the user comes back without its traceback."""
    try:
        yield from loader
    except UserError as error:
        raise UserError(str(error).strip().splitlines()[-1].split("UserError: ")[-1]) from None


class _CropTask(torch.utils.data.Dataset):
    def __init__(self, paths, size, recipe, seed):
        self.paths, self.size, self.recipe, self.seed = paths, size, recipe, seed

    def __getitem__(self, task):
        step, row, index = task
        image = read_or_next(self.paths, index)
        views = []
        for number_of_view, view in enumerate(self.recipe):
            crop = next((op for op in view if op[0] == "crop"), None)
            rng = np.random.default_rng((self.seed, 2, step, number_of_view, row))
            views.append(crop_one(image, crop, self.size, rng))
        return views


def crop_one(image, crop, size, rng):
    """A random crop of one image, uint8 [3, H, W] -> [3, size, size], by the recipe's crop; without one the centre."""
    if crop is None:
        return to_square(image, size)
    top, left, height, width = draw_boxes(1, *image.shape[1:], crop[1], crop[2], rng)[0].tolist()
    interpolation = torchvision.transforms.InterpolationMode(crop[3])
    return functional.resized_crop(image, top, left, height, width, [size, size], interpolation, antialias=True)


class _CentreTask(torch.utils.data.Dataset):
    def __init__(self, paths, side):
        self.paths, self.side = paths, side

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return to_square(read_or_next(self.paths, index), self.side)


def read_or_next(paths, index):
    """Image `index`; in place of one that cannot be read the next one, with a warning that names it. A vanished file raises UserError."""
    for i in range(index, index + len(paths)):
        path = paths[i % len(paths)]
        image = read_image(path)
        if image is not None:
            return image
        check(os.path.exists(path), f"{path} vanished; put it back and go on with --resume, or train afresh with another --out")
        warn(f"{path} cannot be read as an image; the next one takes its place")
    raise UserError("none of the image files can be read; see --data-dir")


PATTERN_CLASSES = ["stripes", "checks", "dots", "bricks", "zigzag", "grid", "rings", "triangles", "weave", "crosses"]


def make_patterns(seed=0, train=10_000, test=2_000):
    """(train_images uint8 [N, 3, 32, 32], train_labels int64 [N], test_images, test_labels): textures in two colours.

    Nothing but the texture tells the class: period, phase, tilt, warp, light and noise are drawn alike for all classes, and half
    of every image is ink. All images have nearly the same two colours, and the light changes several times across an image, on
    purpose: what is an *image's* own and survives the augmentation (a hue, or one bright side) can be learned in place of any
    texture. BYOL did: where the light changed slowly, its features foretold how
    fast (R^2 = 0.9, a linear fit) and no more of the class than untrained ones."""
    rng, n = np.random.default_rng(seed), train + test
    labels = np.arange(n) % 10  # balanced; shuffled below, each split by itself
    labels = np.concatenate([labels[:train][np.argsort(rng.random(train))], labels[train:][np.argsort(rng.random(test))]])
    images = np.empty((n, 3, 32, 32), np.uint8)
    x = np.arange(32) / 16 - 31 / 32  # pixel centres, in (-1, 1)
    y = x[:, None]
    wave = lambda t: np.abs(t - np.rint(t))  # distance to the nearest integer: 0 ... 0.5
    for k in range(10):
        mine = np.flatnonzero(labels == k)
        draw = lambda low, high, *shape: low + (high - low) * rng.random((len(mine), *(shape or (1, 1))))
        # Coordinates (u, v) that count periods: bent by a smooth warp, turned by a tilt, scaled and shifted.
        px = x + draw(.1, .2) * np.sin(draw(2, 4) * y + draw(0, 6.3))
        py = y + draw(.1, .2) * np.sin(draw(2, 4) * x + draw(0, 6.3))
        tilt, scale = draw(-.3, .3) * (11 if k == 0 else 1), draw(2.2, 3)  # radians (stripes lie at any angle); periods in 16 pixels
        u = scale * (px * np.cos(tilt) - py * np.sin(tilt)) + draw(0, 8)
        v = scale * (px * np.sin(tilt) + py * np.cos(tilt)) + draw(0, 8)
        row, column = np.floor(v), np.floor(u)
        a, b, c, d = wave(u), wave(v), wave(u + row / 2), v - row  # c: every second row is shifted; d: 0 ... 1 in a row
        g = (lambda: 1.5 * wave(1.5 * v),  # stripes
             lambda: 4 * (a - .25) * (b - .25),  # checks
             lambda: np.hypot(c, d - .5),  # dots
             lambda: np.minimum(wave(.7 * u + np.floor(1.4 * v) / 2), wave(1.4 * v)),  # bricks
             lambda: wave(v + 1.2 * a),  # zigzag
             lambda: np.minimum(a, b),  # grid
             lambda: np.abs(np.hypot(a, b) - .33),  # rings
             lambda: d / 2 - a,  # triangles
             lambda: np.where((row + column) % 2 == 0, wave(2 * u + .25), wave(2 * v + .25)) / 2,  # weave
             lambda: np.maximum(np.minimum(a, b) - .12, np.maximum(a, b) - .36))[k]()  # crosses
        g = (g - np.median(g, (1, 2), keepdims=True)) * np.where(draw(0, 1) < .5, 1, -1)  # ink where g > 0: half of the image
        ink = np.clip(.5 + 16 / scale * g, 0, 1)[:, None]  # edges one pixel wide
        dark = draw(.29, .31, 1, 1, 1) + np.reshape([-.05, 0, .05], (3, 1, 1))  # bluish
        light = dark + draw(.37, .38, 1, 1, 1) + np.reshape([.1, .02, -.1], (3, 1, 1))  # yellowish
        image = dark + ink * (light - dark)
        for t in (x, y):  # uneven light
            image += .12 * np.sin(draw(5, 8, 1, 1, 1) * t + draw(0, 6.3, 1, 1, 1))
        image += draw(-.06, .06, 3, 32, 32)  # pixel noise
        images[mine] = np.rint(255 * np.clip(image, 0, 1))
    return images[:train], labels[:train], images[train:], labels[train:]


# ==============================================================================
# 5. Augmentation: a whole batch at once, on the device, every sample with its own draw
# ==============================================================================

FLIP = ("flip", 0.5)  # probability
CROP = ("crop", 0.2, 1.0, "bilinear")  # least and greatest share of the area, interpolation
WIDE_CROP = ("crop", 0.08, 1.0, "bilinear")
BICUBIC_CROP = ("crop", 0.2, 1.0, "bicubic")
WIDE_BICUBIC_CROP = ("crop", 0.08, 1.0, "bicubic")
BLUR = ("blur", 0.5, 0.1, 2.0)  # probability, least and greatest sigma in pixels
JITTER = ("jitter", 0.4, 0.4, 0.4, 0.1, 0.8)  # brightness, contrast, saturation, hue; probability
SOFT_JITTER = ("jitter", 0.4, 0.4, 0.2, 0.1, 0.8)

# name -> views -> operations in the order in which they are applied. A view beyond the listed ones starts again at the
# first: symmetric recipes list one view, BYOL's two alternate.
RECIPES = {
    # W-MSE, CW-RGP (htdt/self-supervised): colours are changed before the crop (streamed images are cropped as they are read)
    "w-mse": [(JITTER, ("grey", 0.1), BICUBIC_CROP, FLIP)],
    # MoCo v2 2003.04297, SimSiam 2011.10566; v1 1911.05722; the MoCo authors' CIFAR-10 demo
    "moco-v2": [(CROP, JITTER, ("grey", 0.2), BLUR, FLIP)],
    "moco-v1": [(CROP, ("grey", 0.2), ("jitter", 0.4, 0.4, 0.4, 0.4, 1.0), FLIP)],
    "moco-cifar": [(WIDE_CROP, FLIP, JITTER, ("grey", 0.2))],
    # SimSiam App. D, Shuffled-DBN: MoCo v2 without blur
    "simsiam-cifar": [(CROP, JITTER, ("grey", 0.2), FLIP)],
    # SimCLR 2002.05709 App. A and google-research/simclr: colour strength 1 with blur; on CIFAR-10 strength 1/2 without
    "simclr": [(WIDE_BICUBIC_CROP, FLIP, ("jitter", 0.8, 0.8, 0.8, 0.2, 0.8), ("grey", 0.2), BLUR)],
    "simclr-cifar": [(WIDE_BICUBIC_CROP, FLIP, JITTER, ("grey", 0.2))],
    # BYOL 2006.07733 App. B, Barlow Twins, VICReg: the two views differ in blur and solarisation
    "byol": [(WIDE_BICUBIC_CROP, FLIP, SOFT_JITTER, ("grey", 0.2), ("blur", 1.0, 0.1, 2.0), ("solarize", 0.0)),
             (WIDE_BICUBIC_CROP, FLIP, SOFT_JITTER, ("grey", 0.2), ("blur", 0.1, 0.1, 2.0), ("solarize", 0.2))],
    # VICReg on CIFAR-10 (vturrisi/solo-learn)
    "vicreg-cifar": [(BICUBIC_CROP, SOFT_JITTER, ("grey", 0.2), ("solarize", 0.1), FLIP)],
    # ours, for runs of minutes: W-MSE's with larger crops, an easier task
    "short": [(JITTER, ("grey", 0.1), ("crop", 0.35, 1.0, "bicubic"), FLIP)],
    "crop-flip": [(CROP, FLIP)],
    "none": [()],
}


def draw(view, n, height, width, rng):
    """Draw the parameters of one view for n images of height x width: a list with one dict of arrays [n, ...] per operation.

    crop {box [n, 4]: top, left, height, width}; jitter {on [n], order [n, 4], factor [n, 4]} with brightness 0, contrast 1,
    saturation 2, hue 3; blur {on, sigma}; grey, flip, solarize {on}. `rng` is a numpy Generator.
    """
    params = []
    for name, *setting in view:
        if name == "crop":
            params.append({"box": draw_boxes(n, height, width, setting[0], setting[1], rng)})
        elif name == "jitter":
            *strength, hue, p = setting
            low = np.array([max(0.0, 1 - s) for s in strength] + [-hue])
            high = np.array([1 + s for s in strength] + [hue])
            order, factor = rng.random((n, 4)).argsort(1), rng.uniform(low, high, (n, 4))
            params.append({"on": rng.random(n) < p, "order": order, "factor": factor})
        elif name == "blur":
            params.append({"on": rng.random(n) < setting[0], "sigma": rng.uniform(setting[1], setting[2], n)})
        else:
            params.append({"on": rng.random(n) < setting[0]})
    return params


def draw_boxes(n, height, width, min_area, max_area, rng, ratio=(3 / 4, 4 / 3)):
    """n crop boxes, int [n, 4], by torchvision's RandomResizedCrop: the first of ten tries that fits, else a central box."""
    area = height * width * rng.uniform(min_area, max_area, (10, n))
    aspect = np.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1]), (10, n)))
    w, h = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))  # [10, n]
    fits = (0 < w) & (w <= width) & (0 < h) & (h <= height)
    first, column = fits.argmax(0), np.arange(n)
    w, h, fits = w[first, column], h[first, column], fits[first, column]  # [n]
    # no try fits (rare, or a very long image): as much of the image as the ratio allows
    w = np.where(fits, w, min(width, round(height * ratio[1])))
    h = np.where(fits, h, min(height, round(width / ratio[0])))
    top, left = rng.random((2, n))
    top = np.where(fits, np.floor(top * (height - h + 1)), (height - h) // 2)
    left = np.where(fits, np.floor(left * (width - w + 1)), (width - w) // 2)
    return np.stack([top, left, h, w], 1).astype(np.int64)


def apply(view, images, params, size, cropped=False):
    """Apply one view's operations with the given `draw`n parameters. -> float32 [n, 3, size, size] in [0, 1].

    images: uint8, or float in [0, 1], [n, 3, H, W]. cropped=True leaves the crop out (a streaming loader has cropped already).
    """
    x = images.float().div_(255) if images.dtype == torch.uint8 else images.float().clone()  # the operations work in place
    todo = [(op, p) for op, p in zip(view, params) if not (cropped and op[0] == "crop")]
    names = [op[0] for op, _ in todo]
    # A flip after the crop commutes with all that lies between (blur is symmetric), so the crop's matrix does it for free.
    mirror = np.zeros(len(x), dtype=bool)
    if "flip" in names and "crop" in names[: names.index("flip")]:
        mirror = todo.pop(names.index("flip"))[1]["on"]
    arrays = to_device([host_arrays(op[0], p, mirror, size) for op, p in todo], x.device)
    for (op, _), tensors in zip(todo, arrays):
        if op[0] == "crop":
            x = crop_and_resize(x, *tensors, size, op[3])
        elif op[0] == "jitter":
            x = jitter(x, *tensors)
        elif len(tensors[0]):  # the others change only the rows drawn for them
            rows, *rest = tensors
            x.index_copy_(0, rows, ROW_OPERATIONS[op[0]](x.index_select(0, rows), *rest))
    if x.shape[2:] != (size, size):
        raise ValueError(f"images are {x.shape[2]}x{x.shape[3]}, not --image-size {size}, and this recipe has no crop")
    return x


def host_arrays(name, p, mirror, size):
    """What one operation needs on the device, from its drawn parameters. All data-dependent sizes are settled here, in numpy."""
    if name == "crop":
        top, left, h, w = p["box"].T
        ends = [np.stack([top, top + h, 0 * h, h / size], 1),  # first, last + 1, origin, step
                np.stack([left, left + w, w * mirror, np.where(mirror, -w, w) / size], 1)]
        return [e.astype(np.float32) for e in ends]
    if name == "jitter":
        # Three blends per sample, and hue before, between or after them. With the samples sorted by hue's place in their order
        # (un-jittered ones last), the samples whose hue is due are one slice of known bounds.
        place = np.where(p["on"], (p["order"] == 3).argmax(1), 4)
        rows = place.argsort(kind="stable")
        done = rows[: np.count_nonzero(place < 4)]  # the m jittered samples
        order, factor = p["order"][done], p["factor"][done]
        blend = order[order != 3].reshape(-1, 3)  # [m, 3] which of 0, 1, 2
        keep = np.take_along_axis(factor, blend, 1)  # [m, 3]
        hues = np.split(factor[:, 3], np.searchsorted(place[done], [1, 2, 3]))  # 4 x [rows of this place]
        return [rows, rows.argsort(), keep, (1 - keep) * (blend == 2), (1 - keep) * (blend == 1), *hues]
    rows = np.flatnonzero(p["on"])
    return [rows, p["sigma"][rows]] if name == "blur" else [rows]


def to_device(lists, device):
    """Lists of numpy arrays -> lists of tensors (int64, float32), in one asynchronous transfer."""
    flat = [a for arrays in lists for a in arrays]
    packed = np.concatenate([np.zeros(0)] + [a.reshape(-1) for a in flat]).astype(np.float32)  # row numbers < 2^24 are exact
    packed = torch.from_numpy(packed)
    packed = packed.pin_memory() if device.type == "cuda" else packed  # only from pinned memory is the copy asynchronous
    parts = packed.to(device, non_blocking=True).split([a.size for a in flat])
    parts = iter([t.view(a.shape).long() if a.dtype.kind == "i" else t.view(a.shape) for t, a in zip(parts, flat)])
    return [[next(parts) for _ in arrays] for arrays in lists]


def crop_and_resize(x, vertical, horizontal, size, interpolation):
    """Resize each sample's box to size x size, antialiased as in PIL and torchvision: out = Wy x Wx^T.  x [n, 3, H, W]"""
    n, c, height, width = x.shape
    wx = resize_matrix(horizontal, width, size, interpolation)  # [n, size, W]
    wy = resize_matrix(vertical, height, size, interpolation)  # [n, size, H]
    x = torch.bmm(wx, x.reshape(n, c * height, width).mT)  # [n, size, 3 H]: no copy
    x = torch.bmm(wy, x.view(n, size * c, height).mT).view(n, size, size, c).permute(0, 3, 1, 2)  # [n, 3, size, size], channels_last
    return x.clamp_(0, 1) if interpolation == "bicubic" else x  # bicubic overshoots


def resize_matrix(ends, length, size, interpolation):
    """Rows of interpolation weights [n, size, length]. ends [n, 4]: the box is [first, last); output pixel s has its centre at
    first + origin + step (s + 1/2), where a negative step mirrors."""
    first, last, origin, step = ends[:, None].unbind(-1)  # [n, 1] each
    scale = step.abs().clamp_min(1)  # > 1 widens: antialias
    pixel = torch.arange(length, device=ends.device) + 0.5  # [length]
    inside = (pixel > first) & (pixel < last)  # [n, length]
    pixel = torch.where(inside, pixel - first, 1e9)  # none looks outside its box
    centre = origin + step * (torch.arange(size, device=ends.device) + 0.5)  # [n, size]
    t = pixel[:, None, :].sub(centre[:, :, None]).div_(scale[:, None]).abs_()  # [n, size, length]
    if interpolation == "bilinear":
        w = t.neg_().add_(1).clamp_min_(0)  # 1 - |t|
    else:  # Keys' cubic, a = -1/2: with u = (2 - |t|)+ and v = (1 - |t|)+ it is u^2 (u - 1) / 2 + v^2 (1 - 2 v)
        u = t.neg_().add_(2).clamp_min_(0)
        outer = (u - 1).mul_(u).mul_(u)
        v = u.sub_(1).clamp_min_(0)
        w = (0.5 - v).mul_(v).mul_(v).mul_(4).add_(outer)  # twice the kernel
    return w.div_(w.sum(-1, keepdim=True))


def luma(x):
    """Grey level with torchvision's weights. x [n, 3, ...] -> [n, 1, ...]"""
    r, g, b = x.split(1, 1)
    return r.mul(0.2989).add_(g, alpha=0.587).add_(b, alpha=0.114)


def jitter(x, rows, back, keep, to_grey, to_mean, *hues):
    """Brightness, contrast, saturation and hue of x [n, 3, H, W] in each sample's own order (arguments: host_arrays).

    The first three are one formula, x <- clamp(f x + (1 - f) y), with y = 0, the mean grey, or the pixel's grey.
    """
    shape, x = x.shape, x.flatten(2).index_select(0, rows)  # sorted by the place of hue
    jittered = x[: len(keep)]  # [m, 3, HW]
    parts = jittered.split([len(h) for h in hues])
    keep, to_grey, to_mean = (c.t()[:, :, None, None] for c in (keep, to_grey, to_mean))  # [3 rounds, m, 1, 1]
    for place in range(4):
        if len(hues[place]):
            shift_hue(parts[place], hues[place])
        if place < 3:
            grey = luma(jittered)  # [m, 1, HW]
            mean = grey.mean(-1, keepdim=True) * to_mean[place]
            jittered.mul_(keep[place]).add_(grey.mul_(to_grey[place]).add_(mean)).clamp_(0, 1)
    return x.index_select(0, back).view(shape)


def shift_hue(x, turn):
    """Rotate the hue of x [n, 3, P] by turn [n] (1 = full circle), in place: adjust_hue without its six-fold case distinction.

    With max M, chroma C = M - min and hue h in sixths of a turn, |h| = 2 + (g + b - r - M) / C with the sign of g - b; and
    channel c of an HSV colour is M - C clamp(2 - d, 0, 1), d its distance in sixths from the hue opposite to c.
    """
    r, g, b = x.unbind(1)  # [n, P]
    top = x.amax(1)
    chroma = top - x.amin(1)
    hue = (g + b).sub_(r).sub_(top).div_(chroma.clamp_min(1e-20)).add_(2).copysign_(g - b).div_(6)
    opposite = torch.arange(3, device=x.device).mul(-1 / 3).add(1 / 2) + turn[:, None]  # [n, 3]
    d = hue[:, None] + opposite[:, :, None]  # [n, 3, P]
    d = d.sub_(d.round()).abs_().clamp_(1 / 6, 1 / 3)  # distance in turns
    torch.addcmul((top - 2 * chroma)[:, None], chroma.mul_(6)[:, None], d, out=x)


def blur(x, sigma):
    """Gaussian blur of x [n, 3, S, S] with sigma [n] in pixels: reflected borders, odd kernel of 10 % of the side (SimCLR).

    MoCo's and Barlow Twins' code blurs with Pillow, which does not cut the kernel: the same at 224 pixels; at 32 pixels a sigma of
    2 acts like 0.8 here."""
    side = x.shape[-1]
    radius = (side // 10) // 2
    t = torch.arange(radius + 2, device=x.device)
    kernel = torch.exp(-0.5 * (t / sigma[:, None]) ** 2) * (t <= radius)  # [n, radius + 2], ends in 0
    kernel = kernel / (2 * kernel.sum(1, keepdim=True) - kernel[:, :1])
    i, j = torch.arange(side, device=x.device)[:, None], torch.arange(side, device=x.device)
    # pixel i sees pixel j directly, mirrored at the first edge, and mirrored at the last edge (the edge itself is not repeated)
    paths = [(i - j).abs(), torch.where(j > 0, i + j, side), torch.where(j < side - 1, 2 * (side - 1) - i - j, side)]
    band = sum(kernel[:, path.clamp_max(radius + 1)] for path in paths)  # [n, S, S]
    return torch.matmul(band[:, None], torch.matmul(x, band.mT[:, None]))


ROW_OPERATIONS = {
    "flip": lambda x: x.flip(-1),
    "grey": lambda x: luma(x).expand_as(x),
    "blur": blur,
    "solarize": lambda x: torch.where(x >= 0.5, 1 - x, x),
}


@torch.no_grad()
def augment(images, recipe, views, size, mean, std, seed, step, rank=0, world_size=1):
    """Views of one batch: a list of float32 [n, 3, size, size], normalised, channels_last.

    images: uint8 [n, 3, H, W], or a list with one batch of crops per view (from a loader that has cropped already); mean, std: three
    numbers each (tensors on the device cost no transfer). The draws are those of the global batch of world_size * n images, of
    which this rank holds rows rank * n onwards: N ranks see what one process would, and (seed, step) alone decides, so that a
    resumed run goes on exactly, on any device."""
    cropped, out = isinstance(images, (list, tuple)), []
    # Three numbers at a time are slow to subtract: a whole picture of each, [1, 3, size, size], in the order of the views' memory.
    mean, std = (torch.as_tensor(v, dtype=torch.float32, device=images[0].device).view(1, 3, 1, 1).expand(1, 3, size, size)
                 .contiguous(memory_format=torch.channels_last) for v in (mean, std))
    for number_of_view in range(views):
        batch = images[number_of_view] if cropped else images
        n, _, height, width = batch.shape
        view = RECIPES[recipe][number_of_view % len(RECIPES[recipe])]
        params = draw(view, n * world_size, height, width, np.random.default_rng((seed, 0, step, number_of_view)))
        params = [{key: array[rank * n : (rank + 1) * n] for key, array in p.items()} for p in params]
        with torch.autocast(batch.device.type, enabled=False):  # resampling needs float32
            x = apply(view, batch, params, size, cropped)
        out.append(x.contiguous(memory_format=torch.channels_last).sub_(mean).div_(std))  # right after a crop: no copy
    return out


# ==============================================================================
# 6. Backbones
# ==============================================================================


def resnet_names():
    """torchvision's ResNets by name."""
    return [name for name in torchvision.models.list_models() if name.startswith("resnet") and name[6:].isdigit()]


def build_backbone(name, image_size, width=32):
    """(network, feature_dim): H = network(x) is [N, feature_dim], the output of average pooling.

    `tiny`: 2x2 stride-2 stem of w channels, four 3x3 convolutions (3w with stride 2, 3w, pool, 6w, 8w), each with batch norm and ReLU,
    then the mean of each quarter of the picture (32w features). All others: the mean of the whole picture.
    A ResNet has torchvision's own parameter names and zero-initialised last batch norms (SimSiam, Barlow, VICReg, CW-RGP code).
    Its stem (SimCLR appendix B.9, W-MSE code): up to 32 pixels 3x3 stride 1 without pooling; up to 64 pixels 3x3 with pooling. Its weights
    are drawn like those of the other convolutions (W-MSE code: PyTorch's default)."""
    if name == "tiny":
        return Tiny(width), 32 * width
    check(name in resnet_names(), f"--backbone {name} is unknown; try tiny, {', '.join(resnet_names()[:5])}")
    network = torchvision.models.get_model(name, weights=None, zero_init_residual=True)
    if image_size <= 64:
        network.conv1 = nn.Conv2d(3, 64, 3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    if image_size <= 32:
        network.maxpool = nn.Identity()
    feature_dim = network.fc.in_features
    network.fc = nn.Identity()
    return network, feature_dim


class Tiny(nn.Module):
    """A plain network for CPUs: [N, 3, S, S] -> [N, 32 width], most of its work in few pixels and many channels.

    On CIFAR-10 it learned more per minute than a small ResNet, and than networks with more convolutions at higher resolution. The
    means of the quarters of the picture, not of the whole, cost the network nothing; there a linear layer read 3 to 4 % more from them."""

    def __init__(self, width):
        super().__init__()

        def block(inputs, outputs, kernel=3, stride=1, padding=1):
            return [nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]

        w = width
        self.layers = nn.Sequential(
            *block(3, w, kernel=2, stride=2, padding=0),                            # [N, 32, S/2, S/2]
            *block(w, 3 * w, stride=2), *block(3 * w, 3 * w), nn.MaxPool2d(2),      # [N, 96, S/8, S/8]
            *block(3 * w, 6 * w), *block(6 * w, 8 * w),                             # [N, 256, S/8, S/8]
            nn.AdaptiveAvgPool2d(2), nn.Flatten())                                  # [N, 1024]: 256 channels of 2 x 2 quarters
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x):
        return self.layers(x)


# ==============================================================================
# 7. Optimisation
# ==============================================================================


def learning_rate(args, step, total_steps, steps_per_epoch):
    """Factor in [0, 1] of the peak learning rate at `step` (0 ... total_steps - 1): a pure function, so resume is exact.

    Linear warm-up (the first step has 1 / warmup), then `cosine` to 0, or `step`: x 0.2 at 50 and again at 25 epochs before
    the end (W-MSE and CW-RGP code), or `constant`."""
    warmup = min(500, total_steps // 10) if args.warmup is None else args.warmup
    if step < warmup:
        return (step + 1) / warmup
    if args.schedule == "cosine":
        return (1 + math.cos(math.pi * (step - warmup) / max(1, total_steps - warmup))) / 2
    if args.schedule == "step":
        drops = (total_steps - epochs * steps_per_epoch for epochs in (50, 25))
        return 0.2 ** sum(step >= drop > 0 for drop in drops)  # a drop before the start does not count
    return 1.0


def build_optimizer(model, args):
    """Adam, SGD, LARS or Muon over the parameters that want a gradient.

    Biases and norm layers form a group of their own: its peak rate is --lr-bias, and LARS neither decays nor adapts it.
    Under Muon the filters of convolutions form one too: its peak rate is --lr-filters.
    A module that carries `constant_lr = True` keeps its peak rate whatever the schedule says (SimSiam's predictor).
    A group's rate at a step is group["peak_lr"] times the schedule's factor, or times 1 where group["constant"]."""
    constant = {id(p) for module in model.modules() if getattr(module, "constant_lr", False) for p in module.parameters()}
    groups = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            filters = args.optimizer == "muon" and parameter.dim() == 4
            groups.setdefault((id(parameter) in constant, parameter.dim() < 2, filters), []).append(parameter)
    groups = [{"params": parameters, "peak_lr": args.lr_filters if filters else args.lr_bias if one_dimensional else args.lr,
               "constant": fixed, "excluded": one_dimensional, "filters": filters}
              for (fixed, one_dimensional, filters), parameters in sorted(groups.items(), key=lambda item: item[0])]
    if args.optimizer == "adam":
        return torch.optim.Adam(groups, lr=args.lr, weight_decay=args.weight_decay, fused=True)
    if args.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=args.lr, momentum=0.9, weight_decay=args.weight_decay, fused=True)
    if args.optimizer == "lars":
        return LARS(groups, lr=args.lr, weight_decay=args.weight_decay)
    return Muon(groups, lr=args.lr, weight_decay=args.weight_decay, dtype=torch.bfloat16 if args.precision == "bf16" else torch.float32)


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose step is scaled layer by layer (You et al. 2017, arXiv 1708.03888), as Barlow Twins, VICReg and BYOL use it:

        update = gradient + weight_decay * w;   update *= trust * |w| / |update|  (1 where either norm is 0)
        velocity = momentum * velocity + update;   w -= lr * velocity

    Groups marked "excluded" (biases, norm layers) get neither weight decay nor scaling."""

    def __init__(self, params, lr, weight_decay=0.0, momentum=0.9, trust=0.001):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "trust": trust, "excluded": False})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for w in group["params"]:
                if w.grad is None:
                    continue
                update = w.grad
                if not group["excluded"]:
                    update = update + group["weight_decay"] * w
                    norm, update_norm = w.norm(), update.norm()
                    ratio = group["trust"] * norm / update_norm
                    update = update * torch.where((norm > 0) & (update_norm > 0), ratio, torch.ones_like(ratio))
                if "velocity" not in self.state[w]:
                    self.state[w]["velocity"] = torch.zeros_like(w)
                velocity = self.state[w]["velocity"]
                velocity.mul_(group["momentum"]).add_(update)
                w.add_(velocity * -group["lr"])


class Muon(torch.optim.Adam):
    """Adam; but groups marked "filters" take steps along orthogonal directions, as the fastest trainings on CIFAR-10 do (Jordan et al. 2024,
    kellerjordan.github.io/posts/muon). With one row of w for each filter:

        average = momentum * average + (1 - momentum) * gradient;   U = orthogonalise(momentum * average + (1 - momentum) * gradient)
        w *= sqrt(filters) / |w|;   w -= lr * U

    A norm layer follows every convolution here and hears only the direction of a filter. Hence their length can be kept, and lr is
    about the part of its length that a filter moves, throughout the training. No weight decay: it would act on the length. Momentum, the three
    iterations and the kept length are those of the authors' CIFAR-10 code (airbench94_muon); the default lr is ours, for batches of 128."""

    def __init__(self, params, lr, weight_decay=0.0, momentum=0.6, dtype=torch.float32):
        super().__init__(params, lr=lr, weight_decay=weight_decay, fused=True)
        self.momentum, self.dtype = momentum, dtype

    @torch.no_grad()
    def step(self):
        gradients = {}
        for group in self.param_groups:
            for w in group["params"] if group["filters"] else ():
                if w.grad is None:
                    continue
                state = self.state[w]
                if not state:
                    state["step"] = torch.zeros(())  # which Adam expects to find when a checkpoint is loaded
                    state["average"] = torch.zeros_like(w)
                state["average"].lerp_(w.grad, 1 - self.momentum)
                update = w.grad.lerp(state["average"], self.momentum).flatten(1)  # [filters, channels * height * width]
                w.mul_(math.sqrt(len(w)) / w.norm().clamp_min(1e-7))
                w.sub_(group["lr"] * orthogonalise(update.to(self.dtype)).view(w.shape))
                gradients[w], w.grad = w.grad, None  # so that Adam passes this one over
        super().step()
        for w, gradient in gradients.items():
            w.grad = gradient  # which the run's watch has yet to look at


def orthogonalise(m, iterations=3):
    """[r, c] -> [r, c]: roughly U V^T where m = U S V^T, by matrix products only (Newton-Schulz; coefficients of Jordan et al. 2024).

    Three iterations take every singular value above a fiftieth of |m| to between 0.68 and 1.21."""
    x = m.T if len(m) > m.shape[1] else m
    x = x / x.norm().clamp_min(1e-7)  # singular values at most 1
    gram = x @ x.T
    product = identity = torch.eye(len(x), dtype=x.dtype, device=x.device)
    for _ in range(iterations):
        factor = 3.4445 * identity - 4.7750 * gram + 2.0315 * gram @ gram
        gram = factor @ gram @ factor  # that of factor @ x, whose singular values are 3.4445 s - 4.7750 s^3 + 2.0315 s^5
        product = factor @ product
    x = product @ x  # once, at the end: the iterations above need the small matrices only
    return x.T if len(m) > m.shape[1] else x


# ==============================================================================
# 8. Measuring: kNN and collapse
# ==============================================================================


def knn_accuracy(bank, bank_labels, queries, query_labels, k=20, temperature=0.07):
    """Fraction (0 ... 1) of the queries [M, d] that their k nearest neighbours in the bank [N, d] name rightly.

    With a temperature: cosine similarity, each neighbour votes with weight exp(cos / temperature) (Wu et al. 2018, arXiv
    1805.01978). With temperature=None: plain Euclidean distance and one vote each, a tie goes to the smallest label (W-MSE code)."""
    k = min(k, len(bank))
    classes = int(max(bank_labels.max(), query_labels.max())) + 1
    bank, queries = bank.float(), queries.float()
    if temperature is not None:
        bank, queries = F.normalize(bank, dim=1), F.normalize(queries, dim=1)
    squares = bank.square().sum(1) if temperature is None else None
    correct = 0
    for rows, labels in zip(queries.split(1000), query_labels.split(1000)):
        if temperature is None:
            similarity = 2 * rows @ bank.T - squares  # minus the squared distance, up to |row|^2
        else:
            similarity = rows @ bank.T  # [m, N]
        nearest, index = similarity.topk(k, dim=1)
        weights = torch.ones_like(nearest) if temperature is None else ((nearest - nearest[:, :1]) / temperature).exp()
        votes = torch.zeros(len(rows), classes, device=rows.device).scatter_add_(1, bank_labels[index], weights)
        correct += (votes.argmax(1) == labels).sum()  # argmax: the first of equal maxima
    return float(correct) / len(queries)


def collapse_metrics(z, eps=1e-4):
    """How much of its space a set of embeddings z [N, d] fills. Returns a dict of floats, computed in float64:

    dim              dimensions that N rows can fill, min(d, N - 1)
    std_sqrt_d       mean over channels of the standard deviation of the l2-normalised rows, times sqrt(d): 1 if isotropic, 0 if constant (SimSiam)
    rank             singular values of centred z above max(N, d) * 2^-23 * the largest of z itself (float32's resolution)
    rank_1pct        singular values above a hundredth of the largest
    stable_rank      (sum of s) / s_1, the "stable-rank" of the CW-RGP paper (Definition 1)
    stable_rank_sq   (sum of s^2) / s_1^2, the usual stable rank
    rankme           exp(entropy of s / sum s), of z NOT centred (Garrido et al. 2023, arXiv 2210.02885): 1 if constant
    corr             mean absolute correlation of two different channels; constant channels count as fully correlated
    entropy          1/2 log det(2 pi e (covariance + eps I)), the entropy of a Gaussian, in nats"""
    z = z.detach().double().cpu()
    check(z.isfinite().all(), "the network's output in eval mode is not finite: the weights diverged; try a smaller --lr or a longer --warmup")
    n, d = z.shape
    unit = F.normalize(z, dim=1)
    centred = z - z.mean(0)
    s = torch.linalg.svdvals(centred)
    p = torch.linalg.svdvals(z)
    floor = max(n, d) * 2.0**-23 * p[0]  # what is left of a constant after centring is rounding, not rank
    s = torch.where(s > floor, s, 0.0)
    largest = s[0].clamp_min(1e-300)
    p = p / p.sum().clamp_min(1e-300) + 1e-7
    covariance = centred.T @ centred / max(1, n - 1)
    std = covariance.diagonal().sqrt()
    live = std > 1e-7 * std.max().clamp_min(1e-300)
    correlation = (covariance / (std[:, None] * std).clamp_min(1e-300)).abs()
    correlation = torch.where(live[:, None] & live, correlation, 1.0)
    off_diagonal = (correlation.sum() - correlation.diagonal().sum()) / max(1, d * (d - 1))
    entropy = 0.5 * torch.linalg.slogdet(2 * math.pi * math.e * (covariance + eps * torch.eye(d, dtype=z.dtype)))[1]
    figures = {
        "dim": min(d, max(1, n - 1)),
        "std_sqrt_d": unit.std(0, unbiased=False).mean() * math.sqrt(d),
        "rank": (s > 0).sum(),
        "rank_1pct": (s > 0.01 * largest).sum(),
        "stable_rank": s.sum() / largest,
        "stable_rank_sq": (s / largest).square().sum(),
        "rankme": (-(p * p.log()).sum()).exp(),
        "corr": off_diagonal,
        "entropy": entropy,
    }
    return {name: float(value) for name, value in figures.items()}


def collapse_in_words(figures, dim):
    """A sentence if the figures of `collapse_metrics` show a collapse, else an empty string.

    The limits lie between the default runs of the nine on `patterns` (two seeds: std x sqrt(d) 0.60 or more, stable rank 1.10, rank 5) and
    their switched-off versions (std below 0.1, or stable rank 1.03 or less, or rank at most 4)."""
    if figures["std_sqrt_d"] < 0.1:
        return f"COLLAPSE: all embeddings are nearly one point (std x sqrt(d) = {figures['std_sqrt_d']:.3f}, healthy: near 1)"
    if figures["stable_rank_sq"] < 1.1 or figures["rank_1pct"] < min(5, dim / 2):
        return (f"DIMENSIONAL COLLAPSE: the embeddings fill few of their {dim:.0f} dimensions "
                f"(rank {figures['rank_1pct']:.0f}, stable rank {figures['stable_rank_sq']:.2f})")
    return ""


@torch.no_grad()
def extract(network, data, images, precision="fp32", batch_size=None):
    """network(x) in eval mode for all images (uint8 [N, 3, H, W] or Files) -> float32 [N, d] on the data's device.

    Under torchrun every process takes its share and all get the whole; each image is seen once. Images pass `batch_size` at a time:
    500 up to 64 pixels, fewer of larger ones (224 pixels: 41), lest measuring need more memory than training."""
    batch_size = batch_size or max(1, min(500, 2**21 // data.size**2))
    was_training = network.training
    network.eval()
    share = -(-len(images) // world_size())  # rounded up; the last share is filled up with the last image
    index = torch.arange(rank() * share, (rank() + 1) * share).clamp(max=len(images) - 1)
    outputs = []
    for x in data.eval_views(images, index, batch_size):
        with torch.autocast(data.device.type, torch.bfloat16, enabled=precision == "bf16"):
            outputs.append(network(x).float())
    network.train(was_training)
    outputs = torch.cat(outputs)
    return (GatherRows.apply(outputs) if dist.is_initialized() else outputs)[: len(images)]


def project(projector, h, precision="fp32"):
    """Z = projector(H) in eval mode, [N, feature_dim] -> [N, d] float32."""
    was_training = projector.training
    projector.eval()
    with torch.no_grad(), torch.autocast(h.device.type, torch.bfloat16, enabled=precision == "bf16"):
        z = torch.cat([projector(part).float() for part in h.split(1000)])
    projector.train(was_training)
    return z


# ==============================================================================
# 9. The run folder
# ==============================================================================

CHECKPOINT_FORMAT = "nine-ssl-methods-2"
# Flags that a resumed run may change: they do not touch the numbers, but for the rounding (compile) or the permutations that a GPU draws (device).
FREE_ON_RESUME = {"epochs", "out", "resume", "device", "num_workers", "log_every", "save_every", "compile", "data_dir", "given"}


class Run:
    """Folder, checkpoints, metrics and the watch for non-finite numbers of one training."""

    def __init__(self, args, model, optimizer, data):
        self.args, self.model, self.optimizer, self.data = args, model, optimizer, data
        check(not data.must_be_cropped or all(any(op[0] == "crop" for op in view) for view in RECIPES[args.augment]),
              f"--augment {args.augment} does not crop, and the images are larger than --image-size {data.size}; try --augment crop-flip")
        self.total_steps = args.epochs * data.steps_per_epoch
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=data.device)  # of the epoch so far, on the device
        self.rows, self.seconds_before, self.started = [], 0.0, time.monotonic()
        self.last_is_good = True  # False after a resume from previous.pt, until the next save
        self.epoch_seconds_before, self.epoch_started = 0.0, time.monotonic()
        self.stop_signal = 0
        for number_ in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number_, self._on_signal)
        self.folder = self._open_folder()
        self._prepare_watch()

    # ---- folder --------------------------------------------------------------

    def _open_folder(self):
        args = self.args
        method = "-".join(filter(None, (args.method, args.experiment)))
        base = args.out or os.path.join("runs", f"{method}-{args.dataset}-s{args.seed}")
        candidates = [base] if args.out else [base] + [f"{base}-{i}" for i in range(2, 1000)]
        taken = [path for path in candidates if os.path.isfile(os.path.join(path, "last.pt")) or os.path.isfile(os.path.join(path, "previous.pt"))]
        if args.resume:
            folder = taken[-1] if taken else base
        else:
            check(not (args.out and taken), f"--out {base} already holds a run; add --resume to go on with it, or try --out {base}-2")
            folder = next(path for path in candidates if path not in taken)
        if rank() == 0:
            try:
                os.makedirs(folder, exist_ok=True)
                self.lock = open(os.path.join(folder, "lock"), "w")
            except OSError as error:
                raise UserError(f"--out {folder}: cannot write there ({error.strerror}); try another --out") from error
            check(lock_file(self.lock), f"--out {folder} is in use by another run; wait for it, or try another --out")
        if dist.is_initialized():
            box = [folder]
            dist.broadcast_object_list(box)
            folder = box[0]
        return folder

    def _config(self):
        return {**vars(self.args), "command": " ".join(sys.argv), "python": platform.python_version(), "torch": torch.__version__,
                "torchvision": torchvision.__version__, "numpy": np.__version__, "processor": processor_name(self.data.device),
                "threads": torch.get_num_threads(), "processes": world_size(), "git": git_revision()}

    def _on_signal(self, number_, _frame):
        self.stop_signal = number_
        if world_size() == 1:  # torchrun repeats the signal, and ends by force whoever does not leave within 30 seconds
            signal.signal(number_, signal.SIG_DFL)  # a second Ctrl-C ends at once

    # ---- checkpoints ---------------------------------------------------------

    def resume(self):
        """With --resume, load the last good checkpoint into model and optimizer. Returns the step to go on from; 0 afresh."""
        checkpoint = load_last(self.folder) if self.args.resume else None
        if checkpoint:
            self._check_same_run(checkpoint)
            self.last_is_good = checkpoint["file"] == "last.pt"
        steps = checkpoint["step"] if checkpoint else 0
        if dist.is_initialized() and self.args.resume:
            largest_smallest = torch.tensor([steps, -steps], device=self.data.device)
            dist.all_reduce(largest_smallest, dist.ReduceOp.MAX)
            check(largest_smallest.sum() == 0, f"--out {self.folder} must lie on a disk that all machines share")
        if rank() == 0:  # not before: a resume that is refused leaves the record as it was
            write_file(os.path.join(self.folder, "config.json"), json.dumps(self._config(), indent=1).encode())
        if checkpoint is None:
            if self.args.resume:
                say(f"no checkpoint in {self.folder}: starting afresh")
            return 0
        self.model.load_state_dict(checkpoint["model"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.loss_sum.copy_(checkpoint["loss_sum"])
        self.rows, self.seconds_before = checkpoint["rows"], checkpoint["seconds"]
        self.epoch_seconds_before = checkpoint["epoch_seconds"]
        if rank() == 0:
            self._write_metrics()  # rows after the checkpoint, or a line cut short, are gone: they will come again
        before = checkpoint["args"]["epochs"]
        longer = f"; {before} epochs before, {self.args.epochs} now, so the schedule is another" if before != self.args.epochs else ""
        say(f"going on with {self.folder} after step {steps} of {self.total_steps}{longer}")
        return steps

    def _check_same_run(self, checkpoint):
        before, now = checkpoint["args"], vars(self.args)
        names = ["/".join(filter(None, (a["method"], a["experiment"]))) for a in (before, now)]
        check(names[0] == names[1],
              f"--resume: {self.folder} is a run of {names[0]}, not of {names[1]}; try another --out")
        for name in sorted(set(now) - FREE_ON_RESUME):
            flag = "--" + name.replace("_", "-")
            given = before.get(name) is not None and before[name] is not False
            remedy = f"it without {flag}" if not given else f"it with {flag}" if before[name] is True else f"{flag} {before[name]}"
            check(before.get(name) == now[name], f"--resume: {flag} was {before.get(name)} and is now {now[name]}; "
                  f"try {remedy}, or another --out")
        check(checkpoint["data"] == self.data.fingerprint, f"--resume: --data-dir held {checkpoint['data']} and now holds {self.data.fingerprint}; "
              "restore it, or try another --out")
        check(checkpoint["step"] <= self.total_steps,
              f"--resume: --epochs {now['epochs']} is fewer than already trained; try --epochs {before['epochs']}")

    def save(self, step):
        """Write last.pt whole or not at all; the checkpoint before it stays as previous.pt."""
        self.check_finite()
        if rank() > 0:
            return
        buffer = io.BytesIO()
        torch.save({"format": CHECKPOINT_FORMAT, "args": vars(self.args), "step": step, "model": self.model.state_dict(),
                    "optimizer": self.optimizer.state_dict(), "loss_sum": self.loss_sum.cpu(), "rows": self.rows, "seconds": self.seconds(),
                    "epoch_seconds": self.epoch_seconds(), "data": self.data.fingerprint}, buffer)
        last = os.path.join(self.folder, "last.pt")
        write_file(last, buffer.getvalue(), keep_as=os.path.join(self.folder, "previous.pt") if self.last_is_good else None)
        self.last_is_good = True

    # ---- the watch -----------------------------------------------------------

    def _prepare_watch(self):
        """Remember in which step each output, the loss and each gradient was first not finite: on the device, without waiting for it."""
        self.outputs = {name: [] for name, _ in self.model.named_children()}

        def keep(name, module, output):
            if module.training:
                self.outputs[name].append(output.detach())

        for name, child in self.model.named_children():
            child.register_forward_hook(lambda module, _inputs, output, name=name: keep(name, module, output))
        self.gradients = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        self.watched = [f"the output of the {name}" for name in self.outputs] + ["the loss"]
        self.watched += [f"the gradient of {name}" for name, _ in self.gradients]
        self.first_bad = torch.full((len(self.watched),), 2**31 - 1, device=self.data.device, dtype=torch.int64)

    @torch.no_grad()
    def watch(self, step, loss):
        zero = torch.zeros((), device=self.data.device)
        values = [sum((output.float().sum() for output in outputs), zero) for outputs in self.outputs.values()]
        values += [loss.detach().float()] + [zero if p.grad is None else p.grad.norm().float() for _, p in self.gradients]
        self.first_bad = torch.where(torch.stack(values).isfinite(), self.first_bad, self.first_bad.clamp(max=step))
        self.loss_sum += loss.detach()
        for outputs in self.outputs.values():
            outputs.clear()

    def check_finite(self, agree=True):
        """Raise UserError if a watched number was not finite since the start. Waits for the device, and with `agree` for the other processes."""
        if agree and dist.is_initialized():
            dist.all_reduce(self.first_bad, dist.ReduceOp.MIN)  # all processes say the same
        first_bad = self.first_bad.tolist()
        if min(first_bad) < 2**31 - 1:
            self._stop_non_finite(min(first_bad), self.watched[first_bad.index(min(first_bad))])

    @contextlib.contextmanager
    def guard(self, step):
        """Turns an eigen-decomposition or Cholesky that fails into the same words as a non-finite number."""
        try:
            yield
        except torch.linalg.LinAlgError:
            self.check_finite(agree=False)  # of an earlier step; the other processes may not have failed here
            bad = [name for name, outputs in self.outputs.items() if not all(bool(o.isfinite().all()) for o in outputs)]
            self._stop_non_finite(step, f"the output of the {bad[0]}" if bad else "the whitening")

    def _stop_non_finite(self, step, what):
        cause = "the weights diverged or an input is not finite: try a smaller --lr or a longer --warmup"
        if what == "the loss" or what == "the whitening":
            cause = "embeddings that do not fill their space, or a learning rate too high: try --eps 1e-3 where there is one, or a smaller --lr"
        kept = "the last good checkpoint stays" if os.path.isfile(os.path.join(self.folder, "last.pt")) else "no checkpoint was written yet"
        raise UserError(f"step {step}: {what} is not finite; likely cause: {cause}; {self.folder}: {kept}")

    # ---- logging -------------------------------------------------------------

    def seconds(self):
        return self.seconds_before + time.monotonic() - self.started

    def epoch_seconds(self):
        return self.epoch_seconds_before + time.monotonic() - self.epoch_started

    def progress(self, step, loss):
        """Reads the loss (the loop's only wait for the device), stops on a non-finite number, refreshes the status line."""
        self.check_finite()
        if rank() == 0 and sys.stdout.isatty():
            say(f"\r{self._where(step)}  loss {loss.item():.4f}  {self._time_left(step)} left\033[K", end="")

    def should_stop(self, step):
        """True on all processes alike after SIGINT or SIGTERM; under torchrun they agree every --log-every steps."""
        if not dist.is_initialized():
            return self.stop_signal != 0
        if step % self.args.log_every:
            return False
        flag = torch.tensor(self.stop_signal, device=self.data.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        self.stop_signal = int(flag)
        return self.stop_signal != 0

    def save_if_due(self, step):
        """Inside an epoch: a checkpoint every --save-every steps, and after SIGINT or SIGTERM, which then end the run."""
        stop = self.should_stop(step)
        if stop or (self.args.save_every > 0 and step % self.args.save_every == 0):
            self.save(step)
        if stop:
            self._leave(step)

    def _leave(self, step):
        if dist.is_initialized():
            dist.barrier()  # until rank 0 has saved: torchrun ends all when the first one leaves
        out = f" --out {self.args.out}" if self.args.out else ""
        say(f"{self._clear()}stopped after step {step} of {self.total_steps}; go on with --resume{out}")
        sys.exit(128 + self.stop_signal)

    def mean_loss(self):
        """Mean loss of the epoch, read after its last step; the clock for images/s stops here. Waits for the device."""
        self.check_finite()  # before anything is measured with these weights
        mean = self.loss_sum.item() / self.data.steps_per_epoch
        self.training_seconds = self.epoch_seconds()
        return mean

    def end_epoch(self, step, row):
        """Complete and keep the epoch's row, write metrics.csv and last.pt, print a line; leave if a signal came."""
        seconds = self.epoch_seconds()
        row.update(images_per_s=round(self.data.steps_per_epoch * self.args.batch_size / self.training_seconds, 1), seconds=round(self.seconds(), 1))
        self.rows.append(row)
        self.loss_sum.zero_()
        self.epoch_seconds_before, self.epoch_started = 0.0, time.monotonic()
        self.save(step)
        if rank() == 0:
            self._write_metrics()
        knn = f"  kNN {100 * row['knn']:5.2f} %" if row["knn"] != "" else ""
        health = f"  std*sqrt(d) {row['std_sqrt_d']:.2f}  rank {row['rank_1pct']:.0f}" if "rank" in row else ""
        left = format_seconds((self.total_steps - step) * seconds / self.data.steps_per_epoch)
        say(f"{self._clear()}{self._where(step)}  loss {row['loss']:.4f}{knn}{health}  {row['images_per_s']:.0f} images/s  {left} left")
        collapse = collapse_in_words(row, row["dim"]) if "rank" in row else ""
        if collapse:
            say(collapse)
        self.epoch_started = time.monotonic()  # the next epoch's images/s are without this one's checkpoint
        if self.should_stop(step * self.args.log_every) and step < self.total_steps:
            self._leave(step)

    def save_backbone(self):
        """backbone.pt: the backbone's weights alone, in torchvision's own names. All is saved now: from here on Ctrl-C ends at once."""
        for number_ in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number_, signal.SIG_DFL)
        if rank() == 0:
            buffer = io.BytesIO()
            torch.save(self.model.backbone.state_dict(), buffer)
            write_file(os.path.join(self.folder, "backbone.pt"), buffer.getvalue())

    def close(self, scores):
        """The last lines: kNN accuracies by name, with the protocol, and where everything lies."""
        data = self.data
        if scores:
            first, *others = (f"{name} {100 * score:.2f} %" for name, score in scores.items())
            say(f"{first}  ({', '.join(others)}; k = 20, cosine, T = 0.07, "
                f"{len(data.test)} test images against {len(data.large_bank)} training images)")
        else:
            say("no labelled training and test images, so no kNN; the collapse figures are in metrics.csv")
        say(f"{self.folder}: config.json metrics.csv last.pt backbone.pt  ({format_seconds(self.seconds())})")

    def _clear(self):
        return "\r\033[K" if sys.stdout.isatty() else ""

    def _where(self, step):
        epoch = (step - 1) // self.data.steps_per_epoch + 1
        return f"epoch {epoch:{len(str(self.args.epochs))}}/{self.args.epochs}  step {step}/{self.total_steps}"

    def _time_left(self, step):
        done = step - (step - 1) // self.data.steps_per_epoch * self.data.steps_per_epoch
        return format_seconds((self.total_steps - step) * self.epoch_seconds() / done)

    def _write_metrics(self):
        timing = ["images_per_s", "seconds"]  # the last two columns: all others are the same in every run of a seed
        names = list(dict.fromkeys(name for row in self.rows for name in row if name not in timing)) + timing
        text = io.StringIO()
        writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_file(os.path.join(self.folder, "metrics.csv"), text.getvalue().encode())


def write_file(path, content, keep_as=None):
    """Write bytes to a temporary name, flush them to the disk, rename. A full disk leaves the old file as it was. Raises UserError."""
    temporary = path + ".tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if keep_as and os.path.exists(path):
            os.replace(path, keep_as)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        with contextlib.suppress(OSError):
            if keep_as and not os.path.exists(path):
                os.replace(keep_as, path)
        raise UserError(f"{path} could not be written ({error.strerror}); what was there before stays; "
                        "make room there or try another place") from error


def load_last(folder):
    """The newest readable checkpoint of a run folder, its name under "file", or None. A damaged one is named and the one before it used."""
    faults = []
    for name in ("last.pt", "previous.pt"):
        path = os.path.join(folder, name)
        if os.path.exists(path):
            try:
                checkpoint = load_checkpoint(path)
                if faults:
                    warn(f"{faults[0]}; using {path} (step {checkpoint['step']}) instead")
                return {**checkpoint, "file": name}
            except UserError as error:
                faults.append(str(error))
    check(not faults, (faults or [""])[0] + "; no older checkpoint is readable: train again with another --out")
    return None


def load_checkpoint(path):
    """A checkpoint of ours as a dict; nothing in the file is executed (weights_only). Raises UserError that names the fault."""
    check(os.path.isfile(path), f"{path}: no such file; try runs/<run>/last.pt")
    try:
        with zipfile.ZipFile(path) as archive:  # torch's own reader does not compare the checksums
            damaged = archive.testzip()
        check(damaged is None, f"{path} is damaged ({damaged})")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    except Exception as error:  # truncated, not a zip file, or a pickle with more than tensors: torch raises many kinds
        raise UserError(f"{path} is not a checkpoint of these scripts, or is cut short ({type(error).__name__})") from error
    check(isinstance(checkpoint, dict) and checkpoint.get("format") == CHECKPOINT_FORMAT,
          f"{path} is not a checkpoint of these scripts; try runs/<run>/last.pt")
    return checkpoint


def lock_file(file):
    """True if this process now holds the file; the lock goes with the process, however it ends, and is not its children's."""
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:
        return False


def processor_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        with open("/proc/cpuinfo") as file:
            return next((line.split(":")[1].strip() for line in file if line.startswith("model name")), platform.processor())
    return platform.processor()


def git_revision():
    """Revision of the scripts, if they lie in a git repository, else an empty string."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        here = os.path.dirname(os.path.abspath(__file__))
        return subprocess.run(["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10).stdout.strip()
    return ""


def format_seconds(seconds):
    seconds = int(seconds)
    return f"{seconds // 3600}h{seconds // 60 % 60:02d}m" if seconds >= 3600 else f"{seconds // 60}m{seconds % 60:02d}s"
