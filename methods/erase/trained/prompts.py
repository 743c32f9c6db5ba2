"""Encoded prompts as training methods use them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch


class EncodedPrompts(NamedTuple):
    """Encoded prompts, one per row: ``context`` (rows, tokens, width), ``pooled`` (rows, p) if the model reads it."""

    context: torch.Tensor
    pooled: torch.Tensor | None = None

    def at(self, rows: torch.Tensor | slice) -> EncodedPrompts:
        """The prompts of these rows."""
        return EncodedPrompts(self.context[rows], None if self.pooled is None else self.pooled[rows])

    def repeated(self, count: int) -> EncodedPrompts:
        """A single prompt on ``count`` rows."""
        return self.at(torch.zeros(count, dtype=torch.long))

    def followed_by(self, tokens: torch.Tensor) -> EncodedPrompts:
        """The prompts with further context tokens (rows, k, width) at the end."""
        return EncodedPrompts(torch.cat([self.context, tokens.to(self.context)], 1), self.pooled)


def stacked(prompts: Sequence[EncodedPrompts]) -> EncodedPrompts:
    """All rows of these prompts, in order. Their token lengths must be equal."""
    pooled = [p.pooled for p in prompts if p.pooled is not None]
    context = torch.cat([p.context for p in prompts])
    return EncodedPrompts(context, torch.cat(pooled) if len(pooled) == len(prompts) else None)
