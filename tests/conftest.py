"""What the tests share: the scripts on the path, small image folders, and two ways to run a script."""

import contextlib
import functools
import gc
import importlib
import io
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

# Before torch: threads that share a core with other programs wait for each other, ten times slower. Scripts inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
from PIL import Image  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "methods"), str(ROOT / "tests")]

METHODS = ("simclr", "moco", "byol", "simsiam", "barlow", "vicreg", "wmse", "shuffled_dbn", "cw_rgp")
# The smallest sensible run of each method: batches of 32, two steps an epoch on `small_folder`.
SMALL = ["--device", "cpu", "--batch-size", "32", "--epochs", "2", "--precision", "fp32", "--log-every", "1"]
SMALL_OF = {
    "moco": ["--queue-size", "64", "--bn-splits", "2", "--warmup", "1"],
    "wmse": ["--proj-dim", "8", "--w-size", "16"],
    # Views of 8 pixels: after two steps of Muon 16 embeddings no longer fill 16 dimensions.
    "cw_rgp": ["--proj-dim", "64", "--w-size", "16", "--groups", "2", "--w-iter", "1", "--optimizer", "adam"],
    "shuffled_dbn": ["--proj-dim", "32", "--groups", "4"],
    "byol": ["--proj-dim", "32", "--warmup", "1"],
    **{name: ["--proj-dim", "32"] for name in ("simclr", "simsiam", "barlow", "vicreg")},
}


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes more than a few seconds; `pytest -m slow` runs these")


def pytest_collection_modifyitems(config, items):
    """Plain `pytest` leaves the slow tests out; `-m slow` runs them."""
    if not config.option.markexpr and not any("::" in str(a) for a in config.args):
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


def draw_image(rng, label, side):
    """One image of one of a few classes that differ in the direction and the period of their stripes."""
    y, x = np.mgrid[0:side, 0:side]
    wave = np.sin((x if label % 2 else y) * (0.6 + 0.5 * (label // 2)) + rng.random() * 6)
    return np.clip(127 + 80 * wave[..., None] * rng.uniform(0.3, 1, 3) + rng.normal(0, 8, (side, side, 3)), 0, 255).astype(np.uint8)


def write_image(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def make_folder(root, train=64, test=24, classes=4, side=32):
    """DIR/{train,test}/<class>/*.png"""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("test", test)):
        for i in range(count):
            write_image(root / split / f"class{i % classes}" / f"{i:04d}.png", draw_image(rng, i % classes, side))
    return root


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory):
    """64 training and 24 test images of 32x32 in four classes."""
    return make_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def narrow_backbone():
    """`tiny` has 4 channels in place of 32: the same layers in a fraction of the time. For runs inside this process and its forks."""
    import common

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "build_backbone", functools.partial(common.build_backbone, width=4))
        yield


@pytest.fixture
def full_backbone(monkeypatch):
    """`tiny` as it is, in a module with the fixture above."""
    import common

    monkeypatch.setattr(common, "build_backbone", getattr(common.build_backbone, "func", common.build_backbone))


@pytest.fixture
def flags(small_folder, tmp_path):
    """flags("moco", "--epochs", "1") -> the argument list of a small run in tmp_path/run; later flags win."""
    return lambda method, *more: [*SMALL, *SMALL_OF[method], "--dataset", "folder", "--data-dir", str(small_folder),
                                  "--out", str(tmp_path / "run"), *map(str, more)]


def run_here(method, argv):
    """Run a script's `main` in this process -> status, out, err. Fast: torch is loaded already."""
    import common

    module = importlib.import_module(method)
    gc.freeze()  # what is there already need not be looked through below
    out, err = io.StringIO(), io.StringIO()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
            common.main(module.train if hasattr(module, "train") else module.run, lambda: module.parse_args(list(map(str, argv))))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    ended = ended.value.code
    gc.collect()  # the run's lock on its folder goes with the run
    return SimpleNamespace(status=ended, out=out.getvalue(), err=err.getvalue())


def run_script(script, *argv, cwd=None, timeout=300, **environment):
    """Run `python script argv` as a user does -> status, out, err."""
    done = subprocess.run([sys.executable, str(script), *map(str, argv)], cwd=cwd, capture_output=True, text=True, timeout=timeout,
                          env={**os.environ, **environment})
    return SimpleNamespace(status=done.returncode, out=done.stdout, err=done.stderr)


def save_edited(checkpoint, path):
    """Write an edited checkpoint with the SHA-256 that fits it, as if a run had written it so."""
    import common

    common.save_checkpoint(str(path), checkpoint)


def is_one_line_error(result):
    """Status 2, one line on stderr, no traceback."""
    lines = result.err.strip().splitlines()
    return result.status == 2 and len(lines) == 1 and "error:" in lines[0] and "Traceback" not in result.err
