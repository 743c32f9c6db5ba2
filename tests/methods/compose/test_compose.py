"""LoRA-Composer in numbers one can work out by hand: masks, losses, the first noise, and when steps end (spec B8)."""

from __future__ import annotations

import math

import pytest
import torch
from comfyui_concepts.methods.compose.automatic import found_regions
from comfyui_concepts.methods.compose.losses import (
    bell,
    box_loss,
    composer_loss,
    fill_loss,
    region_loss,
    smoothed,
)
from comfyui_concepts.methods.compose.reinit import Window, around, copied, restored, scaled, sources, swapped
from comfyui_concepts.methods.compose.settings import Compose, LossWeights
from comfyui_concepts.methods.compose.stop import StopRule
from comfyui_concepts.methods.masks import MaskPyramid


def _boxes(*boxes, size=8):
    covered = torch.zeros(len(boxes), size, size)
    for n, (y0, y1, x0, x1) in enumerate(boxes):
        covered[n, y0:y1, x0:x1] = 1
    return covered


def test_shares_add_up_on_every_grid_and_overlaps_are_divided():
    grids = MaskPyramid(_boxes((0, 8, 0, 5), (0, 8, 3, 8)), overlapping=True)
    for grid in ((8, 8), (4, 4), (3, 5), (1, 1)):
        weights = grids.weights(grid)
        assert torch.allclose(weights.sum(0), torch.ones(grid[0] * grid[1]))
    assert grids.weights((8, 8)).view(3, 8, 8)[:, 0].tolist() == [
        [0] * 8,
        [1, 1, 1, 0.5, 0.5, 0, 0, 0],
        [0, 0, 0, 0.5, 0.5, 1, 1, 1],
    ]


def test_a_tiny_region_keeps_a_token_at_the_coarsest_grid():
    grids = MaskPyramid(_boxes((6, 7, 6, 7)), overlapping=True)
    assert [len(t) for t in grids.tokens((2, 2))] == [3, 1]
    assert grids.tokens((2, 2))[1].tolist() == [3]


def test_a_region_reads_itself_and_the_background_also_where_regions_overlap():
    keys = MaskPyramid(_boxes((0, 8, 0, 5), (0, 8, 3, 8)), overlapping=True).readable((8, 8))
    assert {int(k) % 8 for k in keys[0]} == set(range(5))  # own tokens stay, though another holds them too
    assert all(len(k) for k in keys)
    assert {
        int(k) % 8 for k in MaskPyramid(_boxes((0, 8, 0, 2), (0, 8, 6, 8)), overlapping=True).readable((8, 8))[0]
    } == set(range(6))


def test_soft_regions_fade():
    covered = torch.full((1, 4, 4), 0.25)
    covered[0, :, 2:] = 1.0
    assert MaskPyramid(covered, soft=True, overlapping=True).weights((4, 4)).view(2, 4, 4)[:, 0].tolist() == [
        [0.75, 0.75, 0, 0],
        [0.25, 0.25, 1, 1],
    ]


INSIDE = _boxes((2, 7, 1, 6))[0].bool()  # 5 × 5 of 8 × 8


def test_the_bell_is_one_in_the_middle_and_has_the_references_edge_and_corner():
    values = bell(INSIDE)
    assert values[4, 3] == 1
    assert float(values[4, 1]) == pytest.approx(math.exp(-0.5))
    assert float(values[2, 1]) == pytest.approx(math.exp(-1.0))
    assert values[~INSIDE].sum() == 0


def test_a_planted_map_gives_what_one_works_out_by_hand():
    """One hot token in the middle: of the 5 highest (a fifth of 25) one is 0.8; one row and one column reach 0.8."""
    maps = torch.zeros(1, 1, 8, 8, dtype=torch.float64)
    maps[..., 4, 3] = 0.8
    assert float(box_loss(maps, INSIDE)) == pytest.approx(1 - 0.8 / 5)
    assert float(fill_loss(maps, INSIDE)) == pytest.approx(2 * (4 + 0.2) / 8)
    attention = torch.zeros(1, 64, 64, dtype=torch.float64)
    attention[0, 4 * 8 + 3, 0] = 0.5  # the middle of the region reads a corner of the canvas
    attention[0, 0, 4 * 8 + 3] = 0.9  # what the background reads does not count
    attention[0, 4 * 8 + 3, 4 * 8 + 3] = 0.9  # nor what the region reads of itself
    assert float(region_loss(attention, INSIDE)) == pytest.approx(0.5 / 5)
    weights = LossWeights(box=3.0, fill=2.0, region=5.0)
    smooth = smoothed(maps)
    wanted = 3 * box_loss(smooth, INSIDE) + 2 * fill_loss(smooth, INSIDE) + 5 * 0.1
    assert torch.allclose(composer_loss([maps], attention, INSIDE[None], weights), wanted[:, 0])


def test_the_smoothing_keeps_the_sum_and_its_weights_are_those_of_sigma_half():
    maps = torch.zeros(8, 8, dtype=torch.float64)
    maps[4, 4] = 1
    assert float(smoothed(maps).sum()) == pytest.approx(1, abs=1e-6)
    assert float(smoothed(maps)[4, 4]) == pytest.approx(0.576**2, abs=1e-3)
    assert float(smoothed(maps)[3, 4]) == pytest.approx(0.212 * 0.576, abs=1e-3)


def test_a_full_map_costs_nothing_in_its_box_and_regions_may_come_in_any_order():
    assert float(box_loss(torch.full((8, 8), 4.0), INSIDE)) == 0
    generator = torch.Generator().manual_seed(0)
    maps = [torch.rand(2, 3, 8, 8, generator=generator) for _ in range(2)]
    inside = _boxes((0, 4, 0, 4), (2, 8, 4, 8)).bool()
    there = composer_loss(maps, None, inside, LossWeights())
    assert there.shape == (2,)
    assert torch.allclose(composer_loss(maps[::-1], None, inside.flip(0), LossWeights()), there)


def test_the_losses_of_three_words_are_their_mean_or_as_in_the_reference_their_sum():
    generator = torch.Generator().manual_seed(0)
    maps, attention = [torch.rand(2, 3, 8, 8, generator=generator)], torch.rand(2, 64, 64, generator=generator)
    mean, both, region = (
        composer_loss(maps, attention, INSIDE[None], weights)
        for weights in (LossWeights(region=0.0), LossWeights(words="sum"), LossWeights(box=0.0, fill=0.0))
    )
    torch.testing.assert_close(both, 3 * mean + region)  # the region loss knows no words
    with pytest.raises(ValueError, match="no words 'both'"):
        Compose(weights=LossWeights(words="both"))


def test_the_window_where_a_concept_is_hottest_is_the_one_that_moves():
    hot = torch.zeros(8, 8)
    hot[0:3, 5:8] = 1
    boxes = [Window(4, 0, 3, 3)]
    assert sources([hot], boxes) == [Window(0, 5, 3, 3)]
    hot[4:7, 0:3] = 2
    assert sources([hot], boxes) == boxes  # its own box is the hottest: nothing moves
    two = [Window(4, 0, 3, 3), Window(0, 5, 3, 3)]
    found = sources([torch.zeros(8, 8).index_put((torch.tensor(0), torch.tensor(6)), torch.tensor(9.0))] * 2, two)
    assert found[1] == two[1]
    assert not found[0].overlaps(two[1])  # another region's box is not robbed


@pytest.mark.parametrize("source", [Window(0, 5, 3, 3), Window(3, 1, 3, 3), Window(4, 0, 3, 3)])
def test_swapping_is_a_permutation_also_where_windows_overlap(source):
    noise = torch.arange(128.0).view(2, 8, 8)
    box = Window(4, 0, 3, 3)
    out = swapped(noise, source, box)
    assert torch.equal(out.flatten(1).sort().values, noise.flatten(1))
    assert torch.equal(out[:, 4:7, 0:3], noise[(slice(None), *source.cells())])
    if source == box:
        assert torch.equal(out, noise)


def test_the_references_copy_doubles_a_window_and_keeps_mean_and_deviation():
    noise = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    out = copied(noise, Window(0, 5, 3, 3), Window(4, 0, 3, 3))
    assert torch.equal(out[:, 4:7, 0:3], out[:, 0:3, 5:8])
    back = restored(out, noise)
    assert torch.allclose(torch.stack([back.mean(), back.std()]), torch.stack([noise.mean(), noise.std()]), atol=1e-12)
    assert torch.equal(restored(torch.zeros(4, 8, 8), torch.zeros(4, 8, 8)), torch.zeros(4, 8, 8))


def test_windows_are_brought_to_the_latent_and_cut_at_its_edge():
    assert around(INSIDE) == Window(2, 1, 5, 5)
    assert scaled(Window(2, 1, 2, 2), 4, 15, 16) == Window(8, 4, 7, 8)


def _steps(rule, losses):
    stop, count = StopRule(rule), 0
    for loss in losses:
        count += 1
        if not stop.goes_on(torch.tensor([loss]))[0]:
            break
    return count


def test_the_references_rule_ends_at_the_first_rise_after_five_steps_and_takes_that_step():
    falling = [10.0 - n for n in range(9)]
    assert _steps("rise", falling) == 9
    assert _steps("rise", [1.0, 2.0, 3.0, 2.9, 2.8, 2.9, 1.0]) == 6
    assert _steps("never", [1.0] * 40) == 40


def test_patience_outlives_one_rise_and_ends_on_a_plateau():
    assert _steps("patience", [10, 9, 8, 7, 6, 6.5, 5, 4, 4.5, 3]) == 10
    assert _steps("patience", [10.0, 9.0, 8.0, *[8.0] * 9]) == 6


def test_each_picture_of_a_batch_ends_for_itself():
    stop = StopRule("rise")
    for n in range(5):
        stop.goes_on(torch.tensor([5.0 - n, 5.0 - n]))
    assert stop.goes_on(torch.tensor([9.0, 0.5])).tolist() == [False, True]


def test_the_rate_falls_as_the_references():
    assert Compose(enhancement=20.0, relative=False).rate(0.0) == 20.0
    assert Compose(enhancement=20.0, relative=False).rate(1.0) == pytest.approx(14.142, abs=1e-3)
    with pytest.raises(ValueError, match="no stop 'late'"):
        Compose(stop="late")


def test_regions_are_found_where_the_concepts_look():
    """Two blobs on noise, of different brightness: each concept gets its own, not the background or the other's."""
    generator = torch.Generator().manual_seed(1)
    maps = 0.1 + 0.02 * torch.rand(2, 16, 16, generator=generator)
    maps[0, 4:12, 1:7] += 1.0
    maps[0, 4:12, 9:15] += 0.5
    maps[1, 4:12, 1:7] += 0.1
    maps[1, 4:12, 9:15] += 0.2
    found = found_regions(maps)
    assert found.sum(0).max() <= 1
    assert found[0, 5:11, 2:6].all()
    assert found[1, 5:11, 10:14].all()
    assert found[0, 4:12, 9:15].sum() == found[1, 4:12, 1:7].sum() == 0
