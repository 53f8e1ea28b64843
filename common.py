"""Everything that the nine method files share and that is not one method's idea.

To borrow a method, copy its file and this one into a folder of your own.

Part I is what train() and the models call, in the order of the calls, except that a class stays in
one piece. Part II is the rest. A default run enters it, too: command line, messages, files, Muon.
"""

# ==== Contents ====
#
# Part I, what a method file calls:
#
#    118  flag               a field of Args: default, help, bounds
#    128  Args               the flags that all nine methods share
#    210  world_size         the number of processes (MoCo)
#    215  rank               this process's number among them (MoCo)
#    224  gives_back         signal handlers, lock and processes, when train() ends
#    247  set_up             device, precision, other processes
#    271  load_data          read or draw the data set: Data
#    520  build_backbone     the network whose output is H
#    570  build_optimizer    Adam, SGD, LARS or Muon
#    609  Run                the run's folder, checkpoints, log and checks
#    845  distribute         the model for several processes, or compiled
#    632  Run.resume         the step to start from, usually 0
#    343  Data.batches       the batches of an epoch, uint8
#    860  step_seed          the seed of a step's random draws
#    358  Data.augment       the random views of a batch
#   1129  learning_rate      the schedule's factor at a step
#    649  Run.guard          a failed decomposition becomes a clear error
#   1145  gather             embeddings of all processes, with gradient
#    653  Run.watch          note whether loss and gradients are finite
#    660  Run.progress       stop if they were not; show the status line
#    671  Run.save_if_due    a checkpoint inside an epoch, or after Ctrl-C
#    679  Run.mean_loss      the mean loss of the epoch
#   1159  extract            H of a set of images
#   1180  project            Z of H
#   1191  collapse_metrics   how much of its space a set of embeddings fills
#   1262  knn_accuracy       accuracy of a vote among the nearest training images
#    688  Run.end_epoch      write metrics.csv and last.pt, print a line
#    730  Run.save_backbone  write backbone.pt
#    738  Run.close          print the scores
#
# Part II, the three names of it that a method file calls, and its sections:
#
#   1738  main               run train(); print an expected error as one line
#   1412  parse_args         Args from the command line
#   1913  mean_over_ranks    the mean of a tensor over the processes (MoCo)
#
#   1337  Command line: flags from Args, checks, and sizes to propose
#   1634  Messages and errors
#   1810  Several processes
#   1953  Data sets by name
#   2026  Folders of images
#   2410  Streaming
#   2519  Recipes of augmentation
#   2587  ResNets, Vision Transformer, LARS, Muon
#   2758  Run folder and signals
#   2930  Resume
#   3048  Files of a run
#   3126  Trained weights

import argparse
import collections
import contextlib
import copy
import csv
import dataclasses
import datetime
import functools
import hashlib
import io
import itertools
import json
import math
import multiprocessing.pool
import operator
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import typing
import warnings
import zlib

# A thread that waits for the others should not keep its core busy: another program may need it.
# The OpenMP runtimes read these when torch loads them. A setting of your own wins.
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & set(os.environ):
    os.environ["GOMP_SPINCOUNT"] = "1000"  # GNU's runtime: turns of a loop
    os.environ["KMP_BLOCKTIME"] = "1"  # LLVM's and Intel's: milliseconds

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.nn as nn  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import torchvision  # noqa: E402
from PIL import Image, ImageOps  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_map_only  # noqa: E402
from torchvision.transforms.v2 import functional  # noqa: E402

# ==============================================================================
# Part I: what a method file calls
# ==============================================================================

# ==== Flags ====

DATASETS = ("patterns", "cifar10", "cifar100", "stl10", "tinyimagenet", "folder")


def flag(default, help, least=None, most=None, above=None, below=None, choices=None, example=None):
    """A field of Args with a help text and bounds; `above` and `below` are exclusive.

    choices: the allowed words, in one string. example: the value that a message proposes."""
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
    test_fraction: float = flag(0.2, "share of each class of a folder without test images that is "
                                "held out for kNN, never trained on", least=0, below=1)
    train_images: int | None = flag(None, "train on N evenly spaced images only (default: all)",
                                    least=2, example=1000)
    image_size: int | None = flag(None, "side of a view in pixels (default: that of the images, "
                                  "at most 64)", least=8, most=1024, example=32)
    augment: str = flag("w-mse", "recipe of the random views; common.RECIPES explains them")
    views: int = flag(2, "views of each image", least=2, most=16)

    backbone: str = flag("tiny", "`tiny`, `vit_tiny`, or a torchvision ResNet by name, such "
                         "as resnet18")
    init: str | None = flag(None, "weights to start the backbone from: last.pt or backbone.pt of a "
                            "run, or torchvision's file")
    proj_hidden: int = flag(1024, "width of the hidden layers of the projector (BYOL: and of the "
                            "predictor)", least=1, most=2**14)
    proj_dim: int = flag(128, "d, channels of the embedding Z, the projector's output", least=2)
    proj_layers: int = flag(2, "linear layers of the projector", least=1, most=8)

    epochs: int = flag(10, "passes over the training images", least=1, most=10**6)
    batch_size: int = flag(256, "images in a step, in all processes together", least=2)
    optimizer: str | None = flag(None, "muon is Muon for the filters of convolutions and Adam for "
                                 "the rest; sgd and lars have momentum 0.9 (default: muon for the "
                                 "backbone tiny, else adam)", choices="adam sgd lars muon")
    lr: float = flag(3e-3, "peak learning rate, not scaled by the batch size", above=0, most=10**4)
    lr_bias: float | None = flag(None, "peak learning rate of biases and norm layers "
                                 "(default: --lr)", above=0, most=10**4, example=3e-3)
    lr_filters: float | None = flag(None, "peak learning rate of the filters of convolutions with "
                                    "Muon (default: 0.1)", above=0, most=10**4,
                                    example=0.1)
    weight_decay: float = flag(1e-6, "weight of the L2 penalty; lars leaves out biases and norm "
                               "layers, muon the filters", least=0, most=100)
    warmup: int | None = flag(None, "steps in which the learning rate rises (default: a tenth of "
                              "the run, at most 500)", least=0, most=10**9, example=500)
    schedule: str = flag("cosine", "how the rate falls; `step`: to a fifth when 50 epochs are "
                         "left, and again when 25 are", choices="cosine step constant")
    seed: int = flag(0, "number that all random draws follow from", least=0,
                     most=2**31 - 1)

    out: str | None = flag(None, "folder of the run (default: runs/METHOD-DATASET-sSEED, with -2, "
                           "-3, ... if it is taken)")
    resume: bool = flag(False, "go on from the last checkpoint in the run folder, if there is one")
    eval_every: int = flag(1, "epochs between two measurements of kNN and collapse; 0: at the end",
                           least=0)
    save_every: int = flag(0, "steps between two extra checkpoints inside an epoch; 0: none",
                           least=0, example=100)
    keep_every: int = flag(0, "epochs between two checkpoints that stay, as epoch-0010.pt; 0: none",
                           least=0, example=10)
    log_every: int = flag(10, "steps between two looks at the loss, which wait for the device",
                          least=1)

    device: str = flag("auto", "`auto` takes a GPU if there is one",
                       choices="auto cpu cuda mps xpu")
    precision: str = flag("auto", "precision of the networks; `auto` takes bf16 if the processor "
                          "has it. The loss is always computed in fp32", choices="auto fp32 bf16")
    compile: bool = flag(False, "compile the backbones with torch.compile")
    stream: bool = flag(False, "read images from disk in each epoch, even if they fit in memory")
    num_workers: int = flag(2, "processes that read images from disk", least=0, most=256)

    def rules(self):
        """What a method demands of the sizes: pairs of a condition and what to say if it fails."""
        return ()

    def __post_init__(self):
        check_args(self)


# ==== Start and end of train() ====


def world_size():
    """The number of processes: torchrun's, or those of a program's group."""
    return from_environment("WORLD_SIZE", dist.get_world_size() if dist.is_initialized() else 1)


def rank():
    """This process's number, from 0."""
    return from_environment("RANK", dist.get_rank() if dist.is_initialized() else 0)


TRAINING = threading.RLock()  # one train() at a time: the random draws of two would mix
ENDINGS = []  # an ExitStack of the train() that runs


def gives_back(train):
    """Decorates train(): however it ends, the functions given to at_end() are called."""

    @functools.wraps(train)
    def train_alone(*args, **more):
        kind = train.__globals__.get("Args")
        if kind:
            check_kind(more.get("args", *args[:1]), kind)
        with TRAINING, contextlib.ExitStack() as ending:
            ENDINGS.append(ending)
            ending.callback(ENDINGS.pop)
            plain_torch(ending)
            return train(*args, **more)

    return train_alone


def at_end(function):
    """Call function() when train() ends."""
    for ending in ENDINGS[-1:]:
        ending.callback(function)


def set_up(args):
    """Choose the device and join the other processes.

    Returns a copy of args in which precision, optimizer and rates are filled in, and the
    torch.device. Raises UserError if there is no such device."""
    if isinstance(args, Args):  # not eval.py's
        args = copy.copy(args)
        check_args(args)  # a program may have changed them
    check(args.device != "cuda" or torch.cuda.is_available(),
          "--device cuda: torch finds no GPU that it can use; try --device cpu")
    if args.device in ("auto", "cuda") and torch.cuda.is_available():
        device = set_up_gpu()
    else:
        device = other_device(args.device)
    if world_size() > 1 and not dist.is_initialized():
        join_processes(device)
    return completed(args, device), device


# ==== Data: uint8 images ====

DEFAULT_IMAGE_SIZE = {"stl10": 64, "tinyimagenet": 64, "folder": None}  # others: 32


def load_data(args, device, statistics=None):
    """Read or draw the data set of --dataset. Sets args.image_size if the flag was not given.

    statistics: Data.statistics of a run whose scale of pixels is to be kept. Returns Data. Raises
    UserError if there are no usable images or a download fails."""
    args.image_size = args.image_size or DEFAULT_IMAGE_SIZE.get(args.dataset, 32)
    if args.dataset == "patterns":
        train, labels, test, test_labels = make_patterns()
        data = Data(args, device, train=train, labels=labels, test=test, test_labels=test_labels,
                    class_names=PATTERN_CLASSES)
    elif args.dataset == "folder":
        data = load_folder(args, device, args.data_dir, statistics)
    else:
        data = load_by_name(args, device)
    say(found_in_words(data))
    return data


class Data:
    """A data set, ready for training and measuring.

    train            images to train on: uint8 [N, 3, H, W] on the device, or `Files` if too many
    images_found     their number without --train-images
    labelled_train   all but stl10's unlabelled; train_labels, int64 or None
    test             test images, or the labelled training images if there are none
    test_labels      int64 [M] or None
    labelled         True if training and test images have labels, for kNN
    bank, queries    at most 5000 training and 1000 test images, for the kNN after an epoch
    large_bank       at most 100,000 training images, for the kNN at the end
    size             side of a view in pixels
    must_be_cropped  True if images in memory have another size
    mean, std        of the colours in 0 ... 1, float32 [3, 1, 1] on the device
    statistics       what the network needs: mean, std, scale (see survey), size,
                     class_names; of a folder also side, the pixels of its squares
    test_note, notes for the first line on the screen
    files            names of the files of training and test images, or None
    fingerprint      tells whether a resumed run has the same images"""

    def __init__(self, args, device, train, labels, test, test_labels, class_names,
                 unlabeled=None):
        """Images: uint8 [N, 3, H, W] or Files. Labels: N whole numbers or None. Raises UserError
        if a batch is larger than the data set."""
        self.args, self.device, self.size = args, device, args.image_size
        self.class_names = class_names
        self.fingerprint = f"{len(train)} training images"
        everything = train if unlabeled is None else np.concatenate([train, unlabeled])
        everything = place(everything, device)
        self.images_found = len(everything)
        self.train, _ = evenly_spaced(everything, None, args.train_images or len(everything))
        self.labelled_train = everything if unlabeled is None else everything[: len(train)]
        self.train_labels = place_labels(labels, device)
        self.test = self.labelled_train if test is None else place(test, device)
        self.test_labels = place_labels(test_labels, device)
        self.labelled = self.train_labels is not None and self.test_labels is not None
        training = self.labelled_train, self.train_labels
        self.bank, self.bank_labels = evenly_spaced(*training, 5000)
        self.queries, self.query_labels = evenly_spaced(self.test, self.test_labels, 1000)
        self.large_bank, self.large_bank_labels = evenly_spaced(*training, 100_000)
        mean, std = (COLOUR_STATISTICS.get(args.dataset)
                     or colour_statistics(everything, args.num_workers))
        self.mean, self.std = (torch.tensor(x, dtype=torch.float32, device=device).view(3, 1, 1)
                               for x in (mean, std))
        self.statistics = {"mean": list(mean), "std": list(std), "scale": None, "size": self.size,
                           "class_names": list(class_names)}
        self.test_note, self.notes, self.files = "", "", None
        self.steps_per_epoch = len(self.train) // args.batch_size
        self.must_be_cropped = (not isinstance(self.train, Files)
                                and self.train.shape[2:] != (self.size, self.size))
        if self.steps_per_epoch == 0:
            args.images = len(self.train)
            check_rules(args)

    def batches(self, epoch, first=0):
        """This process's rows of each global batch of an epoch, from batch `first` on.

        Yields uint8 [n, 3, H, W], or lists of cropped views from Files. The order is a function of
        (seed, epoch). The last, incomplete batch is left out."""
        order = np.random.default_rng((self.args.seed, 1, epoch)).permutation(len(self.train))
        order = torch.from_numpy(order[: self.steps_per_epoch * self.args.batch_size])
        mine = order.view(self.steps_per_epoch, world_size(), -1)[first:, rank()]
        if isinstance(self.train, Files):
            first_step = epoch * self.steps_per_epoch + first
            yield from self.train.crops(mine, self.args, first_step, self.device)
        else:
            for index in mine.to(self.device, non_blocking=True):
                yield self.train[index]

    def augment(self, batch, step):
        """The random views of a batch: a list of float32 [n, 3, size, size]."""
        args = self.args
        return augment(batch, args.augment, args.views, self.size, mean=self.mean, std=self.std,
                       seed=args.seed, step=step, rank=rank(), world_size=world_size())

    def eval_views(self, images, index, batch_size):
        """images[index] without randomness, normalised: yields float32 [n, 3, size, size]."""
        for x in parts_of(images, index, batch_size, self.args.num_workers):
            x = centre_view(x.to(self.device).float() / 255, self.size)
            yield channels_last((x - self.mean) / self.std)


def place(images, device):
    """uint8 [N, 3, H, W], numpy or torch -> a tensor on the device. Files stay as they are."""
    if isinstance(images, Files):
        images.pin_memory = device.type == "cuda"
        return images
    return torch.as_tensor(images).to(device).contiguous()


def place_labels(labels, device):
    """N whole numbers -> int64 [N] on the device. None stays."""
    return None if labels is None else torch.as_tensor(labels, device=device).long()


def evenly_spaced(images, labels, count):
    """At most `count` evenly spaced images and their labels; not copied if they are all."""
    if len(images) <= count:
        return images, labels
    index = torch.arange(count) * (len(images) - 1) // max(1, count - 1)
    part = images.part(index) if isinstance(images, Files) else images[index.to(images.device)]
    return part, None if labels is None else labels[index.to(labels.device)]


def parts_of(images, index, batch_size, num_workers):
    """images[index] in batches, uint8 [n, 3, H, W], of Files their centres."""
    if isinstance(images, Files):
        return images.centres(index, batch_size, num_workers)
    check_images(images)
    return (images[i.to(images.device)] for i in index.split(batch_size))


def centre_view(x, size):
    """The centre of images, resized with antialiasing: [n, 3, H, W] -> [n, 3, size, size].

    Of a larger image it takes the middle 7/8, as ImageNet evaluation does (224 of 256 pixels)."""
    height, width = x.shape[-2:]
    if (height, width) == (size, size):
        return x
    side = min(height, width)
    if side > size:
        side = round(side * 7 / 8)
    top, left = (height - side) // 2, (width - side) // 2
    square = x[:, :, top:top + side, left:left + side]
    return F.interpolate(square, (size, size), mode="bilinear", antialias=True)


def colour_statistics(images, num_workers=0):
    """Mean and standard deviation per channel, in 0 ... 1, of at most 5000 evenly spaced images.

    images: uint8 [N, 3, H, W] or Files. Returns two lists of three floats."""
    index = torch.arange(0, len(images), -(-len(images) // 5000))
    mean, square = 0, 0
    for part in parts_of(images, index, 100, num_workers):
        x = part.cpu().double().div_(255)
        mean = mean + x.mean((0, 2, 3)) * len(x)
        square = square + x.square_().mean((0, 2, 3)) * len(x)
    mean, square = mean / len(index), square / len(index)
    return mean.tolist(), (square - mean.square()).clamp_min(1e-6).sqrt().tolist()


# ==== Patterns ====

PATTERN_CLASSES = ["stripes", "checks", "dots", "bricks", "zigzag", "grid", "rings", "triangles",
                   "weave", "crosses"]


def make_patterns(seed=0, train=10_000, test=2_000):
    """Textures in two colours, ten classes, the same bytes everywhere.

    Returns train images uint8 [N, 3, 32, 32], their labels int64 [N], test images, test labels.

    Only the texture tells the class. Period, phase, tilt, warp, light and noise have the same
    distribution in all classes, and half of every image is ink. All images have nearly the same
    two colours, and the light changes several times across an image. Otherwise a network can learn
    a hue or a bright side, which survive the augmentation, in place of the texture."""
    rng = np.random.default_rng(seed)
    labels = np.arange(train + test) % 10  # balanced; each split is then shuffled by itself
    train_labels = labels[:train][np.argsort(rng.random(train))]
    test_labels = labels[train:][np.argsort(rng.random(test))]
    labels = np.concatenate([train_labels, test_labels])
    images = np.empty((train + test, 3, 32, 32), np.uint8)
    for k, name in enumerate(PATTERN_CLASSES):
        rows = np.flatnonzero(labels == k)
        images[rows] = draw_patterns(name, len(rows), rng)
    return images[:train], train_labels, images[train:], test_labels


def draw_patterns(name, count, rng):
    """`count` random images of one class: float64 [count, 3, 32, 32], rounded, in 0 ... 255."""
    def uniform(low, high, shape=(1, 1)):
        return low + (high - low) * rng.random((count, *shape))

    x = np.arange(32) / 16 - 31 / 32  # pixel centres, in (-1, 1)
    y = x[:, None]
    # Coordinates (u, v) that count periods: bent by a smooth warp, turned, scaled and shifted.
    warped_x = x + uniform(.1, .2) * np.sin(uniform(2, 4) * y + uniform(0, 6.3))
    warped_y = y + uniform(.1, .2) * np.sin(uniform(2, 4) * x + uniform(0, 6.3))
    tilt = uniform(-.3, .3)  # radians
    if name == "stripes":
        tilt = tilt * 11  # any direction
    scale = uniform(2.2, 3)  # periods in 16 pixels
    u = scale * (warped_x * np.cos(tilt) - warped_y * np.sin(tilt)) + uniform(0, 8)
    v = scale * (warped_x * np.sin(tilt) + warped_y * np.cos(tilt)) + uniform(0, 8)
    g = texture(name, u, v)
    g = g - np.median(g, (1, 2), keepdims=True)  # positive in half of the image
    g = g * np.where(uniform(0, 1) < .5, 1, -1)  # ink is where g > 0
    ink = np.clip(.5 + 16 / scale * g, 0, 1)[:, None]  # edges one pixel wide
    one = (1, 1, 1)
    dark = uniform(.29, .31, one) + np.reshape([-.05, 0, .05], (3, 1, 1))  # bluish
    light = dark + uniform(.37, .38, one) + np.reshape([.1, .02, -.1], (3, 1, 1))  # yellowish
    image = dark + ink * (light - dark)
    for t in (x, y):  # uneven light
        image += .12 * np.sin(uniform(5, 8, one) * t + uniform(0, 6.3, one))
    image += uniform(-.06, .06, (3, 32, 32))  # pixel noise
    return np.rint(255 * np.clip(image, 0, 1))


def texture(name, u, v):
    """The height of a pattern at the points u, v [n, 32, 32], in periods: [n, 32, 32]."""
    def wave(t):
        return np.abs(t - np.rint(t))  # distance to the nearest integer: 0 ... 0.5

    a, b = wave(u), wave(v)
    row, column = np.floor(v), np.floor(u)
    shifted = wave(u + row / 2)  # every second row is shifted by half a period
    in_row = v - row  # 0 ... 1 from one row to the next
    if name == "stripes":
        return 1.5 * wave(1.5 * v)
    if name == "checks":
        return 4 * (a - .25) * (b - .25)
    if name == "dots":
        return np.hypot(shifted, in_row - .5)
    if name == "bricks":
        return np.minimum(wave(.7 * u + np.floor(1.4 * v) / 2), wave(1.4 * v))
    if name == "zigzag":
        return wave(v + 1.2 * a)
    if name == "grid":
        return np.minimum(a, b)
    if name == "rings":
        return np.abs(np.hypot(a, b) - .33)
    if name == "triangles":
        return in_row / 2 - a
    if name == "weave":
        return np.where((row + column) % 2 == 0, wave(2 * u + .25), wave(2 * v + .25)) / 2
    return np.maximum(np.minimum(a, b) - .12, np.maximum(a, b) - .36)  # crosses


# ==== Backbone ====


def build_backbone(name, image_size, width=32):
    """(network, feature_dim). H = network(x) is [N, feature_dim].

    name: `tiny` or `vit_tiny`, whose channels scale with `width`, or a torchvision ResNet. Raises
    UserError for other names or images that do not fit."""
    if name == "tiny":
        return Tiny(width), 32 * width
    if name == "vit_tiny":
        return build_vit(image_size, 3 * width), 3 * width
    return build_resnet(name, image_size)


class Tiny(nn.Module):
    """A small network for CPUs: [N, 3, S, S] -> [N, 32 width].

    Most of its work is in few pixels with many channels: on CIFAR-10 it learned more per minute
    than a small ResNet. It averages over quarters of the image, not the whole: a linear probe
    gained 3 to 4 %."""

    def __init__(self, width):
        super().__init__()

        def block(inputs, outputs, kernel=3, stride=1, padding=1):
            kind = nn.Conv2d if inputs == outputs else PatchConv2d  # torch's is faster if equal
            convolution = kind(inputs, outputs, kernel, stride, padding, bias=False)
            return convolution, nn.BatchNorm2d(outputs), nn.ReLU()  # in place is slower

        w = width
        self.layers = nn.Sequential(
            *block(3, w, kernel=2, stride=2, padding=0),  # [N, w, S/2, S/2]
            *block(w, 3 * w, stride=2),
            *block(3 * w, 3 * w),
            nn.MaxPool2d(2),  # [N, 3 w, S/8, S/8]
            *block(3 * w, 6 * w),
            *block(6 * w, 8 * w),
            nn.AdaptiveAvgPool2d(2))  # [N, 8 w, 2, 2], means of quarters
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x):
        h = self.layers(x)
        if h.requires_grad:
            h.register_hook(channels_last)  # else the pool's backward is slow
        return h.flatten(1)


# ==== Optimizer ====


def build_optimizer(model, args):
    """Adam, SGD, LARS or Muon over the parameters that have a gradient, in groups.

    Biases and norm layers have the peak rate --lr-bias; LARS neither decays nor adapts them. Muon's
    filters have --lr-filters. A group's rate at a step is group["peak_lr"] times the schedule's
    factor, or times 1 if group["constant"]: the parameters of a module with the attribute
    `constant_lr = True` (SimSiam's predictor)."""
    if args.lr_bias is None:
        args = completed(args, next(model.parameters()).device)
    constant = set()
    for module in model.modules():
        if getattr(module, "constant_lr", False):
            constant.update(map(id, module.parameters()))
    members = {}  # (constant, bias or norm, filter) -> parameters
    for parameter in model.parameters():
        if parameter.requires_grad:
            filters = args.optimizer == "muon" and parameter.dim() == 4
            key = id(parameter) in constant, parameter.dim() < 2, filters
            members.setdefault(key, []).append(parameter)
    groups = []
    for key in sorted(members):
        fixed, excluded, filters = key
        peak_lr = args.lr_filters if filters else args.lr_bias if excluded else args.lr
        groups.append({"params": members[key], "peak_lr": peak_lr, "constant": fixed,
                       "excluded": excluded, "filters": filters})
    shared = {"lr": args.lr, "weight_decay": args.weight_decay}
    if args.optimizer == "adam":
        return torch.optim.Adam(groups, fused=True, **shared)
    if args.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=0.9, fused=True, **shared)
    if args.optimizer == "lars":
        return LARS(groups, **shared)
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    return Muon(groups, dtype=dtype, **shared)


# ==== Run ====


class Run:
    """One training: its folder, checkpoints, log and checks.

    total_steps: those of all epochs. folder: its path, absolute after close(). rows: a dict per
    finished epoch. scores: the closing kNN accuracies (0 ... 1) by name, empty without labels."""

    def __init__(self, args, model, optimizer, data):
        """Raises UserError if the folder cannot be used or the recipe does not fit the images."""
        self.args, self.model, self.optimizer, self.data = args, model, optimizer, data
        check_crops(args, data)
        self.total_steps = args.epochs * data.steps_per_epoch
        self.rows, self.scores = [], {}
        exact = torch.float64 if data.device.type in ("cpu", "cuda") else torch.float32
        self.loss_sum = torch.zeros((), dtype=exact, device=data.device)  # this epoch's
        self.last_is_good = True  # False after a resume from previous.pt, until the next save
        self.clock = Clock()
        check_model(args, model)
        if args.init and not (args.resume and holds_run(*candidate_folders(args))):
            start_from(args.init, model)
        self.signals = StopSignals(args, data.device)
        self.folder, self.lock = open_folder(args)
        self.finite = FiniteWatch(model, data, self.folder)

    def resume(self):
        """The step to start from: 0, or with --resume that of the last good checkpoint, which it
        loads. Writes config.json. Raises UserError if that is another run's."""
        checkpoint = None
        if self.args.resume:
            checkpoint = load_last(self.folder)
            check_same_step(self, checkpoint)
            if checkpoint:
                check_same_run(self, checkpoint)
        steps, warmup = self.total_steps, self.args.warmup or 0
        if warmup > steps and not checkpoint:
            warn(f"--warmup {warmup} exceeds the {steps} steps; try --warmup {steps // 10}")
        if rank() == 0:  # only now: a refused --resume leaves config.json as it was
            config = json.dumps(configuration(self.args, self.data), indent=1)
            write_file(os.path.join(self.folder, "config.json"), config.encode())
        return restore(self, checkpoint) if self.args.resume else 0

    def guard(self, step):
        """A context in which a failed matrix decomposition becomes a UserError."""
        return self.finite.guard(step)

    def watch(self, step, loss):
        """Add up the loss [] and note whether all numbers are finite."""
        self.finite.note(step, loss)
        self.loss_sum += loss.detach()
        if STATUS.overdue():  # it waits: --log-every steps can be slow
            self.show_status(step + 1, loss)

    def progress(self, step, loss):
        """Raise UserError if a number was not finite; show the status. Waits for the device."""
        self.finite.check()
        self.show_status(step, loss)

    def show_status(self, step, loss):
        """Tell step, loss and time left."""
        done = (step - 1) % self.data.steps_per_epoch + 1
        left = format_seconds((self.total_steps - step) * self.clock.epoch_seconds() / done)
        STATUS.show(f"{self.where(step)}  loss {loss.item():.4f}  {left} left")

    def save_if_due(self, step):
        """Inside an epoch: save every --save-every steps; after Ctrl-C or SIGTERM save and exit."""
        stop = self.signals.came(step)
        if stop or (self.args.save_every > 0 and step % self.args.save_every == 0):
            self.save(step)
        if stop:
            self.signals.leave(step, self.total_steps)

    def mean_loss(self):
        """Mean loss of the epoch, a float. Its time for images/s ends here. Waits for the device.

        Raises UserError if a number was not finite, before these weights are measured."""
        self.finite.check()
        mean = self.loss_sum.item() / self.data.steps_per_epoch
        self.training_seconds = self.clock.epoch_seconds()
        return mean

    def end_epoch(self, step, row):
        """Complete the epoch's row of metrics.csv, save, print a line. Exit if a signal came."""
        seconds = self.clock.epoch_seconds()
        images = self.data.steps_per_epoch * self.args.batch_size
        row["images_per_s"] = round(images / self.training_seconds, 1)
        row["seconds"] = round(self.clock.seconds(), 1)
        if "rank" in row:
            row["alignment"] = alignment(self.model, self.data, self.args)
        self.rows.append(row)
        self.loss_sum.zero_()
        self.clock.start_epoch()
        self.save(step)
        if rank() == 0:
            write_metrics(self.folder, self.rows)
            keep_checkpoint(self.folder, len(self.rows), self.args.keep_every)
        left = (self.total_steps - step) * seconds / self.data.steps_per_epoch
        say(f"{self.where(step)}  {row_in_words(row)}  {format_seconds(left)} left")
        dim_h = min(self.finite.feature_dim, len(self.data.queries) - 1)
        collapse = collapse_in_words(row, row["dim"], dim_h) if "rank" in row else ""
        if collapse:
            say(collapse)
        self.clock.start_epoch()  # the next epoch's images/s do not count this checkpoint
        if self.signals.came(0) and step < self.total_steps:  # 0: all processes agree
            self.signals.leave(step, self.total_steps)

    def save(self, step):
        """Write last.pt whole or not at all; the one before is kept as previous.pt.

        Raises UserError if a number was not finite or the disk is full."""
        self.finite.check()
        if rank() > 0:
            return
        content = {"args": vars(self.args), "step": step, "model": self.model.state_dict(),
                   "response": response(self.model.backbone, self.data.size),
                   "optimizer": self.optimizer.state_dict(), "rows": self.rows,
                   "loss_sum": self.loss_sum.cpu().double(), "data": self.data.fingerprint,
                   "data_statistics": self.data.statistics, "seconds": self.clock.seconds(),
                   "epoch_seconds": self.clock.epoch_seconds()}
        previous = os.path.join(self.folder, "previous.pt") if self.last_is_good else None
        save_checkpoint(os.path.join(self.folder, "last.pt"), content, keep_as=previous)
        self.last_is_good = True

    def save_backbone(self):
        """Write backbone.pt: the backbone's weights, a ResNet's under torchvision's names."""
        if rank() == 0:
            buffer = io.BytesIO()
            torch.save(self.model.backbone.state_dict(), buffer)
            write_file(os.path.join(self.folder, "backbone.pt"), buffer.getvalue())
        self.signals.give_back()  # all is saved, so Ctrl-C may end the program at once

    def close(self, scores):
        """Keep the scores, print the last lines."""
        self.scores = scores
        self.model.eval()
        if scores:
            first, *others = [f"{name} {100 * score:.2f} %" for name, score in scores.items()]
            test, bank = len(self.data.test), len(self.data.large_bank)
            say(f"{first}  ({', '.join(others)}; k = {min(20, bank)}, cosine, T = 0.07, "
                f"{test} test images against {bank} training images)")
        else:
            say("no labelled training and test images, so no kNN; "
                "the collapse figures are in metrics.csv")
        say(f"{self.folder}: config.json metrics.csv last.pt backbone.pt  "
            f"({format_seconds(self.clock.seconds())})")
        self.folder = os.path.abspath(self.folder)

    def where(self, step):
        """`epoch 2/10  step 45/390`"""
        epoch = (step - 1) // self.data.steps_per_epoch + 1
        width = len(str(self.args.epochs))
        return f"epoch {epoch:{width}}/{self.args.epochs}  step {step}/{self.total_steps}"


class Clock:
    """Seconds of the run and of its present epoch. They go on after a resume."""

    def __init__(self):
        self.run_before = self.epoch_before = 0.0  # before the resume
        self.run_started = self.epoch_started = time.monotonic()

    def seconds(self):
        """Seconds of the run so far."""
        return self.run_before + time.monotonic() - self.run_started

    def epoch_seconds(self):
        """Seconds of this epoch so far."""
        return self.epoch_before + time.monotonic() - self.epoch_started

    def start_epoch(self):
        """Begin an epoch's seconds."""
        self.epoch_before, self.epoch_started = 0.0, time.monotonic()


class FiniteWatch:
    """The step in which each network's output, the loss and each gradient was first not finite."""

    NEVER = 2**31 - 1

    def __init__(self, model, data, folder):
        self.data, self.folder = data, folder
        self.outputs = {}  # of each child of the model, in this step
        for name, child in model.named_children():
            self.outputs[name] = []
            at_end(child.register_forward_hook(functools.partial(self.keep, name)).remove)
        self.gradients = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.watched = [f"the output of the {name}" for name in self.outputs] + ["the loss"]
        self.watched += [f"the gradient of {name}" for name, _ in self.gradients]
        self.first_bad = torch.full((len(self.watched),), self.NEVER, device=data.device)

    def keep(self, name, module, _inputs, output):
        """After a child's forward: remember its output."""
        if name == "backbone":
            self.feature_dim = output.shape[-1]
        if module.training:
            self.outputs[name].append(output.detach())

    @torch.no_grad()
    def note(self, step, loss):
        """Look at the step's outputs, loss and gradients."""
        zero = torch.zeros((), device=self.first_bad.device)
        values = []
        for outputs in self.outputs.values():
            values.append(sum((output.float().sum() for output in outputs), zero))
            outputs.clear()
        values.append(loss.detach().float())
        for _, parameter in self.gradients:
            gradient = parameter.grad
            values.append(zero if gradient is None else gradient.norm().float())
        finite = torch.stack(values).isfinite()
        self.first_bad = torch.where(finite, self.first_bad, self.first_bad.clamp(max=step))

    def check(self, agree=True):
        """Raise UserError if something was not finite; with `agree` in any process. Waits for the
        device."""
        if agree and dist.is_initialized():
            dist.all_reduce(self.first_bad, dist.ReduceOp.MIN)
        first_bad = self.first_bad.tolist()
        if min(first_bad) < self.NEVER:
            what = self.watched[first_bad.index(min(first_bad))]
            stop_non_finite(min(first_bad), what, self.data, self.folder)

    @contextlib.contextmanager
    def guard(self, step):
        """Turn a failed eigen-decomposition into the same UserError."""
        try:
            yield
        except torch.linalg.LinAlgError:
            self.check(agree=False)  # an earlier step; other processes may not have failed here
            for name, outputs in self.outputs.items():
                if not all(bool(output.isfinite().all()) for output in outputs):
                    stop_non_finite(step, f"the output of the {name}", self.data, self.folder)
            stop_non_finite(step, "the whitening", self.data, self.folder)


# ==== A step: model and seed ====


def distribute(model, args):
    """The model as the loop calls it: with --compile compiled, and under torchrun with the batch
    statistics of the global batch and gradients averaged over the processes."""
    if world_size() > 1:
        synchronise_batch_norm(model)
    if args.compile:
        for name, module in model.named_children():
            if name.endswith("backbone"):  # that of a slow copy too
                module.forward = torch.compile(module.forward)  # names in a checkpoint stay
    if world_size() > 1:
        model = nn.parallel.DistributedDataParallel(model)
        model.broadcast_buffers = False  # they are equal (as an argument it is deprecated)
    return model


def step_seed(seed, step):
    """The seed of a step's permutations and partitions, the same in all processes."""
    # 32 bits: torch's CPU generator ignores higher ones
    return int(np.random.SeedSequence((seed, 3, step)).generate_state(1)[0])


# ==== A step: views ====


@torch.no_grad()
def augment(images, recipe, views, size, mean, std, seed, step, rank=0, world_size=1):
    """The random views of a batch: a list of float32 [n, 3, size, size], normalised, channels_last.

    images: uint8 [n, 3, H, W], or a list with a batch of crops per view (by a loader). recipe: a
    name in RECIPES. mean, std: three numbers each. The draws are a function of (seed, step), on any
    device. They are those of the global batch of world_size * n images; this rank has the rows from
    rank * n on. Raises UserError for images that are not uint8, ValueError if some end in another
    size."""
    cropped, out = isinstance(images, (list, tuple)), []
    device = images[0].device
    mean, std = whole_image(mean, size, device), whole_image(std, size, device)
    for number_of_view in range(views):
        batch = images[number_of_view] if cropped else images
        check_images(batch)
        n, _, height, width = batch.shape
        view = RECIPES[recipe][number_of_view % len(RECIPES[recipe])]
        rng = np.random.default_rng((seed, 0, step, number_of_view))
        params = draw(view, n * world_size, height, width, rng)
        rows = slice(rank * n, (rank + 1) * n)
        params = [{key: array[rows] for key, array in p.items()} for p in params]
        with torch.autocast(batch.device.type, enabled=False):  # resampling needs float32
            x = apply(view, batch, params, size, cropped)
        x = channels_last(x)  # no copy after a crop
        out.append(x.sub_(mean).div_(std))
    return out


def whole_image(numbers, size, device):
    """Three numbers -> float32 [1, 3, size, size], channels_last: faster to subtract."""
    numbers = torch.as_tensor(numbers, dtype=torch.float32, device=device).view(1, 3, 1, 1)
    return channels_last(numbers.expand(1, 3, size, size))


def channels_last(x):
    """[N, C, H, W], channels last in memory."""
    return x.contiguous(memory_format=torch.channels_last)


def draw(view, n, height, width, rng):
    """Draw the parameters of one view for n images of height x width.

    view: operations as in RECIPES. rng: numpy Generator. Returns a dict of arrays per operation:
    crop        box [n, 4]: top, left, height, width
    jitter      on [n]; factor [n, 4] of brightness 0, contrast 1, saturation 2, hue 3; order [n, 4]
    blur        on [n], sigma [n] in pixels
    the others  on [n]"""
    params = []
    for name, *setting in view:
        if name == "crop":
            params.append({"box": draw_boxes(n, height, width, setting[0], setting[1], rng)})
        elif name == "jitter":
            *strength, hue, p = setting
            low = np.array([max(0.0, 1 - s) for s in strength] + [-hue])
            high = np.array([1 + s for s in strength] + [hue])
            order = rng.random((n, 4)).argsort(1)
            factor = rng.uniform(low, high, (n, 4))
            params.append({"on": rng.random(n) < p, "order": order, "factor": factor})
        else:
            params.append({"on": rng.random(n) < setting[0]})
            if name == "blur":
                params[-1]["sigma"] = rng.uniform(setting[1], setting[2], n)
    return params


def draw_boxes(n, height, width, min_area, max_area, rng, ratio=(3 / 4, 4 / 3)):
    """n crop boxes, int64 [n, 4]: top, left, height, width.

    As torchvision's RandomResizedCrop: the first of ten tries that fits, else a central box. The
    area is a share of the image's, from min_area to max_area; ratio: bounds of width / height."""
    area = height * width * rng.uniform(min_area, max_area, (10, n))
    aspect = np.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1]), (10, n)))
    w, h = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))  # [10, n]
    fits = (0 < w) & (w <= width) & (0 < h) & (h <= height)
    first, column = fits.argmax(0), np.arange(n)
    w, h, fits = w[first, column], h[first, column], fits[first, column]  # [n]
    # If no try fits (rare, or a very long image): as much of the image as the ratio allows.
    w = np.where(fits, w, min(width, round(height * ratio[1])))
    h = np.where(fits, h, min(height, round(width / ratio[0])))
    top, left = rng.random((2, n))
    top = np.where(fits, np.floor(top * (height - h + 1)), (height - h) // 2)
    left = np.where(fits, np.floor(left * (width - w + 1)), (width - w) // 2)
    return np.stack([top, left, h, w], 1).astype(np.int64)


def apply(view, images, params, size, cropped=False):
    """Apply one view's operations with parameters from `draw`: float32 [n, 3, size, size], 0 ... 1.

    images: [n, 3, H, W], uint8 or float in [0, 1]. cropped: leave the crop out (done by a loader).
    Raises ValueError if they end in another size."""
    if images.dtype == torch.uint8:
        x = images.float().div_(255)
    else:
        x = images.float().clone()  # the operations work in place
    todo = [(op, p) for op, p in zip(view, params) if not (cropped and op[0] == "crop")]
    names = [op[0] for op, _ in todo]
    # A flip commutes with all operations after the crop, so the crop's matrix flips at no cost.
    mirror = np.zeros(len(x), dtype=bool)
    if "flip" in names and "crop" in names[: names.index("flip")]:
        mirror = todo.pop(names.index("flip"))[1]["on"]
    arrays = [host_arrays(op[0], p, mirror, size) for op, p in todo]
    for (op, _), tensors in zip(todo, to_device(arrays, x.device)):
        if op[0] == "crop":
            x = crop_and_resize(x, *tensors, size, op[3])
        elif op[0] == "jitter":
            x = jitter(x, *tensors)
        elif len(tensors[0]):  # the others change only the rows drawn for them
            rows, *settings = tensors
            x.index_copy_(0, rows, change(op[0], x.index_select(0, rows), *settings))
    if x.shape[2:] != (size, size):
        raise ValueError(f"images are {x.shape[2]}x{x.shape[3]}, not --image-size {size}, "
                         "and this recipe has no crop")
    return x


def host_arrays(name, p, mirror, size):
    """The arrays that one operation needs on the device, from its drawn parameters p.

    Sizes are settled here, in numpy, so that nothing waits for the device. mirror: bool [n], the
    images whose crop is flipped."""
    if name == "crop":
        top, left, h, w = p["box"].T
        origin, step = w * mirror, np.where(mirror, -w, w) / size
        vertical = np.stack([top, top + h, 0 * h, h / size], 1)  # see resize_matrix
        horizontal = np.stack([left, left + w, origin, step], 1)
        return [vertical.astype(np.float32), horizontal.astype(np.float32)]
    if name == "jitter":
        return jitter_arrays(p)
    rows = np.flatnonzero(p["on"])
    return [rows, p["sigma"][rows]] if name == "blur" else [rows]


def jitter_arrays(p):
    """The arguments of `jitter` after x.

    An image has three blends and a shift of hue before, between or after them. Sorted by the place
    of hue, those without jitter last, the images whose hue is due are one slice of known bounds."""
    place = np.where(p["on"], (p["order"] == 3).argmax(1), 4)
    rows = place.argsort(kind="stable")
    done = rows[: np.count_nonzero(place < 4)]  # the m jittered images
    order, factor = p["order"][done], p["factor"][done]
    blend = order[order != 3].reshape(-1, 3)  # [m, 3], which of 0, 1, 2
    keep = np.take_along_axis(factor, blend, 1)  # [m, 3]
    to_grey, to_mean = (1 - keep) * (blend == 2), (1 - keep) * (blend == 1)
    hues = np.split(factor[:, 3], np.searchsorted(place[done], [1, 2, 3]))  # four, by place
    return [rows, rows.argsort(), keep, to_grey, to_mean, *hues]


def to_device(lists, device):
    """Lists of numpy arrays -> lists of int64 or float32 tensors, in one asynchronous transfer."""
    flat = [a for arrays in lists for a in arrays]
    packed = np.concatenate([np.zeros(0)] + [a.reshape(-1) for a in flat])
    packed = torch.from_numpy(packed.astype(np.float32))  # exact below 2^24
    if device.type == "cuda":
        packed = packed.pin_memory()  # without it the copy would wait
    parts = packed.to(device, non_blocking=packed.is_pinned()).split([a.size for a in flat])
    tensors = []
    for part, a in zip(parts, flat):
        part = part.view(a.shape)
        tensors.append(part.long() if a.dtype.kind == "i" else part)
    tensors = iter(tensors)
    return [[next(tensors) for _ in arrays] for arrays in lists]


def crop_and_resize(x, vertical, horizontal, size, interpolation):
    """Resize the box of each image of x [n, 3, H, W] -> [n, 3, size, size]: Wy x Wx^T.

    Antialiased, as in PIL and torchvision. vertical, horizontal: [n, 4], see resize_matrix."""
    n, c, height, width = x.shape
    wx = resize_matrix(horizontal, width, size, interpolation)  # [n, size, W]
    wy = resize_matrix(vertical, height, size, interpolation)  # [n, size, H]
    x = torch.bmm(wx, x.reshape(n, c * height, width).mT)  # [n, size, 3 H], no copy
    x = torch.bmm(wy, x.view(n, size * c, height).mT)  # [n, size, size 3]
    x = x.view(n, size, size, c).permute(0, 3, 1, 2)  # [n, 3, size, size], channels_last
    return x.clamp_(0, 1) if interpolation == "bicubic" else x  # bicubic overshoots


def resize_matrix(ends, length, size, interpolation):
    """Interpolation weights [n, size, length] that resize the box [first, last) of each image.

    ends [n, 4]: first, last, origin, step. The centre of output pixel s lies at
    first + origin + step (s + 1/2). A negative step mirrors."""
    first, last, origin, step = ends[:, None].unbind(-1)  # [n, 1] each
    scale = step.abs().clamp_min(1)  # > 1 widens the kernel: antialiasing
    pixel = torch.arange(length, dtype=ends.dtype, device=ends.device) + 0.5  # [length]
    inside = (pixel > first) & (pixel < last)  # [n, length]
    pixel = torch.where(inside, pixel - first, 1e9)  # weight 0 outside the box
    centre = origin + step * (torch.arange(size, dtype=ends.dtype, device=ends.device) + 0.5)
    t = pixel[:, None, :].sub(centre[:, :, None]).div_(scale[:, None]).abs_()  # [n, size, length]
    if interpolation == "bilinear":
        w = t.neg_().add_(1).clamp_min_(0)  # 1 - |t|
    else:  # Keys' cubic, a = -1/2. With u = (2 - |t|)+, v = (1 - |t|)+:
        u = t.neg_().add_(2).clamp_min_(0)  # u^2 (u - 1) / 2 + v^2 (1 - 2 v)
        outer = (u - 1).mul_(u).mul_(u)
        v = u.sub_(1).clamp_min_(0)
        w = (0.5 - v).mul_(v).mul_(v).mul_(4).add_(outer)  # twice the kernel
    return w.div_(w.sum(-1, keepdim=True))


def luma(x):
    """Grey level with torchvision's weights: [n, 3, ...] -> [n, 1, ...]."""
    r, g, b = x.split(1, 1)
    return r.mul(0.2989).add_(g, alpha=0.587).add_(b, alpha=0.114)


def jitter(x, rows, back, keep, to_grey, to_mean, *hues):
    """Brightness, contrast, saturation and hue of x [n, 3, H, W] in each image's own order.

    As torchvision's ColorJitter. jitter_arrays gives the other arguments. The first three are one
    formula, x <- clamp(f x + (1 - f) y) with y = 0, the mean grey, or the grey of the pixel."""
    shape = x.shape
    x = x.flatten(2).index_select(0, rows)  # sorted by the place of hue
    jittered = x[: len(keep)]  # [m, 3, HW]
    parts = jittered.split([len(h) for h in hues])
    # [m, 3] -> [3, m, 1, 1]
    keep, to_grey, to_mean = (c.t()[:, :, None, None] for c in (keep, to_grey, to_mean))
    for place in range(4):
        if len(hues[place]):
            shift_hue(parts[place], hues[place])
        if place < 3:
            grey = luma(jittered)  # [m, 1, HW]
            mean = grey.mean(-1, keepdim=True) * to_mean[place]
            shade = grey.mul_(to_grey[place]).add_(mean)
            jittered.mul_(keep[place]).add_(shade).clamp_(0, 1)
    return x.index_select(0, back).view(shape)


def shift_hue(x, turn):
    """Rotate the hue of x [n, 3, P] by turn [n] (1 = full circle), in place.

    As torchvision's adjust_hue, but without six cases. With max M, chroma C = M - min and the hue h
    in sixths of a turn, |h| = 2 + (g + b - r - M) / C with the sign of g - b. A channel of an HSV
    colour is M - C clamp(2 - d, 0, 1) at distance d, in sixths, from the hue opposite to it."""
    r, g, b = x.unbind(1)  # [n, P]
    top = x.amax(1)
    chroma = top - x.amin(1)
    hue = (g + b).sub_(r).sub_(top).div_(chroma.clamp_min(1e-20)).add_(2)
    hue = hue.copysign_(g - b).div_(6)
    opposite = torch.arange(3, device=x.device).mul(-1 / 3).add(1 / 2) + turn[:, None]  # [n, 3]
    d = hue[:, None] + opposite[:, :, None]  # [n, 3, P]
    d = d.sub_(d.round()).abs_().clamp_(1 / 6, 1 / 3)  # distance in turns
    torch.addcmul((top - 2 * chroma)[:, None], chroma.mul_(6)[:, None], d, out=x)


def change(name, x, *settings):
    """One of the operations that only some images get. x [n, 3, S, S] in [0, 1] -> the same shape.

    settings: sigma [n] of blur. solarize: torchvision's, with threshold 1/2."""
    if name == "flip":
        return x.flip(-1)
    if name == "grey":
        return luma(x).expand_as(x)
    if name == "blur":
        return blur(x, *settings)
    return torch.where(x >= 0.5, 1 - x, x)  # solarize


# ==== A step: learning rate, embeddings ====


def learning_rate(args, step, total_steps, steps_per_epoch):
    """The factor in [0, 1] of the peak learning rate at `step` (0 ... total_steps - 1).

    Linear warm-up (1 / warmup in the first step), then `cosine` to 0, or `constant`, or `step`:
    x 0.2 at 50 and again at 25 epochs before the end (W-MSE and CW-RGP code)."""
    warmup = min(500, total_steps // 10) if args.warmup is None else args.warmup
    if step < warmup:
        return (step + 1) / warmup
    if args.schedule == "cosine":
        return (1 + math.cos(math.pi * (step - warmup) / max(1, total_steps - warmup))) / 2
    if args.schedule == "step":
        drops = [total_steps - epochs * steps_per_epoch for epochs in (50, 25)]
        return 0.2 ** sum(step >= drop > 0 for drop in drops)  # none before the start of the run
    return 1.0


def gather(z):
    """[n, ...] of this process -> [N, ...] of the global batch, with gradient, at least fp32."""
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    if not dist.is_initialized():
        return z
    parts = [torch.zeros_like(z) for _ in range(world_size())]
    parts[rank()] = z
    return SumOverRanks.apply(torch.cat(parts))


# ==== Measuring ====


@torch.no_grad()
def extract(network, data, images, precision="fp32", batch_size=None, what="measuring"):
    """network(x) in eval mode for all images -> float32 [N, d] on the data's device.

    images: uint8 [N, 3, H, W] or Files. Under torchrun each process computes a share and gets all.
    batch_size: by default at most 500, and fewer above 64 pixels. what: heads the status line."""
    batch_size = batch_size or max(1, min(500, 2**21 // data.size**2))
    was_training = network.training
    network.eval()
    share = -(-len(images) // world_size())  # rounded up
    index = torch.arange(rank() * share, (rank() + 1) * share)
    index = index.clamp(max=len(images) - 1)  # the last share is filled up with the last image
    bf16 = precision == "bf16"
    outputs = []
    count = -(-len(index) // batch_size)
    for x in said(data.eval_views(images, index, batch_size), count, f"{what}, batch"):
        with torch.autocast(data.device.type, torch.bfloat16, enabled=bf16):
            outputs.append(network(x).float())
    network.train(was_training)
    return gather(torch.cat(outputs))[: len(images)]


def project(projector, h, precision="fp32"):
    """projector(h), such as Z of H, in eval mode: [N, ...] -> float32 [N, d]."""
    was_training = projector.training
    projector.eval()
    bf16 = precision == "bf16"
    with torch.no_grad(), torch.autocast(h.device.type, torch.bfloat16, enabled=bf16):
        z = torch.cat([projector(part).float() for part in h.split(1000)])
    projector.train(was_training)
    return z


def collapse_metrics(z, eps=1e-4):
    """How much of its space a set of embeddings z [N, d] fills: a dict of floats, from float64.

    dim             dimensions that N rows can fill, min(d, N - 1)
    std_sqrt_d      standard deviation of the l2-normalised rows, mean over the channels, times
                    sqrt(d): 1 if isotropic, 0 if constant (SimSiam)
    rank            how many singular values s of centred z exceed float32's resolution of z,
                    max(N, d) * 2^-23 * the largest of z
    rank_1pct       how many exceed a hundredth of the largest
    stable_rank     (sum of s) / s_1, the "stable-rank" of the CW-RGP paper (Definition 1)
    stable_rank_sq  (sum of s^2) / s_1^2, the usual stable rank
    rankme          exp(entropy of s / sum s) of z, not centred (Garrido et al. 2023,
                    arXiv 2210.02885): 1 if constant
    corr            mean absolute correlation of two channels; a constant channel counts as 1
    entropy         1/2 log det(2 pi e (covariance + eps I)), a Gaussian's entropy, in nats
    uniformity      log of the mean of exp(-2 squared distance) over the pairs of at most 500
                    l2-normalised rows (Wang and Isola 2020, arXiv 2005.10242): 0 if constant

    Raises UserError if z is not finite."""
    z = z.detach().cpu().double()
    check(z.isfinite().all(), "the network's output in eval mode is not finite: the weights "
          "diverged; try a smaller --lr (--lr-bias) or a longer --warmup")
    n, d = z.shape
    unit = F.normalize(z, dim=1)
    std = unit.std(0, unbiased=False)
    centred = z - z.mean(0)
    s = torch.linalg.svdvals(centred)
    p = torch.linalg.svdvals(z)
    s = torch.where(s > max(n, d) * 2.0**-23 * p[0], s, 0.0)  # the rest is rounding, not rank
    largest = s[0].clamp_min(1e-300)
    p = p / p.sum().clamp_min(1e-300) + 1e-7
    covariance = centred.T @ centred / max(1, n - 1)
    regular = covariance + eps * torch.eye(d, dtype=z.dtype)
    pair_kernels = torch.pdist(unit[::-(-n // 500)]).square().mul(-2).exp()
    figures = {
        "dim": min(d, max(1, n - 1)),
        "std_sqrt_d": std.mean() * math.sqrt(d),
        "rank": (s > 0).sum(),
        "rank_1pct": (s > 0.01 * largest).sum(),
        "stable_rank": s.sum() / largest,
        "stable_rank_sq": (s / largest).square().sum(),
        "rankme": (-(p * p.log()).sum()).exp(),
        "corr": mean_correlation(covariance),
        "entropy": 0.5 * torch.linalg.slogdet(2 * math.pi * math.e * regular)[1],
        "uniformity": pair_kernels.mean().log() if n > 1 else 0,
    }
    return {name: float(value) for name, value in figures.items()}


def alignment(model, data, args):
    """Mean squared distance of the l2-normalised Z of two views of at most 256 queries, in eval
    mode (Wang and Isola 2020). The views are always the same."""
    images = evenly_spaced(data.queries, None, 256)[0]
    if isinstance(images, Files):
        (images,) = images.crops(torch.arange(len(images))[None], args, 0, data.device)
    views = augment(images, args.augment, 2, data.size, data.mean, data.std, args.seed, step=0)
    network = nn.Sequential(model.backbone, model.projector)
    z1, z2 = (F.normalize(project(network, x, args.precision), dim=1).cpu().double() for x in views)
    return (z1 - z2).square().sum(1).mean().item()


def mean_correlation(covariance):
    """Mean absolute correlation of two different channels, from their covariance [d, d]."""
    d = len(covariance)
    std = covariance.diagonal().sqrt()
    correlation = (covariance / (std[:, None] * std).clamp_min(1e-300)).abs()
    live = std > 1e-7 * std.max()  # not constant
    correlation = torch.where(live[:, None] & live, correlation, 1.0)
    return (correlation.sum() - correlation.diagonal().sum()) / max(1, d * (d - 1))


def knn_accuracy(bank, bank_labels, queries, query_labels, k=20, temperature=0.07):
    """Accuracy (0 ... 1) of a vote among the k nearest rows of the bank [N, d] for queries [M, d].

    With a temperature: cosine similarity, and a neighbour votes with weight exp(cos / temperature)
    (Wu et al. 2018, arXiv 1805.01978). With temperature=None: Euclidean distance, one vote each,
    and a tie goes to the smallest label (W-MSE code). Labels: int64."""
    k = min(k, len(bank))
    classes = int(max(bank_labels.max(), query_labels.max())) + 1
    bank, queries = bank.float(), queries.float()
    if temperature is not None:
        bank, queries = F.normalize(bank, dim=1), F.normalize(queries, dim=1)
    else:  # close embeddings far from 0 lose digits
        bank, queries = bank - bank.mean(0), queries - bank.mean(0)
    squares = bank.square().sum(1)  # [N]
    correct = 0
    for rows, labels in zip(queries.split(1000), query_labels.split(1000)):
        if temperature is None:  # [m, N]: |row|^2 minus the squared distance
            nearest, index = (2 * rows @ bank.T - squares).topk(k, dim=1)
            weights = torch.ones_like(nearest)
        else:
            nearest, index = (rows @ bank.T).topk(k, dim=1)
            weights = ((nearest - nearest[:, :1]) / temperature).exp()  # [m, k]
        votes = weights.new_zeros(len(rows), classes)
        votes.scatter_add_(1, bank_labels[index], weights)
        correct += (votes.argmax(1) == labels).sum()  # argmax: the first of equal maxima
    return float(correct) / len(queries)


# ==== Words for the screen ====


def row_in_words(row):
    """`loss 0.1234  kNN 65.43 %  ...` of a row of metrics.csv."""
    words = f"loss {row['loss']:.4f}"
    if row["knn"] != "":
        words += f"  kNN {100 * row['knn']:5.2f} %"
    if "rank" in row:
        words += f"  std*sqrt(d) {row['std_sqrt_d']:.2f}  rank {row['rank_1pct']:.0f}"
    return f"{words}  {row['images_per_s']:.0f} images/s"


def collapse_in_words(figures, dim, dim_h):
    """A sentence if the figures of Z, and rank_h of H, show a collapse, else an empty string.

    figures: of collapse_metrics, and rank_h. dim, dim_h: of Z, of H. Two images or fewer cannot
    show it. methods/README.md, `What collapses`, has the runs behind the limits."""
    if dim < 2:
        return ""
    if figures["std_sqrt_d"] < 0.1:
        return ("COLLAPSE: all embeddings are nearly one point "
                f"(std*sqrt(d) {figures['std_sqrt_d']:.3f}, healthy: near 1)")
    if figures["rank_1pct"] < min(5, dim / 2):
        return (f"DIMENSIONAL COLLAPSE: the embeddings fill few of their {dim:.0f} dimensions "
                f"(rank_1pct {figures['rank_1pct']:.0f})")
    if dim >= 10 and figures["rankme"] < 2.5:
        return ("DIMENSIONAL COLLAPSE: one direction has nearly all of the embeddings "
                f"(rankme {figures['rankme']:.2f}, 1 is the least)")
    if dim >= 10 and figures["rank_h"] < min(10, dim_h / 2):
        return ("DIMENSIONAL COLLAPSE: the backbone's output H fills few dimensions "
                f"(rank_h {figures['rank_h']:.0f})")
    return ""


def format_seconds(seconds):
    """`3m07s` or `1h02m`."""
    seconds = int(seconds)
    if seconds >= 3600:
        return f"{seconds // 3600}h{seconds // 60 % 60:02d}m"
    return f"{seconds // 60}m{seconds % 60:02d}s"


# ==============================================================================
# Part II: everything else. You may stop reading here.
# ==============================================================================

# ==== Command line: flags from Args, checks, and sizes to propose ====

# The first flag of each group of --help.
GROUPS = {"dataset": "images and views", "backbone": "network", "epochs": "training",
          "out": "run folder", "device": "machine"}


class OneLineParser(argparse.ArgumentParser):
    """argparse, but without its usage before the line about a bad flag."""

    def error(self, message):
        remedy = "" if "; try" in message else f"; see {self.prog} --help"
        raise UserError(message.removeprefix("argument ") + remedy)


def number(kind, least=None, most=None, above=None, below=None, example=None):
    """A `type` for argparse: int or float within bounds, else ArgumentTypeError."""
    bounds = [("at least", operator.ge, least), ("above", operator.gt, above),
              ("at most", operator.le, most), ("below", operator.lt, below)]
    bounds = [bound for bound in bounds if bound[2] is not None]
    words = " and ".join(f"{words} {x}" for words, _, x in bounds)
    wanted = f"{'a whole number' if kind is int else 'a number'} {words}".strip()

    def parse(text):
        with contextlib.suppress(ValueError, OverflowError, TypeError):
            value = kind(text)
            exact = value == text and not isinstance(text, (bool, np.bool_))
            inside = math.isfinite(value) and all(holds(value, x) for _, holds, x in bounds)
            if inside and (exact or isinstance(text, str)):
                return value
        raise argparse.ArgumentTypeError(f"'{text}' is not {wanted}; try {example}")

    return parse


def flags_of(kind):
    """The fields of an Args class as [(name, type, default, metadata)], without those of no flag.

    A field that only changes a default has its base's metadata. Raises TypeError for a class that
    Python would misread: without @dataclass, or a name without type."""
    if "__dataclass_fields__" not in vars(kind):
        raise TypeError(f"{kind.__name__} needs @dataclass(kw_only=True) above it")
    for name, value in vars(kind).items():
        if not name.startswith("_") and not callable(value) and name not in kind.__annotations__:
            raise TypeError(f"{kind.__name__}.{name} needs a type, as in `{name}: int = ...`")
    metadata, flags = {}, []
    for base in reversed(kind.__mro__):
        for field in getattr(base, "__dataclass_fields__", {}).values():
            metadata[field.name] = field.metadata or metadata.get(field.name)
    hints = typing.get_type_hints(kind)  # not field.type, which may be text
    for field in dataclasses.fields(kind):
        if metadata[field.name]:
            types = typing.get_args(hints[field.name]) or [hints[field.name]]  # of int | None: both
            flags.append((field.name, types[0], field.default, metadata[field.name]))
    return flags


def option_of(name):
    """"proj_dim" -> "--proj-dim"."""
    return "--" + name.replace("_", "-")


def words_of(name, metadata):
    """The words that a flag may be, or None if it may be any."""
    return sorted(RECIPES) if name == "augment" else metadata["choices"]


def parser_of(type_, default, metadata):
    """The function that turns a flag's text or value into its type, or raises ArgumentTypeError."""
    bounds = {key: metadata[key] for key in ("least", "most", "above", "below", "example")}
    if bounds["example"] is None:
        bounds["example"] = default
    return number(type_, **bounds)


def parse_args(kind, argv=None, description=None):
    """An Args of class `kind` from argv, a list of words. description: a docstring for --help.
    Raises UserError."""
    name = script_of(kind)
    first_line = (description or name).strip().splitlines()[0]  # -OO: no docstring
    parser = OneLineParser(prog=name, description=first_line, allow_abbrev=False)
    group = parser.add_argument_group(f"{kind.method}'s own")
    shared = {name for name, *_ in flags_of(Args)}
    for name, type_, default, metadata in sorted(flags_of(kind), key=lambda f: f[0] in shared):
        if name in GROUPS:
            group = parser.add_argument_group(GROUPS[name])
        option, help = option_of(name), metadata["help"].replace("%", "%%")
        if type_ is bool:
            group.add_argument(option, action="store_true", help=help)
            continue
        if default is not None:
            help = f"{help.split(' (default')[0]} (default: {default})"
        words = words_of(name, metadata)
        metavar = None if words else {int: "N", float: "X", str: "NAME"}[type_]
        group.add_argument(option, choices=words, default=default, metavar=metavar, help=help)
    return kind(**vars(parser.parse_args(argv)))


def script_of(args):
    """How the command of an Args begins."""
    other = f"experiments.py {args.method}/{args.experiment}"
    return other if args.experiment else f"{args.method}.py"


def check_values(args):
    """Bring the values of an Args to their types, and check each by itself. UserError."""
    for name, type_, default, metadata in flags_of(type(args)):
        value, option = getattr(args, name), option_of(name)
        if value is None and default is None:
            continue
        if type_ in (int, float):
            try:
                setattr(args, name, parser_of(type_, default, metadata)(value))
            except argparse.ArgumentTypeError as error:
                raise UserError(f"{option}: {error}") from None
        elif type_ is bool:
            check(isinstance(value, bool), f"{option}: {value!r} is not True or False; try True")
        else:
            text, words = "\0", words_of(name, metadata)
            if isinstance(value, (str, os.PathLike)):
                text = str(os.path.expanduser(value))  # numpy's text would not go into a checkpoint
            known = text in words if words else text and "\0" not in text and len(text) <= 1000
            check(known, f"{option}: {value!r} is not known; try {default or 'a name'}")
            setattr(args, name, text)
    check_backbone(args.backbone)


def check_args(args):
    """Check the values of an Args by themselves and together, as far as that needs no data."""
    check_launch()
    check_values(args)
    for name, value in vars(args).items():
        known = name == "given" or name in args.__dataclass_fields__
        own = name not in ("method", "experiment") or value == getattr(type(args), name)
        check(known and own, f"Args({name}={value!r}) is no flag; try --help for the flags")
    check(args.dataset != "folder" or args.data_dir != "data" or os.path.isdir("data"),
          "--dataset folder needs --data-dir DIR, the folder of your images")
    check(args.dataset != "patterns" or args.data_dir == "data", "--data-dir "
          f"{args.data_dir} needs --dataset folder (or cifar10 ...); try --dataset folder")
    check(optimizer_of(args) == "muon" or args.lr_filters is None, "--lr-filters needs --optimizer "
          f"muon; with --optimizer {optimizer_of(args)} the filters' rate is --lr")
    check(not args.init or args.resume or os.path.isfile(args.init),
          f"--init {args.init} is no file; try runs/<run>/backbone.pt")
    check_rules(args)


def check_kind(args, kind):
    """Raise UserError unless args is an Args of class `kind`."""
    found = getattr(args, "method", "") or type(args).__name__
    check(isinstance(args, kind), f"train() needs an Args of {kind.method or 'a method'}, not of "
          f"{found}; try train(Args()) of one file")


def check_model(args, model):
    """Raise UserError unless the model is of args' experiment."""
    found = getattr(model, "experiment", "")  # set by tests/experiments.py
    check(found == args.experiment, f"these Args are for {run_name(vars(args))}, the model is not; "
          "try Args and build of the same experiment")


def has_fast_bf16(device):
    """True if the processor computes in bf16 instead of emulating it: CUDA from Ampere on, x86 with
    AVX512-BF16 or AMX (known on Linux only)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        return bool(re.search("avx512_bf16|amx_bf16", file.read()))
    return False


def completed(args, device):
    """A copy of args in which flags that were left open have their values, and `given` the rest."""
    args = copy.copy(args)
    args.given = dataclasses.asdict(args)
    if args.precision == "auto":
        args.precision = "bf16" if has_fast_bf16(device) else "fp32"
    if args.lr_bias is None:
        args.lr_bias = args.lr
    args.optimizer = optimizer_of(args)
    if args.optimizer == "muon" and args.lr_filters is None:
        args.lr_filters = 0.1
    return args


def optimizer_of(args):
    """The optimizer's name: of `tiny` we know that Muon learns faster, of ResNets we do not."""
    return args.optimizer or ("muon" if args.backbone == "tiny" else "adam")


def plain_torch(ending):
    """Undo, until the ExitStack closes, what a notebook may have set: where and of which kind new
    tensors are, that they have no gradient, autocast, and products of less than fp32. The random
    state comes back."""
    with contextlib.suppress(RuntimeError):  # the precision was set for one backend alone
        ending.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
    torch.set_float32_matmul_precision("highest")
    ending.callback(torch.set_rng_state, torch.get_rng_state())
    ending.callback(torch.set_default_dtype, torch.get_default_dtype())
    torch.set_default_dtype(torch.float32)
    if torch.get_default_device().type != "cpu":
        ending.enter_context(torch.device("cpu"))
    ending.enter_context(torch.inference_mode(False))
    ending.enter_context(torch.enable_grad())
    for kind in ("cpu", "cuda"):
        ending.callback(torch.set_autocast_enabled, kind, torch.is_autocast_enabled(kind))
        torch.set_autocast_enabled(kind, False)
    ending.callback(torch.set_autocast_cache_enabled, torch.is_autocast_cache_enabled())
    if torch.autocast_increment_nesting() > 1:  # its weights in bf16 would outlive our steps
        torch.set_autocast_cache_enabled(False)
    torch.autocast_decrement_nesting()


MEMORY = math.inf  # bytes of the machine
if hasattr(os, "sysconf"):
    MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def rules_of(args):
    """(whether it holds, its words) of each rule of sizes: of all methods, then its own."""
    world = world_size()
    images = getattr(args, "images", 10_000 if args.dataset == "patterns" else 2**20)
    side = args.image_size or 32
    need = 250 * side**2 * args.batch_size * args.views / world  # bytes, of `tiny`
    fits = need < MEMORY or (args.device != "cpu" and torch.cuda.is_available())
    yield args.batch_size % world == 0, f"--batch-size must be a multiple of the {world} processes"
    yield args.batch_size <= images, f"--batch-size must be at most {images}, the training images"
    yield args.proj_dim <= 2**14, "--proj-dim must be at most 16384"
    yield fits, f"--batch-size and --views of {side} pixels need {need / 2**30:.0f} GB"
    yield from args.rules()


def check_rules(args):
    """Raise UserError for the first rule that fails, with the nearest sizes that obey all."""
    broken = [text for holds, text in rules_of(args) if not holds]
    if not broken:
        return
    sizes = {name: flag for name, type_, *flag in flags_of(type(args)) if type_ is int}
    now = as_flags({name: getattr(args, name) for name in mentioned(broken, sizes)})
    found, remedy = sizes_that_fit(args, sizes), ""
    if found is None and world_size() > 1:
        world, os.environ["WORLD_SIZE"] = str(world_size()), "1"  # for the rules
        found, remedy = sizes_that_fit(args, sizes), "--nproc_per_node=1 "
        os.environ["WORLD_SIZE"] = world
    remedy = "more images" if found is None else remedy + as_flags(found)
    raise UserError(f"{now}: {broken[0]}; try {remedy}")


def mentioned(texts, sizes):
    """The flags among `sizes` that the texts mention, in their order."""
    words = re.findall("--([a-z-]+)", " ".join(texts))
    return [n for n in dict.fromkeys(word.replace("-", "_") for word in words) if n in sizes]


def as_flags(sizes):
    """{"w_size": 64} -> "--w-size 64"."""
    return " ".join(option_of(name) if value is True else f"{option_of(name)} "
                    f"{shlex.quote(str(value))}" for name, value in sizes.items())


def sizes_that_fit(args, sizes):
    """{name: value} of the sizes to change, or None. sizes: {name: (default, metadata)}.

    At most two change if that is enough, those at their defaults first: the user asked for the
    others. Otherwise all may: they start at their defaults, then at a half, a quarter ..."""
    rules = sorted(rules_of(args), key=lambda rule: rule[0])  # broken ones first
    names, trial = mentioned([text for _, text in rules], sizes), copy.copy(args)
    now = {name: getattr(args, name) for name in names}
    for halvings in range(13):
        columns = {name: candidates(now, name, sizes[name][1]) for name in names}
        default = [name for name in names if now[name] == sizes[name][0]]
        for pool, count in itertools.product((default, names), range(3)):
            for chosen in itertools.combinations(pool, count):
                near = [columns[name][: 40 if count == 2 else None] for name in chosen]
                for change in sorted(itertools.product(*near), key=lambda c: sum(d for d, _ in c)):
                    values = {**now, **{name: value for name, (_, value) in zip(chosen, change)}}
                    vars(trial).update(values)
                    if all(holds for holds, _ in rules_of(trial)):
                        return {n: v for n, v in values.items() if v != getattr(args, n)}
        now = {name: max(min(3, sizes[name][0]), sizes[name][0] >> halvings) for name in names}
    return None


def candidates(sizes, name, metadata):
    """Whole numbers that may suit a flag, as [(distance, value)], the nearest first: powers of two,
    and divisors and near multiples of the other sizes and of the number of processes."""
    now = max(1, sizes[name])
    found = {2**k for k in range(31)}
    for n in {world_size(), *(max(1, sizes[other]) for other in sizes if other != name)}:
        small = [d for d in range(1, min(math.isqrt(n), 10_000) + 1) if n % d == 0]
        found.update(small, (n // d for d in small))
        found.update(n * q for q in range(max(1, now // n - 2), now // n + 4))
    fits = [v for v in found - {now} if metadata["least"] <= v <= (metadata["most"] or v)]
    return sorted((abs(math.log(v / now)), v) for v in fits)


# ==== Messages and errors ====


class UserError(Exception):
    """A mistake that the user can fix. `main` prints it as one line and exits with status 2."""

    def __str__(self):
        return shown(self.args[0])


def shown(text):
    """A text on one line, with letters that do not print escaped and what is long cut."""
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    text = re.sub(r"(\S{100})\S{60,}(\S{40})", r"\1...\2", text)
    return text if len(text) <= 1500 else f"{text[:1000]} ... {text[-400:]}"


def check(condition, message):
    """Raise UserError unless `condition` holds. The message names flag or file, fault, remedy."""
    if not condition:
        raise UserError(message)


def check_images(images):
    """Raise UserError unless images are uint8 [N, 3, H, W]."""
    right = images.dtype == torch.uint8 and images.dim() == 4 and images.shape[1] == 3
    check(right, f"images are {images.dtype} {list(images.shape)}; try torch.uint8 [N, 3, H, W]")


def say(text, stream="stdout"):
    """Print on rank 0."""
    if rank() == 0:
        STATUS.clear()
        write_words(getattr(sys, stream), f"{text}\n")


def warn(text):
    """Print one line on stderr, on rank 0. The run goes on."""
    say(shown(text), "stderr")


def write_words(stream, text):
    """Write to a stream (None: closed). The run goes on if it does not take the words."""
    encoding = getattr(stream, "encoding", None) or "utf-8"  # perhaps without a folder's letters
    try:
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        stream.flush()
    except Exception:  # `| head`, a full disk, an object of a program
        with contextlib.suppress(Exception), to_nowhere(stream.fileno()):
            stream.flush()  # else these words would fail again with the next


@contextlib.contextmanager
def to_nowhere(number_):
    """A context in which what is written to a file descriptor is lost."""
    kept, nowhere = os.dup(number_), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, number_)
    try:
        yield
    finally:
        os.dup2(kept, number_)
        os.close(kept)
        os.close(nowhere)


class StatusLine:
    """How far something is: a line that moves (in a log: one every 30 seconds)."""

    seconds, last, width = 30, time.monotonic(), 0  # width: 0 if the line does not show

    def overdue(self):
        """True if nothing was printed for 30 seconds."""
        return rank() == 0 and time.monotonic() - self.last >= self.seconds

    def show(self, text):
        """Show a text in the status line, in a log at most every 30 seconds."""
        notebook = type(sys.stdout).__module__.startswith("ipykernel")
        with contextlib.suppress(Exception):  # no terminal, but closed or an object of a program
            if rank() == 0 and (notebook or sys.stdout.isatty()):
                self.width = width = min(shutil.get_terminal_size().columns, 80) - 1
                write_words(sys.stdout, f"\r{text[:width]:{width}}")
                self.last = time.monotonic()
        if self.overdue():
            say(text)

    def clear(self):
        """Make room for other words."""
        if self.width:
            write_words(sys.stdout, f"\r{'':{self.width}}\r")
        self.width, self.last = 0, time.monotonic()


STATUS = StatusLine()


def said(items, count, what):
    """The items, while the status line says `what 3/10, 0m12s left`."""
    STATUS.last = started = time.monotonic()  # nothing is said about what takes no time
    for i, item in enumerate(items, 1):
        yield item
        left = (time.monotonic() - started) / i * (count - i)
        STATUS.show(f"{what} {i}/{count}, {format_seconds(left)} left")


def main(function, parse):
    """Call function(parse()) and exit. An expected error is one line on stderr and status 2."""
    for number_ in range(3):  # a file in the place of a closed stream would take its words
        try:
            os.fstat(number_)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    status, message = 2, ""
    try:
        function(parse())
        status = 0
    except UserError as error:
        message = f"error: {error}"
    except KeyboardInterrupt as error:  # with words if they are printed already
        status, message = 130, "" if error.args else "interrupted"
    except SystemExit as leave:  # after a signal, or by argparse (--help)
        status = leave.code or 0
    except (MemoryError, RuntimeError, OSError) as error:
        words = explanation(error)
        if not words:
            raise
        sys.unraisablehook = lambda _: None  # torch's half-made loaders fail once more as they go
        for process in multiprocessing.active_children():
            process.kill()
            with contextlib.suppress(RuntimeError):  # torch's, which hears that it was killed
                process.join()
        message = f"error: {words}"
    if message:
        if rank() > 0:
            time.sleep(3)  # the same error on rank 0 ends this process before it repeats the line
        STATUS.clear()
        write_words(sys.stderr, f"{os.path.basename(sys.argv[0])}: {message}\n")
    write_words(sys.stdout, "")
    if dist.is_initialized():
        if status:
            os._exit(status)  # sys.exit would wait for pending communication, perhaps for ever
        dist.destroy_process_group()
    sys.exit(status)


# Errors of the system, not bugs: what their type or text has, and a line about it.
EXPLANATIONS = {
    "OutOfMemoryError|CUDA error: out of memory|MPS backend out of memory|_ALLOC_FAILED":
        "out of GPU memory; try a smaller --batch-size or --precision bf16, or --stream if the "
        "images of a folder fill it",
    "MemoryError|can't allocate|[Cc]annot allocate memory|not enough memory":
        "out of memory; try a smaller --batch-size, --image-size, --views or --proj-dim",
    "Too many open files|ancdata|temporarily unavailable|can't start new thread":
        "too few file descriptors or processes; try `ulimit -n 4096`, or fewer --num-workers",
    "shared memory|</torch_|No space left":
        "/dev/shm is too small; try docker --shm-size=8g, or --num-workers 0, and --resume",
    ": DataLoader worker":
        "a loader process died, perhaps for lack of memory; try fewer --num-workers or a smaller "
        "--batch-size, and --resume",
}


def explanation(error):
    """One line about an error of the system, or an empty string if it may be a bug."""
    words = f"{type(error).__module__}.{type(error).__name__}: {' '.join(str(error).split())}"
    for pattern, line in EXPLANATIONS.items():
        if re.search(pattern, words):
            return line
    lost = re.search("Connection closed|Connection reset|Broken pipe|gloo|NCCL", words)
    if world_size() > 1 and lost:
        return (f"process {rank()} lost another process, whose own message says why; "
                "go on with --resume")
    if re.search(r"^torch\._(dynamo|inductor)|torch\.compile", words):
        return f"--compile does not work here ({words[:120]}); try it without --compile"
    return ""


# ==== Several processes ====

TORCHRUN = "start it with torchrun --nproc_per_node=N, or try `unset WORLD_SIZE RANK`"


def from_environment(name, otherwise):
    """The whole number in an environment variable, or `otherwise` if it holds none."""
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() and len(text) < 10 else otherwise


def check_launch():
    """Raise UserError if the environment tells of several processes, but not as torchrun does."""
    size, mine = os.environ.get("WORLD_SIZE", "1"), os.environ.get("RANK", "0")
    fits = size.isdecimal() and mine.isdecimal() and max(len(size), len(mine)) < 10
    check(fits and int(mine) < int(size) <= 4096, f"WORLD_SIZE={size} and RANK={mine} "
          f"in the environment do not fit; {TORCHRUN}")
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):  # of srun, mpirun
        tasks = from_environment(name, 1)
        check(tasks <= 1 or "RANK" in os.environ, f"{name}={tasks}: such tasks do not know of each "
              f"other; try --ntasks=1 with torchrun --nproc_per_node={tasks}")


def set_up_gpu():
    """This process's GPU as a torch.device. Raises UserError if there are fewer than processes."""
    own = torch.cuda.current_device()
    local_rank = from_environment("LOCAL_RANK", own) if world_size() > 1 else own
    gpus = torch.cuda.device_count()
    check(local_rank < gpus, "torchrun started more processes than there are GPUs; "
          f"try --nproc_per_node={gpus}")
    torch.cuda.set_device(local_rank)
    torch.backends.cudnn.benchmark = True  # all batches have the same size
    # Whitening in full fp32, whatever the environment says. Convolutions may use TF32.
    torch.set_float32_matmul_precision("highest")
    return torch.device("cuda", local_rank)


def other_device(wanted):
    """The CPU, or for one process an accelerator that is not CUDA, whose gaps the CPU fills until
    train() ends. Raises UserError if --device names another one."""
    found = "cpu"
    if wanted != "cpu" and world_size() == 1 and hasattr(torch, "accelerator"):  # from torch 2.6 on
        if torch.accelerator.is_available():
            found = torch.accelerator.current_accelerator().type
            for ending in ENDINGS[-1:]:
                ending.enter_context(LackingOnCPU())
    check(wanted in ("auto", found), f"--device {wanted}: torch finds none, or not for several "
          f"processes; try --device {found}")
    return torch.device(found)


class LackingOnCPU(TorchDispatchMode):
    """A context in which the CPU does what a device has not implemented, such as eigh."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        try:
            return function(*args, **kwargs or {})
        except NotImplementedError:
            device = next(x.device for x in args if torch.is_tensor(x))
            args = tree_map_only(torch.Tensor, torch.Tensor.cpu, args)
            found = function(*args, **kwargs or {})
            return tree_map_only(torch.Tensor, lambda x: x.to(device), found)


def join_processes(device):
    """Join the other processes that torchrun started. Raises UserError if they do not come."""
    wait = datetime.timedelta(seconds=15 if rank() else 30)  # all but rank 0 try twice
    try:
        with to_nowhere(2):  # torch itself writes pages about a master that does not answer
            store = next(dist.rendezvous("env://", timeout=wait))[0]
    except (RuntimeError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:100]
        raise UserError(f"WORLD_SIZE={world_size()} in the environment, but these processes do not "
                        f"meet ({reason}); {TORCHRUN}") from error
    timeout = datetime.timedelta(hours=3)  # rank 0 may download
    store.set_timeout(timeout)
    cuda = device.type == "cuda"
    dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None,
                            store=store, rank=rank(), world_size=world_size(), timeout=timeout)


class SumOverRanks(torch.autograd.Function):
    """The sum of a tensor over the W processes. Its gradient is the sum of their gradients.

    All compute the same loss, so that is W times its gradient. DistributedDataParallel divides by
    W: it averages."""

    @staticmethod
    def forward(ctx, x):
        return all_reduced(x)

    @staticmethod
    def backward(ctx, gradient):
        return all_reduced(gradient)


def all_reduced(x):
    """The sum of a tensor over the processes, without gradient."""
    x = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x)
    return x


def mean_over_ranks(x):
    """Mean of a tensor over the processes, without gradient; x itself if there is one process."""
    return all_reduced(x) / world_size() if dist.is_initialized() else x


class CPUSyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm of [n, c, ...] by the global batch. torch.nn.SyncBatchNorm refuses CPUs."""

    def _check_input_dim(self, x):
        pass

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        axes = [0, *range(2, x.dim())]  # all but the channels
        shape = [1, -1, *(1 for _ in axes[1:])]
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        count = x.numel() // x.shape[1] * world_size()
        mean = SumOverRanks.apply(exact.sum(axes)) / count
        centred = exact - mean.view(shape)
        variance = SumOverRanks.apply(centred.square().sum(axes)) / count
        if self.track_running_stats:
            unbiased = variance.detach() * count / (count - 1)
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.detach().to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        out = centred * torch.rsqrt(variance.view(shape) + self.eps)
        if self.affine:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out.to(x.dtype)


def synchronise_batch_norm(model):
    """Turn plain batch norms, in place, into those of the global batch."""
    kind = nn.SyncBatchNorm if next(model.parameters()).is_cuda else CPUSyncBatchNorm
    for module in model.modules():
        if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d):
            module.__class__, module.process_group = kind, None  # None: all processes


# ==== Data sets by name ====

# Mean and standard deviation of the colours, from the W-MSE code. Otherwise they are measured.
COLOUR_STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "stl10": ((0.43, 0.42, 0.39), (0.27, 0.26, 0.27)),
    "tinyimagenet": ((0.480, 0.448, 0.398), (0.277, 0.269, 0.282)),
}


def load_by_name(args, device):
    """A data set by its name as Data, downloaded if need be."""
    if rank() > 0 and dist.is_initialized():
        dist.barrier()  # rank 0 downloads first; if it fails, torchrun ends the others
    read = load_tinyimagenet if args.dataset == "tinyimagenet" else load_torchvision
    data = read(args, device)
    if rank() == 0 and dist.is_initialized():
        dist.barrier()
    return data


def load_torchvision(args, device):
    """cifar10, cifar100 or stl10 as Data, by torchvision's own classes."""
    kind = getattr(torchvision.datasets, args.dataset.upper())
    stl10 = args.dataset == "stl10"
    images, labels = [], []
    for split in ["train", "test", "unlabeled"] if stl10 else [True, False]:
        open_split = functools.partial(kind, args.data_dir, split)
        part = local_or_downloaded(args, kind.filename, open_split)
        images.append(part.data if stl10 else part.data.transpose(0, 3, 1, 2))  # [N, 3, H, W]
        labels.append(part.labels if stl10 else part.targets)
    return Data(args, device, train=images[0], labels=labels[0], test=images[1],
                test_labels=labels[1], class_names=part.classes,
                unlabeled=images[2] if stl10 else None)


def local_or_downloaded(args, archive, open_dataset):
    """open_dataset(download=False), or with True if the data is not there. Raises UserError."""
    try:
        with contextlib.suppress(RuntimeError):  # torchvision: "not found or corrupted"
            return open_dataset(download=False)
        say(f"{args.dataset}: not in {args.data_dir}, downloading it")
        return open_dataset(download=True)
    except Exception as error:  # of a network, an archive or a disk
        raise UserError(
            f"--dataset {args.dataset}: no complete copy in --data-dir {args.data_dir} and the "
            f"download failed ({error}); put {archive} there, "
            "or train offline with --dataset patterns") from error


def load_tinyimagenet(args, device):
    """Tiny ImageNet as Data: train/<wnid>/images/*, and val/images/* with their annotations."""
    root = os.path.join(args.data_dir, "tiny-imagenet-200")
    annotations = os.path.join(root, "val", "val_annotations.txt")

    def open_folder(download):
        if download:
            fetch = torchvision.datasets.utils.download_and_extract_archive
            fetch("http://cs231n.stanford.edu/tiny-imagenet-200.zip", args.data_dir)
        if not os.path.isfile(annotations):
            raise RuntimeError(f"no {annotations}")

    local_or_downloaded(args, "tiny-imagenet-200.zip", open_folder)
    skipped = collections.defaultdict(list)
    train = with_classes(root, "train", list_images(root, skipped), skipped)
    with open(annotations) as file:
        rows = csv.reader(file, delimiter="\t")
        test = [(os.path.join("val", "images", row[0]), row[1]) for row in rows if row]
    skipped.clear()  # what is not to be read, such as *_boxes.txt
    return data_from_files(args, device, root, train=train, test=test, skipped=skipped)


# ==== Folders of images ====

IMAGE_KINDS = torchvision.datasets.folder.IMG_EXTENSIONS
IGNORED = re.compile(r"\.|(__macosx|__pycache__|\$recycle\.bin|lost\+found|@eadir|"
                     r"system volume information|[@#]recycle)$", re.IGNORECASE)
SPLIT = re.compile("(train|test|val)(?:ing|id|idation)?")
# Beside a folder like train, these may be splits, too: train2017, seg_test, dev ...
LIKE_A_SPLIT = re.compile(
    r"(?:.*[^a-z])?(train|test|val|dev|eval|pred|infer|extra|unlabell?ed|hold.?out)"
    r"(?:ing|id|idation|uation|ict\w*|ence)?(?:set|data|[^a-z].*)?")


def load_folder(args, device, root, statistics=None):
    """Your images as Data: train/<class>/* with test or val, or <class>/*, or * without labels."""
    skipped = collections.defaultdict(list)
    paths = list_images(root, skipped)
    splits = find_splits(root, paths)
    for path in skipped.pop("labels.csv", ()):
        if os.path.dirname(path) not in ("", *splits.values()):
            warn(f"{os.path.join(root, path)} is not read; put one labels.csv into {root}")
    parts = {kind: with_classes(root, splits[kind], paths, skipped) for kind in splits}
    train, place, test, note = parts.pop("train"), os.path.join(root, splits["train"]), [], ""
    names = {name for _, name in train} - {None}
    check_classes(root, place, names)
    for kind in sorted(parts, key=lambda kind: (not (parts[kind] and parts[kind][0][1]), kind)):
        if parts[kind] and not test and (parts[kind][0][1] or not (names and args.test_fraction)):
            test, note = parts[kind], f" ({splits[kind]}/)"
        else:
            skipped[f"in {splits[kind]}/"] += parts[kind]
    labelled = {name for _, name in test} - {None}
    if labelled and not names:
        warn(f"the classes of the test images are not used: the images in {place} have none")
    strange = sorted(labelled - names if names else [])
    check(not strange, f"--data-dir {root}: {note[2:-1]}{listed(strange)} has no "
          f"counterpart in {place}; remove it, or add training images of it")
    data = data_from_files(args, device, root, train=train, test=test, skipped=skipped,
                           note=note, statistics=statistics)
    check_classes(root, place, data.class_names)
    return data


def check_classes(root, place, names):
    """Raise UserError if there is only one class."""
    inside = os.path.join(place, *names)
    remedy = f"try --data-dir {inside}" if os.path.isdir(inside) else "labels.csv needs another"
    check(len(names) != 1, f"--data-dir {root}: only one class, {[*names]}; {remedy}")


def list_images(root, skipped):
    """The images below root, sorted, relative to it. skipped: what is wrong -> such files."""
    found, seen, tops = [], set(), [root]

    def refuse(error):
        what = "cannot be read" if os.path.isdir(error.filename) else "is not a folder"
        raise UserError(f"--data-dir {error.filename} ({error.strerror}) {what}; "
                        "try the folder that holds your images")

    walk = itertools.chain.from_iterable(os.walk(top, onerror=refuse) for top in tops)
    for folder, inside, names in walk:
        real = os.path.join(os.path.realpath(folder), "")
        inside[:] = sorted(name for name in inside if not IGNORED.match(name))
        if real in seen or (folder != root and os.path.realpath(root).startswith(real)):
            skipped["link(s) to a folder that is read already"].append(folder)
            inside.clear()
            continue
        seen.add(real)
        tops += filter(os.path.islink, [os.path.join(folder, name) for name in inside])
        if "labels.csv" in names:
            names.remove("labels.csv")
            skipped["labels.csv"].append(os.path.relpath(os.path.join(folder, "labels.csv"), root))
        for name in itertools.filterfalse(IGNORED.match, names):
            path, kind = os.path.join(folder, name), os.path.splitext(name)[1].lower()
            if kind not in IMAGE_KINDS:
                why = f"of a kind that is not read ({shown(kind) or 'no extension'})"
                skipped[why].append(path)
            elif os.path.isfile(path):
                found.append(os.path.relpath(path, root))
            else:
                skipped["not a regular file"].append(path)
    return sorted(found)


def find_splits(root, paths):
    """{"train": its folder, "test": ..., "val": ...}, or {"train": ""} if folders are classes."""
    tops = sorted({path.split(os.sep)[0] for path in paths if os.sep in path})
    exact = [name for name in tops if SPLIT.fullmatch(name.lower())]
    splits = {SPLIT.match(name.lower())[1]: name for name in exact}
    if "train" in splits and len(splits) == len(tops):
        return splits
    like = {name: match[1] for name in tops if (match := LIKE_A_SPLIT.fullmatch(name.lower()))}
    kinds = set(like.values())
    clear = "train" not in kinds or kinds == {"train"}
    if exact:  # a class called train, which holds images
        clear = kinds == {"train"} and len(exact) == 1 and exact[0] in map(os.path.dirname, paths)
    check(clear, f"--data-dir {root}: {listed([*like])} may be training and test images or "
          "classes; leave only train, test and val there, or move all classes into "
          f"{os.path.join(root, 'train')}")
    return {"train": ""}


def with_classes(root, folder, paths, skipped):
    """[(path, its class or None)] of the images in root/folder: by labels.csv, or by folders."""
    base = os.path.join(folder, "")
    skipped["beside the splits"] = [path for path in paths if folder and os.sep not in path]
    mine = [path for path in paths if path.startswith(base)]
    for place in (folder, ""):
        if os.path.isfile(os.path.join(root, place, "labels.csv")):
            table = read_labels(root, place)
            skipped["not in labels.csv"] += [path for path in mine if path not in table]
            return [(path, table[path]) for path in mine if path in table]
    inner = {path[len(base):].split(os.sep)[1].lower() for path in mine
             if path[len(base):].count(os.sep) > 1}
    check(not {"train", "test"} <= inner, f"--data-dir {root}: train and test lie inside the class "
          "folders; move them up, as train/<class> and test/<class>")
    beside = [path for path in mine if os.path.dirname(path) == folder]
    inside = [path for path in mine if os.path.dirname(path) != folder]
    classes = [path[len(base):].split(os.sep)[0] for path in inside]
    if beside and len(set(classes)) < 2:
        return [(path, None) for path in mine]
    check(not beside or len(beside) < len(inside), f"--data-dir {root}: {len(beside)} images lie "
          f"beside the folders of {len(inside)} others; move either away")
    skipped["beside the class folders"] += beside
    return list(zip(inside, classes))


def read_labels(root, folder):
    """{path: class} of root/folder/labels.csv."""
    source, table = os.path.join(root, folder, "labels.csv"), {}
    try:
        with open(source, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            rows = [(reader.line_num, row) for row in reader if "".join(row).strip()]
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{source} cannot be read ({error}); save it as UTF-8 text") from error
    first = ",".join(rows[0][1]) if rows else ""
    check(first == "file,label", f"{source}: the first line is {first!r} and should be file,label")
    for line, row in rows[1:]:
        label, path = row[-1].strip(), row[0].strip().replace("\\", "/")
        path = os.path.relpath(os.path.join(root, folder, path), root)
        known = os.path.isfile(os.path.join(root, path)) and not path.startswith("..")
        check(known and len(row) == 2 and label and table.setdefault(path, label) == label,
              f"{source}, line {line}: {','.join(row)!r}: no such file, a second label for it, or "
              "not one label; try a line like image.png,cat")
    return table


def hold_out(args, images):
    """(rows to train on, rows held out): --test-fraction of each class, by a hash of seed and path,
    so that one file more does not move the others."""
    members, test = collections.defaultdict(list), set()
    for i, (path, name) in enumerate(images):
        key = f"{args.seed} {path}".encode(errors="surrogateescape")
        members[name].append((hashlib.sha256(key).digest(), i))
    for mine in members.values():
        count = min(len(mine) - 1, max(1, round(args.test_fraction * len(mine))))
        test.update(i for _, i in sorted(mine)[:count])
    return [i for i in range(len(images)) if i not in test], sorted(test)


# Bytes of images that a GPU keeps, or without one all processes of a machine together.
MEMORY_LIMIT = 6 * 2**30
warnings.filterwarnings("ignore", module=r"PIL\.")
warnings.filterwarnings("ignore", "This DataLoader will create")  # more loaders than cores


def data_from_files(args, device, root, train, test, skipped, note="", statistics=None):
    """Data from lists of (path, class or None). Images that fit there are decoded into memory once,
    others are Files. Raises UserError if there are too few."""
    median, scale, measured = survey(root, train, statistics)
    size = args.image_size = args.image_size or min(64, median)
    side = (statistics or {}).get("side") or (size if median <= size else math.ceil(size * 8 / 7))
    copies = 1 if device.type == "cuda" else from_environment("LOCAL_WORLD_SIZE", 1)
    stream = args.stream or 3 * side**2 * (len(train) + len(test)) * copies > MEMORY_LIMIT
    loaded = []
    for images in (train, test):
        paths = [os.path.join(root, path) for path, _ in images]
        kept = 0 if stream else side
        pixels, good = read_files(paths, kept, scale, args.num_workers, skipped)
        images[:] = [images[i] for i in good]
        loaded.append(pixels)
    words = in_words(skipped)
    check(len(train) > 1, f"--data-dir {root}: {'only one image' if train else 'no images'} to "
          f"train on; skipped: {words or 0}; try a folder of {' '.join(IMAGE_KINDS)}")
    for what in ("unreadable", "too large", "smaller than 8x8"):
        names = sorted(skipped[what])
        if names:
            warn(f"skipped {len(names)} {what}: {', '.join(names[:3])}")
    class_names = sorted({name for _, name in (*train, *test) if train[0][1]} - {None})
    gone = sorted({*class_names} - {name for _, name in train})
    if gone:
        warn(f"no training image of {listed(gone)} can be read: its test images count as errors")
    if class_names and not test and args.test_fraction:
        rows = hold_out(args, train)
        note = f" (held out: --test-fraction {args.test_fraction:g})" if rows[1] else ""
        loaded = [loaded[0][mine] for mine in rows]
        train, test = ([train[i] for i in mine] for mine in rows)
    if not stream:
        seen = {hash(image.tobytes()) for image in loaded[0].numpy()}
        same = sum(hash(image.tobytes()) in seen for image in loaded[1].numpy())
        if same:
            warn(f"{same} of {len(test)} test images are training images, too; remove them")
    number_of, parts = {name: i for i, name in enumerate(class_names)}, []
    for images, pixels in zip((train, test), loaded, strict=True):
        labels = [number_of[name] for _, name in images if name in number_of]
        paths = [os.path.join(root, path) for path, _ in images]
        part = Files(paths, size, side, scale) if stream else pixels
        parts += [part if images else None, labels or None]
    data = Data(args, device, *parts, class_names)
    crc = zlib.crc32(repr((train, test)).encode())
    data.fingerprint = f"{len(train)} files, {crc:08x}{measured if scale else ''}"
    data.statistics.update(scale=scale, side=side)
    data.files = [[path for path, _ in images] for images in (train, test)]
    data.test_note, data.notes = note, measured + (f"; skipped: {words}" if words else "")
    return data


def kind_of(image):
    """The kind of pixels of a Pillow image that is not loaded yet; None if Pillow misreads them."""
    decoder, tags = str(image.tile[:1]), getattr(image, "tag_v2", {})
    colours = re.search("RGBA?;16[LBN]", decoder)  # of 16 bits; their mode is RGB as of 8 bits
    if image.mode[0] not in "IF" and not colours:  # neither signed nor of 16 bits
        right = max(tags.get(258, (1,))) <= 8 and set(tags.get(339, (1,))) <= {1, 4}
        return "8 bits" if right and not re.search("(?<!BGR);16", decoder) else None
    if "transparency" in image.info or tags.get(262) == 0 or (colours and tags.get(284) == 2):
        return None  # a transparent colour; white as 0; planes
    return {"I": "32 bits", "F": "floats"}.get(image.mode, "16 bits")


def survey(root, train, statistics):
    """(median of the shorter sides, scale, words about both) of at most 200 images. The scale is
    that of `statistics`, if there are any: None for 8 bits, else [kind, low, high], where low and
    high become 0 and 255."""
    sides, kinds, values, rng = [], [], [], np.random.default_rng(0)
    for path, _ in train[:: len(train) // 200 + 1]:
        path = os.path.join(root, path)
        with contextlib.suppress(Exception), Image.open(path) as image:
            kind = kind_of(image)
            if kind and min(image.size) >= 8:
                kinds.append(kind)
                sides.append(min(image.size))
                if kind != "8 bits":
                    x = deep_pixels(path)[..., :3]
                    values.append(rng.choice(x[np.isfinite(x)], 10_000))
    sides, kind, scale = sorted(sides) or [8], max(kinds or ["8 bits"], key=kinds.count), None
    note = f" (median of sides {sides[0]} to {sides[-1]})" if sides[0] < sides[-1] else ""
    if kind != "8 bits":
        low, high, missing = grey_range(np.concatenate(values or [[0.0, 1.0]]))
        scale, without = [kind, low, high], f" without {listed(missing)}" if missing else ""
    scale = statistics["scale"] if statistics else scale
    if scale and kind != "8 bits":
        note += f"; {kind}{without}: {scale[1]:g} ... {scale[2]:g} became 0 ... 255"
    return sides[(len(sides) - 1) // 2], scale, note


def grey_range(x):
    """(low, high, missing): the 0.1 % and 99.9 % quantiles of x [n] without missing pixels.

    Such a number, -9999 or 65535, is further from the others (16 or more) than these reach."""
    def ends(x):
        return np.quantile(x, (0.001, 0.999), method="nearest").tolist()

    missing = []
    for which in (0, 1) * 3:  # low, high
        end = ends(x)[which]
        others = x[~np.isclose(x, end, rtol=1e-3, atol=0)]
        if len(np.unique(others)) >= 16:
            low, high = ends(others)
            if max(low - end, end - high) > high - low:
                missing.append(f"{end:g}")
                x = others
    low, high = ends(x)
    return low, high if low < high else low + max(1, abs(low) * 1e-6), missing


def deep_pixels(path):
    """The numbers of an image of more than 8 bits: float64 [H, W, channels]."""
    with Image.open(path) as image, Image.open(path) as swapped:
        unsigned = "I;32N" in str(image.tile)
        pixels = np.array(ImageOps.exif_transpose(image), dtype=np.float64)
        if unsigned:
            pixels[pixels < 0] += 2**32
        if pixels.ndim == 2:
            return pixels[..., None]
        # Of colours Pillow gives the high byte, and with the bytes swapped the low one.
        for i, tile in enumerate(swapped.tile):
            raw, *rest = (tile.args,) if isinstance(tile.args, str) else tile.args
            raw = raw[:-1] + ("L" if raw[-1] == "B" else "B")
            swapped.tile[i] = tile._replace(args=(raw, *rest))
        return 256 * pixels + np.array(ImageOps.exif_transpose(swapped))


def to_rgb(image, kind, scale):
    """The pixels of a Pillow image of a kind: uint8 [H, W, 3], transparent ones over white."""
    path, expected = image.filename, scale[0] if scale else "8 bits"
    check(kind == expected, f"{path} has pixels of {kind}, others or the run's {expected}, which "
          f"no one scale suits; convert it to {expected}")
    if scale:
        _, low, high = scale
        x = deep_pixels(path)
        check(np.isfinite(x).all(),
              f"{path} has pixels that are not finite (NaN); replace them or remove the file")
        colours = 255 * ((x[..., :3] - low) / (high - low)).clip(0, 1)
        if x.shape[2] == 4:
            colours = 255 + (colours - 255) * x[..., 3:] / 65535
        return np.rint(colours).astype(np.uint8).repeat(3 // colours.shape[2], 2)
    ImageOps.exif_transpose(image, in_place=True)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return np.array(image.convert("RGB"))


def read_image(path, scale=None, skipped=None):
    """An image as RGB uint8 [3, H, W], turned as its EXIF data say, over white where transparent.
    None if it cannot be used; then its path is added to skipped[why]."""
    why, skipped = "unreadable", collections.defaultdict(list) if skipped is None else skipped
    try:
        with Image.open(path) as image:
            kind = kind_of(image)
            if kind and min(image.size) >= 8:
                if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
                    skipped["file's further pages"].append(path)
                return torch.from_numpy(to_rgb(image, kind, scale)).permute(2, 0, 1)
            why = "smaller than 8x8" if kind else why
    except (MemoryError, UserError):
        raise
    except Image.DecompressionBombError:
        why = "too large"
    except Exception:  # decoders raise errors of all kinds
        pass
    skipped[why].append(path)
    return None


def to_square(image, side):
    """The square in the centre, resized: uint8 [3, H, W] -> [3, side, side]."""
    square = functional.center_crop(image, min(image.shape[1:]))
    return functional.resize(square, [side, side], antialias=True)


def read_files(paths, side, scale, num_workers, skipped):
    """(images that can be read, uint8 [N, 3, side, side], their rows). side 0 keeps no pixels."""
    def read(path):
        image = read_image(path, scale, skipped)
        return to_square(image, side) if side and image is not None else image

    images, good = torch.empty(len(paths), 3, side, side, dtype=torch.uint8), []
    with multiprocessing.pool.ThreadPool(max(1, num_workers)) as pool:
        found = said(pool.imap(read, paths, 16), len(paths), "reading images")
        for i, image in enumerate(found):
            if image is not None:
                if side:
                    images[len(good)] = image
                good.append(i)
    return images[: len(good)], good


def listed(names):
    """At most five names, in one line."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(shown(name)[:60] for name in names[:5]) + more


def in_words(skipped):
    """`3 unreadable, 1 smaller than 8x8`"""
    counts = sorted(((len(paths), what) for what, paths in skipped.items() if paths), reverse=True)
    return listed([f"{count} {what}" for count, what in counts])


def found_in_words(data):
    """`40 training images in 2 classes, 16 test images (test/), 32x32`"""
    classes = f" in {len(data.class_names)} classes"
    if data.train_labels is None:
        classes = " without labels"
    elif len(data.labelled_train) < data.images_found:
        classes = f", {len(data.labelled_train)} of them{classes}"
    images = data.images_found
    if len(data.train) < images:
        images = f"{len(data.train)} of {images}"
    test = "no" if data.test is data.labelled_train else len(data.test)
    return (f"{images} training images{classes}, {test} test images{data.test_note}, "
            f"{data.size}x{data.size}{data.notes}")


# ==== Streaming ====


class Files:
    """Images on the disk, read and cropped by loader processes that stay for the run."""

    def __init__(self, paths, size, side, scale=None):
        """size: of a view; side: of the squares for measuring; in pixels. scale: see survey."""
        self.paths, self.size, self.side, self.scale = paths, size, side, scale
        self.rows = torch.arange(len(paths))  # which of the paths
        self.pin_memory = False
        self.idle = []  # loaders without work

    def __len__(self):
        return len(self.rows)

    def part(self, index):
        """The images `index` as Files."""
        part = copy.copy(self)
        part.rows = self.rows[index]
        return part

    def __getitem__(self, task):
        """In a loader process: a task of crops() -> the views, (image,) -> its centre square."""
        index, *draw = task
        path = self.paths[index]
        image = read_image(path, self.scale)
        check(image is not None, f"{path} vanished or broke; put it back and go on with "
              "--resume, or train afresh with another --out")
        if not draw:
            return to_square(image, self.side)
        step, row, views, seed = draw
        out = []
        for number_of_view, view in enumerate(views):
            crop = next((op for op in view if op[0] == "crop"), None)
            rng = np.random.default_rng((seed, 2, step, number_of_view, row))
            out.append(crop_one(image, crop, self.size, rng))
        return out

    def crops(self, batches, args, first_step, device):
        """For each row of `batches` [steps, n] a list of views, uint8 [n, 3, size, size]. The crop
        is drawn from (seed, step, view, row of the global batch)."""
        recipe, first = RECIPES[args.augment], rank() * batches.shape[1]
        recipe = [recipe[v % len(recipe)] for v in range(args.views)]
        tasks = ([(image, step, first + i, recipe, args.seed) for i, image in enumerate(images)]
                 for step, images in enumerate(self.rows[batches].tolist(), first_step))
        for views in self.read(tasks, args.num_workers):
            yield [view.to(device, non_blocking=view.is_pinned()) for view in views]

    def centres(self, index, batch_size, num_workers):
        """Centre squares of the images `index`: yields uint8 [n, 3, side, side]."""
        parts = self.rows[index].split(batch_size)
        yield from self.read(([(i,) for i in part.tolist()] for part in parts), num_workers)

    def read(self, tasks, num_workers):
        """The results of lists of tasks. A UserError comes without a process's traceback."""
        if not self.idle:
            place = tempfile.gettempdir()  # torch's sockets there have names of 107 bytes at most
            check(num_workers == 0 or len(os.fsencode(place)) <= 70, f"TMPDIR={place} is too long "
                  "for loader processes; try TMPDIR=/tmp or --num-workers 0")
            alone = copy.copy(self)
            alone.idle = ()  # else a cycle, for whose end torch waits 5 s
            self.idle.append(torch.utils.data.DataLoader(
                alone, batch_sampler=Tasks(), num_workers=num_workers,
                persistent_workers=num_workers > 0, pin_memory=self.pin_memory,
                worker_init_fn=leave_signals))
            at_end(functools.partial(end_processes, self.idle))
        loader = self.idle.pop()
        loader.batch_sampler.tasks = tasks
        try:
            yield from loader
        except UserError as error:
            raise UserError(error.args[0].split("UserError: ")[-1].strip()) from None
        finally:
            self.idle.append(loader)


def end_processes(loaders):
    """End the processes of loaders. For those in a traceback, torch would wait 20 s."""
    while loaders:
        iterator = loaders.pop()._iterator
        if iterator is not None:
            iterator._shutdown_workers()


class Tasks:
    """A batch sampler whose lists of tasks are given anew for each epoch."""

    def __iter__(self):
        return iter(self.tasks)


def leave_signals(_worker):
    """Let a loader process outlive signals, SIGTERM by 5 s, until the run is saved."""
    for number_ in STOP_SIGNALS:
        signal.signal(number_, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: threading.Timer(5, os._exit, (0,)).start())


def crop_one(image, crop, size, rng):
    """A random crop, or the centre if crop is None: uint8 [3, H, W] -> [3, size, size]."""
    if crop is None:
        return to_square(image, size)
    _, least, most, name = crop
    box = draw_boxes(1, *image.shape[1:], least, most, rng)[0].tolist()
    interpolation = torchvision.transforms.InterpolationMode(name)
    return functional.resized_crop(image, *box, [size, size], interpolation, antialias=True)


# ==== Recipes of augmentation ====

FLIP = ("flip", 0.5)  # probability
CROP = ("crop", 0.2, 1.0, "bilinear")  # smallest and largest share of the area, interpolation
WIDE_CROP = ("crop", 0.08, 1.0, "bilinear")
BICUBIC_CROP = ("crop", 0.2, 1.0, "bicubic")
WIDE_BICUBIC_CROP = ("crop", 0.08, 1.0, "bicubic")
BLUR = ("blur", 0.5, 0.1, 2.0)  # probability, smallest and largest sigma in pixels
JITTER = ("jitter", 0.4, 0.4, 0.4, 0.1, 0.8)  # brightness, contrast, saturation, hue; probability
SOFT_JITTER = ("jitter", 0.4, 0.4, 0.2, 0.1, 0.8)
GREY = ("grey", 0.2)  # probability

# name -> views -> operations, in order. Further views start again at the first listed one.
RECIPES = {
    # W-MSE, CW-RGP (htdt/self-supervised). If images are in memory, colours come before the crop.
    "w-mse": [(JITTER, ("grey", 0.1), BICUBIC_CROP, FLIP)],
    # MoCo v2 2003.04297, SimSiam 2011.10566
    "moco-v2": [(CROP, JITTER, GREY, BLUR, FLIP)],
    # MoCo v1 1911.05722
    "moco-v1": [(CROP, GREY, ("jitter", 0.4, 0.4, 0.4, 0.4, 1.0), FLIP)],
    # the MoCo authors' CIFAR-10 demo
    "moco-cifar": [(WIDE_CROP, FLIP, JITTER, GREY)],
    # SimSiam App. D, Shuffled-DBN: MoCo v2 without blur
    "simsiam-cifar": [(CROP, JITTER, GREY, FLIP)],
    # SimCLR 2002.05709 App. A, google-research/simclr
    "simclr": [(WIDE_BICUBIC_CROP, FLIP, ("jitter", 0.8, 0.8, 0.8, 0.2, 0.8), GREY, BLUR)],
    # the same on CIFAR-10: colour strength 1/2 without blur
    "simclr-cifar": [(WIDE_BICUBIC_CROP, FLIP, JITTER, GREY)],
    # BYOL 2006.07733 App. B, Barlow Twins, VICReg
    "byol": [
        (WIDE_BICUBIC_CROP, FLIP, SOFT_JITTER, GREY, ("blur", 1.0, 0.1, 2.0), ("solarize", 0.0)),
        (WIDE_BICUBIC_CROP, FLIP, SOFT_JITTER, GREY, ("blur", 0.1, 0.1, 2.0), ("solarize", 0.2)),
    ],
    # VICReg on CIFAR-10 (vturrisi/solo-learn)
    "vicreg-cifar": [(BICUBIC_CROP, SOFT_JITTER, GREY, ("solarize", 0.1), FLIP)],
    # ours, for runs of minutes: W-MSE's with larger crops
    "short": [(JITTER, ("grey", 0.1), ("crop", 0.35, 1.0, "bicubic"), FLIP)],
    "crop-flip": [(CROP, FLIP)],
    "colour-flip": [(JITTER, ("grey", 0.1), FLIP)],
    "none": [()],
}


def check_crops(args, data):
    """Raise UserError if images of another size than a view are not cropped."""
    crops = all(any(op[0] == "crop" for op in view) for view in RECIPES[args.augment])
    check(crops or not data.must_be_cropped,
          f"--augment {args.augment} does not crop, and the images are not of --image-size "
          f"{data.size}; try --augment crop-flip, or such images")


def blur(x, sigma):
    """Gaussian blur of x [n, 3, S, S] with sigma [n] in pixels, as in SimCLR's code.

    Reflected borders, odd kernel of 10 % of the side. Pillow (MoCo, Barlow Twins) does not cut the
    kernel: the same at 224 pixels, but at 32 a sigma of 2 acts like 0.8 here."""
    side = x.shape[-1]
    pixel = torch.arange(side, device=x.device)
    t = torch.arange(-(side // 20), side // 20 + 1, device=x.device)
    kernel = torch.exp(-0.5 * (t / sigma[:, None]) ** 2)
    kernel = kernel / kernel.sum(1, keepdim=True)  # [n, taps]
    # Pixel i sees pixel i + t, mirrored at both edges, whose pixels are not repeated.
    seen = side - 1 - (side - 1 - (pixel[:, None] + t).abs()).abs()  # [S, taps]
    sees = (seen[:, :, None] == pixel).to(kernel.dtype)  # [S, taps, S]
    band = torch.einsum("nt,itj->nij", kernel, sees)[:, None]  # [n, 1, S, S]
    return band @ x @ band.mT


# ==== ResNets, Vision Transformer, LARS, Muon ====


def check_backbone(name):
    """Raise UserError if there is no such backbone."""
    names = ["tiny", "vit_tiny", *torchvision.models.list_models(include="resnet*")]
    check(name in names, f"--backbone {name} is unknown; try {', '.join(names)}")


def build_resnet(name, image_size):
    """(network, feature_dim) of torchvision's ResNet `name`. Raises UserError if there is none.

    The last batch norm of a block starts at zero (SimSiam, Barlow Twins, VICReg, CW-RGP code). The
    stem is SimCLR's (appendix B.9) and the W-MSE code's."""
    check_backbone(name)
    network = torchvision.models.get_model(name, weights=None, zero_init_residual=True)
    if image_size <= 64:
        network.conv1 = nn.Conv2d(3, 64, 3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    if image_size <= 32:
        network.maxpool = nn.Identity()
    feature_dim = network.fc.in_features
    network.fc = nn.Identity()
    return network, feature_dim


def build_vit(image_size, width):
    """torchvision's VisionTransformer of 3 layers; H is its class token. Raises UserError if its
    patches do not fit."""
    patch = 4 if image_size <= 32 else 8 if image_size <= 64 else 16
    check(image_size % patch == 0, f"--image-size {image_size} is no multiple of vit_tiny's patch, "
          f"{patch}; try --image-size {image_size - image_size % patch}")
    network = torchvision.models.VisionTransformer(
        image_size, patch, num_layers=3, num_heads=3, hidden_dim=width, mlp_dim=2 * width)
    network.heads = nn.Identity()
    network.conv_proj.__class__ = PatchConv2d
    return network


class PatchConv2d(nn.Conv2d):
    """In bfloat16 on a CPU, its weights' gradient is one matrix product over all patches: oneDNN's
    takes up to three times as long, and beside another program its threads wait for each other."""

    def forward(self, x):
        plain = (self.groups, self.dilation, self.padding_mode) == (1, (1, 1), "zeros")
        pairs = self.kernel_size, self.stride, self.padding
        square = all(pair == pair[:1] * 2 for pair in pairs)
        autocast = x.device.type == "cpu" and x.dim() == 4 and torch.is_autocast_enabled("cpu")
        if not (plain and square and autocast and x.dtype != torch.float64
                and torch.get_autocast_dtype("cpu") == torch.bfloat16):
            return super().forward(x)
        x, weight = x.bfloat16(), self.weight.bfloat16()
        y = PatchConvolution.apply(x, weight, self.stride[0], self.padding[0])
        return y if self.bias is None else y + self.bias.bfloat16()[:, None, None]


class PatchConvolution(torch.autograd.Function):
    """Of x [n, c, H, W] and weight [filters, c, k, k] -> [n, filters, h, w]."""

    @staticmethod
    def forward(ctx, x, weight, stride, padding):
        ctx.save_for_backward(x, weight)
        ctx.sizes = stride, padding
        return F.conv2d(x, weight, None, stride, padding)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        (stride, padding), (filters, c, k, _) = ctx.sizes, weight.shape
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = nn.grad.conv2d_input(x.shape, weight, gradient, stride, padding)
        patches = F.pad(x, 4 * (padding,)).unfold(2, k, stride).unfold(3, k, stride).movedim(1, 5)
        gradient = gradient.movedim(1, 3).flatten(0, 2)  # [n h w, filters]
        grad_weight = gradient.T @ patches.flatten(3).flatten(0, 2)  # [n h w, k k c]
        return grad_x, grad_weight.view(filters, k, k, c).movedim(3, 1), None, None


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose step is scaled layer by layer (You et al. 2017, arXiv 1708.03888).

    As in Barlow Twins, VICReg and BYOL, the update, gradient + weight_decay * w, is scaled by
    trust * |w| / |update|. Groups marked "excluded" (biases, norm layers) have neither decay nor
    scaling."""

    def __init__(self, params, lr, weight_decay=0.0, momentum=0.9, trust=0.001):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum,
                                  "trust": trust, "excluded": False})

    @torch.no_grad()
    def step(self):
        """Update the weights by their gradients."""
        for group in self.param_groups:
            for w in group["params"]:
                if w.grad is None:
                    continue
                update = w.grad
                if not group["excluded"]:
                    update = update + group["weight_decay"] * w
                    norm, update_norm = w.norm(), update.norm()
                    defined = (norm > 0) & (update_norm > 0)
                    ratio = group["trust"] * norm / update_norm
                    update = update * torch.where(defined, ratio, 1.0)
                velocity = self.state[w].setdefault("velocity", torch.zeros_like(w))
                velocity.mul_(group["momentum"]).add_(update)
                w.add_(velocity * -group["lr"])


class Muon(torch.optim.Adam):
    """Adam, except that groups marked "filters" step along orthogonal directions.

    Jordan et al. 2024, kellerjordan.github.io/posts/muon. With one row of w per filter:

        average = momentum * average + (1 - momentum) * gradient
        U = orthogonalise(momentum * average + (1 - momentum) * gradient)
        w *= sqrt(filters) / |w|
        w -= lr * U

    A norm layer follows every convolution, so only a filter's direction matters. Its length is
    kept, without decay; lr is about the share of it that a filter moves. All but lr is as in the
    authors' CIFAR-10 code (airbench94_muon)."""

    def __init__(self, params, lr, weight_decay=0.0, momentum=0.6, dtype=torch.float32):
        super().__init__(params, lr=lr, weight_decay=weight_decay, fused=True)
        self._step_supports_amp_scaling = False  # so a GradScaler can skip a step
        self.momentum, self.dtype = momentum, dtype

    @torch.no_grad()
    def step(self):
        """Update the weights by their gradients."""
        groups = self.param_groups
        for group in groups:
            for w in group["params"]:
                if group["filters"] and w.grad is not None:
                    self.step_filters(w, group["lr"])
        self.param_groups = [group for group in groups if not group["filters"]]
        try:
            super().step()  # Adam's
        finally:
            self.param_groups = groups

    def step_filters(self, w, lr):
        """The step of one convolution's filters w [filters, channels, height, width]."""
        state = self.state[w]
        if not state:
            state["step"] = torch.zeros(())  # Adam expects it when a checkpoint is loaded
            state["average"] = torch.zeros_like(w)
        state["average"].lerp_(w.grad, 1 - self.momentum)
        update = w.grad.lerp(state["average"], self.momentum).flatten(1)  # [filters, c * h * w]
        w.mul_(math.sqrt(len(w)) / w.norm().clamp_min(1e-7))
        w.sub_(lr * orthogonalise(update.to(self.dtype)).view(w.shape))


def orthogonalise(m, iterations=3):
    """Roughly U V^T of m = U S V^T, by matrix products only: [r, c] -> [r, c].

    Newton-Schulz (Jordan et al. 2024). Three iterations take every singular value above a fiftieth
    of |m| to between 0.68 and 1.202."""
    x = m.T if len(m) > m.shape[1] else m
    x = x / x.norm().clamp_min(1e-7)  # singular values at most 1
    gram = x @ x.T
    product = identity = torch.eye(len(x), dtype=x.dtype, device=x.device)
    for _ in range(iterations):
        # factor @ x has the singular values 3.4445 s - 4.7750 s^3 + 2.0315 s^5.
        factor = 3.4445 * identity - 4.7750 * gram + 2.0315 * gram @ gram
        gram = factor @ gram @ factor  # the Gram matrix of factor @ x
        product = factor @ product
    x = product @ x  # once: the iterations need only the small matrices
    return x.T if len(m) > m.shape[1] else x


# ==== Run folder and signals ====

CHECKPOINT_FORMAT = "nine-ssl-methods-4"
# Flags that may change on --resume. But for epochs (the schedule), compile (rounding) and device
# (the permutations that a GPU draws) they do not change the numbers.
FREE_ON_RESUME = {"epochs", "out", "resume", "device", "num_workers", "log_every", "save_every",
                  "keep_every", "compile", "data_dir", "given", "init"}

STOP_SIGNALS = [number_ for number_ in signal.Signals if number_.name in
                ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")]  # of clusters


class StopSignals:
    """Notes Ctrl-C, SIGTERM and the like, so that the run can save before it stops."""

    def __init__(self, args, device):
        self.args, self.device = args, device
        self.number = 0  # of the signal that came
        self.before = {}  # signal -> its handler before this run
        at_end(self.give_back)
        if threading.current_thread() is not threading.main_thread():
            return  # Python would refuse
        for number_ in STOP_SIGNALS:
            handler = signal.getsignal(number_)  # None: C code has set it
            ignored = handler == signal.SIG_IGN and number_ != signal.SIGINT  # as under nohup
            if handler is not None and not ignored:
                self.before[number_] = handler
                signal.signal(number_, self.note)

    def note(self, number_, _frame):
        """Called by Python when a signal comes. A second Ctrl-C ends at once."""
        self.number = number_
        if number_ == signal.SIGINT and world_size() == 1:  # torchrun itself repeats it
            signal.signal(number_, self.before[number_])

    def came(self, step):
        """True after a signal; under torchrun all agree every --log-every steps."""
        if dist.is_initialized():
            if step % self.args.log_every:
                return False
            number_ = torch.tensor(self.number, device=self.device)
            dist.all_reduce(number_, dist.ReduceOp.MAX)
            self.number = int(number_)
        return self.number != 0

    def leave(self, step, total_steps):
        """End after a signal. Ctrl-C is a KeyboardInterrupt, so that a notebook lives on."""
        if dist.is_initialized():
            dist.barrier()  # until rank 0 has saved: torchrun ends all when the first one leaves
        out = " " + as_flags({"out": self.args.out}) if self.args.out else ""
        words = f"stopped after step {step} of {total_steps}; go on with --resume{out}"
        say(words)
        if self.number == signal.SIGINT:
            raise KeyboardInterrupt(words)
        sys.exit(128 + self.number)

    def give_back(self):
        """Put the handlers back that were there before."""
        for number_, handler in self.before.items():
            signal.signal(number_, handler)
        self.before = {}


def open_folder(args):
    """(the run's folder, its lock file on rank 0). Raises UserError if it holds a run, is in use or
    cannot be written."""
    folder = lock = None
    if rank() == 0:
        for folder in candidate_folders(args):
            if args.resume:
                refuse_strangers(folder)
            lock = lock_folder(folder)
            if lock and (args.resume or not is_taken(folder)):  # another may just have ended
                at_end(lock.close)
                break
            lock = None
        check(lock,
              f"--out {folder} is in use by another run; wait for it, or try another --out")
    if dist.is_initialized():
        box = [folder]
        dist.broadcast_object_list(box)
        (folder,) = box
    return folder, lock


def run_name(args):
    """The method in a dict of args, and the experiment if there is one: "byol/group-norm"."""
    return "/".join(filter(None, (args["method"], args["experiment"])))


def candidate_folders(args):
    """--out, or runs/<method>-<dataset>-s<seed> and the same with -2, -3, ... after the last run;
    with --resume the last that was started. Raises UserError if --out holds a run."""
    name = run_name(vars(args)).replace("/", "-")
    base = os.path.join("runs", f"{name}-{args.dataset}-s{args.seed}")
    candidates = [args.out] if args.out else [base, *(f"{base}-{i}" for i in range(2, 1000))]
    if args.resume:
        started = [path for path in candidates if holds_run(path, "config.json")]
        return started[-1:] or candidates[:1]
    taken = [i for i, path in enumerate(candidates) if is_taken(path)]
    if args.out and taken:
        remedy = "add --resume to go on with it, or " if holds_run(args.out) else ""
        other = as_flags({"out": os.path.normpath(args.out) + "-2"})
        raise UserError(f"--out {args.out} already holds a run; {remedy}try {other}")
    return candidates[max(taken, default=-1) + 1:]


def holds_run(folder, *more):
    """True if the folder has a checkpoint, or one of `more` files."""
    names = "last.pt", "previous.pt", *more
    return any(os.path.isfile(os.path.join(folder, name)) for name in names)


def is_taken(folder):
    """True if the folder has files of a run, or a config.json of none: without a lock beside it."""
    names = []
    with contextlib.suppress(OSError):
        names = os.listdir(folder)
    kept = re.compile(r"(last|previous|backbone|epoch-\d+)\.pt|metrics\.csv")
    return any(map(kept.fullmatch, names)) or ("config.json" in names and "lock" not in names)


def lock_folder(folder, name="--out"):
    """A folder's lock file, held until closed; None if another process has it. Raises UserError."""
    try:
        os.makedirs(folder, exist_ok=True)
        file = open(os.path.join(folder, "lock"), "a+b", buffering=0)  # a FIFO would wait in "w"
    except OSError as error:
        raise UserError(f"{name} {folder}: cannot write there ({error.strerror}); "
                        f"try another {name}") from error
    try:
        import fcntl  # not on Windows

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (PermissionError, BlockingIOError):
        return None
    except (OSError, ImportError) as error:
        reason = getattr(error, "strerror", error)
        warn(f"{folder} cannot be locked ({reason}): start no second run in it")
    return file


def stop_non_finite(step, what, data, folder):
    """Raise UserError about a number that is not finite, with its likely cause."""
    args, cause = data.args, "the weights diverged or an input is not finite"
    usual = {"lr": type(args).lr, "lr_bias": type(args).lr, "lr_filters": 0.1}
    rate = max(usual, key=lambda name: (getattr(args, name) or 0) / usual[name])
    remedy = f"a smaller {option_of(rate)} or a longer --warmup"
    whitens = what == "the whitening" or hasattr(args, "eps") or hasattr(args, "groups")
    if whitens and not what.startswith("the output"):
        count = identical_images(data, step)
        cause = "the embeddings do not fill their space, or the learning rate is too high"
        if count:
            cause = f"{count} of the batch's {args.batch_size} images are identical"
            remedy = "it without them"
        if hasattr(args, "eps"):
            remedy = f"--eps {min(max(1e-3, 10 * args.eps), 0.5):g}, or {remedy}"
    kept = "the last good checkpoint stays" if holds_run(folder) else "there is no checkpoint yet"
    raise UserError(f"step {step}: {what} is not finite; likely cause: {cause}: try {remedy}; "
                    f"{folder}: {kept}")


def identical_images(data, step):
    """How many images of a step's global batch equal another."""
    epoch, number = divmod(step, data.steps_per_epoch)
    order = np.random.default_rng((data.args.seed, 1, epoch)).permutation(len(data.train))
    rows = torch.from_numpy(order).split(data.args.batch_size)[number]
    views = torch.cat([part.cpu().flatten(1) for part in data.eval_views(data.train, rows, 100)])
    counts = views.unique(dim=0, return_counts=True)[1]
    return int(counts[counts > 1].sum())


# ==== Resume ====


def check_same_step(run, checkpoint):
    """Raise UserError unless all processes have the same checkpoint (a dict or None)."""
    if dist.is_initialized():
        step = checkpoint["step"] if checkpoint else 0
        largest_smallest = torch.tensor([step, -step], device=run.data.device)
        dist.all_reduce(largest_smallest, dist.ReduceOp.MAX)
        check(largest_smallest.sum() == 0,
              f"--out {run.folder} must lie on a disk that all machines share")


def check_same_run(run, checkpoint):
    """Raise UserError if flags, images or method differ from those of the checkpoint."""
    before, now = checkpoint["args"], vars(run.args)
    check(run_name(before) == run_name(now), f"--resume: {run.folder} is a run of "
          f"{run_name(before)}, not of {run_name(now)}; try another --out")
    for name in [name for name in now if name not in FREE_ON_RESUME]:  # optimizer before its rates
        flag, value = option_of(name), before.get(name)
        remedy = f"it with{'' if value else 'out'} {flag}"
        if not isinstance(value, (bool, type(None))):
            remedy = f"{flag} {value}"
        check(value == now[name], f"--resume: {flag} was {value} and is now {now[name]}; "
              f"try {remedy}, or another --out")
    held, holds = checkpoint["data"], run.data.fingerprint
    old, new = checkpoint["data_statistics"], run.data.statistics
    same = all(old[name] == new[name] for name in ("scale", "class_names"))
    same &= np.allclose(old["mean"] + old["std"], new["mean"] + new["std"], rtol=1e-3)  # rounding
    check(same and held == holds, f"--resume: --data-dir holds other images than before ({holds}, "
          f"then {held}); restore them, or try another --out")
    check(checkpoint["step"] <= run.total_steps, f"--resume: --epochs {now['epochs']} is fewer "
          f"than already trained; try --epochs {before['epochs']}")


def restore(run, checkpoint):
    """Put a run into the state of a checkpoint (a dict or None). Returns its step, or 0. Raises
    UserError if the method's file has changed and its model with it."""
    if checkpoint is None:
        say(f"no checkpoint in {run.folder}: starting afresh")
        return 0
    run.last_is_good = checkpoint["file"] == "last.pt"
    try:
        run.model.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"--resume: {run.folder} is of another model ({reason}); try the method's "
                        "file that it was trained with, or another --out") from error
    check_response(run.model.backbone, checkpoint, f"--resume: {run.folder}")
    run.optimizer.load_state_dict(checkpoint["optimizer"])
    run.loss_sum.copy_(checkpoint["loss_sum"])
    run.rows = checkpoint["rows"]
    run.clock.run_before = checkpoint["seconds"]
    run.clock.epoch_before = checkpoint["epoch_seconds"]
    if rank() == 0:
        write_metrics(run.folder, run.rows)  # without rows after the checkpoint or a torn line
    before, now, longer = checkpoint["args"]["epochs"], run.args.epochs, ""
    if before != now:
        longer = f"; {before} epochs before, {now} now, so the schedule is different"
    step = checkpoint["step"]
    say(f"going on with {run.folder} after step {step} of {run.total_steps}{longer}")
    return step


def load_last(folder):
    """The newest readable checkpoint of a run folder, with its name under "file", or None. A
    warning names a damaged one. Raises UserError if there are only such."""
    faults = []
    for name in ("last.pt", "previous.pt"):
        path = os.path.join(folder, name)
        if os.path.lexists(path):
            try:
                checkpoint = load_checkpoint(path)
            except UserError as error:
                faults.append(str(error).rsplit("; try", 1)[0])
                continue
            if faults:
                warn(f"{faults[0]}; using {path} (step {checkpoint['step']}) instead")
            return {**checkpoint, "file": name}
    check(not faults, f"{' '.join(faults[:1])}; no older checkpoint is readable: "
          "train again with another --out")
    refuse_strangers(folder)
    return None


def refuse_strangers(folder):
    """Raise UserError if a folder without a checkpoint has files that a run would overwrite."""
    check(holds_run(folder) or not is_taken(folder), f"{folder} has files of a run, but no "
          "last.pt; put it back, or try another folder")


def save_checkpoint(path, checkpoint, keep_as=None):
    """Write a dict as torch.save does, and behind it the SHA-256 of that. Raises UserError."""
    buffer = io.BytesIO()
    torch.save({"format": CHECKPOINT_FORMAT, **checkpoint}, buffer)
    buffer.write(hashlib.sha256(buffer.getvalue()).digest())
    write_file(path, buffer.getvalue(), keep_as=keep_as)


def load_checkpoint(path):
    """What save_checkpoint wrote. Nothing in the file is executed (weights_only). Raises UserError
    if it is something else, or damaged or edited: the SHA-256 does not fit."""
    check(os.path.isfile(path), f"{path}: no such file; try runs/<run>/last.pt")
    try:
        with open(path, "rb") as file:
            content = file.read()
        if hashlib.sha256(content[:-32]).digest() != content[-32:]:
            raise ValueError
        checkpoint = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if checkpoint["format"] != CHECKPOINT_FORMAT:
            raise ValueError
        return checkpoint
    except Exception as error:  # torch raises many kinds
        reason = f" ({error.strerror})" if getattr(error, "strerror", None) else ""
        raise UserError(f"{path} is no checkpoint of these scripts, or it is damaged or edited"
                        f"{reason}; try a run's folder") from error


# ==== Files of a run ====


def write_file(path, content, keep_as=None):
    """Write bytes to a temporary name, flush, rename; keep the old file as `keep_as`. Raises
    UserError if that fails. The old file then stays."""
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
            if keep_as and not os.path.exists(path):
                os.replace(keep_as, path)
        raise UserError(f"{path} could not be written ({error.strerror}); what was there before "
                        "stays; make room there or try another place") from error


def keep_checkpoint(folder, epoch, every):
    """Copy last.pt to epoch-NNNN.pt if --keep-every wants this epoch's. Raises UserError."""
    if every > 0 and epoch % every == 0:
        with open(os.path.join(folder, "last.pt"), "rb") as file:
            write_file(os.path.join(folder, f"epoch-{epoch:04d}.pt"), file.read())


def write_metrics(folder, rows):
    """Write metrics.csv. rows: dicts by column; a column that a row lacks is left empty."""
    timing = ["images_per_s", "seconds"]  # the last columns: all others depend on the seed alone
    names = dict.fromkeys(name for row in rows for name in row if name not in timing)
    text = io.StringIO()
    writer = csv.DictWriter(text, [*names, *timing], restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_file(os.path.join(folder, "metrics.csv"), text.getvalue().encode())


def configuration(args, data):
    """The content of config.json: flags, images, command, versions, machine."""
    changed = {name: args.given[name] for name, _, default, _ in flags_of(type(args))
               if args.given[name] != default}
    return {
        **vars(args),
        "data_statistics": data.statistics,
        "command": f"{script_of(args)} {as_flags(changed)}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
        "processor": processor_name(data.device),
        "threads": torch.get_num_threads(),
        "processes": world_size(),
        "git": git_revision(),
    }


def processor_name(device):
    """The name of the GPU or CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError, TypeError), open("/proc/cpuinfo") as file:
        return re.search(r"model name\s*: (.*)", file.read())[1]
    return platform.processor()


def git_revision():
    """The git revision of these scripts, or an empty string."""
    command = ["git", "-C", os.path.dirname(os.path.abspath(__file__)), "rev-parse", "HEAD"]
    with contextlib.suppress(OSError):  # no git
        return subprocess.run(command, capture_output=True, errors="replace").stdout.strip()
    return ""


# ==== Trained weights ====


def load_backbone(run, device="cpu"):
    """(network, prepare) of a run's folder or last.pt; network(prepare(images)) is H [N, features].

    The network is in eval mode, without gradients. prepare makes float32 [N, 3, size, size] of an
    image file, of a list of them or of uint8 [N, 3, H, W] (RGB), as for kNN. Raises UserError."""
    checkpoint = (load_last if os.path.isdir(run) else load_checkpoint)(os.fspath(run))
    check(checkpoint, f"{run}: no last.pt in this folder; try runs/<run>/last.pt")
    name, statistics = checkpoint["args"]["backbone"], checkpoint["data_statistics"]
    weights = backbone_weights(checkpoint)
    with contextlib.ExitStack() as ending:
        plain_torch(ending)
        network = build_backbone(name, statistics["size"])[0]
        check(weights.keys() == network.state_dict().keys(), f"{run}: its backbone is not "
              f"--backbone {name}; load backbone.pt into your own")
        network.load_state_dict(weights)
        check_response(network, checkpoint, run)

    def prepare(images):
        if isinstance(images, np.ndarray) and images.dtype.kind not in "UO":  # no names
            images = torch.as_tensor(images)
        if torch.is_tensor(images):
            check_images(images)
            x = centre_view(images.float() / 255, statistics["size"])
        else:
            one = isinstance(images, (str, os.PathLike)) or not hasattr(images, "__iter__")
            images = [images] if one else list(images)
            names = all(isinstance(path, (str, os.PathLike)) for path in images)
            check(images and names, "images are no files and no tensor; try a list of file names")
            x = torch.cat([prepare_file(os.fspath(path), statistics) for path in images])
        mean, std = (x.new_tensor(statistics[name]).view(3, 1, 1) for name in ("mean", "std"))
        return ((x - mean) / std).to(device)

    return network.requires_grad_(False).eval().to(device), prepare


def response(network, size):
    """H [features] of one fixed image in eval mode: networks with the same weights differ in it."""
    x = torch.arange(3 * size**2, dtype=torch.float64).square().sin().float()  # detail of all sizes
    x = x.view(1, 3, size, size).to(next(network.parameters()).device)
    return project(network, x)[0].cpu()


def check_response(network, checkpoint, name):
    """Raise UserError unless a network computes what it did when the checkpoint was written."""
    before = checkpoint.get("response")  # None: of an older file
    if before is not None and before.isfinite().all():
        now = response(network, checkpoint["data_statistics"]["size"])
        check(now.isfinite().all(), f"{name}: H is not finite; try an earlier checkpoint")
        same = now.shape == before.shape and (now - before).norm() <= 0.05 * before.norm()
        check(same, f"{name}: its backbone computed something else in training; try the code "
              "that it was trained with, or load backbone.pt into your own network")


def prepare_file(path, statistics):
    """The centre of an image file for a run with these Data.statistics: [1, 3, size, size]."""
    image, size = read_image(path, statistics["scale"]), statistics["size"]
    check(image is not None, f"{path} cannot be read as an image of 8x8 or more; try another file")
    small = min(image.shape[1:]) <= size
    side = statistics.get("side") or (size if small else math.ceil(size * 8 / 7))
    return centre_view(to_square(image, side)[None].float() / 255, size)


def backbone_weights(checkpoint):
    """{name: tensor} of the backbone alone."""
    start, items = "backbone.", checkpoint["model"].items()
    return {name.removeprefix(start): w for name, w in items if name.startswith(start)}


def start_from(path, model):
    """Copy what fits of the file of --init into all backbones of the model, or raise UserError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, about other formats
            found = torch.load(path, map_location="cpu", weights_only=True)
        if "format" in found:
            found = backbone_weights(load_checkpoint(path))
        found = found.get("state_dict", found)  # some programs pack it so
        found = {str(name).removeprefix("module."): w for name, w in found.items()}
        finite = all(w.isfinite().all() for w in found.values())
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"--init {path} is no file of weights ({type(error).__name__}); "
                        "try runs/<run>/backbone.pt") from error
    check(finite, f"--init {path}: not finite; try an earlier checkpoint")
    backbones = [part for name, part in model.named_children() if name.endswith("backbone")]
    own = backbones[0].state_dict()
    fits = {name: w for name, w in found.items() if name in own and w.shape == own[name].shape}
    words = f"--init {path}: {len(fits)} of the backbone's {len(own)} tensors"
    share = sum(w.numel() for w in fits.values()) / sum(w.numel() for w in own.values())
    check(share > 0.9, f"{words} fit; try the --backbone that the file is of")
    for backbone in backbones:
        backbone.load_state_dict(fits, strict=False)
    rest = [name for name in {**own, **found} if name not in fits]
    say(words + (f"; left out: {listed(rest)}" if rest else ""))
