"""What only a GPU can show: numerics in every precision, no waiting and no races, resume, launchers.

python -m pytest tests/gpu -m gpu
"""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.golden import relative_error
from helpers.training_runs import CAN_SHARD, ROOT, SHARDED, assert_same_run, metrics_of
from safetensors.torch import load_file

import train
from generation import images
from generation.options import Settings
from models import DeepFlow
from training.ema import EMA
from training.guard import LossScale

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here; on one: python -m pytest -m gpu"),
]
two_gpus = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="gradients and shards of several processes need two GPUs, one is here"
)

TINY = dict(hidden_size=32, depth=4, num_heads=2, num_classes=3, projector_dim=16, df_idxs=[2], input_size=4)
FULL = ("--mixed-precision", "no")
# The written-out softmax: the backward of fused kernels may add in any order.
EXACT = (*FULL, "--no-fused-attn")
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 3e-3}


@pytest.fixture(autouse=True)
def full_precision():
    """Float32 products as they are, whatever a test before has set."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def tiny_network(seed=0):
    """A network on the GPU in which no weight is zero."""
    torch.manual_seed(seed)
    model = DeepFlow(**TINY)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.cuda()


def losses(run):
    return [entry["loss"] for entry in metrics_of(run)]


# ---- numerics


@pytest.mark.parametrize("by", ["autocast", "weights"])
@pytest.mark.parametrize("name", list(TOLERANCE))
def test_golden_outputs(golden_model, golden_io, name, by):
    dtype = getattr(torch, name)
    model, x = golden_model.cuda(), golden_io["x"].cuda()
    if by == "weights":
        model, x = model.to(dtype), x.to(dtype)
    with torch.no_grad(), torch.autocast("cuda", dtype, enabled=by == "autocast" and name != "float32"):
        output = model(x, golden_io["ts"].cuda(), golden_io["y"].cuda())
    for parts, expected in ((output.velocities, golden_io["v"]), (output.accelerations, golden_io["a"])):
        assert relative_error(torch.stack(parts).float().cpu(), expected) < TOLERANCE[name]


def test_activation_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = tiny_network()
        model.checkpoint_activations = checkpointing
        generator = torch.Generator("cuda").manual_seed(0)
        x = torch.randn(8, 4, 4, 4, device="cuda", generator=generator)
        output = model(x, torch.rand(2, 8, device="cuda", generator=generator), torch.arange(8, device="cuda") % 3)
        sum(part.square().sum() for part in (*output.velocities, *output.accelerations)).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert gradients[0].norm() > 0 and relative_error(gradients[1], gradients[0]) < 1e-5


def test_compiled_blocks_train_as_they_do_eager(start, tmp_path):
    for name, flags in {"eager": (), "compiled": ("--compile",)}.items():
        start(*FULL, *flags, name=name, steps=6)
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), rel=1e-3)


# ---- fp16


def test_thirty_fp16_steps_through_an_overflow(start, tmp_path, monkeypatch):
    """A scale that is far too large is halved until a step fits; the skipped ones change nothing."""
    flags = ("--mixed-precision", "fp16", "--no-fused-attn")
    monkeypatch.setattr(train, "build_loss_scale", lambda precision: LossScale(base=2.0**40))
    assert start(*flags, name="overflow", steps=30)
    entries = metrics_of(tmp_path / "overflow")
    reached = entries[0]["loss_scale"]
    skipped = math.log2(2.0**40 / reached)
    assert reached < 2.0**40 and entries[0]["skipped_rate"] == pytest.approx(skipped / (skipped + 2))
    assert entries[-1]["step"] == 30 and all(map(math.isfinite, losses(tmp_path / "overflow")))
    monkeypatch.setattr(train, "build_loss_scale", lambda precision: LossScale(base=entries[-1]["loss_scale"]))
    assert start(*flags, name="fitting", steps=30)
    assert losses(tmp_path / "overflow") == pytest.approx(losses(tmp_path / "fitting"), rel=1e-3)


# ---- resume, data


def test_ten_steps_equal_five_and_five_more(start, tmp_path):
    """Bit for bit where the kernels add in one order, to rounding with the fused ones."""
    start(*EXACT, name="whole")
    start(*EXACT, name="parts", steps=5)
    start(*EXACT, name="parts")
    files = [tmp_path / name / "checkpoints" / "step-0000010" / "model.safetensors" for name in ("whole", "parts")]
    weights, others = map(load_file, files)
    assert all(torch.equal(weights[key], others[key]) for key in weights)


def test_ten_fp16_steps_equal_five_and_five_more_to_rounding(start, tmp_path):
    start(name="whole")  # fp16 is a GPU's default
    start(name="parts", steps=5)
    start(name="parts")
    ends = [{entry["step"]: entry["loss"] for entry in metrics_of(tmp_path / name)} for name in ("whole", "parts")]
    for step in (2, 4, 8, 10):
        assert ends[1][step] == pytest.approx(ends[0][step], rel=1e-2)


def test_latents_on_the_device_and_read_ahead_train_alike(start, tmp_path):
    runs = {"plain": (), "ahead": ("--num-workers", "2"), "device": ("--data-on-device",)}
    for name, flags in runs.items():
        start(*EXACT, *flags, name=name, steps=6)
    assert losses(tmp_path / "plain") == losses(tmp_path / "ahead") == losses(tmp_path / "device")


# ---- sampling


def as_pixels(latents):
    return (latents * 40 + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)[..., :3].contiguous()


@pytest.mark.parametrize("precision", ["no", "fp16"])
def test_images_do_not_depend_on_the_batch_size(monkeypatch, precision):
    monkeypatch.setitem(images.BLOCK_TOKENS, "cuda", 32)  # eight images a block
    model, labels = tiny_network().eval(), np.arange(64) % 3
    settings = Settings(num_steps=4, cfg_scale=1.5, precision=precision)
    made = []
    for size in (1, 8, 64):
        with images.arithmetic(tf32=True):
            parts = list(images.generate_images(model, as_pixels, labels, settings, range(64), size))
        made.append(torch.cat([part.images for part in parts]))
    assert made[0].float().std() > 1 and torch.equal(made[0], made[1]) and torch.equal(made[0], made[2])


def test_sampling_does_not_wait_for_the_device(monkeypatch):
    model = tiny_network().eval()
    velocity, calls = model.velocity, []

    def watched(*arguments):
        calls.append(1)
        if len(calls) == 3:
            torch.cuda.set_sync_debug_mode("error")
        if len(calls) == 12:  # the last: then the images go to the host
            torch.cuda.set_sync_debug_mode("default")
        return velocity(*arguments)

    monkeypatch.setattr(model, "velocity", watched)
    settings = Settings(num_steps=12, cfg_scale=1.5, precision="bf16")
    try:
        list(images.generate_images(model, as_pixels, np.arange(8) % 3, settings, range(8), 8))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(calls) == 12


# ---- training: no waiting, no races


@pytest.mark.parametrize("flags", [("--data-on-device",), ("--num-workers", "2"), ("--mixed-precision", "bf16")])
def test_training_does_not_wait_for_the_device(start, monkeypatch, flags):
    """From step 4 to step 9; the verdict of a step is waited for by its event alone, which this mode lets pass."""
    update = EMA.update

    def watched(ema, model, step):
        if step in (4, 9):
            torch.cuda.set_sync_debug_mode("error" if step == 4 else "default")
        update(ema, model, step)

    monkeypatch.setattr(EMA, "update", watched)
    try:
        assert start("--log-every", "100", *flags, steps=12)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_kernels_launched_one_by_one_train_alike(command, tmp_path):
    """Streams that raced would show: bit for bit the same with CUDA_LAUNCH_BLOCKING."""
    running = []
    for blocking in ("0", "1"):
        line = [sys.executable, "train.py", *command(*EXACT, "--num-workers", "2", name=f"blocking{blocking}")]
        environment = {**os.environ, "CUDA_LAUNCH_BLOCKING": blocking}
        running.append(subprocess.Popen(line, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True))
    for process in running:
        _, error = process.communicate(timeout=120)
        assert process.returncode == 0, error
    assert_same_run(tmp_path / "blocking0", tmp_path / "blocking1")


# ---- launchers


def torchrun_on_gpus(command, processes, *flags, name, **environment):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    line = [*launch, "train.py", *command(*flags, name=name, steps=4)]
    done = subprocess.run(
        line, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_one_process_of_a_launcher_trains_as_none(command, start, tmp_path):
    """With NCCL; of one process DDP and FSDP have nothing to exchange."""
    start(*EXACT, name="alone", steps=4)
    assert "1 processes" in torchrun_on_gpus(command, 1, *EXACT, name="launched")
    assert losses(tmp_path / "launched") == pytest.approx(losses(tmp_path / "alone"), rel=1e-6)


@two_gpus
@pytest.mark.parametrize("environment", [{}, SHARDED], ids=["DDP", "FSDP"])
def test_two_gpus_train_as_one(command, start, tmp_path, environment):
    if environment and not CAN_SHARD:
        pytest.skip("sharding needs torch 2.6")
    start(*EXACT, name="one", steps=4)
    torchrun_on_gpus(command, 2, *EXACT, name="two", **environment)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


def test_the_training_script_counts_the_gpus(data, tmp_path):
    """script/launch.sh by nvidia-smi, with the preset's flags and a toy network."""
    flags = ["--model", "DeepFlow-Tiny/2", "--trans-depth", "2", "--df-idxs", "1", "--batch-size", "8"]
    flags += ["--max-train-steps", "2", "--num-workers", "0"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "DATA_DIR": str(data), "OUTPUT_DIR": str(tmp_path), "EXP_NAME": "run"}
    line = ["bash", "script/small/train.sh", *flags]
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert f"{torch.cuda.device_count()} processes" in done.stdout and "on cuda" in done.stdout
    assert (tmp_path / "run" / "ema.safetensors").exists()
