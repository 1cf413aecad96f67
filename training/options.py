"""The flags of `train.py`: names and meaning as in the official release, each value checked as it is read."""

import argparse
import importlib.util
from collections.abc import Sequence

from errors import OneLineParser, UserError
from flags import number, numbers

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
)


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
    add("--resume-step", type=number(int, 1), help="go on from this step's checkpoint; later ones are set aside")
    add("--checkpointing-steps", type=number(int, 1), default=50_000, help="optimizer steps between checkpoints")
    add("--keep-last", type=number(int, 1), help="newest checkpoints to keep (default: all)")
    add("--log-every", type=number(int, 1), default=100, help="optimizer steps averaged in a line of metrics.jsonl")
    add("--report-to", choices=["none", "wandb"], default="none", help="also report metrics to this service")
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

    group = parser.add_argument_group("data")
    add = group.add_argument
    add("--data-dir", required=True, help="packed latents, or the official release's vae-sd folder or zip")
    add("--data-on-device", action=boolean, default=False, help="keep all latents in the device's memory")
    add("--batch-size", type=number(int, 1), default=256, help="images per optimizer step, over all processes")
    add("--num-workers", type=number(int, 0), default=4, help="threads that read batches ahead, per process")

    group = parser.add_argument_group("objective")
    add = group.add_argument
    add("--path-type", choices=["linear", "cosine"], default="linear", help="path from data to noise")
    add("--prediction", choices=["v"], default="v", help="what the network predicts: only the velocity")
    add("--weighting", choices=["lognormal", "uniform"], default="lognormal", help="distribution of the time")
    add("--cfg-prob", type=number(float, 0, 1), default=0.1, help="probability of dropping a label")
    add("--tg-upper-bound", type=number(float, 0, 1), default=0.01, help="largest time gap between branches")
    add("--scale-weight", nargs="*", metavar="W", help="velocity-loss weight of each branch "
        "(default: 0.2 each, 1.0 for the last)")  # fmt: skip
    add("--acc-coeff", type=number(float, 0), default=1.0, help="weight of the acceleration loss")

    group = parser.add_argument_group("optimisation")
    add = group.add_argument
    add("--epochs", type=number(int, 1), default=1400, help="stop after so many passes over the data")
    add("--max-train-steps", type=number(int, 0), default=400_000, help="or after so many optimizer steps; "
        "0 writes the untrained weights")  # fmt: skip
    add("--gradient-accumulation-steps", type=number(int, 1), default=1, help="micro-batches per optimizer step")
    add("--learning-rate", type=number(float, 0), default=1e-4, help="AdamW's step size")
    add("--lr-schedule", choices=["constant", "cosine"], default="constant", help="cosine: down to 0 at the end")
    add("--adam-beta1", type=number(float, 0, 1, below=True), default=0.9, help="decay of the first moment")
    add("--adam-beta2", type=number(float, 0, 1, below=True), default=0.999, help="decay of the second moment")
    add("--adam-weight-decay", type=number(float, 0), default=0.0, help="decoupled weight decay")
    add("--adam-epsilon", type=number(float, 0), default=1e-8, help="AdamW's epsilon")
    add("--max-grad-norm", type=number(float, 0), default=1.0, help="clip the gradient's norm; 0: never")
    add("--ema-decay", type=number(float, 0, 1, below=True), default=0.9999, help="decay of the weight average")
    add("--mixed-precision", choices=["no", "fp16", "bf16"], help="precision of the network's forward and backward "
        "(default: fp16 on a GPU, else no)")  # fmt: skip
    add("--allow-tf32", action=boolean, default=False, help="TF32 matrix products: faster, less exact")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="seed of weights, data order, times and noise")
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
    if options.report_to == "wandb" and importlib.util.find_spec("wandb") is None:
        raise UserError("--report-to wandb given, but wandb is not installed: pip install wandb")
    return options
