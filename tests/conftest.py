"""What all tests share: one thread a process, no GPU unless `-m gpu` asks for it, and the golden case."""

import json
import os
import sys
from itertools import pairwise


def asks_for_gpu(arguments):
    """Whether a command line of pytest selects the tests marked `gpu`."""
    marks = [word.removeprefix("-m") for word in arguments if word.startswith("-m") and len(word) > 2]
    marks += [word for flag, word in pairwise(arguments) if flag == "-m"]
    return any("gpu" in mark.split() and "not gpu" not in mark for mark in marks)


# The ordinary tests compare with numbers of the CPU. Workers of xdist inherit what their parent decided here.
if "PYTEST_XDIST_WORKER" not in os.environ and not asks_for_gpu(sys.argv):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from helpers.golden import GOLDEN  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from models import DeepFlow  # noqa: E402

pytest_plugins = ["helpers.training_runs", "helpers.sampling_runs"]  # the fixtures of tests that train and sample

torch.set_num_threads(1)


@pytest.fixture
def golden_config():
    return json.loads((GOLDEN / "deepflow_tiny_2T.json").read_text())


@pytest.fixture
def golden_weights():
    return load_file(GOLDEN / "deepflow_tiny_2T.safetensors")


@pytest.fixture
def golden_model(golden_config, golden_weights):
    model = DeepFlow(**golden_config)
    model.load_state_dict(golden_weights)
    return model


@pytest.fixture
def golden_io():
    with np.load(GOLDEN / "deepflow_tiny_2T_io.npz", allow_pickle=False) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
