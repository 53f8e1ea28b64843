"""What trained runs are worth: kNN, a linear probe, collapse figures, pictures.

    python eval.py runs/cw_rgp-patterns-s0                       # a run folder, or its last.pt; any number of them
    python eval.py runs/*/last.pt --plot spectra.png             # singular values and training curves (needs matplotlib)
    python eval.py runs/a --label-fraction 0.01                  # the probe sees 1 % of the labels
    python eval.py runs/a --dataset folder --data-dir DIR        # another data set than the one trained on
    python eval.py runs/a --probe-epochs 0 --neighbors near.png --views views.png

All images are scored, un-augmented, in eval mode, at the last checkpoint. What is measured:

    H          backbone(x), the representation that papers evaluate
    Z          projector(H), what the loss sees
    W          Z whitened by the method's own layer (wmse, cw_rgp, shuffled_dbn): it has no running statistics, so Z is cut at random
               into slices as large as in training; the last slice is filled up with rows of the first, and the fill dropped
    raw        the pixels, and
    untrained  H of the weights that the run started from: the two baselines

    5-NN       majority of 5 Euclidean neighbours among the training images (W-MSE, 2007.06346; its code, htdt/self-supervised)
    200-NN     200 cosine neighbours, each votes with exp(cos / 0.1) (Wu et al. 1805.01978 with the temperature of MoCo's demo)
    linear     a linear layer on the fixed features: Adam, batches of 1000, weight decay 5e-6, learning rate from 1e-2 to 1e-6,
               exponential over 500 epochs (htdt/self-supervised, eval/sgd.py); top-1 and top-5
    collapse   common.collapse_metrics of at most 10,000 evenly spaced test images (training images where there are no others)

All parameters and buffers are hashed before and after: a probe that moved a batch norm's statistics would end in an error.
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
from torchvision.utils import make_grid, save_image

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[1:1] = [os.path.join(HERE, "methods"), HERE]  # the methods: in their folder, or beside this file
import common  # noqa: E402

FEATURES = {"H": "H", "Z": "Z", "W": "W whitened Z", "raw": "raw pixels", "untrained": "untrained H"}
# method -> the flag with the size of a slice, and the whitening of a slice z [w, d]; channels in their own order, so slices compare
WHITENING = {
    "wmse": ("w_size", lambda module, args, z: module.whiten(z, args.whitening, args.eps)),
    "cw_rgp": ("w_size", lambda module, args, z: module.channel_whiten(z, args.groups, None, args.eps)),
    "shuffled_dbn": ("batch_size", lambda module, args, z: module.decorrelate(z, args.groups, None)),
}

# ==============================================================================
# 1. Command line
# ==============================================================================


def feature_list(text):
    names = text.split(",")
    if not set(names) <= set(FEATURES):
        raise argparse.ArgumentTypeError(f"'{text}' is not a list of {', '.join(FEATURES)}; try H,Z")
    return names


def parse_args(argv=None):
    parser = common.OneLineParser(prog="eval.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="runs/<run> or runs/<run>/last.pt")
    add("--features", type=feature_list, default=list(FEATURES), help="what to measure, of H,Z,W,raw,untrained (default: all)")
    add("--dataset", choices=common.DATASETS, help="evaluate on another data set than the run's own")
    add("--data-dir", help="where the data set lies (default: the run's own; with another --dataset: data)")
    add("--probe-epochs", type=common.number(int, 0, example=500), default=500, help="of the linear probe (default: 500); 0: no probe")
    add("--label-fraction", type=common.number(float, above=0, most=1, example=0.1), default=1.0,
        help="share of each class's labels to probe with (default: 1)")
    add("--seed", type=common.number(int, 0, 2**31 - 1, example=0), default=0,
        help="of the probe, its labels, the slices and the views (default: 0)")
    add("--plot", metavar="FILE.png", help="singular values of H and Z, and the training curves")
    add("--neighbors", metavar="FILE.png", help="images and their nearest neighbours in H (of one run)")
    add("--views", metavar="FILE.png", help="augmented views of the run's recipe (of one run)")
    add("--json", metavar="FILE", help="write all figures to this file as JSON")
    add("--batch-size", type=common.number(int, 1, example=500), help="images that pass the backbone at a time (default: 500, fewer above 64 pixels)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto, the default: a GPU where there is one")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="of the features (auto: bf16 where the processor has it); kNN, probe: fp32")
    add("--num-workers", type=common.number(int, 0, 256, example=2), default=2, help="loader processes, if images do not fit in memory")
    args = parser.parse_args(argv)
    common.check(common.world_size() == 1, "eval.py is one process; start it without torchrun")
    common.check(args.dataset != "folder" or args.data_dir, "--dataset folder needs --data-dir DIR, the folder of your images")
    for flag in ("plot", "neighbors", "views", "json"):
        check_writable(f"--{flag}", getattr(args, flag))
    common.check(len(args.runs) == 1 or not (args.neighbors or args.views), f"--neighbors, --views: of one run; try {args.runs[0]}")
    return args


def check_writable(flag, path):
    """Before the measuring, not after it."""
    if path is not None:
        common.check(flag == "--json" or path.lower().endswith(".png"), f"{flag} {path} is not the name of a PNG file; try {path}.png")
        common.check(not os.path.isdir(path), f"{flag} {path} is a folder; try a file name in it")
        try:
            open(path + ".tmp", "wb").close()
            os.remove(path + ".tmp")
        except OSError as error:
            raise common.UserError(f"{flag} {path} cannot be written ({error.strerror}); try a folder that exists") from error


# ==============================================================================
# 2. A run and its data
# ==============================================================================


def load_run(path, device):
    """A run's network as it is and as it started: a namespace of path, folder, module (its file), args, step, model, untrained."""
    checkpoint = common.load_last(path) if os.path.isdir(path) else common.load_checkpoint(path)
    common.check(checkpoint is not None, f"{path}: no last.pt in this folder; try runs/<run>/last.pt")
    flags = checkpoint.get("args")
    method = flags.get("method") if isinstance(flags, dict) else None
    known = isinstance(method, str) and method.isidentifier() and any(
        os.path.isfile(os.path.join(folder, f"{method}.py")) for folder in (os.path.join(HERE, "methods"), HERE))
    common.check(known, f"{path} is a run of the unknown method {method!r}; put {method}.py into {os.path.join(HERE, 'methods')}")
    try:
        module, args = importlib.import_module(method), argparse.Namespace(**flags)
        torch.manual_seed(args.seed)  # as the method's train() does
        untrained = module.build(args).to(device, memory_format=torch.channels_last).eval()
        model = module.build(args).to(device, memory_format=torch.channels_last).eval()
        model.load_state_dict(checkpoint["model"])
        folder = path if os.path.isdir(path) else os.path.dirname(path)
        return SimpleNamespace(path=path, folder=folder, module=module, args=args, step=checkpoint["step"],
                               model=model, untrained=untrained)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise common.UserError(f"{path} does not fit {method}.py ({type(error).__name__}: {reason}); "
                               f"try the {method}.py it was trained with") from error


def load_data(run, args, device):
    """The data set to evaluate on, as common.Data, at the image size that the run was trained with."""
    wanted = argparse.Namespace(**vars(run.args))
    if args.dataset not in (None, wanted.dataset):
        wanted.dataset, wanted.data_dir = args.dataset, "data"
    wanted.data_dir = args.data_dir or wanted.data_dir
    wanted.batch_size, wanted.views, wanted.seed, wanted.num_workers = 1, 8, args.seed, args.num_workers  # 8: the columns of --views
    return common.load_data(wanted, device)


def checksum(network):
    """Hash of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        digest.update(name.encode() + tensor.cpu().flatten().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def unchanged(network):
    """Raises RuntimeError if what is done inside changes a parameter or buffer, as a batch norm left in training mode would."""
    before = checksum(network)
    yield before
    if checksum(network) != before:
        raise RuntimeError("a parameter or buffer of the network changed while it was evaluated: the figures are void")


# ==============================================================================
# 3. Features and accuracies
# ==============================================================================


def whiten_in_slices(z, size, whiten, seed=0):
    """z [N, d] -> [N, d]: cut at random into slices of `size` rows, each whitened by itself.

    At random, since images in the order of their folders would make slices of one class. The last slice is filled up with rows of
    the first, and the fill is dropped. Needs N >= size: a row that came twice into a slice would make it singular."""
    order = torch.randperm(len(z), generator=torch.Generator().manual_seed(seed)).to(z.device)
    filled = torch.cat([order, order[: -len(z) % size]])
    out = torch.empty_like(z)
    out[order] = torch.cat([whiten(z[rows]) for rows in filled.split(size)])[: len(z)].to(z.dtype)
    return out


def whitened(run, z, seed):
    """[bank, queries] of whitened Z from z = [bank, queries]. Raises UserError that says why there is none."""
    common.check(run.args.method in WHITENING, f"{run.args.method} has no whitening layer")
    flag, whiten = WHITENING[run.args.method]
    size, fewest = getattr(run.args, flag), min(len(part) for part in z)
    common.check(fewest >= size, f"{fewest} images are fewer than the {size} that are whitened together")
    with contextlib.suppress(torch.linalg.LinAlgError):
        w = [whiten_in_slices(part, size, lambda rows: whiten(run.module, run.args, rows), seed) for part in z]
        if all(part.isfinite().all() for part in w):
            return w
    raise common.UserError("these embeddings fill too few dimensions to be whitened")


def extract(network, data, args):
    """[bank [N, d], queries [M, d]]: network(x) of training and of test images (of the training images again where there are no others)."""
    bank = common.extract(network, data, data.labelled_train, args.precision, args.batch_size)
    return [bank, common.extract(network, data, data.test, args.precision, args.batch_size) if has_test(data) else bank]


def has_test(data):
    """False where there are no test images: common.Data then puts the training images in their place."""
    return data.test is not data.labelled_train


def sample(x, limit=10_000):
    """At most `limit` evenly spaced rows."""
    return x[torch.linspace(0, len(x) - 1, min(limit, len(x)), device=x.device, dtype=torch.float64).long()]


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
    """(top-1, top-5) as fractions of all test rows, by the W-MSE protocol; top-5 is None with five classes or fewer.

    x [N, d], y [N]: of these only `rows` are trained on; x_test [M, d], y_test [M]. Classes may be missing on either side."""
    torch.manual_seed(seed)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on CPUs: the matrices are small, and threads that wait for a busy core made it ten times slower
    classes = int(max(y.max(), y_test.max())) + 1
    layer = nn.Linear(x.shape[1], classes).to(x.device)
    optimizer = torch.optim.Adam(layer.parameters(), weight_decay=5e-6, fused=True)
    for epoch in range(epochs):
        optimizer.param_groups[0]["lr"] = probe_learning_rate(epoch, epochs)
        for batch in rows[torch.randperm(len(rows))].to(x.device).split(1000):  # the last one may be smaller
            optimizer.zero_grad()
            F.cross_entropy(layer(x.index_select(0, batch)), y[batch]).backward()
            optimizer.step()
    torch.set_num_threads(threads)
    with torch.no_grad():
        best = torch.cat([layer(part).topk(min(5, classes)).indices for part in x_test.split(1000)])  # [M, 5], best first
    hits = (best == y_test[:, None]).double()
    return hits[:, 0].mean().item(), hits.sum(1).mean().item() if classes > 5 else None


def accuracies(bank, queries, data, rows, args):
    """{"5-NN", "200-NN", "linear", "top-5"} as fractions; without a probe the last two are missing."""
    labels, test_labels = data.train_labels, data.test_labels
    figures = {"5-NN": common.knn_accuracy(bank, labels, queries, test_labels, k=5, temperature=None),
               "200-NN": common.knn_accuracy(bank, labels, queries, test_labels, k=200, temperature=0.1)}
    if args.probe_epochs:
        figures["linear"], figures["top-5"] = linear_probe(bank, labels, rows, queries, test_labels, args.probe_epochs, args.seed)
    return figures


# ==============================================================================
# 4. The report of one run
# ==============================================================================


def protocols(data, rows, args):
    """{name of a figure: how it was taken}, {} without labels."""
    n = len(data.labelled_train)
    texts = {"5-NN": f"majority of the {min(5, n)} nearest of {n} training images; Euclidean, raw; a tie goes to the smallest label",
             "200-NN": f"the {min(200, n)} nearest of {n} training images; cosine; each votes with exp(cos / 0.1)",
             "linear": f"nn.Linear on raw features of {len(rows)} of {n} training images; Adam, batch 1000, lr 1e-2 -> 1e-6 exponential, "
                       f"weight decay 5e-6, {args.probe_epochs} epochs, seed {args.seed}"}
    return {name: text for name, text in texts.items() if len(rows) and (name != "linear" or args.probe_epochs)}


def evaluate(run, data, args):
    """Measure one run and print it line by line. Returns the figures as plain numbers, and H and Z as [bank, queries] for the pictures."""
    labelled, count, tested = data.labelled, len(data.labelled_train), len(data.test) if has_test(data) else 0
    rows = labelled_rows(data.train_labels, args.label_fraction, args.seed) if labelled else []
    place = "" if data.args.dataset == "patterns" else f" in {data.args.data_dir}"
    common.say(f"\n{run.path}: {run.args.method}, {run.args.backbone}, trained on {run.args.dataset}, step {run.step}, seed {run.args.seed}"
               f"\nevaluated on {data.args.dataset}{place}, {data.size}x{data.size}: {count} training images, {tested} test images, "
               f"{len(data.class_names) if labelled else 'no'} classes; {args.precision}")
    h = extract(run.model.backbone, data, args)
    common.check(all(part.isfinite().all() for part in h), f"{run.path}: the backbone's output is not finite; try an earlier checkpoint")
    z = [common.project(run.model.projector, part, args.precision) for part in h]
    how, results, left_out = protocols(data, rows, args), {}, []
    names = [*how, *["top-5"] * ("linear" in how)]
    layout = "{:14}{:>6}" + "{:>9}" * len(names)
    unlabelled = "no labels for both training and test images: accuracies are left out"
    common.say("\n" + layout.format("accuracy, %", "dim", *names) if labelled else unlabelled)
    for name in args.features:
        if name == "raw" and (not labelled or 12 * data.size**2 * (count + tested) > common.MEMORY_LIMIT):
            left_out.append("raw pixels left out: " + ("no labels" if not labelled else "they do not fit in memory"))
            continue
        try:
            network = {"raw": nn.Flatten(), "untrained": run.untrained.backbone}.get(name)
            x = extract(network, data, args) if network else whitened(run, z, args.seed) if name == "W" else h if name == "H" else z
        except common.UserError as reason:
            left_out.append(f"{FEATURES[name]} left out: {reason}")
            continue
        figures = results[name] = {"dim": x[0].shape[1], **(accuracies(*x, data, rows, args) if labelled else {})}
        if labelled:
            percent = ["-" if figures[n] is None else f"{100 * figures[n]:.2f}" for n in names]
            common.say(layout.format(FEATURES[name], figures["dim"], *percent))
        if name != "raw":
            figures["collapse"] = common.collapse_metrics(sample(x[1]))
    for name, text in how.items():
        common.say(f"  {name:7} {text}")
    say_collapse(results, f"{min(10_000, len(h[1]))} {'test' if tested else 'training'} images, eval mode; see common.collapse_metrics")
    for text in left_out:
        common.say(f"  {text}")
    return {"run": run.path, "method": run.args.method, "step": run.step, "trained_on": run.args.dataset, "dataset": data.args.dataset,
            "training_images": count, "test_images": tested, "labels_for_probe": len(rows), "precision": args.precision,
            "protocols": how, "features": results, "left_out": left_out}, h, z


def say_collapse(results, how):
    """The collapse figures as a table, under the names that common.collapse_metrics explains."""
    found = {name: figures["collapse"] for name, figures in results.items() if "collapse" in figures}
    if found:
        columns = list(next(iter(found.values())))
        layout = "{:14}" + "".join(f" {{:>{max(8, len(column) + 1)}}}" for column in columns)  # never without a blank between
        common.say("\n" + layout.format("collapse", *columns))
        for name, figures in found.items():
            cells = (f"{figures[c]:.0f}" if c in ("dim", "rank", "rank_1pct") else f"{figures[c]:.3f}" for c in columns)
            common.say(layout.format(FEATURES[name], *cells))
        words = common.collapse_in_words(found["Z"], results["Z"]["dim"]) if "Z" in found else ""
        common.say(f"  {how}" + (f"\n  {words}" if words else ""))


# ==============================================================================
# 5. Pictures
# ==============================================================================


def write_sheet(path, tiles):
    """A PNG of tiles [rows, columns, 3, S, S] in 0 ... 1, small ones enlarged to some 64 pixels."""
    factor = max(1, round(64 / tiles.shape[-1]))
    large = tiles.cpu().clamp(0, 1).flatten(0, 1).repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    sheet = make_grid(large, nrow=tiles.shape[1], padding=2, pad_value=1.0)
    buffer = io.BytesIO()
    save_image(sheet, buffer, format="png")
    common.write_file(path, buffer.getvalue())
    common.say(f"{path}: {sheet.shape[2]}x{sheet.shape[1]} pixels")


def colours(data, x):
    """Views x [n, 3, S, S] as the network sees them -> in 0 ... 1."""
    mean, std = (torch.as_tensor(m, device=x.device).view(3, 1, 1) for m in (data.mean, data.std))
    return x * std + mean


def plain(data, images, index):
    """images[index] as they are measured, in 0 ... 1: [n, 3, S, S]."""
    return colours(data, torch.cat(list(data.eval_views(images, index, 100))))


def draw_views(path, data):
    """Eight training images, one a row: as they are measured, then eight views (a recipe with two kinds of views alternates)."""
    index = torch.linspace(0, len(data.train) - 1, min(8, len(data.train))).long()
    streamed = isinstance(data.train, common.Files)
    batch = next(data.train.crops(index[None], data.args, 0, data.device)) if streamed else data.train[index.to(data.device)]
    try:
        views = [colours(data, view) for view in data.augment(batch, step=0)]  # 8 x [n, 3, S, S]
    except ValueError as error:  # a recipe without a crop, and larger images than it was trained on
        raise common.UserError(f"--views: {error}") from error
    write_sheet(path, torch.stack([plain(data, data.train, index), *views], 1))


def draw_neighbors(path, data, h):
    """Ten images, one a row, and their nine nearest training images by cosine of H; framed green: of the same class, red: of another."""
    images, labels = data.test, data.test_labels if has_test(data) else data.train_labels
    index = torch.linspace(0, len(images) - 1, min(10, len(images))).long()
    similarity = F.normalize(h[1][index.to(data.device)], dim=1) @ F.normalize(h[0], dim=1).T  # [10, N]
    if not has_test(data):
        similarity[range(len(index)), index] = -2.0  # not the image itself
    nearest = similarity.topk(min(9, len(h[0]) - (not has_test(data)))).indices.cpu()  # [10, 9]
    tiles = torch.stack([torch.cat([plain(data, images, i[None]), plain(data, data.labelled_train, row)])
                         for i, row in zip(index, nearest)])  # [10, 10, 3, S, S]
    framed = F.pad(tiles, (2, 2, 2, 2))  # [10, 10, 3, S + 4, S + 4], black around the query, and without labels around all
    if data.train_labels is not None and labels is not None:
        same = data.train_labels[nearest.to(data.device)] == labels[index.to(data.device)][:, None]
        colour = torch.where(same[..., None], tiles.new_tensor([0.1, 0.7, 0.2]), tiles.new_tensor([0.85, 0.1, 0.1]))  # [10, 9, 3]
        border = F.pad(torch.zeros_like(tiles[:, 1:, :1]), (2, 2, 2, 2), value=1.0)
        framed[:, 1:] += border * colour[..., None, None]
    write_sheet(path, framed)


def import_figure():
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise common.UserError("--plot needs matplotlib, which is not there; try pip install matplotlib, or leave --plot out") from error
    return Figure


def read_curves(folder):
    """metrics.csv of a run folder as {column: [number or nan]}, {} if it cannot be read."""
    try:
        with open(os.path.join(folder, "metrics.csv"), newline="") as file:
            rows = [{name: float(cell or "nan") for name, cell in row.items()} for row in csv.DictReader(file)]
        return {name: [row[name] for row in rows] for name in rows[0]}
    except (OSError, ValueError, TypeError, IndexError):
        common.warn(f"{folder or '.'}: no readable metrics.csv, so no training curves of this run")
        return {}


def singular_values(x):
    """Of the centred rows x [N, d], in falling order."""
    x = sample(x).double().cpu()
    return torch.linalg.svdvals(x - x.mean(0))


def draw_plot(path, spectra):
    """spectra: (run, singular values of H, of Z) for each run. Below them the columns of metrics.csv."""
    figure = import_figure()(figsize=(14, 8), layout="constrained")
    panels = list(figure.subplots(2, 3).flat)
    curves = [("seconds", "minutes", 1 / 60, "knn", "kNN while training, %", 100), ("epoch", "epoch", 1, "loss", "loss (each method's own scale)", 1),
              ("epoch", "epoch", 1, "std_sqrt_d", "std sqrt(d) of Z", 1),
              ("epoch", "epoch", 1, "rank_1pct", "rank of Z (above 1 % of the largest)", 1)]
    for run, *values in spectra:
        label = os.path.basename(os.path.abspath(run.folder))
        for panel, sigma, name in zip(panels, values, "HZ"):
            panel.plot(range(1, len(sigma) + 1), sigma.clamp_min(max(1e-12, 1e-8 * sigma[0].item())).log10().tolist(), label=label)
            panel.set(title=f"singular values of centred {name}", xlabel="k", ylabel="log10 sigma_k")
        found = read_curves(run.folder)
        for panel, (x, unit, x_factor, y, title, factor) in zip(panels[2:], curves):
            points = [(a * x_factor, b * factor) for a, b in zip(found.get(x, []), found.get(y, [])) if a == a and b == b]
            panel.plot(*(zip(*points) if points else ([], [])), marker=".", label=label)
            panel.set(title=title, xlabel=unit, yscale="symlog" if y == "loss" else "linear")  # -1 for SimSiam, thousands for Barlow Twins
    for panel in panels:
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    common.write_file(path, buffer.getvalue())
    common.say(f"{path}: spectra and training curves")


# ==============================================================================
# 6. All runs
# ==============================================================================


def run(args):
    if args.plot:
        import_figure()  # before the measuring, not after it
    settings, device = common.set_up(common.Args(device=args.device, precision=args.precision))
    args.precision = settings.precision
    reports, spectra = [], []
    for path in args.runs:
        trained = load_run(path, device)
        data = load_data(trained, args, device)
        with unchanged(trained.model) as digest:
            report, h, z = evaluate(trained, data, args)
        common.say(f"  network unchanged: sha256 of all parameters and buffers {digest[:12]} before and after")
        reports.append(report)
        if args.plot:
            spectra.append((trained, singular_values(h[1]), singular_values(z[1])))
        if args.neighbors:
            draw_neighbors(args.neighbors, data, h)
        if args.views:
            draw_views(args.views, data)
    if args.plot:
        draw_plot(args.plot, spectra)
    if args.json:
        common.write_file(args.json, (json.dumps(reports, indent=1) + "\n").encode())


if __name__ == "__main__":
    common.main(run, parse_args)
