"""When an edit of a sampler's latent is due: once at each noise level, on the latent that the sampler goes on with.

A sampler of second order also asks at latents that it throws away: between the levels of its schedule (dpm_2, dpmpp_sde), or at
the next level before it gets there (heun). An edit of those is work for nothing, and the latent that counts would go without.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import comfy.model_sampling
import torch

from .time_travel import Travel, name_of

log = logging.getLogger(__name__)

_ADAPTIVE = "dpm_adaptive"
_FORGETFUL = ("unipc", "uni_pc", "lcm", "dpm_fast", "sa_solver")  # they go on with a latent of their own
_CORRECTED = "sa_solver_pece"  # asks again at the corrected latent, and goes on with that
_OWN_LEVELS = "dpm_fast"
_SAME = 1e-3  # relative; for flow models some samplers lower the first level by less


@dataclass(eq=False)
class Once:
    """Tells, at each question of one sampling, whether an edit is due; made anew for each.

    Args:
        levels: the schedule's noise levels. Without any, each level below all before is one.
        trials: how many questions at each of them come before the one at the latent that lasts.
        lasting: whether an edit of the sampler's own latent stays; otherwise only the prediction sees it.
    """

    levels: Sequence[float] = ()
    trials: Sequence[int] = ()
    lasting: bool = False
    _asked: Counter[int] = field(default_factory=Counter)
    _lowest: float = float("inf")

    def due(self, sigma: torch.Tensor) -> bool:
        """To be asked at every question of the sampler, for it counts them."""
        level = float(sigma.max())
        if not self.levels:
            below, self._lowest = level < self._lowest, min(level, self._lowest)
            return below
        at = min(range(len(self.levels)), key=lambda n: abs(self.levels[n] - level))
        if abs(self.levels[at] - level) > _SAME * self.levels[at]:
            return False
        self._asked[at] += 1
        return self._asked[at] == self.trials[at] + 1

    def kept(self, x: torch.Tensor, edited: torch.Tensor) -> torch.Tensor:
        """The latent to predict at; where edits last, it is the sampler's own."""
        return x.copy_(edited) if self.lasting and edited is not x else edited


def once_for(
    sampler: Any, sigmas: torch.Tensor, denoise_mask: torch.Tensor | None, model_sampling: Any, who: str,
    wanted: bool | None = None,
) -> Once:  # fmt: skip
    """When edits are due with this sampler; says so in the log where they do not last.

    Args:
        wanted: whether edits shall be written into the sampler's own latent; None is where it keeps them.

    Raises:
        ValueError: a sampler that measures its own error, which an edit would look like.
    """
    function = getattr(sampler, "sampler_function", None)
    travel = function if isinstance(function, Travel) else None
    name = name_of(sampler)
    if _ADAPTIVE in name:
        raise ValueError(f"{who} cannot work with dpm_adaptive, which would take it for an error; use euler.")
    forgets = _CORRECTED not in name and any(word in name for word in _FORGETFUL)
    kept = denoise_mask is None and not forgets
    lasting = kept if wanted is None else wanted
    if not kept and wanted is not False:
        log.info("%s acts on the predictions alone: with this sampler or an inpaint mask the latent is not kept.", who)
    options = getattr(sampler, "extra_options", None) or {}
    if options.get("s_churn", 0.0) > 0 or _OWN_LEVELS in name:  # churn asks above each level
        return Once(lasting=lasting)
    most = _trials(name, options.get("eta", 1.0), isinstance(model_sampling, comfy.model_sampling.CONST))
    levels = [float(s) for s in sigmas if s > 0]
    if travel:
        return Once(levels, _travelled(travel.passes(model_sampling, sigmas), most, _CORRECTED in name), lasting)
    return Once(levels, [min(number, most) for number in range(len(levels))], lasting)


def _travelled(passes: Sequence[int], most: int, corrected: bool) -> list[int]:
    """The trials at each level where steps are taken again, ``passes`` of each: every pass of the step above asks at the level
    too. One that asks again where it corrects itself does so within a run of steps alone, and a step of the window is its own.
    """
    within = [above == below == 1 for above, below in pairwise(passes)]
    return [0, *(most * (inner if corrected else above) for above, inner in zip(passes, (*within, 0), strict=True))]


def _trials(name: str, eta: float, flow: bool) -> int:
    """How often the host's sampler of that name asks at a level before its latent gets there; at the first, it never does.

    The middle of an ancestral step at eta 1 is the next level: σ_down is then σ'² / σ, and √(σ σ_down) is σ'. For flow models
    the 2S form has its middle elsewhere.
    """
    if "heunpp2" in name:
        return 2
    middle = "dpm_2_ancestral" in name or ("dpmpp_2s_ancestral" in name and not (flow and not name.endswith("cfg_pp")))
    return int(name == "sample_heun" or "exp_heun" in name or _CORRECTED in name or (middle and eta == 1))
