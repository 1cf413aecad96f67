"""Kinds of command-line values, each checked as it is read."""

import argparse
from collections.abc import Callable, Sequence

import torch

from common.errors import UserError

# What a network runs in by autocast; "no" is no autocast.
PRECISIONS = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def number(kind: type, low: float, high: float = float("inf"), below: bool = False) -> Callable[[str], float]:
    """A parser of numbers in [low, high], or [low, high) if `below`, for `add_argument(type=...)`."""

    def parse(text: str) -> float:
        expected = f"{'an integer' if kind is int else 'a number'} in [{low}, {high}{')' if below else ']'}"
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high or (below and value == high):
            raise argparse.ArgumentTypeError(f"{text!r} given, expected {expected}")
        return value

    return parse


def numbers(words: Sequence[str] | None, kind: type, flag: str) -> list | None:
    """A list flag in either spelling: `8 16` or "[8, 16]". None stays None; "[]" is the empty list."""
    if words is None:
        return None
    text = " ".join(words).strip()
    try:
        return [kind(word) for word in text.removeprefix("[").removesuffix("]").replace(",", " ").split()]
    except ValueError:
        noun = "integers" if kind is int else "numbers"
        raise UserError(f'{flag} {text!r} given, expected {noun} such as 8 16 or "[8, 16]"') from None
