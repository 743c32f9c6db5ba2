"""Linked lists that grow by a link per node of a graph: the newest link comes first and knows the one before it.

Works on hosts without dynamic inputs: a node takes the list so far and returns it with one more link.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from typing_extensions import Self


class Link(Protocol):
    """One link of a list: whatever a node adds, and the links before it."""

    @property
    def previous(self) -> Self | None: ...


AnyLink = TypeVar("AnyLink", bound=Link)


def in_order(newest: AnyLink | None) -> list[AnyLink]:
    """All links of a list, first to last; no link is an empty list."""
    links: list[AnyLink] = []
    link = newest
    while link is not None:
        links.append(link)
        link = link.previous
    return links[::-1]
