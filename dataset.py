"""Training data: packed latents, memory-mapped, in an order that depends on the seed and the step alone.

A packed dataset is a folder written by `preprocessing/dataset_tools.py`:

    dataset.json          the manifest, written last: a folder without it was never finished
    moments-00000.npy     (n, 2C, h, w) VAE moments, mean and std stacked, float16 or float32
    moments-00001.npy     ...
    labels.npy            (N,) int64 class ids, 0 <= id < num_classes
    names.json            N image names; row i of the shards, of the labels and of the names are one sample

Whatever has `gather(indices)` and `len()` as `PackedLatents` does can be given to `latent_batches`.
"""

import itertools
import json
import os
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from errors import UserError

MANIFEST = "dataset.json"
FORMAT = "deepflow-packed-latents"
FORMAT_VERSION = 1


def read_manifest(path: str | Path) -> dict[str, Any]:
    """Read the manifest of the packed dataset in folder `path`.

    Raises `UserError` if the folder is missing or empty, was not finished, holds something else, or was
    written in another version of the format.
    """
    folder = Path(path)
    remedy = f"make it with: python -m preprocessing.dataset_tools encode --source IMAGES --dest {folder}"
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
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f'{file} is not the manifest of packed latents ("format": "{FORMAT}"); {remedy}')
    if manifest.get("version") != FORMAT_VERSION:
        raise UserError(
            f"{file} has format version {manifest.get('version')}, this program reads {FORMAT_VERSION}: "
            "write the dataset again"
        )
    return manifest


class PackedLatents:
    """The packed dataset in folder `path`; its shards are memory-mapped, never read as a whole.

    Attributes: `manifest` (dict), `labels` ((N,) int64), `latent_shape` ((2C, h, w), of the stored moments),
    `num_classes`, `class_names`, `scaling_factor` (of the VAE, from its own config). Sent to another process
    it travels as its path and is opened again there.

    Raises `UserError` for everything `read_manifest` refuses, and if a file is missing or is not what the
    manifest says. Contents are compared with their checksums only by `dataset_tools verify`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest = read_manifest(path)
        try:
            self.latent_shape = tuple(self.manifest["latent_shape"])
            self.num_classes = int(self.manifest["num_classes"])
            self.class_names = list(self.manifest["class_names"])
            self.scaling_factor = float(self.manifest["scaling_factor"])
            count, dtype = int(self.manifest["count"]), np.dtype(self.manifest["dtype"])
            shards = [(shard["file"], int(shard["count"])) for shard in self.manifest["shards"]]
            if count < 1 or sum(rows for _, rows in shards) != count:
                raise ValueError(f"its shards do not add up to a count of {count}")
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{self.path / MANIFEST} is damaged: {error!r}; write it again") from error
        self._shards = [self._open(file, (rows, *self.latent_shape), dtype) for file, rows in shards]
        self._first_rows = np.cumsum([0] + [rows for _, rows in shards])[:-1]
        self.labels = np.array(self._open("labels.npy", (count,), np.dtype(np.int64)))
        if self.labels.min() < 0 or self.labels.max() >= self.num_classes:
            raise UserError(
                f"{self.path / 'labels.npy'} has labels from {self.labels.min()} to {self.labels.max()}, "
                f"but {MANIFEST} says num_classes {self.num_classes}; write the dataset again"
            )

    def _open(self, file: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Memory-map one file of the folder and hold it against what the manifest promises."""
        place = self.path / Path(file).name  # never outside the folder, whatever the manifest says
        try:
            array = np.load(place, mmap_mode="r", allow_pickle=False)
        except FileNotFoundError as error:
            raise UserError(f"{place} is missing; copy it again or write the dataset again") from error
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{place} is damaged ({error}); copy it again or write it again") from error
        if array.shape != shape or array.dtype != dtype:
            raise UserError(
                f"{place} holds {array.shape} {array.dtype}, but {MANIFEST} says {shape} {dtype}; "
                "write the dataset again"
            )
        return array

    def __len__(self) -> int:
        return len(self.labels)

    def __reduce__(self) -> tuple:
        return PackedLatents, (self.path,)

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

    def gather(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Moments (B, 2C, h, w) in their stored dtype, and labels (B,), of samples `indices` (B,).

        One indexed read per shard. Raises `IndexError` for an index outside [0, N).
        """
        indices = np.asarray(indices, dtype=np.int64)
        if indices.size and not (indices.min() >= 0 and indices.max() < len(self)):
            raise IndexError(f"sample {indices.min()}..{indices.max()} asked of a dataset of {len(self)}")
        shard_of = np.searchsorted(self._first_rows, indices, side="right") - 1
        moments = np.empty((len(indices), *self.latent_shape), self._shards[0].dtype)
        for shard in np.unique(shard_of):
            here = shard_of == shard
            moments[here] = self._shards[shard][indices[here] - self._first_rows[shard]]
        return moments, self.labels[indices]


class FileStore:
    """The files of folder `path`, or of zip file `path`, by their names inside it (with forward slashes).

    May be used from many threads, and from processes forked or sent it: each opens the zip for itself.

    Raises `UserError` if there is nothing at `path`, or it is no folder and no zip file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._archive: tuple[int, zipfile.ZipFile] | None = None  # opened by the process of this id
        if not self.path.exists():
            raise UserError(f"no folder or zip file {self.path}: give another path")
        if not self.path.is_dir():
            self._opened()

    def _opened(self) -> zipfile.ZipFile:
        if self._archive is None or self._archive[0] != os.getpid():
            try:
                self._archive = os.getpid(), zipfile.ZipFile(self.path)
            except (OSError, zipfile.BadZipFile) as error:
                raise UserError(
                    f"{self.path} is no folder and no readable zip file ({error}): copy it again"
                ) from error
        return self._archive[1]

    def __reduce__(self) -> tuple:
        return FileStore, (self.path,)

    def names(self) -> list[str]:
        """All files, in no particular order. A folder is walked, which takes a while for millions of files."""
        if not self.path.is_dir():
            return [entry.filename for entry in self._opened().infolist() if not entry.is_dir()]
        names = []
        for place, _, files in os.walk(self.path, followlinks=True):  # ImageNet is often a tree of links
            below = Path(place).relative_to(self.path).as_posix()
            names += files if below == "." else [f"{below}/{file}" for file in files]
        return names

    def read(self, name: str) -> bytes:
        """The content of one file; `UserError` names it if it is missing, damaged or outside the store."""
        try:
            if not self.path.is_dir():
                return self._opened().read(name)
            if ".." in Path(name).parts or Path(name).is_absolute():
                raise UserError(f"{self.path} lists {name}, which lies outside it: correct its {MANIFEST}")
            return (self.path / name).read_bytes()
        except (OSError, KeyError, zipfile.BadZipFile, EOFError, zlib.error) as error:
            problem = "is missing" if isinstance(error, KeyError | FileNotFoundError) else f"is damaged ({error})"
            raise UserError(f"{self.path / name} {problem}: copy it again, or take it out of {MANIFEST}") from error


def read_labels(store: FileStore) -> tuple[dict[str, int], list[str]]:
    """Label by file name, and class names, of the `dataset.json` of an image or latent folder or zip.

    It reads {"labels": [["a/b.png", 3], ...]}, as REPA's tool writes it; "class_names": [...] is optional, by
    default the numbers. Raises `UserError` for anything else.
    """
    place = store.path / MANIFEST
    try:
        content = json.loads(store.read(MANIFEST))
        label_of = {str(name): label for name, label in content["labels"]}
        class_names = content.get("class_names")
        if len(label_of) != len(content["labels"]):
            raise ValueError("a file that is listed twice")
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f'{place}: expected {{"labels": [["a/b.png", 3], ...]}}, got {error!r}') from error
    for name, label in label_of.items():
        if type(label) is not int or label < 0:
            raise UserError(f"{place}: label {label!r} of {name}, expected an integer from 0")
    if class_names is None:
        class_names = [str(label) for label in range(max(label_of.values(), default=-1) + 1)]
    if max(label_of.values(), default=-1) >= len(class_names):
        raise UserError(f"{place}: label {max(label_of.values())}, but only {len(class_names)} class_names")
    return label_of, [str(name) for name in class_names]


class DataOrder:
    """Which samples make up the global batch of each optimizer step.

    A pure function of (size, global_batch, seed, step). Every epoch is a fresh permutation of all `size`
    samples. Epochs follow each other without a seam: the batch that reaches the end of one goes on with the
    next, so nothing is dropped and a batch may exceed the dataset. The step is thus the whole position in the
    data, and resuming needs nothing else.

    Raises `UserError` if `size` or `global_batch` is below 1 or `seed` is negative.
    """

    def __init__(self, size: int, global_batch: int, seed: int) -> None:
        if size < 1:
            raise UserError(f"the dataset has {size} samples, expected at least 1")
        if global_batch < 1:
            raise UserError(f"batch size {global_batch} given, expected at least 1: change --batch-size")
        if seed < 0:
            raise UserError(f"seed {seed} given, expected 0 or more: change --seed")
        self.size, self.global_batch, self.seed = size, global_batch, seed
        self._cached_epoch, self._cached_permutation = -1, np.empty(0, np.int64)

    def _permutation(self, epoch: int) -> np.ndarray:
        """Order (size,) of one epoch; the latest is kept, as drawing ImageNet's takes a tenth of a second."""
        if epoch != self._cached_epoch:
            # Sorted raw bits: NumPy promises never to change these, unlike `Generator.permutation`.
            bits = np.random.PCG64([self.seed, epoch]).random_raw(self.size)
            self._cached_epoch, self._cached_permutation = epoch, np.argsort(bits, kind="stable")
        return self._cached_permutation

    def batch(self, step: int) -> np.ndarray:
        """Sample indices (global_batch,) int64 of optimizer step `step`, counted from 0."""
        first = step * self.global_batch
        epochs, offsets = np.divmod(np.arange(first, first + self.global_batch), self.size)
        return np.concatenate([self._permutation(int(epoch))[offsets[epochs == epoch]] for epoch in np.unique(epochs)])


class LatentBatch(NamedTuple):
    """One micro-batch of one process."""

    moments: torch.Tensor  # (B, 2C, h, w) mean and std, in the dtype they are stored in
    labels: torch.Tensor  # (B,) int64
    indices: torch.Tensor  # (B,) int64, which samples of the dataset these are


def _indices_of_process(
    order: DataOrder, start_step: int, rank: int, world: int, micro_batches: int
) -> Iterator[np.ndarray]:
    for step in itertools.count(start_step):
        yield from np.split(order.batch(step), world * micro_batches)[rank * micro_batches :][:micro_batches]


def latent_batches(
    data: PackedLatents,
    order: DataOrder,
    start_step: int = 0,
    rank: int = 0,
    world: int = 1,
    num_workers: int = 0,
    micro_batches: int = 1,
) -> Iterator[LatentBatch]:
    """Endless batches of process `rank` of `world`, beginning with those of optimizer step `start_step`.

    Each step yields `micro_batches` batches of global_batch / (world * micro_batches) samples. The global
    batch is cut in contiguous parts: micro-batch m of process r is part r * micro_batches + m, so what the
    step trains on depends on neither processes, nor accumulation, nor workers. `num_workers` threads read ahead
    (0: nothing is read ahead); threads suffice, as NumPy gathers without holding the interpreter, and unlike
    processes they need not copy each batch to another. Batches lie in pinned memory where there is a GPU.

    Raises `UserError` if the global batch does not divide evenly, or `order` is for another number of
    samples.
    """
    if order.size != len(data):
        raise UserError(f"the data order is for {order.size} samples, but the dataset has {len(data)}")
    if order.global_batch % (world * micro_batches):
        raise UserError(
            f"batch size {order.global_batch} is not divisible by {world} processes x {micro_batches} "
            "accumulation steps: change --batch-size or --gradient-accumulation-steps"
        )
    indices = _indices_of_process(order, start_step, rank, world, micro_batches)
    pin = torch.cuda.is_available()

    def read(indices: np.ndarray) -> LatentBatch:
        tensors = map(torch.from_numpy, (*data.gather(indices), indices))
        return LatentBatch(*(tensor.pin_memory() if pin else tensor for tensor in tensors))

    return _read_ahead(read, indices, num_workers) if num_workers else map(read, indices)


def _read_ahead(
    read: Callable[[np.ndarray], LatentBatch], indices: Iterator[np.ndarray], num_workers: int
) -> Iterator[LatentBatch]:
    """`map(read, indices)`, endless, with two batches a thread under way or waiting."""
    with ThreadPoolExecutor(num_workers, "latents") as pool:
        ahead = deque(pool.submit(read, next(indices)) for _ in range(2 * num_workers))
        while True:
            yield ahead.popleft().result()
            ahead.append(pool.submit(read, next(indices)))
