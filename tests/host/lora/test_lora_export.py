"""LoRA files that are written are read back whole: by the host's own loader in both namings, and by diffusers."""

import logging

import comfy.lora
import comfy.lora_convert
import pytest
import torch
from comfyui_concepts.host.lora.export import DIFFUSERS, KOHYA, lora_tensors, names_of, write_lora
from comfyui_concepts.methods.erase.lowrank import LowRank
from comfyui_concepts.methods.erase.targets import targeted_keys


def _layers(model, rank=2):
    state = model.model.state_dict()
    g = torch.Generator().manual_seed(1)
    return {
        key: LowRank(
            torch.randn(len(state[key]), rank, generator=g), torch.randn(rank, state[key].shape[1], generator=g)
        )
        for key in targeted_keys(state, ("k", "v"))
    }


@pytest.mark.parametrize("style", [KOHYA, DIFFUSERS])
def test_the_host_reads_every_tensor_back(new_model, style, tmp_path, caplog):
    model = new_model(sd15=True)
    layers = _layers(model)
    assert len(layers) == 32
    write_lora(tmp_path / "a.safetensors", lora_tensors(layers, names_of(model, None, style), style, torch.float32), {})
    from safetensors.torch import load_file

    with caplog.at_level(logging.WARNING):
        state = comfy.lora_convert.convert_lora(load_file(tmp_path / "a.safetensors"))
        patches = comfy.lora.load_lora(state, comfy.lora.model_lora_keys_unet(model.model, {}))
    assert not caplog.records  # "lora key not loaded" would be one
    assert patches.keys() == layers.keys()
    for key, adapter in patches.items():
        made = adapter.calculate_weight(torch.zeros(layers[key].matrix().shape), key, 1.0, 1.0, None, lambda x: x)
        torch.testing.assert_close(made, layers[key].matrix(), rtol=1e-5, atol=1e-5)


def test_text_encoder_layers_and_biases_have_names(demo_model):
    _, clip, _ = demo_model
    key = "clip_l.transformer.text_model.encoder.layers.1.mlp.fc1.weight"
    tensors = lora_tensors(
        {key: LowRank(torch.ones(512, 1), torch.ones(1, 128))},
        names_of(clip=clip),
        biases={key.replace("weight", "bias"): torch.ones(512)},
    )
    patches = comfy.lora.load_lora(tensors, comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {}))
    assert set(patches) == {key, key.replace("weight", "bias")}
    assert names_of(clip=clip, style=DIFFUSERS)[key] == "text_encoder.text_model.encoder.layers.1.mlp.fc1"


def test_what_has_no_name_is_refused(new_model, demo_model):
    with pytest.raises(ValueError, match=r"no naming 'webui'.*kohya, diffusers"):
        names_of(new_model(), style="webui")
    with pytest.raises(ValueError, match=r"has no name.*Save Edit"):
        lora_tensors(
            {"diffusion_model.other.weight": LowRank(torch.ones(1, 1), torch.ones(1, 1))}, names_of(new_model())
        )
    with pytest.raises(ValueError, match=r"cannot be stored in a diffusers LoRA"):
        lora_tensors({}, {}, DIFFUSERS, biases={"x.bias": torch.ones(1)})
