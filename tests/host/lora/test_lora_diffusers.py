"""Exported LoRAs in diffusers: read by its own converters, they give the keys and values that the edit gives here
(A15)."""

from __future__ import annotations

import comfy.utils
import pytest
import torch
from comfyui_concepts.host.erase import export as erase_export
from comfyui_concepts.host.erase import weights as erase_weights
from comfyui_concepts.host.lora.adapters import shapes_of, unet_layers
from comfyui_concepts.host.lora.export import DIFFUSERS, KOHYA, STYLES
from comfyui_concepts.methods.erase.edit import Edit
from comfyui_concepts.methods.erase.lowrank import LowRank
from diffusers import UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin, StableDiffusionXLLoraLoaderMixin
from safetensors.torch import load_file

XL = {
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 4],
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "transformer_depth_middle": 10,
    "use_linear_in_transformer": True,
    "adm_in_channels": 10,
    "num_classes": "sequential",
}
"""The blocks of SDXL under the same numbers and as deep, with 32 channels instead of 320; 6 of 10 values are the pooled
ones."""


def _low(out: int, width: int, rank: int, seed: int) -> LowRank:
    g = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(out, rank, generator=g) * 0.1, torch.randn(rank, width, generator=g) * 0.1)


def _xl_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64, 128),
        layers_per_block=2,
        cross_attention_dim=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4, 8),
        transformer_layers_per_block=(1, 2, 10),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=2,
        projection_class_embeddings_input_dim=10,
    )


def _demo_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(64, 128, 192),
        layers_per_block=1,
        cross_attention_dim=128,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=(2, 4, 6),
    )


def _filled(unet: UNet2DConditionModel, model, keys) -> dict[str, str]:
    """Puts the host's weights into diffusers' model; its names of these layers, with the host's keys."""
    layers, ours, theirs = {}, model.model.state_dict(), dict(unet.named_modules())
    for name, target in comfy.utils.unet_to_diffusers(model.model.model_config.unet_config).items():
        key, name = f"diffusion_model.{target}", name.removesuffix(".weight")
        if (
            key in keys and name in theirs
        ):  # the host has two names for the pooled embedding's layer, for two kinds of model
            layers[name] = key
            theirs[name].weight.data.copy_(ours[key])
    return layers


def _loaded(unet: UNet2DConditionModel, loader, path) -> None:
    """As a pipeline of diffusers loads a LoRA file."""
    with torch.inference_mode(False):
        state = {name: tensor.clone() for name, tensor in load_file(path).items()}
        state, alphas = loader.lora_state_dict(state, unet_config=unet.config)
        loader.load_lora_into_unet(state, network_alphas=alphas, unet=unet)


def _check(unet: UNet2DConditionModel, model, edit: Edit, layers: dict[str, str]) -> None:
    wanted = erase_export.layers_of(model, edit)
    assert set(layers.values()) == set(wanted)
    for name, key in layers.items():
        weight = model.model.state_dict()[key]
        x = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(1))
        layer = unet.get_submodule(name)
        plain = layer.base_layer(x)
        expected = plain + wanted[key](x)
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
        assert (expected - plain).norm() > 1e-3 * plain.norm()


@pytest.mark.parametrize("naming", STYLES)
def test_diffusers_makes_the_same_keys_and_values_of_an_sd1_lora(demo_model, tmp_path, naming):
    model, unet, edit = demo_model[0], _demo_unet(), Edit(_low(128, 128, 2, 2))
    erase_export.export_lora(model, None, edit, tmp_path / "a.safetensors", naming, half=False)
    layers = _filled(unet, model, erase_export.layers_of(model, edit))
    _loaded(unet, StableDiffusionLoraLoaderMixin, tmp_path / "a.safetensors")
    _check(unet, model, edit, layers)


@pytest.mark.parametrize("naming", STYLES)
def test_diffusers_reads_a_trained_edit_in_every_layer(demo_model, tmp_path, naming):
    """Self-attention, cross-attention and feed-forward, as 'all' trains them."""
    model, unet = demo_model[0], _demo_unet()
    shapes = shapes_of(unet_layers(model.model, "all"))
    edit = Edit(layers={k: _low(*shape, 2, n) for n, (k, shape) in enumerate(shapes.items())})
    erase_export.export_lora(model, None, edit, tmp_path / "a.safetensors", naming, half=False)
    layers = _filled(unet, model, edit.layers)
    assert len(layers) == len(shapes) > 60
    _loaded(unet, StableDiffusionLoraLoaderMixin, tmp_path / "a.safetensors")
    _check(unet, model, edit, layers)


@pytest.mark.parametrize("naming", STYLES)
def test_diffusers_makes_the_same_keys_and_values_of_an_sdxl_lora(new_model, tmp_path, naming):
    """All 140 projections, and the layer of the pooled embedding."""
    model, unet = new_model(more=XL), _xl_unet()
    edit = Edit(_low(32, 32, 2, 2), pooled=_low(6, 6, 1, 3))
    assert len(erase_weights.text_keys(model, ("k", "v"))) == 140
    erase_export.export_lora(model, None, edit, tmp_path / "a.safetensors", naming, half=False)
    layers = _filled(unet, model, erase_export.layers_of(model, edit))
    assert len(layers) == 141
    _loaded(unet, StableDiffusionXLLoraLoaderMixin, tmp_path / "a.safetensors")
    _check(unet, model, edit, layers)


@pytest.mark.parametrize(
    ("naming", "name"), [(KOHYA, "lora_unet_input_blocks_4_1_"), (DIFFUSERS, "unet.down_blocks.1.attentions.0.")]
)
def test_an_sdxl_lora_names_its_blocks_as_trainers_do(new_model, tmp_path, naming, name):
    model = new_model(more=XL)
    erase_export.export_lora(model, None, Edit(_low(32, 32, 2, 2)), tmp_path / "a.safetensors", naming)
    assert any(key.startswith(name) for key in load_file(tmp_path / "a.safetensors"))
