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
import io
import json
import re
import shutil
import sys
import tokenize
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[1:1] = [str(ROOT), str(ROOT / "methods"), str(ROOT / "tests")]
import check  # noqa: E402
import mistakes  # noqa: E402

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
    for function in mistakes.LOSSES[method] if part == "loss" else []:
        group, cases = function_group(function, seed)
        made["asked"].append(f"`{function.call}`: {function.asked}")
        made["groups"].append(group)
        made["cases"] += cases
    return made


def function_group(function, seed):
    """(group, cases) of a function. Draws until every two mistakes can be told apart."""
    value = round(0.6 * function.share)
    group = {"name": function.call, "mistakes": function.mistakes,
             "points": {"value": value, "gradient": function.share - value}}
    for attempt in range(100):
        rng = np.random.default_rng([seed, attempt])
        cases = [function_case(function, number, *given, rng)
                 for number, given in enumerate(function.cases(rng))]
        if not alike(group, cases):
            break
    else:
        raise RuntimeError(f"{function.call}: mistakes that look alike: {alike(group, cases)}")
    return group, cases + more_cases(function, cases, rng)


def function_case(function, number, inputs, settings, rng):
    """One case with its answers, a plain dict for JSON."""
    inputs = {name: np.asarray(array) for name, array in inputs.items()}
    wrt = [name for name, array in inputs.items() if array.dtype.kind == "f"]
    case = {"kind": "function", "name": str(number), "group": function.call, "extra": "",
            "call": function.call, "order": function.order.split(), "lists": function.lists,
            "settings": settings, "wrt": wrt, "values": ["value"], "dtype": "float64", "draws": 0}
    if function.tensor:
        shape = np.shape(function.reference(**inputs, **settings))
        inputs["probe"] = rng.standard_normal(shape).round(2)
    case["inputs"] = {name: array.tolist() for name, array in inputs.items()}
    case["expected"] = right_outcomes(function, inputs, settings, wrt)
    case["mistakes"] = {key: plain(outcomes_of(function, inputs, settings, wrt, key))
                        for key in function.mistakes}
    if any(len(outcomes) > 1 for outcomes in (case["expected"], *case["mistakes"].values())):
        case["draws"] = check.DRAWS
    case["expected"] = plain(case["expected"])
    if function.hint[0] == number:
        case["hint"] = function.hint[1]
    return case


def plain(outcomes):
    """Arrays as lists of numbers of 13 digits."""
    return [{name: np.array([float(f"{x:.13g}") for x in np.ravel(array)]).reshape(
        np.shape(array)).tolist() for name, array in outcome.items()} for outcome in outcomes]


def right_outcomes(function, inputs, settings, wrt):
    """Value and gradients by the reference, for each possible draw; gradients by differences."""
    inputs = dict(inputs)
    probe = inputs.pop("probe", None)

    def values(**changed):
        out = function.reference(**{**inputs, **changed}, **settings)
        return np.array(out if isinstance(out, list) else [out], float)

    outcomes = [{"value": value} for value in values()]
    for name in wrt:
        gradients = np.zeros((len(outcomes), *inputs[name].shape))
        for place in np.ndindex(inputs[name].shape) if name not in function.held else ():
            def moved(step):
                array = inputs[name].copy()
                array[place] += step
                out = values(**{name: array})
                return out if probe is None else (out * probe).sum(axis=(1, 2))
            h = 1e-5  # differences of the fourth order
            near, far = moved(h) - moved(-h), moved(2 * h) - moved(-2 * h)
            gradients[(slice(None), *place)] = (8 * near - far) / (12 * h)
        for outcome, gradient in zip(outcomes, gradients):
            outcome[f"gradient of {name}"] = gradient
    return outcomes


def outcomes_of(function, inputs, settings, wrt, mistake):
    """Value and gradients by mistakes.py, for each possible draw."""
    tensors = {name: torch.tensor(array, requires_grad=name in wrt)
               for name, array in inputs.items() if name != "probe"}
    leaves = [tensors[name] for name in wrt]
    try:
        values = function.variant(**tensors, **settings, mistake=mistake)
    except torch.linalg.LinAlgError:
        values = (leaves[0] * float("nan")).sum()
    outcomes = []
    for value in values if isinstance(values, list) else [values]:
        total = value
        if "probe" in inputs:
            total = (value * torch.tensor(inputs["probe"])).sum() if value.dim() else value
        slopes = [None] * len(leaves)
        if total.requires_grad:
            slopes = torch.autograd.grad(total, leaves, allow_unused=True, retain_graph=True)
        outcome = {"value": value.detach().numpy()}
        for name, leaf, slope in zip(wrt, leaves, slopes):
            slope = torch.zeros_like(leaf) if slope is None else slope
            outcome[f"gradient of {name}"] = slope.numpy()
        outcomes.append(outcome)
    return outcomes


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
            "expected": plain([{"value": value[0] if isinstance(value, list) else value}])}


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
    return {**large, "expected": plain([{"value": value.numpy()}])}


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
