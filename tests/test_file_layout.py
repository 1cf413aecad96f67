"""Folders and zips of one file a sample: nothing is read from outside them, and what is wrong is named."""

import json
import pickle
import shutil
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from helpers.sample_data import COUNT, start, write_files

from common.errors import UserError
from dataset import open_latents
from storage.file_store import BadFile, FileStore
from storage.official import FileLatents


@pytest.fixture(params=["folder", "zip"])
def path(request, tmp_path):
    write_files(tmp_path / "vae-sd")
    if request.param == "zip":
        shutil.make_archive(tmp_path / "vae-sd", "zip", tmp_path / "vae-sd")
        shutil.rmtree(tmp_path / "vae-sd")
    return tmp_path / ("vae-sd.zip" if request.param == "zip" else "vae-sd")


def test_samples_are_sorted_and_labelled_by_name(path, tmp_path):
    data = FileLatents(path)
    labels = write_files(tmp_path / "again")
    assert data.names == sorted(labels) and data.labels.tolist() == [labels[name] for name in data.names]
    assert len(data) == COUNT and data.latent_shape == (8, 4, 4) and data.num_classes == 4
    assert data.class_counts.tolist() == np.bincount(data.labels, minlength=4).tolist()
    moments, picked = data.gather(np.array([22, 3, 3]))
    np.testing.assert_array_equal(moments[0], np.load(tmp_path / "again" / data.names[22]))
    np.testing.assert_array_equal(moments[1], moments[2])
    assert picked.tolist() == data.labels[[22, 3, 3]].tolist() and moments.dtype == np.float32


def test_a_reader_may_be_shared_by_threads_forked_and_sent(path):
    data = FileLatents(path)
    expected = data.gather(np.arange(COUNT))[0]

    def read(data=data):
        for _ in range(5):
            np.testing.assert_array_equal(data.gather(np.arange(COUNT))[0], expected)

    sent = pickle.dumps(data)
    assert len(sent) < 300
    read(pickle.loads(sent))
    processes = [start(read) for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(lambda _: read(), range(3))) == [None] * 3
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]


def test_the_official_data_folder_is_found(path):
    assert open_latents(path.parent).path == path
    assert open_latents(path).path == path


def test_a_store_lists_and_reads_its_files_only(path, tmp_path):
    (tmp_path / "secret").write_text("")
    store = FileStore(path)
    assert sorted(store.names()) == sorted([*FileLatents(path).names, "dataset.json"])
    for name in ("../secret", str(tmp_path / "secret"), "none"):
        with pytest.raises(UserError, match="outside it|is missing"):
            store.read(name)


def patched(content, marker, offset, value):
    """The zip in `content` with the 16-bit number at `offset` of its only entry of this marker changed."""
    place = content.index(marker) + offset
    return content[:place] + value.to_bytes(2, "little") + content[place + 2 :]


@pytest.mark.parametrize(
    ("offsets", "value", "message"),
    [
        ((8, 10), 99, "compression method is not supported"),
        ((6, 8), 1, "encrypted"),
        ((26, None), 2000, "damaged"),  # the length of the name, so that the content would begin elsewhere
    ],
)
def test_a_file_that_the_zip_cannot_give_is_named(tmp_path, offsets, value, message):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", b"content" * 100)
    content = (tmp_path / "a.zip").read_bytes()
    for marker, offset in zip((b"PK\3\4", b"PK\1\2"), offsets, strict=True):
        if offset is not None:
            content = patched(content, marker, offset, value)
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(BadFile, match=rf"a\.zip/a\.npy is damaged \(.*{message if message != 'damaged' else ''}"):
        FileStore(tmp_path / "a.zip").read("a.npy")


def labelled(folder, labels, **more):
    (folder / "dataset.json").write_text(json.dumps({"labels": labels, **more}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "dataset.json").unlink(), "dataset.json is missing"),
        (lambda folder: (folder / "dataset.json").write_text("{"), "expected"),
        (lambda folder: labelled(folder, []), "lists nothing, expected .npy files"),
        (lambda folder: labelled(folder, [["a.png", 0]]), "lists a.png, expected .npy files"),
        (lambda folder: labelled(folder, [["none.npy", 0]]), "none.npy is missing"),
        (lambda folder: labelled(folder, [["../../x.npy", 0]]), "outside"),
        (lambda folder: labelled(folder, [["a.npy", 0]], class_names=3), "class_names that are no list"),
        (lambda folder: labelled(folder, [["a.npy", 2**70]]), f"label {2**70} of a.npy, expected an integer from 0"),
        (lambda folder: labelled(folder, [["a.npy", 2**20]]), "below 1048576"),
        (lambda folder: np.save(folder / "00000/img-mean-std-00000000.npy", np.zeros((4, 4))), "expected moments"),
        (lambda folder: np.save(folder / "00000/img-mean-std-00000000.npy", np.zeros((3, 4, 4))), "expected moments"),
    ],
)
def test_what_is_not_this_layout_is_refused(tmp_path, spoil, message):
    write_files(tmp_path)
    spoil(tmp_path)
    with pytest.raises(UserError, match=message):
        FileLatents(tmp_path)


def test_a_file_unlike_the_first_is_named_when_it_is_read(tmp_path):
    write_files(tmp_path)
    np.save(tmp_path / "00001/img-mean-std-00000011.npy", np.zeros((8, 4, 4), np.float16))
    with pytest.raises(UserError, match=r"00000011.npy holds \(8, 4, 4\) float16, but 00000/img-mean-std-00000000.npy"):
        FileLatents(tmp_path).gather(np.arange(COUNT))
