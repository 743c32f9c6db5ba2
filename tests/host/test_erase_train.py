"""Every training method on the real demo model, and the text encoder: a few iterations each, for what must hold of all."""

from __future__ import annotations

import hashlib
import importlib

import comfy.model_management
import comfy.sd
import comfy.utils
import pytest
import torch
from comfyui_concepts.demo.erase_trained import with_adapter
from comfyui_concepts.host import gradients
from comfyui_concepts.host.adapters import attached, layers_named, shapes_of
from comfyui_concepts.host.erase_apply import AUTOMATIC, FULL, TEXT, WEIGHTS, apply_edit, apply_to_clip
from comfyui_concepts.host.erase_train import Choices, Request, latents_of, train_erasure, unlearn_in_text
from comfyui_concepts.host.lora_export import lora_tensors, names_of
from comfyui_concepts.host.predictions import noise_levels, noised, prompts_of
from comfyui_concepts.host.text_encoder import encoded, text_layers
from comfyui_concepts.host.trajectories import noise_for, paint
from comfyui_concepts.methods.erase.edit import Edit, chain
from comfyui_concepts.methods.erase.edit_file import load_edit, save_edit
from comfyui_concepts.methods.erase.lowrank import LowRank
from comfyui_concepts.methods.erase.report import text_of
from comfyui_concepts.methods.erase.spec import SPAN_TO_END, TEMPLATES, Erased, Preserved
from comfyui_concepts.methods.erase.train import new_factors
from comfyui_concepts.methods.erase.trained import METHODS

CAT = Erased("cat", "", TEMPLATES["object"][:2], SPAN_TO_END, 1.0)
KEPT = Preserved(("a dog", "a car"), 1.0)
SMALL = Choices(iterations=2, rank=2, trajectories=1, steps=3, batch=1, preview_every=0)


@pytest.fixture(autouse=True)
def quick_image_tokens(monkeypatch):
    module = importlib.import_module("comfyui_concepts.methods.erase.trained.co_erasing")
    monkeypatch.setattr(module, "STEPS", 2)


@pytest.fixture(autouse=True)
def weights_as_loaded():
    """The demo model is shared: what another test's clone has patched into it is taken back before anything is compared."""
    comfy.model_management.unload_all_models()


def _request(method="ESD", **changes):
    return Request(method, "draft", 0, (16, 16), SMALL, **changes)


def _bytes(module):
    digest = hashlib.sha256()
    for _, tensor in sorted(module.state_dict().items()):
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("method", METHODS)
def test_a_method_makes_an_edit_of_the_model_and_leaves_it_alone(demo_model, method, tmp_path):
    model, clip, _ = demo_model
    before = _bytes(model.model), _bytes(clip.cond_stage_model)
    edit, trained = train_erasure(model, clip, CAT, KEPT, _request(method))
    assert (_bytes(model.model), _bytes(clip.cond_stage_model)) == before
    assert len(edit.layers) == 14
    assert all(key.endswith(("attn2.to_k.weight", "attn2.to_v.weight")) for key in edit.layers)
    assert trained.outcome.reason == "all 2 iterations done"
    if method != "DoCo (heavy)":  # its discriminator learns alone at first
        assert all(m.up.abs().max() > 0 for m in edit.layers.values())
    save_edit(edit, tmp_path / "edit.safetensors")
    again = load_edit(tmp_path / "edit.safetensors")
    assert again.spec["solver"] == method
    assert "iterations done" in text_of(again.report, again.spec)
    assert all(torch.equal(again.layers[k].up, m.up) for k, m in edit.layers.items())


@pytest.fixture(scope="module")
def strong(demo_model):
    """An edit of the size a real training makes, without one."""
    from comfyui_concepts.host.adapters import unet_layers

    shapes = shapes_of(unet_layers(demo_model[0].model, "cross k/v"))
    generator = torch.Generator().manual_seed(1)
    return Edit(layers={
        k: LowRank(torch.randn(m.up.shape, generator=generator) * 0.4, m.down) for k, m in new_factors(shapes, 4, 0).items()
    })  # fmt: skip


def _drawn(model, clip, text="a cat, blue background"):
    prompts = prompts_of(clip, [text])
    return paint(model, prompts, prompts_of(clip, [""]), noise_for(model, [1], 16, 16), 3, 3.0)


def test_the_adapter_the_patch_and_the_hosts_lora_loader_draw_the_same(demo_model, strong):
    model, clip, _ = demo_model
    with attached(layers_named(model.model, strong.layers), dict(strong.layers)):
        adapted = _drawn(model, clip)
    patched = _drawn(apply_edit(model, strong), clip)
    assert torch.equal(_drawn(with_adapter(model, strong.layers), clip), adapted)  # as the score board has it
    file = lora_tensors(strong.layers, names_of(model), dtype=torch.float32)
    loaded, _ = comfy.sd.load_lora_for_models(model, None, file, 1.0, 0.0)
    plain = _drawn(model, clip)
    assert (adapted - plain).abs().max() > 0.1
    assert (adapted - patched).abs().max() < 1e-3
    assert (_drawn(loaded, clip) - patched).abs().max() < 1e-3


def test_a_trained_edit_composes_with_a_solved_one(demo_model, strong):
    model, clip, _ = demo_model
    d = 128
    generator = torch.Generator().manual_seed(2)
    solved = Edit(
        text=LowRank(torch.randn(d, 2, generator=generator) * 0.2, torch.randn(2, d, generator=generator) * 0.2)
    )
    one_after_the_other = _drawn(apply_edit(apply_edit(model, strong), solved), clip)
    both = chain(strong, solved)
    for delivery in (AUTOMATIC, WEIGHTS, FULL):
        assert (one_after_the_other - _drawn(apply_edit(model, both, 1.0, delivery), clip)).abs().max() < 1e-3
    with pytest.raises(ValueError, match=r"trains weights that read it.*'weights' or 'automatic'"):
        apply_edit(model, both, 1.0, TEXT)
    with pytest.raises(ValueError, match=r"was solved, not trained.*Apply Erasure"):
        train_erasure(model, clip, CAT, KEPT, _request(start=solved))


def test_pictures_are_read_or_refused(demo_model):
    model, clip, vae = demo_model
    with pytest.raises(ValueError, match="batch of pictures is empty"):
        latents_of(vae, torch.zeros(0, 64, 64, 3), 128, 128)
    latents = latents_of(vae, torch.rand(2, 64, 96, 4), 128, 128)
    assert latents.shape == (2, 4, 16, 16)
    edit, _ = train_erasure(model, clip, CAT, KEPT, _request("Co-Erasing"), latents)
    assert len(edit.layers) == 14
    with pytest.raises(ValueError, match=r"no method 'SALUN'.*ESD"):
        train_erasure(model, clip, CAT, KEPT, _request("SALUN"))
    with pytest.raises(ValueError, match="layers 'none'"):
        train_erasure(model, clip, CAT, KEPT, Request("ESD", "draft", 0, (16, 16), Choices(layers="none")))
    with pytest.raises(ValueError, match="preserved"):
        train_erasure(model, clip, CAT, Preserved(("a cat",), 1.0), _request())


def test_states_have_the_spread_of_their_noise_level(demo_model):
    sampling = demo_model[0].model.model_sampling
    levels = noise_levels(sampling, 50)
    assert (levels[:-1] > levels[1:]).all()
    noise = torch.randn(50, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    x = noised(sampling, torch.zeros_like(noise), noise, levels)
    assert torch.allclose(x.flatten(1).std(1), levels, rtol=0.1)


def test_the_text_layers_are_those_the_model_taps(demo_model):
    clip = demo_model[1]
    prefix = "clip_l.transformer.text_model.encoder.layers"
    layers = set(text_layers(clip))
    attention = {f"{prefix}.1.self_attn.{part}.weight" for part in ("q_proj", "k_proj", "v_proj", "out_proj")}
    assert layers == attention | {f"{prefix}.{n}.mlp.{part}.weight" for n in (0, 1) for part in ("fc1", "fc2")}
    skipped = clip.clone()
    skipped.clip_layer(-2)
    assert {key.split("layers.")[1][0] for key in text_layers(skipped)} == {"0"}
    assert f"{prefix}.0.self_attn.q_proj.weight" in text_layers(skipped)
    with pytest.raises(ValueError, match="not of the CLIP kind"):
        text_layers(type("T5", (), {"cond_stage_model": torch.nn.Linear(1, 1), "layer_idx": None})())


def test_gradients_of_the_text_encoder_are_those_of_finite_differences(demo_model):
    clip = demo_model[1]
    layers = text_layers(clip)
    with gradients.differentiable(clip.cond_stage_model):
        factors = {k: LowRank(f.up + 0.02, f.down) for k, f in new_factors(shapes_of(layers), 2, 0).items()}
        weights = torch.randn(1, 77, 128, generator=torch.Generator().manual_seed(3))

        def loss():
            with attached(layers, factors):
                return (encoded(clip, ["a cat"]).context * weights).double().sum()

        for key in sorted(factors)[::3]:
            up, down = factors[key].up.detach().requires_grad_(True), factors[key].down
            factors[key] = LowRank(up, down)
            (gradient,) = torch.autograd.grad(loss(), up)
            direction = gradient / gradient.norm()
            found = []
            for sign in (1, -1):
                factors[key] = LowRank(up.detach() + sign * 0.05 * direction, down)
                found.append(float(loss().detach()))
            factors[key] = LowRank(up.detach(), down)
            assert (found[0] - found[1]) / 0.1 == pytest.approx(float(gradient.norm()), rel=0.02)


def test_unlearning_in_the_text_encoder_changes_the_listed_layers_and_nothing_else(demo_model):
    model, clip, _ = demo_model
    before = _bytes(model.model), _bytes(clip.cond_stage_model)
    edit, trained = unlearn_in_text(model, clip, CAT, KEPT, _request("few-shot"))
    assert (_bytes(model.model), _bytes(clip.cond_stage_model)) == before
    assert set(edit.layers) == set(text_layers(clip))
    assert trained.outcome.preserve[-1] < 0.05
    forgetful = apply_to_clip(clip, edit)
    texts = ["a cat", "a dog"]
    now, then = prompts_of(forgetful, texts).context, prompts_of(clip, texts).context
    assert not torch.equal(now[0], then[0])
    assert torch.equal(prompts_of(clip, texts).context, then)
    again, _ = unlearn_in_text(model, clip, CAT, KEPT, _request("few-shot"))
    assert all(torch.equal(again.layers[k].up, m.up) for k, m in edit.layers.items())
