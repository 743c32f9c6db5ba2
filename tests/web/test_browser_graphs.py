"""Templates, dropped files, runs and help, as a person meets them in the browser."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

import pytest
from comfyui_concepts.demo.client import run_graph

ROOT = Path(__file__).resolve().parent.parent.parent
TEMPLATES = sorted((ROOT / "workflows").glob("*.json"))
HAS_PICTURE = "return arguments[0].querySelector('img')?.naturalWidth > 0"
pytestmark = pytest.mark.slow


def by_name(path):
    return path.stem


def _classes(graph: dict) -> dict:
    return {k: (n["class_type"], n["inputs"]) for k, n in graph.items()}


def _api(name: str) -> dict:
    return json.loads((ROOT / "workflows" / "api" / f"{name}.json").read_text())


def test_the_template_dialog_shows_ours_and_opens_one(page, until):
    page.find(".templates-tab-button").click()
    category = until(
        lambda: page.js(
            "return [...document.querySelectorAll('.p-dialog *, [role=dialog] *')]"
            ".find(e => !e.children.length && e.textContent.trim() === 'comfyui-concepts') ?? null"
        ),
        what="the pack's section in the template dialog",
    )
    category.click()
    for path in TEMPLATES:
        card = page.find(f"[data-testid='template-workflow-{path.stem}']")
        until(lambda card=card: page.js(HAS_PICTURE, card), what=f"the thumbnail of {path.stem}")
    page.shot(f"templates-{page.renderer}")
    page.find("[data-testid='template-workflow-demo_first_picture']").click()
    until(lambda: _classes(page.api_graph()) == _classes(_api("demo_first_picture")), what="the opened template")


def test_a_dropped_workflow_file_restores_the_graph(page, until):
    page.drop("mine.json", (ROOT / "workflows" / "regions_by_hand.json").read_bytes(), "application/json")
    until(lambda: _classes(page.api_graph()) == _classes(_api("regions_by_hand")), what="the dropped graph")


def test_a_dropped_picture_restores_the_graph_it_was_made_with(page, server, until):
    template = json.loads((ROOT / "workflows" / "regions_by_hand.json").read_text())
    picture = asyncio.run(run_graph(server.url, _api("regions_by_hand"), workflow=template))[0]
    page.drop("picture.png", picture.data, "image/png")
    until(lambda: _classes(page.api_graph()) == _classes(_api("regions_by_hand")), what="the picture's graph")


def _run(page, until, name: str) -> None:
    """Presses Run and waits until every Save Image shows its pictures; keeps a screenshot."""
    page.find("[data-testid='queue-button'] button").click()
    saving = [node for node, what in _api(name).items() if what["class_type"] == "SaveImage"]
    shown = "return arguments[0].every(node => app.nodeOutputs?.[node]?.images?.length)"
    until(lambda: page.js(shown, saving), 120, f"the pictures of {name}")
    on_node = "return document.querySelector(`[data-node-id='${arguments[0]}'] img`)?.naturalWidth"
    if page.renderer == "classic":
        on_node = "return app.graph.getNodeById(arguments[0]).imgs?.[0]?.naturalWidth"
    until(lambda: page.js(on_node, saving[0]), what=f"a picture on node {saving[0]}")
    page.shot(f"{name}-{page.renderer}-finished", whole=True)


def test_run_makes_a_picture_on_the_node(page, until):
    page.open(json.loads((ROOT / "workflows" / "regions_by_hand.json").read_text()))
    page.js("app.graph.getNodeById(12).widgets.find(w => w.name === 'seed').value = arguments[0]", int(time.time()))
    _run(page, until, "regions_by_hand")


@pytest.mark.parametrize("path", TEMPLATES, ids=by_name)
def test_a_template_opens_as_it_was_made(page, path):
    page.open(json.loads(path.read_text()))
    assert _classes(page.api_graph()) == _classes(_api(path.stem))
    page.shot(f"{path.stem}-{page.renderer}-open", whole=True)


@pytest.mark.parametrize("path", TEMPLATES, ids=by_name)
def test_a_template_runs_to_its_pictures_untouched(page, until, path):
    """In one renderer: the other shows the same outputs, which the test above looks at."""
    if page.renderer == "classic":
        page.open(json.loads(path.read_text()))
        _run(page, until, path.stem)


@pytest.mark.parametrize("node", ["ConceptsRegionEditor", "ConceptsAnagramView"])
def test_the_help_panel_shows_our_page(page, until, node):
    page.js(
        "const n = LiteGraph.createNode(arguments[0]); n.pos = [400, 200]; app.graph.add(n); app.canvas.selectNode(n)",
        node,
    )
    page.find("[data-testid='info-button']").click()
    text = until(lambda: page.js("return document.querySelector('.node-help-content .markdown-content')?.innerText"))
    title = (ROOT / "web" / "docs" / f"{node}.md").read_text().splitlines()[0].removeprefix("# ")
    assert title in text
    assert "When." in text
    page.shot(f"help-{node}-{page.renderer}")
    page.js("app.extensionManager.sidebarTab?.toggleSidebarTab?.('node-library')")
