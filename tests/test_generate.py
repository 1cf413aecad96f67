import argparse
import json
import random
import re
import shutil

import numpy as np
import pytest
import torch
from helpers.sample_data import killed_at, moments_of
from helpers.sampling_runs import TINY, command
from PIL import Image

import generate
from common import files
from common.errors import UserError
from generation import checkpoint, images
from generation.options import Settings
from models import DeepFlow, checkpoints


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
        "diffusion_form": "linear",
        "diffusion_norm": 1.0,
        "time_shift": 1.0,
        "precision": "no",
    }
    assert record["block_size"] == 64 and record["device_type"] == "cpu" and "--classes 2,0" in record["command"]
    assert record["architecture"]["df_idxs"] == [1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.json", "x.npz", "x.png"]  # nothing left aside


SAMPLERS = {
    "sde": ["--mode", "sde"],
    "sde-heun": ["--mode", "sde", "--heun"],
    "euler": ["--mode", "ode"],
    "dopri5": ["--solver", "dopri5", "--num-steps", "1"],
    "autoguidance": ["--mode", "ode", "--autoguidance-ckpt", "WEAK"],
}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samples_are_the_same_bytes_at_any_batch_size(monkeypatch, run, tmp_path, sampler):
    monkeypatch.setitem(images.BLOCK_TOKENS, "cpu", 16)  # four images of four tokens
    flags = [str(run / "weak.safetensors") if flag == "WEAK" else flag for flag in SAMPLERS[sampler]]
    seen, total = {}, 16 if sampler == "dopri5" else 64
    for name, size, count in (("a", 1, total), ("b", 8, total), ("c", 64, total), ("fewer", 8, total - 2)):
        command(monkeypatch, run, tmp_path, *flags, "--cfg-scale", "2", "--guidance-high", "0.9", "--name", name,
                "--per-proc-batch-size", str(size), "--num-fid-samples", str(count))  # fmt: skip
        seen[name] = (tmp_path / f"{name}.npz").read_bytes()
    assert seen["a"] == seen["b"] == seen["c"]
    # An image does not know how many others there are: the total ends inside the last block, which is made whole.
    whole, fewer = (np.load(tmp_path / f"{name}.npz")["arr_0"] for name in ("a", "fewer"))
    assert whole.std() > 1 and (whole[:-2] == fewer).all()


def test_the_iterator_makes_any_subset(run, monkeypatch):
    monkeypatch.setitem(images.BLOCK_TOKENS, "cpu", 16)
    model = checkpoints.load(run)
    decode = lambda z: (z * 40 + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)[..., :3].contiguous()  # noqa: E731
    settings, labels = Settings(method="heun", num_steps=3, cfg_scale=2.0), np.arange(10) % 3
    make = lambda indices, size: list(images.generate_images(model, decode, labels, settings, indices, size))  # noqa: E731
    (everything,) = make(range(10), 10)
    assert everything.indices == list(range(10)) and everything.conditions.tolist() == labels.tolist()
    parts = make([9, 2, 5, 2], 1)
    assert [part.indices for part in parts] == [[2], [5], [9]]
    for part in parts:
        assert torch.equal(part.images, everything.images[part.indices])
        assert part.conditions.tolist() == labels[part.indices].tolist()
    assert make([], 4) == []
    with pytest.raises(IndexError, match="images 3 to 10 are wanted, but there are 10 conditions"):
        make([10, 3], 4)


def test_killed_at_random_moments_and_continued_by_any_number_of_processes(monkeypatch, run, tmp_path):
    flags = ["--mode", "ode", "--num-steps", "20", "--cfg-scale", "2", "--num-fid-samples", "62", "--name", "x"]
    monkeypatch.setitem(images.BLOCK_TOKENS, "cpu", 16)
    command(monkeypatch, run, tmp_path / "whole", *flags)
    work = lambda: command(monkeypatch, run, tmp_path / "killed", *flags, "--per-proc-batch-size", "1")  # noqa: E731
    total = moments_of(work, tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed")
    moments, kills, interrupted = random.Random(0), 0, 0
    while kills < 5:
        if killed_at(work, moments.randint(1, total), tmp_path / "killed"):
            assert (tmp_path / "killed/x.npz").read_bytes() == (tmp_path / "whole/x.npz").read_bytes()
            shutil.rmtree(tmp_path / "killed")
        else:
            kills += 1
            interrupted += (tmp_path / "killed/x.npz.progress").exists()
    assert interrupted
    work()
    assert (tmp_path / "killed/x.npz").read_bytes() == (tmp_path / "whole/x.npz").read_bytes()
    assert sorted(p.suffix for p in (tmp_path / "killed").iterdir()) == [".json", ".npz", ".png"]


def test_an_interrupted_run_goes_on_where_it_stopped(monkeypatch, run, tmp_path):
    monkeypatch.setitem(images.BLOCK_TOKENS, "cpu", 8)  # two images
    made, make_block = [], images.make_block

    def failing(*arguments):
        made.append(arguments[4].start)
        if len(made) == 3:
            raise UserError("interrupted")
        return make_block(*arguments)

    monkeypatch.setattr(images, "make_block", failing)
    with pytest.raises(SystemExit, match="2"):
        command(monkeypatch, run, tmp_path, "--per-proc-batch-size", "2")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.npz.part", "x.npz.progress"]
    with pytest.raises(SystemExit, match="2"):  # other settings
        command(monkeypatch, run, tmp_path, "--global-seed", "1")
    command(monkeypatch, run, tmp_path, "--per-proc-batch-size", "4")
    assert made == [0, 2, 4, 4, 6]
    command(monkeypatch, run, tmp_path / "whole")
    assert (tmp_path / "x.npz").read_bytes() == (tmp_path / "whole/x.npz").read_bytes()


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
    with pytest.raises(SystemExit, match="2"):
        command(monkeypatch, run, tmp_path, "--global-seed", "3")
    assert "x.npz was made with seed 0, now it is 3: choose another --name" in capsys.readouterr().err
    assert (tmp_path / "x.npz").read_bytes() == before
    command(monkeypatch, run, tmp_path, "--classes", "balanced", "--overwrite")
    assert np.load(tmp_path / "x.npz")["arr_1"].tolist() == [0, 1, 2, 0, 1, 2, 0, 1]


@pytest.mark.parametrize(
    ("solver", "words"), [("euler", "samples are not finite"), ("dopri5", "are not finite or jump")]
)
def test_diverged_weights_are_no_images(monkeypatch, run, tmp_path, capsys, solver, words):
    checkpoint = checkpoints.read(run)
    weights = {key: torch.full_like(value, torch.nan) for key, value in checkpoint.weights.items()}
    checkpoints.save(tmp_path / "nan.safetensors", weights, checkpoint.config, checkpoint.metadata)
    with pytest.raises(SystemExit, match="2"):
        command(monkeypatch, run, tmp_path, "--ckpt", str(tmp_path / "nan.safetensors"), "--solver", solver)
    last = capsys.readouterr().err.splitlines()[-1]  # after the progress bar
    assert last.startswith("error: ") and words in last
    assert not (tmp_path / "x.npz").exists()


def name_of(ckpt, flags="", metadata=None):
    options = generate.parse_options(["--ckpt", str(ckpt), *flags.split()])
    return generate.default_name(options, generate.settings_of(options, metadata or {}), metadata or {"step": 5})


def test_default_name_holds_what_changes_the_result(run):
    weak = run / "weak.safetensors"
    settings = ["", "--cfg-scale 2", "--cfg-scale 2 --guidance-high 0.7", "--cfg-scale 2 --guidance-low 0.7",
                "--mode ode", "--heun", "--heun --mode sde", "--solver dopri5", "--num-steps 50", "--classes balanced",
                "--classes 1,2", "--classes 1,2,2", "--global-seed 3", "--num-fid-samples 9", "--path-type cosine",
                "--diffusion-form decreasing", "--diffusion-norm 0.5", "--time-shift 2", "--precision bf16",
                "--vae mse", "--no-tf32", "--compile", f"--cfg-scale 2 --autoguidance-ckpt {weak}",
                "--legacy-scaling"]  # fmt: skip
    seen = {name_of(run, flags) for flags in settings}
    assert len(seen) == len(settings)
    assert f"{run.name}-step5-sde250-random-n50000-seed0" in seen
    assert len(name_of(run, "--classes " + ",".join(["1"] * 500))) < 120
    for flags in ("--per-proc-batch-size 3", "--no-grid", "--png", "--overwrite"):
        assert name_of(run, flags) == name_of(run)


def test_checkpoints_of_two_runs_have_two_names(run, tmp_path):
    names = set()
    for name in ("one", "two"):
        folder = tmp_path / name / "checkpoints" / "step-0000005"
        folder.mkdir(parents=True)
        (folder / "ema.safetensors").write_bytes((run / "ema.safetensors").read_bytes())
        names.add(name_of(folder))
        official = folder.parent / "0400000.pt"
        official.touch()
        names.add(name_of(official, metadata={"path_type": "linear"}))
    assert {name.split("-sde250-")[0] for name in names} == {"one-step5", "two-step5", "one-0400000", "two-0400000"}


@pytest.mark.parametrize(
    ("flags", "method"),
    [
        ("", "sde"),
        ("--heun", "heun"),  # as in the official release
        ("--mode ode", "euler"),
        ("--mode ode --solver heun", "heun"),
        ("--mode sde --heun", "sde-heun"),
        ("--mode sde --solver heun", "sde-heun"),
        ("--solver dopri5", "dopri5"),
        ("--no-heun --mode sde", "sde"),
    ],
)
def test_mode_solver_and_heun_together_name_a_sampler(flags, method):
    assert generate.parse_options(["--ckpt", "c", *flags.split()]).method == method


def test_two_commands_do_not_make_one_file(monkeypatch, run, tmp_path, capsys):
    monkeypatch.setattr(files, "LOCK_TIMEOUT", 0.1)
    with files.only_writer(tmp_path / "x.npz"), pytest.raises(SystemExit, match="2"):
        command(monkeypatch, run, tmp_path, "--name", "x")
    assert "x.npz is being written by another process" in capsys.readouterr().err
    command(monkeypatch, run, tmp_path, "--name", "x")


def test_generate_is_a_function_that_leaves_no_trace(run, tmp_path):
    threads, tf32 = torch.get_num_threads(), torch.backends.cudnn.allow_tf32
    flags = ["--num-fid-samples", "3", "--num-steps", "2", "--sample-dir", str(tmp_path), "--no-tf32"]
    npz = generate.generate(generate.parse_options(["--ckpt", str(run), *flags]))
    assert npz.parent == tmp_path and np.load(npz)["arr_0"].shape == (3, 32, 32, 3)
    assert (torch.get_num_threads(), torch.backends.cudnn.allow_tf32) == (threads, tf32)


def test_a_moved_checkpoint_is_the_same_and_another_is_not(monkeypatch, run, tmp_path, capsys):
    command(monkeypatch, run, tmp_path)
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes((run / "ema.safetensors").read_bytes())
    command(monkeypatch, run, tmp_path, "--ckpt", str(moved))
    assert "made already" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        command(monkeypatch, run, tmp_path, "--ckpt", str(run / "weak.safetensors"))
    assert "was made with checkpoint_sha256" in capsys.readouterr().err


def test_damaged_checkpoints_are_one_line_before_anything_is_written(monkeypatch, run, tmp_path, capsys):
    whole = (run / "ema.safetensors").read_bytes()
    for name, content in {"cut.safetensors": whole[:-100], "cut.pt": b"PK" + whole[:500], "empty.pt": b""}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(SystemExit, match="2"):
            command(monkeypatch, run, tmp_path / "out", "--ckpt", str(tmp_path / name))
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1 and f"{name} is damaged" in error
    assert not (tmp_path / "out").exists()


def test_a_disk_that_fills_up_with_pictures_is_one_line(monkeypatch, run, tmp_path, capsys):
    command(monkeypatch, run, tmp_path, "--no-grid")

    def full(*_, **__):
        raise OSError(28, "No space left on device")  # as `write` raises it: it knows no file name

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="2"):
        patch.setattr(Image.Image, "save", full)
        command(monkeypatch, run, tmp_path)
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {tmp_path / 'x.png'}: No space left on device"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.json", "x.npz"]
    command(monkeypatch, run, tmp_path)
    assert (tmp_path / "x.png").exists()


def test_png_folder_holds_the_samples(monkeypatch, run, tmp_path):
    command(monkeypatch, run, tmp_path, "--no-grid")
    assert not (tmp_path / "x.png").exists()
    command(monkeypatch, run, tmp_path, "--png")  # of samples that stand there already
    samples = np.load(tmp_path / "x.npz")["arr_0"]
    assert sorted(p.name for p in (tmp_path / "x").iterdir()) == [f"{i:06d}.png" for i in range(8)]
    for i, image in enumerate(samples):
        assert (np.asarray(Image.open(tmp_path / f"x/{i:06d}.png")) == image).all()


def test_precision_and_compiled_blocks_make_nearly_the_same_images(monkeypatch, run, tmp_path):
    calls = []

    def backend(graph, _):  # the graphs that the compiler would get, run as they are: it takes a minute on a CPU
        return lambda *inputs: calls.append(len(inputs)) or graph.forward(*inputs)

    compile_of = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **kind: compile_of(self, backend=backend, **kind))
    images = {}
    for name, flags in {"plain": [], "bf16": ["--precision", "bf16"], "compiled": ["--compile"]}.items():
        assert not calls
        command(monkeypatch, run, tmp_path, "--name", name, "--cfg-scale", "2", *flags)
        images[name] = np.load(tmp_path / f"{name}.npz")["arr_0"].astype(int)
    assert 0 < abs(images["plain"] - images["bf16"]).mean() < 3
    assert abs(images["plain"] - images["compiled"]).max() <= 1
    assert len(calls) == 4 * 3  # two blocks, a VeRA block and a head in three steps


def test_official_checkpoint_goes_through(monkeypatch, run, tmp_path):
    """A file as the official release writes it, read with its flags, and without them by the command line's."""
    ours = checkpoints.read(run)
    weights = ours.weights
    flags = dict(model="DeepFlow-B/2", df_idxs="[1]", legacy_scaling=False, num_heads=2, path_type="linear")
    args = argparse.Namespace(**flags, trans_depth=2, resolution=32)
    torch.save({"model": {}, "ema": weights, "opt": {}, "args": args, "steps": 7}, tmp_path / "0000007.pt")
    vae = ["--vae", str(run / "vae")]
    command(
        monkeypatch,
        run,
        tmp_path,
        "--ckpt",
        str(tmp_path / "0000007.pt"),
        *vae,
        "--df-idxs",
        "[1]",
        "--trans-depth",
        "2",
        "--num-classes",
        "3",
        "--resolution",
        "32",
        "--path-type",
        "linear",
        "--projector-embed-dims",
        "768",
        "--no-fused-attn",
        "--encoder-depth",
        "8",
        "--no-legacy-scaling",
    )
    command(monkeypatch, run, tmp_path / "ours")
    assert (tmp_path / "x.npz").read_bytes() == (tmp_path / "ours/x.npz").read_bytes()
    assert json.loads((tmp_path / "x.json").read_text())["architecture"] == ours.config


def official_without_flags(path):
    """A small DeepFlow-S/2 (width 384, 6 heads) whose file tells nothing but weights."""
    config = dict(hidden_size=384, depth=3, num_heads=6, num_classes=3, projector_dim=8, df_idxs=[1], input_size=4)
    torch.save({"ema": DeepFlow(**config).state_dict()}, path)
    return path


def test_architecture_flags_count_where_the_file_is_silent(tmp_path):
    path = official_without_flags(tmp_path / "x.pt")
    options = generate.parse_options(["--ckpt", str(path), "--df-idxs", "2", "--legacy-scaling"])
    assert generate.read_checkpoint(options).config | {"df_idxs": [2], "legacy_scaling": True, "num_heads": 6} == (
        generate.read_checkpoint(options).config
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--trans-depth 12", "--trans-depth 12, but .* has trans-depth 2: drop the flag"),
        ("--df-idxs 8 16", r"--df-idxs \[8, 16\], but .* has df-idxs \[1\]"),
        ("--num-classes 1000", "--num-classes 1000, but .* has num-classes 3"),
        ("--legacy-scaling", "--legacy-scaling, but .* has legacy-scaling False"),
        ("--qk-norm", "--qk-norm, but .* has qk-norm False"),
        ("--ssl-align", "--ssl-align, but .* has ssl-align False"),
        ("--model DeepFlow-XL/2", "--model DeepFlow-XL/2 has width 1152 and 16 heads, but .* has width 16 and 2 heads"),
        ("--model SiT-XXL/2", "unknown model 'SiT-XXL/2'"),
    ],
)
@pytest.mark.parametrize("official", [False, True])
def test_architecture_flags_may_not_contradict_the_file(run, tmp_path, flags, message, official):
    path = run / "ema.safetensors"
    if official:
        args = argparse.Namespace(df_idxs="[1]", legacy_scaling=False, num_heads=2)
        path = tmp_path / "x.pt"
        torch.save({"ema": checkpoints.read(run).weights, "args": args}, path)
    with pytest.raises(UserError, match=message):
        generate.read_checkpoint(generate.parse_options(["--ckpt", str(path), *flags.split()]))


def test_autoguidance_by_a_checkpoint_of_another_kind_is_refused(run, tmp_path):
    other = tmp_path / "other.safetensors"
    model = DeepFlow(**TINY | dict(num_classes=4))
    checkpoints.save(other, model.state_dict(), model.config, {})
    options = generate.parse_options(["--ckpt", str(run), "--cfg-scale", "2", "--autoguidance-ckpt", str(other)])
    with pytest.raises(UserError, match="has num_classes 4, but .* has 3"):
        checkpoint.read_guide(options, generate.read_checkpoint(options))


def test_labels():
    choose = generate.choose_labels
    assert choose("balanced", 5, 3, None, 0).tolist() == [0, 1, 2, 0, 1]
    assert choose("2 0", 5, 3, None, 0).tolist() == [2, 0, 2, 0, 2]
    few, many = choose("random", 10, 3, None, 7), choose("random", 3000, 3, None, 7)
    assert few.tolist() == many[:10].tolist()
    assert (abs(np.bincount(many) - 1000) < 120).all()
    for seeds in ((7, 8), (2**64 - 2, 2**64 - 1)):
        assert choose("random", 10, 3, None, seeds[0]).tolist() != choose("random", 10, 3, None, seeds[1]).tolist()
    assert (abs(np.bincount(choose("data", 3000, 3, [7, 0, 3], 7)) - [2100, 0, 900]) < 120).all()
    with pytest.raises(UserError, match="does not say how frequent its classes are"):
        choose("data", 10, 3, None, 7)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--classes", "3"], "--classes '3': give random, data, balanced, or class ids in 0..2"),
        (["--classes", "cat"], "--classes 'cat'"),
        (["--resolution", "64"], "--resolution 64, but .* makes images of 32 px"),
        (["--path-type", "cosine"], "--path-type cosine, but .* was trained on the linear path"),
        (["--num-steps", "1"], "--num-steps is 1: give at least 2"),
        (["--num-steps", "0"], "--num-steps: '0' given, expected an integer in"),
        (["--heun", "--solver", "dopri5"], "--heun and --solver dopri5: drop one of them"),
        (["--mode", "sde", "--solver", "dopri5"], "--solver dopri5 with --mode sde"),
        (["--solver", "dopri5", "--time-shift", "2"], "--time-shift with --solver dopri5"),
        (["--time-shift", "0"], "--time-shift is 0.0: give a positive number"),
        (["--mode", "ode", "--diffusion-norm", "2"], "--diffusion-form and --diffusion-norm are of the SDE"),
        (["--diffusion-form", "constant"], "diffusion constant with norm 1 is too strong .* bears a norm of"),
        (["--autoguidance-ckpt", "weak.pt"], "--autoguidance-ckpt with --cfg-scale 1, which is no guidance"),
        (["--autoguidance-ckpt", "no.pt", "--cfg-scale", "2"], "no checkpoint at no.pt"),
        (["--precision", "fp16"], "--precision fp16 needs a GPU"),
        (["--df-idxs", "one"], "--df-idxs 'one' given, expected integers"),
        (["--legacy-scaling"], "--legacy-scaling, but .* has legacy-scaling False"),
        (["--guidance-low", "0.9", "--guidance-high", "0.2"], "must be ordered"),
        (["--cfg-scale", "nan"], "--cfg-scale is nan: give a number"),
        (["--name", "a/b"], "--name 'a/b': give a name without folders"),
        (["--global-seed", str(2**64)], f"--global-seed: '{2**64}' given, expected an integer in"),
        (["--num-fid-samples", "0"], "--num-fid-samples: '0' given, expected an integer in"),
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
    options = generate.parse_options(["--ckpt", "c", "--vae", str(run / "vae")])
    with pytest.raises(UserError, match=r"scales latents by 0.7, but c was trained on a scale of 0.18215"):
        checkpoint.load_matching_vae(options, {"scaling_factor": 0.18215}, torch.device("cpu"))
