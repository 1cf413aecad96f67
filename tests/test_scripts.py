"""The entry scripts start their programs, on a machine without a GPU too."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from training.options import parse_options

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(ROOT.glob("script/**/*.sh"))


def bash(*arguments, **environment):
    """Run a script with this Python first on the path."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    clean = {**os.environ, "PATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **environment}
    line = ["bash", *map(str, arguments)]
    return subprocess.run(line, cwd=ROOT, env=clean, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_scripts_parse(script):
    assert bash("-n", script).returncode == 0


def test_a_dry_run_needs_neither_data_nor_gpu(tmp_path):
    done = bash("script/xlarge/train.sh", "--dry-run", "--tg-upper-bound", "0.02", DATA_DIR=str(tmp_path / "none"))
    assert done.returncode == 2
    for fact in ("681.6 M parameters", "119.8 GMAC", "5004.6 steps per epoch", "memory", "files", "'df_idxs': [8, 16]"):
        assert fact in done.stdout
    assert len(done.stderr.splitlines()) == 1 and f"no dataset folder {tmp_path / 'none'}" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("config", sorted(ROOT.glob("script/accelerate/*.yaml")), ids=lambda path: path.stem)
def test_accelerate_takes_its_configurations(config):
    """As `accelerate launch` reads them; what it launches needs GPUs."""
    settings = load_config_from_file(str(config))
    processes = {"one_gpu": 1, "eight_gpus": 8, "two_machines": 16, "fsdp": 8}[config.stem]
    assert settings.num_processes == processes and settings.num_machines == 1 + (processes == 16)
    assert (settings.distributed_type == "FSDP") == (config.stem == "fsdp")
    assert settings.mixed_precision == "no"  # or Accelerate would overrule what train.py resolves


def test_launch_runs_one_process_of_a_launcher_that_is_there_already(tmp_path):
    (tmp_path / "show.py").write_text("import os; print(os.environ['RANK'], 'of', os.environ['WORLD_SIZE'])")
    done = bash("script/launch.sh", tmp_path / "show.py", WORLD_SIZE="16", RANK="3", ACCELERATE_CONFIG="none")
    assert done.stdout == "3 of 16\n"


@pytest.mark.parametrize("size", ["small", "base", "large", "xlarge"])
def test_every_size_trains_by_the_shared_recipe(tmp_path, size):
    """The flags that the script gives, read by train.py's own parser; those given to the script come last."""
    (tmp_path / "python").write_text('#!/usr/bin/env bash\nprintf "%s\\n" "${@:2}"\n')
    (tmp_path / "python").chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    line = ["bash", f"script/{size}/train.sh", "--seed", "5"]
    done = subprocess.run(line, cwd=ROOT, env={**os.environ, "PATH": path, "WORLD_SIZE": "1"}, capture_output=True,
                          text=True, timeout=60, check=True)  # fmt: skip
    options = parse_options(done.stdout.splitlines())
    paper = {  # Table 8: model, depth, ends of branches
        "small": ("DeepFlow-S/2", 12, [6]),
        "base": ("DeepFlow-B/2", 12, [6]),
        "large": ("DeepFlow-L/2", 24, [12]),
        "xlarge": ("DeepFlow-XL/2", 24, [8, 16]),
    }
    assert (options.model, options.trans_depth, options.df_idxs) == paper[size]
    assert options.exp_name == f"{size}-{len(options.df_idxs) + 1}t" and options.seed == 5
    assert (options.batch_size, options.max_train_steps, options.tg_upper_bound) == (256, 400_000, 0.01)


def test_train_says_in_one_line_what_is_missing(tmp_path):
    done = bash("script/xlarge/train.sh", "--tg-upper-bound", "0.02", DATA_DIR=str(tmp_path / "none"))
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and f"no dataset folder {tmp_path / 'none'}" in done.stderr


def test_eval_samples_and_says_that_there_is_no_reference(run, tmp_path):
    flags = ["--num-fid-samples", 2, "--num-steps", 2, "--sample-dir", tmp_path]
    done = bash("script/xlarge/eval.sh", *flags, CKPT=str(run / "ema.safetensors"), REF=str(tmp_path / "none.npz"))
    assert done.returncode == 0, done.stderr
    assert f"no reference batch at {tmp_path / 'none.npz'}" in done.stdout
    assert len(list(tmp_path.glob("*.npz"))) == 1


def test_eval_says_in_one_line_that_there_is_no_checkpoint(tmp_path):
    done = bash("script/xlarge/eval.sh", CKPT=str(tmp_path / "none.pt"))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        f"error: no checkpoint at {tmp_path / 'none.pt'}: set CKPT=/path/to/ema.safetensors, or to an official .pt\n"
    )


@pytest.mark.parametrize("size", ["small", "xlarge"])
def test_eval_fails_when_sampling_fails(run, tmp_path, size):
    environment = dict(CKPT=str(run / "ema.safetensors"), REF=str(run / "ema.safetensors"))
    done = bash(f"script/{size}/eval.sh", "--num-classes", 7, "--sample-dir", tmp_path / "none", **environment)
    assert done.returncode == 2 and "--num-classes 7, but" in done.stderr and "evaluate" not in done.stderr
    assert not (tmp_path / "none").exists()
