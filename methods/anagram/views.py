"""Views: invertible, orthogonal transforms of a picture or latent.

A view keeps the statistics of noise, so a denoiser may be asked in any view of the same noisy picture
(Geng et al., "Visual Anagrams", 2311.17919, section 3.2: the transform must be orthogonal).
Every view acts on the last two dimensions (height, width), whatever stands before them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

Transform = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class View:
    """An invertible transform: ``inverse(forward(x)) == x`` exactly.

    Attributes:
        name: the registry's key, also what a workflow file stores.
        forward: canonical frame to view frame, ``(…, height, width)`` to the same shape.
        inverse: view frame to canonical frame.
        square: whether the canvas must be square.
    """

    name: str
    forward: Transform
    inverse: Transform
    square: bool = False

    def check(self, height: int, width: int) -> None:
        """Refuses a canvas this view cannot take; height and width in any one unit.

        Raises:
            ValueError: the canvas is not square and the view needs a square.
        """
        if self.square and height != width:
            unit = math.gcd(height, width)
            raise ValueError(
                f"The view '{self.name}' needs a square canvas, and this one is {width // unit}:{height // unit}; "
                "set the same width and height, or choose a view such as 'flip' or 'rotate_180'."
            )


def _same(x: torch.Tensor) -> torch.Tensor:
    return x


def _upside_down(x: torch.Tensor) -> torch.Tensor:
    return x.flip(-2)


def _turn(quarters: int) -> Transform:
    """A turn by quarters clockwise."""

    def turn(x: torch.Tensor) -> torch.Tensor:
        return torch.rot90(x, -quarters, dims=(-2, -1))

    return turn


VIEWS = {
    view.name: view
    for view in (
        View("identity", _same, _same),
        View("flip", _upside_down, _upside_down),
        View("rotate_180", _turn(2), _turn(2)),
        View("rotate_cw", _turn(1), _turn(-1), square=True),
        View("rotate_ccw", _turn(-1), _turn(1), square=True),
    )
}


def view_named(name: str) -> View:
    """The registered view of this name.

    Raises:
        ValueError: no such view; the message lists what there is.
    """
    if name not in VIEWS:
        raise ValueError(f"There is no view '{name}'; try one of {', '.join(VIEWS)}.")
    return VIEWS[name]
