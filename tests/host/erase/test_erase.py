"""Edits on the host's models: read under patches, delivered three ways, exported, and taken away without a trace."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import comfy.lora
import comfy.model_management
import comfy.sample
import comfy.sd
import pytest
import torch
from comfyui_concepts.host.erase import apply as erase_apply
from comfyui_concepts.host.erase import export as erase_export
from comfyui_concepts.host.erase import weights as erase_weights
from comfyui_concepts.host.erase.apply import AUTOMATIC, FULL, TEXT, WEIGHTS, apply_edit, change_conditioning
from comfyui_concepts.host.erase.probe import probe
from comfyui_concepts.host.erase.solve import solve_erasure
from comfyui_concepts.host.lora.export import STYLES
from comfyui_concepts.host.text.tokens import PromptEncoder
from comfyui_concepts.methods.erase.edit import Edit
from comfyui_concepts.methods.erase.edit_file import save_edit
from comfyui_concepts.methods.erase.fingerprint import clip_fingerprint, fingerprints_differ
from comfyui_concepts.methods.erase.lowrank import LowRank
from comfyui_concepts.methods.erase.spec import LAST, SPAN_TO_END, TEMPLATES, Erased, Preserved
from safetensors.torch import load_file

FP8 = torch.float8_e4m3fn


def an_edit(width: int = 32, rank: int = 2, scale: float = 0.3, **more) -> Edit:
    g = torch.Generator().manual_seed(2)
    up, down = torch.randn(width, rank, generator=g), torch.randn(rank, width, generator=g)
    return Edit(LowRank(up * scale, down * scale), **more)


def predict(patcher, context, y=None):
    """The UNet's own answer, as the sampler would get it: loaded, with the patcher's options."""
    comfy.model_management.load_models_gpu([patcher])
    g = torch.Generator().manual_seed(1)
    x, sigma = torch.randn(len(context), 4, 8, 8, generator=g), torch.full((len(context),), 3.0)
    options = {
        **patcher.model_options["transformer_options"],
        "wrappers": patcher.wrappers,
    }  # as the sampler hands them on
    more = {} if y is None else {"y": y}
    return patcher.model.apply_model(x, sigma, c_crossattn=context, transformer_options=options, **more)


def a_context(rows: int = 2, width: int = 32):
    return torch.randn(rows, 77, width, generator=torch.Generator().manual_seed(3))


def weights_of(patcher):
    return {k: v.clone() for k, v in patcher.model.state_dict().items()}


def same_bytes(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k].view(torch.uint8), b[k].view(torch.uint8)) for k in a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, FP8])
@pytest.mark.parametrize("delivery", [WEIGHTS, FULL, TEXT])
def test_removing_the_edit_gives_back_every_byte(new_model, dtype, delivery):
    model = new_model("EPS", dtype)
    before, plain = weights_of(model), predict(model, a_context())
    edited = apply_edit(model, an_edit(), 1.0, delivery)
    changed = predict(edited, a_context())
    assert not torch.equal(changed, plain)
    assert torch.equal(predict(model, a_context()), plain)  # the source was never touched
    comfy.model_management.load_models_gpu([edited])
    edited.detach()
    assert same_bytes(weights_of(model), before)


@pytest.mark.parametrize("delivery", [AUTOMATIC, WEIGHTS, FULL, TEXT])
def test_strength_zero_and_empty_edits_are_the_plain_model(new_model, delivery):
    model = new_model()
    plain = predict(model, a_context())
    for edit, strength in ((an_edit(), 0.0), (Edit(), 1.0), (an_edit(rank=0), 1.0)):
        same = apply_edit(model, edit, strength, delivery)
        assert not same.patches
        assert torch.equal(predict(same, a_context()), plain)


def test_every_delivery_gives_the_same_picture_and_leaves_other_clones_alone(new_model):
    model = new_model()
    other = apply_edit(model, an_edit(scale=0.1), 1.0, WEIGHTS)
    expected = predict(other, a_context())
    by_weights = predict(apply_edit(model, an_edit(), 0.7, WEIGHTS), a_context())
    for delivery in (FULL, TEXT):
        again = predict(apply_edit(model, an_edit(), 0.7, delivery), a_context())
        torch.testing.assert_close(again, by_weights, rtol=1e-5, atol=1e-5)
    ((changed, _),) = change_conditioning([[a_context(), {}]], an_edit(), 0.7)
    torch.testing.assert_close(predict(model, changed), by_weights, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(predict(other, a_context()), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("targets", "blocks"), [(("k",), ""), (("v",), ""), (("k", "v"), "output_blocks"), (("v",), "middle")]
)
def test_a_part_of_the_projections_is_the_same_part_in_every_delivery(new_model, targets, blocks):
    model, edit = new_model(), an_edit(targets=targets, blocks=blocks)
    by_weights = predict(apply_edit(model, edit, 1.0, WEIGHTS), a_context())
    torch.testing.assert_close(
        predict(apply_edit(model, edit, 1.0, TEXT), a_context()), by_weights, rtol=1e-5, atol=1e-5
    )
    whole = predict(apply_edit(model, an_edit(), 1.0, WEIGHTS), a_context())
    assert not torch.allclose(by_weights, whole, atol=1e-4)
    with pytest.raises(ValueError, match=r"some of the projections only.*connect a MODEL"):
        change_conditioning([[a_context(), {}]], edit)


def test_the_edit_goes_to_the_weights_as_a_lora_leaves_them(new_model):
    model = new_model()
    key = erase_weights.text_keys(model, ("k",))[0]
    g = torch.Generator().manual_seed(4)
    shape = model.model_state_dict()[key].shape
    model.add_patches({key: ("diff", (torch.randn(shape, generator=g) * 0.1,))}, 0.5)
    comfy.model_management.load_models_gpu([model])
    loaded = model.model_state_dict()[key].clone()  # as the host itself makes it
    ((_, weight),) = erase_weights.effective_weights(model, [key])
    torch.testing.assert_close(weight, loaded.float(), rtol=1e-6, atol=1e-6)
    made = erase_weights.weight_deltas(model, an_edit())[key]
    torch.testing.assert_close(made.matrix(), loaded @ an_edit().text.matrix(), rtol=1e-4, atol=1e-5)
    by_weights = predict(apply_edit(model, an_edit(), 1.0, WEIGHTS), a_context())
    by_text = predict(apply_edit(model, an_edit(), 1.0, TEXT), a_context())
    torch.testing.assert_close(by_text, by_weights, rtol=1e-5, atol=1e-5)


def _meta(config, adm):
    """A UNet of the real size without its memory, as a MODEL."""
    import comfy.ldm.modules.diffusionmodules.openaimodel as openaimodel
    import comfy.ops

    unet = openaimodel.UNetModel(
        **config, image_size=32, in_channels=4, out_channels=4, model_channels=320, use_spatial_transformer=True,
        legacy=False, adm_in_channels=adm, num_classes="sequential" if adm else None, dtype=torch.float16,
        device="meta", operations=comfy.ops.disable_weight_init,
    )  # fmt: skip
    model = torch.nn.Module()
    model.diffusion_model = unet
    model.model_config = SimpleNamespace(unet_config=config | {"adm_in_channels": adm})
    return SimpleNamespace(model=model, model_state_dict=lambda *_: model.state_dict())


SD15 = {
    "num_res_blocks": [2, 2, 2, 2], "channel_mult": [1, 2, 4, 4], "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], "transformer_depth_middle": 1, "context_dim": 768,
    "num_heads": 8,
}  # fmt: skip
SDXL = {
    "num_res_blocks": [2, 2, 2], "channel_mult": [1, 2, 4], "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], "transformer_depth_middle": 10, "context_dim": 2048,
    "num_head_channels": 64, "use_linear_in_transformer": True,
}  # fmt: skip


@pytest.mark.parametrize(("config", "adm", "count", "name"), [
    (SD15, None, 32, "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"),
    (SDXL, 2816, 140, "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"),
])  # fmt: skip
def test_real_models_have_so_many_projections_and_these_names(config, adm, count, name):
    from comfyui_concepts.host.lora.export import DIFFUSERS, names_of

    model = _meta(config, adm)
    keys = erase_weights.text_keys(model, ("k", "v"))
    assert len(keys) == count
    assert len(erase_weights.text_keys(model, ("v",))) == count // 2
    names, others = names_of(model), names_of(model, style=DIFFUSERS)
    assert name in {names[key] for key in keys}
    assert len({names[key] for key in keys}) == len({others[key] for key in keys}) == count
    if adm:
        assert names[erase_weights.POOLED_KEY] == "lora_unet_label_emb_0_0"
        assert others[erase_weights.POOLED_KEY] == "unet.add_embedding.linear_1"


def test_fp8_weights_take_the_edit_with_the_text_and_a_warning_with_the_weights(new_model, caplog):
    """Rounding every weight anew blurs the edit; in the text it is exact (A27)."""
    model = new_model("EPS", FP8)
    edit = an_edit()
    ((exact, _),) = change_conditioning([[a_context(), {}]], edit)
    ideal, plain = predict(model, exact), predict(model, a_context())

    def off(patcher):
        return float((predict(patcher, a_context()) - ideal).norm() / (ideal - plain).norm())

    with caplog.at_level(logging.WARNING):
        automatic = apply_edit(model, edit, 1.0, AUTOMATIC)
        assert not caplog.records
        assert not automatic.patches
        patched = apply_edit(model, edit, 1.0, WEIGHTS)
    assert "fp8 or quantised" in caplog.text
    assert off(automatic) <= 0.005
    assert off(patched) > 10 * off(automatic)


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("naming", STYLES)
def test_an_exported_lora_is_the_edit(new_model, tmp_path, naming, half, caplog):
    model, edit = new_model(), an_edit()
    erase_export.export_lora(model, None, edit, tmp_path / "a.safetensors", naming, half=half)
    with caplog.at_level(logging.WARNING):
        loaded, _ = comfy.sd.load_lora_for_models(model, None, load_file(tmp_path / "a.safetensors"), 1.0, 0.0)
    assert not caplog.records
    wanted = erase_weights.weight_deltas(model, edit)
    assert set(loaded.patches) == set(wanted)
    for key, matrix in wanted.items():
        (_, adapter, *_), exact = loaded.patches[key][0], matrix.matrix()
        made = adapter.calculate_weight(torch.zeros_like(exact), key, 1.0, 1.0, None, lambda w: w)
        assert (made - exact).norm() <= (5e-4 if half else 1e-6) * exact.norm()


def test_an_exported_lora_is_much_nearer_than_an_extracted_one(new_model, tmp_path):
    """The host's extraction clamps the largest entries of its factors; this export has nothing to approximate."""
    from comfy_extras.nodes_lora_extract import extract_lora

    model, edit = new_model(), an_edit(rank=1)
    key, matrix = next(iter(erase_weights.weight_deltas(model, edit).items()))
    exact = matrix.matrix()
    up, down = extract_lora(exact.clone(), 1)
    erase_export.export_lora(model, None, edit, tmp_path / "a.safetensors", half=True)
    loaded, _ = comfy.sd.load_lora_for_models(model, None, load_file(tmp_path / "a.safetensors"), 1.0, 0.0)
    made = loaded.patches[key][0][1].calculate_weight(torch.zeros_like(exact), key, 1.0, 1.0, None, lambda w: w)
    assert 10 * (made - exact).norm() <= (up @ down - exact).norm()


def test_the_pooled_embedding_is_edited_in_its_columns_alone(new_model):
    """A tiny model of SDXL's kind: the pooled embedding (6 of 10 values) goes through label_emb."""
    unet = {"adm_in_channels": 10, "num_classes": "sequential"}
    model = new_model(more=unet)
    g = torch.Generator().manual_seed(6)
    edit = an_edit(pooled=LowRank(torch.randn(6, 1, generator=g), torch.randn(1, 6, generator=g)))
    y = torch.randn(2, 10, generator=g)
    by_weights = predict(apply_edit(model, edit, 1.0, WEIGHTS), a_context(), y)
    assert (erase_weights.POOLED_KEY, (1, 0, 6)) in erase_weights.weight_deltas(model, edit)
    by_text = predict(apply_edit(model, edit, 1.0, TEXT), a_context(), y)
    torch.testing.assert_close(by_text, by_weights, rtol=1e-5, atol=1e-5)
    ((context, about),) = change_conditioning([[a_context(), {"pooled_output": y[:, :6]}]], edit)
    changed = torch.cat([about["pooled_output"], y[:, 6:]], 1)
    torch.testing.assert_close(predict(model, context, changed), by_weights, rtol=1e-5, atol=1e-5)
    layers = erase_export.layers_of(model, edit)
    assert not layers[erase_weights.POOLED_KEY].matrix()[:, 6:].any()
    with pytest.raises(ValueError, match=r"pooled text embedding, which this model does not read.*'pooled' off"):
        apply_edit(new_model(), edit)


def erase(concept, anchor="", previous=None, **more):
    return Erased(concept, anchor, more.pop("templates", ("{}", "a {}")), more.pop("scope", LAST), 1.0, (), previous)


@pytest.fixture(scope="module")
def cat_edit(demo_model):
    model, clip, _ = demo_model
    return solve_erasure(model, clip, erase("cat"), Preserved(("a dog", "a fox"), 1.0))


def test_the_same_words_give_the_same_file(demo_model, cat_edit, tmp_path):
    model, clip, _ = demo_model
    again = solve_erasure(model, clip, erase("cat"), Preserved(("a dog", "a fox"), 1.0))
    for name, edit in (("a", cat_edit), ("b", again)):
        save_edit(edit, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_report_says_what_went_and_what_moved(cat_edit):
    (concept,) = cat_edit.report["concepts"]
    assert concept["concept"] == "cat"
    assert concept["left"] < 0.05
    assert {k["prompt"] for k in cat_edit.report["kept"]} == {"the empty prompt", "a dog", "a fox"}
    assert max(k["moved"] for k in cat_edit.report["kept"]) < 0.2
    assert cat_edit.spec["clip_skip"] is None


def test_a_weighted_concept_is_as_gone_as_a_plain_one(demo_model, cat_edit):
    """The host forms z∅ + w(z − z∅); with the empty prompt held this commutes with the edit (A17)."""
    _, clip, _ = demo_model

    def encoded(text):
        return clip.encode_from_tokens(clip.tokenize(text))[0]

    def edited(rows):
        return rows + cat_edit.text(rows)

    empty, plain, heavy = encoded(""), encoded("a cat"), encoded("a (cat:1.4)")
    weighted = empty + 1.4 * (edited(plain) - empty)
    held = (edited(empty) - empty).norm(dim=1).max()
    assert (edited(heavy)[2] - weighted[2]).norm() <= 2 * held + 1e-4


def test_nothing_to_erase_is_an_edit_that_changes_nothing(demo_model):
    model, clip, _ = demo_model
    assert solve_erasure(model, clip, None, None).empty


@pytest.mark.parametrize(
    ("concepts", "kept", "sentence"),
    [
        (erase(""), None, "no concept to erase"),
        (erase("cat", "cat"), None, "anchor is the concept itself"),
        (erase("cat"), Preserved(("a cat, blue background",), 1.0), "which is the same; take it out of one"),
        (erase("cat", "dog", erase("dog")), None, "which is erased too"),
        (erase("cat", templates=("pre{}fix",)), None, "do not occur in"),
        (
            erase("cat", templates=("{} " + "word " * 90,)),
            None,
            "more tokens than one call.*shorten the concept or its template",
        ),
        (erase("cat", "word " * 90), None, "more tokens than one call.*shorten the concept or its template"),
    ],
)
def test_lists_that_make_no_sense_are_refused(demo_model, concepts, kept, sentence):
    model, clip, _ = demo_model
    with pytest.raises(ValueError, match=sentence):
        solve_erasure(model, clip, concepts, kept)


def test_what_does_not_fit_the_model_is_refused(new_model, demo_model):
    _, clip, _ = demo_model
    with pytest.raises(ValueError, match=r"CLIP makes text embeddings of width 128 and this MODEL reads width 32"):
        solve_erasure(new_model(), clip, erase("cat"), None)
    with pytest.raises(ValueError, match=r"for text embeddings of width 64 and this MODEL reads width 32"):
        apply_edit(new_model(), an_edit(64))
    with pytest.raises(ValueError, match=r"width 64 and this conditioning has width 32"):
        change_conditioning([[a_context(), {}]], an_edit(64))
    with pytest.raises(ValueError, match=r"no layer.*match 'nowhere'"):
        erase_weights.text_keys(new_model(), ("k",), "nowhere")
    trained = Edit(layers={"diffusion_model.nothing.weight": LowRank(torch.ones(2, 1), torch.ones(1, 2))})
    with pytest.raises(ValueError, match=r"1 of 1 weights of the edit do not exist"):
        apply_edit(new_model(), trained)
    with pytest.raises(ValueError, match=r"trained and changes single weights.*connect a MODEL"):
        change_conditioning([[a_context(), {}]], trained)


def test_another_checkpoint_and_another_clip_skip_are_noticed(new_model, demo_model, caplog, cat_edit):
    model, clip, _ = demo_model
    other = Edit(an_edit(128).text, base=(1.0, 2.0, 3.0))
    with caplog.at_level(logging.WARNING):
        apply_edit(model, other)
    assert "made on another checkpoint" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        apply_edit(model, cat_edit)
    assert not caplog.records
    skipped = clip.clone()
    skipped.clip_layer(-2)
    assert fingerprints_differ(cat_edit.clip, clip_fingerprint(PromptEncoder(skipped)))
    with pytest.raises(ValueError, match=r"another text encoder or another CLIP skip"):
        probe(model, skipped, cat_edit)


def test_probing_finds_less_through_an_edited_model(demo_model, cat_edit):
    model, clip, _ = demo_model
    nothing = Edit(an_edit(128, rank=0).text, spec=cat_edit.spec, clip=cat_edit.clip)
    (plain,), (edited,) = probe(model, clip, nothing), probe(model, clip, cat_edit)
    assert plain.direct == pytest.approx(1.0, abs=1e-6)
    assert plain.pushed == pytest.approx(1.0, abs=1e-6)
    assert edited.direct < 0.1
    assert edited.elsewhere < 0.5
    assert edited.margin > 1.0


def test_presets_are_sentences_with_one_place_for_the_concept():
    assert all(t.count("{}") == 1 for templates in TEMPLATES.values() for t in templates)


def test_trained_parts_go_to_the_model_and_to_the_text_encoder(demo_model):
    model, clip, _ = demo_model
    key = erase_weights.text_keys(model, ("k",))[0]
    of_clip = "clip_l.transformer.text_model.encoder.layers.1.mlp.fc1.weight"
    out = model.model_state_dict()[key].shape[0]
    edit = Edit(
        layers={
            key: LowRank(torch.ones(out, 1), torch.ones(1, 128)),
            of_clip: LowRank(torch.ones(512, 1), torch.ones(1, 128)),
        },
        diffs={of_clip.replace("weight", "bias"): torch.ones(512)},
    )  # fmt: skip
    assert set(apply_edit(model, edit).patches) == {key}
    assert set(erase_apply.apply_to_clip(clip, edit).patcher.patches) == {of_clip, of_clip.replace("weight", "bias")}
    assert erase_apply.apply_to_clip(clip, edit, 0.0) is clip


def test_the_exported_lora_draws_the_same_picture_through_the_hosts_loader(demo_model, tmp_path):
    model, clip, _ = demo_model
    edit = solve_erasure(model, clip, erase("cat", "dog", scope=SPAN_TO_END), Preserved(("a fox",), 1.0))
    erase_export.export_lora(model, None, edit, tmp_path / "a.safetensors")
    loaded, _ = comfy.sd.load_lora_for_models(model, None, load_file(tmp_path / "a.safetensors"), 1.0, 0.0)

    def latent(patcher):
        noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
        positive, negative = (clip.encode_from_tokens_scheduled(clip.tokenize(t)) for t in ("a cat", ""))
        return comfy.sample.sample(
            patcher, noise, 6, 3.0, "euler", "normal", positive, negative, torch.zeros_like(noise), disable_pbar=True,
            seed=1,
        )  # fmt: skip

    edited, exported, plain = (latent(p) for p in (apply_edit(model, edit), loaded, model))
    assert (edited - exported).abs().max() <= 1e-3
    assert (edited - plain).abs().max() > 0.1
