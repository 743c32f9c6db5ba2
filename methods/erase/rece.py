"""RECE (2407.12383): find what brings the concept back after the edit, erase that too, and again."""

from __future__ import annotations

import torch

from .lowrank import LowRank, followed_by
from .problem import Problem, Solution, SolverSettings
from .regenerate import map_of, regenerated_rows, shortfall
from .rows import RowPairs, joined_rows
from .solve import scaled_ridge, system, uce


def cumulative(problem: Problem, settings: SolverSettings) -> Solution:
    """All embeddings found so far are erased together with the concept, from the unedited weights each time.

    Differs from the paper: it solves each epoch on top of the one before (``sequential``). The later epochs then undo
    the first, because each preserves what the one before has changed.

    A found embedding counts min(1, ‖c‖²/‖c'‖²) of its concept's weight. It is long and would otherwise outweigh
    everything.
    """
    concept, Q = joined_rows(problem.erased), problem.Q()
    ridge = scaled_ridge(settings.ridge or 0, concept.C)
    kept = problem.preserved_terms(settings.preserve_weight or 0, ridge)
    every, residuals = concept, []
    M = uce(every, *kept)
    for _ in range(settings.epochs):
        T = map_of(M, problem.width)
        found = regenerated_rows(T, Q, concept.C, settings.regeneration)
        residuals.append(float(shortfall(T, Q, concept.C, found).mean()))
        shorter = (concept.C.square().sum(1) / found.square().sum(1).clamp_min(1e-30)).clamp(max=1)
        every = joined_rows([every, RowPairs(found, concept.G, concept.weights * shorter)])
        M = uce(every, *kept)
    A = system(every, *kept)
    return Solution(M, A, (*residuals, _residual(M, Q, concept, settings)))


def sequential(problem: Problem, settings: SolverSettings) -> Solution:
    """The paper's own order: each epoch edits the weights of the one before, with these as its reference."""
    concept, Q = joined_rows(problem.erased), problem.Q()
    ridge = scaled_ridge(settings.ridge or 0, concept.C)
    kept = problem.preserved_terms(settings.preserve_weight or 0, ridge)
    M = uce(concept, *problem.preserved_terms(1.0, scaled_ridge(_UCE_RIDGE, concept.C)))
    every, residuals = concept, []
    for _ in range(settings.epochs):
        T = map_of(M, problem.width)
        found = regenerated_rows(T, Q, concept.C, settings.regeneration)
        residuals.append(float(shortfall(T, Q, concept.C, found).mean()))
        every = joined_rows([every, RowPairs(found, concept.G, concept.weights)])
        step = uce(RowPairs(found, concept.G, concept.weights), *kept)
        M = followed_by(M, step)
    A = system(every, *kept)
    return Solution(M, A, (*residuals, _residual(M, Q, concept, settings)))


_UCE_RIDGE = 0.5  # the paper starts from a UCE edit with that method's own values


def _residual(M: LowRank, Q: torch.Tensor, concept: RowPairs, settings: SolverSettings) -> float:
    T = map_of(M, len(Q))
    found = regenerated_rows(T, Q, concept.C, settings.regeneration)
    return float(shortfall(T, Q, concept.C, found).mean())
