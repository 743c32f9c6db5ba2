"""RealEra-style erasure (2410.09140): the neighbourhood of a concept goes with it, and what lies beyond is held.

The paper gives no constants and no code; the sampling below is ours. Neighbours drawn evenly in all directions would add
a multiple of I to A without its counterpart, which only shrinks every weight; so they are drawn along the differences
between the concept and its other names and sentences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .problem import Problem, Solution, SolverSettings
from .rows import RowPairs, joined_rows
from .solve import scaled_ridge, system, uce

_BEYOND = 2  # directions that are held for every neighbour that is erased, as many as the paper's figure shows
_TRIES = 64
_NAMED = 8  # kept prompts that a note names


def realera(problem: Problem, settings: SolverSettings) -> Solution:
    """UCE on the concepts, on neighbours sampled round each of their rows, and with rows beyond these held."""
    generator = torch.Generator().manual_seed(settings.seed)
    near, beyond, notes, shells = [], [], [], []
    for rows, (alike, stands_for) in zip(problem.erased, problem.variants, strict=True):
        if not len(alike):
            notes.append("a concept has one sentence and no other names, so that it has no neighbours")
            continue
        shells.append(_shell(rows, alike.double(), stands_for, settings.reach))
        inside, outside = _around(rows, shells[-1], settings, generator)
        near.append(inside)
        beyond.append(outside)
    notes += _kept_within(problem, shells)
    erased = joined_rows([*problem.erased, *near])
    held = torch.cat([problem.preserved.double(), *beyond])
    each = float(torch.cat([r.weights for r in problem.erased]).mean()) / max(_BEYOND * settings.neighbours, 1)
    weights = torch.cat(
        [problem.preserved_weights.double(), torch.full((len(held) - len(problem.preserved),), each).double()]
    )
    ridge = scaled_ridge(settings.ridge or 0, joined_rows(problem.erased).C)
    given = (erased, held, weights * (settings.preserve_weight or 0), ridge, problem.statistics)
    return Solution(uce(*given), system(*given), notes=tuple(notes))


class _Shell(NamedTuple):
    """What lies round the ``rows`` of a concept (by number, with ``centres`` (n, d)) and goes with it: no farther than D1 and
    no less alike than S1. ``factor`` is L (d, k) with LLᵀ the covariance of what else stands for them."""

    rows: list[int]
    centres: torch.Tensor
    farthest: float
    smallest: float
    factor: torch.Tensor

    def holds(self, c: torch.Tensor, near: torch.Tensor) -> torch.Tensor:
        """Which of the rows ``near`` (m, d) lie within the shell of one centre c (d,), (m,)."""
        close = (near - c).norm(dim=1) <= self.farthest
        return close & (torch.cosine_similarity(near, c[None], dim=1) >= self.smallest)


def _shell(rows: RowPairs, alike: torch.Tensor, stands_for: torch.Tensor, reach: float) -> _Shell:
    """As wide as to the farthest thing that is to go, times the reach."""
    centres = rows.C[stands_for].double()
    eta, closeness = alike - centres, torch.cosine_similarity(alike, centres, dim=1)
    numbers = sorted(set(stands_for.tolist()))
    smallest = 1 - (1 - float(closeness.min())) * reach
    return _Shell(
        numbers, rows.C[numbers].double(), float(eta.norm(dim=1).max()) * reach, smallest, eta.T / len(eta) ** 0.5
    )


def _around(
    rows: RowPairs, shell: _Shell, settings: SolverSettings, generator: torch.Generator
) -> tuple[RowPairs, torch.Tensor]:
    """Neighbours within the shell of every row that something else stands for, and rows (m, d) outside it."""
    C, G, weights, beyond = [], [], [], []
    for row, c in zip(shell.rows, shell.centres, strict=True):
        samples = structured_offsets(shell.factor, _TRIES * settings.neighbours // 16, generator)
        chosen = (c + samples)[shell.holds(c, c + samples)][: settings.neighbours]
        C.append(chosen)
        G.append(rows.G[row].expand(len(chosen), -1))
        weights.append((rows.weights[row] / max(len(chosen), 1)).expand(len(chosen)))
        away = samples * (2 * shell.farthest / samples.norm(dim=1, keepdim=True).clamp_min(1e-12))
        beyond.append((c + away)[:_BEYOND])
    return RowPairs(torch.cat(C), torch.cat(G), torch.cat(weights)), torch.cat(beyond)


def _kept_within(problem: Problem, shells: Sequence[_Shell]) -> list[str]:
    """A note that names the kept prompts with a row inside a shell: they are pulled both ways."""
    kept = problem.preserved.double()
    inside = torch.zeros(len(kept), dtype=torch.bool)
    for shell in shells:
        for c in shell.centres:
            inside |= shell.holds(c, kept)
    names = dict.fromkeys(label for label, within in zip(problem.labels, inside.tolist(), strict=False) if within)
    if not names:
        return []
    some = ", ".join(f"'{name}'" for name in list(names)[:_NAMED]) + (" …" if len(names) > _NAMED else "")
    return [f"kept, and within the neighbourhood that is erased: {some}; lower the reach, or see whether they move"]


def structured_offsets(factor: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """η = Lz, (count, d), for L (d, k)."""
    z = torch.randn(count, factor.shape[1], generator=generator, dtype=factor.dtype)
    return z @ factor.T


def expectation(rows: RowPairs, factor: torch.Tensor, count: float) -> RowPairs:
    """What ``count`` samples e + Lz of every row come to on average, as rows: the row itself and, since
    E[(e+η)(e+η)ᵀ] = eeᵀ + LLᵀ and E[a(e+η)ᵀ] = aeᵀ, the columns of L as directions that become nothing."""
    total = count * float(rows.weights.sum())
    directions = factor.T
    return joined_rows([
        RowPairs(rows.C, rows.G, rows.weights * count),
        RowPairs(directions, torch.zeros_like(directions), torch.full((len(directions),), total, dtype=factor.dtype)),
    ])  # fmt: skip
