"""Train DeepFlow or SiT on packed latents.

    python train.py --data-dir data/imagenet256 --exp-name xl --model DeepFlow-XL/2 --df-idxs 8 16
    accelerate launch --num_processes 8 train.py ...        the same flags, on several GPUs

The same command resumes an interrupted run from its newest checkpoint. One counter, optimizer steps, is behind
everything: data order, noise and times are functions of (seed, step), whatever the number of processes. So a checkpoint
needs no random state, and a resumed run repeats the uninterrupted one, on the CPU bit for bit. SIGTERM or SIGUSR1
finishes the step, saves, and exits with code 143.

    RUN/options.json      options as resolved, architecture, code commit, versions
    RUN/metrics.jsonl     averages over --log-every steps and all processes
    RUN/checkpoints/      see training/checkpointing.py
    RUN/ema.safetensors   at the end: the averaged weights alone, for generate.py
    RUN/loss.png          at the end: the loss curves
"""

import argparse
import hashlib
import json
import math
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object
from tqdm import tqdm

from dataset import DataOrder, DeviceLatents, LatentData, latent_batches, open_latents
from errors import UserError, exits_on_user_error
from loss import DeepFlowLoss
from models import DeepFlow, checkpoints, create_model
from models.vae import sample_latents
from processes import join_processes, reported_by_any_process
from training import checkpointing, guard, logging
from training.ema import EMA
from training.options import EXPERIMENT, parse_options

STOPPED_BY_SIGNAL = 143  # the exit code of a process that SIGTERM ends
MAX_SKIPPED = 30  # halvings of the fp16 loss scale in a row, after which no scale will do


class NonFiniteLoss(ArithmeticError):
    """A loss or gradient is infinite or NaN; the step it belongs to was not applied."""


@dataclass(frozen=True)
class Plan:
    """A run as resolved from options, data and what an earlier run of the same name left."""

    run: Path
    data: LatentData
    config: dict[str, Any]  # the network's architecture
    parameters: int
    experiment: dict[str, Any]  # what a resumed run must share
    total_steps: int
    micro_batch: int  # images of one process in one forward
    resume_from: Path | None


def train(options: argparse.Namespace) -> bool:
    """Run the training that `options` (of `parse_options`) describe; False if a signal stopped it before its end.

    Raises:
        UserError: for options that contradict each other, the data or the checkpoint, before anything is written;
            or if a checkpoint cannot be written.
        NonFiniteLoss: before the update that it would have spoilt.
    """
    # ---- 1. Processes, and what there is to do ---------------------------------------------------------------------
    processes = join_processes()
    device, rank, world = processes.device, processes.process_index, processes.num_processes
    is_main, accumulation = processes.is_main_process, options.gradient_accumulation_steps
    plan = make_plan(options, world, device)
    run, data, config, total_steps = plan.run, plan.data, plan.config, plan.total_steps
    saved = checkpointing.load(plan.resume_from, plan.experiment) if plan.resume_from else None
    step = saved.step if saved else 0
    if is_main:
        print(describe(plan, options, world, device, step), flush=True)
    if options.dry_run:
        return True
    processes.wait_for_everyone()  # all have read the run's folder before one of them changes it
    if is_main:
        run.mkdir(parents=True, exist_ok=True)
        logging.write_options(run, vars(options), config)
        logging.truncate_metrics(run, saved.trainer["log"]["logged_step"] if saved else 0)
        checkpointing.set_aside_after(run, step)

    # ---- 2. Network, objective, optimizer, average -----------------------------------------------------------------
    torch.set_float32_matmul_precision("high" if options.allow_tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = options.allow_tf32
    tracker = None if options.report_to == "none" else options.report_to
    accelerator = Accelerator(mixed_precision=options.mixed_precision, log_with=tracker)
    logging.start_trackers(accelerator, options, run)
    torch.manual_seed(options.seed)  # the initial weights are the only use of the global generator
    network = build_network(options, data)
    if saved:
        network.load_state_dict(saved.model)
    loss_fn = DeepFlowLoss(
        path_type=options.path_type,
        weighting=options.weighting,
        tg_upper_bound=options.tg_upper_bound,
        scale_weight=options.scale_weight,
        acc_coeff=options.acc_coeff,
        cfg_prob=options.cfg_prob,
    )
    optimizer = torch.optim.AdamW(
        network.parameters(),
        lr=options.learning_rate,
        betas=(options.adam_beta1, options.adam_beta2),
        weight_decay=options.adam_weight_decay,
        eps=options.adam_epsilon,
        fused=device.type in ("cuda", "cpu"),
    )
    model, optimizer = accelerator.prepare(network, optimizer)  # sends the weights of the first process to all ...
    network, scaler = accelerator.unwrap_model(model), accelerator.scaler
    ema = EMA(network, options.ema_decay)  # ... so that all averages start equal
    columns = ["grad_norm", "loss", *(f"velocity_{i + 1}" for i in range(network.num_branches)), "acceleration"]
    log = logging.MetricLog(columns, step, options.batch_size)
    if saved:
        ema.load(saved.ema)
        groups = optimizer.state_dict()["param_groups"]  # the rates of this command, not of the one that saved
        optimizer.load_state_dict({"state": saved.trainer["optimizer"]["state"], "param_groups": groups})
        log.load_state_dict(saved.trainer["log"])
        if scaler is not None and saved.trainer["scaler"] is not None:
            scaler.load_state_dict(saved.trainer["scaler"])
        saved = None  # frees a copy of the weights

    def write_metrics() -> None:
        entry = log.average(
            step,
            epoch=step * options.batch_size / len(data),
            lr=learning_rate(options, step - 1, total_steps),
            loss_scale=1.0 if scaler is None else scaler.get_scale(),
        )
        accelerator.log(entry, step=step)
        if is_main:
            logging.append_metrics(run, entry)
            bar.set_postfix(loss=f"{entry['loss']:.4f}", images_s=f"{entry['images_per_second']:.1f}")

    # ---- 3. The loop -----------------------------------------------------------------------------------------------
    order = DataOrder(len(data), options.batch_size, options.seed)
    generator = torch.Generator(device)
    per_process = plan.micro_batch * accumulation
    batch_shape = (options.batch_size, config["in_channels"], config["input_size"], config["input_size"])
    skipped = 0  # attempts at the present step that fp16 overflow has undone
    stopped = False
    with guard.stop_request() as stop, tqdm(total=total_steps, initial=step, disable=not is_main) as bar:
        source = DeviceLatents(data, device) if options.data_on_device else data
        batches = latent_batches(source, order, step, rank, world, options.num_workers, accumulation)

        while step < total_steps and not stopped:
            # Data. A step that fp16 overflowed is tried again, with the same data and noise and a smaller loss scale.
            if skipped == 0:
                with reported_by_any_process(rank):
                    micro_batches = [next(batches) for _ in range(accumulation)]

            # Noise and times. Drawn for the whole global batch, of which each part below takes its rows: loss and
            # gradients do not depend on how the batch is divided.
            generator.manual_seed(noise_seed(options.seed, step))
            latent_noise = torch.randn(batch_shape, generator=generator, device=device)
            draws = loss_fn.draw(network.num_branches, batch_shape, generator)

            # Forward and backward. Gradients add up to those of the mean over the process's whole batch.
            sums, named_terms = 0, []
            for i, batch in enumerate(micro_batches):
                first = (rank * accumulation + i) * plan.micro_batch
                rows = slice(first, first + plan.micro_batch)
                moments = batch.moments.to(device, non_blocking=True)
                labels = batch.labels.to(device, non_blocking=True)
                x0 = sample_latents(moments, data.scaling_factor, latent_noise[rows])
                with nullcontext() if i == accumulation - 1 else accelerator.no_sync(model):
                    terms = loss_fn.drawn_terms(model, x0, labels, network.num_classes, draws.rows(rows))
                    total = loss_fn.total(terms)
                    accelerator.backward(total.sum() / per_process)
                parts = [total.sum(), *terms.branch_velocity.sum(1), terms.acceleration.sum()]
                sums = sums + torch.stack(parts).detach()
                per_sample = {"velocity": terms.velocity.detach(), "acceleration": terms.acceleration.detach()}
                named_terms.append((batch.indices, per_sample))

            # The only moment when the host waits for the device: one small vector, the same on all processes, that
            # tells whether the step may be applied, what to log, and whether any process was asked to stop.
            grad_norm = accelerator.clip_grad_norm_(model.parameters(), options.max_grad_norm or math.inf)
            asked = torch.full((1,), float(stop.is_set()), device=device)
            verdict = torch.cat([grad_norm.reshape(1), sums / per_process, asked])
            *row, asked = accelerator.reduce(verdict, "mean").tolist()

            # Guard. Nothing that is not finite reaches the weights, the average, or the counter.
            if not all(map(math.isfinite, row)):
                bad_terms = gather_object(guard.non_finite_terms(rank, named_terms))
                skipped += 1
                if bad_terms or scaler is None or skipped > MAX_SKIPPED:
                    raise NonFiniteLoss(describe_failure(step, bad_terms, row[0], run))
                optimizer.step()  # applies nothing: halves the loss scale
                optimizer.zero_grad()
                continue

            # Update.
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(options, step, total_steps)
            optimizer.step()
            optimizer.zero_grad()
            ema.update(network)
            step, skipped, stopped = step + 1, 0, asked > 0
            bar.update()

            # Log, save.
            log.add(row)
            if step % options.log_every == 0:
                write_metrics()
            if step % options.checkpointing_steps == 0 or step == total_steps or stopped:
                if is_main:
                    trainer = {"optimizer": optimizer.state_dict(), "log": log.state_dict()}
                    trainer["scaler"] = None if scaler is None else scaler.state_dict()
                    weights, metadata = network.state_dict(), describe_model(options, data, step)
                    state = checkpointing.TrainingState(step, plan.experiment, weights, ema.state, trainer)
                    checkpointing.save(run, state, config, metadata, options.keep_last)
                accelerator.wait_for_everyone()

        # ---- 4. The end --------------------------------------------------------------------------------------------
        finished = step >= total_steps
        if finished and log.window:
            write_metrics()
    if is_main and finished:
        checkpoints.save(run / "ema.safetensors", ema.state, config, describe_model(options, data, step))
        curves = logging.plot_losses(run)
        print(
            f"done after {step} steps: weights {run / 'ema.safetensors'}{f', loss curves {curves}' if curves else ''}"
        )
    elif is_main:
        print(f"stopped by a signal and saved at step {step}: the same command goes on from there")
    accelerator.end_training()
    return finished


def make_plan(options: argparse.Namespace, world: int, device: torch.device) -> Plan:
    """Check the options against each other, the device, the data and the run's folder, without writing anything.

    Options that were left to the device or the data (precision, resolution, classes) are filled in.

    Raises:
        UserError: for every contradiction, naming both values and the flag to change.
    """
    if options.mixed_precision is None:
        options.mixed_precision = "fp16" if device.type == "cuda" else "no"
    if options.mixed_precision == "fp16" and device.type == "cpu":
        raise UserError("--mixed-precision fp16 needs a GPU and this run is on the CPU: choose bf16 or no")
    parts = world * options.gradient_accumulation_steps
    if options.batch_size % parts:
        raise UserError(
            f"--batch-size {options.batch_size} is not divisible by {parts} ({world} processes x "
            f"--gradient-accumulation-steps {options.gradient_accumulation_steps}): use a multiple of {parts}"
        )

    data = open_latents(options.data_dir)
    for name, found in {"resolution": data.manifest["resolution"], "num_classes": data.num_classes}.items():
        given = getattr(options, name)
        if given not in (None, found):
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} {given} given, but the dataset {data.path} has {found}: change or drop {flag}")
        setattr(options, name, found)

    with torch.device("meta"):  # checks the architecture and counts its parameters without taking memory
        network = build_network(options, data)
    if options.scale_weight is not None and len(options.scale_weight) != network.num_branches:
        raise UserError(
            f"--scale-weight {options.scale_weight} has {len(options.scale_weight)} entries, the model "
            f"{network.num_branches} branches: give one weight each"
        )
    contents = dict(data.manifest)
    if contents["vae_sha256"] is not None:
        del contents["vae"]  # that is only a name, the checksum decides
    digest = hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()
    experiment = {name: getattr(options, name) for name in EXPERIMENT}
    run = Path(options.output_dir) / options.exp_name
    return Plan(
        run=run,
        data=data,
        config=network.config,
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        experiment=experiment | network.config | {"data": f"{len(data)} samples, {digest[:12]}"},
        total_steps=min(options.max_train_steps, math.ceil(options.epochs * len(data) / options.batch_size)),
        micro_batch=options.batch_size // parts,
        resume_from=checkpointing.find(run, options.resume, options.resume_step),
    )


def build_network(options: argparse.Namespace, data: LatentData) -> DeepFlow:
    """The network that the options name, for the dataset's latents.

    Raises:
        UserError: for an unknown name, branches that do not cut the depth, or latents that are not square.
    """
    channels, height, width = data.latent_shape
    if height != width:
        raise UserError(f"the latents in {data.path} are {height} x {width}: encode square images")
    return create_model(
        options.model,
        depth=options.trans_depth,
        df_idxs=options.df_idxs,
        num_classes=options.num_classes,
        input_size=height,
        in_channels=channels // 2,  # stored as mean and std
        qk_norm=options.qk_norm,
        legacy_scaling=options.legacy_scaling,
    )


def noise_seed(seed: int, step: int) -> int:
    """The seed of all that is random in one step: latents, times, noise, dropped labels."""
    return int(np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def learning_rate(options: argparse.Namespace, step: int, total_steps: int) -> float:
    """The rate of the update after `step` steps: constant, or half a cosine from the full rate down to 0."""
    if options.lr_schedule == "constant":
        return options.learning_rate
    return options.learning_rate * 0.5 * (1 + math.cos(math.pi * step / total_steps))


def describe_model(options: argparse.Namespace, data: LatentData, step: int) -> dict[str, Any]:
    """What travels with the weights besides the architecture: all that sampling needs to know."""
    return {
        "model": options.model,
        "step": step,
        "path_type": options.path_type,
        "resolution": options.resolution,
        "vae": data.manifest["vae"],
        "vae_sha256": data.manifest["vae_sha256"],
        "scaling_factor": data.scaling_factor,
        "class_names": data.class_names,
        "class_counts": data.class_counts.tolist(),
    }


def describe(plan: Plan, options: argparse.Namespace, world: int, device: torch.device, step: int) -> str:
    """The resolved run, for people."""
    origin = f", from {plan.resume_from}" if plan.resume_from else ""
    return "\n".join(
        [
            f"model      {options.model}, {plan.parameters / 1e6:.1f} M parameters: {plan.config}",
            f"data       {plan.data.path}: {len(plan.data)} images of {options.resolution} px in "
            f"{options.num_classes} classes, {len(plan.data) / options.batch_size:.1f} steps an epoch",
            f"batch      {options.batch_size} = {world} processes x {options.gradient_accumulation_steps} "
            f"accumulated x {plan.micro_batch}, precision {options.mixed_precision} on {device.type}",
            f"run        {plan.run}, steps {step} to {plan.total_steps}{origin}",
        ]
    )


def describe_failure(step: int, bad_terms: list[str], grad_norm: float, run: Path) -> str:
    """The message of `NonFiniteLoss`: where it arose, what is safe, what to try."""
    where = "not finite: " + "; ".join(bad_terms) if bad_terms else f"finite loss, but gradient norm {grad_norm}"
    last = max(checkpointing.saved_steps(run), default=None)
    kept = "no checkpoint yet" if last is None else f"the checkpoint of step {last} is intact"
    return (
        f"step {step}: {where}; not applied, {kept}; try --mixed-precision bf16, --qk-norm or a lower --learning-rate"
    )


@exits_on_user_error
def main() -> None:
    """The command line: exit code 0 when done, 1 on a loss that is not finite, 2 on a mistake, 143 on a signal."""
    try:
        finished = train(parse_options())
    except NonFiniteLoss as error:
        sys.exit(f"error: {error}" if PartialState().is_main_process else 1)
    if not finished:
        sys.exit(STOPPED_BY_SIGNAL)


if __name__ == "__main__":
    main()
