"""The command line of dataset_tools: what its commands print, and that mistakes end in one line."""

import subprocess
import sys

import pytest
from helpers.sample_data import contents, make_images, make_vae, run_main, write_files


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    return make_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture
def images(tmp_path):
    return make_images(tmp_path / "images")


def test_encode_then_again_then_info_then_verify(tmp_path, images, vae_folder, monkeypatch, capsys):
    dest = tmp_path / "packed"
    command = ["encode", "--source", images, "--dest", dest, "--vae", vae_folder, "--device", "cpu", "--flip"]
    assert run_main(monkeypatch, *command, "--num-workers", 1, "--batch-size", 2, "--images") == 0
    assert "9 samples in 3 classes" in capsys.readouterr().out
    before = contents(dest)
    assert run_main(monkeypatch, *command, "--images") == 0
    assert "is complete (9 samples)" in capsys.readouterr().out
    assert run_main(monkeypatch, *command) == 2
    assert "images True, where this command makes False" in capsys.readouterr().err
    assert contents(dest) == before
    assert run_main(monkeypatch, "info", dest) == 0
    assert "float16, mean and std stacked, of the mirror images too" in capsys.readouterr().out
    assert run_main(monkeypatch, "verify", dest) == 0
    assert "all as written" in capsys.readouterr().out


def test_pack_then_verify(tmp_path, monkeypatch, capsys):
    write_files(tmp_path / "vae-sd")
    dest = tmp_path / "packed"
    command = ["pack", "--source", tmp_path / "vae-sd", "--dest", dest, "--num-workers", 0, "--dtype", "float32"]
    command += ["--vae", "stabilityai/sd-vae-ft-mse"]
    assert run_main(monkeypatch, *command) == 0
    assert run_main(monkeypatch, *command) == 0
    assert "is complete (23 samples)" in capsys.readouterr().out
    assert run_main(monkeypatch, "info", dest) == 0
    out = capsys.readouterr().out
    assert "stabilityai/sd-vae-ft-mse, weights sha256 not recorded" in out and "float32" in out
    (dest / "names.json").write_text("[]")
    assert run_main(monkeypatch, "verify", dest, "--num-workers", 0) == 2
    captured = capsys.readouterr()
    assert captured.out == "names.json is damaged\n"
    assert captured.err.splitlines()[-1].startswith(f"error: {dest} is damaged: names.json")


def test_mistakes_end_in_one_line_and_exit_code_2(tmp_path, images, monkeypatch, capsys):
    """Through the real program once, in this process for the rest."""
    command = [sys.executable, "-m", "preprocessing.dataset_tools", "info", str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: no dataset folder") and done.stderr.count("\n") == 1
    rest = ["--dest", tmp_path / "packed", "--vae", tmp_path / "no_vae", "--device", "cpu"]
    (tmp_path / "void").mkdir()
    for source, more, message in [
        (tmp_path / "absent", [], "no folder or zip file"),
        (tmp_path / "void", [], "no images"),
        (images, [], "no_vae"),
        (images, ["--batch-size", 0], "--batch-size"),
        (images, ["--num-workers", -1], "--num-workers"),
        (images, ["--dtype", "int8"], "--dtype"),
        (images, ["--flips"], "--flips"),
    ]:
        assert run_main(monkeypatch, "encode", "--source", source, *rest, *more) == 2
        captured = capsys.readouterr()
        assert message in captured.err and captured.err.count("\n") == 1
    assert not (tmp_path / "packed").exists()


def test_a_worker_process_reports_as_plainly(tmp_path, images, vae_folder, monkeypatch, capsys):
    (images / "eel" / "1.png").write_bytes(b"no image")
    command = ["encode", "--source", images, "--dest", tmp_path / "packed", "--vae", vae_folder]
    assert run_main(monkeypatch, *command, "--device", "cpu", "--num-workers", 2) == 2
    *bars, line = capsys.readouterr().err.strip().split("\n")
    assert line.startswith("error: ") and "eel/1.png cannot be read as an image (no known format)" in line
    assert all("encode:" in bar for bar in bars)
