"""How the predictions of several views become one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeAlias

import torch

from ..choices import check_choice
from . import rectify
from .balance import BALANCES, ViewScorer, by_score, manual
from .overlap import AntiSegregation
from .prediction import Combine, Predictions, Weights
from .schedule import Keyframe, by_schedule
from .views.base import Transform, View
from .views.components import SCALE

Weighing: TypeAlias = str | tuple[Keyframe, ...] | ViewScorer
"""What decides the weights of the views: a name of ``BALANCES``, a schedule, or a scorer."""


@dataclass(frozen=True)
class Combination:
    """How to combine. The default is plain averaging.

    Attributes:
        weighing: what decides each view's weight, on top of the user's own.
        rectification: a name of ``rectify.GAINS``, or ``off``.
        strength: of the rectification, 0 to 1.
        start, end: the window of the rectification in sampling percent, 0 to 1. Outside of about 0.05 to 0.92 the
            estimate is unsure (at the end) or multiplied by σ/(1 − σ) (at the start of flow models).
        contrast: how much each view is guided away from what the others show; its own negative counts 1. 0 is off. Not
            from a paper.
        max_gain: upper limit of the rectification's gain. 0 is √views, enough for unrelated views.
        anti_segregation: the gradient step against segregation; off unless it has a strength.
    """

    weighing: Weighing = "manual"
    rectification: str = "off"
    strength: float = 1.0
    start: float = 0.05
    end: float = 0.92
    contrast: float = 0.0
    max_gain: float = 0.0
    anti_segregation: AntiSegregation = field(default_factory=AntiSegregation)

    def weighed_by(self, weighing: Weighing) -> Combination:
        """The same with another weighing, unless the present one outranks it.

        A scorer outranks a schedule, and a schedule a balance, in whichever order a user chains the nodes.
        """
        return self if _rank(self.weighing) > _rank(weighing) else replace(self, weighing=weighing)

    def rectifies(self, p: Predictions) -> bool:
        """Whether the rectification acts at this moment."""
        inside = self.start <= p.percent <= self.end and p.signal > 0 and p.sigma > 0
        return self.rectification != "off" and self.strength != 0 and inside


def _rank(weighing: Weighing) -> int:
    return 2 if isinstance(weighing, ViewScorer) else 0 if isinstance(weighing, str) else 1


AVERAGING = Combination()
MULTI_TASK_FAST = Combination(rectification="match", contrast=0.5)
MULTI_TASK_FULL = replace(MULTI_TASK_FAST, anti_segregation=AntiSegregation(strength=0.03))

PRESETS: dict[str, Combination | None] = {
    "averaging": AVERAGING,
    "multi-task (fast, no gradient)": MULTI_TASK_FAST,
    "custom": None,
    "multi-task (full)": MULTI_TASK_FULL,
}
"""The combinations that a user picks by name; None is one of the user's own making."""


def active_views(weights: torch.Tensor) -> list[int]:
    """The views with a weight in any picture, by the weights (batch, views)."""
    return (weights > 0).any(0).nonzero().flatten().tolist()


def mix(predictions: Sequence[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
    """The weighted mean ("Visual Anagrams", 2311.17919, eq. 4, with weights).

    With weights that sum to one, averaging denoised pictures, noise or velocities is the same operation.

    Args:
        predictions: N tensors (batch, …).
        weights: (batch, N), summing to 1.
    """
    active = active_views(weights)
    if len(active) == 1:  # a lone view passes untouched: 1 · x + 0 need not be x bit for bit
        return predictions[active[0]]
    shape = (-1, *[1] * (predictions[0].ndim - 1))
    return torch.stack([predictions[i] * weights[:, i].view(shape).to(predictions[i].dtype) for i in active]).sum(0)


def sum_components(predictions: Sequence[torch.Tensor], components: Sequence[Transform]) -> torch.Tensor:
    """Σ Fᵢ(x0ᵢ) ("Factorized Diffusion", 2404.11615, eq. 6): as Σ Fᵢ = 1, the sum holds for noise and denoised
    alike."""
    return torch.stack([part(x0) for part, x0 in zip(components, predictions, strict=True)]).sum(0)


def check_components(views: Sequence[View]) -> None:
    """Refuses a list in which components do not add up to a picture.

    Raises:
        ValueError: components together with ordinary views, or a family that is not complete.
    """
    names = [v.name for v in views if v.component is not None]
    if not names:
        return
    family = next(v.family for v in views if v.component is not None)
    whole, once = (SCALE * len(names), "") if family == SCALE else (family, ", each once")
    if len(names) < len(views) or sorted(names) != sorted(whole):
        raise ValueError(
            f"Components split one picture, so a list with '{names[0]}' must hold just {' and '.join(family)}{once}, "
            f"and this one holds {', '.join(v.name for v in views)}; add what is missing and take the others out."
        )


def with_own_guidance(p: Predictions, cfgs: Sequence[float | None]) -> Predictions:
    """Predictions in which each view is guided by its own scale: uᵢ + wᵢ/w · (cᵢ − uᵢ) in place of cᵢ.

    The host's one guidance by w then gives uᵢ + wᵢ (cᵢ − uᵢ). None is the guider's scale. Without negatives nothing
    changes.
    """
    if p.negative is None or p.cfg == 0 or all(own is None for own in cfgs):
        return p
    positive = tuple(
        c if own is None else u + own / p.cfg * (c - u) for c, u, own in zip(p.positive, p.negative, cfgs, strict=True)
    )
    return replace(p, positive=positive)


def combiner(
    settings: Combination,
    weights: Sequence[float],
    views: Sequence[View] = (),
    cfgs: Sequence[float | None] = (),
) -> Combine:
    """The function that combines as the settings say, with the user's weight of each view.

    Args:
        views: the views themselves, where some may be components. Components are summed as they are, without weights
            except for ``scale``.
        cfgs: the guidance scale of each view, None for the guider's.

    Raises:
        ValueError: an unknown balance or rectification, weights that cannot be normalised, components that do not add
            up.
    """
    if isinstance(settings.weighing, str):
        check_choice(BALANCES, settings.weighing, "balance")
    check_choice(("off", *rectify.GAINS), settings.rectification, "rectification")
    check_components(views)
    summed = any(v.component for v in views)
    reduce = _summing(_parts(views, weights), weights) if summed else _averaging(settings, weights)
    return lambda p: reduce(with_own_guidance(p, cfgs or [None] * len(p.positive)))


def _weights_by(settings: Combination, weights: Sequence[float]) -> Weights:
    weighing = settings.weighing
    if isinstance(weighing, ViewScorer):
        return by_score(weights, weighing)
    return BALANCES[weighing](weights) if isinstance(weighing, str) else by_schedule(weights, weighing)


def _parts(views: Sequence[View], weights: Sequence[float]) -> list[Transform]:
    """The projection Fᵢ of every view: its component, or kᵢ times the prediction for mere scales, with Σ kᵢ = 1.

    Raises:
        ValueError: weights of scales that are negative or all 0.
    """
    if views[0].family != SCALE:
        return [v.component for v in views if v.component is not None]
    manual(weights)
    return [partial(torch.mul, other=weight / sum(weights)) for weight in weights]


def _summing(parts: Sequence[Transform], weights: Sequence[float]) -> Combine:
    """Components summed. They are never rectified, since nothing is averaged."""

    def combine(p: Predictions) -> tuple[torch.Tensor, torch.Tensor | None]:
        p = p.filled(torch.tensor([weights]))
        return sum_components(p.positive, parts), None if p.negative is None else sum_components(p.negative, parts)

    return combine


def _averaging(settings: Combination, weights: Sequence[float]) -> Combine:
    """The weighted mean, rectified.

    Outside of a view's extent the others count as at this moment, or as the user weighs them if none of them counts.
    """
    weigh, own = _weights_by(settings, weights), torch.tensor([weights])

    def combine(p: Predictions) -> tuple[torch.Tensor, torch.Tensor | None]:
        alphas = weigh(p.filled(own))
        p = p.filled(alphas, own)
        positive = mix(p.positive, alphas)
        negative = None if p.negative is None else mix(p.negative, alphas)
        if not settings.rectifies(p) or len(active_views(alphas)) == 1:
            return positive, negative  # with a lone view nothing has been averaged
        factor = rectify.gain(p, alphas, settings.rectification, settings.strength, settings.max_gain)
        # one factor for both: guidance is linear, so the guided noise gets exactly this factor
        rectified = rectify.with_gain(p, positive, factor)
        return rectified, None if negative is None else rectify.with_gain(p, negative, factor)

    return combine
