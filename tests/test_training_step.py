"""`TrainingStep` by itself, and what each optimizer, parameter group and loss term can count on."""

import json
import math
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from helpers.training_runs import metrics_of, spoil, write_dataset

import train
from dataset import DataOrder, latent_batches, open_latents
from loss import DeepFlowLoss, Draws, LossTerms
from models import DeepFlow, presets
from training import build
from training.optimizer import make_optimizer, schedule, skips_on_device
from training.step import TrainingStep

SGD, ADAMW = partial(torch.optim.SGD, lr=0.1, momentum=0.9), partial(torch.optim.AdamW, lr=1e-3)
NANO = ("--model", "DeepFlow-Nano/2")
OPTIMIZERS = {
    "sgd": SGD,
    "sgd-fused": partial(SGD, fused=True),
    "adamw": partial(ADAMW, fused=False),
    "adamw-foreach": partial(ADAMW, foreach=True),
    "adamw-fused": partial(ADAMW, fused=True),
    "adagrad": partial(torch.optim.Adagrad, lr=1e-3),
}


def tiny(seed=0):
    torch.manual_seed(seed)
    network = DeepFlow(8, 2, 2, num_classes=3, projector_dim=8, df_idxs=[1], input_size=4)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)  # the heads begin at 0, and with them most gradients
    return network


def step_of(network, optimizer, packed, loss_fn=None, **options):
    latents = open_latents(packed)
    batches = latent_batches(latents, DataOrder(len(latents), 8, seed=0))
    options = dict(batch_size=8, scaling_factor=latents.scaling_factor) | options
    return TrainingStep(network, loss_fn or DeepFlowLoss(), optimizer, batches, **options)


def copies(network):
    return [parameter.detach().clone() for parameter in network.parameters()]


def moved(network, before):
    return sum((now - then).abs().sum().item() for now, then in zip(network.parameters(), before, strict=True))


def test_in_five_lines_of_a_notebook(data):
    latents, network = open_latents(data), tiny()
    batches = latent_batches(latents, DataOrder(len(latents), 8, seed=0))
    step = TrainingStep(
        network, DeepFlowLoss(), make_optimizer(network, 1e-2), batches, batch_size=8, scaling_factor=0.5
    )
    losses = [step.launch(i, step.gradients(i)).read()[0]["loss"] for i in range(60)]
    assert sum(losses[-10:]) < 0.93 * sum(losses[:10])


def test_a_step_can_be_computed_once_more(data):
    network = tiny()
    step = step_of(network, SGD(network.parameters()), data)
    first = step.gradients(0).sums
    grads = [p.grad.clone() for p in step.parameters]
    step.optimizer.zero_grad()
    again = step.gradients(0, loss_scale=4.0).sums
    assert {name: value.item() for name, value in again.items()} == {name: v.item() for name, v in first.items()}
    assert all(torch.equal(p.grad, 4 * grad) for p, grad in zip(step.parameters, grads, strict=True))
    for i in range(1, 20):
        step.launch(i, step.gradients(i)).read()
    assert len(step.pending) <= 2  # the batches of old steps are let go


def test_which_kernels_leave_a_step_out_by_themselves():
    able = {name: skips_on_device(make(tiny().parameters())) for name, make in OPTIMIZERS.items()}
    assert able == {
        "sgd": False,
        "sgd-fused": True,
        "adamw": False,
        "adamw-foreach": False,
        "adamw-fused": True,
        "adagrad": False,
    }


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_optimizer_applies_scaled_gradients(data, name):
    weights, norms = [], []
    for loss_scale in (1.0, 1024.0):
        network = tiny()
        before = copies(network)
        step = step_of(network, OPTIMIZERS[name](network.parameters()), data)
        for i in range(3):
            numbers, _ = step.launch(i, step.gradients(i, loss_scale)).read()
        assert moved(network, before) > 1e-2
        norms.append(numbers["grad_norm"])
        weights.append(copies(network))
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)
    for plain, scaled in zip(*weights, strict=True):
        torch.testing.assert_close(plain, scaled, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_optimizer_applies_gradients_that_are_not_finite(tmp_path, name):
    packed, network = write_dataset(tmp_path / "packed"), tiny()
    order = DataOrder(23, 8, seed=0)
    sample = next(i for i in order.batch(2) if i not in order.batch(0) and i not in order.batch(1))
    spoil(packed, sample)
    step = step_of(network, OPTIMIZERS[name](network.parameters()), packed)
    for i in range(2):
        assert math.isfinite(step.launch(i, step.gradients(i)).read()[0]["loss"])
    before = copies(network)
    state = json.dumps(step.optimizer.state_dict()["state"], default=torch.Tensor.tolist)
    update = step.launch(2, step.gradients(2))
    numbers, stop = update.read()
    assert math.isnan(numbers["loss"]) and not math.isfinite(numbers["grad_norm"]) and not stop
    assert moved(network, before) == 0
    assert json.dumps(step.optimizer.state_dict()["state"], default=torch.Tensor.tolist) == state
    numbers, _ = step.launch(3, step.gradients(3)).read()  # the spoilt gradients are gone
    finite = sample not in order.batch(3)
    assert math.isfinite(numbers["loss"]) is finite and (moved(network, before) > 0) is finite


def test_an_overflow_by_the_loss_scale_alone_is_not_applied(data):
    network = tiny()
    before = copies(network)
    step = step_of(network, SGD(network.parameters()), data)
    numbers, _ = step.launch(0, step.gradients(0, loss_scale=2.0**127)).read()
    assert math.isfinite(numbers["loss"]) and not math.isfinite(numbers["grad_norm"])
    assert moved(network, before) == 0


def test_groups_keep_their_own_rates_under_a_schedule(data):
    network = tiny()
    heads = {id(p) for p in network.final_layer.parameters()}
    groups = [
        {"params": [p for p in network.parameters() if p.requires_grad and id(p) not in heads], "lr": 1e-3},
        {"params": list(network.final_layer.parameters()), "lr": 1e-2},
    ]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    rate = partial(schedule, "cosine", total_steps=10)
    step = step_of(network, optimizer, data, learning_rate=rate, max_grad_norm=0.0)
    for i in (0, 5, 8):
        before = copies(network)
        gradients = step.gradients(i)
        grads = {id(p): p.grad.clone() for p in step.parameters}
        step.launch(i, gradients).read()
        assert [group["lr"] for group in optimizer.param_groups] == [1e-3 * rate(i), 1e-2 * rate(i)]
        for parameter, old in zip(network.parameters(), before, strict=True):
            if parameter.requires_grad:
                size = (1e-2 if id(parameter) in heads else 1e-3) * rate(i)
                torch.testing.assert_close(parameter, old - size * grads[id(parameter)])
    assert rate(5) == pytest.approx(0.5) and 0 < rate(8) < 0.1


def test_without_a_schedule_rates_are_left_alone(data):
    network = tiny()
    optimizer = SGD(network.parameters())
    step = step_of(network, optimizer, data)
    optimizer.param_groups[0]["lr"] = 0.03  # by a scheduler of the caller's own
    step.launch(0, step.gradients(0)).read()
    assert optimizer.param_groups[0]["lr"] == 0.03


class MoreTerms(NamedTuple):
    """`LossTerms` and one number more."""

    terms: LossTerms
    size: torch.Tensor

    def named(self) -> dict[str, torch.Tensor]:
        return {**self.terms.named(), "size": self.size}


class SizeLoss(DeepFlowLoss):
    """Penalises large answers; the one place where its name `size` is written."""

    def terms(self, model: Any, x0: Any, condition: Any, null: Any, draws: Draws, features: Any = None) -> MoreTerms:
        answers = []

        def watched(*arguments: Any) -> Any:
            answers.append(model(*arguments))
            return answers[-1]

        terms = super().terms(watched, x0, condition, null, draws, features)
        return MoreTerms(terms, answers[0].velocities[-1].square().flatten(1).mean(1))

    def total(self, terms: MoreTerms) -> torch.Tensor:
        return super().total(terms.terms) + 0.1 * terms.size


@pytest.fixture
def sized(monkeypatch):
    nano = dict(hidden_size=8, num_heads=2, sit_depth=2, deepflow_depth=2, branches=2, projector_dim=8)
    monkeypatch.setitem(presets.SIZES, "Nano", nano)
    monkeypatch.setattr(build, "DeepFlowLoss", SizeLoss)


def test_a_further_term_reaches_the_numbers_by_its_name(data):
    network = tiny()
    step = step_of(network, SGD(network.parameters()), data, SizeLoss())
    numbers, _ = step.launch(0, step.gradients(0)).read()
    assert list(numbers) == ["grad_norm", "loss", "velocity_1", "velocity_2", "acceleration", "size"]
    expected = 0.2 * numbers["velocity_1"] + numbers["velocity_2"] + numbers["acceleration"] + 0.1 * numbers["size"]
    assert numbers["loss"] == pytest.approx(expected, rel=1e-5) and numbers["size"] > 0


def test_a_further_term_reaches_the_metrics_of_a_run_and_of_one_resumed(start, tmp_path, sized):
    start(*NANO, name="whole", steps=4)
    start(*NANO, name="parts", steps=3)  # saves in the middle of a line of metrics
    start(*NANO, name="parts", steps=4)
    entries = metrics_of(tmp_path / "whole")
    assert entries == metrics_of(tmp_path / "parts") and len(entries) == 2
    for entry in entries:
        assert list(entry)[:7] == ["step", "grad_norm", "loss", "velocity_1", "velocity_2", "acceleration", "size"]
        total = 0.2 * entry["velocity_1"] + entry["velocity_2"] + entry["acceleration"] + 0.1 * entry["size"]
        assert entry["loss"] == pytest.approx(total, rel=1e-5)


def test_a_further_term_is_named_where_it_is_not_finite(start, sized, monkeypatch):
    terms = SizeLoss.terms
    monkeypatch.setattr(SizeLoss, "terms", lambda *a: (t := terms(*a))._replace(size=t.size / 0))
    with pytest.raises(train.NonFiniteLoss, match="step 0: not finite: size loss on rank 0, samples"):
        start(*NANO, steps=2)
