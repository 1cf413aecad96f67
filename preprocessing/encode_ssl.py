"""Images -> packed features of an SSL encoder, on one device or on many."""

import hashlib
import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from common.files import only_writer, real_place
from common.flags import PRECISIONS
from common.processes import cpu_process_group
from models.autoencoder import weights_sha256
from models.ssl_encoders import load_encoder
from preprocessing.encode import ImageBatches, encode_units
from preprocessing.images import list_images, report_passed_over
from preprocessing.packed_writer import SHARD_BYTES, PackedJob, features_manifest, row_type
from preprocessing.source_identity import source_sha256
from storage.file_store import FileStore
from storage.packed import FILES, MANIFEST, PackedLatents, manifest_format


def encode_ssl(
    source: str | Path,
    dest: str | Path,
    encoder_name: str,
    weights: str | Path | None = None,
    dtype: str = "float16",
    batch_size: int = 64,
    device: str = "cpu",
    num_workers: int = 2,
    flip: bool = False,
    tokens_a_side: int | None = None,
    precision: str = "no",
    shard_rows: int | None = None,
) -> None:
    """Encode images to packed features, or continue that work; the size on disk is printed first.

    Args:
        source: folder or zip of images, or packed latents that were written with the images.
        encoder_name, weights: as in `load_encoder`.
        tokens_a_side: tokens per side (default: as many as a network of patch size 2 has; for images it is assumed
            that their latents are the SD-VAE's).
        precision: of the encoder, a key of `flags.PRECISIONS`.
        dest, dtype, batch_size, device, num_workers, flip, shard_rows: as in `encode.encode`.

    Raises:
        UserError: for a source or an encoder that does not fit, too little free disk, and as `encode` does.
    """
    with cpu_process_group() as processes:
        leader = processes.rank == 0  # only it reads the source, downloads the encoder and writes the shards
        place = processes.own_device(device)
        with only_writer(dest) if leader else nullcontext():
            encoder = None
            if leader:
                names, resolution, side, identity = _inspect(Path(source), tokens_a_side)
                encoder = load_encoder(encoder_name, side, weights, place, PRECISIONS[precision])
                manifest = features_manifest(
                    names,
                    resolution=resolution,
                    tokens=encoder.tokens_a_side**2,
                    width=encoder.width,
                    dtype=dtype,
                    encoder=encoder_name,
                    weights_sha256=weights_sha256(encoder.vit),
                    precision=precision,
                    flip=flip,
                    source_sha256=identity,
                )
                check_disk(real_place(dest), manifest)
                PackedJob.begin(dest, manifest, names)
            processes.wait()
            job = PackedJob.join(dest)
            if job is not None:
                side = round(job.manifest["tokens"] ** 0.5)
                encoder = encoder or load_encoder(encoder_name, side, weights, place, PRECISIONS[precision])
                encode_units(job, _images(Path(source), job), encoder, batch_size, num_workers, processes)
            processes.wait()
            if leader and job is not None:
                job.finish(shard_rows)
                print(f"{dest}: {describe_size(job.manifest)}")
            elif leader:
                print(f"{dest} is complete ({len(names)} images): nothing to do")


def _inspect(source: Path, tokens_a_side: int | None) -> tuple[list[str], int, int, str]:
    """Names of the images, their side in pixels, the tokens per side (unless given, as many as their latents have), and
    a checksum that identifies the images."""
    if _is_packed(source):
        data = PackedLatents(source)
        if not data.has_images:
            raise UserError(f"{source} holds no images: give the images, or encode it again with --images")
        identity = [data.manifest["names"]["sha256"], *(shard["sha256"] for shard in data.manifest["image_shards"])]
        digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
        return data.names, data.manifest["resolution"], tokens_a_side or data.latent_shape[-1] // 2, digest
    images = list_images(source)
    report_passed_over(images.others)
    resolution = images.read(0).shape[0]
    if resolution % 16 and not tokens_a_side:
        raise UserError(
            f"images are {resolution} pixels high, expected a multiple of 16: resize them (convert), or say how many "
            "tokens per side the network has (--tokens)"
        )
    return images.names, resolution, tokens_a_side or resolution // 16, source_sha256((images.store, images.names))


def _is_packed(source: Path) -> bool:
    return manifest_format(source) not in (None, FILES)


def _images(source: Path, job: PackedJob) -> Callable[[list[int]], np.ndarray | UserError]:
    if _is_packed(source):
        return _PackedImages(PackedLatents(source))
    return ImageBatches(FileStore(source), job.names, job.manifest["resolution"])


class _PackedImages:
    """Batches of images, uint8 (B, H, W, 3), of packed latents."""

    def __init__(self, data: PackedLatents) -> None:
        self.data = data

    def __call__(self, indices: list[int]) -> np.ndarray:
        return self.data.gather_images(np.array(indices))


def describe_size(manifest: dict[str, Any]) -> str:
    """One line on packed features of this manifest, with their size in gigabytes (10^9 bytes)."""
    views = " and of its mirror image" if manifest["flip"] else ""
    tokens = f"{manifest['tokens']} tokens of {manifest['width']} {manifest['dtype']}"
    size = manifest["count"] * row_type(manifest).itemsize
    return f"{manifest['count']} images, of each{views} {tokens}: {size / 1e9:.1f} GB"


def check_disk(dest: Path, manifest: dict[str, Any]) -> None:
    """Print the size of the features and the free disk. Raises `UserError` if they do not fit."""
    if (dest / MANIFEST).is_file():
        return
    size = manifest["count"] * row_type(manifest).itemsize
    written = sum(file.stat().st_size for file in dest.rglob("*") if file.is_file())
    needed = max(0, size - written) + min(size, SHARD_BYTES)  # at the end one shard exists twice
    free = shutil.disk_usage(next(place for place in (dest, *dest.absolute().parents) if place.is_dir())).free
    print(f"{describe_size(manifest)}, {free / 1e9:.1f} GB free", flush=True)
    if needed > free:
        raise UserError(
            f"{dest} needs {needed / 1e9:.1f} GB more and {free / 1e9:.1f} GB are free there: free space, choose an "
            "encoder of fewer features, leave out --flip, or change --dest"
        )
