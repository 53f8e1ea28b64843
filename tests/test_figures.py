"""tests/figures.py draws what its runs wrote, and does not train a run twice."""

import math
import re

import pytest

import common
import figures
from conftest import make_folder


def test_the_band_is_the_deviation_over_the_seeds():
    mean, std = figures.mean_and_std([[1.0, 10.0], [3.0, 10.0], [5.0, 13.0]])
    assert mean == [3.0, 11.0] and std == pytest.approx([2.0, math.sqrt(3.0)])


@pytest.mark.parametrize("argv, words", [(["4"], "choose from 2, 3"), (["2", "--epochs", "1"], "--every 2 is more than --epochs; try --every 1"),
                                         (["3", "--plot", "/nonexistent/x.png"], "--plot /nonexistent/x.png")])
def test_a_bad_flag_is_one_line(argv, words):
    pytest.importorskip("matplotlib", reason="it draws")
    with pytest.raises(common.UserError) as raised:
        figures.parse_args(argv)
    assert words in str(raised.value) and "\n" not in str(raised.value)


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
    runs = sorted((tmp_path / "cache").iterdir())
    assert len(runs) == 4
    times = [(run / "metrics.csv").stat().st_mtime_ns for run in runs]
    kept = [sorted(path.name for path in run.glob("epoch-*.pt")) for run in runs]
    assert sorted(kept) == [[], [], ["epoch-0001.pt", "epoch-0002.pt"], ["epoch-0001.pt", "epoch-0002.pt"]]
    figures.run(figures.parse_args(["2", *argv, "--plot", str(tmp_path / "2.png")]))
    assert times == [(run / "metrics.csv").stat().st_mtime_ns for run in runs]


TITLES = [title for title, *_ in figures.COLUMNS + figures.MEASURES]
