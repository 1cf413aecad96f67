"""The path between data and noise: time convention, coefficients, and what a velocity implies.

Convention, stated here once for the whole project: **t = 0 is data, t = 1 is noise**. Along a path

    x_t = alpha(t) x_0 + sigma(t) eps,        V(t) = alpha'(t) x_0 + sigma'(t) eps,

with eps ~ N(0, I) and V the velocity a network regresses (paper, Eq. 2). The paper's sibling works (SiT, flow
matching) count time the other way round.

Every function takes `t` of shape (N,) (or anything that broadcasts against the batch axis) and batches of shape
(N, ...), and computes in the wider of the two dtypes.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from common.errors import require_known


class Coefficients(NamedTuple):
    """alpha, sigma and their time derivatives, each of the shape of `t`."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor


def linear(t: Tensor) -> Coefficients:
    """alpha = 1 - t, sigma = t; the velocity is eps - x_0 at every t."""
    one = torch.ones_like(t)
    return Coefficients(1 - t, t, -one, one)


def cosine(t: Tensor) -> Coefficients:
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2): variance preserving."""
    angle = 0.5 * math.pi * t
    cos, sin = torch.cos(angle), torch.sin(angle)
    return Coefficients(cos, sin, -0.5 * math.pi * sin, 0.5 * math.pi * cos)


class Path(NamedTuple):
    """A path from data to noise; called, it gives its coefficients."""

    coefficients: Callable[[Tensor], Coefficients]
    lognormal_time: Callable[[Tensor], Tensor]  # n -> the t in (0, 1) with sigma / alpha = exp(n)

    def __call__(self, t: Tensor) -> Coefficients:
        """The coefficients at `t`, of any shape."""
        return self.coefficients(t)


PATHS = {
    "linear": Path(linear, torch.sigmoid),
    "cosine": Path(cosine, lambda n: (2 / math.pi) * torch.atan(torch.exp(n))),
}
WEIGHTINGS = ("lognormal", "uniform")


def path_named(path_type: str) -> Path:
    """One of `PATHS`.

    Raises:
        UserError: for another name.
    """
    require_known("path type", path_type, PATHS, "--path-type")
    return PATHS[path_type]


def coefficients(path_type: str, t: Tensor, like: Tensor) -> Coefficients:
    """The path's coefficients at `t` (N,), shaped (N, 1, ...) to multiply a batch like `like` (N, ...).

    Raises:
        UserError: if `path_type` names no path.
    """
    return path_named(path_type)(t.to(like.device).reshape(-1, *[1] * (like.ndim - 1)))


def interpolate(path_type: str, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = alpha x_0 + sigma eps, of the shape of `x0`."""
    c = coefficients(path_type, t, x0)
    return c.alpha * x0 + c.sigma * noise


def velocity_target(path_type: str, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """V = alpha' x_0 + sigma' eps (Eq. 2), of the shape of `x0`."""
    c = coefficients(path_type, t, x0)
    return c.d_alpha * x0 + c.d_sigma * noise


def x0_from_velocity(path_type: str, x: Tensor, velocity: Tensor, t: Tensor) -> Tensor:
    """The x_0 for which (x_t, V) = (x, velocity): solves the two path equations for x_0."""
    c = coefficients(path_type, t, x)
    return (c.d_sigma * x - c.sigma * velocity) / (c.alpha * c.d_sigma - c.d_alpha * c.sigma)


def score_from_velocity(path_type: str, x: Tensor, velocity: Tensor, t: Tensor) -> Tensor:
    """Score of p_t at x, for t > 0: (alpha v - alpha' x) / (alpha' sigma^2 - alpha sigma' sigma).

    This is the usual (r v - x) / (sigma^2 - r sigma' sigma), r = alpha / alpha', multiplied through by alpha' so that
    it is also defined where alpha' = 0. For the linear path it is -((1 - t) v + x) / t.
    """
    c = coefficients(path_type, t, x)
    return (c.alpha * velocity - c.d_alpha * x) / (c.sigma * (c.d_alpha * c.sigma - c.alpha * c.d_sigma))


def draw_times(weighting: str, path_type: str, count: int, generator: torch.Generator) -> Tensor:
    """`count` training times in [0, 1], float32, on the generator's device.

    `uniform` is U(0, 1). `lognormal` is the time at which log(sigma / alpha) ~ N(0, 1).

    Raises:
        UserError: if `weighting` or `path_type` is unknown.
    """
    require_known("weighting", weighting, WEIGHTINGS, "--weighting")
    path = path_named(path_type)
    if weighting == "uniform":
        return torch.rand(count, generator=generator, device=generator.device)
    return path.lognormal_time(torch.randn(count, generator=generator, device=generator.device))
