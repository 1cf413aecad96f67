"""The optimizer: AdamW as the paper has it, its learning-rate schedule, and whether its kernel can skip a step."""

import math
from collections.abc import Callable

import torch
from torch import nn


def make_optimizer(
    network: nn.Module,
    learning_rate: float = 1e-4,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.0,
    epsilon: float = 1e-8,
) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters. Each parameter group keeps its own rate as `initial_lr`.

    Fused: one launch for all tensors, and a kernel that can skip a step on the device.
    """
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(parameters, learning_rate, betas, epsilon, weight_decay, fused=True)


def skips_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer's kernel divides gradients by `grad_scale` and applies nothing where `found_inf` is 1.

    Torch's fused optimizers have this attribute, which `torch.amp.GradScaler` reads as well.
    """
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


# The factor of the learning rate after a share of all steps, in [0, 1].
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda share: 1.0,
    "cosine": lambda share: 0.5 * (1 + math.cos(math.pi * share)),  # down to 0
}


def schedule(name: str, step: int, total_steps: int) -> float:
    """The factor of the learning rate after `step` of `total_steps` steps, by one of `SCHEDULES`."""
    return SCHEDULES[name](step / total_steps)
