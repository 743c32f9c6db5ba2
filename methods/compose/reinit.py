"""The first noise, rearranged so that each region begins with what its concept already likes (2403.11627, sec. 4.3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F


class Window(NamedTuple):
    """A rectangle of a grid: its first row and column, and its size."""

    top: int
    left: int
    height: int
    width: int

    def cells(self) -> tuple[slice, slice]:
        return slice(self.top, self.top + self.height), slice(self.left, self.left + self.width)

    def meets(self, other: Window) -> bool:
        return (
            self.top < other.top + other.height and other.top < self.top + self.height
            and self.left < other.left + other.width and other.left < self.left + self.width
        )  # fmt: skip


def around(inside: torch.Tensor) -> Window:
    """The bounding box of a region (h, w) of bool."""
    rows, columns = (inside.any(axis).nonzero().flatten().tolist() for axis in (1, 0))
    return Window(rows[0], columns[0], rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1)


def sources(maps: Sequence[torch.Tensor], boxes: Sequence[Window]) -> list[Window]:
    """For each region the window of its size where its map (h, w) is highest in sum.

    A window that meets another region's box, or one already taken, does not count: its noise is wanted there. Where none is
    left the region keeps its own.
    """
    found: list[Window] = []
    for number, (map_, box) in enumerate(zip(maps, boxes, strict=True)):
        sums = F.avg_pool2d(map_[None, None].double(), (box.height, box.width), stride=1)[0, 0]
        taken = [*found, *boxes[:number], *boxes[number + 1 :]]
        best = box
        for place in sums.flatten().argsort(descending=True, stable=True).tolist():
            window = Window(place // sums.shape[1], place % sums.shape[1], box.height, box.width)
            if sums[window.top, window.left] <= sums[box.top, box.left]:
                break  # nothing is left that is hotter than the region's own
            if not any(window.meets(other) for other in taken):
                best = window
                break
        found.append(best)
    return found


def scaled(window: Window, factor: int, height: int, width: int) -> Window:
    """The window of a grid as one of the latent, which has ``factor`` cells to a token, cut at the latent's edge."""
    top, left = window.top * factor, window.left * factor
    return Window(top, left, min(window.height * factor, height - top), min(window.width * factor, width - left))


def swapped(noise: torch.Tensor, source: Window, box: Window) -> torch.Tensor:
    """The noise (channels, h, w) with two windows of the same size exchanged; a permutation, also where they overlap."""
    rows, columns = min(source.height, box.height), min(source.width, box.width)
    source, box = source._replace(height=rows, width=columns), box._replace(height=rows, width=columns)
    index = torch.arange(noise.shape[-2] * noise.shape[-1], device=noise.device).view(noise.shape[-2:])
    from_, to = index[source.cells()].flatten(), index[box.cells()].flatten()
    moved = index.flatten().clone()
    moved[to] = from_
    left_over = to[~torch.isin(to, from_)]  # what lay in the box and is not in the window goes where the window lay
    moved[from_[~torch.isin(from_, to)]] = left_over
    return noise.flatten(-2)[..., moved].view_as(noise)


def copied(noise: torch.Tensor, source: Window, box: Window) -> torch.Tensor:
    """The noise with the window's values also in the box, as the reference does; ``restored`` is to follow."""
    out = noise.clone()
    rows, columns = min(source.height, box.height), min(source.width, box.width)
    source, box = source._replace(height=rows, width=columns), box._replace(height=rows, width=columns)
    out[..., box.cells()[0], box.cells()[1]] = noise[..., source.cells()[0], source.cells()[1]]
    return out


def restored(noise: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The noise at the mean and deviation of another; where there is no deviation, at its mean."""
    return (noise - noise.mean()) / noise.std().clamp(min=1e-12) * like.std() + like.mean()
