"""The file for sharing: small, loadable, with its card."""

import sys

import pytest
import torch
from safetensors.torch import load_file

from common.errors import UserError
from models import checkpoints
from training import export


def test_a_run_is_exported_in_half_precision_with_its_card(start, tmp_path, monkeypatch, capsys):
    start("--ema-decay", "0.5", "0.9", steps=3)
    run, dest = tmp_path / "run", tmp_path / "shared.safetensors"
    monkeypatch.setattr(
        sys, "argv", ["export", str(run), "--dest", str(dest), "--dtype", "float16", "--license", "mit"]
    )
    export.main()
    assert "model card" in capsys.readouterr().out
    whole = load_file(run / "ema.safetensors")
    half = load_file(dest)
    assert dest.stat().st_size < 0.6 * (run / "ema.safetensors").stat().st_size
    assert all(torch.equal(half[name].float(), whole[name].half().float()) for name in whole if name != "pos_embed")
    assert torch.equal(half["pos_embed"], whole["pos_embed"])
    model = checkpoints.load(dest)
    assert model.pos_embed.dtype == model.blocks[0].attn.qkv.weight.dtype == torch.float32
    metadata = checkpoints.read(dest).metadata
    assert metadata["step"] == 3 and metadata["license"] == "mit" and metadata["ema"] == "0.5"
    assert metadata["training"]["batch_size"] == 8 and metadata["training"]["epochs"] == pytest.approx(24 / 23)
    card = (tmp_path / "shared.md").read_text()
    for fact in ("license: mit", "decay 0.5", "3 optimizer steps", "2503.14494", '"tg_upper_bound": 0.01', "float16"):
        assert fact in card, fact
    other = checkpoints.read(run / "ema-0.9.safetensors")
    assert other.metadata["ema"] == "0.9"


def test_mistakes(start, tmp_path):
    start(steps=1)
    checkpoint = tmp_path / "run" / "checkpoints" / "step-0000001"
    (tmp_path / "card.md").write_text("mine")
    for source, dest, message in [
        (tmp_path / "none", tmp_path / "a.safetensors", "no checkpoint at"),
        (tmp_path / "run", tmp_path / "run" / "ema.safetensors", "does not exist yet"),
        (tmp_path / "run", tmp_path / "card.safetensors", r"card\.md, which exists"),
        (checkpoint / "model.safetensors", tmp_path / "a.safetensors", "last step's weights: give the folder"),
        (tmp_path / "run", tmp_path / "a.pt", "expected the name of a .safetensors"),
        (tmp_path / "run", tmp_path / "none" / "a.safetensors", "folder does not exist"),
    ]:
        with pytest.raises(UserError, match=message):
            export.export(source, dest)
    assert not list(tmp_path.glob("a.*"))
