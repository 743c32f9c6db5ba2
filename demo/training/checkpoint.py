"""What a training saves to be resumed: its tensors and how long it has worked."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

SAVE_EVERY = 1.0  # minutes


def write(path: Path, tensors: dict[str, torch.Tensor], **numbers: float) -> None:
    """Writes a checkpoint in one move: a kill in the middle leaves the last one whole."""
    part = path.with_name(f"{path.name}.part")
    save_file(
        {name: tensor.detach().contiguous() for name, tensor in tensors.items()}, part, {"at": json.dumps(numbers)}
    )
    part.replace(path)


def read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """The tensors and numbers of a checkpoint; both empty where there is none."""
    if not path.exists():
        return {}, {}
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["at"])  # noqa: SIM118


class Training:
    """A training of so many minutes in all, over any number of runs.

    Every run but the first begins with the tensors the last one wrote, at its place in the schedule. The optimiser's
    moments are not kept: the warm-up, which counts the steps of this run, covers for them.

    Attributes:
        tensors: what the last run wrote, empty at the first.
        steps: steps made in all, which also seed what is drawn: no run repeats the examples of another.
    """

    def __init__(self, path: Path, minutes: float) -> None:
        self.path, self.minutes = path, minutes
        self.tensors, at = read(path)
        self.steps = self._earlier = int(at.get("steps", 0))
        self._saved = at.get("minutes", 0.0)
        self._started = time.monotonic() - self._saved * 60

    @property
    def spent(self) -> float:
        """Minutes worked in all, the pauses between runs left out."""
        return (time.monotonic() - self._started) / 60

    @property
    def done(self) -> float:
        """Share of the minutes worked, 0 to 1."""
        return min(1.0, self.spent / self.minutes) if self.minutes > 0 else 1.0

    def warm_up(self, steps: int) -> float:
        """Share of the learning rate, rising to 1 over the first steps of this run."""
        return min(1.0, (self.steps - self._earlier + 1) / steps)

    def step(self) -> bool:
        """Counts a step; true when it is time to ``keep`` the tensors."""
        self.steps += 1
        return self.spent - self._saved >= SAVE_EVERY

    def keep(self, tensors: dict[str, torch.Tensor]) -> None:
        """Writes the checkpoint."""
        self._saved = self.spent
        write(self.path, tensors, minutes=self._saved, steps=self.steps)


class CountedTraining(Training):
    """A training of so many steps in all, over any number of runs.

    It keeps the optimisers' moments too. One that was stopped ends, bit for bit, as one that was not.
    """

    def __init__(self, path: Path, total: int) -> None:
        super().__init__(path, math.inf)
        self.total = total

    @property
    def done(self) -> float:
        """Share of the steps made, 0 to 1."""
        return min(1.0, self.steps / self.total) if self.total > 0 else 1.0
