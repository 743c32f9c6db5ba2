"""A reference picture's way through the noise levels, and the gradient steps that bring a latent into its layout."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import comfy.samplers
import comfy.utils
import torch

from ...methods.conduct.alignment import alignment_loss, inverted_step, moved
from ...methods.conduct.settings import Conduct
from ..engine.attention import SELF, Captured, Site, capture, find_sites
from ..engine.gradients import (
    check_differentiable,
    differentiable_conds,
    differentiable_options,
    gradient_of,
    without_inference_tensors,
)
from ..engine.latent_edits import EditSchedule
from ..engine.sampling import percent_of
from .paths import Conds, Path, Paths

_WIDE = 32  # tokens of a side of the maps that masks are refined on, in the paper for every model


@dataclass(frozen=True, eq=False)
class LayoutReference:
    """A picture whose layout shall be taken.

    ``latent`` is clean, as on a wire, (1, channels, height, width). ``noised`` takes forward noise instead of inverting.
    ``points`` are clicks (x, y) in fractions, one a concept, from which first masks are made. ``kept`` holds what was computed
    last, by MODEL, for a schedule and a size, so that a second run of the graph need not; a node that changes a model in
    whatever way hands on another MODEL.
    """

    positive: list
    latent: torch.Tensor
    noised: bool = False
    points: tuple[tuple[float, float], ...] = ()
    kept: WeakKeyDictionary[Any, tuple[Any, dict[float, torch.Tensor]]] = field(default_factory=WeakKeyDictionary)


def guidance_site(unet: Any) -> Site:
    """The self-attention whose keys are aligned: the first of the decoder; in deep blocks the middle of its second."""
    sites = find_sites(unet, SELF, "output")
    return _deep(sites, max(s.factor for s in sites)) or next(
        s for s in sites if s.factor == max(t.factor for t in sites)
    )


def mask_site(unet: Any, height: int, width: int) -> Site:
    """The self-attention whose rows make masks: of the decoder's levels, the last attention of the one next to 32 × 32 tokens."""
    sites = find_sites(unet, SELF, "output")
    factors = sorted({s.factor for s in sites})
    factor = min(factors, key=lambda f: abs(min(height, width) / f - _WIDE))
    return _deep(sites, factor) or [s for s in sites if s.factor == factor][-1]


def _deep(sites: list[Site], factor: int) -> Site | None:
    blocks = sorted({s.block for s in sites if s.factor == factor})
    found = [s for s in sites if len(blocks) > 1 and s.block == blocks[1] and s.depth == 4]
    return found[0] if found else None


def trajectory(
    reference: LayoutReference,
    model: Any,
    conds: Conds,
    sigmas: torch.Tensor,
    like: torch.Tensor,
    options: dict[str, Any],
    patcher: Any,
) -> dict[float, torch.Tensor]:
    """The reference at every noise level of the schedule, by level: DDIM inversion over the sampler's own levels.

    Args:
        patcher: the MODEL as it came from the graph, for which it is kept.

    Raises:
        ValueError: the reference has another size than the picture.
    """
    if reference.latent.shape[1:] != like.shape[1:]:
        raise ValueError(
            f"The layout reference's latent is {tuple(reference.latent.shape)} and the picture's is {tuple(like.shape)}; scale "
            "the reference picture to the canvas before VAE Encode."
        )
    levels = sorted({float(s) for s in sigmas if s > 0})
    key = (patcher.patches_uuid, tuple(levels), tuple(like.shape[1:]), like.dtype)
    known = reference.kept.get(patcher)
    if known is None or known[0] != key:
        reference.kept.clear()  # one at a time: a picture of 4 MB at 200 levels is much to keep twice
        clean = model.process_latent_in(reference.latent[:1].to(like))
        make = _noised if reference.noised else _inverted
        known = reference.kept[patcher] = (key, make(model, conds, levels, clean, options))
    return known[1]


def _inverted(
    model: Any, conds: Conds, levels: list[float], clean: torch.Tensor, options: dict[str, Any]
) -> dict[float, torch.Tensor]:
    """The model is told the level it goes to, and sees the latent it comes from, as in the reference implementation."""
    x, before, out = clean, 0.0, {}
    bar = comfy.utils.ProgressBar(len(levels))
    for level in levels:
        seen = x * ((1 + level**2) / (1 + before**2)) ** 0.5
        denoised = comfy.samplers.calc_cond_batch(model, [conds], seen, x.new_full((len(x),), level), options)[0]
        x = inverted_step(x, (seen - denoised) / level, before, level)
        out[level], before = x, level
        bar.update(1)
    return out


def _noised(
    model: Any, conds: Conds, levels: list[float], clean: torch.Tensor, options: dict[str, Any]
) -> dict[float, torch.Tensor]:
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0)).to(clean)
    return {level: clean + level * noise for level in levels}


class Aligner:
    """Moves the latent of one sampling towards the reference's layout; made anew for each.

    ``seen`` holds what each path's last step has captured of the first picture, ``progress`` the percent (0 to 1) it is of.
    """

    def __init__(
        self,
        paths: Paths,
        layout: Path,
        levels: dict[float, torch.Tensor],
        sigmas: torch.Tensor,
        settings: Conduct,
        once: EditSchedule,
    ) -> None:
        check_differentiable(paths.model)
        self.paths, self.layout, self.levels, self.settings, self.once = paths, layout, levels, settings, once
        self.site = guidance_site(paths.unet)
        sampling = paths.model.model_sampling
        guided = sum(settings.guides_at(percent_of(sampling, float(s))) for s in sigmas[:-1])
        self.steps = settings.steps_each(guided)
        self.losses: list[float] = []
        self.seen: dict[Path, Captured] = {}
        self.progress = 0.0

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        """The latent to predict at."""
        due, level = self.once.is_due(sigma), float(sigma.max())
        progress = percent_of(self.paths.model.model_sampling, level)
        if not due or not self.settings.guides_at(progress):
            return x
        self.progress = progress
        with torch.no_grad():
            # the same attention as in the gradient, or a latent that is the reference would not stand still
            asked = differentiable_options(options)
            wanted = self._keys(self.layout, self._reference_at(level), sigma[:1], asked)
        edited = x
        for _ in range(self.steps):
            edited = self._moved(edited, sigma, wanted, options)
        return self.once.apply(x, edited)

    def _reference_at(self, level: float) -> torch.Tensor:
        return self.levels[min(self.levels, key=lambda known: abs(known - level))]

    def _moved(
        self, x: torch.Tensor, sigma: torch.Tensor, wanted: torch.Tensor, options: dict[str, Any]
    ) -> torch.Tensor:
        """One gradient step. The loss is a sum over paths, so each path's gradient is taken by itself: the memory of one."""
        total, loss = torch.zeros_like(x), 0.0
        for number, path in enumerate(self.paths.paths):
            share = 1.0 if number == 0 else self.settings.concept_share / (len(self.paths.paths) - 1)

            def loss_of(z: torch.Tensor, path: Path = path, share: float = share) -> torch.Tensor:
                keys = self._keys(path, z, without_inference_tensors(sigma), differentiable_options(options))
                return (
                    share * alignment_loss(keys, without_inference_tensors(wanted)).sum()
                )  # pictures of a batch do not meet

            gradient = gradient_of(self.paths.model, x, loss_of)
            if gradient.value is None:
                return x
            total, loss = total + gradient.value, loss + gradient.loss
        self.losses.append(loss)
        return moved(x, total, float(sigma.max()), self.settings.guidance_weight)

    def _keys(self, path: Path, z: torch.Tensor, sigma: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        """The keys of the guidance site on one path, (batch, tokens, channels); the forward pass ends there."""
        with self.paths.alone(path), capture(self.paths.unet, [self.site], stop=True) as seen:
            comfy.samplers.calc_cond_batch(
                self.paths.model,
                differentiable_conds([path.positive[:1]]),
                z,
                sigma.expand(len(z)),
                self.paths.routed(options),
            )
        self.seen[path] = seen.first()
        return seen.key(self.site)

    def attention(self) -> tuple[torch.Tensor, tuple[int, int]]:
        """The concepts' self-attention in the last step, (concepts, tokens, tokens), mean over heads, and its grid."""
        seen = [self.seen[path] for path in self.paths.paths[1:]]
        return torch.cat([one.probabilities(self.site).mean(1) for one in seen]), seen[0].grid(self.site)
