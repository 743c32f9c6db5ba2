"""Solving next to the host's models and text encoders: what is read of them, what is refused, and in which words."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from comfyui_concepts.demo.bench_erase import RandomEncoder
from comfyui_concepts.host import erase_probe, erase_solve, erase_weights
from comfyui_concepts.host.erase_solve import Request, solve_erasure
from comfyui_concepts.methods.erase.spec import LAST, Erased, Preserved

NO_CLIP = SimpleNamespace(layer_idx=None)


def erase(concept, anchor="", previous=None, **more):
    return Erased(concept, anchor, more.pop("templates", ("{}", "a {}")), more.pop("scope", LAST), 1.0, (), previous)


@pytest.mark.parametrize("count", [14, 24, 32, 140])
def test_the_weights_a_report_is_made_of_are_keys_and_values_alike(count):
    keys = [f"{n}.attn2.to_{to}.weight" for n in range(count // 2) for to in "kv"]
    taken = erase_weights.sampled(keys)
    of_keys = sum("to_k" in key for key in taken)
    assert 8 <= len(taken) <= 14
    assert abs(2 * of_keys - len(taken)) <= 1


def test_solving_and_probing_read_keys_and_values_of_a_model_with_32(new_model, monkeypatch):
    model, encode, read = new_model(sd15=True), RandomEncoder(24), []

    def energy(model, keys, progress=None):
        read.append("".join(key[-8] for key in keys))
        return erase_weights.energy(model, keys, progress)

    assert len(erase_weights.text_keys(model, ("k", "v"))) == 32
    monkeypatch.setattr(erase_solve, "energy", energy)
    monkeypatch.setattr(erase_probe, "energy", energy)
    monkeypatch.setattr(erase_probe, "Encoder", lambda clip: encode)
    edit = solve_erasure(model, NO_CLIP, erase("cat", "dog"), Preserved(("a fox",), 1.0), Request(), encode)
    erase_probe.probe(model, NO_CLIP, edit)
    assert len(read) == 2
    assert all(set(kinds) == {"k", "v"} for kinds in read)
