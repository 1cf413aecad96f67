"""The reference batch written from images, and its Inception statistics."""

import numpy as np
import pytest
import torch
from helpers.sample_data import run_main
from PIL import Image

from common.errors import UserError
from evaluation import ImageArchive, frechet_distance
from evaluation.features import Features
from evaluation.metrics import extract
from preprocessing.stats import write_reference


@pytest.fixture
def folder(tmp_path):
    """Three classes of two images, 4 x 5 pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, size=(6, 4, 5, 3), dtype=np.uint8)
    for index, image in enumerate(pixels):
        place = tmp_path / "images" / "abc"[index // 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{index}.png")
    return tmp_path / "images", pixels


@pytest.fixture
def inception_weights(tmp_path):
    """A file of random weights of torch-fidelity's Inception, built without its download."""
    from torch_fidelity import feature_extractor_inceptionv3 as theirs

    class Untrained(theirs.FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict):
            pass

    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(theirs, "load_state_dict_from_url", lambda *_, **__: {})
        network = Untrained("untrained", ["2048"])
    path = tmp_path / "inception.pth"
    torch.save(network.state_dict(), path)
    return path


class Projection(torch.nn.Module):
    """Stands in for Inception: fixed random features of the pixels."""

    name, dimension, image_size = "inception", 5, None

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(4 * 5 * 3, 2028, generator=torch.manual_seed(0)))

    @torch.no_grad()
    def forward(self, images):
        features = images.flatten(1).float() @ self.weight
        return Features(features[:, :5], features[:, 5:], features[:, :7])


@pytest.mark.parametrize("indices", [None, [4, 0, 0], range(1, 6, 2)])
def test_reference_holds_the_chosen_images_and_labels(folder, tmp_path, indices):
    images_dir, pixels = folder
    path = write_reference(images_dir, tmp_path / "new" / "r.npz", indices)
    chosen = list(range(6) if indices is None else indices)
    with np.load(path, allow_pickle=False) as arrays:
        assert arrays.files == ["arr_0", "arr_1"]
        np.testing.assert_array_equal(arrays["arr_0"], pixels[chosen])
        np.testing.assert_array_equal(arrays["arr_1"], np.array(chosen) // 2)
        assert (arrays["arr_0"].dtype, arrays["arr_1"].dtype) == (np.uint8, np.int64)
    np.testing.assert_array_equal(np.concatenate(list(ImageArchive(path).batches(2))), pixels[chosen])
    assert [file.name for file in path.parent.iterdir()] == ["r.npz"]


def test_statistics_are_mean_and_covariance_of_the_features(folder, tmp_path):
    images_dir, pixels = folder
    network = Projection()
    path = write_reference(images_dir, tmp_path / "r.npz", [0, 1, 2, 5], network)
    features = network(torch.from_numpy(pixels[[0, 1, 2, 5]]))
    with np.load(path, allow_pickle=False) as arrays:
        for mean, covariance, rows in (("mu", "sigma", features.pool), ("mu_s", "sigma_s", features.spatial)):
            rows = rows.double().numpy()
            np.testing.assert_allclose(arrays[mean], rows.mean(axis=0), rtol=1e-9)
            np.testing.assert_allclose(arrays[covariance], np.cov(rows, rowvar=False), rtol=1e-6, atol=1e-6)
            assert arrays[mean].dtype == arrays[covariance].dtype == np.float64
    stored = extract(ImageArchive(path), network).gaussian  # as an evaluation against it finds them
    computed = extract(pixels[[0, 1, 2, 5]], network).gaussian
    assert frechet_distance(*stored, *computed) < 1e-8 * np.trace(stored[1])


def test_command_with_inception(folder, tmp_path, inception_weights, monkeypatch):
    images_dir, pixels = folder
    flags = ["--source", images_dir, "--dest", tmp_path / "r.npz", "--feature-weights", inception_weights]
    assert run_main(monkeypatch, "stats", *flags, "--every", 4, "--device", "cpu") == 0
    with np.load(tmp_path / "r.npz", allow_pickle=False) as arrays:
        np.testing.assert_array_equal(arrays["arr_0"], pixels[::4])
        assert [arrays[name].shape for name in ("mu", "sigma", "mu_s", "sigma_s")] == [
            (2048,), (2048, 2048), (2023,), (2023, 2023)
        ]  # fmt: skip
        assert np.linalg.matrix_rank(arrays["sigma"], hermitian=True) == 1  # of two images


def test_command_writes_disjoint_halves(folder, tmp_path, monkeypatch):
    images_dir, pixels = folder
    for first in (0, 1):
        dest = tmp_path / f"{first}.npz"
        flags = ["--source", images_dir, "--dest", dest, "--every", 2, "--first", first]
        assert run_main(monkeypatch, "stats", *flags) == 0
        with np.load(dest) as arrays:
            np.testing.assert_array_equal(arrays["arr_0"], pixels[first::2])


def test_what_is_refused_leaves_nothing(folder, tmp_path):
    images_dir, _ = folder
    out = tmp_path / "out"
    for indices in ([], [6], [-1]):
        with pytest.raises(UserError, match="of 6 images"):
            write_reference(images_dir, out / "r.npz", indices)
    with pytest.raises(UserError, match="expected at least 2"):
        write_reference(images_dir, out / "r.npz", [0], Projection())
    Image.new("RGB", (5, 5)).save(images_dir / "c" / "9.png")
    with pytest.raises(UserError, match=r"9\.png is 5 x 5.*4 x 5"):
        write_reference(images_dir, out / "r.npz")
    assert list(out.iterdir()) == []
    with pytest.raises(UserError, match="cannot"):
        write_reference(images_dir, images_dir / "a" / "0.png" / "r.npz", [0])
    (out / "folder.npz").mkdir()
    with pytest.raises(UserError, match=r"folder\.npz cannot be written"):
        write_reference(images_dir, out / "folder.npz", [0])
    assert list(out.iterdir()) == [out / "folder.npz"]


def test_command_refuses_bad_input_with_one_line(folder, tmp_path, monkeypatch, capsys):
    for source, flags, message in (
        (tmp_path / "no", [], "no folder"),
        (folder[0], ["--every", 0], "--every 0"),
        (folder[0], ["--first", -1], "--first -1"),
        (folder[0], ["--first", 6], "of 6 images"),
        (folder[0], ["--features", "demo"], "demo"),
        (folder[0], ["--feature-weights", tmp_path / "none.pth"], "no such file"),
    ):
        assert run_main(monkeypatch, "stats", "--source", source, "--dest", tmp_path / "r.npz", *flags) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and err.startswith("error: ") and message in err
    assert [file.name for file in tmp_path.iterdir()] == ["images"]
