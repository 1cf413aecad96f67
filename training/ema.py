"""Moving averages of the weights (the paper samples from one of decay 0.9999)."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from training.parallel import local


class EMA:
    """A running average of `model`: parameters are averaged, buffers are copied.

    Make it after the weights are in sync (loaded, and broadcast to all processes), from the module that neither DDP nor
    FSDP has touched. `model` is then a copy of it that holds the average; where the one is sharded, shard the other.

    Args:
        model: the model to follow; its weights are the first average.
        decay: weight of the past in an update, in [0, 1), or a function from the steps done to it.
    """

    def __init__(self, model: nn.Module, decay: float | Callable[[int], float]) -> None:
        self.decay = decay if callable(decay) else lambda step: decay
        self.model = copy.deepcopy(model).requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """After `step` steps: average = decay * average + (1 - decay) * weights, in few launches over all tensors.

        Raises:
            KeyError: if the model's keys are not those the average was made from.
        """
        average, current = self.model.state_dict(), model.state_dict()
        require_equal_keys(average, current)
        names = [name for name, _ in model.named_parameters()]
        weights = [local(current.pop(name)) for name in names]
        torch._foreach_lerp_([local(average[name]) for name in names], weights, 1 - self.decay(step))
        for name, buffer in current.items():
            average[name].copy_(buffer)


def averages(model: nn.Module, decays: Sequence[float], stds: Sequence[float]) -> dict[str, EMA]:
    """One average for each decay, named by it, and for each power profile, named `std` and its width."""
    profiles = {f"{decay:g}": decay for decay in decays} | {f"std{std:g}": power_function(std) for std in stds}
    return {name: EMA(model, decay) for name, decay in profiles.items()}


def power_function(std: float) -> Callable[[int], float]:
    """The decay (1 - 1 / step)^(gamma + 1), whose profile over the past is a power function of step.

    `std` in (0, 0.28) is the profile's width relative to the length of training; gamma is the positive solution of
    std^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) (Karras et al. 2024, "Analyzing and improving the training
    dynamics of diffusion models", Eq. 123-127).
    """
    from scipy.optimize import brentq  # slow to import, and seldom wanted

    gamma = brentq(lambda g: (g + 1) / ((g + 2) ** 2 * (g + 3)) - std**2, 0, 1e6)
    return lambda step: math.exp((gamma + 1) * math.log1p(-1 / step)) if step > 1 else 0.0


def require_equal_keys(average: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    """Raise `KeyError`, naming the keys, unless both have the same."""
    if different := average.keys() ^ other.keys():
        raise KeyError(f"the average and the weights differ in: {', '.join(sorted(different))}")
