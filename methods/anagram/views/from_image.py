"""A view that a user paints: a picture that says where each pixel comes from."""

from __future__ import annotations

from itertools import product

import torch
import torch.nn.functional as F

from .base import SYMMETRIES, View, permutation


def from_image(image: torch.Tensor, cell: int = 1) -> View:
    """The permutation a picture describes as a UV map: red is the column a place is filled from, green the row (0 to
    1).

    Places are sorted by their row and cut into rows, then each row by its column. The result is always a permutation,
    and only the order in the map counts: painted gradients are followed exactly.

    Args:
        image: (height, width, channels ≥ 2), values 0 to 1, of any size; it is read at the size of the canvas.
        cell: side of a latent cell in pixels, for the view on a picture. Whole cells move then, as on the latent.

    Raises:
        ValueError: fewer than two channels, or values that are not numbers.
    """
    if image.ndim != 3 or image.shape[-1] < 2 or not torch.isfinite(image).all():
        raise ValueError(
            f"A view from a picture needs a colour picture, and this one has the shape {tuple(image.shape)}; "
            "paint red from left to right and green from top to bottom for the view that changes nothing."
        )
    asked = image[..., :2].float().clamp(0, 1).movedim(-1, 0).unsqueeze(0).clone()  # (1, column and row, h, w)

    def index(height: int, width: int) -> torch.Tensor:
        size = (height // cell, width // cell)
        column, row = F.interpolate(asked, size=size, mode="nearest-exact")[0]
        by_row = row.flatten().argsort(stable=True).view(size)  # the places of each source row
        by_column = column.flatten()[by_row].argsort(dim=1, stable=True)  # and in it, in order of the column
        order = by_row.gather(1, by_column).flatten()
        source = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
        return _of_cells(source.view(size), cell)

    return permutation("from_image", index)


def _of_cells(source: torch.Tensor, cell: int) -> torch.Tensor:
    """The source of each cell (rows, columns) as the source of each pixel, in raster order (rows · columns ·
    cell²,)."""
    columns = source.shape[1]
    width = columns * cell
    corner = source // columns * cell * width + source % columns * cell
    offset = 2 * torch.arange(cell) - (cell - 1)  # twice the way from the middle of a cell, which keeps halves whole
    down, right = torch.meshgrid(offset, offset, indexing="ij")
    turned = [((a * down + b * right), (c * down + d * right)) for (a, b), (c, d) in SYMMETRIES]
    inside = torch.stack([(y + cell - 1) // 2 * width + (x + cell - 1) // 2 for y, x in turned])  # (8, cell, cell)
    pixels = corner[..., None, None] + inside[_turns(source)]  # (rows, columns, cell, cell)
    return pixels.swapaxes(1, 2).flatten()


def _turns(source: torch.Tensor) -> torch.Tensor:
    """By which of the symmetries each cell is turned, (rows, columns): as its neighbours lie about it at the source. (A
    decoder paints cells as parts of what is around them: a latent turned cell by cell is a turned picture.)"""
    place = torch.stack([source // source.shape[1], source % source.shape[1]], -1).float()
    votes = torch.zeros(*source.shape, len(SYMMETRIES))
    for axis, step in product((0, 1), (1, -1)):
        apart = place.roll(-step, axis) - place
        apart = apart / apart.square().sum(-1, keepdim=True).clamp(min=1)  # who is near counts most
        apart.select(axis, -1 if step == 1 else 0).zero_()  # nobody beyond the edge
        ways = torch.tensor([[row[axis] * step for row in symmetry] for symmetry in SYMMETRIES]).float()  # (8, 2)
        votes += apart @ ways.T
    return votes.argmax(-1)
