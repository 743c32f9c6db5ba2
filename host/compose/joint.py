"""LoRA-Composer on networks where text and picture attend together: all prompts in one sequence with the picture.

There the text changes from block to block, so a concept's keys and values cannot be computed once. Its prompt lies
behind the base's in the same text instead. Who reads whom is said in groups (``methods/compose/groups.py``), positions
are those that each prompt has alone, and each LoRA acts on its own words and on its region.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple
from uuid import UUID

import comfy.sampler_helpers
import torch
from torch.utils.hooks import RemovableHandle

from ...methods.compose.groups import Extent, RegionGroups, grouped
from ...methods.compose.settings import Compose
from ...methods.lora import LayerLoras
from ...methods.masks import MaskPyramid, in_whole_tokens
from ...methods.panels import Panel, concept_panels
from .. import keys
from ..engine.base_prompts import BasePrompts
from ..engine.guider import RunGuider, Sampling
from ..engine.model_call import ModelCall, RunCall, around_model_call, conditioning_rows
from ..engine.preview import Painter
from ..engine.reach import check_answered, check_reaches_network
from ..lora.branches import Branch, TokensByKind, low_rank, prepared
from ..lora.concept import Concept, check_concept_prompts, with_strength
from ..lora.factors import network_factors
from ..registry import architecture_of
from ..text.equal_lengths import Attention, TextAttentionCall, TextAttentions, has_own_call
from ..text.sequence import SequenceText, text_of
from ..types import BaseModel, HookInputs, ModelOptions, ModelPatcher

log = logging.getLogger(__name__)
WHO = "LoRA Composer"
_PROMPT_TYPES = ("positive", "negative")


class JointConcept(NamedTuple):
    """A concept where and as the model computes: positive and negative, (1, tokens, channels) each, and its LoRA."""

    prompts: tuple[torch.Tensor, torch.Tensor]
    factors: LayerLoras
    strength: float


class JointInjection:
    """What puts concepts into the model calls of one sampling.

    Args:
        coverage: how much of each cell each region covers, (concepts, height, width).
        cond_or_uncond: uuid of a conditioning entry to 0 (positive) or 1 (negative).
    """

    def __init__(
        self,
        model: BaseModel,
        concepts: Sequence[JointConcept],
        coverage: torch.Tensor,
        cond_or_uncond: Mapping[UUID, int],
        settings: Compose,
        soft: bool = False,
    ) -> None:
        self.architecture, self.concepts, self.settings = architecture_of(model), concepts, settings
        self.cond_or_uncond = cond_or_uncond
        self.attentions = TextAttentions(model.diffusion_model, self.architecture.equal_lengths)
        own = (site for site in self.architecture.sites() if site.attention.kind == "self")
        self.picture_alone = {site.block for site in own if site.attention.output == ("image",)}
        self.grid = self.architecture.grid(*coverage.shape[-2:])
        covered = in_whole_tokens(coverage.float().cpu(), self.grid, self.architecture.patch)
        self.masks = MaskPyramid(covered, soft, overlapping=True)
        self.groups = RegionGroups(self.masks.inside(self.grid), settings.isolation, settings.base_in_regions)
        self.called = self.answered = False

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
        grouping = _Grouping(self.attentions, text, [entry.rows for entry in entries], self.groups, self.picture_alone)
        with low_rank(self.attentions.network, self._branches(text, call.x.device)) as silent:
            out = grouping.run(text.call, run)
        self.called = True
        if grouping.answered:  # else a step cache answered this call
            self.answered = True
            check_answered([*silent, *(self.attentions.sites.keys() - grouping.answered)], WHO)
        return out

    def check_answered(self) -> None:
        """Refuses a sampling in which no call has reached the network.

        Raises:
            ValueError: which layer has never run.
        """
        if self.called and not self.answered:
            check_answered(self.attentions.sites, WHO)

    def _branches(self, text: SequenceText, device: torch.device) -> list[Branch]:
        """Each LoRA on its own words, and on the tokens of its region."""
        weights = self.masks.weights(self.grid)[1:].to(device) * float(self.settings.token_lora)
        return [
            Branch(
                concept.factors,
                concept.strength,
                tokens=TokensByKind(self.architecture, text.size, own, text.words(number, device), text.references),
            )
            for number, (concept, own) in enumerate(zip(self.concepts, weights, strict=True), 1)
        ]


class _Grouping(TextAttentionCall):
    """One model call in which every token reads what its group does.

    Args:
        rows: of every entry of the call.
        groups: who reads whom.
        picture_alone: blocks in which the picture attends to itself.
    """

    def __init__(
        self,
        network: TextAttentions,
        text: SequenceText,
        rows: Sequence[slice],
        groups: RegionGroups,
        picture_alone: Collection[str] = (),
    ) -> None:
        super().__init__(network, WHO)
        self.text, self.rows, self.groups = text, rows, groups
        self.picture_alone = picture_alone
        self.positions, self.passed = text.positions(), 0

    def hooks(self) -> Iterator[RemovableHandle]:
        yield from super().hooks()
        for block in self.picture_alone:
            yield from self.site_hooks(block, self.network.network.get_submodule(block))
        embedder = self.text.architecture.position_embedder
        if embedder is not None:
            yield self.network.network.get_submodule(embedder).register_forward_pre_hook(self._placed)

    def _placed(self, module: torch.nn.Module, inputs: HookInputs) -> HookInputs:
        """The positions of the text's tokens, and of the picture behind it. Text and picture may come one by one."""
        positions, text = inputs[0].clone(), self.text  # (rows or 1, tokens, axes)
        start, self.passed = self.passed, self.passed + positions.shape[1]
        if self.positions is not None:
            own = self.positions[start : self.passed]
            positions[:, : len(own)] = own.to(positions)
        first = max(text.slots.length - start, 0)
        image = slice(first, max(first, first + text.architecture.image_tokens(text.size)[0]))
        positions[:, image, 0] -= text.moved_back
        return (positions, *inputs[1:])

    def filled_in(self) -> Iterator[tuple[slice, slice]]:
        for rows, places in zip(self.rows, self.text.slots.places, strict=True):
            for place in places:
                yield rows, slice(place.text.stop, place.filled.stop)

    def attention(
        self, attend: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        if mask is not None or k.shape[-2] != q.shape[-2]:
            raise ValueError(
                f"Another node changes the attention that {WHO} works in, by a mask or by tokens of its own; bypass it."
            )
        k, v = (t.flatten(2) if t.ndim > q.ndim else t for t in (k, v))  # SD3's values have their heads apart
        alone = self.site in self.picture_alone
        by_prompts: dict[tuple[Extent, ...], list[torch.Tensor]] = {}
        for rows, places in zip(self.rows, self.text.slots.places, strict=True):
            prompts = (Extent(0, 0),) * len(places) if alone else tuple(place.filled for place in places)
            by_prompts.setdefault(prompts, []).append(torch.arange(rows.start, rows.stop, device=q.device))
        parts = []
        for prompts, own in by_prompts.items():
            groups = self.groups(prompts, 0 if alone else self.text.slots.length, q.shape[-2], q.device)
            chosen = (q, k, v) if len(by_prompts) == 1 else (t.index_select(0, torch.cat(own)) for t in (q, k, v))
            parts.append(grouped(groups, *chosen, partial(attend, mask=None)))
        order = torch.cat([at for own in by_prompts.values() for at in own])
        return parts[0] if len(parts) == 1 else torch.cat(parts).index_select(0, order.argsort())


class JointGuider(RunGuider[JointInjection]):
    """LoRA Composer where text and picture attend together; the arguments are as ``ComposeGuider``'s.

    A region that covers nothing leaves its concept out. Soft regions fade in what their LoRA does; who reads whom is
    decided at half.

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
            _check_model(model.model, self.concepts, coverage_at is None)
            _say_what_is_left_out(model.model, settings)

    def is_plain(self) -> bool:
        return not self.concepts

    def begin(self, sampling: Sampling) -> JointInjection:
        check_reaches_network(self.model_patcher, WHO)
        assert self.coverage_at is not None  # refused before
        self.regions = self.coverage_at(*sampling.noise.shape[-2:])[self.active]
        there = [number for number, region in enumerate(self.regions) if region.any()]
        concepts = _joint_concepts(self.inner_model, sampling, [self.concepts[number] for number in there])
        cond_or_uncond = {
            entry["uuid"]: number for number, name in enumerate(_PROMPT_TYPES) for entry in self.conds.get(name, ())
        }
        return JointInjection(self.inner_model, concepts, self.regions[there], cond_or_uncond, self.settings, self.soft)

    def predict(
        self, run: JointInjection, x: torch.Tensor, sigma: torch.Tensor, options: ModelOptions, seed: int | None
    ) -> torch.Tensor:
        return self.guided(x, sigma, run.options(options), seed)

    def finish(self, run: JointInjection) -> None:
        run.check_answered()

    def panels(self, run: JointInjection, x0: torch.Tensor, paint: Painter) -> list[Panel]:
        """The picture under the regions."""
        assert self.regions is not None
        return concept_panels(paint(x0), self.regions, [concept.phrase for concept in self.concepts])


def _check_model(model: BaseModel, concepts: Sequence[Concept], searching: bool) -> None:
    """Refuses what a model with joint attention cannot do.

    Raises:
        ValueError: what it is, and what to do.
    """
    architecture = architecture_of(model)
    if has_own_call(model) or not TextAttentions(model.diffusion_model, architecture.equal_lengths).sites:
        raise architecture.lacks(
            f"{WHO} with attentions or prompts that are not the host's own", "load the model with the host's loader"
        )
    if searching:
        raise architecture.lacks("Finding regions in the attention", "draw them with Region Editor")
    for concept in concepts:
        if any(keys.LAYER_CONTEXTS in values for _, values in (*concept.positive, *concept.negative)):
            raise architecture.lacks(f"The ED-LoRA '{concept.name}'", "use a LoRA that was trained on such a model")


def _say_what_is_left_out(model: BaseModel, settings: Compose) -> None:
    idle = {"enhancement": settings.enhancement > 0, "first_noise": settings.reinit != "off"}
    if names := " and ".join(name for name, on in idle.items() if on):
        log.info("%s: on %s models %s does nothing.", WHO, architecture_of(model).title, names)


def _joint_concepts(model: BaseModel, sampling: Sampling, concepts: Sequence[Concept]) -> list[JointConcept]:
    """The concepts for a loaded model, their prompts processed as the host does it.

    Raises:
        ValueError: as ``text_of``.
    """
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
        JointConcept((positive.to(device), negative.to(device)), made[id(concept)], concept.strength)
        for concept, positive, negative in zip(concepts, *(texts[name] for name in _PROMPT_TYPES), strict=True)
    ]
