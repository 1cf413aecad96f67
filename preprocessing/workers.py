"""Worker processes that do not outlive the command they work for."""

import multiprocessing
import os
import threading


def end_with_parent(worker_id: int) -> None:
    """A DataLoader's `worker_init_fn`: the worker ends at once when its parent does, even if that is killed.

    Left to themselves workers go on for seconds, keep the lock of the destination, and write into it.
    """
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
