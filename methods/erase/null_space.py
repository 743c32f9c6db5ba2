"""Many concepts at once: changes only directions that preserved rows do not use (SPEED's closed form, ICLR 2026)."""

from __future__ import annotations

import torch

from .lowrank import LowRank
from .problem import Problem, Solution, SolverSettings
from .rows import joined_rows
from .solve import gram, system

_FEW = 0.05  # of the width: a smaller null space erases little
_CENTRES, _ROUNDS = 3, 20


def null_space(problem: Problem, settings: SolverSettings) -> Solution:
    """M = Σ s(g − c)cᵀ · P (I − NK(KᵀPNK)⁻¹KᵀP) N with N = (Σ s·ccᵀ P + ρI)⁻¹.

    P projects on the directions that the preserved rows do not use. K has the rows of the empty prompt that stay
    exactly (its first row and the centres of the others), since every picture with guidance is drawn against it.

    Differs from the paper: it also refines the preserved rows (``speed``), for each layer; here all share one solve.
    ``settings.preserve_weight`` has no effect: a row is preserved or not, and ``threshold`` decides.
    """
    weights = problem.preserved_weights.double()
    return solved_within(problem, settings, gram(problem.preserved.double(), weights / weights.sum()))


def solved_within(problem: Problem, settings: SolverSettings, retained: torch.Tensor) -> Solution:
    """The same, where ``retained`` (d, d) is the mean Gram matrix of what is preserved."""
    rows = joined_rows(problem.erased)
    C, G, s = (t.double() for t in rows)
    s = s / s.sum()
    P, dimensions = projector(retained, unused_level(problem, settings.threshold))
    K = fixed_rows(problem.empty.double())
    rho = (settings.ridge or 0) * float(C.square().sum(1).mean()) / problem.directions
    N = torch.linalg.inv(gram(C, s) @ P + rho * torch.eye(problem.width, dtype=C.dtype))
    PNK = P @ N @ K.T  # (d, k)
    # where P has already removed K nothing is left to preserve, and what rounding leaves must not be inverted
    inverse = torch.linalg.pinv(K @ PNK, atol=1e-9 * float(K.square().sum()) / rho)
    right = P @ (torch.eye(len(P), dtype=P.dtype) - N @ K.T @ inverse @ K @ P) @ N
    A = system(rows, problem.preserved, problem.preserved_weights, rho)
    notes = room_notes(dimensions + problem.outside, problem.directions)
    return Solution(LowRank(((G - C) * s[:, None]).T.contiguous(), C @ right), A, notes=notes)


def room_notes(dimensions: int, width: int) -> tuple[str, ...]:
    """A warning if the null space has few dimensions."""
    if dimensions >= _FEW * width:
        return ()
    return (  # saved files contain these words
        f"only {dimensions} of {width} directions are free of what is kept, so that little can be erased; keep fewer "
        "prompts, raise the threshold, or use another solver",
    )


def unused_level(problem: Problem, threshold: float) -> float:
    """The eigenvalue below which a direction counts as unused: relative to those of the empty prompt, since embeddings
    of models differ in norm."""
    return threshold * float(problem.empty.double().square().sum(1).mean()) / problem.directions


def projector(retained: torch.Tensor, level: float) -> tuple[torch.Tensor, int]:
    """P (d, d) on the directions where the retained Gram matrix has less than ``level``, and their number."""
    values, vectors = torch.linalg.eigh(retained)
    free = vectors[:, values < level]
    return free @ free.T, free.shape[1]


def fixed_rows(empty: torch.Tensor) -> torch.Tensor:
    """The rows that stay exactly: the first of the empty prompt and the centres of the rest (k-means), (≤ 4, d)."""
    first, rest = empty[:1], empty[1:]
    if not len(rest):  # a language model without a template has a start token alone
        return first
    centres = rest[torch.linspace(0, len(rest) - 1, min(_CENTRES, len(rest))).long()]
    for _ in range(_ROUNDS):
        nearest = torch.cdist(rest, centres).argmin(1)
        means = [rest[nearest == k].mean(0) if (nearest == k).any() else centres[k] for k in range(len(centres))]
        centres = torch.stack(means)
    return torch.cat([first, centres])
