"""The numbers of a run are a function of its flags: not of the clock, the loader's processes, or how often anybody looks.

And a step never waits for the device: nothing in it needs a number on the host."""

import contextlib
import importlib

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import common
from conftest import METHODS, run_here
from test_resume import arguments, first_difference, images, left_by, unstopped  # noqa: F401

pytestmark = pytest.mark.usefixtures("narrow_backbone")
DRAWING = ("moco", "cw_rgp", "shuffled_dbn", "wmse", "byol")  # draws beside the augmentation's, or a second network


def trained(method, images, out, *more):  # noqa: F811
    result = run_here(method, arguments(method, images, out, *more))
    assert result.status == 0, result.err
    return left_by(out)


def without(numbers, *names):
    return {name: value for name, value in numbers.items() if not any(part in name for part in names)}


# ---- the same numbers ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", [m if m in DRAWING[:3] else pytest.param(m, marks=pytest.mark.slow) for m in METHODS])
def test_the_same_seed_twice_is_the_same_run(images, unstopped, tmp_path, method):  # noqa: F811
    """Also when other programs have drawn from torch's and numpy's generators in between."""
    whole = unstopped(method)
    torch.rand(7)
    assert first_difference(trained(method, images, tmp_path / "run"), whole) == ""
    assert any(name.startswith(".backbone.pt.") for name in whole) and ".metrics.csv.1.loss" in whole


def test_backbone_files_of_the_same_seed_are_equal_byte_for_byte(images, tmp_path):  # noqa: F811
    for name in ("a", "b"):
        trained("simclr", images, tmp_path / name, "--epochs", "1")
    assert (tmp_path / "a" / "backbone.pt").read_bytes() == (tmp_path / "b" / "backbone.pt").read_bytes()


@pytest.mark.parametrize("method", [m if m in ("moco", "cw_rgp") else pytest.param(m, marks=pytest.mark.slow) for m in METHODS])
def test_another_seed_is_another_run(images, unstopped, tmp_path, method):  # noqa: F811
    whole, other = unstopped(method), trained(method, images, tmp_path / "run", "--seed", "1")
    for figure in ("loss", "std_sqrt_d"):
        assert whole[f".metrics.csv.0.{figure}"] != other[f".metrics.csv.0.{figure}"]
    assert not torch.equal(whole[".backbone.pt.layers.0.weight"], other[".backbone.pt.layers.0.weight"])


@pytest.mark.parametrize("what", ["weights", "order", "views", "draws of the loss"])
def test_the_seed_reaches_every_draw(images, what):  # noqa: F811
    """One draw at a time, with two seeds."""

    def drawn(seed):
        module = importlib.import_module("cw_rgp")
        args = module.parse_args([*arguments("cw_rgp", images, "unused"), "--seed", str(seed)])
        torch.manual_seed(args.seed)
        model = module.build(args)
        if what == "weights":
            return model.backbone.layers[0].weight.detach()
        data = common.load_data(args, torch.device("cpu"))
        if what == "order":
            return next(data.batches(0))
        if what == "views":
            return data.augment(data.train[:16], 0)[0]
        z = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
        torch.manual_seed(common.step_seed(args.seed, 0))
        return module.cw_rgp_loss([z, z.flip(0)], groups=2, w_size=16)

    assert torch.equal(drawn(0), drawn(0)) and not torch.equal(drawn(0), drawn(1))


@pytest.mark.parametrize("workers", [1, 2])
def test_loader_processes_do_not_change_the_numbers(images, unstopped, tmp_path, workers):  # noqa: F811
    whole = unstopped("moco", "--stream", "--num-workers", "0")
    assert first_difference(trained("moco", images, tmp_path / "run", "--stream", "--num-workers", workers), whole) == ""


@pytest.mark.parametrize("more", [["--log-every", "100"], ["--log-every", "3"], ["--save-every", "1"]], ids=" ".join)
@pytest.mark.parametrize("method", ["moco", pytest.param("cw_rgp", marks=pytest.mark.slow)])
def test_looking_and_saving_do_not_change_the_numbers(images, unstopped, tmp_path, method, more):  # noqa: F811
    assert first_difference(trained(method, images, tmp_path / "run", *more), unstopped(method)) == ""


@pytest.mark.parametrize("every", ["0", "2"])
@pytest.mark.parametrize("method", ["byol", pytest.param("wmse", marks=pytest.mark.slow)])
def test_measuring_less_often_does_not_change_the_training(images, unstopped, tmp_path, method, every):  # noqa: F811
    """Evaluation moves no batch statistic and draws nothing: weights, losses and the last epoch's figures stay."""
    less, whole = trained(method, images, tmp_path / "run", "--eval-every", every), unstopped(method)
    assert less[".metrics.csv.0.knn"] == "" and whole[".metrics.csv.0.knn"] != ""
    first = (".metrics.csv.0.", ".rows.0.")
    names = ("loss", "lr", "epoch", "step")
    less, whole = ({name: value for name, value in numbers.items() if not name.startswith(first) or name.rsplit(".", 1)[1] in names}
                   for numbers in (less, whole))
    assert first_difference(without(less, "eval_every"), without(whole, "eval_every")) == ""


# ---- no wait for the device inside a step --------------------------------------------------------

# What needs a number on the host. `index` by a mask is nonzero inside, whatever name it goes by. The decompositions of
# torch.linalg look at their own error codes (cholesky_ex does not): eigh within one operation, which cannot be seen from here;
# torch.cuda.set_sync_debug_mode in the last test sees it where there is a GPU. Nor can copies of Python numbers to a GPU be seen.
WAITING = {"aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::nonzero_numpy", "aten::is_nonzero", "aten::equal",
           "aten::argwhere", "aten::_linalg_check_errors",
           "aten::masked_select", "aten::unique_dim", "aten::_unique2", "aten::unique_consecutive", "aten::bincount", "aten::allclose"}
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index"}


READING = {"item", "tolist", "numpy", "cpu", "__array__", "__bool__", "__int__", "__float__", "__index__"}


class Waits(Exception):
    pass


class NoReading(TorchFunctionMode):
    """Raises Waits at a tensor's method that reads it on the host: on a CPU some of them are no operation at all."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in READING:
            raise Waits(function.__name__)
        return function(*args, **(kwargs or {}))


class NoWaiting(TorchDispatchMode):
    """Raises Waits at an operation that would make the host wait for the device; counts the others."""

    def __init__(self):
        super().__init__()
        self.count, self.reading = 0, NoReading()

    def __enter__(self):
        self.reading.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.reading.__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        masks = name in INDEXING and any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])
        if name in WAITING or masks:
            raise Waits(f"{name}{' by a mask' if masks else ''}")
        result = function(*args, **(kwargs or {}))
        hosts = [t for t in args if torch.is_tensor(t) and t.is_cuda]
        if hosts and torch.is_tensor(result) and not result.is_cuda:
            raise Waits(f"{name}: from the device to the host")
        self.count += 1
        return result


@contextlib.contextmanager
def every_step_under(monkeypatch, mode, bad_step=None):
    """Every step from its first line, which calls step_seed, to the end of run.watch. Yields the list of the steps seen."""
    seed, watch = common.step_seed, common.Run.watch
    steps, ended = [], []

    def begin(number, step):
        mode.__enter__()
        steps.append(step)
        return seed(number, step)

    def end(run, step, loss):
        try:
            watch(run, step, loss)
            if bad_step:
                bad_step(run, step, loss)
        finally:
            ended.append(step)
            mode.__exit__(None, None, None)

    monkeypatch.setattr(common, "step_seed", begin)
    monkeypatch.setattr(common.Run, "watch", end)
    try:
        yield steps
    finally:
        if len(ended) < len(steps):  # the last step raised on its way
            mode.__exit__(None, None, None)


METHOD_VARIANTS = [(method,) for method in METHODS] + [
    ("moco", "--views", "3", "--queue-size", "50"), ("moco", "--queue-size", "7"), ("wmse", "--whitening", "zca"), ("wmse", "--whitening", "pca"),
    ("wmse", "--optimizer", "lars"),
    ("cw_rgp", "--optimizer", "muon"),
    ("cw_rgp", "--eps", "0.1"), ("byol", "--optimizer", "sgd"), ("byol", "--predictor", "none"),
    ("shuffled_dbn", "--no-shuffle"), ("simsiam", "--no-stop-gradient", "--augment", "byol"), ("simclr", "--augment", "simclr"), ("vicreg", "--precision", "bf16")]


@pytest.mark.parametrize("variant", METHOD_VARIANTS, ids=" ".join)
def test_no_step_waits_for_the_device(monkeypatch, images, tmp_path, variant):  # noqa: F811
    method, *more = variant
    mode = NoWaiting()
    with every_step_under(monkeypatch, mode) as steps:
        result = run_here(method, arguments(method, images, tmp_path / "run", "--epochs", "1", "--eval-every", "0", *more))
    assert result.status == 0, result.err
    assert steps == [0, 1, 2, 3] and mode.count > 1000  # it did see the steps


def test_the_target_network_follows_without_waiting(images):  # noqa: F811
    """BYOL's own line of the loop, which may come after run.watch."""
    module = importlib.import_module("byol")
    model = module.build(module.parse_args(arguments("byol", images, "unused")))
    with NoWaiting() as mode:
        model.update_target(0.5)
    assert mode.count >= len(list(model.target_backbone.parameters()))


BAD_STEPS = {
    "loss.item()": lambda run, step, loss: loss.item(),
    "float(loss)": lambda run, step, loss: float(loss),
    "if loss > 0": lambda run, step, loss: bool(loss > 0),
    "loss.tolist()": lambda run, step, loss: loss.tolist(),
    "int(tensor)": lambda run, step, loss: int(run.finite.first_bad[0]),
    "a mask as index": lambda run, step, loss: run.finite.first_bad[run.finite.first_bad > 0],
    "a mask written to": lambda run, step, loss: run.finite.first_bad.clone().__setitem__((run.finite.first_bad < 0), run.finite.first_bad[:0]),
    "nonzero": lambda run, step, loss: run.finite.first_bad.nonzero(),
    "where(condition)": lambda run, step, loss: torch.where(run.finite.first_bad > 0),
    "masked_select": lambda run, step, loss: run.finite.first_bad.masked_select(run.finite.first_bad > 0),
    "torch.equal": lambda run, step, loss: torch.equal(run.finite.first_bad, run.finite.first_bad.clone()),
    "unique": lambda run, step, loss: run.finite.first_bad.unique(),
    "cholesky": lambda run, step, loss: torch.linalg.cholesky(torch.eye(2)),
    "check_finite": lambda run, step, loss: run.finite.check(),
}


@pytest.mark.parametrize("bad", BAD_STEPS)
def test_a_step_that_waits_is_caught(monkeypatch, images, tmp_path, bad):  # noqa: F811
    with every_step_under(monkeypatch, NoWaiting(), BAD_STEPS[bad]), pytest.raises(Waits):
        method = importlib.import_module("simclr")
        method.train(method.parse_args(arguments("simclr", images, tmp_path / "run", "--epochs", "1")))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_no_step_waits_on_a_gpu(monkeypatch, images, tmp_path, method):  # noqa: F811
    """CUDA's own alarm. It warns rather than raises, since the eigen-decompositions of torch.linalg wait inside."""
    if not torch.cuda.is_available():
        reason = "no GPU: CUDA's own alarm for waits cannot be tried"
        print(reason)
        pytest.skip(reason)

    class Alarm(contextlib.AbstractContextManager):
        def __enter__(self):
            torch.cuda.set_sync_debug_mode("error" if method in ("simclr", "moco", "byol", "simsiam", "barlow", "vicreg", "wmse") else "warn")

        def __exit__(self, *_):
            torch.cuda.set_sync_debug_mode("default")

    with every_step_under(monkeypatch, Alarm()):
        assert run_here(method, arguments(method, images, tmp_path / "run", "--epochs", "1", "--device", "cuda")).status == 0
