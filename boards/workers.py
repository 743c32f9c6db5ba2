"""Work spread over processes of one thread each: on networks as small as the demo model's, threads only get in each other's way."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def spread(work: Callable[[Item], Result], items: Iterable[Item], workers: int | None = None) -> Iterator[Result]:
    """``work(item)`` of every item, in order.

    Args:
        work: a function of a module, not a method: it is found by its name. What it loads (and keeps, with
            ``functools.cache``) is loaded once in every process. It returns plain data or arrays, not tensors.
        workers: processes; the default is one a core, or what ``OMP_NUM_THREADS`` allows. One works in this process.

    Raises:
        Exception: what ``work`` raises, here.
    """
    count = workers or int(os.environ.get("OMP_NUM_THREADS", 0)) or os.cpu_count() or 1
    if count == 1 or "fork" not in multiprocessing.get_all_start_methods():
        yield from map(work, items)
        return
    # forked, so that the host and the pack are there under their names without being imported anew
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(count, context, torch.set_num_threads, (1,)) as pool:
        try:
            yield from pool.map(work, items)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
