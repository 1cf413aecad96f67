"""What README, CONTRIBUTING and docs/ name is there: flags with their defaults, files, names, commands, links."""

import argparse
import itertools
import re
import shlex
from pathlib import Path

import pytest
import yaml

import evaluate
from generation import options
from preprocessing import dataset_tools
from training import options as train_options

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    tomllib = None

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9_-]*")

COMMANDS = dataset_tools.build_parser()._subparsers._group_actions[0].choices
PARSERS = {
    "train.py": train_options.build_parser(),
    "generate.py": options.build_parser(),
    "evaluate.py": evaluate.build_parser(),
    **{f"dataset_tools {name}": parser for name, parser in COMMANDS.items()},
}
# Defaults that depend on the machine are told in words, as are those that are filled in later.
IN_WORDS = {("dataset_tools convert", "--num-workers")}


def actions_of(parser):
    """What a command line may hold, but for --help."""
    return [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]


def names_of(action):
    """The spellings of a flag, without its --no- form, or the name of a positional argument."""
    flags = [flag for flag in action.option_strings if not flag.startswith("--no-")]
    return frozenset(flags or [action.metavar or action.dest])


def code_in(cell):
    return re.findall(r"`([^`]+)`", cell)


def tables():
    """Rows of docs/flags.md by program: lists of (names, default cell, whole row)."""
    rows, program = {}, None
    for line in (ROOT / "docs/flags.md").read_text().splitlines():
        if match := re.match(r"##+ `(.+)`$", line):
            program = match[1]
        elif line.startswith("| `"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            rows.setdefault(program, []).append((frozenset(code_in(cells[0])), cells[1], line))
    return rows


# ---- flags -----------------------------------------------------------------------------------------------------------


def test_every_command_has_a_table():
    assert tables().keys() == PARSERS.keys()


@pytest.mark.parametrize("program", PARSERS)
def test_every_flag_has_exactly_one_row_and_no_other_row_is_there(program):
    in_docs = [sorted(names) for names, _, _ in tables()[program]]
    in_parser = [sorted(names_of(action)) for action in actions_of(PARSERS[program])]
    assert sorted(in_docs) == sorted(in_parser)


def literal(action):
    """A default as the tables write it, None where it is filled in later."""
    if isinstance(action.default, bool):
        return "on" if action.default else "off"
    values = action.default if isinstance(action.default, list) else [action.default]
    return " ".join(map(str, values)) if values not in ([], [None]) else None


def equal_values(written, default):
    try:
        return float(written) == float(default)
    except ValueError:
        return written == default


@pytest.mark.parametrize("program", PARSERS)
def test_defaults_are_the_parsers(program):
    cells = {names: cell for names, cell, _ in tables()[program]}
    for action in actions_of(PARSERS[program]):
        names, cell, default = names_of(action), cells[names_of(action)], literal(action)
        if action.required:
            assert cell == "required", names
        elif default is None or any((program, name) in IN_WORDS for name in names):
            assert cell and not cell.startswith("`") and cell != "required", names
        else:
            assert re.fullmatch("`[^`]+`", cell) and equal_values(cell.strip("`"), default), (names, cell, default)


@pytest.mark.parametrize("program", PARSERS)
def test_every_choice_is_named(program):
    rows = {names: row for names, _, row in tables()[program]}
    for action in actions_of(PARSERS[program]):
        assert set(map(str, action.choices or [])) <= set(code_in(rows[names_of(action)])), names_of(action)


def test_the_table_notices_what_it_is_for():
    """A default that differs, in value or in kind, is seen."""
    assert equal_values("1e-4", "0.0001") and not equal_values("1e-4", "0.001") and not equal_values("on", "off")


# ---- paths and names -------------------------------------------------------------------------------------------------

FOLDERS = {"common", "models", "storage", "training", "generation", "evaluation", "preprocessing", "benchmarks"}
FOLDERS |= {"script", "assets", "docs", "tests"}
FILE = re.compile(r"(?:[\w-]+/)*[\w.-]+\.(?:py|sh|yaml|toml|cff|md|txt)")


def references(page):
    """(path, name or None) of every `path`, `path: name` and `folder/` that a page puts in backticks."""
    for code in code_in(re.sub(r"```.*?```", "", page.read_text(), flags=re.S)):
        path, _, name = code.partition(": ")
        if FILE.fullmatch(path) and (not name or re.fullmatch(r"[\w.]+", name)):
            yield path, name or None
        elif code.split("/")[0] in FOLDERS and re.fullmatch(r"[\w./-]+", code):
            yield code, None


def defines(file, name):
    """Whether a module defines a name, or a class of it a member."""
    text, (first, *rest) = file.read_text(), name.split(".")
    top = rf"^(?:class|def) {first}\b|^{first}\b.*="
    return re.search(top, text, re.M) and all(re.search(rf"^ +(?:def )?{part}\b", text, re.M) for part in rest)


def is_there(path, name):
    place = ROOT / path
    return place.exists() and bool(name is None or defines(place, name))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_names_exist(page):
    found = list(references(page))
    gone = [f"{path}: {name}" if name else path for path, name in found if not is_there(path, name)]
    # A bare file name stands for a file of the folder that the sentence speaks of, or of a run, a user's folder.
    gone = [entry for entry in gone if "/" in entry or ":" in entry or entry.endswith((".py", ".sh"))]
    assert gone == []


# ---- commands --------------------------------------------------------------------------------------------------------


def commands(page):
    """Every command that a page shows, in a block of bash or in backticks, without comments and continuations."""
    text = page.read_text()
    for block in re.findall(r"```bash\n(.*?)```", text, re.S):
        yield from block.replace("\\\n", " ").splitlines()
    for code in code_in(re.sub(r"```.*?```", "", text, flags=re.S)):
        if re.match(r"(?:\w+=\S+ )*(?:bash|python|accelerate launch|torchrun) ", code):
            yield code


def program_of(words):
    """The file that a command runs, and the words after it; None for what is not ours."""
    words = list(itertools.dropwhile(lambda word: re.match(r"[A-Z_]+=", word), words))  # of the environment
    for i, word in enumerate(words[:-1]):
        if word == "-m" and "." in words[i + 1]:
            return f"{words[i + 1].replace('.', '/')}.py", words[i + 2 :]
    for i, word in enumerate(words[:6]):
        if word.endswith((".py", ".sh")):
            return word, words[i + 1 :]
    return None, []


def parser_of(program, words):
    """Whose flags a command takes."""
    if program == "preprocessing/dataset_tools.py":
        return COMMANDS[words[0]] if words and words[0] in COMMANDS else None
    if program.startswith("script/"):
        program = {"train.sh": "train.py", "eval.sh": "generate.py"}.get(Path(program).name)
    return PARSERS.get(program)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_run_what_is_there_with_flags_that_it_has(page):
    for line in commands(page):
        words = shlex.split(line, comments=True)
        program, arguments = program_of(words)
        if program is None:
            continue
        assert (ROOT / program).is_file(), line
        parser = parser_of(program, arguments)
        if parser is None:
            continue
        known = {flag for action in parser._actions for flag in action.option_strings}
        if program == "evaluate.py":
            known |= {flag for action in PARSERS["generate.py"]._actions for flag in action.option_strings}
        assert {word for word in arguments if word.startswith("--")} <= known, line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_named_exist(page):
    """In the text, where no command says whose they are: some program of ours, or a launcher, has them."""
    known = {flag for parser in PARSERS.values() for action in parser._actions for flag in action.option_strings}
    known |= {"--license"}  # of training/export.py
    known |= {"--num_processes", "--multi_gpu", "--cpu", "--nproc_per_node", "--use_fsdp", "--machine_rank"}
    known |= {"--main_process_ip", "--config_file", "--check", "--no-"}
    text = "\n".join(code for code in re.findall(r"`([^`\n]+)`", page.read_text()) if " -m " not in f" {code}")
    assert set(FLAG.findall(text)) <= known


# ---- links and other files -------------------------------------------------------------------------------------------


def anchors(page):
    """What GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        assert place.exists(), target
        assert not anchor or anchor in anchors(place), target


def test_the_citation_is_complete():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and citation["message"] and citation["title"]
    paper = citation["preferred-citation"]
    for work in (citation, paper):
        assert all({"family-names", "given-names"} <= author.keys() or "name" in author for author in work["authors"])
    assert paper["type"] == "conference-paper" and paper["year"] == 2025 and paper["collection-title"]
    assert f"arxiv.org/abs/{re.search(r'arXiv ([0-9.]+)', (ROOT / 'README.md').read_text())[1]}" in paper["url"]


def test_hooks_run_what_the_tests_run():
    hooks = [hook for repo in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
             for hook in repo["hooks"] if repo["repo"] == "local"]  # fmt: skip
    assert {hook["language"] for hook in hooks} == {"system"}
    lint = (ROOT / "script/test.sh").read_text()
    for command in ("ruff check", "ruff format"):
        assert any(hook["entry"].startswith(command) for hook in hooks) and command in lint


@pytest.mark.skipif(tomllib is None, reason="tomllib is of Python 3.11")
def test_the_version_is_one():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert project["version"] == citation["version"]
    assert f"## [{project['version']}]" in (ROOT / "CHANGELOG.md").read_text()
