"""Boxes of other nodes become regions and come back: every shape they have, and a sentence for what is no box."""

from __future__ import annotations

import json

import numpy
import pytest
import torch
from comfyui_concepts.methods.boxes import bounding_boxes, box_of_element, box_of_pixels, layout_elements, regions_from
from comfyui_concepts.methods.drawing import parse_drawing
from comfyui_concepts.methods.regions import Box, Caption, Region

SIZES = ((512, 512), (64, 96), (1000, 1333), (17, 4099))  # height, width
NUMBERS = (int, float, numpy.int64, numpy.int32, numpy.uint8, numpy.float16, numpy.float32, numpy.float64, numpy.array)
LAYOUT = [
    {"type": "obj", "bbox": [0, 0, 1000, 1000], "desc": "a meadow"},
    {"type": "obj", "bbox": [250, 125, 750, 500], "desc": "a lion", "color_palette": ["#AA5500", "#FFFFFF"]},
    {"type": "text", "bbox": [1, 3, 98, 997], "text": "MOSS", "desc": "large cream letters"},
    {"type": "text", "bbox": [900, 900, 901, 1000], "text": "2026", "desc": ""},
    {"type": "obj", "bbox": [333, 667, 999, 668], "desc": ""},
]


def _pixels(x, y, width, height, **more):
    return {"x": x, "y": y, "width": width, "height": height, **more}


def _places(boxes):
    return [[box[side] for side in ("x", "y", "width", "height")] for box in boxes]


@pytest.mark.parametrize("kind", [*NUMBERS, torch.tensor, lambda n: torch.tensor([n], dtype=torch.bfloat16)])
def test_numbers_are_read_whoever_made_them(kind):
    box = box_of_pixels({side: kind(n) for side, n in _pixels(0, 8, 32, 16).items()}, 64, 64)
    assert box == Box(0, 0.125, 0.5, 0.25)
    assert box_of_element({"bbox": [kind(n) for n in (0, 10, 20, 110)]}) == Box(0.01, 0, 0.1, 0.02)


@pytest.mark.parametrize(
    "number", [None, "9", "", True, [9], {}, float("nan"), float("inf"), 10**400, 1j, numpy.zeros(2), torch.zeros(2)]
)
def test_what_is_no_number_is_refused(number):
    with pytest.raises(ValueError, match="x, y, width and height, in pixels"):
        box_of_pixels(_pixels(0, 0, number, 9), 64, 64)
    with pytest.raises(ValueError, match=r"top, left, bottom, right\], from 0 to 1000"):
        box_of_element({"bbox": [0, 0, number, 9]})


@pytest.mark.parametrize("box", [None, 3, "box", [], {}, {"x": 0, "y": 0, "width": 9}])
def test_a_bounding_box_of_the_wrong_kind_is_refused(box):
    with pytest.raises(ValueError, match="x, y, width and height, in pixels"):
        box_of_pixels(box, 64, 64)


@pytest.mark.parametrize("bbox", [None, 5, "0 0 9 9", [], [0, 0, 9], [0, 0, 9, 9, 9], {"x": 0}])
def test_an_element_without_four_numbers_is_refused(bbox):
    with pytest.raises(ValueError, match=r"must be \[top, left, bottom, right\]"):
        regions_from([{"bbox": bbox}], None, 64, 64)


def test_corners_in_any_order_mark_the_same_place():
    assert box_of_pixels(_pixels(48, 40, -32, -24), 64, 64) == box_of_pixels(_pixels(16, 16, 32, 24), 64, 64)
    assert box_of_element({"bbox": [750, 500, 250, 0]}) == box_of_element({"bbox": [250, 0, 750, 500]})


@pytest.mark.parametrize(
    "box", [_pixels(64, 0, 9, 9), _pixels(0, -20, 9, 20), _pixels(5, 5, 0, 9), _pixels(5, 5, 9, -0.0)]
)
def test_a_box_that_covers_nothing_is_refused(box):
    with pytest.raises(ValueError, match="outside of the canvas of 64 × 48, or is empty; take it out"):
        box_of_pixels(box, 48, 64)


@pytest.mark.parametrize("bbox", [[0, 0, 0, 1000], [1000, 0, 1200, 9], [-9, 0, 0, 9]])
def test_an_element_that_covers_nothing_is_refused(bbox):
    with pytest.raises(ValueError, match="is empty or outside of 0 to 1000"):
        box_of_element({"bbox": bbox})


def test_what_leaves_the_canvas_is_cut():
    regions = regions_from([_pixels(-16.5, 32, 48.5, 500), {"bbox": [-50, 900, 500, 1400]}], None, 64, 128)
    assert _places(bounding_boxes(regions, 64, 128)[0]) == [[0, 32, 32, 32], [115, 0, 13, 32]]
    assert [e["bbox"] for e in layout_elements(regions)] == [[500, 0, 1000, 250], [0, 900, 500, 1000]]


@pytest.mark.parametrize("nothing", [None, [], [[]], [[], []], (), [None], "", "  ", "[]", "null", ["", None]])
def test_nothing_is_no_region(nothing):
    assert regions_from(nothing, None, 64, 64) == []
    assert bounding_boxes([], 64, 64) == layout_elements([]) == []


def test_a_box_alone_a_list_a_batch_and_a_text_are_the_same():
    one, two = _pixels(0, 0, 32, 64), _pixels(32, 0, 32, 64)
    for boxes in ([one, two], (one, two), [[one, two]], [[one], [two]], [[[one]], two], json.dumps([[one], two])):
        assert _places(bounding_boxes(regions_from(boxes, None, 64, 64), 64, 64)[0]) == [
            [0, 0, 32, 64],
            [32, 0, 32, 64],
        ]
    assert len(regions_from(one, None, 64, 64)) == len(regions_from(json.dumps(LAYOUT[1]), None, 64, 64)) == 1


@pytest.mark.parametrize("text", ["no JSON", "[", '{"x": 0', "[" * 200_000])
def test_a_text_that_is_no_json_is_refused(text):
    with pytest.raises(ValueError, match="no JSON; connect boxes, elements") as refusal:
        regions_from(text, None, 64, 64)
    assert len(str(refusal.value)) < 300


@pytest.mark.parametrize("value", [5, '"a lion"', '["a", "b"]', {"label": "lion"}, torch.zeros(2, 4)])
def test_anything_else_is_refused(value):
    with pytest.raises(ValueError, match="no JSON|must have the numbers x, y, width and height"):
        regions_from(value, None, 64, 64)


def test_lists_in_lists_may_be_as_deep_as_they_like():
    boxes = _pixels(0, 0, 9, 9)
    for _ in range(5000):
        boxes = [boxes]
    assert len(regions_from(boxes, None, 64, 64)) == 1


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_boxes_in_whole_pixels_come_back_to_the_pixel(height, width):
    pick = numpy.random.default_rng(height)
    edges = [sorted(pick.choice(side + 1, 2, replace=False)) for _ in range(32) for side in (width, height)]
    spans = zip(edges[::2], edges[1::2], strict=True)
    boxes = [_pixels(left, top, right - left, bottom - top) for (left, right), (top, bottom) in spans]
    regions = regions_from(boxes, None, height, width)
    (back,) = bounding_boxes(regions, height, width)
    assert _places(back) == _places(boxes)
    assert all(isinstance(number, int) for place in _places(back) for number in place)
    again = regions_from([back], None, height, width)
    assert [r.label for r in again] == [r.label for r in regions]
    for region, same in zip(regions, again, strict=True):
        assert torch.equal(region.raster(height // 8 + 1, width // 8 + 1), same.raster(height // 8 + 1, width // 8 + 1))


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_elements_come_back_as_they_are_on_every_canvas(height, width):
    regions = regions_from(LAYOUT, None, height, width)
    assert [r.label for r in regions] == ["a meadow", "a lion", "large cream letters", "2026", "box 5"]
    assert layout_elements(regions) == LAYOUT
    assert layout_elements(regions_from(json.dumps(LAYOUT), None, height, width)) == LAYOUT


def test_captions_travel_with_bounding_boxes_too():
    regions = regions_from(LAYOUT, None, 1000, 1000)
    (boxes,) = bounding_boxes(regions, 1000, 1000)
    assert boxes[1] == _pixels(125, 250, 375, 500, label="a lion") | {
        "metadata": {"type": "obj", "text": "", "desc": "a lion", "palette": ["#AA5500", "#FFFFFF"]}
    }
    assert layout_elements(regions_from([boxes], None, 1000, 1000)) == LAYOUT
    assert json.loads(json.dumps(boxes)) == boxes


def test_edges_between_pixels_go_to_the_nearest_and_neighbours_stay_neighbours():
    third = [Region(str(n), (Box(n / 3, 0, 1 / 3, 1),)) for n in range(3)]
    assert _places(bounding_boxes(third, 64, 100)[0]) == [[0, 0, 33, 64], [33, 0, 34, 64], [67, 0, 33, 64]]
    assert [e["bbox"][1::2] for e in layout_elements(third)] == [[0, 333], [333, 667], [667, 1000]]


@pytest.mark.parametrize("place", [0.0, 0.4999, 0.5, 0.9999])
def test_the_smallest_region_has_one_pixel_and_one_step(place):
    speck = [Region("speck", (Box(place, place, 1e-5, 1e-5),))]
    (((x, y, width, height),),) = (_places(frame) for frame in bounding_boxes(speck, 64, 64))
    assert (width, height) == (1, 1)
    assert x == y == int(place * 64)
    (top, left, bottom, right) = layout_elements(speck)[0]["bbox"]
    assert (bottom - top, right - left) == (1, 1)
    assert right <= 1000


def test_several_boxes_and_paint_have_one_box_around_them():
    mask = torch.zeros(8, 16)
    mask[6, 12], mask[0, 0] = 0.5, 0.49
    both = Region("a", (Box(0.25, 0.25, 0.125, 0.125), Box(0.5, 0.5, 0.125, 0.125)), mask, 0.2)
    assert both.bounds() == Box(0.25, 0.25, 0.5625, 0.625)
    assert Region("b", (), mask).bounds() == Box(0.75, 0.75, 0.0625, 0.125)
    assert Region("c", (Box(0, 0, 0.5, 0.5),), torch.full((4, 4), 0.4)).bounds() == Box(0, 0, 0.5, 0.5)
    assert Region("d", (), torch.ones(3, 5)).bounds() == Box(0, 0, 1, 1)


def test_a_painted_and_erased_region_has_the_box_of_what_is_left():
    wiped = {"radius": 0.3, "points": [0, 0.5], "erase": True}
    drawing = {"version": 1, "regions": [{"label": "half", "boxes": [[0, 0.4, 1, 0.2]], "strokes": [wiped]}]}
    (drawn,) = parse_drawing(json.dumps(drawing))
    ((box,),) = bounding_boxes([drawn.region(100, 100)], 100, 100)
    assert 26 <= box["x"] <= 31
    assert (box["y"], box["x"] + box["width"], box["height"]) == (40, 100, 20)


@pytest.mark.parametrize(
    ("box", "label", "caption"),
    [
        ({}, "box 1", Caption()),
        ({"label": "person", "score": 0.9}, "person", Caption("person")),
        ({"metadata": {"type": "obj", "text": "", "desc": "", "palette": []}}, "box 1", Caption()),
        ({"metadata": {"name": "sky", "desc": "a wide sky", "palette": None}}, "sky", Caption("a wide sky")),
        ({"metadata": {"name": None, "desc": 5, "type": "text", "text": "HI"}}, "HI", Caption("", "HI")),
        ({"metadata": "anything", "label": None}, "box 1", Caption()),
        ({"label": "", "metadata": {"desc": ""}}, "", Caption()),
        ({"label": "a", "metadata": {"desc": "tabby", "palette": ["#FFF", 3]}}, "a", Caption("tabby", None, ("#FFF",))),
    ],
)  # fmt: skip
def test_what_a_box_says_names_its_region(box, label, caption):
    (region,) = regions_from([[_pixels(0, 0, 9, 9, **box)]], None, 64, 64)
    assert (region.label, region.caption) == (label, caption)


def test_labels_describe_what_is_drawn_and_numbers_describe_nothing():
    drawn = Region("lion", (Box(0, 0, 1, 1),))
    linked = regions_from([_pixels(0, 0, 9, 9)], torch.ones(1, 4, 4), 64, 64)
    assert [r.label for r in linked] == ["box 1", "mask 1"]
    assert [e["desc"] for e in layout_elements([drawn, *linked])] == ["lion", "", ""]
