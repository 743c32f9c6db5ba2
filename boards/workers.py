"""Work over processes of one thread each. On networks as small as the demo model's, more threads do not pay."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def parallel_map(
    work: Callable[[Item], Result], items: Iterable[Item], workers: int | None = None
) -> Generator[Result, None, None]:
    """``work(item)`` of every item, in order.

    One call with many items keeps the processes busy and loads a model once per process. Many calls do neither.

    Args:
        work: a function of a module, not a method: it is found by its name. What it loads (and keeps, with
            ``functools.cache``) is loaded once in every process. It returns plain data or arrays, not tensors.
        workers: processes; the default is one per core, or what ``OMP_NUM_THREADS`` allows. One works in this process.

    Raises:
        Exception: what ``work`` raises, here.
    """
    count = workers or int(os.environ.get("OMP_NUM_THREADS", 0)) or os.cpu_count() or 1
    if count == 1 or "fork" not in multiprocessing.get_all_start_methods():
        yield from map(work, items)
    else:
        yield from _forked_map(work, items, count)


def _forked_map(work: Callable[[Item], Result], items: Iterable[Item], count: int) -> Generator[Result, None, None]:
    """Forked, the processes have the host and the pack under their names without importing them again."""
    others = set(multiprocessing.active_children())
    # leaving the pool waits until every process has ended
    with ProcessPoolExecutor(count, multiprocessing.get_context("fork"), _prepare) as pool:
        try:
            yield from pool.map(work, items)
        except BaseException:
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()
            pool.shutdown(cancel_futures=True)
            raise


def _prepare() -> None:
    """One thread, and an end at once on a signal. Ctrl-C reaches the process that waits, which then ends this one."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
