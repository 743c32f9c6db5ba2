"""The benches run to their end, on the smallest thing they can be given: their figures are for a person to read."""

from __future__ import annotations

import logging
import re

import pytest
from comfyui_concepts.demo import bench_compose, measuring


@pytest.fixture(autouse=True)
def loud(monkeypatch):
    monkeypatch.setattr(logging, "disable", lambda level: None)  # a bench does so for its whole process


def test_the_composers_bench_prints_a_ratio_a_case(capsys):
    assert bench_compose.main(["--model", "demo", "--concepts", "2", "--runs", "1", "--steps", "2"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"cached keys and values 0\.\d MB a concept", printed)
    assert re.search(r"t2i-zero: \d+\.\d\d × plain sampling", printed)
    for case in bench_compose.CASES:
        assert re.search(rf"2 concepts {case}: \d+\.\d\d × plain sampling .* memory \+ -?\d+ MB", printed)


def test_memory_is_seen_while_it_is_held():
    assert measuring.peak_of(lambda: bytearray(200_000_000).count(1)) > 150
    assert measuring.peak_of(lambda: None) < 50
