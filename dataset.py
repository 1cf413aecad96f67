"""Training data: latents on disk or on the device, in an order that depends on seed and step alone.

`open_latents` gives one interface to packed data and to the layout of the official release, a folder or zip of one
`.npy` per image with labels in `dataset.json`, which is slower to read.
"""

import itertools
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
from storage.packed import FILES, MANIFEST, PackedLatents, checked_indices, manifest_format

LatentData = PackedLatents | FileLatents


class DeviceLatents:
    """All latents and labels of `data` in the memory of `device`, where batches are gathered; images stay on disk.

    ImageNet at 256 px in float16 takes 20 GiB, with flips twice as much. It replaces `data` in `latent_batches`.

    Raises:
        UserError: if they do not fit in the free memory of the device.
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
        """As `PackedLatents.gather_images`."""
        return self._data.gather_images(indices, mirrored)


def open_latents(path: str | Path) -> LatentData:
    """Open the latents at `path`.

    Args:
        path: a packed dataset; a folder or zip of one `.npy` per image; or a folder that holds one of these as
            `vae-sd` or `vae-sd.zip`, as the official `--data-dir` does, and optionally the images as `images` or
            `images.zip`.

    Raises:
        UserError: as the reader of that layout does.
    """
    path, images = Path(path), []
    if path.is_dir() and not (path / MANIFEST).exists():
        inner = [path / name for name in ("vae-sd", "vae-sd.zip") if (path / name).exists()]
        images = [path / name for name in ("images", "images.zip") if inner and (path / name).exists()]
        path = inner[0] if inner else path
    if path.is_file() or manifest_format(path) == FILES:
        return FileLatents(path, *images[:1])
    return PackedLatents(path)


class DataOrder:
    """Which samples make up the global batch of each optimizer step: a pure function of the arguments and the step.

    Every epoch is a new permutation of all samples. A batch that reaches the end of an epoch continues with the next
    one, so no sample is dropped and a batch may be larger than the dataset. The step alone is the position in the
    data: resuming needs nothing else.

    Args:
        size: samples in the dataset.
        global_batch: samples per optimizer step, over all processes and micro-batches.
        seed: of the permutations.

    Raises:
        UserError: if `size` or `global_batch` is below 1 or `seed` is negative.
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
        """Draw the order of one epoch, unless it was the last one drawn: for ImageNet it takes a tenth of a second."""
        if epoch != self._epoch:
            # Order by raw bits, which NumPy promises never to change, unlike `Generator.permutation`. The lowest bit
            # hardly affects the order, so it serves as each sample's coin.
            bits = np.random.PCG64([self.seed, epoch]).random_raw(self.size)
            self._epoch, self._permutation, self._coins = epoch, np.argsort(bits, kind="stable"), bits % 2 == 1

    def batch(self, step: int) -> np.ndarray:
        """Sample indices (global_batch,) int64 of optimizer step `step`, counted from 0."""
        return self.batch_and_coins(step)[0]

    def batch_and_coins(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """`batch(step)`, and per sample a fair coin (global_batch,) bool, new in each epoch: whether to mirror it."""
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

    moments: torch.Tensor  # (B, 2C, h, w) mean and std, in their stored dtype
    condition: torch.Tensor  # (B, ...): class ids (B,) int64
    indices: torch.Tensor  # (B,) int64, which samples of the dataset these are
    mirrored: torch.Tensor  # (B,) bool, whether moments and images are of the mirror image
    images: torch.Tensor | None = None  # (B, H, W, 3) uint8, with `with_images`
    features: list[torch.Tensor] | None = None  # (B, T, z) per entry of `features`


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
    """Endless batches of one process, from optimizer step `start_step` on.

    Each step yields `micro_batches` batches of global_batch / (world * micro_batches) samples. The global batch is cut
    into contiguous parts: micro-batch m of rank r is part r * micro_batches + m, so the samples of a step do not depend
    on processes, accumulation or workers. If the dataset has mirror images, the order's coin decides for each sample
    and epoch. Batches are in pinned memory if there is a GPU.

    Args:
        data: the latents.
        order: of the samples of `data`.
        start_step: counted from 0.
        rank: of this process.
        world: number of processes.
        num_workers: threads that read ahead (0: no reading ahead). Threads suffice, as NumPy gathers without the
            interpreter lock, and need not copy batches between processes.
        micro_batches: per step and process (gradient accumulation).
        with_images: add pixels.
        features: of the same samples, see `PackedFeatures.check_belongs`.

    Raises:
        UserError: if the global batch does not divide evenly, `order` or `features` are for another number of samples,
            or `with_images` is set and the dataset has no images.
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
    """`map(read, parts)` of endless `parts`, two batches per thread ahead."""
    with ThreadPoolExecutor(num_workers, "latents") as pool:
        ahead = deque(pool.submit(read, next(parts)) for _ in range(2 * num_workers))
        while True:
            yield ahead.popleft().result()
            ahead.append(pool.submit(read, next(parts)))
