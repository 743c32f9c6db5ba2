"""Where a phrase stands in a prompt, in token positions of the CONDITIONING."""

from __future__ import annotations

from typing import Any

import node_helpers

ENTRY = "concepts_phrase"
"""The key of a conditioning entry under which the positions of its phrase stand."""


def _sections(clip: Any, text: str) -> list[list[Any]]:
    """The tokens of the prompt, in sections as they are encoded: the first encoder's, for all share positions."""
    tokens = clip.tokenize(text)
    first = tokens[next(iter(tokens))]
    return [[token for token, *_ in section] for section in first]


def _words_alone(clip: Any, phrase: str) -> list[Any]:
    """The tokens of a phrase without the frame that every prompt has."""
    inside, frame = _sections(clip, phrase)[0], _sections(clip, "")[0]
    start = 1 if inside and frame and inside[0] == frame[0] else 0
    end = frame[start] if len(frame) > start else None  # what an empty prompt goes on with ends a full one
    kept: list[Any] = []
    for token in inside[start:]:
        if isinstance(token, int) and token == end:
            break
        kept.append(token)
    return kept


def positions_of(clip: Any, text: str, phrase: str) -> tuple[int, ...]:
    """The positions of the phrase's first occurrence in the encoded prompt.

    Raises:
        ValueError: the prompt does not hold the phrase.
    """
    wanted = _words_alone(clip, phrase)
    offset = 0
    for section in _sections(clip, text):
        for at in range(len(section) - len(wanted) + 1):
            same = (isinstance(s, int) and s == w for s, w in zip(section[at:], wanted, strict=False))
            if wanted and all(same):
                return tuple(range(offset + at, offset + at + len(wanted)))
        offset += len(section)
    raise ValueError(
        f"The phrase '{phrase}' does not stand in the prompt '{text}'; write it the same way in both, or leave the phrase empty."
    )


def encode_with_phrase(clip: Any, text: str, phrase: str) -> list:
    """The prompt as CONDITIONING that knows where the phrase stands. Without a phrase, the whole prompt is the phrase.

    Raises:
        ValueError: as ``positions_of``.
    """
    positions = positions_of(clip, text, phrase.strip() or text)
    conditioning = clip.encode_from_tokens_scheduled(clip.tokenize(text))
    return node_helpers.conditioning_set_values(conditioning, {ENTRY: positions})
