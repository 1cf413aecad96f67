"""Writing files so that nobody meets half of one, by one writer at a time, and telling files apart."""

import errno
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from common.errors import UserError

PATIENCE = 3.0  # seconds
REPOSITORY = Path(__file__).resolve().parent.parent


@contextmanager
def written_aside(path: str | Path, folder: Path | None = None) -> Iterator[Path]:
    """Gives a place beside `path` to write to; renamed to `path` at the end, removed if the writing failed.

    The place is in `folder`, if one of the same file system is given. If `path` is a link, the file that it names is
    written, and the link stays. Raises `OSError`, which names the file even where the system does not, as on a full
    disk.
    """
    real = real_place(path)
    beside = folder if folder and real == Path(path) else real.parent
    aside = beside / f".{real.name}.part"
    try:
        with naming(real):
            yield aside
        aside.replace(real)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Around the writing of one file: every `OSError` names it, so that the message can tell what was not written."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def real_place(path: str | Path) -> Path:
    """`path`, or if it is a link what it names, there or not yet there; a rename would replace the link itself.

    Raises `UserError` for a link to a place in a folder that is not there, such as a disk that is not mounted, and for
    a pipe, socket or device, which a file must not replace.
    """
    path = Path(path)
    if not path.is_symlink() and (path.is_file() or path.is_dir() or not path.exists()):
        return path
    real = Path(os.path.realpath(path))
    if real.exists() and not (real.is_file() or real.is_dir()):
        raise UserError(f"{path} is a pipe, socket or device, expected a file: give another place")
    if real.is_symlink() or not real.parent.is_dir():
        target = "itself" if real.is_symlink() else f"{real.parent}, which is not there"
        raise UserError(f"{path} is a link to {target}: mend the link, or give another place")
    return real


def write_text(path: str | Path, text: str) -> None:
    """Write a whole text file, aside first; what is no UTF-8 in file names is written with backslashes."""
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8", errors="backslashreplace")


@contextmanager
def named_in_utf8(path: str | Path) -> Iterator[str | Path]:
    """A file or folder that is there, by a name in UTF-8: safetensors and others written in Rust open no other.

    That is `path` itself, or that of its open descriptor.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            yield f"/proc/self/fd/{descriptor}"
        finally:
            os.close(descriptor)
    else:
        yield path


def json_bytes(content: object, indent: int | None = None) -> bytes:
    """JSON in UTF-8. Bytes of file names that are no UTF-8 become escapes, which any reader of JSON undoes."""
    return json.dumps(content, indent=indent, ensure_ascii=False).encode("utf-8", "backslashreplace")


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def portable(path: str | Path, parts: int = 1) -> str:
    """A path as a record that travels tells it: relative to the repository, else, outside it, its last `parts`.

    Relative paths that stay below the working folder are as they are; what lies where on a machine stays there.
    """
    place = Path(path)
    if not place.is_absolute() and place.parts[:1] not in (("..",), ("~",)):
        return str(path)
    if place.is_relative_to(REPOSITORY):
        return place.relative_to(REPOSITORY).as_posix()
    return Path(*[part for part in place.parts if part != place.anchor][-parts:]).as_posix()


def portable_argument(word: str) -> str:
    """A word of a command line, with the absolute path that it is, or ends in after `=`, made portable."""
    flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return flag + equals + (portable(value, 2) if Path(value).is_absolute() else value)


@contextmanager
def only_writer(dest: str | Path, flag: str = "--dest") -> Iterator[None]:
    """While inside, no other process may write `dest` (file or folder, there or not yet there; what `flag` names).

    The lock is a file beside `dest`, or inside a folder that is there if its parent cannot be written (a mount in a
    container), that the system frees when the process and its workers end, however they end. As workers outlive a
    killed process for a moment, it is waited for a little. Raises `UserError` if another process keeps it, or if the
    folder of `dest` cannot be written.
    """
    real_place(dest)  # says what is wrong with a link
    dest = Path(dest).resolve()  # one lock, by whichever link it is reached
    inside = dest.is_dir() and not os.access(dest.parent, os.W_OK)
    place = (dest / dest.name if inside else dest).with_name(f".{dest.name}.lock")
    deadline = time.monotonic() + PATIENCE
    try:
        dest.parent.mkdir(parents=True, exist_ok=True)
        while (lock := _locked(place)) is None:
            if time.monotonic() > deadline:
                raise UserError(f"{dest} is being written by another process: let it end, or change {flag}")
            time.sleep(0.05)
    except OSError as error:
        raise UserError(f"cannot write beside {dest} ({error.strerror or error}): change {flag}") from error
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
def hashed_aside(path: Path, folder: Path | None = None) -> Iterator[HashedFile]:
    """`written_aside` for a file of a dataset, flushed to the disk.

    Raises `UserError` if it cannot be written; then, and after any other exception, `path` is what it was before.
    """
    try:
        with written_aside(path, folder) as aside:
            file = HashedFile(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666))
            try:
                yield file
            finally:
                file.close()
    except OSError as error:
        raise UserError(
            f"cannot write {path} ({error.strerror or error}): free space or change --dest, then give the same "
            "command again: it continues"
        ) from error


def write_file(place: Path, content: bytes, folder: Path | None = None) -> str:
    """Write a whole file as `hashed_aside` does; returns its SHA-256."""
    with hashed_aside(place, folder) as file:
        file.write(content)
    return file.hexdigest()
