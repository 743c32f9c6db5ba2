"""The bench of the closed form: models of the sizes it claims, on every system."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from comfyui_concepts.boards import bench_erase, timing
from comfyui_concepts.host.erase.weights import text_keys


@pytest.mark.parametrize(("size", "count", "values"), [("SD 1.5", 32, 19_169_280), ("SDXL", 140, 340_787_200)])
def test_the_models_have_as_many_weights_as_the_real_ones(size, count, values):
    model = bench_erase.cross_attention_only(size, "meta")
    state, keys = model.model_state_dict(), text_keys(model, ("k", "v"))
    assert len(keys) == len(state) == count
    assert sum(weight.numel() for weight in state.values()) == values


def test_a_system_without_proc_costs_the_figure_and_not_the_bench(monkeypatch, capsys):
    monkeypatch.setattr(logging, "disable", lambda level: None)  # the bench does so for its whole process
    nowhere = Path("/proc/no/such/place")
    monkeypatch.setattr(timing, "_STATUS", nowhere)
    monkeypatch.setattr(timing, "_FORGET", nowhere)
    monkeypatch.setitem(bench_erase.SIZES, "small", (16, [("middle_block.1", 2, 8)]))
    monkeypatch.setattr(bench_erase, "PRESERVES", 3)
    assert bench_erase.main(["--size", "small", "--solver", "uce"]) == 0
    printed = capsys.readouterr().out
    assert "small: 4 weights, unknown with the model" in printed
    assert "peak beyond the model unknown" in printed
