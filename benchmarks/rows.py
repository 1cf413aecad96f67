"""What the GPU benchmarks share: rows written one by one, timing, flags, and a network without zero weights."""

import argparse
import gc
import hashlib
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timezone
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from common.errors import OneLineParser, UserError, first_line, out_of_memory_reason
from common.files import write_text
from common.flags import PRECISIONS
from common.processes import usable_device
from models import DeepFlow, create_model
from training.records import code_commit

ROOT = Path(__file__).resolve().parent.parent
OUT_OF_MEMORY = "out of memory"
SIZES = dict(num_classes=1000, input_size=32, in_channels=4)  # 256 px in the SD-VAE's latents
TINY_SIZES = dict(num_classes=10, input_size=8)  # of the networks that --tiny measures


class Rows:
    """The rows of one benchmark, in a JSON file that is complete at any time.

    Rows of an earlier run with the same settings, code and machine are kept and not measured again.

    Args:
        part: name of the benchmark.
        settings: values of the flags.
        device: where it runs.
        file: None keeps the rows in memory only.
    """

    def __init__(self, part: str, settings: dict[str, Any], device: torch.device, file: Path | None) -> None:
        self.file = file
        self.record = {"part": part, "settings": settings, **describe_machine(device), "done": False, "rows": []}
        earlier = read_record(file) if file else {}
        if is_same(earlier, self.record):
            kept = [row for row in earlier["rows"] if row.get("error") in (None, OUT_OF_MEMORY)]
            self.record["rows"] = kept
        self.write()

    def has(self, name: str) -> bool:
        """Whether that row was measured already."""
        return any(row["name"] == name for row in self.record["rows"])

    def measure(self, names: str | Sequence[str], work: Callable[[], dict | list[dict]]) -> None:
        """Add the rows that `work` returns under their names; if it fails, rows with the error."""
        names = [names] if isinstance(names, str) else list(names)
        if all(map(self.has, names)):
            return
        try:
            figures = work()
            figures = [figures] if isinstance(figures, dict) else figures
        except Exception as error:
            figures = [{"error": describe_error(error)}] * len(names)
        for name, row in zip(names, figures, strict=True):
            self.add({"name": name, **row})

    def add(self, row: dict[str, Any]) -> None:
        """Add, write and print one row."""
        self.record["rows"].append(row)
        self.write()
        print("  ".join(f"{key} {format_value(row[key])}" for key in row if not isinstance(row[key], list)), flush=True)

    def finish(self) -> None:
        """Mark the rows as complete."""
        self.record["done"] = True
        self.write()

    def write(self) -> None:
        """Replace the file."""
        if self.file:
            write_text(self.file, json.dumps(self.record, indent=1) + "\n")


def read_record(file: Path) -> dict[str, Any]:
    """The record that `Rows` wrote; empty if there is none."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) and isinstance(record.get("rows"), list) else {}


def is_same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two records have the same settings, code and machine."""
    return bool(one) and all(one.get(key) == other.get(key) for key in ("settings", "sources", "device", "torch"))


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Device, torch, code and date, without the user's name or paths."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({processor()})",
        "cpus": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": code_commit(),
        "sources": sources_sha256(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def sources_sha256() -> str:
    """Identifies the code where there is no git, as on a rented machine: 12 digits over all Python sources."""
    digest = hashlib.sha256()
    skipped = {"tests", "data", "runs", "samples", "shared"}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).parts
        if parts[0] not in skipped and not any(part.startswith(".") for part in parts):
            digest.update("/".join(parts).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def describe_error(error: BaseException) -> str:
    """An error in one line, without paths of this machine."""
    if out_of_memory_reason(error) is not None:
        return OUT_OF_MEMORY
    line = first_line(error).replace(str(ROOT), ".").replace(str(Path.home()), "~")
    return f"{type(error).__name__}: {line}"[:300]


def format_value(value: object) -> str:
    """A value for display."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def benchmark_device(name: str) -> torch.device:
    """The device of that name.

    Raises:
        UserError: if it is not there.
    """
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {name}, but torch sees no GPU here: give --device cpu --tiny for a trial on the CPU")
    return torch.device(usable_device(name))


def fresh_start(device: torch.device) -> None:
    """Free memory and compiled code of earlier rows, and restart the measurement of peak memory."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def times_of(work: Callable[[], object], count: int, device: torch.device) -> list[float]:
    """Seconds of each of `count` calls in a row; on a GPU by events, so that the host does not wait in between."""
    if device.type != "cuda":
        times = [time.perf_counter()]
        for _ in range(count):
            work()
            times.append(time.perf_counter())
        return [after - before for before, after in pairwise(times)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        work()
        event.record()
    torch.cuda.synchronize(device)
    return [before.elapsed_time(after) / 1e3 for before, after in pairwise(events)]


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Median and spread (10th and 90th percentile) in milliseconds."""
    ordered = sorted(seconds)
    low, high = (ordered[min(len(ordered) - 1, math.floor(q * len(ordered)))] for q in (0.1, 0.9))
    return {"ms": 1e3 * statistics.median(ordered), "ms_p10": 1e3 * low, "ms_p90": 1e3 * high, "timed": len(ordered)}


def random_network(model: str, device: torch.device, **sizes: Any) -> DeepFlow:
    """A network without zero weights: multiplying the zeros of a new one takes a GPU less power, and less time.

    Its gates are small, as after some training.
    """
    torch.manual_seed(0)
    with device:  # on the CPU hundreds of millions of random numbers take seconds
        network = create_model(model, **sizes)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad and not parameter.any():
                parameter.normal_(std=0.02)
    return network


def add_common_flags(parser: OneLineParser) -> None:
    """--device and --output."""
    parser.add_argument("--device", default="cuda", help="where (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="JSON file for the figures (default: none)")


def rows_of(part: str, args: argparse.Namespace, device: torch.device) -> Rows:
    """The `Rows` of a benchmark whose settings are its flags."""
    return Rows(part, {key: value for key, value in vars(args).items() if key != "output"}, device, args.output)


def precisions_of(text: str, device: torch.device) -> list[str]:
    """The values of --precisions.

    Raises:
        UserError: for an unknown precision, none, or fp16 on the CPU.
    """
    precisions = parse_words(text, PRECISIONS, "--precisions")
    if device.type == "cpu" and "fp16" in precisions:
        raise UserError("--precisions fp16 needs a GPU and this is the CPU: choose bf16 or no")
    return precisions


def parse_words(text: str, known: Iterable[str], flag: str) -> list[str]:
    """A comma-separated list of known words.

    Raises:
        UserError: for another word, or none.
    """
    given = text.split(",")
    if unknown := set(given) - set(known):
        raise UserError(f"{flag} {','.join(sorted(unknown))}: expected some of {', '.join(known)}")
    return given


def parse_counts(text: str, flag: str) -> list[int]:
    """A comma-separated list of positive numbers.

    Raises:
        UserError: for anything else.
    """
    given = text.split(",")
    if not all(word.isdecimal() and int(word) for word in given):
        raise UserError(f"{flag} {text!r}: expected positive numbers such as 32,64")
    return list(map(int, given))
