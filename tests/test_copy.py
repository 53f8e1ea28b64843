"""The borrower: one method file and common.py, copied into an empty folder, train there on the borrower's images."""

import csv
import json
import shutil

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
