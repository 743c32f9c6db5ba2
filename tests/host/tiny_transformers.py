"""A tiny random model of every transformer family that the host has, of the host's own classes, with what it is fed.

``names()`` lists the families of this host. ``tiny_transformer(name)`` makes a MODEL, ``shared_transformer(name)`` one
for tests that leave it as they found it. ``conditioning`` and ``noise`` make what such a model is sampled with.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import comfy.model_patcher
import comfy.patcher_extension
import comfy.sampler_helpers
import comfy.samplers
import comfy.supported_models
import torch
from comfyui_concepts.boards.random_transformers import known_to_the_host

CONTEXT = 48
"""Width of the text embedding of every family."""
POOLED = 32

_FLUX = {
    "image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": POOLED, "context_in_dim": CONTEXT,
    "hidden_size": 64, "mlp_ratio": 4.0, "num_heads": 2, "depth": 2, "depth_single_blocks": 2, "axes_dim": [8, 12, 12],
    "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": True, "txt_ids_dims": [],
}  # fmt: skip
_FLUX2 = _FLUX | {
    "image_model": "flux2", "in_channels": 128, "out_channels": 128, "vec_in_dim": None, "mlp_ratio": 3.0,
    "axes_dim": [8, 8, 8, 8], "theta": 2000, "patch_size": 1, "qkv_bias": False, "global_modulation": True,
    "mlp_silu_act": True, "ops_bias": False, "default_ref_method": "index", "ref_index_scale": 10.0,
    "txt_ids_dims": [3],
}  # fmt: skip
_CHROMA = {
    "image_model": "chroma", "in_channels": 64, "out_channels": 64, "context_in_dim": CONTEXT, "hidden_size": 64,
    "mlp_ratio": 4.0, "num_heads": 2, "depth": 2, "depth_single_blocks": 2, "axes_dim": [8, 12, 12], "theta": 10000,
    "patch_size": 2, "qkv_bias": True, "in_dim": 64, "out_dim": 64, "hidden_dim": 32, "n_layers": 1,
    "txt_ids_dims": [], "vec_in_dim": None,
}  # fmt: skip
_SD3 = {
    "in_channels": 16, "patch_size": 2, "out_channels": 16, "depth": 2, "input_size": None, "adm_in_channels": POOLED,
    "context_embedder_config": {
        "target": "torch.nn.Linear", "params": {"in_features": CONTEXT, "out_features": 128}
    },
    "num_patches": 64 * 64, "pos_embed_max_size": 64, "qk_norm": "rms", "pos_embed_scaling_factor": None,
    "x_block_self_attn_layers": [0],
}  # fmt: skip
_QWEN = {
    "image_model": "qwen_image", "in_channels": 64, "num_layers": 2, "attention_head_dim": 32,
    "num_attention_heads": 2, "joint_attention_dim": CONTEXT, "axes_dims_rope": (8, 12, 12),
}  # fmt: skip
_LUMINA2 = {
    "image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 96, "cap_feat_dim": CONTEXT, "n_layers": 2,
    "qk_norm": True, "n_heads": 4, "n_kv_heads": 2, "axes_dims": [8, 8, 8], "axes_lens": [300, 512, 512],
    "rope_theta": 10000.0, "ffn_dim_multiplier": 1.0, "n_refiner_layers": 1,
}  # fmt: skip
_ZIMAGE = _LUMINA2 | {
    "dim": 256, "n_heads": 8, "n_kv_heads": 8, "axes_dims": [8, 12, 12], "axes_lens": [1536, 512, 512],
    "rope_theta": 256.0, "z_image_modulation": True, "time_scale": 1000.0, "pad_tokens_multiple": 32,
}  # fmt: skip
_WAN = {
    "image_model": "wan2.1", "model_type": "t2v", "dim": 64, "out_dim": 16, "num_heads": 2, "ffn_dim": 128,
    "num_layers": 2, "patch_size": (1, 2, 2), "freq_dim": 256, "window_size": (-1, -1), "qk_norm": True,
    "cross_attn_norm": True, "eps": 1e-6, "in_dim": 16, "text_dim": CONTEXT, "text_len": 16,
}  # fmt: skip
_COSMOS = {
    "image_model": "cosmos_predict2", "max_img_h": 240, "max_img_w": 240, "max_frames": 128, "in_channels": 16,
    "out_channels": 16, "patch_spatial": 2, "patch_temporal": 1, "model_channels": 64, "concat_padding_mask": True,
    "crossattn_emb_channels": CONTEXT, "pos_emb_cls": "rope3d", "pos_emb_learnable": True,
    "pos_emb_interpolation": "crop", "min_fps": 1, "max_fps": 30, "use_adaln_lora": True, "adaln_lora_dim": 16,
    "num_blocks": 2, "num_heads": 2, "extra_per_block_abs_pos_emb": False, "rope_h_extrapolation_ratio": 4.0,
    "rope_w_extrapolation_ratio": 4.0, "rope_t_extrapolation_ratio": 1.0, "extra_h_extrapolation_ratio": 1.0,
    "extra_w_extrapolation_ratio": 1.0, "extra_t_extrapolation_ratio": 1.0, "rope_enable_fps_modulation": False,
}  # fmt: skip
_ANIMA = _COSMOS | {"image_model": "anima"}
_KREA2 = {
    "image_model": "krea2", "features": 64, "channels": 16, "patch": 2, "layers": 2, "heads": 2, "kvheads": 1,
    "txtlayers": 3, "txtdim": 16, "txtheads": 2, "txtkvheads": 2, "multiplier": 1, "tdim": 32,
}  # fmt: skip


class Family(NamedTuple):
    """One family: the host's class in ``supported_models``, a small configuration, and the widths of a prompt."""

    base: str
    config: dict[str, Any]
    context: int = CONTEXT
    pooled: int | None = None


FAMILIES: dict[str, Family] = {
    "flux": Family("Flux", _FLUX, pooled=POOLED),
    "flux_schnell": Family("FluxSchnell", _FLUX | {"guidance_embed": False}, pooled=POOLED),
    "flux2": Family("Flux2", _FLUX2),
    "chroma": Family("Chroma", _CHROMA),
    "sd3": Family("SD3", _SD3, pooled=POOLED),
    "qwen": Family("QwenImage", _QWEN),
    "lumina2": Family("Lumina2", _LUMINA2),
    "zimage": Family("ZImage", _ZIMAGE),
    "wan": Family("WAN21_T2V", _WAN),
    "cosmos": Family("CosmosT2IPredict2", _COSMOS),
    "krea2": Family("Krea2", _KREA2),
    "anima": Family("Anima", _ANIMA),
}
"""Every family by name."""
LEFT_OUT = ("anima",)
"""Cosmos with an adapter: tests of all families do without."""
_ADAPTER = dict.fromkeys(("source_dim", "target_dim", "model_dim"), CONTEXT) | {"num_layers": 1, "num_heads": 2}
"""Anima's adapter. The host gives its sizes nowhere else than as defaults, of which 135 M parameters come."""


def names(*, every: bool = False) -> list[str]:
    """The families that this host has. ``every``: also those that are left out."""
    there = [name for name, family in FAMILIES.items() if hasattr(comfy.supported_models, family.base)]
    return [name for name in there if every or name not in LEFT_OUT]


def tiny_transformer(
    name: str,
    dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
    more: dict[str, Any] | None = None,
    cast: torch.dtype | None = None,
) -> comfy.model_patcher.ModelPatcher:
    """A ModelPatcher around a random model of that family. ``more`` changes its configuration.

    ``cast`` is what it computes in, where that is not what it is stored in (fp8).
    """
    family = FAMILIES[name]
    settings = known_to_the_host(family.config) | (more or {})
    with torch.inference_mode(False), torch.no_grad():
        config = getattr(comfy.supported_models, family.base)(dict(settings))
        config.set_inference_dtype(dtype, cast)
        with _small_adapter() if name == "anima" else contextlib.nullcontext():
            model = config.get_model({}, "", device="cpu")
        _fill(model.diffusion_model, seed)
        model.train(False)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


@functools.cache
def shared_transformer(name: str) -> comfy.model_patcher.ModelPatcher:
    """One model of a family for all tests of a process: they clone it and leave its weights as they were."""
    return tiny_transformer(name)


@contextlib.contextmanager
def _small_adapter() -> Iterator[None]:
    anima = importlib.import_module("comfy.ldm.anima.model")  # newer hosts have it
    adapter = anima.LLMAdapter
    anima.LLMAdapter = functools.partial(adapter, **_ADAPTER)
    try:
        yield
    finally:
        anima.LLMAdapter = adapter


def _fill(network: torch.nn.Module, seed: int) -> None:
    """Random weights that let every layer through: norms about 1, gates and biases about 0 and never exactly.

    The host leaves weights uninitialised.
    """
    generator = torch.Generator().manual_seed(seed)
    norms = {id(p) for m in network.modules() if "Norm" in type(m).__name__ for p in m.parameters(recurse=False)}
    for parameter in network.parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim >= 2:
            values *= min(0.3, parameter[0].numel() ** -0.5)
        elif id(parameter) in norms:
            values = 1 + 0.1 * values
        else:
            values *= 0.06
        parameter.copy_(values.to(parameter.dtype))
    for name, buffer in network.named_buffers():
        if name == "pos_embed":
            buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))


def conditioning(name: str, length: int = 10, seed: int = 1, **values: Any) -> list[list[Any]]:
    """A CONDITIONING of that many random text tokens. ``values`` go into its table."""
    family, generator = FAMILIES[name], torch.Generator().manual_seed(seed)
    table: dict[str, Any] = {"pooled_output": None}  # older hosts want the key, whatever its value
    if family.pooled is not None:
        table["pooled_output"] = torch.randn(1, family.pooled, generator=generator)
    if name == "anima":
        table["t5xxl_ids"] = torch.randint(1, 1000, (length,), generator=generator)
        table["t5xxl_weights"] = torch.ones(length)
    return [[torch.randn(1, length, family.context, generator=generator), table | values]]


def noise(
    patcher: comfy.model_patcher.ModelPatcher, height: int = 8, width: int = 6, batch: int = 1, seed: int = 5
) -> torch.Tensor:
    """Noise of that many cells in the model's own latent format: (batch, channels, h, w) or (batch, channels, 1, h, w).

    Cosmos takes only even sizes on older hosts.
    """
    latents = patcher.model.latent_format
    frames = (1,) * (latents.latent_dimensions - 2)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((batch, latents.latent_channels, *frames, height, width), generator=generator)


def predict(
    patcher: comfy.model_patcher.ModelPatcher,
    name: str,
    latent: torch.Tensor,
    *,
    length: int = 10,
    sigma: float = 0.7,
    **values: Any,
) -> torch.Tensor:
    """The clean latent that one call of the host predicts for ``conditioning(name, length, **values)``."""
    inner = patcher.model
    conds = {"positive": comfy.sampler_helpers.convert_cond(conditioning(name, length, **values))}
    conds = comfy.samplers.process_conds(inner, latent, conds, latent.device)
    inner.current_patcher = patcher
    levels = torch.full((latent.shape[0],), sigma)
    return comfy.samplers.calc_cond_batch(inner, [conds["positive"]], latent, levels, patcher.model_options)[0]


def compiled(name):
    """A clone of the shared model as the host's TorchCompileModel leaves it, without the compiler."""
    model = shared_transformer(name).clone()
    model.add_wrapper_with_key("apply_model", "torch.compile", lambda executor, *a, **k: executor(*a, **k))
    return model


def counted(
    model: comfy.model_patcher.ModelPatcher,
) -> tuple[comfy.model_patcher.ModelPatcher, list[int]]:
    """A clone, and the rows of each of its model calls."""
    calls: list[int] = []

    def note(executor: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(len(x))
        return executor(x, *args, **kwargs)

    clone = model.clone()
    clone.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.APPLY_MODEL, "test", note)
    return clone, calls
