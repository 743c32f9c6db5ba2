"""What a trainer does at every step: the learning rate, the optimisers' step, the moving average."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping

import torch

log = logging.getLogger(__name__)


def rate(done: float, step: int, warm_up: int, flat: float) -> float:
    """Share of the peak rate: it rises over the first steps, and after the share ``flat`` falls to 0 as a cosine.

    Args:
        done: share of the training that is over, 0 to 1.
        step: steps made so far.
    """
    decay = 0.5 * (1 + math.cos(math.pi * max(0.0, done - flat) / (1 - flat)))
    return min(1.0, (step + 1) / warm_up) * decay


def take_step(
    optimisers: Iterable[torch.optim.Optimizer], parameters: list[torch.nn.Parameter], loss: torch.Tensor
) -> bool:
    """One step of the optimisers down the loss; one with a non-finite gradient is skipped, and false is returned."""
    loss.backward()
    finite = bool(torch.isfinite(torch.nn.utils.clip_grad_norm_(parameters, 1.0)))
    if not finite:
        log.info("a step with a non-finite gradient was skipped")
    for optimiser in optimisers:
        if finite:
            optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    return finite


def follow(average: dict[str, torch.Tensor], state: Mapping[str, torch.Tensor], decay: float) -> None:
    """Moves a moving average towards a state, in place."""
    for name, value in state.items():
        if value.is_floating_point():
            average[name].lerp_(value.to(average[name]), 1 - decay)
