import math
from types import SimpleNamespace

import pytest
import torch
from helpers.golden import relative_error
from torch.nn.functional import cosine_similarity

from common.errors import UserError
from interpolant import PATHS
from loss import DeepFlowLoss, Draws, branch_times, negative_cosine
from models import DeepFlow

K, N, SHAPE = 3, 4, (2, 3, 3)


def draws_at(times, noise):
    """Given times and noise, and no condition dropped."""
    return Draws(times, noise, torch.zeros(times.shape[1], dtype=torch.bool))


def terms_of(case, loss=None, features=None):
    """The terms of a case."""
    draws = draws_at(case.times, case.noise)
    return (loss or DeepFlowLoss()).terms(lambda *_: case.output, case.x0, case.y, case.y, draws, features)


def double(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def case():
    """A made-up network answer in float64, with its data, noise and times."""
    times = torch.rand(K, N, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    output = SimpleNamespace(
        velocities=[double(N, *SHAPE, seed=i).requires_grad_() for i in range(K)],
        accelerations=[double(N, *SHAPE, seed=10 + i).requires_grad_() for i in range(K - 1)],
        projections=[double(N, 5, 6, seed=20 + i) for i in range(K - 1)],
    )
    return SimpleNamespace(
        x0=double(N, *SHAPE, seed=30),
        noise=double(N, *SHAPE, seed=31),
        times=times,
        y=torch.zeros(N, dtype=torch.long),
        features=double(N, 5, 6, seed=32),
        output=output,
    )


def test_golden_terms_and_gradients(golden_model, golden_io):
    loss = DeepFlowLoss()
    io = golden_io
    terms = loss.terms(golden_model, io["x0"], io["y"], io["y"], draws_at(io["ts"], io["eps"]))
    assert terms.velocity.dtype == terms.acceleration.dtype == torch.float32
    assert relative_error(terms.velocity, io["vel_loss"]) < 1e-5
    assert relative_error(terms.acceleration, io["acc_loss"]) < 1e-5
    loss.total(terms).mean().backward()
    parameters = dict(golden_model.named_parameters())
    golden = {name.removeprefix("grad/"): grad for name, grad in io.items() if name.startswith("grad/")}
    assert len(golden) == 10
    for name, grad in golden.items():
        assert relative_error(parameters[name].grad, grad) < 1e-4, name


@pytest.mark.parametrize("path", list(PATHS))
def test_terms_equal_a_loop_over_samples(case, path):
    loss = DeepFlowLoss(path_type=path, scale_weight=[0.3, 0.5, 2.0], acc_coeff=0.7, proj_coeff=0.4)
    terms = terms_of(case, loss, case.features)
    for n in range(N):
        alpha, sigma, d_alpha, d_sigma = PATHS[path](case.times[:, n])
        target = d_alpha[0] * case.x0[n] + d_sigma[0] * case.noise[n]
        errors = [((v[n] - target) ** 2).mean() for v in case.output.velocities]
        velocity = 0.3 * errors[0] + 0.5 * errors[1] + 2.0 * errors[2]
        acceleration = alignment = 0
        for i in range(K - 1):
            t = case.times[i, n]
            x_t = alpha[i] * case.x0[n] + sigma[i] * case.noise[n]
            reached = x_t - t * case.output.velocities[i][n] + t**2 / 2 * case.output.accelerations[i][n]
            acceleration += ((reached - case.x0[n]) ** 2).mean()
            pairs = zip(case.output.projections[i][n], case.features[n], strict=True)
            alignment -= sum(cosine_similarity(p, f, dim=0) for p, f in pairs) / 5 / (K - 1)
        assert terms.velocity[n].item() == pytest.approx(velocity.item())
        assert terms.acceleration[n].item() == pytest.approx(acceleration.item())
        assert terms.alignment[n].item() == pytest.approx(alignment.item(), abs=1e-6)
        total = velocity + 0.7 * acceleration + 0.4 * alignment
        assert loss.total(terms)[n].item() == pytest.approx(total.item(), abs=1e-6)


@pytest.mark.parametrize("widths", [[6], [6, 3], [2, 5, 4]])
def test_alignment_equals_a_loop_in_float64(case, widths):
    """Over places of alignment, encoders, samples and tokens, written out."""
    places, tokens = K - 1, 5
    features = [double(N, tokens, width, seed=40 + e) for e, width in enumerate(widths)]
    case.output.projections = [
        double(N, tokens, width, seed=50 + 10 * i + e) for i in range(places) for e, width in enumerate(widths)
    ]
    given = features if len(features) > 1 else features[0]
    terms = terms_of(case, features=given)
    for n in range(N):
        total = 0.0
        for i in range(places):
            for e in range(len(widths)):
                for j in range(tokens):
                    p, f = case.output.projections[i * len(widths) + e][n, j].tolist(), features[e][n, j].tolist()
                    dot = sum(a * b for a, b in zip(p, f, strict=True))
                    norms = math.sqrt(sum(a * a for a in p)) * math.sqrt(sum(b * b for b in f))
                    total -= dot / norms / tokens / places / len(widths)
        assert terms.alignment[n].item() == pytest.approx(total, rel=1e-12)


def test_alignment_is_normalised_in_float32():
    """In half precision the square of such a feature is infinite."""
    projection = torch.full((2, 3, 8), 300.0, dtype=torch.float16)
    value = negative_cosine(projection, projection.clone())
    assert value.dtype == torch.float32 and torch.allclose(value, torch.full((2,), -1.0))


def test_without_features_there_is_no_alignment(case):
    terms = terms_of(case)
    assert terms.alignment is None and "alignment" not in terms.named()


@pytest.mark.parametrize(
    ("projections", "features"),
    [
        ([], [(N, 5, 6)]),
        ([(N, 5, 6)] * 2, []),
        ([(N, 5, 6)] * 2, [(N, 5, 7)]),
        ([(N, 5, 6)] * 2, [(N, 4, 6)]),
        ([(N, 5, 6)] * 3, [(N, 5, 6)] * 2),
        ([(N, 5, 6), (N, 5, 7)], [(N, 5, 7), (N, 5, 6)]),
    ],
)
def test_features_that_do_not_fit_the_projections_are_a_user_error(case, projections, features):
    case.output.projections = [torch.ones(shape) for shape in projections]
    features = [torch.ones(shape) for shape in features]
    with pytest.raises(UserError, match="do not fit the model's projections"):
        terms_of(case, features=features)


def test_input_is_the_noisy_latent_of_the_first_time(case):
    seen = []
    model = lambda x, t, y: seen.append((x, t)) or case.output  # noqa: E731
    DeepFlowLoss().terms(model, case.x0, case.y, case.y, draws_at(case.times, case.noise))
    t1 = case.times[0].view(N, 1, 1, 1)
    assert torch.allclose(seen[0][0], (1 - t1) * case.x0 + t1 * case.noise)
    assert torch.equal(seen[0][1], case.times)


def test_acceleration_term_does_not_train_velocities(case):
    terms = terms_of(case)
    terms.acceleration.sum().backward()
    assert all(v.grad is None or not v.grad.any() for v in case.output.velocities)
    assert all(a.grad.any() for a in case.output.accelerations)


def test_branch_times_stay_near_in_range_and_go_one_way():
    first = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    times = branch_times(first, 4, 0.05, torch.Generator().manual_seed(1))
    gaps = times.diff(dim=0)
    assert torch.equal(times[0], first)
    assert times.min() >= 0 and times.max() <= 1
    assert gaps.abs().max() <= 0.05 + 1e-6
    inner = ((times > 0) & (times < 1)).all(0)
    assert torch.equal(gaps[:, inner].sign().abs(), torch.ones_like(gaps[:, inner]))
    assert (gaps[:, inner].sign() == gaps[0, inner].sign()).all()
    assert abs(gaps[0, inner].sign().mean()) < 0.03  # both ways equally often, sample by sample
    assert abs(gaps[0, inner].abs().mean() - 0.025) < 0.001  # u is uniform


def test_labels_drop_to_the_null_class_at_the_given_rate(case):
    draws = DeepFlowLoss(cfg_prob=0.1).draw(K, (20_000, 1, 1, 1), torch.Generator().manual_seed(0))
    assert abs(draws.dropped.float().mean() - 0.1) < 0.01
    assert not DeepFlowLoss(cfg_prob=0.0).draw(K, (1000, 1, 1, 1), torch.Generator()).dropped.any()
    seen = []
    model = lambda x, t, y: seen.append(y) or case.output  # noqa: E731
    draws = Draws(case.times, case.noise, torch.tensor([True, False, False, True]))
    DeepFlowLoss().terms(model, case.x0, torch.tensor([3, 4, 5, 6]), torch.full((4,), 10), draws)
    assert seen[0].tolist() == [10, 4, 5, 10]
    tokens, null = double(N, 2, 3, seed=60), double(N, 2, 3, seed=61)  # a condition of any shape
    DeepFlowLoss().terms(model, case.x0, tokens, null, draws)
    assert torch.equal(seen[1], torch.stack([null[0], tokens[1], tokens[2], null[3]]))


def test_draws_of_a_batch_cut_into_rows_are_the_draws_of_its_parts(case):
    loss, parts = DeepFlowLoss(), []
    draws = loss.draw(K, (N, *SHAPE), torch.Generator().manual_seed(3))
    for rows in (slice(0, 1), slice(1, N)):
        output = SimpleNamespace(**{name: [v[rows] for v in values] for name, values in vars(case.output).items()})
        parts.append(loss.terms(lambda *_, o=output: o, case.x0[rows], case.y[rows], case.y[rows], draws.rows(rows)))
    whole = loss.terms(lambda *_: case.output, case.x0, case.y, case.y, draws)
    assert torch.allclose(torch.cat([part.velocity for part in parts]), whole.velocity)
    assert torch.allclose(torch.cat([part.acceleration for part in parts]), whole.acceleration)


@pytest.mark.parametrize("df_idxs", [[], [1], [1, 2]])
def test_a_training_call_is_a_function_of_the_generator(df_idxs):
    model = DeepFlow(16, 3, 2, num_classes=3, projector_dim=8, df_idxs=df_idxs, input_size=4)
    loss, x0, y = DeepFlowLoss(), torch.randn(5, 4, 4, 4), torch.tensor([0, 1, 2, 0, 1])
    null = model.null_condition(5)
    draws = [loss.draw(model.num_branches, x0.shape, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    a, b, c = (loss.total(loss.terms(model, x0, y, null, drawn)) for drawn in draws)
    assert a.shape == (5,)
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_wrong_number_of_weights_is_a_user_error(case):
    loss = DeepFlowLoss(scale_weight=[0.2, 1.0])
    with pytest.raises(UserError, match="scale_weight has 2 entries for 3 branches"):
        terms_of(case, loss)


def test_wrong_number_of_times_is_a_user_error(case):
    with pytest.raises(UserError, match="2 times were given for a model of 3 branches"):
        case.times = case.times[:2]
        terms_of(case)
