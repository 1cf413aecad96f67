"""Tars of files and tars of tars are read in place; a damaged one is never taken for a shorter one."""

import io
import os
import pickle
import tarfile

import pytest

from common.errors import UserError
from preprocessing.tar_store import TarStore
from storage.file_store import BadFile

FILES = {"cat/1.JPEG": b"first cat", "cat/2.JPEG": b"", "dog/1.JPEG": b"dog" * 1000}


def tar_of(files, **options):
    """The bytes of a tar of these files: name -> content, in order."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def class_tars():
    """As ImageNet's tar holds them: one tar a class."""
    return {f"{name}.tar": tar_of({"1.JPEG": name.encode(), "2.JPEG": b"x" * 700}) for name in ("n01", "n02")}


def content_of(store):
    return {name: store.read(name) for name in store.names()}


@pytest.mark.parametrize("layout", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_files_of_a_tar(tmp_path, layout):
    files = {f"./{name}": content for name, content in FILES.items()} | {f"./{'long' * 20}/é.png": b"long"}
    (tmp_path / "a.tar").write_bytes(tar_of(files, format=layout))
    store = TarStore(tmp_path / "a.tar")
    assert content_of(store) == {name[2:]: content for name, content in files.items()}
    assert content_of(pickle.loads(pickle.dumps(store))) == content_of(store)


def test_tars_in_a_tar_and_in_a_folder_stand_for_folders(tmp_path, class_tars):
    expected = {f"{c}/1.JPEG": c.encode() for c in ("n01", "n02")} | {f"{c}/2.JPEG": b"x" * 700 for c in ("n01", "n02")}
    (tmp_path / "outer.tar").write_bytes(tar_of(class_tars | {"note.txt": b"note"}))
    assert content_of(TarStore(tmp_path / "outer.tar")) == expected | {"note.txt": b"note"}
    (tmp_path / "twice.tar").write_bytes(tar_of({"all.tar": tar_of(class_tars)}))
    assert content_of(TarStore(tmp_path / "twice.tar")) == {f"all/{name}": each for name, each in expected.items()}
    folder = tmp_path / "folder"
    (folder / "more").mkdir(parents=True)
    (folder / "more" / "3.JPEG").write_bytes(b"beside")
    for name, content in class_tars.items():
        (folder / name).write_bytes(content)
    assert content_of(TarStore(folder)) == expected | {"more/3.JPEG": b"beside"}


def test_links_are_named_not_lost(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(b"a")
    os.link(tmp_path / "in" / "a.png", tmp_path / "in" / "b.png")
    (tmp_path / "in" / "c.png").symlink_to("a.png")
    with tarfile.open(tmp_path / "links.tar", "w") as tar:
        for name in "abc":
            tar.add(tmp_path / "in" / f"{name}.png", f"{name}.png")
    store = TarStore(tmp_path / "links.tar")
    assert sorted(store.names()) == ["a.png", "b.png", "c.png"]
    assert store.read("a.png") == store.read("b.png") == b"a"
    with pytest.raises(BadFile, match=r"c\.png is a link"):
        store.read("c.png")


def test_damage_is_an_error_wherever_it_is(tmp_path, class_tars):
    """Cut at every block, or with any header spoilt, a tar is refused or whole: never fewer files than it has."""
    whole = tar_of(FILES)
    place = tmp_path / "a.tar"
    end = whole.rindex(b"dog") // 512 * 512 + 512  # of the last file; only zeros follow
    for length in range(0, end + 1, 512):
        place.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"a\.tar (is damaged|cannot be read)"):
            TarStore(place)
    for header in (0, 1024, 1536):
        spoilt = bytearray(whole)
        spoilt[header + 5] ^= 1
        place.write_bytes(spoilt)
        with pytest.raises(UserError, match=r"a\.tar is damaged"):
            TarStore(place)
    class_tars["n02.tar"] = class_tars["n02.tar"][:600]
    place.write_bytes(tar_of(class_tars))
    with pytest.raises(UserError, match=r"a\.tar/n02\.tar is damaged"):
        TarStore(place)


def test_what_is_no_plain_tar_is_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w:gz") as tar:
        tar.add(__file__, "x.png")
    with pytest.raises(UserError, match="compressed"):
        TarStore(tmp_path / "a.tar")
    with pytest.raises(UserError, match="cannot be read"):
        TarStore(tmp_path / "none.tar")
    (tmp_path / "same.tar").write_bytes(tar_of({"a/1.png": b"1", "a.tar": tar_of({"1.png": b"2"})}))
    with pytest.raises(UserError, match=r"two files go by the name a/1\.png"):
        TarStore(tmp_path / "same.tar")
    (tmp_path / "folder" / "a").mkdir(parents=True)
    (tmp_path / "folder" / "a" / "1.png").write_bytes(b"1")
    (tmp_path / "folder" / "a.tar").write_bytes(tar_of({"1.png": b"2"}))
    with pytest.raises(UserError, match=r"both have a file a/1\.png"):
        TarStore(tmp_path / "folder")


def test_a_tar_cut_after_it_was_listed(tmp_path):
    place = tmp_path / "a.tar"
    place.write_bytes(tar_of(FILES))
    store = TarStore(place)
    os.truncate(place, 2600)
    assert store.read("cat/1.JPEG") == b"first cat"
    with pytest.raises(UserError, match="cut short"):
        store.read("dog/1.JPEG")
    place.unlink()
    with pytest.raises(UserError, match="damaged"):
        store.read("cat/1.JPEG")
