"""Time travel: every step of a window is taken again after going back up in noise, so that what was drawn apart can fuse.

Lugmayr et al., "RePaint", 2201.09865, section 4.2 (resampling); used for anagrams in "LookingGlass", 2504.08902.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.samplers
import torch

from .sampler_facts import facts_of
from .sampling import signal_and_noise

_SEEDS_APART = 0x9E3779B97F4A7C15


def travelling_sampler(sampler: Any, start: float, end: float, repeats: int) -> Any:
    """A SAMPLER that takes each step between ``start`` and ``end`` (sampling percent, 0 to 1) ``repeats`` times.

    With ``repeats`` 1, or an empty window, it is the given sampler. Within the window a sampler that remembers earlier
    steps starts anew at each, since the steps no longer follow each other.

    Raises:
        ValueError: a sampler object that has no function to call step by step, or one that needs the whole schedule.
    """
    if repeats <= 1 or end <= start:
        return sampler
    function = getattr(sampler, "sampler_function", None)
    if function is None:
        raise ValueError(
            f"Time travel cannot take {type(sampler).__name__} apart into steps; use a sampler from KSamplerSelect."
        )
    name = sampler_name(sampler)
    if facts_of(name).whole_schedule:
        raise ValueError(
            f"Time travel takes single steps, and {name.removeprefix('sample_')} plans its steps over the whole schedule; use "
            "heun, dpm_2 or euler."
        )
    return comfy.samplers.KSAMPLER(
        Travel(function, start, end, repeats), sampler.extra_options, sampler.inpaint_options
    )


def sampler_name(sampler: Any) -> str:
    """What the host calls the sampler, in small letters; of a travelling one, the one that takes its steps."""
    function = getattr(sampler, "sampler_function", None)
    function = function.function if isinstance(function, Travel) else function
    return getattr(function, "__name__", type(sampler).__name__).lower()


def renoised_latent(x: torch.Tensor, noise: torch.Tensor, model_sampling: Any, low: float, high: float) -> torch.Tensor:
    """``x`` at noise level ``low`` brought back up to ``high`` with fresh unit ``noise``: signal and power are then as they
    were at ``high``. (x · a_high/a_low + √(s_high² − (s_low · a_high/a_low)²) · noise, with x = a · x0 + s · ε.)"""
    (a_low, s_low), (a_high, s_high) = signal_and_noise(model_sampling, low), signal_and_noise(model_sampling, high)
    ratio = a_high / a_low
    return x * ratio + (s_high**2 - (s_low * ratio) ** 2) ** 0.5 * noise


@dataclass(frozen=True)
class Travel:
    """A sampler's function that calls another of the host's step by step, and steps of the window several times."""

    function: Callable[..., torch.Tensor]
    start: float
    end: float
    repeats: int

    def passes(self, model_sampling: Any, sigmas: torch.Tensor) -> list[int]:
        """How often each step is taken; the last one, which ends without noise, never twice."""
        highest, lowest = (float(model_sampling.percent_to_sigma(percent)) for percent in (self.start, self.end))
        steps = zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True)
        return [self.repeats if lowest <= high <= highest and low > 0 else 1 for high, low in steps]

    def __call__(
        self, model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict[str, Any] | None = None,
        callback: Any = None, disable: Any = None, **options: Any,
    ) -> torch.Tensor:  # fmt: skip
        """As the host calls its samplers."""
        model_sampling = model.inner_model.inner_model.model_sampling
        passes = self.passes(model_sampling, sigmas)
        seed = (extra_args or {}).get("seed") or 0
        generator = torch.Generator().manual_seed((seed + 1) % 2**63)  # not the seed itself: that made the first noise
        run = _Runs(self.function, model, sigmas, extra_args or {}, callback, disable, options)
        step = 0
        while step < len(passes):
            if passes[step] == 1:  # on to the window, or to the end, in one run: multistep samplers remember
                stop = next((s for s in range(step, len(passes)) if passes[s] > 1), len(passes))
                x, step = run(step, stop, x), stop
                continue
            for again in range(self.repeats):
                x = run(step, step + 1, x)
                if again < self.repeats - 1:
                    noise = torch.randn(x.shape, generator=generator, dtype=torch.float32).to(x)
                    x = renoised_latent(x, noise, model_sampling, float(sigmas[step + 1]), float(sigmas[step]))
            step += 1
        return x


@dataclass
class _Runs:
    """Calls a sampler's function on parts of a schedule, with what it takes from the whole of it."""

    function: Callable[..., torch.Tensor]
    model: Any
    sigmas: torch.Tensor
    extra_args: dict[str, Any]
    callback: Any
    disable: Any
    options: dict[str, Any]
    count: int = 0

    def __call__(self, first: int, last: int, x: torch.Tensor) -> torch.Tensor:
        callback, extra_args, options = self.callback, dict(self.extra_args), dict(self.options)
        moved = None if callback is None else lambda known: callback({**known, "i": known["i"] + first})
        if extra_args.get("seed") is not None:  # else every call of an ancestral sampler would draw the same noise
            extra_args["seed"] = (extra_args["seed"] + self.count * _SEEDS_APART) % 2**63
        self.count += 1
        if options.get("s_churn"):  # which samplers share out among the steps they are given
            options["s_churn"] *= (last - first) / (len(self.sigmas) - 1)
        part = self.sigmas[first : last + 1]
        return self.function(
            self.model, x, part, extra_args=extra_args, callback=moved, disable=self.disable, **options
        )
