"""The command line of `train.py`: every flag is explained, read, and has an effect or is refused."""

import pkgutil
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.fsdp
from accelerate.state import AcceleratorState
from helpers.training_runs import ROOT, metrics_of, tiny_command

import train
from common.errors import UserError
from models import checkpoints
from training import options as train_options
from training.options import build_parser, parse_options
from training.plan import make_plan

# Flags that change the numbers of a run, with a value that must.
CHANGING = {
    "--model": ("DeepFlow-S/2", "--df-idxs", "1"),
    "--trans-depth": ("3",),
    "--df-idxs": ("[]",),
    "--qk-norm": (),
    "--path-type": ("cosine",),
    "--weighting": ("uniform",),
    "--cfg-prob": ("1",),
    "--tg-upper-bound": ("0.5",),
    "--scale-weight": ("1", "1"),
    "--acc-coeff": ("0.5",),
    "--learning-rate": ("1e-2",),
    "--lr-schedule": ("cosine",),
    "--adam-beta1": ("0.5",),
    "--adam-beta2": ("0.5",),
    "--adam-weight-decay": ("0.5",),
    "--adam-epsilon": ("0.1",),
    "--max-grad-norm": ("0.01", "--adam-epsilon", "1e-3"),  # AdamW without epsilon does not see a gradient's size
    "--mixed-precision": ("bf16",),
    "--seed": ("1",),
}
# Flags that must not change them beyond rounding, each with what shows that it was followed: a name to spy on.
NEUTRAL = {
    "--activation-checkpointing": ((), "models.deepflow.checkpoint"),
    "--compile": ((), "torch.nn.Module.compile"),
    "--fused-attn": (("--no-fused-attn",), "training.build.sdpa_kernel"),
    "--data-on-device": ((), "train.DeviceLatents"),
    "--num-workers": (("2",), "dataset.ThreadPoolExecutor"),
    "--gradient-accumulation-steps": (("2",), None),  # test_accumulation_changes_nothing_but_memory
    "--allow-tf32": ((), "torch.set_float32_matmul_precision"),
}
# Flags with tests of their own.
ELSEWHERE = {
    "--exp-name": "test_mistakes_are_one_line_and_write_nothing",
    "--output-dir": "test_records",
    "--data-dir": "test_other_data_is_refused",
    "--resume": "test_a_contradiction_to_the_checkpoint_is_refused",
    "--resume-step": "test_going_back_to_an_earlier_step_sets_later_checkpoints_aside",
    "--checkpointing-steps": "test_going_back_to_an_earlier_step_sets_later_checkpoints_aside",
    "--keep-last": "test_records",
    "--keep-every": "test_every_mth_is_kept_beside_the_newest",
    "--log-every": "test_the_first_losses_are_the_golden_ones",
    "--report-to": "test_reports_go_to_the_logging_folder",
    "--logging-dir": "test_reports_go_to_the_logging_folder",
    "--dry-run": "test_a_dry_run_tells_the_plan_and_writes_nothing",
    "--num-classes": "test_mistakes_are_one_line_and_write_nothing",
    "--resolution": "test_mistakes_are_one_line_and_write_nothing",
    "--batch-size": "test_a_contradiction_to_the_checkpoint_is_refused",
    "--prediction": "test_mistakes_are_one_line_and_write_nothing",
    "--legacy-scaling": "test_architecture_flags_reach_the_checkpoint",
    "--epochs": "test_epochs_count_passes_over_the_data",
    "--max-train-steps": "test_zero_steps_leave_the_untrained_weights",
    "--ema-decay": "test_a_run_is_exported_in_half_precision_with_its_card",
    "--ema-std": "test_sharded_training_is_replicated_training_and_either_resumes_the_other",
    **dict.fromkeys(["--preview-every", "--preview-samples", "--preview-vae"], "test_previews_are_pictures"),
    "--preview-cfg-scale": "test_previews_are_pictures",
    **dict.fromkeys(["--preview-reference", "--preview-features"], "test_previews_are_scored"),
    "--preview-feature-weights": "test_previews_are_scored",
    **dict.fromkeys(["--ssl-align", "--enc-type"], "test_images_and_features_train_alike_and_the_cosine_rises"),
    "--ssl-features": "test_images_and_features_train_alike_and_the_cosine_rises",
    "--enc-weights": "test_several_encoders_at_once",
    "--proj-coeff": "test_images_and_features_train_alike_and_the_cosine_rises",
    "--repa-depth": "test_a_sit_is_aligned_after_the_block_that_is_named",
}


def test_every_flag_has_a_test_of_its_effect():
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    assert all(f"def {name}(" in tests for name in ELSEWHERE.values())
    flags = {action.option_strings[0] for action in build_parser()._actions if action.dest != "help"}
    assert flags == CHANGING.keys() | NEUTRAL.keys() | ELSEWHERE.keys()
    assert len(flags) == len(CHANGING) + len(NEUTRAL) + len(ELSEWHERE)


@pytest.fixture(scope="module")
def usual(data, tmp_path_factory):
    """The metrics of a run without further flags."""
    folder = tmp_path_factory.mktemp("usual")
    train.train(parse_options(tiny_command(data, folder, steps=4)))
    AcceleratorState._reset_state(reset_partial_state=True)
    return metrics_of(folder / "run")


@pytest.mark.parametrize("flag", CHANGING)
def test_flags_that_change_the_numbers_do(start, usual, tmp_path, flag):
    start(flag, *CHANGING[flag], steps=4)
    now = metrics_of(tmp_path / "run")
    numbers = "velocity_2" if flag in ("--scale-weight", "--acc-coeff") else "loss"
    if flag == "--df-idxs":
        assert "velocity_2" not in now[-1]
    else:
        assert now[-1][numbers] != usual[-1][numbers]


@pytest.mark.parametrize("flag", NEUTRAL)
def test_flags_that_must_not_change_the_numbers_do_not(start, usual, tmp_path, monkeypatch, flag):
    values, spied = NEUTRAL[flag]
    calls = []
    if spied:
        place, name = spied.rsplit(".", 1)
        original = getattr(pkgutil.resolve_name(place), name)

        def spy(*args, **kwargs):
            calls.append((args, kwargs))
            return None if flag == "--compile" else original(*args, **kwargs)  # a compiler's seconds are not spent here

        monkeypatch.setattr(spied, spy)
    start(*([] if values and values[0].startswith("--") else [flag]), *values, steps=4)
    torch.set_float32_matmul_precision("highest")
    for entry, others in zip(usual, metrics_of(tmp_path / "run"), strict=True):
        assert others == pytest.approx(entry, rel=1e-4)
    assert calls or not spied
    if flag == "--allow-tf32":
        assert calls[0][0] == ("high",)


def test_architecture_flags_reach_the_checkpoint(start, tmp_path):
    start("--legacy-scaling", "--qk-norm", steps=1)
    config = checkpoints.load(tmp_path / "run").config
    assert config["legacy_scaling"] and config["qk_norm"]


def test_reports_go_to_the_logging_folder(start, tmp_path):
    start("--report-to", "tensorboard", "--logging-dir", "kept/here", steps=2)
    assert list((tmp_path / "run" / "kept" / "here").rglob("events.out.tfevents*"))
    assert metrics_of(tmp_path / "run")  # and to metrics.jsonl always


def test_weights_and_biases_without_a_login_records_offline_and_says_nothing_of_it(start, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    start("--report-to", "wandb", steps=2)
    assert list((tmp_path / "run" / "logs" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert "deprecated" not in capfd.readouterr().err  # what W&B is going to drop would end a run one day


def test_every_flag_is_explained_and_read():
    source = "".join(path.read_text() for path in (ROOT / "train.py", *(ROOT / "training").glob("*.py")))
    for action in build_parser()._actions:
        if action.dest != "help":
            assert action.help, action.dest
            assert re.search(rf"options\.{action.dest}\b", source) or action.dest in train_options.EXPERIMENT, (
                action.dest
            )


@pytest.mark.parametrize(
    ("words", "expected"), [("8 16", [8, 16]), ("[8,16]", [8, 16]), ("[8, 16]", [8, 16]), ("[]", []), ("", [])]
)
def test_branch_lists_in_either_spelling(words, expected):
    required = ["--exp-name", "x", "--data-dir", "x"]
    assert parse_options([*required, "--df-idxs", *words.split()]).df_idxs == expected
    assert parse_options([*required, "--df-idxs", words]).df_idxs == expected


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--trans-depth", "3", "--df-idxs", "2", "1"), "strictly increasing"),
        (("--df-idxs", "5"), "must lie in 1..1"),
        (("--df-idxs", "1.5"), "--df-idxs '1.5' given, expected integers"),
        (("--scale-weight", "1.0"), "2 branches"),
        (("--scale-weight", "1", "nan"), "--scale-weight"),
        (("--model", "DiT-XL/2"), "unknown model"),
        (("--model", "SiT-Tiny/2"), "one branch"),
        (("--path-type", "spiral"), "--path-type"),
        (("--weighting", "gaussian"), "--weighting"),
        (("--batch-size", "0"), "argument --batch-size: '0' given, expected an integer"),
        (("--batch-size", "ten"), "--batch-size"),
        (("--gradient-accumulation-steps", "3"), "--batch-size 8 is not divisible by 3"),
        (("--resolution", "256"), "--resolution 256 given, but the dataset"),
        (("--num-classes", "1000"), "--num-classes 1000 given, but the dataset"),
        (("--mixed-precision", "fp16"), "choose bf16 or no"),
        (("--cfg-prob", "1.5"), "--cfg-prob"),
        (("--ema-decay", "1"), "--ema-decay"),
        (("--learning-rate", "nan"), "--learning-rate"),
        (("--data-dir", "/nowhere"), "/nowhere"),
        (("--exp-name", "a/b"), "--exp-name"),
        (("--resume-step", "5"), "--resume-step 5, but"),
        (("--prediction", "eps"), "--prediction"),
        (("--logging-dir", "/elsewhere"), "--logging-dir '/elsewhere' given"),
        (("--ema-decay", "0.9", "0.90"), "--ema-decay [0.9, 0.9] given"),
        (("--ema-std", "0.5"), "--ema-std"),
        (("--ema-decay",), "give at least one average"),
        (("--keep-every", "5"), "--keep-every 5 without --keep-last"),
        (("--preview-reference", "x.npz"), "without --preview-every"),
        (("--ema-param", "0.9"), "unrecognized arguments: --ema-param 0.9"),
        (("--batch", "8"), "unrecognized arguments: --batch"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(command, tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["train.py", *command(*flags)])
    with pytest.raises(SystemExit) as exit:
        train.main()
    error = capsys.readouterr().err
    assert exit.value.code == 2
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_plan_has_resolved_options_that_nothing_can_change(command):
    given = parse_options(command())
    before = dict(vars(given))
    options = make_plan(given, 1, torch.device("cpu")).options
    assert vars(given) == before and given.mixed_precision is None
    assert options.mixed_precision == "no" and None not in (options.resolution, options.num_classes)
    assert list(vars(options)) == list(before)  # options.json keeps its order
    with pytest.raises(AttributeError, match="resolved options cannot be changed: seed"):
        options.seed = 1
    with pytest.raises(AttributeError, match="resolved options cannot be changed: seed"):
        del options.seed


def test_sharding_with_a_torch_that_cannot_is_refused(start, tmp_path, monkeypatch):
    monkeypatch.setattr("training.plan.is_sharded", lambda: True)
    monkeypatch.delattr(torch.distributed.fsdp, "fully_shard", raising=False)
    with pytest.raises(UserError, match=r"needs torch 2\.6 or newer"):
        start()
    assert list(tmp_path.iterdir()) == []
