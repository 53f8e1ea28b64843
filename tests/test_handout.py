"""Homework: a blank gives nothing away, every usual mistake is named, every right solution gets all points, and nobody
gains by anything but a right solution."""

import ast
import csv
import functools
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import check
import handout
import mistakes
import numpy as np
import pytest
import torch
from conftest import METHODS, ROOT, is_one_line_error, run_script

SOURCES = {method: (ROOT / "methods" / f"{method}.py").read_text() for method in METHODS}
LIGHT = ("simclr", "moco", "byol", "simsiam", "barlow", "vicreg")  # answers within a second


@functools.cache
def answers(method, part, seed=0):
    return handout.answers_of(method, part, seed)


def grade_texts(folder, texts, seed=0):
    """Grade [(method, part, text of the file)] as one student's -> rows for each."""
    parts = []
    for i, (method, part, text) in enumerate(texts):
        path = folder / f"{i}.py"
        path.write_text(text)
        parts.append({**answers(method, part, seed), "method": method, "part": part, "file": path})
    return check.grade(parts, ROOT, seconds=30, strict=True)


def lost(rows):
    return [row for row in rows if not row["extra"] and row["points"] < row["of"]]


# ---------------------------------------------------------------------------------------------- blanks
def outline(tree):
    """What a reader sees of a file besides bodies: names, arguments, decorators, docstrings."""
    return [(node.name, ast.dump(node.args) if hasattr(node, "args") else "", [ast.dump(d) for d in node.decorator_list],
             ast.get_docstring(node)) for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))]


@pytest.mark.parametrize("method", METHODS)
def test_a_blank_keeps_names_arguments_decorators_and_docstrings(method):
    source = SOURCES[method]
    inner = {"variance", "covariance"}  # functions inside vicreg_loss go with its body
    for parts in (["loss"], ["model"], ["training"], list(handout.PARTS)):
        text, removed = handout.blanked(source, parts)
        kept = [entry for entry in outline(ast.parse(source)) if "loss" not in parts or entry[0] not in inner]
        assert outline(ast.parse(text)) == kept
        assert ast.get_docstring(ast.parse(text)) == ast.get_docstring(ast.parse(source))
        assert text.count("raise NotImplementedError") == text.count(handout.END) > 0
        assert len(removed) >= 3


def test_each_part_blanks_what_it_should():
    def blanks(method, part):
        tree = ast.parse(handout.blanked(SOURCES[method], [part])[0])
        return [node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)
                and any(isinstance(inner, ast.Raise) and "NotImplementedError" in ast.unparse(inner) for inner in ast.walk(node))]

    assert blanks("simclr", "loss") == ["nt_xent_loss"] and blanks("simclr", "model") == ["forward"]
    assert set(blanks("cw_rgp", "loss")) == {"forward", "backward", "channel_whiten", "cw_rgp_loss"}
    assert blanks("moco", "model") == ["update_target", "keys", "forward"]
    assert all(blanks(method, "training") == ["train"] for method in METHODS)


def shared_lines():
    """Lines of common.py, and those that most method files have: the template."""
    files = [{line.strip() for line in text.splitlines()} for text in SOURCES.values()]
    template = {line for text in files for line in text if sum(line in other for other in files) > len(files) / 2}
    return template | {line.strip() for line in (ROOT / "common.py").read_text().splitlines()}


def leaks(folder, methods, parts):
    """Lines of blanked bodies that stand somewhere in a folder."""
    removed = {line.strip() for method in methods for line in handout.blanked(SOURCES[method], parts)[1]}
    step = {line.strip() for line in handout.blanked(SOURCES["byol"], ["training"])[1]} if "training" in parts else set()
    removed -= (shared_lines() - step) | {"", ")", "else:"}
    there = {}
    for path in folder.rglob("*"):
        if path.is_file() and path.name != "common.py":
            there.update({line.strip(): path for line in path.read_text().splitlines()})
    return {line: there[line] for line in removed if line in there}


def test_no_line_of_a_solution_stands_in_the_folder(tmp_path):
    handout.write_handout(["byol", "simsiam"], ["loss"], tmp_path / "homework")
    assert leaks(tmp_path / "homework", ["byol", "simsiam"], ["loss"]) == {}
    names = {path.relative_to(tmp_path / "homework").as_posix() for path in (tmp_path / "homework").rglob("*") if path.is_file()}
    assert names == {"README.md", "requirements.txt", "common.py", "check.py", "pytest.ini", "methods/byol.py", "methods/simsiam.py",
                     "answers/byol.json", "answers/simsiam.json", "answers/task.json"}
    assert leaks(ROOT / "methods", ["byol"], ["loss"])  # the test would see one


@pytest.mark.slow
@pytest.mark.parametrize("parts", [["loss"], ["loss", "model"], list(handout.PARTS)], ids=len)
def test_no_line_of_any_solution_stands_in_a_folder_with_all_nine(parts, tmp_path):
    handout.write_handout(list(METHODS), parts, tmp_path / "homework")
    assert leaks(tmp_path / "homework", METHODS, parts) == {}


# ---------------------------------------------------------------------------------------------- answers and mistakes
def functions():
    """All (method, part, number of the function, number of mistakes)."""
    for method in METHODS:
        for part, table in (("loss", mistakes.LOSSES), ("model", mistakes.MODELS)):
            for number, function in enumerate(table[method]):
                heavy = method not in LIGHT or part == "model"
                yield pytest.param(method, part, number, marks=[pytest.mark.slow] if heavy else [], id=f"{method}-{part}-{number}")


def test_every_loss_has_six_mistakes_and_every_model_three():
    for method in METHODS:
        assert all(len(function.mistakes) >= 6 for function in mistakes.LOSSES[method])
        assert sum(len(model.mistakes) for model in mistakes.MODELS[method]) >= 3


@pytest.mark.parametrize("method, part, number", list(functions()))
def test_mistakes_agrees_with_the_reference_and_every_two_mistakes_differ(method, part, number):
    function = {"loss": mistakes.LOSSES, "model": mistakes.MODELS}[part][method][number]
    for seed in (0, 11):
        group, cases = handout.group_of(function, seed)  # raises if the cases cannot tell them apart
        main = [case for case in cases if case["mistakes"] and not case.get("stand_in")]
        for a in (None, *function.mistakes):
            for b in function.mistakes:
                assert a == b or any(handout.case_tells(case, a, b) for case in main), (a, b)


def by_mistake(function, key):
    """A function with a mistake as a student would have it: tensors in, one tensor out, drawn if there are several."""
    def written(*given):
        given = dict(zip(function.order.split(), given))
        source = given.pop("generator", None)
        for name in function.lists:
            given[name] = torch.stack(given[name])
        out = function.variant(**given, mistake=key)
        return out[torch.randint(len(out), (), generator=source)] if isinstance(out, list) else out

    return written


def report_of(function, group, cases, written):
    cases = [case for case in cases if not case["extra"]]
    outputs = []
    for case in cases:
        try:
            case = {**dict.fromkeys(("corner",)), **case}
            outputs.append(check.call_function(SimpleNamespace(**{function.call: written}), case, check.inputs_of(case)))
        except torch.linalg.LinAlgError as error:
            outputs.append({"error": f"LinAlgError: {error}"})
    return check.judge({"groups": [group], "cases": cases}, outputs, "")


LOSSES = [pytest.param(method, number, key, marks=[pytest.mark.slow] if method not in LIGHT else [], id=f"{method}-{number}-{key}")
          for method in METHODS for number, function in enumerate(mistakes.LOSSES[method]) for key in (None, *function.mistakes)]
GROUPS = functools.cache(lambda method, number: handout.group_of(mistakes.LOSSES[method][number], 0))


@pytest.mark.parametrize("method, number, key", LOSSES)
def test_a_loss_with_a_usual_mistake_loses_points_and_gets_its_own_sentence(method, number, key):
    function = mistakes.LOSSES[method][number]
    rows = report_of(function, *GROUPS(method, number), by_mistake(function, key))
    if key is None:
        assert lost(rows) == []
        return
    assert lost(rows)
    for row in lost(rows):
        assert row["text"].endswith(f" is what one gets when {function.mistakes[key]}."), row["text"]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("part", ["model", "training"])
def test_a_model_or_step_with_a_usual_mistake_gets_its_own_sentence(method, part):
    found = answers(method, part)
    for group in found["groups"]:
        cases = [case for case in found["cases"] if case["group"] == group["name"]]
        for key, sentence in group["mistakes"].items():
            outputs = [{name: np.array(array) for name, array in case["mistakes"][key][0].items()} for case in cases]
            rows = check.judge({"groups": [group], "cases": cases}, outputs, "")
            assert lost(rows) and all(sentence in row["text"] for row in lost(rows)), (key, rows)


# ---------------------------------------------------------------------------------------------- right solutions
@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_the_reference_solution_gets_every_point_and_the_untouched_handout_none(method, tmp_path):
    texts = [(method, part, text) for part in handout.PARTS for text in (SOURCES[method], handout.blanked(SOURCES[method], handout.PARTS)[0])]
    for rows, (_, part, text) in zip(grade_texts(tmp_path, texts, seed=23), texts):
        whole = text == SOURCES[method]
        assert sum(row["of"] for row in rows if not row["extra"]) == 10
        for row in rows:
            assert row["points"] == (row["of"] if whole else 0), row
            assert row["text"] == "right" if whole else row["extra"] or row["text"].endswith("is not written yet"), row


OTHER_STYLE = {
    ("simclr", "loss"): """
def nt_xent_loss(z1, z2, temperature=0.5):
    z1, z2 = z1.float() if z1.dtype == torch.float16 else z1, z2.float() if z2.dtype == torch.float16 else z2
    total = 0
    for a, b in ((z1, z2), (z2, z1)):
        a, b = a / a.norm(dim=1, keepdim=True), b / b.norm(dim=1, keepdim=True)
        same = a @ a.T / temperature - torch.diag(torch.full((len(a),), 1e9, dtype=a.dtype))
        logits = torch.cat([a @ b.T / temperature, same], dim=1)
        total = total + F.cross_entropy(logits, torch.arange(len(a)), reduction="sum")
    return total / (2 * len(z1))
""",
    ("vicreg", "loss"): """
def vicreg_loss(z1, z2, inv_weight=25.0, var_weight=25.0, cov_weight=1.0):
    if z1.dtype == torch.float16:
        z1, z2 = z1.float(), z2.float()
    loss = inv_weight * F.mse_loss(z1, z2)
    for z in (z1, z2):
        c = torch.cov(z.T)
        loss = loss + var_weight * torch.clamp(1 - torch.sqrt(c.diagonal() + 1e-4), min=0).mean() / 2
        loss = loss + cov_weight * ((c - torch.diag(c.diagonal())) ** 2).sum() / z.shape[1]
    return loss
""",
    ("wmse", "loss"): """
def whiten(z, kind="cholesky", eps=0.0):
    z = z.float() if z.dtype == torch.float16 else z
    if kind == "none":
        return z
    x = z - z.mean(0)
    s = (1 - eps) * torch.cov(x.T) + eps * torch.eye(x.shape[1], dtype=x.dtype)
    if kind == "bn":
        return x / s.diagonal().sqrt()
    if kind == "zca":
        scale, eye = s.detach().norm(), torch.eye(len(s), dtype=s.dtype)
        y, root = s / scale, eye
        for _ in range(30):  # Newton's iteration: no eigenvectors, whose gradient may be NaN
            y, root = y @ (3 * eye - root @ y) / 2, (3 * eye - root @ y) @ root / 2
        return x @ root / scale.sqrt()
    return (torch.linalg.inv(torch.linalg.cholesky(s)) @ x.T).T

def wmse_loss(views, w_size=128, w_iter=1, kind="cholesky", eps=0.0, generator=None):
    n, total, count = len(views[0]), 0, 0
    for _ in range(w_iter):
        for rows in torch.randperm(n, generator=generator).split(w_size):
            y = [whiten(v[rows], kind, eps) for v in views]
            for i in range(len(y)):
                for j in range(i):
                    total = total + (2 - 2 * F.cosine_similarity(y[i], y[j])).mean()
                    count += 1
    return total / count
""",
    ("byol", "model"): """
def forward(self, views):
    h = [self.backbone(x) for x in views]
    p = [self.predictor(self.projector(v)) for v in h]
    z = [self.target_projector(self.target_backbone(x)).detach() for x in views]
    total, count = 0, 0
    for i in range(len(views)):
        for j in range(len(views)):
            if i != j:
                total = total + (2 - 2 * F.cosine_similarity(p[i], z[j])).mean()
                count += 1
    return 2 * total / count

def update_target(self, progress):
    tau = 1 - (1 - self.args.momentum) * (math.cos(math.pi * progress) + 1) / 2
    with torch.no_grad():
        for fast, slow in ((self.backbone, self.target_backbone), (self.projector, self.target_projector)):
            for a, b in zip(fast.parameters(), slow.parameters()):
                b.copy_(tau * b + (1 - tau) * a)

BYOL.forward, BYOL.update_target = forward, update_target
""",
}


@pytest.mark.slow
def test_solutions_of_another_style_get_every_point(tmp_path):
    """Written anew, without the file's own loss (blank in the model's case), and random cuts drawn in another way."""
    texts = [(method, part, handout.blanked(SOURCES[method], ["loss", "model"])[0].replace("if __name__", code + "\n\nif __name__"))
             for (method, part), code in OTHER_STYLE.items()]
    for rows, (method, part, _) in zip(grade_texts(tmp_path, texts), texts):
        assert lost(rows) == [], (method, part)
        assert all(row["points"] for row in rows if row["extra"]), rows


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_model_is_right_though_its_loss_is_not_written(method, tmp_path):
    text = handout.blanked(SOURCES[method], ["loss"])[0]
    loss, model = grade_texts(tmp_path, [(method, "loss", text), (method, "model", text)])
    assert lost(model) == [] and check.total(loss) == 0


# ---------------------------------------------------------------------------------------------- wrong files, as files
WRONG_MODELS = {
    ("simsiam", "gradient"): "right = SimSiam.forward\ndef forward(self, views):\n    self.args.no_stop_gradient = True\n"
                             "    return right(self, views)\nSimSiam.forward = forward\n",
    ("byol", "wrong way"): "def update_target(self, progress):\n    tau = common_tau(self, progress)\n    with torch.no_grad():\n"
                           "        for a, b in zip([*self.backbone.parameters(), *self.projector.parameters()],\n"
                           "                        [*self.target_backbone.parameters(), *self.target_projector.parameters()]):\n"
                           "            b.copy_((1 - tau) * b + tau * a)\n"
                           "def common_tau(self, progress):\n"
                           "    return 1 - (1 - self.args.momentum) * (math.cos(math.pi * progress) + 1) / 2\n"
                           "BYOL.update_target = update_target\n",
    ("moco", "queue first"): "def forward(self, views):\n    self.update_target()\n    k = [self.keys(x) for x in views[1:]]\n"
                             "    q = [self.projector(self.backbone(x)) for x in views[:-1]]\n"
                             "    self.queue = torch.cat([self.queue, *k])[-len(self.queue):].clone()\n"
                             "    pairs = itertools.combinations(range(len(views)), 2)\n"
                             "    losses = [info_nce_loss(q[i], k[j - 1], self.queue, self.args.temperature) for i, j in pairs]\n"
                             "    return sum(losses) / len(losses)\nMoCo.forward = forward\n",
    ("moco", "not shuffled"): "def keys(self, x):\n    with torch.no_grad():\n"
                              "        return F.normalize(self.target_projector(self.target_backbone(x)), dim=1)\nMoCo.keys = keys\n",
    ("simclr", "batches"): "def forward(self, views):\n    z = [self.projector(self.backbone(x)) for x in views]\n"
                           "    losses = [nt_xent_loss(a, b, self.args.temperature) for a, b in itertools.combinations(z, 2)]\n"
                           "    return sum(losses) / len(losses)\nSimCLR.forward = forward\n",
    ("wmse", "eps"): "right = WMSE.forward\ndef forward(self, views):\n    self.args.eps = 0.0\n    return right(self, views)\n"
                     "WMSE.forward = forward\n",
}


class Without(ast.NodeTransformer):
    """Takes the statements that begin with some words out of a tree."""

    def __init__(self, words):
        self.words = words

    def visit_Expr(self, node):
        return ast.Pass() if ast.unparse(node).startswith(self.words) else node


WRONG_STEPS = {"no zero_grad": "optimizer.zero_grad", "no seed": "torch.manual_seed(common", "not watched": "run.watch",
               "no step": "optimizer.step", "no update": "model.update_target"}


@pytest.mark.slow
def test_files_with_usual_mistakes_are_named(tmp_path):
    texts = [(method, "model", SOURCES[method].replace("if __name__", code + "\nif __name__"))
             for (method, _), code in WRONG_MODELS.items()]
    known = [next(model.mistakes[key] for model in mistakes.MODELS[method] if key in model.mistakes) for method, key in WRONG_MODELS]
    steps = {**mistakes.STEP_MISTAKES, **mistakes.UPDATE_STEP_MISTAKES}
    for key, words in WRONG_STEPS.items():
        text = ast.unparse(ast.fix_missing_locations(Without(words).visit(ast.parse(SOURCES["byol"]))))
        assert words not in text
        texts.append(("byol", "training", text))
        known.append(steps[key])
    for rows, sentence, (method, part, _) in zip(grade_texts(tmp_path, texts), known, texts):
        assert lost(rows) and any(sentence in row["text"] for row in lost(rows)), (method, part, sentence, rows)


UNKNOWN = {  # right names, and mistakes that are in no table
    "simclr": ("def nt_xent_loss(z1, z2, temperature=0.5):\n    z = F.normalize(torch.cat([z1, z2]), dim=1)\n"
               "    return (z @ z.T).exp().mean() * temperature\n", "Your loss is "),
    "moco": ("def info_nce_loss(q, k, queue, temperature=0.1):\n    return F.cross_entropy(q @ queue.T, torch.zeros(len(q)).long())\n",
             "Your loss is "),
    "byol": ("def byol_loss(p, z):\n    return (2 - 2 * F.cosine_similarity(p, z))\n", "has the shape [2]; no dimensions is expected"),
    "simsiam": ("def negative_cosine(p, z):\n    return -F.cosine_similarity(p, z).mean().item()\n", "TypeError: negative_cosine returns float"),
    "barlow": ("def barlow_twins_loss(z1, z2):\n    return z1.sum()\n", "TypeError: barlow_twins_loss() takes 2 positional"),
    "vicreg": ("def vicreg_loss(z1, z2, inv_weight=25.0, var_weight=25.0, cov_weight=1.0):\n"
               "    return torch.tensor(float('nan')) * z1.sum()\n", "Your loss is nan; "),
}


def test_an_unknown_mistake_is_shown_with_numbers_to_redo_by_hand():
    for method, (code, words) in UNKNOWN.items():
        function = mistakes.LOSSES[method][0]
        space = {"torch": torch, "F": torch.nn.functional}
        exec(code, space)
        group, cases = GROUPS(method, 0)
        cases = [case for case in cases if not case["extra"]]
        outputs = []
        for case in cases:
            try:
                outputs.append(check.call_function(SimpleNamespace(**space), {"corner": None, **case}, check.inputs_of(case)))
            except TypeError as error:
                outputs.append({"error": check.in_one_line(error, "")})
        rows = check.judge({"groups": [group], "cases": cases}, outputs, "")
        text = next(row["text"] for row in rows if row["name"].endswith("value"))
        assert words in text and len(text) < 400 and "\n" not in text, text
        if words.startswith("Your loss"):
            first = function.order.split()[0]
            assert re.search(rf"The case: {first} = \[\[-?\d+(\.5)?, ", text), text


def test_a_gradient_that_is_cut_is_said_to_be_no_slope_of_the_values():
    function = mistakes.LOSSES["vicreg"][0]
    rows = report_of(function, *GROUPS("vicreg", 0), lambda z1, z2, *w: three(z1, z2, w))
    assert [row["name"] for row in lost(rows)] == ["vicreg_loss: gradient"]
    assert "not the slope of your values" in rows[1]["text"]


def three(z1, z2, w):
    """VICReg with a covariance term without gradient."""
    weighted = mistakes.three_terms(z1, z2, w[0], w[1], 0.0)
    return weighted + mistakes.three_terms(z1.detach(), z2.detach(), 0.0, 0.0, w[2])


@pytest.mark.slow
def test_a_backward_that_is_not_written_costs_the_gradient_only(tmp_path):
    start = "    def backward(ctx, gradient):\n"
    text = SOURCES["cw_rgp"].replace(start, f"{start}        raise NotImplementedError\n")
    (rows,) = grade_texts(tmp_path, [("cw_rgp", "loss", text)])
    assert [row["name"] for row in lost(rows)] == ["channel_whiten: gradient", "cw_rgp_loss: gradient"]
    assert all(re.fullmatch(r"line \d+ is not written yet", row["text"]) for row in lost(rows))


@pytest.mark.slow
@pytest.mark.parametrize("method, number", [(m, n) for m in METHODS for n, f in enumerate(mistakes.LOSSES[m]) if "generator" in f.order.split()])
def test_a_loss_that_draws_the_same_at_every_call_is_seen(method, number):
    function = mistakes.LOSSES[method][number]
    right = by_mistake(function, None)

    def constant(*given):
        return right(*[torch.Generator().manual_seed(0) if isinstance(a, torch.Generator) else a for a in given])

    (row,) = lost(report_of(function, *GROUPS(method, number), constant))
    assert re.search(r"In 24 calls, your loss has the values [-\d.]+; possible are [-\d.]+, ", row["text"]), row["text"]


def keys_in_order(model, order):
    """MoCo's keys of a model whose target sees the images in one order, put back."""
    def keys(x):
        found = torch.empty_like(x)
        found[order] = model.target_backbone(x[order])
        return found

    return keys


def test_a_shuffle_that_is_always_the_same_is_seen():
    model = SimpleNamespace(target_backbone=torch.nn.Flatten())
    images = torch.arange(12.0).view(6, 2)
    model.keys = keys_in_order(model, torch.arange(6).flip(0))
    assert check.use_keys(model, images)["shuffled"] == 0
    model.keys = lambda x: keys_in_order(model, torch.randperm(6))(x)
    assert check.use_keys(model, images)["shuffled"] == 1


@pytest.mark.slow
def test_an_error_in_a_step_is_said_of_all_its_rows_and_a_step_that_is_not_counted_is_named(tmp_path):
    text = SOURCES["barlow"].replace("            step += 1\n", "")
    (rows,) = grade_texts(tmp_path, [("barlow", "training", text)])
    assert len(rows) == 3 and all("is 1 added to `step`?" in row["text"] for row in rows), rows
    assert "resume" not in rows[1]["text"]


# ---------------------------------------------------------------------------------------------- submissions that are not one
BLANK = handout.blanked(SOURCES["simclr"], ["loss"])[0]
ESCAPE = """
import os, _posixsubprocess
r, w = os.pipe()
_posixsubprocess.fork_exec([b"/bin/sleep", b"4321"], [b"/bin/sleep"], True, (w,), None, None, -1, -1, -1, -1, -1, -1, r, w,
                           False, True, *([-1] if "process_group" in "{v}" else []), None, None, None, -1, None, False)
"""
HOSTILE = {
    "exit": ("import os; os._exit(0)", "before it gave an answer"),
    "print": ("import os\nprint('{\"score\": 10}', flush=True); os._exit(0)", "before it gave an answer"),
    "loop": ("while True: pass", "time limit of 3 seconds"),
    "sleep": ("import time; time.sleep(1000)", "time limit of 3 seconds"),
    "flood": ("while True: print('x' * 10_000)", "File too large"),
    "big file": ("open('x', 'wb').write(b'0' * 10**8)", "File too large"),
    "read": (f"print(open({str(ROOT / 'methods' / 'simclr.py')!r}).read())", "not allowed"),
    "import": (f"import sys; sys.path[:0] = [{str(ROOT / 'tests')!r}]; import reference", "No module named"),
    "system": ("import os; os.system('cat /etc/passwd')", "not allowed"),
    "run": ("import subprocess; subprocess.run(['ls'])", "not allowed"),
    "fork": ("import os\nfor _ in range(20): os.fork()", "not allowed"),
    "spawn": ("import multiprocessing.util as m; m.spawnv_passfds(b'/bin/ls', [b'ls'], ())", "not allowed"),
    "kill": ("import os; os.kill(os.getppid(), 9)", "not allowed"),
    "ctypes": ("import ctypes; ctypes.CDLL(None).getppid()", "not allowed"),
    "patch torch": ("import torch, numpy as np\ntorch.autograd.grad = lambda *a, **k: [torch.zeros(1)]\n"
                    "np.allclose = np.array_equal = lambda *a, **k: True", "not written yet"),
    "patch the checker": ("import sys\nfor name in ('close', 'is_like', 'judge'):\n"
                          "    setattr(sys.modules['__main__'], name, lambda *a: True)", "not written yet"),
    "forge": ("import os, numpy as np\nfor i in range(9):\n    for name in ('value', 'gradient of z1', 'gradient of z2'):\n"
              "        np.save(f'results/{i}.{name}.npy', np.zeros(()))\nos._exit(0)", "Your loss is 0.0000"),
    "pickle": ("import os, numpy as np\nnp.save('results/0.value.npy', np.array([print], object), allow_pickle=True); os._exit(0)",
               "before it gave an answer"),
    "fifo": ("import os; os.mkfifo('results/0.error'); os._exit(0)", "before it gave an answer"),
    "syntax": ("def (:", "SyntaxError: invalid syntax (line "),
}


def hostile(code, base=BLANK):
    return base.replace("import itertools\n", f"import itertools\n{code}\n", 1)


@pytest.mark.slow
def test_whatever_a_file_does_it_gains_nothing_and_costs_that_part_only(tmp_path):
    """One student's parts, so that what the first ones do could harm the last, which is right."""
    texts = [hostile(code) for code, _ in HOSTILE.values()] + [SOURCES["simclr"]]
    parts = []
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.py").write_text(text)
        parts.append({**answers("simclr", "loss"), "method": "simclr", "part": "loss", "file": tmp_path / f"{i}.py"})
    parts.insert(-1, {**parts[0], "file": tmp_path / "missing.py"})
    *rows, missing, right = check.grade(parts, ROOT, seconds=3, strict=True)
    for (name, (_, words)), found in zip(HOSTILE.items(), rows):
        assert check.total(found) == 0, name
        assert words in found[0]["text"] and len(found[0]["text"]) < 400, (name, found[0]["text"])
    assert missing[0]["text"] == "methods/simclr.py is missing, or cannot be read" and check.total(missing) == 0
    assert lost(right) == []


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info < (3, 11) or sys.platform != "linux", reason="fork_exec has other arguments")
def test_a_process_that_a_part_leaves_behind_is_ended(tmp_path):
    code = ESCAPE.replace("{v}", "process_group")
    (tmp_path / "0.py").write_text(hostile(code, SOURCES["simclr"]))
    part = {**answers("simclr", "loss"), "method": "simclr", "part": "loss", "file": tmp_path / "0.py"}
    (rows,) = check.grade([part], ROOT, seconds=30)  # not strict, so that it can start it
    assert lost(rows) == []
    assert "sleep 4321" not in subprocess.run(["ps", "ax"], capture_output=True, text=True).stdout


@pytest.mark.parametrize("value", [np.zeros(()), np.zeros((3, 2)), np.full(24, np.nan), np.zeros(24), np.zeros((0,))], ids=lambda v: str(v.shape))
@pytest.mark.parametrize("draws", [0, 24])
def test_arrays_of_any_shape_are_judged(value, draws):
    """What a hostile process returns must not end the grading of the others."""
    right = [{"value": x, "gradient of z": [x, 0.0]} for x in (1.0, 2.0)]
    case = dict(name="0", group="f", extra="", wrt=["z"], values=["value"], dtype="float64", draws=draws, settings={}, inputs={"z": [1.0, 2.0]},
                expected=right if draws else right[:1], mistakes={"m": [{"value": 5.0, "gradient of z": [5.0, 0.0]}]})
    moved = [{**case, "wrt": [], "mistakes": {}, "moved": sign, "draws": 0} for sign in (1, -1)]
    part = {"groups": [{"name": "f", "points": {"value": 6, "gradient": 4}, "mistakes": {"m": "x"}}],
            "cases": [{**case, "direction": {"z": [1.0, 1.0]}}, *moved]}
    for gradient in (np.zeros(()), np.zeros((24, 2)), value):
        rows = check.judge_anything(part, [{"value": value, "gradient of z": gradient}, {"value": value}, {"value": np.zeros((2, 2))}], "")
        assert check.total(rows) == 0 and all(row["text"] for row in rows)


# ---------------------------------------------------------------------------------------------- the commands
def submit(folder, **files):
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)


@pytest.mark.slow
def test_the_command_grades_a_folder_of_submissions(tmp_path):
    wrong = SOURCES["simclr"].replace("if __name__", "right_loss = nt_xent_loss\n\n\ndef nt_xent_loss(z1, z2, temperature=0.5):\n"
                                      "    return 2 * right_loss(z1, z2, temperature)\n\n\nif __name__")
    submit(tmp_path / "all" / "anna" / "methods", simclr=SOURCES["simclr"], byol=SOURCES["byol"], torch="raise SystemExit",
           sitecustomize="raise SystemExit")
    submit(tmp_path / "all" / "ben", simclr=wrong, common="raise SystemExit")
    submit(tmp_path / "all" / "=cleo")
    submit(tmp_path / "all" / "dan")
    (tmp_path / "all" / "dan" / "simclr.py").symlink_to(ROOT / "methods" / "simclr.py")
    out = tmp_path / "grades"
    result = run_script(ROOT / "tests" / "handout.py", "--grade", tmp_path / "all", "--seed", 5, "--out", out, "--parts", "loss")
    assert result.status == 0 and result.err == "", result.err
    rows = {row["student"]: row for row in csv.DictReader((out / "grades.csv").open())}
    assert {name: (row["simclr loss"], row["byol loss"], row["points"], row["of"]) for name, row in rows.items()} == {
        "anna": ("10", "10", "20", "20"), "ben": ("0", "0", "0", "20"), "'=cleo": ("0", "0", "0", "20"), "dan": ("0", "0", "0", "20")}
    results = json.loads((out / "ben" / "results.json").read_text())
    assert all(set(test) == {"name", "score", "max_score", "output"} for test in results["tests"])
    (first,) = [test for test in results["tests"] if test["name"] == "simclr, loss: nt_xent_loss: value"]
    assert first["score"] == 0 and first["max_score"] == 6 and mistakes.LOSSES["simclr"][0].mistakes["twice"] in first["output"]
    # one student's own folder, as Gradescope has it; the parts from the marks in the file
    blank = tmp_path / "one"
    submit(blank / "methods", simclr=BLANK)
    result = run_script(ROOT / "tests" / "handout.py", "--grade", blank, "--seed", 5, "--out", tmp_path / "results")
    assert "parts loss;" in result.out, result.out + result.err
    assert sum(test["score"] for test in json.loads((tmp_path / "results" / "results.json").read_text())["tests"]) == 0


@pytest.mark.slow
def test_a_student_works_in_the_folder_with_check_and_pytest(tmp_path):
    home = tmp_path / "homework"
    result = run_script(ROOT / "tests" / "handout.py", "simclr", "--out", home)
    assert result.status == 0 and result.err == ""
    result = run_script("check.py", cwd=home)
    assert result.status == 1 and result.err == "" and "0 of 10 points" in result.out and "not written yet" in result.out
    (home / "methods" / "simclr.py").write_text(SOURCES["simclr"])
    result = run_script("check.py", "simclr", "loss", cwd=home)
    assert result.status == 0 and "Together: 10 of 10 points, and 2 extra" in result.out
    result = run_script("-mpytest", "-q", "-p", "no:cacheprovider", cwd=home)
    assert result.status == 0 and "2 passed" in result.out, result.out
    for argv, known in ((["simclr", "model"], "try simclr loss"), (["simclr", "loss", "typo: value"], "try nt_xent_loss: value"),
                        (["simlcr", "--train"], "try simclr"), (["simclr", "loss", "value", "more"], "see check.py --help")):
        result = run_script("check.py", *argv, cwd=home)
        assert result.status == 2 and is_one_line_error(result) and known in result.err, result.err
    task = (home / "answers" / "task.json").read_text()
    for damaged in ('{"methods": [', "{}", "null"):
        (home / "answers" / "task.json").write_text(damaged)
        result = run_script("check.py", cwd=home)
        assert is_one_line_error(result) and "answers/task.json cannot be read" in result.err
    result = run_script(ROOT / "tests" / "check.py", cwd=home)
    assert is_one_line_error(result) and "answers" in result.err
    (home / "answers" / "task.json").write_text(task)
    (home / "common.py").unlink()
    result = run_script("check.py", cwd=home)
    assert is_one_line_error(result) and "no common.py beside check.py" in result.err


def test_the_workflow_for_github_classroom_has_a_step_for_each_row_of_points():
    text = handout.classroom(["simclr", "byol"], ["loss"])
    assert sum(map(int, re.findall(r"max-score: (\d+)", text))) == 20
    ids = re.findall(r"- id: (\S+)", text)
    assert len(set(ids)) == 4 and f"runners: {','.join(ids)}" in text
    assert all(f'{name.upper()}_RESULTS: "${{{{steps.{name}.outputs.result}}}}"' in text for name in ids)
    assert "command: 'python check.py simclr loss \"nt_xent_loss: value\"'\n" in text  # quoted: it has a colon


def test_a_folder_with_the_tables_name_is_refused_before_and_any_name_can_be_written(tmp_path):
    (tmp_path / "Grades.csv").mkdir()
    with pytest.raises(handout.common.UserError, match="rename it"):
        handout.submissions_in(tmp_path)
    row = handout.grades_row("M\udc81ller", {})  # a name in another encoding, as a zip file brings it
    assert row["student"].encode() == b"M?ller"


@pytest.mark.slow
@pytest.mark.parametrize("argv", [[], ["simclr", "simclr"], ["simlcr"], ["simclr", "--parts", "losses"], ["--grade", "."],
                                  ["simclr", "--out="], ["simclr", "--parts="], ["--grade", "nowhere", "--seed", "3", "--out="],
                                  ["simclr", "--seed", "3"], ["--grade", "nowhere", "--seed", "3"], ["simclr", "--train"]], ids=" ".join)
def test_a_wrong_command_is_one_line(argv, tmp_path):
    assert is_one_line_error(run_script(ROOT / "tests" / "handout.py", *argv, cwd=tmp_path)), argv


def test_what_is_not_graded_is_named_and_a_stray_file_is_refused(tmp_path, capsys):
    for student in ("anna", "ben"):
        submit(tmp_path / student, simclr=BLANK)
    (tmp_path / "carol.zip").write_bytes(b"")
    (tmp_path / "dan").symlink_to(tmp_path / "anna")
    assert [student for student, _ in handout.submissions_in(tmp_path)] == ["anna", "ben"]
    assert capsys.readouterr().err == "not graded, since they are files or links: carol.zip, dan\n"
    (tmp_path / "simclr.py").write_text(BLANK)  # one student's, if no others had the file in folders of their own
    with pytest.raises(handout.common.UserError, match=r"lies beside folders that have it, too \(anna, ben\); move it away"):
        handout.submissions_in(tmp_path)
    (tmp_path / "ben").rename(tmp_path / "__ben")
    assert handout.submissions_in(tmp_path) == [(tmp_path.name, tmp_path)]
    said = capsys.readouterr().err
    assert "not graded, since their names begin with . or __: __ben\n" in said
    assert f"graded as one student's folder, since {tmp_path / 'simclr.py'} lies in it; move it away if anna is a student\n" in said


def test_a_folder_of_grades_that_cannot_be_made_is_refused_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    submit(tmp_path / "all" / "anna", simclr=BLANK)
    with pytest.raises(handout.common.UserError, match="--out .*file.* cannot be made"):
        handout.grade(tmp_path / "all", [], [], 5, tmp_path / "file" / "grades")


def test_grades_do_not_go_into_the_folder_of_the_submissions(tmp_path):
    submit(tmp_path / "anna", simclr=BLANK)
    with pytest.raises(handout.common.UserError, match="lies in the folder of --grade"):
        handout.grade(tmp_path, [], [], 5, tmp_path / "grades")
    assert [path.name for path in tmp_path.iterdir()] == ["anna"]


def test_a_python_that_cannot_import_torch_ends_the_grading(tmp_path, monkeypatch, capsys):
    """Else all students would have no points."""
    (tmp_path / "python").write_text("#!/bin/sh\necho 'ModuleNotFoundError: no torch' >&2; exit 1\n")
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "simclr.py").write_text(BLANK)
    monkeypatch.setattr(check.sys, "executable", str(tmp_path / "python"))
    part = {**handout.answers_of("simclr", "loss", 3), "method": "simclr", "part": "loss", "file": tmp_path / "simclr.py"}
    with pytest.raises(SystemExit) as end:
        check.grade([part], ROOT, 5)
    assert end.value.code == 2 and "could not import torch to run the functions (ModuleNotFoundError: no torch)" in capsys.readouterr().err


def test_what_ends_the_grading_of_one_student_costs_the_others_nothing(tmp_path, monkeypatch, capsys):
    for student in ("anna", "ben", "carl"):
        submit(tmp_path / "all" / student, simclr=SOURCES["simclr"])
    real = check.grade

    def grade(wanted, *rest, **more):
        if "ben" in str(wanted[0]["file"]):
            raise RecursionError
        return real(wanted, *rest, **more)

    monkeypatch.setattr(check, "grade", grade)
    handout.grade(tmp_path / "all", ["simclr"], ["loss"], 5, tmp_path / "grades")
    rows = {row["student"]: row["points"] for row in csv.DictReader((tmp_path / "grades" / "grades.csv").open())}
    assert rows == {"anna": "10", "ben": "0", "carl": "10"} and "ben: the grading itself ended with RecursionError" in capsys.readouterr().err


def test_the_slow_case_is_the_last_and_its_numbers_are_the_seeds():
    """It may take all the time that a part has."""
    cases = {seed: handout.answers_of("wmse", "loss", seed)["cases"] for seed in (0, 7)}
    kinds = [case["extra"] == "speed" for case in cases[0]]
    assert any(kinds) and kinds == sorted(kinds)
    large = [[case for case in found if case["extra"] == "speed"][0] for found in cases.values()]
    assert large[0]["inputs"] != large[1]["inputs"] and large[0]["expected"] != large[1]["expected"]


def test_a_students_file_is_found_beside_a_large_data_set(tmp_path):
    submit(tmp_path / "methods", simclr=BLANK)
    (tmp_path / "data" / "c0").mkdir(parents=True)
    for i in range(20_001):
        (tmp_path / "data" / "c0" / f"{i}.png").touch()
    assert handout.file_of(tmp_path, "simclr") == tmp_path / "methods" / "simclr.py"


def test_an_existing_folder_is_not_overwritten(tmp_path):
    (tmp_path / "homework").mkdir()
    (tmp_path / "homework" / "mine").write_text("x")
    with pytest.raises(handout.common.UserError, match="exists already"):
        handout.write_handout(["byol"], ["loss"], tmp_path / "homework")
    assert [path.name for path in tmp_path.rglob("*")] == ["homework", "mine"]


# ---------------------------------------------------------------------------------------------- trained
@pytest.mark.parametrize("accuracy, learned, words", [(95.0, True, "as it should"), (60.0, False, "less than"), (26.0, False, "not learn")])
def test_a_trained_backbone_is_compared_with_the_seeds_of_the_reference(accuracy, learned, words):
    text, verdict = check.compare_knn(accuracy, (95.5, 95.8))
    assert verdict == learned and words in text and "95.5 to 95.8" in text
    assert sorted(handout.REFERENCE_KNN) == sorted(METHODS) and all(min(known) > 90 for known in handout.REFERENCE_KNN.values())


def test_a_training_that_never_ends_is_ended(tmp_path, monkeypatch, capsys):
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / "simclr.py").write_text("import signal\nsignal.signal(15, signal.SIG_IGN)\nprint('begun', flush=True)\nwhile True: pass")
    monkeypatch.setattr(check, "HERE", tmp_path)
    monkeypatch.setattr(check, "TRAINING_SECONDS", 1)
    monkeypatch.setattr(check, "LAST_SECONDS", 1)
    assert not check.train("simclr")
    assert capsys.readouterr().out.endswith("no 20-NN was measured\n")


@pytest.mark.slow
def test_the_knn_of_a_run_is_computed_from_its_backbone(tmp_path):
    from common import build_backbone

    torch.manual_seed(0)
    place = tmp_path / "runs" / "simclr-patterns-s0"
    place.mkdir(parents=True)
    torch.save(build_backbone("tiny", 32)[0].state_dict(), place / "backbone.pt")
    row = handout.trained_row(tmp_path, "simclr")
    assert row["points"] == 0 and re.search(r"Your 20-NN is 2\d\.\d %", row["text"]), row
    torch.save({"layers": print}, place / "backbone.pt")
    assert "cannot be read" in handout.trained_row(tmp_path, "simclr")["text"]


def test_the_usual_mistakes_are_printed_by_the_command_of_the_page(tmp_path):
    """From any folder, and without a PYTHONPATH."""
    surroundings = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, str(ROOT / "tests" / "mistakes.py")]
    result = subprocess.run(command, cwd=tmp_path, env=surroundings, capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout == mistakes.table(), result.stderr


def test_what_a_notebook_has_at_its_top_and_a_loss_in_float32_lose_no_points(tmp_path):
    """A line for the environment is no reason for 0 points, nor is rounding for "value and gradient do not belong together"."""
    top = 'import os\nimport tempfile\nos.environ["KMP_DUPLICATE_LIB_OK"] = "True"\ntempfile.mkdtemp()\n'
    texts = [("simclr", "loss", SOURCES["simclr"].replace("import itertools\n", top + "import itertools\n", 1))]
    for method in ("moco", "barlow"):
        source = SOURCES[method]
        assert ".to(torch.promote_types(" in source
        texts.append((method, "loss", re.sub(r"(\w+)\.to\(torch\.promote_types\(\1\.dtype, torch\.float32\)\)", r"\1.float()", source)))
    assert texts[0][2] != SOURCES["simclr"] and all(".float()" in text for _, _, text in texts[1:])
    for rows in grade_texts(tmp_path, texts):
        assert not lost(rows), lost(rows)
