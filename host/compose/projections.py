"""Concepts inside a UNet: their keys and values at every site, and the attention that their phrases get."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple
from uuid import UUID

import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

from ...methods.lora import LayerLoras, LoraFactors
from ...methods.lora_tokens import unknown_grid
from .. import keys
from ..engine.attention import CROSS, Site, heads_apart, sites_of
from ..engine.model_call import ModelCall, RunCall, around_model_call, conditioning_rows
from ..lora.branches import prepared
from ..lora.concept import Concept, check_layers, phrase_of
from ..lora.factors import network_factors
from ..registry import unet_of
from ..types import BaseModel, ModelOptions, TransformerOptions

POSITIVE, NEGATIVE = 0, 1  # as the host counts in ``cond_or_uncond``
_TEXT_PATCHES = "attn2_patch"  # the host's name

TextPatch = Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
"""Called by the host as ``patch(n, context, value, extra_options)``."""


class ConceptPrompts(NamedTuple):
    """A concept's prompts, (layers or 1, tokens, channels) each, and the phrase's positions in the positive."""

    positive: torch.Tensor
    negative: torch.Tensor
    phrase: tuple[int, ...]

    def at(self, layer: int, cond_or_uncond: int) -> torch.Tensor:
        """The context that a cross-attention reads, (1, tokens, channels)."""
        layers = (self.positive, self.negative)[cond_or_uncond]
        return layers[layer if len(layers) > 1 else 0][None]


@dataclass(frozen=True, eq=False)
class PreparedConcept:
    """A concept where and as the model computes. ``factors`` are from ``branches.prepared``."""

    prompts: ConceptPrompts
    factors: LayerLoras
    strength: float = 1.0


class KeysAndValues(NamedTuple):
    """Keys and values of one concept at one site, (1, tokens, heads · channels)."""

    keys: torch.Tensor
    values: torch.Tensor


def prepared_concepts(model: BaseModel, concepts: Sequence[Concept]) -> list[PreparedConcept]:
    """The concepts for a loaded model, in their order. One that comes twice is the same object twice.

    Raises:
        ValueError: as ``check_layers`` and ``concept_prompts``.
    """
    dtype = model.manual_cast_dtype or model.get_dtype()
    device = model.current_patcher.load_device
    unet_of(model)  # any other network is refused before its prompts are looked at
    check_layers(concepts, model)
    made: dict[int, PreparedConcept] = {}
    for concept in concepts:
        if id(concept) not in made:
            factors = prepared(network_factors(concept.lora, model), device, dtype)
            prompts = concept_prompts(concept, device, dtype)
            made[id(concept)] = PreparedConcept(prompts, factors, concept.strength)
    return [made[id(concept)] for concept in concepts]


def concept_prompts(concept: Concept, device: torch.device, dtype: torch.dtype) -> ConceptPrompts:
    """A concept's prompts where and as the model computes, as ordinary tensors.

    Raises:
        ValueError: the prompt does not mark its phrase.
    """
    contexts = []
    with torch.inference_mode(False):
        for context, values in (concept.positive[0], concept.negative[0]):
            layers = values.get(keys.LAYER_CONTEXTS, context)
            contexts.append(layers.detach().to(device, dtype).clone())
    return ConceptPrompts(contexts[0], contexts[1], phrase_of(concept))


class ProjectedConcepts:
    """The keys and values of concepts at a UNet's cross-attentions. They do not depend on the picture: once per run.

    Where another node patches the text inside the network, they are computed again in each call
    (``with_patched_words``): ``of_call`` then holds those of all rows of the last call.

    Args:
        concepts: one per region; the same object in two regions is computed once.
    """

    def __init__(self, unet: UNetModel, concepts: Sequence[PreparedConcept]) -> None:
        self.unet, self.concepts = unet, concepts
        self.sites = sites_of(unet)
        names = {id(module): name for name, module in unet.named_modules()}
        self.module_names = {site: names[id(site.module(unet))] for site in self.sites}
        self.cached: dict[tuple[int, Site, int], KeysAndValues] = {}
        self.of_call: dict[tuple[int, Site], KeysAndValues] = {}

    def fill(self) -> None:
        """Computes all keys and values, as ordinary tensors that a gradient may pass."""
        with torch.inference_mode():
            for concept in self.concepts:
                for site in self.sites:
                    for cond_or_uncond in (POSITIVE, NEGATIVE) if site.kind == CROSS else ():
                        self.at(concept, site, cond_or_uncond)
        with torch.inference_mode(False):
            self.cached = {key: KeysAndValues(c.keys.clone(), c.values.clone()) for key, c in self.cached.items()}

    def at(self, concept: PreparedConcept, site: Site, cond_or_uncond: int) -> KeysAndValues:
        """The keys and values of a concept's positive (0) or negative (1) at a cross-attention."""
        key = (id(concept), site, cond_or_uncond)
        if key not in self.cached:
            context = concept.prompts.at(site.layer, cond_or_uncond)
            self.cached[key] = self.projected(concept, site, context, context)
        return self.cached[key]

    def of_rows(self, concept: PreparedConcept, site: Site, entries: Sequence[int], size: int) -> KeysAndValues:
        """Those of all rows of a call, (rows, tokens, heads · channels).

        Args:
            entries: 0 or 1 for every entry of the call; ``size`` is the number of rows of each.
        """
        patched = self.of_call.get((id(concept), site))
        if patched is not None:
            return patched
        pairs = [self.at(concept, site, cond_or_uncond) for cond_or_uncond in entries]
        return KeysAndValues(*(in_rows(tensors, size) for tensors in zip(*pairs, strict=True)))

    def projected(
        self, concept: PreparedConcept, site: Site, for_keys: torch.Tensor, for_values: torch.Tensor
    ) -> KeysAndValues:
        """The keys and values of contexts (rows, tokens, channels)."""
        return KeysAndValues(
            self._projected(concept, site, "to_k", for_keys), self._projected(concept, site, "to_v", for_values)
        )

    def _projected(self, concept: PreparedConcept, site: Site, layer: str, context: torch.Tensor) -> torch.Tensor:
        """The layer's own output, however its weights are stored, with the concept's branch.

        Past its hooks: inside a call, a capture would take the concept's keys for the base's.
        """
        output = getattr(site.module(self.unet), layer).forward(context)
        factors = concept.factors.get(f"{self.module_names[site]}.{layer}", ())
        for own in factors if concept.strength != 0 else ():
            output = output + _branch(context, own, concept.strength).to(output)
        return output

    def out_branch(self, concept: PreparedConcept, site: Site, attended: torch.Tensor) -> torch.Tensor | None:
        """What the concept adds to the output of ``to_out``, (rows, tokens, channels), from what its keys answered."""
        factors = concept.factors.get(f"{self.module_names[site]}.to_out.0", ())
        if not factors or concept.strength == 0:
            return None
        first, *others = (_branch(attended, own, concept.strength) for own in factors)
        return sum(others, first)

    def attention_map(
        self, q: torch.Tensor, site: Site, concept: PreparedConcept, rows: slice = slice(None)
    ) -> torch.Tensor:
        """How much queries of positive rows attend to the concept's phrase, (rows, phrase, tokens), mean over heads.

        Args:
            rows: where the queries are among those of the last call.
        """
        heads, patched = site.module(self.unet).heads, self.of_call.get((id(concept), site))
        k = self.at(concept, site, POSITIVE).keys if patched is None else patched.keys[rows]
        q, k = (heads_apart(t, heads).float() for t in (q, k.to(q)))
        attention = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1).mean(1)  # (rows, tokens, prompt)
        count, words = k.shape[-2], concept.prompts.positive.shape[1]
        copies = count // words if count % words == 0 else 1  # of the words (``in_rows``): all of them count
        return attention[..., list(concept.prompts.phrase)].transpose(1, 2) * copies


def with_patched_words(
    model_options: ModelOptions, projected: ProjectedConcepts, cond_or_uncond: Mapping[UUID, int]
) -> ModelOptions:
    """A copy of the options under which other nodes' patches of the text change the concepts' words as the base's.

    A concept's keys and values do not come from the model's own projections of the prompt, before which such a patch
    stands (an erasure by text). So it is called once more with the concept's words in the base's place. The patches are
    looked up at each call, because only then it is known which there are.

    Args:
        cond_or_uncond: uuid of a conditioning entry to 0 (positive) or 1 (negative); calls with others are left alone.
    """

    def call_with_words(call: ModelCall, run: RunCall) -> torch.Tensor:
        projected.of_call.clear()
        patches = call.transformer_options.get("patches", {})
        entries = conditioning_rows(call.transformer_options, len(call.x))
        if not patches.get(_TEXT_PATCHES) or not all(entry.uuid in cond_or_uncond for entry in entries):
            return run(call)
        first = _patch_of_concepts(projected, patches[_TEXT_PATCHES], [cond_or_uncond[e.uuid] for e in entries])
        with_ours = {**patches, _TEXT_PATCHES: [first, *patches[_TEXT_PATCHES]]}
        return run(call._replace(transformer_options={**call.transformer_options, "patches": with_ours}))

    return around_model_call(model_options, keys.CONCEPT_WORDS, call_with_words)


def _patch_of_concepts(projected: ProjectedConcepts, patches: Sequence[TextPatch], entries: Sequence[int]) -> TextPatch:
    """A patch that leaves everything as it is, and calls the other patches with each concept's words."""
    at_place = {(site.block, site.depth): site for site in projected.sites if site.kind == CROSS}

    def patch(
        n: torch.Tensor, context: torch.Tensor, value: torch.Tensor, extra_options: TransformerOptions
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        site = at_place[tuple(extra_options["block"]), extra_options["block_index"]]
        for concept in projected.concepts:
            words = [concept.prompts.at(site.layer, cond_or_uncond) for cond_or_uncond in entries]
            own = in_rows(words, len(n) // len(entries)).to(context)
            changed = (n, own, own)
            for other in patches:
                changed = other(*changed, extra_options)
            projected.of_call[id(concept), site] = projected.projected(concept, site, *changed[1:])
        return n, context, value

    return patch


def in_rows(entries: Sequence[torch.Tensor], size: int) -> torch.Tensor:
    """Tensors (1, tokens, channels) of entries as rows of a call, ``size`` each, (rows, tokens, channels).

    Tokens are repeated where their numbers differ, as the host repeats them: attention is the same over copies.
    """
    tokens = math.lcm(*(entry.shape[1] for entry in entries))
    return torch.cat([entry.repeat(1, tokens // entry.shape[1], 1).expand(size, -1, -1) for entry in entries])


def _branch(x: torch.Tensor, factors: LoraFactors, strength: float) -> torch.Tensor:
    return factors.to(x.device, x.dtype).change(x) * strength


def grid_of(q: torch.Tensor, transformer_options: TransformerOptions) -> tuple[int, int]:
    """Height and width of the picture at an attention with these queries (rows, tokens, channels).

    Raises:
        ValueError: there are more or fewer queries than tokens of the grid.
    """
    height, width = (int(length) for length in transformer_options["activations_shape"][-2:])
    if q.shape[1] != height * width:
        raise unknown_grid(q.shape[1], [height * width])
    return height, width
