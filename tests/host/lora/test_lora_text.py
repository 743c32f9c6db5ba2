"""The text part of a LoRA: every spelling is read, what is not is told, and a file may have nothing else."""

from __future__ import annotations

import json

import pytest
import torch
from comfyui_concepts.host.erase.export import export_lora
from comfyui_concepts.host.lora.concept import make_concept, text_names, with_text_part
from comfyui_concepts.host.lora.export import STYLES
from comfyui_concepts.host.lora.factors import network_factors
from comfyui_concepts.host.lora.files import LoraFile, read_lora
from comfyui_concepts.methods.erase.edit import Edit
from comfyui_concepts.methods.erase.lowrank import LowRank
from safetensors.torch import load_file, save_file

LAYERS = ("0.mlp.fc1", "1.self_attn.q_proj", "1.self_attn.out_proj")
PLAIN, PEFT, TEXT = (
    ("lora_up.weight", "lora_down.weight"),
    ("lora_B.weight", "lora_A.weight"),
    ("lora_linear_layer.up.weight", "lora_linear_layer.down.weight"),
)
SPELLINGS = {
    "kohya": (lambda n: f"lora_te_text_model_encoder_layers_{n.replace('.', '_')}.", PLAIN),
    "diffusers": (lambda n: f"text_encoder.text_model.encoder.layers.{n}.", TEXT),
    "diffusers, as peft": (lambda n: f"text_encoder.text_model.encoder.layers.{n}.", PEFT),
    "transformers 5": (lambda n: f"text_encoder.encoder.layers.{n}.", PEFT),
    "transformers 5, diffusers": (lambda n: f"text_encoder.encoder.layers.{n}.", TEXT),
    "diffusers, old": (
        lambda n: f"text_encoder.text_model.encoder.layers.{n.replace('q_proj', 'to_q').replace('out_proj', 'to_out')}",
        ("_lora.up.weight", "_lora.down.weight"),
    ),
    "diffusers' kohya, transformers 5": (lambda n: f"lora_te1_encoder_layers_{n.replace('.', '_')}.", PLAIN),
    "lycoris": (lambda n: f"lycoris_text_model_encoder_layers_{n.replace('.', '_')}.", PLAIN),
    "peft": (lambda n: f"text_model.encoder.layers.{n}.", PEFT),
    "peft, transformers 5": (lambda n: f"encoder.layers.{n}.", PEFT),
}


def _key(layer):
    return f"clip_l.transformer.text_model.encoder.layers.{layer}.weight"


def _low(clip, layer, seed=1):
    out, width = clip.cond_stage_model.state_dict()[_key(layer)].shape
    g = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(out, 2, generator=g) * 0.1, torch.randn(2, width, generator=g) * 0.1)


def _file(clip, spelling):
    name_of, (up, down) = SPELLINGS[spelling]
    tensors = {}
    for layer in LAYERS:
        factors = _low(clip, layer)
        tensors |= {f"{name_of(layer)}{up}": factors.up, f"{name_of(layer)}{down}": factors.down}
    return tensors


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_a_text_part_is_read(demo_model, spelling, caplog):
    caplog.set_level("INFO")
    clip, tensors = demo_model[1], _file(demo_model[1], spelling)
    changed, count = with_text_part(clip, LoraFile("text", tensors), 1.0)
    assert count == 3
    assert caplog.messages == ["LoRA 'text': matched 6 of 6 keys of the text encoder"]
    for layer in LAYERS:
        ((_, adapter, *_),) = changed.patcher.patches[_key(layer)]
        made = adapter.calculate_weight(torch.zeros_like(_low(clip, layer).matrix()), "", 1.0, 1.0, None, lambda x: x)
        torch.testing.assert_close(made, _low(clip, layer).matrix())


def test_a_file_with_a_text_part_alone_works_on_the_text(demo_model):
    model, clip, _ = demo_model
    lora = LoraFile("text", _file(clip, "transformers 5"))
    assert network_factors(lora, model.model) == {}
    concept = make_concept(lora, 1.0, clip, "a lion", "lion", "")
    plain = make_concept(lora, 0.0, clip, "a lion", "lion", "")
    assert not torch.allclose(concept.positive[0][0], plain.positive[0][0])


def test_a_text_part_for_another_encoder_is_told_or_refused_if_it_is_all(demo_model, caplog):
    clip = demo_model[1]
    pair = {f"text_encoder_2.text_model.encoder.layers.30.mlp.fc1.{end}": torch.ones(2, 2) for end in PEFT}
    with pytest.raises(ValueError, match="'other' changes the text encoder alone, and has no layer of this one"):
        make_concept(LoraFile("other", pair), 1.0, clip, "a lion", "lion", "")
    with_text_part(clip, LoraFile("partly", _file(clip, "kohya") | pair), 1.0)
    assert "LoRA 'partly': matched 6 of 8 keys of the text encoder" in caplog.messages
    assert "LoRA 'partly': 'text_encoder_2" in caplog.text


def test_the_scale_of_a_text_part_stands_in_the_metadata_too(demo_model, tmp_path):
    config = {"text_encoder.r": 2, "text_encoder.lora_alpha": 6, "unet.lora_alpha": 1}
    save_file(
        _file(demo_model[1], "transformers 5"),
        tmp_path / "x.safetensors",
        {"lora_adapter_metadata": json.dumps(config)},
    )
    tensors = read_lora(tmp_path / "x.safetensors").tensors
    assert [float(t) for k, t in tensors.items() if k.endswith(".alpha")] == [6.0] * 3


def test_no_name_of_a_unet_is_taken_for_a_text_encoders(demo_model):
    from comfyui_concepts.host.lora.factors import layer_names
    from comfyui_concepts.methods.lora_file import is_text

    model, clip, _ = demo_model
    assert not any(map(is_text, layer_names(model.model)))
    assert all(map(is_text, text_names(clip.cond_stage_model)))


@pytest.mark.parametrize("naming", STYLES)
def test_diffusers_reads_an_edit_of_the_text_encoder(demo_model, tmp_path, naming):
    """Beside one of the UNet, as a pipeline loads the file."""
    from diffusers.loaders import StableDiffusionLoraLoaderMixin
    from transformers import CLIPTextConfig, CLIPTextModel

    model, clip, _ = demo_model
    state = clip.cond_stage_model.state_dict()
    hidden = len(state[_key("0.self_attn.q_proj")])
    config = CLIPTextConfig(
        vocab_size=64, hidden_size=hidden, intermediate_size=len(state[_key("0.mlp.fc1")]), num_hidden_layers=2,
        num_attention_heads=2,
    )  # fmt: skip
    unet = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    shape = model.model.state_dict()[unet].shape
    layers = {_key(layer): _low(clip, layer) for layer in LAYERS}
    layers[unet] = LowRank(torch.ones(shape[0], 1), torch.ones(1, shape[1]))
    export_lora(model, clip, Edit(layers=layers), tmp_path / "a.safetensors", naming, half=False)
    with torch.inference_mode(False):
        encoder = CLIPTextModel(config)
        tensors = {name: tensor.clone() for name, tensor in load_file(tmp_path / "a.safetensors").items()}
        tensors, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(tensors)
        StableDiffusionLoraLoaderMixin.load_lora_into_text_encoder(tensors, alphas, encoder)
    modules = dict(encoder.named_modules())
    for layer in LAYERS:
        (name,) = (n for n in modules if n.endswith(f"encoder.layers.{layer}"))
        x = torch.randn(3, _low(clip, layer).width, generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            torch.testing.assert_close(
                modules[name](x) - modules[name].base_layer(x), _low(clip, layer)(x), rtol=1e-4, atol=1e-5
            )
    assert network_factors(read_lora(tmp_path / "a.safetensors"), model.model).keys() == {
        unet.removeprefix("diffusion_model.").removesuffix(".weight")
    }
