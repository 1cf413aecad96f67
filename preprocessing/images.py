"""Image folders: which pictures they hold, of which class, and their pixels."""

import json
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from dataset import MANIFEST
from errors import UserError

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


class SourceImages(NamedTuple):
    """The images to encode, sorted by name."""

    folder: Path
    names: list[str]  # relative to `folder`, with forward slashes
    labels: np.ndarray  # (N,) int64
    class_names: list[str]


def list_images(source: str | Path) -> SourceImages:
    """List the images below `source` with their classes, from its `dataset.json` or else its class folders.

    Raises `UserError` if there are no images, an image lies outside the class folders, or `dataset.json` and
    the images found disagree: no image is ever left out silently.
    """
    folder = Path(source)
    if not folder.is_dir():
        raise UserError(f"no image folder {folder}: change --source")
    names = sorted(
        (Path(place) / file).relative_to(folder).as_posix()
        for place, _, files in os.walk(folder, followlinks=True)  # ImageNet is often a tree of links
        for file in files
        if Path(file).suffix.lower() in IMAGE_SUFFIXES
    )
    if not names:
        raise UserError(f"no images ({', '.join(sorted(IMAGE_SUFFIXES))}) below {folder}: change --source")
    if (folder / MANIFEST).is_file():
        label_of, class_names = _read_labels(folder / MANIFEST)
        for name in label_of.keys() ^ set(names):
            problem = "lists no label for" if name not in label_of else "lists a missing image,"
            raise UserError(f"{folder / MANIFEST} {problem} {name}: make images and labels agree")
    else:
        for name in names:
            if "/" not in name:
                raise UserError(f"{folder / name} is in no class folder, and there is no {MANIFEST} with labels")
        class_names = sorted({name.split("/")[0] for name in names})
        number = {class_name: label for label, class_name in enumerate(class_names)}
        label_of = {name: number[name.split("/")[0]] for name in names}
    return SourceImages(folder, names, np.array([label_of[name] for name in names], np.int64), class_names)


def _read_labels(file: Path) -> tuple[dict[str, int], list[str]]:
    """Label by image name, and class names, of a REPA-style `dataset.json`."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        label_of = {str(name): label for name, label in content["labels"]}
        class_names = content.get("class_names")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f'{file}: expected {{"labels": [["a/b.png", 3], ...]}}, got {error!r}') from error
    for name, label in label_of.items():
        if type(label) is not int or label < 0:
            raise UserError(f"{file}: label {label!r} of {name}, expected an integer from 0")
    if class_names is None:
        class_names = [str(label) for label in range(max(label_of.values(), default=-1) + 1)]
    if max(label_of.values(), default=-1) >= len(class_names):
        raise UserError(f"{file}: label {max(label_of.values())}, but only {len(class_names)} class_names")
    return label_of, [str(name) for name in class_names]


def read_image(file: Path) -> np.ndarray:
    """One image as (H, W, 3) uint8; `UserError` if it cannot be read or is neither RGB nor greyscale."""
    try:
        with Image.open(file) as image:
            if image.mode not in ("RGB", "L"):
                raise UserError(f"{file} is in mode {image.mode}, expected RGB: convert the image first")
            return np.array(image.convert("RGB"))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # SyntaxError: a broken PNG
        raise UserError(f"{file} cannot be read as an image ({error}): replace or remove it") from error
