"""What sessions keep of ours beside other nodes, and the table that is made of it."""

from __future__ import annotations

from types import SimpleNamespace

from comfyui_concepts.workbench.company_results import Cell, keep_cells, kept_cells, table


def _report(ours, company, found, when="call", passed=True):
    told = [("ours", ours), ("company", company), ("found", found)]
    return SimpleNamespace(user_properties=told, when=when, passed=passed, failed=not passed)


def test_a_session_keeps_its_cells_over_those_of_earlier_ones(tmp_path):
    path = tmp_path / "company.json"
    assert kept_cells(path) == []
    keep_cells([SimpleNamespace(when="call", passed=True, failed=False)], path)
    assert not path.exists()
    keep_cells([_report("A", "EasyCache", "equal"), _report("B", "EasyCache", "equal", passed=False)], path)
    keep_cells([_report("B", "EasyCache", "refused"), _report("B", "hooks", "equal", when="teardown")], path)
    assert kept_cells(path) == [Cell("A", "EasyCache", "equal"), Cell("B", "EasyCache", "refused")]
    keep_cells([_report("B", "hooks", "equal", when="setup", passed=False)], path)
    assert kept_cells(path)[-1] == Cell("B", "hooks", "fails")


def test_the_table_has_ours_by_company():
    rows = table([Cell("B", "EasyCache", "equal"), Cell("A", "hooks", "refused")]).splitlines()
    assert rows == ["| | EasyCache | hooks |", "|---|---|---|", "| A | not run | refused |", "| B | equal | not run |"]
