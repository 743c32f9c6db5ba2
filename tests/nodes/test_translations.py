"""The translated help pages: each says what its English page says, under the names of its own language."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
DOCS = ROOT / "web" / "docs"
RECORD = Path(__file__).parent / "translated.json"
TRANSLATED = json.loads(RECORD.read_text())
"""For each translated page, by node and language: the start of the SHA-256 of the English page it was read against."""
PAGES = [(node, language) for node, read in TRANSLATED.items() for language in read]
NAMES = {
    language: json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text())
    for language in sorted({"en"} | {language for _, language in PAGES})
}
NUMBER = re.compile(r"(?<![A-Za-z])\d+(?:\.\d+)?")  # not the one in img2img
CODE = re.compile(r"`([^`]+)`")
PICTURE = re.compile(r"!\[([^\]]+)\]\(([^)]+)\)")


def _english(node: str) -> str:
    return (DOCS / f"{node}.md").read_text()


def _page(node: str, language: str) -> str:
    return (DOCS / node / f"{language}.md").read_text()


def _shape(page: str) -> Counter[str]:
    """How many headings, lists, tables, pictures and paragraphs a page has, and how many of them begin in bold."""
    kinds = Counter[str]()
    for block in re.split(r"\n\n+|\n(?=[-|])", page.strip()):
        mark = re.match(r"#+|- |\||!\[|\*\*", block)
        kinds[mark[0] if mark else "paragraph"] += 1
    return kinds


def _inputs(page: str) -> list[list[str]]:
    """The inputs of an English page's first table, row by row; empty if the page has no such table."""
    table = re.search(r"^\| input \|.*\n\|[-|]+\n((?:\|.*\n)+)", page, re.MULTILINE)
    return [row.split("|")[1].strip().split(", ") for row in table[1].splitlines()] if table else []


@pytest.mark.parametrize(("node", "language"), PAGES)
def test_a_translation_has_been_read_against_todays_english(node, language):
    english = hashlib.sha256(_english(node).encode()).hexdigest()[:12]
    assert TRANSLATED[node][language] == english, (
        f"web/docs/{node}.md has changed: bring web/docs/{node}/{language}.md up to date, then write "
        f'"{language}": "{english}" for {node} into {RECORD.relative_to(ROOT)}'
    )


def test_every_translated_page_is_recorded_and_every_recorded_one_is_there():
    there = {(page.parent.name, page.stem) for page in DOCS.glob("Concepts*/*.md")}
    assert there == set(PAGES)
    assert len(TRANSLATED) >= 10


@pytest.mark.parametrize(("node", "language"), PAGES)
def test_a_translation_has_the_same_parts(node, language):
    assert _shape(_page(node, language)) == _shape(_english(node))


@pytest.mark.parametrize(("node", "language"), PAGES)
def test_a_translation_has_the_same_figures(node, language):
    assert Counter(NUMBER.findall(_page(node, language))) == Counter(NUMBER.findall(_english(node)))


@pytest.mark.parametrize(("node", "language"), PAGES)
def test_a_translation_shows_the_same_pictures_in_its_own_words(node, language):
    """The page looks for pictures beside the English pages, also from a translation in a folder of its own."""
    ours, english = PICTURE.findall(_page(node, language)), PICTURE.findall(_english(node))
    assert [target for _, target in ours] == [target for _, target in english]
    assert not [target for _, target in ours if not (DOCS / target).is_file()]
    assert not [text for text, _ in ours if text.isascii()]


@pytest.mark.parametrize(("node", "language"), PAGES)
def test_a_translation_names_each_input_as_the_node_does(node, language):
    page, shown = _page(node, language), NAMES[language][node]
    assert page.startswith(f"# {shown['display_name']}\n")
    rows = _inputs(_english(node))
    for row in rows:
        beginning = "、".join(f"{shown['inputs'][name]['name']} `{name}`" for name in row)
        assert f"\n| {beginning} | " in page, f"no row begins with: {beginning}"
    named = {name for row in rows for name in row}
    assert not rows or named == set(NAMES["en"][node]["inputs"])


@pytest.mark.parametrize(("node", "language"), PAGES)
def test_a_translation_keeps_every_prompt_choice_and_command(node, language):
    """What stands in code, apart from the inputs' names before each row."""
    english = _english(node)
    added = Counter(name for row in _inputs(english) for name in row)
    assert Counter(CODE.findall(_page(node, language))) == Counter(CODE.findall(english)) + added


@pytest.mark.parametrize(("node", "language"), PAGES)
def test_a_translation_calls_the_other_nodes_by_their_names(node, language):
    """Names of one word, such as *Concept*, are also ordinary words: they are left out."""
    titles = {english["display_name"]: key for key, english in NAMES["en"].items() if " " in english["display_name"]}
    longest_first = sorted(titles, key=len, reverse=True)
    mentioned = set(re.findall("|".join(map(re.escape, longest_first)), _english(node).replace("\n", " ")))
    page = _page(node, language)
    assert not [title for title in mentioned if NAMES[language][titles[title]]["display_name"] not in page]


@pytest.mark.parametrize(("node", "language"), PAGES)
def test_a_translation_breaks_no_line_within_a_paragraph(node, language):
    """A line break becomes a space on the page, and these scripts have none between their letters."""
    blocks = re.split(r"\n\n+|\n(?=[-|])", _page(node, language).strip())
    assert not [block for block in blocks if "\n" in block]
