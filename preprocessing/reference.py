"""A reference batch for `evaluate.py` from an image folder: `.npz` of images (`arr_0`), labels (`arr_1`).

python -m preprocessing.reference --source data/demo/images --dest data/demo/reference.npz
"""

import argparse
import zipfile
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
from tqdm import tqdm

from errors import UserError, exits_on_user_error
from preprocessing.images import SourceImages, list_images


def write_reference(images_dir: str | Path, npz_path: str | Path, indices: Sequence[int] | None = None) -> Path:
    """Write the images below `images_dir` to `npz_path`, one at a time: memory does not grow with them.

    `arr_0` is uint8 (N, H, W, 3), `arr_1` int64 (N,) class numbers, both in the order of the images' names,
    or of `indices` into it. Opens with `np.load`. The file appears under its name only when complete.

    Raises `UserError` for a folder without images, an unreadable image, images of different size, an index
    out of range and a destination that cannot be written.
    """
    source, npz_path = list_images(images_dir), Path(npz_path)
    total = len(source.names)
    indices = range(total) if indices is None else indices
    if len(indices) == 0 or not all(0 <= index < total for index in indices):
        raise UserError(f"indices select {len(indices)} of {total} images; expected one or more from 0 to {total - 1}")
    images = _images_of_one_size(source, indices)
    first = next(images)
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(indices), *first.shape)}
    aside = npz_path.with_name(f".{npz_path.name}.partial")
    try:
        npz_path.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(aside, "w", zipfile.ZIP_STORED) as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as stream:
                np.lib.format.write_array_header_1_0(stream, header)
                for image in tqdm(chain([first], images), "reference", len(indices), unit="img"):
                    stream.write(image.tobytes())
            with archive.open("arr_1.npy", "w") as stream:
                np.save(stream, source.labels[np.asarray(indices)])
        aside.replace(npz_path)
    except OSError as error:
        raise UserError(f"{npz_path} cannot be written ({error}); change --dest") from error
    finally:
        if aside.exists():
            aside.unlink()
    return npz_path


def _images_of_one_size(source: SourceImages, indices: Sequence[int]) -> Iterator[np.ndarray]:
    shape = None
    for index in indices:
        image = source.read(index)
        shape = shape or image.shape
        if image.shape != shape:
            raise UserError(
                f"{source.names[index]} is {image.shape[0]} x {image.shape[1]} pixels, the first image "
                f"{shape[0]} x {shape[1]}; expected one size: resize the images first"
            )
        yield image


@exits_on_user_error
def main() -> None:
    parser = argparse.ArgumentParser(prog="preprocessing.reference", description=__doc__.splitlines()[0])
    parser.add_argument("--source", required=True, help="image folder: class folders or dataset.json")
    parser.add_argument("--dest", required=True, help=".npz file to write")
    parser.add_argument(
        "--every",
        type=int,
        default=1,
        metavar="N",
        help="take every N-th image, by name (default: %(default)s)",
    )
    parser.add_argument("--first", type=int, default=0, help="index of the first image taken (default: %(default)s)")
    args = parser.parse_args()
    if args.every < 1 or args.first < 0:
        raise UserError(f"--every {args.every} --first {args.first}: expected at least 1 and at least 0")
    indices = range(args.first, len(list_images(args.source).names), args.every)
    print(f"written to {write_reference(args.source, args.dest, indices)}")


if __name__ == "__main__":
    main()
