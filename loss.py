"""The multi-branch velocity-plus-acceleration objective (paper, Eq. 4, 5, 7, 10) and the SSL alignment term.

Every term is kept per sample, shape (N,), in float32 or wider. The network is any callable `model(x, t, condition)`
that returns `velocities`, one per branch, `accelerations`, one per VeRA block, and `projections` for SSL alignment. A
condition is any tensor whose first axis is the batch.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import UserError
from interpolant import draw_times, interpolate, velocity_target


class Draws(NamedTuple):
    """All that is random in the loss of N samples."""

    times: Tensor  # (k, N) in [0, 1], of every branch
    noise: Tensor  # (N, C, H, W), N(0, I)
    dropped: Tensor  # (N,) bool, conditions to replace by the null condition

    def rows(self, rows: slice) -> "Draws":
        """The draws of some of the samples."""
        return Draws(self.times[:, rows], self.noise[rows], self.dropped[rows])


Features = Tensor | Sequence[Tensor]  # tokens (N, T, z) of one SSL encoder, or of each of several


class LossTerms(NamedTuple):
    """Per-sample terms, each (N,), before the weights lambda; `branch_velocity` is (k, N), before the weights beta."""

    velocity: Tensor
    acceleration: Tensor
    alignment: Tensor | None  # None where there is nothing to align with
    branch_velocity: Tensor

    def named(self) -> dict[str, Tensor]:
        """Every term, (N,), by its name in logs, plots and messages."""
        branches = {f"velocity_{i}": error for i, error in enumerate(self.branch_velocity, start=1)}
        aligned = {} if self.alignment is None else {"alignment": self.alignment}
        return {**branches, "acceleration": self.acceleration, **aligned}


def branch_times(first: Tensor, branches: int, upper_bound: float, generator: torch.Generator) -> Tensor:
    """Times of all branches, (k, N), from those of the first, (N,): t_{i+1} = clamp(t_i +- u upper_bound, 0, 1).

    u ~ U(0, 1) for each sample and gap; the sign is drawn once for each sample, so that its times move one way.
    """
    count, device = len(first), generator.device
    sign = torch.randint(0, 2, (count,), generator=generator, device=device) * 2.0 - 1.0
    times = [first]
    for _ in range(branches - 1):
        gap = upper_bound * torch.rand(count, generator=generator, device=device)
        times.append((times[-1] + sign * gap).clamp(0, 1))
    return torch.stack(times)


def per_sample_mse(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over all but the first axis, (N,), reduced in float32 or wider."""
    dtype = torch.promote_types(target.dtype, torch.float32)
    return (prediction.to(dtype) - target.to(dtype)).square().flatten(1).mean(1)


class DeepFlowLoss:
    """The training objective.

    Args:
        path_type: `linear` or `cosine`.
        weighting: distribution of the first branch's time, `lognormal` or `uniform`.
        tg_upper_bound: largest time gap between neighbouring branches, in [0, 1].
        scale_weight: beta, one weight per branch; None for 0.2 each and 1.0 for the last.
        acc_coeff: lambda, weight of the acceleration term.
        proj_coeff: weight of the SSL alignment term.
        cfg_prob: probability of dropping a condition to the null one, in [0, 1].
    """

    def __init__(
        self,
        path_type: str = "linear",
        weighting: str = "lognormal",
        tg_upper_bound: float = 0.01,
        scale_weight: Sequence[float] | None = None,
        acc_coeff: float = 1.0,
        proj_coeff: float = 0.5,
        cfg_prob: float = 0.1,
    ) -> None:
        self.path_type = path_type
        self.weighting = weighting
        self.tg_upper_bound = tg_upper_bound
        self.scale_weight = scale_weight
        self.acc_coeff = acc_coeff
        self.proj_coeff = proj_coeff
        self.cfg_prob = cfg_prob

    def draw(self, branches: int, shape: Sequence[int], generator: torch.Generator) -> Draws:
        """All that is random in the loss of latents of a shape (N, C, H, W), on the generator's device.

        Drawn for a whole step's batch and cut into rows, it makes the loss independent of how the batch is divided.
        """
        device = generator.device
        first = draw_times(self.weighting, self.path_type, shape[0], generator)
        times = branch_times(first, branches, self.tg_upper_bound, generator)
        noise = torch.randn(shape, generator=generator, device=device)
        return Draws(times, noise, torch.rand(shape[0], generator=generator, device=device) < self.cfg_prob)

    def terms(
        self,
        model: Callable[..., Any],
        x0: Tensor,
        condition: Tensor,
        null: Tensor,
        draws: Draws,
        features: Features | None = None,
    ) -> LossTerms:
        """Terms at given draws, moved to the device of `x0`.

        Args:
            model: the network.
            x0: clean latents, (N, C, H, W).
            condition: of each sample, (N, ...).
            null: the null condition, (N, ...), which takes the place of the dropped ones.
            draws: times, noise and drops.
            features: for alignment, the encoder's tokens (N, T, z), or those of each of several.

        Raises:
            UserError: if the number of weights or of the model's branches is not that of the times, or the features
                do not fit.
        """
        times, noise, dropped = (value.to(x0.device) for value in draws)
        condition = torch.where(dropped.reshape(-1, *[1] * (condition.ndim - 1)), null, condition)
        output = model(interpolate(self.path_type, x0, noise, times[0]), times, condition)
        if len(output.velocities) != len(times):
            raise UserError(f"{len(times)} times were given for a model of {len(output.velocities)} branches")
        target = velocity_target(self.path_type, x0, noise, times[0])
        # The target is taken at t_1, the time of the only input; on the linear path it is the same at every t_i.
        branch_velocity = torch.stack([per_sample_mse(v, target) for v in output.velocities])
        # The weights stay Python numbers: copying them to the device would make the host wait for it.
        velocity = sum(beta * error for beta, error in zip(self._betas(len(times)), branch_velocity, strict=True))
        acceleration = torch.zeros_like(velocity)
        for t, v, a in zip(times, output.velocities, output.accelerations, strict=False):
            acceleration = acceleration + self._acceleration_error(x0, noise, t, v, a)
        alignment = None
        if features is not None:
            alignment = alignment_error(output.projections, [features] if isinstance(features, Tensor) else features)
        return LossTerms(velocity, acceleration, alignment, branch_velocity)

    def total(self, terms: LossTerms) -> Tensor:
        """The weighted sum that is minimised, per sample, (N,)."""
        total = terms.velocity + self.acc_coeff * terms.acceleration
        return total if terms.alignment is None else total + self.proj_coeff * terms.alignment

    def _betas(self, k: int) -> Sequence[float]:
        weights = [0.2] * (k - 1) + [1.0] if self.scale_weight is None else self.scale_weight
        if len(weights) != k:
            raise UserError(f"scale_weight has {len(weights)} entries for {k} branches: give one each (--scale-weight)")
        return weights

    def _acceleration_error(self, x0: Tensor, noise: Tensor, t: Tensor, velocity: Tensor, accel: Tensor) -> Tensor:
        """Second-order Taylor step from t to the data at 0, per sample (Eq. 7); the velocity is not trained by it."""
        x = interpolate(self.path_type, x0, noise, t)
        step = (0 - t).reshape(-1, *[1] * (x0.ndim - 1)).to(x.dtype)
        reached = x + velocity.detach().to(x.dtype) * step + 0.5 * accel.to(x.dtype) * step.square()
        return per_sample_mse(reached, x0)


def alignment_error(projections: Sequence[Tensor], features: Sequence[Tensor]) -> Tensor:
    """SSL alignment (REPA), per sample: `negative_cosine` averaged over the places of alignment and the encoders.

    Args:
        projections: (N, T, z) each; for every place of alignment one per encoder, in the order of the encoders.
        features: (N, T, z) each, one per encoder.

    Raises:
        UserError: if projections and features do not belong to the same number of encoders, tokens or widths.
    """
    places, rest = divmod(len(projections), len(features) or 1)
    pairs = list(zip(projections, list(features) * places, strict=False))
    if not pairs or rest or any(p.shape != f.shape for p, f in pairs):
        given, expected = ([tuple(t.shape) for t in tensors] for tensors in (features, projections))
        raise UserError(
            f"features {given} do not fit the model's projections {expected}: choose the encoders, and their number "
            "of tokens, that the model was made for (--enc-type)"
        )
    return torch.stack([negative_cosine(p, f) for p, f in pairs]).mean(0)


def negative_cosine(projection: Tensor, features: Tensor) -> Tensor:
    """Minus the mean cosine between each token's projection and its feature: two (N, T, z) -> (N,).

    Normalised in float32 or wider at any precision of the network: in half precision the norms overflow.
    """
    dtype = torch.promote_types(projection.dtype, torch.float32)
    return -F.cosine_similarity(projection.to(dtype), features.to(dtype), dim=-1).mean(1)
