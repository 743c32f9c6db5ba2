"""Where a sampling is at a noise level, as the host's model tells it."""

from __future__ import annotations

import comfy.model_sampling
import torch

from ..types import Executor, ModelSampling, TransformerOptions, Wrapper


def signal_and_noise(model_sampling: ModelSampling, sigma: float) -> tuple[float, float]:
    """The factors of ``x = signal · x0 + noise · eps`` at this sigma. Only flow models fade the signal."""
    return (1.0 - sigma, sigma) if isinstance(model_sampling, comfy.model_sampling.CONST) else (1.0, sigma)


def percent_of(model_sampling: ModelSampling, sigma: float) -> float:
    """The sampling percent (0 to 1) at this sigma: the inverse of the host's ``percent_to_sigma``, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(24):
        middle = (low + high) / 2
        if float(model_sampling.percent_to_sigma(middle)) > sigma:
            low = middle
        else:
            high = middle
    return low


def step_of(transformer_options: TransformerOptions, sigma: float) -> int:
    """The index of the step at this sigma, or of the last one above it: second-order samplers evaluate in between."""
    schedule: torch.Tensor | None = transformer_options.get("sample_sigmas")
    if schedule is None:
        return 0
    return max(int((schedule >= sigma * (1 - 1e-4)).sum()) - 1, 0)


def asking_for_room(row_factor: int) -> Wrapper:
    """A wrapper of the host's ``PREPARE_SAMPLING`` that has the model loaded with room for more rows.

    Without that room the host splits the batch.

    Args:
        row_factor: how many times the rows that the host expects.
    """

    def wrapper(executor: Executor, model: object, noise_shape: torch.Size, *args: object, **kwargs: object) -> object:
        return executor(model, [row_factor * noise_shape[0], *noise_shape[1:]], *args, **kwargs)

    return wrapper
