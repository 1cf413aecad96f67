import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

import generate
from errors import UserError
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
    return folder


def command(monkeypatch, run, out, *flags):
    argv = ["generate.py", "--ckpt", str(run / "ema.safetensors"), "--sample-dir", str(out), "--num-steps", "3"]
    monkeypatch.setattr("sys.argv", [*argv, "--num-fid-samples", "8", "--name", "x", *flags])
    generate.main()


def test_writes_npz_grid_and_settings(monkeypatch, run, tmp_path):
    command(monkeypatch, run, tmp_path, "--classes", "2,0", "--cfg-scale", "1.5", "--guidance-high", "0.8")
    with np.load(tmp_path / "x.npz", allow_pickle=False) as samples:
        assert samples["arr_0"].shape == (8, 32, 32, 3) and samples["arr_0"].dtype == np.uint8
        assert samples["arr_0"].std() > 1
        assert samples["arr_1"].tolist() == [2, 0] * 4
    with Image.open(tmp_path / "x.png") as grid:
        assert grid.size == (150 + 4 * 32, 2 * 32)
    record = json.loads((tmp_path / "x.json").read_text())
    assert record["settings"] == {
        "method": "sde",
        "num_steps": 3,
        "cfg_scale": 1.5,
        "guidance_low": 0.0,
        "guidance_high": 0.8,
        "path_type": "linear",
        "seed": 0,
    }
    assert record["architecture"]["df_idxs"] == [1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.json", "x.npz", "x.png"]  # nothing left aside


def test_image_does_not_depend_on_its_batch(monkeypatch, run, tmp_path):
    images = []
    for size in (1, 3, 8):
        command(monkeypatch, run, tmp_path / str(size), "--per-proc-batch-size", str(size), "--cfg-scale", "2")
        images.append(np.load(tmp_path / str(size) / "x.npz")["arr_0"].astype(int))
    # Matrix products round differently at other batch sizes; a pixel on the edge of two values may follow.
    assert abs(images[0] - images[1]).max() <= 1 and (images[0] != images[1]).mean() < 1e-3
    assert abs(images[0] - images[2]).max() <= 1 and (images[0] != images[2]).mean() < 1e-3


def test_seed_and_solver_change_the_images(monkeypatch, run, tmp_path):
    settings = [[], ["--global-seed", "1"], ["--mode", "ode"], ["--heun"], ["--mode", "ode", "--solver", "dopri5"]]
    seen = []
    for i, flags in enumerate(settings):
        command(monkeypatch, run, tmp_path / str(i), *flags)
        seen.append(np.load(tmp_path / str(i) / "x.npz")["arr_0"].tobytes())
    assert len(set(seen)) == len(settings)


def test_results_made_with_the_same_settings_are_not_made_again(monkeypatch, run, tmp_path, capsys):
    command(monkeypatch, run, tmp_path)
    before = (tmp_path / "x.npz").stat().st_mtime_ns
    for flags in ([], ["--overwrite"]):
        command(monkeypatch, run, tmp_path, *flags)
        assert "made already" in capsys.readouterr().out
        assert (tmp_path / "x.npz").stat().st_mtime_ns == before


def test_other_results_of_that_name_are_kept_unless_asked(monkeypatch, run, tmp_path, capsys):
    command(monkeypatch, run, tmp_path)
    before = (tmp_path / "x.npz").read_bytes()
    with pytest.raises(SystemExit, match="2"):
        command(monkeypatch, run, tmp_path, "--classes", "balanced")
    assert "was made with classes random, now it is balanced" in capsys.readouterr().err
    assert (tmp_path / "x.npz").read_bytes() == before
    command(monkeypatch, run, tmp_path, "--classes", "balanced", "--overwrite")
    assert np.load(tmp_path / "x.npz")["arr_1"].tolist() == [0, 1, 2, 0, 1, 2, 0, 1]


def test_diverged_weights_are_no_images(monkeypatch, run, tmp_path, capsys):
    checkpoint = checkpoints.read(run)
    weights = {key: torch.full_like(value, torch.nan) for key, value in checkpoint.weights.items()}
    checkpoints.save(tmp_path / "nan.safetensors", weights, checkpoint.config, checkpoint.metadata)
    with pytest.raises(SystemExit, match="2"):
        command(monkeypatch, run, tmp_path, "--ckpt", str(tmp_path / "nan.safetensors"))
    assert "samples are not finite" in capsys.readouterr().err
    assert not (tmp_path / "x.npz").exists()


def test_default_name_holds_what_changes_the_result(run):
    parse = generate.build_parser().parse_args
    seen = set()
    for flags in ["", "--cfg-scale 2", "--cfg-scale 2 --guidance-high 0.7", "--mode ode", "--heun", "--num-steps 50",
                  "--classes balanced", "--classes 1,2", "--global-seed 3", "--num-fid-samples 9"]:  # fmt: skip
        args = parse(["--ckpt", str(run), *flags.split()])
        seen.add(generate.default_name(args, generate.settings_of(args, {}), {"step": 5}))
    assert len(seen) == 10
    assert f"{run.name}-step5-sde250-random-n50000-seed0" in seen


def test_checkpoints_of_two_runs_have_two_names(run, tmp_path):
    names = set()
    for name in ("one", "two"):
        folder = tmp_path / name / "checkpoints" / "step-0000005"
        folder.mkdir(parents=True)
        (folder / "ema.safetensors").write_bytes((run / "ema.safetensors").read_bytes())
        args = generate.build_parser().parse_args(["--ckpt", str(folder)])
        names.add(generate.default_name(args, generate.settings_of(args, {}), {"step": 5}))
    assert {name.split("-")[0] for name in names} == {"one", "two"}


def test_labels():
    choose = generate.choose_labels
    assert choose("balanced", 5, 3, None, 0).tolist() == [0, 1, 2, 0, 1]
    assert choose("2 0", 5, 3, None, 0).tolist() == [2, 0, 2, 0, 2]
    few, many = choose("random", 10, 3, None, 7), choose("random", 3000, 3, None, 7)
    assert few.tolist() == many[:10].tolist()
    assert (abs(np.bincount(many) - 1000) < 120).all()
    assert few.tolist() != choose("random", 10, 3, None, 8).tolist()
    assert (abs(np.bincount(choose("data", 3000, 3, [7, 0, 3], 7)) - [2100, 0, 900]) < 120).all()
    with pytest.raises(UserError, match="does not tell how frequent its classes are"):
        choose("data", 10, 3, None, 7)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--classes", "3"], "--classes '3': give random, data, balanced, or class ids in 0..2"),
        (["--classes", "cat"], "--classes 'cat'"),
        (["--resolution", "64"], "--resolution 64, but .* makes images of 32 px"),
        (["--path-type", "cosine"], "--path-type cosine, but .* was trained on the linear path"),
        (["--num-steps", "1"], "--num-steps is 1: give at least 2"),
        (["--guidance-low", "0.9", "--guidance-high", "0.2"], "must be ordered"),
        (["--cfg-scale", "nan"], "--cfg-scale is nan: give a number"),
        (["--name", "a/b"], "--name 'a/b': give a name without folders"),
        (["--global-seed", str(2**64)], "give at least 0, below 2"),
        (["--num-fid-samples", "0"], "--num-fid-samples is 0: give at least 1"),
        (["--vae", "no/such/folder"], "no VAE folder at no/such/folder"),
        (["--ckpt", "nothing.pt"], "no checkpoint at nothing.pt"),
        (["--steps", "3"], "unrecognized arguments: --steps 3"),
        (["--mode", "pde"], "invalid choice: 'pde'"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(monkeypatch, run, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, run, tmp_path / "out", *flags)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert re.search(message, lines[0])
    assert not (tmp_path / "out").exists()


def test_vae_of_another_scale_is_refused(monkeypatch, run, tmp_path):
    args = generate.build_parser().parse_args(["--ckpt", "c", "--vae", str(run / "vae")])
    with pytest.raises(UserError, match=r"scales latents by 0.7, but c was trained on a scale of 0.18215"):
        generate.load_matching_vae(args, {"scaling_factor": 0.18215}, torch.device("cpu"))
