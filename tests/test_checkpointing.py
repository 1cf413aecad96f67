"""Checkpoints of a run: whole or not there, and never executed."""

import errno
import json
import os
import pickle

import pytest
import torch

from common.errors import UserError
from models import DeepFlow, checkpoints
from training import run_state
from training.run_state import TrainingState, find, folder_of, saved_steps

EXPERIMENT = {"batch_size": 8, "df_idxs": [1], "scale_weight": None}


@pytest.fixture
def network():
    torch.manual_seed(0)
    return DeepFlow(hidden_size=16, depth=2, num_heads=2, num_classes=3, projector_dim=8, df_idxs=[1], input_size=4)


def save(run, network, step, keep_last=None, keep_every=None):
    ema = {name: tensor + step for name, tensor in network.state_dict().items()}
    trainer = {"optimizer": {"state": {0: {"step": torch.tensor(float(step))}}}, "log": {"window": [[0.1, step]]}}
    averages = {"0.9": ema, "std0.1": {name: tensor + 1 for name, tensor in ema.items()}}
    state = TrainingState(step, EXPERIMENT, network.state_dict(), averages, trainer)
    return run_state.save(run, state, network.config, {"step": step}, keep_last, keep_every)


def test_what_is_loaded_is_what_was_saved(tmp_path, network):
    folder = save(tmp_path, network, 500)
    assert folder == tmp_path / "checkpoints" / "step-0000500"
    assert {path.name for path in folder.iterdir()} == {
        "model.safetensors", "ema.safetensors", "ema-std0.1.safetensors", "trainer.pt", "state.json"
    }  # fmt: skip
    state = run_state.load(folder, EXPERIMENT)
    assert state.step == 500 and state.experiment == EXPERIMENT
    for name, tensor in network.state_dict().items():
        assert torch.equal(state.model[name], tensor) and torch.equal(state.ema["0.9"][name], tensor + 500)
        assert torch.equal(state.ema["std0.1"][name], tensor + 501)
    assert state.trainer["log"] == {"window": [[0.1, 500]]}
    assert state.trainer["optimizer"]["state"][0]["step"] == 500


def test_a_folder_is_a_checkpoint_for_sampling(tmp_path, network):
    model = checkpoints.load(save(tmp_path, network, 3))
    assert model.config == network.config
    assert torch.equal(model.x_embedder.proj.bias, network.x_embedder.proj.bias + 3)


def test_only_the_newest_are_kept(tmp_path, network):
    for step in (5, 10, 15):
        save(tmp_path, network, step, keep_last=2)
    assert saved_steps(tmp_path) == [10, 15]


def test_every_mth_is_kept_beside_the_newest(tmp_path, network):
    for step in (5, 10, 15, 20, 25):
        save(tmp_path, network, step, keep_last=1, keep_every=10)
    assert saved_steps(tmp_path) == [10, 20, 25]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 3


def test_steps_beyond_seven_digits_sort_as_numbers(tmp_path):
    for step in (9_999_999, 10_000_000, 5):
        folder_of(tmp_path, step).mkdir(parents=True)
    assert saved_steps(tmp_path) == [5, 9_999_999, 10_000_000]


def fail(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("broken", ["torch.save", "os.fsync", "training.run_state.checkpoints.save"])
def test_a_full_disk_leaves_the_previous_checkpoint_and_says_so(tmp_path, network, monkeypatch, broken):
    before = save(tmp_path, network, 5, keep_last=1)
    monkeypatch.setattr(broken, fail)
    with pytest.raises(UserError, match=r"step 10 could not be written.*No space left.*step 5 is intact"):
        save(tmp_path, network, 10, keep_last=1)
    assert [path.name for path in before.parent.iterdir()] == ["step-0000005"]
    assert run_state.load(before, EXPERIMENT).step == 5


def test_a_save_that_was_killed_is_not_seen_and_not_in_the_way(tmp_path, network, monkeypatch):
    save(tmp_path, network, 5)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "fsync", killed)
        save(tmp_path, network, 10)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2  # what kill -9 leaves behind
    assert saved_steps(tmp_path) == [5] and find(tmp_path, "auto", None) == folder_of(tmp_path, 5)
    save(tmp_path, network, 12)
    assert saved_steps(tmp_path) == [5, 12] and len(list((tmp_path / "checkpoints").iterdir())) == 2


def test_where_a_run_begins(tmp_path, network):
    assert find(tmp_path / "new", "auto", None) is None and find(tmp_path / "new", "none", None) is None
    for step in (5, 10):
        save(tmp_path, network, step)
    assert find(tmp_path, "auto", None) == folder_of(tmp_path, 10)
    assert find(tmp_path, "auto", 5) == folder_of(tmp_path, 5)
    with pytest.raises(UserError, match=r"--resume-step 7.*5, 10"):
        find(tmp_path, "auto", 7)
    with pytest.raises(UserError, match=r"up to step 10.*--exp-name"):
        find(tmp_path, "none", None)


def test_a_finished_run_without_checkpoints_is_not_overwritten(tmp_path):
    (tmp_path / "ema.safetensors").touch()
    for resume in ("auto", "none"):
        with pytest.raises(UserError, match="of a finished run, and no checkpoint"):
            find(tmp_path, resume, None)


def test_later_checkpoints_are_set_aside_not_lost(tmp_path, network):
    for step in (5, 10, 15):
        save(tmp_path, network, step)
    run_state.set_aside_after(tmp_path, 5)
    assert saved_steps(tmp_path) == [5]
    aside = tmp_path / "checkpoints" / "superseded" / "step-0000015"
    assert run_state.load(aside, EXPERIMENT).step == 15


@pytest.mark.parametrize(
    "name", ["model.safetensors", "ema.safetensors", "ema-std0.1.safetensors", "trainer.pt", "state.json"]
)
@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_damage_is_told_in_one_line(tmp_path, network, name, damage):
    folder = save(tmp_path, network, 5)
    file = folder / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]) if damage == "truncated" else file.unlink()
    with pytest.raises(UserError, match=r"step-0000005 is damaged.*: delete it, and the run resumes") as error:
        run_state.load(folder, EXPERIMENT)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["[]", '{"step": 5, "averages": ["0.9"], "experiment": []}', "null"])
def test_a_summary_of_another_kind_is_damage(tmp_path, network, content):
    folder = save(tmp_path, network, 5)
    (folder / "state.json").write_text(content)
    with pytest.raises(UserError, match="is damaged"):
        run_state.load(folder, EXPERIMENT)


class Malicious:
    """Unpickled, it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_nothing_in_a_checkpoint_is_executed(tmp_path, network):
    folder = save(tmp_path, network, 5)
    torch.save({"optimizer": Malicious(tmp_path / "executed")}, folder / "trainer.pt", pickle_module=pickle)
    with pytest.raises(UserError, match=r"^.*damaged.*$"):
        run_state.load(folder, EXPERIMENT)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("batch_size", 16, "batch_size 8, now it is 16"),
        ("df_idxs", [1, 2], r"df_idxs \[1\], now it is \[1, 2\]"),
        ("scale_weight", [0.5, 1.0], r"scale_weight None, now it is \[0.5, 1.0\]"),
    ],
)
def test_another_experiment_is_refused_naming_both_values(tmp_path, network, name, given, message):
    folder = save(tmp_path, network, 5)
    with pytest.raises(UserError, match=message):
        run_state.load(folder, EXPERIMENT | {name: given})


def test_the_summary_is_plain_json(tmp_path, network):
    summary = json.loads((save(tmp_path, network, 5) / "state.json").read_text())
    assert summary == {"step": 5, "averages": ["0.9", "std0.1"], "experiment": EXPERIMENT}
