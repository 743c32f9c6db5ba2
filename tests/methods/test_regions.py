"""Regions on grids: exact areas, exact partitions, and a sentence for what is no region."""

from __future__ import annotations

import pytest
import torch
from comfyui_concepts.methods.masks import MaskPyramid
from comfyui_concepts.methods.regions import Box, Region, coverage, partition, resample, shares

HALVES = (Region("left", (Box(0, 0, 0.5, 1),)), Region("right", (Box(0.5, 0, 0.5, 1),)))


def test_a_box_covers_cells_by_their_exact_area():
    raster = Region(boxes=(Box(0.1, 0.25, 0.5, 0.5),)).raster(4, 5)
    torch.testing.assert_close(raster[1], torch.tensor([0.5, 1.0, 1.0, 0.0, 0.0]))
    assert raster[0].sum() == raster[3].sum() == 0
    for height, width in ((7, 9), (64, 96), (3, 3)):
        grid = Region(boxes=(Box(0.123, 0.3, 0.41, 0.27),)).raster(height, width)
        assert float(grid.mean()) == pytest.approx(0.41 * 0.27, abs=1e-6)


def test_boxes_that_overlap_count_once():
    both = Region(boxes=(Box(0, 0, 0.5, 0.5), Box(0.25, 0.25, 0.5, 0.5)))
    assert float(both.raster(7, 7).mean()) == pytest.approx(0.25 + 0.25 - 0.0625, abs=1e-6)


def test_a_mask_keeps_its_area_at_every_size():
    mask = (torch.rand(33, 47, generator=torch.Generator().manual_seed(1)) > 0.6).float()
    region = Region(mask=mask)
    assert torch.equal(region.raster(33, 47), mask)
    for height, width in ((8, 8), (5, 13), (64, 64)):
        assert float(region.raster(height, width).mean()) == pytest.approx(float(mask.mean()), abs=1e-5)


def test_feathering_fades_the_edge_and_not_the_border_of_the_canvas():
    sharp, soft = (Region(boxes=(Box(0, 0, 0.5, 1),), feather=f).raster(32, 32) for f in (0, 0.1))
    assert set(sharp.unique().tolist()) == {0.0, 1.0}
    assert soft[:, 0].min() > 0.999
    assert 0.4 < float(soft[0, 15]) < 1
    assert bool((soft[:, 1:] <= soft[:, :-1] + 1e-6).all())
    torch.testing.assert_close(soft.mean(), sharp.mean(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("overlapping", [False, True])
def test_every_level_of_a_pyramid_adds_up_to_one(soft, overlapping):
    """Spec A8.7."""
    generator = torch.Generator().manual_seed(3)
    masks = (torch.rand(3, 60, 44, generator=generator) > 0.5).float()
    if not overlapping:
        masks = partition(masks)[1:]
    pyramid = MaskPyramid(masks, soft)
    for grid in ((64, 44), (60, 44), (16, 11), (8, 6), (3, 2), (1, 1)):
        level = pyramid.at(*grid)
        assert level.shape == (4, *grid)
        assert torch.equal(level.sum(0), torch.ones(grid)) or (soft and torch.allclose(level.sum(0), torch.ones(grid)))
        assert level.min() >= 0
        if not soft:
            assert set(level.unique().tolist()) <= {0.0, 1.0}


def test_halves_are_halves_at_every_size():
    for side in (16, 8, 4, 2):
        level = MaskPyramid.of(HALVES, 16, 16).at(side, side)
        assert level[0].sum() == 0
        assert level[1].sum() == level[2].sum() == side * side / 2


def test_the_later_region_lies_on_top_and_small_ones_keep_a_cell():
    whole, inner = Region(boxes=(Box(0, 0, 1, 1),)), Region(boxes=(Box(0.4, 0.4, 0.05, 0.05),))
    level = partition(coverage([whole, inner], 4, 4))
    assert level[2].sum() == 1
    assert level[2, 1, 1] == 1
    assert level[1].sum() == 15
    assert torch.equal(partition(coverage([inner, whole], 8, 8))[2].sum(), torch.tensor(63.0))


def test_masks_of_a_batch_are_partitioned_each_for_itself():
    masks = (torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(4)) > 0.7).float()
    level = MaskPyramid(masks).at(4, 4)
    assert level.shape == (2, 4, 4, 4)
    assert torch.equal(level[1], MaskPyramid(masks[1]).at(4, 4))


def test_soft_shares_divide_an_overlap():
    divided = shares(torch.tensor([1.0, 1.0]).view(2, 1, 1))
    assert divided.flatten().tolist() == [0.0, 0.5, 0.5]


def test_resampling_is_exact_on_the_way_down():
    mask = torch.tensor([[1.0, 0.0, 0.0, 1.0]])
    torch.testing.assert_close(resample(mask, 1, 2), torch.tensor([[0.5, 0.5]]))
    torch.testing.assert_close(resample(mask, 1, 3), torch.tensor([[0.75, 0.0, 0.75]]))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Box(0.8, 0, 0.4, 1), "outside of the canvas"),
        (lambda: Box(-0.1, 0, 0.4, 1), "outside of the canvas"),
        (lambda: Box(0, 0, 0, 1), "empty"),
        (lambda: Box(0, 0, float("nan"), 1), "four numbers"),
        (lambda: Region("cat"), "'cat' is empty"),
        (lambda: Region(mask=torch.zeros(4, 4)), "marks nothing"),
        (lambda: Region(mask=torch.full((4, 4), 2.0)), "outside of 0..1"),
        (lambda: Region(mask=torch.ones(1, 4, 4)), "one picture"),
        (lambda: Region(boxes=(Box(0, 0, 1, 1),), feather=3), "feather"),
    ],
)
def test_what_is_no_region_is_refused_in_a_sentence(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
