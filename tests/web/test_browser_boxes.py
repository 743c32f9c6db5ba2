"""Region Editor's sockets for boxes, on pages that know the types and on pages that do not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
OUTPUTS = ["regions", "masks", "preview", "width", "height", "boxes", "elements", "mask per region"]
EDITOR = "app.graph.nodes.find(node => node.type === 'ConceptsRegionEditor')"
pytestmark = [pytest.mark.slow, pytest.mark.one_renderer]


@pytest.mark.every_page
def test_boxes_are_linked_and_never_a_widget(page):
    """Newer pages have a widget for BOUNDING_BOX, whose box would be a region of every graph."""
    widgets, inputs = page.js(
        """const [one, two] = [1, 2].map(() => LiteGraph.createNode('ConceptsRegionEditor'));
        app.graph.add(one); app.graph.add(two);
        for (const name of ['boxes', 'elements']) one.connect(one.findOutputSlot(name), two, two.findInputSlot(name));
        const linked = two.inputs.filter(input => input.link != null);
        return [one.widgets.map(widget => widget.name), linked.map(input => input.name)];"""
    )
    assert {"regions", "width", "height", "feather"} <= set(widgets)
    assert not {"boxes", "x", "y"} & set(widgets)
    assert inputs == ["boxes", "elements"]
    first, second = page.api_graph().values()
    assert set(first["inputs"]) == {"regions", "width", "height", "feather"}
    assert set(second["inputs"]) - set(first["inputs"]) == {"boxes", "elements"}


def test_a_workflow_saved_before_the_new_sockets_keeps_its_links_and_gets_them(page):
    saved = json.loads((ROOT / "workflows" / "regions_by_hand.json").read_text())
    (editor,) = (node for node in saved["nodes"] if node["type"] == "ConceptsRegionEditor")
    del editor["outputs"][5:]
    editor["inputs"] = [socket for socket in editor["inputs"] if socket["name"] != "elements"]
    page.open(saved)
    shown = page.js(f"const n = {EDITOR}; return [n.outputs.map(o => o.name), n.inputs.map(i => i.name)]")
    assert shown[0] == OUTPUTS
    assert "elements" in shown[1]
    wanted = json.loads((ROOT / "workflows" / "api" / "regions_by_hand.json").read_text())
    assert {k: n["inputs"] for k, n in page.api_graph().items()} == {k: n["inputs"] for k, n in wanted.items()}
