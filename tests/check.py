"""Checks your solutions, and says in words what is wrong.

    python check.py                 # all that is asked
    python check.py simclr          # one method
    python check.py simclr loss     # one part of it
    python check.py --train simclr  # trains it on `patterns`, for three minutes at most

`pytest` runs the same checks. In a notebook: `import check; check.check("simclr", "loss")`.

How it works: each part runs in a process of its own with a time limit, so an endless loop or a
crash costs that part only. The process calls your functions on the inputs of answers/*.json and
returns values and gradients. They are compared with the right ones there, and with those that the
usual mistakes give.
"""

import argparse
import contextlib
import functools
import importlib
import importlib.util
import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
SECONDS = 30  # time limit of a part, without the start of Python
TRAINING_SECONDS = 170  # then the run saves and ends
LAST_SECONDS = 20  # then an endless loop is ended
DRAWS = 24  # calls of a loss that draws at random
TOLERANCE = {"float64": 1e-6, "float32": 2e-3, "float16": 2e-3, "training": 1e-4}
# A tolerance is a share of the largest number of an array, at least of 1.
SHIFT = 1e-4  # a step for the slope of your values
LARGEST_FILE = 2**24  # bytes that a part may write into one file
LARGEST_MEMORY = 4 * 2**30  # bytes of a part's own data
LARGEST_ANSWER = 2**20  # bytes that are read back of it

# ==============================================================================
# 1. In the process of a part: call the functions, write down what they give
# ==============================================================================


def answer(folder):
    """Call all that folder/job.json asks for; write folder/results/NUMBER.NAME.npy or .error."""
    import torch

    job = json.loads((folder / "job.json").read_text())
    results = folder / "results"
    try:
        module = load_module(job["method"], job["file"])
    except BaseException as error:  # whatever the file does when it is imported
        (results / "error").write_text(in_one_line(error, job["file"]))
        return
    with np.load(folder / "inputs.npz") as inputs:
        inputs = dict(inputs)
    for number, case in enumerate(job["cases"]):
        prefix = f"{number}/"
        mine = {k[len(prefix):]: v for k, v in inputs.items() if k.startswith(prefix)}
        try:
            torch.manual_seed(0)
            outputs = CALLS[case["kind"]](module, case, mine)
            failed = outputs.pop("failed", None)
            for name, array in outputs.items():
                np.save(results / f"{number}.{name}.npy", np.asarray(array, float))
            if failed:  # in the backward pass: the value counts
                raise failed
        except BaseException as error:
            (results / f"{number}.error").write_text(in_one_line(error, job["file"]))


def load_module(name, path):
    """Import a method file by its path, so that nothing else with its name is found."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def in_one_line(error, file):
    """`TypeError: ... (line 93)`, with the last line of the student's file that it came through."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
    line = getattr(error, "lineno", None) or (lines[-1] if lines else None)
    text = " ".join(str(getattr(error, "msg", None) or error).split())
    return f"{type(error).__name__}: {text[:300]}" + (f" (line {line})" if line else "")


def call_function(module, case, inputs):
    """Value and gradients of a function of tensors; with draws, those of many calls, stacked."""
    calls = [call_once(module, case, inputs, seed) for seed in range(case["draws"] or 1)]
    if not case["draws"]:
        return calls[0]
    one = next((outputs for outputs in calls if "failed" in outputs), calls[0])
    stacked = {name: np.array([outputs[name] for outputs in calls]) for name in one
               if name != "failed"}
    return {**one, **stacked}


def call_once(module, case, inputs, seed):
    """One call: tensors and settings by their place, then the gradients of those in `wrt`."""
    import torch

    torch.manual_seed(seed)
    tensors = {}
    for name, array in inputs.items():
        dtype = torch.int64 if array.dtype.kind == "i" else getattr(torch, case["dtype"])
        tensors[name] = torch.tensor(array, dtype=dtype).requires_grad_(name in case["wrt"])
    given = {**case["settings"], **tensors, "generator": torch.Generator().manual_seed(seed)}
    for name in case["lists"]:
        given[name] = list(given[name])
    value = getattr(module, case["call"])(*[given.get(name) for name in case["order"]])
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{case['call']} returns {type(value).__name__}, not a tensor")
    value = value[:4, :4] if case["corner"] else value
    outputs = {"value": value.detach().double().numpy(), "bits": value.dtype.itemsize * 8}
    total = (value * tensors["probe"]).sum() if "probe" in tensors else value
    if total.dim():
        return outputs  # a loss with dimensions has no gradient
    return with_gradients(outputs, total, {name: tensors[name] for name in case["wrt"]})


def with_gradients(outputs, total, leaves):
    """The outputs with the gradients of some tensors, or with the error under `failed`."""
    import torch

    slopes = [None] * len(leaves)
    try:
        if leaves and total.requires_grad:
            slopes = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    except Exception as error:
        return {**outputs, "failed": error}
    for (name, leaf), slope in zip(leaves.items(), slopes):
        slope = torch.zeros_like(leaf) if slope is None else slope
        outputs[f"gradient of {name}"] = slope.double().numpy()
    return outputs


def call_model(module, case, inputs):
    """Loss and gradients of a small model with given weights, or its weights after a call."""
    import torch

    double = {name: torch.tensor(array, dtype=torch.float64) for name, array in inputs.items()}
    views = list(double.pop("views"))
    features, pixels = double["backbone.1.weight"].shape
    linear = torch.nn.Linear(pixels, features, bias=False)
    args = module.Args(**case["settings"])
    model = getattr(module, case["call"])(torch.nn.Sequential(torch.nn.Flatten(), linear),
                                          features, args).double()
    state = model.state_dict()
    for name, tensor in double.items():
        if name not in state or state[name].shape != tensor.shape:
            raise ValueError(f"{case['call']} has no weights {name} of shape {list(tensor.shape)}; "
                             "leave __init__ as it is")
        state[name].copy_(tensor)
    kept = {name: getattr(module, name) for name in STAND_INS if hasattr(module, name)}
    if case["stand_in"]:
        vars(module).update({name: STAND_INS[name] for name in kept})
    try:
        outputs = use_model(model, case, views)
    finally:
        vars(module).update(kept)
    state = model.state_dict()
    for name in set(case["values"]) - {"value", *outputs}:
        outputs[name] = state[name].double().numpy()
    return outputs


def use_keys(model, images):
    """MoCo's keys of some images, and 1.0 if the target saw the images in random orders."""
    import torch

    seen = []
    model.target_backbone.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    for seed in range(8):
        torch.manual_seed(seed)
        keys = model.keys(images)
    shuffled = any(not torch.equal(x, seen[0]) for x in seen)
    return {"keys": keys.detach().double().numpy(), "shuffled": float(shuffled)}


def use_model(model, case, views):
    """Call forward or update_target -> the loss and its gradients, if there is a loss."""
    import torch

    if case["does"] == "update_target":
        model.update_target(*case["progress"])
        return {}
    if case["does"] == "keys":
        return use_keys(model, views[0])
    for _ in range(case["times"]):
        loss = model(views)
    if not isinstance(loss, torch.Tensor) or loss.dim():
        raise TypeError("forward should return a tensor without dimensions, the loss")
    outputs = {"value": loss.detach().double().numpy()}
    weights = dict(model.named_parameters())
    return with_gradients(outputs, loss, {name: weights[name] for name in case["wrt"]})


def call_training(module, case, inputs):
    """The outputs of run_training(), which runs once; or its error once more."""
    if module not in TRAINED:
        try:
            TRAINED[module] = run_training(module, case, inputs)
        except BaseException as error:
            TRAINED[module] = error
    if isinstance(TRAINED[module], BaseException):
        raise TRAINED[module]
    return TRAINED[module]


def run_training(module, case, inputs):
    """Run train() on a few images with a model that notes what reaches it."""
    import torch

    write_images(Path("images"), inputs["images"])
    args = module.Args(**case["settings"], **RECIPE, data_dir="images", out="run")
    torch.manual_seed(1)
    model = recording_model(case["progress"])
    run = module.train(args, build=lambda args: model)
    loss = [row["loss"] for row in run.rows]
    return {**{k: np.array(v) for k, v in model.seen.items()}, "loss": loss}


TRAINED = {}  # module -> outputs, or the error
RECIPE = dict(dataset="folder", device="cpu", precision="fp32", num_workers=0, epochs=2, lr=0.1,
              warmup=2, optimizer="sgd", weight_decay=0.01, log_every=1, eval_every=2,
              image_size=8, seed=3)


def write_images(folder, images):
    """uint8 [24, 3, 8, 8] as PNG files of two classes: 18 to train on, 6 to test."""
    from PIL import Image

    for i, image in enumerate(images):
        place = folder / ("train" if i < 18 else "test") / f"class{i % 2}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.astype(np.uint8).transpose(1, 2, 0)).save(place / f"{i:02}.png")


def recording_model(with_target):
    """A small model that notes in `seen` what train() does with it, step by step."""
    import torch

    class Recorder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 3))
            self.projector, self.predictor = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
            self.predictor.constant_lr = True
            for number, weights in enumerate(self.parameters(), 1):
                wave = torch.arange(weights.numel()).mul(number).cos().view_as(weights)
                weights.data.copy_(wave / weights.shape[-1] ** 0.5)
            self.seen = {"views": [], "draws": [], "weights": []}
            if with_target:
                self.seen.update(progress=[], target=[])

        def noted(self):
            return torch.cat([w.detach().flatten()[:4] for w in self.parameters()]).numpy()

        def forward(self, views):
            z = [self.projector(self.backbone(x)) for x in views]
            if self.training:
                self.seen["views"].append([x.mean((1, 2, 3)).numpy() for x in views])
                self.seen["weights"].append(self.noted())
                self.seen["draws"].append(torch.rand(3).numpy())
                steps = [draw.tolist() for draw in self.seen["draws"]]
                if len(steps) > 6 and steps[6] in steps[:6]:  # two epochs have 6
                    raise RuntimeError("a step comes again and again: is 1 added to `step`?")
            return (self.predictor(z[0]) - z[1]).square().mean()

    if with_target:
        def update_target(self, progress):
            self.seen["progress"].append(progress)
            self.seen["target"].append(self.noted())

        Recorder.update_target = update_target
    return Recorder()


# In the place of the loss, so that a model can be right though its loss is not: functions with the
# same arguments that have little else in common with a loss.


def unit(z):
    return z / z.norm(dim=1, keepdim=True)


def of_pair(z1, z2, *numbers):
    channel = (z1.detach() * 0 + 1).cumsum(1)  # 1, 2, 3, ...
    weight = 1 + sum((i + 1) * float(number) for i, number in enumerate(numbers))
    return weight * (z1 * z2 * channel).sum(1).mean()


class StandIn:
    def nt_xent_loss(z1, z2, temperature=0.5):
        return of_pair(unit(z1), unit(z2), temperature)

    def info_nce_loss(q, k, queue, temperature=0.1):
        q, k = unit(q), unit(k).detach()
        return of_pair(q, k, temperature) + (q @ queue.T).square().mean()

    def byol_loss(p, z):
        return of_pair(unit(p), unit(z).detach())

    def negative_cosine(p, z):
        return of_pair(unit(p), unit(z))

    def barlow_twins_loss(z1, z2, lambd=0.0051):
        return of_pair(z1, z2, lambd)

    def vicreg_loss(z1, z2, inv_weight=25.0, var_weight=25.0, cov_weight=1.0):
        return of_pair(z1, z2, inv_weight, var_weight, cov_weight)

    def wmse_loss(views, w_size=128, w_iter=1, kind="cholesky", eps=0.0, generator=None):
        return sum(of_pair(z1, z2, w_size, w_iter, len(kind), eps)
                   for z1, z2 in itertools.combinations(views, 2)) / len(views)

    def shuffled_dbn_loss(z1, z2, groups=0, generator=None, shuffle=True):
        return of_pair(z1, z2, groups, shuffle)

    def cw_rgp_loss(views, groups=4, w_size=64, w_iter=4, eps=0.0, generator=None):
        return sum(of_pair(z1, z2, groups, w_size, w_iter, eps)
                   for z1, z2 in itertools.combinations(views, 2)) / len(views)


STAND_INS = {name: f for name, f in vars(StandIn).items() if not name.startswith("_")}
CALLS = {"function": call_function, "model": call_model, "training": call_training}

# ---- A process for each part -------------------------------------------------


def work(path):
    """`python -I check.py --work FILE`: the parts of one student, one after the other.

    Starts torch once. Where the system can fork, each part is a fork of this process; elsewhere a
    new Python. Prints for each part how it ended."""
    plan = json.loads(Path(path).read_text())
    sys.path += [place for place in plan["packages"] if place not in sys.path]
    sys.dont_write_bytecode = True
    import torch

    torch.set_num_threads(1)
    control_process(36, 1)  # PR_SET_CHILD_SUBREAPER: what a part leaves behind becomes a child
    try:
        load_module("common", plan["common"])
    except Exception as error:
        words = f"common.py cannot be imported: {in_one_line(error, plan['common'])}"
        for folder in plan["jobs"]:
            (Path(folder) / "results" / "error").write_text(words)
        print(json.dumps("ready"))
        return
    print(json.dumps("ready"), flush=True)
    for folder in plan["jobs"]:
        sys.stdout.flush()
        run = run_forked if hasattr(os, "fork") and sys.platform == "linux" else run_spawned
        print(json.dumps(run(Path(folder), plan)), flush=True)


def run_forked(folder, plan):
    """Answer in a fork, in a process group of its own -> how it ended."""
    pid = os.fork()
    if pid == 0:
        try:
            confine(folder, plan)
            answer(folder)
        finally:
            os._exit(0)
    end = time.monotonic() + plan["seconds"]
    ended = None
    while ended is None and time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        ended = "" if done and status == 0 else f"signal {status & 127}" if done else None
        time.sleep(0.01)
    kill_all(pid)
    late = ended in (None, f"signal {signal.SIGXCPU}")
    return f"time limit of {plan['seconds']} seconds" if late else ended


def control_process(option, value):
    """Linux's prctl; nothing elsewhere."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(option, value)


def kill_all(pid):
    """End a part, its process group, and all that it has started besides."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except OSError:
        pass
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    while children.exists() and children.read_text():
        for child in map(int, children.read_text().split()):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def run_spawned(folder, plan):
    """Answer in a new Python (systems that cannot fork) -> how it ended."""
    command = [sys.executable, "-I", __file__, "--answer", str(folder), plan["common"]]
    with open(folder / "output.txt", "wb") as output:
        child = subprocess.Popen(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=output,
                                 stderr=output)
        try:
            return "" if child.wait(plan["seconds"] + 20) == 0 else "signal"
        except subprocess.TimeoutExpired:
            child.kill()
            return f"time limit of {plan['seconds']} seconds"


def confine(folder, plan):
    """Limits of time, memory and output for this process; its words go to a file."""
    import resource

    os.setpgid(0, 0)
    control_process(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends with the process that forked it
    os.chdir(folder)
    os.environ.update(dict.fromkeys(("HOME", "TMPDIR", "MPLCONFIGDIR"), str(folder)))
    tempfile.tempdir = str(folder)
    null = os.open(os.devnull, os.O_RDONLY)
    output = os.open("output.txt", os.O_WRONLY | os.O_CREAT)
    for number, stream in enumerate((null, output, output)):
        os.dup2(stream, number)
    os.closerange(3, 256)
    limits = {"RLIMIT_CPU": int(plan["seconds"]) + 1, "RLIMIT_FSIZE": LARGEST_FILE,
              "RLIMIT_DATA": LARGEST_MEMORY, "RLIMIT_NPROC": 4096, "RLIMIT_CORE": 0}
    for name, limit in limits.items():
        try:
            resource.setrlimit(getattr(resource, name), (limit, limit))
        except (OSError, ValueError):
            pass  # a system without this limit
    if plan["strict"]:
        fence(folder)


def fence(folder):
    """When it counts: no reading outside Python's own folders and this one, no other programs.

    It stops what Python can see and no more. It is not a sandbox: grade unknown code in a
    container."""
    readable = [sys.prefix, sys.base_prefix, folder, "/dev/null", "/dev/urandom", "/proc/cpuinfo",
                "/usr/share/zoneinfo", *filter(None, sys.path)]
    readable = [os.path.realpath(place) for place in readable]
    home = os.path.realpath(folder)
    forbidden = ("os.fork", "os.exec", "os.spawn", "os.posix_spawn", "os.system", "os.kill",
                 "subprocess", "socket", "ctypes", "pty", "signal.pthread_kill")
    changes = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink",
               "os.truncate", "os.chmod", "os.chown", "shutil")

    def inside(path, places):
        if isinstance(path, int):
            return True
        path = os.path.realpath(os.fsdecode(path))
        return any(path == place or path.startswith(place + os.sep) for place in places)

    def look(event, arguments):
        if event.startswith(forbidden):
            raise PermissionError(f"{event} is not allowed here")
        if event == "open" and arguments[0] is not None:
            path, mode, flags = arguments
            writes = any(c in (mode or "") for c in "wax+") or (flags or 0) & os.O_ACCMODE
            if not inside(path, [home, os.devnull] if writes else readable):
                raise PermissionError(f"opening {path} is not allowed here")
        if event in ("os.listdir", "os.scandir") and not inside(arguments[0] or ".", readable):
            raise PermissionError(f"listing {arguments[0]} is not allowed here")
        if event.startswith(changes):
            if not all(inside(a, [home]) for a in arguments if isinstance(a, (str, bytes))):
                raise PermissionError(f"{event} is not allowed here")

    def refuse(*_):
        raise PermissionError("starting a program is not allowed here")

    for name in ("_posixsubprocess", "subprocess"):  # multiprocessing calls it without an event
        module = importlib.import_module(name)
        vars(module).update({f: refuse for f in ("fork_exec", "_fork_exec") if hasattr(module, f)})
    sys.addaudithook(look)


# ==============================================================================
# 2. Outside of it: hand over the inputs, read back the arrays
# ==============================================================================


def run_parts(parts, root, seconds, strict=False):
    """Run parts, each a dict of `method`, `file` and `cases`, as one student's -> their outputs.

    Gives for each part (outputs, note): a dict of arrays for each case, or {"error": text}, and
    how the process ended. root: the folder with common.py."""
    with tempfile.TemporaryDirectory(prefix="check-", ignore_cleanup_errors=True) as place:
        place = Path(place).resolve()
        (place / "check.py").write_bytes(Path(__file__).read_bytes())
        folders = [place / f"{os.urandom(8).hex()}" for _ in parts]
        for part, folder in zip(parts, folders):
            prepare(part, folder, place)
        (place / "common.py").write_bytes((root / "common.py").read_bytes())
        plan = {"common": str(place / "common.py"), "jobs": list(map(str, folders)),
                "seconds": seconds, "strict": strict,
                "packages": [place for place in sys.path if "-packages" in place]}  # torch's, too
        (place / "plan.json").write_text(json.dumps(plan))
        notes = start(place, seconds * len(parts) + 120)
        notes += ["signal"] * (len(parts) - len(notes))
        return [(read_results(folder / "results", part["cases"]), note)
                for part, folder, note in zip(parts, folders, notes)]


def prepare(part, folder, place):
    """The folder of a part: the student's file alone, what to call, and the inputs."""
    (folder / "results").mkdir(parents=True)
    (folder / "methods").mkdir()
    file = folder / "methods" / f"{part['method']}.py"
    file.write_bytes(Path(part["file"]).read_bytes())
    asked = ("kind", "call", "order", "settings", "lists", "wrt", "dtype", "draws", "corner",
             "values", "stand_in", "does", "times", "progress")
    cases = [{key: case.get(key) for key in asked} for case in part["cases"]]
    job = {"method": part["method"], "file": str(file), "cases": cases}
    (folder / "job.json").write_text(json.dumps(job))
    inputs = {}
    for number, case in enumerate(part["cases"]):
        for name, array in inputs_of(case).items():
            inputs[f"{number}/{name}"] = array
    np.savez(folder / "inputs.npz", **inputs)


def inputs_of(case):
    """Arrays from lists; {"normal": shape, "seed": number} stands for many numbers."""
    arrays = {}
    for name, value in case["inputs"].items():
        if isinstance(value, dict):
            rng = np.random.default_rng(value["seed"])
            arrays[name] = rng.standard_normal(value["normal"])
        else:
            whole = name == "permutation"
            arrays[name] = np.array(value, np.int64 if whole else np.float64)
    return arrays


def start(place, seconds):
    """Run the worker -> how each part ended, as far as it came."""
    names = "PATH", "LD_LIBRARY_PATH", "SYSTEMROOT", "TMPDIR", "TEMP"
    kept = {name: value for name, value in os.environ.items() if name in names}
    environment = {**kept, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HOME": str(place)}
    command = [sys.executable, "-I", str(place / "check.py"), "--work", str(place / "plan.json")]
    with open(place / "worker.txt", "wb") as words:
        worker = subprocess.Popen(command, cwd=place, env=environment, stdin=subprocess.DEVNULL,
                                  stdout=subprocess.PIPE, stderr=words, start_new_session=True)
        try:
            said, _ = worker.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            worker.kill()
            said, _ = worker.communicate()
        finally:  # after Ctrl-C too
            worker.kill()
    if b'"ready"' not in said:
        words = (place / "worker.txt").read_text(errors="replace").split("\n")
        reason = next(filter(None, map(str.strip, reversed(words))), f"not a word in {seconds} s")
        refuse(f"{sys.executable} could not import torch to run the functions ({reason})")
    notes = []
    for line in said.decode(errors="replace").splitlines():
        with contextlib.suppress(ValueError):  # a part's own words
            notes.append(json.loads(line))
    return [note for note in notes if note != "ready"]


def read_results(folder, cases):
    """What a part has written -> for each case a dict of arrays, or of its error."""
    failed = read_file(folder / "error")
    if failed is not None:
        return [{"error": in_words(failed)} for _ in cases]
    found = []
    for number, case in enumerate(cases):
        outputs = {}
        for name in [*names_of(case)["both"], "bits"]:
            array = read_array(read_file(folder / f"{number}.{name}.npy"))
            if array is not None:
                outputs[name] = array
        failed = read_file(folder / f"{number}.error")
        if failed is not None:
            outputs["error"] = in_words(failed)
        found.append(outputs)
    return found


def read_file(path):
    """The bytes of a plain file that is not too large, or None."""
    try:
        if path.is_symlink() or not path.is_file() or path.stat().st_size > LARGEST_ANSWER:
            return None
        return path.read_bytes()
    except OSError:  # a part can take the right to read it
        return None


def in_words(content):
    return "".join(c for c in content[:400].decode("utf-8", "replace") if c.isprintable())


def read_array(content):
    """A float64 array from the bytes of an .npy file, or None. Never a pickle."""
    if content is None:
        return None
    try:
        array = np.load(io.BytesIO(content), allow_pickle=False)
        return array if isinstance(array, np.ndarray) and array.dtype == np.float64 else None
    except Exception:
        return None


# ==============================================================================
# 3. Judge: compare with what is right, and with the usual mistakes
# ==============================================================================


def judge(part, answers, note):
    """The report of a part: rows of name, points, of (the most points), extra and text."""
    rows = []
    for group in part["groups"]:
        own = [(case, out) for case, out in zip(part["cases"], answers)
               if case["group"] == group["name"]]
        main = [pair for pair in own if not pair[0]["extra"]]
        judged = judge_group(group, [pair for pair in main if not pair[0].get("stand_in")], note)
        apart = [pair for pair in main if pair[0].get("stand_in")]
        if apart and total(judged) < total(judged, "of"):
            judged = max(judged, judge_group(group, apart, note), key=total)
        right = total(judged) == total(judged, "of")
        rows += judged + [judge_extra(*pair, right) for pair in own if pair[0]["extra"]]
    return rows


def judge_anything(part, answers, note):
    """judge(), also for arrays of shapes that nobody has thought of."""
    try:
        return judge(part, answers, note)
    except Exception:
        error = {"error": "what the functions return cannot be compared with anything"}
        return judge(part, [error] * len(answers), note)


def judge_group(group, answered, note):
    """Two rows: the values of one function (or model), and its gradients."""
    values, gradients, both = "values", "gradients", "both"
    wrong = {what: [pair for pair in answered if not is_like(*pair, pair[0]["expected"], what)]
             for what in (values, gradients, both)}
    misses = {"value": wrong[values], "gradient": wrong[gradients if wrong[values] else both]}
    mistake = recognise(group, answered, both, any(misses.values()))
    if not mistake and wrong[values]:
        mistake = recognise(group, answered, values, True)
    slopes = slopes_of(answered)
    rounding = 1e-4 if wrong[values] else 1e-2  # of a loss in float32
    if slopes and not close(*slopes, rounding) and not misses["gradient"]:
        misses["gradient"] = [pair for pair in answered if "direction" in pair[0]]
    if not any(misses.values()):  # each draw is possible; are all of them made?
        misses["value"] = answered if mistake else [p for p in answered if is_constant(*p)]
    rows = []
    for what, points in group["points"].items():
        row = dict(name=f"{group['name']}: {what}", points=0, of=points, extra=False)
        if not misses[what]:
            row.update(points=points, text="right")
        else:
            row["text"] = in_short(misses[what], note)
            told = row["text"] and "not written yet" not in row["text"]
            if told and len(misses[what]) < len(answered):
                row["text"] += f". The case: {in_numbers(misses[what][0][0])}."
        if not row.get("text"):
            row["text"] = in_full(group, mistake, what, misses[what])
            if what == "gradient" and not mistake:
                row["text"] += slope_hint(answered, wrong[values])
        rows.append(row)
    return rows


def judge_extra(case, output, right):
    """The row of an extra point; only who has all other points gets it."""
    good = right and is_like(case, output, case["expected"], "values")
    if case["extra"] == "half precision":
        good = good and output.get("bits") == 32
    text = "right" if good else case["asked"]
    name = f"{case['group']}: {case['extra']}"
    return dict(name=name, points=int(good), of=1, extra=True, text=text)


def recognise(group, answered, what, wrong):
    """The mistake that explains the outputs of all cases, or None.

    If no output is wrong by itself, a mistake is one that makes some of the right draws only."""
    found = {}
    for key in group["mistakes"]:
        cases = [pair for pair in answered if key in pair[0]["mistakes"]]
        explained = cases and all(is_like(*pair, pair[0]["mistakes"][key], what) for pair in cases)
        if explained and (wrong or any(is_narrower(case, key) for case, _ in cases)):
            found[key] = sum(len(case["mistakes"][key]) for case, _ in cases)
    return min(found, key=found.get, default=None)  # the one that makes the fewest draws


def is_narrower(case, key):
    """Does a mistake never make some of the right draws?"""
    made = [outcome.get("value") for outcome in case["mistakes"][key]]
    tolerance = TOLERANCE[case["dtype"]]
    return not all(any(close(right.get("value"), value, tolerance) for value in made)
                   for right in case["expected"])


def is_constant(case, outputs):
    """Does a loss that should draw at random have one value in all calls?"""
    right = [outcome.get("value") for outcome in case["expected"]]
    tolerance = TOLERANCE[case["dtype"]]
    if not case["draws"] or all(close(value, right[0], tolerance) for value in right):
        return False
    return all(close(value, outputs["value"][0], tolerance) for value in outputs["value"])


def is_like(case, outputs, outcomes, what):
    """Are the outputs those of one of the outcomes? With draws: is each draw's?"""
    names = names_of(case)[what]
    there = all(name in outputs for name in names)
    if "error" in outputs and not (names and there):
        # a decomposition that fails in one system gives NaN in another
        return not any(np.isfinite(outcome.get("value", 0)).any() for outcome in outcomes)
    if not there:
        return False
    draws = [outputs]
    if case["draws"]:
        draws = [dict(zip(names, draw)) for draw in zip(*(outputs[name] for name in names))]
        if names and len(draws) != case["draws"]:
            return False
    return all(any(all(close(draw[name], outcome[name], TOLERANCE[case["dtype"]])
                       for name in names) for outcome in outcomes) for draw in draws)


def names_of(case):
    """The outputs that are compared, by what is looked at."""
    gradients = [f"gradient of {name}" for name in case["wrt"]]
    return {"values": case["values"], "gradients": gradients, "both": case["values"] + gradients}


def close(a, b, tolerance):
    """True if shapes agree and no number is off by more than tolerance times the largest of b."""
    a, b = np.asarray(a, float), np.asarray(b, float)
    if a.shape != b.shape or not np.array_equal(np.isfinite(a), np.isfinite(b)):
        return False
    good = np.isfinite(b)
    size = max(1.0, np.abs(b[good]).max(initial=0))
    return bool((np.abs(a[good] - b[good]) <= tolerance * size).all())


# ---- In words ----------------------------------------------------------------


def in_short(misses, note):
    """One line if there is nothing to compare: not written, an error, no answer. Else ""."""
    _, output = misses[0]
    error = output.get("error")
    if error and error.startswith("NotImplementedError"):
        line = re.search(r"\(line (\d+)\)$", error)
        return f"line {line[1]} is not written yet" if line else "not written yet"
    if error:
        return error
    if not any(name in output for name in misses[0][0]["values"]):
        if note.startswith("time"):
            return f"stopped at the {note}: perhaps an endless loop"
        return f"Python ended before it gave an answer ({note or 'it left early'})"
    return ""


def in_full(group, mistake, what, misses):
    """What is wrong with a value or a gradient, and if it is known, why."""
    shown = misses[0]
    if mistake:
        known = [pair for pair in misses if mistake in pair[0]["mistakes"]]
        telling = [pair for pair in known if what == "value" and is_narrower(pair[0], mistake)]
        shown = (telling or known or misses)[0]
    text, mine = difference(*shown, what)
    if mistake:
        return f"{text} {mine} is what one gets when {group['mistakes'][mistake]}."
    text += f" The case: {in_numbers(shown[0])}."
    if what == "gradient" and group.get("hint"):
        numbers = [shown[1].get(name, 0) for name in names_of(shown[0])["gradients"]]
        if not all((np.abs(array) < 1e6).all() for array in numbers):
            text += f" {group['hint']}"
    return text


def difference(case, output, what):
    """`Your loss is 1.9630; 1.5397 is expected.`, and how the sentence goes on: `1.9630`."""
    names = case["values"] if what == "value" else names_of(case)["gradients"]
    if case["draws"]:
        return difference_of_draws(case, output, what), "This"
    for name in names:
        mine, right = output.get(name), np.asarray(case["expected"][0][name], float)
        label = case.get("label", name) if name == "value" else name
        if mine is None:
            return f"There is no {name}, since the value is not a scalar.", "This"
        if close(mine, right, TOLERANCE[case["dtype"]]):
            continue
        if mine.shape != right.shape:
            shapes = [f"the shape {list(x.shape)}" if x.shape else "no dimensions"
                      for x in (mine, right)]
            return f"Your {label} has {shapes[0]}; {shapes[1]} is expected.", "This"
        apart = np.where(np.isfinite(mine), np.abs(mine - right), np.inf)
        if case["dtype"] == "training":  # the first step that differs
            off = apart > TOLERANCE["training"] * np.abs(right).max(initial=1)
            first = off.reshape(len(off), -1).any(axis=1).argmax()
            apart[np.arange(len(apart)) != first] = 0
        place = np.unravel_index(np.argmax(apart), right.shape)
        a, b = two_numbers(mine[place], right[place])
        where = f" at {list(map(int, place))}" if place else ""
        verb = "are" if name in ("weights", "views", "draws", "keys") else "is"
        if name == "shuffled":
            words = "Your keys are right, but the target sees the images in one order always."
            return words, "This"
        return f"Your {label}{where} {verb} {a}; {b} is expected.", "This" if place else a
    return "Value and gradient do not belong together.", "This"


def difference_of_draws(case, output, what):
    """What is said of many calls of a loss that draws at random."""
    if what == "gradient":
        return "Your gradient is not one that a random draw can give."
    seen = sorted({f"{float(v):.4f}" for v in np.ravel(output["value"])})
    right = sorted({f"{float(o['value']):.4f}" for o in case["expected"]})
    first, second = (", ".join(some[:6]) + (", ..." if len(some) > 6 else "")
                     for some in (seen, right))
    return f"In {case['draws']} calls, your loss has the values {first}; possible are {second}."


def two_numbers(a, b):
    """Both with as many digits as it takes to tell them apart."""
    for digits in range(4, 12):
        if f"{a:.{digits}f}" != f"{b:.{digits}f}":
            break
    return f"{a:.{digits}f}", f"{b:.{digits}f}"


def in_numbers(case):
    """The inputs of a case, to redo it by hand."""
    if case["dtype"] == "training":
        return "a run of two epochs of three steps; the first index is the step (loss: the epoch)"
    arrays = {name: value for name, value in case["inputs"].items() if name != "probe"}
    parts = [f"{name} = {json.dumps(rounded(value))}" for name, value in arrays.items()]
    parts += [f"{name} = {value}" for name, value in case["settings"].items()]
    text = ", ".join(parts)
    if len(text) > 700:
        text = f"number {case['name']} of `{case['group']}` in answers/, {case['settings']}"
    return text


def rounded(value):
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return int(value) if value == int(value) else round(value, 6)


def slope_hint(answered, values_are_wrong):
    """Whether a wrong gradient is at least the slope of the values."""
    slopes = slopes_of(answered)
    if slopes and not close(*slopes, 1e-4):
        return (" Your gradient is not the slope of your values either: something cuts or changes "
                "it (detach, no_grad, .item(), .data, numpy, or a backward of your own).")
    if slopes and values_are_wrong:
        return " It is the slope of your values, so look for the mistake there."
    return ""


def slopes_of(answered):
    """The slope along a direction by differences of the returned values, and by the gradient.

    None if the values are missing or the task has a gradient that is held back on purpose."""
    base = [pair for pair in answered if "direction" in pair[0] and pair[0]["wrt"]]
    ends = sorted((case["moved"], out["value"]) for case, out in answered
                  if "moved" in case and "value" in out)
    if not base or len(ends) < 2 or "error" in base[0][1]:
        return None
    case, output = base[0]
    apart = (ends[1][1] - ends[0][1]) / (2 * SHIFT)
    if "probe" in case["inputs"]:
        probe = np.array(case["inputs"]["probe"])
        if apart.shape != probe.shape:
            return None
        apart = (apart * probe).sum()
    if not all(f"gradient of {name}" in output for name in case["direction"]):
        return None
    along = sum((output[f"gradient of {name}"] * np.array(direction)).sum()
                for name, direction in case["direction"].items())
    return along, apart


# ==============================================================================
# 4. The report
# ==============================================================================


@functools.cache
def report():
    """{(method, part): rows} of the whole homework, see judge()."""
    return dict(zip(homework(), check_parts(homework())))


def check_parts(wanted):
    """The rows of each (method, part), all of a method in one start of Python."""
    parts = []
    for method, part in wanted:
        parts.append({**answers_in(method)[part], "method": method, "part": part,
                      "file": HERE / "methods" / f"{method}.py"})
    return grade(parts, HERE, SECONDS)


def grade(parts, root, seconds, strict=False):
    """Run and judge parts -> a list of rows for each. A missing file costs its own parts only."""
    there = [part for part in parts if part["file"] and Path(part["file"]).is_file()]
    ran = iter(run_parts(there, root, seconds, strict) if there else [])
    rows = []
    for part in parts:
        if part in there:
            rows.append(judge_anything(part, *next(ran)))
        else:
            error = {"error": f"methods/{part['method']}.py is missing, or cannot be read"}
            rows.append(judge(part, [error] * len(part["cases"]), ""))
    return rows


def refuse(message):
    """End with one line and status 2."""
    print(f"check.py: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def answers_in(name):
    """The content of answers/NAME.json."""
    path = HERE / "answers" / f"{name}.json"
    needed = {"methods", "parts", "knn"} if name == "task" else answers_in("task")["parts"]
    try:
        content = json.loads(path.read_text())
        lacking = ", ".join(sorted(set(needed) - set(content)))
        if lacking:
            raise ValueError(f"no {lacking} in it")
        return content
    except FileNotFoundError:
        refuse(f"there is no answers/{name}.json; run the check.py in the folder of handout.py")
    except (OSError, TypeError, ValueError) as error:
        refuse(f"answers/{name}.json cannot be read ({error}); take it from the homework again")


def homework():
    """All (method, part) that are asked, in order."""
    task = answers_in("task")
    if not (HERE / "common.py").is_file():
        refuse("there is no common.py beside check.py; take it from the homework again")
    return [(method, part) for method in task["methods"] for part in task["parts"]]


def check(method=None, part=None, row=None):
    """Print the report; for notebooks too. Returns True if all points but the extra ones are won.

    method, part, row: only these."""
    wanted = [(m, p) for m, p in homework() if method in (None, m) and part in (None, p)]
    if not wanted:
        known = ", ".join(f"{m} {p}" for m, p in homework())
        refuse(f"nothing is asked under that name; try {known}")
    won, most, extra = 0, 0, 0
    reports = list(check_parts(wanted))
    names = [one["name"] for rows in reports for one in rows]
    if row not in (None, *names):
        refuse(f"no line is called {row}; try {', '.join(names)}")
    for (method, part), rows in zip(wanted, reports):
        rows = [one for one in rows if row in (None, one["name"])]
        print(f"\n{method}, {part}: {total(rows)} of {total(rows, 'of')} points")
        for one in rows:
            points = f"{one['points']}/{one['of']}" + (" extra" if one["extra"] else "")
            print(f"  {one['name']:42} {points:10} {one['text']}")
        won, most = won + total(rows), most + total(rows, "of")
        extra += sum(one["points"] for one in rows if one["extra"])
    print(f"\nTogether: {won} of {most} points" + (f", and {extra} extra" if extra else ""))
    return won == most


def total(rows, key="points"):
    return sum(row[key] for row in rows if not row["extra"])


def rows_of(method, part):
    """The names of the rows that win points."""
    return [f"{group['name']}: {what}" for group in answers_in(method)[part]["groups"]
            for what in group["points"]]


def pytest_generate_tests(metafunc):
    if "row" in metafunc.fixturenames:
        rows = [(m, p, row) for m, p in homework() for row in rows_of(m, p)]
        metafunc.parametrize("method, part, row", rows, ids=map(", ".join, rows))


def test_row(method, part, row):
    import pytest

    (found,) = [one for one in report()[method, part] if one["name"] == row]
    if found["points"] < found["of"]:
        pytest.fail(found["text"], pytrace=False)


# ---- Training ----------------------------------------------------------------


def train(method):
    """Train a method for three minutes at most, and compare its 20-NN with the reference's."""
    out = HERE / "runs" / f"check-{method}-{time.strftime('%H%M%S')}"
    command = [sys.executable, str(HERE / "methods" / f"{method}.py"), "--out", str(out)]
    print(f"{method}: {' '.join(command[1:])}, for three minutes at most", flush=True)
    child = subprocess.Popen(command, cwd=HERE, stdout=subprocess.PIPE, text=True)
    timers = [threading.Timer(TRAINING_SECONDS, child.terminate),
              threading.Timer(TRAINING_SECONDS + LAST_SECONDS, child.kill)]
    for timer in timers:
        timer.daemon = True  # Ctrl-C need not wait for it
        timer.start()
    accuracy = None
    for line in child.stdout:
        print("  " + line.rstrip(), flush=True)
        found = re.search(r"kNN +([\d.]+) %", line)
        accuracy = float(found[1]) if found else accuracy
    child.wait()
    for timer in timers:
        timer.cancel()
    if accuracy is None:
        print(f"{method}: no 20-NN was measured")
        return False
    words, learned = compare_knn(accuracy, answers_in("task")["knn"][method])
    early = "" if child.returncode == 0 else " It did not come to its end, the reference did."
    print(f"{method}: {words}{early}")
    return learned


def compare_knn(accuracy, known):
    """(words, whether it has learned): 20-NN in percent beside that of the reference's seeds."""
    low, high = min(known), max(known)
    spread = max(high - low, 2.0)
    words = (f"Your 20-NN is {accuracy:.1f} %. The reference has {low} to {high} % with "
             f"{len(known)} seeds; an untrained network has about 26 %.")
    if accuracy >= low - spread:
        return f"{words} It learns as it should.", True
    if accuracy > 35:
        return f"{words} It learns, but less than the spread of the seeds explains.", False
    return f"{words} It does not learn.", False


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "check.py").split("\n")[0])
    parser.add_argument("method", nargs="?", help="simclr, for example (default: all)")
    parser.add_argument("part", nargs="?", help="loss, model or training (default: all)")
    parser.add_argument("row", nargs="?", help="one line of the report, as `whiten: value`")
    parser.add_argument("--train", action="store_true", help="train it, three minutes at most")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--answer", nargs=2, help=argparse.SUPPRESS)
    parser.error = lambda message: refuse(f"{message}; see check.py --help")
    args = parser.parse_args()
    if args.work:
        return work(args.work)
    if args.answer:
        load_module("common", args.answer[1])
        return answer(Path(args.answer[0]))
    if args.train:
        methods = [m for m in dict(homework()) if args.method in (None, m)]
        if not methods:
            known = ", ".join(dict(homework()))
            refuse(f"{args.method} is not asked; try {known}")
        return sys.exit(0 if all([train(method) for method in methods]) else 1)
    sys.exit(0 if check(args.method, args.part, args.row) else 1)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
