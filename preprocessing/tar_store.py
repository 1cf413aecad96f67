"""The files in a tar, and in the tars inside it: ImageNet's is a tar of one tar per class."""

import tarfile
from pathlib import Path
from typing import BinaryIO, NamedTuple

from common.errors import UserError
from storage.file_store import HIDDEN, BadFile, FileStore, is_hidden, plain_name, top_folder


class _Part(NamedTuple):
    """The bytes of a tar that hold a file."""

    tar: Path
    first: int  # byte
    size: int


_Parts = dict[str, _Part | None]  # by name; None for a link or device, which has no content


class TarStore:
    """The files of tar `path`, or of a folder of tars, by their names inside; nothing is unpacked.

    A tar inside stands for a folder of its name (`n01440764.tar` for `n01440764/`). If all of a tar, `dataset.json`
    included, lies in one folder, names are those inside that folder. The constructor lists all files; then several
    processes may read.

    Raises:
        UserError: for a tar that is compressed or damaged, and if two files have one name.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._folder = FileStore(path) if self.path.is_dir() else None
        if self._folder is None:
            parts = _list_tar(self.path)
            top = top_folder(parts)
            self._parts, self._loose_files = {name.removeprefix(top): part for name, part in parts.items()}, {}
            return
        self._parts, self._loose_files = {}, self._folder.files()
        tars = sorted(name for name, passed_over in self._loose_files.items() if is_tar(name) and passed_over is None)
        for name in tars:
            del self._loose_files[name]
            _merge(self._parts, _list_tar(self.path / name), name[: -len(".tar")], self.path)
        for name in self._parts.keys() & self._loose_files:
            raise UserError(f"{self.path}: a tar and a folder both have a file {name}: rename one of them")

    def files(self) -> dict[str, str | None]:
        """All files, in no particular order: name -> why the file is passed over, None if it is used."""
        return {name: HIDDEN if is_hidden(name) else None for name in self._parts} | self._loose_files

    def names(self) -> list[str]:
        """All files that are not passed over, in no particular order."""
        return [name for name, passed_over in self.files().items() if passed_over is None]

    def has(self, name: str) -> bool:
        """Whether there is a file of that name."""
        return name in self._parts or name in self._loose_files

    def read(self, name: str) -> bytes:
        """The content of one file; `UserError` if it cannot be read, `BadFile` if it is a link or device."""
        if name in self._loose_files:
            return self._folder.read(name)
        part = self._parts[name]
        if part is None:
            raise BadFile(f"{self.path / name} is a link or device in a tar: give the file itself")
        try:
            with part.tar.open("rb") as file:
                file.seek(part.first)
                content = file.read(part.size)
        except OSError as error:
            raise UserError(f"{self.path / name} is damaged ({error}): copy {part.tar} again") from error
        if len(content) != part.size:
            raise UserError(f"{self.path / name} is cut short: copy {part.tar} again")
        return content


def is_tar(name: str) -> bool:
    """Whether a file of this name is taken for a tar."""
    return name.lower().endswith(".tar")


def _list_tar(place: Path) -> _Parts:
    try:
        with place.open("rb") as file:
            return _list_members(file, place, place, 0)
    except OSError as error:
        raise UserError(f"{place} cannot be read ({error.strerror or error}): copy it again") from error


def _list_members(file: BinaryIO, place: Path, label: Path, first: int) -> _Parts:
    """The files of the tar in `file`, which begins at byte `first` of tar `place` and is called `label` in errors."""
    parts, inner = {}, {}
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while member := tar.next():
                tar.members.clear()  # else it keeps the headers of a million files
                name = plain_name(member.name)
                if member.islnk():
                    parts[name] = parts.get(plain_name(member.linkname))
                elif member.isdir():
                    continue
                elif not member.isreg() or member.issparse():
                    parts[name] = None
                elif is_tar(name) and not is_hidden(name):
                    inside = tar.extractfile(member)
                    inner[name[: -len(".tar")]] = _list_members(inside, place, label / name, first + member.offset_data)
                else:
                    parts[name] = _Part(place, first + member.offset_data, member.size)
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                raise tarfile.ReadError("a header is damaged or the end is missing")  # Python takes either for the end
    except (tarfile.TarError, EOFError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{label} is damaged or compressed ({error}): copy it again, or decompress it") from error
    for folder, files in inner.items():
        _merge(parts, files, folder, label)
    return parts


def _merge(parts: _Parts, more: _Parts, folder: str, label: Path) -> None:
    """Add the files of the tar that stands for `folder`."""
    for name, part in more.items():
        if f"{folder}/{name}" in parts:
            raise UserError(f"{label}: two files go by the name {folder}/{name}: rename a folder or tar")
        parts[f"{folder}/{name}"] = part
