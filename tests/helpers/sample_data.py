"""Small datasets for the tests of what makes and reads them, and processes to be killed while they make them."""

import ctypes
import json
import multiprocessing
import multiprocessing.sharedctypes
import os
import random
import shutil
import signal
import sys
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from tqdm import tqdm

from common.errors import UserError
from preprocessing import dataset_tools
from preprocessing.packed_writer import packed_manifest, write_packed

COUNT, SHAPE = 23, (8, 2, 3)
CLASSES = {"cat": 4, "dog": 3, "eel": 2}


def make_vae(path, seed=0, scaling_factor=0.7):
    """A random AutoencoderKL of a few thousand parameters, f = 4, as the SD-VAE in all but size."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=[4, 4, 8],
        layers_per_block=1,
        norm_num_groups=2,
        latent_channels=4,
        sample_size=16,
        scaling_factor=scaling_factor,
    )
    vae.save_pretrained(path)
    return str(path)


def make_images(folder, classes=CLASSES):
    """Noise images of 16 px in class folders: nine in three by default."""
    rng = np.random.default_rng(0)
    for name, count in classes.items():
        (folder / name).mkdir(parents=True)
        for index in range(count):
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / name / f"{index}.png")
    return folder


def write_dataset(dest, dtype="float16", shard_rows=10, flip=False):
    """23 packed samples in three shards; returns the moments and labels that went in."""
    rng = np.random.default_rng(0)
    moments = rng.normal(size=(COUNT, 2, *SHAPE) if flip else (COUNT, *SHAPE)).astype(dtype)
    labels = rng.integers(0, 4, COUNT)
    names = [f"class/{index:03d}.png" for index in range(COUNT)]
    manifest = packed_manifest(
        names,
        labels,
        ["a", "b", "c", "d"],
        resolution=16,
        latent_shape=SHAPE,
        dtype=dtype,
        vae="assets/tiny",
        vae_sha256="0" * 64,
        scaling_factor=0.5,
        flip=flip,
    )
    write_packed(dest, manifest, np.array_split(moments, 4), names, labels, shard_rows)
    return moments, labels


def write_files(folder, count=COUNT, shape=(8, 4, 4), dtype="float32"):
    """The official layout: one .npy an image, named as REPA's tool does, labels in an order of their own."""
    rng = np.random.default_rng(1)
    labels = {}
    for index in range(count):
        name = f"{index // 10:05d}/img-mean-std-{index:08d}.npy"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        moments = rng.normal(size=shape).astype(np.float16).astype(dtype)  # float16 loses nothing
        moments[len(moments) // 2 :] = np.abs(moments[len(moments) // 2 :])  # std
        np.save(folder / name, moments)
        labels[name] = int(rng.integers(0, 4))
    (folder / "dataset.json").write_text(json.dumps({"labels": list(labels.items())[::-1]}))
    return labels


def contents(folder):
    """Every file below a folder with its bytes."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def run_main(monkeypatch, *arguments):
    """The exit code of one command line of dataset_tools."""
    monkeypatch.setattr(sys, "argv", ["dataset_tools", *map(str, arguments)])
    try:
        dataset_tools.main()
    except SystemExit as stop:
        return stop.code
    return 0


def in_process(work, seconds=60):
    """What `work()` returns in a process of its own; of a `UserError` the message. Fails if that takes longer."""

    def told(results):
        try:
            results.send(work())
        except UserError as error:
            results.send(str(error))

    result, results = multiprocessing.get_context("fork").Pipe(duplex=False)
    process = start(told, results)
    results.close()
    try:
        assert result.poll(seconds), f"no result after {seconds} s"
        return result.recv()
    finally:
        process.kill()
        process.join()


def ordinary_user(work):
    """`in_process`, by a user for whom folders may be unreadable; root reads all."""

    def as_nobody():
        if os.getuid() == 0:
            os.setgid(65534)
            os.setuid(65534)
        return work()

    return in_process(as_nobody)


def with_mount(place, work, kind="tmpfs", options="size=64k", source="tmpfs"):
    """`in_process`, where a file system is mounted on `place` that no other process sees. Skips where none may be."""

    def mounted():
        libc = ctypes.CDLL(None, use_errno=True)
        new_namespace, recursive_private, bind = 0x20000, 0x44000, 0x1000
        flags = bind if kind == "bind" else 0
        if (
            libc.unshare(new_namespace)
            or libc.mount(b"none", b"/", None, recursive_private, None)
            or libc.mount(os.fsencode(source), os.fsencode(place), kind.encode(), flags, options.encode())
        ):
            return "skip", os.strerror(ctypes.get_errno())
        return "done", work()

    state, result = in_process(mounted)
    if state == "skip":
        pytest.skip(f"no file system may be mounted here: {result}")
    return result


def start(work, *arguments):
    """Start `work(*arguments)` in a process of its own, which has all modules loaded already."""

    def with_own_lock():
        tqdm.set_lock(threading.RLock())  # tqdm's is shared with the parent: who is killed with it in hand keeps it
        work(*arguments)

    process = multiprocessing.get_context("fork").Process(target=with_own_lock)
    process.start()
    return process


def dying_at(moment, folder):
    """From here on count what this process does to files below `folder`, and die -9 just before that number of it.

    A moment so named is one of the work, however slow the machine is just now. Returns the count, as it grows, and a
    function that counts one thing more.
    """
    count, process = multiprocessing.sharedctypes.RawValue("q", 0), os.getpid()

    def reach():
        count.value += 1
        if count.value == moment:
            os.kill(process, signal.SIGKILL)

    def look(_, arguments):  # Python's audit events: open, os.rename, os.remove, ...
        if os.getpid() == process and any(isinstance(a, str) and a.startswith(str(folder)) for a in arguments):
            reach()

    sys.addaudithook(look)
    return count, reach


def killed_at(work, moment, folder):
    """Run `work` in a process of its own that dies -9 at a moment of `dying_at`; whether it had ended before."""

    def doomed():
        dying_at(moment, folder)
        work()

    process = start(doomed)
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode == 0


def moments_of(work, folder):
    """How many moments of `dying_at` the work has, in a process of its own."""
    total = multiprocessing.sharedctypes.RawValue("q", 0)

    def counted():
        count, _ = dying_at(None, folder)
        work()
        total.value = count.value

    process = start(counted)
    process.join()
    assert process.exitcode == 0 and total.value > 3
    return total.value


def kill_ten_times(command, dest, whole):
    """Kill a command -9 at ten random moments of its work, and let it complete after any number of kills.

    Every time it completes `dest` has to hold `whole`, what it made uninterrupted; then it begins anew.
    """
    total = moments_of(command, dest)
    shutil.rmtree(dest)
    moments, kills = random.Random(0), 0
    while kills < 10:
        if killed_at(command, moments.randint(1, total), dest):
            assert contents(dest) == whole
            shutil.rmtree(dest)
        else:
            kills += 1
    command()
    assert contents(dest) == whole


def flip_bit(file, position):
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)
