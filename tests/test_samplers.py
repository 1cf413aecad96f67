import math

import numpy as np
import pytest
import torch
from helpers.golden import relative_error

import samplers
from common.errors import UserError
from interpolant import PATHS
from models import DeepFlow

MEAN, STD = 1.5, 0.4

NULL = torch.tensor([7, 7])


def gaussian_velocity(path, mean=MEAN, std=STD):
    """The exact velocity E[V | x_t = x] for data N(mean, std^2)."""

    def velocity(x, t):
        c = [value.reshape(-1, *[1] * (x.ndim - 1)) for value in PATHS[path](t)]
        alpha, sigma, d_alpha, d_sigma = c
        centred = (x - alpha * mean) / (alpha**2 * std**2 + sigma**2)
        return d_alpha * (mean + alpha * std**2 * centred) + d_sigma * sigma * centred

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


def exact_moments(path, mean, std, **options):
    """Mean and standard deviation that a scheme gives to Gaussian data, without drawing anything.

    With the exact velocity a scheme is affine in its noises: row 0 has none, row k the k-th alone, of size 1.
    """
    steps = options["num_steps"]
    start = torch.zeros(steps + 1, 1, dtype=torch.float64)
    start[1] = 1

    def one_hot(step):
        noise = torch.zeros_like(start)
        noise[step + 2] = 1
        return noise

    x = samplers.sample(gaussian_velocity(path, mean, std), start, path_type=path, step_noise=one_hot, **options)
    return x[0].item(), (x[1:] - x[0]).norm().item()


NORMS = dict.fromkeys(samplers.DIFFUSION_FORMS, 1.0) | {"constant": 0.04}


def moments_after_the_last_step(path, form, norm):
    """What is left of N(MEAN, STD^2) where the noisy steps are exact: the deterministic one from t = 0.04 to 0."""
    t = torch.tensor([samplers.SDE_LAST_TIME], dtype=torch.float64)
    alpha, sigma, *_ = (value.item() for value in PATHS[path](t))
    w = samplers.sde_schedule(2, path, form, norm)[1][-1]
    mean, variance = alpha * MEAN, alpha**2 * STD**2 + sigma**2

    def at(x):
        v = gaussian_velocity(path)(torch.tensor([x], dtype=torch.float64), t).item()
        return x - t.item() * (v + 0.5 * w * (x - mean) / variance)

    return at(mean), (at(mean + 1) - at(mean)) * math.sqrt(variance)


@pytest.mark.parametrize("path", list(PATHS))
@pytest.mark.parametrize("form", samplers.DIFFUSION_FORMS)
@pytest.mark.parametrize(("method", "error"), [("sde", 2e-3), ("sde-heun", 1e-5)])
def test_every_sde_reproduces_mean_and_variance(path, form, method, error):
    options = dict(method=method, num_steps=1000, diffusion_form=form, diffusion_norm=NORMS[form])
    mean, std = exact_moments(path, MEAN, STD, **options)
    expected_mean, expected_std = moments_after_the_last_step(path, form, NORMS[form])
    assert mean == pytest.approx(expected_mean, abs=error) and std == pytest.approx(expected_std, abs=error)
    assert (mean, std) == pytest.approx((MEAN, STD), rel=0.03)  # what that last step costs


@pytest.mark.parametrize("form", samplers.DIFFUSION_FORMS)
@pytest.mark.parametrize("method", ["sde", "sde-heun"])
def test_drawn_samples_have_the_moments(form, method):
    count, generator = 20_000, torch.Generator().manual_seed(1)
    options = dict(method=method, num_steps=100, diffusion_form=form, diffusion_norm=NORMS[form])
    draw = lambda _: torch.randn(count, generator=generator, dtype=torch.float64)  # noqa: E731
    x = samplers.sample(gaussian_velocity("linear"), normal(count), step_noise=draw, **options)
    mean, std = exact_moments("linear", MEAN, STD, **options)
    assert x.mean().item() == pytest.approx(mean, abs=4 * STD / math.sqrt(count))
    assert x.std().item() == pytest.approx(std, rel=4 / math.sqrt(2 * count))


@pytest.mark.parametrize("path", list(PATHS))
@pytest.mark.parametrize("form", ["linear", "increasing-decreasing"])
@pytest.mark.parametrize(("method", "order"), [("sde", 1), ("sde-heun", 2)])
def test_sde_converges_in_distribution_at_its_order(path, form, method, order):
    moments = [
        np.array(exact_moments(path, MEAN, STD, method=method, num_steps=n + 1, diffusion_form=form))
        for n in (400, 800, 1600)
    ]
    coarse, fine = abs(moments[0] - moments[1]), abs(moments[1] - moments[2])
    coarse, fine = coarse[coarse > 1e-12], fine[coarse > 1e-12]  # on the linear path the mean is exact at once
    assert np.log2(coarse / fine) == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize("method", ["sde", "sde-heun"])
@pytest.mark.parametrize("form", samplers.DIFFUSION_FORMS)
@pytest.mark.parametrize("path", list(PATHS))
def test_no_form_blows_up_where_data_do_not_vary(path, form, method):
    _, std = exact_moments(
        path, 0.0, 1e-6, method=method, num_steps=50, diffusion_form=form, diffusion_norm=NORMS[form]
    )
    assert std < 0.1


@pytest.mark.parametrize(
    ("options", "largest"),
    [
        (dict(diffusion_form="constant", diffusion_norm=0.05), "0.04"),  # sigma^2 / dt in the last step
        (dict(diffusion_form="constant"), None),
        (dict(diffusion_form="linear", diffusion_norm=1.1), "1"),
        (dict(diffusion_form="increasing-decreasing", num_steps=3), None),
    ],
)
def test_noise_that_the_steps_do_not_follow_is_refused(options, largest):
    with pytest.raises(UserError, match="is too strong for the step from t = .* lower --diffusion-norm") as refused:
        samplers.sample(lambda x, t: x, normal(1, 2), **options)
    assert largest is None or f"bears a norm of {largest}:" in str(refused.value)


@pytest.mark.parametrize("shift", [0.5, 3.0])
def test_time_shift_bends_the_grid_between_its_ends(shift):
    ode, sde = samplers.time_grid(4, shift), samplers.time_grid(4, shift, samplers.SDE_LAST_TIME)
    assert ode == pytest.approx([shift * t / (1 + (shift - 1) * t) for t in (1, 0.75, 0.5, 0.25, 0)])
    assert sde[0] == 1 and sde[3] == pytest.approx(0.04) and sde[4] == 0
    straight = [t / (shift - (shift - 1) * t) for t in sde[:4]]
    assert np.diff(straight, 2) == pytest.approx(0, abs=1e-12)
    assert (sde[1] > samplers.time_grid(4, 1.0, 0.04)[1]) == (shift > 1)


@pytest.mark.parametrize("shift", [0.05, 0.1, 0.2, 1.0, 3.3])
def test_a_shifted_grid_begins_at_1_where_guidance_is_on(shift):
    model, noise = RowCounter(), torch.zeros(2, 4)
    velocity = samplers.classifier_free_guidance(model, torch.tensor([1, 3]), NULL, 1.5)
    for method in ("sde", "euler"):
        samplers.sample(velocity, noise, method=method, num_steps=5, time_shift=shift, step_noise=lambda _: noise)
    assert model.rows == [4] * 10
    assert samplers.time_grid(5, shift)[0] == samplers.time_grid(5, shift, samplers.SDE_LAST_TIME)[0] == 1


def test_shifted_grid_converges_to_the_same_map():
    noise = normal(100)
    x = samplers.sample(gaussian_velocity("linear"), noise, method="heun", num_steps=200, time_shift=2.0)
    assert torch.allclose(x, MEAN + STD * noise, atol=1e-3)


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


@pytest.mark.parametrize(("method", "calls"), [("sde", 10), ("sde-heun", 19), ("euler", 10), ("heun", 19)])
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
    velocity = samplers.classifier_free_guidance(model, torch.tensor([1, 3]), NULL, scale=1.5)
    v = velocity(torch.zeros(2, 4), torch.full((2,), 0.5))
    assert torch.equal(v, (7 + 1.5 * (torch.tensor([[1.0], [3.0]]) - 7)).expand(2, 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_guidance_of_a_network_in_half_precision_does_not_round_again(dtype):
    strong, weak = (normal(2, 50, seed=seed).to(dtype) for seed in (1, 2))
    expected = weak.double() + 1.325 * (strong.double() - weak.double())
    x, t, y = torch.zeros(2, 50), torch.full((2,), 0.5), torch.tensor([1, 3])
    both = lambda x, t, y: torch.cat([strong, weak])  # noqa: E731
    free = samplers.classifier_free_guidance(both, y, NULL, 1.325)(x, t)
    auto = samplers.autoguidance(lambda *_: strong, lambda *_: weak, y, 1.325)(x, t)
    for v in (free, auto):
        assert torch.allclose(v.double(), expected, rtol=0, atol=1e-6)


def test_guidance_costs_two_rows_inside_its_interval_and_one_outside():
    model = RowCounter()
    velocity = samplers.classifier_free_guidance(model, torch.tensor([1, 3]), NULL, 1.5, low=0.3, high=0.7)
    for t in (0.0, 0.29, 0.3, 0.5, 0.7, 0.71, 1.0):
        velocity(torch.zeros(2, 4), torch.full((2,), t, dtype=torch.float64))
    assert model.rows == [2, 2, 4, 4, 4, 2, 2]


@pytest.mark.parametrize(
    ("method", "rows"),
    [
        ("sde", [2, 4, 4, 2, 2]),  # t = 1, 0.76, 0.52, 0.28, 0.04
        ("sde-heun", [2, 4, 4, 4, 4, 2, 2, 2, 2]),
        ("euler", [2, 4, 4, 2, 2]),  # t = 1, 0.8, 0.6, 0.4, 0.2
        ("heun", [2, 4, 4, 4, 4, 2, 2, 2, 2]),
    ],
)
def test_rows_of_every_step(method, rows):
    model, noise = RowCounter(), torch.zeros(2, 4)
    velocity = samplers.classifier_free_guidance(model, torch.tensor([1, 3]), NULL, 1.5, low=0.5, high=0.9)
    samplers.sample(velocity, noise, method=method, num_steps=5, step_noise=lambda _: noise)
    assert model.rows == rows
    unguided = RowCounter()
    velocity = samplers.classifier_free_guidance(unguided, torch.tensor([1, 3]), NULL, 1.0)
    samplers.sample(velocity, noise, method=method, num_steps=5, step_noise=lambda _: noise)
    assert unguided.rows == [2] * len(rows)


def test_autoguidance_formula_and_rows():
    strong, weak = RowCounter(), RowCounter()
    halved = lambda x, t, y: weak(x, t, y) / 2  # noqa: E731
    velocity = samplers.autoguidance(strong, halved, torch.tensor([1, 3]), 1.5, low=0.3, high=0.7)
    v = velocity(torch.zeros(2, 4), torch.full((2,), 0.5, dtype=torch.float64))
    assert torch.equal(v, torch.tensor([[0.5 + 1.5 * 0.5], [1.5 + 1.5 * 1.5]]).expand(2, 4))
    for t in (0.29, 0.3, 0.7, 0.71):
        velocity(torch.zeros(2, 4), torch.full((2,), t, dtype=torch.float64))
    assert strong.rows == [2] * 5 and weak.rows == [2] * 3
    samplers.autoguidance(strong, halved, torch.tensor([1, 3]), 1.0)(torch.zeros(2, 4), torch.full((2,), 0.5))
    assert len(weak.rows) == 3


def test_no_guidance_at_scale_one():
    model = RowCounter()
    samplers.classifier_free_guidance(model, torch.tensor([1, 3]), NULL, 1.0)(torch.zeros(2, 4), torch.full((2,), 0.5))
    assert model.rows == [2]


def test_image_noise_depends_on_seed_and_index_alone():
    shape = (4, 8, 8)
    together = samplers.ImageNoise(3, [5, 6, 7], shape)
    alone = samplers.ImageNoise(3, [6], shape)
    for _ in range(3):
        assert torch.equal(together.draw()[1], alone.draw()[0])
    seeds = [3, 4, 2**62 + 1, 2**63 + 1, 2**63 + 2, 2**64 - 2, 2**64 - 1]
    assert len({samplers.ImageNoise(seed, [6], shape).draw().numpy().tobytes() for seed in seeds}) == len(seeds)
    many = samplers.ImageNoise(0, range(2000), (100,)).draw()
    assert len(np.unique(many[:, 0])) == 2000
    assert abs(many.mean()) < 0.01 and abs(many.std() - 1) < 0.01
    neighbours = (many[1:] * many[:-1]).mean()
    assert abs(neighbours) < 0.01


@pytest.mark.parametrize("method", ["sde", "sde-heun", "euler", "heun"])
def test_image_is_the_same_at_batch_1_and_8(method):
    torch.manual_seed(0)
    model = DeepFlow(16, 2, 2, num_classes=3, projector_dim=8, df_idxs=[1], input_size=4).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)

    def run(indices):
        noise = samplers.ImageNoise(0, indices, (4, 4, 4))
        y = torch.tensor([i % 3 for i in indices])
        velocity = samplers.classifier_free_guidance(model.velocity, y, model.null_condition(len(y)), scale=2.0)
        start = noise.draw().double()
        with torch.no_grad():
            return samplers.sample(velocity, start, method=method, num_steps=6, step_noise=lambda _: noise.draw())

    batch = run(range(8))
    alone = torch.cat([run([i]) for i in range(8)])
    assert torch.allclose(batch, alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(method="rk45"), "unknown sampler 'rk45': choose one of sde, sde-heun, euler, heun, dopri5"),
        (dict(method="euler", num_steps=0), "num_steps is 0: euler needs at least 1"),
        (dict(method="sde", num_steps=1), "num_steps is 1: sde needs at least 2"),
        (dict(method="sde-heun", num_steps=1), "num_steps is 1: sde-heun needs at least 2"),
        (dict(diffusion_form="SBDM"), "unknown diffusion form 'SBDM': choose one of linear, sigma, constant"),
        (dict(diffusion_norm=-1.0), "diffusion norm is -1.0: give a number of 0 or more"),
        (dict(path_type="elliptic"), "unknown path type 'elliptic'"),
        (dict(time_shift=0.0), "time shift is 0.0: give a positive number"),
        (dict(method="euler", time_shift=math.nan), "time shift is nan: give a positive number"),
    ],
)
def test_bad_options_are_user_errors(options, message):
    with pytest.raises(UserError, match=message):
        samplers.sample(lambda x, t: x, normal(1, 2), **options)
