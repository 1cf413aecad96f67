"""DeepFlow: a DiT/SiT backbone cut into k branches, with a VeRA block between each branch and the next.

With k = 1 (`df_idxs=[]`) the network is exactly SiT.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.errors import UserError

from .blocks import (
    DiTBlock,
    LabelEmbedder,
    OutputHead,
    PatchEmbed,
    TimestepEmbedder,
    sincos_position_embedding,
    unpatchify,
)
from .config import Architecture
from .vera import VeRABlock


class DeepFlowOutput(NamedTuple):
    """The outputs of a training forward. Images are (N, C, H, W), projections (N, T, z) with z of `ssl_dim`."""

    velocities: tuple[Tensor, ...]  # k, the last one is the model's prediction
    accelerations: tuple[Tensor, ...]  # k - 1
    projections: tuple[Tensor, ...]  # of each place of alignment, those for all encoders in the order of `ssl_dim`


class DeepFlow(nn.Module):
    """The velocity network v(x_t, t, y) with deep supervision.

    Args:
        sizes, options: of the `Architecture`, which is then `config`. Official configurations also hold a
            `decoder_hidden_size`, which always equals `hidden_size`.

    Raises:
        UserError: for what the `Architecture` refuses, or a different decoder width.
    """

    def __init__(self, *sizes: Any, **options: Any) -> None:
        super().__init__()
        decoder_width = options.pop("decoder_hidden_size", None)
        self.config = config = Architecture(*sizes, **options)
        hidden_size, num_heads, patch_size = config.hidden_size, config.num_heads, config.patch_size
        if decoder_width not in (None, hidden_size):
            raise UserError(f"decoder_hidden_size {decoder_width} must equal hidden_size {hidden_size}")
        self.num_classes, self.num_branches = config.num_classes, config.num_branches
        self.checkpoint_activations = False  # compute blocks again in the backward instead of keeping their activations
        gaps = self.num_branches - 1

        self.x_embedder = PatchEmbed(patch_size, config.in_channels, hidden_size)
        position = sincos_position_embedding(hidden_size, config.tokens_per_side)
        self.pos_embed = nn.Parameter(position, requires_grad=False)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(config.num_classes, hidden_size)
        blocks = (DiTBlock(hidden_size, num_heads, qk_norm=config.qk_norm) for _ in range(config.depth))
        self.blocks = nn.ModuleList(blocks)
        # Two velocity heads at most: one shared by the intermediate branches, one of the last branch.
        heads = 2 if gaps else 1
        self.final_layer = nn.ModuleList(OutputHead(hidden_size, patch_size, config.in_channels) for _ in range(heads))
        if gaps:
            self.dt_embedder = TimestepEmbedder(2 * hidden_size)
            self.df_blocks = nn.ModuleList(
                VeRABlock(hidden_size, num_heads, config.projector_dim, config.legacy_scaling) for _ in range(gaps)
            )
            self.final_acc_layer = OutputHead(hidden_size, patch_size, config.in_channels)
        # Projector i * E + e is for encoder e of E: after VeRA block i, or, with one branch, after block `repa_depth`.
        if config.ssl_widths:
            widths = config.ssl_widths * max(gaps, 1)
            self.projectors = nn.ModuleList(ssl_projector(hidden_size, config.projector_dim, width) for width in widths)
        self.initialize()

    def initialize(self) -> None:
        """Xavier-uniform linear maps, N(0, 0.02^2) embeddings, and zeros where adaLN-Zero starts as the identity."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv2d):  # the patchify map, initialised as the Linear it is
                nn.init.xavier_uniform_(module.weight.flatten(1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.MultiheadAttention):
                nn.init.xavier_uniform_(module.in_proj_weight)
                if module.in_proj_bias is not None:
                    nn.init.zeros_(module.in_proj_bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, TimestepEmbedder):
                for layer in (module.mlp[0], module.mlp[2]):
                    nn.init.normal_(layer.get_parameter("weight"), std=0.02)
            modulation = getattr(module, "adaLN_modulation", None)
            if modulation is not None:
                nn.init.zeros_(modulation[1].weight)
            if isinstance(module, OutputHead):
                nn.init.zeros_(module.linear.weight)

    def null_condition(self, count: int) -> Tensor:
        """The condition of no class, (count,), on the network's device."""
        return torch.full((count,), self.num_classes, device=self.pos_embed.device)

    def check_condition(self, condition: Tensor) -> None:
        """Raise `UserError` unless these are class ids of this network, (N,) integers in [0, num_classes]."""
        if condition.ndim != 1 or condition.is_floating_point():
            raise UserError(f"conditions {tuple(condition.shape)} given to a network of classes: give class ids (N,)")
        if len(condition) and not 0 <= int(condition.min()) <= int(condition.max()) <= self.num_classes:
            raise UserError(
                f"class ids {int(condition.min())} to {int(condition.max())} given to a network of {self.num_classes} "
                f"classes: give 0 to {self.num_classes - 1}, or {self.num_classes} for none"
            )

    def repeated_blocks(self) -> list[nn.Module]:
        """The parts to shard one by one: transformer and VeRA blocks."""
        return [*self.blocks, *(self.df_blocks if self.num_branches > 1 else [])]

    def heads(self) -> list[nn.Module]:
        """The velocity heads and the acceleration head."""
        return [*self.final_layer, *([self.final_acc_layer] if self.num_branches > 1 else [])]

    def compile_parts(self, **settings: Any) -> None:
        """Compile blocks and heads one by one: equal ones share their code, so that it takes seconds, not minutes.

        `settings` are those of `torch.compile`.
        """
        for part in [*self.repeated_blocks(), *self.heads()]:
            part.compile(**settings)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> DeepFlowOutput:
        """All branches' outputs for noisy latents `x` (N, C, H, W) and class ids `condition` (N,) in [0, num_classes].

        `t` is one time per image, (N,), or one per branch and image, (k, N), in [0, 1].
        """
        return self._run(x, t, condition, last_only=False)

    def velocity(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """The last branch's velocity alone, (N, C, H, W): no intermediate heads, no projectors. For sampling."""
        return self._run(x, t, condition, last_only=True).velocities[-1]

    def _run(self, x: Tensor, t: Tensor, condition: Tensor, last_only: bool) -> DeepFlowOutput:
        times = t.expand(self.num_branches, len(x))  # (k, N)
        label = self.y_embedder(condition)
        conditions = self.t_embedder(times.flatten()).unflatten(0, times.shape) + label  # (k, N, D)
        if self.num_branches > 1:
            gaps = times.diff(dim=0)  # (k - 1, N)
            gap_embeddings = self.dt_embedder(gaps.flatten()).unflatten(0, gaps.shape)  # (k - 1, N, 2D)

        x_tokens = self.x_embedder(x) + self.pos_embed
        tokens = x_tokens
        velocities: list[Tensor] = []
        accelerations: list[Tensor] = []
        projections: list[Tensor] = []
        for i, (first, end) in enumerate(self.config.branches):
            for depth, block in enumerate(self.blocks[first:end], start=first + 1):
                tokens = self._through(block, tokens, conditions[i])
                if depth == self.config.repa_depth and not last_only:
                    projections.extend(self._project(tokens, place=0))
            if i == self.num_branches - 1:
                velocities.append(self._image(self.final_layer[-1], tokens, conditions[i]))
                break
            if not last_only:
                velocities.append(self._image(self.final_layer[0], tokens, conditions[i]))
            tokens, acceleration = self._through(self.df_blocks[i], tokens, x_tokens, gap_embeddings[i])
            if not last_only:
                accelerations.append(self._image(self.final_acc_layer, acceleration, conditions[i]))
                projections.extend(self._project(tokens, place=i))
        return DeepFlowOutput(tuple(velocities), tuple(accelerations), tuple(projections))

    def _through(self, block: nn.Module, *inputs: Tensor) -> Any:
        if self.checkpoint_activations and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)  # nothing is random in it
        return block(*inputs)

    def _project(self, tokens: Tensor, place: int) -> list[Tensor]:
        """Projections of the tokens (N, T, D) at one place of alignment, one per encoder, each (N, T, z)."""
        encoders = len(self.config.ssl_widths)
        return [self.projectors[place * encoders + e](tokens) for e in range(encoders)]

    def _image(self, head: nn.Module, tokens: Tensor, condition: Tensor) -> Tensor:
        return unpatchify(head(tokens, condition), self.config.patch_size)


def ssl_projector(width: int, hidden: int, ssl_dim: int) -> nn.Sequential:
    """Tokens (N, T, D) -> (N, T, ssl_dim), to be aligned with the encoder's patch tokens (REPA)."""
    return nn.Sequential(
        nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, ssl_dim)
    )
