"""Work over processes of one thread each: on networks as small as the demo model's, threads only get in each other's way."""

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
        return
    # forked: the host and the pack are there under their names without being imported again
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(count, context, _prepare) as pool:  # leaving it waits until every process has ended
        before = set(multiprocessing.active_children())
        try:
            yield from pool.map(work, items)
        except BaseException:
            for process in set(multiprocessing.active_children()) - before:
                process.terminate()
            pool.shutdown(cancel_futures=True)
            raise


def _prepare() -> None:
    """One thread, and an end at once on a signal. Ctrl-C reaches the process that waits, which then ends this one."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
