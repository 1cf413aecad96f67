"""Score generated images against a reference batch: a table on stdout, and JSON.

    python evaluate.py REF.npz SAMPLES.npz [--json metrics.json]
    python evaluate.py REF.npz CHECKPOINT [--json metrics.json] [flags of generate.py]
    accelerate launch evaluate.py ...            # the same numbers, on all GPUs

The `.npz` files hold `arr_0`, uint8 images (N, H, W, 3); ADM's reference batches work unchanged, with their stored
statistics. Either may also be an `.npy` of such images or a folder of image files of one size. A checkpoint, a file or
the folder of a run, is sampled first, as by generate.py.
"""

import argparse
import importlib.metadata
import json
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

import generate
from common.errors import OneLineParser, UserError, exits_on_user_error, reports_out_of_memory
from common.files import portable, portable_argument, write_text
from common.processes import join_processes, usable_device
from evaluation import compare, extract, load_extractor, open_images
from evaluation.archives import ImageSource
from evaluation.extraction import check_count, check_images, check_reference, check_size
from evaluation.features import INCEPTION_SHA256
from evaluation.metrics import METRICS

PACKAGES = ("accelerate", "numpy", "pillow", "scipy", "timm", "torch", "torch-fidelity")
DINOV2_REFERENCE = 50_000  # training images in the reference of published values
CHECKPOINTS = (".safetensors", ".pt", ".pth", ".ckpt")


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="evaluate.py",
        description=__doc__.splitlines()[0],
        epilog="With a checkpoint, all flags of generate.py are taken as well, after the two files.",
    )
    parser.add_argument(
        "reference",
        type=Path,
        metavar="REF",
        help="reference: an ADM batch or other .npz of images, an .npy, or a folder of images",
    )
    parser.add_argument(
        "samples",
        type=Path,
        metavar="SAMPLES",
        help="generated images, uint8 N x H x W x 3, an .npz, .npy or folder of images; or a checkpoint, a file or run "
        "folder, to be sampled first",
    )
    parser.add_argument(
        "--features",
        default="inception",
        help="feature network: inception (ADM's metrics), dinov2 (FD-DINOv2; a reference of training images, "
        "50,000 in its paper) or demo (64 px demo data) (default: %(default)s)",
    )
    parser.add_argument(
        "--feature-weights",
        "--inception-weights",
        type=Path,
        metavar="FILE",
        help="local weights (default: Inception and DINOv2 from the cache or by download, demo from assets/)",
    )
    parser.add_argument("--batch-size", type=int, default=64, help="images per forward pass (default: %(default)s)")
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="folder where features are kept, by the SHA-256 of images and weights: a reference is then read once "
        "(default: none)",
    )
    parser.add_argument(
        "--json", type=Path, metavar="OUT", help="file for metrics and how they were computed (default: none)"
    )
    parser.add_argument(
        "--device",
        help="torch device of the feature network, with one process (default: cuda if there is one, else cpu)",
    )
    return parser


def is_checkpoint(path: Path) -> bool:
    """Whether a path names a network to sample instead of samples: a file of weights, or a run, finished or not."""
    if path.is_dir():
        return any((path / name).exists() for name in (generate.checkpoints.EMA_NAME, "options.json", "checkpoints"))
    return path.suffix in CHECKPOINTS


def notes_on(reference: ImageSource, extractor: torch.nn.Module) -> list[str]:
    """Reasons why the numbers cannot be compared with published ones."""
    notes = []
    if extractor.name == "inception" and extractor.weights_sha256 != INCEPTION_SHA256:
        notes.append("these are not the published Inception weights; the numbers compare only with each other")
    if len(reference) == 0:
        notes.append("the reference holds statistics alone, no images: no precision, recall and KID")
    if extractor.name == "dinov2" and len(reference) < DINOV2_REFERENCE:
        notes.append(
            f"published FD-DINOv2 is against {DINOV2_REFERENCE} training images, this reference holds "
            f"{len(reference)}: the numbers compare only with each other"
        )
    return notes


def recipe_path(samples: Path) -> Path:
    """The record that generate.py writes beside samples, which are a file or the folder of PNG files beside it."""
    samples = samples.resolve() if samples.is_dir() else samples.absolute()
    return samples.parent / f"{samples.name if samples.is_dir() else samples.stem}.json"


def refuse_to_replace_recipe(json_path: Path | None, samples: Path) -> None:
    """Raise `UserError` if the metrics would overwrite the record that generate.py wrote of the samples."""
    if json_path and json_path.resolve() == recipe_path(samples).resolve():
        raise UserError(f"--json {json_path}: generate.py's record of the samples is there; give another name")


def recipe_of(samples: Path) -> dict[str, Any] | None:
    """The record that generate.py wrote beside the samples; None if there is none."""
    try:
        return json.loads(recipe_path(samples).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def report(
    metrics: dict[str, float],
    archives: dict[str, ImageSource],
    extractor: torch.nn.Module,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """What is needed to judge or repeat the numbers, as JSON values, without folders of this machine."""
    return {
        "metrics": metrics,
        **{
            role: {
                "file": portable(archive.path, 2),
                "sha256": archive.sha256,
                "images": len(archive),
                "size": archive.size,
                "stored_statistics": sorted(archive.statistics),
            }
            for role, archive in archives.items()
        },
        "recipe": recipe_of(archives["samples"].path),
        "notes": notes_on(archives["reference"], extractor),
        "features": {"name": extractor.name, "weights_sha256": extractor.weights_sha256},
        "batch_size": args.batch_size,
        "device": str(args.device),
        "command": shlex.join(["evaluate.py", *map(portable_argument, sys.argv[1:])]),
        "versions": {
            "python": platform.python_version(),
            **{package: importlib.metadata.version(package) for package in PACKAGES},
        },
    }


@exits_on_user_error
@reports_out_of_memory("lower --batch-size, or free memory")
def main() -> None:
    args, more = build_parser().parse_known_args()
    if args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size}: expected at least 1")
    if args.json and (args.json.is_dir() or not args.json.absolute().parent.is_dir()):
        raise UserError(f"--json {args.json}: expected a file name in an existing folder")
    if args.cache and args.cache.exists() and not args.cache.is_dir():
        raise UserError(f"--cache {args.cache}: expected a folder")
    options = None
    if is_checkpoint(args.samples):
        options = generate.parse_options([*more, "--ckpt", str(args.samples)])
    elif more:
        raise UserError(f"unrecognized arguments: {' '.join(more)} (--help lists the flags)")
    process = join_processes()
    if args.device and process.num_processes > 1:
        raise UserError(f"--device {args.device} with {process.num_processes} processes: drop it, each has its own")
    args.device = usable_device(args.device) if args.device else process.device

    # All mistakes that can be found before the work of sampling are reported here.
    reference = open_images(args.reference)
    samples = None if options else open_images(args.samples)
    with process.local_main_process_first():  # one download per machine
        extractor = load_extractor(args.features, args.feature_weights, args.device)
    if options:
        check_reference(reference, extractor)
        check_count("--num-fid-samples", options.num_fid_samples, extractor)

        def approve(npz: Path, side: int) -> None:
            refuse_to_replace_recipe(args.json, npz)
            check_size(reference, (side, side))

        samples = open_images(generate.generate(options, approve))
    refuse_to_replace_recipe(args.json, samples.path)
    check_images(reference, samples, extractor)

    work = {"batch_size": args.batch_size, "process": process, "cache": args.cache}
    features = [
        extract(images, extractor, label=label, **work)
        for label, images in (("reference", reference), ("samples", samples))
    ]
    if process.num_processes > 1:  # rank 0 does the rest; the others end without waiting
        process.wait_for_everyone()
        torch.distributed.destroy_process_group()
    if not process.is_main_process:
        return
    metrics = compare(*features, extractor.name, args.device, progress=True)

    for note in notes_on(reference, extractor):
        print(f"note: {note}")
    print(f"{len(samples)} samples against {args.reference} ({extractor.name} features)")
    for name, value in metrics.items():
        print(f"  {METRICS[name].title:<24}{value:.4f}")
    if args.json:
        archives = {"reference": reference, "samples": samples}
        write_text(args.json, json.dumps(report(metrics, archives, extractor, args), indent=2) + "\n")
        print(f"written to {args.json}")


if __name__ == "__main__":
    main()
