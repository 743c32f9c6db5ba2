"""Regions from the editor, from boxes and from masks, as the graph hands them on."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from comfyui_concepts.host.lora.concept import Concept
from comfyui_concepts.methods.regions import Box, Region
from comfyui_concepts.nodes.compose.composer import ConceptsComposerRegions
from comfyui_concepts.nodes.concept import ConceptList
from comfyui_concepts.nodes.region import ConceptsRegionEditor, ConceptsRegionMask, _colours

COLOURS = json.loads((Path(__file__).parent.parent / "web" / "colours.json").read_text())


def _text(**boxes):
    return json.dumps({"version": 1, "regions": [{"label": n, "boxes": [b]} for n, b in boxes.items()]})


HALVES = _text(left=[0, 0, 0.5, 1], right=[0.5, 0, 0.5, 1])


def _edit(text=HALVES, width=96, height=64, **more):
    return ConceptsRegionEditor.execute(text, width, height, **more)


def test_drawn_regions_come_out_in_order_as_regions_masks_and_a_picture():
    regions, masks, preview, width, height = _edit().args
    assert [r.label for r in regions.in_order()] == ["left", "right"]
    assert masks.shape == (2, 64, 96)
    assert torch.equal(masks.sum(0), torch.ones(64, 96))
    assert masks[0, :, :48].all()
    assert preview.shape == (1, 64, 96, 3)
    assert preview.min() >= 0
    assert preview.max() <= 1
    assert not torch.equal(preview[0, 40, 20], preview[0, 40, 70])
    assert (width, height) == (96, 64)


def test_boxes_and_masks_of_other_nodes_lie_on_top():
    spot = torch.zeros(2, 32, 32)
    spot[0, :16], spot[1, 16:] = 1, 1
    boxes = [[{"x": 0, "y": 0, "width": 48, "height": 64}], [{"x": 24, "y": 16, "width": 24, "height": 16}]]
    below = _edit(_text(floor=[0, 0.8, 1, 0.2])).args[0]
    regions, masks, *_ = _edit(boxes=boxes, mask=spot, below=below).args
    labels = [r.label for r in regions.in_order()]
    assert labels == ["floor", "left", "right", "box 1", "box 2", "mask 1", "mask 2"]
    assert masks[4].sum() == 24 * 16
    assert torch.equal(masks[5] + masks[6], torch.ones(64, 96))


def test_linked_regions_are_enough():
    regions = _edit("", mask=torch.ones(64, 96)).args[0]
    assert [r.label for r in regions.in_order()] == ["mask 1"]


def test_nothing_drawn_and_nothing_linked_is_a_sentence():
    with pytest.raises(ValueError, match="no regions yet; drag on the canvas"):
        _edit("")


def test_a_flood_of_boxes_is_refused():
    with pytest.raises(ValueError, match="65 boxes and 0 masks.*at most 64"):
        _edit(boxes=[{"x": 0, "y": 0, "width": 9, "height": 9}] * 65)


def test_the_feather_fades_the_edge_and_strength_zero_is_sharp():
    sharp, soft = (_edit(feather=f).args[1][0] for f in (0.0, 0.1))
    assert set(sharp.unique().tolist()) == {0.0, 1.0}
    assert 0.2 < soft[32, 48] < 0.8


def test_the_background_changes_the_picture_only(tmp_path, monkeypatch):
    import folder_paths

    monkeypatch.setattr(folder_paths, "get_temp_directory", lambda: str(tmp_path))
    background = torch.rand(1, 50, 200, 3)
    plain, over = _edit(), _edit(background=background)
    assert torch.equal(plain.args[1], over.args[1])
    assert not torch.equal(plain.args[2], over.args[2])
    assert over.ui["concepts_canvas"] == [{"width": 96, "height": 64}]
    (file,) = over.ui["concepts_background"]
    assert (tmp_path / file["filename"]).is_file()


def test_a_label_that_is_no_text_to_draw_harms_nothing():
    label = "<script>\ud800猫\n\u202e"
    picture = _edit(json.dumps({"version": 1, "regions": [{"label": label, "boxes": [[0, 0, 1, 1]]}]})).args[2]
    assert torch.isfinite(picture).all()


@pytest.mark.parametrize("case", COLOURS, ids=lambda case: case["name"])
def test_a_region_has_the_colour_it_has_in_the_editor(case):
    concepts = None
    for told in case["concepts"]:
        phrase = told["phrase"].strip() or told.get("prompt", "")  # as make_concept has it
        concepts = ConceptList(Concept(told["called"], phrase, None, 1.0, [], []), concepts)
    regions = [Region(label, (Box(0, 0, 1, 1),), None, 0.0) for label in case["labels"]]
    assert _colours(regions, concepts) == case["colours"]


def test_one_region_by_its_label():
    regions = _edit(_text(cat=[0, 0, 0.5, 1], dog=[0.5, 0, 0.5, 1])).args[0]
    (mask,) = ConceptsRegionMask.execute(regions, " Dog ", 40, 20).args
    assert mask.shape == (1, 20, 40)
    assert torch.equal(mask[0], torch.cat([torch.zeros(20, 20), torch.ones(20, 20)], 1))
    assert ConceptsRegionMask.execute(regions, "", 40, 20).args[0].all()
    with pytest.raises(ValueError, match="no region 'bird'; there are 'cat', 'dog'"):
        ConceptsRegionMask.execute(regions, "bird", 40, 20)


def test_the_page_is_told_which_widget_edits_the_regions(object_info):
    kind, options = object_info["ConceptsRegionEditor"]["input"]["required"]["regions"]
    assert kind == "STRING"  # an API graph holds a text
    assert options["widgetType"] == "CONCEPTS_REGIONS"
    assert options["default"] == ""


def test_what_a_composer_has_found_comes_out_at_the_size_of_the_picture():
    """Found on the grid of an attention, or drawn on the latent's own."""
    concepts = [Concept(name, name, None, 1.0, [], []) for name in ("lion", "robot")]
    latent = {"samples": torch.zeros(1, 4, 16, 24)}
    for factor in (1, 4):
        found = torch.zeros(2, 16 // factor, 24 // factor)
        found[0, :, : 12 // factor] = found[1, :, 12 // factor :] = 1
        guider = SimpleNamespace(regions=found, concepts=concepts)
        regions, masks, preview = ConceptsComposerRegions.execute(guider, latent).args
        assert [r.label for r in regions.in_order()] == ["lion", "robot"]
        assert masks.shape == (2, 128, 192)
        assert masks[0, :, :96].all()
        assert torch.equal(masks.sum(0), torch.ones(128, 192))
        assert preview.shape == (1, 128, 192, 3)
