"""Trains one LoRA for a concept the base model has never seen, in kohya's naming, which the host's loader takes.

A third of the pictures show only what the base model knows: the LoRA adds a concept and moves nothing else.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import math
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import save_file

from ...host.lora.export import lora_tensors, names_of
from ...methods.erase.lowrank import LowRank
from .. import vocabulary
from ..autoencoder import Autoencoder
from ..files import LORAS
from ..loader import load_demo_model
from . import scenes
from .batches import Batches, SceneSource
from .checkpoint import Training
from .networks import Tokenizer, bundled_networks
from .unet_loss import alphas_and_sigmas, training_loss

log = logging.getLogger(__name__)

RANK, BATCH, PEAK_RATE, EMA_DECAY = 16, 24, 2e-3, 0.98
WITH_CONCEPT = 0.67
OBJECTS = ((1, 0.55), (2, 0.45))
UNET_TARGETS = r".*(to_q|to_k|to_v|to_out\.0|proj_in|proj_out|ff\.net\.0\.proj|ff\.net\.2)$"
TEXT_TARGETS = r".*(q_proj|k_proj|v_proj|out_proj|fc1|fc2)$"

Adapters = dict[str, torch.nn.Parameter]
Tensors = dict[str, torch.Tensor]


def scene_source(concept: str) -> SceneSource:
    """Draws scenes two thirds of which hold the concept."""

    def random_scene(rng: Random, objects: int) -> vocabulary.Scene:
        scene = scenes.random_scene(rng, objects)
        if rng.random() > WITH_CONCEPT:
            return scene
        chosen = list(scene.concepts)
        chosen[rng.randrange(objects)] = concept
        return vocabulary.scene_of(tuple(chosen), scene.background, scene.style, scene.places)

    return random_scene


def kohya_names(model: Any, clip: Any) -> tuple[dict[str, str], dict[str, str]]:
    """Layer path to kohya name, for the UNet and the text encoder."""
    unet, text = names_of(model), names_of(clip=clip)
    return (
        {key[len("diffusion_model.") : -len(".weight")]: name for key, name in unet.items()},
        {key[len("clip_l.transformer.") : -len(".weight")]: name for key, name in text.items()},
    )


def kohya_state(network: torch.nn.Module, names: dict[str, str]) -> dict[str, torch.Tensor]:
    """The injected adapters of a network as the tensors of a kohya file; for a 1×1 convolution with four axes."""
    up, down = (
        {
            path: getattr(layer, side)["default"].weight.detach()
            for path, layer in network.named_modules()
            if hasattr(layer, side)
        }
        for side in ("lora_B", "lora_A")
    )
    tensors = lora_tensors({path: LowRank(up[path].flatten(1), down[path].flatten(1)) for path in up}, names)
    convolutions = {names[path] for path, weight in up.items() if weight.ndim == 4}
    return {
        name: value[..., None, None] if value.ndim == 2 and name.partition(".")[0] in convolutions else value
        for name, value in tensors.items()
    }


def with_adapters() -> tuple[torch.nn.Module, torch.nn.Module, Adapters]:
    """The bundled UNet and text encoder with fresh adapters, and the adapters' parameters."""
    from peft import LoraConfig, inject_adapter_in_model

    unet, text = (network.requires_grad_(False) for network in bundled_networks())
    for network, targets in ((unet, UNET_TARGETS), (text, TEXT_TARGETS)):
        inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets), network)
    adapters = {
        f"{part}.{name}": parameter
        for part, network in (("unet", unet), ("text", text))
        for name, parameter in network.named_parameters()
        if parameter.requires_grad
    }
    return unet, text, adapters


def train(concept: str, minutes: float, path: Path) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The UNet and the text encoder with adapters trained for so many minutes in all; the checkpoint is at ``path``."""
    torch.manual_seed(len(concept))
    unet, text, adapters = with_adapters()
    training, average = Training(path, minutes), {k: p.detach().clone() for k, p in adapters.items()}
    for name, parameter in adapters.items() if training.tensors else ():
        parameter.data.copy_(training.tensors[name])
        average[name].copy_(training.tensors[f"average.{name}"])
    batches = Batches(11 + training.steps, Tokenizer(), OBJECTS, scene_source(concept))
    generator = torch.Generator().manual_seed(12 + training.steps)
    encoder, levels = Autoencoder(), alphas_and_sigmas()

    def next_loss() -> torch.Tensor:
        return training_loss(unet, text, encoder.encode, batches.next(BATCH), levels, generator)

    fit(concept, adapters, average, training, next_loss)
    for name, parameter in adapters.items():
        parameter.data.copy_(average[name])
    return unet, text


def fit(
    concept: str, adapters: Adapters, average: Tensors, training: Training, next_loss: Callable[[], torch.Tensor]
) -> None:
    """Trains the adapters, and their moving average, until the time is up."""
    optimiser = torch.optim.AdamW(adapters.values(), lr=PEAK_RATE, betas=(0.9, 0.99), weight_decay=0.0)
    while training.done < 1:
        for group in optimiser.param_groups:
            group["lr"] = PEAK_RATE * training.warm_up(20) * 0.5 * (1 + math.cos(math.pi * training.done))
        loss = next_loss()
        loss.backward()
        if torch.isfinite(torch.nn.utils.clip_grad_norm_(adapters.values(), 1.0)):
            optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        for name, parameter in adapters.items():
            average[name].lerp_(parameter.detach(), 1 - EMA_DECAY)
        if training.step():
            log.info("%s: %.1f min, step %d, loss %.4f", concept, training.spent, training.steps, loss.item())
            training.keep(adapters | {f"average.{name}": value for name, value in average.items()})


def write_lora(concept: str, minutes: float, path: Path, names: tuple[dict[str, str], dict[str, str]]) -> None:
    """Trains the LoRA of a concept and writes it. ``names``: kohya's, as ``kohya_names`` returns them."""
    unfinished = path.with_suffix(".training")  # not a name the host would offer as a LoRA
    unet, text = train(concept, minutes, unfinished)
    metadata = {
        "ss_network_dim": str(RANK),
        "ss_network_alpha": str(RANK),
        "concepts_phrase": vocabulary.article(concept),
    }
    save_file(kohya_state(unet, names[0]) | kohya_state(text, names[1]), path, metadata)
    unfinished.unlink(missing_ok=True)
    log.info("%s: written to %s", concept, path)


def main(arguments: list[str]) -> int:
    """``dev.py train lora``: trains the LoRAs of the named concepts one after the other; resumes the one it was at."""
    if importlib.util.find_spec("peft") is None:
        raise SystemExit("training a LoRA needs peft; install it with: pip install peft")
    parser = argparse.ArgumentParser(prog="dev.py train lora")
    parser.add_argument("concepts", nargs="*", default=list(vocabulary.LORA_CONCEPTS))
    parser.add_argument("--out", type=Path, default=LORAS)
    parser.add_argument("--minutes", type=float, default=3.0, help="for each concept")
    parser.add_argument("--again", action="store_true", help="also those that are there already")
    options = parser.parse_args(arguments)
    logging.basicConfig(force=True, level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    names = kohya_names(*load_demo_model()[:2])
    for concept in options.concepts:
        path = options.out / f"concepts-demo-{concept}.safetensors"
        if options.again or not path.exists():
            write_lora(concept, options.minutes, path, names)
    return 0
