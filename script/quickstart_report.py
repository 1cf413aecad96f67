"""The end of quickstart.sh: one table of both runs, and their loss curves in one picture."""

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure

from training.records import read_metrics

NAMES = {"untrained": "untrained DeepFlow", "sit": "SiT", "deepflow": "DeepFlow-2T", "real": "real vs real"}


def plot(runs: dict[str, list[dict]], png: Path) -> None:
    """Velocity loss of the last branch, which is what both models are sampled by, against steps."""
    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    for name, entries in runs.items():
        if entries:
            last = max(key for key in entries[0] if key.startswith("velocity_"))
            axes.plot([entry["step"] for entry in entries], [entry[last] for entry in entries], label=NAMES[name])
    axes.set(xlabel="optimizer step", ylabel="velocity loss of the last branch")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(png, dpi=120, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, required=True, help="folder of the training runs")
    parser.add_argument("--results", type=Path, required=True, help="folder of samples and metrics")
    args = parser.parse_args()
    runs = {name: read_metrics(args.runs / name) for name in NAMES}
    print(f"\n{'':<22}{'steps':>8}{'images/s':>10}{'demo Frechet distance':>24}")
    for name, entries in runs.items():
        steps = entries[-1]["step"] if entries else "-" if name == "real" else 0
        # The first entry includes warm-up.
        speeds = sorted(entry["images_per_second"] for entry in entries[1:])
        speed = f"{speeds[len(speeds) // 2]:.0f}" if speeds else "-"
        metrics = json.loads((args.results / f"{name}-metrics.json").read_text())["metrics"]
        print(f"{NAMES[name]:<22}{steps:>8}{speed:>10}{metrics['frechet_distance']:>24.2f}")
    curves = args.results / "loss.png"
    plot(runs, curves)
    print(
        f"\nsamples by class: {args.results / 'deepflow.png'} (SiT: {args.results / 'sit.png'}); loss curves: {curves}"
    )


if __name__ == "__main__":
    main()
