"""At what size a picture is filmed: small enough, and cut up by its views as the whole picture is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class FilmSize(NamedTuple):
    """Sides in px, and the side of what a latent cell is at that size (1 where pieces end at pixels)."""

    height: int
    width: int
    cell: int


def film_size(height: int, width: int, cell: int, largest: int, parts: Sequence[int]) -> FilmSize:
    """The largest size with no side over ``largest`` px at which the picture keeps its number of cells.

    Where cells would vanish, it is the largest size that its views can cut.

    Args:
        height, width: of the picture, multiples of ``cell`` and of every one of ``parts``.
        parts: into how many equal parts each of the views cuts a side.

    Returns:
        The picture's own size if it is small enough. A side is over ``largest`` only if the parts allow no less.
    """
    if max(height, width) <= largest:
        return FilmSize(height, width, cell)
    unit = math.lcm(*parts)  # divides both sides, since every one of the parts does
    rows, columns = height // cell, width // cell
    for smaller in range(min(cell - 1, largest // max(rows, columns)), 0, -1):
        if not (rows * smaller % unit or columns * smaller % unit):
            return FilmSize(rows * smaller, columns * smaller, smaller)
    shrink = max(height, width) / largest
    high, wide = (max(unit, int(side / shrink) // unit * unit) for side in (height, width))
    return FilmSize(high, wide, 1)
