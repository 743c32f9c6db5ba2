"""LoRA-Composer on transformers: its guider, and what all of them share of the way that concepts get into model calls.

How concepts act inside a call depends on how the network reads text: ``joint.py`` where text and picture attend
together, ``cross.py`` where the picture attends to a text of its own.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, NamedTuple
from uuid import UUID

import comfy.sampler_helpers
import torch

from ...methods.compose.automatic import NEVER_FOUND, regions_of_concepts
from ...methods.compose.groups import RegionGroups
from ...methods.compose.settings import WHO, Compose
from ...methods.lora import LayerLoras
from ...methods.masks import MaskPyramid
from ...methods.panels import Panel, concept_panels
from .. import keys
from ..architecture import Size
from ..engine.base_prompts import BasePrompts
from ..engine.guider import RunGuider, Sampling
from ..engine.model_call import ModelCall, RunCall, around_model_call, conditioning_rows
from ..engine.preview import Painter
from ..engine.reach import check_answered, check_reaches_network
from ..engine.sampling import percent_of
from ..lora.branches import Branch, low_rank, prepared
from ..lora.concept import Concept, check_concept_prompts, check_layers, phrase_of, with_strength
from ..lora.factors import network_factors
from ..registry import architecture_of
from ..text.equal_lengths import TextAttentionCall, TextAttentions, check_text_attentions
from ..text.sequence import text_of
from ..types import BaseModel, ModelOptions, ModelPatcher

log = logging.getLogger(__name__)
_PROMPT_TYPES = ("positive", "negative")


class TransformerConcept(NamedTuple):
    """A concept where and as the model computes: positive and negative, (1, tokens, channels) each, and its LoRA.

    ``phrase`` holds the positions of its phrase in the positive, where they are looked for.
    """

    prompts: tuple[torch.Tensor, torch.Tensor]
    factors: LayerLoras
    strength: float
    phrase: tuple[int, ...] = ()


class TransformerInjection(ABC):
    """What puts concepts into the model calls of one sampling. A subclass says how.

    Args:
        concepts: one per region; one that comes twice is the same object twice.
        size: of the latent in cells.
        coverage: how much of each cell each region covers, (concepts, height, width). None looks for the regions: the
            base draws alone, and ``maps`` gets the attention to the phrases, until ``place`` says where they are.
        cond_or_uncond: uuid of a conditioning entry to 0 (positive) or 1 (negative).
    """

    masks: MaskPyramid | None

    def __init__(
        self,
        model: BaseModel,
        concepts: Sequence[TransformerConcept],
        size: Size,
        coverage: torch.Tensor | None,
        cond_or_uncond: Mapping[UUID, int],
        settings: Compose,
        soft: bool = False,
    ) -> None:
        self.architecture, self.concepts, self.settings = architecture_of(model), concepts, settings
        self.cond_or_uncond, self.soft = cond_or_uncond, soft
        self.attentions = TextAttentions(model.diffusion_model, self.architecture.equal_lengths)
        self.size = size
        self.grid, self.tokens = self.architecture.grid(*size), self.architecture.image_tokens(size)[0]
        self.maps, self.masks = torch.zeros(()), None
        self._groups: dict[int, RegionGroups] = {}
        self.called = self.answered = False
        if coverage is not None:
            self.place(coverage.float().cpu(), self.architecture.patch)

    def place(self, regions: torch.Tensor, patch: int = 1) -> None:
        """Puts the concepts into these regions, (concepts, height, width); ``patch`` is the side of a token there."""
        self.masks = MaskPyramid(regions, self.soft, overlapping=True).with_side(patch)
        self._groups.clear()

    def groups(self, frames: int = 1) -> RegionGroups:
        """Who reads whom in a picture of so many frames, of which each has the same regions."""
        if frames not in self._groups:
            inside = None if self.masks is None else self.masks.inside(self.grid).repeat(1, frames)
            soft = None if self.masks is None or not self.soft else self.masks.weights(self.grid).repeat(1, frames)
            given = (self.settings.isolation, self.settings.base_in_regions, self.tokens * frames)
            self._groups[frames] = RegionGroups(inside, *given, weights=soft)
        return self._groups[frames]

    def options(self, model_options: ModelOptions) -> ModelOptions:
        """A copy of the options under which the concepts have their regions."""
        if not self.concepts:
            return model_options
        return around_model_call(model_options, keys.COMPOSER, self._around)

    def _around(self, call: ModelCall, run: RunCall) -> torch.Tensor:
        entries = conditioning_rows(call.transformer_options, len(call.x))
        numbers = [self.cond_or_uncond[entry.uuid] for entry in entries if entry.uuid in self.cond_or_uncond]
        if not numbers:
            return run(call)
        if len(numbers) < len(entries):
            raise ValueError(
                f"Another node has put a prompt of its own into a model call of {WHO}, whose concepts have no place in "
                "it; bypass that node."
            )
        return self.made(call, run, [(entry.rows, number) for entry, number in zip(entries, numbers, strict=True)])

    @abstractmethod
    def made(self, call: ModelCall, run: RunCall, entries: Sequence[tuple[slice, int]]) -> torch.Tensor:
        """The output of a call with the concepts in it.

        Args:
            entries: the rows of every entry of the call, and whether it is positive (0) or negative (1).
        """

    def ran(self, within: TextAttentionCall, call: ModelCall, run: RunCall, branches: Sequence[Branch]) -> torch.Tensor:
        """The output of a call with changed attentions and with branches.

        Raises:
            ValueError: attentions, or other layers that should have run, have not.
        """
        with low_rank(self.attentions.network, branches) as silent:
            out = within.run(call, run)
        self.called = True
        if within.answered:  # else a step cache answered this call
            self.answered = True
            check_answered([*silent, *(self.attentions.sites.keys() - within.answered)], WHO)
        return out

    def check_answered(self) -> None:
        """Refuses a sampling in which no call has reached the network.

        Raises:
            ValueError: which layer has never run.
        """
        if self.called and not self.answered:
            check_answered(self.attentions.sites, WHO)


class TransformerGuider(RunGuider[TransformerInjection]):
    """LoRA Composer on a transformer; the arguments are as ``ComposeGuider``'s.

    A region that covers nothing leaves its concept out. Without regions they are found in the attention to the
    phrases, one set for the whole batch.

    After a sampling ``regions`` holds the regions at the latent's size.
    """

    injection: ClassVar[type[TransformerInjection]]

    def __init__(
        self,
        model: ModelPatcher,
        base: BasePrompts,
        concepts: Sequence[Concept],
        coverage_at: Callable[[int, int], torch.Tensor] | None,
        settings: Compose,
        soft: bool = False,
    ) -> None:
        super().__init__(model, base.cfg, keys.COMPOSER)
        self.inner_set_conds(base.checked())
        self.active = with_strength(concepts)
        self.concepts = [concepts[number] for number in self.active]
        check_concept_prompts(self.concepts)
        self.coverage_at, self.settings, self.soft = coverage_at, settings, soft
        self.regions: torch.Tensor | None = None
        if self.concepts:
            _check_model(model.model, self.concepts)
            _say_what_is_left_out(model.model, settings)

    def is_plain(self) -> bool:
        return not self.concepts

    def begin(self, sampling: Sampling) -> TransformerInjection:
        check_reaches_network(self.model_patcher, WHO)
        height, width = sampling.noise.shape[-2:]
        self.regions = None if self.coverage_at is None else self.coverage_at(height, width)[self.active]
        cond_or_uncond = {
            entry["uuid"]: number for number, name in enumerate(_PROMPT_TYPES) for entry in self.conds.get(name, ())
        }
        size, covered = (int(height), int(width)), None
        if self.regions is None:
            concepts = _transformer_concepts(self.inner_model, sampling, self.concepts, searching=True)
        else:
            there = [number for number, region in enumerate(self.regions) if region.any()]
            covered = self.regions[there]
            concepts = _transformer_concepts(self.inner_model, sampling, [self.concepts[number] for number in there])
        return self.injection(self.inner_model, concepts, size, covered, cond_or_uncond, self.settings, self.soft)

    def predict(
        self, run: TransformerInjection, x: torch.Tensor, sigma: torch.Tensor, options: ModelOptions, seed: int | None
    ) -> torch.Tensor:
        if run.masks is None and run.maps.ndim and self._percent(sigma) >= self.settings.automatic:
            maps = run.maps.unflatten(-1, run.grid)
            self.regions = regions_of_concepts(maps, [concept.name for concept in self.concepts])
            run.place(self.regions)
        return self.guided(x, sigma, run.options(options), seed)

    def _percent(self, sigma: torch.Tensor) -> float:
        return percent_of(self.inner_model.model_sampling, float(sigma.max()))

    def finish(self, run: TransformerInjection) -> None:
        run.check_answered()
        if self.concepts and run.masks is None:
            log.warning(NEVER_FOUND, 100 * self.settings.automatic)

    def panels(self, run: TransformerInjection, x0: torch.Tensor, paint: Painter) -> list[Panel]:
        """The picture under the regions, once they are known."""
        if self.regions is None:
            return [Panel(paint(x0))]
        return concept_panels(paint(x0), self.regions, [concept.phrase for concept in self.concepts])


def changed_by_another() -> ValueError:
    """The refusal of an attention in which another node has changed what is read."""
    return ValueError(
        f"Another node changes the attention that {WHO} works in, by a mask or by tokens of its own; bypass it."
    )


def _check_model(model: BaseModel, concepts: Sequence[Concept]) -> None:
    """Refuses what a transformer cannot do.

    Raises:
        ValueError: what it is, and what to do.
    """
    architecture = architecture_of(model)
    if not architecture.equal_lengths.attentions:
        raise architecture.lacks(f"{WHO} where a picture is part of the prompt", "load a model for text alone")
    check_text_attentions(model, architecture, WHO)
    check_layers(concepts, model)


def _say_what_is_left_out(model: BaseModel, settings: Compose) -> None:
    idle = {"enhancement": settings.enhancement > 0, "first_noise": settings.reinit != "off"}
    if names := " and ".join(name for name, on in idle.items() if on):
        log.info("%s: on %s models %s does nothing.", WHO, architecture_of(model).title, names)


def _transformer_concepts(
    model: BaseModel, sampling: Sampling, concepts: Sequence[Concept], searching: bool = False
) -> list[TransformerConcept]:
    """The concepts for a loaded model, their prompts processed as the host does it.

    Args:
        searching: whether their phrases are looked for.

    Raises:
        ValueError: as ``text_of``, and as ``phrase_of``.
    """
    phrases = {id(concept): phrase_of(concept) if searching else () for concept in concepts}
    dtype, device = model.manual_cast_dtype or model.get_dtype(), model.current_patcher.load_device
    made: dict[int, TransformerConcept] = {}
    for concept in concepts:
        if id(concept) not in made:
            factors = prepared(network_factors(concept.lora, model), device, dtype)
            prompts = _prompts(model, sampling, concept, factors)
            made[id(concept)] = TransformerConcept(prompts, factors, concept.strength, phrases[id(concept)])
    return [made[id(concept)] for concept in concepts]


def _prompts(
    model: BaseModel, sampling: Sampling, concept: Concept, factors: LayerLoras
) -> tuple[torch.Tensor, torch.Tensor]:
    """A concept's positive and negative as the network reads them, (1, tokens, channels) each.

    Some networks prepare prompts in layers of their own (Anima), and those get the concept's LoRA. It is done under
    inference mode, because the host leaves it to the model call otherwise.
    """
    architecture = architecture_of(model)
    raw = {name: comfy.sampler_helpers.convert_cond(getattr(concept, name)[:1]) for name in _PROMPT_TYPES}
    early = {layer: own for layer, own in factors.items() if architecture.before_call(layer)}
    with torch.inference_mode(), low_rank(architecture.network, [Branch(early, concept.strength)]):
        processed = sampling.process(raw)
    device = model.current_patcher.load_device
    positive, negative = (text_of(architecture, processed[name][0], WHO) for name in _PROMPT_TYPES)
    with torch.inference_mode(False):
        return positive.to(device).clone(), negative.to(device).clone()
