"""The editor's text read strictly, and its strokes as masks."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from comfyui_concepts.methods.drawing import MOST_TEXT, Stroke, paint, parse_drawing

CASES = json.loads((Path(__file__).parent.parent / "web" / "documents.json").read_text())


def by_name(case):
    return case["name"]


def _text(*regions):
    return json.dumps({"version": 1, "regions": regions})


def _stroke(radius, *points, erase=False):
    return {"radius": radius, "points": [n for p in points for n in p], "erase": erase}


@pytest.mark.parametrize("case", CASES["accepted"], ids=by_name)
def test_a_sound_drawing_is_read(case):
    wanted = json.loads(case["text"])["regions"] if case["text"].strip() else []
    drawn = parse_drawing(case["text"])
    assert [d.label for d in drawn] == [r.get("label", "") for r in wanted]
    assert [len(d.boxes) for d in drawn] == [len(r.get("boxes", [])) for r in wanted]
    for shape in drawn:
        shape.region(64, 96)


@pytest.mark.parametrize("case", CASES["refused"], ids=by_name)
def test_any_other_text_gets_the_editors_sentence(case):
    with pytest.raises(ValueError, match=case["says"]) as refusal:
        parse_drawing(case["text"])
    assert len(str(refusal.value)) < 300


@pytest.mark.parametrize("value", [None, 5, [], {}])
def test_what_is_no_text_is_refused(value):
    with pytest.raises(ValueError, match="must be a JSON text"):
        parse_drawing(value)


def test_endless_texts_are_refused_at_once():
    with pytest.raises(ValueError, match="at most 1000000 are read"):
        parse_drawing(" " * (MOST_TEXT + 1))
    with pytest.raises(ValueError, match="no JSON"):
        parse_drawing("[" * 200_000)
    heavy = [_stroke(0.01, *[(0.5, 0.5)] * 4000) for _ in range(6)]
    with pytest.raises(ValueError, match="24000 points together"):
        parse_drawing(_text({"label": "a", "strokes": heavy}))


def test_boxes_alone_stay_exact():
    (drawn,) = parse_drawing(_text({"label": "cat", "boxes": [[0.25, 0.5, 0.5, 0.25]]}))
    region = drawn.region(48, 64)
    assert region.mask is None
    wanted = torch.zeros(48, 64)
    wanted[24:36, 16:48] = 1
    assert torch.equal(region.raster(48, 64), wanted)


@pytest.mark.parametrize(("height", "width"), [(128, 128), (96, 160), (160, 96), (2048, 1024)])
def test_a_dot_is_a_disc_whatever_the_proportions(height, width):
    mask = paint([Stroke(0.25, ((0.5, 0.5),))], (), height, width)
    rows, columns = mask.shape
    assert max(rows, columns) <= 1024
    assert abs(rows / columns - height / width) < 0.02
    across, down = (mask > 0.5).any(0).sum(), (mask > 0.5).any(1).sum()
    assert abs(int(across) - int(down)) <= 1
    radius = 0.25 * min(rows, columns)
    assert mask.sum() == pytest.approx(torch.pi * radius**2, rel=0.02)


def test_a_stroke_covers_what_lies_within_its_radius():
    """Against the plainest version: the distance of every pixel to every piece of the line."""
    points = ((0.2, 0.3), (0.7, 0.4), (0.5, 0.8))
    mask = paint([Stroke(0.08, points)], (), 128, 128)
    grid = (torch.arange(128, dtype=torch.float64) + 0.5) / 128
    spot = torch.stack(torch.meshgrid(grid, grid, indexing="xy"), -1)  # (128, 128, 2) as x, y
    away = torch.full((128, 128), torch.inf, dtype=torch.float64)
    for start, end in itertools.pairwise(points):
        a, b = torch.tensor(start, dtype=torch.float64), torch.tensor(end, dtype=torch.float64)
        along = (((spot - a) @ (b - a)) / ((b - a) @ (b - a))).clamp(0, 1)
        away = torch.minimum(away, (spot - a - along[..., None] * (b - a)).norm(dim=-1))
    clear = (away - 0.08).abs() > 1.5 / 128  # away from the edge there is no doubt
    assert torch.equal((mask > 0.5)[clear], (away < 0.08)[clear])


def test_the_eraser_takes_from_boxes_and_strokes_before_it_only():
    strokes = [_stroke(0.2, (0.5, 0.5), erase=True), _stroke(0.05, (0.5, 0.5))]
    (drawn,) = parse_drawing(_text({"label": "ring", "boxes": [[0, 0, 1, 1]], "strokes": strokes}))
    mask = drawn.region(128, 128).raster(128, 128)
    assert mask[64, 64] == 1  # painted again
    assert mask[64, 64 + 18] == 0  # wiped
    assert mask[2, 2] == 1  # the box


def test_a_region_wiped_out_gets_a_sentence():
    wiped = {"label": "cat", "boxes": [[0.4, 0.4, 0.1, 0.1]], "strokes": [_stroke(0.5, (0.5, 0.5), erase=True)]}
    (drawn,) = parse_drawing(_text(wiped))
    with pytest.raises(ValueError, match="Nothing is left of the region 'cat'.*delete it"):
        drawn.region(64, 64)
