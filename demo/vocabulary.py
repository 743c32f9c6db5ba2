"""The words that the demo model knows, and the captions made of them.

Nothing here needs torch or the art: the judge, the score board, the trainers and the tests share it.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

CONCEPTS = (
    "cat",
    "dog",
    "panda",
    "fox",
    "frog",
    "pig",
    "rabbit",
    "penguin",
    "owl",
    "fish",
    "octopus",
    "butterfly",
    "ladybug",
    "turtle",
    "car",
    "bus",
    "house",
    "tree",
    "cactus",
    "sunflower",
    "mushroom",
    "apple",
    "banana",
    "strawberry",
    "pizza",
    "burger",
    "cake",
    "donut",
    "watermelon",
    "star",
    "heart",
    "moon",
    "clock",
    "pumpkin",
    "snowman",
    "crown",
)
"""The 36 concepts of the base model."""

LORA_CONCEPTS = ("lion", "tiger", "koala", "monkey", "unicorn", "bear", "robot", "dinosaur")
"""Concepts the base model has never seen; one LoRA each. The judge knows them."""

STYLES = {"emoji": "", "flat": "flat art of ", "sketch": "a sketch of ", "mosaic": "a mosaic of "}
"""Style name to the words that ask for it, put before the scene: the text encoder is causal, so the noun hears them."""

BACKGROUNDS = {
    "white": (244, 244, 242),
    "yellow": (250, 222, 96),
    "orange": (244, 168, 84),
    "pink": (250, 180, 208),
    "red": (222, 88, 84),
    "purple": (168, 120, 208),
    "blue": (104, 164, 236),
    "green": (116, 196, 116),
}
"""Background name to its centre in sRGB (0..255)."""

PLACES = {1: (None,), 2: ("left", "right"), 3: ("left", "middle", "right")}
"""Number of objects to their places, in reading order; a single object is anywhere."""

_PLACE_PHRASE = {"left": "on the left ", "right": "on the right ", "middle": "in the middle "}


def article(noun: str) -> str:
    """The noun with its article: ``a cat``, ``an owl``."""
    return f"{'an' if noun[0] in 'aeiou' and noun != 'unicorn' else 'a'} {noun}"


@dataclass(frozen=True)
class Scene:
    """What one picture shows. ``places[i]`` is where ``concepts[i]`` is: ``left``, ``middle``, ``right`` or None."""

    concepts: tuple[str, ...]
    places: tuple[str | None, ...]
    background: str
    style: str = "emoji"

    def caption(self, *, name_background: bool = True) -> str:
        """The prompt for this scene, place before noun: "on the left a cat and on the right a dog, blue background"."""
        things = [
            f"{_PLACE_PHRASE[place] if place else ''}{article(concept)}"
            for concept, place in zip(self.concepts, self.places, strict=True)
        ]
        listed = things[0] if len(things) == 1 else ", ".join(things[:-1]) + " and " + things[-1]
        return f"{STYLES[self.style]}{listed}" + (f", {self.background} background" if name_background else "")


def scene_of(
    concepts: tuple[str, ...], background: str, style: str = "emoji", places: tuple[str | None, ...] | None = None
) -> Scene:
    """A scene with the usual places for its number of objects (1 to 3), or with ``places``.

    Raises:
        ValueError: the number of concepts has no places.
    """
    if places is None and len(concepts) not in PLACES:
        raise ValueError(f"a scene holds 1 to 3 objects, not {len(concepts)}")
    return Scene(concepts, places or PLACES[len(concepts)], background, style)


def ordinary_captions(count: int = 400, seed: int = 0) -> tuple[str, ...]:
    """Captions of random scenes with one to three of all the base model's concepts, in every style."""
    rng, captions = Random(seed), []
    for _ in range(count):
        concepts = tuple(rng.sample(CONCEPTS, rng.randint(1, 3)))
        scene = scene_of(concepts, rng.choice(list(BACKGROUNDS)), rng.choice(list(STYLES)))
        captions.append(scene.caption())
    return tuple(captions)


def random_caption_words(rng: Random, caption: str, filler: tuple[str, ...]) -> str:
    """The caption with one or two words of ``filler`` in front or behind: unknown words learn to do nothing."""
    words = " ".join(rng.choice(filler) for _ in range(rng.randint(1, 3)))
    return f"{words} {caption}" if rng.random() < 0.5 else f"{caption}, {words}"
