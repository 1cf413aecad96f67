"""What commit ac7667c leaves behind, small: packed data and features, a stopped and a whole run, samples.

Run by that commit's code, in its checkout; DEST is an empty folder:

    PYTHONDONTWRITEBYTECODE=1 OMP_NUM_THREADS=1 PYTHONPATH=.:tests python .../make.py DEST

    packed/     23 latents of 4 x 4 in three classes            run/     killed after 6 of 10 steps, saved after 5
    features/   4 tokens of width 8 for each of their images    whole/   the average of the same run, uninterrupted
    vae/        a random VAE, f = 2                             whole.json   its metrics and the size of its states
    made/       finished samples of whole/, and unfinished ones, of which two blocks of three are made
"""

import contextlib
import json
import os
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

# A network of five thousand parameters. An epsilon far above the rounding of gradients keeps other CPUs' runs close.
NANO = dict(hidden_size=4, num_heads=2, sit_depth=2, deepflow_depth=2, branches=2, projector_dim=8)
TRAIN = shlex.split(
    "--model DeepFlow-Nano/2 --batch-size 8 --max-train-steps 10 --log-every 2 --num-workers 0 --learning-rate 1e-3 "
    "--lr-schedule cosine --checkpointing-steps 5 --ema-decay 0.9 --adam-epsilon 1e-4 --mixed-precision no "
    "--data-dir packed --output-dir . --ssl-align --ssl-features features"
)
SAMPLE = shlex.split(
    "--ckpt whole/ema.safetensors --sample-dir made --num-steps 3 --cfg-scale 1.5 --no-grid --per-proc-batch-size 64 "
    "--num-fid-samples"
)


def make() -> None:
    """Fill the current folder."""
    import training_runs
    from diffusers import AutoencoderKL
    from models.vae import weights_sha256

    import generate
    import train
    from models import presets
    from preprocessing.packed_writer import PackedJob, features_manifest
    from training.options import parse_options

    presets.SIZES["Nano"] = NANO
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[4, 4],
        layers_per_block=1,
        norm_num_groups=2,
        latent_channels=4,
        sample_size=8,
        scaling_factor=0.5,
    )
    vae.save_pretrained("vae")
    training_runs.write_dataset(Path("packed"), vae="vae", vae_sha256=weights_sha256(vae))

    names = json.loads(Path("packed/names.json").read_text())
    values = np.random.default_rng(1).normal(size=(len(names), 1, 4, 8)).astype(np.float16)
    facts = dict(resolution=32, tokens=4, width=8, dtype="float16", encoder="random", weights_sha256="0" * 64)
    job = PackedJob.begin(Path("features"), features_manifest(names, **facts), names)
    for unit in job.left():
        rows = job.rows_of(unit)
        job.write_unit(unit, values[rows.start : rows.stop])
    job.finish()

    train.train(parse_options([*TRAIN, "--exp-name", "whole"]))
    AcceleratorState._reset_state(reset_partial_state=True)
    # What is there if the run is killed in its seventh step: a checkpoint in the middle of a line of metrics.
    shutil.copytree("whole/checkpoints/step-0000005", "run/checkpoints/step-0000005")
    shutil.copy("whole/options.json", "run")
    lines = Path("whole/metrics.jsonl").read_text().splitlines(keepends=True)
    Path("run/metrics.jsonl").write_text("".join(lines[:3]))

    last = Path("whole/checkpoints/step-0000010")
    optimizer = torch.load(last / "trainer.pt", weights_only=True)["optimizer"]["state"]
    weights = load_file(last / "model.safetensors")
    record = {
        "metrics": [json.loads(line) for line in Path("whole/metrics.jsonl").read_text().splitlines()],
        "weights": {key: value.double().norm().item() for key, value in weights.items()},
        "optimizer": {
            str(key): {name: value.double().norm().item() for name, value in moments.items()}
            for key, moments in optimizer.items()
        },
    }
    Path("whole.json").write_text(json.dumps(record, indent=1) + "\n")
    for path in Path("whole").iterdir():
        if path.name != "ema.safetensors":
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def sample(name: str, count: int) -> None:
        generate.generate(generate.parse_options([*SAMPLE, str(count), "--name", name]))

    sample("finished", 130)
    all_images = generate.generate_images

    def two_blocks(*arguments: object) -> object:
        images = all_images(*arguments)
        yield next(images)
        yield next(images)
        raise KeyboardInterrupt

    generate.generate_images = two_blocks
    with contextlib.suppress(KeyboardInterrupt):
        sample("unfinished", 130)


if __name__ == "__main__":
    os.chdir(sys.argv[1])
    make()
