"""Gradient steps that pull concepts into their regions before a prediction, and first noise arranged for them."""

from __future__ import annotations

from typing import NamedTuple

import comfy.samplers
import torch

from ...methods.compose.losses import composer_loss
from ...methods.compose.reinit import around, rearranged
from ...methods.compose.settings import Compose
from ...methods.compose.stop import StopRule
from ...methods.panels import AttentionSnapshot
from ..engine.attention import CROSS, SELF, Captured, capture, loss_sites
from ..engine.gradients import (
    check_differentiable,
    differentiable_conds,
    differentiable_options,
    gradient_of,
    without_inference_tensors,
)
from ..engine.latent_edits import EditSchedule, LatentEdit
from ..engine.model_call import active_entries
from ..engine.reach import unanswered
from ..types import CondEntry, Conds, ModelOptions
from .injection import Injection


class CapturedMaps(NamedTuple):
    """One attention map (batch, phrase, h, w) per region, and the self-attention (batch, tokens, tokens) or None."""

    cross: list[torch.Tensor]
    attention: torch.Tensor | None

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of the maps."""
        height, width = self.cross[0].shape[-2:]
        return int(height), int(width)


class AttentionMaps:
    """The attention of the positive with all concepts in place: one model call per entry, up to the last site it needs.

    Args:
        height, width: of the latent.
        regions: whether the self-attention is captured too.
    """

    def __init__(self, injection: Injection, positive: Conds, height: int, width: int, *, regions: bool) -> None:
        self.injection, self.positive = injection, positive
        self.cross_sites = loss_sites(injection.unet, CROSS, height, width)
        self.self_sites = loss_sites(injection.unet, SELF, height, width) if regions else []

    def of(self, x: torch.Tensor, sigma: torch.Tensor, options: ModelOptions) -> CapturedMaps | None:
        """The mean over the positive's entries; None if none of them is active at this sigma."""
        routed = self.injection.options(options)
        found = [maps for entry in self.positive if (maps := self._entry(entry, x, sigma, routed)) is not None]
        if not found:
            return None
        crosses, attentions = zip(*found, strict=True)
        cross = [torch.stack(maps).mean(0) for maps in zip(*crosses, strict=True)]
        return CapturedMaps(cross, torch.stack(attentions).mean(0) if self.self_sites else None)

    def _entry(
        self, entry: CondEntry, x: torch.Tensor, sigma: torch.Tensor, routed: ModelOptions
    ) -> CapturedMaps | None:
        """Those of one entry, in its own call: the host may call the entries of one prompt together or one by one."""
        if not active_entries([entry], sigma):
            return None
        with capture(self.injection.unet, [*self.cross_sites, *self.self_sites], stop=True) as captured:
            comfy.samplers.calc_cond_batch(self.injection.model, [[entry]], x, sigma, routed)
        if not captured.keys:
            raise unanswered(routed)
        grid = captured.grid(self.cross_sites[0])
        projected, cross = self.injection.projected, []
        for concept in projected.concepts:
            maps = [projected.attention_map(torch.cat(captured.queries[s]), s, concept) for s in self.cross_sites]
            cross.append((sum(maps, torch.zeros(())) / len(maps)).unflatten(-1, grid))
        return CapturedMaps(cross, self._self_attention(captured, grid) if self.self_sites else None)

    def _self_attention(self, captured: Captured, grid: tuple[int, int]) -> torch.Tensor:
        allowed = self.injection.regions.allowed(grid)
        total = torch.zeros(())
        for site in self.self_sites:
            attention = captured.probabilities(site) * allowed.to(captured.key(site).device)
            total = total + (attention / attention.sum(-1, keepdim=True)).mean(1)
        return total / len(self.self_sites)


class Enhancer(LatentEdit):
    """Gradient steps that pull each concept's attention into its region, on the latent of one sampling.

    ``snapshot`` holds the first picture's attention in the last step, mean over each phrase.
    """

    def __init__(self, injection: Injection, positive: Conds, settings: Compose, schedule: EditSchedule) -> None:
        super().__init__(injection.model, schedule, (settings.start, settings.end))
        check_differentiable(injection.model)
        self.injection, self.positive, self.settings = injection, positive, settings
        self.stop = StopRule(settings.stop)
        self.going: torch.Tensor | None = None
        self.losses: list[torch.Tensor] = []
        self.updates = 0
        self.snapshot: AttentionSnapshot | None = None

    def prepare(self, sigma: torch.Tensor, options: ModelOptions) -> bool:
        """False once every picture has stopped."""
        return self.going is None or bool(self.going.any())

    def step(self, x: torch.Tensor, sigma: torch.Tensor, options: ModelOptions) -> torch.Tensor:
        """The latent after one gradient step; unchanged if no entry of the positive is active yet."""
        losses: list[torch.Tensor] = []

        def loss_of(z: torch.Tensor) -> torch.Tensor:
            each = self._losses(z, without_inference_tensors(sigma), differentiable_options(options))
            if each is None:
                return (0 * z).sum()
            losses.append(each.detach())
            return each.sum()  # pictures of a batch do not interact, so each gets its own gradient

        gradient = gradient_of(self.model, x, loss_of, [self.positive])
        if not losses:
            return x
        going = self._goes_on(losses[0])
        if gradient.value is None or not bool(gradient.value.any()):
            return x
        self.updates += 1
        change = gradient.value * going.view(-1, *[1] * (x.ndim - 1))
        return x - self._scaled(change, x, float(sigma.max()), self.percent)

    def _losses(self, z: torch.Tensor, sigma: torch.Tensor, options: ModelOptions) -> torch.Tensor | None:
        """The loss of each picture, (batch,); takes the snapshot on the way."""
        (positive,) = differentiable_conds([self.positive])
        regions = self.settings.weights.region > 0
        maps = AttentionMaps(self.injection, positive, *z.shape[-2:], regions=regions).of(z, sigma, options)
        if maps is None:
            return None
        first = torch.stack([each[0].detach().mean(0) for each in maps.cross])
        self.snapshot = AttentionSnapshot(first, self.percent)
        inside = self.injection.masks.inside(maps.grid).unflatten(-1, maps.grid).to(z.device)
        return composer_loss(maps.cross, maps.attention, inside, self.settings.weights)

    def _goes_on(self, losses: torch.Tensor) -> torch.Tensor:
        """The pictures that take this step, (batch,) of bool: those that stop at it too, as in the reference."""
        self.losses.append(losses)
        before = self.going
        self.going = self.stop.goes_on(losses) if before is None else before & self.stop.goes_on(losses)
        return torch.ones_like(self.going) if before is None else before

    def _scaled(self, gradient: torch.Tensor, x: torch.Tensor, sigma: float, percent: float) -> torch.Tensor:
        """The step in the sampler's own space. The paper's rate holds for a variance-preserving latent: × (1 + σ²)."""
        rate = self.settings.rate(percent)
        if not self.settings.relative:
            return gradient * (rate * (1 + sigma**2))
        axes = tuple(range(1, x.ndim))
        length, size = (t.square().sum(axes, keepdim=True).sqrt() for t in (gradient, x))
        return gradient * (rate * size / length.clamp(min=1e-12))


class NoiseArranger:
    """Brings each region's best window of the first noise into the region.

    Args:
        positive: the base's, as the host has processed it.
        how: ``swap`` exchanges two windows, ``copy`` copies one, as the reference does.
    """

    def __init__(self, injection: Injection, positive: Conds, how: str) -> None:
        self.injection, self.positive, self.how = injection, positive, how

    def arranged(
        self, noise: torch.Tensor, latent: torch.Tensor, sigmas: torch.Tensor, options: ModelOptions
    ) -> torch.Tensor:
        """The noise, (batch, channels, h, w).

        It stays as it is where it has no spread (a second stage adds none), or if no entry of the positive is active.
        """
        if not bool(noise.std() > 0):
            return noise
        height, width = noise.shape[-2:]
        maps = AttentionMaps(self.injection, self.positive, height, width, regions=False)
        captured = maps.of(*self._first_latent(noise, latent, sigmas), options)
        if captured is None:
            return noise
        inside = self.injection.masks.inside(captured.grid).unflatten(-1, captured.grid)
        boxes, factor = [around(region) for region in inside], maps.cross_sites[0].factor
        pictures = [
            rearranged(picture, [maps[number].sum(0).cpu() for maps in captured.cross], boxes, factor, self.how)
            for number, picture in enumerate(noise)
        ]
        return torch.stack(pictures)

    def _first_latent(
        self, noise: torch.Tensor, latent: torch.Tensor, sigmas: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The latent of the first step on the model's device, and its sigma, (batch,)."""
        model = self.injection.model
        device = model.current_patcher.load_device
        x = model.model_sampling.noise_scaling(sigmas[0].to(device), noise.to(device), latent.to(device), False)
        return x, sigmas[:1].to(device).expand(len(x))
