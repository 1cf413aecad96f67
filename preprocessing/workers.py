"""Work in processes of a DataLoader, that do not outlive the command they work for and whose death is one line."""

import multiprocessing
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.data import DataLoader, Dataset

from errors import UserError


@contextmanager
def worker_results(dataset: Dataset, num_workers: int, **order: Any) -> Iterator[Iterator[Any]]:
    """The items of `dataset`, uncollated, made by `num_workers` processes; they end when the `with` is left.

    `order` says which items: a DataLoader's `batch_sampler`, or `sampler` and `batch_size=None`. An item that is an
    exception is raised: raised in a worker it would arrive wrapped in a traceback.

    Raises `UserError` if a worker is killed, also amid what the caller does with an item: PyTorch raises it there.
    """
    loader = DataLoader(dataset, num_workers=num_workers, collate_fn=_as_it_is, worker_init_fn=end_with_parent, **order)
    results = _raised(loader)
    try:
        yield results
    except RuntimeError as error:
        if "DataLoader worker (pid" not in str(error):
            raise
        raise UserError(
            f"a worker stopped ({error}): give the same command again, it continues; if memory was short, with "
            "fewer --num-workers"
        ) from error
    finally:
        results.close()  # ends the workers, which a traceback would keep waiting


def _raised(loader: DataLoader) -> Iterator[Any]:
    for result in loader:
        if isinstance(result, Exception):
            raise result
        yield result


def _as_it_is(result: Any) -> Any:
    return result


def end_with_parent(worker_id: int) -> None:
    """A DataLoader's `worker_init_fn`: the worker ends at once when its parent does, even if that is killed.

    Left to themselves workers go on for seconds, keep the lock of the destination, and write into it.
    """
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
