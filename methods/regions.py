"""Regions of a picture: boxes and masks in fractions of the canvas, brought to any grid of tokens.

A region is a set of points of the canvas. On a grid of tokens it is a raster: how much of each cell it covers. For
several regions, ``partition`` gives every cell to exactly one of them or to the background, and ``shares`` blends. Both
add up to one in every cell, at every size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

_SLACK = 1e-6  # of the canvas: what rounding in an editor may add


@dataclass(frozen=True)
class Box:
    """A rectangle of the canvas in fractions 0..1: its left edge, top edge, width and height.

    Raises:
        ValueError: it is empty, or reaches outside of the canvas.
    """

    x: float
    y: float
    width: float
    height: float

    def __post_init__(self) -> None:
        numbers = (self.x, self.y, self.width, self.height)
        if not all(math.isfinite(n) for n in numbers):
            raise ValueError(f"A box needs four numbers, not {numbers}; draw it again.")
        if self.width <= 0 or self.height <= 0:
            raise ValueError(f"The box {self} is empty; give it a width and a height above 0.")
        if min(self.x, self.y) < -_SLACK or max(self.x + self.width, self.y + self.height) > 1 + _SLACK:
            raise ValueError(
                f"The box {self} reaches outside of the canvas; its numbers are fractions of the canvas: x + width and "
                "y + height are at most 1."
            )


@dataclass(frozen=True)
class Caption:
    """What a layout says of a region, for nodes that write prompts from layouts.

    Args:
        description: what is there; empty: nothing is said.
        text: the letters to draw there, where the region is lettering; None for an object.
        palette: its colours, as "#RRGGBB".
    """

    description: str = ""
    text: str | None = None
    palette: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """The name that layouts have for it: "obj" or "text"."""
        return "obj" if self.text is None else "text"

    @property
    def title(self) -> str:
        """What a region with this caption can be called; empty where nothing is said."""
        return self.description or self.text or ""


@dataclass(frozen=True, eq=False)
class Region:
    """A part of the canvas: the union of its boxes and of what its mask marks.

    Args:
        label: a name for messages and previews.
        boxes: rectangles in fractions of the canvas; they may overlap.
        mask: (height, width) in 0..1, of any size; it covers the whole canvas.
        feather: how far the edge fades, as a fraction of the shorter side; 0 is sharp.
        caption: what the layout it comes from says of it; None: there is only the label.

    Raises:
        ValueError: there is neither a box nor a marked point of a mask, or a value is out of range.
    """

    label: str = ""
    boxes: tuple[Box, ...] = ()
    mask: torch.Tensor | None = None
    feather: float = 0.0
    caption: Caption | None = None

    def __post_init__(self) -> None:
        name = f"The region '{self.label}'" if self.label else "The region"
        if not 0 <= self.feather <= 0.5:
            raise ValueError(f"{name} has a feather of {self.feather}; it is a fraction of the canvas: 0 to 0.5.")
        if self.mask is None:
            if not self.boxes:
                raise ValueError(f"{name} is empty; give it a box or a mask.")
            return
        if self.mask.ndim != 2 or 0 in self.mask.shape:
            raise ValueError(
                f"{name} has a mask of shape {tuple(self.mask.shape)}; it takes one picture (height, width)."
            )
        if not torch.isfinite(self.mask).all() or self.mask.min() < 0 or self.mask.max() > 1:
            raise ValueError(f"{name} has a mask with values outside of 0..1; convert it to a MASK first.")
        if not self.boxes and self.mask.max() < 0.5:
            raise ValueError(f"{name} has a mask that marks nothing; paint the region's part of the picture.")

    def raster(self, height: int, width: int, device: torch.device | str | None = None) -> torch.Tensor:
        """How much of each cell of a grid the region covers, (height, width) in 0..1, float32."""
        covered = torch.zeros(height, width)
        if self.mask is not None:
            covered = resample(self.mask.detach().to("cpu", torch.float32), height, width)
        if self.boxes:
            covered = torch.maximum(covered, _boxes_on(self.boxes, height, width))
        if self.feather:
            covered = _faded(covered, self.feather * min(height, width))
        return covered.to(device) if device is not None else covered

    def said(self) -> Caption:
        """Its caption; without one, its label describes it."""
        return Caption(self.label) if self.caption is None else self.caption

    def bounds(self) -> Box:
        """The smallest box around its boxes and around what its mask marks: cells of at least 0.5, without feather."""
        edges = [(box.x, box.y, box.x + box.width, box.y + box.height) for box in self.boxes]
        if len(edges) == 1 and self.mask is None:
            return self.boxes[0]
        if self.mask is not None and self.mask.max() >= 0.5:
            edges.append(_marked_edges(self.mask))
        left, top = (min(edge[side] for edge in edges) for side in (0, 1))
        right, bottom = (max(edge[side] for edge in edges) for side in (2, 3))
        return Box(left, top, right - left, bottom - top)


def resample(masks: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Masks (…, h, w) on another grid (…, height, width): the mean over the area that each new cell covers, exact."""
    rows = _overlap(_even_edges(masks.shape[-2]), height).to(masks)
    columns = _overlap(_even_edges(masks.shape[-1]), width).to(masks)
    return (rows @ masks @ columns.T).clamp(0, 1)


def coverage(regions: Sequence[Region], height: int, width: int) -> torch.Tensor:
    """The rasters of all regions, (regions, height, width)."""
    return torch.stack([region.raster(height, width) for region in regions])


def partition(covered: torch.Tensor) -> torch.Tensor:
    """Every cell for exactly one owner: the background (index 0) or a region, whoever covers most of it.

    Between regions that cover as much, the later one wins (it lies on top). A region that covers as much as the
    background wins. A region too small to win any cell gets the one it covers most, if no smaller region holds it.

    Args:
        covered: (…, regions, height, width) in 0..1.

    Returns:
        (…, 1 + regions, height, width) of zeros and ones, in ``covered``'s dtype; the sum over owners is exactly one.
    """
    background = (1 - covered.sum(-3, keepdim=True)).clamp(min=0)
    stacked = torch.cat([background, covered], -3)
    count = stacked.shape[-3]
    owner = count - 1 - stacked.flip(-3).argmax(-3)  # the last of equals
    for index in range(1, count):
        _rescue(owner, covered[..., index - 1, :, :], index)
    return torch.nn.functional.one_hot(owner, count).movedim(-1, -3).to(covered.dtype)


def shares(covered: torch.Tensor) -> torch.Tensor:
    """Soft weights of background and regions, (…, 1 + regions, height, width), with sum one: overlaps are divided."""
    total = covered.sum(-3, keepdim=True)
    parts = covered / total.clamp(min=1)
    return torch.cat([(1 - parts.sum(-3, keepdim=True)).clamp(min=0), parts], -3)


def _rescue(owner: torch.Tensor, covered: torch.Tensor, index: int) -> None:
    """Gives region ``index`` the cell it covers most, where it has none; changes ``owner`` (…, h, w) in place."""
    flat_owner, flat = owner.flatten(0, -3) if owner.ndim > 2 else owner[None], covered.reshape(-1, *covered.shape[-2:])
    for cells, amounts in zip(flat_owner, flat, strict=True):
        if amounts.max() > 0 and not (cells == index).any():
            sizes = torch.bincount(cells.flatten(), minlength=index + 1)
            free = (cells == 0) | (sizes[cells] > 1)
            best = int(torch.where(free, amounts, -1.0).argmax())
            cells.view(-1)[best] = index


def _marked_edges(mask: torch.Tensor) -> tuple[float, float, float, float]:
    """Left, top, right and bottom edge of the cells of at least 0.5, in fractions of the canvas."""
    marked = mask >= 0.5
    columns, rows = (torch.nonzero(marked.any(side)).flatten().tolist() for side in (0, 1))
    height, width = mask.shape
    return columns[0] / width, rows[0] / height, (columns[-1] + 1) / width, (rows[-1] + 1) / height


def _even_edges(count: int) -> torch.Tensor:
    return torch.arange(count + 1, dtype=torch.float64) / count


def _overlap(edges: torch.Tensor, count: int) -> torch.Tensor:
    """How much of each of ``count`` equal cells each interval between the edges covers, (count, intervals), float64."""
    cells = _even_edges(count)
    low = torch.maximum(cells[:-1, None], edges[None, :-1])
    high = torch.minimum(cells[1:, None], edges[None, 1:])
    return (high - low).clamp(min=0) * count


def _boxes_on(boxes: Sequence[Box], height: int, width: int) -> torch.Tensor:
    """The exact area of each cell that lies in the union of the boxes, (height, width)."""
    xs = torch.tensor(sorted({e for b in boxes for e in (b.x, b.x + b.width)}), dtype=torch.float64)
    ys = torch.tensor(sorted({e for b in boxes for e in (b.y, b.y + b.height)}), dtype=torch.float64)
    middle_x, middle_y = (xs[1:] + xs[:-1]) / 2, (ys[1:] + ys[:-1]) / 2
    inside = torch.zeros(len(middle_y), len(middle_x), dtype=torch.float64)
    for box in boxes:
        row = (middle_y > box.y) & (middle_y < box.y + box.height)
        column = (middle_x > box.x) & (middle_x < box.x + box.width)
        inside[row[:, None] & column[None, :]] = 1
    return (_overlap(ys, height) @ inside @ _overlap(xs, width).T).clamp(0, 1).float()


def _faded(covered: torch.Tensor, reach: float) -> torch.Tensor:
    """The raster with edges that fade over ``reach`` cells to either side. The canvas's own edge does not fade."""
    radius = max(1, math.ceil(reach))
    offsets = torch.arange(-radius, radius + 1, dtype=covered.dtype)
    kernel = torch.exp(-2 * (offsets / max(reach, 1e-3)) ** 2)  # two standard deviations at the reach
    kernel = kernel / kernel.sum()
    out = covered[None, None]
    for shape, pad in (((1, 1, -1, 1), (0, 0, radius, radius)), ((1, 1, 1, -1), (radius, radius, 0, 0))):
        padded = torch.nn.functional.pad(out, pad, mode="replicate")
        out = torch.nn.functional.conv2d(padded, kernel.view(shape))
    return out[0, 0].clamp(0, 1)
