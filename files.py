"""Writing files so that nobody meets half of one, and telling files apart."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_aside(path: str | Path) -> Iterator[Path]:
    """Gives a place beside `path` to write to; renamed to `path` at the end, removed if the writing failed.

    Raises `OSError`, which names the file even where the system does not, as on a full disk.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.part")
    try:
        with naming(path):
            yield aside
        aside.replace(path)
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


def write_text(path: str | Path, text: str) -> None:
    """Write a whole text file, aside first."""
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
