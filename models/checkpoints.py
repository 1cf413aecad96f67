"""Weights in and out: our own checkpoints (safetensors with the architecture inside) and the official release's `.pt`.

Nothing in a file is ever executed: safetensors, or `torch.load(weights_only=True)` with `argparse.Namespace`, the one
class the official files contain, allowed.
"""

import argparse
import errno
import json
import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from errors import UserError
from files import named_in_utf8, written_aside

from .deepflow import DeepFlow
from .presets import SIZES, equal_branches

HEADER = "deepflow"  # the entry of a safetensors header that holds configuration and metadata
EMA_NAME = "ema.safetensors"  # what a folder is searched for
REPA_DEPTH = 8  # blocks after which REPA aligns
HEADS_OF_WIDTH = {size["hidden_size"]: size["num_heads"] for size in SIZES.values()}


class Checkpoint(NamedTuple):
    """A checkpoint as it was read: nothing is built yet."""

    config: dict[str, Any]  # arguments of DeepFlow
    weights: dict[str, Tensor]
    metadata: dict[str, Any]  # what the writer said of it: step, path_type, vae, ...; official files: path_type at most


def save(
    path: str | Path, weights: Mapping[str, Tensor], config: Mapping[str, Any], metadata: Mapping[str, Any]
) -> None:
    """Write weights, architecture and JSON-able metadata into one safetensors file, aside and then renamed.

    Raises:
        OSError: naming the file, if it cannot be written, for example on a full disk.
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
        overrides: `DeepFlow` arguments that the file does not tell, or tells wrongly.

    Raises:
        UserError: for a missing or damaged file, an architecture that cannot be told, or weights that do not fit it.
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

    `fallbacks` are `DeepFlow` arguments that count only where the file is silent, and None counts as not given.
    """
    path = file_of(path)
    fallbacks = {key: value for key, value in (fallbacks or {}).items() if value is not None}
    ours = path.suffix == ".safetensors"
    checkpoint = read_safetensors(path) if ours else read_official(path, overrides, fallbacks)
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


def read_official(path: Path, overrides: Mapping[str, Any], fallbacks: Mapping[str, Any]) -> Checkpoint:
    """A `.pt` of the official release: a dict with `ema` (else `model`) weights and its flags in `args`."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch raises many kinds for damaged files, and advises to switch the safety off
        raise UserError(
            f"{path} is damaged, no torch file, or holds more than weights and flags: expected a .pt as the official "
            "release writes, or a .safetensors of ours"
        ) from error
    weights = content.get("ema", content.get("model", content)) if isinstance(content, dict) else None
    if not weights or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(
            f"{path} holds no weights: expected a dict with `ema` or `model`, as the official release writes"
        )
    weights = {re.sub(r"^(module\.|_orig_mod\.)+", "", key): value for key, value in weights.items()}
    flags = vars(content["args"]) if isinstance(content.get("args"), argparse.Namespace) else {}
    told = {**fallbacks, **{key: value for key, value in flags.items() if value is not None}}
    metadata = {"path_type": flags["path_type"]} if "path_type" in flags else {}
    return Checkpoint(infer_config(weights, told, overrides, str(path)), weights, metadata)


def infer_config(
    weights: Mapping[str, Tensor], flags: Mapping[str, Any], overrides: Mapping[str, Any], name: str
) -> dict[str, Any]:
    """The architecture of official-format weights.

    Sizes are read off the shapes. What shapes cannot tell comes from `overrides`, else from the official release's
    `flags`: number of heads (else by width, as in the paper's family), df_idxs (else equal branches), legacy_scaling,
    and the repa_depth of an aligned SiT (else REPA's own).
    """
    try:
        hidden_size, in_channels, patch_size, _ = weights["x_embedder.proj.weight"].shape
        tokens = weights["pos_embed"].shape[1]
        num_classes = weights["y_embedder.embedding_table.weight"].shape[0] - 1
    except KeyError as error:
        raise UserError(f"{name} is not a DeepFlow checkpoint: it has no tensor {error}") from error
    except ValueError as error:
        raise UserError(f"{name} is not a DeepFlow checkpoint: its patch embedding is no convolution") from error
    depth = 1 + max((int(m[1]) for m in map(re.compile(r"blocks\.(\d+)\.").match, weights) if m), default=-1)
    gaps = 1 + max((int(m[1]) for m in map(re.compile(r"df_blocks\.(\d+)\.").match, weights) if m), default=-1)
    projectors = 1 + max((int(m[1]) for m in map(re.compile(r"projectors\.(\d+)\.").match, weights) if m), default=-1)
    try:
        ssl_dims = [weights[f"projectors.{i}.4.weight"].shape[0] for i in range(projectors // max(gaps, 1))]
    except KeyError as error:
        raise UserError(f"{name} has {projectors} projectors, but no tensor {error}") from error
    hidden = weights.get("df_blocks.0.acc_mlp.0.weight", weights.get("projectors.0.0.weight"))
    told = {**flags, **{key: value for key, value in overrides.items() if value is not None}}

    df_idxs = told.get("df_idxs")
    if isinstance(df_idxs, str):
        df_idxs = [int(number) for number in re.findall(r"-?\d+", df_idxs)]
    if df_idxs is None:
        df_idxs = equal_branches(depth, gaps + 1)
    if len(df_idxs) != gaps:
        raise UserError(
            f"{name} has {gaps} VeRA blocks, but df_idxs is {list(df_idxs)}: give {gaps} entries (--df-idxs)"
        )
    num_heads = told.get("num_heads", HEADS_OF_WIDTH.get(hidden_size))
    if num_heads is None:
        raise UserError(f"{name} has width {hidden_size}, which is none of the paper's: give num_heads as well")
    aligned_at_a_block = dict(repa_depth=told.get("repa_depth", REPA_DEPTH)) if ssl_dims and not gaps else {}
    return dict(
        hidden_size=hidden_size,
        depth=depth,
        num_heads=num_heads,
        num_classes=num_classes,
        projector_dim=2048 if hidden is None else hidden.shape[0],
        df_idxs=list(df_idxs),
        legacy_scaling=bool(told.get("legacy_scaling", False)),
        qk_norm="blocks.0.attn.q_norm.weight" in weights,
        input_size=round(tokens**0.5) * patch_size,
        patch_size=patch_size,
        in_channels=in_channels,
        ssl_dim=ssl_dims if len(ssl_dims) > 1 else sum(ssl_dims),
        **aligned_at_a_block,
    )


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
