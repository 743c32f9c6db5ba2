"""What a LoRA adds to the output of one layer, ``scale · up(down(x))``, in each of its forms."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch.nn.functional import linear


class Span(NamedTuple):
    """Some outputs of a layer, such as the queries of a fused matrix: the first one, and how many."""

    start: int
    length: int


class LoraFactors(NamedTuple):
    """The factors of one layer.

    ``down`` is (rank, in) for a Linear and (rank, in, kh, kw) for a convolution; ``up`` is (out, rank). Without ``up``,
    ``down`` is the whole change, (out, in[, kh, kw]) or a norm's (channels,): for forms whose rank is not low. ``bias``
    is added to the output as it is, (out,). Without a change of the weight, ``down`` has no elements. With a ``span``,
    out is its length, and the other outputs of the layer stay as they are.
    """

    down: torch.Tensor
    up: torch.Tensor | None
    scale: float
    bias: torch.Tensor | None = None
    span: Span | None = None

    def to(self, device: torch.device, dtype: torch.dtype) -> LoraFactors:
        """The same factors with this dtype on this device."""
        up, bias = (None if t is None else t.to(device, dtype) for t in (self.up, self.bias))
        return self._replace(down=self.down.to(device, dtype), up=up, bias=bias)

    def change(self, x: torch.Tensor) -> torch.Tensor:
        """What they add to the output of a Linear, or to its span: (…, in) to (…, out)."""
        change = low_rank_change(x, self.down, self.up) * self.scale
        return change if self.bias is None else change + self.bias


LayerLoras: TypeAlias = Mapping[str, Sequence[LoraFactors]]
"""A LoRA by layer name. A layer has several factors where the file splits its fused matrix."""


def layer_shape(layer: Any) -> tuple[int, ...]:
    """The shape of a layer's weight by the layer's own sizes: a quantised weight may be stored in another one."""
    if hasattr(layer, "out_features"):
        return (layer.out_features, layer.in_features)
    if hasattr(layer, "out_channels"):
        return (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)
    return tuple(layer.weight.shape)


def unchanged(shape: Sequence[int]) -> LoraFactors:
    """The factors that leave a weight of this shape as it is."""
    return LoraFactors(torch.zeros(0, *shape[1:]), torch.zeros(shape[0], 0), 1.0)


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
    return LoraFactors(kronecker(w1b, w2b), kronecker(w1a, w2a), _scale(alpha, w2b.shape[0]))


def rebuilt(a: torch.Tensor, b: torch.Tensor, core: torch.Tensor | None = None) -> torch.Tensor:
    """A matrix of LoHa or LoKr, (out, in): ``a b``. With a core (r, r, kh, kw), (out, in, kh, kw) of a (r, out)."""
    return a @ b if core is None else torch.einsum("rs...,sj,ri->ij...", core, b, a)


def kronecker(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """``first ⊗ second`` of (a, b) and (c, d[, kh, kw]): (a c, b d[, kh, kw])."""
    spread = first.reshape(*first.shape, *[1] * (second.ndim - first.ndim))
    return torch.kron(spread.contiguous(), second.contiguous())  # torch 2.14.1 refuses strides of another order


def whole_change(change: torch.Tensor, alpha: float | None, rank: int | None) -> LoraFactors:
    """A change that is not low-rank as it is. Without a rank, ``alpha`` has no meaning."""
    return LoraFactors(change, None, 1.0 if rank is None else _scale(alpha, rank))


def _scale(alpha: float | None, rank: int) -> float:
    return 1.0 if alpha is None else alpha / rank


def fitted(factors: LoraFactors, shape: Sequence[int]) -> LoraFactors:
    """The factors in the form of a layer whose weight has this shape. Flat factors of convolutions are unfolded."""
    down = factors.down
    if down.ndim > 1 and down.shape[1:].numel() == math.prod(shape[1:]):
        down = down.reshape(len(down), *shape[1:])
    return factors._replace(down=down, up=None if factors.up is None else factors.up.flatten(1))


def shape_of(factors: LoraFactors) -> tuple[int, ...]:
    """The shape of the weight they change."""
    return (factors.down.shape[0] if factors.up is None else factors.up.shape[0], *factors.down.shape[1:])
