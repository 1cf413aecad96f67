"""Feature extractors: the Inception network of ADM's evaluation, and a small one for the demo data."""

import io
import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from errors import UserError
from files import file_sha256

INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
DEMO_WEIGHTS = Path(__file__).resolve().parent.parent / "assets" / "demo_features.safetensors"
SPATIAL_CHANNELS = 7
SPATIAL_DIMENSION = 17 * 17 * SPATIAL_CHANNELS


class Features(NamedTuple):
    """Features of n images, float32 on the extractor's device."""

    pool: Tensor  # (n, dimension): Frechet distance, precision, recall, KID
    spatial: Tensor | None  # (n, 2023) for sFID, Inception only
    logits: Tensor | None  # (n, 1008) for the Inception score, Inception only


class InceptionFeatures(nn.Module):
    """The 2015 TensorFlow Inception graph (torch-fidelity's faithful copy), as ADM's evaluation reads it.

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

        # Its constructor unpickles freely or downloads; a copy of tensors already read safely avoids both.
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
        with _full_precision():
            pool, logits = self.network(images.permute(0, 3, 1, 2).contiguous())
        return Features(pool, self._spatial, logits)


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
        with _full_precision():
            pool = self.embed(images.permute(0, 3, 1, 2).float() / 127.5 - 1)
        return Features(pool, None, None)


Extractor = InceptionFeatures | DemoFeatures


def load_extractor(
    features: str = "inception", weights: str | Path | None = None, device: str | torch.device = "cpu"
) -> Extractor:
    """Build a feature extractor, frozen, in evaluation mode: uint8 (n, H, W, 3) tensor -> `Features`.

    Args:
        features: "inception" (ADM's metrics) or "demo" (the demo data's own distance).
        weights: local file; by default torch-fidelity's Inception weights (torch's hub cache, downloaded on
            first use and checked by SHA-256), or the demo weights of this repository.
        device: where the network runs.

    The extractor's `weights_sha256` names the file it was built from.
    Raises `UserError` for an unknown name, and for weights that are missing, unreadable or of another
    network.
    """
    if features not in ("inception", "demo"):
        raise UserError(f"features {features!r} unknown; expected inception or demo")
    if weights is not None and not Path(weights).is_file():
        raise UserError(f"feature weights {weights}: no such file; give a local file or leave the flag out")
    if features == "inception":
        path = Path(weights) if weights else _download_inception()
        extractor = _read_inception(path)
    else:
        path = Path(weights or DEMO_WEIGHTS)
        extractor = _read_demo(path)
    extractor.weights_sha256 = file_sha256(path)
    return extractor.to(device).eval().requires_grad_(False)


def _download_inception() -> Path:
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(URL_INCEPTION_V3).name
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), hash_prefix=INCEPTION_SHA256)
    except (OSError, RuntimeError) as error:  # no network, no space; or a wrong hash
        raise UserError(
            f"Inception weights: not at {path} and {URL_INCEPTION_V3} cannot be had ({error}); "
            "fetch that file elsewhere and give it with --feature-weights FILE"
        ) from error
    return path


def _read_inception(path: Path) -> InceptionFeatures:
    expected = "expected torch-fidelity's weights-inception-2015-12-05-6726825d.pth"
    try:
        state_dict = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise UserError(f"feature weights {path}: not a readable file of tensors; {expected}") from error
    try:
        return InceptionFeatures(state_dict)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise UserError(f"feature weights {path}: not the weights of that Inception network; {expected}") from error


def _read_demo(path: Path) -> DemoFeatures:
    try:
        with safe_open(path, framework="pt") as file:
            config = json.loads(file.metadata()["config"])
            state_dict = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        extractor = DemoFeatures(**config)
        extractor.load_state_dict(state_dict)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"feature weights {path}: not a demo feature network; expected the safetensors file that "
            "`python -m preprocessing.demo_models features` writes"
        ) from error
    return extractor


@contextmanager
def _full_precision() -> Iterator[None]:
    """Float32 without TF32: reduced precision shifts Inception's features, and with them the distance."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
