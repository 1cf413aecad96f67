"""The benchmarks run, on little data; their figures are for people to read."""

import json
import sys
import zipfile

import numpy as np
import pytest
from helpers.sample_data import contents

from benchmarks import data_loading, evaluation, sample_file, ssl_alignment
from storage.packed import PackedLatents


def test_data_loading_measures_every_layout(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data_loading, "IMAGENET", 3000)
    flags = ["--samples", 100, "--batch-size", 16, "--num-workers", 0, "--seconds", 0.01, "--dir", tmp_path]
    flags += ["--output", tmp_path / "figures.json"]
    monkeypatch.setattr(sys, "argv", ["data_loading", *map(str, flags)])
    data_loading.main()
    results = json.loads((tmp_path / "figures.json").read_text())["results"]
    assert len(results) == 7 and all(result["samples_per_second"] > 0 for result in results.values())
    assert results["plain: DataLoader, np.load a file"]["times_plain"] == 1
    assert all(name in capsys.readouterr().out for name in ["packed float16"])
    assert list(contents(tmp_path)) == ["figures.json"]


def test_the_sparse_dataset_is_one(tmp_path):
    data_loading.write_sparse(tmp_path / "sparse", 300, shard_rows=128)
    data = PackedLatents(tmp_path / "sparse")
    assert len(data) == len(data.names) == 300 and not data.gather(np.array([0, 299]))[0].any()


def test_evaluation_measures_routes_that_agree(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluation, "in_new_process", lambda work, *given: work(*given))  # one takes seconds to start
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, "1")  # main sets them, too
    flags = ["--images", 300, "--dimension", 24, "--threads", 1, "--output", tmp_path / "figures.json"]
    monkeypatch.setattr(sys, "argv", ["evaluation", *map(str, flags)])
    evaluation.main()
    results = json.loads((tmp_path / "figures.json").read_text())["results"]
    printed = capsys.readouterr().out
    for name, (_, _, plain) in evaluation.ROUTES.items():
        assert results[name]["seconds"] > 0 and name in printed
        if plain:
            assert results[name]["value"] == pytest.approx(results[plain]["value"], rel=1e-9)
            assert results[name]["seconds_of_plain"] > 0
    precision, recall = results["precision and recall, ours"]["value"]
    assert 0 < precision < 1 and 0 < recall < 1


def test_ssl_alignment_measures_every_kind_of_step(tmp_path, monkeypatch, capsys):
    flags = ["--model", "DeepFlow-Tiny/2", "--encoder", "timm:vit_tiny_patch16_224", "--resolution", 32, "--samples", 8]
    flags += ["--batch-size", 2, "--steps", 1, "--device", "cpu", "--dir", tmp_path, "--output", tmp_path / "f.json"]
    monkeypatch.setattr(sys, "argv", ["ssl_alignment", *map(str, flags)])
    ssl_alignment.main()
    results = json.loads((tmp_path / "f.json").read_text())["results"]
    assert list(results) == ["no alignment", "packed features", "encoder at work"]
    assert results["no alignment"]["times_plain"] == 1 and all(result["seconds"] > 0 for result in results.values())
    assert "encoder at work" in capsys.readouterr().out
    assert list(contents(tmp_path)) == ["f.json"]


def test_the_file_of_samples_is_measured_and_read_back(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sample_file, "SIDE", 8)
    npz = tmp_path / "samples.npz"
    sample_file.stream(npz, 100)
    assert sample_file.check(npz, 100) == 1  # the first of two batches is compared
    with np.load(npz) as streamed:
        images = streamed["arr_0"]
    sample_file.save_at_once(npz, 100)
    with np.load(npz) as held:
        assert (held["arr_0"] == images).all()
    with npz.open("r+b") as file:  # damage is noticed
        file.seek(1000)
        file.write(b"damage")
    with pytest.raises(zipfile.BadZipFile):
        sample_file.check(npz, 100)
