"""What protects a run: the verdict on each step, the loss scale of fp16, and the scheduler's signals.

A step's verdict is a few numbers, the same on all processes. The device computes them and lets the optimizer's kernel
apply the step only if all are finite; the host reads them while the device works on the next step, so that the
device never waits for the host.
"""

import errno
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event
from typing import Any, TextIO

import torch
from torch import Tensor

NamedTerms = tuple[Tensor, dict[str, Tensor]]  # dataset indices (B,), and per-sample loss terms (B,) by name

STOP_SIGNALS = {signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP}
LESS_MEMORY = (
    "raise --gradient-accumulation-steps, which computes the same in smaller parts, add --activation-checkpointing, or "
    "lower --batch-size"
)
MAX_SKIPPED = 30  # halvings of the loss scale in a row, after which a smaller scale will not help


class Verdict:
    """Numbers on their way from the device to the host: `read` waits for them, and only for them."""

    def __init__(self, values: Tensor) -> None:
        self._event = None
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._values = values.clone()

    def read(self) -> list[float]:
        """The numbers."""
        if self._event is not None:
            self._event.synchronize()
        return self._values.tolist()


@dataclass
class LossScale:
    """The factor that keeps fp16 gradients in range: halved when a step overflowed, doubled after 2000 good steps.

    Attributes:
        base: the factor after the latest halving, a power of two; always 1 where nothing can overflow.
        good: steps applied since then.
        skipped: attempts in a row that were not applied.
    """

    base: float = 2.0**16
    dynamic: bool = True
    good: int = 0
    skipped: int = 0
    growth_interval = 2000

    def value(self, ahead: int = 0) -> float:
        """The factor of the next step, or of one `ahead` of it, provided that those before are applied."""
        return self.base * 2.0 ** ((self.good + ahead) // self.growth_interval) if self.dynamic else 1.0

    def applied(self) -> None:
        """A step was applied."""
        self.good, self.skipped = self.good + 1, 0

    def overflowed(self) -> bool:
        """A step was not applied; whether another attempt, with half the factor, makes sense."""
        self.base, self.good, self.skipped = self.value() / 2, 0, self.skipped + 1
        return self.dynamic and self.skipped <= MAX_SKIPPED

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"base": self.base, "good": self.good}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from `state_dict`."""
        self.base, self.good = state["base"], state["good"]


def non_finite_terms(rank: int, terms: Iterable[NamedTerms], limit: int = 8) -> list[str]:
    """Which loss terms are not finite on one process, and for which samples; empty if all are finite.

    `terms` holds those of each micro-batch.
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
    """An event that SIGTERM, SIGUSR1 or SIGHUP sets, in place of ending the process at once.

    A SIGHUP that is ignored, as under `nohup`, stays ignored; one that arrives closes the terminal, see `Output`.
    """
    stop = Event()
    handled = STOP_SIGNALS - ({signal.SIGHUP} if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else set())
    previous = {number: signal.signal(number, lambda *_: stop.set()) for number in handled}
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(Output, streams)
    try:
        yield stop
    finally:
        sys.stdout, sys.stderr = streams
        for number, handler in previous.items():
            signal.signal(number, handler)


class Output:
    """A text stream whose reader may go away, a terminal or a pipe, without ending the run that writes to it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write; from the moment that there is no reader, to nowhere."""
        with self._forgiving():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush, likewise."""
        with self._forgiving():
            self._stream.flush()

    @contextmanager
    def _forgiving(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.EIO, errno.EPIPE):
                raise
            # What is buffered would fail again at the end of the process, and change its exit code.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
