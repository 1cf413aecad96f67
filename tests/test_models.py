import json
import math

import pytest
import torch
from helpers.golden import GOLDEN, relative_error
from torch.utils.flop_counter import FlopCounterMode

from common.errors import UserError
from models import DeepFlow, create_model
from models.blocks import TimestepEmbedder, sincos_position_embedding, unpatchify
from models.precision import cast_products

TINY = dict(hidden_size=16, depth=4, num_heads=2, num_classes=3, projector_dim=8, input_size=4)


def randomized(model, seed=0):
    """Fresh networks output zeros (adaLN-Zero): give every weight a value so that outputs depend on inputs."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def inputs(n=2, size=4, k=None):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 4, size, size, generator=generator)
    t = torch.rand(n if k is None else (k, n), generator=generator)
    return x, t, torch.arange(n) % 3


def test_golden_outputs(golden_model, golden_io):
    output = golden_model(golden_io["x"], golden_io["ts"], golden_io["y"])
    assert relative_error(torch.stack(output.velocities), golden_io["v"]) < 1e-5
    assert relative_error(torch.stack(output.accelerations), golden_io["a"]) < 1e-5


def test_golden_outputs_at_one_time_and_null_class(golden_model, golden_io):
    x, t, null = golden_io["x"], golden_io["ts"][0], torch.full((3,), golden_model.num_classes)
    output = golden_model(x, t, null)
    assert relative_error(torch.stack(output.velocities), golden_io["v_same_null"]) < 1e-5
    assert relative_error(torch.stack(output.accelerations), golden_io["a_same_null"]) < 1e-5
    assert relative_error(golden_model.velocity(x, t, null), golden_io["v_same_null"][-1]) < 1e-5


def test_configuration_round_trips(golden_config, golden_model):
    assert "decoder_hidden_size" not in golden_model.config
    assert golden_model.config.items() >= {k: v for k, v in golden_config.items() if k[:7] != "decoder"}.items()
    assert DeepFlow(**golden_model.config).config == golden_model.config
    assert json.loads(json.dumps(dict(golden_model.config))) == golden_model.config


# The paper's table: name, depth, parameters in millions (rounded or cut off), "GFLOPS" as it counts them.
# For SiT-B and SiT-L it quotes another count, one that includes attention.
TABLE = [
    ("SiT-B/2", 12, 130, None),
    ("SiT-L/2", 24, 458, None),
    ("SiT-XL/2", 28, 675, 114),
    ("DeepFlow-B/2-2T", 10, 144, 24),
    ("DeepFlow-B/2-2T", 12, 166, 28),
    ("DeepFlow-L/2-2T", 20, 431, 72),
    ("DeepFlow-L/2-2T", 22, 469, 78),
    ("DeepFlow-L/2-2T", 24, 507, 84),
    ("DeepFlow-XL/2-2T", 22, 588, 97),
    ("DeepFlow-XL/2-2T", 24, 636, 106),
    ("DeepFlow-XL/2-2T", 26, 683, 114),
    ("DeepFlow-XL/2-2T", 28, 731, 122),
    ("DeepFlow-L/2-3T", 18, 433, 72),
    ("DeepFlow-L/2-3T", 21, 490, 82),
    ("DeepFlow-L/2-3T", 24, 547, 92),
    ("DeepFlow-XL/2-3T", 18, 538, 89),
    ("DeepFlow-XL/2-3T", 21, 609, 101),
    ("DeepFlow-XL/2-3T", 24, 681, 113),
    ("DeepFlow-XL/2-3T", 27, 753, 125),
    ("DeepFlow-XL/2-4T", 28, 822, 137),
]


@pytest.mark.parametrize(("name", "depth", "millions", "gflops"), TABLE)
def test_parameters_and_multiply_adds_of_the_published_models(name, depth, millions, gflops):
    with torch.device("meta"):
        model = create_model(name, depth=depth)
        inputs = torch.empty(1, 4, 32, 32), torch.empty(1), torch.zeros(1, dtype=torch.long)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.99)
    if gflops is None:
        return
    with FlopCounterMode(display=False) as counter:
        model(*inputs)
    counts = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    attention = sum(flops for op, flops in counts.items() if "attention" in op or "bmm" in op)
    gaps, width, tokens = model.num_branches - 1, model.config["hidden_size"], 256
    vera_projections = 2 * gaps * 4 * tokens * width * width
    counted_by_paper = (sum(counts.values()) - attention - vera_projections) / 2e9
    assert counted_by_paper == pytest.approx(gflops, abs=0.55)


def test_full_multiply_adds_of_xl_3t():
    with torch.device("meta"):
        model = create_model("DeepFlow-XL/2", depth=24, df_idxs=[8, 16])
        inputs = torch.empty(1, 4, 32, 32), torch.empty(1), torch.zeros(1, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(*inputs)
    assert counter.get_total_flops() / 2e9 == pytest.approx(119.8, abs=0.05)


@pytest.mark.parametrize("name", ["DeepFlow-B/2-2T", "DeepFlow-XL/2-3T", "DeepFlow-XL/2-3T+SSL"])
def test_weights_have_the_official_names_and_shapes(name):
    official = json.loads((GOLDEN / "official_checkpoint_keys.json").read_text())[name]
    with torch.device("meta"):
        model = create_model(name.removesuffix("+SSL"), ssl_dim=768 if "SSL" in name else 0)
    assert {key: list(tensor.shape) for key, tensor in model.state_dict().items()} == official


def test_one_branch_is_exactly_sit():
    with torch.device("meta"):
        deepflow = create_model("DeepFlow-B/2", df_idxs=[])
        sit = create_model("SiT-B/2")
    assert deepflow.config == sit.config
    width, tokens = 768, 256
    block = 18 * width**2 + 15 * width  # attention 4, MLP 8, modulation 6; biases 3 + 1 + 4 + 1 + 6
    embedders = 17 * width + tokens * width + 257 * width + width * (width + 1) + 1001 * width
    head = 2 * width * (width + 1) + 16 * (width + 1)
    assert sum(p.numel() for p in sit.parameters()) == 12 * block + embedders + head


def test_one_branch_runs_without_vera():
    model = randomized(DeepFlow(**TINY))
    output = model(*inputs())
    assert (len(output.velocities), output.accelerations, output.projections) == (1, (), ())
    assert torch.equal(output.velocities[0], model.velocity(*inputs()))


@pytest.mark.parametrize("df_idxs", [[2], [1, 2, 3], [1, 3]])
def test_any_branching_runs(df_idxs):
    model = randomized(DeepFlow(**TINY, df_idxs=df_idxs, ssl_dim=5))
    k = len(df_idxs) + 1
    output = model(*inputs(k=k))
    assert [v.shape for v in output.velocities] == [(2, 4, 4, 4)] * k
    assert [a.shape for a in output.accelerations] == [(2, 4, 4, 4)] * (k - 1)
    assert [p.shape for p in output.projections] == [(2, 4, 5)] * (k - 1)


@pytest.mark.parametrize("df_idxs", [[2], [1, 3]])
def test_several_encoders_have_a_projector_each_after_every_vera_block(df_idxs):
    model = randomized(DeepFlow(**TINY, df_idxs=df_idxs, ssl_dim=[5, 7]))
    projections = model(*inputs(k=len(df_idxs) + 1)).projections
    assert [p.shape for p in projections] == [(2, 4, 5), (2, 4, 7)] * len(df_idxs)
    refined = []
    for block in model.df_blocks:
        block.register_forward_hook(lambda _, __, out: refined.append(out[0]))
    projections = model(*inputs(k=len(df_idxs) + 1)).projections
    for i, projection in enumerate(projections):
        assert torch.equal(projection, model.projectors[i](refined[i // 2]))
    assert model.config["ssl_dim"] == [5, 7]
    assert DeepFlow(**json.loads(json.dumps(dict(model.config)))).config == model.config


def test_one_encoder_given_as_a_list_is_one_encoder():
    a, b = (DeepFlow(**TINY, df_idxs=[2], ssl_dim=dim) for dim in (5, [5]))
    assert a.config == b.config and a.config["ssl_dim"] == 5
    assert {k: v.shape for k, v in a.state_dict().items()} == {k: v.shape for k, v in b.state_dict().items()}
    assert "projectors.0.4.weight" in a.state_dict() and "repa_depth" not in a.config
    for none in (0, []):
        assert DeepFlow(**TINY, df_idxs=[2], ssl_dim=none).config["ssl_dim"] == 0


@pytest.mark.parametrize("repa_depth", [1, 3, 4])
def test_one_branch_is_aligned_after_the_block_asked_for(repa_depth):
    model, outputs = randomized(DeepFlow(**TINY, ssl_dim=[5, 7], repa_depth=repa_depth)), []
    for block in model.blocks:
        block.register_forward_hook(lambda _, __, out: outputs.append(out))
    projections = model(*inputs()).projections
    assert len(projections) == 2 and model.config["repa_depth"] == repa_depth
    for projection, projector in zip(projections, model.projectors, strict=True):
        assert torch.equal(projection, projector(outputs[repa_depth - 1]))
    for projector in model.projectors:
        projector.register_forward_hook(lambda *_: pytest.fail("a projector ran"))
    assert model.velocity(*inputs()).shape == (2, 4, 4, 4)
    aligned, plain = DeepFlow(**TINY, ssl_dim=5, repa_depth=2), DeepFlow(**TINY)
    assert set(aligned.state_dict()) - set(plain.state_dict()) == {
        f"projectors.0.{layer}.{kind}" for layer in (0, 2, 4) for kind in ("weight", "bias")
    }


def test_velocity_alone_skips_training_heads_and_agrees():
    model = randomized(DeepFlow(**TINY, df_idxs=[2], ssl_dim=5))
    expected = model(*inputs()).velocities[-1]
    for skipped in (model.final_layer[0], model.final_acc_layer, model.projectors):
        skipped.register_forward_hook(lambda *_: pytest.fail("a training-only module ran"))
    assert torch.equal(model.velocity(*inputs()), expected)


def test_qk_norm_normalises_queries_and_keys():
    model = DeepFlow(**TINY, qk_norm=True)
    seen = []
    model.blocks[0].attn.q_norm.register_forward_hook(lambda _, __, out: seen.append(out))
    model(*inputs())
    assert torch.allclose(seen[0].std(-1, unbiased=False), torch.ones(2, 2, 4), atol=0.05)


def test_legacy_scaling_clamps_the_gap_scale():
    plain, legacy = (randomized(DeepFlow(**TINY, df_idxs=[2], legacy_scaling=flag)) for flag in (False, True))
    for model in (plain, legacy):
        torch.nn.init.constant_(model.df_blocks[0].acc_norm.adaLN_modulation[1].bias, 4.0)
    assert torch.allclose(plain.velocity(*inputs()), legacy.velocity(*inputs()))
    for model in (plain, legacy):
        torch.nn.init.constant_(model.df_blocks[0].acc_norm.adaLN_modulation[1].bias, 40.0)
    assert not torch.allclose(plain.velocity(*inputs()), legacy.velocity(*inputs()))


def test_every_trained_parameter_gets_a_gradient():
    model = randomized(DeepFlow(**TINY, df_idxs=[2], ssl_dim=5))
    output = model(*inputs(k=2))
    sum(part.square().sum() for parts in output for part in parts).backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and not p.grad.any()] == []
    assert model.pos_embed.grad is None


def test_initialisation():
    torch.manual_seed(0)
    model = DeepFlow(64, 4, 2, df_idxs=[2], projector_dim=32, input_size=4, ssl_dim=8)
    zero = [model.blocks[3].adaLN_modulation[1], model.df_blocks[0].acc_norm.adaLN_modulation[1]]
    zero += [head.linear for head in (*model.final_layer, model.final_acc_layer)]
    zero += [head.adaLN_modulation[1] for head in (*model.final_layer, model.final_acc_layer)]
    assert not any(layer.weight.any() or layer.bias.any() for layer in zero)
    in_proj = model.df_blocks[0].cross_attention.multihead_attn.in_proj_weight
    for weight, fan_in, fan_out in [
        (model.blocks[0].attn.qkv.weight, 64, 192),
        (in_proj, 64, 192),
        (model.x_embedder.proj.weight, 16, 64),
        (model.projectors[0][4].weight, 32, 8),
    ]:
        bound = (6 / (fan_in + fan_out)) ** 0.5
        assert 0.95 * bound < weight.detach().abs().max() <= bound
    for normal in (model.t_embedder.mlp[2], model.dt_embedder.mlp[0], model.y_embedder.embedding_table):
        assert normal.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_time_embedding_has_cosines_first_and_unscaled_time():
    features = TimestepEmbedder(8).sinusoids(torch.tensor([0.5], dtype=torch.float64))[0]
    frequency = 10_000 ** (-3 / 128)
    assert features[3].item() == pytest.approx(math.cos(0.5 * frequency), abs=1e-12)
    assert features[128 + 3].item() == pytest.approx(math.sin(0.5 * frequency), abs=1e-12)


def test_position_embedding_and_unpatchify_share_the_row_order():
    embedding = sincos_position_embedding(8, 3).reshape(3, 3, 8)
    assert torch.equal(embedding[0, 1, :4], embedding[2, 1, :4])  # first half: the column
    assert torch.equal(embedding[1, 0, 4:], embedding[1, 2, 4:])  # second half: the row
    patches = torch.arange(4 * 4 * 2).reshape(1, 4, 8)
    image = unpatchify(patches, 2)
    assert image.shape == (1, 2, 4, 4)
    assert (
        image[0, 1, 2, 1] == patches[0, 2, (0 * 2 + 1) * 2 + 1]
    )  # row 1, column 0 of patches; pixel (0, 1), channel 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(df_idxs=[4]), r"df_idxs \[4\] must lie in 1..3 for a depth of 4"),
        (dict(df_idxs=[0]), r"must lie in 1..3"),
        (dict(df_idxs=[3, 1]), "strictly increasing"),
        (dict(df_idxs=[2, 2]), "strictly increasing"),
        (dict(df_idxs=[1.5]), "must be integers"),
        (dict(num_heads=3), "hidden_size 16 must be a multiple of num_heads 3"),
        (dict(input_size=5), "input_size 5 must be a multiple of patch_size 2"),
        (dict(decoder_hidden_size=32), "decoder_hidden_size 32 must equal hidden_size 16"),
        (dict(ssl_dim=5), r"one branch needs the block to align after, in 1..4 \(--repa-depth\)"),
        (dict(repa_depth=2), r"repa_depth 2 given without an SSL encoder"),
        (dict(ssl_dim=5, repa_depth=5), r"repa_depth 5 must lie in 1..4"),
        (dict(ssl_dim=5, repa_depth=-1), r"repa_depth -1 must lie in 1..4"),
        (dict(ssl_dim=5, repa_depth=2, df_idxs=[2]), "repa_depth 2 is for a model of one branch, this one has 2"),
        (dict(ssl_dim=[5, 0], df_idxs=[2]), r"ssl_dim \[5, 0\] must be the feature width"),
        (dict(ssl_dim=-1, df_idxs=[2]), "ssl_dim -1 must be"),
    ],
)
def test_bad_configurations_are_user_errors(change, message):
    with pytest.raises(UserError, match=message):
        DeepFlow(**{**TINY, **change})


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("DeepFlow-XXL/2", {}, "unknown model 'DeepFlow-XXL/2': choose one of DeepFlow-Tiny/2"),
        ("SiT-XL/2-3T", {}, "unknown model"),
        ("SiT-B/2", dict(df_idxs=[6]), "has one branch"),
        ("DeepFlow-XL/2-3T", dict(depth=22), "depth 22 does not divide into 3 equal branches"),
    ],
)
def test_bad_names_are_user_errors(name, overrides, message):
    with pytest.raises(UserError, match=message):
        create_model(name, **overrides)


def test_products_kept_in_half_precision_answer_as_autocast_does(golden_model, golden_io):
    x, y, t = golden_io["x"], golden_io["y"], golden_io["ts"][0]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = golden_model.velocity(x, t, y)
        cast_products(golden_model, torch.bfloat16)
        assert torch.equal(golden_model.velocity(x, t, y), expected)
    assert golden_model.blocks[0].attn.qkv.weight.dtype == torch.bfloat16
    assert golden_model.df_blocks[0].cross_attention.multihead_attn.in_proj_weight.dtype == torch.bfloat16
    assert golden_model.pos_embed.dtype == golden_model.y_embedder.embedding_table.weight.dtype == torch.float32
