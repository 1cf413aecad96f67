"""A zip that is written in steps, each of which survives a kill."""

import os
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

from common.errors import UserError
from common.files import zip_entry


class Entry(NamedTuple):
    """A stored file of a zip that has no directory yet."""

    name: str
    first: int  # byte where its local header begins
    size: int
    crc: int

    def info(self) -> zipfile.ZipInfo:
        """Its entry in the zip's directory."""
        return zip_entry(self.name, self.first, self.size, self.crc)

    @property
    def end(self) -> int:
        return self.first + len(self.info().FileHeader()) + self.size


class GrowingZip:
    """A zip file whose directory is not written yet, so that files can be added.

    The caller keeps what `add` returns until `finish`, on disk if the zip is to be continued after a kill.

    Args:
        path: the zip file; it is made, or cut after the last of `entries`.
        entries: what an earlier run added.

    Raises:
        UserError: if the file is shorter than its entries.
        OSError: for any failure of the disk.
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
        """Hand what was added to the system: a kill of this process no longer loses it."""
        self._file.flush()

    def finish(self, entries: list[Entry], texts: dict[str, str]) -> None:
        """Append the text files and the directory of all; the zip is then complete."""
        with self._file, zipfile.ZipFile(self._file, "w") as archive:
            archive.filelist.extend(entry.info() for entry in entries)
            for name, text in texts.items():
                archive.writestr(zipfile.ZipInfo(name), text)
