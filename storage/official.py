"""The layout of the official release and of REPA's tool: one `.npy` of moments per image, labels in `dataset.json`."""

import hashlib
import io
import json
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from posixpath import splitext

import numpy as np

from common.errors import UserError
from common.sd_vae import SD_CHANNELS, SD_REDUCTION, SD_SCALING_FACTOR, SD_VAE
from storage.file_store import LABELS, FileStore, load_npy, read_image, read_labels
from storage.image_files import IMAGE_SUFFIXES
from storage.packed import FILES

# The layout of the official release records no VAE: it is the SD-VAE's, whatever wrote it.
MOMENTS = 2 * SD_CHANNELS  # channels of a file: mean and std, stacked


def pairing_name(name: str) -> str:
    """The part of its path that a latent file shares with its image: without suffix, and without the `-mean-std-` that
    REPA's tool adds ("00000/img-mean-std-00000042.npy" belongs to "00000/img00000042.png")."""
    return splitext(name)[0].replace("img-mean-std-", "img")


def image_folder(latents: Iterable[str], images: Iterable[str]) -> str:
    """The folder, such as `images/`, below which images have the names of their latents (zips often have one folder at
    their top); `""` if the names agree without one, or not at all."""
    wanted = min(map(pairing_name, latents))
    first = min(map(pairing_name, images), default="")
    return first.removesuffix(wanted) if first.endswith(f"/{wanted}") else ""


class FileLatents:
    """Latents in the layout of the official release and of REPA's tool: one `.npy` per image, in a folder or zip.

    Each file holds moments (8, h, w) of the SD-VAE. `dataset.json` lists the files with their labels; other files are
    ignored. A listed file that is missing is reported when it is read, or by `dataset_tools verify`. Attributes and
    methods are those of `PackedLatents`, without flips; samples are sorted by name.

    Args:
        path: the folder or zip.
        images: folder or zip of the images, if any, all of one format; each is named as its latents, see
            `pairing_name`.

    Raises:
        UserError: if `dataset.json` is missing or has another form, or the first file holds no moments.
    """

    has_flips = False
    scaling_factor = SD_SCALING_FACTOR

    def __init__(self, path: str | Path, images: str | Path | None = None) -> None:
        self.store = FileStore(path)
        self.images = None if images is None else FileStore(images)
        self.has_images = images is not None
        self.path = self.store.path
        label_of, self.class_names = read_labels(self.store)
        self.names = sorted(label_of)
        self.num_classes = len(self.class_names)
        self.labels = np.array([label_of[name] for name in self.names], np.int64)
        if not self.names or not self.names[0].endswith(".npy"):
            found = self.names[0] if self.names else "nothing"
            raise UserError(f"{self.path / LABELS} lists {found}, expected .npy files of moments: encode images first")
        first = self._load(self.names[0])
        self.latent_shape, self.dtype = first.shape, first.dtype
        if len(first.shape) != 3 or len(first) != MOMENTS or first.dtype.kind != "f":
            drawn = " (latents already drawn?)" if len(first.shape) == 3 and len(first) == SD_CHANNELS else ""
            raise UserError(
                f"{self.path / self.names[0]} holds {first.shape} {first.dtype}{drawn}, expected moments "
                f"({MOMENTS}, h, w) of the SD-VAE, mean and std stacked: encode the images again"
            )
        self.read(0)
        listed = json.dumps([self.names, self.labels.tolist()]).encode()
        self.manifest = {
            "format": FILES,
            "count": len(self.names),
            "num_classes": self.num_classes,
            "class_names": self.class_names,
            "resolution": SD_REDUCTION * first.shape[1],
            "latent_shape": list(first.shape),
            "dtype": str(first.dtype),
            "vae": SD_VAE,
            "vae_sha256": None,
            "scaling_factor": self.scaling_factor,
            "labels": {"file": LABELS, "sha256": hashlib.sha256(listed).hexdigest()},
        }

    def __len__(self) -> int:
        return len(self.names)

    def __reduce__(self) -> tuple:
        return FileLatents, (self.path, self.images and self.images.path)

    @cached_property
    def class_counts(self) -> np.ndarray:
        """How many samples each class has, (num_classes,) int64."""
        return np.bincount(self.labels, minlength=self.num_classes)

    def _load(self, name: str) -> np.ndarray:
        content = io.BytesIO(self.store.read(name))
        return load_npy(content, "copy it again or encode it again", self.path / name)

    def read(self, index: int) -> np.ndarray:
        """Moments (8, h, w) of one sample.

        Raises:
            UserError: for a file that is missing, damaged, of another form than the first, or with a negative std.
        """
        moments = self._load(self.names[index])
        if moments.shape != self.latent_shape or moments.dtype != self.dtype:
            raise UserError(
                f"{self.path / self.names[index]} holds {moments.shape} {moments.dtype}, but {self.names[0]} "
                f"{self.latent_shape} {self.dtype}: bring all to one size and type"
            )
        if (moments[SD_CHANNELS:] < 0).any():
            raise UserError(
                f"{self.path / self.names[index]} has a negative std in its last {SD_CHANNELS} channels, expected "
                f"moments ({MOMENTS}, h, w) of the SD-VAE, mean and std stacked: encode the images again"
            )
        return moments

    def gather(self, indices: np.ndarray, mirrored: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Moments (B, 2C, h, w) and labels (B,) of samples `indices` (B,); `ValueError` for mirror images."""
        if mirrored is not None and mirrored.any():
            raise ValueError(f"{self.path} has no moments of mirror images")
        return np.stack([self.read(index) for index in indices]), self.labels[indices]

    @cached_property
    def _image_form(self) -> tuple[str, str]:
        """What precedes and follows the `pairing_name` in all images' names, as in the first image's."""
        stem, suffixes = pairing_name(self.names[0]), (*IMAGE_SUFFIXES, *map(str.upper, IMAGE_SUFFIXES))
        for suffix in suffixes:
            if self.images.has(stem + suffix):
                return "", suffix
        images = [name for name in self.images.names() if name.endswith(suffixes)]
        if folder := image_folder(self.names, images):
            return folder, next(suffix for suffix in suffixes if self.images.has(folder + stem + suffix))
        raise UserError(
            f"{self.images.path} has no image {stem}, which {self.path / self.names[0]} is of: bring images and "
            "latents to the same names"
        )

    def gather_images(self, indices: np.ndarray, mirrored: np.ndarray | None = None) -> np.ndarray:
        """Pixels (B, H, W, 3) uint8 of samples `indices` (B,); `UserError` if one is missing, or of another size."""
        if self.images is None:
            raise UserError(f"{self.path} has no images beside it: expected a folder images, or images.zip")
        folder, suffix = self._image_form
        names = [folder + pairing_name(self.names[index]) + suffix for index in indices]
        return np.stack([read_encoded_image(self.images, name, self.manifest["resolution"]) for name in names])


def read_encoded_image(store: FileStore, name: str, side: int) -> np.ndarray:
    """The image, (side, side, 3) uint8, of latents that are of `side` pixels; `UserError` if it has another size."""
    return read_image(store, name, side, f"but its latents are of {side} x {side}: give the images that were encoded")
