"""Where the words of a prompt are among its tokens, and which rows of the encoded prompt these tokens are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import TypeAlias

import torch

Token: TypeAlias = int | torch.Tensor
"""A token's number, or a vector of a textual inversion."""


def encoder_of_rows(lengths: Mapping[str, int], rows: int) -> tuple[str, int] | None:
    """The text encoder whose tokens the rows of an encoded prompt are, and how far its tokens are moved there.

    The tokens of the first one are the rows where there is only one encoder, or all share positions (SDXL), or the
    others' rows lie behind (SD3). Flux's rows are those of its second, T5. Language models may drop the first part of
    their template, as Qwen-Image does.

    Args:
        lengths: how many tokens each encoder of a prompt has, in the host's order.

    Returns:
        None where the rows are not those of any encoder's tokens.
    """
    first, *others = lengths
    own = [name for name, length in lengths.items() if length == rows]
    if own:
        return own[0], 0
    if others:
        return (first, 0) if any(lengths[first] + lengths[other] == rows for other in others) else None
    return (first, rows - lengths[first]) if rows < lengths[first] else None


def blocks_of_rows(lengths: Mapping[str, int], rows: int) -> list[tuple[str, int]]:
    """As ``encoder_of_rows``, with every encoder whose tokens have rows of their own, in order; empty if not known."""
    first = encoder_of_rows(lengths, rows)
    if first is None:
        return []
    behind = [name for name in lengths if lengths[first[0]] + lengths[name] == rows and name != first[0]]
    return [first, *((name, lengths[first[0]]) for name in behind[-1:])] if lengths[first[0]] < rows else [first]


def words_range(section: Sequence[Token], empty: Sequence[Token]) -> tuple[int, int]:
    """First index, and last + 1, of the words of a section, without start token, end token, padding and template.

    Args:
        empty: the section of an empty prompt. The token after its start token ends every prompt of a CLIP or T5. Where
            that token is already the second of the section, a template surrounds every prompt.
    """
    first = 1 if section and empty and same_token(section[0], empty[0]) else 0
    if len(empty) <= first:
        return first, len(section)
    end = next((n for n in range(first, len(section)) if same_token(section[n], empty[first])), len(section))
    if end > first or _shared(section, empty) == len(section):
        return first, end
    before, whole = _shared(section, empty), unpadded(section, empty)
    after = _shared(section[before:whole][::-1], empty[before : unpadded(empty, empty)][::-1])
    return before, whole - after


def unpadded(section: Sequence[Token], empty: Sequence[Token]) -> int:
    """How many tokens a section has without what fills it up behind its end, as it does an empty prompt.

    Args:
        empty: the section of an empty prompt; a last token that it repeats is padding.
    """
    if len(empty) < 2 or not same_token(empty[-1], empty[-2]):
        return len(section)
    filled = takewhile(lambda token: same_token(token, empty[-1]), reversed(section))
    return len(section) - sum(1 for _ in filled)


def every_copy(positions: Sequence[int], length: int, total: int) -> tuple[int, ...]:
    """The same positions in every copy of a prompt of ``length`` tokens, of which a model call has ``total``.

    Beside a longer prompt the host repeats a shorter one until both are of one length.
    """
    starts = range(0, max(total - length, 0) + 1, length) if length else (0,)
    return tuple(start + position for start in starts for position in positions)


def _shared(one: Sequence[Token], other: Sequence[Token]) -> int:
    """How many tokens both begin with."""
    return sum(1 for _ in takewhile(lambda pair: same_token(*pair), zip(one, other, strict=False)))


def same_token(token: Token, other: Token) -> bool:
    """Whether two tokens are equal: numbers, or vectors of a textual inversion."""
    if isinstance(token, torch.Tensor) and isinstance(other, torch.Tensor):
        return token.shape == other.shape and bool((token == other).all())
    return type(token) is type(other) and not isinstance(token, torch.Tensor) and token == other
