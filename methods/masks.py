"""Masks of several regions at every grid of tokens a model works on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn.functional import pad

from .regions import Region, coverage, partition, resample, shares

Grid = tuple[int, int]
"""Height and width in tokens."""


class TokenSets(NamedTuple):
    """The tokens of all regions at one grid; the fields are as the methods of ``MaskPyramid``."""

    inside: torch.Tensor
    tokens: list[torch.Tensor]
    readable: list[torch.Tensor]


class MaskPyramid:
    """The masks of several regions, each grid computed once.

    Args:
        covered: (regions, h, w) in 0..1, or (batch, regions, h, w) if masks differ per picture. Regions may overlap.
        soft: weights fade as the regions do. Otherwise edges are sharp.
        overlapping: what sharp masks do with a token that several regions own. False gives it to one of them
            (``partition``), True divides it equally (``divided``).
        side: of a token in cells of ``covered``, where a network fills them up to whole tokens.
    """

    def __init__(self, covered: torch.Tensor, soft: bool = False, overlapping: bool = False, side: int = 1) -> None:
        self.covered, self.soft, self.overlapping, self.side = covered, soft, overlapping, side
        self._weights: dict[Grid, torch.Tensor] = {}
        self._sets: dict[Grid, TokenSets] = {}

    @classmethod
    def of(cls, regions: Sequence[Region], height: int, width: int, soft: bool = False) -> MaskPyramid:
        """The pyramid over regions rasterised at the finest grid a model has."""
        return cls(coverage(regions, height, width), soft)

    def at(self, height: int, width: int) -> torch.Tensor:
        """Weights of background and regions, (…, 1 + regions, height, width); they add up to one in every token."""
        grid = (height, width)
        if grid not in self._weights:
            # ordinary tensors, whatever mode the caller runs in: gradients pass what they weigh
            with torch.inference_mode(False), torch.no_grad():
                self._weights[grid] = self._weights_of(resample(self._filled_up(grid), height, width))
        return self._weights[grid]

    def with_side(self, side: int) -> MaskPyramid:
        """The same masks for a network whose tokens are squares of that many cells."""
        return self if side == self.side else MaskPyramid(self.covered, self.soft, self.overlapping, side)

    def _filled_up(self, grid: Grid) -> torch.Tensor:
        """What is covered; at the grid of a network's tokens, with the cells that it fills the last ones up with."""
        whole = tuple(-(-cells // self.side) for cells in self.covered.shape[-2:])
        return self.covered if self.side == 1 or grid != whole else in_whole_tokens(self.covered, grid, self.side)

    def _weights_of(self, covered: torch.Tensor) -> torch.Tensor:
        if self.soft:
            return shares(covered)
        return divided(covered) if self.overlapping else partition(covered)

    def weights(self, grid: Grid) -> torch.Tensor:
        """As ``at``, tokens in one row: (…, 1 + regions, tokens)."""
        return self.at(*grid).flatten(-2)

    def inside(self, grid: Grid) -> torch.Tensor:
        """Which tokens each region owns, (regions, tokens) of bool."""
        return self._sets_at(grid).inside

    def tokens(self, grid: Grid) -> list[torch.Tensor]:
        """For background and each region, the positions of the tokens in which its weight is above zero."""
        return self._sets_at(grid).tokens

    def readable(self, grid: Grid) -> list[torch.Tensor]:
        """For each region, the tokens it may read: its own, and those no other region owns (2403.11627, sec. 4.2)."""
        return self._sets_at(grid).readable

    def read_mask(self, grid: Grid) -> torch.Tensor:
        """``readable`` as a dense mask, (tokens, tokens) of bool. Tokens of the background read everything."""
        inside = self.inside(grid)
        allowed = inside.new_ones(inside.shape[1], inside.shape[1])
        for own, readable in zip(inside, self.readable(grid), strict=True):
            allowed[own] &= torch.zeros_like(own).index_fill(0, readable, True)
        return allowed

    def _sets_at(self, grid: Grid) -> TokenSets:
        if grid not in self._sets:
            with torch.inference_mode(False), torch.no_grad():
                inside = owned(resample(self._filled_up(grid), *grid)).flatten(1)
                tokens = [(row > 0).nonzero().flatten() for row in self.weights(grid)]
                self._sets[grid] = TokenSets(inside, tokens, _readable(inside))
        return self._sets[grid]


def owned(covered: torch.Tensor) -> torch.Tensor:
    """Which tokens each region owns, (regions, h, w) of bool: those it covers by half, and at least one."""
    inside = covered >= 0.5
    for region, amounts in zip(inside, covered, strict=True):
        if not region.any():
            region.view(-1)[amounts.argmax()] = True
    return inside


def divided(covered: torch.Tensor) -> torch.Tensor:
    """Weights of background and regions, (1 + regions, h, w): a token belongs to its owners in equal parts."""
    parts = owned(covered).float()
    count = parts.sum(0, keepdim=True)
    return torch.cat([(count == 0).float(), parts / count.clamp(min=1)])


def _readable(inside: torch.Tensor) -> list[torch.Tensor]:
    found = []
    for number, own in enumerate(inside):
        others = torch.cat([inside[:number], inside[number + 1 :]]).any(0)
        found.append((own | ~others).nonzero().flatten())
    return found


def in_whole_tokens(covered: torch.Tensor, grid: Grid, side: int) -> torch.Tensor:
    """Masks (regions, h, w) with their last row and column once more where the last tokens would be half empty.

    Args:
        side: of a token in cells. A network fills the latent up to whole tokens, and cuts that off in the end.
    """
    height, width = covered.shape[-2:]
    around = (0, grid[1] * side - width, 0, grid[0] * side - height)
    return pad(covered[:, None], around, mode="replicate")[:, 0]
