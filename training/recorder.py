"""The files of a run: lines of metrics, checkpoints and previews while it trains, weights and curves at its end.

All processes call these methods alike, since sharded weights are gathered from all of them; rank 0 writes.
"""

from collections.abc import Callable

from accelerate import Accelerator

from common.errors import UserError
from common.processes import progress_bar
from models import checkpoints
from training import parallel, plots, records, run_state
from training.build import Models
from training.guard import LossScale
from training.optimizer import schedule
from training.plan import Plan, Work, describe_model, peak_flops


class Recorder:
    """Writes into a run's folder.

    Args:
        plan: of the run, with its options.
        work: the cost of an image, on rank 0.
        models: the network and what is saved with it.
        log: the metrics since the last line.
        scale: the loss scale.
        accelerator: with the trackers.
        previews: the function that writes them; None for no previews.

    Attributes: `bar`, the progress bar.
    """

    def __init__(
        self,
        plan: Plan,
        work: Work | None,
        models: Models,
        log: records.MetricLog,
        scale: LossScale,
        accelerator: Accelerator,
        previews: Callable[..., dict[str, float]] | None,
    ) -> None:
        self.plan, self.options, self.work, self.models = plan, plan.options, work, models
        self.log, self.scale, self.accelerator, self.previews = log, scale, accelerator, previews
        self.bar = progress_bar(False)

    def after_step(self, step: int, stopping: bool) -> None:
        """Write what is due after optimizer step `step`; with `stopping`, a checkpoint in any case."""
        options, last = self.options, step == self.plan.total_steps
        self.bar.update()
        if step % options.log_every == 0:
            self.write_metrics(step)
        if self.previews and (step % options.preview_every == 0 or last):
            with self.log.pause():
                self.write_preview(step)
        if step % options.checkpointing_steps == 0 or last or stopping:
            with self.log.pause():
                self.save_checkpoint(step)

    def write_metrics(self, step: int) -> None:
        """A line of `metrics.jsonl`."""
        options, device = self.options, self.accelerator.device
        entry = self.log.average(
            step,
            epoch=step * options.batch_size / len(self.plan.data),
            lr=options.learning_rate * schedule(options.lr_schedule, step - 1, self.plan.total_steps),
            loss_scale=self.scale.value(),
        )
        if self.accelerator.is_main_process:
            entry["memory_gib"] = records.memory_gib(device)
            if peak := peak_flops(device, options.mixed_precision):
                flops = 6 * self.work.macs * entry["images_per_second"]
                entry["mfu"] = flops / (self.accelerator.num_processes * peak)
            records.append_metrics(self.plan.run, entry)
            self.bar.set_postfix(loss=f"{entry['loss']:.4f}", images_s=f"{entry['images_per_second']:.1f}")
        self.accelerator.log(entry, step=step)

    def save_checkpoint(self, step: int) -> None:
        """A checkpoint to resume from."""
        options, models = self.options, self.models
        trainer = {
            "optimizer": parallel.whole_optimizer(models.network, models.optimizer),
            "log": self.log.state_dict(),
            "loss_scale": self.scale.state_dict(),
        }
        weights = parallel.whole_weights(models.network)
        averaged = {name: parallel.whole_weights(ema.model) for name, ema in models.emas.items()}
        if self.accelerator.is_main_process:
            state = run_state.TrainingState(step, self.plan.experiment, weights, averaged, trainer)
            metadata = describe_model(self.plan, step)
            keep = options.keep_last, options.keep_every
            run_state.save(self.plan.run, state, self.plan.config, metadata, *keep)
        self.accelerator.wait_for_everyone()

    def write_preview(self, step: int) -> None:
        """Samples of the average, and their distance to the reference if there is one."""
        scores = self.previews(next(iter(self.models.emas.values())).model, self.plan.run, step)
        if self.accelerator.is_main_process and scores:
            records.append_metrics(self.plan.run, {"step": step, **scores})
        self.accelerator.log(scores, step=step)

    def finish(self, step: int) -> None:
        """The last line of metrics, the averages alone, for `generate.py`, and the loss curves."""
        if self.log.window:  # not earlier: the checkpoint keeps it open, as a longer run needs it
            self.write_metrics(step)
        averaged = {name: parallel.whole_weights(ema.model) for name, ema in self.models.emas.items()}
        if self.accelerator.is_main_process:
            run, metadata = self.plan.run, describe_model(self.plan, step)
            for name, file in run_state.average_files(averaged).items():
                checkpoints.save(run / file, averaged[name], self.plan.config, {**metadata, "ema": name})
            curves = plots.plot_losses(run)
            where = f"weights {run / checkpoints.EMA_NAME}{f', loss curves {curves}' if curves else ''}"
            print(f"done after {step} steps: {where}")


def prepare_folder(plan: Plan, step: int, logged_step: int) -> None:
    """Bring the run's folder to the state of a run at `step`. Only rank 0 calls it, while it holds the run's lock.

    Raises:
        UserError: if another command has changed the folder since the plan was made.
    """
    options = plan.options
    if run_state.find(plan.run, options.resume, options.resume_step) != plan.resume_from:
        raise UserError(f"{plan.run} has just been changed by another process: give the same command again")
    plan.run.mkdir(parents=True, exist_ok=True)
    records.write_options(plan.run, vars(options), plan.config)
    records.truncate_metrics(plan.run, logged_step, step)
    run_state.set_aside_after(plan.run, step)
