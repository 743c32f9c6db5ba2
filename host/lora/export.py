"""Writing LoRA files for the host's loader and other programs: the names, and the tensors under them.

The names come from the host's own key maps, inverted, so the host's loader finds them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import comfy.lora
import torch

from ...methods.choices import check_choice
from ...methods.erase.edit_file import write_tensors
from ...methods.erase.lowrank import LowRank, balanced_factors
from ..types import CLIP, ModelPatcher

KOHYA, DIFFUSERS = "kohya", "diffusers"
STYLES = (KOHYA, DIFFUSERS)


def names_of(model: ModelPatcher | None = None, clip: CLIP | None = None, style: str = KOHYA) -> dict[str, str]:
    """The host's weight key to the name of its layer in a LoRA file.

    Args:
        model, clip: the host's MODEL and CLIP; either may be None.
        style: ``kohya`` (also what trainers and web UIs write) or ``diffusers`` (its own names, which peft reads too).

    Raises:
        ValueError: an unknown style.
    """
    check_choice(STYLES, style, "naming")
    names: dict[str, str] = {}
    if model is not None:
        names |= _inverted(
            comfy.lora.model_lora_keys_unet(model.model, {}), lambda n, k: _rank_unet(n, k, model, style)
        )
    if clip is not None:
        keys = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {})
        two = any(name.startswith("lora_te2_") for name in keys)
        names |= _inverted(keys, lambda n, _: _rank_text(n, two, style))
    return names


def _inverted(keys: Mapping[str, object], rank_of: Callable[[str, str], int | None]) -> dict[str, str]:
    """Weight key to the name of lowest rank. Names whose rank is None are of another style."""
    best: dict[str, tuple[int, str]] = {}
    for name, target in keys.items():
        rank = rank_of(name, target) if isinstance(target, str) else None
        if rank is not None and isinstance(target, str):
            best[target] = min(best.get(target, (rank, name)), (rank, name))
    return {target: name for target, (_, name) in best.items()}


def _rank_unet(name: str, key: str, model: ModelPatcher, style: str) -> int | None:
    """SD 1 and 2 LoRAs name blocks as diffusers does, SDXL ones as the original code."""
    if style == DIFFUSERS:
        return 0 if name.startswith("unet.") else 1 if name.startswith("transformer.") else None
    if not name.startswith("lora_unet_"):
        return None
    xl = (getattr(model.model.model_config, "unet_config", None) or {}).get("adm_in_channels") is not None
    original = name == "lora_unet_" + key[len("diffusion_model.") : -len(".weight")].replace(".", "_")
    return 0 if original == xl else 1


def _rank_text(name: str, two_encoders: bool, style: str) -> int | None:
    if style == DIFFUSERS:
        return 0 if name.startswith(("text_encoder.", "text_encoder_2.")) else None
    if name.startswith(("lora_te1_", "lora_te2_", "lora_te3_")):
        return 0 if two_encoders else 1
    return (1 if two_encoders else 0) if name.startswith("lora_te_") else None


def lora_tensors(
    layers: Mapping[str, LowRank],
    names: Mapping[str, str],
    style: str = KOHYA,
    dtype: torch.dtype = torch.float16,
    biases: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """The tensors of a LoRA file.

    Args:
        layers: ΔW by the host's weight key; the scale of a LoRA (alpha / rank) is 1.
        biases: differences by the host's key, for what a LoRA has no factors for; only ``kohya`` files can hold them.

    Raises:
        ValueError: a weight has no name in this style.
    """
    tensors: dict[str, torch.Tensor] = {}
    for key, matrix in layers.items():
        name = _name(names, key)
        ends = _endings(name, style)
        for end, factor in zip(ends, balanced_factors(matrix), strict=True):
            tensors[name + end] = factor.to(dtype).contiguous()
        if style == KOHYA:
            tensors[f"{name}.alpha"] = torch.tensor(float(matrix.rank)).to(dtype)
    return tensors | {_bias_name(names, key, style): d.to(dtype).contiguous() for key, d in (biases or {}).items()}


def _bias_name(names: Mapping[str, str], key: str, style: str) -> str:
    if style != KOHYA or not key.endswith(".bias"):
        raise ValueError(f"'{key}' cannot be stored in a {style} LoRA; save it as an edit instead.")
    return f"{_name(names, key.removesuffix('.bias') + '.weight')}.diff_b"


_KOHYA = (".lora_up.weight", ".lora_down.weight")
_UNET = (".lora.up.weight", ".lora.down.weight")
_TO_OUT = ("_lora.up.weight", "_lora.down.weight")  # the layer whose newer name in diffusers has a further part, ".0"
_PEFT = (".lora_B.weight", ".lora_A.weight")
_TEXT = (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight")
# Older names of diffusers (".processor.to_k", ".lora.up") are read by the host too. diffusers converts them to peft's,
# unless the file begins with one of peft's. Of a text encoder it reads no ".lora.up" (0.42.1).


def _endings(name: str, style: str) -> tuple[str, str]:
    """How the names of a layer's two factors end."""
    if style == KOHYA:
        return _KOHYA
    if name.startswith("text_encoder"):
        return _TEXT
    if name.startswith("transformer."):
        return _PEFT
    return _TO_OUT if name.endswith(".to_out") else _UNET


def _name(names: Mapping[str, str], key: str) -> str:
    if key not in names:
        raise ValueError(
            f"The weight '{key}' has no name in this style of LoRA; try the other naming, or Save Edit, which holds "
            "all."
        )
    return names[key]


def write_lora(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a LoRA file; equal contents are equal bytes."""
    write_tensors(tensors, path, metadata)
