"""Make, describe and check packed datasets (their layout is described in `dataset.py`).

    python -m preprocessing.dataset_tools encode --source IMAGES --dest OUT --vae stabilityai/sd-vae-ft-ema
    python -m preprocessing.dataset_tools info OUT
    python -m preprocessing.dataset_tools verify OUT

`encode` takes square RGB images of one size, in class folders or with REPA's `dataset.json`
({"labels": [["folder/image.png", 3], ...]}, optionally "class_names": [...]).
"""

import argparse
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from dataset import MANIFEST, PackedLatents, read_manifest
from errors import UserError, exits_on_user_error
from models.vae import encode_moments, load_vae
from preprocessing.packed_writer import packed_manifest, write_packed

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


class SourceImages(NamedTuple):
    """The images to encode, sorted by name."""

    folder: Path
    names: list[str]  # relative to `folder`, with forward slashes
    labels: np.ndarray  # (N,) int64
    class_names: list[str]


def list_images(source: str | Path) -> SourceImages:
    """List the images below `source` with their classes, from its `dataset.json` or else its class folders.

    Raises `UserError` if there are no images, an image lies outside the class folders, or `dataset.json` and
    the images found disagree: no image is ever left out silently.
    """
    folder = Path(source)
    if not folder.is_dir():
        raise UserError(f"no image folder {folder}: change --source")
    names = sorted(
        (Path(place) / file).relative_to(folder).as_posix()
        for place, _, files in os.walk(folder, followlinks=True)  # ImageNet is often a tree of links
        for file in files
        if Path(file).suffix.lower() in IMAGE_SUFFIXES
    )
    if not names:
        raise UserError(f"no images ({', '.join(sorted(IMAGE_SUFFIXES))}) below {folder}: change --source")
    if (folder / MANIFEST).is_file():
        label_of, class_names = _read_labels(folder / MANIFEST)
        for name in label_of.keys() ^ set(names):
            problem = "lists no label for" if name not in label_of else "lists a missing image,"
            raise UserError(f"{folder / MANIFEST} {problem} {name}: make images and labels agree")
    else:
        for name in names:
            if "/" not in name:
                raise UserError(f"{folder / name} is in no class folder, and there is no {MANIFEST} with labels")
        class_names = sorted({name.split("/")[0] for name in names})
        number = {class_name: label for label, class_name in enumerate(class_names)}
        label_of = {name: number[name.split("/")[0]] for name in names}
    return SourceImages(folder, names, np.array([label_of[name] for name in names], np.int64), class_names)


def _read_labels(file: Path) -> tuple[dict[str, int], list[str]]:
    """Label by image name, and class names, of a REPA-style `dataset.json`."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        label_of = {str(name): label for name, label in content["labels"]}
        class_names = content.get("class_names")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f'{file}: expected {{"labels": [["a/b.png", 3], ...]}}, got {error!r}') from error
    for name, label in label_of.items():
        if type(label) is not int or label < 0:
            raise UserError(f"{file}: label {label!r} of {name}, expected an integer from 0")
    if class_names is None:
        class_names = [str(label) for label in range(max(label_of.values(), default=-1) + 1)]
    if max(label_of.values(), default=-1) >= len(class_names):
        raise UserError(f"{file}: label {max(label_of.values())}, but only {len(class_names)} class_names")
    return label_of, [str(name) for name in class_names]


def read_image(file: Path) -> np.ndarray:
    """One image as (H, W, 3) uint8; `UserError` if it cannot be read or is neither RGB nor greyscale."""
    try:
        with Image.open(file) as image:
            if image.mode not in ("RGB", "L"):
                raise UserError(f"{file} is in mode {image.mode}, expected RGB: convert the image first")
            return np.array(image.convert("RGB"))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # SyntaxError: a broken PNG
        raise UserError(f"{file} cannot be read as an image ({error}): replace or remove it") from error


class _ImageFiles(Dataset):
    """Batches of images, uint8 (B, resolution, resolution, 3)."""

    def __init__(self, images: SourceImages, resolution: int) -> None:
        self.images, self.resolution = images, resolution

    def __len__(self) -> int:
        return len(self.images.names)

    def __getitems__(self, indices: list[int]) -> torch.Tensor | UserError:
        """A batch, or else the mistake: raised in a worker it would arrive wrapped in a traceback."""
        try:
            return torch.stack([self._read(self.images.folder / self.images.names[i]) for i in indices])
        except UserError as error:
            return error

    def _read(self, file: Path) -> torch.Tensor:
        pixels = read_image(file)
        if pixels.shape[:2] != (self.resolution, self.resolution):
            raise UserError(
                f"{file} is {pixels.shape[1]} x {pixels.shape[0]} pixels, expected {self.resolution} x "
                f"{self.resolution}, the height of the first image: bring all to one square size"
            )
        return torch.from_numpy(pixels)


def _encoded(vae: "AutoencoderKL", loader: DataLoader) -> Iterator[np.ndarray]:
    """Moments (B, 2C, h, w) float32 of each batch, under a progress bar."""
    with tqdm(total=len(loader.dataset), desc="encode", unit="img") as bar:
        for pixels in loader:
            if isinstance(pixels, UserError):
                raise pixels
            yield encode_moments(vae, pixels).cpu().numpy()
            bar.update(len(pixels))


def _as_it_is(batch: torch.Tensor | UserError) -> torch.Tensor | UserError:
    return batch


def encode(
    source: str | Path,
    dest: str | Path,
    vae_name: str,
    dtype: str = "float16",
    batch_size: int = 64,
    device: str = "cpu",
    num_workers: int = 2,
    shard_rows: int | None = None,
) -> None:
    """Encode the images below `source` to packed latents in `dest`; do nothing if they are there already.

    The VAE runs in float32 whatever the stored `dtype`. Raises `UserError` for a source, a VAE or images that
    do not fit, and if `dest` holds a dataset made of something else.
    """
    images = list_images(source)
    resolution = read_image(images.folder / images.names[0]).shape[0]
    vae = load_vae(vae_name, device=device, dtype=torch.float32)
    reduction = 2 ** (len(vae.config.block_out_channels) - 1)  # 8 for the SD-VAE
    if resolution % reduction:
        raise UserError(f"images are {resolution} pixels high, {vae_name} needs a multiple of {reduction}: resize them")
    manifest = packed_manifest(
        images.names,
        images.labels,
        images.class_names,
        resolution=resolution,
        latent_shape=(2 * vae.config.latent_channels, resolution // reduction, resolution // reduction),
        dtype=dtype,
        vae=vae_name,
        vae_sha256=weights_sha256(vae),
        scaling_factor=vae.config.scaling_factor,
    )
    if (Path(dest) / MANIFEST).is_file():
        _check_same(manifest, read_manifest(dest), dest)
        print(f"{dest} is complete ({len(images.names)} samples): nothing to do")
        return
    loader = DataLoader(
        _ImageFiles(images, resolution),
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=_as_it_is,
    )
    write_packed(dest, manifest, _encoded(vae, loader), images.names, images.labels, shard_rows)
    print(f"{dest}: {len(images.names)} samples in {len(images.class_names)} classes")


def weights_sha256(vae: "AutoencoderKL") -> str:
    """Checksum of a VAE's float32 weights: tells VAEs apart whatever path they were loaded from."""
    sha256 = hashlib.sha256()
    for name, tensor in sorted(vae.state_dict().items()):
        sha256.update(name.encode())
        sha256.update(tensor.float().cpu().contiguous().numpy().tobytes())
    return sha256.hexdigest()


def _check_same(wanted: dict[str, Any], found: dict[str, Any], dest: str | Path) -> None:
    """Raise `UserError` if the finished dataset in `dest` is not the one asked for."""
    for key in wanted:
        if key != "vae" and found.get(key) != wanted[key]:  # a VAE's path may differ: its checksum decides
            raise UserError(
                f"{dest} holds a complete dataset, but with {key} {str(found.get(key))[:80]}, where this "
                f"command makes {str(wanted[key])[:80]}: delete it or change --dest"
            )


def info(path: str | Path) -> str:
    """Say in a few lines what the packed dataset in folder `path` is."""
    data = PackedLatents(path)
    manifest, counts = data.manifest, np.bincount(data.labels, minlength=data.num_classes)
    size = sum(file.stat().st_size for file in data.path.iterdir())
    return "\n".join(
        [
            f"samples         {len(data)}",
            f"classes         {data.num_classes}, of {counts.min()} to {counts.max()} samples each",
            f"resolution      {manifest['resolution']} px",
            f"moments         {data.latent_shape} {manifest['dtype']}, mean and std stacked",
            f"vae             {manifest['vae']}, weights sha256 {manifest['vae_sha256'][:12]}...",
            f"scaling factor  {data.scaling_factor}",
            f"on disk         {size / 2**20:.1f} MiB in {len(manifest['shards'])} shard(s)",
        ]
    )


def verify(path: str | Path) -> None:
    """Read the whole packed dataset in `path` again; `UserError` names the first file that is damaged."""
    data = PackedLatents(path)
    files = [data.manifest["labels"], data.manifest["names"], *data.manifest["shards"]]
    for entry in tqdm(files, desc="verify", unit="file"):
        place, sha256 = data.path / Path(entry["file"]).name, hashlib.sha256()
        if not place.is_file():
            raise UserError(f"{place} is missing: copy it again or encode again")
        with place.open("rb") as file:
            while chunk := file.read(2**22):
                sha256.update(chunk)
        if sha256.hexdigest() != entry["sha256"]:
            raise UserError(f"{place} is damaged: copy it again or encode again")
    print(f"{path}: {len(data)} samples in {len(files)} files, all as written")


@exits_on_user_error
def main() -> None:
    """Parse the command line and run one command."""
    parser = argparse.ArgumentParser(description="Make, describe and check packed datasets.")
    commands = parser.add_subparsers(dest="command", required=True)
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
    for name, purpose in (("info", "say what a dataset is"), ("verify", "check every file by its checksum")):
        commands.add_parser(name, help=purpose).add_argument("path", help="folder of a packed dataset")
    args = parser.parse_args()
    if args.command == "info":
        print(info(args.path))
    elif args.command == "verify":
        verify(args.path)
    else:
        if args.batch_size < 1:
            raise UserError(f"batch size {args.batch_size} given, expected at least 1: change --batch-size")
        if args.num_workers < 0:
            raise UserError(f"{args.num_workers} workers given, expected 0 or more: change --num-workers")
        encode(args.source, args.dest, args.vae, args.dtype, args.batch_size, args.device, args.num_workers)


if __name__ == "__main__":
    main()
