"""``dev.py bench FAMILY --against REF``: both packs run a graph in turn, and what it costs is counted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from comfyui_concepts.boards import against, graph_worker
from comfyui_concepts.boards.against import API, ROOT, Worker, checkout, pairs_of, report

STEPS = 2


@pytest.fixture
def graph(tmp_path):
    """LoRA Composer without gradient steps, two pictures of two steps."""
    made = json.loads((API / "compose_regions.json").read_text())
    for node in made.values():
        inputs = node["inputs"]
        inputs |= {"steps": STEPS} if "steps" in inputs else {}
        inputs |= {"batch_size": 2} if "batch_size" in inputs else {}
        inputs |= {"enhancement": 0.0, "first_noise": "off"} if "enhancement" in inputs else {}
    path = tmp_path / "compose_regions.json"
    path.write_text(json.dumps(made))
    return path


def test_a_graph_costs_the_same_rows_in_two_folders_with_one_pack(graph, capsys):
    costs = pairs_of(graph, ROOT, ROOT, 1)
    for run in costs[0]:
        assert run["seconds"] > 0
        assert run["processor"] > 0
        # positive and negative of two pictures in one call a step, 16 × 16 cells each
        assert (run["calls"], run["rows"], run["cells"]) == (STEPS, 4 * STEPS, 4 * STEPS * 256)
    assert "compose_regions: 1 of 1 pairs" in capsys.readouterr().out
    line = report("compose_regions", "abc", costs)
    assert line.startswith("compose_regions, 1 pairs: ")
    assert line.endswith("2 (2 there) calls, 8 (8 there) rows, 2048 (2048 there) cells")


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (
            "print('ready', flush=True); input(); print('costs {\"failure\": \"Composer: no LoRA\"}', flush=True)",
            "did not run with the pack in here: Composer: no LoRA",
        ),
        (
            "raise SystemExit('The pack in here could not be imported.')",
            "has ended, and said at last:\nThe pack in here",
        ),
        ("print('ready', flush=True); input(); print('killed', flush=True)", "has ended"),
    ],
)
def test_a_graph_that_does_not_run_and_a_process_that_ends_are_said(tmp_path, monkeypatch, program, words):
    """A small program is in the worker's place."""
    path = tmp_path / "worker.py"
    path.write_text(program)
    monkeypatch.setattr(against, "PROGRAM", path)
    with pytest.raises(RuntimeError, match=words):
        Worker(Path("here"), tmp_path / "graph.json").run(1)


def test_ratios_are_of_pairs_and_their_median_is_told():
    runs = [{"seconds": s, "processor": 2 * s, "memory": 10.0, "calls": 1, "rows": 2, "cells": 3} for s in (1, 2, 4)]
    base = [{**run, "seconds": 1.0, "processor": 1.0, "memory": 5.0, "rows": 6} for run in runs]
    line = report("g", "abc", list(zip(runs, base, strict=True)))
    assert "2.00 × (1.00 to 4.00) the seconds of abc, 4.00 × (2.00 to 8.00) its processor time" in line
    assert "memory +10 MB, +5 there, 1 (1 there) calls, 2 (6 there) rows" in line


def test_every_seed_of_a_graph_is_replaced_and_links_are_not():
    graph = {"1": {"inputs": {"seed": 3, "noise_seed": ["2", 0]}}, "2": {"inputs": {"noise_seed": 4}}}
    made = graph_worker.seeded(graph, 9)
    assert [made["1"]["inputs"]["seed"], made["2"]["inputs"]["noise_seed"]] == [9, 9]
    assert made["1"]["inputs"]["noise_seed"] == ["2", 0]
    assert graph["2"]["inputs"]["noise_seed"] == 4


def test_another_commit_is_unpacked_and_gone_afterwards_and_an_unknown_one_is_refused(tmp_path, monkeypatch):
    def git(*arguments):
        who = ["-c", "user.name=a", "-c", "user.email=a@example.com"]
        subprocess.run(["git", "-C", str(tmp_path), *who, *arguments], check=True, capture_output=True)

    (tmp_path / "file").write_text("before")
    git("init"), git("add", "file"), git("commit", "-m", "first")
    (tmp_path / "file").write_text("after")
    monkeypatch.setattr(against, "ROOT", tmp_path)
    with checkout("HEAD") as pack:
        assert (pack / "file").read_text() == "before"
    assert not pack.exists()
    assert (tmp_path / "file").read_text() == "after"
    with pytest.raises(ValueError, match="no commit 'nowhere'"), checkout("nowhere"):
        pass


def test_dev_py_sends_the_bench_there(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "boards.against", "compose", "--against", "HEAD", "--graph", "anagram_turn"],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 2
    assert "there is no graph 'anagram_turn' of compose; there are: compose_automatic" in done.stderr
