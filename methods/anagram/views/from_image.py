"""A view that a user paints: a picture that says where each pixel comes from."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .base import View, permutation


def from_image(image: torch.Tensor, cell: int = 1) -> View:
    """The permutation a picture describes: red says from which column a place is filled (0 left, 1 right), green from
    which row (0 top, 1 bottom), as a UV map.

    Where a painted map asks for a source twice, the places take the sources in order of what they ask for (by row, then
    by column), so that it is always a permutation. A map that is one at the canvas's own size is followed exactly.

    Args:
        image: (height, width, channels ≥ 2), values 0 to 1, of any size; it is read at the size of the canvas.
        cell: side of a latent cell in pixels; whole cells then move, as they did while sampling.

    Raises:
        ValueError: fewer than two channels, or values that are no numbers.
    """
    if image.ndim != 3 or image.shape[-1] < 2 or not torch.isfinite(image).all():
        raise ValueError(
            f"A view from a picture needs a colour picture, and this one has the shape {tuple(image.shape)}; "
            "paint red from left to right and green from top to bottom for the view that changes nothing."
        )
    asked = image[..., :2].float().clamp(0, 1).movedim(-1, 0).unsqueeze(0).clone()  # (1, column and row, h, w)

    def cells(height: int, width: int) -> torch.Tensor:
        column, row = F.interpolate(asked, size=(height, width), mode="nearest-exact")[0]
        key = (row * (height - 1)).round().long() * width + (column * (width - 1)).round().long()
        order = key.flatten().argsort(stable=True)
        return torch.empty_like(order).scatter_(0, order, torch.arange(height * width))

    def index(height: int, width: int) -> torch.Tensor:
        across = width // cell
        source = cells(height // cell, across)  # the source cell of each cell
        corner = (source // across * width + source % across) * cell  # the raster position of its first pixel
        inside = torch.arange(cell)[:, None] * width + torch.arange(cell)
        grid = corner.view(height // cell, across)[:, None, :, None] + inside[None, :, None, :]
        return grid.flatten()

    return permutation("from_image", index)
