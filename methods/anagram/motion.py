"""A view shown as a movement: the picture's pieces travel and turn from where they are to where the view puts them.

The pieces are found from what the view does: pixels that share one rigid movement are one piece.
So every view that moves pixels can be shown, and the last frame is the view itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from PIL import Image

from .captions import captioned, faded
from .views import Settings, View
from .views.base import SYMMETRIES, Symmetry
from .views.discs import disc

MOST_PIECES = 1500  # beyond, pixels fly one by one
MARGIN = 1.5  # the canvas's side, of the picture's, and no less than the diagonal: a square that turns needs √2
WHITE = 255


@dataclass(frozen=True)
class Piece:
    """Pixels that move as one.

    Attributes:
        symmetry: the matrix on (row, column) that turns or mirrors it.
        rows, columns: where its pixels are, as index arrays.
        centre: the middle of its bounding box, (row, column) in px.
        target: where that middle goes.
    """

    symmetry: Symmetry
    rows: np.ndarray
    columns: np.ndarray
    centre: tuple[float, float]
    target: tuple[float, float]

    @cached_property
    def mirrored(self) -> bool:
        (a, b), (c, d) = self.symmetry
        return a * d - b * c < 0


def source_of(view: View, height: int, width: int) -> torch.Tensor:
    """Where each pixel of the view comes from, as raster positions (height, width)."""
    return view.forward(torch.arange(height * width).view(height, width))


def pieces(view: View, height: int, width: int) -> list[Piece]:
    """The rigid pieces a view cuts the picture into; together they are every pixel once."""
    source = source_of(view, height, width).flatten()
    target = torch.arange(height * width)
    # twice the place: half pixels of a centre stay whole numbers
    from_row, from_column = 2 * (source // width), 2 * (source % width)
    to_row, to_column = 2 * (target // width), 2 * (target % width)
    span = 8 * (height + width)
    keys = torch.stack(
        [
            ((to_row - a * from_row - b * from_column) + span // 2) * span
            + (to_column - c * from_row - d * from_column)
            + span // 2
            for (a, b), (c, d) in SYMMETRIES
        ]
    )
    shared = torch.stack([_share(row) for row in keys])
    chosen = shared.argmax(0)  # the movement most pixels share with this one; the plainest of equals
    label = chosen * span**2 + keys.gather(0, chosen[None])[0]
    found = []
    for value in label.unique().tolist():
        at = (label == value).nonzero()[:, 0]
        found.append(_piece(SYMMETRIES[value // span**2], source[at], at, width))
    return found


def _share(keys: torch.Tensor) -> torch.Tensor:
    """How many others have the same key."""
    _, which, counts = keys.unique(return_inverse=True, return_counts=True)
    return counts[which]


def _piece(symmetry: Symmetry, source: torch.Tensor, target: torch.Tensor, width: int) -> Piece:
    def middle(positions: torch.Tensor) -> tuple[float, float]:
        rows, columns = positions // width, positions % width
        return (float(rows.min() + rows.max()) / 2, float(columns.min() + columns.max()) / 2)

    return Piece(symmetry, (source // width).numpy(), (source % width).numpy(), middle(source), middle(target))


def eased(t: float) -> float:
    """Cubic ease in and out, 0 to 1."""
    return 4 * t**3 if t < 0.5 else 1 - (2 - 2 * t) ** 3 / 2


def frames(picture: np.ndarray, view: View, count: int) -> list[np.ndarray]:
    """The movement from the picture to its view, ``count`` frames after the first; the last is the view, exactly.

    Args:
        picture: uint8 (height, width, 3).

    Returns:
        Frames uint8 (side, side', 3) on white, larger than the picture by ``MARGIN``, with even sides.
    """
    final = picture_in_view(picture, view)
    steps = [eased((i + 1) / count) for i in range(count - 1)]
    if view.component is not None or view.signed:
        between = [_mixed(picture, final, t) for t in steps]
    elif np.array_equal(picture, final):
        between = [on_canvas(picture)] * len(steps)
    elif view.angle is not None:
        between = [on_canvas(picture_in_view(picture, disc(Settings(angle=view.angle * t)))) for t in steps]
    else:
        between = _flights(picture, view, steps)
    return [*between, on_canvas(final)]


def picture_in_view(picture: np.ndarray, view: View) -> np.ndarray:
    """The picture in the view, uint8."""
    values = torch.tensor(picture).movedim(-1, 0)
    if view.component is None and not view.signed and view.angle is None:
        return view.forward(values).movedim(0, -1).contiguous().numpy()
    shown = view.show(values.float() / 255).clamp(0, 1)
    return (shown * 255).round().byte().movedim(0, -1).contiguous().numpy()


def on_canvas(picture: np.ndarray) -> np.ndarray:
    """The picture in the middle of a white canvas with room to move and to turn."""
    canvas, (top, left) = _canvas(*picture.shape[:2])
    canvas[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return canvas


def _canvas(height: int, width: int) -> tuple[np.ndarray, tuple[int, int]]:
    sides = [2 * math.ceil(max(MARGIN * side, math.hypot(height, width)) / 2) for side in (height, width)]
    return np.full((*sides, 3), WHITE, np.uint8), ((sides[0] - height) // 2, (sides[1] - width) // 2)


def _mixed(first: np.ndarray, last: np.ndarray, t: float) -> np.ndarray:
    return on_canvas((first * (1 - t) + last * t + 0.5).astype(np.uint8))


def _flights(picture: np.ndarray, view: View, steps: list[float]) -> list[np.ndarray]:
    found = pieces(view, *picture.shape[:2])
    if len(found) > MOST_PIECES:
        return [_scattered(picture, view, t) for t in steps]
    # what moves least lies lowest
    found.sort(key=lambda p: math.dist(p.centre, p.target) + (p.symmetry != SYMMETRIES[0]))
    cuts = [_cut(picture, piece) for piece in found]
    return [_laid(picture.shape, found, cuts, t) for t in steps]


def _cut(picture: np.ndarray, piece: Piece) -> Image.Image:
    """The piece alone, RGBA, cropped to its bounding box."""
    top, left = piece.rows.min(), piece.columns.min()
    rgba = np.zeros((piece.rows.max() - top + 1, piece.columns.max() - left + 1, 4), np.uint8)
    rgba[piece.rows - top, piece.columns - left, :3] = picture[piece.rows, piece.columns]
    rgba[piece.rows - top, piece.columns - left, 3] = 255
    return Image.fromarray(rgba)


def _laid(shape: tuple[int, ...], found: list[Piece], cuts: list[Image.Image], t: float) -> np.ndarray:
    canvas, (top, left) = _canvas(*shape[:2])
    sheet = Image.fromarray(canvas)
    for piece, cut in zip(found, cuts, strict=True):
        moved = _turned(cut, piece, t)
        row, column = ((1 - t) * a + t * b for a, b in zip(piece.centre, piece.target, strict=True))
        corner = (round(column + 0.5 - moved.width / 2) + left, round(row + 0.5 - moved.height / 2) + top)
        sheet.paste(moved, corner, moved)
    return np.asarray(sheet)


def _turned(cut: Image.Image, piece: Piece, t: float) -> Image.Image:
    """The piece part of the way: turning in the plane, or folding over its own axis like a page."""
    (a, b), _ = piece.symmetry
    if not piece.mirrored:
        clockwise = {(1, 0): 0, (0, 1): 90, (-1, 0): 180, (0, -1): -90}[(a, b)]
        return cut.rotate(-clockwise * t, Image.Resampling.BILINEAR, expand=True) if clockwise else cut
    upright, quarter = (a == -1 or b == 1), 90 if b == 1 else -90 if b == -1 else 0
    width, height = cut.size
    fold = math.cos(math.pi * t)
    size = (width, max(1, round(height * abs(fold)))) if upright else (max(1, round(width * abs(fold))), height)
    folded = cut.resize(size, Image.Resampling.BILINEAR)
    if fold < 0:
        folded = folded.transpose(Image.Transpose.FLIP_TOP_BOTTOM if upright else Image.Transpose.FLIP_LEFT_RIGHT)
    return folded.rotate(-quarter * t, Image.Resampling.BILINEAR, expand=True) if quarter else folded


def _scattered(picture: np.ndarray, view: View, t: float) -> np.ndarray:
    """Every pixel on a straight line from its place to its target."""
    height, width = picture.shape[:2]
    source = source_of(view, height, width).numpy()
    canvas, (top, left) = _canvas(height, width)
    rows, columns = np.indices((height, width))
    row = np.rint((1 - t) * (source // width) + t * rows).astype(int) + top
    column = np.rint((1 - t) * (source % width) + t * columns).astype(int) + left
    canvas[row, column] = picture[source // width, source % width]
    return canvas


def film(
    picture: np.ndarray, views: list[View], hold: int, motion: int, back: bool, captions: Sequence[str] = ()
) -> np.ndarray:
    """Still, motion, still, through all views in order; each goes by way of the picture as it is.

    Args:
        picture: uint8 (height, width, 3).
        hold: frames of each still.
        motion: frames of each movement.
        back: whether the film runs back to its first frame, for a loop.
        captions: words under each view while it is still; empty for none.

    Returns:
        uint8 (frames, side, side', 3).
    """
    movements = [[on_canvas(picture), *frames(picture, view, motion)] for view in views]
    words = list(captions) or [""] * len(views)
    shots: list[np.ndarray] = [captioned(movements[0][-1], words[0])] * hold
    for at, (before, after) in enumerate(pairwise(movements)):
        shots += faded(_between(before, after), words[at], words[at + 1], motion)
        shots += [captioned(after[-1], words[at + 1])] * hold
    if back:
        shots += shots[-2:0:-1]
    return np.stack(shots)


def _between(before: list[np.ndarray], after: list[np.ndarray]) -> list[np.ndarray]:
    """Back from one view and on to the next; a view that is the picture itself needs no way back."""
    still = [len({shot.tobytes() for shot in movement}) == 1 for movement in (before, after)]
    return [*([] if still[0] else before[-2::-1]), *([] if still[1] else after[1:])]
