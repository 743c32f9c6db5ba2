"""What a sampler does with the latents at which it asks: it samples single numbers beforehand, with a model that has
no network.

Names and options of samplers say too little. Some ask at the next noise level of the schedule and throw that latent
away, some go on with a prediction alone, some have noise levels of their own.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Collection, Sequence
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import torch

from ..types import ModelOptions, ModelSampling, Options, Sampler
from .sampling import signal_and_noise

log = logging.getLogger(__name__)

SAME_LEVEL = 1e-3  # relative; for flow models some samplers lower the first level by less
_Function = Callable[..., torch.Tensor]
"""A sampler's function in k-diffusion's form."""

_NUDGE = 1e8  # far above any noise that a sampler draws
_KEPT = 1e-4  # the share of a change that says it was kept; rounding stays below
_UNKNOWN = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What another pack's sampler may raise if it asks its model for more than a prediction."""
_NO_SIGNAL = 1e-2  # for the first level of flow models, which has none


class Level(NamedTuple):
    """A noise level, and the evaluations at it before the one at the latent that the sampler goes on with."""

    sigma: float
    calls_before: int


class Rehearsal(NamedTuple):
    """The levels in the order of the sampling, and whether changes of the sampler's own latent last."""

    levels: list[Level]
    keeps_latent: bool


class _Call(NamedTuple):
    """One evaluation: its level, and how much of a change is in the result.

    ``in_place`` counts a change of the latent and so of the prediction, ``predicted`` one of the prediction alone.
    """

    sigma: float
    in_place: float
    predicted: float

    @property
    def is_kept(self) -> bool:
        """Whether the sampler goes on with this latent: it then counts by itself, towards the picture."""
        return self.in_place - self.predicted > _KEPT


def rehearse(sampler: Sampler, sigmas: torch.Tensor, model_sampling: ModelSampling) -> Rehearsal | None:
    """How the sampler goes about this schedule; None for one that cannot be tried without a network."""
    function: _Function | None = getattr(sampler, "sampler_function", None)
    if function is None or len(sigmas) < 2:
        return None
    sample = partial(_run, function, sampler.extra_options, sigmas, model_sampling)
    try:
        model = sample(len(sample(0).sigmas))
    except _UNKNOWN as error:
        log.info("The sampler cannot be rehearsed (%s): the first evaluation at each level counts.", error)
        return None
    return _summary(model.calls(float(sigmas[-1])), model.steps)


class _Model:
    """Stands in for the model of a sampler's function.

    It sees no noise in a latent, so a change stays in it. Row n of the batch is changed at evaluation n, in the latent
    and so in the prediction; row ``rows`` + n in the prediction alone.
    """

    def __init__(self, model_sampling: ModelSampling, rows: int) -> None:
        self.model_sampling, self.rows = model_sampling, rows
        patcher = SimpleNamespace(get_model_object=lambda name: getattr(self, name))
        self.inner_model = SimpleNamespace(model_patcher=patcher, inner_model=self, model_sampling=model_sampling)
        self.sigmas: list[float] = []
        self.steps: list[int] = []
        self.result = torch.zeros(0)

    def __call__(
        self, x: torch.Tensor, sigma: torch.Tensor, model_options: ModelOptions | None = None, **_: object
    ) -> torch.Tensor:
        number = len(self.sigmas)
        self.sigmas.append(float(sigma.max()))
        signal = self._signal(self.sigmas[-1])
        if number < self.rows:
            x[number] += _NUDGE * signal
        denoised = x / signal
        if number < self.rows:
            denoised[self.rows + number] += _NUDGE
        for function in (model_options or {}).get("sampler_post_cfg_function", []):  # samplers read the negative there
            denoised = function({"denoised": denoised, "cond_denoised": denoised, "uncond_denoised": denoised})
        return denoised

    def on_step(self, _: Options) -> None:
        """The sampler's callback, which follows the first evaluation of a step."""
        self.steps.append(len(self.sigmas) - 1)

    def calls(self, last_sigma: float) -> list[_Call]:
        """What came of each evaluation."""
        shares = (self.result.flatten() / (_NUDGE * self._signal(last_sigma))).tolist()
        return [_Call(sigma, shares[n], shares[self.rows + n]) for n, sigma in enumerate(self.sigmas)]

    def _signal(self, sigma: float) -> float:
        return max(signal_and_noise(self.model_sampling, sigma)[0], _NO_SIGNAL)


def _run(function: _Function, given: Options, sigmas: torch.Tensor, model_sampling: ModelSampling, rows: int) -> _Model:
    """One sampling of two numbers per evaluation, or of one if there are no rows yet."""
    model = _Model(model_sampling, rows)
    latent, schedule = torch.zeros(2 * rows or 1, 1, 1, 1), sigmas.detach().float().cpu().clone()
    args, options = {"model_options": {}, "seed": 0}, dict(given)
    if "noise_sampler" in _parameters(function):
        options["noise_sampler"] = lambda *_: torch.zeros_like(latent)  # a Brownian tree takes long
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        model.result = function(
            model, latent, schedule, extra_args=args, callback=model.on_step, disable=True, **options
        )
    return model


def _parameters(function: _Function) -> Collection[str]:
    """The names of what a sampler's function takes. (A travelling one hands all on to the function inside it.)"""
    return inspect.signature(getattr(function, "function", function)).parameters


def _summary(calls: Sequence[_Call], steps: Sequence[int]) -> Rehearsal:
    """Per step the evaluation at the latent that is kept; where levels repeat, the first step that keeps one."""
    chosen: list[int] = []
    for first, last in zip(_begins(calls, steps), [*_begins(calls, steps)[1:], len(calls)], strict=True):
        best = _kept(calls, range(first, last))
        at = next((n for n, other in enumerate(chosen) if _is_level(calls[best], calls[other].sigma)), None)
        if at is None:
            chosen.append(best)
        else:
            chosen[at] = _kept(calls, (chosen[at], best))
    levels = [Level(calls[n].sigma, sum(_is_level(c, calls[n].sigma) for c in calls[:n])) for n in chosen]
    followed = [calls[n].is_kept for n in chosen[:-1]]  # nothing follows the last level
    return Rehearsal(levels, sum(followed) >= len(followed) / 2)


def _begins(calls: Sequence[_Call], steps: Sequence[int]) -> list[int]:
    """The first evaluation of each step. A sampler that tells of none begins one wherever it keeps the latent; one that
    keeps none, at every evaluation."""
    kept = [n for n, call in enumerate(calls) if call.is_kept] or range(len(calls))
    return list(dict.fromkeys([0, *steps] if steps else [0, *kept, len(calls) - 1]))


def _kept(calls: Sequence[_Call], numbers: Sequence[int]) -> int:
    """The first of these evaluations at a latent that is kept, or the one at their level where a change counts most."""
    first = [n for n in numbers if _is_level(calls[n], calls[numbers[0]].sigma)]
    return next((n for n in numbers if calls[n].is_kept), max(first, key=lambda n: abs(calls[n].in_place)))


def _is_level(call: _Call, sigma: float) -> bool:
    return abs(call.sigma - sigma) <= SAME_LEVEL * sigma
