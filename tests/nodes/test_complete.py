"""What a person finds for every node: a page, tooltips, words to search for, a template, and their own language."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path

import pytest
from comfyui_concepts.nodes import NODES
from comfyui_concepts.workbench.languages import english

ROOT = Path(__file__).resolve().parent.parent.parent
DOCS, API = ROOT / "web" / "docs", ROOT / "workflows" / "api"
HEADS = ("When", "Cost", "Limits")
LANGUAGES = ("zh", "ja")
START = re.compile(r"Start with (-?\d+(?:\.\d+)?)")
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
NATIVE = {"zh": re.compile("[\u4e00-\u9fff]"), "ja": re.compile("[\u3040-\u30ff\u4e00-\u9fff]")}


def _translations(language: str) -> dict:
    return json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text())


def _texts(value: dict, path: str = "") -> dict[str, str]:
    """Every text of a nested object by its path."""
    found: dict[str, str] = {}
    for key, inner in value.items():
        found |= _texts(inner, f"{path}{key}.") if isinstance(inner, dict) else {f"{path}{key}": inner}
    return found


def test_english_is_what_the_nodes_say(object_info):
    assert _translations("en") == english(object_info), "make it again with: python3 dev.py languages"


def test_prompts_that_stand_for_clip_text_encode_are_dynamic_as_its_own_is(object_info):
    """The page chooses from alternatives in braces, and leaves out remarks, in every widget marked like the host's."""
    theirs = object_info["CLIPTextEncode"]["input"]["required"]["text"][1]["dynamicPrompts"]
    shown = {
        (node.__name__, widget): about[1].get("dynamicPrompts")
        for node in NODES
        for inputs in object_info[node.__name__]["input"].values()
        for widget, about in inputs.items()
        if widget in ("prompt", "negative", "text") and about[0] == "STRING"
    }
    assert len(shown) == 4
    assert set(shown.values()) == {theirs}


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_name_and_tooltip_is_translated(language):
    base, there = _texts(_translations("en")), _texts(_translations(language))
    missing = sorted(base.keys() - {path for path, text in there.items() if text})
    assert not missing, f"add to locales/{language}/nodeDefs.json:\n" + "\n".join(missing)
    assert not there.keys() - base.keys(), "these are of no node"
    long = {path: text for path, text in there.items() if path.endswith(("tooltip", "description"))}
    foreign = [path for path, text in long.items() if not NATIVE[language].search(text)]
    assert not foreign, f"not in {language}: {foreign}"


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_starting_value_is_the_same_in_every_language(language):
    there = _texts(_translations(language))
    started = {path: START.search(text) for path, text in _texts(_translations("en")).items()}
    wrong = {
        path: there[path]
        for path, start in started.items()
        if start and float(start[1]) not in map(float, NUMBER.findall(there[path]))
    }
    assert len([start for start in started.values() if start]) > 50
    assert not wrong


@pytest.mark.parametrize("language", ["en", *LANGUAGES])
def test_no_text_holds_what_the_page_reads_as_its_own_syntax(language):
    """The page's translator fills in braces, follows ``@`` and cuts at ``|``; it drops a text it cannot read."""
    assert not {path: text for path, text in _texts(_translations(language)).items() if re.search(r"[{}@|]", text)}


@pytest.mark.slow
@pytest.mark.parametrize("language", ["en", *LANGUAGES])
def test_the_host_serves_the_translations(server, language):
    served = server.get("/i18n")[language]["nodeDefs"]
    assert served.items() >= _translations(language).items()


@pytest.mark.parametrize("node", NODES, ids=lambda n: n.__name__)
def test_a_node_can_be_searched_for(node):
    """The words only newer hosts read; older ones drop them, so they are looked for in the source."""
    aliases = re.search(r"search_aliases=\[([^\]]+)\]", inspect.getsource(node))
    assert aliases, f"{node.__name__} has no search_aliases"
    assert len(re.findall(r'"[^"]+"', aliases[1])) >= 1


def test_counts():
    """Every node: help page, tooltips, translations, at least one template."""
    used = {n["class_type"] for p in API.rglob("*.json") for n in json.loads(p.read_text()).values()}
    rows = []
    for node in NODES:
        schema = node.GET_SCHEMA()
        rows.append(
            {
                "node": schema.node_id,
                "page": (DOCS / f"{schema.node_id}.md").exists(),
                "tooltips": all(socket.tooltip for socket in (*schema.inputs, *schema.outputs)),
                "languages": all(schema.node_id in _translations(language) for language in LANGUAGES),
                "template": schema.node_id in used,
            }
        )
    assert [row for row in rows if not all(row.values())] == []


@pytest.mark.parametrize("node", NODES, ids=lambda n: n.__name__)
def test_a_help_page_says_when_what_it_costs_and_where_it_ends(node):
    page = (DOCS / f"{node.__name__}.md").read_text()
    missing = [head for head in HEADS if len(re.findall(rf"^\*\*{head}\.\*\* \S", page, re.MULTILINE)) != 1]
    assert not missing, f"{node.__name__}.md needs one paragraph each that starts with: " + ", ".join(
        f"**{head}.**" for head in missing
    )


@pytest.mark.parametrize("node", NODES, ids=lambda n: n.__name__)
def test_a_help_page_shows_what_its_own_node_took_part_in(node):
    page = (DOCS / f"{node.__name__}.md").read_text()
    graphs = {name: API / f"{name}.json" for name in re.findall(r"\(pictures/(\w+)\.\w+\)", page)}
    strange = [
        name for name, path in graphs.items()
        if path.is_file() and not any(n["class_type"] == node.__name__ for n in json.loads(path.read_text()).values())
    ]  # fmt: skip
    assert not strange, f"{node.__name__} is not in the graph behind these pictures: {strange}"


def test_pictures_of_the_help_pages_are_there():
    pages = {page: re.findall(r"!\[([^\]]+)\]\(([^)]+)\)", page.read_text()) for page in DOCS.glob("*.md")}
    named = {(page.parent / target) for page, pictures in pages.items() for _, target in pictures}
    assert len(named) >= 8
    assert [path.name for path in named if not path.is_file()] == []
