"""Factors from the other kinds of low-rank changes."""

from __future__ import annotations

import pytest
import torch
from comfyui_concepts.methods.lora import kronecker, lokr_factors


def _matrix(rows: int, columns: int, transposed: bool, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if transposed:
        return torch.randn(columns, rows, generator=generator, dtype=torch.float64).T
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def _by_sums(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return torch.einsum("ab,cd->acbd", first, second).reshape(len(first) * len(second), -1)


@pytest.mark.parametrize("transposed", [(False, False), (True, False), (False, True), (True, True)], ids=str)
def test_factors_of_a_kronecker_product_may_have_any_strides(transposed):
    """torch 2.14.1's own raises for those of a transposed matrix."""
    first, second = _matrix(2, 3, transposed[0], 1), _matrix(4, 5, transposed[1], 2)
    torch.testing.assert_close(kronecker(first, second), _by_sums(first, second), rtol=0, atol=1e-12)
    w1a, w1b = _matrix(4, 2, transposed[0], 3), _matrix(2, 3, transposed[0], 4)
    w2a, w2b = _matrix(5, 2, transposed[1], 5), _matrix(2, 6, transposed[1], 6)
    factors = lokr_factors((w1a, w1b), (w2a, w2b), None)
    torch.testing.assert_close(factors.up @ factors.down, _by_sums(w1a @ w1b, w2a @ w2b), rtol=0, atol=1e-12)
