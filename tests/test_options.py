"""The command line of `train.py`: every flag is explained, read, and has an effect or is refused."""

import sys

import pytest
import torch
from training_runs import ROOT

import train
from training import options as train_options
from training.options import build_parser, parse_options


def test_every_flag_is_explained_and_read():
    source = "".join(path.read_text() for path in (ROOT / "train.py", *(ROOT / "training").glob("*.py")))
    for action in build_parser()._actions:
        if action.dest != "help":
            assert action.help, action.dest
            assert f"options.{action.dest}" in source or action.dest in train_options.EXPERIMENT, action.dest


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
