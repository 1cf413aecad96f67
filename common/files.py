"""Writing files completely or not at all, by one writer at a time, and comparing files and records."""

import errno
import fcntl
import hashlib
import json
import os
import time
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from common.errors import UserError

LOCK_TIMEOUT = 3.0  # seconds to wait for another writer to end
REPOSITORY = Path(__file__).resolve().parent.parent


@contextmanager
def written_aside(path: str | Path, folder: Path | None = None) -> Iterator[Path]:
    """Write a file beside `path`, which becomes `path` at the end and is removed if the writing failed.

    Args:
        path: if it is a link, the file that it names is written and the link stays.
        folder: where to write meanwhile, on the same file system (default: the folder of `path`).

    Yields:
        the path to write to.

    Raises:
        OSError: naming the file, even where the system does not, as for a full disk.
    """
    real = real_place(path)
    beside = folder if folder and real == Path(path) else real.parent
    aside = beside / f".{real.name}.part"
    try:
        with named_in_error(real):
            yield aside
        aside.replace(real)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def named_in_error(path: Path) -> Iterator[None]:
    """Around the writing of one file: every `OSError` names the file, so that the message can."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def real_place(path: str | Path) -> Path:
    """The path to write to: `path`, or the target of the link that it is, as a rename would replace the link itself.

    Neither has to exist.

    Raises:
        UserError: for a link into a folder that does not exist, such as a disk that is not mounted, and for a pipe,
            socket or device, which a file must not replace.
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
    """Write a text file by `written_aside`; bytes of file names that are not UTF-8 become backslash escapes."""
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8", errors="backslashreplace")


@contextmanager
def named_in_utf8(path: str | Path) -> Iterator[str | Path]:
    """A name in UTF-8 for an existing file or folder, as safetensors and other Rust code open no other names.

    Yields:
        `path` itself, or the path of its open descriptor.
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
    """JSON in UTF-8. Bytes of file names that are not UTF-8 become escapes, which any reader of JSON undoes."""
    return json.dumps(content, indent=indent, ensure_ascii=False).encode("utf-8", "backslashreplace")


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def portable(path: str | Path, parts: int = 1) -> str:
    """A path for records that are read on other machines, without the folders of this one.

    Args:
        path: a relative path below the working folder stays as it is.
        parts: how many last parts to keep of a path outside the repository; others become relative to the repository.
    """
    place = Path(path)
    if not place.is_absolute() and place.parts[:1] not in (("..",), ("~",)):
        return str(path)
    if place.is_relative_to(REPOSITORY):
        return place.relative_to(REPOSITORY).as_posix()
    return Path(*[part for part in place.parts if part != place.anchor][-parts:]).as_posix()


def portable_argument(word: str) -> str:
    """A word of a command line; an absolute path in it, alone or after `--flag=`, is made `portable`."""
    flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return flag + equals + (portable(value, 2) if Path(value).is_absolute() else value)


@contextmanager
def only_writer(dest: str | Path, flag: str = "--dest") -> Iterator[None]:
    """While inside, no other process may write `dest`.

    The lock is a file beside `dest`, or inside it if `dest` is a folder whose parent cannot be written (a mount in a
    container). The system releases it when the process and its workers end, however they end. Workers outlive a killed
    process for a moment, so it is waited for up to `LOCK_TIMEOUT`.

    Args:
        dest: file or folder; it does not have to exist.
        flag: the flag that names `dest`, for messages.

    Raises:
        UserError: if another process has the lock, or the folder of `dest` cannot be written.
    """
    real_place(dest)  # for its errors
    dest = Path(dest).resolve()  # one lock, whichever link leads there
    inside = dest.is_dir() and not os.access(dest.parent, os.W_OK)
    place = (dest / dest.name if inside else dest).with_name(f".{dest.name}.lock")
    deadline = time.monotonic() + LOCK_TIMEOUT
    try:
        dest.parent.mkdir(parents=True, exist_ok=True)
        while (lock := _try_lock(place)) is None:
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


def _try_lock(place: Path) -> TextIO | None:
    """The lock file, open and locked; None if another process has it locked, or has just removed it."""
    lock = place.open("a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            lock.close()
            return None
        # Some cluster file systems have no locks: there the user has to start one writer only.
    if os.fstat(lock.fileno()).st_nlink == 0:
        lock.close()
        return None
    return lock


class HashedFile:
    """A binary file to write, with the SHA-256 of what was written so far."""

    def __init__(self, descriptor: int) -> None:
        self._file, self._sha256 = os.fdopen(descriptor, "wb"), hashlib.sha256()

    def write(self, content: bytes) -> None:
        self._file.write(content)
        self._sha256.update(content)

    def hexdigest(self) -> str:
        return self._sha256.hexdigest()

    def close(self) -> None:
        """Close the file after its content is on the disk."""
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())


@contextmanager
def hashed_aside(path: Path, folder: Path | None = None) -> Iterator[HashedFile]:
    """`written_aside` for a file of a dataset, flushed to the disk.

    Raises:
        UserError: if it cannot be written; then, as after any exception, `path` is unchanged.
    """
    with disk_errors_as_user_error(path), written_aside(path, folder) as aside:
        file = HashedFile(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666))
        try:
            yield file
        finally:
            file.close()


@contextmanager
def disk_errors_as_user_error(path: Path) -> Iterator[None]:
    """Around the writing of `path` by a command that continues when it is given again."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {path} ({error.strerror or error}): free space or change --dest, then give the same "
            "command again: it continues"
        ) from error


def write_file(place: Path, content: bytes, folder: Path | None = None) -> str:
    """Write a file by `hashed_aside`; returns its SHA-256."""
    with hashed_aside(place, folder) as file:
        file.write(content)
    return file.hexdigest()


def zip_entry(name: str, header_offset: int, size: int, crc: int) -> zipfile.ZipInfo:
    """An uncompressed file in a zip, with a fixed date (`ZipInfo`'s default): the same files make the same zip.

    Args:
        name: of the file inside the zip.
        header_offset: where its local header begins, in bytes.
        size: of its content, in bytes.
        crc: CRC-32 of its content.
    """
    info = zipfile.ZipInfo(name)
    info.header_offset, info.CRC = header_offset, crc
    info.file_size = info.compress_size = size
    info.external_attr = 0o644 << 16
    return info


def first_difference(
    wanted: Mapping[str, Any], found: Mapping[str, Any], free_to_differ: tuple[str, ...] = ()
) -> str | None:
    """The first key of record `wanted` whose value is another in record `found`, or missing there; None if all agree.

    Keys in `free_to_differ`, and those that only `found` has, are not compared.
    """
    return next((key for key in wanted if key not in free_to_differ and found.get(key) != wanted[key]), None)
