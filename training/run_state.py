"""Checkpoints from which the same command continues, on the CPU bit for bit.

    RUN/checkpoints/step-0000500/
        model.safetensors    the weights
        ema.safetensors      their average, with the architecture in its metadata: what `generate.py` reads
        ema-NAME.safetensors further averages, if any
        trainer.pt           optimizer and loss-scale state, metrics not yet logged (read with weights_only)
        state.json           step, and the options that define the experiment

A folder of that name is complete: it is written under another name, flushed to the disk, then renamed. Noise, times
and data order are functions of seed and step, so there is no random state to keep. All tensors are whole, by the names
of the weights: what many processes wrote, sharded or not, one may read.
"""

import json
import os
import pickle
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch import Tensor

from common.errors import UserError, first_line
from models import checkpoints

FOLDER = re.compile(r"step-(\d{7,})")
# The errors that reading damaged files raises; the readers' own UserError is a ValueError.
DAMAGE = (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, EOFError, pickle.UnpicklingError)


class TrainingState(NamedTuple):
    """All that a run continues from."""

    step: int  # optimizer steps done
    experiment: dict[str, Any]  # the options that a resumed run must share
    model: dict[str, Tensor]
    ema: dict[str, dict[str, Tensor]]  # averages by name, the main one first
    trainer: dict[str, Any]  # tensors, numbers, strings and containers of them


def folder_of(run: Path, step: int) -> Path:
    """The folder of a step's checkpoint."""
    return run / "checkpoints" / f"step-{step:07d}"


def saved_steps(run: Path) -> list[int]:
    """Steps of the complete checkpoints of a run, ascending."""
    matches = (FOLDER.fullmatch(folder.name) for folder in (run / "checkpoints").glob("step-*"))
    return sorted(int(match[1]) for match in matches if match)


def average_files(names: Iterable[str]) -> dict[str, str]:
    """File names of the averages: the first is the one that `generate.py` looks for in a folder."""
    return {name: f"ema-{name}.safetensors" if i else checkpoints.EMA_NAME for i, name in enumerate(names)}


def save(
    run: Path,
    state: TrainingState,
    config: dict[str, Any],
    metadata: dict[str, Any],
    keep_last: int | None,
    keep_every: int | None = None,
) -> Path:
    """Write a checkpoint, then delete all but the newest `keep_last` (None: keep all) and those of every
    `keep_every`-th step. One process calls it. `config` and `metadata` travel with the averages.

    Raises:
        UserError: if it cannot be written, for example on a full disk; earlier checkpoints are as they were.
    """
    final = folder_of(run, state.step)
    partial = final.with_name(f".partial-{final.name}")
    try:
        for left_by_a_crash in final.parent.glob(".partial-*"):
            shutil.rmtree(left_by_a_crash)
        partial.mkdir(parents=True)
        checkpoints.save(partial / "model.safetensors", state.model, config, metadata)
        for name, file in average_files(state.ema).items():
            checkpoints.save(partial / file, state.ema[name], config, {**metadata, "ema": name})
        torch.save(state.trainer, partial / "trainer.pt")
        summary = {"step": state.step, "averages": list(state.ema), "experiment": state.experiment}
        (partial / "state.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
        for path in [*partial.iterdir(), partial]:
            flush_to_disk(path)
        partial.replace(final)
        flush_to_disk(final.parent)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        newest = f"step {saved_steps(run)[-1]} is intact" if saved_steps(run) else "none was written before"
        raise UserError(
            f"the checkpoint of step {state.step} could not be written to {final.parent} ({error}); {newest}: "
            "free space there and run the same command again"
        ) from error
    for step in saved_steps(run)[: -keep_last if keep_last else 0]:
        if not keep_every or step % keep_every:
            delete(folder_of(run, step))
    return final


def delete(folder: Path) -> None:
    """Remove a checkpoint; at no time is half of it under its name."""
    doomed = folder.with_name(f".partial-{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.replace(doomed)
    shutil.rmtree(doomed)


def flush_to_disk(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load(folder: Path, experiment: Mapping[str, Any]) -> TrainingState:
    """Read a checkpoint folder, tensors on the CPU. Nothing in it is executed.

    Raises:
        UserError: if it belongs to another experiment, with the option and both values, or is damaged.
    """
    with damage_as_user_error(folder):
        summary = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        had = {name: summary["experiment"].get(name) for name in experiment}
    for name, given in experiment.items():
        if had[name] != given:
            raise UserError(
                f"{folder} was made with {name} {had[name]}, now it is {given}: restore it, or choose another "
                "--exp-name"
            )
    with damage_as_user_error(folder):
        return TrainingState(
            step=summary["step"],
            experiment=summary["experiment"],
            model=checkpoints.read(folder / "model.safetensors").weights,
            ema={
                name: checkpoints.read(folder / file).weights
                for name, file in average_files(summary["averages"]).items()
            },
            trainer=torch.load(folder / "trainer.pt", map_location="cpu", weights_only=True, mmap=True),
        )


def common_step(saved: TrainingState | None, run: Path) -> int:
    """The step that all processes resume from, 0 without a checkpoint. Every process has to call it.

    Raises:
        UserError: if the processes found different checkpoints.
    """
    step = saved.step if saved else 0
    if len(steps := set(gather_object([step]))) > 1:
        raise UserError(
            f"the processes found different checkpoints of {run}, of steps {', '.join(map(str, sorted(steps)))}: "
            "give an --output-dir on a disk that all machines see"
        )
    return step


@contextmanager
def damage_as_user_error(folder: Path) -> Iterator[None]:
    """Around the reading of a checkpoint: any error that damaged files cause becomes a `UserError`."""
    try:
        yield
    except DAMAGE as error:
        reason = first_line(error.__cause__ or error)
        raise UserError(
            f"{folder} is damaged ({reason}): delete it, and the run resumes from the one before"
        ) from error


def find(run: Path, resume: str, resume_step: int | None) -> Path | None:
    """The checkpoint to continue from, None to start anew.

    Args:
        run: the run's folder, existing or not.
        resume: `auto` for the newest complete checkpoint, `none` to start at step 0.
        resume_step: an exact step; overrides `resume`.

    Raises:
        UserError: if that step was not saved, or a run would be overwritten: with `none`, or for lack of checkpoints.
    """
    steps = saved_steps(run)
    if resume_step is not None:
        if resume_step not in steps:
            have = ", ".join(map(str, steps)) or "none"
            raise UserError(f"--resume-step {resume_step}, but the checkpoints in {run} are of steps: {have}")
        return folder_of(run, resume_step)
    if resume == "none" and steps:
        raise UserError(f"--resume none, but {run} has checkpoints up to step {steps[-1]}: choose another --exp-name")
    if not steps and (run / checkpoints.EMA_NAME).exists():
        raise UserError(
            f"{run} holds the {checkpoints.EMA_NAME} of a finished run, and no checkpoint to go on from: choose "
            "another --exp-name"
        )
    return folder_of(run, steps[-1]) if steps else None


def set_aside_after(run: Path, step: int) -> None:
    """Move checkpoints later than `step` to `checkpoints/superseded`: a run taken back must not resume from them."""
    for later in (s for s in saved_steps(run) if s > step):
        aside = run / "checkpoints" / "superseded" / folder_of(run, later).name
        aside.parent.mkdir(exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        folder_of(run, later).replace(aside)
