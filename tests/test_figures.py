"""tests/figures.py draws what its runs wrote, and does not train a run twice."""

import math
import re
import threading
from types import SimpleNamespace

import pytest

import common
import figures
import wmse
from conftest import make_folder


def test_the_band_is_the_deviation_over_the_seeds():
    mean, std = figures.mean_and_std([[1.0, 10.0], [3.0, 10.0], [5.0, 13.0]])
    assert mean == [3.0, 11.0] and std == pytest.approx([2.0, math.sqrt(3.0)])


@pytest.mark.parametrize("argv, words", [(["4"], "choose from 2, 3"), (["2", "--epochs", "1"], "--every 2 is more than --epochs; try --every 1"),
                                         (["3", "--plot", "/nonexistent/x.png"], "--plot /nonexistent/x.png"), (["3", "--plot", ""], "--plot"),
                                         (["2", "--flags=--proj-dim 8 --seed=3"], "--flags: --seed is chosen by figures.py"),
                                         (["2", "--flags=--out 'x"], "--flags: No closing quotation"), (["2", "--flags=--nonsense 3"], "--nonsense"),
                                         (["2", "--flags", "--w-size 0"], "--w-size")])
def test_a_bad_flag_is_one_line(argv, words):
    pytest.importorskip("matplotlib", reason="it draws")
    with pytest.raises(common.UserError) as raised:
        figures.parse_args(argv)
    assert words in str(raised.value) and "\n" not in str(raised.value)


def test_a_figure_that_a_seed_lacks_is_nan():
    mean, std = figures.mean_and_std([[1.0, math.nan], [3.0, 10.0]])
    assert mean[0] == 2.0 and math.isnan(mean[1]) and math.isnan(std[1])


def test_runs_with_other_flags_or_images_are_told_apart(monkeypatch):
    """Also a relative folder seen from two places."""
    names = {figures.digest(wmse.parse_args(flags.split())) for flags in (
        "--dataset folder --data-dir a_b", "--dataset folder --data-dir a/b", "--seed 1", "--proj-dim 32", "")}
    monkeypatch.chdir("/")
    names.add(figures.digest(wmse.parse_args("--dataset folder --data-dir a/b".split())))
    assert len(names) == 6
    assert figures.digest(wmse.parse_args([])) == figures.digest(wmse.parse_args(["--seed", "0"]))


def test_the_first_failure_ends_the_rest():
    """Ctrl-C does too: it arrives as an exception in the main thread."""
    begun, told = [], threading.Event()

    def job(number, args):
        begun.append(number)
        common.check(number, "the first fails")
        told.wait(0.05)  # else all might end before the failure is seen

    with pytest.raises(common.UserError, match="the first fails"):
        figures.in_parallel(job, [(0,), *[(n,) for n in range(1, 200)]], SimpleNamespace(jobs=1), "run")
    assert len(begun) < 200


def test_a_damaged_report_and_a_busy_cache_are_one_line(tmp_path, monkeypatch):
    args = SimpleNamespace(every=1, epochs=2, cache=str(tmp_path), figure=2, plot="x.png")
    for text in ("[", "[]", "null", '[{"features": {}}]', '[{}, {}]'):
        (tmp_path / "figure3.json").write_text(text)
        with pytest.raises(common.UserError, match="figure3.json is damaged.*remove it"):
            figures.measured(str(tmp_path), args)
    (tmp_path / "metrics.csv").write_bytes(b"epoch\n\xff\xfe\n")
    assert figures.rows_of(str(tmp_path)) == 0
    monkeypatch.setattr(common, "lock_folder", lambda folder, name: None)  # another process has it
    with pytest.raises(common.UserError, match="--cache .* is in use by another figures.py"):
        figures.run(args)


@pytest.mark.slow
def test_both_figures_from_the_same_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="it draws")
    images = make_folder(tmp_path / "images", train=64, test=16, side=16)
    monkeypatch.setattr(figures, "SEEDS", range(2))
    monkeypatch.setattr(figures, "WHITENINGS", {"Plain": "none", "CD": "cholesky"})
    small = f"--dataset folder --data-dir {images} --batch-size 32 --w-size 16 --proj-dim 8 --proj-hidden 16 --image-size 8 --device cpu"
    argv = ["--epochs", "2", "--every", "1", "--flags", small, "--cache", str(tmp_path / "cache")]
    for number, names, titles in ((2, ["Plain", "CD"], 5), (3, ["H", "Z", "whitened Z"], 3)):
        figures.run(figures.parse_args([str(number), *argv, "--plot", str(tmp_path / f"{number}.png")]))
        head, *rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("after the last epoch drawn", *TITLES))]
        assert re.split(r"  +", head)[1:] == names and len(rows) == titles
        assert (tmp_path / f"{number}.png").read_bytes()[:4] == b"\x89PNG"
    white = next(row for row in rows if row.startswith("stable rank"))
    assert float(re.split(r"  +", white)[3].split(" ")[0]) > 70, "whitened Z is white"
    runs = sorted(path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    assert len(runs) == 4
    times = [(run / "metrics.csv").stat().st_mtime_ns for run in runs]
    kept = [sorted(path.name for path in run.glob("epoch-*.pt")) for run in runs]
    assert sorted(kept) == [[], [], ["epoch-0001.pt", "epoch-0002.pt"], ["epoch-0001.pt", "epoch-0002.pt"]]
    figures.run(figures.parse_args(["2", *argv, "--plot", str(tmp_path / "2.png")]))
    assert times == [(run / "metrics.csv").stat().st_mtime_ns for run in runs]


TITLES = [title for title, *_ in figures.COLUMNS + figures.MEASURES]
