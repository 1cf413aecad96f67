"""Describe a dataset, and check that it is as it was written."""

import hashlib
import json
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from common.errors import UserError
from common.files import file_sha256
from dataset import open_latents
from preprocessing.images import list_images
from preprocessing.pack import check_files
from preprocessing.packed_writer import LAYOUTS, row_type, shard_header
from storage.features import FEATURES, PackedFeatures
from storage.file_store import UnreadableFolder
from storage.official import FileLatents
from storage.packed import LATENTS, manifest_format, read_manifest

CHUNK_BYTES = 2**22


def info(path: str | Path) -> str:
    """A description, in a few lines, of the dataset at `path`: packed latents or features, latents of one file per
    image, or images."""
    if manifest_format(path) == FEATURES.format:
        return _features_info(PackedFeatures(path))
    try:
        data = open_latents(path)
    except UserError as not_latents:
        try:
            images = list_images(path)
        except UnreadableFolder:
            raise
        except UserError:
            raise not_latents from None
        height, width = images.read(0).shape[:2]
        counts = np.bincount(images.labels, minlength=len(images.class_names))
        return "\n".join([*_counts(counts), f"images          the first is {width} x {height} px"])
    lines = [
        *_counts(data.class_counts),
        f"resolution      {data.manifest['resolution']} px",
        f"moments         {data.latent_shape} {data.manifest['dtype']}, mean and std stacked"
        + (", of the mirror images too" if data.has_flips else ""),
        f"images          {'uint8 pixels of every sample' if data.has_images else 'none'}",
    ]
    if isinstance(data, FileLatents):
        return "\n".join([*lines, f"scaling factor  {data.scaling_factor}, the SD-VAE's: this layout records no VAE"])
    vae, sha256 = data.manifest["vae"], data.manifest["vae_sha256"]
    shards = data.manifest["shards"] + data.manifest.get("image_shards", [])
    return "\n".join(
        [
            *lines,
            f"vae             {vae}, weights sha256 {sha256[:12] + '...' if sha256 else 'not recorded'}",
            f"scaling factor  {data.scaling_factor}",
            _on_disk(data.path, len(shards)),
        ]
    )


def _features_info(data: PackedFeatures) -> str:
    views = ", of the mirror images too" if data.has_flips else ""
    return "\n".join(
        [
            f"samples         {len(data)}",
            f"resolution      {data.manifest['resolution']} px",
            f"features        ({data.tokens}, {data.width}) {data.manifest['dtype']}, patch tokens{views}",
            f"encoder         {data.encoder}, weights sha256 {data.manifest['weights_sha256'][:12]}...",
            _on_disk(data.path, len(data.manifest["shards"])),
        ]
    )


def _on_disk(folder: Path, shards: int) -> str:
    size = sum(file.stat().st_size for file in folder.iterdir())
    return f"on disk         {size / 2**20:.1f} MiB in {shards} shard(s)"


def _counts(counts: np.ndarray) -> list[str]:
    return [
        f"samples         {counts.sum()}",
        f"classes         {len(counts)}, of {counts.min()} to {counts.max()} samples each",
    ]


def verify(path: str | Path, num_workers: int = 2) -> None:
    """Read the whole dataset at `path`, in `num_workers` threads, and compare it with its checksums.

    Prints one line per damaged sample or file. Latents of one file per image have no checksums: there every file has
    to hold finite moments of the same shape and type.

    Raises:
        UserError: if anything is damaged, naming the first and the number of others.
    """
    path = Path(path)
    try:
        manifest, files = read_manifest(path, LAYOUTS.get(manifest_format(path), LATENTS)), None
    except UserError:  # raises the same again, unless it is one file per image
        manifest, files = None, open_latents(path)
    damaged = _damage_of_files(files, num_workers) if files else _damage_of_packed(path, manifest, num_workers)
    for line in damaged:
        print(line)
    if damaged:
        more = f", and {len(damaged) - 1} more" if len(damaged) > 1 else ""
        raise UserError(f"{path} is damaged: {damaged[0]}{more}: copy it again or write it again")
    print(f"{path}: {len(files) if files else manifest['count']} samples, all as written")


def _damage_of_files(data: FileLatents, num_workers: int) -> list[str]:
    check_files(data)

    def problem(index: int) -> str | None:
        try:
            moments = data.read(index)
        except UserError as error:
            return str(error)
        return None if np.isfinite(moments).all() else f"{data.path / data.names[index]} is not finite"

    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        problems = pool.map(problem, range(len(data)))
        return [line for line in tqdm(problems, "verify", len(data), unit="file") if line]


def _damage_of_packed(path: Path, manifest: dict[str, Any], num_workers: int) -> list[str]:
    small = [manifest[key] for key in ("labels", "names", "checksums") if key in manifest]
    damaged = [
        f"{entry['file']} is damaged" for entry in small if _sha256(path / Path(entry["file"]).name) != entry["sha256"]
    ]
    if damaged:
        return damaged  # without these files the samples have no names
    names = json.loads((path / "names.json").read_text(encoding="utf-8"))
    checksums = np.load(path / "checksums.npy", allow_pickle=False)
    shards = []
    for column, field, key in zip(checksums.T, row_type(manifest).names, ("shards", "image_shards"), strict=False):
        first = 0
        for shard in manifest[key]:
            rows = slice(first, first + shard["count"])
            shards.append((path, manifest, field, shard, column[rows], names[rows]))
            first = rows.stop
    with (
        tqdm(total=checksums.size, desc="verify", unit="row") as bar,
        ThreadPoolExecutor(max(1, num_workers)) as pool,
    ):
        found = pool.map(lambda shard: _damage_of_shard(*shard, bar), shards)
        return [line for lines in found for line in lines]


def _damage_of_shard(
    path: Path,
    manifest: dict[str, Any],
    field: str,
    shard: dict[str, Any],
    checksums: np.ndarray,
    names: list[str],
    bar: tqdm,
) -> list[str]:
    """The damage of one shard: a line per sample, or one line if it is not in the samples."""
    place, digest, damaged = path / Path(shard["file"]).name, hashlib.sha256(), []
    header_bytes, row_bytes = len(shard_header(manifest, field, len(names))), row_type(manifest)[field].itemsize
    try:
        with place.open("rb", buffering=CHUNK_BYTES) as file:
            digest.update(file.read(header_bytes))
            for row, (name, checksum) in enumerate(zip(names, checksums.tolist(), strict=True)):
                content = file.read(row_bytes)
                digest.update(content)
                if zlib.crc32(content) != checksum:
                    damaged.append(f"{name} (row {row} of {place.name})")
                elif field == "moments" and _has_negative_std(content, manifest):
                    damaged.append(f"{name} (row {row} of {place.name}): its std is negative, it was no moments")
                bar.update()
            digest.update(file.read())
    except OSError as error:
        return [f"{place.name} with {names[0]} to {names[-1]} cannot be read ({error.strerror})"]
    if digest.hexdigest() != shard["sha256"] and not damaged:
        return [f"{place.name}, though not in its samples: its header or its length"]
    return damaged


def _has_negative_std(content: bytes, manifest: dict[str, Any]) -> bool:
    """Whether a stored row cannot be mean and std, of one view or two: sampled latents were packed as moments."""
    channels, *size = manifest["latent_shape"]
    moments = np.frombuffer(content, manifest["dtype"]).reshape(-1, channels, *size)
    return bool((moments[:, channels // 2 :] < 0).any())


def _sha256(place: Path) -> str | None:
    """Checksum of a file, None if it cannot be read."""
    try:
        return file_sha256(place)
    except OSError:
        return None
