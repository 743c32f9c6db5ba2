"""LoRA files of every spelling give the factors that the host would merge, and what cannot be added is refused."""

from __future__ import annotations

import json

import pytest
import torch
from comfyui_concepts.host import keys
from comfyui_concepts.host.lora.branches import Branch, low_rank, prepared
from comfyui_concepts.host.lora.concept import with_text_part
from comfyui_concepts.host.lora.factors import network_factors
from comfyui_concepts.host.lora.files import LoraFile, read_lora
from comfyui_concepts.methods.lora import LoraFactors
from safetensors.torch import save_file

from .lora_cases import (
    CONV,
    DIFFUSERS,
    LINEAR,
    ONE_BY_ONE,
    OUT,
    SPELLINGS,
    beside,
    check,
    file_of,
    image_tokens,
    into,
    random_tensor,
)


@pytest.fixture(scope="module")
def patcher(new_model):
    return new_model("EPS", torch.float64, sd15=True)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_gives_what_the_host_would_merge(patcher, spelling):
    tensors = SPELLINGS[spelling](patcher)
    factors = network_factors(LoraFile("tried", tensors), patcher.model)
    assert set(factors) == set(DIFFUSERS)
    assert factors[LINEAR][0].scale == pytest.approx(2 / 3 if any(k.endswith("alpha") for k in tensors) else 1)
    check(patcher, tensors, 0.7, DIFFUSERS)


def test_a_middle_factor_of_a_convolution_is_taken_in(patcher):
    module = patcher.model.diffusion_model.get_submodule(CONV)
    out, inner = module.weight.shape[:2]
    name = f"lora_unet_{DIFFUSERS[CONV].replace('.', '_')}"
    tensors = {
        f"{name}.lora_down.weight": random_tensor(3, inner, 1, 1),
        f"{name}.lora_mid.weight": random_tensor(3, 3, 3, 3, seed=5),
        f"{name}.lora_up.weight": random_tensor(out, 3, 1, 1, seed=9),
        f"{name}.alpha": torch.tensor(1.5),
    }
    check(patcher, tensors, 1.3, [CONV])


@pytest.mark.parametrize("kind", ["loha", "loha of high rank", "loha on a convolution", "lokr", "lokr of two pairs"])
def test_hadamard_and_kronecker_forms_are_what_the_host_would_merge(patcher, kind):
    layer = CONV if "convolution" in kind else LINEAR
    out, inner = patcher.model.diffusion_model.get_submodule(layer).weight.flatten(1).shape
    name, rank = f"lora_unet_{DIFFUSERS[layer].replace('.', '_')}", 12 if "high" in kind else 2
    if kind.startswith("loha"):
        tensors = {
            f"{name}.hada_w1_a": random_tensor(out, rank),
            f"{name}.hada_w1_b": random_tensor(rank, inner, seed=1),
            f"{name}.hada_w2_a": random_tensor(out, rank, seed=2),
            f"{name}.hada_w2_b": random_tensor(rank, inner, seed=3),
        }
    elif kind == "lokr":
        tensors = {f"{name}.lokr_w1": random_tensor(4, 4), f"{name}.lokr_w2": random_tensor(out // 4, inner // 4)}
    else:
        tensors = {
            f"{name}.lokr_w1_a": random_tensor(4, 2),
            f"{name}.lokr_w1_b": random_tensor(2, 4, seed=1),
            f"{name}.lokr_w2_a": random_tensor(out // 4, 2),
            f"{name}.lokr_w2_b": random_tensor(2, inner // 4, seed=3),
        }
    tensors[f"{name}.alpha"] = torch.tensor(1.5)
    check(patcher, tensors, 0.9, [layer])


@pytest.mark.parametrize(
    ("extra", "word"),
    [({"dora_scale": (32, 1)}, "DoRA"), ({"set_weight": (32, 32)}, "replaced"), ({"oft_blocks": (4, 8, 8)}, "OFT")],
)
def test_what_cannot_be_added_is_refused_by_name(patcher, extra, word):
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = SPELLINGS["kohya"](patcher) | {f"{name}.{end}": random_tensor(*shape) for end, shape in extra.items()}
    with pytest.raises(ValueError, match=f"holds .*{word}.*use a plain LoRA"):
        network_factors(LoraFile("tried", tensors), patcher.model)


def test_a_file_that_fits_nothing_is_an_error_and_so_is_another_models(patcher):
    other = {f"transformer.blocks.0.lora_{end}.weight": torch.ones(2, 2) for end in ("up", "down")}
    with pytest.raises(ValueError, match=r"matched 0 of 2 keys"):
        network_factors(LoraFile("other", other), patcher.model)
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    wrong = {f"{name}.lora_down.weight": random_tensor(4, 320), f"{name}.lora_up.weight": random_tensor(320, 4)}
    with pytest.raises(ValueError, match="made for another model: it changes 320"):
        network_factors(LoraFile("large", wrong), patcher.model)


def _saved_by_peft(new_model, folder, **settings):
    """A UNet under a random adapter of peft's, which has saved it."""
    peft = pytest.importorskip("peft")
    own = new_model("EPS", torch.float64, sd15=True)
    config = peft.LoraConfig(target_modules=["to_q", "to_out.0"], init_lora_weights=False, **settings)
    with torch.inference_mode(False):
        peft.get_peft_model(own.model.diffusion_model, config).save_pretrained(folder)
    return own.model.diffusion_model


def test_a_peft_adapter_adds_what_peft_adds(new_model, patcher, tmp_path):
    """With ranks and scales of single layers, and rslora."""
    unet = _saved_by_peft(
        new_model, tmp_path, r=2, lora_alpha=3, use_rslora=True, rank_pattern={LINEAR: 3}, alpha_pattern={LINEAR: 5}
    )
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        lora = read_lora(path)
        factors = network_factors(lora, patcher.model)
        assert factors[LINEAR][0].scale == pytest.approx(5 / 3**0.5)
        assert factors[OUT][0].scale == pytest.approx(3 / 2**0.5)
        for layer in (LINEAR, OUT):
            x = into(patcher, layer)
            out, expected = beside(patcher, lora, 1.0, layer, x), unet.get_submodule(layer)(x)
            assert (expected - patcher.model.diffusion_model.get_submodule(layer)(x)).abs().max() > 0.01
            assert (out - expected).abs().max() < 1e-6
    settings = json.loads((tmp_path / "adapter_config.json").read_text()) | {"use_dora": True}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="LORA with DoRA"):
        read_lora(tmp_path)


@pytest.mark.parametrize(
    ("more", "named"), [({"bias": "lora_only"}, "bias"), ({"modules_to_save": ["proj_in"]}, "proj_in")]
)
def test_what_a_peft_adapter_replaces_is_refused_in_words(new_model, tmp_path, more, named):
    _saved_by_peft(new_model, tmp_path, r=2, **more)
    with pytest.raises(ValueError, match=f"also holds '.*{named}.*' *, which is not a low-rank pair.*modules_to_save"):
        read_lora(tmp_path)


def test_keys_that_are_not_used_are_counted_and_told(patcher, caplog):
    """The text part has another reader, and is no reason to warn. What no reader takes, is, on a known layer too."""
    caplog.set_level("INFO")
    tensors = SPELLINGS["kohya"](patcher) | {
        f"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_{end}.weight": torch.ones(2, 2) for end in ("up", "down")
    }
    network_factors(LoraFile("whole", tensors), patcher.model)
    assert [(r.levelname, r.message) for r in caplog.records] == [
        ("INFO", "LoRA 'whole': matched 15 of 15 keys of the model")
    ]
    caplog.clear()
    more = {f"lora_unet_not_a_layer.lora_{end}.weight": torch.ones(2, 2) for end in ("up", "down")}
    network_factors(LoraFile("partly", tensors | more), patcher.model)
    assert [(r.levelname, r.message) for r in caplog.records] == [
        ("WARNING", "LoRA 'partly': matched 15 of 17 keys of the model"),
        (
            "WARNING",
            "LoRA 'partly': 'lora_unet_not_a_layer.lora_up.weight' and others: the model has nothing that uses it",
        ),
    ]


@pytest.mark.parametrize("end", ["lora_mid.bias", "delta", "rank"])
def test_a_key_that_nobody_reads_is_told_though_its_layer_is_known(patcher, caplog, end):
    name = f"lora_unet_{DIFFUSERS[LINEAR].replace('.', '_')}.{end}"
    network_factors(LoraFile("more", SPELLINGS["kohya"](patcher) | {name: torch.ones(2)}), patcher.model)
    assert "LoRA 'more': matched 15 of 16 keys of the model" in caplog.messages
    assert f"LoRA 'more': '{name}': the model has nothing that uses it" in caplog.messages


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_keys_of_every_spelling_are_counted(patcher, caplog, spelling):
    caplog.set_level("INFO")
    tensors = SPELLINGS[spelling](patcher)
    network_factors(LoraFile("whole", tensors), patcher.model)
    assert f"matched {len(tensors)} of {len(tensors)} keys" in caplog.text


@pytest.mark.parametrize("name", ["lion.pth", "lion.ckpt", "lion.bin"])
def test_only_safetensors_are_opened(name, tmp_path):
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(ValueError, match=r"not a \.safetensors file, and other files can run code"):
        read_lora(tmp_path / name)


def test_a_peft_adapter_of_pickles_is_not_opened(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    pytest.importorskip("peft")
    with pytest.raises(ValueError, match=r"holds no adapter_model\.safetensors"):
        read_lora(tmp_path)


def test_the_learned_words_of_an_ed_lora_are_set_apart(tmp_path):
    save_file(
        {"new_concept_embedding.<dog_1>": torch.randn(16, 8), "unet.x.lora_up.weight": torch.ones(1)},
        tmp_path / "ed.safetensors",
    )
    lora = read_lora(tmp_path / "ed.safetensors")
    assert lora.embeddings["<dog_1>"]["l"].shape == (16, 8)
    assert list(lora.tensors) == ["unet.x.lora_up.weight"]


def test_rows_of_a_branch_are_its_own_and_the_order_of_branches_does_not_matter(patcher):
    lora, unet = LoraFile("tried", SPELLINGS["kohya"](patcher)), patcher.model.diffusion_model
    factors = prepared(network_factors(lora, patcher.model), torch.device("cpu"), torch.float64)
    for layer in (LINEAR, CONV):
        x, module = into(patcher, layer), unet.get_submodule(layer)
        changed = beside(patcher, lora, 1.0, layer, x, rows=slice(1, 3))
        assert torch.allclose(changed[1:], beside(patcher, lora, 1.0, layer, x)[1:], rtol=0, atol=1e-12)
        assert torch.equal(changed[0], module(x)[0])
        parts, both = [Branch(factors, 1.0, slice(0, 2)), Branch(factors, -0.5, slice(2, 3))], []
        for order in (parts, parts[::-1]):
            with low_rank(unet, order):
                both.append(module(x))
        assert torch.equal(*both)


@pytest.mark.parametrize("layer", [LINEAR, ONE_BY_ONE, CONV])
def test_a_masked_branch_acts_on_its_tokens_and_a_full_mask_is_the_whole_lora(patcher, layer):
    lora = LoraFile("tried", file_of(patcher, lambda n: f"lora_unet_{n.replace('.', '_')}.", layers=[layer]))
    x, module = into(patcher, layer), patcher.model.diffusion_model.get_submodule(layer)
    count = 5 if x.ndim == 3 else 48
    tokens = (lambda y: y) if x.ndim == 3 else lambda y: y.flatten(2).transpose(1, 2)
    whole, plain = (tokens(t) for t in (beside(patcher, lora, 1.0, layer, x), module(x)))
    full = beside(
        patcher,
        lora,
        1.0,
        layer,
        x,
        tokens=image_tokens(patcher, {count: torch.ones(count)}),
    )
    assert torch.allclose(tokens(full), whole, rtol=0, atol=1e-12)
    half = torch.arange(count) < count // 2
    out = tokens(beside(patcher, lora, 1.0, layer, x, tokens=image_tokens(patcher, {count: half})))
    assert torch.equal(out[:, ~half], plain[:, ~half])
    assert torch.allclose(out[:, half], whole[:, half], rtol=0, atol=1e-12)
    by_row = torch.stack([half, ~half, half])  # every row with a mask of its own
    out = tokens(beside(patcher, lora, 1.0, layer, x, tokens=image_tokens(patcher, {count: by_row})))
    assert torch.equal(out[~by_row], plain[~by_row])
    with pytest.raises(ValueError, match="the regions are known for"):
        beside(patcher, lora, 1.0, layer, x, tokens=image_tokens(patcher, {7: torch.ones(7)}))


def test_masked_branches_leave_the_text_and_the_time_alone(patcher):
    block = "input_blocks.1.1.transformer_blocks.0"
    names = (
        f"{block}.attn2.to_k",
        f"{block}.attn2.to_v",
        f"{block}.attn2.to_q",
        f"{block}.attn1.to_k",
        "time_embed.0",
        "input_blocks.1.0.emb_layers.1",
        f"{block}.ff.net.2",
    )
    factors = dict.fromkeys(names, (LoraFactors(torch.ones(1, 1), torch.ones(1, 1), 1.0),))
    assert list(Branch(factors, tokens=image_tokens(patcher, {})).layers()) == [
        names[2],
        names[3],
        names[6],
    ]
    assert list(Branch(factors).layers()) == list(names)


def test_the_hooks_go_even_after_an_error_and_strength_zero_hangs_none(patcher):
    lora = LoraFile("tried", SPELLINGS["kohya"](patcher))
    factors = prepared(network_factors(lora, patcher.model), torch.device("cpu"), torch.float64)
    unet = patcher.model.diffusion_model
    with pytest.raises(RuntimeError, match="cancelled"), low_rank(unet, [Branch(factors)]):
        raise RuntimeError("cancelled")
    assert not any(m._forward_hooks for m in unet.modules())
    with low_rank(unet, [Branch(factors, 0.0)]):
        assert not any(m._forward_hooks for m in unet.modules())


def test_the_text_part_is_an_ordinary_patch_on_a_clone(demo_model):
    from comfyui_concepts.demo.files import LORAS

    _, clip, _ = demo_model
    lora = read_lora(LORAS / "concepts-demo-lion.safetensors")
    assert lora.phrase == "a lion"
    changed, count = with_text_part(clip, lora, 0.5)
    assert count == 12
    assert changed is not clip
    assert not clip.patcher.patches
    assert with_text_part(clip, lora, 0.0) == (clip, 0)


def test_a_concept_knows_its_phrase_and_its_text_encoder(demo_model):
    from comfyui_concepts.demo.files import LORAS
    from comfyui_concepts.host.lora.concept import make_concept

    _, clip, _ = demo_model
    lora = read_lora(LORAS / "concepts-demo-lion.safetensors")
    concept = make_concept(lora, 1.0, clip, "on the left a lion, blue background", "", "")
    plain = clip.encode_from_tokens_scheduled(clip.tokenize("on the left a lion, blue background"))
    assert concept.positive[0][1][keys.PHRASE_POSITIONS] == (4, 5)
    assert not torch.allclose(concept.positive[0][0], plain[0][0])
    with pytest.raises(ValueError, match="is not in the prompt"):
        make_concept(lora, 1.0, clip, "a cat", "a lion", "")


def test_an_ed_lora_prompt_is_encoded_once_for_every_layer(demo_model):
    from comfyui_concepts.host.lora.concept import make_concept

    _, clip, _ = demo_model
    table = clip.cond_stage_model.clip_l.transformer.get_input_embeddings().weight
    words = {s: clip.tokenize(s)["l"][0][1][0] for s in ("cat", "dog")}
    learned = torch.stack([table[words["cat"]], table[words["dog"]]]).float()
    lora = LoraFile("ed", {}, embeddings={"<new_1>": {"l": learned}})
    concept = make_concept(lora, 1.0, clip, "a <new_1>, blue background", "<new_1>", "")
    layers = concept.positive[0][1][keys.LAYER_CONTEXTS]
    assert layers.shape[0] == 2
    for layer, noun in enumerate(("cat", "dog")):
        expected = clip.encode_from_tokens_scheduled(clip.tokenize(f"a {noun}, blue background"))[0][0]
        assert torch.allclose(layers[layer], expected[0], atol=1e-6)


def test_a_learned_word_is_learned_at_every_place_of_the_prompt(demo_model):
    """Concept Conductor's prompts have the concept on the left and on the right."""
    from comfyui_concepts.host.lora.concept import make_concept

    _, clip, _ = demo_model
    table = clip.cond_stage_model.clip_l.transformer.get_input_embeddings().weight
    learned = table[clip.tokenize("cat")["l"][0][1][0]][None].float()
    lora = LoraFile("ed", {}, embeddings={"<new_1>": {"l": learned}})
    concept = make_concept(lora, 1.0, clip, "on the left a <new_1> and on the right a <new_1>", "<new_1>", "")
    expected = clip.encode_from_tokens_scheduled(clip.tokenize("on the left a cat and on the right a cat"))[0][0]
    assert torch.allclose(concept.positive[0][1][keys.LAYER_CONTEXTS][0], expected[0], atol=1e-6)


def test_a_peft_adapter_of_another_kind_is_refused_in_words(tmp_path):
    peft = pytest.importorskip("peft")
    peft.AdaLoraConfig(target_modules=["to_q"], total_step=10).save_pretrained(tmp_path)
    save_file({"base_model.model.x": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="of the kind ADALORA, and only PEFT's plain LoRA, LoHa and LoKr"):
        read_lora(tmp_path)


def test_words_learned_for_different_models_do_not_go_into_one_prompt(demo_model):
    from comfyui_concepts.host.lora.concept import make_concept

    learned = {f"<new_{n}>": {"l": torch.randn(n, 64)} for n in (1, 2)}
    with pytest.raises(ValueError, match="learned for 1 and 2 layers"):
        make_concept(LoraFile("ed", {}, embeddings=learned), 1.0, demo_model[1], "a <new_1> <new_2>", "", "")


@pytest.fixture
def inverted(demo_model, tmp_path, monkeypatch):
    """The demo's text encoder, which finds a textual inversion of two vectors, 'badhand', and one of a single,
    'dot'."""
    _, clip, _ = demo_model
    tokenizer = getattr(clip.tokenizer, clip.tokenizer.clip)
    for name, count in (("badhand", 2), ("dot", 1)):
        save_file({"emb_params": torch.randn(count, tokenizer.embedding_size)}, tmp_path / f"{name}.safetensors")
    monkeypatch.setattr(tokenizer, "embedding_directory", str(tmp_path))
    return clip


@pytest.mark.parametrize(
    ("prompt", "phrase", "positions"),
    [
        ("a embedding:badhand lion", "", (1, 2, 3, 4)),
        ("a embedding:badhand lion", "lion", (4,)),
        ("a embedding:badhand lion", "embedding:badhand lion", (2, 3, 4)),
        ("embedding:dot lion embedding:badhand", "embedding:badhand", (3, 4)),
        ("embedding:dot", "embedding:dot", (1,)),
    ],
)
def test_a_prompt_with_a_textual_inversion_knows_its_phrase(inverted, prompt, phrase, positions):
    from comfyui_concepts.host.lora.concept import make_concept

    concept = make_concept(LoraFile("x", {}), 1.0, inverted, prompt, phrase, "")
    assert concept.positive[0][1][keys.PHRASE_POSITIONS] == positions


def test_a_negative_may_hold_a_textual_inversion_and_is_asked_for_no_phrase(inverted):
    from comfyui_concepts.host.lora.concept import make_concept

    text = "embedding:badhand, blurry"
    concept = make_concept(LoraFile("x", {}), 1.0, inverted, "a lion", "lion", text)
    expected = inverted.encode_from_tokens_scheduled(inverted.tokenize(text))
    assert torch.equal(concept.negative[0][0], expected[0][0])
    assert keys.PHRASE_POSITIONS not in concept.negative[0][1]


def test_a_phrase_that_another_textual_inversion_stands_for_is_refused(inverted):
    from comfyui_concepts.host.lora.concept import make_concept

    with pytest.raises(ValueError, match="'embedding:badhand' is not in the prompt"):
        make_concept(LoraFile("x", {}), 1.0, inverted, "a embedding:dot lion", "embedding:badhand", "")


def test_an_empty_phrase_is_every_word_of_a_prompt_of_several_sections(demo_model):
    from comfyui_concepts.host.text.tokens import encode_with_phrase

    ((_, values),) = encode_with_phrase(demo_model[1], " ".join(["cat"] * 80), "")
    assert values[keys.PHRASE_POSITIONS] == (*range(1, 76), *range(78, 83))
    with pytest.raises(ValueError, match="prompt is empty"):
        encode_with_phrase(demo_model[1], "", "")


def test_objects_are_found_beside_a_textual_inversion(inverted):
    from comfyui_concepts.host.compose.objects import encode_with_objects

    ((_, values),) = encode_with_objects(inverted, "embedding:badhand cat and embedding:dot", ["cat", "embedding:dot"])
    assert values[keys.OBJECT_POSITIONS].objects == ((3,), (5,))
    assert values[keys.OBJECT_POSITIONS].sections == ((1, 6),)


def _learned(clip, *nouns):
    """An ED-LoRA of one layer whose words have the vectors of ordinary ones."""
    table = clip.cond_stage_model.clip_l.transformer.get_input_embeddings().weight
    vectors = {n: table[clip.tokenize(n)["l"][0][1][0]][None].float() for n in nouns}
    return LoraFile("ed", {}, embeddings={f"<{n}>": {"l": vector} for n, vector in vectors.items()})


@pytest.mark.parametrize("prompt", ["a <cat><dog>, blue background", "a<cat> <dog>, blue background"])
def test_learned_words_need_no_blanks_between_them(demo_model, prompt):
    from comfyui_concepts.host.lora.concept import make_concept

    _, clip, _ = demo_model
    concept = make_concept(_learned(clip, "cat", "dog"), 1.0, clip, prompt, "<cat><dog>", "no <dog>")
    for side, text in ((concept.positive, "a cat dog, blue background"), (concept.negative, "no dog")):
        expected = clip.encode_from_tokens_scheduled(clip.tokenize(text))[0][0]
        assert torch.allclose(side[0][1][keys.LAYER_CONTEXTS], expected, atol=1e-6)
    assert concept.positive[0][1][keys.PHRASE_POSITIONS] == (2, 3)


def test_more_learned_words_than_there_are_stand_ins_are_refused(demo_model):
    from comfyui_concepts.host.lora.concept import make_concept

    nouns = ("cat", "dog", "lion", "tiger", "robot", "clock", "tree", "car", "house")
    lora = _learned(demo_model[1], *nouns)
    prompt = " ".join(lora.embeddings)
    with pytest.raises(ValueError, match="9 learned words of the LoRA 'ed', and one prompt can hold 8; use fewer"):
        make_concept(lora, 1.0, demo_model[1], prompt, "", "")
