"""The weight average against its closed form."""

import pytest
import torch
from torch import nn

from training.ema import EMA, averages


def small_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()
    model[0].bias.requires_grad_(False)
    return model


def test_average_of_a_changing_weight_is_its_closed_form():
    model, decay = small_model(), 0.9
    ema = EMA(model, decay)
    history = [model[0].weight.detach().clone()]
    for step in range(1, 8):
        with torch.no_grad():
            model[0].weight.add_(step)
        ema.update(model, 1)
        history.append(model[0].weight.detach().clone())
    expected = decay**7 * history[0] + sum((1 - decay) * decay ** (7 - i) * history[i] for i in range(1, 8))
    torch.testing.assert_close(ema.model.state_dict()["0.weight"], expected, rtol=1e-14, atol=0)


def test_fixed_weights_stay_as_they_are_and_buffers_are_copied():
    model = small_model()
    ema = EMA(model, 0.999)
    bias = model[0].bias.clone()
    model(torch.randn(16, 3, dtype=torch.float64))  # moves the batch norm's running mean, and counts the batch
    ema.update(model, 1)
    assert torch.equal(ema.model.state_dict()["0.bias"], bias)
    assert torch.equal(ema.model.state_dict()["1.running_mean"], model[1].running_mean)
    assert ema.model.state_dict()["1.num_batches_tracked"] == 1


def test_average_does_not_share_memory_with_the_weights():
    model = small_model()
    ema = EMA(model, 0.5)
    before = ema.model.state_dict()["0.weight"].clone()
    with torch.no_grad():
        model[0].weight.zero_()
    assert torch.equal(ema.model.state_dict()["0.weight"], before)


def test_state_fits_the_model_and_is_restored_exactly():
    model = small_model()
    ema = EMA(model, 0.5)
    with torch.no_grad():
        model[0].weight.zero_()
    ema.update(model, 1)
    model.load_state_dict(ema.model.state_dict())
    other = EMA(small_model(), 0.5)
    other.model.load_state_dict(ema.model.state_dict())
    assert all(
        torch.equal(other.model.state_dict()[name], ema.model.state_dict()[name]) for name in ema.model.state_dict()
    )


def test_different_keys_are_refused_by_name():
    larger = nn.Sequential(*small_model(), nn.Linear(4, 1).double())
    with pytest.raises(KeyError, match=r"2\.bias, 2\.weight"):
        EMA(small_model(), 0.5).update(larger, 1)


@pytest.mark.parametrize("std", [0.05, 0.1, 0.25])
def test_a_power_function_average_has_the_width_it_is_named_for(std):
    """The weights' times of origin, averaged with the average's own weights, spread by `std` of the run's length."""
    steps, model = 4000, nn.Linear(1, 2, bias=False).double()
    ema = averages(model, [], [std])[f"std{std:g}"]
    for step in range(1, steps + 1):
        with torch.no_grad():
            model.weight.copy_(torch.tensor([[step], [step**2]]))
        ema.update(model, step)
    first, second = (ema.model.weight.flatten() / torch.tensor([steps, steps**2])).tolist()
    assert (second - first**2) ** 0.5 == pytest.approx(std, rel=2e-3)


def test_several_averages_are_named_and_follow_their_own_decay():
    model = small_model()
    emas = averages(model, [0.5, 0.9], [0.1])
    assert list(emas) == ["0.5", "0.9", "std0.1"]
    before = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight.add_(1)
    for ema in emas.values():
        ema.update(model, 1)
    moved = [(ema.model[0].weight - before).mean().item() for ema in emas.values()]
    assert moved == pytest.approx([0.5, 0.1, 1.0])  # the first step says all that a power function knows
