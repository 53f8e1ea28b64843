"""What a user can do wrong ends in one line that names the flag or the file and a way out: no traceback, nothing left behind."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import benchmark
import common
import cw_rgp
import pytest
import torch
from conftest import ROOT, is_one_line_error, make_folder, run_here, run_script, save_edited, write_image
from test_data import gradient, save_broken

pytestmark = pytest.mark.usefixtures("narrow_backbone")
WAY_OUT = re.compile(r"\btry |--help|put |remove |add --resume|wait for|restore|make room|needs --data-dir|another --out")


def refused(result, *words):
    """One line, status 2, the words in it and something to do about it."""
    assert is_one_line_error(result), f"status {result.status}\n{result.out}\n{result.err}"
    for word in words:
        assert str(word) in result.err, f"no {word!r} in: {result.err}"
    assert WAY_OUT.search(result.err), f"proposes nothing: {result.err}"
    return result.err


def snapshot(folder):
    """{relative path: content} of all files."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- as a user sees it: the first case in a process of its own -----------------------------------


@pytest.mark.parametrize("argv, words, script", [
    (["--dataset", "folder", "--data-dir", "nowhere"], ["--data-dir", "nowhere"], True),
    (["--lr", "-1"], ["--lr", "-1"], False),
    (["--batch-size", "100", "--w-size", "64"], ["--w-size 64", "--batch-size 100"], False),
])
def test_bad_input_as_a_script(tmp_path, monkeypatch, argv, words, script):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(ROOT / "methods" / "cw_rgp.py")])
    result = run_script(ROOT / "methods" / "cw_rgp.py", *argv, cwd=tmp_path) if script else run_here("cw_rgp", argv)
    assert refused(result, *words).startswith("cw_rgp.py: error: ") and not list(tmp_path.iterdir())


# ---- flags ---------------------------------------------------------------------------------------


def captured_parser():
    """The parser of cw_rgp.py, as parse_args builds it."""
    kept, parse = [], common.OneLineParser.parse_args
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.OneLineParser, "parse_args", lambda parser, argv=None: kept.append(parser) or parse(parser, argv))
        cw_rgp.parse_args([])
    return kept[0]


ACTIONS = captured_parser()._actions
NUMBERS = {common.option_of(flag[0]): SimpleNamespace(type=common.parser_of(*flag[1:])) for flag in common.flags_of(cw_rgp.Args) if flag[1] in (int, float)}
CHOICES = [action.option_strings[0] for action in ACTIONS if action.choices]
ZERO_IS_FINE = {"--weight-decay", "--warmup", "--seed", "--num-workers", "--eval-every", "--save-every", "--keep-every", "--eps", "--test-fraction"}


def is_whole(flag):
    with pytest.raises(Exception) as raised:
        NUMBERS[flag].type("x")
    return "whole" in str(raised.value)


def test_the_list_of_numeric_flags_is_complete():
    assert len(NUMBERS) >= 20 and {"--lr", "--epochs", "--batch-size", "--w-size", "--eps", "--seed", "--log-every"} <= set(NUMBERS)
    for flag in ZERO_IS_FINE:
        assert NUMBERS[flag].type("0") == 0


@pytest.mark.parametrize("flag", NUMBERS)
def test_numbers_that_make_no_sense_are_refused_by_the_name_of_their_flag(flag, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = ["-1", "-0.5", "1" + 400 * "0", "nan", "inf", "-inf", "1e999", "many", "", " ", "1,5", "0x10", "None"]
    values += ["1.5", "1e3", "2.0"] if is_whole(flag) else []
    values += [] if flag in ZERO_IS_FINE else ["0"]
    refused(run_here("cw_rgp", [f"{flag}={values[0]}"]), f"{flag}: ", values[0], "try ")
    for value in values:
        with pytest.raises(common.UserError) as raised:
            cw_rgp.parse_args([f"{flag}={value}"])
        message = str(raised.value)
        shown = f"{flag}: '{value}' is not a" if len(value) < 100 else f"{flag}: '1000"  # cut
        assert message.startswith(shown) and " is not a" in message and "\n" not in message and len(message) < 1600
        proposal = re.search(r"try (\S+)$", message).group(1)
        assert NUMBERS[flag].type(proposal) is not None, f"{flag} refuses the proposed {proposal}"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flag", CHOICES)
def test_unknown_names_are_refused_with_the_known_ones(flag):
    action = next(action for action in ACTIONS if action.option_strings[0] == flag)
    refused(run_here("cw_rgp", [flag, "unknown"]), flag, "unknown", *action.choices)


@pytest.mark.parametrize("argv, words", [
    (["--no-such-flag", "1"], ["--no-such-flag"]),
    (["--epoch", "3"], ["--epoch"]),  # no abbreviations: a typo must not become another flag
    (["--lr"], ["--lr"]),
    (["stray"], ["stray"]),
    (["--backbone", "resnet19"], ["--backbone resnet19", "tiny", "resnet18"]),
    (["--backbone", "vit_b_16"], ["--backbone vit_b_16"]),
    (["--backbone", ""], ["--backbone"]),
    (["--dataset", "folder"], ["--data-dir"]),
    (["--device", "cuda"], ["--device cuda", "--device cpu"]),
])
def test_bad_flags(argv, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(run_here("cw_rgp", argv), *words)
    assert not list(tmp_path.iterdir())


SIZES = [  # flags that break a size rule, and the flag that the message names
    (["--batch-size", 100], "--w-size"), (["--batch-size", 37], "--w-size"), (["--batch-size", 32], "--w-size"),
    (["--groups", 3], "--groups"), (["--groups", 16], "--w-size"), (["--proj-dim", 100], "--w-size"),
    (["--proj-dim", 7, "--groups", 2], "--groups"),
    (["--proj-dim", 64, "--groups", 1], "--w-size"), (["--proj-dim", 64, "--groups", 64], "--groups"), (["--groups", 512], "--groups"),
    (["--groups", 512, "--eps", "1e-3"], "--groups"),
    (["--batch-size", 37, "--w-size", 37, "--proj-dim", 64], "--w-size"), (["--batch-size", 2, "--w-size", 2, "--proj-dim", 4], "--groups"),
    (["--batch-size", 256, "--w-size", 256], "--w-size"),
]


@pytest.mark.parametrize("argv, flag", SIZES, ids=lambda part: "-".join(map(str, part)) if isinstance(part, list) else part)
def test_sizes_that_do_not_fit_are_refused_and_the_advice_leads_to_sizes_that_do(argv, flag, tmp_path, monkeypatch):
    """What the message proposes works at once (design: "the flag to change and a value that works")."""
    monkeypatch.chdir(tmp_path)
    argv = list(map(str, argv))
    err = refused(run_here("cw_rgp", argv), flag, "; try --")
    argv += err.split("; try ")[1].split()
    assert cw_rgp.parse_args(argv) and not list(tmp_path.iterdir())


def test_the_largest_w_that_fits_is_accepted():
    assert cw_rgp.parse_args(["--proj-dim", "128", "--groups", "2", "--w-size", "64"]).w_size == 64
    assert cw_rgp.parse_args(["--proj-dim", "64", "--groups", "1", "--w-size", "32"]).w_size == 32
    assert cw_rgp.parse_args(["--proj-dim", "64", "--groups", "2", "--w-size", "64", "--eps", "1e-3"]).w_size == 64


def test_a_batch_that_the_processes_cannot_share_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    refused(run_here("cw_rgp", []), "--batch-size 256", "3 processes", "try --batch-size 192")


# ---- data ----------------------------------------------------------------------------------------


def empty(root):
    root.mkdir()


def one_class(root):
    make_folder(root, train=40, test=0, classes=1)


def one_image(root):
    write_image(root / "only.png", gradient())


def all_broken(root):
    root.mkdir()
    save_broken(root)


def too_small(root):
    for i in range(40):
        write_image(root / f"{i}.png", gradient(4))


def a_file(root):
    root.write_text("not a folder")


def nothing_there(root):
    pass


@pytest.mark.parametrize("make, words", [
    (empty, ["no images"]), (one_class, ["one class"]), (one_image, ["one image"]), (a_file, ["not a folder"]),
    (nothing_there, ["not a folder"]), (all_broken, ["no images", "10 unreadable"]), (too_small, ["no images", "40 smaller than 8x8"])])
def test_folders_that_cannot_be_trained_on(make, words, tmp_path, flags):
    make(tmp_path / "images")
    refused(run_here("cw_rgp", flags("cw_rgp", "--data-dir", tmp_path / "images")), tmp_path / "images", *words)
    assert not (tmp_path / "run").exists()


def test_a_batch_larger_than_the_data_set_is_refused_and_the_advice_works(flags, tmp_path):
    err = refused(run_here("cw_rgp", flags("cw_rgp", "--batch-size", 128)), "--batch-size 128", "at most 64, the training images")
    assert not (tmp_path / "run").exists()
    flag, value = re.search(r"try (--batch-size) (\d+)", err).groups()
    assert run_here("cw_rgp", flags("cw_rgp", flag, value, "--epochs", 1, "--image-size", 8)).status == 0


def test_a_network_that_no_memory_holds_is_one_line(flags):
    refused(run_here("cw_rgp", flags("cw_rgp", "--batch-size", 2**20, "--image-size", 1024)), "GB", "--batch-size")


# ---- the run folder ------------------------------------------------------------------------------


@pytest.mark.parametrize("below", ["file/run", "file", "/proc/run", "/dev/null/run", "/dev/null"])
def test_an_output_that_cannot_be_written_is_refused_before_training(below, flags, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("kept")
    monkeypatch.setattr(common.Data, "batches", lambda *_: pytest.fail("trained"))
    out = below if below.startswith("/") else tmp_path / below
    refused(run_here("cw_rgp", flags("cw_rgp", "--out", out)), "--out", out)
    assert (tmp_path / "file").read_text() == "kept"


def test_a_read_only_disk_is_refused(flags, tmp_path, monkeypatch):
    """Root may write anywhere, so the system's answer is put in the mouth of makedirs."""
    def refuse(path, *_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
    monkeypatch.setattr(common.os, "makedirs", refuse)
    refused(run_here("cw_rgp", flags("cw_rgp")), "--out", "Read-only file system")


@pytest.fixture(scope="module")
def finished(small_folder, tmp_path_factory):
    """A finished run of one epoch, to be copied."""
    out = tmp_path_factory.mktemp("finished") / "run"
    argv = ["--batch-size", 32, "--epochs", 1, "--precision", "fp32", "--proj-dim", 64, "--w-size", 16, "--groups", 2, "--w-iter", 1,
            "--image-size", 8, "--optimizer", "adam", "--dataset", "folder", "--data-dir", small_folder]
    result = run_here("cw_rgp", [*argv, "--out", out])
    assert result.status == 0, result.err
    return SimpleNamespace(folder=out, argv=argv)


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run; run.again(...) starts the script on it."""
    folder = tmp_path / "run"
    shutil.copytree(finished.folder, folder)
    return SimpleNamespace(folder=folder, again=lambda *more: run_here("cw_rgp", [*finished.argv, "--out", str(folder), *map(str, more)]))


def test_an_out_that_holds_a_run_is_left_alone_without_resume(run):
    before = snapshot(run.folder)
    refused(run.again(), f"--out {run.folder}", "--resume")
    assert snapshot(run.folder) == before


@pytest.mark.parametrize("flag, value", [
    ("--lr", 0.5), ("--lr-bias", 0.5), ("--batch-size", 16), ("--w-size", 8), ("--groups", 1), ("--seed", 7), ("--views", 3),
    ("--optimizer", "sgd"), ("--schedule", "step"), ("--augment", "simclr"), ("--weight-decay", 0.1), ("--warmup", 3),
    ("--image-size", 16), ("--proj-dim", 128), ("--proj-hidden", 64), ("--eps", 0.1), ("--w-iter", 2),
    ("--backbone", "resnet18"), ("--precision", "bf16"), ("--stream", None)])
def test_resume_with_another_flag_names_it_with_both_values(run, flag, value):
    before = snapshot(run.folder)
    before.pop("config.json")
    err = refused(run.again("--resume", "--epochs", 2, flag, *([] if value is None else [value])), "--resume", f"{flag} was", "is now")
    assert value is None or f"is now {value}" in err
    after = snapshot(run.folder)
    assert {name: after.get(name) for name in before} == before


def test_a_refused_resume_leaves_the_record_of_the_run_as_it_was(run):
    before = json.loads((run.folder / "config.json").read_text())
    run.again("--resume", "--lr", 0.5)
    assert json.loads((run.folder / "config.json").read_text()) == before


def test_resume_with_flags_that_do_not_touch_the_numbers_goes_on(run):
    result = run.again("--resume", "--epochs", 2, "--log-every", 1, "--save-every", 1, "--num-workers", 0)
    assert result.status == 0 and "after step 2 of 4" in result.out, result.err


def test_resume_with_fewer_epochs_names_the_flag(finished, tmp_path, flags):
    argv = [*finished.argv, "--out", tmp_path / "run"]
    assert run_here("cw_rgp", [*argv, "--epochs", 2]).status == 0
    refused(run_here("cw_rgp", [*argv, "--epochs", 1, "--resume"]), "--epochs 1", "try --epochs 2")


def test_resume_on_other_images_names_the_folder(run, small_folder, tmp_path):
    shutil.copytree(small_folder, tmp_path / "images")
    next((tmp_path / "images" / "train").rglob("*.png")).rename(tmp_path / "images" / "train" / "class0" / "renamed.png")
    refused(run.again("--resume", "--data-dir", tmp_path / "images"), "--data-dir")


def test_resume_where_no_run_is_says_so_and_starts(finished, tmp_path):
    result = run_here("cw_rgp", [*finished.argv, "--out", tmp_path / "new", "--resume"])
    assert result.status == 0 and f"no checkpoint in {tmp_path / 'new'}: starting afresh" in result.out


def truncated(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def nothing(path):
    path.write_bytes(b"")


def text(path):
    path.write_text("this is not a checkpoint")


def one_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def other_dictionary(path):
    torch.save({"state_dict": {"weight": torch.zeros(3)}}, path)


def only_weights(path):
    torch.save(torch.zeros(3), path)


class Evil:
    def __reduce__(self):
        return print, ("EXECUTED",)


def code(path):
    torch.save({"format": common.CHECKPOINT_FORMAT, "args": Evil()}, path)


@pytest.mark.parametrize("damage", [truncated, nothing, text, one_bit, other_dictionary, only_weights, code])
def test_a_checkpoint_that_is_none_is_named_and_left_alone(run, damage):
    (run.folder / "previous.pt").unlink(missing_ok=True)
    damage(run.folder / "last.pt")
    before = (run.folder / "last.pt").read_bytes()
    result = run.again("--resume", "--epochs", 2)
    refused(result, run.folder / "last.pt")
    assert (run.folder / "last.pt").read_bytes() == before and "EXECUTED" not in result.out


@pytest.mark.parametrize("left", ["metrics.csv", "backbone.pt"])
def test_results_without_a_checkpoint_are_not_written_over(run, left, tmp_path):
    """Of a run whose last.pt was deleted to save room, or a user's own."""
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / left).write_bytes((run.folder / left).read_bytes())
    for flag, words in (([], "already holds a run"), (["--resume"], "no last.pt; put it back")):
        result = run.again("--out", tmp_path / "kept", *flag)
        refused(result, tmp_path / "kept")
        assert words in result.err
        assert (tmp_path / "kept" / left).read_bytes() == (run.folder / left).read_bytes()


@pytest.mark.parametrize("name", ["config.json", "epoch-0100.pt"])
def test_files_that_a_run_would_replace_make_a_folder_taken(run, name, tmp_path):
    """A config.json of another program's model, and the one checkpoint that a user kept."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / name).write_text('{"my": "precious"}')
    for flag, words in (([], f"already holds a run; try --out {tmp_path / 'model'}-2"), (["--resume"], "no last.pt; put it back")):
        result = run.again("--out", tmp_path / "model", *flag)
        refused(result, tmp_path / "model")
        assert words in result.err
    assert (tmp_path / "model" / name).read_text() == '{"my": "precious"}'


def test_a_run_that_ended_before_its_first_checkpoint_starts_again(run, tmp_path):
    """It leaves config.json and lock."""
    (tmp_path / "ended").mkdir()
    for name in ("config.json", "lock"):
        (tmp_path / "ended" / name).write_bytes((run.folder / name).read_bytes())
    assert run.again("--out", tmp_path / "ended").status == 0


@pytest.mark.parametrize("damage", [truncated, nothing, one_bit])
def test_the_checkpoint_before_a_damaged_one_is_used_and_both_are_named(run, damage):
    assert run.again("--resume", "--epochs", 2).status == 0
    assert (run.folder / "previous.pt").exists()
    damage(run.folder / "last.pt")
    result = run.again("--resume", "--epochs", 2)
    assert result.status == 0 and "after step 2 of 4" in result.out
    assert str(run.folder / "last.pt") in result.err and str(run.folder / "previous.pt") in result.err and len(result.err.splitlines()) == 1


def test_a_checkpoint_of_another_method_is_refused_by_name(run):
    checkpoint = torch.load(run.folder / "last.pt", weights_only=True)
    checkpoint["args"]["method"] = "byol"
    save_edited(checkpoint, run.folder / "last.pt")
    refused(run.again("--resume", "--epochs", 2), "byol", "cw_rgp", run.folder)


def test_two_runs_on_one_folder_at_once(flags, tmp_path):
    (tmp_path / "run").mkdir()
    hold = f"import fcntl, sys; f = open({str(tmp_path / 'run' / 'lock')!r}, 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        refused(run_here("cw_rgp", flags("cw_rgp")), f"--out {tmp_path / 'run'}", "in use")
        refused(run_here("cw_rgp", flags("cw_rgp", "--resume")), f"--out {tmp_path / 'run'}", "in use")
        other.stdin.close()
    assert list(snapshot(tmp_path / "run")) == ["lock"]


def test_the_second_of_two_runs_without_out_gets_a_folder_of_its_own(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert run_here("cw_rgp", finished.argv).status == 0
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["cw_rgp-folder-s0", "cw_rgp-folder-s0-2"]


# ---- a full disk ---------------------------------------------------------------------------------


class FullDisk:
    """A file that takes `room` bytes."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, content):
        self.file.write(content[: self.room])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.mark.parametrize("when", ["write", "fsync", "rename"])
def test_a_disk_that_fills_up_during_the_second_save_keeps_the_first(flags, tmp_path, monkeypatch, when):
    saves, last = [], str(tmp_path / "run" / "last.pt")

    def full():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def open_(path, mode="r", *rest, **more):
        file = open(path, mode, *rest, **more)
        if str(path).startswith(last) and "w" in mode:
            saves.append(path)
            if when == "write" and len(saves) == 2:
                return FullDisk(file, 1000)
        return file

    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(common, "open", open_, raising=False)
    monkeypatch.setattr(common.os, "fsync", lambda number: full() if when == "fsync" and len(saves) == 2 else fsync(number))
    monkeypatch.setattr(common.os, "replace", lambda a, b: full() if when == "rename" and len(saves) == 2 and b == last else replace(a, b))
    result = run_here("cw_rgp", flags("cw_rgp", "--image-size", 8))
    refused(result, last, "No space left on device")
    assert len(saves) == 2 and not list((tmp_path / "run").glob("*.tmp"))
    monkeypatch.undo()
    checkpoint = common.load_last(str(tmp_path / "run"))
    assert checkpoint["step"] == 2 and (when == "rename" or common.load_checkpoint(last)["step"] == 2)
    assert run_here("cw_rgp", flags("cw_rgp", "--image-size", 8, "--resume")).status == 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system: the full disk is played by a fake file alone")
def test_a_really_full_device_keeps_the_old_file(tmp_path):
    path = tmp_path / "file"
    common.write_file(str(path), b"old")
    os.symlink("/dev/full", tmp_path / "file.tmp")
    with pytest.raises(common.UserError, match="file could not be written .No space left on device.*try another"):
        common.write_file(str(path), b"new" * 1000, keep_as=str(tmp_path / "before"))
    assert path.read_bytes() == b"old" and sorted(p.name for p in tmp_path.iterdir()) == ["file"]


@pytest.mark.parametrize("name", ["config.json", "metrics.csv", "last.pt", "backbone.pt"])
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
def test_every_file_of_a_run_on_a_really_full_device_is_one_line(finished, tmp_path, name):
    (tmp_path / "run").mkdir()
    os.symlink("/dev/full", tmp_path / "run" / f"{name}.tmp")
    refused(run_here("cw_rgp", [*finished.argv, "--out", tmp_path / "run"]), tmp_path / "run" / name, "No space left")
    assert not list((tmp_path / "run").glob("*.tmp")) and not (tmp_path / "run" / name).exists()


def test_write_file_is_whole_or_not_at_all_and_keeps_the_one_before(tmp_path):
    path, kept = tmp_path / "file", tmp_path / "kept"
    for content in (b"1", b"2", b"3"):
        common.write_file(str(path), content, keep_as=str(kept))
    assert path.read_bytes() == b"3" and kept.read_bytes() == b"2" and len(list(tmp_path.iterdir())) == 2


# ---- the benchmark -------------------------------------------------------------------------------


@pytest.mark.parametrize("argv, words", [
    (["--repeats", "0"], "--repeats: '0' is not a whole number at least 1; try 10"),
    (["--busy", "-1"], "--busy: '-1' is not a whole number at least 0"),
    (["--flags", "--lr '1"], "--flags --lr '1: No closing quotation; try "),
    (["--methods", "pca"], "--methods: invalid choice: 'pca'"),
    (["--method", "simclr"], "--method"),
])
def test_the_benchmark_refuses_in_one_line(argv, words):
    assert words in refused(run_here("benchmark", argv))


def test_the_benchmark_says_for_each_method_why_it_refuses_and_fails_if_all_do():
    flags = ["--repeats", "1", "--flags", "--batch-size 4 --image-size 8 --num-workers 0 --cov 1", "--methods"]
    result = run_here("benchmark", [*flags, "simclr", "moco"])
    assert "nothing was measured; try other --flags" in refused(result) and result.out.count("refused: unrecognized arguments: --cov 1") == 2
    result = run_here("benchmark", [*flags, "simclr", "vicreg"])
    simclr, vicreg = result.out.splitlines()[2:]
    assert result.status == 0 and "refused" in simclr and vicreg.startswith("vicreg ") and vicreg.endswith(" %")


def test_the_benchmark_compares_two_ways_to_whiten():
    result = run_here("benchmark", ["--whitening", "--repeats", "1"])
    rows = [line.split() for line in result.out.splitlines()[2:]]
    assert result.status == 0 and [row[1] for row in rows] == ["eigh", "Newton-Schulz,"] * 2
    assert all(0 < float(row[-1]) < 0.01 for row in rows), rows


def test_busy_programs_end_with_the_benchmark_however_it_ends():
    """They hold its pipes, so this waits for them."""
    command = "import os, benchmark\nwith benchmark.busy_programs(2): os._exit(3)"
    assert subprocess.run([sys.executable, "-c", command], cwd=ROOT / "tests", capture_output=True, timeout=60).returncode == 3


@pytest.mark.skipif(not hasattr(os, "getsid"), reason="no sessions on Windows")
def test_a_busy_program_is_in_a_session_of_its_own(monkeypatch):
    """Linux shares the cores among sessions: beside one in our own, threads that spin while they
    wait would seem to do no harm."""
    programs = []
    start = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **more: programs.append(start(*args, **more)) or programs[-1])
    with benchmark.busy_programs(2):
        sessions = {os.getsid(program.pid) for program in programs}
    assert len(sessions) == 2 and os.getsid(0) not in sessions
