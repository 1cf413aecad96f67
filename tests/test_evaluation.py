"""Statistics, metrics, the archive reader and the command: against closed forms and direct definitions."""

import argparse
import json
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from helpers.launching import launch
from PIL import Image
from safetensors.torch import load_file

import evaluate as command
from common.errors import UserError
from evaluation import ImageArchive, compare, evaluate, extract, extraction, frechet_distance, metrics, open_images
from evaluation.features import Features
from evaluation.statistics import FeatureStatistics
from generation.options import build_parser as generate_parser


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


@pytest.mark.parametrize("block", [10, 101, 1024])
def test_statistics_do_not_depend_on_the_batch_split(rng, block):
    rows = rng.normal(size=(101, 6)) @ rng.normal(size=(6, 6)) + 1e4  # a mean that costs naive sums many digits
    seen = set()
    for split in ([101], [1] * 101, [50, 0, 51], [7, 93, 1]):
        statistics = FeatureStatistics(6, block)
        for part in np.split(rows, np.cumsum(split)[:-1]):
            statistics.update(part)
        assert statistics.count == 101
        mean, covariance = statistics.gaussian()
        np.testing.assert_allclose(mean, rows.mean(axis=0), rtol=1e-14)
        np.testing.assert_allclose(covariance, np.cov(rows, rowvar=False), rtol=1e-9)
        seen.add((mean.tobytes(), covariance.tobytes()))
    assert len(seen) == 1  # to the last bit


def test_statistics_may_be_read_midway(rng):
    rows = rng.normal(size=(50, 3))
    statistics = FeatureStatistics(3, block=8)
    statistics.update(rows[:21])
    np.testing.assert_allclose(statistics.gaussian()[1], np.cov(rows[:21], rowvar=False), rtol=1e-12)
    statistics.update(rows[21:])
    np.testing.assert_allclose(statistics.gaussian()[1], np.cov(rows, rowvar=False), rtol=1e-12)


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


def test_frechet_distance_of_covariances_that_do_not_commute(rng):
    """Of two planes' covariances, tr (AB)^(1/2) = (tr AB + 2 (det AB)^(1/2))^(1/2); ten planes add up."""
    basis, _ = np.linalg.qr(rng.normal(size=(20, 20)))
    blocks = [[random_covariance(rng, 2) for _ in range(10)] for _ in range(2)]
    sigma1, sigma2 = (basis @ scipy.linalg.block_diag(*planes) @ basis.T for planes in blocks)
    assert np.linalg.norm(sigma1 @ sigma2 - sigma2 @ sigma1) > 0.1
    roots = [np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a @ b))) for a, b in zip(*blocks, strict=True)]
    expected = np.trace(sigma1) + np.trace(sigma2) - 2 * np.sum(roots)
    assert frechet_distance(np.zeros(20), sigma1, np.zeros(20), sigma2) == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_of_two_lines(rng):
    """Rank one each, not commuting: tr (aa'bb')^(1/2) = |a.b|."""
    a, b = rng.normal(size=(2, 30))
    expected = a @ a + b @ b - 2 * abs(a @ b)
    distance = frechet_distance(np.zeros(30), np.outer(a, a), np.zeros(30), np.outer(b, b))
    assert distance == pytest.approx(expected, rel=1e-6)


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


def test_inception_score_is_torch_fidelitys(rng):
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = rng.normal(size=(40, 6)).astype(np.float32) * 3
    theirs = isc_features_to_metric(torch.from_numpy(logits), splits=4, shuffle=False)["inception_score_mean"]
    assert metrics.inception_score(logits, split_size=10) == pytest.approx(theirs, rel=1e-12)


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


def test_precision_and_recall_are_torch_fidelitys(rng):
    from torch_fidelity.metric_prc import calculate_precision_recall_full

    reference, samples = rng.normal(size=(50, 6)), rng.normal(size=(70, 6)) * 1.2
    theirs = calculate_precision_recall_full(torch.from_numpy(samples), torch.from_numpy(reference), neighborhood=3)
    assert 0 < theirs[0] < 1 and 0 < theirs[1] < 1
    assert metrics.precision_recall(reference, samples, block=16) == pytest.approx(theirs, abs=1e-6)


def test_copies_have_radius_zero(rng):
    """Images that occur more than k times: their neighbourhood is a point, and holds its copies."""
    reference = np.repeat(rng.normal(size=(2, 5)), 4, axis=0).astype(np.float32)
    samples = np.concatenate([reference[:6], rng.normal(size=(2, 5)).astype(np.float32) + 9])
    assert metrics.precision_recall(reference, samples, block=3)[0] == 6 / 8


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


def test_unfit_images_are_refused_before_any_work(rng, tmp_path):
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
    for name, array in (("mu", np.zeros(4)), ("sigma", np.eye(4)), ("mu_s", np.zeros(4)), ("sigma_s", np.eye(4))):
        stored = {"mu": np.zeros(5), "sigma": np.eye(5), "mu_s": np.zeros(2023), "sigma_s": np.zeros((2023, 2023))}
        np.savez(tmp_path / "r.npz", **{**stored, name: array})
        with pytest.raises(UserError, match=rf"reference: {name} of shape \(4"):
            evaluate(ImageArchive(tmp_path / "r.npz"), images, extractor)


class EveryFeature(torch.nn.Module):
    """A stand-in with all that Inception has, of few numbers."""

    name, dimension, image_size, weights_sha256 = "inception", 5, None, "0" * 64

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(4 * 6 * 3, 15, generator=torch.Generator().manual_seed(0)) / 99)
        self.calls = 0

    @torch.no_grad()
    def forward(self, images):
        self.calls += 1
        features = images.flatten(1).float() @ self.weight
        return Features(features[:, :5], features[:, 5:8], features[:, 8:])


def test_adms_statistics_serve_as_they_are_in_both_distances(rng, tmp_path, monkeypatch):
    """A batch of ADM's: a few images for precision and recall, statistics of the whole training set."""
    monkeypatch.setattr(extraction, "SPATIAL_DIMENSION", 3)
    reference, samples, extractor = colour_images(rng, 20), colour_images(rng, 30), EveryFeature()
    stored = {"mu": rng.normal(size=5), "sigma": random_covariance(rng, 5)}
    stored |= {"mu_s": rng.normal(size=3), "sigma_s": random_covariance(rng, 3)}
    np.savez(tmp_path / "adm.npz", arr_0=reference, arr_1=np.arange(20), **stored)
    np.savez(tmp_path / "fid_only.npz", arr_0=reference, mu=stored["mu"], sigma=stored["sigma"])
    np.savez(tmp_path / "images.npz", arr_0=reference)
    drawn, spatial = (extract(samples, extractor).gaussian, extract(samples, extractor).spatial_gaussian)
    adm, fid_only, images = (
        evaluate(ImageArchive(tmp_path / name), samples, extractor, progress=False)
        for name in ("adm.npz", "fid_only.npz", "images.npz")
    )
    assert adm["fid"] == frechet_distance(stored["mu"], stored["sigma"], *drawn)
    assert adm["sfid"] == frechet_distance(stored["mu_s"], stored["sigma_s"], *spatial)
    assert fid_only == {**adm, "sfid": images["sfid"]}  # what is not stored is of the images
    for name in ("precision", "recall", "kid", "inception_score"):  # statistics serve the distances alone
        assert adm[name] == images[name]
    assert adm["fid"] != images["fid"] and adm["sfid"] != images["sfid"]


# ---------------------------------------------------------------- features kept


def test_kept_features_give_the_same_numbers_and_no_work(rng, tmp_path, monkeypatch):
    monkeypatch.setattr(extraction, "SPATIAL_DIMENSION", 3)
    np.savez(tmp_path / "r.npz", arr_0=colour_images(rng, 40), mu=rng.normal(size=5), sigma=random_covariance(rng, 5))
    np.savez(tmp_path / "s.npz", arr_0=colour_images(rng, 33, 0.8))
    extractor, cache = EveryFeature(), tmp_path / "new" / "cache"

    def values():
        extractor.calls = 0
        archives = ImageArchive(tmp_path / "r.npz"), ImageArchive(tmp_path / "s.npz")
        features = [extract(archive, extractor, 8, cache=cache) for archive in archives]
        return compare(*features, "inception"), extractor.calls

    plain = evaluate(*(ImageArchive(tmp_path / f"{name}.npz") for name in "rs"), extractor, 8, progress=False)
    assert set(plain) == {"fid", "sfid", "inception_score", "precision", "recall", "kid"}
    assert values() == (plain, 5 + 5)
    assert values() == (plain, 0)
    kept = sorted(cache.iterdir())
    assert len(kept) == 2

    for damage in (b"", kept[0].read_bytes()[:900], kept[0].read_bytes()[:400] + b"?" + kept[0].read_bytes()[401:]):
        kept[0].write_bytes(damage)
        assert values() == (plain, 5)
    assert values() == (plain, 0)
    extractor.weights_sha256 = "1" * 64
    assert values() == (plain, 10)
    assert len(list(cache.iterdir())) == 4

    np.savez(tmp_path / "s.npz", arr_0=colour_images(rng, 33))  # other images under the old name
    assert values()[0] != plain


# ---------------------------------------------------------------- many processes


def test_three_processes_extract_what_one_does(rng, tmp_path, monkeypatch):
    """Bit for bit, in image order: 29 images in eight batches of at most four, so that the last round is not full."""
    monkeypatch.setattr(extraction, "SPATIAL_DIMENSION", 3)
    np.savez(tmp_path / "s.npz", arr_0=colour_images(rng, 29))
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\n"
        "import numpy as np\n"
        "import torch\n"
        "from evaluation import ImageArchive, extract, extraction\n"
        "from common.processes import join_processes\n"
        f"sys.path.append({str(Path(__file__).parent)!r})\n"
        "from test_evaluation import EveryFeature\n"
        "folder = sys.argv[1]\n"
        "extraction.SPATIAL_DIMENSION = 3\n"
        "process = join_processes()\n"
        "archive, extractor = ImageArchive(f'{folder}/s.npz'), EveryFeature()\n"
        "found = extract(archive, extractor, 4, process=process, cache=f'{folder}/cache')\n"
        "assert 2 <= extractor.calls <= 3\n"
        "again = extract(archive, extractor, 4, process=process, cache=f'{folder}/cache')\n"
        "assert 2 <= extractor.calls <= 3\n"
        "assert (found is None) == (again is None) == (process.process_index > 0)\n"
        "if found:\n"
        "    for name, each in {'found': found, 'again': again}.items():\n"
        "        arrays = [*each.gaussian, *each.spatial_gaussian, each.pool, each.logits]\n"
        "        np.savez(f'{folder}/{name}.npz', *arrays)\n"
        "process.wait_for_everyone()\n"
        "torch.distributed.destroy_process_group()\n"
    )
    launch(3, program, tmp_path)
    one = extract(ImageArchive(tmp_path / "s.npz"), EveryFeature(), 4)
    expected = [*one.gaussian, *one.spatial_gaussian, one.pool, one.logits]
    for name in ("found", "again"):
        with np.load(tmp_path / f"{name}.npz") as arrays:
            for index, array in enumerate(expected):
                np.testing.assert_array_equal(arrays[f"arr_{index}"], array)


def test_damage_that_one_process_meets_is_told_by_all(rng, tmp_path):
    """The checksum is at the end of the file, which whoever takes the last batch meets first."""
    np.savez(tmp_path / "s.npz", arr_0=rng.integers(0, 256, size=(12, 16, 16, 3), dtype=np.uint8))
    content = bytearray((tmp_path / "s.npz").read_bytes())
    content[4000] ^= 255
    (tmp_path / "s.npz").write_bytes(content)
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\n"
        "from common.errors import UserError\n"
        "from evaluation import ImageArchive, extract\n"
        "from common.processes import join_processes\n"
        f"sys.path.append({str(Path(__file__).parent)!r})\n"
        "from test_evaluation import ColourFeatures\n"
        "process = join_processes()\n"
        "for batch_size in (4, 6):  # the first, or the second, of two processes takes the last batch\n"
        "    try:\n"
        "        extract(ImageArchive(sys.argv[1]), ColourFeatures(), batch_size, process=process)\n"
        "    except UserError as error:\n"
        "        print(f'{batch_size} {process.process_index} {error}\\n', end='')\n"
        "process.wait_for_everyone()\n"
    )
    told = launch(2, program, tmp_path / "s.npz").splitlines()
    assert sorted(line[:3] for line in told) == ["4 0", "4 1", "6 0", "6 1"]
    assert all("s.npz: not a complete .npz" in line for line in told)


# ---------------------------------------------------------------- archives


def test_archive_streams_the_images_in_order(rng, tmp_path):
    images = rng.integers(0, 256, size=(10, 3, 5, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", arr_0=images)
    archive = ImageArchive(tmp_path / "a.npz")
    assert (len(archive), archive.size) == (10, (3, 5))
    parts = list(archive.batches(4))
    assert [len(part) for part in parts] == [4, 4, 2]
    np.testing.assert_array_equal(np.concatenate(parts), images)


def test_archive_yields_every_nth_batch(rng, tmp_path):
    images = rng.integers(0, 256, size=(10, 3, 5, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", arr_0=images)
    archive = ImageArchive(tmp_path / "a.npz")
    for step in (2, 3, 7):
        for first in range(step):
            parts = list(archive.batches(4, first, step))
            expected = [images[start : start + 4] for start in range(0, 10, 4)][first::step]
            assert len(parts) == len(expected)
            assert all((a == b).all() for a, b in zip(parts, expected, strict=True))


def test_damage_inside_the_images_is_noticed_while_streaming(rng, tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, arr_0=rng.integers(0, 256, size=(10, 16, 16, 3), dtype=np.uint8))
    content = bytearray(path.read_bytes())
    content[4000] ^= 255
    path.write_bytes(content)
    for first in range(3):  # each of three processes would notice
        with pytest.raises(UserError, match="not a complete"):
            list(ImageArchive(path).batches(4, first, 3))


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
    assert result["recipe"] is None and "/s.npz --json" in result["command"]
    assert result["samples"]["file"] == f"{tmp_path.name}/s.npz"
    assert str(tmp_path) not in (tmp_path / "out.json").read_text()  # it is shared with the numbers
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "r.npz", "s.npz"]  # nothing left aside


def test_what_spoils_a_comparison_is_noted(rng, tmp_path, monkeypatch, capsys):
    np.savez(tmp_path / "s.npz", arr_0=colour_images(rng, 20))
    np.savez(tmp_path / "r.npz", mu=np.zeros(5), sigma=np.eye(5))
    code, out, _ = run(monkeypatch, capsys, tmp_path / "r.npz", tmp_path / "s.npz", "--json", tmp_path / "m.json")
    assert code == 0
    result = json.loads((tmp_path / "m.json").read_text())
    assert set(result["metrics"]) == {"fid"} and len(result["notes"]) == 2
    assert "note: the reference holds statistics alone" in out and "not the published Inception weights" in out
    extractor = ColourFeatures()
    extractor.name = "dinov2"
    (note,) = command.notes_on(ImageArchive(tmp_path / "s.npz"), extractor)
    assert "50000 training images, this reference holds 20" in note


def test_no_flag_is_both_evaluates_and_generates():
    flags = [{f for action in parser._actions for f in action.option_strings} - {"-h", "--help"}
             for parser in (command.build_parser(), generate_parser())]  # fmt: skip
    assert flags[0] and flags[1] and not flags[0] & flags[1]


def test_recipe_travels_with_the_number(rng, tmp_path, monkeypatch, capsys):
    np.savez(tmp_path / "r.npz", arr_0=colour_images(rng, 20))
    recipe = {"settings": {"method": "sde", "num_steps": 250}, "classes": "balanced"}
    (tmp_path / "r.json").write_text(json.dumps(recipe))
    pair = [tmp_path / "r.npz", tmp_path / "r.npz"]
    assert run(monkeypatch, capsys, *pair, "--json", tmp_path / "m.json")[0] == 0
    assert json.loads((tmp_path / "m.json").read_text())["recipe"] == recipe
    code, _, err = run(monkeypatch, capsys, *pair, "--json", tmp_path / "r.json")
    assert code == 2 and "r.json: generate.py's record of the samples is there" in err
    assert json.loads((tmp_path / "r.json").read_text()) == recipe


# ---------------------------------------------------------------- a checkpoint in place of samples


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """A checkpoint as the official release writes it, of a network that fits the demo VAE; and a reference."""
    folder = tmp_path_factory.mktemp("official")
    golden = Path(__file__).parent / "golden"
    weights = load_file(golden / "deepflow_tiny_2T.safetensors")
    flags = json.loads((golden / "deepflow_tiny_2T.json").read_text())
    args = argparse.Namespace(
        model="x", num_heads=flags["num_heads"], df_idxs=str(flags["df_idxs"]), legacy_scaling=False
    )
    torch.save({"model": weights, "ema": weights, "opt": {}, "args": args, "steps": 7}, folder / "tiny.pt")
    images = np.random.default_rng(0).integers(0, 256, size=(80, 64, 64, 3), dtype=np.uint8)
    np.savez(folder / "r.npz", arr_0=images)
    return folder


SAMPLING = ["--features", "demo", "--num-fid-samples", 70, "--num-steps", 2, "--vae", "assets/demo_vae"]


def test_official_checkpoint_to_numbers_on_one_and_two_processes(official, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(Path(__file__).parent.parent)
    command_line = ["evaluate.py", official / "r.npz", official / "tiny.pt", "--batch-size", 16, *SAMPLING]
    command_line += ["--cfg-scale", 1.5, "--sample-dir", tmp_path / "samples", "--name", "tiny", "--json"]
    monkeypatch.setattr(sys, "argv", [*map(str, command_line), str(tmp_path / "one.json")])
    command.main()
    one_printed = capsys.readouterr().out
    two_printed = launch(2, *command_line, tmp_path / "two.json")
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    for result, printed in ((one, one_printed), (two, two_printed)):
        assert f"{result['metrics']['frechet_distance']:.4f}" in printed
    assert one["metrics"] == two["metrics"]  # the samples were there already, and are scored alike
    assert one["samples"]["images"] == 70 and one["samples"]["sha256"] == two["samples"]["sha256"]
    assert one["recipe"]["checkpoint"].endswith("tiny.pt") and one["recipe"]["settings"]["cfg_scale"] == 1.5
    assert one["features"]["weights_sha256"] == command.load_extractor("demo").weights_sha256


def test_what_does_not_fit_the_samples_to_be_is_told_before_sampling(official, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(Path(__file__).parent.parent)
    (tmp_path / "out").mkdir()
    np.savez(tmp_path / "small.npz", arr_0=np.zeros((80, 32, 32, 3), np.uint8))
    for reference, flags, words in (
        (tmp_path / "small.npz", [], "image sizes differ: reference 32x32, samples 64x64"),
        (
            official / "r.npz",
            ["--json", tmp_path / "out/x.json"],
            "x.json: generate.py's record of the samples is there",
        ),
    ):
        sampling = [*SAMPLING[2:], "--sample-dir", tmp_path / "out", "--name", "x"]
        code, _, err = run(monkeypatch, capsys, reference, official / "tiny.pt", *sampling, *flags)
        assert (code, err.count("\n")) == (2, 1) and words in err, err
        assert list((tmp_path / "out").iterdir()) == []


def test_mistakes_with_a_checkpoint_are_told_before_sampling(official, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(Path(__file__).parent.parent)
    for reference, checkpoint, flags, words in (
        ("r.npz", "tiny.pt", ["--num-fid-samples", 60], "--num-fid-samples: 60 images"),
        ("none.npz", "tiny.pt", [], "none.npz: no such file"),
        ("r.npz", "tiny.pt", ["--steps", 3], "--steps 3"),
        ("r.npz", "none.safetensors", [], "no checkpoint at"),
        ("r.npz", "r.npz", ["--num-steps", 3], "unrecognized arguments: --num-steps 3"),
    ):
        given = [official / reference, official / checkpoint, *SAMPLING[: 2 if checkpoint == "r.npz" else None], *flags]
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, given), "--sample-dir", str(tmp_path / "out")])
        if checkpoint == "r.npz":
            sys.argv[-2:] = []
        with pytest.raises(SystemExit, match="2"):
            command.main()
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and words in err, err
    assert not (tmp_path / "out").exists()


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
    np.savez(folder / "half.npz", arr_0=images, mu=np.zeros(5))
    (folder / "truncated.npz").write_bytes((folder / "good.npz").read_bytes()[:700])
    (folder / "text.npz").write_text("no archive")
    np.save(folder / "array.npy", images / 255)
    return [
        ("missing.npz", "no such file"),
        ("unnamed.npz", "arr_0"),
        ("float.npz", "float64"),
        ("channels_first.npz", "(20, 3, 4, 6)"),
        ("object.npz", "object"),
        ("few.npz", "5 images"),
        ("small.npz", "3x6"),
        ("half.npz", "only one of mu and sigma"),
        ("truncated.npz", "not a complete"),
        ("text.npz", "not a complete"),
        ("array.npy", "float64 of shape (20, 4, 6, 3)"),
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
        ["--cache", str(tmp_path / "r.npz")],
    ):
        code, _, err = run(monkeypatch, capsys, tmp_path / "r.npz", tmp_path / "r.npz", *flags)
        assert (code, err.count("\n")) == (2, 1), (flags, err)
        assert flags[0] in err and flags[1] in err


# ---------------------------------------------------------------- folders and arrays


def write_folder(folder, images, suffixes=("png", "bmp", "webp", "tif")):
    """Images in files of several lossless kinds, and in class folders, numbered so that names sort as they do."""
    for index, image in enumerate(images):
        path = folder / f"class{index * 2 // len(images)}" / f"{index:04d}.{suffixes[index % len(suffixes)]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path, lossless=True)
    return folder


def test_a_folder_and_an_array_score_as_their_archive(rng, tmp_path, monkeypatch, capsys):
    reference, samples = colour_images(rng, 40), colour_images(rng, 33, 0.8)
    np.savez(tmp_path / "r.npz", arr_0=reference)
    np.savez(tmp_path / "s.npz", arr_0=samples)
    np.save(tmp_path / "s.npy", samples)
    folders = [write_folder(tmp_path / name, images) for name, images in (("r", reference), ("s", samples))]
    for other in (".hidden.png", "class0/.DS_Store", "class0/notes.txt", "@eaDir/0.png", "class1/__MACOSX/0.png"):
        path = folders[1] / other
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"no image")
    found, cache = [], tmp_path / "cache"
    for pair in (("r.npz", "s.npz"), ("r", "s"), ("r", "s.npy"), ("r.npz", "s")):
        code, _, err = run(monkeypatch, capsys, *(tmp_path / name for name in pair), "--json", tmp_path / "m.json",
                           "--cache", cache)  # fmt: skip
        assert code == 0, err
        result = json.loads((tmp_path / "m.json").read_text())
        found.append(result["metrics"])
        assert (result["samples"]["images"], result["samples"]["size"]) == (33, [4, 6])
    assert found[0] == found[1] == found[2] == found[3]
    assert len(list(cache.iterdir())) == 5
    before = open_images(folders[1]).sha256
    (folders[1] / "class0" / "0000.png").write_bytes((folders[1] / "class0" / "0004.png").read_bytes())
    assert open_images(folders[1]).sha256 != before


def test_a_folder_gives_every_nth_batch_upright_in_rgb(rng, tmp_path):
    images = colour_images(rng, 10)
    folder = open_images(write_folder(tmp_path / "f", images))
    for first in range(3):
        expected = [images[start : start + 4] for start in range(0, 10, 4)][first::3]
        assert all((a == b).all() for a, b in zip(folder.batches(4, first, 3), expected, strict=True))
    grey, turned = tmp_path / "g", Image.Exif()
    grey.mkdir()
    turned[0x0112] = 6
    Image.fromarray(images[0, :, :, 0]).save(grey / "a.png")
    Image.fromarray(np.rot90(images[0])).save(grey / "b.png", exif=turned)
    assert np.array_equal(next(open_images(grey).batches(2)), [images[0, :, :, :1].repeat(3, axis=2), images[0]])


def test_folders_and_arrays_that_cannot_be_scored_are_one_line(rng, tmp_path, monkeypatch, capsys):
    images = colour_images(rng, 20)
    np.savez(tmp_path / "good.npz", arr_0=images)
    write_folder(tmp_path / "mixed", images)
    Image.fromarray(images[0, :3]).save(tmp_path / "mixed" / "class0" / "0003.png")
    write_folder(tmp_path / "broken", images)
    (tmp_path / "broken" / "class1" / "0012.png").write_bytes(b"no image")
    write_folder(tmp_path / "cut", colour_images(rng, 20))
    big = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for index in range(20):
        (tmp_path / "cut" / "x").mkdir(exist_ok=True)
        Image.fromarray(big).save(tmp_path / "cut" / "x" / f"{index}.png")
    for folder in ("class0", "class1"):
        for file in (tmp_path / "cut" / folder).iterdir():
            file.unlink()
    content = (tmp_path / "cut" / "x" / "7.png").read_bytes()
    (tmp_path / "cut" / "x" / "7.png").write_bytes(content[: len(content) // 2])
    (tmp_path / "empty").mkdir()
    (tmp_path / "unfinished" / "checkpoints").mkdir(parents=True)
    np.save(tmp_path / "float.npy", images / 255)
    np.save(tmp_path / "first.npy", images.transpose(0, 3, 1, 2))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "first.npy").read_bytes()[:300])
    for name, words in (
        ("mixed", "images of different sizes"),
        ("broken", "0012.png: cannot be read as an image"),
        ("empty", "no images in this folder"),
        ("float.npy", "float64 of shape (20, 4, 6, 3)"),
        ("first.npy", "uint8 of shape (20, 3, 4, 6)"),
        ("cut.npy", "not a complete .npy"),
        ("none.npy", "no such file"),
        ("unfinished", "no checkpoint at"),
    ):
        for pair in ((name, "good.npz"), ("good.npz", name)):
            if name == "unfinished" and pair[0] == name:
                continue
            code, _, err = run(monkeypatch, capsys, *(tmp_path / each for each in pair))
            assert (code, err.count("\n")) == (2, 1) and words in err, (pair, err)
    code, _, err = run(monkeypatch, capsys, tmp_path / "cut", tmp_path / "cut")  # its header is whole
    assert code == 2 and "7.png: cannot be read as an image" in err.splitlines()[-1] and "Traceback" not in err


def test_the_recipe_of_a_folder_of_samples_travels_with_the_number(rng, tmp_path, monkeypatch, capsys):
    """generate.py --png writes NAME/ beside NAME.json, whatever dots are in the name."""
    write_folder(tmp_path / "run-cfg1.5", colour_images(rng, 20))
    (tmp_path / "run-cfg1.5.json").write_text(json.dumps({"classes": "balanced"}))
    pair = [tmp_path / "run-cfg1.5"] * 2
    assert run(monkeypatch, capsys, *pair, "--json", tmp_path / "m.json")[0] == 0
    assert json.loads((tmp_path / "m.json").read_text())["recipe"] == {"classes": "balanced"}
    code, _, err = run(monkeypatch, capsys, *pair, "--json", tmp_path / "run-cfg1.5.json")
    assert code == 2 and "generate.py's record of the samples is there" in err


def test_files_of_images_that_are_no_folder_say_what_to_give(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(tmp_path / "a.png", "cat/a.png")
    with pytest.raises(UserError, match="holds no images: .* unpack it and give the folder"):
        open_images(tmp_path / "a.zip")
    with pytest.raises(UserError, match=r"a\.png: no \.npz; expected an \.npz or \.npy of images, or a folder"):
        open_images(tmp_path / "a.png")
