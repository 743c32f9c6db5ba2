"""What every solver is given, and what it answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from .lowrank import LowRank
from .rows import RowPairs


class Problem(NamedTuple):
    """Rows to erase, one set a concept, and rows to keep (m, d) with weights (m,).

    ``energy`` is Q = Σ WᵀW over the edited weights, (d, d); without it every direction of the embedding counts the same.
    ``empty`` is the empty prompt's token rows (positions, d). ``variants`` holds for each concept rows (k, d) of other names and
    sentences, and for each of them which row of the concept it stands for (k,). ``labels`` says for each kept row which prompt it is of.
    """

    erased: tuple[RowPairs, ...]
    preserved: torch.Tensor
    preserved_weights: torch.Tensor
    empty: torch.Tensor
    energy: torch.Tensor | None = None
    variants: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()
    statistics: torch.Tensor | None = None
    labels: tuple[str, ...] = ()

    @property
    def width(self) -> int:
        return self.preserved.shape[1]

    def Q(self) -> torch.Tensor:
        """The energy, or the identity, in float64."""
        return torch.eye(self.width, dtype=torch.float64) if self.energy is None else self.energy.double()


@dataclass(frozen=True)
class SolverSettings:
    """What a person may turn. None is the solver's own value (``Solver``).

    ``ridge`` is λ of the erasure; ``preserve_weight`` multiplies the weight of everything kept, except in the null space; ``epochs`` and
    ``regeneration`` (λ of the embedding that brings the concept back) are RECE's; ``neighbours``, ``reach`` and ``seed``
    RealEra's; ``threshold`` is the null space's.
    """

    ridge: float | None = None
    preserve_weight: float | None = None
    epochs: int = 3
    regeneration: float = 0.1
    neighbours: int = 16
    reach: float = 1.0
    threshold: float = 0.1
    seed: int = 0


@dataclass(frozen=True)
class Solution:
    """M of T = I + M with the A of its last solve, and for RECE the regeneration residual before each epoch and at the end."""

    M: LowRank
    A: torch.Tensor
    regeneration: tuple[float, ...] = ()
    notes: tuple[str, ...] = field(default=())


class Solver(NamedTuple):
    """A way to solve a problem, with its own ridge and weight of what is kept."""

    solve: Callable[[Problem, SolverSettings], Solution]
    ridge: float
    preserve_weight: float
    about: str
