"""Feature extractors: the Inception network of ADM's evaluation, DINOv2, and a small network for the demo data."""

import io
import json
import os
import pickle
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from common.errors import UserError, first_line
from common.files import file_sha256, named_in_utf8
from common.processes import allow_tf32

INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
DEMO_WEIGHTS = Path(__file__).resolve().parent.parent / "assets" / "demo_features.safetensors"
SPATIAL_CHANNELS = 7
SPATIAL_DIMENSION = 17 * 17 * SPATIAL_CHANNELS
DINOV2 = "timm/vit_large_patch14_dinov2.lvd142m"  # on the Hugging Face hub; the original's weights, renamed
DINOV2_SIZE = dict(embed_dim=1024, depth=24, num_heads=16)  # ViT-L, as in the paper's results
DINOV2_SIDE, DINOV2_PATCH = 224, 14
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Features(NamedTuple):
    """Features of n images, float32 on the extractor's device."""

    pool: Tensor  # (n, dimension): Frechet distance, precision, recall, KID
    spatial: Tensor | None  # (n, 2023) for sFID, Inception only
    logits: Tensor | None  # (n, 1008) for the Inception score, Inception only


class InceptionFeatures(nn.Module):
    """The 2015 TensorFlow Inception graph (torch-fidelity's exact copy), read as in ADM's evaluation.

    Images of any size, uint8 (n, H, W, 3); the network resizes to 299 px as the graph does.
    `pool` is the 2048-d average pool; `spatial` the graph's `mixed_6/conv` = 1x1 branch of Mixed_6d after its
    ReLU, first 7 channels, 17 x 17 x 7 flattened in H, W, C order; `logits` pool times the last weights,
    without bias.
    """

    name = "inception"
    dimension = 2048
    image_size = None

    def __init__(self, state_dict: dict[str, Tensor]) -> None:
        super().__init__()
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        # Its constructor unpickles a file or downloads one: give it a file of tensors that were read safely.
        weights = io.BytesIO()
        torch.save(state_dict, weights)
        weights.seek(0)
        self.network = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=weights
        )
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._keep_spatial)

    def _keep_spatial(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        # (n, 192, 17, 17) -> (n, 17, 17, 7) -> (n, 2023)
        self._spatial = output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Features:
        with _full_precision(images.device):
            pool, logits = self.network(images.permute(0, 3, 1, 2).contiguous())
        return Features(pool, self._spatial, logits)


class DinoFeatures(nn.Module):
    """DINOv2 ViT-L/14 as Stein et al. (2023) evaluate with it: the class token after the last norm, 1024-d.

    Images of any size, uint8 (n, H, W, 3), resized to 224 x 224 by Pillow's bicubic filter (8 bits, antialiased), then
    normalised with ImageNet's mean and deviation. `state_dict` is the original's, or timm's copy of it.
    """

    name = "dinov2"
    image_size = None

    def __init__(self, state_dict: dict[str, Tensor]) -> None:
        super().__init__()
        import timm

        self.dimension = DINOV2_SIZE["embed_dim"]
        weights = {name: tensor.float() for name, tensor in state_dict.items() if name != "mask_token"}
        weights["pos_embed"] = dinov2_positions(weights["pos_embed"], DINOV2_SIDE // DINOV2_PATCH)
        with torch.device("meta"):  # do not draw 300 million random weights first
            self.network = timm.create_model(
                "vit_large_patch14_dinov2", img_size=DINOV2_SIDE, num_classes=0, **DINOV2_SIZE
            )
        self.network.load_state_dict(weights, assign=True)
        mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Features:
        with ThreadPoolExecutor() as threads:
            resized = np.stack(list(threads.map(_resize, images.cpu().numpy())))
        pixels = torch.from_numpy(resized).to(self.mean.device).permute(0, 3, 1, 2).float() / 255
        with _full_precision(pixels.device):
            pool = self.network((pixels - self.mean) / self.std)
        return Features(pool, None, None)


def _resize(image: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((DINOV2_SIDE, DINOV2_SIDE), Image.Resampling.BICUBIC))


def dinov2_positions(embedding: Tensor, side: int) -> Tensor:
    """Position embedding for side x side patches: (1, 1 + s*s, D) -> (1, 1 + side*side, D).

    The original model resamples its 37 x 37 positions for smaller images like this: bicubic, not antialiased, in steps
    of s / (side + 0.1). (timm antialiases and takes steps of s / side, which gives other features.)
    """
    prefix, patches = embedding[:, :1], embedding[:, 1:]
    given = round(patches.shape[1] ** 0.5)
    if given == side:
        return embedding
    grid = patches.reshape(1, given, given, -1).permute(0, 3, 1, 2)  # (1, D, s, s)
    grid = F.interpolate(grid, scale_factor=(side + 0.1) / given, mode="bicubic")
    return torch.cat([prefix, grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


class DemoFeatures(nn.Module):
    """A small convolutional network whose features rank samples of the demo data (64 px emoji).

    Strided 3x3 convolutions with batch normalisation, mean and maximum over positions, one linear map to
    `dimension` features. Trained by `preprocessing/demo_models.py features`. Its distances compare runs on
    the demo data with each other; they are not FIDs.
    """

    name = "demo"

    def __init__(self, image_size: int, widths: list[int], dimension: int) -> None:
        super().__init__()
        self.config = {"image_size": image_size, "widths": list(widths), "dimension": dimension}
        self.image_size = image_size
        self.dimension = dimension
        layers = []
        for c_in, c_out in zip([3, *widths[:-1]], widths, strict=True):
            conv = nn.Conv2d(c_in, c_out, 3, stride=2, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(c_out), nn.ReLU(inplace=True)]
        self.trunk = nn.Sequential(*layers)
        self.project = nn.Linear(2 * widths[-1], dimension)

    def embed(self, pixels: Tensor) -> Tensor:
        """Pixels (n, 3, H, W) in [-1, 1] -> features (n, dimension); differentiable, for training."""
        maps = self.trunk(pixels)
        return self.project(torch.cat([maps.mean(dim=(2, 3)), maps.amax(dim=(2, 3))], dim=1))

    @torch.no_grad()
    def forward(self, images: Tensor) -> Features:
        with _full_precision(images.device):
            pool = self.embed(images.permute(0, 3, 1, 2).float() / 127.5 - 1)
        return Features(pool, None, None)


Extractor = InceptionFeatures | DinoFeatures | DemoFeatures


def load_extractor(
    features: str = "inception", weights: str | Path | None = None, device: str | torch.device = "cpu"
) -> Extractor:
    """Build a feature extractor, frozen, in evaluation mode: uint8 (n, H, W, 3) tensor -> `Features`.

    Args:
        features: "inception" (ADM's metrics), "dinov2" (FD-DINOv2) or "demo" (the demo data's own distance).
        weights: local file; by default torch-fidelity's Inception weights (torch's hub cache, downloaded on
            first use and checked by SHA-256), timm's copy of DINOv2 ViT-L/14 (Hugging Face's cache, likewise), or
            the demo weights of this repository.
        device: where the network runs.

    Returns:
        the extractor; its `weights_sha256` identifies the file it was built from.

    Raises:
        UserError: for an unknown name, and for weights that are missing, unreadable or of another network.
    """
    if features not in READERS:
        *names, last = READERS
        raise UserError(f"features {features!r} unknown; expected {', '.join(names)} or {last}")
    if weights is not None and not Path(weights).is_file():
        raise UserError(f"feature weights {weights}: no such file; give a local file or leave the flag out")
    default, published, read = READERS[features]
    path = Path(weights) if weights else default()
    sha256 = file_sha256(path)
    expected = published(path)
    if weights is None and expected not in (None, sha256):
        raise UserError(
            f"{path}: SHA-256 {sha256[:12]}..., expected {expected[:12]}...: delete it, to download it again"
        )
    extractor = read(path)
    extractor.weights_sha256 = sha256
    return extractor.to(device).eval().requires_grad_(False)


def _download_inception() -> Path:
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(URL_INCEPTION_V3).name
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shown = not os.environ.get("TQDM_DISABLE")  # which an explicit value would override
        torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), INCEPTION_SHA256, progress=shown)
    except (OSError, RuntimeError) as error:  # no network, no space; or a wrong hash
        raise UserError(
            f"Inception weights: not at {path} and {URL_INCEPTION_V3} cannot be had ({error}); "
            "fetch that file elsewhere and give it with --feature-weights FILE"
        ) from error
    return path


def _download_dinov2() -> Path:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    found = try_to_load_from_cache(DINOV2, "model.safetensors")
    if isinstance(found, str):
        return Path(found)
    try:
        return Path(hf_hub_download(DINOV2, "model.safetensors"))
    except Exception as error:  # each version of the hub's client raises others without network or space
        raise UserError(
            f"DINOv2 weights: {DINOV2} is not in Hugging Face's cache and cannot be had ({first_line(error)}); fetch "
            "its model.safetensors, or the original dinov2_vitl14_pretrain.pth, and give it with --feature-weights FILE"
        ) from error


def _dinov2_sha256(path: Path) -> str | None:
    """The SHA-256 by which the hub's cache names the file that `path` links to, if it does."""
    name = path.resolve().name
    return name if re.fullmatch("[0-9a-f]{64}", name) else None


def _read_tensors(path: Path, expected: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file or of a `.pth`; nothing is unpickled freely."""
    try:
        if path.suffix == ".safetensors":
            with named_in_utf8(path) as name:
                return load_file(name)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise UserError(f"feature weights {path}: not a readable file of tensors; {expected}") from error


def _read_inception(path: Path) -> Extractor:
    expected = "expected torch-fidelity's weights-inception-2015-12-05-6726825d.pth"
    return _build(InceptionFeatures, path, "that Inception network", expected)


def _read_dinov2(path: Path) -> Extractor:
    expected = "expected DINOv2 ViT-L/14 without registers: timm's model.safetensors or dinov2_vitl14_pretrain.pth"
    return _build(DinoFeatures, path, "that network", expected)


def _build(network: Callable[[dict[str, Tensor]], Extractor], path: Path, title: str, expected: str) -> Extractor:
    state_dict = _read_tensors(path, expected)
    try:
        return network(state_dict)
    except (RuntimeError, TypeError, AttributeError, KeyError) as error:
        raise UserError(f"feature weights {path}: not the weights of {title}; {expected}") from error


def _read_demo(path: Path) -> DemoFeatures:
    try:
        with named_in_utf8(path) as name, safe_open(name, framework="pt") as file:
            config = json.loads(file.metadata()["config"])
            state_dict = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        extractor = DemoFeatures(**config)
        extractor.load_state_dict(state_dict)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"feature weights {path}: not a demo feature network; expected the safetensors file that "
            "`python -m preprocessing.demo_models features` writes"
        ) from error
    return extractor


# Name -> its default weights, the SHA-256 that these must have (None: unknown), and the reader of weights.
READERS = {
    "inception": (_download_inception, lambda _: INCEPTION_SHA256, _read_inception),
    "dinov2": (_download_dinov2, _dinov2_sha256, _read_dinov2),
    "demo": (lambda: DEMO_WEIGHTS, lambda _: None, _read_demo),
}


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Float32 without TF32 or autocast: reduced precision shifts the features, and thus the distance."""
    with allow_tf32(False), torch.autocast(device.type, enabled=False):
        yield
