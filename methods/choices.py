"""Choices by name, with one refusal for a name that is not on the list. Hosts do not check every combo."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

Value = TypeVar("Value")


def chosen(table: Mapping[str, Value], name: str, what: str) -> Value:
    """The entry of that name.

    Args:
        what: what is chosen, as the refusal calls it.

    Raises:
        ValueError: the table has no such name; the message lists the names it has.
    """
    check_choice(table, name, what)
    return table[name]


def check_choice(names: Iterable[str], name: str, what: str) -> None:
    """Refuses a name that is not one of ``names``.

    Raises:
        ValueError: with the names there are.
    """
    known = list(names)
    if name not in known:
        raise ValueError(f"There is no {what} '{name}'; choose one of: {', '.join(known)}.")
