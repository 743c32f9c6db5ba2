"""The solvers by name."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..choices import chosen
from . import rece
from .double_projections import double_projections
from .lowrank import LowRank
from .null_space import null_space
from .problem import Problem, Solution, Solver, SolverSettings
from .realera import realera
from .rows import joined_rows
from .solve import scaled_ridge, system, uce
from .speed import speed


def _uce(problem: Problem, settings: SolverSettings) -> Solution:
    rows = joined_rows(problem.erased)
    given = (rows, *problem.preserved_terms(settings.preserve_weight or 0, scaled_ridge(settings.ridge or 0, rows.C)))
    return Solution(uce(*given), system(*given))


SOLVERS: dict[str, Solver] = {
    "uce": Solver(_uce, 0.5, 1.0, "one solve (UCE)"),
    # rece's preserve weight: at 10 learned words bring the concept back far more often, below 6 others suffer
    "rece": Solver(
        rece.cumulative,
        0.1,
        6.0,
        "also erases what would bring the concept back (RECE, all epochs together)",
        every_weight=True,
    ),
    "rece-sequential": Solver(
        rece.sequential, 0.1, 0.1, "RECE epoch on epoch, in the published order", every_weight=True
    ),
    "rece-published": Solver(
        rece.sequential,
        0.1,
        0.1,
        "rece-sequential on the published rows: neither the empty prompt nor end tokens are held",
        every_weight=True,
        published_rows=True,
    ),
    "realera": Solver(realera, 0.5, 1.0, "also erases the concept's neighbourhood (RealEra-style)"),
    "null-space": Solver(
        null_space,
        0.05,
        1.0,
        "changes only what the preserved prompts do not use, for many concepts",
        averages=False,
    ),
    "double-projections": Solver(
        double_projections,
        0.5,
        1.0,
        "takes each concept to a proxy in its anchor's span and moves no preserved row (Double Projections)",
        averages=False,
    ),
    "speed": Solver(
        speed,
        0.05,
        1.0,
        "null-space, of those preserved prompts that the erasure would move most (SPEED)",
        every_weight=True,
        averages=False,
    ),
}
"""To add a solver, write a function (Problem, SolverSettings) -> Solution and a line here; all tests run over it."""


def _zero_solution(d: int) -> Solution:
    """M = 0, exactly, for any solver: every concept equals its anchor.

    Without this, what rece finds in later epochs and the neighbours of the concept would still move.
    """
    none = torch.zeros(d, 0, dtype=torch.float64)
    return Solution(LowRank(none, none.T), torch.eye(d, dtype=torch.float64))


def solve(name: str, problem: Problem, settings: SolverSettings = SolverSettings()) -> Solution:  # noqa: B008  frozen
    """Solves with the named solver. Settings that are None take the solver's own values.

    Raises:
        ValueError: there is no such solver.
    """
    solver = chosen(SOLVERS, name, "solver")
    if problem.erased and not any((r.C != r.G).any() for r in problem.erased):
        return _zero_solution(problem.width)
    ridge = solver.ridge if settings.ridge is None else settings.ridge
    preserve_weight = solver.preserve_weight if settings.preserve_weight is None else settings.preserve_weight
    solution = solver.solve(problem, replace(settings, ridge=ridge, preserve_weight=preserve_weight))
    if problem.statistics is None or solver.averages:
        return solution
    return replace(solution, notes=(*solution.notes, f"{name} does not read Preserve Captions; uce and rece do"))
