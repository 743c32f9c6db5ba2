"""Rows of text embeddings: which tokens of a concept move, where to, and which rows are preserved.

Rows lie in the first axis here, (rows, d); the papers write them as columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .spec import ALL, ENDS, FIRST_END, LAST, SPAN, SPAN_TO_END

_SAME = 1e-4  # of the norm: closer pairs would only add rank


class PromptTokens(NamedTuple):
    """An encoded prompt: ``tokens`` (positions, d), with the start token at position 0.

    The concept's phrase reaches from ``start`` to ``end``, exclusive; ``stop`` is the position of the first end token.
    ``pooled`` is (p,), for models that have one.
    """

    tokens: torch.Tensor
    start: int
    end: int
    stop: int
    pooled: torch.Tensor | None = None


class RowPairs(NamedTuple):
    """Rows C (n, d) that become G (n, d), with weights (n,)."""

    C: torch.Tensor
    G: torch.Tensor
    weights: torch.Tensor

    def __len__(self) -> int:  # type: ignore[override]
        return len(self.C)


def joined_rows(parts: Sequence[RowPairs]) -> RowPairs:
    """All rows of several sets as one set."""
    return RowPairs(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def scope_positions(prompt: PromptTokens, scope: str) -> list[int]:
    """The token positions of a scope. No scope contains position 0, the start token."""
    last = prompt.end - 1
    count = len(prompt.tokens)
    return {
        LAST: [last],
        SPAN: list(range(prompt.start, prompt.end)),
        SPAN_TO_END: list(range(prompt.start, count)),
        FIRST_END: [prompt.stop],
        ENDS: list(range(prompt.stop, count)),
        ALL: list(range(1, count)),
    }[scope]


def counterpart_position(position: int, concept: PromptTokens, anchor: PromptTokens) -> int:
    """The position of the token with the same role in the anchor's sentence, never 0.

    Phrase tokens pair by relative position, at most with the anchor's last one. Words after the phrase keep their
    distance from its end; the end token and padding keep their distance from the end token. Where the anchor is empty,
    the phrase pairs with the anchor's tokens at the same positions, which are its end token and padding.
    """
    if position < concept.start:
        return max(1, min(position, anchor.start))
    if position < concept.end:
        if anchor.end == anchor.start:
            return max(1, min(anchor.stop + position - concept.start, len(anchor.tokens) - 1))
        return min(anchor.start + position - concept.start, anchor.end - 1)
    if position < concept.stop:
        return min(anchor.end + position - concept.end, anchor.stop)
    return min(anchor.stop + position - concept.stop, len(anchor.tokens) - 1)


def paired_rows(concept: PromptTokens, anchor: PromptTokens, scope: str, weight: float) -> RowPairs:
    """The rows of one sentence and what they become. Equal pairs are left out.

    ``weight`` is divided among the roles that occur (phrase, later words, end and padding), then among the rows of each
    role. A long tail of padding therefore counts no more than the phrase.
    """
    here = [p for p in scope_positions(concept, scope) if p > 0]
    there = [counterpart_position(p, concept, anchor) for p in here]
    C, G = concept.tokens[here].double(), anchor.tokens[there].double()
    differ = (C - G).norm(dim=1) > _SAME * C.norm(dim=1)
    roles = [0 if p < concept.end else 1 if p < concept.stop else 2 for p in here]
    shares = [weight / len(set(roles)) / roles.count(role) for role in roles]
    return RowPairs(C[differ], G[differ], torch.tensor(shares, dtype=torch.float64)[differ])


def preserved_rows(prompt: PromptTokens, weight: float, *, whole: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (n, d) of a prompt that must not move, and their weights (n,).

    They are the last word and the end token, or (``whole``) all but the start token; words and padding share the weight
    evenly.
    """
    words = list(range(1, prompt.stop)) if whole else [max(prompt.end - 1, 1)] * (prompt.stop > 1)
    ends = list(range(prompt.stop, len(prompt.tokens))) if whole else [prompt.stop]
    parts = [part for part in (words, ends) if part]
    shares = [weight / len(parts) / len(part) for part in parts for _ in part]
    return prompt.tokens[words + ends].double(), torch.tensor(shares, dtype=torch.float64)
