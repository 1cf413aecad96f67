"""The training loop: exact resume, exact accumulation, nothing non-finite applied, mistakes in one line."""

import json
import os
import resource
import signal
import sys

import numpy as np
import pytest
import torch
from helpers.sample_data import start as start_process
from helpers.training_runs import COUNT, assert_same_run, metrics_of, spoil, write_dataset
from safetensors.torch import load_file

import train
from common import files
from common.errors import UserError
from dataset import DataOrder
from loss import DeepFlowLoss
from models import checkpoints
from preprocessing.pack import pack
from training import build, records
from training.ema import EMA
from training.guard import LossScale
from training.optimizer import schedule
from training.run_state import saved_steps
from training.step import noise_seed

# The first 20 losses of a tiny run on the CPU. They change only if the method, the initialisation or the random
# streams change: say why in the commit.
GOLDEN_LOSSES = [
    1.83365, 1.59932, 1.79850, 2.10400, 1.97369, 1.89958, 1.66480, 1.74717, 1.75172, 1.55861,
    1.62264, 1.61217, 1.87019, 1.97051, 1.71496, 1.63294, 1.61453, 1.45505, 1.51553, 1.57036,
]  # fmt: skip


# ---- resume


@pytest.mark.parametrize("flags", [(), ("--gradient-accumulation-steps", "2", "--lr-schedule", "cosine")])
def test_ten_steps_equal_five_a_signal_and_five_more(start, tmp_path, monkeypatch, flags):
    assert start(*flags, name="whole")
    update = EMA.update

    def interrupted(ema, model, step):
        interrupted.steps += 1
        if interrupted.steps == 5:  # in the middle of the second epoch, and of a line of the log
            os.kill(os.getpid(), signal.SIGTERM)
        update(ema, model, step)

    interrupted.steps = 0
    with monkeypatch.context() as patch:
        patch.setattr(EMA, "update", interrupted)
        assert not start(*flags, name="parts")
    # The signal came when step 5 had looked for one already: it is seen, and the run saved, one step later.
    assert saved_steps(tmp_path / "parts") == [6]
    assert not (tmp_path / "parts" / "ema.safetensors").exists()
    assert start(*flags, name="parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert load_file(tmp_path / "whole" / "ema.safetensors").keys()


def test_ten_steps_equal_five_that_ended_and_five_more(start, tmp_path):
    start(name="whole")
    start(name="parts", steps=5)
    assert [entry["step"] for entry in metrics_of(tmp_path / "parts")] == [2, 4, 5]
    start(name="parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_run_taken_back_and_stopped_says_how_to_go_on(start, tmp_path, monkeypatch, capsys):
    start("--checkpointing-steps", "2", steps=4)
    monkeypatch.setattr(EMA, "update", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert not start("--resume-step", "2")
    # The same command would set the checkpoint aside that it has just written.
    assert "saved at step 4: the same command without --resume-step goes on from there" in capsys.readouterr().out


def test_steps_after_the_last_checkpoint_are_repeated_not_logged_twice(start, tmp_path, monkeypatch):
    start(name="whole")
    update = EMA.update

    def crashing(ema, model, step):
        crashing.steps += 1
        if crashing.steps == 9:
            raise KeyboardInterrupt
        update(ema, model, step)

    crashing.steps = 0
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(EMA, "update", crashing)
        start("--checkpointing-steps", "5", name="parts")
    assert [entry["step"] for entry in metrics_of(tmp_path / "parts")] == [2, 4, 6, 8]
    start("--checkpointing-steps", "5", name="parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_finished_run_started_again_changes_nothing(start, tmp_path):
    start()
    run = tmp_path / "run"
    weights, metrics = load_file(run / "ema.safetensors"), metrics_of(run)
    assert start()
    again = load_file(run / "ema.safetensors")
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert metrics_of(run) == metrics


def test_two_commands_do_not_train_one_run(start, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LOCK_TIMEOUT", 0.1)
    with files.only_writer(tmp_path / "run"), pytest.raises(UserError, match=r"written by another.*change --exp-name"):
        start()
    assert list(tmp_path.iterdir()) == []
    start(steps=1)


def test_a_signal_that_comes_before_the_first_step_is_not_lost(start, tmp_path, monkeypatch):
    create = build.build_network
    monkeypatch.setattr(build, "build_network", lambda *given: os.kill(os.getpid(), signal.SIGUSR1) or create(*given))
    assert not start()
    assert saved_steps(tmp_path / "run") == [1]


def test_going_back_to_an_earlier_step_sets_later_checkpoints_aside(start, tmp_path):
    start("--checkpointing-steps", "4", name="whole")
    start("--checkpointing-steps", "4", name="back")
    start("--resume-step", "4", "--checkpointing-steps", "4", name="back", steps=7)
    assert saved_steps(tmp_path / "back") == [4, 7]
    assert len(list((tmp_path / "back" / "checkpoints" / "superseded").iterdir())) == 2
    start("--checkpointing-steps", "4", name="back")
    assert_same_run(tmp_path / "whole", tmp_path / "back")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--batch-size", "4"), "batch_size 8, now it is 4"),
        (("--seed", "1"), "seed 0, now it is 1"),
        (("--df-idxs", "[]"), r"df_idxs \[1\], now it is \[\]"),
        (("--qk-norm",), "qk_norm False, now it is True"),
        (("--resume", "none"), "--resume none, but"),
        (("--resume-step", "3"), "--resume-step 3, but"),
    ],
)
def test_a_contradiction_to_the_checkpoint_is_refused(start, tmp_path, flags, message):
    start(steps=1)
    before = (tmp_path / "run" / "options.json").read_bytes()
    with pytest.raises(UserError, match=message):
        start(*flags)
    assert (tmp_path / "run" / "options.json").read_bytes() == before


def test_rates_may_change_on_resume_and_do(start, tmp_path):
    start(steps=1)
    start("--adam-weight-decay", "0.1", "--adam-beta2", "0.95", "--learning-rate", "1e-4", steps=2)
    trainer = torch.load(tmp_path / "run" / "checkpoints" / "step-0000002" / "trainer.pt", weights_only=True)
    group = trainer["optimizer"]["param_groups"][0]
    assert (group["weight_decay"], group["betas"], group["lr"]) == (0.1, (0.9, 0.95), 1e-4)
    assert all(moments["step"] == 2 for moments in trainer["optimizer"]["state"].values())  # and the moments went on


def test_other_data_is_refused(start, tmp_path):
    start(steps=1)
    with pytest.raises(UserError, match=r"data 23 samples, \w+, now it is 23 samples, \w+"):
        start("--data-dir", write_dataset(tmp_path / "other", std=0.2))


def test_the_name_of_a_vae_counts_only_where_it_has_no_checksum(start, tmp_path):
    start(steps=1)
    start("--data-dir", write_dataset(tmp_path / "moved", vae="elsewhere/vae"), steps=2)
    for name in ("ema", "mse"):
        write_dataset(tmp_path / name, vae=name, vae_sha256=None)
    start("--data-dir", tmp_path / "ema", name="packed", steps=1)
    with pytest.raises(UserError, match="now it is 23 samples"):
        start("--data-dir", tmp_path / "mse", name="packed", steps=2)


# ---- batches


def test_accumulation_changes_nothing_but_memory(start, tmp_path):
    for parts in (1, 4):
        start("--gradient-accumulation-steps", parts, name=f"parts{parts}", steps=4)
    whole, parts = (metrics_of(tmp_path / f"parts{n}") for n in (1, 4))
    assert [e["loss"] for e in parts] == pytest.approx([e["loss"] for e in whole], rel=1e-5)
    assert [e["grad_norm"] for e in parts] == pytest.approx([e["grad_norm"] for e in whole], rel=1e-4)


def test_the_first_losses_are_the_golden_ones(start, tmp_path):
    start("--log-every", "1", steps=20)
    losses = [entry["loss"] for entry in metrics_of(tmp_path / "run")]
    assert losses == pytest.approx(GOLDEN_LOSSES, rel=5e-4), losses


# ---- the guard


def test_a_loss_that_is_not_finite_stops_before_the_update(command, tmp_path, monkeypatch):
    data = write_dataset(tmp_path / "spoilt")
    sample = int(DataOrder(COUNT, 8, seed=0).batch(2)[0])  # its first use is in the third step
    spoil(data, sample)
    monkeypatch.setattr(sys, "argv", ["train.py", *command("--data-dir", data, "--checkpointing-steps", "1")])
    with pytest.raises(SystemExit) as exit:
        train.main()
    message = exit.value.code  # a text: Python prints it and exits with 1
    assert message.startswith(
        f"error: step 2: not finite: velocity_1 loss on rank 0, samples {sample}; velocity_2 loss on rank 0, samples "
        f"{sample}; acceleration loss on rank 0, samples {sample}; not applied, the checkpoint of step 2 is intact; "
    )
    assert saved_steps(tmp_path / "run") == [1, 2]
    weights = load_file(tmp_path / "run" / "checkpoints" / "step-0000002" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())


class SteepLoss(DeepFlowLoss):
    """A finite loss with an infinite gradient."""

    def total(self, terms):
        return super().total(terms) + 1e30 * (terms.velocity - terms.velocity.detach()) * 1e30


def test_a_gradient_that_is_not_finite_stops_as_well(start, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "DeepFlowLoss", SteepLoss)
    with pytest.raises(train.NonFiniteLoss, match=r"step 0: finite loss, but gradient norm (inf|nan).*no checkpoint"):
        start()
    assert saved_steps(tmp_path / "run") == []


class LargeLoss(DeepFlowLoss):
    """Times a scale of 2^70 too large: the square of its gradient's norm is beyond float32."""

    def total(self, terms):
        return 1024 * super().total(terms)


def test_a_step_that_fp16_skips_is_repeated_and_moves_nothing(start, tmp_path, monkeypatch):
    """Scales are powers of two: in full precision, all that loss scaling could change is by steps that it skips."""
    monkeypatch.setattr(build, "DeepFlowLoss", LargeLoss)
    start(name="plain")
    monkeypatch.setattr(train, "build_loss_scale", lambda precision: LossScale(base=2.0**70))
    start(name="scaled")
    plain, scaled = metrics_of(tmp_path / "plain"), metrics_of(tmp_path / "scaled")
    assert len({entry["loss_scale"] for entry in scaled}) == 1 and scaled[0]["loss_scale"] < 2.0**70
    skipped = np.log2(2.0**70 / scaled[0]["loss_scale"])
    assert scaled[0]["skipped_rate"] == skipped / (skipped + 2)
    assert [entry | {"loss_scale": 1.0, "skipped_rate": 0.0} for entry in scaled] == plain
    weights, others = (load_file(tmp_path / name / "ema.safetensors") for name in ("plain", "scaled"))
    assert all(torch.equal(weights[key], others[key]) for key in weights)


def test_fp16_that_overflows_at_every_scale_stops(start, monkeypatch):
    monkeypatch.setattr(build, "DeepFlowLoss", SteepLoss)
    monkeypatch.setattr(train, "build_loss_scale", lambda precision: LossScale())
    with pytest.raises(train.NonFiniteLoss, match="step 0: finite loss, but gradient norm"):
        start()


# ---- what a run leaves


@pytest.mark.parametrize("flags", [("--df-idxs", "[]"), ("--model", "SiT-Tiny/2", "--df-idxs"), ("--df-idxs", "[1]")])
def test_any_number_of_branches_trains_and_leaves_a_model(start, tmp_path, flags):
    start(*flags, steps=3)
    branches = 2 if flags[-1] == "[1]" else 1
    entry = metrics_of(tmp_path / "run")[-1]
    assert sum(key.startswith("velocity_") for key in entry) == branches
    assert (entry["acceleration"] > 0) == (branches > 1)
    model = checkpoints.load(tmp_path / "run" / "ema.safetensors")
    assert model.num_branches == branches and model.config["input_size"] == 4
    with torch.no_grad():
        assert model.velocity(torch.randn(2, 4, 4, 4), torch.rand(2), torch.tensor([0, 3])).isfinite().all()


def test_records(start, tmp_path):
    start("--keep-last", "1", "--checkpointing-steps", "2", steps=5)
    run = tmp_path / "run"
    assert saved_steps(run) == [5]
    record = json.loads((run / "options.json").read_text())
    assert record["options"]["resolution"] == 32 and record["options"]["num_classes"] == 3
    assert record["config"]["df_idxs"] == [1] and torch.__version__.startswith(record["versions"]["torch"])
    metadata = checkpoints.read(run / "ema.safetensors").metadata
    assert metadata["step"] == 5 and metadata["path_type"] == "linear" and metadata["vae"] == "assets/vae"
    assert metadata["scaling_factor"] == 0.5 and metadata["class_names"] == ["a", "b", "c"]
    assert sum(metadata["class_counts"]) == COUNT
    entry = metrics_of(run)[-1]
    assert entry["step"] == 5 and entry["epoch"] == pytest.approx(40 / COUNT) and entry["lr"] == 1e-3
    total = 0.2 * entry["velocity_1"] + entry["velocity_2"] + entry["acceleration"]
    assert entry["loss"] == pytest.approx(total, rel=1e-5)
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_zero_steps_leave_the_untrained_weights(start, tmp_path):
    assert start(steps=0)
    assert checkpoints.load(tmp_path / "run" / "ema.safetensors").num_branches == 2


def test_epochs_count_passes_over_the_data(start, tmp_path):
    start("--epochs", "2", steps=100)
    assert saved_steps(tmp_path / "run") == [6]  # 2 x 23 / 8, rounded up


def test_a_dry_run_tells_the_plan_and_writes_nothing(start, tmp_path, capsys):
    assert start("--dry-run", "--gradient-accumulation-steps", "4")
    out = capsys.readouterr().out
    assert "8 = 1 processes x 4 accumulated x 2" in out and "23 images of 32 px in 3 classes" in out
    assert not (tmp_path / "run").exists()


def test_the_official_layout_packed_and_on_the_device_train_alike(start, tmp_path):
    files, packed, rng = tmp_path / "latents" / "vae-sd", tmp_path / "packed", np.random.default_rng(0)
    labels = []
    for index in range(COUNT):
        file = files / f"0000{index % 2}" / f"img-mean-std-{index:08d}.npy"
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file, rng.uniform(0.1, 1, (8, 4, 4)).astype(np.float32))
        labels.append([file.relative_to(files).as_posix(), index % 3])
    (files / "dataset.json").write_text(json.dumps({"labels": labels}))
    pack(files, packed, dtype="float32", num_workers=0)
    runs = {"files": ("--data-dir", files.parent), "packed": ("--data-dir", packed)}
    runs["device"] = (*runs["packed"], "--data-on-device")
    for name, flags in runs.items():
        start(*flags, name=name, steps=4)
    assert metrics_of(tmp_path / "files") == metrics_of(tmp_path / "packed") == metrics_of(tmp_path / "device")


def test_cosine_schedule():
    assert [schedule("cosine", step, 4) for step in (0, 2, 4)] == pytest.approx([1, 0.5, 0])
    assert schedule("constant", 3, 4) == 1


def test_noise_seeds_differ_between_steps_and_seeds():
    seeds = {noise_seed(seed, step) for seed in range(12) for step in range(50)}
    assert len(seeds) == 600


def test_a_signal_has_its_own_exit_code(command, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", *command()])
    monkeypatch.setattr(train, "train", lambda options: False)
    with pytest.raises(SystemExit) as exit:
        train.main()
    assert exit.value.code == 143


def limited(work, *arguments):
    """Exit code of `work` in a process that may write no file of more than 3 MB, as if the disk were full then."""

    def run():
        resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, 3_000_000))
        work(*arguments)

    process = start_process(run)
    process.join()
    return process.exitcode


def test_a_disk_that_is_full_at_the_end_is_one_line(start, command, tmp_path, monkeypatch, capfd):
    start(steps=1)
    (tmp_path / "run" / "ema.safetensors").unlink()
    monkeypatch.setattr(sys, "argv", ["train.py", *command(steps=1)])
    assert limited(train.main) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {tmp_path / 'run' / 'ema.safetensors'}: ") and "too large" in error.lower()
    assert not list((tmp_path / "run").glob("*ema*"))


def test_what_a_power_failure_left_of_the_metrics_keeps_no_run_from_going_on(start, tmp_path):
    start(steps=4)
    metrics = tmp_path / "run" / "metrics.jsonl"
    whole = metrics.read_bytes()
    first, second = whole.splitlines(keepends=True)
    metrics.write_bytes(first + bytes(len(second) - 1) + b"\n" + b"\xff\n[]\n" + second[:9])
    start(steps=6)
    assert [entry["step"] for entry in metrics_of(tmp_path / "run")] == [2, 6]


def test_metrics_on_a_full_disk_are_one_line(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as error:
        records.append_metrics(tmp_path, {"step": 1})
    assert error.value.filename == str(tmp_path / "metrics.jsonl")  # errors without a name end in a traceback
