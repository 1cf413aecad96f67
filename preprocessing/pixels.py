"""From an image file of any kind to the square RGB image that is trained on."""

import io
import warnings
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFile

from file_layout import IMAGE_FORMATS

EXIF_ORIENTATION = 0x0112
UPRIGHT = {  # EXIF orientation -> what undoes it; 1 is upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_rgb(content: bytes) -> tuple[Image.Image, str]:
    """Decode an image file to 8-bit RGB, and say what it was: "RGB", "CMYK", "P", "RGB rotated", ...

    Rotation by EXIF is undone, 16 bits are scaled to 8, transparency is laid on white, of several frames the
    first is taken. Raises whatever Pillow raises for a damaged file, and `ValueError` for pixels of no known range.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Pillow only warns of is read all the same
        with Image.open(io.BytesIO(content), formats=IMAGE_FORMATS) as image:
            image.load()
            kind, turn = image.mode, UPRIGHT.get(_orientation(image))
            rgb = _to_rgb(image)
    return (rgb.transpose(turn), f"{kind} rotated") if turn is not None else (rgb, kind)


def _orientation(image: ImageFile.ImageFile) -> int:
    try:
        return image.getexif().get(EXIF_ORIENTATION, 1)
    except Exception:  # damaged EXIF fails in many ways; the pixels are good all the same
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
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


def center_crop_dhariwal(image: Image.Image, size: int) -> Image.Image:
    """ADM's crop (Dhariwal and Nichol 2021): halve by box filter while the short side stays at least `size`, bicubic
    to a short side of `size`, then the central square."""
    while min(image.size) >= 2 * size:
        image = _resized(image, image.width // 2, image.height // 2, Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > Image.MAX_IMAGE_PIXELS:  # a strip one pixel high would fill the memory
        raise ValueError(f"{image.width} x {image.height} pixels: too elongated to be scaled up")
    image = _resized(image, width, height, Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The central square of the image's short side, scaled to `size` by Lanczos filter."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return _resized(square, size, size, Image.Resampling.LANCZOS)


def _resized(image: Image.Image, width: int, height: int, kernel: Image.Resampling) -> Image.Image:
    """Across, then down, as Pillow always did: from version 13 on it does tall images the other way round, and the
    rounding to whole numbers between the passes makes other pixels of it."""
    return image.resize((width, image.height), kernel).resize((width, height), kernel)


TRANSFORMS: dict[str, Callable[[Image.Image, int], Image.Image]] = {
    "center-crop-dhariwal": center_crop_dhariwal,
    "center-crop": center_crop,
}
