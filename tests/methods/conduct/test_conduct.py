"""Concept Conductor's arithmetic: the alignment's unit, the windows, and masks that follow planted shapes."""

from __future__ import annotations

import pytest
import torch
from comfyui_concepts.methods.conduct.alignment import alignment_loss, moved_latent
from comfyui_concepts.methods.conduct.refine import (
    attention_of_masks,
    clusters,
    followed_mask,
    k_means,
    masks_at_points,
    rectangle,
    refined_masks,
)
from comfyui_concepts.methods.conduct.settings import Conduct, Meeting


def _planted(owner: torch.Tensor, noise: float = 0.0) -> torch.Tensor:
    """A self-attention (tokens, tokens) in which every token looks at those of its own owner."""
    labels = owner.flatten()
    attention = (labels[:, None] == labels[None]).double()
    attention += noise * torch.rand(attention.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return attention / attention.sum(1, keepdim=True)


@pytest.fixture
def owner():
    """(8, 12): background 0, a left object 1, a right object 2."""
    grid = torch.zeros(8, 12, dtype=torch.long)
    grid[2:6, 1:5], grid[3:7, 7:11] = 1, 2
    grid[2, 1] = 0  # not a rectangle
    return grid


def test_the_loss_has_one_unit_for_all_sizes_and_pictures_do_not_meet():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(2, 16, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    each = alignment_loss(a, b)
    assert each.shape == (2,)
    torch.testing.assert_close(each[0], ((a[0] - b[0]) ** 2).mean() * 16)  # the reference's mean times its tokens
    torch.testing.assert_close(alignment_loss(a.repeat(1, 2, 1), b.repeat(1, 2, 1)), 2 * each)
    assert alignment_loss(a, a).abs().max() == 0


@pytest.mark.parametrize("levels", [(1.0, 3.0), (0.3, 0.7)])  # of a UNet, of a flow model
@torch.inference_mode(False)  # importing the host leaves gradients off
def test_a_step_of_the_latent_is_the_step_of_the_latent_at_unit_variance(levels):
    """Spec A5.6: x' = x − w (signal² + noise²) ∂L/∂x equals z' = z − w ∂L/∂z."""
    weight = 0.2
    z = torch.randn(1, 4, 8, 8, dtype=torch.float64, requires_grad=True)
    scale = (levels[0] ** 2 + levels[1] ** 2) ** 0.5
    x = (z.detach() * scale).requires_grad_(True)
    (of_z,) = torch.autograd.grad((z**3).sum(), z)
    (of_x,) = torch.autograd.grad(((x / scale) ** 3).sum(), x)
    torch.testing.assert_close(moved_latent(x, of_x, levels, weight) / scale, z - weight * of_z, rtol=0, atol=1e-12)


def test_the_windows_are_the_papers_in_two_hundred_steps():
    """Spec A8.9: 61 gradient steps and 7 refinements of SD 1.5 at the timesteps 996, 991, …"""
    progress, paper, last, refinements = [1 - (996 - 5 * n) / 999 for n in range(200)], Conduct(), None, 0
    assert sum(map(paper.guides_at, progress)) == 61
    for now in progress:
        if paper.refines_at(now, last):
            refinements, last = refinements + 1, now
    assert refinements == 7
    assert paper.steps_each(61) == 1
    assert paper.steps_each(9) == 7
    assert Conduct(iterations=2).steps_each(9) == 2
    assert not any(map(Conduct(guidance_weight=0.0).guides_at, progress))
    assert not any(Conduct(refine_start=0.3, refine_end=0.3).refines_at(p, None) for p in progress)


def test_a_range_of_blocks_means_the_same_at_any_depth():
    for count in range(1, 12):
        assert Meeting().among(count) == range(count)
        assert not Meeting(start=0.4, end=0.4).among(count)
        parts = [Meeting(start=n / 4, end=(n + 1) / 4).among(count) for n in range(4)]
        assert all(parts)  # never nothing, however narrow
        if count >= 4:
            assert [n for part in parts for n in part] == list(range(count))
    assert Meeting(start=0.25, end=0.5).among(8) == range(2, 4)
    assert Meeting(start=0.99, end=1.0).among(3) == range(2, 3)
    assert not Conduct(block_end=0.0).injects_at(0.5)


def test_the_cluster_that_was_planted_is_found_and_the_result_repeats(owner):
    attention = _planted(owner, 0.3)
    pool = clusters(attention, range(3, 6))
    for index in (1, 2):
        shape = owner == index
        start = rectangle(shape)
        start[:, :2] = False  # a mask that only roughly lies there
        assert torch.equal(followed_mask(pool, start, 0.3), shape)
    assert torch.equal(k_means(attention, 4), k_means(attention, 4))


def test_a_shape_that_overlaps_too_little_is_not_trusted(owner):
    pool = clusters(_planted(owner), [3])
    small = torch.zeros(8, 12, dtype=torch.bool)
    small[2:4, 2], small[3, 3] = True, True
    assert torch.equal(followed_mask(pool, small, 0.7), rectangle(small))
    assert torch.equal(followed_mask(pool, small, 0.0), owner == 1)
    assert torch.equal(followed_mask(pool, owner == 1, 0.0, rectangles=True), rectangle(owner == 1))
    nowhere = torch.zeros(8, 12, dtype=torch.bool)
    assert not followed_mask(pool, nowhere, 0.0).any()  # the reference fails here (spec A7.10)


def test_refined_masks_stay_apart_and_stay_where_clusters_are_the_masks(owner):
    masks = torch.stack([owner == 1, owner == 2])
    assert torch.equal(refined_masks(masks, masks, masks), masks)
    generator = torch.Generator().manual_seed(2)
    for _ in range(50):
        own, base = (torch.rand(2, 8, 12, generator=generator) < 0.4 for _ in range(2))
        new = refined_masks(masks, own, base)
        assert new.sum(0).max() <= 1
        clash = (own | base).sum(0) > 1
        assert torch.equal(new[:, clash], masks[:, clash])
        assert torch.equal(new[:, ~clash], (own | base)[:, ~clash])


def test_clicks_take_the_shapes_they_lie_in(owner):
    masks = masks_at_points(_planted(owner, 0.05), (8, 12), [(2.5 / 12, 4 / 8), (9 / 12, 5 / 8)])
    assert (masks[0] & (owner == 1)).sum() > 0
    assert not (masks[0] & masks[1]).any()
    assert not (masks[0] & (owner == 2)).any()
    assert not (masks[1] & (owner == 1)).any()


def test_fewer_rows_than_clusters_is_no_error():
    assert len(clusters(torch.eye(2), range(3, 6))) >= 2
    assert torch.equal(k_means(torch.ones(5, 3), 3), torch.zeros(5, dtype=torch.long))


def test_a_mask_looks_where_its_owner_is_and_an_empty_one_nowhere(owner):
    part, nobody = owner == 1, torch.zeros_like(owner, dtype=torch.bool)
    part[4:] = False  # it need not be the whole shape
    seen = attention_of_masks(_planted(owner).expand(2, -1, -1), torch.stack([part, nobody]))
    assert torch.allclose(seen[0], (owner == 1).double() / (owner == 1).sum())
    assert not seen[1].any()
