"""The latent space: an `AutoencoderKL` of diffusers (the SD-VAE, or a smaller one of the same form).

The one place that converts pixels to network input, images to moments, moments to latents and latents back to
pixels. The scaling factor belongs to the VAE: take it from `vae.config.scaling_factor` (0.18215 for the SD-VAE),
or from a dataset's manifest.
"""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from errors import UserError

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

SD_VAE = "stabilityai/sd-vae-ft-ema"
PIXELS_AT_ONCE = 8 * 512 * 512  # decoding more needs tens of gigabytes with the SD-VAE


def load_vae(
    name_or_path: str | Path = SD_VAE, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> "AutoencoderKL":
    """The VAE, frozen and in eval mode, from a local folder or by its hub name.

    A folder holds `config.json` and `diffusion_pytorch_model.safetensors` (what `save_pretrained` writes). A
    hub name is looked up in the local cache first and downloaded only if it is not there. Only safetensors are
    read: nothing in the files is executed. Raises `UserError` when it can be had neither way.
    """
    from diffusers import AutoencoderKL  # a slow import, needed by no other part of the models

    source = str(name_or_path)
    options = {"torch_dtype": dtype, "use_safetensors": True}
    try:
        if Path(source).is_dir():
            vae = AutoencoderKL.from_pretrained(source, local_files_only=True, **options)
        elif _looks_local(source):
            raise UserError(
                f"no VAE folder at {source}: give a folder with config.json and "
                f"diffusion_pytorch_model.safetensors, or a hub name such as {SD_VAE}"
            )
        else:
            try:
                vae = AutoencoderKL.from_pretrained(source, local_files_only=True, **options)
            except OSError:
                vae = AutoencoderKL.from_pretrained(source, **options)
    except UserError:
        raise
    except Exception as error:  # diffusers, safetensors and the hub client each raise their own kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"cannot load the VAE {source}: {reason} Give a local folder with config.json and "
            f"diffusion_pytorch_model.safetensors, or a hub name such as {SD_VAE} (needs the network once)"
        ) from error
    return vae.to(device).eval().requires_grad_(False)


def weights_sha256(vae: "AutoencoderKL") -> str:
    """Checksum of a VAE's float32 weights: tells VAEs apart whatever path they were loaded from."""
    sha256 = hashlib.sha256()
    for name, tensor in sorted(vae.state_dict().items()):
        sha256.update(name.encode())
        sha256.update(tensor.float().cpu().contiguous().numpy().tobytes())
    return sha256.hexdigest()


def _looks_local(source: str) -> bool:
    """Whether a name can only mean a place on disk. A hub name is `owner/name`, and no folder `owner` is here."""
    return source.startswith((".", "/", "~")) or source.count("/") != 1 or Path(source).parent.is_dir()


def pixels_to_input(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 images, (N, H, W, 3) or (N, 3, H, W), to float32 (N, 3, H, W) in [-1, 1]."""
    if pixels.dtype != torch.uint8 or pixels.ndim != 4 or 3 not in (pixels.shape[1], pixels.shape[-1]):
        raise ValueError(
            f"expected uint8 images (N, H, W, 3) or (N, 3, H, W), got {pixels.dtype} {tuple(pixels.shape)}"
        )
    if pixels.shape[-1] == 3:
        pixels = pixels.permute(0, 3, 1, 2)
    return pixels.float() / 127.5 - 1


def output_to_pixels(images: torch.Tensor) -> torch.Tensor:
    """Float (N, 3, H, W) in [-1, 1] to uint8 (N, H, W, 3): clamp(127.5 x + 128, 0, 255), which rounds."""
    return (127.5 * images.float() + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


@torch.no_grad()
def encode_moments(vae: "AutoencoderKL", images: torch.Tensor) -> torch.Tensor:
    """Moments of uint8 images: float32 (N, 2C, H/f, W/f), mean and std stacked, on the VAE's device.

    The std is exp(logvar / 2) with diffusers' own clamp of logvar. H and W must be multiples of f.
    """
    height, width = images.shape[1:3] if images.shape[-1] == 3 else images.shape[2:4]
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    if height % factor or width % factor:
        raise UserError(f"images of {height} x {width} px: the VAE needs sides that are multiples of {factor}")
    inputs = pixels_to_input(images.to(vae.device)).to(vae.dtype)
    distribution = vae.encode(inputs).latent_dist
    return torch.cat([distribution.mean, distribution.std], dim=1).float()


def sample_latents(moments: torch.Tensor, scaling_factor: float, noise: torch.Tensor) -> torch.Tensor:
    """Latents (N, C, h, w) = (mean + std * noise) * scaling_factor, float32, from moments (N, 2C, h, w)."""
    mean, std = moments.float().chunk(2, dim=1)
    return (mean + std * noise) * scaling_factor


@torch.no_grad()
def decode(vae: "AutoencoderKL", latents: torch.Tensor) -> torch.Tensor:
    """Latents (N, C, h, w), scaled as `sample_latents` returns them, to uint8 images (N, H, W, 3).

    Decodes a few images at a time, so that memory does not grow with N.
    """
    latents = (latents.to(vae.device).float() / vae.config.scaling_factor).to(vae.dtype)
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    at_once = max(1, PIXELS_AT_ONCE // (factor * factor * latents.shape[-2] * latents.shape[-1]))
    return torch.cat([output_to_pixels(vae.decode(part).sample) for part in latents.split(at_once)])
