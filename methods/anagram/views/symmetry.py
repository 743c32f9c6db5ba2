"""The symmetries of the rectangle and of the square."""

from __future__ import annotations

import torch

from .base import Settings, Transform, View


def _same(x: torch.Tensor) -> torch.Tensor:
    return x


def _upside_down(x: torch.Tensor) -> torch.Tensor:
    return x.flip(-2)


def _mirror(x: torch.Tensor) -> torch.Tensor:
    return x.flip(-1)


def _transpose(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(-2, -1)


def _turn(quarters: int) -> Transform:
    """A turn by quarters clockwise."""

    def turn(x: torch.Tensor) -> torch.Tensor:
        return torch.rot90(x, -quarters, dims=(-2, -1))

    return turn


def identity(_: Settings) -> View:
    """The picture as it is."""
    return View("identity", _same, _same)


def flip(_: Settings) -> View:
    """Mirrored upside down (not turned)."""
    return View("flip", _upside_down, _upside_down)


def mirror(_: Settings) -> View:
    """Mirrored left to right."""
    return View("mirror", _mirror, _mirror)


def rotate_180(_: Settings) -> View:
    """Turned round."""
    return View("rotate_180", _turn(2), _turn(2))


def rotate_cw(_: Settings) -> View:
    """Turned a quarter clockwise."""
    return View("rotate_cw", _turn(1), _turn(-1), square=True)


def rotate_ccw(_: Settings) -> View:
    """Turned a quarter counter-clockwise."""
    return View("rotate_ccw", _turn(-1), _turn(1), square=True)


def transpose(_: Settings) -> View:
    """Mirrored along the diagonal: rows become columns."""
    return View("transpose", _transpose, _transpose, square=True)
