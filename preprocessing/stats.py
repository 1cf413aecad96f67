"""A reference batch for `evaluate.py` from images: ADM's `.npz` of pixels, optionally with Inception statistics."""

import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common.errors import UserError
from common.files import only_writer, written_aside
from evaluation.archives import ImageArchive
from evaluation.features import SPATIAL_DIMENSION, InceptionFeatures
from evaluation.statistics import FeatureStatistics
from preprocessing.images import SourceImages, list_images, report_passed_over


def write_reference(
    images_dir: str | Path,
    npz_path: str | Path,
    indices: Sequence[int] | None = None,
    extractor: InceptionFeatures | None = None,
) -> Path:
    """Write images to a reference batch for `evaluate.py`, one at a time: memory does not grow with their number.

    `arr_0` is uint8 (N, H, W, 3), `arr_1` int64 (N,) class numbers. With an `extractor` there are also float64 `mu`
    (2048,) and `sigma` (2048, 2048) of the pool features, `mu_s` (2023,) and `sigma_s` (2023, 2023) of the spatial
    features. The file appears under its name only when complete.

    Args:
        images_dir: folder or zip of images.
        npz_path: file to write.
        indices: which images to take, in the order of their names (default: all).
        extractor: computes the statistics.

    Raises:
        UserError: for a source without images, an unreadable image, images of different sizes, an index out of range,
            fewer than two images for statistics, and a destination that cannot be written.
    """
    npz_path = Path(npz_path)
    if npz_path.is_dir():
        raise UserError(f"{npz_path} cannot be written (a folder is there): give an .npz file to make as --dest")
    source = list_images(images_dir)
    report_passed_over(source.others)
    total = len(source.names)
    indices = range(total) if indices is None else indices
    if len(indices) == 0 or not all(0 <= index < total for index in indices):
        raise UserError(f"indices select {len(indices)} of {total} images; expected one or more from 0 to {total - 1}")
    if extractor and len(indices) < 2:
        raise UserError("statistics of 1 image requested, expected at least 2: select more, or leave out the features")
    with only_writer(npz_path):
        try:
            with written_aside(npz_path) as aside:
                _write_images(aside, source, indices)
                if extractor:
                    _add_arrays(aside, inception_statistics(ImageArchive(aside), extractor))
        except OSError as error:
            raise UserError(f"{npz_path} cannot be written ({error}); change --dest") from error
    return npz_path


def inception_statistics(
    images: ImageArchive, extractor: InceptionFeatures, batch_size: int = 64
) -> dict[str, np.ndarray]:
    """Mean and covariance of the features, as float64 `mu`, `sigma` (pool) and `mu_s`, `sigma_s` (spatial)."""
    device = next(extractor.parameters()).device
    pool, spatial = FeatureStatistics(extractor.dimension), FeatureStatistics(SPATIAL_DIMENSION)
    with tqdm(desc="features", total=len(images), unit="img") as bar:
        for batch in images.batches(batch_size):
            features = extractor(torch.from_numpy(batch.copy()).to(device))  # a copy, as a view of a file is read-only
            pool.update(features.pool.cpu().numpy())
            spatial.update(features.spatial.cpu().numpy())
            bar.update(len(batch))
    (mu, sigma), (mu_s, sigma_s) = pool.gaussian(), spatial.gaussian()
    return {"mu": mu, "sigma": sigma, "mu_s": mu_s, "sigma_s": sigma_s}


def _write_images(place: Path, source: SourceImages, indices: Sequence[int]) -> None:
    shape = source.read(indices[0]).shape
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(indices), *shape)}
    with zipfile.ZipFile(place, "w") as archive, archive.open("arr_0.npy", "w", force_zip64=True) as stream:
        np.lib.format.write_array_header_1_0(stream, header)
        for index in tqdm(indices, "reference", unit="img"):
            image = source.read(index)
            if image.shape != shape:
                raise UserError(
                    f"{source.names[index]} is {image.shape[0]} x {image.shape[1]} pixels, the first image "
                    f"{shape[0]} x {shape[1]}; expected one size: convert the images first"
                )
            stream.write(image.tobytes())
    _add_arrays(place, {"arr_1": source.labels[np.asarray(indices)]})


def _add_arrays(place: Path, arrays: dict[str, np.ndarray]) -> None:
    with zipfile.ZipFile(place, "a") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as stream:
                np.save(stream, array)
