"""A LoRA file as low-rank factors of the UNet's layers, whatever names and form it was written in.

The host's own key maps give the names, widened by the spellings of diffusers and PEFT that the host leaves out. A file
that fits nothing is refused, and so is one with a change that cannot be added to a layer's output.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

import comfy.lora
import comfy.utils
import comfy.weight_adapter
import torch

from ...methods.lora import (
    LoraFactors,
    fitted,
    kronecker,
    loha_factors,
    lokr_factors,
    lora_factors,
    rebuilt,
    shape_of,
    unchanged,
    whole_change,
)
from ..types import BaseModel, WeightedLayer
from .files import LoraFile

log = logging.getLogger(__name__)

_BIAS = r"(.+?)(?:\.lora_B|\.lora_B\.default|\.lora_up|\.lora\.up|_lora\.up)\.bias"
"""A bias of the second factor, after the name of its layer. It is scaled as the factors are."""


_MODEL = "diffusion_model."


class _Adapter(Protocol):
    """One layer's change as the host loads it."""

    weights: tuple[Any, ...]  # factors, and their alpha


@dataclass
class _Change:
    """What a file changes of one layer: the weight as the host loads it, and the bias."""

    weight: _Adapter | tuple[Any, ...] | None = None
    bias: torch.Tensor | None = None
    scaled_bias: torch.Tensor | None = None
    """Of the second factor: it has the factors' scale."""

    def whole_bias(self, scale: float) -> torch.Tensor | None:
        """The change of the bias beside factors of this scale."""
        if self.bias is None and self.scaled_bias is None:
            return None
        own, scaled = (0.0 if b is None else b.to(wide(b.dtype)) for b in (self.bias, self.scaled_bias))
        return torch.as_tensor(own + scaled * scale)


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
    if lora.text_alone:
        log.info("LoRA '%s' changes the text encoder alone", lora.name)
        return {}
    tensors = lora.unet_part()
    changes = _changes(tensors, unet_names(model))
    if not changes:
        some = next(iter(tensors), "nothing")
        raise ValueError(
            f"The LoRA '{lora.name}' matched 0 of {len(tensors)} keys: none of its layers has a counterpart in this "
            f"model's UNet (it begins with '{some}'); load the checkpoint it was made for, or another LoRA."
        )
    tensors.log(lora.name, "UNet")
    modules = dict(model.diffusion_model.named_modules())
    return {layer: _factors_of(lora.name, layer, modules[layer], change) for layer, change in changes.items()}


def _changes(tensors: dict[str, torch.Tensor], names: Mapping[str, str]) -> dict[str, _Change]:
    """What the file changes of each layer, by the layer's name inside the UNet."""
    changes: dict[str, _Change] = {}
    for target, loaded in comfy.lora.load_lora(tensors, dict(names), log_missing=False).items():
        layer, _, part = target.removeprefix(_MODEL).rpartition(".")
        change = changes.setdefault(layer, _Change())
        if part == "weight":
            change.weight = loaded
        elif part == "bias":
            change.bias = loaded[1][0]
    for key in list(tensors):
        found = re.fullmatch(_BIAS, key)
        if found and found[1] in names:
            layer = names[found[1]].removeprefix(_MODEL).removesuffix(".weight")
            changes.setdefault(layer, _Change()).scaled_bias = tensors[key]
    return changes


def _factors_of(name: str, layer: str, module: WeightedLayer, change: _Change) -> LoraFactors:
    """The change of one layer as factors that fit it.

    Raises:
        ValueError: a change of another kind or size.
    """
    shape = tuple(module.weight.shape)
    factors = fitted(_converted(name, layer, module, change.weight), shape)
    bias, found = change.whole_bias(factors.scale), shape_of(factors)
    if bias is not None and bias.shape != shape[:1]:
        found = tuple(bias.shape)
    if found != shape:
        out, *inner = found
        raise ValueError(
            f"The LoRA '{name}' was made for another model: it changes {out} × {tuple(inner)} values of '{layer}', "
            f"which has {shape[0]} × {shape[1:]}; load the checkpoint it was made for."
        )
    return factors._replace(bias=bias)


def _converted(name: str, layer: str, module: WeightedLayer, change: _Adapter | tuple[Any, ...] | None) -> LoraFactors:
    """One change of a weight as the host loads it, as factors.

    Raises:
        ValueError: a change of a kind that cannot be added.
    """
    shape, norm = tuple(module.weight.shape), isinstance(module, (torch.nn.LayerNorm, torch.nn.GroupNorm))
    if change is None:
        return unchanged(shape)
    if isinstance(change, tuple) and change[0] == "diff" and (norm or len(shape) in (2, 4)):
        return LoraFactors(change[1][0], None, 1.0)
    convert = _CONVERSIONS.get(type(change))
    if convert is None or len(shape) not in (2, 4) or getattr(module, "groups", 1) != 1:
        kind = change[0] if isinstance(change, tuple) else getattr(change, "name", type(change).__name__)
        raise ValueError(
            f"The LoRA '{name}' changes '{layer}' by {kind}, which cannot be added to a layer's output; use a plain "
            "LoRA."
        )
    return convert(cast(_Adapter, change), shape)


def _lora(adapter: _Adapter, shape: tuple[int, ...]) -> LoraFactors:
    up, down, alpha, middle, *_ = adapter.weights if adapter.weights[3] is None else _widened(adapter)
    return lora_factors(up, down, alpha, middle)


def _loha(adapter: _Adapter, shape: tuple[int, ...]) -> LoraFactors:
    """Its factors, or the whole change where they would be larger than it."""
    w1a, w1b, alpha, w2a, w2b, t1, t2, *_ = _widened(adapter)
    large = w1b.shape[0] * w2b.shape[0] * 2 > min(shape[0], w1b.shape[1])
    if t1 is not None or large or len(shape) != 2:
        return whole_change(rebuilt(w1a, w1b, t1) * rebuilt(w2a, w2b, t2), alpha, w1b.shape[0])
    return loha_factors((w1a, w1b), (w2a, w2b), alpha)


def _lokr(adapter: _Adapter, shape: tuple[int, ...]) -> LoraFactors:
    """Its factors, or the whole change where one of the two matrices is not low-rank."""
    w1, w2, alpha, w1a, w1b, w2a, w2b, t2, *_ = _widened(adapter)
    if w1 is None and w2 is None and t2 is None and len(shape) == 2:
        return lokr_factors((w1a, w1b), (w2a, w2b), alpha)
    rank = None if w1 is not None and w2 is not None else len(w1b if w2 is not None else w2b)
    first, second = (rebuilt(w1a, w1b) if w1 is None else w1), (rebuilt(w2a, w2b, t2) if w2 is None else w2)
    return whole_change(kronecker(first, second), alpha, rank)


def _widened(adapter: _Adapter) -> tuple[Any, ...]:
    """Its factors in at least 32 bits: torch does not multiply numbers of 8."""
    return tuple(t.to(wide(t.dtype)) if isinstance(t, torch.Tensor) else t for t in adapter.weights)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in with tensors of this one."""
    return torch.float64 if dtype == torch.float64 else torch.float32


_CONVERSIONS: dict[type, Callable[[_Adapter, tuple[int, ...]], LoraFactors]] = {
    comfy.weight_adapter.LoRAAdapter: _lora,
    comfy.weight_adapter.LoHaAdapter: _loha,
    comfy.weight_adapter.LoKrAdapter: _lokr,
}
