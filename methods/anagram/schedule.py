"""Weights that change during the sampling, as a user writes them: which view counts how much, and when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .balance import manual, normalised
from .prediction import Predictions, Weights

EXAMPLE = "0: 1, 1\n0.8: 1, 1\n0.8: 1, 0"


@dataclass(frozen=True)
class Keyframe:
    """The weight of every view at one place of the sampling (``percent``, 0 to 1)."""

    percent: float
    weights: tuple[float, ...]


def schedule_from(text: str) -> tuple[Keyframe, ...]:
    """The keyframes of a text with one ``percent: weight, weight, …`` per line, in order.

    Raises:
        ValueError: a line of another form, percents outside 0 to 1 or not in order, weights that are negative or all 0.
    """
    keyframes: list[Keyframe] = []
    for line in filter(None, map(str.strip, text.splitlines())):
        try:
            percent, _, weights = line.partition(":")
            keyframe = Keyframe(float(percent), tuple(float(weight) for weight in weights.split(",")))
        except ValueError as error:
            raise ValueError(
                f"The line '{line}' is not a moment with weights; write '0.5: 1, 2' for weights 1 and 2 at half of the "
                "sampling."
            ) from error
        _check_keyframe(keyframe, keyframes)
        keyframes.append(keyframe)
    if not keyframes:
        raise ValueError(f"The schedule is empty; write a moment and every view's weight, such as '{EXAMPLE[:7]}'.")
    return tuple(keyframes)


def _check_keyframe(keyframe: Keyframe, before: Sequence[Keyframe]) -> None:
    percent, weights = keyframe.percent, keyframe.weights
    if not 0 <= percent <= 1 or (before and percent < before[-1].percent):
        raise ValueError(
            f"The moment {percent:g} is not between 0 and 1, or comes before the line above; sort the lines."
        )
    if not all(0 <= w < float("inf") for w in weights) or sum(weights) <= 0:
        raise ValueError(
            f"The weights at {percent:g} must be 0 or more, and at least one above 0; try 1 for every view."
        )
    if before and len(weights) != len(before[0].weights):
        raise ValueError(
            f"The line at {percent:g} has another number of weights than the first; write one for each view."
        )


def by_schedule(weights: Sequence[float], keyframes: Sequence[Keyframe]) -> Weights:
    """The user's weight of each view times its scheduled one.

    Between keyframes the weights go in straight lines; before the first and after the last they are level. Two
    keyframes at one percent make a jump.

    Raises:
        ValueError: another number of views than of weights in a keyframe, or a keyframe with only views of weight 0.
    """
    base_weights = manual(weights)
    if len(keyframes[0].weights) != len(weights):
        raise ValueError(
            f"The schedule has {len(keyframes[0].weights)} weights per line and there are {len(weights)} views; write "
            "one for each."
        )
    if any(sum(w * s for w, s in zip(weights, keyframe.weights, strict=True)) <= 0 for keyframe in keyframes):
        raise ValueError(
            "At a moment of the schedule only views of weight 0 count; raise their weight in Anagram View."
        )

    def weigh(p: Predictions) -> torch.Tensor:
        scheduled = torch.tensor(_weights_at(keyframes, p.percent), dtype=torch.float32, device=p.x.device)
        return normalised(base_weights(p) * scheduled)

    return weigh


def _weights_at(keyframes: Sequence[Keyframe], percent: float) -> tuple[float, ...]:
    before = [keyframe for keyframe in keyframes if keyframe.percent <= percent]
    after = [keyframe for keyframe in keyframes if keyframe.percent > percent]
    if not before or not after:
        return (before[-1] if before else after[0]).weights
    a, b = before[-1], after[0]
    t = (percent - a.percent) / (b.percent - a.percent)
    return tuple((1 - t) * x + t * y for x, y in zip(a.weights, b.weights, strict=True))
