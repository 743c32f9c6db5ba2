"""The app of two boxes: on newer pages a form with the editor, which a mouse draws in, and a Run button."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
APPS = sorted((ROOT / "workflows").glob("app_*.json"))
FIRST = (1, 41)  # the first page that opens apps
REGIONS = """return app.rootGraph.nodes.find(node => node.type === 'ConceptsRegionEditor')
  .widgets.find(widget => widget.name === 'regions').value"""
RUN = "[data-testid='linear-run-button'] button:has([data-testid='linear-run-button-icon'])"
SHOWN = "return [...document.querySelectorAll('img')].some(one => one.naturalWidth && one.src.includes(arguments[0]))"
pytestmark = pytest.mark.slow


def _classes(graph):
    return {node: (what["class_type"], what["inputs"]) for node, what in graph.items()}


def _boxes(page):
    return {one["label"]: one["boxes"] for one in json.loads(page.js(REGIONS))["regions"]}


@pytest.mark.every_page
def test_the_app_is_the_graph_that_it_says(as_before, page):
    """Also on page 1.32.9, whose form is an early one. The second app is for a checkpoint, which is not here."""
    for path in APPS:
        page.open(json.loads(path.read_text()))
        (api,) = (ROOT / "workflows" / "api").rglob(path.name)
        assert _classes(page.api_graph()) == _classes(json.loads(api.read_text()))


@pytest.mark.every_page
@pytest.mark.one_renderer
def test_two_boxes_are_dragged_on_the_form_and_run_makes_a_picture(as_before, loaded, bare_errors, until):
    if loaded.age < FIRST:
        pytest.skip("no App mode")
    app = loaded.load()
    app.open(json.loads((ROOT / "workflows" / "app_two_boxes.json").read_text()))
    paper = app.find(".concepts-paper")
    app.at_rest(paper)
    app.shot("app-1-opened")
    app.drag(paper, (0.25, 0.5), (0.25, 0.5))  # the left box is chosen by a click,
    app.drag(paper, (0.5, 0.5), (0.36, 0.5))  # its right edge moved,
    app.drag(paper, (0.75, 0.5), (0.75, 0.5))  # the same with the right box and its left edge
    app.drag(paper, (0.5, 0.5), (0.64, 0.5))
    left, right = (_boxes(app)[label][0] for label in ("left", "right"))
    assert left == pytest.approx([0, 0, 0.36, 1], abs=0.06)
    assert right == pytest.approx([0.64, 0, 0.36, 1], abs=0.06)
    app.shot("app-2-drawn")
    app.find(RUN).click()
    made = "return app.nodeOutputs?.[14]?.images?.[0]?.filename"
    name = until(lambda: app.js(made), 300, "the picture")
    until(lambda: app.js(SHOWN, name), what="the picture on the form")
    app.shot("app-3-made")
    assert app.errors() <= bare_errors(app.version)
