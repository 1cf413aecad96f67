"""Work in other processes, that do not outlive the command they work for and whose end is one line.

Results travel as bytes through ordinary pipes. Shared memory is 64 MB in a usual container, and the name of a socket
has 108 bytes at most, wherever `TMPDIR` points: with either, what a worker cannot send is waited for in vain.
"""

import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import numpy as np

from common.errors import UserError

Item, Result = TypeVar("Item"), TypeVar("Result")
AHEAD = 2  # items that each worker has been given and whose results are not taken
# Forked workers have all modules loaded; elsewhere than on Linux libraries do not survive it.
CONTEXT = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")


@contextmanager
def worker_results(
    work: Callable[[Item], Result], items: Sequence[Item], num_workers: int
) -> Iterator[Iterator[Result]]:
    """`work(item)` of each item in order, made by `num_workers` processes that end when the `with` is left.

    A result that is an exception is raised. With no workers the work is done here.

    Raises `UserError` if a worker is killed or cannot be started, or fails otherwise than by returning an exception.
    """
    if num_workers == 0:
        yield map(_raised, map(work, items))
        return
    workers: list[_Worker] = []
    try:
        for _ in range(min(num_workers, len(items))):
            workers.append(_Worker(work, items))
        yield _in_order(workers, len(items))
        for worker in workers:  # killed while the caller was busy
            worker.check_alive()
    finally:
        for worker in workers:
            worker.stop()


class _Worker:
    """A process that is given the numbers of items, and sends their results in the same order.

    Raises `UserError` if the system has no process or pipe left.
    """

    def __init__(self, work: Callable[[Item], Result], items: Sequence[Item]) -> None:
        try:
            numbers, self._numbers = CONTEXT.Pipe(duplex=False)
            self._results, results = CONTEXT.Pipe(duplex=False)
            self._process = CONTEXT.Process(target=_serve, args=(work, items, numbers, results), daemon=True)
            self._process.start()
        except OSError as error:
            raise UserError(f"cannot start a worker ({error.strerror or error}): give fewer --num-workers") from error
        numbers.close()  # the worker's ends alone are open now: when it dies, the pipes end
        results.close()

    def give(self, number: int) -> None:
        try:
            self._numbers.send_bytes(number.to_bytes(8, "little"))
        except OSError:
            self._died()

    def take(self) -> Any:
        """The next result, waited for."""
        try:
            return _receive(self._results)
        except (EOFError, OSError):
            self._died()

    def check_alive(self) -> None:
        if self._process.exitcode:
            self._died()

    def _died(self) -> None:
        self._process.join()
        code = self._process.exitcode
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        raise UserError(
            f"a worker stopped ({how}): give the same command again, it continues; if memory was short, with fewer "
            "--num-workers"
        )

    def stop(self) -> None:
        self._process.kill()
        self._process.join()
        self._numbers.close()
        self._results.close()


def _in_order(workers: list[_Worker], count: int) -> Iterator[Any]:
    """The results of items 0 to `count`, of which worker w makes every one that is w modulo the number of workers."""
    for number in range(min(AHEAD * len(workers), count)):
        workers[number % len(workers)].give(number)
    for number in range(count):
        worker = workers[number % len(workers)]
        result = worker.take()
        if number + AHEAD * len(workers) < count:
            worker.give(number + AHEAD * len(workers))
        yield _raised(result)


def _raised(result: Any) -> Any:
    if isinstance(result, Exception):
        raise result
    return result


def _serve(work: Callable[[Item], Result], items: Sequence[Item], numbers: Connection, results: Connection) -> None:
    """What a worker does: the results of the items whose numbers come, until no more do."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        _end_with_parent()
    except RuntimeError:  # no memory for a thread, of which the parent tells
        os._exit(1)
    while True:
        try:
            number = int.from_bytes(numbers.recv_bytes(), "little")
        except EOFError:
            return
        try:
            content = _pickled(work(items[number]))
        except Exception as error:  # a bug, or no memory: its traceback would be lost among those of other workers
            reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            failure = UserError(f"a worker failed ({reason}): give the same command again, with fewer --num-workers")
            content = _pickled(failure)
        _send(results, *content)


def _pickled(result: Any) -> tuple[bytes, list[memoryview]]:
    """A result without the bytes of its arrays, and these, not copied."""
    arrays: list[pickle.PickleBuffer] = []
    content = pickle.dumps(result, 5, buffer_callback=arrays.append)
    return content, [array.raw() for array in arrays]


def _send(pipe: Connection, content: bytes, arrays: list[memoryview]) -> None:
    pipe.send((content, [len(array) for array in arrays]))
    for array in arrays:
        while array:
            array = array[os.write(pipe.fileno(), array) :]


def _receive(pipe: Connection) -> Any:
    """What `_send` sent, its arrays read straight to where they stay: the caller's time is what a command waits for."""
    content, sizes = pipe.recv()
    arrays = [np.empty(size, np.uint8) for size in sizes]
    for array in arrays:
        rest = memoryview(array)
        while rest:
            count = os.readv(pipe.fileno(), [rest])
            if count == 0:
                raise EOFError
            rest = rest[count:]
    return pickle.loads(content, buffers=arrays)


def _end_with_parent() -> None:
    """Have this process end at once when its parent does, even if that is killed.

    Left to themselves workers go on for seconds, keep the lock of the destination, and write into it.
    """
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
