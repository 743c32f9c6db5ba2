"""``dev.py house``: the figures that the order of the code is measured by, each with its bound.

Standard library only: ``python3 -m workbench.measure_house`` from the root of the repository does the same.
"""

from __future__ import annotations

import argparse
import ast
import math
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from . import import_arrows
from .retired_names import retired

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("nodes", "host", "methods", "demo", "boards", "workbench")
SCHEMAS = {"define_schema", "INPUT_TYPES"}
LONG_FUNCTION, LONG_FILE, LONG_LINE, RUN = 25, 300, 120, 6
PROSE = re.compile(r"\b(told|stands|beside|asked|is no(?! longer))\b", re.IGNORECASE)
GUIDERS = ("host/*/guider.py", "host/*/path_guider.py", "host/*/pixel_sync.py")


class Figure(NamedTuple):
    """One line of the report. ``bound``: the most it may be; ``where``: the places that make it up."""

    name: str
    value: float
    bound: float
    where: tuple[str, ...] = ()

    @property
    def missed(self) -> bool:
        return self.value > self.bound

    def line(self) -> str:
        value = f"{self.value:.2f}".rstrip("0").rstrip(".")
        return f"{'MISSED' if self.missed else 'kept':7}{self.name:58}{value:>8}   at most {self.bound:g}"


def modules(root: Path) -> dict[str, str]:
    """Every Python file outside of the tests, by its path from the root, to its text."""
    files = [root / "dev.py", root / "__init__.py", *(p for room in ROOMS for p in sorted((root / room).rglob("*.py")))]
    return {p.relative_to(root).as_posix(): p.read_text() for p in files if p.is_file()}


def function_lengths(sources: dict[str, str]) -> dict[str, int]:
    """Lines of every function from its ``def`` to its end, without decorators; schemas are left out."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {
        f"{path}:{node.lineno} {node.name}": (node.end_lineno or node.lineno) - node.lineno + 1
        for path, source in sources.items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, kinds) and node.name not in SCHEMAS
    }


def percentile(values: Iterable[int], share: float) -> int:
    """The smallest value that this share of the values does not exceed."""
    ordered = sorted(values)
    return ordered[math.ceil(share * len(ordered)) - 1] if ordered else 0


def function_figures(sources: dict[str, str]) -> list[Figure]:
    lengths = function_lengths(sources)
    long = sorted(((n, name) for name, n in lengths.items() if n > LONG_FUNCTION), reverse=True)
    return [
        Figure("lines of a function, 90th percentile", percentile(lengths.values(), 0.9), 18),
        Figure(
            f"functions over {LONG_FUNCTION} lines, percent",
            100 * len(long) / max(1, len(lengths)),
            2,
            tuple(f"{name}: {n}" for n, name in long),
        ),
    ]


def line_figures(sources: dict[str, str]) -> list[Figure]:
    lines = {path: source.splitlines() for path, source in sources.items()}
    files = tuple(f"{path}: {len(text)}" for path, text in lines.items() if len(text) > LONG_FILE)
    wide = tuple(f"{p}:{n}" for p, text in lines.items() for n, line in enumerate(text, 1) if len(line) > LONG_LINE)
    skips = [f"{p}:{n}" for p, text in lines.items() for n, line in enumerate(text, 1) if "fmt: skip" in line]
    in_nodes = tuple(place for place in skips if place.startswith("nodes/"))
    return [
        Figure(f"files over {LONG_FILE} lines", len(files), 0, files),
        Figure(f"lines over {LONG_LINE} characters", len(wide), 0, wide),
        Figure("formatter skips in nodes/", len(in_nodes), 0, in_nodes),
    ]


def any_figure(sources: dict[str, str]) -> Figure:
    """How often ``Any`` is written in ``host/``, its imports included."""
    where = tuple(
        path
        for path, source in sources.items()
        if path.startswith("host/")
        for node in ast.walk(ast.parse(source))
        if "Any" in (getattr(node, "id", ""), getattr(node, "name", ""))
    )
    return Figure("Any in host/", len(where), 80, where)


def retired_figure(sources: dict[str, str]) -> Figure:
    found = tuple(
        f"{path}:{one.line} {one.role} {one.name}" for path, text in sources.items() for one in retired(path, text)
    )
    return Figure("retired names in code (one per file and name)", len(found), 0, found)


def _telling_lines(source: str) -> list[str]:
    """The stripped lines that hold more than brackets, quotes or an import."""
    lines = (line.strip() for line in source.splitlines())
    return [line for line in lines if re.search(r"\w", line) and not line.startswith(("from ", "import ", "#"))]


def _runs(source: str) -> set[tuple[str, ...]]:
    lines = _telling_lines(source)
    return {tuple(lines[i : i + RUN]) for i in range(len(lines) - RUN + 1)}


def duplicate_figure(root: Path) -> Figure:
    """Pairs of guiders that share a run of identical lines."""
    files = sorted({p for pattern in GUIDERS for p in root.glob(pattern)})
    runs = {p.relative_to(root).as_posix(): _runs(p.read_text()) for p in files}
    pairs = tuple(
        f"{a} = {b}: {next(iter(runs[a] & runs[b]))[0]}" for a in runs for b in runs if a < b and runs[a] & runs[b]
    )
    return Figure(f"pairs of guiders with {RUN} identical lines", len(pairs), 0, pairs)


def prose_figure(root: Path) -> Figure:
    """Words of the old prose on the pages that users read."""
    pages = [
        root / "README.md",
        *sorted((root / "web/docs").rglob("*.md")),
        *sorted((root / "workflows").rglob("*.md")),
    ]
    where = tuple(
        f"{page.relative_to(root)}:{n} {word}"
        for page in pages
        if page.is_file()
        for n, line in enumerate(page.read_text().splitlines(), 1)
        for word in PROSE.findall(line)
    )
    return Figure("told, stands, beside, asked, is no on pages", len(where), 9, where)


def arrow_figures(sources: dict[str, str]) -> list[Figure]:
    arrows = import_arrows.arrows(sources)
    inside = import_arrows.inside_folders(arrows, "host")
    upward, circles = import_arrows.upward(arrows), import_arrows.circles(arrows)
    where = tuple(f"{a} → {b}" for pairs in inside.values() for a, b in pairs)
    return [
        Figure("import arrows inside the folders of host/", len(where), 45, where),
        Figure("import arrows from a room up to another", len(upward), 0, tuple(f"{a} → {b}" for a, b in upward)),
        Figure("circles of imports", len(circles), 0, tuple(" → ".join(c) for c in circles)),
    ]


def figures(root: Path = ROOT) -> list[Figure]:
    """All figures of the code below ``root``."""
    sources = modules(root)
    return [
        *arrow_figures(sources),
        *function_figures(sources),
        *line_figures(sources),
        any_figure(sources),
        duplicate_figure(root),
        retired_figure(sources),
        prose_figure(root),
    ]


def main(arguments: list[str]) -> int:
    """Prints every figure with its bound. Returns 1 if one is missed, else 0."""
    parser = argparse.ArgumentParser(prog="dev.py house", description=__doc__)
    parser.add_argument("--where", action="store_true", help="also list the places that make up a missed figure")
    options = parser.parse_args(arguments)
    measured = figures()
    for figure in measured:
        print(figure.line())
        for place in figure.where if options.where and figure.missed else ():
            print(f"         {place}")
    for line in import_arrows.report(import_arrows.arrows(modules(ROOT)), "host"):
        print(line)
    return 1 if any(figure.missed for figure in measured) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
