"""A run's records: resolved options, and `metrics.jsonl` with its averages."""

import json
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.files import named_in_error, write_text

METRICS = "metrics.jsonl"
PACKAGES = ("torch", "accelerate", "numpy", "safetensors")
SPIKE, MEMORY = 2.0, 0.99  # see `MetricLog`
STATE = ("columns", "window", "logged_step", "usual_loss", "spikes", "skipped")


@cache
def code_commit() -> str | None:
    """The commit of the running code, read once, with `+` where files differ from it; None outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def write_options(run: Path, options: dict[str, Any], config: Mapping[str, Any]) -> None:
    """`options.json`: options as resolved, architecture, commit of this code, versions."""
    versions = {"python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}}
    record = {"options": options, "config": dict(config), "commit": code_commit(), "versions": versions}
    write_text(run / "options.json", json.dumps(record, indent=1))


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Entries of `metrics.jsonl`, oldest first; lines that a crash or a power failure damaged are left out."""
    file = run / METRICS
    lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
    entries = []
    for line in lines:
        with suppress(ValueError):  # no JSON: a damaged log must not stop a run
            entries.append(json.loads(line))
    return [entry for entry in entries if isinstance(entry, dict) and "step" in entry]


def term_names(entry: dict[str, Any]) -> list[str]:
    """The names of the loss terms in an entry that `MetricLog.average` made: those between the loss and its maximum."""
    names = list(entry)
    return names[names.index("loss") + 1 : names.index("loss_max")]


def truncate_metrics(run: Path, logged_step: int, step: int) -> None:
    """Drop what a run resumed at `step` writes again: averages after `logged_step`, scores of previews after `step`."""
    kept = [entry for entry in read_metrics(run) if entry["step"] <= (logged_step if "loss" in entry else step)]
    write_text(run / METRICS, "".join(json.dumps(entry) + "\n" for entry in kept))


class MetricLog:
    """Averages rows of metrics, one row per step, and measures the speed.

    A spike is a step whose loss is more than `SPIKE` times the running average of the losses before it.

    Args:
        step: steps done before the first row.
        batch_size: images per step.
    """

    def __init__(self, step: int, batch_size: int) -> None:
        self.batch_size = batch_size
        self.columns: list[str] = []  # the names of a row's numbers, `loss` among them
        self.window: list[list[float]] = []
        self.logged_step = 0  # steps up to here are in metrics.jsonl
        self.usual_loss: float | None = None  # running average, over about 1 / (1 - MEMORY) steps
        self.spikes = self.skipped = 0  # since the last entry
        self.timed_from = step, time.perf_counter()

    def add(self, numbers: dict[str, float]) -> None:
        """Take in the numbers of one step by name, `loss` among them, already the same on all processes."""
        self.columns = list(numbers)
        self.window.append(list(numbers.values()))
        loss = numbers["loss"]
        usual = loss if self.usual_loss is None else self.usual_loss
        self.spikes += loss > SPIKE * usual > 0
        self.usual_loss = MEMORY * usual + (1 - MEMORY) * loss

    def skip(self) -> None:
        """Count an attempt that overflowed in fp16."""
        self.skipped += 1

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Around work that is not training: its time does not count in the speed."""
        began = time.perf_counter()
        yield
        step, start = self.timed_from
        self.timed_from = step, start + time.perf_counter() - began

    def average(self, step: int, **more: float) -> dict[str, float]:
        """The means over all rows since the last call, with `more` and images per second of training, as one entry."""
        means = dict(zip(self.columns, np.mean(self.window, axis=0).tolist(), strict=True))
        rates = {
            "loss_max": max(row[self.columns.index("loss")] for row in self.window),
            "loss_spikes": self.spikes,
            "skipped_rate": self.skipped / (self.skipped + len(self.window)),
        }
        first_step, start = self.timed_from
        self.timed_from = step, time.perf_counter()
        speed = (step - first_step) * self.batch_size / (self.timed_from[1] - start)
        self.window, self.logged_step, self.spikes, self.skipped = [], step, 0, 0
        return {"step": step, **means, **rates, **more, "images_per_second": speed}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that a resumed run writes the lines that the uninterrupted one would."""
        return {name: getattr(self, name) for name in STATE}

    def load_state_dict(self, state: dict[str, Any], branches: int) -> None:
        """Continue from `state_dict`. Older checkpoints hold no names; theirs follow from the number of branches."""
        velocities = [f"velocity_{i + 1}" for i in range(branches)]
        columns = ["grad_norm", "loss", *velocities, "acceleration", "alignment"]
        rows = state["window"]
        for name, value in {"columns": columns[: len(rows[0])] if rows else [], **state}.items():
            setattr(self, name, value)


def memory_gib(device: torch.device) -> float:
    """The most memory that tensors have taken on the device so far, or the process on the CPU, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # macOS counts bytes, Linux KiB


def append_metrics(run: Path, entry: dict[str, Any]) -> None:
    """Add one entry to `metrics.jsonl`."""
    with named_in_error(run / METRICS), (run / METRICS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")
