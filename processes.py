"""The processes of a run, however they were started (alone, `accelerate launch`, `torchrun`), and their devices."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from errors import UserError

PATIENCE = timedelta(hours=1)  # for a process that writes a checkpoint, or extracts features, while others wait


def join_processes() -> PartialState:
    """This process's place among the others (index, count, device), after they have found each other.

    Without CUDA the device is the CPU: samplers keep their state in float64, which other accelerators lack, and
    Accelerate must be told, or processes that `torchrun` started would each take themselves for the only one.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU")
    if cpu and launched == 1 and "MASTER_PORT" in os.environ:
        print(
            "note: accelerate launch --cpu starts one process, whatever --num_processes says; "
            "for several use: torchrun --nproc_per_node N",
            file=sys.stderr,
        )
    return PartialState(cpu=cpu or not torch.cuda.is_available(), timeout=PATIENCE)


@contextmanager
def reported_by_any_process(rank: int) -> Iterator[None]:
    """Around what may go wrong in one process alone, a damaged sample say: its `UserError` is told whichever it is.

    Elsewhere only the first process of a machine tells, as all make the same mistake.
    """
    try:
        yield
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            print(f"error: [process {rank}] {error}", file=sys.stderr, flush=True)
        raise


def usable_device(name: str | None) -> str:
    """The torch device of that name; None is the GPU where there is one, else the CPU.

    Raises:
        UserError: for a name that torch does not know, or a device that is not there.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # unknown; known, but not in this build or machine
        raise UserError(f"--device {name}: not usable here; expected cpu, cuda or cuda:N") from error
    return name
