"""RealEra-style erasure (2410.09140): the neighbourhood of a concept goes with it, and what lies beyond is held.

The paper gives no constants and no code; the sampling below is ours. Neighbours drawn evenly in all directions would add
a multiple of I to A without its counterpart, which only shrinks every weight; so they are drawn along the differences
between the concept and its other names and sentences.
"""

from __future__ import annotations

import torch

from .problem import Problem, Settings, Solution
from .rows import Rows, joined
from .solve import scaled_ridge, system, uce

_BEYOND = 2  # directions that are held for every neighbour that is erased, as many as the paper's figure shows
_TRIES = 64


def realera(problem: Problem, settings: Settings) -> Solution:
    """UCE on the concepts, on neighbours sampled round each of their rows, and with rows beyond these held."""
    generator = torch.Generator().manual_seed(settings.seed)
    near, beyond, notes = [], [], []
    for rows, (alike, stands_for) in zip(problem.erased, problem.alike, strict=True):
        if not len(alike):
            notes.append("a concept has one sentence and no other names, so that it has no neighbours")
            continue
        inside, outside = _around(rows, alike.double(), stands_for, settings, generator)
        near.append(inside)
        beyond.append(outside)
    erased = joined([*problem.erased, *near])
    held = torch.cat([problem.kept.double(), *beyond])
    each = float(torch.cat([r.weights for r in problem.erased]).mean()) / max(_BEYOND * settings.neighbours, 1)
    weights = torch.cat([problem.kept_weights.double(), torch.full((len(held) - len(problem.kept),), each).double()])
    ridge = scaled_ridge(settings.ridge or 0, joined(problem.erased).C)
    given = (erased, held, weights * (settings.keep or 0), ridge, problem.statistics)
    return Solution(uce(*given), system(*given), notes=tuple(notes))


def _around(
    rows: Rows, alike: torch.Tensor, stands_for: torch.Tensor, settings: Settings, generator: torch.Generator
) -> tuple[Rows, torch.Tensor]:
    """Neighbours within the shell of every row that something else stands for, and rows (m, d) outside it."""
    eta = alike - rows.C[stands_for]
    farthest = float(eta.norm(dim=1).max()) * settings.reach  # D1: the farthest thing that is to go
    closeness = torch.cosine_similarity(alike, rows.C[stands_for], dim=1)
    smallest = 1 - (1 - float(closeness.min())) * settings.reach  # S1
    factor = eta.T / len(eta) ** 0.5  # L with LLᵀ = the covariance, (d, k)
    C, G, weights, beyond = [], [], [], []
    for row in sorted(set(stands_for.tolist())):
        c, g, weight = rows.C[row], rows.G[row], rows.weights[row]
        samples = structured(factor, _TRIES * settings.neighbours // 16, generator)
        inside = _within(c, c + samples, farthest, smallest)
        chosen = (c + samples)[inside][: settings.neighbours]
        C.append(chosen)
        G.append(g.expand(len(chosen), -1))
        weights.append((weight / max(len(chosen), 1)).expand(len(chosen)))
        away = samples * (2 * farthest / samples.norm(dim=1, keepdim=True).clamp_min(1e-12))
        beyond.append((c + away)[:_BEYOND])
    return Rows(torch.cat(C), torch.cat(G), torch.cat(weights)), torch.cat(beyond)


def structured(factor: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """η = Lz, (count, d), for L (d, k)."""
    z = torch.randn(count, factor.shape[1], generator=generator, dtype=factor.dtype)
    return z @ factor.T


def _within(c: torch.Tensor, near: torch.Tensor, farthest: float, smallest: float) -> torch.Tensor:
    distance = (near - c).norm(dim=1)
    return (distance <= farthest) & (torch.cosine_similarity(near, c[None], dim=1) >= smallest)


def expectation(rows: Rows, factor: torch.Tensor, count: float) -> Rows:
    """What ``count`` samples e + Lz of every row come to on average, as rows: the row itself and, since
    E[(e+η)(e+η)ᵀ] = eeᵀ + LLᵀ and E[a(e+η)ᵀ] = aeᵀ, the columns of L as directions that become nothing."""
    total = count * float(rows.weights.sum())
    directions = factor.T
    return joined([
        Rows(rows.C, rows.G, rows.weights * count),
        Rows(directions, torch.zeros_like(directions), torch.full((len(directions),), total, dtype=factor.dtype)),
    ])  # fmt: skip
