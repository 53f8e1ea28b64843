"""Every accepted value starts, or is refused at once; and what stops a run is named: identical images, or the rate at fault."""

import re
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import common
from conftest import METHODS, ROOT, draw_image, is_one_line_error, run_here, write_image

# ---- identical images ----------------------------------------------------------------------------


def images_of(folder, blank, others, value=0, equal=False):
    """A folder of `others` images that differ and of `blank` ones of one colour, or (equal) copies of one image."""
    rng = np.random.default_rng(1)
    copied = draw_image(rng, 0, 32) if equal else np.full((32, 32, 3), value, np.uint8)
    for i in range(others):
        write_image(folder / f"{i:03d}.png", draw_image(rng, i % 4, 32))
    for i in range(blank):
        write_image(folder / f"same{i:03d}.png", copied)
    return folder


def arguments(folder, out, batch, *more):
    return ["--device", "cpu", "--precision", "fp32", "--epochs", "1", "--batch-size", batch, "--log-every", "1", "--proj-hidden", "64",
            "--dataset", "folder", "--data-dir", folder, "--seed", "0", "--out", out, *more]


CW_RGP = ["--proj-dim", "128", "--groups", "2", "--w-size", "32"]
W_MSE = ["--proj-dim", "16", "--w-size", "32"]
CASES = [("cw_rgp", 2, 62, CW_RGP), ("cw_rgp", 8, 56, CW_RGP), ("cw_rgp", 64, 0, CW_RGP), ("wmse", 64, 0, W_MSE), ("wmse", 60, 4, W_MSE),
         ("shuffled_dbn", 64, 0, ["--proj-dim", "32"])]


@pytest.mark.parametrize("stream", [[], ["--stream", "--num-workers", "0"]], ids=["memory", "stream"])
@pytest.mark.parametrize("method, blank, others, more", CASES)
def test_identical_images_are_counted_and_the_remedy_works(tmp_path, method, blank, others, more, stream):
    folder = images_of(tmp_path / "images", blank, others)
    result = run_here(method, arguments(folder, tmp_path / "run", "64", "--w-iter", "8", *more, *stream)
                      if method == "cw_rgp" else arguments(folder, tmp_path / "run", "64", *more, *stream))
    assert is_one_line_error(result), (result.status, result.out, result.err)
    assert f"{blank} of the batch's 64 images are identical" in result.err and "without them" in result.err
    assert ("try --eps 0.001" in result.err) == (method != "shuffled_dbn")
    if method != "shuffled_dbn":
        eps = re.search(r"try --eps (\S+),", result.err).group(1)
        again = run_here(method, arguments(folder, tmp_path / "run", "64", "--eps", eps, *more, *stream))
        assert again.status == 0, again.err


def test_copies_of_an_image_and_of_another_are_both_counted(tmp_path):
    """Without augmentation copies are identical too: three of one image and two blank ones are five."""
    folder = images_of(tmp_path / "images", 3, 59, equal=True)
    for i in range(2):
        write_image(folder / f"blank{i}.png", np.full((32, 32, 3), 200, np.uint8))
    result = run_here("cw_rgp", arguments(folder, tmp_path / "run", "64", *CW_RGP, "--augment", "none", "--w-iter", "8"))
    assert is_one_line_error(result) and "5 of the batch's 64 images are identical" in result.err, result.err


def test_the_count_is_that_of_the_step_that_failed(tmp_path):
    """Of 256 images two are blank, so three of four batches have fewer than two: the look at the loss comes later."""
    folder = images_of(tmp_path / "images", 2, 62)
    args = arguments(folder, tmp_path / "run", "16", "--proj-dim", "64", "--groups", "2", "--w-size", "16", "--epochs", "20", "--log-every", "1000")
    result = run_here("cw_rgp", args)
    step = int(re.search(r"step (\d+): ", result.err).group(1))
    epoch, number = divmod(step, 4)
    order = np.random.default_rng((0, 1, epoch)).permutation(64)[number * 16:(number + 1) * 16]
    assert is_one_line_error(result) and {62, 63} <= set(order.tolist()) and "2 of the batch's 16 images are identical" in result.err


def test_a_singular_slice_of_different_images(tmp_path):
    """Whitening that is singular by itself: a share of I too small for float32."""
    folder = images_of(tmp_path / "images", 0, 64)
    result = run_here("cw_rgp", arguments(folder, tmp_path / "run", "64", "--proj-dim", "32", "--groups", "1", "--w-size", "64", "--eps", "1e-12"))
    assert is_one_line_error(result) and "identical" not in result.err and "try --eps 0.001" in result.err, result.err


# ---- the flag at fault ---------------------------------------------------------------------------


@pytest.mark.parametrize("more, named", [(["--lr", "1e4"], "--lr"), (["--lr-bias", "1e4"], "--lr-bias")])
def test_the_remedy_names_the_rate_at_fault(small_folder, tmp_path, more, named):
    result = run_here("vicreg", ["--dataset", "folder", "--data-dir", small_folder, "--batch-size", "32", "--optimizer", "sgd", "--warmup", "0",
                                 "--precision", "fp32", "--device", "cpu", "--epochs", "20", "--proj-dim", "32", "--out", tmp_path / "run", *more])
    assert is_one_line_error(result) and re.search(f"a smaller (--lr .)?{named}\\b", result.err), result.err


@pytest.mark.parametrize("method, flag, value, proposed", [("simclr", "--temperature", "1e-30", "0.5"), ("moco", "--temperature", "1e-30", "0.1"),
                                                           ("barlow", "--lambd", "1e300", "0.0051"), ("vicreg", "--inv", "1e38", "25.0")])
def test_a_weight_that_no_float32_holds_is_refused_by_its_own_name(method, flag, value, proposed, tmp_path):
    result = run_here(method, [flag, value, "--out", tmp_path / "run"])
    assert is_one_line_error(result) and f"error: {flag}: '{value}' is not a number" in result.err and f"try {proposed}" in result.err


# ---- sizes ---------------------------------------------------------------------------------------

REFUSED = [("barlow", "--batch-size", 10**9), ("barlow", "--batch-size", 10**6), ("barlow", "--batch-size", 10_001), ("cw_rgp", "--batch-size", 10**12),
           ("vicreg", "--proj-dim", 2 * 10**9), ("wmse", "--proj-dim", 2 * 10**9), ("moco", "--queue-size", 10**12), ("simclr", "--epochs", 10**9),
           ("byol", "--proj-hidden", 10**8), ("simsiam", "--pred-hidden", 10**8), ("byol", "--warmup", 10**12), ("simclr", "--lr", "1e30"),
           ("simclr", "--weight-decay", "1e30"), ("cw_rgp", "--w-iter", 10**6), ("cw_rgp", "--w-size", 10**12), ("cw_rgp", "--groups", 10**12),
           ("shuffled_dbn", "--groups", 10**12), ("moco", "--bn-splits", 10**12), ("wmse", "--w-size", 999_999_937)]


@pytest.mark.parametrize("method, flag, value", REFUSED)
def test_what_cannot_work_is_refused_within_a_second_and_the_proposal_is_accepted(method, flag, value, tmp_path):
    started = time.process_time()
    result = run_here(method, [flag, value, "--out", tmp_path / "run"])
    assert time.process_time() - started < 1 and is_one_line_error(result) and flag in result.err, result.err
    words = result.err.rsplit("; try ", 1)[1].split()
    argv = words if words[0].startswith("--") else [flag, *words]
    started = time.process_time()
    __import__(method).parse_args(argv)
    assert time.process_time() - started < 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU says itself that it is full")
def test_views_that_no_memory_holds_are_refused_and_the_proposal_fits(monkeypatch):
    monkeypatch.setattr(common, "MEMORY", 16 * 2**30)
    for method in METHODS:
        with pytest.raises(common.UserError, match="^--batch-size 256 --views 2: --batch-size and --views of 1024 pixels need 125 GB; try --") as raised:
            __import__(method).parse_args(["--batch-size", "256", "--image-size", "1024"])
        words = str(raised.value).rsplit("; try ", 1)[1].split()
        __import__(method).parse_args(["--image-size", "1024", *words])


ACCEPTED = [("barlow", "--log-every", 10**9), ("barlow", "--eval-every", 10**9), ("barlow", "--save-every", 10**9), ("barlow", "--num-workers", 256),
            ("barlow", "--views", 16), ("barlow", "--lambd", 10**6), ("barlow", "--warmup", 10**9), ("barlow", "--weight-decay", 100),
            ("simclr", "--temperature", "1e-4"), ("simclr", "--temperature", "1e30"), ("moco", "--temperature", "1e-4"), ("vicreg", "--inv", 10**6),
            ("vicreg", "--var", 10**6), ("vicreg", "--cov", 10**6), ("moco", "--momentum", 1), ("moco", "--momentum", 0), ("cw_rgp", "--eps", 0.999999),
            ("wmse", "--eps", 0.999999), ("cw_rgp", "--w-iter", 100), ("simclr", "--lr", "1e-300"), ("simclr", "--proj-layers", 8),
            ("simsiam", "--pred-hidden", 2**14), ("simclr", "--proj-hidden", 2**14), ("simclr", "--seed", 2**31 - 1)]


@pytest.mark.slow
@pytest.mark.parametrize("method, flag, value", ACCEPTED)
def test_the_ends_of_what_is_accepted_train(flags, method, flag, value):
    result = run_here(method, flags(method, "--epochs", "1", "--image-size", "16", flag, value))
    assert result.status == 0, result.err


# ---- python -OO ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_without_docstrings_and_asserts_a_run_and_eval_work(flags, tmp_path, method):
    train = [sys.executable, "-OO", str(ROOT / "methods" / f"{method}.py"), *flags(method, "--epochs", "1", "--image-size", "16")]
    evaluate = [sys.executable, "-OO", str(ROOT / "eval.py"), str(tmp_path / "run"), "--probe-epochs", "1", "--device", "cpu"]
    for command in ([*train[:3], "--help"], train, [*train[:-4], "--epochs", "2", "--image-size", "16", "--resume"], evaluate):
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
