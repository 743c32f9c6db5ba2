"""SPEED (2503.07392, ICLR 2026): the null space of a refined set of preserved rows."""

from __future__ import annotations

import torch

from .lowrank import LowRank
from .null_space import solved_within
from .problem import Problem, Solution, SolverSettings
from .regenerate import row_energy
from .rows import RowPairs, joined_rows
from .solve import REFERENCE_NORM, gram, scaled_ridge, uce

_RIDGE = 1.0  # of the edit that says how much a preserved row would suffer
_DRAWS = 10  # of noise, per row


def speed(problem: Problem, settings: SolverSettings) -> Solution:
    """``null_space``, of those preserved rows that an edit without any preservation would move most.

    Rows that it hardly moves need no protection, and would only leave less room for the erasure.

    Differs from the paper: it refines the rows for each layer, and here all layers share one solve, so their energy Q
    stands for a layer's weight. What the paper multiplies by 1 is relative to the size of the rows.
    """
    return solved_within(problem, settings, refined_gram(problem, settings.seed))


def refined_gram(problem: Problem, seed: int) -> torch.Tensor:
    """The mean Gram matrix (d, d) of the rows of more than mean influence, and of such neighbours of theirs.

    Neighbours lie along the direction that the layers read least: they mean about the same to the model.
    """
    edit, Q = _unpreserved(problem), problem.Q()
    rows, weights = problem.preserved.double(), problem.preserved_weights.double()
    moved = influence(edit, Q, rows)
    rows, weights = rows[moved >= moved.mean()], weights[moved >= moved.mean()]
    least_read = _upright(torch.linalg.eigh(Q).eigenvectors[:, 0])
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(_DRAWS, len(rows), 1, generator=generator, dtype=rows.dtype)
    noise *= rows.norm(dim=1).mean() / REFERENCE_NORM
    moved = torch.stack([influence(edit, Q, rows + z * least_read) for z in noise])  # (draws, rows)
    total, count = gram(rows, weights), weights.sum()
    for z, near in zip(noise, weights * (moved >= moved.mean()), strict=True):  # one draw at a time: they are many
        total, count = total + gram(rows + z * least_read, near), count + near.sum()
    return total / count


def _upright(direction: torch.Tensor) -> torch.Tensor:
    """One of a direction's two senses: which of them an eigenvector comes in differs between processors."""
    return direction * direction[direction.abs().argmax()].sign()


def influence(edit: LowRank, Q: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """‖W·M·r‖ over all layers: how far an edit moves the keys and values of each row, (n,)."""
    return row_energy(edit(rows), Q).sqrt()


def _unpreserved(problem: Problem) -> LowRank:
    """The edit that preserves nothing: (Σ gcᵀ − Σ ccᵀ)(Σ ccᵀ + λI)⁻¹."""
    rows = joined_rows(problem.erased)
    mean = RowPairs(rows.C, rows.G, rows.weights / rows.weights.sum())
    return uce(mean, problem.preserved[:0], problem.preserved_weights[:0], scaled_ridge(_RIDGE, rows.C))
