"""What the benches share: ratios of seconds, both sides run in turn, and how far memory grows."""

from __future__ import annotations

import ctypes
import gc
import threading
import time
from collections.abc import Callable

import psutil


def timed(action: Callable[[], object]) -> float:
    """Seconds it takes."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def ratios(plain: Callable[[], object], other: Callable[[], object], runs: int) -> list[float]:
    """Seconds of ``other`` over seconds of ``plain``, run in turn."""
    plain(), other()  # warm up
    return [timed(other) / timed(plain) for _ in range(runs)]


def peak_of(action: Callable[[], object]) -> float:
    """How far the process grows above its size before, in MB, looked at every 5 ms.

    What was freed earlier goes back to the system first (of glibc): else it serves the action, and nothing grows.
    """

    def resident() -> float:
        return psutil.Process().memory_info().rss / 1e6

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before, highest, done = resident(), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            highest[0] = max(highest[0], resident() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        action()
    finally:
        done.set()
        watcher.join()
    return highest[0]
