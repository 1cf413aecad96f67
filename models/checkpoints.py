"""Weights in and out: safetensors with the architecture inside; files of others are read by `imports.py`.

Nothing in a file is ever executed.
"""

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from common.errors import UserError
from common.files import named_in_utf8, written_aside

from .deepflow import DeepFlow
from .imports import infer_config, read_official

HEADER = "deepflow"  # the entry of a safetensors header that holds configuration and metadata
EMA_NAME = "ema.safetensors"  # the file that a folder of weights is searched for


class Checkpoint(NamedTuple):
    """A checkpoint as it was read: nothing is built yet."""

    config: dict[str, Any]  # arguments of DeepFlow
    weights: dict[str, Tensor]
    metadata: dict[str, Any]  # as it was saved: step, path_type, vae, ...; in official files path_type at most


def save(
    path: str | Path, weights: Mapping[str, Tensor], config: Mapping[str, Any], metadata: Mapping[str, Any]
) -> None:
    """Write weights, architecture and JSON-able metadata into one safetensors file, aside and then renamed.

    Raises:
        OSError: with the file's name, if it cannot be written, for example on a full disk.
    """
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in weights.items()}
    # One entry: safetensors writes several in random order, and equal checkpoints would differ in their bytes.
    header = {HEADER: json.dumps({"config": dict(config), "metadata": dict(metadata)})}
    with written_aside(path) as aside:
        try:
            save_file(tensors, aside, metadata=header)
        except SafetensorError as error:
            raise OSError(errno.EIO, str(error), str(path)) from error
        umask = os.umask(0)
        os.umask(umask)
        aside.chmod(0o666 & ~umask)  # safetensors makes it readable by its owner alone


def load(path: str | Path, **overrides: Any) -> DeepFlow:
    """The network of a checkpoint with its EMA weights, in evaluation mode, on the CPU.

    Args:
        path: a `.safetensors` of ours, a folder that holds `ema.safetensors`, or an official `.pt`.
        overrides: `DeepFlow` arguments that are missing or wrong in the file.

    Raises:
        UserError: for a missing or damaged file, an architecture that cannot be inferred, or weights of another one.
    """
    checkpoint = read(path, **overrides)
    return build(checkpoint, str(path))


def build(checkpoint: Checkpoint, name: str) -> DeepFlow:
    """The network of a checkpoint that `read` returned; `name` is for the message of a mismatch."""
    try:
        expected = shapes_of(checkpoint.config)
    except (TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{name} tells an architecture that this version does not know: {error}") from error
    given = {key: tuple(tensor.shape) for key, tensor in checkpoint.weights.items()}
    if given != expected:
        raise UserError(f"{name} does not fit its architecture: {describe_mismatch(expected, given)}")
    model = DeepFlow(**checkpoint.config)
    model.load_state_dict(checkpoint.weights)
    return model.eval()


def read(path: str | Path, fallbacks: Mapping[str, Any] | None = None, **overrides: Any) -> Checkpoint:
    """A checkpoint's architecture, EMA weights and metadata; see `load`.

    `fallbacks` are `DeepFlow` arguments for what the file does not give; None counts as not given.
    """
    path = file_of(path)
    fallbacks = {key: value for key, value in (fallbacks or {}).items() if value is not None}
    ours = path.suffix == ".safetensors"
    checkpoint = read_safetensors(path) if ours else Checkpoint(*read_official(path, overrides, fallbacks))
    if not checkpoint.config:
        checkpoint = checkpoint._replace(config=infer_config(checkpoint.weights, fallbacks, overrides, str(path)))
    config = {**checkpoint.config, **{key: value for key, value in overrides.items() if value is not None}}
    return checkpoint._replace(config=config)


def file_of(path: str | Path) -> Path:
    """The file that a checkpoint's path means: a file itself, or a folder's `ema.safetensors`.

    Raises:
        UserError: if there is none.
    """
    path = Path(path)
    if path.is_dir():
        path = path / EMA_NAME
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}: give a .safetensors, a folder with {EMA_NAME}, or an official .pt")
    return path


def read_safetensors(path: Path) -> Checkpoint:
    """A safetensors file; the config is empty if the file carries none."""
    try:
        with named_in_utf8(path) as name, safe_open(name, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(HEADER, '{"config": {}, "metadata": {}}'))
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        return Checkpoint(dict(header["config"]), weights, dict(header["metadata"]))
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged or not safetensors ({error}): copy or download it again") from error


def shapes_of(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a network's weights, without allocating them."""
    with torch.device("meta"):
        return {key: tuple(tensor.shape) for key, tensor in DeepFlow(**config).state_dict().items()}


def describe_mismatch(expected: Mapping[str, tuple], given: Mapping[str, tuple], limit: int = 3) -> str:
    """One line that names the tensors (the first few of each kind) and shapes in which two sets of weights differ."""
    missing = [key for key in expected if key not in given]
    unexpected = [key for key in given if key not in expected]
    differing = [
        f"{key} is {list(given[key])}, not {list(shape)}"
        for key, shape in expected.items()
        if key in given and given[key] != shape
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "of other shape": differing}
    parts = [
        f"{len(names)} {kind} ({', '.join(names[:limit])}{', ...' if len(names) > limit else ''})"
        for kind, names in kinds.items()
        if names
    ]
    return "; ".join(parts)
