"""Packed latents and the data order: what is read is what was written, in one order however it is split."""

import hashlib
import itertools
import json
import mmap
import pickle
import re
import threading

import numpy as np
import pytest
import torch
from helpers.sample_data import COUNT, SHAPE, write_dataset, write_files
from hypothesis import given, settings
from hypothesis import strategies as st

import dataset
from common.errors import UserError
from dataset import DataOrder, DeviceLatents, LatentBatch, latent_batches, open_latents
from storage import packed
from storage.official import FileLatents
from storage.packed import PackedLatents, read_manifest


@pytest.fixture
def folder(tmp_path):
    write_dataset(tmp_path / "packed")
    return tmp_path / "packed"


# ---- packed latents


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_gather_returns_what_was_written(tmp_path, dtype):
    moments, labels = write_dataset(tmp_path, dtype)
    data = PackedLatents(tmp_path)
    assert len(data) == COUNT and data.latent_shape == SHAPE and data.scaling_factor == 0.5
    assert data.num_classes == 4 and data.class_names == ["a", "b", "c", "d"]
    assert data.class_counts.tolist() == np.bincount(labels, minlength=4).tolist()
    assert data.names[22] == "class/022.png" and data.labels.dtype == np.int64
    for indices in (np.arange(COUNT), np.array([22, 0, 9, 10, 9, 19, 20]), np.array([5])):
        read, read_labels = data.gather(indices)
        assert read.dtype == dtype
        np.testing.assert_array_equal(read, moments[indices])
        np.testing.assert_array_equal(read_labels, labels[indices])


@pytest.mark.parametrize(("speed", "asks"), [(1e30, True), (1, False)])  # every read is slow, none is
def test_asking_the_disk_in_advance_changes_no_result(folder, monkeypatch, speed, asks):
    monkeypatch.setattr(packed, "COLD_SPEED", speed)
    data, asked = PackedLatents(folder), []
    monkeypatch.setattr(
        data._moments, "_prefetch", lambda *args, real=data._moments._prefetch: asked.append(real(*args))
    )
    expected = data.gather(np.arange(COUNT))[0]
    for _ in range(packed.COLD_READS):
        data.gather(np.arange(COUNT))
    asked.clear()
    np.testing.assert_array_equal(data.gather(np.arange(COUNT))[0], expected)
    assert len(asked) == (3 if asks else 0)


def test_gather_refuses_what_is_not_there(folder):
    data = PackedLatents(folder)
    for index in (-1, COUNT):
        with pytest.raises(IndexError):
            data.gather(np.array([0, index]))


def test_shards_are_mapped_and_travel_as_a_path(folder):
    data = PackedLatents(folder)
    assert len(data._moments._places) == 3
    assert all(isinstance(mapped, mmap.mmap) and len(mapped) > 160 for mapped, _ in data._moments._places)
    assert all(array.base is not None and not array.flags.writeable for array in data._moments._arrays)
    sent = pickle.dumps(data)
    assert len(sent) < 500
    np.testing.assert_array_equal(pickle.loads(sent).gather(np.arange(3))[0], data.gather(np.arange(3))[0])


def test_manifest_records_the_checksum_of_every_file(folder):
    manifest = json.loads((folder / "dataset.json").read_text())
    entries = [manifest["labels"], manifest["names"], manifest["checksums"], *manifest["shards"]]
    assert [entry["count"] for entry in manifest["shards"]] == [10, 10, 3]
    assert {entry["file"] for entry in entries} | {"dataset.json"} == {file.name for file in folder.iterdir()}
    for entry in entries:
        assert hashlib.sha256((folder / entry["file"]).read_bytes()).hexdigest() == entry["sha256"]


def edit_manifest(folder, **changes):
    manifest = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(manifest | changes))


def cut_in_half(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def garble_header(file):
    content = bytearray(file.read_bytes())
    content[60] ^= 1
    file.write_bytes(content)


def empty(folder):
    for file in folder.iterdir():
        file.unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (empty, "is empty"),
        (lambda folder: (empty(folder), folder.rmdir()), "no dataset folder"),
        (lambda folder: (folder / "dataset.json").unlink(), "never finished"),
        (lambda folder: cut_in_half(folder / "dataset.json"), "not valid JSON"),
        (lambda folder: (folder / "dataset.json").write_text('{"labels": []}'), "not the manifest"),
        (lambda folder: edit_manifest(folder, version=99), "version 99"),
        (lambda folder: edit_manifest(folder, count=99), "do not add up"),
        (lambda folder: edit_manifest(folder, shards=[{"file": "x"}]), "is damaged, its shards"),
        (lambda folder: edit_manifest(folder, num_classes=2), "num_classes 2"),
        (lambda folder: edit_manifest(folder, dtype="float32"), "moments-00000.npy holds"),
        (lambda folder: edit_manifest(folder, latent_shape=[8, 4, 4]), "moments-00000.npy holds"),
        (lambda folder: (folder / "moments-00001.npy").unlink(), "moments-00001.npy is missing"),
        (lambda folder: cut_in_half(folder / "moments-00001.npy"), "moments-00001.npy is damaged"),
        (lambda folder: (folder / "moments-00001.npy").write_bytes(b""), "moments-00001.npy is damaged"),
        (lambda folder: garble_header(folder / "moments-00001.npy"), "moments-00001.npy is damaged"),
        (lambda folder: np.save(folder / "labels.npy", np.zeros(5, np.int64)), "labels.npy holds"),
        (
            lambda folder: np.save(folder / "labels.npy", np.load(folder / "labels.npy")[::-1]),
            "labels.npy holds other labels than were written",
        ),
        (
            lambda folder: np.save(folder / "labels.npy", np.array([{}] * COUNT), allow_pickle=True),
            "labels.npy is damaged",
        ),
    ],
)
def test_a_damaged_dataset_is_refused_by_name(folder, damage, message):
    damage(folder)
    with pytest.raises(UserError, match=re.escape(message)):
        PackedLatents(folder)


@pytest.mark.parametrize("key", [*packed.FIELDS, "image_shards"])
def test_every_damaged_key_of_the_manifest_is_one_line(folder, key):
    whole = json.loads((folder / "dataset.json").read_text())
    if key == "image_shards":
        whole |= {"images": True, "image_shards": whole["shards"]}
    lacking = {other: value for other, value in whole.items() if other != key}
    for damaged in (lacking, *(whole | {key: wrong} for wrong in ([0], -1, {}, True if key != "images" else "no"))):
        if key == "flip" and damaged.get("flip") is True:
            continue
        (folder / "dataset.json").write_text(json.dumps(damaged))
        for reader in (read_manifest, PackedLatents):
            with pytest.raises(UserError, match=f"dataset.json is damaged, its {key} is"):
                reader(folder)


def test_names_that_do_not_match_are_refused(folder):
    (folder / "names.json").write_text('["one"]')
    with pytest.raises(UserError, match="1 names for 23 samples"):
        _ = PackedLatents(folder).names


# ---- the order


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 50), global_batch=st.integers(1, 70), seed=st.integers(0, 2**40))
def test_every_epoch_visits_each_sample_once(size, global_batch, seed):
    order = DataOrder(size, global_batch, seed)
    steps = -(-3 * size // global_batch)
    visited = np.concatenate([order.batch(step) for step in range(steps)])
    for epoch in range(3):
        assert sorted(visited[epoch * size : (epoch + 1) * size]) == list(range(size))


def test_batch_depends_on_step_and_seed_alone():
    order = DataOrder(100, 8, seed=3)
    forward = [order.batch(step) for step in range(40)]
    for step in (39, 12, 13, 0, 25):  # out of order, across epochs, and from a fresh object
        np.testing.assert_array_equal(order.batch(step), forward[step])
        np.testing.assert_array_equal(DataOrder(100, 8, seed=3).batch(step), forward[step])
    first, second = (np.concatenate(forward)[epoch * 100 : (epoch + 1) * 100] for epoch in (0, 1))
    assert (first != second).any() and (DataOrder(100, 8, seed=4).batch(0) != forward[0]).any()
    # Pinned: a run resumed years later must see the data it would have seen.
    assert DataOrder(10, 10, seed=0).batch(0).tolist() == [3, 2, 1, 8, 6, 0, 7, 4, 5, 9]


@pytest.mark.parametrize(
    ("arguments", "named"), [((0, 8, 0), "0 samples"), ((9, 0, 0), "--batch-size"), ((9, 8, -1), "--seed")]
)
def test_impossible_orders_are_refused(arguments, named):
    with pytest.raises(UserError, match=named):
        DataOrder(*arguments)


# ---- the loader


def global_batches(data, steps, start_step=0, world=1, num_workers=0, micro_batches=1, seed=7):
    """What all processes together see: per step, the parts of all processes one after the other."""
    order = DataOrder(len(data), 8, seed)
    ranks = [
        list(
            itertools.islice(
                latent_batches(data, order, start_step, rank, world, num_workers, micro_batches),
                steps * micro_batches,
            )
        )
        for rank in range(world)
    ]
    joined = []
    for step in range(steps):
        micro = slice(step * micro_batches, (step + 1) * micro_batches)
        parts = [part for batches in ranks for part in batches[micro]]
        joined.append(LatentBatch(*(torch.cat(tensors) for tensors in zip(*(part[:4] for part in parts), strict=True))))
    return joined


def assert_equal(batches, others):
    for one, other in zip(batches, others, strict=True):
        assert all(map(torch.equal, one[:4], other[:4]))


@pytest.mark.parametrize(
    ("world", "num_workers", "micro_batches"),
    [(1, 2, 1), (2, 0, 1), (2, 2, 1), (2, 2, 2), (4, 0, 1), (4, 0, 2), (4, 2, 1)],
)
@pytest.mark.parametrize("layout", ["packed", "packed with flips", "files", "on the device"])
def test_global_batches_do_not_depend_on_processes_workers_or_accumulation(
    tmp_path, layout, world, num_workers, micro_batches
):
    if layout == "files":
        write_files(tmp_path / "data")
    else:
        write_dataset(tmp_path / "data", flip=layout == "packed with flips")
    data = open_latents(tmp_path / "data")
    expected = global_batches(data, steps=7)  # 56 of 23 samples: well into the third epoch
    if layout == "on the device":
        data = DeviceLatents(data, "cpu")
    found = global_batches(data, 7, world=world, num_workers=num_workers, micro_batches=micro_batches)
    assert_equal(expected, found)
    resumed = global_batches(data, 3, 4, world=world, num_workers=num_workers, micro_batches=micro_batches)
    assert_equal(expected[4:], resumed)


def test_batches_hold_the_samples_they_name(tmp_path):
    moments, labels = write_dataset(tmp_path)
    order = DataOrder(COUNT, 8, seed=1)
    for step, batch in enumerate(itertools.islice(latent_batches(PackedLatents(tmp_path), order), 6)):
        assert batch.moments.dtype == torch.float16 and batch.condition.dtype == torch.int64
        np.testing.assert_array_equal(batch.indices, order.batch(step))
        np.testing.assert_array_equal(batch.moments, moments[batch.indices])
        np.testing.assert_array_equal(batch.condition, labels[batch.indices])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_read_that_fails_reaches_the_caller_in_its_turn(folder, num_workers):
    class Damaged(PackedLatents):
        def gather(self, indices, mirrored=None):
            if 0 in indices:
                raise OSError("bad sector")
            return super().gather(indices, mirrored)

    data = Damaged(folder)
    order = DataOrder(len(data), 4, seed=0)
    good = next(step for step in range(100) if 0 in order.batch(step))
    batches = latent_batches(data, order, num_workers=num_workers)
    assert len(list(itertools.islice(batches, good))) == good
    with pytest.raises(OSError, match="bad sector"):
        next(batches)


def test_dropped_batches_leave_no_threads_behind(folder):
    data = PackedLatents(folder)
    batches = latent_batches(data, DataOrder(len(data), 8, 0), num_workers=2)
    next(batches)
    assert any(thread.name.startswith("latents") for thread in threading.enumerate())
    del batches
    assert not any(thread.name.startswith("latents") for thread in threading.enumerate())


@pytest.mark.parametrize("on_device", [False, True])
def test_each_visit_takes_an_image_or_its_mirror_image(tmp_path, on_device):
    """Both about as often, each with its own moments, and not the same ones in every epoch."""
    moments, _ = write_dataset(tmp_path, flip=True)
    data = PackedLatents(tmp_path)
    data = DeviceLatents(data, "cpu") if on_device else data
    epochs = []
    for batch in itertools.islice(latent_batches(data, DataOrder(COUNT, COUNT, seed=0)), 20):
        np.testing.assert_array_equal(batch.moments, moments[batch.indices, batch.mirrored.long()])
        epochs.append(batch.mirrored[batch.indices.argsort()])
    share = torch.stack(epochs).float().mean(0)
    assert 0.4 < share.mean() < 0.6 and share.min() > 0 and share.max() < 1


def test_mirror_images_that_are_not_there_are_refused(tmp_path):
    write_dataset(tmp_path / "packed")
    write_files(tmp_path / "files")
    for data in (PackedLatents(tmp_path / "packed"), FileLatents(tmp_path / "files")):
        assert not any(batch.mirrored.any() for batch in itertools.islice(latent_batches(data, DataOrder(23, 8, 0)), 9))
        with pytest.raises(ValueError, match="no moments of mirror images"):
            data.gather(np.arange(2), np.array([False, True]))


def test_images_are_served_only_where_there_are_some(folder):
    data = PackedLatents(folder)
    with pytest.raises(UserError, match="holds no images"):
        data.gather_images(np.arange(2))
    with pytest.raises(UserError, match="holds no images"):
        latent_batches(data, DataOrder(COUNT, 8, 0), with_images=True)


def test_the_bar_of_latents_to_the_device_counts_samples(folder, capsys):
    DeviceLatents(PackedLatents(folder), "cpu")
    assert "23/23" in capsys.readouterr().err


def test_latents_too_large_for_the_device_are_refused(folder, monkeypatch):
    monkeypatch.setattr(dataset.torch.cuda, "mem_get_info", lambda device: (1000, 2000))
    with pytest.raises(UserError, match=r"take 0\.0 GiB and cuda:1 has 0\.0 GiB free: leave them on disk"):
        DeviceLatents(PackedLatents(folder), "cuda:1")


def test_batches_that_do_not_divide_are_refused_with_both_numbers(folder):
    data = PackedLatents(folder)
    with pytest.raises(UserError, match="batch size 8 is not divisible by 3 processes x 1"):
        latent_batches(data, DataOrder(len(data), 8, 0), world=3)
    with pytest.raises(UserError, match="order is for 5 samples, but the dataset has 23"):
        latent_batches(data, DataOrder(5, 8, 0))
