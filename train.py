"""Train DeepFlow or SiT on packed latents.

    python train.py --data-dir data/imagenet256 --exp-name xl --model DeepFlow-XL/2 --df-idxs 8 16
    accelerate launch --num_processes 8 train.py ...        the same flags, on several GPUs

The same command resumes an interrupted run from its newest checkpoint. One counter, optimizer steps, is behind
everything: data order, noise and times are functions of (seed, step), for any number of processes. So a checkpoint
needs no random state, and a resumed run repeats the uninterrupted one, on the CPU bit for bit. SIGTERM or SIGUSR1
finishes the step, saves, and exits with code 143; so does SIGHUP, unless it is ignored (nohup).

    RUN/options.json      options as resolved, architecture, code commit, versions
    RUN/metrics.jsonl     averages over --log-every steps and all processes
    RUN/checkpoints/      see training/run_state.py
    RUN/previews/         grids of samples, with --preview-every
    RUN/ema.safetensors   at the end: the averaged weights alone, for generate.py
    RUN/loss.png          at the end: the loss curves
"""

import argparse
import math
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from threading import Event

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from common.errors import UserError, exits_on_user_error, reports_out_of_memory
from common.files import only_writer
from common.processes import join_processes, progress_bar
from dataset import DataOrder, DeviceLatents, latent_batches
from training import guard, records, run_state, trackers
from training.build import attention_kernels, build_loss, build_loss_scale, build_models, load_encoders, load_previews
from training.optimizer import schedule
from training.options import parse_options
from training.plan import describe, make_plan, measure
from training.recorder import Recorder, prepare_folder
from training.step import TrainingStep

STOPPED_BY_SIGNAL = 143  # the exit code of a process that SIGTERM ends


class NonFiniteLoss(ArithmeticError):
    """A loss or gradient is infinite or NaN; the step it belongs to was not applied."""


@reports_out_of_memory(guard.LESS_MEMORY)
def train(options: argparse.Namespace) -> bool:
    """Run the training that `options` (of `parse_options`) describe.

    Returns:
        False if a signal stopped it before its end.

    Raises:
        UserError: for options that contradict each other, the data or the checkpoint, before anything is written;
            or if a checkpoint cannot be written.
        NonFiniteLoss: before the update, which is then not applied.
    """
    with guard.stop_request() as stop, ExitStack() as run_lock:
        return train_until(stop, options, run_lock)


def train_until(stop: Event, options: argparse.Namespace, run_lock: ExitStack) -> bool:
    """`train`, until its end or until the step at which `stop` is set."""
    # ---- 1. Processes, and what there is to do ---------------------------------------------------------------------
    processes = join_processes()
    rank, world, device = processes.process_index, processes.num_processes, processes.device
    plan = make_plan(options, world, device)
    options = plan.options  # as resolved; nothing changes them from here on
    saved = run_state.load(plan.resume_from, plan.experiment) if plan.resume_from else None
    step = run_state.common_step(saved, plan.run)
    work = measure(plan) if rank == 0 else None
    if rank == 0:
        print(describe(plan, work, world, device, step), flush=True)
    if options.dry_run:
        if plan.missing:
            raise UserError(plan.missing)
        return True
    encoders = load_encoders(plan, processes)
    previews = load_previews(plan, processes)

    # ---- 2. Network, averages, optimizer; the run's folder ---------------------------------------------------------
    torch.set_float32_matmul_precision("high" if options.allow_tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = options.allow_tf32
    models = build_models(plan, saved, device)
    log, scale = records.MetricLog(step, options.batch_size), build_loss_scale(options.mixed_precision)
    if saved:
        log.load_state_dict(saved.trainer["log"], models.network.num_branches)
        scale.load_state_dict(saved.trainer["loss_scale"])
    processes.wait_for_everyone()  # all have read the run's folder before rank 0 changes it
    if rank == 0:
        run_lock.enter_context(only_writer(plan.run, "--exp-name"))
        prepare_folder(plan, step, log.logged_step)
    saved = None  # frees a copy of the weights
    accelerator = trackers.make_accelerator(options, plan.run, step)
    recorder = Recorder(plan, work, models, log, scale, accelerator, previews)

    # ---- 3. Data, and what a step does with it ---------------------------------------------------------------------
    source = DeviceLatents(plan.data, device) if options.data_on_device else plan.data
    order = DataOrder(len(plan.data), options.batch_size, options.seed)
    reading = dict(with_images=bool(encoders), features=plan.features)
    accumulation = options.gradient_accumulation_steps
    batches = latent_batches(source, order, step, rank, world, options.num_workers, accumulation, **reading)
    training_step = TrainingStep(
        models.network,
        build_loss(options),
        models.optimizer,
        batches,
        batch_size=options.batch_size,
        scaling_factor=plan.data.scaling_factor,
        accumulation=accumulation,
        seed=options.seed,
        max_grad_norm=options.max_grad_norm,
        precision=options.mixed_precision,
        encoders=encoders,
        model=models.model,
        rank=rank,
        world=world,
        learning_rate=partial(schedule, options.lr_schedule, total_steps=plan.total_steps),
    )

    # ---- 4. The loop -----------------------------------------------------------------------------------------------
    with attention_kernels(options), progress_bar(rank == 0, total=plan.total_steps, initial=step) as recorder.bar:
        step = run_steps(step, stop, training_step, recorder)

    # ---- 5. The end ------------------------------------------------------------------------------------------------
    finished = step >= plan.total_steps
    if finished:
        recorder.finish(step)
    elif rank == 0:
        again = "the same command without --resume-step" if options.resume_step else "the same command"
        print(f"stopped by a signal and saved at step {step}: {again} goes on from there")
    accelerator.end_training()
    return finished


def run_steps(step: int, stop: Event, training_step: TrainingStep, recorder: Recorder) -> int:
    """Train from `step` to the end of the plan, or to the step at which `stop` is set; the steps done then.

    Each iteration computes the gradients of one step, then reads the outcome of the step before, which the device has
    finished by then, then launches the step. So the device always has work, and no step follows one that failed.
    """
    total_steps, scale, log = recorder.plan.total_steps, recorder.scale, recorder.log
    network, emas = recorder.models.network, recorder.models.emas
    stopped, update = False, None
    while step < total_steps and not stopped:
        ahead = step + (update is not None)
        gradients = training_step.gradients(ahead, scale.value(ahead - step)) if ahead < total_steps else None

        if update is not None:
            numbers, stopped = update.read()
            if not all(map(math.isfinite, numbers.values())):
                bad_terms = gather_object(guard.non_finite_terms(training_step.rank, update.terms))
                if not scale.overflowed() or bad_terms:
                    raise NonFiniteLoss(describe_failure(step, bad_terms, numbers["grad_norm"], recorder.plan.run))
                log.skip()
                training_step.optimizer.zero_grad()  # of the step ahead, which is computed again too
                stopped, update = False, None
                continue
            scale.applied()
            for ema in emas.values():
                ema.update(network, step + 1)
            step += 1
            log.add(numbers)
            recorder.after_step(step, stopped)

        update = training_step.launch(ahead, gradients, stop.is_set()) if gradients and not stopped else None
    return step


def describe_failure(step: int, bad_terms: list[str], grad_norm: float, run: Path) -> str:
    """The message of `NonFiniteLoss`: where it happened, which checkpoint is intact, what to try."""
    where = "not finite: " + "; ".join(bad_terms) if bad_terms else f"finite loss, but gradient norm {grad_norm}"
    last = max(run_state.saved_steps(run), default=None)
    kept = "no checkpoint yet" if last is None else f"the checkpoint of step {last} is intact"
    return (
        f"step {step}: {where}; not applied, {kept}; try --mixed-precision bf16, --qk-norm or a lower --learning-rate"
    )


@exits_on_user_error
def main() -> None:
    """The command line: exit code 0 when done, 1 on a loss that is not finite, 2 on a mistake, 143 on a signal.

    Where all processes fail alike, only rank 0 exits with the code: a launcher ends all processes as soon as one has
    failed, and rank 0 must first print why and finish its reports.
    """
    try:
        finished = train(parse_options())
    except NonFiniteLoss as error:
        sys.exit(f"error: {error}" if PartialState().is_main_process else 0)
    if not finished and PartialState().is_main_process:
        sys.exit(STOPPED_BY_SIGNAL)


if __name__ == "__main__":
    main()
