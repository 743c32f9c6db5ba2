"""Templates, dropped files, runs and help, as a person meets them in the browser."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
TEMPLATES = sorted((ROOT / "workflows").glob("*.json"))
ON_CANVAS = [path for path in TEMPLATES if "linearMode" not in json.loads(path.read_text())["extra"]]  # no app
RUNNABLE = {path.stem for path in (ROOT / "workflows" / "api").glob("*.json")}
CATEGORY = (
    "return [...document.querySelectorAll('.p-dialog *, [role=dialog] *')]"
    ".find(e => !e.children.length && e.textContent.trim() === 'comfyui-concepts') ?? null"
)
HAS_PICTURE = "return arguments[0].querySelector('img')?.naturalWidth > 0"
EDITOR = "app.graph.nodes.find(node => node.type === 'ConceptsRegionEditor')"
SHORT = """for (const { widgets } of app.graph.nodes)
  for (const [name, value] of [['steps', 4], ['batch_size', 1]]) {
    const widget = widgets?.find(one => one.name === name);
    if (widget) widget.value = value;
  }"""
"""What a script sets where the length of a run is not what is tested."""
pytestmark = pytest.mark.slow


def by_name(path):
    return path.stem


def _classes(graph: dict) -> dict:
    return {k: (n["class_type"], n["inputs"]) for k, n in graph.items()}


def _api(name: str) -> dict:
    (path,) = (ROOT / "workflows" / "api").rglob(f"{name}.json")
    return json.loads(path.read_text())


def _ours_in_the_dialog(page, until) -> None:
    """The dialog with our templates: its list of sections may have to be scrolled."""
    category = until(lambda: page.js(CATEGORY), what="the pack's section in the template dialog")
    page.js("arguments[0].scrollIntoView({ block: 'center' })", category)
    category.click()


def _card(page, until, name: str):
    """A template's card in the dialog, scrolled into sight: the dialog makes more of them the further one scrolls."""

    def there():
        card = page.js("return document.querySelector(`[data-testid='template-workflow-${arguments[0]}']`)", name)
        last = "[...document.querySelectorAll(\"[data-testid^='template-workflow-']\")].at(-1)?.scrollIntoView()"
        page.js(last if card is None else "arguments[0].scrollIntoView({ block: 'center' })", card)
        return card

    return until(there, what=f"the card of {name}")


@pytest.mark.every_page
@pytest.mark.area("templates")
@pytest.mark.one_renderer
def test_the_template_dialog_shows_ours_with_their_pictures(page, until):
    page.find(".templates-tab-button").click()
    _ours_in_the_dialog(page, until)
    for path in TEMPLATES:
        card = _card(page, until, path.stem)
        until(lambda card=card: page.js(HAS_PICTURE, card), what=f"the thumbnail of {path.stem}")
    page.shot("templates")


@pytest.mark.every_page
@pytest.mark.area("drop")
def test_a_dropped_workflow_file_restores_the_graph(page, until):
    page.drop("mine.json", (ROOT / "workflows" / "regions_by_hand.json").read_bytes(), "application/json")
    until(lambda: _classes(page.api_graph()) == _classes(_api("regions_by_hand")), what="the dropped graph")


@pytest.mark.every_page
@pytest.mark.area("drop")
def test_a_dropped_picture_restores_the_graph_it_was_made_with(page, finished, until):
    picture = finished("regions_by_hand").pictures[0]
    page.drop("picture.png", picture.data, "image/png")
    until(lambda: _classes(page.api_graph()) == _classes(_api("regions_by_hand")), what="the picture's graph")


def _shows_picture(page, node: int) -> bool:
    on_node = "return document.querySelector(`[data-node-id='${arguments[0]}'] img`)?.naturalWidth"
    if page.renderer == "classic":
        on_node = "app.canvas.setDirty(true, true); return app.graph.getNodeById(arguments[0]).imgs?.[0]?.naturalWidth"
    return bool(page.js(on_node, node))


def _pick_from_dialog(page, until, name: str) -> None:
    page.find(".templates-tab-button").click()
    _ours_in_the_dialog(page, until)
    card = _card(page, until, name)
    page.shot("newcomer-1-template")
    card.click()
    until(lambda: _classes(page.api_graph()) == _classes(_api(name)), what="the opened template")


def _editor_in_sight(page):
    """The template's editor, as large as a person makes it to draw in it."""
    page.js(f"app.canvas.ds.scale = 1; app.canvas.centerOnNode({EDITOR}); app.canvas.setDirty(true, true)")
    paper = page.find(".concepts-paper")
    page.at_rest(paper)
    return paper


def _newcomer(page, until, *, short: bool = False) -> None:
    """No coordinate is typed: a template with two LoRAs, a drag for each region, Run."""
    _pick_from_dialog(page, until, "conduct_regions")
    page.shot("newcomer-2-opened")
    paper = _editor_in_sight(page)
    page.drag(paper, (0.25, 0.5), (0.25, 0.5))  # the lion's region is chosen by a click,
    page.drag(paper, (0.485, 0.735), (0.45, 0.95))  # made slimmer and higher at its corner,
    page.drag(paper, (0.75, 0.5), (0.72, 0.55))  # and the robot's is moved
    lion, robot = json.loads(page.js(f"return {EDITOR}.widgets.find(w => w.name === 'regions').value"))["regions"]
    assert lion["boxes"][0] == pytest.approx([0.015, 0.265, 0.435, 0.685], abs=0.04)
    assert robot["boxes"][0] == pytest.approx([0.485, 0.315, 0.47, 0.47], abs=0.04)
    page.shot("newcomer-3-drawn")
    if short:
        page.js(SHORT)
    page.run()
    until(lambda: page.js("return app.nodeOutputs?.[14]?.images?.length"), 300, "the pictures")
    page.shot("newcomer-4-made", whole=True)  # with Save Image in sight; the page loads what is
    until(lambda: _shows_picture(page, 14), what="a picture on Save Image")
    page.shot("newcomer-4-made", whole=True)


@pytest.mark.every_page
@pytest.mark.area("run")
def test_from_the_template_dialog_to_a_picture_of_two_concepts_by_mouse_alone(page, until):
    """In a short run; the whole one is that of the archive."""
    _newcomer(page, until, short=True)


def test_the_archive_alone_takes_a_newcomer_as_far(driver, host_path, tmp_path_factory, until):
    """What the registry sends, in a host of its own, on the newest page."""
    from comfyui_concepts.workbench import browser, pages, release, server

    own, *later = pages.all_pages()
    if not later:
        pytest.skip(f"only page {own} is shown; CONCEPTS_PAGES=own leaves the later ones out")
    installed = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(release.make(tmp_path_factory.mktemp("archive"))) as packed:
        packed.extractall(installed)
    served = pages.ServedPage(tmp_path_factory.mktemp("installed-pages"))
    newest = later[-1]
    served.show(newest)
    with server.HostServer(host_path, pack=installed, arguments=("--front-end-root", str(served.root))) as host:
        host.wait()
        _newcomer(browser.Page(driver, host.url, f"{newest}-archive", "modern").load(), until)
        driver.get("about:blank")  # before its host goes away


@pytest.mark.area("templates")
@pytest.mark.own_page
@pytest.mark.parametrize("path", [path for path in ON_CANVAS if path.stem in RUNNABLE], ids=by_name)
def test_a_template_opens_as_it_was_made_and_shows_what_it_made(page, until, finished, path):
    """The run itself is the host's, by its API; the page is told of it as it is when it has queued it."""
    page.open(json.loads(path.read_text()))
    assert _classes(page.api_graph()) == _classes(_api(path.stem))
    page.shot(f"{path.stem}-open", whole=True)
    page.finish(finished(path.stem).outputs)
    saving = next(int(node) for node, what in _api(path.stem).items() if what["class_type"] == "SaveImage")
    until(lambda: _shows_picture(page, saving), what=f"a picture on node {saving}")
    page.shot(f"{path.stem}-finished", whole=True)


@pytest.mark.area("templates")
@pytest.mark.own_page
@pytest.mark.one_renderer
@pytest.mark.parametrize("path", [path for path in ON_CANVAS if path.stem not in RUNNABLE], ids=by_name)
def test_a_template_for_a_checkpoint_opens_as_it_was_made(page, path):
    """Whether the files it names exist or not: nothing of the graph is lost."""
    page.open(json.loads(path.read_text()))
    assert _classes(page.api_graph()) == _classes(_api(path.stem))
    page.shot(f"{path.stem}-open", whole=True)


@pytest.mark.every_page
@pytest.mark.area("help")
@pytest.mark.parametrize("node", ["ConceptsRegionEditor", "ConceptsAnagramView"])
def test_the_help_panel_shows_our_page(page, until, node):
    page.js(
        "const n = LiteGraph.createNode(arguments[0]); n.pos = [400, 200]; app.graph.add(n); app.canvas.selectNode(n)",
        node,
    )
    page.find("[data-testid='info-button']").click()
    text = until(page.help_text, what="the help page")
    title = (ROOT / "web" / "docs" / f"{node}.md").read_text().splitlines()[0].removeprefix("# ")
    assert title in text
    assert "When." in text
    loaded = "return [...document.querySelectorAll('.node-help-content img')].map(i => i.naturalWidth)"
    until(lambda: all(page.js(loaded)) and page.js(loaded), what="the page's pictures")
    page.shot(f"help-{node}")
