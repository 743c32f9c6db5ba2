"""What a LoRA adds to the output of one layer, ``scale · up(down(x))``, in each of its forms."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.functional import linear


class LoraFactors(NamedTuple):
    """The factors of one layer.

    ``down`` is (rank, in) for a Linear and (rank, in, kh, kw) for a convolution; ``up`` is (out, rank). Without ``up``,
    ``down`` is the whole change, (out, in[, kh, kw]): for forms whose rank is not low.
    """

    down: torch.Tensor
    up: torch.Tensor | None
    scale: float

    def to(self, like: torch.Tensor) -> LoraFactors:
        """The same factors with the dtype and device of ``like``."""
        return LoraFactors(self.down.to(like), None if self.up is None else self.up.to(like), self.scale)


def low_rank_change(x: torch.Tensor, down: torch.Tensor, up: torch.Tensor | None) -> torch.Tensor:
    """``up(down(x))`` of a Linear: (…, in) to (…, out). The dtypes agree."""
    hidden = linear(x, down)  # (…, rank), or the whole change
    return hidden if up is None else linear(hidden, up)


def lora_factors(
    up: torch.Tensor, down: torch.Tensor, alpha: float | None, middle: torch.Tensor | None = None
) -> LoraFactors:
    """LoRA and LoCon. The middle factor of a Tucker form goes into ``down``: three convolutions become two."""
    rank = down.shape[0]
    if middle is not None:
        down = torch.einsum("rj...,jc->rc...", middle.double(), down.flatten(1).double()).to(down.dtype)
    return LoraFactors(down, up, _scale(alpha, rank))


def loha_factors(
    first: tuple[torch.Tensor, torch.Tensor], second: tuple[torch.Tensor, torch.Tensor], alpha: float | None
) -> LoraFactors:
    """LoHa, (w1a w1b) ∘ (w2a w2b), of rank r1 r2: row-wise and column-wise products (2108.06098, prop. 1)."""
    (w1a, w1b), (w2a, w2b) = first, second
    up = (w1a[:, :, None] * w2a[:, None, :]).flatten(1)
    down = (w1b[:, None, :] * w2b[None, :, :]).flatten(0, 1)
    return LoraFactors(down, up, _scale(alpha, w1b.shape[0]))


def lokr_factors(
    first: tuple[torch.Tensor, torch.Tensor], second: tuple[torch.Tensor, torch.Tensor], alpha: float | None
) -> LoraFactors:
    """LoKr, w1 ⊗ w2: low-rank if both are, since (a b) ⊗ (c d) = (a ⊗ c)(b ⊗ d)."""
    (w1a, w1b), (w2a, w2b) = first, second
    return LoraFactors(torch.kron(w1b, w2b), torch.kron(w1a, w2a), _scale(alpha, w2b.shape[0]))


def _scale(alpha: float | None, rank: int) -> float:
    return 1.0 if alpha is None else alpha / rank


def fitted(factors: LoraFactors, dimensions: int) -> LoraFactors:
    """The factors in the shapes of a layer whose weight has 2 (Linear) or 4 (convolution) dimensions."""
    down = factors.down
    if down.ndim == 2:
        down = down.reshape(down.shape[:2] + (1,) * (dimensions - 2))
    down = down.flatten(1) if dimensions == 2 else down
    return LoraFactors(down, None if factors.up is None else factors.up.flatten(1), factors.scale)


def shape_of(factors: LoraFactors) -> tuple[int, ...]:
    """The shape of the weight they change."""
    return (factors.down.shape[0] if factors.up is None else factors.up.shape[0], *factors.down.shape[1:])
