"""The architecture, enforced: who may import whom, read from the sources."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FEATURES = {"evaluation.archives", "evaluation.features", "evaluation.statistics"}
DATA = {"dataset", "file_layout", "image_files", "ssl_features"}
PREPROCESSING = {"models.vae", "models.ssl_encoders", "preprocessing"} | DATA | FEATURES

# Module or package -> the parts of the project it may import. `errors`, `files`, `flags`, `processes` are everybody's.
# A name allows what is inside.
ALLOWED = {
    "errors": set(),
    "files": set(),
    "flags": set(),
    "processes": set(),
    "interpolant": set(),
    "models": {"models"},
    "loss": {"interpolant"},
    "samplers": {"interpolant"},
    "dataset": {"file_layout", "ssl_features"},
    "ssl_features": {"dataset", "file_layout"},
    "file_layout": {"image_files"},
    "image_files": set(),
    "training": {"models", "loss", "training", "dataset", "ssl_features", "generate", "generation", "evaluation"},
    "train": {"models", "loss", "dataset", "training", "generate", "evaluation"},
    "generate": {"models", "samplers", "generation"},
    "generation": {"models", "samplers", "interpolant", "generation"},
    "evaluation": {"evaluation", "file_layout", "image_files"},
    "evaluate": {"evaluation", "generate"},
    "preprocessing": PREPROCESSING,
    "script": {"training.logging"},
}
ALLOWED["benchmarks"] = set(ALLOWED) | {"benchmarks"}
SOURCES = sorted(p for p in ROOT.rglob("*.py") if not {"tests", "data"} & set(p.relative_to(ROOT).parts[:1])
                 and not any(part.startswith(".") for part in p.relative_to(ROOT).parts))  # fmt: skip


def part_of(path):
    """The row of ALLOWED that a source file belongs to."""
    relative = path.relative_to(ROOT)
    return relative.parts[0].removesuffix(".py")


def imports_of(path):
    """Dotted names a file imports, of this project only, relative ones resolved."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            package = path.relative_to(ROOT).parent.parts[: None if node.level == 1 else 1 - node.level]
            names = [".".join([*package, *([node.module] if node.module else [])])]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] in ALLOWED)


def test_every_source_has_a_row():
    assert {part_of(path) for path in SOURCES} == set(ALLOWED)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_stay_within_the_rules(path):
    allowed = ALLOWED[part_of(path)] | {"errors", "files", "flags", "processes"}
    outside = [name for name in imports_of(path) if not any(f"{name}.".startswith(f"{a}.") for a in allowed)]
    assert outside == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_star_imports(path):
    stars = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.alias) and n.name == "*"]
    assert stars == []
