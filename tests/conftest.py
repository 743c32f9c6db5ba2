"""What every test stands on: the pack imported as the host imports it, next to the real host, and one real server."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent


def _load_runner():
    spec = importlib.util.spec_from_file_location("concepts_runner", ROOT / "workbench" / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if "COMFYUI_PATH" not in os.environ:
    raise pytest.UsageError("the tests run next to a host; start them with: python3 dev.py test")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # a process a core: threads beside them only get in each other's way
_arguments, sys.argv = sys.argv, sys.argv[:1]  # the host reads the command line when it is imported
_runner = _load_runner()
_runner.end_in_order()
_runner.enter_host(Path(os.environ["COMFYUI_PATH"]))
_runner.import_pack()
import comfy.model_management  # noqa: E402, F401  reads the command line now, not in the middle of a test

sys.argv = _arguments


WITH_HOST = ("web/", "workflows/", "nodes/test_complete.py", "nodes/test_regions.py")
"""Where the tests are that ask a running host."""
SHARING = ("host/company/test_matrix.py",)
"""Files whose tests share what takes long to make: a compiled model and what is drawn beside it."""


def pytest_xdist_make_scheduler(config, log):
    """With several processes, one of them has the running host and all tests that ask it something.

    By file and not by ``xdist_group``: pytest 9.2 no longer shows the mark that pytest-xdist 3.8 puts on a test's name.
    """
    from xdist.scheduler import LoadScopeScheduling

    class HostTogether(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            if nodeid.startswith(WITH_HOST):
                return "host"
            return nodeid.split("::")[0] if nodeid.startswith(SHARING) else nodeid

    return HostTogether(config, log)


def surroundings() -> list[str]:
    """What the results hold for, a line each: the host and its torch."""
    import torch
    from comfyui_version import __version__ as host

    return [f"ComfyUI {host} in {os.environ['COMFYUI_PATH']}, torch {torch.__version__}"]


def pytest_terminal_summary(terminalreporter):
    """Names the surroundings at the end of every run: ``-q`` leaves out pytest's header."""
    from comfyui_concepts.workbench.company_results import keep_cells
    from comfyui_concepts.workbench.page_results import keep_results

    reports = [report for kind in terminalreporter.stats.values() for report in kind if hasattr(report, "nodeid")]
    keep_cells(reports)
    for line in [*surroundings(), *keep_results(reports, ROOT / "output" / "browser" / "pages.json")]:
        terminalreporter.write_line(f"ran on {line}")


@pytest.fixture(scope="session", autouse=True)
def folder_of_passing_files(tmp_path_factory):
    """Where nodes that are called without a server put what they show: not into the host's own folder."""
    import folder_paths

    folder_paths.set_temp_directory(str(tmp_path_factory.mktemp("temp")))


@pytest.fixture(scope="session")
def host_path() -> Path:
    return Path(os.environ["COMFYUI_PATH"])


def _listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Name to size and time of change of every file that git or a running host would care about."""
    passing = {".git", "output", ".pytest_cache", ".ruff_cache", ".mypy_cache"}
    files = (p for p in folder.rglob("*") if p.is_file() and not passing & set(p.relative_to(folder).parts))
    return {str(p.relative_to(folder)): (p.stat().st_size, p.stat().st_mtime_ns) for p in files}


_AT_START = {folder: _listing(folder) for folder in (ROOT, Path(os.environ["COMFYUI_PATH"]))}


@pytest.fixture(scope="session")
def untouched():
    """Call it to assert that neither the repository nor the host's folder has changed since the session began."""

    def check() -> None:
        for folder, before in _AT_START.items():
            changed = {name for name, _ in before.items() ^ _listing(folder).items()}
            assert not changed, f"{folder} has changed: {', '.join(sorted(changed))}"

    return check


@pytest.fixture(scope="session")
def demo_model():
    """(MODEL, CLIP, VAE) of the bundled weights."""
    from comfyui_concepts.demo.loader import load_demo_model

    return load_demo_model()


@pytest.fixture(scope="session")
def served_page(tmp_path_factory):
    """The page that the session's host serves: its own, until a browser test shows another."""
    from comfyui_concepts.workbench.pages import ServedPage

    return ServedPage(tmp_path_factory.mktemp("pages"))


@pytest.fixture(scope="session")
def server(host_path, served_page):
    """One real host with the pack in it, for the whole session."""
    from comfyui_concepts.workbench.server import HostServer

    with HostServer(host_path, arguments=("--front-end-root", str(served_page.root))) as running:
        running.wait()
        yield running


class Finished(NamedTuple):
    """What a shipped graph has made: its pictures, and each node's output as the host's history holds it."""

    pictures: list
    outputs: dict[str, Any]


@pytest.fixture(scope="session")
def finished(server):
    """``finished(name)`` runs a shipped graph, with its template embedded, once a session."""
    from comfyui_concepts.workbench.client import run_graph

    done: dict[str, Finished] = {}

    def run(name: str) -> Finished:
        if name not in done:
            graph, template = (json.loads((ROOT / "workflows" / f / f"{name}.json").read_text()) for f in ("api", "."))
            pictures = asyncio.run(run_graph(server.url, graph, workflow=template))
            (entry,) = server.get("/history?max_items=1").values()
            done[name] = Finished(pictures, entry["outputs"])
        return done[name]

    return run


@pytest.fixture(scope="session")
def object_info(server):
    return server.get("/object_info")


@pytest.fixture(autouse=True)
def inference_mode():
    """The host runs every node under inference mode, so the tests do."""
    import torch

    with torch.inference_mode():
        yield
