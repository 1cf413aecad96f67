"""The `.npz` of samples, written in place: no second copy, and memory does not grow with the number of images.

In an uncompressed zip the place of each image of `arr_0` is known before any image is made. So any number of processes
write their images there, in any order:

    NAME.npz.part         the unfinished zip, its images at their final places
    NAME.npz.progress     one line of JSON, what is being made; then one byte per block of images, 1 if it is done

To finish it, the images are read once for their checksum, the labels and the zip's directory are added, and the file
is renamed. Dates are fixed: the same images make the same bytes. Images are written by `pwrite`, as pages of a memory
map would count as memory.
"""

import io
import json
import math
import os
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from common.files import real_place, written_aside, zip_entry

READ_AT_ONCE = 1 << 24  # bytes


class SampleFile:
    """The file of samples at `npz`, unfinished or complete. The constructor opens nothing.

    Args:
        npz: path of the complete file.
        shape: of `arr_0`, (N, H, W, 3), uint8.
        block_size: images per block; progress is recorded per block.
    """

    def __init__(self, npz: Path, shape: Sequence[int], block_size: int) -> None:
        self.npz, self.shape = real_place(npz), tuple(shape)
        self.part, self.progress = (self.npz.with_name(f"{self.npz.name}.{end}") for end in ("part", "progress"))
        self.block_size, self.blocks = block_size, math.ceil(shape[0] / block_size)
        self.image_bytes = math.prod(shape[1:])
        self.npy_header = npy_header(self.shape)
        self.offset = len(self._zip_info(0).FileHeader()) + len(self.npy_header)  # of the first image
        self.end = self.offset + self.shape[0] * self.image_bytes  # of the last
        self._path, self._file = self.part, None

    def unfinished_record(self) -> dict[str, Any] | None:
        """The record that `begin` was given for the unfinished file of this name; None if there is no such file."""
        try:
            record = json.loads(self._read_progress()[0])
        except (OSError, ValueError):
            return None
        return record if self.part.is_file() and isinstance(record, dict) else None

    def is_truncated(self) -> bool:
        """Whether the unfinished file is too short, so that images marked as done may be lost."""
        return self.part.stat().st_size < self.end

    def begin(self, record: dict[str, Any]) -> None:
        """Make an empty unfinished file, replacing any other. On one process only, while no other has it open.

        Args:
            record: what is being made; `unfinished_record` returns it.

        Raises:
            UserError: if the disk does not take it; then nothing of it remains.
        """
        self.progress.unlink(missing_ok=True)
        try:
            with self.part.open("wb") as file:
                file.write(self._zip_info(0).FileHeader() + self.npy_header)
                file.truncate(self.end)
            with written_aside(self.progress) as aside:
                aside.write_bytes(json.dumps(record).encode() + b"\n" + bytes(self.blocks))
        except OSError as error:
            self.part.unlink(missing_ok=True)
            raise UserError(f"cannot write {self.part}: {error.strerror}; choose another --sample-dir") from error

    def missing(self) -> list[int]:
        """The blocks that are not done."""
        done = self._read_progress()[1]
        return [block for block in range(self.blocks) if done[block : block + 1] != b"\x01"]

    def indices(self, blocks: Iterable[int]) -> list[int]:
        """The image numbers of these blocks."""
        count, size = self.shape[0], self.block_size
        return [i for block in blocks for i in range(block * size, min((block + 1) * size, count))]

    def write(self, indices: Sequence[int], images: np.ndarray) -> None:
        """Write images to their places and mark their blocks as done, after the images are on the disk.

        Args:
            indices: the image numbers, (n,); they must fill their blocks.
            images: uint8 (n, H, W, 3).

        Raises:
            UserError: if the disk does not take them.
        """
        try:
            file = self._open()
            for index, image in zip(indices, np.ascontiguousarray(images), strict=True):
                write_all(file, memoryview(image).cast("B"), self.offset + int(index) * self.image_bytes)
            os.fsync(file)
            marks = os.open(self.progress, os.O_WRONLY)
            try:
                first = len(self._read_progress()[0])
                for block in sorted({int(index) // self.block_size for index in indices}):
                    write_all(marks, b"\x01", first + block)
            finally:
                os.close(marks)
        except OSError as error:
            raise UserError(
                f"cannot write {self.part}: {error.strerror}; what is done is kept, the same command continues"
            ) from error

    def read(self, index: int) -> np.ndarray:
        """One image, uint8 (H, W, 3): written to the unfinished file before or, after `use_finished`, any."""
        if not 0 <= index < self.shape[0]:
            raise IndexError(index)
        data = os.pread(self._open(), self.image_bytes, self.offset + int(index) * self.image_bytes)
        return np.frombuffer(data, np.uint8).reshape(self.shape[1:])

    def complete(self, labels: np.ndarray) -> None:
        """Complete the `.npz` after all blocks are done; `publish` then gives it its name. On one process only.

        After a kill it can be called again.

        Args:
            labels: stored as `arr_1`, (N, ...).

        Raises:
            UserError: if the disk does not take it.
        """
        self.close()
        try:
            with self.part.open("r+b") as file:
                file.truncate(self.end)
                header = len(self._zip_info(0).FileHeader())
                file.seek(header)
                checksum = 0
                while data := file.read(READ_AT_ONCE):
                    checksum = zlib.crc32(data, checksum)
                images = self._zip_info(checksum)
                file.seek(0)
                file.write(images.FileHeader())
                file.seek(self.end)
                with zipfile.ZipFile(file, "w") as archive:
                    archive.filelist.append(images)
                    member = io.BytesIO()
                    np.lib.format.write_array(member, labels, allow_pickle=False)
                    archive.writestr(zip_entry("arr_1.npy", 0, 0, 0), member.getvalue())  # sets the numbers itself
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(f"cannot finish {self.part}: {error.strerror}; the same command continues") from error

    def publish(self) -> None:
        """Give the complete file its name. On one process only."""
        self.part.replace(self.npz)
        self.progress.unlink(missing_ok=True)

    def use_finished(self) -> None:
        """Let `read` read the finished file from here on."""
        self.close()
        self._path = self.npz

    def close(self) -> None:
        """Close the file that `write` and `read` opened; both may be called again."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _open(self) -> int:
        if self._file is None:
            self._file = os.open(self._path, os.O_RDWR if self._path == self.part else os.O_RDONLY)
        return self._file

    def _read_progress(self) -> tuple[bytes, bytes]:
        """The line of the record, with its line break, and one byte per block."""
        head, newline, done = self.progress.read_bytes().partition(b"\n")
        return head + newline, done

    def _zip_info(self, checksum: int) -> zipfile.ZipInfo:
        return zip_entry("arr_0.npy", 0, len(self.npy_header) + self.shape[0] * self.image_bytes, checksum)


def npy_header(shape: tuple[int, ...]) -> bytes:
    """The header of an `.npy` file of a uint8 array."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return header.getvalue()


def write_all(file: int, data: bytes | memoryview, offset: int) -> None:
    """`pwrite` until all of `data` is written: one call may write less."""
    while data:
        written = os.pwrite(file, data, offset)
        data, offset = data[written:], offset + written
