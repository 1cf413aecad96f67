"""Image folders and zips: which pictures they hold, of which class, and their pixels."""

import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from errors import UserError
from file_layout import LABELS, FileStore, read_labels

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


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

    Raises `UserError` if there are no images, an image lies outside the class folders, or `dataset.json` and
    the images found disagree: no image is ever left out silently.
    """
    store = FileStore(source)
    files = store.names()
    names = sorted(name for name in files if Path(name).suffix.lower() in IMAGE_SUFFIXES)
    if not names:
        raise UserError(f"no images ({', '.join(sorted(IMAGE_SUFFIXES))}) below {store.path}: change --source")
    if LABELS in files:
        label_of, class_names = read_labels(store)
        for name in label_of.keys() ^ set(names):
            problem = "lists no label for" if name not in label_of else "lists a missing image,"
            raise UserError(f"{store.path / LABELS} {problem} {name}: make images and labels agree")
    else:
        for name in names:
            if "/" not in name:
                raise UserError(f"{store.path / name} is in no class folder, and there is no {LABELS} with labels")
        class_names = sorted({name.split("/")[0] for name in names})
        number = {class_name: label for label, class_name in enumerate(class_names)}
        label_of = {name: number[name.split("/")[0]] for name in names}
    return SourceImages(store, names, np.array([label_of[name] for name in names], np.int64), class_names)


def read_image(store: FileStore, name: str) -> np.ndarray:
    """The image `name` of a store as (H, W, 3) uint8; `UserError` if it is unreadable or neither RGB nor greyscale."""
    content, place = store.read(name), store.path / name
    try:
        with Image.open(io.BytesIO(content)) as image:
            if image.mode not in ("RGB", "L"):
                raise UserError(f"{place} is in mode {image.mode}, expected RGB: run dataset_tools convert first")
            return np.array(image.convert("RGB"))
    except UserError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # SyntaxError: a broken PNG
        reason = "no known format" if isinstance(error, UnidentifiedImageError) else error
        raise UserError(f"{place} cannot be read as an image ({reason}): replace or remove it") from error
