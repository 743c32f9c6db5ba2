"""The page in another language: help pages in it, names in it; and in English all stays as the nodes say it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
pytestmark = [pytest.mark.slow, pytest.mark.area("help"), pytest.mark.one_renderer]
TRANSLATED = json.loads((ROOT / "tests" / "nodes" / "translated.json").read_text())
WHEN = {"zh": "用途。", "ja": "使いどころ。"}
SELECTED = """app.graph.clear();
const node = LiteGraph.createNode(arguments[0]);
node.pos = [500, 420];
app.graph.add(node);
app.canvas.selectNode(node);"""
PICTURES = "return [...document.querySelectorAll('.node-help-content img')].map(i => i.naturalWidth)"
SHOWN = """const { $t, $te } = document.querySelector('#vue-app').__vue_app__.config.globalProperties;
const told = (key) => ($te(key) ? $t(key) : null);
const texts = (key) => ({ name: told(`${key}.name`), tooltip: told(`${key}.tooltip`) });
const labels = (slots) => slots.map(({ name, label, localized_name }) => [name, label ?? localized_name ?? name]);
const all = (key, part) => part && Object.fromEntries(Object.keys(part).map((name) => [name, texts(`${key}.${name}`)]));
return Object.fromEntries(Object.keys(arguments[0]).map((id) => {
  const node = LiteGraph.createNode(id);
  const { inputs, outputs } = arguments[0][id];
  const at = `nodeDefs.${id}`;
  return [id, {
    title: node.title, described: node.constructor.nodeData.description, inputs: labels(node.inputs),
    outputs: labels(node.outputs), told: { display_name: told(`${at}.display_name`),
      description: told(`${at}.description`), inputs: all(`${at}.inputs`, inputs),
      outputs: all(`${at}.outputs`, outputs) },
  }];
}));"""


def _locale(language: str) -> dict:
    return json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text())


def _help(page, until, node: str, title: str) -> str:
    """The text of a node's help in the page's panel, once it is the one with that title and its pictures are there."""
    page.js(SELECTED, node)
    page.find("[data-testid='info-button']").click()
    text = until(lambda: title in (text := page.help_text()) and text, what=f"the help page '{title}'")
    until(lambda: page.js(PICTURES) and all(page.js(PICTURES)), what="the help page's pictures")
    return text


def test_the_english_file_changes_nothing(page, object_info):
    """The page reads it like any language; a text with its own syntax would come out different, or not at all."""
    english = _locale("en")
    shown = page.js(SHOWN, english)
    for node, said in ((node, object_info[node]) for node in english):
        assert {part: texts for part, texts in shown[node]["told"].items() if texts} == english[node]
        assert (shown[node]["title"], shown[node]["described"]) == (said["display_name"], said["description"])
        assert not [names for names in shown[node]["inputs"] if names[0] != names[1]]
        assert [label for _, label in shown[node]["outputs"]] == said["output_name"]


@pytest.fixture(scope="module")
def language(request):
    """One after another, so that the page is loaded once in each."""
    return request.param


@pytest.fixture(scope="module")
def speaking(as_before, loaded, bare_errors, language):
    """The page in that language; in English again after the last one."""
    yield loaded.load(Comfy__Locale=language)
    errors = {error for error in loaded.errors() if ".md" not in error}
    assert errors <= bare_errors(loaded.version)


@pytest.mark.parametrize("language", [*WHEN, "zh-TW"], indirect=True)
def test_nodes_have_their_names_in_the_pages_language(speaking, language):
    """A reader of traditional Chinese finds the simplified names."""
    title = speaking.js("const n = LiteGraph.createNode('ConceptsRegionEditor'); app.graph.add(n); return n.title")
    speaking.shot(f"language-{language}")
    assert title == _locale(language[:2])["ConceptsRegionEditor"]["display_name"]


@pytest.mark.parametrize("language", WHEN, indirect=True)
def test_the_help_panel_is_in_the_pages_language(speaking, until, language):
    title = _locale(language)["ConceptsAnagramView"]["display_name"]
    text = _help(speaking, until, "ConceptsAnagramView", title)
    assert WHEN[language] in text
    assert "When." not in text
    speaking.shot(f"help-{language}")


@pytest.mark.own_page
@pytest.mark.parametrize("language", WHEN, indirect=True)
def test_every_translated_page_is_laid_out(speaking, until, language):
    """No mark of emphasis, table or code is left in what a person reads: these scripts put marks next to letters."""
    for node in TRANSLATED:
        text = _help(speaking, until, node, _locale(language)[node]["display_name"])
        assert not [mark for mark in ("**", "`", "|---", "![") if mark in text], node
