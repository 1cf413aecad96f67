"""What commit ac7667c left behind (tests/golden/ac7667c, by its make.py) is read and continued as before."""

import json
import runpy
import shutil

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from helpers.golden import GOLDEN
from helpers.sample_data import contents
from helpers.training_runs import OF_THE_MACHINE, assert_same_run, metrics_of, write_dataset
from safetensors.torch import load_file

import generate
import train
from dataset import open_latents
from models import checkpoints, presets
from models.autoencoder import load_vae, weights_sha256
from storage.features import PackedFeatures
from training.options import parse_options

ASSET = GOLDEN / "ac7667c"
MADE = runpy.run_path(str(ASSET / "make.py"))
WHOLE = json.loads((ASSET / "whole.json").read_text())


@pytest.fixture
def old(tmp_path, monkeypatch):
    """A copy of what the old commit left, which is also the current folder: it holds relative paths."""
    folder = shutil.copytree(ASSET, tmp_path / "old")
    monkeypatch.setitem(presets.SIZES, "Nano", MADE["NANO"])
    monkeypatch.chdir(folder)
    return folder


def run(name):
    try:
        assert train.train(parse_options([*MADE["TRAIN"], "--exp-name", name]))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def sample(name):
    return generate.generate(generate.parse_options([*MADE["SAMPLE"], "130", "--name", name]))


def on_these_versions(file):
    """Give the record of old samples the versions that are installed: others may round differently, and are refused."""
    head, newline, done = file.read_bytes().partition(b"\n" if file.suffix == ".progress" else b"\0")
    record = {**json.loads(head), "torch": torch.__version__, "numpy": np.__version__}
    file.write_bytes(json.dumps(record).encode() + newline + done)


def test_the_asset_is_small_and_names_no_place_of_its_maker():
    files = contents(ASSET)
    assert sum(len(content) for name, content in files.items() if "__pycache__" not in name) < 400_000
    assert not [name for name, content in files.items() if b"/work/" in content or b"/tmp/" in content]


def test_packed_data_and_features_are_read_and_written_as_before(old, tmp_path):
    write_dataset(tmp_path / "packed", vae="vae", vae_sha256=weights_sha256(load_vae("vae", "cpu")))
    assert contents(tmp_path / "packed") == contents(old / "packed")
    assert len(open_latents("packed")) == 23
    features = PackedFeatures("features")
    expected = np.random.default_rng(1).normal(size=(23, 1, 4, 8)).astype(np.float16)[:, 0]
    assert np.array_equal(features.gather(np.arange(23)), expected)
    features.check_belongs(open_latents("packed"), tokens=4)


def test_a_killed_run_is_continued_to_the_end_of_the_uninterrupted_one(old):
    run("run")
    last = old / "run/checkpoints/step-0000010"
    weights, average = load_file(last / "model.safetensors"), load_file(old / "run/ema.safetensors")
    assert {key: value.double().norm().item() for key, value in weights.items()} == pytest.approx(
        WHOLE["weights"], rel=1e-6, abs=1e-6
    )
    before = load_file(ASSET / "whole/ema.safetensors")
    assert average.keys() == before.keys()
    for key, value in before.items():
        torch.testing.assert_close(average[key], value, rtol=0, atol=1e-6)
    optimizer = torch.load(last / "trainer.pt", weights_only=True)["optimizer"]["state"]
    assert {str(key) for key in optimizer} == WHOLE["optimizer"].keys()
    for key, moments in optimizer.items():
        norms = {name: value.double().norm().item() for name, value in moments.items()}
        assert norms == pytest.approx(WHOLE["optimizer"][str(key)], rel=1e-4, abs=1e-6)
    for entry, expected in zip(metrics_of(old / "run"), WHOLE["metrics"], strict=True):
        assert list(entry) == [name for name in expected if name not in OF_THE_MACHINE]
        assert entry == pytest.approx({name: expected[name] for name in entry}, rel=1e-6, abs=1e-6)


def test_a_killed_run_is_continued_bit_for_bit(old):
    run("anew")
    first_half = [load_file(f"{name}/checkpoints/step-0000005/model.safetensors") for name in ("anew", "run")]
    if not all(torch.equal(first_half[0][key], value) for key, value in first_half[1].items()):
        pytest.skip("this CPU or version of torch rounds differently from that of the old run's first five steps")
    run("run")
    assert_same_run(old / "anew", old / "run")


def test_an_old_checkpoint_is_read(old):
    model = checkpoints.load("whole/ema.safetensors")
    before = load_file(ASSET / "whole/ema.safetensors")
    assert model.config["hidden_size"] == 4 and model.config["ssl_dim"] == 8 and list(model.config["df_idxs"]) == [1]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_old_samples_are_recognised_as_made(old, capsys):
    on_these_versions(old / "made/finished.json")
    before = contents(old / "made")
    sample("finished")
    assert "nothing to do" in capsys.readouterr().out
    assert contents(old / "made") == before


def test_unfinished_old_samples_are_continued(old, monkeypatch):
    on_these_versions(old / "made/unfinished.npz.progress")
    made = []
    all_images = generate.generate_images

    def counting(*arguments):
        for batch in all_images(*arguments):
            made.extend(batch.indices)
            yield batch

    monkeypatch.setattr(generate, "generate_images", counting)
    npz = sample("unfinished")
    assert made == [128, 129]  # the third block alone
    with np.load(npz) as new, np.load(old / "made/finished.npz") as before:
        assert np.array_equal(new["arr_1"], before["arr_1"])
        assert np.array_equal(new["arr_0"][:128], before["arr_0"][:128])
        # Another CPU may round one of the last images to the neighbouring byte.
        assert np.abs(new["arr_0"][128:].astype(int) - before["arr_0"][128:]).max() <= 1
    assert {path.name for path in npz.parent.iterdir()} >= {"unfinished.npz", "unfinished.json"}


def test_samples_of_the_old_network_are_the_same_up_to_rounding(old):
    with np.load(old / "made/finished.npz") as before, np.load(sample("again")) as again:
        assert np.array_equal(again["arr_1"], before["arr_1"])
        assert np.abs(again["arr_0"].astype(int) - before["arr_0"]).max() <= 1
        assert before["arr_0"].std() > 1
