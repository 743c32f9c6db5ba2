"""Edits of several parts on their way to a model: as LoRA files, next to trained layers, and under later LoRAs."""

from __future__ import annotations

import logging
from dataclasses import replace

import comfy.model_management
import comfy.sd
import pytest
import torch
from comfyui_concepts.host.erase import export as erase_export
from comfyui_concepts.host.erase import weights as erase_weights
from comfyui_concepts.host.erase.apply import AUTOMATIC, TEXT, WEIGHTS, apply_edit
from comfyui_concepts.host.lora.export import STYLES
from comfyui_concepts.methods.erase.edit import Edit
from comfyui_concepts.methods.erase.lowrank import LowRank
from safetensors.torch import load_file

POOLED = {"adm_in_channels": 10, "num_classes": "sequential"}
"""A tiny model of SDXL's kind: the pooled embedding (6 of 10 values) goes through label_emb."""


def low(out: int, width: int, rank: int = 2, seed: int = 2, scale: float = 0.3) -> LowRank:
    g = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(out, rank, generator=g) * scale, torch.randn(rank, width, generator=g) * scale)


def predict(patcher, context, y=None):
    """The UNet's own answer, as the sampler would get it: loaded, with the patcher's options."""
    comfy.model_management.load_models_gpu([patcher])
    g = torch.Generator().manual_seed(1)
    x, sigma = torch.randn(len(context), 4, 8, 8, generator=g), torch.full((len(context),), 3.0)
    options = {**patcher.model_options["transformer_options"], "wrappers": patcher.wrappers}
    more = {} if y is None else {"y": y}
    return patcher.model.apply_model(x, sigma, c_crossattn=context, transformer_options=options, **more)


def a_context(rows: int = 2, width: int = 32):
    return torch.randn(rows, 77, width, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("naming", STYLES)
def test_a_lora_with_the_pooled_part_is_loaded_back_whole(new_model, tmp_path, naming, caplog):
    model, y = new_model(more=POOLED), torch.randn(2, 10, generator=torch.Generator().manual_seed(6))
    edit = Edit(low(32, 32), pooled=low(6, 6, 1, scale=0.8))
    erase_export.export_lora(model, None, edit, tmp_path / "a.safetensors", naming, half=False)
    with caplog.at_level(logging.WARNING):
        loaded, _ = comfy.sd.load_lora_for_models(model, None, load_file(tmp_path / "a.safetensors"), 1.0, 0.0)
    assert not caplog.records
    assert erase_weights.POOLED_KEY in loaded.patches
    text_alone, plain = (predict(m, a_context(), y) for m in (apply_edit(model, Edit(edit.text)), model))
    edited = predict(apply_edit(model, edit, 1.0, WEIGHTS), a_context(), y)
    torch.testing.assert_close(predict(loaded, a_context(), y), edited, rtol=1e-5, atol=1e-5)
    assert (edited - text_alone).abs().max() > 1e-3  # the pooled part counts
    assert (text_alone - plain).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn])
def test_text_does_not_carry_an_edit_whose_trained_layers_read_it(new_model, dtype, caplog):
    """W·T + Δ is what the edit says; through the text it would be (W + Δ)·T."""
    model = new_model("EPS", dtype)
    key = erase_weights.text_keys(model, ("v",))[1]
    out = model.model_state_dict()[key].shape[0]
    edit = Edit(low(32, 32), layers={key: low(out, 32, seed=8)})
    with pytest.raises(ValueError, match=r"trains weights that read it.*'weights' or 'automatic'"):
        apply_edit(model, edit, 1.0, TEXT)
    with caplog.at_level(logging.WARNING):
        automatic = apply_edit(model, edit, 1.0, AUTOMATIC)
    assert ("fp8 or quantised" in caplog.text) == (dtype is torch.float8_e4m3fn)
    by_weights = predict(apply_edit(model, edit, 1.0, WEIGHTS), a_context())
    assert torch.equal(predict(automatic, a_context()), by_weights)
    assert len(automatic.patches) == 14
    elsewhere = replace(edit, layers={key.replace("attn2", "attn1"): low(out, out, seed=8)})
    assert not set(apply_edit(model, elsewhere, 1.0, TEXT).patches) & set(automatic.patches)


def test_the_pooled_embedding_does_not_either(new_model):
    model = new_model(more=POOLED)
    out, width = model.model_state_dict()[erase_weights.POOLED_KEY].shape
    edit = Edit(pooled=low(6, 6), layers={erase_weights.POOLED_KEY: low(out, width)})
    with pytest.raises(ValueError, match="trains weights that read it"):
        apply_edit(model, edit, 1.0, TEXT)


def test_a_later_lora_finds_the_concept_gone_with_the_text_and_not_with_the_weights(new_model):
    """With T·c = g: through the text the LoRA sees the anchor, (W + L)·g; over edited weights it sees the concept."""
    model, g = new_model(), torch.Generator().manual_seed(9)
    concept, anchor = torch.randn(2, 32, generator=g)
    edit = Edit(LowRank((anchor - concept)[:, None], (concept / concept.square().sum())[None]))
    rows = {name: row.expand(2, 77, -1) for name, row in (("concept", concept), ("anchor", anchor))}
    shapes = {key: model.model_state_dict()[key].shape for key in erase_weights.text_keys(model, ("k", "v"))}
    lora = {key: ("diff", (low(*shape, seed=3).matrix(),)) for key, shape in shapes.items()}

    def with_lora(patcher, name):
        later = patcher.clone()
        later.add_patches(lora, 1.0)
        return predict(later, rows[name])

    wanted, unerased = with_lora(model, "anchor"), with_lora(model, "concept")
    assert (wanted - unerased).abs().max() > 0.01
    for delivery in (TEXT, WEIGHTS):  # before the LoRA both are the anchor
        alone = predict(apply_edit(model, edit, 1.0, delivery), rows["concept"])
        torch.testing.assert_close(alone, predict(model, rows["anchor"]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(with_lora(apply_edit(model, edit, 1.0, TEXT), "concept"), wanted, rtol=1e-4, atol=1e-4)
    assert (with_lora(apply_edit(model, edit, 1.0, WEIGHTS), "concept") - wanted).abs().max() > 0.01
