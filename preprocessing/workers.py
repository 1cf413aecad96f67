"""Work in other processes, which end with their command and whose failure is one line.

Results travel as bytes through pipes. Shared memory (64 MB in a usual container) and sockets (names of 108 bytes at
most, whatever `TMPDIR` is) can fail to send a result, for which the parent would wait for ever.
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
ITEMS_PER_WORKER = 2  # given to it ahead, their results not taken yet
# Forked workers have all modules loaded; outside Linux, system libraries do not survive a fork.
CONTEXT = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")


@contextmanager
def worker_results(
    work: Callable[[Item], Result], items: Sequence[Item], num_workers: int
) -> Iterator[Iterator[Result]]:
    """Do work in processes that end with the `with` block.

    Args:
        work: item -> result; an exception that it returns is raised here.
        items: to work on.
        num_workers: processes (0: the work is done in this one).

    Yields:
        an iterator of the results, in the order of the items.

    Raises:
        UserError: if a worker cannot be started, is killed, or raises an exception.
    """
    if num_workers == 0:
        yield map(_raise_if_error, map(work, items))
        return
    workers: list[_Worker] = []
    try:
        for _ in range(min(num_workers, len(items))):
            workers.append(_Worker(work, items))
        yield _results_in_order(workers, len(items))
        for worker in workers:  # killed while the caller was busy
            worker.check_alive()
    finally:
        for worker in workers:
            worker.stop()


class _Worker:
    """A process that receives the numbers of items and sends their results in the same order.

    Raises:
        UserError: if the system has no process or pipe left.
    """

    def __init__(self, work: Callable[[Item], Result], items: Sequence[Item]) -> None:
        try:
            numbers, self._numbers = CONTEXT.Pipe(duplex=False)
            self._results, results = CONTEXT.Pipe(duplex=False)
            self._process = CONTEXT.Process(target=_worker_main, args=(work, items, numbers, results), daemon=True)
            self._process.start()
        except OSError as error:
            raise UserError(f"cannot start a worker ({error.strerror or error}): give fewer --num-workers") from error
        numbers.close()  # only the worker has its ends open now: its death closes the pipes
        results.close()

    def give(self, number: int) -> None:
        try:
            self._numbers.send_bytes(number.to_bytes(8, "little"))
        except OSError:
            self._raise_stopped()

    def take(self) -> Any:
        """Wait for the next result."""
        try:
            return _receive(self._results)
        except (EOFError, OSError):
            self._raise_stopped()

    def check_alive(self) -> None:
        if self._process.exitcode:
            self._raise_stopped()

    def _raise_stopped(self) -> None:
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


def _results_in_order(workers: list[_Worker], count: int) -> Iterator[Any]:
    """The results of items 0 to `count` - 1 in order; item i is done by worker i modulo the number of workers."""
    for number in range(min(ITEMS_PER_WORKER * len(workers), count)):
        workers[number % len(workers)].give(number)
    for number in range(count):
        worker = workers[number % len(workers)]
        result = worker.take()
        if number + ITEMS_PER_WORKER * len(workers) < count:
            worker.give(number + ITEMS_PER_WORKER * len(workers))
        yield _raise_if_error(result)


def _raise_if_error(result: Any) -> Any:
    if isinstance(result, Exception):
        raise result
    return result


def _worker_main(
    work: Callable[[Item], Result], items: Sequence[Item], numbers: Connection, results: Connection
) -> None:
    """Main function of a worker: send the results of the items whose numbers it receives, until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C also reaches the parent, which ends its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        _end_with_parent()
    except RuntimeError:  # no memory for a thread; the parent reports it
        os._exit(1)
    while True:
        try:
            number = int.from_bytes(numbers.recv_bytes(), "little")
        except EOFError:
            return
        try:
            content = _pickled(work(items[number]))
        except Exception as error:  # a bug, or no memory: one line instead of many workers' tracebacks
            reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            failure = UserError(f"a worker failed ({reason}): give the same command again, with fewer --num-workers")
            content = _pickled(failure)
        _send(results, *content)


def _pickled(result: Any) -> tuple[bytes, list[memoryview]]:
    """A pickled result without the bytes of its arrays, and views of these bytes."""
    arrays: list[pickle.PickleBuffer] = []
    content = pickle.dumps(result, 5, buffer_callback=arrays.append)
    return content, [array.raw() for array in arrays]


def _send(pipe: Connection, content: bytes, arrays: list[memoryview]) -> None:
    pipe.send((content, [len(array) for array in arrays]))
    for array in arrays:
        while array:
            array = array[os.write(pipe.fileno(), array) :]


def _receive(pipe: Connection) -> Any:
    """What `_send` sent; arrays are read without a copy, as the parent's time limits the command."""
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
    """Let this process end as soon as its parent does, even by a kill.

    Otherwise workers live on for seconds, keep the lock of the destination and write into it.
    """
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
