"""The record beside samples: what is needed to repeat them, and to check that a run continues these samples."""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.errors import UserError
from common.files import file_sha256, first_difference, portable
from models import checkpoints
from models.autoencoder import portable_name

# Keys that a continued run may change; the checkpoint's checksum covers its metadata too.
FREE_TO_DIFFER = ("checkpoint", "checkpoint_metadata", "autoguidance", "vae", "command", "device")


def describe_sources(
    options: argparse.Namespace, checkpoint: checkpoints.Checkpoint, guide: checkpoints.Checkpoint | None
) -> dict[str, Any]:
    """The networks' part of the record: checksums identify the files, no path names a folder of this machine."""
    metadata = checkpoint.metadata
    if isinstance(metadata.get("vae"), str):
        metadata = {**metadata, "vae": portable_name(metadata["vae"])}
    sources = {
        "checkpoint": portable(options.ckpt, 2),
        "checkpoint_sha256": file_sha256(checkpoints.file_of(options.ckpt)),
        "checkpoint_metadata": metadata,
        "architecture": checkpoint.config,
    }
    if guide is not None:
        sources |= {
            "autoguidance": portable(options.autoguidance_ckpt, 2),
            "autoguidance_sha256": file_sha256(checkpoints.file_of(options.autoguidance_ckpt)),
            "autoguidance_architecture": guide.config,
        }
    else:
        sources["autoguidance_sha256"] = None
    return sources


def describe_machine(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The part of the record that decides the rounding: kind of device, versions, arithmetic."""
    is_cuda = device.type == "cuda"
    return {
        "device_type": device.type,
        "device": torch.cuda.get_device_name(device) if is_cuda else torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "tf32": options.tf32,
        "compile": options.compile,
    }


def require_same(record: dict[str, Any], found: dict[str, Any], path: Path, overwrite: bool) -> bool:
    """Whether the samples at `path` are those that `record` describes.

    Args:
        record: of the samples to make.
        found: the record of those at `path`.
        path: for the message.
        overwrite: return False instead of raising.

    Raises:
        UserError: if they are others and may not be replaced; it names the first difference.
    """
    record = json.loads(json.dumps(record))
    key = first_difference(record, found, FREE_TO_DIFFER)
    if key is not None and not overwrite:
        was, now = found.get(key, "unknown"), record[key]
        if isinstance(was, dict) and isinstance(now, dict):  # the setting that differs, of many
            key = next(name for name in {**now, **was} if (name in was, was.get(name)) != (name in now, now.get(name)))
            was, now = was.get(key, "unknown"), now.get(key, "unknown")
        raise UserError(f"{path} was made with {key} {was}, now it is {now}: choose another --name, or --overwrite")
    return key is None


def read_record(path: Path) -> dict[str, Any]:
    """The record beside finished samples; empty if there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
