"""The pack's import is light: it brings nothing heavy with it before a node needs it."""

from __future__ import annotations

import pytest
from comfyui_concepts.boards import bench_start
from comfyui_concepts.nodes import NODES


@pytest.mark.slow
def test_importing_the_pack_imports_nothing_heavy(host_path, tmp_path):
    start = bench_start.measured_start(host_path, tmp_path, cached=False)
    assert start.nodes == len(NODES)
    assert bench_start.heavy_packages(start) == []


def test_a_heavy_import_is_named():
    start = bench_start.Start(1.0, 0.1, 0.1, 3, ["comfyui_concepts", "peft", "scipy"])
    assert bench_start.heavy_packages(start) == ["scipy", "peft"]


def test_the_bench_fails_where_the_pack_adds_too_much(monkeypatch, capsys):
    starts = {None: bench_start.Start(2.0, 0.0, 0.0, 0, []), bench_start.ROOT: bench_start.Start(2.0, 0.6, 0.5, 50, [])}
    monkeypatch.setattr(bench_start, "measured_start", lambda host, cache, pack=bench_start.ROOT: starts[pack])
    assert bench_start.main(["--runs", "1"]) == 1
    printed = capsys.readouterr().out
    assert "the pack's 50 nodes: 0.60 s (0.60 to 0.60)" in printed
    assert "their processor time: 0.50 s, at most 0.25 s" in printed
    starts[bench_start.ROOT] = bench_start.Start(2.0, 0.6, 0.1, 50, [])
    assert bench_start.main(["--runs", "1"]) == 0
