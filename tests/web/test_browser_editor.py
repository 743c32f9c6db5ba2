"""The region editor under a real mouse and keyboard, in both node renderers."""

from __future__ import annotations

import asyncio
import io
import json
import re
from pathlib import Path

import pytest

CASES = json.loads(Path(__file__).with_name("documents.json").read_text())
CONTROL, SHIFT, NULL = "\ue009", "\ue008", "\ue000"
DELETE, RIGHT, ESCAPE = "\ue017", "\ue014", "\ue00c"
pytestmark = [pytest.mark.slow, pytest.mark.area("editor")]

ADD = """const node = LiteGraph.createNode('ConceptsRegionEditor');
node.pos = [420, 140]; app.graph.add(node); return node.id"""
NODE = "const node = app.graph.getNodeById(arguments[0]); const widget = node.widgets.find(w => w.name === 'regions');"


class Editor:
    """One Region Editor on the page."""

    def __init__(self, page, node: int | None = None) -> None:
        self.page = page
        self.node = page.js(ADD) if node is None else node
        self.paper = page.find(".concepts-paper")
        page.at_rest(self.paper)

    @property
    def text(self) -> str:
        return self.page.js(NODE + "return widget.value", self.node)

    @property
    def regions(self) -> list[dict]:
        return json.loads(self.text)["regions"] if self.text else []

    @property
    def boxes(self) -> list[list[list[float]]]:
        return [region.get("boxes", []) for region in self.regions]

    def put(self, text: str) -> None:
        self.page.js(NODE + "widget.value = arguments[1]", self.node, text)

    def drag(self, start, end, **options) -> None:
        self.page.drag(self.paper, start, end, **options)

    def shown(self, selector: str) -> int:
        return self.page.js(
            "return document.querySelector('.concepts-editor').querySelectorAll(arguments[0]).length", selector
        )


@pytest.fixture
def editor(page):
    return Editor(page)


def near(box, wanted, tolerance=0.02):
    return all(abs(a - b) <= tolerance for a, b in zip(box, wanted, strict=True))


def _two(**more):
    regions = [
        {"label": "cat", "boxes": [[0.1, 0.1, 0.3, 0.5]]},
        {"label": "dog", "boxes": [[0.55, 0.2, 0.3, 0.5]]} | more,
    ]
    return json.dumps({"version": 1, "regions": regions}, separators=(",", ":"))


def test_a_box_drawn_with_the_mouse_is_in_the_text_the_picture_and_the_graph(editor, page):
    editor.drag((0.1, 0.2), (0.42, 0.8))
    ((box,),) = editor.boxes
    assert near(box, [0.1, 0.2, 0.32, 0.6])
    assert editor.shown(".concepts-box") == 1
    assert [r["label"] for r in editor.regions] == ["region 1"]
    assert page.workflow()["nodes"][0]["widgets_values"][0] == editor.text
    assert page.api_graph()[str(editor.node)]["inputs"]["regions"] == editor.text
    numbers = page.js(
        "return [...document.querySelectorAll('.concepts-numbers input')].map(i => Number(i.value) / 100)"
    )
    assert near(numbers, box, 0.001)
    editor.drag((0.6, 0.2), (0.9, 0.8))
    page.shot("editor")


@pytest.mark.own_page
def test_a_drawn_box_changes_what_a_run_makes(editor, page, server):
    """JSON by hand, picture by the host: the preview output is tinted where the box was drawn."""
    from comfyui_concepts.workbench.client import run_graph
    from PIL import Image

    editor.drag((0.25, 0.25), (0.75, 0.75))
    graph = page.api_graph()
    graph["99"] = {
        "class_type": "SaveImage",
        "inputs": {"images": [str(editor.node), 2], "filename_prefix": "concepts"},
    }
    picture = Image.open(io.BytesIO(asyncio.run(run_graph(server.url, graph))[0].data)).convert("RGB")
    inside, outside = picture.getpixel((256, 256)), picture.getpixel((40, 480))
    assert sum(inside) > sum(outside) + 60


def test_boxes_are_moved_resized_and_brought_back(editor, page):
    editor.put(_two())
    editor.drag((0.25, 0.35), (0.27, 0.63), keys=CONTROL)  # Ctrl: without snapping
    assert near(editor.boxes[0][0], [0.12, 0.38, 0.3, 0.5])
    moved = editor.text
    editor.drag((0.42, 0.88), (0.5, 0.7), keys=CONTROL)  # its lower right corner
    assert near(editor.boxes[0][0], [0.12, 0.38, 0.38, 0.32])
    assert near(editor.boxes[1][0], [0.55, 0.2, 0.3, 0.5], 0)
    page.press("z", held=CONTROL)
    assert editor.text == moved
    page.press("y", held=CONTROL)
    assert near(editor.boxes[0][0], [0.12, 0.38, 0.38, 0.32])


def test_undo_in_the_editor_leaves_the_rest_of_the_graph(editor, page):
    page.open(page.workflow())  # now the page has a workflow whose changes it follows
    page.js("app.graph.add(LiteGraph.createNode('ConceptsDemoModel'))")
    page.js("app.extensionManager.workflow.activeWorkflow.changeTracker.checkState()")
    editor = Editor(page, editor.node)
    editor.drag((0.1, 0.2), (0.4, 0.8))
    assert len(editor.boxes) == 1
    page.press("zzz", held=CONTROL)
    assert editor.boxes == []
    assert len(page.workflow()["nodes"]) == 2


def test_a_box_snaps_to_another(editor):
    editor.put(_two())
    editor.drag((0.7, 0.45), (0.712, 0.36), steps=8)  # its top comes near the other's, at 0.1
    assert editor.boxes[1][0][1] == 0.1


def test_the_keyboard_moves_duplicates_orders_and_deletes(editor, page):
    editor.put(_two())
    editor.drag((0.7, 0.4), (0.7, 0.4))  # a click selects
    page.press(RIGHT)
    assert near(editor.boxes[1][0], [0.56, 0.2, 0.3, 0.5], 1e-6)
    page.press(RIGHT, held=SHIFT)
    assert near(editor.boxes[1][0], [0.66, 0.2, 0.3, 0.5], 1e-6)
    page.press("[")
    assert [r["label"] for r in editor.regions] == ["dog", "cat"]
    page.press("d", held=CONTROL)
    assert [r["label"] for r in editor.regions] == ["dog", "dog", "cat"]
    page.press(DELETE)
    assert [r["label"] for r in editor.regions] == ["dog", "cat"]
    assert len(page.workflow()["nodes"]) == 1  # the node itself was not deleted


def test_a_region_is_drawn_over_another_and_a_second_box_with_shift(editor, page):
    editor.put(_two())
    page.find(".concepts-tools button[title^='New region']").click()
    editor.drag((0.15, 0.15), (0.35, 0.55))
    assert len(editor.regions) == 3
    editor.drag((0.3, 0.7), (0.8, 0.9), keys=SHIFT)
    assert [len(boxes) for boxes in editor.boxes] == [1, 1, 2]


def test_the_brush_paints_and_the_eraser_wipes(editor, page):
    page.find(".concepts-tools button[title^='Brush']").click()
    editor.drag((0.2, 0.5), (0.8, 0.5), steps=12)
    (stroke,) = editor.regions[0]["strokes"]
    assert len(stroke["points"]) <= 8  # a straight line needs no more than its ends
    assert near([*stroke["points"][:2], *stroke["points"][-2:]], [0.2, 0.5, 0.8, 0.5])
    page.find(".concepts-tools button[title^='Eraser']").click()
    editor.drag((0.5, 0.4), (0.5, 0.6))
    assert [s.get("erase", False) for s in editor.regions[0]["strokes"]] == [False, True]
    page.shot("editor-brush")


def test_numbers_and_labels_are_typed(editor, page):
    editor.put(_two())
    editor.drag((0.25, 0.35), (0.25, 0.35))
    field = page.find(".concepts-numbers input")
    field.send_keys(CONTROL, "a", NULL, "25\t")
    assert near(editor.boxes[0][0], [0.25, 0.1, 0.3, 0.5], 1e-6)
    name = page.find(".concepts-row.concepts-selected input")
    name.send_keys(CONTROL, "a", NULL, "<b>lion</b>\t")
    assert editor.regions[0]["label"] == "<b>lion</b>"
    assert "<b>lion</b>" in page.js("return document.querySelector('.concepts-drawing').textContent")
    assert editor.shown("b") == 0


def test_the_canvas_follows_width_and_height(editor, page, until):
    def proportions() -> float:
        return page.js("const r = arguments[0].getBoundingClientRect(); return r.width / r.height", editor.paper)

    assert abs(proportions() - 1) < 0.01
    page.js(
        NODE + "const w = node.widgets.find(w => w.name === 'width'); w.value = 1024; w.callback?.(1024)", editor.node
    )
    until(lambda: abs(proportions() - 2) < 0.02, what="a canvas twice as wide as high")
    editor.drag((0.5, 0.25), (0.9, 0.75))
    assert near(editor.boxes[0][0], [0.5, 0.25, 0.4, 0.5])


def _look_at(page, zoom: float) -> None:
    page.js(
        "app.canvas.ds.scale = arguments[0]; [app.canvas.ds.offset[0], app.canvas.ds.offset[1]] = [-60, -150]; "
        "app.canvas.setDirty(true, true)",
        zoom,
    )


@pytest.mark.every_page
@pytest.mark.parametrize("zoom", [0.6, 1.5])
def test_the_mouse_draws_moves_and_resizes_where_it_is_at_any_zoom(page, zoom):
    _look_at(page, zoom)
    editor = Editor(page)
    editor.drag((0.2, 0.3), (0.6, 0.7), keys=CONTROL)
    assert near(editor.boxes[0][0], [0.2, 0.3, 0.4, 0.4])
    page.shot(f"editor-zoom-{zoom}")
    editor.drag((0.4, 0.5), (0.5, 0.4), keys=CONTROL)
    assert near(editor.boxes[0][0], [0.3, 0.2, 0.4, 0.4])
    editor.drag((0.7, 0.6), (0.9, 0.9), keys=CONTROL)  # its lower right corner
    assert near(editor.boxes[0][0], [0.3, 0.2, 0.6, 0.7])


@pytest.mark.parametrize("zoom", [1.0, 0.6])
def test_the_mouse_draws_where_it_is_on_a_fine_screen(page, zoom):
    """Two pixels of the screen for one of the page."""
    metrics = {"width": 1200, "height": 900, "deviceScaleFactor": 2, "mobile": False}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        _look_at(page, zoom)
        editor = Editor(page)
        editor.drag((0.2, 0.3), (0.6, 0.7), keys=CONTROL)
        assert near(editor.boxes[0][0], [0.2, 0.3, 0.4, 0.4])
        page.shot(f"editor-fine-{zoom}")
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_the_wheel_and_the_middle_button_over_the_editor_move_the_canvas(editor, page):
    where = "return [app.canvas.ds.scale, ...app.canvas.ds.offset]"
    zoom, left, top = page.js(where)
    box = page.js(
        "const r = arguments[0].getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]", editor.paper
    )
    mouse = {"x": box[0], "y": box[1], "button": "middle", "buttons": 4, "clickCount": 1}
    for kind, moved in (("mousePressed", 0), ("mouseMoved", 20), ("mouseMoved", 40), ("mouseReleased", 40)):
        at = mouse | {"type": kind, "x": mouse["x"] + moved} | ({"buttons": 0} if kind == "mouseReleased" else {})
        page.driver.execute_cdp_cmd("Input.dispatchMouseEvent", at)
    assert page.js(where)[0] == zoom
    assert page.js(where)[1:] == pytest.approx([left + 40, top], abs=1)
    wheel = {"type": "mouseWheel", "x": mouse["x"] + 40, "y": mouse["y"], "deltaX": 0, "deltaY": -120}
    page.driver.execute_cdp_cmd("Input.dispatchMouseEvent", wheel)
    assert page.js(where)[0] > zoom
    assert editor.boxes == []


@pytest.mark.every_page
def test_regions_survive_saving_and_loading(editor, page):
    editor.put(_two(strokes=[{"radius": 0.1, "points": [0.5, 0.5, 0.6, 0.6]}]))
    before, saved = editor.text, page.workflow()
    page.clear()
    page.open(saved)
    again = Editor(page, saved["nodes"][0]["id"])
    assert again.text == before
    assert again.shown(".concepts-box") == 2
    again.drag((0.7, 0.45), (0.6, 0.45), keys=CONTROL)
    assert near(again.boxes[1][0], [0.45, 0.2, 0.3, 0.5])


def test_a_copy_has_regions_of_its_own(editor, page):
    editor.put(_two())
    page.js(
        NODE + "app.canvas.selectNode(node); app.canvas.copyToClipboard(); app.canvas.pasteFromClipboard()", editor.node
    )
    texts = "return app.graph.nodes.map(node => node.widgets[0].value)"
    first, second = page.js(texts)
    assert first == second == _two()
    editor.put("")
    assert page.js(texts)[1] == _two()


def test_regions_survive_a_subgraph(editor, page, until):
    editor.put(_two())
    page.js(NODE + "app.canvas.graph.convertToSubgraph(new Set([node]))", editor.node)
    saved = page.workflow()
    inner = [n for s in saved["definitions"]["subgraphs"] for n in s["nodes"]]
    assert [n["widgets_values"][0] for n in inner] == [_two()]
    assert [n["inputs"]["regions"] for n in page.api_graph().values()] == [_two()]
    for move, wanted in ((-0.1, 0.45), (-0.1, 0.35)):  # in, out and in again
        page.js("app.canvas.setGraph(app.graph.nodes[0].subgraph)")
        paper = page.find(".concepts-paper")
        until(
            lambda p=paper: page.js("return arguments[0].getBoundingClientRect().width > 50", p),
            what="the editor inside",
        )
        page.drag(paper, (wanted - move + 0.15, 0.45), (wanted + 0.15, 0.45), keys=CONTROL)
        text = page.js("return app.canvas.graph.nodes.find(n => n.type === 'ConceptsRegionEditor').widgets[0].value")
        assert near(json.loads(text)["regions"][1]["boxes"][0], [wanted, 0.2, 0.3, 0.5])
        # kept by the page itself: the driver refuses to be handed an element that has gone
        page.js("window.inside = arguments[0]; app.canvas.setGraph(app.graph)", paper)
        gone = "return !inside.isConnected || !inside.checkVisibility()"
        until(lambda gone=gone: page.js(gone), what="the way out")
    page.load()


@pytest.mark.every_page
def test_hostile_texts_are_shown_not_run_and_not_lost(editor, page):
    """The editor says what is wrong with each, and hands back for saving what it was given."""
    page.js("window.hacked = undefined; window.alert = () => { window.hacked = true }")
    for case in CASES["refused"]:
        editor.put(case["text"])
        assert editor.text == case["text"], case["name"]
        assert page.workflow()["nodes"][0]["widgets_values"][0] == case["text"], case["name"]
        assert re.search(case["says"], page.find(".concepts-fault p").text), case["name"]
    for case in CASES["refused"][:4]:  # and when it comes with a workflow
        saved = page.workflow()
        saved["nodes"][0]["widgets_values"][0] = case["text"]
        page.open(saved)
        assert page.js(NODE + "return widget.value", editor.node) == case["text"]
        assert re.search(case["says"], page.find(".concepts-fault p").text), case["name"]
    page.shot("editor-refused")
    assert page.js("return window.hacked ?? null") is None
    page.find(".concepts-fault button").click()
    assert page.js(NODE + "return widget.value", editor.node) == '{"version":1,"regions":[]}'


@pytest.mark.every_page
def test_a_script_in_a_label_is_text(editor, page):
    label = "</text></svg><img src=x onerror='window.hacked=1'><script>window.hacked=1</script>"
    editor.put(json.dumps({"version": 1, "regions": [{"label": label, "boxes": [[0.2, 0.2, 0.5, 0.5]]}]}))
    assert editor.regions[0]["label"] == label
    assert editor.shown("img, script") == 0
    assert label in page.js("return document.querySelector('.concepts-drawing').textContent")
    assert page.js("return window.hacked ?? null") is None


@pytest.mark.every_page
def test_the_side_panel_leaves_the_editor_on_its_node(editor, page, until):
    """An element is in one place only: a panel that took it would leave a hole in the node."""
    page.js(NODE + "app.canvas.selectNode(node)", editor.node)
    toggle = "return document.querySelector('[aria-label=\"Toggle properties panel\"]')"
    if not page.js(toggle):
        pytest.skip("no side panel")
    page.js(toggle).click()
    panel = page.find("[data-testid='properties-panel']")
    page.js("[...arguments[0].querySelectorAll('button')].find(b => b.innerText === 'Parameters')?.click()", panel)
    until(lambda: "feather" in panel.text, what="the node's widgets in the panel")
    assert "regions" not in panel.text.split("\n")
    editor = Editor(page, editor.node)
    editor.drag((0.2, 0.3), (0.6, 0.7), keys=CONTROL)
    assert near(editor.boxes[0][0], [0.2, 0.3, 0.4, 0.4])
    page.shot("editor-side-panel")


@pytest.mark.every_page
def test_a_linked_text_is_not_edited_here(editor, page):
    page.js(
        NODE
        + """const source = LiteGraph.createNode('PrimitiveString') ?? LiteGraph.createNode('PrimitiveStringMultiline');
        app.graph.add(source); source.connect(0, node, node.inputs.findIndex(input => input.name === 'regions'));""",
        editor.node,
    )
    editor = Editor(page, editor.node)  # still there, and as large
    assert "come from the connected node" in page.find(".concepts-notice").text
    before = editor.text
    editor.drag((0.1, 0.2), (0.4, 0.8))
    assert editor.text == before
    page.shot("editor-linked")
    unlinked = "node.disconnectInput(node.inputs.findIndex(input => input.name === 'regions'));"
    page.js(NODE + unlinked + "node.pos = [420, 140]", editor.node)  # where the drag had moved the whole node
    Editor(page, editor.node).drag((0.1, 0.2), (0.4, 0.8))
    assert len(editor.boxes) == 1
