"""What users' machines and launchers do to runs: hang-ups, lost terminals, no compiler, no memory, silent bars."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.sampling_runs import command as generate_command
from helpers.training_runs import ROOT, metrics_of, tiny_command

import train
from common import processes
from common.errors import OutOfMemory, UserError, out_of_memory_reason, reports_out_of_memory
from generation import images
from loss import DeepFlowLoss
from training import plots
from training.ema import EMA
from training.options import parse_options
from training.run_state import saved_steps


def run_train(monkeypatch, capsys, command, *flags, **more):
    """Exit code, stdout, lines of stderr."""
    monkeypatch.setattr(sys, "argv", ["train.py", *command(*flags, **more)])
    try:
        train.main()
        code = 0
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    return code, out, err.splitlines()


# ---- hang-ups


def hang_up_at(monkeypatch, last):
    update, steps = EMA.update, []

    def hanging_up(ema, model, step):
        steps.append(step)
        if len(steps) == last:
            os.kill(os.getpid(), signal.SIGHUP)
        update(ema, model, step)

    monkeypatch.setattr(EMA, "update", hanging_up)


def test_a_hang_up_stops_and_saves(start, tmp_path, monkeypatch):
    hang_up_at(monkeypatch, 5)
    assert not start()
    assert saved_steps(tmp_path / "run") == [6]


def test_under_nohup_a_hang_up_is_ignored(start, tmp_path, monkeypatch):
    hang_up_at(monkeypatch, 5)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert start()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert saved_steps(tmp_path / "run") == [10]


def test_a_terminal_that_goes_away_costs_nothing(command, tmp_path):
    """As when the ssh connection drops: a hang-up comes, and from then on writing to the terminal fails."""
    line = [sys.executable, str(ROOT / "train.py"), *command(steps=100_000)]
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(line[0], line, {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text()):
        if select.select([terminal], [], [], 0.05)[0]:
            os.read(terminal, 4096)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 143
    assert len(saved_steps(tmp_path / "run")) == 1


def test_a_launcher_that_is_hung_up_lets_its_processes_save(command, tmp_path):
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "train.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launcher = subprocess.Popen(
        [*line, *command(steps=100_000)],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text()):
        assert launcher.poll() is None
        select.select([], [], [], 0.05)
    launcher.send_signal(signal.SIGHUP)
    out, _ = launcher.communicate(timeout=100)
    (step,) = saved_steps(tmp_path / "run")
    assert f"stopped by a signal and saved at step {step}" in out


# ---- pictures


@pytest.mark.parametrize("name", ["pay_$5_or_$_^6", "a{b}_{", "\\frac$x$", "表情_名$", "two\nlines$", "$"])
def test_any_name_of_a_run_is_a_title(tmp_path, name):
    plots.draw_losses([{"step": 1, "loss": 1.0, "velocity_1": 1.0, "loss_max": 1.0}], name, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_of_any_name_ends_with_its_picture(start, tmp_path, capsys):
    assert start(name="pay_$5_or_$_^6", steps=1)
    assert (tmp_path / "pay_$5_or_$_^6" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "warning" not in capsys.readouterr().err


def test_a_run_does_not_fail_by_its_picture(start, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("no font\nat all")

    monkeypatch.setattr(plots, "draw_losses", fail)
    assert start(steps=2)
    lines = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert lines == [f"warning: {tmp_path / 'run' / 'loss.png'} could not be drawn (no font)"]
    assert (tmp_path / "run" / "ema.safetensors").exists()


def test_a_name_that_is_no_text_is_one_line(monkeypatch, capsys, command, tmp_path):
    code, _, error = run_train(monkeypatch, capsys, command, name="caf\udce9")
    assert code == 2 and error == ["error: --exp-name 'caf\\udce9' given, expected text in UTF-8"]
    assert list(tmp_path.iterdir()) == []


# ---- a compiler


@pytest.mark.parametrize("compiler", [None, "/nowhere/g++", "false"])
def test_compiling_without_a_compiler_is_one_line_before_training(monkeypatch, capsys, command, tmp_path, compiler):
    if compiler:
        monkeypatch.setenv("CXX", compiler)
    else:
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    code, _, error = run_train(monkeypatch, capsys, command, "--compile")
    assert code == 2 and len(error) == 1
    assert re.match(r"error: --compile needs a working C\+\+ compiler .*drop --compile$", error[0])
    assert list(tmp_path.iterdir()) == []


def test_sampling_compiled_without_a_compiler_is_one_line(monkeypatch, capsys, run, tmp_path):
    monkeypatch.setenv("CXX", "/nowhere/g++")
    with pytest.raises(SystemExit, match="2"):
        generate_command(monkeypatch, run, tmp_path / "out", "--compile")
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--compile needs" in error and not (tmp_path / "out").exists()


def test_a_compiler_that_is_there_will_do():
    processes.require_compiler("cpu")


def test_triton_compiles_c(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setenv("CC", "/nowhere/gcc")
    with pytest.raises(UserError, match=r"working C compiler .*name a compiler by CC"):
        processes.require_compiler("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (6, 1))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "P40")
    with pytest.raises(UserError, match=r"7\.0 or more, unlike P40: drop --compile"):
        processes.require_compiler("cuda")


# ---- memory


def too_much(*_, **__):
    return torch.empty(1 << 46)


ERRORS = [
    lambda: too_much(),
    lambda: bytearray(1 << 60),
    lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore")),
    lambda: (_ for _ in ()).throw(RuntimeError("CUDA error: out of memory")),
    lambda: (_ for _ in ()).throw(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate")),
    lambda: (_ for _ in ()).throw(RuntimeError("can't start new thread")),
    lambda: (_ for _ in ()).throw(OSError(12, "Cannot allocate memory")),
    lambda: (_ for _ in ()).throw(ImportError("lib.so: failed to map segment from shared object")),
]


@pytest.mark.parametrize("fail", ERRORS)
def test_memory_that_is_used_up_is_told_with_a_remedy(fail):
    with (
        pytest.raises(OutOfMemory, match=r"^out of memory \(.+\): lower it$") as told,
        reports_out_of_memory("lower it"),
    ):
        fail()
    assert "\n" not in str(told.value)

    def unreadable():
        try:
            fail()
        except Exception as error:
            raise UserError("the checkpoint is damaged: delete it") from error

    with pytest.raises(OutOfMemory, match="lower it"), reports_out_of_memory("lower it"):
        unreadable()


def test_other_errors_are_no_lack_of_memory():
    others = RuntimeError("shapes"), UserError("no"), OSError(28, "No space left"), ValueError("out of memory")
    assert not any(map(out_of_memory_reason, others))
    with pytest.raises(RuntimeError, match="shapes"), reports_out_of_memory("x"):
        raise RuntimeError("shapes")


def test_training_that_needs_too_much_memory_is_one_line(monkeypatch, capsys, command, tmp_path):
    monkeypatch.setattr(DeepFlowLoss, "total", too_much)
    code, _, error = run_train(monkeypatch, capsys, command)
    assert code == 2
    for word in ("error: out of memory", "--batch-size", "--gradient-accumulation-steps", "--activation-checkpointing"):
        assert word in error[-1]
    assert not any("Traceback" in line for line in error) and saved_steps(tmp_path / "run") == []


def test_a_checkpoint_that_memory_does_not_hold_is_not_called_damaged(monkeypatch, capsys, command, start):
    start(steps=1)
    capsys.readouterr()
    monkeypatch.setattr(torch, "load", too_much)
    code, _, error = run_train(monkeypatch, capsys, command, steps=2)
    assert code == 2 and "out of memory" in error[-1] and "damaged" not in error[-1]


def test_sampling_that_needs_too_much_memory_is_one_line(monkeypatch, capsys, run, tmp_path):
    monkeypatch.setattr(images, "make_block", too_much)
    with pytest.raises(SystemExit, match="2"):
        generate_command(monkeypatch, run, tmp_path)
    last = capsys.readouterr().err.splitlines()[-1]
    assert "error: out of memory" in last and "--per-proc-batch-size" in last and not (tmp_path / "x.npz").exists()


# ---- launchers


@pytest.mark.parametrize(
    ("launcher", "flags", "precision", "notes"),
    [
        ({}, (), "no", []),
        ({"MIXED_PRECISION": "no"}, (), "no", []),
        ({"MIXED_PRECISION": "bf16"}, (), "bf16", []),
        ({"MIXED_PRECISION": "bf16"}, ("--mixed-precision", "bf16"), "bf16", []),
        (
            {"MIXED_PRECISION": "bf16"},
            ("--mixed-precision", "no"),
            "no",
            ["mixed_precision bf16.*--mixed-precision no"],
        ),
        ({"MIXED_PRECISION": "fp16"}, (), "no", ["mixed_precision fp16.*--mixed-precision no, the default"]),
        ({"MIXED_PRECISION": "fp8"}, (), "no", ["mixed_precision fp8"]),
        ({"MIXED_PRECISION": "no"}, ("--mixed-precision", "bf16"), "bf16", ["mixed_precision no.*bf16"]),
    ],
)
def test_the_launchers_precision_counts_where_none_is_given(
    monkeypatch, capsys, command, launcher, flags, precision, notes
):
    for name, value in launcher.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, out, error = run_train(monkeypatch, capsys, command, "--dry-run", *flags)
    assert code == 0 and f"precision {precision} on cpu" in out
    assert len(error) == len(notes) and all(map(re.search, notes, error))


@pytest.mark.parametrize(
    ("value", "flags", "parts", "notes"),
    [
        ("4", (), 4, []),
        ("4", ("--gradient-accumulation-steps", "2"), 2, ["steps 4.*--gradient-accumulation-steps 2"]),
        ("1", ("--gradient-accumulation-steps", "2"), 2, ["steps 1.*--gradient-accumulation-steps 2"]),
        ("2", ("--gradient-accumulation-steps", "2"), 2, []),
    ],
)
def test_the_launchers_accumulation_counts_where_none_is_given(
    monkeypatch, capsys, command, value, flags, parts, notes
):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", value)
    code, out, error = run_train(monkeypatch, capsys, command, "--dry-run", *flags)
    assert code == 0 and f"x {parts} accumulated" in out
    assert len(error) == len(notes) and all(map(re.search, notes, error))


def test_a_launchers_accumulation_that_is_no_number_is_one_line(monkeypatch, capsys, command):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "many")
    code, _, error = run_train(monkeypatch, capsys, command, "--dry-run")
    assert code == 2 and len(error) == 1 and "accelerate launch's gradient_accumulation_steps" in error[0]


def test_accelerate_launch_is_heard(command):
    """It tells its accumulation to DeepSpeed only: it is read off its command line."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--mixed_precision", "bf16"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("ACCELERATE_")}
    line = [*launch, "--gradient_accumulation_steps", "4", "train.py", *command("--dry-run")]
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert "8 = 1 processes x 4 accumulated x 2, precision bf16 on cpu" in done.stdout, done.stderr


def test_a_launchers_precision_changes_no_images_unasked(monkeypatch, capsys, run, tmp_path):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    generate_command(monkeypatch, run, tmp_path)
    assert json.loads((tmp_path / "x.json").read_text())["settings"]["precision"] == "no"
    error = capsys.readouterr().err
    assert "note: accelerate launch says mixed_precision bf16, but --precision no counts here" in error


# ---- bars


def test_tqdm_disable_silences_every_bar(data, tmp_path):
    """In a process of its own: tqdm reads its environment when it is imported."""
    program = (
        "import sys, numpy as np, train, generate\n"
        "from training.options import parse_options\n"
        "from evaluation import metrics\n"
        "train.train(parse_options(sys.argv[1:]))\n"
        "generate.write_batches(type('S', (), {'close': lambda self: None})(), iter(()), 5, shows_progress=True)\n"
        "metrics.precision_recall(np.eye(9), np.eye(9), progress=True)\n"
    )
    environment = {**os.environ, "TQDM_DISABLE": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-c", program, *tiny_command(data, tmp_path, steps=2)]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr == ""


def test_no_bar_is_told_to_show_itself_against_the_environment():
    sources = [path for path in ROOT.glob("[!.]*/*.py") if path.parent.name != "tests"] + list(ROOT.glob("*.py"))
    assert [str(path) for path in sources if "disable=" in path.read_text()] == [str(ROOT / "common" / "processes.py")]


def test_a_bar_is_silent_where_it_is_not_to_be_shown(capsys):
    for shown in (True, False):
        with processes.progress_bar(shown, total=2) as bar:
            bar.update(2)
        assert bool(capsys.readouterr().err) == shown


# ---- places on the machine


def test_a_checkpoint_names_no_place_on_the_machine(start, tmp_path):
    from helpers.training_runs import write_dataset

    from models import checkpoints

    home = tmp_path / "home" / "me" / "my-vae"
    start("--data-dir", write_dataset(tmp_path / "data", vae=str(home)), steps=1)
    metadata = checkpoints.read(tmp_path / "run").metadata
    assert metadata["vae"] == "my-vae" and metadata["vae_sha256"] == "0" * 64
    assert str(tmp_path) not in json.dumps(metadata)
    start("--data-dir", write_dataset(tmp_path / "moved", vae="elsewhere"), steps=2)  # and resumes
    assert metrics_of(tmp_path / "run")[-1]["step"] == 2


def test_parse_options_knows_no_launcher_by_default(monkeypatch):
    monkeypatch.delenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", raising=False)
    assert parse_options(["--exp-name=x", "--data-dir=x"]).gradient_accumulation_steps == 1
    assert Path(processes.__file__).exists()
