"""The words of a prompt by their letters, and the tokens that hold them.

Tokens do not keep words apart as people do: a full stop and a bracket may share one token, a long word has several, and
a prompt of several sections may cut a word. So phrases are compared letter by letter.
"""

from __future__ import annotations

import hashlib
import unicodedata
from codecs import getincrementaldecoder
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

import torch

Piece: TypeAlias = str | torch.Tensor
"""A token as its vocabulary writes it, or a vector of a textual inversion."""
PlacedPiece = tuple[int, Piece]
"""A token and its position in the encoded prompt."""

SENTENCEPIECE_SPACE = "▁"
"""How SentencePiece writes a space; vocabularies of byte pairs have no such character."""
_SPACE, _LETTER, _SINGLE = "space", "letter", "single"


class Word(NamedTuple):
    """A word, a punctuation mark, a character of a script without spaces, or a vector of a textual inversion.

    ``text`` is in small letters, ``positions`` are those of its tokens.
    """

    text: str
    positions: tuple[int, ...]

    @property
    def has_letters(self) -> bool:
        """Whether it is made of letters or figures, and not of punctuation or symbols."""
        return unicodedata.category(self.text[0])[0] in "LMN"

    @property
    def is_mark(self) -> bool:
        """Whether it is punctuation, such as a bracket or a plus; an emoji is not."""
        return unicodedata.category(self.text[0]) in {"Pc", "Pd", "Pe", "Pf", "Pi", "Po", "Ps", "Sc", "Sk", "Sm"}


def words_of(pieces: Iterable[PlacedPiece], *, sentencepiece: bool) -> list[Word]:
    """The words and marks that these tokens spell, in their order.

    Args:
        sentencepiece: whether the vocabulary is one of SentencePiece; otherwise it has byte pairs.
    """
    words: list[Word] = []
    continues = False
    for text, positions in _characters(pieces, _bytes_of_sentencepiece if sentencepiece else _bytes_of_byte_pair):
        kind = _SINGLE if len(text) > 1 else _kind(text)
        if continues and kind == _LETTER:
            words[-1] = Word(words[-1].text + text, tuple(dict.fromkeys(words[-1].positions + positions)))
        elif kind != _SPACE:
            words.append(Word(text, positions))
        continues = kind == _LETTER
    return [word._replace(text=word.text.casefold()) for word in words]


def occurrences(words: Sequence[Word], wanted: Sequence[Word]) -> list[tuple[int, ...]]:
    """The positions of every place where the wanted words stand, first to last, without overlaps.

    Punctuation counts if the phrase stands there with its own. Otherwise it is passed over: brackets may be escaped in
    one of the two texts, and a full stop may be left out.
    """
    exact = _found(words, wanted, lambda word: True)
    return exact or _found(words, wanted, lambda word: not word.is_mark)


def _found(words: Sequence[Word], wanted: Sequence[Word], counts: Callable[[Word], bool]) -> list[tuple[int, ...]]:
    numbers, texts = [n for n, w in enumerate(words) if counts(w)], [w.text for w in wanted if counts(w)]
    found, at, length = [], 0, len(texts)
    while length and at + length <= len(numbers):
        place = numbers[at : at + length]
        if [words[n].text for n in place] == texts:
            found.append(tuple(dict.fromkeys(p for w in words[place[0] : place[-1] + 1] for p in w.positions)))
            at += length
        else:
            at += 1
    return found


def _kind(character: str) -> str:
    category = unicodedata.category(character)
    if character.isspace() or category == "Cc":
        return _SPACE
    # letters without case (Chinese, Thai) stand in scripts that mostly know no spaces between words
    return _LETTER if category[0] in "LMN" and category != "Lo" else _SINGLE


def _characters(pieces: Iterable[PlacedPiece], spell: Callable[[str], bytes]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Each character with the positions of its tokens; a learned vector is one long character."""
    decoder = getincrementaldecoder("utf-8")("replace")
    pending: list[int] = []
    for position, piece in pieces:
        if isinstance(piece, torch.Tensor):
            numbers = piece.detach().float().cpu().numpy().tobytes()
            yield f"embedding {hashlib.sha256(numbers).hexdigest()[:12]}", (position,)
            continue
        for byte in spell(piece):
            pending.append(position)
            if text := decoder.decode(bytes([byte])):
                places, pending = tuple(dict.fromkeys(pending)), []
                yield from ((character, places) for character in text)


def _bytes_of_sentencepiece(piece: str) -> bytes:
    if piece.startswith("<0x") and piece.endswith(">"):  # a byte that no piece holds
        return bytes([int(piece[3:-1], 16)])
    return piece.replace(SENTENCEPIECE_SPACE, " ").encode()


def _bytes_of_byte_pair(piece: str) -> bytes:
    ends, piece = piece.endswith("</w>"), piece.removesuffix("</w>")
    return bytes(_BYTES[character] for character in piece if character in _BYTES) + b" " * ends


def _byte_alphabet() -> dict[str, int]:
    """The characters that stand for bytes in vocabularies of byte pairs: printable ones for themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTES = _byte_alphabet()
