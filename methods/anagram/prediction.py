"""What is known of all views at one moment of a sampling, in the canonical frame."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import torch

from .extents import within_extents


@dataclass(eq=False)
class ScoreMemory:
    """The scores of the views in the course of one sampling. Each sampling has its own memory.

    Attributes:
        sigma: the noise level of the last scoring.
        scores: how well each view reads so far, (batch, views).
    """

    sigma: float | None = None
    scores: torch.Tensor | None = None


@dataclass(frozen=True)
class Predictions:
    """The denoised predictions of N views of one noisy picture ``x = signal · x0 + sigma · eps``.

    Attributes:
        x: the noisy picture, (batch, channels, …, height, width).
        signal: its signal level; 1 for sigma-space models, 1 − sigma for flow models.
        sigma: its noise level.
        percent: the place in the sampling, 0 to 1.
        step: the index in the schedule, from 0.
        positive: N tensors shaped like ``x``.
        negative: N tensors, or None where the host evaluates no negative (cfg 1).
        cfg: the guidance scale.
        extents: where each view acts, N tensors of true and false or None for everywhere. Empty: all act everywhere.
        memory: the scores of this sampling; a new one remembers nothing.
    """

    x: torch.Tensor
    signal: float
    sigma: float
    percent: float
    step: int
    positive: tuple[torch.Tensor, ...]
    negative: tuple[torch.Tensor, ...] | None
    cfg: float
    extents: tuple[torch.Tensor | None, ...] = ()
    memory: ScoreMemory = field(default_factory=ScoreMemory)

    def guided(self) -> tuple[torch.Tensor, ...]:
        """The prediction of each view with its own guidance: u + cfg · (c − u)."""
        if self.negative is None:
            return self.positive
        return tuple(u + self.cfg * (c - u) for c, u in zip(self.positive, self.negative, strict=True))

    def filled(self, *weights: torch.Tensor) -> Predictions:
        """Every view everywhere, by ``within_extents``. Extents are used up."""
        if not self.extents:
            return self
        positive = within_extents(self.positive, self.extents, *weights)
        negative = None if self.negative is None else tuple(within_extents(self.negative, self.extents, *weights))
        return replace(self, positive=tuple(positive), negative=negative, extents=())

    def as_noise(self, denoised: torch.Tensor) -> torch.Tensor:
        """The noise that a denoised picture implies, (x − signal · x0) / sigma."""
        return (self.x - self.signal * denoised) / self.sigma


Weights: TypeAlias = Callable[[Predictions], torch.Tensor]
"""The weight of each view for each picture of the batch, (batch, views), ≥ 0, summing to 1 over the views."""

Combine: TypeAlias = Callable[[Predictions], tuple[torch.Tensor, torch.Tensor | None]]
"""All views' predictions to one positive and one negative prediction (None where there is no negative)."""
