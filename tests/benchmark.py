"""What a training step costs beside the bare backbone: a script, not a test.

    python tests/benchmark.py                       # all nine, default flags
    python tests/benchmark.py --busy 2              # with two busy programs on the machine
    python tests/benchmark.py --methods wmse --flags "--proj-dim 128 --w-size 256" --repeats 3
    python tests/benchmark.py --grow                # as batch, d and views grow: Markdown
    python tests/benchmark.py --whitening           # S^(-1/2) by eigh and by products only

Times are medians of milliseconds by the clock on the wall. The columns:

bare       forward and backward of the backbone on the same views; for MoCo and BYOL also the
           forward of the target's backbone
step       a step of train(): bare, augment, heads, loss, optimizer and watch
augment    the views
heads      forward and backward of the whole network, without `bare` and `loss`
loss       the loss alone, measured with the outputs of all networks given
optimizer  the optimizer's step
watch      the sum of the losses and the look for numbers that are not finite
peak       arithmetic of the whole network (products and convolutions) divided by the time of the
           step, as a share of what a product of two 2048 x 2048 matrices reaches in the same
           precision

Without --busy, run it on a machine that does nothing else.
"""

import concurrent.futures
import contextlib
import copy
import importlib
import multiprocessing
import os
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "methods")]
import common  # noqa: E402  (before torch: it says how torch's threads wait for each other)

import torch  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

METHODS = ("simclr", "moco", "byol", "simsiam", "barlow", "vicreg", "wmse", "shuffled_dbn",
           "cw_rgp")
GROW = {"default": "", "batch 128": "--batch-size 128", "batch 512": "--batch-size 512",
        "batch 1024": "--batch-size 1024", "d 32": "--proj-dim 32", "d 128": "--proj-dim 128",
        "d 512": "--proj-dim 512", "3 views": "--views 3", "4 views": "--views 4"}
# What grows beside the backbone, whose cost is linear in batch and views.
WHY = {
    "simclr": "logits (s N)^2",
    "moco": "N x queue logits; the queue is queue x d",
    "byol": "a second network's forward; linear in d",
    "simsiam": "linear in N; d^2 in the projector",
    "barlow": "one d x d matrix per pair of views: d^2",
    "vicreg": "one d x d covariance per view: d^2",
    "wmse": "d x d Cholesky per slice: d^3, and it needs w > d",
    "shuffled_dbn": "per view, g eigen-decompositions of (d / g)^2: d^3 / g^2",
    "cw_rgp": "per view, w_iter N g / w eigen-decompositions of w x w: N g w^2, hence d only "
              "through g",
}


class Given(torch.nn.Module):
    """Stands for a network: gives the outputs that it once had, whatever the input."""

    def __init__(self, outputs):
        super().__init__()
        self.outputs = outputs
        self.calls = 0

    def forward(self, _):
        self.calls += 1
        return self.outputs[(self.calls - 1) % len(self.outputs)]


def only_the_loss(model, views, autocast):
    """A copy of the model in which every network is a `Given`: its passes are the loss's."""
    outputs = {name: [] for name, _ in model.named_children()}
    hooks = []
    for name, child in model.named_children():
        def keep(module, inputs, output, name=name):
            outputs[name].append(output.detach().requires_grad_(output.requires_grad))
        hooks.append(child.register_forward_hook(keep))
    with torch.autocast(**autocast):
        model(views)
    for hook in hooks:
        hook.remove()
    loss_only = copy.copy(model)
    loss_only._modules = {name: Given(values) for name, values in outputs.items()}
    loss_only._buffers = {name: buffer.clone() for name, buffer in model._buffers.items()}
    loss_only.update_target = lambda: None  # MoCo, BYOL: it belongs to the networks
    return loss_only


class Stopwatch:
    """Milliseconds of the parts of a step, in the order of the calls."""

    def __init__(self, device):
        self.device = device
        self.parts = {}

    def start(self):
        self.wait()
        self.began = time.perf_counter()

    def stop(self, part):
        self.wait()
        now = time.perf_counter()
        self.parts.setdefault(part, []).append(1000 * (now - self.began))
        self.began = now

    def wait(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def bare_pass(model, views, autocast):
    """Forward and backward of the backbone, and the forward of a target's."""
    target = getattr(model, "target_backbone", None)
    one_way = hasattr(model, "queue")  # MoCo: the last view is no query, the first no key
    with torch.autocast(**autocast):
        h = [model.backbone(x) for x in (views[:-1] if one_way else views)]
        if target is not None:
            with torch.no_grad():
                [target(x) for x in (views[1:] if one_way else views)]
    torch.autograd.backward(h, [torch.ones_like(v) for v in h])


def measure(name, backbone, flags, repeats, with_loss=True):
    """(medians in ms, args, FLOP of `network`, MiB of a GPU's memory or None) of a method."""
    module = importlib.import_module(name)
    args = module.parse_args(["--backbone", backbone, *shlex.split(flags)])
    common.check(not args.compile, "--compile is not measured here; try it without")
    args, device = common.set_up(args)
    args.image_size = size = args.image_size or 32
    torch.manual_seed(0)
    shape = args.batch_size, 3, size, size
    images = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    half = torch.full((3, 1, 1), 0.5, device=device)
    data = SimpleNamespace(args=args, device=device, size=size, mean=half, std=half)
    model = module.build(args).to(device, memory_format=torch.channels_last).train()
    optimizer = common.build_optimizer(model, args)
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    finite = common.FiniteWatch(model, data, "")
    autocast = dict(device_type=device.type, dtype=torch.bfloat16, enabled=args.precision == "bf16")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    clock = Stopwatch(device)
    loss_only, work = None, None
    for step in range(repeats + 2):
        clock.start()
        views = common.Data.augment(data, images, step)
        clock.stop("augment")
        optimizer.zero_grad(set_to_none=True)
        clock.start()
        bare_pass(model, views, autocast)
        clock.stop("bare")
        finite.outputs = {name: [] for name in finite.outputs}  # of the bare pass
        clock.start()
        with torch.autocast(**autocast):
            loss = model(views)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        clock.stop("network")
        optimizer.step()
        clock.stop("optimizer")
        finite.note(step, loss)
        loss_sum += loss.detach()
        clock.stop("watch")
        if work is None:
            with FlopCounterMode(display=False) as counter, torch.autocast(**autocast):
                model(views).backward()
            work = counter.get_total_flops()
        if with_loss:
            loss_only = loss_only or only_the_loss(model, views, autocast)
            clock.start()
            with torch.autocast(**autocast):
                loss = loss_only(views)
            loss.backward()
            clock.stop("loss")
    ms = {part: statistics.median(times[2:]) for part, times in clock.parts.items()}
    ms["step"] = ms["augment"] + ms["network"] + ms["optimizer"] + ms["watch"]
    memory = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else None
    return ms, args, work, memory


def peak_speed(device, dtype, repeats=10):
    """FLOP a second of a product of two 2048 x 2048 matrices: the fastest of `repeats`."""
    a = torch.randn(2048, 2048, device=device).to(dtype)
    clock = Stopwatch(device)
    for _ in range(repeats + 2):
        clock.start()
        a @ a
        clock.stop("product")
    return 2 * 2048**3 / (min(clock.parts["product"][2:]) / 1000)


@contextlib.contextmanager
def busy_programs(count):
    """`count` processes beside this one that compute, at most as long as it lives. Each is in a
    session of its own, like one of another terminal, to which Linux gives a share of the cores."""
    loop = f"import os\nwhile os.getppid() == {os.getpid()}: sum(range(10**6))"
    loop = [sys.executable, "-c", loop]
    programs = [subprocess.Popen(loop, start_new_session=True) for _ in range(count)]
    try:
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()


def table(options):
    """Print a row for each method. Raises UserError if all refuse their flags."""
    refused = 0
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{common.processor_name(device)}, {torch.get_num_threads()} threads, "
          f"{options.busy} busy programs, torch {torch.__version__}; ms, "
          f"medians of {options.repeats}")
    parts = ("augment", "heads", "loss", "optimizer", "watch")
    titles = "".join(f"{part:>10}" for part in parts)
    print(f"{'method':13}{'bare':>9}{'step':>9}{'step/bare':>10}{'images/s':>9}{titles}{'peak':>7}")
    for name in options.methods:
        try:
            ms, args, work, memory = measure(name, options.backbone, options.flags, options.repeats)
        except common.UserError as error:  # sizes that this method does not take
            print(f"{name:13}refused: {error}", flush=True)
            refused += 1
            continue
        ms["heads"] = ms["network"] - ms["bare"] - ms["loss"]
        dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
        share = work / (ms["step"] / 1000) / peak_speed(device, dtype)
        speed = 1000 * args.batch_size / ms["step"]
        times = "".join(f"{ms[part]:10.1f}" for part in parts)
        print(f"{name:13}{ms['bare']:9.1f}{ms['step']:9.1f}{ms['step'] / ms['bare']:10.2f}"
              f"{speed:9.0f}{times}{100 * share:5.0f} %"
              + (f"  {memory:.0f} MiB" if memory else ""), flush=True)
    check_some(refused < len(options.methods))


def check_some(measured):
    """Raise UserError if nothing was measured. Why is printed above it."""
    common.check(measured, "nothing was measured; try other --flags or --backbone")


def step_and_memory(name, backbone, flags, repeats):
    """(milliseconds of a step, MiB at its peak beyond the process's own), or a refusal's words.

    Run it in a fresh process."""
    import resource  # not on Windows

    unit = 2**20 if sys.platform == "darwin" else 2**10
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    try:
        ms, _, _, on_gpu = measure(name, backbone, flags, repeats, with_loss=False)
    except common.UserError as refusal:
        return str(refusal)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    return ms["step"], on_gpu or after - before


def grow(options):
    """Print a Markdown table of step time and memory over the columns of GROW. Raises UserError if
    all cells refuse."""
    refusals, measured = [], False
    print("milliseconds of a step / MiB at its peak\n")
    print("| method | " + " | ".join(GROW) + " | what grows beside the backbone |")
    print("|---" * (len(GROW) + 2) + "|")
    for name in options.methods:
        cells = []
        for column, flags in GROW.items():
            task = name, options.backbone, f"{options.flags} {flags}", options.repeats
            fresh = multiprocessing.get_context("spawn")
            with concurrent.futures.ProcessPoolExecutor(1, fresh) as process:
                found = process.submit(step_and_memory, *task).result()
            if isinstance(found, str):
                refusals.append(f"{name}, {column}: {found}")
                cells.append("refused")
            else:
                cells.append(f"{found[0]:.0f} / {found[1]:.0f}")
                measured = True
        print(f"| {name} | " + " | ".join(cells) + f" | {WHY[name]} |", flush=True)
    print("\n".join(["", *refusals]))
    check_some(measured)


def newton_schulz(s, steps):
    """S^(-1/2) of symmetric positive-definite S [..., n, n] by products only.

    With Y = S / |S| and Z = I, steps Y <- Y T and Z <- T Z with T = (3 I - Z Y) / 2 take Z to
    (S / |S|)^(-1/2) (the coupled iteration of Higham 2008, Functions of Matrices, chapter 6)."""
    norm = s.flatten(-2).norm(dim=-1)[..., None, None]
    identity = torch.eye(s.shape[-1], dtype=s.dtype, device=s.device)
    y, z = s / norm, identity
    for _ in range(steps):
        t = 1.5 * identity - 0.5 * z @ y
        y, z = y @ t, t @ z
    return z / norm.sqrt()


def whitening(options):
    """Print times and errors of S^(-1/2) of the 128 matrices of CW-RGP's default step, by eigh and
    by as many steps of Newton-Schulz as are best, for two condition numbers."""
    from cw_rgp import InverseSquareRoot

    print(f"{common.processor_name(torch.device('cpu'))}, {torch.get_num_threads()} threads, torch "
          f"{torch.__version__}; 128 matrices 64 x 64, fp32, medians of {options.repeats}")
    print("condition  by                         ms    largest relative error")
    for condition in (1e2, 2e4):
        torch.manual_seed(0)
        u = torch.linalg.qr(torch.randn(128, 64, 64, dtype=torch.float64))[0]
        eigenvalues = condition ** -torch.linspace(0, 1, 64, dtype=torch.float64)
        s, exact = (u * eigenvalues @ u.mT).float(), u * eigenvalues.rsqrt() @ u.mT

        def error(found):
            return ((found - exact).norm(dim=(1, 2)) / exact.norm(dim=(1, 2))).max().item()

        steps = min(range(1, 31), key=lambda steps: error(newton_schulz(s, steps)))
        ways = {"eigh": InverseSquareRoot.apply,
                f"Newton-Schulz, {steps} steps": lambda s: newton_schulz(s, steps)}
        for name, way in ways.items():
            clock = Stopwatch(s.device)
            for _ in range(options.repeats):
                clock.start()
                found = way(s)
                clock.stop("ms")
            ms = statistics.median(clock.parts["ms"])
            print(f"{condition:9.0e}  {name:23} {ms:6.1f}    {error(found):.1e}", flush=True)


def parse_args(argv=None):
    """The options. Raises UserError."""
    first_line = (__doc__ or "benchmark.py").splitlines()[0]  # -OO: no docstring
    parser = common.OneLineParser(prog="benchmark.py", description=first_line, allow_abbrev=False)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--backbone", default="tiny")
    parser.add_argument("--flags", default="", help="flags of the method, in one string")
    parser.add_argument("--repeats", type=common.number(int, least=1, example=10), default=10)
    parser.add_argument("--busy", type=common.number(int, least=0, most=1000, example=2), default=0,
                        help="busy programs beside the measurement")
    parser.add_argument("--grow", action="store_true",
                        help="vary batch, embedding size and views; each cell in a fresh process")
    parser.add_argument("--whitening", action="store_true",
                        help="only CW-RGP's S^(-1/2): by eigh, and by Newton-Schulz iterations")
    options = parser.parse_args(argv)
    try:
        shlex.split(options.flags)
    except ValueError as error:
        raise common.UserError(f"--flags {options.flags}: {error}; try \"--views 4\"") from error
    return options


def run(options):
    """Measure beside the busy programs, and print."""
    with busy_programs(options.busy):
        (whitening if options.whitening else grow if options.grow else table)(options)


if __name__ == "__main__":
    common.main(run, parse_args)
