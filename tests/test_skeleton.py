"""All nine files have one shape, so that `diff` shows ideas. Run with -s to see the matrix of shared lines."""

import ast
import difflib
import itertools
import re

import pytest
from conftest import METHODS, ROOT

BANNER = "# " + "=" * 78
TITLES = ["2. Hyper-parameters", "3. Loss", "4. Model", "5. Training", "6. Start"]
MARK = "# <- "  # a line of the training section that is one method's own
SOURCES = {name: (ROOT / "methods" / f"{name}.py").read_text() for name in METHODS}


def sections(source):
    """{"1. Docstring": ..., "imports": ..., "2. Hyper-parameters": ..., ...} of a method file."""
    docstring = source.split('"""')[1]
    rest = source.split('"""', 2)[2]
    head, *parts = re.split(rf"{re.escape(BANNER)}\n# (.+)\n{re.escape(BANNER)}\n", rest)
    return {"1. Docstring": docstring, "imports": head, **dict(zip(parts[::2], parts[1::2]))}


def shared(a, b):
    """2 * equal lines / all lines, blank lines left out, as difflib matches them."""
    a, b = ([line.rstrip() for line in text.splitlines() if line.strip()] for text in (a, b))
    equal = sum(block.size for block in difflib.SequenceMatcher(None, a, b, autojunk=False).get_matching_blocks())
    return 2 * equal / (len(a) + len(b))


def test_there_are_nine_methods_and_no_tenth():
    assert sorted(path.stem for path in (ROOT / "methods").glob("*.py")) == sorted(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_sections_in_order(name):
    assert list(sections(SOURCES[name]))[2:] == TITLES


@pytest.mark.parametrize("name", METHODS)
def test_length(name):
    lines = SOURCES[name].splitlines()
    assert len(lines) <= 330
    assert 25 <= len(sections(SOURCES[name])["1. Docstring"].splitlines()) <= 50
    assert max(map(len, lines)) <= 160


@pytest.mark.parametrize("name", METHODS)
def test_docstring_says_what_it_must(name):
    text = sections(SOURCES[name])["1. Docstring"]
    for word in ("arXiv", "The idea.", "One step:", "What prevents collapse:", "Diff it against", "Deviations:", f"python methods/{name}.py", "torchrun"):
        assert word in text, word


@pytest.mark.parametrize("name", METHODS)
def test_imports_nothing_but_the_standard_library_torch_and_common(name):
    import sys

    for node in ast.walk(ast.parse(SOURCES[name])):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) else []
        for module in modules:
            top = module.split(".")[0]
            assert top in ("torch", "common") or top in sys.stdlib_module_names, module


@pytest.mark.parametrize("name", METHODS)
def test_training_and_start_are_the_same_text_but_for_marked_lines(name):
    def unmarked(text):
        return [line for line in text.splitlines() if MARK not in line]

    ours, template = sections(SOURCES[name]), sections(SOURCES["cw_rgp"])
    assert unmarked(ours["5. Training"]) == unmarked(template["5. Training"])
    assert ours["6. Start"] == template["6. Start"]
    assert MARK not in template["5. Training"]


def test_every_pair_shares_at_least_85_percent_outside_docstring_loss_and_model():
    common_parts = {name: "\n".join(sections(source)[part] for part in ("imports", TITLES[0], TITLES[3], TITLES[4])) for name, source in SOURCES.items()}
    whole = {name: source.split('"""', 2)[2] for name, source in SOURCES.items()}
    print("\nshared lines outside docstring, loss and model / outside the docstring, in percent")
    print(" " * 13 + " ".join(f"{name[:8]:>8}" for name in METHODS))
    for a in METHODS:
        print(f"{a:13}" + " ".join(f"{100 * shared(common_parts[a], common_parts[b]):3.0f}/{100 * shared(whole[a], whole[b]):3.0f} " for b in METHODS))
    for a, b in itertools.combinations(METHODS, 2):
        assert shared(common_parts[a], common_parts[b]) >= 0.85, (a, b)


def test_common_imports_no_method_and_eval_no_other_package():
    for file in ("common.py", "eval.py"):
        for node in ast.walk(ast.parse((ROOT / file).read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
                assert not {module.split(".")[0] for module in modules} & set(METHODS), file


def test_top_level_is_what_the_house_says():
    allowed = {"README.md", "requirements.txt", "LICENSE", "common.py", "eval.py", "methods", "tests"}
    assert allowed >= {path.name for path in ROOT.iterdir() if not path.name.startswith(".") and path.name not in ("runs", "data", "__pycache__")}


def test_requirements_are_the_four():
    names = {re.split(r"[<>=!~ ]", line.strip())[0] for line in (ROOT / "requirements.txt").read_text().splitlines() if line.strip()}
    assert names == {"torch", "torchvision", "numpy", "pytest"}
