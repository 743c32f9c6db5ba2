"""Where the prompts of several concepts lie in one text, one behind another."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

from .groups import Extent


class Place(NamedTuple):
    """Where one prompt is, and how far it goes with what the network fills it up with."""

    text: Extent
    filled: Extent


class Slots(NamedTuple):
    """The part of the text that each prompt has, and the prompts' places in them, entry by entry.

    Prompts of one slot may be of unequal length. Nobody reads what is of a slot and of no prompt.
    """

    slots: tuple[Extent, ...]
    places: tuple[tuple[Place, ...], ...]

    @property
    def length(self) -> int:
        """Of the whole text."""
        return self.slots[-1].stop


def slots_for(lengths: Sequence[Sequence[int]], multiple: int = 1, at_end: bool = False) -> Slots:
    """The slots for prompts of these lengths, each as long as its longest prompt.

    Args:
        lengths: of every entry's prompts; all entries have as many prompts.
        multiple: the network fills prompts up to a multiple of that many tokens.
        at_end: prompts end with their slots, because the picture lies right behind them; else they begin with them.
    """
    filled = [[-(-length // multiple) * multiple for length in entry] for entry in lengths]
    ends = accumulate((max(sizes) for sizes in zip(*filled, strict=True)), initial=0)
    slots = tuple(Extent(*ends_of_one) for ends_of_one in pairwise(ends))
    places = tuple(
        tuple(_place(*of_prompt, at_end) for of_prompt in zip(slots, entry, wide, strict=True))
        for entry, wide in zip(lengths, filled, strict=True)
    )
    return Slots(slots, places)


def _place(slot: Extent, length: int, filled: int, at_end: bool) -> Place:
    start = slot.stop - filled if at_end else slot.start
    return Place(Extent(start, start + length), Extent(start, start + filled))
