"""The flags of `generate.py`: names and meaning as in the official release; and the settings they give."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import OneLineParser, UserError, print_once
from common.files import portable_argument
from common.flags import PRECISIONS, number, numbers
from common.processes import launcher_setting
from interpolant import PATHS
from samplers import DIFFUSION_FORMS, SAMPLERS, sde_schedule


class Settings(NamedTuple):
    """The settings that, with the networks, decide an image."""

    method: str = "sde"  # of samplers.SAMPLERS
    num_steps: int = 250
    cfg_scale: float = 1.0
    guidance_low: float = 0.0
    guidance_high: float = 1.0
    path_type: str = "linear"
    seed: int = 0
    diffusion_form: str = "linear"
    diffusion_norm: float = 1.0
    time_shift: float = 1.0
    precision: str = "no"  # no, bf16 or fp16: of the network; the sampler's state is float64


def build_parser() -> argparse.ArgumentParser:
    """Every flag of `generate.py`."""
    parser = OneLineParser(
        prog="generate.py",
        description="Checkpoint -> an .npz of uint8 samples. The same command continues an interrupted run.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    boolean = argparse.BooleanOptionalAction
    solvers = list(dict.fromkeys(map(solver_of, SAMPLERS)))

    group = parser.add_argument_group("what")
    add = group.add_argument
    add("--ckpt", required=True, help="checkpoint: a .safetensors, a folder with ema.safetensors, an official .pt")
    add("--num-fid-samples", type=number(int, 1, 2**40), default=50_000, help="images to make")
    add("--classes", default="random", help="labels: random, data, balanced, or ids to cycle such as 3,7")
    add("--global-seed", type=number(int, 0, 2**64 - 1), default=0, help="seed of labels and noise")
    add("--vae", help="ema, mse, a local folder or a hub name (default: the checkpoint's, else ema)")

    group = parser.add_argument_group("sampler")
    add = group.add_argument
    add("--mode", choices=["sde", "ode"], help="the SDE, or the probability-flow ODE (default: sde; with --heun or "
        "--solver dopri5 alone, ode)")  # fmt: skip
    add("--solver", choices=solvers, help="euler (Euler-Maruyama for the SDE), heun, or for the ODE the adaptive "
        "dopri5 (default: euler)")  # fmt: skip
    add("--heun", action=boolean, default=False, help="the same as --solver heun")
    add("--num-steps", type=number(int, 1), default=250, help="sampling steps; dopri5 chooses its own")
    add("--time-shift", type=number(float, 0), default=1.0, help="bend the time grid by t -> s t / (1 + (s - 1) t): "
        "above 1 more steps near the noise")  # fmt: skip
    add("--diffusion-form", choices=list(DIFFUSION_FORMS), default="linear", help="form of the SDE's noise w(t); "
        "linear is the paper's 2t")  # fmt: skip
    add("--diffusion-norm", type=number(float, 0), default=1.0, help="factor of w(t); `constant` needs 0.04 or less")
    add("--cfg-scale", type=float, default=1.0, help="guidance scale; 1 is none")
    add("--guidance-low", "--guidance_low", type=number(float, 0, 1), default=0.0, help="lowest guided time")
    add("--guidance-high", "--guidance_high", type=number(float, 0, 1), default=1.0, help="highest guided time; "
        "1 is noise")  # fmt: skip
    add("--autoguidance-ckpt", metavar="FILE", help="guide by this weaker checkpoint's conditional velocity in place "
        "of the null class's; --cfg-scale is its scale")  # fmt: skip

    group = parser.add_argument_group("speed")
    add = group.add_argument
    add("--per-proc-batch-size", type=number(int, 1), default=64, help="images made and written together on each "
        "device, rounded up to whole blocks; no influence on the images")  # fmt: skip
    add("--precision", choices=list(PRECISIONS), default="no", help="of matrix products and their weights; no: float32")
    add("--tf32", action=boolean, default=True, help="TF32 matrix products on GPUs that have them")
    add("--compile", action=boolean, default=False, help="compile the transformer blocks")

    group = parser.add_argument_group("results")
    add = group.add_argument
    add("--sample-dir", type=Path, default=Path("samples"), help="folder of the results")
    add("--name", help="name of the results (default: from the checkpoint and the settings)")
    add("--overwrite", action="store_true", help="replace results of that name that were made otherwise")
    add("--grid", action=boolean, default=True, help="write a picture with one row per class")
    add("--png", action=boolean, default=False, help="write the images also into a folder of PNG files")

    group = parser.add_argument_group(
        "architecture", "Read from the checkpoint; these are checked against it, and used where it does not tell."
    )
    add = group.add_argument
    add("--model", help="DeepFlow or SiT and a size: DeepFlow-B/2, SiT-XL/2, ...")
    add("--trans-depth", type=number(int, 1), help="transformer blocks")
    add("--df-idxs", nargs="*", metavar="N", help='blocks after which a branch ends: 8 16 or "[8, 16]"')
    add("--num-classes", type=number(int, 1), help="classes, without the null class")
    add("--resolution", type=number(int, 8), help="image side, pixels")
    add("--path-type", choices=list(PATHS), help="path from data to noise (if nobody tells: linear)")
    add("--legacy-scaling", action=boolean, help="clamp the time-gap scale to [-5, 5] (if nobody tells: no)")
    add("--qk-norm", action=boolean, help="queries and keys are normalised")
    add("--ssl-align", action=boolean, help="the model was trained with SSL alignment")
    add("--projector-embed-dims", metavar="DIMS", help="feature widths of the SSL encoder, such as 768")
    add("--fused-attn", action=boolean, help="taken and without effect: attention is always fused")
    add("--encoder-depth", type=int, help="taken and without effect, as in the official release")
    return parser


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read a command line (None: the process's own) for `generate.generate`.

    The result has, besides the flags, `method` (of `Settings`) and `command`, the line as it was given but for
    places on this machine.

    Raises:
        UserError: for an unknown flag, a value that is wrong by itself, or flags that contradict each other.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = build_parser().parse_args(arguments)
    options.command = shlex.join(["generate.py", *(portable_argument(str(word)) for word in arguments)])
    options.df_idxs = numbers(options.df_idxs, int, "--df-idxs")
    options.method = method_of(options)
    sampler = SAMPLERS[options.method]
    if options.num_steps < sampler.least_steps:
        kind = "SDE" if sampler.stochastic else options.method
        raise UserError(f"--num-steps is {options.num_steps}: give at least {sampler.least_steps} for the {kind}")
    if not sampler.stochastic and (options.diffusion_form != "linear" or options.diffusion_norm != 1):
        raise UserError("--diffusion-form and --diffusion-norm are of the SDE: drop them, or give --mode sde")
    if sampler.adaptive and options.time_shift != 1:
        raise UserError(f"--time-shift with --solver {options.method}, which chooses its own steps: drop one of them")
    if options.time_shift in (0, float("inf")):
        raise UserError(f"--time-shift is {options.time_shift}: give a positive number, 1 for none")
    if not -float("inf") < options.cfg_scale < float("inf"):
        raise UserError(f"--cfg-scale is {options.cfg_scale}: give a number")
    if options.autoguidance_ckpt and options.cfg_scale == 1:
        raise UserError("--autoguidance-ckpt with --cfg-scale 1, which is no guidance: give a scale, such as 2")
    if options.guidance_low > options.guidance_high:
        raise UserError(
            f"--guidance-low {options.guidance_low} and --guidance-high {options.guidance_high}: they must be ordered"
        )
    if options.name is not None and (options.name in ("", ".", "..") or set(options.name) & set("/\\")):
        raise UserError(f"--name {options.name!r}: give a name without folders; --sample-dir is the folder")
    return options


def note_launcher_precision(precision: str) -> None:
    """Print a line if `accelerate launch` names another precision, which has no effect on samples."""
    launcher = launcher_setting("mixed_precision") or "no"
    if launcher not in ("no", precision):
        print_once(f"note: accelerate launch says mixed_precision {launcher}, but --precision {precision} counts here")


def method_of(options: argparse.Namespace) -> str:
    """The sampler that --mode, --solver and --heun mean together; --heun alone is the official release's ODE Heun.

    Raises:
        UserError: if they contradict each other.
    """
    if options.heun and options.solver not in (None, "heun"):
        raise UserError(f"--heun and --solver {options.solver}: drop one of them")
    solver = "heun" if options.heun else options.solver or "euler"
    methods = {
        "sde" if sampler.stochastic else "ode": name for name, sampler in SAMPLERS.items() if solver_of(name) == solver
    }
    mode = options.mode or ("sde" if solver == "euler" or "ode" not in methods else "ode")
    if mode not in methods:
        (other,) = methods
        raise UserError(f"--solver {solver} with --mode {mode}: it solves the {other.upper()}; give --mode {other}")
    return methods[mode]


def solver_of(method: str) -> str:
    """What --solver calls a sampler: an SDE's and an ODE's may share a name, and `sde` alone is Euler-Maruyama."""
    return "euler" if method == "sde" else method.removeprefix("sde-")


def settings_of(options: argparse.Namespace, metadata: dict[str, Any]) -> Settings:
    """The sampler's settings for a checkpoint with that metadata.

    Raises:
        UserError: for a path that is not the checkpoint's, or noise that is too strong for the steps.
    """
    trained_on = metadata.get("path_type", options.path_type or "linear")
    if options.path_type not in (None, trained_on):
        raise UserError(
            f"--path-type {options.path_type}, but {options.ckpt} was trained on the {trained_on} path: drop the flag"
        )
    if SAMPLERS[options.method].stochastic:
        sde_schedule(options.num_steps, trained_on, options.diffusion_form, options.diffusion_norm, options.time_shift)
    return Settings(
        method=options.method,
        num_steps=options.num_steps,
        cfg_scale=options.cfg_scale,
        guidance_low=options.guidance_low,
        guidance_high=options.guidance_high,
        path_type=trained_on,
        seed=options.global_seed,
        diffusion_form=options.diffusion_form,
        diffusion_norm=options.diffusion_norm,
        time_shift=options.time_shift,
        precision=options.precision,
    )
