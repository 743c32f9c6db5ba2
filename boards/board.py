"""A score board: rows of measured figures, printed as they come and written as JSON; one runner for all boards."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from .sheets import save_sheet
from .workers import parallel_map

Result = TypeVar("Result")
TaskOf = TypeVar("TaskOf")
Figures = dict[str, Any]
"""Name of a figure to its value."""


@dataclass(frozen=True)
class Job(Generic[TaskOf]):
    """One task by one method: what one process does by itself.

    Args:
        seeds: one picture each, where the task has none itself.
        steps: of the sampler; 0 is the board's own number.
    """

    method: str
    task: TaskOf
    seeds: tuple[int, ...] = ()
    steps: int = 0


class Metrics(Protocol):
    """What was counted over the pictures of some jobs."""

    def add(self, other: Any) -> None:
        """Takes in the counts of other jobs."""

    def figures(self) -> Figures:
        """The figures of a row."""

    def remarks(self) -> list[str]:
        """What a person should read above the row."""


RunJob = Callable[[Any], tuple[Any, np.ndarray]]
"""A function of a module: job → (metrics, pictures (n, h, w, 3) of bytes)."""


def own_figures(metrics: Metrics) -> Figures:
    return metrics.figures()


@dataclass(frozen=True)
class Row:
    """A row to measure. ``figures``: what it shows of all its jobs' metrics; ``sheet``: the name of its sheet."""

    title: str
    run_job: RunJob
    jobs: Sequence[Job]
    figures: Callable[[Any], Figures] = own_figures
    sheet: str = ""


@dataclass
class Board:
    """The rows of one family, in the form ``{"family", "seeds", "rows": [{"method", "metrics", "seconds"}]}``.

    ``seconds`` of a row is the time since the row above it was done. While one row ends, the next one has begun.
    """

    family: str
    seeds: list[int]
    rows: list[dict] = field(default_factory=list)

    @contextmanager
    def row(self, method: str) -> Iterator[Figures]:
        """Measures one row: the body fills the dict it is given; the row is printed when it is done."""
        metrics: Figures = {}
        started = time.monotonic()
        yield metrics
        seconds = time.monotonic() - started
        self.rows.append({"method": method, "metrics": metrics, "seconds": round(seconds, 1)})
        figures = "  ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in metrics.items())
        print(f"{method:<18} {figures}  ({seconds:.0f} s)", flush=True)

    def run(self, rows: Sequence[Row], options: argparse.Namespace) -> None:
        """Runs the jobs of all rows over one set of processes. Each row is printed and written once it is complete."""
        work = [(row.run_job, job) for row in rows for job in row.jobs]
        with closing(parallel_map(_run_job, work)) as results:
            for row in rows:
                self._complete(row, islice(results, len(row.jobs)), options)

    def _complete(self, row: Row, results: Iterable[tuple[Any, np.ndarray]], options: argparse.Namespace) -> None:
        with self.row(row.title) as figures:
            (total, pictures), *others = with_progress(results, len(row.jobs), "jobs", row.title)
            sheet = [pictures, *(more for _, more in others)]
            for metrics, _ in others:
                total.add(metrics)
            for remark in total.remarks():
                print(f"    {remark}", flush=True)
            figures |= row.figures(total)
        if options.sheets:
            save_sheet(sheet, options.sheets / f"{row.sheet or row.title}.png")
        self.write(options.json)

    def write(self, path: Path | None) -> None:
        """Writes the board, if a path is given."""
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"family": self.family, "seeds": self.seeds, "rows": self.rows}, indent=1) + "\n")
        print(f"written to {path}", flush=True)


def _run_job(work: tuple[RunJob, Job]) -> tuple[Any, np.ndarray]:
    run_job, job = work
    return run_job(job)


def with_progress(results: Iterable[Result], total: int, what: str, row: str = "", every: int = 20) -> Iterator[Result]:
    """The results as they come; after every so many it is printed how many of the total there are."""
    for number, result in enumerate(results, 1):
        yield result
        if number % every == 0:
            print(f"    {row}{': ' if row else ''}{number} of {total} {what}", flush=True)


def add_model_option(parser: argparse.ArgumentParser, models: Iterable[str]) -> None:
    """The option that all boards share which know more than one demo model; the first is the default."""
    known = list(models)
    parser.add_argument("--model", choices=known, default=known[0], help="which demo model")


def parsed_with_rows(
    parser: argparse.ArgumentParser, arguments: list[str], rows: Mapping[str, Sequence[str]]
) -> argparse.Namespace:
    """The options, ``method`` being the rows to measure: those asked for, or all that the demo model has.

    Args:
        rows: by the kind of demo model.
    """
    add_model_option(parser, rows)
    options = parser.parse_args(arguments)
    own = rows[options.model]
    if strange := [name for name in options.method or () if name not in own]:
        parser.error(f"--model {options.model} has no row '{strange[0]}'; it has: {', '.join(own)}")
    options.method = [name for name in own if name in (options.method or own)]
    return options


def board_parser(family: str, quick: str, methods: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The command line that all boards share. ``quick``: what that option leaves; ``methods``: rows to choose from."""
    parser = argparse.ArgumentParser(prog=f"dev.py score {family}")
    parser.add_argument("--json", type=Path, help="a file for the figures")
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--sheets", type=Path, help="a folder for sheets of all pictures")
    if methods:
        parser.add_argument("--method", choices=methods, action="append", help="only this row (again for more)")
    return parser
