"""Writes the packed form of a dataset (described in `dataset.py`), each file complete or not there at all."""

import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dataset import FORMAT, FORMAT_VERSION, MANIFEST
from errors import UserError

SHARD_BYTES = 2**31  # few files, yet each is quick to copy and to check
UNFINISHED = re.compile(r"(moments-\d+\.npy|labels\.npy|names\.json)(\.partial)?|dataset\.json\.partial")


class _HashedFile:
    """A binary file that knows the SHA-256 of what was written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._sha256 = file, hashlib.sha256()

    def write(self, content: bytes) -> None:
        self._file.write(content)
        self._sha256.update(content)

    def hexdigest(self) -> str:
        return self._sha256.hexdigest()


@contextmanager
def _written_aside(place: Path) -> Iterator[_HashedFile]:
    """Write `place` under another name beside it; it appears under its own only once all of it is on disk."""
    aside = place.with_name(place.name + ".partial")
    try:
        with aside.open("wb") as file:
            yield _HashedFile(file)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(place)
    except OSError as error:
        raise UserError(f"cannot write {place} ({error}): free space or change --dest") from error
    finally:
        aside.unlink(missing_ok=True)


def _write(place: Path, content: bytes) -> None:
    with _written_aside(place) as file:
        file.write(content)


def _names_bytes(names: list[str]) -> bytes:
    return json.dumps(names, ensure_ascii=False).encode()


def _labels_bytes(labels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, labels.astype(np.int64), allow_pickle=False)
    return buffer.getvalue()


def packed_manifest(
    names: list[str],
    labels: np.ndarray,
    class_names: list[str],
    *,
    resolution: int,
    latent_shape: tuple[int, int, int],
    dtype: str,
    vae: str,
    vae_sha256: str,
    scaling_factor: float,
) -> dict[str, Any]:
    """The manifest of a packed dataset, but for its shards: all that is known before the first latent.

    `latent_shape` is (2C, h, w), of the moments; `dtype` "float16" or "float32".
    """
    return {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "count": len(names),
        "num_classes": len(class_names),
        "class_names": class_names,
        "resolution": resolution,
        "pixel_range": [-1, 1],
        "latent_shape": list(latent_shape),
        "dtype": dtype,
        "vae": vae,
        "vae_sha256": vae_sha256,
        "scaling_factor": scaling_factor,
        "labels": {"file": "labels.npy", "sha256": hashlib.sha256(_labels_bytes(labels)).hexdigest()},
        "names": {"file": "names.json", "sha256": hashlib.sha256(_names_bytes(names)).hexdigest()},
    }


def write_packed(
    dest: str | Path,
    manifest: dict[str, Any],
    batches: Iterable[np.ndarray],
    names: list[str],
    labels: np.ndarray,
    shard_rows: int | None = None,
) -> None:
    """Write a packed dataset to folder `dest`, in place of an unfinished one; the manifest comes last.

    `manifest` is from `packed_manifest`, for these `names` and `labels` ((N,) ints). `batches` yields the
    moments (n, 2C, h, w) in order, N rows in all, in any portions; they are stored in the manifest's dtype.
    `shard_rows` is the number of samples in a shard, by default about 2 GiB of them.

    Raises `UserError` if `dest` holds other files, or if moments are not finite in the stored dtype.
    """
    dest, dtype = Path(dest), np.dtype(manifest["dtype"])
    row_shape = tuple(manifest["latent_shape"])
    shard_rows = shard_rows or max(1, SHARD_BYTES // (dtype.itemsize * int(np.prod(row_shape))))
    _clear_unfinished(dest)
    pieces = _pieces_within_shards(batches, row_shape, dtype, shard_rows, names)
    shards = []
    for first in range(0, len(names), shard_rows):
        file = f"moments-{len(shards):05d}.npy"
        count = min(shard_rows, len(names) - first)
        header = {"descr": dtype.str, "fortran_order": False, "shape": (count, *row_shape)}
        with _written_aside(dest / file) as shard:
            np.lib.format.write_array_header_1_0(shard, header)
            written = 0
            while written < count:
                rows = next(pieces)
                shard.write(rows.tobytes())
                written += len(rows)
        shards.append({"file": file, "count": count, "sha256": shard.hexdigest()})
    for rows in pieces:
        raise ValueError(f"moments of {len(rows)} samples more than the {len(names)} names")
    _write(dest / "labels.npy", _labels_bytes(labels))
    _write(dest / "names.json", _names_bytes(names))
    _write(dest / MANIFEST, json.dumps(manifest | {"shards": shards}, indent=2, ensure_ascii=False).encode())


def _pieces_within_shards(
    batches: Iterable[np.ndarray],
    row_shape: tuple[int, ...],
    dtype: np.dtype,
    shard_rows: int,
    names: list[str],
) -> Iterator[np.ndarray]:
    """The batches in the stored dtype, cut so that no piece reaches across the end of a shard."""
    done = 0
    for batch in batches:
        if batch.shape[1:] != row_shape:
            raise ValueError(f"moments of shape {batch.shape[1:]} given, the manifest says {row_shape}")
        with np.errstate(over="ignore"):  # reported just below, with the image's name
            rows = batch.astype(dtype)
        finite = np.isfinite(rows).reshape(len(rows), -1).all(axis=1)
        if not finite.all():
            raise UserError(
                f"the moments of {names[done + int(finite.argmin())]} are not finite in {dtype}: "
                "give --dtype float32, or another --vae"
            )
        while len(rows):
            room = shard_rows - done % shard_rows
            yield rows[:room]
            done += len(rows[:room])
            rows = rows[room:]
    if done != len(names):
        raise ValueError(f"moments of {done} samples given for {len(names)} names")


def _clear_unfinished(dest: Path) -> None:
    """Make folder `dest` ready: create it, or empty it of what an encoding that was cut short left there."""
    if dest.exists() and not dest.is_dir():
        raise UserError(f"{dest} is a file, expected a folder: change --dest")
    dest.mkdir(parents=True, exist_ok=True)
    leftovers = sorted(dest.iterdir())
    for file in leftovers:
        if not UNFINISHED.fullmatch(file.name):
            raise UserError(f"{dest} holds {file.name}, not left by an unfinished encoding: change --dest")
    for file in leftovers:
        file.unlink()
