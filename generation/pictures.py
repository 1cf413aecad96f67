"""Samples for viewing: a grid by class, and a folder of PNG files."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from common.files import written_aside
from generation.sample_file import SampleFile


def save_grid(
    read: Callable[[int], np.ndarray], labels: np.ndarray, names: Sequence[str], png: Path, per_class: int = 10
) -> None:
    """Write a picture with one row per class, for up to ten classes: the class name and its first images.

    Args:
        read: image number -> image, uint8 (H, H, 3); called only for images in the grid.
        labels: class ids, (N,).
        names: class names by id; a missing name becomes the id.
        png: file to write.
        per_class: images per row.
    """
    classes = np.unique(labels)[:10]
    rows = [np.flatnonzero(labels == label)[:per_class] for label in classes]
    side, text_width = len(read(int(rows[0][0]))), 150
    picture = Image.new("RGB", (text_width + side * max(map(len, rows)), side * len(rows)), "white")
    draw = ImageDraw.Draw(picture)
    for row, (label, members) in enumerate(zip(classes, rows, strict=True)):
        name = str(names[label]) if label < len(names) else f"class {label}"
        write_name(draw, (6, row * side + side // 2), name)
        for column, i in enumerate(members):
            picture.paste(Image.fromarray(read(int(i))), (text_width + column * side, row * side))
    with written_aside(png) as aside:
        picture.save(aside, format="png")


def write_name(draw: ImageDraw.ImageDraw, place: tuple[int, int], name: str) -> None:
    """Write one line of text, its left middle at `place`; characters that the font lacks become `?`."""
    line = " ".join(name.split())
    try:
        draw.text(place, line, fill="black", anchor="lm")
    except ValueError:  # half a character, or a Pillow without FreeType, whose one font is Latin-1
        draw.text(place, line.encode("ascii", "replace").decode(), fill="black")


def save_pngs(samples: SampleFile, indices: Sequence[int], folder: Path) -> None:
    """Write images as `folder`/000000.png and so on, the official release's names, lossless."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in indices:
        with written_aside(folder / f"{index:06d}.png") as aside:
            Image.fromarray(samples.read(index)).save(aside, format="png", compress_level=1)
