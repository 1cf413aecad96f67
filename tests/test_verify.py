"""`verify` names what is damaged; `info` says what a dataset is."""

import json
import shutil

import numpy as np
import pytest
from helpers.sample_data import flip_bit, make_images, make_vae, write_dataset, write_files

from common.errors import UserError
from preprocessing.encode import encode
from preprocessing.verify import info, verify
from storage.packed import PackedLatents


@pytest.fixture
def packed(tmp_path):
    """Nine images with moments of two views and pixels, in two shards each."""
    vae = make_vae(tmp_path / "vae")
    images = make_images(tmp_path / "images")
    encode(images, tmp_path / "packed", vae, num_workers=0, flip=True, with_images=True, shard_rows=5)
    return tmp_path / "packed"


def test_what_is_as_written_passes(packed, capsys):
    verify(packed)
    assert "9 samples, all as written" in capsys.readouterr().out


@pytest.mark.parametrize("row", range(9))
@pytest.mark.parametrize(("kind", "row_bytes"), [("moments", 2 * 8 * 4 * 4 * 2), ("images", 16 * 16 * 3)])
def test_one_flipped_bit_is_traced_to_its_sample(packed, capsys, kind, row_bytes, row):
    name = PackedLatents(packed).names[row]
    file = packed / f"{kind}-{row // 5:05d}.npy"
    flip_bit(file, 128 + row % 5 * row_bytes + 7 * row)
    with pytest.raises(UserError, match=rf"damaged: {name} \(row {row % 5} of {file.name}\): copy"):
        verify(packed)
    assert capsys.readouterr().out.strip() == f"{name} (row {row % 5} of {file.name})"


def test_all_damaged_samples_are_listed(packed, capsys):
    names = PackedLatents(packed).names
    for row in (0, 3):
        flip_bit(packed / "moments-00000.npy", 128 + row * 512)
    shard = packed / "images-00001.npy"
    shard.write_bytes(shard.read_bytes()[:-1000])  # the disk was full: the last two of its four rows are not whole
    with pytest.raises(UserError, match=rf"{names[0]} \(row 0 of moments-00000.npy\), and 3 more"):
        verify(packed, num_workers=1)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [names[i] for i in (0, 3, 7, 8)]


@pytest.mark.parametrize(
    ("file", "position", "message"),
    [
        ("labels.npy", -3, "labels.npy is damaged"),
        ("names.json", 5, "names.json is damaged"),
        ("checksums.npy", -3, "checksums.npy is damaged"),
        ("moments-00000.npy", 3, r"moments-00000.npy, though not in its samples"),
        ("moments-00001.npy", 60, r"moments-00001.npy, though not in its samples"),
    ],
)
def test_damage_outside_the_samples_is_named_too(packed, file, position, message):
    flip_bit(packed / file, position)
    with pytest.raises(UserError, match=message):
        verify(packed)


def test_missing_files_are_named(packed):
    (packed / "moments-00001.npy").unlink()
    with pytest.raises(UserError, match=r"moments-00001.npy with dog/1.png to eel/1.png cannot be read \(No such file"):
        verify(packed)
    (packed / "labels.npy").unlink()
    with pytest.raises(UserError, match="labels.npy"):
        verify(packed)
    (packed / "dataset.json").unlink()
    with pytest.raises(UserError, match="never finished"):
        verify(packed)


@pytest.mark.parametrize("zipped", [False, True])
def test_latents_of_one_file_each_are_read_too(tmp_path, zipped, capsys):
    source = tmp_path / "vae-sd"
    write_files(source)

    def path():
        return shutil.make_archive(tmp_path / "vae-sd", "zip", source) if zipped else source

    verify(path())
    assert "23 samples" in capsys.readouterr().out
    (source / "00000/img-mean-std-00000004.npy").write_bytes(b"\x93NUMPY")
    np.save(source / "00002/img-mean-std-00000021.npy", np.full((8, 4, 4), np.inf, np.float32))
    with pytest.raises(UserError, match="img-mean-std-00000004.npy is damaged.* and 1 more"):
        verify(path())
    assert "img-mean-std-00000021.npy is not finite" in capsys.readouterr().out
    (source / "00000/img-mean-std-00000005.npy").unlink()
    with pytest.raises(UserError, match="lists a missing file, 00000/img-mean-std-00000005.npy"):
        verify(path())


# ---- info


def test_info_says_what_a_dataset_is(tmp_path, packed):
    text = info(packed)
    assert "samples         9" in text and "3, of 2 to 4 samples each" in text
    assert "(8, 4, 4) float16, mean and std stacked, of the mirror images too" in text
    assert "uint8 pixels of every sample" in text and "0.7" in text and "in 4 shard(s)" in text
    write_dataset(tmp_path / "plain")
    assert "images          none" in info(tmp_path / "plain") and "mirror" not in info(tmp_path / "plain")
    write_files(tmp_path / "vae-sd")
    assert "(8, 4, 4) float32" in info(tmp_path / "vae-sd") and "records no VAE" in info(tmp_path / "vae-sd")
    assert "the first is 16 x 16 px" in info(tmp_path / "images") and "3, of 2 to 4" in info(tmp_path / "images")


def test_info_tells_what_is_no_dataset(tmp_path):
    with pytest.raises(UserError, match="is empty"):
        info(tmp_path)
    (tmp_path / "dataset.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(UserError, match="not the manifest"):
        info(tmp_path)
    with pytest.raises(UserError, match="no dataset folder"):
        info(tmp_path / "none")
