"""The scripts as a user runs them: every method and every switch end to end on small images; and, slow (`pytest -m slow`),
that the default runs learn and that what the papers say collapses does collapse, in words."""
import csv
import functools
import gc
import importlib
import math
import re

import pytest
import torch
from conftest import METHODS, SMALL, SMALL_OF, run_here

import common


pytestmark = pytest.mark.usefixtures("narrow_backbone")


# ---------------------------------------------------------------------------------------------- helpers
def table(folder):
    with open(folder / "metrics.csv") as file:
        return list(csv.DictReader(file))


def is_finite_row(row):
    return all(value != "" and math.isfinite(float(value)) for value in row.values())


def closing_scores(out):
    """{"kNN": 91.67, "raw pixels": ..., "untrained backbone": ...} in percent, of the line but last."""
    line = out.strip().splitlines()[-2]
    found = re.match(r"kNN ([\d.]+) %  \(raw pixels ([\d.]+) %, untrained backbone ([\d.]+) %; .*test images against", line)
    assert found, line
    return dict(zip(("kNN", "raw pixels", "untrained backbone"), map(float, found.groups())))


@pytest.fixture(scope="module", autouse=True)
def quick_collections():
    """`run_here` collects garbage after every run: leave out what was there before, which is most of torch."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def two_steps(method, folder, out, *more):
    """A run of two epochs of one batch each: 64 images in 16 x 16, narrow heads, no warm-up -> the rows of metrics.csv."""
    argv = two_steps_flags(method, folder, out, *more)
    result = run_here(method, argv)
    assert result.status == 0, result.err
    assert set(closing_scores(result.out)) == {"kNN", "raw pixels", "untrained backbone"}
    rows = table(out)
    assert len(rows) == 2 and is_finite_row(rows[-1])
    return rows


def two_steps_flags(method, folder, out, *more):
    return [*SMALL, *SMALL_OF[method], "--dataset", "folder", "--data-dir", folder, "--out", out, "--batch-size", "64",
            "--image-size", "16", "--proj-hidden", "64", "--eval-every", "0", "--warmup", "0", "--weight-decay", "0", *more]


@pytest.fixture(scope="module")
def plain(small_folder, tmp_path_factory):
    """plain("moco") -> (rows, folder) of the method's run without switches; each is made once."""
    @functools.cache
    def run(method):
        out = tmp_path_factory.mktemp("plain") / method
        return two_steps(method, small_folder, out), out
    return run


# ---------------------------------------------------------------------------------------------- each method, as it comes
@pytest.mark.parametrize("method", METHODS)
def test_two_epochs_end_to_end(method, flags, tmp_path):
    result = run_here(method, flags(method))
    assert result.status == 0 and not result.err, result.err
    folder, lines = tmp_path / "run", result.out.strip().splitlines()
    assert sorted(p.name for p in folder.iterdir() if p.suffix in (".pt", ".csv", ".json")) \
        == ["backbone.pt", "config.json", "last.pt", "metrics.csv", "previous.pt"]
    rows = table(folder)
    assert [(row["epoch"], row["step"]) for row in rows] == [("1", "2"), ("2", "4")] and all(map(is_finite_row, rows))
    assert [line.split("  ")[0] for line in lines if line.startswith("epoch")] == ["epoch 1/2", "epoch 2/2"]
    assert all(0 <= score <= 100 for score in closing_scores(result.out).values())
    assert lines[-1].startswith(f"{folder}: config.json metrics.csv last.pt backbone.pt")
    assert abs(float(rows[-1]["knn"]) * 100 - closing_scores(result.out)["kNN"]) < 0.01  # 24 test images: the monitor's are all of them


@pytest.mark.parametrize("method", METHODS)
def test_training_moves_every_parameter_that_it_should(method, plain, small_folder):
    """After two steps the checkpoint differs from the initial model in each parameter that wants a gradient and in each slow copy."""
    module, (_, out) = importlib.import_module(method), plain(method)
    args = module.parse_args(list(map(str, two_steps_flags(method, small_folder, out))))
    torch.manual_seed(args.seed)
    start = module.build(args)
    trained = torch.load(out / "last.pt", weights_only=True)["model"]
    still = {name for name, p in start.named_parameters() if torch.equal(p, trained[name])}
    assert still == ({"projector.4.bias"} if method == "simclr" else set())  # SimCLR's last norm does not shift


# ---------------------------------------------------------------------------------------------- each switch
CHANGE_THE_LOSS = [
    "simclr --temperature 0.1", "moco --bn-splits 1", "moco --temperature 0.2", "moco --proj-layers 2",
    "byol --predictor none", "simsiam --predictor none", "simsiam --pred-hidden 8", "barlow --lambd 0.5",
    "vicreg --inv 1 --var 2 --cov 3", "vicreg --var 0", "vicreg --cov 0",
    "wmse --whitening zca", "wmse --whitening pca",
    "wmse --whitening bn", "wmse --whitening none", "wmse --w-iter 2", "wmse --w-size 32", "wmse --eps 0.1", "wmse --views 4",
    "shuffled_dbn --no-shuffle", "shuffled_dbn --groups 8", "shuffled_dbn --groups 0",
    "cw_rgp --groups 1", "cw_rgp --w-iter 3", "cw_rgp --eps 0.1", "cw_rgp --views 4",
]
CHANGE_THE_STEP = [  # what the first step does, not what it starts from
    "moco --momentum 0", "byol --momentum 0", "simsiam --no-stop-gradient",
    "simclr --optimizer sgd", "cw_rgp --optimizer muon", "moco --optimizer adam",
    "barlow --optimizer lars", "vicreg --lr-bias 0.1", "shuffled_dbn --weight-decay 0.1",
]
RUN = ["moco --queue-size 100", "moco --queue-size 16", "moco --views 3 --queue-size 128", "moco --views 3 --queue-size 100", "simclr --views 3", "byol --views 3", "vicreg --views 3",
       "wmse --schedule step", "byol --schedule constant", "simclr --backbone resnet18 --image-size 8",
       "simclr --save-every 1 --batch-size 32"]


def switched(line, small_folder, tmp_path):
    method, *more = line.split()
    return two_steps(method, small_folder, tmp_path / "run", *more)


def first_and_second_loss(rows):
    return [float(row["loss"]) for row in rows]


@pytest.mark.parametrize("line", CHANGE_THE_LOSS)
def test_switch_changes_the_loss(line, plain, small_folder, tmp_path):
    before, after = plain(line.split()[0])[0], switched(line, small_folder, tmp_path)
    assert abs(float(before[0]["loss"]) - float(after[0]["loss"])) > 1e-4 * abs(float(before[0]["loss"]))


@pytest.mark.parametrize("line", CHANGE_THE_STEP)
def test_switch_changes_the_step_but_not_what_it_starts_from(line, plain, small_folder, tmp_path):
    before, after = (first_and_second_loss(rows) for rows in (plain(line.split()[0])[0], switched(line, small_folder, tmp_path)))
    assert abs(before[0] - after[0]) <= 1e-5 * abs(before[0]) and abs(before[1] - after[1]) > 1e-6 * abs(before[1])


@pytest.mark.parametrize("line", RUN)
def test_switch_runs(line, small_folder, tmp_path):
    assert all(math.isfinite(loss) for loss in first_and_second_loss(switched(line, small_folder, tmp_path)))


def test_simsiam_predictor_rate_does_not_decay(plain):
    """After two steps of a cosine the rate is half; the predictor's stays."""
    def rates(folder):
        groups = torch.load(folder / "last.pt", weights_only=True)["optimizer"]["param_groups"]
        return sorted({round(group["lr"] / group["peak_lr"], 6) for group in groups})
    assert rates(plain("simsiam")[1]) == [0.5, 1.0] and rates(plain("byol")[1]) == [0.5]


@pytest.mark.parametrize("recipe", sorted(common.RECIPES))
def test_augmentation_recipe_runs(recipe, small_folder, tmp_path):
    two_steps("moco", small_folder, tmp_path / "run", "--augment", recipe, *(["--image-size", "32"] if recipe in ("none", "colour-flip") else []))


@pytest.mark.skipif(not common.has_fast_bf16(torch.device("cpu")), reason="this processor does not compute in bf16")
@pytest.mark.parametrize("method", METHODS)
def test_bf16_run_starts_from_nearly_the_same_loss(method, plain, small_folder, tmp_path):
    exact, rows = plain(method)[0], two_steps(method, small_folder, tmp_path / "run", "--precision", "bf16")
    exact, half = float(exact[0]["loss"]), float(rows[0]["loss"])
    assert 0 < abs(half - exact) < 0.1 * max(1, abs(exact))


# ---------------------------------------------------------------------------------------------- slow: does it learn
@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_default_run_learns_patterns(full_backbone, method, tmp_path):
    result = run_here(method, ["--out", tmp_path / "run"])
    assert result.status == 0, result.err
    scores = closing_scores(result.out)
    assert scores["kNN"] >= 90 and scores["raw pixels"] < 25 and scores["untrained backbone"] < 35, scores
    assert "COLLAPSE" not in result.out.splitlines()[-3]  # whatever the first epochs looked like


COLLAPSES = [
    "simsiam --no-stop-gradient", "simsiam --predictor none", "vicreg --var 0", "vicreg --var 0 --cov 0", "vicreg --cov 0",
    "wmse --whitening none", "wmse --whitening bn", "byol --predictor none --momentum 0",
]

@pytest.mark.slow
@pytest.mark.parametrize("line", COLLAPSES)
def test_collapse_switch_collapses_in_words(full_backbone, line, tmp_path):
    """The last epoch's figures show it, the run says so in words. (The default run does not: the test before this one.)"""
    method, *more = line.split()
    result = run_here(method, ["--out", tmp_path / "run", "--epochs", "4", *more])
    assert result.status == 0, result.err
    row = {name: float(value) for name, value in table(tmp_path / "run")[-1].items()}
    last_word = result.out.strip().splitlines()[-3]
    assert last_word.startswith(("COLLAPSE", "DIMENSIONAL COLLAPSE")), (last_word, row)
    assert row["std_sqrt_d"] < 0.1 if last_word.startswith("COLLAPSE") else row["rank_1pct"] <= 4 or row["rankme"] < 2.5 or row["rank_h"] < 10
