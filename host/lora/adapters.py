"""Low-rank adapters on layers of a loaded model, on the activation side: y + (x downᵀ) upᵀ through forward hooks.

Not peft's injection: it replaces the layers of the model, and that model is the host's, in use by every clone. Hooks
leave weights and modules alone, last for a single call, and need no further package.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch

from ...methods.erase.lowrank import LowRank
from ...methods.erase.train import LayerFactors
from ...methods.lora import low_rank_change
from ..families.unet import UNet
from ..registry import architecture_of, unet_of
from ..types import BaseModel, HookInputs, TextEncoder

TARGET_MODULES = UNet.targets
"""Which linear layers of a UNet's transformer blocks are trained: a pattern of their names. The nodes offer these."""

_OTHER_MODEL = "use it with the kind of model it was made for."

Layers = dict[str, torch.nn.Linear]
"""The key of a weight in its model, to the layer that has it."""


def unet_layers(model: BaseModel, target_modules: str) -> Layers:
    """The layers of the host's model that this entry of ``TARGET_MODULES`` names.

    Raises:
        ValueError: the model is not a UNet, or has none of them.
    """
    unet_of(model)
    pattern = architecture_of(model).trained(target_modules)
    layers = {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith("diffusion_model.") and re.search(pattern, name)
    }
    if not layers:
        raise ValueError(f"This model has no layers for '{target_modules}'; load an SD 1.x, SD 2.x or SDXL checkpoint.")
    return layers


def layers_named(model: BaseModel | TextEncoder, keys: Iterable[str]) -> Layers:
    """The layers that have the weights of these keys.

    Raises:
        ValueError: the model lacks one: the edit was made for another model.
    """
    modules, layers = dict(model.named_modules()), {}
    for key in keys:
        layer = modules.get(key.removesuffix(".weight"))
        if not isinstance(layer, torch.nn.Linear):
            raise ValueError(f"This edit changes '{key}', which the model does not have; {_OTHER_MODEL}")
        layers[key] = layer
    return layers


def shapes_of(layers: Layers) -> dict[str, tuple[int, int]]:
    """(out, in) of every layer's weight."""
    return {key: (layer.out_features, layer.in_features) for key, layer in layers.items()}


@contextlib.contextmanager
def attached(layers: Mapping[str, torch.nn.Module], factors: LayerFactors) -> Iterator[None]:
    """Model calls in the body go through the adapters. Afterwards nothing of them is left.

    Raises:
        ValueError: a factor's layer is missing: it was made for another model.
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

    def hook(module: torch.nn.Module, inputs: HookInputs, output: torch.Tensor) -> torch.Tensor:
        change = low_rank_change(inputs[0].to(down.dtype), down, up)
        return output + change.to(output.dtype)

    return hook
