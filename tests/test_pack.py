"""`pack`: the official layout becomes packed data that trains the same, with images paired by name."""

import itertools
import json
import shutil
import zipfile

import numpy as np
import pytest
import torch
from helpers.sample_data import COUNT, contents, kill_ten_times, write_files
from PIL import Image

from common.errors import UserError
from dataset import DataOrder, latent_batches, open_latents
from preprocessing import packed_writer
from preprocessing.pack import pack, pairing_name
from preprocessing.verify import info, verify
from storage.official import FileLatents
from storage.packed import PackedLatents


@pytest.fixture
def source(tmp_path):
    write_files(tmp_path / "vae-sd")
    return tmp_path / "vae-sd"


@pytest.fixture
def images(tmp_path, source):
    """The images of the latents, 32 px, in folders and in an order of their own."""
    labels = dict(json.loads((source / "dataset.json").read_text())["labels"])
    pairs = []
    for number, (name, label) in enumerate(sorted(labels.items(), reverse=True)):
        image = tmp_path / "images" / name.replace("img-mean-std-", "img").replace(".npy", ".png")
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (number, 0, 0)).save(image)
        pairs.append((image.relative_to(tmp_path / "images").as_posix(), label))
    (tmp_path / "images" / "dataset.json").write_text(json.dumps({"labels": pairs}))
    return tmp_path / "images"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_packed_data_trains_as_the_folder_and_the_zip_it_came_from(tmp_path, source, num_workers, monkeypatch):
    monkeypatch.setattr(packed_writer, "UNIT_ROWS", 4)
    shutil.make_archive(tmp_path / "zipped", "zip", source)
    pack(source, tmp_path / "packed", dtype="float32", num_workers=num_workers, shard_rows=10)
    pack(tmp_path / "zipped.zip", tmp_path / "from_zip", dtype="float32", num_workers=num_workers, shard_rows=10)
    assert contents(tmp_path / "packed") == contents(tmp_path / "from_zip")
    readers = [open_latents(path) for path in (source, tmp_path / "zipped.zip", tmp_path / "packed", tmp_path)]
    assert [type(reader).__name__ for reader in readers] == [
        "FileLatents",
        "FileLatents",
        "PackedLatents",
        "FileLatents",
    ]
    assert {reader.scaling_factor for reader in readers} == {0.18215}
    order = DataOrder(COUNT, 8, seed=5)
    for batches in zip(*(itertools.islice(latent_batches(reader, order), 6) for reader in readers), strict=True):
        for batch in batches[1:]:
            assert all(map(torch.equal, batches[0][:4], batch[:4]))


def test_float16_stores_what_was_float16(tmp_path, source):
    pack(source, tmp_path / "packed", num_workers=0)
    data, files = PackedLatents(tmp_path / "packed"), open_latents(source)
    assert data.manifest["dtype"] == "float16" and data.names == files.names and data.manifest["resolution"] == 32
    np.testing.assert_array_equal(data.gather(np.arange(COUNT))[0], files.gather(np.arange(COUNT))[0])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_killed_at_ten_random_moments_the_same_command_completes(tmp_path, images, source, num_workers, monkeypatch):
    monkeypatch.setattr(packed_writer, "UNIT_ROWS", 2)

    def command(dest):
        pack(source, dest, images=images, num_workers=num_workers, shard_rows=5)

    command(tmp_path / "whole")
    dest = tmp_path / "packed"
    kill_ten_times(lambda: command(dest), dest, contents(tmp_path / "whole"))


# ---- images


def test_images_are_paired_by_name(tmp_path, source, images):
    pack(source, tmp_path / "packed", images=images, num_workers=0)
    data = PackedLatents(tmp_path / "packed")
    reds = data.gather_images(np.arange(COUNT))[:, 0, 0, 0]
    assert reds.tolist() == list(range(COUNT))[::-1]  # they were numbered in the opposite order
    assert (
        pairing_name("00000/img-mean-std-00000042.npy") == pairing_name("00000/img00000042.png") == "00000/img00000042"
    )
    assert pairing_name("n01440764/x.y_1.npy") == pairing_name("n01440764/x.y_1.JPEG")


def relabel(folder, change):
    content = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps({"labels": change(dict(content["labels"]))}))


def drop(folder, name):
    (folder / name).unlink()
    relabel(folder, lambda labels: [[other, label] for other, label in labels.items() if other != name])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda images: drop(images, "00000/img00000003.png"), r"vae-sd has 00000/img00000003, \S+images has not"),
        (
            lambda images: relabel(images, lambda labels: [[name, label + 1] for name, label in labels.items()]),
            "make the labels agree",
        ),
        (lambda images: Image.new("RGB", (32, 16)).save(images / "00001/img00000012.png"), "32 x 16 .* of 32 x 32"),
    ],
)
def test_images_that_do_not_belong_to_the_latents_are_named(tmp_path, source, images, spoil, message):
    spoil(images)
    with pytest.raises(UserError, match=message):
        pack(source, tmp_path / "packed", images=images, num_workers=0)
    assert not (tmp_path / "packed" / "dataset.json").exists()


# ---- bad latents


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda file: file.unlink(), "lists a missing file, 00001/img-mean-std-00000015.npy"),
        (lambda file: shutil.copy(file, file.with_name("extra.npy")), "lists no label for 00001/extra.npy"),
        (lambda file: file.write_bytes(file.read_bytes()[:99]), "img-mean-std-00000015.npy is damaged"),
        (lambda file: file.write_bytes(b""), "img-mean-std-00000015.npy is damaged"),
        (lambda file: np.save(file, np.zeros((8, 2, 2), np.float32)), r"15.npy holds \(8, 2, 2\)"),
        (lambda file: np.save(file, np.full((8, 4, 4), np.nan, np.float32)), "15.npy are not finite"),
        (lambda file: np.save(file, np.array({}, object), allow_pickle=True), "15.npy is damaged"),
    ],
)
def test_latents_that_cannot_be_packed_are_named(tmp_path, source, spoil, message, num_workers):
    spoil(source / "00001" / "img-mean-std-00000015.npy")
    with pytest.raises(UserError, match=message):
        pack(source, tmp_path / "packed", num_workers=num_workers)
    assert not (tmp_path / "packed" / "dataset.json").exists()


def test_latents_already_drawn_are_no_moments(tmp_path, capsys):
    """Half of them would be trained on as the mean, the other half as the std."""
    for shape, message in [
        (
            (4, 4, 4),
            r"holds \(4, 4, 4\) float32 \(latents already drawn\?\), expected moments \(8, h, w\) of the SD-VAE",
        ),
        ((16, 4, 4), r"holds \(16, 4, 4\) float32, expected moments \(8, h, w\) of the SD-VAE"),
    ]:
        drawn = tmp_path / str(shape[0])
        write_files(drawn, shape=shape)
        for command in (lambda path: pack(path, tmp_path / "packed", num_workers=0), verify, open_latents, info):
            with pytest.raises(UserError, match=message):
                command(drawn)
    assert not (tmp_path / "packed" / "dataset.json").exists()


@pytest.mark.parametrize("row", [0, 15])
def test_moments_without_a_std_are_named(tmp_path, source, row, capsys):
    """Of the first sample at once, of another when it is read; with moments of VAEs of 8 channels these are drawn."""
    file = source / f"0000{row // 10}" / f"img-mean-std-{row:08d}.npy"
    moments = np.load(file)
    moments[5, 1, 1] = -1e-3
    np.save(file, moments)
    message = f"{row:08d}.npy has a negative std in its last 4 channels, expected moments"
    for command in (lambda path: pack(path, tmp_path / "packed", num_workers=1), verify):
        with pytest.raises(UserError, match=message):
            command(source)
    with pytest.raises(UserError, match=message):
        open_latents(source).gather(np.array([row]))
    assert not (tmp_path / "packed" / "dataset.json").exists()


def test_latents_that_were_packed_as_moments_are_found(tmp_path, source, monkeypatch):
    """By the command as it was."""
    real, row = FileLatents.gather, 15

    def drawn(data, indices):
        moments, labels = real(data, indices)
        moments[row] *= -1
        return moments, labels

    monkeypatch.setattr(FileLatents, "gather", drawn)
    pack(source, tmp_path / "packed", num_workers=0)
    with pytest.raises(UserError, match=r"00000015\.npy \(row 15 of moments-00000\.npy\): its std is negative"):
        verify(tmp_path / "packed")


def test_what_is_not_in_the_official_layout_is_refused(tmp_path, source):
    pack(source, tmp_path / "packed", num_workers=0)
    with pytest.raises(UserError, match="dataset.json: expected"):
        pack(tmp_path / "packed", tmp_path / "again", num_workers=0)
    with pytest.raises(UserError, match="no folder or zip file"):
        pack(tmp_path / "none", tmp_path / "again", num_workers=0)
    (tmp_path / "broken.zip").write_bytes(b"PK")
    with pytest.raises(UserError, match="no folder and no readable zip file"):
        pack(tmp_path / "broken.zip", tmp_path / "again", num_workers=0)
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("dataset.json", json.dumps({"labels": [["a/b.png", 0]]}))
    with pytest.raises(UserError, match="lists a/b.png, expected .npy"):
        pack(tmp_path / "images.zip", tmp_path / "again", num_workers=0)


# ---- going on where another command stopped


def test_packed_data_of_other_files_or_another_vae_is_not_taken_for_this(tmp_path, source, images):
    pack(source, tmp_path / "packed", images=images, num_workers=0)
    pack(source, tmp_path / "packed", images=images, num_workers=0)
    with pytest.raises(UserError, match="vae stabilityai/sd-vae-ft-ema, where this command makes other"):
        pack(source, tmp_path / "packed", "other", images=images, num_workers=0)
    Image.new("RGB", (32, 32), (99, 0, 0)).save(images / "00000/img00000003.png")
    with pytest.raises(UserError, match="complete dataset that was begun from other images"):
        pack(source, tmp_path / "packed", images=images, num_workers=0)
    file = source / "00001" / "img-mean-std-00000015.npy"
    pack(source, tmp_path / "latents", num_workers=0)
    np.save(file, np.load(file) + 1)
    with pytest.raises(UserError, match="complete dataset that was begun from other images"):
        pack(source, tmp_path / "latents", num_workers=0)
