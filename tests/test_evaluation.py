"""Statistics, metrics, the archive reader and the command: against closed forms and direct definitions."""

import json
import sys

import numpy as np
import pytest
import scipy.linalg
import torch

import evaluate as command
from errors import UserError
from evaluation import ImageArchive, compare, evaluate, extract, frechet_distance, metrics
from evaluation.features import Features
from evaluation.statistics import FeatureStatistics


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def random_covariance(rng, dimension, rank=None):
    factor = rng.normal(size=(dimension, rank or 2 * dimension))
    return factor @ factor.T / dimension


class ColourFeatures(torch.nn.Module):
    """A stand-in extractor: mean colour and two of its products."""

    name, dimension, image_size, weights_sha256 = "inception", 5, None, "none"

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(1 / 255), requires_grad=False)

    def forward(self, images):
        mean = images.float().mean(dim=(1, 2)) * self.scale
        return Features(torch.cat([mean, mean[:, :2] * mean[:, 1:]], dim=1), None, None)


# ---------------------------------------------------------------- statistics


def test_statistics_do_not_depend_on_the_batch_split(rng):
    rows = rng.normal(size=(101, 6)) @ rng.normal(size=(6, 6)) + 1e4  # a mean that costs naive sums many digits
    for split in ([101], [1] * 101, [50, 0, 51], [7, 93, 1]):
        statistics = FeatureStatistics(6)
        for part in np.split(rows, np.cumsum(split)[:-1]):
            statistics.update(part)
        assert statistics.count == 101
        np.testing.assert_allclose(statistics.mean, rows.mean(axis=0), rtol=1e-14)
        np.testing.assert_allclose(statistics.covariance, np.cov(rows, rowvar=False), rtol=1e-9)


def test_frechet_distance_of_diagonal_gaussians(rng):
    mu1, mu2 = rng.normal(size=(2, 9))
    std1, std2 = rng.uniform(0, 3, size=(2, 9))
    expected = np.sum((mu1 - mu2) ** 2) + np.sum((std1 - std2) ** 2)
    assert frechet_distance(mu1, np.diag(std1**2), mu2, np.diag(std2**2)) == pytest.approx(expected, rel=1e-12)


def test_frechet_distance_of_commuting_covariances(rng):
    basis, _ = np.linalg.qr(rng.normal(size=(20, 20)))
    std1, std2 = rng.uniform(0, 3, size=(2, 20))
    sigma1, sigma2 = ((basis * std**2) @ basis.T for std in (std1, std2))
    mu = rng.normal(size=20)
    assert frechet_distance(mu, sigma1, mu, sigma2) == pytest.approx(np.sum((std1 - std2) ** 2), rel=1e-9)


def test_frechet_distance_against_the_matrix_root(rng):
    sigma1, sigma2 = random_covariance(rng, 30), random_covariance(rng, 30)
    mu1, mu2 = rng.normal(size=(2, 30))
    root = scipy.linalg.sqrtm(sigma1 @ sigma2)
    np.testing.assert_allclose(root @ root, sigma1 @ sigma2, atol=1e-8)  # some SciPy versions return wrong roots
    expected = np.sum((mu1 - mu2) ** 2) + np.trace(sigma1 + sigma2 - 2 * root).real
    assert frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(mu2, sigma2, mu1, sigma1) == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_of_singular_covariances(rng):
    sigma = random_covariance(rng, 40, rank=5)
    assert frechet_distance(np.zeros(40), sigma, np.zeros(40), sigma) == pytest.approx(0, abs=1e-5)
    assert frechet_distance(np.zeros(40), sigma, np.zeros(40), 0 * sigma) == pytest.approx(np.trace(sigma))


def test_frechet_distance_refuses_what_does_not_fit():
    with pytest.raises(UserError, match=r"\(3,\).*\(4,\)"):
        frechet_distance(np.zeros(3), np.eye(3), np.zeros(4), np.eye(4))
    with pytest.raises(UserError, match="not finite"):
        frechet_distance(np.zeros(3), np.eye(3) * np.nan, np.zeros(3), np.eye(3))


# ---------------------------------------------------------------- metrics


def test_inception_score_of_known_distributions():
    certain = np.eye(8)[np.arange(80) % 8] * 200  # each image one class, all eight equally often
    assert metrics.inception_score(certain.astype(np.float32)) == pytest.approx(8, rel=1e-9)
    assert metrics.inception_score(np.ones((50, 8), np.float32)) == pytest.approx(1, rel=1e-9)


def test_inception_score_averages_consecutive_splits(rng):
    logits = rng.normal(size=(25, 6)).astype(np.float32) * 3
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(axis=1, keepdims=True)
    expected = []
    for part in (p[:10], p[10:20], p[20:]):
        divergences = [np.sum(row * np.log(row / part.mean(axis=0))) for row in part]
        expected.append(np.exp(np.mean(divergences)))
    assert metrics.inception_score(logits, split_size=10) == pytest.approx(np.mean(expected), rel=1e-12)


def direct_precision_recall(reference, samples, k):
    def radius(points, i):
        others = np.delete(points, i, axis=0)
        return np.sort(np.linalg.norm(others - points[i], axis=1))[k - 1]

    def covered(points, centres):
        radii = [radius(centres, i) for i in range(len(centres))]
        return np.mean([(np.linalg.norm(centres - point, axis=1) <= radii).any() for point in points])

    return covered(samples, reference), covered(reference, samples)


@pytest.mark.parametrize("block", [7, 16, 1000])
def test_precision_and_recall_against_their_definition(rng, block):
    reference = rng.normal(size=(61, 4)).astype(np.float32) + 30
    samples = (rng.normal(size=(83, 4)) * 0.8 + 31).astype(np.float32)
    expected = direct_precision_recall(reference.astype(float), samples.astype(float), k=3)
    assert 0 < expected[1] < expected[0] < 1
    assert metrics.precision_recall(reference, samples, k=3, block=block) == pytest.approx(expected, abs=1e-12)


def test_kernel_distance_against_its_definition_and_torch_fidelity(rng):
    from torch_fidelity.metric_kid import kid_features_to_metric

    reference, samples = rng.normal(size=(30, 5)), rng.normal(size=(20, 5)) + 0.5
    x, y = samples, reference[:20]
    kernel = lambda a, b: (a @ b / 5 + 1) ** 3  # noqa: E731
    pairs = [(i, j) for i in range(20) for j in range(20) if i != j]
    within = np.mean([kernel(x[i], x[j]) + kernel(y[i], y[j]) for i, j in pairs])
    between = np.mean([kernel(a, b) for a in x for b in y])
    value = metrics.kernel_distance(reference[:20], samples, subsets=1, subset_size=20)
    assert value == pytest.approx(within - 2 * between, rel=1e-10)

    theirs = kid_features_to_metric(
        torch.from_numpy(samples),
        torch.from_numpy(reference),
        kid_subsets=10,
        kid_subset_size=15,
        rng_seed=2020,
        verbose=False,
    )
    value = metrics.kernel_distance(reference, samples, subsets=10, subset_size=15)
    assert value == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-10)


# ---------------------------------------------------------------- from images to metrics


def colour_images(rng, count, brightness=1.0):
    colours = rng.uniform(0, 255 * brightness, size=(count, 1, 1, 3))
    return (colours * rng.uniform(0.5, 1, size=(count, 4, 6, 1))).astype(np.uint8)


def test_metrics_do_not_depend_on_batch_size_or_on_array_or_file(rng, tmp_path):
    reference, samples = colour_images(rng, 40), colour_images(rng, 33, 0.8)
    np.savez(tmp_path / "r.npz", arr_0=reference, arr_1=np.arange(40))
    np.savez_compressed(tmp_path / "s.npz", arr_0=samples)
    extractor = ColourFeatures()
    whole = evaluate(reference, samples, extractor, batch_size=64, progress=False)
    assert set(whole) == {"fid", "precision", "recall", "kid"}
    archives = ImageArchive(tmp_path / "r.npz"), ImageArchive(tmp_path / "s.npz")
    for batch_size in (1, 7):
        assert evaluate(*archives, extractor, batch_size, progress=False) == pytest.approx(whole, rel=1e-6)
    features = extract(reference, extractor)
    assert evaluate(features, samples, extractor, progress=False) == pytest.approx(whole, rel=1e-6)
    itself = compare(features, features, "inception")
    assert itself["fid"] == pytest.approx(0, abs=1e-6)
    assert itself["precision"] == itself["recall"] == 1


def test_stored_reference_statistics_are_used_as_they_are(rng, tmp_path):
    samples = colour_images(rng, 30)
    stored = {"mu": rng.normal(size=5), "sigma": random_covariance(rng, 5)}
    np.savez(tmp_path / "statistics.npz", **stored)
    np.savez(tmp_path / "both.npz", arr_0=colour_images(rng, 20), **stored)
    extractor = ColourFeatures()
    drawn = extract(samples, extractor)
    expected = frechet_distance(stored["mu"], stored["sigma"], *drawn.gaussian)

    alone = evaluate(ImageArchive(tmp_path / "statistics.npz"), samples, extractor, progress=False)
    assert alone == {"fid": pytest.approx(expected)}
    both = evaluate(ImageArchive(tmp_path / "both.npz"), samples, extractor, progress=False)
    assert both["fid"] == pytest.approx(expected)
    assert {"precision", "recall", "kid"} <= set(both)  # these need the images

    extractor.name = "demo"  # Inception's statistics mean nothing to another network
    drawn_reference = extract(ImageArchive(tmp_path / "both.npz"), extractor)
    images_only = evaluate(ImageArchive(tmp_path / "both.npz"), samples, extractor, progress=False)
    expected = frechet_distance(*drawn_reference.gaussian, *drawn.gaussian)
    assert images_only == {"frechet_distance": pytest.approx(expected)}
    with pytest.raises(UserError, match="reference: 0 images"):
        evaluate(ImageArchive(tmp_path / "statistics.npz"), samples, extractor, progress=False)


def test_unfit_images_are_refused_before_any_work(rng):
    extractor = ColourFeatures()
    images = colour_images(rng, 12)
    with pytest.raises(UserError, match=r"samples: 5 images.*at least 6"):
        evaluate(images, images[:5], extractor)
    with pytest.raises(UserError, match=r"reference: 5 images.*at least 6"):
        evaluate(images[:5], images, extractor)
    with pytest.raises(UserError, match=r"reference 4x6, samples 4x5"):
        evaluate(images, images[:, :, :5], extractor)
    with pytest.raises(UserError, match="float64"):
        evaluate(images, images / 255, extractor)


# ---------------------------------------------------------------- archives


def test_archive_streams_the_images_in_order(rng, tmp_path):
    images = rng.integers(0, 256, size=(10, 3, 5, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", arr_0=images)
    archive = ImageArchive(tmp_path / "a.npz")
    assert (len(archive), archive.size) == (10, (3, 5))
    parts = list(archive.batches(4))
    assert [len(part) for part in parts] == [4, 4, 2]
    np.testing.assert_array_equal(np.concatenate(parts), images)


def test_damage_inside_the_images_is_noticed_while_streaming(rng, tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, arr_0=rng.integers(0, 256, size=(10, 16, 16, 3), dtype=np.uint8))
    content = bytearray(path.read_bytes())
    content[4000] ^= 255
    path.write_bytes(content)
    with pytest.raises(UserError, match="not a complete"):
        list(ImageArchive(path).batches(4))


# ---------------------------------------------------------------- the command


def run(monkeypatch, capsys, *arguments):
    """Run the command with a stand-in extractor: (exit code, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
    monkeypatch.setattr(command, "load_extractor", lambda *_: ColourFeatures())
    code = 0
    try:
        command.main()
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


def test_command_writes_table_and_json(rng, tmp_path, monkeypatch, capsys):
    np.savez(tmp_path / "r.npz", arr_0=colour_images(rng, 20))
    np.savez(tmp_path / "s.npz", arr_0=colour_images(rng, 30))
    arguments = [tmp_path / "r.npz", tmp_path / "s.npz", "--json", tmp_path / "out.json", "--device", "cpu"]
    code, out, _ = run(monkeypatch, capsys, *arguments)
    assert code == 0
    result = json.loads((tmp_path / "out.json").read_text())
    assert f"{result['metrics']['fid']:.4f}" in out
    assert (result["reference"]["images"], result["samples"]["images"]) == (20, 30)
    assert len(result["samples"]["sha256"]) == 64
    assert result["features"] == {"name": "inception", "weights_sha256": "none"}
    assert result["versions"]["torch"]
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def bad_archives(folder, rng):
    """(file name, words of the message) of archives that must be refused."""
    images = colour_images(rng, 20)
    np.savez(folder / "good.npz", arr_0=images)
    np.savez(folder / "unnamed.npz", images=images)
    np.savez(folder / "float.npz", arr_0=images / 255)
    np.savez(folder / "channels_first.npz", arr_0=images.transpose(0, 3, 1, 2))
    np.savez(folder / "object.npz", arr_0=np.array([{}], dtype=object))
    np.savez(folder / "few.npz", arr_0=images[:5])
    np.savez(folder / "small.npz", arr_0=images[:, :3])
    (folder / "truncated.npz").write_bytes((folder / "good.npz").read_bytes()[:700])
    (folder / "text.npz").write_text("no archive")
    np.save(folder / "array.npy", images)
    return [
        ("missing.npz", "no such file"),
        ("unnamed.npz", "arr_0"),
        ("float.npz", "float64"),
        ("channels_first.npz", "(20, 3, 4, 6)"),
        ("object.npz", "object"),
        ("few.npz", "5 images"),
        ("small.npz", "3x6"),
        ("truncated.npz", "not a complete"),
        ("text.npz", "not a complete"),
        ("array.npy", "not a complete"),
    ]


@pytest.mark.parametrize("role", ["reference", "samples"])
def test_bad_archives_exit_2_with_one_line(rng, tmp_path, monkeypatch, capsys, role):
    for name, words in bad_archives(tmp_path, rng):
        pair = [tmp_path / name, tmp_path / "good.npz"]
        code, _, err = run(monkeypatch, capsys, *(pair if role == "reference" else reversed(pair)))
        assert (code, err.count("\n")) == (2, 1), (name, err)
        assert err.startswith("error: ") and words in err, (name, err)


def test_bad_flags_exit_2_with_one_line(rng, tmp_path, monkeypatch, capsys):
    np.savez(tmp_path / "r.npz", arr_0=colour_images(rng, 20))
    for flags in (
        ["--batch-size", "0"],
        ["--device", "nonsense"],
        ["--json", str(tmp_path)],
        ["--json", str(tmp_path / "no" / "out.json")],
    ):
        code, _, err = run(monkeypatch, capsys, tmp_path / "r.npz", tmp_path / "r.npz", *flags)
        assert (code, err.count("\n")) == (2, 1), (flags, err)
        assert flags[0] in err and flags[1] in err
