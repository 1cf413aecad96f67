"""Outputs of the official code, and how far from them is too far."""

from pathlib import Path

GOLDEN = Path(__file__).resolve().parent.parent / "golden"


def relative_error(actual, expected):
    """Norm of the difference over the norm of what was expected."""
    return ((actual.detach() - expected).norm() / expected.norm()).item()
