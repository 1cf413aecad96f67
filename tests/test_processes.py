"""Starting programs on two CPU processes, as a user does."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.launching import launch

from common.errors import UserError
from common.processes import reported_by_any_process

ROOT = Path(__file__).resolve().parent.parent


def test_processes_on_cpus_find_each_other(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "from common.processes import join_processes\n"
        "state = join_processes()\n"
        "print(f'{state.process_index} of {state.num_processes}\\n', end='')\n"
    )
    assert sorted(launch(2, program).splitlines()) == ["0 of 2", "1 of 2"]  # of one: with the samples below


def test_a_mistake_of_one_process_is_told(monkeypatch, capsys):
    for local_rank, told in (("0", ""), ("3", "error: [process 11] sample 5 is damaged\n")):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        with pytest.raises(UserError), reported_by_any_process(11):
            raise UserError("sample 5 is damaged")
        assert capsys.readouterr().err == told


def test_an_interrupt_is_one_line_and_stays_an_interrupt(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "from common.errors import exits_on_user_error\n"
        "@exits_on_user_error\n"
        "def main():\n"
        "    raise KeyboardInterrupt\n"
        "main()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LOCAL_RANK": "0"}
    done = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "interrupted\n")


def test_two_processes_make_the_bytes_of_one(run, tmp_path):
    for count in (1, 2):
        flags = ["--num-fid-samples", 150, "--num-steps", 3, "--per-proc-batch-size", 2, "--cfg-scale", 2]
        flags += ["--name", count, "--sample-dir", tmp_path]  # three blocks of 64
        launch(count, "generate.py", "--ckpt", run / "ema.safetensors", *flags)
    assert (tmp_path / "1.npz").read_bytes() == (tmp_path / "2.npz").read_bytes()
    assert {p.suffix for p in tmp_path.iterdir()} == {".npz", ".png", ".json"}
