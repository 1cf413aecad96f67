"""Folders and zips of one file per sample, with labels in `dataset.json`: images, or the official release's latents."""

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

from common.errors import UserError, first_line
from storage.image_files import IMAGE_SUFFIXES, read_rgb

LABELS = "dataset.json"
MAX_CLASSES = 2**20  # far above any dataset's: a damaged label must not make names for billions of classes

SYSTEM_NAMES = {  # in lower case; names that begin with a dot are hidden anyway
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
SPECIAL = "a pipe, socket or device"  # reading it may block for ever

DAMAGE = (  # what reading a zip raises for damaged bytes, or for a kind of zip that it cannot read
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
    """The content of one file is unusable and stays so; other files may be intact."""


class UnreadableFolder(UserError):
    """A folder cannot be listed: its files would be left out silently."""


def is_hidden(name: str) -> bool:
    """Whether a file or folder, or a folder above it, is hidden or belongs to an operating system."""
    return any(part.startswith(".") or part.lower() in SYSTEM_NAMES for part in name.replace("\\", "/").split("/"))


def plain_name(name: str) -> str:
    """The name of an archive's entry with forward slashes: `data\\cat/0.png`, from Windows, is `data/cat/0.png`."""
    return normpath(name.replace("\\", "/")).lstrip("/")


def top_folder(names: Iterable[str]) -> str:
    """The folder, such as `vae-sd/`, that holds `dataset.json` and all files but hidden ones; `""` if there is none."""
    names = list(names)
    tops = [name.removesuffix(LABELS) for name in names if name.endswith(f"/{LABELS}") and not is_hidden(name)]
    top = min(tops, key=len, default="")
    return top if all(name.startswith(top) or is_hidden(name) for name in names) else ""


class FileStore:
    """The files of folder or zip file `path`, by their names inside it (with forward slashes).

    If all of a zip, `dataset.json` included, lies in one folder, names are those inside that folder. Threads may share
    a store; a process that inherits or unpickles it opens the zip again.

    Raises:
        UserError: if `path` does not exist, is neither a folder nor a zip file, or is a zip with two files of one name.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._archive: tuple[int, zipfile.ZipFile, dict[str, zipfile.ZipInfo]] | None = (
            None  # with the id of the process that opened it
        )
        if not self.path.exists():
            raise UserError(f"no folder or zip file {self.path}: give another path")
        if not self.path.is_dir():
            self._open_zip()

    def _open_zip(self) -> tuple[zipfile.ZipFile, dict[str, zipfile.ZipInfo]]:
        """The zip, opened by this process, and its files by name."""
        if self._archive is None or self._archive[0] != os.getpid():
            try:
                archive = zipfile.ZipFile(self.path)
            except (OSError, zipfile.BadZipFile) as error:
                raise UserError(
                    f"{self.path} is no folder and no readable zip file ({error}): copy it again"
                ) from error
            self._archive = os.getpid(), archive, _zip_members(archive, self.path)
        return self._archive[1:]

    def __reduce__(self) -> tuple:
        return FileStore, (self.path,)

    def files(self) -> dict[str, str | None]:
        """All files, in no particular order: name -> why the file is passed over, None if it is used.

        A folder is walked, which takes a while for millions of files.

        Raises:
            UserError: for a folder that cannot be read.
        """
        if self.path.is_dir():
            return _walk_folder(self.path)
        return {name: HIDDEN if is_hidden(name) else None for name in self._open_zip()[1]}

    def names(self) -> list[str]:
        """All files that are not passed over, in no particular order."""
        return [name for name, passed_over in self.files().items() if passed_over is None]

    def has(self, name: str) -> bool:
        """Whether there is a file of that name."""
        if self.path.is_dir():
            return (self.path / name).is_file()
        return name in self._open_zip()[1]

    def size(self, name: str) -> int | None:
        """Size of one file in bytes, None if there is no such file; `UserError` if the system cannot tell."""
        if not self.path.is_dir():
            member = self._open_zip()[1].get(name)
            return None if member is None else member.file_size
        try:
            return (self.path / name).stat().st_size
        except FileNotFoundError:
            return None
        except OSError as error:
            place = self.path / name
            raise UserError(f"{place} cannot be read ({error.strerror or error}): make it readable") from error

    def read(self, name: str) -> bytes:
        """The content of one file.

        Raises:
            BadFile: if it is damaged inside the zip, encrypted, or compressed in an unknown way.
            UserError: if it is missing, unreadable or outside the store.
        """
        try:
            if not self.path.is_dir():
                archive, members = self._open_zip()
                return archive.read(members[name])
            if ".." in Path(name).parts or Path(name).is_absolute():
                raise UserError(f"{self.path} lists {name}, which is outside it: correct its {LABELS}")
            return (self.path / name).read_bytes()
        except UserError:
            raise
        except PermissionError as error:
            raise UserError(f"{self.path / name} cannot be read ({error.strerror}): make it readable") from error
        except (KeyError, *DAMAGE) as error:
            problem = "is missing" if isinstance(error, KeyError | FileNotFoundError) else f"is damaged ({error})"
            of_system = isinstance(error, KeyError) or getattr(error, "errno", None)  # decompressors set none
            raise (UserError if of_system else BadFile)(
                f"{self.path / name} {problem}: copy it again, or take it out of {LABELS}"
            ) from error


def _zip_members(archive: zipfile.ZipFile, path: Path) -> dict[str, zipfile.ZipInfo]:
    """The files of a zip by their plain names; a later entry replaces an earlier one of its name, as in unpackers."""
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


def _walk_folder(root: Path) -> dict[str, str | None]:
    """The files below a folder as `FileStore.files` returns them. Links to folders are followed last (ImageNet is often
    a tree of links), and each real folder is read once: further links to it are passed over."""
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
    """Kind and path of an entry of folder `real`, `root / name`: "folder", "link" to one (with its real path), None
    for a file, or why it is passed over. Raises `UserError` if the system cannot tell, unless the entry is hidden."""
    try:
        if not entry.is_symlink():
            return ("folder" if entry.is_dir() else None if entry.is_file() else SPECIAL), entry.path
        if hidden:
            return HIDDEN, entry.path
        if not entry.is_dir():
            return (None if stat.S_ISREG(entry.stat().st_mode) else SPECIAL), entry.path
    except FileNotFoundError:
        if splitext(name)[1].lower() in (
            "",
            ".tar",
            *IMAGE_SUFFIXES,
        ):  # without a suffix most likely a class folder
            raise UserError(f"{root / name} is a link to nothing: mend it, or remove it") from None
        return "a link to nothing", entry.path
    except OSError as error:
        if not hidden and error.errno != errno.ELOOP:
            raise _unreadable(root / name, error) from error
        return "a link to itself" if error.errno == errno.ELOOP else HIDDEN, entry.path
    target = os.path.realpath(entry.path)
    if os.path.commonpath([target, real]) == target:
        return "a link to a folder above it", target
    return "link", target


def _unreadable(place: Path, error: OSError) -> UnreadableFolder:
    return UnreadableFolder(f"{place} cannot be read ({error.strerror or error}): make it readable, or take it away")


def read_labels(store: FileStore) -> tuple[dict[str, int], list[str]]:
    """Read the `dataset.json` of a folder or zip of images or latents.

    It holds {"labels": [["a/b.png", 3], ...]}, as REPA's tool writes it, and optionally "class_names": [...] (default:
    the numbers).

    Returns:
        label by file name, and class names.

    Raises:
        UserError: for anything else.
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
    """Read an array from an `.npy` file; nothing is unpickled.

    Args:
        source: a file, which is memory-mapped, or the content of the file `place`.
        remedy: ends the message of an error.
        place: names the file in messages, where `source` is its content.

    Raises:
        UserError: if the file is missing or damaged.
    """
    try:
        return np.load(source, mmap_mode=None if place else "r", allow_pickle=False)
    except FileNotFoundError as error:
        raise UserError(f"{source} is missing: {remedy}") from error
    except Exception as error:  # parsing a damaged header fails in many ways
        raise UserError(f"{place or source} is damaged ({first_line(error)}): {remedy}") from error


def read_image(store: FileStore, name: str, side: int | None = None, mismatch: str = "") -> np.ndarray:
    """Read one image of a store, upright.

    Args:
        store: where the image is.
        name: of its file.
        side: the width and height that it must have, in pixels (default: any).
        mismatch: ends the message about another size.

    Returns:
        its pixels, (H, W, 3) uint8.

    Raises:
        UserError: if it is unreadable, neither RGB nor greyscale, or of another size.
    """
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
    if side is not None and image.size != (side, side):
        raise UserError(f"{place} is {image.width} x {image.height} pixels, {mismatch}")
    return np.array(image)
