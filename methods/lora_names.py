"""What LoRA files call the layers of a model: prefixes, dots or underscores, and the parts of fused matrices.

A name in a file is never taken apart: every name that a file may use is made from the model's own layers, and looked
up. So underscores inside of a layer's name are no trouble.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch

DOTTED = (
    "",
    "diffusion_model.",
    "transformer.",
    "unet.",
    "base_model.model.",
    "transformer.base_model.model.",
)
"""What comes before a layer's name with its dots: the host, diffusers, PEFT, and SimpleTuner with PEFT."""
FLAT = ("lora_unet_", "lycoris_", "lora_transformer_")
"""What comes before a layer's name with underscores for its dots: kohya and musubi, LyCORIS, OneTrainer."""

_XLABS = r"(processor\.(?:qkv|proj)_lora[12]?)\.(up|down)\.weight$"


class Target(NamedTuple):
    """What a name in a file stands for: a layer of the network, its ``weight`` or ``bias``, and some of its outputs.

    ``spans`` are those of a fused matrix by name, such as queries; empty for all outputs. ``change`` turns a change of
    the weight under this name into the layer's own (halves swapped), along the first axis.
    """

    layer: str
    parameter: str = "weight"
    spans: tuple[str, ...] = ()
    change: Callable[[torch.Tensor], torch.Tensor] | None = None


def renamed(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors with the endings of other trainers where XLabs has its own."""
    return {re.sub(_XLABS, r"\1.lora_\2.weight", key): tensor for key, tensor in tensors.items()}


def spelled(targets: Mapping[str, Target]) -> dict[str, Target]:
    """Every name that a file may use for these targets.

    Args:
        targets: by their names with dots, without any prefix. Earlier ones win.
    """
    names: dict[str, Target] = {}
    for dotted, target in targets.items():
        for prefix in DOTTED:
            names.setdefault(f"{prefix}{dotted}", target)
        flat = dotted.replace(".", "_")
        for prefix in FLAT:
            names.setdefault(f"{prefix}{flat}", target)
    return names


def without_prefix(name: str) -> str:
    """A name with dots, without the longest prefix that it begins with."""
    return name.removeprefix(max((p for p in DOTTED if name.startswith(p)), key=len))


def names_in(keys: Iterable[str], names: Mapping[str, Target]) -> dict[str, Target]:
    """Those of the names that a key begins with, followed by a dot or by ``_lora.`` (older diffusers)."""
    found: dict[str, Target] = {}
    for key in keys:
        for at, letter in enumerate(key):
            if letter == ".":
                for name in (key[:at], key[:at].removesuffix("_lora")):
                    if name in names:
                        found[name] = names[name]
    return found
