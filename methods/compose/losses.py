"""LoRA-Composer's losses on attention maps, which pull a concept into its region (2403.11627, sec. 4.1, eq. 4 to 8)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .settings import LossWeights

_TOP = 0.2  # of a region's tokens
_SMOOTH = 0.5  # sigma of the smoothing of maps; on the 3 × 3 points of the reference it weighs as 0.707 would
_KERNEL = (0.21194156, 0.57611688, 0.21194156)


def smoothed(maps: torch.Tensor) -> torch.Tensor:
    """Maps (…, h, w) blurred by 3 × 3 points, reflected at the edge of the canvas."""
    flat = maps.reshape(-1, 1, *maps.shape[-2:])
    kernel = torch.tensor(_KERNEL, dtype=maps.dtype, device=maps.device)
    mode = "reflect" if min(maps.shape[-2:]) > 1 else "replicate"
    padded = F.pad(flat, (1, 1, 1, 1), mode=mode)
    return F.conv2d(F.conv2d(padded, kernel.view(1, 1, 3, 1)), kernel.view(1, 1, 1, 3)).reshape(maps.shape)


def bell(inside: torch.Tensor) -> torch.Tensor:
    """A Gaussian over the bounding box of a region (h, w) of bool: 1 in the middle, 0.61 at edges, 0.37 in corners."""
    sides = []
    for axis in (1, 0):
        line = inside.any(axis).nonzero().flatten()
        count = int(line[-1] - line[0]) + 1
        offsets = torch.linspace(-1, 1, count) if count > 1 else torch.zeros(1)
        side = torch.zeros(inside.shape[1 - axis])
        side[line[0] : line[-1] + 1] = torch.exp(-(offsets**2) / 2)
        sides.append(side)
    out = sides[0][:, None] * sides[1]
    return (out / out.max()).to(inside.device)


def box_loss(maps: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """1 − the mean of the highest fifth of the map in its region, weighted to the middle; (…,) from (…, h, w)."""
    inner = (maps * (inside * bell(inside)).to(maps)).flatten(-2)
    return (1 - _top(inner, int(inside.sum()))).clamp(min=0)


def fill_loss(maps: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """How far the highest point of each row and column of the region is from 1, (…,) from (…, h, w)."""
    inner = maps * inside.to(maps)
    columns = (1 - inner.amax(-2))[..., inside.any(0)].sum(-1) / maps.shape[-1]
    rows = (1 - inner.amax(-1))[..., inside.any(1)].sum(-1) / maps.shape[-2]
    return columns + rows


def region_loss(attention: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """How much the region's tokens read outside of it: the mean of the strongest, (…,) from (…, tokens, tokens)."""
    own = inside.flatten()
    crossing = attention[..., own, :][..., ~own].flatten(-2)
    if crossing.shape[-1] == 0:
        return attention.new_zeros(attention.shape[:-2])
    return _top(crossing, int(own.sum()))


def _top(values: torch.Tensor, area: int) -> torch.Tensor:
    return values.topk(min(max(1, int(_TOP * area)), values.shape[-1]), -1).values.mean(-1)


def composer_loss(
    cross: Sequence[torch.Tensor], attention: torch.Tensor | None, inside: torch.Tensor, weights: LossWeights
) -> torch.Tensor:
    """The loss of each picture, (batch,): mean or sum over a concept's words (``weights.words``), sum over regions.

    Differs from the paper: the reference sums over words, of which it always has two. The mean halves the weight of box
    and fill beside the region loss.

    Args:
        cross: for each region, the maps of its concept's words, (batch, words, h, w).
        attention: the self-attention, (batch, h · w, h · w), or None to leave the region loss out.
        inside: (regions, h, w) of bool.
    """
    total = torch.zeros(())
    for maps, region in zip(cross, inside, strict=True):
        smooth = smoothed(maps)
        each = weights.box * box_loss(smooth, region) + weights.fill * fill_loss(smooth, region)
        total = total + (each.sum(-1) if weights.words == "sum" else each.mean(-1))
        if attention is not None and weights.region:
            total = total + weights.region * region_loss(attention, region)
    return total
