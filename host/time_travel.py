"""Time travel: every step of a window is taken again after going back up in noise, so that what was drawn apart can fuse.

Lugmayr et al., "RePaint", 2201.09865, section 4.2 (resampling); used for anagrams in "LookingGlass", 2504.08902.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.samplers
import torch

from .sampling import levels


def travelling(sampler: Any, start: float, end: float, repeats: int) -> Any:
    """A SAMPLER that takes each step between ``start`` and ``end`` (sampling percent, 0 to 1) ``repeats`` times.

    With ``repeats`` 1, or an empty window, it is the given sampler. Within the window a sampler that remembers earlier
    steps starts anew at each, since the steps no longer follow each other.

    Raises:
        ValueError: a sampler object that has no function to call step by step.
    """
    if repeats <= 1 or end <= start:
        return sampler
    function = getattr(sampler, "sampler_function", None)
    if function is None:
        raise ValueError(
            f"Time travel cannot take {type(sampler).__name__} apart into steps; use a sampler from KSamplerSelect."
        )
    travel = _step_by_step(function, start, end, repeats)
    return comfy.samplers.KSAMPLER(travel, sampler.extra_options, sampler.inpaint_options)


def renoised(x: torch.Tensor, noise: torch.Tensor, model_sampling: Any, low: float, high: float) -> torch.Tensor:
    """``x`` at noise level ``low`` brought back up to ``high`` with fresh unit ``noise``: signal and power are then as they
    were at ``high``. (x · a_high/a_low + √(s_high² − (s_low · a_high/a_low)²) · noise, with x = a · x0 + s · ε.)"""
    (a_low, s_low), (a_high, s_high) = levels(model_sampling, low), levels(model_sampling, high)
    ratio = a_high / a_low
    return x * ratio + (s_high**2 - (s_low * ratio) ** 2) ** 0.5 * noise


def _step_by_step(function: Callable[..., torch.Tensor], start: float, end: float, repeats: int):
    def sample(model, x, sigmas, extra_args=None, callback=None, disable=None, **options):
        model_sampling = model.inner_model.inner_model.model_sampling
        inside = _window(model_sampling, sigmas, start, end)
        seed = (extra_args or {}).get("seed") or 0
        generator = torch.Generator().manual_seed((seed + 1) % 2**63)  # not the seed itself: that made the first noise

        def run(first: int, last: int, x: torch.Tensor) -> torch.Tensor:
            moved = None if callback is None else lambda known: callback({**known, "i": known["i"] + first})
            return function(
                model, x, sigmas[first : last + 1], extra_args=extra_args, callback=moved, disable=disable, **options
            )

        step = 0
        while step < len(sigmas) - 1:
            if step not in inside:  # on to the window, or to the end, in one run: multistep samplers remember
                stop = min((s for s in inside if s > step), default=len(sigmas) - 1)
                x, step = run(step, stop, x), stop
                continue
            for again in range(repeats):
                x = run(step, step + 1, x)
                if again < repeats - 1:
                    noise = torch.randn(x.shape, generator=generator, dtype=torch.float32).to(x)
                    x = renoised(x, noise, model_sampling, float(sigmas[step + 1]), float(sigmas[step]))
            step += 1
        return x

    return sample


def _window(model_sampling: Any, sigmas: torch.Tensor, start: float, end: float) -> set[int]:
    """The steps that begin inside the window; the last step, which ends without noise, is never taken again."""
    highest, lowest = (float(model_sampling.percent_to_sigma(percent)) for percent in (start, end))
    return {i for i in range(len(sigmas) - 1) if lowest <= float(sigmas[i]) <= highest and float(sigmas[i + 1]) > 0}
