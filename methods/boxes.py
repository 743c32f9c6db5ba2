"""Boxes of other nodes as regions, and regions as boxes for them: two shapes that ComfyUI has for a box.

A *bounding box* is in pixels of a canvas: ``{"x", "y", "width", "height"}`` with whole or broken numbers, and maybe a
``"label"`` (detectors) and ``"metadata"`` with ``type``, ``text``, ``desc``, ``palette`` (Create Bounding Boxes). An
*element* has no canvas: ``{"type", "bbox": [top, left, bottom, right], "desc"}`` with numbers from 0 to 1000, and maybe
``"text"`` and ``"color_palette"``. Both come alone, in a list, or in one list per picture of a batch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

import numpy
import torch

from .regions import Box, Caption, Region

MOST_LINKED = 64  # boxes, elements and masks from other nodes
GRID = 1000  # of an element's numbers
_SIDES = ("x", "y", "width", "height")
_LARGEST = 1e9  # any number in a box; NaN and infinities fail this too


def shown(value: Any) -> str:
    """Any value as a short text for a sentence."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 40 else f"{text[:40]}…"


def regions_from(
    boxes: object, masks: torch.Tensor | None, height: int, width: int, feather: float = 0.0
) -> list[Region]:
    """Regions from what other nodes hand in: one per bounding box or element, then one per mask.

    Args:
        boxes: bounding boxes in pixels and elements, in lists of any depth or as JSON texts; or None.
        masks: (…, h, w).

    Raises:
        ValueError: there are too many, or as ``box_of_pixels`` and ``box_of_element``.
    """
    taken = list(_single_boxes(boxes))
    rasters = [] if masks is None else list(masks.reshape(-1, *masks.shape[-2:]).clamp(0, 1))
    if len(taken) + len(rasters) > MOST_LINKED:
        _refuse(f"{len(taken)} boxes and {len(rasters)} masks are connected; at most {MOST_LINKED} can be taken.")
    found = [_region(box, f"box {number}", height, width, feather) for number, box in enumerate(taken, 1)]
    return found + [Region(f"mask {n}", (), raster, feather, Caption()) for n, raster in enumerate(rasters, 1)]


def box_of_pixels(box: Any, height: int, width: int) -> Box:
    """A host's bounding box ``{"x", "y", "width", "height"}`` in pixels as a box of the canvas, cut at its edge.

    A negative width or height reaches to the left or up. Numbers may be numpy's, or tensors of one value.

    Raises:
        ValueError: it is something else, or lies outside of the canvas.
    """
    sides = [_number(box.get(side)) for side in _SIDES] if isinstance(box, dict) else [None]
    if None in sides:
        _refuse(f"A bounding box is {shown(box)}; it must have the numbers x, y, width and height, in pixels.")
    x, y, wide, high = (side for side in sides if side is not None)
    across, down = _cut(x, wide, width), _cut(y, high, height)
    if across is None or down is None:
        _refuse(
            f"The bounding box {shown(box)} lies outside of the canvas of {width} × {height}, or is empty; take it "
            "out, or give both nodes the same width and height."
        )
    return Box(across[0], down[0], across[1], down[1])


def box_of_element(element: Mapping[str, Any]) -> Box:
    """The ``bbox`` [top, left, bottom, right] of an element, from 0 to 1000, as a box of the canvas, cut at its edge.

    Raises:
        ValueError: there are not four numbers, or they mark nothing of the canvas.
    """
    bbox = element.get("bbox")
    edges = [_number(edge) for edge in bbox] if isinstance(bbox, (list, tuple)) else []
    if len(edges) != 4 or None in edges:
        _refuse(f"An element has the bbox {shown(bbox)}; it must be [top, left, bottom, right], from 0 to {GRID}.")
    top, left, bottom, right = (edge for edge in edges if edge is not None)
    across, down = _cut(left, right - left, GRID), _cut(top, bottom - top, GRID)
    if across is None or down is None:
        _refuse(f"The element with the bbox {shown(bbox)} is empty or outside of 0 to {GRID}; draw it again.")
    return Box(across[0], down[0], across[1], down[1])


def bounding_boxes(regions: Sequence[Region], height: int, width: int) -> list[list[dict[str, Any]]]:
    """The regions as bounding boxes on a canvas of height × width pixels: one list, for one picture.

    A region of several boxes or with a mask has one bounding box around all of it. Edges are rounded to whole pixels.
    ``label`` is the region's, ``metadata`` its caption, as the host's nodes write and read them.
    """
    return [[_bounding_box(region, height, width) for region in regions]] if regions else []


def layout_elements(regions: Sequence[Region]) -> list[dict[str, Any]]:
    """The regions as elements: their bounding boxes on a grid of 1000 × 1000, and their captions."""
    return [_element(region) for region in regions]


def _refuse(sentence: str) -> NoReturn:
    raise ValueError(sentence)


def _single_boxes(boxes: object) -> Iterator[object]:
    """What is no list in the nested lists and texts that hosts and packs use, in order."""
    waiting = [boxes]
    while waiting:
        box = waiting.pop()
        if isinstance(box, str):
            box = _parsed(box)
        if isinstance(box, (list, tuple)):
            waiting.extend(reversed(box))
        elif box is not None:
            yield box


def _parsed(text: str) -> object:
    """The JSON value of a text, None for an empty one. A text in the value is no box: it is not read again."""
    if not text.strip():
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        _refuse(f"The boxes are the text {shown(text)}, which is no JSON; connect boxes, elements, or JSON of them.")
    return {"text": value} if isinstance(value, str) else value


def _number(value: Any) -> float | None:
    """A number of Python, of numpy, or of a tensor of one value; None for anything else, NaN and infinity too."""
    if isinstance(value, (numpy.generic, numpy.ndarray, torch.Tensor)) and math.prod(value.shape) == 1:
        value = value.item()
    is_real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_real and abs(value) <= _LARGEST else None


def _cut(start: float, length: float, cells: int) -> tuple[float, float] | None:
    """An interval of cells inside 0..cells, as (start, length) in fractions of them; None where nothing is left."""
    if length < 0:
        start, length = start + length, -length
    low, high = max(start, 0.0), min(start + length, float(cells))
    if high <= low:
        return None
    inside = length if low == start and high == start + length else high - low
    return low / cells, inside / cells


def _region(box: Any, name: str, height: int, width: int, feather: float) -> Region:
    if isinstance(box, dict) and "bbox" in box:
        caption = _caption(box, "color_palette")
        return Region(caption.title or name, (box_of_element(box),), None, feather, caption)
    place = box_of_pixels(box, height, width)
    label, metadata = box.get("label"), box.get("metadata")
    if not isinstance(metadata, dict):
        caption, called = Caption(_text(label)), _text(label)
    else:
        caption = _caption(metadata, "palette")
        called = _text(metadata.get("name")) or caption.title
    return Region(label if isinstance(label, str) else called or name, (place,), None, feather, caption)


def _caption(said: Mapping[str, Any], palette: str) -> Caption:
    """The caption in the metadata of a bounding box or in an element, which differ in the palette's name."""
    colours = said.get(palette)
    return Caption(
        _text(said.get("desc")),
        _text(said.get("text")) if said.get("type") == "text" else None,
        tuple(c for c in colours if isinstance(c, str)) if isinstance(colours, (list, tuple)) else (),
    )


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _edges(start: float, length: float, cells: int) -> tuple[int, int]:
    """First and last edge of an interval on a grid, to the nearest cell; at least one cell lies between them."""
    first, last = round(start * cells), round((start + length) * cells)
    if first < last:
        return first, last
    first = min(int(start * cells), cells - 1)
    return first, first + 1


def _bounding_box(region: Region, height: int, width: int) -> dict[str, Any]:
    box, caption = region.bounds(), region.said()
    (left, right), (top, bottom) = _edges(box.x, box.width, width), _edges(box.y, box.height, height)
    metadata = {"type": caption.kind, "text": caption.text or "", "desc": caption.description}
    place = {"x": left, "y": top, "width": right - left, "height": bottom - top}
    return place | {"label": region.label, "metadata": metadata | {"palette": list(caption.palette)}}


def _element(region: Region) -> dict[str, Any]:
    box, caption = region.bounds(), region.said()
    (left, right), (top, bottom) = _edges(box.x, box.width, GRID), _edges(box.y, box.height, GRID)
    element: dict[str, Any] = {"type": caption.kind, "bbox": [top, left, bottom, right]}
    if caption.text is not None:
        element["text"] = caption.text
    element["desc"] = caption.description
    return element | ({"color_palette": list(caption.palette)} if caption.palette else {})
