"""Checkpoints that were edited or damaged inside: --resume and eval.py refuse them in one line, or take previous.pt.

The file itself is whole (zip, checksums, pickle): only an entry of it is not what the run wrote. Each edit is one of three
kinds: `bad` is refused by both scripts; `unused` is an entry that eval.py does not need (the optimizer's state, for example), so
only --resume refuses it; `harmless` changes no number of the run, and both scripts work."""

import copy
import math
import random
import shutil
import signal

import pytest
import torch

import common
from conftest import SMALL_OF, is_one_line_error, make_folder, run_here, save_edited
from test_resume import first_difference, left_by, stop_in_step

RUNS = {"moco": [], "wmse": ["--optimizer", "lars"], "byol": ["--optimizer", "muon"], "simclr": ["--optimizer", "sgd"]}
BAD, UNUSED, HARMLESS = "bad", "unused", "harmless"
QUICK = ["--device", "cpu", "--probe-epochs", "0", "--features", "H,Z"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """64 training and 16 test images of 16x16: four steps of 16."""
    return make_folder(tmp_path_factory.mktemp("edited"), train=64, test=16, side=16)


def arguments(method, images, out, *more):
    return ["--device", "cpu", "--batch-size", "16", "--epochs", "2", "--precision", "fp32", "--log-every", "1", "--proj-hidden", "32",
            *SMALL_OF[method], "--image-size", "8", "--dataset", "folder", "--data-dir", str(images), *RUNS[method],
            "--out", str(out), *map(str, more)]


@pytest.fixture(scope="module")
def stopped(images, tmp_path_factory):
    """stopped(method) -> folder of a run after step 5 of 8: its last.pt is in mid-epoch, its previous.pt of step 4."""
    known = {}

    def get(method):
        if method not in known:
            known[method] = tmp_path_factory.mktemp(f"stopped-{method}") / "run"
            with pytest.MonkeyPatch.context() as patch:
                stop_in_step(patch, 4, signal.SIGTERM)
                assert run_here(method, arguments(method, images, known[method])).status == 143
        return known[method]

    return get


@pytest.fixture(scope="module")
def finished(stopped, images, tmp_path_factory):
    """finished(method) -> what the run leaves when it goes on from the unedited checkpoint."""
    known = {}

    def get(method):
        if method not in known:
            out = tmp_path_factory.mktemp(f"finished-{method}") / "run"
            shutil.copytree(stopped(method), out)
            assert run_here(method, arguments(method, images, out, "--resume")).status == 0
            known[method] = left_by(out)
        return known[method]

    return get


def edited(folder, to, edit, names=("last.pt",)):
    """A copy of a run in which edit(checkpoint) was applied to these checkpoints; the others are removed."""
    shutil.copytree(folder, to)
    for name in ("last.pt", "previous.pt"):
        if name in names:
            checkpoint = torch.load(to / name, weights_only=True)
            edit(checkpoint)
            save_edited(checkpoint, to / name)
        else:
            (to / name).unlink()
    return to


def both(method, images, folder):
    """What eval.py, and after it the script with --resume, say about a run."""
    return run_here("eval", [*QUICK, str(folder)]), run_here(method, arguments(method, images, folder, "--resume"))


def holds(result, folder, *words):
    assert is_one_line_error(result), (result.status, result.err[-2000:])
    assert all(word in result.err for word in (f"{folder}/last.pt", *words)), result.err
    assert "error: " in result.err and len(result.err) < 600


# ---- an edit of each kind ------------------------------------------------------------------------


def at(checkpoint, path):
    """(container, key) of an entry "rows.0.loss"; a tensor of the model by model/backbone.layers.0.weight."""
    first, _, rest = path.partition("/")
    keys = [first, rest] if rest else first.split(".")
    for key in keys[:-1]:
        checkpoint = checkpoint[int(key) if key.isdigit() else key]
    return checkpoint, int(keys[-1]) if keys[-1].isdigit() else keys[-1]


def put(path, value):
    """An edit: the entry becomes the value, or value(entry)."""
    def edit(checkpoint):
        container, key = at(checkpoint, path)
        container[key] = value(container[key]) if callable(value) else value
    return edit


def drop(path):
    def edit(checkpoint):
        container, key = at(checkpoint, path)
        del container[key]
    return edit


def rename(path):
    def edit(checkpoint):
        container, key = at(checkpoint, path)
        container[f"{key}_"] = container.pop(key)
    return edit


def filled(number):
    def fill(tensor):
        tensor = tensor.clone(memory_format=torch.contiguous_format)
        tensor.view(-1)[0] = number
        return tensor
    return fill


WEIGHT, VARIANCE = "model/backbone.layers.0.weight", "model/backbone.layers.1.running_var"
COUNT = "model/backbone.layers.1.num_batches_tracked"
# (edit, kind, what the line names)
EDITS = {
    "no model": (drop("model"), BAD, "model"), "model None": (put("model", None), BAD, "model"), "model list": (put("model", []), BAD, "model"),
    "model empty": (put("model", {}), BAD, "model"),
    "weight dropped": (drop(WEIGHT), BAD, "backbone.layers.0.weight"), "weight renamed": (rename(WEIGHT), BAD, "backbone.layers.0.weight"),
    "weight added": (put("model/extra", torch.zeros(3)), BAD, "model"), "weight text": (put(WEIGHT, "weights"), BAD, "backbone.layers.0.weight"),
    "weight transposed": (put(WEIGHT, lambda w: w.flatten(1)), BAD, "backbone.layers.0.weight"),
    "weight larger": (put(WEIGHT, lambda w: torch.cat([w, w])), BAD, "backbone.layers.0.weight"),
    "weight half": (put(WEIGHT, lambda w: w.half()), BAD, "backbone.layers.0.weight"),
    "weight double": (put(WEIGHT, lambda w: w.double()), BAD, "backbone.layers.0.weight"),
    "weight sparse": (put(WEIGHT, lambda w: w.to_sparse()), BAD, "backbone.layers.0.weight"),
    "weight a list": (put(WEIGHT, lambda w: w.tolist()), BAD, "backbone.layers.0.weight"),
    "weight nan": (put(WEIGHT, filled(math.nan)), BAD, "backbone.layers.0.weight is not finite"),
    "weight inf": (put(WEIGHT, filled(math.inf)), BAD, "backbone.layers.0.weight is not finite"),
    "variance inf": (put(VARIANCE, filled(math.inf)), BAD, "running_var is not finite"),
    "variance nan": (put(VARIANCE, filled(math.nan)), BAD, "running_var is not finite"),
    "variance negative": (put(VARIANCE, filled(-1.0)), BAD, "running_var is negative"),
    "batches negative": (put(COUNT, torch.tensor(-3)), BAD, "num_batches_tracked is negative"),
    "batches float": (put(COUNT, torch.tensor(3.0)), BAD, "num_batches_tracked"),
    "no optimizer": (drop("optimizer"), BAD, "optimizer"), "optimizer text": (put("optimizer", "adam"), BAD, "optimizer"),
    "optimizer empty": (put("optimizer", {}), UNUSED, "optimizer"),
    "state None": (put("optimizer.state", None), UNUSED, "optimizer.state"),
    "state empty": (put("optimizer.state", {}), UNUSED, "optimizer.state"),
    "state lacks one": (drop("optimizer.state.1"), UNUSED, "optimizer.state.1 is missing"),
    "state under a name": (put("optimizer.state", lambda s: {str(k): v for k, v in s.items()}), UNUSED, "optimizer.state"),
    "state a list": (put("optimizer.state.0", []), UNUSED, "optimizer.state.0"),
    "groups None": (put("optimizer.param_groups", None), UNUSED, "optimizer.param_groups"),
    "no groups": (drop("optimizer.param_groups"), UNUSED, "optimizer.param_groups"),
    "groups empty": (put("optimizer.param_groups", []), HARMLESS, ""), "lr of a group": (put("optimizer.param_groups.0.lr", math.nan), HARMLESS, ""),
    "no step": (drop("step"), BAD, "step"), "step text": (put("step", "5"), BAD, "step"), "step float": (put("step", 5.0), BAD, "step"),
    "step negative": (put("step", -5), BAD, "step"), "step nan": (put("step", math.nan), BAD, "step"), "step True": (put("step", True), BAD, "step"),
    "step of another epoch": (put("step", 9), UNUSED, "step"), "step huge": (put("step", 10**12), UNUSED, "step"),
    "step endless": (put("step", 10**400), UNUSED, "step"), "step 0": (put("step", 0), UNUSED, "step"),
    "no rows": (drop("rows"), BAD, "rows"), "rows None": (put("rows", None), BAD, "rows"), "rows a dict": (put("rows", {}), BAD, "rows"),
    "rows lost": (put("rows", []), UNUSED, "rows"), "rows doubled": (put("rows", lambda rows: rows + rows), BAD, "rows"),
    "row None": (put("rows.0", None), BAD, "rows.1"), "row without loss": (drop("rows.0.loss"), BAD, "rows.1.loss"),
    "row with another name": (rename("rows.0.lr"), BAD, "rows.1.lr"), "row's loss nan": (put("rows.0.loss", math.nan), BAD, "rows.1.loss"),
    "row's loss text": (put("rows.0.loss", "low"), BAD, "rows.1.loss"), "row's loss nested": (put("rows.0.loss", {"loss": 1.0}), BAD, "rows.1.loss"),
    "row without rank": (drop("rows.0.rank"), BAD, "rows.1.rank"), "row with another rank": (rename("rows.0.rank_h"), BAD, "rows.1.rank_h"),
    "row's rank inf": (put("rows.0.rank", math.inf), BAD, "rows.1.rank"), "row's seconds negative": (put("rows.0.seconds", -1.0), BAD, "rows.1"),
    "row's step": (put("rows.0.step", 3), UNUSED, "rows"), "row's epoch": (put("rows.0.epoch", 7), BAD, "rows.1"),
    "row's knn": (put("rows.0.knn", 65.0), BAD, "rows.1"), "row's knn text": (put("rows.0.knn", "high"), BAD, "rows.1.knn"),
    "no seconds": (drop("seconds"), BAD, "seconds"), "seconds nan": (put("seconds", math.nan), BAD, "seconds"),
    "seconds text": (put("seconds", "long"), BAD, "seconds"), "seconds negative": (put("seconds", -1.0), BAD, "seconds"),
    "seconds None": (put("seconds", None), BAD, "seconds"), "seconds larger": (put("seconds", lambda s: s + 1000), HARMLESS, ""),
    "epoch seconds inf": (put("epoch_seconds", math.inf), BAD, "epoch_seconds"), "epoch seconds larger": (put("epoch_seconds", 50.0), HARMLESS, ""),
    "no loss sum": (drop("loss_sum"), BAD, "loss_sum"), "loss sum nan": (put("loss_sum", lambda s: s * math.nan), BAD, "loss_sum"),
    "loss sum of two": (put("loss_sum", torch.zeros(2, dtype=torch.float64)), BAD, "loss_sum"),
    "loss sum float32": (put("loss_sum", lambda s: s.float()), BAD, "loss_sum"), "loss sum a number": (put("loss_sum", 1.0), BAD, "loss_sum"),
    "no args": (drop("args"), BAD, "args"), "args None": (put("args", None), BAD, "args"), "args a list": (put("args", ["lr"]), BAD, "args"),
    "no lr": (drop("args.lr"), BAD, "--lr"), "lr text": (put("args.lr", "0.003"), BAD, "args"), "lr nan": (put("args.lr", math.nan), BAD, "--lr"),
    "lr None": (put("args.lr", None), BAD, "--lr"), "lr a tensor": (put("args.lr", torch.tensor(0.003)), BAD, "args"),
    "lr two numbers": (put("args.lr", torch.tensor([1.0, 2.0])), BAD, "args"), "lr negative": (put("args.lr", -0.1), BAD, "--lr"),
    "epochs 0": (put("args.epochs", 0), BAD, "--epochs"), "batch True": (put("args.batch_size", True), BAD, "--batch-size"),
    "batch list": (put("args.batch_size", [16]), BAD, "--batch-size"), "views huge": (put("args.views", 10**9), BAD, "--views"),
    "dataset unknown": (put("args.dataset", "mnist"), BAD, "--dataset"), "dataset number": (put("args.dataset", 3), BAD, "--dataset"),
    "backbone unknown": (put("args.backbone", "resnet17"), BAD, "--backbone"), "no image size": (put("args.image_size", None), BAD, "image_size"),
    "proj_dim text": (put("args.proj_dim", "many"), BAD, "--proj-dim"), "compile text": (put("args.compile", "no"), BAD, "--compile"),
    "out number": (put("args.out", 7), BAD, "--out"), "data_dir None": (put("args.data_dir", None), BAD, "--data-dir"),
    "seed float": (put("args.seed", 0.5), BAD, "--seed"), "method None": (put("args.method", None), BAD, "args.method"),
    "experiment number": (put("args.experiment", 1), BAD, "args.experiment"), "log_every 0": (put("args.log_every", 0), BAD, "--log-every"),
    "images None": (put("data", None), BAD, "data"), "images a list": (put("data", []), BAD, "data"), "no images": (drop("data"), BAD, "data"),
    "an entry more": (put("comment", "mine"), HARMLESS, ""), "given lost": (drop("args.given"), HARMLESS, ""),
}
PLAIN = set(list(EDITS)[::4])


@pytest.mark.parametrize("name", [n if n in PLAIN else pytest.param(n, marks=pytest.mark.slow) for n in EDITS])
def test_an_edited_entry_is_refused_by_name_or_harmless(stopped, finished, images, tmp_path, name):
    method = random.Random(name).choice(list(RUNS))
    edit, kind, words = EDITS[name]
    folder = edited(stopped(method), tmp_path / "run", edit)
    before = (folder / "last.pt").read_bytes()
    evaluated, resumed = both(method, images, folder)
    if kind == BAD:
        holds(evaluated, folder, words)
    else:
        assert evaluated.status == 0, evaluated.err
    if kind == HARMLESS:
        assert resumed.status == 0 and first_difference(left_by(folder), finished(method)) == "", resumed.err
    else:
        holds(resumed, folder, words)
        assert (folder / "last.pt").read_bytes() == before


STATE = {"moco": ["step", "exp_avg", "exp_avg_sq"], "wmse": ["velocity"], "byol": ["step", "average", "exp_avg", "exp_avg_sq"],
         "simclr": ["momentum_buffer"]}


def edits_of_a_state(name):
    yield "dropped", lambda state: state.pop(name)
    yield "renamed", lambda state: state.update(other=state.pop(name))
    yield "another shape", lambda state: state.update({name: torch.zeros(7)})
    yield "no dimension", lambda state: state.update({name: torch.zeros(())}) if state[name].dim() else state.pop(name)
    yield "double", lambda state: state.update({name: state[name].double()})
    yield "nan", lambda state: state.update({name: state[name] * math.nan})
    yield "a number", lambda state: state.update({name: 1.0})
    yield "None", lambda state: state.update({name: None})
    if name in ("step", "exp_avg_sq"):
        yield "negative", lambda state: state.update({name: -state[name] - 1})
    if name == "step":
        yield "later", lambda state: state.update({name: state[name] + 1})
        yield "earlier", lambda state: state.update({name: state[name] - 1})


@pytest.mark.parametrize("method, name", [(m, n) for m in STATE for n in STATE[m]])
def test_the_state_of_each_optimizer_is_compared(stopped, images, tmp_path, method, name):
    """A moment of another shape ended in SIGSEGV: the fused kernels look at no shape."""
    for i, (what, change) in enumerate(edits_of_a_state(name)):
        def edit(checkpoint):
            states = [state for state in checkpoint["optimizer"]["state"].values() if name in state]
            change(states[-1] if name == "step" else states[0])  # Muon's filters, the first ones, do not use theirs
        folder = edited(stopped(method), tmp_path / str(i), edit)
        print(what)
        holds(run_here(method, arguments(method, images, folder, "--resume")), folder, "optimizer.state")


@pytest.mark.parametrize("edit", [put(WEIGHT, filled(math.nan)), put("rows.0.loss", math.nan), put("args.lr", "fast"), drop("seconds"),
                                  put(WEIGHT, lambda w: w.half())])
def test_the_checkpoint_before_an_edited_one_is_used(stopped, finished, images, tmp_path, edit):
    """As for a damaged file: one line names both, and the run ends as it would have."""
    shutil.copytree(stopped("moco"), tmp_path / "whole")
    folder = edited(stopped("moco"), tmp_path / "run", edit)
    shutil.copy(tmp_path / "whole" / "previous.pt", folder)
    for result in both("moco", images, folder):
        assert result.status == 0 and len(result.err.splitlines()) == 1, result.err
        assert f"{folder}/last.pt is damaged or was edited" in result.err and f"using {folder}/previous.pt (step 4) instead" in result.err
    assert first_difference(left_by(folder), finished("moco")) == ""


def test_if_both_are_edited_the_line_names_the_newer(stopped, images, tmp_path):
    folder = edited(stopped("moco"), tmp_path / "run", put("seconds", math.nan), names=("last.pt", "previous.pt"))
    for result in both("moco", images, folder):
        holds(result, folder, "seconds", "no older checkpoint is readable")


def test_other_flags_are_not_taken_for_damage(stopped, images, tmp_path):
    """They change shapes too, and previous.pt has the same: the line is about the flag."""
    folder = edited(stopped("simclr"), tmp_path / "run", lambda checkpoint: None)
    result = run_here("simclr", arguments("simclr", images, folder, "--resume", "--proj-dim", "16"))
    assert is_one_line_error(result) and "--proj-dim was 32 and is now 16" in result.err and "damaged" not in result.err


# ---- memory layouts, entries of other runs -------------------------------------------------------


def laid_out(how):
    """An edit: every moment has the same numbers in another memory layout; "one number": all share a single one of it."""
    def lay(tensor, layout):
        if layout == "channels first":
            return tensor.contiguous()
        if layout == "reversed":
            return tensor.permute(*range(tensor.dim())[::-1]).contiguous().permute(*range(tensor.dim())[::-1])
        if layout == "gaps":
            return torch.stack([tensor, tensor], -1)[..., 0]
        return tensor.flatten()[:1].view([1] * tensor.dim()).expand(tensor.shape)

    def edit(checkpoint):
        shared = torch.tensor(0.0)
        for state in checkpoint["optimizer"]["state"].values():
            for name, value in state.items():
                if torch.is_tensor(value) and value.dim():
                    value = lay(value, how)
                    state[name] = value.contiguous() if how == "one number, plain" else value
                elif how == "one number" and "exp_avg" in state:
                    shared.fill_(value)
                    state[name] = shared
    return edit


@pytest.mark.parametrize("method", [m if m == "moco" else pytest.param(m, marks=pytest.mark.slow) for m in RUNS])
def test_the_layout_of_a_moment_changes_no_number(stopped, finished, images, tmp_path, method):
    """The fused kernels pair weight and moment by memory order, and write past a tensor that repeats one number."""
    for how in ("channels first", "reversed", "gaps"):
        folder = edited(stopped(method), tmp_path / how, laid_out(how))
        assert run_here(method, arguments(method, images, folder, "--resume")).status == 0
        assert first_difference(left_by(folder), finished(method)) == "", how
    left = []
    for how in ("one number", "one number, plain"):
        folder = edited(stopped(method), tmp_path / how, laid_out(how))
        assert run_here(method, arguments(method, images, folder, "--resume")).status == 0
        left.append(left_by(folder))
    assert first_difference(*left) == ""


@pytest.mark.parametrize("what", ["optimizer", "model", "a weight", "a moment", "args.seed", "rows", "loss_sum", "step", "no digest", "data_statistics"])
def test_an_entry_of_another_run_or_step_is_refused(stopped, finished, images, tmp_path, what):
    """Each fits by its type, shape and range; only the digest tells. Then previous.pt is used."""
    folder = tmp_path / "run"
    shutil.copytree(stopped("simclr"), folder)
    checkpoint, other = (torch.load(folder / name, weights_only=True) for name in ("last.pt", "previous.pt"))
    if what == "a weight":
        container, key = at(checkpoint, WEIGHT)
        container[key] = container[key] * 1.01
    elif what == "a moment":
        checkpoint["optimizer"]["state"][0]["momentum_buffer"] *= 1.01
    elif what == "args.seed":
        checkpoint["args"]["seed"] += 1
    elif what == "data_statistics":
        checkpoint[what]["mean"][0] += 0.001
    elif what == "rows":
        checkpoint["rows"][0]["loss"] += 0.01
    elif what == "no digest":
        del checkpoint["digest"]
    else:
        checkpoint[what] = other[what]
    torch.save(checkpoint, folder / "last.pt")
    for result in both("simclr", images, folder):
        assert result.status == 0 and len(result.err.splitlines()) == 1, result.err
        assert "was edited or mixed with another run's" in result.err and f"using {folder}/previous.pt (step 4) instead" in result.err
    assert first_difference(left_by(folder), finished("simclr")) == ""


def test_the_queue_holds_rows_of_length_1(stopped, images, tmp_path):
    for factor in (0.0, 1.01, -50.0):
        folder = edited(stopped("moco"), tmp_path / str(factor), put("model/queue", lambda queue: queue * factor))
        for result in both("moco", images, folder):
            holds(result, folder, "model.queue has rows that are not of length 1")


# ---- what eval.py alone needs --------------------------------------------------------------------


STATISTICS = {
    "none": drop("data_statistics"), "None": put("data_statistics", None), "a list": put("data_statistics", [1]),
    "no mean": drop("data_statistics.mean"), "lists in lists": put("data_statistics.mean", [[0.5], [0.5], [0.5]]),
    "two": put("data_statistics.mean", [0.5, 0.5]), "whole": put("data_statistics.mean", [1, 0, 1]), "True": put("data_statistics.std", [True] * 3),
    "mean above 1": put("data_statistics.mean.0", 1.5), "mean below 0": put("data_statistics.mean.0", -0.1), "nan": put("data_statistics.mean.0", math.nan),
    "std 0": put("data_statistics.std.2", 0.0), "std 2": put("data_statistics.std.2", 2.0), "std a tensor": put("data_statistics.std", torch.ones(3)),
    "another size": put("data_statistics.size", 9), "size True": put("data_statistics.size", True), "no scale": drop("data_statistics.scale"),
    "scale []": put("data_statistics.scale", []), "scale of lists": put("data_statistics.scale", ["16 bits", [0], [1]]),
    "scale falls": put("data_statistics.scale", ["16 bits", 1.0, 0.0]), "scale nan": put("data_statistics.scale", ["16 bits", 0.0, math.nan]),
    "classes text": put("data_statistics.class_names", "abc"), "classes of lists": put("data_statistics.class_names", [["a"], ["b"]]),
    "a class twice": put("data_statistics.class_names", ["a", "a"]), "class 3": put("data_statistics.class_names", ["a", 3]),
}


@pytest.mark.parametrize("name", STATISTICS)
def test_the_statistics_of_the_images_are_compared(stopped, tmp_path, name):
    folder = edited(stopped("simclr"), tmp_path / "run", STATISTICS[name])
    holds(run_here("eval", [*QUICK, str(folder)]), folder, "damaged or was edited: data_statistics")


@pytest.mark.parametrize("method", ["eval", "common", "benchmark", "no method", "x" * 5000, "a\nb"])
def test_a_method_that_is_none_is_one_short_line(stopped, images, tmp_path, method):
    folder = edited(stopped("simclr"), tmp_path / "run", put("args.method", method))
    for result in both("simclr", images, folder):
        assert is_one_line_error(result) and len(result.err) < 700, result.err


@pytest.mark.parametrize("key", [3, None, (1, 2), 1.5])
def test_a_flag_whose_name_is_no_text(stopped, images, tmp_path, key):
    folder = edited(stopped("simclr"), tmp_path / "run", lambda checkpoint: checkpoint["args"].update({key: 1}))
    for result in both("simclr", images, folder):
        holds(result, folder, "args has a key that is no text")


# ---- random edits --------------------------------------------------------------------------------


def paths_of(value, path=()):
    """The paths of all entries of nested dicts and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield (*path, key)
        yield from paths_of(child, (*path, key))


def changed(value, rng):
    """(what was done, another value), of another type, shape or range."""
    anything = [None, "", "text", -1, 2.5, True, [], {}, {"nested": {"more": [1]}}, math.nan, -math.inf, 10**30, torch.zeros(2, 3)]
    if torch.is_tensor(value) and value.numel() and rng.random() < 0.7:
        return rng.choice([("reshaped", value.reshape(-1, 1)), ("longer", torch.cat([value.reshape(-1)] * 2)),
                           ("complex", value.to(torch.complex64)), ("integers", value.short()),
                           ("nan", value * math.nan), ("inf", value / 0)])
    if isinstance(value, (int, float)) and rng.random() < 0.5:
        return rng.choice([("negative", -abs(value) - 1), ("nan", math.nan), ("huge", 1e300), ("text", str(value))])
    other = rng.choice(anything)
    return repr(other), other


def random_edit(checkpoint, rng):
    """Change, drop or rename one entry. Returns its path and what was done."""
    # A tensor of the model, one of the optimizer, a value of args and any other entry come equally often.
    paths = [path for path in paths_of(checkpoint) if path != ("format",) and path[:2] != ("args", "given")]
    groups = [[p for p in paths if p[0] == name] for name in ("model", "args", "rows")]
    groups += [[p for p in paths if p[:2] == ("optimizer", "state")], [p for p in paths if len(p) == 1]]
    *parents, key = rng.choice(rng.choice(groups))
    container = checkpoint
    for name in parents:
        container = container[name]
    how = rng.random()
    if how < 0.15 and isinstance(container, dict):
        del container[key]
        return (*parents, key), "dropped"
    if how < 0.25 and isinstance(container, dict):
        container["other"] = container.pop(key)
        return (*parents, key), "renamed"
    what, container[key] = changed(container[key], rng)
    return (*parents, key), what


@pytest.mark.slow
@pytest.mark.parametrize("method", ["moco", "wmse", "byol"])
def test_random_edits(stopped, finished, images, tmp_path, method):
    """30 of each method: a line and status 2, or, if a run works, it ends as without the edit."""
    rng, refused = random.Random(method), 0
    for i in range(30):
        done = []
        folder = edited(stopped(method), tmp_path / str(i), lambda checkpoint: done.append(random_edit(checkpoint, rng)))
        print(i, *done)
        evaluated, resumed = both(method, images, folder)
        for result in (evaluated, resumed):
            assert result.status in (0, 2) and len(result.err.splitlines()) == (result.status == 2), result.err[-3000:]
        if resumed.status == 0:
            assert first_difference(left_by(folder), finished(method)) == ""
        refused += resumed.status == 2
        shutil.rmtree(folder)
    assert refused >= 25, refused
