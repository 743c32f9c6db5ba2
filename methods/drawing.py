"""Regions as drawn by hand: the region editor's JSON text, checked, and its strokes brought to a grid.

The rules equal those of ``web/regions/document.js``; tests compare both with ``tests/web/documents.json``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeGuard

import numpy
import torch
from PIL import Image, ImageDraw

from .boxes import shown
from .regions import Box, Region

VERSION = 1
MOST_TEXT, MOST_REGIONS, MOST_BOXES, MOST_STROKES, MOST_POINTS, MOST_POINTS_IN_ALL, MOST_LABEL = (
    1_000_000,
    32,
    16,
    256,
    4096,
    20_000,
    120,
)
SMALLEST = 0.002  # of a box's side
_SLACK = 1e-3  # rounding may carry a box this far over the edge
_LARGEST = 1e9  # any number in a document; NaN and infinities fail this too
_FINEST = 1024  # cells along the longer side of a painted mask
_OVERSAMPLING = 2


@dataclass(frozen=True)
class Stroke:
    """One drag of the brush.

    Args:
        radius: of the brush, as a fraction of the canvas's shorter side.
        points: (x, y) in fractions of the canvas; they may lie outside of it.
        erase: whether it takes away.
    """

    radius: float
    points: tuple[tuple[float, float], ...]
    erase: bool = False


@dataclass(frozen=True)
class Drawn:
    """A region as drawn: boxes first, then strokes in their order."""

    label: str
    boxes: tuple[Box, ...]
    strokes: tuple[Stroke, ...]

    def region(self, height: int, width: int, feather: float = 0.0) -> Region:
        """The region on a canvas of height × width pixels; its boxes stay exact unless the eraser went over them.

        Raises:
            ValueError: the eraser has left nothing.
        """
        erased = any(stroke.erase for stroke in self.strokes)
        if not self.strokes:
            return Region(self.label, self.boxes, None, feather)
        mask = paint(self.strokes, self.boxes if erased else (), height, width)
        if erased and mask.max() < 0.5:
            raise ValueError(
                f"Nothing is left of the region '{self.label}': the eraser went over all of it. "
                "Draw it again, or delete it in the editor."
            )
        if mask.max() < 0.5:
            return Region(self.label, self.boxes, None, feather)
        return Region(self.label, () if erased else self.boxes, mask, feather)


def parse_drawing(text: str) -> tuple[Drawn, ...]:
    """The regions in the editor's text, bottom to top; none for an empty text.

    Raises:
        ValueError: the text is anything but a whole and sound document; a sentence says where and what.
    """
    document = _loaded(text)
    if document is None:
        return ()
    if not isinstance(document, dict):
        _refuse(f'The regions are {shown(document)}; they must be {{"version": 1, "regions": […]}}.')
    version = document.get("version")
    if version != VERSION or isinstance(version, bool):
        _refuse(f"The regions have the version {shown(version)}; this pack reads version {VERSION}.")
    regions = document.get("regions")
    if not _is_list(regions, MOST_REGIONS):
        _refuse(f'"regions" must be a list of at most {MOST_REGIONS} regions.')
    drawn = tuple(_region(region, f"Region {number}") for number, region in enumerate(regions, 1))
    points = sum(len(stroke.points) for region in drawn for stroke in region.strokes)
    if points > MOST_POINTS_IN_ALL:
        _refuse(f"The strokes have {points} points together; at most {MOST_POINTS_IN_ALL} are read.")
    return drawn


def paint(strokes: Sequence[Stroke], boxes: Sequence[Box], height: int, width: int) -> torch.Tensor:
    """Boxes and then strokes in order, on a canvas of height × width: (h, w) in 0..1, no finer than it needs to be.

    A grid with at most 1024 cells along the longer side, in the canvas's proportions; edges are smoothed.
    """
    scale = min(1.0, _FINEST / max(height, width))
    rows, columns = (max(1, round(side * scale)) for side in (height, width))
    fine = (columns * _OVERSAMPLING, rows * _OVERSAMPLING)
    canvas = Image.new("L", fine, 0)
    if boxes:
        covered = Region("", tuple(boxes)).raster(fine[1], fine[0])
        canvas = Image.fromarray((covered * 255).round().to(torch.uint8).cpu().numpy(), "L")
    draw = ImageDraw.Draw(canvas)
    for stroke in strokes:
        _draw_stroke(draw, stroke, *fine)
    pixels = numpy.asarray(canvas.resize((columns, rows), Image.Resampling.BOX), numpy.float32)
    return torch.from_numpy(pixels / 255)


def _draw_stroke(draw: ImageDraw.ImageDraw, stroke: Stroke, width: int, height: int) -> None:
    radius = stroke.radius * min(width, height)
    points = [(x * width, y * height) for x, y in stroke.points]
    colour = 0 if stroke.erase else 255
    if len(points) > 1:
        draw.line(points, colour, max(1, round(2 * radius)), joint="curve")
    for x, y in (points[0], points[-1]):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), colour)


def _refuse(sentence: str) -> NoReturn:
    raise ValueError(sentence)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(name)  # NaN and Infinity, which Python's reader knows and JSON does not


def _loaded(text: str) -> Any:
    """The JSON value of a text, None for an empty one."""
    if not isinstance(text, str):
        _refuse(f"The regions are {shown(text)}; they must be a JSON text.")
    if len(text) > MOST_TEXT:
        _refuse(f"The regions are {len(text)} characters long; at most {MOST_TEXT} are read.")
    if not text.strip():
        return None
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        _refuse("The regions are no JSON; draw them in the editor, or mend the text.")
    if value is None:
        _refuse('The regions are null; they must be {"version": 1, "regions": […]}.')
    return value


def _is_list(value: Any, most: int) -> TypeGuard[list[Any]]:
    return isinstance(value, list) and len(value) <= most


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _LARGEST


def _region(region: Any, where: str) -> Drawn:
    if not isinstance(region, dict):
        _refuse(f'{where} is {shown(region)}; a region is {{"label": …, "boxes": …, "strokes": …}}.')
    label, boxes, strokes = region.get("label", ""), region.get("boxes", []), region.get("strokes", [])
    if not isinstance(label, str) or len(label) > MOST_LABEL:
        _refuse(f"{where} has the label {shown(label)}; a label is a text of at most {MOST_LABEL} characters.")
    if not _is_list(boxes, MOST_BOXES):
        _refuse(f'{where}: "boxes" must be a list of at most {MOST_BOXES} boxes.')
    if not _is_list(strokes, MOST_STROKES):
        _refuse(f'{where}: "strokes" must be a list of at most {MOST_STROKES} strokes.')
    if not boxes and not strokes:
        _refuse(f"{where} has neither a box nor a stroke; draw one or delete it.")
    return Drawn(
        label,
        tuple(_box(box, f"{where}, box {number}") for number, box in enumerate(boxes, 1)),
        tuple(_stroke(stroke, f"{where}, stroke {number}") for number, stroke in enumerate(strokes, 1)),
    )


def _box(box: Any, where: str) -> Box:
    if not _is_list(box, 4) or len(box) != 4 or not all(map(_is_number, box)):
        _refuse(f"{where} is {shown(box)}; a box is four numbers [x, y, width, height] in fractions of the canvas.")
    x, y, width, height = map(float, box)
    if min(width, height) < SMALLEST:
        _refuse(f"{where} is {shown(box)}; its width and height must be at least {SMALLEST}.")
    if min(x, y) < -_SLACK or max(x + width, y + height) > 1 + _SLACK:
        _refuse(f"{where} is {shown(box)}, which leaves the canvas; x + width and y + height may be at most 1.")
    left, top = (min(max(edge, 0.0), 1 - SMALLEST) for edge in (x, y))
    return Box(left, top, min(width, 1 - left), min(height, 1 - top))


def _stroke(stroke: Any, where: str) -> Stroke:
    if not isinstance(stroke, dict):
        _refuse(f'{where} is {shown(stroke)}; a stroke is {{"radius": …, "points": [x, y, …]}}.')
    radius, points, erase = stroke.get("radius"), stroke.get("points"), stroke.get("erase", False)
    if not _is_number(radius) or not 0 < radius <= 1:
        _refuse(f"{where} has the radius {shown(radius)}; it must lie above 0 and up to 1.")
    if not isinstance(erase, bool):
        _refuse(f'{where}: "erase" is {shown(erase)}; it must be true or false.')
    if not _is_list(points, 2 * MOST_POINTS):
        _refuse(f'{where}: "points" must be a list of at most {MOST_POINTS} points.')
    if not points or len(points) % 2 or not all(_is_number(n) and -1 <= n <= 2 for n in points):
        _refuse(f'{where}: "points" must be pairs of numbers [x, y, x, y, …] in fractions of the canvas.')
    numbers = [float(n) for n in points]
    return Stroke(float(radius), tuple(zip(numbers[::2], numbers[1::2], strict=True)), erase)
