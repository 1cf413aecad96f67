"""`encode` stores what the VAE says of each image, however often it is killed and on however many processes."""

import json
import os
import resource
import shutil
import signal
import socket
import tempfile
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.sample_data import (
    CLASSES,
    contents,
    in_process,
    kill_ten_times,
    killed_at,
    make_images,
    make_vae,
    start,
    with_mount,
)
from PIL import Image

from common.errors import UserError
from common.files import only_writer
from preprocessing import encode as encode_module
from preprocessing import packed_writer
from preprocessing.encode import encode
from preprocessing.encode_ssl import encode_ssl
from preprocessing.images import list_images
from storage.packed import PackedLatents


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    return make_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture
def images(tmp_path):
    return make_images(tmp_path / "images")


@pytest.fixture
def small_units(monkeypatch):
    """Units of 4 images: a few dozen make many."""
    monkeypatch.setattr(packed_writer, "UNIT_ROWS", 4)


def check_against_diffusers(data, images, vae, tolerance):
    """Every sample, paired by name; with flips the mirror image too."""
    moments = [data.gather(np.arange(len(data)), np.full(len(data), flip))[0] for flip in range(1 + data.has_flips)]
    for index, name in enumerate(data.names):
        pixels = np.array(Image.open(images / name))
        for flip, view in enumerate(moments):
            seen = torch.from_numpy(np.ascontiguousarray(pixels[:, ::-1] if flip else pixels)).float()
            with torch.no_grad():
                latent = vae.encode(seen.permute(2, 0, 1)[None] / 127.5 - 1).latent_dist
            expected = torch.cat([latent.mean, latent.std], dim=1)[0].numpy()
            np.testing.assert_allclose(view[index], expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance", "flip"), [("float32", 1e-5, True), ("float16", 1e-3, False)])
def test_encoded_moments_are_those_of_diffusers(tmp_path, images, vae_folder, dtype, tolerance, flip):
    from diffusers import AutoencoderKL

    dest = tmp_path / "packed"
    encode(images, dest, vae_folder, dtype, batch_size=4, num_workers=0, flip=flip, shard_rows=5)
    data = PackedLatents(dest)
    assert data.scaling_factor == 0.7 and data.manifest["dtype"] == dtype and data.manifest["resolution"] == 16
    assert data.class_names == list(CLASSES) and len(data.manifest["shards"]) == 2
    assert data.labels.tolist() == [0] * 4 + [1] * 3 + [2] * 2 and data.class_counts.tolist() == [4, 3, 2]
    check_against_diffusers(data, images, AutoencoderKL.from_pretrained(vae_folder).eval(), tolerance)


def test_the_full_sd_vae_is_called_as_diffusers_would(tmp_path):
    """Random weights in the architecture of stabilityai/sd-vae-ft-ema: 83.7 million parameters, f = 8."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[128, 256, 512, 512],
        layers_per_block=2,
        latent_channels=4,
        sample_size=256,
    ).eval()
    assert sum(parameter.numel() for parameter in vae.parameters()) == 83_653_863
    vae.save_pretrained(tmp_path / "vae")
    (tmp_path / "images" / "a").mkdir(parents=True)
    for index in range(2):
        pixels = np.random.default_rng(index).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / "a" / f"{index}.png")
    encode(tmp_path / "images", tmp_path / "packed", str(tmp_path / "vae"), "float32", num_workers=0)
    data = PackedLatents(tmp_path / "packed")
    assert data.latent_shape == (8, 8, 8) and data.scaling_factor == 0.18215
    check_against_diffusers(data, tmp_path / "images", vae, 1e-4)


def test_images_are_packed_beside_their_moments(tmp_path, images, vae_folder):
    encode(images, tmp_path / "packed", vae_folder, num_workers=0, with_images=True, shard_rows=4)
    data = PackedLatents(tmp_path / "packed")
    indices, mirrored = np.array([8, 0, 5]), np.array([False, True, False])
    pixels = data.gather_images(indices, mirrored)
    for row, (index, mirror) in enumerate(zip(indices, mirrored, strict=True)):
        expected = np.array(Image.open(images / data.names[index]))
        np.testing.assert_array_equal(pixels[row], expected[:, ::-1] if mirror else expected)


def test_a_zip_is_encoded_as_its_folder(tmp_path, images, vae_folder):
    shutil.make_archive(tmp_path / "images", "zip", images)
    encode(images, tmp_path / "one", vae_folder, num_workers=0)
    encode(tmp_path / "images.zip", tmp_path / "two", vae_folder, num_workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_labels_come_from_dataset_json_by_name(tmp_path, images, vae_folder):
    labels = [["eel/1.png", 7], ["cat/0.png", 2], ["dog/2.png", 0]]
    rest = [[f"{name}/{i}.png", 1] for name, count in CLASSES.items() for i in range(count)]
    labels += [pair for pair in rest if pair[0] not in dict(labels)]
    (images / "dataset.json").write_text(json.dumps({"labels": labels}))
    encode(images, tmp_path / "packed", vae_folder, num_workers=0)
    data = PackedLatents(tmp_path / "packed")
    assert dict(zip(data.names, data.labels.tolist(), strict=True)) == dict(labels)
    assert data.num_classes == 8 and data.class_names[7] == "7"


# ---- interruptions


@pytest.fixture
def interrupted(tmp_path, vae_folder, small_units):
    """Sixty images, what an uninterrupted command makes of them, and that command for another destination."""
    images = make_images(tmp_path / "images", {"a": 30, "b": 30})
    options = dict(batch_size=3, num_workers=0, flip=True, with_images=True, shard_rows=10)
    encode(images, tmp_path / "whole", vae_folder, **options)
    dest = tmp_path / "packed"
    return dest, contents(tmp_path / "whole"), lambda: encode(images, dest, vae_folder, **options)


def test_killed_at_ten_random_moments_the_same_command_completes(interrupted):
    dest, whole, command = interrupted
    kill_ten_times(command, dest, whole)


def test_killed_at_every_rename_the_same_command_completes(interrupted, monkeypatch):
    """Each run gets one file further: to the point just after it appears under its name."""
    dest, whole, command = interrupted
    real = Path.replace

    def replace_and_die(self, target):
        is_new = not Path(target).exists()
        real(self, target)
        if is_new:
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(Path, "replace", replace_and_die)
    runs = 0
    while not killed_at(command, None, dest):
        runs += 1
        assert runs < 100
        if not (dest / "dataset.json").exists():
            with pytest.raises(UserError):
                PackedLatents(dest)
    assert runs > 15 + 12  # units, shards
    assert contents(dest) == whole


def test_a_full_disk_is_reported_and_what_is_written_stays(interrupted, tmp_path):
    """No file may grow beyond 7,000 bytes: enough for units, too little for the first shard of images."""
    dest, whole, command = interrupted

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (7000, 7000))
        try:
            command()
        except UserError as error:
            (tmp_path / "message").write_text(str(error)[:6000])
            os._exit(3)

    process = start(limited)
    process.join()
    assert process.exitcode == 3
    message = (tmp_path / "message").read_text()
    assert message.startswith(f"cannot write {dest}/images-00000.npy (File too large): free space")
    assert len(list((dest / "unfinished").glob("unit-*.npy"))) == 15 and not list(dest.rglob("*.partial"))
    command()
    assert contents(dest) == whole


def test_processes_share_the_work_and_change_nothing(tmp_path, interrupted, monkeypatch):
    """Two processes that meet over gloo, as `accelerate launch` starts them; the first time one of them is killed."""
    dest, whole, command = interrupted
    real = packed_writer.PackedJob.write_unit

    def rank(number, port, kill_at):
        os.environ.update(
            RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
        )

        def write_unit(self, unit, *arrays):
            if unit == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            (tmp_path / f"unit-{unit}-by-{number}").touch()
            real(self, unit, *arrays)

        monkeypatch.setattr(packed_writer.PackedJob, "write_unit", write_unit)
        try:
            command()
        except UserError as error:
            assert "another process of this command stopped" in str(error)
            os._exit(2)

    for kill_at, exit_codes in [(9, [2, -signal.SIGKILL]), (None, [0, 0])]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        processes = [start(rank, number, port, kill_at) for number in range(2)]
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == exit_codes
    assert contents(dest) == whole
    done = [file.name.split("-")[1::2] for file in tmp_path.glob("unit-*-by-*")]
    assert sorted((int(unit), int(by)) for unit, by in done) == [(unit, unit % 2) for unit in range(15)]


def test_a_second_encoder_is_turned_away(tmp_path, images, vae_folder):
    with (
        only_writer(tmp_path / "packed"),
        pytest.raises(UserError, match="packed is being written by another process"),
    ):
        encode(images, tmp_path / "packed", vae_folder, num_workers=0)
    encode(images, tmp_path / "packed", vae_folder, num_workers=0)


# ---- what workers send


@pytest.fixture(params=["encode", "encode-ssl"])
def large(request, tmp_path, vae_folder, monkeypatch):
    """A command whose workers send batches of 192 KB, and what it makes without workers."""
    rng, images = np.random.default_rng(0), tmp_path / "images"
    for index in range(12):
        (images / "a").mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (128, 128, 3), dtype=np.uint8)).save(images / "a" / f"{index}.png")

    def command(dest, num_workers):
        if request.param == "encode":
            encode(images, dest, vae_folder, batch_size=4, num_workers=num_workers)
        else:
            vit = "timm:test_vit"
            encode_ssl(images, dest, vit, "random", batch_size=4, num_workers=num_workers, tokens_a_side=4)

    command(tmp_path / "whole", 0)
    return lambda: command(tmp_path / "packed", 2) or contents(tmp_path / "packed"), contents(tmp_path / "whole")


def test_workers_need_no_sockets(large, tmp_path, monkeypatch):
    """The names of sockets have 108 bytes at most, and their place is TMPDIR."""
    command, whole = large
    long = tmp_path / ("long" * 30)
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    monkeypatch.setattr(tempfile, "tempdir", None)
    assert in_process(command, seconds=30) == whole


def test_workers_need_no_shared_memory(large):
    command, whole = large
    assert with_mount("/dev/shm", command) == whole


def test_pixels_are_kept_only_if_they_are_stored(tmp_path, images, vae_folder, monkeypatch):
    kept, most, real = [], [], encode_module.ImageBatches.__call__

    def batch(self, indices):
        most.append(sum(other() is not None for other in kept))
        pixels = real(self, indices)
        kept.append(weakref.ref(pixels))
        return pixels

    monkeypatch.setattr(encode_module.ImageBatches, "__call__", batch)
    encode(images, tmp_path / "without", vae_folder, batch_size=1, num_workers=0)
    assert len(most) == 9 and max(most) <= 1
    encode(images, tmp_path / "with", vae_folder, batch_size=1, num_workers=0, with_images=True)
    assert max(most) == 8


# ---- destinations that are something else


def test_a_dataset_of_something_else_is_not_touched(tmp_path, images, vae_folder, small_units, monkeypatch):
    dest, unfinished = tmp_path / "packed", tmp_path / "unfinished"
    encode(images, dest, vae_folder, num_workers=0)
    monkeypatch.setattr(packed_writer.PackedJob, "finish", lambda self, shard_rows: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        encode(images, unfinished, vae_folder, num_workers=0)
    monkeypatch.undo()
    other, same = make_vae(tmp_path / "other", seed=1), make_vae(tmp_path / "same", seed=0)
    encode(images, dest, same, num_workers=0)  # the same weights under another path
    before = contents(tmp_path)
    for place, state in [(dest, "complete dataset"), (unfinished, "dataset in the making")]:
        with pytest.raises(UserError, match=f"{state}, but with vae_sha256"):
            encode(images, place, other, num_workers=0)
        with pytest.raises(UserError, match="dtype float16, where this command makes float32"):
            encode(images, place, vae_folder, "float32", num_workers=0)
        with pytest.raises(UserError, match="flip False, where this command makes True"):
            encode(images, place, vae_folder, flip=True, num_workers=0)
    assert contents(tmp_path) == before
    (images / "cat" / "0.png").unlink()
    with pytest.raises(UserError, match="count 9, where this command makes 8"):
        encode(images, dest, vae_folder, num_workers=0)


def test_other_images_of_the_same_names_are_not_taken_for_the_first(
    tmp_path, images, vae_folder, small_units, monkeypatch
):
    encode(images, tmp_path / "packed", vae_folder, num_workers=0)
    monkeypatch.setattr(packed_writer.PackedJob, "finish", lambda self, shard_rows: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        encode(images, tmp_path / "unfinished", vae_folder, num_workers=0)
    monkeypatch.undo()
    before = contents(tmp_path / "unfinished")
    Image.new("RGB", (16, 16), (1, 2, 3)).save(images / "dog" / "1.png")
    for dest, state in [("packed", "complete dataset"), ("unfinished", "dataset in the making")]:
        with pytest.raises(UserError, match=f"{state} that was begun from other images"):
            encode(images, tmp_path / dest, vae_folder, num_workers=0)
    assert contents(tmp_path / "unfinished") == before


@pytest.mark.parametrize(
    "damage", ["", "[]", "{", '{"manifest": {}}', '{"manifest": 3, "unit_rows": 4}', '{"manifest": {}, "unit_rows": 0}']
)
def test_a_damaged_job_is_reported(tmp_path, images, vae_folder, damage):
    (tmp_path / "packed" / "unfinished").mkdir(parents=True)
    (tmp_path / "packed" / "unfinished" / "job.json").write_text(damage)
    with pytest.raises(UserError, match=r"job\.json is damaged .* delete \S+packed and give the same command again"):
        encode(images, tmp_path / "packed", vae_folder, num_workers=0)


def test_a_folder_with_other_files_is_not_emptied(tmp_path, images, vae_folder):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "labels.npy").write_text("")
    (tmp_path / "thesis" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"holds labels\.npy, which no unfinished dataset does"):
        encode(images, tmp_path / "thesis", vae_folder, num_workers=0)
    assert len(list((tmp_path / "thesis").iterdir())) == 2
    with pytest.raises(UserError, match="is a file"):
        encode(images, tmp_path / "thesis" / "thesis.tex", vae_folder, num_workers=0)


# ---- bad input


def test_moments_beyond_float16_name_the_image(tmp_path, images, vae_folder, monkeypatch):
    real = encode_module.encode_moments
    monkeypatch.setattr(encode_module, "encode_moments", lambda vae, pixels: real(vae, pixels) + 1e6)
    with pytest.raises(UserError, match=r"cat/0\.png are not finite in float16: give --dtype float32"):
        encode(images, tmp_path / "packed", vae_folder, num_workers=0)
    encode(images, tmp_path / "other", vae_folder, "float32", num_workers=0)


def save(folder, name, size=(16, 16), mode="RGB"):
    Image.new(mode, size).save(folder / name)


def labelled(folder, labels, **more):
    (folder / "dataset.json").write_text(json.dumps({"labels": labels, **more}))


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: save(folder, "cat/z.png", (16, 12)), r"z\.png is 16 x 12 pixels"),
        (lambda folder: save(folder, "eel/z.png", mode="RGBA"), r"z\.png is in mode RGBA"),
        (lambda folder: (folder / "eel" / "z.png").write_bytes(b"no image"), r"z\.png cannot be read"),
    ],
)
def test_bad_images_are_named(tmp_path, images, vae_folder, spoil, message, num_workers):
    spoil(images)
    with pytest.raises(UserError, match=message):
        encode(images, tmp_path / "packed", vae_folder, num_workers=num_workers)
    assert not (tmp_path / "packed" / "dataset.json").exists()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: save(folder, "z.png"), r"z\.png lies beside the class folders"),
        (lambda folder: labelled(folder, [["cat/0.png", 0]]), r"lists no label for"),
        (lambda folder: labelled(folder, None), "expected"),
        (lambda folder: (folder / "dataset.json").write_text("{"), "expected"),
        (lambda folder: labelled(folder, [["cat/0.png", -1]]), "label -1 of cat/0.png"),
        (lambda folder: labelled(folder, [["cat/0.png", "cat"]]), "label 'cat' of cat/0.png"),
        (lambda folder: labelled(folder, [["cat/0.png", 2]], class_names=["a"]), "only 1 class_names"),
        (lambda folder: labelled(folder, [["cat/0.png", 2], ["cat/0.png", 1]]), "listed twice"),
        (
            lambda folder: labelled(
                folder,
                [[f"{name}/{i}.png", 0] for name, count in CLASSES.items() for i in range(count)]
                + [["cat/lost.png", 0]],
            ),
            r"lists a missing image, cat/lost\.png",
        ),
    ],
)
def test_labels_that_do_not_fit_the_images_are_named(images, spoil, message):
    spoil(images)
    with pytest.raises(UserError, match=message):
        list_images(images)


def test_images_the_vae_cannot_take_are_refused(tmp_path, vae_folder):
    (tmp_path / "images" / "cat").mkdir(parents=True)
    save(tmp_path / "images", "cat/0.png", (18, 18))
    with pytest.raises(UserError, match=r"18 pixels high, .* a multiple of 4"):
        encode(tmp_path / "images", tmp_path / "packed", vae_folder, num_workers=0)
