"""The images of a folder, zip or tar, and their classes."""

import zipfile
from itertools import takewhile
from pathlib import Path
from posixpath import splitext
from typing import NamedTuple

from common.errors import UserError
from preprocessing.tar_store import TarStore, is_tar
from storage.file_store import HIDDEN, LABELS, FileStore, read_labels
from storage.image_files import IMAGE_SUFFIXES

NO_IMAGE = "no image, by its name"


class PictureSource(NamedTuple):
    """The images in `store`, sorted by name, their classes, and the other files there."""

    store: FileStore | TarStore
    images: list[str]
    labels: list[int]
    class_names: list[str]
    others: dict[str, str]  # files that are no images, sorted by name, and why


def list_pictures(path: Path) -> PictureSource:
    """List the images of a folder, zip or tar with their classes: those of its `dataset.json`, or else its folders.

    A tar, or a folder with tars in it, is read by `TarStore`; for the rest see `list_stored`.
    """
    return list_stored(_open(path))


def list_stored(store: FileStore | TarStore) -> PictureSource:
    """List the images of a store with their classes, for `convert` and for all that reads its results.

    Folders that all images share are not classes: in `train/cat/1.png`, `train/dog/2.png` the classes are cat and dog.
    Images of a single folder are one class. Hidden and system files are passed over, except images that
    `dataset.json` lists.

    Raises:
        UserError: if there are no images, an image lies beside the class folders, `dataset.json` and the files
            disagree, or a folder cannot be read.
    """
    files = store.files()
    label_of, class_names = read_labels(store) if LABELS in files else ({}, [])
    images = sorted(
        name for name, why in files.items() if _is_image(name) and (why is None or (why == HIDDEN and name in label_of))
    )
    if not images:
        raise UserError(_no_images(store, files))
    if LABELS in files:
        labels = _listed_labels(store, images, label_of)
    else:
        for name, passed_over in files.items():
            if name.endswith(f"/{LABELS}") and passed_over is None:  # the folders above it would become classes
                raise UserError(_inner_labels(store, name))
        labels, class_names = _folder_classes(store.path, images)
    others = sorted(files.keys() - set(images) - {LABELS})
    return PictureSource(store, images, labels, class_names, {name: files[name] or NO_IMAGE for name in others})


def _is_image(name: str) -> bool:
    return splitext(name)[1].lower() in IMAGE_SUFFIXES


def _no_images(store: FileStore | TarStore, files: dict[str, str | None]) -> str:
    hidden = next((name for name in sorted(files) if _is_image(name)), None)
    passed_over = f", but for hidden or system ones such as {hidden}" if hidden else ""
    return f"no images ({', '.join(IMAGE_SUFFIXES)}) below {store.path}{passed_over}: change --source"


def _inner_labels(store: FileStore | TarStore, name: str) -> str:
    folder = "the folder that it describes"
    remedy = f"give {folder}" if store.path.is_dir() else f"unpack {store.path.name} and give {folder}"
    return f"{store.path / name} is below --source: {remedy}"


def _open(path: Path) -> FileStore | TarStore:
    if path.is_file() and not zipfile.is_zipfile(path):
        return TarStore(path)
    store = FileStore(path)
    return TarStore(path) if path.is_dir() and any(map(is_tar, store.names())) else store


def _listed_labels(store: FileStore | TarStore, images: list[str], label_of: dict[str, int]) -> list[int]:
    for name in sorted(label_of.keys() ^ set(images)):
        problem = "lists no label for" if name not in label_of else "lists a missing image,"
        raise UserError(f"{store.path / LABELS} {problem} {name}: make images and labels agree")
    return [label_of[name] for name in images]


def _folders_of(name: str) -> list[str]:
    """The folders above an image. Some programs unpack a zip from Windows to one folder of files `cat\\0.png`."""
    *folders, file = name.split("/")
    return folders + file.split("\\")[:-1]


def _folder_classes(path: Path, images: list[str]) -> tuple[list[int], list[str]]:
    folders = [_folders_of(name) for name in images]
    ends = zip(min(folders), max(folders), strict=False)
    shared = [first for first, _ in takewhile(lambda pair: pair[0] == pair[1], ends)]
    if all(folder == shared for folder in folders):
        return [0] * len(images), [shared[-1] if shared else path.absolute().stem]
    if shared in folders:
        name = images[folders.index(shared)]
        raise UserError(f"{path / name} lies beside the class folders: move it into one")
    class_names = sorted({folder[len(shared)] for folder in folders})
    number = {name: label for label, name in enumerate(class_names)}
    return [number[folder[len(shared)]] for folder in folders], class_names
