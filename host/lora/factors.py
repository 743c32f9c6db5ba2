"""A LoRA file as low-rank factors of the UNet's layers, whatever names and form it was written in.

The host's own key maps give the names, widened by the spellings of diffusers and PEFT that the host leaves out. A file
that fits nothing is refused, and so is one with a change that cannot be added to a layer's output.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import comfy.lora
import comfy.lora_convert
import comfy.utils
import comfy.weight_adapter
import torch

from ...methods.lora import LoraFactors, fitted, loha_factors, lokr_factors, lora_factors, shape_of
from ..types import BaseModel, WeightedLayer
from .files import LoraFile

log = logging.getLogger(__name__)

_TEXT = ("lora_te", "lycoris_te", "text_encoder")
_NOT_ADDITIVE = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "reshape_weight": "a reshaped layer",
    "oft_blocks": "OFT",
    "oft_diag": "OFT",
    "a1.weight": "GLoRA",
    "set_weight": "a replaced weight",
    "w_norm": "changed norms",
    "b_norm": "changed norms",
    "diff": "a full difference",
    "diff_b": "changed biases",
}


class _Adapter(Protocol):
    """One layer's change as the host loads it."""

    weights: tuple[Any, ...]  # factors, and their alpha
    calculate_weight: Callable[..., torch.Tensor]


def unet_names(model: BaseModel) -> dict[str, str]:
    """Every name a file may call a layer of the model's UNet by, to the name of its weight."""
    weights = set(model.state_dict())
    names = {n: w for n, w in comfy.lora.model_lora_keys_unet(model, {}).items() if isinstance(w, str)}
    for theirs, ours in comfy.utils.unet_to_diffusers(model.model_config.unet_config).items():
        weight = f"diffusion_model.{ours}"
        if theirs.endswith(".weight") and weight in weights:
            names |= {f"{prefix}{theirs.removesuffix('.weight')}": weight for prefix in ("", "unet.")}
    for weight in weights:
        if weight.startswith("diffusion_model.") and weight.endswith(".weight"):
            bare = weight.removeprefix("diffusion_model.").removesuffix(".weight")
            names |= {f"{prefix}{bare}": weight for prefix in ("", "unet.")}
    return names


def unet_factors(lora: LoraFile, model: BaseModel) -> dict[str, LoraFactors]:
    """The factors of every layer of the model's UNet that the file changes, by the layer's name inside the UNet.

    Raises:
        ValueError: nothing in it fits, a layer has another size, or a change cannot be added to a layer's output.
    """
    tensors = comfy.lora_convert.convert_lora(dict(lora.tensors))
    names = unet_names(model)
    _check_additive(lora.name, tensors, names)
    loaded: dict[str, _Adapter] = comfy.lora.load_lora(tensors, names, log_missing=False)
    if not loaded:
        some = next(iter(tensors), "nothing")
        raise ValueError(
            f"The LoRA '{lora.name}' matched 0 of {len(tensors)} keys: none of its layers has a counterpart in this "
            f"model's UNet (it begins with '{some}'); load the checkpoint it was made for, or another LoRA."
        )
    found: dict[str, LoraFactors] = {}
    for weight, adapter in loaded.items():
        layer = weight.removeprefix("diffusion_model.").removesuffix(".weight")
        found[layer] = _factors_of(lora.name, layer, model.diffusion_model.get_submodule(layer), adapter)
    _log_matches(lora.name, tensors, {name for name, weight in names.items() if weight in loaded})
    return found


def _log_matches(name: str, tensors: Mapping[str, torch.Tensor], layers: set[str]) -> None:
    """Logs how many of the file's UNet keys have a layer in this one. The text encoder's keys are counted elsewhere."""
    unet_keys = [key for key in tensors if not key.startswith(_TEXT)]
    missing = [key for key in unet_keys if not any(stem in layers for stem in _stems(key))]
    level = logging.WARNING if missing else logging.INFO
    log.log(level, "LoRA '%s': matched %d of %d keys", name, len(unet_keys) - len(missing), len(unet_keys))
    if missing:
        others = " and others" * (len(missing) > 1)
        log.warning("LoRA '%s': no layer of this model for '%s'%s", name, missing[0], others)


def _stems(key: str) -> Iterator[str]:
    """What may be the layer's name in a key: everything before one of its dots, or before ``_lora``."""
    yield from (key[:at] for at, letter in enumerate(key) if letter == ".")
    yield key.split("_lora.")[0]


def _check_additive(name: str, tensors: Mapping[str, torch.Tensor], names: Mapping[str, str]) -> None:
    """Refuses a file that changes a layer in another way than by adding to its output."""
    for key in tensors:
        for end, what in _NOT_ADDITIVE.items():
            if (key.endswith(f".{end}") or f".{end}." in key) and key.split(f".{end}")[0] in names:
                raise ValueError(
                    f"The LoRA '{name}' holds {what} ('{key}'), which cannot be added to a layer's output as a concept "
                    "needs it; use a plain LoRA, LoCon, LoHa or LoKr, or load it for the whole picture with Load LoRA."
                )


def _factors_of(name: str, layer: str, module: WeightedLayer, adapter: _Adapter) -> LoraFactors:
    """One adapter of the host as factors that fit the layer.

    Raises:
        ValueError: an adapter of another kind or size.
    """
    shape = tuple(module.weight.shape)
    convert = _CONVERSIONS.get(type(adapter))
    if convert is None or len(shape) not in (2, 4) or getattr(module, "groups", 1) != 1:
        kind = getattr(adapter, "name", type(adapter).__name__)
        raise ValueError(
            f"The LoRA '{name}' changes '{layer}' by {kind}, which cannot be added to a layer's output; use a plain "
            "LoRA."
        )
    factors = fitted(convert(adapter, shape), len(shape))
    out, *inner = shape_of(factors)
    if (out, *inner) != shape:
        raise ValueError(
            f"The LoRA '{name}' was made for another model: it changes {out} × {tuple(inner)} values of '{layer}', "
            f"which has {shape[0]} × {shape[1:]}; load the checkpoint it was made for."
        )
    return factors


def _lora(adapter: _Adapter, shape: tuple[int, ...]) -> LoraFactors:
    up, down, alpha, middle, *_ = adapter.weights
    return lora_factors(up, down, alpha, middle)


def _loha(adapter: _Adapter, shape: tuple[int, ...]) -> LoraFactors:
    """Its factors, or the whole change where they would be larger than it."""
    w1a, w1b, alpha, w2a, w2b, t1, *_ = adapter.weights
    large = w1b.shape[0] * w2b.shape[0] * 2 > min(shape[0], w1b.shape[1])
    if t1 is not None or large or len(shape) != 2:
        return _whole_change(adapter, shape)
    return loha_factors((w1a, w1b), (w2a, w2b), alpha)


def _lokr(adapter: _Adapter, shape: tuple[int, ...]) -> LoraFactors:
    """Its factors, or the whole change where one of the two matrices is not low-rank."""
    w1, w2, alpha, w1a, w1b, w2a, w2b, t2, *_ = adapter.weights
    if w1 is not None or w2 is not None or t2 is not None or len(shape) != 2:
        return _whole_change(adapter, shape)
    return lokr_factors((w1a, w1b), (w2a, w2b), alpha)


def _whole_change(adapter: _Adapter, shape: tuple[int, ...]) -> LoraFactors:
    """The change itself, by the host's own arithmetic."""
    dtype = torch.promote_types(next(t for t in adapter.weights if isinstance(t, torch.Tensor)).dtype, torch.float32)
    delta = adapter.calculate_weight(torch.zeros(shape, dtype=dtype), "", 1.0, 1.0, None, lambda weight: weight, dtype)
    return LoraFactors(delta, None, 1.0)


_CONVERSIONS: dict[type, Callable[[_Adapter, tuple[int, ...]], LoraFactors]] = {
    comfy.weight_adapter.LoRAAdapter: _lora,
    comfy.weight_adapter.LoHaAdapter: _loha,
    comfy.weight_adapter.LoKrAdapter: _lokr,
}
