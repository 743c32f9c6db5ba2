"""Which browser tests passed on which page: kept by a test session, printed as the table of docs/RESULTS.md."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "output" / "browser" / "pages.json"
RESULTS = ROOT / "docs" / "RESULTS.md"
AREAS = ("editor", "templates", "drop", "run", "help", "App mode")
BEGIN, END = "<!-- pages: made by python3 dev.py pages -->", "<!-- /pages -->"


class PageTest(NamedTuple):
    """A browser test on one page in one renderer. ``why`` is empty when it passed."""

    page: str
    renderer: str
    area: str
    name: str
    outcome: str
    why: str


def results_in(reports: Iterable[Any]) -> list[PageTest]:
    """The browser tests among pytest's reports: those that told their page. Any failed part of one fails it."""
    found: dict[str, PageTest] = {}
    for report in reports:
        told = dict(getattr(report, "user_properties", ()))
        if "page" not in told or (report.when != "call" and report.passed):
            continue
        before = found.get(report.nodeid)
        if before is None or before.outcome == "passed":
            name = report.nodeid.rsplit("::", 1)[-1]
            found[report.nodeid] = PageTest(**told, name=name, outcome=report.outcome, why=_why(report))
    return list(found.values())


def _why(report: Any) -> str:
    """The reason of a skip, or the first line of what failed."""
    if report.passed:
        return ""
    if report.skipped and isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(getattr(crash, "message", report.longrepr)).splitlines()[0]


def keep_results(reports: Iterable[Any], path: Path) -> list[str]:
    """Writes down what ran on which page; returns the line that names the pages, or nothing if no page was shown."""
    results = results_in(reports)
    if not results:
        return []
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([result._asdict() for result in results], indent=1) + "\n")
    pages = dict.fromkeys(result.page for result in sorted(results, key=lambda r: _age(r.page)))
    counts = [f"{page} ({sum(r.page == page for r in results)} tests)" for page in pages]
    return [f"page {', '.join(counts)}"]


def _age(page: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", page)]


def table(results: list[PageTest]) -> str:
    """Page by renderer, and what passed in each area: a count, or the reasons why not."""
    lines = [f"| page | renderer | {' | '.join(AREAS)} |", "|" + "---|" * (2 + len(AREAS))]
    rows = dict.fromkeys((r.page, r.renderer) for r in results)
    for page, renderer in sorted(rows, key=lambda row: (_age(row[0]), row[1])):
        cells = [_cell([r for r in results if r[:3] == (page, renderer, area)]) for area in AREAS]
        lines.append(f"| {page} | {renderer} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(tests: list[PageTest]) -> str:
    """``pass (3)``, or the reasons of what did not pass."""
    passed = sum(test.outcome == "passed" for test in tests)
    failed = [f"fails: {test.name}: {test.why}" for test in tests if test.outcome == "failed"]
    skipped = sorted({test.why for test in tests if test.outcome == "skipped"})
    said = [f"pass ({passed})"] if passed else []
    return "; ".join([*said, *failed, *skipped]).replace("|", "/") or "not run"


def main(arguments: list[str]) -> int:
    """Prints the table of the last test session; ``--write`` puts it into docs/RESULTS.md."""
    if not KEPT.is_file():
        print(f"There is no {KEPT.relative_to(ROOT)}; run the browser tests first: python3 dev.py test tests/web")
        return 1
    made = table([PageTest(**kept) for kept in json.loads(KEPT.read_text())])
    print(made)
    if "--write" in arguments:
        write_results(BEGIN, END, made)
    return 0


def write_results(begin: str, end: str, made: str) -> None:
    """Puts a table between two marks of docs/RESULTS.md."""
    text = RESULTS.read_text()
    before, after = text.index(begin) + len(begin), text.index(end)
    RESULTS.write_text(f"{text[:before]}\n\n{made}\n\n{text[after:]}")
