"""The folder that a command is to make: what it holds already, and how the finished content gets there."""

from pathlib import Path

from storage.file_store import LABELS, is_hidden


def files_in(folder: Path) -> list[Path]:
    """The files in a destination, sorted, without hidden and system files: a new disk has its `lost+found`."""
    return sorted(place for place in folder.iterdir() if not is_hidden(place.name)) if folder.is_dir() else []


def put_in_place(content: Path, dest: Path) -> None:
    """Turn the folder `content` into the folder `dest`, on the same file system.

    An existing `dest` is filled, `dataset.json` last: it may be a mount, which a rename cannot replace.
    """
    if not dest.is_dir():
        content.replace(dest)
        return
    for file in sorted(content.iterdir(), key=lambda file: file.name == LABELS):
        file.replace(dest / file.name)
