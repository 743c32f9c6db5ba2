"""Concept Conductor as a guider: paths, layout alignment before each step, mask refinement after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ...methods.conduct.refine import attention_of_masks, clusters, followed_mask, masks_at_points, refined_masks
from ...methods.conduct.settings import WHO, Conduct
from ...methods.masks import MaskPyramid
from ...methods.panels import AttentionSnapshot
from ...methods.regions import Region
from ..engine.base_prompts import BasePrompts, reference_words
from ..engine.gradients import plain_patcher
from ..engine.guider import Sampling
from ..engine.latent_edits import edit_schedule_for
from ..engine.sampling import percent_of
from ..lora.concept import Concept, with_strength
from ..types import ModelOptions, ModelPatcher
from .layout import Aligner, Denoiser, LayoutReference, Trajectory, trajectory
from .path_guider import PathGuider, PathRun, first_masks

_LAYOUT, _ALIGNMENT = "layout", f"{WHO}'s layout alignment"


@dataclass(eq=False)
class ConductRun(PathRun):
    """One sampling: alignment before each prediction, refinement of the masks after it.

    ``refined_at`` is the percent of the last refinement, ``snapshot`` the attention recorded there. ``followed`` holds
    the masks of each path by itself and the base's, (batch, concepts, height, width) of bool each.
    """

    settings: Conduct
    aligner: Aligner | None = None
    refined_at: float | None = None
    snapshot: AttentionSnapshot | None = None
    followed: tuple[torch.Tensor, torch.Tensor] | None = None

    def before(self, x: torch.Tensor, sigma: torch.Tensor, options: ModelOptions) -> torch.Tensor:
        percent = percent_of(self.paths.model.model_sampling, float(sigma.max()))
        if self.aligner is not None:
            x = self.aligner(x, sigma, options)
        self.paths.merging.active = self.settings.injects_at(percent)
        self.paths.records = self.settings.refines_at(percent, self.refined_at)
        return x

    def needs_concepts(self) -> bool:
        return self.paths.merging.active or self.paths.records

    def after(self, x: torch.Tensor, sigma: torch.Tensor) -> None:
        paths = self.paths
        if not paths.records or len(paths.maps) < len(paths.paths):  # a step cache may have answered
            paths.maps.clear()
            return
        self.refined_at = percent_of(paths.model.model_sampling, float(sigma.max()))
        grid = paths.map_grid
        paths.merging.masks = MaskPyramid(self._refined(grid, len(x)))
        own = torch.stack([paths.maps[number][0] for number in range(1, len(paths.paths))])
        seen = attention_of_masks(own, first_masks(paths.merging.masks, *grid))
        self.snapshot = AttentionSnapshot(seen, self.refined_at)
        paths.maps.clear()

    def attention(self) -> AttentionSnapshot | None:
        """Where the cells of each mask look on their concept's path, for the first picture.

        Of the last refinement; before any, of the last step of the alignment.
        """
        if self.snapshot is None and self.aligner is not None and (captured := self.aligner.attention()):
            own, grid = captured
            seen = attention_of_masks(own, first_masks(self.paths.merging.masks, *grid))
            return AttentionSnapshot(seen, self.aligner.percent)
        return self.snapshot

    def _refined(self, grid: tuple[int, int], batch: int) -> torch.Tensor:
        """The masks of every picture after one refinement, (batch, concepts, *grid)."""
        masks = self.paths.merging.masks.at(*grid)
        now = (masks if masks.ndim == 4 else masks.expand(batch, *masks.shape))[:, 1:] > 0.5
        own_before, base_before = self.followed or (now, now)
        own, base, fused = torch.zeros_like(now), torch.zeros_like(now), torch.zeros_like(now)
        count = len(self.paths.paths) - 1
        numbers = range(count + 1, 2 * count + 2)
        for b in range(batch):
            base_pool = clusters(self.paths.maps[0][b], numbers)
            for i in range(count):
                own_pool = clusters(self.paths.maps[i + 1][b], numbers)
                own[b, i] = self._followed_mask(own_pool, own_before[b, i])
                base[b, i] = self._followed_mask(base_pool, base_before[b, i])
            fused[b] = refined_masks(now[b], own[b], base[b])
        self.followed = (own, base)
        return fused.float()

    def _followed_mask(self, pool: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        settings, here = self.settings, mask.to(pool.device)
        return followed_mask(pool, here, settings.least_overlap, settings.rectangles).to(mask.device)


class ConductGuider(PathGuider):
    """Several concepts in regions, or in the layout of a reference.

    Args:
        regions: one per concept; None with a layout whose points mark the concepts.
        layout: with None, the prompts decide the layout, and there is no alignment.

    ``masks`` holds the last sampling's final masks, (batch, 1 + concepts, height, width), background first. If every
    strength is 0, those of all listed concepts are empty.
    """

    masks: torch.Tensor | None = None

    def __init__(
        self,
        model: ModelPatcher,
        base: BasePrompts,
        concepts: Sequence[Concept],
        regions: Sequence[Region] | None,
        settings: Conduct,
        layout: LayoutReference | None = None,
    ) -> None:
        active = with_strength(concepts)
        soft = any(region.feather > 0 for region in regions or ())

        def masks_for(height: int, width: int) -> MaskPyramid:
            if regions is None:
                return MaskPyramid(torch.zeros(len(active), height, width))
            return MaskPyramid.of([regions[n] for n in active], height, width, soft)

        aligns = layout is not None and bool(active) and settings.aligns
        super().__init__(plain_patcher(model) if aligns else model, base, [concepts[n] for n in active], masks_for)
        self.settings, self.layout, self.given_model, self.listed = settings, layout, model, tuple(concepts)
        self.points = [] if layout is None or regions is not None else [layout.points[n] for n in active]
        if layout is not None and active:
            self.inner_set_conds({_LAYOUT: reference_words(base.positive, layout.positive)})

    def begin(self, sampling: Sampling) -> ConductRun:
        x = sampling.noise
        paths = self.new_paths(x)
        paths.meeting = self.settings.meeting
        self.masks = None
        run = ConductRun(paths, self.settings)
        if self.layout is not None and len(sampling.sigmas) > 1:  # a sampling without steps predicts nothing
            self._lay_out(run, self.layout, sampling)
        return run

    def _lay_out(self, run: ConductRun, reference: LayoutReference, sampling: Sampling) -> None:
        """Gives the run the reference's trajectory: for first masks from points, and for alignment."""
        model, sigmas = self.inner_model, sampling.sigmas
        denoiser = Denoiser(model, self.conds[_LAYOUT], self.model_options)
        latents = trajectory(reference, denoiser, self.given_model, sigmas, sampling.noise)
        if self.points:
            run.paths.merging.masks = MaskPyramid(self._masks_at_points(run, denoiser, latents))
        if self.settings.aligns:
            schedule = edit_schedule_for(
                sampling.sampler, sigmas, sampling.denoise_mask, model.model_sampling, _ALIGNMENT
            )
            run.aligner = Aligner(run.paths, denoiser.as_path(), latents, sigmas, self.settings, schedule)

    def predict(
        self, run: PathRun, x: torch.Tensor, sigma: torch.Tensor, options: ModelOptions, seed: int | None
    ) -> torch.Tensor:
        out = super().predict(run, x, sigma, options, seed)
        self.masks = run.masks_like(x)
        return out

    def inner_sample(self, *args: object, **kwargs: object) -> torch.Tensor:
        """One sampling, as the host calls it: with the noise as the first argument."""
        noise = args[0]
        if self.is_plain() and isinstance(noise, torch.Tensor):
            self.masks = torch.zeros(len(noise), 1 + len(self.listed), *noise.shape[-2:])
            self.masks[:, 0] = 1
        return super().inner_sample(*args, **kwargs)

    def _masks_at_points(self, run: ConductRun, denoiser: Denoiser, latents: Trajectory) -> torch.Tensor:
        """First masks from the clicks, of the reference at the noise level where refinement ends."""
        end, sampling = self.settings.refine_end, denoiser.model.model_sampling
        sigma = min(latents, key=lambda s: abs(percent_of(sampling, s) - end))

        def predict(options: ModelOptions) -> torch.Tensor:
            return replace(denoiser, options=options)(latents[sigma], sigma)

        attention, grid = run.paths.recorded(predict, denoiser.options)
        return masks_at_points(attention[0], grid, self.points).float()
