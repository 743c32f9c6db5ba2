"""Problems of several text encoders whose rows lie one behind the other, as one: SD3 reads those of two CLIPs, then
those of T5. And problems of wide rows in fewer coordinates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .lowrank import LowRank
from .problem import Problem
from .rows import RowPairs, joined_rows

WIDE = 2048
"""Up to this width (SDXL's) a problem is solved as it is."""


def joined_problems(problems: Sequence[Problem]) -> Problem:
    """One problem of the same concepts and the same preserved prompts, with the rows of all."""
    first, *others = problems
    if not others:
        return first
    erased = tuple(joined_rows(sets) for sets in zip(*(p.erased for p in problems), strict=True))
    statistics = [p.statistics for p in problems if p.statistics is not None]
    return Problem(
        erased,
        torch.cat([p.preserved for p in problems]),
        torch.cat([p.preserved_weights for p in problems]),
        torch.cat([p.empty for p in problems]),
        variants=tuple(_joined_variants(problems, number) for number in range(len(erased))),
        statistics=torch.stack(statistics).sum(0) if statistics else None,
        labels=tuple(label for p in problems for label in p.labels),
        held=tuple(name for p in problems for name in p.held),
    )


def _joined_variants(problems: Sequence[Problem], concept: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows, numbers, before = [], [], 0
    for problem in problems:
        varied, of = problem.variants[concept]
        rows.append(varied)
        numbers.append(of + before)
        before += len(problem.erased[concept])
    return torch.cat(rows), torch.cat(numbers)


class WithinSpan(NamedTuple):
    """A problem in coordinates of a basis (d, n), orthonormal, of the span of all its rows.

    M of every solver takes rows of the span to rows of the span, and everything else to 0: nothing is lost, and no
    matrix is larger than (n, n). What a solver finds for itself lies in the span too: embeddings that bring a concept
    back (RECE), and the direction that is read least (SPEED).

    Captions that are preserved on average count with their part in the span: M moves nothing else of them.
    """

    problem: Problem
    basis: torch.Tensor

    def lifted(self, M: LowRank) -> LowRank:
        """M of the full width."""
        basis = self.basis.to(M.up)
        return LowRank(basis @ M.up, M.down @ basis.T)


def within_span(problem: Problem) -> WithinSpan:
    """The problem in as many coordinates as it has rows."""
    rows = [problem.preserved, problem.empty, *(v for v, _ in problem.variants)]
    rows += [tensor for pairs in problem.erased for tensor in (pairs.C, pairs.G)]
    basis = torch.linalg.qr(torch.cat([r.double() for r in rows]).T).Q
    return WithinSpan(
        problem._replace(
            erased=tuple(RowPairs(p.C.double() @ basis, p.G.double() @ basis, p.weights) for p in problem.erased),
            preserved=problem.preserved.double() @ basis,
            empty=problem.empty.double() @ basis,
            variants=tuple((rows.double() @ basis, numbers) for rows, numbers in problem.variants),
            statistics=None if problem.statistics is None else basis.T @ problem.statistics @ basis,
            outside=basis.shape[0] - basis.shape[1],
        ),
        basis,
    )
