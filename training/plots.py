"""The loss curves of a run."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.errors import warn_if_not_drawn
from common.files import written_aside
from training.records import read_metrics, term_names


def plot_losses(run: Path) -> Path | None:
    """Draw `loss.png`: over the steps the velocity loss of each branch, the acceleration loss and, where tokens are
    aligned, their cosine; None without any steps, or if it cannot be drawn."""
    entries = [entry for entry in read_metrics(run) if "loss" in entry]
    if not entries:
        return None
    with warn_if_not_drawn(str(run / "loss.png")):
        draw_losses(entries, run.name, run / "loss.png")
        return run / "loss.png"
    return None


def draw_losses(entries: Sequence[dict[str, Any]], title: str, png: Path) -> None:
    """Draw the curves of `plot_losses`."""
    from matplotlib.figure import Figure  # a second of import time that only the end of a run needs to spend

    figure = Figure(figsize=(7, 4.5))
    axes = figure.subplots()
    for name in (name for name in term_names(entries[0]) if name != "alignment"):
        axes.plot([e["step"] for e in entries], [e[name] for e in entries], label=name.replace("_", " "), lw=1)
    axes.set(xlabel="optimizer step", ylabel="mean squared error", yscale="log")
    # The run's name is no formula, and may have letters that the font lacks.
    axes.set_title(" ".join(title.split()), parse_math=False)
    axes.grid(alpha=0.3)
    if "alignment" in entries[0]:
        cosine = axes.twinx()
        cosine.plot([e["step"] for e in entries], [-e["alignment"] for e in entries], "k:", lw=1)
        cosine.set(ylabel="cosine with the encoder (dotted)", ylim=(min(0, cosine.get_ylim()[0]), 1))
    axes.legend()
    with written_aside(png) as aside, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")
        figure.savefig(aside, format="png", dpi=130, bbox_inches="tight")
