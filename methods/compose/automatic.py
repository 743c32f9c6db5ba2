"""Regions where the concepts themselves look, when nobody has drawn any (after FreeFuse's masks for diffusion transformers)."""

from __future__ import annotations

import torch

from .losses import smoothed

_ROUNDS = 40
_FOREGROUND = 0.5  # of the canvas at most: the tokens that any concept looks at more than at the median token


def found_regions(maps: torch.Tensor) -> torch.Tensor:
    """Where each concept stands, (concepts, h, w) of zeros and ones, from how much its phrase looks at each token (…, h, w).

    Tokens that nobody looks at much stay background. The others go to the concept that looks at them most by its own
    standard, with a handicap for each concept that is found so that all get like parts.
    """
    looks = smoothed(smoothed(maps.float()))
    looks = looks / looks.flatten(1).mean(-1)[:, None, None].clamp(min=1e-12)
    strongest = looks.amax(0)
    foreground = strongest > strongest.flatten().quantile(1 - _FOREGROUND)
    scores = looks.clamp(min=1e-6).log()[:, foreground]  # (concepts, tokens of the foreground)
    scores = scores - scores.mean(-1, keepdim=True)
    handicap, step = torch.zeros(len(maps), 1), float(scores.std())
    for number in range(_ROUNDS):
        owner = (scores - handicap).argmax(0)
        parts = torch.bincount(owner, minlength=len(maps)) / owner.numel()
        handicap += step * 0.9**number * (parts - 1 / len(maps))[:, None]
    out = torch.zeros_like(looks)
    out[:, foreground] = torch.nn.functional.one_hot(owner, len(maps)).T.to(out)
    return _cleaned(out)


def _cleaned(regions: torch.Tensor) -> torch.Tensor:
    """Each region without specks: a token stays where most of its neighbourhood is the region's."""
    kept = (smoothed(smoothed(regions)) > 0.5).to(regions)
    empty = kept.flatten(1).sum(-1) == 0
    return torch.where(empty[:, None, None], regions, kept)
