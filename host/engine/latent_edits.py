"""Edits of a sampler's latent before a prediction: gradient steps, and when they are due.

An edit is due once per noise level, at the latent that the sampler goes on with. A second-order sampler also evaluates
latents that it throws away: between the levels of its schedule (dpm_2, dpmpp_sde), or at the next level before it gets
there (heun). Editing those latents has no effect, and the one that is kept would be missed. A rehearsal tells them
apart.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ..types import BaseModel, ModelOptions, ModelSampling, Sampler
from .rehearsal import SAME_LEVEL, Level, Rehearsal, rehearse
from .sampling import measures_error, percent_of, sampler_name

log = logging.getLogger(__name__)


@dataclass(eq=False)
class EditSchedule:
    """Says at each evaluation of one sampling whether an edit is due. Each sampling needs a new one.

    Args:
        levels: the noise levels at which edits are due, once each. Without any, every level below all earlier ones.
        in_place: whether an edit is written into the sampler's own latent. Otherwise only the prediction sees it.
    """

    levels: Sequence[Level] = ()
    in_place: bool = False
    _calls: Counter[int] = field(default_factory=Counter)
    _lowest: float = float("inf")

    def is_due(self, sigma: torch.Tensor) -> bool:
        """Whether to edit now. Call it at every evaluation, because it counts them."""
        now = float(sigma.max())
        if not self.levels:
            below, self._lowest = now < self._lowest, min(now, self._lowest)
            return below
        at = min(range(len(self.levels)), key=lambda n: abs(self.levels[n].sigma - now))
        if abs(self.levels[at].sigma - now) > SAME_LEVEL * self.levels[at].sigma:
            return False
        self._calls[at] += 1
        return self._calls[at] == self.levels[at].calls_before + 1

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
    if measures_error(sampler_name(sampler)):
        raise ValueError(f"{who} cannot work with dpm_adaptive, which would take it for an error; use euler.")
    rehearsal = rehearse(sampler, sigmas, model_sampling)
    if rehearsal is None:
        rehearsal = Rehearsal([Level(float(sigma), 0) for sigma in sigmas if sigma > 0], keeps_latent=True)
    return EditSchedule(rehearsal.levels, _writes_in_place(rehearsal.keeps_latent, denoise_mask, who, in_place))


def _writes_in_place(keeps_latent: bool, denoise_mask: torch.Tensor | None, who: str, in_place: bool | None) -> bool:
    """Whether edits go into the sampler's own latent. Logs it where they would be lost."""
    keeps_edits = keeps_latent and denoise_mask is None
    if not keeps_edits and in_place is not False:
        log.info("%s acts on the predictions alone: with this sampler or an inpaint mask the latent is not kept.", who)
    return keeps_edits if in_place is None else in_place
