"""The processes of a run, started alone, by `accelerate launch` or by `torchrun`, and their devices."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from tqdm import tqdm

from common.errors import UserError, print_from_other_ranks

WAIT_TIMEOUT = timedelta(hours=1)  # others wait while one process writes a checkpoint or extracts features


def join_processes() -> PartialState:
    """Connect this process with the others of the run.

    Without CUDA the device is the CPU, as samplers keep their state in float64, which other accelerators lack.
    Accelerate needs this as an argument: else each process that `torchrun` started would run as if it were alone.

    Returns:
        Accelerate's state: index, number and device of this process.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU")
    if cpu and launched == 1 and "MASTER_PORT" in os.environ:
        print(
            "note: accelerate launch --cpu starts one process, whatever --num_processes says; "
            "for several use: torchrun --nproc_per_node N",
            file=sys.stderr,
        )
    return PartialState(cpu=cpu or not torch.cuda.is_available(), timeout=WAIT_TIMEOUT)


@contextmanager
def reported_by_any_process(rank: int) -> Iterator[None]:
    """Around what may fail on a single rank, such as a damaged sample: any rank prints its `UserError`.

    Elsewhere only the first process of a machine prints, as all make the same mistake.
    """
    try:
        yield
    except UserError as error:
        print_from_other_ranks(error, rank)
        raise


def usable_device(name: str | None) -> str:
    """The name of a torch device that works here.

    Args:
        name: such as `cuda:1`; None is the GPU if there is one, else the CPU.

    Raises:
        UserError: for a name that torch does not know, or a device that this machine lacks.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # unknown; known, but not in this build or machine
        raise UserError(f"--device {name}: not usable here; expected cpu, cuda or cuda:N") from error
    return name


def progress_bar(shown: bool = True, **settings: object) -> tqdm:
    """A `tqdm`, disabled unless `shown`; `disable` is passed only then, as any value overrides TQDM_DISABLE."""
    return tqdm(**settings) if shown else tqdm(**settings, disable=True)


@contextmanager
def allow_tf32(allowed: bool) -> Iterator[None]:
    """Inside, CUDA's matrix products and convolutions in float32 may or may not use TF32; then as before."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def require_compiler(device: str | torch.device) -> None:
    """Check that `--compile` can work here, by a trial on two lines of source.

    On the CPU torch compiles C++ with $CXX or g++ (macOS: clang++); on a GPU Triton compiles C with $CC, gcc or clang.

    Raises:
        UserError: without a working compiler, or for a GPU that is too old.
    """
    device = torch.device(device)
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) < (7, 0):
            name = torch.cuda.get_device_name(device)
            raise UserError(f"--compile needs a GPU of compute capability 7.0 or more, unlike {name}: drop --compile")
        language, variable, names = "c", "CC", ("gcc", "clang")
    else:
        language, variable, names = "c++", "CXX", ("clang++" if sys.platform == "darwin" else "g++",)
    given = os.environ.get(variable)
    compiler = given or next((name for name in names if shutil.which(name)), names[0])
    include = sysconfig.get_path("include")
    command = [*compiler.split(), "-x", language, "-fsyntax-only", f"-I{include}", "-"]
    source = "#include <Python.h>\n" + ("#include <cmath>\n" if language == "c++" else "#include <math.h>\n")
    try:
        subprocess.run(command, input=source, capture_output=True, text=True, check=True, timeout=120)
        return
    except OSError as error:
        reason = f"{compiler}: {error.strerror}"
    except (subprocess.SubprocessError, ValueError) as error:
        said = (getattr(error, "stderr", None) or f"{compiler} fails").splitlines()
        reason = next((line for line in said if "error" in line), said[0])
    raise UserError(
        f"--compile needs a working {language.upper()} compiler and Python's headers ({reason}): install them, name a "
        f"compiler by {variable}, or drop --compile"
    )


def launcher_setting(name: str) -> str | None:
    """The value that `accelerate launch` was given for a setting, such as `mixed_precision`; None if it was not given.

    It is read from the environment, or, for what Accelerate passes on to DeepSpeed only, from its command line.
    """
    value = os.environ.get(f"ACCELERATE_{name.upper()}")
    return value if value is not None else _launcher_flag(name)


def _launcher_flag(name: str) -> str | None:
    """A flag of the `accelerate launch` that is this process's parent, from its command line."""
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:  # no Linux, or no such process any more
        return None
    launch = next((i for i, word in enumerate(words) if re.search(r"(^|accelerate\S*)launch(\.py)?$", word)), None)
    if launch is None or "accelerate" not in "".join(words[: launch + 1]):
        return None
    value, rest = None, iter(words[launch + 1 :])
    for word in rest:
        if word.endswith(".py") or word in ("-m", "--module"):  # what follows are the program's own flags
            break
        flag, equals, after = word.partition("=")
        if flag.startswith("--") and flag[2:].replace("-", "_") == name:
            value = after if equals else next(rest, None)
    return value


class OtherProcessStopped(UserError):
    """Another process of this command ended early; that process has reported why."""


class Processes(NamedTuple):
    """The number of processes of this command, and which of them this is."""

    rank: int
    world: int
    local_rank: int  # among the processes of this machine

    def own_device(self, device: str) -> str:
        """The device of this process, where `device` names only a kind ("cuda")."""
        return f"{device}:{self.local_rank}" if device == "cuda" and self.world > 1 else device

    def label(self, action: str) -> str:
        """The title of this process's progress bar."""
        return action if self.world == 1 else f"{action}, process {self.rank} of {self.world}"

    def wait(self) -> None:
        """Wait until all processes reach this point. Raises `OtherProcessStopped` if one has ended."""
        if self.world > 1:
            try:
                torch.distributed.barrier()
            except RuntimeError as error:
                raise OtherProcessStopped(
                    "another process of this command stopped: mend what it reports and give the same command again, "
                    "it continues"
                ) from error


@contextmanager
def cpu_process_group() -> Iterator[Processes]:
    """Join the other processes of this command, if any, in a process group of the CPU (gloo), whatever the device."""
    world, local_rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    if world == 1:
        yield Processes(0, 1, 0)
        return
    # A process may have to wait for days until the others have done their share.
    torch.distributed.init_process_group("gloo", timeout=timedelta(days=30))
    try:
        yield Processes(torch.distributed.get_rank(), world, local_rank)
    except UserError as error:
        # Only the first process of a machine prints on exit, but a bad image may be in another's share.
        if local_rank != 0 and not isinstance(error, OtherProcessStopped):
            print(f"error: {error}", file=sys.stderr, flush=True)
        raise
    finally:
        torch.distributed.destroy_process_group()
