"""Transformers of moderate size with random weights: for what they cost, not for what they draw."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, NamedTuple

import comfy.ldm.chroma.model
import comfy.ldm.flux.model
import comfy.model_patcher
import comfy.supported_models
import torch

from ..host.lora.files import LoraFile
from ..host.registry import architecture_of
from .random_models import with_random_weights

RANK = 16


class Transformer(NamedTuple):
    """A family at a size of our choice.

    ``base`` is the host's class in ``supported_models``; ``text`` is what the text encoder makes, (tokens, …) without
    the tokens; ``pooled`` is the width of its pooled embedding.
    """

    base: str
    config: dict[str, Any]
    text: tuple[int, ...]
    pooled: int | None = None


TRANSFORMERS = {
    "flux": Transformer(
        "Flux",
        {
            "image_model": "flux",
            "in_channels": 16,
            "out_channels": 16,
            "vec_in_dim": 768,
            "context_in_dim": 4096,
            "hidden_size": 1536,
            "mlp_ratio": 4.0,
            "num_heads": 12,
            "depth": 2,
            "depth_single_blocks": 4,
            "axes_dim": [16, 56, 56],
            "theta": 10000,
            "patch_size": 2,
            "qkv_bias": True,
            "guidance_embed": True,
            "txt_ids_dims": [],
        },
        (4096,),
        768,
    ),
    "zimage": Transformer(
        "ZImage",
        {
            "image_model": "lumina2",
            "patch_size": 2,
            "in_channels": 16,
            "dim": 1536,
            "cap_feat_dim": 2560,
            "n_layers": 8,
            "n_refiner_layers": 2,
            "qk_norm": True,
            "n_heads": 12,
            "n_kv_heads": 12,
            "axes_dims": [32, 48, 48],
            "axes_lens": [1536, 512, 512],
            "rope_theta": 256.0,
            "ffn_dim_multiplier": 8 / 3,
            "z_image_modulation": True,
            "time_scale": 1000.0,
            "pad_tokens_multiple": 32,
        },
        (2560,),
    ),
    "qwen": Transformer(
        "QwenImage",
        {
            "image_model": "qwen_image",
            "in_channels": 64,
            "num_layers": 4,
            "attention_head_dim": 128,
            "num_attention_heads": 12,
            "joint_attention_dim": 3584,
            "axes_dims_rope": (16, 56, 56),
        },
        (3584,),
    ),
    "krea2": Transformer(
        "Krea2",
        {
            "image_model": "krea2",
            "features": 1536,
            "channels": 16,
            "patch": 2,
            "layers": 10,
            "heads": 12,
            "kvheads": 4,
            "txtlayers": 12,
            "txtdim": 1024,
            "txtheads": 8,
            "txtkvheads": 8,
            "multiplier": 4,
            "tdim": 256,
        },
        (12 * 1024,),
    ),
}
"""0.3 B parameters and more each; Krea 2 needs a newer host."""


def known_to_the_host(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration without what only newer hosts have."""
    parameters = {
        "flux": comfy.ldm.flux.model.FluxParams,
        "flux2": comfy.ldm.flux.model.FluxParams,
        "chroma": comfy.ldm.chroma.model.ChromaParams,
    }.get(config.get("image_model", ""))
    if parameters is None:
        return dict(config)
    known = {"image_model", *(field.name for field in fields(parameters))}
    return {key: value for key, value in config.items() if key in known}


def random_transformer(name: str) -> comfy.model_patcher.ModelPatcher:
    """A ModelPatcher around such a model, in float32 on the CPU.

    Raises:
        ValueError: this host does not have the family.
    """
    kind = TRANSFORMERS[name]
    family = getattr(comfy.supported_models, kind.base, None)
    if family is None:
        raise ValueError(f"This ComfyUI has no model '{kind.base}'; take a newer one (COMFYUI_PATH), or --model flux.")
    return with_random_weights(family(known_to_the_host(kind.config)))


def random_prompt(name: str, tokens: int, seed: int) -> list:
    """A CONDITIONING of that many random tokens."""
    kind, generator = TRANSFORMERS[name], torch.Generator().manual_seed(seed)
    # older hosts want the key, whatever its value
    pooled = None if kind.pooled is None else torch.randn(1, kind.pooled, generator=generator)
    return [[torch.randn(1, tokens, *kind.text, generator=generator), {"pooled_output": pooled}]]


def random_lora(model: Any, seed: int) -> LoraFile:
    """Factors of rank 16 on every linear layer that a trainer would take: those of the blocks that have tokens."""
    architecture, generator, tensors = architecture_of(model), torch.Generator().manual_seed(seed), {}
    attend = [(f"{site.block}.", site.attention.kind) for site in architecture.sites()]
    apart = all(kind != "joint" for _, kind in attend)  # text and picture are never in one sequence
    blocks = tuple({block for block, kind in attend if apart or kind == "joint"})
    for path, module in architecture.network.named_modules():
        if isinstance(module, torch.nn.Linear) and path.startswith(blocks) and architecture.kind(path) != "global":
            out, into = module.weight.shape
            tensors[f"diffusion_model.{path}.lora_A.weight"] = torch.randn(RANK, into, generator=generator) * 0.02
            tensors[f"diffusion_model.{path}.lora_B.weight"] = torch.randn(out, RANK, generator=generator) * 0.02
    return LoraFile(f"random {seed}", tensors)
