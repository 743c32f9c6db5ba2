"""Views that cut the picture into equal parts and rearrange them."""

from __future__ import annotations

import torch

from .base import Settings, View, permutation, raster, shuffled


def _tiles(height: int, width: int, parts: int) -> torch.Tensor:
    """Raster positions by tile, (parts · parts, height / parts, width / parts)."""
    split = raster(height, width).view(parts, height // parts, parts, width // parts)
    return split.swapaxes(1, 2).flatten(0, 1)


def _joined(tiles: torch.Tensor, parts: int) -> torch.Tensor:
    """Tiles laid back to a raster index, (height · width,)."""
    return tiles.unflatten(0, (parts, parts)).swapaxes(1, 2).flatten()


def patch_permute(settings: Settings) -> View:
    """Equal tiles in another order; 8 × 8 by default."""
    parts = settings.parts or 8

    def index(height: int, width: int) -> torch.Tensor:
        return _joined(_tiles(height, width, parts)[shuffled(parts**2, settings.seed)], parts)

    return permutation("patch_permute", index, parts=parts, adjustable=True)


def pixel_permute(settings: Settings) -> View:
    """Every pixel somewhere else, or with ``parts`` tiles so small that none can be told apart; 64 × 64 tiles by
    default."""
    parts = settings.parts or 64

    def index(height: int, width: int) -> torch.Tensor:
        return _joined(_tiles(height, width, parts)[shuffled(parts**2, settings.seed)], parts)

    return permutation("pixel_permute", index, parts=parts, latent="pixels only", adjustable=True)


def tile_transpose(settings: Settings) -> View:
    """The grid of tiles mirrored along its diagonal, each tile left as it is; 4 × 4 by default."""
    parts = settings.parts or 4

    def index(height: int, width: int) -> torch.Tensor:
        grid = _tiles(height, width, parts).unflatten(0, (parts, parts))
        return _joined(grid.swapaxes(0, 1).flatten(0, 1), parts)

    return permutation("tile_transpose", index, parts=parts, adjustable=True)


def half_swap(_: Settings) -> View:
    """The left half and the right half change places."""

    def index(height: int, width: int) -> torch.Tensor:
        return raster(height, width).roll(width // 2, 1).flatten()

    return permutation("half_swap", index, parts=2)


def stripes(settings: Settings) -> View:
    """Every second of ``parts`` upright stripes is turned upside down, like a Venetian blind; 8 stripes by default."""
    parts = settings.parts or 8

    def index(height: int, width: int) -> torch.Tensor:
        columns = raster(height, width).view(height, parts, width // parts).clone()
        columns[:, 1::2] = columns[:, 1::2].flip(0)
        return columns.flatten()

    return permutation("stripes", index, parts=parts, adjustable=True)


def square_hinge(settings: Settings) -> View:
    """3 × 3 blocks, each turned a quarter in place: clockwise where row + column is even, else back.

    A remainder of the side by 3 stays where it is.
    """

    def index(height: int, width: int) -> torch.Tensor:
        out = raster(height, width).clone()
        side = height // settings.cell // 3 * settings.cell
        for row in range(3):
            for column in range(3):
                block = (slice(row * side, (row + 1) * side), slice(column * side, (column + 1) * side))
                out[block] = torch.rot90(out[block], -1 if (row + column) % 2 == 0 else 1, dims=(0, 1)).clone()
        return out.flatten()

    return permutation("square_hinge", index, square=True)
