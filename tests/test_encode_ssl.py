"""`encode-ssl` stores what the encoder says of each image, however often it is killed and on however many processes."""

import os
import re
import socket
from collections import namedtuple

import numpy as np
import pytest
import torch
from helpers.sample_data import (
    contents,
    flip_bit,
    kill_ten_times,
    make_images,
    make_vae,
    run_main,
    start,
    write_dataset,
)
from PIL import Image

from common.errors import UserError
from models import ssl_encoders
from models.ssl_encoders import load_encoder
from preprocessing import encode_ssl as encode_ssl_module
from preprocessing import packed_writer
from preprocessing.encode import encode
from preprocessing.encode_ssl import check_disk, describe_size, encode_ssl
from preprocessing.packed_writer import features_manifest
from preprocessing.verify import info, verify
from storage.features import PackedFeatures
from storage.packed import PackedLatents

VIT = "timm:vit_tiny_patch16_224"


@pytest.fixture(autouse=True)
def one_block(monkeypatch):
    """The encoder with one of its blocks, so that it is quick."""
    real = ssl_encoders._create
    monkeypatch.setattr(
        ssl_encoders, "_create", lambda recipe, pretrained=False, **o: real(recipe, pretrained, **{"depth": 1, **o})
    )


@pytest.fixture
def images(tmp_path):
    return make_images(tmp_path / "images")


def encode_few(source, dest, **options):
    encode_ssl(source, dest, VIT, "random", **{"num_workers": 0, "tokens_a_side": 2, **options})


@pytest.mark.parametrize(("dtype", "tolerance", "flip"), [("float32", 1e-5, True), ("float16", 2e-3, False)])
def test_stored_features_are_those_of_the_encoder(tmp_path, images, dtype, tolerance, flip):
    encode_few(images, tmp_path / "features", dtype=dtype, flip=flip, batch_size=4, shard_rows=5)
    features, encoder = PackedFeatures(tmp_path / "features"), load_encoder(VIT, 2, "random")
    assert (len(features), features.tokens, features.width, features.encoder) == (9, 4, 192, VIT)
    assert features.has_flips == flip and features.manifest["resolution"] == 16
    assert len(features.manifest["shards"]) == 2
    for index, name in enumerate(features.names):
        pixels = np.array(Image.open(images / name))
        for mirrored in range(1 + flip):
            seen = torch.from_numpy(np.ascontiguousarray(pixels[:, ::-1] if mirrored else pixels))
            stored = features.gather(np.array([index]), np.array([mirrored == 1]))[0]
            np.testing.assert_allclose(stored, encoder(seen[None])[0], atol=tolerance, rtol=tolerance)


def test_images_packed_with_the_latents_give_the_same_features(tmp_path, images):
    encode(images, tmp_path / "latents", make_vae(tmp_path / "vae"), num_workers=0, with_images=True)
    encode_few(images, tmp_path / "a", flip=True)
    encode_few(tmp_path / "latents", tmp_path / "b", flip=True, tokens_a_side=None, num_workers=2)
    a, b = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert {name for name in a if a[name] != b[name]} == {"dataset.json"}  # which says what they are made of
    PackedFeatures(tmp_path / "a").check_belongs(PackedLatents(tmp_path / "latents"), 4)


def test_the_number_of_tokens_follows_from_the_source(tmp_path, images):
    encode_few(images, tmp_path / "a", tokens_a_side=None)
    assert PackedFeatures(tmp_path / "a").tokens == 1  # as for the SD-VAE: 16 px are 2 x 2 latents, one patch
    sides = make_images(tmp_path / "sides", {"a": 1})
    Image.new("RGB", (24, 24)).save(sides / "a" / "0.png")
    encode_few(sides, tmp_path / "b", tokens_a_side=3)  # of a VAE that reduces by four: 6 x 6 latents
    assert PackedFeatures(tmp_path / "b").tokens == 9


# ---- interruptions


@pytest.fixture
def interrupted(tmp_path, monkeypatch):
    """Sixty images in units of four, what an uninterrupted command makes of them, and that command again."""
    monkeypatch.setattr(packed_writer, "UNIT_ROWS", 4)
    images, dest = make_images(tmp_path / "images", {"a": 30, "b": 30}), tmp_path / "features"
    options = dict(batch_size=3, flip=True, shard_rows=10)
    encode_few(images, tmp_path / "whole", **options)
    return dest, contents(tmp_path / "whole"), lambda: encode_few(images, dest, **options)


def test_killed_at_ten_random_moments_the_same_command_completes(interrupted):
    dest, whole, command = interrupted
    kill_ten_times(command, dest, whole)


def test_two_processes_share_the_work_and_the_first_alone_fetches_first(tmp_path, interrupted, monkeypatch):
    dest, whole, command = interrupted
    real_write, real_load = packed_writer.PackedJob.write_unit, encode_ssl_module.load_encoder

    def rank(number, port):
        os.environ.update(
            RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
        )

        def load(*args):
            if number == 1:
                assert (tmp_path / "loaded-by-0").exists()
            encoder = real_load(*args)
            (tmp_path / f"loaded-by-{number}").touch()
            return encoder

        def write_unit(self, unit, *arrays):
            (tmp_path / f"unit-{unit}-by-{number}").touch()
            real_write(self, unit, *arrays)

        monkeypatch.setattr(encode_ssl_module, "load_encoder", load)
        monkeypatch.setattr(packed_writer.PackedJob, "write_unit", write_unit)
        command()

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [start(rank, number, port) for number in range(2)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert contents(dest) == whole
    done = [file.name.split("-")[1::2] for file in tmp_path.glob("unit-*-by-*")]
    assert sorted((int(unit), int(by)) for unit, by in done) == [(unit, unit % 2) for unit in range(15)]


# ---- the disk


def imagenet(**changes):
    options = dict(resolution=256, tokens=256, width=768, dtype="float16", encoder="dinov2-vit-b", weights_sha256="")
    return features_manifest(["x"], **options | changes) | {"count": 1_281_167}


def test_the_cost_of_imagenet():
    assert describe_size(imagenet()) == "1281167 images, of each 256 tokens of 768 float16: 503.8 GB"
    assert describe_size(imagenet(flip=True)).endswith("of its mirror image 256 tokens of 768 float16: 1007.6 GB")


def test_too_little_disk_is_said_before_anything_is_written(tmp_path, images, monkeypatch, capsys):
    usage = namedtuple("usage", "total used free")
    size = 9 * 4 * 192 * 2
    monkeypatch.setattr(encode_ssl_module.shutil, "disk_usage", lambda place: usage(0, 0, 2 * size - 1))
    with pytest.raises(UserError, match=r"needs 0\.0 GB more and 0\.0 GB are free there: free space"):
        encode_few(images, tmp_path / "features")
    assert not (tmp_path / "features").exists()
    assert re.search(r"9 images, of each 4 tokens of 192 float16: 0\.0 GB, 0\.0 GB free", capsys.readouterr().out)
    monkeypatch.setattr(encode_ssl_module.shutil, "disk_usage", lambda place: usage(0, 0, 2 * size))
    encode_few(images, tmp_path / "features")


def test_what_is_written_already_is_not_asked_for_again(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    manifest = imagenet() | {"count": 10}
    size = 10 * 256 * 768 * 2
    (tmp_path / "unit").write_bytes(bytes(size // 2))
    monkeypatch.setattr(encode_ssl_module.shutil, "disk_usage", lambda place: usage(0, 0, size // 2 + size))
    check_disk(tmp_path, manifest)
    (tmp_path / "unit").write_bytes(bytes(size // 2 - 1))
    with pytest.raises(UserError, match="free space"):
        check_disk(tmp_path, manifest)


# ---- what does not fit


def test_other_features_are_not_taken_for_these(tmp_path, images):
    dest = tmp_path / "features"
    encode_few(images, dest)
    encode_few(images, dest)
    before = contents(dest)
    for options, message in [
        (dict(flip=True), "flip False, where this command makes True"),
        (dict(dtype="float32"), "dtype float16, where"),
        (dict(tokens_a_side=3), "tokens 4, where this command makes 9"),
        (dict(precision="bf16"), "precision no, where this command makes bf16"),
    ]:
        with pytest.raises(UserError, match=f"complete dataset, but with {message}"):
            encode_few(images, dest, **options)
    vit = load_encoder(VIT, 2, "random").vit
    torch.save({key: value + 1 for key, value in vit.state_dict().items()}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="complete dataset, but with weights_sha256"):
        encode_ssl(images, dest, VIT, tmp_path / "w.pth", num_workers=0, tokens_a_side=2)
    Image.new("RGB", (16, 16), (1, 2, 3)).save(images / "dog" / "1.png")
    with pytest.raises(UserError, match="begun from other images"):
        encode_few(images, dest)
    assert contents(dest) == before


def test_sources_without_usable_images_are_refused(tmp_path, images):
    write_dataset(tmp_path / "latents")
    with pytest.raises(UserError, match="latents holds no images: give the images, or encode it again with --images"):
        encode_few(tmp_path / "latents", tmp_path / "features")
    Image.new("RGB", (18, 18)).save(images / "cat" / "0.png")
    with pytest.raises(UserError, match="images are 18 pixels high, expected a multiple of 16"):
        encode_few(images, tmp_path / "features", tokens_a_side=None)
    Image.new("RGB", (16, 16)).save(images / "cat" / "0.png")
    Image.new("RGB", (16, 12)).save(images / "dog" / "0.png")
    with pytest.raises(UserError, match="dog/0.png is 16 x 12 pixels"):
        encode_few(images, tmp_path / "features")


def test_features_that_are_not_finite_name_the_image(tmp_path, images):
    weights = load_encoder(VIT, 2, "random").vit.state_dict()
    torch.save(weights | {"norm.weight": torch.full((192,), 1e6)}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"features of cat/0\.png are not finite in float16.*or another --encoder"):
        encode_ssl(images, tmp_path / "features", VIT, tmp_path / "w.pth", num_workers=0, tokens_a_side=2)


# ---- the command, verify and info


def test_the_command_then_info_and_verify(tmp_path, images, monkeypatch, capsys):
    dest = tmp_path / "features"
    flags = ["--encoder", VIT, "--weights", "random", "--tokens", 2, "--num-workers", 0, "--flip", "--device", "cpu"]
    assert run_main(monkeypatch, "encode-ssl", "--source", images, "--dest", dest, *flags) == 0
    assert "9 images, of each and of its mirror image 4 tokens of 192 float16: 0.0 GB" in capsys.readouterr().out
    assert run_main(monkeypatch, "encode-ssl", "--source", images, "--dest", dest, *flags) == 0
    assert "complete (9 images)" in capsys.readouterr().out
    assert run_main(monkeypatch, "verify", dest) == 0
    assert "9 samples, all as written" in capsys.readouterr().out
    assert run_main(monkeypatch, "info", dest) == 0
    text = capsys.readouterr().out
    assert "(4, 192) float16, patch tokens, of the mirror images too" in text and VIT in text and "16 px" in text
    for wrong, message in [
        (["--encoder", "dino"], "unknown encoder 'dino'"),
        (["--batch-size", 0], "0 given, expected a number from 1"),
        (["--tokens", "x"], "x given, expected a number from 1"),
    ]:
        assert run_main(monkeypatch, "encode-ssl", "--source", images, "--dest", tmp_path / "b", *wrong) == 2
        error = capsys.readouterr().err.strip()
        assert message in error and len(error.splitlines()) == 1
    assert not (tmp_path / "b").exists()


def test_damaged_features_are_traced_to_their_sample(tmp_path, images, capsys):
    encode_few(images, tmp_path / "features", shard_rows=5)
    flip_bit(tmp_path / "features" / "features-00001.npy", 128 + 2 * 4 * 192 * 2 + 9)
    name = PackedFeatures(tmp_path / "features").names[7]
    with pytest.raises(UserError, match=rf"damaged: {name} \(row 2 of features-00001.npy\): copy"):
        verify(tmp_path / "features")
    (tmp_path / "features" / "names.json").write_text("[]")
    with pytest.raises(UserError, match="names.json is damaged"):
        verify(tmp_path / "features")
    assert "mirror" not in info(tmp_path / "features")
