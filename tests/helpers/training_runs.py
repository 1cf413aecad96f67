"""Tiny training runs for the tests: their data, command lines, and what they leave, compared bit for bit."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.fsdp
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

import train
from preprocessing.packed_writer import packed_manifest, write_packed
from training.options import parse_options

ROOT = Path(train.__file__).parent
COUNT = 23  # with batches of 8, a step in three crosses the end of an epoch
CAN_SHARD = hasattr(torch.distributed.fsdp, "fully_shard")  # from torch 2.6 on
SHARDED = {"ACCELERATE_USE_FSDP": "true"}  # what `accelerate launch --use_fsdp` sets
OF_THE_MACHINE = {"images_per_second", "memory_gib"}  # metrics that no two runs share


def write_dataset(dest, std=0.1, resolution=32, vae="assets/vae", vae_sha256="0" * 64):
    """23 random latents of 4 x 4 in three classes."""
    rng = np.random.default_rng(0)
    moments = np.concatenate([rng.normal(size=(COUNT, 4, 4, 4)), np.full((COUNT, 4, 4, 4), std)], axis=1)
    names, labels = [f"class/{index:02d}.png" for index in range(COUNT)], rng.integers(0, 3, COUNT)
    facts = dict(latent_shape=(8, 4, 4), dtype="float32", vae=vae, vae_sha256=vae_sha256, scaling_factor=0.5)
    manifest = packed_manifest(names, labels, ["a", "b", "c"], resolution=resolution, **facts)
    write_packed(dest, manifest, [moments.astype(np.float32)], names, labels, shard_rows=10)
    return dest


def spoil(data, sample):
    """Make the moments of one sample NaN."""
    shard = np.load(data / f"moments-{sample // 10:05d}.npy", mmap_mode="r+")
    shard[sample % 10] = np.nan
    shard.flush()


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "packed")


def tiny_command(data, folder, *flags, name="run", steps=10):
    """A command line: the tiny run `name` on the tiny data, in which further flags win."""
    tiny = ["--model", "DeepFlow-Tiny/2", "--trans-depth", "2", "--df-idxs", "1", "--batch-size", "8"]
    where = ["--data-dir", data, "--output-dir", folder, "--exp-name", name]
    pace = ["--max-train-steps", steps, "--log-every", "2", "--num-workers", "0"]
    rate = ["--learning-rate", "1e-3", "--ema-decay", "0.9"]
    return [str(word) for word in (*tiny, *where, *pace, *rate, *flags)]


@pytest.fixture
def command(data, tmp_path):
    """`tiny_command` on data and in a folder of this test's own."""
    return partial(tiny_command, data, tmp_path)


@pytest.fixture
def start(command):
    """A function that trains in this process."""

    def start(*flags, name="run", steps=10):
        try:
            return train.train(parse_options(command(*flags, name=name, steps=steps)))
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)

    return start


@pytest.fixture
def torchrun(command):
    """A function that trains in two processes on the CPU; returns stdout, or stderr where another exit code is due."""

    def torchrun(*flags, name="run", steps=10, code=0, program="train.py", **environment):
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        line = [*launch, program, *command(*flags, name=name, steps=steps)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
        environment["PYTHONPATH"] = str(ROOT)
        done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == code, done.stderr
        return done.stderr if code else done.stdout

    return torchrun


def metrics_of(run):
    """Entries of metrics.jsonl without those of the machine."""
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in entry.items() if key not in OF_THE_MACHINE} for entry in entries]


def assert_same_run(one, other, step=10):
    """Weights, average, optimizer and metrics agree bit for bit."""
    folders = [run / "checkpoints" / f"step-{step:07d}" for run in (one, other)]
    for name in ("model.safetensors", "ema.safetensors"):
        weights, others = (load_file(folder / name) for folder in folders)
        assert weights.keys() == others.keys()
        assert all(torch.equal(weights[key], others[key]) for key in weights), name
    states = [torch.load(folder / "trainer.pt", weights_only=True)["optimizer"] for folder in folders]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    for moments, others in zip(states[0]["state"].values(), states[1]["state"].values(), strict=True):
        assert all(torch.equal(moments[key], others[key]) for key in moments)
    assert metrics_of(one) == metrics_of(other)
