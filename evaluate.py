"""Score generated images against a reference batch: a table on stdout, and JSON.

    python evaluate.py REF.npz SAMPLES.npz [--json metrics.json]

Both files hold `arr_0`, uint8 images (N, H, W, 3); ADM's reference batches load as they are, with the
statistics stored in them.
"""

import argparse
import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

import torch

from errors import OneLineParser, UserError, exits_on_user_error
from evaluation import ImageArchive, evaluate, load_extractor
from evaluation.features import INCEPTION_SHA256
from evaluation.metrics import check_images
from files import file_sha256, write_text
from processes import usable_device

TITLES = {
    "fid": "FID",
    "frechet_distance": "demo Frechet distance",
    "sfid": "sFID",
    "inception_score": "Inception score",
    "precision": "precision",
    "recall": "recall",
    "kid": "KID",
}
PACKAGES = ("numpy", "scipy", "torch", "torch-fidelity")


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="evaluate.py", description=__doc__.splitlines()[0])
    parser.add_argument("reference", type=Path, metavar="REF.npz", help="reference images or ADM reference batch")
    parser.add_argument("samples", type=Path, metavar="SAMPLES.npz", help="generated images, uint8 N x H x W x 3")
    parser.add_argument(
        "--features",
        default="inception",
        help="feature network: inception (ADM's metrics) or demo (64 px demo data) (default: %(default)s)",
    )
    parser.add_argument(
        "--feature-weights",
        "--inception-weights",
        type=Path,
        metavar="FILE",
        help="local weights (default: Inception from torch's cache or by download, demo from assets/)",
    )
    parser.add_argument("--batch-size", type=int, default=64, help="images per forward pass (default: %(default)s)")
    parser.add_argument(
        "--json", type=Path, metavar="OUT", help="file for metrics and their circumstances (default: none)"
    )
    parser.add_argument("--device", help="torch device (default: cuda if there is one, else cpu)")
    return parser


def report(
    metrics: dict[str, float],
    archives: dict[str, ImageArchive],
    extractor: torch.nn.Module,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """All that is needed to judge or repeat the numbers, as JSON values."""
    return {
        "metrics": metrics,
        **{
            role: {
                "file": str(archive.path),
                "sha256": file_sha256(archive.path),
                "images": len(archive),
                "size": archive.size,
                "stored_statistics": sorted(archive.statistics),
            }
            for role, archive in archives.items()
        },
        "features": {"name": extractor.name, "weights_sha256": extractor.weights_sha256},
        "batch_size": args.batch_size,
        "device": args.device,
        "versions": {
            "python": platform.python_version(),
            **{package: importlib.metadata.version(package) for package in PACKAGES},
        },
    }


@exits_on_user_error
def main() -> None:
    args = build_parser().parse_args()
    if args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size}: expected at least 1")
    if args.json and (args.json.is_dir() or not args.json.absolute().parent.is_dir()):
        raise UserError(f"--json {args.json}: expected a file name in an existing folder")
    args.device = usable_device(args.device)

    archives = {"reference": ImageArchive(args.reference), "samples": ImageArchive(args.samples)}
    extractor = load_extractor(args.features, args.feature_weights, args.device)
    check_images(*archives.values(), extractor)
    if extractor.name == "inception" and extractor.weights_sha256 != INCEPTION_SHA256:
        print("note: these are not the published Inception weights; the numbers compare only with each other")

    metrics = evaluate(*archives.values(), extractor, args.batch_size)

    print(f"{len(archives['samples'])} samples against {args.reference} ({extractor.name} features)")
    for name, value in metrics.items():
        print(f"  {TITLES[name]:<24}{value:.4f}")
    if args.json:
        write_text(args.json, json.dumps(report(metrics, archives, extractor, args), indent=2) + "\n")
        print(f"written to {args.json}")


if __name__ == "__main__":
    main()
