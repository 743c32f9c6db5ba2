"""Where a phrase stands in a prompt, in token positions of the CONDITIONING."""

from __future__ import annotations

from typing import Any

import node_helpers
import torch

from ...methods.compose.similarity import ObjectPositions, check_objects, correct
from .. import keys


def _sections(clip: Any, text: str) -> list[list[Any]]:
    """The tokens of the prompt, in sections as they are encoded: the first encoder's, for all share positions."""
    tokens = clip.tokenize(text)
    first = tokens[next(iter(tokens))]
    return [[token for token, *_ in section] for section in first]


def _same(token: Any, other: Any) -> bool:
    """Whether two tokens are one: numbers, or the vectors of a textual inversion."""
    if isinstance(token, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(token, other)
    return isinstance(token, int) and isinstance(other, int) and token == other


def _words_alone(clip: Any, phrase: str) -> list[Any]:
    """The tokens of a phrase without the frame that every prompt has."""
    inside, frame = _sections(clip, phrase)[0], _sections(clip, "")[0]
    start = 1 if inside and frame and _same(inside[0], frame[0]) else 0
    end = frame[start] if len(frame) > start else None  # what an empty prompt goes on with ends a full one
    kept: list[Any] = []
    for token in inside[start:]:
        if _same(token, end):
            break
        kept.append(token)
    return kept


def positions_of(clip: Any, text: str, phrase: str) -> tuple[int, ...]:
    """The positions of the phrase's first occurrence in the encoded prompt.

    Raises:
        ValueError: as ``occurrences_of``.
    """
    return occurrences_of(clip, text, phrase)[0]


def occurrences_of(clip: Any, text: str, phrase: str) -> list[tuple[int, ...]]:
    """The positions of each occurrence of the phrase in the encoded prompt, none overlapping, first to last.

    Raises:
        ValueError: the prompt does not hold the phrase.
    """
    wanted = _words_alone(clip, phrase)
    found: list[tuple[int, ...]] = []
    offset = 0
    for section in _sections(clip, text):
        for at in range(len(section) - len(wanted) + 1):
            same = (_same(s, w) for s, w in zip(section[at:], wanted, strict=False))
            free = not found or offset + at > found[-1][-1]
            if wanted and free and all(same):
                found.append(tuple(range(offset + at, offset + at + len(wanted))))
        offset += len(section)
    if found:
        return found
    raise ValueError(
        f"The phrase '{phrase}' does not stand in the prompt '{text}'; write it the same way in both, or leave the phrase empty."
    )


def phrase_positions(clip: Any, text: str, phrase: str) -> tuple[int, ...]:
    """As ``positions_of``; without a phrase, the positions of all words of the prompt.

    Raises:
        ValueError: the prompt does not hold the phrase, or no word at all.
    """
    if phrase.strip():
        return positions_of(clip, text, phrase.strip())
    positions = tuple(p for first, end in _word_ranges(clip, text) for p in range(first, end))
    if not positions:
        raise ValueError("The prompt is empty, so that there are no words to look for; write one.")
    return positions


def encode_with_phrase(clip: Any, text: str, phrase: str) -> list:
    """The prompt as CONDITIONING that knows where the phrase stands. Without a phrase, the whole prompt is the phrase.

    Raises:
        ValueError: as ``phrase_positions``.
    """
    positions = phrase_positions(clip, text, phrase)
    conditioning = clip.encode_from_tokens_scheduled(clip.tokenize(text))
    return node_helpers.conditioning_set_values(conditioning, {keys.PHRASE_POSITIONS: positions})


def encode_with_objects(clip: Any, text: str, phrases: list[str]) -> list:
    """The prompt as CONDITIONING that knows the positions of its objects (``ObjectPositions``).

    Raises:
        ValueError: the prompt does not hold one of the phrases, none is given, or two share a word.
    """
    objects = tuple(positions_of(clip, text, phrase) for phrase in phrases)
    check_objects(objects)
    conditioning = clip.encode_from_tokens_scheduled(clip.tokenize(text))
    return node_helpers.conditioning_set_values(
        conditioning, {keys.OBJECT_POSITIONS: ObjectPositions(objects, _word_ranges(clip, text))}
    )


def _word_ranges(clip: Any, text: str) -> tuple[tuple[int, int], ...]:
    """First and last + 1 of the words of each section, without what frames and fills it."""
    frame = _sections(clip, "")[0]
    ranges, offset = [], 0
    for section in _sections(clip, text):
        first = 1 if frame and _same(section[0], frame[0]) else 0
        ends = frame[first] if len(frame) > first else None
        last = next((n for n in range(first, len(section)) if _same(section[n], ends)), len(section))
        ranges.append((offset + first, offset + last))
        offset += len(section)
    return tuple(ranges)


def correct_objects(conditioning: list, strength: float, window: int, threshold: float) -> list:
    """The prompt with its objects corrected by similarities.

    Raises:
        ValueError: the prompt does not say which of its words are objects.
    """
    if not all(keys.OBJECT_POSITIONS in values for _, values in conditioning):
        raise ValueError(
            "This prompt does not say which of its words are objects; encode it with Encode Objects instead of CLIP Text Encode."
        )
    return [
        [correct(context, values[keys.OBJECT_POSITIONS], strength, window, threshold), values.copy()]
        for context, values in conditioning
    ]
