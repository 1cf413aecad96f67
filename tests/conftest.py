"""What all tests share: one thread a process, and the golden case."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from models import DeepFlow

pytest_plugins = ["training_runs"]  # the fixtures of tests that train

GOLDEN = Path(__file__).parent / "golden"

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


def relative_error(actual, expected):
    """Norm of the difference over the norm of what was expected."""
    return ((actual.detach() - expected).norm() / expected.norm()).item()
