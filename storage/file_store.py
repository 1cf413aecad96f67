"""Folders and zips of one file a sample with labels in a `dataset.json`: images, and the official release's latents."""

import errno
import io
import json
import lzma
import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from posixpath import normpath, splitext

import numpy as np

from common.errors import UserError
from storage.image_files import IMAGE_SUFFIXES, read_rgb

LABELS = "dataset.json"
MAX_CLASSES = 2**20  # far above any dataset's; a damaged label would have names made for all below it

SYSTEM_NAMES = {  # in lower case; what begins with a dot is hidden anyway, such as .DS_Store or .ipynb_checkpoints
    "#recycle",
    "#snapshot",
    "$recycle.bin",
    "@eadir",
    "@recently-snapshot",
    "@recycle",
    "@synoresource",
    "@tmp",
    "__macosx",
    "desktop.ini",
    "ehthumbs.db",
    "icon\r",
    "lost+found",
    "network trash folder",
    "system volume information",
    "temporary items",
    "thumbs.db",
}
HIDDEN = "a hidden or system file"  # why a file is passed over
SPECIAL = "a pipe, socket or device"  # reading it might wait for ever

DAMAGE = (  # all that reading a zip raises for bytes that are not what they were, or that it cannot take
    OSError,
    zipfile.BadZipFile,
    RuntimeError,
    EOFError,
    ValueError,
    struct.error,
    zlib.error,
    lzma.LZMAError,
)


class BadFile(UserError):
    """One file has no usable content, however often it is read; the others beside it may be whole."""


class UnreadableFolder(UserError):
    """The system does not say what a folder holds: what is there would be lost without a word."""


def is_hidden(name: str) -> bool:
    """Whether a file or folder, or one of the folders it lies in, is hidden or of an operating system."""
    return any(part.startswith(".") or part.lower() in SYSTEM_NAMES for part in name.replace("\\", "/").split("/"))


def plain_name(name: str) -> str:
    """The name of an archive's entry with forward slashes, whoever wrote it: `data\\cat/0.png` is `data/cat/0.png`."""
    return normpath(name.replace("\\", "/")).lstrip("/")


def top_folder(names: Iterable[str]) -> str:
    """The folder, such as `vae-sd/`, in which `dataset.json` and all but hidden files lie; `""` if there is none."""
    names = list(names)
    tops = [name.removesuffix(LABELS) for name in names if name.endswith(f"/{LABELS}") and not is_hidden(name)]
    top = min(tops, key=len, default="")
    return top if all(name.startswith(top) or is_hidden(name) for name in names) else ""


class FileStore:
    """The files of folder `path`, or of zip file `path`, by their names inside it (with forward slashes).

    A zip whose `dataset.json` lies with all else in one folder is read as that folder's zip would be. May be used from
    many threads, and from processes forked or sent it: each opens the zip for itself.

    Raises `UserError` if there is nothing at `path`, or it is no folder and no zip file, or a zip with two files of
    one name.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._archive: tuple[int, zipfile.ZipFile, dict[str, zipfile.ZipInfo]] | None = (
            None  # of the process of this id
        )
        if not self.path.exists():
            raise UserError(f"no folder or zip file {self.path}: give another path")
        if not self.path.is_dir():
            self._opened()

    def _opened(self) -> tuple[zipfile.ZipFile, dict[str, zipfile.ZipInfo]]:
        """The zip, opened by this process, and its files by name."""
        if self._archive is None or self._archive[0] != os.getpid():
            try:
                archive = zipfile.ZipFile(self.path)
            except (OSError, zipfile.BadZipFile) as error:
                raise UserError(
                    f"{self.path} is no folder and no readable zip file ({error}): copy it again"
                ) from error
            self._archive = os.getpid(), archive, _members(archive, self.path)
        return self._archive[1:]

    def __reduce__(self) -> tuple:
        return FileStore, (self.path,)

    def files(self) -> dict[str, str | None]:
        """All files by name, in no particular order, and why one is passed over, None if it is not.

        A folder is walked, which takes a while for millions of files. Raises `UserError` for a folder that cannot be
        read.
        """
        if self.path.is_dir():
            return _walked(self.path)
        return {name: HIDDEN if is_hidden(name) else None for name in self._opened()[1]}

    def names(self) -> list[str]:
        """All files that are not passed over, in no particular order."""
        return [name for name, passed_over in self.files().items() if passed_over is None]

    def has(self, name: str) -> bool:
        """Whether there is a file of that name."""
        if self.path.is_dir():
            return (self.path / name).is_file()
        return name in self._opened()[1]

    def size(self, name: str) -> int | None:
        """Bytes of one file, None if it is not there; `UserError` if the system does not say."""
        if not self.path.is_dir():
            member = self._opened()[1].get(name)
            return None if member is None else member.file_size
        try:
            return (self.path / name).stat().st_size
        except FileNotFoundError:
            return None
        except OSError as error:
            place = self.path / name
            raise UserError(f"{place} cannot be read ({error.strerror or error}): make it readable") from error

    def read(self, name: str) -> bytes:
        """The content of one file; `UserError` names it if it is missing, unreadable or outside the store, and as
        `BadFile` if it is damaged within the zip, encrypted, or compressed in an unknown way."""
        try:
            if not self.path.is_dir():
                archive, members = self._opened()
                return archive.read(members[name])
            if ".." in Path(name).parts or Path(name).is_absolute():
                raise UserError(f"{self.path} lists {name}, which lies outside it: correct its {LABELS}")
            return (self.path / name).read_bytes()
        except UserError:
            raise
        except PermissionError as error:
            raise UserError(f"{self.path / name} cannot be read ({error.strerror}): make it readable") from error
        except (KeyError, *DAMAGE) as error:
            problem = "is missing" if isinstance(error, KeyError | FileNotFoundError) else f"is damaged ({error})"
            of_system = isinstance(error, KeyError) or getattr(error, "errno", None)  # a decompressor gives no number
            raise (UserError if of_system else BadFile)(
                f"{self.path / name} {problem}: copy it again, or take it out of {LABELS}"
            ) from error


def _members(archive: zipfile.ZipFile, path: Path) -> dict[str, zipfile.ZipInfo]:
    """The files of a zip by their plain names; of two entries of one name the later counts, as for every unpacker."""
    members: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        if info.filename.endswith(("/", "\\")):
            continue
        name = plain_name(info.filename)
        if name in members and members[name].filename != info.filename:
            raise UserError(f"{path}: two files go by the name {name}: rename one of them")
        members[name] = info
    top = top_folder(members)
    return {name.removeprefix(top): info for name, info in members.items()}


def _walked(root: Path) -> dict[str, str | None]:
    """The files below a folder as `FileStore.files` gives them. Each real folder is read once, links to folders being
    followed after all else (ImageNet is often a tree of links); other links to it are passed over."""
    found: dict[str, str | None] = {}
    folders, links, seen = [("", os.path.realpath(root), False)], [], set()
    while folders or links:
        if not folders:
            links.sort(reverse=True)
        below, real, hidden = (folders or links).pop()
        if real in seen:
            found[below.rstrip("/")] = "a link to a folder that is read already"
            continue
        seen.add(real)
        try:
            with os.scandir(real) as entries:
                entries = list(entries)
        except OSError as error:
            if not hidden:
                raise _unreadable(root / below, error) from error
            found[below.rstrip("/")] = HIDDEN
            continue
        for entry in entries:
            name, entry_hidden = below + entry.name, hidden or is_hidden(entry.name)
            kind, target = _kind_of(entry, root, name, real, entry_hidden)
            if kind == "folder":
                folders.append((f"{name}/", target, entry_hidden))
            elif kind == "link":
                links.append((f"{name}/", target, entry_hidden))
            else:
                found[name] = kind or (HIDDEN if entry_hidden else None)
    return found


def _kind_of(entry: os.DirEntry, root: Path, name: str, real: str, hidden: bool) -> tuple[str | None, str]:
    """Whether an entry of folder `real`, `root / name`, is a "folder" or a "link" to one, and its real path; else None
    for a file, or why it is passed over. Raises `UserError` if the system does not say, for what is not hidden."""
    try:
        if not entry.is_symlink():
            return ("folder" if entry.is_dir() else None if entry.is_file() else SPECIAL), entry.path
        if hidden:
            return HIDDEN, entry.path
        if not entry.is_dir():
            return (None if stat.S_ISREG(entry.stat().st_mode) else SPECIAL), entry.path
    except FileNotFoundError:
        if splitext(name)[1].lower() in ("", ".tar", *IMAGE_SUFFIXES):  # without a suffix most likely a class
            raise UserError(f"{root / name} is a link to nothing: mend it, or remove it") from None
        return "a link to nothing", entry.path
    except OSError as error:
        if not hidden and error.errno != errno.ELOOP:
            raise _unreadable(root / name, error) from error
        return "a link to itself" if error.errno == errno.ELOOP else HIDDEN, entry.path
    target = os.path.realpath(entry.path)
    if os.path.commonpath([target, real]) == target:
        return "a link to a folder that it lies in", target
    return "link", target


def _unreadable(place: Path, error: OSError) -> UnreadableFolder:
    return UnreadableFolder(f"{place} cannot be read ({error.strerror or error}): make it readable, or take it away")


def read_labels(store: FileStore) -> tuple[dict[str, int], list[str]]:
    """Label by file name, and class names, of the `dataset.json` of an image or latent folder or zip.

    It reads {"labels": [["a/b.png", 3], ...]}, as REPA's tool writes it; "class_names": [...] is optional, by
    default the numbers. Raises `UserError` for anything else.
    """
    place = store.path / LABELS
    if not store.has(LABELS):
        raise UserError(f"{place} is missing: {_remedy_of_missing_labels(store)}")
    try:
        content = json.loads(store.read(LABELS))
        label_of = {_listed_name(store, str(name)): label for name, label in content["labels"]}
        class_names = content.get("class_names")
        if len(label_of) != len(content["labels"]):
            raise ValueError("a file that is listed twice")
        if not isinstance(class_names, list | None):
            raise ValueError("class_names that are no list")
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        got = f"{type(error).__name__}: {error}"
        raise UserError(f'{place}: expected {{"labels": [["a/b.png", 3], ...]}}, got {got}') from error
    for name, label in label_of.items():
        if type(label) is not int or not 0 <= label < MAX_CLASSES:
            raise UserError(f"{place}: label {label!r} of {name}, expected an integer from 0, below {MAX_CLASSES}")
    if class_names is None:
        class_names = [str(label) for label in range(max(label_of.values(), default=-1) + 1)]
    if max(label_of.values(), default=-1) >= len(class_names):
        raise UserError(f"{place}: label {max(label_of.values())}, but only {len(class_names)} class_names")
    return label_of, [str(name) for name in class_names]


def _listed_name(store: FileStore, name: str) -> str:
    """A name that `dataset.json` lists, with forward slashes if it was written on Windows."""
    return plain_name(name) if "\\" in name and not store.has(name) else name


def _remedy_of_missing_labels(store: FileStore) -> str:
    kinds = {splitext(name)[1].lower() for name in store.names()} if not store.path.is_dir() else set()
    if kinds & set(IMAGE_SUFFIXES) and ".npy" not in kinds:
        return "it holds images: encode them first, with python -m preprocessing.dataset_tools encode"
    if store.path.is_dir():
        inner = next((place.parent for place in sorted(store.path.glob(f"*/{LABELS}"))), None)
        return f"give {inner}" if inner else "give the folder that holds it beside the files it lists"
    inner = next((name for name in store.names() if name.endswith(f"/{LABELS}")), None)
    where = f"give its folder {inner.removesuffix(LABELS)}" if inner else "give the folder that holds it"
    return f"unpack the zip and {where}, or make a zip with {LABELS} at its top"


def load_npy(source: Path | io.BytesIO, remedy: str, place: Path | None = None) -> np.ndarray:
    """An array from a `.npy` file, memory-mapped, or from the content of the file `place`; nothing is executed.

    Raises `UserError`, which ends with `remedy`, if it is missing or damaged.
    """
    try:
        return np.load(source, mmap_mode=None if place else "r", allow_pickle=False)
    except FileNotFoundError as error:
        raise UserError(f"{source} is missing: {remedy}") from error
    except Exception as error:  # the parser of a damaged header stumbles in many ways
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{place or source} is damaged ({reason}): {remedy}") from error


def read_image(store: FileStore, name: str) -> np.ndarray:
    """The image `name` of a store, upright, as (H, W, 3) uint8; `UserError` if it is unreadable or neither RGB nor
    greyscale."""
    from PIL import Image, UnidentifiedImageError

    content, place = store.read(name), store.path / name
    try:
        image, kind = read_rgb(content)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # SyntaxError: a broken PNG
        reason = "no known format" if isinstance(error, UnidentifiedImageError) else error
        raise UserError(f"{place} cannot be read as an image ({reason}): replace or remove it") from error
    mode = kind.split()[0]
    if mode not in ("RGB", "L"):
        raise UserError(f"{place} is in mode {mode}, expected RGB: run dataset_tools convert first")
    return np.array(image)
