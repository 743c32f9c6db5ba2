"""The imports between the files of the pack as arrows, read from the code. Standard library only."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator

Arrow = tuple[str, str]
"""The importing and the imported file, as paths from the root."""
UPWARD = {
    "methods": ("host", "nodes", "demo", "boards", "workbench"),
    "host": ("nodes", "demo", "boards", "workbench"),
    "nodes": ("boards", "workbench"),
    "demo": ("nodes", "boards", "workbench"),
    "workbench": ("nodes", "host", "methods", "boards"),
}
"""The rooms that a room may not import. ``boards`` is above all others."""


def arrows(sources: dict[str, str]) -> list[Arrow]:
    """Every file and each file of the pack that it imports, once."""
    return sorted({(path, target) for path, text in sources.items() for target in _imported_files(path, text, sources)})


def _imported_files(path: str, source: str, known: dict[str, str]) -> Iterator[str]:
    package = path.split("/")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
            targets = (_file_of([*base, alias.name], known) or _file_of(base, known) for alias in node.names)
            yield from (target for target in targets if target and target != path)


def _file_of(parts: list[str], known: dict[str, str]) -> str | None:
    """The file of a module. Packages that only group files are left out."""
    file = "/".join(parts) + ".py"
    return file if file in known else None


def folder_of(path: str) -> str:
    return path.rpartition("/")[0]


def inside_folders(found: Iterable[Arrow], room: str) -> dict[str, list[Arrow]]:
    """The arrows between two files of the same folder below ``room``; the room itself is not one of these folders."""
    inside: dict[str, list[Arrow]] = {}
    for a, b in found:
        if folder_of(a) == folder_of(b) and folder_of(a).startswith(f"{room}/"):
            inside.setdefault(folder_of(a), []).append((a, b))
    return inside


def upward(found: Iterable[Arrow]) -> list[Arrow]:
    """The arrows from a room to one that it may not import."""
    return [(a, b) for a, b in found if b.split("/")[0] in UPWARD.get(a.split("/")[0], ())]


def circles(found: Iterable[Arrow]) -> list[tuple[str, ...]]:
    """Each circle of files that import one another, once for the arrow that closes it."""
    targets: dict[str, list[str]] = {}
    for a, b in found:
        targets.setdefault(a, []).append(b)
    done: set[str] = set()
    closed: list[tuple[str, ...]] = []

    def visit(path: str, way: tuple[str, ...]) -> None:
        if path in way:
            closed.append((*way[way.index(path) :], path))
        elif path not in done:
            for target in targets.get(path, ()):
                visit(target, (*way, path))
            done.add(path)

    for path in targets:
        visit(path, ())
    return closed


def report(found: list[Arrow], room: str) -> list[str]:
    """Lines that say how many arrows each folder of a room has, and how many lead to other folders and to its top."""
    inside = inside_folders(found, room)
    lines = [f"{folder}: {len(pairs)} arrows" for folder, pairs in sorted(inside.items())]
    within = [(folder_of(a), folder_of(b)) for a, b in found if a.startswith(f"{room}/") and b.startswith(f"{room}/")]
    between = {(a, b) for a, b in within if a != b and b != room}
    to_top = sum(b == room for _, b in within)
    return [
        *lines,
        f"{room}: {to_top} arrows to the files at its top, which all folders share",
        f"{room}: {len(between)} pairs of folders, {sum((a, b) in between for a, b in within)} arrows between them",
        *(f"  {a} → {b}" for a, b in sorted(between)),
    ]
