"""How fast metrics follow from features: ours against SciPy's matrix root and against full distance matrices.

    python -m benchmarks.evaluation --output evaluation.json

The features are random, of Inception's width, with a falling spectrum like that of images. Each route runs in its own
process and reports its seconds, its peak memory beyond imports and inputs, and its value, in which routes must agree.
"""

import os
import tempfile
import time
from pathlib import Path

import numpy as np
import scipy
import scipy.linalg
import torch

from benchmarks.figures import in_new_process, peak_bytes, write_figures
from common.errors import OneLineParser, UserError, exits_on_user_error
from evaluation import frechet_distance
from evaluation.metrics import precision_recall


def features(images: int, dimension: int) -> tuple[np.ndarray, np.ndarray]:
    """Two sets of float32 features (images, dimension), of slightly different distributions."""
    rng = np.random.default_rng(0)
    scales = np.arange(1, dimension + 1) ** -0.5
    reference = rng.normal(size=(images, dimension)) * scales
    samples = rng.normal(size=(images, dimension)) * scales * 0.98 + 0.01
    return reference.astype(np.float32), samples.astype(np.float32)


def frechet_by_root(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """The Frechet distance by the general matrix root, as in most evaluators."""
    root = scipy.linalg.sqrtm(sigma1 @ sigma2)
    return float(np.sum((mu1 - mu2) ** 2) + np.trace(sigma1 + sigma2 - 2 * root.real))


def precision_recall_in_full(reference: np.ndarray, samples: np.ndarray, k: int = 3) -> tuple[float, float]:
    """Precision and recall from the three full distance matrices, float64."""

    def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        squares = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1)[None] - 2 * a @ b.T
        return np.sqrt(np.maximum(squares, 0))

    reference, samples = reference.astype(np.float64), samples.astype(np.float64)
    within, among, between = (
        distances(a, b) for a, b in ((reference, reference), (samples, samples), (reference, samples))
    )
    for matrix in (within, among):
        np.fill_diagonal(matrix, 0)  # instead of the root of a rounding error
    radii = [np.partition(matrix, k, axis=1)[:, k] for matrix in (within, among)]  # index 0 is the point itself
    precision = (between <= radii[0][:, None]).any(axis=0).mean()
    recall = (between <= radii[1][None]).any(axis=1).mean()
    return float(precision), float(recall)


# Title -> the inputs it takes, its function, and the plain route to compare with.
ROUTES = {
    "Frechet distance, ours": ("gaussians", frechet_distance, "Frechet distance, SciPy's sqrtm"),
    "Frechet distance, SciPy's sqrtm": ("gaussians", frechet_by_root, None),
    "precision and recall, ours": ("features", precision_recall, "precision and recall, full matrices"),
    "precision and recall, full matrices": ("features", precision_recall_in_full, None),
}


def measure(name: str, inputs: Path, threads: int) -> dict:
    """Seconds, peak memory in MB beyond imports and inputs, and the value, of one route in this process."""
    torch.set_num_threads(threads)
    kind, route, _ = ROUTES[name]
    with np.load(inputs / f"{kind}.npz") as arrays:
        values = [arrays[key] for key in arrays.files]
    route(*(array[:, :8][:8] if array.ndim == 2 else array[:8] for array in values))  # warm-up
    before, began = peak_bytes(), time.perf_counter()
    value = route(*values)
    seconds, memory = time.perf_counter() - began, (peak_bytes() - before) / 1e6
    return {"seconds": seconds, "megabytes": memory, "value": value}


def write_inputs(folder: Path, images: int, dimension: int) -> None:
    """Both sets' features, and their means and covariances, as files."""
    sets = features(images, dimension)
    np.savez(folder / "features.npz", *sets)
    gaussians = [(rows.mean(axis=0, dtype=np.float64), np.cov(rows, rowvar=False)) for rows in sets]
    np.savez(folder / "gaussians.npz", *gaussians[0], *gaussians[1])


def measure_all(images: int, dimension: int, threads: int) -> dict[str, dict]:
    """The figures of every route, each from its own process, and ours relative to the plain routes."""
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        in_new_process(write_inputs, Path(folder), images, dimension)
        for name in ROUTES:
            results[name] = in_new_process(measure, name, Path(folder), threads)
    for name, (_, _, plain) in ROUTES.items():
        if plain:
            for figure in ("seconds", "megabytes"):
                results[name][f"{figure}_of_plain"] = results[name][figure] / max(results[plain][figure], 1e-9)
    return results


@exits_on_user_error
def main() -> None:
    """Parse the command line, measure, print a table and write the figures as JSON."""
    parser = OneLineParser(description="Seconds and memory of metrics from features, ours and by plainer routes.")
    parser.add_argument("--images", type=int, default=10_000, help="images in each set (default: %(default)s)")
    parser.add_argument("--dimension", type=int, default=2048, help="features per image (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (default: all)")
    parser.add_argument("--output", type=Path, help="JSON file for the figures (default: none)")
    args = parser.parse_args()
    for flag, value, least in (
        ("--images", args.images, 10),
        ("--dimension", args.dimension, 1),
        ("--threads", args.threads, 1),
    ):
        if value < least:
            raise UserError(f"{flag} {value}: expected at least {least}")
    os.environ.update(
        {name: str(args.threads) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    )
    results = measure_all(args.images, args.dimension, args.threads)
    for name, result in results.items():
        print(f"{name:38s}{result['seconds']:9.2f} s{result['megabytes']:9,.0f} MB   value {result['value']}", end="")
        if "seconds_of_plain" in result:
            print(
                f"   {result['seconds_of_plain']:.2f} x the time, {result['megabytes_of_plain']:.2f} x the memory",
                end="",
            )
        print()
    versions = {"numpy": np.__version__, "scipy": scipy.__version__, "torch": torch.__version__}
    write_figures(args.output, vars(args), results, **versions)


if __name__ == "__main__":
    main()
