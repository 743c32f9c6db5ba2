"""What a view is: an invertible, orthogonal transform of a picture or latent.

A view keeps the statistics of noise, so a denoiser may be evaluated in any view of the same noisy picture
(Geng et al., "Visual Anagrams", 2311.17919, section 3.2: the transform must be orthogonal).
Every view acts on the last two dimensions (height, width), whatever comes before them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch

Transform = Callable[[torch.Tensor], torch.Tensor]

Latent = Literal["good", "whole cells", "pixels only", "finished pixels"]
"""What a view means on a latent: the same as on the picture, the same where its parts are whole latent cells, or
nothing.

``finished pixels`` is for views that resample and so are not orthogonal: noise in them is not noise, not even on models
of pixels."""


Symmetry = tuple[tuple[int, int], tuple[int, int]]

# the symmetries of the square as matrices on (row, column), the ones without a mirror first
# fmt: off
SYMMETRIES: tuple[Symmetry, ...] = (
    ((1, 0), (0, 1)), ((0, 1), (-1, 0)), ((-1, 0), (0, -1)), ((0, -1), (1, 0)),
    ((-1, 0), (0, 1)), ((1, 0), (0, -1)), ((0, 1), (1, 0)), ((0, -1), (-1, 0)),
)
# fmt: on


@dataclass(frozen=True)
class Settings:
    """The settings of a view; each view reads what it needs.

    Attributes:
        parts: how many tiles, stripes or rings across; 0 takes the view's own default.
        seed: which of the random arrangements.
        cell: side of a latent cell in pixels, where a view made on a latent is shown on its picture: the outlines of
            pieces then follow the cells, as they did while sampling.
        angle: degrees clockwise, of a view that turns by any angle.
    """

    parts: int = 0
    seed: int = 0
    cell: int = 1
    angle: float = 135.0


@dataclass(frozen=True)
class View:
    """An invertible transform: ``inverse(forward(x)) == x`` exactly, but for views of ``finished pixels``.

    Attributes:
        name: the registry's key, also what a workflow file stores.
        forward: canonical frame to view frame, ``(…, height, width)`` to the same shape.
        inverse: view frame to canonical frame.
        square: whether the canvas must be square.
        parts: both sides of the canvas must be a multiple of this.
        latent: what the view means on a latent.
        adjustable: whether ``parts`` came from the settings, so that another number may fit.
        signed: whether the view is made for values symmetric about zero, not for 0 to 1.
        component: instead of moving anything, the part of a prediction this view answers for (a projection Fᵢ with
            Σ Fᵢ = 1 over its family; "Factorized Diffusion", 2404.11615, eq. 6).
        family: the names that must come together with this one, where there is a component.
        shown: how a viewer sees the picture in this view, if not by ``forward``.
        angle: by how many degrees clockwise a disc is turned, if that is what the view does; for the film.
    """

    name: str
    forward: Transform
    inverse: Transform
    square: bool = False
    parts: int = 1
    latent: Latent = "good"
    adjustable: bool = False
    signed: bool = False
    component: Transform | None = None
    family: tuple[str, ...] = ()
    shown: Transform | None = None
    angle: float | None = None

    def show(self, picture: torch.Tensor) -> torch.Tensor:
        """A finished picture (…, height, width), values 0 to 1, as this view shows it."""
        if self.shown is not None:
            return self.shown(picture)
        return self._of_picture(self.forward(picture))

    def unshow(self, picture: torch.Tensor) -> torch.Tensor:
        """A picture (…, height, width), values 0 to 1, that was made in this view, in the canonical frame."""
        return self._of_picture(self.inverse(picture))

    def _of_picture(self, turned: torch.Tensor) -> torch.Tensor:
        return 1 + turned if self.signed else turned  # the negative of a value in 0..1 is one less it

    def check(self, height: int, width: int) -> None:
        """Refuses a canvas this view cannot take; height and width in pixels or latent cells.

        Raises:
            ValueError: the canvas is not square, or its sides are no multiple of ``parts``.
        """
        if self.square and height != width:
            unit = math.gcd(height, width)
            raise ValueError(
                f"The view '{self.name}' needs a square canvas, and this one is {width // unit}:{height // unit}; "
                "set the same width and height, or choose a view such as 'flip' or 'rotate_180'."
            )
        if height % self.parts or width % self.parts:
            common = math.gcd(height, width)
            fitting = [str(n) for n in range(2, min(common, 64) + 1) if common % n == 0]
            advice = f"try parts = {' or '.join(fitting)}" if self.adjustable and fitting else "choose another size"
            raise ValueError(
                f"The view '{self.name}' cuts each side into {self.parts} equal parts, and a side of {width} × "
                f"{height} (pixels, or cells of a latent) does not divide so; {advice}."
            )

    def check_patches(self, height: int, width: int, patch: int) -> None:
        """Refuses pieces that do not start where the model's squares of cells do; height and width in latent cells.

        A square with cells of two pieces is neither. Outlines, such as a jigsaw's tabs, may cross squares.

        Args:
            patch: the side in cells of what the model takes for one token.

        Raises:
            ValueError: such a piece, with the numbers of parts that fit.
        """
        if self.parts < 2 or not (height // self.parts % patch or width // self.parts % patch):
            return
        if not (height % patch or width % patch) and self._keeps_patches(height, width, patch):
            return
        common = math.gcd(height, width)
        fitting = [str(n) for n in range(2, min(common, 64) + 1) if common % n == 0 and common // n % patch == 0]
        advice = f"try parts = {' or '.join(fitting)}" if self.adjustable and fitting else "choose another size"
        raise ValueError(
            f"The view '{self.name}' cuts the latent into pieces of {width // self.parts} × {height // self.parts} "
            f"cells, and this model sees squares of {patch} × {patch} cells, which would mix two pieces; {advice}."
        )

    def _keeps_patches(self, height: int, width: int, patch: int) -> bool:
        """Whether the view moves whole squares of cells: all cells of one come from one."""
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        squares = self.forward(rows // patch * width + columns // patch)
        by_square = squares.unflatten(0, (-1, patch)).unflatten(2, (-1, patch))  # (rows, patch, columns, patch)
        return bool((by_square == by_square[:, :1, :, :1]).all())


def permutation(
    name: str,
    index: Callable[[int, int], torch.Tensor],
    square: bool = False,
    parts: int = 1,
    latent: Latent = "whole cells",
    adjustable: bool = False,
) -> View:
    """A view that moves pixels: ``out[k] = in[index[k]]`` over raster positions ``k = y·width + x``.

    Args:
        index: height and width to the source of every position, (height · width,), a bijection.
    """

    @lru_cache(maxsize=8)
    def both(height: int, width: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        forward = index(height, width)
        return forward.to(device), forward.argsort().to(device)

    def gather(x: torch.Tensor, side: int) -> torch.Tensor:
        with torch.inference_mode(False):  # the index outlives this call, and may meet autograd in another
            order = both(x.shape[-2], x.shape[-1], x.device)[side]
        return x.flatten(-2)[..., order].unflatten(-1, x.shape[-2:])

    return View(name, lambda x: gather(x, 0), lambda x: gather(x, 1), square, parts, latent, adjustable)


def enlarged(cells: torch.Tensor, cell: int) -> torch.Tensor:
    """A map of cells (h, w) as a map of pixels (h · cell, w · cell)."""
    return cells.repeat_interleave(cell, 0).repeat_interleave(cell, 1)


def raster(height: int, width: int) -> torch.Tensor:
    """Raster positions, (height, width): what an index-making view rearranges."""
    return torch.arange(height * width).view(height, width)


def shuffled(count: int, seed: int) -> torch.Tensor:
    """A random order of ``count`` things, the same for the same seed; another than their own, if there is one."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(count, generator=generator)
    while count > 1 and torch.equal(order, torch.arange(count)):
        order = torch.randperm(count, generator=generator)
    return order
