"""Measure what trained runs are worth: kNN, a linear probe, collapse figures, pictures.

    python eval.py runs/cw_rgp-patterns-s0                 # a run's folder or last.pt, or several
    python eval.py runs/*/last.pt --plot spectra.png       # spectra and curves, by matplotlib
    python eval.py runs/a --label-fraction 0.01            # the probe sees 1 % of the labels
    python eval.py runs/a --dataset folder --data-dir DIR  # other images than the run's own
    python eval.py runs/a --probe-epochs 0 --neighbors near.png --views views.png
    python eval.py runs/a --probe-epochs 0 --save features.npz --split test
    python eval.py runs/a --supervised --finetune 0.1      # trained with labels, for comparison

Contents, by line number (`python tests/test_common.py` writes them):
     84  command line             the flags, and what is refused before measuring
    209  a run and its data       from a checkpoint to networks; a hash shows that these stay
    360  features and accuracies  what is measured: whitening in slices, the linear probe, protocols
    633  report                   what is printed, and written by --json
    757  pictures and files       --views, --neighbors, --plot, --save
    953  all runs                 one after the other

Features:
    H          backbone(x), the representation that papers evaluate
    Z          projector(H), the embedding that the loss sees
    W          Z whitened by the method's own layer (wmse, shuffled_dbn, cw_rgp). The layer has no
               running statistics, so Z is cut at random into slices as large as in training.
    raw        the pixels, and
    untrained  H of the random weights of the run's seed, without --init: the two baselines

Figures: all images, without augmentation, in eval mode, at the last checkpoint. An image larger
than in training is cropped at its centre: 87.5 % of an STL-10 image's side is kept here, 91.4 % in
the W-MSE code (which resizes to 70 pixels and crops 64).
    5-NN       accuracy of a majority vote among the 5 nearest training images, by Euclidean
               distance (W-MSE, arXiv 2007.06346; official code htdt/self-supervised)
    200-NN     accuracy of a weighted vote among the 200 nearest training images, by cosine
               similarity; weight exp(cos / 0.1) (Wu et al., arXiv 1805.01978; 0.1: MoCo's demo)
    linear     accuracy of a linear layer trained on the fixed features (htdt/self-supervised,
               eval/sgd.py); top-5: how often the right class is among its first five
    fine-tuned accuracy of the whole network and a linear layer, trained further with a share of the
               labels (--finetune): crops and flips, Adam at a rate of 1e-3 that falls as a cosine,
               batches of at most 256, at least 20 epochs and some 400 steps. A probe leaves H as it
               is, so the two are not comparable
    supervised accuracies of the run's backbone if it is trained with all labels instead
               (--supervised): from the same random start, by cross-entropy on the run's views, with
               its epochs, batches, optimizer and rates. Its own layer is trained with it
    collapse   how much of its space a set of embeddings fills: common.collapse_metrics of at most
               10,000 evenly spaced test images (training images if there are no others)
"""

import argparse
import collections
import concurrent.futures
import contextlib
import copy
import csv
import functools
import hashlib
import importlib
import io
import json
import math
import os
import sys
import threading
import time
from types import SimpleNamespace

HERE = os.path.dirname(os.path.realpath(__file__))
METHOD_FOLDERS = [os.path.join(HERE, "methods"), HERE]
CURVES = os.path.join(HERE, "tests", "curves")  # <method>.csv: metrics.csv of its default run
sys.path[1:1] = [*METHOD_FOLDERS, os.path.join(HERE, "tests")]  # tests: for experiments.py
import common  # noqa: E402  (before torch: it says how torch's threads wait for each other)

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn as nn  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torchvision.utils import make_grid, save_image  # noqa: E402

FEATURES = {"H": "H", "Z": "Z", "W": "W whitened Z", "raw": "raw pixels",
            "untrained": "untrained H"}
FINETUNE = {"augment": "crop-flip", "views": 1, "optimizer": "adam", "lr": 1e-3, "lr_bias": 1e-3,
            "weight_decay": 1e-6, "schedule": "cosine", "warmup": None}
FINETUNE_EPOCHS, FINETUNE_STEPS = 20, 400  # at least so many of each

# ==============================================================================
# 1. Command line
# ==============================================================================


def feature_list(text):
    """"H,Z" -> ["H", "Z"], a type for argparse. Raises ArgumentTypeError for an unknown name."""
    names = text.split(",")
    if not set(names) <= set(FEATURES):
        known = ", ".join(FEATURES)
        raise argparse.ArgumentTypeError(f"'{text}' is not a list of {known}; try H,Z")
    return names


def parse_args(argv=None):
    """The flags as a namespace. Raises UserError for all that can be refused before measuring."""
    first_line = (__doc__ or "eval.py").splitlines()[0]  # python -OO has no docstrings
    parser = common.OneLineParser(prog="eval.py", description=first_line, allow_abbrev=False)
    number = common.number
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, or its last.pt")
    add = parser.add_argument_group("what to measure").add_argument
    add("--features", type=feature_list, default=list(FEATURES), metavar="LIST",
        help="any of H (the backbone's output), Z (the projector's), W (Z after the method's "
             "whitening), raw (pixels), untrained (H before training); try H,Z (default: all)")
    add("--probe-epochs", type=number(int, least=0, example=500), default=500, metavar="N",
        help="epochs of the linear probe, a layer trained on the features (default: 500); 0: none")
    add("--label-fraction", type=number(float, above=0, most=1, example=0.1), default=1.0,
        metavar="X", help="share of each class's labels that the probe sees (default: 1)")
    add("--finetune", type=number(float, above=0, most=1, example=0.1), metavar="X",
        help="also train the whole network further, with this share of each class's labels")
    add("--supervised", action="store_true", help="also train the run's backbone from its "
        "random start with all labels, otherwise as in the run")
    add("--seed", type=number(int, least=0, most=2**31 - 1, example=0), default=0, metavar="N",
        help="for the probe, --finetune, their labels, slices of W, views (default: 0)")
    add = parser.add_argument_group("images").add_argument
    add("--dataset", choices=common.DATASETS, help="what to measure on (default: the run's own)")
    add("--data-dir", metavar="DIR",
        help="folder of the data set (default: the run's own; with another --dataset: data)")
    add = parser.add_argument_group("pictures and files").add_argument
    add("--plot", metavar="FILE.png", help="singular values of H and Z, and training curves")
    add("--neighbors", metavar="FILE.png", help="images and the nearest ones by H (of one run)")
    add("--views", metavar="FILE.png", help="random views as in training (of one run)")
    add("--json", metavar="FILE", help="all figures as JSON")
    add("--save", metavar="FILE.npz", help="H, Z, labels, file names of images (of one run)")
    add("--split", choices=("train", "test", "all"), default="all", help="of --save (default: all)")
    add = parser.add_argument_group("machine").add_argument
    add("--batch-size", type=number(int, least=1, example=500), metavar="N",
        help="images that pass the backbone together (default: 500, fewer above 64 pixels)")
    add("--device", choices=("auto", "cpu", "cuda", "mps", "xpu"), default="auto",
        help="`auto`, the default, takes a GPU if there is one")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="of the networks; "
        "`auto`, the default, takes bf16 if the processor has it. kNN and probe have fp32")
    add("--num-workers", type=number(int, least=0, most=256, example=2), default=2, metavar="N",
        help="processes that read images which do not fit in memory (default: 2)")
    args = parser.parse_args(argv)
    common.check(common.world_size() == 1, "eval.py is one process; start it without torchrun")
    common.check(args.dataset != "folder" or args.data_dir,
                 "--dataset folder needs --data-dir DIR, the folder of your images")
    common.check(args.data_dir != "", "--data-dir needs the name of a folder; try it without")
    check_outputs(args)
    return args


def check_outputs(args):
    """Raise UserError if a flag lacks another, an output cannot be written, or two are one file."""
    common.check(args.save or args.split == "all",
                 "--split belongs to --save; try --save features.npz")
    common.check(args.probe_epochs or args.label_fraction == 1, "--label-fraction is of the linear "
                 "probe; try --probe-epochs 500")
    common.check(len(args.runs) == 1 or not (args.neighbors or args.views or args.save),
                 f"--neighbors, --views, --save: of one run; try {args.runs[0]}")
    written = {}
    for flag in ("plot", "neighbors", "views", "json", "save"):
        path = getattr(args, flag)
        check_writable(f"--{flag}", path)
        if path and not is_stream(path):
            other = written.setdefault(os.path.realpath(path), flag)
            common.check(other == flag, f"--{flag} {path}: --{other} writes this file too; "
                         "try another name")


def check_writable(flag, path):
    """Raise UserError if a file that will be written after measuring cannot be written."""
    if path is None:
        return
    kind = {"--json": "", "--save": ".npz"}.get(flag, ".png")
    common.check(path, f"{flag} needs the name of a file; try {flag} {flag[2:]}{kind or '.json'}")
    common.check(path.lower().endswith(kind),
                 f"{flag} {path} is not the name of a {kind[1:].upper()} file; try {path}{kind}")
    common.check(not os.path.isdir(path), f"{flag} {path} is a folder; try a file name in it")
    if is_stream(path):
        return common.check(os.access(path, os.W_OK), f"{flag} {path} is read-only; try a file")
    temporary = os.path.realpath(path) + ".tmp"
    try:
        if flag == "--json" and os.path.exists(path):  # a checkpoint, by a slip of the hand
            with open(path, "rb") as file:
                common.check(file.read(1) in (b"", b"["),
                             f"--json {path} is there and has no figures; try {path}.json")
        open(temporary, "wb").close()
        os.remove(temporary)
    except OSError as error:
        raise common.UserError(f"{flag} {path} cannot be written ({error.strerror}); "
                               "try a folder that exists") from error


def is_stream(path):
    """True for a device, a FIFO or what this program prints to: written into, not replaced."""
    if not os.path.exists(path):
        return False
    printed = [number for number in (1, 2) if os.path.exists(number)]
    return not os.path.isfile(path) or any(os.path.samefile(path, number) for number in printed)


def write_output(path, content):
    """Write bytes to a file, to the target of a link, or into a stream. Raises UserError."""
    if not is_stream(path):
        return common.write_file(os.path.realpath(path), content)
    try:
        with open(path, "ab") as stream:
            stream.write(content)
    except OSError as error:
        raise common.UserError(f"{path} could not be written ({error.strerror}); "
                               "try a file in its place") from error


# ==============================================================================
# 2. A run and its data
# ==============================================================================


def load_run(path, device):
    """A run from its folder or checkpoint, in a namespace:

    path, folder, step  where it was found, and how far it was trained
    name, args, module  `method` or `method/experiment`, its flags, the method's file
    experiment          its object in tests/experiments.py, or None
    statistics          what the network needs of its images, common.Data.statistics
    fingerprint         of its images, common.Data.fingerprint
    backbone_only       why there is nothing but the backbone in the networks, or ""
    model, untrained    the network as it is, and as it started, in eval mode on the device

    Raises UserError if it cannot be read or does not fit the method's file."""
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    run = SimpleNamespace(path=path, folder=folder)
    load = common.load_last if os.path.isdir(path) else common.load_checkpoint
    checkpoint = load(path)
    common.check(checkpoint, f"{path}: no last.pt in this folder; try runs/<run>/last.pt")
    accept(run, device, checkpoint)
    return run


def accept(run, device, checkpoint):
    """Complete a run by its checkpoint. Raises UserError."""
    method = checkpoint["args"]["method"]
    common.check(is_method(method), f"{run.path} is a run of the unknown method "
                 f"{method!r}; put its file into {METHOD_FOLDERS[0]}")
    run.name, run.module = method, importlib.import_module(method)
    known = hasattr(run.module, "Args") and hasattr(run.module, "build")
    common.check(known, f"{run.path} is a run of {method}, but {method}.py is no method; "
                 "try the file it was trained with")
    run.step, run.args = checkpoint["step"], SimpleNamespace(**checkpoint["args"])
    run.statistics, run.fingerprint = checkpoint["data_statistics"], checkpoint["data"]
    try:
        rebuild(run, checkpoint["model"], device)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise common.UserError(f"{run.path} does not fit {method}.py ({type(error).__name__}: "
                               f"{reason}); try the {method}.py it was trained with") from error
    common.check_response(run.model.backbone, checkpoint, run.path)


def is_method(name):
    """True if there is a file of this name among the method files. The name may be anything."""
    if not isinstance(name, str) or not name.isidentifier() or name in ("common", "eval"):
        return False
    return any(os.path.isfile(os.path.join(folder, f"{name}.py")) for folder in METHOD_FOLDERS)


def rebuild(run, weights, device):
    """Set a run's name, experiment, backbone_only, untrained and model. weights: of the model."""
    args = run.args
    run.experiment, run.backbone_only, build = None, "", run.module.build
    if getattr(args, "experiment", ""):
        run.name = f"{args.method}/{args.experiment}"
        try:
            run.experiment = importlib.import_module("experiments").find(run.name)
            build = run.experiment.build
        except (ImportError, LookupError, common.UserError) as error:
            run.backbone_only = f"tests/experiments.py does not give {run.name} ({error})"
            build = build_backbone
            weights = {name: weights[name] for name in weights if name.startswith("backbone.")}
    torch.manual_seed(args.seed)  # as the method's train() does
    run.untrained = build(args).to(device, memory_format=torch.channels_last).eval()
    run.model = build(args).to(device, memory_format=torch.channels_last).eval()
    own, built = common.backbone_weights({"model": weights}), run.model.backbone.state_dict()
    common.check(own.keys() == built.keys(), f"{run.path}: its backbone is not --backbone "
                 f"{args.backbone}; load backbone.pt into your own")
    run.model.load_state_dict(weights)


def build_backbone(args):
    """A module with a new backbone, its attribute `backbone`, and no other part."""
    backbone, _ = common.build_backbone(args.backbone, args.image_size)
    return nn.ModuleDict({"backbone": backbone})


def load_data(run, args, device):
    """The images to measure on, as common.Data, as the network saw its own: with the size, scale,
    mean and standard deviation of the run. The same images are held out as in the run."""
    wanted = SimpleNamespace(**vars(run.args))
    wanted.batch_size, wanted.views = 1, 8  # 8: the columns of --views
    wanted.num_workers, wanted.train_images = args.num_workers, None
    if not hasattr(wanted, "test_fraction"):
        wanted.test_fraction = 0  # a run from before there was this flag
    if args.dataset not in (None, wanted.dataset):
        wanted.dataset, wanted.data_dir = args.dataset, "data"
    common.check(not args.data_dir or wanted.dataset != "patterns", "--data-dir: `patterns` has no "
                 "folder; try it without --data-dir, or with --dataset folder")
    wanted.data_dir = args.data_dir or wanted.data_dir
    data = common.load_data(wanted, device, run.statistics)
    own = wanted.dataset == run.args.dataset
    if own and "held out" in data.test_note and data.fingerprint != run.fingerprint:
        common.warn(f"--data-dir {data.args.data_dir} has other images than the run saw, so some "
                    "test images may have been trained on")
    wanted.seed = args.seed  # only now: the run's seed drew the images that are held out
    if run.statistics:
        use_statistics(data, run.statistics)
    return data


def use_statistics(data, statistics):
    """Show data with the statistics of a run. Raises UserError if they are of other pixels."""
    kind = statistics["scale"][0] if statistics["scale"] else "8 bits"
    common.check(data.statistics["scale"] == statistics["scale"],
                 f"--dataset {data.args.dataset}: the run saw images of {kind}; try such ones")
    for name in ("mean", "std"):
        numbers = torch.tensor(statistics[name], dtype=torch.float32, device=data.device)
        setattr(data, name, numbers.view(3, 1, 1))
    match_classes(data, statistics["class_names"])


def match_classes(data, names):
    """Give the classes of the data that the run knows by name the run's numbers; others follow."""
    if not set(names) & set(data.class_names):
        return
    names = names + [name for name in data.class_names if name not in names]
    number_of = {name: i for i, name in enumerate(names)}
    new = torch.tensor([number_of[name] for name in data.class_names], device=data.device)
    for part in ("train_labels", "test_labels", "bank_labels", "query_labels", "large_bank_labels"):
        labels = getattr(data, part)
        if labels is not None:
            setattr(data, part, new[labels])
    data.class_names = names


def checksum(network):
    """Hash of all parameters and buffers: 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        numbers = tensor.cpu().flatten().contiguous().view(torch.uint8)
        digest.update(name.encode() + numbers.numpy().tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def unchanged(network):
    """A context that gives the network's checksum, and raises RuntimeError if it has changed.

    A batch norm that was left in training mode would change it."""
    before = checksum(network)
    yield before
    if checksum(network) != before:
        raise RuntimeError("a parameter or buffer of the network changed while it was evaluated: "
                           "the figures are void")


# ==============================================================================
# 3. Features and accuracies. bank: of training images, queries: of test images
# ==============================================================================


def test_count(data):
    """How many test images; 0 if common.Data holds the training images in their place."""
    return 0 if data.test is data.labelled_train else len(data.test)


def extract(network, data, args, name):
    """network(x) as [bank [N, d], queries [M, d]]; without test images both are the bank.

    name: of these features, for the status line."""
    settings = dict(precision=args.precision, batch_size=args.batch_size)
    bank = common.extract(network, data, data.labelled_train, what=f"{name} of training images",
                          **settings)
    if test_count(data) == 0:
        return [bank, bank]
    return [bank, common.extract(network, data, data.test, what=f"{name} of test images",
                                 **settings)]


def whiten_in_slices(z, size, whiten, seed=0):
    """z [N, d] -> [N, d]: cut at random into slices of `size` rows, each whitened by itself.

    At random, since images in the order of their folders would make slices of one class. The last
    slice is filled up with rows of the first, and what they give is dropped. N must be at least
    `size`: a slice with the same row twice would be singular."""
    order = torch.randperm(len(z), generator=torch.Generator().manual_seed(seed)).to(z.device)
    filled = torch.cat([order, order[: -len(z) % size]])
    y = torch.cat([whiten(z[rows]) for rows in filled.split(size)])
    out = torch.empty_like(z)
    out[order] = y[: len(z)].to(z.dtype)
    return out


def whitening_of(run):
    """The function that whitens a slice of Z as in training: [w, d] -> [w, d].

    The channels stay in their own order, so that slices can be compared. Raises UserError if the
    method does not whiten."""
    args, module = run.args, run.module
    if hasattr(run.experiment, "whiten"):
        return functools.partial(run.experiment.whiten, args)
    if args.method == "wmse":
        return functools.partial(module.whiten, kind=args.whitening, eps=args.eps)
    if args.method == "cw_rgp":
        return functools.partial(module.channel_whiten, groups=args.groups, eps=args.eps)
    if args.method == "shuffled_dbn":
        return functools.partial(module.decorrelate, groups=args.groups)
    raise common.UserError(f"{args.method} has no whitening layer")


def whitened(run, z, seed):
    """Whitened Z from z, both as [bank, queries]. Raises UserError that says why there is none."""
    whiten = whitening_of(run)
    size = run.args.w_size if hasattr(run.args, "w_size") else run.args.batch_size
    fewest = min(len(part) for part in z)
    common.check(fewest >= size,
                 f"{fewest} images are fewer than the {size} that are whitened together")
    with contextlib.suppress(torch.linalg.LinAlgError):
        w = [whiten_in_slices(part, size, whiten, seed) for part in z]
        if all(part.isfinite().all() for part in w):
            return w
    raise common.UserError("these embeddings fill too few dimensions to be whitened")


def sample(x, limit=10_000):
    """At most `limit` evenly spaced rows of x [N, d]."""
    return common.evenly_spaced(x, None, limit)[0]


def labelled_rows(labels, fraction, seed=0):
    """Rows of the labels [N] that the probe may see, in rising order.

    Of every class its share, drawn at random, rounded, but at least one."""
    generator, rows = torch.Generator().manual_seed(seed), []
    for label in labels.unique():
        mine = (labels == label).nonzero().flatten().cpu()
        order = torch.randperm(len(mine), generator=generator)
        rows.append(mine[order[: max(1, round(fraction * len(mine)))]])
    return torch.cat(rows).sort().values


def probe_learning_rate(epoch, epochs):
    """1e-2 at the start, 1e-6 at the end, exponential in between (htdt/self-supervised)."""
    return 1e-2 * (1e-6 / 1e-2) ** (epoch / epochs)


DRAWING = threading.Lock()  # one probe at a time draws its layer from torch's random numbers
LEAVING = threading.Event()  # after Ctrl-C: other probes end with their epoch


def linear_probe(x, y, rows, x_test, y_test, epochs=500, seed=0, what="linear probe"):
    """(top-1, top-5) accuracy, 0 ... 1, of a linear layer on fixed features.

    x [N, d], y [N]: it is trained on these `rows`. x_test [M, d], y_test [M]: it is measured on
    all. Labels are int64; a class may be missing on either side. With five classes or fewer,
    top-5 is None. After htdt/self-supervised, eval/sgd.py: Adam, batches of 1000, weight decay
    5e-6, learning rate 1e-2 -> 1e-6."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for a busy core made small matrices 10x slower
    classes = int(max(y.max(), y_test.max())) + 1
    with DRAWING:
        torch.manual_seed(seed)
        layer = nn.Linear(x.shape[1], classes).to(x.device)
        generator = torch.Generator()
        generator.set_state(torch.get_rng_state())
    optimizer = torch.optim.Adam(layer.parameters(), weight_decay=5e-6, fused=True)
    buffer = x.new_empty(1000, x.shape[1])  # new memory for each batch would take as long again
    for epoch in common.said(range(epochs), epochs, f"{what}, epoch"):
        if LEAVING.is_set():
            break
        optimizer.param_groups[0]["lr"] = probe_learning_rate(epoch, epochs)
        order = rows[torch.randperm(len(rows), generator=generator)].to(x.device)
        for batch in order.split(1000):  # the last one may be smaller
            part = torch.index_select(x, 0, batch, out=buffer[:len(batch)])  # [n, d]
            logits = (layer.weight @ part.T).T + layer.bias  # layer(part) takes twice as long
            optimizer.zero_grad()
            F.cross_entropy(logits, y[batch]).backward()
            optimizer.step()
    torch.set_num_threads(threads)
    with torch.no_grad():
        best = [layer(part).topk(min(5, classes)).indices for part in x_test.split(1000)]
    hits = (torch.cat(best) == y_test[:, None]).cpu().double()  # [M, <= 5], the best guess first
    present = len(torch.cat([y, y_test]).unique())  # another folder's classes have higher numbers
    top5 = hits.sum(1).mean().item() if present > 5 else None
    return hits[:, 0].mean().item(), top5


def train_classifier(backbone, dim, data, rows, recipe, what):
    """Train a backbone and a linear layer on its H [n, dim] by cross-entropy. Returns the layer.

    rows: of the training images whose labels it may see. recipe: flags as those of a run; the loss
    is the mean over the views. what: heads the status line. Raises UserError if it diverges."""
    torch.manual_seed(recipe.seed)
    classes = int(max(data.train_labels.max(), data.test_labels.max())) + 1
    layer = nn.Linear(dim, classes).to(data.device)
    optimizer = common.build_optimizer(nn.ModuleList([backbone.train(), layer]), recipe)
    bf16 = dict(dtype=torch.bfloat16, enabled=recipe.precision == "bf16")
    steps, step = len(rows) // recipe.batch_size, 0
    for _ in common.said(range(recipe.epochs), recipe.epochs, f"{what}, epoch"):
        order = rows[torch.randperm(len(rows))][: steps * recipe.batch_size].view(steps, -1)
        if isinstance(data.labelled_train, common.Files):
            batches = data.labelled_train.crops(order, recipe, step, data.device)
        else:
            batches = (data.labelled_train[index] for index in order.to(data.device))
        for index, batch in zip(order.to(data.device), batches):
            views = common.augment(batch, recipe.augment, recipe.views, data.size, data.mean,
                                   data.std, seed=recipe.seed, step=step)
            factor = common.learning_rate(recipe, step, recipe.epochs * steps, steps)
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
            with torch.autocast(data.device.type, **bf16):
                logits = [layer(backbone(x)).float() for x in views]
            loss = sum(F.cross_entropy(y, data.train_labels[index]) for y in logits) / len(logits)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
    common.check(loss.isfinite(), f"{what}: the loss is not finite; try --precision fp32")
    return layer


def finetuned(run, data, args):
    """Train a copy of the run's network further with --finetune of the labels (FINETUNE).

    Prints and returns the figures."""
    rows = labelled_rows(data.train_labels, args.finetune, args.seed)
    recipe = SimpleNamespace(**FINETUNE, seed=args.seed, precision=args.precision)
    recipe.batch_size, recipe.num_workers = min(256, len(rows)), args.num_workers
    recipe.epochs = max(FINETUNE_EPOCHS,
                        math.ceil(FINETUNE_STEPS / (len(rows) // recipe.batch_size)))
    backbone = copy.deepcopy(run.model.backbone)
    layer = train_classifier(backbone, run.h[0].shape[1], data, rows, recipe, "fine-tuning")
    h = extract(backbone, data, args, "fine-tuned H")[1]
    figures = {"labels": len(rows), "accuracy": own_accuracy(layer, h, data)}
    common.say(f"\nfine-tuned with {len(rows)} of {len(data.train_labels)} labels: "
               f"{100 * figures['accuracy']:.2f} %")
    common.say(f"  whole network and a new linear layer; {recipe.epochs} epochs, batches of "
               f"{recipe.batch_size}, Adam, lr {recipe.lr:g} -> 0 cosine after a tenth of warm-up, "
               f"crops and flips, seed {args.seed}")
    return figures


def supervised(run, data, args):
    """Train the run's backbone from its random start with all labels (of a run with --train-images,
    those of its images), as the run was without. kNN and probe see these labels, too.

    Prints and returns the accuracies of its H, by the layer that was trained with it too."""
    recipe = SimpleNamespace(**vars(run.args))
    recipe.precision, recipe.num_workers = args.precision, args.num_workers
    rows, started = torch.arange(len(data.train_labels)), time.monotonic()
    few = getattr(recipe, "train_images", None)  # as the run
    rows, _ = common.evenly_spaced(rows, None, few or len(rows))
    backbone = copy.deepcopy(run.untrained.backbone)
    layer = train_classifier(backbone, run.h[0].shape[1], data, rows, recipe, "supervised")
    minutes = common.format_seconds(time.monotonic() - started)
    h, queries = extract(backbone, data, args, "supervised H")
    labels = data.train_labels, data.test_labels
    figures = {"own layer": own_accuracy(layer, queries, data),
               "20-NN": common.knn_accuracy(h[rows], labels[0][rows], queries, labels[1])}
    if args.probe_epochs:
        figures["linear"], _ = linear_probe(h, labels[0], rows, queries, labels[1],
                                            epochs=args.probe_epochs, seed=args.seed)
    words = [f"{name} {100 * accuracy:.2f} %" for name, accuracy in figures.items()]
    common.say(f"\nsupervised, in {minutes}: {', '.join(words)}")
    known = f"all {len(rows)}" if not few else f"{len(rows)} of {len(labels[0])}"
    common.say(f"  {run.args.backbone} from its random start with {known} labels; the "
               f"run's views, {recipe.epochs} epochs, batches, optimizer and rates")
    return figures


def own_accuracy(layer, h, data):
    """Accuracy (0 ... 1) of a linear layer on H of the test images [M, dim]."""
    with torch.no_grad():
        return (layer(h).argmax(1) == data.test_labels).cpu().double().mean().item()


def accuracies(x, data, rows, args, name):
    """{"5-NN", "200-NN", "linear", "top-5"}, 0 ... 1; without a probe only the first two.

    x: features as [bank, queries], called `name` in the status line. rows: those of the bank whose
    labels the probe may see."""
    bank, queries = x
    labels, test_labels = data.train_labels, data.test_labels
    knn = functools.partial(common.knn_accuracy, bank, labels, queries, test_labels)
    common.STATUS.show(f"{name}: 5-NN and 200-NN")
    figures = {"5-NN": knn(k=5, temperature=None), "200-NN": knn(k=200, temperature=0.1)}
    if args.probe_epochs:
        figures["linear"], figures["top-5"] = linear_probe(
            bank, labels, rows, queries, test_labels, epochs=args.probe_epochs, seed=args.seed,
            what=f"{name}: linear probe")
    return figures


def all_accuracies(found, data, rows, args):
    """Yields (name, its `accuracies`). found: {name: features as [bank, queries]}.

    On a CPU as many as torch has threads are measured at a time, with a thread each. The widest
    features take longest and start first."""
    count = torch.get_num_threads() if data.device.type == "cpu" else 1
    pool = concurrent.futures.ThreadPoolExecutor(count, "", torch.set_num_threads, (1,))
    try:
        widest = sorted(found, key=lambda name: found[name][0].shape[1], reverse=True)
        futures = {name: pool.submit(accuracies, found[name], data, rows, args, FEATURES[name])
                   for name in widest}
        for name in found:
            yield name, futures[name].result()
    finally:
        LEAVING.set()
        pool.shutdown(cancel_futures=True)
        LEAVING.clear()


def protocols(data, rows, args):
    """{name of a figure: how it was measured}, {} without labels."""
    if not data.labelled:
        return {}
    n = len(data.labelled_train)
    texts = {
        "5-NN": f"majority vote among the {min(5, n)} nearest of {n} training images; Euclidean "
                "distance, features as they are; a tie goes to the smallest label",
        "200-NN": f"weighted vote among the {min(200, n)} nearest of {n} training images; cosine "
                  "similarity; weight exp(cos / 0.1)"}
    if args.probe_epochs:
        texts["linear"] = f"linear layer on features of {len(rows)} of {n} training images; Adam, "
        texts["linear"] += "batches of 1000, lr 1e-2 -> 1e-6 exponential, weight decay 5e-6, "
        texts["linear"] += f"{args.probe_epochs} epochs, seed {args.seed}"
    return texts


# ==============================================================================
# 4. The report of one run
# ==============================================================================


def evaluate(run, data, args):
    """Measure one run and print it line by line. Returns the figures as plain numbers, for --json.

    Sets run.h and run.z. Raises UserError if H or Z is not finite."""
    say_heading(run, data, args)
    embed(run, data, args)
    wanted, left_out = args.features, []
    if run.backbone_only:
        wanted = [name for name in wanted if name not in ("Z", "W")]
        left_out.append(f"Z and whitened Z left out: {run.backbone_only}")
    rows = labelled_rows(data.train_labels, args.label_fraction, args.seed) if data.labelled else []
    how = protocols(data, rows, args)
    columns = [*how, "top-5"] if "linear" in how else list(how)
    widths = [5] + [8] * len(columns)
    if data.labelled:
        common.say("")
        say_row("accuracy, %", ["dim", *columns], widths)
    else:
        common.say("no labelled training and test images: accuracies are left out")
    found = {}
    for name in wanted:
        try:
            found[name] = features(name, run, data, args)
        except common.UserError as reason:
            left_out.append(f"{FEATURES[name]} left out: {reason}")
    results = {name: {"dim": x[0].shape[1]} for name, x in found.items()}
    for name, figures in all_accuracies(found if data.labelled else {}, data, rows, args):
        results[name].update(figures)
        cells = ["-" if figures[c] is None else f"{100 * figures[c]:.2f}" for c in columns]
        say_row(FEATURES[name], [results[name]["dim"], *cells], widths)
    judged = {"H": run.h} if run.z is None else {"H": run.h, "Z": run.z}  # with any --features
    collapse = {name: common.collapse_metrics(sample(x[1]))
                for name, x in {**found, **judged}.items() if name != "raw"}
    for name in found.keys() & collapse.keys():
        results[name]["collapse"] = collapse[name]
    for name, text in how.items():
        common.say(f"  {name:7} {text}")
    measured = f"{len(sample(run.h[1]))} {'test' if test_count(data) else 'training'} images"
    say_collapse(found, collapse, f"{measured}, eval mode; see common.collapse_metrics")
    for text in left_out:
        common.say(f"  {text}")
    return {"run": run.path, "method": run.name, "step": run.step,
            "left_out": left_out, "trained_on": run.args.dataset, "dataset": data.args.dataset,
            "training_images": len(data.labelled_train), "test_images": test_count(data),
            "class_names": list(data.class_names), "labels_for_probe": len(rows),
            "precision": args.precision, "protocols": how, "features": results}


def embed(run, data, args):
    """Set run.h and run.z, H and Z as [bank, queries]; run.z is None if only the backbone could be
    rebuilt. Raises UserError if they are not finite."""
    run.h, run.z = extract(run.model.backbone, data, args, "H"), None
    if not run.backbone_only:
        run.z = [common.project(run.model.projector, h, args.precision) for h in run.h]
    for what, parts in (("backbone", run.h), ("projector", run.z or [])):
        common.check(all(part.isfinite().all() for part in parts),
                     f"{run.path}: the {what}'s output is not finite; try an earlier checkpoint")


def say_heading(run, data, args):
    """Print what is measured, and on which images."""
    place = "" if data.args.dataset == "patterns" else f" in {data.args.data_dir}"
    classes = len(data.train_labels.unique()) if data.labelled else "no"
    common.say(f"\n{run.path}: {run.name}, {run.args.backbone}, trained on {run.args.dataset}, "
               f"step {run.step}, seed {run.args.seed}")
    common.say(f"evaluated on {data.args.dataset}{place}, {data.size}x{data.size}: "
               f"{len(data.labelled_train)} training images, {test_count(data)} test images, "
               f"{classes} classes; {args.precision}")


def features(name, run, data, args):
    """The features of that name as [bank, queries]. Raises UserError that says why not."""
    if name == "H":
        return run.h
    if name == "Z":
        return run.z
    if name == "W":
        return whitened(run, run.z, args.seed)
    if name == "untrained":
        return extract(run.untrained.backbone, data, args, FEATURES[name])
    common.check(data.labelled, "no labelled training and test images")
    size = 12 * data.size**2 * (len(data.labelled_train) + test_count(data))  # bytes of float32
    common.check(size <= common.MEMORY_LIMIT, "they do not fit in memory")
    return extract(nn.Flatten(), data, args, FEATURES[name])  # raw pixels


def say_row(name, cells, widths):
    """Print a line of a table; a blank stays between cells that are wider than their columns."""
    padded = [f" {cell:>{width}}" for cell, width in zip(cells, widths)]
    common.say(f"{name:14}" + "".join(padded))


def say_collapse(names, collapse, how):
    """Print the collapse figures as a table, under the names of common.collapse_metrics, and in
    words what those of Z and H show.

    names: of the features in the table; `raw` has no figures. collapse: {name: its figures}, of H
    and, if there is Z, of Z with any names."""
    columns = list(collapse["H"])
    widths = [max(8, len(column) + 1) for column in columns]
    digits = [0 if column in ("dim", "rank", "rank_1pct") else 3 for column in columns]
    rows = [name for name in names if name in collapse]
    if rows:
        common.say("")
        say_row("collapse", columns, widths)
    for name in rows:
        cells = [f"{collapse[name][column]:.{n}f}" for column, n in zip(columns, digits)]
        say_row(FEATURES[name], cells, widths)
    if rows:
        common.say(f"  {how}")
    z, h = collapse.get("Z"), collapse["H"]
    words = ""
    if z:
        figures = {**z, "rank_h": h["rank_1pct"]}
        words = common.collapse_in_words(figures, z["dim"], h["dim"])
    if words:
        common.say(f"  {words}")


# ==============================================================================
# 5. Pictures and files
# ==============================================================================


def write_sheet(path, tiles):
    """A PNG of tiles [rows, columns, 3, S, S] in 0 ... 1; small ones are enlarged to some 64."""
    factor = max(1, round(64 / tiles.shape[-1]))
    large = tiles.cpu().flatten(0, 1)  # save_image clips
    large = large.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    sheet = make_grid(large, nrow=tiles.shape[1], padding=2, pad_value=1.0)
    buffer = io.BytesIO()
    save_image(sheet, buffer, format="png")
    write_output(path, buffer.getvalue())
    common.say(f"{path}: {sheet.shape[2]}x{sheet.shape[1]} pixels")


def colours(data, x):
    """Views x [n, 3, S, S] as the network sees them -> in 0 ... 1."""
    return x * data.std + data.mean


def plain(data, images, index):
    """images[index] as they are measured, in 0 ... 1: [n, 3, S, S]."""
    return colours(data, torch.cat(list(data.eval_views(images, index, 100))))


def draw_views(path, data):
    """Eight training images, one a row: as they are measured, then eight random views.

    A recipe with two kinds of views alternates."""
    count = min(8, len(data.train))
    index = torch.linspace(0, len(data.train) - 1, count).long()
    if isinstance(data.train, common.Files):
        batch = next(data.train.crops(index[None], data.args, 0, data.device))
    else:
        batch = data.train[index.to(data.device)]
    views = data.augment(batch, step=0)
    columns = [plain(data, data.train, index)] + [colours(data, view) for view in views]
    write_sheet(path, torch.stack(columns, 1))


def draw_neighbors(path, data, h):
    """Ten images, one a row, and their nine nearest training images by cosine of H.

    h: H as [bank, queries]. A green frame: of the same class; red: of another."""
    bank, queries = h
    images, others = data.test, len(bank)
    labels = data.test_labels if test_count(data) else data.train_labels
    count = min(10, len(images))
    index = torch.linspace(0, len(images) - 1, count).long()
    rows = queries[index.to(data.device)]
    similarity = F.normalize(rows, dim=1) @ F.normalize(bank, dim=1).T  # [10, N]
    if not test_count(data):
        similarity[range(count), index] = -2.0  # not the image itself
        others -= 1
    nearest = similarity.topk(min(9, others)).indices.cpu()  # [10, 9]
    tiles = []
    for i, neighbors in zip(index, nearest):
        row = [plain(data, images, i[None]), plain(data, data.labelled_train, neighbors)]
        tiles.append(torch.cat(row))
    tiles = torch.stack(tiles)  # [10, 10, 3, S, S]
    framed = F.pad(tiles, (2, 2, 2, 2))  # [10, 10, 3, S + 4, S + 4], black
    if data.train_labels is not None and labels is not None:
        expected = labels[index.to(data.device)]
        same = data.train_labels[nearest.to(data.device)] == expected[:, None]
        green, red = tiles.new_tensor([0.1, 0.7, 0.2]), tiles.new_tensor([0.85, 0.1, 0.1])
        colour = torch.where(same[..., None], green, red)  # [10, 9, 3]
        border = F.pad(torch.zeros_like(tiles[:, 1:, :1]), (2, 2, 2, 2), value=1.0)
        framed[:, 1:] += border * colour[..., None, None]
    write_sheet(path, framed)


def write_features(path, split, run, data):
    """An .npz file of arrays with a row per image, training images first, in the order of files:

    H, Z         float32 [N, dim]; no Z if only the backbone could be rebuilt
    labels       int64 [N], -1 where there is none; class_names [classes] has their names
    split        text [N], "train" or "test"
    file_names   text [N], below --data-dir; empty for a data set that is not a folder of files

    split: "train", "test" or "all"."""
    splits = [name for name in ("train", "test") if split in (name, "all")]
    splits = splits if test_count(data) else ["train"]
    kept = collections.defaultdict(list)
    for i, labels in enumerate((data.train_labels, data.test_labels)):
        name, h = ("train", "test")[i], run.h[i].cpu()
        if name in splits:
            kept["H"].append(h)
            kept["Z"] += [] if run.z is None else [run.z[i].cpu()]
            kept["labels"].append(torch.full([len(h)], -1) if labels is None else labels.cpu())
            kept["split"] += [name] * len(h)
            kept["file_names"] += data.files[i] if data.files else []
    arrays = {name: torch.cat(kept[name]).numpy() for name in ("H", "Z", "labels") if kept[name]}
    arrays.update({name: np.array(kept[name], dtype=str) for name in ("split", "file_names")})
    buffer = io.BytesIO()
    np.savez(buffer, **arrays, class_names=np.array(data.class_names, dtype=str))
    write_output(path, buffer.getvalue())
    common.say(f"{path}: {len(kept['split'])} images: {', '.join(arrays)}, class_names")


def import_figure():
    """matplotlib's Figure. Raises UserError without matplotlib."""
    os.environ["MPLBACKEND"] = "agg"  # a notebook's may not be installed here; none is needed
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise common.UserError("--plot needs matplotlib, which is not there; "
                               "try pip install matplotlib, or leave --plot out") from error
    return Figure


def read_curves(path):
    """The metrics.csv of a run as {column: [number or nan]}, {} if it cannot be read."""
    try:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file, restval="a row that was cut short"))
        return {name: [float(row[name] or "nan") for row in rows] for name in rows[0]}
    except (OSError, ValueError, TypeError, LookupError, csv.Error):
        folder, name = os.path.split(path)
        common.warn(f"{folder or '.'}: no readable {name}, so no training curves of this run")
        return {}


def singular_values(x):
    """Singular values of the centred rows x [N, d] (at most 10,000 of them), in falling order."""
    x = sample(x).cpu().double()
    return torch.linalg.svdvals(x - x.mean(0))


def draw_curve(panel, x, y, label, **style):
    """y over x without the points that were not measured (nan)."""
    points = [(a, b) for a, b in zip(x, y) if not math.isnan(b)]
    panel.plot([a for a, _ in points], [b for _, b in points], label=label, **style)


def draw_training(panels, found, label, **style):
    """The curves of read_curves in five panels: kNN, loss, spread, rank, alignment."""
    minutes = [seconds / 60 for seconds in found.get("seconds", [])]
    knn = [100 * accuracy for accuracy in found.get("knn", [])]
    draw_curve(panels[0], minutes, knn, label, **style)
    for panel, column in zip(panels[1:], ("loss", "std_sqrt_d", "rank_1pct")):
        draw_curve(panel, found.get("epoch", []), found.get(column, []), label, **style)
    pairs = found.get("uniformity", []), found.get("alignment", [])
    draw_curve(panels[4], *pairs, label, **style)


def draw_references(panels, methods):
    """Dashed: the default runs of these methods on `patterns`, as far as CURVES has them."""
    paths = {method: os.path.join(CURVES, f"{method}.csv") for method in methods}
    for i, method in enumerate(methods):
        if os.path.isfile(paths[method]):
            found = read_curves(paths.pop(method))
            draw_training(panels, found, f"{method}, reference", ls="--", color=f"C{i}")
    if paths:
        common.say(f"no reference curves of {', '.join(paths)} in {CURVES}")


def draw_plot(path, spectra, methods=()):
    """Spectra and training curves. spectra: (path, singular values of H, of Z) of each run.

    methods: whose reference curves are drawn beside them."""
    figure = import_figure()(figsize=(18, 8), layout="constrained")
    panels = list(figure.subplots(2, 4).flat)
    panels[7].set_axis_off()
    for panel, name in zip(panels, "HZ"):
        panel.set(title=f"singular values of centred {name}", xlabel="k", ylabel="log10 sigma_k")
    panels[2].set(title="kNN while training, %", xlabel="minutes")
    panels[3].set(title="loss (each method's own scale)", xlabel="epoch")
    panels[4].set(title="std sqrt(d) of Z", xlabel="epoch")
    panels[5].set(title="rank of Z (above 1 % of the largest)", xlabel="epoch")
    panels[6].set(title="alignment (down is better)", xlabel="uniformity (left is better)")
    draw_references(panels[2:], methods)
    folders = [path if os.path.isdir(path) else os.path.dirname(path) for path, *_ in spectra]
    names = [os.path.basename(os.path.abspath(folder)) for folder in folders]
    for folder, name, (path_of_run, *sigmas) in zip(folders, names, spectra):
        label = name if names.count(name) == 1 else path_of_run
        label = common.shown(label).replace("$", r"\$")  # `$` begins maths
        label = f" {label}" if label.startswith("_") else label  # `_` is left out of a legend
        for panel, sigma in zip(panels, sigmas):
            sigma = sigma.clamp_min(max(1e-12, 1e-8 * sigma[0].item()))  # no log of 0
            draw_curve(panel, range(1, len(sigma) + 1), sigma.log10().tolist(), label)
        found = read_curves(os.path.join(folder, "metrics.csv"))
        draw_training(panels[2:], found, label, marker=".")
    losses = [abs(y) for line in panels[3].get_lines() for y in line.get_ydata()]
    if losses and max(losses) > 100 * max(1, min(losses)):  # SimSiam: -1; Barlow Twins: thousands
        panels[3].set(yscale="symlog")
    for panel in panels[:7]:
        panel.grid(alpha=0.3)
    panels[7].legend(*panels[3].get_legend_handles_labels(), loc="center")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    write_output(path, buffer.getvalue())
    common.say(f"{path}: spectra and training curves")


# ==============================================================================
# 6. All runs
# ==============================================================================


def check_data(run, data, args):
    """Raise UserError, before measuring, if the flags ask for what a run or its images lack."""
    common.check(args.split != "test" or test_count(data),
                 "--split test: there are no test images; try --split train")
    common.check(data.labelled or not (args.finetune or args.supervised), "--finetune, "
                 "--supervised need labelled training and test images; try it without")
    if args.finetune or args.supervised or args.views:
        common.check_crops(run.args, data)
    count, batch = len(data.labelled_train), run.args.batch_size
    common.check(count >= batch or not args.supervised, f"--supervised: {count} training "
                 f"images are fewer than the run's batch of {batch}; try it on more images")


@common.gives_back
def run(args):
    """Measure all runs that the flags name. Raises UserError."""
    if args.plot:
        import_figure()  # before measuring, not after it
    settings = common.Args(device=args.device, precision=args.precision)
    settings, device = common.set_up(settings)
    args.precision = settings.precision  # fp32 or bf16
    reports, spectra, methods = [], [], {}
    for path in args.runs[1:]:
        load_run(path, device)  # refuse a damaged one now, not after measuring those before it
    for path in args.runs:
        trained = load_run(path, device)
        data = load_data(trained, args, device)
        check_data(trained, data, args)
        with unchanged(trained.model) as digest:
            reports.append(evaluate(trained, data, args))
            if args.finetune:
                reports[-1]["fine-tuned"] = finetuned(trained, data, args)
            if args.supervised:
                reports[-1]["supervised"] = supervised(trained, data, args)
        common.say("  network unchanged: sha256 of all parameters and buffers "
                   f"{digest[:12]} before and after")
        if args.plot:
            sigmas = [singular_values(x[1]) for x in (trained.h, trained.z) if x is not None]
            spectra.append((trained.path, *sigmas))
            if trained.args.dataset == "patterns":
                methods.setdefault(trained.name)
        if args.neighbors:
            draw_neighbors(args.neighbors, data, trained.h)
        if args.views:
            draw_views(args.views, data)
        if args.save:
            write_features(args.save, args.split, trained, data)
    if args.json:
        write_output(args.json, (json.dumps(reports, indent=1) + "\n").encode())
    if args.plot:
        draw_plot(args.plot, spectra, methods)


if __name__ == "__main__":
    common.main(run, parse_args)
