"""Write the averaged weights of a run or checkpoint to one file for sharing, with a model card beside it.

    python -m training.export runs/xlarge-3t --dest deepflow-xl-3t.safetensors --dtype float16

`generate.py --ckpt deepflow-xl-3t.safetensors` samples from it; the card is `deepflow-xl-3t.md`.
"""

import json
from pathlib import Path
from typing import Any

import torch

from common.errors import OneLineParser, UserError, exits_on_user_error
from common.files import write_text
from models import checkpoints
from models.autoencoder import portable_name
from training.records import read_metrics

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
FIXED = "pos_embed"  # computed, not trained: rounding it would gain nothing

CARD = """---
library_name: deepflow
license: {license}
tags: [image-generation, flow-matching, deepflow]
---

# {name}

Averaged weights (decay {ema}) of a {model} of {parameters:.1f} M parameters, for {resolution} px images in {classes}
classes, after {step} optimizer steps ({epochs:.1f} epochs of {images} images). Method: Deeply Supervised Flow-Based
Generative Models, [arXiv 2503.14494](https://arxiv.org/abs/2503.14494).

- **Sampling**: `python generate.py --ckpt {file}`; VAE `{vae}`{vae_weights}, latents scaled by
  {scaling_factor:g}, {path_type} path, t = 0 is data, null class {classes}.
- **Precision** of this file: {dtype}; trained in {precision}.
- **Loss** at the end: {loss}.
- **Evaluation**: add the table of `evaluate.py` and the settings beside its samples.
- **Licence**: {license}; the training data's own terms apply besides.

## Architecture

```json
{config}
```

## Training

```json
{training}
```
"""


def export(source: str | Path, dest: str | Path, dtype: str = "float32", license_name: str = "unknown") -> Path:
    """Write `dest` and the card beside it; returns the card's path.

    Args:
        source: a run's folder, a checkpoint's folder, or an `ema*.safetensors` of ours.
        dest: a `.safetensors` that does not exist yet.
        dtype: of the weights: float32, float16 (half the size; samples differ by rounding) or bfloat16.
        license_name: under which the weights are shared, for the card.

    Raises:
        UserError: if there is no checkpoint, or `dest` or its card exists, or `dest` is called otherwise.
    """
    dest = Path(dest)
    if dest.suffix != ".safetensors" or dest.exists():
        raise UserError(f"--dest {dest} given, expected the name of a .safetensors that does not exist yet")
    if dest.with_suffix(".md").exists():
        raise UserError(f"the model card would be {dest.with_suffix('.md')}, which exists: give another --dest")
    if not dest.absolute().parent.is_dir():
        raise UserError(f"--dest {dest} given, but its folder does not exist: make it first")
    file = checkpoints.file_of(source)
    if file.name == "model.safetensors":
        raise UserError(f"{file} holds the last step's weights: give the folder, whose average is to be shared")
    if file.suffix != ".safetensors":
        raise UserError(f"{file} is no .safetensors of ours: only these say how they were trained")
    checkpoint = checkpoints.read(file)
    weights = {
        name: tensor.to(DTYPES[dtype]) if name != FIXED else tensor for name, tensor in checkpoint.weights.items()
    }
    metadata = {**checkpoint.metadata, "dtype": dtype, "license": license_name}
    if isinstance(metadata.get("vae"), str):
        metadata["vae"] = portable_name(metadata["vae"])  # older checkpoints hold the place on the machine that wrote
    card = describe(dest, checkpoint, metadata, file.parent)
    checkpoints.save(dest, weights, checkpoint.config, metadata)
    write_text(dest.with_suffix(".md"), card)
    return dest.with_suffix(".md")


def describe(dest: Path, checkpoint: checkpoints.Checkpoint, metadata: dict[str, Any], folder: Path) -> str:
    """The model card."""
    training = metadata.get("training", {})
    losses = [entry["loss"] for entry in read_metrics(folder) if "loss" in entry]
    return CARD.format(
        name=dest.stem,
        file=dest.name,
        parameters=sum(tensor.numel() for tensor in checkpoint.weights.values()) / 1e6,
        classes=checkpoint.config["num_classes"],
        epochs=training.get("epochs", float("nan")),
        images=training.get("images", "unknown"),
        precision={"no": "float32"}.get(precision := training.get("mixed_precision", "unknown"), precision),
        vae_weights=f", weights SHA-256 {sha256[:12]}..." if (sha256 := metadata.get("vae_sha256")) else "",
        loss=f"{losses[-1]:.4f}" if losses else "see the run's metrics.jsonl",
        config=json.dumps(checkpoint.config, indent=1),
        training=json.dumps(training, indent=1),
        **{key: metadata.get(key, "unknown") for key in ("ema", "model", "resolution", "step", "vae", "path_type")},
        scaling_factor=metadata.get("scaling_factor", float("nan")),
        dtype=metadata["dtype"],
        license=metadata["license"],
    )


@exits_on_user_error
def main() -> None:
    parser = OneLineParser(prog="python -m training.export", description=__doc__.splitlines()[0])
    parser.add_argument("source", help="a run, a checkpoint's folder, or an ema*.safetensors")
    parser.add_argument("--dest", required=True, help="file to be made, NAME.safetensors; the card is NAME.md")
    parser.add_argument(
        "--dtype", choices=list(DTYPES), default="float32", help="of the weights (default: %(default)s)"
    )
    parser.add_argument("--license", default="unknown", help="of the weights, for the card (default: %(default)s)")
    args = parser.parse_args()
    card = export(args.source, args.dest, args.dtype, args.license)
    print(f"weights {args.dest} ({Path(args.dest).stat().st_size / 2**20:.1f} MiB), model card {card}")


if __name__ == "__main__":
    main()
