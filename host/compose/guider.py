"""LoRA-Composer as a guider: concepts in regions on the one path of the base model (2403.11627)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from uuid import UUID

import torch

from ...methods.compose.automatic import NEVER_FOUND, regions_of_concepts
from ...methods.compose.settings import WHO, Compose
from ...methods.masks import MaskPyramid
from ...methods.panels import AttentionSnapshot, Panel, attention_panels, concept_panels
from .. import keys
from ..engine.attention import CROSS, Site, find_sites, loss_sites
from ..engine.attention_patches import Attend, override_attention
from ..engine.base_prompts import BasePrompts
from ..engine.gradients import plain_patcher
from ..engine.guider import RunGuider, Sampling
from ..engine.latent_edits import EditSchedule, edit_schedule_for
from ..engine.model_call import conditioning_rows
from ..engine.preview import Painter
from ..engine.reach import check_reaches_network
from ..engine.sampling import percent_of
from ..lora.concept import Concept, check_concept_prompts, with_strength
from ..types import ModelOptions, ModelPatcher, TransformerOptions
from .enhancement import Enhancer, NoiseArranger
from .injection import Injection, injection_for
from .projections import POSITIVE, ProjectedConcepts, grid_of, with_patched_words

log = logging.getLogger(__name__)

_ENHANCEMENT = "LoRA-Composer's enhancement"


@dataclass(eq=False)
class ComposerRun:
    """One sampling.

    ``accumulator`` is set while regions are searched; ``found`` is the attention they were found in.
    """

    injection: Injection
    enhancer: Enhancer | None = None
    accumulator: AttentionAccumulator | None = None
    found: AttentionSnapshot | None = None

    def attention(self) -> AttentionSnapshot | None:
        """The latest cross-attention of the phrases that was captured anyway.

        Gradient steps capture it for the first picture, the search for the whole batch, summed over steps.
        """
        if self.enhancer is not None and self.enhancer.snapshot is not None:
            return self.enhancer.snapshot
        if self.accumulator is not None and self.accumulator.sums:
            return AttentionSnapshot(self.accumulator.maps(), self.accumulator.percent)
        return self.found


class ComposeGuider(RunGuider[ComposerRun]):
    """Samples one picture with each concept in its region. Without concepts it is the host's own guider.

    Args:
        base: the whole picture's prompts.
        concepts: one per region, in the regions' order; a concept may come twice. Those of strength 0 are left out.
        coverage_at: how much of each cell of a latent of (height, width) each region covers, (regions, height, width).
            None finds the regions in the concepts' own attention during the first steps, one set for the whole batch.
        soft: whether regions fade at their edges.

    After a sampling ``regions`` holds the regions at the latent's size, ``updates`` the number of gradient steps, and
    ``losses`` each step's losses.
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
        active = with_strength(concepts)
        differentiates = bool(active) and settings.enhancement > 0
        super().__init__(plain_patcher(model) if differentiates else model, base.cfg, keys.COMPOSER)
        self.inner_set_conds(base.checked())
        check_concept_prompts(concepts[n] for n in active)
        self.concepts, self.active = [concepts[n] for n in active], active
        self.settings, self.soft, self.coverage_at = settings, soft, coverage_at
        self.regions: torch.Tensor | None = None
        self.losses: list[torch.Tensor] = []
        self.updates = 0

    def is_plain(self) -> bool:
        return not self.concepts

    def begin(self, sampling: Sampling) -> ComposerRun:
        check_reaches_network(self.model_patcher, WHO)
        self.losses, self.updates, self.regions = [], 0, None
        schedule = self._edit_schedule(sampling)
        coverage = torch.ones(len(self.concepts), *sampling.noise.shape[-2:])
        if self.coverage_at is not None:
            coverage = self.coverage_at(*sampling.noise.shape[-2:])[self.active]
        masks = self._masks(coverage.to(self.inner_model.current_patcher.load_device))
        injection = injection_for(self.inner_model, self.conds, self.concepts, masks, self.settings)
        self.regions = None if self.coverage_at is None else coverage
        enhancer = None if schedule is None else Enhancer(injection, self.conds["positive"], self.settings, schedule)
        searching = self.coverage_at is None
        accumulator = AttentionAccumulator(injection.projected, injection.cond_or_uncond) if searching else None
        return ComposerRun(injection, enhancer, accumulator)

    def _edit_schedule(self, sampling: Sampling) -> EditSchedule | None:
        if self.settings.enhancement <= 0:
            return None
        model_sampling = self.inner_model.model_sampling
        return edit_schedule_for(sampling.sampler, sampling.sigmas, sampling.denoise_mask, model_sampling, _ENHANCEMENT)

    def _masks(self, coverage: torch.Tensor) -> MaskPyramid:
        return MaskPyramid(coverage, self.soft, overlapping=True)

    def first_noise(self, run: ComposerRun, sampling: Sampling) -> torch.Tensor:
        if run.accumulator is not None or self.settings.reinit == "off":
            return sampling.noise
        arranger = NoiseArranger(run.injection, self.conds["positive"], self.settings.reinit)
        return arranger.arranged(sampling.noise, sampling.latent, sampling.sigmas, sampling.options)

    def predict(
        self, run: ComposerRun, x: torch.Tensor, sigma: torch.Tensor, options: ModelOptions, seed: int | None
    ) -> torch.Tensor:
        if run.accumulator is not None:
            percent = percent_of(self.inner_model.model_sampling, float(sigma.max()))
            if percent < self.settings.automatic or not run.accumulator.sums:
                return self.guided(x, sigma, run.accumulator.options(options, percent), seed)
            self._find_regions(run, run.accumulator.maps(), x.device)
        if run.enhancer is not None:
            x = run.enhancer(x, sigma, options)
            self.losses, self.updates = run.enhancer.losses, run.enhancer.updates
        return self.guided(x, sigma, run.injection.options(options), seed)

    def _find_regions(self, run: ComposerRun, maps: torch.Tensor, device: torch.device) -> None:
        """Takes the regions from the attention so far, and ends the search."""
        run.found = run.attention()
        self.regions = regions_of_concepts(maps, [concept.name for concept in self.concepts])
        run.injection.regions.masks, run.accumulator = self._masks(self.regions.to(device)), None

    def finish(self, run: ComposerRun) -> None:
        if run.accumulator is not None:
            log.warning(NEVER_FOUND, 100 * self.settings.automatic)
        elif run.injection.called:
            run.injection.check_answered()

    def panels(self, run: ComposerRun, x0: torch.Tensor, paint: Painter) -> list[Panel]:
        """The picture under the regions, once they are known; below it the attention of the phrases, if captured."""
        picture, names, attention = paint(x0), [concept.phrase for concept in self.concepts], run.attention()
        panels = [Panel(picture)] if self.regions is None else concept_panels(picture, self.regions, names)
        return panels if attention is None else [*panels, *attention_panels(picture, attention, names)]

    def attention(self) -> AttentionSnapshot | None:
        """As ``ComposerRun.attention``; None outside of a sampling."""
        return None if self.run is None else self.run.attention()


class AttentionAccumulator:
    """Sums, over model calls, how much the queries of the positive rows attend to each concept's phrase.

    Args:
        cond_or_uncond: uuid of a conditioning entry to 0 (positive) or 1 (negative).
    """

    def __init__(self, projected: ProjectedConcepts, cond_or_uncond: Mapping[UUID, int]) -> None:
        self.projected, self.cond_or_uncond = projected, cond_or_uncond
        self.sites = loss_sites(projected.unet, CROSS) or find_sites(projected.unet, CROSS)
        self.sums: dict[tuple[int, int], torch.Tensor] = {}
        self.percent = 0.0

    def options(self, options: ModelOptions, percent: float) -> ModelOptions:
        """A copy of the options under which the maps are summed. The model's output stays the same.

        Args:
            percent: of the sampling, 0 to 1.
        """
        self.percent = percent
        options = with_patched_words(options, self.projected, self.cond_or_uncond)
        return override_attention(options, self.projected.unet, self.sites, self._override)

    def _override(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, site: Site, options: TransformerOptions, attend: Attend
    ) -> torch.Tensor:
        grid = grid_of(q, options)
        for uuid, rows in conditioning_rows(options, len(q)):
            if self.cond_or_uncond.get(uuid) == POSITIVE:
                concepts = self.projected.concepts
                each = [self.projected.attention_map(q[rows], site, c, rows).mean((0, 1)) for c in concepts]
                maps = torch.stack(each)
                self.sums[grid] = self.sums.get(grid, torch.zeros(())) + maps.unflatten(-1, grid).cpu()
        return attend(q, k, v)

    def maps(self) -> torch.Tensor:
        """(concepts, h, w) at the finest grid that was seen."""
        return self.sums[max(self.sums)]
