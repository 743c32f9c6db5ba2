"""What everything of ours makes beside other nodes: kept by a test session, printed as the table of docs/RESULTS.md."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from .page_results import ROOT, write_results

KEPT = ROOT / "output" / "company.json"
BEGIN, END = "<!-- company: made by python3 dev.py company -->", "<!-- /company -->"


class Cell(NamedTuple):
    """One of ours beside one of others: ``equal``, ``refused`` or ``fails``."""

    ours: str
    company: str
    found: str


def cells_in(reports: Iterable[Any]) -> list[Cell]:
    """The cells among pytest's reports: tests that told which they are."""
    found: dict[tuple[str, str], Cell] = {}
    for report in reports:
        told = dict(getattr(report, "user_properties", ()))
        if {"ours", "company"} <= told.keys() and (report.when == "call" or report.failed):
            cell = Cell(told["ours"], told["company"], told.get("found", "fails") if report.passed else "fails")
            found[cell[:2]] = cell
    return list(found.values())


def kept_cells(path: Path = KEPT) -> list[Cell]:
    """The cells that sessions have tested, the latest of each."""
    return [Cell(*cell) for cell in json.loads(path.read_text())] if path.is_file() else []


def keep_cells(reports: Iterable[Any], path: Path = KEPT) -> None:
    """Writes down the cells that a session has tested, over those of earlier ones."""
    cells = cells_in(reports)
    if cells:
        latest = {cell[:2]: cell for cell in [*kept_cells(path), *cells]}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(list(latest.values()), indent=1) + "\n")


def table(cells: list[Cell]) -> str:
    """Ours by company, as Markdown."""
    ours, company = (list(dict.fromkeys(names)) for names in ([c.ours for c in cells], [c.company for c in cells]))
    found = {cell[:2]: cell.found for cell in cells}
    lines = [f"| | {' | '.join(company)} |", "|" + "---|" * (1 + len(company))]
    lines += [f"| {name} | {' | '.join(found.get((name, c), 'not run') for c in company)} |" for name in sorted(ours)]
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Prints the table of the last test sessions; ``--write`` puts it into docs/RESULTS.md."""
    if not kept_cells():
        print(f"There is no {KEPT.relative_to(ROOT)}; run the tests first: python3 dev.py test tests/host/company")
        return 1
    made = table(kept_cells())
    print(made)
    if "--write" in arguments:
        write_results(BEGIN, END, made)
    return 0
