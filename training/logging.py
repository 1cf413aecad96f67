"""A run's records: resolved options, `metrics.jsonl`, the loss curve."""

import argparse
import json
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator

from files import write_text, written_aside

METRICS = "metrics.jsonl"
PACKAGES = ("torch", "accelerate", "numpy", "safetensors")


def write_options(run: Path, options: dict[str, Any], config: dict[str, Any]) -> None:
    """`options.json`: options as resolved, architecture, commit of this code, versions."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    versions = {"python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}}
    record = {"options": options, "config": config, "commit": commit, "versions": versions}
    write_text(run / "options.json", json.dumps(record, indent=1))


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Entries of `metrics.jsonl`, oldest first; a last line cut short by a crash is left out."""
    file = run / METRICS
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def truncate_metrics(run: Path, step: int) -> None:
    """Drop the entries after `step`: the resumed run writes them again."""
    kept = [entry for entry in read_metrics(run) if entry["step"] <= step]
    write_text(run / METRICS, "".join(json.dumps(entry) + "\n" for entry in kept))


class MetricLog:
    """Averages rows of metrics, one row a step, and measures the speed.

    Args:
        columns: names of a row's numbers.
        step: steps done before the first row.
        batch_size: images a step.
    """

    def __init__(self, columns: Sequence[str], step: int, batch_size: int) -> None:
        self.columns, self.batch_size = columns, batch_size
        self.window: list[list[float]] = []
        self.logged_step = 0  # steps up to here are in metrics.jsonl
        self.timed_from = step, time.perf_counter()

    def add(self, row: list[float]) -> None:
        """Take in the metrics of one step, already the same on all processes."""
        self.window.append(row)

    def average(self, step: int, **more: float) -> dict[str, float]:
        """The means over all rows since the last call, with `more` and images per second, as one entry."""
        means = dict(zip(self.columns, np.mean(self.window, axis=0).tolist(), strict=True))
        first_step, start = self.timed_from
        self.timed_from = step, time.perf_counter()
        speed = (step - first_step) * self.batch_size / (self.timed_from[1] - start)
        self.window, self.logged_step = [], step
        return {"step": step, **means, **more, "images_per_second": speed}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that a resumed run writes the lines that the uninterrupted one would."""
        return {"window": self.window, "logged_step": self.logged_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.window, self.logged_step = state["window"], state["logged_step"]


def start_trackers(accelerator: Accelerator, options: argparse.Namespace, run: Path) -> None:
    """Begin reporting where `--report-to` says. Weights & Biases without a login records offline, into the run."""
    if options.report_to == "wandb" and accelerator.is_main_process:
        import wandb

        mode = os.environ.get("WANDB_MODE") or ("online" if wandb.api.api_key else "offline")
        settings = {"name": options.exp_name, "dir": str(run), "mode": mode}
        accelerator.init_trackers("deepflow", vars(options), {"wandb": settings})


def append_metrics(run: Path, entry: dict[str, Any]) -> None:
    """Add one entry to `metrics.jsonl`."""
    with (run / METRICS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def plot_losses(run: Path) -> Path | None:
    """Draw `loss.png`: the velocity loss of each branch and the acceleration loss over the steps; None without any."""
    from matplotlib.figure import Figure  # a second of import time that only the end of a run needs to spend

    entries = read_metrics(run)
    if not entries:
        return None
    figure = Figure(figsize=(7, 4.5))
    axes = figure.subplots()
    for name in (key for key in entries[0] if key.startswith("velocity") or key == "acceleration"):
        axes.plot([e["step"] for e in entries], [e[name] for e in entries], label=name.replace("_", " "), lw=1)
    axes.set(xlabel="optimizer step", ylabel="mean squared error", yscale="log", title=run.name)
    axes.grid(alpha=0.3)
    axes.legend()
    with written_aside(run / "loss.png") as aside:
        figure.savefig(aside, format="png", dpi=130, bbox_inches="tight")
    return run / "loss.png"
