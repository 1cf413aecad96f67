"""How fast images are sampled, and how close that is to the machine's ceilings.

    python -m benchmarks.sampling --output sampling.json
    python -m benchmarks.sampling --model DeepFlow-B/2-2T --precisions no,bf16 --device cpu

Images are made by `generation/images.py` in its own blocks, of latents that are not decoded. Two short runs of the SDE,
of --steps and three times as many, give the time of a step and what does not grow with the steps; from these follow the
images/s of 250 steps, which are not run here.
"""

import itertools
import statistics
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.machine import KIND_OF_PRECISION, matrix_rate
from benchmarks.profiling import profile
from benchmarks.rows import (
    SIZES,
    TINY_SIZES,
    add_common_flags,
    benchmark_device,
    fresh_start,
    parse_words,
    precisions_of,
    random_network,
    rows_of,
    summary,
)
from common.errors import OneLineParser, exits_on_user_error
from common.flags import number
from generation.images import arithmetic, generate_images, images_per_block, prepare_network
from generation.options import Settings
from models import create_model
from training.plan import peak_flops
from training.records import memory_gib

FULL_STEPS = 250  # the paper's
GUIDANCE = {"guided": 1.5, "unguided": 1.0}


def as_pixels(latents: Tensor) -> Tensor:
    """In place of a decoder: the first three channels."""
    return latents[:, :3].clamp(0, 1).mul(255).to(torch.uint8).permute(0, 2, 3, 1)


def velocity_macs(model: str, sizes: dict[str, int]) -> int:
    """Multiply-adds of one image's velocity."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        network = create_model(model, **sizes)
        x = torch.empty(1, network.config["in_channels"], network.config["input_size"], network.config["input_size"])
        network.velocity(x, torch.empty(1), torch.zeros(1, dtype=torch.long))
    return counter.get_total_flops() // 2


class Sampler:
    """Samples blocks of images, guided or not, from one random network prepared as in `generate.py`."""

    def __init__(self, name: str, compiled: bool, precision: str, device: torch.device, sizes: dict[str, int]) -> None:
        self.model = prepare_network(random_network(name, device, **sizes).eval(), compiled, precision)
        self.name, self.compiled, self.precision, self.device, self.sizes = name, compiled, precision, device, sizes
        self.block = images_per_block(self.model.config, device.type)
        self.labels = np.arange(self.block) % self.model.num_classes

    def __call__(self, steps: int, guidance: str) -> float:
        """Seconds for one block, until its images are on the host."""
        settings = Settings(num_steps=steps, cfg_scale=GUIDANCE[guidance], precision=self.precision)
        began = time.perf_counter()
        with arithmetic(tf32=True):
            for _ in generate_images(self.model, as_pixels, self.labels, settings, range(self.block), self.block):
                pass
        return time.perf_counter() - began

    def measure(self, guidance: str, steps: int, repeats: int) -> dict[str, Any]:
        """The time of a step, images/s of 250 steps, shares of the ceilings."""
        fresh_start(self.device)
        start_up, precision = self(2, guidance), self.precision
        pairs = [(self(steps, guidance), self(3 * steps, guidance)) for _ in range(repeats)]
        short_run, long_run = (statistics.median(seconds) for seconds in zip(*pairs, strict=True))
        step_seconds = (long_run - short_run) / (2 * steps)
        total = max(0.0, short_run - steps * step_seconds) + FULL_STEPS * step_seconds
        flop = 2 * velocity_macs(self.name, self.sizes) * self.block * (2 if guidance == "guided" else 1)
        kind = "TF32" if precision == "no" and self.device.type == "cuda" else KIND_OF_PRECISION[precision]
        measured = matrix_rate(kind, self.device)["tflops"]
        row = {"model": self.name, "precision": precision, "guidance": guidance, "compiled": self.compiled}
        row |= {"block": self.block, "images_per_second_250": self.block / total}
        row |= summary([(long - short) / (2 * steps) for short, long in pairs]) | {"ms": 1e3 * step_seconds}
        row |= {"tflops": flop / step_seconds / 1e12, "start_up_s": start_up}
        if peak := peak_flops(self.device, precision):
            row["share_data_sheet"] = flop / step_seconds / peak
        row |= {"share_measured": flop / step_seconds / 1e12 / measured, "measured_tflops": measured}
        return row | ({"peak_gib": memory_gib(self.device)} if self.device.type == "cuda" else {})

    def profile(self) -> dict[str, Any]:
        """Where the time of ten guided steps goes."""
        self(4, "guided")
        return profile(lambda: self(10, "guided"), 1, self.device)


@exits_on_user_error
def main() -> None:
    """Parse the command line and measure."""
    parser = OneLineParser(description="Sampling: images/s of the SDE with 250 steps, share of the ceilings.")
    add = parser.add_argument
    add("--model", default="DeepFlow-XL/2-3T", help="network (default: %(default)s)")
    add("--precisions", default="bf16,fp16,no", help="no, bf16, fp16, separated by commas (default: %(default)s)")
    add("--modes", default="compiled,eager", help="compiled, eager or both (default: %(default)s)")
    add("--steps", type=number(int, 2), default=5, help="of the shorter run (default: %(default)s)")
    add("--repeats", type=number(int, 1), default=5, help="runs of either length (default: %(default)s)")
    add("--profile", action="store_true", help="profile guided sampling in the first mode and precision")
    add("--tiny", action="store_true", help="latents of 8 x 8 in place of 32 x 32")
    add_common_flags(parser)
    args = parser.parse_args()
    modes = parse_words(args.modes, ("compiled", "eager"), "--modes")
    device, sizes = benchmark_device(args.device), SIZES | (TINY_SIZES if args.tiny else {})
    precisions = precisions_of(args.precisions, device)
    create_on_meta(args.model, sizes)
    rows = rows_of("sampling", args, device)
    for mode, precision in itertools.product(modes, precisions):
        sampler = Sampler(args.model, mode == "compiled", precision, device, sizes)
        for guidance in GUIDANCE:
            name = f"{args.model} {precision} {guidance} {mode}"
            rows.measure(name, lambda g=guidance, s=sampler: s.measure(g, args.steps, args.repeats))
            if args.profile and (mode, precision, guidance) == (modes[0], precisions[0], "guided"):
                rows.measure(f"profile of {args.model} {precision} guided {mode}, 10 steps", sampler.profile)
    rows.finish()


def create_on_meta(model: str, sizes: dict[str, int]) -> None:
    """Raise `UserError` for a name that is no model's, before anything is measured."""
    with torch.device("meta"):
        create_model(model, **sizes)


if __name__ == "__main__":
    main()
