"""LoRA files that are written are read back whole: by the host's own loader in both namings, and by diffusers."""

import logging

import comfy.lora
import comfy.lora_convert
import comfy.utils
import pytest
import torch
from comfyui_concepts.host.lora_export import DIFFUSERS, KOHYA, lora_tensors, names_of, write_lora
from comfyui_concepts.methods.erase.lowrank import LowRank
from comfyui_concepts.methods.erase.targets import targeted


def _layers(model, rank=2):
    state = model.model.state_dict()
    g = torch.Generator().manual_seed(1)
    return {
        key: LowRank(torch.randn(len(state[key]), rank, generator=g), torch.randn(rank, state[key].shape[1], generator=g))
        for key in targeted(state, ("k", "v"))
    }  # fmt: skip


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
        {key: LowRank(torch.ones(512, 1), torch.ones(1, 128))}, names_of(clip=clip),
        biases={key.replace("weight", "bias"): torch.ones(512)},
    )  # fmt: skip
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


SDXL_SHAPED = {
    "num_res_blocks": [2, 2, 2], "channel_mult": [1, 2, 4], "transformer_depth": [0, 0, 1, 1, 2, 2],
    "transformer_depth_output": [0, 0, 0, 1, 1, 1, 2, 2, 2], "transformer_depth_middle": 2, "context_dim": 24,
    "use_linear_in_transformer": True, "adm_in_channels": 48, "num_classes": "sequential",
}  # fmt: skip
"""The blocks of SDXL under the same numbers, narrow and with fewer transformers in each."""


@pytest.mark.parametrize("style", [KOHYA, DIFFUSERS])
def test_diffusers_reads_every_layer_of_an_sdxl_lora(new_model, style, tmp_path):
    from diffusers import UNet2DConditionModel
    from diffusers.loaders import StableDiffusionXLLoraLoaderMixin
    from safetensors.torch import load_file

    model = new_model(more=SDXL_SHAPED)
    layers = _layers(model)
    assert len(layers) == 2 * (2 * 1 + 2 * 2 + 2 + 3 * 2 + 3 * 1)
    tensors = lora_tensors(layers, names_of(model, None, style), style, torch.float32)
    write_lora(tmp_path / "a.safetensors", tensors, {})
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64, 128), layers_per_block=2, cross_attention_dim=24, norm_num_groups=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=(2, 4, 8),
        transformer_layers_per_block=(1, 1, 2), use_linear_projection=True,
    )  # fmt: skip
    theirs = {
        name.removesuffix(".weight"): f"diffusion_model.{target}"
        for name, target in comfy.utils.unet_to_diffusers(model.model.model_config.unet_config).items()
        if f"diffusion_model.{target}" in layers
    }
    ours = model.model.state_dict()
    for name, key in theirs.items():
        unet.get_submodule(name).weight.data.copy_(ours[key])
    read = StableDiffusionXLLoraLoaderMixin.lora_state_dict(
        load_file(tmp_path / "a.safetensors"), unet_config=unet.config
    )
    with torch.inference_mode(False):
        state = {name: value.clone() for name, value in read[0].items()}
        unet.load_lora_adapter(state, prefix="unet", network_alphas=read[1])
    text = torch.randn(3, 24, generator=torch.Generator().manual_seed(1))
    assert len(theirs) == len(layers)
    for name, key in theirs.items():
        expected = text @ ours[key].T + layers[key](text)
        torch.testing.assert_close(unet.get_submodule(name)(text), expected, rtol=1e-4, atol=1e-4)
