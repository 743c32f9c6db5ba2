"""Prompts as tokens: where a phrase is in them, and the token rows that an erasure is solved on.

Positions count the tokens of the whole encoded prompt, so they are also places in its CONDITIONING. A phrase of a
prompt is found at its first occurrence, and brackets around words are weights. An erasure takes the last occurrence,
and brackets are part of the words: whoever erases has taken the weights away (``weights.without_weights``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import node_helpers
import torch

from ...methods.compose.similarity import ObjectPositions, check_objects, correct
from ...methods.erase.rows import NamedSpan, PromptTokens
from ...methods.words import SENTENCEPIECE_SPACE, Piece, PlacedPiece, Word, occurrences, words_of
from .. import keys
from ..types import CLIP, CondEntry, Conditioning

SECTION = 77
"""Token rows of one call of a CLIP text encoder."""

Token: TypeAlias = int | torch.Tensor
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
    found = occurrences(_words(clip, text, read_weights=False), _words(clip, phrase, read_weights=False))
    if not found:
        raise ValueError(
            f"The tokens of '{phrase}' do not occur in '{text}'; write the concept as it is in prompts, as a word of "
            "its own."
        )
    return part._replace(start=found[-1][0], end=found[-1][-1] + 1)


def encode_parts(clip: CLIP, text: str) -> list[PromptTokens]:
    """A prompt of any length as the text encoder sees it: per call its token rows, each with start and end token.

    ``start`` and ``end`` are the place of the end token. ``pooled`` is of the first part, as the host returns it.

    Raises:
        ValueError: the text encoder is not a CLIP.
    """
    _check_start_token(clip)
    empty = _empty(clip)
    rows, pooled = clip.encode_from_tokens(clip.tokenize(text, disable_weights=True), return_pooled=True)
    pooled = None if pooled is None else pooled[0].float().cpu()
    parts, first = [], 0
    for section in _sections(clip, text, read_weights=False):
        stop, tokens = _content(section, empty)[1], rows[0, first : first + len(section)]
        spans = _spans(_words_in(clip, [section], empty))
        parts.append(PromptTokens(tokens.float().cpu(), stop, stop, stop, pooled, spans))
        first += len(section)
    return parts


def check_one_encoding(clip: CLIP) -> None:
    """Refuses a text encoder whose hooks follow a schedule: a prompt then has an encoding for each part of a sampling.

    Raises:
        ValueError: it does.
    """
    if clip.use_clip_schedule and clip.patcher.forced_hooks is not None:
        raise ValueError(
            "The CLIP has a schedule (Set CLIP Hooks), so it encodes a prompt anew for each part of a sampling, and an "
            "erasure is made for one encoding; connect the checkpoint's CLIP, or switch schedule_clip off."
        )


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
    found = occurrences(_words(clip, text, read_weights=True), _words(clip, phrase, read_weights=True))
    if not found:
        raise ValueError(
            f"The phrase '{phrase}' is not in the prompt '{text}'; write it the same way in both, or leave the phrase "
            "empty."
        )
    return found


def context_length(entry: CondEntry) -> int:
    """How many tokens the context of a processed conditioning entry has; 0 if it has none."""
    context = entry.get("model_conds", {}).get("c_crossattn")
    return 0 if context is None else int(context.cond.shape[1])


def every_copy(positions: Sequence[int], length: int, total: int) -> tuple[int, ...]:
    """The same positions in every copy of a prompt of ``length`` tokens, of which a model call has ``total``.

    Beside a longer prompt the host repeats a shorter one until both are of one length.
    """
    starts = range(0, max(total - length, 0) + 1, length) if length else (0,)
    return tuple(start + position for start in starts for position in positions)


def _check_start_token(clip: CLIP) -> None:
    """Refuses encoders whose prompts begin with a word: row 0 would be left out, and an empty prompt has no end token
    at 1."""
    empty, word = (_sections(clip, text, read_weights=False)[0] for text in ("", "a"))
    if empty[0] != word[0]:
        raise ValueError(
            "This text encoder has no start token (T5 and language models have none), and closed-form erasure finds "
            "words in a CLIP only; use a model of the SD 1, SD 2 or SDXL families with its own CLIP."
        )


def _sections(clip: CLIP, text: str, *, read_weights: bool) -> list[list[Token]]:
    """The tokens of a prompt in sections, as they are encoded: those of the first encoder, because all share positions.

    Args:
        read_weights: whether brackets are weights; otherwise they are part of the words.
    """
    tokens = clip.tokenize(text) if read_weights else clip.tokenize(text, disable_weights=True)
    return [[token for token, *_ in section] for section in tokens[next(iter(tokens))]]


def _empty(clip: CLIP) -> list[Token]:
    """The tokens of an empty prompt."""
    return _sections(clip, "", read_weights=True)[0]


def _words(clip: CLIP, text: str, *, read_weights: bool) -> list[Word]:
    """The words of all sections, as ``_sections``."""
    return _words_in(clip, _sections(clip, text, read_weights=read_weights), _empty(clip))


def _words_in(clip: CLIP, sections: Sequence[list[Token]], empty: list[Token]) -> list[Word]:
    first, *_ = _sections(clip, "a a", read_weights=True)
    sentencepiece = any(SENTENCEPIECE_SPACE in str(_piece(clip, token)) for token in first)
    return words_of(_placed(clip, sections, empty), sentencepiece=sentencepiece)


def _piece(clip: CLIP, token: Token) -> Piece:
    """How the vocabulary writes the token."""
    if isinstance(token, torch.Tensor):
        return token
    ((_, piece),) = clip.tokenizer.untokenize([(token, 1.0)])
    return str(piece)


def _placed(clip: CLIP, sections: Sequence[list[Token]], empty: list[Token]) -> list[PlacedPiece]:
    """The tokens of the words of all sections, as the vocabulary writes them, with their positions."""
    placed, offset = [], 0
    for section in sections:
        first, end = _content(section, empty)
        if first >= end and len(section) != len(empty):  # a template surrounds the prompt: its words are every prompt's
            first, end = 0, len(section)
        placed += [(offset + n, _piece(clip, section[n])) for n in range(first, end)]
        offset += len(section)
    return placed


def _spans(words: Sequence[Word]) -> tuple[NamedSpan, ...]:
    """Where the words are in their section; marks only if there is nothing else."""
    spelled = [word for word in words if word.has_letters] or words
    return tuple(NamedSpan(word.text, word.positions[0], word.positions[-1] + 1) for word in spelled)


def _content_ranges(clip: CLIP, text: str) -> tuple[tuple[int, int], ...]:
    """First position, and last + 1, of the words of each section."""
    empty, offset = _empty(clip), 0
    ranges = []
    for section in _sections(clip, text, read_weights=True):
        first, end = _content(section, empty)
        ranges.append((offset + first, offset + end))
        offset += len(section)
    return tuple(ranges)


def _content(section: list[Token], empty: list[Token]) -> tuple[int, int]:
    """First index, and last + 1, of the words of a section, without start token, end token and padding.

    Args:
        empty: the section of an empty prompt. The token after its start token ends every prompt.
    """
    first = 1 if section and empty and _same(section[0], empty[0]) else 0
    if len(empty) <= first:
        return first, len(section)
    return first, next((n for n in range(first, len(section)) if _same(section[n], empty[first])), len(section))


def _same(token: Token, other: Token) -> bool:
    """Whether two tokens are equal: numbers, or vectors of a textual inversion."""
    if isinstance(token, torch.Tensor) and isinstance(other, torch.Tensor):
        return token.shape == other.shape and bool((token == other).all())
    return type(token) is type(other) and not isinstance(token, torch.Tensor) and token == other
