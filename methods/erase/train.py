"""The loop that trains an erasure: AdamW on low-rank factors, with a warm-up, a clip, a watch on both losses and an
early end.

The methods (``trained/``) and the host's side decide what is trained, and on what.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

import torch

from .lowrank import LowRank, total

LayerFactors = dict[str, LowRank]
"""The key of a weight in its model to what is added to it."""


class Losses(NamedTuple):
    """The two losses of an iteration, scalars on the graph: what must go, and what must not move."""

    erase: torch.Tensor
    preserve: torch.Tensor


LossFunction = Callable[[torch.Generator], Losses]
"""The losses of one iteration, whose random numbers come from the generator."""


class LossValues(NamedTuple):
    """Both losses as numbers."""

    erase: float
    preserve: float


class Ending(Enum):
    """Why a training ended, as the sentence of its report."""

    COMPLETE = "all {planned} iterations done"
    ERASED = "done after {done} iterations: the erase loss fell below {erased_below:.0%} of its start"
    DRIFTED = "stopped after {done} iterations: what must be kept moved more than the budget allows"
    CANCELLED = "cancelled after {done} iterations; the best adapter so far is kept"
    NOT_FINITE = (
        "a loss or gradient was not finite in iteration {next}; the adapter of the iteration before is "
        "kept (a lower rate, or a bf16 or fp32 model, avoids it)"
    )

    @property
    def keeps_best(self) -> bool:
        """Whether the best adapter is returned, not the last one."""
        return self in (Ending.DRIFTED, Ending.CANCELLED)


@dataclass(frozen=True)
class Schedule:
    """How long and how hard to train.

    Attributes:
        iterations: at most.
        rate: of AdamW, constant after the warm-up.
        preserve_weight: weight of the preserve loss, where the erase loss has 1.
        erased_below: end when the smoothed erase loss is below this share of its first value; 0 never ends early.
        max_drift: end when the smoothed preserve loss exceeds this share of the first erase loss, with the last adapter
            within it; infinity never ends early.
        surgery: remove the part of the erase gradient that works against the preserve gradient, layer by layer.
        min_iterations: before any early end.
        smoothing: share of the past in the smoothed losses. An early end needs smoothing^iterations below
            ``erased_below``.
        newest_is_best: whether the best adapter is the newest within ``max_drift``, not the one of the lowest loss. An
            adversary's loss does not say how far the erasing is.
    """

    iterations: int
    rate: float = 1e-3
    preserve_weight: float = 1.0
    erased_below: float = 0.0
    max_drift: float = math.inf
    surgery: bool = False
    warm_up: int = 10
    clip: float = 1.0
    min_iterations: int = 20
    smoothing: float = 0.95
    newest_is_best: bool = False


@dataclass
class Outcome:
    """What a training ends with: the factors (detached, on the CPU), both losses by iteration, and why it ended."""

    factors: LayerFactors
    erase: list[float] = field(default_factory=list)
    preserve: list[float] = field(default_factory=list)
    ending: Ending = Ending.COMPLETE
    reason: str = ""


@dataclass(frozen=True)
class LoopHooks:
    """What surrounds the iterations.

    Attributes:
        region: a context where gradients can be taken, entered for one iteration at a time.
        after_iteration: called outside of the region with the iteration and the outcome so far, to show progress.
        cancel_errors: what a cancel raises. After the first step it ends the training with the best adapter so far.
            Before it, it goes on to the caller, and so does every other error.
        loss_scale: factor of the losses on the way back; gradients are divided by it. It keeps those of a float16 model
            from vanishing. An overflow halves it and costs an iteration.
    """

    region: Callable[[], AbstractContextManager[None]] = nullcontext
    after_iteration: Callable[[int, Outcome], None] = lambda iteration, so_far: None
    cancel_errors: type[BaseException] | tuple[type[BaseException], ...] = ()
    loss_scale: float = 1.0


def new_factors(
    shapes: Mapping[str, tuple[int, int]], rank: int, seed: int, device: torch.device | str = "cpu"
) -> LayerFactors:
    """Fresh factors whose product is zero: ``down`` uniform as a linear layer starts, ``up`` zero; float32.

    Args:
        shapes: of the weights, (out, in), by key.
        rank: at most; a smaller layer gets its own size.
    """
    generator = torch.Generator().manual_seed(seed)
    made: LayerFactors = {}
    for key, (rows, columns) in sorted(shapes.items()):
        r = min(rank, rows, columns)
        down = (torch.rand(r, columns, generator=generator) * 2 - 1) * columns**-0.5
        made[key] = LowRank(torch.zeros(rows, r, device=device), down.to(device))
    return made


def copied(factors: LayerFactors, device: torch.device | str | None = None) -> LayerFactors:
    """A detached copy of ordinary tensors, on another device if one is given."""
    return {key: LowRank(*(t.detach().clone().to(device or t.device) for t in f)) for key, f in factors.items()}


def joined(first: LayerFactors, second: LayerFactors) -> LayerFactors:
    """Both changes as one: ranks add up, nothing is averaged. A resumed training trains both."""
    made = dict(first)
    for key, factor in second.items():
        made[key] = total(first[key], factor) if key in first else factor
    return made


def without_conflict(erase: torch.Tensor, preserve: torch.Tensor) -> torch.Tensor:
    """The gradient ``erase`` without its part against ``preserve`` (DoCo, 2405.15304, §3.4).

    a − (a·b/‖b‖²) b if a·b < 0, else a.
    """
    product, square = (erase * preserve).sum(), preserve.square().sum()
    return erase - product.clamp(max=0) / square.clamp(min=torch.finfo(preserve.dtype).tiny) * preserve


def train(
    factors: LayerFactors, losses_of: LossFunction, schedule: Schedule, seed: int, hooks: LoopHooks | None = None
) -> Outcome:
    """Trains the factors in place; the same seed gives the same bits on the same machine.

    Args:
        losses_of: called once per iteration inside the hooks' region, with a generator seeded by seed + iteration.
    """
    hooks = hooks or LoopHooks()
    run = _Run(factors, schedule, hooks.loss_scale)
    for iteration in range(schedule.iterations):
        try:
            with hooks.region():
                ending = run.iterate(losses_of(torch.Generator().manual_seed(seed + iteration)))
            hooks.after_iteration(iteration, run.outcome)
        except hooks.cancel_errors:
            if not run.outcome.erase:
                raise
            ending = Ending.CANCELLED
        if ending:
            return run.ended(ending)
    return run.ended(Ending.COMPLETE)


class _Run:
    """One training while it runs."""

    def __init__(self, factors: LayerFactors, schedule: Schedule, loss_scale: float) -> None:
        with torch.inference_mode(False):
            self.parameters = [t.requires_grad_(True) for factor in factors.values() for t in factor]
            self.optimiser = torch.optim.AdamW(self.parameters, lr=schedule.rate, weight_decay=0.0)
        self.factors, self.schedule, self.outcome = factors, schedule, Outcome({})
        self.best, self.lowest, self.scale = copied(factors), math.inf, loss_scale
        self.smooth: LossValues | None = None

    def iterate(self, losses: Losses) -> Ending | None:
        """One step; why to end, if so."""
        gradients = self._gradients(losses)
        norm = torch.stack([g.norm() for g in gradients]).norm()
        values = LossValues(*(float(t.detach()) for t in losses))
        finite, sound = math.isfinite(sum(values)), bool(torch.isfinite(norm))
        if finite and not sound and self.scale > 1:
            self.scale /= 2
            return None
        if not (finite and sound):
            return Ending.NOT_FINITE
        self._step(gradients, norm)
        self.outcome.erase.append(values.erase)
        self.outcome.preserve.append(values.preserve)
        return self._follow(values)

    def _step(self, gradients: list[torch.Tensor], norm: torch.Tensor) -> None:
        """One clipped step of AdamW at the rate of the warm-up."""
        scale = torch.clamp(self.schedule.clip / (norm + 1e-6), max=1.0)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient * scale
        done = len(self.outcome.erase)
        for group in self.optimiser.param_groups:
            group["lr"] = self.schedule.rate * min(1.0, (done + 1) / max(self.schedule.warm_up, 1))
        self.optimiser.step()

    def _gradients(self, losses: Losses) -> list[torch.Tensor]:
        schedule = self.schedule
        if not schedule.surgery:
            return self._gradient(losses.erase + schedule.preserve_weight * losses.preserve)
        preserve = self._gradient(losses.preserve, retain_graph=True)
        erase = self._gradient(losses.erase)
        pairs = zip(erase, preserve, strict=True)
        return [without_conflict(a, b) + schedule.preserve_weight * b for a, b in pairs]

    def _gradient(self, loss: torch.Tensor, retain_graph: bool = False) -> list[torch.Tensor]:
        """The gradient of every parameter, zero for one the loss does not reach."""
        if not loss.requires_grad:
            return [torch.zeros_like(p) for p in self.parameters]
        gradients = torch.autograd.grad(
            loss * self.scale, self.parameters, retain_graph=retain_graph, allow_unused=True
        )
        pairs = zip(gradients, self.parameters, strict=True)
        return [torch.zeros_like(p) if g is None else g / self.scale for g, p in pairs]

    def _follow(self, values: LossValues) -> Ending | None:
        """Smooths the losses and keeps the best adapter; why to end, if so."""
        self.smooth = smooth = self._smoothed(values)
        first, done, schedule = self.outcome.erase[0], len(self.outcome.erase), self.schedule
        drifted = smooth.preserve > schedule.max_drift * abs(first)
        if drifted and done >= schedule.min_iterations:
            return Ending.DRIFTED
        loss = smooth.erase + schedule.preserve_weight * smooth.preserve
        if not drifted and (schedule.newest_is_best or loss <= self.lowest):
            self.best, self.lowest = copied(self.factors), loss
        if done >= schedule.min_iterations and smooth.erase < schedule.erased_below * abs(first):
            return Ending.ERASED
        return None

    def _smoothed(self, values: LossValues) -> LossValues:
        """The moving averages with the newest values in them."""
        if self.smooth is None:
            return values
        share, before = self.schedule.smoothing, self.smooth
        return LossValues(
            before.erase * share + values.erase * (1 - share), before.preserve * share + values.preserve * (1 - share)
        )

    def ended(self, ending: Ending) -> Outcome:
        """The outcome, with the best or the last factors and the reason."""
        with torch.inference_mode(False):
            self.outcome.factors = copied(self.best if ending.keeps_best else self.factors, "cpu")
        done, schedule = len(self.outcome.erase), self.schedule
        self.outcome.ending = ending
        self.outcome.reason = ending.value.format(
            planned=schedule.iterations, done=done, next=done + 1, erased_below=schedule.erased_below
        )
        return self.outcome
