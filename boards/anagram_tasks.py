"""What the boards of anagrams ask for: the pairs and triples of concepts, and the views they are seen in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from ..demo import vocabulary
from ..methods.anagram.views import Settings, View, view_named

Concepts = tuple[str, ...]

# fmt: off  (tables)
TURNED: tuple[Concepts, ...] = (
    ("apple", "heart"),
    ("banana", "pizza"),
    ("banana", "star"),
    ("car", "apple"),
    ("car", "watermelon"),
    ("dog", "rabbit"),
    ("frog", "strawberry"),
    ("mushroom", "cake"),
    ("mushroom", "strawberry"),
    ("owl", "banana"),
    ("penguin", "banana"),
    ("penguin", "owl"),
    ("penguin", "sunflower"),
    ("penguin", "tree"),
    ("pizza", "heart"),
    ("pizza", "watermelon"),
    ("star", "heart"),
    ("star", "moon"),
    ("strawberry", "heart"),
    ("sunflower", "apple"),
    ("tree", "apple"),
    ("tree", "cactus"),
    ("turtle", "pumpkin"),
    ("turtle", "watermelon"),
)
QUARTERED: tuple[Concepts, ...] = (
    ("apple", "heart"),
    ("apple", "strawberry"),
    ("banana", "moon"),
    ("banana", "star"),
    ("banana", "watermelon"),
    ("cactus", "mushroom"),
    ("cactus", "snowman"),
    ("cake", "star"),
    ("car", "banana"),
    ("car", "cactus"),
    ("cat", "rabbit"),
    ("dog", "pizza"),
    ("fish", "pumpkin"),
    ("mushroom", "strawberry"),
    ("owl", "bus"),
    ("owl", "fish"),
    ("owl", "pizza"),
    ("penguin", "car"),
    ("penguin", "tree"),
    ("penguin", "turtle"),
    ("rabbit", "bus"),
    ("star", "moon"),
    ("tree", "apple"),
    ("tree", "cactus"),
)
SAWN: tuple[Concepts, ...] = (
    ("apple", "heart"),
    ("apple", "strawberry"),
    ("banana", "pizza"),
    ("bus", "snowman"),
    ("car", "pizza"),
    ("car", "strawberry"),
    ("car", "sunflower"),
    ("cat", "frog"),
    ("cat", "snowman"),
    ("fish", "sunflower"),
    ("fox", "car"),
    ("frog", "crown"),
    ("ladybug", "car"),
    ("owl", "bus"),
    ("panda", "rabbit"),
    ("pizza", "star"),
    ("star", "moon"),
    ("strawberry", "burger"),
    ("strawberry", "heart"),
    ("strawberry", "pizza"),
    ("tree", "sunflower"),
    ("turtle", "cactus"),
    ("turtle", "sunflower"),
    ("turtle", "tree"),
)
TILED: tuple[Concepts, ...] = (
    ("apple", "banana"),
    ("banana", "heart"),
    ("banana", "star"),
    ("burger", "star"),
    ("cactus", "banana"),
    ("car", "banana"),
    ("cat", "moon"),
    ("dog", "star"),
    ("fox", "apple"),
    ("fox", "banana"),
    ("fox", "burger"),
    ("mushroom", "banana"),
    ("mushroom", "pizza"),
    ("penguin", "sunflower"),
    ("pizza", "star"),
    ("rabbit", "banana"),
    ("rabbit", "pizza"),
    ("star", "heart"),
    ("star", "moon"),
    ("sunflower", "banana"),
    ("sunflower", "star"),
    ("tree", "banana"),
    ("tree", "star"),
    ("turtle", "star"),
)
TURNED_BY_DIT: tuple[Concepts, ...] = (
    ("apple", "heart"),
    ("banana", "pizza"),
    ("banana", "star"),
    ("burger", "cake"),
    ("butterfly", "ladybug"),
    ("butterfly", "turtle"),
    ("car", "mushroom"),
    ("car", "watermelon"),
    ("dog", "snowman"),
    ("owl", "banana"),
    ("owl", "pumpkin"),
    ("penguin", "cactus"),
    ("pizza", "cake"),
    ("pizza", "watermelon"),
    ("rabbit", "owl"),
    ("rabbit", "snowman"),
    ("star", "moon"),
    ("strawberry", "burger"),
    ("strawberry", "donut"),
    ("strawberry", "heart"),
    ("strawberry", "pizza"),
    ("turtle", "pumpkin"),
    ("turtle", "tree"),
    ("turtle", "watermelon"),
)
# fmt: on
PAIRS = {
    "unet": {"flip": TURNED, "rotate_180": TURNED, "rotate_cw": QUARTERED, "jigsaw": SAWN, "patch_permute": TILED},
    "dit": {"flip": TURNED_BY_DIT, "rotate_180": TURNED_BY_DIT},
}
"""For the demo model that chose them and each kind of view, 24 of the 630 pairs of the vocabulary: those that two ways
of combining do best together, on other seeds (``dev.py score pairs``). Half turns, quarter turns and cuts bend other
things into each other, and so does another model."""
# fmt: off
TRIPLES: tuple[Concepts, ...] = (
    ("moon", "banana", "star"), ("heart", "apple", "strawberry"), ("frog", "cactus", "turtle"),
    ("pumpkin", "fox", "cat"),
    ("rabbit", "snowman", "panda"), ("burger", "pizza", "dog"), ("ladybug", "car", "clock"),
    ("pig", "donut", "octopus"),
)
# fmt: on
THREE = "three views"
SETS_OF_THREE = (("identity", "rotate_180", "flip"), ("identity", "rotate_cw", "rotate_180"))
TILES = 2  # of patch_permute, a side: the latent has 16 × 16 cells, and in a tile of 4 × 4 nothing can be drawn
SHUFFLE = 7  # the seed of the views that shuffle: with it, none of the four tiles stays where it is


class AnagramTask(NamedTuple):
    """What one anagram must show: a concept for each view, named."""

    concepts: Concepts
    names: tuple[str, ...]
    background: str

    def views(self, cell: int = 1) -> list[View]:
        """On a latent, or with the side of its cells in pixels as they are seen on its picture."""
        return [view_named(n, Settings(TILES if n == "patch_permute" else 0, SHUFFLE, cell)) for n in self.names]

    @property
    def kind(self) -> str:
        return self.names[1] if len(self.names) == 2 else THREE


def tasks(pairs: Mapping[str, Iterable[Concepts]], triples: Iterable[Concepts] = ()) -> Iterator[AnagramTask]:
    """The fixed tasks of these concepts: the pairs of each kind of view, then sets of three views."""
    for kind, some in pairs.items():
        for concepts in some:
            yield AnagramTask(concepts, ("identity", kind), background_for(concepts))
    for number, concepts in enumerate(triples):
        yield AnagramTask(concepts, SETS_OF_THREE[number % len(SETS_OF_THREE)], background_for(concepts))


def background_for(concepts: Concepts) -> str:
    """The same for the same concepts in every kind of view: on another background they are another task."""
    backgrounds = list(vocabulary.BACKGROUNDS)
    return backgrounds[sum(map(vocabulary.CONCEPTS.index, concepts)) % len(backgrounds)]


def caption_of(concept: str, background: str) -> str:
    return vocabulary.scene_of((concept,), background).caption()
