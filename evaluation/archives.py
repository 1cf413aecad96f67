"""Batches of images, read one by one: from an `.npz` (ADM's format: `arr_0`, uint8 NHWC), an `.npy` or a folder of
image files."""

import functools
import hashlib
import math
import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np

from common.errors import UserError, first_line
from common.files import file_sha256
from storage.file_store import FileStore
from storage.image_files import IMAGE_SUFFIXES, read_rgb, upright_size

IMAGES = "arr_0.npy"
# What reading a damaged archive raises: bad structure or checksum, bad deflate data, early end, bad header.
DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError)


class ImageSource:
    """Images of one size, read batch by batch.

    Attributes:
        path: the file or folder.
        shape: (N, H, W, 3), or None for a reference that holds only statistics.
        statistics: those of ADM's `mu`, `sigma`, `mu_s`, `sigma_s` that are stored beside the images, float64.
    """

    path: Path
    shape: tuple[int, int, int, int] | None
    statistics: dict[str, np.ndarray]

    def __len__(self) -> int:
        return self.shape[0] if self.shape else 0

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width) in pixels; None without images."""
        return self.shape[1:3] if self.shape else None

    @functools.cached_property
    def sha256(self) -> str:
        """SHA-256 of the file, computed once, as it may hold gigabytes."""
        return file_sha256(self.path)

    def batches(self, batch_size: int, first: int = 0, step: int = 1) -> Iterator[np.ndarray]:
        """Yield every `step`-th batch from number `first` on, in order.

        Yields:
            uint8 (n, H, W, 3); n is `batch_size`, or less for the last batch.
        """
        for start in range(first * batch_size, len(self), step * batch_size):
            yield self._read(start, min(start + batch_size, len(self)))

    def _read(self, start: int, stop: int) -> np.ndarray:
        raise NotImplementedError


def open_images(path: str | Path) -> ImageSource:
    """The images at a path: a folder, an `.npy`, or else an `.npz`. Raises `UserError` if they cannot be used."""
    path = Path(path)
    if path.is_dir():
        return ImageFolder(path)
    return ImageArray(path) if path.suffix.lower() == ".npy" else ImageArchive(path)


class ImageArchive(ImageSource):
    """The images of an `.npz`, and the reference statistics that ADM stores beside them.

    Opening reads headers only; `batches` streams. Nothing is unpickled.

    Attributes:
        path: the file.
        shape: (N, H, W, 3) of `arr_0`, or None for a reference that holds only statistics.
        statistics: the members among `mu`, `sigma` (pool features) and `mu_s`, `sigma_s` (spatial features),
            float64.

    Raises:
        UserError: if the file is missing or no complete `.npz`, or `arr_0` is missing, not uint8 or not (N, H, W, 3).
    """

    def __init__(self, path: str | Path) -> None:
        self.path = _existing_file(path, "an .npz of images")
        if self.path.suffix.lower() not in ("", ".npz") and not zipfile.is_zipfile(self.path):
            raise UserError(f"{self.path}: no .npz; expected an .npz or .npy of images, or a folder of image files")
        try:
            with zipfile.ZipFile(self.path) as archive:
                members = archive.namelist()
                self.shape = self._image_shape(archive) if IMAGES in members else None
            with np.load(self.path, allow_pickle=False) as arrays:
                self.statistics = {
                    name: arrays[name].astype(np.float64)
                    for name in ("mu", "sigma", "mu_s", "sigma_s")
                    if name in arrays.files
                }
        except UserError:
            raise
        except DAMAGE as error:
            raise UserError(self._damaged(error)) from error
        for mean, covariance in (("mu", "sigma"), ("mu_s", "sigma_s")):
            if (mean in self.statistics) != (covariance in self.statistics):
                raise UserError(f"{self.path}: has only one of {mean} and {covariance}; expected both or neither")
        if self.shape is None and not {"mu", "sigma"} <= self.statistics.keys():
            found = ", ".join(Path(member).stem for member in members[:5]) or "nothing"
            found += f" and {len(members) - 5} more" if len(members) > 5 else ""
            files = any(member.lower().endswith(IMAGE_SUFFIXES) for member in members)
            remedy = "unpack it and give the folder" if files else "save the images with np.savez(file, arr_0=images)"
            raise UserError(
                f"{self.path}: holds no images: expected arr_0 (uint8, N x H x W x 3), found {found}; {remedy}"
            )

    def batches(self, batch_size: int, first: int = 0, step: int = 1) -> Iterator[np.ndarray]:
        """As `ImageSource.batches`. The whole file is read, whatever is yielded, to verify its checksum."""
        image_bytes = math.prod(self.shape[1:])
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(IMAGES) as stream:
                _read_header(stream)
                for number, start in enumerate(range(0, len(self), batch_size)):
                    count = min(batch_size, len(self) - start)
                    data = stream.read(count * image_bytes)
                    if number % step == first:
                        yield np.frombuffer(data, np.uint8).reshape(count, *self.shape[1:])
        except DAMAGE as error:
            raise UserError(self._damaged(error)) from error

    def _image_shape(self, archive: zipfile.ZipFile) -> tuple[int, int, int, int]:
        with archive.open(IMAGES) as stream:
            shape, fortran_order, dtype = _read_header(stream)
            header_bytes = stream.tell()
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran_order or 0 in shape:
            order = ", in Fortran order" if fortran_order else ""
            raise UserError(
                f"{self.path}: arr_0 is {dtype} of shape {shape}{order}; "
                "expected uint8 of shape (N, H, W, 3), C order, values 0..255"
            )
        if archive.getinfo(IMAGES).file_size != header_bytes + math.prod(shape):
            raise UserError(f"{self.path}: arr_0 is shorter or longer than its shape {shape}; write the file again")
        return shape

    def _damaged(self, error: Exception) -> str:
        return f"{self.path}: not a complete .npz ({first_line(error)}); write or copy it again"


class ImageArray(ImageSource):
    """The images of an `.npy`, uint8 (N, H, W, 3), memory-mapped.

    Raises:
        UserError: if the file is missing, damaged, or holds anything else.
    """

    statistics: dict[str, np.ndarray] = {}  # noqa: RUF012 - it stores none

    def __init__(self, path: str | Path) -> None:
        self.path = _existing_file(path, "an .npy of images")
        try:
            self._images = np.load(self.path, mmap_mode="r", allow_pickle=False)
        except (*DAMAGE, OSError) as error:
            raise UserError(
                f"{self.path}: not a complete .npy ({first_line(error)}); write or copy it again"
            ) from error
        if not isinstance(self._images, np.ndarray):
            raise UserError(f"{self.path}: holds several arrays; name it .npz")
        self.shape = self._images.shape
        contiguous = self._images.flags.c_contiguous
        if self._images.dtype != np.uint8 or len(self.shape) != 4 or self.shape[3] != 3 or 0 in self.shape:
            raise UserError(
                f"{self.path}: {self._images.dtype} of shape {self.shape}; "
                "expected uint8 of shape (N, H, W, 3), values 0..255"
            )
        if not contiguous:
            raise UserError(f"{self.path}: in Fortran order; expected C order: write np.ascontiguousarray(images)")

    def _read(self, start: int, stop: int) -> np.ndarray:
        return np.array(self._images[start:stop])


class ImageFolder(ImageSource):
    """The image files of a folder and the folders in it, sorted by path, all of one size, decoded by `read_rgb`.

    Opening reads all headers. Hidden and system files are passed over, and files without an image's suffix.

    Raises:
        UserError: for a folder that cannot be read or has no image, for different sizes, and, here or in `batches`,
            for an image that cannot be read.
    """

    statistics: dict[str, np.ndarray] = {}  # noqa: RUF012 - it stores none

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._names = sorted(name for name in FileStore(path).names() if name.lower().endswith(IMAGE_SUFFIXES))
        if not self._names:
            raise UserError(f"{self.path}: no images in this folder; expected {', '.join(IMAGE_SUFFIXES)} files")
        with ThreadPoolExecutor() as threads:
            sizes = list(threads.map(self._size_of, self._names))
        other = next((i for i, size in enumerate(sizes) if size != sizes[0]), None)
        if other is not None:
            one, two = (f"{self._names[i]} is {sizes[i][1]} x {sizes[i][0]} pixels" for i in (0, other))
            raise UserError(
                f"{self.path}: images of different sizes: {one}, {two}; bring all to one size, for example with "
                "dataset_tools convert"
            )
        self.shape = (len(self._names), *sizes[0], 3)

    @functools.cached_property
    def sha256(self) -> str:
        """SHA-256 of the checksums of all files, in order."""
        with ThreadPoolExecutor() as threads:
            sums = threads.map(lambda name: file_sha256(self.path / name), self._names)
            return hashlib.sha256("".join(sums).encode()).hexdigest()

    def _read(self, start: int, stop: int) -> np.ndarray:
        with ThreadPoolExecutor() as threads:
            return np.stack(list(threads.map(self._read_image, self._names[start:stop])))

    def _size_of(self, name: str) -> tuple[int, int]:
        """(height, width) of an image after its rotation, by its header."""
        with self._reading(name) as path:
            return upright_size(path)

    def _read_image(self, name: str) -> np.ndarray:
        """(H, W, 3) uint8."""
        with self._reading(name) as path:
            return np.array(read_rgb(path.read_bytes())[0])

    @contextmanager
    def _reading(self, name: str) -> Iterator[Path]:
        """Around the reading of one image: any error of its decoder becomes a `UserError` that names the image."""
        path = self.path / name
        try:
            yield path
        except MemoryError:
            raise
        except Exception as error:
            reason = "no known format" if type(error).__name__ == "UnidentifiedImageError" else first_line(error)
            raise UserError(f"{path}: cannot be read as an image ({reason}); replace or remove it") from error


def _existing_file(path: str | Path, expected: str) -> Path:
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected {expected}")
    return path


def _read_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Read an `.npy` header, leaving the stream at the first element: (shape, fortran_order, dtype)."""
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(stream)
    return np.lib.format.read_array_header_2_0(stream)
