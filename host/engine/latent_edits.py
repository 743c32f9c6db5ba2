"""Edits of a sampler's latent before a prediction: gradient steps, and when they are due.

An edit is due once per noise level, at the latent that the sampler goes on with. A second-order sampler also evaluates
latents that it throws away: between the levels of its schedule (dpm_2, dpmpp_sde), or at the next level before it gets
there (heun). Editing those latents has no effect, and the one that is kept would be missed.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import comfy.model_sampling
import torch

from ..types import BaseModel, ModelOptions, ModelSampling, Sampler
from .sampling import SamplerFacts, facts_of, percent_of
from .time_travel import Travel, sampler_name

log = logging.getLogger(__name__)

_SAME_SIGMA = 1e-3  # relative; for flow models some samplers lower the first level by less


@dataclass(eq=False)
class EditSchedule:
    """Says at each evaluation of one sampling whether an edit is due. Each sampling needs a new one.

    Args:
        sigmas: the schedule's noise levels. Without any, each level below all earlier ones counts as one.
        lookahead_calls: per level, the evaluations before the one at the latent that the sampler keeps.
        in_place: whether an edit is written into the sampler's own latent. Otherwise only the prediction sees it.
    """

    sigmas: Sequence[float] = ()
    lookahead_calls: Sequence[int] = ()
    in_place: bool = False
    _calls: Counter[int] = field(default_factory=Counter)
    _lowest: float = float("inf")

    def is_due(self, sigma: torch.Tensor) -> bool:
        """Whether to edit now. Call it at every evaluation, because it counts them."""
        now = float(sigma.max())
        if not self.sigmas:
            below, self._lowest = now < self._lowest, min(now, self._lowest)
            return below
        at = min(range(len(self.sigmas)), key=lambda n: abs(self.sigmas[n] - now))
        if abs(self.sigmas[at] - now) > _SAME_SIGMA * self.sigmas[at]:
            return False
        self._calls[at] += 1
        return self._calls[at] == self.lookahead_calls[at] + 1

    def apply(self, x: torch.Tensor, edited: torch.Tensor) -> torch.Tensor:
        """The latent to predict at: the sampler's own, changed in place, or the edited one."""
        return x.copy_(edited) if self.in_place and edited is not x else edited


class LatentEdit:
    """Gradient steps on the latent of one sampling, inside a window of it. Each sampling needs a new object.

    A verb implements ``step``, and ``prepare`` if all steps before one prediction share something.

    Args:
        model: the host's model, loaded.
        window: first and last sampling percent (0 to 1); both belong to it.
        iterations: steps before one prediction.

    Attributes:
        percent: the sampling percent of the last edit.
    """

    percent = 0.0

    def __init__(
        self, model: BaseModel, schedule: EditSchedule, window: tuple[float, float], iterations: int = 1
    ) -> None:
        self.model, self.schedule, self.window, self.iterations = model, schedule, window, iterations

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, options: ModelOptions) -> torch.Tensor:
        """The latent to predict at, shaped like ``x``. Call it at every evaluation of the sampler."""
        is_due = self.schedule.is_due(sigma)
        percent = percent_of(self.model.model_sampling, float(sigma.max()))
        if not is_due or not self.window[0] <= percent <= self.window[1] or not self.prepare(sigma, options):
            return x
        self.percent, edited = percent, x
        for _ in range(self.iterations):
            edited = self.step(edited, sigma, options)
        return self.schedule.apply(x, edited)

    def prepare(self, sigma: torch.Tensor, options: ModelOptions) -> bool:
        """Runs before the steps of one prediction. False leaves the latent as it is."""
        return True

    def step(self, x: torch.Tensor, sigma: torch.Tensor, options: ModelOptions) -> torch.Tensor:
        """The latent after one gradient step; ``x`` itself stays as it is."""
        raise NotImplementedError


def edit_schedule_for(
    sampler: Sampler,
    sigmas: torch.Tensor,
    denoise_mask: torch.Tensor | None,
    model_sampling: ModelSampling,
    who: str,
    in_place: bool | None = None,
) -> EditSchedule:
    """When edits are due with this sampler.

    Args:
        who: the subject of a refusal or a message in the log.
        in_place: whether edits go into the sampler's own latent; None writes them where it keeps them.

    Raises:
        ValueError: a sampler that measures its own error: it would take an edit for one.
    """
    facts, options = facts_of(sampler_name(sampler)), getattr(sampler, "extra_options", None) or {}
    if facts.measures_error:
        raise ValueError(f"{who} cannot work with dpm_adaptive, which would take it for an error; use euler.")
    writes = _writes_in_place(facts, denoise_mask, who, in_place)
    if facts.own_levels or options.get("s_churn", 0.0) > 0:  # churn evaluates above each level
        return EditSchedule(in_place=writes)
    flow, function = isinstance(model_sampling, comfy.model_sampling.CONST), getattr(sampler, "sampler_function", None)
    passes = function.passes(model_sampling, sigmas) if isinstance(function, Travel) else None
    levels = [float(s) for s in sigmas if s > 0]
    calls = _calls_before(len(levels), facts.lookahead(options.get("eta", 1.0), flow), facts.corrects, passes)
    return EditSchedule(levels, calls, writes)


def _writes_in_place(facts: SamplerFacts, denoise_mask: torch.Tensor | None, who: str, in_place: bool | None) -> bool:
    """Whether edits go into the sampler's own latent. Logs it where they would be lost."""
    keeps_edits = facts.keeps_latent and denoise_mask is None
    if not keeps_edits and in_place is not False:
        log.info("%s acts on the predictions alone: with this sampler or an inpaint mask the latent is not kept.", who)
    return keeps_edits if in_place is None else in_place


def _calls_before(levels: int, lookahead: int, corrects: bool, passes: Sequence[int] | None) -> list[int]:
    """The lookahead calls per level; at the first level there are none.

    Where time travel repeats steps, ``passes`` times each, every pass of the step above evaluates at the level too. A
    sampler that corrects itself does so only within a run of steps, and each step of the window is a run by itself.
    """
    if passes is None:
        return [min(number, lookahead) for number in range(levels)]
    within = [above == below == 1 for above, below in pairwise(passes)]
    steps = zip(passes, (*within, 0), strict=True)
    return [0, *(lookahead * (inner if corrects else above) for above, inner in steps)]
