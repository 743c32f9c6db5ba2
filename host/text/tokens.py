"""Prompts as tokens: where a phrase is in them, and the token rows that an erasure is solved on.

Positions count the tokens of the whole encoded prompt, so they are also places in its CONDITIONING. A phrase of a
prompt is found at its first occurrence, and brackets around words are weights. An erasure takes the last occurrence,
and brackets are part of the words.
"""

from __future__ import annotations

from typing import TypeAlias

import node_helpers
import torch

from ...methods.compose.similarity import ObjectPositions, check_objects, correct
from ...methods.erase.rows import PromptTokens
from .. import keys
from ..types import CLIP, Conditioning

SECTION = 77
"""Token rows of one call of a CLIP text encoder."""

_Token: TypeAlias = int | torch.Tensor
"""A token's number, or a vector of a textual inversion."""


def encode_with_phrase(clip: CLIP, text: str, phrase: str) -> Conditioning:
    """The prompt as CONDITIONING with the positions of its phrase (``keys.PHRASE_POSITIONS``).

    Args:
        phrase: empty takes the whole prompt.

    Raises:
        ValueError: as ``phrase_positions``.
    """
    positions = phrase_positions(clip, text, phrase)
    conditioning = clip.encode_from_tokens_scheduled(clip.tokenize(text))
    return node_helpers.conditioning_set_values(conditioning, {keys.PHRASE_POSITIONS: positions})


def encode_with_objects(clip: CLIP, text: str, phrases: list[str]) -> Conditioning:
    """The prompt as CONDITIONING with the positions of its objects (``keys.OBJECT_POSITIONS``).

    Raises:
        ValueError: the prompt lacks one of the phrases, none is given, or two share a word.
    """
    objects = tuple(first_occurrence(clip, text, phrase) for phrase in phrases)
    check_objects(objects)
    conditioning = clip.encode_from_tokens_scheduled(clip.tokenize(text))
    positions = ObjectPositions(objects, _content_ranges(clip, text))
    return node_helpers.conditioning_set_values(conditioning, {keys.OBJECT_POSITIONS: positions})


def correct_objects(conditioning: Conditioning, strength: float, window: int, threshold: float) -> Conditioning:
    """The prompt with its objects corrected by similarities.

    Raises:
        ValueError: the prompt does not say which of its words are objects.
    """
    if not all(keys.OBJECT_POSITIONS in values for _, values in conditioning):
        raise ValueError(
            "This prompt does not say which of its words are objects; encode it with Encode Objects instead of CLIP "
            "Text Encode."
        )
    return [
        [correct(context, values[keys.OBJECT_POSITIONS], strength, window, threshold), values.copy()]
        for context, values in conditioning
    ]


def encode_prompt(clip: CLIP, text: str, phrase: str = "") -> PromptTokens:
    """One sentence as token rows, with the place of the phrase (its last occurrence) and of the first end token.

    Without a phrase, ``start`` and ``end`` are the place of the end token.

    Raises:
        ValueError: the sentence lacks the phrase, or is longer than one call of the text encoder.
    """
    sections = _sections(clip, text, read_weights=False)
    if len(sections) > 1:
        raise ValueError(
            f"'{text}' has more tokens than one call of the text encoder takes ({SECTION - 2}), so its tokens have no "
            "counterparts in its anchor's; shorten the concept or its template, or the anchor."
        )
    (part,) = encode_parts(clip, text)
    if not phrase.strip():
        return part._replace(start=part.stop, end=part.stop)
    found = _occurrences(sections, _phrase_tokens(clip, phrase, read_weights=False))
    inside = [(start, end) for start, end in found if start > 0 and end <= part.stop]
    if not inside:
        raise ValueError(
            f"The tokens of '{phrase}' do not occur in '{text}'; write the concept as it is in prompts, with a space "
            "on each side."
        )
    return part._replace(start=inside[-1][0], end=inside[-1][1])


def encode_parts(clip: CLIP, text: str) -> list[PromptTokens]:
    """A prompt of any length as the text encoder sees it: per call its token rows, each with start and end token.

    ``start`` and ``end`` are the place of the end token. ``pooled`` is of the first part, as the host returns it.

    Raises:
        ValueError: the text encoder is not a CLIP.
    """
    _check_start_token(clip)
    empty = _sections(clip, "", read_weights=False)[0]
    rows, pooled = clip.encode_from_tokens(clip.tokenize(text, disable_weights=True), return_pooled=True)
    pooled = None if pooled is None else pooled[0].float().cpu()
    parts, first = [], 0
    for section in _sections(clip, text, read_weights=False):
        stop, tokens = _content(section, empty)[1], rows[0, first : first + len(section)]
        parts.append(PromptTokens(tokens.float().cpu(), stop, stop, stop, pooled))
        first += len(section)
    return parts


class PromptEncoder:
    """A CLIP that encodes each prompt once, for ``methods.erase.problem.Encode``."""

    def __init__(self, clip: CLIP) -> None:
        self.clip = clip
        self.sentences: dict[tuple[str, str], PromptTokens] = {}
        self.prompts: dict[str, list[PromptTokens]] = {}

    def __call__(self, text: str, phrase: str = "") -> PromptTokens:
        """As ``encode_prompt``."""
        if (text, phrase) not in self.sentences:
            self.sentences[text, phrase] = encode_prompt(self.clip, text, phrase)
        return self.sentences[text, phrase]

    def parts(self, text: str) -> list[PromptTokens]:
        """As ``encode_parts``."""
        if text not in self.prompts:
            self.prompts[text] = encode_parts(self.clip, text)
        return self.prompts[text]


def phrase_positions(clip: CLIP, text: str, phrase: str) -> tuple[int, ...]:
    """As ``first_occurrence``. Without a phrase, the positions of all words of the prompt.

    Raises:
        ValueError: the prompt lacks the phrase, or has no words.
    """
    if phrase.strip():
        return first_occurrence(clip, text, phrase.strip())
    positions = tuple(p for first, end in _content_ranges(clip, text) for p in range(first, end))
    if not positions:
        raise ValueError("The prompt is empty, so it has no words to look for; write one.")
    return positions


def first_occurrence(clip: CLIP, text: str, phrase: str) -> tuple[int, ...]:
    """The positions of the phrase's first occurrence in the encoded prompt.

    Raises:
        ValueError: as ``phrase_occurrences``.
    """
    return phrase_occurrences(clip, text, phrase)[0]


def phrase_occurrences(clip: CLIP, text: str, phrase: str) -> list[tuple[int, ...]]:
    """The positions of each occurrence of the phrase in the encoded prompt, first to last. Occurrences do not overlap.

    Raises:
        ValueError: the prompt lacks the phrase.
    """
    found: list[tuple[int, ...]] = []
    wanted = _phrase_tokens(clip, phrase, read_weights=True)
    for start, end in _occurrences(_sections(clip, text, read_weights=True), wanted):
        if not found or start > found[-1][-1]:
            found.append(tuple(range(start, end)))
    if not found:
        raise ValueError(
            f"The phrase '{phrase}' is not in the prompt '{text}'; write it the same way in both, or leave the phrase "
            "empty."
        )
    return found


def _check_start_token(clip: CLIP) -> None:
    """Refuses encoders whose prompts begin with a word: row 0 would be left out, and an empty prompt has no end token
    at 1."""
    empty, word = (_sections(clip, text, read_weights=False)[0] for text in ("", "a"))
    if empty[0] != word[0]:
        raise ValueError(
            "This text encoder has no start token (T5 and language models have none), and closed-form erasure finds "
            "words in a CLIP only; use a model of the SD 1, SD 2 or SDXL families with its own CLIP."
        )


def _sections(clip: CLIP, text: str, *, read_weights: bool) -> list[list[_Token]]:
    """The tokens of a prompt in sections, as they are encoded: those of the first encoder, because all share positions.

    Args:
        read_weights: whether brackets are weights; otherwise they are part of the words.
    """
    tokens = clip.tokenize(text) if read_weights else clip.tokenize(text, disable_weights=True)
    return [[token for token, *_ in section] for section in tokens[next(iter(tokens))]]


def _phrase_tokens(clip: CLIP, phrase: str, *, read_weights: bool) -> list[_Token]:
    """The tokens of a phrase alone."""
    section, empty = (_sections(clip, text, read_weights=read_weights)[0] for text in (phrase, ""))
    first, end = _content(section, empty)
    return section[first:end]


def _content_ranges(clip: CLIP, text: str) -> tuple[tuple[int, int], ...]:
    """First position, and last + 1, of the words of each section."""
    empty, offset = _sections(clip, "", read_weights=True)[0], 0
    ranges = []
    for section in _sections(clip, text, read_weights=True):
        first, end = _content(section, empty)
        ranges.append((offset + first, offset + end))
        offset += len(section)
    return tuple(ranges)


def _content(section: list[_Token], empty: list[_Token]) -> tuple[int, int]:
    """First index, and last + 1, of the words of a section, without start token, end token and padding.

    Args:
        empty: the section of an empty prompt. The token after its start token ends every prompt.
    """
    first = 1 if section and empty and _same(section[0], empty[0]) else 0
    if len(empty) <= first:
        return first, len(section)
    return first, next((n for n in range(first, len(section)) if _same(section[n], empty[first])), len(section))


def _occurrences(sections: list[list[_Token]], wanted: list[_Token]) -> list[tuple[int, int]]:
    """First position, and last + 1, of each occurrence of these tokens, overlapping ones included."""
    found, offset = [], 0
    for section in sections:
        for at in range(len(section) - len(wanted) + 1):
            if wanted and all(map(_same, section[at : at + len(wanted)], wanted)):
                found.append((offset + at, offset + at + len(wanted)))
        offset += len(section)
    return found


def _same(token: _Token, other: _Token) -> bool:
    """Whether two tokens are equal: numbers, or vectors of a textual inversion."""
    if isinstance(token, torch.Tensor) and isinstance(other, torch.Tensor):
        return token.shape == other.shape and bool((token == other).all())
    return type(token) is type(other) and not isinstance(token, torch.Tensor) and token == other
