"""Reading LoRA files: damaged ones, half ones, their scale, and adapters that belong to a changed model."""

from __future__ import annotations

import json
import re

import pytest
import torch
from comfyui_concepts.host import keys
from comfyui_concepts.host.lora.concept import make_concept
from comfyui_concepts.host.lora.factors import network_factors
from comfyui_concepts.host.lora.files import LoraFile, read_lora
from comfyui_concepts.methods.lora_file import PAIRS, check_kinds, checked
from safetensors.torch import save_file

from .lora_cases import DIFFUSERS, LINEAR, OUT, beside, into, random_tensor

LAYER = f"diffusion_model.{LINEAR}"
PAIR = {f"{LAYER}.lora_up.weight": torch.ones(32, 2), f"{LAYER}.lora_down.weight": torch.ones(2, 32)}


@pytest.fixture(scope="module")
def patcher(new_model):
    return new_model("EPS", torch.float64, sd15=True)


@pytest.mark.parametrize("kind", ["cut", "page", "pointer", "nothing", "folder"])
def test_what_is_no_safetensors_file_is_refused_by_its_name(tmp_path, kind):
    path = tmp_path / f"{kind}.safetensors"
    save_file(PAIR, path)
    whole = path.read_bytes()
    made = {
        "cut": whole[:-100],
        "page": b"<!DOCTYPE html><html><body>not found</body></html>",
        "pointer": b"version of a pointer\noid sha256:0\nsize 1\n",
        "nothing": b"",
    }
    path.unlink()
    if kind in made:
        path.write_bytes(made[kind])
    else:
        path.mkdir()
    with pytest.raises(ValueError, match=rf"'{kind}\.safetensors' cannot be read .*download it again"):
        read_lora(path)


def test_a_damaged_configuration_of_peft_is_refused_by_its_name(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{")
    save_file({"base_model.model.x.lora_A.weight": torch.ones(1, 1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=f"adapter_config.json of '{tmp_path.name}' cannot be read"):
        read_lora(tmp_path)


HALVES = [(pair.up, pair.down) for pair in PAIRS] + [(pair.down, pair.up) for pair in PAIRS]


@pytest.mark.parametrize(("there", "missing"), HALVES)
def test_half_of_a_pair_is_refused_by_name(there, missing):
    with pytest.raises(ValueError, match=rf"'file' is damaged: it has 'x{re.escape(there)}' and no '.*{missing[1:]}'"):
        checked("file", {f"x{there}": torch.ones(2, 2)})


@pytest.mark.parametrize(("there", "missing"), [("lokr_w1", "lokr_w2"), ("lokr_w2", "lokr_w1"), ("hada_t1", "hada_t2")])
def test_half_of_a_product_is_refused_by_name(there, missing):
    with pytest.raises(ValueError, match=f"'file' is damaged: it has 'x.{there}' and no '{missing}'"):
        checked("file", {f"x.{there}": torch.ones(2, 2)})


def test_ranks_that_do_not_fit_are_refused_before_sampling(patcher):
    """As in PEFT's block-diagonal form."""
    pair = {f"{LAYER}.lora_B.weight": torch.ones(32, 4), f"{LAYER}.lora_A.weight": torch.ones(8, 32)}
    with pytest.raises(ValueError, match=rf"two factors of '{LAYER}' whose ranks do not fit, \(32, 4\) and \(8, 32\)"):
        network_factors(LoraFile("blocks", pair), patcher.model)


@pytest.mark.parametrize("alpha", [{}, {"x.alpha": torch.tensor(1.0)}])
def test_a_layer_of_rank_zero_changes_nothing(patcher, alpha):
    none = {"x.lora_up.weight": torch.zeros(32, 0), "x.lora_down.weight": torch.zeros(0, 32)} | alpha
    assert checked("file", none) == {}
    assert set(checked("file", PAIR | none)) == set(PAIR)


@pytest.mark.parametrize(
    ("end", "shape", "kind"),
    [
        ("dora_scale", (32, 1), "DoRA"),
        ("lora_magnitude_vector", (32,), "DoRA"),
        ("oft_blocks", (4, 8, 8), "OFT"),
        ("oft_blocks", (2, 4, 8, 8), "BOFT"),
        ("a1.weight", (4, 32), "GLoRA"),
        ("lambda_layer", (1, 4), "T-LoRA"),
        ("on_input", (), r"\(IA\)³"),
        ("ia3_l", (32, 1), r"\(IA\)³"),
        ("lora_diag", (4,), "PEFT's KaSA"),
        ("oft_R.weight", (4, 10), "PEFT's OFT"),
        ("vera_lambda_b", (32,), "PEFT's VERA"),
        ("set_weight", (32, 32), "a replaced weight"),
    ],
)
def test_a_kind_that_cannot_be_added_is_refused_by_its_name(end, shape, kind):
    """Wherever it stands, but not in a text encoder: there the host's own patches act."""
    tensors = PAIR | {f"{LAYER}.{end}": torch.ones(shape)}
    with pytest.raises(ValueError, match=f"'tried' holds {kind} .*use a plain LoRA"):
        check_kinds("tried", tensors)
    check_kinds("text", PAIR | {f"lora_te_text_model_encoder_layers_0_mlp_fc1.{end}": torch.ones(shape)})


CONFIGS = {
    "twice": ({"r": 4, "lora_alpha": 8}, 2.0, 2.0),
    "a sixteenth": ({"r": 16, "lora_alpha": 1}, 0.0625, 0.0625),
    "rslora": ({"r": 4, "lora_alpha": 8, "use_rslora": True}, 4.0, 4.0),
    "one layer's own": ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"attn1.to_q": 2}}, 0.5, 2.0),
}


@pytest.mark.parametrize("case", CONFIGS)
@pytest.mark.parametrize("of_pipeline", [True, False])
def test_the_scale_in_the_metadata_of_diffusers_counts(patcher, tmp_path, case, of_pipeline):
    """Saved as a pipeline's LoRA, whose names begin with the part of the pipeline, and as one of a single model."""
    from diffusers.loaders import StableDiffusionLoraLoaderMixin
    from peft import LoraConfig

    settings, *scales = CONFIGS[case]
    rank, config = settings["r"], LoraConfig(target_modules=["to_q"], **settings).to_dict()
    config["target_modules"] = list(config["target_modules"])
    tensors = {}
    for layer in (LINEAR, OUT):
        out, width = patcher.model.diffusion_model.get_submodule(layer).weight.shape
        tensors[f"{DIFFUSERS[layer]}.lora_A.weight"] = torch.ones(rank, width)
        tensors[f"{DIFFUSERS[layer]}.lora_B.weight"] = torch.ones(out, rank)
    path = tmp_path / "x.safetensors"
    if of_pipeline:
        StableDiffusionLoraLoaderMixin.save_lora_weights(
            tmp_path, tensors, weight_name=path.name, unet_lora_adapter_metadata=config
        )
    else:
        save_file(tensors, path, metadata={"lora_adapter_metadata": json.dumps(config)})
    factors = network_factors(read_lora(path), patcher.model)
    assert [factors[layer][0].scale for layer in (LINEAR, OUT)] == pytest.approx(scales)


def _saved(folder, **settings):
    """A folder as PEFT writes it, with these settings."""
    pair = {"base_model.model.x.lora_A.weight": torch.ones(2, 2), "base_model.model.x.lora_B.weight": torch.ones(2, 2)}
    save_file(pair, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2} | settings
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "of tomorrow"])
def test_an_adapter_whose_start_changed_the_model_is_refused_with_the_way_to_convert_it(tmp_path, start):
    with pytest.raises(ValueError, match=f"init_lora_weights='{start}', .*path_initial_model_for_weight_conversion"):
        read_lora(_saved(tmp_path, init_lora_weights=start))


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_an_adapter_whose_start_left_the_model_is_read(tmp_path, start):
    assert read_lora(_saved(tmp_path, init_lora_weights=start)).tensors["x.alpha"] == 2


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"use_qalora": True}, "QA-LoRA"),
        ({"use_bdlora": {"nblocks": 2}}, "BD-LoRA"),
        ({"kasa_config": {"beta": 1e-4}}, "KaSA"),
        ({"alora_invocation_tokens": [1, 2]}, "aLoRA"),
        ({"monteclora_config": {}, "arrow_config": {"top_k": 1}}, "Arrow"),
    ],
)
def test_a_variant_of_pefts_lora_is_refused_by_its_name(tmp_path, settings, name):
    with pytest.raises(ValueError, match=f"of the kind LORA with {name}"):
        read_lora(_saved(tmp_path, **settings))


def test_metadata_of_diffusers_can_refuse_too(tmp_path):
    metadata = {
        "lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 2, "unet.init_lora_weights": "olora"})
    }
    save_file(PAIR, tmp_path / "x.safetensors", metadata=metadata)
    with pytest.raises(ValueError, match="'x' was trained with init_lora_weights='olora'"):
        read_lora(tmp_path / "x.safetensors")


def test_a_peft_file_without_its_configuration_says_what_is_missing(patcher):
    for names in (("lora_A.weight", "lora_B.weight"), ("lokr_w1", "lokr_w2")):
        tensors = {f"base_model.model.{DIFFUSERS[LINEAR]}.{name}": random_tensor(8, 8) for name in names}
        with pytest.raises(ValueError, match=r"'bare' is a PEFT adapter without its adapter_config\.json"):
            network_factors(LoraFile("bare", tensors), patcher.model)


@pytest.mark.parametrize("prompt", ["a {} on the left, a {} on the right", "({}:1.3), a dog"])
@pytest.mark.parametrize("last", ["string_to_param.*", "clip_l", "emb_params"])
def test_words_that_a_file_bundles_are_what_the_hosts_embeddings_are(demo_model, tmp_path, monkeypatch, prompt, last):
    """By themselves in prompt, negative and phrase; the host wants a file and ``embedding:`` for the same."""
    clip, vectors = demo_model[1], torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    save_file({"emb_params": vectors}, tmp_path / "theirs.safetensors")
    monkeypatch.setattr(clip.tokenizer.clip_l, "embedding_directory", str(tmp_path))
    save_file(PAIR | {f"bundle_emb.ohwx v2.{last}": vectors}, tmp_path / "x.safetensors")
    lora, text = read_lora(tmp_path / "x.safetensors"), prompt.format("ohwx v2", "ohwx v2")
    assert set(lora.tensors) == set(PAIR)
    concept = make_concept(lora, 0.0, clip, text, "ohwx v2", text)
    theirs = clip.encode_from_tokens_scheduled(clip.tokenize(prompt.format(*["embedding:theirs"] * 2)))
    for ours in (concept.positive, concept.negative):
        assert keys.LAYER_CONTEXTS not in ours[0][1]
        torch.testing.assert_close(ours[0][0], theirs[0][0], rtol=0, atol=1e-6)
    assert len(concept.positive[0][1][keys.PHRASE_POSITIONS]) == 3


def test_a_longer_word_and_the_hosts_own_embedding_are_left_to_the_host(demo_model):
    clip, text = demo_model[1], "a ohwx v20, embedding:ohwx v2"
    lora = LoraFile("x", {}, bundled={"ohwx v2": {"": torch.ones(3, 64)}})
    plain = clip.encode_from_tokens_scheduled(clip.tokenize(text))
    assert torch.equal(make_concept(lora, 0.0, clip, text, "", "").positive[0][0], plain[0][0])


def test_biases_of_pefts_second_factor_are_added_with_its_scale(new_model, patcher, tmp_path):
    from peft import LoraConfig, get_peft_model

    own = new_model("EPS", torch.float64, sd15=True)
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["to_out.0"], init_lora_weights=False, lora_bias=True)
    with torch.inference_mode(False):
        get_peft_model(own.model.diffusion_model, config).save_pretrained(tmp_path)
    x, lora = into(patcher, OUT), read_lora(tmp_path)
    expected = own.model.diffusion_model.get_submodule(OUT)(x)
    assert network_factors(lora, patcher.model)[OUT][0].bias.abs().max() > 0.01
    torch.testing.assert_close(beside(patcher, lora, 1.0, OUT, x), expected, atol=1e-6, rtol=0)
