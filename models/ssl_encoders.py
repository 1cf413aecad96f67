"""Frozen self-supervised image encoders, whose patch tokens DeepFlow's features are aligned with (REPA).

The networks are timm's, under the names that REPA and the official release give them (`dinov2-vit-b`, ...); `timm:NAME`
is any other ViT of timm. An image is resized so that the encoder yields exactly the tokens of the DeepFlow network: a
side of 16 tokens is 224 px for patches of 14 and 256 px for patches of 16. Resizing (bicubic, not antialiased) and the
layer that is read are REPA's.
"""

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from common.errors import UserError, first_line, unknown_name
from common.files import named_in_utf8

from .checkpoints import describe_mismatch

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

RANDOM = "random"  # in place of a weights file: untrained weights, the same every time
RANDOM_SEED = 0
IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
MOCO_PREFIX = "module.base_encoder."  # of the encoder in files of MoCo v3, which also hold its momentum copy


class Recipe(NamedTuple):
    """How to make an encoder from a network of timm."""

    timm_name: str
    options: Mapping[str, Any] = MappingProxyType({})  # where timm's own are for other weights of this network
    final_norm: bool = True  # whether REPA reads the tokens after the last LayerNorm, or before
    hub: bool = True  # whether timm knows where its weights are


def _moco(size: str, **options: Any) -> Recipe:
    # timm has the network but not these weights, and its own ones are normalised in another way.
    return Recipe(f"vit_{size}_patch16_224", dict(pretrained_cfg_overlay=IMAGENET, **options), hub=False)


ENCODERS: dict[str, Recipe] = {
    "dinov2-vit-s": Recipe("vit_small_patch14_dinov2.lvd142m"),
    "dinov2-vit-b": Recipe("vit_base_patch14_dinov2.lvd142m"),
    "dinov2-vit-l": Recipe("vit_large_patch14_dinov2.lvd142m"),
    "dinov2-vit-g": Recipe("vit_giant_patch14_dinov2.lvd142m"),
    "dinov2reg-vit-s": Recipe("vit_small_patch14_reg4_dinov2.lvd142m"),
    "dinov2reg-vit-b": Recipe("vit_base_patch14_reg4_dinov2.lvd142m"),
    "dinov2reg-vit-l": Recipe("vit_large_patch14_reg4_dinov2.lvd142m"),
    "dinov2reg-vit-g": Recipe("vit_giant_patch14_reg4_dinov2.lvd142m"),
    "dinov1-vit-s": Recipe("vit_small_patch16_224.dino"),
    "dinov1-vit-b": Recipe("vit_base_patch16_224.dino"),
    "mae-vit-b": Recipe("vit_base_patch16_224.mae", final_norm=False),
    "mae-vit-l": Recipe("vit_large_patch16_224.mae", final_norm=False),
    "clip-vit-L": Recipe("vit_large_patch14_clip_224.openai", dict(act_layer="quick_gelu"), final_norm=False),
    "jepa-vit-h": Recipe("vit_huge_patch14_gap_224.in1k_ijepa"),
    "mocov3-vit-s": _moco("small", num_heads=12),
    "mocov3-vit-b": _moco("base"),
}


class SSLEncoder(nn.Module):
    """A frozen ViT: uint8 images (N, H, W, 3) with H = W -> patch tokens (N, T, width), float32, without gradient.

    Attributes: `tokens_a_side` (T is its square), `width`, `input_size` (pixels that the ViT sees, images are resized
    to that).

    Args:
        vit: the network, for images of tokens_a_side * patch size pixels.
        final_norm: whether tokens are read after the ViT's last LayerNorm.
        dtype: precision it runs in; anything but float32 by autocast.
    """

    mean: Tensor  # (3, 1, 1), of pixels in [0, 1]
    std: Tensor

    def __init__(self, vit: "VisionTransformer", final_norm: bool = True, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.vit, self.dtype = vit, dtype
        if not final_norm:
            self.vit.norm = nn.Identity()
        self.tokens_a_side = vit.patch_embed.grid_size[0]
        self.input_size = vit.patch_embed.img_size[0]
        self.width: int = vit.embed_dim
        normalisation: Any = vit.pretrained_cfg
        for name in ("mean", "std"):
            value = torch.tensor(normalisation[name], device="cpu").reshape(3, 1, 1)
            self.register_buffer(name, value, persistent=False)
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> "SSLEncoder":
        """Stays in evaluation mode: an encoder is never trained."""
        return super().train(False)

    def preprocess(self, images: Tensor) -> Tensor:
        """uint8 (N, H, W, 3) -> float32 (N, 3, input_size, input_size), normalised as the ViT's weights expect."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[-1] != 3 or len(set(images.shape[1:3])) > 1:
            raise ValueError(f"expected square uint8 images (N, H, W, 3), got {images.dtype} {tuple(images.shape)}")
        pixels = images.to(self.mean.device, non_blocking=True).permute(0, 3, 1, 2) / 255  # (N, 3, H, W) in [0, 1]
        pixels = (pixels - self.mean) / self.std
        if pixels.shape[-1] == self.input_size:
            return pixels
        return F.interpolate(pixels, size=(self.input_size, self.input_size), mode="bicubic")

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        pixels = self.preprocess(images)
        with torch.autocast(pixels.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            tokens = self.vit.forward_features(pixels)  # class and register tokens first
        return tokens[:, self.vit.num_prefix_tokens :].float()


def load_encoder(
    name: str,
    tokens_a_side: int,
    weights: str | Path | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> SSLEncoder:
    """The encoder of that name, frozen.

    Neither the global random state is touched nor anything in a weights file executed. Without a file the weights are
    looked up on the hub, and its cache: let one process do so before the others.

    Args:
        name: a key of `ENCODERS`, or `timm:` and the name of any other ViT of timm.
        tokens_a_side: square root of the number T of tokens; the DeepFlow network's input_size / patch_size.
        weights: a local file, safetensors or torch's, as timm or the makers of the weights have it; `random` for
            untrained weights; None for timm's own from the hub.
        device: where it runs.
        dtype: precision it runs in.

    Raises:
        UserError: for a name that is not known, or weights that cannot be loaded or are of another network.
    """
    recipe = _recipe(name)
    if weights is None and not recipe.hub:
        raise UserError(f"the encoder {name} has no weights on the hub: give its makers' file (--enc-weights)")
    vit = _build(name, recipe, tokens_a_side, pretrained=weights is None)
    if weights not in (None, RANDOM):
        _load_file(vit, Path(weights), name)
    return SSLEncoder(vit, recipe.final_norm, dtype).to(device)


def encoder_width(name: str) -> int:
    """The width z of an encoder's tokens, for `ssl_dim`: nothing is loaded. `UserError` for an unknown name."""
    return _one_block(name, _recipe(name)).embed_dim


def _recipe(name: str) -> Recipe:
    if name.startswith("timm:"):
        return Recipe(name.removeprefix("timm:"))
    if name not in ENCODERS:
        raise unknown_name("encoder", name, [*ENCODERS, "or timm:NAME for another ViT of timm"], "--enc-type")
    return ENCODERS[name]


def _create(recipe: Recipe, pretrained: bool = False, **options: Any) -> nn.Module:
    import timm  # slow to import, and only needed where encoders are

    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(RANDOM_SEED)
        return timm.create_model(recipe.timm_name, pretrained, num_classes=0, **recipe.options, **options)


def _one_block(name: str, recipe: Recipe) -> "VisionTransformer":
    """The network cut down to one block: quick to make, and with all properties but the depth."""
    from timm.models.vision_transformer import VisionTransformer

    try:
        vit = _create(recipe, depth=1)
    except Exception as error:  # timm raises several kinds for what it does not know
        raise UserError(f"timm cannot make a ViT {recipe.timm_name} ({_reason(error)}) (--enc-type)") from error
    if not isinstance(vit, VisionTransformer):
        raise UserError(f"{name} is a {type(vit).__name__}, expected a ViT of timm's plain kind (--enc-type)")
    return vit


def _build(name: str, recipe: Recipe, tokens_a_side: int, pretrained: bool) -> "VisionTransformer":
    """The network for images that give `tokens_a_side` tokens per side, with timm's weights or with random ones."""
    img_size = tokens_a_side * _one_block(name, recipe).patch_embed.patch_size[0]
    try:
        return cast("VisionTransformer", _create(recipe, pretrained, img_size=img_size))
    except Exception as error:  # of the hub's client, the network, damaged files
        if not pretrained:
            raise
        raise UserError(
            f"cannot get the weights of {name} ({recipe.timm_name}) from the hub or its cache: {_reason(error)}; "
            "give a local file (--enc-weights)"
        ) from error


def require_weights(weights: str | Path) -> None:
    """Raise `UserError` unless `weights`, an argument of `load_encoder`, is `random` or an existing file."""
    if weights != RANDOM and not Path(weights).is_file():
        raise UserError(
            f"no weights file {weights}: give a local file, or {RANDOM} for untrained weights (--enc-weights)"
        )


def _load_file(vit: "VisionTransformer", file: Path, name: str) -> None:
    """Load weights from a file into the network, position embeddings resampled to its size."""
    from timm.models.vision_transformer import checkpoint_filter_fn

    require_weights(file)
    try:
        content = _read(file)
        for key in ("state_dict", "model"):
            content = content.get(key, content)
        if any(key.startswith(MOCO_PREFIX) for key in content):
            content = {k.removeprefix(MOCO_PREFIX): v for k, v in content.items() if k.startswith(MOCO_PREFIX)}
        content = checkpoint_filter_fn(dict(content), vit)  # knows its makers' names of DINOv2, CLIP and I-JEPA
        given = {key: tuple(tensor.shape) for key, tensor in content.items()}
    except Exception as error:  # of readers, and of resampling what is no position embedding
        raise UserError(
            f"{file} cannot be read as the weights of {name} ({_reason(error)}): expected timm's or its makers' "
            "file of this very encoder, as safetensors or as a torch file of weights alone (--enc-weights)"
        ) from error
    expected = {key: tuple(tensor.shape) for key, tensor in vit.state_dict().items()}
    parts = {key.split(".")[0] for key in expected} | {"reg_token"}  # the rest is heads, decoders and the like
    given = {key: shape for key, shape in given.items() if key.split(".")[0] in parts}
    if given != expected:
        raise UserError(
            f"{file} does not hold the weights of {name}: {describe_mismatch(expected, given)} (--enc-weights)"
        )
    vit.load_state_dict({key: content[key] for key in expected})


def _read(file: Path) -> dict[str, Any]:
    if file.suffix == ".safetensors":
        with named_in_utf8(file) as name:
            return load_file(name)
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:  # torch's own message advises to trust the file
        raise ValueError("no torch file, or one that holds more than weights") from error


def _reason(error: Exception) -> str:
    """What an error says, to stand inside a sentence."""
    return first_line(error).rstrip(".")
