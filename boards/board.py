"""A score board: rows of measured figures, printed as they come and written as JSON."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

Result = TypeVar("Result")


@dataclass
class Board:
    """The rows of one family, in the form ``{"family", "seeds", "rows": [{"method", "metrics", "seconds"}]}``."""

    family: str
    seeds: list[int]
    rows: list[dict] = field(default_factory=list)

    @contextmanager
    def row(self, method: str):
        """Measures one row: the body fills the dict it is given; the row is printed when it is done."""
        metrics: dict[str, float] = {}
        started = time.monotonic()
        yield metrics
        seconds = time.monotonic() - started
        self.rows.append({"method": method, "metrics": metrics, "seconds": round(seconds, 1)})
        figures = "  ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in metrics.items())
        print(f"{method:<18} {figures}  ({seconds:.0f} s)", flush=True)

    def write(self, path: Path | None) -> None:
        """Writes the board, if a path is given."""
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"family": self.family, "seeds": self.seeds, "rows": self.rows}, indent=1) + "\n")
        print(f"written to {path}", flush=True)


def counted(results: Iterable[Result], total: int, what: str, row: str = "", every: int = 20) -> Iterator[Result]:
    """The results as they come; after every so many it is printed how many of the total there are."""
    for number, result in enumerate(results, 1):
        yield result
        if number % every == 0:
            print(f"    {row}{': ' if row else ''}{number} of {total} {what}", flush=True)
