"""The networks that a concept LoRA is trained on, and the file it ends in, for each kind of demo model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from ...host.lora.export import lora_tensors, names_of
from ...methods.erase.lowrank import LowRank
from ..autoencoder import Autoencoder
from ..loader import load_demo_model
from .batches import Batch
from .dit_loss import velocity_loss
from .networks import bundled_dit, bundled_networks
from .unet_loss import alphas_and_sigmas, training_loss

UNET_TARGETS = r".*(to_q|to_k|to_v|to_out\.0|proj_in|proj_out|ff\.net\.0\.proj|ff\.net\.2)$"
TEXT_TARGETS = r".*(q_proj|k_proj|v_proj|out_proj|fc1|fc2)$"
DIT_TARGETS = r".*(to_q|to_k|to_v|attention\.out|feed_forward\.w[123])$"

Adapters = dict[str, nn.Parameter]
Tensors = dict[str, torch.Tensor]


class Adapted(NamedTuple):
    """Networks with fresh adapters."""

    adapters: Adapters
    loss: Callable[[Batch, torch.Generator], torch.Tensor]
    file: Callable[[], Tensors]
    """The adapters as the tensors of a LoRA file."""
    metadata: dict[str, str]
    batch: int
    """Pictures a step."""


class SplitRows(nn.Module):
    """A fused q, k, v without bias as three layers, which adapters of their own can sit on."""

    def __init__(self, fused: nn.Linear) -> None:
        super().__init__()
        for name, rows in zip(("to_q", "to_k", "to_v"), fused.weight.detach().chunk(3), strict=True):
            layer = nn.Linear(fused.in_features, len(rows), bias=False)
            layer.weight = nn.Parameter(rows, requires_grad=False)
            self.add_module(name, layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.get_submodule(name)(x) for name in ("to_q", "to_k", "to_v")], -1)


def _adapt(networks: Mapping[str, tuple[nn.Module, str]], rank: int) -> Adapters:
    """Puts fresh adapters of a rank on the layers of each network that a pattern names."""
    from peft import LoraConfig, inject_adapter_in_model

    for network, targets in networks.values():
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), network)
    return {
        f"{part}.{name}": parameter
        for part, (network, _targets) in networks.items()
        for name, parameter in network.named_parameters()
        if parameter.requires_grad
    }


def _factors(network: nn.Module, side: str) -> Tensors:
    return {
        path: getattr(layer, side)["default"].weight.detach()
        for path, layer in network.named_modules()
        if hasattr(layer, side)
    }


def kohya_names(model: Any, clip: Any) -> tuple[dict[str, str], dict[str, str]]:
    """Layer path to kohya name, for the UNet and the text encoder."""
    unet, text = names_of(model), names_of(clip=clip)
    return (
        {key[len("diffusion_model.") : -len(".weight")]: name for key, name in unet.items()},
        {key[len("clip_l.transformer.") : -len(".weight")]: name for key, name in text.items()},
    )


def kohya_state(network: nn.Module, names: dict[str, str]) -> Tensors:
    """The injected adapters of a network as the tensors of a kohya file; for a 1×1 convolution with four axes."""
    up, down = (_factors(network, side) for side in ("lora_B", "lora_A"))
    tensors = lora_tensors({path: LowRank(up[path].flatten(1), down[path].flatten(1)) for path in up}, names)
    convolutions = {names[path] for path, weight in up.items() if weight.ndim == 4}
    return {
        name: value[..., None, None] if value.ndim == 2 and name.partition(".")[0] in convolutions else value
        for name, value in tensors.items()
    }


def z_image_state(network: nn.Module) -> Tensors:
    """The injected adapters of a split transformer in the names that trainers of Z-Image write: q, k and v apart."""
    tensors = {}
    for side in ("lora_A", "lora_B"):
        for path, weight in _factors(network, side).items():
            layer = path.replace("attention.qkv.", "attention.").replace("attention.out", "attention.to_out.0")
            tensors[f"diffusion_model.{layer}.{side}.weight"] = weight.half().contiguous()
    return tensors


def adapted_unet(rank: int = 16) -> Adapted:
    """The bundled UNet and text encoder."""
    unet, text = (network.requires_grad_(False) for network in bundled_networks())
    adapters = _adapt({"unet": (unet, UNET_TARGETS), "text": (text, TEXT_TARGETS)}, rank)
    encoder, levels = Autoencoder("unet"), alphas_and_sigmas()

    def file() -> Tensors:
        names = kohya_names(*load_demo_model()[:2])
        return kohya_state(unet, names[0]) | kohya_state(text, names[1])

    def loss(batch: Batch, generator: torch.Generator) -> torch.Tensor:
        return training_loss(unet, text, encoder.encode, batch, levels, generator)

    return Adapted(adapters, loss, file, {"ss_network_dim": str(rank), "ss_network_alpha": str(rank)}, batch=24)


def adapted_dit(rank: int = 16) -> Adapted:
    """The bundled transformer. The text encoder stays as it is, as that of a large transformer does.

    A step is slow, and in the same minutes many small ones learn more: a lion is right in 6 pictures of 6 after 300
    steps of 8, and in none after 80 of 24.
    """
    dit, (_unet, text) = bundled_dit().requires_grad_(False), bundled_networks()
    for layer in dit.modules():
        if isinstance(qkv := getattr(layer, "qkv", None), nn.Linear):
            layer.qkv = SplitRows(qkv)
    adapters, encoder = _adapt({"dit": (dit, DIT_TARGETS)}, rank), Autoencoder("dit")
    text.requires_grad_(False)

    def loss(batch: Batch, generator: torch.Generator) -> torch.Tensor:
        return velocity_loss(dit, text, encoder.encode, batch, generator)

    return Adapted(adapters, loss, lambda: z_image_state(dit), {}, batch=8)


ADAPTED = {"unet": adapted_unet, "dit": adapted_dit}
"""By the kind of demo model."""
