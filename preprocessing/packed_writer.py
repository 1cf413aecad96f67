"""Writes packed latents (`storage/packed.py`) and packed features (`storage/features.py`); a killed command continues.

Samples are written in units of up to 512, by any number of processes, which are joined to the large files at the end.
Until then the dataset's folder also holds

    unfinished/job.json              what is being made: the manifest without its shards
    unfinished/unit-00012.npy        samples 12 * 512 to 13 * 512, complete
    unfinished/all-units             an empty file: all units are written, so units in finished shards may be deleted
    unfinished/moments-00000.json    checksums of a shard that is being finished

The manifest is written last and makes it a dataset. A file under its own name is always complete.
"""

import hashlib
import io
import json
import shutil
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from common.errors import UserError
from common.files import first_difference, hashed_aside, json_bytes, real_place, write_file
from preprocessing.destination import files_in
from storage.features import FEATURES
from storage.file_store import load_npy
from storage.packed import FORMAT, FORMAT_VERSION, LATENTS, MANIFEST, read_manifest

SHARD_BYTES = 2**31  # few files, each still quick to copy and check
UNIT_ROWS = 512  # samples that a kill costs at most, per process
UNIT_BYTES = 2**26  # memory per process: fewer rows per unit if the images are stored too
LAYOUTS = {layout.format: layout for layout in (LATENTS, FEATURES)}


def packed_manifest(
    names: list[str],
    labels: np.ndarray,
    class_names: list[str],
    *,
    resolution: int,
    latent_shape: tuple[int, int, int],
    dtype: str,
    vae: str,
    vae_sha256: str | None,
    scaling_factor: float,
    flip: bool = False,
    images: bool = False,
    source_sha256: str | None = None,
) -> dict[str, Any]:
    """The manifest of packed latents without shards and checksums: all that is known before the first latent.

    Args:
        names, labels, class_names: of the N samples, labels (N,) ints.
        resolution: side of the images in pixels.
        latent_shape: (2C, h, w), of the moments.
        dtype: "float16" or "float32".
        vae, vae_sha256, scaling_factor: name, checksum of the weights and config of the VAE.
        flip: whether each sample has the moments of its mirror image too.
        images: whether each sample has its uint8 pixels too.
        source_sha256: identifies the source's files, see `source_identity`.
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
        "flip": flip,
        "images": images,
        "vae": vae,
        "vae_sha256": vae_sha256,
        "scaling_factor": scaling_factor,
        "labels": {"file": "labels.npy", "sha256": hashlib.sha256(_npy(labels.astype(np.int64))).hexdigest()},
        "names": {"file": "names.json", "sha256": hashlib.sha256(json_bytes(names)).hexdigest()},
        "source_sha256": source_sha256,
    }


def features_manifest(
    names: list[str],
    *,
    resolution: int,
    tokens: int,
    width: int,
    dtype: str,
    encoder: str,
    weights_sha256: str,
    precision: str = "no",
    flip: bool = False,
    source_sha256: str | None = None,
) -> dict[str, Any]:
    """The manifest of packed features without shards and checksums.

    Args:
        tokens, width: T and z of the features (T, z) of an image.
        encoder, weights_sha256, precision: name, checksum and precision of the encoder.
        names, resolution, dtype, flip, source_sha256: as in `packed_manifest`.
    """
    return {
        "format": FEATURES.format,
        "version": FEATURES.version,
        "count": len(names),
        "resolution": resolution,
        "tokens": tokens,
        "width": width,
        "dtype": dtype,
        "flip": flip,
        "encoder": encoder,
        "weights_sha256": weights_sha256,
        "precision": precision,
        "names": {"file": "names.json", "sha256": hashlib.sha256(json_bytes(names)).hexdigest()},
        "source_sha256": source_sha256,
    }


class PackedJob:
    """An unfinished packed dataset in folder `dest`, which several processes may write.

    `begin` makes or continues one, `join` opens the one that another process began. Each process writes its
    `unwritten_units`; when all have, one process calls `finish`.
    """

    def __init__(self, dest: str | Path) -> None:
        self.dest = Path(dest)
        self.work = self.dest / "unfinished"
        self.manifest, self.unit_rows = _read_job(self.dest)
        self.names: list[str] = json.loads((self.dest / "names.json").read_text(encoding="utf-8"))
        self.row_type = row_type(self.manifest)

    @classmethod
    def begin(
        cls, dest: str | Path, manifest: dict[str, Any], names: list[str], labels: np.ndarray | None = None
    ) -> "PackedJob | None":
        """Begin or continue the dataset that `manifest` describes.

        Args:
            dest: its folder.
            manifest: from `packed_manifest` or `features_manifest`.
            names: of the N samples.
            labels: (N,) ints, for packed latents.

        Returns:
            the job; None if the dataset is complete.

        Raises:
            UserError: if `dest` holds something else, or damaged files; nothing there is changed.
        """
        dest = real_place(dest)
        work, job = dest / "unfinished", dest / "unfinished" / "job.json"
        if dest.exists() and not dest.is_dir():
            raise UserError(f"{dest} is a file, expected a folder: change --dest")
        if (dest / MANIFEST).is_file():
            _check_same(manifest, read_manifest(dest, LAYOUTS[manifest["format"]]), dest, "complete dataset")
            shutil.rmtree(work, ignore_errors=True)  # after a kill between the manifest and this line
            return None
        if job.is_file():
            _check_same(manifest, _read_job(dest)[0], dest, "dataset in the making")
        else:
            for file in files_in(dest):
                if file != work:
                    raise UserError(f"{dest} holds {file.name}, which no unfinished dataset does: change --dest")
            try:
                work.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"cannot make folder {dest} ({error.strerror}): change --dest") from error
            unit_rows = max(1, min(UNIT_ROWS, UNIT_BYTES // row_type(manifest).itemsize))
            write_file(job, json_bytes({"unit_rows": unit_rows, "manifest": manifest}))
        write_file(dest / "names.json", json_bytes(names), work)
        if labels is not None:
            write_file(dest / "labels.npy", _npy(labels.astype(np.int64)), work)
        return cls(dest)

    @classmethod
    def join(cls, dest: str | Path) -> "PackedJob | None":
        """The job that another process has begun in `dest`; None if the dataset is complete."""
        return None if (Path(dest) / MANIFEST).is_file() else cls(dest)

    def __len__(self) -> int:
        return len(self.names)

    def _unit_file(self, unit: int) -> Path:
        return self.work / f"unit-{unit:05d}.npy"

    def unwritten_units(self, rank: int = 0, world: int = 1) -> list[int]:
        """The units that process `rank` of `world` still has to write."""
        if (self.work / "all-units").exists():
            return []
        units = range(rank, -(-len(self) // self.unit_rows), world)
        return [unit for unit in units if not self._unit_file(unit).exists()]

    def rows_of(self, unit: int) -> range:
        """The samples of a unit."""
        return range(unit * self.unit_rows, min((unit + 1) * self.unit_rows, len(self)))

    def write_unit(self, unit: int, values: np.ndarray, images: np.ndarray | None = None) -> None:
        """Write one unit of n samples.

        Args:
            unit: its number.
            values: moments (n, 2C, h, w) or features (n, T, z); with flips both views of a sample, (n, 2, ...).
            images: uint8 (n, H, W, 3), if they are stored.

        Raises:
            UserError: if values are not finite in the stored dtype, naming the sample, or for a full disk.
        """
        rows, field = np.empty(len(self.rows_of(unit)), self.row_type), self.row_type.names[0]
        with np.errstate(over="ignore"):  # reported just below, with the sample's name
            rows[field] = values.reshape(rows[field].shape)
        finite = np.isfinite(rows[field]).reshape(len(rows), -1).all(axis=1)
        if not finite.all():
            name = self.names[self.rows_of(unit)[int(finite.argmin())]]
            remedy = f"--dtype float32, or another {'--vae' if field == 'moments' else '--encoder'}"
            raise UserError(f"the {field} of {name} are not finite in {self.manifest['dtype']}: give {remedy}")
        if images is not None:
            rows["images"] = images
        write_file(self._unit_file(unit), _npy(rows))

    def finish(self, shard_rows: int | None = None) -> None:
        """Join the units to shards of `shard_rows` samples (default: 2 GiB of them), then write the manifest."""
        unwritten = self.unwritten_units()
        if unwritten:
            raise ValueError(f"units {unwritten[:5]}... are not written yet")
        write_file(self.work / "all-units", b"")
        manifest, checksums = dict(self.manifest), []
        with tqdm(total=len(self.row_type.names) * len(self), desc="write shards", unit="row") as bar:
            for field in self.row_type.names:
                shards = self._finish_field(field, shard_rows, bar)
                manifest["image_shards" if field == "images" else "shards"] = [
                    {key: shard[key] for key in ("file", "count", "sha256")} for shard in shards
                ]
                checksums.append([checksum for shard in shards for checksum in shard["crc32"]])
        content = _npy(np.array(checksums, np.uint32).T)
        manifest["checksums"] = {"file": "checksums.npy", "sha256": hashlib.sha256(content).hexdigest()}
        write_file(self.dest / "checksums.npy", content, self.work)
        write_file(self.dest / MANIFEST, json_bytes(manifest, indent=2), self.work)
        shutil.rmtree(self.work)

    def _finish_field(self, field: str, shard_rows: int | None, bar: tqdm) -> list[dict[str, Any]]:
        """All shards of one field, with their checksums."""
        shard_rows = shard_rows or max(1, SHARD_BYTES // self.row_type[field].itemsize)
        shards = []
        for number, first in enumerate(range(0, len(self), shard_rows)):
            place = self.dest / f"{field}-{number:05d}.npy"
            record = self.work / f"{place.stem}.json"
            rows = range(first, min(first + shard_rows, len(self)))
            if not place.exists():
                self._write_shard(field, rows, place, record)
            if field == self.row_type.names[-1]:  # all fields of these rows are in shards now
                for unit in range(first // self.unit_rows, -(-rows.stop // self.unit_rows)):
                    if self.rows_of(unit).stop <= rows.stop:
                        self._unit_file(unit).unlink(missing_ok=True)
            shards.append(json.loads(record.read_text()))
            bar.update(len(rows))
        return shards

    def _write_shard(self, field: str, rows: range, place: Path, record: Path) -> None:
        """Write samples `rows` of a field to `place`, after their checksums to `record`."""
        checksums = []
        with hashed_aside(place, self.work) as shard:
            shard.write(shard_header(self.manifest, field, len(rows)))
            for unit in range(rows.start // self.unit_rows, -(-rows.stop // self.unit_rows)):
                unit_rows = self.rows_of(unit)
                here = slice(max(rows.start - unit_rows.start, 0), rows.stop - unit_rows.start)
                units = load_npy(self._unit_file(unit), f"delete {self.dest} and begin again")
                content = np.ascontiguousarray(units[field][here])
                checksums += [zlib.crc32(row) for row in content]
                shard.write(content.data)
            entry = {"file": place.name, "count": len(rows), "sha256": shard.hexdigest(), "crc32": checksums}
            write_file(record, json_bytes(entry))


def write_packed(
    dest: str | Path,
    manifest: dict[str, Any],
    batches: Iterable[np.ndarray],
    names: list[str],
    labels: np.ndarray,
    shard_rows: int | None = None,
) -> None:
    """Write packed latents without images from moments in memory.

    Args:
        dest: folder to make.
        manifest: from `packed_manifest`, for these `names` and `labels`.
        batches: the moments of all N samples in order, split in any way.
        names: of the samples.
        labels: (N,) ints.
        shard_rows: samples per shard (default: 2 GiB of them).
    """
    job = PackedJob.begin(dest, manifest, names, labels)
    if job is None:
        return
    moments = np.concatenate(list(batches))
    if len(moments) != len(names):
        raise ValueError(f"moments of {len(moments)} samples given for {len(names)} names")
    for unit in job.unwritten_units():
        rows = job.rows_of(unit)
        job.write_unit(unit, moments[rows.start : rows.stop])
    job.finish(shard_rows)


def row_type(manifest: dict[str, Any]) -> np.dtype:
    """The type of one sample in a unit: moments or features of one or two views, and pixels if they are stored."""
    views, dtype = 2 if manifest["flip"] else 1, np.dtype(manifest["dtype"])
    if manifest["format"] == FEATURES.format:
        return np.dtype([("features", dtype, (views, manifest["tokens"], manifest["width"]))])
    fields = [("moments", dtype, (views, *manifest["latent_shape"]))]
    if manifest["images"]:
        fields.append(("images", np.dtype(np.uint8), (manifest["resolution"], manifest["resolution"], 3)))
    return np.dtype(fields)


def shard_header(manifest: dict[str, Any], field: str, count: int) -> bytes:
    """The `.npy` header of a shard of `count` samples."""
    field_type = row_type(manifest)[field]
    row_shape = field_type.shape if field == "images" or manifest["flip"] else field_type.shape[1:]
    buffer = io.BytesIO()
    header = {"descr": field_type.base.str, "fortran_order": False, "shape": (count, *row_shape)}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue()


def _read_job(dest: Path) -> tuple[dict[str, Any], int]:
    """Manifest and rows per unit of the job in `dest`; `UserError` if its file is damaged."""
    file = dest / "unfinished" / "job.json"
    try:
        job = json.loads(file.read_text(encoding="utf-8"))
        manifest, unit_rows = dict(job["manifest"]), job["unit_rows"]
        if type(unit_rows) is not int or unit_rows < 1:
            raise ValueError(f"unit_rows is {unit_rows!r}")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged ({error!r}): delete {dest} and give the same command again") from error
    return manifest, unit_rows


def _check_same(wanted: dict[str, Any], found: dict[str, Any], dest: Path, what: str) -> None:
    """Raise `UserError` unless the manifest `found` in `dest` is the `wanted` one; `what` says if it is complete."""
    # A VAE's path may differ if there is a checksum of its weights.
    key = first_difference(wanted, found, () if wanted.get("vae_sha256") is None else ("vae",))
    if key == "source_sha256":
        raise UserError(
            f"{dest} holds a {what} that was begun from other images than the source holds now: bring those back, or "
            "delete it, or change --dest"
        )
    if key is not None:
        raise UserError(
            f"{dest} holds a {what}, but with {key} {str(found.get(key))[:80]}, where this command makes "
            f"{str(wanted[key])[:80]}: delete it or change --dest"
        )


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()
