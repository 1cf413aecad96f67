"""Folders and zips of one file a sample with labels in a `dataset.json`: images, and the official release's latents."""

import hashlib
import io
import json
import lzma
import os
import struct
import zipfile
import zlib
from functools import cached_property
from pathlib import Path
from posixpath import splitext

import numpy as np

from errors import UserError

LABELS = "dataset.json"
# The layout of the official release records no VAE: it is the SD-VAE's, whatever wrote it.
SD_VAE = "stabilityai/sd-vae-ft-ema"
SD_SCALING_FACTOR = 0.18215
SD_REDUCTION = 8  # pixels a latent
IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # decoded within Pillow: no outside program is run
IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
MAX_CLASSES = 2**20  # far above any dataset's; a damaged label would have names made for all below it

DAMAGE = (  # all that reading a zip raises for bytes that are not what they were, or that it cannot take
    OSError,
    zipfile.BadZipFile,
    RuntimeError,
    EOFError,
    ValueError,
    struct.error,
    zlib.error,
    lzma.LZMAError,
)


class BadFile(UserError):
    """One file has no usable content, however often it is read; the others beside it may be whole."""


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

    def has(self, name: str) -> bool:
        """Whether there is a file of that name."""
        if self.path.is_dir():
            return (self.path / name).is_file()
        return name in self._opened().NameToInfo

    def read(self, name: str) -> bytes:
        """The content of one file; `UserError` names it if it is missing, unreadable or outside the store, and as
        `BadFile` if it is damaged within the zip, encrypted, or compressed in an unknown way."""
        try:
            if not self.path.is_dir():
                return self._opened().read(name)
            if ".." in Path(name).parts or Path(name).is_absolute():
                raise UserError(f"{self.path} lists {name}, which lies outside it: correct its {LABELS}")
            return (self.path / name).read_bytes()
        except UserError:
            raise
        except (KeyError, *DAMAGE) as error:
            problem = "is missing" if isinstance(error, KeyError | FileNotFoundError) else f"is damaged ({error})"
            of_system = isinstance(error, KeyError) or getattr(error, "errno", None)  # a decompressor gives no number
            raise (UserError if of_system else BadFile)(
                f"{self.path / name} {problem}: copy it again, or take it out of {LABELS}"
            ) from error


def read_labels(store: FileStore) -> tuple[dict[str, int], list[str]]:
    """Label by file name, and class names, of the `dataset.json` of an image or latent folder or zip.

    It reads {"labels": [["a/b.png", 3], ...]}, as REPA's tool writes it; "class_names": [...] is optional, by
    default the numbers. Raises `UserError` for anything else.
    """
    place = store.path / LABELS
    try:
        content = json.loads(store.read(LABELS))
        label_of = {str(name): label for name, label in content["labels"]}
        class_names = content.get("class_names")
        if len(label_of) != len(content["labels"]):
            raise ValueError("a file that is listed twice")
        if not isinstance(class_names, list | None):
            raise ValueError("class_names that are no list")
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f'{place}: expected {{"labels": [["a/b.png", 3], ...]}}, got {error!r}') from error
    for name, label in label_of.items():
        if type(label) is not int or not 0 <= label < MAX_CLASSES:
            raise UserError(f"{place}: label {label!r} of {name}, expected an integer from 0, below {MAX_CLASSES}")
    if class_names is None:
        class_names = [str(label) for label in range(max(label_of.values(), default=-1) + 1)]
    if max(label_of.values(), default=-1) >= len(class_names):
        raise UserError(f"{place}: label {max(label_of.values())}, but only {len(class_names)} class_names")
    return label_of, [str(name) for name in class_names]


def load_npy(source: Path | io.BytesIO, remedy: str, place: Path | None = None) -> np.ndarray:
    """An array from a `.npy` file, memory-mapped, or from the content of the file `place`; nothing is executed.

    Raises `UserError`, which ends with `remedy`, if it is missing or damaged.
    """
    try:
        return np.load(source, mmap_mode=None if place else "r", allow_pickle=False)
    except FileNotFoundError as error:
        raise UserError(f"{source} is missing: {remedy}") from error
    except Exception as error:  # the parser of a damaged header stumbles in many ways
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{place or source} is damaged ({reason}): {remedy}") from error


def pairing_name(name: str) -> str:
    """What a latent file and its image have in common: the path without suffix, and without the `-mean-std-` that
    REPA's tool puts in the name of latents ("00000/img-mean-std-00000042.npy" is of "00000/img00000042.png")."""
    return splitext(name)[0].replace("img-mean-std-", "img")


def read_image(store: FileStore, name: str) -> np.ndarray:
    """The image `name` of a store as (H, W, 3) uint8; `UserError` if it is unreadable or neither RGB nor greyscale."""
    from PIL import Image, UnidentifiedImageError

    content, place = store.read(name), store.path / name
    try:
        with Image.open(io.BytesIO(content), formats=IMAGE_FORMATS) as image:
            if image.mode not in ("RGB", "L"):
                raise UserError(f"{place} is in mode {image.mode}, expected RGB: run dataset_tools convert first")
            return np.array(image.convert("RGB"))
    except UserError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # SyntaxError: a broken PNG
        reason = "no known format" if isinstance(error, UnidentifiedImageError) else error
        raise UserError(f"{place} cannot be read as an image ({reason}): replace or remove it") from error


class FileLatents:
    """Latents in the layout of the official release and of REPA's tool: one `.npy` an image, in a folder or zip.

    Each file holds moments (2C, h, w); `dataset.json` lists every file with its label, and only what it lists counts.
    Files are not looked for: a missing one is reported when it is read, or by `dataset_tools verify`. Attributes and
    methods are those of `dataset.PackedLatents`, without flips; samples are sorted by name. `images` is the folder or
    zip of the images, if there is one: each of the name of its latents, see `pairing_name`, and all of one format.

    Raises `UserError` if `dataset.json` is missing or not of this form, or the first file is no moments.
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
        if len(first.shape) != 3 or len(first) % 2 or first.dtype.kind != "f":
            raise UserError(
                f"{self.path / self.names[0]} holds {first.shape} {first.dtype}, expected moments (2C, h, w), mean and "
                "std stacked: encode again"
            )
        listed = json.dumps([self.names, self.labels.tolist()]).encode()
        self.manifest = {
            "format": "files",
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
        """Moments (2C, h, w) of one sample; `UserError` names a file that is missing, damaged or unlike the first."""
        moments = self._load(self.names[index])
        if moments.shape != self.latent_shape or moments.dtype != self.dtype:
            raise UserError(
                f"{self.path / self.names[index]} holds {moments.shape} {moments.dtype}, but {self.names[0]} "
                f"{self.latent_shape} {self.dtype}: bring all to one size and type"
            )
        return moments

    def gather(self, indices: np.ndarray, mirrored: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Moments (B, 2C, h, w) and labels (B,) of samples `indices` (B,); there are no mirror images."""
        if mirrored is not None and mirrored.any():
            raise ValueError(f"{self.path} has no moments of mirror images")
        return np.stack([self.read(index) for index in indices]), self.labels[indices]

    @cached_property
    def _image_suffix(self) -> str:
        """Of all images: that of the first."""
        stem = pairing_name(self.names[0])
        for suffix in (*IMAGE_SUFFIXES, *map(str.upper, IMAGE_SUFFIXES)):
            if self.images.has(stem + suffix):
                return suffix
        raise UserError(
            f"{self.images.path} has no image {stem}, which {self.path / self.names[0]} is of: bring images and "
            "latents to the same names"
        )

    def gather_images(self, indices: np.ndarray, mirrored: np.ndarray | None = None) -> np.ndarray:
        """Pixels (B, H, W, 3) uint8 of samples `indices` (B,); `UserError` if one is missing, or of another size."""
        if self.images is None:
            raise UserError(f"{self.path} has no images beside it: expected a folder images, or images.zip")
        side, images = self.manifest["resolution"], []
        for index in indices:
            name = pairing_name(self.names[index]) + self._image_suffix
            images.append(read_image(self.images, name))
            if images[-1].shape != (side, side, 3):
                height, width = images[-1].shape[:2]
                raise UserError(
                    f"{self.images.path / name} is {width} x {height} pixels, but its latents are of {side} x {side}: "
                    "give the images that were encoded"
                )
        return np.stack(images)
