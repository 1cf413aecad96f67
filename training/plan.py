"""A run as resolved before it starts: options checked against each other, the device, the data and the run's folder."""

import argparse
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed.fsdp
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from common.errors import UserError
from common.files import file_sha256
from common.processes import require_compiler
from common.sd_vae import SD_CHANNELS, SD_REDUCTION
from dataset import LatentData, open_latents
from models import DeepFlow, create_model
from models.autoencoder import portable_name
from models.config import Architecture
from models.presets import REPA_DEPTH, model_config
from models.ssl_encoders import RANDOM, encoder_width, require_weights
from storage.features import PackedFeatures
from training import run_state
from training.options import EXPERIMENT, ResolvedOptions, resolve_precision
from training.parallel import is_sharded
from training.records import code_commit

# What a dry run assumes where there is no data yet: ImageNet's training set in the SD-VAE's latents.
ASSUMED = {"resolution": 256, "num_classes": 1000}
ASSUMED_IMAGES = 1_281_167

# Dense fp16 or bf16 operations a second, by a part of the device's name, the more specific ones first.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "A6000": 155e12,
    "V100": 125e12,
}


@dataclass(frozen=True)
class Plan:
    """A run as resolved from options, data and the files of an earlier run of the same name."""

    options: ResolvedOptions
    run: Path
    data: LatentData | None  # None only in a dry run whose data is missing
    missing: str | None  # in that case, the message that says so
    images: int  # in the data
    features: list[PackedFeatures]  # of SSL encoders; empty where encoders see the images
    config: Architecture
    parameters: int
    experiment: dict[str, Any]  # what a resumed run must share
    total_steps: int
    micro_batch: int  # images of one process in one forward
    resume_from: Path | None


class Work(NamedTuple):
    """What one image costs in a training step."""

    macs: int  # multiply-adds of the forward
    activation_bytes: float  # kept from the forward for the backward, in the run's precision


def make_plan(options: argparse.Namespace, world: int, device: torch.device) -> Plan:
    """Check everything without writing anything, and resolve the options that depend on the device or the data.

    `options` stays as it is; the plan has the resolved ones.

    Raises:
        UserError: for every contradiction, naming both values and the flag to change.
    """
    precision = resolve_precision(options.mixed_precision, device.type)
    if precision == "fp16" and device.type == "cpu":
        raise UserError("--mixed-precision fp16 needs a GPU and this run is on the CPU: choose bf16 or no")
    if options.compile and not options.dry_run:
        require_compiler(device)
    if is_sharded() and not hasattr(torch.distributed.fsdp, "fully_shard"):
        raise UserError(
            f"sharding needs torch 2.6 or newer, this is {torch.__version__}: update it, or launch without FSDP"
        )
    parts = world * options.gradient_accumulation_steps
    if options.batch_size % parts:
        raise UserError(
            f"--batch-size {options.batch_size} is not divisible by {parts} ({world} processes x "
            f"--gradient-accumulation-steps {options.gradient_accumulation_steps}): use a multiple of {parts}"
        )

    data, missing = None, None
    try:
        data = open_latents(options.data_dir)
    except UserError as error:
        if not options.dry_run:
            raise
        missing = str(error)
    resolved = {"mixed_precision": precision, **resolve_data_options(options, data)}
    features = open_features(options, data)
    resolved["enc_type"] = [packed.encoder for packed in features] or options.enc_type
    options = ResolvedOptions({**vars(options), **resolved})
    with torch.device("meta"):  # checks the architecture and counts its parameters without taking memory
        network = build_network(options, data, features)
    for packed in features if data is not None else ():
        packed.check_belongs(data, network.config.tokens_per_side**2)
    if options.scale_weight is not None and len(options.scale_weight) != network.num_branches:
        raise UserError(
            f"--scale-weight {options.scale_weight} has {len(options.scale_weight)} entries, the model "
            f"{network.num_branches} branches: give one weight each"
        )
    images = ASSUMED_IMAGES if data is None else len(data)
    experiment = {name: getattr(options, name) for name in EXPERIMENT}
    run = Path(options.output_dir) / options.exp_name
    return Plan(
        options=options,
        run=run,
        data=data,
        missing=missing,
        images=images,
        features=features,
        config=network.config,
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        experiment=experiment | dict(network.config) | {"data": identity(options, data, features)},
        total_steps=min(options.max_train_steps, math.ceil(options.epochs * images / options.batch_size)),
        micro_batch=options.batch_size // parts,
        resume_from=run_state.find(run, options.resume, options.resume_step),
    )


def resolve_data_options(options: argparse.Namespace, data: LatentData | None) -> dict[str, int]:
    """Resolution and number of classes, from the data; in a dry run without data, from the options or ImageNet's.

    Raises:
        UserError: for an option that is not the data's value.
    """
    if data is None:
        given = {name: getattr(options, name) for name in ASSUMED}
        return {name: value if given[name] is None else given[name] for name, value in ASSUMED.items()}
    found = {"resolution": data.manifest["resolution"], "num_classes": data.num_classes}
    for name, value in found.items():
        if (given := getattr(options, name)) not in (None, value):
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} {given} given, but the dataset {data.path} has {value}: change or drop {flag}")
    return found


def open_features(options: argparse.Namespace, data: LatentData | None) -> list[PackedFeatures]:
    """The packed features to align with, none where encoders see the images.

    Raises:
        UserError: for features of other encoders than `--enc-type`, and for missing images or weights files.
    """
    features = [PackedFeatures(path) for path in options.ssl_features or []]
    if features:
        encoders = [packed.encoder for packed in features]
        if options.enc_type not in (None, encoders):
            raise UserError(f"--enc-type {options.enc_type}, but --ssl-features are of {encoders}: drop --enc-type")
        return features
    for file in options.enc_weights or []:
        require_weights(file)
    if options.ssl_align and data is not None:
        if not data.has_images:
            raise UserError(
                f"--ssl-align needs images, and {data.path} has none: encode with --images, or give --ssl-features, "
                "made with dataset_tools encode-ssl"
            )
        data.gather_images(np.zeros(1, np.int64))  # checks that there are some, with the latents' names and size
    return []


def identity(options: argparse.Namespace, data: LatentData | None, features: Sequence[PackedFeatures]) -> str | None:
    """What identifies a dataset and its SSL encoders, in any folder: number of samples and a checksum."""
    if data is None:
        return None
    contents = dict(data.manifest)
    if contents["vae_sha256"] is not None:
        del contents["vae"]  # only a name; the checksum decides
    if features:
        contents["features"] = [packed.manifest["weights_sha256"] for packed in features]
    elif options.enc_weights:
        contents["encoders"] = [file if file == RANDOM else file_sha256(file) for file in options.enc_weights]
    digest = hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()
    return f"{len(data)} samples, {digest[:12]}"


def build_network(options: argparse.Namespace, data: LatentData | None, features: Sequence[PackedFeatures]) -> DeepFlow:
    """The network that the options name, for the dataset's latents and the features it is aligned with.

    Raises:
        UserError: for an unknown name or encoder, branches that do not cut the depth, or latents that are not square.
    """
    side = options.resolution // SD_REDUCTION
    channels, height, width = (2 * SD_CHANNELS, side, side) if data is None else data.latent_shape
    if height != width:
        raise UserError(f"the latents in {data.path} are {height} x {width}: encode square images")
    widths = [packed.width for packed in features] or [encoder_width(name) for name in options.enc_type or []]
    config = model_config(options.model, depth=options.trans_depth, df_idxs=options.df_idxs)
    one_branch = options.ssl_align and not config["df_idxs"]
    return create_model(
        options.model,
        depth=options.trans_depth,
        df_idxs=options.df_idxs,
        num_classes=options.num_classes,
        input_size=height,
        in_channels=channels // 2,  # stored as mean and std
        qk_norm=options.qk_norm,
        legacy_scaling=options.legacy_scaling,
        ssl_dim=widths or None,
        repa_depth=options.repa_depth or (min(REPA_DEPTH, config["depth"]) if one_branch else None),
    )


def measure(plan: Plan) -> Work:
    """Count the operations of a forward and the memory that it keeps, on tensors without memory."""
    count, options = 2, plan.options
    with torch.device("meta"):
        network = DeepFlow(**plan.config).train()
        network.checkpoint_activations = options.activation_checkpointing
        x = torch.empty(count, plan.config["in_channels"], plan.config["input_size"], plan.config["input_size"])
        t, y = torch.empty(count), torch.zeros(count, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            network(x, t, y)
        if options.mixed_precision != "no":
            network, x = network.half(), x.half()
        weights = {_memory(parameter) for parameter in network.parameters()}
        kept: dict[int, Tensor] = {}

        def keep(tensor: Tensor) -> Tensor:
            if _memory(tensor) not in weights:
                kept[_memory(tensor)] = tensor
            return tensor

        with saved_tensors_hooks(keep, lambda tensor: tensor):
            output = network(x, t, y)
        size = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
        del output
    return Work(counter.get_total_flops() // (2 * count), size / count)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Half-precision operations a second of a GPU by its data sheet, None where it is not known or not used."""
    if device.type != "cuda" or precision == "no":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def describe_model(plan: Plan, step: int) -> dict[str, Any]:
    """The metadata saved with the weights besides the architecture: what sampling needs, and how they were trained."""
    options, data = plan.options, plan.data
    return {
        "model": options.model,
        "step": step,
        "path_type": options.path_type,
        "resolution": options.resolution,
        "vae": portable_name(data.manifest["vae"]),
        "vae_sha256": data.manifest["vae_sha256"],
        "scaling_factor": data.scaling_factor,
        "class_names": data.class_names,
        "class_counts": data.class_counts.tolist(),
        "training": {
            "epochs": step * options.batch_size / len(data),
            "images": len(data),
            "learning_rate": options.learning_rate,
            "mixed_precision": options.mixed_precision,
            "commit": code_commit(),
            **{name: getattr(options, name) for name in EXPERIMENT},
        },
    }


def describe(plan: Plan, work: Work, world: int, device: torch.device, step: int) -> str:
    """The resolved run, as text for the user."""
    options = plan.options
    origin = f", from {plan.resume_from}" if plan.resume_from else ""
    data = "missing, ImageNet's training set assumed" if plan.data is None else plan.data.path
    averages = len(options.ema_decay) + len(options.ema_std)
    source = f"features of {len(plan.features)} folder(s)" if plan.features else "which sees the images at every step"
    shards = world if is_sharded() else 1
    states = 4 * plan.parameters * (4 + averages) / shards  # weights, gradients, two moments; float32 all of them
    activations = plan.micro_batch * work.activation_bytes
    return "\n".join(
        [
            f"model      {options.model}, {plan.parameters / 1e6:.1f} M parameters, {work.macs / 1e9:.1f} GMAC per "
            f"forward of one image: {dict(plan.config)}",
            f"data       {data}: {plan.images} images of {options.resolution} px in "
            f"{options.num_classes} classes, {plan.images / options.batch_size:.1f} steps per epoch",
            *([f"aligned    with {', '.join(options.enc_type)}, {source}"] if options.ssl_align else []),
            f"batch      {options.batch_size} = {world} processes x {options.gradient_accumulation_steps} "
            f"accumulated x {plan.micro_batch}, precision {options.mixed_precision} on {device.type}"
            f"{', sharded' if shards > 1 else ''}",
            f"memory     about {(states + activations) / 2**30:.1f} GiB per process: {states / 2**30:.1f} for weights, "
            f"gradients, moments and {averages} average(s), {activations / 2**30:.1f} for activations",
            f"run        steps {step} to {plan.total_steps}{origin}",
            f"files      {plan.run}/: options.json, metrics.jsonl, checkpoints/step-* every "
            f"{options.checkpointing_steps} steps ({4 * plan.parameters * (3 + averages) / 2**30:.1f} GiB each), "
            "ema.safetensors, loss.png",
        ]
    )
