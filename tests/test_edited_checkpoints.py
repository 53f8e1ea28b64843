"""Checkpoints that were edited or damaged inside: --resume and eval.py refuse them in one line, or take previous.pt.

The file itself is whole (zip, checksums, pickle): only an entry of it is not what the run wrote. The SHA-256 behind the zip tells:
torch.save writes none, and that of the file before the edit does not fit."""

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


def edited(folder, to, edit, names=("last.pt",), keep_hash=False):
    """A copy of a run in which edit(checkpoint) was applied to these checkpoints; the others are removed."""
    shutil.copytree(folder, to)
    for name in ("last.pt", "previous.pt"):
        if name in names:
            checkpoint, before = torch.load(to / name, weights_only=True), (to / name).read_bytes()
            edit(checkpoint)
            torch.save(checkpoint, to / name)
            if keep_hash:
                (to / name).write_bytes((to / name).read_bytes() + before[-32:])
        else:
            (to / name).unlink()
    return to


def both(method, images, folder):
    """What eval.py, and after it the script with --resume, say about a run."""
    return run_here("eval", [*QUICK, str(folder)]), run_here(method, arguments(method, images, folder, "--resume"))


def refused(results, folder):
    """Both are one line that names the file."""
    for result in results:
        assert is_one_line_error(result), (result.status, result.err[-2000:])
        assert f"{folder}/last.pt is no checkpoint of these scripts, or it is damaged or edited" in result.err, result.err
        assert "train again with another --out" in result.err and len(result.err) < 600


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


def put_key(key):
    return lambda checkpoint: checkpoint["args"].update({key: 1})


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
EDITS = {
    "no model": drop("model"), "model None": put("model", None), "model list": put("model", []),
    "model empty": put("model", {}),
    "weight dropped": drop(WEIGHT), "weight renamed": rename(WEIGHT),
    "weight added": put("model/extra", torch.zeros(3)), "weight text": put(WEIGHT, "weights"),
    "weight transposed": put(WEIGHT, lambda w: w.flatten(1)),
    "weight larger": put(WEIGHT, lambda w: torch.cat([w, w])),
    "weight half": put(WEIGHT, lambda w: w.half()),
    "weight double": put(WEIGHT, lambda w: w.double()),
    "weight sparse": put(WEIGHT, lambda w: w.to_sparse()),
    "weight a list": put(WEIGHT, lambda w: w.tolist()),
    "weight nan": put(WEIGHT, filled(math.nan)),
    "weight inf": put(WEIGHT, filled(math.inf)),
    "variance inf": put(VARIANCE, filled(math.inf)),
    "variance nan": put(VARIANCE, filled(math.nan)),
    "variance negative": put(VARIANCE, filled(-1.0)),
    "batches negative": put(COUNT, torch.tensor(-3)),
    "batches float": put(COUNT, torch.tensor(3.0)),
    "no optimizer": drop("optimizer"), "optimizer text": put("optimizer", "adam"),
    "optimizer empty": put("optimizer", {}),
    "state None": put("optimizer.state", None),
    "state empty": put("optimizer.state", {}),
    "state lacks one": drop("optimizer.state.1"),
    "state under a name": put("optimizer.state", lambda s: {str(k): v for k, v in s.items()}),
    "state a list": put("optimizer.state.0", []),
    "groups None": put("optimizer.param_groups", None),
    "no groups": drop("optimizer.param_groups"),
    "groups empty": put("optimizer.param_groups", []), "lr of a group": put("optimizer.param_groups.0.lr", math.nan),
    "no step": drop("step"), "step text": put("step", "5"), "step float": put("step", 5.0),
    "step negative": put("step", -5), "step nan": put("step", math.nan), "step True": put("step", True),
    "step of another epoch": put("step", 9), "step huge": put("step", 10**12),
    "step endless": put("step", 10**400), "step 0": put("step", 0),
    "no rows": drop("rows"), "rows None": put("rows", None), "rows a dict": put("rows", {}),
    "rows lost": put("rows", []), "rows doubled": put("rows", lambda rows: rows + rows),
    "row None": put("rows.0", None), "row without loss": drop("rows.0.loss"),
    "row with another name": rename("rows.0.lr"), "row's loss nan": put("rows.0.loss", math.nan),
    "row's loss text": put("rows.0.loss", "low"), "row's loss nested": put("rows.0.loss", {"loss": 1.0}),
    "row without rank": drop("rows.0.rank"), "row with another rank": rename("rows.0.rank_h"),
    "row's rank inf": put("rows.0.rank", math.inf), "row's seconds negative": put("rows.0.seconds", -1.0),
    "row's step": put("rows.0.step", 3), "row's epoch": put("rows.0.epoch", 7),
    "row's knn": put("rows.0.knn", 65.0), "row's knn text": put("rows.0.knn", "high"),
    "no seconds": drop("seconds"), "seconds nan": put("seconds", math.nan),
    "seconds text": put("seconds", "long"), "seconds negative": put("seconds", -1.0),
    "seconds None": put("seconds", None), "seconds larger": put("seconds", lambda s: s + 1000),
    "epoch seconds inf": put("epoch_seconds", math.inf), "epoch seconds larger": put("epoch_seconds", 50.0),
    "no loss sum": drop("loss_sum"), "loss sum nan": put("loss_sum", lambda s: s * math.nan),
    "loss sum of two": put("loss_sum", torch.zeros(2, dtype=torch.float64)),
    "loss sum float32": put("loss_sum", lambda s: s.float()), "loss sum a number": put("loss_sum", 1.0),
    "no args": drop("args"), "args None": put("args", None), "args a list": put("args", ["lr"]),
    "no lr": drop("args.lr"), "lr text": put("args.lr", "0.003"), "lr nan": put("args.lr", math.nan),
    "lr None": put("args.lr", None), "lr a tensor": put("args.lr", torch.tensor(0.003)),
    "lr two numbers": put("args.lr", torch.tensor([1.0, 2.0])), "lr negative": put("args.lr", -0.1),
    "epochs 0": put("args.epochs", 0), "batch True": put("args.batch_size", True),
    "batch list": put("args.batch_size", [16]), "views huge": put("args.views", 10**9),
    "dataset unknown": put("args.dataset", "mnist"), "dataset number": put("args.dataset", 3),
    "backbone unknown": put("args.backbone", "resnet17"), "no image size": put("args.image_size", None),
    "proj_dim text": put("args.proj_dim", "many"), "compile text": put("args.compile", "no"),
    "out number": put("args.out", 7), "data_dir None": put("args.data_dir", None),
    "seed float": put("args.seed", 0.5), "method None": put("args.method", None),
    "experiment number": put("args.experiment", 1), "log_every 0": put("args.log_every", 0),
    "images None": put("data", None), "images a list": put("data", []), "no images": drop("data"),
    "an entry more": put("comment", "mine"), "given lost": drop("args.given"),
    "statistics: none": drop("data_statistics"), "statistics: None": put("data_statistics", None), "statistics: a list": put("data_statistics", [1]),
    "statistics: no mean": drop("data_statistics.mean"), "statistics: lists in lists": put("data_statistics.mean", [[0.5], [0.5], [0.5]]),
    "statistics: two": put("data_statistics.mean", [0.5, 0.5]), "statistics: whole": put("data_statistics.mean", [1, 0, 1]), "statistics: True": put("data_statistics.std", [True] * 3),
    "statistics: mean above 1": put("data_statistics.mean.0", 1.5), "statistics: mean below 0": put("data_statistics.mean.0", -0.1), "statistics: nan": put("data_statistics.mean.0", math.nan),
    "statistics: std 0": put("data_statistics.std.2", 0.0), "statistics: std 2": put("data_statistics.std.2", 2.0), "statistics: std a tensor": put("data_statistics.std", torch.ones(3)),
    "statistics: another size": put("data_statistics.size", 9), "statistics: size True": put("data_statistics.size", True), "statistics: no scale": drop("data_statistics.scale"),
    "statistics: scale []": put("data_statistics.scale", []), "statistics: scale of lists": put("data_statistics.scale", ["16 bits", [0], [1]]),
    "statistics: scale falls": put("data_statistics.scale", ["16 bits", 1.0, 0.0]), "statistics: scale nan": put("data_statistics.scale", ["16 bits", 0.0, math.nan]),
    "statistics: classes text": put("data_statistics.class_names", "abc"), "statistics: classes of lists": put("data_statistics.class_names", [["a"], ["b"]]),
    "statistics: a class twice": put("data_statistics.class_names", ["a", "a"]), "statistics: class 3": put("data_statistics.class_names", ["a", 3]),
    "nothing": lambda checkpoint: None,
    **{f"a key {key!r}": put_key(key) for key in (3, None, (1, 2), 1.5)},
}
PLAIN = set(list(EDITS)[::4])


@pytest.mark.parametrize("name", [n if n in PLAIN else pytest.param(n, marks=pytest.mark.slow) for n in EDITS])
def test_an_edited_entry_is_refused(stopped, images, tmp_path, name):
    rng = random.Random(name)
    method = rng.choice(list(RUNS))
    folder = edited(stopped(method), tmp_path / "run", EDITS[name], keep_hash=rng.random() < 0.5)
    before = (folder / "last.pt").read_bytes()
    refused(both(method, images, folder), folder)
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
def test_an_edited_state_of_each_optimizer_is_refused(stopped, images, tmp_path, method, name):
    """A moment of another shape ended in SIGSEGV: the fused kernels look at no shape."""
    for i, (what, change) in enumerate(edits_of_a_state(name)):
        def edit(checkpoint):
            change(next(state for state in checkpoint["optimizer"]["state"].values() if name in state))
        folder = edited(stopped(method), tmp_path / str(i), edit)
        print(what)
        refused([run_here(method, arguments(method, images, folder, "--resume"))], folder)


@pytest.mark.parametrize("edit", [put(WEIGHT, filled(math.nan)), put("rows.0.loss", math.nan), put("args.lr", "fast"), drop("seconds"),
                                  put(WEIGHT, lambda w: w.half())])
def test_the_checkpoint_before_an_edited_one_is_used(stopped, finished, images, tmp_path, edit):
    """As for a damaged file: one line names both, and the run ends as it would have."""
    shutil.copytree(stopped("moco"), tmp_path / "whole")
    folder = edited(stopped("moco"), tmp_path / "run", edit)
    shutil.copy(tmp_path / "whole" / "previous.pt", folder)
    for result in both("moco", images, folder):
        assert result.status == 0 and len(result.err.splitlines()) == 1, result.err
        assert f"{folder}/last.pt is no checkpoint of these scripts, or it is damaged" in result.err and f"using {folder}/previous.pt (step 4) instead" in result.err
    assert first_difference(left_by(folder), finished("moco")) == ""


def test_if_both_are_edited_the_line_names_the_newer(stopped, images, tmp_path):
    folder = edited(stopped("moco"), tmp_path / "run", put("seconds", math.nan), names=("last.pt", "previous.pt"))
    refused(both("moco", images, folder), folder)


def test_other_flags_are_not_taken_for_damage(stopped, images, tmp_path):
    """They change shapes too, and previous.pt has the same: the line is about the flag."""
    shutil.copytree(stopped("simclr"), tmp_path / "run")
    result = run_here("simclr", arguments("simclr", images, tmp_path / "run", "--resume", "--proj-dim", "16"))
    assert is_one_line_error(result) and "--proj-dim was 32 and is now 16" in result.err and "damaged" not in result.err


# ---- entries of other runs, other files of a method -----------------------------------------------


@pytest.mark.parametrize("what", ["optimizer", "model", "a weight", "a moment", "args.seed", "rows", "loss_sum", "step", "data_statistics"])
def test_an_entry_of_another_run_or_step_is_refused(stopped, finished, images, tmp_path, what):
    """Each fits by its type, shape and range; only the SHA-256 tells. Then previous.pt is used."""
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
    else:
        checkpoint[what] = other[what]
    torch.save(checkpoint, folder / "last.pt")
    for result in both("simclr", images, folder):
        assert result.status == 0 and len(result.err.splitlines()) == 1, result.err
        assert "or edited" in result.err and f"using {folder}/previous.pt (step 4) instead" in result.err
    assert first_difference(left_by(folder), finished("simclr")) == ""


@pytest.mark.parametrize("edit", [drop(WEIGHT), rename(WEIGHT), put("model/extra", torch.zeros(3)), put(WEIGHT, lambda w: torch.cat([w, w]))])
def test_a_checkpoint_of_another_model_is_one_line(stopped, images, tmp_path, edit):
    """As after a change of the method's file. The checkpoint before is of the same model, so it is not tried."""
    shutil.copytree(stopped("simclr"), tmp_path / "run")
    checkpoint = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    edit(checkpoint)
    save_edited(checkpoint, tmp_path / "run" / "last.pt")
    evaluated, resumed = both("simclr", images, tmp_path / "run")
    assert is_one_line_error(evaluated), evaluated.err
    assert "does not fit simclr.py" in evaluated.err or "its backbone is not --backbone tiny" in evaluated.err, evaluated.err
    assert is_one_line_error(resumed) and "is of another model (" in resumed.err and "try the method's file" in resumed.err, resumed.err


@pytest.mark.parametrize("method", ["eval", "common", "benchmark", "no method", "x" * 5000, "a\nb"])
def test_a_method_that_is_none_is_one_short_line(stopped, images, tmp_path, method):
    shutil.copytree(stopped("simclr"), folder := tmp_path / "run")
    checkpoint = torch.load(folder / "last.pt", weights_only=True)
    checkpoint["args"]["method"] = method
    save_edited(checkpoint, folder / "last.pt")
    for result in both("simclr", images, folder):
        assert is_one_line_error(result) and len(result.err) < 700, result.err


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
def test_random_edits(stopped, images, tmp_path, method):
    """30 of each method."""
    rng = random.Random(method)
    for i in range(30):
        done = []
        folder = edited(stopped(method), tmp_path / str(i), lambda checkpoint: done.append(random_edit(checkpoint, rng)), keep_hash=i % 2)
        print(i, *done)
        refused(both(method, images, folder), folder)
        shutil.rmtree(folder)
