"""Many concepts at once: changes only where what is kept has nothing (the closed form of SPEED, ICLR 2026)."""

from __future__ import annotations

import torch

from .lowrank import LowRank
from .problem import Problem, Solution, SolverSettings
from .rows import joined_rows
from .solve import gram, system

_FEW = 0.05  # of the width: less null space than this erases little
_CENTRES, _ROUNDS = 3, 20


def null_space(problem: Problem, settings: SolverSettings) -> Solution:
    """M = Σ s(g − c)cᵀ · P (I − NK(KᵀPNK)⁻¹KᵀP) N with N = (Σ s·ccᵀ P + ρI)⁻¹.

    P projects on the directions that the kept rows do not use; K holds the empty prompt exactly (its first row and the
    centres of the others), since every picture with guidance is drawn against it. The same for every layer: the original
    also sorts the kept rows anew for each layer. ``settings.preserve_weight`` counts for nothing here: a row is held or it is not, and
    ``threshold`` says which.
    """
    rows = joined_rows(problem.erased)
    C, G, s = (t.double() for t in rows)
    s = s / s.sum()
    kept, weights = problem.preserved.double(), problem.preserved_weights.double()
    P, dimensions = projector(gram(kept, weights / weights.sum()), _level(problem.empty, settings.threshold))
    K = anchors(problem.empty.double())
    rho = (settings.ridge or 0) * float(C.square().sum(1).mean()) / problem.width
    N = torch.linalg.inv(gram(C, s) @ P + rho * torch.eye(problem.width, dtype=C.dtype))
    PNK = P @ N @ K.T  # (d, k)
    # where P has removed K already nothing is left to hold, and what rounding leaves must not be inverted
    hold = torch.linalg.pinv(K @ PNK, atol=1e-9 * float(K.square().sum()) / rho)
    right = P @ (torch.eye(len(P), dtype=P.dtype) - N @ K.T @ hold @ K @ P) @ N
    notes: tuple[str, ...] = ()
    if dimensions < _FEW * problem.width:
        notes = (
            f"only {dimensions} of {problem.width} directions are free of what is kept, so that little can be erased; keep "
            "fewer prompts, raise the threshold, or use another solver",
        )
    A = system(rows, kept, weights, rho)
    return Solution(LowRank(((G - C) * s[:, None]).T.contiguous(), C @ right), A, notes=notes)


def _level(empty: torch.Tensor, threshold: float) -> float:
    """The eigenvalue below which a direction counts as unused: relative, since embeddings of models differ in norm."""
    return threshold * float(empty.double().square().sum(1).mean()) / empty.shape[1]


def projector(retained: torch.Tensor, level: float) -> tuple[torch.Tensor, int]:
    """P (d, d) on the directions in which the retained Gram matrix has less than ``level``, and how many these are."""
    values, vectors = torch.linalg.eigh(retained)
    free = vectors[:, values < level]
    return free @ free.T, free.shape[1]


def anchors(empty: torch.Tensor) -> torch.Tensor:
    """The rows that must stay exactly: the first of the empty prompt and the centres of the rest (k-means), (≤ 4, d)."""
    first, rest = empty[:1], empty[1:]
    centres = rest[torch.linspace(0, len(rest) - 1, min(_CENTRES, len(rest))).long()]
    for _ in range(_ROUNDS):
        nearest = torch.cdist(rest, centres).argmin(1)
        centres = torch.stack([
            rest[nearest == k].mean(0) if (nearest == k).any() else centres[k] for k in range(len(centres))
        ])  # fmt: skip
    return torch.cat([first, centres])
