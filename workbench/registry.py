"""Where a node and a model file come from, as a template says it, so that the page can offer what is missing.

The page reads three properties of a node: the registry's id of its pack, the pack's version, and links to model files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tomllib

_PROJECT = tomllib.loads((Path(__file__).resolve().parent.parent / "pyproject.toml").read_text())
_CORE = "comfy-core"
_LEAST_HOST = _PROJECT["tool"]["comfy"]["requires-comfyui"].removeprefix(">=")
"""The version that core nodes are said to have: the oldest host the templates run on."""

_HUB = "https://huggingface.co/"
_Z_IMAGE, _QWEN_IMAGE = "Comfy-Org/z_image_turbo", "Comfy-Org/Qwen-Image_ComfyUI"
_FLUX_TEXT, _KREA_2, _ANIMA = "comfyanonymous/flux_text_encoders", "Comfy-Org/Krea-2", "circlestone-labs/Anima"
_KLEIN = "Comfy-Org/flux2-klein"
_PUBLIC = {
    "v1-5-pruned-emaonly-fp16.safetensors": ("checkpoints", "Comfy-Org/stable-diffusion-v1-5-archive", ""),
    "sd_xl_base_1.0.safetensors": ("checkpoints", "stabilityai/stable-diffusion-xl-base-1.0", ""),
    "clip_l.safetensors": ("text_encoders", _FLUX_TEXT, ""),
    "t5xxl_fp16.safetensors": ("text_encoders", _FLUX_TEXT, ""),
    "flux1-dev.safetensors": ("diffusion_models", "Comfy-Org/flux1-dev", ""),
    "z_image_bf16.safetensors": ("diffusion_models", "Comfy-Org/z_image", "split_files/diffusion_models/"),
    "qwen_3_4b.safetensors": ("text_encoders", _Z_IMAGE, "split_files/text_encoders/"),
    "ae.safetensors": ("vae", _Z_IMAGE, "split_files/vae/"),
    "qwen_image_fp8_e4m3fn.safetensors": ("diffusion_models", _QWEN_IMAGE, "split_files/diffusion_models/"),
    "qwen_2.5_vl_7b_fp8_scaled.safetensors": ("text_encoders", _QWEN_IMAGE, "split_files/text_encoders/"),
    "qwen_image_vae.safetensors": ("vae", _QWEN_IMAGE, "split_files/vae/"),
    "flux-2-klein-base-4b.safetensors": ("diffusion_models", _KLEIN, "split_files/diffusion_models/"),
    "flux2-vae.safetensors": ("vae", "Comfy-Org/flux2-dev", "split_files/vae/"),
    "krea2_turbo_fp8_scaled.safetensors": ("diffusion_models", _KREA_2, "diffusion_models/"),
    "qwen3vl_4b_fp8_scaled.safetensors": ("text_encoders", _KREA_2, "text_encoders/"),
    "anima-base-v1.0.safetensors": ("diffusion_models", _ANIMA, "split_files/diffusion_models/"),
    "qwen_3_06b_base.safetensors": ("text_encoders", _ANIMA, "split_files/text_encoders/"),
}
"""By file name: the folder below ``models``, the repository that has it under this very name, and the path there."""


def origin_of(info: dict[str, Any]) -> dict[str, str]:
    """``cnr_id`` and ``ver`` of a class of ``/object_info``: the host's own or one of ours."""
    if info["python_module"].startswith("custom_nodes."):
        return {"cnr_id": _PROJECT["project"]["name"], "ver": _PROJECT["project"]["version"]}
    return core_origin()


def core_origin() -> dict[str, str]:
    """``cnr_id`` and ``ver`` of what comes with the host."""
    return {"cnr_id": _CORE, "ver": _LEAST_HOST}


def models_of(values: list[Any]) -> list[dict[str, str]]:
    """Name, address and folder of each public model file among the values of a node's widgets."""
    found = [(name, *_PUBLIC[name]) for name in values if isinstance(name, str) and name in _PUBLIC]
    return [
        {"name": name, "url": f"{_HUB}{repository}/resolve/main/{path}{name}", "directory": folder}
        for name, folder, repository, path in found
    ]
