"""What there is to convert: the images of a folder, zip or tar, and their classes."""

import zipfile
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

from errors import UserError
from file_layout import IMAGE_SUFFIXES, LABELS, FileStore, read_labels
from preprocessing.tar_store import TarStore, is_tar


class PictureSource(NamedTuple):
    """The images in `store`, sorted by name, their classes, and what else lies there."""

    store: FileStore | TarStore
    images: list[str]
    labels: list[int]
    class_names: list[str]
    others: list[str]  # files that are no images by their names


def list_pictures(path: Path) -> PictureSource:
    """List the images of a folder, zip or tar with their classes: those of its `dataset.json`, or else its folders.

    A tar, and a folder in which tars lie, is read as `TarStore` says; for the rest see `list_stored`.
    """
    return list_stored(_open(path))


def list_stored(store: FileStore | TarStore) -> PictureSource:
    """List the images of a store with their classes: what `convert` and all that reads its results take for images.

    Folders that all images share are no classes: in `train/cat/1.png`, `train/dog/2.png` the classes are cat and dog.
    Images of one folder only are one class. Raises `UserError` if there are no images, an image lies beside the
    class folders, or `dataset.json` and the files disagree.
    """
    files = sorted(store.names())
    images = [name for name in files if _is_image(name)]
    if not images:
        raise UserError(f"no images ({', '.join(IMAGE_SUFFIXES)}) below {store.path}: change --source")
    if LABELS in files:
        files.remove(LABELS)
        labels, class_names = _listed_classes(store, images)
    else:
        for name in files:
            if name.endswith(f"/{LABELS}"):  # the folders would be taken for classes
                raise UserError(f"{store.path / name} is below --source: give the folder that it describes")
        labels, class_names = _folder_classes(store.path, images)
    return PictureSource(store, images, labels, class_names, sorted(set(files) - set(images)))


def _is_image(name: str) -> bool:
    place = Path(name)
    is_hidden = place.name.startswith(".")  # macOS hides "._1.jpg" beside "1.jpg"
    return place.suffix.lower() in IMAGE_SUFFIXES and not is_hidden


def _open(path: Path) -> FileStore | TarStore:
    if path.is_file() and not zipfile.is_zipfile(path):
        return TarStore(path)
    store = FileStore(path)
    return TarStore(path) if path.is_dir() and any(map(is_tar, store.names())) else store


def _listed_classes(store: FileStore | TarStore, images: list[str]) -> tuple[list[int], list[str]]:
    label_of, class_names = read_labels(store)
    for name in sorted(label_of.keys() ^ set(images)):
        problem = "lists no label for" if name not in label_of else "lists a missing image,"
        raise UserError(f"{store.path / LABELS} {problem} {name}: make images and labels agree")
    return [label_of[name] for name in images], class_names


def _folder_classes(path: Path, images: list[str]) -> tuple[list[int], list[str]]:
    folders = [name.split("/")[:-1] for name in images]
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
