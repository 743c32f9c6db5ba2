"""Prompts as the rows that a network's first text layer reads: what a closed form is solved on for a transformer.

The rows are caught in front of that layer, in a call of the network that ends there. So they are what a sampling reads,
whatever lies between it and the conditioning: nothing, a norm, or a network of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import comfy.model_management
import comfy.sampler_helpers
import comfy.samplers
import torch

from ....methods.erase.problem import Encode
from ....methods.erase.rows import PromptTokens
from ....methods.token_rows import Token, blocks_of_rows, same_token, unpadded, words_range
from ...architecture import Architecture
from ...engine.gradients import temporarily_set
from ...engine.reach import check_reaches_network
from ...registry import architecture_of, text_entry_of
from ...text.schedules import check_one_encoding
from ...text.tokens import (
    OneEncoder,
    PromptEncoder,
    check_one_section,
    last_occurrence,
    token_sections,
    unweighted,
    word_spans,
)
from ...types import CLIP, Conditioning, HookInputs, ModelPatcher, Tokenizes

_WHO = "Solving an erasure on a transformer"
_PERCENT = 0.5  # of the sampling that the network is called for; its text does not depend on it


class Block(NamedTuple):
    """The rows of one text encoder, (rows, d), how far its tokens are moved there, and the pooled embedding, (p,)."""

    encoder: str
    rows: torch.Tensor
    moved: int
    pooled: torch.Tensor | None


class _Caught(Exception):
    """Ends a call of the network, with what the layer was about to read."""

    def __init__(self, rows: torch.Tensor) -> None:
        super().__init__()
        self.rows = rows


def encode_conditioning(clip: CLIP, text: str) -> Conditioning:
    """The prompt as the host encodes it, with brackets as part of the words."""
    return clip.encode_from_tokens_scheduled(unweighted(clip, text))


def conditioning_rows(clip: CLIP, text: str) -> PromptTokens:
    """The conditioning itself, for fingerprints of a text encoder: no word is looked for."""
    rows = encode_conditioning(clip, text)[0][0][0].float().cpu()
    return PromptTokens(rows, 0, 0, 0)


def entry_rows(model: ModelPatcher, conditioning: Conditioning) -> torch.Tensor:
    """What the first text layer of the MODEL reads of a conditioning, (rows, d), in float32 on the CPU.

    Raises:
        ValueError: the network cannot read it, or hooks are not seen inside it.
    """
    check_reaches_network(model, _WHO)
    comfy.model_management.load_models_gpu([model])
    architecture = architecture_of(model.model)
    layer = architecture.network.get_submodule(architecture.text_entry().layers[0])
    handle = layer.register_forward_pre_hook(_catch)
    rows, reason = None, "the layer that reads it first did not run"
    try:
        _call(model, architecture, conditioning)
    except _Caught as caught:
        rows, reason = caught.rows, f"it reads width {layer.in_features}"
    except RuntimeError as error:
        reason = str(error)
    finally:
        handle.remove()
    if rows is None or rows.shape[-1] != layer.in_features:
        raise ValueError(
            f"This MODEL cannot read text embeddings of width {conditioning[0][0].shape[-1]} ({reason}); connect the "
            "CLIP of the same checkpoint."
        )
    return rows[0].float().cpu().clone()


def _catch(layer: torch.nn.Module, inputs: HookInputs) -> None:
    raise _Caught(inputs[0])


def _call(model: ModelPatcher, architecture: Architecture, conditioning: Conditioning) -> None:
    """One prediction of the host at the smallest latent that every family takes."""
    base, latents = model.model, model.model.latent_format
    frames = (1,) * (latents.latent_dimensions - 2)
    cells = 2 * architecture.patch
    x = torch.zeros((1, latents.latent_channels, *frames, cells, cells), device=model.load_device)
    conds = {"positive": comfy.sampler_helpers.convert_cond(conditioning)}
    with temporarily_set(base, "current_patcher", model), torch.no_grad():
        conds = comfy.samplers.process_conds(base, x, conds, x.device)
        sigma = torch.full((1,), float(base.model_sampling.percent_to_sigma(_PERCENT)), device=x.device)
        comfy.samplers.calc_cond_batch(base, [conds["positive"]], x, sigma, model.model_options)


class EntryText:
    """A MODEL and its CLIP, which encode each prompt once. Padding is kept of the empty prompt alone."""

    def __init__(self, model: ModelPatcher, clip: CLIP) -> None:
        self.model, self.clip = model, clip
        self.architecture = architecture_of(model.model)
        self.known: dict[str, list[Block]] = {}

    def blocks(self, text: str) -> list[Block]:
        """The prompt as the first text layer reads it: a block for each text encoder whose tokens the rows are.

        Raises:
            ValueError: as ``entry_rows``; it is not known whose tokens they are.
        """
        if text not in self.known:
            comfy.model_management.throw_exception_if_processing_interrupted()
            self.known[text] = self._encoded(text)
        return self.known[text]

    def _encoded(self, text: str) -> list[Block]:
        conditioning = encode_conditioning(self.clip, text)
        tokens, values = conditioning[0]
        pooled = values.get("pooled_output")
        pooled = None if pooled is None else pooled[0].float().cpu().clone()
        lengths = {name: sum(map(len, called)) for name, called in unweighted(self.clip, text).items()}
        if self.architecture.text_encoder is not None:
            place, found = slice(None), [(self.architecture.text_encoder, 0)]
        else:
            place, found = self._place(tokens.shape[1]), blocks_of_rows(lengths, tokens.shape[1])
        if not found:
            raise ValueError(
                f"It is not known which rows of a prompt are which words with this CLIP ({', '.join(lengths)}: "
                f"{tokens.shape[1]} rows); connect the CLIP of the same checkpoint."
            )
        rows = entry_rows(self.model, conditioning)[place]
        blocks = []
        for name, moved in found:
            first, cut = max(moved, 0), min(moved, 0)  # its rows lie behind another's, or its first tokens are left out
            blocks.append(Block(name, rows[first : first + self._length(name, text) + cut].clone(), cut, pooled))
        return blocks

    def _place(self, length: int) -> slice:
        """Where the conditioning's rows are among those that the layer reads."""
        cells = 2 * self.architecture.patch
        return self.architecture.layout(self.architecture.text_entry().layers[0], length, (cells, cells)).text

    def _length(self, name: str, text: str) -> int:
        """How many of an encoder's tokens are kept."""
        one = OneEncoder(self.clip, name)
        sections = token_sections(one, text, read_weights=False)
        empty, word = (token_sections(one, t, read_weights=False)[0] for t in ("", "a"))
        if text and not is_clip(empty, word):
            return sum(unpadded(section, empty) for section in sections)
        return sum(map(len, sections))


def is_clip(empty: Sequence[Token], word: Sequence[Token]) -> bool:
    """Whether an encoder's prompts have a start token, and an end token behind it where they are empty.

    Args:
        empty: the section of an empty prompt; ``word`` is that of a word.
    """
    if min(len(empty), len(word)) < 2:
        return False
    return same_token(empty[0], word[0]) and not same_token(empty[1], word[1])


class EntryEncoder:
    """One of the text encoders whose rows a network reads, for ``methods.erase.problem.Encode``.

    Its sections are like those of any prompt: a start token or a template, the words, an end token or a template, and
    padding, which is preserved with the empty prompt and never erased.
    """

    def __init__(self, text: EntryText, number: int) -> None:
        self.text, self.number = text, number
        name = text.blocks("")[number].encoder
        self.clip: Tokenizes = OneEncoder(text.clip, name)
        self.empty, self.word = (token_sections(self.clip, t, read_weights=False)[0] for t in ("", "a"))

    def __call__(self, text: str, phrase: str = "") -> PromptTokens:
        """As ``Encode``."""
        check_one_section(self.clip, text)
        (part,) = self.parts(text)
        if not phrase.strip():
            return part
        found = last_occurrence(self.clip, text, phrase)
        moved = self.text.blocks(text)[self.number].moved
        return part._replace(start=found[0] + moved, end=found[-1] + 1 + moved)

    def parts(self, text: str) -> list[PromptTokens]:
        """As ``Encode``."""
        _, rows, moved, pooled = self.text.blocks(text)[self.number]
        parts = []
        for section in token_sections(self.clip, text, read_weights=False):
            own, rows = rows[: len(section) + moved], rows[len(section) + moved :]
            parts.append(self._part(section, own, moved)._replace(pooled=pooled))
        return parts

    def _part(self, section: list[Token], rows: torch.Tensor, moved: int) -> PromptTokens:
        first, stop = self._words(section)
        words = tuple(w._replace(start=w.start + moved, end=w.end + moved) for w in word_spans(self.clip, section))
        until = None if is_clip(self.empty, self.word) else max(stop, unpadded(section, self.empty)) + moved
        stop += moved
        return PromptTokens(rows, stop, stop, stop, None, words, max(first + moved, 0), until)

    def _words(self, section: list[Token]) -> tuple[int, int]:
        """Where the words begin, and where they end. An empty prompt says only with another where they would be."""
        start = words_range(self.word, self.empty)[0]
        if len(section) == len(self.empty) and all(map(same_token, section, self.empty)):
            return start, start
        return start, words_range(section, self.empty)[1]


def encoders_of(model: ModelPatcher, clip: CLIP) -> Sequence[Encode]:
    """What gives the rows that the MODEL reads of a prompt: an encoder for each of those whose rows lie one behind the
    other.

    Raises:
        ValueError: the CLIP has a schedule, or another network than this MODEL's reads it.
    """
    check_one_encoding(clip)
    if text_entry_of(model) is None:
        return [PromptEncoder(clip)]
    text = EntryText(model, clip)
    return [EntryEncoder(text, number) for number in range(len(text.blocks("")))]
