"""Pulling concepts into their regions before a prediction, inside any sampler, and the first noise rearranged for them."""

from __future__ import annotations

import math
from typing import Any

import comfy.samplers
import torch

from ...methods.compose.losses import composer_loss
from ...methods.compose.reinit import around, copied, restored, scaled, sources, swapped
from ...methods.compose.settings import Compose
from ...methods.compose.stop import StopRule
from ..engine.attention import CROSS, SELF, Captured, Site, capture, find_sites
from ..engine.gradients import (
    check_differentiable,
    differentiable_conds,
    differentiable_options,
    gradient_of,
    without_inference_tensors,
)
from ..engine.latent_edits import EditSchedule
from ..engine.sampling import percent_of
from .injection import Injection

_WIDE = 16  # tokens of the shorter side of the maps, as in the paper for SD 1.5
_MOST = 8  # sites; models with deep blocks (SDXL) are looked at once a block


def loss_sites(unet: Any, kind: str, height: int = 64, width: int = 64) -> list[Site]:
    """The attentions that losses look at: of the level whose grid comes next to 16 tokens a side, encoder and decoder.

    SD 1.5 at 512 px: latent / 4, the five layers of the reference. A model without that many levels: the nearest it has.
    """
    levels = {s.factor for s in find_sites(unet, kind, "output")}
    factor = min(levels, key=lambda f: abs(math.log2(min(height, width) / f / _WIDE)))
    sites = [s for s in find_sites(unet, kind, factor=factor) if s.block[0] != "middle"]
    if len(sites) <= _MOST:
        return sites
    depths = {s.block: max(t.depth for t in sites if t.block == s.block) for s in sites}
    return [s for s in sites if s.depth == depths[s.block] // 2]


_Look = tuple[list[torch.Tensor], torch.Tensor | None]


class Maps:
    """The attention maps of the positive with everything in its place, each entry called up to the last layer looked at."""

    def __init__(self, injection: Injection, positive: list, height: int, width: int, *, regions: bool) -> None:
        self.injection, self.positive, self.regions = injection, positive, regions
        self.cross = loss_sites(injection.unet, CROSS, height, width)
        self.own = loss_sites(injection.unet, SELF, height, width) if regions else []

    def of(self, z: torch.Tensor, sigma: torch.Tensor, options: dict[str, Any]) -> _Look | None:
        """For each region its concept's (batch, words, h, w), and the self-attention (batch, tokens, tokens).

        Several entries of the positive count alike. None says that none of them is sampled with at this noise level.
        """
        routed = self.injection.options(options)
        looks = [self._entry(entry, z, sigma, routed) for entry in self.positive]
        found = [look for look in looks if look is not None]
        if not found:
            return None
        crosses, attentions = zip(*found, strict=True)
        cross = [torch.stack(maps).mean(0) for maps in zip(*crosses, strict=True)]
        return cross, torch.stack(attentions).mean(0) if self.own else None

    def _entry(self, entry: Any, z: torch.Tensor, sigma: torch.Tensor, routed: dict[str, Any]) -> _Look | None:
        """Of one entry, in a call of its own: the host is free to call those of one prompt together or one by one."""
        with capture(self.injection.unet, [*self.cross, *self.own], stop=True) as seen:
            comfy.samplers.calc_cond_batch(self.injection.model, [[entry]], z, sigma, routed)
        if not seen.keys:  # outside of its part of the sampling the host makes no call
            return None
        grid = seen.grid(self.cross[0])
        cross = []
        for voice in self.injection.voices:
            looks = [self.injection.look(torch.cat(seen.queries[s]), s, voice) for s in self.cross]
            cross.append((sum(looks) / len(looks)).unflatten(-1, grid))  # type: ignore[union-attr]
        return cross, self._self_attention(seen, grid) if self.own else None

    def _self_attention(self, seen: Captured, grid: tuple[int, int]) -> torch.Tensor:
        allowed = self.injection.mask(grid)
        total = torch.zeros(())
        for site in self.own:
            attention = seen.probabilities(site) * allowed.to(seen.key(site).device)
            total = total + (attention / attention.sum(-1, keepdim=True)).mean(1)
        return total / len(self.own)


class Enhancer:
    """Takes gradient steps on the latent of one sampling; made anew for each.

    ``seen`` holds the maps of the last step, for each region (batch, words, h, w), and the percent (0 to 1) they are of.
    """

    def __init__(self, injection: Injection, positive: list, settings: Compose, once: EditSchedule) -> None:
        check_differentiable(injection.model)
        self.injection, self.positive, self.settings, self.once = injection, positive, settings, once
        self.stop = StopRule(settings.stop)
        self.going: torch.Tensor | None = None
        self.losses: list[torch.Tensor] = []
        self.updates = 0
        self.seen: tuple[list[torch.Tensor], float] | None = None

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        """The latent to predict at."""
        due, level = self.once.is_due(sigma), float(sigma.max())
        progress = percent_of(self.injection.model.model_sampling, level)
        if not due or not self.settings.start <= progress <= self.settings.end:
            return x
        if self.going is not None and not self.going.any():
            return x
        return self.once.apply(x, self._moved(x, sigma, level, progress, options))

    def _moved(self, x, sigma, level: float, progress: float, options: dict[str, Any]) -> torch.Tensor:
        seen: list[torch.Tensor] = []

        def loss_of(z: torch.Tensor) -> torch.Tensor:
            (positive,) = differentiable_conds([self.positive])
            maps = Maps(self.injection, positive, *x.shape[-2:], regions=self.settings.weights.region > 0)
            found = maps.of(z, without_inference_tensors(sigma), differentiable_options(options))
            if found is None:
                return (0 * z).sum()  # nobody has looked yet, so nothing pulls
            cross, attention = found
            self.seen = [maps.detach() for maps in cross], progress
            grid = (int(cross[0].shape[-2]), int(cross[0].shape[-1]))
            inside = self.injection.masks.inside(grid).unflatten(-1, grid).to(z.device)
            each = composer_loss(cross, attention, inside, self.settings.weights)
            seen.append(each.detach())
            return each.sum()  # pictures of a batch do not meet, so each gets its own gradient

        gradient = gradient_of(self.injection.model, x, loss_of)
        if not seen:
            return x
        self.losses.append(seen[0])
        going = torch.ones(len(x), dtype=torch.bool, device=x.device) if self.going is None else self.going
        # the step that a picture stops at is still taken, as in the reference
        self.going = going & self.stop.goes_on(seen[0])
        if gradient.value is None or not bool(gradient.value.any()):
            return x
        self.updates += 1
        step = gradient.value * going.view(-1, *[1] * (x.ndim - 1))
        return x - self._scaled(step, x, level, progress)

    def _scaled(self, gradient: torch.Tensor, x: torch.Tensor, level: float, progress: float) -> torch.Tensor:
        """The step in the sampler's own space. The paper's rate holds for a variance-preserving latent: × (1 + σ²)."""
        rate = self.settings.rate(progress)
        if not self.settings.relative:
            return gradient * (rate * (1 + level**2))
        axes = tuple(range(1, x.ndim))
        length, size = (t.square().sum(axes, keepdim=True).sqrt() for t in (gradient, x))
        return gradient * (rate * size / length.clamp(min=1e-12))


def reinitialised(
    injection: Injection,
    positive: list,
    noise: torch.Tensor,
    latent: torch.Tensor,
    sigmas: torch.Tensor,
    options: dict[str, Any],
    how: str,
) -> torch.Tensor:
    """The first noise with each region's best window in the region: exchanged (``swap``), or doubled as the reference does.

    Noise without any spread (a second stage adds none) has no windows that differ, and is left.
    """
    if not bool(noise.std() > 0):
        return noise
    model, height, width = injection.model, noise.shape[-2], noise.shape[-1]
    device = injection.model.current_patcher.load_device
    x = model.model_sampling.noise_scaling(sigmas[0].to(device), noise.to(device), latent.to(device), False)
    maps = Maps(injection, positive, height, width, regions=False)
    found = maps.of(x, sigmas[:1].to(device).expand(len(x)), options)
    if found is None:
        return noise
    cross, _ = found
    grid = (int(cross[0].shape[-2]), int(cross[0].shape[-1]))
    boxes = [around(region) for region in injection.masks.inside(grid).unflatten(-1, grid)]
    factor = maps.cross[0].factor
    out = []
    for number, one in enumerate(noise):
        hottest = sources([c[number].sum(0).cpu() for c in cross], boxes)
        changed = one
        for source, box in zip(hottest, boxes, strict=True):
            move = swapped if how == "swap" else copied
            if source != box:
                changed = move(changed, scaled(source, factor, height, width), scaled(box, factor, height, width))
        out.append(restored(changed, one) if how == "copy" and changed is not one else changed)
    return torch.stack(out)
