"""Files are complete or not there, and a destination has one writer."""

import hashlib
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from helpers.sample_data import contents, make_images, make_vae, ordinary_user, start, with_mount, write_files

from common import files
from common.errors import UserError
from common.files import hashed_aside, only_writer, write_file
from preprocessing import convert as convert_module
from preprocessing.convert import convert
from preprocessing.encode import encode
from preprocessing.pack import pack
from preprocessing.stats import write_reference


def test_a_file_appears_whole_with_its_checksum(tmp_path):
    with hashed_aside(tmp_path / "file") as file:
        file.write(b"one ")
        assert not (tmp_path / "file").exists()
        file.write(b"two")
    assert (tmp_path / "file").read_bytes() == b"one two" and list(tmp_path.iterdir()) == [tmp_path / "file"]
    assert file.hexdigest() == write_file(tmp_path / "same", b"one two") == hashlib.sha256(b"one two").hexdigest()


def test_a_file_that_fails_leaves_the_old_one(tmp_path):
    write_file(tmp_path / "file", b"old")
    with pytest.raises(KeyboardInterrupt), hashed_aside(tmp_path / "file") as file:
        file.write(b"new")
        raise KeyboardInterrupt
    assert (tmp_path / "file").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(UserError, match="cannot write .*/none/file .No such file"):
        write_file(tmp_path / "none" / "file", b"")


def test_one_writer_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LOCK_TIMEOUT", 0.2)
    with only_writer(tmp_path / "dest"):
        with pytest.raises(UserError, match="dest is being written by another process"), only_writer(tmp_path / "dest"):
            pass
        with only_writer(tmp_path / "other"):
            pass
    with only_writer(tmp_path / "dest"):
        pass
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write beside"), only_writer(tmp_path / "file" / "dest"):
        pass


def test_a_killed_writer_locks_nobody_out(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LOCK_TIMEOUT", 60)  # of a machine that is busy

    def write_for_ever():
        with only_writer(tmp_path / "dest"):
            (tmp_path / "began").touch()
            time.sleep(60)

    process = start(write_for_ever)
    while not (tmp_path / "began").exists():
        time.sleep(0.01)
    process.kill()
    with only_writer(tmp_path / "dest"):
        pass


def test_writers_that_wait_never_overlap(tmp_path, monkeypatch):
    """Ten processes, each of which would see another's file if they were inside together."""
    monkeypatch.setattr(files, "LOCK_TIMEOUT", 60)

    def write():
        with only_writer(tmp_path / "dest"):
            (tmp_path / "inside").touch(exist_ok=False)
            time.sleep(0.02)
            (tmp_path / "inside").unlink()

    processes = [start(write) for _ in range(10)]
    for process in processes:
        process.join(100)
    assert [process.exitcode for process in processes] == [0] * 10


# ---- destinations that are links, mounts or in folders that cannot be written


@pytest.mark.parametrize("there", [True, False])
def test_a_file_written_through_a_link_is_where_the_link_leads(tmp_path, there):
    (tmp_path / "disk").mkdir()
    if there:
        (tmp_path / "disk" / "file").write_bytes(b"old")
    (tmp_path / "link").symlink_to("disk/file")
    with files.written_aside(tmp_path / "link") as aside:
        aside.write_bytes(b"new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "file").read_bytes() == b"new"
    files.write_text(tmp_path / "link", "text")
    assert (tmp_path / "disk" / "file").read_bytes() == b"text"
    (tmp_path / "work").mkdir()
    write_file(tmp_path / "link", b"packed", tmp_path / "work")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "file").read_bytes() == b"packed"
    assert len(list(tmp_path.rglob("*"))) == 4
    (tmp_path / "dangling").symlink_to(tmp_path / "unmounted" / "file")
    with pytest.raises(UserError, match=r"dangling is a link to \S+/unmounted, which is not there"):
        files.write_text(tmp_path / "dangling", "")


WRITERS = {
    "convert": lambda path, dest: convert(path / "images", dest, 16, num_workers=0),
    "encode": lambda path, dest: encode(path / "images", dest, str(path / "vae"), num_workers=0),
    "pack": lambda path, dest: pack(path / "vae-sd", dest, num_workers=0),
}


@pytest.fixture(scope="module")
def sources():
    """Images, a VAE and latents that every user may read, what is made of them, and a folder that all may write."""
    path = Path(tempfile.mkdtemp())
    make_images(path / "images")
    for file in Path(make_vae(path / "vae")).iterdir():
        file.chmod(0o644)
    write_files(path / "vae-sd")
    for name, write in WRITERS.items():
        write(path, path / "whole" / name)
    for folder in (path, path / "dest"):
        folder.mkdir(exist_ok=True)
        folder.chmod(0o777)
    yield path
    shutil.rmtree(path)


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("there", [True, False])
def test_a_link_to_a_folder_is_filled(sources, tmp_path, name, there):
    (tmp_path / "disk").mkdir()
    if there:
        (tmp_path / "disk" / "folder").mkdir()
    (tmp_path / "link").symlink_to("disk/folder")
    for _ in range(2):
        WRITERS[name](sources, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and contents(tmp_path / "disk" / "folder") == contents(
        sources / "whole" / name
    )
    assert [place.name for place in (tmp_path / "disk").iterdir()] == ["folder"]
    (tmp_path / "dangling").symlink_to(tmp_path / "unmounted" / "folder")
    with pytest.raises(UserError, match=r"dangling is a link to \S+/unmounted, which is not there"):
        WRITERS[name](sources, tmp_path / "dangling")
    assert not (tmp_path / "unmounted").exists()


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("kind", ["tmpfs", "bind"])
def test_a_mount_is_filled(sources, tmp_path, name, kind):
    """A fresh disk, whose root no rename replaces and which has a folder of its own."""
    dest, disk = tmp_path / "dest", tmp_path / "disk"
    dest.mkdir()
    disk.mkdir()

    def fill():
        (dest / "lost+found").mkdir()
        for _ in range(2):
            WRITERS[name](sources, dest)
        return contents(dest), sorted(place.name for place in tmp_path.iterdir())

    found, beside = with_mount(dest, fill, kind, "size=9m", disk)
    assert found == contents(sources / "whole" / name) and beside == ["dest", "disk"]


@pytest.mark.parametrize("name", WRITERS)
def test_a_folder_below_one_that_cannot_be_written_is_filled(sources, tmp_path, name):
    parent = Path(tempfile.mkdtemp(dir=sources))
    (parent / "dest").mkdir()
    (parent / "dest").chmod(0o777)
    parent.chmod(0o555)
    assert not isinstance(ordinary_user(lambda: WRITERS[name](sources, parent / "dest")), str)
    assert contents(parent / "dest") == contents(sources / "whole" / name)
    message = ordinary_user(lambda: WRITERS[name](sources, parent / "new"))
    assert message == f"cannot write beside {parent}/new (Permission denied): change --dest"


def test_convert_killed_while_it_fills_a_folder_goes_on(sources, tmp_path):
    dest, real = tmp_path / "dest", Path.replace
    dest.mkdir()

    def replaced_once(place, target):
        real(place, target)
        if target.parent == dest:
            raise KeyboardInterrupt

    for _ in range(2):  # the pictures, then the report
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "replace", replaced_once)
            with pytest.raises(KeyboardInterrupt):
                WRITERS["convert"](sources, dest)
        assert not (dest / "dataset.json").exists()
    WRITERS["convert"](sources, dest)
    assert contents(dest) == contents(sources / "whole" / "convert") and list(tmp_path.iterdir()) == [dest]


def test_what_cannot_be_a_destination_is_said_before_the_work(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(convert_module, "read_rgb", lambda content: 1 / 0)
    (tmp_path / "a.zip").mkdir()
    with pytest.raises(UserError, match=r"a\.zip is a folder, expected a zip file to make: change --dest"):
        WRITERS["convert"](sources, tmp_path / "a.zip")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is no finished conversion: remove it or change --dest"):
        WRITERS["convert"](sources, tmp_path / "file")
    for name in ("encode", "pack"):
        with pytest.raises(UserError, match="file is a file, expected a folder: change --dest"):
            WRITERS[name](sources, tmp_path / "file")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError, match="loop is a link to itself: mend the link"):
        WRITERS["convert"](sources, tmp_path / "loop")


def test_a_zip_and_a_reference_through_a_link_are_where_the_link_leads(sources, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "a.zip").symlink_to("disk/b.zip")
    (tmp_path / "r.npz").symlink_to("disk/s.npz")
    for _ in range(2):
        WRITERS["convert"](sources, tmp_path / "a.zip")
        write_reference(sources / "images", tmp_path / "r.npz")
    assert (tmp_path / "a.zip").is_symlink() and (tmp_path / "r.npz").is_symlink()
    assert sorted(place.name for place in (tmp_path / "disk").iterdir()) == ["b.zip", "s.npz"]
    with np.load(tmp_path / "r.npz") as arrays:
        assert len(arrays["arr_0"]) == 9


def test_a_link_to_the_destination_has_the_same_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LOCK_TIMEOUT", 0.2)
    (tmp_path / "dest").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "link").symlink_to(tmp_path / "dest")
    with (
        only_writer(tmp_path / "dest"),
        pytest.raises(UserError, match="is being written by another process"),
        only_writer(tmp_path / "elsewhere" / "link"),
    ):
        pass
