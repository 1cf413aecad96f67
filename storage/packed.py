"""Packed latents: a folder of a few large files, memory-mapped, written by `preprocessing/dataset_tools.py`.

dataset.json          the manifest, written last: a folder without it was never finished
moments-00000.npy     (n, 2C, h, w) moments, mean and std stacked, float16 or float32; with flips:
moments-00001.npy       (n, 2, 2C, h, w), of the image and of its mirror image
...
images-00000.npy      (n, H, W, 3) uint8 pixels, optional, in their own shards
labels.npy            (N,) int64 class ids, 0 <= id < num_classes
names.json            N image names; row i of the shards, of the labels and of the names are one sample
checksums.npy         (N, 1 or 2) uint32 CRC-32 of each row of the moments, and of the images
"""

import hashlib
import json
import math
import mmap
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.errors import UserError
from storage.file_store import load_npy

MANIFEST = "dataset.json"
FORMAT = "deepflow-packed-latents"
FORMAT_VERSION = 2
FILES = "files"  # in place of a format: `dataset.json` lists the labels of one file per sample

# A slower read than this came from the disk. Prefetching makes reads from the disk ten times as fast, but reads from
# memory half as fast: so prefetch after a slow read, until this many reads in a row were fast.
COLD_SPEED = 250e6  # bytes/s
COLD_READS = 100


def _is_count(value: object) -> bool:
    return type(value) is int and value > 0


def _is_file(entry: object) -> bool:
    return isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in ("file", "sha256"))


def _are_shards(entries: object) -> bool:
    return isinstance(entries, list) and all(_is_file(entry) and _is_count(entry.get("count")) for entry in entries)


class Layout(NamedTuple):
    """A kind of packed folder."""

    format: str  # the "format" in its manifest
    version: int
    fields: dict[str, Callable[[Any], bool]]  # key -> whether the readers can use its value
    command: str  # of dataset_tools, which makes it
    rows: str  # what its shards hold; also the start of their file names


FIELDS: dict[str, Callable[[Any], bool]] = {
    "count": _is_count,
    "num_classes": _is_count,
    "class_names": lambda names: isinstance(names, list) and all(isinstance(name, str) for name in names),
    "resolution": _is_count,
    "latent_shape": lambda shape: isinstance(shape, list) and len(shape) == 3 and all(map(_is_count, shape)),
    "dtype": lambda name: name in ("float16", "float32"),
    "flip": lambda flip: isinstance(flip, bool),
    "images": lambda images: isinstance(images, bool),
    "vae": lambda name: isinstance(name, str),
    "vae_sha256": lambda digest: isinstance(digest, str | None),
    "scaling_factor": lambda factor: type(factor) in (int, float) and 0 < factor < math.inf,
    "labels": _is_file,
    "names": _is_file,
    "checksums": _is_file,
    "shards": _are_shards,
}
LATENTS = Layout(FORMAT, FORMAT_VERSION, FIELDS, "encode", "moments")


def manifest_format(folder: str | Path) -> str | None:
    """The format that the `dataset.json` in `folder` names, `FILES` if it lists files, or None.

    None if there is no such file or it is damaged: its reader reports that.
    """
    try:
        content = json.loads((Path(folder) / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict):
        return None
    return str(content["format"]) if "format" in content else FILES if "labels" in content else None


def read_manifest(path: str | Path, layout: Layout = LATENTS) -> dict[str, Any]:
    """Read the manifest of the packed dataset in folder `path`.

    Raises:
        UserError: if the folder is missing or empty, was not finished, holds something else, was written in another
            version of the format, or if a value in the manifest is missing or of the wrong kind.
    """
    folder = Path(path)
    remedy = f"make it with: python -m preprocessing.dataset_tools {layout.command} --source IMAGES --dest {folder}"
    if not folder.is_dir():
        raise UserError(f"no dataset folder {folder}; {remedy}")
    if not any(folder.iterdir()):
        raise UserError(f"dataset folder {folder} is empty; {remedy}")
    file = folder / MANIFEST
    if not file.is_file():
        raise UserError(f"{folder} has no {MANIFEST}: not a packed dataset, or one never finished; {remedy}")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON ({error}); write the dataset again: {remedy}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != layout.format:
        what = layout.format.removeprefix("deepflow-").replace("-", " ")
        raise UserError(f'{file} is not the manifest of {what} ("format": "{layout.format}"); {remedy}')
    if manifest.get("version") != layout.version:
        raise UserError(
            f"{file} has format version {manifest.get('version')}, this program reads {layout.version}: "
            "write the dataset again, to another place or after deleting this one"
        )
    fields = layout.fields | ({"image_shards": _are_shards} if manifest.get("images") is True else {})
    for key, fits in fields.items():
        if key not in manifest or not fits(manifest[key]):
            raise UserError(f"{file} is damaged, its {key} is {str(manifest.get(key))[:80]}: copy it again; {remedy}")
        if key.endswith("shards") and sum(shard["count"] for shard in manifest[key]) != manifest["count"]:
            raise UserError(
                f"{file} is damaged, its {key} do not add up to {manifest['count']}: copy it again; {remedy}"
            )
    return manifest


class PackedFolder:
    """What packed folders have in common: a manifest, names of the N samples, and memory-mapped shards.

    Pickling keeps the path alone: another process opens the folder again.
    """

    layout = LATENTS

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest = read_manifest(path, self.layout)
        self.has_flips: bool = self.manifest["flip"]

    def _open_shards(self, key: str, row_shape: tuple[int, ...], dtype: np.dtype) -> list[np.memmap]:
        return [self._open(shard["file"], (shard["count"], *row_shape), dtype) for shard in self.manifest[key]]

    def _open(self, file: str, shape: tuple[int, ...], dtype: np.dtype) -> np.memmap:
        """Memory-map one file of the folder; `UserError` unless it has the shape and type of the manifest."""
        place = self.path / Path(file).name  # stay inside the folder, whatever the manifest says
        array = load_npy(place, "copy it again or write the dataset again")
        if array.shape != shape or array.dtype != dtype:
            raise UserError(
                f"{place} holds {array.shape} {array.dtype}, but {MANIFEST} says {shape} {dtype}; "
                "write the dataset again"
            )
        return array

    def __len__(self) -> int:
        return self.manifest["count"]

    def __reduce__(self) -> tuple:
        return type(self), (self.path,)

    @cached_property
    def names(self) -> list[str]:
        """The N image names, relative to the folder they were encoded from."""
        file = self.path / "names.json"
        try:
            names = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{file} cannot be read ({error}); copy it or write the dataset again") from error
        if len(names) != len(self):
            raise UserError(f"{file} has {len(names)} names for {len(self)} samples; write the dataset again")
        return names

    def _views(self, indices: np.ndarray, mirrored: np.ndarray | None) -> np.ndarray:
        """Rows (B,) of the shards, one per view, for samples `indices` (B,), mirrored where `mirrored` (B,) is true."""
        if self.has_flips:
            return 2 * indices + (0 if mirrored is None else mirrored)
        if mirrored is not None and mirrored.any():
            raise ValueError(f"{self.path} has no {self.layout.rows} of mirror images")
        return indices


class PackedLatents(PackedFolder):
    """The packed dataset in folder `path`; its shards are memory-mapped, never read as a whole.

    The labels are compared with their checksum here, the rest only by `dataset_tools verify`.

    Attributes:
        manifest: the content of `dataset.json`.
        labels: (N,) int64.
        latent_shape: (2C, h, w) of the stored moments.
        num_classes, class_names: of the dataset.
        scaling_factor: of the VAE, from its config.
        has_flips: whether there are moments of the mirror images too.
        has_images: whether there are pixels too.

    Raises:
        UserError: for all that `read_manifest` refuses, and for a file that is missing or unlike the manifest.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self.latent_shape = tuple(self.manifest["latent_shape"])
        self.num_classes: int = self.manifest["num_classes"]
        self.class_names: list[str] = self.manifest["class_names"]
        self.scaling_factor = float(self.manifest["scaling_factor"])
        self.has_images: bool = self.manifest["images"]
        side, dtype = self.manifest["resolution"], np.dtype(self.manifest["dtype"])
        moments_shape = (2, *self.latent_shape) if self.has_flips else self.latent_shape
        moments = self._open_shards("shards", moments_shape, dtype)
        images = self._open_shards("image_shards", (side, side, 3), np.uint8) if self.has_images else None
        self._moments = MappedRows(moments, self.latent_shape)  # with flips, two rows per sample
        self._images = MappedRows(images, (side, side, 3)) if self.has_images else None
        self.labels = np.array(self._open("labels.npy", (self.manifest["count"],), np.int64))
        written = self.manifest["labels"]["sha256"]  # the one file whose damage nothing else would show
        if hashlib.sha256((self.path / "labels.npy").read_bytes()).hexdigest() != written:
            raise UserError(
                f"{self.path / 'labels.npy'} holds other labels than were written, by its checksum in {MANIFEST}: "
                "copy it again or write the dataset again"
            )
        if self.labels.min() < 0 or self.labels.max() >= self.num_classes:
            raise UserError(
                f"{self.path / 'labels.npy'} has labels from {self.labels.min()} to {self.labels.max()}, "
                f"but {MANIFEST} says num_classes {self.num_classes}; write the dataset again"
            )

    @cached_property
    def class_counts(self) -> np.ndarray:
        """How many samples each class has, (num_classes,) int64."""
        return np.bincount(self.labels, minlength=self.num_classes)

    def gather(self, indices: np.ndarray, mirrored: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Moments and labels of samples, by one indexed read per shard.

        Args:
            indices: (B,) ints.
            mirrored: (B,) bool: of which samples to take the mirror image.

        Returns:
            moments (B, 2C, h, w) in their stored dtype, and labels (B,).

        Raises:
            IndexError: for an index outside [0, N).
            ValueError: for mirror images that the dataset lacks.
        """
        indices = checked_indices(indices, len(self))
        return self._moments.gather(self._views(indices, mirrored)), self.labels[indices]

    def gather_images(self, indices: np.ndarray, mirrored: np.ndarray | None = None) -> np.ndarray:
        """Pixels (B, H, W, 3) uint8 of samples `indices` (B,), mirrored where `mirrored` ((B,) bool) is true.

        Raises:
            UserError: if the dataset was written without images.
        """
        if not self.has_images:
            raise UserError(f"{self.path} holds no images: write it again with --images")
        images = self._images.gather(checked_indices(indices, len(self)))
        if mirrored is not None:
            images[mirrored] = images[mirrored, :, ::-1]
        return images


def checked_indices(indices: np.ndarray, count: int) -> np.ndarray:
    """`indices` as int64. Raises `IndexError` unless all are in [0, count)."""
    indices = np.asarray(indices, dtype=np.int64)
    if indices.size and not (indices.min() >= 0 and indices.max() < count):
        raise IndexError(f"sample {indices.min()}..{indices.max()} requested from a dataset of {count}")
    return indices


class MappedRows:
    """Rows of one shape and type, stored in several memory-mapped files and numbered through all of them."""

    def __init__(self, files: list[np.memmap], row_shape: tuple[int, ...]) -> None:
        self._arrays = [np.asarray(file).reshape(-1, *row_shape) for file in files]
        self._places = [(file.base, file.offset) for file in files]
        self._ends = np.cumsum([len(array) for array in self._arrays])
        self._row_bytes = self._arrays[0][0].nbytes
        self._prefetches_left = COLD_READS
        for mapped, _ in self._places:
            mapped.madvise(mmap.MADV_RANDOM)  # or the system would read megabytes around every row

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """Copies of rows (B,), (B, *row_shape): one indexed read per file."""
        began = time.perf_counter()
        file_of = np.searchsorted(self._ends, rows, side="right")
        parts = [(file, file_of == file) for file in np.unique(file_of)]
        parts = [(file, here, rows[here] - self._ends[file] + len(self._arrays[file])) for file, here in parts]
        if self._prefetches_left > 0:
            for file, _, inside in parts:
                self._prefetch(file, inside)
        if len(parts) == 1:
            gathered = self._arrays[parts[0][0]][parts[0][2]]
        else:
            gathered = np.empty((len(rows), *self._arrays[0].shape[1:]), self._arrays[0].dtype)
            for file, here, inside in parts:
                gathered[here] = self._arrays[file][inside]
        slow = time.perf_counter() - began > gathered.nbytes / COLD_SPEED
        self._prefetches_left = COLD_READS if slow else self._prefetches_left - 1
        return gathered

    def _prefetch(self, file: int, rows: np.ndarray) -> None:
        """Let the system read these rows in parallel; a plain access would wait for each page."""
        mapped, offset = self._places[file]
        starts = (offset + rows * self._row_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
        for start in starts.tolist():
            mapped.madvise(mmap.MADV_WILLNEED, start, self._row_bytes + mmap.PAGESIZE)
