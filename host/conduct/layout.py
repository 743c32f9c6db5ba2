"""A reference picture at every noise level, and the gradient steps that bring a latent into its layout."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple
from uuid import UUID
from weakref import WeakKeyDictionary

import comfy.samplers
import comfy.utils
import torch

from ...methods.conduct.alignment import alignment_loss, inverted_step, moved_latent
from ...methods.conduct.settings import Conduct
from ..engine.attention import Captured
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
from ..engine.sampling import fades_signal, percent_of, signal_and_noise
from ..types import BaseModel, Conditioning, Conds, ModelOptions, ModelPatcher
from .paths import ConceptPath, Paths

Trajectory = dict[float, torch.Tensor]
"""The latent of the reference at each noise level, (1, channels, height, width)."""


class TrajectoryKey(NamedTuple):
    """What a trajectory depends on, besides the MODEL."""

    patches_uuid: UUID
    sigmas: tuple[float, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    beside: float | None
    """A sum over the picture that an inpainting model sees beside the latent."""


@dataclass(frozen=True, eq=False)
class LayoutReference:
    """A picture whose layout is taken.

    Args:
        latent: clean, as on a wire, (1, channels, height, width).
        noised: adds forward noise instead of inverting.
        passes: further model calls for each level of an inversion, which take its slope where the step ends.
        points: clicks (x, y) in fractions, one per concept; the first masks are made from them.

    ``cache`` holds the last trajectory by MODEL, for a second run of the graph. A node that changes a model in
    whatever way returns another MODEL.
    """

    positive: Conditioning
    latent: torch.Tensor
    noised: bool = False
    points: tuple[tuple[float, float], ...] = ()
    cache: WeakKeyDictionary[ModelPatcher, tuple[TrajectoryKey, Trajectory]] = field(default_factory=WeakKeyDictionary)
    passes: int = 0


@dataclass(frozen=True, eq=False)
class Denoiser:
    """The host's model under one prompt, without guidance."""

    model: BaseModel
    conds: Conds
    options: ModelOptions

    def __call__(self, x: torch.Tensor, sigma: float) -> torch.Tensor:
        """The denoised latent, shaped like ``x``."""
        sigmas = x.new_full((len(x),), sigma)
        return comfy.samplers.calc_cond_batch(self.model, [self.conds], x, sigmas, self.options)[0]

    def beside(self) -> float | None:
        """A sum over the picture that the model sees beside the latent, None without one."""
        picture = self.conds[0]["model_conds"].get("c_concat")
        return None if picture is None else float(picture.cond.double().sum())

    def as_path(self) -> ConceptPath:
        """Its prompt as a path without a LoRA."""
        return ConceptPath(self.conds, self.conds)


def trajectory(
    reference: LayoutReference, denoiser: Denoiser, patcher: ModelPatcher, sigmas: torch.Tensor, like: torch.Tensor
) -> Trajectory:
    """The reference at every noise level of the schedule: DDIM inversion over the sampler's own noise levels.

    Args:
        denoiser: the model under the reference's prompt.
        patcher: the MODEL as it came from the graph, under which the result is cached.
        like: a latent of the picture, for its size, dtype and device.

    Raises:
        ValueError: the reference has another size than the picture.
    """
    latent = _latent_like(reference, like)
    ascending = sorted({float(s) for s in sigmas if s > 0})
    beside = denoiser.beside()
    key = TrajectoryKey(patcher.patches_uuid, tuple(ascending), tuple(like.shape[1:]), like.dtype, beside)
    cached = reference.cache.get(patcher)
    if cached is None or cached[0] != key:
        reference.cache.clear()  # one at a time: a picture of 4 MB at 200 noise levels is much to store twice
        clean = denoiser.model.process_latent_in(latent)
        given = (denoiser, ascending, clean)
        cached = key, _noised(*given) if reference.noised else _inverted(*given, reference.passes)
        reference.cache[patcher] = cached
    return cached[1]


def _latent_like(reference: LayoutReference, like: torch.Tensor) -> torch.Tensor:
    """The reference's latent as the model's latents are: some have an axis for frames."""
    latent = reference.latent[:1].to(like)
    latent = latent.unsqueeze(2) if like.ndim > latent.ndim else latent
    if latent.shape[1:] != like.shape[1:]:
        raise ValueError(
            f"The layout reference's latent is {tuple(reference.latent.shape)} and the picture's is "
            f"{tuple(like.shape)}; scale the reference picture to the canvas before VAE Encode."
        )
    return latent


def _inverted(denoiser: Denoiser, sigmas: list[float], clean: torch.Tensor, passes: int = 0) -> Trajectory:
    """By inversion. As in the reference code, the model gets the next noise level and the latent of the one before.

    Where noise is only added, that latent gets the size of the next level first. A flow's latents have nearly one size.
    Further passes see the latent at which the step has arrived.
    """
    grows = not fades_signal(denoiser.model.model_sampling)
    x, before, latents = clean, 0.0, {}
    bar = comfy.utils.ProgressBar(len(sigmas))
    for sigma in sigmas:
        seen = x * ((1 + sigma**2) / (1 + before**2)) ** 0.5 if grows else x
        start, x = x, inverted_step(x, _slope(denoiser, seen, sigma), before, sigma)
        for _ in range(passes):
            x = inverted_step(start, _slope(denoiser, x, sigma), before, sigma)
        latents[sigma], before = x, sigma
        bar.update(1)
    return latents


def _slope(denoiser: Denoiser, x: torch.Tensor, sigma: float) -> torch.Tensor:
    """Where the flow of probability leads from ``x``, per noise level."""
    return (x - denoiser(x, sigma)) / sigma


def _noised(denoiser: Denoiser, sigmas: list[float], clean: torch.Tensor) -> Trajectory:
    """By one noise for all levels, without a model call."""
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0)).to(clean)
    levels = {sigma: signal_and_noise(denoiser.model.model_sampling, sigma) for sigma in sigmas}
    return {sigma: signal * clean + share * noise for sigma, (signal, share) in levels.items()}


class Aligner(LatentEdit):
    """Moves the latent of one sampling towards the reference's layout.

    Args:
        layout: the reference's prompt as a path.
        latents: the reference's trajectory.
        sigmas: of the whole sampling; the paper's number of steps is spread over those inside the window.

    ``captured`` holds what the last step has captured on each path, of the first picture. ``losses`` has one number per
    step.
    """

    def __init__(
        self,
        paths: Paths,
        layout: ConceptPath,
        latents: Trajectory,
        sigmas: torch.Tensor,
        settings: Conduct,
        schedule: EditSchedule,
    ) -> None:
        check_differentiable(paths.model)
        sampling = paths.model.model_sampling
        aligned = sum(settings.guides_at(percent_of(sampling, float(s))) for s in sigmas[:-1])
        window = (settings.guidance_start, settings.guidance_end)
        super().__init__(paths.model, schedule, window, settings.steps_each(aligned))
        self.paths, self.layout, self.latents, self.settings = paths, layout, latents, settings
        self.site = paths.network.guidance_site
        self.losses: list[float] = []
        self.captured: dict[ConceptPath, Captured] = {}
        self._target = torch.empty(0)  # the reference's keys, of ``prepare``

    def prepare(self, sigma: torch.Tensor, options: ModelOptions) -> bool:
        """Computes the reference's keys at this noise level; False where the base says nothing at it."""
        if not active_entries(self.paths.paths[0].positive, sigma):
            return False
        now = float(sigma.max())
        reference = self.latents[min(self.latents, key=lambda known: abs(known - now))]
        with torch.no_grad():
            # the same attention as in the gradient, or a latent that equals the reference would move
            self._target = self._keys(self.layout, reference, sigma[:1], differentiable_options(options))
        return True

    def step(self, x: torch.Tensor, sigma: torch.Tensor, options: ModelOptions) -> torch.Tensor:
        return self._moved(x, sigma, self._target, options)

    def _moved(self, x: torch.Tensor, sigma: torch.Tensor, target: torch.Tensor, options: ModelOptions) -> torch.Tensor:
        """One gradient step. The loss is a sum over paths; a gradient per path needs the memory of one path only."""
        total, loss = torch.zeros_like(x), 0.0
        for number, path in enumerate(self.paths.paths):
            share = 1.0 if number == 0 else self.settings.concept_share / (len(self.paths.paths) - 1)

            def loss_of(z: torch.Tensor, path: ConceptPath = path, share: float = share) -> torch.Tensor:
                keys = self._keys(path, z, without_inference_tensors(sigma), differentiable_options(options))
                # pictures of a batch do not meet
                return share * alignment_loss(keys, without_inference_tensors(target)).sum()

            gradient = gradient_of(self.paths.model, x, loss_of, [path.positive])
            if gradient.value is None:
                return x
            total, loss = total + gradient.value, loss + gradient.loss
        self.losses.append(loss)
        levels = signal_and_noise(self.paths.model.model_sampling, float(sigma.max()))
        return moved_latent(x, total, levels, self.settings.guidance_weight)

    def _keys(self, path: ConceptPath, z: torch.Tensor, sigma: torch.Tensor, options: ModelOptions) -> torch.Tensor:
        """The keys of the guidance site on one path, (batch, tokens, channels). The forward pass ends there."""
        with self.paths.single_path(path), self.paths.network.capture(stop=True) as captured:
            conds = differentiable_conds([active_entries(path.positive, sigma)[:1]])
            comfy.samplers.calc_cond_batch(self.paths.model, conds, z, sigma.expand(len(z)), self.paths.routed(options))
        if self.site not in captured.keys:
            raise unanswered(options)
        self.captured[path] = captured.first()
        return captured.key(self.site)

    def attention(self) -> tuple[torch.Tensor, tuple[int, int]] | None:
        """The concepts' self-attention in the last step, (concepts, tokens, tokens), mean over heads, and its grid.

        None before any step, and where a pass ends before its queries.
        """
        if not all(self.site in one.queries for one in self.captured.values()) or not self.captured:
            return None
        captured = [self.captured[path] for path in self.paths.paths[1:]]
        return torch.cat([one.probabilities(self.site).mean(1) for one in captured]), captured[0].grid(self.site)
