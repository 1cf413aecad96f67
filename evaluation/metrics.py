"""From features to metrics: FID, sFID, Inception score, precision and recall, KID, as ADM defines them."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from errors import UserError
from evaluation.archives import ImageArchive
from evaluation.features import SPATIAL_DIMENSION, Extractor
from evaluation.statistics import FeatureStatistics, frechet_distance

Images = ImageArchive | np.ndarray
Gaussian = tuple[np.ndarray, np.ndarray]  # mean (D,), covariance (D, D)


@dataclass
class FeatureSet:
    """What the metrics need to know of one set of N images; None where there is nothing to know it from."""

    count: int
    gaussian: Gaussian  # of the pool features
    spatial_gaussian: Gaussian | None
    pool: np.ndarray | None  # (N, D) float32
    logits: np.ndarray | None  # (N, 1008) float32


def evaluate(
    reference: Images | FeatureSet,
    samples: Images,
    extractor: Extractor,
    batch_size: int = 64,
    progress: bool = True,
) -> dict[str, float]:
    """Score samples against a reference: metric name -> value.

    Args:
        reference, samples: uint8 (N, H, W, 3) images, an array or an opened archive; for a reference that
            serves many times, what `extract` returned for it. Statistics stored in a reference archive are
            used as they are.
        extractor: from `load_extractor`. Inception gives `fid`, `sfid`, `inception_score`, `precision`,
            `recall`, `kid`; demo gives `frechet_distance`.
        batch_size: images per forward pass; the values do not depend on it.
        progress: show bars.

    Raises `UserError` for unequal image sizes and for fewer images than the covariance needs (dimension + 1).
    """
    check_images(reference, samples, extractor)
    if not isinstance(reference, FeatureSet):
        reference = extract(reference, extractor, batch_size, "reference" if progress else None)
    sample_features = extract(samples, extractor, batch_size, "samples" if progress else None)
    return compare(reference, sample_features, extractor.name, device=next(extractor.parameters()).device)


def check_images(reference: Images | FeatureSet, samples: Images, extractor: Extractor) -> None:
    """Raise `UserError` for what would spoil the comparison, before anything is computed."""
    if len(samples) <= extractor.dimension:
        raise UserError(_too_few("samples", len(samples), extractor))
    _check_shape("samples", samples, extractor)
    if isinstance(reference, FeatureSet):
        return
    stored = _stored_statistics(reference, extractor)
    for name, dimension in (("mu", extractor.dimension), ("mu_s", SPATIAL_DIMENSION)):
        if name in stored and stored[name].shape != (dimension,):
            raise UserError(f"reference: {name} of shape {stored[name].shape}; expected ({dimension},)")
    if "mu" not in stored and len(reference) <= extractor.dimension:
        raise UserError(_too_few("reference", len(reference), extractor))
    if len(reference) == 0:
        return
    _check_shape("reference", reference, extractor)
    if reference.shape[1:3] != samples.shape[1:3]:
        sizes = ["{}x{}".format(*images.shape[1:3]) for images in (reference, samples)]
        raise UserError(
            f"image sizes differ: reference {sizes[0]}, samples {sizes[1]} (height x width); "
            "give a reference of the samples' resolution"
        )


def extract(images: Images, extractor: Extractor, batch_size: int = 64, label: str | None = None) -> FeatureSet:
    """Run the extractor over images; `label` names the progress bar, None shows none.

    Memory: pool features and logits are kept (0.6 GB for 50,000 images with Inception, twice that for a moment
    at the end); of the spatial features only mean and covariance; of the images one batch.
    """
    device = next(extractor.parameters()).device
    pool_statistics = FeatureStatistics(extractor.dimension)
    spatial_statistics = FeatureStatistics(SPATIAL_DIMENSION)
    pool, logits = [], []
    with tqdm(total=len(images), desc=label, unit="img", disable=label is None) as bar:
        for batch in _batches(images, batch_size):
            features = extractor(torch.from_numpy(batch.copy()).to(device))  # copied: a view of a file is read-only
            pool.append(features.pool.cpu().numpy())
            pool_statistics.update(pool[-1])
            if features.spatial is not None:
                spatial_statistics.update(features.spatial.cpu().numpy())
                logits.append(features.logits.cpu().numpy())
            bar.update(len(batch))
    stored = _stored_statistics(images, extractor)
    gaussian = (stored["mu"], stored["sigma"]) if "mu" in stored else _gaussian(pool_statistics)
    spatial = (stored["mu_s"], stored["sigma_s"]) if "mu_s" in stored else _gaussian(spatial_statistics)
    return FeatureSet(
        count=len(images),
        gaussian=gaussian,
        spatial_gaussian=spatial,
        pool=np.concatenate(pool) if pool else None,
        logits=np.concatenate(logits) if logits else None,
    )


def compare(
    reference: FeatureSet, samples: FeatureSet, extractor_name: str, device: str | torch.device = "cpu"
) -> dict[str, float]:
    """Metrics of samples against reference; those that their features do not allow are left out.

    The demo features give the Frechet distance alone: among them the nearest-neighbour balls of a few odd images
    are wide enough to hold even noise, so that precision would mislead.
    """
    distance = frechet_distance(*reference.gaussian, *samples.gaussian)
    if extractor_name == "demo":
        return {"frechet_distance": distance}
    metrics = {"fid": distance}
    if reference.spatial_gaussian and samples.spatial_gaussian:
        metrics["sfid"] = frechet_distance(*reference.spatial_gaussian, *samples.spatial_gaussian)
    if samples.logits is not None:
        metrics["inception_score"] = inception_score(samples.logits)
    if reference.pool is not None:
        metrics["precision"], metrics["recall"] = precision_recall(reference.pool, samples.pool, device=device)
        metrics["kid"] = kernel_distance(reference.pool, samples.pool)
    return metrics


def inception_score(logits: np.ndarray, split_size: int = 5000) -> float:
    """exp of the mean KL divergence between an image's class distribution and its split's mean.

    logits (N, classes); the mean over consecutive splits of `split_size`, the last one shorter (ADM; Salimans
    2016).
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
) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019), exact distances in float64.

    Precision: the share of samples within the k-th nearest neighbour radius of some reference image; recall
    the reverse. reference (M, D), samples (N, D); at most a few `block` x `block` distances are held at once.
    """
    centre = reference.mean(axis=0, dtype=np.float64)  # distances lose fewer digits near the origin
    ref, gen = (torch.from_numpy(features - centre).to(device) for features in (reference, samples))
    ref_radii, gen_radii = _squared_radii(ref, k, block), _squared_radii(gen, k, block)
    precision = _covered(gen, ref, ref_radii, block)
    recall = _covered(ref, gen, gen_radii, block)
    return precision, recall


def kernel_distance(
    reference: np.ndarray, samples: np.ndarray, subsets: int = 100, subset_size: int = 1000, seed: int = 2020
) -> float:
    """KID (Binkowski et al. 2018): unbiased squared MMD, kernel (x.y / D + 1)^3, mean over random subsets.

    reference (M, D), samples (N, D). Subsets are drawn as torch-fidelity draws them, so that the values
    agree; with fewer images than `subset_size` each subset holds the smaller set's number of images.
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


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """(n, D), (m, D) -> (n, m)."""
    squares = a.square().sum(dim=1)[:, None] + b.square().sum(dim=1)[None, :]
    return (squares - 2 * a @ b.T).clamp(min=0)


def _squared_radii(points: Tensor, k: int, block: int) -> Tensor:
    """Squared distance of each point to its k-th nearest other point: (N, D) -> (N,)."""
    radii = []
    for rows in range(0, len(points), block):
        nearest = points.new_full((len(points[rows : rows + block]), k), torch.inf)
        for columns in range(0, len(points), block):
            distances = _squared_distances(points[rows : rows + block], points[columns : columns + block])
            if rows == columns:
                distances.fill_diagonal_(torch.inf)  # a point is no neighbour of itself
            nearest = torch.cat([nearest, distances], dim=1).topk(k, largest=False).values
        radii.append(nearest[:, -1])
    return torch.cat(radii)


def _covered(points: Tensor, centres: Tensor, squared_radii: Tensor, block: int) -> float:
    """Share of the points that lie within the radius of at least one centre."""
    count = 0
    for rows in range(0, len(points), block):
        inside = torch.zeros(len(points[rows : rows + block]), dtype=torch.bool, device=points.device)
        for columns in range(0, len(centres), block):
            distances = _squared_distances(points[rows : rows + block], centres[columns : columns + block])
            inside |= (distances <= squared_radii[columns : columns + block]).any(dim=1)
        count += int(inside.sum())
    return count / len(points)


def _batches(images: Images, batch_size: int) -> Iterator[np.ndarray]:
    if len(images) == 0:
        return iter(())
    if isinstance(images, ImageArchive):
        return images.batches(batch_size)
    return (images[start : start + batch_size] for start in range(0, len(images), batch_size))


def _gaussian(statistics: FeatureStatistics) -> Gaussian | None:
    return (statistics.mean, statistics.covariance) if statistics.count > 1 else None


def _stored_statistics(images: Images, extractor: Extractor) -> dict[str, np.ndarray]:
    """An archive's own statistics: they are Inception's, and mean nothing to another extractor."""
    return images.statistics if isinstance(images, ImageArchive) and extractor.name == "inception" else {}


def _check_shape(label: str, images: Images, extractor: Extractor) -> None:
    if isinstance(images, np.ndarray) and (images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3):
        raise UserError(f"{label}: {images.dtype} of shape {images.shape}; expected uint8 (N, H, W, 3), values 0..255")
    expected = extractor.image_size
    if expected and tuple(images.shape[1:3]) != (expected, expected):
        raise UserError(
            f"{label}: images of {images.shape[1]}x{images.shape[2]}, but the {extractor.name} features are "
            f"made for {expected}x{expected}; use --features inception"
        )


def _too_few(label: str, count: int, extractor: Extractor) -> str:
    return (
        f"{label}: {count} images, but the covariance of {extractor.dimension} {extractor.name} features "
        f"needs at least {extractor.dimension + 1}; give more images"
    )
