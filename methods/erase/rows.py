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

    What lies before ``first`` (a start token, a template) is never erased. Nor is what lies from ``until`` on, which is
    padding; None is for a CLIP, whose padding ends every prompt and knows its words.
    """

    tokens: torch.Tensor
    start: int
    end: int
    stop: int
    pooled: torch.Tensor | None = None
    words: tuple[NamedSpan, ...] = ()
    first: int = 1
    until: int | None = None

    @property
    def limit(self) -> int:
        """How many positions there are before those that are never erased."""
        return len(self.tokens) if self.until is None else self.until

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
            return "padding" if position > self.stop and (self.until is None or position >= self.until) else "end"
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
    """The token positions of a scope. No scope contains a start token, a template before the words, or padding of a
    language model or T5."""
    count = prompt.limit
    return {
        LAST: [prompt.last_token],
        SPAN: list(range(prompt.start, prompt.end)),
        SPAN_TO_END: list(range(prompt.start, count)),
        FIRST_END: list(range(prompt.stop, min(prompt.stop + 1, count))),
        ENDS: list(range(prompt.stop, count)),
        ALL: list(range(prompt.first, count)),
    }[scope]


def counterpart_position(position: int, concept: PromptTokens, anchor: PromptTokens) -> int:
    """The position of the token with the same role in the anchor's sentence, never before its ``first``.

    Phrase tokens of a CLIP pair by relative position, at most with the anchor's last one. Those of other encoders keep
    their distance from the phrase's end: there the last token knows all others. Words after the phrase keep their
    distance from its end; the end token and what follows keep their distance from the end token. Where the anchor is
    empty, the phrase pairs with the anchor's tokens at the same positions, which are its end token and what follows.
    """
    last = max(anchor.first, anchor.limit - 1)
    if position < concept.start:
        return max(anchor.first, min(position, anchor.start))
    if position < concept.end:
        if anchor.end == anchor.start:
            return max(anchor.first, min(anchor.stop + position - concept.start, last))
        if concept.until is not None:
            return max(anchor.start, anchor.end - (concept.end - position))
        return min(anchor.start + position - concept.start, anchor.end - 1)
    if position < concept.stop:
        return min(anchor.end + position - concept.end, anchor.stop, last)
    return min(anchor.stop + position - concept.stop, last)


def paired_rows(concept: PromptTokens, anchor: PromptTokens, scope: str, weight: float) -> RowPairs:
    """The rows of one sentence and what they become. Equal pairs are left out.

    ``weight`` is divided among the roles that occur (phrase, later words, end and padding), then among the rows of each
    role. A long tail of padding therefore counts no more than the phrase.

    Raises:
        ValueError: the anchor's sentence has no token that may be erased.
    """
    here = [p for p in scope_positions(concept, scope) if p >= concept.first]
    if here and anchor.limit <= anchor.first:
        raise ValueError(
            "Without the concept its sentence has no token left for this text encoder, which it could become; name an "
            "anchor, or a template with other words."
        )
    there = [counterpart_position(p, concept, anchor) for p in here]
    C, G = concept.tokens[here].double(), anchor.tokens[there].double()
    differ = (C - G).norm(dim=1) > _SAME * C.norm(dim=1)
    roles = [0 if p < concept.end else 1 if p < concept.stop else 2 for p in here]
    shares = [weight / len(set(roles)) / roles.count(role) for role in roles]
    return RowPairs(C[differ], G[differ], torch.tensor(shares, dtype=torch.float64)[differ])


def preserved_rows(prompt: PromptTokens, weight: float, *, whole: bool, ends: bool = True) -> PreservedRows:
    """The rows of a prompt that must not move.

    They are the last word and the end token, or (``whole``) all but the start token; words and padding share the weight
    evenly. Without ``ends``, end token and padding are left out. What a template has behind the words is held whole:
    every prompt ends in it.
    """
    words, tail = list(range(prompt.first, prompt.stop)), list(range(prompt.stop, prompt.limit))
    if words and not whole:
        last = prompt.last_word(prompt.first, prompt.end)
        words = list(range(last.start, last.end))
    kept = tail if whole or prompt.until is not None else tail[:1]
    parts = [part for part in (words, kept if ends else []) if part]
    shares = [weight / len(parts) / len(part) for part in parts for _ in part]
    positions = [position for part in parts for position in part]
    return PreservedRows(
        prompt.tokens[positions].double(),
        torch.tensor(shares, dtype=torch.float64),
        tuple(prompt.name_of(position) for position in positions),
    )
