"""`encode` stores what the VAE says of each image; half a dataset is never taken for a whole one."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from dataset import PackedLatents
from errors import UserError
from preprocessing import encode as encode_module
from preprocessing.dataset_tools import main
from preprocessing.encode import encode
from preprocessing.images import list_images
from preprocessing.verify import info, verify

CLASSES = {"cat": 4, "dog": 3, "eel": 2}


def make_vae(path, seed):
    """A random AutoencoderKL of a few thousand parameters, f = 4, as the SD-VAE in all but size."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=[4, 4, 8],
        layers_per_block=1,
        norm_num_groups=2,
        latent_channels=4,
        sample_size=16,
        scaling_factor=0.7,
    )
    vae.save_pretrained(path)
    return vae.eval()


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    make_vae(folder, seed=0)
    return str(folder)


@pytest.fixture
def images(tmp_path):
    """Nine noise images of 16 px in three class folders."""
    rng = np.random.default_rng(0)
    for name, count in CLASSES.items():
        folder = tmp_path / "images" / name
        folder.mkdir(parents=True)
        for index in range(count):
            pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{index}.png")
    return tmp_path / "images"


def run_main(monkeypatch, *arguments):
    """The exit code of one command line."""
    monkeypatch.setattr(sys, "argv", ["dataset_tools", *map(str, arguments)])
    try:
        main()
    except SystemExit as stop:
        return stop.code
    return 0


# ---- encode


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float16", 1e-3)])
def test_encoded_moments_are_those_of_diffusers(tmp_path, images, vae_folder, dtype, tolerance):
    from diffusers import AutoencoderKL

    dest = tmp_path / "packed"
    encode(images, dest, vae_folder, dtype, batch_size=4, num_workers=0, shard_rows=5)
    data = PackedLatents(dest)
    assert data.scaling_factor == 0.7 and data.manifest["dtype"] == dtype and data.manifest["resolution"] == 16
    assert data.class_names == list(CLASSES) and len(data.manifest["shards"]) == 2
    assert data.labels.tolist() == [0] * 4 + [1] * 3 + [2] * 2

    vae = AutoencoderKL.from_pretrained(vae_folder).eval()
    moments, _ = data.gather(np.arange(9))
    for index, name in enumerate(data.names):  # paired by name, whatever the order they are stored in
        pixels = torch.from_numpy(np.array(Image.open(images / name))).float()
        with torch.no_grad():
            latent = vae.encode(pixels.permute(2, 0, 1)[None] / 127.5 - 1).latent_dist
        expected = torch.cat([latent.mean, latent.std], dim=1)[0].numpy()
        np.testing.assert_allclose(moments[index], expected, atol=tolerance, rtol=tolerance)


def test_encode_by_command_line_then_info_then_verify(tmp_path, images, vae_folder, monkeypatch, capsys):
    dest = tmp_path / "packed"
    command = ["encode", "--source", images, "--dest", dest, "--vae", vae_folder, "--device", "cpu"]
    assert run_main(monkeypatch, *command, "--num-workers", 1, "--batch-size", 2) == 0
    assert "9 samples in 3 classes" in capsys.readouterr().out
    before = {file: file.stat().st_mtime_ns for file in dest.iterdir()}
    assert run_main(monkeypatch, *command) == 0
    assert "is complete (9 samples)" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in dest.iterdir()} == before
    assert run_main(monkeypatch, "info", dest) == 0
    out = capsys.readouterr().out
    assert "3, of 2 to 4 samples each" in out and "(8, 4, 4) float16" in out and "0.7" in out
    assert run_main(monkeypatch, "verify", dest) == 0
    assert "all as written" in capsys.readouterr().out


def test_labels_come_from_dataset_json_by_name(tmp_path, images, vae_folder):
    labels = [["eel/1.png", 7], ["cat/0.png", 2], ["dog/2.png", 0]]
    rest = [[f"{name}/{i}.png", 1] for name, count in CLASSES.items() for i in range(count)]
    labels += [pair for pair in rest if pair[0] not in dict(labels)]
    (images / "dataset.json").write_text(json.dumps({"labels": labels}))
    encode(images, tmp_path / "packed", vae_folder, num_workers=0)
    data = PackedLatents(tmp_path / "packed")
    assert dict(zip(data.names, data.labels.tolist(), strict=True)) == dict(labels)
    assert data.num_classes == 8 and data.class_names[7] == "7"


def test_a_killed_encode_leaves_nothing_that_is_accepted(tmp_path, images, vae_folder, monkeypatch):
    """Stopped in every batch in turn; then the same command makes what an uninterrupted one makes."""
    encode(images, tmp_path / "whole", vae_folder, batch_size=2, num_workers=0, shard_rows=4)
    dest, real = tmp_path / "packed", encode_module.encode_moments
    for last in range(5):
        calls = iter(range(9))

        def dying(vae, pixels, calls=calls, last=last):
            if next(calls) == last:
                raise KeyboardInterrupt
            return real(vae, pixels)

        monkeypatch.setattr(encode_module, "encode_moments", dying)
        with pytest.raises(KeyboardInterrupt):
            encode(images, dest, vae_folder, batch_size=2, num_workers=0, shard_rows=4)
        assert not list(dest.glob("*.partial")) and not (dest / "dataset.json").exists()
        with pytest.raises(UserError):
            PackedLatents(dest)
    monkeypatch.setattr(encode_module, "encode_moments", real)
    (dest / "moments-00009.npy.partial").write_bytes(b"left by kill -9")
    encode(images, dest, vae_folder, batch_size=2, num_workers=0, shard_rows=4)
    whole = {file.name: file.read_bytes() for file in (tmp_path / "whole").iterdir()}
    assert {file.name: file.read_bytes() for file in dest.iterdir()} == whole


def test_a_finished_dataset_of_something_else_is_not_touched(tmp_path, images, vae_folder):
    dest = tmp_path / "packed"
    encode(images, dest, vae_folder, num_workers=0)
    make_vae(tmp_path / "other", seed=1)
    make_vae(tmp_path / "same", seed=0)
    encode(images, dest, str(tmp_path / "same"), num_workers=0)  # the same weights under another path
    before = {file: file.read_bytes() for file in dest.iterdir()}
    with pytest.raises(UserError, match="vae_sha256"):
        encode(images, dest, str(tmp_path / "other"), num_workers=0)
    with pytest.raises(UserError, match="dtype float16, where this command makes float32"):
        encode(images, dest, vae_folder, "float32", num_workers=0)
    (images / "cat" / "0.png").unlink()
    with pytest.raises(UserError, match="count 9, where this command makes 8"):
        encode(images, dest, vae_folder, num_workers=0)
    assert {file: file.read_bytes() for file in dest.iterdir()} == before


def test_a_folder_with_other_files_is_not_emptied(tmp_path, images, vae_folder):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "labels.npy").write_text("")
    (tmp_path / "thesis" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"thesis\.tex"):
        encode(images, tmp_path / "thesis", vae_folder, num_workers=0)
    assert len(list((tmp_path / "thesis").iterdir())) == 2
    with pytest.raises(UserError, match="is a file"):
        encode(images, tmp_path / "thesis" / "thesis.tex", vae_folder, num_workers=0)


def test_moments_beyond_float16_name_the_image(tmp_path, images, vae_folder, monkeypatch):
    real = encode_module.encode_moments
    monkeypatch.setattr(encode_module, "encode_moments", lambda vae, pixels: real(vae, pixels) + 1e6)
    with pytest.raises(UserError, match=r"cat/0\.png are not finite in float16: give --dtype float32"):
        encode(images, tmp_path / "packed", vae_folder, num_workers=0)
    encode(images, tmp_path / "packed", vae_folder, "float32", num_workers=0)


# ---- bad input


def save(folder, name, size=(16, 16), mode="RGB"):
    Image.new(mode, size).save(folder / name)


def labelled(folder, labels, **more):
    (folder / "dataset.json").write_text(json.dumps({"labels": labels, **more}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: save(folder, "cat/z.png", (16, 12)), r"z\.png is 16 x 12 pixels"),
        (lambda folder: save(folder, "eel/z.png", mode="RGBA"), r"z\.png is in mode RGBA"),
        (lambda folder: (folder / "eel" / "z.png").write_bytes(b"no image"), r"z\.png cannot be read"),
        (lambda folder: save(folder, "z.png"), r"z\.png is in no class folder"),
        (lambda folder: labelled(folder, [["cat/0.png", 0]]), r"lists no label for"),
        (lambda folder: labelled(folder, None), "expected"),
        (lambda folder: (folder / "dataset.json").write_text("{"), "expected"),
        (lambda folder: labelled(folder, [["cat/0.png", -1]]), "label -1 of cat/0.png"),
        (lambda folder: labelled(folder, [["cat/0.png", "cat"]]), "label 'cat' of cat/0.png"),
        (lambda folder: labelled(folder, [["cat/0.png", 2]], class_names=["a"]), "only 1 class_names"),
    ],
)
def test_bad_images_are_named(tmp_path, images, vae_folder, spoil, message):
    spoil(images)
    with pytest.raises(UserError, match=message):
        encode(images, tmp_path / "packed", vae_folder, num_workers=0)
    assert not (tmp_path / "packed" / "dataset.json").exists()


def test_a_label_without_its_image_is_named(images):
    labels = [[f"{name}/{i}.png", 0] for name, count in CLASSES.items() for i in range(count)]
    labelled(images, [*labels, ["cat/lost.png", 0]])
    with pytest.raises(UserError, match=r"lists a missing image, cat/lost\.png"):
        list_images(images)


def test_images_the_vae_cannot_take_are_refused(tmp_path, vae_folder):
    (tmp_path / "images" / "cat").mkdir(parents=True)
    save(tmp_path / "images", "cat/0.png", (18, 18))
    with pytest.raises(UserError, match=r"18 pixels high, .* a multiple of 4"):
        encode(tmp_path / "images", tmp_path / "packed", vae_folder, num_workers=0)


def test_mistakes_end_in_one_line_and_exit_code_2(tmp_path, images, monkeypatch, capsys):
    """Through the real program once, in this process for the rest."""
    command = [sys.executable, "-m", "preprocessing.dataset_tools", "info", str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: no dataset folder") and done.stderr.count("\n") == 1
    rest = ["--dest", tmp_path / "packed", "--vae", tmp_path / "no_vae", "--device", "cpu"]
    (tmp_path / "void").mkdir()
    for source, more, message in [
        (tmp_path / "absent", [], "no folder or zip file"),
        (tmp_path / "void", [], "no images"),
        (images, [], "no_vae"),
        (images, ["--batch-size", 0], "--batch-size"),
        (images, ["--num-workers", -1], "--num-workers"),
    ]:
        assert run_main(monkeypatch, "encode", "--source", source, *rest, *more) == 2
        captured = capsys.readouterr()
        assert message in captured.err and captured.err.count("\n") == 1
    assert not (tmp_path / "packed").exists()


def test_a_worker_process_reports_as_plainly(tmp_path, images, vae_folder, monkeypatch, capsys):
    (images / "eel" / "1.png").write_bytes(b"no image")
    command = ["encode", "--source", images, "--dest", tmp_path / "packed", "--vae", vae_folder]
    assert run_main(monkeypatch, *command, "--device", "cpu", "--num-workers", 2) == 2
    *bars, line = capsys.readouterr().err.strip().split("\n")
    assert line.startswith("error: ") and "eel/1.png cannot be read" in line
    assert all("encode:" in bar for bar in bars)


# ---- verify and info


@pytest.mark.parametrize("file", ["moments-00001.npy", "labels.npy", "names.json"])
def test_verify_names_the_damaged_file(tmp_path, images, vae_folder, file):
    dest = tmp_path / "packed"
    encode(images, dest, vae_folder, num_workers=0, shard_rows=5)
    content = bytearray((dest / file).read_bytes())
    content[-9] ^= 1
    (dest / file).write_bytes(content)
    with pytest.raises(UserError, match=file):
        verify(dest)


def test_info_reads_a_dataset_only(tmp_path):
    with pytest.raises(UserError, match="is empty"):
        info(tmp_path)
