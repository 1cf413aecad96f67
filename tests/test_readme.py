"""What the README says of the command lines is true."""

import re
from pathlib import Path

import evaluate
import generate
from training import options

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")


def flags_of(parser):
    return {flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")}


def flag_table():
    section = README.split("## Flags of `train.py`")[1].split("\n## ")[0]
    return [line for line in section.splitlines() if line.startswith("| `--")]


def test_every_flag_of_train_is_in_the_table():
    flags = {flag for flag in flags_of(options.build_parser()) if not flag.startswith("--no-")}
    assert {flag for row in flag_table() for flag in FLAG.findall(row)} == flags - {"--help"}


def test_every_flag_mentioned_exists():
    known = flags_of(options.build_parser()) | flags_of(generate.build_parser()) | flags_of(evaluate.build_parser())
    known |= {
        "--encoder",
        "--every",
        "--dtype",
        "--source",
        "--dest",
        "--vae",
        "--resolution",
        "--flip",
        "--images",
        "--feature-weights",
    }  # dataset_tools
    assert set(FLAG.findall(README)) <= known


def test_defaults_in_the_table_are_the_parsers():
    defaults = {flag: action.default for action in options.build_parser()._actions for flag in action.option_strings}
    checked = 0
    for row in flag_table():
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        flags = FLAG.findall(cells[0])
        values = [value.strip(" `") for value in cells[1].split(",")] if len(cells) == 3 else []
        for flag, value in zip(flags, values, strict=False):
            if re.fullmatch(r"[\d.e-]+", value):
                default = defaults[flag]
                assert [float(value)] == (default if isinstance(default, list) else [default]), flag
                checked += 1
            elif value in (
                "off",
                "auto",
                "linear",
                "lognormal",
                "constant",
                "none",
                "v",
                "runs",
                "logs",
                "DeepFlow-XL/2",
            ):
                assert defaults[flag] == (False if value == "off" else value), flag
                checked += 1
    assert checked > 20
