"""What to erase and what to keep, as it travels on wires: linked lists, newest first."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from ..choices import check_choice
from ..linked_list import in_order

TEMPLATES: dict[str, tuple[str, ...]] = {
    "none": ("{}",),
    "object": ("{}", "a {}", "a photo of a {}", "an image of a {}", "a picture of a {}", "a painting of a {}"),
    "scene": (
        "{}",
        "a {}",
        "a {}, blue background",
        "a {}, white background",
        "on the left a {}",
        "on the right a {}",
        "on the left a {} and on the right a house",
        "on the left a tree and on the right a {}, red background",
        "a sketch of a {}",
        "flat art of a {}, green background",
    ),
    "artist": ("{}", "painting by {}", "art by {}", "artwork by {}", "picture by {}", "style of {}"),
    "unsafe words": ("{}", "a photo of {}", "an image of {}", "a person, {}"),
}
"""Sentences a concept is put into before it is erased (UCE, 2308.14761, sec. 4): in prompts it never stands alone."""

UNSAFE_WORDS = (
    "hate", "harassment", "violence", "suffering", "humiliation", "harm", "suicide", "sexual", "nudity", "bodily fluids",
    "blood",
)  # fmt: skip
"""The words that RECE (2407.12383) erases together for safer pictures."""

LAST, SPAN, SPAN_TO_END, FIRST_END, ENDS, ALL = (
    "last subject token", "subject", "subject to end", "first end token", "end tokens", "all",
)  # fmt: skip
SCOPES = (SPAN_TO_END, LAST, SPAN, FIRST_END, ENDS, ALL)
"""Which token rows of a prompt are erased. The first token of every prompt never is."""


class Erased(NamedTuple):
    """One concept to erase, after those in ``previous``. An empty ``anchor`` means: nothing in its place. ``names`` are what
    else it is called."""

    concept: str
    anchor: str
    templates: tuple[str, ...]
    scope: str
    weight: float
    names: tuple[str, ...] = ()
    previous: Erased | None = None

    def in_order(self) -> list[Erased]:
        """All concepts of the list, first to last."""
        return in_order(self)


class Preserved(NamedTuple):
    """Prompts that must not move. ``whole`` keeps every token of them, else only the last word and the end."""

    prompts: tuple[str, ...]
    weight: float
    whole: bool = False
    previous: Preserved | None = None

    def in_order(self) -> list[Preserved]:
        """All entries of the list, first to last."""
        return in_order(self)


class Sentence(NamedTuple):
    """One sentence of a concept, the same with its anchor, and the name it calls the concept by."""

    text: str
    anchored: str
    name: str


def sentences(erased: Erased) -> list[Sentence]:
    """Every name of a concept in every template; an empty anchor leaves the concept out."""
    names = (erased.concept, *erased.names)
    return [Sentence(filled_template(t, n), _without(t, erased.anchor), n) for n in names for t in erased.templates]


def filled_template(template: str, name: str) -> str:
    """The sentence with the name in its place; other brackets are words like any others."""
    return template.replace("{}", name)


def _without(template: str, anchor: str) -> str:
    return " ".join(filled_template(template, anchor).split()).strip(" ,")


def check_erased(erased: Erased) -> None:
    """Refuses what cannot be erased.

    Raises:
        ValueError: what is wrong, and what to write instead.
    """
    concept, anchor = erased.concept.strip(), erased.anchor.strip()
    if not concept:
        raise ValueError("There is no concept to erase; write the word or name to take out of the model.")
    if concept.lower() == anchor.lower():
        raise ValueError(
            f"The anchor is the concept itself ('{concept}'), so nothing would change; name what it shall become, or leave "
            "the anchor empty."
        )
    check_choice(SCOPES, erased.scope, "scope")
    if not erased.templates:
        raise ValueError("There is no template; use '{}' for the bare word.")
    for template in erased.templates:
        if template.count("{}") != 1:
            raise ValueError(f"The template '{template}' needs one {{}} where the concept goes.")


def check_preserved(concepts: Sequence[Erased], kept: Sequence[Preserved]) -> None:
    """Refuses lists that ask for both.

    Raises:
        ValueError: a preserved prompt names a concept that is erased, or an anchor is erased itself.
    """
    erased = {name.strip().lower() for c in concepts for name in (c.concept, *c.names)}
    for prompt in (p for entry in kept for p in entry.prompts):
        for name in erased:
            if re.search(rf"\b{re.escape(name)}\b", prompt.lower()):
                raise ValueError(
                    f"'{prompt}' is to be preserved and '{name}' is to be erased, which is the same; take it out of one of the "
                    "two lists."
                )
    for concept in concepts:
        if concept.anchor.strip().lower() in erased:
            raise ValueError(
                f"'{concept.concept}' shall become '{concept.anchor.strip()}', which is erased too; name an anchor that stays."
            )
