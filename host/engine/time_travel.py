"""Time travel: each step of a window runs again after going back up in noise, so separately drawn parts can fuse.

Lugmayr et al., "RePaint", 2201.09865, section 4.2 (resampling); used for anagrams in "LookingGlass", 2504.08902.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import comfy.samplers
import torch

from ..types import ModelSampling, Options, Sampler, SamplerCallback
from .sampling import plans_whole_schedule, sampler_name, signal_and_noise

_SEED_OFFSET = 0x9E3779B97F4A7C15
_OWN_SEED = 0xD1B54A32D192ED03
"""Keeps the noise added here different from the first noise (the seed), and from what samplers draw: they begin at the
seed, on newer hosts and a CPU at the one after it."""

SamplerFunction = Callable[..., torch.Tensor]
"""A sampler's function in k-diffusion's form: ``(model, x, sigmas, extra_args, callback, disable, **options)``."""


def travelling_sampler(sampler: Sampler, start: float, end: float, repeats: int) -> Sampler:
    """A SAMPLER that takes each step between ``start`` and ``end`` (sampling percent, 0 to 1) ``repeats`` times.

    With ``repeats`` 1, or an empty window, it is the given sampler. In the window, steps no longer follow each other,
    so a sampler that remembers earlier steps begins again at each.

    Raises:
        ValueError: a sampler object without a function to call step by step, or one that needs the whole schedule.
    """
    if repeats <= 1 or end <= start:
        return sampler
    function = getattr(sampler, "sampler_function", None)
    if function is None:
        raise ValueError(
            f"Time travel cannot take {type(sampler).__name__} apart into steps; use a sampler from KSamplerSelect."
        )
    name = sampler_name(sampler)
    if plans_whole_schedule(name):
        raise ValueError(
            f"Time travel takes single steps, and {name.removeprefix('sample_')} plans its steps over the whole "
            "schedule; use heun, dpm_2 or euler."
        )
    travel = Travel(function, start, end, repeats)
    return comfy.samplers.KSAMPLER(travel, sampler.extra_options, sampler.inpaint_options)


def renoised_latent(
    x: torch.Tensor, noise: torch.Tensor, model_sampling: ModelSampling, low: float, high: float
) -> torch.Tensor:
    """``x`` at sigma ``low`` brought back up to sigma ``high`` with fresh unit ``noise``, of the same signal and power.

    With x = a · x0 + s · ε: x · a_high/a_low + √(s_high² − (s_low · a_high/a_low)²) · noise.
    """
    (a_low, s_low), (a_high, s_high) = signal_and_noise(model_sampling, low), signal_and_noise(model_sampling, high)
    ratio = a_high / a_low
    return x * ratio + (s_high**2 - (s_low * ratio) ** 2) ** 0.5 * noise


@dataclass(frozen=True)
class Travel:
    """A sampler's function that calls another of the host's step by step, and steps of the window several times."""

    function: SamplerFunction
    start: float
    end: float
    repeats: int

    def passes(self, model_sampling: ModelSampling, sigmas: torch.Tensor) -> list[int]:
        """How often each step is taken. The last one, which ends without noise, is taken once."""
        highest, lowest = (float(model_sampling.percent_to_sigma(percent)) for percent in (self.start, self.end))
        steps = zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True)
        return [self.repeats if lowest <= high <= highest and low > 0 else 1 for high, low in steps]

    def __call__(
        self,
        model: comfy.samplers.KSamplerX0Inpaint,
        x: torch.Tensor,
        sigmas: torch.Tensor,
        extra_args: Options | None = None,
        callback: SamplerCallback | None = None,
        disable: bool | None = None,
        **options: float,
    ) -> torch.Tensor:
        """As the host calls its samplers."""
        model_sampling = model.inner_model.inner_model.model_sampling
        passes = self.passes(model_sampling, sigmas)
        seed = (extra_args or {}).get("seed") or 0
        generator = torch.Generator().manual_seed((seed + _OWN_SEED) % 2**63)
        run = _Runs(self.function, model, sigmas, extra_args or {}, callback, disable, options)
        step = 0
        while step < len(passes):
            if passes[step] == 1:  # to the window or the end in one run: multistep samplers remember
                stop = next((s for s in range(step, len(passes)) if passes[s] > 1), len(passes))
                x, step = run(step, stop, x), stop
                continue
            x = self._repeated_step(run, step, x, model_sampling, generator)
            step += 1
        return x

    def _repeated_step(
        self, run: _Runs, step: int, x: torch.Tensor, model_sampling: ModelSampling, generator: torch.Generator
    ) -> torch.Tensor:
        for again in range(self.repeats):
            x = run(step, step + 1, x)
            if again < self.repeats - 1:
                noise = torch.randn(x.shape, generator=generator, dtype=torch.float32).to(x)
                high, low = float(run.sigmas[step]), float(run.sigmas[step + 1])
                x = renoised_latent(x, noise, model_sampling, low, high)
        return x


@dataclass
class _Runs:
    """Calls a sampler's function on parts of a schedule, with arguments that fit the part."""

    function: SamplerFunction
    model: comfy.samplers.KSamplerX0Inpaint
    sigmas: torch.Tensor
    extra_args: Options
    callback: SamplerCallback | None
    disable: bool | None
    options: Options
    count: int = 0

    def __call__(self, first: int, last: int, x: torch.Tensor) -> torch.Tensor:
        callback, extra_args, options = self.callback, dict(self.extra_args), dict(self.options)
        shifted = None if callback is None else lambda facts: callback({**facts, "i": facts["i"] + first})
        if extra_args.get("seed") is not None:  # else every call of an ancestral sampler would draw the same noise
            extra_args["seed"] = (extra_args["seed"] + self.count * _SEED_OFFSET) % 2**63
        self.count += 1
        if options.get("s_churn"):  # which samplers share out among the steps they get
            options["s_churn"] *= (last - first) / (len(self.sigmas) - 1)
        part = self.sigmas[first : last + 1]
        return self.function(
            self.model, x, part, extra_args=extra_args, callback=shifted, disable=self.disable, **options
        )
