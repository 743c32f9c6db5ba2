"""Facts about a sampling: where it is at a noise level, and what the names of the host's samplers say."""

from __future__ import annotations

import re

import comfy.model_sampling
import torch

from ..types import ModelSampling, Sampler, TransformerOptions


def fades_signal(model_sampling: ModelSampling) -> bool:
    """Whether it is a flow model: its picture fades as the noise grows. Elsewhere noise is only added."""
    return isinstance(model_sampling, comfy.model_sampling.CONST)


def signal_and_noise(model_sampling: ModelSampling, sigma: float) -> tuple[float, float]:
    """The factors of ``x = signal · x0 + noise · eps`` at this sigma. Only flow models fade the signal.

    Newer hosts have flow models that were trained with noise of another scale than one, and a node that sets it.
    """
    if not fades_signal(model_sampling):
        return 1.0, sigma
    return 1.0 - sigma, sigma * getattr(model_sampling, "noise_scale", 1.0)


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


def sampler_name(sampler: Sampler) -> str:
    """The host's name of the sampler, in lower case. For a travelling one, that of the sampler that takes its steps."""
    function = getattr(sampler, "sampler_function", None)
    function = getattr(function, "function", function)
    return getattr(function, "__name__", type(sampler).__name__).lower()


def measures_error(name: str) -> bool:
    """Whether the sampler that the host calls so (``sampler_name``) adapts its steps to an error."""
    return "dpm_adaptive" in name


def plans_whole_schedule(name: str) -> bool:
    """Whether it plans over the whole schedule, so single steps make no sense. (Heun++ begins as euler.)"""
    return re.search(r"unipc|uni_pc|heunpp2", name) is not None


def guides_by_negative(name: str) -> bool:
    """Whether it is a cfg++ sampler, which goes on with the negative prediction."""
    return "cfg_pp" in name
