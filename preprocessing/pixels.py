"""Crops: from an image of any size to the square one to train on."""

from collections.abc import Callable

from PIL import Image


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
    """Resize across, then down, as Pillow did before version 13, which resizes tall images down first: the rounding
    between the two passes would then give other pixels."""
    return image.resize((width, image.height), kernel).resize((width, height), kernel)


TRANSFORMS: dict[str, Callable[[Image.Image, int], Image.Image]] = {
    "center-crop-dhariwal": center_crop_dhariwal,
    "center-crop": center_crop,
}
