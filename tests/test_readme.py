"""The README is what its reader needs first, and what it shows runs. The rest is checked by `test_docs.py`."""

import re
from pathlib import Path

import pytest
import torch

from models import checkpoints, create_model

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
ORDER = [
    "Two commands",
    "Where things are",
    "Train",
    "Sample",
    "Score",
    "Official checkpoints",
    "Results",
    "Citation",
    "Licence",
]


def test_it_is_short_and_in_order():
    assert re.findall(r"^## (.+)$", README, re.M) == ORDER
    assert len(README.splitlines()) <= 156


def tree():
    block = README.split("## Where things are")[1].split("```")[1]
    return set(re.findall(r"(?:^|;  )([\w.]+)/?(?=  )", block, re.M))


def test_the_tree_is_the_repository():
    """Every folder and program of the top level, and no others."""
    folders = [path for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith((".", "_"))]
    there = {path.name for path in folders if path.name in ("assets", "docs") or any(path.glob("*.py"))}
    there |= {path.name for path in ROOT.glob("*.py")}
    assert tree() == there


def test_every_page_of_docs_is_linked():
    assert {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")} <= set(re.findall(r"\]\(([^)#]+)\)", README))


@pytest.mark.parametrize("number", ["617.80", "49.22", "50.79", "4.02"])
def test_results_carry_command_commit_seed_and_machine(number):
    results = README.split("## Results")[1].split("\n## ")[0]
    assert number in results
    assert re.search(r"<sub>`bash \S+`, commit [0-9a-f]{7}, seed \d, 2-core CPU", results)


def test_the_python_example_runs(tmp_path, monkeypatch):
    example = re.search(r"```python\n(.*?)```", README, re.S)[1]
    model = create_model("DeepFlow-Tiny/2-2T", num_classes=1000)
    (tmp_path / "runs/xlarge-3t").mkdir(parents=True)
    checkpoints.save(tmp_path / "runs/xlarge-3t/ema.safetensors", model.state_dict(), model.config, {})
    monkeypatch.chdir(tmp_path)
    namespace = {}
    exec(example, namespace)
    assert namespace["latents"].shape == (2, 4, 32, 32) and namespace["latents"].dtype == torch.float64
