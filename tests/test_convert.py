"""`convert`: every file is accounted for, kills change nothing, and mistakes end in one line."""

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from helpers.sample_data import contents, kill_ten_times, run_main
from PIL import Image

from common.errors import UserError
from common.files import only_writer
from preprocessing import convert as convert_module
from preprocessing.convert import CHUNK, convert, describe
from preprocessing.growing_zip import GrowingZip
from preprocessing.images import list_images
from preprocessing.picture_source import list_pictures
from preprocessing.pixels import center_crop_dhariwal
from storage.file_store import FileStore
from storage.image_files import IMAGE_SUFFIXES

CLASSES = ["ant", "bee", "cat"]
GOOD = 1000
MODES = ["RGB"] * 6 + ["L", "CMYK", "RGB rotated"]  # of JPEGs; others are in test_pixels.py


def jpeg(rng, index):
    """One of 1,000 JPEGs: odd size, one of the modes a JPEG has, plain or progressive."""
    mode = MODES[index % len(MODES)]
    width, height = (int(side) for side in rng.integers(5, 70, 2))
    picture = Image.effect_noise((width, height), 60).convert(mode.split()[0])
    exif = Image.Exif()
    if "rotated" in mode:
        exif[0x0112] = 6
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90, progressive=index % 2 == 0, exif=exif)
    return buffer.getvalue()


def broken(rng):
    """File name -> content of what cannot be converted."""
    whole = jpeg(rng, 0)
    png = io.BytesIO()
    Image.effect_noise((40, 40), 60).save(png, "PNG")
    return {
        "ant/empty.jpg": b"",
        "ant/0500-half.JPEG": whole[: len(whole) // 2],
        "bee/text.jpeg": b"<html>404 not found</html>",
        "bee/bits.png": png.getvalue()[:100] + b"\0" * 50 + png.getvalue()[150:],
        "cat/page.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n",
    }


OTHERS = {"README.txt": b"notes", "cat/._0001.jpg": b"of macOS", "synsets": b"list"}


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """1,000 JPEGs in three class folders, five broken files, three that are no images; the folder is only read."""
    folder, rng = tmp_path_factory.mktemp("raw") / "train", np.random.default_rng(0)
    files = {f"{CLASSES[i % 3]}/{i:04d}.{('JPEG', 'jpg')[i % 2]}": jpeg(rng, i) for i in range(GOOD)}
    for name, content in (files | broken(rng) | OTHERS).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="session")
def converted(pictures, tmp_path_factory):
    """The 1,000 converted without interruption, to a folder and to a zip."""
    dest = tmp_path_factory.mktemp("converted")
    for name in ("folder", "whole.zip"):
        convert(pictures, dest / name, 16, num_workers=1)
    return dest


def few(folder, count=3, size=(20, 24)):
    """A few images in two classes."""
    for index in range(count):
        place = folder / "ab"[index % 2] / f"{index}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise(size, 60).convert("RGB").save(place)
    return folder


# ---- what goes in comes out, or is reported


def test_every_file_is_converted_or_reported(pictures, converted):
    report = json.loads((converted / "folder" / "report.json").read_text())
    files = [str(file.relative_to(pictures)) for file in pictures.rglob("*") if file.is_file()]
    assert report["files"] == len(files) == GOOD + 5 + 3
    assert set(report["left_out"]) == broken(np.random.default_rng(0)).keys() | OTHERS.keys()
    assert report["converted"] + len(report["left_out"]) == report["files"]
    assert sum(report["kinds"].values()) == report["converted"] == GOOD
    assert report["kinds"] == {mode: sum(MODES[i % 9] == mode for i in range(GOOD)) for mode in sorted(set(MODES))}
    assert not any("0x" in reason for reason in report["left_out"].values())
    assert "cut" in report["left_out"]["ant/0500-half.JPEG"] or "truncated" in report["left_out"]["ant/0500-half.JPEG"]
    assert "5 of" not in describe(report, "x") and "8 of 1008 files left out" in describe(report, "x")


def test_pictures_are_those_of_the_originals(pictures, converted):
    """Names by position among the sorted images, classes and pixels of each; what is left out leaves a gap."""
    dataset = list_images(converted / "folder")
    assert dataset.class_names == CLASSES and len(dataset.names) == GOOD
    names = list_pictures(pictures).images
    assert names == sorted(names) and len(names) == GOOD + 5
    for index in range(0, GOOD, 7):
        name = dataset.names[index]
        position = int(name[len("00000/img") : -len(".png")])
        original = names[position]
        assert name == f"{position // 1000:05d}/img{position:08d}.png"
        assert CLASSES[dataset.labels[index]] == original.split("/")[0]
        with Image.open(pictures / original) as image:
            if "rotated" in MODES[int(Path(original).stem) % len(MODES)]:
                image = image.transpose(Image.Transpose.ROTATE_270)
            expected = np.array(center_crop_dhariwal(image.convert("RGB"), 16))
        np.testing.assert_array_equal(dataset.read(index), expected)


def test_a_zip_holds_what_a_folder_does(converted):
    folder = contents(converted / "folder")
    with zipfile.ZipFile(converted / "whole.zip") as archive:
        assert archive.testzip() is None
        assert {name: archive.read(name) for name in archive.namelist()} == folder
    assert list_images(converted / "whole.zip").names == list_images(converted / "folder").names
    assert sorted(file.name for file in converted.iterdir()) == ["folder", "whole.zip"]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_source_may_be_a_zip_or_tar_and_workers_any_number(pictures, converted, tmp_path, workers):
    command = ["tar", "-cf", tmp_path / "raw.tar", "-C", pictures.parent, "train"]
    subprocess.run(command, check=True)
    with zipfile.ZipFile(tmp_path / "raw.zip", "w") as archive:
        for file in pictures.rglob("*"):
            archive.write(file, file.relative_to(pictures))
    source = tmp_path / ("raw.tar" if workers else "raw.zip")
    convert(source, tmp_path / "out", 16, num_workers=workers)
    expected, found = contents(converted / "folder"), contents(tmp_path / "out")
    for files in (expected, found):  # the tar has its files below "train/"
        labels, report = json.loads(files.pop("dataset.json")), json.loads(files.pop("report.json"))
        files["labels"] = labels["labels"], labels["class_names"], report["converted"], report["kinds"]
    assert found == expected


# ---- kills


@pytest.mark.parametrize("name", ["folder", "whole.zip"])
def test_killed_at_ten_random_moments_the_same_command_completes(pictures, converted, tmp_path, name):
    def command():
        convert(pictures, tmp_path / "dest" / name, 16, num_workers=2)

    command()
    whole = contents(tmp_path / "dest")
    expected = {file: content for file, content in contents(converted).items() if file.split("/")[0] == name}
    assert whole == expected
    kill_ten_times(command, tmp_path / "dest", whole)


@pytest.mark.parametrize("name", ["out", "out.zip"])
def test_stopped_at_the_very_end(tmp_path, monkeypatch, name):
    """Before and after the finished dataset takes its name."""
    source, dest = few(tmp_path / "raw"), tmp_path / "dest" / name
    convert(source, tmp_path / "whole" / name, 16, num_workers=0)

    def stop(*_, **__):
        raise KeyboardInterrupt

    for owner, attribute in ((Path, "replace"), (convert_module.shutil, "rmtree")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, attribute, stop)
            with pytest.raises(KeyboardInterrupt):
                convert(source, dest, 16, num_workers=0)
    assert dest.exists() and (tmp_path / "dest" / f".{name}.partial").exists()
    assert convert(source, dest, 16, num_workers=0) is None
    assert contents(tmp_path / "dest") == contents(tmp_path / "whole")


@pytest.mark.parametrize("name", ["out", "out.zip"])
def test_a_full_disk_is_one_line_and_the_command_continues(tmp_path, monkeypatch, name):
    source, dest = few(tmp_path / "raw", CHUNK * 3), tmp_path / "dest" / name
    convert(source, tmp_path / "whole" / name, 16, num_workers=0)
    real, calls = json.dumps, iter(range(100))

    def torn(line, **options):
        """The disk is full within the progress line of the second chunk."""
        if isinstance(line, dict) and line.get("chunk") == 1 and next(calls) == 0:
            progress = tmp_path / "dest" / f".{name}.partial" / "progress.jsonl"
            with progress.open("a") as file:
                file.write(real(line)[:20])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(line, **options)

    monkeypatch.setattr(convert_module.json, "dumps", torn)
    with pytest.raises(UserError, match=rf"cannot write .*{name} \(No space left on device\)"):
        convert(source, dest, 16, num_workers=0)
    assert not dest.exists()
    convert(source, dest, 16, num_workers=0)
    assert contents(tmp_path / "dest") == contents(tmp_path / "whole")


def test_a_worker_out_of_disk_or_killed_is_one_line(tmp_path, monkeypatch):
    source = few(tmp_path / "raw", 5)

    def full(self, results):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def killed(self, results):
        os.kill(os.getpid(), signal.SIGKILL)

    for action, message in ((full, "No space left"), (killed, "a worker stopped .* fewer --num-workers")):
        monkeypatch.setattr(convert_module._Chunks, "_write", action)
        with pytest.raises(UserError, match=message):
            convert(source, tmp_path / "out", 16, num_workers=1)
    monkeypatch.undo()
    assert convert(source, tmp_path / "out", 16, num_workers=1)["converted"] == 5


def test_entries_beyond_4_gib(tmp_path):
    """A zip of ImageNet is larger than the plain format allows; here most of it is a hole in the file."""
    place = tmp_path / "big.zip"
    growing = GrowingZip(place, [])
    first = growing.add("0.png", b"first")
    growing.flush()
    os.truncate(place, 2**32 + 5)
    growing._file.seek(2**32 + 5)
    entries = [first, growing.add("1.png", b"second")]
    growing.finish(entries, {"dataset.json": "{}"})
    store = FileStore(place)
    assert sorted(store.names()) == ["0.png", "1.png", "dataset.json"]
    assert (store.read("0.png"), store.read("1.png"), store.read("dataset.json")) == (b"first", b"second", b"{}")


# ---- classes


def test_labels_of_dataset_json_are_kept(tmp_path):
    source = few(tmp_path / "raw")
    labels = {"labels": [["b/1.png", 4], ["a/0.png", 0], ["a/2.png", 2]]}
    (source / "dataset.json").write_text(json.dumps(labels))
    report = convert(source, tmp_path / "out", 16, num_workers=0)
    assert report["files"] == report["converted"] == 3
    assert json.loads((tmp_path / "out" / "dataset.json").read_text())["labels"] == [
        ["00000/img00000000.png", 0],
        ["00000/img00000001.png", 2],
        ["00000/img00000002.png", 4],
    ]
    convert(tmp_path / "out", tmp_path / "again.zip", 8, num_workers=0)  # what was converted can be converted
    assert list_images(tmp_path / "again.zip").labels.tolist() == [0, 2, 4]


def test_shared_folders_are_no_classes(tmp_path):
    few(tmp_path / "raw" / "ILSVRC" / "train")
    assert list_pictures(tmp_path / "raw").class_names == ["a", "b"]
    assert list_pictures(tmp_path / "raw" / "ILSVRC" / "train" / "a").class_names == ["a"]
    few(tmp_path / "deep" / "c" / "more")
    few(tmp_path / "deep" / "d")
    source = list_pictures(tmp_path / "deep")
    assert source.class_names == ["c", "d"] and source.labels == [0, 0, 0, 1, 1, 1]


def test_what_convert_takes_for_images_and_classes_all_tools_do(tmp_path):
    """Of every format that is converted, in shared folders, with what macOS leaves beside them."""
    folder = tmp_path / "raw" / "train"
    for index, suffix in enumerate(sorted(IMAGE_SUFFIXES)):
        place = folder / "ab"[index % 2] / f"{index}{suffix}"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((16, 16), 60).convert("L" if suffix == ".pgm" else "RGB").save(place)
    (folder / "a" / "._0.bmp").write_bytes(b"of macOS")
    (folder / "b" / "notes.txt").write_bytes(b"notes")
    found, expected = list_images(tmp_path / "raw"), list_pictures(tmp_path / "raw")
    assert len(found.names) == len(IMAGE_SUFFIXES) == 10 and found.names == expected.images
    assert found.class_names == expected.class_names == ["a", "b"]
    assert found.labels.tolist() == expected.labels == [0, 0, 0, 0, 0, 1, 1, 1, 1, 1]


# ---- mistakes


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda raw: few(raw / "a" / "x") and (raw / "a" / "0.png").rename(raw / "0.png"), r"0\.png lies beside"),
        (lambda raw: (raw / "dataset.json").write_text('{"labels": [["a/0.png", 0]]}'), "lists no label for a/2.png"),
        (lambda raw: (raw / "dataset.json").write_text('{"labels": null}'), r"dataset\.json: expected"),
        (lambda raw: (raw / "a" / "dataset.json").write_text("{}"), "is below --source"),
        (lambda raw: [file.unlink() for file in raw.rglob("*.png")], "no images"),
        (lambda raw: [file.write_bytes(b"") for file in raw.rglob("*.png")], "none of 3 images can be converted"),
    ],
)
def test_sources_that_do_not_fit_are_named(tmp_path, spoil, message):
    source = few(tmp_path / "raw")
    spoil(source)
    with pytest.raises(UserError, match=message):
        convert(source, tmp_path / "out", 16, num_workers=0)
    assert not (tmp_path / "out").exists()


def test_only_the_same_conversion_continues_or_is_complete(tmp_path):
    source, dest = few(tmp_path / "raw"), tmp_path / "out"
    dest.mkdir()  # empty: as good as absent
    convert(source, dest, 16, num_workers=0)
    before = contents(dest)
    assert convert(source, dest, 16, num_workers=0) is None
    with pytest.raises(UserError, match="resolution 16, where this command has 8"):
        convert(source, dest, 8, num_workers=0)
    with pytest.raises(UserError, match="transform center-crop-dhariwal, where this command has center-crop:"):
        convert(source, dest, 16, "center-crop", num_workers=0)
    few(source, 4)
    with pytest.raises(UserError, match="files 3, where this command has 4"):
        convert(source, dest, 16, num_workers=0)
    assert contents(dest) == before
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("years of work")
    for other in (tmp_path / "thesis", tmp_path / "thesis" / "thesis.tex"):
        with pytest.raises(UserError, match="is no finished conversion"):
            convert(source, other, 16, num_workers=0)
    with pytest.raises(UserError, match="lies in --source"):
        convert(source, source / "out", 16, num_workers=0)
    with only_writer(dest), pytest.raises(UserError, match="written by another process"):
        convert(source, dest, 16, num_workers=0)


def test_an_unfinished_conversion_of_something_else_is_named(tmp_path, monkeypatch):
    source, dest = few(tmp_path / "raw"), tmp_path / "out.zip"
    monkeypatch.setattr(GrowingZip, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        convert(source, dest, 16, num_workers=0)
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"\.out\.zip\.partial was made with resolution 16"):
        convert(source, dest, 8, num_workers=0)
    aside = tmp_path / ".out.zip.partial"
    progress = (aside / "progress.jsonl").read_bytes()
    for damaged in (progress.replace(b'"chunk": 0', b'"chunk": 1'), progress + b"[]\n", progress + b"no\n"):
        (aside / "progress.jsonl").write_bytes(damaged)
        with pytest.raises(UserError, match=r"progress\.jsonl is damaged"):
            convert(source, dest, 16, num_workers=0)
    (aside / "progress.jsonl").write_bytes(progress)
    os.truncate(aside / "content", 10)
    with pytest.raises(UserError, match="content is damaged: remove"):
        convert(source, dest, 16, num_workers=0)


def test_a_source_that_goes_away_is_not_reported_image_by_image(tmp_path, monkeypatch):
    source = few(tmp_path / "raw")
    real = FileStore.read

    def unplugged(store, name):
        if store.path.exists() and store.path.name == "raw":
            store.path.rename(tmp_path / "elsewhere")
        return real(store, name)

    monkeypatch.setattr(FileStore, "read", unplugged)
    with pytest.raises(UserError, match=r"0\.png cannot be read any more .*give the same command again"):
        convert(source, tmp_path / "out", 16, num_workers=0)


@pytest.mark.parametrize("failure", [OSError(errno.EIO, os.strerror(errno.EIO)), MemoryError()])
def test_a_failing_disk_or_memory_is_no_bad_image(tmp_path, monkeypatch, failure):
    """It stops, and goes on to the same result."""
    source = few(tmp_path / "raw", 2 * CHUNK)
    convert(source, tmp_path / "whole", 16, num_workers=0)
    real = Path.read_bytes

    def failing(place):
        if place.name == f"{2 * CHUNK - 1}.png":
            raise failure
        return real(place)

    monkeypatch.setattr(Path, "read_bytes", failing)
    with pytest.raises(UserError, match=r"63\.png.* give the same command again"):
        convert(source, tmp_path / "out", 16, num_workers=0)
    monkeypatch.undo()
    assert not (tmp_path / "out").exists() and (tmp_path / ".out.partial" / "content" / "00000").exists()
    convert(source, tmp_path / "out", 16, num_workers=0)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_out_of_memory_while_decoding_is_no_bad_image(tmp_path, monkeypatch):
    def short(_):
        raise MemoryError

    monkeypatch.setattr(convert_module, "read_rgb", short)
    with pytest.raises(UserError, match=r"no memory for a/0\.png: .* fewer --num-workers"):
        convert(few(tmp_path / "raw"), tmp_path / "out", 16, num_workers=0)


def test_a_damaged_member_of_a_zip_is_reported(tmp_path):
    shutil.make_archive(tmp_path / "raw", "zip", few(tmp_path / "raw"))
    with zipfile.ZipFile(tmp_path / "raw.zip") as archive:
        entry = archive.getinfo("a/0.png")
    content = bytearray((tmp_path / "raw.zip").read_bytes())
    content[entry.header_offset + 30 + len(entry.filename) + 100] ^= 1
    (tmp_path / "raw.zip").write_bytes(content)
    report = convert(tmp_path / "raw.zip", tmp_path / "out", 16, num_workers=0)
    assert report["converted"] == 2 and list(report["left_out"]) == ["a/0.png"]


# ---- the command line


def test_the_command_of_repas_readers(tmp_path, monkeypatch, capsys):
    """Flags as REPA's instructions have them, once through the script itself."""
    source = few(tmp_path / "raw", 12)
    for index in range(11):
        (source / "a" / f"bad{index:02d}.jpg").write_bytes(b"")
    flags = ["--resolution=24x24", "--transform=center-crop-dhariwal"]
    script = Path(convert_module.__file__).with_name("dataset_tools.py")
    command = [sys.executable, str(script), "convert", f"--source={source}", f"--dest={tmp_path / 'out'}", *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "12 images; 11 of 23 files left out" in done.stdout and "the rest in its report.json" in done.stdout
    assert list_images(tmp_path / "out").read(0).shape == (24, 24, 3)
    again = ["convert", "--source", source, "--dest", tmp_path / "out", *flags]
    assert run_main(monkeypatch, *again) == 0
    assert "is complete: nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--resolution", "16x8"], "16x8 given, expected a square such as 256x256"),
        (["--resolution", "16"], "expected a square"),
        (["--resolution", "0x0"], "expected a square"),
        (["--resolution", "16x16", "--transform", "squash"], "squash"),
        (["--resolution", "16x16", "--num-workers", "-1"], "--num-workers"),
        (["--resolution", "16x16", "--source", "absent"], "no folder or zip file absent"),
        ([], "--resolution"),
    ],
)
def test_mistakes_in_the_command_are_one_line(tmp_path, monkeypatch, capsys, flags, message):
    source = few(tmp_path / "raw")
    assert run_main(monkeypatch, "convert", "--source", source, "--dest", tmp_path / "out", *flags) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err
    assert [file.name for file in tmp_path.iterdir()] == ["raw"]
