"""What the benches share: ratios of seconds, both sides run in turn, and how far memory grows."""

from __future__ import annotations

import ctypes
import gc
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil

_STATUS, _FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def timed(action: Callable[[], object]) -> float:
    """Seconds it takes."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def ratios(plain: Callable[[], object], other: Callable[[], object], runs: int) -> list[float]:
    """Seconds of ``other`` over seconds of ``plain``, run in turn."""
    plain(), other()  # warm up
    return [timed(other) / timed(plain) for _ in range(runs)]


def in_turn(actions: Mapping[str, Callable[[], object]], runs: int) -> tuple[dict[str, float], dict[str, list[float]]]:
    """How far the process grows in each action, in MB, and the seconds of so many runs, all actions in turn."""
    grown = {title: peak_of(action) for title, action in actions.items()}  # warms up as well
    times: dict[str, list[float]] = {title: [] for title in actions}
    for _ in range(runs):
        for title, action in actions.items():
            times[title].append(timed(action))
    return grown, times


def memory(field: str) -> float | None:
    """A figure of this process in MB: VmRSS now, VmHWM at its highest; None where the system has none (not Linux)."""
    if not _STATUS.is_file():
        return None
    lines = _STATUS.read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def forget_peak() -> bool:
    """Sets the highest memory to what it is now; False where the system cannot."""
    if not _FORGET.exists():
        return False
    _FORGET.write_text("5")
    return True


def peak_of(action: Callable[[], object]) -> float:
    """How far the process grows above its size before, in MB.

    What was freed earlier goes back to the system first (of glibc): else it serves the action, and nothing grows.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = memory("VmRSS")
    if before is None or not forget_peak():
        return _sampled_peak(action)
    action()
    return (memory("VmHWM") or before) - before


def _sampled_peak(action: Callable[[], object]) -> float:
    """The same by a look every 5 ms, for systems that do not record it."""

    def resident() -> float:
        return psutil.Process().memory_info().rss / 1e6

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
