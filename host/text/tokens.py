"""Prompts as tokens: where a phrase is in them, and the token rows that an erasure is solved on.

Positions count the tokens of the whole encoded prompt, so they are also places in its CONDITIONING. A phrase of a
prompt is found at its first occurrence, and brackets around words are weights. An erasure takes the last occurrence,
and brackets are part of the words: whoever erases has taken the weights away (``weights.without_weights``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import node_helpers
import torch

from ...methods.erase.rows import NamedSpan, PromptTokens
from ...methods.token_rows import Token, blocks_of_rows, words_range
from ...methods.words import SENTENCEPIECE_SPACE, Piece, PlacedPiece, Word, occurrences, words_of
from .. import keys
from ..types import CLIP, Conditioning, Tokenizes, Tokens

SECTION = 77
"""Token rows of one call of a CLIP text encoder."""
_NOT_A_CLIP = (
    "This text encoder has no start token (T5 and language models have none), and closed-form erasure finds words in a "
    "CLIP only; use a model of the SD 1, SD 2 or SDXL families with its own CLIP."
)


def encode_with_phrase(clip: CLIP, text: str, phrase: str) -> Conditioning:
    """The prompt as CONDITIONING with the positions of its phrase (``keys.PHRASE_POSITIONS``).

    Args:
        phrase: empty takes the whole prompt.

    Raises:
        ValueError: as ``phrase_positions``.
    """
    conditioning = clip.encode_from_tokens_scheduled(clip.tokenize(text))
    positions = phrase_rows(clip, text, phrase, conditioning[0])
    return node_helpers.conditioning_set_values(conditioning, {keys.PHRASE_POSITIONS: positions})


class OneEncoder:
    """One text encoder of a CLIP as a CLIP of its own, as far as tokens go: its vocabulary spells them."""

    def __init__(self, clip: CLIP, name: str) -> None:
        self.clip, self.name = clip, name
        every = clip.tokenizer
        self.tokenizer: Any = getattr(every, name, getattr(every, f"clip_{name}", every))

    def tokenize(self, text: str, **options: object) -> Tokens:
        return {self.name: self.clip.tokenize(text, **options)[self.name]}


def phrase_rows(clip: CLIP, text: str, phrase: str, encoded: Sequence[Any]) -> tuple[int, ...]:
    """The rows of the encoded prompt that are of the phrase; none where it is not known whose tokens they are.

    Args:
        encoded: the entry of the prompt. Anima's network reads it by T5's tokens, and not by those of its encoder.

    Raises:
        ValueError: as ``phrase_positions``.
    """
    if "t5xxl_ids" in encoded[1]:
        return phrase_positions(OneEncoder(clip, "t5xxl"), text, phrase)
    encoders = encoders_of(clip, text, encoded[0].shape[1])
    if not encoders:
        return phrase_positions(clip, text, phrase)[:0]  # refuses what is not there
    encoder, moved = encoders[0]
    return tuple(p + moved for p in phrase_positions(encoder, text, phrase))


def encoders_of(clip: CLIP, text: str, rows: int) -> list[tuple[OneEncoder, int]]:
    """The text encoders whose tokens the rows of a prompt are, and how far these are moved, as ``blocks_of_rows``."""
    lengths = {name: sum(map(len, sections)) for name, sections in clip.tokenize(text).items()}
    return [(OneEncoder(clip, name), moved) for name, moved in blocks_of_rows(lengths, rows)]


def encode_prompt(clip: CLIP, text: str, phrase: str = "") -> PromptTokens:
    """One sentence as token rows, with the place of the phrase (its last occurrence) and of the first end token.

    Without a phrase, ``start`` and ``end`` are the place of the end token.

    Raises:
        ValueError: the sentence lacks the phrase, or is longer than one call of the text encoder.
    """
    check_one_section(clip, text)
    (part,) = encode_parts(clip, text)
    found = last_occurrence(clip, text, phrase) if phrase.strip() else ()
    return part._replace(start=found[0], end=found[-1] + 1) if found else part


def check_one_section(clip: Tokenizes, text: str) -> None:
    """Refuses a sentence whose tokens go through the text encoder in several calls."""
    if len(token_sections(clip, text, read_weights=False)) > 1:
        raise ValueError(
            f"'{text}' has more tokens than one call of the text encoder takes ({SECTION - 2}), so its tokens have no "
            "counterparts in its anchor's; shorten the concept or its template, or the anchor."
        )


def last_occurrence(clip: Tokenizes, text: str, phrase: str) -> tuple[int, ...]:
    """The positions of the phrase where it is last, with brackets as part of the words.

    Raises:
        ValueError: the sentence lacks the phrase.
    """
    if found := occurrences(_words(clip, text, read_weights=False), _words(clip, phrase, read_weights=False)):
        return found[-1]
    raise ValueError(f"The tokens of '{phrase}' do not occur in '{text}'; write the concept as a word of its own.")


def encode_parts(clip: CLIP, text: str) -> list[PromptTokens]:
    """A prompt of any length as the text encoder sees it: per call its token rows, each with start and end token.

    ``start`` and ``end`` are the place of the end token. ``pooled`` is of the first part, as the host returns it.

    Raises:
        ValueError: the text encoder is not a CLIP.
    """
    _check_start_token(clip)
    empty = empty_section(clip)
    rows, pooled = clip.encode_from_tokens(clip.tokenize(text, disable_weights=True), return_pooled=True)
    pooled = None if pooled is None else pooled[0].float().cpu()
    sections = token_sections(clip, text, read_weights=False)
    if rows.shape[1] != sum(map(len, sections)):  # the first of several encoders is a CLIP, and the rows are another's
        raise ValueError(_NOT_A_CLIP)
    parts, first = [], 0
    for section in sections:
        stop, tokens = words_range(section, empty)[1], rows[0, first : first + len(section)]
        parts.append(PromptTokens(tokens.float().cpu(), stop, stop, stop, pooled, word_spans(clip, section)))
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


def phrase_positions(clip: Tokenizes, text: str, phrase: str) -> tuple[int, ...]:
    """As ``first_occurrence``. Without a phrase, the positions of all words of the prompt.

    Raises:
        ValueError: the prompt lacks the phrase, or has no words.
    """
    if phrase.strip():
        return first_occurrence(clip, text, phrase.strip())
    positions = tuple(p for first, end in content_ranges(clip, text) for p in range(first, end))
    if not positions:
        raise ValueError("The prompt is empty, so it has no words to look for; write one.")
    return positions


def first_occurrence(clip: Tokenizes, text: str, phrase: str) -> tuple[int, ...]:
    """The positions of the phrase's first occurrence in the encoded prompt.

    Raises:
        ValueError: as ``phrase_occurrences``.
    """
    return phrase_occurrences(clip, text, phrase)[0]


def phrase_occurrences(clip: Tokenizes, text: str, phrase: str) -> list[tuple[int, ...]]:
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


def _check_start_token(clip: Tokenizes) -> None:
    """Refuses encoders whose prompts have no start token, or no end token at 1 if they are empty."""
    empty, word = (token_sections(clip, text, read_weights=False)[0] for text in ("", "a"))
    if len(empty) < 2 or empty[0] != word[0] or empty[1] == word[1]:
        raise ValueError(_NOT_A_CLIP)


def token_sections(clip: Tokenizes, text: str, *, read_weights: bool) -> list[list[Token]]:
    """The tokens of a prompt in sections, as they are encoded: those of the first encoder, because all share positions.

    Args:
        read_weights: whether brackets are weights; otherwise they are part of the words.
    """
    tokens = clip.tokenize(text) if read_weights else unweighted(clip, text)
    return [[token for token, *_ in section] for section in tokens[next(iter(tokens))]]


def unweighted(clip: Tokenizes, text: str) -> Tokens:
    """The tokens of a prompt, where brackets are part of the words."""
    try:
        return clip.tokenize(text, disable_weights=True)
    except TypeError:  # encoders with a template never read weights, and pass on that option a second time
        return clip.tokenize(text)


def empty_section(clip: Tokenizes) -> list[Token]:
    """The tokens of an empty prompt."""
    return token_sections(clip, "", read_weights=True)[0]


def _words(clip: Tokenizes, text: str, *, read_weights: bool) -> list[Word]:
    """The words of all sections, as ``token_sections``."""
    return _words_in(clip, token_sections(clip, text, read_weights=read_weights), empty_section(clip))


def _words_in(clip: Tokenizes, sections: Sequence[list[Token]], empty: list[Token]) -> list[Word]:
    first, *_ = token_sections(clip, "a a", read_weights=True)
    sentencepiece = any(SENTENCEPIECE_SPACE in str(_piece(clip, token)) for token in first)
    return words_of(_placed(clip, sections, empty), sentencepiece=sentencepiece)


def _piece(clip: Tokenizes, token: Token) -> Piece:
    """How the vocabulary writes the token."""
    if isinstance(token, torch.Tensor):
        return token
    ((_, piece),) = clip.tokenizer.untokenize([(token, 1.0)])
    return str(piece)


def _placed(clip: Tokenizes, sections: Sequence[list[Token]], empty: list[Token]) -> list[PlacedPiece]:
    """The tokens of the words of all sections, as the vocabulary writes them, with their positions."""
    placed, offset = [], 0
    for section in sections:
        first, end = words_range(section, empty)
        placed += [(offset + n, _piece(clip, section[n])) for n in range(first, end)]
        offset += len(section)
    return placed


def word_spans(clip: Tokenizes, section: list[Token]) -> tuple[NamedSpan, ...]:
    """Where the words are in a section; marks only if there is nothing else."""
    words = _words_in(clip, [section], empty_section(clip))
    spelled = [word for word in words if word.has_letters] or words
    return tuple(NamedSpan(word.text, word.positions[0], word.positions[-1] + 1) for word in spelled)


def content_ranges(clip: Tokenizes, text: str) -> tuple[tuple[int, int], ...]:
    """First position, and last + 1, of the words of each section."""
    empty, offset, ranges = empty_section(clip), 0, []
    for section in token_sections(clip, text, read_weights=True):
        first, end = words_range(section, empty)
        ranges.append((offset + first, offset + end))
        offset += len(section)
    return tuple(ranges)
