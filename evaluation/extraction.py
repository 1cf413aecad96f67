"""Features of images, which the metrics need: computed on one process or many, and cached."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from common.errors import UserError
from common.files import written_aside
from common.processes import progress_bar
from evaluation.archives import DAMAGE, ImageSource
from evaluation.features import SPATIAL_DIMENSION, Extractor, Features
from evaluation.statistics import FeatureStatistics

Images = ImageSource | np.ndarray
Gaussian = tuple[np.ndarray, np.ndarray]  # mean (D,), covariance (D, D), float64
CACHE_FORMAT = 1  # raise it when an extractor's features change: they are then computed again


@dataclass
class FeatureSet:
    """What the metrics need of one set of N images; None where it cannot be computed."""

    count: int
    gaussian: Gaussian | None  # of the pool features
    spatial_gaussian: Gaussian | None
    pool: np.ndarray | None  # (N, D) float32
    logits: np.ndarray | None  # (N, classes) float32


def extract(
    images: Images,
    extractor: Extractor,
    batch_size: int = 64,
    label: str | None = None,
    process: PartialState | None = None,
    cache: str | Path | None = None,
) -> FeatureSet | None:
    """Compute the features of images; statistics stored in their archive replace computed ones.

    Memory: pool features and logits are kept (0.6 GB for 50,000 images with Inception); of the spatial features only
    mean and covariance; of the images one batch.

    Args:
        images: uint8 (N, H, W, 3), an array or an opened archive or folder.
        extractor: from `load_extractor`.
        batch_size: images per forward pass.
        label: title of the progress bar (default: no bar).
        process: this process, if there are several: all must call this, and each takes every n-th batch. On the same
            kind of device the features are bit for bit those of one process with the same batch size.
        cache: folder where features are kept, by the SHA-256 of the images' files and of the network's weights. A
            damaged file in it is replaced.

    Returns:
        the features on rank 0, None on all other ranks.
    """
    main = process is None or process.is_main_process
    place = found = None
    if cache is not None and isinstance(images, ImageSource) and len(images):
        weights = extractor.weights_sha256[:16]
        if main:
            place = Path(cache) / f"{images.sha256}-{extractor.name}-{weights}-v{CACHE_FORMAT}.npz"
            found = _read_cache(place, len(images))
        if _broadcast(process, found is not None):
            return _with_stored_statistics(images, extractor, found) if main else None
    features = _compute(images, extractor, batch_size, label if main else None, process)
    if not main:
        return None
    if place:
        _write_cache(place, features)
    return _with_stored_statistics(images, extractor, features)


def stored_statistics(images: Images, extractor: Extractor) -> dict[str, np.ndarray]:
    """The statistics stored in an archive: those of Inception, so none for another extractor."""
    return images.statistics if isinstance(images, ImageSource) and extractor.name == "inception" else {}


def check_images(reference: Images | FeatureSet, samples: Images, extractor: Extractor) -> None:
    """Raise `UserError` for images that cannot be compared, before anything is computed."""
    check_count("samples", len(samples), extractor)
    _check_shape("samples", samples, extractor)
    if isinstance(reference, FeatureSet):
        return
    check_reference(reference, extractor)
    check_size(reference, samples.shape[1:3])


def check_size(reference: Images, size: tuple[int, int]) -> None:
    """Raise `UserError` unless samples of this (height, width) have the size of the reference's images."""
    if len(reference) and tuple(reference.shape[1:3]) != tuple(size):
        sizes = ["{}x{}".format(*shape) for shape in (reference.shape[1:3], size)]
        raise UserError(
            f"image sizes differ: reference {sizes[0]}, samples {sizes[1]} (height x width); "
            "give a reference of the samples' resolution"
        )


def check_reference(reference: Images, extractor: Extractor) -> None:
    """Raise `UserError` for a reference that the extractor's metrics cannot use."""
    stored = stored_statistics(reference, extractor)
    pool, spatial = extractor.dimension, SPATIAL_DIMENSION
    shapes = {"mu": (pool,), "sigma": (pool, pool), "mu_s": (spatial,), "sigma_s": (spatial, spatial)}
    for name, array in stored.items():
        if array.shape != shapes[name]:
            raise UserError(
                f"reference: {name} of shape {array.shape}; expected {shapes[name]}, as ADM's evaluator writes"
            )
    if "mu" not in stored:
        check_count("reference", len(reference), extractor)
    if len(reference):
        _check_shape("reference", reference, extractor)


def check_count(label: str, count: int, extractor: Extractor) -> None:
    """Raise `UserError` for fewer images than the covariance needs."""
    if count <= extractor.dimension:
        raise UserError(
            f"{label}: {count} images, but the covariance of {extractor.dimension} {extractor.name} features "
            f"needs at least {extractor.dimension + 1}; give more images"
        )


def _check_shape(label: str, images: Images, extractor: Extractor) -> None:
    if isinstance(images, np.ndarray) and (images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3):
        raise UserError(f"{label}: {images.dtype} of shape {images.shape}; expected uint8 (N, H, W, 3), values 0..255")
    expected = extractor.image_size
    if expected and tuple(images.shape[1:3]) != (expected, expected):
        raise UserError(
            f"{label}: images of {images.shape[1]}x{images.shape[2]}, but the {extractor.name} features are "
            f"made for {expected}x{expected}; use --features inception"
        )


def _compute(
    images: Images, extractor: Extractor, batch_size: int, label: str | None, process: PartialState | None
) -> FeatureSet | None:
    """Features of all images, on rank 0; None on other ranks."""
    main = process is None or process.is_main_process
    pool_statistics = FeatureStatistics(extractor.dimension)
    spatial_statistics = FeatureStatistics(SPATIAL_DIMENSION)
    pool = logits = None
    done = 0
    with progress_bar(label is not None, total=len(images), desc=label, unit="img") as bar:
        for features in _batch_features(images, extractor, batch_size, process):
            bar.update(len(features.pool))
            if not main:
                continue
            if pool is None:
                pool = np.empty((len(images), extractor.dimension), np.float32)
                logits = (
                    None if features.logits is None else np.empty((len(images), features.logits.shape[1]), np.float32)
                )
            rows = slice(done, done + len(features.pool))
            done = rows.stop
            pool[rows] = features.pool
            pool_statistics.update(features.pool)
            if features.spatial is not None:
                spatial_statistics.update(features.spatial)
                logits[rows] = features.logits
    if not main:
        return None
    gaussians = (
        statistics.gaussian() if statistics.count > 1 else None for statistics in (pool_statistics, spatial_statistics)
    )
    return FeatureSet(len(images), *gaussians, pool, logits)


def _batch_features(
    images: Images, extractor: Extractor, batch_size: int, process: PartialState | None
) -> Iterator[Features]:
    """The features of each batch, as arrays, in the images' order, on every rank.

    In each round every rank takes one batch; in the last round some ranks have none. If one rank finds a file damaged,
    all raise the error in that round: no rank waits for ever, and rank 0 can report it.
    """
    rank, world = (process.process_index, process.num_processes) if process else (0, 1)
    device = next(extractor.parameters()).device
    batches = _batches(images, batch_size, rank, world)
    for _ in range(0, len(images), batch_size * world):
        features = error = None
        try:
            batch = next(batches, None)
        except UserError as damage:
            batch, error = None, damage
        if batch is not None:
            tensors = extractor(torch.from_numpy(batch.copy()).to(device))  # a copy, as a view of a file is read-only
            features = Features(*(None if tensor is None else tensor.cpu().numpy() for tensor in tensors))
        gathered = gather_object([(features, error)]) if world > 1 else [(features, error)]
        for _, error in gathered:
            if error is not None:
                raise error
        yield from (features for features, _ in gathered if features is not None)
    next(batches, None)  # to the end of the file, where its checksum is verified


def _batches(images: Images, batch_size: int, first: int, step: int) -> Iterator[np.ndarray]:
    if len(images) == 0:
        return iter(())
    if isinstance(images, ImageSource):
        return images.batches(batch_size, first, step)
    return (images[start : start + batch_size] for start in range(first * batch_size, len(images), step * batch_size))


def _with_stored_statistics(images: Images, extractor: Extractor, features: FeatureSet) -> FeatureSet:
    """The features, with the mean and covariance stored in the archive, if any."""
    stored = stored_statistics(images, extractor)
    gaussians = _gaussian_of(stored, "mu", "sigma"), _gaussian_of(stored, "mu_s", "sigma_s")
    return replace(
        features, gaussian=gaussians[0] or features.gaussian, spatial_gaussian=gaussians[1] or features.spatial_gaussian
    )


def _gaussian_of(arrays: Mapping[str, np.ndarray], mean: str, covariance: str) -> Gaussian | None:
    return (arrays[mean], arrays[covariance]) if mean in arrays else None


def _broadcast(process: PartialState | None, value: bool) -> bool:
    """The value of rank 0, on every rank."""
    if process is None or process.num_processes == 1:
        return value
    return broadcast_object_list([value])[0]


def _write_cache(place: Path, features: FeatureSet) -> None:
    """Write features as an `.npz`, with statistics under ADM's names."""
    arrays = {"pool": features.pool, "logits": features.logits}
    arrays |= zip(("mu", "sigma"), features.gaussian or (), strict=False)
    arrays |= zip(("mu_s", "sigma_s"), features.spatial_gaussian or (), strict=False)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(place) as aside, aside.open("wb") as file:
            np.savez(file, **{name: array for name, array in arrays.items() if array is not None})
    except OSError as error:
        raise UserError(f"--cache {place.parent}: features cannot be kept there ({error}); give another") from error


def _read_cache(place: Path, count: int) -> FeatureSet | None:
    """Cached features of `count` images; None if there are none, or they are damaged."""
    if not place.is_file():
        return None
    try:
        with np.load(place, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        gaussians = _gaussian_of(arrays, "mu", "sigma"), _gaussian_of(arrays, "mu_s", "sigma_s")
        features = FeatureSet(count, *gaussians, arrays["pool"], arrays.get("logits"))
    except (*DAMAGE, OSError, KeyError):
        return None
    return features if len(features.pool) == count else None
