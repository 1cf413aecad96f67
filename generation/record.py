"""The record beside samples: all that is needed to repeat them, and to check that a continued run makes the same."""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.errors import UserError
from common.files import file_sha256, portable
from models import checkpoints
from models.autoencoder import portable_name

# These may differ when a command continues a run: they do not change images, or a checksum decides. The checkpoint's
# checksum covers its metadata too.
FREE_TO_DIFFER = ("checkpoint", "checkpoint_metadata", "autoguidance", "vae", "command", "device")


def describe_sources(
    options: argparse.Namespace, checkpoint: checkpoints.Checkpoint, guide: checkpoints.Checkpoint | None
) -> dict[str, Any]:
    """The networks' part of the record. Checksums identify the files, and no path of this machine is written."""
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
    """What decides the rounding, for the record: type of device, versions, arithmetic."""
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
    """Whether the samples at `path`, made as the record `found` says, are those that `record` describes.

    Raises:
        UserError: if it is not and may not be replaced, with the first difference.
    """
    record = json.loads(json.dumps(record))
    different = [key for key in record if key not in FREE_TO_DIFFER and found.get(key) != record[key]]
    if different and not overwrite:
        key = different[0]
        was, now = found.get(key, "unknown"), record[key]
        if isinstance(was, dict) and isinstance(now, dict):  # of many settings, the one that differs
            key = next(name for name in {**now, **was} if (name in was, was.get(name)) != (name in now, now.get(name)))
            was, now = was.get(key, "unknown"), now.get(key, "unknown")
        raise UserError(f"{path} was made with {key} {was}, now it is {now}: choose another --name, or --overwrite")
    return not different


def read_record(path: Path) -> dict[str, Any]:
    """The record beside finished samples; empty if there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
