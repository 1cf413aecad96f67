"""Checkpoint -> images: an `.npz` of uint8 samples as ADM's evaluator reads it, a grid to look at, and the settings.

    python generate.py --ckpt runs/my-run/ema.safetensors --num-fid-samples 50000 --cfg-scale 1.325
    accelerate launch generate.py ...            # the same images, on all GPUs

The architecture, the path and the VAE are read from the checkpoint. The same command continues an interrupted run.
Image i is a function of the seed and i alone: see `generation/images.py`.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from common.errors import UserError, exits_on_user_error, reports_out_of_memory, warn_if_not_drawn
from common.files import only_writer, write_text
from common.processes import join_processes, progress_bar, reported_by_any_process, require_compiler
from generation.checkpoint import default_name, load_matching_vae, read_checkpoint, read_guide
from generation.conditions import choose_labels, empty_classes
from generation.images import GeneratedImages, arithmetic, generate_images, images_per_block, prepare_network
from generation.options import Settings, note_launcher_precision, parse_options, settings_of
from generation.pictures import save_grid, save_pngs
from generation.record import describe_machine, describe_sources, read_record, require_same
from generation.sample_file import SampleFile
from models import DeepFlow, checkpoints
from models.autoencoder import Autoencoder, check_channels, decode, portable_name, reduction


class Job(NamedTuple):
    """Samples to make, checked and resolved; nothing is written yet."""

    checkpoint: checkpoints.Checkpoint
    guide: checkpoints.Checkpoint | None  # of autoguidance
    settings: Settings
    vae: Autoencoder
    labels: np.ndarray  # of all images, to the end of the last block
    side: int  # of the images, pixels
    block_size: int
    record: dict[str, Any]  # of the finished samples
    npz: Path


@reports_out_of_memory("lower --per-proc-batch-size, give --precision bf16, or free memory; the same command continues")
def generate(options: argparse.Namespace, approve: Callable[[Path, int], None] | None = None) -> Path:
    """Make the samples that `options` (of `parse_options`) describe, alone or as one of several processes.

    Args:
        options: flags.
        approve: called before the work with the path of the `.npz` and the images' side; may refuse by a `UserError`.

    Returns:
        the finished `.npz`, which is there when any process returns.

    Raises:
        UserError: for a checkpoint, VAE or flags that do not fit, before anything is written; for samples that are not
            finite; for a disk that does not take them.
    """
    # ---- 1. What there is to make; nothing is written --------------------------------------------------------------
    job = resolve_job(options)
    process, record, npz = join_processes(), job.record, job.npz
    if approve:
        approve(npz, job.side)
    samples = SampleFile(npz, (options.num_fid_samples, job.side, job.side, 3), job.block_size)
    exists, unfinished, continues = npz.exists(), None, False
    finished = exists and require_same(record, read_record(npz.with_suffix(".json")), npz, options.overwrite)
    if not finished:
        unfinished = samples.unfinished_record()
        continues = unfinished is not None and require_same(record, unfinished, samples.part, options.overwrite)
        model, guide = load_networks(options, job, process.device)
    process.wait_for_everyone()  # all have seen which files exist before one of them changes any

    # ---- 2. The blocks that are missing, each process its share ----------------------------------------------------
    if finished:
        if process.is_main_process:
            print("made already with these settings: nothing to do")
    else:
        with only_writer(npz, "--name or --sample-dir") if process.is_main_process else nullcontext():
            if process.is_main_process and (npz.exists(), samples.unfinished_record()) != (exists, unfinished):
                raise UserError(f"{npz} has just been made by another process: give the same command again")
            if process.is_main_process and (not continues or samples.is_truncated()):
                samples.begin(record)
            make_missing_blocks(options, job, samples, model, guide)
            if process.is_main_process:
                samples.complete(job.labels[: options.num_fid_samples])
                npz.unlink(missing_ok=True)  # never older images beside a newer record
                write_text(npz.with_suffix(".json"), json.dumps(record, indent=2) + "\n")
                samples.publish()
            process.wait_for_everyone()

    # ---- 3. Pictures -----------------------------------------------------------------------------------------------
    samples.use_finished()
    write_pictures(options, job, samples, keep_grid=finished)
    samples.close()
    return npz


def resolve_job(options: argparse.Namespace) -> Job:
    """Read the checkpoint and load the VAE; check all flags against them.

    Raises:
        UserError: for a checkpoint, VAE or flags that do not fit.
    """
    checkpoint = read_checkpoint(options)
    settings, metadata, config = settings_of(options, checkpoint.metadata), checkpoint.metadata, checkpoint.config
    guide = read_guide(options, checkpoint)
    device, count = join_processes().device, options.num_fid_samples
    if settings.precision == "fp16" and device.type == "cpu":
        raise UserError("--precision fp16 needs a GPU and this run is on the CPU: choose bf16 or no")
    note_launcher_precision(settings.precision)
    if options.compile:
        require_compiler(device)
    block_size = images_per_block(config, device.type)
    in_blocks = math.ceil(count / block_size) * block_size
    class_counts = metadata.get("class_counts")
    labels = choose_labels(options.classes, in_blocks, config["num_classes"], class_counts, settings.seed)
    empty = empty_classes(class_counts)
    vae, vae_sha256 = load_matching_vae(options, metadata, device)
    check_channels(vae, config["in_channels"], f"the network of {options.ckpt}")
    side = config["input_size"] * reduction(vae)
    if options.resolution not in (None, side):
        raise UserError(
            f"--resolution {options.resolution}, but {options.ckpt} makes images of {side} px: drop the flag"
        )
    record = {
        **describe_sources(options, checkpoint, guide),
        "settings": settings._asdict(),
        "classes": options.classes,
        **({"empty_classes": empty} if empty and options.classes in ("random", "balanced") else {}),
        "images": count,
        "resolution": side,
        "vae": portable_name(str(vae.config._name_or_path)),
        "vae_sha256": vae_sha256,
        **describe_machine(options, device),
        "block_size": block_size,
        "command": options.command,
    }
    npz = options.sample_dir / f"{options.name or default_name(options, settings, metadata)}.npz"
    return Job(checkpoint, guide, settings, vae, labels, side, block_size, record, npz)


def load_networks(options: argparse.Namespace, job: Job, device: torch.device) -> tuple[DeepFlow, DeepFlow | None]:
    """The network and, with autoguidance, its guide, ready to sample on the device."""
    how = options.compile, job.settings.precision
    model = prepare_network(checkpoints.build(job.checkpoint, options.ckpt).to(device), *how)
    if job.guide is None:
        return model, None
    return model, prepare_network(checkpoints.build(job.guide, options.autoguidance_ckpt).to(device), *how)


def make_missing_blocks(
    options: argparse.Namespace, job: Job, samples: SampleFile, model: DeepFlow, guide: DeepFlow | None
) -> None:
    """Make this process's share of the missing blocks; returns when all processes have made theirs.

    Raises:
        UserError: for samples that are not finite, or a disk that does not take them.
    """
    process = join_processes()
    process.wait_for_everyone()  # for the file that rank 0 may have to create
    mine = samples.indices(samples.missing()[process.process_index :: process.num_processes])
    process.wait_for_everyone()  # all have seen what is missing before one of them makes any of it
    batches = generate_images(
        model, lambda z: decode(job.vae, z), job.labels, job.settings, mine, options.per_proc_batch_size, guide
    )
    with reported_by_any_process(process.process_index), arithmetic(options.tf32):
        write_batches(samples, batches, len(mine), shows_progress=process.is_main_process)
    process.wait_for_everyone()


def write_pictures(options: argparse.Namespace, job: Job, samples: SampleFile, keep_grid: bool) -> None:
    """Write the grid, unless `keep_grid` and there is one, and with `--png` every image as a file of its own."""
    process, grid, count = join_processes(), job.npz.with_suffix(".png"), options.num_fid_samples
    if process.is_main_process and options.grid and not (keep_grid and grid.exists()):
        with warn_if_not_drawn(str(grid), reraised=(OSError,)):
            save_grid(samples.read, job.labels[:count], job.checkpoint.metadata.get("class_names") or [], grid)
    if options.png:
        save_pngs(samples, range(process.process_index, count, process.num_processes), job.npz.with_suffix(""))
        process.wait_for_everyone()


def write_batches(samples: SampleFile, batches: Iterator[GeneratedImages], total: int, shows_progress: bool) -> None:
    """Write batches into the file of samples, each while the next is being made."""
    with ThreadPoolExecutor(1) as writer, progress_bar(shows_progress, total=total, unit="image") as bar:
        writing = None
        for batch in batches:
            if writing:
                writing.result()
            writing = writer.submit(samples.write, batch.indices, batch.images.numpy())
            bar.update(len(batch.indices))
        if writing:
            writing.result()
    samples.close()


@exits_on_user_error
def main() -> None:
    """The command line: exit code 0 when the samples are there, 2 on a mistake. The last line names them."""
    options = parse_options()
    npz = generate(options)
    if join_processes().is_main_process:
        print(f"settings: {npz.with_suffix('.json')}\nsamples: {npz}")


if __name__ == "__main__":
    main()
