"""Image folders and zips: which pictures they hold, of which class, and their pixels."""

import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from errors import UserError
from file_layout import FileStore
from preprocessing.picture_source import list_stored
from preprocessing.pixels import FORMATS


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


def read_image(store: FileStore, name: str) -> np.ndarray:
    """The image `name` of a store as (H, W, 3) uint8; `UserError` if it is unreadable or neither RGB nor greyscale."""
    content, place = store.read(name), store.path / name
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if image.mode not in ("RGB", "L"):
                raise UserError(f"{place} is in mode {image.mode}, expected RGB: run dataset_tools convert first")
            return np.array(image.convert("RGB"))
    except UserError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # SyntaxError: a broken PNG
        reason = "no known format" if isinstance(error, UnidentifiedImageError) else error
        raise UserError(f"{place} cannot be read as an image ({reason}): replace or remove it") from error
