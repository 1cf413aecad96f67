"""Runs killed -9 at random moments of their work and started again until done: nothing is lost, nothing differs.

DEEPFLOW_KILLED_RUNS=100 python -m pytest tests/test_train_killed.py        as many as that, where the default is a few
"""

import multiprocessing
import os
import random
import re
import shutil
import signal

import pytest
from helpers.sample_data import dying_at
from helpers.training_runs import assert_same_run

import train
from training.ema import EMA
from training.options import parse_options
from training.run_state import saved_steps

RUNS = int(os.environ.get("DEEPFLOW_KILLED_RUNS", "2"))
# Processes with the modules loaded, forked from one that has never trained: other tests may leave autograd threads.
FRESH = multiprocessing.get_context("forkserver")
FRESH.set_forkserver_preload(
    ["train", "matplotlib.pyplot", "PIL.Image", "pytest", "safetensors.torch", "torch._dynamo"]
)
EVERY = 3  # steps between checkpoints


def first_step_of(log):
    """The step at which an attempt began, as it said; None if it was killed before."""
    match = re.search(r"steps (\d+) to", log.read_text())
    return match and int(match[1])


def train_logged(line, folder, log, moment):
    """Train until a moment of `dying_at`, steps counted too, with all that is printed and their number in a file."""
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    count, reach = dying_at(moment, folder)
    update = EMA.update
    EMA.update = lambda *given: (reach(), update(*given))
    train.train(parse_options(line))
    print(f"{count.value} moments", flush=True)


def test_killed_runs_lose_no_more_than_since_the_last_checkpoint(command, tmp_path):
    flags = ("--checkpointing-steps", EVERY, "--keep-last", "2")

    def attempt(name, log, moment):
        line = command(*flags, name=name, steps=10)
        process = FRESH.Process(target=train_logged, args=(line, tmp_path / name, log, moment))
        process.start()
        process.join()
        return process

    log = tmp_path / "whole.log"
    assert attempt("whole", log, None).exitcode == 0, log.read_text()
    total = int(re.search(r"(\d+) moments", log.read_text())[1])
    moments, kills = random.Random(0), 0
    for number in range(RUNS):
        name, log = f"run{number}", tmp_path / f"run{number}.log"
        run, reached = tmp_path / name, 0
        for _ in range(60):
            before = max(saved_steps(run), default=0)
            process = attempt(name, log, moments.randint(1, total))
            assert first_step_of(log) in (None, before) and reached - before <= EVERY
            if process.exitcode == 0:
                break
            assert process.exitcode == -signal.SIGKILL, log.read_text()
            kills += 1
            reached = max([before, *map(int, steps_logged(run))])
        else:
            pytest.fail("60 attempts did not complete one run")
        assert_same_run(tmp_path / "whole", run)
        shutil.rmtree(run)
    print(f"{RUNS} runs, killed {kills} times")
    assert kills > 0


def steps_logged(run):
    """Steps that reached metrics.jsonl, a line cut short by the kill left out."""
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [line.split('"step": ')[1].split(",")[0] for line in lines if line.endswith("\n")]


@pytest.mark.parametrize("late", [0.0, 0.5, 1.0])
def test_deleting_old_checkpoints_is_safe_at_any_moment(tmp_path, monkeypatch, late):
    """A kill in the middle of a deletion leaves a checkpoint whole, or out of sight."""
    from training import run_state

    folder = run_state.folder_of(tmp_path, 5)
    folder.mkdir(parents=True)
    for number in range(4):
        (folder / str(number)).write_bytes(b"x")

    def cut_short(path, **_):
        if not path.exists():  # what an earlier deletion might have left
            return
        for file in sorted(path.iterdir())[: int(4 * late)]:
            file.unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(run_state.shutil, "rmtree", cut_short)
    with pytest.raises(KeyboardInterrupt):
        run_state.delete(folder)
    assert saved_steps(tmp_path) in ([], [5])
    if saved_steps(tmp_path):
        assert len(list(folder.iterdir())) == 4
