import math

import numpy as np
import pytest
import torch
from conftest import relative_error

import samplers
from errors import UserError
from interpolant import PATHS
from models import DeepFlow

MEAN, STD = 1.5, 0.4


def gaussian_velocity(path):
    """The exact velocity E[V | x_t = x] for data N(MEAN, STD^2)."""

    def velocity(x, t):
        c = [value.reshape(-1, *[1] * (x.ndim - 1)) for value in PATHS[path](t)]
        alpha, sigma, d_alpha, d_sigma = c
        centred = (x - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)
        return d_alpha * (MEAN + alpha * STD**2 * centred) + d_sigma * sigma * centred

    return velocity


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_golden_drift_only_sde(golden_model, golden_io):
    velocity = lambda x, t: golden_model.velocity(x, t, golden_io["y"])  # noqa: E731
    with torch.no_grad():
        result = samplers.sample(
            velocity,
            golden_io["xT"],
            method="sde",
            num_steps=10,
            step_noise=lambda _: torch.zeros(3, 4, 8, 8),
        )
    assert result.dtype == torch.float64
    assert relative_error(result, golden_io["sde10_zero_noise"]) < 1e-5


@pytest.mark.parametrize("path", list(PATHS))
@pytest.mark.parametrize(("num_steps", "count", "bias"), [(250, 100_000, 0.02), (2000, 20_000, 0.006)])
def test_sde_reproduces_mean_and_variance_of_gaussian_data(path, num_steps, count, bias):
    # What the steps miss shrinks with their number, down to the noise that the last step leaves out: a variance of
    # 0.04^2 against 0.4^2, half a percent of the standard deviation.
    generator = torch.Generator().manual_seed(1)
    draw = lambda _: torch.randn(count, generator=generator, dtype=torch.float64)  # noqa: E731
    x = samplers.sample(
        gaussian_velocity(path),
        normal(count),
        method="sde",
        num_steps=num_steps,
        path_type=path,
        step_noise=draw,
    )
    assert x.mean().item() == pytest.approx(MEAN, abs=4 * STD / math.sqrt(count) + bias / 2)
    assert x.std().item() == pytest.approx(STD, rel=bias + 4 / math.sqrt(2 * count))


@pytest.mark.parametrize("path", list(PATHS))
@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2)])
def test_ode_converges_to_the_exact_map_at_its_order(path, method, order):
    noise = normal(100)
    # Probability flow between Gaussians is affine, and here maps quantile to quantile.
    exact = MEAN + STD * noise
    errors = [
        (samplers.sample(gaussian_velocity(path), noise, method=method, num_steps=n) - exact).abs().max()
        for n in (64, 128)
    ]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("path", list(PATHS))
def test_dopri5_reaches_its_tolerance(path):
    noise = normal(100)
    x = samplers.sample(gaussian_velocity(path), noise, method="dopri5", rtol=1e-8, atol=1e-8)
    assert torch.allclose(x, MEAN + STD * noise, atol=1e-6)


@pytest.mark.parametrize(("method", "calls"), [("sde", 10), ("euler", 10), ("heun", 19)])
def test_number_of_function_evaluations(method, calls):
    times = []

    def velocity(x, t):
        times.append(t)
        return torch.zeros_like(x)

    samplers.sample(velocity, normal(2, 3), method=method, num_steps=10)
    assert len(times) == calls
    assert all(t.shape == (2,) and 0 < t[0] <= 1 for t in times)


def test_sde_grid_ends_at_004_and_its_last_step_has_no_noise():
    times, noisy = [], []
    samplers.sample(
        lambda x, t: times.append(float(t[0])) or x,
        normal(1, 2),
        num_steps=5,
        step_noise=lambda step: noisy.append(step) or torch.zeros(1, 2),
    )
    assert times == pytest.approx([1.0, 0.76, 0.52, 0.28, 0.04])
    assert noisy == [0, 1, 2, 3]


def test_state_is_float64_and_network_keeps_its_dtype():
    seen = set()
    x = samplers.sample(
        lambda x, t: seen.add((x.dtype, t.dtype)) or x, normal(1, 2).float(), method="euler", num_steps=2
    )
    assert seen == {(torch.float32, torch.float64)}
    assert x.dtype == torch.float64


class RowCounter:
    """A network stand-in whose velocity is its label, and which counts the rows it is given."""

    def __init__(self):
        self.rows = []

    def __call__(self, x, t, y):
        assert len(x) == len(t) == len(y)
        self.rows.append(len(x))
        return y.to(x)[:, None].expand_as(x)


def test_guidance_formula_on_all_channels():
    model = RowCounter()
    velocity = samplers.classifier_free_guidance(model, torch.tensor([1, 3]), null_label=7, scale=1.5)
    v = velocity(torch.zeros(2, 4), torch.full((2,), 0.5))
    assert torch.equal(v, (7 + 1.5 * (torch.tensor([[1.0], [3.0]]) - 7)).expand(2, 4))


def test_guidance_costs_two_rows_inside_its_interval_and_one_outside():
    model = RowCounter()
    velocity = samplers.classifier_free_guidance(model, torch.tensor([1, 3]), 7, 1.5, low=0.3, high=0.7)
    for t in (0.0, 0.29, 0.3, 0.5, 0.7, 0.71, 1.0):
        velocity(torch.zeros(2, 4), torch.full((2,), t, dtype=torch.float64))
    assert model.rows == [2, 2, 4, 4, 4, 2, 2]


def test_no_guidance_at_scale_one():
    model = RowCounter()
    samplers.classifier_free_guidance(model, torch.tensor([1, 3]), 7, 1.0)(torch.zeros(2, 4), torch.full((2,), 0.5))
    assert model.rows == [2]


def test_image_noise_depends_on_seed_and_index_alone():
    shape = (4, 8, 8)
    together = samplers.ImageNoise(3, [5, 6, 7], shape)
    alone = samplers.ImageNoise(3, [6], shape)
    for _ in range(3):
        assert torch.equal(together.draw()[1], alone.draw()[0])
    assert not torch.equal(samplers.ImageNoise(4, [6], shape).draw(), samplers.ImageNoise(3, [6], shape).draw())
    many = samplers.ImageNoise(0, range(2000), (100,)).draw()
    assert len(np.unique(many[:, 0])) == 2000
    assert abs(many.mean()) < 0.01 and abs(many.std() - 1) < 0.01
    neighbours = (many[1:] * many[:-1]).mean()
    assert abs(neighbours) < 0.01


@pytest.mark.parametrize("method", ["sde", "euler", "heun"])
def test_image_is_the_same_at_batch_1_and_8(method):
    torch.manual_seed(0)
    model = DeepFlow(16, 2, 2, num_classes=3, projector_dim=8, df_idxs=[1], input_size=4).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)

    def run(indices):
        noise = samplers.ImageNoise(0, indices, (4, 4, 4))
        y = torch.tensor([i % 3 for i in indices])
        velocity = samplers.classifier_free_guidance(model.velocity, y, 3, scale=2.0)
        start = noise.draw().double()
        with torch.no_grad():
            return samplers.sample(velocity, start, method=method, num_steps=6, step_noise=lambda _: noise.draw())

    batch = run(range(8))
    alone = torch.cat([run([i]) for i in range(8)])
    assert torch.allclose(batch, alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(method="rk45"), "unknown sampler 'rk45': choose one of sde, euler, heun, dopri5"),
        (dict(method="euler", num_steps=0), "num_steps is 0: euler needs at least 1"),
        (dict(method="sde", num_steps=1), "num_steps is 1: sde needs at least 2"),
    ],
)
def test_bad_options_are_user_errors(options, message):
    with pytest.raises(UserError, match=message):
        samplers.sample(lambda x, t: x, normal(1, 2), **options)
