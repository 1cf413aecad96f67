"""Sources as users have them: system folders, zips of Windows, unreadable folders, links, EXIF, names of any bytes."""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from helpers.sample_data import make_images, make_vae, ordinary_user, run_main, write_files
from PIL import Image

from common.errors import UserError
from dataset import open_latents
from preprocessing.convert import convert
from preprocessing.encode import encode
from preprocessing.encode_ssl import _inspect
from preprocessing.images import list_images
from preprocessing.pack import pack
from preprocessing.picture_source import list_pictures
from preprocessing.stats import write_reference
from preprocessing.verify import info, verify
from storage.file_store import FileStore
from storage.packed import PackedLatents

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    return make_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture
def public_path():
    """A folder that every user may read and write."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o777)
    yield path
    shutil.rmtree(path)


def png(size=(16, 16), colour=(1, 2, 3)):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def write(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def zipped(place, files):
    with zipfile.ZipFile(place, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return place


def tarred(place, files):
    with tarfile.open(place, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return place


IMAGES = {f"{name}/{index}.png": png() for name in ("cat", "dog") for index in range(2)}
HIDDEN = {
    name: png()
    for name in (
        "@eaDir/0.png", "@EADIR/1.png", "cat/@eaDir/0.png", "__MACOSX/cat/._0.png", "__MACOSX/ant/0.png",
        "cat/._0.png", ".0.png", ".ipynb_checkpoints/0.png", "dog/.ipynb_checkpoints/0-checkpoint.png",
        "lost+found/3.png", "#recycle/cat/0.png", "$RECYCLE.BIN/0.png", "$Recycle.Bin/S-1/0.png",
        "System Volume Information/0.png", "cat/.DS_Store", "dog/Thumbs.db", "dog/THUMBS.DB.png/Desktop.ini",
        ".Trash-1000/files/0.png",
    )
}  # fmt: skip


# ---- hidden and system folders are no classes and no images


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_hidden_and_system_files_are_no_images_and_are_counted(tmp_path, kind):
    make = {"folder": write, "zip": zipped, "tar": tarred}[kind]
    source = make(tmp_path / f"s.{kind}", IMAGES | HIDDEN)
    report = convert(source, tmp_path / "out", 16, num_workers=0)
    labels = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert labels["class_names"] == ["cat", "dog"] and [label for _, label in labels["labels"]] == [0, 0, 1, 1]
    assert report["left_out"].keys() == HIDDEN.keys() and report["files"] == len(IMAGES | HIDDEN)
    assert set(report["left_out"].values()) == {"a hidden or system file"}


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_encode_and_stats_pass_over_them_too_and_say_so(tmp_path, kind, vae_folder, monkeypatch, capsys):
    source = {"folder": write, "zip": zipped}[kind](tmp_path / f"s.{kind}", IMAGES | HIDDEN)
    flags = ["--source", source, "--dest", tmp_path / "packed", "--vae", vae_folder, "--device", "cpu"]
    assert run_main(monkeypatch, "encode", *flags, "--num-workers", 0) == 0
    assert f"note: passed over {len(HIDDEN)} files or folders, such as " in capsys.readouterr().err
    data = PackedLatents(tmp_path / "packed")
    assert data.class_names == ["cat", "dog"] and data.names == sorted(IMAGES)
    assert run_main(monkeypatch, "stats", "--source", source, "--dest", tmp_path / "r.npz") == 0
    assert "note: passed over" in capsys.readouterr().err
    with np.load(tmp_path / "r.npz") as arrays:
        assert arrays["arr_1"].tolist() == [0, 0, 1, 1]
    assert _inspect(source, None)[0] == sorted(IMAGES)


def test_hidden_images_that_dataset_json_lists_are_images(tmp_path):
    source = write(tmp_path, {".x/0.png": png(), ".x/1.png": png(), "a/0.png": png()})
    (source / "dataset.json").write_text(json.dumps({"labels": [[".x/0.png", 1], ["a/0.png", 0]]}))
    assert list_pictures(source).images == [".x/0.png", "a/0.png"] and list_pictures(source).others.keys() == {
        ".x/1.png"
    }


def test_a_source_of_hidden_images_only_says_so(tmp_path):
    with pytest.raises(UserError, match=r"no images .* but for hidden or system ones such as \.x/0\.png"):
        list_images(write(tmp_path, {".x/0.png": png()}))


def test_hidden_files_among_latents_and_tars_are_passed_over(tmp_path):
    source = tmp_path / "vae-sd"
    labels = write_files(source)
    write(source, {"00000/._img-mean-std-00000000.npy": b"of macOS", "@eaDir/x.npy": b""})
    verify(source)
    pack(source, tmp_path / "packed", num_workers=0)
    assert len(PackedLatents(tmp_path / "packed")) == len(labels)
    tars = tmp_path / "tars"
    tars.mkdir()
    tarred(tars / "cat.tar", {"0.png": png(), "._0.png": b"", "._x.tar": b"of macOS"})
    (tars / "._cat.tar").write_bytes(b"of macOS")
    found = list_pictures(tars)
    assert found.images == ["cat/0.png"] and found.others.keys() == {"._cat.tar", "cat/._0.png", "cat/._x.tar"}


# ---- zips written on Windows


@pytest.mark.parametrize("form", [r"data\{}\{}", r"data/{}\{}", r"data\{}/{}", r".\data\\{}\{}", r"\data\{}\{}"])
def test_backslashes_in_a_zip_are_slashes(tmp_path, form, vae_folder):
    files = {form.format(*name.split("/")): content for name, content in IMAGES.items()}
    source = zipped(tmp_path / "a.zip", files | {"data\\cat\\": b"", "__MACOSX\\cat\\._0.png": b""})
    found = list_images(source)
    assert found.class_names == ["cat", "dog"] and found.labels.tolist() == [0, 0, 1, 1]
    assert found.read(0).shape == (16, 16, 3)
    encode(source, tmp_path / "packed", vae_folder, num_workers=1)
    assert PackedLatents(tmp_path / "packed").labels.tolist() == [0, 0, 1, 1]
    assert convert(source, tmp_path / "out", 16, num_workers=0)["converted"] == 4


def test_labels_written_on_windows_are_of_the_files_with_slashes(tmp_path):
    labels = json.dumps({"labels": [[name.replace("/", "\\"), index] for index, name in enumerate(IMAGES)]}).encode()
    expected = list(range(4))
    assert list_images(write(tmp_path / "a", IMAGES | {"dataset.json": labels})).labels.tolist() == expected
    files = {name.replace("/", "\\"): content for name, content in IMAGES.items()} | {"dataset.json": labels}
    assert list_images(zipped(tmp_path / "a.zip", files)).labels.tolist() == expected
    source = zipped(tmp_path / "b.zip", {f"top\\{name}": content for name, content in files.items()})
    assert list_images(source).labels.tolist() == expected


def test_files_that_were_unpacked_with_backslashes_have_classes(tmp_path):
    write(tmp_path, {name.replace("/", "\\"): content for name, content in IMAGES.items()})
    found = list_images(tmp_path)
    assert found.class_names == ["cat", "dog"] and found.labels.tolist() == [0, 0, 1, 1]


def test_two_files_of_one_name_in_a_zip_are_named(tmp_path):
    with pytest.raises(UserError, match=r"two files go by the name a/0\.png"):
        FileStore(zipped(tmp_path / "a.zip", {"a/0.png": b"", "a\\0.png": b""}))


# ---- folders that cannot be read


COMMANDS = {
    "convert": lambda path: convert(path / "s", path / "out", 16, num_workers=0),
    "encode": lambda path: encode(path / "s", path / "out", str(path / "vae"), num_workers=0),
    "stats": lambda path: write_reference(path / "s", path / "out.npz"),
    "encode-ssl": lambda path: _inspect(path / "s", None),
    "info": lambda path: info(path / "s"),
    "pack": lambda path: pack(path / "v", path / "out", num_workers=0),
    "pack images": lambda path: pack(path / "ok", path / "out", images=path / "s", num_workers=0),
    "verify": lambda path: verify(path / "v"),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("depth", ["dog", "dog/deep/er"])
def test_an_unreadable_folder_is_named(public_path, vae_folder, command, depth):
    write(public_path / "s", IMAGES | {f"{depth}/5.png": png()})
    write_files(public_path / "v")
    write_files(public_path / "ok")
    shutil.copytree(vae_folder, public_path / "vae")
    locked = public_path / ("v" if command in ("pack", "verify") else "s") / depth
    locked.mkdir(parents=True, exist_ok=True)
    locked.chmod(0)
    message = ordinary_user(lambda: COMMANDS[command](public_path))
    assert message == f"{locked} cannot be read (Permission denied): make it readable, or take it away"
    assert not (public_path / "out").exists() and not (public_path / "out.npz").exists()


def test_an_unreadable_folder_is_one_line_also_for_root(tmp_path, monkeypatch, capsys):
    source, real = write(tmp_path / "s", IMAGES), os.scandir

    def scandir(place):
        if str(place).endswith("dog"):
            raise PermissionError(13, "Permission denied", str(place))
        return real(place)

    monkeypatch.setattr(os, "scandir", scandir)
    flags = ["--source", source, "--dest", tmp_path / "out", "--resolution", "16x16", "--num-workers", 0]
    assert run_main(monkeypatch, "convert", *flags) == 2
    err = capsys.readouterr().err
    assert err == f"error: {source}/dog cannot be read (Permission denied): make it readable, or take it away\n"


def test_what_the_system_keeps_to_itself_is_passed_over(public_path):
    """A disk's own folder is root's; so may be what a link leads to."""
    source = write(public_path / "s", IMAGES | {"lost+found/0.png": png(), ".Trash-0/0.png": png()})
    for name in ("lost+found", ".Trash-0"):
        (source / name).chmod(0)
    report = ordinary_user(lambda: convert(source, public_path / "out", 16, num_workers=0))
    assert report["converted"] == 4 and report["left_out"].keys() == {"lost+found", ".Trash-0"}
    write(public_path / "private", {"cat/0.png": png()}).chmod(0)
    (source / "eel").symlink_to(public_path / "private" / "cat")
    assert f"{source}/eel cannot be read" in ordinary_user(
        lambda: convert(source, public_path / "two", 16, num_workers=0)
    )


def test_a_file_that_cannot_be_read_is_named(public_path):
    source = write(public_path / "s", IMAGES)
    (source / "dog/1.png").chmod(0)
    message = ordinary_user(lambda: list_images(source).read(3))
    assert message == f"{source}/dog/1.png cannot be read (Permission denied): make it readable"


# ---- links


@pytest.mark.parametrize("target", ["..", "../..", ".", "/", "loop", "../dog/back"])
def test_links_that_lead_back_add_nothing(tmp_path, target):
    source = write(tmp_path / "s", IMAGES)
    write(tmp_path, {"beside/0.png": png()})
    (source / "dog" / "back").symlink_to("../cat")
    (source / "cat" / "loop").symlink_to(target)
    report = convert(source, tmp_path / "out", 16, num_workers=0)
    assert report["converted"] == 4 and report["left_out"].keys() == {"cat/loop", "dog/back"}
    assert list_images(source).class_names == ["cat", "dog"]


def test_each_folder_is_read_once_and_links_to_others_are_followed(tmp_path):
    """As real folders have it; of two links, by the first name. A tree of links is a usual ImageNet."""
    elsewhere = write(tmp_path / "elsewhere", {"eel/0.png": png(), "eel/1.png": png()})
    source = write(tmp_path / "s", {"dog/0.png": png(), "dog/sub/1.png": png()})
    (source / "a-link-to-dog").symlink_to(source / "dog")
    (source / "cat").symlink_to(elsewhere / "eel")
    (source / "fox").symlink_to(elsewhere / "eel")
    (elsewhere / "eel" / "home").symlink_to(source)
    (elsewhere / "eel" / "up").symlink_to(tmp_path)
    found = list_pictures(source)
    assert found.images == ["cat/0.png", "cat/1.png", "dog/0.png", "dog/sub/1.png"]
    assert found.others.keys() == {"a-link-to-dog", "fox", "cat/home", "cat/up"}
    assert found.class_names == ["cat", "dog"]
    (tmp_path / "linked").symlink_to(source)
    assert list_pictures(tmp_path / "linked").images == found.images


def test_a_class_that_is_a_link_to_nothing_is_named(tmp_path):
    source = write(tmp_path / "s", IMAGES)
    (source / ".#lock").symlink_to("user@host")
    (source / "notes.txt").symlink_to("gone.txt")
    assert list_pictures(source).others.keys() == {".#lock", "notes.txt"}
    (source / "eel").symlink_to(tmp_path / "unmounted" / "eel")
    with pytest.raises(UserError, match="s/eel is a link to nothing: mend it, or remove it"):
        list_pictures(source)


def test_images_that_are_links_to_nothing_are_named(tmp_path):
    source = write(tmp_path / "s", IMAGES)
    (source / "dog" / "7.png").symlink_to("gone.png")
    with pytest.raises(UserError, match=r"s/dog/7\.png is a link to nothing: mend it, or remove it"):
        list_images(source)


def test_pipes_and_devices_are_no_images_and_are_counted(tmp_path):
    """Reading them would wait for ever, also where `dataset.json` lists them."""
    source = write(tmp_path / "s", IMAGES)
    os.mkfifo(source / "cat" / "pipe.png")
    (source / "dog" / "link.png").symlink_to("../cat/pipe.png")
    (source / "dog" / "zero.png").symlink_to("/dev/zero")
    report = convert(source, tmp_path / "out", 16, num_workers=0)
    assert report["converted"] == 4 and set(report["left_out"].values()) == {"a pipe, socket or device"}
    assert report["left_out"].keys() == {"cat/pipe.png", "dog/link.png", "dog/zero.png"}
    (source / "dataset.json").write_text(json.dumps({"labels": [[name, 0] for name in (*IMAGES, "cat/pipe.png")]}))
    with pytest.raises(UserError, match=r"lists a missing image, cat/pipe\.png"):
        list_images(source)


def test_a_pipe_is_not_replaced_by_a_file(tmp_path, monkeypatch, capsys):
    source = write(tmp_path / "s", IMAGES)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link.npz").symlink_to("pipe")
    for dest in (tmp_path / "pipe", tmp_path / "link.npz"):
        assert run_main(monkeypatch, "stats", "--source", source, "--dest", dest) == 2
        assert f"{dest} is a pipe, socket or device, expected a file" in capsys.readouterr().err
    assert (tmp_path / "pipe").is_fifo()


# ---- one decoder


def turned(kind, orientation, stored):
    """An image file whose pixels are stored turned, and say so."""
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    options = {"JPEG": dict(quality=100, subsampling=0), "WEBP": dict(lossless=True)}.get(kind, {})
    Image.fromarray(stored).save(buffer, kind, exif=exif, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(("kind", "suffix"), [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"), ("TIFF", "tif")])
@pytest.mark.parametrize("orientation", [3, 6])
def test_every_reader_turns_images_upright(tmp_path, vae_folder, kind, suffix, orientation):
    upright = np.zeros((32, 32, 3), np.uint8)
    upright[:16, :16], upright[:16, 16:], upright[16:, :16] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    stored = upright[::-1, ::-1] if orientation == 3 else np.rot90(upright)
    name = f"00000/img00000000.{suffix}"
    source = write(tmp_path / "images", {name: turned(kind, orientation, np.ascontiguousarray(stored))})
    encode(source, tmp_path / "packed", vae_folder, num_workers=0, with_images=True)
    convert(source, tmp_path / "converted", 32, num_workers=0)
    write_reference(source, tmp_path / "r.npz")
    write_files(tmp_path / "vae-sd", count=1)
    (tmp_path / "vae-sd" / "dataset.json").write_text('{"labels": [["00000/img-mean-std-00000000.npy", 0]]}')
    pack(tmp_path / "vae-sd", tmp_path / "paired", images=source, num_workers=0)
    with np.load(tmp_path / "r.npz") as arrays:
        reference = arrays["arr_0"][0]
    for pixels in (
        list_images(tmp_path / "converted").read(0),
        list_images(source).read(0),
        PackedLatents(tmp_path / "packed").gather_images(np.arange(1))[0],
        PackedLatents(tmp_path / "paired").gather_images(np.arange(1))[0],
        open_latents(tmp_path).gather_images(np.arange(1))[0],
        reference,
    ):
        assert np.abs(pixels.astype(int) - upright).max() < 12


# ---- classes without images


def test_classes_without_images_are_told(tmp_path, vae_folder, monkeypatch, capsys):
    labels = {"labels": [[name, 1 + name.startswith("dog")] for name in IMAGES]}
    source = write(tmp_path / "s", IMAGES | {"dataset.json": json.dumps(labels).encode()})
    flags = ["--source", source, "--dest", tmp_path / "packed", "--vae", vae_folder, "--device", "cpu"]
    told = "warning: 1 of 3 classes have no images, 0 (0): labels count from 0, these seem to count from 1"
    assert run_main(monkeypatch, "encode", *flags, "--num-workers", 0) == 0
    assert told in capsys.readouterr().err
    flags = ["--source", source, "--dest", tmp_path / "out", "--resolution", "16x16", "--num-workers", 0]
    assert run_main(monkeypatch, "convert", *flags) == 0
    assert told in capsys.readouterr().err
    labels["class_names"] = ["ant", "bee", "cat", "dog", "eel"]
    (source / "dataset.json").write_text(json.dumps(labels))
    convert(source, tmp_path / "named", 16, num_workers=0)
    assert "warning: 3 of 5 classes have no images, 0 (ant), 3 (dog), 4 (eel)\n" in capsys.readouterr().err


def test_a_class_of_damaged_images_and_latents_without_a_class_are_told(tmp_path, capsys):
    source = write(tmp_path / "s", IMAGES | {"eel/0.png": b"damaged"})
    convert(source, tmp_path / "out", 16, num_workers=0)
    assert "1 of 3 classes have no images, 2 (eel)\n" in capsys.readouterr().err
    labels = dict.fromkeys(write_files(tmp_path / "vae-sd"), 1)
    (tmp_path / "vae-sd" / "dataset.json").write_text(json.dumps({"labels": list(labels.items())}))
    pack(tmp_path / "vae-sd", tmp_path / "packed", num_workers=0)
    assert "1 of 2 classes have no images, 0 (0): labels count from 0" in capsys.readouterr().err
    pack(tmp_path / "vae-sd", tmp_path / "packed", num_workers=0)


def test_nothing_is_told_where_all_classes_have_images(tmp_path, vae_folder, capsys):
    encode(make_images(tmp_path / "s"), tmp_path / "packed", vae_folder, num_workers=0)
    assert "warning" not in capsys.readouterr().err


# ---- names that are no UTF-8


LATIN = os.fsdecode(b"caf\xe9")


@pytest.mark.skipif(sys.platform != "linux", reason="the file system takes UTF-8 only")
def test_names_that_are_no_utf8_go_all_the_way(tmp_path, vae_folder, monkeypatch, capsys):
    source, dest = write(tmp_path / "s", {f"{LATIN}/0.png": png(), f"tee/{LATIN}.png": png()}), tmp_path / LATIN
    flags = ["--source", source, "--dest", dest, "--vae", vae_folder, "--device", "cpu", "--images"]
    for _ in range(2):
        assert run_main(monkeypatch, "encode", *flags, "--num-workers", 1) == 0
    data = PackedLatents(dest)
    assert data.names == [f"{LATIN}/0.png", f"tee/{LATIN}.png"] and data.class_names == [LATIN, "tee"]
    assert run_main(monkeypatch, "verify", dest) == 0 and run_main(monkeypatch, "info", dest) == 0
    assert run_main(monkeypatch, "stats", "--source", source, "--dest", tmp_path / f"{LATIN}.npz") == 0
    (source / "tee" / f"{LATIN}.txt").touch()
    flags = ["--source", source, "--dest", f"{dest}-images", "--resolution", "16x16", "--num-workers", 0]
    assert run_main(monkeypatch, "convert", *flags) == 0
    assert "caf\\udce9.txt: no image" in capsys.readouterr().out
    content = bytearray((dest / "moments-00000.npy").read_bytes())
    content[-1] ^= 1
    (dest / "moments-00000.npy").write_bytes(content)
    assert run_main(monkeypatch, "verify", dest) == 2
    captured = capsys.readouterr()
    assert captured.out.startswith("tee/caf\\udce9.png (row 1") and "error: " in captured.err


@pytest.mark.skipif(sys.platform != "linux", reason="the file system takes UTF-8 only")
def test_names_that_are_no_utf8_are_printed_by_the_program_itself(tmp_path):
    source = write(tmp_path / "s", {f"{LATIN}/0.png": png(), f"{LATIN}/1.txt": b""})
    command = [sys.executable, "-m", "preprocessing.dataset_tools", "convert", "--resolution", "16x16"]
    command += ["--source", source, "--dest", tmp_path / LATIN, "--num-workers", "0"]
    done = subprocess.run(command, capture_output=True, cwd=ROOT, env={**os.environ, "PYTHONUTF8": "1"})
    assert done.returncode == 0, done.stderr
    assert b"caf\\udce9/1.txt: no image, by its name" in done.stdout and b"Traceback" not in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="the file system takes UTF-8 only")
def test_weights_may_lie_in_a_folder_whose_name_is_no_utf8(tmp_path, vae_folder):
    """safetensors itself opens none."""
    from evaluation.features import DEMO_WEIGHTS, load_extractor
    from models import DeepFlow, checkpoints
    from models.autoencoder import load_vae, weights_sha256
    from models.ssl_encoders import _read

    place = tmp_path / LATIN
    shutil.copytree(vae_folder, place)
    vae = load_vae(place)
    assert weights_sha256(vae) == weights_sha256(load_vae(vae_folder)) and vae.config._name_or_path == str(place)
    config = dict(input_size=4, patch_size=2, in_channels=4, hidden_size=32, depth=2, num_heads=2, num_classes=3)
    model = DeepFlow(**config, df_idxs=[1])
    checkpoints.save(place / "ema.safetensors", model.state_dict(), model.config, {"step": 1})
    assert checkpoints.read(place).metadata == {"step": 1}
    assert _read(place / "ema.safetensors").keys() == model.state_dict().keys()
    shutil.copy(DEMO_WEIGHTS, place / "demo.safetensors")
    assert load_extractor("demo", place / "demo.safetensors").name == "demo"


def test_labels_that_are_no_utf8_are_told_shortly(tmp_path):
    names = [[f"{LATIN}{index}.png", 0] for index in range(1000)]
    content = json.dumps({"labels": names}, ensure_ascii=False).encode("utf-8", "surrogateescape")
    with pytest.raises(UserError, match="UnicodeDecodeError: 'utf-8' codec can't decode byte 0xe9") as told:
        list_images(write(tmp_path, {"dataset.json": content, "a.png": png()}))
    assert len(str(told.value)) < 400


def test_names_that_are_utf8_are_written_as_ever(tmp_path, vae_folder):
    source = write(tmp_path / "s", {"café/0.png": png(), "犬/0.png": png()})
    encode(source, tmp_path / "packed", vae_folder, num_workers=0)
    assert (tmp_path / "packed" / "names.json").read_text(encoding="utf-8") == '["café/0.png", "犬/0.png"]'
    assert PackedLatents(tmp_path / "packed").class_names == ["café", "犬"]


def test_a_name_of_two_lines_is_told_in_one(tmp_path, vae_folder, monkeypatch, capsys):
    source = write(tmp_path / "s", {"two\nlines/0.png": b"no image"})
    flags = ["--source", source, "--dest", tmp_path / "out", "--vae", vae_folder, "--device", "cpu"]
    assert run_main(monkeypatch, "encode", *flags) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "two\\nlines/0.png cannot be read as an image" in err


# ---- archives with one folder at their top


@pytest.mark.parametrize("top", ["vae-sd/", "data/vae-sd/", "vae-sd\\"])
def test_a_zip_of_one_folder_is_read_as_that_folder(tmp_path, top):
    write_files(tmp_path / "plain")
    files = {
        str(file.relative_to(tmp_path / "plain")): file for file in (tmp_path / "plain").rglob("*") if file.is_file()
    }
    content = {f"{top}{name}": file.read_bytes() for name, file in files.items()}
    images = {f"images/{index // 10:05d}/img{index:08d}.png": png((32, 32)) for index in range(len(files) - 1)}
    (tmp_path / "d").mkdir()
    source = zipped(tmp_path / "d" / "vae-sd.zip", content | {"__MACOSX/vae-sd/._x.npy": b"", ".DS_Store": b""})
    zipped(tmp_path / "d" / "images.zip", images)
    plain, data = open_latents(tmp_path / "plain"), open_latents(tmp_path / "d")
    assert data.names == plain.names and open_latents(source).names == plain.names
    np.testing.assert_array_equal(data.gather(np.arange(23))[0], plain.gather(np.arange(23))[0])
    assert data.gather_images(np.arange(23)).shape == (23, 32, 32, 3)
    verify(source)
    pack(source, tmp_path / "packed", num_workers=1)
    assert PackedLatents(tmp_path / "packed").names == plain.names


def test_a_zip_of_images_in_place_of_latents_says_so(tmp_path):
    with pytest.raises(UserError, match="it holds images: encode them first"):
        open_latents(zipped(tmp_path / "a.zip", IMAGES))


def test_images_in_a_folder_at_the_top_of_their_zip_are_paired(tmp_path):
    labels = write_files(tmp_path / "vae-sd", count=4)
    (tmp_path / "vae-sd" / "dataset.json").write_text(json.dumps({"labels": [[name, 0] for name in labels]}))
    names = [name.replace("img-mean-std-", "img").replace(".npy", ".png") for name in sorted(labels)]
    zipped(tmp_path / "a.zip", {f"images/{name}": png((32, 32), (row, 0, 0)) for row, name in enumerate(names)})
    pack(tmp_path / "vae-sd", tmp_path / "packed", images=tmp_path / "a.zip", num_workers=0)
    assert PackedLatents(tmp_path / "packed").gather_images(np.arange(4))[:, 0, 0, 0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("make", [zipped, tarred])
def test_images_of_an_archive_with_one_folder_have_its_labels(tmp_path, make, vae_folder):
    labels = json.dumps({"labels": [[name, index] for index, name in enumerate(IMAGES)]}).encode()
    files = {f"s/{name}": content for name, content in (IMAGES | {"dataset.json": labels}).items()}
    source = make(tmp_path / "s.archive", files)
    convert(source, tmp_path / "out.zip", 16, num_workers=0)
    assert list_images(tmp_path / "out.zip").labels.tolist() == [0, 1, 2, 3]
    if make is zipped:
        encode(source, tmp_path / "packed", vae_folder, num_workers=0)
        assert PackedLatents(tmp_path / "packed").labels.tolist() == [0, 1, 2, 3]


def test_an_archive_that_is_more_than_one_folder_says_what_to_do(tmp_path):
    write_files(tmp_path / "plain", count=2)
    content = {str(file.relative_to(tmp_path)): file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    source = zipped(tmp_path / "a.zip", content | {"images/00000/img00000000.png": png()})
    with pytest.raises(
        UserError, match=r"dataset\.json is missing: unpack the zip and give its folder plain/, or make"
    ):
        open_latents(source)
    with pytest.raises(UserError, match=r"below --source: unpack a\.zip and give the folder"):
        list_images(source)
    with pytest.raises(UserError, match=r"dataset\.json is missing: give \S+plain$"):
        pack(tmp_path, tmp_path / "packed", num_workers=0)
