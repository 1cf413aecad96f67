"""A zip that is written in steps, each of which survives a kill."""

import os
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

from common.errors import UserError


class Entry(NamedTuple):
    """A stored file of a zip that has no directory yet."""

    name: str
    first: int  # byte of its local header
    size: int
    crc: int

    def info(self) -> zipfile.ZipInfo:
        """As the zip's directory tells it; the date is fixed, so that the same files make the same zip."""
        info = zipfile.ZipInfo(self.name)
        info.header_offset, info.CRC = self.first, self.crc
        info.file_size = info.compress_size = self.size
        info.external_attr = 0o644 << 16
        return info

    @property
    def end(self) -> int:
        return self.first + len(self.info().FileHeader()) + self.size


class GrowingZip:
    """Zip file `path` without its directory, cut back to `entries`, to which more are added.

    What `add` returns is to be kept by the caller until `finish`, on disk if the zip is to be continued after a
    kill. Raises `UserError` if the file is shorter than its entries; all else that fails raises `OSError`.
    """

    def __init__(self, path: Path, entries: list[Entry]) -> None:
        self._file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        end = max((entry.end for entry in entries), default=0)
        if path.stat().st_size < end:
            raise UserError(f"{path} is damaged: remove {path.parent} and give the same command again")
        self._file.truncate(end)
        self._file.seek(end)

    def add(self, name: str, content: bytes) -> Entry:
        """Append one file, uncompressed."""
        entry = Entry(name, self._file.tell(), len(content), zlib.crc32(content))
        self._file.write(entry.info().FileHeader())
        self._file.write(content)
        return entry

    def flush(self) -> None:
        """Hand what was added to the system, where a kill does not reach it."""
        self._file.flush()

    def finish(self, entries: list[Entry], texts: dict[str, str]) -> None:
        """Append the text files and the directory of all; the zip is then complete."""
        with self._file, zipfile.ZipFile(self._file, "w") as archive:
            archive.filelist.extend(entry.info() for entry in entries)
            for name, text in texts.items():
                archive.writestr(zipfile.ZipInfo(name), text)
