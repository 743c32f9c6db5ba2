"""Concept Conductor as a guider: paths, layout alignment before each step, mask refinement after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import comfy.samplers
import torch

from ...methods.conduct.refine import at_points, clusters, followed, looked_at, refined
from ...methods.conduct.settings import Conduct
from ...methods.masks import MaskPyramid
from ...methods.panels import AttentionSnapshot
from ..engine.attention import capture
from ..engine.gradients import plain_patcher
from ..engine.latent_edits import edit_schedule_for
from ..engine.sampling import percent_of
from ..lora.concept import Concept
from .layout import Aligner, LayoutReference, mask_site, trajectory
from .path_guider import PathGuider, first_masks
from .paths import Path, Paths

_LAYOUT, _WHO = "layout", "Concept Conductor's layout alignment"


class ConductGuider(PathGuider):
    """Several concepts in regions, or in the layout of a reference.

    Args:
        covered_for: how much of each cell of a latent of (height, width) each concept's region covers,
            ([batch,] concepts, height, width); None with a layout whose points say where the concepts are.
        soft: whether regions fade into each other.
        layout: None leaves the layout to the prompts: there is no alignment then.

    ``masks`` holds, after a sampling, the masks it ended with, (batch, 1 + concepts, height, width), background first; where every
    strength is 0 they are empty, of all that are ``listed``.
    """

    aligner: Aligner | None = None
    looks: AttentionSnapshot | None = None
    masks: torch.Tensor | None = None

    def __init__(
        self,
        model: Any,
        positive: list,
        negative: list,
        cfg: float,
        concepts: Sequence[Concept],
        covered_for: Callable[[int, int], torch.Tensor] | None,
        settings: Conduct,
        layout: LayoutReference | None = None,
        soft: bool = False,
    ) -> None:
        active = [n for n, concept in enumerate(concepts) if concept.strength != 0]

        def masks_for(height: int, width: int) -> MaskPyramid:
            if covered_for is None:
                return MaskPyramid(torch.zeros(len(active), height, width))
            return MaskPyramid(covered_for(height, width)[..., active, :, :], soft)

        aligns = layout is not None and bool(active) and settings.guidance_weight > 0
        given = plain_patcher(model) if aligns else model
        super().__init__(given, positive, negative, cfg, [concepts[n] for n in active], masks_for)
        self.settings, self.layout, self.model_given, self.listed = settings, layout, model, tuple(concepts)
        self.points = [] if layout is None or covered_for is not None else [layout.points[n] for n in active]
        if layout is not None and active:
            self.inner_set_conds({_LAYOUT: layout.positive[:1]})

    def start(self, x: torch.Tensor) -> Paths:
        paths = super().start(x)
        _, sampler, sigmas, denoise_mask = self.about
        paths.deep = self.settings.whole_transformers
        self.refined_at: float | None = None
        self.site = mask_site(paths.unet, *x.shape[-2:])
        if self.layout is not None:
            layout = Path(self.conds[_LAYOUT], self.conds[_LAYOUT])
            levels = trajectory(
                self.layout, self.inner_model, layout.positive, sigmas, x, self.model_options, self.model_given
            )
            if self.points:
                paths.masks = MaskPyramid(self._masks_at_points(paths, layout, levels))
            if self.settings.guidance_weight > 0:
                once = edit_schedule_for(sampler, sigmas, denoise_mask, self.inner_model.model_sampling, _WHO)
                self.aligner = Aligner(paths, layout, levels, sigmas, self.settings, once)
        self.masks = None
        self._followed: tuple[torch.Tensor, torch.Tensor] | None = None  # each path's own masks and the base's
        return paths

    def before(self, paths: Paths, x: torch.Tensor, sigma: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        progress = percent_of(paths.model.model_sampling, float(sigma.max()))
        if self.aligner is not None:
            x = self.aligner(x, sigma, options)
        paths.merging = self.settings.injects_at(progress)
        paths.look_at = self.site if self.settings.refines_at(progress, self.refined_at) else None
        return x

    def after(self, paths: Paths, x: torch.Tensor, sigma: torch.Tensor) -> None:
        if paths.look_at is not None and paths.maps:
            self.refined_at = percent_of(paths.model.model_sampling, float(sigma.max()))
            grid = _grid(paths.maps[0].shape[-1], *x.shape[-2:])
            paths.masks = MaskPyramid(self._refined(paths, grid, len(x)))
            own = torch.stack([paths.maps[number][0] for number in range(1, len(paths.paths))])
            self.looks = AttentionSnapshot(looked_at(own, first_masks(paths.masks, *grid)), self.refined_at)
            paths.maps.clear()
        shown = paths.masks.at(*x.shape[-2:])
        self.masks = (shown if shown.ndim == 4 else shown.expand(len(x), *shown.shape)).detach().cpu().float()

    def inner_sample(self, noise: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        try:
            if not self.concepts:
                self.masks = torch.zeros(len(noise), 1 + len(self.listed), *noise.shape[-2:])
                self.masks[:, 0] = 1
            return super().inner_sample(noise, *args, **kwargs)
        finally:
            self.aligner = self.looks = None

    def attention(self) -> AttentionSnapshot | None:
        """Where the cells of each mask looked on their concept's path: in the last refinement, before any in the last step of
        the alignment. Of the first picture."""
        if self.looks is None and self.aligner is not None and self.running is not None and self.aligner.seen:
            own, grid = self.aligner.attention()
            return AttentionSnapshot(looked_at(own, first_masks(self.running.masks, *grid)), self.aligner.progress)
        return self.looks

    def _refined(self, paths: Paths, grid: tuple[int, int], batch: int) -> torch.Tensor:
        """The masks of every picture after one refinement, (batch, concepts, *grid)."""
        now = paths.masks.at(*grid)
        now = (now if now.ndim == 4 else now.expand(batch, *now.shape))[:, 1:] > 0.5
        own_before, base_before = self._followed or (now, now)
        own, base, fused = torch.zeros_like(now), torch.zeros_like(now), torch.zeros_like(now)
        count = len(paths.paths) - 1
        numbers = range(count + 1, 2 * count + 2)
        for b in range(batch):
            of_base = clusters(paths.maps[0][b], numbers)
            for i in range(count):
                of_own = clusters(paths.maps[i + 1][b], numbers)
                own[b, i] = self._follow(of_own, own_before[b, i])
                base[b, i] = self._follow(of_base, base_before[b, i])
            fused[b] = refined(now[b], own[b], base[b])
        self._followed = (own, base)
        return fused.float()

    def _follow(self, pool: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return followed(pool, mask.to(pool.device), self.settings.least_overlap, self.settings.rectangles).to(
            mask.device
        )

    def _masks_at_points(self, paths: Paths, layout: Path, levels: dict[float, torch.Tensor]) -> torch.Tensor:
        """First masks from the clicks, of the reference at the noise level where refinement ends."""
        model = paths.model
        level = min(levels, key=lambda s: abs(percent_of(model.model_sampling, s) - self.settings.refine_end))
        x = levels[level]
        with capture(paths.unet, [self.site]) as seen:
            comfy.samplers.calc_cond_batch(model, [layout.positive], x, x.new_full((1,), level), self.model_options)
        attention = seen.probabilities(self.site).mean(1)[0]
        return at_points(attention, seen.grid(self.site), self.points).float()


def _grid(tokens: int, height: int, width: int) -> tuple[int, int]:
    """The grid of a level with that many tokens."""
    factor = 1
    while -(-height // factor) * -(-width // factor) > tokens:
        factor *= 2
    return -(-height // factor), -(-width // factor)
