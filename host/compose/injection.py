"""Concepts in regions of one picture, on the base's own path: LoRA-Composer (2403.11627, sec. 4.1 and 4.2).

Cross-attention: inside a region the base's queries read the concept's keys and values, computed once per run, and the
concept's part of ``to_out`` is added. Self-attention: a region's queries read only its own tokens and the background's.
That is a subset of the keys, not a dense mask.
Rows are recognised by the uuid that the host gives every conditioning entry; other rows stay as they are.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from uuid import UUID

import torch
from comfy.ldm.modules.attention import optimized_attention

from ...methods.compose.settings import WHO, Compose
from ...methods.lora_tokens import ImageTokens
from ...methods.masks import MaskPyramid
from .. import keys
from ..engine.attention import CROSS, SELF, Site
from ..engine.attention_patches import Attend, OutputSite, after_attention, override_attention
from ..engine.model_call import ModelCall, RunCall, around_model_call
from ..engine.reach import check_answered
from ..lora.branches import Branch, low_rank
from ..lora.concept import Concept
from ..registry import architecture_of, unet_of
from ..types import BaseModel, Conds, ModelOptions, TransformerOptions
from .projections import PreparedConcept, ProjectedConcepts, grid_of, prepared_concepts, with_patched_words

_CROSS_LAYERS = ("attn2.to_k", "attn2.to_v", "attn2.to_out.0")
_COARSEST = 32  # latent cells per side that one token of the coarsest grid may cover


class RegionAttention:
    """The output of one attention while each concept has its region: background and regions, by their weights.

    Args:
        isolation: whether a region's tokens ignore the other regions in self-attention.
    """

    def __init__(self, projected: ProjectedConcepts, masks: MaskPyramid, isolation: bool) -> None:
        self.projected, self.masks, self.isolation = projected, masks, isolation

    def allowed(self, grid: tuple[int, int]) -> torch.Tensor:
        """Which tokens each token reads in self-attention, (tokens, tokens) of bool. Only for small maps."""
        return self.masks.read_mask(grid) if self.isolation else torch.ones_like(self.masks.read_mask(grid))

    def sites(self) -> list[Site]:
        """The attentions that change."""
        isolated = self.isolation and len(self.projected.concepts) > 1
        return [s for s in self.projected.sites if s.kind == CROSS or isolated]

    def output(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, site: Site, options: TransformerOptions, attend: Attend
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The output of a site before ``to_out``, and what the concepts add behind it, both (rows, tokens, channels).

        Raises:
            ValueError: the number of queries differs from the picture's grid.
        """
        grid = grid_of(q, options)
        tokens = self.masks.tokens(grid)
        weights = self.masks.weights(grid).to(q)
        out = _background(q, k, v, tokens[0], attend) * weights[0, :, None]
        if site.kind == SELF:
            parts = self._isolated(q, k, v, site, options)
        else:
            parts = self._injected(q, tokens[1:], site, options, attend)
        parts = [h * weights[n, own, None] for n, (own, h) in enumerate(zip(tokens[1:], parts, strict=True), 1)]
        for own, h in zip(tokens[1:], parts, strict=True):
            out = out.index_add(1, own, h)
        added = self._added_after(parts, tokens[1:], site, q.shape[1]) if site.kind == CROSS else None
        return out, added

    def _isolated(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, site: Site, options: TransformerOptions
    ) -> list[torch.Tensor]:
        """Self-attention: each region's queries to the keys it may read."""
        grid = grid_of(q, options)
        pairs = zip(self.masks.tokens(grid)[1:], self.masks.readable(grid), strict=True)
        return [self.attention(q[:, own], k[:, read], v[:, read], site, options) for own, read in pairs]

    def _injected(
        self,
        q: torch.Tensor,
        tokens: Sequence[torch.Tensor],
        site: Site,
        options: TransformerOptions,
        attend: Attend,
    ) -> list[torch.Tensor]:
        """Cross-attention: each region's queries to its concept's keys.

        What another pack has in the slot (an image prompt) acts on the concept's words as on the base's.
        """
        entries = options[keys.CONCEPT_COND_OR_UNCOND]
        size = q.shape[0] // len(entries)
        out = []
        for concept, own in zip(self.projected.concepts, tokens, strict=True):
            k, v = (t.to(q) for t in self.projected.of_rows(concept, site, entries, size))
            foreign = attend.foreign
            out.append(attend(q, k, v)[:, own] if foreign else self.attention(q[:, own], k, v, site, options))
        return out

    def attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, site: Site, options: TransformerOptions
    ) -> torch.Tensor:
        """The host's own attention with the site's heads."""
        module = site.module(self.projected.unet)
        return optimized_attention(
            q, k, v, module.heads, attn_precision=module.attn_precision, transformer_options=options
        )

    def _added_after(
        self, parts: Sequence[torch.Tensor], tokens: Sequence[torch.Tensor], site: Site, count: int
    ) -> torch.Tensor | None:
        """The concepts' parts of ``to_out``, (rows, count, channels); None without any."""
        total = torch.zeros(())
        for concept, own, h in zip(self.projected.concepts, tokens, parts, strict=True):
            part = self.projected.out_branch(concept, site, h)
            if part is not None:
                total = total + part.new_zeros(part.shape[0], count, part.shape[-1]).index_add(1, own, part)
        return total if total.ndim else None


def _background(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, own: torch.Tensor, attend: Attend) -> torch.Tensor:
    """The original attention; where it is the host's own, only for the queries that need it."""
    if attend.foreign or len(own) == q.shape[1]:
        return attend(q, k, v)
    out = torch.zeros_like(q[..., : v.shape[-1]])
    return out.index_add(1, own, attend(q[:, own], k, v)) if len(own) else out


class AddedAfter:
    """Carries what concepts add behind ``to_out`` from the attention that computes it to the hook behind that layer."""

    def __init__(self) -> None:
        self.waiting: dict[tuple[tuple[str, int], int], torch.Tensor] = {}

    def put(self, site: Site, added: torch.Tensor) -> None:
        """Leaves it for the hook behind this site."""
        self.waiting[site.block, site.depth] = added

    def taken(self, place: OutputSite) -> torch.Tensor | None:
        """What was left for this place, once."""
        return self.waiting.pop((place.block, place.depth), None) if place.kind == CROSS else None

    def clear(self) -> None:
        """Forgets what a call that was broken off has left."""
        self.waiting.clear()


class Injection:
    """The hooks under which concepts have their regions, for one sampling.

    Args:
        concepts: one per region; the same object in two regions is computed once.
        cond_or_uncond: uuid of a conditioning entry to 0 (positive) or 1 (negative).
        token_lora: whether the rest of each LoRA acts on the tokens of its region.

    ``silent`` holds the attentions that have not run since the first call, of which ``called`` tells.
    """

    def __init__(
        self,
        model: BaseModel,
        concepts: Sequence[PreparedConcept],
        masks: MaskPyramid,
        cond_or_uncond: Mapping[UUID, int],
        isolation: bool = True,
        token_lora: bool = False,
    ) -> None:
        self.model, self.unet, self.cond_or_uncond, self.token_lora = model, unet_of(model), cond_or_uncond, token_lora
        self.projected = ProjectedConcepts(self.unet, concepts)
        self.regions = RegionAttention(self.projected, masks, isolation)
        self.added_after = AddedAfter()
        self.silent, self.called = set(self.regions.sites()), False

    @property
    def masks(self) -> MaskPyramid:
        """The masks of the regions."""
        return self.regions.masks

    def options(self, model_options: ModelOptions) -> ModelOptions:
        """A copy of the options under which the concepts have their regions."""
        options = with_patched_words(model_options, self.projected, self.cond_or_uncond)
        options = override_attention(options, self.unet, self.regions.sites(), self._override)
        options = after_attention(options, self._after)
        return around_model_call(options, keys.COMPOSER, self._call)

    def _call(self, call: ModelCall, run: RunCall) -> torch.Tensor:
        """Around every model call: the side of its entries, and the rest of each LoRA on the tokens of its region."""
        uuids = call.transformer_options.get("uuids", ())
        if not uuids or any(uuid not in self.cond_or_uncond for uuid in uuids):
            return run(call)
        numbers = [self.cond_or_uncond[uuid] for uuid in uuids]
        ours = {keys.CONCEPT_COND_OR_UNCOND: numbers, keys.BASE_WEIGHT: self._base_weight}
        self.added_after.clear()
        with low_rank(self.unet, self._branches(*call.x.shape[-2:]) if self.token_lora else ()) as silent:
            waiting = bool(self.silent)
            out = run(call._replace(transformer_options={**call.transformer_options, **ours}))
        self.called = True  # to its end: some calls are for the maps alone, and stop early
        if waiting and self.silent != set(self.regions.sites()):  # else a step cache answered this call
            self.check_answered(silent)
        return out

    def check_answered(self, silent: Collection[str] = ()) -> None:
        """Refuses to go on if attentions, or other layers that should have run, have not.

        Raises:
            ValueError: which layer.
        """
        check_answered([*silent, *(self.projected.module_names[site] for site in self.silent)], WHO)

    def _base_weight(self, grid: tuple[int, int]) -> torch.Tensor:
        return self.masks.weights(grid)[0]

    def _branches(self, height: int, width: int) -> list[Branch]:
        """Each LoRA on the tokens of its region, without the layers that cross-attention already applies."""
        weights = {h * w: self.masks.weights((h, w)) for h, w in reversed(_grids(height, width))}
        kind = architecture_of(self.model).kind
        return [
            Branch(
                {name: f for name, f in concept.factors.items() if not name.endswith(_CROSS_LAYERS)},
                concept.strength,
                tokens=ImageTokens(kind, {count: each[number] for count, each in weights.items()}),
            )
            for number, concept in enumerate(self.projected.concepts, 1)
        ]

    def _override(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, site: Site, options: TransformerOptions, attend: Attend
    ) -> torch.Tensor:
        """In place of one attention; q, k, v are (rows, tokens, heads · channels)."""
        self.silent.discard(site)
        # a self-attention that another pack lays over ours for one call (perturbed attention) is meant for regions too
        laid_over = site.kind == SELF and attend.later
        if keys.CONCEPT_COND_OR_UNCOND not in options or not self.projected.concepts or laid_over:
            return attend(q, k, v)
        out, added = self.regions.output(q, k, v, site, options, attend)
        if added is not None:
            self.added_after.put(site, added)
        return out

    def _after(self, output: torch.Tensor, place: OutputSite, options: TransformerOptions) -> torch.Tensor:
        added = self.added_after.taken(place)
        return output if added is None else output + added.to(output)


def injection_for(
    model: BaseModel, conds: Mapping[str, Conds], concepts: Sequence[Concept], masks: MaskPyramid, settings: Compose
) -> Injection:
    """The concepts of one sampling, with their keys and values computed.

    Args:
        model: loaded.
        conds: the base's processed conditionings, ``positive`` and ``negative``.
    """
    cond_or_uncond = {
        entry["uuid"]: number for number, name in enumerate(("positive", "negative")) for entry in conds[name]
    }
    prepared = prepared_concepts(model, concepts)
    injection = Injection(model, prepared, masks, cond_or_uncond, settings.isolation, settings.token_lora)
    injection.projected.fill()
    return injection


def _grids(height: int, width: int) -> list[tuple[int, int]]:
    """The grids of tokens that a UNet may have for a latent of this size, finest first."""
    grids, grid = [(height, width)], (height, width)
    while max(grid) > 1 and len(grids) < _COARSEST.bit_length():
        grid = (-(-grid[0] // 2), -(-grid[1] // 2))
        grids.append(grid)
    return grids
