"""Files are complete or not there, and a destination has one writer."""

import hashlib
import time

import pytest
from sample_data import start

import files
from errors import UserError
from files import only_writer
from preprocessing.destination import write_file, written_aside


def test_a_file_appears_whole_with_its_checksum(tmp_path):
    with written_aside(tmp_path / "file") as file:
        file.write(b"one ")
        assert not (tmp_path / "file").exists()
        file.write(b"two")
    assert (tmp_path / "file").read_bytes() == b"one two" and list(tmp_path.iterdir()) == [tmp_path / "file"]
    assert file.hexdigest() == write_file(tmp_path / "same", b"one two") == hashlib.sha256(b"one two").hexdigest()


def test_a_file_that_fails_leaves_the_old_one(tmp_path):
    write_file(tmp_path / "file", b"old")
    with pytest.raises(KeyboardInterrupt), written_aside(tmp_path / "file") as file:
        file.write(b"new")
        raise KeyboardInterrupt
    assert (tmp_path / "file").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(UserError, match="cannot write .*/none/file .No such file"):
        write_file(tmp_path / "none" / "file", b"")


def test_one_writer_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PATIENCE", 0.2)
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
    monkeypatch.setattr(files, "PATIENCE", 60)  # of a machine that is busy

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
    monkeypatch.setattr(files, "PATIENCE", 60)

    def write():
        with only_writer(tmp_path / "dest"):
            (tmp_path / "inside").touch(exist_ok=False)
            time.sleep(0.02)
            (tmp_path / "inside").unlink()

    processes = [start(write) for _ in range(10)]
    for process in processes:
        process.join(100)
    assert [process.exitcode for process in processes] == [0] * 10


def test_a_link_to_the_destination_has_the_same_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PATIENCE", 0.2)
    (tmp_path / "dest").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "link").symlink_to(tmp_path / "dest")
    with (
        only_writer(tmp_path / "dest"),
        pytest.raises(UserError, match="is being written by another process"),
        only_writer(tmp_path / "elsewhere" / "link"),
    ):
        pass
