"""The benches run to their end, on the smallest thing they can be given: their figures are for a person to read."""

from __future__ import annotations

import logging
import re

import pytest
import torch
from comfyui_concepts.boards import bench_anagram, bench_compose, random_transformers, timing, transformer_bench
from comfyui_concepts.methods.anagram.combine import PRESETS


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


@pytest.mark.parametrize(("family", "small"), [
    ("flux", {"hidden_size": 64, "num_heads": 2, "axes_dim": [8, 12, 12], "depth": 1, "depth_single_blocks": 1}),
    ("zimage", {"dim": 256, "n_heads": 8, "n_kv_heads": 8, "axes_dims": [8, 12, 12], "n_layers": 1}),
    ("qwen", {"attention_head_dim": 32, "num_attention_heads": 2, "axes_dims_rope": (8, 12, 12), "num_layers": 1}),
])  # fmt: skip
@pytest.mark.parametrize("verb", transformer_bench.OURS)
def test_benches_on_transformers_print_ours_and_the_hosts_hooks(capsys, monkeypatch, verb, family, small):
    known = random_transformers.TRANSFORMERS[family]
    small = known._replace(config=known.config | small, text=(16,))
    width = {"flux": "context_in_dim", "zimage": "cap_feat_dim", "qwen": "joint_attention_dim"}[family]
    small.config[width] = 16
    monkeypatch.setitem(random_transformers.TRANSFORMERS, family, small)
    with torch.inference_mode():
        transformer_bench.run(verb, family, [2], 1, cells=8, tokens=32)
    printed = capsys.readouterr().out
    assert re.search(rf"{family} of 0\.\d\d B parameters, 2 concepts, cfg 1: ours \d+\.\d\d × plain sampling", printed)
    assert re.search(r"host hooks \d+\.\d\d × plain sampling .* host hooks -?\d+$", printed.strip())


def test_a_family_that_the_host_does_not_have_is_refused(monkeypatch):
    monkeypatch.delattr("comfy.supported_models.Krea2", raising=False)
    with pytest.raises(ValueError, match="has no model 'Krea2'"):
        random_transformers.random_transformer("krea2")


def test_the_anagrams_bench_prints_a_ratio_for_every_preset_of_the_node(capsys, monkeypatch):
    monkeypatch.setattr(bench_anagram, "STEPS", 2)
    assert bench_anagram.main(["--runs", "1", "--views", "2"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"2 views over bare calls of 4 rows: \d+\.\d\d ×", printed)
    for name, preset in PRESETS.items():
        found = re.search(rf"2 views by '{re.escape(name)}' over one plain picture: \d+\.\d\d ×", printed)
        assert bool(found) == (preset is not None)


def test_a_preset_is_timed_as_the_node_makes_it(monkeypatch):
    """In rows of the network per step: contrast evaluates the other view's prompt, a gradient step the positives."""
    import comfy.patcher_extension

    monkeypatch.setattr(bench_anagram, "STEPS", 2)
    bench, rows = bench_anagram.AnagramBench(1), []
    bench.demo.model = bench.demo.model.clone()

    def note(executor, x, *args, **kwargs):
        rows.append(len(x))
        return executor(x, *args, **kwargs)

    bench.demo.model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "test", note)
    made = {}
    for name in (n for n, preset in PRESETS.items() if preset is not None):
        rows.clear()
        with torch.inference_mode():
            bench.preset(2, name)
        made[name] = list(rows)
    assert made == {
        "averaging": [4, 4], "multi-task (fast, no gradient)": [6, 6], "multi-task (full)": [2, 6, 6],
    }  # fmt: skip


def test_memory_is_seen_while_it_is_held():
    assert timing.peak_of(lambda: bytearray(200_000_000).count(1)) > 150
    assert timing.peak_of(lambda: None) < 50
