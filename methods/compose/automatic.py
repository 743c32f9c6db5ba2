"""Regions found in the concepts' own attention (after FreeFuse's masks for diffusion transformers)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .losses import smoothed
from .settings import WHO

_ROUNDS = 40
_FOREGROUND = 0.5  # of the canvas at most: the tokens with more attention than the median token
NEVER_FOUND = (
    f"{WHO}: the sampling ended before the regions were found, which is after %.0f %% of it, so no concept is "
    "in the picture; lower automatic_percent, take more steps, or draw the regions."
)


def regions_of_concepts(maps: torch.Tensor, names: Sequence[str]) -> torch.Tensor:
    """As ``found_regions``, none of them empty.

    Raises:
        ValueError: a concept has no place; the message names it and says what to do.
    """
    regions = found_regions(maps)
    for region, name in zip(regions, names, strict=True):
        if not region.any():
            raise ValueError(
                f"No region was found for the concept '{name}': another concept's phrase has its attention at the same "
                "places; give each concept a different phrase, or draw the regions with Region Editor."
            )
    return regions


def found_regions(maps: torch.Tensor) -> torch.Tensor:
    """A region per concept, (concepts, h, w) of zeros and ones.

    Tokens with little attention stay background. The others go to the concept whose attention is highest there, on its
    own scale. A handicap per concept, found by iteration, makes the parts about equal.

    Args:
        maps: how much each token attends to the concept's phrase, (concepts, h, w).
    """
    attention = smoothed(smoothed(maps.float()))
    attention = attention / attention.flatten(1).mean(-1)[:, None, None].clamp(min=1e-12)
    strongest = attention.amax(0)
    foreground = strongest > strongest.flatten().quantile(1 - _FOREGROUND)
    scores = attention.clamp(min=1e-6).log()[:, foreground]  # (concepts, tokens of the foreground)
    scores = scores - scores.mean(-1, keepdim=True)
    handicap, step = torch.zeros(len(maps), 1), float(scores.std())
    for number in range(_ROUNDS):
        owner = (scores - handicap).argmax(0)
        parts = torch.bincount(owner, minlength=len(maps)) / owner.numel()
        handicap += step * 0.9**number * (parts - 1 / len(maps))[:, None]
    out = torch.zeros_like(attention)
    out[:, foreground] = torch.nn.functional.one_hot(owner, len(maps)).T.to(out)
    return _cleaned(out)


def _cleaned(regions: torch.Tensor) -> torch.Tensor:
    """Each region without specks: a token stays where most of its neighbourhood belongs to the region."""
    clean = (smoothed(smoothed(regions)) > 0.5).to(regions)
    empty = clean.flatten(1).sum(-1) == 0
    return torch.where(empty[:, None, None], regions, clean)
