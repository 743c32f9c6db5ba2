"""Fewer ranks for an edit of many rows, with the least loss where the data lies."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .lowrank import LowRank
from .problem import Solution

FEW = 8
"""Up to this rank nothing is cut."""
LOSS, CAP = 0.03, 32
AUTOMATIC, WHOLE = -1, 0


class Truncated(NamedTuple):
    """The shorter matrix, and the share of its weighted energy that is lost."""

    M: LowRank
    lost: float


def truncate(
    M: LowRank, A: torch.Tensor, Q: torch.Tensor, loss: float = LOSS, cap: int = CAP, rank: int | None = None
) -> Truncated:
    """The M of least rank that acts on the data nearly as the full one: min Σ‖W(M − Mᵣ)A^½‖.

    With Q = RᵀR and A = LLᵀ this is an ordinary SVD of R·M·L.

    Args:
        A: the solve's λI + Σ s·ccᵀ + Σ w·ppᵀ, (d, d), positive definite.
        Q: Σ WᵀW, (d, d).
        loss: the largest share of weighted energy to lose; ``rank`` sets the rank itself.
    """
    if rank is None and M.rank <= FEW:
        return Truncated(M, 0.0)
    R, L = _root(Q).T, _root(A)
    left, left_rest = torch.linalg.qr(R @ M.up.double())  # thin: the middle is as small as the rank
    right, right_rest = torch.linalg.qr((M.down.double() @ L).T)
    U, values, Vh = torch.linalg.svd(left_rest @ right_rest.T)
    U, Vh = left @ U, Vh @ right.T
    shares = values.square().cumsum(0) / values.square().sum().clamp_min(1e-300)
    target = rank if rank is not None else int((1 - shares > loss**2).sum()) + 1
    r = max(1, min(target, cap if rank is None else target, M.rank))
    up = torch.linalg.solve_triangular(R, U[:, :r] * values[:r], upper=True)
    down = torch.linalg.solve_triangular(L.T, Vh[:r].T, upper=True).T
    return Truncated(LowRank(up.contiguous(), down.contiguous()), float((1 - shares[r - 1]).clamp_min(0).sqrt()))


def _root(matrix: torch.Tensor) -> torch.Tensor:
    """The lower Cholesky factor. A little of the identity is added, for matrices that are only semi-definite."""
    matrix = matrix.double()
    little = 1e-10 * float(matrix.diagonal().mean()) * torch.eye(len(matrix), dtype=matrix.dtype)
    return torch.linalg.cholesky(matrix + little)


def shortened_solution(solution: Solution, Q: torch.Tensor, rank: int) -> Truncated:
    """M with at most ``rank`` ranks, without those that hardly matter (``AUTOMATIC``), or with all (``WHOLE``)."""
    if rank == WHOLE or solution.M.rank == 0:
        return Truncated(solution.M, 0.0)
    return truncate(solution.M, solution.A, Q, rank=None if rank == AUTOMATIC else rank)
