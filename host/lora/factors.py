"""A LoRA file as low-rank factors of the network's layers, whatever names and form it was written in.

The host's own key maps give the names, widened by the spellings that the host leaves out. A file that fits nothing is
refused, and so is one with a change that cannot be added to a layer's output.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

import comfy.lora
import comfy.utils
import comfy.weight_adapter
import torch

from ...methods.lora import (
    LoraFactors,
    Span,
    fitted,
    kronecker,
    layer_shape,
    loha_factors,
    lokr_factors,
    lora_factors,
    rebuilt,
    shape_of,
    unchanged,
    whole_change,
)
from ...methods.lora_names import Target, names_in, spelled, without_prefix
from ..architecture import Part
from ..registry import architecture_of
from ..types import BaseModel
from .files import LoraFile

log = logging.getLogger(__name__)

_BIAS = r"(.+?)(?:\.lora_B|\.lora_B\.default|\.lora_up|\.lora\.up|_lora\.up)\.bias"
"""A bias of the second factor, after the name of its layer. It is scaled as the factors are."""


_MODEL = "diffusion_model."
_NORMS = (torch.nn.LayerNorm, torch.nn.GroupNorm, torch.nn.RMSNorm)


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


def layer_names(model: BaseModel) -> dict[str, Target]:
    """Every name a file may call a layer of the model's network by.

    The host's own key maps give most of them, the architecture those that the host leaves out, and all that stand for
    a part of a fused matrix: the host's numbers for these are wrong where keys are fewer than queries.

    Raises:
        ValueError: the network is of an unknown architecture.
    """
    layers = {name for name, module in model.diffusion_model.named_modules() if hasattr(module, "weight")}
    hosts = dict(_hosts_names(model))
    targets = {layer: Target(layer) for layer in sorted(layers)}
    targets |= {without_prefix(name): target for name, target in hosts.items() if "." in name}
    for theirs, ours in comfy.utils.unet_to_diffusers(model.model_config.unet_config).items():
        if theirs.endswith(".weight"):
            targets.setdefault(theirs.removesuffix(".weight"), Target(ours.removesuffix(".weight")))
    for theirs, part in architecture_of(model).other_names().items():
        targets.setdefault(theirs, Target(part.layer, spans=part.spans))
    names = hosts | spelled(targets)
    return {n: t for n, t in names.items() if t.layer in layers and t.parameter in ("weight", "bias")}


def _hosts_names(model: BaseModel) -> Iterator[tuple[str, Target]]:
    """The host's names without those of parts. Its targets are parameters, some of them with a span or a function."""
    for name, target in comfy.lora.model_lora_keys_unet(model, {}).items():
        key, span, *change = (target, None) if isinstance(target, str) else target
        layer, _, parameter = key.removeprefix(_MODEL).rpartition(".")
        if span is None:
            yield name, Target(layer, parameter, change=change[0] if change else None)


def network_factors(lora: LoraFile, model: BaseModel) -> dict[str, tuple[LoraFactors, ...]]:
    """The factors of every layer of the model's network that the file changes, by the layer's name inside the network.

    Raises:
        ValueError: nothing in it fits, a layer has another size, or a change cannot be added to a layer's output.
    """
    if lora.text_alone:
        log.info("LoRA '%s' changes the text encoder alone", lora.name)
        return {}
    tensors = lora.network_part()
    changes = _changes(tensors, layer_names(model))
    if not changes:
        some = next(iter(tensors), "nothing")
        raise ValueError(
            f"The LoRA '{lora.name}' matched 0 of {len(tensors)} keys: none of its layers has a counterpart in this "
            f"model (it begins with '{some}'); load the checkpoint it was made for, or another LoRA."
        )
    tensors.log(lora.name, "model")
    modules, architecture = dict(model.diffusion_model.named_modules()), architecture_of(model)
    factors: dict[str, tuple[LoraFactors, ...]] = {}
    for target, change in changes:
        span = architecture.span(Part(target.layer, target.spans))
        made = _factors_of(lora.name, target, modules[target.layer], span and Span(*span), change)
        factors[target.layer] = (*factors.get(target.layer, ()), made)
    return factors


def _changes(tensors: dict[str, torch.Tensor], names: Mapping[str, Target]) -> list[tuple[Target, _Change]]:
    """What the file changes under each of the names that it uses."""
    found = names_in(tensors, names)
    changes: dict[str, _Change] = {}
    loaded = comfy.lora.load_lora(tensors, {name: f"{name}.weight" for name in found}, log_missing=False)
    for key, change in loaded.items():
        name, _, parameter = key.rpartition(".")
        own = changes.setdefault(name, _Change())
        if "bias" in (parameter, found[name].parameter):
            own.bias = change[1][0]
        else:
            own.weight = change
    for key in list(tensors):
        bias = re.fullmatch(_BIAS, key)
        if bias and bias[1] in found:
            changes.setdefault(bias[1], _Change()).scaled_bias = tensors[key]
    return [(found[name], change) for name, change in changes.items()]


def _factors_of(name: str, target: Target, module: torch.nn.Module, span: Span | None, change: _Change) -> LoraFactors:
    """One change of a layer, or of a span of its outputs, as factors that fit it.

    Raises:
        ValueError: a change of another kind or size.
    """
    shape = layer_shape(module)
    if span is not None:
        shape = (span.length, *shape[1:])
    factors = fitted(_converted(name, target.layer, module, shape, change.weight), shape)
    bias, found = change.whole_bias(factors.scale), shape_of(factors)
    if bias is not None and bias.shape != shape[:1]:
        found = tuple(bias.shape)
    if found != shape:
        out, *inner = found
        part = f" ({', '.join(target.spans)})" if target.spans else ""
        raise ValueError(
            f"The LoRA '{name}' was made for another model: it changes {out} × {tuple(inner)} values of "
            f"'{target.layer}'{part}, which has {shape[0]} × {shape[1:]}; load the checkpoint it was made for."
        )
    return _changed(factors._replace(bias=bias, span=span), target.change)


def _changed(factors: LoraFactors, change: Callable[[torch.Tensor], torch.Tensor] | None) -> LoraFactors:
    """The factors whose change of the weight is this function of theirs, which acts along the outputs."""
    if change is None:
        return factors
    bias = None if factors.bias is None else change(factors.bias)
    if factors.up is None:
        return factors._replace(down=change(factors.down), bias=bias)
    return factors._replace(up=change(factors.up), bias=bias)


def _converted(
    name: str, layer: str, module: torch.nn.Module, shape: tuple[int, ...], change: _Adapter | tuple[Any, ...] | None
) -> LoraFactors:
    """One change of a weight as the host loads it, as factors.

    Args:
        shape: of the weight, or of the part of it that changes.

    Raises:
        ValueError: a change of a kind that cannot be added.
    """
    if change is None:
        return unchanged(shape)
    if isinstance(change, tuple) and change[0] == "diff" and (isinstance(module, _NORMS) or len(shape) in (2, 4, 5)):
        return LoraFactors(change[1][0], None, 1.0)
    convert = _CONVERSIONS.get(type(change))
    if convert is None or len(shape) not in (2, 4, 5) or getattr(module, "groups", 1) != 1:
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
