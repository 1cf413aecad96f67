"""Rates around training and sampling: reading, the SD-VAE, the networks of evaluation and of alignment.

    python -m benchmarks.throughput --output throughput.json

Weights are random, architectures real, images of 256 px. If a network's library is not installed, its row says so.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.rows import Rows, add_common_flags, benchmark_device, rows_of, summary, synchronize, times_of
from common.errors import OneLineParser, exits_on_user_error
from dataset import DataOrder, DeviceLatents, latent_batches
from evaluation.features import load_extractor
from models.autoencoder import decode, encode_moments
from models.ssl_encoders import RANDOM, load_encoder
from preprocessing.packed_writer import packed_manifest, write_packed
from storage.packed import PackedLatents

SECONDS = 2.0

# diffusers' configuration of the SD-VAE (stabilityai/sd-vae-ft-ema).
SD_VAE = dict(
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    block_out_channels=(128, 256, 512, 512),
    layers_per_block=2,
    latent_channels=4,
    sample_size=256,
    scaling_factor=0.18215,
)


def write_latents(folder: Path, samples: int, side: int) -> PackedLatents:
    """Random moments, packed in float16."""
    rng = np.random.default_rng(0)
    names, labels = [f"{index:08d}.png" for index in range(samples)], np.arange(samples) % 1000
    manifest = packed_manifest(
        names,
        labels,
        [str(label) for label in range(1000)],
        resolution=8 * side,
        latent_shape=(8, side, side),
        dtype="float16",
        vae="none",
        vae_sha256=None,
        scaling_factor=1.0,
    )
    write_packed(folder, manifest, [rng.random((samples, 8, side, side), np.float32)], names, labels)
    return PackedLatents(folder)


def reading_rate(data: PackedLatents, on_device: bool, batch_size: int, device: torch.device) -> dict[str, Any]:
    """Latents/s that arrive on the device, over two seconds (not a median, as read-ahead comes in bursts)."""
    source = DeviceLatents(data, device) if on_device else data
    batches: Iterator = latent_batches(source, DataOrder(len(data), batch_size, 0), num_workers=0 if on_device else 4)

    def read() -> None:
        next(batches).moments.to(device, non_blocking=True)

    for _ in range(20):
        read()
    synchronize(device)
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < SECONDS:
        read()
        count += 1
    synchronize(device)
    return {"images_per_second": count * batch_size / (time.perf_counter() - began), "batch_size": batch_size}


def rate(work: Callable[[], object], images: int, count: int, device: torch.device) -> dict[str, Any]:
    """Images/s of a call on `images` images."""
    times_of(work, 2, device)
    times = summary(times_of(work, count, device))
    return {"images_per_second": 1e3 * images / times["ms"], "batch_size": images, **times}


def sd_vae(device: torch.device, dtype: torch.dtype, tiny: bool) -> nn.Module:
    """A random VAE of the SD-VAE's architecture."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    smaller = dict(block_out_channels=(32,) * 4, layers_per_block=1) if tiny else {}
    return AutoencoderKL(**SD_VAE | smaller).to(device).to(dtype).eval().requires_grad_(False)


def inception_weights(file: Path) -> Path:
    """Random weights of torch-fidelity's Inception, so that its constructor downloads none."""
    from torch_fidelity import feature_extractor_inceptionv3 as theirs

    class Untrained(theirs.FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict: dict) -> None:
            pass

    before = theirs.load_state_dict_from_url
    theirs.load_state_dict_from_url = lambda *_, **__: {}
    try:
        torch.manual_seed(0)
        torch.save(Untrained("untrained", ["2048"]).state_dict(), file)
    finally:
        theirs.load_state_dict_from_url = before
    return file


def measure_all(rows: Rows, folder: Path, device: torch.device, batch_size: int, tiny: bool) -> None:
    """One row per rate."""
    on_gpu, side, count = device.type == "cuda", 4 if tiny else 32, 2 if tiny else 10
    pixels, generator = 8 * side, torch.Generator(device).manual_seed(0)
    images = torch.randint(256, (batch_size, pixels, pixels, 3), dtype=torch.uint8, device=device, generator=generator)
    data = write_latents(folder / "packed", 256 if tiny else 16_384, side)
    for name, on_device in (("reading, packed", False), ("reading, all on the device", True)):
        wanted = min(256, len(data) // 2)
        rows.measure(name, lambda on=on_device, wanted=wanted: reading_rate(data, on, wanted, device))
    for name, dtype in {"float32": torch.float32, **({"bf16": torch.bfloat16} if on_gpu else {})}.items():

        def encoding(dtype: torch.dtype = dtype) -> dict[str, Any]:
            vae = sd_vae(device, dtype, tiny)
            return rate(lambda: encode_moments(vae, images), batch_size, count, device)

        def decoding(dtype: torch.dtype = dtype) -> dict[str, Any]:
            vae = sd_vae(device, dtype, tiny)
            latents = torch.randn(batch_size, 4, side, side, device=device)
            return rate(lambda: decode(vae, latents), batch_size, count, device)

        rows.measure(f"encoding, SD-VAE's architecture, {name}", encoding)
        rows.measure(f"decoding, SD-VAE's architecture, {name}", decoding)

    def inception() -> dict[str, Any]:
        extractor = load_extractor("inception", inception_weights(folder / "inception.pth"), device)
        return rate(lambda: extractor(images), batch_size, count, device)

    rows.measure("Inception features", inception)
    encoder_name = "timm:vit_tiny_patch16_224" if tiny else "dinov2-vit-b"
    for name, dtype in {"float32": torch.float32, "bf16": torch.bfloat16}.items():

        def features(dtype: torch.dtype = dtype) -> dict[str, Any]:
            encoder = load_encoder(encoder_name, side // 2, RANDOM, device, dtype)
            return rate(lambda: encoder(images), batch_size, count, device)

        rows.measure(f"{encoder_name} features, {name}", features)
    rows.finish()


@exits_on_user_error
def main() -> None:
    """Parse the command line and measure."""
    parser = OneLineParser(description="Images/s of reading, the SD-VAE, Inception and DINOv2 features.")
    parser.add_argument("--batch-size", type=int, default=64, help="images per call (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="images of 32 px, smaller networks")
    add_common_flags(parser)
    args = parser.parse_args()
    device = benchmark_device(args.device)
    rows = rows_of("throughput", args, device)
    with tempfile.TemporaryDirectory() as folder:
        measure_all(rows, Path(folder), device, args.batch_size, args.tiny)


if __name__ == "__main__":
    main()
