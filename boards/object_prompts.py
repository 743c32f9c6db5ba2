"""T2I-Zero on prompts of several objects, without LoRAs: rows of ``dev.py score compose``."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Any, NamedTuple

import comfy.sample
import numpy as np
import torch

from ..demo import vocabulary
from ..demo.judge import LEFT, RIGHT, THIRDS, WHOLE
from ..demo.sampling import encode, noise_for
from ..host.compose.objects import correct_objects, encode_with_objects
from ..host.compose.suppression import with_suppression
from .board import Figures, Job
from .demo_models import sampler_with, the_judge

BOXES = {1: (WHOLE,), 2: (LEFT, RIGHT), 3: THIRDS}
WIDTHS = {1: 128, 2: 128, 3: 192}
SEEDS = (100, 101)


@dataclass(frozen=True)
class ZeroSettings:
    """T2I-Zero: ``correction`` to ``threshold`` of Correction by Similarities, the rest of its suppression."""

    correction: float = 0.2
    window: int = 3
    threshold: float = 0.6
    suppression: float = 1.0
    end: float = 0.5


ROWS: dict[str, ZeroSettings | None] = {
    "plain prompt": None,
    "t2i-zero": ZeroSettings(),
    "t2i-zero, no correction": ZeroSettings(correction=0.0),
    "t2i-zero, no suppression": ZeroSettings(suppression=0.0),
}


class ObjectPrompt(NamedTuple):
    """A prompt of these concepts.

    ``kind`` says how it places them: ``placed`` as in the model's own captions, ``place last`` and ``one place`` in
    words it has never read, ``listed`` not at all. ``single`` is one object.
    """

    kind: str
    concepts: tuple[str, ...]
    text: str


def prompts(count: int) -> Iterator[ObjectPrompt]:
    """The fixed prompts: ``count`` of each kind and number of objects."""
    rng, backgrounds = Random(11), list(vocabulary.BACKGROUNDS)
    for number in range(count):
        ground = backgrounds[number % len(backgrounds)]
        for size in (1, 2, 3):
            concepts = tuple(rng.sample(vocabulary.CONCEPTS, size))
            for kind, text in _texts(concepts, ground).items():
                yield ObjectPrompt(kind, concepts, text)


def _texts(concepts: tuple[str, ...], ground: str) -> dict[str, str]:
    """The prompts of some concepts, by kind."""
    usual = vocabulary.scene_of(concepts, ground).caption()
    if len(concepts) == 1:
        return {"single": usual}
    found = {"placed": usual, "listed": vocabulary.scene_of(concepts, ground, places=(None,) * len(concepts)).caption()}
    if len(concepts) == 2:
        left, right = map(vocabulary.article, concepts)
        found["place last"] = f"{left} on the left and {right} on the right, {ground} background"
        found["one place"] = f"{left} and on the right {right}, {ground} background"
    return found


@dataclass
class ObjectMetrics:
    """In which pictures every object is named, by kind of prompt, and the seconds of drawing them."""

    right: dict[str, list[bool]] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)

    def add(self, other: ObjectMetrics) -> None:
        """Takes in the counts of other prompts."""
        for kind, right in other.right.items():
            self.right.setdefault(kind, []).extend(right)
        self.seconds += other.seconds

    def figures(self) -> Figures:
        """``all_present`` over all prompts of several objects and by kind; ``single_right``; seconds per picture."""
        return {kind: statistics.mean(right) for kind, right in self.right.items()} | {
            "n": len(self.right["all_present"]),
            "seconds_a_picture": sum(self.seconds) / len(self.seconds) / len(SEEDS),
        }

    def remarks(self) -> list[str]:
        return []


def sampled_pictures(prompt: ObjectPrompt, zero: ZeroSettings | None, kind: str = "unet") -> torch.Tensor:
    """The pictures of a kind of demo model, (seeds, h, w, 3)."""
    demo, concepts = sampler_with(None, kind), prompt.concepts
    model: Any = demo.model
    positive = encode_with_objects(demo.clip, prompt.text, list(concepts))
    if zero:
        model = with_suppression(model, zero.suppression, 0.0, zero.end)
        positive = correct_objects(positive, zero.correction, zero.window, zero.threshold)
    noise = noise_for(list(SEEDS), WIDTHS[len(concepts)], kind=kind)
    conditionings = positive, encode(demo.clip, "")
    latents = comfy.sample.sample(
        model, noise, *demo.settings, *conditionings, torch.zeros_like(noise), disable_pbar=True, seed=1
    )
    return demo.vae.decode(latents).float()


@torch.inference_mode()
def run_job(job: Job[ObjectPrompt], kind: str = "unet") -> tuple[ObjectMetrics, np.ndarray]:
    """One prompt by one row, on a kind of demo model. An object is right wherever it is in the picture."""
    concepts, started = job.task.concepts, time.monotonic()
    pictures = sampled_pictures(job.task, ROWS[job.method], kind)
    seconds = time.monotonic() - started
    named = zip(*([v.name for v in the_judge().look(pictures, box)] for box in BOXES[len(concepts)]), strict=True)
    right = [sorted(names) == sorted(concepts) for names in named]
    placed = f"{job.task.kind}_{len(concepts)}".replace(" ", "_")
    kinds = ("single_right",) if len(concepts) == 1 else ("all_present", placed)
    metrics = ObjectMetrics({k: list(right) for k in kinds}, [seconds])
    return metrics, (pictures * 255).round().byte().numpy()
