"""Work over processes: results in order, errors here, and no process left behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import closing

import pytest
from comfyui_concepts.boards import board, workers

WORKERS = os.path.join(os.path.dirname(workers.__file__), "workers.py")


def squared(number: int) -> int:
    time.sleep(0.05 * (number % 3))  # a later one is done before an earlier one
    return number * number


def refused(number: int) -> int:
    if number == 2:
        raise ValueError("two is refused")
    time.sleep(0.1)
    return number


def asleep(number: int) -> int:
    time.sleep(60 * number)
    return number


def process_of(_: int) -> int:
    time.sleep(0.05)
    return os.getpid()


def _children() -> list:
    return multiprocessing.active_children()


@pytest.mark.parametrize("count", [1, 2])
def test_results_come_in_order(count):
    assert list(workers.parallel_map(squared, range(7), count)) == [n * n for n in range(7)]
    assert not _children()


def test_one_call_uses_the_same_processes_for_all_items():
    assert len(set(workers.parallel_map(process_of, range(12), 2))) == 2


def test_an_error_is_raised_here_and_ends_every_process():
    started = time.monotonic()
    with pytest.raises(ValueError, match="two is refused"):
        list(workers.parallel_map(refused, range(400), 2))
    assert not _children()
    assert time.monotonic() - started < 20  # 400 items would take as long


def test_leaving_early_ends_every_process():
    with closing(workers.parallel_map(asleep, range(4), 2)) as results:
        assert next(results) == 0
        assert _children()
    assert not _children()


def test_nothing_is_complained_of_at_the_end_of_a_process(tmp_path):
    """A pool whose end nobody waited for met its closed pipes when the interpreter ended."""
    script = tmp_path / "script.py"
    script.write_text(
        f"import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('workers', {WORKERS!r})\n"
        "workers = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(workers)\n"
        "print(list(workers.parallel_map(abs, [-1, -2, -3], 2)))\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[1, 2, 3]\n", "")


@pytest.mark.parametrize("doing", ["next(results)", "time.sleep(9000)"], ids=["waiting", "at work itself"])
def test_a_terminated_board_takes_its_processes_with_it(tmp_path, doing):
    """If one process were left, the output would stay open for hours."""
    script = tmp_path / "script.py"
    script.write_text(
        f"import contextlib, importlib.util, signal, sys, time\n"
        f"spec = importlib.util.spec_from_file_location('workers', {WORKERS!r})\n"
        "workers = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(workers)\n"
        "def stop(*_):\n    raise KeyboardInterrupt\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "try:\n"
        "    with contextlib.closing(workers.parallel_map(time.sleep, [0, 9000, 9000], 2)) as results:\n"
        "        next(results)\n"
        "        print('started', flush=True)\n"
        "        DOING\n"
        "except KeyboardInterrupt:\n    print('stopped')\n".replace("DOING", doing)
    )
    process = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "started\n"
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=600)[0] == "stopped\n"


class Counts:
    """The sum of some numbers."""

    def __init__(self, total: int) -> None:
        self.total = total

    def add(self, other) -> None:
        self.total += other.total

    def figures(self):
        return {"total": self.total}

    def remarks(self):
        return [f"total {self.total}"]


def run_job(job):
    import numpy as np

    return Counts(job.task), np.zeros((1, 2, 2, 3), np.uint8)


def test_a_board_adds_up_the_jobs_of_each_row(tmp_path, capsys):
    options = board.board_parser("some", "few").parse_args(["--json", f"{tmp_path}/b.json", "--sheets", str(tmp_path)])
    rows = [
        board.Row("one", run_job, [board.Job("", n) for n in (1, 2, 3)]),
        board.Row("two", run_job, [board.Job("", 10)], lambda counts: {"total": -counts.total}, "other"),
    ]
    made = board.Board("some", [1])
    made.run(rows, options)
    assert [(row["method"], row["metrics"]) for row in made.rows] == [("one", {"total": 6}), ("two", {"total": -10})]
    assert (tmp_path / "one.png").exists()
    assert (tmp_path / "other.png").exists()
    assert capsys.readouterr().out.startswith("    total 6\none ")
