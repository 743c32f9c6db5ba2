"""Anti-segregation: concepts that would each be painted in a corner of their own are pulled onto the same place
("Diffusion-based Visual Anagram as Multi-task Learning", 2412.02693, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

CLOSE_ENOUGH = 0.005  # from the target overlap; nearer than this the step only oscillates
FAR = 0.1  # from the target overlap; nearer than this steps shorten in proportion, as plain descent's do


@dataclass(frozen=True)
class AntiSegregation:
    """How hard and when the concepts are pulled together.

    Attributes:
        strength: length of a full step, of the noisy picture's own root mean square; 0 is off. Ours: the paper steps 5 times the
            raw gradient, a figure that holds for its model's size alone.
        start, end: the window in sampling percent, 0 to 1.
        iterations: steps at each noise level.
        lasting: whether a step stays in the sampler's own latent, or only the prediction sees it; None is as the sampler can.
    """

    strength: float = 0.0
    start: float = 0.0
    end: float = 0.7
    iterations: int = 1
    lasting: bool | None = None


def target_overlap(views: int) -> float:
    """τ_N = 0.5 − 0.05 (N − 1): slightly less than full overlap, the less the more views there are."""
    return 0.5 - 0.05 * (views - 1)


def overlap(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """r = Σ min(a, b) / Σ (a + b) of two attention maps, (batch, height, width), each brought to the sum 1 first, so that
    r is 0 for maps apart and 0.5 for equal ones, whatever their mass. (The paper does not normalise.)"""
    a, b = (m / m.sum((-2, -1), keepdim=True).clamp(min=1e-12) for m in (a, b))
    return torch.minimum(a, b).sum((-2, -1)) / 2


def overlaps(maps: Sequence[torch.Tensor]) -> torch.Tensor:
    """The overlap of every pair of views, (batch, pairs)."""
    pairs = [(i, j) for i in range(len(maps)) for j in range(i + 1, len(maps))]
    return torch.stack([overlap(maps[i], maps[j]) for i, j in pairs], -1)


def segregation(maps: Sequence[torch.Tensor]) -> torch.Tensor:
    """L = mean over pairs of |τ_N − r_ij|, (batch,), of each view's concept attention in the canonical frame."""
    return (target_overlap(len(maps)) - overlaps(maps)).abs().mean(-1)


def step(x: torch.Tensor, gradient: torch.Tensor, loss: torch.Tensor, strength: float) -> torch.Tensor:
    """What is added to ``x``: down the gradient by ``strength`` of its root mean square, picture by picture. Concepts that
    overlap as they should, but for little, are not thrown about: the step shortens with what is missing.

    Args:
        x, gradient: (batch, …).
        loss: (batch,); pictures that are close enough stay as they are.
    """
    rms = lambda t: t.flatten(1).float().square().mean(1).sqrt().view(-1, *[1] * (t.ndim - 1))  # noqa: E731
    loss = loss.view(-1, *[1] * (x.ndim - 1)).to(x.device)
    length = strength * rms(x) / rms(gradient).clamp(min=1e-20) * (loss.float() / FAR).clamp(max=1)
    wanted = loss >= CLOSE_ENOUGH
    return torch.where(wanted, -(length * gradient.float()), 0.0).to(x.dtype)
