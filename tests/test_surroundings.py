"""What surrounds a run: notebooks and threads, clusters and their variables, and streams that take no words.

Real processes, signals, FIFOs and full devices; where this machine cannot make a case, the lowest call is replaced, and it is said."""

import contextlib
import csv
import dataclasses
import errno
import fcntl
import gc
import io
import json
import multiprocessing.process
import os
import re
import shutil
import shlex
import signal
import socket
import stat
import subprocess
import sys
import threading
import time

import pytest
import torch

import common
from conftest import ROOT, is_one_line_error, run_here, run_script
from test_resume import arguments, first_difference, images, left_by, start, unstopped, wait_for  # noqa: F401

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU]
SLOW = pytest.mark.slow
SCRIPT = ROOT / "methods" / "moco.py"


def handlers():
    return [signal.getsignal(number) for number in SIGNALS]


def args_of(images, out, **more):  # noqa: F811
    """Args as a notebook makes them."""
    import moco

    flags = dict(device="cpu", batch_size=16, epochs=2, precision="fp32", log_every=1, queue_size=64, bn_splits=2, proj_hidden=32, warmup=1,
                 image_size=8, dataset="folder", data_dir=str(images), out=str(out))
    return moco.Args(**{**flags, **more})


def train(*args, **more):
    import moco

    return moco.train(args_of(*args, **more))


@contextlib.contextmanager
def float64():
    torch.set_default_dtype(torch.float64)
    try:
        yield
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def in_step(monkeypatch, step, act):
    """Call act() in the step of this number, from 0."""
    watch = common.Run.watch

    def watch_and_act(run, now, loss):
        watch(run, now, loss)
        if now == step:
            act()

    monkeypatch.setattr(common.Run, "watch", watch_and_act)


def rows(out):
    with open(out / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def lock_is_free(out):
    """True if another process could lock the folder (locks are a process's, so it has to be another)."""
    code = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    return subprocess.run([sys.executable, "-c", code, out / "lock"], capture_output=True).returncode == 0


# ---- notebooks and threads -----------------------------------------------------------------------


def losses(out):
    return [(row["loss"], row["std_sqrt_d"], row["knn"]) for row in rows(out)]


@contextlib.contextmanager
def elsewhere():
    """New tensors go to another device, as after torch.set_default_device("cuda")."""
    torch.set_default_device("meta")
    try:
        yield
        assert torch.get_default_device().type == "meta"
    finally:
        torch.set_default_device(None)


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


@pytest.fixture(scope="module")
def plain(images, tmp_path_factory):  # noqa: F811
    """A run with nothing around it, and what eval.py says of it, under the name of `run`."""
    out = tmp_path_factory.mktemp("plain") / "run"
    train(images, out)
    said = run_here("eval", [out, "--device", "cpu", "--precision", "fp32", "--probe-epochs", "2"]).out
    return losses(out), said.replace(str(out), "run")


@contextlib.contextmanager
def coarse():
    """Products of fp32 numbers in bf16, where the processor can."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode, float64, elsewhere, autocast, coarse])
def test_what_a_notebook_has_set_around_a_run_changes_no_number(images, plain, tmp_path, around):  # noqa: F811
    with around():
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype()
        numbers = torch.default_generator.get_state()
        train(images, tmp_path / "run")
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype()) == before
        assert torch.equal(torch.default_generator.get_state(), numbers)  # a notebook's draws go on
        figures = run_here("eval", [tmp_path / "run", "--device", "cpu", "--precision", "fp32", "--probe-epochs", "2"])
    assert figures.status == 0, figures.err
    assert (losses(tmp_path / "run"), figures.out.replace(str(tmp_path / "run"), "run")) == plain


@pytest.mark.parametrize("enabled", [True, False])
def test_autocast_around_a_run_in_bf16_keeps_no_old_weights(images, tmp_path, enabled):  # noqa: F811
    """torch keeps bf16 copies of the weights until the outermost autocast ends, which here is the notebook's."""
    bf16 = dict(precision="bf16", epochs=2, lr=0.05)
    train(images, tmp_path / "plain", **bf16)
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        train(images, tmp_path / "run", **bf16)
        assert torch.is_autocast_enabled("cpu") == enabled and torch.is_autocast_cache_enabled()
    assert losses(tmp_path / "run") == losses(tmp_path / "plain") and len(set(losses(tmp_path / "run"))) == 2


def test_a_fifo_in_the_place_of_the_lock_does_not_hang(images, tmp_path):  # noqa: F811
    (tmp_path / "run").mkdir()
    os.mkfifo(tmp_path / "run" / "lock")
    result = run_here("moco", arguments("moco", images, tmp_path / "run", "--epochs", 1))
    assert result.status == 0 or is_one_line_error(result), result.err


def test_the_folder_of_a_returned_run_is_found_from_anywhere(monkeypatch, images, tmp_path):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    run = train(images, "here")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert run.folder == str(tmp_path / "here") and os.path.isfile(os.path.join(run.folder, "last.pt"))


def test_train_returns_the_run_and_gives_all_back(images, tmp_path):  # noqa: F811
    before = handlers()
    run = train(images, tmp_path / "run")
    assert handlers() == before and lock_is_free(tmp_path / "run")
    assert run.folder == str(tmp_path / "run") and run.args.epochs == 2 and run.args.precision == "fp32"
    assert set(run.scores) == {"kNN", "raw pixels", "untrained backbone"} and all(0 <= x <= 1 for x in run.scores.values())
    saved = common.load_checkpoint(str(tmp_path / "run" / "last.pt"))["model"]
    assert all(torch.equal(value, saved[name]) for name, value in run.model.state_dict().items())


def test_a_trained_model_keeps_no_hooks(images, tmp_path):  # noqa: F811
    """They would keep the outputs of every later forward pass in training mode: a leak."""
    run = train(images, tmp_path / "run", epochs=1)
    run.model.train()
    run.model([torch.randn(16, 3, 8, 8) for _ in range(2)])
    assert not any(run.finite.outputs.values()) and not any(m._forward_hooks for m in run.model.modules())


def a_bug():
    raise ZeroDivisionError


def a_mistake():
    raise common.UserError("no; try another")


def ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


def crash():
    raise KeyboardInterrupt


@pytest.mark.parametrize("end, error", [(a_bug, ZeroDivisionError), (a_mistake, common.UserError), (ctrl_c, KeyboardInterrupt),
                                        (crash, KeyboardInterrupt), (lambda: os.kill(os.getpid(), signal.SIGTERM), SystemExit)])
def test_however_it_ends_handlers_and_lock_are_given_back(monkeypatch, images, unstopped, tmp_path, end, error):  # noqa: F811
    """And a second train() in this process goes on, to the same numbers."""
    before = handlers()
    with monkeypatch.context() as patch:
        in_step(patch, 2, end)
        with pytest.raises(error) as raised:
            train(images, tmp_path / "run", save_every=3)
    kept = raised.value  # as a notebook does: sys.last_exc holds the frames of the run
    assert handlers() == before and lock_is_free(tmp_path / "run") and kept
    saved = (tmp_path / "run" / "last.pt").exists()
    assert saved == (end is ctrl_c or error is SystemExit)
    assert error is not SystemExit or kept.code == 143
    run = train(images, tmp_path / "run", resume=True)
    assert handlers() == before and run.scores
    assert first_difference(left_by(tmp_path / "run"), unstopped("moco")) == ""


def test_an_error_before_there_is_a_run_gives_back_too(images, tmp_path):  # noqa: F811
    before = handlers()
    with pytest.raises(common.UserError, match="at most 64, the training images"):
        train(images, tmp_path / "run", batch_size=4096, queue_size=8192)
    (tmp_path / "file").write_text("")
    with pytest.raises(common.UserError, match="cannot write there"):
        train(images, tmp_path / "file")
    assert handlers() == before and not common.ENDINGS


def test_a_handler_of_the_callers_own_comes_back(monkeypatch, images, tmp_path):  # noqa: F811
    def mine(*_):
        pass

    before = signal.signal(signal.SIGUSR1, mine)
    try:
        in_step(monkeypatch, 1, lambda: os.kill(os.getpid(), signal.SIGUSR1))
        with pytest.raises(SystemExit):
            train(images, tmp_path / "run")
        assert signal.getsignal(signal.SIGUSR1) is mine
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_handler_that_is_not_pythons_is_left_alone(monkeypatch, images, tmp_path):  # noqa: F811
    """getsignal says None of a handler that C code has set (simulated): it could not be given back."""
    get, set_ = signal.getsignal, []
    real = signal.signal
    monkeypatch.setattr(signal, "getsignal", lambda n: None if n == signal.SIGUSR2 else get(n))
    monkeypatch.setattr(signal, "signal", lambda n, handler: (set_.append(n), real(n, handler))[1])
    train(images, tmp_path / "run", epochs=1)
    assert signal.SIGTERM in set_ and signal.SIGUSR2 not in set_


def test_outside_the_main_thread_it_trains(images, unstopped, tmp_path):  # noqa: F811
    before, runs = handlers(), []
    thread = threading.Thread(target=lambda: runs.append(train(images, tmp_path / "run")))
    thread.start()
    thread.join()
    assert handlers() == before and runs and runs[0].scores and lock_is_free(tmp_path / "run")
    assert first_difference(left_by(tmp_path / "run"), unstopped("moco")) == ""


def test_two_threads_train_one_after_the_other_to_the_numbers_of_one(images, unstopped, tmp_path):  # noqa: F811
    """Torch's random generator is the process's: at the same time, each would take draws from the other."""
    threads = [threading.Thread(target=train, args=(images, tmp_path / name)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in "ab":
        assert first_difference(left_by(tmp_path / name), unstopped("moco")) == ""


def test_the_configuration_is_of_the_flags_not_of_the_notebook(monkeypatch, images, tmp_path):  # noqa: F811
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel-123.json"])
    train(images, tmp_path / "a True run; it's", epochs=1)
    text = (tmp_path / "a True run; it's" / "config.json").read_text()
    config = json.loads(text)
    assert "ipykernel" not in text and config["command"].startswith("moco.py ") and "--epochs 1 " in config["command"]
    assert config["given"]["epochs"] == 1 and config["given"]["lr"] == config["lr"]
    import moco

    words = shlex.split(config["command"])[1:]  # as a shell reads it
    again = common.dataclasses.asdict(moco.parse_args(words))
    assert again == config["given"]  # the command gives the same run


@pytest.mark.slow
def test_an_interrupted_script_says_it_once_and_ends_with_130(images, tmp_path):  # noqa: F811
    process = start("moco", arguments("moco", images, tmp_path / "run"), held=2)
    assert wait_for(process, tmp_path / "run" / "held")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130 and not err and out.count("stopped after step 3 of") == 1


def test_a_second_ctrl_c_is_a_keyboard_interrupt_again(monkeypatch, images, tmp_path):  # noqa: F811
    """Not the end of the kernel."""
    in_step(monkeypatch, 1, lambda: [(ctrl_c(), time.sleep(0.1)) for _ in range(2)])  # two, not one that came twice
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            train(images, tmp_path / "run")
    finally:
        signal.signal(signal.SIGINT, before)
    assert not (tmp_path / "run" / "last.pt").exists()


# ---- clusters: signals ---------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGUSR1, pytest.param(signal.SIGUSR2, marks=SLOW), pytest.param(signal.SIGHUP, marks=SLOW)])
def test_the_signals_of_clusters_save_and_end(images, unstopped, tmp_path, number):  # noqa: F811
    out = tmp_path / "run"
    process = start("moco", arguments("moco", images, out), held=2)
    assert wait_for(process, out / "held")
    process.send_signal(number)
    said, err = process.communicate(timeout=120)
    assert process.returncode == 128 + number and not err and "stopped after step 3 of" in said
    assert run_here("moco", arguments("moco", images, out, "--resume")).status == 0
    assert first_difference(left_by(out), unstopped("moco")) == ""


@SLOW
def test_under_nohup_a_hangup_is_ignored(images, unstopped, tmp_path):  # noqa: F811
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # inherited
    try:
        process = start("moco", arguments("moco", images, tmp_path / "run"), held=2)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert wait_for(process, tmp_path / "run" / "held")
    process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)  # HELD waits for a signal
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 143 and "stopped after step 3" in out


def test_two_signals_of_different_kinds_still_save(monkeypatch, images, tmp_path):  # noqa: F811
    """systemd sends SIGTERM and SIGHUP together."""
    in_step(monkeypatch, 2, lambda: (os.kill(os.getpid(), signal.SIGTERM), os.kill(os.getpid(), signal.SIGHUP)))
    assert run_here("moco", arguments("moco", images, tmp_path / "run")).status in (129, 143)
    assert common.load_checkpoint(str(tmp_path / "run" / "last.pt"))["step"] == 3


@pytest.mark.slow
def test_a_signal_to_all_processes_leaves_the_loaders_alive_until_it_is_saved(images, unstopped, tmp_path):  # noqa: F811
    """Slurm signals every process of a step, and a terminal that closes its whole group."""
    out = tmp_path / "run"
    command = [sys.executable, SCRIPT, *arguments("moco", images, out, "--stream", "--epochs", "500")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert "epoch" in process.stdout.readline()
    os.killpg(process.pid, signal.SIGUSR1)
    said, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGUSR1 and not err and "stopped after step" in said


@pytest.mark.slow
def test_a_signal_to_one_of_torchruns_processes_stops_all(images, tmp_path):  # noqa: F811
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", SCRIPT,
               *arguments("moco", images, tmp_path / "run", "--epochs", "100000")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert "epoch" in run.stdout.readline()
        children = subprocess.run(["ps", "--ppid", str(run.pid), "-o", "pid="], capture_output=True, text=True).stdout.split()
        os.kill(int(children[-1]), signal.SIGUSR1)
        said, _ = run.communicate(timeout=120)
    assert "stopped after step" in said
    assert common.load_checkpoint(str(tmp_path / "run" / "last.pt"))["step"] == int(said.split("stopped after step ")[1].split()[0])


# ---- clusters: variables -------------------------------------------------------------------------


@pytest.mark.parametrize("environment", [{"WORLD_SIZE": "1"}, {"RANK": "0"}, {"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "nowhere.invalid"},
                                         {"MASTER_ADDR": ""}, {"LOCAL_WORLD_SIZE": ""}, {"LOCAL_RANK": "3"}, {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"},
                                         {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}], ids=str)  # the last but one: sbatch without srun
def test_variables_of_one_process_simply_work(monkeypatch, images, unstopped, tmp_path, environment):  # noqa: F811
    whole = unstopped("moco")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    result = run_here("moco", arguments("moco", images, tmp_path / "run"))
    assert result.status == 0 and not result.err
    assert first_difference(left_by(tmp_path / "run"), whole) == ""


@pytest.mark.slow
def test_one_process_needs_no_variables_of_others_as_a_script(images, tmp_path):  # noqa: F811
    result = run_script(SCRIPT, *arguments("moco", images, tmp_path / "run", "--epochs", "1"), WORLD_SIZE="1")
    assert result.status == 0 and not result.err and "kNN" in result.out


@pytest.mark.parametrize("environment", [
    {"WORLD_SIZE": ""}, {"WORLD_SIZE": "two"}, {"WORLD_SIZE": "0"}, {"WORLD_SIZE": "-1"}, {"WORLD_SIZE": "2.0"}, {"WORLD_SIZE": "²"}, {"RANK": ""},
    {"RANK": "1"}, {"WORLD_SIZE": "2", "RANK": "2"}, {"WORLD_SIZE": "2"}, {"WORLD_SIZE": "2", "RANK": "0"},
    {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "", "MASTER_PORT": "29500"},
    {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "port"},
    {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"}, {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "7"}], ids=str)
def test_variables_that_torchrun_did_not_set_are_one_line(monkeypatch, images, tmp_path, environment):  # noqa: F811
    monkeypatch.setattr(time, "sleep", lambda _: None)  # ranks above 0 wait, so that rank 0 speaks first
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    result = run_here("moco", arguments("moco", images, tmp_path / "run"))
    assert is_one_line_error(result) and "torchrun --nproc_per_node" in result.err, result.err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize("address", ["127.0.0.1", "nowhere.invalid"])
def test_a_master_that_does_not_answer_is_one_line_after_a_bounded_wait(images, tmp_path, rank, address):  # noqa: F811
    """Without torch's own pages of C++ frames."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    result = run_script(SCRIPT, *arguments("moco", images, tmp_path / "run"), timeout=250, WORLD_SIZE="2", RANK=rank, MASTER_ADDR=address,
                        MASTER_PORT=str(port))
    assert is_one_line_error(result) and "torchrun --nproc_per_node" in result.err, result.err[-3000:]


def test_eval_in_a_stale_environment_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = run_here("eval", [tmp_path])
    assert is_one_line_error(result) and "torchrun" in result.err


# ---- clusters: folders and locks -----------------------------------------------------------------


def without_out(images, *more):  # noqa: F811
    args = arguments("moco", images, "x", *more)
    where = args.index("--out")
    return args[:where] + args[where + 2:]


def test_of_several_runs_started_together_each_takes_a_folder_of_its_own(images, unstopped, tmp_path):  # noqa: F811
    command = [sys.executable, SCRIPT, *without_out(images)]
    runs = [subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    ended = [(run.communicate(timeout=300), run.returncode) for run in runs]
    assert [status for _, status in ended] == [0, 0, 0], ended
    names = ["moco-folder-s0", "moco-folder-s0-2", "moco-folder-s0-3"]
    assert sorted(os.listdir(tmp_path / "runs")) == names
    ours, whole = left_by(tmp_path / "runs" / names[1]), unstopped("moco")
    assert first_difference({k: v for k, v in ours.items() if "given" not in k}, {k: v for k, v in whole.items() if "given" not in k}) == ""


@pytest.mark.slow
def test_folders_are_chosen_by_the_lock_not_by_a_look(monkeypatch, tmp_path, images):  # noqa: F811
    """Processes that choose at the same moment, many times: no two ever have one folder, and none is refused."""
    code = ("import sys; sys.path[:0] = [{!r}, {!r}]; import common, moco; args = moco.parse_args(sys.argv[1:]); "
            "print('ready', flush=True); sys.stdin.readline(); folder, lock = common.open_folder(args); print(folder, flush=True); sys.stdin.readline()")
    command = [sys.executable, "-c", code.format(str(ROOT), str(ROOT / "methods")), *without_out(images)]
    runs = [subprocess.Popen(command, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(5)]
    for run in runs:
        assert run.stdout.readline() == "ready\n"
    for run in runs:
        run.stdin.write("\n")
        run.stdin.flush()
    folders = [run.stdout.readline().strip() for run in runs]
    for run in runs:
        run.communicate("\n", timeout=60)
    assert sorted(folders) == sorted(os.path.join("runs", "moco-folder-s0" + end) for end in ("", "-2", "-3", "-4", "-5"))


def test_resume_takes_the_newest_started_run_also_without_a_checkpoint(monkeypatch, images, tmp_path):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    assert run_here("moco", without_out(images, "--epochs", "1")).status == 0
    with monkeypatch.context() as patch:
        in_step(patch, 1, crash)
        assert run_here("moco", without_out(images)).status == 130
    assert sorted(path.name for path in (tmp_path / "runs" / "moco-folder-s0-2").iterdir()) == ["config.json", "lock"]
    older = (tmp_path / "runs" / "moco-folder-s0" / "last.pt").read_bytes()
    result = run_here("moco", without_out(images, "--resume"))
    assert result.status == 0 and f"no checkpoint in {os.path.join('runs', 'moco-folder-s0-2')}: starting afresh" in result.out
    assert len(rows(tmp_path / "runs" / "moco-folder-s0-2")) == 2
    assert (tmp_path / "runs" / "moco-folder-s0" / "last.pt").read_bytes() == older


def test_a_new_run_never_takes_a_number_before_one_that_is_there(monkeypatch, images, tmp_path):  # noqa: F811
    """Else --resume would not find the newest by its number: -2 was removed, so the next is -4."""
    monkeypatch.chdir(tmp_path)
    for name in ("moco-folder-s0", "moco-folder-s0-3"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "last.pt").write_bytes(b"")
    assert run_here("moco", without_out(images, "--epochs", "1")).status == 0
    assert (tmp_path / "runs" / "moco-folder-s0-4" / "last.pt").exists() and not (tmp_path / "runs" / "moco-folder-s0-2").exists()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_without_locks_is_a_warning(monkeypatch, images, unstopped, tmp_path, number):  # noqa: F811
    """Simulated at the system call: this machine has no such file system."""

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    result = run_here("moco", arguments("moco", images, tmp_path / "run"))
    assert result.status == 0 and len(result.err.splitlines()) == 1 and f"cannot be locked ({os.strerror(number)})" in result.err
    assert first_difference(left_by(tmp_path / "run"), unstopped("moco")) == ""


@pytest.mark.parametrize("number", [errno.EACCES, errno.EAGAIN])
def test_a_lock_that_another_holds_is_no_missing_lock(monkeypatch, images, tmp_path, number):  # noqa: F811
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    result = run_here("moco", arguments("moco", images, tmp_path / "run"))
    assert is_one_line_error(result) and "in use by another run" in result.err


# ---- loader processes ----------------------------------------------------------------------------


def started_processes(monkeypatch):
    started = []
    begin = multiprocessing.process.BaseProcess.start
    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", lambda process: (started.append(process), begin(process))[1])
    return started


def test_loader_processes_stay_over_epochs_and_end_with_the_run(monkeypatch, images, tmp_path):  # noqa: F811
    """Two for the training images and two for the test images, whatever the epochs, and none is left."""
    started = started_processes(monkeypatch)
    run = train(images, tmp_path / "run", stream=True, epochs=4, num_workers=2)
    assert len(started) == 4 and not any(process.is_alive() for process in started), len(started)
    assert run.scores


@pytest.mark.parametrize("end", [ctrl_c, a_bug, crash])
def test_loader_processes_end_with_a_run_that_fails(monkeypatch, images, tmp_path, end):  # noqa: F811
    started = started_processes(monkeypatch)
    in_step(monkeypatch, 5, end)
    with pytest.raises((KeyboardInterrupt, ZeroDivisionError)) as raised:
        train(images, tmp_path / "run", stream=True, num_workers=2)
    assert started and raised.value and not any(process.is_alive() for process in started)


def test_loader_processes_end_with_a_run_whose_file_vanished(monkeypatch, small_folder, tmp_path):
    """Although the traceback keeps torch's iterator alive: torch itself ends them with it, 20 seconds later."""
    started = started_processes(monkeypatch)
    shutil.copytree(small_folder, tmp_path / "images")
    in_step(monkeypatch, 3, next((tmp_path / "images" / "train").rglob("0007.png")).unlink)
    with pytest.raises(common.UserError, match="0007.png vanished") as raised:
        train(tmp_path / "images", tmp_path / "run", stream=True, num_workers=2)
    assert started and raised.value and not any(process.is_alive() for process in started)


@pytest.mark.filterwarnings("ignore")  # of the iterator that torch left half-made
def test_processes_of_a_loader_that_could_not_start_all_end(monkeypatch, images, tmp_path):  # noqa: F811
    started, begin = started_processes(monkeypatch), multiprocessing.process.BaseProcess.start

    def begin_two(process):
        if len(started) == 2:
            raise OSError(errno.EMFILE, "Too many open files")
        begin(process)

    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", begin_two)
    result = run_here("moco", arguments("moco", images, tmp_path / "run", "--stream", "--num-workers", "3"))
    assert is_one_line_error(result) and "file descriptors" in result.err
    for process in started:
        process.join(60)  # one that got SIGTERM would wait for five seconds, and end by itself
    assert [process.exitcode for process in started] == [-signal.SIGKILL] * 2


def test_the_order_and_the_crops_do_not_depend_on_the_loaders(images, unstopped, tmp_path):  # noqa: F811
    """None, one or three processes, kept over the epochs: the same bits."""
    whole = unstopped("cw_rgp", "--stream", "--num-workers", 0)
    for workers in (1, 3):
        result = run_here("cw_rgp", arguments("cw_rgp", images, tmp_path / str(workers), "--stream", "--num-workers", workers))
        assert result.status == 0
        ours = left_by(tmp_path / str(workers))
        assert first_difference(*({k: v for k, v in numbers.items() if "given" not in k} for numbers in (ours, whole))) == ""


def test_reading_while_reading_gives_both_their_own_images(images):  # noqa: F811
    paths = sorted(map(str, (images / "train").rglob("*.png")))
    files = common.Files(paths, 16, 16)
    alone = list(files.centres(torch.arange(64), 8, 1))
    mixed = []
    for i, part in enumerate(files.centres(torch.arange(64), 8, 1)):
        mixed.append(part)
        if i == 2:
            nested = list(files.part(torch.arange(10, 20)).centres(torch.arange(10), 5, 1))
    assert all(torch.equal(a, b) for a, b in zip(alone, mixed, strict=True))
    assert torch.equal(torch.cat(nested), torch.cat(alone)[10:20])
    for _ in range(2):  # left in the middle: the next reader begins at its own beginning
        assert torch.equal(next(files.centres(torch.arange(8, 64), 8, 1)), alone[1])


def test_loader_processes_end_with_the_images_though_no_run_ends_them(images):  # noqa: F811
    """Without a cycle of references, which Python collects later and in any order: torch then waits 5 s for each process."""
    before = set(multiprocessing.active_children())
    files = common.Files(sorted(map(str, (images / "train").rglob("*.png"))), 16, 16)
    half = files.centres(torch.arange(64), 8, 2)
    next(half)
    assert len(set(multiprocessing.active_children()) - before) == 2
    gc.disable()
    try:
        del half, files
        assert not set(multiprocessing.active_children()) - before
    finally:
        gc.enable()


def limited(command, cwd):
    done = subprocess.run(["bash", "-c", command], cwd=cwd, capture_output=True, text=True, timeout=300)
    return common.argparse.Namespace(status=done.returncode, out=done.stdout, err=done.stderr)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("limit", [30, pytest.param(60, marks=SLOW)])
def test_too_few_file_descriptors_are_one_line(images, tmp_path, limit):  # noqa: F811
    words = " ".join([sys.executable, "-W", "ignore", str(SCRIPT), *arguments("moco", images, tmp_path / "run", "--stream", "--num-workers", "6")])
    result = limited(f"ulimit -n {limit}; {words}", tmp_path)
    assert is_one_line_error(result) and "file descriptors" in result.err and "ulimit -n" in result.err, result.err


@pytest.mark.parametrize("size", [pytest.param("4k", marks=SLOW), "100k"])
def test_a_small_dev_shm_is_one_line(images, tmp_path, size):  # noqa: F811
    """A real one, in a mount namespace of its own; skipped where the system does not allow that."""
    if subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", "/dev/shm"], capture_output=True).returncode:
        pytest.skip("no mount namespace here")
    words = " ".join([sys.executable, "-W", "ignore", str(SCRIPT), *arguments("moco", images, tmp_path / "run", "--stream", "--image-size", "64")])
    result = limited(f"unshare -m bash -c 'mount -t tmpfs -o size={size} tmpfs /dev/shm; {words}'", tmp_path)
    assert is_one_line_error(result) and "/dev/shm is too small" in result.err and "--num-workers 0" in result.err, result.err


@pytest.mark.parametrize("words, part", [
    ("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out of shared memory.", "/dev/shm"),
    ("unable to write to file </torch_12_34>: No space left on device (28)", "/dev/shm"),
    ("unable to open shared memory object </torch_1_2> in read-write mode: Too many open files (24)", "file descriptors"),
    ("received 0 items of ancdata", "file descriptors"),
    ("DataLoader worker (pid(s) 7) exited unexpectedly", "a loader process died"), ("can't start new thread", "processes"),
    ("unable to mmap 12 bytes: Cannot allocate memory (12)", "out of memory"), ("MPS backend out of memory (MPS allocated: 1 GB)", "GPU memory"),
    ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", "GPU memory")])
def test_what_torch_says_of_them_is_understood(words, part):
    assert part in common.explanation(RuntimeError(words))


def test_an_error_that_nobody_foresaw_is_not_hidden():
    assert common.explanation(OSError(errno.EIO, "Input/output error")) == "" and common.explanation(RuntimeError("shape")) == ""


# ---- streams -------------------------------------------------------------------------------------


def command_of(images, out, *more):  # noqa: F811
    return " ".join([sys.executable, str(SCRIPT), *arguments("moco", images, out, *more)])


@pytest.mark.parametrize("redirected", [">/dev/full", "<&- >&- 2>&-", *(pytest.param(r, marks=SLOW) for r in (">&-", "2>&-", "2>/dev/full"))])
def test_a_stream_that_takes_nothing_does_not_end_a_run(images, unstopped, tmp_path, redirected):  # noqa: F811
    """With loader processes, which are forked and flush what their parent could not write."""
    result = limited(f"{command_of(images, tmp_path / 'run', '--stream')} {redirected}", tmp_path)
    assert result.status == 0 and not result.err, result.err
    assert (redirected[0] in "><") == (result.out == "")
    ours, whole = left_by(tmp_path / "run"), unstopped("moco", "--stream")
    assert first_difference(ours, whole) == ""


@pytest.mark.slow
def test_an_error_on_a_full_stream_keeps_its_status(images, tmp_path):  # noqa: F811
    assert limited(f"{command_of(images, tmp_path / 'run', '--lr', 'x')} >/dev/full 2>/dev/full", tmp_path).status == 2
    assert limited(f"{command_of(images, tmp_path / 'run', '--help')} >/dev/full", tmp_path).status == 0


def test_a_full_file_system_that_gets_room_shows_the_rest(tmp_path):
    """A real one of 64 kB, in a mount namespace."""
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("no mount namespace here")
    (tmp_path / "disk").mkdir()
    (tmp_path / "talk.py").write_text(f"""import os, sys
sys.path.insert(0, {str(ROOT)!r})
import common
open("disk/big", "wb").write(bytes(60 * 1024))
for _ in range(30):
    common.say("x" * 1000)
os.remove("disk/big")
common.say("room again")
""")
    command = f"mount -t tmpfs -o size=64k tmpfs disk; {sys.executable} talk.py > disk/log && tail -n 1 disk/log"
    result = limited(f"unshare -m bash -c '{command}'", tmp_path)
    assert result.status == 0 and result.out.endswith("room again\n")  # perhaps after the first half of a line
    assert result.out.count("room") == 1 and not result.err, result


@pytest.mark.parametrize("encoding", ["ascii", pytest.param("latin-1", marks=SLOW), pytest.param("utf-8", marks=SLOW)])
def test_a_folder_whose_letters_the_stream_lacks(images, tmp_path, encoding):  # noqa: F811
    out = tmp_path / "日本-ü"
    result = subprocess.run([sys.executable, SCRIPT, *arguments("moco", images, out, "--epochs", "1")], capture_output=True, timeout=300,
                            env={**os.environ, "PYTHONIOENCODING": encoding})
    expected = str(out).encode(encoding, "backslashreplace") + b": config.json metrics.csv last.pt backbone.pt"
    assert result.returncode == 0 and not result.stderr and expected in result.stdout


@pytest.mark.slow
def test_a_folder_that_is_no_text_at_all(images, tmp_path):  # noqa: F811
    out = os.fsencode(tmp_path) + b"/\xff\xfe"
    result = subprocess.run([sys.executable, SCRIPT, *arguments("moco", images, "x", "--epochs", "1", "--out"), out], capture_output=True, timeout=300)
    assert result.returncode == 0 and not result.stderr and os.path.exists(out + b"/backbone.pt"), result.stderr


def test_a_home_folder_of_a_flag_is_the_users(images, tmp_path, monkeypatch):  # noqa: F811
    """As --out=~/run comes from a shell, and "~/run" from a notebook."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").symlink_to(images)
    run = train("~/pictures", "~/run", epochs=1)
    assert run.folder == str(tmp_path / "run") and run.args.data_dir == str(tmp_path / "pictures")
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_folder_for_sockets_whose_name_is_too_long_is_one_line(images, tmp_path, workers):  # noqa: F811
    """Their names have at most 107 bytes. The loader processes would wait for each other for ever."""
    long = tmp_path / ("x" * 90)
    long.mkdir()
    result = run_script(SCRIPT, *arguments("moco", images, tmp_path / "run", "--epochs", "1", "--stream", "--num-workers", workers), TMPDIR=str(long))
    assert result.status == 0 if workers == 0 else is_one_line_error(result) and f"TMPDIR={long} is too long" in result.err, result.err


@pytest.mark.parametrize("fault", [{"encoding": "unknown"}, {"isatty": True}, {"write": None}, {"flush": None}], ids=str)
def test_a_stream_of_a_program_that_fails_does_not_end_a_run(monkeypatch, fault):
    class Odd(io.StringIO):
        encoding = "utf-8"

    vars_of = {name: value if value is not None else staticmethod(lambda *_: 1 / 0) for name, value in fault.items()}
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", type("Odder", (Odd,), vars_of)())
        common.say("hello")
        common.STATUS.show("status")


@pytest.mark.parametrize("stream", [None, "closed", "no encoding", "no file"])
def test_streams_of_notebooks_and_of_none(monkeypatch, stream):
    class Tee:
        def __init__(self):
            self.words = ""

        def write(self, text):
            self.words += text

        def flush(self):
            pass

    target = {None: None, "closed": io.StringIO(), "no encoding": Tee(), "no file": io.StringIO()}[stream]
    if stream == "closed":
        target.close()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", target)
        common.say("hello")
        common.STATUS.show("status")
    if stream == "no encoding":
        assert target.words == "hello\n"
    if stream == "no file":
        assert target.getvalue() == "hello\n"


# ---- the status line -----------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


STATUS = re.compile(r"epoch 1/2  step (\d+)/8  loss -?\d+\.\d{4}  \d+m\d\ds left")


def test_a_log_gets_a_status_line_whenever_it_was_silent_for_too_long(monkeypatch, images, tmp_path):  # noqa: F811
    monkeypatch.setattr(common.StatusLine, "seconds", 0)
    result = run_here("moco", arguments("moco", images, tmp_path / "run", "--log-every", "1000"))
    lines = result.out.splitlines()
    assert [int(match[1]) for line in lines if (match := STATUS.fullmatch(line))] == [1, 2, 3, 4]  # also without a look at the loss
    assert "\r" not in result.out and any(line.startswith("measuring, batch 1/1, ") for line in lines)


def test_a_log_that_is_not_silent_gets_none(images, tmp_path):  # noqa: F811
    result = run_here("moco", arguments("moco", images, tmp_path / "run"))
    assert not STATUS.search(result.out) and "measuring" not in result.out


def test_thirty_seconds(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    common.say("words")
    shown = []
    for second in range(1, 100):
        now[0] = 1000.0 + second
        common.STATUS.show(f"after {second}")
        shown = sys.stdout.getvalue().split("\n")[1:-1]
    assert shown == ["after 30", "after 60", "after 90"]


def test_on_a_terminal_one_line_moves_and_other_lines_replace_it(monkeypatch, images, tmp_path):  # noqa: F811
    monkeypatch.setattr(io, "StringIO", Terminal)
    out = run_here("moco", arguments("moco", images, tmp_path / "run")).out
    screen = [line.split("\r")[-1] for line in out.split("\n")]
    assert out.count("\r") > 8 and not any(STATUS.fullmatch(line) for line in screen)
    assert screen[0].startswith("64 training images in 4 classes")
    assert screen[1].startswith("epoch 1/2  step 4/8  loss") and "kNN" in screen[1]


def test_the_moving_line_fits_the_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(sys, "stdout", Terminal())
    common.STATUS.show("x" * 100)
    common.STATUS.show("y")
    common.STATUS.clear()
    assert sys.stdout.getvalue() == "\r" + "x" * 39 + "\ry" + " " * 38 + "\r" + " " * 39 + "\r"


@pytest.mark.slow
def test_a_real_log_is_not_silent_for_a_long_epoch(images, tmp_path):  # noqa: F811
    """Steps of four seconds, ten of them between two looks at the loss, as on a slow machine: a line each 30 to 40 seconds."""
    code = ("import runpy, sys, time; sys.path.insert(0, {!r}); import common; watch = common.Run.watch; "
            "common.Run.watch = lambda *a: (time.sleep(4), watch(*a)); sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')")
    argv = arguments("moco", images, tmp_path / "run", "--batch-size", "4", "--log-every", "10", "--epochs", "1", "--bn-splits", "1")
    done = subprocess.run([sys.executable, "-c", code.format(str(ROOT)), SCRIPT, *argv], capture_output=True, text=True, timeout=300)
    found = re.findall(r"epoch 1/1  step (\d+)/16  loss \S+  \dm\d\ds left\n", done.stdout)
    assert done.returncode == 0 and [int(step) for step in found] in ([8], [7], [8, 15], [7, 14], [8, 16]), done.stdout


# ---- eval.py -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):  # noqa: F811
    out = tmp_path_factory.mktemp("finished") / "run"
    assert run_here("moco", arguments("moco", images, out)).status == 0
    return out


def measure(run, *more):
    return run_here("eval", [run, "--device", "cpu", "--probe-epochs", "3", "--features", "H,Z", *more])


def test_eval_says_which_feature_and_which_probe_it_is_at(monkeypatch, finished):
    monkeypatch.setattr(common.StatusLine, "seconds", 0)
    lines = measure(finished).out.splitlines()
    for expected in ("H of training images, batch 1/1, ", "H of test images, batch 1/1, ", "H: 5-NN and 200-NN",
                     "H: linear probe, epoch 2/3, ", "Z: linear probe, epoch 3/3, 0m00s left"):
        assert any(line.startswith(expected) for line in lines), (expected, lines)
    monkeypatch.undo()
    assert "probe, epoch" not in measure(finished).out  # a short evaluation in a log has its table alone


def test_eval_on_a_terminal_has_a_moving_line(monkeypatch, finished):
    monkeypatch.setattr(io, "StringIO", Terminal)
    assert "\rH: linear probe, epoch 2/3, " in measure(finished).out


def read_in_background(path):
    found = []
    thread = threading.Thread(target=lambda: found.append(path.read_bytes()), daemon=True)
    thread.start()
    return thread, found


def test_json_to_a_fifo_is_written_into_it(finished, tmp_path):
    fifo = tmp_path / "figures"
    os.mkfifo(fifo)
    thread, found = read_in_background(fifo)
    assert measure(finished, "--json", fifo).status == 0
    thread.join(timeout=60)
    assert stat.S_ISFIFO(os.stat(fifo).st_mode) and json.loads(found[0])[0]["method"] == "moco"
    assert os.listdir(tmp_path) == ["figures"]


def test_json_through_a_symlink_reaches_its_target(finished, tmp_path):
    (tmp_path / "disk").mkdir()
    link, target = tmp_path / "figures.json", tmp_path / "disk" / "real.json"
    for content in (None, json.dumps(["old"] * 10000)):
        if content:
            target.write_text(content)
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        assert measure(finished, "--json", link).status == 0
        assert link.is_symlink() and json.loads(target.read_text())[0]["method"] == "moco"
    assert os.listdir(tmp_path / "disk") == ["real.json"]


def test_json_to_a_device(finished, tmp_path):
    assert measure(finished, "--json", "/dev/null").status == 0
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    refused = measure(finished, "--json", "/dev/full")
    assert refused.status == 2 and "error: /dev/full could not be written (No space left on device)" in refused.err.splitlines()[-1]
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode) and not os.path.exists("/dev/full.tmp")


def test_json_to_a_link_to_a_device(finished, tmp_path):
    link = tmp_path / "nowhere"
    link.symlink_to("/dev/null")
    assert measure(finished, "--json", link).status == 0
    assert link.is_symlink() and os.listdir(tmp_path) == ["nowhere"]


@pytest.mark.parametrize("piped", [pytest.param(" | cat", marks=SLOW), " > log; cat log"])
def test_json_to_standard_output_follows_the_table(finished, tmp_path, piped):
    """Also where that is a regular file: it is neither replaced nor cut off."""
    words = f"{sys.executable} {ROOT / 'eval.py'} {finished} --device cpu --probe-epochs 0 --features H --json /dev/stdout"
    out = limited(f"{words}{piped}", tmp_path).out
    table, figures = out.split("\n[\n")
    assert "200-NN" in table and "network unchanged" in table and json.loads("[" + figures)[0]["method"] == "moco"


def test_a_picture_to_a_fifo(finished, tmp_path):
    fifo = tmp_path / "views.png"
    os.mkfifo(fifo)
    thread, found = read_in_background(fifo)
    assert measure(finished, "--views", fifo).status == 0
    thread.join(timeout=60)
    assert stat.S_ISFIFO(os.stat(fifo).st_mode) and found[0].startswith(b"\x89PNG")


@pytest.mark.slow
def test_eval_on_a_full_stream_writes_its_json(finished, tmp_path):
    words = f"{sys.executable} {ROOT / 'eval.py'} {finished} --device cpu --probe-epochs 0 --features H --json figures.json"
    assert limited(f"{words} >/dev/full", tmp_path).status == 0
    assert json.loads((tmp_path / "figures.json").read_text())[0]["method"] == "moco"


def test_eval_leaves_no_loader_processes(monkeypatch, images, tmp_path):  # noqa: F811
    assert run_here("moco", arguments("moco", images, tmp_path / "run", "--stream", "--epochs", "1")).status == 0
    started = started_processes(monkeypatch)
    assert measure(tmp_path / "run", "--views", tmp_path / "v.png", "--neighbors", tmp_path / "n.png").status == 0
    assert started and not any(process.is_alive() for process in started)


# ---- what a program may pass, what may lie in the folder ------------------------------------------


def test_args_of_another_method_are_one_line_before_the_folder_is_taken(images, tmp_path):  # noqa: F811
    import moco
    import simclr

    out, args = tmp_path / "run", args_of(images, tmp_path / "run")
    shared = {f.name: getattr(args, f.name) for f in dataclasses.fields(common.Args) if f.name != "method"}
    for given in (args, common.Args(**shared), None, {}, simclr.Args, "simclr"):
        with pytest.raises(common.UserError, match="^train.. needs an Args of simclr, not of [^\\n]*$"):
            simclr.train(given)
    with pytest.raises(common.UserError, match="needs an Args of simclr, not of moco"):
        simclr.train(args=args)
    import experiments
    import simsiam

    theirs = experiments.find("simsiam/softmax-similarity").Args(**{**shared, "experiment": "softmax-similarity"})
    with pytest.raises(common.UserError, match="^these Args are for simsiam/softmax-similarity, the model is not; try "):
        simsiam.train(theirs)  # whose model is SimSiam's own
    for name in ("method", "experiment"):
        with pytest.raises(common.UserError, match=f"Args.{name}='foo'. is no flag"):
            args_of(images, out, **{name: "foo"})
    assert not out.exists()


@pytest.mark.parametrize("name, value, words", [("lr", -1.0, "--lr"), ("batch_size", 3, "--bn-splits"), ("epoch", 5, "Args.epoch=5. is no flag"),
                                                ("method", "simclr", "is no flag"), ("out", "a\0b", "--out")])
def test_args_that_a_program_changed_are_checked_again(images, tmp_path, name, value, words):  # noqa: F811
    import moco

    args = args_of(images, tmp_path / "run")
    setattr(args, name, value)
    with pytest.raises(common.UserError, match=words):
        moco.train(args)
    assert not (tmp_path / "run").exists()


def test_a_path_with_a_null_byte_is_one_line():
    with pytest.raises(common.UserError, match="--out: 'a.x00b'"):
        common.Args(out="a\0b")


@pytest.mark.parametrize("script", ["methods/moco.py", pytest.param("eval.py", marks=SLOW), pytest.param("tests/experiments.py", marks=SLOW)])
def test_a_symlinked_script_finds_common(tmp_path, script):
    (tmp_path / "linked").symlink_to(ROOT / script)
    result = run_script(tmp_path / "linked", "--help", cwd=tmp_path)
    assert result.status == 0 and ("[flags of the method]" in result.out or "usage" in result.out), result.err


def test_a_finished_model_is_in_eval_mode(images, tmp_path):  # noqa: F811
    assert not any(module.training for module in train(images, tmp_path / "run", epochs=1).model.modules())


def test_a_signal_while_the_backbone_is_written_does_not_end_it(monkeypatch, images, tmp_path):  # noqa: F811
    write, before = common.write_file, handlers()

    def write_and_stop(path, *rest, **more):
        if path.endswith("backbone.pt"):
            os.kill(os.getpid(), signal.SIGINT)
        write(path, *rest, **more)

    monkeypatch.setattr(common, "write_file", write_and_stop)
    train(images, tmp_path / "run", epochs=1)
    assert (tmp_path / "run" / "backbone.pt").is_file() and handlers() == before


def test_a_sigterm_that_is_repeated_is_one(monkeypatch, images, tmp_path):  # noqa: F811
    def twice():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        in_step(patch, 2, twice)
        with pytest.raises(SystemExit) as ended:
            train(images, tmp_path / "run")
    assert ended.value.code == 143 and common.load_checkpoint(str(tmp_path / "run" / "last.pt"))["step"] == 3


@pytest.mark.parametrize("environment, words", [
    ({"WORLD_SIZE": "4097", "RANK": "0"}, "torchrun"), ({"WORLD_SIZE": "9" * 5000, "RANK": "0"}, "torchrun"),
    ({"WORLD_SIZE": "2", "RANK": "9" * 5000}, "torchrun"), ({"OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_SIZE=4"), ({"PMI_SIZE": "2"}, "PMI_SIZE=2")])
def test_launchers_that_are_not_torchrun_are_one_short_line(monkeypatch, environment, words):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(common.UserError, match=words) as raised:
        common.check_launch()
    assert len(str(raised.value)) < 300


# ---- threads that wait ---------------------------------------------------------------------------

WAITING = ("GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_WAIT_POLICY")


@pytest.mark.parametrize("given, found", [
    ({}, {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "1"}), *(({name: "7"}, {name: "7"}) for name in WAITING[:2]), ({"OMP_WAIT_POLICY": "active"},) * 2])
def test_torchs_threads_soon_give_up_their_core_unless_the_user_wants_otherwise(given, found):
    """The OpenMP runtimes read it when torch loads them: here a torch stands in its place that says what it finds, and ends."""
    stand_in = f"import os\nprint({{n: os.environ[n] for n in {WAITING} if n in os.environ}}, flush=True)\nos._exit(0)"
    command = f"import sys, importlib.abc\nclass Stop(importlib.abc.MetaPathFinder):\n    def find_spec(self, name, *_):\n        if name == 'torch': exec({stand_in!r}, {{}})\nsys.meta_path.insert(0, Stop())\nimport "
    environment = {name: value for name, value in os.environ.items() if name not in WAITING} | given
    for module in ("common", "simclr", "moco", "byol", "simsiam", "barlow", "vicreg", "wmse", "shuffled_dbn", "cw_rgp", "eval", "benchmark"):
        places = os.pathsep.join(str(ROOT / place) for place in ("", "methods", "tests"))
        done = subprocess.run([sys.executable, "-c", command + module], capture_output=True, text=True, env={**environment, "PYTHONPATH": places})
        assert done.stdout == f"{found}\n", (module, done.stderr)
