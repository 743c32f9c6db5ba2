"""Low-rank adapters on layers of a loaded model, on the activation side: y + (x downᵀ) upᵀ through forward hooks.

Hooks and not peft's injection, because peft exchanges the layers of the model it is given, and that model is the host's, in
use by every clone; hooks leave weights and modules alone, are there for a single call, and need no further package.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from ...methods.erase.lowrank import LowRank
from ...methods.erase.train import Factors
from ...methods.lora import low_rank_change
from ..engine.attention import unet_of

PLACES = {
    "cross k/v": r"attn2\.to_[kv]$",
    "cross": r"attn2\.to_(q|k|v|out\.0)$",
    "outside cross": r"transformer_blocks\.\d+\.(attn1\.to_(q|k|v|out\.0)|ff\.net\.(0\.proj|2))$",
    "all": r"transformer_blocks\.\d+\.(attn[12]\.to_(q|k|v|out\.0)|ff\.net\.(0\.proj|2))$",
}
"""Names of the linear layers of a UNet's transformer blocks that are trained."""

_OTHER_MODEL = "use it with the kind of model it was made for."

Layers = dict[str, torch.nn.Linear]
"""The key of a weight in its model to the layer that has it."""


def unet_layers(model: Any, place: str) -> Layers:
    """The layers of that place in the host's model.

    Raises:
        ValueError: the model is no UNet, or has none of them.
    """
    unet_of(model)
    found = {
        f"{name}.weight": module for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith("diffusion_model.") and re.search(PLACES[place], name)
    }  # fmt: skip
    if not found:
        raise ValueError(f"This model has no layers for '{place}'; load an SD 1.x, SD 2.x or SDXL checkpoint.")
    return found


def layers_named(model: torch.nn.Module, keys: Iterable[str]) -> Layers:
    """The layers that have these weights.

    Raises:
        ValueError: the model lacks one: the edit was made for another model.
    """
    modules, found = dict(model.named_modules()), {}
    for key in keys:
        layer = modules.get(key.removesuffix(".weight"))
        if not isinstance(layer, torch.nn.Linear):
            raise ValueError(f"This edit changes '{key}', which the model does not have; {_OTHER_MODEL}")
        found[key] = layer
    return found


def shapes_of(layers: Layers) -> dict[str, tuple[int, int]]:
    """(out, in) of every layer's weight."""
    return {key: (layer.out_features, layer.in_features) for key, layer in layers.items()}


@contextlib.contextmanager
def attached(layers: Mapping[str, torch.nn.Module], factors: Factors) -> Iterator[None]:
    """Model calls in the body go through the adapters. Nothing stays behind.

    Raises:
        ValueError: factors for a layer that is not there: they were made for another model.
    """
    missing = [key for key in factors if key not in layers]
    if missing:
        raise ValueError(f"This edit changes '{missing[0]}', which the model does not have; {_OTHER_MODEL}")
    with contextlib.ExitStack() as stack:
        for key, factor in factors.items():
            stack.callback(layers[key].register_forward_hook(_branch(factor)).remove)
        yield


def _branch(factor: LowRank) -> Callable[..., torch.Tensor]:
    up, down = factor

    def hook(module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        change = low_rank_change(inputs[0].to(down.dtype), down, up)
        return output + change.to(output.dtype)

    return hook
