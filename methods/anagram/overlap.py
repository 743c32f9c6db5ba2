"""Anti-segregation: the overlap of the views' concept attention, and the gradient step that increases it.

"Diffusion-based Visual Anagram as Multi-task Learning", 2412.02693, section 3.2: without it, each concept may get a
corner of the picture to itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

CLOSE_ENOUGH = 0.005  # from the target overlap; nearer than this the step only oscillates
FAR = 0.1  # from the target overlap; nearer than this steps shorten in proportion, as plain descent's do


@dataclass(frozen=True)
class AntiSegregation:
    """How far and when the concepts are pulled together.

    Attributes:
        strength: length of a full step, as a share of the noisy picture's root mean square; 0 is off. Differs from the
            paper: it steps 5 times the raw gradient, a figure that fits the size of its model only.
        start, end: the window in sampling percent, 0 to 1.
        iterations: steps at each noise level.
        in_place: whether a step stays in the sampler's latent (True) or is shown to the prediction only (False). None
            is True where the sampler keeps its latent.
    """

    strength: float = 0.0
    start: float = 0.0
    end: float = 0.7
    iterations: int = 1
    in_place: bool | None = None


def target_overlap(views: int) -> float:
    """τ_N = 0.5 − 0.05 (N − 1): slightly less than full overlap, and less with more views."""
    return 0.5 - 0.05 * (views - 1)


def overlap(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """r = Σ min(a, b) / Σ (a + b) of two attention maps, (batch, height, width): 0 for maps apart, 0.5 for equal ones.

    Differs from the paper: each map is brought to the sum 1 first, which makes their masses irrelevant.
    """
    a, b = (m / m.sum((-2, -1), keepdim=True).clamp(min=1e-12) for m in (a, b))
    return torch.minimum(a, b).sum((-2, -1)) / 2


def overlaps(maps: Sequence[torch.Tensor]) -> torch.Tensor:
    """The overlap of every pair of views, (batch, pairs)."""
    pairs = [(i, j) for i in range(len(maps)) for j in range(i + 1, len(maps))]
    return torch.stack([overlap(maps[i], maps[j]) for i, j in pairs], -1)


def segregation(maps: Sequence[torch.Tensor]) -> torch.Tensor:
    """L = mean over pairs of |τ_N − r_ij|, (batch,), of each view's concept attention in the canonical frame."""
    return (target_overlap(len(maps)) - overlaps(maps)).abs().mean(-1)


def descent(x: torch.Tensor, gradient: torch.Tensor, loss: torch.Tensor, strength: float) -> torch.Tensor:
    """What is added to ``x``: a step down the gradient by ``strength`` of its root mean square, picture by picture.

    The step shortens in proportion to the loss where little is missing, so concepts that nearly overlap are hardly
    moved.

    Args:
        x, gradient: (batch, …).
        loss: (batch,); pictures that are close enough stay as they are.
    """
    rms = lambda t: t.flatten(1).float().square().mean(1).sqrt().view(-1, *[1] * (t.ndim - 1))  # noqa: E731
    loss = loss.view(-1, *[1] * (x.ndim - 1)).to(x.device)
    length = strength * rms(x) / rms(gradient).clamp(min=1e-20) * (loss.float() / FAR).clamp(max=1)
    return torch.where(loss >= CLOSE_ENOUGH, -(length * gradient.float()), 0.0).to(x.dtype)


@dataclass(frozen=True)
class GradientStep:
    """A gradient step as what carries it out needs it.

    Attributes:
        loss: each view's attention map, (batch, height, width), to (batch,).
        step: latent, gradient and loss to what is added to the latent.
        start, end, iterations, in_place: as in ``AntiSegregation``.
    """

    loss: Callable[[Sequence[torch.Tensor]], torch.Tensor]
    step: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    start: float
    end: float
    iterations: int
    in_place: bool | None = None


def gradient_step_of(settings: AntiSegregation) -> GradientStep | None:
    """The gradient step of the settings; None at strength 0."""
    if settings.strength == 0:
        return None
    step = partial(descent, strength=settings.strength)
    return GradientStep(segregation, step, settings.start, settings.end, settings.iterations, settings.in_place)
