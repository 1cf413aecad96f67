"""The model family: names -> sizes (paper, Table 8), and the one place where a name becomes a network."""

import re
from typing import Any

from common.errors import UserError, unknown_name

from .deepflow import DeepFlow

# width, heads; then the depth of SiT and DeepFlow, and DeepFlow's number k of branches.
# "Tiny" is not the paper's: it is the size for CPUs, the demo and the tests.
SIZES: dict[str, dict[str, Any]] = {
    "Tiny": dict(hidden_size=128, num_heads=4, sit_depth=8, deepflow_depth=8, branches=2, projector_dim=256),
    "S": dict(hidden_size=384, num_heads=6, sit_depth=12, deepflow_depth=12, branches=2, projector_dim=2048),
    "B": dict(hidden_size=768, num_heads=12, sit_depth=12, deepflow_depth=12, branches=2, projector_dim=2048),
    "L": dict(hidden_size=1024, num_heads=16, sit_depth=24, deepflow_depth=24, branches=2, projector_dim=2048),
    "XL": dict(hidden_size=1152, num_heads=16, sit_depth=28, deepflow_depth=24, branches=3, projector_dim=2048),
}
REPA_DEPTH = 8  # the block after which REPA aligns a SiT
NAME = re.compile(r"(?P<kind>DeepFlow|SiT)-(?P<size>[A-Za-z]+)/2(?:-(?P<branches>\d+)T)?")


def equal_branches(depth: int, branches: int) -> list[int]:
    """`df_idxs` that cut `depth` blocks into equal branches: (24, 3) -> [8, 16].

    Raises:
        UserError: if the depth is not a multiple of the number of branches.
    """
    if branches < 1 or depth % branches:
        raise UserError(f"depth {depth} does not divide into {branches} equal branches: give df_idxs (--df-idxs)")
    return [depth * i // branches for i in range(1, branches)]


def model_config(name: str, **overrides: Any) -> dict[str, Any]:
    """The `DeepFlow` arguments for a name such as `DeepFlow-XL/2`, `DeepFlow-B/2-2T` or `SiT-L/2`.

    Overrides that are None count as not given. Without `df_idxs`, the branches are equal: k from the name, else the
    size's own k. A SiT has one branch.

    Raises:
        UserError: for an unknown name, or more than one branch in a SiT.
    """
    match = NAME.fullmatch(name)
    if match is None or match["size"] not in SIZES or (match["kind"] == "SiT" and match["branches"]):
        raise unknown_name(
            "model", name, (f"{kind}-{size}/2" for kind in ("DeepFlow", "SiT") for size in SIZES), "--model"
        )
    preset = SIZES[match["size"]]
    given = {key: value for key, value in overrides.items() if value is not None}
    is_sit = match["kind"] == "SiT"
    depth = given.pop("depth", preset["sit_depth" if is_sit else "deepflow_depth"])
    if is_sit and given.get("df_idxs"):
        raise UserError(f"{name} has one branch, but df_idxs is {list(given['df_idxs'])}: choose a DeepFlow (--model)")
    if "df_idxs" not in given:
        branches = 1 if is_sit else int(match["branches"] or preset["branches"])
        given["df_idxs"] = equal_branches(depth, branches)
    sizes = {key: preset[key] for key in ("hidden_size", "num_heads", "projector_dim")}
    return {**sizes, "depth": depth, **given}


def create_model(name: str, **overrides: Any) -> DeepFlow:
    """A freshly initialised network: `create_model("DeepFlow-XL/2", depth=24, df_idxs=[8, 16])`, see `model_config`."""
    return DeepFlow(**model_config(name, **overrides))
