"""The VAE wrapper against direct calls of diffusers, on a tiny random network."""

import json

import pytest
import torch
from diffusers import AutoencoderKL

from common.errors import UserError
from models import autoencoder as latent_space


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        latent_channels=4,
        norm_num_groups=2,
        scaling_factor=0.7,
    )
    path = tmp_path_factory.mktemp("vae")
    vae.save_pretrained(path, safe_serialization=True)
    return path


@pytest.fixture(scope="module")
def vae(folder):
    return latent_space.load_vae(folder)


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (3, 32, 48, 3), dtype=torch.uint8, generator=generator)


def test_loaded_vae_is_frozen_and_knows_its_scale(vae):
    assert not vae.training and not any(p.requires_grad for p in vae.parameters())
    assert vae.config.scaling_factor == 0.7
    assert vae.dtype == torch.float32


def test_half_weights_on_disk_load_to_float32(folder, vae, tmp_path):
    AutoencoderKL.from_pretrained(folder).half().save_pretrained(tmp_path)
    loaded = latent_space.load_vae(tmp_path)
    assert loaded.dtype == torch.float32
    for ours, theirs in zip(loaded.parameters(), vae.parameters(), strict=True):
        assert torch.equal(ours, theirs.half().float())


def test_pixels_to_input_ends_and_layouts(images):
    ends = torch.tensor([0, 255], dtype=torch.uint8).reshape(2, 1, 1, 1).expand(2, 8, 8, 3)
    assert latent_space.pixels_to_input(ends).unique().tolist() == [-1.0, 1.0]
    from_nhwc = latent_space.pixels_to_input(images)
    assert from_nhwc.shape == (3, 3, 32, 48)
    assert torch.equal(from_nhwc, latent_space.pixels_to_input(images.permute(0, 3, 1, 2)))
    with pytest.raises(ValueError, match="uint8"):
        latent_space.pixels_to_input(images.float())


def test_output_to_pixels_rounds_and_inverts_every_value():
    values = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).expand(1, 16, 16, 3)
    assert torch.equal(latent_space.output_to_pixels(latent_space.pixels_to_input(values)), values)
    # 127.5 x + 128 then floor is 127.5 (x + 1) rounded to the nearest, beyond the ends clamped
    out = latent_space.output_to_pixels(torch.tensor([-1.2, -1.0, 0.0, 1.0, 1.2]).reshape(5, 1, 1, 1))
    assert out.flatten().tolist() == [0, 0, 128, 255, 255]
    # every value that truncation would lower by one
    near = (torch.arange(1, 255) - 0.4) / 127.5 - 1
    assert latent_space.output_to_pixels(near.reshape(-1, 1, 1, 1)).flatten().tolist() == list(range(1, 255))


def test_moments_are_those_of_diffusers(vae, images):
    moments = latent_space.encode_moments(vae, images)
    expected = vae.encode(images.permute(0, 3, 1, 2) / 127.5 - 1).latent_dist
    assert moments.shape == (3, 8, 4, 6) and moments.dtype == torch.float32
    torch.testing.assert_close(moments[:, :4], expected.mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(moments[:, 4:], torch.exp(0.5 * expected.logvar), rtol=1e-6, atol=1e-6)


def test_logvar_is_clamped_as_diffusers_does(folder, images):
    vae = latent_space.load_vae(folder)
    vae.quant_conv.weight[4:] = 0
    vae.quant_conv.bias[4:] = torch.tensor([-100.0, 100.0, 0.0, 2.0])
    std = latent_space.encode_moments(vae, images)[:, 4:].amax(dim=(0, 2, 3))
    torch.testing.assert_close(std, torch.exp(torch.tensor([-15.0, 10.0, 0.0, 1.0])), rtol=1e-5, atol=0)


def test_sample_latents_formula():
    moments = torch.arange(16.0).reshape(1, 8, 1, 2).half()
    noise = torch.full((1, 4, 1, 2), -2.0)
    latents = latent_space.sample_latents(moments, 0.5, noise)
    assert latents.dtype == torch.float32
    expected = [(m - 2 * (m + 8)) * 0.5 for m in range(8)]
    assert latents.flatten().tolist() == expected


def test_decode_is_diffusers_of_unscaled_latents(vae):
    latents = torch.randn(2, 4, 4, 6, generator=torch.Generator().manual_seed(2))
    decoded = latent_space.decode(vae, latents)
    raw = vae.decode(latents / 0.7).sample
    expected = (127.5 * raw + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    assert decoded.shape == (2, 32, 48, 3) and torch.equal(decoded, expected)
    assert decoded.float().std() > 1  # a constant picture would prove nothing


def test_sides_must_be_multiples_of_f(vae):
    with pytest.raises(UserError, match="multiples of 8"):
        latent_space.encode_moments(vae, torch.zeros(1, 30, 32, 3, dtype=torch.uint8))


def test_a_mistyped_folder_is_no_hub_name(monkeypatch, tmp_path):
    """`assets/vea` beside an existing `assets` must not start a search of the hub."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "assets").mkdir()
    with pytest.raises(UserError, match="no VAE folder at assets/vea"):
        latent_space.load_vae("assets/vea")


def test_missing_folder_and_broken_files(folder, tmp_path):
    with pytest.raises(UserError, match=r"no VAE folder at \./nowhere"):
        latent_space.load_vae("./nowhere")
    with pytest.raises(UserError, match="cannot load the VAE"):
        latent_space.load_vae(tmp_path)  # empty
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(UserError, match="cannot load the VAE"):
        latent_space.load_vae(tmp_path)  # no weights
    weights = (folder / "diffusion_pytorch_model.safetensors").read_bytes()
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(UserError, match="cannot load the VAE"):
        latent_space.load_vae(tmp_path)  # truncated


def test_pickled_weights_are_refused(folder, vae, tmp_path):
    """A .bin file may execute code: only safetensors count as weights."""
    (tmp_path / "config.json").write_text(json.dumps(dict(vae.config)))
    torch.save(vae.state_dict(), tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match="cannot load the VAE"):
        latent_space.load_vae(tmp_path)


def test_unknown_hub_name_without_network(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="cannot load the VAE nobody/nothing"):
        latent_space.load_vae("nobody/nothing")
