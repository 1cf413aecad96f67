"""Make, describe and check datasets: images, packed latents (`storage/packed.py`) and features (`storage/features.py`).

    python -m preprocessing.dataset_tools convert --source ILSVRC2012_img_train.tar --dest IMAGES --resolution 256x256
    python -m preprocessing.dataset_tools encode --source IMAGES --dest OUT --vae stabilityai/sd-vae-ft-ema
    accelerate launch -m preprocessing.dataset_tools encode --source IMAGES --dest OUT --vae LOCAL --flip
    python -m preprocessing.dataset_tools encode-ssl --source IMAGES --dest FEATURES --encoder dinov2-vit-b
    python -m preprocessing.dataset_tools pack --source vae-sd --dest OUT
    python -m preprocessing.dataset_tools verify OUT
    python -m preprocessing.dataset_tools info OUT
    python -m preprocessing.dataset_tools stats --source IMAGES --dest REFERENCE.npz --feature-weights INCEPTION.pth

Every command may be killed and given again: it continues. `encode` takes square RGB images of one size, in class
folders or with REPA's `dataset.json` ({"labels": [["folder/image.png", 3], ...]}, optionally "class_names": [...]).
"""

import argparse
import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `python preprocessing/dataset_tools.py`, as in REPA

from common.errors import OneLineParser, UserError, exits_on_user_error, reports_out_of_memory
from common.flags import PRECISIONS
from common.processes import usable_device
from common.sd_vae import SD_VAE
from evaluation.features import load_extractor
from preprocessing.convert import convert, describe
from preprocessing.encode import encode
from preprocessing.encode_ssl import encode_ssl
from preprocessing.images import list_images
from preprocessing.pack import pack
from preprocessing.pixels import TRANSFORMS
from preprocessing.stats import write_reference
from preprocessing.verify import info, verify


def _add_convert(commands: argparse._SubParsersAction) -> None:
    parse = commands.add_parser("convert", help="images of any kind and size -> square RGB images of one size")
    parse.add_argument("--source", required=True, help="folder, zip or tar of images, by class or with dataset.json")
    parse.add_argument("--dest", required=True, help="folder or .zip to be made")
    parse.add_argument("--resolution", required=True, type=_square, help="pixels, such as 256x256")
    parse.add_argument(
        "--transform", choices=list(TRANSFORMS), default="center-crop-dhariwal", help="crop (default: %(default)s)"
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    _add_num_workers(parse, "processes that convert", cores)
    parse.set_defaults(run=_run_convert)


def _run_convert(args: argparse.Namespace) -> None:
    report = convert(args.source, args.dest, args.resolution, args.transform, args.num_workers)
    print(describe(report, args.dest) if report else f"{args.dest} is complete: nothing to do")


def _square(text: str) -> int:
    size = re.fullmatch(r"([1-9]\d*)x\1", text)
    if not size:
        raise argparse.ArgumentTypeError(f"{text} given, expected a square such as 256x256")
    return int(size[1])


def _add_encode(commands: argparse._SubParsersAction) -> None:
    parse = commands.add_parser("encode", help="images -> packed VAE moments")
    parse.add_argument("--source", required=True, help="folder or zip of square RGB images of one size, by class")
    parse.add_argument("--dest", required=True, help="folder of the packed dataset, to be made")
    parse.add_argument("--vae", required=True, help="AutoencoderKL: local folder or hub name")
    parse.add_argument("--images", action="store_true", help="store the images too, as pixels (default: no)")
    _add_encoding(parse, "moments", "the VAE")
    parse.set_defaults(run=_run_encode)


def _run_encode(args: argparse.Namespace) -> None:
    encode(
        args.source,
        args.dest,
        args.vae,
        args.dtype,
        args.batch_size,
        usable_device(args.device),
        args.num_workers,
        args.flip,
        args.images,
    )


def _add_encode_ssl(commands: argparse._SubParsersAction) -> None:
    parse = commands.add_parser("encode-ssl", help="images -> packed features of an SSL encoder")
    parse.add_argument("--source", required=True, help="folder or zip of images, or packed latents with --images")
    parse.add_argument("--dest", required=True, help="folder of the packed features, to be made")
    parse.add_argument(
        "--encoder", default="dinov2-vit-b", help="dinov2-vit-b, mae-vit-l, ... or timm:NAME (default: %(default)s)"
    )
    parse.add_argument(
        "--weights", metavar="FILE", help="its weights from a local file, or random (default: from the hub's cache)"
    )
    parse.add_argument("--tokens", type=_positive, help="tokens per side (default: half a side of the latents)")
    parse.add_argument(
        "--mixed-precision", choices=list(PRECISIONS), default="no", help="precision of the encoder (default: no)"
    )
    _add_encoding(parse, "features", "the encoder")
    parse.set_defaults(run=_run_encode_ssl)


def _run_encode_ssl(args: argparse.Namespace) -> None:
    encode_ssl(
        args.source,
        args.dest,
        args.encoder,
        args.weights,
        args.dtype,
        args.batch_size,
        usable_device(args.device),
        args.num_workers,
        args.flip,
        args.tokens,
        args.mixed_precision,
    )


def _add_pack(commands: argparse._SubParsersAction) -> None:
    parse = commands.add_parser("pack", help="one .npy of moments per image -> packed moments")
    parse.add_argument("--source", required=True, help="folder or zip of .npy files with a dataset.json of labels")
    parse.add_argument("--dest", required=True, help="folder of the packed dataset, to be made")
    parse.add_argument("--images", help="folder or zip of the images, to be stored too (default: without)")
    parse.add_argument("--vae", default=SD_VAE, help="name to record of the SD-VAE that encoded (default: %(default)s)")
    _add_dtype(parse)
    _add_num_workers(parse, "processes that read files")
    parse.set_defaults(
        run=lambda args: pack(args.source, args.dest, args.vae, args.dtype, args.images, args.num_workers)
    )


def _add_info(commands: argparse._SubParsersAction) -> None:
    parse = commands.add_parser("info", help="say what a dataset is")
    parse.add_argument("path", help="packed dataset or features, or folder or zip of latents or images")
    parse.set_defaults(run=lambda args: print(info(args.path)))


def _add_verify(commands: argparse._SubParsersAction) -> None:
    parse = commands.add_parser("verify", help="read latents or features again and name every damaged sample")
    parse.add_argument("path", help="packed dataset or features, or folder or zip of one .npy per image")
    _add_num_workers(parse, "threads that read")
    parse.set_defaults(run=lambda args: verify(args.path, args.num_workers))


def _add_stats(commands: argparse._SubParsersAction) -> None:
    parse = commands.add_parser("stats", help="images -> reference batch, optionally with Inception statistics")
    parse.add_argument("--source", required=True, help="folder or zip of RGB images of one size, by class")
    parse.add_argument("--dest", required=True, help=".npz file to write")
    parse.add_argument("--every", type=int, default=1, metavar="N", help="take every N-th image, by name (default: 1)")
    parse.add_argument("--first", type=int, default=0, metavar="K", help="number of the first image (default: 0)")
    parse.add_argument(
        "--features",
        choices=["inception"],
        help="store mu, sigma, mu_s, sigma_s too, with torch-fidelity's weights (default: images only)",
    )
    parse.add_argument("--feature-weights", metavar="FILE", help="those weights from a local file; implies --features")
    _add_device(parse, "the feature network")
    parse.set_defaults(run=_run_stats)


def _run_stats(args: argparse.Namespace) -> None:
    if args.every < 1 or args.first < 0:
        raise UserError(f"--every {args.every} --first {args.first}: expected at least 1 and at least 0")
    indices = range(args.first, len(list_images(args.source).names), args.every)
    extractor = None
    if args.features or args.feature_weights:
        extractor = load_extractor("inception", args.feature_weights, usable_device(args.device))
    print(f"written to {write_reference(args.source, args.dest, indices, extractor)}")


def _add_encoding(parse: argparse.ArgumentParser, made: str, network: str) -> None:
    """The flags of any command that encodes images."""
    _add_dtype(parse, made)
    parse.add_argument("--flip", action="store_true", help=f"store the {made} of the mirror images too (default: no)")
    parse.add_argument("--batch-size", type=_positive, default=64, help="images encoded at once (default: 64)")
    _add_device(parse, network)
    _add_num_workers(parse, "processes that read images, per process that encodes")


def _add_device(parse: argparse.ArgumentParser, what: str) -> None:
    parse.add_argument("--device", help=f"where {what} runs (default: cuda if there is one, else cpu)")


def _add_dtype(parse: argparse.ArgumentParser, what: str = "moments") -> None:
    parse.add_argument(
        "--dtype", choices=["float16", "float32"], default="float16", help=f"stored {what} (default: float16)"
    )


def _add_num_workers(parse: argparse.ArgumentParser, what: str, default: int = 2) -> None:
    parse.add_argument("--num-workers", type=_workers, default=default, help=f"{what} (default: {default})")


def _workers(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text} given, expected a number from 0")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} given, expected a number from 1")
    return int(text)


def build_parser() -> argparse.ArgumentParser:
    """Every command and its flags."""
    parser = OneLineParser(description="Make, describe and check datasets.")
    commands = parser.add_subparsers(dest="command", required=True)
    for add_command in (_add_convert, _add_encode, _add_encode_ssl, _add_pack, _add_verify, _add_info, _add_stats):
        add_command(commands)
    return parser


@exits_on_user_error
@reports_out_of_memory("lower --batch-size or --num-workers, where the command has them; it continues where it was")
def main() -> None:
    """Parse the command line and run one command."""
    args = build_parser().parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
