"""What is known of all views at one moment of sampling, in the canonical frame."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch


@dataclass(eq=False)
class Memory:
    """What a balance keeps from step to step of one sampling; each sampling has its own.

    Attributes:
        level: the noise level it has last read a picture at.
        scores: how well each view has read so far, (batch, views).
    """

    level: float | None = None
    scores: torch.Tensor | None = None


@dataclass(frozen=True)
class Predictions:
    """The denoised predictions of N views of one noisy picture ``x = signal · x0 + noise · eps``.

    Attributes:
        x: the noisy picture, (batch, channels, …, height, width).
        signal: its signal level; 1 for sigma-space models, 1 − sigma for flow models.
        noise: its noise level; sigma for both.
        progress: how much of the sampling is done, 0 to 1 (the host's percent).
        step: which step of the schedule this is, from 0.
        positive: N tensors shaped like ``x``.
        negative: N tensors, or None where the negative is not asked (cfg 1).
        cfg: the guidance scale.
        memory: of the sampling; without one, nothing is remembered.
    """

    x: torch.Tensor
    signal: float
    noise: float
    progress: float
    step: int
    positive: tuple[torch.Tensor, ...]
    negative: tuple[torch.Tensor, ...] | None
    cfg: float
    memory: Memory = field(default_factory=Memory)

    def guided(self) -> tuple[torch.Tensor, ...]:
        """The prediction of each view with its own guidance: u + cfg · (c − u)."""
        if self.negative is None:
            return self.positive
        return tuple(u + self.cfg * (c - u) for c, u in zip(self.positive, self.negative, strict=True))

    def as_noise(self, denoised: torch.Tensor) -> torch.Tensor:
        """The noise that a denoised picture implies, (x − signal · x0) / noise."""
        return (self.x - self.signal * denoised) / self.noise


Weights = Callable[[Predictions], torch.Tensor]
"""The weight of each view for each picture of the batch, (batch, views), ≥ 0, summing to 1 over the views."""
