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

    Influence is ‖W·M·r‖ over all layers. Neighbours r + z·v lie along the direction v that the layers read least:
    they mean about the same to the model. None is written out, since there are ten times as many.
    """
    edit, Q = _unpreserved(problem), problem.Q()
    rows, weights = problem.preserved.double(), problem.preserved_weights.double()
    moved = row_energy(rows @ edit.down.T, edit.up.T @ Q @ edit.up).sqrt()
    rows, weights = rows[moved >= moved.mean()], weights[moved >= moved.mean()]
    v = _upright(torch.linalg.eigh(Q).eigenvectors[:, 0])
    z = torch.randn(_DRAWS, len(rows), generator=torch.Generator().manual_seed(seed), dtype=rows.dtype)
    z *= rows.norm(dim=1).mean() / REFERENCE_NORM
    moved = _moved_beside(edit, Q, rows, v, z)
    near = weights * (moved >= moved.mean())  # (draws, rows)
    side = (near * z).sum(0) @ rows
    total = gram(rows, weights + near.sum(0)) + torch.outer(side, v) + torch.outer(v, side)
    return (total + (near * z.square()).sum() * torch.outer(v, v)) / (weights.sum() + near.sum())


def _moved_beside(edit: LowRank, Q: torch.Tensor, rows: torch.Tensor, v: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """The influence of every r + z·v, (draws, rows)."""
    S = edit.up.T @ Q @ edit.up  # (rank, rank)
    read, beside = rows @ edit.down.T, edit.down @ v
    energy = row_energy(read, S) + 2 * z * (read @ S @ beside) + z.square() * (beside @ S @ beside)
    return energy.clamp_min(0).sqrt()


def _upright(direction: torch.Tensor) -> torch.Tensor:
    """One of a direction's two senses: which of them an eigenvector comes in differs between processors."""
    return direction * direction[direction.abs().argmax()].sign()


def _unpreserved(problem: Problem) -> LowRank:
    """The edit that preserves nothing: (Σ gcᵀ − Σ ccᵀ)(Σ ccᵀ + λI)⁻¹."""
    rows = joined_rows(problem.erased)
    mean = RowPairs(rows.C, rows.G, rows.weights / rows.weights.sum())
    return uce(mean, problem.preserved[:0], problem.preserved_weights[:0], scaled_ridge(_RIDGE, rows.C))
