"""The parts of a run, from its options: network, averages, objective, optimizer, SSL encoders, loss scale."""

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from accelerate import PartialState
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from common.errors import UserError
from common.flags import PRECISIONS
from loss import DeepFlowLoss
from models import DeepFlow
from models.ssl_encoders import load_encoder
from training import guard, parallel, run_state
from training.ema import EMA, averages
from training.optimizer import make_optimizer
from training.plan import Plan, build_network


class Models(NamedTuple):
    """The trained network and what depends on it."""

    network: DeepFlow
    model: nn.Module  # computes the network's gradients on all processes: itself, or DDP around it
    emas: dict[str, EMA]  # averages by name, the main one first
    optimizer: torch.optim.Optimizer


def build_models(plan: Plan, saved: run_state.TrainingState | None, device: torch.device) -> Models:
    """Network, averages and optimizer on all processes, as initialised or as `saved`."""
    options = plan.options
    torch.manual_seed(options.seed)  # the initial weights are the only use of the global generator
    network = build_network(options, plan.data, plan.features)
    network.checkpoint_activations = options.activation_checkpointing
    if saved:
        network.load_state_dict(saved.model)
    # A sharded network is the same everywhere by its seed or file: no device has to hold all of it.
    if not parallel.is_sharded():
        parallel.synchronise(network.to(device))  # before anything is copied from it, so that all averages start equal
    emas = averages(network, options.ema_decay, options.ema_std)
    for name, ema in emas.items() if saved else ():
        ema.model.load_state_dict(saved.ema[name])
    if options.compile:
        network.compile_parts()
    if parallel.is_sharded():
        for part in (network, *(ema.model for ema in emas.values())):
            parallel.shard(part, device)
        model = network
    else:
        model = parallel.replicate(network, device)
    optimizer = make_optimizer(
        network,
        options.learning_rate,
        (options.adam_beta1, options.adam_beta2),
        options.adam_weight_decay,
        options.adam_epsilon,
    )
    if saved:
        parallel.load_optimizer(network, optimizer, saved.trainer["optimizer"])
    return Models(network, model, emas, optimizer)


def build_loss(options: argparse.Namespace) -> DeepFlowLoss:
    """The objective as the options say."""
    return DeepFlowLoss(
        path_type=options.path_type,
        weighting=options.weighting,
        tg_upper_bound=options.tg_upper_bound,
        scale_weight=options.scale_weight,
        acc_coeff=options.acc_coeff,
        proj_coeff=options.proj_coeff,
        cfg_prob=options.cfg_prob,
    )


def build_loss_scale(precision: str) -> guard.LossScale:
    """The loss scale of a precision: only fp16 needs one."""
    return guard.LossScale(dynamic=precision == "fp16")


def load_encoders(plan: Plan, processes: PartialState) -> list[nn.Module]:
    """The SSL encoders of images; none without alignment, or where packed features take their place.

    Raises:
        UserError: if their weights cannot be loaded.
    """
    options = plan.options
    if not options.ssl_align or plan.features:
        return []
    dtype = PRECISIONS[options.mixed_precision]
    files = options.enc_weights or [None] * len(options.enc_type)
    encoders, mistake = [], None
    with processes.local_main_process_first():  # it downloads what is not in the cache
        try:
            for name, file in zip(options.enc_type, files, strict=True):
                encoders.append(load_encoder(name, plan.config.tokens_per_side, file, processes.device, dtype))
        except UserError as error:  # raised only after the processes that wait for this one have made it too
            mistake = error
    if mistake:
        raise mistake
    return encoders


def attention_kernels(options: argparse.Namespace) -> AbstractContextManager:
    """Which kernels attention may use: any, or without `--fused-attn` only the softmax written out."""
    return nullcontext() if options.fused_attn else sdpa_kernel([SDPBackend.MATH])


def load_previews(plan: Plan, processes: PartialState) -> Callable[..., dict[str, float]] | None:
    """The function that writes previews; None without `--preview-every`.

    Raises:
        UserError: if their autoencoder or reference cannot be loaded.
    """
    if not plan.options.preview_every:
        return None
    from training.previews import Previews  # imports diffusers and feature networks: slow, and rarely needed

    return Previews(plan.options, plan.data, processes.device, processes.process_index, processes.num_processes)
