"""T2I-Zero on prompts of several objects, without LoRAs: rows of ``dev.py score compose``."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Any, NamedTuple

import comfy.sample
import torch

from ..demo import vocabulary
from ..demo.judge import LEFT, RIGHT, THIRDS, WHOLE
from ..demo.sampling import CFG, SAMPLER, SCHEDULER, STEPS, encode, noise_for
from ..host.compose.suppression import with_suppression
from ..host.text.tokens import correct_objects, encode_with_objects
from .score_model import painter_with, the_judge
from .workers import spread

BOXES = {1: (WHOLE,), 2: (LEFT, RIGHT), 3: THIRDS}
WIDTHS = {1: 128, 2: 128, 3: 192}
SEEDS = (100, 101)


@dataclass(frozen=True)
class Zero:
    """How T2I-Zero is set: of Correction by Similarities, and of Cross-Token Non-Maximum Suppression."""

    correction: float = 0.2
    window: int = 3
    threshold: float = 0.6
    suppression: float = 1.0
    end: float = 0.5


ROWS: dict[str, Zero | None] = {
    "plain prompt": None,
    "t2i-zero": Zero(),
    "t2i-zero, no correction": Zero(correction=0.0),
    "t2i-zero, no suppression": Zero(suppression=0.0),
}


class Asked(NamedTuple):
    """A prompt of these concepts. ``kind`` says how it places them: ``placed`` as in the model's own captions, ``place last``
    and ``one place`` in words it has never read, ``listed`` not at all; ``single`` is one object."""

    kind: str
    concepts: tuple[str, ...]
    text: str


def prompts(count: int) -> Iterator[Asked]:
    """The fixed prompts: ``count`` of each kind and number of objects."""
    rng, backgrounds = Random(11), list(vocabulary.BACKGROUNDS)
    for number in range(count):
        ground = backgrounds[number % len(backgrounds)]
        for size in (1, 2, 3):
            concepts = tuple(rng.sample(vocabulary.CONCEPTS, size))
            for kind, text in _texts(concepts, ground).items():
                yield Asked(kind, concepts, text)


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


def draw(asked: Asked, zero: Zero | None) -> torch.Tensor:
    """The pictures, (seeds, h, w, 3)."""
    painter, concepts = painter_with(None), asked.concepts
    model: Any = painter.model
    positive = encode_with_objects(painter.clip, asked.text, list(concepts))
    if zero:
        model = with_suppression(model, zero.suppression, 0.0, zero.end)
        positive = correct_objects(positive, zero.correction, zero.window, zero.threshold)
    noise = noise_for(list(SEEDS), WIDTHS[len(concepts)])
    latents = comfy.sample.sample(
        model, noise, STEPS, CFG, SAMPLER, SCHEDULER, positive, encode(painter.clip, ""), torch.zeros_like(noise),
        disable_pbar=True, seed=1,
    )  # fmt: skip
    return painter.vae.decode(latents).float()


@torch.inference_mode()
def carry_out(order: tuple[Asked, Zero | None]) -> tuple[list[bool], float]:
    """In which pictures every object is named, wherever it stands; and the seconds of drawing them."""
    asked, zero = order
    started = time.monotonic()
    pictures = draw(asked, zero)
    seconds = time.monotonic() - started
    seen = zip(*([v.name for v in the_judge().look(pictures, box)] for box in BOXES[len(asked.concepts)]), strict=True)
    return [sorted(names) == sorted(asked.concepts) for names in seen], seconds


def score_row(name: str, count: int) -> dict[str, float]:
    """``all_present`` over all prompts of several objects and by kind; ``single_right``; seconds of a picture."""
    todo = list(prompts(count))
    found = list(spread(carry_out, [(asked, ROWS[name]) for asked in todo]))
    kinds: dict[str, list[bool]] = {}
    for asked, (right, _) in zip(todo, found, strict=True):
        size = len(asked.concepts)
        for kind in ("single_right",) if size == 1 else ("all_present", f"{asked.kind}_{size}".replace(" ", "_")):
            kinds.setdefault(kind, []).extend(right)
    return {kind: statistics.mean(right) for kind, right in kinds.items()} | {
        "n": len(kinds["all_present"]),
        "seconds_a_picture": sum(seconds for _, seconds in found) / len(todo) / len(SEEDS),
    }
