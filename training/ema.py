"""Exponential moving average of the weights (the paper samples from decay 0.9999)."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class EMA:
    """A running average of `model`'s state: parameters are averaged, buffers are copied.

    Make it after the weights are in sync (loaded, and broadcast to all processes), from the unwrapped model.
    `state` is then a state dict with the model's own keys.

    Args:
        model: the model to follow; its weights are the first average.
        decay: weight of the past in every update, in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.state: dict[str, Tensor] = {k: v.detach().clone() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """One step: average = decay * average + (1 - decay) * weights, in few launches over all tensors.

        Raises:
            KeyError: if the model's keys are not those the average was made from.
        """
        current = model.state_dict()
        require_equal_keys(self.state, current)
        averaged = [name for name, _ in model.named_parameters()]
        torch._foreach_lerp_(
            [self.state[name] for name in averaged], [current.pop(name) for name in averaged], 1 - self.decay
        )
        for name, buffer in current.items():
            self.state[name].copy_(buffer)

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over a saved average.

        Raises:
            KeyError: if its keys are not those of this average.
        """
        require_equal_keys(self.state, state)
        for name, tensor in state.items():
            self.state[name].copy_(tensor)


def require_equal_keys(average: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    """Raise `KeyError`, naming the keys, unless both have the same."""
    if different := average.keys() ^ other.keys():
        raise KeyError(f"the average and the weights differ in: {', '.join(sorted(different))}")
