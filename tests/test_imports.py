"""The architecture, enforced: who may import whom, read from the sources."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
READING = {"common", "storage"}
SAMPLING = {"models", "samplers", "interpolant", "storage", "generation"} | READING

# Room -> the rooms, or modules of rooms, that it may import. A name allows what is inside.
ALLOWED = {
    "common": {"common"},
    "interpolant": {"common"},
    "models": {"models", "common"},
    "storage": {"storage", "common"},
    "loss": {"interpolant", "common"},
    "samplers": {"interpolant", "common"},
    "dataset": READING,
    "training": {"training", "loss", "dataset", "evaluation"} | SAMPLING,
    "train": {"training", "dataset", "loss", "models", "common"},
    "generation": SAMPLING,
    "generate": SAMPLING,
    "evaluation": {"evaluation"} | READING,
    "evaluate": {"evaluation", "generate", "generation", "common"},
    "preprocessing": {"preprocessing", "models", "dataset", "evaluation"} | READING,
    "script": {"training.records"},
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
    allowed = ALLOWED[part_of(path)]
    outside = [name for name in imports_of(path) if not any(f"{name}.".startswith(f"{a}.") for a in allowed)]
    assert outside == []


def test_no_module_imports_itself_by_way_of_others():
    """No circle, in imports for type checkers and inside functions neither."""
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in SOURCES
    }
    needs = {}
    for module, path in modules.items():
        found = {name if name in modules else name.rpartition(".")[0] for name in imports_of(path)}
        needs[module] = {name for name in found if name in modules and name != module}
    assert needs["train"] and needs["models.deepflow"]
    list(graphlib.TopologicalSorter(needs).static_order())


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_star_imports(path):
    stars = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.alias) and n.name == "*"]
    assert stars == []
