"""What SSL alignment costs a training step: with the encoder at work, with packed features, and without, in one run.

    python -m benchmarks.ssl_alignment --output ssl_alignment.json
    python -m benchmarks.ssl_alignment --model DeepFlow-XL/2 --batch-size 32 --samples 4096 --mixed-precision bf16

A step here is what alignment changes: reading a batch, the encoder, and the network's forward and backward, without the
optimizer. All weights, images and features are random. Prints the time of a step, for each kind the best of three
rounds, as other programs on the machine can only slow it down.
"""

import platform
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.figures import write_figures
from common.errors import OneLineParser, exits_on_user_error
from common.flags import PRECISIONS
from common.processes import usable_device
from dataset import DataOrder, LatentBatch, latent_batches
from loss import DeepFlowLoss
from models import DeepFlow, create_model
from models.ssl_encoders import encoder_width, load_encoder
from preprocessing.packed_writer import PackedJob, features_manifest, packed_manifest
from storage.features import PackedFeatures
from storage.packed import PackedLatents
from training.optimizer import make_optimizer
from training.step import TrainingStep

REDUCTION, PATCH = 8, 2  # of the SD-VAE, and of the network
ROUNDS = 3


def write_latents(folder: Path, samples: int, resolution: int) -> None:
    """Random moments with random images, of one class."""
    rng, side = np.random.default_rng(0), resolution // REDUCTION
    names, labels = [f"{index:08d}.png" for index in range(samples)], np.zeros(samples, np.int64)
    manifest = packed_manifest(
        names,
        labels,
        ["all"],
        resolution=resolution,
        latent_shape=(8, side, side),
        dtype="float16",
        vae="none",
        vae_sha256=None,
        scaling_factor=1.0,
        images=True,
    )
    job = PackedJob.begin(folder, manifest, names, labels)
    for unit in job.unwritten_units():
        n = len(job.rows_of(unit))
        images = rng.integers(0, 256, (n, resolution, resolution, 3), np.uint8)
        job.write_unit(unit, rng.random((n, 8, side, side), np.float32), images)
    job.finish()


def write_features(folder: Path, samples: int, resolution: int, encoder: str) -> None:
    """Random features, with as many tokens as the network has for these latents."""
    rng, tokens, width = np.random.default_rng(1), (resolution // REDUCTION // PATCH) ** 2, encoder_width(encoder)
    names = [f"{index:08d}.png" for index in range(samples)]
    manifest = features_manifest(
        names,
        resolution=resolution,
        tokens=tokens,
        width=width,
        dtype="float16",
        encoder=encoder,
        weights_sha256="",
    )
    job = PackedJob.begin(folder, manifest, names)
    for unit in job.unwritten_units():
        job.write_unit(unit, rng.standard_normal((len(job.rows_of(unit)), tokens, width), np.float32))
    job.finish()


def step_seconds(step: TrainingStep, batches: Iterator[LatentBatch], count: int) -> float:
    """Seconds of one step's gradients, the average of `count` steps after a first one."""
    step.batches = batches

    def finished() -> float:
        if step.device.type == "cuda":
            torch.cuda.synchronize(step.device)
        return time.perf_counter()

    for i in range(count + 1):
        if i == 1:
            began = finished()
        step.gradients(i)
        step.optimizer.zero_grad()
    return (finished() - began) / count


def measure_all(
    folder: Path,
    model: str,
    encoder_name: str,
    resolution: int,
    samples: int,
    batch_size: int,
    steps: int,
    num_workers: int,
    device: torch.device,
    precision: str,
) -> dict[str, dict[str, float]]:
    """Seconds per step of each kind, and relative to no alignment, by a title."""
    write_latents(folder / "latents", samples, resolution)
    write_features(folder / "features", samples, resolution, encoder_name)
    data, features = PackedLatents(folder / "latents"), PackedFeatures(folder / "features")
    input_size = resolution // REDUCTION
    encoder = load_encoder(encoder_name, input_size // PATCH, "random", device, PRECISIONS[precision])
    sizes = dict(num_classes=1, input_size=input_size)
    plain = create_model(model, **sizes).to(device)
    aligned = create_model(model, **sizes, ssl_dim=encoder.width).to(device)
    order = DataOrder(samples, batch_size, seed=0)

    def step_of(network: DeepFlow, encoders: Sequence[torch.nn.Module] = ()) -> TrainingStep:
        sizes = dict(batch_size=batch_size, scaling_factor=data.scaling_factor, precision=precision)
        return TrainingStep(network, DeepFlowLoss(), make_optimizer(network), iter(()), encoders=encoders, **sizes)

    kinds = {
        "no alignment": (step_of(plain), {}),
        "packed features": (step_of(aligned), dict(features=[features])),
        "encoder at work": (step_of(aligned, [encoder]), dict(with_images=True)),
    }
    best = dict.fromkeys(kinds, float("inf"))
    for _ in range(ROUNDS):
        for name, (step, extra) in kinds.items():
            batches = latent_batches(data, order, num_workers=num_workers, **extra)
            best[name] = min(best[name], step_seconds(step, batches, steps))
    plain_seconds = best["no alignment"]
    return {name: {"seconds": value, "times_plain": value / plain_seconds} for name, value in best.items()}


@exits_on_user_error
def main() -> None:
    """Parse the command line, measure, print a table and write the figures as JSON."""
    parser = OneLineParser(description="Time of a training step with and without SSL alignment.")
    add = parser.add_argument
    add("--model", default="DeepFlow-S/2", help="network to train (default: %(default)s)")
    add("--encoder", default="dinov2-vit-b", help="encoder to align with (default: %(default)s)")
    add("--resolution", type=int, default=256, help="image side, pixels (default: %(default)s)")
    add("--batch-size", type=int, default=4, help="samples per step (default: %(default)s)")
    add("--samples", type=int, default=64, help="samples on disk (default: %(default)s)")
    add("--steps", type=int, default=2, help="steps timed for each kind and round (default: %(default)s)")
    add("--num-workers", type=int, default=0, help="threads that read ahead (default: %(default)s)")
    add("--mixed-precision", choices=list(PRECISIONS), default="no", help="of network and encoder (default: no)")
    add("--device", help="where both run (default: cuda if there is one, else cpu)")
    add("--dir", help="folder for the temporary data (default: the system's)")
    add("--output", help="JSON file for the figures (default: none)")
    args = parser.parse_args()
    device = torch.device(usable_device(args.device))
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        results = measure_all(
            Path(folder),
            args.model,
            args.encoder,
            args.resolution,
            args.samples,
            args.batch_size,
            args.steps,
            args.num_workers,
            device,
            args.mixed_precision,
        )
    for name, result in results.items():
        print(f"{name:20s}{result['seconds']:10.3f} s per step{result['times_plain']:8.2f} x without alignment")
    if args.output:
        card = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"
        write_figures(args.output, vars(args), results, torch=torch.__version__, device_name=card)


if __name__ == "__main__":
    main()
