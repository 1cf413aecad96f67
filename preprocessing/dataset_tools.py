"""Make, describe and check packed datasets (their layout is described in `dataset.py`).

    python -m preprocessing.dataset_tools encode --source IMAGES --dest OUT --vae stabilityai/sd-vae-ft-ema
    python -m preprocessing.dataset_tools info OUT
    python -m preprocessing.dataset_tools verify OUT

`encode` takes square RGB images of one size, in class folders or with REPA's `dataset.json`
({"labels": [["folder/image.png", 3], ...]}, optionally "class_names": [...]).
"""

import argparse

import torch

from errors import OneLineParser, UserError, exits_on_user_error
from preprocessing.encode import encode
from preprocessing.verify import info, verify


def _add_encode(commands: argparse._SubParsersAction) -> None:
    parse = commands.add_parser("encode", help="images -> packed VAE moments")
    parse.add_argument("--source", required=True, help="folder of square RGB images, one size, by class")
    parse.add_argument("--dest", required=True, help="folder of the packed dataset, to be made")
    parse.add_argument("--vae", required=True, help="AutoencoderKL: local folder or hub name")
    parse.add_argument(
        "--dtype", choices=["float16", "float32"], default="float16", help="stored moments (default: float16)"
    )
    parse.add_argument("--batch-size", type=int, default=64, help="images encoded at once (default: 64)")
    best_device = "cuda" if torch.cuda.is_available() else "cpu"
    parse.add_argument("--device", default=best_device, help=f"where the VAE runs (default here: {best_device})")
    parse.add_argument("--num-workers", type=int, default=2, help="processes that read images (default: 2)")
    parse.set_defaults(run=_run_encode)


def _run_encode(args: argparse.Namespace) -> None:
    if args.batch_size < 1:
        raise UserError(f"batch size {args.batch_size} given, expected at least 1: change --batch-size")
    if args.num_workers < 0:
        raise UserError(f"{args.num_workers} workers given, expected 0 or more: change --num-workers")
    encode(args.source, args.dest, args.vae, args.dtype, args.batch_size, args.device, args.num_workers)


def _add_info(commands: argparse._SubParsersAction) -> None:
    parse = commands.add_parser("info", help="say what a dataset is")
    parse.add_argument("path", help="folder of a packed dataset")
    parse.set_defaults(run=lambda args: print(info(args.path)))


def _add_verify(commands: argparse._SubParsersAction) -> None:
    parse = commands.add_parser("verify", help="check every file by its checksum")
    parse.add_argument("path", help="folder of a packed dataset")
    parse.set_defaults(run=lambda args: verify(args.path))


@exits_on_user_error
def main() -> None:
    """Parse the command line and run one command."""
    parser = OneLineParser(description="Make, describe and check datasets.")
    commands = parser.add_subparsers(dest="command", required=True)
    for add_command in (_add_encode, _add_info, _add_verify):
        add_command(commands)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
