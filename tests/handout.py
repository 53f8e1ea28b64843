"""Hand a method out as homework, and grade what comes back: two commands.

    python tests/handout.py simclr vicreg wmse --out homework    # the folder to publish
    python tests/handout.py --grade submissions --seed 7         # grades.csv, results.json

A part is `loss` (section 3 of a method file), `model` (forward, slow copy, queue) or `training`
(the step). --parts loss,model asks for several. tests/README.md has a page for teachers.

The right answers come from tests/reference.py, those of the usual mistakes from tests/mistakes.py.
tests/check.py compares; it is handed out too. --seed draws the inputs: those that students check
with have seed 0, so grade with a number that they do not know.
"""

import argparse
import ast
import csv
import importlib
import io
import json
import re
import shutil
import sys
import tempfile
import tokenize
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[1:1] = [str(ROOT), str(ROOT / "methods"), str(ROOT / "tests")]
import check  # noqa: E402
import mistakes  # noqa: E402
import reference  # noqa: E402

import common  # noqa: E402

METHODS = tuple(mistakes.LOSSES)
PARTS = ("loss", "model", "training")
BEGIN, END = "# ---- your code: {} ----", "# ---- end of your code ----"

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
    made = {"asked": [], "groups": [], "cases": []}
    if part == "training":
        return training_answers(method, seed)
    table = {"loss": mistakes.LOSSES, "model": mistakes.MODELS}[part]
    for function in table[method]:
        group, cases = group_of(function, seed)
        made["asked"].append(f"`{group['name']}`: {function.asked}")
        made["groups"].append(group)
        made["cases"] += cases
    return made


def group_of(function, seed):
    """(group, cases) of what is asked. Draws until every two mistakes can be told apart."""
    model = isinstance(function, mistakes.Model)
    group = {"name": function.call, "mistakes": function.mistakes}
    if model:
        queue = ", the queue" if function.values == ("queue",) else ""
        group.update(name=f"{function.call}.{function.does}{queue}", points=function.points)
    else:
        value = round(0.6 * function.share)
        group["points"] = {"value": value, "gradient": function.share - value}
    for attempt in range(100):
        rng = np.random.default_rng([seed, attempt])
        make = model_case if model else function_case
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
    case = {"kind": "function", "name": str(number), "group": group["name"], "extra": "",
            "call": function.call, "order": function.order.split(), "lists": function.lists,
            "settings": settings, "wrt": wrt, "values": ["value"], "dtype": "float64", "draws": 0}

    def right(given):
        out = function.reference(**given, **settings)
        return [{"value": value} for value in (out if isinstance(out, list) else [out])]

    def wrong(given, mistake):
        out = function.variant(**given, **settings, mistake=mistake)
        return [{"value": value} for value in (out if isinstance(out, list) else [out])]

    probe = None
    if function.tensor:
        probe = rng.standard_normal(right(inputs)[0]["value"].shape).round(2)
    fill_in(case, function, inputs, right, wrong, probe)
    if any(len(outcomes) > 1 for outcomes in (case["expected"], *case["mistakes"].values())):
        case["draws"] = check.DRAWS
    if function.hint[0] == number:
        case["hint"] = function.hint[1]
    return case


def model_case(model, group, number, inputs, settings, rng):
    """One case of a model with weights of random numbers."""
    settings = {"proj_hidden": 8, **settings}
    inputs = {**weights_of(model, settings, rng), **inputs}
    progress = model.progress[number]
    wrt = list(model.wrt)
    case = {"kind": "model", "name": str(number), "group": group["name"], "extra": "",
            "call": model.call, "settings": settings, "wrt": wrt, "values": list(model.values),
            "dtype": "float64", "draws": 0, "does": model.does, "times": model.times,
            "progress": list(progress), "stand_in": False}
    args = {**settings, "progress": (*progress, None)[0]}
    fill_in(case, model, inputs, lambda given: [model.reference(given, args, False, inputs)],
            lambda given, mistake: [model.variant(given, args, False, mistake)])
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
        right = mistakes.training_variant(method, folder, settings)
        wrong = {key: mistakes.training_variant(method, folder, settings, key) for key in known}
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


def fill_in(case, function, inputs, right, wrong, probe=None):
    """Put inputs, right answers and those of all mistakes into the case.

    The key `none` has the right ones by mistakes.py, to compare."""
    case["inputs"] = {name: array.tolist() for name, array in inputs.items()}
    if probe is not None:
        case["inputs"]["probe"] = probe.tolist()
    expected = right_outcomes(inputs, case["wrt"], function.held, right, probe)
    case["expected"] = plain(expected, case)
    case["mistakes"] = {key: plain(wrong_outcomes(inputs, case["wrt"], lambda given: wrong(
        given, None if key == "none" else key), probe), case)
        for key in ("none", *function.mistakes)}


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
            near, far = moved(place, h) - moved(place, -h), moved(place, 2 * h) - moved(place, -2 * h)
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
    first, second = (case["expected"] if key is None else case["mistakes"][key] for key in (a, b))
    names = check.names_of(case)["both"]

    def within(some, others):
        return all(any(all(check.close(one[name], other[name], 1e-4) for name in names)
                       for other in others) for one in some)

    return not (within(first, second) and within(second, first))


def more_cases(function, cases, rng):
    """Cases without answers of mistakes: in float32, moved a little, in float16, and a large one."""
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
        more.append(large_case(function, first))
    return more


def values_only(function, case, inputs, name):
    settings = case["settings"]
    given = {key: array for key, array in inputs.items() if key != "probe"}
    value = function.reference(**given, **settings)
    return {**case, "name": f"{case['name']} {name}", "wrt": [], "mistakes": {},
            "inputs": {key: array.tolist() for key, array in inputs.items()},
            "expected": [{"value": np.array(value[0] if isinstance(value, list) else value).tolist()}]}


def large_case(function, case):
    """A case that a loop over all entries does not finish in time. mistakes.py has its answer."""
    shapes, settings = function.large
    inputs = {name: {"normal": shape, "seed": i} for i, (name, shape) in enumerate(shapes.items())}
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

FILES = ("common.py", "requirements.txt")


def write_handout(methods, parts, out):
    """Write the folder `out`. Raises UserError if there is something in it already."""
    out = Path(out)
    taken = out.exists() and (not out.is_dir() or any(out.iterdir()))
    common.check(not taken, f"--out {out} exists already; try --out {out}-2, or remove it")
    task = {method: {part: answers_of(method, part, seed=0) for part in parts}
            for method in methods}
    (out / "methods").mkdir(parents=True)
    (out / "answers").mkdir()
    for method in methods:
        source, _ = blanked((ROOT / "methods" / f"{method}.py").read_text(), parts)
        (out / "methods" / f"{method}.py").write_text(source)
        content = json.dumps({"method": method, "parts": task[method]})
        (out / "answers" / f"{method}.json").write_text(content)
    (out / "answers" / "task.json").write_text(json.dumps({"methods": methods, "parts": parts}))
    for name in FILES:
        shutil.copy(ROOT / name, out / name)
    shutil.copy(ROOT / "tests" / "check.py", out / "check.py")
    (out / "pytest.ini").write_text("[pytest]\npython_files = check.py\n")
    (out / "README.md").write_text(readme(methods, parts, task))
    print(f"{out}: {', '.join(sorted(path.name for path in out.iterdir()))}; "
          f"{len(methods) * len(parts)} parts of 10 points")


def readme(methods, parts, task):
    """The task in words."""
    return "# Homework\n"


# ==============================================================================
# 4. Grading
# ==============================================================================


def grade(folder, methods, parts, seed, out):
    pass


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("methods", nargs="*", metavar="method", help=", ".join(METHODS))
    parser.add_argument("--parts", default="loss", help="of loss,model,training (default: loss)")
    parser.add_argument("--out", default="homework", help="folder to write")
    return parser.parse_args(argv)


def main():
    args = parse_args()
    write_handout(args.methods, args.parts.split(","), args.out)


if __name__ == "__main__":
    main()
