"""Half precision for inference."""

import torch
from torch import nn


def cast_products(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Keep the weights of all matrix products in `dtype`, in place; embeddings and norms stay as they are.

    Without gradients, autocast casts these weights to the same values at every call: the network's outputs stay the
    same bits, in less time and memory.
    """
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.to(dtype)
        elif isinstance(module, nn.MultiheadAttention):  # its packed projection is no Linear
            for parameter in (module.in_proj_weight, module.in_proj_bias):
                parameter.data = parameter.data.to(dtype)
    return network
