"""The latent space: an `AutoencoderKL` of diffusers (the SD-VAE, or a smaller one of the same form).

The one place that converts pixels to network input, images to moments, moments to latents and latents back to
pixels. The scaling factor belongs to the VAE: take it from `vae.config.scaling_factor` (0.18215 for the SD-VAE),
or from a dataset's manifest.
"""

import hashlib
import json
import math
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch

from common.errors import UserError, first_line
from common.files import REPOSITORY, named_in_utf8, portable
from common.sd_vae import SD_VAE

PIXELS_AT_ONCE = 8 * 512 * 512  # decoding more needs tens of gigabytes with the SD-VAE
# The parts of an affine that do more than scale, with the value at which they do nothing.
OFF_CENTRE = {"shift_factor": 0, "latents_mean": 0, "latents_std": 1}


class Autoencoder(Protocol):
    """What the project uses of a VAE; diffusers' `AutoencoderKL` has it, and is a `torch.nn.Module`."""

    config: Any  # scaling_factor, latent_channels, block_out_channels, _name_or_path
    device: torch.device
    dtype: torch.dtype

    def encode(self, images: torch.Tensor, /) -> Any:
        """`.latent_dist` of images (N, 3, H, W) in [-1, 1], with `.mean` and `.std`."""

    def decode(self, latents: torch.Tensor, /) -> Any:
        """`.sample`, images (N, 3, H, W) in [-1, 1] of latents (N, C, h, w) before scaling."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Its weights."""

    def to(self, device: str | torch.device, /) -> "Autoencoder":
        """Itself, on a device."""

    def eval(self) -> "Autoencoder":
        """Itself, in evaluation mode."""

    def requires_grad_(self, required: bool, /) -> "Autoencoder":
        """Itself, frozen or not."""


def load_vae(
    name_or_path: str | Path = SD_VAE, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Autoencoder:
    """The VAE, frozen and in eval mode, from a local folder or by its hub name.

    A folder holds `config.json` and `diffusion_pytorch_model.safetensors` (what `save_pretrained` writes). A
    hub name is looked up in the local cache first and downloaded only if it is not there. Only safetensors are
    read: nothing in the files is executed. Raises `UserError` when neither works, when its weights are not exactly
    those of its configuration, and when its latents are more than scaled.
    """
    source = str(name_or_path)
    is_folder = Path(source).is_dir()
    if not is_folder and _looks_local(source):
        raise UserError(
            f"no VAE folder at {source}: give a folder with config.json and "
            f"diffusion_pytorch_model.safetensors, or a hub name such as {SD_VAE}"
        )
    try:
        try:
            vae, loading = _read(source, dtype, local_files_only=True)
        except OSError:
            if is_folder:
                raise
            vae, loading = _read(source, dtype, local_files_only=False)
    except UserError:
        raise
    except Exception as error:  # diffusers, safetensors and the hub client each raise their own kinds
        reason = first_line(error).split(" If you want to instead")[0]  # diffusers' advice is for programmers
        raise UserError(
            f"cannot load the VAE {source}: {reason} Give a local folder with config.json and "
            f"diffusion_pytorch_model.safetensors, or a hub name such as {SD_VAE} (needs the network once)"
        ) from error
    missing, unexpected = sorted(loading["missing_keys"]), sorted(loading["unexpected_keys"])
    if missing or unexpected:
        kinds = [f"{len(names)} {kind} ({_few(names)})" for kind, names in
                 (("missing", missing), ("unexpected", unexpected)) if names]  # fmt: skip
        other = any(re.match(r"first_stage_model\.|(en|de)coder\.(down|up|mid)\.", name) for name in unexpected)
        remedy = "these are the names of latent-diffusion files, convert them with diffusers" if other else (
            "copy or download it again")  # fmt: skip
        raise UserError(f"the VAE {source} has not the tensors of its config.json: {'; '.join(kinds)}: {remedy}")
    return vae.to(device).eval().requires_grad_(False)


def _read(source: str, dtype: torch.dtype, local_files_only: bool) -> tuple[Autoencoder, dict[str, Any]]:
    """The VAE, and which tensors its file lacks or has in addition; those that it lacks have no memory."""
    from diffusers import AutoencoderKL  # a slow import, needed by no other part of the models

    with _quiet_diffusers(), named_in_utf8(source) as name:
        _check_config(AutoencoderKL.load_config(name, local_files_only=local_files_only), source)
        vae, loading = AutoencoderKL.from_pretrained(
            name,
            local_files_only=local_files_only,
            torch_dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
        )
    vae.register_to_config(_name_or_path=source)
    return cast(Autoencoder, vae), loading


def _check_config(config: dict[str, Any], source: str) -> None:
    """Raise `UserError` for a configuration of another kind of network, or of latents that we would get wrong."""
    kind = config.get("_class_name", "AutoencoderKL")
    if kind != "AutoencoderKL":
        raise UserError(f"the VAE {source} is of class {kind} by its config.json: give an AutoencoderKL")
    shifts = [
        f"{name} {config[name]}"
        for name, neutral in OFF_CENTRE.items()
        if config.get(name) is not None and np.any(np.asarray(config[name]) != neutral)
    ]
    if shifts:
        raise UserError(
            f"the VAE {source} has {', '.join(shifts)}, and only a scaling_factor is supported: its latents would be "
            f"off-centre; give a VAE without, such as {SD_VAE}"
        )
    scale = config.get("scaling_factor", 1.0)
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < math.inf:
        raise UserError(f"the VAE {source} has scaling_factor {scale!r} in its config.json: expected a number above 0")


@contextmanager
def _quiet_diffusers() -> Iterator[None]:
    """Without the warnings of diffusers and the hub's client: a mistake is reported in one line."""
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def portable_name(name: str) -> str:
    """A VAE's name as it travels: a hub name, also of a folder in the hub's cache; else as `files.portable` has it."""
    cached = re.search(r"models--([^/]+?)--([^/]+)/snapshots/[^/]+/?$", name)
    return f"{cached[1]}/{cached[2]}" if cached else portable(name)


def load_recorded_vae(name: str, sha256: str | None, device: str | torch.device, flag: str) -> Autoencoder:
    """The VAE that a dataset or checkpoint names, found by the checksum of its weights where the name does not help.

    A name is looked up in the working folder, then in the repository, then as a hub name; a checksum among the VAEs in
    `assets/` and in the hub's cache. Where none has it, the VAE of that name is returned for the caller to compare.

    Raises:
        UserError: if there is no VAE of that name either, with the `flag` to give one by.
    """
    here = [str(place) for place in (name, REPOSITORY / name) if Path(place).is_dir()]
    named, mistake = None, None
    try:
        named = load_vae(here[0] if here else name, device)
    except UserError as error:
        mistake = error
    if sha256 is not None and (named is None or weights_sha256(named) != sha256):
        for folder in _folders_of_vaes():
            try:
                vae = load_vae(folder)
            except UserError:  # a damaged one, which the user did not name
                continue
            if weights_sha256(vae) == sha256:
                return vae.to(device)
    if named is not None:
        return named
    assert mistake is not None
    if here or sha256 is None:
        raise mistake
    raise UserError(
        f"the VAE {name} is not here, nor one with its weights (SHA-256 {sha256[:12]}...) in assets/ or the hub's "
        f"cache: give it with {flag} FOLDER"
    ) from mistake.__cause__


def _folders_of_vaes() -> Iterable[Path]:
    """Folders of `AutoencoderKL` in `assets/` and in the cache of the Hugging Face hub."""
    from huggingface_hub.constants import HF_HUB_CACHE

    cache = Path(HF_HUB_CACHE)
    places = [(REPOSITORY / "assets", "*"), (cache, "models--*/snapshots/*"), (cache, "models--*/snapshots/*/vae")]
    for place, pattern in places:
        for folder in sorted(place.glob(pattern)):
            try:
                config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue
            if isinstance(config, dict) and config.get("_class_name") == "AutoencoderKL":
                yield folder


def check_channels(vae: Autoencoder, channels: int, whose: str) -> None:
    """Raise `UserError` unless the VAE decodes latents of so many channels; `whose` they are is for the message."""
    if vae.config.latent_channels != channels:
        raise UserError(
            f"{whose} has {channels} latent channels, but the VAE {portable_name(str(vae.config._name_or_path))} "
            f"decodes {vae.config.latent_channels}: give the VAE that made the latents, or, if they were packed as "
            "drawn latents in place of mean and std, encode the images again"
        )


def reduction(vae: Autoencoder) -> int:
    """Pixels per latent pixel along each side: every level of the VAE but the last halves the image."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def weights_sha256(vae: Autoencoder) -> str:
    """Checksum of a VAE's float32 weights: identifies a VAE, wherever it was loaded from."""
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
def encode_moments(vae: Autoencoder, images: torch.Tensor) -> torch.Tensor:
    """Moments of uint8 images: float32 (N, 2C, H/f, W/f), mean and std stacked, on the VAE's device.

    The std is exp(logvar / 2) with diffusers' own clamp of logvar. H and W must be multiples of f.
    """
    height, width = images.shape[1:3] if images.shape[-1] == 3 else images.shape[2:4]
    factor = reduction(vae)
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
def decode(vae: Autoencoder, latents: torch.Tensor) -> torch.Tensor:
    """Latents (N, C, h, w), scaled as `sample_latents` returns them, to uint8 images (N, H, W, 3).

    Decodes a few images at a time, so that memory does not grow with N.
    """
    latents = (latents.to(vae.device).float() / vae.config.scaling_factor).to(vae.dtype)
    factor = reduction(vae)
    at_once = max(1, PIXELS_AT_ONCE // (factor * factor * latents.shape[-2] * latents.shape[-1]))
    return torch.cat([output_to_pixels(vae.decode(part).sample) for part in latents.split(at_once)])
