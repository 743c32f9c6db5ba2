"""What nodes show while they work and afterwards, and what concepts tell the editor."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from comfyui_concepts.methods.panels import GAP, SIDE
from comfyui_concepts.workbench.templates import to_ui
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent.parent
LEFT = "\ue012"
pytestmark = pytest.mark.slow

_VIEW = {"positive": ["2", 0], "weight": 1.0}
TURNING = {
    "1": {"class_type": "ConceptsDemoModel", "inputs": {}},
    "2": {"class_type": "CLIPTextEncode", "inputs": {"text": "a cat, blue background", "clip": ["1", 1]}},
    "3": {"class_type": "ConceptsAnagramView", "inputs": _VIEW | {"view": "identity"}},
    "4": {"class_type": "ConceptsAnagramView", "inputs": _VIEW | {"view": "rotate_180", "views": ["3", 0]}},
    "5": {"class_type": "EmptyImage", "inputs": {"width": 128, "height": 128, "batch_size": 1, "color": 16711680}},
    "6": {
        "class_type": "ConceptsAnagramAnimate",
        "inputs": {
            "image": ["5", 0], "views": ["4", 0], "still_frames": 2, "moving_frames": 3, "loop": True,
            "largest_side": 64,
        },
    },
}  # fmt: skip
SHOWN = (
    "return [document.querySelector('.concepts-flip-caption').textContent, "
    "document.querySelector('.concepts-flip-picture').src]"
)


@pytest.mark.area("run")
def test_the_film_plays_under_the_pointer_and_turns_by_click_and_key(page, until, object_info):
    from selenium.webdriver.common.action_chains import ActionChains

    page.open(to_ui("turning", TURNING, object_info))
    assert page.js("return app.graph.getNodeById(6).serialize().widgets_values") == [2, 3, True, 64, ""]
    assert "concepts_flip" not in page.api_graph()["6"]["inputs"]
    page.js("app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    page.run()
    loaded = "return document.querySelector('.concepts-flip-picture')?.naturalWidth > 0"
    until(lambda: page.js(loaded), what="the first view's picture")
    first, still = page.js(SHOWN)
    assert (first, ".png" in still) == ("1 of 2: identity", True)
    picture = page.find(".concepts-flip")
    ActionChains(page.driver).move_to_element(picture).perform()
    until(lambda: page.js(SHOWN)[0] == "playing" and ".webp" in page.js(SHOWN)[1], what="the film")
    ActionChains(page.driver).click(picture).perform()
    assert page.js(SHOWN)[0] == "2 of 2: rotate_180"
    page.press(LEFT)
    assert page.js(SHOWN) == [first, still]
    page.press(" ")
    assert page.js(SHOWN)[0] == "2 of 2: rotate_180"
    page.shot("flip")
    ActionChains(page.driver).move_by_offset(0, -300).perform()
    until(lambda: page.js(SHOWN)[0] == "2 of 2: rotate_180", what="the still again")
    assert len(page.workflow()["nodes"]) == 6


@pytest.mark.every_page
@pytest.mark.area("run")
def test_the_sampler_shows_every_view_while_it_works(page, until, object_info):
    graph = json.loads((ROOT / "workflows" / "api" / "anagram_turn.json").read_text())
    graph["10"]["inputs"]["steps"], graph["11"]["inputs"]["batch_size"] = 4, 1
    graph["8"]["inputs"]["noise_seed"] = 500 + (page.renderer == "modern")
    page.open(to_ui("turn", graph, object_info))
    page.js(
        """window.previews = [];
        app.api.addEventListener('b_preview', async (event) => {
          const picture = await createImageBitmap(event.detail);
          window.previews.push([picture.width, picture.height]);
        });"""
    )
    page.run()
    until(lambda: page.js("return window.previews.length") >= 4, what="a preview a step")
    wide = (2 * SIDE + GAP) / (SIDE + 16)  # two views beside each other, whatever size the host sends them at
    shapes = page.js("return window.previews")
    assert all(abs(across / down - wide) < 0.03 for across, down in shapes), shapes
    until(lambda: page.js("return app.nodeOutputs?.[15]?.images?.length"), what="the end of the run")


CONCEPT = """
if (!LiteGraph.registered_node_types.ConceptsConcept) {
  class Stub extends LiteGraph.LGraphNode {
    constructor() {
      super('Concept');
      this.addWidget('text', 'lora', '', () => {});
      this.addWidget('text', 'phrase', '', () => {});
      this.addInput('concepts', 'CONCEPTS_CONCEPT');
      this.addOutput('concepts', 'CONCEPTS_CONCEPT');
    }
  }
  LiteGraph.registerNodeType('ConceptsConcept', Stub);
}
const make = (lora, phrase, before) => {
  const node = LiteGraph.createNode('ConceptsConcept');
  app.graph.add(node);
  for (const widget of node.widgets) if (widget.name in { lora, phrase }) widget.value = { lora, phrase }[widget.name];
  before?.connect(0, node, node.inputs.findIndex(input => input.name === 'concepts'));
  return node;
};
const lion = make('concepts-demo-lion.safetensors', 'a lion', null);
const last = make('animals/concepts-demo-tiger.safetensors', '', lion);
const editor = LiteGraph.createNode('ConceptsRegionEditor');
editor.pos = [420, 140];
app.graph.add(editor);
last.connect(0, editor, editor.inputs.findIndex(input => input.name === 'concepts'));
return editor.id;
"""


def test_new_regions_take_names_and_colours_from_the_connected_concepts(page):
    """The page's own Concept node where this pack has it; until then one with its sockets and widgets."""
    node = page.js(CONCEPT)
    paper = page.find(".concepts-paper")
    page.at_rest(paper)
    for left in (0.05, 0.37, 0.69):
        page.drag(paper, (left, 0.2), (left + 0.25, 0.8))
    text = page.js("return app.graph.getNodeById(arguments[0]).widgets.find(w => w.name === 'regions').value", node)
    labels = [region["label"] for region in json.loads(text)["regions"]]
    assert labels == ["a lion", "concepts-demo-tiger", "region 3"]
    strokes = page.js("return [...document.querySelectorAll('.concepts-box')].map(box => box.getAttribute('stroke'))")
    assert len(set(strokes)) == 3
    assert (
        page.js("return [...document.querySelectorAll('.concepts-editor datalist option')].map(o => o.value)")
        == labels[:2]
    )


@pytest.mark.every_page
@pytest.mark.parametrize("value", [12, None, True, {"regions": "all"}, [[1, 2], "x"]], ids=lambda v: type(v).__name__)
def test_a_workflow_with_another_type_where_the_regions_should_be_is_refused_and_kept(page, until, value):
    node = page.js("const n = LiteGraph.createNode('ConceptsRegionEditor'); app.graph.add(n); return n.id")
    saved = page.workflow()
    saved["nodes"][0]["widgets_values"][0] = value
    page.open(saved)
    kept = page.workflow()["nodes"][0]["widgets_values"][0]
    assert kept == value or json.loads(kept or "null") == value, "what was given is lost"
    if value is not None:  # nothing at all is a drawing without regions
        assert page.find(".concepts-fault p").text
    assert str(node) == str(page.workflow()["nodes"][0]["id"])  # some pages count in text


ONE = json.dumps({"version": 1, "regions": [{"label": "", "boxes": [[0.4, 0.4, 0.3, 0.3]]}]})
BEHIND = {
    "1": {"class_type": "EmptyImage", "inputs": {"width": 96, "height": 64, "batch_size": 1, "color": 0xFF0000}},
    "2": {
        "class_type": "ConceptsRegionEditor",
        "inputs": {"regions": ONE, "width": 96, "height": 64, "feather": 0.0, "background": ["1", 0]},
    },
    "3": {"class_type": "PreviewImage", "inputs": {"images": ["2", 2]}},
}  # fmt: skip
ADDRESS = "return document.querySelector('.concepts-drawing image')?.getAttribute('href') ?? ''"


def _colours(page, *places):
    """The pixels (r, g, b) a person sees at places of the editor's canvas, given as fractions of its size."""
    left, top, width, height = page.js(
        "const r = arguments[0].getBoundingClientRect(); return [r.x, r.y, r.width, r.height]",
        page.find(".concepts-paper"),
    )
    seen = Image.open(io.BytesIO(page.driver.get_screenshot_as_png())).convert("RGB")
    return [seen.getpixel((round(left + x * width), round(top + y * height))) for x, y in places]


def _is(colour, wanted):
    return all(abs(a - b) < 60 for a, b in zip(colour, wanted, strict=True))


def test_the_editor_shows_the_picture_a_connected_node_shows(page, until, server):
    """Before any run: Load Image's picture, scaled and cropped to fill the canvas, until it is disconnected."""
    picture = Image.new("RGB", (128, 64), "blue")
    picture.paste("red", (0, 0, 64, 64))
    picture.save(server.base / "input" / "behind.png")
    page.js(
        """const editor = LiteGraph.createNode('ConceptsRegionEditor'), source = LiteGraph.createNode('LoadImage');
        [editor.pos, source.pos] = [[420, 140], [60, 140]];
        for (const node of [editor, source]) app.graph.add(node);
        const file = source.widgets.find(widget => widget.name === 'image');
        file.options.values = ['behind.png']; file.value = 'behind.png'; file.callback?.('behind.png');
        window.joined = [source, editor, editor.inputs.findIndex(input => input.name === 'background')];"""
    )
    canvas = page.find(".concepts-paper")
    plain = _colours(page, (0.25, 0.25))
    until(lambda: page.js("return joined[0].imgs?.[0]?.naturalWidth"), what="the picture on Load Image")
    page.js("joined[0].connect(0, joined[1], joined[2])")
    assert "behind.png" in page.js(ADDRESS)
    until(lambda: _is(_colours(page, (0.25, 0.25))[0], (255, 0, 0)), what="the background")
    # a canvas as high as wide has the middle half of it
    for at, wanted in ((0.03, (255, 0, 0)), (0.47, (255, 0, 0)), (0.53, (0, 0, 255)), (0.97, (0, 0, 255))):
        assert _is(_colours(page, (at, 0.9))[0], wanted)
    page.shot("editor-background")
    page.drag(canvas, (0.3, 0.3), (0.7, 0.7))  # regions are drawn over it
    assert page.js("return JSON.parse(joined[1].widgets[0].value).regions.length") == 1
    assert page.js("return document.querySelectorAll('.concepts-drawing image ~ g .concepts-box').length") == 1
    page.js("joined[1].disconnectInput(joined[2])")
    assert page.js(ADDRESS) == ""
    until(lambda: _is(_colours(page, (0.1, 0.1))[0], plain[0]), what="the plain canvas")


def test_the_editor_shows_the_background_of_the_last_run(page, until, object_info):
    """Of a node that shows nothing itself, the picture is known once it has run."""
    # not the colour of the other renderer's run: the host says nothing anew of an inner node it has kept
    shade = {"classic": 0xFF0000, "modern": 0xFE0000}[page.renderer]
    page.open(
        to_ui(
            "behind", BEHIND | {"1": {**BEHIND["1"], "inputs": {**BEHIND["1"]["inputs"], "color": shade}}}, object_info
        )
    )
    page.js("app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    page.find(".concepts-paper")
    assert page.js(ADDRESS) == ""
    page.run()
    until(lambda: "type=temp" in page.js(ADDRESS), what="the run's background")
    until(lambda: _is(_colours(page, (0.1, 0.1))[0], (255, 0, 0)), what="the background")
    page.js(
        "const node = app.graph.getNodeById(2); "
        "node.disconnectInput(node.inputs.findIndex(i => i.name === 'background'))"
    )
    assert page.js(ADDRESS) == ""
