"""Files that are on the disk whole, or not there at all, with their checksums."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from errors import UserError


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

    The other name is beside it, or in `folder` of the same file system. Raises `UserError` if it cannot be written;
    then, and after any other exception, `place` is what it was before.
    """
    aside = (folder or place.parent) / f"{place.name}.partial"
    try:
        file = HashedFile(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666))
        try:
            yield file
        finally:
            file.close()
        aside.replace(place)
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
