"""How fast a training step is, how close to the machine's ceilings, and what batch fits.

    python -m benchmarks.training_step --models DeepFlow-B/2-2T --batch-sizes 4 --precisions no,bf16 --device cpu
    python -m benchmarks.training_step --models DeepFlow-XL/2-3T,DeepFlow-B/2-2T --batch-sizes 128,64,32,256
    python -m benchmarks.training_step --memory --models DeepFlow-XL/2-3T

The step is `train.py`'s: its `TrainingStep`, the outcome read one step later, and one average of the weights; the
latents are random and on the device. The first batch size, precision and variant are the base case of each model; the
others are varied one at a time. With --rounds above 1, cases that differ only in precision and variant stay in memory
and are measured in turn, so that a drift of the machine's speed does not change their ratio.
"""

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.machine import KIND_OF_PRECISION, matrix_rate
from benchmarks.profiling import profile
from benchmarks.rows import (
    OUT_OF_MEMORY,
    SIZES,
    TINY_SIZES,
    Rows,
    add_common_flags,
    benchmark_device,
    describe_error,
    fresh_start,
    parse_counts,
    parse_words,
    precisions_of,
    random_network,
    rows_of,
    summary,
    synchronize,
    times_of,
)
from common.errors import OneLineParser, exits_on_user_error
from common.flags import number
from common.processes import allow_tf32
from dataset import LatentBatch
from loss import DeepFlowLoss
from models import create_model
from models.presets import model_config
from training.ema import EMA
from training.guard import LossScale
from training.optimizer import make_optimizer
from training.plan import measure, peak_flops
from training.records import memory_gib
from training.step import TrainingStep

WARM_UP = 5  # steps after the first
LARGEST = 1024  # images that --memory tries


class Variant(NamedTuple):
    """One way to run the training step."""

    compiled: bool = True
    tf32: bool = False
    checkpointing: bool = False
    attention: SDPBackend | None = None  # None: torch chooses
    tuned: bool = False  # the compiler tries several tile sizes of pointwise kernels and reductions


VARIANTS = {
    "compiled": Variant(),
    "eager": Variant(compiled=False),
    "compiled+tf32": Variant(tf32=True),
    "compiled+checkpointing": Variant(checkpointing=True),
    "eager+checkpointing": Variant(compiled=False, checkpointing=True),
    "compiled+tuned": Variant(tuned=True),
    "compiled+flash": Variant(attention=SDPBackend.FLASH_ATTENTION),
    "compiled+cudnn": Variant(attention=SDPBackend.CUDNN_ATTENTION),
    "compiled+efficient": Variant(attention=SDPBackend.EFFICIENT_ATTENTION),
}


class Case(NamedTuple):
    """The case that one row measures."""

    model: str
    batch_size: int
    precision: str
    variant: str

    @property
    def name(self) -> str:
        """The title of its row."""
        return f"{self.model} {self.precision} batch {self.batch_size} {self.variant}"


class Training:
    """The training loop of `train.py` on random latents, advanced step by step."""

    def __init__(self, case: Case, device: torch.device, sizes: dict[str, int]) -> None:
        self.case, self.device, self.variant = case, device, VARIANTS[case.variant]
        self.network = random_network(case.model, device, **sizes).train()
        self.network.checkpoint_activations = self.variant.checkpointing
        self.ema = EMA(self.network, 0.9999)
        if self.variant.compiled:
            self.network.compile_parts(options={"max_autotune_pointwise": True} if self.variant.tuned else None)
        self.optimizer = make_optimizer(self.network)
        self.scale = LossScale(dynamic=case.precision == "fp16")
        self.step = TrainingStep(
            self.network,
            DeepFlowLoss(),
            self.optimizer,
            random_batches(case.batch_size, self.network.config, device),
            batch_size=case.batch_size,
            scaling_factor=1.0,
            precision=case.precision,
        )
        self.loop = self.steps()

    def steps(self) -> Iterator[int]:
        """`train.py`'s loop without its records: after each launch yields the number of applied steps."""
        done, update = 0, None
        while True:
            ahead = done + (update is not None)
            gradients = self.step.gradients(ahead, self.scale.value(ahead - done))
            if update is not None:
                if not all(map(math.isfinite, update.read()[0].values())):
                    if not self.scale.overflowed():
                        raise ArithmeticError("the loss is not finite")
                    self.optimizer.zero_grad()
                    update = None
                    continue
                self.scale.applied()
                self.ema.update(self.network, done + 1)
                done += 1
            update = self.step.launch(ahead, gradients)
            yield done

    def start(self) -> float:
        """Run the first two steps, which compile, then warm-up steps; returns the seconds of the first two."""
        began = time.perf_counter()
        with arithmetic(self.variant):
            for _ in range(2):
                next(self.loop)
            synchronize(self.device)
            seconds = time.perf_counter() - began
            for _ in range(WARM_UP if self.device.type == "cuda" else 1):
                next(self.loop)
        synchronize(self.device)
        return seconds

    def time(self, count: int) -> list[float]:
        """Seconds of each of `count` steps."""
        with arithmetic(self.variant):
            return times_of(lambda: next(self.loop), count, self.device)


@contextmanager
def arithmetic(variant: Variant) -> Iterator[None]:
    """Inside, the variant's matrix products and attention kernel are used; then as before."""
    attention = nullcontext() if variant.attention is None else sdpa_kernel([variant.attention])
    with attention, allow_tf32(variant.tf32):
        yield


def random_batches(batch_size: int, config: dict[str, Any], device: torch.device) -> Iterator[LatentBatch]:
    """Endless batches of random latents and labels on the device, two in turn."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (batch_size, 2 * config["in_channels"], config["input_size"], config["input_size"])
    batches = []
    for _ in range(2):
        moments = torch.rand(shape, generator=generator, device=device).half()
        labels = torch.randint(config["num_classes"], (batch_size,), generator=generator, device=device)
        rows = torch.arange(batch_size)
        batches.append(LatentBatch(moments, labels, rows, torch.zeros(batch_size, dtype=torch.bool)))
    return itertools.cycle(batches)


def work_of(case: Case, sizes: dict[str, int]) -> Any:
    """The computed cost of one image, see `training.plan.measure`."""
    options = SimpleNamespace(
        activation_checkpointing=VARIANTS[case.variant].checkpointing, mixed_precision=case.precision
    )
    return measure(SimpleNamespace(config=model_config(case.model, **sizes), options=options))


def group_rows(cases: Sequence[Case], device: torch.device, sizes: dict[str, int], steps: int, rounds: int) -> list:
    """One row per case; the cases are in memory together and measured in turn."""
    fresh_start(device)
    runs = [Training(case, device, sizes) for case in cases]
    started = [run.start() for run in runs]
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for place, seconds in enumerate(times):
            seconds.extend(runs[place].time(steps))
    alone = device.type == "cuda" and len(cases) == 1
    peak = {"peak_gib": memory_gib(device)} if alone else {}
    runs.clear()
    fresh_start(device)  # the matrix rate needs memory too
    return [
        rates(case, summary(seconds), device, sizes) | {"start_up_s": start} | peak
        for case, seconds, start in zip(cases, times, started, strict=True)
    ]


def rates(case: Case, times: dict[str, float], device: torch.device, sizes: dict[str, int]) -> dict[str, Any]:
    """Images/s and shares of the ceilings; a backward counts as two forwards, a recomputed forward as none."""
    flop = 6 * work_of(case, sizes).macs * case.batch_size
    achieved = flop / times["ms"] * 1e3
    row = {**case._asdict(), "images_per_second": case.batch_size / times["ms"] * 1e3, **times}
    row |= {"tflop_per_step": flop / 1e12, "tflops": achieved / 1e12}
    if peak := peak_flops(device, case.precision):
        row["mfu_data_sheet"] = achieved / peak
    measured = matrix_rate(KIND_OF_PRECISION[case.precision], device)["tflops"]
    return row | {"mfu_measured": achieved / 1e12 / measured, "measured_tflops": measured}


def cases_of(model: str, batch_sizes: list[int], precisions: list[str], variants: list[str]) -> list[Case]:
    """The base case first, then the other precisions, variants and batch sizes, one varied at a time."""
    base = Case(model, batch_sizes[0], precisions[0], variants[0])
    return [
        base,
        *(base._replace(precision=name) for name in precisions[1:]),
        *(base._replace(variant=name) for name in variants[1:]),
        *(base._replace(batch_size=size) for size in batch_sizes[1:]),
    ]


def measure_steps(rows: Rows, cases: list[Case], device: torch.device, sizes: dict, steps: int, rounds: int) -> None:
    """One row per case."""
    groups = [[case] for case in cases]
    if rounds > 1:
        by_size: dict[tuple, list[Case]] = {}
        for case in cases:
            by_size.setdefault((case.model, case.batch_size), []).append(case)
        groups = list(by_size.values())
    for group in groups:
        rows.measure([c.name for c in group], lambda group=group: group_rows(group, device, sizes, steps, rounds))


def largest_batch(case: Case, device: torch.device, sizes: dict[str, int], largest: int) -> dict[str, Any]:
    """The largest power of two that trains two steps in the memory, and the plan's estimate for it."""
    found: dict[str, Any] = {"model": case.model, "precision": case.precision, "variant": case.variant}
    total = torch.cuda.get_device_properties(device).total_memory / 2**30 if device.type == "cuda" else math.inf
    peaks: list[tuple[int, float]] = []
    batch, end = case.batch_size, "not tried"
    while batch <= largest:
        slope = (peaks[-1][1] - peaks[-2][1]) / (peaks[-1][0] - peaks[-2][0]) if len(peaks) > 1 else 0.0
        if peaks and peaks[-1][1] + slope * (batch - peaks[-1][0]) > 1.1 * total:
            end = "would not fit"  # judged by the smaller batches: saves the time
            break
        try:
            peaks.append((batch, peak_of(case._replace(batch_size=batch), device, sizes)))
        except Exception as error:
            if describe_error(error) != OUT_OF_MEMORY:
                raise
            end = OUT_OF_MEMORY
            break
        batch *= 2
    if not peaks:
        return found | {"error": OUT_OF_MEMORY, "batch_size": case.batch_size}
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in create_model(case.model, **sizes).parameters())
    states, work = 4 * 5 * parameters, work_of(case, sizes)  # weights, gradients, two moments, one average
    tried = [
        {"batch_size": size, "estimate_gib": (states + size * work.activation_bytes) / 2**30}
        | ({"peak_gib": peak} if device.type == "cuda" else {})  # on a CPU the peak would be that of the whole process
        for size, peak in peaks
    ]
    return found | tried[-1] | {"twice_as_many": end, "tried": tried}


def peak_of(case: Case, device: torch.device, sizes: dict[str, int]) -> float:
    """Peak memory of tensors in two steps, GiB."""
    fresh_start(device)
    run = Training(case, device, sizes)
    with arithmetic(run.variant):
        for _ in range(2):
            next(run.loop)
    synchronize(device)
    return memory_gib(device)


def profile_case(case: Case, device: torch.device, sizes: dict[str, int]) -> dict[str, Any]:
    """The profile of steps after the warm-up."""
    fresh_start(device)
    run = Training(case, device, sizes)
    run.start()
    with arithmetic(run.variant):
        return profile(lambda: next(run.loop), 5, device)


def build_parser() -> OneLineParser:
    """The flags."""
    parser = OneLineParser(description="Training steps: images/s, share of the ceilings, memory.")
    add = parser.add_argument
    add("--models", default="DeepFlow-XL/2-3T", help="names, separated by commas (default: %(default)s)")
    add("--batch-sizes", default="128", help="images per step, separated by commas (default: %(default)s)")
    add("--precisions", default="bf16", help="no, bf16, fp16, separated by commas (default: %(default)s)")
    add("--variants", default="compiled,eager", help=f"of {', '.join(VARIANTS)} (default: %(default)s)")
    add("--steps", type=number(int, 1), default=20, help="steps timed per round (default: %(default)s)")
    add("--rounds", type=number(int, 1), default=1, help="above 1: precisions and variants in turn (default: 1)")
    add("--memory", action="store_true", help="find the largest batch, from the smallest of --batch-sizes up, instead")
    add("--profile", action="store_true", help="also profile the base case of each model")
    add("--tiny", action="store_true", help="latents of 8 x 8 in place of 32 x 32")
    add_common_flags(parser)
    return parser


@exits_on_user_error
def main() -> None:
    """Parse the command line and measure."""
    args = build_parser().parse_args()
    models, batch_sizes = args.models.split(","), parse_counts(args.batch_sizes, "--batch-sizes")
    variants = parse_words(args.variants, VARIANTS, "--variants")
    device, sizes = benchmark_device(args.device), SIZES | (TINY_SIZES if args.tiny else {})
    precisions = precisions_of(args.precisions, device)
    for model in models:
        model_config(model)
    rows = rows_of("memory" if args.memory else "training", args, device)
    if args.memory:
        for model, variant in itertools.product(models, variants):
            case = Case(model, min(batch_sizes), precisions[0], variant)
            most = 4 * case.batch_size if args.tiny else LARGEST
            name = f"{model} {case.precision} {variant}"
            rows.measure(name, lambda case=case, most=most: largest_batch(case, device, sizes, most))
    else:
        for model in models:
            cases = cases_of(model, batch_sizes, precisions, variants)
            first = 1 if args.rounds == 1 else len(cases)
            measure_steps(rows, cases[:first], device, sizes, args.steps, args.rounds)
            if args.profile:
                name = f"profile of {cases[0].name}"
                rows.measure(name, lambda case=cases[0]: profile_case(case, device, sizes))
            measure_steps(rows, cases[first:], device, sizes, args.steps, args.rounds)
    rows.finish()


if __name__ == "__main__":
    main()
