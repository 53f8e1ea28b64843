"""The documents' claims: which of them hold here, with which seeds and figures.

    python tests/claims.py                   list the claims, the minutes they take, the verdicts
    python tests/claims.py exact             check those that are exact (seconds, no training)
    python tests/claims.py A4                run a claim, here its parts A4-loss, A4-rank, ...
    python tests/claims.py all --jobs 2      run all; what is in --cache is not trained again
    python tests/claims.py page              the table of tests/README.md, from what is on record
    python tests/claims.py gradients RUN     the gradient of a run as a sum of two terms

A direction is a sum of figures of runs that differ in what the sentence is about, such as kNN of
one minus kNN of the other. Runs with the same seed have the same order of images, and the same
views if batch and augmentation agree. There are five seeds, fixed beforehand. The margin was fixed
before the claim's first run, but for those that tests/README.md names. The verdict rests on the
95 % interval (Student's t) of the mean over the seeds, in the direction that the sentence expects:

    HOLDS                   above the margin
    OPPOSITE                below minus the margin
    NO DIFFERENCE           between the two
    NOT SEEN AT THIS SCALE  anything else: the seeds differ too much, or a figure is missing

Where the sentence says that two things are alike, HOLDS is between, and OPPOSITE is outside. Where
it says that one is not worse, HOLDS is above minus the margin, and OPPOSITE is below it.
The exit status is 1 if an exact claim fails or a verdict differs from the one on record.
No recipe is tuned to a claim: every run has its method's defaults but for what the claim changes.
"""

import collections
import concurrent.futures
import contextlib
import copy
import csv
import difflib
import functools
import glob
import importlib
import io
import json
import math
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import dataclass
from types import SimpleNamespace

ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
sys.path[1:1] = [os.path.join(ROOT, "tests"), ROOT, os.path.join(ROOT, "methods")]
import common  # noqa: E402
import torch  # noqa: E402
from barlow import barlow_twins_loss  # noqa: E402
from byol import byol_loss  # noqa: E402
from directions import DIRECTIONS, EPOCHS, FIRST_SEED, SEEDS, Direction  # noqa: E402
from exact import (  # noqa: E402
    EXACT,
    added,
    barlow_terms,
    byol_terms,
    moco_terms,
    of_length_1,
    pulled_back,
    simclr_terms,
    standardised,
    unchanged,
    vicreg_terms,
)
from moco import info_nce_loss  # noqa: E402
from simclr import nt_xent_loss  # noqa: E402
from vicreg import vicreg_loss  # noqa: E402

evaluation = importlib.import_module("eval")  # the name of a builtin: not to be imported as such

# ==============================================================================
# The verdict
# ==============================================================================

# 97.5 % quantile of Student's t by degrees of freedom: half of a 95 % interval, in standard errors.
T_QUANTILE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306,
              9: 2.262}
NOT_SEEN = "NOT SEEN AT THIS SCALE"
ERROR = 0.05  # a claim's verdict is wrong with at most this probability, if values are normal


def interval(values):
    """(mean, half of the width of its 95 % interval) of 2 to 10 numbers, by Student's t; NaN if one
    of them is not finite."""
    n = len(values)
    if not all(map(math.isfinite, values)):
        return math.nan, math.nan
    half = T_QUANTILE[n - 1] * statistics.stdev(values) / math.sqrt(n)
    return statistics.fmean(values), half


def verdict(values, margin, sign):
    """HOLDS, OPPOSITE, NO DIFFERENCE or NOT_SEEN for a claim's value with each seed.

    sign: 1 or -1 if the sentence expects a value above 0 or below, 0 if it expects none, 2 or -2 if
    it expects one that is not below 0 or not above."""
    mean, half = interval(values)
    if math.isnan(mean):
        return NOT_SEEN
    side = -1 if sign < 0 else 1
    low, high = side * mean - half, side * mean + half
    inside = -margin <= low and high <= margin
    if sign == 0:
        outside = low > margin or high < -margin
        if inside:
            return "HOLDS"
        return "OPPOSITE" if outside else NOT_SEEN
    if abs(sign) == 2 and low > -margin:
        return "HOLDS"
    if abs(sign) == 2:
        return "OPPOSITE" if high < -margin else NOT_SEEN
    if low > margin:
        return "HOLDS"
    if high < -margin:
        return "OPPOSITE"
    return "NO DIFFERENCE" if inside else NOT_SEEN


# ==============================================================================
# Figures of a run: the last row of metrics.csv, and these of its checkpoint
# ==============================================================================


class Trained:
    """A trained run with what the figures below need. h, z: lists as `features` returns them."""

    def __init__(self, folder):
        device = torch.device("cpu")
        self.run = evaluation.load_run(folder, device)
        wanted = SimpleNamespace(dataset=None, data_dir=None, num_workers=0, seed=0)
        self.data = evaluation.load_data(self.run, wanted, device)

    @functools.cached_property
    def h(self):
        return self.features(self.run.model.backbone)

    @functools.cached_property
    def z(self):
        return self.projected(self.run.model, self.h)

    @functools.cached_property
    def z_start(self):
        """Z of the untrained network."""
        return self.projected(self.run.untrained, self.features(self.run.untrained.backbone))

    def features(self, network):
        """[of training images [5000, d], of test images [1000, d]]"""
        parts = self.data.bank, self.data.queries
        return [common.extract(network, self.data, x, self.run.args.precision) for x in parts]

    def projected(self, model, h):
        return [common.project(model.projector, x, self.run.args.precision) for x in h]

    def knn(self, x):
        return common.knn_accuracy(x[0], self.data.bank_labels, x[1], self.data.query_labels)


def mean_cosine(z):
    """Mean cosine of two different rows of z [N, d]."""
    u, n = of_length_1(z.double()), len(z)
    return float((u.sum(0).square().sum() - n) / (n * (n - 1)))


def entropy(p):
    """Mean entropy of the rows of p [N, K], in nats."""
    return float(-(p * p.clamp_min(1e-300).log()).sum(1).mean())


def diagonal_share(weight, z):
    """Share of the squared entries of W [d, d] that is diagonal in the eigenvectors of the
    correlation of z [N, d]: 1 if both have the same eigenvectors, some 1 / d if unrelated."""
    u = torch.linalg.eigh((z.T @ z / len(z)).double())[1]
    w = u.T @ weight.detach().double() @ u
    return float(w.diagonal().square().sum() / w.square().sum())


def stable_rank_share(x):
    """stable_rank of x [N, d], divided by d: 1 if white."""
    return common.collapse_metrics(x)["stable_rank"] / x.shape[1]


# The functions below are named as their figures. Figures that end in _start are of the untrained
# network.


def knn_z(trained):
    return trained.knn(trained.z)


def knn_w(trained):
    """Of whitened Z."""
    return trained.knn(evaluation.whitened(trained.run, trained.z, 0))


def knn_untrained(trained):
    return trained.knn(trained.features(trained.run.untrained.backbone))


def knn_teacher(trained):
    """Of the slow network."""
    return trained.knn(trained.features(trained.run.model.target_backbone))


def whiteness_h(trained):
    return stable_rank_share(trained.h[1])


def corr_start(trained):
    return common.collapse_metrics(trained.z_start[1])["corr"]


def negative_cosine(trained):
    return mean_cosine(trained.z[1])


def negative_cosine_start(trained):
    return mean_cosine(trained.z_start[1])


def predictor_alignment(trained):
    return diagonal_share(trained.run.model.predictor.weight, trained.z[1])


def predictor_alignment_start(trained):
    return diagonal_share(trained.run.untrained.predictor.weight, trained.z_start[1])


def target_entropy(trained):
    """DINO: entropy of the centred and sharpened target of a test image; log K at most."""
    model = trained.run.model
    h = common.extract(model.target_backbone, trained.data, trained.data.queries)
    scores = common.project(model.target_projector, h)
    temperature = 0.1 if model.args.no_sharpening else 0.04
    return entropy(((scores - model.centre) / temperature).double().softmax(1))


def usage_entropy(trained):
    """SwAV: entropy of the shares of the test images whose nearest prototype is k."""
    scores = trained.run.model.prototypes(trained.z[1])
    usage = torch.bincount(scores.argmax(1), minlength=scores.shape[1]).double()
    return entropy(usage[None] / usage.sum())


def purity(trained):
    """DeepCluster: share of the training images that have the commonest class of their cluster."""
    truth = trained.data.train_labels
    found = trained.run.model.labels[:len(truth)]
    counts = torch.zeros(int(found.max()) + 1, int(truth.max()) + 1)
    counts.index_put_((found, truth), torch.ones(len(truth)), accumulate=True)
    return float(counts.max(1).values.sum() / len(truth))


def nmi(trained):
    """DeepCluster: mutual information of clusters and classes, over the mean of their entropies."""
    truth = trained.data.train_labels
    found = trained.run.model.labels[:len(truth)]
    counts = torch.zeros(int(found.max()) + 1, int(truth.max()) + 1, dtype=torch.float64)
    counts.index_put_((found, truth), torch.ones(len(truth)).double(), accumulate=True)
    joint = counts / len(truth)
    of_each = entropy(joint.sum(1)[None]) + entropy(joint.sum(0)[None])
    return 2 * (of_each - entropy(joint.flatten()[None])) / of_each


FIGURES = (knn_z, knn_w, knn_untrained, knn_teacher, whiteness_h, corr_start, negative_cosine,
           negative_cosine_start, predictor_alignment, predictor_alignment_start, target_entropy,
           usage_entropy, purity, nmi)
EXTRA = {function.__name__: function for function in FIGURES}
ONE_AT_A_TIME = threading.Lock()  # figures rebuild untrained networks from torch's random numbers


def read_figures(folder, extra):
    """{figure: number} of a run: the last row of metrics.csv, and the functions named `extra`."""
    with open(os.path.join(folder, "metrics.csv"), newline="") as file:
        row = list(csv.DictReader(file))[-1]
    figures = {name: float(value) for name, value in row.items() if value}
    if extra:
        words = io.StringIO()  # which images there are, once more
        with ONE_AT_A_TIME, torch.no_grad(), contextlib.redirect_stdout(words):
            trained = Trained(folder)
            figures.update({name: EXTRA[name](trained) for name in extra})
    return figures


# ==============================================================================
# Runs, each trained once
# ==============================================================================


def commands_of(claim):
    """The commands that a direction compares, without seed and epochs."""
    return list(dict.fromkeys(command for _, command, _ in claim.terms if command))


def wanted_figures(command):
    """The figures that any claim needs of this command."""
    found = [figure for claim in DIRECTIONS.values() for _, c, figure in claim.terms
             if c == command]
    return list(dict.fromkeys(found))


def words_of(command, seed, epochs, folder):
    """The command line of a run: ["methods/simclr.py", ...]."""
    name, *flags = shlex.split(command)
    script = ["tests/experiments.py", name] if "/" in name else [f"methods/{name}.py"]
    fixed = ["--epochs", str(epochs), "--eval-every", "0", "--seed", str(seed)]
    return [*script, *flags, *fixed, "--out", folder, "--resume"]


def folder_of(cache, command, seed, epochs):
    """The run's folder in the cache, named by its command."""
    name = re.sub(r"[^\w.]+", "-", command)
    return os.path.abspath(os.path.join(cache, f"{name}-e{epochs}-s{seed}"))


def cached(folder, command):
    """What figures.json in a folder holds, or None if it is not there or lacks something.

    Raises UserError if it cannot be read."""
    path = os.path.join(folder, "figures.json")
    try:
        with open(path) as file:
            found = json.load(file)
        whole = set(found) == {"command", "figures", "seconds", "stopped", "revision"}
        missing = whole and not found["stopped"] and set(wanted_figures(command)) - set(
            found["figures"])
    except (FileNotFoundError, ValueError, TypeError):
        return None
    except OSError as error:
        raise common.UserError(f"{path} cannot be read ({error.strerror}); "
                               "try another --cache") from error
    return found if whole and not missing and found["command"] == command else None


def train_one(cache, command, seed, epochs):
    """{"command", "figures", "seconds", "stopped", "revision"} of a run, cached or trained now.

    A run that stops since a number is not finite is a result, without figures: `stopped` says why.
    Raises UserError for anything else that goes wrong."""
    folder = folder_of(cache, command, seed, epochs)
    found = cached(folder, command)
    if found:
        return found
    if os.path.exists(os.path.join(folder, "figures.json")):
        shutil.rmtree(folder)  # its checkpoint is gone, and a new claim needs it
    started = time.monotonic()
    words = words_of(command, seed, epochs, folder)
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True,
                          env=one_thread)
    last_line = (done.stderr.strip().splitlines() or ["it was stopped"])[-1]
    found = {"command": command, "figures": {}, "stopped": last_line}
    diverged = done.returncode == 2 and "not finite" in last_line
    common.check(done.returncode == 0 or diverged, f"{shlex.join(words)}: {last_line}; "
                 f"try it by itself, or remove {folder}")
    if not diverged:
        extra = [figure for figure in wanted_figures(command) if figure in EXTRA]
        found = {"command": command, "stopped": "", "figures": read_figures(folder, extra)}
    found["seconds"] = round(time.monotonic() - started, 1)
    found["revision"] = common.git_revision()
    common.write_file(os.path.join(folder, "figures.json"), json.dumps(found, indent=1).encode())
    for path in glob.glob(os.path.join(folder, "*.pt")):
        os.remove(path)  # some have 100 MB
    return found


def train_all(claims, args):
    """{(command, seed): what `train_one` gives} of all the claims' runs, --jobs at a time."""
    commands = dict.fromkeys(command for claim in claims for command in commands_of(claim))
    jobs = [(command, seed) for command in commands for seed in seeds_of(args)]
    lock = common.lock_folder(args.cache, "--cache")
    common.check(lock, f"--cache {args.cache} is in use by another claims.py; wait for it, or try "
                 "another --cache")
    results = {job: cached(folder_of(args.cache, *job, args.epochs), job[0]) for job in jobs}
    missing = [job for job in jobs if not results[job]]
    with lock, concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        try:
            futures = {pool.submit(train_one, args.cache, *job, args.epochs): job
                       for job in missing}
            finished = concurrent.futures.as_completed(futures)
            for future in common.said(finished, len(missing), "run"):
                results[futures[future]] = future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return results


def warn_of_other_revisions(results, args):
    """Print a line if runs in the cache are of another state of the code than this one."""
    now = common.git_revision()
    others = [result for result in results.values() if result["revision"] != now]
    if others:
        common.warn(f"{len(others)} of {len(results)} runs in {args.cache} were made by another "
                    "revision of the code; try another --cache if it matters to them")


def seeds_of(args):
    """The five seeds."""
    return range(args.first_seed, args.first_seed + SEEDS)


# ==============================================================================
# Judge and print
# ==============================================================================


def figure_of(term, results, seed):
    """A term's figure with one seed; NaN if the run stopped before it had the figure."""
    _, command, figure = term
    return figure if command is None else results[command, seed]["figures"].get(figure, math.nan)


def value_of(claim, results, seed):
    """The claim's sum of figures with one seed."""
    return sum(term[0] * figure_of(term, results, seed) for term in claim.terms)


def judge(claim, results, args):
    """(verdict, mean and half of its interval as text) of a direction, after printing them."""
    values = [value_of(claim, results, seed) for seed in seeds_of(args)]
    found = verdict(values, claim.margin, claim.sign)
    mean, half = interval(values)
    say_claim(claim)
    each = " ".join(f"{value:+.3g}" for value in values)
    common.say(f"  {found}: {mean:+.3g} +- {half:.2g}, margin {claim.margin:g}, "
               f"expected {EXPECTED[claim.sign]}; seeds from {args.first_seed} on: {each}")
    means = [statistics.fmean(figure_of(term, results, seed) for seed in seeds_of(args))
             for term in claim.terms]
    common.say(f"  means of its figures, in that order: {' '.join(f'{x:.4g}' for x in means)}")
    stopped = {results[job]["stopped"] for job in results if job[0] in commands_of(claim)} - {""}
    for reason in sorted(stopped):
        common.say(f"  a run stopped: {reason}")
    return found, f"{mean:+.3g} ± {half:.2g}" if math.isfinite(mean) else "not finite"


EXPECTED = {1: "above 0", -1: "below 0", 0: "alike", 2: "not below 0", -2: "not above 0"}


def say_claim(claim):
    """Print a claim's id, sentence, source and terms."""
    common.say("")
    text = f"{claim.id}: {claim.sentence} [{claim.source}]"
    lines = textwrap.wrap(text, 100, break_on_hyphens=False)
    if isinstance(claim, Direction):
        lines += indented(in_words(claim.terms))
    common.say("\n".join(lines))


def indented(text):
    """Lines of at most 100 columns."""
    return textwrap.wrap(text, 100, initial_indent="  ", subsequent_indent="  ",
                         break_on_hyphens=False)


def in_words(terms):
    """`knn of (wmse) - knn of (byol)`"""
    words = []
    for factor, command, figure in terms:
        sign, what = "+" if factor > 0 else "-", f"{figure} of ({command})"
        if command is None:  # a number
            sign, what = "+" if factor * figure > 0 else "-", f"{abs(figure):g}"
        words += [sign, what]
    return " ".join(words[1:] if words[0] == "+" else words)


def run_exact(claims):
    """Check exact claims and print them. Returns the ids of those that fail."""
    failed = []
    for claim in claims:
        say_claim(claim)
        error, holds = claim.check(), claim.holds()
        word = "HOLDS" if holds else "DOES NOT HOLD"
        common.say(f"  {word}: error {error:.1e}, at most {claim.tolerance:.0e}; it would fail "
                   f"without: {claim.missing}")
        if not holds:
            failed.append(claim.id)
    return failed


def run_claims(claims, args):
    """Check and run claims, print verdicts. Exits with 1 if one differs from the record."""
    surprises = run_exact([claim for claim in claims if not isinstance(claim, Direction)])
    directions = [claim for claim in claims if isinstance(claim, Direction)]
    results = train_all(directions, args)
    warn_of_other_revisions(results, args)
    verdicts = {}
    for claim in directions:
        found, value = judge(claim, results, args)
        verdicts[claim.id] = found, value
        if args.epochs != EPOCHS:
            continue
        common.say(f"  on record: {claim.record}")
        if claim.record not in ("not yet run", found):
            surprises.append(claim.id)
    if directions:
        say_summary(verdicts, results)
    if surprises:
        common.say(f"not as on record: {', '.join(surprises)}")
        raise SystemExit(1)


def say_summary(verdicts, results):
    """Print the verdicts as lines of RECORD in directions.py, how many there are, and the time."""
    common.say("")
    for id, (found, value) in verdicts.items():
        common.say(f'    "{id}": ("{found}", "{value}"),')
    counts = collections.Counter(found for found, _ in verdicts.values())
    tally = ", ".join(f"{count} {word}" for word, count in sorted(counts.items()))
    minutes = sum(result["seconds"] for result in results.values()) / 60
    common.say(f"\n{len(verdicts)} directions: {tally}.\n"
               "By chance, if values are normally distributed over the seeds, at most "
               f"{100 * ERROR:.0f} % are wrong: expect at most "
               f"{ERROR * len(verdicts):.1f}.\n{len(results)} runs took {minutes:.0f} minutes of "
               "one thread.")


# ==============================================================================
# List
# ==============================================================================


def seconds_of(command, epochs):
    """About how long a run takes with one thread, a job beside it: start, epochs, closing kNN.

    Measured on an AMD EPYC with bf16, 2026-11-26, commit cfaa1bf: wmse 44 (25 runs), simsiam 55
    (24 runs). On a busier one, others took up to half more."""
    method = re.split(r"[ /]", command)[0]
    epoch = {"byol": 15, "simsiam": 17, "moco": 9, "cw_rgp": 13}.get(method, 11)
    return 22 + epoch * epochs


def minutes_of(claims, epochs, jobs=1):
    """Minutes of all runs that the directions need, if none of them is cached."""
    commands = {command for claim in claims for command in commands_of(claim)}
    return SEEDS * sum(seconds_of(command, epochs) for command in commands) / jobs / 60


def listing(args):
    """All claims in 100 columns: id, minutes, verdict on record, sentence, source."""
    lines = []
    for claim in [*EXACT.values(), *DIRECTIONS.values()]:
        head = f"{claim.id:13} exact"
        if isinstance(claim, Direction):
            minutes = minutes_of([claim], args.epochs)
            head = f"{claim.id:13} {minutes:.0f} min, {claim.record}"
        lines += ["", head]
        lines += indented(f"{claim.sentence} [{claim.source}]")
        if isinstance(claim, Direction):
            lines += indented(f"{in_words(claim.terms)}: {EXPECTED[claim.sign]}, margin "
                              f"{claim.margin:g}")
    commands = {command for claim in DIRECTIONS.values() for command in commands_of(claim)}
    minutes = minutes_of(DIRECTIONS.values(), args.epochs, args.jobs)
    lines += ["", f"{len(EXACT)} exact claims, {len(DIRECTIONS)} directions; `all` has "
              f"{len(commands)} commands x {SEEDS} seeds =",
              f"{SEEDS * len(commands)} runs of {args.epochs} epochs, about {minutes:.0f} minutes "
              f"with --jobs {args.jobs}"]
    return "\n".join(lines[1:])


def page():
    """The directions as a Markdown table."""
    titles = ["id", "the sentence, and where it stands", "compared; expected; margin",
              "minutes", "verdict here", "mean ± half of the 95 % interval",
              "the paper's own figures"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for claim in DIRECTIONS.values():
        compared = in_words(claim.terms).replace("(", "`").replace(")", "`")
        cells = [claim.id, f"{claim.sentence} ({claim.source})",
                 f"{compared}; {EXPECTED[claim.sign]}; {claim.margin:g}",
                 f"{minutes_of([claim], EPOCHS):.0f}", claim.record, claim.value, claim.paper]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# ==============================================================================
# Gradients made visible
# ==============================================================================
#
# Each function: a model in float64 and two views -> (z, its loss, rows(z), the terms of exact.py).


def leaf(z):
    return z.detach().requires_grad_()


def of_simclr(model, views):
    h = torch.cat([model.backbone(x) for x in views])
    z = leaf(model.projector(h))
    tau = model.args.temperature
    return z, nt_xent_loss(*z.chunk(2), tau), of_length_1, simclr_terms(*z.chunk(2), tau)


def of_moco(model, views):
    q = leaf(model.projector(model.backbone(views[0])))
    more = model.keys(views[1]), model.queue, model.args.temperature
    return q, info_nce_loss(q, *more), of_length_1, moco_terms(q, *more)


def of_byol(model, views):
    z = [model.projector(model.backbone(x)) for x in views]
    w = model.predict(z)
    target = model.target_projector(model.target_backbone(views[1]))
    z1 = leaf(z[0])
    return z1, byol_loss(z1 @ w, target), unchanged, byol_terms(z1, target, w)


def of_barlow(model, views):
    z1, z2 = (leaf(model.projector(model.backbone(x))) for x in views)
    lambd = model.args.lambd
    return z1, barlow_twins_loss(z1, z2, lambd), standardised, barlow_terms(z1, z2, lambd)


def of_vicreg(model, views):
    z1, z2 = (leaf(model.projector(model.backbone(x))) for x in views)
    weights = model.args.inv, model.args.var, model.args.cov
    return z1, vicreg_loss(z1, z2, *weights), unchanged, vicreg_terms(z1, z2, *weights)


GRADIENTS = {"simclr": of_simclr, "moco": of_moco, "byol/direct-predictor": of_byol,
             "barlow": of_barlow, "vicreg": of_vicreg}


def measure_gradient(name, model, views):
    """Mean length of the terms' rows, times N, and the error beside autograd's gradient."""
    model = copy.deepcopy(model).double().train()
    z, loss, rows, terms = GRADIENTS[name](model, [x.double() for x in views[:2]])
    positive, negative, balance = terms
    wanted, = torch.autograd.grad(loss, z)
    got = pulled_back(z, rows, added(*terms))
    error = float((got - wanted).abs().max() / wanted.abs().max())
    common.check(error < 1e-8, f"{name}: the closed form differs from autograd by {error:.1e}")
    lengths = [len(z) * float(x.norm(dim=1).mean())
               for x in (positive, balance * negative, added(*terms))]
    return dict(zip(("positive", "negative", "both"), lengths),
                balance=float(torch.as_tensor(balance).mean()), error=error)


def checkpoints_of(path):
    """The runs of a folder's checkpoints, or of one file, by step; eval.load_run explains them."""
    files = [path]
    if os.path.isdir(path):
        files = [file for file in sorted(glob.glob(os.path.join(path, "*.pt")))
                 if os.path.basename(file) != "backbone.pt"]
    common.check(files, f"{path}: no checkpoint in this folder; try runs/<run>")
    runs = [evaluation.load_run(file, torch.device("cpu")) for file in files]
    return sorted(runs, key=lambda run: run.step)


def gradients_of(path):
    """(name, [(step, figures)]) of a run: before training, then of each checkpoint."""
    runs = checkpoints_of(path)
    run = runs[-1]
    common.check(run.name in GRADIENTS, f"{path} is a run of {run.name}, whose gradient has no "
                 f"closed form here; try one of {', '.join(GRADIENTS)}")
    args = SimpleNamespace(**{**vars(common.Args()), **vars(run.args)})  # an older run lacks some
    data = common.load_data(args, torch.device("cpu"), run.statistics)
    common.check(data.fingerprint == run.fingerprint, f"{path}: --data-dir {args.data_dir} holds "
                 "other images than the run saw; start claims.py in the folder where the run began")
    evaluation.use_statistics(data, run.statistics)
    views = data.augment(next(data.batches(0)), step=0)
    torch.manual_seed(args.seed)
    found = [(0, measure_gradient(run.name, run.untrained, views))]
    for step, run in {run.step: run for run in runs}.items():  # previous.pt may be a kept one
        found.append((step, measure_gradient(run.name, run.model, views)))
    return run.name, found


CURVES = "positive", "negative", "both", "balance"


def show_gradients(paths, plot):
    """Print the terms of each run's gradient on one batch, and draw them over the steps."""
    curves = {path: gradients_of(path) for path in paths}
    for path, (name, found) in curves.items():
        common.say(f"\n{path}: {name}; mean length of the N rows, times N; first batch")
        common.say(f"{'step':>8} " + " ".join(f"{key:>10}" for key in (*CURVES, "error")))
        for step, figures in found:
            cells = [f"{figures[key]:>10.4f}" for key in CURVES]
            common.say(f"{step:>8} {' '.join(cells)} {figures['error']:>10.1e}")
    common.say("row by row, positive + negative (with its balance) = both; error: beside autograd")
    if plot:
        draw_gradients(curves, plot)


def draw_gradients(curves, path):
    """A PNG with a panel per run: the terms' lengths and the balance over the steps."""
    figure = evaluation.import_figure()(figsize=(4.5 * len(curves), 3.5), layout="constrained")
    panels = figure.subplots(1, len(curves), squeeze=False)[0]
    for panel, (name, found) in zip(panels, curves.values()):
        steps = [step for step, _ in found]
        for key in CURVES:
            style = "--" if key == "balance" else "-"
            panel.plot(steps, [figures[key] for _, figures in found], style, marker=".", label=key)
        panel.set(title=name, xlabel="step")
    panels[0].set_ylabel("mean length of a row, times N")
    panels[0].legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    evaluation.write_output(path, buffer.getvalue())
    common.say(path)


# ==============================================================================
# Command line
# ==============================================================================


def chosen(ids):
    """The claims of these ids; `A4` has the parts A4-loss, A4-rank, ... too. Raises UserError."""
    claims = {**EXACT}
    for id, direction in DIRECTIONS.items():
        claims[id] = direction
    if ids == ["all"]:
        return list(claims.values())
    if ids == ["exact"]:
        return list(EXACT.values())
    found = []
    for id in ids:
        start = id[:1].upper() + id[1:]  # a4 is A4
        parts = [name for name in claims if name == start or name.startswith(f"{start}-")]
        near = difflib.get_close_matches(start, claims, cutoff=0.3)
        remedy = f"try {', '.join(near)}" if near else "claims.py without an id lists them"
        common.check(parts, f"{id}: there is no such claim; {remedy}")
        found += parts
    return [claims[name] for name in dict.fromkeys(found)]


def parse_args(argv=None):
    """The flags as a namespace. Raises UserError."""
    first_line = (__doc__ or "claims.py").splitlines()[0]
    parser = common.OneLineParser(prog="claims.py", description=first_line, allow_abbrev=False)
    number = common.number
    parser.add_argument("what", nargs="*", metavar="WHAT",
                        help="ids such as A4, or exact, all, page, gradients RUN; none: list")
    add = parser.add_argument
    add("--epochs", type=number(int, least=1, most=10**6, example=EPOCHS), default=EPOCHS,
        metavar="N", help=f"of each run (default: {EPOCHS}, for which the record is)")
    add("--jobs", type=number(int, least=1, most=1000, example=2), default=2, metavar="N",
        help="runs at a time, each with one thread (default: 2)")
    add("--first-seed", type=number(int, least=0, most=2**31 - 6, example=FIRST_SEED),
        default=FIRST_SEED, metavar="N",
        help=f"of the five (default: {FIRST_SEED}); others test the record")
    add("--cache", default=os.path.join("runs", "claims"), metavar="DIR",
        help="folder of the runs (default: runs/claims); another one after the code changed")
    add("--plot", metavar="FILE.png", help="of gradients: the terms over the steps")
    args = parser.parse_args(argv)
    for word in ("exact", "all", "page"):
        common.check(word not in args.what or len(args.what) == 1,
                     f"{' '.join(args.what)}: {word} stands by itself; try claims.py {word}")
    common.check(args.cache, "--cache needs the name of a folder; try it without")
    gradients = args.what[:1] == ["gradients"]
    common.check(not gradients or args.what[1:],
                 "gradients needs a run's folder; try claims.py gradients runs/simclr-patterns-s0")
    common.check(gradients or not args.plot, "--plot is for gradients; leave it out")
    if not gradients and args.what != ["page"]:
        args.claims = chosen(args.what)
    evaluation.check_writable("--plot", args.plot)
    if args.plot:
        evaluation.import_figure()  # before the work, not after it
    return args


def run(args):
    """Do what the command line asks for."""
    torch.set_num_threads(1)
    if not args.what:
        return common.say(listing(args))
    if args.what == ["page"]:
        return common.say(page())
    if args.what[0] == "gradients":
        return show_gradients(args.what[1:], args.plot)
    return run_claims(args.claims, args)


if __name__ == "__main__":
    common.main(run, parse_args)
