"""Pictures and distances during training, which must not disturb it."""

import json

import numpy as np
import pytest
import torch
from helpers.sample_data import make_vae
from helpers.training_runs import CAN_SHARD, SHARDED, metrics_of, write_dataset
from PIL import Image
from safetensors.torch import save_file

from common.errors import UserError
from evaluation.features import DemoFeatures


@pytest.fixture
def flags(tmp_path):
    """Latents of 16 px images and a VAE that decodes them."""
    vae = make_vae(tmp_path / "vae", scaling_factor=0.5)
    data = write_dataset(tmp_path / "latents", resolution=16, vae=vae)
    return ["--data-dir", data, "--preview-every", "2", "--preview-samples", "6"]


def test_previews_are_pictures(start, torchrun, tmp_path, flags):
    start("--data-dir", tmp_path / "latents", name="plain", steps=3)
    start(*flags, name="run", steps=3)
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "plain")
    pictures = sorted((tmp_path / "run" / "previews").iterdir())
    assert [picture.name for picture in pictures] == [f"step-{step:07d}.png" for step in (2, 3)]
    with Image.open(pictures[0]) as picture:
        assert picture.format == "PNG" and picture.height == 3 * 16  # a row a class, two images each
    # Processes share the images; a sharded average is put together for them.
    torchrun(*flags, name="two", steps=2, **SHARDED if CAN_SHARD else {})
    one, two = (
        np.asarray(Image.open(tmp_path / name / "previews" / "step-0000002.png")).astype(int) for name in ("run", "two")
    )
    assert abs(one - two).max() <= 1
    start(*flags, "--preview-cfg-scale", "1e4", "--preview-vae", tmp_path / "vae", name="guided", steps=2)
    guided = np.asarray(Image.open(tmp_path / "guided" / "previews" / "step-0000002.png"))
    assert (guided != one).any()


def write_features(path):
    """A small feature network of the demo's kind, for 16 px."""
    torch.manual_seed(0)
    network = DemoFeatures(16, [4, 8], 3)
    save_file(network.state_dict(), path, metadata={"config": json.dumps(network.config)})
    return path


def test_previews_are_scored(start, tmp_path, flags):
    images = np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "reference.npz", arr_0=images)
    score = ["--preview-reference", tmp_path / "reference.npz", "--preview-features", "demo"]
    score += ["--preview-feature-weights", write_features(tmp_path / "features.safetensors")]
    start(*flags, *score, "--checkpointing-steps", "2", name="parts", steps=3)
    start(*flags, *score, name="parts", steps=4)
    start(*flags, *score, name="whole", steps=4)
    scores = [entry for entry in metrics_of(tmp_path / "whole") if "preview_frechet_distance" in entry]
    assert [entry["step"] for entry in scores] == [2, 4] and all(
        np.isfinite(e["preview_frechet_distance"]) for e in scores
    )
    parts = [entry for entry in metrics_of(tmp_path / "parts") if "preview_frechet_distance" in entry]
    assert [entry for entry in parts if entry["step"] != 3] == scores


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--preview-vae", "/nowhere/vae"], "/nowhere/vae"),
        (["--preview-reference", "/nowhere.npz"], "no such file"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(start, tmp_path, flags, extra, message):
    with pytest.raises(UserError, match=message):
        start(*flags, *extra, "--preview-features", "demo")
    assert not (tmp_path / "run").exists()


def test_another_vae_is_refused(start, tmp_path, flags):
    with pytest.raises(UserError, match=r"scales latents by 0\.7"):
        start(*flags, "--preview-vae", make_vae(tmp_path / "other"))
