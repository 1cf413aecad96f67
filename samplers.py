"""Samplers: from noise at t = 1 to data at t = 0, given a velocity function; and what surrounds them.

A velocity function is any `velocity(x, t)` with x (N, ...) and t (N,) in [0, 1], returning a velocity of x's shape.
`t` is a float64 tensor on the CPU, so that guidance can read it without waiting for the device. Samplers know no
conditions and no networks. The state is kept in float64; the velocity sees it in the dtype of the initial noise.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError, require_known
from interpolant import path_named, score_from_velocity

Velocity = Callable[[Tensor, Tensor], Tensor]

SDE_LAST_TIME = 0.04  # where the SDE's noise ends; one deterministic step covers the rest

# w(t) = 2 norm form(t) by (t, sigma). SiT's names, in our time; its SBDM is left out: infinite at t = 1 on either path.
DIFFUSION_FORMS: dict[str, Callable[[float, float], float]] = {
    "linear": lambda t, sigma: t,  # the paper's
    "sigma": lambda t, sigma: sigma,
    "constant": lambda t, sigma: 1.0,
    "decreasing": lambda t, sigma: math.sin(0.5 * math.pi * t) ** 4,
    "increasing-decreasing": lambda t, sigma: math.sin(math.pi * t) ** 2,
}


def sample(
    velocity: Velocity,
    noise: Tensor,
    *,
    method: str = "sde",
    num_steps: int = 250,
    path_type: str = "linear",
    step_noise: Callable[[int], Tensor] | None = None,
    diffusion_form: str = "linear",
    diffusion_norm: float = 1.0,
    time_shift: float = 1.0,
    rtol: float = 1e-5,
    atol: float = 1e-5,
) -> Tensor:
    """Integrate from `noise` (N, ...) at t = 1 to data at t = 0; returns float64 of the same shape.

    Args:
        velocity: the velocity function, called `num_steps` times (the Heun methods: 2 num_steps - 1; `dopri5`: as
            needed).
        noise: the initial state, N(0, I); its dtype is the one in which `velocity` is called.
        method: `sde` (Euler-Maruyama, the paper's), `sde-heun`, or the probability-flow ODE by `euler`, `heun`,
            `dopri5`.
        num_steps: steps of the time grid; not used by `dopri5`.
        path_type: the path the velocity was trained on; only the SDE's score needs it.
        step_noise: for the SDE, the standard normal (N, ...) of step 0, 1, ...; None draws from torch's global state.
        diffusion_form: for the SDE, one of `DIFFUSION_FORMS`.
        diffusion_norm: for the SDE, the factor of w(t); 0 is the ODE with the SDE's grid.
        time_shift: s of the grid's warp t -> s t / (1 + (s - 1) t); above 1 more of the steps lie near the noise.
        rtol: relative tolerance of `dopri5`.
        atol: absolute tolerance of `dopri5`. Its step size is shared by the batch, so an image depends on its batch.

    Raises:
        UserError: for an unknown method, fewer than 1 step (2 for the SDE), what `sde_schedule` refuses, or velocities
            that `dopri5` cannot follow.
    """
    require_known("sampler", method, SAMPLERS)
    sampler = SAMPLERS[method]
    if num_steps < sampler.least_steps:
        raise UserError(f"num_steps is {num_steps}: {method} needs at least {sampler.least_steps}")

    def evaluate(x: Tensor, t: float) -> Tensor:
        times = torch.full((len(x),), t, dtype=torch.float64)
        return velocity(x.to(noise.dtype), times).to(torch.float64)

    x = noise.to(torch.float64)
    if not sampler.stochastic:
        return sampler.integrate(evaluate, x, time_grid(num_steps, time_shift), rtol=rtol, atol=atol)
    times, diffusions = sde_schedule(num_steps, path_type, diffusion_form, diffusion_norm, time_shift)

    def drift(x: Tensor, step: int) -> Tensor:
        t = times[step]
        v = evaluate(x, t)
        # Filled on the device: a copy to it would make the host wait for the device at every step.
        score = score_from_velocity(path_type, x, v, torch.full((1,), t, dtype=torch.float64, device=x.device))
        return v - 0.5 * diffusions[step] * score

    draw = step_noise or (lambda step: torch.randn_like(noise))
    return sampler.integrate(drift, x, times, diffusions, draw)


def time_grid(num_steps: int, shift: float, last: float | None = None) -> list[float]:
    """`num_steps` + 1 times from 1 to 0, uniform, or bent by t -> s t / (1 + (s - 1) t) for a shift s other than 1.

    With `last`, the SDE's, all but the final 0 lie between 1 and `last`, both included whatever the shift.

    Raises:
        UserError: for a shift that is not positive.
    """
    if not 0 < shift < math.inf:
        raise UserError(f"time shift is {shift}: give a positive number, 1 for none (--time-shift)")
    if last is None:
        times = [1 - step / num_steps for step in range(num_steps)]
    else:
        unshifted = last / (shift - (shift - 1) * last)  # what the shift takes to `last`
        times = torch.linspace(1, unshifted, num_steps, dtype=torch.float64).tolist()
    # The first is exactly 1: rounding could make it larger, which is outside the guidance interval.
    return [1.0, *(shift * t / (1 + (shift - 1) * t) for t in times[1:]), 0.0]


def sde_schedule(
    num_steps: int, path_type: str, form: str = "linear", norm: float = 1.0, shift: float = 1.0
) -> tuple[list[float], list[float]]:
    """The SDE's `num_steps` + 1 times, and at all but the last w(t) = 2 norm form(t), the squared noise per unit time.

    The steps have to follow the SDE even where the data do not vary at all. There the state is noise of standard
    deviation sigma, the drift is (sigma'/sigma + w / (2 sigma^2)) x, and a step dt multiplies x by 1 - c with
    c = dt (sigma'/sigma + w / (2 sigma^2)), which grows beyond all bounds for c > 2. The paper's w = 2t never has more,
    and c = 2 in the last step.

    Raises:
        UserError: for an unknown path or form, a norm or shift out of range, or a step with c > 2.
    """
    path = path_named(path_type)
    require_known("diffusion form", form, DIFFUSION_FORMS, "--diffusion-form")
    if not 0 <= norm < math.inf:
        raise UserError(f"diffusion norm is {norm}: give a number of 0 or more (--diffusion-norm)")
    times, diffusions = time_grid(num_steps, shift, SDE_LAST_TIME), []
    for t, t_next in pairwise(times):
        c = path(torch.tensor(t, dtype=torch.float64))
        sigma, growth = c.sigma.item(), (c.d_sigma / c.sigma).item()
        w = 2 * norm * DIFFUSION_FORMS[form](t, sigma)
        if (t - t_next) * (growth + 0.5 * w / sigma**2) > 2 + 1e-9:
            largest = norm * (2 / (t - t_next) - growth) * 2 * sigma**2 / w
            raise UserError(
                f"diffusion {form} with norm {norm:g} is too strong for the step from t = {t:.3g} to {t_next:.3g}, "
                f"which bears a norm of {largest:.2g}: lower --diffusion-norm, or take another --diffusion-form"
            )
        diffusions.append(w)
    return times, diffusions


def euler_maruyama(
    drift: Callable[[Tensor, int], Tensor],
    x: Tensor,
    times: Sequence[float],
    diffusions: Sequence[float],
    step_noise: Callable[[int], Tensor],
) -> Tensor:
    """dx = (v - w s / 2) dt + sqrt(w) dW backwards in time, s the score: one velocity call per step.

    `drift(x, step)` is v - w s / 2 at `times[step]`; the step from the last but one time, to 0, has no noise.
    """
    last = len(times) - 2
    for step, (t, t_next) in enumerate(pairwise(times)):
        x = x + drift(x, step) * (t_next - t)
        if step < last:
            x = x + math.sqrt(diffusions[step] * (t - t_next)) * step_noise(step).to(x)
    return x


def stochastic_heun(
    drift: Callable[[Tensor, int], Tensor],
    x: Tensor,
    times: Sequence[float],
    diffusions: Sequence[float],
    step_noise: Callable[[int], Tensor],
) -> Tensor:
    """The same SDE with weak order 2: 2 num_steps - 1 velocity calls (Platen's scheme for additive noise).

    The drift is averaged over both ends of a step, the far end predicted by Euler-Maruyama with the step's own noise,
    and sqrt(w) is the mean of its values at both ends. The last step is Euler-Maruyama's, without noise.
    """
    last = len(times) - 2
    for step, (t, t_next) in enumerate(pairwise(times)):
        slope = drift(x, step)
        if step == last:
            return x + slope * (t_next - t)
        near, far = math.sqrt(diffusions[step]), math.sqrt(diffusions[step + 1])
        kick = 0.5 * (near + far) * math.sqrt(t - t_next) * step_noise(step).to(x)
        slope = 0.5 * (slope + drift(x + slope * (t_next - t) + kick, step + 1))
        x = x + slope * (t_next - t) + kick
    raise AssertionError("times hold at least one step")


def euler(velocity: Callable[[Tensor, float], Tensor], x: Tensor, times: Sequence[float], **_: float) -> Tensor:
    """First-order steps of dx = v dt: one velocity call per step."""
    for t, t_next in pairwise(times):
        x = x + velocity(x, t) * (t_next - t)
    return x


def heun(velocity: Callable[[Tensor, float], Tensor], x: Tensor, times: Sequence[float], **_: float) -> Tensor:
    """Second-order (trapezoidal) steps of dx = v dt: 2 num_steps - 1 velocity calls.

    The last step is an Euler step, so that the network is never evaluated at t = 0, which training rarely draws. The
    order stays 2: one step's error is itself of second order.
    """
    for t, t_next in pairwise(times):
        v = velocity(x, t)
        if t_next > 0:
            v = 0.5 * (v + velocity(x + v * (t_next - t), t_next))
        x = x + v * (t_next - t)
    return x


def dopri5(
    velocity: Callable[[Tensor, float], Tensor], x: Tensor, times: Sequence[float], rtol: float, atol: float
) -> Tensor:
    """Adaptive fifth-order Runge-Kutta from the first time to the last; it chooses its own steps (torchdiffeq).

    Raises:
        UserError: if no step is small enough for the tolerance.
    """
    from torchdiffeq import odeint

    ends = torch.tensor([times[0], times[-1]], dtype=torch.float64, device=x.device)
    try:
        return odeint(lambda t, state: velocity(state, float(t)), x, ends, rtol=rtol, atol=atol, method="dopri5")[-1]
    except AssertionError as error:  # no step is small enough, as with values that are not finite
        raise UserError(
            f"dopri5 cannot go on ({error}): the velocities are not finite or jump; has the checkpoint's run diverged?"
        ) from error


class Sampler(NamedTuple):
    """How to get from noise to data."""

    integrate: Callable[..., Tensor]  # SDE: (drift, x, times, diffusions, step_noise); ODE: (velocity, x, times)
    stochastic: bool  # an SDE: its noise ends at SDE_LAST_TIME
    least_steps: int = 1
    adaptive: bool = False  # chooses its own steps


SAMPLERS = {
    "sde": Sampler(euler_maruyama, stochastic=True, least_steps=2),
    "sde-heun": Sampler(stochastic_heun, stochastic=True, least_steps=2),
    "euler": Sampler(euler, stochastic=False),
    "heun": Sampler(heun, stochastic=False),
    "dopri5": Sampler(dopri5, stochastic=False, adaptive=True),
}


def classifier_free_guidance(
    model_velocity: Callable[[Tensor, Tensor, Tensor], Tensor],
    condition: Tensor,
    null: Tensor,
    scale: float,
    low: float = 0.0,
    high: float = 1.0,
) -> Velocity:
    """The velocity function v_null + scale (v_cond - v_null), on all channels, while low <= t <= high.

    Outside the interval, and at scale 1, it is v_cond. Costs two network rows per image inside, one outside.

    Args:
        model_velocity: `model_velocity(x, t, condition)`, the network.
        condition: of each image of the batch, (N, ...): class ids, for example.
        null: the null condition of each, (N, ...); `model.null_condition(N)`.
        scale: guidance scale; 1 is no guidance.
        low: lowest guided time, in [0, 1].
        high: highest guided time, in [0, 1].
    """

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        if scale == 1 or not low <= float(t[0]) <= high:
            return model_velocity(x, t, condition)
        both = model_velocity(torch.cat([x, x]), torch.cat([t, t]), torch.cat([condition, null]))
        conditional, unconditional = at_least_float32(both).chunk(2)
        return unconditional + scale * (conditional - unconditional)

    return velocity


def at_least_float32(v: Tensor) -> Tensor:
    """`v` in float32 or wider: in half precision, guidance would add rounding errors of its own."""
    return v.to(torch.promote_types(v.dtype, torch.float32))


def autoguidance(
    model_velocity: Callable[[Tensor, Tensor, Tensor], Tensor],
    guide_velocity: Callable[[Tensor, Tensor, Tensor], Tensor],
    condition: Tensor,
    scale: float,
    low: float = 0.0,
    high: float = 1.0,
) -> Velocity:
    """The velocity function v_guide + scale (v - v_guide) while low <= t <= high (Karras et al. 2024, Eq. 2).

    Both networks get the condition: a weaker version of the same model takes the place of the null class, and the two
    kinds of guidance do not combine. Outside the interval, and at scale 1, it is v. Costs one row per image of the
    network, and inside the interval one of the guide.
    """

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        v = model_velocity(x, t, condition)
        if scale == 1 or not low <= float(t[0]) <= high:
            return v
        weak = at_least_float32(guide_velocity(x, t, condition))
        return weak + scale * (at_least_float32(v) - weak)

    return velocity


class ImageNoise:
    """Standard normal noise in which image i is a function of (seed, i) alone, whatever batch it is drawn in.

    Each image has its own counter-based stream, on the CPU, so that its noise does not depend on the device either.

    Args:
        seed: the run's seed, in [0, 2^64).
        indices: the global indices of the batch's images.
        shape: the shape of one image's latent, (C, H, W).
    """

    def __init__(self, seed: int, indices: Sequence[int], shape: Sequence[int]) -> None:
        self.shape = tuple(shape)
        keys = [np.array([seed, i], dtype=np.uint64) for i in map(int, indices)]  # from 2^63 on a list becomes floats
        self.streams = [np.random.Generator(np.random.Philox(key=key)) for key in keys]

    def draw(self) -> Tensor:
        """The next noise of every image, (N, C, H, W), float32: first the initial state, then step after step."""
        return torch.from_numpy(np.stack([s.standard_normal(self.shape, dtype=np.float32) for s in self.streams]))
