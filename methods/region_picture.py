"""A picture of regions, for people: tinted areas with their names, over a background."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy
import torch
from PIL import Image, ImageDraw, ImageFont

from .assignment import as_label
from .regions import Region

COLOURS = (
    (76, 159, 230),
    (242, 163, 58),
    (63, 192, 138),
    (224, 106, 165),
    (217, 209, 74),
    (154, 127, 224),
    (232, 105, 74),
    (88, 198, 214),
)
"""The colours of web/regions/colours.js."""
PAPER = 0.09
TINT = 0.45


def cover(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """A picture (h, w, 3) scaled and cut in the middle to fill height × width, (height, width, 3)."""
    pixels = image.detach().to("cpu", torch.float32).movedim(-1, 0)[None]  # (1, 3, h, w)
    scale = max(height / pixels.shape[-2], width / pixels.shape[-1])
    size = [max(target, round(side * scale)) for target, side in zip((height, width), pixels.shape[-2:], strict=True)]
    scaled = torch.nn.functional.interpolate(pixels, size, mode="bilinear", align_corners=False, antialias=True)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return scaled[0, :, top : top + height, left : left + width].movedim(0, -1).clamp(0, 1)


def colour_indices(labels: Sequence[str], names: Sequence[Collection[str]]) -> list[int]:
    """Each region's index into ``COLOURS``: its concept's, else its own place after the concepts (as in colours.js).

    Args:
        labels: the regions' labels.
        names: per concept the labels that a region of it may have, in small letters.
    """
    return [
        next((at for at, known in enumerate(names) if as_label(label) in known), len(names) + place)
        for place, label in enumerate(labels)
    ]


def picture(
    regions: Sequence[Region], masks: torch.Tensor, colours: Sequence[int], background: torch.Tensor | None = None
) -> torch.Tensor:
    """The regions bottom to top over a background, (height, width, 3) in 0..1.

    Args:
        masks: their rasters, (regions, height, width).
        colours: for each region an index into ``COLOURS``, taken round.
        background: (height, width, 3), or None for dark paper.
    """
    canvas = torch.full((*masks.shape[-2:], 3), PAPER) if background is None else background
    for mask, index in zip(masks, colours, strict=True):
        tint = torch.tensor(COLOURS[index % len(COLOURS)]) / 255
        canvas = torch.lerp(canvas, tint.expand_as(canvas), (TINT * mask)[..., None])
    return _with_names(canvas, regions, masks, colours)


def _with_names(
    canvas: torch.Tensor, regions: Sequence[Region], masks: torch.Tensor, colours: Sequence[int]
) -> torch.Tensor:
    """Each region's name in its colour at the top left of where it begins."""
    image = Image.fromarray((canvas * 255).round().to(torch.uint8).numpy(), "RGB")
    draw, size = ImageDraw.Draw(image), max(10, min(masks.shape[-2:]) // 18)
    font = ImageFont.load_default(size)
    for region, mask, index in zip(regions, masks, colours, strict=True):
        rows, columns = (torch.nonzero((mask > 0.5).any(axis)).flatten() for axis in (1, 0))
        if not len(rows):
            continue
        name = region.label.encode("utf-8", "replace").decode("utf-8").replace("\n", " ")
        place = (int(columns[0]) + size // 4, int(rows[0]) + size // 8)
        fill = COLOURS[index % len(COLOURS)]
        draw.text(place, name, fill=fill, font=font, stroke_width=max(1, size // 10), stroke_fill=(0, 0, 0))
    return torch.from_numpy(numpy.array(image, numpy.float32) / 255)
