"""The VeRA block (velocity refiner with acceleration): it connects one branch to the next (paper, Eq. 6-9).

A branch ends in velocity features v* (N, T, D). The block predicts an acceleration feature from them, mixes both
under the modulation of the time gap to the next branch, and lets the input tokens of the first branch attend to the
result. The output replaces the token stream.
"""

import torch
from torch import Tensor, nn

from .blocks import Mlp, modulate, modulation


def acceleration_mlp(width: int, hidden: int) -> nn.Sequential:
    """ACC_MLP: v* (N, T, D) -> acceleration feature a* (N, T, D), through P, 2P and P hidden units (Eq. 6)."""
    return nn.Sequential(
        nn.Linear(width, hidden),
        nn.SiLU(),
        nn.Linear(hidden, 2 * hidden),
        nn.SiLU(),
        nn.Linear(2 * hidden, hidden),
        nn.SiLU(),
        nn.Linear(hidden, width),
    )


class TimeGapModulation(nn.Module):
    """concat(v*, a*) (N, T, 2D) and the gap embedding (N, 2D) -> (N, T, D) (Eq. 8).

    `legacy_scaling` clamps the scale to [-5, 5], as the paper's SSL-aligned checkpoint was trained.
    """

    max_legacy_scale = 5.0

    def __init__(self, width: int, legacy_scaling: bool) -> None:
        super().__init__()
        self.legacy_scaling = legacy_scaling
        self.norm = nn.LayerNorm(2 * width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(2 * width, 2 * width, width)
        self.adaLN_modulation = modulation(2 * width, 4 * width)

    def forward(self, features: Tensor, gap: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(gap).chunk(2, dim=-1)
        if self.legacy_scaling:
            scale = scale.clamp(-self.max_legacy_scale, self.max_legacy_scale)
        return self.mlp(modulate(self.norm(features), shift, scale))


class CrossSpaceAttention(nn.Module):
    """Input tokens (N, T, D) attend to the modulated features (N, T, D); the residual is the normalised query (Eq. 9).

    One affine LayerNorm serves both sides.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.multihead_attn = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.layer_norm = nn.LayerNorm(width)

    def forward(self, x_tokens: Tensor, features: Tensor) -> Tensor:
        query, key = self.layer_norm(x_tokens), self.layer_norm(features)
        # need_weights=False is what selects scaled_dot_product_attention: the weights are never materialised.
        return query + self.multihead_attn(query, key, key, need_weights=False)[0]


class VeRABlock(nn.Module):
    """v* (N, T, D), input tokens (N, T, D), gap embedding (N, 2D) -> (next tokens, acceleration feature), (N, T, D)."""

    def __init__(self, width: int, num_heads: int, projector_dim: int, legacy_scaling: bool) -> None:
        super().__init__()
        self.acc_mlp = acceleration_mlp(width, projector_dim)
        self.acc_norm = TimeGapModulation(width, legacy_scaling)
        self.cross_attention = CrossSpaceAttention(width, num_heads)

    def forward(self, velocity: Tensor, x_tokens: Tensor, gap: Tensor) -> tuple[Tensor, Tensor]:
        acceleration = self.acc_mlp(velocity)
        modulated = self.acc_norm(torch.cat([velocity, acceleration], dim=-1), gap)
        return self.cross_attention(x_tokens, modulated), acceleration
