"""What to erase and what to preserve, as it travels on wires: linked lists, newest first."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from ..choices import check_choice
from ..linked_list import in_order
from .records import ErasedRecord, PreservedRecord

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
"""Sentences a concept is erased in (UCE, 2308.14761, sec. 4): prompts rarely consist of the bare word."""

UNSAFE_WORDS = (
    "hate",
    "harassment",
    "violence",
    "suffering",
    "humiliation",
    "harm",
    "suicide",
    "sexual",
    "nudity",
    "bodily fluids",
    "blood",
)
"""The words that RECE (2407.12383) erases together for safer pictures."""

LAST = "last subject token"
SPAN = "subject"
SPAN_TO_END = "subject to end"
FIRST_END = "first end token"
ENDS = "end tokens"
ALL = "all"
SCOPES = (SPAN_TO_END, LAST, SPAN, FIRST_END, ENDS, ALL)
"""Which token rows of a prompt are erased. The start token never is."""


class Erased(NamedTuple):
    """One concept to erase, after those in ``previous``.

    An empty ``anchor`` leaves the concept out of the sentence. ``names`` are other words for the concept.
    """

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

    def mapped(self, read: Callable[[str], str]) -> Erased:
        """The same list with every text as ``read`` returns it."""
        previous = None if self.previous is None else self.previous.mapped(read)
        names = tuple(map(read, self.names))
        return self._replace(concept=read(self.concept), anchor=read(self.anchor), names=names, previous=previous)

    def record(self) -> ErasedRecord:
        """This entry as it is in files."""
        return {
            "concept": self.concept,
            "anchor": self.anchor,
            "templates": self.templates,
            "scope": self.scope,
            "weight": self.weight,
            "names": self.names,
            "previous": None,
        }


class Preserved(NamedTuple):
    """Prompts that must not move: every token (``whole``), or only the last word and the end token.

    Each has the ``weight``. Where they are ``averaged``, they are captions of which only the average must not move:
    the weight is that of all together, and a caption may name what is erased.
    """

    prompts: tuple[str, ...]
    weight: float
    whole: bool = False
    previous: Preserved | None = None
    averaged: bool = False

    @property
    def each(self) -> float:
        """The weight of one prompt."""
        return self.weight / max(len(self.prompts), 1) if self.averaged else self.weight

    def in_order(self) -> list[Preserved]:
        """All entries of the list, first to last."""
        return in_order(self)

    def mapped(self, read: Callable[[str], str]) -> Preserved:
        """The same list with every prompt as ``read`` returns it."""
        previous = None if self.previous is None else self.previous.mapped(read)
        return self._replace(prompts=tuple(map(read, self.prompts)), previous=previous)

    def record(self) -> PreservedRecord:
        """This entry as it is in files."""
        return {
            "prompts": self.prompts,
            "weight": self.weight,
            "whole": self.whole,
            "averaged": self.averaged,
            "previous": None,
        }


class Sentence(NamedTuple):
    """One sentence of a concept, the same with its anchor, and the name it uses for the concept."""

    text: str
    anchored: str
    name: str


def erased_of(record: ErasedRecord) -> Erased:
    """The concept of a file's entry."""
    templates, names = tuple(record["templates"]), tuple(record["names"])
    return Erased(record["concept"], record["anchor"], templates, record["scope"], record["weight"], names)


def preserved_prompts(entries: Iterable[Preserved]) -> list[tuple[str, Preserved]]:
    """Every preserved prompt, first to last, with the entry it belongs to."""
    return [(prompt, entry) for entry in entries for prompt in entry.prompts]


def sentences(erased: Erased) -> list[Sentence]:
    """Every name of a concept in every template, with the same sentence about its anchor."""
    names = (erased.concept, *erased.names)
    return [Sentence(filled_template(t, n), _without(t, erased.anchor), n) for n in names for t in erased.templates]


def filled_template(template: str, name: str) -> str:
    """The sentence with the name filled in. Only ``{}`` is replaced; other brackets are ordinary words."""
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
            f"The anchor is the concept itself ('{concept}'), so nothing would change; name another anchor, or "
            "leave the anchor empty."
        )
    check_choice(SCOPES, erased.scope, "scope")
    if not erased.templates:
        raise ValueError("There is no template; add '{}' for the bare word.")
    for template in erased.templates:
        if template.count("{}") != 1:
            raise ValueError(f"The template '{template}' needs one {{}} where the concept goes.")


def check_preserved(concepts: Sequence[Erased], preserved: Sequence[Preserved]) -> None:
    """Refuses lists that contradict each other.

    Raises:
        ValueError: a preserved prompt names a concept that is erased, or an anchor is erased itself.
    """
    erased = {name.strip().lower() for c in concepts for name in (c.concept, *c.names)}
    for prompt, _ in preserved_prompts(entry for entry in preserved if not entry.averaged):
        for name in erased:
            if _names(prompt, name):
                raise ValueError(
                    f"'{prompt}' is to be preserved and '{name}' is to be erased, which is the same; take it out of "
                    "one of the two lists."
                )
    for concept in concepts:
        if concept.anchor.strip().lower() in erased:
            raise ValueError(
                f"'{concept.concept}' becomes '{concept.anchor.strip()}', which is erased too; name an anchor that is "
                "not erased."
            )


def _names(prompt: str, name: str) -> bool:
    """Whether the words of the name stand in the prompt, whatever punctuation is beside them."""
    words, wanted = (re.findall(r"\w+", text.lower()) for text in (prompt, name))
    if not wanted:
        return name.lower() in prompt.lower()
    return any(words[at : at + len(wanted)] == wanted for at in range(len(words) - len(wanted) + 1))


def checked_lists(erased: Erased | None, preserved: Preserved | None) -> tuple[list[Erased], list[Preserved]]:
    """Both lists, first to last, without contradictions.

    Raises:
        ValueError: an entry cannot be used, or the lists contradict each other.
    """
    concepts, entries = in_order(erased), in_order(preserved)
    for concept in concepts:
        check_erased(concept)
    check_preserved(concepts, entries)
    return concepts, entries
