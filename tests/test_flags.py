"""The flags of the nine methods: documented defaults and bounds, values from a notebook, and sizes that a message proposes."""

import dataclasses
import importlib
import json
import math
import os
import random
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import byol
import common
from conftest import METHODS, is_one_line_error, run_here

RECIPES = " ".join(sorted(common.RECIPES))
# flag: (type, default, what it may be: an interval, or words, or "" for any)
SHARED = {
    "dataset": (str, "patterns", "patterns cifar10 cifar100 stl10 tinyimagenet folder"),
    "data_dir": (str, "data", ""),
    "test_fraction": (float, 0.2, "[0, 1)"),
    "train_images": (int, None, "[2, inf)"),
    "image_size": (int, None, "[8, 1024]"),
    "augment": (str, "w-mse", RECIPES),
    "views": (int, 2, "[2, 16]"),
    "backbone": (str, "tiny", ""),
    "init": (str, None, ""),
    "proj_hidden": (int, 1024, "[1, 16384]"),
    "proj_dim": (int, 128, "[2, inf)"),
    "proj_layers": (int, 2, "[1, 8]"),
    "epochs": (int, 10, "[1, 1000000]"),
    "batch_size": (int, 256, "[2, inf)"),
    "optimizer": (str, None, "adam sgd lars muon"),
    "lr": (float, 0.003, "(0, 10000]"),
    "lr_bias": (float, None, "(0, 10000]"),
    "lr_filters": (float, None, "(0, 10000]"),
    "weight_decay": (float, 1e-6, "[0, 100]"),
    "warmup": (int, None, "[0, 1000000000]"),
    "schedule": (str, "cosine", "cosine step constant"),
    "seed": (int, 0, "[0, 2147483647]"),
    "out": (str, None, ""),
    "resume": (bool, False, ""),
    "eval_every": (int, 1, "[0, inf)"),
    "save_every": (int, 0, "[0, inf)"),
    "keep_every": (int, 0, "[0, inf)"),
    "log_every": (int, 10, "[1, inf)"),
    "device": (str, "auto", "auto cpu cuda mps xpu"),
    "precision": (str, "auto", "auto fp32 bf16"),
    "compile": (bool, False, ""),
    "stream": (bool, False, ""),
    "num_workers": (int, 2, "[0, 256]"),
}
OTHER_DEFAULTS = {
    "simclr": dict(proj_hidden=512, proj_dim=128, proj_layers=2),
    "moco": dict(proj_hidden=512, proj_dim=128, proj_layers=1, warmup=150),
    "byol": dict(batch_size=128, warmup=150, proj_hidden=1024, proj_dim=64, proj_layers=2),
    "simsiam": dict(proj_hidden=2048, proj_dim=2048, proj_layers=2),
    "barlow": dict(proj_hidden=1024, proj_dim=512, proj_layers=2),
    "vicreg": dict(proj_hidden=1024, proj_dim=512, proj_layers=2),
    "wmse": dict(proj_hidden=1024, proj_dim=64, proj_layers=2),
    "shuffled_dbn": dict(proj_hidden=1024, proj_dim=512, proj_layers=2),
    "cw_rgp": dict(proj_hidden=1024, proj_dim=512, proj_layers=2),
}
OWN = {
    "simclr": {"temperature": (float, 0.5, "[0.0001, inf)")},
    "moco": {"queue_size": (int, 4096, "[1, 1048576]"), "momentum": (float, 0.99, "[0, 1]"), "temperature": (float, 0.1, "[0.0001, inf)"),
             "bn_splits": (int, 8, "[1, inf)")},
    "byol": {"momentum": (float, 0.97, "[0, 1]"), "predictor": (str, "mlp", "mlp none")},
    "simsiam": {"pred_hidden": (int, 512, "[1, 16384]"), "predictor": (str, "mlp", "mlp none"), "no_stop_gradient": (bool, False, "")},
    "barlow": {"lambd": (float, 0.0051, "[0, 1000000]")},
    "vicreg": {"inv": (float, 25.0, "[0, 1000000]"), "var": (float, 25.0, "[0, 1000000]"), "cov": (float, 1.0, "[0, 1000000]")},
    "wmse": {"whitening": (str, "cholesky", "cholesky zca pca bn none"), "w_size": (int, 128, "[3, inf)"), "w_iter": (int, 1, "[1, 100]"),
             "eps": (float, 0.0, "[0, 1)")},
    "shuffled_dbn": {"groups": (int, 0, "[0, inf)"), "no_shuffle": (bool, False, "")},
    "cw_rgp": {"groups": (int, 4, "[1, inf)"), "w_size": (int, 64, "[2, inf)"), "w_iter": (int, 4, "[1, 100]"), "eps": (float, 0.0, "[0, 1)")},
}


def documented(method):
    shared = {name: (type_, OTHER_DEFAULTS[method].get(name, default), allowed) for name, (type_, default, allowed) in SHARED.items()}
    return {**shared, **OWN[method]}


def args_of(method, **values):
    return importlib.import_module(method).Args(**values)


# ---- what is documented --------------------------------------------------------------------------


def allowed_by(name, metadata):
    if words := common.words_of(name, metadata):
        return " ".join(words)
    low = f"[{metadata['least']}, " if metadata["least"] is not None else f"({metadata['above']}, " if metadata["above"] is not None else ""
    high = f"{metadata['most']}]" if metadata["most"] is not None else f"{metadata['below']})" if metadata["below"] is not None else "inf)"
    return low + high if low else ""


@pytest.mark.parametrize("method", METHODS)
def test_types_defaults_and_bounds_are_the_documented_ones(method):
    module = importlib.import_module(method)
    found = {name: (type_, default, allowed_by(name, metadata)) for name, type_, default, metadata in common.flags_of(module.Args)}
    assert found == documented(method)
    args = vars(module.Args())
    assert args == vars(module.parse_args([]))
    assert args == {"method": method, "experiment": "", **{name: default for name, (_, default, _) in documented(method).items()}}
    assert all(type(args[name]) in (type_, type(None)) for name, (type_, _, _) in documented(method).items())


@pytest.mark.parametrize("method", METHODS)
def test_every_bound_holds_and_excludes_what_it_says(method):
    """Just inside each bound is accepted, from a program and as text; just outside is refused."""
    for name, type_, default, metadata in common.flags_of(importlib.import_module(method).Args):
        allowed = documented(method)[name][2]
        if type_ not in (int, float):
            continue
        parse = common.parser_of(type_, default, metadata)
        step = 1 if type_ is int else 1e-9
        low, high = (float(number) for number in allowed[1:-1].split(", "))
        inside = [low if allowed[0] == "[" else low + step]
        outside = [low - step if allowed[0] == "[" else low]
        if high < math.inf:
            inside.append(high if allowed[-1] == "]" else high - step)
            outside.append(high + step if allowed[-1] == "]" else high)
        for value in map(type_, inside):
            assert parse(value) == parse(repr(value)) == value and type(parse(value)) is type_
        for value in (*map(type_, outside), math.nan, math.inf, -math.inf, None, [], "many", True):
            with pytest.raises(common.argparse.ArgumentTypeError, match="is not a .*; try "):
                parse(value)


@pytest.mark.parametrize("method", METHODS)
def test_help_shows_every_flag_with_its_help_and_default(method):
    result = run_here(method, ["--help"])
    assert result.status == 0 and result.out.startswith(f"usage: {method}.py")
    shown = " ".join(result.out.split())
    for name, type_, default, metadata in common.flags_of(importlib.import_module(method).Args):
        help = " ".join(metadata["help"].split())
        with_default = help
        if default is not None and type_ is not bool:  # a method's own default replaces the inherited one
            with_default = f"{help.partition(' (default: ')[0]} (default: {default})"
        assert f"--{name.replace('_', '-')}" in shown and help and with_default.replace("- ", "-") in shown.replace("- ", "-"), name


# ---- values from a program -----------------------------------------------------------------------

GOOD = [
    ("epochs", "5", 5), ("epochs", 5.0, 5), ("epochs", np.int64(5), 5), ("epochs", np.uint8(5), 5), ("epochs", torch.tensor(5), 5),
    ("lr", "1e-2", 0.01), ("lr", 1, 1.0), ("lr", np.float64(0.25), 0.25), ("lr", np.float32(0.25), 0.25), ("lr", np.int32(2), 2.0),
    ("image_size", None, None), ("image_size", "32", 32), ("lr_bias", None, None), ("warmup", 0, 0), ("seed", np.int64(2**31 - 1), 2**31 - 1),
    ("data_dir", Path("some") / "where", os.path.join("some", "where")), ("out", Path("there"), "there"), ("out", None, None),
    ("dataset", np.str_("cifar10"), "cifar10"), ("augment", "simclr", "simclr"), ("backbone", "resnet18", "resnet18"),
    ("resume", True, True), ("compile", False, False),
]


@pytest.mark.parametrize("name, given, value", GOOD, ids=repr)
def test_a_value_from_a_program_becomes_a_plain_one(name, given, value):
    more = {"dataset": "cifar10"} if name == "data_dir" else {}  # `patterns` has no folder
    found = getattr(args_of("byol", **{name: given}, **more), name)
    assert found == value and type(found) is type(value)


BAD = [
    ("epochs", 2.5), ("epochs", "2.5"), ("epochs", True), ("epochs", np.True_), ("epochs", None), ("epochs", [5]), ("epochs", 0),
    ("epochs", np.float64(2.5)), ("epochs", math.inf), ("epochs", math.nan), ("epochs", 5 + 0j), ("views", True), ("views", 1), ("views", 17),
    ("lr", -1), ("lr", 0), ("lr", math.nan), ("lr", "fast"), ("lr", None), ("lr", True), ("lr_bias", 0), ("image_size", 7),
    ("dataset", "mnist"), ("dataset", None), ("dataset", 5), ("dataset", b"cifar10"), ("augment", "none at all"), ("augment", None),
    ("backbone", "resnet17"), ("backbone", None), ("backbone", 18), ("data_dir", None), ("data_dir", 5), ("data_dir", b"data"),
    ("out", 5), ("out", b"run"), ("out", True), ("resume", "yes"), ("resume", 1), ("resume", None), ("compile", "False"),
    ("momentum", 1.1), ("momentum", "much"), ("predictor", "linear"), ("predictor", None), ("predictor", True),
]


@pytest.mark.parametrize("name, given", BAD, ids=repr)
def test_a_value_from_a_program_that_does_not_fit_names_its_flag(name, given):
    with pytest.raises(common.UserError, match=f"^--{name.replace('_', '-')}\\b.*; ?try ") as raised:
        args_of("byol", **{name: given})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("method", METHODS)
def test_an_unknown_keyword_is_a_type_error(method):
    with pytest.raises(TypeError, match="epoch"):
        args_of(method, epoch=5)
    with pytest.raises(TypeError):
        importlib.import_module(method).Args("patterns")  # by keyword only


def test_a_program_meets_the_size_rules_too():
    with pytest.raises(common.UserError, match="^--w-size 100 --batch-size 256: --w-size must divide --batch-size; try --"):
        args_of("wmse", w_size=100)


@pytest.mark.parametrize("argv", [["--epochs", "9" * 5000], ["--lr", "1" * 5000], ["--dataset", "x" * 5000], ["--out", "a/" * 3000], ["--epoch" * 900],
                                  ["--backbone", "y " * 5000], ["--data-dir", "d" * 999], ["--optimizer", "a\nb\x1b[2J"]])
def test_a_long_or_unprintable_value_is_one_short_line(tmp_path, monkeypatch, argv):
    monkeypatch.chdir(tmp_path)
    result = run_here("moco", argv)
    assert is_one_line_error(result) and len(result.err) < 1800 and argv[0][:7] in result.err and "\x1b" not in result.err, result.err
    assert "try" in result.err or "see moco.py --help" in result.err


def test_a_long_value_from_a_program_or_the_environment_is_one_short_line(monkeypatch):
    for make in (lambda: args_of("byol", epochs=10**4000), lambda: args_of("byol", views=["x"] * 10**5),
                 lambda: importlib.import_module("byol").Args(method="m" * 10**5)):
        with pytest.raises(common.UserError) as raised:
            make()
        assert len(str(raised.value)) < 1600 and "try " in str(raised.value)
    monkeypatch.setenv("WORLD_SIZE", "7" * 5000)
    with pytest.raises(common.UserError, match="^WORLD_SIZE=7+") as raised:
        args_of("byol")
    assert len(str(raised.value)) < 600 and "torchrun" in str(raised.value)


# ---- a method's Args -----------------------------------------------------------------------------


def test_a_class_that_python_would_misread_in_silence_is_refused():
    class Forgotten(common.Args):
        method: str = "forgotten"
        lr: float = 0.1

    @dataclasses.dataclass(kw_only=True)
    class Untyped(common.Args):
        method: str = "untyped"
        lr = 0.1

    for kind, words in ((Forgotten, "dataclass"), (Untyped, "lr needs a type")):
        for make in (kind, lambda: common.parse_args(kind, [])):
            with pytest.raises(TypeError, match=words):
                make()


def test_types_written_as_text_are_types_all_the_same(tmp_path, monkeypatch):
    """`from __future__ import annotations` at the head of a copied file makes text of them."""
    text = "import dataclasses, common\n@dataclasses.dataclass(kw_only=True)\nclass Args(common.Args):\n    method: str = 'late'\n" \
           "    lr: float = 0.5\n    most: int | None = common.flag(None, 'of something', least=1, example=3)\n"
    (tmp_path / "late_types.py").write_text("from __future__ import annotations\n" + text)
    monkeypatch.syspath_prepend(tmp_path)
    kind = importlib.import_module("late_types").Args
    assert common.parse_args(kind, ["--lr", "0.25", "--most", "7"]).most == 7 and kind(lr="2").lr == 2.0 and kind().most is None
    with pytest.raises(common.UserError, match="^--most: '0' is not a whole number at least 1; try 3"):
        kind(most=0)


def test_an_overridden_default_keeps_help_and_bounds():
    for module, size in (("byol", 128), ("simsiam", 256), ("simclr", 256)):
        with pytest.raises(common.UserError, match=f"^--batch-size: '1' is not a whole number at least 2; try {size}"):
            args_of(module, batch_size=1)
        shown = " ".join(run_here(module, ["--help"]).out.split())
        assert f"--batch-size N images in a step, in all processes together (default: {size})" in shown
    for value in (0, 9):
        with pytest.raises(common.UserError, match="^--proj-layers: "):
            args_of("moco", proj_layers=value)


def test_set_up_completes_a_copy():
    """What depends on the machine or on other flags is completed by set_up, in a copy."""
    args = args_of("cw_rgp", lr=0.5, optimizer="muon", device="cpu")
    before = dict(vars(args))
    done, device = common.set_up(args)
    assert vars(args) == before and args.lr_bias is None and args.lr_filters is None and args.precision == "auto"
    assert done is not args and type(done) is type(args) and device == torch.device("cpu")
    assert (done.lr_bias, done.lr_filters) == (0.5, 0.1) and done.precision in ("fp32", "bf16")


@pytest.mark.parametrize("backbone, given, expected", [
    ("tiny", None, "muon"), ("resnet18", None, "adam"), ("tiny", "adam", "adam"), ("resnet18", "muon", "muon"),
])
def test_the_default_optimizer_is_muon_for_tiny_and_adam_for_resnets(backbone, given, expected):
    done, _ = common.set_up(args_of("simclr", backbone=backbone, optimizer=given, device="cpu"))
    assert done.optimizer == expected and done.lr_filters == (0.1 if expected == "muon" else None)
    assert done.given["optimizer"] == given


# ---- a run ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def notebook(small_folder, tmp_path_factory):
    """(args, args before, run, folder) of a run as a notebook starts it, with numpy's numbers and paths in it."""
    folder = tmp_path_factory.mktemp("notebook") / "run"
    module = importlib.import_module("moco")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.signal, "signal", lambda *_: None)
        args = module.Args(dataset="folder", data_dir=small_folder, out=folder, device="cpu", epochs=np.int64(1), batch_size="32",
                           queue_size=np.int32(50), bn_splits=2.0, lr=np.float32(0.25), temperature=np.float64(0.2), proj_dim=32, num_workers=0)
        before = dict(vars(args))
        return args, before, module.train(args), folder


def test_train_does_not_change_the_args_it_was_given(notebook):
    args, before, run, _ = notebook
    assert vars(args) == before and args.image_size is None and args.precision == "auto" and args.lr_bias is None
    assert run.args is not args and run.args.image_size == 32 and run.args.lr_bias == 0.25


def test_a_checkpoint_holds_plain_values_only(notebook):
    folder = notebook[3]
    flags = torch.load(folder / "last.pt", weights_only=True)["args"]
    given = flags.pop("given")
    names = {"method", "experiment", *documented("moco")}
    assert set(flags) == set(given) == names
    assert all(type(value) in (int, float, str, bool, type(None)) for value in (*flags.values(), *given.values()))
    assert (given["image_size"], given["precision"], given["lr_bias"]) == (None, "auto", None) and flags["image_size"] == 32
    assert flags["data_dir"] == str(notebook[0].data_dir) and flags["lr"] == 0.25 and flags["epochs"] == 1
    written = json.loads((folder / "config.json").read_text())
    assert {name: written[name] for name in flags} == flags
    again = importlib.import_module("moco").Args(**given)  # what was given makes the same Args
    assert vars(again) == notebook[1]


def test_help_without_docstrings(monkeypatch):
    """python -OO takes them out. test_sizes.py runs it, slowly: it compiles all of torch."""
    assert "BYOL (Grill et al., NeurIPS 2020)" in run_here("byol", ["--help"]).out
    monkeypatch.setattr(importlib.import_module("byol"), "__doc__", None)
    done = run_here("byol", ["--help"])
    assert done.status == 0 and not done.err and "--momentum" in done.out and "(default: 0.97)" in " ".join(done.out.split())


# ---- sizes that a message proposes ---------------------------------------------------------------

SIZES = {
    "moco": {"--batch-size": 2, "--queue-size": 1, "--bn-splits": 1, "--views": 2},
    "wmse": {"--batch-size": 2, "--w-size": 3, "--proj-dim": 2},
    "shuffled_dbn": {"--batch-size": 2, "--proj-dim": 2, "--groups": 1},
    "cw_rgp": {"--batch-size": 2, "--proj-dim": 2, "--groups": 1, "--w-size": 2},
}
HUGE = (10**9, 999_999_937, 2**31 - 1, 735_134_400, 1_000_003, 65_537, 2**20, 97, 6, 3, 2)  # four are prime, one has 1344 divisors


def drawn_sizes(rng, method, kind):
    """{flag: text}: each size is left out, or usual, or of any magnitude, or huge."""
    sizes = {}
    for flag, least in SIZES[method].items():
        value = {"usual": rng.randint(1, 40 if flag in ("--groups", "--bn-splits") else 600), "any": int(10 ** rng.uniform(0, 6)),
                 "huge": rng.choice(HUGE)}[kind]
        if rng.random() < 0.75:
            most = {"--views": 16, "--queue-size": 2**20}.get(flag, value)  # of themselves, without a rule
            sizes[flag] = str(max(least, min(value, most)))
    return sizes


def proposed_at_once(method, sizes, parse=False):
    """False if the sizes are accepted; else what the message proposes is tried, and has to be accepted in its turn."""
    module = importlib.import_module(method)

    def make(sizes):
        if parse:
            return module.parse_args([word for item in sizes.items() for word in item])
        return module.Args(**{flag[2:].replace("-", "_"): value for flag, value in sizes.items()})  # much faster than a parser

    start = time.process_time()
    try:
        make(sizes)
        return False
    except common.UserError as error:
        message = str(error)
    assert time.process_time() - start < 0.8, (sizes, message)
    proposed = message.split("; try ")[1]
    assert re.fullmatch(r"(--[\w-]+ \d+ ?)+", proposed), (sizes, message)
    try:
        make({**sizes, **dict(re.findall(r"(--[\w-]+) (\d+)", proposed))})
    except common.UserError as error:
        pytest.fail(f"{sizes}: {message}, and then: {error}")
    return True


@pytest.mark.parametrize("count", [40, pytest.param(300, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["usual", "any", "huge"])
@pytest.mark.parametrize("method", SIZES)
def test_what_a_size_message_proposes_works_at_once(monkeypatch, method, kind, count):
    rng, refused = random.Random(f"{method} {kind}"), 0
    for i in range(count):
        monkeypatch.setenv("WORLD_SIZE", str(rng.choice((1, 2, 3, 6, 8))) if i % 2 else "1")
        refused += proposed_at_once(method, drawn_sizes(rng, method, kind), parse=i % 10 == 0)
    assert refused > count // 3, refused  # else the sizes above are no test


@pytest.mark.parametrize("method", METHODS)
def test_a_huge_or_prime_batch_alone(monkeypatch, method):
    for batch in (*HUGE, 257, 37):
        for world in (1, 3, 7, 8, 64):
            monkeypatch.setenv("WORLD_SIZE", str(world))
            refused = proposed_at_once(method, {"--batch-size": str(batch)})
            assert refused or batch % world == 0


@pytest.mark.parametrize("world, images", [(7, 2), (8, 5), (3, 3), (8, 33), (64, 100), (2, 3), (1000, 999), (1, 2), (1, 3)])
@pytest.mark.parametrize("method", METHODS)
def test_a_proposal_for_few_images_and_many_processes_works_at_once(monkeypatch, method, world, images):
    """With more processes than images no size fits, so the proposal is one process, with the sizes that it needs."""
    args = importlib.import_module(method).Args()
    args.images, args.dataset = images, "folder"  # as Data has it when the images are read
    monkeypatch.setenv("WORLD_SIZE", str(world))
    started = time.process_time()
    with pytest.raises(common.UserError) as raised:
        common.check_rules(args)
    assert time.process_time() - started < 5 and common.os.environ["WORLD_SIZE"] == str(world)
    message, proposed = str(raised.value).split("; try ")
    if method == "wmse" and images == 2:  # its slices have three images or more
        assert proposed == "more images"
        return
    processes = re.findall(r"^--nproc_per_node=(\d+) ?", proposed)
    assert processes or world <= images, proposed
    monkeypatch.setenv("WORLD_SIZE", *processes or [str(world)])
    for flag, value in re.findall(r"--([\w-]+) (\d+)", proposed):
        setattr(args, flag.replace("-", "_"), int(value))
    common.check_rules(args)


def test_a_proposal_keeps_what_was_asked_for_and_is_near():
    """A size at its default changes before one that was given, and by as little as the rules allow."""
    for method, argv, words in (
            ("wmse", ["--proj-dim", "128"], "try --w-size 256"), ("wmse", ["--batch-size", "100"], "try --w-size 100"),
            ("cw_rgp", ["--groups", "3"], "--groups must divide --proj-dim; try --proj-dim 513"),
            ("moco", ["--batch-size", "100"], "try --bn-splits 10"), ("shuffled_dbn", ["--groups", "5"], "try --proj-dim 510")):
        with pytest.raises(common.UserError) as raised:
            importlib.import_module(method).parse_args(argv)
        assert str(raised.value).endswith(words), raised.value


@pytest.mark.parametrize("method, warmup, said", [("simclr", 1000, True), ("byol", byol.Args.warmup, True), ("simclr", 2, False), ("simclr", None, False), ("moco", 0, False)])
def test_a_warm_up_longer_than_the_run_is_said(method, warmup, said, flags):
    """BYOL's own, of 150 steps, too: its rate stays far below the peak. It is said where a run starts."""
    given = [] if warmup is None else ["--warmup", warmup]
    result = run_here(method, flags(method, "--epochs", 1, *given))
    steps = re.search(r"step (\d+)/\1 ", result.out)[1]
    words = f"--warmup {warmup} exceeds the {steps} steps; try --warmup {int(steps) // 10}\n"
    assert result.status == 0 and (result.err == words if said else result.err == "")
    again = run_here(method, flags(method, "--epochs", 1, *given, "--resume"))
    assert again.status == 0 and again.err == ""  # another warm-up would be refused now
