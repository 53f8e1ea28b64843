"""What trained runs are worth: kNN, a linear probe, collapse figures, pictures.

    python eval.py runs/cw_rgp-patterns-s0                       # a run folder, or its last.pt; any number of them
    python eval.py runs/*/last.pt --plot spectra.png             # singular values and training curves (needs matplotlib)
    python eval.py runs/a --label-fraction 0.01                  # the probe sees 1 % of the labels
    python eval.py runs/a --dataset folder --data-dir DIR        # another data set than the one trained on
    python eval.py runs/a --probe-epochs 0 --neighbors near.png --views views.png

What is measured, each on all images, un-augmented, in eval mode, at the last checkpoint:

    H           backbone(x), the representation that papers evaluate
    Z           projector(H), what the loss sees
    W           Z whitened by the method's own layer (cw_rgp, wmse, shuffled_dbn). These layers have no running statistics, so Z is cut
                at random into slices as large as in training; the last slice is filled up with rows of the first, the fill dropped
    raw         the pixels, and
    untrained   the backbone with the weights that the run started from: the two baselines

    5-NN        majority of 5 Euclidean neighbours among the training images (W-MSE, 2007.06346; htdt/self-supervised, eval/knn.py)
    200-NN      200 cosine neighbours, each votes with exp(cos / 0.1) (Wu et al. 1805.01978, with MoCo's T)
    linear      one linear layer on the fixed features: Adam, batches of 1000, weight decay 5e-6, learning rate 1e-2 -> 1e-6
                exponentially over 500 epochs (htdt/self-supervised, eval/sgd.py); top-1 and top-5
    collapse    common.collapse_metrics of at most 10,000 evenly spaced test images (training images where there are none)

Parameters and buffers of the network are hashed before and after: a probe that moved a batch norm's statistics would end in an error.
"""

import argparse
import contextlib
import csv
import hashlib
import importlib
import io
import json
import os
import sys
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.io import encode_png
from torchvision.utils import make_grid

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[1:1] = [os.path.join(HERE, "methods"), HERE]  # the methods: in their folder, or beside this file
import common  # noqa: E402

# ==============================================================================
# 1. Command line
# ==============================================================================

FEATURES = {"H": "H", "Z": "Z", "W": "W, whitened Z", "raw": "raw pixels", "untrained": "untrained H"}


def feature_list(text):
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in FEATURES:
            raise argparse.ArgumentTypeError(f"'{name}' is none of {', '.join(FEATURES)}; try H,Z")
    return [name for name in FEATURES if name in names]


def parse_args(argv=None):
    parser = common.OneLineParser(prog="eval.py", description="What trained runs are worth: kNN, a linear probe, collapse figures, pictures.",
                                  allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="runs/<run>, or runs/<run>/last.pt")
    add("--features", type=feature_list, default=list(FEATURES), help="what to measure, comma-separated, of H, Z, W, raw, untrained (default: all there are)")
    add("--dataset", choices=common.DATASETS, help="evaluate on another data set than the run's own")
    add("--data-dir", help="where that data set lies (default: the run's own, `data` with --dataset)")
    add("--probe-epochs", type=common.number(int, 0, example=500), default=500, help="epochs of the linear probe; 0: no probe")
    add("--label-fraction", type=common.number(float, above=0, maximum=1, example=0.1), default=1.0, help="share of each class's labels for the probe")
    add("--seed", type=common.number(int, 0, 2**31 - 1, example=0), default=0, help="of the probe, the labels, the slices and the views drawn here")
    add("--plot", metavar="FILE.png", help="singular values of H and Z, and the training curves")
    add("--neighbors", metavar="FILE.png", help="images and their nearest neighbours in H (one run)")
    add("--views", metavar="FILE.png", help="augmented views of the run's recipe (one run)")
    add("--json", metavar="FILE", help="write the figures")
    add("--batch-size", type=common.number(int, 1, example=500), default=500, help="images that pass the backbone at a time")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU where there is one")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="of backbone and projector; auto: bf16 where the processor computes in it")
    add("--num-workers", type=common.number(int, 0, 256, example=2), default=2, help="loader processes, used only where the images do not fit in memory")
    args = parser.parse_args(argv)
    common.check(common.world_size() == 1, "eval.py is one process; start it without torchrun")
    common.check(args.dataset != "folder" or args.data_dir, "--dataset folder needs --data-dir DIR, the folder of your images")
    for flag, path in (("--plot", args.plot), ("--neighbors", args.neighbors), ("--views", args.views), ("--json", args.json)):
        check_writable(flag, path)
    for flag, path in (("--neighbors", args.neighbors), ("--views", args.views)):
        common.check(not path or len(args.runs) == 1, f"{flag} draws one run, {len(args.runs)} were given; try {args.runs[0]} alone")
    return args


def check_writable(flag, path):
    """Before an hour of measuring, not after it."""
    if path is None:
        return
    common.check(flag == "--json" or path.lower().endswith(".png"), f"{flag} {path} is not the name of a PNG file; try {path}.png")
    common.check(not os.path.isdir(path), f"{flag} {path} is a folder; try a file name in it")
    try:
        with open(path + ".tmp", "wb"):
            pass
        os.remove(path + ".tmp")
    except OSError as error:
        raise common.UserError(f"{flag} {path} cannot be written ({error.strerror}); try a folder that exists") from error


# ==============================================================================
# 2. A run and its data
# ==============================================================================


def load_run(path, device):
    """The network of a run as trained, and as it started: a namespace with path, folder, module, args, step, model, untrained."""
    if os.path.isdir(path):
        checkpoint = common.load_last(path)
        common.check(checkpoint is not None, f"{path}: no last.pt in this folder; try runs/<run>/last.pt")
    else:
        checkpoint = common.load_checkpoint(path)
    flags = checkpoint.get("args")
    method = flags.get("method") if isinstance(flags, dict) else None
    places = [os.path.join(folder, f"{method}.py") for folder in (os.path.join(HERE, "methods"), HERE)]
    known = isinstance(method, str) and method.isidentifier() and any(os.path.isfile(place) for place in places)
    common.check(known, f"{path} is a run of the unknown method {method!r}; put {method}.py into {os.path.join(HERE, 'methods')}")
    try:
        module = importlib.import_module(method)
        args = argparse.Namespace(**flags)
        torch.manual_seed(args.seed)
        untrained = module.build(args).to(device, memory_format=torch.channels_last)
        model = module.build(args).to(device, memory_format=torch.channels_last)
        model.load_state_dict(checkpoint["model"])
        step, _ = checkpoint["step"], (args.dataset, args.data_dir, args.image_size, args.augment)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise common.UserError(f"{path} does not fit {method}.py ({type(error).__name__}: {reason}); try the {method}.py that it was trained with") from error
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    return SimpleNamespace(path=path, folder=folder, module=module, args=args, step=step, model=model.eval(), untrained=untrained.eval())


def load_data(run, args, device, cache):
    """The data set to evaluate on, as common.Data, at the image size trained on; read once for all runs that share it."""
    wanted = argparse.Namespace(**vars(run.args))
    if args.dataset not in (None, wanted.dataset):
        wanted.dataset, wanted.data_dir = args.dataset, "data"
    wanted.data_dir = args.data_dir or wanted.data_dir
    wanted.batch_size, wanted.views, wanted.seed, wanted.num_workers = 1, 8, args.seed, args.num_workers  # views: columns of --views
    key = (wanted.dataset, wanted.data_dir, wanted.image_size, wanted.augment)
    if key not in cache:
        cache.clear()  # one data set in memory at a time
        cache[key] = common.load_data(wanted, device)
    return cache[key]


def checksum(network):
    """Hash of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        digest.update(name.encode() + tensor.detach().cpu().flatten().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def unchanged(network):
    """Raises RuntimeError if what is done inside changes a parameter or a buffer, as a batch norm left in training mode would."""
    before = checksum(network)
    yield
    if checksum(network) != before:
        raise RuntimeError("a parameter or buffer of the network changed while it was evaluated: the figures are void")


# ==============================================================================
# 3. Features
# ==============================================================================

# method -> flag with the size of a slice, and the whitening of one slice z [w, d]; channels in their own order: rows of all slices are comparable
WHITENING = {
    "wmse": ("w_size", lambda module, args, z: module.whiten(z, args.kind, args.eps)),
    "cw_rgp": ("w_size", lambda module, args, z: module.channel_whiten(z, args.groups, None, args.eps)),
    "shuffled_dbn": ("batch_size", lambda module, args, z: module.decorrelate(z, args.groups, None)),
}


def whiten_in_slices(z, size, whiten, seed=0):
    """z [N, d] -> [N, d], cut at random into slices of `size` rows that are whitened one by one.

    At random: images in the order of their folders would make slices of one class. The last slice is filled up with the first rows of
    the first, and the fill is dropped. Needs N >= size, else rows would come twice in a slice and make it singular."""
    order = torch.randperm(len(z), generator=torch.Generator().manual_seed(seed)).to(z.device)
    filled = torch.cat([order, order[: -len(z) % size]])
    out = torch.empty_like(z)
    out[order] = torch.cat([whiten(z[rows]) for rows in filled.split(size)])[: len(z)].to(z.dtype)
    return out


def whitened(run, z_bank, z_queries, seed):
    """(bank, queries, "") of whitened Z, or (None, None, why not)."""
    if run.args.method not in WHITENING:
        return None, None, f"{run.args.method} has no whitening layer"
    flag, whiten = WHITENING[run.args.method]
    size, fewest = getattr(run.args, flag), min(len(z_bank), len(z_queries))
    if fewest < size:
        return None, None, f"{fewest} images are fewer than the slice of {size} of the whitening layer"
    try:
        bank, queries = (whiten_in_slices(z, size, lambda rows: whiten(run.module, run.args, rows), seed) for z in (z_bank, z_queries))
        if bank.isfinite().all() and queries.isfinite().all():
            return bank, queries, ""
    except torch.linalg.LinAlgError:
        pass
    return None, None, "these embeddings fill too few dimensions to be whitened"


def features(name, run, data, args, h, z):
    """(bank [N, d], queries [M, d], "") of one kind of features, or (None, None, why not). h, z: pairs of H and Z."""
    if name == "W":
        return whitened(run, *z, args.seed)
    if name in ("H", "Z"):
        return *(h if name == "H" else z), ""
    numbers = 3 * data.size**2 * (len(data.bank) + (0 if data.test is None else len(data.test)))
    if name == "raw" and 4 * numbers > common.MEMORY_LIMIT:
        return None, None, f"they would take {4 * numbers / 2**30:.0f} GiB"
    return *extract(nn.Flatten() if name == "raw" else run.untrained.backbone, data, args), ""


def extract(network, data, args):
    """(bank [N, d], queries [M, d]): network(x) of the training and of the test images (of the training images again where there are none)."""
    bank = common.extract(network, data, data.bank, args.precision, args.batch_size)
    return bank, bank if data.test is None else common.extract(network, data, data.test, args.precision, args.batch_size)


# ==============================================================================
# 4. Figures
# ==============================================================================


def labelled_rows(labels, fraction, seed=0):
    """Rows of the labels [N] that the probe may see: of every class its share, drawn at random, rounded, at least one."""
    generator, rows = torch.Generator().manual_seed(seed), []
    for label in labels.cpu().unique():
        mine = (labels.cpu() == label).nonzero().flatten()
        rows.append(mine[torch.randperm(len(mine), generator=generator)[: max(1, round(fraction * len(mine)))]])
    return torch.cat(rows).sort().values


def probe_learning_rate(epoch, epochs):
    """1e-2 at the start, 1e-6 at the end, exponential in between."""
    return 1e-2 * (1e-6 / 1e-2) ** (epoch / epochs)


def linear_probe(x, y, rows, x_test, y_test, epochs=500, seed=0):
    """(top-1, top-5) as fractions of all test rows; the W-MSE protocol. top-5 is None with five classes or fewer.

    x [N, d], y [N]: of these only `rows` are trained on; x_test [M, d], y_test [M]. Classes may be missing on either side."""
    torch.manual_seed(seed)
    classes = int(max(y.max(), y_test.max())) + 1
    layer = nn.Linear(x.shape[1], classes).to(x.device)
    optimizer = torch.optim.Adam(layer.parameters(), weight_decay=5e-6, fused=True)
    for epoch in range(epochs):
        optimizer.param_groups[0]["lr"] = probe_learning_rate(epoch, epochs)
        for batch in rows[torch.randperm(len(rows))].to(x.device).split(1000):  # the last one may be smaller
            optimizer.zero_grad()
            F.cross_entropy(layer(x[batch]), y[batch]).backward()
            optimizer.step()
    with torch.no_grad():
        best = torch.cat([layer(part).topk(min(5, classes)).indices for part in x_test.split(1000)])  # [M, 5], best first
    hits = (best == y_test[:, None]).float()
    return hits[:, 0].mean().item(), hits.sum(1).mean().item() if classes > 5 else None


def accuracies(bank, queries, data, rows, args):
    """{"5-NN", "200-NN", "linear", "top-5"} as fractions; without a probe the last two are missing."""
    labels, test_labels = data.bank_labels, data.test_labels
    figures = {"5-NN": common.knn_accuracy(bank, labels, queries, test_labels, k=5, temperature=None),
               "200-NN": common.knn_accuracy(bank, labels, queries, test_labels, k=200, temperature=0.1)}
    if args.probe_epochs:
        figures["linear"], figures["top-5"] = linear_probe(bank, labels, rows, queries, test_labels, args.probe_epochs, args.seed)
    return figures


def sample(x, limit=10_000):
    """At most `limit` evenly spaced rows."""
    return x[torch.linspace(0, len(x) - 1, min(limit, len(x)), device=x.device).long()]


def singular_values(x):
    """Of the centred rows x [N, d], in falling order."""
    x = sample(x).double().cpu()
    return torch.linalg.svdvals(x - x.mean(0))


# ==============================================================================
# 5. The report of one run
# ==============================================================================


def protocol(data, rows, args):
    """{name: how the number of that name was taken}."""
    knn = f"of {len(data.bank)} training images"
    return {
        "5-NN": f"majority of the {min(5, len(data.bank))} nearest {knn}, Euclidean distance of raw features, a tie goes to the smallest label",
        "200-NN": f"the {min(200, len(data.bank))} nearest {knn}, cosine, each votes with exp(cos / 0.1)",
        "linear": f"nn.Linear on raw features of {len(rows)} of {len(data.bank)} training images, no augmentation; Adam, batch 1000, weight decay 5e-6, "
                  f"lr 1e-2 -> 1e-6 exponential, {args.probe_epochs} epochs, seed {args.seed}; top-1 and top-5",
    }


def table(columns, rows):
    """Lines of a table: first column left, the others right."""
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    return ["  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths))).rstrip() for row in [columns, *rows]]


def evaluate(run, data, args):
    """Measure one run, print as it goes, and return the figures as plain numbers, with the H and Z that pictures are drawn from."""
    labelled = data.bank_labels is not None and data.test_labels is not None
    rows = labelled_rows(data.bank_labels, args.label_fraction, args.seed) if labelled else []
    say, other = common.say, "" if data.args.dataset == run.args.dataset else f" (trained on {run.args.dataset})"
    say(f"\n{run.path}: {run.args.method}, {run.args.backbone}, step {run.step}, seed {run.args.seed}")
    say(f"{data.args.dataset}{other}, {data.size}x{data.size}: {len(data.bank)} training images, {0 if data.test is None else len(data.test)} test images, "
        f"{len(data.class_names) if labelled else 'no'} classes; features un-augmented, eval mode, {args.precision}")
    h = extract(run.model.backbone, data, args)
    common.check(h[0].isfinite().all() and h[1].isfinite().all(), f"{run.path}: the backbone's output is not finite; try an earlier checkpoint")
    z = tuple(common.project(run.model.projector, part, args.precision) for part in h)
    results, left_out = {}, []
    names = ["5-NN", "200-NN"] + ["linear", "top-5"] * (args.probe_epochs > 0)
    line = "{:<15}{:>6}" + "{:>9}" * len(names)
    if labelled:
        say("\naccuracy, %\n" + line.format("features", "dim", *names))
    for name in args.features:
        if name == "raw" and not labelled:
            continue  # nothing to compare without labels
        bank, queries, why_not = features(name, run, data, args, h, z)
        if why_not:
            left_out.append(f"{FEATURES[name]}: left out, {why_not}")
            continue
        results[name] = {"dim": bank.shape[1]}
        if labelled:
            results[name].update(accuracies(bank, queries, data, rows, args))
            say(line.format(FEATURES[name], bank.shape[1], *("-" if results[name][n] is None else f"{100 * results[name][n]:.2f}" for n in names)))
        if name != "raw":
            results[name]["collapse"] = common.collapse_metrics(sample(queries))
    how = {name: text for name, text in protocol(data, rows, args).items() if name in names} if labelled else {}
    for name, text in how.items():
        say(f"  {name:7}{text}")
    if not labelled:
        say("no labels for both training and test images: the accuracies are left out")
    say_collapse(results, data, min(10_000, len(h[1])))
    for text in left_out:
        say(f"  {text}")
    return {"run": run.path, "method": run.args.method, "step": run.step, "trained_on": run.args.dataset, "dataset": data.args.dataset,
            "training_images": len(data.bank), "test_images": 0 if data.test is None else len(data.test), "labelled_for_probe": len(rows),
            "precision": args.precision, "protocol": how, "features": results, "left_out": left_out}, h, z


def say_collapse(results, data, count):
    """The table of collapse figures, under the names that common.collapse_metrics explains."""
    found = {name: r["collapse"] for name, r in results.items() if "collapse" in r}
    if not found:
        return
    columns = list(next(iter(found.values())))
    cells = [[FEATURES[name], *(f"{f[c]:.0f}" if c.startswith("rank_") or c == "rank" else f"{f[c]:.3f}" for c in columns)] for name, f in found.items()]
    common.say(f"\ncollapse, {count} {'training' if data.test is None else 'test'} images\n" + "\n".join(table(["features", *columns], cells)))
    words = common.collapse_in_words(found["Z"], results["Z"]["dim"]) if "Z" in found else ""
    if words:
        common.say(f"  {words}")


# ==============================================================================
# 6. Pictures
# ==============================================================================


def write_sheet(path, tiles, columns):
    """A PNG of tiles float [n, 3, S, S] in 0 ... 1, `columns` to a row, small ones enlarged to some 64 pixels."""
    factor = max(1, 64 // tiles.shape[-1])
    tiles = tiles.cpu().clamp(0, 1).repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    sheet = make_grid(tiles, nrow=columns, padding=2, pad_value=1.0)
    common.write_file(path, encode_png((sheet * 255).round().to(torch.uint8)).numpy().tobytes())
    common.say(f"{path}: {sheet.shape[2]}x{sheet.shape[1]} pixels")


def plain(data, images, index):
    """images[index] as they are measured, in 0 ... 1: [n, 3, S, S]."""
    return torch.cat(list(data.eval_views(images, index, 100))) * data.std + data.mean


def draw_views(path, data):
    """Eight images, one a row: the image as it is measured, then views of the recipe (recipes with two kinds of views alternate)."""
    index = torch.linspace(0, len(data.train) - 1, min(8, len(data.train))).long()
    streamed = isinstance(data.train, common.Files)
    batch = next(data.train.crops(index[None], data.args, 0, data.device)) if streamed else data.train[index.to(data.device)]
    try:
        views = data.augment(batch, step=0)  # 8 x [n, 3, S, S]
    except ValueError as error:
        raise common.UserError(f"--views: {error}") from error
    tiles = torch.stack([plain(data, data.train, index), *(view * data.std + data.mean for view in views)], 1)  # [n, 9, 3, S, S]
    write_sheet(path, tiles.flatten(0, 1), tiles.shape[1])


def draw_neighbors(path, data, h_bank, h_queries, count=9):
    """Ten test images, one a row, each with its nearest training images by cosine of H; framed green if of the same class, red if not."""
    images, labels = (data.bank, data.bank_labels) if data.test is None else (data.test, data.test_labels)
    index = torch.linspace(0, len(images) - 1, min(10, len(images))).long()
    similarity = F.normalize(h_queries[index.to(data.device)], dim=1) @ F.normalize(h_bank, dim=1).T  # [10, N]
    if data.test is None:
        similarity[range(len(index)), index] = -2.0  # not itself
    nearest = similarity.topk(min(count, len(h_bank) - (data.test is None))).indices.cpu()  # [10, 9]
    tiles = torch.stack([torch.cat([plain(data, images, i[None]), plain(data, data.bank, row)]) for i, row in zip(index, nearest)])
    frame = torch.zeros(*tiles.shape[:2], 3, device=data.device)  # black around the queries, and around all without labels
    if data.bank_labels is not None and labels is not None:
        same = data.bank_labels[nearest.to(data.device)] == labels[index.to(data.device)][:, None]
        frame[:, 1:] = torch.where(same[..., None], frame.new_tensor([0.1, 0.7, 0.2]), frame.new_tensor([0.85, 0.1, 0.1]))
    side = tiles.shape[-1]
    framed = frame[..., None, None].repeat(1, 1, 1, side + 4, side + 4)
    framed[..., 2:-2, 2:-2] = tiles
    write_sheet(path, framed.flatten(0, 1), framed.shape[1])


def import_figure():
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise common.UserError("--plot needs matplotlib, which is not installed; try pip install matplotlib, or leave --plot out") from error
    return Figure


def read_curves(folder):
    """metrics.csv of a run folder as {column: [number or nan]}, {} if there is none."""
    curves = {}
    with contextlib.suppress(OSError, ValueError), open(os.path.join(folder, "metrics.csv"), newline="") as file:
        for row in csv.DictReader(file):
            for name, cell in row.items():
                curves.setdefault(name, []).append(float(cell or "nan"))
    if not curves:
        common.warn(f"{folder}: no readable metrics.csv, so no training curves of this run")
    return curves


def draw_plot(path, spectra):
    """spectra: (run, singular values of H, of Z) of each run. Above the spectra and kNN over time, below the curves over epochs."""
    figure = import_figure()(figsize=(14, 8), layout="constrained")
    panels = figure.subplots(2, 3)
    titles = ["singular values of H", "singular values of Z", "kNN while training, %", "loss", "std * sqrt(d) of Z", "rank of Z (above 1 % of the largest)"]
    for i, (panel, title) in enumerate(zip(panels.flat, titles)):
        panel.set_title(title)
        panel.set_xlabel(("k", "k", "minutes", "epoch", "epoch", "epoch")[i])
        panel.set_ylabel("log10 sigma_k, centred" if i < 2 else "")
        panel.grid(alpha=0.3)
    for run, *values in spectra:
        label = os.path.basename(os.path.normpath(run.folder)) or run.path
        for panel, sigma in zip(panels.flat, values):
            panel.plot(range(1, len(sigma) + 1), sigma.clamp_min(1e-12).log10().tolist(), label=label)
        curves = read_curves(run.folder)
        for panel, x, y, unit in zip(panels.flat[2:], ("seconds", "epoch", "epoch", "epoch"), ("knn", "loss", "std_sqrt_d", "rank_1pct"), (100, 1, 1, 1)):
            points = [(a / 60 if x == "seconds" else a, b * unit) for a, b in zip(curves.get(x, []), curves.get(y, [])) if a == a and b == b]
            panel.plot(*(zip(*points) if points else ([], [])), marker=".", label=label)
    panels.flat[0].legend(fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    common.write_file(path, buffer.getvalue())
    common.say(f"{path}: spectra and training curves of {len(spectra)} run{'s' * (len(spectra) > 1)}")


# ==============================================================================
# 7. All runs
# ==============================================================================


def run(args):
    if args.plot:
        import_figure()
    device, cache, reports, spectra = common.set_up(args), {}, [], []
    for path in args.runs:
        trained = load_run(path, device)
        data = load_data(trained, args, device, cache)
        with unchanged(trained.model):
            report, h, z = evaluate(trained, data, args)
        common.say(f"  the network is unchanged: sha256 of parameters and buffers {checksum(trained.model)[:12]} before and after")
        reports.append(report)
        if args.plot:
            spectra.append((trained, singular_values(h[1]), singular_values(z[1])))
        if args.neighbors:
            draw_neighbors(args.neighbors, data, *h)
        if args.views:
            draw_views(args.views, data)
    if args.plot:
        draw_plot(args.plot, spectra)
    if args.json:
        common.write_file(args.json, (json.dumps(reports, indent=1) + "\n").encode())


if __name__ == "__main__":
    common.main(run, parse_args)
