"""The closed form that UCE, RECE and RealEra share: one small solve in float64, the same for every layer."""

from __future__ import annotations

import logging

import torch

from .lowrank import LowRank
from .rows import RowPairs

log = logging.getLogger(__name__)

_JITTER = 1e-10  # of the mean of A's diagonal, when rounding makes a Gram matrix indefinite
REFERENCE_NORM = 27.0
"""Norm of an SD 1.x token row. Ridges are given for it and scaled to the actual rows; they mean the same in SDXL."""


def gram(rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Σ w·r·rᵀ, (d, d), of rows (n, d) with weights (n,)."""
    return rows.T @ (weights[:, None] * rows)


def scaled_ridge(ridge: float, rows: torch.Tensor) -> float:
    """λ for rows of this norm: λ · mean‖c‖² / 27²."""
    return ridge * float(rows.double().square().sum(1).mean()) / REFERENCE_NORM**2


def uce(
    erased: RowPairs,
    preserved: torch.Tensor,
    preserved_weights: torch.Tensor,
    ridge: float,
    statistics: torch.Tensor | None = None,
) -> LowRank:
    """M of T = I + M, of rank n in float64: takes each erased row to its anchor (UCE, 2308.14761, eq. 7).

    Minimises Σ s‖W(Tc − g)‖² + Σ w‖W(T − I)p‖² + λ‖W(T − I)‖² for every W at once; in delta form
    M = Σ s(g − c)cᵀ · A⁻¹ with A = λI + Σ s·ccᵀ + Σ w·ppᵀ. Equal rows and an empty list therefore change exactly
    nothing.

    Args:
        erased: rows (n, d) and their anchors.
        preserved: rows that must not move, (m, d), with weights (m,).
        ridge: λ > 0.
        statistics: a further Σ w·ppᵀ (d, d) of preserved rows, such as one of a large corpus.
    """
    C, G, s = (t.double() for t in erased)
    root = s.sqrt()[:, None]
    solved = _solve(C * root, preserved.double() * preserved_weights.double().sqrt()[:, None], float(ridge), statistics)
    return LowRank(((G - C) * root).T.contiguous(), solved.T.contiguous())


def system(
    erased: RowPairs,
    preserved: torch.Tensor,
    preserved_weights: torch.Tensor,
    ridge: float,
    statistics: torch.Tensor | None = None,
) -> torch.Tensor:
    """A = λI + Σ s·ccᵀ + Σ w·ppᵀ, (d, d): how much every direction of the embedding is used."""
    A = gram(erased.C.double(), erased.weights.double()) + gram(preserved.double(), preserved_weights.double())
    A = A if statistics is None else A + statistics.double()
    return A + ridge * torch.eye(len(A), dtype=A.dtype)


def _solve(C: torch.Tensor, P: torch.Tensor, ridge: float, statistics: torch.Tensor | None) -> torch.Tensor:
    """A⁻¹Cᵀ, (d, n), of rows times the root of their weight: by Woodbury if there are fewer rows than dimensions."""
    if ridge <= 0:
        raise ValueError(f"The ridge must be above 0, and it is {ridge}; start with 0.5.")
    if statistics is None and len(C) + len(P) < C.shape[1]:
        return woodbury(torch.cat([C, P]), ridge)[:, : len(C)]
    A = C.T @ C + P.T @ P
    if statistics is not None:
        A = A + statistics.double()
    return cholesky(A, C.T, ridge)


def cholesky(A: torch.Tensor, right: torch.Tensor, ridge: float) -> torch.Tensor:
    """(λI + A)⁻¹ · right, (d, n), for a positive semi-definite A."""
    A = A + ridge * torch.eye(len(A), dtype=A.dtype)
    factor, failed = torch.linalg.cholesky_ex(A)
    if failed:
        jitter = _JITTER * float(A.diagonal().mean())
        log.info("A Gram matrix was indefinite after rounding; its diagonal was raised by %.1e.", jitter)
        factor = torch.linalg.cholesky(A + jitter * torch.eye(len(A), dtype=A.dtype))
    return torch.cholesky_solve(right, factor)


def woodbury(rows: torch.Tensor, ridge: float) -> torch.Tensor:
    """(λI + RᵀR)⁻¹Rᵀ = Rᵀ(λI + RRᵀ)⁻¹, (d, n), of rows R (n, d): as many unknowns as rows, and nothing divided by λ."""
    small = rows @ rows.T + ridge * torch.eye(len(rows), dtype=rows.dtype)
    return torch.cholesky_solve(rows, torch.linalg.cholesky(small)).T
