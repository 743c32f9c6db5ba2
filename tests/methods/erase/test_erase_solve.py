"""The shared closed form against the plainest version of it: a full solve for one layer at a time, in float64."""

import pytest
import torch
from comfyui_concepts.methods.erase import solve
from comfyui_concepts.methods.erase.rows import RowPairs
from comfyui_concepts.methods.erase.solve import uce

D = 48
RIDGE = 0.5


@pytest.fixture
def case():
    """Correlated rows of norm about 27 as text encoders make them, and a few layers."""
    return make_case()


def make_case(seed: int = 0, erased: int = 5, kept: int = 60, d: int = D):
    g = torch.Generator().manual_seed(seed)

    def rows(n):
        shared = torch.randn(1, d, generator=g, dtype=torch.float64)
        x = 0.9 * shared + 0.44 * torch.randn(n, d, generator=g, dtype=torch.float64)
        return x * 27 / x.norm(dim=1, keepdim=True)

    everything = rows(2 * erased + kept)
    C, G, P = everything.split([erased, erased, kept])
    weights = torch.rand(erased, generator=g, dtype=torch.float64) + 0.5
    layers = [torch.randn(o, d, generator=g, dtype=torch.float64) for o in (16, 24, 16)]
    return RowPairs(C, G, weights), P, torch.full((kept,), 0.7, dtype=torch.float64), layers


def by_hand(W, erased, P, w, ridge):
    """W that minimises the loss, from its normal equations, as one writes them down."""
    C, G, s = erased
    A = ridge * torch.eye(W.shape[1], dtype=W.dtype)
    B = ridge * W
    for c, g, weight in zip(C, G, s, strict=True):
        A = A + weight * torch.outer(c, c)
        B = B + weight * torch.outer(W @ g, c)
    for p, weight in zip(P, w, strict=True):
        A = A + weight * torch.outer(p, p)
        B = B + weight * torch.outer(W @ p, p)
    return B @ torch.linalg.inv(A)


def edited(W, M):
    return W + W @ M.matrix()


def loss(W, W0, erased, P, w, ridge):
    C, G, s = erased
    gone = (s * (C @ W.T - G @ W0.T).square().sum(1)).sum()
    return gone + (w * (P @ (W - W0).T).square().sum(1)).sum() + ridge * (W - W0).square().sum()


def test_the_shared_map_is_the_solution_of_every_layer(case):
    erased, P, w, layers = case
    M = uce(erased, P, w, RIDGE)
    for W0 in layers:
        expected = by_hand(W0, erased, P, w, RIDGE)
        assert (edited(W0, M) - expected).norm() <= 1e-10 * expected.norm()
        with torch.inference_mode(False), torch.enable_grad():
            W = edited(W0, M).clone().requires_grad_(True)
            plain = RowPairs(*(t.clone() for t in erased))
            (gradient,) = torch.autograd.grad(loss(W, W0.clone(), plain, P.clone(), w.clone(), RIDGE), W)
        assert gradient.norm() <= 1e-9 * W.norm()


def test_woodbury_is_the_same_as_cholesky():
    erased, P, w, _ = make_case(kept=20)
    A = solve.gram(erased.C, erased.weights) + solve.gram(P, w)
    rows = torch.cat([erased.C * erased.weights.sqrt()[:, None], P * w.sqrt()[:, None]])
    full = solve.cholesky(A, rows.T, RIDGE)
    assert (full - solve.woodbury(rows, RIDGE)).norm() <= 1e-9 * full.norm()


def test_the_map_has_no_more_rank_than_rows(case):
    erased, P, w, _ = case
    values = torch.linalg.svdvals(uce(erased, P, w, RIDGE).matrix())
    assert values[len(erased)] <= 1e-8 * values[0]


def test_one_pair_moves_as_far_as_the_ridge_lets_it(case):
    erased, P, w, layers = case
    one = RowPairs(erased.C[:1], erased.G[:1], erased.weights[:1])
    c, g, s = one.C[0], one.G[0], float(one.weights)
    for ridge in (0.5, 20.0):
        M = uce(one, P[:0], w[:0], ridge)
        for W0 in layers:
            rest = (edited(W0, M) @ c - W0 @ g).norm() / (W0 @ (c - g)).norm()
            assert float(rest) == pytest.approx(ridge / (ridge + s * float(c @ c)), rel=1e-9)
    assert (uce(one, P[:0], w[:0], 1e-12)(c) - (g - c)).norm() <= 1e-9 * c.norm()  # λ → 0: the anchor's keys and values


@pytest.mark.parametrize("empty", [False, True])
def test_heavier_kept_rows_move_less(case, empty):
    """The listed prompts' and the empty prompt's alike."""
    erased, _, _, layers = case
    few = make_case(1, kept=20)[1]
    held = make_case(2, kept=8)[1] if empty else few[:0]
    watched = held if empty else few
    drifts = []
    for weight in (0.1, 1.0, 10.0, 100.0):
        rows, weights = torch.cat([few, held]), torch.full((len(few) + len(held),), weight, dtype=torch.float64)
        M = uce(erased, rows, weights, RIDGE)
        drifts.append(float(max((W @ M.matrix() @ watched.T).norm() / (W @ watched.T).norm() for W in layers)))
    assert drifts == sorted(drifts, reverse=True)
    assert drifts[-1] <= 1e-3


def test_the_concept_is_at_its_anchor_beside_what_is_kept(case):
    erased, _, _, layers = case
    few = make_case(1, kept=20)[1]
    M = uce(erased, few, torch.ones(len(few), dtype=torch.float64), RIDGE)
    for W0 in layers:
        rest = (erased.C @ edited(W0, M).T - erased.G @ W0.T).norm(dim=1) / ((erased.C - erased.G) @ W0.T).norm(dim=1)
        assert rest.max() <= 0.02


def test_equal_pairs_and_empty_lists_change_exactly_nothing(case):
    erased, P, w, _ = case
    assert not uce(RowPairs(erased.C, erased.C, erased.weights), P, w, RIDGE).matrix().any()
    nothing = uce(RowPairs(erased.C[:0], erased.G[:0], erased.weights[:0]), P, w, RIDGE)
    assert nothing.rank == 0
    assert not nothing.matrix().any()


def test_order_does_not_matter_and_a_row_twice_is_a_row_of_twice_the_weight(case):
    erased, P, w, _ = case
    M = uce(erased, P, w, RIDGE).matrix()
    order = torch.tensor([3, 0, 4, 1, 2])
    assert (uce(RowPairs(*(t[order] for t in erased)), P, w, RIDGE).matrix() - M).norm() <= 1e-9 * M.norm()
    twice = RowPairs(*(torch.cat([t, t[:1]]) for t in erased))
    heavier = RowPairs(erased.C, erased.G, erased.weights * torch.tensor([2.0, 1, 1, 1, 1], dtype=torch.float64))
    expected = uce(heavier, P, w, RIDGE).matrix()
    assert (uce(twice, P, w, RIDGE).matrix() - expected).norm() <= 1e-9 * expected.norm()


def test_factors_in_single_precision_are_near_enough(case):
    erased, P, w, layers = case
    M = uce(erased, P, w, RIDGE)
    for W0 in layers:
        exact = W0 @ M.matrix()
        single = (W0.float() @ M.up.float()) @ M.down.float()
        assert (single.double() - exact).norm() <= 1e-3 * exact.norm()


def test_statistics_count_like_the_rows_they_were_made_of(case):
    erased, P, w, _ = case
    whole = uce(erased, P, w, RIDGE).matrix()
    split = uce(erased, P[:10], w[:10], RIDGE, solve.gram(P[10:], w[10:])).matrix()
    assert (whole - split).norm() <= 1e-9 * whole.norm()


def test_a_layer_with_a_bias_answers_the_anchor_with_its_bias(case):
    """Targets are made of weights alone, so that the bias stays where it was (A12)."""
    erased, _, _, layers = case
    few = make_case(1, kept=20)[1]
    M = uce(erased, few, torch.ones(len(few), dtype=torch.float64), 1e-10)
    bias = torch.randn(16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    W0 = layers[0]
    for p in few:
        before, after = W0 @ p + bias, edited(W0, M) @ p + bias
        assert (after - before).norm() <= 1e-9 * before.norm()
    for c, g in zip(erased.C, erased.G, strict=True):
        wanted = W0 @ g + bias
        assert (edited(W0, M) @ c + bias - wanted).norm() <= 1e-9 * wanted.norm()


def test_a_ridge_of_zero_is_refused(case):
    erased, P, w, _ = case
    with pytest.raises(ValueError, match=r"ridge must be above 0.*0\.5"):
        uce(erased, P, w, 0.0)
