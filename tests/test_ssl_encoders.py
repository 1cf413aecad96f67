"""SSL encoders: exactly T patch tokens, of pixels normalised as the weights expect, and never trained."""

import pytest
import torch
from safetensors.torch import save_file
from timm.data import resolve_data_config
from torch import nn

from common.errors import UserError
from models import ssl_encoders
from models.ssl_encoders import ENCODERS, encoder_width, load_encoder

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
WIDTHS = {  # as published
    "dinov2-vit-s": 384,
    "dinov2-vit-b": 768,
    "dinov2-vit-l": 1024,
    "dinov2-vit-g": 1536,
    "dinov2reg-vit-s": 384,
    "dinov2reg-vit-b": 768,
    "dinov2reg-vit-l": 1024,
    "dinov2reg-vit-g": 1536,
    "dinov1-vit-s": 384,
    "dinov1-vit-b": 768,
    "mae-vit-b": 768,
    "mae-vit-l": 1024,
    "clip-vit-L": 1024,
    "jepa-vit-h": 1280,
    "mocov3-vit-s": 384,
    "mocov3-vit-b": 768,
}
PATCH_14 = ("dinov2", "clip", "jepa")


@pytest.fixture
def one_block(monkeypatch):
    """Every encoder with one of its blocks: all but the depth is real, and quick."""
    real = ssl_encoders._create
    monkeypatch.setattr(
        ssl_encoders, "_create", lambda recipe, pretrained=False, **o: real(recipe, pretrained, **{"depth": 1, **o})
    )


def images(n=1, side=64, seed=0):
    return torch.randint(0, 256, (n, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


# ---- what goes in and what comes out


@pytest.mark.parametrize("name", ENCODERS)
def test_tokens_and_normalisation_of_every_encoder(one_block, name):
    assert set(WIDTHS) == set(ENCODERS) and encoder_width(name) == WIDTHS[name]
    patch = 14 if name.startswith(PATCH_14) else 16
    for resolution in (256, 512):
        side = resolution // 16
        encoder = load_encoder(name, side, "random")
        assert (encoder.tokens_a_side, encoder.input_size, encoder.width) == (side, side * patch, WIDTHS[name])
        tokens = encoder(images(1, resolution))
        assert tokens.shape == (1, side * side, WIDTHS[name]) and tokens.dtype == torch.float32
        assert tokens.isfinite().all() and not tokens.requires_grad
    config = resolve_data_config({}, model=encoder.vit)
    mean, std = (tuple(v.flatten().tolist()) for v in (encoder.mean, encoder.std))
    assert mean == pytest.approx(config["mean"]) and std == pytest.approx(config["std"])
    assert (mean, std) == tuple(map(pytest.approx, CLIP if name == "clip-vit-L" else IMAGENET))


def test_a_whole_dinov2_b_with_random_weights():
    encoder = load_encoder("dinov2-vit-b", 16, "random")
    width, block = 768, 12 * 768**2 + 15 * 768  # weights; biases 9, two norms 4, two layer scales 2
    embedding = (3 * 14**2 + 1) * width + (1 + 257) * width  # patches; class token and positions
    assert sum(p.numel() for p in encoder.vit.parameters()) == 12 * block + embedding + 2 * width
    assert encoder(images(1, 256)).shape == (1, 256, 768)


def test_pixels_are_scaled_normalised_and_resized(one_block):
    encoder = load_encoder("clip-vit-L", 4, "random")  # 56 px
    colour = torch.tensor([10, 128, 250], dtype=torch.uint8)
    expected = (colour / 255 - torch.tensor(CLIP[0])) / torch.tensor(CLIP[1])
    for side in (32, 56, 64):
        seen = encoder.preprocess(colour.expand(2, side, side, 3))
        assert seen.shape == (2, 3, 56, 56)
        assert torch.allclose(seen, expected[:, None, None].expand(2, 3, 56, 56), atol=1e-5)
    ramp = torch.arange(112, dtype=torch.uint8)[None, None, :, None].expand(1, 112, 112, 3)
    seen = encoder.preprocess(ramp)[0, 0, 20, 2:-2]  # bicubic interpolation keeps a ramp, off the border
    places = 2 * (torch.arange(56) + 0.5) - 0.5
    assert torch.allclose(seen, ((places / 255 - CLIP[0][0]) / CLIP[1][0])[2:-2], atol=1e-4)


def test_resizing_is_bicubic_without_antialiasing(one_block):
    """As REPA's: at half the size a place reads four pixels in the proportions of Keys' kernel, a = -0.75."""
    encoder = load_encoder("dinov2-vit-s", 4, "random")  # 56 px
    black = torch.zeros(1, 112, 112, 3, dtype=torch.uint8)
    line = black.clone()
    line[:, :, 41] = 255
    seen = (encoder.preprocess(line) - encoder.preprocess(black))[0, 0, 20] * IMAGENET[1][0]
    assert seen[17:24].tolist() == pytest.approx([0, 0, 0, 0.59375, -0.09375, 0, 0], abs=1e-5)


@pytest.mark.parametrize("bad", [images()[0], images().float(), images()[:, :32], images().permute(0, 3, 1, 2)])
def test_what_is_no_batch_of_images_is_refused(one_block, bad):
    with pytest.raises(ValueError, match="expected square uint8 images"):
        load_encoder("dinov1-vit-s", 4, "random")(bad)


@pytest.mark.parametrize(
    ("name", "prefix", "normed"),
    [
        ("dinov2-vit-s", 1, True),
        ("dinov2reg-vit-s", 5, True),
        ("dinov1-vit-s", 1, True),
        ("mocov3-vit-s", 1, True),
        ("mae-vit-b", 1, False),
        ("clip-vit-L", 1, False),
        ("jepa-vit-h", 0, True),
        ("timm:deit_tiny_distilled_patch16_224", 2, True),
    ],
)
def test_the_layer_that_repa_reads_without_class_and_register_tokens(one_block, name, prefix, normed):
    encoder, last = load_encoder(name, 4, "random"), []
    encoder.vit.blocks[-1].register_forward_hook(lambda _, __, out: last.append(out))
    tokens = encoder(images(2))
    seen = last[0][:, prefix:]
    assert seen.shape[1] == 16
    expected = nn.functional.layer_norm(seen, seen.shape[-1:], eps=encoder.vit.norm.eps) if normed else seen
    assert torch.allclose(tokens, expected, atol=1e-5)


def test_tokens_lie_in_the_order_of_the_patches(one_block):
    """A patch that changes, changes the embedding of its own place: row by row, as DeepFlow's."""
    encoder, embedded = load_encoder("timm:vit_tiny_patch16_224", 4, "random"), []
    encoder.vit.patch_embed.register_forward_hook(lambda _, __, out: embedded.append(out))
    plain = torch.zeros(1, 64, 64, 3, dtype=torch.uint8)
    changed = plain.clone()
    changed[0, 16:32, 48:64] = 200  # row 1, column 3
    encoder(plain), encoder(changed)
    assert (embedded[0] != embedded[1]).any(-1)[0].nonzero().flatten().tolist() == [1 * 4 + 3]


def test_the_openai_clip_has_its_own_activation(one_block):
    act = load_encoder("clip-vit-L", 4, "random").vit.blocks[0].mlp.act
    x = torch.linspace(-3, 3, 7)
    assert torch.allclose(act(x), x * torch.sigmoid(1.702 * x))


def test_half_precision_is_by_autocast(one_block):
    full, half = (load_encoder("dinov2-vit-s", 4, "random", dtype=d) for d in (torch.float32, torch.bfloat16))
    a, b = full(images(2)), half(images(2))
    assert b.dtype == torch.float32 and half.vit.blocks[0].attn.qkv.weight.dtype == torch.float32
    assert not torch.equal(a, b) and nn.functional.cosine_similarity(a, b, dim=-1).min() > 0.99


def test_an_encoder_is_frozen(one_block):
    encoder = load_encoder("dinov1-vit-s", 4, "random").train()
    assert not any(module.training for module in encoder.modules())
    assert not any(p.requires_grad for p in encoder.parameters())


def test_random_weights_are_always_the_same_and_the_global_generator_is_left_alone(one_block):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    a = load_encoder("timm:vit_tiny_patch16_224", 4, "random")
    assert torch.equal(torch.rand(3), expected)
    b = load_encoder("timm:vit_tiny_patch16_224", 4, "random")
    assert torch.equal(a(images()), b(images())) and a.width == 192


# ---- weights from files


@pytest.fixture
def trained(one_block):
    """A function: an encoder whose weights are none that a fresh one has."""

    def make(name, side=4):
        encoder = load_encoder(name, side, "random")
        for p in encoder.vit.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
        return encoder

    return make


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("name", ["dinov2-vit-s", "mae-vit-b"])
def test_timms_own_weights_from_a_file(tmp_path, trained, name, suffix):
    encoder = trained(name)
    weights = encoder.vit.state_dict()
    if name.startswith("mae"):  # stored with the norm that is not used, and with the decoder beside
        weights |= {
            "norm.weight": torch.ones(768),
            "norm.bias": torch.zeros(768),
            "decoder_embed.weight": torch.ones(3),
        }
    file = tmp_path / f"weights{suffix}"
    save_file(weights, file) if suffix == ".safetensors" else torch.save({"model": weights}, file)
    assert torch.equal(load_encoder(name, 4, file)(images()), encoder(images()))


def official_dinov2(vit):
    """The keys of facebookresearch/dinov2: registers apart, a mask token, and a position for the class token."""
    weights = {"mask_token": torch.zeros(1, vit.embed_dim), **vit.state_dict()}
    if "reg_token" in weights:
        weights["register_tokens"] = weights.pop("reg_token")
        offset = torch.randn(1, 1, vit.embed_dim)
        weights["cls_token"] = weights["cls_token"] - offset
        weights["pos_embed"] = torch.cat([offset, weights["pos_embed"]], dim=1)
    return weights


@pytest.mark.parametrize(
    ("name", "official"),
    [
        ("dinov2-vit-s", official_dinov2),
        ("dinov2reg-vit-s", official_dinov2),
        ("jepa-vit-h", lambda vit: {"encoder": {f"module.{k}": v for k, v in vit.state_dict().items()}, "epoch": 300}),
        (
            "mocov3-vit-s",
            lambda vit: {
                "state_dict": {f"module.base_encoder.{k}": v for k, v in vit.state_dict().items()}
                | {f"module.momentum_encoder.{k}": 0 * v for k, v in vit.state_dict().items()}
                | {"module.base_encoder.head.0.weight": torch.ones(3)}
            },
        ),
    ],
)
def test_the_makers_weights_from_a_file(tmp_path, trained, name, official):
    encoder = trained(name)
    torch.save(official(encoder.vit), tmp_path / "weights.pth")
    assert torch.allclose(load_encoder(name, 4, tmp_path / "weights.pth")(images()), encoder(images()), atol=1e-5)


def test_position_embeddings_are_resampled_to_the_tokens(tmp_path, trained):
    """Trained at 37 x 37 patches, as DINOv2 was: a position that grows evenly still does at 16 x 16."""
    vit = trained("dinov2-vit-s", 37).vit
    row = torch.linspace(0, 1, 37)
    vit.pos_embed[0, 1:] = row.repeat_interleave(37)[:, None]
    save_file(vit.state_dict(), tmp_path / "w.safetensors")
    position = load_encoder("dinov2-vit-s", 16, tmp_path / "w.safetensors").vit.pos_embed[0]
    assert torch.equal(position[0], vit.pos_embed[0, 0])
    expected = ((torch.arange(16) + 0.5) * 37 / 16 - 0.5) / 36
    assert torch.allclose(position[1:, 0].reshape(16, 16)[2:-2, 5], expected[2:-2], atol=0.01)


class Payload:
    def __reduce__(self):
        return (print, ("executed",))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda file, e: None, "no weights file"),
        (lambda file, e: file.write_bytes(b"junk"), "cannot be read as the weights of dinov2-vit-s"),
        (lambda file, e: torch.save({"state_dict": Payload()}, file), "cannot be read as the weights"),
        (lambda file, e: torch.save([1], file), "cannot be read as the weights"),
        (lambda file, e: torch.save({"epoch": 3}, file), "cannot be read as the weights"),
        (lambda file, e: torch.save({}, file), "does not hold the weights of dinov2-vit-s: 20 missing"),
        (lambda file, e: torch.save(e("dinov2-vit-b"), file), "of other shape"),
        (lambda file, e: torch.save(e("dinov1-vit-s"), file), "missing|of other shape"),
        (lambda file, e: torch.save(e("dinov2reg-vit-s"), file), "as the weights of dinov2-vit-s|does not hold"),
        (
            lambda file, e: torch.save(e("dinov2-vit-s") | {"blocks.1.norm1.weight": torch.ones(384)}, file),
            "1 unexpected .blocks.1",
        ),
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path, one_block, capsys, write, message):
    file = tmp_path / "w.pth"
    write(file, lambda name: load_encoder(name, 4, "random").vit.state_dict())
    with pytest.raises(UserError, match=message) as raised:
        load_encoder("dinov2-vit-s", 4, file)
    assert "\n" not in str(raised.value) and str(file) in str(raised.value) and "--enc-weights" in str(raised.value)
    assert "executed" not in capsys.readouterr().out
    assert "weights_only" not in str(raised.value)  # torch's advice to trust the file


# ---- names, and the hub


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dinov3-vit-b", "unknown encoder 'dinov3-vit-b': choose one of dinov2-vit-s, .*mocov3-vit-b, or timm:NAME"),
        ("timm:no_such_vit", "timm cannot make a ViT no_such_vit"),
        ("timm:resnet18", "timm cannot make a ViT resnet18"),
        ("timm:eva02_tiny_patch14_224", "is a Eva, expected a ViT"),
        ("mocov3-vit-b", "has no weights on the hub: give its makers' file"),
    ],
)
def test_names_that_cannot_be_had_are_refused_in_one_line(name, message):
    with pytest.raises(UserError, match=message) as raised:
        load_encoder(name, 4)
    assert "\n" not in str(raised.value)


def test_without_a_file_the_weights_are_timms_own(one_block, monkeypatch):
    import timm

    asked, real = [], timm.create_model

    def create(name, pretrained=False, **options):
        asked.append((name, pretrained))
        return real(name, False, **options)

    monkeypatch.setattr(timm, "create_model", create)
    load_encoder("dinov2-vit-b", 4)
    assert asked[-1] == ("vit_base_patch14_dinov2.lvd142m", True)
    load_encoder("dinov2-vit-b", 4, "random")
    assert asked[-1] == ("vit_base_patch14_dinov2.lvd142m", False)

    def offline(name, pretrained=False, **options):
        if pretrained:
            raise OSError("no network.\nand more")
        return real(name, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(UserError, match=r"of dinov2-vit-b \(vit_base_.* from the hub or its cache: no network; give"):
        load_encoder("dinov2-vit-b", 4)
