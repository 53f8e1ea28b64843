"""A run that was stopped and went on with --resume ends bit for bit as one that was never stopped.

Compared are all that a run leaves: weights, buffers, EMA networks, the queue, the optimizer's state, and every number in
metrics.csv but the two that are times. The plain tests stop all nine methods inside this process and kill real
processes of two; `-m slow` kills real processes of all nine, at many points."""

import csv
import gc
import importlib
import multiprocessing
import os
import random
import re
import signal
import sys
import tempfile
import time

import pytest
import torch

import common
from conftest import METHODS, ROOT, SMALL_OF, is_one_line_error, make_folder, run_here

pytestmark = pytest.mark.usefixtures("narrow_backbone")
gc.freeze()  # torch's own objects need not be looked through after each run: a third of a short run's time
STEPS = 4  # of an epoch; two epochs
TIMES = ("images_per_s", "seconds")
# Kept apart from config.json's own words: what two runs of the same numbers may differ in.
OWN = ("out", "resume", "save_every", "keep_every", "log_every", "num_workers")
KILLED = -signal.SIGKILL


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """64 training and 16 test images of 16x16: four steps of 16."""
    return make_folder(tmp_path_factory.mktemp("resume"), train=64, test=16, side=16)


def arguments(method, images, out, *more):
    return ["--device", "cpu", "--batch-size", "16", "--epochs", "2", "--precision", "fp32", "--log-every", "1", *SMALL_OF[method], "--proj-hidden", "32",
            "--image-size", "8", "--dataset", "folder", "--data-dir", str(images), "--out", str(out), *map(str, more)]


@pytest.fixture(scope="session")
def unstopped(images, tmp_path_factory):
    """unstopped(method, *flags) -> what a run that was never stopped leaves; each is trained once."""
    known = {}

    def get(method, *more):
        key = (method, *map(str, more))
        if key not in known:
            out = tmp_path_factory.mktemp(f"whole-{method}") / "run"
            result = run_here(method, arguments(method, images, out, *more))
            assert result.status == 0, result.err
            known[key] = left_by(out)
        return known[key]

    return get


# ---- what a run leaves ---------------------------------------------------------------------------


def flatten(value, name=""):
    """Nested dicts and lists -> {"a.b.0": leaf}."""
    if isinstance(value, (dict, list, tuple)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: leaf for k, v in items for key, leaf in flatten(v, f"{name}.{k}").items()}
    return {name: value}


def rows_of(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return [{name: cell for name, cell in row.items() if name not in TIMES} for row in csv.DictReader(file)]


def left_by(folder):
    """Every number of a run folder by name, without the times and the flags that may differ."""
    checkpoint = torch.load(folder / "last.pt", weights_only=True)
    numbers = {"backbone.pt": torch.load(folder / "backbone.pt", weights_only=True), "metrics.csv": rows_of(folder)}
    numbers.update({name: checkpoint[name] for name in ("model", "optimizer", "step", "loss_sum", "data")})
    for name, flags in (("args", checkpoint["args"]), ("given", checkpoint["args"]["given"])):
        numbers[name] = {flag: value for flag, value in flags.items() if flag not in (*OWN, "given")}
    numbers["rows"] = [{name: value for name, value in row.items() if name not in TIMES} for row in checkpoint["rows"]]
    return flatten(numbers)


def bits(value):
    return value.contiguous().view(-1).view(torch.uint8) if torch.is_tensor(value) else value


def first_difference(a, b):
    """Name of the first number in which two runs differ, in any bit; "" if there is none."""
    if a.keys() != b.keys():
        return f"only in one of them: {sorted(a.keys() ^ b.keys())[:5]}"
    for name in a:
        x, y = a[name], b[name]
        same = torch.equal(bits(x), bits(y)) and x.dtype == y.dtype if torch.is_tensor(x) else x == y
        if not same:
            return name
    return ""


def test_the_comparison_sees_a_single_bit_and_all_parts(unstopped):
    whole = unstopped("moco")
    for part in (".model.queue", ".model.target_backbone.layers.0.weight", ".model.backbone.layers.1.running_mean",
                 ".optimizer.state.0.exp_avg_sq", ".optimizer.param_groups.0.lr", ".metrics.csv.1.loss", ".backbone.pt.layers.0.weight",
                 ".step"):
        assert part in whole, part
    for name in (".model.queue", ".optimizer.state.0.exp_avg"):
        other = {**whole, name: whole[name].clone(memory_format=torch.contiguous_format)}
        other[name].view(torch.int32).view(-1)[0] ^= 1
        assert first_difference(whole, other) == name
    assert first_difference(whole, {**whole, ".metrics.csv.1.loss": "0"}) == ".metrics.csv.1.loss"
    assert ".model.target_backbone.layers.0.weight" in unstopped("byol")


# ---- stops inside this process -------------------------------------------------------------------


def stop_in_step(monkeypatch, step, how):
    """In the step with this number (from 0): a signal to this process, or an end without a last word (`crash`)."""
    watch = common.Run.watch

    def watch_and_stop(self, now, loss):
        watch(self, now, loss)
        if now == step and how == "crash":
            raise KeyboardInterrupt
        if now == step:
            os.kill(os.getpid(), how)

    monkeypatch.setattr(common.Run, "watch", watch_and_stop)
    return lambda: monkeypatch.setattr(common.Run, "watch", watch)


def run_in_pieces(monkeypatch, method, images, out, stops, *more):
    """stops: (step to stop in, how, step that the next piece goes on after). Ends the run; returns the result of the last piece."""
    after = None
    for step, how, next_after in [*stops, (None, None, None)]:
        restore = stop_in_step(monkeypatch, step, how)
        result = run_here(method, arguments(method, images, out, *more, *(["--resume"] if after is not None else [])))
        restore()
        assert result.status == (0 if how is None else 130 if how == "crash" else 128 + how), result.err
        if after:
            assert f"going on with {out} after step {after} of" in result.out
        if how not in (None, "crash"):
            assert f"stopped after step {next_after} of" in result.out and f"go on with --resume --out {out}" in result.out
        after = next_after
    return result


def precision_or_skip(name):
    if name == "bf16" and not common.has_fast_bf16(torch.device("cpu")):
        reason = "this processor emulates bf16 (no avx512_bf16, no amx_bf16 in /proc/cpuinfo): --precision auto would not choose it"
        print(reason)
        pytest.skip(reason)
    return "--precision", name


@pytest.mark.parametrize("method, precision", [(m, "fp32") for m in METHODS] + [
    pytest.param(m, "bf16", marks=() if m in ("moco", "cw_rgp") else pytest.mark.slow) for m in METHODS])
def test_stopped_several_times_ends_as_if_never_stopped(monkeypatch, images, unstopped, tmp_path, method, precision):
    """SIGTERM in mid-epoch, a crash a step after a checkpoint, and in fp32 SIGINT in the second epoch."""
    more = precision_or_skip(precision)
    whole = unstopped(method, *more)
    stops = [(2, signal.SIGTERM, 3), (4, "crash", 4)] if precision == "bf16" else [(0, signal.SIGTERM, 1), (2, "crash", 2),
                                                                                   (6, signal.SIGINT, 7)]
    run_in_pieces(monkeypatch, method, images, tmp_path / "run", stops, *more, "--save-every", "2")
    assert first_difference(left_by(tmp_path / "run"), whole) == ""


STOPS = {
    "SIGINT": [(1, signal.SIGINT, 2)],
    "SIGTERM": [(2, signal.SIGTERM, 3)],
    "SIGTERM in the first step": [(0, signal.SIGTERM, 1)],
    "SIGINT in an epoch's last step": [(STEPS - 1, signal.SIGINT, STEPS)],
    "crash after an epoch": [(STEPS, "crash", STEPS)],
    "crash before the first checkpoint": [(2, "crash", 0)],
    "signals in every step but the last": [(step, signal.SIGTERM, step + 1) for step in range(2 * STEPS - 1)],
}


@pytest.mark.parametrize("method, stops", [("byol", stops) for stops in STOPS]
                         + [pytest.param(m, stops, marks=pytest.mark.slow) for m in METHODS if m != "byol" for stops in STOPS])
def test_one_kind_of_stop(monkeypatch, images, unstopped, tmp_path, method, stops):
    run_in_pieces(monkeypatch, method, images, tmp_path / "run", STOPS[stops])
    assert first_difference(left_by(tmp_path / "run"), unstopped(method)) == ""


VARIANTS = [("wmse", "--optimizer", "lars"), ("simclr", "--optimizer", "muon"), ("simsiam", "--optimizer", "sgd", "--schedule", "step"), ("byol", "--predictor", "none"),
            ("moco", "--views", "3", "--queue-size", "96"), ("moco", "--queue-size", "50"), ("moco", "--queue-size", "7"), ("simclr", "--views", "3", "--augment", "byol", "--warmup", "3")]


@pytest.mark.parametrize("variant", [v if v[0] == "wmse" or v[-1] == "50" else pytest.param(v, marks=pytest.mark.slow) for v in VARIANTS], ids=" ".join)
def test_other_optimizers_schedules_and_states_resume_too(monkeypatch, images, unstopped, tmp_path, variant):
    method, *more = variant
    run_in_pieces(monkeypatch, method, images, tmp_path / "run", [(1, signal.SIGTERM, 2), (6, "crash", 6)], *more, "--save-every", "3")
    assert first_difference(left_by(tmp_path / "run"), unstopped(method, *more)) == ""


def test_a_signal_while_measuring_stops_after_the_epoch(monkeypatch, images, unstopped, tmp_path):
    extract = common.extract
    signals = iter([signal.SIGTERM])  # one: a second would end this process

    def interrupted(*args, **more):
        for number in signals:
            os.kill(os.getpid(), number)
        return extract(*args, **more)

    monkeypatch.setattr(common, "extract", interrupted)
    result = run_here("barlow", arguments("barlow", images, tmp_path / "run"))
    assert result.status == 143 and f"stopped after step {STEPS} of" in result.out
    monkeypatch.setattr(common, "extract", extract)
    assert run_here("barlow", arguments("barlow", images, tmp_path / "run", "--resume")).status == 0
    assert first_difference(left_by(tmp_path / "run"), unstopped("barlow")) == ""


@pytest.mark.parametrize("workers", [0, 2])
def test_the_streaming_loader_resumes_exactly(monkeypatch, images, unstopped, tmp_path, workers):
    run_in_pieces(monkeypatch, "cw_rgp", images, tmp_path / "run", [(1, signal.SIGTERM, 2), (5, "crash", 4)], "--stream", "--num-workers",
                  workers)
    whole = unstopped("cw_rgp", "--stream", "--num-workers", 0)
    assert first_difference(left_by(tmp_path / "run"), whole) == ""
    assert first_difference(whole, unstopped("cw_rgp")) != ""  # the crops are drawn elsewhere, so streaming is another run


def test_seconds_go_on_counting(monkeypatch, images, tmp_path):
    args = arguments("vicreg", images, tmp_path / "run")
    restore = stop_in_step(monkeypatch, 2, signal.SIGTERM)
    seconds = common.Clock.seconds
    monkeypatch.setattr(common.Clock, "seconds", lambda self: seconds(self) + 1000)
    run_here("vicreg", args)
    restore()
    monkeypatch.setattr(common.Clock, "seconds", seconds)
    run_here("vicreg", [*args, "--resume"])
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["seconds"] > 1000


# ---- real processes, really killed ---------------------------------------------------------------

class Started:
    """function() in a process of its own, with the interface of subprocess.Popen. A fork: it need not load torch, which takes seconds."""

    def __init__(self, function):
        self.output = [tempfile.TemporaryFile("w+") for _ in range(2)]
        self.process = multiprocessing.get_context("fork").Process(target=self.run, args=(function,))
        self.process.start()

    def run(self, function):
        for number, file in zip((1, 2), self.output):
            os.dup2(file.fileno(), number)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        try:
            function()
        except SystemExit as leave:
            os._exit(leave.code)

    def poll(self):
        return self.process.exitcode

    def send_signal(self, number):
        os.kill(self.process.pid, number)

    def kill(self):
        self.process.kill()

    def communicate(self, timeout):
        self.process.join(timeout)
        for file in self.output:
            file.seek(0)
        return [file.read() for file in self.output]

    @property
    def returncode(self):
        return self.process.exitcode


def start(method, argv, held=-1, forever=""):
    """A process that waits in step `held` (-1: none) for a signal, on a machine of any speed; `forever`: also after one."""

    def hold():
        module, watch = importlib.import_module(method), common.Run.watch

        def watch_and_wait(run, step, loss):
            watch(run, step, loss)
            if step == held:
                open(os.path.join(run.folder, "held"), "w").close()
                for _ in range(24000):
                    if forever or not run.signals.number:
                        time.sleep(0.01)

        common.Run.watch = watch_and_wait
        sys.argv = [str(ROOT / "methods" / f"{method}.py"), *argv]
        common.main(module.train, module.parse_args)

    return Started(hold)


def wait_for(process, path, limit=240):
    """Until the file is there; False if the process ended before."""
    end = time.monotonic() + limit
    while not path.exists():
        if process.poll() is not None or time.monotonic() > end:
            return path.exists()
        time.sleep(0.01)
    return True


def finish(process):
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


# name -> signal, the step (from 0) in which it comes, the step after which the run goes on (0: from the start), flags
KILLS = {
    "kill -9 in the first epoch": (signal.SIGKILL, 2, 2, ["--save-every", "1"]),
    "SIGINT in the second epoch": (signal.SIGINT, STEPS + 1, STEPS + 2, []),
    "SIGTERM in the first step": (signal.SIGTERM, 0, 1, []),
}
MORE_KILLS = {
    "kill -9 before the first checkpoint": (signal.SIGKILL, 1, 0, []),
    "kill -9 in the second epoch": (signal.SIGKILL, STEPS + 1, STEPS, []),
    "kill -9 right after an epoch": (signal.SIGKILL, STEPS, STEPS, ["--save-every", "1"]),
    "kill -9 in the last step": (signal.SIGKILL, 2 * STEPS - 1, 2 * STEPS - 2, ["--save-every", "2"]),
    "SIGINT in the first step": (signal.SIGINT, 0, 1, []),
    "SIGTERM in an epoch's last step": (signal.SIGTERM, STEPS - 1, STEPS, []),
}


def kill_and_resume(method, images, tmp_path, kills):
    """Start one process per kill, all at once; kill each in its step; go on with each here. Yields name and folder."""
    runs = {}
    for name, (_, step, _, more) in kills.items():
        out = tmp_path / name.replace(" ", "-")
        runs[name] = (out, start(method, arguments(method, images, out, *more), held=step))
    ends = {}
    for name, (number, _, _, _) in kills.items():
        out, process = runs[name]
        appeared = wait_for(process, out / "held")
        process.send_signal(number)
        ends[name] = finish(process)
        assert appeared, ends[name]
    for name, (number, _, after, _) in kills.items():
        out, (status, _, err) = runs[name][0], ends[name]
        assert not err and status == (KILLED if number == signal.SIGKILL else 128 + number), (name, status, err)
        resumed = run_here(method, arguments(method, images, out, "--resume"))
        assert resumed.status == 0 and not resumed.err, resumed.err
        assert (f"after step {after} of" if after else "starting afresh") in resumed.out, (name, resumed.out)
        yield name, out


@pytest.mark.parametrize("method", ["moco", pytest.param("byol", marks=pytest.mark.slow)])
def test_killed_processes_go_on_exactly(images, unstopped, tmp_path, method):
    for name, out in kill_and_resume(method, images, tmp_path, KILLS):
        assert first_difference(left_by(out), unstopped(method)) == "", name


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_killed_processes_of_all_methods_go_on_exactly(images, unstopped, tmp_path, method):
    for name, out in kill_and_resume(method, images, tmp_path, MORE_KILLS if method in ("moco", "byol") else {**KILLS, **MORE_KILLS}):
        assert first_difference(left_by(out), unstopped(method)) == "", name


@pytest.mark.slow
@pytest.mark.parametrize("method", ["moco", "cw_rgp"])
def test_kill_9_at_random_moments_until_it_is_done(images, unstopped, tmp_path, method):
    """A checkpoint after every step, and a kill at any moment: also while one is being written."""
    out, kills, rng = tmp_path / "run", 0, random.Random(0)
    for attempt in range(60):
        written = (out / "last.pt").stat().st_mtime_ns if (out / "last.pt").exists() else 0
        process = start(method, arguments(method, images, out, "--save-every", "1", *(["--resume"] if attempt else [])))
        while process.poll() is None and not ((out / "last.pt").exists() and (out / "last.pt").stat().st_mtime_ns > written):
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.15))
        process.kill()
        status, _, err = finish(process)
        assert not err, err
        if status == 0:
            break
        kills += 1
    print(f"{method}: killed {kills} times")
    assert status == 0 and kills > 0
    assert first_difference(left_by(out), unstopped(method)) == ""
    assert not list(out.glob("*.tmp"))


@pytest.mark.slow
def test_a_second_ctrl_c_ends_at_once(images, tmp_path):
    process = start("moco", arguments("moco", images, tmp_path / "run"), held=0, forever="forever")
    assert wait_for(process, tmp_path / "run" / "held")
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    assert finish(process)[0] == 130


# ---- other flags ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def half_done(images, tmp_path_factory):
    """half_done(method) -> folder of a run stopped after step 5 of 8; each test goes on with a copy of its own."""
    known = {}

    def get(method):
        if method not in known:
            known[method] = tmp_path_factory.mktemp(f"half-{method}") / "run"
            with pytest.MonkeyPatch.context() as patch:
                stop_in_step(patch, 4, signal.SIGTERM)
                assert run_here(method, arguments(method, images, known[method])).status == 143
        return known[method]

    return get


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


OTHER = [("moco", "--lr", "0.01"), ("moco", "--batch-size", "32"), ("moco", "--queue-size", "128"), ("moco", "--momentum", "0.5"),
         ("moco", "--temperature", "0.3"), ("moco", "--seed", "1"), ("shuffled_dbn", "--no-shuffle"), ("simsiam", "--no-stop-gradient"),
         ("moco", "--bn-splits", "1"),
         ("moco", "--weight-decay", "0.1"), ("moco", "--augment", "byol"), ("moco", "--schedule", "constant"), ("moco", "--warmup", "2"),
         ("moco", "--optimizer", "sgd"), ("moco", "--lr-bias", "0.5"), ("moco", "--views", "3"), ("moco", "--proj-dim", "16"),
         ("moco", "--proj-layers", "2"), ("moco", "--eval-every", "2"), ("moco", "--image-size", "16"), ("moco", "--backbone", "resnet18"),
         ("moco", "--precision", "bf16"), ("cw_rgp", "--groups", "4"), ("cw_rgp", "--w-size", "8"), ("cw_rgp", "--eps", "0.1"),
         ("cw_rgp", "--w-iter", "2")]


@pytest.mark.parametrize("method, flag, value",
                         [pytest.param(*(*case, None)[:3], marks=pytest.mark.slow if i % 2 else ()) for i, case in enumerate(OTHER)])
def test_another_hyper_parameter_is_refused_by_name(half_done, images, method, flag, value):
    out = half_done(method)
    before = content(out)
    result = run_here(method, arguments(method, images, out, "--resume", flag, *([value] if value else [])))
    assert is_one_line_error(result) and f"--resume: {flag} was " in result.err, result.err
    assert re.search(f"try ({flag} |it without {flag}, )", result.err) and "or another --out" in result.err
    assert {name: data for name, data in content(out).items() if name.endswith(".pt")} == {n: d for n,
                                                                                           d in before.items() if n.endswith(".pt")}


@pytest.mark.parametrize("method, more, remedy",
                         [("simsiam", ["--no-stop-gradient"], "it without --no-stop-gradient"), ("moco", ["--lr", "0.01"], "--lr 0.003"),
                          ("simclr", ["--warmup", "1"], "it without --warmup")])
def test_the_proposed_remedy_works(half_done, images, tmp_path, method, more, remedy):
    """These flags were not given at first."""
    out = copied(half_done(method), tmp_path / "run")
    assert f"; try {remedy}, or" in run_here(method, arguments(method, images, out, "--resume", *more)).err
    words = remedy.split() if remedy.startswith("--") else []
    assert run_here(method, arguments(method, images, out, "--resume", *words)).status == 0


def test_a_zero_is_a_value_too(images, tmp_path):
    """--cov 0 was given: to leave the flag out would be its default of 1, and refused again."""
    args = arguments("vicreg", images, tmp_path / "run", "--epochs", "1")
    assert run_here("vicreg", [*args, "--cov", "0"]).status == 0
    assert "--cov was 0.0 and is now 1.0; try --cov 0.0, or another --out" in run_here("vicreg", [*args, "--resume"]).err


def copied(folder, to):
    to.mkdir()
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


def test_a_refused_resume_leaves_the_folder_as_it_was(half_done, images, tmp_path):
    out = copied(half_done("moco"), tmp_path / "run")
    before = content(out)
    assert is_one_line_error(run_here("moco", arguments("moco", images, out, "--resume", "--lr", "0.01")))
    assert content(out) == before


def test_another_method_in_the_same_folder_is_refused(half_done, images):
    result = run_here("simclr", arguments("simclr", images, half_done("moco"), "--resume"))
    assert is_one_line_error(result) and "is a run of moco, not of simclr; try another --out" in result.err


@pytest.mark.parametrize("more", [["--save-every", "1"], ["--keep-every", "1"], ["--log-every", "3"], ["--num-workers", "0"],
                                  ["--device", "cpu" if torch.cuda.is_available() else "auto"]], ids=" ".join)
def test_flags_that_do_not_touch_the_numbers_may_differ(half_done, images, unstopped, tmp_path, more):
    out = copied(half_done("cw_rgp"), tmp_path / "run")
    assert run_here("cw_rgp", arguments("cw_rgp", images, out, "--resume", *more)).status == 0
    ignored = {".args.device", ".given.device"}
    ours, whole = ({k: v for k, v in numbers.items() if k not in ignored} for numbers in (left_by(out), unstopped("cw_rgp")))
    assert first_difference(ours, whole) == ""


def test_a_torn_metrics_csv_is_written_again_at_once(images, unstopped, tmp_path):
    """Also by a run that has nothing left to train."""
    out = tmp_path / "run"
    assert run_here("moco", arguments("moco", images, out)).status == 0
    whole = (out / "metrics.csv").read_bytes()
    (out / "metrics.csv").write_bytes(whole[: len(whole) // 2])
    assert run_here("moco", arguments("moco", images, out, "--resume")).status == 0
    assert (out / "metrics.csv").read_bytes() == whole


@pytest.mark.parametrize("every, kept", [(0, []), (1, [1, 2, 3]), (2, [2]), (3, [3]), (4, [])])
def test_keep_every_keeps_the_checkpoints_of_these_epochs(images, tmp_path, every, kept):
    argv = arguments("simclr", images, tmp_path / "run", "--epochs", 3, "--keep-every", every, "--schedule", "constant")
    result = run_here("simclr", argv)
    assert result.status == 0, result.err
    found = sorted(path.name for path in (tmp_path / "run").glob("epoch-*"))
    assert found == [f"epoch-{epoch:04d}.pt" for epoch in kept]
    for epoch in kept:
        checkpoint = common.load_checkpoint(str(tmp_path / "run" / f"epoch-{epoch:04d}.pt"))
        assert checkpoint["step"] == epoch * STEPS and len(checkpoint["rows"]) == epoch
    if 3 in kept:
        assert (tmp_path / "run" / "epoch-0003.pt").read_bytes() == (tmp_path / "run" / "last.pt").read_bytes()
    if kept == [2]:
        result = run_here("eval", [tmp_path / "run" / "epoch-0002.pt", "--features", "H", "--probe-epochs", 0, "--device", "cpu"])
        assert result.status == 0 and f"step {2 * STEPS}" in result.out, result.err


def test_streaming_cannot_be_switched_on_in_mid_run(half_done, images):
    """Streamed crops are drawn otherwise than those in memory."""
    result = run_here("cw_rgp", arguments("cw_rgp", images, half_done("cw_rgp"), "--resume", "--stream", "--num-workers", "0"))
    assert is_one_line_error(result) and "--stream was False and is now True; try it without --stream" in result.err


def test_the_images_may_have_moved(half_done, images, unstopped, tmp_path):
    out, moved = copied(half_done("moco"), tmp_path / "run"), tmp_path / "moved"
    moved.symlink_to(images)
    assert run_here("moco", arguments("moco", moved, out, "--resume")).status == 0
    ours, whole = ({k: v for k, v in numbers.items() if not k.endswith(".data_dir")} for numbers in (left_by(out), unstopped("moco")))
    assert first_difference(ours, whole) == ""


def test_more_epochs_are_allowed_and_said(half_done, images, tmp_path):
    out = copied(half_done("moco"), tmp_path / "run")
    result = run_here("moco", arguments("moco", images, out, "--resume", "--epochs", "3"))
    assert result.status == 0 and f"after step 5 of {3 * STEPS}; 2 epochs before, 3 now, so the schedule is different" in result.out
    assert [row["epoch"] for row in rows_of(out)] == ["1", "2", "3"]


def test_more_epochs_after_the_end_are_trained(images, tmp_path, unstopped):
    """With a schedule that does not look at the end, one epoch and one more are two."""
    flags = ("--schedule", "constant", "--warmup", "0")
    args = arguments("simclr", images, tmp_path / "run", *flags)
    assert run_here("simclr", [*args, "--epochs", "1"]).status == 0
    assert run_here("simclr", [*args, "--epochs", "2", "--resume"]).status == 0
    assert first_difference(left_by(tmp_path / "run"), unstopped("simclr", *flags)) == ""


def test_fewer_epochs_than_trained_are_refused(half_done, images):
    result = run_here("moco", arguments("moco", images, half_done("moco"), "--resume", "--epochs", "1"))
    assert is_one_line_error(result) and "--epochs 1 is fewer than already trained; try --epochs 2" in result.err


def test_resume_without_a_checkpoint_starts_afresh_and_says_so(images, unstopped, tmp_path):
    result = run_here("moco", arguments("moco", images, tmp_path / "run", "--resume"))
    assert result.status == 0 and f"no checkpoint in {tmp_path / 'run'}: starting afresh" in result.out
    assert first_difference(left_by(tmp_path / "run"), unstopped("moco")) == ""


def test_resume_of_a_finished_run_is_harmless(images, tmp_path):
    args = arguments("byol", images, tmp_path / "run")
    first = run_here("byol", args)
    before, numbers = content(tmp_path / "run"), left_by(tmp_path / "run")
    again = run_here("byol", [*args, "--resume"])
    after = content(tmp_path / "run")
    assert again.status == 0 and f"after step {2 * STEPS} of {2 * STEPS}" in again.out
    for name in ("last.pt", "previous.pt", "metrics.csv", "backbone.pt"):
        assert before[name] == after[name], name
    assert first_difference(left_by(tmp_path / "run"), numbers) == ""
    scores = [line for line in first.out.splitlines() if line.startswith("kNN ")]
    assert scores and scores[0] in again.out


# ---- the folder when --out is not given ----------------------------------------------------------


def default_folder(images, *more):
    args = arguments("moco", images, "x", *more)
    where = args.index("--out")
    return args[:where] + args[where + 2:]


def test_default_folders_are_numbered_and_resume_takes_the_newest(monkeypatch, images, tmp_path):
    monkeypatch.chdir(tmp_path)
    runs = tmp_path / "runs"
    stop_in_step(monkeypatch, 2, signal.SIGTERM)
    for _ in range(3):
        assert run_here("moco", default_folder(images)).status == 143
    assert sorted(path.name for path in runs.iterdir()) == ["moco-folder-s0", "moco-folder-s0-2", "moco-folder-s0-3"]
    older = {n: content(runs / n)["last.pt"] for n in ("moco-folder-s0", "moco-folder-s0-2")}
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    result = run_here("moco", default_folder(images, "--resume"))
    assert result.status == 0 and f"going on with {os.path.join('runs', 'moco-folder-s0-3')} after step 3" in result.out
    assert {n: content(runs / n)["last.pt"] for n in older} == older
    assert not (runs / "moco-folder-s0" / "metrics.csv").exists() and (runs / "moco-folder-s0-3" / "metrics.csv").exists()


def test_a_given_folder_that_is_taken_is_refused_with_two_ways_out(half_done, images):
    out = half_done("moco")
    before = content(out)
    result = run_here("moco", arguments("moco", images, out))
    assert is_one_line_error(result) and f"add --resume to go on with it, or try --out {out}-2" in result.err
    assert content(out) == before
