"""When the gradient steps of a run end, per picture."""

from __future__ import annotations

import torch

_LEAST, _PATIENCE, _FALL = 5, 3, 0.01


class StopRule:
    """Says after every step which pictures go on.

    ``patience`` ends when the best loss has not fallen by 1 % over some steps. The losses of neighbouring steps belong
    to different sigmas, so one rise says little. ``rise`` ends at the first rise, as in the reference.
    """

    def __init__(self, rule: str) -> None:
        self.rule, self.count = rule, 0
        self.before: torch.Tensor | None = None
        self.best: torch.Tensor | None = None
        self.idle: torch.Tensor | None = None

    def goes_on(self, losses: torch.Tensor) -> torch.Tensor:
        """(batch,) of bool, from the losses (batch,) at the step that is being taken."""
        going = torch.ones_like(losses, dtype=torch.bool)
        if self.before is not None and self.best is not None and self.idle is not None:
            fell = losses < self.best * (1 - _FALL)
            self.idle = torch.where(fell, 0, self.idle + 1)
            if self.count >= _LEAST and self.rule == "rise":
                going = losses <= self.before
            elif self.count >= _LEAST and self.rule == "patience":
                going = self.idle < _PATIENCE
            self.best = torch.minimum(self.best, losses)
        else:
            self.best, self.idle = losses, torch.zeros_like(losses, dtype=torch.long)
        self.before, self.count = losses, self.count + 1
        return going
