"""The weight average against its closed form."""

import pytest
import torch
from torch import nn

from training.ema import EMA


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
        ema.update(model)
        history.append(model[0].weight.detach().clone())
    expected = decay**7 * history[0] + sum((1 - decay) * decay ** (7 - i) * history[i] for i in range(1, 8))
    torch.testing.assert_close(ema.state["0.weight"], expected, rtol=1e-14, atol=0)


def test_fixed_weights_stay_as_they_are_and_buffers_are_copied():
    model = small_model()
    ema = EMA(model, 0.999)
    bias = model[0].bias.clone()
    model(torch.randn(16, 3, dtype=torch.float64))  # moves the batch norm's running mean, and counts the batch
    ema.update(model)
    assert torch.equal(ema.state["0.bias"], bias)
    assert torch.equal(ema.state["1.running_mean"], model[1].running_mean)
    assert ema.state["1.num_batches_tracked"] == 1


def test_average_does_not_share_memory_with_the_weights():
    model = small_model()
    ema = EMA(model, 0.5)
    before = ema.state["0.weight"].clone()
    with torch.no_grad():
        model[0].weight.zero_()
    assert torch.equal(ema.state["0.weight"], before)


def test_state_fits_the_model_and_is_restored_exactly():
    model = small_model()
    ema = EMA(model, 0.5)
    with torch.no_grad():
        model[0].weight.zero_()
    ema.update(model)
    model.load_state_dict(ema.state)
    other = EMA(small_model(), 0.5)
    other.load(ema.state)
    assert all(torch.equal(other.state[name], ema.state[name]) for name in ema.state)


@pytest.mark.parametrize("act", ["update", "load"])
def test_different_keys_are_refused_by_name(act):
    ema = EMA(small_model(), 0.5)
    larger = nn.Sequential(*small_model(), nn.Linear(4, 1).double())
    with pytest.raises(KeyError, match=r"2\.bias, 2\.weight"):
        ema.update(larger) if act == "update" else ema.load(larger.state_dict())
