"""Models of full size with random weights: for what they cost, not for what they draw."""

from __future__ import annotations

import math
from typing import Any

import comfy.latent_formats
import comfy.model_base
import comfy.model_patcher
import comfy.supported_models_base
import torch

SD15_UNET: dict[str, Any] = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "transformer_depth_middle": 1,
    "num_heads": 8,
    "num_head_channels": -1,
    "context_dim": 768,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
    "adm_in_channels": None,
    "use_temporal_attention": False,
    "legacy": False,
}
"""The UNet of SD 1.5: 860 M parameters."""


def random_model(unet: dict[str, Any]) -> comfy.model_patcher.ModelPatcher:
    """A ModelPatcher around such a UNet, in float32 on the CPU."""

    class Sized(comfy.supported_models_base.BASE):
        unet_config = unet
        unet_extra_config = {"num_heads": 8, "num_head_channels": -1}
        latent_format = comfy.latent_formats.SD15
        memory_usage_factor = 1.0

    return with_random_weights(Sized(dict(unet)))


def with_random_weights(config: comfy.supported_models_base.BASE) -> comfy.model_patcher.ModelPatcher:
    """A ModelPatcher around a model of this description, in float32 on the CPU."""
    with torch.inference_mode(False), torch.no_grad():
        config.set_inference_dtype(torch.float32, None)
        model = config.get_model({}, "", device="cpu")
        for parameter in model.diffusion_model.parameters():
            parameter.normal_(0, 0.02)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def boxes(count: int, height: int, width: int) -> torch.Tensor:
    """That many boxes side by side, in two rows from five on, over two thirds of the canvas."""
    rows = 1 if count < 5 else 2
    columns = math.ceil(count / rows)
    coverage = torch.zeros(count, height, width)
    for n in range(count):
        row, column = n // columns, n % columns
        top, left = row * height // rows, column * width // columns
        coverage[n, top + height // rows // 6 : top + height // rows * 5 // 6, left : left + width // columns] = 1
    return coverage
