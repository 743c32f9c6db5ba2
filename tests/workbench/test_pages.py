"""The pages that the browser tests show, and what is kept of what they found."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from comfyui_concepts.workbench import page_results, pages

WORKBENCH = Path(pages.__file__).parent


@pytest.fixture
def two_more(tmp_path, monkeypatch):
    """A cache with two pages beside the host's own, and with what a broken download has left."""
    for version in ("9.10.0", "9.9.0"):
        (tmp_path / f"page-{version}").mkdir()
        (tmp_path / f"page-{version}" / "index.html").write_text(version)
        (tmp_path / f"page-{version}" / "index.js.map").write_text("{}")
    (tmp_path / "page-9.11.0.part").mkdir()
    (tmp_path / "page-9.9.0.lock").touch()
    monkeypatch.setattr(pages, "CACHE", tmp_path)
    monkeypatch.delenv("CONCEPTS_PAGES", raising=False)
    return tmp_path


def test_the_hosts_own_page_comes_first_and_the_others_from_old_to_new(two_more):
    own, folder = pages.own_page()
    assert (folder / "index.html").is_file()
    assert list(pages.all_pages()) == [own, "9.9.0", "9.10.0"]


def test_the_hosts_own_page_alone_is_shown_if_that_is_asked_for(two_more, monkeypatch):
    monkeypatch.setenv("CONCEPTS_PAGES", "own")
    assert list(pages.all_pages()) == [pages.own_page()[0]]


def test_one_page_takes_the_place_of_another(two_more, tmp_path_factory):
    served = pages.ServedPage(tmp_path_factory.mktemp("served"))
    own = (served.root / "index.html").read_text()
    for version in ("9.9.0", "9.9.0", "9.10.0"):
        served.show(version)
        assert (served.root / "index.html").read_text() == version
        assert not list(served.root.glob("*.map"))
    served.show(pages.own_page()[0])
    assert (served.root / "index.html").read_text() == own


SESSION = """
import importlib.util, pathlib, sys
import pytest
spec = importlib.util.spec_from_file_location("page_results", "WORKBENCH/page_results.py")
page_results = importlib.util.module_from_spec(spec)
sys.modules["page_results"] = page_results
spec.loader.exec_module(page_results)

def pytest_runtest_setup(item):
    if "plain" not in item.name:
        area = "drop" if "drop" in item.name else "help"
        item.user_properties += [("page", "1.9.0"), ("renderer", "classic"), ("area", area)]

def pytest_terminal_summary(terminalreporter):
    reports = [r for kind in terminalreporter.stats.values() for r in kind if hasattr(r, "nodeid")]
    for line in page_results.keep_results(reports, pathlib.Path("kept.json")):
        terminalreporter.write_line(line)

@pytest.fixture
def broken():
    raise OSError("no | page")
""".replace("WORKBENCH", str(WORKBENCH))
TESTS = """
import pytest
def test_help(): pass
def test_help_more(): pass
def test_drop(): assert "dropped" == "restored", "nothing came"
def test_drop_nowhere(broken): pass
def test_help_skipped(): pytest.skip("no help here")
def test_plain(): pass
"""


def test_a_session_keeps_what_it_found_and_the_table_says_it(tmp_path):
    (tmp_path / "conftest.py").write_text(SESSION)
    (tmp_path / "test_it.py").write_text(TESTS)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(tmp_path),
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert "page 1.9.0 (5 tests)" in done.stdout, done.stdout + done.stderr
    kept = [page_results.PageTest(**one) for one in json.loads((tmp_path / "kept.json").read_text())]
    rows = page_results.table(kept).splitlines()
    assert rows[0].startswith("| page | renderer | editor | templates | drop |")
    (cells,) = [row.split(" | ") for row in rows[2:]]
    assert cells[:4] == ["| 1.9.0", "classic", "not run", "not run"]
    assert "fails: test_drop: AssertionError: nothing came" in cells[4]
    assert "fails: test_drop_nowhere: OSError: no / page" in cells[4]
    assert cells[6] == "pass (2); no help here"
    assert cells[7] == "not run |"


def test_without_a_page_nothing_is_kept(tmp_path):
    assert page_results.keep_results([], tmp_path / "kept.json") == []
    assert not (tmp_path / "kept.json").exists()
