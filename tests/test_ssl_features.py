"""Precomputed features: the same loss as on the fly, and only with the latents they belong to."""

import itertools
import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from helpers.sample_data import COUNT, make_images, make_vae, write_dataset, write_files
from PIL import Image

from common.errors import UserError
from dataset import DataOrder, DeviceLatents, latent_batches, open_latents
from loss import DeepFlowLoss
from models import DeepFlow
from models.autoencoder import sample_latents
from models.ssl_encoders import load_encoder
from preprocessing.encode import encode
from preprocessing.encode_ssl import encode_ssl
from preprocessing.packed_writer import PackedJob, features_manifest
from storage.features import PackedFeatures
from storage.packed import PackedLatents

TOKENS, WIDTH = 4, 6
VIT = "timm:vit_tiny_patch16_224"


def write_features(dest, names, tokens=TOKENS, dtype="float16", flip=False, resolution=16, shard_rows=10):
    """Packed features that are made up; returns what went in."""
    rng = np.random.default_rng(7)
    shape = (len(names), 2, tokens, WIDTH) if flip else (len(names), tokens, WIDTH)
    values = rng.normal(size=shape).astype(dtype)
    manifest = features_manifest(
        names,
        resolution=resolution,
        tokens=tokens,
        width=WIDTH,
        dtype=dtype,
        encoder="none",
        weights_sha256="0" * 64,
        flip=flip,
    )
    job = PackedJob.begin(dest, manifest, names)
    for unit in job.unwritten_units():
        rows = job.rows_of(unit)
        job.write_unit(unit, values[rows.start : rows.stop])
    job.finish(shard_rows)
    return values


@pytest.fixture
def data(tmp_path):
    write_dataset(tmp_path / "latents")
    return PackedLatents(tmp_path / "latents")


# ---- what is read is what was written


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_gather_returns_what_was_written(tmp_path, data, dtype):
    values = write_features(tmp_path / "features", data.names, dtype=dtype)
    features = PackedFeatures(tmp_path / "features")
    assert (len(features), features.tokens, features.width, features.encoder) == (COUNT, TOKENS, WIDTH, "none")
    assert features.names == data.names and len(features.manifest["shards"]) == 3
    for indices in (np.arange(COUNT), np.array([22, 0, 9, 10, 9])):
        read = features.gather(indices)
        assert read.dtype == dtype
        np.testing.assert_array_equal(read, values[indices])
    sent = pickle.loads(pickle.dumps(features))
    np.testing.assert_array_equal(sent.gather(np.array([3])), values[[3]])
    with pytest.raises(IndexError):
        features.gather(np.array([COUNT]))
    with pytest.raises(ValueError, match="no features of mirror images"):
        features.gather(np.array([0]), np.array([True]))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("on_device", [False, True])
def test_batches_bring_the_features_of_their_samples_and_views(tmp_path, num_workers, on_device):
    write_dataset(tmp_path / "latents", flip=True)
    data = PackedLatents(tmp_path / "latents")
    values = [
        write_features(tmp_path / "a", data.names, flip=True),
        write_features(tmp_path / "b", data.names, tokens=9, flip=True),
    ]
    features = [PackedFeatures(tmp_path / name) for name in "ab"]
    source = DeviceLatents(data, "cpu") if on_device else data
    batches = latent_batches(source, DataOrder(COUNT, 8, 0), num_workers=num_workers, features=features)
    seen = set()
    for batch in itertools.islice(batches, 6):
        assert batch.images is None and len(batch.features) == 2
        for got, expected in zip(batch.features, values, strict=True):
            np.testing.assert_array_equal(got, expected[batch.indices, batch.mirrored.long()])
        seen |= set(batch.mirrored.tolist())
    assert seen == {False, True}
    assert next(latent_batches(source, DataOrder(COUNT, 8, 0))).features is None


def test_features_of_another_number_of_samples_are_refused(tmp_path, data):
    write_features(tmp_path / "features", data.names[:-1])
    with pytest.raises(UserError, match=r"features of 22 samples, \S+latents has 23"):
        latent_batches(data, DataOrder(COUNT, 8, 0), features=[PackedFeatures(tmp_path / "features")])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(format="deepflow-packed-latents"), "is not the manifest of packed features"),
        (dict(version=9), "version 9"),
        (dict(tokens=0), "its tokens is 0"),
        (dict(width=None), "its width is None"),
        (dict(encoder=3), "its encoder is 3"),
        (dict(weights_sha256=None), "its weights_sha256 is None"),
        (dict(width=5), "features-00000.npy holds"),
        (dict(flip=True), "features-00000.npy holds"),
    ],
)
def test_damaged_manifests_are_named(tmp_path, data, changes, message):
    write_features(tmp_path / "features", data.names)
    file = tmp_path / "features" / "dataset.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(UserError, match=message):
        PackedFeatures(tmp_path / "features")


def test_latents_are_no_features_and_the_other_way_round(tmp_path, data):
    write_features(tmp_path / "features", data.names)
    with pytest.raises(UserError, match="not the manifest of packed features .* encode-ssl --source"):
        PackedFeatures(data.path)
    with pytest.raises(UserError, match="not the manifest of packed latents"):
        open_latents(tmp_path / "features")
    with pytest.raises(UserError, match="no dataset folder .* encode-ssl --source"):
        PackedFeatures(tmp_path / "none")


# ---- features belong to latents


def test_features_of_the_same_images_belong(tmp_path, data):
    write_features(tmp_path / "features", data.names, flip=True)
    PackedFeatures(tmp_path / "features").check_belongs(data, TOKENS)
    write_files(tmp_path / "vae-sd", shape=(8, 2, 2))  # the official layout, whose latents have names of their own
    files = open_latents(tmp_path / "vae-sd")
    write_features(tmp_path / "official", [n.replace("-mean-std-", "").replace(".npy", ".png") for n in files.names])
    PackedFeatures(tmp_path / "official").check_belongs(files, TOKENS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(tokens=9), r"holds 9 tokens per image, the network has 4: encode with --tokens 2"),
        (dict(resolution=32), r"\S+features holds features of 32 px images, \S+latents latents of 16 px"),
        (dict(names=lambda names: names[::-1]), r"sample 0 is class/022 in \S+features, but class/000 in \S+latents"),
        (dict(names=lambda names: [*names[:5], "x.png", *names[6:]]), r"sample 5 is x in \S+, but class/005 in"),
        (dict(names=lambda names: names[:-1]), r"features of 22 images, \S+latents latents of 23"),
    ],
)
def test_features_of_other_images_are_refused_naming_both(tmp_path, data, change, message):
    names = change.pop("names", list)(data.names)
    write_features(tmp_path / "features", names, **change)
    with pytest.raises(UserError, match=message):
        PackedFeatures(tmp_path / "features").check_belongs(data, TOKENS)


def test_flipped_latents_need_flipped_features(tmp_path):
    write_dataset(tmp_path / "latents", flip=True)
    data = PackedLatents(tmp_path / "latents")
    write_features(tmp_path / "features", data.names)
    with pytest.raises(UserError, match="no features of them: encode with --flip"):
        PackedFeatures(tmp_path / "features").check_belongs(data, TOKENS)


# ---- alignment


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    """Nine images, their latents with pixels, and their features, mirror images too."""
    folder = tmp_path_factory.mktemp("encoded")
    make_images(folder / "images")
    encode(folder / "images", folder / "latents", make_vae(folder / "vae"), flip=True, with_images=True, num_workers=0)
    encode_ssl(folder / "latents", folder / "features", VIT, "random", flip=True, num_workers=0)
    return folder


def terms_at(seed, model, x0, y, features):
    """The loss terms of a model with all that is random drawn from a seed."""
    loss = DeepFlowLoss()
    draws = loss.draw(model.num_branches, x0.shape, torch.Generator().manual_seed(seed))
    return loss.terms(model, x0, y, model.null_condition(len(y)), draws, features)


def test_alignment_on_the_fly_and_precomputed_agree(encoded):
    """Within what storing in float16 rounds; float16 has 11 bits, and a cosine is no steeper than its vectors."""
    data, features = PackedLatents(encoded / "latents"), PackedFeatures(encoded / "features")
    torch.manual_seed(0)
    model = DeepFlow(16, 4, 2, 3, projector_dim=8, df_idxs=[2], input_size=4, ssl_dim=features.width)
    features.check_belongs(data, tokens=4)
    encoder = load_encoder(VIT, 2, "random")
    for batch in itertools.islice(latent_batches(data, DataOrder(9, 8, 0), with_images=True, features=[features]), 4):
        x0 = sample_latents(batch.moments, data.scaling_factor, torch.zeros(8, 4, 4, 4))
        stored, fresh = (
            terms_at(1, model, x0, batch.condition, given) for given in (batch.features, encoder(batch.images))
        )
        assert batch.features[0].dtype == torch.float16 and stored.alignment.abs().min() > 1e-4
        assert torch.allclose(stored.alignment, fresh.alignment, atol=1e-3)
        assert torch.equal(stored.velocity, fresh.velocity)
        other = terms_at(1, model, x0, batch.condition, encoder(batch.images.flip(2)))
        assert not torch.allclose(stored.alignment, other.alignment, atol=1e-3)  # the view matters


@pytest.mark.parametrize(("df_idxs", "repa_depth"), [([2], 0), ([1, 3], 0), ([], 2)])
def test_alignment_trains_what_comes_before_it_and_not_the_encoder(encoded, df_idxs, repa_depth):
    data = PackedLatents(encoded / "latents")
    torch.manual_seed(0)
    encoder = load_encoder(VIT, 2, "random")
    model = DeepFlow(
        16, 4, 2, 3, projector_dim=8, df_idxs=df_idxs, input_size=4, ssl_dim=encoder.width, repa_depth=repa_depth
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    before = [p.clone() for p in encoder.parameters()]
    features = encoder(torch.from_numpy(data.gather_images(np.arange(8))))
    terms = terms_at(0, model, torch.randn(8, 4, 4, 4), torch.zeros(8, dtype=torch.long), features)
    terms.alignment.sum().backward()
    aligned = (df_idxs or [repa_depth])[-1]
    trained = [block.attn.qkv.weight.grad is not None and block.attn.qkv.weight.grad.any() for block in model.blocks]
    assert [bool(t) for t in trained] == [True] * aligned + [False] * (4 - aligned)
    assert all(p.grad.any() for p in model.projectors.parameters())
    assert not any(head.linear.weight.grad is not None for head in model.final_layer)
    assert not any(p.requires_grad or p.grad is not None for p in encoder.parameters())
    assert all(map(torch.equal, before, encoder.parameters()))


def test_training_raises_the_cosine(encoded):
    data, features = PackedLatents(encoded / "latents"), PackedFeatures(encoded / "features")
    torch.manual_seed(0)
    model = DeepFlow(32, 4, 2, 3, projector_dim=32, df_idxs=[2], input_size=4, ssl_dim=[features.width] * 2)
    optimizer, loss, cosines = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0), DeepFlowLoss(), []
    batches = latent_batches(data, DataOrder(9, 9, 0), features=[features, features])
    for step, batch in zip(range(40), batches, strict=False):
        x0 = sample_latents(batch.moments, data.scaling_factor, torch.zeros(9, 4, 4, 4))
        terms = terms_at(step, model, x0, batch.condition, batch.features)
        loss.total(terms).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        cosines.append(-terms.alignment.mean().item())
    assert abs(cosines[0]) < 0.05 and cosines[-1] > 0.2  # of images of noise, whose tokens share but a direction


# ---- the official layout: images beside the latents


@pytest.fixture(params=["folder", "zip"])
def official(request, tmp_path):
    """data_dir/vae-sd and data_dir/images; pixels tell which sample they are of."""
    labels = write_files(tmp_path / "data" / "vae-sd")
    for number, name in enumerate(sorted(labels)):
        image = tmp_path / "data" / "images" / name.replace("img-mean-std-", "img").replace(".npy", ".png")
        image.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.full((32, 32, 3), number, np.uint8)
        pixels[:, 0] = 200
        Image.fromarray(pixels).save(image)
    if request.param == "zip":
        shutil.make_archive(tmp_path / "data" / "images", "zip", tmp_path / "data" / "images")
        shutil.rmtree(tmp_path / "data" / "images")
    return tmp_path / "data"


def test_images_beside_the_official_latents_are_served(official):
    data = open_latents(official)
    assert data.has_images
    data = pickle.loads(pickle.dumps(data))
    for batch in itertools.islice(latent_batches(data, DataOrder(COUNT, 8, 0), with_images=True, num_workers=2), 4):
        assert batch.images.shape == (8, 32, 32, 3) and batch.images.dtype == torch.uint8
        assert batch.images[:, 0, 1, 0].tolist() == batch.indices.tolist()
        assert (batch.images[:, :, 0] == 200).all()
    assert not open_latents(official / "vae-sd").has_images
    with pytest.raises(UserError, match="no images beside it: expected a folder images, or images.zip"):
        open_latents(official / "vae-sd").gather_images(np.arange(2))


def test_images_that_do_not_fit_the_official_latents_are_named(tmp_path):
    write_files(tmp_path / "vae-sd")
    (tmp_path / "images" / "00000").mkdir(parents=True)
    data = open_latents(tmp_path)
    with pytest.raises(UserError, match=r"images has no image 00000/img00000000, which \S+00000000.npy is of"):
        data.gather_images(np.arange(1))
    Image.new("RGB", (32, 16)).save(tmp_path / "images" / "00000" / "img00000000.png")
    with pytest.raises(UserError, match="img00000000.png is 32 x 16 pixels, but its latents are of 32 x 32"):
        data.gather_images(np.arange(1))
    with pytest.raises(UserError, match="img00000001.png is missing"):
        data.gather_images(np.array([1]))
