"""Which concept goes into which region: by the region's label, and for the other regions in order."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Protocol, TypeVar

from .regions import Region


class Labelled(Protocol):
    """A concept that regions can name. ``labels`` are as ``as_label`` makes them."""

    @property
    def name(self) -> str: ...
    @property
    def phrase(self) -> str: ...
    @property
    def strength(self) -> float: ...
    @property
    def labels(self) -> set[str]: ...


log = logging.getLogger(__name__)
AnyConcept = TypeVar("AnyConcept", bound=Labelled)


def as_label(text: str) -> str:
    """A label or a phrase as they are compared: in small letters, without blanks around it and without an article."""
    return re.sub(r"^(an?|the) ", "", text.strip().lower())


def assigned_concepts(concepts: Sequence[AnyConcept], regions: Sequence[Region]) -> list[AnyConcept]:
    """A concept for each region: the one its label names, by name or by phrase. Other regions get the rest in order.

    Concepts with the same label take its regions in turn. A concept may have several regions. A label that names no
    concept is said in the log, with the concept that its region gets.

    Raises:
        ValueError: a region is left over, or a concept that has a strength.
    """
    found = _named(concepts, regions)
    rest = [c for c in concepts if c not in found.values()]
    others = [number for number in range(len(regions)) if number not in found]
    if len(others) > len(rest):
        raise ValueError(
            f"There are {len(concepts)} concepts and {len(regions)} regions; draw one region per concept, connect the "
            "last Concept of the chain, or label every region with a concept's phrase, so that one concept can have "
            "several."
        )
    found |= dict(zip(others, rest, strict=False))
    _say_what_names_nobody(concepts, [(regions[number].label, found[number]) for number in others])
    # a concept without strength is left out of the picture, and so of the regions that an earlier run has found
    unused = [c for c in rest[len(others) :] if c.strength != 0]
    if unused:
        raise ValueError(
            f"The concept '{unused[0].name}' has no region; draw one for it, label one with its phrase "
            f"'{unused[0].phrase}', or take the concept out."
        )
    return [found[number] for number in range(len(regions))]


def _say_what_names_nobody(concepts: Sequence[AnyConcept], taken: Sequence[tuple[str, AnyConcept]]) -> None:
    """Says which labels are of no concept, and which concepts their regions got in order."""
    there = ", ".join(concept.phrase or concept.name for concept in concepts)
    for label, concept in taken:
        if label.strip():
            log.warning(
                "The region label '%s' names no concept (%s); its region gets the next one in order, '%s'.",
                label,
                there,
                concept.phrase or concept.name,
            )


def _named(concepts: Sequence[AnyConcept], regions: Sequence[Region]) -> dict[int, AnyConcept]:
    """The concepts of the regions whose labels name one, by the region's number."""
    named = [[c for c in concepts if as_label(region.label) in c.labels] for region in regions]
    found: dict[int, AnyConcept] = {}
    # a label that names only one concept comes first: another label that could name it too then leaves it
    for number in sorted(range(len(regions)), key=lambda number: len(named[number])):
        if named[number]:
            uses = list(found.values())
            found[number] = min(named[number], key=uses.count)
    return found
