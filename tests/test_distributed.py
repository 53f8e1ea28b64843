"""N processes with B / N images each are one process with B: real processes (gloo), other data on every rank."""

import importlib
import json
import os
import pathlib
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import METHODS, ROOT, SMALL, SMALL_OF, run_here
from torch import nn

import common

B, SIDE, STEPS = 24, 8, 3  # global batch, image side, optimizer steps
# Sizes that fit a batch of 24.
SIZES = {
    "simclr": dict(proj_hidden=16, proj_dim=8),
    "moco": dict(proj_hidden=16, proj_dim=8, queue_size=48, bn_splits=6, momentum=0.9),
    "byol": dict(proj_hidden=16, proj_dim=8),
    "simsiam": dict(proj_hidden=16, proj_dim=8, pred_hidden=4),
    "barlow": dict(proj_hidden=16, proj_dim=8),
    "vicreg": dict(proj_hidden=16, proj_dim=8),
    "wmse": dict(proj_hidden=16, proj_dim=4, w_size=12, w_iter=2),
    "shuffled_dbn": dict(proj_hidden=16, proj_dim=8, groups=2),
    "cw_rgp": dict(proj_hidden=16, proj_dim=32, groups=2, w_size=6, w_iter=2),
}
VARIANTS = {
    **{name: (name, {}) for name in METHODS},
    "moco plain bn": ("moco", dict(bn_splits=1)),
    "moco odd queue": ("moco", dict(queue_size=50)),
    "moco short queue": ("moco", dict(queue_size=7)),
    "wmse zca": ("wmse", dict(whitening="zca")),
}


def class_of(module):
    return next(value for value in vars(module).values() if isinstance(value, type) and issubclass(value, nn.Module)
                and hasattr(value, "forward") and value.__module__ == module.__name__ and value.__name__.lower() == module.__name__.replace("_", "").replace("barlow", "barlowtwins"))


def three_steps(variant):
    """Train a small model for three steps on fixed random views. -> losses, gradients of the first step, weights and buffers at the end."""
    name, extra = VARIANTS[variant]
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    module = importlib.import_module(name)
    model = class_of(module)(backbone, 6, module.Args(batch_size=B, **{**SIZES[name], **extra})).double()
    network = common.distribute(model, SimpleNamespace(compile=False))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    n, r = B // common.world_size(), common.rank()
    losses, gradients = [], {}
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(100 + step)
        views = [torch.randn(B, 3, SIDE, SIDE, generator=generator, dtype=torch.float64)[r * n:(r + 1) * n] for _ in range(2)]
        views = [view.contiguous(memory_format=torch.channels_last) for view in views]
        torch.manual_seed(common.step_seed(0, step))
        loss = network(views)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if step == 0:
            gradients = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        if name == "byol":
            model.update_target(step / STEPS)
        losses.append(loss.item())
    return {"losses": torch.tensor(losses, dtype=torch.float64), "gradients": gradients, "state": dict(model.state_dict())}


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def in_processes(function, processes, *more):
    """function(rank, processes, port, *more) in that many processes. Forks: they need not load torch, which takes seconds each."""
    mp.start_processes(function, (processes, free_port(), *more), nprocs=processes, start_method="fork")


def worker(rank, world, port, folder):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = {variant: three_steps(variant) for variant in VARIANTS}
    if rank in (0, world - 1):
        torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def one_process():
    return {variant: three_steps(variant) for variant in VARIANTS}


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def many_processes(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    in_processes(worker, request.param, str(folder))
    return [torch.load(folder / f"rank{r}.pt", weights_only=True) for r in (0, request.param - 1)]


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max((float((a[key].double() - b[key].double()).abs().max()) for key in a if a[key].numel()), default=0.0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_gradients_and_weights_equal_one_process(variant, one_process, many_processes):
    reference = one_process[variant]
    for result in (ranks[variant] for ranks in many_processes):
        differences = {"loss": largest_difference({"": reference["losses"]}, {"": result["losses"]}),
                       "gradients": largest_difference(reference["gradients"], result["gradients"]),
                       "state": largest_difference(reference["state"], result["state"])}
        print(variant, {key: f"{value:.1e}" for key, value in differences.items()})
        assert max(differences.values()) < 1e-9, differences


def test_synchronised_batch_norm_is_torchs_on_one_process():
    """Statistics, running statistics and gradient of CPUSyncBatchNorm are BatchNorm2d's where there is one process."""
    torch.manual_seed(0)
    ours, theirs = common.CPUSyncBatchNorm(5), nn.BatchNorm2d(5)
    x = torch.randn(6, 5, 4, 4)
    world = common.SumOverRanks.apply
    try:
        common.SumOverRanks.apply = staticmethod(lambda t: t)  # a sum over one rank
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        ya, yb = ours(a), theirs(b)
        ya.square().sum().mul(0.1).add(ya[0].sum()).backward()
        yb.square().sum().mul(0.1).add(yb[0].sum()).backward()
    finally:
        common.SumOverRanks.apply = world
    assert torch.allclose(ya, yb, atol=1e-5) and torch.allclose(a.grad, b.grad, atol=1e-5)
    assert torch.allclose(ours.running_mean, theirs.running_mean) and torch.allclose(ours.running_var, theirs.running_var)
    ours.eval(), theirs.eval()
    assert torch.allclose(ours(x), theirs(x), atol=1e-6)


def torchrun(method, folder, out, processes, *more, timeout=280):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", str(ROOT / "methods" / f"{method}.py"),
               *SMALL, *SMALL_OF[method], "--dataset", "folder", "--data-dir", str(folder), "--out", str(out), *map(str, more)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env={**os.environ, "OMP_NUM_THREADS": "1"})


def rows(out):
    import csv

    with open(out / "metrics.csv") as file:
        return list(csv.DictReader(file))


def assert_same_training(folder, tmp_path, method, *more):
    """torchrun with two processes leaves the metrics and the weights of one process, up to rounding; only rank 0 writes and speaks."""
    argv = [*SMALL, *SMALL_OF[method], "--dataset", "folder", "--data-dir", folder, "--out", tmp_path / "one"]
    assert run_here(method, argv).status == 0
    done = torchrun(method, folder, tmp_path / "two", 2, *more)
    assert done.returncode == 0, done.stderr[-2000:]
    ends = [line for line in done.stdout.splitlines() if line.startswith("epoch 1/2") and "images/s" in line]
    assert len(ends) == 1  # one process speaks
    for a, b in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        # float32: Adam's first step is the sign of each gradient, so rounding near 0 counts; the float64 test above is the exact one
        assert abs(float(a["loss"]) - float(b["loss"])) < 1e-2 * (1 + abs(float(a["loss"])))
    assert json.loads((tmp_path / "two" / "config.json").read_text())["processes"] == 2


def test_torchrun_equals_one_process(small_folder, tmp_path):
    assert_same_training(small_folder, tmp_path, "cw_rgp")


@pytest.mark.slow
@pytest.mark.parametrize("method", [name for name in METHODS if name != "cw_rgp"])
def test_torchrun_equals_one_process_all(small_folder, tmp_path, method):
    assert_same_training(small_folder, tmp_path, method)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["moco", "cw_rgp"])
def test_compiled_processes_equal_one_that_is_not(small_folder, tmp_path, method):
    """--compile meets synchronised batch norms, split ones (MoCo) and DistributedDataParallel."""
    assert_same_training(small_folder, tmp_path, method, "--compile")


def extract_worker(rank, world, port, folder):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo")
    images = torch.arange(7 * 3 * 8 * 8).remainder(251).to(torch.uint8).view(7, 3, 8, 8)  # seven images, not a multiple of the ranks
    data = SimpleNamespace(size=8, device=torch.device("cpu"), eval_views=lambda images, index, _count: iter([images[index].float()]))
    torch.save(common.extract(nn.Flatten(), data, images), f"{folder}/features{rank}.pt")
    dist.destroy_process_group()


def test_every_image_is_measured_once_whatever_the_world_size(tmp_path):
    in_processes(extract_worker, 3, str(tmp_path))
    images = torch.arange(7 * 3 * 8 * 8).remainder(251).to(torch.uint8).view(7, 3, 8, 8)
    for r in range(3):
        assert torch.equal(torch.load(tmp_path / f"features{r}.pt", weights_only=True), images.float().flatten(1))


def train_worker(rank, world, port, argv):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    moco = importlib.import_module("moco")
    moco.train(moco.parse_args(list(map(str, argv))))
    dist.destroy_process_group()


def test_a_run_goes_on_with_another_number_of_processes(small_folder, tmp_path):
    """One epoch by two processes, the second by one: the rows of a run that one process made, up to rounding."""
    argv = [*SMALL, *SMALL_OF["moco"], "--dataset", "folder", "--data-dir", small_folder, "--epochs", "2"]
    assert run_here("moco", [*argv, "--out", tmp_path / "one"]).status == 0
    in_processes(train_worker, 2, [*argv, "--epochs", "1", "--out", tmp_path / "two"])
    done = run_here("moco", [*argv, "--out", tmp_path / "two", "--resume"])
    assert done.status == 0 and "after step 2 of 4" in done.out
    assert [row["epoch"] for row in rows(tmp_path / "two")] == ["1", "2"]
    first, second = (abs(float(a["loss"]) - float(b["loss"])) for a, b in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True))
    assert first < 1e-3 and second < 0.2  # the schedule of one epoch is another one than that of two


def torchrun_here(function, processes, log):
    """Two processes of function() under the launcher that torchrun starts, as forks that need not load torch. -> status, stderr.

    Without the step from a script's name to a function, this is torch.distributed.run; the test above has that step too."""

    def launched():
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        sys.stderr = open(2, "w", closefd=False)
        config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=processes, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
                              run_id="here", start_method="fork", max_restarts=0)
        elastic_launch(config, function)()

    process = mp.get_context("fork").Process(target=launched)
    process.start()
    process.join(300)
    status = process.exitcode
    process.kill()
    return status, log.read_text()


@pytest.mark.parametrize("death, cause", [("kill", "lost another process"), ("error", "rank 1 ran dry")])
def test_a_process_that_dies_ends_the_others_with_the_cause_first(small_folder, tmp_path, death, cause):
    argv = [*SMALL, *SMALL_OF["simclr"], "--dataset", "folder", "--data-dir", str(small_folder), "--out", str(tmp_path / "run"), "--epochs", "5"]

    def dying():
        simclr, watch = importlib.import_module("simclr"), common.Run.watch

        def die(run, step, loss):
            if step == 2 and common.rank() == 1:
                if death == "kill":
                    os.kill(os.getpid(), 9)
                raise common.UserError("rank 1 ran dry")
            watch(run, step, loss)

        common.Run.watch = die
        common.main(simclr.train, lambda: simclr.parse_args(argv))

    status, err = torchrun_here(dying, 2, tmp_path / "log")
    assert status not in (0, None), err[:3000]
    errors = [line for line in err.splitlines() if "error:" in line or "Traceback" in line or "Signal 9" in line]
    assert cause in errors[0] or "Signal 9" in errors[0], err[:3000]
    assert (tmp_path / "run" / "last.pt").exists()  # of the first epoch


def downloading_worker(rank, world, port, folder):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    args, device = common.set_up(importlib.import_module("simclr").Args(dataset="cifar10", device="cpu"))
    place = pathlib.Path(folder, "downloaded")

    def read(args, device):
        if rank == 0:
            time.sleep(0.3)
            place.touch()
        return place.exists()

    common.load_torchvision = read
    pathlib.Path(folder, str(rank)).write_text(str(common.load_by_name(args, device)))


def test_rank_0_downloads_before_the_others_look(tmp_path):
    in_processes(downloading_worker, 2, str(tmp_path))
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["True", "True"]


def group_worker(rank, world, port, folder, environment):
    """A program's own group, which tells nothing to the environment, or a launcher that tells the size only."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)
    os.environ.update(environment)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    simclr = importlib.import_module("simclr")
    z = [torch.randn(8, 4, generator=torch.Generator().manual_seed(view)).chunk(world)[rank] for view in range(2)]
    loss = simclr.nt_xent_loss(*map(common.gather, z))
    run = simclr.train(simclr.Args(train_images=64, batch_size=32, epochs=1, precision="fp32", device="cpu", out=f"{folder}/run"))
    torch.save((loss, run.rows[-1]["loss"], common.rank()), f"{folder}/{rank}")


@pytest.mark.parametrize("environment", [{}, {"WORLD_SIZE": "2"}], ids=["no variables", "the size only"])
def test_a_group_of_a_program_is_one_of_torchrun(tmp_path, environment):
    simclr = importlib.import_module("simclr")
    alone = simclr.nt_xent_loss(*(torch.randn(8, 4, generator=torch.Generator().manual_seed(view)) for view in range(2)))
    run = simclr.train(simclr.Args(train_images=64, batch_size=32, epochs=1, precision="fp32", device="cpu", out=str(tmp_path / "alone")))
    in_processes(group_worker, 2, str(tmp_path), environment)
    for number in (0, 1):
        loss, of_run, rank = torch.load(tmp_path / str(number), weights_only=True)
        assert rank == number and loss == pytest.approx(float(alone), rel=1e-6) and of_run == pytest.approx(run.rows[-1]["loss"], rel=1e-4)


def agreeing_worker(rank, world, port, folder):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo")
    os.chdir(folder)
    said = pathlib.Path(folder, str(rank)).open("w")
    name, _lock = common.open_folder(importlib.import_module("simclr").Args(device="cpu"))
    print(name, file=said)
    x = torch.arange(4.0).view(2, 2).T + 10 * rank
    print(common.all_reduced(x).tolist(), x.tolist() == [[10.0 * rank, 2 + 10.0 * rank], [1 + 10.0 * rank, 3 + 10.0 * rank]], file=said)
    watch = common.FiniteWatch(torch.nn.Linear(2, 2), SimpleNamespace(device=torch.device("cpu")), folder)
    common.stop_non_finite = lambda step, what, *_: print(step, what, file=said)
    watch.note(3, torch.tensor(1.0))
    watch.note(4, torch.tensor(float("inf") if rank == 1 else 1.0))
    watch.check()
    said.close()


def test_all_processes_have_one_folder_a_sum_and_a_stop_at_a_number_that_is_not_finite_in_one(tmp_path):
    """The sum is a copy: the summands stay."""
    (tmp_path / "runs" / "simclr-patterns-s0").mkdir(parents=True)
    (tmp_path / "runs" / "simclr-patterns-s0" / "last.pt").touch()
    in_processes(agreeing_worker, 2, str(tmp_path))
    assert [(tmp_path / rank).read_text().splitlines() for rank in "01"] == [
        ["runs/simclr-patterns-s0-2", "[[10.0, 14.0], [12.0, 16.0]] True", "4 the loss"]] * 2


def unshared_worker(rank, world, port, argv, folder):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    sys.stderr = open(f"{folder}/err{rank}", "w")
    simclr, load = importlib.import_module("simclr"), common.load_last
    common.load_last = lambda folder: load(folder) if rank == 0 else None
    common.main(simclr.train, lambda: simclr.parse_args(argv))


def test_a_second_machine_that_does_not_see_the_checkpoint_is_named_not_waited_for(small_folder, tmp_path):
    """Rank 1 began to train while rank 0 waited for its word on the step: lost processes or a hang, and no word of the cause."""
    argv = [*SMALL, *SMALL_OF["simclr"], "--dataset", "folder", "--data-dir", str(small_folder), "--out", str(tmp_path / "run")]
    assert run_here("simclr", [*argv, "--epochs", "1"]).status == 0
    before = (tmp_path / "run" / "config.json").read_bytes()
    with pytest.raises(mp.ProcessExitedException) as ended:
        in_processes(unshared_worker, 2, [*argv, "--epochs", "3", "--resume"], str(tmp_path))
    assert ended.value.exit_code == 2
    (line,) = (tmp_path / "err0").read_text().splitlines()
    assert "error: " in line and "must lie on a disk that all machines share" in line
    assert (tmp_path / "run" / "config.json").read_bytes() == before


@pytest.mark.slow  # torchrun itself ends by force after 30 s: on a very busy machine that was once too short
def test_sigterm_to_torchrun_saves_and_leaves(small_folder, tmp_path):
    import signal

    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(ROOT / "methods" / "simclr.py"), *SMALL,
               *SMALL_OF["simclr"], "--dataset", "folder", "--data-dir", str(small_folder), "--out", str(tmp_path / "run"), "--epochs", "100000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}) as run:
        while "epoch" not in (line := run.stdout.readline()):
            assert line, run.stderr.read()[-2000:]
        run.send_signal(signal.SIGTERM)
        out, err = run.communicate(timeout=300)
    assert "stopped after step" in out, err[:2000]
    checkpoint = common.load_checkpoint(str(tmp_path / "run" / "last.pt"))
    assert checkpoint["step"] == int(out.split("stopped after step ")[1].split()[0])


def test_draws_agree_where_they_must_and_differ_where_they_must(monkeypatch):
    """Permutations are drawn alike on all ranks; the augmentation of a rank's rows is that of these rows in one process."""
    images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)
    whole = common.augment(images, "w-mse", 2, 16, (0.5,) * 3, (0.5,) * 3, 0, 0)
    for r in range(2):
        mine = common.augment(images[4 * r:4 * r + 4], "w-mse", 2, 16, (0.5,) * 3, (0.5,) * 3, 0, 0, rank=r, world_size=2)
        assert torch.allclose(mine[0], whole[0][4 * r:4 * r + 4], atol=1e-5)
    same = images[:1].expand(4, 3, 16, 16)
    a, b = (common.augment(same, "w-mse", 1, 16, (0.5,) * 3, (0.5,) * 3, 0, 0, rank=r, world_size=2)[0] for r in range(2))
    assert not torch.allclose(a, b)
    seeds = []
    for r in range(2):
        monkeypatch.setenv("RANK", str(r))
        seeds.append(common.step_seed(0, 5))
    assert seeds[0] == seeds[1]
