"""A jigsaw of 4 × 4 interlocking pieces, drawn analytically at any size divisible by 4.

Pieces of one kind fit each other's places: on the border ring every edge bulges clockwise, every edge between border
and inside bulges inwards, and the inner four bulge clockwise. Then all corners are one shape turned, and so are all
inner pieces. All border pieces are one shape turned and moved. Each kind may be permuted freely.
"""

from __future__ import annotations

import torch

from .base import Settings, View, enlarged, permutation, shuffled

_CORNERS = ((0, 0), (0, 3), (3, 3), (3, 0))  # clockwise; the place's number is its turn
_INNER = ((1, 1), (1, 2), (2, 2), (2, 1))
_BORDER = ((0, 1), (0, 2), (1, 3), (2, 3), (3, 2), (3, 1), (2, 0), (1, 0))  # clockwise; two a side
# cells whose lower edge bulges down: clockwise on the right border, inwards from the top border, clockwise inside
_BULGING_DOWN = ((0, 3), (1, 3), (2, 3), (0, 1), (0, 2), (1, 2))


def _tab(side: int) -> list[tuple[int, int]]:
    """A tab on the upper edge of a cell, as (row above the edge, column), both in whole pixels: part of a disc."""
    radius = 0.22 * side
    centre_row, centre_column = 0.6 * radius, (side - 1) / 2
    return [
        (row, column)
        for row in range(side // 2)
        for column in range(side)
        if (row + 0.5 - centre_row) ** 2 + (column - centre_column) ** 2 < radius**2
    ]


def piece_map(size: int) -> torch.Tensor:
    """Which piece each pixel belongs to, (size, size); piece ``row · 4 + column`` is named after its cell."""
    side = size // 4
    cell = torch.arange(size) // side
    labels = cell[:, None] * 4 + cell[None]
    for quarter in range(4):
        # with the picture turned a quarter at a time, every edge is once the lower edge of one of these cells
        turned = torch.rot90(labels, quarter, dims=(0, 1))
        for row, column in _BULGING_DOWN:
            _bulge(turned, row, column, side)
        labels = torch.rot90(turned, -quarter, dims=(0, 1))
    return labels


def _bulge(labels: torch.Tensor, row: int, column: int, side: int) -> None:
    """Stamps a tab of the cell (row, column) across its lower edge onto the cell below."""
    edge = (row + 1) * side
    giver = labels[row * side + side // 2, column * side + side // 2].clone()
    for depth, offset in _tab(side):
        labels[edge + depth, column * side + offset] = giver


def _turns(kind: tuple[tuple[int, int], ...], number: int) -> int:
    """How many quarters clockwise the piece at that place is turned against the first of its kind."""
    return number * 4 // len(kind)


def jigsaw(settings: Settings) -> View:
    """The pieces of a jigsaw put back in other places: corners among corners, borders among borders, inner among inner.

    Raises:
        ValueError: used on a canvas that has no multiple of 4 cells a side.
    """

    def index(height: int, width: int) -> torch.Tensor:
        if height % (4 * settings.cell):
            raise ValueError(
                f"The pieces of this jigsaw end at cells of {settings.cell} px, and a side of {height} px is not four "
                "equal rows of them; take the picture in the size it was decoded in, or leave the VAE out."
            )
        labels = enlarged(piece_map(height // settings.cell), settings.cell)
        side = height // 4
        source = torch.full((height, width), -1)
        for kind_number, kind in enumerate((_CORNERS, _INNER, _BORDER)):
            order = shuffled(len(kind), settings.seed * 3 + kind_number).tolist()
            for target, origin in enumerate(order):
                _move_piece(
                    source, labels, kind[origin], kind[target], _turns(kind, target) - _turns(kind, origin), side
                )
        return source.flatten()

    return permutation("jigsaw", index, square=True, parts=4)


def _move_piece(
    source: torch.Tensor,
    labels: torch.Tensor,
    origin: tuple[int, int],
    target: tuple[int, int],
    quarters: int,
    side: int,
) -> None:
    """Writes into ``source`` where each pixel of the piece at ``target`` comes from: the piece at ``origin``,
    turned."""
    size = len(labels)
    y, x = torch.nonzero(labels == origin[0] * 4 + origin[1], as_tuple=True)
    # twice the offset from the piece's cell centre keeps half pixels whole
    dy, dx = 2 * y - (2 * origin[0] + 1) * side + 1, 2 * x - (2 * origin[1] + 1) * side + 1
    for _ in range(quarters % 4):
        dy, dx = dx, -dy  # a quarter clockwise
    to_y, to_x = (dy + (2 * target[0] + 1) * side - 1) // 2, (dx + (2 * target[1] + 1) * side - 1) // 2
    source[to_y, to_x] = y * size + x
