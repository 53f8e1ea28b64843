"""claims.py: the statistics by hand, every exact claim with and without what it rests on, every
direction a command that parses, the cache, the exit status, the gradients of real runs."""

import ast
import functools
import importlib.util
import itertools
import json
import math
import shlex
import shutil

import claims
import experiments
import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, SMALL_OF, is_one_line_error, run_here, run_script
from directions import (
    DIRECTIONS,
    EPOCHS,
    FIRST_SEED,
    RECORD,
    SEEDS,
    Direction,
    above,
    change,
    versus,
)
from exact import EXACT

import common

NOT_SEEN = claims.NOT_SEEN
FOUR = "HOLDS", "OPPOSITE", "NO DIFFERENCE", NOT_SEEN
PER_EXACT = pytest.mark.parametrize("claim", EXACT.values(), ids=list(EXACT))
PER_DIRECTION = pytest.mark.parametrize("claim", DIRECTIONS.values(), ids=list(DIRECTIONS))


# ---------------------------------------------------------------------- statistics
def test_interval_by_hand():
    """1 ... 5: mean 3, variance 2.5, standard error sqrt(0.5), t 2.776."""
    mean, half = claims.interval([1, 2, 3, 4, 5])
    assert mean == 3 and math.isclose(half, 2.776 * math.sqrt(0.5), rel_tol=1e-12)
    mean, half = claims.interval([0.0, 2.0])
    assert mean == 1 and math.isclose(half, 12.706, rel_tol=1e-12)


@pytest.mark.parametrize("freedom", claims.T_QUANTILE)
def test_quantiles_of_students_t(freedom):
    """The density between minus and plus the quantile, integrated numerically, is 0.95."""
    q = claims.T_QUANTILE[freedom]
    x = np.linspace(-q, q, 200_001)
    log_scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)
    density = np.exp(log_scale) / math.sqrt(freedom * math.pi)
    density *= (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
    area = (density[1:] + density[:-1]).sum() / 2 * (x[1] - x[0])
    assert abs(area - 0.95) < 1e-4


def around(mean, half):
    """Five values with that mean and half width."""
    spread = np.array([-2.0, -1, 0, 1, 2])
    return list(mean + spread * half / (2.776 * math.sqrt(0.5)))


@pytest.mark.parametrize("mean,half,sign,wanted", [
    (0.05, 0.02, 1, "HOLDS"), (0.05, 0.02, -1, "OPPOSITE"),
    (-0.05, 0.02, -1, "HOLDS"), (-0.05, 0.02, 1, "OPPOSITE"),
    (0.05, 0.04, 1, NOT_SEEN), (-0.05, 0.04, 1, NOT_SEEN), (0.05, 0.04, -1, NOT_SEEN),
    (0.005, 0.01, 1, "NO DIFFERENCE"), (-0.005, 0.01, -1, "NO DIFFERENCE"),
    (0.0, 0.1, 1, NOT_SEEN), (0.005, 0.01, 0, "HOLDS"), (0.05, 0.02, 0, "OPPOSITE"),
    (-0.05, 0.02, 0, "OPPOSITE"), (0.02, 0.01, 0, NOT_SEEN), (0.0, 0.1, 0, NOT_SEEN),
    (0.0, 0.0, 1, "NO DIFFERENCE"), (1.0, 0.0, 1, "HOLDS"),
    (0.005, 0.01, 2, "HOLDS"), (0.5, 0.1, 2, "HOLDS"), (-0.01, 0.02, 2, NOT_SEEN), (-0.05, 0.02, 2, "OPPOSITE"),
    (-0.005, 0.01, -2, "HOLDS"), (-0.5, 0.1, -2, "HOLDS"), (0.01, 0.02, -2, NOT_SEEN), (0.05, 0.02, -2, "OPPOSITE")])
def test_verdict(mean, half, sign, wanted):
    assert claims.verdict(around(mean, half), 0.02, sign) == wanted


def test_verdict_changes_where_the_interval_touches_the_margin():
    for beyond, wanted in ((1e-9, "HOLDS"), (-1e-9, NOT_SEEN)):
        assert claims.verdict(around(0.03 + beyond, 0.01), 0.02, 1) == wanted


def test_a_run_without_the_figure_is_not_seen():
    assert claims.verdict([0.1, 0.1, math.nan, 0.1, 0.1], 0.02, 1) == NOT_SEEN


@pytest.mark.parametrize("true,sign", [(0.5, 1), (-0.5, 1), (0.5, -1), (0.0, 1), (0.5, 0), (-0.5, 2), (0.5, -2)])
def test_few_verdicts_are_wrong_by_chance(true, sign):
    """At the edge of the margin, where it is most likely. There no verdict but NOT SEEN is right.
    In the middle, NO DIFFERENCE is."""
    rng = np.random.default_rng(0)
    found = [claims.verdict(list(row), 0.5, sign) for row in rng.normal(true, 1, (8000, 5))]
    right = {NOT_SEEN, "NO DIFFERENCE"} if true == 0 else {NOT_SEEN}
    wrong = sum(word not in right for word in found)
    assert 0 < wrong / len(found) < 1.2 * claims.ERROR  # 1.2: it is a sample
    assert set(found) <= set(FOUR)


# ---------------------------------------------------------------------- exact claims
@PER_EXACT
def test_exact_claim_holds(claim):
    assert claim.holds(), claim.check()


@PER_EXACT
def test_exact_claim_fails_without_what_it_rests_on(claim):
    assert claim.without and claim.missing
    assert not claim.holds(**claim.without)


def test_exact_claims_are_many_and_sourced():
    assert len(EXACT) >= 16
    for claim in EXACT.values():
        assert claim.sentence.endswith(".") and claim.source


def test_exact_on_the_command_line():
    result = run_here("claims", ["A6", "B1"])
    assert result.status == 0 and not result.err
    assert result.out.count("  HOLDS: ") == 7


def test_a_failed_exact_claim_is_status_1(monkeypatch):
    claim = EXACT["D2"]
    monkeypatch.setattr(claim, "check", functools.partial(claim.check, **claim.without))
    result = run_here("claims", ["D2"])
    assert result.status == 1 and "DOES NOT HOLD" in result.out
    assert "not as on record: D2" in result.out


# ---------------------------------------------------------------------- the table of directions
@functools.cache
def args_of(command):
    name, *flags = shlex.split(command)
    if "/" in name:
        return experiments.find(name).parse_args(flags)
    return importlib.import_module(name).parse_args(flags)


@PER_DIRECTION
def test_direction_is_complete(claim):
    assert claim.sentence.endswith(".") and claim.source and claim.margin > 0
    assert claim.sign in claims.EXPECTED and claim.record in (*FOUR, "not yet run")
    assert claims.commands_of(claim)
    assert sum(factor for factor, *_ in claim.terms) == 0  # a difference, or one of differences


@PER_DIRECTION
def test_direction_has_commands_that_parse_and_figures_that_exist(claim):
    columns = {"loss", "knn", "rank_h", *common.collapse_metrics(torch.randn(9, 4))}
    for _, command, figure in claim.terms:
        if command is None:
            assert isinstance(figure, float)
            continue
        args = args_of(command)
        assert figure in columns or figure in claims.EXTRA, figure
        assert (args.epochs, args.seed, args.dataset) == (10, 0, "patterns")  # claims.py sets them


@PER_DIRECTION
def test_arms_differ_in_one_thing(claim):
    """The recipe is the method's: nothing but what the claim is about differs from the defaults."""
    free = {"optimizer", "lr", "lr_bias", "lr_filters", "weight_decay", "warmup", "schedule"}
    for command in claims.commands_of(claim):
        args = args_of(command)
        defaults = type(args)()
        assert all(getattr(args, name) == getattr(defaults, name) for name in free), command
    assert len(claims.commands_of(claim)) in (1, 2, 4)


# What two arms differ in besides the flags in their commands, since the sentence is about it.
BY_NATURE = {"A9-small": {"w_iter"}, "A11-icl": {"w_size", "w_iter", "eps", "groups"}, "B3": {"predictor"}}


@PER_DIRECTION
def test_arms_have_the_same_sizes(claim):
    """Such as d, in which an experiment may differ from its method."""
    commands = claims.commands_of(claim)
    named = {word for command in commands for word in command.split()}
    if len(commands) == 2:
        first, second = (vars(args_of(command)) for command in commands)
        differ = {name for name in first.keys() & second.keys() if first[name] != second[name]}
        differ -= {"method", "experiment"} | {name for name in differ if common.option_of(name) in named}
        assert differ == BY_NATURE.get(claim.id, set())


def test_the_page_has_the_table_of_what_is_on_record():
    """`python tests/claims.py page` prints it."""
    table = claims.page().splitlines()
    assert len(table) == 2 + len(DIRECTIONS)
    page = (ROOT / "tests" / "README.md").read_text().splitlines()
    start = page.index(table[0])
    assert page[start:start + len(table)] == table


def test_the_record_has_no_claim_that_is_gone():
    assert set(RECORD) <= set(DIRECTIONS)
    for id, direction in DIRECTIONS.items():
        assert (direction.record, direction.value) == RECORD.get(id, ("not yet run", ""))


def test_directions_are_many_and_take_about_two_hours():
    assert len(DIRECTIONS) >= 30 and not set(DIRECTIONS) & set(EXACT)
    assert claims.minutes_of(DIRECTIONS.values(), EPOCHS, jobs=2) <= 125


def test_every_command_has_a_folder_of_its_own():
    commands = {c for claim in DIRECTIONS.values() for c in claims.commands_of(claim)}
    folders = {claims.folder_of("x", *job) for job in itertools.product(commands, (1, 2), (3, 4))}
    assert len(folders) == 4 * len(commands)


def test_helpers_add_up():
    results = {(name, 7): {"figures": {"f": value, "g": 100.0}}
               for name, value in (("a", 5.0), ("b", 3.0), ("c", 2.0), ("d", 1.5))}

    def value(terms):
        return claims.value_of(Direction("x", "", "", terms, 1, 1), results, 7)
    assert value(versus("a", "b", "f")) == 2
    assert value(above("a", "f", 1.0)) == 4 and value(above("a", "g", "f")) == 95
    assert value(change("a", "b", "c", "d", "f")) == 1.5  # (5 - 3) - (2 - 1.5)
    assert math.isnan(value(versus("a", "b", "h")))


# ---------------------------------------------------------------------- the command line
def test_list_has_every_claim_in_100_columns():
    result = run_here("claims", [])
    lines = result.out.splitlines()
    assert result.status == 0 and not result.err and max(map(len, lines)) <= 100
    heads = [line.split()[0] for line in lines if line and line[0] != " "]
    assert heads[:-2] == [*EXACT, *DIRECTIONS]
    commands = {c for claim in DIRECTIONS.values() for c in claims.commands_of(claim)}
    assert lines[-1].startswith(f"{SEEDS * len(commands)} runs of {EPOCHS} epochs")


@pytest.mark.parametrize("line,words", [
    ("A4-los", "try A4-loss"), ("xyz", "lists them"), ("A4 all", "all stands by itself"),
    ("exact A6", "exact stands by itself"), ("gradients", "needs a run's folder"),
    ("A4 --plot x.png", "--plot is for gradients"), ("A4 --jobs 0", "--jobs"),
    ("A4 --epochs x", "--epochs"), ("gradients nowhere", "nowhere"),
    ("gradients nowhere --plot x.txt", "--plot x.txt")])
def test_bad_words_are_one_line(line, words):
    result = run_here("claims", line.split())
    assert is_one_line_error(result) and words in result.err, result.err


def test_an_id_has_its_parts():
    assert [c.id for c in claims.chosen(["A4"])] == ["A4-loss", "A4-rank", "A4-accuracy"]
    assert claims.chosen(["a4"]) == claims.chosen(["A4"])
    assert [c.id for c in claims.chosen(["A9"])] == ["A9", "A9-ones", "A9-small"]
    assert len(claims.chosen(["all"])) == len(EXACT) + len(DIRECTIONS)


# ---------------------------------------------------------------------- the cache and the status
def fill(cache, claim, values, first=FIRST_SEED, epochs=EPOCHS, stopped=""):
    """Figures of finished runs in a cache: values with the first command, 0 with the others."""
    for i, command in enumerate(claims.commands_of(claim)):
        for seed, value in zip(range(first, first + SEEDS), values):
            figures = {name: 0.0 for name in claims.wanted_figures(command)}
            if i == 0:
                figures.update({figure: value for _, c, figure in claim.terms if c})
            found = {"command": command, "seconds": 6.0, "revision": common.git_revision(),
                     "stopped": stopped if i == 0 else "",
                     "figures": {} if stopped and i == 0 else figures}
            folder = claims.folder_of(cache, command, seed, epochs)
            common.write_file(f"{folder}/figures.json", json.dumps(found).encode())


@pytest.fixture
def filled(tmp_path):
    def make(id, values, **more):
        for claim in claims.chosen([id]):
            for command, seed in itertools.product(claims.commands_of(claim), range(99)):
                folder = tmp_path / claims.folder_of(tmp_path, command, seed, EPOCHS)
                folder.mkdir(exist_ok=True)
            fill(tmp_path, claim, values, **more)
        return [id, "--cache", tmp_path]
    return make


@pytest.mark.parametrize("record,status", [
    ("not yet run", 0), ("HOLDS", 0), ("OPPOSITE", 1), (NOT_SEEN, 1)])
def test_status_compares_with_the_record(filled, monkeypatch, record, status):
    monkeypatch.setattr(DIRECTIONS["B5-depth"], "record", record)
    result = run_here("claims", filled("B5-depth", around(0.1, 0.01)))
    assert result.status == status and not result.err, result.err
    assert "  HOLDS: +0.1 +- 0.01, margin 0.02, expected above 0; seeds from 10 on: " in result.out
    assert f"on record: {record}" in result.out and "1 directions: 1 HOLDS" in result.out
    line, = [line for line in result.out.splitlines() if line.startswith('    "B5-depth": ')]  # to paste into RECORD
    verdict_, value = ast.literal_eval(line.split(": ", 1)[1].rstrip(","))
    assert verdict_ == "HOLDS" and f"HOLDS: {value.replace('±', '+-')}, margin 0.02" in result.out
    assert ("not as on record: B5-depth" in result.out) == bool(status)
    assert "expect at most 0.1" in result.out and "10 runs took 1 minutes" in result.out


def test_other_seeds_are_compared_with_the_record_and_other_epochs_are_not(filled, monkeypatch):
    monkeypatch.setattr(DIRECTIONS["B5-depth"], "record", "OPPOSITE")
    words = filled("B5-depth", around(0.1, 0.01), first=40)
    assert run_here("claims", [*words, "--first-seed", "40"]).status == 1
    monkeypatch.setattr(claims, "EPOCHS", 5)
    result = run_here("claims", [*words, "--first-seed", "40", "--epochs", EPOCHS])
    assert result.status == 0 and "on record" not in result.out


def test_a_run_that_stopped_is_told(filled, monkeypatch):
    monkeypatch.setattr(DIRECTIONS["D13"], "record", "not yet run")
    words = filled("D13", [0] * 5, stopped="loss is not finite at step 7")
    result = run_here("claims", words)
    assert result.status == 0
    assert f"{NOT_SEEN}: " in result.out and "a run stopped: loss is not finite" in result.out


def test_runs_of_another_revision_are_told(filled, monkeypatch):
    words = filled("B5-depth", around(0.1, 0.01))
    monkeypatch.setattr(DIRECTIONS["B5-depth"], "record", "HOLDS")
    monkeypatch.setattr(common, "git_revision", lambda: "another")
    result = run_here("claims", words)
    assert result.status == 0 and "10 of 10 runs in" in result.err
    assert "another revision" in result.err and len(result.err.splitlines()) == 1


def test_cache_wants_the_same_command_and_all_figures(tmp_path, filled):
    filled("B7-simclr", [1] * 5)
    folder = claims.folder_of(tmp_path, "simclr", FIRST_SEED, EPOCHS)
    assert claims.cached(folder, "simclr")["figures"]["corr_start"] == 1
    assert claims.cached(folder, "simclr --views 3") is None
    found = json.loads(open(f"{folder}/figures.json").read())
    del found["figures"]["corr_start"]
    common.write_file(f"{folder}/figures.json", json.dumps(found).encode())
    assert claims.cached(folder, "simclr") is None
    assert claims.cached(tmp_path / "nowhere", "simclr") is None
    found["figures"].update(corr_start=0.0)
    del found["figures"]["knn"]  # a column of metrics.csv, which another claim needs
    common.write_file(f"{folder}/figures.json", json.dumps(found).encode())
    assert claims.cached(folder, "simclr") is None


@pytest.mark.parametrize("text", ["{}", "[]", "[1]", "null", "7", '"x"', "{", "\xff"])
def test_a_foreign_file_in_the_cache_is_no_result(tmp_path, text):
    (tmp_path / "figures.json").write_text(text)
    assert claims.cached(tmp_path, "simclr") is None


def test_a_file_that_cannot_be_read_is_not_trained_again(tmp_path):
    (tmp_path / "figures.json").mkdir()
    with pytest.raises(common.UserError, match="figures.json cannot be read"):
        claims.cached(tmp_path, "simclr")


def test_a_cache_in_use_or_in_a_bad_place_is_one_line(tmp_path):
    with common.lock_folder(tmp_path / "cache"):
        result = run_script(ROOT / "tests" / "claims.py", "B5-depth", "--cache", tmp_path / "cache")
    assert is_one_line_error(result) and "--cache" in result.err and "in use by another claims.py" in result.err
    (tmp_path / "file").touch()
    result = run_here("claims", ["B5-depth", "--cache", tmp_path / "file"])
    assert is_one_line_error(result) and f"--cache {tmp_path}/file: cannot write there" in result.err
    assert "--out" not in result.err


def test_command_line_of_a_run():
    words = claims.words_of("wmse --whitening pca", 12, 3, "x")
    assert words == ["methods/wmse.py", "--whitening", "pca", "--epochs", "3", "--eval-every", "0",
                     "--seed", "12", "--out", "x", "--resume"]
    assert claims.words_of("byol/dino", 1, 2, "x")[:2] == ["tests/experiments.py", "byol/dino"]


# ---------------------------------------------------------------------- figures of real runs
@pytest.fixture(scope="module")
def runs(small_folder, tmp_path_factory, narrow_backbone):
    """runs("byol/dino", *flags) -> the folder of a small run of two steps, each made once."""
    @functools.cache
    def make(name, *flags):
        out = tmp_path_factory.mktemp("runs") / "run"
        method = name.split("/")[0]
        words = [*SMALL, *SMALL_OF[method], "--dataset", "folder", "--data-dir", small_folder,
                 "--epochs", "1", "--image-size", "16", "--proj-hidden", "64", *flags, "--out", out]
        script, *first = ("experiments", name) if "/" in name else (name,)
        result = run_here(script, [*first, *words])
        assert result.status == 0, result.err
        return str(out)
    return make


def test_figures_of_a_run_are_the_last_row_and_what_is_asked_for(runs):
    names = ["knn_z", "knn_w", "knn_untrained", "whiteness_h", "corr_start", "negative_cosine",
             "negative_cosine_start"]
    figures = claims.read_figures(runs("wmse", "--whitening", "zca"), names)
    assert figures["epoch"] == 1 and figures["loss"] > 0
    assert all(0 <= figures[name] <= 1 for name in names[:5])
    assert -1 / 23 - 1e-6 <= figures["negative_cosine"] < 1
    trained = claims.Trained(runs("wmse", "--whitening", "zca"))
    assert math.isclose(trained.knn(trained.h), figures["knn"])  # as in the log
    again = common.collapse_metrics(trained.z[1])["corr"]
    assert math.isclose(again, figures["corr"], rel_tol=1e-4)


def test_negative_cosine_by_hand():
    z = torch.tensor([[1.0, 0], [2, 0], [0, 3]])
    assert math.isclose(claims.mean_cosine(z), 1 / 3, rel_tol=1e-6)  # 1, 0 and 0


def test_entropy_by_hand():
    p = torch.tensor([[0.5, 0.5, 0, 0], [1.0, 0, 0, 0]], dtype=torch.float64)
    assert math.isclose(claims.entropy(p), math.log(2) / 2)


@pytest.mark.parametrize("name,flags,figure,low,high", [
    ("byol/dino", [], "target_entropy", 0.0, math.log(32)),
    ("byol", [], "knn_teacher", 0.0, 1.0),
    ("simclr/swav", ["--prototypes", "8"], "usage_entropy", 0.0, math.log(8)),
    ("simclr/deepcluster", ["--clusters", "8"], "purity", 0.25, 1.0),
    ("simclr/deepcluster", ["--clusters", "8"], "nmi", 0.0, 1.0),
    ("byol/linear-predictor", [], "predictor_alignment", 0.0, 1.0),
    ("byol/linear-predictor", [], "predictor_alignment_start", 0.0, 0.3)])
def test_figures_of_the_systems(runs, name, flags, figure, low, high):
    assert low <= claims.read_figures(runs(name, *flags), [figure])[figure] <= high + 1e-6


def test_alignment_is_1_if_eigenvectors_agree():
    z = torch.randn(50, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight = torch.randn(6, 6, generator=torch.Generator().manual_seed(1))
    assert claims.diagonal_share(weight, z) < 0.6
    weight = experiments.direct_predictor(z.T @ z / 50)
    assert math.isclose(claims.diagonal_share(weight, z), 1.0, rel_tol=1e-9)


# ---------------------------------------------------------------------- gradients
def test_gradients_of_real_runs_equal_autograds(runs, tmp_path):
    names = [*claims.GRADIENTS]
    folders = [runs(name) for name in names]
    drawn = importlib.util.find_spec("matplotlib") is not None
    result = run_here("claims", ["gradients", *folders, *(["--plot", tmp_path / "g.png"] if drawn else [])])
    assert result.status == 0 and not result.err, result.err
    rows = [line.split() for line in result.out.splitlines()]
    rows = [row for row in rows if len(row) == 6 and row[0].isdigit()]
    assert [row[0] for row in rows] == ["0", "2"] * len(names)  # before training, and step 2
    for row in rows:
        positive, negative, both, _, error = map(float, row[1:])
        assert error < 1e-8 and min(positive, negative, both) > 0
        assert both < positive + negative
    assert not drawn or (tmp_path / "g.png").read_bytes().startswith(b"\x89PNG")
    for name, row in zip(names, rows[::2]):
        balance = float(row[4])
        assert balance == {"barlow": 0.0051}.get(name, balance if "byol" in name else 1.0), name


def test_gradients_need_a_closed_form(runs):
    result = run_here("claims", ["gradients", runs("wmse", "--whitening", "zca")])
    assert is_one_line_error(result) and "is a run of wmse" in result.err
    assert "byol/direct-predictor" in result.err


def test_gradients_want_the_images_of_the_run(small_folder, tmp_path, narrow_backbone):
    images = shutil.copytree(small_folder, tmp_path / "images")
    words = [*SMALL, *SMALL_OF["simclr"], "--dataset", "folder", "--data-dir", images, "--epochs", "1"]
    assert run_here("simclr", [*words, "--out", tmp_path / "run"]).status == 0
    next(images.rglob("train/*/*.*")).unlink()
    result = run_here("claims", ["gradients", tmp_path / "run"])
    assert is_one_line_error(result) and "holds other images than the run saw" in result.err, result.err


def test_a_wrong_closed_form_is_not_drawn(runs, monkeypatch):
    monkeypatch.setattr(claims, "added", lambda positive, negative, balance: positive)
    result = run_here("claims", ["gradients", runs("simclr")])
    assert is_one_line_error(result) and "differs from autograd" in result.err


# ---------------------------------------------------------------------- all of it, as a user
@pytest.mark.slow
def test_a_claim_from_the_first_run_to_the_verdict(small_folder, tmp_path, monkeypatch):
    """Trains ten real runs, then none."""
    words = [*SMALL, *SMALL_OF["simsiam"], "--dataset", "folder", "--data-dir", str(small_folder)]
    words.remove("--epochs")
    words.remove("2")
    command = shlex.join(["simsiam", *words, "--proj-hidden", "64"])
    terms = versus(command, f"{command} --no-stop-gradient", "std_sqrt_d") + above(
        command, "knn_z", 0.0)[:1]
    monkeypatch.setitem(DIRECTIONS, "T1", Direction("T1", "here", "A test.", terms, 1, 0.001))
    argv = ["T1", "--cache", tmp_path / "cache", "--epochs", "1"]
    result = run_here("claims", argv)
    assert result.status == 0 and "1 directions" in result.out, result.err
    folders = [path for path in (tmp_path / "cache").iterdir() if path.name != "lock"]
    assert len(folders) == 10 and not list((tmp_path / "cache").glob("*/*.pt"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*/*")}
    again = run_here("claims", argv)
    verdicts = [[line for line in r.out.splitlines() if "margin" in line] for r in (result, again)]
    assert again.status == 0 and len(verdicts[0]) == 1 and verdicts[0] == verdicts[1]
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*/*")}


@pytest.mark.slow
def test_as_a_user_runs_it(tmp_path):
    from conftest import ROOT

    script = ROOT / "tests" / "claims.py"
    result = run_script(script, "exact", cwd=tmp_path)
    assert result.status == 0 and result.out.count("  HOLDS: ") == len(EXACT) and not result.err
    result = run_script(script, "nothing", cwd=tmp_path)
    assert is_one_line_error(result) and result.err.startswith("claims.py: error: ")
