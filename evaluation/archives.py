"""Batches of images out of an `.npz` (ADM's format: `arr_0`, uint8 NHWC) without holding it in memory."""

import functools
import math
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

from errors import UserError
from files import file_sha256

IMAGES = "arr_0.npy"
# What reading a damaged archive raises: bad structure or checksum, bad deflate data, early end, bad header.
DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError)


class ImageArchive:
    """The images of an `.npz`, and the reference statistics that ADM stores beside them.

    Opening reads headers only; `batches` streams. Nothing is unpickled.

    Attributes:
        path: the file.
        shape: (N, H, W, 3) of `arr_0`, or None for a reference that holds statistics alone.
        statistics: the members among `mu`, `sigma` (pool features) and `mu_s`, `sigma_s` (spatial features),
            float64.

    Raises `UserError` when the file is missing, is no complete `.npz`, or `arr_0` is absent, not uint8 or not
    (N, H, W, 3).
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"{self.path}: no such file; expected an .npz of images")
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
            found = ", ".join(Path(member).stem for member in members) or "nothing"
            raise UserError(
                f"{self.path}: holds no images: expected arr_0 (uint8, N x H x W x 3), found {found}; "
                "save the images with np.savez(file, arr_0=images)"
            )

    def __len__(self) -> int:
        return self.shape[0] if self.shape else 0

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width) in pixels, None without images."""
        return self.shape[1:3] if self.shape else None

    @functools.cached_property
    def sha256(self) -> str:
        """SHA-256 of the file, computed once: it may hold gigabytes."""
        return file_sha256(self.path)

    def batches(self, batch_size: int, first: int = 0, step: int = 1) -> Iterator[np.ndarray]:
        """Yield every `step`-th batch from number `first` on, in file order, uint8 (n, H, W, 3).

        n is batch_size but for the very last batch. The whole file is read whatever is yielded, so that its checksum
        is verified.
        """
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
        return f"{self.path}: not a complete .npz ({str(error) or type(error).__name__}); write or copy it again"


def _read_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Read an `.npy` header, leaving the stream at the first element: (shape, fortran_order, dtype)."""
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(stream)
    return np.lib.format.read_array_header_2_0(stream)
