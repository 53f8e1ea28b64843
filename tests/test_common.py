"""The shape of common.py: a page of contents that is true, two parts, short lines, functions and classes.

    python tests/test_common.py      # write the line numbers of the page of contents anew, print the sizes
"""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "common.py"
ENTRY = re.compile(r"^#   +(\d+)  (\S.*?)(?:  .*)?$")  # "#   123  name   what it does"
BANNER = "# " + "=" * 78


def section_lines(lines):
    """{title of a section: its line number}, in the order of the file; `# ==== Title ====` or a title between two bars."""
    found = {}
    for i, line in enumerate(lines, 1):
        if line.startswith("# ==== "):
            found[line.strip("#= ")] = i
        if line == BANNER and lines[i:] and lines[i].startswith("# ") and lines[i + 1] == BANNER:
            found[re.sub(r"^\d+\. ", "", lines[i][2:])] = i + 1
    return found


def definition_lines(source):
    """{name: line number} of all functions, classes and methods (`Class.method`)."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = node.lineno
        if isinstance(node, ast.ClassDef):
            found.update({f"{node.name}.{part.name}": part.lineno for part in node.body if isinstance(part, ast.FunctionDef)})
    return found


def contents(source):
    """[(index of the line, number that it gives, name)] of the page of contents."""
    page = source.split("\nimport ")[0].splitlines()
    return [(i, int(match[1]), match[2]) for i, line in enumerate(page) if (match := ENTRY.match(line))]


def rewritten(source):
    """The source with the true line numbers in its page of contents."""
    lines = source.split("\n")
    places = {**section_lines(lines), **definition_lines(source)}
    for i, _, name in contents(source):
        lines[i] = re.sub(r"^#   +\d+", f"#   {places[name]:4}", lines[i])
    return "\n".join(lines)


def sizes(source):
    """{what: bytes} of what precedes Part I, Part I and Part II."""
    start, middle = (source.index(f"{BANNER}\n# {part}: ") for part in ("Part I", "Part II"))
    parts = {"header": source[:start], "Part I": source[start:middle], "Part II": source[middle:], "all": source}
    return {name: len(text.encode()) for name, text in parts.items()}


def nodes(kind):
    """[(length in lines, name, first line)] of all functions or classes, the longest first."""
    found = [(node.end_lineno - node.lineno + 1, node.name, node.lineno) for node in ast.walk(ast.parse(SOURCE)) if isinstance(node, kind)]
    return sorted(found, reverse=True)


def calls(tree):
    """[name] of what a tree uses of common.py, in the order of the text: `common.name`, calls on `run` and `data`."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "common":
            found.append((node.lineno, node.col_offset, node.attr))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
            if owner := {"run": "Run", "data": "Data"}.get(node.func.value.id):
                found.append((node.lineno, node.col_offset, f"{owner}.{node.func.attr}"))
    return list(dict.fromkeys(name for _, _, name in sorted(found)))


def calls_of_methods():
    """The names that method files use."""
    return {name for path in (ROOT / "methods").glob("*.py") for name in calls(ast.parse(path.read_text()))}


SOURCE = FILE.read_text()
LINES = SOURCE.splitlines()


def test_every_line_number_of_the_contents_is_true():
    assert SOURCE == rewritten(SOURCE), "run `python tests/test_common.py`"
    assert contents(SOURCE)


def test_wrong_numbers_are_seen_and_mended():
    i, number, _ = contents(SOURCE)[3]
    lines = SOURCE.split("\n")
    lines[i] = lines[i].replace(str(number), str(number + 1))
    wrong = "\n".join(lines)
    assert wrong != SOURCE and rewritten(wrong) == SOURCE


def test_the_contents_name_all_that_a_method_file_calls_and_the_sections_of_part_two():
    listed = [name for _, _, name in contents(SOURCE)]
    assert calls_of_methods() <= set(listed)
    titles = list(section_lines(LINES))
    titles = titles[1 + next(i for i, title in enumerate(titles) if title.startswith("Part II: ")):]
    assert [name for name in listed if name in titles] == titles
    assert len(listed) == len(set(listed)) and set(listed) - set(titles) <= calls_of_methods()


def test_the_contents_are_in_the_order_of_train_and_part_one_in_that_of_the_contents():
    """A reader goes down Part I as train() does. A class stays in one piece, its methods in that order."""
    listed = [name for _, _, name in contents(SOURCE)]
    tree = ast.parse((ROOT / "methods" / "cw_rgp.py").read_text())
    (train,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "train"]
    assert len(calls(train)) > 20
    assert [name for name in listed if name in calls(train)] == calls(train)
    part_two = LINES.index(next(line for line in LINES if line.startswith("# Part II: ")))
    places = {name: line for name, line in definition_lines(SOURCE).items() if name in listed and line < part_two}
    for owner in ("", "Run", "Data"):  # "": functions and classes
        lines = [places[name] for name in listed if name in places and name.rpartition(".")[0] == owner]
        assert lines == sorted(lines) and len(lines) > 1, owner


def test_two_parts_in_their_sizes():
    found = sizes(SOURCE)
    assert found["Part I"] <= 60_000, found
    assert found["all"] <= 155_000, found  # the aim of the house is 125,000


def test_what_a_default_run_enters_lies_in_part_one():
    """All that train() calls; the command line, `main` and what only torchrun needs are in Part II."""
    part_two = LINES.index(next(line for line in LINES if line.startswith("# Part II: ")))
    opening = {"main", "parse_args", "mean_over_ranks"}
    for name in calls_of_methods() - opening:
        assert definition_lines(SOURCE)[name] < part_two, name


def test_lines_have_at_most_100_columns():
    assert [i for i, line in enumerate(LINES, 1) if len(line) > 100] == []


@pytest.mark.parametrize("kind, most", [((ast.FunctionDef,), 50), ((ast.ClassDef,), 150)], ids=["functions", "classes"])
def test_no_function_above_50_lines_and_no_class_above_150(kind, most):
    assert [(name, length) for length, name, line in nodes(kind) if length > most] == []


def test_public_functions_and_classes_have_a_docstring():
    for node in ast.parse(SOURCE).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            assert ast.get_docstring(node), node.name


def test_plain_code():
    """No list by multiplication with a condition, no table of lambdas, no comprehension of two conditions."""
    for node in ast.walk(ast.parse(SOURCE)):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            assert not any(isinstance(side, ast.List) for side in (node.left, node.right)), node.lineno
        if isinstance(node, (ast.Dict, ast.Tuple, ast.List)):
            assert not any(isinstance(v, ast.Lambda) for v in getattr(node, "values", getattr(node, "elts", ()))), node.lineno
        if isinstance(node, ast.comprehension):
            assert len(node.ifs) <= 1


def eval_rewritten(source):
    """eval.py with the right line numbers in the contents of its docstring."""
    lines = source.splitlines(keepends=True)
    numbers = [i for i, line in enumerate(lines, 1) if re.match(r"# \d\. ", line)]
    rows = [i for i, line in enumerate(lines) if re.match(r" +\d+  [a-z ]+  ", line) and i < 20]
    for row, number in zip(rows, numbers, strict=True):
        lines[row] = f"{number:7}" + lines[row].lstrip().lstrip("0123456789")
    return "".join(lines)


def test_the_contents_of_eval_have_true_line_numbers():
    source = (ROOT / "eval.py").read_text()
    assert source == eval_rewritten(source), "run `python tests/test_common.py`"
    lines = source.splitlines()
    for number, name in re.findall(r"^ +(\d+)  ([a-z ]+?)  ", source[:2000], re.MULTILINE):
        assert name in lines[int(number) - 1].lower(), (name, number)


if __name__ == "__main__":
    FILE.write_text(rewritten(SOURCE))
    (ROOT / "eval.py").write_text(eval_rewritten((ROOT / "eval.py").read_text()))
    print({name: f"{size} bytes" for name, size in sizes(SOURCE).items()})
    for kind_ in (ast.FunctionDef, ast.ClassDef):
        print([(name, length) for length, name, line in nodes((kind_,))][:4])
