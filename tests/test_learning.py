"""The scripts as a user runs them: every method and every switch end to end on small images; and, slow (`pytest -m slow`),
that the default runs learn and that what the papers say collapses does collapse, in words."""
import csv
import math
import re

import pytest
import torch
from conftest import METHODS, run_here

import common


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


def small_run(method, flags, tmp_path, *more):
    """One epoch of 16 x 16 images with narrow heads -> the rows of metrics.csv."""
    result = run_here(method, flags(method, "--epochs", "1", "--image-size", "16", "--proj-hidden", "64", *more))
    assert result.status == 0, result.err
    assert set(closing_scores(result.out)) == {"kNN", "raw pixels", "untrained backbone"}
    return table(tmp_path / "run")


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
def test_training_moves_every_parameter_it_should(method, flags, tmp_path):
    """After one epoch the checkpoint differs from the initial model in each parameter; the optimizer holds all that want a gradient."""
    module = __import__(method)
    argv = flags(method, "--epochs", "1", "--image-size", "16", "--proj-hidden", "64", "--lr", "0.01", "--warmup", "0", "--weight-decay", "0")
    assert run_here(method, argv).status == 0
    args = module.parse_args(argv)
    torch.manual_seed(args.seed)
    start = module.build(args)
    trained = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["model"]
    frozen = {name for name, p in start.named_parameters() if not p.requires_grad}
    still = {name for name, p in start.named_parameters() if torch.equal(p, trained[name])}
    assert not still - frozen, still
    assert all(name in ("projector.4.bias",) or name.startswith(("key_", "target_")) for name in frozen), frozen


# ---------------------------------------------------------------------------------------------- each switch
SWITCHES = [
    "simclr --stop-gradient", "simclr --temperature 0.1", "simclr --proj-layers 3", "simclr --views 3",
    "moco --symmetric", "moco --no-shuffle", "moco --bn-splits 1", "moco --proj-layers 2", "moco --momentum 0", "moco --views 3",
    "byol --predictor linear", "byol --predictor direct", "byol --predictor none", "byol --norm gn", "byol --momentum 0", "byol --views 3",
    "simsiam --no-stop-gradient", "simsiam --predictor none", "simsiam --predictor fixed", "simsiam --predictor-lr decay",
    "simsiam --similarity softmax", "simsiam --asymmetric", "simsiam --head-bn none", "simsiam --head-bn hidden", "simsiam --head-bn all",
    "simsiam --pred-hidden 8", "barlow --standardize l2", "barlow --lambd 0.5", "barlow --views 3",
    "vicreg --scaling paper", "vicreg --inv 1 --var 2 --cov 3", "vicreg --views 3",
    "wmse --whitening zca", "wmse --whitening pca", "wmse --whitening bn", "wmse --whitening none", "wmse --one-way", "wmse --views 4",
    "wmse --w-iter 2", "wmse --eps 0.01", "shuffled_dbn --no-shuffle", "shuffled_dbn --groups 8", "shuffled_dbn --groups 0",
    "cw_rgp --permutation shared", "cw_rgp --permutation fixed", "cw_rgp --detach-whitening", "cw_rgp --views 4", "cw_rgp --eps 0.01",
    "cw_rgp --groups 1", "cw_rgp --w-iter 3",
    "simsiam --optimizer sgd --lr 0.05", "barlow --optimizer lars --lr 0.5 --lr-bias 0.01", "wmse --schedule step", "byol --schedule constant",
    "vicreg --lr-bias 0.0001 --weight-decay 0.1", "simclr --backbone resnet18", "moco --backbone resnet18",
    "simclr --eval-every 0", "simclr --save-every 1", "simclr --stream --num-workers 0", "simclr --proj-layers 1",
]


@pytest.mark.parametrize("line", SWITCHES)
def test_switch_runs(line, flags, tmp_path):
    method, *more = line.split()
    rows = small_run(method, flags, tmp_path, *more)
    assert len(rows) == 1 and is_finite_row(rows[0])


@pytest.mark.parametrize("recipe", sorted(common.RECIPES))
def test_augmentation_recipe_runs(recipe, flags, tmp_path):
    assert is_finite_row(small_run("moco", flags, tmp_path, "--augment", recipe)[0])


@pytest.mark.skipif(not common.has_fast_bf16(torch.device("cpu")), reason="this processor does not compute in bf16")
@pytest.mark.parametrize("method", METHODS)
def test_bf16_runs(method, flags, tmp_path):
    row = small_run(method, flags, tmp_path, "--precision", "bf16")[0]
    assert is_finite_row(row)


# Switches that change the number: the loss of the same first step, with the switch and without.
CHANGES = [
    "simclr --temperature 0.1", "moco --symmetric", "moco --no-shuffle", "moco --bn-splits 1", "byol --predictor linear", "byol --predictor direct",
    "byol --norm gn", "simsiam --predictor none", "simsiam --similarity softmax", "simsiam --asymmetric", "simsiam --head-bn none",
    "barlow --standardize l2", "barlow --lambd 0.5", "vicreg --scaling paper", "vicreg --var 1", "wmse --whitening zca", "wmse --eps 0.1",
    "shuffled_dbn --no-shuffle", "shuffled_dbn --groups 8", "cw_rgp --permutation fixed", "cw_rgp --groups 1", "simclr --augment none",
]
KEEPS_THE_FIRST_LOSS = ["simclr --stop-gradient", "simsiam --no-stop-gradient", "simsiam --predictor fixed", "wmse --one-way", "cw_rgp --detach-whitening"]


def losses(method, flags, tmp_path, *more):
    """Losses of steps 1 and 2 of a run without warm-up: whole epochs of one batch."""
    run_here(method, flags(method, "--epochs", "2", "--batch-size", "64", "--image-size", "16", "--proj-hidden", "64", "--eval-every", "0",
                           "--warmup", "0", "--out", tmp_path / "_".join(["run", *more]), *more))
    return [float(row["loss"]) for row in table(tmp_path / "_".join(["run", *more]))]


@pytest.mark.parametrize("line", CHANGES)
def test_switch_changes_the_first_loss(line, flags, tmp_path):
    method, *more = line.split()
    plain, switched = losses(method, flags, tmp_path), losses(method, flags, tmp_path, *more)
    assert abs(plain[0] - switched[0]) > 1e-4 * abs(plain[0])


@pytest.mark.parametrize("line", KEEPS_THE_FIRST_LOSS)
def test_switch_of_the_gradient_keeps_the_first_loss_and_changes_the_second(line, flags, tmp_path):
    method, *more = line.split()
    plain, switched = losses(method, flags, tmp_path), losses(method, flags, tmp_path, *more)
    assert abs(plain[0] - switched[0]) < 1e-5 * max(1, abs(plain[0])) and plain[1] != switched[1]


# ---------------------------------------------------------------------------------------------- slow: does it learn
@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_default_run_learns_patterns(method, tmp_path):
    result = run_here(method, ["--out", tmp_path / "run"])
    assert result.status == 0, result.err
    scores = closing_scores(result.out)
    assert scores["kNN"] >= 70 and scores["raw pixels"] < 25 and scores["untrained backbone"] < 35, scores
    assert "COLLAPSE" not in result.out.splitlines()[-3]  # whatever the first epochs looked like


COLLAPSES = [
    "simsiam --no-stop-gradient", "simsiam --predictor none", "vicreg --var 0", "vicreg --var 0 --cov 0", "vicreg --cov 0",
    "wmse --whitening none", "wmse --whitening bn", "byol --predictor none --momentum 0",
]
POINT = {line for line in COLLAPSES if line not in ("vicreg --cov 0", "wmse --whitening bn")}  # these keep a spread, but few dimensions


@pytest.mark.slow
@pytest.mark.parametrize("line", COLLAPSES)
def test_collapse_switch_collapses_in_words(line, tmp_path):
    """The last epoch's figures show it, the run says so in words."""
    method, *more = line.split()
    result = run_here(method, ["--out", tmp_path / "run", "--epochs", "8", *more])
    assert result.status == 0, result.err
    row = {name: float(value) for name, value in table(tmp_path / "run")[-1].items()}
    last_word = result.out.strip().splitlines()[-3]
    assert last_word.startswith(("COLLAPSE", "DIMENSIONAL COLLAPSE")), (last_word, row)
    assert row["std_sqrt_d"] < 0.1 if line in POINT and last_word.startswith("COLLAPSE") else row["rank_1pct"] < row["dim"] / 10 \
        or row["stable_rank_sq"] < 1.5
    healthy = run_here(method, ["--out", tmp_path / "healthy", "--epochs", "8"])
    assert closing_scores(result.out)["kNN"] < closing_scores(healthy.out)["kNN"] - 5
