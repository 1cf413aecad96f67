import math

import pytest
import torch

import interpolant
from common.errors import UserError

PATHS = list(interpolant.PATHS)
INNER = torch.linspace(0.02, 0.98, 25, dtype=torch.float64)


def batch(seed=0, n=25):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n, 3, 2, generator=generator, dtype=torch.float64) for _ in range(2))


@pytest.mark.parametrize("path", PATHS)
def test_ends_are_data_and_noise(path):
    x0, noise = batch(n=2)
    assert torch.allclose(interpolant.interpolate(path, x0, noise, torch.zeros(2)), x0, atol=1e-6)
    assert torch.allclose(interpolant.interpolate(path, x0, noise, torch.ones(2)), noise, atol=1e-6)


@pytest.mark.parametrize("path", PATHS)
def test_derivatives_match_finite_differences(path):
    h = 1e-5
    before, at, after = (interpolant.PATHS[path](INNER + d) for d in (-h, 0, h))
    assert torch.allclose((after.alpha - before.alpha) / (2 * h), at.d_alpha, atol=1e-8)
    assert torch.allclose((after.sigma - before.sigma) / (2 * h), at.d_sigma, atol=1e-8)


@pytest.mark.parametrize("path", PATHS)
def test_velocity_is_the_time_derivative_of_the_path(path):
    x0, noise = batch()
    h = 1e-5
    slope = (
        interpolant.interpolate(path, x0, noise, INNER + h) - interpolant.interpolate(path, x0, noise, INNER - h)
    ) / (2 * h)
    assert torch.allclose(slope, interpolant.velocity_target(path, x0, noise, INNER), atol=1e-8)


def test_linear_velocity_is_noise_minus_data():
    x0, noise = batch()
    assert torch.equal(interpolant.velocity_target("linear", x0, noise, INNER), noise - x0)


@pytest.mark.parametrize("path", PATHS)
def test_velocity_round_trips_to_data_and_score(path):
    x0, noise = batch()
    x = interpolant.interpolate(path, x0, noise, INNER)
    v = interpolant.velocity_target(path, x0, noise, INNER)
    assert torch.allclose(interpolant.x0_from_velocity(path, x, v, INNER), x0, atol=1e-12)
    # The conditional score of p_t(x | x_0) is -eps / sigma.
    sigma = interpolant.PATHS[path](INNER).sigma[:, None, None]
    assert torch.allclose(interpolant.score_from_velocity(path, x, v, INNER), -noise / sigma, atol=1e-10)


def test_linear_score_is_the_formula_of_the_paper():
    x, v = batch()
    t = INNER[:, None, None]
    assert torch.allclose(interpolant.score_from_velocity("linear", x, v, INNER), -((1 - t) * v + x) / t)


@pytest.mark.parametrize("path", PATHS)
def test_lognormal_times_have_normal_log_signal_to_noise(path):
    t = interpolant.draw_times("lognormal", path, 100_000, torch.Generator().manual_seed(0)).double()
    c = interpolant.PATHS[path](t)
    log_ratio = torch.log(c.sigma / c.alpha)
    assert abs(log_ratio.mean()) < 0.02
    assert abs(log_ratio.std() - 1) < 0.02


def test_uniform_times_have_uniform_moments():
    t = interpolant.draw_times("uniform", "cosine", 100_000, torch.Generator().manual_seed(0))
    assert t.min() >= 0 and t.max() <= 1
    assert abs(t.mean() - 0.5) < 0.005
    assert abs(t.std() - math.sqrt(1 / 12)) < 0.005


def test_unknown_names_are_user_errors():
    with pytest.raises(UserError, match="unknown path type 'spiral'.*linear, cosine"):
        interpolant.coefficients("spiral", INNER, INNER)
    with pytest.raises(UserError, match="unknown path type 'spiral'"):
        interpolant.draw_times("lognormal", "spiral", 1, torch.Generator())
    with pytest.raises(UserError, match="unknown weighting 'heavy'.*lognormal, uniform"):
        interpolant.draw_times("heavy", "linear", 1, torch.Generator())
