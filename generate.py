"""Checkpoint -> images: an `.npz` of uint8 samples as ADM's evaluator reads it, a grid to look at, and the settings.

    python generate.py --ckpt runs/my-run/ema.safetensors --num-fid-samples 50000 --cfg-scale 1.325
    accelerate launch generate.py ...            # the same images, on all GPUs

The architecture, the path and the VAE are read from the checkpoint. The same command continues an interrupted run.

Image i is a function of the seed and i alone, to the byte, on one kind of device with one version of torch. Matrix
products round differently at other batch shapes, and an adaptive solver's step size is shared by what it solves
together; so images are always made in aligned blocks of one size, which only the architecture and the type of device
decide, whatever the batch size, the number of processes, or which of the images are wanted.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import samplers
from common.errors import UserError, exits_on_user_error, memory_told, spared_by
from common.files import only_writer, write_text
from common.flags import PRECISIONS
from common.processes import join_processes, progress_bar, reported_by_any_process, require_compiler
from generation.conditions import choose_labels, empty_classes
from generation.options import (
    Settings,
    build_parser,
    default_name,
    parse_options,
    read_checkpoint,
    settings_of,
    tell_of_launcher,
)
from generation.pictures import save_grid, save_pngs
from generation.record import describe_machine, describe_sources, read_record, require_same
from generation.sample_file import SampleFile
from models import DeepFlow, checkpoints
from models.autoencoder import (
    SD_VAE,
    check_channels,
    decode,
    load_recorded_vae,
    load_vae,
    portable_name,
    weights_sha256,
)
from models.precision import cast_products

__all__ = ["LabeledImages", "Settings", "build_parser", "choose_labels", "generate", "generate_images", "parse_options"]

VAES = {"ema": SD_VAE, "mse": "stabilityai/sd-vae-ft-mse"}  # the official names of --vae
BLOCK_TOKENS = {"cuda": 8192, "cpu": 256}  # of a network call without guidance; with it, twice as many


class LabeledImages(NamedTuple):
    """A batch of finished images."""

    indices: list[int]  # global image numbers
    labels: Tensor  # (N,) class ids
    images: Tensor  # (N, H, W, 3) uint8, on the CPU


def images_per_block(config: dict[str, Any], device_type: str) -> int:
    """How many images are made together, as one block: block b is images [b C, (b + 1) C)."""
    tokens = (config["input_size"] // config["patch_size"]) ** 2
    return max(1, BLOCK_TOKENS[device_type] // tokens)


def generate_images(
    model: DeepFlow,
    decode_latents: Callable[[Tensor], Tensor],
    labels: np.ndarray,
    settings: Settings,
    indices: Sequence[int],
    batch_size: int,
    guide: DeepFlow | None = None,
) -> Iterator[LabeledImages]:
    """The images with the given global numbers, in ascending order, batch by batch.

    A block is made whole even where only some of its images are wanted: see `images_per_block`. On the CPU, blocks of
    a batch are made side by side, each by one thread: the number of threads changes the rounding too.

    Args:
        model: the network, in evaluation mode, on the device to sample on.
        decode_latents: latents (N, C, h, w) -> uint8 images (N, H, W, 3), N being that of a block.
        labels: class id of every global image number, (total,). If the total ends inside a block, its remaining
            images, which are not returned, get the first labels again.
        settings: sampler, guidance, precision and seed.
        indices: which of the images to make, in any order.
        batch_size: images made and returned together, rounded up to whole blocks; no influence on the images.
        guide: the weaker network of autoguidance, on the same device; None for classifier-free guidance.

    Raises:
        UserError: if samples are not finite.
        IndexError: for an image number without a label.
    """
    wanted = sorted({int(i) for i in indices})
    if wanted and not 0 <= wanted[0] <= wanted[-1] < len(labels):
        raise IndexError(f"images {wanted[0]} to {wanted[-1]} are wanted, but there are {len(labels)} labels")
    device = model.pos_embed.device
    size = images_per_block(model.config, device.type)
    labels = np.resize(labels, math.ceil(len(labels) / size) * size)
    blocks = sorted({i // size for i in wanted})
    at_once = math.ceil(batch_size / size)

    def make(block: int) -> Tensor:
        return make_block(model, decode_latents, labels, settings, range(block * size, (block + 1) * size), guide)

    for first in range(0, len(blocks), at_once):
        group = blocks[first : first + at_once]
        images = torch.cat(single_threaded(make, group) if device.type == "cpu" else [make(block) for block in group])
        numbers = [i for block in group for i in range(block * size, (block + 1) * size)]
        rows = np.flatnonzero(np.isin(numbers, wanted))
        batch = [numbers[row] for row in rows]
        yield LabeledImages(batch, torch.from_numpy(labels[batch]), images[rows])


def make_block(
    model: DeepFlow,
    decode_latents: Callable[[Tensor], Tensor],
    labels: np.ndarray,
    settings: Settings,
    numbers: range,
    guide: DeepFlow | None,
) -> Tensor:
    """The images of one block, (N, H, W, 3) uint8, on the CPU; see `generate_images`."""
    device = model.pos_embed.device
    shape = (model.config["in_channels"], model.config["input_size"], model.config["input_size"])
    y = torch.from_numpy(labels[numbers.start : numbers.stop]).to(device)
    noise = samplers.ImageNoise(settings.seed, numbers, shape)
    interval = (settings.cfg_scale, settings.guidance_low, settings.guidance_high)
    if guide is None:
        velocity = samplers.classifier_free_guidance(velocity_of(model), y, model.num_classes, *interval)
    else:
        velocity = samplers.autoguidance(velocity_of(model), velocity_of(guide), y, *interval)

    def draw(_: int = 0) -> Tensor:
        drawn = noise.draw()  # from pinned memory the copy does not make the host wait for the device
        return drawn.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else drawn

    with torch.inference_mode():
        dtype = PRECISIONS[settings.precision]
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            latents = samplers.sample(
                velocity,
                draw(),
                method=settings.method,
                num_steps=settings.num_steps,
                path_type=settings.path_type,
                step_noise=draw,
                diffusion_form=settings.diffusion_form,
                diffusion_norm=settings.diffusion_norm,
                time_shift=settings.time_shift,
            )
        if not latents.isfinite().all():
            raise UserError("the network's samples are not finite: the checkpoint is of a run that diverged")
        return decode_latents(latents.float()).cpu()


def velocity_of(model: DeepFlow) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """`model.velocity(x, t, y)` for times (N,) on the CPU that are all equal, as samplers hand them over."""

    def velocity(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        # Filled on the device: a copy to it would make the host wait for the device at every call.
        return model.velocity(x, torch.full_like(t, t[0].item(), device=x.device), y)

    return velocity


def single_threaded(make: Callable[[int], Tensor], blocks: Sequence[int]) -> list[Tensor]:
    """`make` of each block, each within one thread, as many at once as torch had threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(min(threads, len(blocks)), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(make, blocks))
    finally:
        torch.set_num_threads(threads)


def load_matching_vae(options: argparse.Namespace, metadata: dict[str, Any], device: torch.device):
    """The VAE that the flags, else the checkpoint, name, and the SHA-256 of its weights.

    Raises:
        UserError: if it cannot be had, or has other weights or another scale than the checkpoint was trained with.
    """
    name = options.vae or metadata.get("vae", "ema")
    if options.vae:
        vae = load_vae(VAES.get(name, name), device)
    else:
        vae = load_recorded_vae(VAES.get(name, name), metadata.get("vae_sha256"), device, "--vae")
    checksum = weights_sha256(vae)
    if metadata.get("vae_sha256") not in (None, checksum):
        raise UserError(f"VAE {name} is not the one {options.ckpt} was trained with: give that one with --vae")
    scaling = metadata.get("scaling_factor", vae.config.scaling_factor)
    if not np.isclose(scaling, vae.config.scaling_factor):
        raise UserError(
            f"VAE {name} scales latents by {vae.config.scaling_factor:.5g}, but {options.ckpt} was trained "
            f"on a scale of {scaling:.5g}: give the VAE of the training data with --vae"
        )
    return vae, checksum


def read_guide(options: argparse.Namespace, checkpoint: checkpoints.Checkpoint) -> checkpoints.Checkpoint | None:
    """The checkpoint of autoguidance, if one is asked for.

    Raises:
        UserError: if it is missing, damaged, or of other latents, classes or another path than the one it guides.
    """
    if not options.autoguidance_ckpt:
        return None
    guide = checkpoints.read(options.autoguidance_ckpt)
    for name in ("in_channels", "input_size", "num_classes"):
        if guide.config[name] != checkpoint.config[name]:
            raise UserError(
                f"--autoguidance-ckpt {options.autoguidance_ckpt} has {name} {guide.config[name]}, but {options.ckpt} "
                f"has {checkpoint.config[name]}: give a checkpoint of the same kind"
            )
    paths = [c.metadata.get("path_type", options.path_type or "linear") for c in (guide, checkpoint)]
    if paths[0] != paths[1]:
        raise UserError(
            f"--autoguidance-ckpt {options.autoguidance_ckpt} was trained on the {paths[0]} path, but {options.ckpt} "
            f"on the {paths[1]} path: give a checkpoint of the same path"
        )
    return guide


@memory_told("lower --per-proc-batch-size, give --precision bf16, or free memory; the same command continues")
def generate(options: argparse.Namespace, approve: Callable[[Path, int], None] | None = None) -> Path:
    """Make the samples that `options` (of `parse_options`) describe, alone or as one of several processes.

    Args:
        options: flags.
        approve: is told the file to be and the images' side before the work, and may refuse by a `UserError`.

    Returns:
        the finished `.npz`, which is there when any process returns.

    Raises:
        UserError: for a checkpoint, VAE or flags that do not fit, before anything is written; for samples that are not
            finite; for a disk that does not take them.
    """
    # ---- 1. What there is to make; nothing is written --------------------------------------------------------------
    checkpoint = read_checkpoint(options)
    settings, metadata, config = settings_of(options, checkpoint.metadata), checkpoint.metadata, checkpoint.config
    guide_checkpoint = read_guide(options, checkpoint)
    process = join_processes()
    device, count = process.device, options.num_fid_samples
    if settings.precision == "fp16" and device.type == "cpu":
        raise UserError("--precision fp16 needs a GPU and this run is on the CPU: choose bf16 or no")
    tell_of_launcher(settings.precision)
    if options.compile:
        require_compiler(device)
    block_size = images_per_block(config, device.type)
    in_blocks = math.ceil(count / block_size) * block_size
    labels = choose_labels(
        options.classes, in_blocks, config["num_classes"], metadata.get("class_counts"), settings.seed
    )
    empty = empty_classes(metadata.get("class_counts"))
    vae, vae_sha256 = load_matching_vae(options, metadata, device)
    check_channels(vae, config["in_channels"], f"the network of {options.ckpt}")
    side = config["input_size"] * 2 ** (len(vae.config.block_out_channels) - 1)
    if options.resolution not in (None, side):
        raise UserError(
            f"--resolution {options.resolution}, but {options.ckpt} makes images of {side} px: drop the flag"
        )
    record = {
        **describe_sources(options, checkpoint, guide_checkpoint),
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
    if approve:
        approve(npz, side)
    samples = SampleFile(npz, (count, side, side, 3), block_size)
    stood = npz.exists()
    made = stood and require_same(record, read_record(npz.with_suffix(".json")), npz, options.overwrite)
    begun = None if made else samples.begun()
    goes_on = begun is not None and require_same(record, begun, samples.part, options.overwrite)
    if not made:
        how = options.compile, settings.precision
        model = prepare_network(checkpoints.build(checkpoint, options.ckpt).to(device), *how)
        guide = guide_checkpoint and checkpoints.build(guide_checkpoint, options.autoguidance_ckpt).to(device)
        guide = guide and prepare_network(guide, *how)
    process.wait_for_everyone()  # all have seen what stands there before one of them changes it

    # ---- 2. The blocks that are missing, each process its share ----------------------------------------------------
    if made:
        if process.is_main_process:
            print("made already with these settings: nothing to do")
    else:
        with only_writer(npz, "--name or --sample-dir") if process.is_main_process else nullcontext():
            if process.is_main_process and (npz.exists(), samples.begun()) != (stood, begun):
                raise UserError(f"{npz} has just been made by another process: give the same command again")
            if process.is_main_process and (not goes_on or samples.is_cut_off()):
                samples.begin(record)
            process.wait_for_everyone()
            mine = samples.indices(samples.missing()[process.process_index :: process.num_processes])
            process.wait_for_everyone()  # all have seen what is missing before one of them makes any of it
            batches = generate_images(
                model, lambda z: decode(vae, z), labels, settings, mine, options.per_proc_batch_size, guide
            )
            with reported_by_any_process(process.process_index), arithmetic(options.tf32):
                write_batches(samples, batches, len(mine), shows_progress=process.is_main_process)
            process.wait_for_everyone()
            if process.is_main_process:
                samples.complete(labels[:count])
                npz.unlink(missing_ok=True)  # never older images beside a newer record
                write_text(npz.with_suffix(".json"), json.dumps(record, indent=2) + "\n")
                samples.publish()
            process.wait_for_everyone()

    # ---- 3. Pictures -----------------------------------------------------------------------------------------------
    samples.use_finished()
    grid = npz.with_suffix(".png")
    if process.is_main_process and options.grid and not (made and grid.exists()):
        with spared_by(str(grid), passing=(OSError,)):
            save_grid(samples.read, labels[:count], metadata.get("class_names") or [], grid)
    if options.png:
        save_pngs(samples, range(process.process_index, count, process.num_processes), npz.with_suffix(""))
        process.wait_for_everyone()
    samples.close()
    return npz


@contextmanager
def arithmetic(tf32: bool) -> Iterator[None]:
    """TF32 matrix products or not, and convolutions that repeat; afterwards as before, for whoever evaluates next."""
    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = cuda.allow_tf32, cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark
    cuda.allow_tf32, cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark = tf32, tf32, True, False
    try:
        yield
    finally:
        cuda.allow_tf32, cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark = before


def prepare_network(model: DeepFlow, compiled: bool, precision: str) -> DeepFlow:
    """A network as it is to sample: weights in the precision of its products, blocks and heads compiled on request."""
    if precision != "no":
        cast_products(model, PRECISIONS[precision])
    if compiled:
        for part in [*model.repeated_blocks(), *model.heads()]:
            part.compile(dynamic=False)
    return model


def write_batches(samples: SampleFile, batches: Iterator[LabeledImages], total: int, shows_progress: bool) -> None:
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
