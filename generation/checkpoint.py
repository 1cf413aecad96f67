"""The inputs of sampling, checkpoint, VAE and guide; and the names of results."""

import argparse
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.errors import UserError
from common.sd_vae import SD_VAE
from generation.options import Settings
from models import checkpoints
from models.autoencoder import Autoencoder, load_recorded_vae, load_vae, weights_sha256
from models.presets import NAME, model_config
from samplers import SAMPLERS

VAES = {"ema": SD_VAE, "mse": "stabilityai/sd-vae-ft-mse"}  # the official names of --vae


def load_matching_vae(
    options: argparse.Namespace, metadata: dict[str, Any], device: torch.device
) -> tuple[Autoencoder, str]:
    """The VAE that the flags, else the checkpoint, name, and the SHA-256 of its weights.

    Raises:
        UserError: if it cannot be loaded, or has other weights or another scale than the checkpoint was trained with.
    """
    name = options.vae or metadata.get("vae", "ema")
    if options.vae:
        vae = load_vae(VAES.get(name, name), device)
    else:
        vae = load_recorded_vae(VAES.get(name, name), metadata.get("vae_sha256"), device, "--vae")
    checksum = weights_sha256(vae)
    if metadata.get("vae_sha256") not in (None, checksum):
        raise UserError(f"VAE {name} is not the one {options.ckpt} was trained with: give that one with --vae")
    scaling = metadata.get("scaling_factor", vae.config.scaling_factor)
    if not np.isclose(scaling, vae.config.scaling_factor):
        raise UserError(
            f"VAE {name} scales latents by {vae.config.scaling_factor:.5g}, but {options.ckpt} was trained "
            f"on a scale of {scaling:.5g}: give the VAE of the training data with --vae"
        )
    return vae, checksum


def read_guide(options: argparse.Namespace, checkpoint: checkpoints.Checkpoint) -> checkpoints.Checkpoint | None:
    """The checkpoint of `--autoguidance-ckpt`, None without it.

    Raises:
        UserError: if it is missing, damaged, or of other latents, classes or another path than the one it guides.
    """
    if not options.autoguidance_ckpt:
        return None
    guide = checkpoints.read(options.autoguidance_ckpt)
    for name in ("in_channels", "input_size", "num_classes"):
        if guide.config[name] != checkpoint.config[name]:
            raise UserError(
                f"--autoguidance-ckpt {options.autoguidance_ckpt} has {name} {guide.config[name]}, but {options.ckpt} "
                f"has {checkpoint.config[name]}: give a checkpoint of the same kind"
            )
    paths = [c.metadata.get("path_type", options.path_type or "linear") for c in (guide, checkpoint)]
    if paths[0] != paths[1]:
        raise UserError(
            f"--autoguidance-ckpt {options.autoguidance_ckpt} was trained on the {paths[0]} path, but {options.ckpt} "
            f"on the {paths[1]} path: give a checkpoint of the same path"
        )
    return guide


def read_checkpoint(options: argparse.Namespace) -> checkpoints.Checkpoint:
    """The checkpoint of `--ckpt`, checked against the architecture flags that are given.

    Raises:
        UserError: for a missing or damaged file, or a flag that contradicts it, with both values.
    """
    preset = model_config(options.model, df_idxs=[]) if options.model else {}
    fallbacks = {
        "num_heads": preset.get("num_heads"),
        "df_idxs": options.df_idxs,
        "legacy_scaling": options.legacy_scaling,
    }
    checkpoint = checkpoints.read(options.ckpt, fallbacks=fallbacks)
    config = checkpoint.config
    branches = len(config["df_idxs"]) + 1
    named = NAME.fullmatch(options.model) if options.model else None
    claims = [  # flag, what it says, what the file says
        ("--trans-depth", options.trans_depth, config["depth"]),
        ("--df-idxs", options.df_idxs, list(config["df_idxs"])),
        ("--num-classes", options.num_classes, config.get("num_classes", 1000)),
        ("--legacy-scaling", options.legacy_scaling, config.get("legacy_scaling", False)),
        ("--qk-norm", options.qk_norm, config.get("qk_norm", False)),
        ("--ssl-align", options.ssl_align, bool(config.get("ssl_dim"))),
    ]
    for flag, said, found in claims:
        if said is not None and said != found:
            no = "no-" if said is False else ""
            value = "" if isinstance(said, bool) else f" {said}"
            raise UserError(f"--{no}{flag[2:]}{value}, but {options.ckpt} has {flag[2:]} {found}: drop the flag")
    sizes = {key: config[key] for key in ("hidden_size", "num_heads")}
    if named and any(preset[key] != size for key, size in sizes.items()):
        raise UserError(
            f"--model {options.model} has width {preset['hidden_size']} and {preset['num_heads']} heads, but "
            f"{options.ckpt} has width {sizes['hidden_size']} and {sizes['num_heads']} heads: drop the flag"
        )
    named_branches = 1 if named and named["kind"] == "SiT" else int(named["branches"] or 0) if named else 0
    if named_branches and named_branches != branches:
        raise UserError(
            f"--model {options.model} has {named_branches} branches, but {options.ckpt} has {branches}: drop the flag"
        )
    widths = [word.strip() for word in (options.projector_embed_dims or "").split(",")]
    if options.projector_embed_dims and config.get("ssl_dim") and str(config["ssl_dim"]) not in widths:
        raise UserError(
            f"--projector-embed-dims {options.projector_embed_dims}, but {options.ckpt} has {config['ssl_dim']}: "
            "drop the flag"
        )
    return checkpoint


def default_name(options: argparse.Namespace, settings: Settings, metadata: dict[str, Any]) -> str:
    """A file name that holds all that changes the result: two runs, or two settings, have two names."""
    steps = "" if SAMPLERS[settings.method].adaptive else f"{settings.num_steps}"
    parts = [run_name(options.ckpt), f"step{metadata['step']}" if "step" in metadata else "", settings.method + steps]
    if (settings.diffusion_form, settings.diffusion_norm) != ("linear", 1):
        parts.append(f"w{settings.diffusion_form}{settings.diffusion_norm:g}")
    if settings.time_shift != 1:
        parts.append(f"shift{settings.time_shift:g}")
    if settings.cfg_scale != 1:
        parts.append(f"cfg{settings.cfg_scale:g}-from{settings.guidance_low:g}-to{settings.guidance_high:g}")
    if options.autoguidance_ckpt:
        where = hashlib.sha256(str(checkpoints.file_of(options.autoguidance_ckpt).resolve()).encode()).hexdigest()[:6]
        parts.append(f"by-{run_name(options.autoguidance_ckpt)}-{where}")
    if "path_type" not in metadata and options.path_type:
        parts.append(options.path_type)
    if options.legacy_scaling:
        parts.append("legacy")
    if options.df_idxs:
        parts.append("df" + "+".join(map(str, options.df_idxs)))
    if options.vae:
        parts.append(f"vae_{Path(options.vae).name}")
    if settings.precision != "no":
        parts.append(settings.precision)
    parts += ["" if options.tf32 else "notf32", "compiled" if options.compile else ""]
    classes = options.classes.replace(",", "+").replace(" ", "+")
    if len(classes) > 40:
        classes = f"classes_{hashlib.sha256(classes.encode()).hexdigest()[:8]}"
    parts += [classes, f"n{options.num_fid_samples}", f"seed{settings.seed}"]
    return "-".join(part for part in parts if part)


def run_name(ckpt: str) -> str:
    """The name of a checkpoint's run: its folder's, or the file's own; both for the official 0400000.pt, a step."""
    path = checkpoints.file_of(ckpt).resolve()
    folders = [folder.name for folder in path.parents if folder.name != "checkpoints" and folder.name[:5] != "step-"]
    if path.name == checkpoints.EMA_NAME:
        return folders[0]
    return f"{folders[0]}-{path.stem}" if path.stem.isdecimal() else path.stem
