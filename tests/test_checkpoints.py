import argparse
import json
import os

import pytest
import torch
from helpers.golden import GOLDEN

from common.errors import UserError
from models import DeepFlow, checkpoints, imports

TINY = dict(hidden_size=16, depth=4, num_heads=2, num_classes=3, projector_dim=8, df_idxs=[2], input_size=4)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = DeepFlow(**TINY, legacy_scaling=True)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def official(path, model, **flags):
    """A file as the official release writes it: pickled flags beside the weights."""
    weights = model.state_dict()
    raw = {key: torch.zeros_like(value) for key, value in weights.items()}
    args = argparse.Namespace(model="DeepFlow-XL/2", exp_name="x", **flags)
    torch.save({"model": raw, "ema": weights, "opt": {"state": {}}, "args": args, "steps": 7}, path)
    return path


def same_answer(a, b):
    x, t, y = torch.randn(2, 4, 4, 4), torch.tensor([[0.2, 0.7], [0.3, 0.6]]), torch.tensor([0, 3])
    return all(
        torch.equal(u, v) for p, q in zip(a(x, t, y), b(x, t, y), strict=True) for u, v in zip(p, q, strict=True)
    )


def test_our_checkpoint_round_trips_with_its_architecture(tmp_path, model):
    path = tmp_path / "ema.safetensors"
    checkpoints.save(path, model.state_dict(), model.config, {"step": 3, "path_type": "linear"})
    for given in (path, tmp_path, str(tmp_path)):
        loaded = checkpoints.load(given)
        assert loaded.config == model.config and not loaded.training
        assert same_answer(model, loaded)
    assert checkpoints.read(path).metadata == {"step": 3, "path_type": "linear"}
    assert [p.name for p in tmp_path.iterdir()] == ["ema.safetensors"]  # nothing left aside
    first = path.read_bytes()
    for _ in range(5):
        checkpoints.save(path, model.state_dict(), model.config, {"step": 3, "path_type": "linear"})
        assert path.read_bytes() == first


def test_half_precision_weights_load(tmp_path, model):
    path = tmp_path / "half.safetensors"
    checkpoints.save(path, {key: value.half() for key, value in model.state_dict().items()}, model.config, {})
    loaded = checkpoints.load(path)
    assert torch.equal(loaded.final_layer[1].linear.weight, model.final_layer[1].linear.weight.half().float())


def test_official_checkpoint_takes_ema_and_flags(tmp_path, model):
    path = official(tmp_path / "x.pt", model, df_idxs="[2]", legacy_scaling=True, num_heads=2)
    loaded = checkpoints.load(path)
    assert loaded.config == model.config
    assert same_answer(model, loaded)


@pytest.mark.parametrize("df_idxs", [[1], "[1]", "1"])
def test_official_df_idxs_in_any_form(tmp_path, df_idxs):
    model = DeepFlow(**{**TINY, "df_idxs": [1]})
    assert checkpoints.load(official(tmp_path / "x.pt", model, df_idxs=df_idxs), num_heads=2).config["df_idxs"] == [1]


def test_official_checkpoint_without_flags_is_inferred_from_shapes(tmp_path, golden_model, golden_config):
    path = tmp_path / "x.pt"
    torch.save({"ema": {f"module.{k}": v for k, v in golden_model.state_dict().items()}}, path)
    assert checkpoints.load(path, num_heads=4).config == golden_model.config
    assert checkpoints.load(path, **golden_config).config == golden_model.config
    # The published weights as safetensors, without a config in the header.
    assert checkpoints.load(GOLDEN / "deepflow_tiny_2T.safetensors", num_heads=4).config == golden_model.config


@pytest.mark.parametrize(
    ("name", "heads", "df_idxs", "ssl_dim"),
    [
        ("DeepFlow-B/2-2T", 12, [6], 0),
        ("DeepFlow-XL/2-3T", 16, [8, 16], 0),
        ("DeepFlow-XL/2-3T+SSL", 16, [8, 16], 768),
    ],
)
def test_published_architectures_are_inferred(name, heads, df_idxs, ssl_dim):
    shapes = json.loads((GOLDEN / "official_checkpoint_keys.json").read_text())[name]
    weights = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    config = imports.infer_config(weights, {}, {}, name)
    assert (config["num_heads"], config["df_idxs"], config["ssl_dim"]) == (heads, df_idxs, ssl_dim)
    assert checkpoints.shapes_of(config) == {key: tuple(shape) for key, shape in shapes.items()}


def test_sit_is_inferred(tmp_path):
    model = DeepFlow(**{**TINY, "df_idxs": []}, qk_norm=True)
    loaded = checkpoints.load(official(tmp_path / "x.pt", model), num_heads=2, projector_dim=8)
    assert loaded.config == model.config


@pytest.mark.parametrize(
    "change",
    [
        dict(ssl_dim=5),
        dict(ssl_dim=[5, 7]),
        dict(ssl_dim=[5, 7, 6], df_idxs=[1, 3]),
        dict(ssl_dim=5, df_idxs=[], repa_depth=2),
        dict(ssl_dim=[5, 7], df_idxs=[], repa_depth=3),
    ],
)
def test_projectors_come_back_from_every_kind_of_file(tmp_path, change):
    torch.manual_seed(0)
    model = DeepFlow(**{**TINY, **change})
    told = {key: change[key] for key in ("df_idxs", "repa_depth") if key in change}
    checkpoints.save(tmp_path / "ours.safetensors", model.state_dict(), model.config, {})
    official(tmp_path / "official.pt", model, num_heads=2, **told)
    for file in ("ours.safetensors", "official.pt"):
        loaded = checkpoints.load(tmp_path / file)
        assert loaded.config == model.config
        assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())
    if "repa_depth" in change:
        del told["repa_depth"]
        with pytest.raises(UserError, match=r"repa_depth 8 must lie in 1..4"):  # REPA's own, if the file is silent
            checkpoints.load(official(tmp_path / "silent.pt", model, num_heads=2, **told))


def test_a_projector_that_is_missing_is_named(tmp_path):
    model = DeepFlow(**{**TINY, "ssl_dim": [5, 7]})
    weights = {key: value for key, value in model.state_dict().items() if not key.startswith("projectors.0.")}
    torch.save({"ema": weights}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="has 2 projectors, but no tensor 'projectors.0.4.weight'"):
        checkpoints.load(tmp_path / "x.pt", num_heads=2)


def test_mismatch_names_keys_and_shapes(tmp_path, model):
    path = tmp_path / "x.safetensors"
    checkpoints.save(path, model.state_dict(), model.config, {})
    with pytest.raises(UserError, match=r"pos_embed is \[1, 4, 16\], not \[1, 16, 16\]"):
        checkpoints.load(path, input_size=8)
    with pytest.raises(UserError, match=r"unexpected \(blocks.2"):
        checkpoints.load(path, depth=2, df_idxs=[1])
    with pytest.raises(UserError, match=r"missing \(blocks.4"):
        checkpoints.load(path, depth=6)


class Payload:
    """What an attacker would pickle: runs code when it is unpickled."""

    def __reduce__(self):
        return (print, ("executed",))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_damaged_files_are_user_errors(tmp_path, model, suffix):
    path = tmp_path / f"x{suffix}"
    official(path, model)
    if suffix == ".safetensors":
        checkpoints.save(path, model.state_dict(), model.config, {})
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match="is damaged"):
        checkpoints.load(path)


def test_pickled_code_is_refused(tmp_path, capsys):
    torch.save({"ema": {}, "args": Payload()}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="holds more than weights and flags"):
        checkpoints.load(tmp_path / "x.pt")
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"optimizer": {"lr": 1.0}}, "holds no weights"),
        ([1, 2], "holds no weights"),
        (
            {"ema": {"weight": torch.zeros(1)}},
            "is not a DeepFlow checkpoint: it has no tensor 'x_embedder.proj.weight'",
        ),
    ],
)
def test_other_files_are_user_errors(tmp_path, content, message):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(UserError, match=message):
        checkpoints.load(tmp_path / "x.pt")


@pytest.mark.parametrize("config", [{"widht": 16}, {"hidden_size": "wide"}])
def test_architecture_of_another_version_is_a_user_error(tmp_path, model, config):
    checkpoints.save(tmp_path / "x.safetensors", model.state_dict(), {**model.config, **config}, {})
    with pytest.raises(UserError, match="tells an architecture that this version does not know"):
        checkpoints.load(tmp_path / "x.safetensors")


def test_missing_files_and_unknown_widths_are_user_errors(tmp_path, model):
    with pytest.raises(UserError, match=r"no checkpoint at .*nothing.pt"):
        checkpoints.load(tmp_path / "nothing.pt")
    with pytest.raises(UserError, match=r"no checkpoint at .*ema.safetensors"):
        checkpoints.load(tmp_path)
    with pytest.raises(UserError, match="width 16, which is none of the paper's: give num_heads"):
        checkpoints.load(official(tmp_path / "x.pt", model))
    with pytest.raises(UserError, match=r"1 VeRA blocks, but df_idxs is \[1, 2\]"):
        checkpoints.load(tmp_path / "x.pt", num_heads=2, df_idxs=[1, 2])


def test_files_are_readable_by_whom_the_umask_lets(tmp_path, golden_config, golden_weights):
    previous = os.umask(0o027)
    try:
        checkpoints.save(tmp_path / "a.safetensors", golden_weights, golden_config, {})
    finally:
        os.umask(previous)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o640
