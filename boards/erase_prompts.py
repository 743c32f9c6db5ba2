"""What the erasure board erases, what it preserves, and the prompts it draws."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from random import Random

from ..demo import vocabulary
from ..demo.judge import LEFT, RIGHT, WHOLE

Pairs = tuple[tuple[str, str], ...]
"""Concepts to erase, each with its anchor."""
# fmt: off  (tables)
TARGETS: Pairs = (
    ("cat", "dog"),
    ("car", "bus"),
    ("apple", "strawberry"),
    ("star", "heart"),
    ("owl", "penguin"),
    ("pizza", "burger"),
    ("tree", "cactus"),
    ("frog", "turtle"),
    ("moon", "banana"),
    ("fish", "octopus"),
    ("donut", "cake"),
    ("ladybug", "butterfly"),
)
# fmt: on
"""What is erased, and what it becomes: a neighbour of like shape or kind that is never erased."""
UNLISTED = ("rabbit", "house", "clock", "watermelon")
GROUPS: dict[int, tuple[Pairs, ...]] = {
    1: tuple((t,) for t in TARGETS),
    3: tuple(TARGETS[i : i + 3] for i in (0, 3, 6, 9)),
    5: (TARGETS[:5], TARGETS[5:10], TARGETS[7:12]),
    10: (TARGETS[:10], TARGETS[2:12]),
}
TURNS = {1: 8, 3: 2, 5: 1, 10: 1}
"""Concepts of a group → pictures of each, plainly and in a paraphrase: alone, on every background."""
PRESERVED_PROMPTS = 200
# fmt: off
TEMPLATES = (
    "{}", "{}, blue background", "{}, red background", "a sketch of {}, white background", "flat art of {}",
    "a mosaic of {}, orange background", "on the left {}", "on the left {} and on the right a heart, pink background",
    "on the left a bus and on the right {}, green background", "a sketch of on the left a dog and on the right {}",
)
# fmt: on
PARAPHRASES = (
    "{bare}",
    "the {bare}, {bg} background",
    "{bg} background, {a}",
    "nice picture with {a}, {bg} background",
)
"""Ways to ask that no template has; {a} is the concept with its article."""


@dataclass(frozen=True)
class ErasePrompt:
    """One picture to draw and what to look for. ``role``: erased, paraphrase, kept, unlisted or pair."""

    text: str
    role: str
    concept: str
    background: str
    box: tuple[float, float, float, float] = WHOLE


@cache
def preserved_prompts(pairs: Pairs) -> tuple[str, ...]:
    """The prompts of Preserve Concepts: scenes of everything that is not erased and not left out on purpose."""
    rng, gone = Random(9), {c for c, _ in pairs}
    pool = [c for c in vocabulary.CONCEPTS if c not in gone and c not in UNLISTED]
    scenes = []
    for _ in range(PRESERVED_PROMPTS):
        style = rng.choice(list(vocabulary.STYLES)) if rng.random() < 0.4 else "emoji"
        concepts = tuple(rng.sample(pool, rng.choice((1, 2))))
        scenes.append(vocabulary.scene_of(concepts, rng.choice(list(vocabulary.BACKGROUNDS)), style).caption())
    return tuple(dict.fromkeys(scenes))


def prompts_of_group(pairs: Pairs, preserved: int) -> Iterator[ErasePrompt]:
    """What is drawn for one group."""
    backgrounds, gone = list(vocabulary.BACKGROUNDS), [c for c, _ in pairs]
    stays = [c for c in vocabulary.CONCEPTS if c not in gone and c not in UNLISTED]
    rng = Random(len(gone) * 100 + len(gone[0]))
    for number, concept in enumerate(gone):
        for turn in range(TURNS[len(gone)]):
            ground = backgrounds[(3 * number + 5 * turn) % 8]
            yield ErasePrompt(vocabulary.scene_of((concept,), ground).caption(), "erased", concept, ground)
            words = PARAPHRASES[(2 * number + turn) % len(PARAPHRASES)]
            text = words.format(bare=concept, a=vocabulary.article(concept), bg=ground)
            yield ErasePrompt(text, "paraphrase", concept, ground)
    for number, concept in enumerate(rng.sample(stays, min(preserved, len(stays)))):
        ground = backgrounds[(3 * number + 1) % 8]
        yield ErasePrompt(vocabulary.scene_of((concept,), ground).caption(), "kept", concept, ground)
        if number % 3 == 0:
            other = gone[number // 3 % len(gone)]
            scene = (concept, other) if number % 2 else (other, concept)
            text = vocabulary.scene_of(scene, ground).caption()
            yield ErasePrompt(text, "pair", concept, ground, LEFT if number % 2 else RIGHT)
    for number, concept in enumerate(UNLISTED[: max(2, preserved // 4)]):
        ground = backgrounds[(2 * number + 1) % 8]
        yield ErasePrompt(vocabulary.scene_of((concept,), ground).caption(), "unlisted", concept, ground)
