"""Facts about a sampling: where it is at a noise level, and what the host's samplers do, in one table."""

from __future__ import annotations

import re
from dataclasses import dataclass

import comfy.model_sampling
import torch

from ..types import ModelSampling, TransformerOptions


def signal_and_noise(model_sampling: ModelSampling, sigma: float) -> tuple[float, float]:
    """The factors of ``x = signal · x0 + noise · eps`` at this sigma. Only flow models fade the signal.

    Newer hosts have flow models that were trained with noise of another scale than one, and a node that sets it.
    """
    if not isinstance(model_sampling, comfy.model_sampling.CONST):
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


@dataclass(frozen=True)
class SamplerFacts:
    """The habits of a sampler.

    Attributes:
        lookahead_calls: evaluations at a noise level before the sampler's latent gets there; at the first level, none.
        at_eta_1: they are at that level for eta 1 only, in between for others.
        not_in_flow: for flow models they are in between too.
        keeps_latent: it goes on with the latent it was given. Others use their own, and an edit is lost.
        corrects: its lookahead is a second evaluation at the corrected latent, within one run of steps.
        whole_schedule: it plans over the whole schedule, so single steps make no sense.
        own_levels: its noise levels are not those of the schedule.
        measures_error: it adapts its steps to an error that it estimates.
    """

    lookahead_calls: int = 0
    at_eta_1: bool = False
    not_in_flow: bool = False
    keeps_latent: bool = True
    corrects: bool = False
    whole_schedule: bool = False
    own_levels: bool = False
    measures_error: bool = False

    def lookahead(self, eta: float, flow: bool) -> int:
        """The number of lookahead calls at this eta, for a flow model or another.

        The middle of an ancestral step is the next level at eta 1: σ_down is then σ'² / σ, and √(σ σ_down) is σ'. The
        2S form for flow models has its middle elsewhere.
        """
        in_between = (self.at_eta_1 and eta != 1) or (self.not_in_flow and flow)
        return 0 if in_between else self.lookahead_calls


# the first pattern found in the sampler's name counts
_FACTS: dict[str, SamplerFacts] = {
    r"dpm_adaptive": SamplerFacts(measures_error=True),
    r"dpm_fast": SamplerFacts(keeps_latent=False, own_levels=True),
    r"unipc|uni_pc": SamplerFacts(keeps_latent=False, whole_schedule=True),
    r"heunpp2": SamplerFacts(lookahead_calls=2, whole_schedule=True),  # by single steps, the first is euler
    r"sa_solver_pece": SamplerFacts(lookahead_calls=1, corrects=True),
    r"sa_solver|lcm": SamplerFacts(keeps_latent=False),
    r"^sample_heun$|exp_heun": SamplerFacts(lookahead_calls=1),
    r"dpm_2_ancestral|dpmpp_2s_ancestral.*cfg_pp$": SamplerFacts(lookahead_calls=1, at_eta_1=True),
    r"dpmpp_2s_ancestral": SamplerFacts(lookahead_calls=1, at_eta_1=True, not_in_flow=True),
}


def facts_of(name: str) -> SamplerFacts:
    """The facts of the sampler that the host calls so (``time_travel.sampler_name``)."""
    return next((facts for pattern, facts in _FACTS.items() if re.search(pattern, name)), SamplerFacts())


def guides_by_negative(name: str) -> bool:
    """Whether it is a cfg++ sampler, which goes on with the negative prediction."""
    return "cfg_pp" in name
