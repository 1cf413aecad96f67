"""The main job as a user types it: images -> latents -> train -> resume -> sample -> score, each its own process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from helpers.sample_data import run_main
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent


def run(*line, **environment):
    """Run one command of the repository from its root; return its stdout."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    environment = {name: str(value) for name, value in environment.items()}
    done = subprocess.run(
        [str(word) for word in line], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def python(*arguments):
    """Run a Python program as `run` does."""
    return run(sys.executable, *arguments)


def draw_images(folder, count=70):
    """Discs and squares of random colours and places, 64 px, in two class folders."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:64, :64]
    for i in range(count):
        centre, radius = rng.uniform(20, 44, 2), rng.uniform(8, 18)
        distance = np.stack([abs(rows - centre[0]), abs(columns - centre[1])])
        inside = np.hypot(*distance) < radius if i % 2 else distance.max(0) < radius
        pixels = np.where(inside[..., None], rng.integers(0, 200, 3), 255).astype(np.uint8)
        place = folder / ("disc" if i % 2 else "square") / f"{i}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place)


def test_from_images_to_a_score(tmp_path, monkeypatch):
    images, latents, reference = tmp_path / "images", tmp_path / "latents", tmp_path / "reference.npz"
    draw_images(images)
    tools = ["-m", "preprocessing.dataset_tools"]
    python(*tools, "encode", "--source", images, "--dest", latents, "--vae", "assets/demo_vae", "--num-workers", 0)
    assert run_main(monkeypatch, "stats", "--source", images, "--dest", reference) == 0

    train = ["train.py", "--data-dir", latents, "--output-dir", tmp_path, "--exp-name", "run"]
    train += ["--model", "DeepFlow-Tiny/2-2T", "--batch-size", 8, "--log-every", 1, "--learning-rate", 1e-3]
    python(*train, "--max-train-steps", 3)
    assert "steps 3 to 6" in python(*train, "--max-train-steps", 6)
    entries = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4, 5, 6]

    flags = ["--num-fid-samples", 70, "--num-steps", 2, "--classes", "data", "--cfg-scale", 1.5, "--name", "samples"]
    printed = python("generate.py", "--ckpt", tmp_path / "run", "--sample-dir", tmp_path, *flags)
    samples = Path(printed.split("samples: ")[1].strip())
    with np.load(samples) as arrays:
        assert arrays["arr_0"].shape == (70, 64, 64, 3) and set(arrays["arr_1"]) == {0, 1}

    environment = {"CKPT": tmp_path / "run", "REF": reference, "EVAL_FLAGS": "--features demo"}
    flags = ["--num-fid-samples", 70, "--num-steps", 2, "--classes", "data", "--cfg-scale", 1.5, "--name", "scored"]
    out = run("bash", "script/small/eval.sh", "--sample-dir", tmp_path, *flags, **environment)
    assert "demo Frechet distance" in out and (tmp_path / "scored-metrics.json").exists()
    assert (tmp_path / "scored.npz").read_bytes() == samples.read_bytes()  # made again, they are the same
    python("evaluate.py", reference, reference, "--features", "demo", "--json", tmp_path / "same.json")
    distance, same = (
        json.loads((tmp_path / name).read_text())["metrics"]["frechet_distance"]
        for name in ("scored-metrics.json", "same.json")
    )
    assert abs(same) < 1e-3 < distance
