"""Writing safely: files that are complete or not there at all, and one writer to a destination."""

import errno
import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from errors import UserError

PATIENCE = 3.0  # seconds


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


@contextmanager
def only_writer(dest: str | Path) -> Iterator[None]:
    """While inside, no other process may write `dest` (file or folder, there or not yet there).

    The lock is a file beside `dest` that the system frees when the process and its workers end, however they end. As
    workers outlive a killed process for a moment, it is waited for a little. Raises `UserError` if another process
    keeps it, or if the folder of `dest` cannot be written.
    """
    dest = Path(dest).resolve()  # one lock, by whichever link it is reached
    place = dest.with_name(f".{dest.name}.lock")
    deadline = time.monotonic() + PATIENCE
    try:
        dest.parent.mkdir(parents=True, exist_ok=True)
        while (lock := _locked(place)) is None:
            if time.monotonic() > deadline:
                raise UserError(f"{dest} is being written by another process: let it end, or change --dest")
            time.sleep(0.05)
    except OSError as error:
        raise UserError(f"cannot write beside {dest} ({error.strerror or error}): change --dest") from error
    with lock:
        try:
            yield
        finally:
            place.unlink(missing_ok=True)


def _locked(place: Path) -> TextIO | None:
    """The lock file, open and locked; None if another process has it locked, or has just removed it."""
    lock = place.open("a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            lock.close()
            return None
        # Some cluster file systems know no locks: there it is left to the user to start one writer only.
    if os.fstat(lock.fileno()).st_nlink == 0:
        lock.close()
        return None
    return lock
