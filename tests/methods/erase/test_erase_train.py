"""The loop that trains an erasure: what it ends with, and when."""

from __future__ import annotations

import math

import pytest
import torch
from comfyui_concepts.methods.erase.lowrank import LowRank
from comfyui_concepts.methods.erase.train import (
    LoopHooks,
    Losses,
    Schedule,
    joined,
    new_factors,
    train,
    without_conflict,
)
from comfyui_concepts.methods.erase.trained.esd import negative_guidance


@pytest.fixture(autouse=True)
def ordinary_tensors(inference_mode):
    with torch.inference_mode(False):
        yield


class Cancelled(Exception):
    """As the host's interruption."""


SHAPES = {"a": (6, 4), "b": (3, 5)}


def _problem(factors, noise=0.0):
    """Factors that should reproduce fixed weights: a loss that falls."""
    wanted = {k: torch.randn(s, generator=torch.Generator().manual_seed(1)) for k, s in SHAPES.items()}

    def terms(generator):
        error = sum((f.up @ f.down - wanted[k]).square().mean() for k, f in factors.items())
        size = sum((f.up @ f.down).square().mean() for f in factors.values())
        return Losses(error + noise * torch.rand((), generator=generator), size)

    return terms


def _trained(schedule, seed=3, spoil=None, watch=lambda i, o: None, **options):
    factors = new_factors(SHAPES, 4, seed)
    terms, calls = _problem(factors, 0.1), []

    def spoiled(generator):
        calls.append(1)
        made = terms(generator)
        return spoil(len(calls), made) if spoil else made

    return train(factors, spoiled, schedule, seed, LoopHooks(after_iteration=watch, **options))


def test_fresh_factors_change_nothing_and_fit_their_layers():
    factors = new_factors(SHAPES, 4, 0)
    assert {k: (f.up @ f.down).abs().max().item() for k, f in factors.items()} == {"a": 0.0, "b": 0.0}
    assert [f.down.shape for f in factors.values()] == [(4, 4), (3, 5)]
    assert all(f.down.abs().max() > 0 for f in factors.values())


def test_the_loss_falls_and_the_same_seed_gives_the_same_bits():
    schedule = Schedule(200, rate=2e-2, preserve_weight=0.0)
    first, again, other = (_trained(schedule, seed) for seed in (3, 3, 4))
    assert first.erase[-1] < 0.3 * first.erase[0]
    assert all(torch.equal(a, b) for k in SHAPES for a, b in zip(first.factors[k], again.factors[k], strict=True))
    assert not torch.equal(first.factors["a"].up, other.factors["a"].up)
    assert not any(t.requires_grad for f in first.factors.values() for t in f)


def test_nan_ends_with_the_last_finite_adapter_and_says_so():
    good = _trained(Schedule(5, rate=1e-2))
    spoiled = _trained(
        Schedule(50, rate=1e-2), spoil=lambda n, t: Losses(t.erase * (math.nan if n == 6 else 1), t.preserve)
    )
    assert len(spoiled.erase) == 5
    assert "not finite in iteration 6" in spoiled.reason
    assert all(torch.equal(a, b) for k in SHAPES for a, b in zip(good.factors[k], spoiled.factors[k], strict=True))


def test_a_gradient_that_is_not_finite_counts_as_nan():
    spoiled = _trained(Schedule(9), spoil=lambda n, t: Losses((t.erase - t.erase.detach()).abs().sqrt(), t.preserve))
    assert spoiled.erase == []
    assert "not finite in iteration 1" in spoiled.reason


def test_a_cancel_keeps_the_best_so_far_and_before_the_first_step_goes_on():
    def cancel_at(n):
        def spoil(calls, terms):
            if calls == n:
                raise Cancelled
            return terms

        return spoil

    ended = _trained(Schedule(50, rate=1e-2), spoil=cancel_at(8), cancel_errors=Cancelled)
    assert len(ended.erase) == 7
    assert "cancelled after 7" in ended.reason
    assert ended.factors["a"].up.abs().max() > 0
    with pytest.raises(Cancelled):
        _trained(Schedule(50), spoil=cancel_at(1), cancel_errors=Cancelled)
    with pytest.raises(Cancelled):
        _trained(Schedule(50), spoil=cancel_at(8))


def test_the_newest_adapter_is_the_best_where_the_loss_is_an_adversarys():
    """A cancel gave back an empty adapter: the loss was lowest before anything had been learned."""

    def spoil(calls, terms):
        if calls == 8:
            raise Cancelled
        return Losses(terms.erase + calls, terms.preserve)  # the adversary gets better and better

    lowest, newest = (
        _trained(Schedule(50, rate=1e-2, newest_is_best=newest), spoil=spoil, cancel_errors=Cancelled)
        for newest in (False, True)
    )
    seven = _trained(Schedule(7, rate=1e-2))
    assert torch.equal(newest.factors["a"].up, seven.factors["a"].up)
    assert not torch.equal(lowest.factors["a"].up, seven.factors["a"].up)


def test_gradients_are_scaled_on_the_way_and_a_scale_that_overflows_is_halved():
    class Rounded(torch.autograd.Function):
        """The identity, whose gradient goes through float16."""

        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient.half().float()

    def small(calls, terms):
        return Losses(Rounded.apply(terms.erase * 1e-3) * 1e-5, terms.preserve)

    options = dict(spoil=small, seed=3)
    schedule = Schedule(5, rate=1e-2, preserve_weight=0.0)
    lost = _trained(schedule, **options)
    scaled = _trained(schedule, **options, loss_scale=1024.0)
    exact = _trained(schedule, spoil=lambda n, t: Losses(t.erase * 1e-8, t.preserve))
    moved = [(a.factors["a"].up - exact.factors["a"].up).norm() for a in (lost, scaled)]
    assert moved[1] < 0.2 * moved[0]
    schedule, through_half = Schedule(5, rate=1e-2), lambda n, t: Losses(Rounded.apply(t.erase), t.preserve)
    huge = _trained(schedule, spoil=through_half, loss_scale=2.0**18)
    assert len(huge.erase) == 2  # 2^18, 2^17 and 2^16 are no float16
    assert huge.reason.startswith("all 5")


def test_other_errors_go_on_to_the_caller():
    def spoil(calls, terms):
        raise torch.OutOfMemoryError("here")

    with pytest.raises(torch.OutOfMemoryError):
        _trained(Schedule(5), spoil=spoil, cancel_errors=Cancelled)


def test_it_ends_when_enough_is_erased():
    ended = _trained(Schedule(2000, rate=2e-2, preserve_weight=0.0, erased_below=0.3))
    assert len(ended.erase) < 400
    assert "fell below 30%" in ended.reason


def test_it_stops_at_the_budget_with_an_adapter_that_kept_it():
    schedule = Schedule(2000, rate=2e-3, preserve_weight=0.0, max_drift=0.2)
    ended = _trained(schedule)
    assert "more than the budget" in ended.reason
    size = sum((f.up @ f.down).square().mean() for f in ended.factors.values())
    assert size < 0.35 * ended.erase[0]  # the smoothed loss lags a little behind
    assert ended.preserve[-1] > 0.2 * ended.erase[0]


def test_progress_is_told_after_every_iteration():
    told = []
    _trained(Schedule(6), watch=lambda i, so_far: told.append((i, len(so_far.erase))))
    assert told == [(i, i + 1) for i in range(6)]


def test_surgery_never_works_against_what_must_be_kept():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        a, b = (torch.randn(7, 3, generator=generator, dtype=torch.float64) for _ in range(2))
        corrected = without_conflict(a, b)
        assert (corrected * b).sum() >= -1e-12
        if (a * b).sum() >= 0:
            assert torch.equal(corrected, a)
        else:
            assert torch.allclose(corrected, a - (a * b).sum() / (b * b).sum() * b)
    assert torch.equal(without_conflict(a, torch.zeros_like(b)), a)


def test_surgery_steps_along_the_corrected_gradient():
    plain = _trained(Schedule(60, rate=1e-2, preserve_weight=0.0))
    careful = _trained(Schedule(60, rate=1e-2, preserve_weight=0.0, surgery=True))
    assert careful.preserve[-1] < plain.preserve[-1]


def test_joined_edits_add_up():
    first, second = new_factors(SHAPES, 2, 1), new_factors({"a": (6, 4), "c": (2, 2)}, 3, 2)
    first, second = ({k: LowRank(torch.randn_like(f.up), f.down) for k, f in e.items()} for e in (first, second))
    both = joined(first, second)
    assert set(both) == {"a", "b", "c"}
    assert both["a"].down.shape == (5, 4)
    wanted = first["a"].up @ first["a"].down + second["a"].up @ second["a"].down
    assert torch.allclose(both["a"].up @ both["a"].down, wanted)


def test_both_conventions_of_eta_agree():
    concept, anchor = (
        torch.randn(2, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in (1, 2)
    )
    for eta in (0.0, 1.0, 2.5):
        authors = concept - (eta + 1) * (concept - anchor)  # the script's η' = η + 1
        assert torch.allclose(negative_guidance(concept, anchor, eta), authors, atol=1e-12)
    assert torch.equal(negative_guidance(concept, anchor, 0.0), anchor)
