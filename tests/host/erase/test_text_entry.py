"""Closed forms on transformers: what is read at the text entry, edits that act there, and what is refused."""

from __future__ import annotations

import functools
import logging
from dataclasses import replace

import comfy.samplers
import comfy.sd
import pytest
import torch
from comfyui_concepts.host.erase import probe as erase_probe
from comfyui_concepts.host.erase import solve as erase_solve
from comfyui_concepts.host.erase.apply import FULL, TEXT, WEIGHTS, apply_edit, apply_to_clip, change_conditioning
from comfyui_concepts.host.erase.entry.rows import encode_conditioning, encoders_of, entry_rows
from comfyui_concepts.host.erase.export import export_lora
from comfyui_concepts.host.erase.probe import probe
from comfyui_concepts.host.erase.solve import SolveRequest, solve_erasure
from comfyui_concepts.host.lora.export import DIFFUSERS, names_of
from comfyui_concepts.host.registry import architecture_of
from comfyui_concepts.methods.erase.edit import Edit, chain
from comfyui_concepts.methods.erase.edit_file import load_edit, save_edit
from comfyui_concepts.methods.erase.lowrank import LowRank
from comfyui_concepts.methods.erase.probe import findings_text
from comfyui_concepts.methods.erase.rows import scope_positions
from comfyui_concepts.methods.erase.spec import ALL, SPAN_TO_END, Erased, Preserved
from diffusers import FluxTransformer2DModel
from diffusers.loaders import FluxLoraLoaderMixin
from safetensors.torch import load_file

from ..tiny_clips import TinyClip
from ..tiny_transformers import names, noise, shared_transformer, tiny_transformer

CAT = Erased("cat", "dog", ("a photo of a {} on grass",), SPAN_TO_END, 1.0)
KEPT = Preserved(("a red fox",), 1.0)
PROMPT = "a photo of a cat on grass"
NAMES = [name for name in names() if name != "flux_schnell"]  # a Flux
PLAIN = [name for name in NAMES if architecture_of(shared_transformer(name).model).text_entry().through == "nothing"]


@functools.cache
def clip_of(name: str) -> TinyClip:
    return TinyClip(name)


@functools.cache
def solved(name: str, **request) -> Edit:
    return solve_erasure(shared_transformer(name), clip_of(name), CAT, KEPT, SolveRequest(**request))


def sampled(model, conditioning, callback=None):
    """One step of the host's own sampling, without negative."""
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(conditioning, conditioning)
    guider.set_cfg(1.0)
    latent = noise(model)
    sampler = comfy.samplers.sampler_object("euler")
    return guider.sample(latent, torch.zeros_like(latent), sampler, torch.tensor([0.7, 0.0]), callback=callback)


def prompt(name: str, text: str = PROMPT):
    return encode_conditioning(clip_of(name), text)


def apart(one, other) -> float:
    return float((one - other).norm() / other.norm())


def hooks(model) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.model.modules())


@pytest.mark.parametrize("name", NAMES)
def test_an_edit_draws_the_same_however_it_is_delivered_and_strength_0_is_the_plain_model(name, tmp_path, caplog):
    model, edit = shared_transformer(name), solved(name)
    plain, by_weights = (sampled(m, prompt(name)) for m in (model, apply_edit(model, edit, 1.0, WEIGHTS)))
    assert apart(by_weights, plain) > 1e-3
    for delivery in (FULL, TEXT):
        edited = apply_edit(model, edit, 1.0, delivery)
        assert apart(sampled(edited, prompt(name)), by_weights) < 1e-6
    assert not edited.patches
    assert torch.equal(sampled(apply_edit(model, edit, 0.0, TEXT), prompt(name)), plain)
    assert hooks(model) == 0
    export_lora(model, None, edit, tmp_path / "a.safetensors", half=False)
    with caplog.at_level(logging.WARNING):
        loaded, _ = comfy.sd.load_lora_for_models(model, None, load_file(tmp_path / "a.safetensors"), 1.0, 0.0)
    assert not caplog.records
    assert apart(sampled(loaded, prompt(name)), by_weights) < 1e-5
    assert torch.equal(sampled(model, prompt(name)), plain)


@pytest.mark.parametrize("name", NAMES)
def test_a_lora_under_the_names_of_diffusers_is_read_by_the_host_or_refused(name, tmp_path):
    model, edit, path = shared_transformer(name), solved(name), tmp_path / "a.safetensors"
    if not set(edit.entry) <= set(names_of(model, None, DIFFUSERS)):
        assert name not in ("flux", "sd3", "qwen")
        with pytest.raises(ValueError, match="has no name in this style of LoRA"):
            export_lora(model, None, edit, path, DIFFUSERS, half=False)
        return
    export_lora(model, None, edit, path, DIFFUSERS, half=False)
    tensors = load_file(path)
    assert {key.rsplit(".", 2)[1] for key in tensors} == {"lora_A", "lora_B"}
    loaded, _ = comfy.sd.load_lora_for_models(model, None, tensors, 1.0, 0.0)
    assert set(loaded.patches) == set(edit.entry)


def test_diffusers_reads_a_flux_s_lora_under_its_own_names(tmp_path):
    """Of kohya's names its converter leaves out this layer (0.42.1)."""
    model, edit, path = shared_transformer("flux"), solved("flux"), tmp_path / "a.safetensors"
    export_lora(model, None, edit, path, DIFFUSERS, half=False)
    theirs = FluxTransformer2DModel(
        in_channels=64, num_layers=2, num_single_layers=2, attention_head_dim=32, num_attention_heads=2,
        joint_attention_dim=48, pooled_projection_dim=32, axes_dims_rope=(8, 12, 12), guidance_embeds=True,
    )  # fmt: skip
    ours = model.model.diffusion_model.txt_in
    theirs.context_embedder.load_state_dict(ours.state_dict())
    theirs.load_lora_adapter(FluxLoraLoaderMixin.lora_state_dict(load_file(path)), prefix="transformer")
    rows = entry_rows(model, prompt("flux"))
    assert apart(theirs.context_embedder(rows), ours(rows + edit.text(rows))) < 1e-5


@pytest.mark.parametrize("name", [n for n in NAMES if n != "krea2"])  # it has fewer directions than rows, 16
def test_the_concept_becomes_its_anchor_and_the_empty_prompt_stays(name):
    report = solved(name).report
    assert report["concepts"][0]["left"] < 0.1
    assert max(drift["moved"] for drift in report["kept"]) < 0.1
    assert report["kept"][0]["prompt"] == "the empty prompt"


@pytest.mark.parametrize("name", NAMES)
def test_the_rows_are_those_that_the_layer_reads_in_a_sampling(name):
    model, read = shared_transformer(name), []
    caught = entry_rows(model, prompt(name))
    assert hooks(model) == 0
    architecture = architecture_of(model.model)
    layer = architecture.network.get_submodule(architecture.text_entry().layers[0])
    handle = layer.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    try:
        sampled(model, prompt(name))
    finally:
        handle.remove()
    assert torch.equal(read[0][0], caught)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "krea2"])  # its rows are mixed before
def test_rows_of_the_phrase_and_behind_it_are_erased_and_none_before_it_or_of_padding(name):
    for encode in encoders_of(shared_transformer(name), clip_of(name)):
        cat, dog = (encode(f"a photo of a {animal} on grass", animal) for animal in ("cat", "dog"))
        first = int((cat.tokens[: cat.stop] != dog.tokens[: cat.stop]).any(1).nonzero()[0])
        assert first == cat.start
        assert scope_positions(cat, SPAN_TO_END) == list(range(cat.start, cat.limit))
        assert scope_positions(cat, ALL)[0] == cat.first
        assert [word.text for word in cat.words] == PROMPT.split()
        assert cat.words[4].start == cat.start
        empty = encode("")
        assert empty.first == empty.stop == cat.first
        assert len(cat.tokens) == cat.limit <= len(empty.tokens) + 12  # padding is the empty prompt's alone


@pytest.mark.parametrize(
    ("name", "behind"), [("flux", 1), ("chroma", 1), ("wan", 1), ("qwen", 5), ("zimage", 5), ("cosmos", 1)]
)
def test_behind_the_words_lies_the_end_token_of_a_t5_or_the_template_of_a_language_model(name, behind):
    (encode,) = encoders_of(shared_transformer(name), clip_of(name))
    part = encode(PROMPT, "cat")
    assert part.limit - part.stop == behind


def test_sd3_reads_the_prompt_in_two_encoders_and_both_know_the_concept():
    clip, t5 = encoders_of(shared_transformer("sd3"), clip_of("sd3"))
    assert (clip(PROMPT, "cat").until, t5(PROMPT, "cat").until) == (None, t5(PROMPT, "cat").stop + 1)
    assert len(clip("").tokens) == len(t5("").tokens) == 77
    assert clip(PROMPT, "cat").start == 5  # behind the start token and four words


@pytest.mark.parametrize("name", PLAIN)
def test_where_nothing_lies_before_the_entry_a_prompt_carries_the_edit_too(name):
    model, edit = shared_transformer(name), solved(name)
    by_prompt = sampled(model, change_conditioning(prompt(name), edit))
    assert apart(by_prompt, sampled(apply_edit(model, edit, 1.0, WEIGHTS), prompt(name))) < 1e-6


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(PLAIN)))
def test_where_something_lies_before_the_entry_a_prompt_cannot(name):
    with pytest.raises(ValueError, match=r"acts behind a (norm|network) inside the model.*Apply Erasure"):
        change_conditioning(prompt(name), solved(name))


@pytest.mark.skipif("anima" not in names(every=True), reason="this host has no Anima")
def test_anima_s_rows_are_those_of_its_adapter_which_reads_the_words_of_t5():
    model, clip = tiny_transformer("anima"), TinyClip("anima")
    (encode,) = encoders_of(model, clip)
    words = clip.tokenize(PROMPT)["t5xxl"][0]
    part = encode(PROMPT, "cat")
    assert len(part.tokens) == len(words)
    assert (part.first, part.stop, part.until) == (0, len(words) - 1, len(words))
    edit = solve_erasure(model, clip, CAT, KEPT)
    made = encode_conditioning(clip, PROMPT)
    plain, by_weights, by_text = (
        sampled(m, made) for m in (model, *(apply_edit(model, edit, 1.0, d) for d in (WEIGHTS, TEXT)))
    )
    assert apart(by_text, by_weights) < 1e-6
    assert apart(by_weights, plain) > 1e-4
    with pytest.raises(ValueError, match="acts behind a network"):
        change_conditioning(made, edit)


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_the_pooled_entry_is_edited_in_the_same_ways(name):
    model, edit = shared_transformer(name), solved(name, pooled=True)
    by_weights, by_text = (sampled(apply_edit(model, edit, 1.0, d), prompt(name)) for d in (WEIGHTS, TEXT))
    assert apart(by_text, by_weights) < 1e-6
    assert apart(by_weights, sampled(apply_edit(model, replace(edit, pooled=None)), prompt(name))) > 1e-5
    assert apart(sampled(model, change_conditioning(prompt(name), edit)), by_weights) < 1e-6


@pytest.mark.parametrize("name", ["qwen", "cosmos"])
def test_edits_one_after_the_other_are_the_chained_edit_by_text_too(name):
    model, first = shared_transformer(name), solved(name)
    second = solve_erasure(model, clip_of(name), CAT._replace(concept="fox", anchor="house"), None)
    apart_by_text = apply_edit(apply_edit(model, first, 1.0, TEXT), second, 1.0, TEXT)
    apart_by_weights = apply_edit(apply_edit(model, first, 1.0, WEIGHTS), second, 1.0, WEIGHTS)
    together = sampled(apply_edit(model, chain(first, second), 1.0, WEIGHTS), prompt(name))
    for model in (apart_by_text, apart_by_weights):
        assert apart(sampled(model, prompt(name)), together) < 2e-6
    assert apart(sampled(apply_edit(shared_transformer(name), second), prompt(name)), together) > 1e-3


def test_keys_alone_and_values_alone_are_edited_where_the_text_meets_both():
    model = shared_transformer("cosmos")
    keys, values = (solved("cosmos", targets=(to,)) for to in "kv")
    assert len(keys.entry) == len(values.entry) == 2
    assert not set(keys.entry) & set(values.entry)
    for edit in (keys, values):
        by_weights, by_text = (sampled(apply_edit(model, edit, 1.0, d), prompt("cosmos")) for d in (WEIGHTS, TEXT))
        assert apart(by_text, by_weights) < 1e-6
    with pytest.raises(ValueError, match=r"one layer \(txt_in\).*choose 'keys and values'"):
        solved("flux", targets=("k",))


def test_fp8_weights_are_left_alone_and_the_edit_acts_all_the_same():
    model, edit = tiny_transformer("qwen", torch.float8_e4m3fn, cast=torch.float32), solved("qwen")
    edited = apply_edit(model, edit)
    assert not edited.patches
    plain = sampled(model, prompt("qwen"))
    assert apart(sampled(edited, prompt("qwen")), plain) > 1e-3
    assert torch.equal(sampled(model, prompt("qwen")), plain)


def test_an_error_during_the_sampling_leaves_no_hook():
    model, edit = shared_transformer("chroma"), solved("chroma")
    plain, layer = sampled(model, prompt("chroma")), model.model.diffusion_model.final_layer

    def cancel(*_):
        raise KeyboardInterrupt

    handle = layer.register_forward_pre_hook(cancel)
    try:
        with pytest.raises(KeyboardInterrupt):
            sampled(apply_edit(model, edit, 1.0, TEXT), prompt("chroma"))
    finally:
        handle.remove()
    assert hooks(model) == 0
    assert torch.equal(sampled(model, prompt("chroma")), plain)


def test_an_edit_that_moves_nothing_is_the_plain_model_bit_for_bit():
    none = LowRank(torch.zeros(48, 0), torch.zeros(0, 48))
    model, edit = shared_transformer("wan"), replace(solved("wan"), text=none)
    assert torch.equal(sampled(apply_edit(model, edit, 1.0, TEXT), prompt("wan")), sampled(model, prompt("wan")))


def test_a_file_says_where_an_edit_acts(tmp_path):
    save_edit(solved("qwen"), tmp_path / "a.safetensors")
    loaded = load_edit(tmp_path / "a.safetensors")
    assert (loaded.entry, loaded.through) == (("diffusion_model.txt_in.weight",), "norm")


def test_an_edit_fits_the_family_and_the_text_encoder_it_was_solved_with():
    edit = solved("flux")
    with pytest.raises(ValueError, match=r"changes diffusion_model.txt_in.weight, and this model reads its prompt by"):
        apply_edit(shared_transformer("sd3"), edit)
    with pytest.raises(ValueError, match="changes the cross-attention of a UNet"):
        apply_edit(shared_transformer("flux"), replace(edit, entry=()))
    assert apply_to_clip(clip_of("flux"), edit) is clip_of("flux")
    other = TinyClip("flux")
    other._row = lambda number: torch.zeros(48)
    with pytest.raises(ValueError, match="another text encoder"):
        probe(shared_transformer("flux"), other, edit)


def test_what_cannot_be_solved_is_refused_in_words():
    with pytest.raises(ValueError, match=r"pooled text embedding.*does not read.*'pooled' off"):
        solved("qwen", pooled=True)
    wide = TinyClip("wan")
    wide.family = wide.family._replace(context=64)
    with pytest.raises(ValueError, match=r"cannot read text embeddings of width 64 \(it reads width 48\)"):
        solve_erasure(shared_transformer("wan"), wide, CAT, None)


def test_wide_text_is_solved_and_probed_as_narrow_text_is(monkeypatch):
    model, clip, sentences = shared_transformer("qwen"), clip_of("qwen"), ("a drawing of a {}",)
    narrow, (found,) = solved("qwen"), probe(model, clip, solved("qwen"), sentences)
    for module in (erase_solve, erase_probe):
        monkeypatch.setattr(module, "WIDE", 47)
    wide = solve_erasure(model, clip, CAT, KEPT)
    torch.testing.assert_close(wide.text.matrix(), narrow.text.matrix(), rtol=1e-4, atol=1e-5)
    assert wide.report["change"] == pytest.approx(narrow.report["change"], abs=2e-5)
    assert wide.report["kept"] == narrow.report["kept"]
    (probed,) = probe(model, clip, wide, sentences)
    assert probed[1:4] == pytest.approx(found[1:4], abs=1e-4)
    assert "not measured" in findings_text([probed])
    assert "not measured" not in findings_text([found])


@pytest.mark.parametrize("name", ["sd3", "qwen"])
def test_probing_finds_what_is_left(name):
    (found,) = probe(shared_transformer(name), clip_of(name), solved(name), ("a photo of a {} on grass",))
    assert found.direct < 0.1
    weak = replace(solved(name), text=solved(name).text.times(0.0))
    (plain,) = probe(shared_transformer(name), clip_of(name), weak, ("a photo of a {} on grass",))
    assert plain.direct > 0.9
