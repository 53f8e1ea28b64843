"""The borrower: one method file and common.py, copied into an empty folder, train there on the borrower's images."""

import csv
import json
import shutil
import subprocess
import sys

import pytest
from conftest import METHODS, ROOT, SMALL, SMALL_OF, run_script


@pytest.mark.parametrize("method", [name if name == "cw_rgp" else pytest.param(name, marks=pytest.mark.slow) for name in METHODS])
def test_a_method_and_common_alone_train_in_an_empty_folder(method, tmp_path, small_folder):
    borrowed = tmp_path / "borrowed"
    borrowed.mkdir()
    for source in (ROOT / "methods" / f"{method}.py", ROOT / "common.py"):
        shutil.copy(source, borrowed)
    shutil.copytree(small_folder, borrowed / "pictures")
    result = run_script(f"{method}.py", *SMALL, *SMALL_OF[method], "--epochs", 1, "--image-size", 16, "--dataset", "folder",
                        "--data-dir", "pictures", cwd=borrowed, PYTHONPATH="")
    assert result.status == 0 and result.err == "", result.err
    folder = borrowed / "runs" / f"{method}-folder-s0"
    assert {path.name for path in folder.iterdir()} >= {"config.json", "metrics.csv", "last.pt", "backbone.pt"}
    (row,) = csv.DictReader((folder / "metrics.csv").open())
    assert 0 < float(row["knn"]) <= 1 and int(row["step"]) == 2
    assert json.loads((folder / "config.json").read_text())["method"] == method
    assert {path.name for path in borrowed.iterdir()} - {"__pycache__"} == {"common.py", f"{method}.py", "pictures", "runs"}
    assert "raw pixels" in result.out and "runs/" in result.out


def test_a_copy_takes_nothing_from_the_folder_above_it(tmp_path):
    """Neither a csv.py, in place of Python's, nor another common.py, whichever way the copy is started."""
    borrowed = tmp_path / "home" / "borrowed"
    borrowed.mkdir(parents=True)
    for name in ("csv.py", "common.py"):
        (borrowed.parent / name).write_text("raise SystemExit('of the folder above')\n")
    shutil.copy(ROOT / "methods" / "simclr.py", borrowed / "my_simclr.py")
    shutil.copy(ROOT / "common.py", borrowed)
    code = "import sys; sys.path.append(sys.argv[1]); from {} import Args; print(Args.method)"
    for command in ([borrowed / "my_simclr.py", "--help"], ["-P", borrowed / "my_simclr.py", "--help"],
                    ["-c", code.format("my_simclr"), borrowed], ["-c", code.format("borrowed.my_simclr"), borrowed.parent]):
        if command[0] != "-P" or sys.version_info >= (3, 11):
            result = subprocess.run([sys.executable, *map(str, command)], cwd=tmp_path, capture_output=True, text=True)
            assert result.returncode == 0 and "simclr" in result.stdout, (command, result.stderr)
