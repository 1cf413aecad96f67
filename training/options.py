"""The flags of `train.py`: names and meaning as in the official release, each value checked as it is read."""

import argparse
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from common.errors import OneLineParser, UserError, print_once
from common.flags import PRECISIONS, number, numbers
from common.processes import launcher_setting
from interpolant import PATHS, WEIGHTINGS
from training.optimizer import SCHEDULES

# What, with architecture and data, makes two runs one experiment: a checkpoint continues only under equal values.
EXPERIMENT = (
    "batch_size",
    "seed",
    "path_type",
    "prediction",
    "weighting",
    "cfg_prob",
    "tg_upper_bound",
    "scale_weight",
    "acc_coeff",
    "ema_decay",
    "ema_std",
    "ssl_align",
    "enc_type",
    "proj_coeff",
)


class ResolvedOptions(argparse.Namespace):
    """The options of a run with nothing left open. They can be read, and not be changed."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        vars(self).update(values)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"resolved options cannot be changed: {name}")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"resolved options cannot be changed: {name}")


def build_parser() -> argparse.ArgumentParser:
    """Every flag of `train.py`."""
    parser = OneLineParser(
        description="Train DeepFlow or SiT on packed latents. The same command resumes an interrupted run.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    boolean = argparse.BooleanOptionalAction

    group = parser.add_argument_group("run")
    add = group.add_argument
    add("--exp-name", required=True, help="name of the run; its folder is OUTPUT_DIR/EXP_NAME")
    add("--output-dir", default="runs", help="folder of all runs")
    add("--resume", choices=["auto", "none"], default="auto", help="auto: go on from the run's newest checkpoint")
    add("--resume-step", type=number(int, 1), help="go back to this step's checkpoint, setting later ones "
        "aside; once, and then without this flag")  # fmt: skip
    add("--checkpointing-steps", type=number(int, 1), default=50_000, help="optimizer steps between checkpoints")
    add("--keep-last", type=number(int, 1), help="newest checkpoints to keep (default: all)")
    add("--keep-every", type=number(int, 1), metavar="M", help="with --keep-last: besides, every M-th step's")
    add("--log-every", type=number(int, 1), default=100, help="optimizer steps averaged in a line of metrics.jsonl")
    add("--report-to", choices=["none", "wandb", "tensorboard"], default="none", help="also report metrics there")
    add("--logging-dir", default="logs", help="folder in the run's own for what --report-to keeps on disk")
    add("--dry-run", action="store_true", help="print the resolved run and stop")

    group = parser.add_argument_group("model")
    add = group.add_argument
    add("--model", default="DeepFlow-XL/2", help="DeepFlow or SiT and a size: DeepFlow-B/2, SiT-XL/2, ...")
    add("--trans-depth", type=number(int, 1), help="transformer blocks (default: the size's own)")
    add("--df-idxs", nargs="*", metavar="N", help='blocks after which a branch ends: 8 16 or "[8, 16]" '
        '(default: equal branches; "[]": one branch, which is SiT)')  # fmt: skip
    add("--num-classes", type=number(int, 1), help="classes (default: the dataset's)")
    add("--resolution", type=number(int, 8), help="image side, pixels (default: the dataset's)")
    add("--qk-norm", action=boolean, default=False, help="normalise queries and keys")
    add("--legacy-scaling", action=boolean, default=False, help="clamp the time-gap scale to [-5, 5]")

    add("--fused-attn", action=boolean, default=True, help="fused attention kernels; without: softmax written out")

    group = parser.add_argument_group("data")
    add = group.add_argument
    add("--data-dir", required=True, help="packed latents, or the official release's vae-sd folder or zip")
    add("--data-on-device", action=boolean, default=False, help="keep all latents in the device's memory")
    add("--batch-size", type=number(int, 1), default=256, help="images per optimizer step, over all processes")
    add("--num-workers", type=number(int, 0), default=4, help="threads that read batches ahead, per process")

    group = parser.add_argument_group("objective")
    add = group.add_argument
    add("--path-type", choices=list(PATHS), default="linear", help="path from data to noise")
    add("--prediction", choices=["v"], default="v", help="what the network predicts: only the velocity")
    add("--weighting", choices=list(WEIGHTINGS), default="lognormal", help="distribution of the time")
    add("--cfg-prob", type=number(float, 0, 1), default=0.1, help="probability of dropping a label")
    add("--tg-upper-bound", type=number(float, 0, 1), default=0.01, help="largest time gap between branches")
    add("--scale-weight", nargs="*", metavar="W", help="velocity-loss weight of each branch "
        "(default: 0.2 each, 1.0 for the last)")  # fmt: skip
    add("--acc-coeff", type=number(float, 0), default=1.0, help="weight of the acceleration loss")

    group = parser.add_argument_group("SSL alignment (REPA)")
    add = group.add_argument
    add("--ssl-align", action=boolean, default=False, help="align the tokens after every VeRA block with those of a "
        "frozen image encoder: needs images in the data, or --ssl-features")  # fmt: skip
    add("--enc-type", nargs="*", metavar="NAME", help="encoder or encoders (default: dinov2-vit-b)")
    add("--enc-weights", nargs="*", metavar="FILE", help="a local file of weights for each encoder, or `random` "
        "(default: from the hub or its cache)")  # fmt: skip
    add("--ssl-features", nargs="*", metavar="DIR", help="features that dataset_tools encode-ssl wrote, a folder for "
        "each encoder: neither images nor encoder are needed")  # fmt: skip
    add("--proj-coeff", type=number(float, 0), default=0.5, help="weight of the alignment loss")
    add("--repa-depth", type=number(int, 1), metavar="N", help="in a model of one branch, align after this block, as "
        "REPA does (default: 8)")  # fmt: skip

    group = parser.add_argument_group("optimisation")
    add = group.add_argument
    add("--epochs", type=number(int, 1), default=1400, help="stop after so many passes over the data")
    add("--max-train-steps", type=number(int, 0), default=400_000, help="or after so many optimizer steps; "
        "0 writes the untrained weights")  # fmt: skip
    add("--gradient-accumulation-steps", type=number(int, 1), help="micro-batches per optimizer step "
        "(default: accelerate launch's, else 1)")  # fmt: skip
    add("--learning-rate", type=number(float, 0), default=1e-4, help="AdamW's step size")
    add("--lr-schedule", choices=list(SCHEDULES), default="constant", help="cosine: down to 0 at the end")
    add("--adam-beta1", type=number(float, 0, 1, below=True), default=0.9, help="decay of the first moment")
    add("--adam-beta2", type=number(float, 0, 1, below=True), default=0.999, help="decay of the second moment")
    add("--adam-weight-decay", type=number(float, 0), default=0.0, help="decoupled weight decay")
    add("--adam-epsilon", type=number(float, 0), default=1e-8, help="AdamW's epsilon")
    add("--max-grad-norm", type=number(float, 0), default=1.0, help="clip the gradient's norm; 0: never")
    add("--ema-decay", type=number(float, 0, 1, below=True), nargs="*", default=[0.9999], metavar="D",
        help="decay of the weight average, or several: the first is ema.safetensors")  # fmt: skip
    add("--ema-std", type=number(float, 0.01, 0.28), nargs="*", default=[], metavar="S",
        help="averages of power-function profile too, by their width relative to the run's length")  # fmt: skip
    add("--mixed-precision", choices=list(PRECISIONS), help="precision of the network's forward and backward "
        "(default: accelerate launch's, if bf16 or fp16; else fp16 on a GPU, no on the CPU)")  # fmt: skip
    add("--activation-checkpointing", action=boolean, default=False, help="compute blocks again in the backward "
        "rather than keep their activations: a third more time, a fraction of the memory")  # fmt: skip
    add("--compile", action=boolean, default=False, help="compile each block (torch.compile): slow start, faster steps")
    add("--allow-tf32", action=boolean, default=False, help="TF32 matrix products: faster, less exact")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="seed of weights, data order, times and noise")

    group = parser.add_argument_group("previews")
    add = group.add_argument
    add("--preview-every", type=number(int, 1), metavar="N", help="optimizer steps between grids of samples from the "
        "average, in previews/ (default: none)")  # fmt: skip
    add("--preview-samples", type=number(int, 1), default=40, help="images of a preview")
    add("--preview-cfg-scale", type=number(float, 0), default=1.5, help="classifier-free guidance scale of previews")
    add("--preview-vae", help="VAE that decodes them, a local folder or hub name (default: the data's own)")
    add("--preview-reference", metavar="REF", help="also log the Frechet distance of the previews to these images")
    add("--preview-features", choices=["inception", "demo"], default="inception", help="feature network of that "
        "distance")  # fmt: skip
    add("--preview-feature-weights", metavar="FILE", help="its weights (default: its own, or by download)")
    return parser


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line (None: the process's own).

    Raises:
        UserError: for an unknown flag, or a value that is wrong by itself.
    """
    options = build_parser().parse_args(arguments)
    options.df_idxs = numbers(options.df_idxs, int, "--df-idxs")
    options.scale_weight = numbers(options.scale_weight, float, "--scale-weight")
    if options.scale_weight is not None and not all(0 <= weight < float("inf") for weight in options.scale_weight):
        raise UserError(f"--scale-weight {options.scale_weight} given, expected weights of 0 or more")
    if options.exp_name in {"", ".", ".."} or set(options.exp_name) & set("/\\"):
        raise UserError(f"--exp-name {options.exp_name!r} given, expected the name of one folder")
    try:
        options.exp_name.encode()
    except UnicodeEncodeError:
        raise UserError(f"--exp-name {options.exp_name!a} given, expected text in UTF-8") from None
    resolve_alignment(options)
    resolve_accumulation(options)
    if Path(options.logging_dir).is_absolute() or ".." in Path(options.logging_dir).parts:
        raise UserError(f"--logging-dir {options.logging_dir!r} given, expected a folder inside the run's")
    if not options.ema_decay + options.ema_std:
        raise UserError("--ema-decay without a value and no --ema-std: give at least one average")
    for flag, values in {"--ema-decay": options.ema_decay, "--ema-std": options.ema_std}.items():
        if len({f"{value:g}" for value in values}) < len(values):
            raise UserError(f"{flag} {values} given, expected values that differ in six digits")
    if options.keep_every and not options.keep_last:
        raise UserError(f"--keep-every {options.keep_every} without --keep-last keeps all: give both, or neither")
    if options.preview_reference and not options.preview_every:
        raise UserError("--preview-reference given without --preview-every: say how often to preview")
    if options.report_to != "none" and importlib.util.find_spec(options.report_to) is None:
        raise UserError(
            f"--report-to {options.report_to} given, but it is not installed: pip install {options.report_to}"
        )
    return options


def resolve_accumulation(options: argparse.Namespace) -> None:
    """Fill in the accumulation if it was not given: that of `accelerate launch`, else 1. A line says if both differ.

    Raises:
        UserError: if the setting of `accelerate launch` is not a number of micro-batches.
    """
    given, text = options.gradient_accumulation_steps, launcher_setting("gradient_accumulation_steps")
    try:
        launcher = None if text is None else number(int, 1)(text)
    except argparse.ArgumentTypeError as error:
        raise UserError(f"accelerate launch's gradient_accumulation_steps: {error}") from None
    options.gradient_accumulation_steps = given or launcher or 1
    if launcher not in (None, options.gradient_accumulation_steps):
        print_once(
            f"note: accelerate launch says gradient_accumulation_steps {launcher}, but --gradient-accumulation-steps "
            f"{given} counts"
        )


def resolve_precision(given: str | None, device_type: str) -> str:
    """The precision of `--mixed-precision`; if not given, that of `accelerate launch`, else the device's default.

    `accelerate launch` says "no" where the user chose nothing, so its "no" is not a choice. A line on stderr says so if
    its precision is not the one used.
    """
    launcher, precision = launcher_setting("mixed_precision"), given
    if precision is None:
        usable = launcher in ("bf16", "fp16") and not (launcher == "fp16" and device_type == "cpu")
        precision = launcher if usable else "fp16" if device_type == "cuda" else "no"
    if launcher not in (None, precision):
        whose = "" if given else ", the default on this device,"
        print_once(
            f"note: accelerate launch says mixed_precision {launcher}, but --mixed-precision {precision}{whose} counts"
        )
    return precision


def resolve_alignment(options: argparse.Namespace) -> None:
    """Check the flags of SSL alignment against each other, and split names given as the official release does.

    Raises:
        UserError: for flags that need others, or numbers of encoders, weights and features that differ.
    """
    if not options.ssl_align:
        for flag in ("--enc-weights", "--ssl-features", "--repa-depth"):
            if given := getattr(options, flag[2:].replace("-", "_")):
                raise UserError(f"{flag} {given} given without --ssl-align: add that, or drop {flag}")
        options.enc_type = None  # the official scripts always name one
        return
    names = [name for word in options.enc_type or [] for name in word.split(",") if name]
    options.enc_type = names or (None if options.ssl_features else ["dinov2-vit-b"])
    if options.ssl_features and options.enc_weights:
        raise UserError("--enc-weights and --ssl-features given: features need no encoder, drop one of the two")
    for flag, given in {"--enc-weights": options.enc_weights, "--ssl-features": options.ssl_features}.items():
        if given and options.enc_type and len(given) != len(options.enc_type):
            raise UserError(f"{flag} has {len(given)} entries, --enc-type {len(options.enc_type)}: give one for each")
