"""What an edit does to the keys and values of a model, in numbers; nothing is drawn for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .problem import Problem, Solution
from .regenerate import map_of, margin, row_energy
from .rows import RowPairs
from .truncate import Truncated


def measure(
    problem: Problem, names: Sequence[str], solution: Solution, short: Truncated, *, margins: bool = True
) -> dict[str, Any]:
    """The report of an edit, in values JSON knows.

    ``concepts``: for each what is left of it (``left``: the distance of its keys and values from the anchor's, relative to the
    unedited distance; mean, and ``most`` over its tokens) and its ``margin`` over the unedited model's (how much longer an
    embedding must be to bring it back; None is beyond measure; only with ``margins``). ``kept``: how far each kept prompt moved, relative to its
    size. ``regeneration``: RECE's residual before each epoch and at the end.
    """
    T, one, Q = map_of(short.M, problem.width), map_of(None, problem.width), problem.Q()
    concepts = [
        {"concept": name, **left_of(rows, T, Q)}
        | ({"margin": relative_margin(T, one, Q, rows.C[_heaviest(rows)])} if margins else {})
        for name, rows in zip(names, problem.erased, strict=True)
    ]
    return {
        "concepts": concepts, "kept": _drifts(problem, T, Q), "rank": short.M.rank, "rows": sum(map(len, problem.erased)),
        "lost": round(short.lost, 5), "regeneration": [round(r, 4) for r in solution.regeneration],
        "change": _number((map_energy(T - one, Q) / map_energy(one, Q)) ** 0.5), "notes": list(solution.notes),
    }  # fmt: skip


def left_of(rows: RowPairs, T: torch.Tensor, Q: torch.Tensor) -> dict[str, float]:
    """The residual of a concept's rows, mean by weight and largest: 0 is the anchor, 1 is as if nothing had been done."""
    before = row_energy(rows.C - rows.G, Q).sqrt().clamp_min(1e-30)
    left = row_energy(rows.C @ T.T - rows.G, Q).sqrt() / before
    return {"left": _number((left * rows.weights).sum() / rows.weights.sum()), "most": _number(left.max())}


def drift(rows: torch.Tensor, T: torch.Tensor, Q: torch.Tensor) -> torch.Tensor:
    """How far the keys and values of each row move, relative to their size, (n,)."""
    return row_energy(rows @ T.T - rows, Q).sqrt() / row_energy(rows, Q).sqrt().clamp_min(1e-30)


def relative_margin(T: torch.Tensor, one: torch.Tensor, Q: torch.Tensor, rows: torch.Tensor) -> float | None:
    """The smallest margin of these rows over that of the unedited model."""
    ratio = float((margin(T, Q, rows) / margin(one, Q, rows)).min())
    return None if ratio == float("inf") else round(ratio, 3)


def map_energy(T: torch.Tensor, Q: torch.Tensor) -> float:
    """Σ‖W T‖² over all layers."""
    return float(((Q @ T) * T).sum())


def _heaviest(rows: RowPairs, most: int = 4) -> torch.Tensor:
    return rows.weights.argsort(descending=True, stable=True)[:most]


def _drifts(problem: Problem, T: torch.Tensor, Q: torch.Tensor) -> list[dict[str, Any]]:
    """For each kept prompt the largest drift of its rows, in the order given."""
    moved = drift(problem.preserved.double(), T, Q)
    worst: dict[str, float] = {}
    for label, value in zip(problem.labels, moved.tolist(), strict=True):
        worst[label] = max(worst.get(label, 0.0), value)
    return [{"prompt": label, "moved": round(value, 5)} for label, value in worst.items()]


def _number(value: torch.Tensor | float) -> float:
    return round(float(value), 5)
