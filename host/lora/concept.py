"""A concept: a LoRA, how strong it is, and the prompt in which it appears, encoded as its own text encoder reads it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import node_helpers
import torch

from .. import keys
from ..engine.attention import CROSS, find_sites
from ..text.tokens import encode_with_phrase, phrase_occurrences, phrase_positions
from .files import LoraFile, with_text_part

_STAND_INS = ("sks", "pll", "ucd", "mth", "aav", "rrs", "wht", "gdp")  # rare words of one token


@dataclass(frozen=True, eq=False)
class Concept:
    """What one concept path needs. The positive knows where the phrase stands (``keys.PHRASE_POSITIONS``).

    ``positive`` and ``negative`` are CONDITIONINGs made by the text encoder with the LoRA's text part on it.
    """

    name: str
    phrase: str
    lora: LoraFile
    strength: float
    positive: list
    negative: list

    @property
    def labels(self) -> set[str]:
        """What a region may be called to be this concept's, in small letters and without blanks around."""
        return {self.phrase.strip().lower(), self.name.strip().lower()} - {""}


def make_concept(lora: LoraFile, strength: float, clip: Any, prompt: str, phrase: str, negative: str) -> Concept:
    """Encodes the prompts of a concept.

    Args:
        phrase: the words of the prompt that are the concept. Empty takes the file's own phrase if it stands in the prompt,
            else the whole prompt.

    Raises:
        ValueError: the prompt does not hold the phrase.
    """
    encoder, _ = with_text_part(clip, lora, strength)
    if not phrase.strip() and lora.phrase and lora.phrase in prompt:
        phrase = lora.phrase
    return Concept(
        lora.name, phrase.strip() or prompt, lora, strength,
        _encode(encoder, lora, prompt, phrase), _encode(encoder, lora, negative, None),
    )  # fmt: skip


def _encode(clip: Any, lora: LoraFile, text: str, phrase: str | None) -> list:
    """CONDITIONING of a prompt; with learned words in it, one encoding for each attention layer.

    Args:
        phrase: as ``make_concept``; None looks for none, as in a negative, which nobody asks where its phrase stands.

    Raises:
        ValueError: as ``encode_with_phrase``, ``_stand_ins`` and ``_layers``.
    """
    words = [word for word in lora.embeddings if word in text]
    if not words:
        return plain(clip, text) if phrase is None or not text.strip() else encode_with_phrase(clip, text, phrase)
    layers, stand_ins = _layers(lora, words), _stand_ins(lora, words, text)
    for word, stand_in in stand_ins.items():
        apart = f" {stand_in} "  # learned words may touch, and what stands for them would be read as one other word
        text = text.replace(word, apart)
        phrase = None if phrase is None else phrase.replace(word, apart)
    places = {} if phrase is None else {keys.PHRASE_POSITIONS: phrase_positions(clip, text, phrase)}
    encodings = [
        clip.encode_from_tokens_scheduled(_with_learned(clip, text, lora, stand_ins, layer)) for layer in range(layers)
    ]
    context = torch.cat([e[0][0] for e in encodings])  # (layers, tokens, channels)
    return node_helpers.conditioning_set_values([encodings[0][0]], {keys.LAYER_CONTEXTS: context, **places})


def _layers(lora: LoraFile, words: Iterable[str]) -> int:
    """How many layers the words were learned for.

    Raises:
        ValueError: not all for as many.
    """
    counts = {len(tensor) for word in words for tensor in lora.embeddings[word].values()}
    if len(counts) > 1:
        raise ValueError(
            f"The ED-LoRA '{lora.name}' has words learned for {' and '.join(map(str, sorted(counts)))} layers, which cannot stand "
            "in one prompt; use one of its words, or another file."
        )
    return counts.pop()


def _stand_ins(lora: LoraFile, words: Sequence[str], text: str) -> dict[str, str]:
    """An ordinary word that the prompt does not hold for each learned one, which takes its place in the tokenizer.

    Raises:
        ValueError: more learned words than there are others.
    """
    free = [word for word in _STAND_INS if word not in text]
    if len(words) > len(free):
        raise ValueError(
            f"The prompt holds {len(words)} learned words of the ED-LoRA '{lora.name}', and {len(free)} can stand in one; use "
            "fewer of them."
        )
    return dict(zip(words, free, strict=False))


def check_layers(concepts: Iterable[Concept], unet: Any) -> None:
    """Refuses prompts with another number of layers than the UNet has cross-attentions.

    Raises:
        ValueError: a layer-wise prompt of another kind of model.
    """
    layers = len(find_sites(unet, CROSS))
    for concept in concepts:
        for _, values in (*concept.positive, *concept.negative):
            own = values.get(keys.LAYER_CONTEXTS)
            if own is not None and len(own) != layers:
                raise ValueError(
                    f"The ED-LoRA '{concept.name}' has learned its words for {len(own)} layers, and this model has {layers} "
                    "cross-attentions; load the checkpoint it was trained on (16 are SD 1.5, 70 are SDXL)."
                )


def plain(clip: Any, text: str) -> list:
    """A prompt as CONDITIONING."""
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def _with_learned(clip: Any, text: str, lora: LoraFile, stand_ins: dict[str, str], layer: int) -> dict[str, list]:
    """The tokens of the prompt, those of the stand-ins exchanged for what one layer has learned."""
    tokens = clip.tokenize(text)
    # the prompts of Concept Conductor have their concept at every place, so every occurrence is exchanged
    places = {p: word for word, s in stand_ins.items() for place in phrase_occurrences(clip, text, s) for p in place}
    for encoder, sections in tokens.items():
        learned = {w: lora.embeddings[w].get(encoder, next(iter(lora.embeddings[w].values()))) for w in stand_ins}
        flat = 0
        for section in sections:
            for at, (_, *rest) in enumerate(section):
                if flat in places:
                    section[at] = (learned[places[flat]][layer], *rest)
                flat += 1
    return tokens
