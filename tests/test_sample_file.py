"""The file of samples: its bytes, its place for every image, what a kill leaves."""

import json
import resource
import zipfile

import numpy as np
import pytest

from common.errors import UserError
from generation import sample_file
from generation.sample_file import SampleFile

SHAPE = (7, 4, 6, 3)
LABELS = np.arange(7)


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, SHAPE, dtype=np.uint8)


def fill(samples, images, order):
    for block in order:
        indices = samples.indices([block])
        samples.write(indices, images[indices])


def finish(samples):
    samples.complete(LABELS)
    samples.publish()
    samples.use_finished()


def test_same_bytes_in_any_order_and_readable_by_all(tmp_path, images):
    for name, order in {"a": range(4), "b": [3, 0, 2, 1]}.items():
        samples = SampleFile(tmp_path / f"{name}.npz", SHAPE, 2)
        samples.begin({})
        fill(samples, images, order)
        finish(samples)
        assert (samples.read(6) == images[6]).all()
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npz", "b.npz"]

    with np.load(tmp_path / "a.npz", allow_pickle=False) as arrays:
        assert (arrays["arr_0"] == images).all() and (arrays["arr_1"] == LABELS).all()
        assert arrays["arr_1"].dtype == np.int64
    with zipfile.ZipFile(tmp_path / "a.npz") as archive, archive.open("arr_0.npy") as stream:  # as ADM's evaluator
        assert archive.testzip() is None
        assert np.lib.format.read_magic(stream) == (1, 0)
        assert np.lib.format.read_array_header_1_0(stream) == (SHAPE, False, np.uint8)
        assert stream.read(2 * 72) == images[:2].tobytes()
    mapped = np.memmap(tmp_path / "a.npz", np.uint8, "r", SampleFile(tmp_path / "a.npz", SHAPE, 2).offset, SHAPE)
    assert (mapped == images).all()


def test_more_than_four_gigabytes_have_zip64_sizes(tmp_path, monkeypatch, images):
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)
    samples = SampleFile(tmp_path / "x.npz", SHAPE, 2)
    samples.begin({})
    fill(samples, images, range(4))
    finish(samples)
    monkeypatch.undo()
    with np.load(tmp_path / "x.npz") as arrays:
        assert (arrays["arr_0"] == images).all()
    assert (tmp_path / "x.npz").read_bytes()[18:26] == b"\xff" * 8


def test_goes_on_from_the_blocks_that_are_done(tmp_path, images):
    samples = SampleFile(tmp_path / "x.npz", SHAPE, 2)
    assert samples.unfinished_record() is None
    samples.begin({"seed": 3})
    fill(samples, images, [3, 1])
    samples.close()

    again = SampleFile(tmp_path / "x.npz", SHAPE, 2)
    assert again.unfinished_record() == {"seed": 3} and not again.is_truncated()
    assert again.missing() == [0, 2] and again.indices([0, 3]) == [0, 1, 6]
    fill(again, images, [0, 2])
    again.complete(LABELS)  # killed before the rename
    assert again.unfinished_record() == {"seed": 3} and not again.is_truncated() and again.missing() == []
    finish(again)
    assert (np.load(tmp_path / "x.npz")["arr_0"] == images).all()
    assert again.unfinished_record() is None


def test_what_is_unreadable_is_begun_again(tmp_path, images):
    samples = SampleFile(tmp_path / "x.npz", SHAPE, 2)
    samples.begin({"seed": 3})
    samples.progress.write_text("{")
    assert samples.unfinished_record() is None
    samples.begin({"seed": 3})
    with samples.part.open("r+b") as file:
        file.truncate(samples.end - 1)
    assert samples.is_truncated()
    samples.part.unlink()
    assert samples.unfinished_record() is None


def test_a_full_disk_is_one_line_and_marks_nothing(tmp_path, images, monkeypatch):
    samples = SampleFile(tmp_path / "x.npz", SHAPE, 2)
    samples.begin({})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sample_file.os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device; what is done is kept, the same command continues"):
        samples.write([0, 1], images[:2])
    assert samples.missing() == [0, 1, 2, 3]


@pytest.mark.parametrize("limit", [64, 800])  # bytes: the header does not fit; the images do not
def test_a_disk_that_is_full_at_the_start_is_one_line_and_leaves_nothing(tmp_path, limit):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)  # a file of more bytes is refused as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(UserError, match="cannot write .*x.npz.part: File too large; choose another --sample-dir"):
            SampleFile(tmp_path / "x.npz", (7, 16, 16, 3), 2).begin({})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_short_writes_are_completed(tmp_path, images, monkeypatch):
    pwrite = sample_file.os.pwrite
    monkeypatch.setattr(sample_file.os, "pwrite", lambda file, data, offset: pwrite(file, data[:50], offset))
    samples = SampleFile(tmp_path / "x.npz", SHAPE, 2)
    samples.begin({"json": json.dumps([1])})
    fill(samples, images, range(4))
    finish(samples)
    assert (np.load(tmp_path / "x.npz")["arr_0"] == images).all()
