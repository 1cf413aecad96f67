"""Files that are on the disk whole, or not there at all, with their checksums."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import UserError
from common.files import real_place
from storage.file_store import LABELS, is_hidden


class HashedFile:
    """A binary file being written, that knows the SHA-256 of what was written to it."""

    def __init__(self, descriptor: int) -> None:
        self._file, self._sha256 = os.fdopen(descriptor, "wb"), hashlib.sha256()

    def write(self, content: bytes) -> None:
        self._file.write(content)
        self._sha256.update(content)

    def hexdigest(self) -> str:
        return self._sha256.hexdigest()

    def close(self) -> None:
        """Close it once its content is on the disk."""
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())


@contextmanager
def written_aside(place: Path, folder: Path | None = None) -> Iterator[HashedFile]:
    """Write file `place` under another name; it appears under its own only once all of it is on disk.

    The other name is beside it, or in `folder` of the same file system; through a link to a file, beside what the link
    names. Raises `UserError` if it cannot be written;
    then, and after any other exception, `place` is what it was before.
    """
    real = real_place(place)
    aside = (folder if folder and real == place else real.parent) / f"{place.name}.partial"
    try:
        file = HashedFile(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666))
        try:
            yield file
        finally:
            file.close()
        aside.replace(real)
    except OSError as error:
        raise UserError(
            f"cannot write {place} ({error.strerror or error}): free space or change --dest, then give the same "
            "command again: it continues"
        ) from error
    finally:
        aside.unlink(missing_ok=True)


def write_file(place: Path, content: bytes, folder: Path | None = None) -> str:
    """Write a whole file as `written_aside` does; returns its SHA-256."""
    with written_aside(place, folder) as file:
        file.write(content)
    return file.hexdigest()


def files_in(folder: Path) -> list[Path]:
    """What a destination holds, sorted, but for hidden and system files: a fresh disk has its `lost+found`."""
    return sorted(place for place in folder.iterdir() if not is_hidden(place.name)) if folder.is_dir() else []


def put_in_place(content: Path, dest: Path) -> None:
    """Make folder `content` the folder `dest`, of the same file system.

    A `dest` that is there is filled, `dataset.json` last: it may be a mount, which no rename replaces.
    """
    if not dest.is_dir():
        content.replace(dest)
        return
    for file in sorted(content.iterdir(), key=lambda file: file.name == LABELS):
        file.replace(dest / file.name)
