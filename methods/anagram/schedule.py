"""Weights that change in the course of the sampling, as a user writes them: which view counts how much, and when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .balance import manual, normalised
from .prediction import Predictions, Weights

EXAMPLE = "0: 1, 1\n0.8: 1, 1\n0.8: 1, 0"


@dataclass(frozen=True)
class Stop:
    """The weight of every view at one moment of the sampling (0 to 1)."""

    at: float
    weights: tuple[float, ...]


def schedule_from(text: str) -> tuple[Stop, ...]:
    """Stops as they are written, ``moment: weight, weight, …`` a line, in order.

    Raises:
        ValueError: a line that is none, moments outside 0 to 1 or not in order, weights that are negative or all 0.
    """
    stops: list[Stop] = []
    for line in filter(None, map(str.strip, text.splitlines())):
        try:
            moment, _, values = line.partition(":")
            stop = Stop(float(moment), tuple(float(value) for value in values.split(",")))
        except ValueError as error:
            raise ValueError(
                f"The line '{line}' is no moment with weights; write '0.5: 1, 2' for weights 1 and 2 at half of the sampling."
            ) from error
        _check(stop, stops)
        stops.append(stop)
    if not stops:
        raise ValueError(f"The schedule is empty; write a moment and every view's weight, such as '{EXAMPLE[:7]}'.")
    return tuple(stops)


def _check(stop: Stop, before: Sequence[Stop]) -> None:
    if not 0 <= stop.at <= 1 or (before and stop.at < before[-1].at):
        raise ValueError(
            f"The moment {stop.at:g} is not between 0 and 1, or comes before the line above; sort the lines."
        )
    if not all(0 <= w < float("inf") for w in stop.weights) or sum(stop.weights) <= 0:
        raise ValueError(
            f"The weights at {stop.at:g} must be 0 or more, and at least one above 0; try 1 for every view."
        )
    if before and len(stop.weights) != len(before[0].weights):
        raise ValueError(
            f"The line at {stop.at:g} has another number of weights than the first; write one for each view."
        )


def by_schedule(weights: Sequence[float], stops: Sequence[Stop]) -> Weights:
    """The user's weight of each view times its scheduled one: straight lines between the stops, level before the first and
    after the last. Two stops at one moment make a jump.

    Raises:
        ValueError: another number of views than of weights in a stop, or stops that leave only views of weight 0.
    """
    even = manual(weights)
    if len(stops[0].weights) != len(weights):
        raise ValueError(
            f"The schedule has {len(stops[0].weights)} weights a line and there are {len(weights)} views; write one for each."
        )
    if any(sum(w * s for w, s in zip(weights, stop.weights, strict=True)) <= 0 for stop in stops):
        raise ValueError(
            "At a moment of the schedule only views of weight 0 count; raise their weight in Anagram View."
        )

    def weigh(p: Predictions) -> torch.Tensor:
        now = torch.tensor(_at(stops, p.progress), dtype=torch.float32, device=p.x.device)
        return normalised(even(p) * now)

    return weigh


def _at(stops: Sequence[Stop], moment: float) -> tuple[float, ...]:
    before = [s for s in stops if s.at <= moment]
    after = [s for s in stops if s.at > moment]
    if not before or not after:
        return (before[-1] if before else after[0]).weights
    a, b = before[-1], after[0]
    t = (moment - a.at) / (b.at - a.at)
    return tuple((1 - t) * x + t * y for x, y in zip(a.weights, b.weights, strict=True))
