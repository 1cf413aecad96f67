"""DeepFlow: a DiT/SiT backbone cut into k branches, with a VeRA block between each branch and the next.

With k = 1 (`df_idxs=[]`) the network is exactly SiT.
"""

from collections.abc import Sequence
from itertools import pairwise
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
from .vera import VeRABlock


class DeepFlowOutput(NamedTuple):
    """What a training forward returns. Images are (N, C, H, W), projections (N, T, z) with z of `ssl_dim`."""

    velocities: tuple[Tensor, ...]  # k, the last one is the model's answer
    accelerations: tuple[Tensor, ...]  # k - 1
    projections: tuple[Tensor, ...]  # of each place of alignment, those for all encoders in the order of `ssl_dim`


def check_branch_ends(df_idxs: Sequence[int], depth: int) -> list[int]:
    """`df_idxs` as a list, if it cuts `depth` blocks into non-empty branches.

    Raises:
        UserError: unless its entries are strictly increasing integers in [1, depth - 1].
    """
    ends = list(df_idxs)
    if any(isinstance(end, bool) or not isinstance(end, int) for end in ends):
        raise UserError(f"df_idxs {ends} must be integers: the block counts after which a branch ends (--df-idxs)")
    if any(not 0 < end < depth for end in ends):
        raise UserError(f"df_idxs {ends} must lie in 1..{depth - 1} for a depth of {depth} (--df-idxs, --trans-depth)")
    if any(a >= b for a, b in pairwise(ends)):
        raise UserError(f"df_idxs {ends} must be strictly increasing (--df-idxs)")
    return ends


def check_alignment(ssl_dim: int | Sequence[int], repa_depth: int, branches: int, depth: int) -> list[int]:
    """The feature widths of all SSL encoders, [] for none, if there is a place to align at.

    Raises:
        UserError: for widths below 1, one branch and no `repa_depth` to align after, a `repa_depth` that is not in
            1..depth, or one where the VeRA blocks say where to align.
    """
    widths = [ssl_dim] if isinstance(ssl_dim, int) else list(ssl_dim)
    widths = [] if widths == [0] else widths
    if any(isinstance(width, bool) or not isinstance(width, int) or width < 1 for width in widths):
        raise UserError(f"ssl_dim {ssl_dim} must be the feature width of an SSL encoder, or one for each")
    if repa_depth and branches > 1:
        raise UserError(
            f"repa_depth {repa_depth} is for a model of one branch, this one has {branches} and aligns after every "
            "VeRA block: drop it (--repa-depth)"
        )
    if repa_depth and not widths:
        raise UserError(f"repa_depth {repa_depth} given without an SSL encoder to align with (--ssl-align)")
    if not 0 <= repa_depth <= depth:
        raise UserError(f"repa_depth {repa_depth} must lie in 1..{depth}, the number of blocks (--repa-depth)")
    if widths and branches == 1 and not repa_depth:
        raise UserError(
            f"SSL alignment of a model of one branch needs the block to align after, in 1..{depth} (--repa-depth)"
        )
    return widths


class DeepFlow(nn.Module):
    """The velocity network v(x_t, t, y) with deep supervision.

    Args:
        hidden_size: width D of the tokens, a multiple of 4 and of `num_heads`.
        depth: number L of transformer blocks over all branches.
        num_heads: attention heads h, in the blocks and in the VeRA blocks.
        num_classes: classes of the data; label `num_classes` is the null class of classifier-free guidance.
        projector_dim: hidden width P of the acceleration MLP and of the SSL projectors.
        df_idxs: 1-based block counts after which a branch ends, the last excluded: [8, 16] cuts 24 into 3.
        legacy_scaling: clamp the time-gap scale to [-5, 5] (no parameters: it lives only in the config).
        qk_norm: layer-normalise queries and keys in the blocks.
        input_size: side of the latent, in latent pixels (image side / 8 for the SD-VAE).
        patch_size: side p of a patch, in latent pixels.
        in_channels: latent channels C.
        ssl_dim: feature width z of the SSL encoder to align with, or a list of one width an encoder; 0 for none.
        repa_depth: with one branch, the number of blocks after which the tokens are aligned, as in REPA; 0 for none.
            With more branches they are aligned after every VeRA block.
        decoder_hidden_size: read from official configurations, where it always equals `hidden_size`.

    Raises:
        UserError: for sizes that do not divide, `df_idxs` that do not cut the depth, a different decoder width, or
            alignment that `check_alignment` refuses.
    """

    def __init__(
        self,
        hidden_size: int,
        depth: int,
        num_heads: int,
        num_classes: int = 1000,
        projector_dim: int = 2048,
        df_idxs: Sequence[int] = (),
        legacy_scaling: bool = False,
        qk_norm: bool = False,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        ssl_dim: int | Sequence[int] = 0,
        repa_depth: int = 0,
        decoder_hidden_size: int | None = None,
    ) -> None:
        super().__init__()
        if hidden_size % num_heads or hidden_size % 4:
            raise UserError(f"hidden_size {hidden_size} must be a multiple of num_heads {num_heads} and of 4")
        if input_size % patch_size:
            raise UserError(f"input_size {input_size} must be a multiple of patch_size {patch_size}")
        if decoder_hidden_size not in (None, hidden_size):
            raise UserError(f"decoder_hidden_size {decoder_hidden_size} must equal hidden_size {hidden_size}")
        df_idxs = check_branch_ends(df_idxs, depth)
        ssl_dims = check_alignment(ssl_dim, repa_depth, len(df_idxs) + 1, depth)
        self.config: dict[str, Any] = dict(
            hidden_size=hidden_size,
            depth=depth,
            num_heads=num_heads,
            num_classes=num_classes,
            projector_dim=projector_dim,
            df_idxs=df_idxs,
            legacy_scaling=legacy_scaling,
            qk_norm=qk_norm,
            input_size=input_size,
            patch_size=patch_size,
            in_channels=in_channels,
            ssl_dim=ssl_dims if len(ssl_dims) > 1 else sum(ssl_dims),  # a number unless there are several
        )
        if repa_depth:  # else left out: checkpoints without it stay what they were
            self.config["repa_depth"] = repa_depth
        self.repa_depth = repa_depth
        self.num_classes = num_classes
        self.checkpoint_activations = False  # compute blocks again in the backward, rather than keep what they made
        self.branches = list(pairwise([0, *df_idxs, depth]))  # (first block, end) of each branch
        self.num_branches = len(self.branches)
        gaps = self.num_branches - 1

        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        position = sincos_position_embedding(hidden_size, input_size // patch_size)
        self.pos_embed = nn.Parameter(position, requires_grad=False)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        self.blocks = nn.ModuleList(DiTBlock(hidden_size, num_heads, qk_norm=qk_norm) for _ in range(depth))
        # Two velocity heads at most: one shared by the intermediate branches, one of the last branch.
        heads = 2 if gaps else 1
        self.final_layer = nn.ModuleList(OutputHead(hidden_size, patch_size, in_channels) for _ in range(heads))
        if gaps:
            self.dt_embedder = TimestepEmbedder(2 * hidden_size)
            self.df_blocks = nn.ModuleList(
                VeRABlock(hidden_size, num_heads, projector_dim, legacy_scaling) for _ in range(gaps)
            )
            self.final_acc_layer = OutputHead(hidden_size, patch_size, in_channels)
        # Projector i * E + e is for encoder e of E: after VeRA block i, or, with one branch, after block `repa_depth`.
        self.ssl_dims = ssl_dims
        if ssl_dims:
            widths = ssl_dims * max(gaps, 1)
            self.projectors = nn.ModuleList(ssl_projector(hidden_size, projector_dim, width) for width in widths)
        self.initialize()

    def initialize(self) -> None:
        """Xavier-uniform linear maps, N(0, 0.02^2) embeddings, and zeros where adaLN-Zero wants an identity."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv2d):  # the patchify map, initialised as the Linear it is
                nn.init.xavier_uniform_(module.weight.flatten(1))
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.MultiheadAttention):
                nn.init.xavier_uniform_(module.in_proj_weight)
                nn.init.zeros_(module.in_proj_bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, TimestepEmbedder):
                nn.init.normal_(module.mlp[0].weight, std=0.02)
                nn.init.normal_(module.mlp[2].weight, std=0.02)
            if hasattr(module, "adaLN_modulation"):
                nn.init.zeros_(module.adaLN_modulation[1].weight)
            if isinstance(module, OutputHead):
                nn.init.zeros_(module.linear.weight)

    def null_condition(self, count: int) -> Tensor:
        """The condition of no class, (count,), on the network's device."""
        return torch.full((count,), self.num_classes, device=self.pos_embed.device)

    def repeated_blocks(self) -> list[nn.Module]:
        """The parts to shard one by one: transformer and VeRA blocks."""
        return [*self.blocks, *(self.df_blocks if self.num_branches > 1 else [])]

    def heads(self) -> list[nn.Module]:
        """The velocity heads and the acceleration head."""
        return [*self.final_layer, *([self.final_acc_layer] if self.num_branches > 1 else [])]

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> DeepFlowOutput:
        """All branches' answers for noisy latents `x` (N, C, H, W) and labels `y` (N,) in [0, num_classes].

        `t` is one time an image, (N,), or one an image and branch, (k, N), in [0, 1].
        """
        return self._run(x, t, y, last_only=False)

    def velocity(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The last branch's velocity alone, (N, C, H, W): no intermediate heads, no projectors. For sampling."""
        return self._run(x, t, y, last_only=True).velocities[-1]

    def _run(self, x: Tensor, t: Tensor, y: Tensor, last_only: bool) -> DeepFlowOutput:
        times = t.expand(self.num_branches, len(x))  # (k, N)
        label = self.y_embedder(y)
        conditions = self.t_embedder(times.flatten()).unflatten(0, times.shape) + label  # (k, N, D)
        if self.num_branches > 1:
            gaps = times.diff(dim=0)  # (k - 1, N)
            gap_embeddings = self.dt_embedder(gaps.flatten()).unflatten(0, gaps.shape)  # (k - 1, N, 2D)

        x_tokens = self.x_embedder(x) + self.pos_embed
        tokens = x_tokens
        output = DeepFlowOutput([], [], [])
        for i, (first, end) in enumerate(self.branches):
            for depth, block in enumerate(self.blocks[first:end], start=first + 1):
                tokens = self._through(block, tokens, conditions[i])
                if depth == self.repa_depth and not last_only:
                    output.projections.extend(self._project(tokens, place=0))
            if i == self.num_branches - 1:
                output.velocities.append(self._image(self.final_layer[-1], tokens, conditions[i]))
                break
            if not last_only:
                output.velocities.append(self._image(self.final_layer[0], tokens, conditions[i]))
            tokens, acceleration = self._through(self.df_blocks[i], tokens, x_tokens, gap_embeddings[i])
            if not last_only:
                output.accelerations.append(self._image(self.final_acc_layer, acceleration, conditions[i]))
                output.projections.extend(self._project(tokens, place=i))
        return DeepFlowOutput(*map(tuple, output))

    def _through(self, block: nn.Module, *inputs: Tensor) -> Any:
        if self.checkpoint_activations and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)  # nothing is random in it
        return block(*inputs)

    def _project(self, tokens: Tensor, place: int) -> list[Tensor]:
        """Projections of the tokens (N, T, D) at one place of alignment, one an encoder, each (N, T, z)."""
        first = place * len(self.ssl_dims)
        return [self.projectors[first + e](tokens) for e in range(len(self.ssl_dims))]

    def _image(self, head: OutputHead, tokens: Tensor, condition: Tensor) -> Tensor:
        return unpatchify(head(tokens, condition), self.config["patch_size"])


def ssl_projector(width: int, hidden: int, ssl_dim: int) -> nn.Sequential:
    """Tokens (N, T, D) -> (N, T, ssl_dim), to be aligned with the encoder's patch tokens (REPA)."""
    return nn.Sequential(
        nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, ssl_dim)
    )
