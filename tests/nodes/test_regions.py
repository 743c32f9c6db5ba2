"""Regions from the editor, from boxes and from masks, as the graph hands them on."""

from __future__ import annotations

import asyncio
import importlib.util
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
from comfyui_concepts.workbench.client import run_graph

COLOURS = json.loads((Path(__file__).parent.parent / "web" / "colours.json").read_text())


def _text(**boxes):
    return json.dumps({"version": 1, "regions": [{"label": n, "boxes": [b]} for n, b in boxes.items()]})


SIDES = ("x", "y", "width", "height")
BOX = {"x": 12, "y": 8, "width": 24.0, "height": 16.0, "label": "person", "score": 0.9}
LAYOUT = [
    {"type": "obj", "bbox": [250, 250, 1000, 500], "desc": "a lion", "color_palette": ["#AA5500"]},
    {"type": "text", "bbox": [0, 0, 250, 1000], "text": "MOSS", "desc": "large letters"},
]
HALVES = _text(left=[0, 0, 0.5, 1], right=[0.5, 0, 0.5, 1])


def _edit(text=HALVES, width=96, height=64, **more):
    return ConceptsRegionEditor.execute(text, width, height, **more)


def test_drawn_regions_come_out_in_order_as_regions_masks_and_a_picture():
    regions, masks, preview, width, height = _edit().args[:5]
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


def test_elements_of_other_nodes_become_regions_named_after_what_they_say():
    """As a list or as a JSON text; also where a box is expected, for a page links what it likes."""
    for given in ({"elements": LAYOUT}, {"elements": json.dumps(LAYOUT)}, {"boxes": LAYOUT}):
        regions, masks, *_ = _edit("", **given).args
        assert [r.label for r in regions.in_order()] == ["a lion", "large letters"]
        assert masks.sum((1, 2)).tolist() == [24 * 48, 16 * 96]
    labels = [r.label for r in _edit(boxes=[BOX], elements=LAYOUT, mask=torch.ones(1, 9, 9)).args[0].in_order()]
    assert labels == ["left", "right", "person", "a lion", "large letters", "mask 1"]


def test_every_region_goes_out_as_a_box_an_element_and_a_mask_in_one_order():
    spot = torch.zeros(1, 32, 32)
    spot[0, 8:16, 24:] = 1
    below = _edit(_text(floor=[0, 0.75, 1, 0.25])).args[0]
    out = _edit(boxes=[[BOX]], elements=LAYOUT[1:], mask=spot, below=below, feather=0.1).args
    masks, (frame,), elements, listed = out[1], *out[5:]
    assert [box["label"] for box in frame] == [r.label for r in out[0].in_order()]
    assert [[box[side] for side in SIDES] for box in frame] == [
        [0, 48, 96, 16], [0, 0, 48, 64], [48, 0, 48, 64], [12, 8, 24, 16], [0, 0, 96, 16], [72, 16, 24, 16],
    ]  # fmt: skip
    assert [(e["desc"], e["bbox"]) for e in elements] == [
        ("floor", [750, 0, 1000, 1000]),
        ("left", [0, 0, 1000, 500]),
        ("right", [0, 500, 1000, 1000]),
        ("person", [125, 125, 375, 375]),
        ("large letters", [0, 0, 250, 1000]),
        ("", [250, 750, 500, 1000]),
    ]
    assert [mask.shape for mask in listed] == [(1, 64, 96)] * 6
    assert torch.equal(torch.cat(listed), masks)


def test_what_went_out_comes_back_in_as_the_same_regions():
    drawn = _text(cat=[0.125, 0.25, 0.5, 0.5], dog=[0.3, 0.1, 0.21, 0.77])
    first = _edit(drawn, elements=LAYOUT)
    by_boxes, by_elements = _edit("", boxes=first.args[5]), _edit("", elements=first.args[6])
    assert by_boxes.args[5] == first.args[5]
    assert by_elements.args[6] == first.args[6]
    again = _edit("", boxes=by_boxes.args[5])
    assert again.args[5:7] == by_boxes.args[5:7]
    assert torch.equal(again.args[1], by_boxes.args[1])
    assert torch.equal(by_boxes.args[1][0], first.args[1][0])  # drawn on whole pixels


def test_a_graph_saved_before_has_its_outputs_where_they_were():
    regions, masks, preview, width, height = _edit().args[:5]
    assert ([r.label for r in regions.in_order()], masks.shape, preview.shape) == (
        ["left", "right"], (2, 64, 96), (1, 64, 96, 3)
    )  # fmt: skip
    assert (width, height) == (96, 64)


def test_boxes_are_a_socket_on_every_page(object_info):
    """Newer pages have a widget for the type, whose box would become a region of every graph."""
    kind, options = object_info["ConceptsRegionEditor"]["input"]["optional"]["boxes"]
    assert (kind, options["forceInput"]) == ("BOUNDING_BOX", True)
    assert object_info["ConceptsRegionEditor"]["output"][5:] == ["BOUNDING_BOX", "ARRAY", "MASK"]
    assert object_info["ConceptsRegionEditor"]["output_is_list"] == [False] * 7 + [True]


def _shown_by(server, graph):
    """Runs a graph on the host: what its nodes show, by the node's key."""
    asyncio.run(run_graph(server.url, graph))
    (entry,) = server.get("/history?max_items=1").values()
    return {key: shown["text"] for key, shown in entry["outputs"].items() if "text" in shown}


def _node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def _editor(text="", **links):
    return _node("ConceptsRegionEditor", regions=text, width=96, height=64, feather=0.0, **links)


@pytest.mark.slow
def test_a_host_links_one_editor_into_another(server):
    graph = {
        "1": _editor(HALVES),
        "2": _editor(boxes=["1", 5]),
        "3": _editor(elements=["1", 6]),
        "4": _node("PreviewAny", source=["2", 6]),
        "5": _node("PreviewAny", source=["3", 5]),
        "6": _node("MaskToImage", mask=["1", 7]),
        "7": _node("PreviewAny", source=["6", 0]),
    }
    shown = _shown_by(server, graph)
    _, _, _, _, _, boxes, elements, masks = _edit().args
    assert json.loads(shown["4"][0]) == elements
    assert json.loads(shown["5"][0]) == boxes
    assert len(shown["7"]) == len(masks)  # once per region


CORE_BOXES = pytest.mark.skipif(
    importlib.util.find_spec("comfy_extras.nodes_bounding_boxes") is None,
    reason="this host has no Create Bounding Boxes node, and so nothing of its own to compare with",
)


@CORE_BOXES
@pytest.mark.parametrize(("width", "height"), [(1024, 1024), (1344, 768), (64, 4096)])
def test_the_hosts_own_boxes_and_elements_are_read_and_written_as_the_host_does(width, height):
    from comfy_extras.nodes_bounding_boxes import CreateBoundingBoxes

    said = [{"type": "obj", "text": "", "desc": "a lion", "palette": ["#AA5500"]}]
    said += [{"type": "text", "text": "MOSS", "desc": "", "palette": []}]
    edges = [(0, 0, width, height), (width // 3, height // 7, width // 2, height // 5)]
    state = [
        dict(zip(("x", "y", "width", "height"), e, strict=True), metadata=m) for e, m in zip(edges, said, strict=True)
    ]
    _, boxes, elements = CreateBoundingBoxes.execute(width, height, state).args
    by_boxes, by_elements = (
        _edit("", width, height, **given).args for given in ({"boxes": boxes}, {"elements": elements})
    )
    sides = [{side: box[side] for side in ("x", "y", "width", "height")} for box in by_boxes[5][0]]
    assert [sides] == boxes
    assert [e["bbox"] for e in by_boxes[6]] == [e["bbox"] for e in elements]
    assert by_elements[6] == elements
    with_words = _edit("", width, height, boxes=[state]).args
    assert with_words[6] == elements
    assert CreateBoundingBoxes.execute(width, height, bboxes=with_words[5]).args[1:] == (boxes, elements)
    assert (
        CreateBoundingBoxes.execute(width, height, bboxes=by_elements[6]).args[2]
        == (CreateBoundingBoxes.execute(width, height, bboxes=elements).args[2])
    )


@CORE_BOXES
@pytest.mark.slow
def test_the_host_links_its_own_nodes_into_ours_and_ours_into_its_own(server):
    empty = {"width": 96, "height": 64, "editor_state": {"__value__": []}}
    graph = {
        "1": _node(
            "CreateBoundingBoxes", width=96, height=64, editor_state={"__value__": []}, bboxes=json.dumps(LAYOUT)
        ),
        "2": _editor(elements=["1", 2]),
        "3": _editor(boxes=["1", 1]),
        "4": _node("CreateBoundingBoxes", **empty, bboxes=["2", 5]),
        "5": _node("ConvertArrayToString", array=["2", 6], indent=0),
        "6": _editor(elements=["5", 0]),
        "7": _node("DrawBBoxes", bboxes=["2", 5]),
        "10": _node("PreviewAny", source=["1", 2]),
        "11": _node("PreviewAny", source=["2", 6]),
        "12": _node("PreviewAny", source=["4", 2]),
        "13": _node("PreviewAny", source=["6", 6]),
        "14": _node("PreviewAny", source=["1", 1]),
        "15": _node("PreviewAny", source=["3", 5]),
        "16": _node("PreviewAny", source=["7", 0]),
    }
    shown = {key: json.loads(text[0]) for key, text in _shown_by(server, graph).items() if key < "16"}
    assert shown["10"] == shown["11"] == shown["12"] == shown["13"] == LAYOUT
    assert [[{side: box[side] for side in SIDES} for box in shown["15"][0]]] == shown["14"]


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
