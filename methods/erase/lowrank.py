"""Matrices stored as the product of two thin factors."""

from __future__ import annotations

from typing import NamedTuple

import torch


class LowRank(NamedTuple):
    """The matrix ``up @ down``: ``up`` is (out, rank), ``down`` is (rank, in). Rank 0 is the zero matrix."""

    up: torch.Tensor
    down: torch.Tensor

    @property
    def rank(self) -> int:
        return self.up.shape[1]

    @property
    def width(self) -> int:
        """How many columns the matrix has."""
        return self.down.shape[1]

    def matrix(self) -> torch.Tensor:
        """The matrix itself, (out, in)."""
        return self.up @ self.down

    def to(self, dtype: torch.dtype) -> LowRank:
        """The same matrix with factors of that type."""
        return LowRank(self.up.to(dtype), self.down.to(dtype))

    def times(self, factor: float) -> LowRank:
        """The matrix scaled."""
        return LowRank(self.up * factor, self.down)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The matrix applied to the last axis: (…, in) to (…, out)."""
        return (x @ self.down.T.to(x)) @ self.up.T.to(x)


def total(first: LowRank, second: LowRank) -> LowRank:
    """The sum of two matrices: their ranks add up."""
    return LowRank(torch.cat([first.up, second.up], 1), torch.cat([first.down, second.down], 0))


def followed_by(first: LowRank, second: LowRank) -> LowRank:
    """M of ``(I + first)(I + second) = I + M``: weights edited by ``first``, then by ``second``. Rank is the sum of
    ranks.

    W(I + U₁V₁)(I + U₂V₂) = W(I + U₁V₁ + (U₂ + U₁V₁U₂)V₂).
    """
    return total(first, LowRank(second.up + first.up @ (first.down @ second.up), second.down))


def balanced_factors(matrix: LowRank) -> LowRank:
    """The same matrix with orthogonal factors of equal size, which lose least in half precision: nothing cancels."""
    left, left_rest = torch.linalg.qr(matrix.up.double())
    right, right_rest = torch.linalg.qr(matrix.down.double().T)
    U, values, Vh = torch.linalg.svd(left_rest @ right_rest.T, full_matrices=False)
    root = values.sqrt()
    return LowRank((left @ U * root).to(matrix.up), (root[:, None] * Vh @ right.T).to(matrix.down))
