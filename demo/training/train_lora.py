"""Trains one LoRA for a concept the base model has never seen, in a naming that the host's loader takes.

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

import torch
from safetensors.torch import save_file

from .. import vocabulary
from ..files import lora_file
from . import scenes
from .adapters import ADAPTED, Adapted, Adapters, Tensors
from .batches import Batches, SceneSource
from .checkpoint import Training
from .networks import Tokenizer

log = logging.getLogger(__name__)

PEAK_RATE, EMA_DECAY = 2e-3, 0.98
WITH_CONCEPT = 0.67
OBJECTS = ((1, 0.55), (2, 0.45))


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


def train(concept: str, kind: str, minutes: float, path: Path) -> Adapted:
    """Adapters on a kind of demo model, trained for so many minutes in all; the checkpoint is at ``path``."""
    torch.manual_seed(len(concept))
    adapted = ADAPTED[kind]()
    adapters, training = adapted.adapters, Training(path, minutes)
    average = {k: p.detach().clone() for k, p in adapters.items()}
    for name, parameter in adapters.items() if training.tensors else ():
        parameter.data.copy_(training.tensors[name])
        average[name].copy_(training.tensors[f"average.{name}"])
    batches = Batches(11 + training.steps, Tokenizer(), OBJECTS, scene_source(concept))
    generator = torch.Generator().manual_seed(12 + training.steps)
    fit(concept, adapters, average, training, lambda: adapted.loss(batches.next(adapted.batch), generator))
    for name, parameter in adapters.items():
        parameter.data.copy_(average[name])
    return adapted


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


def write_lora(concept: str, kind: str, minutes: float, path: Path) -> None:
    """Trains the LoRA of a concept for a kind of demo model, and writes it."""
    unfinished = path.with_suffix(".training")  # not a name the host would offer as a LoRA
    adapted = train(concept, kind, minutes, unfinished)
    save_file(adapted.file(), path, {**adapted.metadata, "concepts_phrase": vocabulary.article(concept)})
    unfinished.unlink(missing_ok=True)
    log.info("%s: written to %s", concept, path)


def main(arguments: list[str]) -> int:
    """``dev.py train lora``: trains the LoRAs of the named concepts one after the other; resumes the one it was at."""
    if importlib.util.find_spec("peft") is None:
        raise SystemExit("training a LoRA needs peft; install it with: pip install peft")
    parser = argparse.ArgumentParser(prog="dev.py train lora")
    parser.add_argument("concepts", nargs="*", default=list(vocabulary.LORA_CONCEPTS))
    parser.add_argument("--model", choices=ADAPTED, default="unet", help="the demo model it is for")
    parser.add_argument("--out", type=Path, help="default: the pack's folder of LoRAs")
    parser.add_argument("--minutes", type=float, default=3.0, help="for each concept")
    parser.add_argument("--again", action="store_true", help="also those that are there already")
    options = parser.parse_args(arguments)
    logging.basicConfig(force=True, level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    for concept in options.concepts:
        path = lora_file(concept, options.model, options.out)
        path.parent.mkdir(parents=True, exist_ok=True)
        if options.again or not path.exists():
            write_lora(concept, options.model, options.minutes, path)
    return 0
