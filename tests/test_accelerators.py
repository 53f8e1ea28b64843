"""Accelerators other than CUDA. None was at hand, so one pretends: it computes on the CPU, but has no float64, eigh or Cholesky.

    python tests/test_accelerators.py METHOD DIR      # a small run and its eval.py on the device that pretends
"""

import functools
import importlib
import json
import os
import sys
from types import SimpleNamespace

sys.path[:0] = [os.path.dirname(os.path.dirname(os.path.realpath(__file__)))]
import pytest
import torch
from conftest import METHODS, SMALL, SMALL_OF, is_one_line_error, run_here, run_script
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import common

LACKED = set()  # the operations that were asked of the device in vain


class Pretend(torch.Tensor):
    """A tensor on the device `pretend`; `inner` has the numbers, on the CPU."""

    @staticmethod
    def __new__(cls, inner):
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(),
                                                   dtype=inner.dtype, device="pretend:0")
        made.inner = inner
        return made

    def tolist(self):
        return self.cpu().tolist()

    def __reduce_ex__(self, protocol):
        return self.cpu().__reduce_ex__(protocol)  # a checkpoint is read onto the CPU anyway

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return computed(function, args, kwargs or {})


def computed(function, args, kwargs):
    """function(*args, **kwargs) on the device that the arguments name or lie on."""
    device, known, here = kwargs.get("device"), {}, []

    def unwrap(x):
        if isinstance(x, torch.device):
            return torch.device("cpu")
        inner = x.inner if isinstance(x, Pretend) else x
        if isinstance(x, torch.Tensor):
            known[id(inner)] = x
            here.extend([x] * isinstance(x, Pretend))
        return inner

    args, kwargs = tree_map(unwrap, (args, kwargs))
    if here and any(name in str(function) for name in ("eigh", "cholesky", "triangular")):
        LACKED.add(str(function))
        raise NotImplementedError(f"{function} is not implemented for the device")
    on = bool(here) if device is None else torch.device(device).type == "pretend"

    def wrap(x):
        if not isinstance(x, torch.Tensor):
            return x
        if id(x) in known and (device is None or isinstance(known[id(x)], Pretend) == on):
            return known[id(x)]  # an operation in place
        if on and x.dtype == torch.float64:
            raise TypeError(f"the device has no float64: {function}")
        return Pretend(x) if on else x

    return tree_map(wrap, function(*args, **kwargs))


class Everywhere(TorchDispatchMode):
    """What makes a tensor on the device, such as torch.zeros, has no argument there."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return computed(function, args, kwargs or {})


def register():
    """Tell torch of the device, and of the three operations that do not come through the above."""
    from torch.utils import backend_registration

    class Backend(backend_registration._DummyBackendModule):
        is_available = manual_seed_all = lambda *_: True
        _is_in_bad_fork = lambda *_: False
        get_amp_supported_dtype = lambda *_: [torch.bfloat16]

    def empty_strided(size, stride, dtype=None, layout=None, device=None, pin_memory=False):
        return computed(torch.ops.aten.empty_strided.default, (size, stride), {"dtype": dtype, "device": device})

    def empty(size, dtype=None, layout=None, device=None, pin_memory=False, memory_format=None):
        return computed(torch.ops.aten.empty.memory_format, (size,), {"dtype": dtype, "device": device, "memory_format": memory_format})

    def copy_from(x, target, non_blocking=False):
        a, b = (t.inner if isinstance(t, Pretend) else t for t in (x, target))
        b.copy_(a)
        return target

    backend_registration._setup_privateuseone_for_python_backend("pretend", Backend())
    library = torch.library.Library("aten", "IMPL")
    for name, function in (("empty_strided", empty_strided), ("empty.memory_format", empty), ("_copy_from", copy_from)):
        library.impl(name, function, "PrivateUse1")
    return library


def run_on_both(method, folder):
    """Print as JSON what a run and its eval.py give on the device and on the CPU."""
    module, evaluation = importlib.import_module(method), importlib.import_module("eval")
    common.make_patterns = functools.partial(common.make_patterns, train=64, test=24)
    common.build_backbone = functools.partial(common.build_backbone, width=4)
    found = {}
    for device, precision in (("auto", "auto"), ("cpu", "fp32")):
        out = os.path.join(folder, device)
        run = module.train(module.parse_args([*SMALL, *SMALL_OF[method], "--precision", precision, "--device", device, "--out", out]))
        reports = os.path.join(folder, f"{device}.json")
        argv = [out, "--device", device, "--precision", "fp32", "--probe-epochs", "2", "--supervised", "--json", reports]
        evaluation.run(evaluation.parse_args(argv))
        with open(reports) as file:
            (report,) = json.load(file)
        figures = {name: report["features"][name]["collapse"] for name in ("H", "Z")}
        found[device] = {"rows": run.rows, "device": run.data.device.type, "precision": run.args.precision, "scores": run.scores,
                         "figures": figures, "supervised": report["supervised"]}
    print(json.dumps({**found, "lacked": sorted(LACKED)}))


def numbers(found):
    """The numbers that two devices should agree on."""
    rows = [{name: value for name, value in row.items() if name not in ("images_per_s", "seconds")} for row in found["rows"]]
    return [x for part in (*rows, *found["figures"].values()) for x in part.values()]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_run_on_a_device_that_lacks_float64_and_decompositions(method, tmp_path):
    """It takes the device, does on the CPU what that lacks, and ends with the numbers of a CPU."""
    if not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch cannot pretend")
    result = run_script(__file__, method, tmp_path)
    assert result.status == 0, result.err
    found = json.loads(result.out.splitlines()[-1])
    assert (found["auto"]["device"], found["cpu"]["device"], found["auto"]["precision"]) == ("pretend", "cpu", "fp32")
    lacked = {"wmse": "cholesky", "cw_rgp": "eigh", "shuffled_dbn": "eigh"}.get(method)
    assert any(lacked in name for name in found["lacked"]) if lacked else not found["lacked"]
    assert numbers(found["auto"]) == pytest.approx(numbers(found["cpu"]), rel=2e-2, abs=2e-2)
    assert set(found["auto"]["scores"]) == set(found["cpu"]["scores"])


def found_by_torch(monkeypatch, kind):
    """torch finds this accelerator (None: none) and no CUDA."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    fake = SimpleNamespace(is_available=lambda: kind is not None, current_accelerator=lambda: torch.device(kind))
    monkeypatch.setattr(torch, "accelerator", fake, raising=False)


@pytest.mark.parametrize("kind, wanted, device", [
    ("mps", "auto", "mps"), ("mps", "mps", "mps"), ("xpu", "auto", "xpu"), ("mps", "cpu", "cpu"), (None, "auto", "cpu")])
def test_the_device_that_is_taken(monkeypatch, kind, wanted, device):
    found_by_torch(monkeypatch, kind)
    args, found = common.set_up(common.Args(device=wanted))
    assert found == torch.device(device) and (device == "cpu" or args.precision == "fp32")


@pytest.mark.parametrize("kind, wanted, remedy", [(None, "mps", "cpu"), ("xpu", "mps", "xpu"), (None, "xpu", "cpu"), ("mps", "cuda", "cpu")])
def test_a_device_that_is_not_there_is_one_line(monkeypatch, tmp_path, kind, wanted, remedy):
    found_by_torch(monkeypatch, kind)
    result = run_here("simclr", ["--device", wanted, "--out", tmp_path / "run"])
    assert is_one_line_error(result) and f"--device {wanted}: torch finds no" in result.err
    assert result.err.strip().endswith(f"try --device {remedy}") and not (tmp_path / "run").exists()


def test_cuda_comes_first_and_an_old_torch_has_the_cpu(monkeypatch):
    found_by_torch(monkeypatch, "mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(common, "set_up_gpu", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(common, "has_fast_bf16", lambda device: True)
    assert common.set_up(common.Args())[1].type == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delattr(torch, "accelerator")  # before torch 2.6
    assert common.set_up(common.Args())[1].type == "cpu"


def test_several_processes_take_the_cpu(monkeypatch):
    found_by_torch(monkeypatch, "mps")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert common.other_device("auto") == torch.device("cpu")
    with pytest.raises(common.UserError, match="--device mps: torch finds none, or not for several processes; try --device cpu"):
        common.other_device("mps")


def test_the_cpu_takes_over_only_while_a_run_lasts(monkeypatch):
    """Inside what gives_back decorates, what is not implemented runs on the CPU; after it, it is an error again."""
    found_by_torch(monkeypatch, "mps")
    asked = []

    class Lacks(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "eigh" in str(function):
                asked.append(function)
                if len(asked) % 2:
                    raise NotImplementedError("eigh")
            return function(*args, **kwargs or {})

    @common.gives_back
    def decompose():
        common.set_up(common.Args(device="mps"))
        return torch.linalg.eigh(torch.diag(torch.tensor([3.0, 1.0])))

    with Lacks():
        assert decompose()[0].tolist() == [1.0, 3.0] and len(asked) == 2
        with pytest.raises(NotImplementedError):
            torch.linalg.eigh(torch.eye(2))


if __name__ == "__main__":
    kept = register()
    with Everywhere():
        run_on_both(*sys.argv[1:])
