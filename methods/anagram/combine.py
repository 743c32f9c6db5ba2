"""How the predictions of several views become one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from . import rectify
from .balance import BALANCES
from .prediction import Predictions, Weights


@dataclass(frozen=True)
class Combination:
    """How to combine. The default is plain averaging.

    Attributes:
        balance: a name of ``BALANCES``.
        rectification: a name of ``rectify.GAINS``, or ``off``.
        strength: of the rectification, 0 to 1.
        start, end: the window of the rectification in sampling percent, 0 to 1. Outside of about 0.05 to 0.92 the
            estimate is unsure (at the end) or blown up by σ/(1 − σ) (at the start of flow models).
    """

    balance: str = "manual"
    rectification: str = "off"
    strength: float = 1.0
    start: float = 0.05
    end: float = 0.92


AVERAGING = Combination()
MULTI_TASK_FAST = Combination(rectification="match")


def mix(predictions: Sequence[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
    """The weighted mean ("Visual Anagrams", 2311.17919, eq. 4, with weights).

    With weights that sum to one, averaging denoised pictures, noise or velocities is the same operation.

    Args:
        predictions: N tensors (batch, …).
        weights: (batch, N), summing to 1.
    """
    used = [i for i in range(len(predictions)) if bool((weights[:, i] > 0).any())]
    if len(used) == 1:  # a lone view passes untouched: 1 · x + 0 need not be x bit for bit
        return predictions[used[0]]
    shape = (-1, *[1] * (predictions[0].ndim - 1))
    return torch.stack([predictions[i] * weights[:, i].view(shape).to(predictions[i].dtype) for i in used]).sum(0)


Combine = Callable[[Predictions], tuple[torch.Tensor, torch.Tensor | None]]
"""All views' predictions to one positive and one negative prediction (None as the negative if there is none)."""


def combiner(settings: Combination, weights: Sequence[float]) -> Combine:
    """The function that combines as the settings say, with the user's weight of each view.

    Raises:
        ValueError: an unknown balance or rectification, or weights that cannot be normalised.
    """
    if settings.balance not in BALANCES:
        raise ValueError(f"There is no balance '{settings.balance}'; try one of {', '.join(BALANCES)}.")
    if settings.rectification != "off" and settings.rectification not in rectify.GAINS:
        raise ValueError(f"There is no rectification '{settings.rectification}'; try off, {', '.join(rectify.GAINS)}.")
    weigh: Weights = BALANCES[settings.balance](weights)

    def combine(p: Predictions) -> tuple[torch.Tensor, torch.Tensor | None]:
        alphas = weigh(p)
        positive = mix(p.positive, alphas)
        negative = None if p.negative is None else mix(p.negative, alphas)
        inside = settings.start <= p.progress <= settings.end and p.signal > 0 and p.noise > 0
        if settings.rectification == "off" or settings.strength == 0 or len(p.positive) == 1 or not inside:
            return positive, negative
        factor = rectify.gain(p, alphas, settings.rectification, settings.strength)
        # one factor for both: guidance is linear, so the guided noise gets exactly this factor
        rectified = rectify.with_gain(p, positive, factor)
        return rectified, None if negative is None else rectify.with_gain(p, negative, factor)

    return combine
