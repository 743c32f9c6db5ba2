"""How much of a LoRA each token of a layer gets, where it acts on some tokens only."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch


class Place(NamedTuple):
    """Where a branch acts in one layer: rows along the first axis of its input, and the weight of each of its tokens.

    ``weights`` broadcast over (rows, tokens, …), the channels left out; None is 1 everywhere.
    """

    rows: slice
    weights: torch.Tensor | None = None


class TokenWeights(Protocol):
    """How much of a branch each token of a layer gets."""

    def acts_on(self, layer: str) -> bool:
        """Whether any token of this layer may get any of it."""

    def at(self, layer: str, shape: Sequence[int], rows: slice) -> Place:
        """Where it acts in this layer.

        Args:
            shape: (rows, tokens, …) of the layer's output, without the channels.
            rows: of the model call.

        Raises:
            ValueError: the layer has another number of tokens than the model should have there.
        """


@dataclass(frozen=True, eq=False)
class ImageTokens:
    """Weights of a UNet's image tokens. Layers without any (text, time) are left alone.

    Args:
        kind: of a layer, as its architecture says.
        weights: number of image tokens of a layer to the weight of each, (tokens,) or (rows, tokens) in 0..1.
    """

    kind: Callable[[str], str]
    weights: Mapping[int, torch.Tensor]

    def acts_on(self, layer: str) -> bool:
        return self.kind(layer) == "image"

    def at(self, layer: str, shape: Sequence[int], rows: slice) -> Place:
        count = math.prod(shape[1:])
        if count not in self.weights:
            raise unknown_grid(count, self.weights)
        return Place(rows, self.weights[count].unflatten(-1, tuple(shape[1:])))


def unknown_grid(count: int, known: Iterable[int]) -> ValueError:
    """The refusal of a layer with a number of image tokens for which the regions have no masks."""
    return ValueError(
        f"A layer works on {count} image tokens, and the regions are known for {sorted(known)}; another node changes "
        "the number of tokens (token merging, tiling): bypass it."
    )
