"""SPEED's refinement: which preserved rows count, which neighbours join them, and what stays exactly."""

import importlib.util
from pathlib import Path

import pytest
import torch
from comfyui_concepts.methods.erase.null_space import fixed_rows
from comfyui_concepts.methods.erase.regenerate import map_of, row_energy
from comfyui_concepts.methods.erase.rows import joined_rows
from comfyui_concepts.methods.erase.solve import gram
from comfyui_concepts.methods.erase.solvers import solve
from comfyui_concepts.methods.erase.speed import refined_gram

_spec = importlib.util.spec_from_file_location("erase_cases", Path(__file__).with_name("erase_cases.py"))
cases = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cases)

D = 64


@pytest.fixture(scope="module")
def problem():
    """Three concepts, and 108 preserved rows of unequal weight."""
    made = cases.problem(6, D, kept=100)
    weights = torch.linspace(0.5, 1.5, len(made.preserved), dtype=torch.float64)
    return made._replace(preserved_weights=weights)


def test_the_refined_rows_are_the_papers(problem):
    """Row by row, with a root of Q as the only layer."""
    rows, W = joined_rows(problem.erased), torch.linalg.cholesky(problem.Q()).T
    tt, at = rows.C.T @ rows.C / len(rows.C), rows.G.T @ rows.C / len(rows.C)
    erase = W @ (at - tt) @ torch.linalg.inv(torch.eye(D, dtype=W.dtype) + tt)  # rows of norm 27: λ is 1
    moved = [float((erase @ p).norm()) for p in problem.preserved]
    kept = [n for n, m in enumerate(moved) if m >= sum(moved) / len(moved)]
    assert 10 < len(kept) < len(moved) - 10
    least = torch.linalg.svd(W).Vh[-1]
    least = least * least[least.abs().argmax()].sign()
    noise = torch.randn(10, len(kept), generator=torch.Generator().manual_seed(5), dtype=W.dtype)
    near = [(problem.preserved[n] + z * least, n) for draw in noise for z, n in zip(draw, kept, strict=True)]
    moved = [float((erase @ p).norm()) for p, _ in near]
    near = [pair for pair, m in zip(near, moved, strict=True) if m >= sum(moved) / len(moved)]
    both = [*((problem.preserved[n], n) for n in kept), *near]
    weights = problem.preserved_weights
    expected = sum(weights[n] * torch.outer(p, p) for p, n in both) / sum(weights[n] for _, n in both)
    assert (refined_gram(problem, 5) - expected).norm() <= 1e-9 * expected.norm()


def test_the_empty_prompt_stays_exactly_and_the_concepts_go(problem):
    M, K = solve("speed", problem).M, fixed_rows(problem.empty.double())
    assert M(K).norm() <= 1e-10 * K.norm()
    rows, T = joined_rows(problem.erased), map_of(M, D)
    left = row_energy(rows.C @ T.T - rows.G, problem.Q()) / row_energy(rows.C - rows.G, problem.Q())
    assert left.max() < 0.5**2


def test_rows_that_the_erasure_would_not_move_do_not_count(problem):
    """However large they are: null-space would have to make way for them."""
    rows = joined_rows(problem.erased)
    away = torch.linalg.svd(torch.cat([rows.C, rows.G])).Vh[6:10] * 100 * cases.NORM  # at right angles to the concepts
    weights = torch.ones(len(problem.preserved) + len(away), dtype=torch.float64)
    more = problem._replace(preserved=torch.cat([problem.preserved, away]), preserved_weights=weights)
    assert gram(more.preserved, weights / weights.sum()).trace() > 100 * cases.NORM**2
    assert refined_gram(more, 0).trace() < 1.1 * cases.NORM**2


def test_the_noise_is_of_the_seed(problem):
    first, again, other = (refined_gram(problem, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
