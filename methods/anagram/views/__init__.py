"""The registry of views. A view is one function in a family's file and one line here."""

from __future__ import annotations

from collections.abc import Callable

from ...choices import chosen
from . import discs, jigsaw, shifts, signs, symmetry, tiles
from .base import Settings, View
from .components import COMPONENTS

VIEWS: dict[str, Callable[[Settings], View]] = {
    "identity": symmetry.identity,
    "flip": symmetry.flip,
    "rotate_180": symmetry.rotate_180,
    "rotate_cw": symmetry.rotate_cw,
    "rotate_ccw": symmetry.rotate_ccw,
    "mirror": symmetry.mirror,
    "transpose": symmetry.transpose,
    "inner_circle": discs.inner_circle,
    "rings": discs.rings,
    "jigsaw": jigsaw.jigsaw,
    "square_hinge": tiles.square_hinge,
    "patch_permute": tiles.patch_permute,
    "tile_transpose": tiles.tile_transpose,
    "half_swap": tiles.half_swap,
    "stripes": tiles.stripes,
    "roll": shifts.roll,
    "skew": shifts.skew,
    "negate": signs.negate,
    "pixel_permute": tiles.pixel_permute,
}
"""Name to view, in the order a menu shows them."""

RESAMPLED: dict[str, Callable[[Settings], View]] = {"disc": discs.disc}
"""Views that are not exact: for finished pixels, as pixel sync has them."""


def view_named(name: str, settings: Settings | None = None) -> View:
    """The registered view or component of this name.

    Raises:
        ValueError: no such view; the message lists what there is.
    """
    return chosen(VIEWS | COMPONENTS | RESAMPLED, name, "view")(settings or Settings())


__all__ = ["COMPONENTS", "RESAMPLED", "VIEWS", "Settings", "View", "view_named"]
