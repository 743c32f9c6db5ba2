"""The loss of what must not move: '' along the concept's trajectories, and preserved prompts along their own."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .context import UNetContext, teacher_predictions
from .prompts import EncodedPrompts, stacked
from .trajectories import States, concat_states


class PreservedRows(NamedTuple):
    """States that must not move, their prompts, and the teacher's predictions there."""

    states: States
    prompts: EncodedPrompts
    target: torch.Tensor


class PreservationLoss:
    """The drift on rows that must not move, from the teacher's predictions made once.

    Args:
        count: rows per iteration, one of them ''. A single row is either '' or a preserved prompt, at random.
    """

    def __init__(self, context: UNetContext, count: int) -> None:
        self.context, self.count = context, count
        trajectories, empty = context.trajectories, context.prompts.empty
        self.empty = teacher_predictions(context, trajectories.concept, lambda states: [empty])[0]
        self.preserved, self.predictions = trajectories.preserved, torch.empty(0)
        if self.preserved is not None:
            prompts = self.preserved.prompts
            self.predictions = teacher_predictions(
                context, self.preserved.bank, lambda states: [prompts.at(states.prompt)]
            )[0]

    def draw(self, near: States, generator: torch.Generator) -> PreservedRows:
        """Rows for one iteration: '' at the first state of ``near``, and random states of preserved prompts."""
        first = near.part(slice(0, 1))
        empty = PreservedRows(first, self.context.prompts.empty, self.empty[first.position])
        single = self.count < 2
        if self.preserved is None or (single and coin_flip(generator)):
            return empty
        states = self.preserved.bank.draw(max(self.count - 1, 1), generator, self.context.device)
        others = PreservedRows(states, self.preserved.prompts.at(states.prompt), self.predictions[states.position])
        if single:
            return others
        return PreservedRows(
            concat_states(first, states),
            stacked([empty.prompts, others.prompts]),
            torch.cat([empty.target, others.target]),
        )

    def student(
        self, states: States, prompts: EncodedPrompts, generator: torch.Generator, near: States | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The student's predictions for ``prompts`` (one row each) at ``states``, and its mean square drift.

        Both come from one model call. ``near`` are states of the concept's bank, needed if ``states`` are of another.
        """
        preserved = self.draw(near or states, generator)
        all_states = concat_states(states, preserved.states)
        (prediction,) = self.context.student(all_states, [stacked([prompts, preserved.prompts])])
        rows = len(states.x)
        return prediction[:rows], mean_square(prediction[rows:], preserved.target.to(prediction))


def coin_flip(generator: torch.Generator) -> bool:
    """True or False, with equal chance."""
    return bool(torch.rand((), generator=generator) < 0.5)


def mean_square(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The mean square error, in float32 whatever the model computes in."""
    return (prediction.float() - target.float()).square().mean()
