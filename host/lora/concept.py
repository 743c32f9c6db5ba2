"""A concept: a LoRA, its strength, and its prompts, encoded by the text encoder with the LoRA's text part."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import comfy.lora
import node_helpers
import torch

from ...methods.assignment import as_label
from .. import keys
from ..engine.attention import CROSS, find_sites
from ..engine.base_prompts import needs_own_call
from ..registry import architecture_of, has_decoder, unet_of
from ..text.tokens import encode_with_phrase, phrase_occurrences, phrase_rows
from ..types import CLIP, BaseModel, Conditioning, TextEncoder, Tokens
from .files import LoraFile

_STAND_INS = ("sks", "pll", "ucd", "mth", "aav", "rrs", "wht", "gdp")  # rare words of one token
_OLD_NAMES = ((".q_proj", ".to_q"), (".k_proj", ".to_k"), (".v_proj", ".to_v"), (".out_proj", ".to_out"))
"""The layers of an attention by transformers' names, and by diffusers' older ones."""


@dataclass(frozen=True, eq=False)
class Concept:
    """One concept of a picture. Its positive holds the positions of the phrase (``keys.PHRASE_POSITIONS``)."""

    name: str
    phrase: str
    lora: LoraFile
    strength: float
    positive: Conditioning
    negative: Conditioning

    @property
    def labels(self) -> set[str]:
        """The labels by which a region is this concept's."""
        return {as_label(self.phrase), as_label(self.name)} - {""}


def make_concept(lora: LoraFile, strength: float, clip: CLIP, prompt: str, phrase: str, negative: str) -> Concept:
    """Encodes the prompts of a concept.

    Args:
        phrase: the words of the prompt that are the concept. Empty takes the file's own phrase if the prompt holds it,
            else the whole prompt.

    Raises:
        ValueError: the prompt does not hold the phrase; as ``with_text_part`` and ``check_concept_prompts``.
    """
    encoder, _ = with_text_part(clip, lora, strength)
    if not phrase.strip() and lora.phrase and lora.phrase in prompt:
        phrase = lora.phrase
    conds = _encode(encoder, lora, prompt, phrase), _encode(encoder, lora, negative, None)
    concept = Concept(lora.name, phrase.strip() or prompt, lora, strength, *conds)
    check_concept_prompts([concept])
    return concept


def _encode(clip: CLIP, lora: LoraFile, text: str, phrase: str | None) -> Conditioning:
    """CONDITIONING of a prompt; with the words of an ED-LoRA in it, one encoding per attention layer.

    Args:
        phrase: as ``make_concept``. None looks for none: the phrase of a negative is never needed.

    Raises:
        ValueError: as ``encode_with_phrase``, ``_stand_ins`` and ``_layer_count``.
    """
    words = [word for word in (*lora.embeddings, *lora.bundled) if re.search(_written(lora, word), text)]
    if words:
        return _encode_learned(clip, lora, text, phrase, words)
    if phrase is None or not text.strip():
        return clip.encode_from_tokens_scheduled(clip.tokenize(text))
    return encode_with_phrase(clip, text, phrase)


def _written(lora: LoraFile, word: str) -> str:
    """A pattern for a learned word in a prompt. Those of an ED-LoRA may touch; ``embedding:word`` is the host's."""
    return re.escape(word) if word in lora.embeddings else rf"(?<![\w:]){re.escape(word)}(?!\w)"


def _encode_learned(clip: CLIP, lora: LoraFile, text: str, phrase: str | None, words: Sequence[str]) -> Conditioning:
    """The prompt with these learned words; with one of an ED-LoRA, one encoding per attention layer."""
    layers, stand_ins = _layer_count(lora, words), _stand_ins(lora, words, text)
    for word, stand_in in stand_ins.items():
        # learned words may touch, and their stand-ins would be read as one other word
        spaced = f" {' '.join([stand_in] * len(_vectors(lora, word)))} "
        text = re.sub(_written(lora, word), spaced, text)
        phrase = None if phrase is None else re.sub(_written(lora, word), spaced, phrase)
    tokens = (_learned_tokens(clip, text, lora, stand_ins, layer) for layer in range(layers or 1))
    encodings = [clip.encode_from_tokens_scheduled(of_layer) for of_layer in tokens]
    _check_one_call(lora.name, encodings[0])
    contexts = torch.cat([e[0][0] for e in encodings])  # (layers, tokens, channels)
    by_layer = {keys.LAYER_CONTEXTS: contexts} if layers else {}
    positions = {} if phrase is None else {keys.PHRASE_POSITIONS: phrase_rows(clip, text, phrase, encodings[0][0])}
    return node_helpers.conditioning_set_values([encodings[0][0]], {**by_layer, **positions})


def _vectors(lora: LoraFile, word: str, encoder: str = "", layer: int = 0) -> torch.Tensor:
    """What a learned word is to one layer, (tokens, channels)."""
    by_encoder = lora.embeddings.get(word) or lora.bundled[word]
    found = by_encoder.get(encoder, next(iter(by_encoder.values())))
    return found[layer][None] if word in lora.embeddings else found


def _layer_count(lora: LoraFile, words: Iterable[str]) -> int:
    """How many layers the words were learned for; 0 if for all alike.

    Raises:
        ValueError: they were learned for different numbers of layers.
    """
    counts = {len(tensor) for word in words for tensor in lora.embeddings.get(word, {}).values()}
    if len(counts) > 1:
        raise ValueError(
            f"The ED-LoRA '{lora.name}' has words learned for {' and '.join(map(str, sorted(counts)))} layers, which "
            "cannot be in one prompt; use one of its words, or another file."
        )
    return counts.pop() if counts else 0


def _stand_ins(lora: LoraFile, words: Sequence[str], text: str) -> dict[str, str]:
    """For each learned word an ordinary one that the prompt does not hold, to replace it in the tokenizer.

    Raises:
        ValueError: more learned words than there are such words.
    """
    free = [word for word in _STAND_INS if word not in text]
    if len(words) > len(free):
        raise ValueError(
            f"The prompt holds {len(words)} learned words of the LoRA '{lora.name}', and one prompt can hold "
            f"{len(free)}; use fewer of them."
        )
    return dict(zip(words, free, strict=False))


def text_names(encoder: TextEncoder) -> dict[str, str]:
    """Every name a file may call a layer of the text encoder by, to the name of its weight.

    transformers 5 has no ``text_model.`` in its names, and PEFT's adapters of one encoder do not name it.
    """
    names: dict[str, str] = comfy.lora.model_lora_keys_clip(encoder, {})
    for name, weight in list(names.items()):
        for spelled in (name, name.replace(".text_model.", ".", 1), name.replace("_text_model_", "_", 1)):
            names.setdefault(spelled, weight)
            if spelled.startswith(("text_encoder.", "text_encoder_2.")):
                names |= {spelled.replace(new, old): weight for new, old in _OLD_NAMES if new in spelled}
            if spelled.startswith("text_encoder."):
                bare = spelled.removeprefix("text_encoder.")
                names |= {bare: weight, f"lycoris_{bare.replace('.', '_')}": weight}
    return names


def with_text_part(clip: CLIP, lora: LoraFile, strength: float) -> tuple[CLIP, int]:
    """A clone of the text encoder with the file's text part as ordinary patches, and how many weights it changes.

    Raises:
        ValueError: as ``LoraFile.text_part``, or the file has a text part alone, and none of it fits.
    """
    tensors = lora.text_part()
    if not tensors or strength == 0:
        return clip, 0
    patches = comfy.lora.load_lora(tensors, text_names(clip.cond_stage_model), log_missing=False)
    if not patches and lora.text_alone:
        raise ValueError(
            f"The LoRA '{lora.name}' changes the text encoder alone, and has no layer of this one (it begins with "
            f"'{next(iter(tensors))}'); connect the CLIP of the checkpoint it was made for."
        )
    tensors.log(lora.name, "text encoder")
    changed = clip.clone()
    return changed, len(changed.add_patches(patches, strength))


def with_strength(concepts: Sequence[Concept]) -> list[int]:
    """The numbers of the concepts that do anything."""
    return [number for number, concept in enumerate(concepts) if concept.strength != 0]


def phrase_of(concept: Concept) -> tuple[int, ...]:
    """The positions of the phrase in the concept's positive.

    Raises:
        ValueError: they are not known.
    """
    phrase = concept.positive[0][1].get(keys.PHRASE_POSITIONS)
    if not phrase:
        raise ValueError(
            f"The concept '{concept.name}' has no phrase in its prompt, so its place in the picture cannot be found; "
            "write a phrase that occurs in the prompt."
        )
    return tuple(phrase)


def check_concept_prompts(concepts: Iterable[Concept]) -> None:
    """Refuses concepts whose prompts need model calls of their own.

    Raises:
        ValueError: the CLIP of one has hooks or a schedule.
    """
    for concept in concepts:
        _check_one_call(concept.name, concept.positive)
        _check_one_call(concept.name, concept.negative)


def _check_one_call(name: str, conditioning: Conditioning) -> None:
    times = [(values.get("clip_start_percent", 0.0), values.get("clip_end_percent", 1.0)) for _, values in conditioning]
    what = "a schedule" if times and times != [(0.0, 1.0)] else needs_own_call(conditioning)
    if what:
        raise ValueError(
            f"The CLIP of the concept '{name}' gives its prompt {what} (Set CLIP Hooks), which would split the one "
            "model call of all concepts; connect the checkpoint's CLIP, and load LoRAs for the whole picture with Load "
            "LoRA."
        )


def check_layers(concepts: Iterable[Concept], model: BaseModel) -> None:
    """Refuses prompts with another number of layers than a UNet has cross-attentions, and any on other networks.

    Raises:
        ValueError: a layer-wise prompt of another kind of model.
    """
    layers = len(find_sites(unet_of(model), CROSS)) if has_decoder(model) else 0
    for concept in concepts:
        for _, values in (*concept.positive, *concept.negative):
            contexts = values.get(keys.LAYER_CONTEXTS)
            if contexts is not None and not layers:
                raise architecture_of(model).lacks(
                    f"The ED-LoRA '{concept.name}'", "use a LoRA that was trained on such a model"
                )
            if contexts is not None and len(contexts) != layers:
                raise ValueError(
                    f"The ED-LoRA '{concept.name}' has learned its words for {len(contexts)} layers, and this model "
                    f"has {layers} cross-attentions; load the checkpoint it was trained on (16 are SD 1.5, 70 are "
                    "SDXL)."
                )


def _learned_tokens(clip: CLIP, text: str, lora: LoraFile, stand_ins: dict[str, str], layer: int) -> Tokens:
    """The tokens of the prompt, with the stand-ins replaced by the vectors that one layer has learned."""
    tokens = clip.tokenize(text)
    # the prompts of Concept Conductor name their concept several times, so every occurrence is replaced
    word_at = {
        at: (word, number)
        for word, stand_in in stand_ins.items()
        for number, found in enumerate(phrase_occurrences(clip, text, stand_in))
        for at in found
    }
    for encoder, sections in tokens.items():
        position = 0
        for section in sections:
            for at, (_, *rest) in enumerate(section):
                if position in word_at:
                    word, number = word_at[position]
                    vectors = _vectors(lora, word, encoder, layer)
                    section[at] = (vectors[number % len(vectors)], *rest)
                position += 1
    return tokens
