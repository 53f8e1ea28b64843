"""What can break under a run: the disk, a checkpoint, the folder, the images, the reader of its output, and the numbers.

In each case the run either goes on exactly, or ends with status 2 and one line; the last good checkpoint stays readable."""

import errno
import io
import os
import resource
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import common
from conftest import METHODS, ROOT, is_one_line_error, run_here
from test_resume import (arguments, content, copied, finish, first_difference, half_done, images, left_by, run_in_pieces, start,
                         # noqa: F401
                         unstopped, wait_for)

pytestmark = pytest.mark.usefixtures("narrow_backbone")
HEAVY = pytest.mark.slow
FAST = ("byol", "cw_rgp")  # of the nine, for the plain tests


def some_plain(names, plain=FAST):
    return [pytest.param(name, marks=() if name in plain else HEAVY) for name in names]


# ---- the disk ------------------------------------------------------------------------------------


def full_from_step(monkeypatch, step, how):
    """From this step on nothing fits on the disk: the write itself fails (as with a quota), or only its last part, in fsync."""
    save, fsync = common.Run.save, os.fsync
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def save_on_full_disk(self, now):
        if now < step:
            return save(self, now)
        try:
            if how == "write":
                resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # bytes: part of the checkpoint is written
            else:
                monkeypatch.setattr(os, "fsync", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
            return save(self, now)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            monkeypatch.setattr(os, "fsync", fsync)

    monkeypatch.setattr(common.Run, "save", save_on_full_disk)


@pytest.mark.parametrize("how", ["write", "fsync"])
def test_a_full_disk_leaves_the_old_checkpoint_and_the_run_goes_on_later(monkeypatch, images, unstopped, tmp_path, how):  # noqa: F811
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        full_from_step(patch, 3, how)
        result = run_here("moco", arguments("moco", images, out, "--save-every", "1"))
    assert is_one_line_error(result) and "last.pt could not be written" in result.err and "make room" in result.err
    assert not list(out.glob("*.tmp")) and torch.load(out / "last.pt", weights_only=True)["step"] == 2
    assert run_here("moco", arguments("moco", images, out, "--resume")).status == 0
    assert first_difference(left_by(out), unstopped("moco")) == ""


@pytest.mark.parametrize("name", ["config.json", "metrics.csv", "backbone.pt"])
def test_a_disk_full_at_another_file_is_one_line_too(monkeypatch, images, unstopped, tmp_path, name):  # noqa: F811
    out, write = tmp_path / "run", common.write_file

    def write_or_fail(path, content, **more):  # noqa: F811
        with monkeypatch.context() as patch:
            if path.endswith(name):
                patch.setattr(os, "fsync", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
            write(path, content, **more)

    with monkeypatch.context() as patch:
        patch.setattr(common, "write_file", write_or_fail)
        result = run_here("moco", arguments("moco", images, out))
    assert is_one_line_error(result) and f"{name} could not be written (No space left on device)" in result.err
    assert not list(out.glob("*.tmp"))
    assert run_here("moco", arguments("moco", images, out, "--resume")).status == 0
    assert first_difference(left_by(out), unstopped("moco")) == ""


def test_killed_between_the_two_renames_of_a_save(monkeypatch, images, unstopped, tmp_path):  # noqa: F811
    """last.pt has become previous.pt, and the new one has not got its name yet."""
    out, replace = tmp_path / "run", os.replace

    def killed(source, target):
        if target.endswith("last.pt") and os.path.exists(out / "previous.pt"):
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        assert run_here("moco", arguments("moco", images, out, "--save-every", "3")).status == 130
    assert not (out / "last.pt").exists() and (out / "previous.pt").exists()
    refused = run_here("moco", arguments("moco", images, out))
    assert is_one_line_error(refused) and "already holds a run" in refused.err
    result = run_here("moco", arguments("moco", images, out, "--resume"))
    assert result.status == 0 and "after step 3 of" in result.out and not result.err
    assert first_difference(left_by(out), unstopped("moco")) == ""


# ---- the checkpoint ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_checkpoints(images, tmp_path_factory):  # noqa: F811
    """Folder of a byol run that was stopped: last.pt of step 6, previous.pt of step 4."""
    out = tmp_path_factory.mktemp("two") / "run"
    with pytest.MonkeyPatch.context() as patch:
        watch = common.Run.watch

        def stop(run, step, loss):
            watch(run, step, loss)
            if step == 6:
                raise KeyboardInterrupt

        patch.setattr(common.Run, "watch", stop)
        assert run_here("byol", arguments("byol", images, out, "--save-every", "2")).status == 130
    assert [torch.load(out / name, weights_only=True)["step"] for name in ("last.pt", "previous.pt")] == [6, 4]
    return out


def truncated(data):
    return data[: len(data) // 2]


def flipped(data, share=0.5, bit=1):
    where = int(share * (len(data) - 1))
    return data[:where] + bytes([data[where] ^ bit]) + data[where + 1:]


DAMAGES = {"truncated": truncated, "one bit flipped": flipped, "empty": lambda data: b"", "last byte gone": lambda data: data[:-1],
           "zeros": lambda data: bytes(len(data)), "text": lambda data: b"hello\n"}


@pytest.mark.parametrize("damage", DAMAGES)
def test_from_a_damaged_checkpoint_the_one_before_is_used_and_said(images, unstopped, two_checkpoints, tmp_path, damage):  # noqa: F811
    out = copied(two_checkpoints, tmp_path / "run")
    (out / "last.pt").write_bytes(DAMAGES[damage]((out / "last.pt").read_bytes()))
    result = run_here("byol", arguments("byol", images, out, "--resume"))
    assert result.status == 0 and "after step 4 of" in result.out
    assert len(result.err.splitlines()) == 1 and f"{out}/last.pt" in result.err
    assert f"using {out}/previous.pt (step 4) instead" in result.err
    assert first_difference(left_by(out), unstopped("byol")) == ""


def test_no_flipped_bit_changes_a_number_unseen(two_checkpoints, tmp_path, capfd):
    """30 flips all over the file: the checkpoint is refused and the one before is read, or it is read as it was written."""
    out = copied(two_checkpoints, tmp_path / "run")
    whole, refused = (out / "last.pt").read_bytes(), 0
    expected = {checkpoint["step"]: checkpoint for checkpoint in (common.load_checkpoint(str(out / name)) for name in ("last.pt",
                                                                                                                       "previous.pt"))}
    for i in range(30):
        (out / "last.pt").write_bytes(flipped(whole, share=1 - (1 - i / 30) ** 3 if i % 2 else i / 30, bit=1 << i % 8))
        found = common.load_last(str(out))
        refused += found["step"] == 4
        numbers = ({f"{part}.{name}": value for part in ("model", "optimizer") for name, value in flat(found_[part])}
                   for found_ in (found, expected[found["step"]]))
        assert first_difference(*numbers) == "", i
    assert refused > 15
    capfd.readouterr()


def flat(value):
    from test_resume import flatten
    return flatten(value).items()


def test_both_checkpoints_damaged_is_one_line(images, two_checkpoints, tmp_path):  # noqa: F811
    out = copied(two_checkpoints, tmp_path / "run")
    for name in ("last.pt", "previous.pt"):
        (out / name).write_bytes(truncated((out / name).read_bytes()))
    before = content(out)
    result = run_here("byol", arguments("byol", images, out, "--resume"))
    assert is_one_line_error(result) and "last.pt" in result.err
    assert "no older checkpoint is readable: train again with another --out" in result.err
    assert content(out) == before


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (open, (self.marker, "w"))


@pytest.mark.parametrize("kind", ["zip", "plain pickle"])
def test_a_malicious_checkpoint_is_not_executed(images, tmp_path, kind):  # noqa: F811
    out, marker = tmp_path / "run", tmp_path / "executed"
    out.mkdir()
    torch.save({"format": common.CHECKPOINT_FORMAT, "args": Payload(str(marker))}, out / "last.pt",
               _use_new_zipfile_serialization=kind == "zip")
    result = run_here("moco", arguments("moco", images, out, "--resume"))
    assert is_one_line_error(result) and str(out / "last.pt") in result.err and not marker.exists()
    torch.load(out / "last.pt", weights_only=False)
    assert marker.exists()  # else this would test nothing


@pytest.mark.parametrize("cut", ["in mid-line", "a line too many", "gone", "empty"])
def test_metrics_are_repaired_on_resume(images, unstopped, two_checkpoints, tmp_path, cut):  # noqa: F811
    out = copied(two_checkpoints, tmp_path / "run")
    text = (out / "metrics.csv").read_text()
    damaged = {"in mid-line": text[: len(text) * 2 // 3], "a line too many": text + text.splitlines()[1].replace("1,", "9,", 1) + "\n",
               "empty": ""}
    (out / "metrics.csv").unlink()
    if cut in damaged:
        (out / "metrics.csv").write_text(damaged[cut])
    assert run_here("byol", arguments("byol", images, out, "--resume")).status == 0
    assert first_difference(left_by(out), unstopped("byol")) == ""


# ---- two runs on one folder ----------------------------------------------------------------------


def test_a_second_process_on_one_folder_is_refused(images, unstopped, tmp_path):  # noqa: F811
    """Both before and after the first has a checkpoint; and the lock goes with its process, however that ends."""
    out = tmp_path / "run"
    first = start("moco", arguments("moco", images, out, "--save-every", "1"), held=2)
    try:
        assert wait_for(first, out / "held"), finish(first)
        before = content(out)
        second = run_here("moco", arguments("moco", images, out, "--resume"))
        assert is_one_line_error(second) and f"--out {out} is in use by another run" in second.err
        (out / "last.pt").rename(tmp_path / "aside")
        (out / "previous.pt").rename(tmp_path / "aside too")
        third = run_here("moco", arguments("moco", images, out))
        assert is_one_line_error(third) and f"--out {out} is in use by another run" in third.err
        (tmp_path / "aside").rename(out / "last.pt")
        (tmp_path / "aside too").rename(out / "previous.pt")
        assert content(out) == before
    finally:
        first.kill()
        finish(first)
    assert run_here("moco", arguments("moco", images, out, "--resume")).status == 0
    assert first_difference(left_by(out), unstopped("moco")) == ""


# ---- numbers that are not finite -----------------------------------------------------------------


@pytest.fixture
def now(monkeypatch):
    """now.step: number of the step that is running, from 0."""
    clock, augment = SimpleNamespace(step=-1), common.Data.augment

    def note(self, batch, step):
        clock.step = step
        return augment(self, batch, step)

    monkeypatch.setattr(common.Data, "augment", note)
    return clock


def change_built_model(monkeypatch, method, change):
    module = sys.modules.get(method) or __import__(method)
    train = module.train

    def build_and_change(args):
        model = module.build(args)
        change(model)
        return model

    monkeypatch.setattr(module, "train", lambda args: train(args, build=build_and_change))


def spoil_output(monkeypatch, now, method, part, value):
    """One number in the output of the backbone or the projector becomes NaN or infinite, in training, in step 5 (the sixth)."""

    def spoil(module, _inputs, output):
        if now.step == 5 and module.training:
            spoilt = torch.zeros_like(output)
            spoilt[0, 0] = value
            return output + spoilt

    change_built_model(monkeypatch, method, lambda model: getattr(model, part).register_forward_hook(spoil))


def stopped_by(images, method, out, what, *more, step=5):  # noqa: F811
    """Run until the fault; check the line, and the checkpoint that was kept. Returns the line."""
    result = run_here(method, arguments(method, images, out, "--save-every", "1", *more))
    assert is_one_line_error(result), (result.status, result.err[-600:])
    assert f"step {step}: " in result.err and f"{what} is not finite; likely cause: " in result.err, result.err
    assert "try a smaller --lr" in result.err or "try --eps" in result.err
    assert "the last good checkpoint stays" in result.err
    kept = common.load_last(str(out))
    assert kept["step"] == step
    assert all(bool(v.isfinite().all()) for v in kept["model"].values() if v.is_floating_point())
    assert all(bool(v.isfinite().all()) for state in kept["optimizer"]["state"].values() for v in state.values() if torch.is_tensor(v))
    assert not list(out.glob("*.tmp"))
    return result.err


@pytest.mark.parametrize("value", [float("nan"), pytest.param(float("-inf"), marks=HEAVY)])
@pytest.mark.parametrize("method, part", [pytest.param(m, part, marks=() if part == "backbone" or m in FAST else HEAVY)
                                          for m in METHODS for part in ("backbone", "projector")])
def test_an_output_that_is_not_finite_stops_the_run(monkeypatch, now, images, tmp_path, method, part, value):  # noqa: F811
    spoil_output(monkeypatch, now, method, part, value)
    stopped_by(images, method, tmp_path / "run", f"the output of the {part}")


def test_after_such_a_stop_the_run_goes_on_exactly(monkeypatch, now, images, unstopped, tmp_path):  # noqa: F811
    with monkeypatch.context() as patch:
        spoil_output(patch, now, "cw_rgp", "projector", float("nan"))
        stopped_by(images, "cw_rgp", tmp_path / "run", "the output of the projector")
    assert run_here("cw_rgp", arguments("cw_rgp", images, tmp_path / "run", "--resume")).status == 0
    assert first_difference(left_by(tmp_path / "run"), unstopped("cw_rgp")) == ""


def spoil_eigenvalues(monkeypatch, now, how):
    eigh = torch.linalg.eigh

    def spoilt(s, *args, **more):
        if now.step == 5:
            if how == "LinAlgError":
                raise torch.linalg.LinAlgError("linalg.eigh: (Batch element 0): the algorithm failed to converge")
            eigenvalues, u = eigh(s, *args, **more)
            return -eigenvalues, u  # not positive-definite
        return eigh(s, *args, **more)

    monkeypatch.setattr(torch.linalg, "eigh", spoilt)


@pytest.mark.parametrize("how, what", [("negative", "the loss"), ("LinAlgError", "the whitening")])
@pytest.mark.parametrize("method, more",
                         [("cw_rgp", []), ("shuffled_dbn", []), ("wmse", ["--whitening", "zca"]), ("wmse", ["--whitening", "pca"])], ids=lambda v: v if isinstance(v, str) else "".join(v))
def test_eigenvalues_that_cannot_be_stop_the_run(monkeypatch, now, images, tmp_path, method, more, how, what):  # noqa: F811
    spoil_eigenvalues(monkeypatch, now, how)
    said = stopped_by(images, method, tmp_path / "run", what, *more)
    assert "the embeddings do not fill their space" in said and ("try --eps 0.001, or" in said) == (method != "shuffled_dbn")


def test_a_cholesky_that_fails_stops_the_run(monkeypatch, now, images, tmp_path):  # noqa: F811
    cholesky = torch.linalg.cholesky_ex

    def failed(s, *args, **more):
        factor, info = cholesky(s, *args, **more)
        return factor, info + 3 * (now.step == 5)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", failed)
    assert "--eps" in stopped_by(images, "wmse", tmp_path / "run", "the loss")


@pytest.mark.parametrize("method", ["cw_rgp", "wmse", "shuffled_dbn"])
def test_embeddings_that_are_all_equal_stop_a_whitening(monkeypatch, now, images, tmp_path, method):  # noqa: F811
    """A true collapse, without any injected NaN: covariances of zero."""
    change_built_model(monkeypatch, method, lambda model: model.projector.register_forward_hook(
        lambda module, _inputs, output: output * 0 + 1 if now.step == 5 and module.training else None))
    said = stopped_by(images, method, tmp_path / "run", "")
    assert any(f"step 5: {what} is not finite" in said for what in ("the loss", "the whitening"))


def spoil_gradient(monkeypatch, now, method, name, value):
    change_built_model(monkeypatch, method,
                       lambda model: model.get_parameter(name).register_hook(lambda g: g * value if now.step == 5 else g))


@pytest.mark.parametrize("value", [float("nan"), pytest.param(float("inf"), marks=HEAVY)])
@pytest.mark.parametrize("name", ["backbone.layers.0.weight", pytest.param("projector.0.bias", marks=HEAVY)])
@pytest.mark.parametrize("method", METHODS)
def test_a_gradient_that_is_not_finite_stops_the_run(monkeypatch, now, images, tmp_path, method, name, value):  # noqa: F811
    """The loss is finite, and the optimizer has made its step already: the weights are lost, the checkpoint is not."""
    if name == "projector.0.bias" and "0.bias" not in dict(__import__(method).build(parsed(method, images)).projector.named_parameters()):
        name = "projector.0.weight"
    spoil_gradient(monkeypatch, now, method, name, value)
    stopped_by(images, method, tmp_path / "run", f"the gradient of {name}")


@pytest.mark.parametrize("optimizer", ["sgd", "lars", "muon"])
def test_no_optimizer_hides_a_gradient_that_is_not_finite(monkeypatch, now, images, tmp_path, optimizer):  # noqa: F811
    """Muon keeps the filters' gradients from Adam: the watch must see them all the same."""
    spoil_gradient(monkeypatch, now, "simclr", "backbone.layers.0.weight", float("nan"))
    stopped_by(images, "simclr", tmp_path / "run", "the gradient of backbone.layers.0.weight", "--optimizer", optimizer)


def parsed(method, images):  # noqa: F811
    return __import__(method).parse_args(arguments(method, images, "unused"))


@pytest.mark.parametrize("method", some_plain(METHODS, ("moco", "cw_rgp", "shuffled_dbn", "wmse")))
def test_a_rare_look_at_the_loss_still_names_the_first_step_and_cause(monkeypatch, now, images, tmp_path, method):  # noqa: F811
    """--log-every 100, no --save-every: NaN weights run on until the epoch's end, or until a decomposition refuses them."""
    spoil_gradient(monkeypatch, now, method, "backbone.layers.0.weight", float("nan"))
    result = run_here(method, arguments(method, images, tmp_path / "run", "--log-every", "100"))
    assert is_one_line_error(result) and "step 5: the gradient of backbone.layers.0.weight is not finite" in result.err, result.err
    kept = common.load_last(str(tmp_path / "run"))
    assert kept["step"] == 4 and all(bool(v.isfinite().all()) for v in kept["model"].values())


def test_in_the_first_epoch_there_is_no_checkpoint_yet_and_none_comes(monkeypatch, now, images, tmp_path):  # noqa: F811
    monkeypatch.setattr(common, "learning_rate", lambda *_: float("nan") if now.step == 1 else 1.0)
    result = run_here("simclr", arguments("simclr", images, tmp_path / "run"))
    assert is_one_line_error(result) and "there is no checkpoint yet" in result.err and "step 2: " in result.err
    assert not list((tmp_path / "run").glob("*.pt"))


def test_a_network_that_is_not_finite_in_eval_mode_only_stops_the_run(monkeypatch, images, tmp_path):  # noqa: F811
    """As after an epoch's last step, which the loss of that step has not seen: no row, no checkpoint of these weights."""

    def spoil(module, _inputs, output):
        return output if module.training else output * float("nan")

    change_built_model(monkeypatch, "simclr", lambda model: model.projector.register_forward_hook(spoil))
    result = run_here("simclr", arguments("simclr", images, tmp_path / "run"))
    assert is_one_line_error(result) and "in eval mode is not finite" in result.err and "try a smaller --lr" in result.err
    assert not list((tmp_path / "run").glob("*.pt")) and not (tmp_path / "run" / "metrics.csv").exists()


# ---- the images ----------------------------------------------------------------------------------


def test_images_in_memory_may_change_under_the_run(monkeypatch, images, unstopped, tmp_path):  # noqa: F811
    root = tmp_path / "images"
    shutil.copytree(images, root)
    watch = common.Run.watch
    monkeypatch.setattr(common.Run, "watch", lambda run, step, loss: (watch(run, step, loss), step == 2 and shutil.rmtree(root)))
    assert run_here("byol", arguments("byol", root, tmp_path / "run")).status == 0
    assert not root.exists()
    ours, whole = ({k: v for k, v in numbers.items() if not k.endswith(".data_dir")} for numbers in (left_by(tmp_path / "run"),
                                                                                               unstopped("byol")))
    assert first_difference(ours, whole) == ""


def broken(path):
    path.write_bytes(path.read_bytes()[:20])


@pytest.mark.parametrize("change", ["one more", "one less", "renamed", "unreadable"])
def test_other_images_on_resume_are_refused(images, two_checkpoints, tmp_path, change):  # noqa: F811
    root, out = tmp_path / "images", copied(two_checkpoints, tmp_path / "run")
    shutil.copytree(images, root)
    some = sorted((root / "train").rglob("*.png"))[3]
    {"one more": lambda: shutil.copy(some, some.with_name("new.png")), "one less": some.unlink,
     "renamed": lambda: some.rename(some.with_name("x.png")), "unreadable": lambda: broken(some)}[change]()
    result = run_here("byol", arguments("byol", root, out, "--resume"))
    lines = result.err.strip().splitlines()
    assert result.status == 2 and "error: --resume: --data-dir holds other images than before (" in lines[-1] and "try another --out" in lines[-1], result.err
    assert len(lines) == (2 if change == "unreadable" else 1)  # the other line names the broken file


# ---- the reader of the output --------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_carriage_returns_only_on_a_terminal(monkeypatch, images, tmp_path):  # noqa: F811
    assert "\r" not in run_here("simclr", arguments("simclr", images, tmp_path / "a")).out
    monkeypatch.setattr(io, "StringIO", Terminal)
    assert "\r" in run_here("simclr", arguments("simclr", images, tmp_path / "b")).out


def in_a_shell(command):
    done = subprocess.run(["bash", "-c", f"{command}; echo ${{PIPESTATUS[0]}} >&2"], capture_output=True, text=True, timeout=300)
    return SimpleNamespace(status=int(done.stderr.splitlines()[-1]), out=done.stdout, err="\n".join(done.stderr.splitlines()[:-1]))


def test_a_reader_that_leaves_does_not_end_the_training(images, full_backbone, tmp_path):  # noqa: F811
    words = " ".join([sys.executable, str(ROOT / "methods" / "moco.py"), *arguments("moco", images, tmp_path / "run")])
    result = in_a_shell(f"{words} | head -1")
    assert result.status == 0 and result.err == "" and "\r" not in result.out and len(result.out.splitlines()) == 1
    assert run_here("moco", arguments("moco", images, tmp_path / "whole")).status == 0
    assert first_difference(left_by(tmp_path / "run"), left_by(tmp_path / "whole")) == ""


@pytest.mark.slow
def test_a_reader_that_never_came_does_not_end_the_training(images, full_backbone, tmp_path):  # noqa: F811
    words = " ".join([sys.executable, str(ROOT / "methods" / "moco.py"), *arguments("moco", images, tmp_path / "run")])
    result = in_a_shell(f"{words} | true")
    assert result.status == 0 and result.err == ""
    assert run_here("moco", arguments("moco", images, tmp_path / "whole")).status == 0
    assert first_difference(left_by(tmp_path / "run"), left_by(tmp_path / "whole")) == ""
    result = in_a_shell(f"{words} --resume | true")
    assert result.status == 0 and result.err == ""
