"""LoRA-Composer on networks where text and picture attend together: all prompts in one sequence with the picture.

There the text changes from block to block, so a concept's keys and values cannot be computed once. Its prompt lies
behind the base's in the same text instead. Who reads whom is said in groups (``methods/compose/groups.py``), positions
are those that each prompt has alone, and each LoRA acts on its own words and on its region.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple
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
from ..lora.branches import Branch, TokensByKind, low_rank, prepared
from ..lora.concept import Concept, check_concept_prompts, check_layers, phrase_of, with_strength
from ..lora.factors import network_factors
from ..registry import architecture_of
from ..text.equal_lengths import TextAttentions, has_own_call
from ..text.sequence import SequenceText, text_of
from ..types import BaseModel, ModelOptions, ModelPatcher
from .grouping import GroupedCall, SearchingCall

log = logging.getLogger(__name__)
_PROMPT_TYPES = ("positive", "negative")


class JointConcept(NamedTuple):
    """A concept where and as the model computes: positive and negative, (1, tokens, channels) each, and its LoRA.

    ``phrase`` holds the positions of its phrase in the positive, where they are looked for.
    """

    prompts: tuple[torch.Tensor, torch.Tensor]
    factors: LayerLoras
    strength: float
    phrase: tuple[int, ...] = ()


class JointInjection:
    """What puts concepts into the model calls of one sampling.

    Args:
        size: of the latent in cells.
        coverage: how much of each cell each region covers, (concepts, height, width). None looks for the regions: the
            base draws alone, and ``maps`` gets the attention to the phrases, until ``place`` says where they are.
        cond_or_uncond: uuid of a conditioning entry to 0 (positive) or 1 (negative).
    """

    def __init__(
        self,
        model: BaseModel,
        concepts: Sequence[JointConcept],
        size: Size,
        coverage: torch.Tensor | None,
        cond_or_uncond: Mapping[UUID, int],
        settings: Compose,
        soft: bool = False,
    ) -> None:
        self.architecture, self.concepts, self.settings = architecture_of(model), concepts, settings
        self.cond_or_uncond, self.soft = cond_or_uncond, soft
        self.attentions = TextAttentions(model.diffusion_model, self.architecture.equal_lengths)
        own = (site for site in self.architecture.sites() if site.attention.kind == "self")
        self.picture_alone = {site.block for site in own if site.attention.output == ("image",)}
        self.grid, self.maps = self.architecture.grid(*size), torch.zeros(())
        self.masks: MaskPyramid | None = None
        self.groups = RegionGroups(None, tokens=self.architecture.image_tokens(size)[0])
        self.called = self.answered = False
        if coverage is not None:
            self.place(coverage.float().cpu(), self.architecture.patch)

    def place(self, regions: torch.Tensor, patch: int = 1) -> None:
        """Puts the concepts into these regions, (concepts, height, width); ``patch`` is the side of a token there."""
        self.masks = MaskPyramid(regions, self.soft, overlapping=True).with_side(patch)
        inside = self.masks.inside(self.grid)
        self.groups = RegionGroups(inside, self.settings.isolation, self.settings.base_in_regions)

    def options(self, model_options: ModelOptions) -> ModelOptions:
        """A copy of the options under which the concepts have their regions."""
        if not self.concepts:
            return model_options
        return around_model_call(model_options, keys.COMPOSER, self._call)

    def _call(self, call: ModelCall, run: RunCall) -> torch.Tensor:
        entries = conditioning_rows(call.transformer_options, len(call.x))
        numbers = [self.cond_or_uncond[entry.uuid] for entry in entries if entry.uuid in self.cond_or_uncond]
        if not numbers:
            return run(call)
        if len(numbers) < len(entries):
            raise ValueError(
                f"Another node has put a prompt of its own into a model call of {WHO}, which has no place for it in "
                "the sequence of all prompts; bypass that node."
            )
        text = SequenceText(self.architecture, call, [[c.prompts[n] for c in self.concepts] for n in numbers], WHO)
        grouped = self._grouped(text, [entry.rows for entry in entries], numbers)
        with low_rank(self.attentions.network, self._branches(text, call.x.device)) as silent:
            out = grouped.run(text.call, run)
        if isinstance(grouped, SearchingCall):
            self.maps = self.maps + torch.as_tensor(grouped.maps).cpu()
        self.called = True
        if grouped.answered:  # else a step cache answered this call
            self.answered = True
            check_answered([*silent, *(self.attentions.sites.keys() - grouped.answered)], WHO)
        return out

    def _grouped(self, text: SequenceText, rows: Sequence[slice], numbers: Sequence[int]) -> GroupedCall:
        """The call by groups; while the regions are not known, with a look at the phrases in its positive entries."""
        given = (self.attentions, text, rows, self.groups, self.picture_alone)
        if self.masks is not None:
            return GroupedCall(*given)
        positives = [entry for entry, number in enumerate(numbers) if number == 0]
        return SearchingCall(*given, [concept.phrase for concept in self.concepts], positives)

    def check_answered(self) -> None:
        """Refuses a sampling in which no call has reached the network.

        Raises:
            ValueError: which layer has never run.
        """
        if self.called and not self.answered:
            check_answered(self.attentions.sites, WHO)

    def _branches(self, text: SequenceText, device: torch.device) -> list[Branch]:
        """Each LoRA on its own words, and on the tokens of its region; none while the regions are not known."""
        if self.masks is None:
            return []
        weights = self.masks.weights(self.grid)[1:].to(device) * float(self.settings.token_lora)
        return [
            Branch(
                concept.factors,
                concept.strength,
                tokens=TokensByKind(self.architecture, text.size, own, text.words(number, device), text.references),
            )
            for number, (concept, own) in enumerate(zip(self.concepts, weights, strict=True), 1)
        ]


class JointGuider(RunGuider[JointInjection]):
    """LoRA Composer where text and picture attend together; the arguments are as ``ComposeGuider``'s.

    A region that covers nothing leaves its concept out. Soft regions fade in what their LoRA does; who reads whom is
    decided at half. Without regions they are found in the attention to the phrases, one set for the whole batch.

    After a sampling ``regions`` holds the regions at the latent's size.
    """

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

    def begin(self, sampling: Sampling) -> JointInjection:
        check_reaches_network(self.model_patcher, WHO)
        height, width = sampling.noise.shape[-2:]
        self.regions = None if self.coverage_at is None else self.coverage_at(height, width)[self.active]
        cond_or_uncond = {
            entry["uuid"]: number for number, name in enumerate(_PROMPT_TYPES) for entry in self.conds.get(name, ())
        }
        size, covered = (int(height), int(width)), None
        if self.regions is None:
            concepts = _joint_concepts(self.inner_model, sampling, self.concepts, searching=True)
        else:
            there = [number for number, region in enumerate(self.regions) if region.any()]
            covered = self.regions[there]
            concepts = _joint_concepts(self.inner_model, sampling, [self.concepts[number] for number in there])
        return JointInjection(self.inner_model, concepts, size, covered, cond_or_uncond, self.settings, self.soft)

    def predict(
        self, run: JointInjection, x: torch.Tensor, sigma: torch.Tensor, options: ModelOptions, seed: int | None
    ) -> torch.Tensor:
        if run.masks is None and run.maps.ndim and self._percent(sigma) >= self.settings.automatic:
            maps = run.maps.unflatten(-1, run.grid)
            self.regions = regions_of_concepts(maps, [concept.name for concept in self.concepts])
            run.place(self.regions)
        return self.guided(x, sigma, run.options(options), seed)

    def _percent(self, sigma: torch.Tensor) -> float:
        return percent_of(self.inner_model.model_sampling, float(sigma.max()))

    def finish(self, run: JointInjection) -> None:
        run.check_answered()
        if self.concepts and run.masks is None:
            log.warning(NEVER_FOUND, 100 * self.settings.automatic)

    def panels(self, run: JointInjection, x0: torch.Tensor, paint: Painter) -> list[Panel]:
        """The picture under the regions, once they are known."""
        if self.regions is None:
            return [Panel(paint(x0))]
        return concept_panels(paint(x0), self.regions, [concept.phrase for concept in self.concepts])


def _check_model(model: BaseModel, concepts: Sequence[Concept]) -> None:
    """Refuses what a model with joint attention cannot do.

    Raises:
        ValueError: what it is, and what to do.
    """
    architecture = architecture_of(model)
    if has_own_call(model) or not TextAttentions(model.diffusion_model, architecture.equal_lengths).sites:
        raise architecture.lacks(
            f"{WHO} with attentions or prompts that are not the host's own", "load the model with the host's loader"
        )
    check_layers(concepts, model)


def _say_what_is_left_out(model: BaseModel, settings: Compose) -> None:
    idle = {"enhancement": settings.enhancement > 0, "first_noise": settings.reinit != "off"}
    if names := " and ".join(name for name, on in idle.items() if on):
        log.info("%s: on %s models %s does nothing.", WHO, architecture_of(model).title, names)


def _joint_concepts(
    model: BaseModel, sampling: Sampling, concepts: Sequence[Concept], searching: bool = False
) -> list[JointConcept]:
    """The concepts for a loaded model, their prompts processed as the host does it.

    Args:
        searching: whether their phrases are looked for.

    Raises:
        ValueError: as ``text_of``, and as ``phrase_of``.
    """
    phrases = [phrase_of(concept) if searching else () for concept in concepts]
    raw = {
        name: [entry for c in concepts for entry in comfy.sampler_helpers.convert_cond(getattr(c, name)[:1])]
        for name in _PROMPT_TYPES
    }
    architecture, processed = architecture_of(model), sampling.process(raw)
    texts = {name: [text_of(architecture, entry, WHO) for entry in processed[name]] for name in _PROMPT_TYPES}
    dtype, device = model.manual_cast_dtype or model.get_dtype(), model.current_patcher.load_device
    made: dict[int, LayerLoras] = {}
    for concept in concepts:
        if id(concept) not in made:
            made[id(concept)] = prepared(network_factors(concept.lora, model), device, dtype)
    return [
        JointConcept((positive.to(device), negative.to(device)), made[id(concept)], concept.strength, phrase)
        for concept, positive, negative, phrase in zip(
            concepts, *(texts[name] for name in _PROMPT_TYPES), phrases, strict=True
        )
    ]
