"""How much of a LoRA each token of a transformer gets, by the kind of each layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...methods.lora_tokens import Place, unknown_grid
from ..architecture import NOWHERE, Architecture, Layout, Size


@dataclass(frozen=True, eq=False)
class TokensByKind:
    """Weights of a transformer's tokens: those of a region in the picture, and those of the concept's own words.

    Tokens that fill up a sequence get the mean of what they fill up: a concept everywhere is its whole LoRA.
    References get none.

    Args:
        size: of the latent in cells.
        image: (tokens,) or (rows, tokens) in 0..1, row by row of the picture.
        text: (tokens,) of the conditioning: 1 for the concept's own words, 0 for those of others.
        references: the sizes of further pictures behind the image.
        everywhere: whether layers without tokens (time, pooled text) get the LoRA too. They act on the whole picture.
    """

    architecture: Architecture
    size: Size
    image: torch.Tensor
    text: torch.Tensor
    references: Sequence[Size] = ()
    everywhere: bool = False

    def acts_on(self, layer: str) -> bool:
        """Whether any token of this layer may get any of it."""
        return self.everywhere or self.architecture.kind(layer) != "global"

    def at(self, layer: str, shape: Sequence[int], rows: slice) -> Place:
        """Where it acts in this layer, as ``TokenWeights`` says.

        Raises:
            ValueError: the layer has another number of tokens than the architecture says.
        """
        kind = self.architecture.kind(layer)
        if kind == "global":
            return Place(rows)
        if kind == "rows":
            return self._text_in_rows(shape, rows)
        layout = self.architecture.layout(layer, len(self.text), self.size, self.references)
        if math.prod(shape[1:]) != layout.length:
            raise unknown_grid(math.prod(shape[1:]), [layout.length])
        return Place(rows, self._weights(layout).unflatten(-1, tuple(shape[1:])))

    def _weights(self, layout: Layout) -> torch.Tensor:
        """The weights of a sequence's tokens, (tokens,) or (rows, tokens)."""
        rows = self.image.shape[:-1] if layout.image != NOWHERE else ()
        weights = self.image.new_zeros(*rows, layout.length)
        words = layout.length if layout.image == NOWHERE else layout.image.start
        if words:
            weights[..., :words] = self.text.mean()
            weights[..., layout.text] = self.text
        if layout.image != NOWHERE:
            weights[..., words:] = self.image.mean(-1, keepdim=True)
            weights[..., layout.image] = self.image
        weights[..., layout.references] = 0
        return weights

    def _text_in_rows(self, shape: Sequence[int], rows: slice) -> Place:
        """In a layer with (rows · text, layers), or (rows, text, channels), of a text from several layers."""
        count = len(self.text)
        if len(shape) > 2:
            return Place(rows, self.text[:, None])
        first, last, _ = rows.indices(shape[0] // count)
        return Place(slice(first * count, last * count), self.text.repeat(last - first)[:, None])
