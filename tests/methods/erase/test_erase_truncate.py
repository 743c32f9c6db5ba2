"""Fewer ranks for an edit of a whole span: as good where the prompts are, and less harm elsewhere (A29)."""

import importlib.util
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from comfyui_concepts.methods.erase.lowrank import LowRank
from comfyui_concepts.methods.erase.regenerate import map_of, row_energy
from comfyui_concepts.methods.erase.rows import RowPairs
from comfyui_concepts.methods.erase.solve import system, uce
from comfyui_concepts.methods.erase.truncate import CAP, LOSS, truncate

_spec = importlib.util.spec_from_file_location("erase_cases", Path(__file__).with_name("erase_cases.py"))
cases = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cases)

SEEDS = range(3)
F64 = torch.float64
WIDTH, TOKENS, KEPT = 768, 71, 100
RIDGE = 0.5


class Span(NamedTuple):
    """An edit of a whole span, what it was solved with, and 200 directions that no prompt uses, (200, 768)."""

    pairs: RowPairs
    M: LowRank
    A: torch.Tensor
    Q: torch.Tensor
    anywhere: torch.Tensor


def _tail(g: torch.Generator, shared: torch.Tensor) -> torch.Tensor:
    """A phrase and its padding, (71, 768), that changes slowly: neighbours have nearly the same direction."""
    own, pace = (torch.randn(1, WIDTH, generator=g, dtype=F64) for _ in range(2))
    steps = [own]
    for _ in range(TOKENS - 1):
        pace = 0.85 * pace + (1 - 0.85**2) ** 0.5 * torch.randn(1, WIDTH, generator=g, dtype=F64)
        own = own + 0.012 * pace
        own = own * WIDTH**0.5 / own.norm()
        steps.append(own)
    x = 0.9 * shared + (1 - 0.81) ** 0.5 * torch.cat(steps)
    return x * cases.NORM / x.norm(dim=1, keepdim=True)


def _span(seed: int) -> Span:
    """71 tokens that become 71 others, each with weight 1, with 100 kept rows: the whole edit misses by 1.1 %."""
    g = torch.Generator().manual_seed(seed)
    shared = torch.randn(1, WIDTH, generator=g, dtype=F64)
    pairs = RowPairs(_tail(g, shared), _tail(g, shared), torch.ones(TOKENS, dtype=F64))
    kept, weights = cases.rows(KEPT, WIDTH, g, shared), torch.ones(KEPT, dtype=F64)
    Q = sum(W.T @ W for W in (torch.randn(320, WIDTH, generator=g, dtype=F64) for _ in range(2)))
    M, A = uce(pairs, kept, weights, RIDGE), system(pairs, kept, weights, RIDGE)
    return Span(pairs, M, A, Q, torch.randn(200, WIDTH, generator=g, dtype=F64))


def _error(span: Span, M: LowRank) -> float:
    """‖W(Tc − g)‖ over all rows and layers, relative to ‖W(c − g)‖."""
    missed = span.pairs.C @ map_of(M, WIDTH).T - span.pairs.G
    return float((row_energy(missed, span.Q).sum() / row_energy(span.pairs.C - span.pairs.G, span.Q).sum()).sqrt())


def _drift(span: Span, M: LowRank) -> float:
    """How far the edit moves directions that no prompt uses, relative to their size."""
    return float((row_energy(M(span.anywhere), span.Q).sum() / row_energy(span.anywhere, span.Q).sum()).sqrt())


def _size(M: torch.Tensor, span: Span) -> float:
    """‖W·M·A^½‖ over all layers."""
    x = M @ torch.linalg.cholesky(span.A)
    return float(((span.Q @ x) * x).sum().sqrt())


@pytest.mark.parametrize("seed", SEEDS)
def test_four_ranks_erase_a_span_of_71_tokens_to_five_percent_and_drift_no_more_than_all(seed):
    span = _span(seed)
    assert _error(span, span.M) == pytest.approx(0.011, abs=0.002)  # the ground that the bound was measured on
    short = truncate(span.M, span.A, span.Q, rank=4)
    assert short.M.rank == 4
    assert _error(span, short.M) <= 0.05
    assert _drift(span, short.M) <= _drift(span, span.M)
    U, S, V = torch.linalg.svd(span.M.matrix())
    blind = LowRank(U[:, :4] * S[:4], V[:4])
    assert _error(span, short.M) < _error(span, blind)  # an SVD that does not look at the data


def test_no_other_four_ranks_lose_less_where_the_data_is():
    """The weighted SVD is the optimum: moving either factor a little in any direction loses more."""
    span, g = _span(0), torch.Generator().manual_seed(9)
    short = truncate(span.M, span.A, span.Q, rank=4)
    whole, least = span.M.matrix(), _size(span.M.matrix() - short.M.matrix(), span)
    for _ in range(4):
        up, down = (t + 1e-3 * t.std() * torch.randn(t.shape, generator=g, dtype=F64) for t in short.M)
        assert _size(whole - up @ short.M.down, span) > least
        assert _size(whole - short.M.up @ down, span) > least


def test_the_automatic_cut_is_the_shortest_within_its_loss_and_reports_it():
    span = _span(1)
    short = truncate(span.M, span.A, span.Q)
    lost = _size(span.M.matrix() - short.M.matrix(), span) / _size(span.M.matrix(), span)
    assert lost == pytest.approx(short.lost, rel=1e-3, abs=1e-6)
    assert 0 < short.lost <= LOSS
    assert short.M.rank < CAP
    assert truncate(span.M, span.A, span.Q, rank=short.M.rank - 1).lost > LOSS
    assert _error(span, short.M) <= 0.05


def test_short_edits_are_left_alone():
    span = _span(2)
    one = LowRank(span.M.up[:, :3], span.M.down[:3])
    assert truncate(one, span.A, span.Q).M is one
