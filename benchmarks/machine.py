"""The rates of a machine's matrix units and memory: the ceilings that the other benchmarks are compared with.

    python -m benchmarks.machine --output machine.json

Medians of matrix products of random data (zeros take less power and run faster), and the bandwidth of a copy, bytes
read plus bytes written.
"""

import subprocess
from collections.abc import Callable

import torch

from benchmarks.rows import Rows, add_common_flags, benchmark_device, rows_of, summary, times_of
from common.errors import OneLineParser, exits_on_user_error
from common.processes import allow_tf32

DTYPES = {"float32": torch.float32, "TF32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
KIND_OF_PRECISION = {"no": "float32", "bf16": "bf16", "fp16": "fp16"}


def matrix_product(kind: str, size: int, device: torch.device) -> Callable[[], torch.Tensor]:
    """A product of two random matrices of `size` x `size` in one of `DTYPES`, or FP8."""
    a, b = torch.randn(2, size, size, device=device).unbind()
    if kind == "FP8":
        one = torch.ones((), device=device)
        a, b = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()  # the kernel needs contiguous columns
        return lambda: torch._scaled_mm(a, b, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)
    a, b = a.to(DTYPES[kind]), b.to(DTYPES[kind])
    return lambda: a @ b


def matrix_rate(kind: str, device: torch.device, size: int | None = None) -> dict[str, float]:
    """Operations per second of a matrix product, median and spread; on a GPU long enough to reach its power limit."""
    default, count = (8192, 200) if device.type == "cuda" else (512, 10)
    size = size or default
    product = matrix_product(kind, size, device)
    with allow_tf32(kind == "TF32"):
        times_of(product, 3, device)
        times = summary(times_of(product, count, device))
    return {"tflops": 2 * size**3 / times["ms"] * 1e3 / 1e12, **times, "size": size}


def copy_rate(device: torch.device, size: int | None = None) -> dict[str, float]:
    """Bytes read and written per second by a copy within the device's memory."""
    size = size or (2**32 if device.type == "cuda" else 2**26)
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    times_of(lambda: target.copy_(source), 3, device)
    times = summary(times_of(lambda: target.copy_(source), 20, device))
    return {"gb_per_second": 2 * size / times["ms"] * 1e3 / 1e9, **times}


def driver() -> dict[str, str]:
    """The GPU and its driver, from nvidia-smi."""
    names = ("name", "driver_version", "memory.total", "power.limit", "clocks.max.sm")
    line = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader"]
    answer = subprocess.run(line, capture_output=True, text=True, check=True, timeout=30).stdout.splitlines()[0]
    return dict(zip(names, map(str.strip, answer.split(",")), strict=True)) | {"cuda": str(torch.version.cuda)}


def measure_all(rows: Rows, device: torch.device) -> None:
    """One row per rate."""
    if device.type == "cuda":
        rows.measure("driver", driver)
    for kind in (*DTYPES, "FP8") if device.type == "cuda" else ("float32", "bf16"):
        rows.measure(kind, lambda kind=kind: matrix_rate(kind, device))
    rows.measure("memory copy", lambda: copy_rate(device))
    rows.finish()


@exits_on_user_error
def main() -> None:
    """Parse the command line and measure."""
    parser = OneLineParser(description="Matrix rates and memory bandwidth.")
    add_common_flags(parser)
    args = parser.parse_args()
    device = benchmark_device(args.device)
    measure_all(rows_of("machine", args, device), device)


if __name__ == "__main__":
    main()
