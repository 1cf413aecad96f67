"""Weights & Biases and TensorBoard, through Accelerate."""

import argparse
import inspect
import os
import uuid
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration

from common.files import write_text


def make_accelerator(options: argparse.Namespace, run: Path, step: int) -> Accelerator:
    """Accelerate with the precision and the tracker of the options, which reports the steps after `step`.

    What a tracker keeps on disk goes to `--logging-dir` in the run. Weights & Biases without a login records offline;
    a resumed run continues under its id.
    """
    folder = run / options.logging_dir
    tracker = None if options.report_to == "none" else options.report_to
    accelerator = Accelerator(
        mixed_precision=options.mixed_precision,
        log_with=tracker,
        project_config=ProjectConfiguration(str(run), logging_dir=str(folder)),
    )
    if tracker is None or not accelerator.is_main_process:
        return accelerator
    folder.mkdir(parents=True, exist_ok=True)
    # TensorBoard takes plain values only.
    settings = {k: v if isinstance(v, int | float | str) else str(v) for k, v in vars(options).items()}
    keywords = {"tensorboard": {"purge_step": step}}
    if tracker == "wandb":
        id_file = folder / "wandb-id"
        if not id_file.exists():
            write_text(id_file, uuid.uuid4().hex)
        same = {"id": id_file.read_text(encoding="utf-8"), "resume": "allow"}
        keywords = {"wandb": {"name": options.exp_name, "dir": str(folder), "mode": wandb_mode(), **same}}
    accelerator.init_trackers("deepflow", settings, keywords)
    return accelerator


def wandb_mode() -> str:
    """`WANDB_MODE`, else `online` if Weights & Biases has a login, without a prompt for one."""
    import wandb

    if mode := os.environ.get("WANDB_MODE"):
        return mode
    if "prompt" in inspect.signature(wandb.login).parameters:
        return "online" if wandb.login(prompt=False, verify=False) else "offline"
    return "online" if wandb.api.api_key else "offline"  # of older versions; deprecated in newer ones
