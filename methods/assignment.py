"""Which concept goes into which region: by the region's label, and for the other regions in order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

from .regions import Region


class Labelled(Protocol):
    """A concept that regions can name. ``labels`` are in small letters, without blanks around them."""

    @property
    def name(self) -> str: ...
    @property
    def phrase(self) -> str: ...
    @property
    def strength(self) -> float: ...
    @property
    def labels(self) -> set[str]: ...


AnyConcept = TypeVar("AnyConcept", bound=Labelled)


def assigned_concepts(concepts: Sequence[AnyConcept], regions: Sequence[Region]) -> list[AnyConcept]:
    """A concept for each region: the one its label names, by name or by phrase. Other regions get the rest in order.

    Concepts with the same label take its regions in turn. A concept may have several regions.

    Raises:
        ValueError: a region is left over, or a concept that has a strength.
    """
    found = _named(concepts, regions)
    rest = [c for c in concepts if c not in found.values()]
    others = [number for number in range(len(regions)) if number not in found]
    if len(others) > len(rest):
        raise ValueError(
            f"There are {len(concepts)} concepts and {len(regions)} regions; draw one region per concept, or label "
            "every region with a concept's phrase, so that one concept can have several."
        )
    found |= dict(zip(others, rest, strict=False))
    # a concept without strength is left out of the picture, and so of the regions that an earlier run has found
    unused = [c for c in rest[len(others) :] if c.strength != 0]
    if unused:
        raise ValueError(
            f"The concept '{unused[0].name}' has no region; draw one for it, label one with its phrase "
            f"'{unused[0].phrase}', or take the concept out."
        )
    return [found[number] for number in range(len(regions))]


def _named(concepts: Sequence[AnyConcept], regions: Sequence[Region]) -> dict[int, AnyConcept]:
    """The concepts of the regions whose labels name one, by the region's number."""
    named = [[c for c in concepts if region.label.strip().lower() in c.labels] for region in regions]
    found: dict[int, AnyConcept] = {}
    # a label that names only one concept comes first: another label that could name it too then leaves it
    for number in sorted(range(len(regions)), key=lambda number: len(named[number])):
        if named[number]:
            uses = list(found.values())
            found[number] = min(named[number], key=uses.count)
    return found
