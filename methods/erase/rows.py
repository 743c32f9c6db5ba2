"""Rows of text embeddings: which tokens of a concept move, where to, and which rows are preserved.

Rows lie in the first axis here, (rows, d); the papers write them as columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .spec import ALL, ENDS, FIRST_END, LAST, SPAN, SPAN_TO_END

_SAME = 1e-4  # of the norm: closer pairs would only add rank


class NamedSpan(NamedTuple):
    """A word of a prompt, and its tokens from ``start`` to ``end``, exclusive."""

    text: str
    start: int
    end: int


class PromptTokens(NamedTuple):
    """An encoded prompt: ``tokens`` (positions, d), with the start token at position 0.

    The concept's phrase reaches from ``start`` to ``end``, exclusive; ``stop`` is the position of the first end token.
    ``pooled`` is (p,), for models that have one. ``words`` says where the words are; punctuation is none.
    """

    tokens: torch.Tensor
    start: int
    end: int
    stop: int
    pooled: torch.Tensor | None = None
    words: tuple[NamedSpan, ...] = ()

    def last_word(self, start: int, end: int) -> NamedSpan:
        """The last word within these positions; the last token where there is none."""
        inside = [word for word in self.words if start <= word.start and word.end <= end]
        return inside[-1] if inside else NamedSpan("", end - 1, end)

    @property
    def last_token(self) -> int:
        """The position of the last token of the phrase's last word."""
        return self.last_word(self.start, self.end).end - 1

    def name_of(self, position: int) -> str:
        """What the token at this position is, in words."""
        if position >= self.stop:
            return "padding" if position > self.stop else "end"
        if not self.words:
            return "word"
        return next((word.text for word in self.words if word.start <= position < word.end), "punctuation")


class PreservedRows(NamedTuple):
    """Rows (n, d) that must not move, their weights (n,), and what each of them is."""

    rows: torch.Tensor
    weights: torch.Tensor
    names: tuple[str, ...]


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
    count = len(prompt.tokens)
    return {
        LAST: [prompt.last_token],
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


def preserved_rows(prompt: PromptTokens, weight: float, *, whole: bool, ends: bool = True) -> PreservedRows:
    """The rows of a prompt that must not move.

    They are the last word and the end token, or (``whole``) all but the start token; words and padding share the weight
    evenly. Without ``ends``, end token and padding are left out.
    """
    words, tail = list(range(1, prompt.stop)), list(range(prompt.stop, len(prompt.tokens)))
    if words and not whole:
        last = prompt.last_word(1, prompt.end)
        words = list(range(last.start, last.end))
    parts = [part for part in (words, (tail if whole else tail[:1]) if ends else []) if part]
    shares = [weight / len(parts) / len(part) for part in parts for _ in part]
    positions = [position for part in parts for position in part]
    return PreservedRows(
        prompt.tokens[positions].double(),
        torch.tensor(shares, dtype=torch.float64),
        tuple(prompt.name_of(position) for position in positions),
    )
