"""Image folders and zips: which images they hold, their classes and pixels."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.errors import print_once
from preprocessing.picture_source import NO_IMAGE, list_stored
from storage.file_store import FileStore, read_image


class SourceImages(NamedTuple):
    """The images of a folder or zip, sorted by name."""

    store: FileStore
    names: list[str]  # inside the store, with forward slashes
    labels: np.ndarray  # (N,) int64
    class_names: list[str]
    others: dict[str, str]  # files that are no images, and why

    def read(self, index: int) -> np.ndarray:
        """Image `index`, (H, W, 3) uint8; `UserError` if it is unreadable or neither RGB nor greyscale."""
        return read_image(self.store, self.names[index])


def list_images(source: str | Path) -> SourceImages:
    """List the images below `source`, a folder or zip, with the labels of its `dataset.json` or else its folders.

    Classes and images are those that `convert` finds there; see `picture_source.list_stored`, also for what raises
    `UserError`.
    """
    store = FileStore(source)
    listed = list_stored(store)
    labels = np.array(listed.labels, np.int64)
    return SourceImages(store, listed.images, labels, listed.class_names, listed.others)


def report_passed_over(others: dict[str, str]) -> None:
    """Print how many hidden and system files and links of a source were passed over, if any."""
    passed_over = [f"{name} ({reason})" for name, reason in others.items() if reason != NO_IMAGE]
    if passed_over:
        print_once(f"note: passed over {len(passed_over)} files or folders, such as {passed_over[0]}")


def warn_of_empty_classes(labels: np.ndarray, class_names: list[str]) -> None:
    """Print which classes no label of `labels` (N,) int64 names, if any: sampling would draw them, untrained."""
    empty = np.flatnonzero(np.bincount(labels, minlength=len(class_names)) == 0)
    if len(empty):
        names = [f"{number} ({class_names[number]})" for number in empty[:10]]
        more = ", ..." if len(empty) > 10 else ""
        from_1 = ": labels count from 0, these seem to count from 1" if empty.tolist() == [0] else ""
        print_once(
            f"warning: {len(empty)} of {len(class_names)} classes have no images, {', '.join(names)}{more}{from_1}"
        )
