"""Two processes on the CPU train as one does, replicated or sharded, and go on from each other's checkpoints."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.training_runs import CAN_SHARD, COUNT, ROOT, SHARDED, assert_same_run, metrics_of, spoil, write_dataset
from safetensors.torch import load_file

from dataset import DataOrder
from training.run_state import saved_steps


def assert_alike(one, other, step, relative=1e-4, absolute=2e-5):
    """The same to rounding: metrics and average."""
    for entry, others in zip(metrics_of(one), metrics_of(other), strict=True):
        assert others == pytest.approx(entry, rel=relative)
    assert_same_weights(one, other, step, "ema", absolute)


def assert_same_weights(one, other, step, name, absolute=2e-5):
    """The same to rounding: one file of weights."""
    files = [run / "checkpoints" / f"step-{step:07d}" / f"{name}.safetensors" for run in (one, other)]
    weights, others = map(load_file, files)
    assert weights.keys() == others.keys()
    for key, tensor in weights.items():
        torch.testing.assert_close(others[key], tensor, rtol=0, atol=absolute)


def test_two_processes_train_as_one_and_ten_steps_equal_five_and_five_more(torchrun, start, tmp_path):
    one, whole, parts = (tmp_path / name for name in ("one", "whole", "parts"))
    start(name="one")
    torchrun(name="whole")
    for steps in (5, 10):
        torchrun(name="parts", steps=steps)
    assert saved_steps(parts) == [5, 10]
    assert_same_run(whole, parts)  # bit for bit
    assert_alike(one, whole, 10)


def test_two_processes_accumulate_in_half_precision_as_one(torchrun, start, tmp_path):
    flags = ("--mixed-precision", "bf16")
    start(*flags, name="one", steps=6)
    torchrun(*flags, "--gradient-accumulation-steps", "2", name="two", steps=6)
    assert_alike(tmp_path / "one", tmp_path / "two", 6, 0.02, 2e-3)


def test_a_sample_that_is_not_finite_is_named_with_its_process(torchrun, tmp_path):
    data = write_dataset(tmp_path / "spoilt")
    *before, third = map(DataOrder(COUNT, 8, seed=0).batch, range(3))
    sample = next(int(index) for index in third[4:] if index not in np.concatenate(before))  # of the second process
    spoil(data, sample)
    error = torchrun("--data-dir", data, "--checkpointing-steps", "1", code=1)
    assert f"error: step 2: not finite: velocity_1 loss on rank 1, samples {sample}; velocity_2 loss on rank 1" in error
    assert saved_steps(tmp_path / "run") == [1, 2]


def test_a_signal_to_one_process_stops_and_saves_all(command, tmp_path):
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "train.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    line += command(steps=100_000)
    run = subprocess.Popen(line, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 90
    while not (metrics.exists() and metrics.read_text()):
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    workers = [int(pid) for pid in children if b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGUSR1)
    out, _ = run.communicate(timeout=60)
    (step,) = saved_steps(tmp_path / "run")
    assert f"stopped by a signal and saved at step {step}" in out and run.returncode != 0


ENDS_LATE = """
import os, signal, sys, time
import train
from accelerate import Accelerator
from training.ema import EMA

end, update = Accelerator.end_training, EMA.update

def slow_end(accelerator):  # as a tracker that has much to send
    time.sleep(3 * (accelerator.process_index == 0))
    end(accelerator)

def interrupted(ema, model, step):
    os.kill(os.getpid(), signal.SIGTERM)
    update(ema, model, step)

Accelerator.end_training, EMA.update = slow_end, interrupted
try:
    train.main()
finally:
    if os.environ["RANK"] == "0":
        open(sys.argv[sys.argv.index("--output-dir") + 1] + "/first-ended", "w")
"""


def test_no_process_leaves_with_an_error_before_the_first_has_finished_its_reports(torchrun, tmp_path):
    """The launcher ends all others then, and what the first had still to report would be lost."""
    (tmp_path / "ends_late.py").write_text(ENDS_LATE)
    torchrun(program=tmp_path / "ends_late.py", code=1)  # torchrun's own code for any failure
    assert (tmp_path / "first-ended").exists() and saved_steps(tmp_path / "run") == [2]


ON_TWO_DISKS = """
import os, sys
import train

where = sys.argv.index("--output-dir") + 1
sys.argv[where] += "/disk" + os.environ["RANK"]
train.main()
"""


def test_machines_that_do_not_share_the_disk_are_told(torchrun, start, tmp_path):
    """The second would begin anew beside a first that resumes."""
    start("--output-dir", tmp_path / "disk0", steps=2)
    (tmp_path / "two_disks.py").write_text(ON_TWO_DISKS)
    error = torchrun(program=tmp_path / "two_disks.py", code=1)
    assert f"found different checkpoints of {tmp_path / 'disk0' / 'run'}, of steps 0, 2: give an --output-dir" in error
    assert [entry["step"] for entry in metrics_of(tmp_path / "disk0" / "run")] == [2]


def test_gradients_of_two_processes_are_those_of_one(torchrun, start, tmp_path):
    """After one step AdamW's first moment is a tenth of the gradient."""
    start(name="one", steps=1)
    start("--gradient-accumulation-steps", "4", name="parts", steps=1)
    torchrun(name="two", steps=1)
    gradients = [
        torch.load(tmp_path / name / "checkpoints" / "step-0000001" / "trainer.pt", weights_only=True)["optimizer"]
        for name in ("one", "parts", "two")
    ]
    for name, moments in gradients[0]["state"].items():
        for others in gradients[1:]:
            torch.testing.assert_close(others["state"][name]["exp_avg"], moments["exp_avg"], rtol=1e-4, atol=1e-8)
    losses = [metrics_of(tmp_path / name)[0]["loss"] for name in ("one", "parts", "two")]
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-6)


@pytest.mark.skipif(not CAN_SHARD, reason="needs torch 2.6")
def test_sharded_training_is_replicated_training_and_either_resumes_the_other(torchrun, start, tmp_path):
    flags = ("--ema-std", "0.1", "--gradient-accumulation-steps", "2", "--activation-checkpointing")
    one, mixed = tmp_path / "one", tmp_path / "mixed"
    start("--ema-std", "0.1", name="one", steps=9)
    assert "on cpu, sharded" in torchrun(*flags, name="mixed", steps=3, **SHARDED)
    assert "on cpu, sharded" not in torchrun(*flags, name="mixed", steps=6)
    torchrun(*flags, name="mixed", steps=9, **SHARDED)
    assert saved_steps(mixed) == [3, 6, 9]
    for name in ("model", "ema", "ema-std0.1"):
        assert_same_weights(one, mixed, 9, name)
    losses, others = ({entry["step"]: entry["loss"] for entry in metrics_of(run)} for run in (one, mixed))
    assert all(others[step] == pytest.approx(losses[step], rel=1e-4) for step in (2, 4, 6, 8))
