"""What writing samples costs, in memory and seconds: the streamed `.npz` against saving all images at once.

    python -m benchmarks.sample_file --images 50000 --dir SCRATCH --output sample_file.json

Writes random images of 256 px, 64 at a time, through `generation.sample_file`, reads the file as ADM's evaluator does
(through the zip, without loading it) and compares some images; then stacks images in memory and saves them with
`np.savez`, as the official release does after writing PNG files (fewer images, as all would not fit). Each runs in its
own process; memory is its peak beyond imports. The files are deleted at the end.
"""

import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.figures import in_new_process, peak_bytes, write_figures
from common.errors import OneLineParser, exits_on_user_error
from generation.sample_file import SampleFile

SIDE, BATCH = 256, 64


def images_of(first: int, count: int) -> np.ndarray:
    """Random images, a function of their numbers: uint8 (count, SIDE, SIDE, 3)."""
    return np.random.default_rng(first).integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)


def stream(npz: Path, count: int) -> None:
    """Write `count` images batch by batch."""
    samples = SampleFile(npz, (count, SIDE, SIDE, 3), BATCH)
    samples.begin({})
    for first in range(0, count, BATCH):
        indices = range(first, min(first + BATCH, count))
        samples.write(indices, images_of(first, len(indices)))
    samples.complete(np.zeros(count, np.int64))
    samples.publish()


def save_at_once(npz: Path, count: int) -> None:
    """Stack `count` images, then save them."""
    parts = [images_of(first, min(BATCH, count - first)) for first in range(0, count, BATCH)]
    np.savez(npz, arr_0=np.concatenate(parts), arr_1=np.zeros(count, np.int64))


def check(npz: Path, count: int) -> int:
    """Read the file by batches, as ADM's evaluator does; the number of compared batches that are as written."""
    agreed = 0
    with zipfile.ZipFile(npz) as archive, archive.open("arr_0.npy") as stream:
        np.lib.format.read_magic(stream)
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
        assert shape == (count, SIDE, SIDE, 3) and dtype == np.uint8
        for first in range(0, count, BATCH):
            part = np.frombuffer(stream.read(min(BATCH, count - first) * SIDE * SIDE * 3), np.uint8)
            if first % (100 * BATCH) == 0:  # the zip's checksum covers all; some are compared
                agreed += int((part.reshape(-1, SIDE, SIDE, 3) == images_of(first, min(BATCH, count - first))).all())
    with np.load(npz, allow_pickle=False) as arrays:
        assert len(arrays["arr_1"]) == count
    return agreed


def measure(work: Callable[[Path, int], None], npz: Path, count: int) -> dict[str, float]:
    """Seconds and bytes of `work` in a new process."""
    return in_new_process(_measured, work, npz, count)


def _measured(work: Callable, npz: Path, count: int) -> dict[str, float]:
    images_of(0, BATCH)
    before, began = peak_bytes(), time.perf_counter()
    work(npz, count)
    figures = {"images": count, "seconds": time.perf_counter() - began, "peak_bytes": peak_bytes() - before}
    return figures | {"baseline_bytes": before, "file_bytes": npz.stat().st_size}


@exits_on_user_error
def main() -> None:
    """Parse the command line, measure, print a table and write the figures as JSON."""
    parser = OneLineParser(description="Memory and seconds of the streamed file of samples.")
    parser.add_argument("--images", type=int, default=50_000, help="images streamed (default: %(default)s)")
    parser.add_argument("--plain-images", type=int, default=5_000, help="images saved at once (default: %(default)s)")
    parser.add_argument("--dir", help="folder for the temporary file (default: the system's)")
    parser.add_argument("--output", help="JSON file for the figures (default: none)")
    args = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        npz = Path(folder) / "samples.npz"
        results["streamed"] = measure(stream, npz, args.images)
        results["streamed"]["batches_compared"] = check(npz, args.images)
        npz.unlink()
        results["held, then saved"] = measure(save_at_once, npz, args.plain_images)
    for name, result in results.items():
        rate, memory = result["images"] / result["seconds"], result["peak_bytes"] / 2**20
        print(f"{name:20s}{result['images']:8d} images{rate:10,.0f} images/s{memory:10,.0f} MiB over the baseline")
    write_figures(args.output, vars(args), results, numpy=np.__version__)


if __name__ == "__main__":
    main()
