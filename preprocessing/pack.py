"""One latent file per image -> packed latents, optionally with the images they were made of."""

from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.errors import UserError
from common.files import only_writer
from common.sd_vae import SD_VAE
from models.autoencoder import portable_name
from preprocessing.images import SourceImages, list_images, warn_of_empty_classes
from preprocessing.packed_writer import PackedJob, packed_manifest
from preprocessing.source_identity import source_sha256
from preprocessing.workers import worker_results
from storage.file_store import LABELS
from storage.official import FileLatents, image_folder, pairing_name, read_encoded_image


def pack(
    source: str | Path,
    dest: str | Path,
    vae_name: str = SD_VAE,
    dtype: str = "float16",
    images: str | Path | None = None,
    num_workers: int = 2,
    shard_rows: int | None = None,
) -> None:
    """Pack latents of one `.npy` per image, in the order of the files' names, or continue that work.

    Args:
        source: folder or zip of the latents.
        dest: folder to make.
        vae_name: recorded as the VAE that made them, which must be an SD-VAE.
        dtype: of the stored moments, "float16" or "float32".
        images: folder or zip of images to store too, paired with the latents by `pairing_name`.
        num_workers: processes that read files.
        shard_rows: samples per shard (default: 2 GiB of them).

    Raises:
        UserError: if files, labels and images do not match one to one, for a damaged file, and, for what concerns
            `dest`, as `encode` does.
    """
    with only_writer(dest):
        latents = FileLatents(source)
        check_files(latents)
        warn_of_empty_classes(latents.labels, latents.class_names)
        paired = None if images is None else _paired_images(latents, list_images(images))
        manifest = packed_manifest(
            latents.names,
            latents.labels,
            latents.class_names,
            resolution=latents.manifest["resolution"],
            latent_shape=latents.latent_shape,
            dtype=dtype,
            vae=portable_name(vae_name),
            vae_sha256=None,
            scaling_factor=latents.scaling_factor,
            images=paired is not None,
            source_sha256=source_sha256(
                *((files.store, files.names) for files in (latents, paired) if files is not None)
            ),
        )
        job = PackedJob.begin(dest, manifest, latents.names, latents.labels)
        if job is None:
            print(f"{dest} is complete ({len(latents)} samples): nothing to do")
            return
        left = job.unwritten_units()
        with (
            worker_results(_UnitWriter(job, latents, paired), left, num_workers) as results,
            tqdm(total=sum(len(job.rows_of(unit)) for unit in left), desc="pack", unit="img") as bar,
        ):
            for done in results:
                bar.update(done)
        job.finish(shard_rows)
        print(f"{dest}: {len(latents)} samples in {len(latents.class_names)} classes")


def check_files(latents: FileLatents) -> None:
    """Compare the existing files with those in `dataset.json`; `UserError` names the first that only one has."""
    there = {name for name in latents.store.names() if name.endswith(".npy")}
    for name in sorted(there ^ set(latents.names))[:1]:
        problem = "lists no label for" if name in there else "lists a missing file,"
        raise UserError(f"{latents.path / LABELS} {problem} {name}: make files and labels agree")


def _paired_images(latents: FileLatents, images: SourceImages) -> SourceImages:
    """The images in the order of the latents, by name; `UserError` if one has no counterpart, or labels disagree."""
    folder = image_folder(latents.names, images.names)
    index_of = {pairing_name(name).removeprefix(folder): index for index, name in enumerate(images.names)}
    if len(index_of) < len(images.names):
        raise UserError(f"{images.store.path} has several images of one name: they cannot be paired by name")
    for name in sorted({pairing_name(name) for name in latents.names} ^ index_of.keys())[:1]:
        having, lacking = (images.store, latents.store) if name in index_of else (latents.store, images.store)
        raise UserError(f"{having.path} has {name}, {lacking.path} has not: images and latents must be the same")
    order = np.array([index_of[pairing_name(name)] for name in latents.names])
    for row in np.flatnonzero(images.labels[order] != latents.labels)[:1]:
        raise UserError(
            f"{latents.names[row]} has label {latents.labels[row]} in {latents.path}, but {images.labels[order[row]]} "
            f"in {images.store.path}: make the labels agree"
        )
    return images._replace(names=[images.names[index] for index in order], labels=latents.labels)


class _UnitWriter:
    """Reads and writes one unit of the job, in a worker process; returns the number of its samples, or an error."""

    def __init__(self, job: PackedJob, latents: FileLatents, images: SourceImages | None) -> None:
        self.job, self.latents, self.images = job, latents, images

    def __call__(self, unit: int) -> int | UserError:
        rows, images = self.job.rows_of(unit), None
        try:
            if self.images is not None:
                side = self.job.manifest["resolution"]
                names = [self.images.names[row] for row in rows]
                images = np.stack([read_encoded_image(self.images.store, name, side) for name in names])
            self.job.write_unit(unit, self.latents.gather(np.array(rows))[0], images)
        except UserError as error:  # raised, it would count as a failure of the worker
            return error
        return len(rows)
