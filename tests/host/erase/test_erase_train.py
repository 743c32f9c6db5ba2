"""Every training method on the real demo model, and the text encoder: a few iterations each, for what must hold of
all."""

from __future__ import annotations

import hashlib
import importlib
import logging
from dataclasses import replace

import comfy.model_management
import comfy.sd
import comfy.utils
import pytest
import torch
from comfyui_concepts.boards.erase_trained import with_adapter
from comfyui_concepts.host.erase.apply import AUTOMATIC, FULL, TEXT, WEIGHTS, apply_edit, apply_to_clip
from comfyui_concepts.host.erase.export import export_lora
from comfyui_concepts.host.erase.predictions import noise_levels, noised, prompts_of
from comfyui_concepts.host.erase.text_encoder import text_layers
from comfyui_concepts.host.erase.train import latents_of
from comfyui_concepts.host.erase.train import train_erasure as train_plan
from comfyui_concepts.host.erase.trajectories import OWN_PICTURES, TrajectorySampler, noise_for, own_pictures
from comfyui_concepts.host.erase.weights import base_fingerprint
from comfyui_concepts.host.lora.adapters import attached, layers_named, shapes_of
from comfyui_concepts.host.lora.export import lora_tensors, names_of
from comfyui_concepts.methods.erase.edit import Edit, chain
from comfyui_concepts.methods.erase.edit_file import load_edit, save_edit
from comfyui_concepts.methods.erase.lowrank import LowRank
from comfyui_concepts.methods.erase.report import report_text
from comfyui_concepts.methods.erase.spec import SPAN_TO_END, TEMPLATES, Erased, Preserved
from comfyui_concepts.methods.erase.train import new_factors
from comfyui_concepts.methods.erase.trained import FEW_SHOT, METHODS
from comfyui_concepts.methods.erase.trained.plan import TrainOptions, plan_of
from comfyui_concepts.nodes.erase.train import ConceptsTrainErasure
from scipy.optimize import nnls

CAT = Erased("cat", "", TEMPLATES["object"][:2], SPAN_TO_END, 1.0)
KEPT = Preserved(("a dog", "a car"), 1.0)
SMALL = TrainOptions(iterations=2, rank=2, trajectories=1, steps=3, batch=1, preview_every=0, size=(16, 16))


@pytest.fixture(autouse=True)
def quick_image_tokens(monkeypatch):
    module = importlib.import_module("comfyui_concepts.methods.erase.trained.co_erasing")
    monkeypatch.setattr(module, "STEPS", 2)


@pytest.fixture(autouse=True)
def weights_as_loaded():
    """The demo model is shared: what another test's clone has patched into it is taken back before anything is
    compared."""
    comfy.model_management.unload_all_models()


def train_erasure(model, clip, concepts, preserved, method="ESD", options=SMALL, images=None):
    plan = plan_of(METHODS[method], "draft", concepts, preserved, options)
    return train_plan(model, clip, plan, images)


def unlearn_in_text(model, clip, concepts, preserved, options=SMALL):
    return train_plan(model, clip, plan_of(FEW_SHOT, "draft", concepts, preserved, options))


def _bytes(module):
    digest = hashlib.sha256()
    for _, tensor in sorted(module.state_dict().items()):
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("method", METHODS)
def test_a_method_makes_an_edit_of_the_model_and_leaves_it_alone(demo_model, method, tmp_path):
    model, clip, _ = demo_model
    before = _bytes(model.model), _bytes(clip.cond_stage_model)
    edit, trained = train_erasure(model, clip, CAT, KEPT, method)
    assert (_bytes(model.model), _bytes(clip.cond_stage_model)) == before
    assert len(edit.layers) == 14
    assert all(key.endswith(("attn2.to_k.weight", "attn2.to_v.weight")) for key in edit.layers)
    assert trained.outcome.reason == "all 2 iterations done"
    if method != "DoCo (heavy)":  # its discriminator learns alone at first
        assert all(m.up.abs().max() > 0 for m in edit.layers.values())
    save_edit(edit, tmp_path / "edit.safetensors")
    again = load_edit(tmp_path / "edit.safetensors")
    assert again.spec["solver"] == method
    assert "iterations done" in report_text(again.report, again.spec)
    assert all(torch.equal(again.layers[k].up, m.up) for k, m in edit.layers.items())


def test_all_but_one_is_trained_towards_an_anchor_and_away_from_what_has_none(demo_model):
    """In one list, on a picture that is not square; what was used for each is said in the edit."""
    model, clip, _ = demo_model
    several = Erased("apple", "strawberry", TEMPLATES["object"][:2], SPAN_TO_END, 1.0, previous=CAT)
    options = replace(SMALL, size=(16, 24), iterations=60)
    edit, trained = train_erasure(model, clip, several, KEPT, "All but One", options)
    assert sum(trained.outcome.erase[-20:]) < 0.8 * sum(trained.outcome.erase[:20])
    assert (edit.spec["eta"], edit.spec["eta_alone"]) == (0.5, 0.0)


@pytest.fixture(scope="module")
def strong(demo_model):
    """An edit of the size a real training makes, without one."""
    from comfyui_concepts.host.lora.adapters import unet_layers

    shapes = shapes_of(unet_layers(demo_model[0].model, "cross k/v"))
    generator = torch.Generator().manual_seed(1)
    return Edit(layers={
        k: LowRank(torch.randn(m.up.shape, generator=generator) * 0.4, m.down)
        for k, m in new_factors(shapes, 4, 0).items()
    })  # fmt: skip


def _drawn(model, clip, text="a cat, blue background"):
    prompts = prompts_of(clip, [text])
    sampler = TrajectorySampler(model, prompts_of(clip, [""]), (16, 16), 3, 3.0)
    return sampler.sample(prompts, noise_for(model, [1], (16, 16)))


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
        train_erasure(model, clip, CAT, KEPT, options=replace(SMALL, start=solved))


def test_the_same_seed_gives_the_same_file_and_another_one_another(demo_model, tmp_path):
    model, clip, _ = demo_model
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        edit, _ = train_erasure(model, clip, CAT, KEPT, options=replace(SMALL, seed=seed))
        save_edit(edit, tmp_path / name)
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_sentences_and_pictures_go_round_the_concepts(demo_model):
    model, clip, _ = demo_model
    two = Erased("car", "bus", TEMPLATES["object"][:3], SPAN_TO_END, 1.0, previous=CAT)
    several = Erased("house", "", ("{}",), SPAN_TO_END, 1.0, previous=two)
    plan = plan_of(METHODS["Co-Erasing"], "draft", several, None, replace(SMALL, steps=2))
    names = [next(n for n in ("cat", "car", "house") if n in text) for text in plan.texts.concept]
    assert names == ["cat", "car", "house"] * 3
    assert plan.texts.concepts == 3
    assert plan.texts.replaced == (False, True, False) * 3  # cars become buses, the others only go
    pictures = own_pictures(model, clip, plan)
    assert pictures.concept_of == (0, 1, 2) * 4
    assert len(pictures.latents) == 12


def test_training_goes_on_from_an_edit_and_keeps_what_it_has_elsewhere(demo_model):
    model, clip, _ = demo_model
    of_text, _ = unlearn_in_text(model, clip, CAT, KEPT)
    of_text = replace(of_text, diffs={"clip_l.x.bias": torch.ones(2)})
    both, _ = train_erasure(model, clip, CAT, KEPT, options=replace(SMALL, start=of_text))
    assert set(both.on_clip()) == set(of_text.layers)
    assert all(torch.equal(both.layers[k].up, m.up) for k, m in of_text.layers.items())
    assert both.diffs.keys() == of_text.diffs.keys()
    assert both.spec["start"]["solver"] == "few-shot"
    further, _ = unlearn_in_text(model, clip, CAT, KEPT, replace(SMALL, start=both))
    assert set(further.layers) == set(both.layers)
    assert all(further.layers[k].rank == 2 * m.rank for k, m in both.on_clip().items())
    assert all(torch.equal(further.layers[k].up, m.up) for k, m in both.on_model().items())


def test_a_cancelled_training_with_an_adversary_gives_what_it_learned(demo_model):
    model, clip, _ = demo_model
    options = replace(SMALL, iterations=40)
    calls = []

    def cancel(*_):
        calls.append(1)
        if len(calls) == 40:
            comfy.model_management.interrupt_current_processing()

    handle = model.model.diffusion_model.register_forward_pre_hook(cancel)
    before = _bytes(clip.cond_stage_model), _bytes(model.model)
    try:
        edit, trained = train_erasure(model, clip, CAT, KEPT, "DoCo (heavy)", options)
    finally:
        handle.remove()
    assert "cancelled" in trained.outcome.reason
    assert len(trained.outcome.erase) > 12  # its discriminator learns alone for ten
    assert all(m.up.abs().max() > 0 for m in edit.layers.values())
    assert (_bytes(clip.cond_stage_model), _bytes(model.model)) == before


@pytest.mark.parametrize(
    "error", [RuntimeError, torch.OutOfMemoryError, comfy.model_management.InterruptProcessingException]
)
def test_an_error_in_the_text_encoders_training_leaves_all_as_it_was(demo_model, error):
    model, clip, _ = demo_model
    before, layers, calls = (_bytes(clip.cond_stage_model), _bytes(model.model)), text_layers(clip), []

    def fail(*_):
        calls.append(1)
        if len(calls) == 12:
            raise error("here")

    handle = next(iter(layers.values())).register_forward_pre_hook(fail)
    options = replace(SMALL, iterations=20, keep_on_cancel=False)
    try:
        with pytest.raises(error):
            unlearn_in_text(model, clip, CAT, KEPT, options)
    finally:
        handle.remove()
    assert (_bytes(clip.cond_stage_model), _bytes(model.model)) == before
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers.values())
    assert not getattr(comfy.model_management, "in_training", False)


def test_a_saved_lora_of_the_text_encoder_encodes_as_the_edit_does(demo_model, tmp_path):
    model, clip, _ = demo_model
    shapes, generator = shapes_of(text_layers(clip)), torch.Generator().manual_seed(3)
    layers = {
        k: LowRank(torch.randn(m.up.shape, generator=generator) * 0.2, m.down)
        for k, m in new_factors(shapes, 2, 0).items()
    }  # fmt: skip
    export_lora(model, clip, Edit(layers=layers), tmp_path / "a.safetensors", half=False)
    file = comfy.utils.load_torch_file(str(tmp_path / "a.safetensors"))
    _, loaded = comfy.sd.load_lora_for_models(model, clip, file, 1.0, 1.0)
    texts = ["a cat", "two dogs"]
    wanted = prompts_of(apply_to_clip(clip, Edit(layers=layers)), texts).context
    assert (prompts_of(loaded, texts).context - wanted).abs().max() < 1e-5
    assert (prompts_of(clip, texts).context - wanted).abs().max() > 1e-2


def test_a_trained_edit_on_another_checkpoint_or_on_fp8_is_told(demo_model, strong, caplog):
    model = demo_model[0]
    with caplog.at_level(logging.WARNING):
        apply_edit(model, replace(strong, base=base_fingerprint(model)))
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        apply_edit(model, replace(strong, base=(1.0, 2.0, 3.0)))
    assert "made on another checkpoint" in caplog.text


def test_pictures_a_method_does_not_use_are_told(demo_model):
    model, clip, _ = demo_model
    edit, _ = train_erasure(model, clip, CAT, KEPT, images=torch.zeros(1, 4, 16, 16))
    assert "learns from words alone; the pictures were not used" in report_text(edit.report, edit.spec)


def test_pictures_are_read_or_refused(demo_model):
    model, clip, vae = demo_model
    with pytest.raises(ValueError, match="batch of pictures is empty"):
        latents_of(vae, torch.zeros(0, 64, 64, 3), 128, 128)
    latents = latents_of(vae, torch.rand(2, 64, 96, 4), 128, 128)
    assert latents.shape == (2, 4, 16, 16)
    edit, _ = train_erasure(model, clip, CAT, KEPT, "Co-Erasing", images=latents)
    assert len(edit.layers) == 14
    with pytest.raises(ValueError, match=r"no method 'SALUN'.*ESD"):
        ConceptsTrainErasure.execute(model, clip, CAT, "SALUN", "draft", 0, 128, 128)
    with pytest.raises(ValueError, match="layers 'none'"):
        train_erasure(model, clip, CAT, KEPT, options=TrainOptions(target_modules="none"))
    with pytest.raises(ValueError, match="preserved"):
        train_erasure(model, clip, CAT, Preserved(("a cat",), 1.0))


def test_states_have_the_spread_of_their_noise_level(demo_model):
    sampling = demo_model[0].model.model_sampling
    levels = noise_levels(sampling, 50)
    assert (levels[:-1] > levels[1:]).all()
    noise = torch.randn(50, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    x = noised(sampling, torch.zeros_like(noise), noise, levels)
    assert torch.allclose(x.flatten(1).std(1), levels, rtol=0.1)


def _within(rows, point):
    """How far a point is from the convex hull of rows: non-negative weights that add up to one, by least squares."""
    ones = 100 * rows.norm(dim=1).mean()
    system = torch.cat([rows.T, ones.expand(1, len(rows))]).double()
    return nnls(system.numpy(), torch.cat([point, ones[None]]).double().numpy())[1]


def test_only_co_erasings_questions_about_a_picture_have_image_tokens(demo_model):
    """Every call of the network in a whole training, its own pictures and trajectories among them."""
    model, clip, _ = demo_model
    calls, sampling = [], model.get_model_object("model_sampling")

    def watch(module, args, kwargs):
        calls.append((args[0].detach().clone(), args[1].clone(), kwargs["context"].detach().clone()))

    handle = model.model.diffusion_model.register_forward_pre_hook(watch, with_kwargs=True)
    try:
        train_erasure(model, clip, CAT, KEPT, "Co-Erasing")
    finally:
        handle.remove()
    texts = plan_of(METHODS["Co-Erasing"], "draft", CAT, KEPT, SMALL).texts
    concept, others, empty = (
        prompts_of(clip, some).context for some in (texts.concept, (*texts.anchor, *texts.preserved), [""])
    )
    count = dict.fromkeys(("words", "picture", "search"), 0)
    for x, timestep, context in calls:
        level = sampling.sigma(timestep)
        spread = ((level.square() + 1) / (level.square() + sampling.sigma_data**2)).sqrt()  # of latents of spread one
        assert ((x.flatten(1).std(1) / spread).log2().abs() < 0.6).all()
        assert context.shape[1] in (77, 81)
        for row in context:
            words, tokens = row[:77], row[77:]
            if not len(tokens):
                assert (words == torch.cat([concept, others, empty])).all(-1).all(-1).any()
                count["words"] += 1
            elif torch.equal(words, empty[0]):
                count["search"] += 1
            else:
                assert (words == concept).all(-1).all(-1).any()
                distances = [_within(words, token) for token in tokens]
                assert max(distances) < 1e-3 * float(words.norm(dim=1).mean())
                count["picture"] += 1
    states, batches, picture_rows = SMALL.trajectories * SMALL.steps, SMALL.iterations, 1
    assert count["search"] == 2 * OWN_PICTURES
    assert count["picture"] == states + batches * picture_rows
    assert count["words"] > 2 * states + 2 * batches


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


def test_unlearning_in_the_text_encoder_changes_the_listed_layers_and_nothing_else(demo_model):
    model, clip, _ = demo_model
    before = _bytes(model.model), _bytes(clip.cond_stage_model)
    edit, trained = unlearn_in_text(model, clip, CAT, KEPT)
    assert (_bytes(model.model), _bytes(clip.cond_stage_model)) == before
    assert set(edit.layers) == set(text_layers(clip))
    assert trained.outcome.preserve[-1] < 0.05
    forgetful = apply_to_clip(clip, edit)
    texts = ["a cat", "a dog"]
    now, then = prompts_of(forgetful, texts).context, prompts_of(clip, texts).context
    assert not torch.equal(now[0], then[0])
    assert torch.equal(prompts_of(clip, texts).context, then)
    again, _ = unlearn_in_text(model, clip, CAT, KEPT)
    assert all(torch.equal(again.layers[k].up, m.up) for k, m in edit.layers.items())


def test_numbers_that_are_not_set_are_the_methods_own():
    def settings(method, **chosen):
        return plan_of(METHODS[method], "draft", CAT, KEPT, replace(SMALL, **chosen)).settings

    own, told = settings("All but One"), settings("All but One", eta=0.2)
    assert own.eta == METHODS["All but One"].settings.eta
    assert own.eta > own.eta_alone == 0  # pushed beyond an anchor, but not beyond nothing
    assert (told.eta, told.eta_alone, told.layout) == (0.2, 0.2, own.layout)
