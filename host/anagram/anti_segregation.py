"""The gradient step of anti-segregation, taken before a prediction, inside any sampler.

Differentiated is the attention of each view's concept words, and nothing after it: the forward pass ends at the last
attention that is captured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from uuid import UUID

import comfy.samplers
import torch
import torch.nn.functional as F
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

from ...methods.anagram.overlap import GradientStep
from .. import keys
from ..engine.attention import CROSS, Captured, Site, capture, find_sites
from ..engine.cond_or_uncond import cond_or_uncond_of, with_cond_or_uncond
from ..engine.gradients import (
    check_differentiable,
    differentiable_conds,
    differentiable_options,
    gradient_of,
    without_inference_tensors,
)
from ..engine.latent_edits import EditSchedule, LatentEdit, edit_schedule_for
from ..engine.model_call import ModelCall, RunCall, active_entries, around_model_call, conditioning_rows
from ..engine.reach import unanswered
from ..registry import unet_of
from ..types import BaseModel, CondEntry, ModelOptions, Sampler
from .views import ViewConds, frames_of, in_frames, needs_own_frame

_WHO = "Anti-segregation"

SamplerUse = tuple[Sampler, torch.Tensor, torch.Tensor | None]
"""A sampler, its sigmas, and the mask of an inpainting, (batch, 1, height, width)."""


def anti_segregator_for(
    model: BaseModel,
    views: Sequence[ViewConds],
    step: GradientStep,
    sampling: SamplerUse,
) -> AntiSegregator | None:
    """The gradient step for the views with weight, for one sampling; None where there are fewer than two.

    Raises:
        ValueError: a sampler or a model it cannot work with.
    """
    if len(views) < 2:
        return None
    schedule = edit_schedule_for(*sampling, model.model_sampling, _WHO, step.in_place)
    return AntiSegregator(model, views, step, schedule)


class AntiSegregator(LatentEdit):
    """Moves the latent down the gradient of the views' segregation, during one sampling."""

    def __init__(
        self, model: BaseModel, views: Sequence[ViewConds], step: GradientStep, schedule: EditSchedule
    ) -> None:
        check_differentiable(model)
        super().__init__(model, schedule, (step.start, step.end), step.iterations)
        self.views, self.gradient_step = views, step
        self.unet = unet_of(model)
        self.sites = _sites(self.unet)
        self.with_phrase: list[ViewConds] = []

    def prepare(self, sigma: torch.Tensor, options: ModelOptions) -> bool:
        """Finds each view's entry with a phrase; False if a view has none at this sigma."""
        self.with_phrase = _views_with_phrase(self.views, sigma)
        return bool(self.with_phrase)

    def step(self, x: torch.Tensor, sigma: torch.Tensor, options: ModelOptions) -> torch.Tensor:
        """The latent after one gradient step."""
        losses: list[torch.Tensor] = []

        def loss_of(z: torch.Tensor) -> torch.Tensor:
            maps = self._attention_maps(self.with_phrase, z, without_inference_tensors(sigma), options)
            each = self.gradient_step.loss(maps)
            losses.append(each.detach())
            return each.sum()  # pictures of a batch do not meet, so each gets its own gradient

        gradient = gradient_of(self.model, x, loss_of, [view.positive for view in self.with_phrase])
        return x if gradient.value is None else x + self.gradient_step.step(x, gradient.value, losses[0])

    def _attention_maps(
        self, views: Sequence[ViewConds], z: torch.Tensor, sigma: torch.Tensor, options: ModelOptions
    ) -> list[torch.Tensor]:
        """One attention map per view.

        The views share one batched call if the host allows it, else each gets its own. A view whose conditioning lives
        in its own frame (mask, ControlNet) always gets its own call, on the transformed latent.
        """
        by_itself = [needs_own_frame(view.positive) for view in views]
        shared = [view for view, own in zip(views, by_itself, strict=True) if not own]
        maps = self._captured_maps(shared, z, sigma, options) if shared else []
        rest = iter(maps or [self._captured_maps([view], z, sigma, options)[0] for view in shared])
        return [
            self._captured_maps([view], z, sigma, options, turned=True)[0] if own else next(rest)
            for view, own in zip(views, by_itself, strict=True)
        ]

    def _captured_maps(
        self,
        views: Sequence[ViewConds],
        z: torch.Tensor,
        sigma: torch.Tensor,
        options: ModelOptions,
        turned: bool = False,
    ) -> list[torch.Tensor]:
        """The attention of the views' concept words in the canonical frame, (batch, height, width) of the latent.

        Empty if the host splits the call. ``turned``: the one view gets the transformed latent itself.
        """
        in_views = in_frames(options, frames_of(views), latent_is_turned=turned)
        recorded, calls = _recording_rows(differentiable_options(in_views))
        latent = views[0].view.forward(z).contiguous() if turned else z
        with capture(self.unet, self.sites, stop=True) as captured:
            conds = differentiable_conds([view.positive for view in views])
            renumbered, own_options = with_cond_or_uncond(conds, recorded, cond_or_uncond_of(conds))
            comfy.samplers.calc_cond_batch(self.model, renumbered, latent, sigma, own_options)
        if not calls or not captured.keys:
            raise unanswered(recorded)
        rows = calls[0]
        if len(rows) < len(views):
            return []
        return [self._attention_map(captured, view, rows[view.positive[0]["uuid"]], z) for view in views]

    def _attention_map(self, captured: Captured, view: ViewConds, rows: slice, z: torch.Tensor) -> torch.Tensor:
        (entry,) = view.positive
        tokens = list(entry[keys.PHRASE_POSITIONS])
        size, padding = _area_in(entry, z)
        maps = [
            _on_grid(captured.probabilities(s, rows)[..., tokens].sum(-1).mean(1), captured.grid(s), size)
            for s in self.sites
        ]
        return view.view.inverse(F.pad(torch.stack(maps).sum(0), padding))


def _views_with_phrase(views: Sequence[ViewConds], sigma: torch.Tensor) -> list[ViewConds]:
    """The views with one entry each: the first that is active at this sigma and knows its concept.

    The host adds entries that know none. Empty if a view has no such entry.
    """
    active = [active_entries(view.positive, sigma) for view in views]
    found = [[e for e in entries if e.get(keys.PHRASE_POSITIONS)][:1] for entries in active]
    return [replace(v, positive=e, negative=None) for v, e in zip(views, found, strict=True)] if all(found) else []


def _recording_rows(options: ModelOptions) -> tuple[ModelOptions, list[dict[UUID, slice]]]:
    """The options, and a list that will hold the rows of each entry in every model call under them."""
    calls: list[dict[UUID, slice]] = []

    def record(call: ModelCall, run: RunCall) -> torch.Tensor:
        calls.append(dict(conditioning_rows(call.transformer_options, len(call.x))))
        return run(call)

    return around_model_call(options, keys.ANTI_SEGREGATION, record), calls


def _sites(unet: UNetModel) -> list[Site]:
    """The cross-attentions at half the latent's resolution, as in the paper; at full where there are none."""
    return find_sites(unet, CROSS, factor=2) or find_sites(unet, CROSS, factor=1) or find_sites(unet, CROSS)


def _area_in(entry: CondEntry, z: torch.Tensor) -> tuple[tuple[int, int], tuple[int, int, int, int]]:
    """Height and width of the entry's part of the latent, and the rest of the latent around it.

    The rest is in the order of ``F.pad``: left, right, above, below.
    """
    full_height, full_width = z.shape[-2:]
    area = entry.get("area")
    height, width, y, x = (full_height, full_width, 0, 0) if area is None else area
    height, width = min(height, full_height - y), min(width, full_width - x)  # the host cuts it off there too
    return (height, width), (x, full_width - x - width, y, full_height - y - height)


def _on_grid(attention: torch.Tensor, grid: tuple[int, int], size: tuple[int, int]) -> torch.Tensor:
    """(batch, tokens) as a map of height and width ``size``, (batch, height, width)."""
    return F.interpolate(attention.unflatten(-1, grid).unsqueeze(1), size=size, mode="nearest")[:, 0]
