"""How fast training data is read: packed latents against one file per image, in one run, warm cache.

    python -m benchmarks.data_loading --num-workers 2 --output data_loading.json

Makes its data in a temporary folder (about 1.7 GB for 20,000 samples of 8 x 32 x 32), reads each layout for the same
time in batches of random samples, and prints samples/s and the time from opening the dataset to the first batch: for
each layout the best of three rounds, as other programs on the machine can only slow it down. The dataset of ImageNet's
size is a sparse file of zeros outside the cache; it shows the time to the first batch, and reads from the system.
"""

import itertools
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks.figures import write_figures
from common.errors import OneLineParser, exits_on_user_error
from dataset import DataOrder, DeviceLatents, FileLatents, latent_batches
from preprocessing.pack import pack
from preprocessing.packed_writer import packed_manifest, shard_header
from storage.file_store import LABELS
from storage.packed import PackedLatents

SHAPE = (8, 32, 32)  # moments of 256 px
IMAGENET = 1_281_167
ROUNDS = 3


class PlainFiles(Dataset):
    """A plain dataset for comparison: one `np.load` per sample."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.labels = json.loads((folder / LABELS).read_text())["labels"]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        name, label = self.labels[index]
        return torch.from_numpy(np.load(self.folder / name)), label


def plain_batches(folder: Path, batch_size: int, num_workers: int) -> Iterator[list[torch.Tensor]]:
    """Endless shuffled batches of a plain DataLoader, whose workers live on from epoch to epoch."""
    loader = DataLoader(
        PlainFiles(folder),
        batch_size,
        shuffle=True,
        num_workers=num_workers,
        drop_last=True,
        persistent_workers=num_workers > 0,
    )
    return itertools.chain.from_iterable(itertools.repeat(loader))


def write_files(folder: Path, samples: int) -> None:
    """Random moments in the official layout: float32, a thousand files per folder."""
    rng = np.random.default_rng(0)
    labels = []
    for index in range(samples):
        name = f"{index // 1000:05d}/img-mean-std-{index:08d}.npy"
        if index % 1000 == 0:
            (folder / name).parent.mkdir(parents=True)
        np.save(folder / name, np.abs(rng.standard_normal(SHAPE, dtype=np.float32)))  # so that no std is negative
        labels.append([name, index % 1000])
    (folder / LABELS).write_text(json.dumps({"labels": labels}))


def write_sparse(folder: Path, samples: int, shard_rows: int = 131_072) -> None:
    """A packed dataset of zeros in sparse files, to time the opening of a large dataset."""
    folder.mkdir()
    labels, names = np.arange(samples) % 1000, [f"{index:08d}.png" for index in range(samples)]
    manifest = packed_manifest(
        names,
        labels,
        [str(label) for label in range(1000)],
        resolution=256,
        latent_shape=SHAPE,
        dtype="float16",
        vae="none",
        vae_sha256=None,
        scaling_factor=1.0,
    )
    manifest["checksums"], manifest["shards"] = {"file": "checksums.npy", "sha256": ""}, []
    for number, first in enumerate(range(0, samples, shard_rows)):
        count = min(shard_rows, samples - first)
        with (folder / f"moments-{number:05d}.npy").open("wb") as file:
            file.write(shard_header(manifest, "moments", count))
            file.truncate(file.tell() + count * 2 * int(np.prod(SHAPE)))
        manifest["shards"].append({"file": f"moments-{number:05d}.npy", "count": count, "sha256": ""})
    np.save(folder / "labels.npy", labels)
    (folder / "names.json").write_text(json.dumps(names))
    (folder / "dataset.json").write_text(json.dumps(manifest))


def measure(open_batches: Callable[[], Iterator], batch_size: int, seconds: float) -> dict[str, float]:
    """Samples/s after 20 batches, and the seconds from opening the dataset to the first batch."""
    began = time.perf_counter()
    batches = open_batches()
    next(batches)
    first = time.perf_counter() - began
    for _ in range(20):
        next(batches)
    count, began = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - began) < seconds:
        next(batches)
        count += 1
    return {"samples_per_second": count * batch_size / elapsed, "first_batch_seconds": first}


def measure_all(folder: Path, samples: int, batch_size: int, num_workers: int, seconds: float) -> dict[str, dict]:
    """The figures of each layout, by its title."""
    write_files(folder / "files", samples)
    began = time.perf_counter()
    pack(folder / "files", folder / "float16", num_workers=num_workers)
    packing = samples / (time.perf_counter() - began)
    pack(folder / "files", folder / "float32", dtype="float32", num_workers=num_workers)
    write_sparse(folder / "imagenet", IMAGENET)

    def ours(data: PackedLatents | FileLatents | DeviceLatents) -> Iterator:
        return latent_batches(data, DataOrder(len(data), batch_size, 0), num_workers=num_workers)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    readers = {
        "plain: DataLoader, np.load a file": lambda: plain_batches(folder / "files", batch_size, num_workers),
        "the same files, our reader": lambda: ours(FileLatents(folder / "files")),
        "packed float32": lambda: ours(PackedLatents(folder / "float32")),
        "packed float16": lambda: ours(PackedLatents(folder / "float16")),
        f"packed float16, all on {device}": lambda: ours(DeviceLatents(PackedLatents(folder / "float16"), device)),
        f"packed float16, {IMAGENET} zeros": lambda: ours(PackedLatents(folder / "imagenet")),
    }
    rounds = [
        {name: measure(open_batches, batch_size, seconds) for name, open_batches in readers.items()}
        for _ in range(ROUNDS)
    ]
    results = {
        name: max((r[name] for r in rounds), key=lambda result: result["samples_per_second"]) for name in readers
    }
    plain = results["plain: DataLoader, np.load a file"]["samples_per_second"]
    for result in results.values():
        result["times_plain"] = result["samples_per_second"] / plain
    return results | {"pack": {"samples_per_second": packing}}


@exits_on_user_error
def main() -> None:
    """Parse the command line, measure, print a table and write the figures as JSON."""
    parser = OneLineParser(description="Samples/s and time to the first batch of packed and of plain data.")
    parser.add_argument("--samples", type=int, default=20_000, help="samples of 8 x 32 x 32 (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=256, help="samples per batch (default: %(default)s)")
    parser.add_argument(
        "--num-workers", type=int, default=2, help="reading processes or threads (default: %(default)s)"
    )
    parser.add_argument(
        "--seconds", type=float, default=3, help="measured for each layout and round (default: %(default)s s)"
    )
    parser.add_argument("--dir", help="folder for the temporary data (default: the system's)")
    parser.add_argument("--output", help="JSON file for the figures (default: none)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        results = measure_all(Path(folder), args.samples, args.batch_size, args.num_workers, args.seconds)
    for name, result in results.items():
        print(f"{name:40s}{result['samples_per_second']:12,.0f} samples/s", end="")
        if "times_plain" in result:
            print(f"{result['times_plain']:8.1f} x plain   first batch {result['first_batch_seconds']:.3f} s", end="")
        print()
    write_figures(args.output, vars(args), results, torch=torch.__version__)


if __name__ == "__main__":
    main()
