"""Every flag of the nine scripts and of eval.py, given something that it cannot mean.

Each case: status 2, one line on stderr that names the flag and says what would work, and no file written. A value that a
message proposes ("try --flag VALUE") is then tried: the same command line with it has to be accepted."""

import argparse
import importlib
import itertools
import random
import re

import pytest

import common
from conftest import METHODS, SMALL_OF, is_one_line_error, run_here

TRY = r"\btry |choose from"  # an explicit way out
HELP = r"see \w+\.py --help"  # all that can be said of a flag that does not exist

# (script, flags, what the message names, the way out)
SHARED = [
    ("--dataset mnist", "--dataset", TRY), ("--dataset Folder", "--dataset", TRY), ("--data-dir nowhere", "--data-dir nowhere", TRY),
    ("--test-fraction 1", "--test-fraction", "try 0.2"), ("--test-fraction -0.1", "--test-fraction", "try 0.2"),
    ("--image-size 7", "--image-size", "try 32"), ("--image-size 1025", "--image-size", "try 32"),
    ("--image-size 32x32", "--image-size", "try 32"),
    ("--backbone resnet17", "--backbone resnet17", "try tiny"), ("--backbone Tiny", "--backbone Tiny", "try tiny"),
    ("--backbone vgg16", "--backbone vgg16", "try tiny"), ("--epochs 0", "--epochs", "try 10"), ("--epochs 1e3", "--epochs", "try 10"),
    ("--epochs -1", "--epochs", "try 10"), ("--batch-size 1", "--batch-size", "try 256"), ("--batch-size 32.5", "--batch-size", "try 256"),
    ("--lr 0", "--lr", "try 0.003"), ("--lr nan", "--lr", "try 0.003"), ("--lr inf", "--lr", "try 0.003"), ("--lr 0,1", "--lr", "try 0.003"),
    ("--lr-bias -1", "--lr-bias", "try 0.003"), ("--lr-filters 0 --optimizer muon", "--lr-filters", "try 0.1"),
    ("--lr-filters 0.1 --optimizer adam", "--lr-filters", "--optimizer muon"), ("--weight-decay=-1e-6", "--weight-decay", "try 1e-06"),
    ("--warmup -1", "--warmup", "try 500"),
    ("--warmup 2.5", "--warmup", "try 500"), ("--schedule linear", "--schedule", TRY), ("--optimizer adamw", "--optimizer", TRY),
    ("--augment mocov2", "--augment", TRY), ("--proj-hidden 0", "--proj-hidden", "try \\d+"), ("--proj-dim 1", "--proj-dim", "try \\d+"),
    ("--proj-layers 0", "--proj-layers", "try 2"), ("--proj-layers 9", "--proj-layers", "try 2"), ("--views 1", "--views", "try 2"),
    ("--views 17", "--views", "try 2"), ("--seed -1", "--seed", "try 0"), ("--seed 2147483648", "--seed", "try 0"),
    ("--seed zero", "--seed", "try 0"),
    ("--device gpu", "--device", TRY), ("--device cuda:0", "--device", TRY), ("--precision fp16", "--precision", TRY),
    ("--num-workers -1", "--num-workers", "try 2"), ("--num-workers 257", "--num-workers", "try 2"),
    ("--eval-every -1", "--eval-every", "try 1"),
    ("--save-every -5", "--save-every", "try 100"), ("--keep-every -1", "--keep-every", "try 10"), ("--train-images 1", "--train-images", "try 1000"), ("--log-every 0", "--log-every", "try 10"),
    ("--lr", "--lr: expected one argument", HELP),
    ("--learning-rate 1", "--learning-rate", HELP), ("--retry 3", "--retry 3", HELP), ("--batch 32", "--batch", HELP), ("--resume yes", "yes", HELP),
    ("--compile=1", "--compile", HELP), ("--init nowhere.pt", "--init nowhere.pt", TRY),
    # A script's empty variable
    ("--init=", "--init", "try a name"), ("--out=", "--out", "try a name"), ("--dataset cifar10 --data-dir=", "--data-dir", "try data"),
]
OF_METHOD = [
    ("simclr", "--temperature 0", "--temperature", "try 0.5"), ("simclr", "--temperature -0.5", "--temperature", "try 0.5"),
    ("simclr", "--momentum 0.9", "--momentum", HELP),
    ("moco", "--queue-size 0", "--queue-size", "try 4096"), ("moco", "--queue-size 4e3", "--queue-size", "try 4096"),
    ("moco", "--momentum 1.5", "--momentum", "try 0.99"), ("moco", "--momentum -0.1", "--momentum", "try 0.99"),
    ("moco", "--temperature 0", "--temperature", "try 0.1"), ("moco", "--bn-splits 0", "--bn-splits", "try 8"),
    ("moco", "--bn-splits 3", "--bn-splits 3", "try --bn-splits 4"), ("moco", "--bn-splits 32", "--bn-splits 32", "try --bn-splits 16"),
    ("byol", "--momentum 2", "--momentum", "try 0.97"), ("byol", "--predictor cubic", "--predictor", TRY),
    ("byol", "--queue-size 64", "--queue-size", HELP),
    ("simsiam", "--pred-hidden 0", "--pred-hidden", TRY), ("simsiam", "--predictor direct", "--predictor", TRY),
    ("simsiam", "--no-stop-gradient=yes", "--no-stop-gradient", HELP), ("simsiam", "--predictor-lr 0.1", "--predictor-lr", HELP),
    ("barlow", "--lambd -1", "--lambd", "try 0.0051"), ("barlow", "--lambd 1e", "--lambd", "try 0.0051"),
    ("barlow", "--lambda 0.1", "--lambda", HELP),
    ("vicreg", "--inv -1", "--inv", "try 25"), ("vicreg", "--var much", "--var", "try 25"), ("vicreg", "--cov nan", "--cov", "try 1"),
    ("wmse", "--whitening eigen", "--whitening", TRY), ("wmse", "--w-size 2", "--w-size", "try 128"),
    ("wmse", "--w-size 24", "--w-size 24", "try --w-size"),
    ("wmse", "--w-size 3", "--w-size 3", "try --w-size"), ("wmse", "--proj-dim 16", "--w-size 16", "--eps above 0; try --w-size 32"),
    ("wmse", "--proj-dim 64 --w-size 32", "--proj-dim 64", "--eps above 0; try --proj-dim "), ("wmse", "--w-iter 0", "--w-iter", "try 1"),
    ("wmse", "--eps 1", "--eps", "try 0"), ("wmse", "--eps -0.1", "--eps", "try 0"),
    ("shuffled_dbn", "--groups -1", "--groups", "try 0"), ("shuffled_dbn", "--groups 5", "--groups 5", "try --groups 4"),
    ("shuffled_dbn", "--groups 1", "--batch-size 32", "try --proj-dim 31|try --groups 2"), ("shuffled_dbn", "--groups 64", "--groups 64", "try --groups 32"),
    ("cw_rgp", "--groups 0", "--groups", "try 4"), ("cw_rgp", "--groups 3", "--groups 3", "try --groups 4"),
    ("cw_rgp", "--w-size 5", "--w-size 5", "try --w-size 4"),
    ("cw_rgp", "--groups 8", "--w-size 16 --proj-dim 64 --groups 8: --w-size must be at most", "--eps above 0; try --w-size 8"),
    ("cw_rgp", "--groups 100", "--groups 100", "try --groups"),
    ("cw_rgp", "--eps 1", "--eps", "try 0"),
]
OF_EVAL = [
    ("", "RUN", HELP), ("no-such-run", "no-such-run", "try runs/"), ("run --features H,h", "--features", "try H,Z"),
    ("run --features=", "--features", "try H,Z"),
    ("run --dataset imagenet", "--dataset", TRY), ("run --dataset folder", "--data-dir", "needs --data-dir DIR"),
    ("run --data-dir=", "--data-dir", "try it without"), ("run --probe-epochs -1", "--probe-epochs", "try 500"),
    ("run --probe-epochs 1.5", "--probe-epochs", "try 500"), ("run --label-fraction 0", "--label-fraction", "try 0.1"),
    ("run --label-fraction 1.01", "--label-fraction", "try 0.1"), ("run --label-fraction 10%", "--label-fraction", "try 0.1"),
    ("run --finetune 0", "--finetune", "try 0.1"), ("run --split half", "--split", TRY), ("run --split test", "--split", "--save"), ("run --save f.npy", "--save f.npy", TRY),
    ("run --seed -1", "--seed", "try 0"), ("run --batch-size 0", "--batch-size", "try 500"), ("run --device tpu", "--device", TRY),
    ("run --precision fp64", "--precision", TRY), ("run --num-workers -1", "--num-workers", "try 2"),
    ("run --plot curves.pdf", "--plot curves.pdf", "try curves.pdf.png"),
    ("run --plot nowhere/p.png", "--plot nowhere/p.png", "try a folder"), ("run --neighbors n", "--neighbors n", "try n.png"),
    ("run --views nowhere/v.png", "--views nowhere/v.png", "try a folder"),
    ("run --json nowhere/r.json", "--json nowhere/r.json", "try a folder"),
    ("run other --views v.png", "--views", "try run"), ("run --label-fraction 0.1 --probe-epochs 0", "--label-fraction", "try --probe-epochs 500"), ("run --probe", "--probe", HELP), ("run --epochs 5", "--epochs", HELP),
]
# Each shared flag's cases go to the nine methods in turn, so that every script and every case is there without their product.
CASES = ([(method, *case) for method, case in zip(itertools.cycle(METHODS), SHARED)] + OF_METHOD + [("eval", *case) for case in OF_EVAL])


def command_line(script, text, images):
    if script == "eval":
        return text.split()
    small = ["--batch-size", "32", "--epochs", "1", "--precision", "fp32", *SMALL_OF[script], "--dataset", "folder", "--data-dir",
             str(images)]
    return small + text.split()


def proposals(line):
    """[(flag, value)] of the values that a message proposes."""
    line = line.strip()
    bare = re.search(r"error: (--[\w-]+): '.*' is not .*; try (\S+)$", line)
    if bare:
        return [bare.groups()]
    after = line.rsplit("; try ", 1)
    return re.findall(r"(--[\w-]+) ([\w.+-]+)", after[1].split(", or ")[0]) if len(after) == 2 else []


def replaced(argv, flag, value):
    """The command line with another value for a flag, in place of all that it was given before."""
    kept = [word for i, word in enumerate(argv) if word != flag and not word.startswith(flag + "=") and (i == 0 or argv[i - 1] != flag)]
    return [*kept, flag, value]


def refusals(script, argv, most):
    """How often a command line is refused, when each message's proposal is followed; at most `most`."""
    for count in range(most):
        try:
            importlib.import_module(script).parse_args(argv)
            return count
        except common.UserError as error:
            proposed = proposals(f"error: {error}")
            assert proposed, f"{argv}: {error}"
            for flag, value in proposed:
                argv = replaced(argv, flag, value)
            print(f"error: {error}")
    return most


def everything_below(folder):
    return sorted(path for path in folder.rglob("*"))


@pytest.mark.parametrize("script, text, named, way_out", CASES, ids=[f"{c[0]} {c[1]}" for c in CASES])
def test_bad_input(script, text, named, way_out, small_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = command_line(script, text, small_folder)
    result = run_here(script, argv)
    assert is_one_line_error(result), (result.status, result.err)
    said = result.err.split("error: ", 1)[1]
    assert named in said and re.search(way_out, said), result.err
    assert not result.out and everything_below(tmp_path) == []
    for flag, value in (proposed := proposals(result.err)):
        argv = replaced(argv, flag, value)
    most = 1 if "; try --" in said else 3  # proposed sizes work together and at once; a value in its bounds may break a rule of sizes
    assert not proposed or refusals(script, argv, most) < most, proposed


def test_there_are_enough_cases_and_every_flag_has_one():
    """Flags without a value, and those that take any text, cannot be wrong by themselves."""
    assert len(CASES) >= 60
    free = {"--out", "--stream", "--resume", "--compile", "--no-stop-gradient", "--no-shuffle", "--help"}
    known = {flag for module in METHODS for flag in flags_of(module)}
    tried = {word.split("=")[0] for script, text, *_ in CASES if script != "eval" for word in text.split() if word.startswith("--")}
    assert known - tried - free == set()
    free = {"--help", "--data-dir", "--supervised"}  # the second: test_eval.py, since it takes a trained run
    tried = {word.split("=")[0] for script, text, *_ in CASES if script == "eval" for word in text.split() if word.startswith("--")}
    assert flags_of("eval") - tried - free == set()


def flags_of(script):
    """The long flags of a script's parser."""
    found, real = [], argparse.ArgumentParser.parse_args
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", lambda parser, argv=None: (found.append(parser), real(parser, argv))[1])
        importlib.import_module(script).parse_args(["run"] if script == "eval" else [])
    return {flag for action in found[0]._actions for flag in action.option_strings if flag.startswith("--")}


@pytest.mark.parametrize("script, text, named, proposed", [
    ("vicreg", "--batch-size 128", "--batch-size 128: --batch-size must be at most 64, the training images", ("--batch-size", "64")),
    ("vicreg", "--image-size 16 --augment none", "--augment none does not crop", ("--augment", "crop-flip")),
])
def test_what_only_the_images_can_tell(script, text, named, proposed, small_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = command_line(script, text, small_folder)
    result = run_here(script, argv)
    assert is_one_line_error(result) and named in result.err and proposals(result.err) == [proposed], result.err
    assert everything_below(tmp_path) == []
    assert run_here(script, [*argv, *proposed, "--proj-hidden", "32"]).status == 0


@pytest.mark.parametrize("method, flag, value", [("shuffled_dbn", "--groups", "3"), ("cw_rgp", "--groups", "13"), ("cw_rgp", "--groups", "600"),
                                                 ("simsiam", "--pred-hidden", "0"), ("cw_rgp", "--w-size", "1"), ("wmse", "--w-size", "2")])
def test_at_the_defaults_the_first_proposal_is_accepted(method, flag, value):
    assert refusals(method, [flag, value], most=2) == 1


def test_processes_that_do_not_divide_the_batch(small_folder, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    argv = command_line("vicreg", "", small_folder)
    result = run_here("vicreg", argv)
    assert is_one_line_error(result) and "--batch-size 32: --batch-size must be a multiple of the 3 processes; try --batch-size 33" in result.err
    for batch in ("30", "33"):
        importlib.import_module("vicreg").parse_args([*argv, "--batch-size", batch])


def test_more_than_the_memory_is_one_line(small_folder, tmp_path, monkeypatch):
    """More bytes than any machine of today has."""
    monkeypatch.chdir(tmp_path)
    result = run_here("vicreg", command_line("vicreg", "--batch-size 1048576 --views 16 --image-size 1024 --device cpu", small_folder))
    assert is_one_line_error(result) and "--views of 1024 pixels need 4096000 GB; try --" in result.err


SIZES = {
    "moco": {"--batch-size": (2, 400), "--queue-size": (1, 3000), "--bn-splits": (1, 20), "--views": (2, 5)},
    "wmse": {"--batch-size": (3, 400), "--w-size": (3, 200), "--proj-dim": (2, 100)},
    "shuffled_dbn": {"--batch-size": (2, 400), "--proj-dim": (2, 600), "--groups": (0, 40)},
    "cw_rgp": {"--batch-size": (2, 400), "--proj-dim": (2, 600), "--groups": (1, 40), "--w-size": (2, 200)},
}


@pytest.mark.parametrize("method", SIZES)
def test_following_the_proposals_ends_in_an_accepted_command_line(method):
    """Random sets of sizes; each refusal proposes values, and whoever follows has a command line that is accepted."""
    rng, refused = random.Random(method), 0
    for _ in range(50):
        argv = [word for flag, bounds in SIZES[method].items() for word in (flag, str(rng.randint(*bounds)))]
        count = refusals(method, argv, most=2)
        assert count < 2, argv
        refused += count > 0
    assert refused > 5, refused  # else the sizes above are no test
