"""A view that a user paints: a picture that says where each pixel comes from."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .base import View, permutation, raster


def from_image(image: torch.Tensor, cell: int = 1) -> View:
    """The permutation a picture describes: red says from which column a place is filled (0 left, 1 right), green from
    which row (0 top, 1 bottom), as a UV map.

    The places are sorted by the row they ask for and cut into rows, and these by the column they ask for, so that it is
    always a permutation, and a map need only be right in its order: painted gradients are followed exactly.

    Args:
        image: (height, width, channels ≥ 2), values 0 to 1, of any size; it is read at the size of the canvas.
        cell: side of a latent cell in pixels, where the view is shown on a picture: whole cells move then, as they did on the
            latent.

    Raises:
        ValueError: fewer than two channels, or values that are no numbers.
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
        tiles = raster(height, width).view(size[0], cell, size[1], cell).swapaxes(1, 2).flatten(0, 1)  # a cell each
        return tiles[source].unflatten(0, size).swapaxes(1, 2).flatten()

    return permutation("from_image", index)
