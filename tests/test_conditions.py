"""A network of text tokens (N, L, z), which the project has never seen, trains and samples as one of class labels."""

import itertools
from typing import NamedTuple

import pytest
import torch
from torch import nn

import samplers
from common.errors import UserError
from dataset import LatentBatch
from generation.images import generate_images, images_per_block
from generation.options import Settings
from loss import DeepFlowLoss
from training.optimizer import make_optimizer
from training.step import TrainingStep

WORDS, WIDTH = 5, 6  # L and z of a text


class Output(NamedTuple):
    velocities: list
    accelerations: list
    projections: list


class TextNetwork(nn.Module):
    """Two branches over the four patches of a latent, each of which looks at the words. The null is a learned text."""

    def __init__(self):
        super().__init__()
        self.num_branches, self.config = 2, {"in_channels": 4, "input_size": 4, "patch_size": 2}
        self.null = nn.Parameter(torch.randn(WORDS, WIDTH))
        self.patches, self.place = nn.Linear(16, 24), nn.Parameter(torch.randn(4, 24))
        self.time = nn.Linear(1, 24)
        self.look = nn.MultiheadAttention(24, 2, kdim=WIDTH, vdim=WIDTH, batch_first=True)
        self.heads = nn.ModuleList(nn.Sequential(nn.Linear(24, 48), nn.SiLU(), nn.Linear(48, 16)) for _ in range(3))
        self.rows = 0

    def null_condition(self, count):
        return self.null.expand(count, -1, -1)

    def check_condition(self, condition):
        if condition.shape[1:] != (WORDS, WIDTH):
            raise UserError(f"conditions {tuple(condition.shape)} given to a network of texts")

    def tokens(self, x, t, condition):
        self.rows += len(x)
        cut = x.unflatten(3, (2, 2)).unflatten(2, (2, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        hidden = self.patches(cut) + self.place + self.time(t.float()[:, None])[:, None]
        return hidden + self.look(hidden, condition, condition)[0]

    def image(self, head, hidden):
        cut = head(hidden).unflatten(2, (4, 2, 2)).unflatten(1, (2, 2))  # (N, 2, 2, C, 2, 2)
        return cut.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)

    def forward(self, x, t, condition):
        images = [self.image(head, self.tokens(x, t[0], condition)) for head in self.heads]
        return Output(images[:2], images[2:], [])

    def velocity(self, x, t, condition):
        return self.image(self.heads[1], self.tokens(x, t, condition))


def texts(count, seed=0):
    return torch.randn(count, WORDS, WIDTH, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def network():
    torch.manual_seed(0)
    return TextNetwork()


def steps_on_one_batch(network, **options):
    """A step whose data is one batch, over and over, in micro-batches."""
    parts = options.get("accumulation", 1)
    moments = torch.randn(16, 8, 4, 4, generator=torch.Generator().manual_seed(1))
    moments[:, :4], moments[:, 4:] = moments[:, :4] + 2, 0.1
    whole = LatentBatch(moments, texts(16), torch.arange(16), torch.zeros(16, dtype=torch.bool))
    cut = [value.chunk(parts) for value in whole[:4]]
    batches = itertools.cycle(LatentBatch(*part) for part in zip(*cut, strict=True))
    optimizer = make_optimizer(network, learning_rate=1e-2)
    return TrainingStep(network, DeepFlowLoss(), optimizer, batches, batch_size=16, scaling_factor=1.0, **options)


def trained(step, count):
    losses = []
    for i in range(count):
        numbers, _ = step.launch(i, step.gradients(i)).read()
        losses.append(numbers["loss"])
    return losses


def decoded(latents):
    return latents[:, :3].permute(0, 2, 3, 1).mul(40).add(128).clamp(0, 255).to(torch.uint8)


def images_of(network, conditions, indices, scale=2.0, seed=3):
    settings = Settings("heun", 3, cfg_scale=scale, seed=seed)
    parts = list(generate_images(network, decoded, conditions, settings, indices, batch_size=1))
    assert [i for part in parts for i in part.indices] == sorted(indices)
    assert torch.equal(torch.cat([part.conditions for part in parts]), conditions[sorted(indices)])
    return torch.cat([part.images for part in parts])


def test_a_text_network_learns_a_batch(network):
    null = network.null.detach().clone()
    losses = trained(steps_on_one_batch(network), 30)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert not torch.equal(network.null, null)  # dropped texts trained it


def test_texts_are_cut_into_micro_batches_like_labels(network):
    reference = TextNetwork()
    reference.load_state_dict(network.state_dict())
    whole, parts = steps_on_one_batch(reference), steps_on_one_batch(network, accumulation=4)
    sums, others = parts.gradients(0).sums, whole.gradients(0).sums
    for name in others:
        torch.testing.assert_close(sums[name], others[name])
    for weight, other in zip(network.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(weight.grad, other.grad, rtol=1e-4, atol=1e-6)


def test_the_loss_gives_the_null_to_those_whose_text_is_dropped(network):
    seen = []
    dropping = DeepFlowLoss(cfg_prob=0.5)
    draws = dropping.draw(2, (8, 4, 4, 4), torch.Generator().manual_seed(0))

    def model(x, t, condition):
        seen.append(condition)
        return network(x, t, condition)

    conditions = texts(8)
    dropping.terms(model, torch.zeros(8, 4, 4, 4), conditions, network.null_condition(8), draws)
    assert 0 < draws.dropped.sum() < 8
    for text, condition, dropped in zip(seen[0], conditions, draws.dropped, strict=True):
        assert torch.equal(text, network.null if dropped else condition)


@torch.no_grad()
def test_sampling_with_guidance_follows_the_text(network):
    conditions, noise = texts(3), torch.randn(3, 4, 4, 4)
    null = network.null_condition(3)

    def sampled(scale, condition=conditions, **interval):
        velocity = samplers.classifier_free_guidance(network.velocity, condition, null, scale, **interval)
        network.rows = 0
        return samplers.sample(velocity, noise, method="euler", num_steps=4)

    plain = sampled(1.0)
    assert network.rows == 4 * 3
    guided = sampled(3.0)
    assert network.rows == 4 * 6
    unconditional = sampled(1.0, null)
    assert torch.equal(sampled(3.0, null), unconditional)  # nothing to lead away from
    sampled(3.0, high=0.5)  # the times are 1, 0.75, 0.5, 0.25
    assert network.rows == 2 * 3 + 2 * 6
    assert (guided - plain).abs().max() > 1e-3 and (plain - unconditional).abs().max() > 1e-3
    one_step = samplers.classifier_free_guidance(network.velocity, conditions, null, 3.0)
    t = torch.full((3,), 0.5, dtype=torch.float64)
    v, v_null = (network.velocity(noise, t, c) for c in (conditions, null))
    torch.testing.assert_close(one_step(noise, t), v_null + 3 * (v - v_null))


def test_images_of_texts_depend_on_number_seed_and_text_alone(network):
    network.eval()
    size = images_per_block(network.config, "cpu")
    conditions = texts(size + 3)
    indices = [1, 2, size + 1]
    whole = images_of(network, conditions, range(size + 3))
    assert whole.shape == (size + 3, 4, 4, 3) and whole.float().std() > 1
    assert torch.equal(images_of(network, conditions, indices), whole[indices])
    assert not torch.equal(images_of(network, texts(size + 3, seed=9), indices), whole[indices])
    assert not torch.equal(images_of(network, conditions, indices, scale=1.0), whole[indices])
    assert not torch.equal(images_of(network, conditions, indices, seed=4), whole[indices])


def test_a_network_refuses_what_is_no_condition_of_its_own(network):
    with pytest.raises(UserError, match="network of texts"):
        images_of(network, torch.arange(3), [0])
