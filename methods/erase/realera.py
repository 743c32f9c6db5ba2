"""RealEra-style erasure (2410.09140): also erases the neighbourhood of a concept, and preserves what lies beyond it.

Differs from the paper: it gives no constants and no code, so the way of sampling is another. Neighbours drawn evenly in
all directions would add a multiple of I to A and nothing on the other side, which only shrinks every weight. They are
drawn along the differences between the concept and its other names and sentences instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .problem import Problem, Solution, SolverSettings
from .rows import RowPairs, joined_rows
from .solve import scaled_ridge, system, uce

_BEYOND = 2  # directions that are preserved for every neighbour that is erased, as many as the paper's figure shows
_TRIES = 64
_NAMED = 8  # preserved prompts that a note names


def realera(problem: Problem, settings: SolverSettings) -> Solution:
    """UCE on the concepts and on neighbours sampled around each of their rows; rows beyond these are preserved."""
    generator = torch.Generator().manual_seed(settings.seed)
    near, beyond, notes, shells = [], [], [], []  # saved files contain the words of notes
    for rows, (variants, numbers) in zip(problem.erased, problem.variants, strict=True):
        if not len(variants):
            notes.append("a concept has one sentence and no other names, so that it has no neighbours")
            continue
        shells.append(_shell_of(rows, variants.double(), numbers, settings.reach))
        inside, outside = _sampled_neighbours(rows, shells[-1], settings, generator)
        near.append(inside)
        beyond.append(outside)
    notes += _preserved_within(problem, shells)
    erased = joined_rows([*problem.erased, *near])
    preserved = torch.cat([problem.preserved.double(), *beyond])
    each = float(torch.cat([r.weights for r in problem.erased]).mean()) / max(_BEYOND * settings.neighbours, 1)
    more = torch.full((len(preserved) - len(problem.preserved),), each).double()
    weights = torch.cat([problem.preserved_weights.double(), more])
    wider = problem._replace(preserved=preserved, preserved_weights=weights)
    ridge = scaled_ridge(settings.ridge or 0, joined_rows(problem.erased).C)
    given = (erased, *wider.preserved_terms(settings.preserve_weight or 0, ridge))
    return Solution(uce(*given), system(*given), notes=tuple(notes))


class _Shell(NamedTuple):
    """The neighbourhood of a concept's ``rows`` (their numbers) that is erased with it.

    It reaches from their ``centres`` (n, d) as far as ``farthest`` (D1), down to the cosine ``smallest`` (S1).
    ``factor`` is L (d, k) with LLᵀ the covariance of the variants.
    """

    rows: list[int]
    centres: torch.Tensor
    farthest: float
    smallest: float
    factor: torch.Tensor

    def contains(self, c: torch.Tensor, near: torch.Tensor) -> torch.Tensor:
        """Which of the rows ``near`` (m, d) lie within the shell of one centre c (d,), (m,)."""
        close = (near - c).norm(dim=1) <= self.farthest
        return close & (torch.cosine_similarity(near, c[None], dim=1) >= self.smallest)


def _shell_of(rows: RowPairs, variants: torch.Tensor, numbers: torch.Tensor, reach: float) -> _Shell:
    """The shell as far as the farthest variant, times ``reach``; ``numbers`` says which row each variant varies."""
    centres = rows.C[numbers].double()
    eta, closeness = variants - centres, torch.cosine_similarity(variants, centres, dim=1)
    varied = sorted(set(numbers.tolist()))
    smallest = 1 - (1 - float(closeness.min())) * reach
    farthest = float(eta.norm(dim=1).max()) * reach
    return _Shell(varied, rows.C[varied].double(), farthest, smallest, eta.T / len(eta) ** 0.5)


def _sampled_neighbours(
    rows: RowPairs, shell: _Shell, settings: SolverSettings, generator: torch.Generator
) -> tuple[RowPairs, torch.Tensor]:
    """Neighbours within the shell of every row that has variants, and rows (m, d) outside it."""
    C, G, weights, beyond = [], [], [], []
    for row, c in zip(shell.rows, shell.centres, strict=True):
        samples = structured_offsets(shell.factor, _TRIES * settings.neighbours // 16, generator)
        inside = (c + samples)[shell.contains(c, c + samples)][: settings.neighbours]
        C.append(inside)
        G.append(rows.G[row].expand(len(inside), -1))
        weights.append((rows.weights[row] / max(len(inside), 1)).expand(len(inside)))
        away = samples * (2 * shell.farthest / samples.norm(dim=1, keepdim=True).clamp_min(1e-12))
        beyond.append((c + away)[:_BEYOND])
    return RowPairs(torch.cat(C), torch.cat(G), torch.cat(weights)), torch.cat(beyond)


def _preserved_within(problem: Problem, shells: Sequence[_Shell]) -> list[str]:
    """A note that names the preserved prompts with a row inside a shell: they are pulled both ways."""
    preserved = problem.preserved.double()
    inside = torch.zeros(len(preserved), dtype=torch.bool)
    for shell in shells:
        for c in shell.centres:
            inside |= shell.contains(c, preserved)
    names = dict.fromkeys(label for label, within in zip(problem.labels, inside.tolist(), strict=False) if within)
    if not names:
        return []
    some = ", ".join(f"'{name}'" for name in list(names)[:_NAMED]) + (" …" if len(names) > _NAMED else "")
    return [f"kept, and within the neighbourhood that is erased: {some}; lower the reach, or see whether they move"]


def structured_offsets(factor: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """η = Lz, (count, d), for L (d, k)."""
    z = torch.randn(count, factor.shape[1], generator=generator, dtype=factor.dtype)
    return z @ factor.T
