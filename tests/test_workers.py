"""Whatever happens to a worker process is one line for the user."""

import os
import signal
import time

import pytest
from torch.utils.data import Dataset

from errors import UserError
from preprocessing.workers import worker_results


class Items(Dataset):
    """Items that are numbers, but for those of which `special` has something else or something to be done."""

    def __init__(self, special):
        self.special = special

    def __getitem__(self, item):
        special = self.special.get(item, item)
        return special() if callable(special) else special


def results(special, num_workers=1):
    with worker_results(Items(special), num_workers, sampler=range(6), batch_size=None) as found:
        return list(found)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_items_come_in_order_and_mistakes_are_raised(num_workers):
    assert results({}, num_workers) == list(range(6))
    with pytest.raises(UserError, match="^no such picture$"):
        results({3: UserError("no such picture")}, num_workers)
    with pytest.raises(RuntimeError, match="a bug"):
        results({3: RuntimeError("a bug")}, num_workers)


def test_a_killed_worker_is_one_line():
    with pytest.raises(UserError, match="a worker stopped .* fewer --num-workers"):
        results({3: lambda: os.kill(os.getpid(), signal.SIGKILL)})


def test_a_worker_killed_while_its_caller_is_busy_is_one_line():
    with (
        pytest.raises(UserError, match="a worker stopped"),
        worker_results(Items({0: os.getpid}), 1, sampler=range(100), batch_size=None) as found,
    ):
        os.kill(next(found), signal.SIGKILL)
        time.sleep(10)
