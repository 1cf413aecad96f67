"""Whatever happens to a worker process is one line for the user."""

import os
import signal
import threading
import time

import numpy as np
import pytest

from common.errors import UserError
from preprocessing import workers
from preprocessing.workers import worker_results


class Work:
    """Makes a number of itself, but of those that `special` has something else or something to be done."""

    def __init__(self, special):
        self.special = special

    def __call__(self, item):
        special = self.special.get(item, item)
        return special() if callable(special) else special


def results(special, num_workers=1, count=6):
    with worker_results(Work(special), range(count), num_workers) as found:
        return list(found)


def fail():
    raise RuntimeError("a bug")


@pytest.mark.parametrize("num_workers", [0, 1, 2, 9])
def test_results_come_in_order_and_mistakes_are_raised(num_workers):
    assert results({}, num_workers, 50) == list(range(50)) and results({}, num_workers, 0) == []
    with pytest.raises(UserError, match="^no such picture$"):
        results({3: UserError("no such picture")}, num_workers)
    with pytest.raises(RuntimeError, match="a bug"):
        results({3: RuntimeError("a bug")}, num_workers)


def test_results_larger_than_a_pipe_and_names_of_any_bytes():
    large = np.random.default_rng(0).integers(0, 256, 2**22, dtype=np.uint8)
    found = results({item: lambda: large for item in range(6)} | {2: os.fsdecode(b"caf\xe9")}, 2)
    assert found.pop(2) == "caf\udce9" and all(np.array_equal(each, large) for each in found)


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_worker_is_one_line(signal_number):
    with pytest.raises(UserError, match=r"a worker stopped .killed by SIG.* fewer --num-workers"):
        results({3: lambda: os.kill(os.getpid(), signal_number)}, 2)


def test_a_worker_killed_amid_a_result_is_one_line():
    """The pipe holds the beginning of a result, and the rest never comes."""

    def begin_and_die():
        threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
        return bytes(2**24)

    with (
        pytest.raises(UserError, match="a worker stopped"),
        worker_results(Work({1: begin_and_die}), range(3), 1) as found,
    ):
        assert next(found) == 0
        time.sleep(0.6)
        next(found)


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (fail, "a worker failed .RuntimeError: a bug"),
        (lambda: 1 / 0, "ZeroDivisionError"),
        (lambda: threading.Lock(), "a worker failed .TypeError: cannot pickle"),
        (lambda: bytes(2**62), "a worker failed .(Memory|Overflow)Error.* fewer --num-workers"),
        (lambda: os._exit(7), "a worker stopped .exit code 7"),
    ],
)
def test_a_worker_that_fails_is_one_line(failure, message):
    with pytest.raises(UserError, match=message) as raised:
        results({3: failure}, 2)
    assert "\n" not in str(raised.value)


def test_a_worker_killed_while_its_caller_is_busy_is_one_line():
    with (
        pytest.raises(UserError, match="a worker stopped"),
        worker_results(Work({0: os.getpid}), range(99), 1) as found,
    ):
        os.kill(next(found), signal.SIGKILL)
        time.sleep(0.2)


def test_a_worker_that_cannot_be_started_is_one_line(monkeypatch):
    def fork():
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", fork)
    with pytest.raises(UserError, match=r"cannot start a worker .Resource temporarily.*: give fewer --num-workers"):
        results({})


def test_a_worker_without_memory_for_a_thread_is_one_line(monkeypatch, capfd):
    def fail():
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(workers, "_end_with_parent", fail)
    with pytest.raises(UserError, match="a worker stopped .exit code 1.: .* if memory was short"):
        results({})
    assert capfd.readouterr().err == ""


def test_no_worker_outlives_the_work():
    with worker_results(Work(dict.fromkeys(range(9), os.getpid)), range(9), 2) as found:
        pids = {next(found), next(found)}
    assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
