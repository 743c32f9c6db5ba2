"""Views that turn a disc or rings about the centre."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from .base import Settings, Transform, View, enlarged, permutation, raster

RADIUS = 0.375  # of the side: 96 px of 256


def _squared_distance(side: int) -> torch.Tensor:
    """Four times the squared distance of each pixel centre from the canvas centre, whole numbers, (side, side)."""
    offset = 2 * torch.arange(side) - (side - 1)
    return offset[:, None] ** 2 + offset[None] ** 2


def inner_circle(settings: Settings) -> View:
    """The inner disc turned round, the rest left as it is. Radius 3/8 of the side, strictly inside."""

    def index(height: int, width: int) -> torch.Tensor:
        still = raster(height, width)
        side = height // settings.cell
        inside = enlarged(_squared_distance(side) < (2 * RADIUS * side) ** 2, settings.cell)
        return torch.where(inside, torch.rot90(still, 2, dims=(0, 1)), still).flatten()

    return permutation("inner_circle", index, square=True)


def rings(settings: Settings) -> View:
    """Rings about the centre, every second one turned a quarter clockwise; 3 rings by default.

    The corners go with the outermost.
    """
    parts = settings.parts or 3

    def index(height: int, width: int) -> torch.Tensor:
        still = raster(height, width)
        side = height // settings.cell
        radius = _squared_distance(side).double().sqrt() / side  # 1 at the middle of an edge
        ring = enlarged((radius * parts).long().clamp(max=parts - 1), settings.cell)
        # counted from outside, so that the corners stay where they are
        turned = (parts - 1 - ring) % 2 == 1
        return torch.where(turned, torch.rot90(still, -1, dims=(0, 1)), still).flatten()

    return permutation("rings", index, square=True)


def disc(settings: Settings) -> View:
    """The inner disc turned by any angle, the rest left as it is ("LookingGlass", 2504.08902, has 135°).

    It resamples: unlike ``inner_circle`` it loses the finest details of a picture, and it has no meaning on noise.
    """
    angle = settings.angle
    return View("disc", _turned_disc(angle), _turned_disc(-angle), square=True, latent="finished pixels", angle=angle)


def _turned_disc(degrees: float) -> Transform:
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))

    def turn(x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(1, -1, *x.shape[-2:]).float()
        grid = F.affine_grid(torch.tensor([[[cosine, sine, 0], [-sine, cosine, 0]]]), [1, 1, *x.shape[-2:]], False)
        turned = F.grid_sample(flat, grid.to(flat), padding_mode="border", align_corners=False).reshape(x.shape)
        inside = _squared_distance(x.shape[-1]) < (2 * RADIUS * x.shape[-1]) ** 2
        return torch.where(inside.to(x.device), turned.to(x.dtype), x)

    return turn
