"""What LoRA files call the layers of a model: prefixes, dots or underscores, and the parts of fused matrices.

A name in a file is never taken apart: every name that a file may use is made from the model's own layers, and looked
up. So underscores inside of a layer's name are no trouble.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
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

PARTS = {
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "add_q_proj": "q",
    "add_k_proj": "k",
    "add_v_proj": "v",
    "proj_mlp": "mlp",
    "qkv": "qkv",
}
"""How a name ends that stands for some outputs of a fused matrix, to the name of these outputs."""

_SPLIT = ("attn.to_q", "attn.to_k", "attn.to_v")
_LUMINA = {
    "attention.qkv": _SPLIT,
    "attention.out": ("attn.to_out.0",),
    **{f"feed_forward.w{n}": (f"feed_forward.linear_{n}",) for n in (1, 2, 3)},
}
_OTHERS: dict[str, tuple[str, ...]] = {
    # Flux.2 in diffusers (the host reads these from 0.33 on), and XLabs' processors of Flux.1
    "double_blocks.{}.img_attn.qkv": ("double_blocks.{}.processor.qkv1",),
    "double_blocks.{}.txt_attn.qkv": ("double_blocks.{}.processor.qkv2",),
    "double_blocks.{}.img_attn.proj": ("double_blocks.{}.processor.proj1",),
    "double_blocks.{}.txt_attn.proj": ("double_blocks.{}.processor.proj2",),
    "double_blocks.{}.img_mlp.0": ("transformer_blocks.{}.ff.linear_in",),
    "double_blocks.{}.img_mlp.2": ("transformer_blocks.{}.ff.linear_out",),
    "double_blocks.{}.txt_mlp.0": ("transformer_blocks.{}.ff_context.linear_in",),
    "double_blocks.{}.txt_mlp.2": ("transformer_blocks.{}.ff_context.linear_out",),
    "single_blocks.{}.linear1": (
        "single_transformer_blocks.{}.attn.to_qkv_mlp_proj",
        "single_blocks.{}.processor.qkv",
    ),
    "single_blocks.{}.linear2": ("single_transformer_blocks.{}.attn.to_out", "single_blocks.{}.processor.proj"),
    # Lumina 2 in diffusers
    **{
        f"{block}.{{}}.{ours}": tuple(f"{block}.{{}}.{name}" for name in theirs)
        for block in ("layers", "context_refiner", "noise_refiner")
        for ours, theirs in _LUMINA.items()
    },
    # Wan in diffusers
    **{
        f"blocks.{{}}.{ours}_attn.{letter}": (f"blocks.{{}}.{theirs}.{name}",)
        for ours, theirs in (("self", "attn1"), ("cross", "attn2"))
        for letter, name in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"))
    },
    "blocks.{}.ffn.0": ("blocks.{}.ffn.net.0.proj",),
    "blocks.{}.ffn.2": ("blocks.{}.ffn.net.2",),
    # Cosmos in diffusers
    **{
        f"blocks.{{}}.{ours}_attn.{layer}": (f"transformer_blocks.{{}}.{theirs}.{name}",)
        for ours, theirs in (("self", "attn1"), ("cross", "attn2"))
        for layer, name in (("q_proj", "to_q"), ("k_proj", "to_k"), ("v_proj", "to_v"), ("output_proj", "to_out.0"))
    },
    "blocks.{}.mlp.layer1": ("transformer_blocks.{}.ff.net.0.proj",),
    "blocks.{}.mlp.layer2": ("transformer_blocks.{}.ff.net.2",),
}
"""A layer of the host, with {} for the number of its block, to names of it or of its parts that the host leaves out."""
_XLABS = r"(processor\.(?:qkv|proj))_lora([12])(\.(?:up|down)\.weight)"


class Target(NamedTuple):
    """What a name in a file stands for: a layer of the network, its ``weight`` or ``bias``, and a part of its outputs.

    ``part`` is empty for all outputs. ``change`` turns a change of the weight that the name stands for into the
    layer's own (halves swapped), along the first axis.
    """

    layer: str
    parameter: str = "weight"
    part: str = ""
    change: Callable[[torch.Tensor], torch.Tensor] | None = None


def part_of(name: str) -> str:
    """The part of a fused matrix that a name stands for, if the layer has such a part; else empty."""
    return next((part for word, part in PARTS.items() if re.search(rf"[._]{word}$", name)), "")


def other_names(layers: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Names that the host leaves out, each with the layer that it, or its part, is of."""
    for layer in layers:
        numbered = re.fullmatch(r"(\w+\.)(\d+)(\..+)", layer)
        if numbered:
            for name in _OTHERS.get(f"{numbered[1]}{{}}{numbered[3]}", ()):
                yield name.replace("{}", numbered[2]), layer


def renamed(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors with XLabs' numbers (1 for the picture, 2 for the text) before the end that other trainers write."""
    return {re.sub(_XLABS, r"\1\2_lora\3", key): tensor for key, tensor in tensors.items()}


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
