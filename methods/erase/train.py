"""The loop that trains an erasure: AdamW on low-rank factors, with a warm-up, a clip, a watch on both losses and an end in
time. What is trained and on what is the business of the methods (``trained/``) and of the host's side."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from .lowrank import LowRank, total

Factors = dict[str, LowRank]
"""The key of a weight in its model to what is added to it."""


class Terms(NamedTuple):
    """The two losses of an iteration, scalars on the graph: what must go, and what must not move."""

    erase: torch.Tensor
    preserve: torch.Tensor


TermsOf = Callable[[torch.Generator], Terms]


@dataclass(frozen=True)
class Schedule:
    """How long and how hard to train.

    Attributes:
        iterations: the most there may be.
        rate: of AdamW, constant after the warm-up.
        preserve_weight: what the preserve loss counts against the erase loss.
        enough: end when the smoothed erase loss is below this share of its first value; 0 never ends early.
        budget: end, with the last adapter that kept it, when the smoothed preserve loss exceeds this share of the first
            erase loss; infinity never does.
        surgery: take the part of the erase gradient away that works against the preserve gradient, layer by layer.
        least: no early end before so many iterations.
        smoothing: share of the past in the smoothed losses. An early end needs smoothing^iterations below ``enough``.
        newest: whether the newest adapter within the budget counts as the best one, not that of the lowest loss: what an
            adversary says does not tell how far the erasing is.
    """

    iterations: int
    rate: float = 1e-3
    preserve_weight: float = 1.0
    enough: float = 0.0
    budget: float = math.inf
    surgery: bool = False
    warm_up: int = 10
    clip: float = 1.0
    least: int = 20
    smoothing: float = 0.95
    newest: bool = False


@dataclass
class Outcome:
    """What a training ends with: the factors (detached, on the CPU), both losses by iteration, and why it ended."""

    factors: Factors
    erase: list[float] = field(default_factory=list)
    preserve: list[float] = field(default_factory=list)
    reason: str = ""


def new_factors(
    shapes: Mapping[str, tuple[int, int]], rank: int, seed: int, device: torch.device | str = "cpu"
) -> Factors:
    """Fresh factors whose product is zero: ``down`` uniform as a linear layer starts, ``up`` zero; float32.

    Args:
        shapes: of the weights, (out, in), by key.
        rank: at most; a smaller layer takes its own size.
    """
    generator = torch.Generator().manual_seed(seed)
    made: Factors = {}
    for key, (rows, columns) in sorted(shapes.items()):
        r = min(rank, rows, columns)
        down = (torch.rand(r, columns, generator=generator) * 2 - 1) * columns**-0.5
        made[key] = LowRank(torch.zeros(rows, r, device=device), down.to(device))
    return made


def copied(factors: Factors, device: torch.device | str | None = None) -> Factors:
    """A detached copy, ordinary tensors, on another device if one is named."""
    return {key: LowRank(*(t.detach().clone().to(device or t.device) for t in f)) for key, f in factors.items()}


def joined(first: Factors, second: Factors) -> Factors:
    """Both changes one after the other as one: ranks add up, nothing is averaged (a resumed training trains both)."""
    made = dict(first)
    for key, factor in second.items():
        made[key] = total(first[key], factor) if key in first else factor
    return made


def without_conflict(wanted: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """``wanted`` without its part against ``kept``: a − (a·b/‖b‖²) b where a·b < 0, a elsewhere (DoCo, 2405.15304, §3.4)."""
    product, square = (wanted * kept).sum(), kept.square().sum()
    return wanted - product.clamp(max=0) / square.clamp(min=torch.finfo(kept.dtype).tiny) * kept


def train(
    factors: Factors,
    terms_of: TermsOf,
    schedule: Schedule,
    seed: int,
    *,
    region: Callable[[], AbstractContextManager] = nullcontext,
    watch: Callable[[int, Outcome], None] = lambda iteration, so_far: None,
    cancelled: type[BaseException] | tuple[type[BaseException], ...] = (),
    loss_scale: float = 1.0,
) -> Outcome:
    """Trains the factors in place; the same seed gives the same bits on the same machine.

    Args:
        terms_of: called inside ``region`` once an iteration with a generator of its own, seed + iteration.
        region: where gradients can be taken; entered for one iteration at a time.
        watch: called outside of it after every iteration, to show progress.
        cancelled: what a cancel raises. After the first step it ends the training with the best adapter so far; before
            it, and every other error, goes on to the caller.
        loss_scale: what the losses are multiplied by on the way back and the gradients divided by, so that those of a
            float16 model do not vanish; halved, with an iteration lost, whenever it makes them overflow.
    """
    run = _Run(factors, schedule, loss_scale)
    for iteration in range(schedule.iterations):
        try:
            with region():
                reason = run.iterate(terms_of(torch.Generator().manual_seed(seed + iteration)))
            watch(iteration, run.outcome)
        except cancelled:
            if not run.outcome.erase:
                raise
            return run.ended(
                f"cancelled after {len(run.outcome.erase)} iterations; the best adapter so far is kept", run.best
            )
        if reason:
            return run.ended(reason, run.best if reason.startswith("stopped") else factors)
    return run.ended(f"all {schedule.iterations} iterations done", factors)


class _Run:
    """One training while it runs."""

    def __init__(self, factors: Factors, schedule: Schedule, loss_scale: float) -> None:
        with torch.inference_mode(False):
            self.parameters = [t.requires_grad_(True) for factor in factors.values() for t in factor]
            self.optimiser = torch.optim.AdamW(self.parameters, lr=schedule.rate, weight_decay=0.0)
        self.factors, self.schedule, self.outcome = factors, schedule, Outcome({})
        self.best, self.lowest, self.scale = copied(factors), math.inf, loss_scale
        self.smooth: Terms | None = None

    def iterate(self, terms: Terms) -> str:
        """One step; the reason to end, or nothing."""
        gradients = self._gradients(terms)
        norm = torch.stack([g.norm() for g in gradients]).norm()
        seen = [float(t.detach()) for t in terms]
        done = len(self.outcome.erase)
        finite, sound = math.isfinite(sum(seen)), bool(torch.isfinite(norm))
        if finite and not sound and self.scale > 1:
            self.scale /= 2
            return ""
        if not (finite and sound):
            return (
                f"a loss or gradient was not finite in iteration {done + 1}; the adapter of the iteration before is "
                "kept (a lower rate, or a bf16 or fp32 model, avoids it)"
            )
        scale = torch.clamp(self.schedule.clip / (norm + 1e-6), max=1.0)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient * scale
        for group in self.optimiser.param_groups:
            group["lr"] = self.schedule.rate * min(1.0, (done + 1) / max(self.schedule.warm_up, 1))
        self.optimiser.step()
        self.outcome.erase.append(seen[0])
        self.outcome.preserve.append(seen[1])
        return self._enough(*seen)

    def _gradients(self, terms: Terms) -> list[torch.Tensor]:
        schedule = self.schedule
        if not schedule.surgery:
            total = terms.erase + schedule.preserve_weight * terms.preserve
            return self._grad(total)
        kept = self._grad(terms.preserve, retain_graph=True)
        wanted = self._grad(terms.erase)
        return [
            without_conflict(a, b) + schedule.preserve_weight * b for a, b in zip(wanted, kept, strict=True)
        ]  # fmt: skip

    def _grad(self, loss: torch.Tensor, retain_graph: bool = False) -> list[torch.Tensor]:
        """The gradient of every parameter, zero for one the loss does not reach."""
        if not loss.requires_grad:
            return [torch.zeros_like(p) for p in self.parameters]
        found = torch.autograd.grad(
            loss * self.scale, self.parameters, retain_graph=retain_graph, allow_unused=True
        )  # fmt: skip
        pairs = zip(found, self.parameters, strict=True)
        return [torch.zeros_like(p) if g is None else g / self.scale for g, p in pairs]

    def _enough(self, erase: float, preserve: float) -> str:
        """Follows the smoothed losses, and keeps the best adapter; the reason to end, if there is one."""
        before, share = self.smooth, self.schedule.smoothing
        self.smooth = (
            Terms(erase, preserve) if before is None else Terms(  # type: ignore[arg-type]
                before.erase * share + erase * (1 - share), before.preserve * share + preserve * (1 - share)
            )
        )  # fmt: skip
        e, p = float(self.smooth.erase), float(self.smooth.preserve)
        first, done, schedule = self.outcome.erase[0], len(self.outcome.erase), self.schedule
        over = p > schedule.budget * abs(first)
        if over and done >= schedule.least:
            return f"stopped after {done} iterations: what must be kept moved more than the budget allows"
        loss = e + schedule.preserve_weight * p
        if not over and (schedule.newest or loss <= self.lowest):
            self.best, self.lowest = copied(self.factors), loss
        if done >= schedule.least and e < schedule.enough * abs(first):
            return f"done after {done} iterations: the erase loss fell below {schedule.enough:.0%} of its start"
        return ""

    def ended(self, reason: str, factors: Factors) -> Outcome:
        with torch.inference_mode(False):
            self.outcome.factors = copied(factors, "cpu")
        self.outcome.reason = reason
        return self.outcome
