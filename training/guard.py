"""What ends a run early: a loss that is not finite, and the scheduler's signals."""

import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from threading import Event

import torch
from torch import Tensor

STOP_SIGNALS = {signal.SIGTERM, signal.SIGUSR1}


def non_finite_terms(rank: int, terms: Iterable[tuple[Tensor, dict[str, Tensor]]], limit: int = 8) -> list[str]:
    """Which loss terms are not finite on one process, and for which samples; empty if all are finite.

    `terms` holds for each micro-batch the dataset indices (B,) and the named per-sample terms, each (B,).
    """
    bad: dict[str, list[int]] = {}
    for indices, named in terms:
        for name, values in named.items():
            wrong = indices[~torch.isfinite(values).cpu()].tolist()
            if wrong:
                bad.setdefault(name, []).extend(wrong)
    return [
        f"{name} loss on rank {rank}, samples {', '.join(map(str, samples[:limit]))}"
        + (f" and {len(samples) - limit} more" if len(samples) > limit else "")
        for name, samples in bad.items()
    ]


@contextmanager
def stop_request() -> Iterator[Event]:
    """An event that SIGTERM or SIGUSR1 sets, in place of ending the process at once."""
    stop = Event()
    previous = {number: signal.signal(number, lambda *_: stop.set()) for number in STOP_SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
