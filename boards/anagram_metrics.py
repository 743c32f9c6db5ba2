"""What is counted in the pictures of anagrams: views named right, alignment, concealment and the work they took."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from .anagram_tasks import THREE, AnagramTask
from .board import Figures


class AnagramResult(NamedTuple):
    """The pictures of one task: for each picture which views were named right, its alignment and concealment."""

    task: AnagramTask
    right: list[tuple[bool, ...]]
    alignment: list[float]
    concealment: list[float]
    calls: int
    rows: int
    pictures: np.ndarray  # (seeds, h, w, 3), bytes


@dataclass
class AnagramMetrics:
    """The results of some tasks."""

    results: list[AnagramResult] = field(default_factory=list)

    def add(self, other: AnagramMetrics) -> None:
        """Takes in other tasks."""
        self.results += other.results

    def figures(self) -> Figures:
        """Pairs first, then both scores of all pictures, the work, and every kind of view by itself."""
        pairs = [right for r in self.results if r.task.kind != THREE for right in r.right]
        return _pair_figures(pairs) | _score_figures(self.results) | self._work() | self._by_kind()

    def remarks(self) -> list[str]:
        return []

    def _work(self) -> Figures:
        return {"model_calls": sum(r.calls for r in self.results), "model_rows": sum(r.rows for r in self.results)}

    def _by_kind(self) -> Figures:
        shown: Figures = {}
        for kind in dict.fromkeys(r.task.kind for r in self.results):
            named = [right for r in self.results if r.task.kind == kind for right in r.right]
            shown[f"{kind}: all right"] = statistics.mean(map(all, named))
            shown[f"{kind}: worst view"] = _worst_view(named)
        return shown


def _pair_figures(pairs: Sequence[tuple[bool, ...]]) -> Figures:
    if not pairs:
        return {"n": 0}
    return {
        "n": len(pairs),
        "both_right": statistics.mean(map(all, pairs)),
        "worst_view_right": _worst_view(pairs),
        "mean_view_right": statistics.mean(ok for right in pairs for ok in right),
    }


def _worst_view(named: Sequence[tuple[bool, ...]]) -> float:
    """How often the view is named right that is so least often."""
    return min(statistics.mean(view) for view in zip(*named, strict=True))


def _score_figures(results: Sequence[AnagramResult]) -> Figures:
    alignments = [a for r in results for a in r.alignment]
    concealments = [c for r in results for c in r.concealment]
    return {
        "alignment": statistics.mean(alignments),
        "concealment": statistics.mean(concealments),
        "alignment, best tenth from": float(np.quantile(alignments, 0.9)),
        "concealment, best tenth from": float(np.quantile(concealments, 0.9)),
    }
