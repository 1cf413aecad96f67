"""The DiT/SiT building blocks: embedders, attention, adaLN-Zero blocks and output heads.

Shapes: N images, T tokens per image, D the model's width, C latent channels, p the patch size. Sub-module names follow
the checkpoints of DiT, SiT and DeepFlow, so that their weights load without renaming.
"""

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PatchEmbed(nn.Module):
    """(N, C, H, W) -> (N, T, D): non-overlapping p x p patches through one linear map, T = (H / p)(W / p)."""

    def __init__(self, patch_size: int, in_channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2).contiguous()  # as every block's output: compiled once for all


class TimestepEmbedder(nn.Module):
    """Scalars (N,) -> (N, width): sinusoids of 256 frequencies, then a two-layer SiLU MLP.

    `t` is used as it is, in [0, 1] (time) or [-1, 1] (time gap), not rescaled to diffusion steps.
    """

    num_frequencies = 256
    max_period = 10_000

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(self.num_frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def sinusoids(self, t: Tensor) -> Tensor:
        """(N,) -> (N, 256): cosines, then sines, of t at geometrically falling frequencies from 1 to 1 / 10000."""
        half = self.num_frequencies // 2
        steps = torch.arange(half, device=t.device, dtype=t.dtype)
        angles = t[:, None] * torch.exp(-math.log(self.max_period) * steps / half)
        return torch.cat([angles.cos(), angles.sin()], dim=-1)

    def forward(self, t: Tensor) -> Tensor:
        weight = cast(nn.Linear, self.mlp[0]).weight
        # Times need float32 even where the network runs in half precision: neighbours 0.01 apart must differ.
        t = t.to(weight.device, torch.promote_types(weight.dtype, torch.float32))
        return self.mlp(self.sinusoids(t).to(weight.dtype))


class LabelEmbedder(nn.Module):
    """Class ids (N,) in [0, num_classes] -> (N, D); the last row, id `num_classes`, is the null class."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class Attention(nn.Module):
    """Multi-head self-attention over (N, T, D); with `qk_norm`, queries and keys are layer-normalised per head."""

    def __init__(self, width: int, num_heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.LayerNorm(width // num_heads) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(width // num_heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        qkv = self.qkv(x).reshape(n, t, 3, self.num_heads, d // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (N, heads, T, D / heads)
        q, k = self.q_norm(q), self.k_norm(k)
        # The norms may leave q and k in float32 under autocast, and attention needs one dtype.
        x = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)
        return self.proj(x.transpose(1, 2).reshape(n, t, d))


class Mlp(nn.Module):
    """Linear, tanh-GELU, Linear."""

    def __init__(self, width_in: int, width_hidden: int, width_out: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width_in, width_hidden)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(width_hidden, width_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


def modulation(condition_width: int, outputs: int) -> nn.Sequential:
    """The adaLN regressor: SiLU, then a linear map to `outputs` shift, scale (and gate) values; zero at the start."""
    return nn.Sequential(nn.SiLU(), nn.Linear(condition_width, outputs))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (N, T, D) scaled by 1 + scale and shifted, with shift and scale (N, D) shared by all tokens."""
    return x * (1 + scale[:, None]) + shift[:, None]


class DiTBlock(nn.Module):
    """A transformer block with adaLN-Zero conditioning: tokens (N, T, D) and condition (N, D) -> (N, T, D)."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: int = 4, qk_norm: bool = False) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, num_heads, qk_norm)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(width, mlp_ratio * width, width)
        self.adaLN_modulation = modulation(width, 6 * width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=-1)
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))


class OutputHead(nn.Module):
    """Tokens (N, T, D) and condition (N, D) -> patches (N, T, p * p * C): a velocity or acceleration head."""

    def __init__(self, width: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, patch_size * patch_size * out_channels)
        self.adaLN_modulation = modulation(width, 2 * width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


def unpatchify(patches: Tensor, patch_size: int) -> Tensor:
    """(N, T, p * p * C), a square grid of patches in row order -> images (N, C, H, W)."""
    n, t, _ = patches.shape
    side = math.isqrt(t)
    x = patches.reshape(n, side, side, patch_size, patch_size, -1)  # (N, rows, columns, p, p, C)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(n, -1, side * patch_size, side * patch_size)


def sincos_position_embedding(width: int, side: int) -> Tensor:
    """Fixed 2-D sin-cos embedding, (1, side * side, width): the first half encodes the column, the second the row."""
    frequencies = 10_000 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies  # (side, width / 4)
    axis = torch.cat([angles.sin(), angles.cos()], dim=-1)  # (side, width / 2)
    column = axis[None, :, :].expand(side, side, -1)
    row = axis[:, None, :].expand(side, side, -1)
    return torch.cat([column, row], dim=-1).reshape(1, side * side, width).float()
