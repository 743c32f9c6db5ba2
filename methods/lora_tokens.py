"""How much of a LoRA each token of a layer gets: by the layer's place in a UNet, or by its kind in a transformer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

_WITHOUT_IMAGE_TOKENS = (".attn2.to_k", ".attn2.to_v", "emb_layers", "time_embed", "label_emb")


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
        weights: number of image tokens of a layer to the weight of each, (tokens,) or (rows, tokens) in 0..1.
    """

    weights: Mapping[int, torch.Tensor]

    def acts_on(self, layer: str) -> bool:
        return not any(part in f".{layer}" for part in _WITHOUT_IMAGE_TOKENS)

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


IMAGE, TEXT, JOINT, ROWS, GLOBAL = "image", "text", "joint", "rows", "global"
"""What the rows of a transformer layer's input are: tokens of the picture, of the text, of both in one sequence, a text
token each in a batch of their own, or no tokens at all."""
PADDING, REFERENCE = "padding", "reference"
"""What else is in a sequence: tokens that fill it up, and other pictures."""


class Piece(NamedTuple):
    """Neighbouring tokens of a sequence: text, image, padding or reference, and how many."""

    what: str
    count: int


@dataclass(frozen=True, eq=False)
class TokensByKind:
    """Weights of a transformer's tokens: its region's in the picture, and those of its own words in the text.

    Padding has the mean weight of what it fills up, so a concept everywhere is its whole LoRA. References have none.

    Args:
        kind: of a layer by its name.
        sequences: what is in the sequence of a kind, first to last.
        image: (tokens,) or (rows, tokens) in 0..1, row by row of the picture.
        text: (tokens,); 1 for the concept's own words, 0 for those of others.
        everywhere: whether layers without tokens (time, pooled text) get it too, for the whole picture.
    """

    kind: Callable[[str], str]
    sequences: Mapping[str, Sequence[Piece]]
    image: torch.Tensor
    text: torch.Tensor
    everywhere: bool = False

    def acts_on(self, layer: str) -> bool:
        return self.everywhere or self.kind(layer) != GLOBAL

    def at(self, layer: str, shape: Sequence[int], rows: slice) -> Place:
        kind = self.kind(layer)
        if kind == GLOBAL:
            return Place(rows)
        if kind == ROWS:
            return self._text_in_rows(shape, rows)
        weights, count = self.weights(self.sequences[kind]), math.prod(shape[1:])
        if weights.shape[-1] != count:  # before it is filled up
            weights = self.weights([p for p in self.sequences[kind] if p.what != PADDING])
        if weights.shape[-1] != count:
            raise ValueError(
                f"The layer '{layer}' works on {count} tokens instead of {weights.shape[-1]}; another node changes "
                "the number of tokens: bypass it."
            )
        return Place(rows, weights.unflatten(-1, tuple(shape[1:])))

    def weights(self, sequence: Sequence[Piece]) -> torch.Tensor:
        """The weights of a sequence's tokens, (tokens,) or (rows, tokens)."""
        parts: list[torch.Tensor] = []
        for what, count in sequence:
            part = {IMAGE: self.image, TEXT: self.text}.get(what)
            if part is None:
                filled = parts[-1].mean(-1, keepdim=True) if what == PADDING else self.text.new_zeros(1)
                part = filled.expand(*filled.shape[:-1], count)
            parts.append(part)
        rows = max((part.shape[:-1] for part in parts), key=len)
        return torch.cat([part.expand(*rows, -1) for part in parts], -1)

    def _text_in_rows(self, shape: Sequence[int], rows: slice) -> Place:
        """In a layer with (rows · text, layers), or (rows, text, channels), of a text from several layers."""
        count = len(self.text)
        if shape[1] == count and len(shape) > 2:
            return Place(rows, self.text[:, None])
        first, last, _ = rows.indices(shape[0] // count)
        return Place(slice(first * count, last * count), self.text.repeat(last - first)[:, None])
