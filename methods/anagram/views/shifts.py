"""Views that slide rows or columns around the edge."""

from __future__ import annotations

import torch

from .base import Settings, View, permutation, raster

SKEW = 1.5


def skew(_: Settings) -> View:
    """Column j slides down by trunc(1.5 · (j − width // 2)), around the edge."""

    def index(height: int, width: int) -> torch.Tensor:
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        down = torch.trunc(SKEW * (columns - width // 2)).long()
        return (((rows - down) % height) * width + columns).flatten()

    return permutation("skew", index, latent="pixels only")


def roll(settings: Settings) -> View:
    """Everything slides right by one part of the width, around the edge; half the width by default."""
    parts = settings.parts or 2

    def index(height: int, width: int) -> torch.Tensor:
        return raster(height, width).roll(width // parts, 1).flatten()

    return permutation("roll", index, parts=parts, adjustable=True)
