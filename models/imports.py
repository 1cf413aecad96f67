"""Checkpoints of others: the official release's `.pt`, its architecture inferred from shapes and flags.

Nothing in a file is ever executed: `torch.load(weights_only=True)` with `argparse.Namespace`, the one class the
official files contain, allowed.
"""

import argparse
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError

from .presets import REPA_DEPTH, SIZES, equal_branches

HEADS_OF_WIDTH = {size["hidden_size"]: size["num_heads"] for size in SIZES.values()}


def read_official(
    path: Path, overrides: Mapping[str, Any], fallbacks: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]]:
    """Architecture, EMA weights and metadata of a `.pt` of the official release.

    It is a dict with `ema` (else `model`) weights and the release's flags in `args`.

    Raises:
        UserError: for a damaged file, one of another kind, or an architecture that cannot be inferred.
    """
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
    known = {**fallbacks, **{key: value for key, value in flags.items() if value is not None}}
    metadata = {"path_type": flags["path_type"]} if "path_type" in flags else {}
    return infer_config(weights, known, overrides, str(path)), weights, metadata


def infer_config(
    weights: Mapping[str, Tensor], flags: Mapping[str, Any], overrides: Mapping[str, Any], name: str
) -> dict[str, Any]:
    """The architecture of official-format weights.

    Sizes are inferred from the shapes. What they do not determine comes from `overrides`, else from the official
    release's `flags`: number of heads (else by width, as in the paper's family), df_idxs (else equal branches),
    legacy_scaling, and the repa_depth of an aligned SiT (else REPA's own).
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
    known = {**flags, **{key: value for key, value in overrides.items() if value is not None}}

    df_idxs = known.get("df_idxs")
    if isinstance(df_idxs, str):
        df_idxs = [int(number) for number in re.findall(r"-?\d+", df_idxs)]
    if df_idxs is None:
        df_idxs = equal_branches(depth, gaps + 1)
    if len(df_idxs) != gaps:
        raise UserError(
            f"{name} has {gaps} VeRA blocks, but df_idxs is {list(df_idxs)}: give {gaps} entries (--df-idxs)"
        )
    num_heads = known.get("num_heads", HEADS_OF_WIDTH.get(hidden_size))
    if num_heads is None:
        raise UserError(f"{name} has width {hidden_size}, which is none of the paper's: give num_heads as well")
    aligned_at_a_block = dict(repa_depth=known.get("repa_depth", REPA_DEPTH)) if ssl_dims and not gaps else {}
    return dict(
        hidden_size=hidden_size,
        depth=depth,
        num_heads=num_heads,
        num_classes=num_classes,
        projector_dim=2048 if hidden is None else hidden.shape[0],
        df_idxs=list(df_idxs),
        legacy_scaling=bool(known.get("legacy_scaling", False)),
        qk_norm="blocks.0.attn.q_norm.weight" in weights,
        input_size=round(tokens**0.5) * patch_size,
        patch_size=patch_size,
        in_channels=in_channels,
        ssl_dim=ssl_dims if len(ssl_dims) > 1 else sum(ssl_dims),
        **aligned_at_a_block,
    )
