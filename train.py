"""Train DeepFlow or SiT on packed latents.

    python train.py --data-dir data/imagenet256 --exp-name xl --model DeepFlow-XL/2 --df-idxs 8 16
    accelerate launch --num_processes 8 train.py ...        the same flags, on several GPUs

The same command resumes an interrupted run from its newest checkpoint. One counter, optimizer steps, is behind
everything: data order, noise and times are functions of (seed, step), whatever the number of processes. So a checkpoint
needs no random state, and a resumed run repeats the uninterrupted one, on the CPU bit for bit. SIGTERM or SIGUSR1
finishes the step, saves, and exits with code 143; so does SIGHUP, unless it is ignored (nohup).

    RUN/options.json      options as resolved, architecture, code commit, versions
    RUN/metrics.jsonl     averages over --log-every steps and all processes
    RUN/checkpoints/      see training/checkpointing.py
    RUN/previews/         grids of samples, with --preview-every
    RUN/ema.safetensors   at the end: the averaged weights alone, for generate.py
    RUN/loss.png          at the end: the loss curves
"""

import argparse
import math
import sys
from contextlib import ExitStack, nullcontext
from pathlib import Path
from threading import Event
from typing import NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dataset import DataOrder, DeviceLatents, LatentBatch, latent_batches
from errors import UserError, exits_on_user_error, memory_told
from files import only_writer
from flags import PRECISIONS
from loss import DeepFlowLoss
from models import DeepFlow, checkpoints
from models.ssl_encoders import load_encoder
from models.vae import sample_latents
from processes import join_processes, progress_bar, reported_by_any_process
from training import checkpointing, guard, logging, parallel
from training.ema import EMA, averages
from training.options import parse_options
from training.plan import (
    Plan,
    build_network,
    describe,
    describe_model,
    make_plan,
    measure,
    peak_flops,
    tokens_a_side,
)

STOPPED_BY_SIGNAL = 143  # the exit code of a process that SIGTERM ends


class NonFiniteLoss(ArithmeticError):
    """A loss or gradient is infinite or NaN; the step it belongs to was not applied."""


class Gradients(NamedTuple):
    """A step whose gradients lie in the parameters, not applied yet."""

    sums: Tensor  # of the metrics, over this process's samples
    terms: list[tuple[Tensor, dict[str, Tensor]]]  # sample indices and named per-sample terms of each micro-batch
    loss_scale: float


class Update(NamedTuple):
    """A step that the device may still be at, or may have refused."""

    verdict: guard.Verdict
    terms: list[tuple[Tensor, dict[str, Tensor]]]


@memory_told(guard.LESS_MEMORY)
def train(options: argparse.Namespace) -> bool:
    """Run the training that `options` (of `parse_options`) describe; False if a signal stopped it before its end.

    Raises:
        UserError: for options that contradict each other, the data or the checkpoint, before anything is written;
            or if a checkpoint cannot be written.
        NonFiniteLoss: before the update that it would have spoilt.
    """
    with guard.stop_request() as stop, ExitStack() as held:
        return train_until(options, stop, held)


def train_until(options: argparse.Namespace, stop: Event, held: ExitStack) -> bool:
    """`train`, which ends after the step at which `stop` is set; `held` keeps the run's lock."""
    # ---- 1. Processes, and what there is to do ---------------------------------------------------------------------
    processes = join_processes()
    device, rank, world = processes.device, processes.process_index, processes.num_processes
    is_main, accumulation = processes.is_main_process, options.gradient_accumulation_steps
    plan = make_plan(options, world, device)
    run, data, config, total_steps = plan.run, plan.data, plan.config, plan.total_steps
    saved = checkpointing.load(plan.resume_from, plan.experiment) if plan.resume_from else None
    step = saved.step if saved else 0
    if len(steps := set(gather_object([step]))) > 1:
        raise UserError(
            f"the processes found different checkpoints of {run}, of steps {', '.join(map(str, sorted(steps)))}: "
            "give an --output-dir on a disk that all machines see"
        )
    work = measure(plan, options) if is_main else None
    if is_main:
        print(describe(plan, options, work, world, device, step), flush=True)
    if options.dry_run:
        if plan.missing:
            raise UserError(plan.missing)
        return True
    encoders = load_encoders(options, plan, processes)
    if options.preview_every:
        from training.previews import Previews  # brings a VAE and a feature network: slow to import, seldom wanted

        previews = Previews(options, data, device, rank, world)
    processes.wait_for_everyone()  # all have read the run's folder before one of them changes it
    if is_main:
        held.enter_context(only_writer(run, "--exp-name"))
        if checkpointing.find(run, options.resume, options.resume_step) != plan.resume_from:
            raise UserError(f"{run} has just been changed by another process: give the same command again")
        run.mkdir(parents=True, exist_ok=True)
        logging.write_options(run, vars(options), config)
        logging.truncate_metrics(run, saved.trainer["log"]["logged_step"] if saved else 0, step)
        checkpointing.set_aside_after(run, step)

    # ---- 2. Network, objective, averages, optimizer ----------------------------------------------------------------
    torch.set_float32_matmul_precision("high" if options.allow_tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = options.allow_tf32
    accelerator = logging.make_accelerator(options, run, step)
    network, model, emas = build_models(options, plan, saved, device)
    loss_fn = DeepFlowLoss(
        path_type=options.path_type,
        weighting=options.weighting,
        tg_upper_bound=options.tg_upper_bound,
        scale_weight=options.scale_weight,
        acc_coeff=options.acc_coeff,
        proj_coeff=options.proj_coeff,
        cfg_prob=options.cfg_prob,
    )
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(options, parameters)
    scale = make_loss_scale(options.mixed_precision)
    columns = ["grad_norm", "loss", *(f"velocity_{i + 1}" for i in range(network.num_branches)), "acceleration"]
    columns += ["alignment"] if options.ssl_align else []
    log = logging.MetricLog(columns, step, options.batch_size)
    if saved:
        parallel.load_optimizer(network, optimizer, saved.trainer["optimizer"])
        log.load_state_dict(saved.trainer["log"])
        scale.load_state_dict(saved.trainer["loss_scale"])
        saved = None  # frees a copy of the weights

    # ---- 3. The parts of a step ------------------------------------------------------------------------------------
    order = DataOrder(len(data), options.batch_size, options.seed)
    source = DeviceLatents(data, device) if options.data_on_device else data
    batches = latent_batches(
        source,
        order,
        step,
        rank,
        world,
        options.num_workers,
        accumulation,
        with_images=bool(encoders),
        features=plan.features,
    )
    begun: dict[int, list[LatentBatch]] = {}  # the micro-batches of steps that are not done: one may be tried again
    generator = torch.Generator(device)
    per_process = plan.micro_batch * accumulation
    batch_shape = (options.batch_size, config["in_channels"], config["input_size"], config["input_size"])

    def forward(x: Tensor, t: Tensor, y: Tensor):
        with accelerator.autocast():
            return model(x, t, y)

    def accumulate_gradients(step: int, loss_scale: float) -> Gradients:
        """Add up the gradients of the mean loss over the process's whole batch, averaged over the processes."""
        if step not in begun:
            with reported_by_any_process(rank):
                begun[step] = [next(batches) for _ in range(accumulation)]
        # Noise and times are drawn for the whole global batch, of which each part takes its rows: loss and gradients
        # do not depend on how the batch is divided.
        generator.manual_seed(noise_seed(options.seed, step))
        latent_noise = torch.randn(batch_shape, generator=generator, device=device)
        draws = loss_fn.draw(network.num_branches, batch_shape, generator)
        sums, named_terms = 0, []
        for i, batch in enumerate(begun[step]):
            first = (rank * accumulation + i) * plan.micro_batch
            rows = slice(first, first + plan.micro_batch)
            moments = batch.moments.to(device, non_blocking=True)
            labels = batch.labels.to(device, non_blocking=True)
            x0 = sample_latents(moments, data.scaling_factor, latent_noise[rows])
            features = None
            if options.ssl_align:
                packed = [tokens.to(device, non_blocking=True) for tokens in batch.features or []]
                features = packed or [encoder(batch.images) for encoder in encoders]
            with parallel.averaging(model, wanted=i == accumulation - 1):
                terms = loss_fn.drawn_terms(forward, x0, labels, network.num_classes, draws.rows(rows), features)
                total = loss_fn.total(terms)
                (total.sum() * (loss_scale / per_process)).backward()
            named = {"velocity": terms.velocity, "acceleration": terms.acceleration}
            parts = [total.sum(), *terms.branch_velocity.sum(1), terms.acceleration.sum()]
            if options.ssl_align:
                named["alignment"] = terms.alignment
                parts.append(terms.alignment.sum())
            sums = sums + torch.stack(parts).detach()
            named_terms.append((batch.indices, {name: term.detach() for name, term in named.items()}))
        return Gradients(sums, named_terms, loss_scale)

    def launch_update(step: int, gradients: Gradients) -> Update:
        """Clip, and have the device apply the step if all of its numbers are finite, on all processes."""
        # Gradients are clipped as they are, multiplied by the loss scale; the optimizer's kernel divides by it.
        limit = (options.max_grad_norm or math.inf) * gradients.loss_scale
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
        grad_norm = (grad_norm.full_tensor() if hasattr(grad_norm, "full_tensor") else grad_norm) / gradients.loss_scale
        asked = torch.full((1,), float(stop.is_set()), device=device)
        row = torch.cat([grad_norm.reshape(1), gradients.sums / per_process, asked])
        row = accelerator.reduce(row, "mean")
        optimizer.found_inf = 1 - row.isfinite().all().float()
        optimizer.grad_scale = torch.full((), gradients.loss_scale, device=device)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(options, step, total_steps)
        optimizer.step()
        optimizer.zero_grad()
        return Update(guard.Verdict(row), gradients.terms)

    def write_metrics() -> None:
        entry = log.average(
            step,
            epoch=step * options.batch_size / len(data),
            lr=learning_rate(options, step - 1, total_steps),
            loss_scale=scale.value(),
        )
        if is_main:
            entry["memory_gib"] = logging.memory_gib(device)
            if peak := peak_flops(device, options.mixed_precision):
                entry["mfu"] = 6 * work.macs * entry["images_per_second"] / (world * peak)
            logging.append_metrics(run, entry)
            bar.set_postfix(loss=f"{entry['loss']:.4f}", images_s=f"{entry['images_per_second']:.1f}")
        accelerator.log(entry, step=step)

    def save_checkpoint() -> None:
        trainer = {"optimizer": parallel.whole_optimizer(network, optimizer), "log": log.state_dict()}
        trainer["loss_scale"] = scale.state_dict()
        weights = parallel.whole_weights(network)
        averaged = {name: parallel.whole_weights(ema.model) for name, ema in emas.items()}
        if is_main:
            state = checkpointing.TrainingState(step, plan.experiment, weights, averaged, trainer)
            metadata = describe_model(options, data, step)
            checkpointing.save(run, state, config, metadata, options.keep_last, options.keep_every)
        accelerator.wait_for_everyone()

    def write_preview() -> None:
        scores = previews(next(iter(emas.values())).model, run, step)
        if is_main and scores:
            logging.append_metrics(run, {"step": step, **scores})
        accelerator.log(scores, step=step)

    # ---- 4. The loop -----------------------------------------------------------------------------------------------
    # Each round computes the gradients of one step, then looks at the verdict on the step before, which the device has
    # long reached, then launches the step. So the device always has work, and yet nothing follows a step that failed.
    stopped, update = False, None
    attention = sdpa_kernel([SDPBackend.MATH]) if not options.fused_attn else nullcontext()
    with attention, progress_bar(is_main, total=total_steps, initial=step) as bar:
        while step < total_steps and not stopped:
            ahead = step + (update is not None)
            gradients = accumulate_gradients(ahead, scale.value(ahead - step)) if ahead < total_steps else None

            if update is not None:
                *row, asked = update.verdict.read()
                if not all(map(math.isfinite, row)):
                    bad_terms = gather_object(guard.non_finite_terms(rank, update.terms))
                    if not scale.overflowed() or bad_terms:
                        raise NonFiniteLoss(describe_failure(step, bad_terms, row[0], run))
                    log.skip()
                    optimizer.zero_grad()  # of the step ahead, to be computed once more as well
                    update = None
                    continue
                scale.applied()
                for ema in emas.values():
                    ema.update(network, step + 1)
                del begun[step]
                step, stopped = step + 1, asked > 0
                log.add(row)
                bar.update()
                if step % options.log_every == 0:
                    write_metrics()
                if options.preview_every and (step % options.preview_every == 0 or step == total_steps):
                    with log.pause():
                        write_preview()
                if step % options.checkpointing_steps == 0 or step == total_steps or stopped:
                    with log.pause():
                        save_checkpoint()

            update = launch_update(ahead, gradients) if gradients and not stopped else None

        finished = step >= total_steps
        if finished and log.window:
            write_metrics()

    # ---- 5. The end ------------------------------------------------------------------------------------------------
    averaged = {name: parallel.whole_weights(ema.model) for name, ema in emas.items()} if finished else {}
    if is_main and finished:
        metadata = describe_model(options, data, step)
        for name, file in checkpointing.average_files(averaged).items():
            checkpoints.save(run / file, averaged[name], config, {**metadata, "ema": name})
        curves = logging.plot_losses(run)
        where = f"weights {run / checkpoints.EMA_NAME}{f', loss curves {curves}' if curves else ''}"
        print(f"done after {step} steps: {where}")
    elif is_main:
        again = "the same command without --resume-step" if options.resume_step else "the same command"
        print(f"stopped by a signal and saved at step {step}: {again} goes on from there")
    accelerator.end_training()
    return finished


def load_encoders(options: argparse.Namespace, plan: Plan, processes: PartialState) -> list[nn.Module]:
    """The SSL encoders that look at the images, none where their features are at hand.

    Raises:
        UserError: if their weights cannot be had.
    """
    if not options.ssl_align or plan.features:
        return []
    dtype = PRECISIONS[options.mixed_precision]
    files = options.enc_weights or [None] * len(options.enc_type)
    encoders, mistake = [], None
    with processes.local_main_process_first():  # it downloads what is not in the cache
        try:
            for name, file in zip(options.enc_type, files, strict=True):
                encoders.append(load_encoder(name, tokens_a_side(plan.config), file, processes.device, dtype))
        except UserError as error:  # raised only after the others, who wait for this process, have made it too
            mistake = error
    if mistake:
        raise mistake
    return encoders


def build_models(
    options: argparse.Namespace, plan: Plan, saved: checkpointing.TrainingState | None, device: torch.device
) -> tuple[DeepFlow, nn.Module, dict[str, EMA]]:
    """The network, what computes its gradients on all processes (itself, or DDP around it), and its averages."""
    torch.manual_seed(options.seed)  # the initial weights are the only use of the global generator
    network = build_network(options, plan.data, plan.features)
    network.checkpoint_activations = options.activation_checkpointing
    if saved:
        network.load_state_dict(saved.model)
    if not parallel.is_sharded():  # else seed or file alone make it the same everywhere: no device has to hold all
        parallel.synchronise(network.to(device))  # before anything is copied from it, so that all averages start equal
    emas = averages(network, options.ema_decay, options.ema_std)
    for name, ema in emas.items() if saved else ():
        ema.model.load_state_dict(saved.ema[name])
    if options.compile:
        for block in network.repeated_blocks():
            block.compile()
    if not parallel.is_sharded():
        return network, parallel.replicate(network, device), emas
    for part in (network, *(ema.model for ema in emas.values())):
        parallel.shard(part, device)
    return network, network, emas


def make_optimizer(options: argparse.Namespace, parameters: list[nn.Parameter]) -> torch.optim.AdamW:
    """AdamW as the options say."""
    return torch.optim.AdamW(
        parameters,
        lr=options.learning_rate,
        betas=(options.adam_beta1, options.adam_beta2),
        weight_decay=options.adam_weight_decay,
        eps=options.adam_epsilon,
        fused=True,  # one launch, and the only one that can be told on the device not to update
    )


def make_loss_scale(precision: str) -> guard.LossScale:
    """The loss scale of a precision: only fp16 needs one."""
    return guard.LossScale(dynamic=precision == "fp16")


def noise_seed(seed: int, step: int) -> int:
    """The seed of all that is random in one step: latents, times, noise, dropped labels."""
    return int(np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def learning_rate(options: argparse.Namespace, step: int, total_steps: int) -> float:
    """The rate of the update after `step` steps: constant, or half a cosine from the full rate down to 0."""
    if options.lr_schedule == "constant":
        return options.learning_rate
    return options.learning_rate * 0.5 * (1 + math.cos(math.pi * step / total_steps))


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
    """The command line: exit code 0 when done, 1 on a loss that is not finite, 2 on a mistake, 143 on a signal.

    What all processes agree on, the first one's code tells: a launcher ends the others as soon as one has failed, which
    must not be before the first has said why and finished its reports.
    """
    try:
        finished = train(parse_options())
    except NonFiniteLoss as error:
        sys.exit(f"error: {error}" if PartialState().is_main_process else 0)
    if not finished and PartialState().is_main_process:
        sys.exit(STOPPED_BY_SIGNAL)


if __name__ == "__main__":
    main()
