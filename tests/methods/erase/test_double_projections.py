"""Double Projections: preserved rows stay exactly, concepts land on their proxies, erasing twice is erasing once."""

import importlib.util
from pathlib import Path

import pytest
import torch
from comfyui_concepts.methods.erase.diagnose import measure
from comfyui_concepts.methods.erase.double_projections import proxy_rows
from comfyui_concepts.methods.erase.problem import SolverSettings
from comfyui_concepts.methods.erase.regenerate import map_of
from comfyui_concepts.methods.erase.rows import RowPairs, joined_rows
from comfyui_concepts.methods.erase.solvers import solve
from comfyui_concepts.methods.erase.truncate import Truncated

_spec = importlib.util.spec_from_file_location("erase_cases", Path(__file__).with_name("erase_cases.py"))
cases = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cases)

D = 96
EXACT = 1e-10


@pytest.fixture(scope="module")
def problem():
    """Three concepts of one row, and 28 preserved rows: with the anchors they leave 65 of 96 directions free."""
    return cases.problem(3, D)


@pytest.fixture(scope="module")
def T(problem):
    return map_of(solve("double-projections", problem).M, D)


def sentences_of(problem, count: int = 6, spread: float = 0.5):
    """The same concepts, each in several sentences that differ a little."""
    g = torch.Generator().manual_seed(8)
    noise = [spread * torch.randn(2, count, D, generator=g, dtype=torch.float64) for _ in problem.erased]
    ones = torch.ones(count, dtype=torch.float64)
    return problem._replace(
        erased=tuple(RowPairs(r.C + c, r.G + a, ones) for r, (c, a) in zip(problem.erased, noise, strict=True))
    )


def test_one_concept_is_the_papers_formula(problem):
    (rows, *_), kept = problem.erased, problem.preserved
    M = solve("double-projections", problem._replace(erased=(rows,))).M
    c, g = rows.C[0], rows.G[0]
    Z = torch.cat([kept, rows.G]).T
    left, values, _ = torch.linalg.svd(Z, full_matrices=True)
    U2 = left[:, int((values > 1e-9 * values[0]).sum()) :]
    proxy, x = g * c.norm() / g.norm() * (g @ c).sign(), U2.T @ c
    expected = torch.outer(proxy - c, x) @ U2.T / x.square().sum()
    assert M.rank == 1
    assert (M.matrix() - expected).norm() <= EXACT * expected.norm()


def test_no_preserved_row_and_no_anchor_moves(problem, T):
    for held in (problem.preserved, joined_rows(problem.erased).G):
        assert (held @ T.T - held).norm() <= EXACT * held.norm()


def test_every_concept_lands_on_its_proxy(problem, T):
    for rows in problem.erased:
        assert (rows.C @ T.T - proxy_rows(rows)).norm() <= EXACT * rows.C.norm()


def test_a_proxy_points_to_where_the_anchors_span_is_nearest_and_is_as_long_as_the_concept(problem):
    (rows, *_) = sentences_of(problem).erased
    proxies = proxy_rows(rows)
    nearest = torch.linalg.lstsq(rows.G.T, rows.C.T).solution.T @ rows.G
    assert (torch.cosine_similarity(proxies, nearest) - 1).abs().max() <= EXACT
    assert (proxies.norm(dim=1) - rows.C.norm(dim=1)).abs().max() <= EXACT * cases.NORM
    assert (proxy_rows(RowPairs(proxies, rows.G, rows.weights)) - proxies).norm() <= EXACT * proxies.norm()


def test_erasing_twice_is_erasing_once_and_nothing_brings_the_direction_back(problem, T):
    assert (T @ T - T).norm() <= EXACT * T.norm()
    values = torch.linalg.svdvals(T)
    assert values[-len(problem.erased)] <= EXACT < values[-len(problem.erased) - 1]


def test_sentences_of_a_concept_count_as_the_direction_they_share(problem):
    many = sentences_of(problem)
    M = solve("double-projections", many).M
    assert M.rank == len(many.erased)
    T = map_of(M, D)
    for rows in many.erased:
        mean, proxy = rows.C.mean(0), proxy_rows(rows).mean(0)
        assert (T @ mean - proxy).norm() <= 0.05 * (mean - proxy).norm()


def test_with_too_many_preserved_rows_the_most_used_directions_are_held():
    full = cases.problem(4, 64, kept=400)
    low, high = (map_of(solve("double-projections", full, SolverSettings(threshold=t)).M, 64) for t in (1e-4, 0.03))
    moved = [float(((full.preserved @ T.T - full.preserved).norm()) / full.preserved.norm()) for T in (low, high)]
    assert moved[0] <= EXACT  # nothing counts as free, so nothing moves
    assert EXACT < moved[1] < 0.2
    assert (
        "a concept lies within what is kept"
        in solve("double-projections", full, SolverSettings(threshold=1e-4)).notes[-1]
    )


def test_several_concepts_share_the_room_beside_what_is_kept():
    full = cases.problem(4, 64, kept=400)
    alone = full._replace(erased=full.erased[:1])
    settings = SolverSettings(threshold=0.03)

    def moved(case):
        M = solve("double-projections", case, settings).M
        across = torch.linalg.svd(M.down).Vh[: M.rank]  # the directions of an embedding that the edit reads
        return float((full.preserved @ across.T).norm() / full.preserved.norm() / M.rank**0.5)

    assert moved(full) < 0.9 * moved(alone)


def test_a_weight_on_what_is_kept_changes_nothing(problem):
    plain, heavy = (solve("double-projections", problem, SolverSettings(preserve_weight=w)).M for w in (None, 50.0))
    assert torch.equal(plain.matrix(), heavy.matrix())


def test_the_report_measures_from_the_proxy(problem):
    labels = ("a fox",) * len(problem.preserved)
    problem = problem._replace(labels=labels, held=("fox",) * len(labels))
    solution = solve("double-projections", problem)
    report = measure(problem, ["a", "b", "c"], solution, Truncated(solution.M, 0.0), margins=False)
    assert [concept["left"] for concept in report["concepts"]] == [0.0] * 3
    assert [row["moved"] for row in report["kept"]] == [0.0]
