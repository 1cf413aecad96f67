"""One row in one table is all that a path, a sampler, a metric or a schedule needs: the rest takes it from there."""

import ast
import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.sample_data import make_vae
from helpers.sampling_runs import command as generate_command
from helpers.training_runs import ROOT, metrics_of, write_dataset
from matplotlib.axes import Axes
from test_previews import write_features

import evaluate
import generation.options
import samplers
import training.options
from common.errors import UserError
from common.flags import PRECISIONS
from evaluation.metrics import METRICS, Metric
from generation.checkpoint import default_name
from interpolant import PATHS, WEIGHTINGS, Coefficients, draw_times
from interpolant import Path as DiffusionPath
from loss import DeepFlowLoss
from models import presets
from models.autoencoder import load_vae, weights_sha256
from samplers import DIFFUSION_FORMS, SAMPLERS, Sampler
from training import plots
from training.optimizer import SCHEDULES

NANO = dict(hidden_size=8, num_heads=2, sit_depth=2, deepflow_depth=2, branches=2, projector_dim=8)
TABLES = {
    "interpolant.py": [PATHS, WEIGHTINGS],
    "samplers.py": [SAMPLERS, DIFFUSION_FORMS],
    "evaluation/metrics.py": [METRICS],
    "training/optimizer.py": [SCHEDULES],
}


@pytest.fixture
def nano(monkeypatch):
    monkeypatch.setitem(presets.SIZES, "Nano", NANO)
    return ["--model", "DeepFlow-Nano/2"]


def generate_options(*flags):
    return generation.options.parse_options(["--ckpt", "x", *map(str, flags)])


# ---------------------------------------------------------------- paths


def bent(t):
    """alpha = 1 - t^2, sigma = t."""
    one = torch.ones_like(t)
    return Coefficients(1 - t * t, t, -2 * t, one)


def bent_time(n):
    """t / (1 - t^2) = exp(n)."""
    return ((1 + 4 * (2 * n).exp()).sqrt() - 1) / (2 * n.exp())


@pytest.fixture
def third_path(monkeypatch):
    monkeypatch.setitem(PATHS, "bent", DiffusionPath(bent, bent_time))
    return "bent"


def test_a_third_path_has_a_lognormal_time_of_its_own(third_path):
    times = draw_times("lognormal", third_path, 20_000, torch.Generator().manual_seed(0))
    n = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    c = bent(times)
    torch.testing.assert_close((c.sigma / c.alpha).log(), n, rtol=1e-3, atol=1e-3)
    for other in ("linear", "cosine"):
        assert (draw_times("lognormal", other, 20_000, torch.Generator().manual_seed(0)) - times).abs().max() > 0.01


@pytest.mark.parametrize("method", ["sde", "sde-heun", "euler", "heun"])
def test_a_third_path_is_sampled(third_path, method):
    data = torch.randn(3, 4, dtype=torch.float64)

    def velocity(x, t):
        c = bent(t[:, None])
        return c.d_alpha * data + c.d_sigma * (x - c.alpha * data) / c.sigma

    noise = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    made = samplers.sample(velocity, noise, method=method, num_steps=400, path_type=third_path)
    # The SDE's noise ends at t = 0.04, of which its last step may leave as much.
    torch.testing.assert_close(made, data, rtol=0, atol=0.2 if method.startswith("sde") else 0.01)


def test_a_third_path_is_a_choice_that_trains_and_samples(third_path, nano, start, tmp_path, monkeypatch):
    vae = make_vae(tmp_path / "vae", scaling_factor=0.5)
    checksum = weights_sha256(load_vae(vae, "cpu"))
    packed = write_dataset(tmp_path / "latents", vae=vae, vae_sha256=checksum)
    flags = [*nano, "--data-dir", packed]
    start(*flags, "--path-type", third_path, steps=2)
    assert math.isfinite(metrics_of(tmp_path / "run")[0]["loss"])
    generate_command(monkeypatch, tmp_path / "run", tmp_path / "out", "--no-grid", "--vae", vae)
    assert json.loads((tmp_path / "out/x.json").read_text())["settings"]["path_type"] == third_path
    assert np.load(tmp_path / "out/x.npz")["arr_0"].std() > 1


def test_the_loss_takes_a_third_path(third_path):
    loss = DeepFlowLoss(path_type=third_path, cfg_prob=0.0)
    x0, null = torch.zeros(6, 4, 2, 2), torch.zeros(6, dtype=torch.long)
    draws = loss.draw(1, x0.shape, torch.Generator().manual_seed(0))

    class Exact:
        accelerations = projections = ()

        def __init__(self, x, t):
            self.velocities = [x / t[0].reshape(-1, 1, 1, 1)]  # sigma' eps, for data that are 0

    terms = loss.terms(lambda x, t, condition: Exact(x, t), x0, null, null, draws)
    assert terms.velocity.max() < 1e-9


# ---------------------------------------------------------------- samplers


def midpoint(velocity, x, times, **_):
    for t, t_next in pairwise(times):
        half = 0.5 * (t + t_next)
        x = x + (t_next - t) * velocity(x + (half - t) * velocity(x, t), half)
    return x


def still(drift, x, times, diffusions, step_noise):
    """No steps but the last: an SDE for which there is no ODE of that name."""
    return x + drift(x, len(times) - 2) * (times[-1] - times[-2])


@pytest.fixture
def more_samplers(monkeypatch):
    monkeypatch.setitem(SAMPLERS, "midpoint", Sampler(midpoint, stochastic=False, least_steps=3))
    monkeypatch.setitem(SAMPLERS, "own-pace", Sampler(midpoint, stochastic=False, adaptive=True))
    monkeypatch.setitem(SAMPLERS, "sde-still", Sampler(still, stochastic=True, least_steps=4))


def test_the_ways_to_name_todays_samplers():
    named = {
        "sde": [(), ("--mode", "sde"), ("--solver", "euler"), ("--mode", "sde", "--solver", "euler")],
        "sde-heun": [("--mode", "sde", "--solver", "heun"), ("--mode", "sde", "--heun")],
        "euler": [("--mode", "ode"), ("--mode", "ode", "--solver", "euler")],
        "heun": [("--heun",), ("--solver", "heun"), ("--mode", "ode", "--heun")],
        "dopri5": [("--solver", "dopri5")],
    }
    assert named.keys() == SAMPLERS.keys()
    for method, lines in named.items():
        assert {generate_options(*line).method for line in lines} == {method}


def test_new_samplers_are_offered_by_name(more_samplers):
    assert generate_options("--solver", "midpoint").method == "midpoint"
    assert generate_options("--mode", "ode", "--solver", "midpoint").method == "midpoint"
    for line in (("--solver", "still"), ("--mode", "sde", "--solver", "still")):
        assert generate_options(*line).method == "sde-still"
    with pytest.raises(UserError, match="--solver midpoint with --mode sde: it solves the ODE; give --mode ode"):
        generate_options("--mode", "sde", "--solver", "midpoint")
    with pytest.raises(UserError, match="--solver still with --mode ode: it solves the SDE; give --mode sde"):
        generate_options("--mode", "ode", "--solver", "still")
    with pytest.raises(UserError, match="--num-steps is 2: give at least 3 for the midpoint"):
        generate_options("--solver", "midpoint", "--num-steps", 2)
    with pytest.raises(UserError, match="are of the SDE"):  # because it is no SDE, whatever its least steps
        generate_options("--solver", "midpoint", "--diffusion-norm", 2)
    assert generate_options("--solver", "still", "--num-steps", 4, "--diffusion-norm", 0.5).method == "sde-still"
    with pytest.raises(UserError, match="chooses its own steps"):
        generate_options("--solver", "own-pace", "--time-shift", 2)


def test_a_new_sampler_samples(more_samplers, run, monkeypatch, tmp_path):
    seen = {}
    for name, steps in (("euler", 4), ("midpoint", 4), ("still", 4), ("own-pace", 4)):
        flags = ("--mode", "ode") if name == "euler" else ("--solver", name)
        generate_command(monkeypatch, run, tmp_path, *flags, "--num-steps", str(steps), "--name", name, "--no-grid")
        seen[name] = np.load(tmp_path / f"{name}.npz")["arr_0"]
    assert (seen["midpoint"] == seen["own-pace"]).all()
    assert (seen["midpoint"] != seen["euler"]).any() and (seen["midpoint"] != seen["still"]).any()
    assert json.loads((tmp_path / "still.json").read_text())["settings"]["method"] == "sde-still"
    options = generate_options("--solver", "own-pace", "--num-steps", 7, "--ckpt", run)
    settings = generation.options.settings_of(options, {})
    name = default_name(options, settings, {})
    assert "own-pace" in name and "own-pace7" not in name


# ---------------------------------------------------------------- metrics


@pytest.fixture
def more_metrics(monkeypatch):
    shift = lambda c: float(abs(c.reference.pool.mean() - c.samples.pool.mean()))  # noqa: E731
    monkeypatch.setitem(METRICS, "mean_shift", Metric("shift of the mean", "demo", shift, is_distance=True))
    monkeypatch.setitem(METRICS, "count", Metric("samples seen", "demo", lambda c: float(len(c.samples.pool))))
    monkeypatch.setitem(METRICS, "unknown", Metric("not to be had", "demo", lambda c: None))


def write_images(path, count, seed):
    np.savez(path, arr_0=np.random.default_rng(seed).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8))
    return str(path)


def test_a_new_metric_is_in_the_table_by_its_title(more_metrics, tmp_path, monkeypatch, capsys):
    reference, made = (write_images(tmp_path / f"{seed}.npz", 20 + seed, seed) for seed in (0, 1))
    weights = str(write_features(tmp_path / "features.safetensors"))
    out = tmp_path / "out.json"
    line = ["--features", "demo", "--feature-weights", weights, "--json", str(out)]
    monkeypatch.setattr("sys.argv", ["evaluate.py", reference, made, *line])
    evaluate.main()
    scores = json.loads(out.read_text())["metrics"]
    assert list(scores) == ["frechet_distance", "mean_shift", "count"] and scores["count"] == 21
    printed = capsys.readouterr().out
    for name, value in scores.items():
        assert f"  {METRICS[name].title:<24}{value:.4f}\n" in printed
    assert "not to be had" not in printed


def test_previews_show_the_distances_and_no_other_metric(more_metrics, nano, start, tmp_path):
    vae = make_vae(tmp_path / "vae", scaling_factor=0.5)
    packed = write_dataset(tmp_path / "latents", resolution=16, vae=vae)
    score = ["--preview-reference", write_images(tmp_path / "reference.npz", 20, 0), "--preview-features", "demo"]
    score += ["--preview-feature-weights", write_features(tmp_path / "features.safetensors")]
    start(*nano, "--data-dir", packed, "--preview-every", "2", "--preview-samples", "20", *score, steps=2)
    (entry,) = (entry for entry in metrics_of(tmp_path / "run") if "loss" not in entry)
    assert set(entry) == {"step", "preview_frechet_distance", "preview_mean_shift"}


# ---------------------------------------------------------------- schedules, terms, choices


def test_a_new_schedule_is_a_choice_and_the_rate_of_the_run(nano, start, tmp_path, monkeypatch):
    monkeypatch.setitem(SCHEDULES, "ramp", lambda share: share)
    start(*nano, "--lr-schedule", "ramp", "--log-every", "1", steps=4)
    assert [entry["lr"] for entry in metrics_of(tmp_path / "run")] == [0.0, 0.25e-3, 0.5e-3, 0.75e-3]


def test_the_curves_are_those_of_all_terms(tmp_path, monkeypatch):
    drawn = []
    plot = Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda *a, **k: (drawn.append((k.get("label"), list(a[2]))), plot(*a, **k))[1])
    numbers = {"grad_norm": 1.0, "loss": 2.0, "velocity_1": 0.5, "acceleration": 0.25, "size": 4.0, "alignment": -0.5}
    entries = [{"step": i, **numbers, "loss_max": 2.0, "lr": 1e-3} for i in (1, 2)]
    plots.draw_losses(entries, "run", tmp_path / "loss.png")
    assert drawn == [
        ("velocity 1", [0.5] * 2),
        ("acceleration", [0.25] * 2),
        ("size", [4.0] * 2),
        (None, [0.5] * 2),  # the cosine, on an axis of its own
    ]


def test_flags_take_their_choices_from_the_tables():
    expected = {"path_type": PATHS, "weighting": WEIGHTINGS, "lr_schedule": SCHEDULES, "mixed_precision": PRECISIONS}
    flags = {action.dest: action.choices for action in training.options.build_parser()._actions}
    assert {name: flags[name] for name in expected} == {name: list(table) for name, table in expected.items()}
    flags = {action.dest: action.choices for action in generation.options.build_parser()._actions}
    assert flags["path_type"] == list(PATHS) and flags["diffusion_form"] == list(DIFFUSION_FORMS)
    assert flags["precision"] == list(PRECISIONS) and flags["solver"] == ["euler", "heun", "dopri5"]


def literals(path):
    """The lists, tuples, sets and dictionaries of constants in a source, as sets of their strings."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.List, ast.Tuple, ast.Set, ast.Dict)):
            parts = node.keys if isinstance(node, ast.Dict) else node.elts
            yield node.lineno, {p.value for p in parts if isinstance(p, ast.Constant) and isinstance(p.value, str)}


def test_no_table_is_written_out_a_second_time():
    twice, homes = [], set()
    for file in sorted(ROOT.rglob("*.py")):
        name = file.relative_to(ROOT).as_posix()
        if Path(name).parts[0] in ("tests", "data") or any(part.startswith(".") for part in Path(name).parts):
            continue
        found = list(literals(file))
        for home, tables in TABLES.items():
            for table in tables:
                for line, strings in found:
                    if len(strings & set(table)) >= 2:
                        homes.add(home)
                        twice += [] if name == home else [f"{name}:{line}: {sorted(strings & set(table))}"]
    assert homes == set(TABLES)
    assert twice == []
