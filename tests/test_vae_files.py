"""VAEs as users have them: files that do not fit, latents that are shifted, folders that moved to another place."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.sample_data import make_images, make_vae, run_main
from helpers.sampling_runs import command as generate_command
from helpers.training_runs import write_dataset
from safetensors.torch import load_file, save_file

from common import files
from common.errors import UserError
from models import autoencoder as latent_space
from models import checkpoints
from training import export

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return make_vae(tmp_path_factory.mktemp("vae") / "vae", scaling_factor=0.5)


def spoilt(whole, folder, change=None, **config):
    """A copy of a VAE with other tensors or another configuration."""
    shutil.copytree(whole, folder)
    if change:
        save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)
    content = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(content))
    return str(folder)


def without(words):
    return lambda weights: {name: tensor for name, tensor in weights.items() if words not in name}


def renamed(weights):
    return {"first_stage_model." + name.replace("down_blocks", "down"): tensor for name, tensor in weights.items()}


BAD = {
    "missing": (without("quant_conv"), {}, "4 missing (post_quant_conv.bias, post_quant_conv.weight, quant"),
    "unexpected": (lambda w: {**w, "loss.logvar": torch.zeros(1)}, {}, "1 unexpected (loss.logvar)"),
    "of latent diffusion": (renamed, {}, "the names of latent-diffusion files"),
    "of other shape": (lambda w: {**w, "quant_conv.bias": torch.zeros(3)}, {}, "quant_conv.bias expected shape"),
    "of more layers": (None, {"layers_per_block": 2}, "missing (decoder.up_blocks.0.resnets.2.conv1.bias"),
    "of another class": (None, {"_class_name": "AutoencoderTiny"}, "of class AutoencoderTiny"),
    "of another kind": (None, {"_class_name": "UNet2DConditionModel"}, "of class UNet2DConditionModel"),
    "shifted": (None, {"shift_factor": 0.0609}, "shift_factor 0.0609, and only a scaling_factor"),
    "with means": (None, {"latents_mean": [0.1] * 4, "latents_std": [1.0] * 4}, "latents_mean [0.1, 0.1"),
    "scaled by text": (None, {"scaling_factor": "0.18"}, "scaling_factor '0.18'"),
    "scaled by nothing": (None, {"scaling_factor": None}, "scaling_factor None"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_vae_that_does_not_fit_is_one_line(whole, tmp_path, capsys, name):
    change, config, message = BAD[name]
    folder = spoilt(whole, tmp_path / "bad", change, **config)
    with pytest.raises(UserError) as told:
        latent_space.load_vae(folder)
    assert message in str(told.value) and folder in str(told.value) and "\n" not in str(told.value)
    assert capsys.readouterr().err == ""


def test_a_shift_of_nothing_is_none(whole, tmp_path):
    latent_space.load_vae(spoilt(whole, tmp_path / "a", shift_factor=None, latents_mean=None, latents_std=None))
    latent_space.load_vae(spoilt(whole, tmp_path / "b", shift_factor=0.0))
    latent_space.load_vae(spoilt(whole, tmp_path / "c", latents_mean=[0.0] * 4, latents_std=[1.0] * 4))


def test_a_vae_whose_weights_are_not_finite_makes_no_dataset(whole, tmp_path, monkeypatch, capsys):
    nan = spoilt(whole, tmp_path / "nan", lambda w: {**w, "quant_conv.bias": w["quant_conv.bias"] * torch.nan})
    source = make_images(tmp_path / "images")
    assert run_main(monkeypatch, "encode", "--source", source, "--dest", tmp_path / "out", "--vae", nan) == 2
    assert "is not finite: its weights are damaged" in capsys.readouterr().err
    assert not (tmp_path / "out" / "dataset.json").exists()


def test_weights_of_an_executable_kind_are_one_line(whole, tmp_path, capfd):
    folder = spoilt(whole, tmp_path / "bin")
    (tmp_path / "bin" / WEIGHTS).rename(tmp_path / "bin" / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match="no file named diffusion_pytorch_model.safetensors"):
        latent_space.load_vae(folder)
    assert capfd.readouterr().err == ""


def test_a_dataset_names_no_place_on_the_machine(whole, tmp_path, monkeypatch):
    source = make_images(tmp_path / "images")
    assert run_main(monkeypatch, "encode", "--source", source, "--dest", tmp_path / "out", "--vae", whole) == 0
    text = (tmp_path / "out" / "dataset.json").read_text()
    assert json.loads(text)["vae"] == "vae" and str(Path(whole).parent) not in text


@pytest.mark.parametrize("name", ["missing", "shifted"])
def test_it_is_one_line_in_every_command(whole, tmp_path, monkeypatch, capsys, start, run, name):
    change, config, message = BAD[name]
    folder = spoilt(whole, tmp_path / "bad", change, **config)
    source = make_images(tmp_path / "images")
    assert run_main(monkeypatch, "encode", "--source", source, "--dest", tmp_path / "out", "--vae", folder) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()
    with pytest.raises(SystemExit, match="2"):
        generate_command(monkeypatch, run, tmp_path / "out", "--vae", folder)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()
    data = write_dataset(tmp_path / "data", resolution=16, vae=folder)
    for flags in ((), ("--preview-vae", folder)):
        with pytest.raises(UserError) as told:
            start("--data-dir", data, "--preview-every", "2", *flags)
        assert message in str(told.value) and not (tmp_path / "run").exists()


# ---- latents of another number of channels


def test_channels_are_compared_before_any_work(monkeypatch, capsys, run, tmp_path, start, whole):
    from models import DeepFlow

    config = checkpoints.read(run).config | {"in_channels": 2}
    metadata = checkpoints.read(run).metadata
    checkpoints.save(tmp_path / "half.safetensors", DeepFlow(**config).state_dict(), config, metadata)
    with pytest.raises(SystemExit, match="2"):
        generate_command(monkeypatch, run, tmp_path / "out", "--ckpt", str(tmp_path / "half.safetensors"))
    error = capsys.readouterr().err
    assert "half.safetensors has 2 latent channels" in error and "decodes 4" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    wide = tmp_path / "wide"
    from diffusers import AutoencoderKL

    AutoencoderKL.from_config(AutoencoderKL.load_config(whole) | {"latent_channels": 8}).save_pretrained(wide)
    data = write_dataset(tmp_path / "data", resolution=16, vae=whole)
    with pytest.raises(UserError, match="has 4 latent channels, but the VAE .* decodes 8"):
        start("--data-dir", data, "--preview-every", "2", "--preview-vae", wide)
    assert not (tmp_path / "run").exists()


# ---- names that travel


@pytest.mark.parametrize(
    ("name", "portable"),
    [
        ("stabilityai/sd-vae-ft-ema", "stabilityai/sd-vae-ft-ema"),
        ("ema", "ema"),
        ("assets/vae", "assets/vae"),
        (str(files.REPOSITORY / "assets" / "demo_vae"), "assets/demo_vae"),
        ("/home/me/vaes/mine", "mine"),
        ("../me/mine", "mine"),
        ("~/mine", "mine"),
        ("/c/hub/models--stabilityai--sd-vae-ft-mse/snapshots/31f26fdeee1355a5c34592e401dd41e45d25a493",
         "stabilityai/sd-vae-ft-mse"),
        ("/c/hub/models--a--b/snapshots/123/vae", "vae"),
    ],
)  # fmt: skip
def test_portable_names(name, portable):
    assert latent_space.portable_name(name) == portable


def checkpoint_of(vae, path, name, **metadata):
    """The golden-size checkpoint of `run`, of this VAE under that name."""
    ours = checkpoints.read(path)
    sha256 = latent_space.weights_sha256(latent_space.load_vae(vae))
    return ours, {**ours.metadata, "vae": name, "vae_sha256": sha256, "scaling_factor": 0.5, **metadata}


def test_a_vae_is_found_by_its_checksum(monkeypatch, capsys, run, whole, tmp_path):
    """Under another name, in the assets or the hub's cache; and where it is nowhere, the flag is named."""
    import huggingface_hub.constants

    ours, metadata = checkpoint_of(whole, run, "/gone/home/me/vae")
    checkpoints.save(tmp_path / "c.safetensors", ours.weights, ours.config, metadata)
    flags = ["--ckpt", str(tmp_path / "c.safetensors")]
    monkeypatch.setattr(latent_space, "REPOSITORY", tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(SystemExit, match="2"):
        generate_command(monkeypatch, run, tmp_path / "out", *flags)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and metadata["vae_sha256"][:12] in error and "give it with --vae FOLDER" in error
    make_vae(tmp_path / "assets" / "other", seed=1)
    shutil.copytree(whole, tmp_path / "hub" / "models--me--mine" / "snapshots" / "1")
    generate_command(monkeypatch, run, tmp_path / "out", *flags)
    text = (tmp_path / "out" / "x.json").read_text()
    record = json.loads(text)
    assert record["vae"] == "me/mine" and record["vae_sha256"] == metadata["vae_sha256"]
    assert record["checkpoint_metadata"]["vae"] == "vae" and record["checkpoint"].endswith("/c.safetensors")
    assert str(tmp_path) not in text and "/gone" not in text and "--ckpt" in record["command"]
    capsys.readouterr()
    generate_command(monkeypatch, run, tmp_path / "out", *flags)
    assert "made already" in capsys.readouterr().out


def test_samples_of_older_records_are_still_known(monkeypatch, capsys, run, tmp_path):
    generate_command(monkeypatch, run, tmp_path)
    record = json.loads((tmp_path / "x.json").read_text())
    record |= {"checkpoint": str(run), "vae": str(run / "vae"), "checkpoint_metadata": {"vae": str(run / "vae")}}
    (tmp_path / "x.json").write_text(json.dumps(record))
    capsys.readouterr()
    generate_command(monkeypatch, run, tmp_path)
    assert "made already" in capsys.readouterr().out


def test_a_card_names_no_place_and_says_float32(run, whole, tmp_path):
    ours, metadata = checkpoint_of(whole, run, "/home/me/vae", training={"mixed_precision": "no"})
    checkpoints.save(tmp_path / "ema.safetensors", ours.weights, ours.config, metadata)
    card = export.export(tmp_path, tmp_path / "shared.safetensors").read_text()
    assert "/home/me" not in card and f"VAE `vae`, weights SHA-256 {metadata['vae_sha256'][:12]}" in card
    assert "trained in float32" in card and "trained in no" not in card
    assert checkpoints.read(tmp_path / "shared.safetensors").metadata["vae"] == "vae"


# ---- classes without images


def test_only_classes_with_images_are_drawn(monkeypatch, capsys, run, tmp_path):
    import numpy as np

    ours = checkpoints.read(run)
    counted = tmp_path / "counted.safetensors"
    checkpoints.save(counted, ours.weights, ours.config, {**ours.metadata, "class_counts": [0, 5, 4]})
    seen = {}
    for classes in ("random", "balanced", "data", "0,2"):
        generate_command(
            monkeypatch, run, tmp_path, "--ckpt", str(counted), "--classes", classes, "--name", classes, "--no-grid"
        )
        seen[classes] = np.load(tmp_path / f"{classes}.npz")["arr_1"].tolist()
        warned = "warning: --classes names 0, of which the training data had no image" in capsys.readouterr().err
        assert warned == (classes == "0,2")
        record = json.loads((tmp_path / f"{classes}.json").read_text())
        assert record.get("empty_classes") == ([0] if classes in ("random", "balanced") else None)
    assert seen["balanced"] == [1, 2] * 4 and seen["0,2"] == [0, 2] * 4
    assert set(seen["random"]) == set(seen["data"]) == {1, 2}


def test_labels_are_what_they_were_where_all_classes_have_images_or_none_are_counted():
    from generation.conditions import choose_labels

    for classes in ("random", "balanced", "2 0"):
        plain = choose_labels(classes, 50, 3, None, 3).tolist()
        assert choose_labels(classes, 50, 3, [7, 1, 2], 3).tolist() == plain
    assert choose_labels("balanced", 5, 3, None, 0).tolist() == [0, 1, 2, 0, 1]


def test_a_preview_shows_only_classes_with_images(start, tmp_path, whole, monkeypatch):
    from training import previews

    data, seen = write_dataset(tmp_path / "data", resolution=16, vae=whole), []
    real = previews.choose_labels
    monkeypatch.setattr(previews, "choose_labels", lambda *given: seen.append(given) or real(*given))
    start("--data-dir", data, "--preview-every", "1", "--preview-samples", "3", steps=1)
    assert sum(seen[0][3]) == 23


# ---- names in pictures


@pytest.mark.parametrize("name", ["$x_{", "猫", "caf\udce9", "two\nlines", "", 7, "a" * 300])
def test_any_name_of_a_class_is_drawn(tmp_path, name):
    import numpy as np
    from PIL import Image

    from generation.pictures import save_grid

    images = np.zeros((2, 16, 16, 3), np.uint8)
    save_grid(images.__getitem__, np.zeros(2, int), [name], tmp_path / "grid.png")
    assert Image.open(tmp_path / "grid.png").size == (150 + 2 * 16, 16)


def test_samples_do_not_fail_by_their_grid(monkeypatch, capsys, run, tmp_path):
    from PIL import ImageDraw

    def fail(*_, **__):
        raise RuntimeError("no font")

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", fail)
    generate_command(monkeypatch, run, tmp_path)
    assert f"warning: {tmp_path / 'x.png'} could not be drawn (no font)" in capsys.readouterr().err
    assert (tmp_path / "x.npz").exists() and (tmp_path / "x.json").exists()
