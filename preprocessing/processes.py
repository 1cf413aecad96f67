"""The processes that `accelerate launch` or `torchrun` started for one command, on one machine or several."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

import torch.distributed

from common.errors import UserError


class OtherProcessStopped(UserError):
    """Another process of this command ended early; it has said why."""


class Processes(NamedTuple):
    """Which of them this one is."""

    rank: int
    world: int
    local_rank: int  # among those of this machine

    def own(self, device: str) -> str:
        """The device of this process, where `device` names only a kind ("cuda")."""
        return f"{device}:{self.local_rank}" if device == "cuda" and self.world > 1 else device

    def label(self, action: str) -> str:
        """What to call this process's share of a work."""
        return action if self.world == 1 else f"{action}, process {self.rank} of {self.world}"

    def wait(self) -> None:
        """Wait until all processes are here. Raises `OtherProcessStopped` if one never will be."""
        if self.world > 1:
            try:
                torch.distributed.barrier()
            except RuntimeError as error:
                raise OtherProcessStopped(
                    "another process of this command stopped: mend what it reports and give the same command again, "
                    "it continues"
                ) from error


@contextmanager
def joined_processes() -> Iterator[Processes]:
    """Join the other processes of this command, if there are any. They meet over the CPU, whatever the device."""
    world, local_rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    if world == 1:
        yield Processes(0, 1, 0)
        return
    # Patient, as one process may have to wait for days until the others are through with their work.
    torch.distributed.init_process_group("gloo", timeout=timedelta(days=30))
    try:
        yield Processes(torch.distributed.get_rank(), world, local_rank)
    except UserError as error:
        # Only the first process of a machine prints its error in the end, but a bad image may be another's.
        if local_rank != 0 and not isinstance(error, OtherProcessStopped):
            print(f"error: {error}", file=sys.stderr, flush=True)
        raise
    finally:
        torch.distributed.destroy_process_group()
