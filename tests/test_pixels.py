"""Every kind of image becomes RGB as it looks; ADM's crop against its arithmetic written out."""

import io

import numpy as np
import pytest
from PIL import Image

from preprocessing.pixels import center_crop, center_crop_dhariwal
from storage.image_files import read_rgb


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decoded(content):
    image, kind = read_rgb(content)
    assert image.mode == "RGB"
    return np.array(image), kind


# ---- modes


@pytest.mark.parametrize(
    ("image", "options", "kind", "expected"),
    [
        (Image.new("RGB", (2, 3), (200, 30, 60)), {}, "RGB", (200, 30, 60)),
        (Image.new("L", (2, 3), 77), {}, "L", (77, 77, 77)),
        (Image.new("1", (2, 3), 1), {}, "1", (255, 255, 255)),
        (Image.new("RGBA", (2, 3), (0, 100, 200, 51)), {}, "RGBA", (204, 224, 244)),  # 20 % on white
        (Image.new("RGBA", (2, 3), (9, 9, 9, 0)), {}, "RGBA", (255, 255, 255)),
        (Image.new("LA", (2, 3), (100, 255)), {}, "LA", (100, 100, 100)),
        (Image.new("RGB", (2, 3), (1, 2, 3)), {"transparency": (1, 2, 3)}, "RGB", (255, 255, 255)),
        (Image.new("RGB", (2, 3), (200, 30, 60)).quantize(2), {}, "P", (200, 30, 60)),
        (Image.new("RGB", (2, 3), (200, 30, 60)).quantize(2), {"transparency": 0}, "P", (255, 255, 255)),
    ],
)
def test_modes_of_png(image, options, kind, expected):
    pixels, found = decoded(encoded(image, **options))
    assert found == kind and pixels.shape == (3, 2, 3)
    np.testing.assert_array_equal(pixels, np.broadcast_to(expected, (3, 2, 3)))


def test_16_bits_are_scaled_not_clipped():
    values = np.array([[0, 128, 129, 257, 1000, 32768, 65535]], np.uint16)
    pixels, kind = decoded(encoded(Image.fromarray(values)))
    assert kind.startswith("I")
    np.testing.assert_array_equal(pixels[0, :, 1], [0, 0, 1, 1, 4, 128, 255])
    np.testing.assert_array_equal(decoded(encoded(Image.fromarray(values), "TIFF"))[0], pixels)


def test_cmyk_jpeg():
    pixels, kind = decoded(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))  # magenta + yellow
    assert kind == "CMYK" and np.abs(pixels.astype(int) - (255, 0, 0)).max() <= 3


def test_the_first_frame_of_several():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    pixels, _ = decoded(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    np.testing.assert_array_equal(pixels[0, 0], (255, 0, 0))


UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_undone(orientation, kind):
    stored = np.random.default_rng(0).integers(0, 256, (3, 5, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels, _ = decoded(encoded(Image.fromarray(stored), kind, exif=exif))
    np.testing.assert_array_equal(pixels, UPRIGHT[orientation](stored))


def test_damaged_exif_costs_no_image():
    stored = np.random.default_rng(0).integers(0, 256, (3, 5, 3), dtype=np.uint8)
    for exif in (b"Exif\0\0nonsense", b"Exif\0\0II*\0\xff\xff\xff\xff", b""):
        np.testing.assert_array_equal(decoded(encoded(Image.fromarray(stored), exif=exif))[0], stored)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no image",
        encoded(Image.new("RGB", (64, 64)), "JPEG")[:-200],
        encoded(Image.effect_noise((64, 64), 50))[:-200],
        encoded(Image.effect_noise((64, 64), 50)).replace(b"IDAT", b"IDAX"),
        encoded(Image.new("F", (4, 4)), "TIFF"),
        encoded(Image.fromarray(np.array([[70000]], np.int32)), "TIFF"),
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n",  # Pillow would start Ghostscript
    ],
)
def test_what_is_no_good_image_raises(content):
    with pytest.raises((OSError, SyntaxError, ValueError)):
        read_rgb(content)


# ---- crops: resampling as it is defined, in whole numbers, one pass across and one down


def box(x):
    return ((x > -0.5) & (x <= 0.5)).astype(float)


def bicubic(x, a=-0.5):
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def resampled_rows(array, size, kernel, support):
    """Resize axis 0 of uint8 (h, w, 3): each output weighs the inputs within the kernel's stretched support."""
    if size == len(array):
        return array
    scale = len(array) / size
    stretch = max(scale, 1.0)
    rows = []
    for row in range(size):
        centre = (row + 0.5) * scale
        low = max(int(centre - support * stretch + 0.5), 0)
        high = min(int(centre + support * stretch + 0.5), len(array))
        weights = kernel((np.arange(low, high) + 0.5 - centre) / stretch)
        fixed = np.floor(weights / weights.sum() * 2**22 + 0.5).astype(np.int64)  # 22 bits after the point
        total = np.tensordot(fixed, array[low:high].astype(np.int64), 1) + 2**21
        rows.append(np.clip(total >> 22, 0, 255))
    return np.array(rows, dtype=np.uint8)


def resampled(array, width, height, kernel, support):
    across = resampled_rows(array.swapaxes(0, 1), width, kernel, support).swapaxes(0, 1)
    return resampled_rows(across, height, kernel, support)


def dhariwal_written_out(array, size):
    height, width = array.shape[:2]
    while min(height, width) // size >= 2:
        height, width = height // 2, width // 2
        array = resampled(array, width, height, box, 0.5)
    short = min(height, width)
    height, width = round(height * (size / short)), round(width * (size / short))
    array = resampled(array, width, height, bicubic, 2.0)
    top, left = (height - size) // 2, (width - size) // 2
    return array[top : top + size, left : left + size]


SIZES = [  # width, height
    (32, 32), (33, 32), (32, 47), (31, 40), (40, 31), (63, 63), (64, 64), (65, 64), (64, 129), (127, 128),
    (128, 127), (129, 131), (255, 90), (90, 255), (97, 500), (333, 33), (20, 20), (7, 11), (11, 7), (1, 3),
    (150, 149), (259, 257), (191, 193), (300, 64),
]  # fmt: skip


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_dhariwal_crop_against_its_arithmetic(width, height):
    array = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    pixels = np.array(center_crop_dhariwal(Image.fromarray(array), 32))
    np.testing.assert_array_equal(pixels, dhariwal_written_out(array, 32))


def test_center_crop_takes_the_whole_short_side():
    array = np.random.default_rng(0).integers(0, 256, (20, 31, 3), dtype=np.uint8)
    np.testing.assert_array_equal(np.array(center_crop(Image.fromarray(array), 20)), array[:, 5:25])
    assert center_crop(Image.fromarray(array), 64).size == (64, 64)
    left, right = np.array(center_crop(Image.linear_gradient("L").rotate(90).convert("RGB"), 2))[0, :, 0]
    assert left + right == 255 and 50 < left < 80


def test_a_strip_that_would_fill_the_memory_is_refused():
    with pytest.raises(ValueError, match="elongated"):
        center_crop_dhariwal(Image.new("RGB", (20_000, 1)), 256)
