"""The entry scripts start their programs, on a machine without a GPU too."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_generate import run  # noqa: F401 - a fixture

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


def test_train_says_in_one_line_what_is_missing(tmp_path):
    done = bash("script/xlarge/train.sh", "--tg-upper-bound", "0.02", DATA_DIR=str(tmp_path / "none"))
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and f"no dataset folder {tmp_path / 'none'}" in done.stderr


def test_eval_samples_and_says_that_there_is_no_reference(run, tmp_path):  # noqa: F811
    flags = ["--num-fid-samples", 2, "--num-steps", 2, "--sample-dir", tmp_path]
    done = bash("script/xlarge/eval.sh", *flags, CKPT=str(run / "ema.safetensors"), REF=str(tmp_path / "none.npz"))
    assert done.returncode == 0, done.stderr
    assert f"no reference batch at {tmp_path / 'none.npz'}" in done.stdout
    assert len(list(tmp_path.glob("*.npz"))) == 1


def test_eval_fails_when_sampling_fails(tmp_path):
    done = bash("script/xlarge/eval.sh", CKPT=str(tmp_path / "none.pt"))
    assert done.returncode == 2 and "no checkpoint at" in done.stderr
