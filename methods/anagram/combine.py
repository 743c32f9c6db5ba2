"""How the predictions of several views become one."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def average(predictions: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """The weighted mean of predictions in the canonical frame ("Visual Anagrams", 2311.17919, eq. 4, with weights).

    With weights that sum to one, averaging denoised pictures, noise or velocities is the same operation.

    Args:
        predictions: N tensors of one shape.
        weights: N numbers ≥ 0, not all zero; normalised here.

    Raises:
        ValueError: no predictions, a count that differs, a negative weight, or all weights zero.
    """
    if not predictions or len(predictions) != len(weights):
        raise ValueError(f"{len(predictions)} predictions need as many weights, not {len(weights)}, and at least one.")
    total = sum(weights)
    if min(weights) < 0 or total <= 0:
        raise ValueError("Weights must be 0 or more, and at least one above 0; try 1.0 for every view.")
    # a lone view is passed through untouched: 0 + x and 1·x need not be x bit for bit
    used = [(p, w / total) for p, w in zip(predictions, weights, strict=True) if w > 0]
    if len(used) == 1:
        return used[0][0]
    return torch.stack([p * w for p, w in used]).sum(0)
