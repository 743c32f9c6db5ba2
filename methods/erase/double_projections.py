"""Double Projections (2604.10032, CVPR 2026): two projections in closed form, and what is preserved stays exactly.

The first projects a concept on the span of its anchor. The second lets the weights change only along directions that
no preserved row uses. The formulas come from a summary of the paper, whose own text could not be read.
"""

from __future__ import annotations

import torch

from .lowrank import LowRank
from .null_space import projector, room_notes, unused_level
from .problem import Problem, Solution, SolverSettings
from .rows import RowPairs, joined_rows
from .solve import gram, scaled_ridge, system

_ROOM = 0.5  # share of all directions that must be free for the exact form
_EDGE = 15.0  # times the null space's threshold, shared by the concepts: what they move of the rest adds up
_MAIN = 0.5  # of a concept's largest singular value: directions below it are sentences, and not the concept
_SPAN = 0.01  # of the largest singular value: what is below it in an anchor's rows is rounding
_NOTHING = 1e-6  # of the concept's size: less of it is free only by rounding
_ZERO = 1e-13  # of a Gram matrix's trace: eigenvalues below it are rounding


def double_projections(problem: Problem, settings: SolverSettings) -> Solution:
    """M = (C* − C) · X⁺ with X = U₂U₂ᵀC: takes every concept to its proxy C*, and moves no preserved row.

    C* points to where C comes nearest in the span of the anchor's rows. U₂ is a basis of what neither the preserved
    rows nor the anchors use. For one row this is the paper's ΔW = W(c* − c)xᵀU₂ᵀ / ‖x‖² with x = U₂ᵀc.

    Differs from the paper, which has one row per concept: a concept has many sentences here, and counts with the
    directions that they share (mostly one). Several concepts are solved together. A proxy is as long as its concept:
    the rows of a text encoder are all about as long, and shorter ones still drew the concept. If the preserved rows
    leave less than half of all directions, the most used ones are held instead, and ``threshold`` decides.
    ``preserve_weight`` has no effect.
    """
    P, notes = _unused(problem, settings.threshold)
    proxies = tuple(proxy_rows(rows) for rows in problem.erased)
    parts = [_shared_directions(rows, G, P) for rows, G in zip(problem.erased, proxies, strict=True)]
    if not all(x.shape[1] for x, _ in parts):
        notes += ("a concept lies within what is kept, so that it stays; keep fewer prompts, or raise the threshold",)
    X, Y = (torch.cat(columns, 1) for columns in zip(*parts, strict=True))  # (d, r) each
    rows = joined_rows(problem.erased)
    ridge = scaled_ridge(settings.ridge or 0, rows.C)
    A = system(rows, problem.preserved, problem.preserved_weights, ridge, problem.statistics)
    return Solution(LowRank(Y.contiguous(), torch.linalg.pinv(X)), A, notes=notes, proxies=proxies)


def proxy_rows(rows: RowPairs) -> torch.Tensor:
    """C* ∝ S(SᵀS)⁺SᵀC, (n, d), with the anchor's rows as S, each as long as its row of C."""
    C, G = rows.C.double(), rows.G.double()
    nearest = C @ torch.linalg.pinv(G, rtol=_SPAN) @ G
    return nearest * (C.norm(dim=1, keepdim=True) / nearest.norm(dim=1, keepdim=True).clamp_min(1e-30))


def _unused(problem: Problem, threshold: float) -> tuple[torch.Tensor, tuple[str, ...]]:
    """U₂U₂ᵀ, (d, d), of the directions that preserved rows and anchors do not use, and a note if they are few."""
    anchors = joined_rows(problem.erased)
    held = torch.cat([problem.preserved, anchors.G]).double()
    weights = torch.cat([problem.preserved_weights, anchors.weights]).double()
    used = gram(held, weights / weights.sum())
    P, dimensions = projector(used, _ZERO * float(used.trace()))
    if dimensions + problem.outside < _ROOM * problem.directions:
        P, dimensions = projector(used, unused_level(problem, _EDGE / len(problem.erased) * threshold))
    return P, room_notes(dimensions + problem.outside, problem.directions)


def _shared_directions(rows: RowPairs, proxies: torch.Tensor, P: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a concept's rows share within P, and how far it is from there to the proxies, (d, r) each."""
    C, root = rows.C.double(), rows.weights.double().sqrt()[:, None]
    X = (C * root) @ P
    _, values, mixes = torch.linalg.svd(X.T, full_matrices=False)  # mixes (n, n): a sum of rows each
    least = max(_MAIN * float(values[0]), _NOTHING * float((C * root).norm()))
    mixes = mixes[values >= least].T
    return X.T @ mixes, ((proxies - C) * root).T @ mixes
