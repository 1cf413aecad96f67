"""The networks: DeepFlow and SiT (one class), their presets, their checkpoints, and the VAE they work in."""

from .deepflow import DeepFlow, DeepFlowOutput
from .presets import create_model

__all__ = ["DeepFlow", "DeepFlowOutput", "create_model"]
