"""The sizes of the demo models' networks, shared by their loader and their trainers."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch


class Latents(NamedTuple):
    """The size of a demo model's latents."""

    channels: int
    factor: int
    """px per latent cell."""


LATENTS = {"unet": Latents(4, 8), "dit": Latents(4, 4)}
"""By the kind of demo model."""

UNET: dict[str, Any] = {
    "image_size": 16,
    "in_channels": LATENTS["unet"].channels,
    "out_channels": LATENTS["unet"].channels,
    "model_channels": 64,
    "num_res_blocks": [1, 1, 1],
    "channel_mult": [1, 2, 3],
    "transformer_depth": [1, 1, 0],
    "transformer_depth_output": [1, 1, 1, 1, 0, 0],
    "transformer_depth_middle": 1,
    "num_head_channels": 32,
    "num_heads": -1,
    "context_dim": 128,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
    "adm_in_channels": None,
    "use_temporal_attention": False,
    "legacy": False,
}
"""The host's UNetModel, SD 1.x family: 8.8 M parameters."""

TEXT: dict[str, Any] = {
    "architectures": ["CLIPTextModel"],
    "vocab_size": 49408,
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "eos_token_id": 49407,
    "bos_token_id": 49406,
    "pad_token_id": 49407,
    "layer_norm_eps": 1e-05,
    "model_type": "clip_text_model",
    "projection_dim": 128,
    "torch_dtype": "float32",
    "attention_dropout": 0.0,
}
"""The host's CLIPTextModel with the stock BPE tokenizer."""

TOKEN_SEED = 20240917
TOKEN_STD = 0.5


def untrained_rows() -> torch.Tensor:
    """The token table before any training, (49408, 128): rows of words that training never used keep these values."""
    generator = torch.Generator().manual_seed(TOKEN_SEED)
    return torch.randn((TEXT["vocab_size"], TEXT["hidden_size"]), generator=generator) * TOKEN_STD


SCHEDULE: dict[str, Any] = {"linear_start": 0.00085, "linear_end": 0.012, "timesteps": 1000, "beta_schedule": "linear"}
"""The SD 1 schedule; ``linear`` in the host's words is linear in the square root of beta. Prediction is v."""

TEXT_ROWS = 32
"""Rows of the text encoder that the transformer reads: the longest caption of three objects has 29."""

DIT: dict[str, Any] = {
    "image_model": "lumina2",
    "patch_size": 4,
    "in_channels": LATENTS["dit"].channels,
    "dim": 192,
    "n_layers": 6,
    "n_refiner_layers": 1,
    "n_heads": 6,
    "n_kv_heads": 6,
    "axes_dims": [8, 12, 12],
    "axes_lens": [512, 64, 64],
    "rope_theta": 256.0,
    "ffn_dim_multiplier": 8 / 3,
    "multiple_of": 32,
    "norm_eps": 1e-5,
    "qk_norm": True,
    "cap_feat_dim": TEXT["hidden_size"],
    "time_scale": 1000.0,
    "pad_tokens_multiple": TEXT_ROWS,
}
"""The host's NextDiT in Z-Image's form (padding tokens, q and k norm): 4.7 M parameters. Z-Image's own modulation needs
a width of 256, so this has Lumina 2's."""

FLOW: dict[str, Any] = {"multiplier": 1.0, "shift": 4.0}
"""Flow matching: the sigma is the share of noise, and the model's prediction is noise minus picture."""

UNUSED = ("norm_final.weight",)
"""What ComfyUI 0.3.75 has in a NextDiT and never reads, and 0.33 has no longer; not part of the weights."""
