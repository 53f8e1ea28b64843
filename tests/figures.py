"""The two figures of the whitening paper, from runs of ours: a script, not a test.

    python tests/figures.py 2          five ways to whiten: accuracy, loss and ranks along training
    python tests/figures.py 3          H, Z and whitened Z as features along training
    python tests/figures.py 2 --epochs 20 --flags="--dataset cifar10 --data-dir DIR"

The paper is Weng et al. 2022 (arXiv 2210.03586), section 3.2. Its figures are of ResNet-18 and 200
epochs of CIFAR-10. Ours are of the defaults of wmse.py, on `patterns` if --flags says nothing else,
and with five seeds. A line is the mean, and the band around it is one standard deviation.

In Figure 2 the accuracy is that of 20-NN on H, where the paper has a linear probe. A rank is drawn
beside std*sqrt(d), since nearly equal embeddings can have full rank too. Figure 3 is of Cholesky
whitening (the paper does not say which). Whitened Z is Z after the whitening of the loss. A stable
rank is divided by d, so that 100 % is white.

Runs stay in --cache, and a run that is there is not trained again. A figure that was not measured,
such as a kNN without labels, is nan and is not drawn.
"""

import concurrent.futures
import csv
import hashlib
import importlib
import io
import json
import os
import shlex
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
sys.path[1:1] = [ROOT, os.path.join(ROOT, "methods")]
import common  # noqa: E402
import numpy as np  # noqa: E402
import wmse  # noqa: E402

evaluation = importlib.import_module("eval")  # the name of a builtin: not to be imported as such

SEEDS = range(10, 15)  # those of tests/claims.py
FIXED = ("--whitening", "--epochs", "--seed", "--keep-every", "--eval-every", "--out", "--resume")
WHITENINGS = {"Plain": "none", "BN": "bn", "PCA": "pca", "ZCA": "zca", "CD": "cholesky"}
# Panels of Figure 2: title, column of metrics.csv, factor.
COLUMNS = [("20-NN of H, %", "knn", 100), ("loss", "loss", 1),
           ("rank of Z (above 1 % of the largest)", "rank_1pct", 1),
           ("std sqrt(d) of Z", "std_sqrt_d", 1),
           ("rank of H (above 1 % of the largest)", "rank_h", 1)]
FEATURES = {"H": "H", "Z": "Z", "W": "whitened Z"}
# Panels of Figure 3: title, and a function of what eval.py says of a feature.
MEASURES = [("linear probe, %", lambda f: 100 * f["linear"]),
            ("5-NN, %", lambda f: 100 * f["5-NN"]),
            ("stable rank / d, %", lambda f: 100 * f["collapse"]["stable_rank"] / f["dim"])]


# ==============================================================================
# Runs
# ==============================================================================


def trained(whitening, seed, args):
    """The folder of a run, which is trained now unless it is complete. Raises UserError."""
    flags = [*shlex.split(args.flags), "--whitening", whitening, "--epochs", str(args.epochs),
             "--seed", str(seed)]
    if whitening == WHITENINGS["CD"]:
        flags += ["--keep-every", str(args.every)]  # for Figure 3
    folder = os.path.join(args.cache, f"{whitening}-s{seed}-{digest(wmse.parse_args(flags))}")
    if rows_of(folder) < args.epochs:
        call([os.path.join(ROOT, "methods", "wmse.py"), *flags, "--out", folder, "--resume"],
             folder)
    return folder


def digest(flags):
    """Eight letters that tell runs with other flags, or of another folder of images, apart."""
    values = {**vars(flags), "data_dir": os.path.abspath(flags.data_dir)}
    return hashlib.sha256(repr(sorted(values.items())).encode()).hexdigest()[:8]


def rows_of(folder):
    """How many epochs a run has behind it."""
    path = os.path.join(folder, "metrics.csv")
    try:
        with open(path, newline="") as file:
            return len(list(csv.DictReader(file)))
    except (FileNotFoundError, ValueError):  # --resume writes it anew
        return 0


def call(command, folder):
    """Run a Python script with one thread. Raises UserError with its last line if it fails."""
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    last_line = (done.stderr.strip().splitlines() or ["it was stopped"])[-1]
    common.check(done.returncode == 0, f"{shlex.join(command)}: {last_line}; try "
                 f"it by itself, or remove {folder}")


def in_parallel(function, jobs, args, what):
    """[function(*job)] for each job, --jobs at a time. The first error ends the rest."""
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        try:
            waiting = [pool.submit(function, *job, args) for job in jobs]
            done = concurrent.futures.as_completed(waiting)
            for future in common.said(done, len(jobs), what):
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [future.result() for future in waiting]


def all_trained(whitenings, args):
    """{whitening: folders of its seeds}."""
    jobs = [(name, seed) for name in whitenings for seed in SEEDS]
    folders = in_parallel(trained, jobs, args, "run")
    return {name: [f for (n, _), f in zip(jobs, folders) if n == name] for name in whitenings}


def measured(folder, args):
    """What eval.py says of the kept checkpoints of a run: [(epoch, figures by feature)]."""
    report = os.path.join(folder, "figure3.json")
    epochs = range(args.every, args.epochs + 1, args.every)
    if not os.path.isfile(report):
        paths = [os.path.join(folder, f"epoch-{epoch:04d}.pt") for epoch in epochs]
        call([os.path.join(ROOT, "eval.py"), *paths, "--features", "H,Z,W", "--json", report],
             folder)
    try:
        with open(report) as file:
            return list(zip(epochs, (run["features"] for run in json.load(file)), strict=True))
    except (ValueError, TypeError, KeyError) as error:
        raise common.UserError(f"{report} is damaged, or of another --every; remove it") from error


# ==============================================================================
# Figures
# ==============================================================================


def figure_2(args):
    """{panel: {name: (epochs, a list of values per seed)}}."""
    folders = all_trained(WHITENINGS.values(), args)
    panels = {}
    for title, column, factor in COLUMNS:
        panels[title] = {}
        for name, whitening in WHITENINGS.items():
            curves = [evaluation.read_curves(os.path.join(folder, "metrics.csv"))
                      for folder in folders[whitening]]
            values = [[factor * value for value in curve[column]] for curve in curves]
            panels[title][name] = curves[0]["epoch"], values
    return panels


def figure_3(args):
    """{panel: {name: (epochs, a list of values per seed)}}."""
    folders = all_trained([WHITENINGS["CD"]], args)[WHITENINGS["CD"]]
    found = in_parallel(measured, [(folder,) for folder in folders], args, "measured")
    common.check("linear" in found[0][0][1]["H"], "--flags: Figure 3 needs images with labels; "
                 "try it without --flags")
    epochs = [epoch for epoch, _ in found[0]]
    panels = {}
    for title, measure in MEASURES:
        panels[title] = {}
        for key, name in FEATURES.items():
            values = [[measure(figures[key]) for _, figures in run] for run in found]
            panels[title][name] = epochs, values
    return panels


def mean_and_std(values):
    """Over the seeds, epoch by epoch. values: a list per seed."""
    return np.mean(values, axis=0).tolist(), np.std(values, axis=0, ddof=1).tolist()


def draw(panels, path):
    """A PNG with a panel per quantity: means over the seeds and bands of one deviation."""
    figure = evaluation.import_figure()(figsize=(4 * len(panels), 3.6), layout="constrained")
    axes = figure.subplots(1, len(panels))
    for axis, (title, curves) in zip(axes, panels.items()):
        for name, (epochs, values) in curves.items():
            mean, std = mean_and_std(values)
            low, high = ([m + sign * s for m, s in zip(mean, std)] for sign in (-1, 1))
            axis.plot(epochs, mean, marker=".", label=name)
            axis.fill_between(epochs, low, high, alpha=0.2)
        axis.set(title=title, xlabel="epoch")
        axis.grid(alpha=0.3)
    axes[0].legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90)
    evaluation.write_output(path, buffer.getvalue())
    common.say(path)


def say_last(panels):
    """Print the last point of each curve as a table: mean and standard deviation."""
    names = list(next(iter(panels.values())))
    common.say(f"{'after the last epoch drawn':38}" + "".join(f"{name:>16}" for name in names))
    for title, curves in panels.items():
        cells = []
        for _, values in curves.values():
            mean, std = mean_and_std(values)
            cells.append(f"{mean[-1]:.4g} ± {std[-1]:.2g}")
        common.say(f"{title:38}" + "".join(f"{cell:>16}" for cell in cells))


# ==============================================================================
# Command line
# ==============================================================================


def check_flags(text):
    """Raise UserError unless wmse.py takes the flags, and none of them is for this script."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise common.UserError(f"--flags: {error}; try --flags=\"--batch-size 128\"") from error
    for word in words:
        name = word.split("=")[0]
        common.check(name not in FIXED, f"--flags: {name} is chosen by figures.py; leave it out")
    wmse.parse_args(words)


def parse_args(argv=None):
    """The flags as a namespace. Raises UserError."""
    first_line = (__doc__ or "figures.py").splitlines()[0]
    parser = common.OneLineParser(prog="figures.py", description=first_line, allow_abbrev=False)
    add, number = parser.add_argument, common.number
    add("figure", type=int, choices=(2, 3), help="2: five whitenings; 3: H, Z, whitened Z")
    add("--epochs", type=number(int, least=1, most=10**6, example=10), default=10, metavar="N",
        help="of each run (default: 10)")
    add("--every", type=number(int, least=1, most=10**6, example=2), default=2, metavar="N",
        help="epochs between two points of Figure 3 (default: 2)")
    add("--jobs", type=number(int, least=1, most=1000, example=2), default=2, metavar="N",
        help="runs at a time, each with one thread (default: 2)")
    add("--flags", default="", help="of wmse.py, in one string: --flags=\"--batch-size 128\"")
    add("--cache", default=os.path.join("runs", "figures"), metavar="DIR",
        help="folder of the runs (default: runs/figures); another one after the code changed")
    add("--plot", metavar="FILE.png", help="(default: figure2.png or figure3.png)")
    args = parser.parse_args(argv)
    args.plot = f"figure{args.figure}.png" if args.plot is None else args.plot
    common.check(args.every <= args.epochs, f"--every {args.every} is more than --epochs; "
                 f"try --every {args.epochs}")
    check_flags(args.flags)
    evaluation.import_figure()  # before training, not after it
    evaluation.check_writable("--plot", args.plot)
    return args


def run(args):
    """Train, print, draw."""
    lock = common.lock_folder(args.cache, "--cache")
    common.check(lock, f"--cache {args.cache} is in use by another figures.py; wait for it, or try "
                 "another --cache")
    with lock:
        panels = (figure_2 if args.figure == 2 else figure_3)(args)
    say_last(panels)
    draw(panels, args.plot)


if __name__ == "__main__":
    common.main(run, parse_args)
