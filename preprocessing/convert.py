"""Images of any kind and size -> square RGB pictures in the layout of REPA's tool.

    00000/img00000000.png    uncompressed, named by the position of its original among the source's sorted images
    ...
    report.json              how many came in and out, of which kinds, and what was left out, each with its reason
    dataset.json             {"labels": [["00000/img00000000.png", 0], ...], "class_names": [...], "conversion": {...}}

All is written to `.NAME.partial/` beside the destination, which is renamed when complete. A destination folder that
exists may be a mount, which a rename cannot replace: then all is written to `.partial/` inside it. The file
`progress.jsonl` there records what is done: a line of settings, then one line per chunk of images.
"""

import hashlib
import io
import json
import os
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from common.errors import UserError
from common.files import disk_errors_as_user_error, first_difference, only_writer, real_place
from preprocessing.destination import files_in, put_in_place
from preprocessing.growing_zip import Entry, GrowingZip
from preprocessing.images import warn_of_empty_classes
from preprocessing.picture_source import PictureSource, list_pictures
from preprocessing.pixels import TRANSFORMS
from preprocessing.workers import worker_results
from storage.file_store import LABELS, BadFile, FileStore
from storage.image_files import read_rgb

CHUNK = 32  # images: little work is lost by a kill, and little memory is used on the way to a zip
REPORT = "report.json"
PROGRESS = "progress.jsonl"
Line = dict[str, Any]  # of the progress file: chunk, kinds, left_out and, for a zip, entries


def convert(
    source: str | Path,
    dest: str | Path,
    resolution: int,
    transform: str = "center-crop-dhariwal",
    num_workers: int = 2,
) -> dict[str, Any] | None:
    """Crop and scale images to squares of one size, or continue that work.

    Args:
        source: a folder, zip or tar (also a folder or tar of tars); classes are its folders, or as in `dataset.json`.
        dest: a folder, or a zip if it ends in `.zip`; it may be a link, or an empty folder.
        resolution: side in pixels.
        transform: of `TRANSFORMS`.
        num_workers: processes that convert.

    Returns:
        the report, which lists the images that could not be read; None if `dest` was complete already.

    Raises:
        UserError: for a source without images or with contradicting labels, if `dest` holds something else or is being
            written by another command, and for a full disk; what is written stays, and the same command continues.
    """
    source, dest = Path(source), real_place(dest).absolute()
    if source.resolve() in (dest.resolve(), *dest.resolve().parents):
        raise UserError(f"--dest {dest} lies in --source {source}: give a place outside it")
    if _is_zip(dest) and dest.is_dir():
        raise UserError(f"--dest {dest} is a folder, expected a zip file to make: change --dest")
    with only_writer(dest):
        pictures = list_pictures(source)
        settings = _settings(pictures, resolution, transform)
        beside, report = dest.with_name(f".{dest.name}.partial"), None
        aside = dest / ".partial" if dest.is_dir() else beside
        moving_in = (aside / PROGRESS).is_file() and not (dest / LABELS).exists()
        if dest.is_file() or (files_in(dest) and not moving_in):
            _check_same(settings, _finished_settings(dest), dest)
        else:
            with disk_errors_as_user_error(dest):
                report = _convert_chunks(pictures, settings, dest, aside, num_workers)
                _warn_of_empty_classes(pictures, report)
        for leftover in {aside, beside}:
            shutil.rmtree(leftover, ignore_errors=True)
    return report


def _settings(pictures: PictureSource, resolution: int, transform: str) -> dict[str, Any]:
    """What a conversion depends on."""
    listing = [pictures.images, pictures.labels, pictures.class_names, list(pictures.others)]
    return {
        "resolution": resolution,
        "transform": transform,
        "files": len(pictures.images) + len(pictures.others),
        "listing_sha256": hashlib.sha256(json.dumps(listing).encode()).hexdigest(),
    }


def _finished_settings(dest: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(FileStore(dest).read(LABELS))["conversion"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{dest} is there and is no finished conversion: remove it or change --dest") from error


def _check_same(wanted: dict[str, Any], found: dict[str, Any], place: Path) -> None:
    if (key := first_difference(wanted, found)) is not None:
        raise UserError(
            f"{place} was made with {key} {found.get(key)}, where this command has {wanted[key]}: "
            "remove it or change --dest"
        )


def describe(report: dict[str, Any], dest: str | Path) -> str:
    """The report in a few lines."""
    left_out = report["left_out"]
    lines = [f"{dest}: {report['converted']} images; {len(left_out)} of {report['files']} files left out"]
    lines += [f"  {name}: {reason}" for name, reason in list(left_out.items())[:10]]
    if len(left_out) > 10:
        lines.append(f"  ... the rest in its {REPORT}")
    return "\n".join(lines)


# ---- one chunk, in a worker


def output_name(position: int) -> str:
    """File name of the image made from the one at this position of the sorted source."""
    return f"{position // 1000:05d}/img{position:08d}.png"


class _Chunks:
    """Called with k, converts chunk k of the images: its progress line, and a (name, PNG content) per image.

    With `folder` the worker writes the images there and returns none. Errors of the user's are returned: raised, they
    would count as a failure of the worker.
    """

    def __init__(self, pictures: PictureSource, resolution: int, transform: str, folder: Path | None) -> None:
        self.store, self.images, self.folder = pictures.store, pictures.images, folder
        self.resolution, self.transform = resolution, transform

    def __len__(self) -> int:
        return -(-len(self.images) // CHUNK)

    def __call__(self, chunk: int) -> tuple[Line, list[tuple[str, bytes]]] | Exception:
        kinds, left_out, results = Counter(), {}, []
        for position in range(chunk * CHUNK, min((chunk + 1) * CHUNK, len(self.images))):
            name = self.images[position]
            try:
                content, kind = self._png(name)
            except BadFile as error:
                left_out[name] = _reason(error)
                continue
            except UserError as error:  # the disk failed, not the image
                return UserError(
                    f"{self.store.path / name} cannot be read any more ({error.__cause__ or error}): bring it back "
                    "and give the same command again: it continues"
                )
            except MemoryError:
                return UserError(f"no memory for {name}: give the same command again, with fewer --num-workers")
            kinds[kind] += 1
            results.append((output_name(position), content))
        if self.folder is not None:
            try:
                self._write(results)
            except OSError as error:
                return error
            results = []
        return {"chunk": chunk, "kinds": kinds, "left_out": left_out}, results

    def _png(self, name: str) -> tuple[bytes, str]:
        original, buffer = self.store.read(name), io.BytesIO()
        try:
            image, kind = read_rgb(original)
            TRANSFORMS[self.transform](image, self.resolution).save(buffer, "PNG", compress_level=0)
        except MemoryError:
            raise
        except Exception as error:  # decoders raise all kinds, and one bad image must not stop the others
            raise BadFile(_reason(error)) from error
        return buffer.getvalue(), kind

    def _write(self, results: list[tuple[str, bytes]]) -> None:
        for name, content in results:
            place = self.folder / name
            place.parent.mkdir(exist_ok=True)
            place.write_bytes(content)


def _reason(error: Exception) -> str:
    """What is wrong with an image, without memory addresses: the same in every run."""
    return re.sub(r" <[^>]* at 0x\w+>", "", str(error)) or type(error).__name__


# ---- all chunks


def _convert_chunks(
    pictures: PictureSource, settings: dict[str, Any], dest: Path, aside: Path, num_workers: int
) -> dict[str, Any]:
    """Convert the remaining chunks, move the result to `dest`, and return the report."""
    aside.mkdir(exist_ok=True)
    progress = aside / PROGRESS
    lines = _read_progress(progress, settings)
    content = aside / "content"
    if to_zip := _is_zip(dest):
        archive = GrowingZip(content, _entries(lines))
    else:
        content.mkdir(exist_ok=True)
    chunks = _Chunks(pictures, settings["resolution"], settings["transform"], None if to_zip else content)
    left = range(len(lines), len(chunks))
    with (
        worker_results(chunks, left, num_workers) as converted,
        progress.open("a") as record,
        tqdm(desc="convert", total=len(pictures.images), unit="img") as bar,
    ):
        bar.update(min(len(lines) * CHUNK, len(pictures.images)))
        for line, results in converted:
            if to_zip:
                line["entries"] = [archive.add(name, png) for name, png in results]
                archive.flush()
            record.write(json.dumps(line) + "\n")
            record.flush()
            lines.append(line)
            bar.update(sum(line["kinds"].values()) + len(line["left_out"]))
    report = _report(pictures, lines)
    texts = {REPORT: json.dumps(report, indent=1), LABELS: json.dumps(_labels(pictures, report, settings))}
    if to_zip:
        archive.finish(_entries(lines), texts)
    else:
        for name, text in texts.items():
            (content / name).write_text(text)
    put_in_place(content, dest)
    return report


def _is_zip(dest: Path) -> bool:
    return dest.suffix.lower() == ".zip"


def _read_progress(file: Path, settings: dict[str, Any]) -> list[Line]:
    """The lines of the chunks that are done, always the first ones; starts the file if it does not exist."""
    written = file.read_bytes() if file.exists() else b""
    whole = written[: written.rfind(b"\n") + 1]  # a kill or a full disk may cut the last line short
    if not whole:
        whole = (json.dumps(settings) + "\n").encode()
        file.write_bytes(whole)
    else:
        os.truncate(file, len(whole))
    try:
        first, *lines = map(json.loads, whole.splitlines())
        if [line["chunk"] for line in lines] != list(range(len(lines))):
            raise ValueError("chunks are missing")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged ({error}): remove its folder and give the same command again") from error
    _check_same(settings, first, file.parent)
    return lines


def _entries(lines: list[Line]) -> list[Entry]:
    return [Entry(*entry) for line in lines for entry in line["entries"]]


def _report(pictures: PictureSource, lines: list[Line]) -> dict[str, Any]:
    """The report: every file of the source is either counted as converted or listed as left out."""
    kinds, left_out = Counter(), {}
    for line in lines:
        kinds.update(line["kinds"])
        left_out.update(line["left_out"])
    if not kinds:
        name, reason = next(iter(left_out.items()))
        raise UserError(f"none of {len(left_out)} images can be converted, such as {name} ({reason})")
    left_out |= pictures.others
    return {
        "files": len(pictures.images) + len(pictures.others),
        "converted": kinds.total(),
        "kinds": dict(sorted(kinds.items())),
        "left_out": left_out,
    }


def _labels(pictures: PictureSource, report: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    kept = [position for position, name in enumerate(pictures.images) if name not in report["left_out"]]
    labels = [[output_name(position), pictures.labels[position]] for position in kept]
    return {"labels": labels, "class_names": pictures.class_names, "conversion": settings}


def _warn_of_empty_classes(pictures: PictureSource, report: dict[str, Any]) -> None:
    labels = [
        label for name, label in zip(pictures.images, pictures.labels, strict=True) if name not in report["left_out"]
    ]
    warn_of_empty_classes(np.array(labels), pictures.class_names)
