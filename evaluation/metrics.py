"""From features to metrics: FID, sFID, Inception score, precision and recall, KID as ADM defines them; FD-DINOv2."""

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from common.processes import progress_bar
from evaluation.extraction import FeatureSet, Images, check_images, extract
from evaluation.features import Extractor
from evaluation.statistics import frechet_distance


def evaluate(
    reference: Images | FeatureSet,
    samples: Images,
    extractor: Extractor,
    batch_size: int = 64,
    progress: bool = True,
) -> dict[str, float]:
    """Score samples against a reference.

    With several processes, or features cached on disk, call `extract` for both, then `compare`.

    Args:
        reference, samples: uint8 (N, H, W, 3) images, an array or an opened archive; for a reference that is used
            many times, the result of `extract`. Statistics stored in a reference archive are used as they are.
        extractor: from `load_extractor`. Inception gives `fid`, `sfid`, `inception_score`, `precision`,
            `recall`, `kid`; dinov2 gives `fd_dinov2`, `kd_dinov2`; demo gives `frechet_distance`.
        batch_size: images per forward pass; the values do not depend on it beyond the rounding of the network.
        progress: show bars.

    Returns:
        metric name -> value.

    Raises:
        UserError: for unequal image sizes, and for fewer images than the covariance needs (dimension + 1).
    """
    check_images(reference, samples, extractor)
    if not isinstance(reference, FeatureSet):
        reference = extract(reference, extractor, batch_size, "reference" if progress else None)
    sample_features = extract(samples, extractor, batch_size, "samples" if progress else None)
    device = next(extractor.parameters()).device
    return compare(reference, sample_features, extractor.name, device=device, progress=progress)


def compare(
    reference: FeatureSet,
    samples: FeatureSet,
    extractor_name: str,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> dict[str, float]:
    """Score samples against a reference by their features.

    The demo features give the Frechet distance alone: a few outliers have nearest-neighbour balls wide enough to hold
    even noise, so that precision would mislead. DINOv2 gives the two distances of Stein et al. (2023); their precision
    and recall use 10,000 random images, so values from all images would differ.

    Args:
        reference, samples: from `extract`.
        extractor_name: of `METRICS`' `features`.
        device: where distances for precision and recall are computed.
        progress: show bars.

    Returns:
        metric name -> value, without the metrics that these features do not allow.
    """
    comparison = Comparison(reference, samples, device, progress)
    wanted = {name: metric for name, metric in METRICS.items() if metric.features == extractor_name}
    values = {name: metric.value(comparison) for name, metric in wanted.items()}
    return {name: value for name, value in values.items() if value is not None}


class Comparison:
    """The features of a reference and of samples; what several metrics share is computed once."""

    def __init__(self, reference: FeatureSet, samples: FeatureSet, device: str | torch.device, progress: bool) -> None:
        self.reference, self.samples, self.device, self.progress = reference, samples, device, progress

    def frechet_distance(self) -> float:
        """Of the pooled features."""
        return frechet_distance(*self.reference.gaussian, *self.samples.gaussian)

    def spatial_frechet_distance(self) -> float | None:
        """Of the spatial features, where both have them."""
        both = self.reference.spatial_gaussian, self.samples.spatial_gaussian
        return frechet_distance(*both[0], *both[1]) if all(both) else None

    def inception_score(self) -> float | None:
        """Of the samples, where their logits are known."""
        return None if self.samples.logits is None else inception_score(self.samples.logits)

    def kernel_distance(self) -> float | None:
        """Where the features of the reference's images are known."""
        return None if self.reference.pool is None else kernel_distance(self.reference.pool, self.samples.pool)

    @cached_property
    def coverage(self) -> tuple[float | None, float | None]:
        """Precision and recall, where the features of the reference's images are known."""
        if self.reference.pool is None:
            return None, None
        return precision_recall(self.reference.pool, self.samples.pool, device=self.device, progress=self.progress)


class Metric(NamedTuple):
    """A number that scores samples."""

    title: str  # for people
    features: str  # name of the extractor
    value: Callable[[Comparison], float | None]  # None where the features do not allow it
    is_distance: bool = False  # the Frechet distance of its features: cheap, and the score of previews


METRICS = {
    "fid": Metric("FID", "inception", Comparison.frechet_distance, is_distance=True),
    "frechet_distance": Metric("demo Frechet distance", "demo", Comparison.frechet_distance, is_distance=True),
    "sfid": Metric("sFID", "inception", Comparison.spatial_frechet_distance),
    "inception_score": Metric("Inception score", "inception", Comparison.inception_score),
    "precision": Metric("precision", "inception", lambda c: c.coverage[0]),
    "recall": Metric("recall", "inception", lambda c: c.coverage[1]),
    "kid": Metric("KID", "inception", Comparison.kernel_distance),
    "fd_dinov2": Metric("FD-DINOv2", "dinov2", Comparison.frechet_distance, is_distance=True),
    "kd_dinov2": Metric("KD-DINOv2", "dinov2", Comparison.kernel_distance),
}


def inception_score(logits: np.ndarray, split_size: int = 5000) -> float:
    """exp of the mean KL divergence between an image's class distribution and its split's mean.

    Args:
        logits: (N, classes).
        split_size: the result is the mean over consecutive splits of this size, the last one shorter (ADM; Salimans
            et al. 2016).
    """
    scores = []
    for start in range(0, len(logits), split_size):
        log_p = torch.log_softmax(torch.from_numpy(logits[start : start + split_size]).double(), dim=1)
        p = log_p.exp()
        divergence = (p * (log_p - p.mean(dim=0).log())).sum(dim=1)
        scores.append(float(divergence.mean().exp()))
    return float(np.mean(scores))


def precision_recall(
    reference: np.ndarray,
    samples: np.ndarray,
    k: int = 3,
    block: int = 4096,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019) of all images, with float64 distances.

    Precision is the share of samples within the k-th nearest neighbour radius of some reference image, recall the
    reverse. ADM's evaluator rounds the distances to float16 where they fit.

    Args:
        reference: features (M, D), M above k.
        samples: features (N, D), N above k.
        k: which neighbour gives the radius.
        block: `block` x `block` distances are in memory at a time, besides the features in float64.
        device: where distances are computed.
        progress: show a bar.

    Returns:
        precision and recall.
    """
    centre = reference.mean(axis=0, dtype=np.float64)  # distances lose fewer digits near the origin
    ref, gen = (torch.from_numpy(features - centre).to(device) for features in (reference, samples))
    pairs = len(ref) * (len(ref) + block) // 2 + len(gen) * (len(gen) + block) // 2 + len(ref) * len(gen)
    with progress_bar(progress, total=pairs, desc="precision, recall", unit="pair", unit_scale=True) as bar:
        ref_radii, gen_radii = _squared_radii(ref, k, block, bar), _squared_radii(gen, k, block, bar)
        ref_covered, gen_covered = (torch.zeros(len(x), dtype=torch.bool, device=device) for x in (ref, gen))
        for rows in _blocks(len(ref), block):
            for columns in _blocks(len(gen), block):
                distances = _squared_distances(ref[rows], gen[columns])
                gen_covered[columns] |= (distances <= ref_radii[rows, None]).any(dim=0)
                ref_covered[rows] |= (distances <= gen_radii[None, columns]).any(dim=1)
                bar.update(distances.numel())
    return float(gen_covered.double().mean()), float(ref_covered.double().mean())


def kernel_distance(
    reference: np.ndarray, samples: np.ndarray, subsets: int = 100, subset_size: int = 1000, seed: int = 2020
) -> float:
    """KID (Binkowski et al. 2018): unbiased squared MMD, kernel (x.y / D + 1)^3, mean over random subsets.

    Subsets are drawn as in torch-fidelity, so that the values agree.

    Args:
        reference: features (M, D).
        samples: features (N, D).
        subsets: number of subsets.
        subset_size: images per subset, at most M and N.
        seed: of the subsets.
    """
    rng = np.random.RandomState(seed)
    m = min(subset_size, len(reference), len(samples))
    distances = []
    for _ in range(subsets):
        y = samples[rng.choice(len(samples), m, replace=False)].astype(np.float64)
        x = reference[rng.choice(len(reference), m, replace=False)].astype(np.float64)
        kxx, kyy, kxy = ((a @ b.T / x.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
        within = (kxx.sum() - kxx.trace() + kyy.sum() - kyy.trace()) / (m * (m - 1))
        distances.append(within - 2 * kxy.mean())
    return float(np.mean(distances))


def _blocks(total: int, block: int) -> Iterator[slice]:
    return (slice(start, min(start + block, total)) for start in range(0, total, block))


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """(n, D), (m, D) -> (n, m)."""
    distances = torch.addmm(b.square().sum(dim=1), a, b.T, alpha=-2)
    return distances.add_(a.square().sum(dim=1)[:, None]).clamp_(min=0)


def _squared_radii(points: Tensor, k: int, block: int, bar: tqdm) -> Tensor:
    """Squared distance of each point to its k-th nearest other point: (N, D) -> (N,)."""
    nearest = points.new_full((len(points), k), torch.inf)
    for rows in _blocks(len(points), block):
        for columns in _blocks(len(points), block):
            if columns.start < rows.start:
                continue  # covered by the transposed block
            distances = _squared_distances(points[rows], points[columns])
            bar.update(distances.numel())
            if rows == columns:
                distances.fill_diagonal_(torch.inf)  # a point is no neighbour of itself
            else:
                nearest[columns] = _smallest(nearest[columns], distances.T, k)
            nearest[rows] = _smallest(nearest[rows], distances, k)
    return nearest[:, -1]


def _smallest(known: Tensor, more: Tensor, k: int) -> Tensor:
    """The k smallest values per row, ascending, of known (n, k) and more (n, m)."""
    smallest = more.topk(min(k, more.shape[1]), largest=False).values
    return torch.cat([known, smallest], dim=1).sort(dim=1).values[:, :k]
