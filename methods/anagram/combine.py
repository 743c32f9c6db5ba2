"""How the predictions of several views become one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from ..choices import check_choice
from . import rectify
from .balance import BALANCES, Reader, by_score, manual
from .overlap import AntiSegregation
from .prediction import Predictions, Weights
from .schedule import Stop, by_schedule
from .views.base import Transform, View
from .views.components import SCALE


@dataclass(frozen=True)
class Combination:
    """How to combine. The default is plain averaging.

    Attributes:
        balance: a name of ``BALANCES``.
        rectification: a name of ``rectify.GAINS``, or ``off``.
        strength: of the rectification, 0 to 1.
        start, end: the window of the rectification in sampling percent, 0 to 1. Outside of about 0.05 to 0.92 the
            estimate is unsure (at the end) or blown up by σ/(1 − σ) (at the start of flow models).
        reader: takes the place of ``balance`` where it is given: the views are weighed by how well each reads.
        schedule: takes the place of ``balance`` where it has stops: each view's weight in the course of the sampling.
        contrast: how much each view is guided away from what the others show, against its negative's 1; 0 is off. Ours.
        largest: what the rectification multiplies noise by at most; 0 is √views, which views that share nothing need.
        together: the gradient step against segregation, off unless it has a strength.
    """

    balance: str = "manual"
    rectification: str = "off"
    strength: float = 1.0
    start: float = 0.05
    end: float = 0.92
    reader: Reader | None = None
    schedule: tuple[Stop, ...] = ()
    contrast: float = 0.0
    largest: float = 0.0
    together: AntiSegregation = field(default_factory=AntiSegregation)


AVERAGING = Combination()
MULTI_TASK_FAST = Combination(rectification="match", contrast=0.5)
MULTI_TASK_FULL = replace(MULTI_TASK_FAST, together=AntiSegregation(strength=0.03))


def weighed(weights: torch.Tensor) -> list[int]:
    """The views that count in any picture, by the weights (batch, views)."""
    return (weights > 0).any(0).nonzero().flatten().tolist()


def mix(predictions: Sequence[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
    """The weighted mean ("Visual Anagrams", 2311.17919, eq. 4, with weights).

    With weights that sum to one, averaging denoised pictures, noise or velocities is the same operation.

    Args:
        predictions: N tensors (batch, …).
        weights: (batch, N), summing to 1.
    """
    used = weighed(weights)
    if len(used) == 1:  # a lone view passes untouched: 1 · x + 0 need not be x bit for bit
        return predictions[used[0]]
    shape = (-1, *[1] * (predictions[0].ndim - 1))
    return torch.stack([predictions[i] * weights[:, i].view(shape).to(predictions[i].dtype) for i in used]).sum(0)


Combine = Callable[[Predictions], tuple[torch.Tensor, torch.Tensor | None]]
"""All views' predictions to one positive and one negative prediction (None as the negative if there is none)."""


def sum_components(predictions: Sequence[torch.Tensor], components: Sequence[Transform]) -> torch.Tensor:
    """Σ Fᵢ(x0ᵢ) ("Factorized Diffusion", 2404.11615, eq. 6): as Σ Fᵢ = 1, the sum holds for noise and denoised alike."""
    return torch.stack([part(x0) for part, x0 in zip(components, predictions, strict=True)]).sum(0)


def check_components(views: Sequence[View]) -> None:
    """Refuses a list in which components do not add up to a picture.

    Raises:
        ValueError: components beside ordinary views, or a family that is not complete.
    """
    named = [v.name for v in views if v.component is not None]
    if not named:
        return
    family = next(v.family for v in views if v.component is not None)
    whole, once = (SCALE * len(named), "") if family == SCALE else (family, ", each once")
    if len(named) < len(views) or sorted(named) != sorted(whole):
        raise ValueError(
            f"Components split one picture, so a list with '{named[0]}' must hold just {' and '.join(family)}{once}, "
            f"and this one holds {', '.join(v.name for v in views)}; add what is missing and take the others out."
        )


def with_own_guidance(p: Predictions, cfgs: Sequence[float | None]) -> Predictions:
    """Predictions in which each view is guided by its own scale: uᵢ + wᵢ/w · (cᵢ − uᵢ) in place of cᵢ, so that the
    host's one guidance by w gives uᵢ + wᵢ (cᵢ − uᵢ). None is the guider's scale. Without negatives nothing changes."""
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
        views: the views themselves, where some may be components; these are summed as they are, without weights but for
            ``scale``.
        cfgs: the guidance scale of each view, None for the guider's.

    Raises:
        ValueError: an unknown balance or rectification, weights that cannot be normalised, components that do not add up.
    """
    check_choice(BALANCES, settings.balance, "balance")
    check_choice(("off", *rectify.GAINS), settings.rectification, "rectification")
    check_components(views)
    summed = any(v.component for v in views)
    reduce = _summing(_parts(views, weights)) if summed else _averaging(settings, _weigh(settings, weights))
    return lambda p: reduce(with_own_guidance(p, cfgs or [None] * len(p.positive)))


def _weigh(settings: Combination, weights: Sequence[float]) -> Weights:
    if settings.reader is not None:
        return by_score(weights, settings.reader)
    return by_schedule(weights, settings.schedule) if settings.schedule else BALANCES[settings.balance](weights)


def _parts(views: Sequence[View], weights: Sequence[float]) -> list[Transform]:
    """The projection Fᵢ of every view: its component, or kᵢ times the prediction for mere scales, with Σ kᵢ = 1.

    Raises:
        ValueError: weights of scales that are negative or all 0.
    """
    if views[0].family != SCALE:
        return [v.component for v in views if v.component is not None]
    manual(weights)
    return [partial(torch.mul, other=weight / sum(weights)) for weight in weights]


def _summing(parts: Sequence[Transform]) -> Combine:
    """Components summed; never rectified, for nothing is averaged away."""

    def combine(p: Predictions) -> tuple[torch.Tensor, torch.Tensor | None]:
        return sum_components(p.positive, parts), None if p.negative is None else sum_components(p.negative, parts)

    return combine


def _averaging(settings: Combination, weigh: Weights) -> Combine:
    """The weighted mean, rectified."""

    def combine(p: Predictions) -> tuple[torch.Tensor, torch.Tensor | None]:
        alphas = weigh(p)
        positive = mix(p.positive, alphas)
        negative = None if p.negative is None else mix(p.negative, alphas)
        inside = settings.start <= p.progress <= settings.end and p.signal > 0 and p.noise > 0
        if settings.rectification == "off" or settings.strength == 0 or not inside or len(weighed(alphas)) == 1:
            return positive, negative  # of a lone view nothing has been averaged away
        factor = rectify.gain(p, alphas, settings.rectification, settings.strength, settings.largest)
        # one factor for both: guidance is linear, so the guided noise gets exactly this factor
        rectified = rectify.with_gain(p, positive, factor)
        return rectified, None if negative is None else rectify.with_gain(p, negative, factor)

    return combine
