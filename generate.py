"""Checkpoint -> images: an `.npz` of uint8 samples as ADM's evaluator reads it, a grid to look at, and the settings.

    python generate.py --ckpt runs/my-run/ema.safetensors --num-fid-samples 50000 --cfg-scale 1.325
    accelerate launch generate.py ...            # the same images, on all GPUs

The architecture, the path and the VAE are read from the checkpoint. Image i depends on the seed and i alone (with
dopri5, on its batch too).
"""

import argparse
import json
import math
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm

import samplers
from errors import OneLineParser, UserError, exits_on_user_error
from files import file_sha256, write_text, written_aside
from interpolant import PATHS
from models import DeepFlow, checkpoints
from models.vae import SD_VAE, decode, load_vae, weights_sha256
from processes import join_processes

VAES = {"ema": SD_VAE, "mse": "stabilityai/sd-vae-ft-mse"}  # the official names of --vae


class Settings(NamedTuple):
    """What, besides the network, decides an image."""

    method: str = "sde"  # sde, euler, heun or dopri5
    num_steps: int = 250
    cfg_scale: float = 1.0
    guidance_low: float = 0.0
    guidance_high: float = 1.0
    path_type: str = "linear"
    seed: int = 0


class LabeledImages(NamedTuple):
    """A batch of finished images."""

    indices: list[int]  # global image numbers
    labels: Tensor  # (N,) class ids
    images: Tensor  # (N, H, W, 3) uint8, on the CPU


def generate_images(
    model: DeepFlow,
    decode_latents: Callable[[Tensor], Tensor],
    labels: np.ndarray,
    settings: Settings,
    indices: Sequence[int],
    batch_size: int,
) -> Iterator[LabeledImages]:
    """The images with the given global numbers, batch by batch.

    Args:
        model: the network, in evaluation mode, on the device to sample on.
        decode_latents: latents (N, C, h, w) -> uint8 images (N, H, W, 3).
        labels: class id of every global image number, (total,).
        settings: sampler, guidance and seed.
        indices: which of the images to make.
        batch_size: images sampled at once; no influence on the images beyond the rounding of matrix products, except
            with dopri5, whose step size a batch shares.

    Raises:
        UserError: if samples are not finite.
    """
    device = model.pos_embed.device
    shape = (model.config["in_channels"], model.config["input_size"], model.config["input_size"])
    for first in range(0, len(indices), batch_size):
        batch = list(indices[first : first + batch_size])
        y = torch.from_numpy(labels[batch]).to(device)
        noise = samplers.ImageNoise(settings.seed, batch, shape)
        velocity = samplers.classifier_free_guidance(
            model.velocity,
            y,
            model.num_classes,
            settings.cfg_scale,
            settings.guidance_low,
            settings.guidance_high,
        )
        with torch.inference_mode():
            latents = samplers.sample(
                velocity,
                noise.draw().to(device),
                method=settings.method,
                num_steps=settings.num_steps,
                path_type=settings.path_type,
                step_noise=lambda _, noise=noise: noise.draw(),
            )
            if not latents.isfinite().all():
                raise UserError("the network's samples are not finite: the checkpoint is of a run that diverged")
            yield LabeledImages(batch, y.cpu(), decode_latents(latents.float()).cpu())


def choose_labels(
    classes: str, count: int, num_classes: int, class_counts: Sequence[int] | None, seed: int
) -> np.ndarray:
    """Class ids, (count,), each a function of the seed and the image number.

    Args:
        classes: `random` (uniform), `data` (random, as frequent as in the training data), `balanced` (one class after
            the other), or a list of ids to cycle through.
        count: how many.
        num_classes: the ids are 0 to num_classes - 1.
        class_counts: images of each class in the training data, if known.
        seed: of the random choices.

    Raises:
        UserError: for a list with anything but class ids, and `data` where the counts are not known.
    """
    if classes == "balanced":
        return np.arange(count) % num_classes
    if classes in ("random", "data"):
        if classes == "data" and class_counts is None:
            raise UserError("--classes data: the checkpoint does not tell how frequent its classes are; give random")
        weights = np.ones(num_classes) if classes == "random" else np.asarray(class_counts, dtype=np.float64)
        edges = np.cumsum(weights) / weights.sum()
        # A stream apart from the image's noise: the top word of the counter, which noise never reaches.
        streams = (np.random.Philox(key=[seed, i], counter=[0, 0, 0, 1]) for i in range(count))
        uniforms = np.array([np.random.Generator(stream).random() for stream in streams])
        return np.searchsorted(edges, uniforms, side="right").clip(max=num_classes - 1)
    words = classes.replace(",", " ").split()
    if not words or any(not word.isdecimal() or int(word) >= num_classes for word in words):
        ids = f"class ids in 0..{num_classes - 1} such as 0,{num_classes - 1}"
        raise UserError(f"--classes {classes!r}: give random, data, balanced, or {ids}")
    return np.resize([int(word) for word in words], count)


def pack_npz(rows: Path, labels: np.ndarray, npz: Path) -> None:
    """Turn the `.npy` of images at `rows` into `npz` with `arr_0` (images) and `arr_1` (labels), without loading it."""
    with written_aside(npz) as aside, zipfile.ZipFile(aside, "w", zipfile.ZIP_STORED) as archive:
        archive.write(rows, "arr_0.npy")
        with archive.open("arr_1.npy", "w") as member:
            np.lib.format.write_array(member, labels, allow_pickle=False)
    rows.unlink()


def save_grid(images: np.ndarray, labels: np.ndarray, names: Sequence[str], png: Path, per_class: int = 10) -> None:
    """A picture with one row a class, for up to ten classes: its name and its first images.

    Args:
        images: uint8, (N, H, W, 3); only the rows shown are read.
        labels: class ids, (N,).
        names: class names by id; the id stands in for a missing name.
        png: where to write.
        per_class: images in a row.
    """
    classes = np.unique(labels)[:10]
    rows = [np.flatnonzero(labels == label)[:per_class] for label in classes]
    side, text_width = images.shape[1], 150
    picture = Image.new("RGB", (text_width + side * max(map(len, rows)), side * len(rows)), "white")
    draw = ImageDraw.Draw(picture)
    for row, (label, members) in enumerate(zip(classes, rows, strict=True)):
        name = names[label] if label < len(names) else f"class {label}"
        draw.text((6, row * side + side // 2), name, fill="black", anchor="lm")
        for column, i in enumerate(members):
            picture.paste(Image.fromarray(images[i]), (text_width + column * side, row * side))
    with written_aside(png) as aside:
        picture.save(aside, format="png")


def build_parser() -> argparse.ArgumentParser:
    """The command line; names and meanings are the official release's."""
    parser = OneLineParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add, boolean = parser.add_argument, argparse.BooleanOptionalAction
    add("--ckpt", required=True, help="checkpoint: a .safetensors, a folder with ema.safetensors, an official .pt")
    add("--num-fid-samples", type=int, default=50_000, help="images to make")
    add("--per-proc-batch-size", type=int, default=64, help="images sampled at once on each device")
    add("--classes", default="random", help="labels: random, data, balanced, or ids to cycle such as 3,7")
    add("--mode", choices=["sde", "ode"], default="sde", help="sampler: Euler-Maruyama, or the probability-flow ODE")
    add("--solver", choices=["euler", "heun", "dopri5"], default="euler", help="solver of --mode ode")
    add("--heun", action="store_true", help="the same as --solver heun")
    add("--num-steps", type=int, default=250, help="sampling steps; dopri5 chooses its own")
    add("--cfg-scale", type=float, default=1.0, help="classifier-free guidance scale; 1 is none")
    add("--guidance-low", type=float, default=0.0, help="lowest guided time, in [0, 1]")
    add("--guidance-high", type=float, default=1.0, help="highest guided time, in [0, 1]; 1 is noise")
    add("--path-type", choices=list(PATHS), help="path of the checkpoint, if it does not tell (default: linear)")
    add("--resolution", type=int, help="image side in pixels, checked against the checkpoint")
    add("--vae", help="ema, mse, a local folder or a hub name (default: the checkpoint's, else ema)")
    add("--global-seed", type=int, default=0, help="seed of labels and noise, below 2^64")
    add("--tf32", action=boolean, default=True, help="TF32 matrix products on GPUs that have them")
    add("--sample-dir", type=Path, default=Path("samples"), help="folder of the results")
    add("--name", help="name of the results (default: from the checkpoint and the settings)")
    add("--overwrite", action="store_true", help="replace results of that name that were made otherwise")
    return parser


def settings_of(args: argparse.Namespace, metadata: dict[str, Any]) -> Settings:
    """The sampler's settings, checked.

    Raises:
        UserError: for values out of range, and a path that is not the checkpoint's.
    """
    if args.heun:
        args.mode, args.solver = "ode", "heun"
    for flag, value, low in [
        ("--num-fid-samples", args.num_fid_samples, 1),
        ("--per-proc-batch-size", args.per_proc_batch_size, 1),
        ("--num-steps", args.num_steps, 2 if args.mode == "sde" else 1),
        ("--global-seed", args.global_seed, 0),
    ]:
        if not low <= value < 2**64:
            raise UserError(f"{flag} is {value}: give at least {low}, below 2^64")
    if not math.isfinite(args.cfg_scale):
        raise UserError(f"--cfg-scale is {args.cfg_scale}: give a number")
    if args.name is not None and set(args.name) & set("/\\"):
        raise UserError(f"--name {args.name!r}: give a name without folders; --sample-dir is the folder")
    if not 0 <= args.guidance_low <= args.guidance_high <= 1:
        raise UserError(
            f"--guidance-low {args.guidance_low} and --guidance-high {args.guidance_high}: "
            "they must be ordered and lie in [0, 1]"
        )
    trained_on = metadata.get("path_type", args.path_type or "linear")
    if args.path_type not in (None, trained_on):
        raise UserError(
            f"--path-type {args.path_type}, but {args.ckpt} was trained on the {trained_on} path: drop the flag"
        )
    return Settings(
        method="sde" if args.mode == "sde" else args.solver,
        num_steps=args.num_steps,
        cfg_scale=args.cfg_scale,
        guidance_low=args.guidance_low,
        guidance_high=args.guidance_high,
        path_type=trained_on,
        seed=args.global_seed,
    )


def load_matching_vae(args: argparse.Namespace, metadata: dict[str, Any], device: torch.device):  # noqa: ANN201
    """The VAE that the flags, else the checkpoint, name, and the SHA-256 of its weights.

    Raises:
        UserError: if it cannot be had, or has other weights or another scale than the checkpoint was trained with.
    """
    name = args.vae or metadata.get("vae", "ema")
    vae = load_vae(VAES.get(name, name), device)
    checksum = weights_sha256(vae)
    if metadata.get("vae_sha256") not in (None, checksum):
        raise UserError(f"VAE {name} is not the one {args.ckpt} was trained with: give that one with --vae")
    scaling = metadata.get("scaling_factor", vae.config.scaling_factor)
    if not np.isclose(scaling, vae.config.scaling_factor):
        raise UserError(
            f"VAE {name} scales latents by {vae.config.scaling_factor:.5g}, but {args.ckpt} was trained "
            f"on a scale of {scaling:.5g}: give the VAE of the training data with --vae"
        )
    return vae, checksum


def require_same(record: dict[str, Any], made: Path, overwrite: bool) -> bool:
    """Whether results stand already under a record equal to `record`, so that nothing is left to do.

    Raises:
        UserError: if other results stand there and may not be replaced, naming the first difference.
    """
    npz = made.with_suffix(".npz")
    if not npz.exists():
        return False
    try:
        found = json.loads(made.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = {}
    different = [key for key in record if found.get(key) != record[key]]
    if different and not overwrite:
        key = different[0]
        raise UserError(
            f"{npz} was made with {key} {found.get(key, 'unknown')}, now it is {record[key]}: "
            "choose another --name, or --overwrite"
        )
    return not different


def default_name(args: argparse.Namespace, settings: Settings, metadata: dict[str, Any]) -> str:
    """A file name that tells the results of one checkpoint apart."""
    path = checkpoints.file_of(args.ckpt).resolve()
    folders = [folder.name for folder in path.parents if folder.name != "checkpoints" and folder.name[:5] != "step-"]
    run = folders[0] if path.name == checkpoints.EMA_NAME else path.stem
    steps = "" if settings.method == "dopri5" else f"{settings.num_steps}"
    parts = [run, f"step{metadata['step']}" if "step" in metadata else "", settings.method + steps]
    if settings.cfg_scale != 1:
        parts.append(f"cfg{settings.cfg_scale:g}-from{settings.guidance_low:g}-to{settings.guidance_high:g}")
    parts += [args.classes.replace(",", "+").replace(" ", "+"), f"n{args.num_fid_samples}", f"seed{settings.seed}"]
    return "-".join(part for part in parts if part)


def parse_options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    return build_parser().parse_args(argv)


def generate(args: argparse.Namespace) -> Path:
    checkpoint = checkpoints.read(args.ckpt)
    settings = settings_of(args, checkpoint.metadata)
    num_classes, class_counts = checkpoint.config["num_classes"], checkpoint.metadata.get("class_counts")
    labels = choose_labels(args.classes, args.num_fid_samples, num_classes, class_counts, settings.seed)
    npz = args.sample_dir / f"{args.name or default_name(args, settings, checkpoint.metadata)}.npz"

    process = join_processes()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.tf32
    vae, vae_sha256 = load_matching_vae(args, checkpoint.metadata, process.device)
    side = checkpoint.config["input_size"] * 2 ** (len(vae.config.block_out_channels) - 1)
    if args.resolution not in (None, side):
        raise UserError(f"--resolution {args.resolution}, but {args.ckpt} makes images of {side} px: drop the flag")
    record = {
        "checkpoint": str(args.ckpt),
        "checkpoint_sha256": file_sha256(checkpoints.file_of(args.ckpt)),
        "checkpoint_metadata": checkpoint.metadata,
        "architecture": checkpoint.config,
        "settings": settings._asdict(),
        "classes": args.classes,
        "images": args.num_fid_samples,
        "vae": vae.config._name_or_path,
        "vae_sha256": vae_sha256,
        "torch": torch.__version__,
    }
    if require_same(record, npz.with_suffix(".json"), args.overwrite):
        if process.is_main_process:
            print(f"made already with these settings: nothing to do\nsamples: {npz}")
        return npz
    model = checkpoints.build(checkpoint, args.ckpt).to(process.device)

    # Each process writes its images straight into their rows of one file on disk: no process holds them all.
    rows = npz.with_suffix(".npy.part")
    if process.is_main_process:
        args.sample_dir.mkdir(parents=True, exist_ok=True)
        shape = (args.num_fid_samples, side, side, 3)
        np.lib.format.open_memmap(rows, mode="w+", dtype=np.uint8, shape=shape).flush()
    process.wait_for_everyone()
    images = np.lib.format.open_memmap(rows, mode="r+")
    mine = range(process.process_index, args.num_fid_samples, process.num_processes)
    with tqdm(total=len(mine), unit="image", disable=not process.is_main_process) as bar:
        for batch in generate_images(model, lambda z: decode(vae, z), labels, settings, mine, args.per_proc_batch_size):
            images[batch.indices] = batch.images.numpy()
            bar.update(len(batch.indices))
    images.flush()
    process.wait_for_everyone()

    if process.is_main_process:
        save_grid(images, labels, checkpoint.metadata.get("class_names", []), npz.with_suffix(".png"))
        npz.unlink(missing_ok=True)  # never older images beside a newer record
        write_text(npz.with_suffix(".json"), json.dumps(record, indent=2) + "\n")
        pack_npz(rows, labels, npz)
        print(f"grid {npz.with_suffix('.png')}, settings {npz.with_suffix('.json')}\nsamples: {npz}")
    process.wait_for_everyone()
    return npz


@exits_on_user_error
def main() -> None:
    generate(parse_options())


if __name__ == "__main__":
    main()
