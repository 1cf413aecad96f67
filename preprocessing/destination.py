"""Files that are on the disk whole, or not there at all, with their checksums."""

from pathlib import Path

from storage.file_store import LABELS, is_hidden


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
