"""A tiny checkpoint to sample from, and the command that does."""

import pytest
import torch

import generate
from models import DeepFlow, checkpoints

TINY = dict(hidden_size=16, depth=2, num_heads=2, num_classes=3, projector_dim=8, df_idxs=[1], input_size=4)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with a random checkpoint and a random VAE (f = 8) that fit each other."""
    from diffusers import AutoencoderKL

    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8,) * 4,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=0.7,
    )
    vae.save_pretrained(folder / "vae")
    model = DeepFlow(**TINY)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    metadata = {"step": 5, "path_type": "linear", "vae": str(folder / "vae"), "scaling_factor": 0.7}
    metadata["class_names"] = ["cat", "dog", "emu"]
    checkpoints.save(folder / "ema.safetensors", model.state_dict(), model.config, metadata)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    checkpoints.save(folder / "weak.safetensors", model.state_dict(), model.config, metadata)
    return folder


def command(monkeypatch, run, out, *flags):
    argv = ["generate.py", "--ckpt", str(run / "ema.safetensors"), "--sample-dir", str(out), "--num-steps", "3"]
    monkeypatch.setattr("sys.argv", [*argv, "--num-fid-samples", "8", "--name", "x", *flags])
    generate.main()
