"""A choice by name, and the list that a graph grows link by link."""

from __future__ import annotations

from typing import NamedTuple

import pytest
from comfyui_concepts.methods.choices import check_choice, chosen
from comfyui_concepts.methods.linked_list import in_order


class _Link(NamedTuple):
    item: str
    previous: _Link | None


def test_a_choice_is_its_entry():
    assert chosen({"off": 0, "on": 1}, "on", "switch") == 1


def test_an_unknown_choice_is_refused_with_the_names_there_are():
    with pytest.raises(ValueError, match="There is no switch 'half'; choose one of: off, on"):
        check_choice(("off", "on"), "half", "switch")


def test_links_are_listed_first_to_last_and_no_link_is_an_empty_list():
    first = _Link("a", None)
    assert in_order(_Link("b", first)) == [first, _Link("b", first)]
    assert in_order(None) == []
