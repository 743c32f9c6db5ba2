"""Which of the known architectures a model has."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

from .architecture import Architecture, TextEntry
from .families.cosmos import Cosmos
from .families.flux import Flux
from .families.krea2 import Krea2
from .families.nextdit import NextDiT
from .families.qwen import Qwen
from .families.sd3 import SD3
from .families.unet import UNet
from .families.wan import Wan
from .types import BaseModel, ModelPatcher

FAMILIES: tuple[type[Architecture], ...] = (UNet, Flux, SD3, Qwen, NextDiT, Cosmos, Krea2, Wan)


def architecture_of(model: BaseModel | torch.nn.Module) -> Architecture:
    """The architecture of the host's model, or of the network inside it.

    Raises:
        ValueError: its network is not a known one; the message names its class and the families that are.
    """
    architecture = known_architecture(model)
    if architecture is None:
        network = _network_in(model)
        known = "; ".join(known.title for known in FAMILIES)
        raise ValueError(
            f"This works inside the network, and a {type(network).__name__} is not known to it; load a model of one of "
            f"these families: {known}."
        )
    return architecture


def known_architecture(model: BaseModel | torch.nn.Module) -> Architecture | None:
    """The architecture of the host's model, or of the network inside it; None if its network is not a known one."""
    network = _network_in(model)
    family = _family_of(network)
    return None if family is None else family(network)


def text_entry_of(model: ModelPatcher) -> TextEntry | None:
    """Where the text enters the transformer of a MODEL; None for a UNet, and for a network that is not known."""
    architecture = known_architecture(model.model)
    return None if architecture is None or isinstance(architecture, UNet) else architecture.text_entry()


def attends_jointly(model: ModelPatcher) -> bool:
    """Whether text and picture attend together in a MODEL's network."""
    architecture = known_architecture(model.model)
    return architecture is not None and any(attention.kind == "joint" for attention in architecture.attentions)


def attends_across(model: ModelPatcher) -> bool:
    """Whether the picture attends to a text of its own in a MODEL's network, and the network is a transformer."""
    architecture = known_architecture(model.model)
    return architecture is not None and not attends_jointly(model) and not has_decoder(model.model)


def has_decoder(model: BaseModel | torch.nn.Module) -> bool:
    """Whether a model's network goes down to fewer tokens and up again, as a UNet does."""
    return any(attention.stage == "output" for attention in architecture_of(model).attentions)


def unet_of(model: BaseModel | UNetModel) -> UNetModel:
    """The UNet inside the host's model, for what works on no other family.

    Raises:
        ValueError: the model has another network (Flux, SD3, …).
    """
    network = _network_in(model)
    if _family_of(network) is not UNet:
        raise ValueError(
            f"This needs a UNet model ({UNet.title}), and this one is a {type(network).__name__}; load such a "
            "checkpoint."
        )
    return network


@contextlib.contextmanager
def refused_size(model: BaseModel, x: torch.Tensor) -> Iterator[None]:
    """Says in words what some hosts only assert: that a network takes no latent with half an image token.

    Raises:
        ValueError: an assertion failed inside it, and the sides of ``x`` (batch, channels, …, height, width) are odd.
    """
    try:
        yield
    except AssertionError as error:
        architecture = known_architecture(model)
        patch = 1 if architecture is None else architecture.patch
        if architecture is None or not (x.shape[-2] % patch or x.shape[-1] % patch):
            raise
        pixels = patch * getattr(model.latent_format, "spacial_downscale_ratio", 8)
        raise ValueError(
            f"This ComfyUI gives {architecture.title} models only latents whose sides are multiples of {patch} cells, "
            f"and this one is {x.shape[-1]} × {x.shape[-2]}; set width and height to multiples of {pixels}."
        ) from error


def _network_in(model: Any) -> Any:
    """The network, also where it is compiled: torch.compile puts a module of its own around it."""
    network = getattr(model, "diffusion_model", model)
    return getattr(network, "_orig_mod", network)


def _family_of(network: object) -> type[Architecture] | None:
    names = _class_names(network)
    return next((family for family in FAMILIES if not names.isdisjoint(family.classes)), None)


def _class_names(network: object) -> set[str]:
    """The name of its class. A class of another pack also counts as the host's class that it derives from.

    One of the host's own does not: those change what goes in or out.
    """
    names = set()
    for cls in type(network).__mro__:
        names.add(cls.__name__)
        if cls.__module__.split(".")[0] == "comfy":
            break
    return names
