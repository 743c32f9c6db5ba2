"""Facts about the moment of sampling, read from the host's model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.model_sampling
import torch


def signal_and_noise(model_sampling: Any, sigma: float) -> tuple[float, float]:
    """Signal and noise level of ``x = signal · x0 + noise · eps`` at this sigma: flow models fade the signal, others do not."""
    return (1.0 - sigma, sigma) if isinstance(model_sampling, comfy.model_sampling.CONST) else (1.0, sigma)


def percent_of(model_sampling: Any, sigma: float) -> float:
    """The sampling percent (0 to 1) at this sigma: the inverse of the host's ``percent_to_sigma``, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(24):
        middle = (low + high) / 2
        if float(model_sampling.percent_to_sigma(middle)) > sigma:
            low = middle
        else:
            high = middle
    return low


def step_of(transformer_options: dict[str, Any], sigma: float) -> int:
    """Which step of the schedule has this sigma (or the last one above it: second-order samplers evaluate in between)."""
    schedule: torch.Tensor | None = transformer_options.get("sample_sigmas")
    if schedule is None:
        return 0
    return max(int((schedule >= sigma * (1 - 1e-4)).sum()) - 1, 0)


def asking_for_room(times: int) -> Callable[..., Any]:
    """A wrapper of the host's preparation of a sampling (``PREPARE_SAMPLING``), by which the model is loaded with room for so
    many times the rows the host knows of; for want of memory it would split the batch."""

    def wrapper(executor: Any, model: Any, noise_shape: Any, *args: Any, **kwargs: Any) -> Any:
        return executor(model, [times * noise_shape[0], *noise_shape[1:]], *args, **kwargs)

    return wrapper
