"""The overlap of attention maps and the step along its gradient."""

from __future__ import annotations

import pytest
import torch
from comfyui_concepts.methods.anagram.overlap import descent, overlap, overlaps, segregation, target_overlap


def _maps(*seeds, shape=(2, 8, 8)):
    return [torch.rand(shape, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in seeds]


def test_equal_maps_overlap_by_a_half_and_maps_apart_by_nothing():
    (a,) = _maps(1)
    left, right = a.clone(), a.clone()
    left[..., 4:], right[..., :4] = 0, 0
    torch.testing.assert_close(overlap(a, a), torch.full((2,), 0.5, dtype=torch.float64))
    assert overlap(left, right).tolist() == [0.0, 0.0]


def test_mass_does_not_count():
    a, b = _maps(1, 2)
    torch.testing.assert_close(overlap(7 * a, 0.1 * b), overlap(a, b))


def test_overlap_is_half_of_one_minus_total_variation():
    a, b = (m / m.sum((-2, -1), keepdim=True) for m in _maps(1, 2))
    torch.testing.assert_close(overlap(a, b), (1 - (a - b).abs().sum((-2, -1)) / 2) / 2)


def test_the_loss_is_the_mean_distance_from_the_target_over_pairs():
    maps = _maps(1, 2, 3)
    by_hand = sum((0.40 - overlap(maps[i], maps[j])).abs() for i, j in ((0, 1), (0, 2), (1, 2))) / 3
    torch.testing.assert_close(segregation(maps), by_hand)
    assert overlaps(maps).shape == (2, 3)
    assert [target_overlap(n) for n in (2, 3, 4)] == pytest.approx([0.45, 0.40, 0.35])


def test_the_gradient_of_the_loss_is_that_of_finite_differences():
    with torch.inference_mode(False), torch.enable_grad():
        maps = [m.requires_grad_(True) for m in _maps(1, 2, 3, shape=(1, 4, 4))]
        assert torch.autograd.gradcheck(lambda *m: segregation(m), maps, eps=1e-6, rtol=1e-2, atol=1e-8)


def test_ten_steps_halve_the_loss():
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
        peaks = torch.linspace(-3, 3, 8, dtype=torch.float64)

        def maps(z):
            return [(z[:, i] + (-1) ** i * peaks).flatten(1).softmax(-1).unflatten(-1, (8, 8)) for i in (0, 1)]

        first = segregation(maps(x))
        for _ in range(10):
            z = x.clone().requires_grad_(True)
            loss = segregation(maps(z))
            (gradient,) = torch.autograd.grad(loss.sum(), z)
            x = x + descent(x, gradient, loss.detach(), 0.2)
        assert (segregation(maps(x)) < 0.5 * first).all()


def test_a_step_has_the_length_that_was_asked_and_stops_where_it_is_close():
    x, gradient = _maps(1, 2, shape=(2, 4, 8, 8))
    moved = descent(x, 1e-9 * gradient, torch.tensor([0.1, 0.001]), 0.05)
    assert moved[0].square().mean().sqrt() == pytest.approx(0.05 * x[0].square().mean().sqrt())
    half = descent(x, 1e-9 * gradient, torch.tensor([0.05, 0.4]), 0.05)
    torch.testing.assert_close(half[0], moved[0] / 2)
    assert half[1].square().mean().sqrt() == pytest.approx(0.05 * x[1].square().mean().sqrt())
    assert (moved[0] * gradient[0]).sum() < 0
    assert (moved[1] == 0).all()
