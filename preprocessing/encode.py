"""Images -> packed VAE moments."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from dataset import MANIFEST, read_manifest
from errors import UserError
from models.vae import encode_moments, load_vae
from preprocessing.images import SourceImages, list_images
from preprocessing.packed_writer import packed_manifest, write_packed

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


class _ImageFiles(Dataset):
    """Batches of images, uint8 (B, resolution, resolution, 3)."""

    def __init__(self, images: SourceImages, resolution: int) -> None:
        self.images, self.resolution = images, resolution

    def __len__(self) -> int:
        return len(self.images.names)

    def __getitems__(self, indices: list[int]) -> torch.Tensor | UserError:
        """A batch, or else the mistake: raised in a worker it would arrive wrapped in a traceback."""
        try:
            return torch.stack([self._read(i) for i in indices])
        except UserError as error:
            return error

    def _read(self, index: int) -> torch.Tensor:
        pixels = self.images.read(index)
        if pixels.shape[:2] != (self.resolution, self.resolution):
            raise UserError(
                f"{self.images.store.path / self.images.names[index]} is {pixels.shape[1]} x {pixels.shape[0]} pixels, "
                f"expected {self.resolution} x {self.resolution}, the height of the first image: bring all to one "
                "square size"
            )
        return torch.from_numpy(pixels)


def _encoded(vae: "AutoencoderKL", loader: DataLoader) -> Iterator[np.ndarray]:
    """Moments (B, 2C, h, w) float32 of each batch, under a progress bar."""
    with tqdm(total=len(loader.dataset), desc="encode", unit="img") as bar:
        for pixels in loader:
            if isinstance(pixels, UserError):
                raise pixels
            yield encode_moments(vae, pixels).cpu().numpy()
            bar.update(len(pixels))


def _as_it_is(batch: torch.Tensor | UserError) -> torch.Tensor | UserError:
    return batch


def encode(
    source: str | Path,
    dest: str | Path,
    vae_name: str,
    dtype: str = "float16",
    batch_size: int = 64,
    device: str = "cpu",
    num_workers: int = 2,
    shard_rows: int | None = None,
) -> None:
    """Encode the images below `source` to packed latents in `dest`; do nothing if they are there already.

    The VAE runs in float32 whatever the stored `dtype`. Raises `UserError` for a source, a VAE or images that
    do not fit, and if `dest` holds a dataset made of something else.
    """
    images = list_images(source)
    resolution = images.read(0).shape[0]
    vae = load_vae(vae_name, device=device, dtype=torch.float32)
    reduction = 2 ** (len(vae.config.block_out_channels) - 1)  # 8 for the SD-VAE
    if resolution % reduction:
        raise UserError(f"images are {resolution} pixels high, {vae_name} needs a multiple of {reduction}: resize them")
    manifest = packed_manifest(
        images.names,
        images.labels,
        images.class_names,
        resolution=resolution,
        latent_shape=(2 * vae.config.latent_channels, resolution // reduction, resolution // reduction),
        dtype=dtype,
        vae=vae_name,
        vae_sha256=weights_sha256(vae),
        scaling_factor=vae.config.scaling_factor,
    )
    if (Path(dest) / MANIFEST).is_file():
        _check_same(manifest, read_manifest(dest), dest)
        print(f"{dest} is complete ({len(images.names)} samples): nothing to do")
        return
    loader = DataLoader(
        _ImageFiles(images, resolution),
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=_as_it_is,
    )
    write_packed(dest, manifest, _encoded(vae, loader), images.names, images.labels, shard_rows)
    print(f"{dest}: {len(images.names)} samples in {len(images.class_names)} classes")


def weights_sha256(vae: "AutoencoderKL") -> str:
    """Checksum of a VAE's float32 weights: tells VAEs apart whatever path they were loaded from."""
    sha256 = hashlib.sha256()
    for name, tensor in sorted(vae.state_dict().items()):
        sha256.update(name.encode())
        sha256.update(tensor.float().cpu().contiguous().numpy().tobytes())
    return sha256.hexdigest()


def _check_same(wanted: dict[str, Any], found: dict[str, Any], dest: str | Path) -> None:
    """Raise `UserError` if the finished dataset in `dest` is not the one asked for."""
    for key in wanted:
        if key != "vae" and found.get(key) != wanted[key]:  # a VAE's path may differ: its checksum decides
            raise UserError(
                f"{dest} holds a complete dataset, but with {key} {str(found.get(key))[:80]}, where this "
                f"command makes {str(wanted[key])[:80]}: delete it or change --dest"
            )
