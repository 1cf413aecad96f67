"""The architecture of a network: one frozen record, the same in code, in `model.config` and in a checkpoint's JSON."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, cast

from common.errors import UserError


@dataclasses.dataclass(frozen=True, eq=False)  # equal as mappings are
class Architecture(Mapping[str, Any]):
    """The sizes and options of a `DeepFlow`. As a mapping, it is the JSON of a checkpoint: `dict(architecture)`.

    Attributes:
        hidden_size: width D of the tokens, a multiple of 4 and of `num_heads`.
        depth: number L of transformer blocks over all branches.
        num_heads: attention heads h, in the blocks and in the VeRA blocks.
        num_classes: classes of the data; class id `num_classes` is the null class of classifier-free guidance.
        projector_dim: hidden width P of the acceleration MLP and of the SSL projectors.
        df_idxs: 1-based block counts after which a branch ends, the last excluded: (8, 16) cuts 24 into 3.
        legacy_scaling: clamp the time-gap scale to [-5, 5] (no parameters: it lives only here).
        qk_norm: layer-normalise queries and keys in the blocks.
        input_size: side of the latent, in latent pixels.
        patch_size: side p of a patch, in latent pixels.
        in_channels: latent channels C.
        ssl_dim: feature width z of each SSL encoder to align with; a number counts as one, 0 as none.
        repa_depth: with one branch, the number of blocks after which the tokens are aligned, as in REPA; 0 for none.
            With more branches they are aligned after every VeRA block.

    Raises:
        UserError: for sizes that do not divide, `df_idxs` that do not cut the depth, or an alignment without a place.
    """

    hidden_size: int
    depth: int
    num_heads: int
    num_classes: int = 1000
    projector_dim: int = 2048
    df_idxs: Sequence[int] = ()
    legacy_scaling: bool = False
    qk_norm: bool = False
    input_size: int = 32
    patch_size: int = 2
    in_channels: int = 4
    ssl_dim: int | Sequence[int] = ()
    repa_depth: int = 0

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads or self.hidden_size % 4:
            raise UserError(f"hidden_size {self.hidden_size} must be a multiple of num_heads {self.num_heads} and of 4")
        if self.input_size % self.patch_size:
            raise UserError(f"input_size {self.input_size} must be a multiple of patch_size {self.patch_size}")
        object.__setattr__(self, "df_idxs", check_branch_ends(self.df_idxs, self.depth))
        widths = check_alignment(self.ssl_dim, self.repa_depth, self.num_branches, self.depth)
        object.__setattr__(self, "ssl_dim", widths)

    @property
    def num_branches(self) -> int:
        """k."""
        return len(self.df_idxs) + 1

    @property
    def branches(self) -> list[tuple[int, int]]:
        """The first block of each branch, and the one after its last."""
        return list(pairwise([0, *self.df_idxs, self.depth]))

    @property
    def ssl_widths(self) -> tuple[int, ...]:
        """`ssl_dim` as a tuple: one width per SSL encoder, () for none."""
        return cast(tuple[int, ...], self.ssl_dim)  # since __post_init__

    @property
    def tokens_per_side(self) -> int:
        """Square root of the number of tokens of an image."""
        return self.input_size // self.patch_size

    def __getitem__(self, name: str) -> Any:
        if name not in tuple(self):
            raise KeyError(name)
        value = getattr(self, name)
        if name == "ssl_dim":  # a number unless there are several
            return list(value) if len(value) > 1 else sum(value)
        return list(value) if name == "df_idxs" else value

    def __iter__(self) -> Iterator[str]:
        # Without alignment after a block it is left out: checkpoints from before there was any stay what they were.
        names = (field.name for field in dataclasses.fields(self))
        return (name for name in names if name != "repa_depth" or self.repa_depth)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def check_branch_ends(df_idxs: Sequence[int], depth: int) -> tuple[int, ...]:
    """`df_idxs` as a tuple, if it cuts `depth` blocks into non-empty branches.

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
    return tuple(ends)


def check_alignment(ssl_dim: int | Sequence[int], repa_depth: int, branches: int, depth: int) -> tuple[int, ...]:
    """The feature widths of all SSL encoders, () for none, if there is a place to align at.

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
    return tuple(widths)
