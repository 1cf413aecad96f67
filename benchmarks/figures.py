"""What the benchmarks on the CPU share: the file of figures, work in a process of its own, and its peak memory."""

import json
import multiprocessing
import os
import platform
import resource
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any


def write_figures(file: str | Path | None, settings: dict[str, Any], results: dict[str, Any], **versions: str) -> None:
    """Write results as JSON, with the command's settings, the machine and versions of packages; no file, no JSON."""
    if file:
        machine = {"cpus": os.cpu_count(), "load": os.getloadavg()[0], "python": platform.python_version()}
        content = {"settings": {**settings, **machine, **versions}, "results": results}
        Path(file).write_text(json.dumps(content, indent=2, default=str) + "\n")


def in_new_process(work: Callable, *arguments: object) -> Any:
    """The result of `work`, from a process started for it: a process's peak memory never falls."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(work, *arguments).result()


def peak_bytes() -> int:
    """The peak memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
