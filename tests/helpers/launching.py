"""Programs on several processes."""

import os
import subprocess
import sys

from helpers.training_runs import ROOT


def launch(processes, *command, **environment):
    """Run a program of the repository under torchrun, without a GPU; return its stdout."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    clean = {key: value for key, value in os.environ.items() if not key.startswith("ACCELERATE_")}
    done = subprocess.run(
        [*torchrun, *map(str, command)],
        cwd=ROOT,
        env={**clean, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
