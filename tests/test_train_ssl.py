"""Training with SSL alignment: encoders that see the images, packed features, and what is refused."""

import json

import pytest
import torch
from helpers.sample_data import make_images, make_vae, write_files
from helpers.training_runs import assert_same_run, metrics_of

from common.errors import UserError
from models import checkpoints
from models.ssl_encoders import load_encoder
from preprocessing.encode import encode
from preprocessing.encode_ssl import encode_ssl

VIT = "timm:vit_tiny_patch16_224"
ON_THE_FLY = ("--ssl-align", "--enc-type", VIT, "--enc-weights", "random")


@pytest.fixture(scope="module")
def aligned(tmp_path_factory):
    """Latents of 23 images with flips and pixels, latents alone, and the encoder's features."""
    folder = tmp_path_factory.mktemp("aligned")
    images, vae = make_images(folder / "images", {"a": 12, "b": 7, "c": 4}), make_vae(folder / "vae")
    encode(images, folder / "pixels", vae, dtype="float32", num_workers=0, flip=True, with_images=True)
    encode(images, folder / "plain", vae, dtype="float32", num_workers=0, flip=True)
    encode_ssl(folder / "pixels", folder / "features", VIT, weights="random", flip=True, num_workers=0)
    return folder


def alignments(run):
    return [entry["alignment"] for entry in metrics_of(run)]


def test_images_and_features_train_alike_and_the_cosine_rises(start, tmp_path, aligned):
    flags = ("--log-every", "5")
    start("--data-dir", aligned / "pixels", *ON_THE_FLY, *flags, name="images", steps=30)
    start(
        "--data-dir",
        aligned / "plain",
        "--ssl-align",
        "--ssl-features",
        aligned / "features",
        *flags,
        name="features",
        steps=30,
    )
    images, features = (alignments(tmp_path / name) for name in ("images", "features"))
    assert features == pytest.approx(images, abs=2e-3)  # stored as float16
    assert images[-1] < images[0] - 0.1  # minus the cosine
    last = metrics_of(tmp_path / "images")[-1]
    total = 0.2 * last["velocity_1"] + last["velocity_2"] + last["acceleration"] + 0.5 * last["alignment"]
    assert last["loss"] == pytest.approx(total, rel=1e-5)
    config = checkpoints.load(tmp_path / "images").config
    assert config["ssl_dim"] == 192  # and the projector travels with the model
    recipe = checkpoints.read(tmp_path / "images").metadata["training"]
    assert recipe["ssl_align"] and recipe["enc_type"] == [VIT] and recipe["proj_coeff"] == 0.5


def test_resumed_in_the_middle_of_an_epoch_it_is_the_same_run(start, tmp_path, aligned):
    flags = ("--data-dir", aligned / "pixels", *ON_THE_FLY, "--gradient-accumulation-steps", "2")
    start(*flags, name="whole")
    start(*flags, name="parts", steps=5)
    start(*flags, name="parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_two_processes_align_as_one(start, torchrun, tmp_path, aligned):
    flags = ("--data-dir", aligned / "pixels", *ON_THE_FLY)
    start(*flags, name="one", steps=4)
    torchrun(*flags, name="two", steps=4)
    for one, two in zip(metrics_of(tmp_path / "one"), metrics_of(tmp_path / "two"), strict=True):
        assert two == pytest.approx(one, rel=1e-3)


def test_a_sit_is_aligned_after_the_block_that_is_named(start, tmp_path, aligned):
    flags = ("--data-dir", aligned / "pixels", *ON_THE_FLY, "--df-idxs", "[]")
    start(*flags, "--repa-depth", "1", name="named", steps=2)
    start(*flags, name="usual", steps=2)
    depths = [checkpoints.load(tmp_path / name).config["repa_depth"] for name in ("named", "usual")]
    assert depths == [1, 2]  # block 8 in a model that has so many
    assert all(len(alignments(tmp_path / name)) == 1 for name in ("named", "usual"))


def test_several_encoders_at_once(start, tmp_path, aligned):
    names = [VIT, "timm:vit_small_patch16_224"]
    weights = tmp_path / "vit.pt"
    torch.save(load_encoder(VIT, 2, "random").vit.state_dict(), weights)
    both = ("--enc-type", ",".join(names), "--enc-weights", weights, "random")
    start("--data-dir", aligned / "pixels", "--ssl-align", *both, steps=2)
    assert checkpoints.load(tmp_path / "run").config["ssl_dim"] == [192, 384]
    record = json.loads((tmp_path / "run" / "options.json").read_text())
    assert record["options"]["enc_type"] == names


@pytest.mark.parametrize(
    ("data", "flags", "message"),
    [
        (
            "plain",
            ON_THE_FLY,
            r"--ssl-align needs images, and .* has none: encode with --images, or give --ssl-features",
        ),
        ("pixels", ("--ssl-align", "--enc-type", "dinov9"), "unknown encoder 'dinov9'"),
        ("pixels", ("--enc-weights", "random"), "without --ssl-align"),
        ("pixels", ("--repa-depth", "1"), "without --ssl-align"),
        ("pixels", (*ON_THE_FLY, "--repa-depth", "1"), "aligns after every VeRA block"),
        ("pixels", (*ON_THE_FLY, "random"), "--enc-weights has 2 entries, --enc-type 1"),
        ("pixels", ("--ssl-align", "--enc-type", VIT, "--enc-weights", "/nowhere"), "no weights file /nowhere"),
        ("pixels", ("--ssl-align", "--ssl-features", "/nowhere"), "/nowhere"),
        ("pixels", ("--ssl-align", "--enc-type", "dinov2-vit-b", "--ssl-features", "FEATURES"), "drop --enc-type"),
        ("pixels", (*ON_THE_FLY, "--ssl-features", "FEATURES"), "drop one of the two"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(start, tmp_path, aligned, data, flags, message):
    flags = [aligned / "features" if flag == "FEATURES" else flag for flag in flags]
    with pytest.raises(UserError, match=message):
        start("--data-dir", aligned / data, *flags)
    assert not (tmp_path / "run").exists()


def test_other_weights_of_the_encoder_are_refused_on_resume(start, tmp_path, aligned):
    weights = tmp_path / "vit.pt"
    torch.save(load_encoder(VIT, 2, "random").vit.state_dict(), weights)
    start("--data-dir", aligned / "pixels", *ON_THE_FLY, steps=1)
    with pytest.raises(UserError, match=r"data 23 samples, \w+, now it is 23 samples, \w+"):
        start("--data-dir", aligned / "pixels", *ON_THE_FLY[:-1], weights, steps=2)


def test_features_of_other_images_are_refused(start, tmp_path, aligned, data):
    with pytest.raises(UserError, match=r"holds features of 16 px images, .* latents of 32 px"):
        start("--data-dir", data, "--ssl-align", "--ssl-features", aligned / "features")


def test_images_beside_the_official_latents_are_looked_for_before_anything_is_written(start, tmp_path):
    write_files(tmp_path / "official" / "vae-sd")
    (tmp_path / "official" / "images").mkdir()
    with pytest.raises(UserError, match=r"images has no image 00000/img00000000"):
        start("--data-dir", tmp_path / "official", *ON_THE_FLY)
    assert not (tmp_path / "run").exists()


def test_two_processes_make_the_same_mistake_and_one_tells(torchrun, tmp_path, aligned):
    flags = ("--data-dir", aligned / "pixels", "--ssl-align", "--enc-type", VIT, "--enc-weights", "/nowhere")
    told = torchrun(*flags, code=1)
    assert told.count("error: no weights file /nowhere") == 1 and "[rank1]" not in told
    assert not (tmp_path / "run").exists()


def test_official_flags_of_the_encoder_may_stand_without_alignment(start, tmp_path):
    """The official scripts always name an encoder and a weight."""
    start("--enc-type", "dinov2-vit-b", "--proj-coeff", "0.5", steps=2)
    assert "alignment" not in metrics_of(tmp_path / "run")[0]
