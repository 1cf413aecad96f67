"""Image files of any kind -> upright 8-bit RGB: the decoder of all that reads images."""

import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image, ImageFile

IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # decoded inside Pillow, without other programs
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
    """Decode an image file to 8-bit RGB.

    EXIF rotation is applied, 16 bits are scaled to 8, transparent pixels get a white background, and of several frames
    the first is taken.

    Returns:
        the image, and the kind of the file: "RGB", "CMYK", "P", "RGB rotated", ...

    Raises:
        ValueError: for pixels of unknown range.
        Exception: whatever Pillow raises for a damaged file.
    """
    from PIL import Image  # not needed to train on packed latents

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # files that Pillow only warns of are read
        with Image.open(io.BytesIO(content), formats=IMAGE_FORMATS) as image:
            image.load()
            kind, turn = image.mode, UPRIGHT.get(_orientation(image))
            rgb = _to_rgb(image)
    return (rgb.transpose(Image.Transpose[turn]), f"{kind} rotated") if turn is not None else (rgb, kind)


def upright_size(path: Path) -> tuple[int, int]:
    """(height, width) of the image that `read_rgb` returns, from the header alone. Raises whatever Pillow raises."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            turned = UPRIGHT.get(_orientation(image), "") in ("TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90")
            return image.size if turned else image.size[::-1]


def _orientation(image: "ImageFile.ImageFile") -> int:
    try:
        return image.getexif().get(EXIF_ORIENTATION, 1)
    except Exception:  # damaged EXIF fails in many ways, but the pixels are good
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
