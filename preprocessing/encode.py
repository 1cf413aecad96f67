"""Images -> packed VAE moments, on one device or on many."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch

from common.errors import UserError
from common.files import only_writer
from common.processes import Processes, cpu_process_group, progress_bar
from models.autoencoder import Autoencoder, encode_moments, load_vae, portable_name, reduction, weights_sha256
from preprocessing.images import SourceImages, list_images, report_passed_over, warn_of_empty_classes
from preprocessing.packed_writer import PackedJob, packed_manifest
from preprocessing.source_identity import source_sha256
from preprocessing.workers import worker_results
from storage.file_store import FileStore, read_image


def encode(
    source: str | Path,
    dest: str | Path,
    vae_name: str,
    dtype: str = "float16",
    batch_size: int = 64,
    device: str = "cpu",
    num_workers: int = 2,
    flip: bool = False,
    with_images: bool = False,
    shard_rows: int | None = None,
) -> None:
    """Encode images to packed latents, or continue that work; nothing is done if `dest` is complete.

    The VAE runs in float32 (on GPUs with TF32 convolutions, PyTorch's default), whatever the stored `dtype`. Which
    images share a batch depends on `batch_size` alone: neither interruptions nor the number of processes change a bit
    of the result, on the same kind of device and number of threads.

    Args:
        source: folder or zip of images.
        dest: folder to make.
        vae_name: local folder or hub name of an AutoencoderKL.
        dtype: of the stored moments, "float16" or "float32".
        batch_size: images per forward pass.
        device: where the VAE runs.
        num_workers: processes that read images, per process that encodes.
        flip: store the moments of the mirror images too.
        with_images: store the pixels too.
        shard_rows: samples per shard (default: 2 GiB of them).

    Raises:
        UserError: for a source, a VAE or images that do not fit, if `dest` holds something else or is being written by
            another command, and for a full disk; what is written stays, and the same command continues.
    """
    if Path(vae_name).is_dir():  # the path must hold in other working folders too
        vae_name = str(Path(vae_name).resolve())
    with cpu_process_group() as processes:
        leader = processes.rank == 0  # only it lists the images, downloads the VAE and writes the shards
        with only_writer(dest) if leader else nullcontext():
            vae = None
            if leader:
                images = list_images(source)
                report_passed_over(images.others)
                warn_of_empty_classes(images.labels, images.class_names)
                vae = load_vae(vae_name, device=processes.own_device(device))
                manifest = _manifest(images, vae, vae_name, dtype, flip, with_images)
                PackedJob.begin(dest, manifest, images.names, images.labels)
            processes.wait()
            job = PackedJob.join(dest)
            if job is not None:
                vae = vae or load_vae(vae_name, device=processes.own_device(device))
                batches = ImageBatches(FileStore(source), job.names, job.manifest["resolution"])
                encode_units(job, batches, partial(encode_moments, vae), batch_size, num_workers, processes)
            processes.wait()
            if leader and job is not None:
                job.finish(shard_rows)
                print(f"{dest}: {len(images.names)} samples in {len(images.class_names)} classes")
            elif leader:
                print(f"{dest} is complete ({len(images.names)} samples): nothing to do")


def _manifest(images: SourceImages, vae: Autoencoder, vae_name: str, dtype: str, flip: bool, with_images: bool) -> dict:
    resolution = images.read(0).shape[0]
    factor = reduction(vae)
    if resolution % factor:
        raise UserError(f"images are {resolution} pixels high, {vae_name} needs a multiple of {factor}: resize them")
    return packed_manifest(
        images.names,
        images.labels,
        images.class_names,
        resolution=resolution,
        latent_shape=(2 * vae.config.latent_channels, resolution // factor, resolution // factor),
        dtype=dtype,
        vae=portable_name(vae_name),
        vae_sha256=weights_sha256(vae),
        scaling_factor=vae.config.scaling_factor,
        flip=flip,
        images=with_images,
        source_sha256=source_sha256((images.store, images.names)),
    )


def encode_units(
    job: PackedJob,
    images: Callable[[list[int]], np.ndarray | UserError],
    network: Callable[[torch.Tensor], torch.Tensor],
    batch_size: int,
    num_workers: int,
    processes: Processes,
) -> None:
    """Encode the units that this process has to write, while worker processes read ahead.

    Args:
        job: what to encode.
        images: sample numbers -> their images, uint8 (B, H, W, 3), or an error.
        network: images -> what is stored of them, (B, ...).
        batch_size: images per forward pass.
        num_workers: processes that read.
        processes: of this command.

    Raises:
        UserError: for an image that cannot be read, values that are not finite, and a full disk.
    """
    units = job.unwritten_units(processes.rank, processes.world)
    batches = {
        unit: [list(rows[first : first + batch_size]) for first in range(0, len(rows), batch_size)]
        for unit, rows in ((unit, job.rows_of(unit)) for unit in units)
    }
    order = [batch for unit in units for batch in batches[unit]]
    total = sum(len(job.rows_of(unit)) for unit in units)
    with (
        worker_results(images, order, num_workers) as read,
        progress_bar(processes.local_rank == 0, total=total, desc=processes.label("encode"), unit="img") as bar,
    ):
        for unit in units:
            values, pixels = [], []
            for _ in batches[unit]:
                batch = torch.from_numpy(next(read))
                views = [batch, batch.flip(2)] if job.manifest["flip"] else [batch]
                values.append(torch.stack([network(view) for view in views], dim=1).cpu().numpy())
                if not np.isfinite(values[-1]).all():
                    raise UserError("what the network makes of the images is not finite: its weights are damaged")
                if job.manifest.get("images"):
                    pixels.append(batch.numpy())
                bar.update(len(batch))
            job.write_unit(unit, np.concatenate(values), np.concatenate(pixels) if pixels else None)


class ImageBatches:
    """Batches of images, uint8 (B, resolution, resolution, 3)."""

    def __init__(self, store: FileStore, names: list[str], resolution: int) -> None:
        self.store, self.names, self.resolution = store, names, resolution

    def __call__(self, indices: list[int]) -> np.ndarray | UserError:
        """A batch, or the error: raised, it would count as a failure of the worker."""
        try:
            expected = (
                f"expected {self.resolution} x {self.resolution}, the height of the first image: bring all to one "
                "square size"
            )
            return np.stack([read_image(self.store, self.names[i], self.resolution, expected) for i in indices])
        except UserError as error:
            return error
