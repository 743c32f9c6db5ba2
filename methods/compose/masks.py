"""Regions on the grids of tokens: what share of each token a concept has, and whose keys it may read."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..regions import resample, shares


def owned(covered: torch.Tensor) -> torch.Tensor:
    """Which tokens each region holds, (regions, h, w) of bool: those it covers by half; at least the one it covers most."""
    inside = covered >= 0.5
    for region, amounts in zip(inside, covered, strict=True):
        if not region.any():
            region.view(-1)[amounts.argmax()] = True
    return inside


class Level(NamedTuple):
    """The masks at one grid; the fields are as the methods of ``Grids``."""

    inside: torch.Tensor
    weights: torch.Tensor
    tokens: list[torch.Tensor]
    keys: list[torch.Tensor]


class Grids:
    """Masks of all regions at every grid a model asks for.

    Args:
        covered: (regions, h, w) in 0..1 on the latent's grid; regions may overlap.
        soft: weights fade as the regions do; otherwise a token belongs to the regions that hold it, in equal parts.
    """

    def __init__(self, covered: torch.Tensor, soft: bool = False) -> None:
        self.covered, self.soft = covered, soft
        self._levels: dict[tuple[int, int], Level] = {}

    def inside(self, grid: tuple[int, int]) -> torch.Tensor:
        """Which tokens each region holds, (regions, tokens) of bool."""
        return self._level(grid).inside

    def weights(self, grid: tuple[int, int]) -> torch.Tensor:
        """The share of background and regions in each token, (1 + regions, tokens), summing to one."""
        return self._level(grid).weights

    def tokens(self, grid: tuple[int, int]) -> list[torch.Tensor]:
        """For background and each region, the positions of the tokens in which it has a share."""
        return self._level(grid).tokens

    def keys(self, grid: tuple[int, int]) -> list[torch.Tensor]:
        """For each region, the tokens it may read: its own, and those no other region holds (2403.11627, sec. 4.2)."""
        return self._level(grid).keys

    def _level(self, grid: tuple[int, int]) -> Level:
        if grid not in self._levels:
            # ordinary tensors, whatever mode the caller runs in: gradients pass what they weigh
            with torch.inference_mode(False), torch.no_grad():
                self._levels[grid] = _level_of(self.covered, grid, self.soft)
        return self._levels[grid]


def _level_of(covered: torch.Tensor, grid: tuple[int, int], soft: bool) -> Level:
    covered = resample(covered, *grid)
    inside = owned(covered).flatten(1)
    if soft:
        weights = shares(covered).flatten(1)
    else:
        parts = inside.float()
        count = parts.sum(0, keepdim=True)
        weights = torch.cat([(count == 0).float(), parts / count.clamp(min=1)])
    keys = []
    for n, own in enumerate(inside):
        others = torch.cat([inside[:n], inside[n + 1 :]]).any(0)
        keys.append((own | ~others).nonzero().flatten())
    return Level(inside, weights, [(row > 0).nonzero().flatten() for row in weights], keys)
