"""Names that this repository no longer uses, and where each of them is retired.

The glossary in CONTRIBUTING gives the term to use instead. Standard library only.
"""

from __future__ import annotations

import ast
import fnmatch
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

DEFINITIONS = ("module", "class", "function", "argument", "field", "variable", "import")
MEMBERS = ("field", "attribute", "keyword")


class Found(NamedTuple):
    """One identifier of a file. ``role``: one of ``DEFINITIONS``, or ``attribute`` or ``keyword`` where it is used."""

    role: str
    name: str
    line: int


class Retired(NamedTuple):
    """Words that no identifier equals, in the files of these patterns and in these roles (all roles if empty)."""

    words: str
    where: tuple[str, ...]
    roles: tuple[str, ...] = ()

    def covers(self, path: str, found: Found) -> bool:
        """Whether this row retires the identifier in the file ``path`` (from the root, with slashes)."""
        matches = any(fnmatch.fnmatch(path, pattern) for pattern in self.where)
        return matches and found.name in self.words.split() and (not self.roles or found.role in self.roles)


HOST, TRAINED = ("host/*",), ("methods/erase/trained/*", "host/erase/*")
ANAGRAM = ("host/anagram/*", "methods/anagram/*", "nodes/anagram/*", "boards/*")
EVERYWHERE = ("*",)
TABLE = (
    Retired(
        "Once once_for with_helpers sampled_stays_loaded watching Watcher Voice Around around_attention", EVERYWHERE
    ),
    Retired("Pull Puller pull_of Ground Keeper draw_bank objects_present", EVERYWHERE),
    Retired("concept_ways concept_scenes test_anagram_company several", EVERYWHERE, ("module", "import")),
    Retired("once beside", HOST, ("module", "import")),
    Retired("due kept trials lasting", ("host/engine/latent_edits.py",)),
    Retired("trials lasting watched _watched told ask asked _ask answer _answer answers_of _answering_again", HOST),
    Retired("said wanted ask asked answer answers_of Terms Bank heads beside", ("methods/erase/trained/*",)),
    Retired("Terms Bank paint Painter", ("host/erase/*", "demo/*", "boards/*")),
    Retired("around", ("host/engine/attention.py",)),
    Retired("look looks seen Maps", ("host/compose/*", "host/anagram/anti_segregation.py")),
    Retired("Maps", ("methods/compose/*",)),
    Retired("side sides SIDE SIDES", HOST),
    Retired("alone deep _whole _told _take_over _store", ("host/conduct/paths.py",)),
    Retired("known", ("host/anagram/*",), (*MEMBERS, "argument")),
    Retired("counted", ("host/anagram/*", "methods/anagram/*")),
    Retired("together largest least even", ANAGRAM, MEMBERS),
    Retired("of read", ANAGRAM, ("field", "keyword")),
    Retired("Reader eye reads read_by", ANAGRAM, DEFINITIONS),
    Retired("PLACES", HOST),
    Retired("place", ("host/lora/adapters.py",)),
    Retired("place", ("host/erase/*",), (*MEMBERS, "argument")),
    Retired("normal switched _Held prompts", ("host/engine/gradients.py",)),
    Retired("covered covered_for", ("host/*/guider.py", "host/conduct/*", "host/anagram/pixel_sync.py")),
    Retired("Way ways Maker Order carry_out Tally spread counted", ("boards/*",)),
    Retired("_WIDE _MOST _SAME _SEEDS_APART", HOST),
)
"""One entry for each row of names that were given up, with the rooms or files they were given up in."""


def identifiers(path: str, source: str) -> Iterator[Found]:
    """Every identifier of a file with its role."""
    yield Found("module", Path(path).stem, 1)
    for node in ast.walk(ast.parse(source)):
        yield from _of_node(node)


def _of_node(node: ast.AST) -> Iterator[Found]:
    if isinstance(node, ast.ClassDef):
        yield Found("class", node.name, node.lineno)
        yield from _fields(node)
    elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        yield Found("function", node.name, node.lineno)
    elif isinstance(node, ast.arg):
        yield Found("argument", node.arg, node.lineno)
    elif isinstance(node, ast.keyword) and node.arg:
        yield Found("keyword", node.arg, node.value.lineno)
    elif isinstance(node, ast.Attribute):
        yield Found("attribute", node.attr, node.lineno)
    elif isinstance(node, ast.Name):
        yield Found("variable", node.id, node.lineno)
    elif isinstance(node, (ast.Import, ast.ImportFrom)):
        yield from _imported(node)


def _fields(node: ast.ClassDef) -> Iterator[Found]:
    """The names that a class body assigns or annotates."""
    for statement in node.body:
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        for target in targets:
            if isinstance(target, ast.Name):
                yield Found("field", target.id, statement.lineno)


def _imported(node: ast.Import | ast.ImportFrom) -> Iterator[Found]:
    modules = (getattr(node, "module", None) or "").split(".") if getattr(node, "level", 0) else []
    names = [*modules, *(part for alias in node.names for part in (alias.name, alias.asname) if part)]
    yield from (Found("import", name, node.lineno) for name in names if name)


def retired(path: str, source: str) -> list[Found]:
    """The identifiers of a file that are retired there, each once."""
    rows = [row for row in TABLE if any(fnmatch.fnmatch(path, pattern) for pattern in row.where)]
    found: dict[str, Found] = {}
    for one in identifiers(path, source):
        if any(row.covers(path, one) for row in rows):
            found.setdefault(one.name, one)
    return list(found.values())
