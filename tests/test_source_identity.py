"""A source is told from another by names, sizes, sampled contents and its `dataset.json`."""

import shutil

import pytest
from helpers.sample_data import make_images

from preprocessing.source_identity import source_sha256
from storage.file_store import FileStore


def digest(path, more=()):
    return source_sha256((FileStore(path), ["cat/0.png", "cat/1.png", *more]))


def test_a_zip_is_the_folder_it_was_made_of(tmp_path):
    images = make_images(tmp_path / "images")
    shutil.make_archive(tmp_path / "zipped", "zip", images)
    assert digest(images) == digest(tmp_path / "zipped.zip") != digest(images, ["cat/2.png"])


@pytest.mark.parametrize("file", ["cat/0.png", "dataset.json", "report.json"])
def test_a_change_of_a_byte_is_noticed(tmp_path, file):
    images = make_images(tmp_path / "images")
    for name in ("dataset.json", "report.json"):
        (images / name).write_text("{}")
    before = digest(images)
    content = bytearray((images / file).read_bytes())
    content[-1] ^= 1
    (images / file).write_bytes(content)
    assert digest(images) != before


def test_a_change_of_size_is_noticed_in_every_file(tmp_path):
    names = [f"{index:03d}.npy" for index in range(200)]
    for name in names:
        (tmp_path / name).write_bytes(b"same")
    before = source_sha256((FileStore(tmp_path), names))
    (tmp_path / names[1]).write_bytes(b"longer")  # not among those that are read
    assert source_sha256((FileStore(tmp_path), names[::-1])) != before
