"""The reference batch written from an image folder."""

import sys

import numpy as np
import pytest
from PIL import Image

from errors import UserError
from evaluation import ImageArchive
from preprocessing import reference


@pytest.fixture
def folder(tmp_path):
    """Three classes of two images, 4 x 5 pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, size=(6, 4, 5, 3), dtype=np.uint8)
    for index, image in enumerate(pixels):
        place = tmp_path / "images" / "abc"[index // 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{index}.png")
    return tmp_path / "images", pixels


@pytest.mark.parametrize("indices", [None, [4, 0, 0], range(1, 6, 2)])
def test_reference_holds_the_chosen_images_and_labels(folder, tmp_path, indices):
    images_dir, pixels = folder
    path = reference.write_reference(images_dir, tmp_path / "new" / "r.npz", indices)
    chosen = list(range(6) if indices is None else indices)
    with np.load(path, allow_pickle=False) as arrays:
        np.testing.assert_array_equal(arrays["arr_0"], pixels[chosen])
        np.testing.assert_array_equal(arrays["arr_1"], np.array(chosen) // 2)
        assert (arrays["arr_0"].dtype, arrays["arr_1"].dtype) == (np.uint8, np.int64)
    np.testing.assert_array_equal(np.concatenate(list(ImageArchive(path).batches(2))), pixels[chosen])


def test_a_refused_folder_leaves_nothing(folder, tmp_path):
    images_dir, _ = folder
    out = tmp_path / "out"
    for indices in ([], [6], [-1]):
        with pytest.raises(UserError, match="of 6 images"):
            reference.write_reference(images_dir, out / "r.npz", indices)
    Image.new("RGB", (5, 5)).save(images_dir / "c" / "9.png")
    with pytest.raises(UserError, match=r"9\.png is 5 x 5.*4 x 5"):
        reference.write_reference(images_dir, out / "r.npz")
    assert list(out.iterdir()) == []
    with pytest.raises(UserError, match="cannot be written"):
        reference.write_reference(images_dir, images_dir / "a" / "0.png" / "r.npz", [0])


def test_command_writes_disjoint_halves(folder, tmp_path, monkeypatch):
    images_dir, pixels = folder
    for first in (0, 1):
        arguments = ["--source", images_dir, "--dest", tmp_path / f"{first}.npz", "--every", 2, "--first", first]
        monkeypatch.setattr(sys, "argv", ["reference", *map(str, arguments)])
        reference.main()
        with np.load(tmp_path / f"{first}.npz") as arrays:
            np.testing.assert_array_equal(arrays["arr_0"], pixels[first::2])


def test_command_refuses_bad_input_with_one_line(tmp_path, monkeypatch, capsys):
    for flags in (["--every", "0"], ["--first", "-1"], []):
        monkeypatch.setattr(
            sys, "argv", ["reference", "--source", str(tmp_path / "no"), "--dest", str(tmp_path / "r.npz"), *flags]
        )
        with pytest.raises(SystemExit) as stop:
            reference.main()
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.count("\n") == 1 and err.startswith("error: ")
    assert list(tmp_path.iterdir()) == []
