"""Training the demo's own small models: a few steps on a few images."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from models import autoencoder as latent_space
from models.ssl_encoders import load_encoder
from preprocessing import demo_models


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def folder(tmp_path):
    """Six 16 px images of plain colours, listed as the demo data is."""
    images = tmp_path / "images"
    images.mkdir()
    labels = []
    for index in range(6):
        pixels = np.full((16, 16, 3), 40 * index, dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{index}.png")
        labels.append([f"{index}.png", index % 2])
    (images / "dataset.json").write_text(json.dumps({"labels": labels}))
    return images


def train(data, dest, **changes):
    options = dict(steps=3, batch_size=2, lr=1e-3, kl_weight=1e-6, max_minutes=1.0, seed=0)
    demo_models.train_vae(data, dest, **{**options, **changes})


def test_images_and_labels_in_listed_order(folder):
    images, labels = demo_models.load_images(folder)
    assert images.shape == (6, 16, 16, 3) and images.dtype == torch.uint8
    assert images[:, 0, 0, 0].tolist() == [0, 40, 80, 120, 160, 200]
    assert labels.tolist() == [0, 1, 0, 1, 0, 1]


def test_saved_vae_loads_and_scales_latents_to_unit_variance(folder, tmp_path):
    train(folder, tmp_path / "vae")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images", "vae"]  # nothing left beside
    vae = latent_space.load_vae(tmp_path / "vae")
    images, _ = demo_models.load_images(folder)
    moments = latent_space.encode_moments(vae, images)
    noise = torch.randn(500, *moments[:, :4].shape[1:], generator=torch.Generator().manual_seed(0))
    many = moments.repeat(500 // 6 + 1, 1, 1, 1)[:500]
    latents = latent_space.sample_latents(many, vae.config.scaling_factor, noise)
    assert latents.std().item() == pytest.approx(1, abs=0.03)


def test_same_seed_same_weights(folder, tmp_path):
    for name, changes in {"a": {}, "b": {}, "c": {"seed": 1}}.items():
        train(folder, tmp_path / name, **changes)
    a, b, c = (latent_space.load_vae(tmp_path / name).state_dict() for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(a["decoder.conv_in.weight"], c["decoder.conv_in.weight"])


def test_psnr_closed_form(folder, tmp_path):
    """A decoder that answers one grey everywhere: PSNR is that of the distance to it."""
    train(folder, tmp_path / "vae", steps=1)
    vae = latent_space.load_vae(tmp_path / "vae")
    vae.decoder.conv_out.weight.zero_()
    vae.decoder.conv_out.bias.zero_()  # output 0 is pixel 128
    images = torch.full((2, 16, 16, 3), 118, dtype=torch.uint8)
    moments = latent_space.encode_moments(vae, images)
    psnr = demo_models.reconstruction_psnr(vae, images, moments)
    assert psnr == pytest.approx(20 * np.log10(255 / 10), abs=1e-6)


def test_missing_or_mixed_data(folder, tmp_path):
    with pytest.raises(UserError, match="preprocessing.demo_data"):
        demo_models.load_images(tmp_path / "nowhere")
    Image.new("RGB", (8, 8)).save(folder / "3.png")
    with pytest.raises(UserError, match="one size"):
        demo_models.load_images(folder)


def test_no_steps_is_an_error_before_anything_is_read(tmp_path):
    with pytest.raises(UserError, match="--steps 0"):
        train(tmp_path / "nowhere", tmp_path / "vae", steps=0)


def test_the_vit_learns_the_classes_and_is_an_encoder(tmp_path, capsys):
    """Black and white pictures are told apart."""
    for index in range(6):
        Image.new("RGB", (32, 32), "black" if index % 2 else "white").save(tmp_path / f"{index}.png")
    labels = [[f"{index}.png", index % 2] for index in range(6)]
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels}))
    dest = tmp_path / "made" / "vit.safetensors"
    demo_models.train_vit(tmp_path, dest, steps=30, batch_size=8, lr=3e-3, seed=0)
    assert "step 30: " in (printed := capsys.readouterr().out) and "100% of the batch right" in printed
    assert [file.name for file in dest.parent.iterdir()] == ["vit.safetensors"]
    images, _ = demo_models.load_images(tmp_path)
    tokens, untrained = (load_encoder(demo_models.DEMO_VIT, 2, weights)(images) for weights in (dest, "random"))
    assert tokens.shape == (6, 4, 64) and not torch.allclose(tokens, untrained, atol=0.1)


def test_images_that_no_patches_of_16_cover_are_refused(folder, tmp_path):
    Image.new("RGB", (24, 24)).save(folder / "0.png")
    (folder / "dataset.json").write_text(json.dumps({"labels": [["0.png", 0]]}))
    with pytest.raises(UserError, match="24 x 24 px: expected squares of a multiple of 16"):
        demo_models.train_vit(folder, tmp_path / "vit.safetensors", steps=1, batch_size=2, lr=1e-3, seed=0)
    assert not (tmp_path / "vit.safetensors").exists()
