"""Samplers: from noise at t = 1 to data at t = 0, given a velocity function; and what surrounds them.

A velocity function is any `velocity(x, t)` with x (N, ...) and t (N,) in [0, 1], returning a velocity of x's shape.
`t` is handed over in float64 on the CPU, so that guidance can look at it without waiting for the device. Samplers know
no labels and no networks. The state is kept in float64; the velocity sees it in the dtype of the initial noise.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from errors import UserError
from interpolant import score_from_velocity

Velocity = Callable[[Tensor, Tensor], Tensor]

METHODS = ("sde", "euler", "heun", "dopri5")
SDE_LAST_TIME = 0.04  # where the SDE's noise ends; one deterministic step covers the rest


def sample(
    velocity: Velocity,
    noise: Tensor,
    *,
    method: str = "sde",
    num_steps: int = 250,
    path_type: str = "linear",
    step_noise: Callable[[int], Tensor] | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
) -> Tensor:
    """Integrate from `noise` (N, ...) at t = 1 to data at t = 0; returns float64 of the same shape.

    Args:
        velocity: the velocity function, called `num_steps` times (`heun`: 2 num_steps - 1; `dopri5`: as needed).
        noise: the initial state, N(0, I); its dtype is the one in which `velocity` is called.
        method: `sde` (Euler-Maruyama, the paper's), or the probability-flow ODE by `euler`, `heun`, `dopri5`.
        num_steps: steps of the time grid; not used by `dopri5`.
        path_type: the path the velocity was trained on; only the SDE's score needs it.
        step_noise: for the SDE, the standard normal (N, ...) of step 0, 1, ...; None draws from torch's global state.
        rtol: relative tolerance of `dopri5`.
        atol: absolute tolerance of `dopri5`. Its step size is shared by the batch, so an image depends on its batch.

    Raises:
        UserError: for an unknown method, or fewer than 1 step (2 for the SDE).
    """
    if method not in METHODS:
        raise UserError(f"unknown sampler {method!r}: choose one of {', '.join(METHODS)}")
    if num_steps < (2 if method == "sde" else 1):
        raise UserError(f"num_steps is {num_steps}: {method} needs at least {2 if method == 'sde' else 1}")

    def evaluate(x: Tensor, t: float) -> Tensor:
        times = torch.full((len(x),), t, dtype=torch.float64)
        return velocity(x.to(noise.dtype), times).to(torch.float64)

    x = noise.to(torch.float64)
    if method == "sde":
        draw = step_noise or (lambda step: torch.randn_like(noise))
        return euler_maruyama(evaluate, x, num_steps, path_type, draw)
    if method == "euler":
        return euler(evaluate, x, num_steps)
    if method == "heun":
        return heun(evaluate, x, num_steps)
    return dopri5(evaluate, x, rtol, atol)


def euler_maruyama(
    velocity: Callable[[Tensor, float], Tensor],
    x: Tensor,
    num_steps: int,
    path_type: str,
    step_noise: Callable[[int], Tensor],
) -> Tensor:
    """dx = (v - w s / 2) dt + sqrt(w) dW backwards in time, s the score, w(t) = 2t: num_steps velocity calls.

    num_steps - 1 noisy steps on the uniform grid from 1 to 0.04, then one step without noise from 0.04 to 0.
    """
    times = torch.linspace(1, SDE_LAST_TIME, num_steps, dtype=torch.float64).tolist()
    for step, (t, t_next) in enumerate(zip(times, [*times[1:], 0.0], strict=True)):
        v = velocity(x, t)
        w = 2 * t
        score = score_from_velocity(path_type, x, v, torch.tensor([t], dtype=torch.float64))
        x = x + (v - 0.5 * w * score) * (t_next - t)
        if step < num_steps - 1:
            x = x + math.sqrt(w * (t - t_next)) * step_noise(step).to(x)
    return x


def euler(velocity: Callable[[Tensor, float], Tensor], x: Tensor, num_steps: int) -> Tensor:
    """First-order steps of dx = v dt on a uniform grid from 1 to 0: num_steps velocity calls."""
    for step in range(num_steps):
        t, t_next = 1 - step / num_steps, 1 - (step + 1) / num_steps
        x = x + velocity(x, t) * (t_next - t)
    return x


def heun(velocity: Callable[[Tensor, float], Tensor], x: Tensor, num_steps: int) -> Tensor:
    """Second-order (trapezoidal) steps on a uniform grid from 1 to 0: 2 num_steps - 1 velocity calls.

    The last step is an Euler step, so that the network is never asked at t = 0, where training seldom goes. The order
    stays 2: one step's error is itself of second order.
    """
    for step in range(num_steps):
        t, t_next = 1 - step / num_steps, 1 - (step + 1) / num_steps
        v = velocity(x, t)
        if step < num_steps - 1:
            v = 0.5 * (v + velocity(x + v * (t_next - t), t_next))
        x = x + v * (t_next - t)
    return x


def dopri5(velocity: Callable[[Tensor, float], Tensor], x: Tensor, rtol: float, atol: float) -> Tensor:
    """Adaptive fifth-order Runge-Kutta from t = 1 to 0 (torchdiffeq)."""
    from torchdiffeq import odeint

    times = torch.tensor([1.0, 0.0], dtype=torch.float64, device=x.device)
    return odeint(lambda t, state: velocity(state, float(t)), x, times, rtol=rtol, atol=atol, method="dopri5")[-1]


def classifier_free_guidance(
    model_velocity: Callable[[Tensor, Tensor, Tensor], Tensor],
    y: Tensor,
    null_label: int,
    scale: float,
    low: float = 0.0,
    high: float = 1.0,
) -> Velocity:
    """The velocity function v_null + scale (v_cond - v_null), on all channels, while low <= t <= high.

    Outside the interval, and at scale 1, it is v_cond. Costs two network rows an image inside, one outside.

    Args:
        model_velocity: `model_velocity(x, t, y)`, the network.
        y: class ids of the batch, (N,).
        null_label: the id of the null class, `num_classes`.
        scale: guidance scale; 1 is no guidance.
        low: lowest guided time, in [0, 1].
        high: highest guided time, in [0, 1].
    """
    null = torch.full_like(y, null_label)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        if scale == 1 or not low <= float(t[0]) <= high:
            return model_velocity(x, t, y)
        both = model_velocity(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null]))
        conditional, unconditional = both.chunk(2)
        return unconditional + scale * (conditional - unconditional)

    return velocity


class ImageNoise:
    """Standard normal noise in which image i is a function of (seed, i) alone, whatever batch it is drawn in.

    Each image has a counter-based stream of its own, on the CPU, so that images do not depend on the device either.

    Args:
        seed: the run's seed, in [0, 2^64).
        indices: the global indices of the batch's images.
        shape: the shape of one image's latent, (C, H, W).
    """

    def __init__(self, seed: int, indices: Sequence[int], shape: Sequence[int]) -> None:
        self.shape = tuple(shape)
        self.streams = [np.random.Generator(np.random.Philox(key=[seed, int(i)])) for i in indices]

    def draw(self) -> Tensor:
        """The next noise of every image, (N, C, H, W), float32: first the initial state, then step after step."""
        return torch.from_numpy(np.stack([s.standard_normal(self.shape, dtype=np.float32) for s in self.streams]))
