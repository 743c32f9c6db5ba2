"""What an edit does to the keys and values of a model, in numbers. It needs no pictures."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .problem import Problem, Solution
from .records import ConceptResult, EditReport, PromptDrift
from .regenerate import map_of, margin, row_energy
from .rows import RowPairs
from .truncate import Truncated


def measure(
    problem: Problem,
    names: Sequence[str],
    solution: Solution,
    short: Truncated,
    *,
    margins: bool = True,
    size: float | None = None,
) -> EditReport:
    """The report of a solved edit.

    Args:
        margins: whether the margins are measured, which takes longest.
        size: Σ‖W‖² of all weights; None: the trace of Q, which then has every direction.
    """
    T, one, Q = map_of(short.M, problem.width), map_of(None, problem.width), problem.Q()
    concepts = []
    targets = solution.proxies or tuple(rows.G for rows in problem.erased)
    for name, rows, target in zip(names, problem.erased, targets, strict=True):
        result = left_of(RowPairs(rows.C, target, rows.weights), T, Q)
        result["concept"] = name
        if margins:
            result["margin"] = relative_margin(T, one, Q, rows.C[_heaviest(rows)])
        concepts.append(result)
    report: EditReport = {
        "concepts": concepts,
        "kept": _drifts(problem, T, Q),
        "rank": short.M.rank,
        "rows": sum(map(len, problem.erased)),
        "lost": round(short.lost, 5),
        "regeneration": [round(r, 4) for r in solution.regeneration],
        "change": _rounded((map_energy(T - one, Q) / (size or map_energy(one, Q))) ** 0.5),
        "notes": list(solution.notes),
    }
    if problem.statistics is not None:
        report["captions"] = _rounded(average_drift(problem.statistics.double(), T, Q))
    return report


def left_of(rows: RowPairs, T: torch.Tensor, Q: torch.Tensor) -> ConceptResult:
    """What is left of a concept's rows, mean by weight and largest: 0 is the anchor, 1 the unedited concept."""
    before = row_energy(rows.C - rows.G, Q).sqrt().clamp_min(1e-30)
    left = row_energy(rows.C @ T.T - rows.G, Q).sqrt() / before
    return {"left": _rounded((left * rows.weights).sum() / rows.weights.sum()), "most": _rounded(left.max())}


def drift(rows: torch.Tensor, T: torch.Tensor, Q: torch.Tensor) -> torch.Tensor:
    """How far the keys and values of each row move, relative to their size, (n,)."""
    return row_energy(rows @ T.T - rows, Q).sqrt() / row_energy(rows, Q).sqrt().clamp_min(1e-30)


def average_drift(statistics: torch.Tensor, T: torch.Tensor, Q: torch.Tensor) -> float:
    """The same for many rows at once, of which only Σ w·rrᵀ (d, d) is known."""
    D = T - map_of(None, len(T))
    moved, whole = ((D.T @ Q @ D) * statistics).sum(), (Q * statistics).sum()
    return float((moved.clamp_min(0) / whole.clamp_min(1e-30)).sqrt())


def relative_margin(T: torch.Tensor, one: torch.Tensor, Q: torch.Tensor, rows: torch.Tensor) -> float | None:
    """The smallest margin of these rows, relative to the unedited model's."""
    ratio = float((margin(T, Q, rows) / margin(one, Q, rows)).min())
    return None if ratio == float("inf") else round(ratio, 3)


def map_energy(T: torch.Tensor, Q: torch.Tensor) -> float:
    """Σ‖W T‖² over all layers."""
    return float(((Q @ T) * T).sum())


def _heaviest(rows: RowPairs, most: int = 4) -> torch.Tensor:
    return rows.weights.argsort(descending=True, stable=True)[:most]


def _drifts(problem: Problem, T: torch.Tensor, Q: torch.Tensor) -> list[PromptDrift]:
    """For each preserved prompt the largest drift of its rows, and of the rows of each name, in the order given."""
    drifts = drift(problem.preserved.double(), T, Q)
    worst: dict[str, dict[str, float]] = {}
    for label, name, value in zip(problem.labels, problem.held, drifts.tolist(), strict=True):
        rows = worst.setdefault(label, {})
        rows[name] = max(rows.get(name, 0.0), round(value, 5))
    return [
        {"prompt": label, "moved": max(rows.values()), "rows": [{"row": n, "moved": m} for n, m in rows.items() if n]}
        for label, rows in worst.items()
    ]


def _rounded(value: torch.Tensor | float) -> float:
    return round(float(value), 5)
