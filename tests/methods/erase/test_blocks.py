"""Problems of several encoders as one, and wide ones in the coordinates of their own rows."""

from __future__ import annotations

import pytest
import torch
from comfyui_concepts.methods.erase.blocks import joined_problems, within_span
from comfyui_concepts.methods.erase.diagnose import measure
from comfyui_concepts.methods.erase.problem import Problem, SolverSettings
from comfyui_concepts.methods.erase.rows import RowPairs
from comfyui_concepts.methods.erase.solvers import SOLVERS, solve
from comfyui_concepts.methods.erase.truncate import AUTOMATIC, shortened_solution

D, OUT = 96, 40


def a_problem(seed: int = 0) -> Problem:
    g = torch.Generator().manual_seed(seed)

    def rows(count):
        return torch.randn(count, D, generator=g, dtype=torch.float64) + 1

    erased = tuple(RowPairs(rows(n), rows(n), torch.full((n,), 1 / n).double()) for n in (12, 3))
    variants = tuple((rows(2), torch.zeros(2, dtype=torch.long)) for _ in erased)
    kept = rows(9)
    return Problem(erased, kept, torch.ones(9).double(), rows(5), None, variants, labels=("a",) * 9, held=("b",) * 9)


def weights() -> torch.Tensor:
    return torch.randn(OUT, D, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def results(problem: Problem, solver: str, W: torch.Tensor, size: float | None = None):
    problem = problem._replace(energy=W.T @ W)
    solution = solve(solver, problem, SolverSettings())
    short = shortened_solution(solution, problem.Q(), AUTOMATIC)
    return solution.M, short.M, measure(problem, ["a", "b"], solution, short, margins=False, size=size)


@pytest.mark.parametrize("solver", ["uce", "null-space", "double-projections", "realera"])
def test_a_wide_problem_is_solved_in_the_coordinates_of_its_rows_as_it_is_in_full(solver):
    problem, W = a_problem(), weights()
    M, short, report = results(problem, solver, W)
    within = within_span(problem)
    assert within.basis.shape == (D, 9 + 5 + 4 + 30)
    lifted, lifted_short, lifted_report = results(within.problem, solver, W @ within.basis, float(W.square().sum()))
    torch.testing.assert_close(within.lifted(lifted).matrix(), M.matrix(), rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(W @ within.lifted(lifted_short).matrix(), W @ short.matrix(), rtol=1e-5, atol=1e-6)
    for one, other in zip(lifted_report["concepts"], report["concepts"], strict=True):
        assert one["left"] == pytest.approx(other["left"], abs=2e-5)
    assert lifted_report["change"] == pytest.approx(report["change"], abs=2e-5)
    assert lifted_report["notes"] == report["notes"]


@pytest.mark.parametrize("solver", [name for name, solver in SOLVERS.items() if solver.every_weight])
def test_solvers_that_look_for_embeddings_look_among_what_the_rows_span(solver):
    within = within_span(a_problem())
    M, *_ = results(within.problem, solver, weights() @ within.basis, 1.0)
    assert torch.isfinite(within.lifted(M).matrix()).all()
    assert M.matrix().any()


def test_captions_hold_what_the_rows_span_and_nothing_else_moves():
    """In the span the solve is that of the captions' part in it: the plainest form of the restriction."""
    problem = a_problem()
    captions = torch.randn(20, D, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    within = within_span(problem._replace(statistics=captions.T @ captions))
    part = captions @ within.basis
    torch.testing.assert_close(within.problem.statistics, part.T @ part, rtol=1e-9, atol=1e-9)
    listed = within.problem._replace(
        statistics=None,
        preserved=torch.cat([within.problem.preserved, part]),
        preserved_weights=torch.cat([problem.preserved_weights.double(), torch.ones(20, dtype=torch.float64)]),
    )
    maps = [within.lifted(solve("uce", some).M).matrix() for some in (within.problem, listed)]
    torch.testing.assert_close(*maps, rtol=1e-8, atol=1e-10)
    outside = torch.eye(D, dtype=torch.float64) - within.basis @ within.basis.T
    assert float((maps[0] @ outside).abs().max()) <= 1e-10


def test_two_encoders_share_the_captions_sum():
    first, second = (a_problem(seed)._replace(statistics=torch.eye(D, dtype=torch.float64) * seed) for seed in (1, 2))
    assert torch.equal(joined_problems([first, second]).statistics, 3 * torch.eye(D, dtype=torch.float64))
    assert joined_problems([a_problem(1), a_problem(2)]).statistics is None


def test_rows_of_two_encoders_make_one_problem_and_its_variants_vary_their_own_rows():
    first, second = a_problem(1), a_problem(2)
    both = joined_problems([first, second])
    assert [len(rows) for rows in both.erased] == [24, 6]
    assert both.preserved.shape == (18, D)
    assert len(both.labels) == len(both.held) == 18
    rows, numbers = both.variants[0]
    assert torch.equal(both.erased[0].C[numbers[2]], second.erased[0].C[0])
    assert torch.equal(rows[2:], second.variants[0][0])
    assert joined_problems([first]) is first
