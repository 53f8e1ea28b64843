"""Hand a method out as homework, and grade what comes back: two commands.

    python tests/handout.py simclr vicreg wmse --out homework    # the folder to publish
    python tests/handout.py --grade submissions --seed 7         # grades.csv, results.json

A part is `loss` (section 3 of a method file), `model` (forward, slow copy, queue) or `training`
(the step). --parts loss,model asks for several. tests/README.md has a page for teachers.

The right answers come from tests/reference.py, those of the usual mistakes from tests/mistakes.py.
tests/check.py compares; it is handed out too. --seed draws the inputs: those that students check
with have seed 0, so grade with a number that they do not know.
"""

import ast
import contextlib
import csv
import importlib
import io
import json
import os
import re
import shutil
import sys
import tempfile
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[1:1] = [str(ROOT), str(ROOT / "methods"), str(ROOT / "tests")]
import common  # noqa: E402  (before torch: it says how torch's threads wait for each other)

import check  # noqa: E402
import mistakes  # noqa: E402
import numpy as np  # noqa: E402
import reference  # noqa: E402
import torch  # noqa: E402

METHODS = tuple(mistakes.LOSSES)
PARTS = ("loss", "model", "training")
BEGIN, END = "# YOUR CODE HERE ({})", "# END OF YOUR CODE"  # the first as in nbgrader

# ==============================================================================
# 1. Blanks
# ==============================================================================


def blanked(source, parts):
    """The text of a method file without the bodies of these parts, and the lines taken out."""
    tree = ast.parse(source)
    lines, removed = source.splitlines(), []
    cuts = sorted((cut for part in parts for cut in cuts_of(tree, part)), reverse=True)
    for first, last, part in cuts:
        body = lines[first - 1:last]
        indent = " " * (len(body[0]) - len(body[0].lstrip()))
        note = [f"# On the way: {words}" for words in remarks(body)]
        blank = [BEGIN.format(part), *note, "raise NotImplementedError", END]
        lines[first - 1:last] = [indent + line for line in blank]
        removed += body
    return "\n".join(lines) + "\n", removed


def cuts_of(tree, part):
    """(first line, last line, part) of each body to take out."""
    functions = {"loss": loss_functions, "model": model_functions}
    if part == "training":
        first, last = step_lines(tree)
        yield first, last, part
        return
    for function in functions[part](tree):
        body = function.body
        if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
            body = body[1:]  # the docstring stays
        yield body[0].lineno, body[-1].end_lineno, part


def loss_functions(tree):
    """The functions of section 3, those of its classes too."""
    names = [getattr(node, "name", "") for node in tree.body]
    for node in tree.body[names.index("parse_args") + 1:names.index("mlp")]:
        inner = node.body if isinstance(node, ast.ClassDef) else [node]
        yield from (f for f in inner if isinstance(f, ast.FunctionDef))


def model_functions(tree):
    """The functions of the model's class, but for __init__."""
    names = [getattr(node, "name", "") for node in tree.body]
    model = tree.body[names.index("build") - 1]
    for function in model.body:
        if isinstance(function, ast.FunctionDef) and function.name != "__init__":
            yield function


def step_lines(tree):
    """First and last line of a step in train(): from the loop over batches to `step += 1`."""
    train = next(node for node in tree.body if getattr(node, "name", "") == "train")
    loop = next(node for node in ast.walk(train)
                if isinstance(node, ast.For) and "batches" in ast.unparse(node.iter))
    last = next(node for node in loop.body if ast.unparse(node) == "step += 1")
    return loop.body[0].lineno, last.end_lineno


def remarks(body):
    """The shapes and equation numbers in the comments of a body, on one line or none."""
    text = "\n".join(line[len(body[0]) - len(body[0].lstrip()):] for line in body)
    found = []
    for token in tokenize.generate_tokens(io.StringIO(text + "\n").readline):
        words = token.string.lstrip("# ")
        if token.type == tokenize.COMMENT and re.match(r"(\[|.*Eq\. )", words):
            found += re.findall(r"\[[^]]*\]|Eq\. \d+(?: and \d+)?", words)
    return ["; ".join(dict.fromkeys(found))] if found else []


# ==============================================================================
# 2. Answers: inputs, right values and those of the usual mistakes
# ==============================================================================


def answers_of(method, part, seed):
    """The part as check.py reads it: `groups` with points and sentences, `cases` with answers."""
    if part == "training":
        return training_answers(method, seed)
    made = {"asked": [], "groups": [], "cases": []}
    table = {"loss": mistakes.LOSSES, "model": mistakes.MODELS}[part]
    for function in table[method]:
        group, cases = group_of(function, seed)
        made["asked"].append(f"`{group['name']}`: {function.asked}")
        made["groups"].append(group)
        made["cases"] += cases
    made["cases"].sort(key=lambda case: case["extra"] == "speed")  # last: it may take all the time
    return made


def group_of(function, seed):
    """(group, cases) of what is asked. Draws until every two mistakes can be told apart."""
    model = isinstance(function, mistakes.Model)
    group = {"name": function.call, "mistakes": function.mistakes, "hint": function.hint}
    if model:
        queue = ", the queue" if function.values == ("queue",) else ""
        group.update(name=f"{function.call}.{function.does}{queue}", points=function.points)
    else:
        value = round(0.6 * function.share)
        group["points"] = {"value": value, "gradient": function.share - value}
    for attempt in range(100):
        rng = np.random.default_rng([seed, attempt])
        make = model_case if model else function_case
        with np.errstate(all="ignore"):  # where all ReLUs are 0: drawn anew below
            cases = [make(function, group, number, *given, rng)
                     for number, given in enumerate(function.cases(rng))]
        if not all(is_sound(case) for case in cases) or alike(group, cases):
            continue
        more = more_cases(function, cases, rng) if not model else [
            stand_in_case(function, case) for case in cases]
        if not model or not alike(group, more):
            break
    else:
        raise RuntimeError(f"{group['name']}: mistakes that look alike: {alike(group, cases)}")
    for case in cases:
        del case["mistakes"]["none"]
    return group, cases + more


def function_case(function, group, number, inputs, settings, rng):
    """One case of a function with its answers, a plain dict for JSON."""
    inputs = {name: np.asarray(array) for name, array in inputs.items()}
    wrt = [name for name, array in inputs.items() if array.dtype.kind == "f"]
    wrt = [] if number in function.values_only else wrt
    case = {"kind": "function", "name": str(number), "group": group["name"], "extra": "",
            "call": function.call, "order": function.order.split(), "lists": function.lists,
            "settings": settings, "wrt": wrt, "values": ["value"], "dtype": "float64", "draws": 0,
            "label": "result" if function.tensor else "loss"}

    def right(given):
        out = function.reference(**given, **settings)
        return [{"value": value} for value in (out if isinstance(out, list) else [out])]

    def wrong(given, mistake):
        out = function.variant(**given, **settings, mistake=mistake)
        return [{"value": value} for value in (out if isinstance(out, list) else [out])]

    probe = None
    if function.tensor:
        probe = rng.standard_normal(right(inputs)[0]["value"].shape).round(2)
    known = function.values_only.get(number, function.mistakes)
    fill_in(case, function, inputs, right, wrong, known, probe)
    if any(len(outcomes) > 1 for outcomes in (case["expected"], *case["mistakes"].values())):
        case["draws"] = check.DRAWS
    return case


def model_case(model, group, number, inputs, settings, rng):
    """One case of a model with weights of random numbers."""
    settings = {"proj_hidden": 8, **settings}
    inputs = {**weights_of(model, settings, rng), **inputs}
    progress = model.progress[number]
    wrt = list(model.wrt)
    case = {"kind": "model", "name": str(number), "group": group["name"], "extra": "",
            "call": model.call, "settings": settings, "wrt": wrt, "values": list(model.values),
            "dtype": "float64", "draws": 0, "label": "loss", "does": model.does,
            "times": model.times, "progress": list(progress), "stand_in": False}
    args = {**settings, "progress": (*progress, None)[0]}
    fill_in(case, model, inputs, lambda given: [model.reference(given, args, False, inputs)],
            lambda given, mistake: [model.variant(given, args, False, mistake)], model.mistakes)
    return case


def stand_in_case(model, case):
    """The same with check.STAND_INS in the place of the loss, so that the loss may be wrong."""
    case = {**case, "name": f"{case['name']} with a simple function as the loss", "stand_in": True}
    inputs = {name: np.array(array) for name, array in case["inputs"].items()}
    args = {**case["settings"], "progress": (*case["progress"], None)[0]}
    right = model.reference(inputs, args, True, inputs)
    every = {key: wrong_outcomes(inputs, case["wrt"], lambda given: [
        model.variant(given, args, True, key)]) for key in (None, *model.mistakes)}
    (expected,) = every.pop(None)
    assert all(check.close(expected[name], right[name], 1e-6) for name in case["values"])
    return {**case, "expected": plain([expected], case),
            "mistakes": {key: plain(outcomes, case) for key, outcomes in every.items()}}


def training_answers(method, seed):
    """The part `training`: one run of train(), looked at in three ways."""
    images = np.random.default_rng([seed, 9]).integers(0, 256, (24, 3, 8, 8))
    settings = {**mistakes.ARGS[method], "batch_size": 6}
    known = dict(mistakes.STEP_MISTAKES)
    if method == "byol":
        known.update(mistakes.UPDATE_STEP_MISTAKES)
    with tempfile.TemporaryDirectory() as folder:
        check.write_images(Path(folder), images)
        data = mistakes.training_data(method, folder, settings)
    right = mistakes.training_variant(method, data)
    wrong = {key: mistakes.training_variant(method, data, key) for key in known}
    made = {"asked": ["`train`: the step, from the seed of its random draws to `step += 1`; it "
                      "leaves `loss`, `factor` and `step` for the lines below it"],
            "groups": [], "cases": []}
    for what, (names, points) in mistakes.STEP.items():
        names = [name for name in names if name in right]
        case = {"kind": "training", "name": what, "group": f"train, {what}", "extra": "",
                "call": "train", "settings": settings, "wrt": [], "values": names, "draws": 0,
                "dtype": "training", "inputs": {"images": images.tolist()},
                "progress": method == "byol"}
        case["expected"] = plain([right], case)
        case["mistakes"] = {key: plain([array], case) for key, array in wrong.items()}
        telling = [key for key in known if case_tells(case, None, key)]
        case["mistakes"] = {key: case["mistakes"][key] for key in telling}
        made["groups"].append({"name": case["group"], "points": {"value": points},
                               "mistakes": {key: known[key] for key in telling}})
        made["cases"].append(case)
    return made


def weights_of(model, settings, rng):
    """Random numbers for all weights of the model, by name."""
    module = importlib.import_module(model.method)
    linear = torch.nn.Linear(int(np.prod(mistakes.IMAGE)), mistakes.FEATURES, bias=False)
    made = getattr(module, model.call)(torch.nn.Sequential(torch.nn.Flatten(), linear),
                                       mistakes.FEATURES, module.Args(**settings))
    weights = {}
    for name, tensor in made.state_dict().items():
        if "running_" not in name and "num_batches" not in name:
            weights[name] = rng.standard_normal(tuple(tensor.shape)).round(3)
    if "queue" in weights:
        weights["queue"] = reference.unit_rows(weights["queue"])
    return weights


def fill_in(case, function, inputs, right, wrong, known, probe=None):
    """Put inputs, right answers and those of the known mistakes into the case.

    The key `none` has the right ones by mistakes.py, to compare."""
    case["inputs"] = {name: array.tolist() for name, array in inputs.items()}
    if probe is not None:
        case["inputs"]["probe"] = probe.tolist()
    expected = right_outcomes(inputs, case["wrt"], function.held, right, probe)
    case["expected"] = plain(expected, case)
    case["mistakes"] = {key: plain(wrong_outcomes(inputs, case["wrt"], lambda given: wrong(
        given, None if key == "none" else key), probe), case)
        for key in ("none", *known)}


def plain(outcomes, case):
    """The outputs that are compared, as lists of numbers of 13 digits."""
    def short(array):
        numbers = [float(f"{x:.13g}") for x in np.ravel(array)]
        return np.array(numbers).reshape(np.shape(array)).tolist()

    names = check.names_of(case)["both"]
    return [{name: short(outcome[name]) for name in names} for outcome in outcomes]


def right_outcomes(inputs, wrt, held, evaluate, probe=None):
    """Outputs and gradients by the reference, for each possible draw; gradients by differences."""
    outcomes = [dict(outcome) for outcome in evaluate(inputs)]
    for name in wrt:
        gradients = np.zeros((len(outcomes), *inputs[name].shape))

        def moved(place, step):
            array = inputs[name].copy()
            array[place] += step
            values = np.array([o["value"] for o in evaluate({**inputs, name: array})], float)
            return values if probe is None else (values * probe).sum(axis=(1, 2))

        for place in np.ndindex(inputs[name].shape) if name not in held else ():
            h = 1e-5  # differences of the fourth order
            near = moved(place, h) - moved(place, -h)
            far = moved(place, 2 * h) - moved(place, -2 * h)
            gradients[(slice(None), *place)] = (8 * near - far) / (12 * h)
        for outcome, gradient in zip(outcomes, gradients):
            outcome[f"gradient of {name}"] = gradient
    return outcomes


def wrong_outcomes(inputs, wrt, evaluate, probe=None):
    """Outputs and gradients by mistakes.py, for each possible draw."""
    tensors = {name: torch.tensor(array, requires_grad=name in wrt)
               for name, array in inputs.items()}
    leaves = [tensors[name] for name in wrt]
    try:
        outcomes = evaluate(tensors)
    except torch.linalg.LinAlgError:
        outcomes = [{"value": (leaves[0] * float("nan")).sum()}]
    found = []
    for outcome in outcomes:
        found.append({name: tensor.detach().numpy() for name, tensor in outcome.items()})
        total = outcome.get("value", torch.zeros(()))
        if probe is not None and total.dim():
            total = (total * torch.tensor(probe)).sum()
        slopes = [None] * len(leaves)
        if total.requires_grad and leaves:
            slopes = torch.autograd.grad(total, leaves, allow_unused=True, retain_graph=True)
        for name, leaf, slope in zip(wrt, leaves, slopes):
            slope = torch.zeros_like(leaf) if slope is None else slope
            found[-1][f"gradient of {name}"] = slope.numpy()
    return found


def is_sound(case):
    """Do reference.py and mistakes.py agree on what is right?"""
    names = check.names_of(case)["both"]
    both = case["expected"], case["mistakes"]["none"]
    return len(both[0]) == len(both[1]) and all(
        check.close(b[name], a[name], 1e-7) for a, b in zip(*both) for name in names)


def alike(group, cases):
    """Pairs of mistakes (or a mistake and the right answer) that no case tells apart."""
    keys = list(group["mistakes"])
    pairs = [(a, b) for i, a in enumerate([None, *keys]) for b in keys[i:]]
    return [pair for pair in pairs if not any(case_tells(case, *pair) for case in cases)]


def case_tells(case, a, b):
    """Do two mistakes (None: the right answer) have different outcomes in a case?"""
    if not {a, b} <= {None, *case["mistakes"]}:
        return False
    first, second = (case["expected"] if key is None else case["mistakes"][key] for key in (a, b))
    names = check.names_of(case)["both"]

    def within(some, others):
        return all(any(all(check.close(one[name], other[name], 1e-4) for name in names)
                       for other in others) for one in some)

    return not (within(first, second) and within(second, first))


def more_cases(function, cases, rng):
    """Cases without answers of mistakes: float32, moved a little, float16, and a large one."""
    first = next(case for case in [*cases[1:], cases[0]] if not case["draws"])
    more = [{**first, "name": f"{first['name']} in float32", "dtype": "float32", "mistakes": {}}]
    inputs = {name: np.array(array) for name, array in first["inputs"].items()}
    free = [name for name in first["wrt"] if name not in function.held]
    direction = {name: rng.standard_normal(inputs[name].shape) for name in free}
    first["direction"] = {name: array.tolist() for name, array in direction.items()}
    for sign in (1, -1):
        moved = {name: inputs[name] + sign * check.SHIFT * v for name, v in direction.items()}
        shifted = values_only(function, first, {**inputs, **moved}, f"moved by {sign}")
        more.append({**shifted, "moved": sign})
    halves = {name: array if array.dtype.kind == "i" else array.astype(np.float16).astype(float)
              for name, array in inputs.items()}
    half = values_only(function, first, halves, "in float16")
    more.append({**half, "dtype": "float16", "extra": "half precision",
                 "asked": "float16 in should be computed in, and give, float32"})
    if function.large:
        more.append(large_case(function, first, int(rng.integers(2**31))))
    return more


def values_only(function, case, inputs, name):
    settings = case["settings"]
    given = {key: array for key, array in inputs.items() if key != "probe"}
    value = function.reference(**given, **settings)
    value = value[0] if isinstance(value, list) else value
    return {**case, "name": f"{case['name']} {name}", "wrt": [], "mistakes": {},
            "inputs": {key: array.tolist() for key, array in inputs.items()},
            "expected": [{"value": np.array(value).tolist()}]}


def large_case(function, case, seed):
    """A case that a loop over all entries does not finish in time. mistakes.py has its answer."""
    shapes, settings = function.large
    inputs = {name: {"normal": shape, "seed": [seed, i]}
              for i, (name, shape) in enumerate(shapes.items())}
    large = {**case, "name": "large", "inputs": inputs, "settings": settings, "wrt": [],
             "mistakes": {}, "extra": "speed", "dtype": "float64",
             "asked": "a large batch should not take long: no loop over entries"}
    tensors = {name: torch.tensor(array) for name, array in check.inputs_of(large).items()}
    value = function.variant(**tensors, **settings)
    value = value[0] if isinstance(value, list) else value
    if function.tensor:
        large["corner"] = True
        value = value[:4, :4]
    return {**large, "expected": [{"value": value.tolist()}]}


# ==============================================================================
# 3. The folder to hand out
# ==============================================================================

# 20-NN in percent, the last lines of the five default runs of each method in tests/README.md.
REFERENCE_KNN = {
    "simclr": (100.0, 99.95, 99.95, 99.95, 99.95),
    "moco": (96.9, 97.65, 98.45, 97.95, 95.95),
    "byol": (94.1, 99.1, 98.35, 97.55, 95.3),
    "simsiam": (98.4, 99.05, 98.55, 98.0, 96.55),
    "barlow": (99.5, 99.85, 99.6, 99.9, 99.4),
    "vicreg": (100.0, 99.95, 99.95, 100.0, 99.9),
    "wmse": (99.8, 99.85, 99.7, 99.85, 99.75),
    "shuffled_dbn": (99.9, 99.8, 99.75, 99.65, 99.85),
    "cw_rgp": (100.0, 99.9, 99.95, 99.8, 100.0),
}


def write_handout(methods, parts, out):
    """Write the folder `out`. Raises UserError if there is something in it already."""
    out = Path(out)
    taken = out.exists() and (not out.is_dir() or any(out.iterdir()))
    common.check(not taken, f"--out {out} exists already; try --out {out}-2, or remove it")
    make_writable(out)
    task = {"methods": methods, "parts": parts,
            "knn": {method: REFERENCE_KNN[method] for method in methods}}
    answers = {method: {part: answers_of(method, part, seed=0) for part in parts}
               for method in methods}
    (out / "methods").mkdir()
    (out / "answers").mkdir()
    for method in methods:
        source, _ = blanked((ROOT / "methods" / f"{method}.py").read_text(), parts)
        (out / "methods" / f"{method}.py").write_text(source)
        (out / "answers" / f"{method}.json").write_text(json.dumps(answers[method]))
    (out / "answers" / "task.json").write_text(json.dumps(task))
    for path in ("common.py", "requirements.txt", "tests/check.py"):
        shutil.copy(ROOT / path, out / Path(path).name)
    (out / "pytest.ini").write_text("[pytest]\npython_files = check.py\n")
    (out / "README.md").write_text(readme(methods, parts, answers))
    print(f"{out}: {', '.join(sorted(path.name for path in out.iterdir()))}; "
          f"{len(methods) * len(parts)} parts of 10 points")


def readme(methods, parts, answers):
    """The task in words."""
    names = " and ".join([", ".join(methods[:-1]), methods[-1]] if methods[1:] else methods)
    text = INTRODUCTION.format(names=names, first=methods[0], part=parts[0],
                               most=10 * len(methods) * len(parts))
    for method in methods:
        docstring = ast.get_docstring(ast.parse((ROOT / "methods" / f"{method}.py").read_text()))
        equations = re.search(r"^Loss: .*?(?=\n\n)", docstring, re.S | re.M)[0]
        paper = re.search(r"^Paper: .*?(?=\nCode:)", docstring, re.S | re.M)[0]
        text += f"\n## methods/{method}.py\n\n{docstring.splitlines()[0]}\n"
        text += f"\n```\n{paper}\n{equations}\n```\n\n"
        text += "| part | what to write | points |\n|---|---|---|\n"
        for part in parts:
            asked = answers[method][part]
            for words, group in zip(asked["asked"], points_of(asked)):
                text += f"| {part} | {words} | {group} |\n"
    return text + (STEP_IN_WORDS if "training" in parts else "")


def points_of(answers):
    """`6 value, 4 gradient` for what is asked; of the training step, all on its one line."""
    groups = [", ".join(f"{points} {what}" for what, points in group["points"].items())
              for group in answers["groups"]]
    return groups if len(answers["asked"]) > 1 or len(groups) == 1 else [", ".join(
        f"{sum(group['points'].values())} for {group['name'].removeprefix('train, ')}"
        for group in answers["groups"])]


INTRODUCTION = """# Homework: {names}

Each file in `methods/` is a self-supervised method that runs, but for the lines that you will
write. A place for your code looks like this:

```python
    # YOUR CODE HERE (loss)
    raise NotImplementedError
    # END OF YOUR CODE
```

Replace the `raise` by your code. Leave names and arguments as they are. The docstring above the
place says what goes in and what comes out; the equations are below and at the top of the file. A
comment `# On the way` lists shapes and equation numbers that you may meet. You may add functions
of your own. Everything that `common.py` has may be used.

## How to run and check

```bash
python3 -m venv .venv
source .venv/bin/activate
pip install -r requirements.txt
python check.py                  # all parts; pytest does the same
python check.py {first} {part}  # one part
python check.py --train {first}  # trains on `patterns`, for three minutes at most
```

In a notebook in this folder: `import check; check.check("{first}", "{part}")`.

- A solution of any style is right if its values and gradients are. In float64, no number may be off
  by more than 1e-6 of the largest one (at least of 1), in float32 by more than 2e-3.
- If a value is one that a usual mistake gives, the report names the mistake.
- There are {most} points. Extra points are on top: for a loss of float16 inputs that is computed in
  float32, and for one that does not take long on a large batch.
- You will be graded on other numbers than those in `answers/`. Hand in the files in `methods/`.
- Work in this order: first `loss`, then `model`, then `training`, as far as they are asked.
  A model can be right though its loss is not yet.
"""

STEP_IN_WORDS = """
## The step of train()

The text around the place is the same in all files. A step does this, in some order:

- It seeds torch's random draws with the number that `common.step_seed` gives for the run's seed and
  the step.
- It makes the views of the batch with `data.augment`, and calls `network` with them for the loss.
  The call stands inside `run.guard(step)` and `torch.autocast(**bf16)`.
- It sets `lr` of each group in `optimizer.param_groups`: the group's `peak_lr`, times the factor of
  `common.learning_rate`, unless the group is `constant`. The lines below need the name `factor`.
- It clears the gradients, computes new ones and lets the optimizer step.
- BYOL: it moves the slow copy with `update_target`. The progress is `step` / `run.total_steps`.
- It tells `run.watch` the step and the loss, and counts the step.
"""

# ==============================================================================
# 4. Grading
# ==============================================================================

SECONDS = check.SECONDS  # of a part, as the students had
LARGEST_SOURCE = 2**20  # bytes of a method file


def submissions_in(folder):
    """[(student, folder)]: each subfolder, or the folder itself if a method file lies in it."""
    common.check(folder.is_dir(), f"--grade {folder} is no folder; give the one with a folder for "
                 "each student")
    own = [folder / place / f"{method}.py" for method in METHODS for place in ("", "methods")]
    everything = sorted(folder.iterdir())
    aside = [path for path in everything if path.name.startswith((".", "__"))]  # .git, __MACOSX
    inside = [path for path in everything if path not in aside]
    found = [path for path in inside if path.is_dir() and not path.is_symlink()]
    hidden = [path.name for path in aside if any(file_of(path, method) for method in METHODS)]
    if hidden:
        common.warn(f"not graded, since their names begin with . or __: {common.listed(hidden)}")
    stray = [path for path in own if path.is_file()]
    if stray:
        others = [path.name for path in found
                  if path.name != "methods" and file_of(path, stray[0].stem)]
        common.check(len(others) < 2, f"--grade {folder}: {stray[0]} lies beside folders that have "
                     f"it, too ({common.listed(others)}); move it away")
        if others:
            common.warn(f"graded as one student's folder, since {stray[0]} lies in it; move it "
                        f"away if {others[0]} is a student")
        return [(folder.resolve().name, folder)]
    rest = [path.name for path in inside if path not in found]
    if rest:
        common.warn(f"not graded, since they are files or links: {common.listed(rest)}")
    common.check(found, f"--grade {folder} has no folders in it; give the one with a folder for "
                 "each student")
    clash = [path.name for path in found if path.name.lower() == "grades.csv"]
    common.check(not clash, "--grade: a folder is called grades.csv, as the table will be; "
                 "rename it")
    return [(path.name, path) for path in found]


def files_in(folder, wanted):
    """Paths of files with this name in a submission, the nearest first; no links are followed."""
    found, places = [], [Path(folder)]
    for _ in range(5):  # levels; a data set may lie deeper
        deeper = []
        for place in places[:1000]:
            with contextlib.suppress(OSError), os.scandir(place) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    if entry.name == wanted and entry.is_file(follow_symlinks=False):
                        found.append(place / wanted)
                    elif entry.is_dir(follow_symlinks=False) and not entry.name.startswith("."):
                        deeper.append(place / entry.name)
        places = deeper
    return found


def file_of(folder, method):
    """The student's file of a method, or None: in methods/, or else where it lies."""
    found = [path for path in files_in(folder, f"{method}.py")
             if path.stat().st_size <= LARGEST_SOURCE and os.access(path, os.R_OK)]
    return min(found, key=lambda path: (path.parent.name != "methods", len(path.parts)),
               default=None)


def asked_parts(submissions, methods):
    """The parts whose markers stand in most of the files that were handed in."""
    files = [file_of(folder, method) for _, folder in submissions for method in methods]
    texts = [path.read_text(errors="replace") for path in files if path]
    parts = [part for part in PARTS
             if 2 * sum(BEGIN.format(part) in text for text in texts) > len(texts)]
    common.check(parts, "--parts is needed: most files have no marks like "
                 f"`{BEGIN.format('loss')}`; try --parts loss")
    return parts


def grade(folder, methods, parts, seed, out, train=False):
    """Grade all submissions in `folder`; write grades.csv and a results.json for each student."""
    inside = folder.resolve() in (out.resolve(), *out.resolve().parents)
    common.check(not inside, f"--out {out} lies in the folder of --grade; try another folder")
    submissions = submissions_in(folder)
    make_writable(out)
    methods = methods or [m for m in METHODS if any(file_of(f, m) for _, f in submissions)]
    common.check(methods, f"--grade {folder}: no file like simclr.py in it; name the methods")
    parts = parts or asked_parts(submissions, methods)
    common.say(f"{len(submissions)} submissions: {', '.join(methods)}; parts {', '.join(parts)}; "
               f"seed {seed}")
    answers = {(method, part): answers_of(method, part, seed) for method in methods
               for part in parts}
    table = []
    for student, place in submissions:
        wanted = [{**answers[method, part], "method": method, "part": part,
                   "file": file_of(place, method)} for method, part in answers]
        rows = dict(zip(answers, graded(wanted, student)))
        if train:
            for method in methods:
                rows[method, "trained"] = [trained_row(place, method)]
        table.append(grades_row(student, rows))
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, fieldnames=list(table[0]))
        writer.writeheader()
        writer.writerows(table)
        common.write_file(str(out / "grades.csv"), text.getvalue().encode())
        write_results(out if len(submissions) == 1 else out / student, rows)
        row = table[-1]
        common.say(f"{common.shown(row['student'])}: {row['points']} of {row['of']} points, "
                   f"{row['extra']} extra")
    common.say(f"{out}/grades.csv, and results.json for each student")


def graded(wanted, student):
    """The rows of a student's parts. What ends the grading itself costs this student's alone."""
    try:
        return check.grade(wanted, ROOT, SECONDS, strict=True)
    except Exception as error:
        common.warn(f"{student}: the grading itself ended with {type(error).__name__}; look at it")
        failed = {"error": f"the grading ended with {type(error).__name__}"}
        return [check.judge(part, [failed] * len(part["cases"]), "") for part in wanted]


def make_writable(out):
    """Make the folder `out`. Raises UserError if that fails or it is read-only."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise common.UserError(f"--out {out} cannot be made ({error.strerror}); "
                               "try another folder") from error
    common.check(os.access(out, os.W_OK), f"--out {out} is read-only; try another folder")


def grades_row(student, rows):
    """A line of grades.csv."""
    name = student.encode(errors="replace").decode()  # names of another encoding
    name = name if name[:1] not in "=+-@" else f"'{name}"  # no formula for a spreadsheet
    points = {f"{method} {part}": check.total(found) for (method, part), found in rows.items()}
    extra = sum(row["points"] for found in rows.values() for row in found if row["extra"])
    most = sum(check.total(found, "of") for found in rows.values())
    return {"student": name, **points, "points": sum(points.values()), "of": most, "extra": extra}


def write_results(folder, rows):
    """results.json in the form that Gradescope reads. An extra point has max_score 0."""
    tests = [{"name": f"{method}, {part}: {row['name']}", "score": row["points"],
              "max_score": 0 if row["extra"] else row["of"], "output": row["text"]}
             for (method, part), found in rows.items() for row in found]
    make_writable(folder)
    text = json.dumps({"tests": tests}, indent=1)
    common.write_file(str(folder / "results.json"), text.encode())


def trained_row(folder, method):
    """One row for a trained backbone.pt: its 20-NN on `patterns`, computed here."""
    row = {"name": "20-NN of backbone.pt", "points": 0, "of": 0, "extra": True}
    paths = [path for path in files_in(folder, "backbone.pt")
             if path.parent.name == f"{method}-patterns-s0"]
    if not paths:
        return {**row, "text": f"no runs/{method}-patterns-s0/backbone.pt"}
    try:
        accuracy = knn_of(paths[0], method)
    except Exception as error:
        return {**row, "text": f"backbone.pt cannot be read: {type(error).__name__}"}
    verdict, learned = check.compare_knn(accuracy, REFERENCE_KNN[method])
    return {**row, "points": int(learned), "of": 1, "text": verdict}


def knn_of(path, method):
    """20-NN in percent of the weights of a `tiny` backbone on `patterns`."""
    common.check(path.stat().st_size < 2**26, "too large")
    network, _ = common.build_backbone("tiny", 32)
    network.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
    args, device = common.set_up(importlib.import_module(method).Args(device="cpu"))
    with contextlib.redirect_stdout(io.StringIO()):
        data = common.load_data(args, device)
        with torch.no_grad():
            bank, queries = (common.extract(network, data, x) for x in (data.large_bank, data.test))
    return 100 * common.knn_accuracy(bank, data.large_bank_labels, queries, data.test_labels)


# ---- GitHub Classroom --------------------------------------------------------

WORKFLOW = """# .github/workflows/classroom.yml, in the repository that GitHub Classroom copies
name: Autograding
on: [push, workflow_dispatch, repository_dispatch]
permissions:
  checks: write
  actions: read
  contents: read
jobs:
  autograding:
    runs-on: ubuntu-latest
    if: github.actor != 'github-classroom[bot]'
    steps:
      - uses: actions/checkout@v4
{steps}      - uses: classroom-resources/autograding-grading-reporter@v1
        env:
{results}        with:
          runners: {runners}
"""
STEP = """      - id: {id}
        uses: classroom-resources/autograding-command-grader@v1
        with:
          test-name: "{name}"
          setup-command: pip install -r requirements.txt
          command: 'python check.py {method} {part} "{row}"'
          timeout: 10
          max-score: {points}
"""


def classroom(methods, parts):
    """The workflow for GitHub Classroom: a step for each row of check.py."""
    steps, names = "", []
    for method in methods:
        for part in parts:
            for group in answers_of(method, part, seed=0)["groups"]:
                for what, points in group["points"].items():
                    row = f"{group['name']}: {what}"
                    names.append(re.sub(r"[^a-z]+", "-", f"{method} {part} {row}".lower()))
                    steps += STEP.format(id=names[-1], name=f"{method} {part} {row}", method=method,
                                         part=part, row=row, points=points)
    results = "".join(f'          {name.upper()}_RESULTS: "${{{{steps.{name}.outputs.result}}}}"\n'
                      for name in names)
    return WORKFLOW.format(steps=steps, results=results, runners=",".join(names))


# ==============================================================================
# 5. Command line
# ==============================================================================


def parse_args(argv=None):
    """The command line. Raises UserError."""
    parser = common.OneLineParser(description=(__doc__ or "handout.py").split("\n")[0])
    parser.add_argument("methods", nargs="*", metavar="method", help=", ".join(METHODS))
    parser.add_argument("--parts", help="some of loss,model,training (default: loss; with --grade "
                        "those that are marked in the files)")
    parser.add_argument("--out", help="folder to write (default: homework, or grades)")
    parser.add_argument("--grade", metavar="SUBMISSIONS", help="grade the folder with a folder for "
                        "each student, or with one student's files")
    parser.add_argument("--seed", type=common.number(int, least=1, most=2**31 - 1, example=7),
                        help="with --grade: draws the numbers to grade with; keep it to yourself")
    parser.add_argument("--train", action="store_true", help="with --grade: also measure the 20-NN "
                        "of runs/METHOD-patterns-s0/backbone.pt")
    parser.add_argument("--classroom", action="store_true",
                        help="print the workflow for GitHub Classroom")
    args = parser.parse_args(argv)
    for method in args.methods:
        common.check(method in METHODS, f"{method} is no method; try {', '.join(METHODS)}")
    common.check(args.methods or args.grade, "no method is named; try simclr")
    repeated = len(set(args.methods)) < len(args.methods)
    common.check(not repeated, "a method is named twice; name each once")
    common.check(args.out != "", "--out needs the name of a folder; try it without")
    default = [] if args.grade else ["loss"]
    args.parts = default if args.parts is None else args.parts.split(",")
    for part in args.parts:
        common.check(part in PARTS, f"--parts {part} is no part; try --parts loss,model,training")
    args.parts = [part for part in PARTS if part in args.parts]
    common.check((args.seed is None) == (not args.grade), "--grade and --seed need each other; "
                 "try --grade submissions --seed 7")
    common.check(args.grade or not args.train, "--train needs --grade")
    common.check(not args.classroom or not (args.grade or args.out),
                 "--classroom only prints; try it without --grade and --out")
    return args


def run(args):
    """What the command line asks for."""
    if args.classroom:
        print(classroom(args.methods, args.parts), end="")
    elif args.grade:
        grade(Path(args.grade), args.methods, args.parts, args.seed, Path(args.out or "grades"),
              args.train)
    else:
        write_handout(args.methods, args.parts, args.out or "homework")


if __name__ == "__main__":
    common.main(run, parse_args)
