"""The first noise, rearranged: each region begins with the noise that suits its concept best (2403.11627, sec. 4.3)."""

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

    def overlaps(self, other: Window) -> bool:
        return (
            self.top < other.top + other.height
            and other.top < self.top + self.height
            and self.left < other.left + other.width
            and other.left < self.left + self.width
        )


def around(inside: torch.Tensor) -> Window:
    """The bounding box of a region (h, w) of bool."""
    rows, columns = (inside.any(axis).nonzero().flatten().tolist() for axis in (1, 0))
    return Window(rows[0], columns[0], rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1)


def sources(maps: Sequence[torch.Tensor], boxes: Sequence[Window]) -> list[Window]:
    """For each region the window of its size where its map (h, w) is highest in sum.

    A window that overlaps another region's box, or a window already taken, does not count: its noise is needed there.
    Where no window is left, the region keeps its own.
    """
    found: list[Window] = []
    for number, (map_, box) in enumerate(zip(maps, boxes, strict=True)):
        sums = F.avg_pool2d(map_[None, None].double(), (box.height, box.width), stride=1)[0, 0]
        taken = [*found, *boxes[:number], *boxes[number + 1 :]]
        best = box
        for index in sums.flatten().argsort(descending=True, stable=True).tolist():
            window = Window(index // sums.shape[1], index % sums.shape[1], box.height, box.width)
            if sums[window.top, window.left] <= sums[box.top, box.left]:
                break  # nothing is left that is hotter than the region's own
            if not any(window.overlaps(other) for other in taken):
                best = window
                break
        found.append(best)
    return found


def scaled(window: Window, factor: int, height: int, width: int) -> Window:
    """The window of a grid as a window of the latent, cut at its edge; a token has ``factor`` cells per side."""
    top, left = window.top * factor, window.left * factor
    return Window(top, left, min(window.height * factor, height - top), min(window.width * factor, width - left))


def swapped(noise: torch.Tensor, source: Window, box: Window) -> torch.Tensor:
    """The noise (channels, h, w) with two windows of one size exchanged: a permutation, even where they overlap."""
    rows, columns = min(source.height, box.height), min(source.width, box.width)
    source, box = source._replace(height=rows, width=columns), box._replace(height=rows, width=columns)
    index = torch.arange(noise.shape[-2] * noise.shape[-1], device=noise.device).view(noise.shape[-2:])
    from_, to = index[source.cells()].flatten(), index[box.cells()].flatten()
    moved = index.flatten().clone()
    moved[to] = from_
    left_over = to[~torch.isin(to, from_)]  # noise of the box outside of the window goes to the window's place
    moved[from_[~torch.isin(from_, to)]] = left_over
    return noise.flatten(-2)[..., moved].view_as(noise)


def copied(noise: torch.Tensor, source: Window, box: Window) -> torch.Tensor:
    """The noise with the window's values also in the box, as in the reference. ``restored`` must follow."""
    out = noise.clone()
    rows, columns = min(source.height, box.height), min(source.width, box.width)
    source, box = source._replace(height=rows, width=columns), box._replace(height=rows, width=columns)
    out[..., box.cells()[0], box.cells()[1]] = noise[..., source.cells()[0], source.cells()[1]]
    return out


def restored(noise: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The noise at the mean and deviation of another; where there is no deviation, at its mean."""
    return (noise - noise.mean()) / noise.std().clamp(min=1e-12) * like.std() + like.mean()


def rearranged(
    noise: torch.Tensor, maps: Sequence[torch.Tensor], boxes: Sequence[Window], factor: int, how: str
) -> torch.Tensor:
    """One picture's noise with each region's best window brought into the region's box.

    Args:
        noise: (channels, h, w).
        maps: per region where its concept is seen, (h / factor, w / factor).
        boxes: the regions' boxes on the grid of the maps.
        factor: cells of the latent per side of a token.
        how: ``swap`` exchanges the two windows, ``copy`` doubles one, as the reference does.
    """
    height, width = noise.shape[-2:]
    move = swapped if how == "swap" else copied
    changed = noise
    for source, box in zip(sources(maps, boxes), boxes, strict=True):
        if source != box:
            changed = move(changed, scaled(source, factor, height, width), scaled(box, factor, height, width))
    return restored(changed, noise) if how == "copy" and changed is not noise else changed
