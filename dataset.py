"""Training data: latents on disk or on the device, in an order that depends on the seed and the step alone.

`open_latents` reads packed data and the layout of the official release, a folder or zip of one `.npy` per image with a
`dataset.json` of labels, through one interface; the latter at the speed of one file per sample.
"""

import itertools
import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from common.errors import UserError
from storage.features import PackedFeatures
from storage.official import FileLatents
from storage.packed import MANIFEST, PackedLatents, checked_indices

LatentData = PackedLatents | FileLatents


class DeviceLatents:
    """The latents of `data` as a whole in the memory of `device`: batches are gathered there, and nothing is read.

    ImageNet at 256 px in float16 takes 20 GiB, twice that with flips. Labels lie there too; images stay where they
    are. To be given to `latent_batches` in place of `data`.

    Raises `UserError` if they do not fit in what the device has free.
    """

    def __init__(self, data: LatentData, device: str | torch.device) -> None:
        self._data = data
        self.path, self.has_flips, self.has_images = data.path, data.has_flips, data.has_images
        device, views = torch.device(device), 1 + data.has_flips
        moments = torch.from_numpy(data.gather(np.arange(1))[0])
        size = views * len(data) * moments.nbytes
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else size
        if size > free:
            raise UserError(
                f"the latents of {data.path} take {size / 2**30:.1f} GiB and {device} has {free / 2**30:.1f} GiB free: "
                "leave them on disk"
            )
        self._moments = torch.empty((views, len(data), *data.latent_shape), dtype=moments.dtype, device=device)
        with tqdm(desc="latents to device", total=len(data), unit="img") as bar:
            for first in range(0, len(data), 4096):
                rows = np.arange(first, min(first + 4096, len(data)))
                for view in range(views):
                    read = data.gather(rows, np.full(len(rows), view == 1))[0]
                    self._moments[view, first : first + len(rows)] = torch.from_numpy(read)
                bar.update(len(rows))
        self._moments = self._moments.flatten(0, 1)
        self._labels = torch.from_numpy(data.labels).to(device)

    def __len__(self) -> int:
        return len(self._labels)

    def gather(self, indices: np.ndarray, mirrored: np.ndarray | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """As `PackedLatents.gather`, as tensors on the device."""
        indices = checked_indices(indices, len(self))
        rows = indices if mirrored is None else indices + len(self) * mirrored
        rows, indices = (self._moved(array) for array in (rows, indices))
        return self._moments[rows], self._labels[indices]

    def _moved(self, indices: np.ndarray) -> torch.Tensor:
        """On the device. A GPU does not make the host wait for what is copied from pinned memory."""
        tensor, device = torch.from_numpy(indices), self._labels.device
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor

    def gather_images(self, indices: np.ndarray, mirrored: np.ndarray | None = None) -> np.ndarray:
        """As `PackedLatents.gather_images`: read from where they are."""
        return self._data.gather_images(indices, mirrored)


def open_latents(path: str | Path) -> LatentData:
    """The latents at `path`: a packed dataset, a folder or zip of one `.npy` an image, or a folder with one of
    these as `vae-sd` or `vae-sd.zip` in it (what the official `--data-dir` names), and then, where there are any, the
    `images` or `images.zip` beside.

    Raises `UserError` as the reader of that layout does.
    """
    path, images = Path(path), []
    if path.is_dir() and not (path / MANIFEST).exists():
        inner = [path / name for name in ("vae-sd", "vae-sd.zip") if (path / name).exists()]
        images = [path / name for name in ("images", "images.zip") if inner and (path / name).exists()]
        path = inner[0] if inner else path
    if path.is_file() or _lists_files(path / MANIFEST):
        return FileLatents(path, *images[:1])
    return PackedLatents(path)


def _lists_files(manifest: Path) -> bool:
    """Whether this is the `dataset.json` of one file a sample; a damaged one is left to its reader to report."""
    try:
        content = json.loads(manifest.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and "format" not in content and "labels" in content


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
        self._epoch, self._permutation, self._coins = -1, np.empty(0, np.int64), np.empty(0, bool)

    def _draw(self, epoch: int) -> None:
        """Draw the order of one epoch; the latest is kept, as ImageNet's takes a tenth of a second."""
        if epoch != self._epoch:
            # Sorted raw bits: NumPy promises never to change these, unlike `Generator.permutation`. The lowest
            # bit has no say in the order, so it serves as each sample's coin.
            bits = np.random.PCG64([self.seed, epoch]).random_raw(self.size)
            self._epoch, self._permutation, self._coins = epoch, np.argsort(bits, kind="stable"), bits % 2 == 1

    def batch(self, step: int) -> np.ndarray:
        """Sample indices (global_batch,) int64 of optimizer step `step`, counted from 0."""
        return self.batch_and_coins(step)[0]

    def batch_and_coins(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """`batch(step)`, and for each a fair coin (global_batch,) bool, drawn anew in each epoch: to mirror or not."""
        first = step * self.global_batch
        epochs, offsets = np.divmod(np.arange(first, first + self.global_batch), self.size)
        indices, coins = [], []
        for epoch in np.unique(epochs):
            self._draw(int(epoch))
            indices.append(self._permutation[offsets[epochs == epoch]])
            coins.append(self._coins[indices[-1]])
        return np.concatenate(indices), np.concatenate(coins)


class LatentBatch(NamedTuple):
    """One micro-batch of one process."""

    moments: torch.Tensor  # (B, 2C, h, w) mean and std, in the dtype they are stored in
    condition: torch.Tensor  # (B, ...): class ids (B,) int64
    indices: torch.Tensor  # (B,) int64, which samples of the dataset these are
    mirrored: torch.Tensor  # (B,) bool, whether moments and images are those of the mirror image
    images: torch.Tensor | None = None  # (B, H, W, 3) uint8, where asked for
    features: list[torch.Tensor] | None = None  # (B, T, z) of each SSL encoder whose features were given


def _parts_of_process(
    order: DataOrder, start_step: int, rank: int, world: int, micro_batches: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Indices and coins of every micro-batch of one process."""
    for step in itertools.count(start_step):
        parts = (np.split(array, world * micro_batches) for array in order.batch_and_coins(step))
        yield from list(zip(*parts, strict=True))[rank * micro_batches :][:micro_batches]


def latent_batches(
    data: LatentData | DeviceLatents,
    order: DataOrder,
    start_step: int = 0,
    rank: int = 0,
    world: int = 1,
    num_workers: int = 0,
    micro_batches: int = 1,
    with_images: bool = False,
    features: Sequence[PackedFeatures] = (),
) -> Iterator[LatentBatch]:
    """Endless batches of process `rank` of `world`, beginning with those of optimizer step `start_step`.

    Each step yields `micro_batches` batches of global_batch / (world * micro_batches) samples. The global
    batch is cut in contiguous parts: micro-batch m of process r is part r * micro_batches + m, so what the
    step trains on depends on neither processes, nor accumulation, nor workers. `num_workers` threads read ahead
    (0: nothing is read ahead); threads suffice, as NumPy gathers without holding the interpreter, and unlike
    processes they need not copy each batch to another. Batches lie in pinned memory where there is a GPU. If the
    dataset has mirror images, each visit of a sample takes one or the other, as the order's coin says. `with_images`
    adds pixels, `features` those of the same samples; that they are of the same images is for
    `PackedFeatures.check_belongs` to say.

    Raises `UserError` if the global batch does not divide evenly, `order` or `features` are for another number of
    samples, or the dataset has no images though they are asked for.
    """
    if order.size != len(data):
        raise UserError(f"the data order is for {order.size} samples, but the dataset has {len(data)}")
    if order.global_batch % (world * micro_batches):
        raise UserError(
            f"batch size {order.global_batch} is not divisible by {world} processes x {micro_batches} "
            "accumulation steps: change --batch-size or --gradient-accumulation-steps"
        )
    if with_images and not data.has_images:
        raise UserError(f"{data.path} holds no images: encode or pack it with the images, or train without them")
    for packed in features:
        if len(packed) != len(data):
            raise UserError(f"{packed.path} holds features of {len(packed)} samples, {data.path} has {len(data)}")
    parts = _parts_of_process(order, start_step, rank, world, micro_batches)
    pin = torch.cuda.is_available()

    def read(part: tuple[np.ndarray, np.ndarray]) -> LatentBatch:
        indices, coins = part
        mirrored = coins & data.has_flips

        def tensor(array: np.ndarray | torch.Tensor) -> torch.Tensor:
            value = torch.as_tensor(array)
            return value.pin_memory() if pin and not value.is_cuda else value

        batch = LatentBatch(*map(tensor, [*data.gather(indices, mirrored), indices, mirrored]))
        if with_images:
            batch = batch._replace(images=tensor(data.gather_images(indices, mirrored)))
        if features:
            batch = batch._replace(features=[tensor(packed.gather(indices, mirrored)) for packed in features])
        return batch

    return _read_ahead(read, parts, num_workers) if num_workers else map(read, parts)


def _read_ahead(
    read: Callable[[tuple], LatentBatch], parts: Iterator[tuple], num_workers: int
) -> Iterator[LatentBatch]:
    """`map(read, parts)`, endless, with two batches a thread under way or waiting."""
    with ThreadPoolExecutor(num_workers, "latents") as pool:
        ahead = deque(pool.submit(read, next(parts)) for _ in range(2 * num_workers))
        while True:
            yield ahead.popleft().result()
            ahead.append(pool.submit(read, next(parts)))
