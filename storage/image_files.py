"""Image files of any kind -> upright 8-bit RGB: the one decoder of all that reads images."""

import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image, ImageFile

IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # decoded within Pillow: no outside program is run
IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
EXIF_ORIENTATION = 0x0112
UPRIGHT = {  # EXIF orientation -> the transposition that undoes it; 1 is upright
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}


def read_rgb(content: bytes) -> tuple["Image.Image", str]:
    """Decode an image file to 8-bit RGB, and say what it was: "RGB", "CMYK", "P", "RGB rotated", ...

    Rotation by EXIF is undone, 16 bits are scaled to 8, transparency is laid on white, of several frames the
    first is taken. Raises whatever Pillow raises for a damaged file, and `ValueError` for pixels of no known range.
    """
    from PIL import Image  # training on packed latents does without

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Pillow only warns of is read all the same
        with Image.open(io.BytesIO(content), formats=IMAGE_FORMATS) as image:
            image.load()
            kind, turn = image.mode, UPRIGHT.get(_orientation(image))
            rgb = _to_rgb(image)
    return (rgb.transpose(Image.Transpose[turn]), f"{kind} rotated") if turn is not None else (rgb, kind)


def upright_size(path: Path) -> tuple[int, int]:
    """(height, width) of what `read_rgb` makes of a file, by its header alone. Raises whatever Pillow raises."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            turned = UPRIGHT.get(_orientation(image), "") in ("TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90")
            return image.size if turned else image.size[::-1]


def _orientation(image: "ImageFile.ImageFile") -> int:
    try:
        return image.getexif().get(EXIF_ORIENTATION, 1)
    except Exception:  # damaged EXIF fails in many ways; the pixels are good all the same
        return 1


def _to_rgb(image: "Image.Image") -> "Image.Image":
    from PIL import Image

    if image.mode == "F":
        raise ValueError("floating-point pixels, of no known range")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("integer pixels beyond 16 bits, of no known range")
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
