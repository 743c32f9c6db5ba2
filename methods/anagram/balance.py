"""How much each view counts: the remedies for *domination*, where one reading wins ("Diffusion-based Visual Anagram as
Multi-task Learning", 2412.02693, section 3.3, noise vector balancing). One signature, one registry."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from .prediction import Predictions, Weights


def _normalised(weights: torch.Tensor) -> torch.Tensor:
    return weights / weights.sum(-1, keepdim=True)


def manual(weights: Sequence[float]) -> Weights:
    """The given weights, all the time.

    Raises:
        ValueError: a negative weight, or all weights zero.
    """
    if not weights or min(weights) < 0 or sum(weights) <= 0:
        raise ValueError("Weights must be 0 or more, and at least one above 0; try 1.0 for every view.")

    def weigh(p: Predictions) -> torch.Tensor:
        given = torch.tensor(list(weights), dtype=torch.float32, device=p.x.device)
        return _normalised(given).expand(len(p.x), -1)

    return weigh


def alternate(weights: Sequence[float]) -> Weights:
    """One view a step, in turn, views of weight 0 left out ("Visual Anagrams", 2311.17919, the reduction ``alternate``)."""
    used = [i for i, w in enumerate(weights) if w > 0]
    even = manual(weights)

    def weigh(p: Predictions) -> torch.Tensor:
        chosen = torch.zeros_like(even(p))
        chosen[:, used[p.step % len(used)]] = 1
        return chosen

    return weigh


PRIORITY_FROM = 0.8


def prioritise_first(weights: Sequence[float]) -> Weights:
    """The given weights until 80 % of the sampling, then the first view alone, so that at least one reading is clean
    ("LookingGlass", 2504.08902: 20 % default; 30 to 50 % destroys the other)."""
    even = manual(weights)

    def weigh(p: Predictions) -> torch.Tensor:
        if p.progress < PRIORITY_FROM:
            return even(p)
        first = torch.zeros_like(even(p))
        first[:, 0] = 1
        return first

    return weigh


def guidance_norm(weights: Sequence[float]) -> Weights:
    """More weight to the view whose prompt is less satisfied, told by the length of its guidance ‖c − u‖. Ours, free of
    any other model, and unproven: measure it with the score board. Without a negative it is ``manual``."""
    even = manual(weights)

    def weigh(p: Predictions) -> torch.Tensor:
        if p.negative is None:
            return even(p)
        lengths = torch.stack(
            [(c - u).float().flatten(1).norm(dim=1) for c, u in zip(p.positive, p.negative, strict=True)], 1
        )
        return _normalised(even(p) * lengths.clamp(min=1e-8))

    return weigh


BALANCES: dict[str, Callable[[Sequence[float]], Weights]] = {
    "manual": manual,
    "prioritise first": prioritise_first,
    "alternate": alternate,
    "guidance norm": guidance_norm,
}
