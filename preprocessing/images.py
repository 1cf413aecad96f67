"""Image folders and zips: which pictures they hold, of which class, and their pixels."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from file_layout import FileStore, read_image
from preprocessing.picture_source import list_stored


class SourceImages(NamedTuple):
    """The images of a folder or zip, sorted by name."""

    store: FileStore
    names: list[str]  # inside the store, with forward slashes
    labels: np.ndarray  # (N,) int64
    class_names: list[str]

    def read(self, index: int) -> np.ndarray:
        """Image `index` as (H, W, 3) uint8; `UserError` if it is unreadable or neither RGB nor greyscale."""
        return read_image(self.store, self.names[index])


def list_images(source: str | Path) -> SourceImages:
    """List the images below `source`, a folder or zip, with the labels of its `dataset.json` or else its folders.

    Classes and images are those that `convert` finds there; see `picture_source.list_stored`, also for what raises
    `UserError`.
    """
    store = FileStore(source)
    listed = list_stored(store)
    return SourceImages(store, listed.images, np.array(listed.labels, np.int64), listed.class_names)
