"""Views whose prompts act on a part of the canvas, or in a part of the sampling: they have no say elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def within_extents(
    predictions: Sequence[torch.Tensor], extents: Sequence[torch.Tensor | None], weights: Sequence[float]
) -> list[torch.Tensor]:
    """Each prediction inside its view's extent, and outside of it the weighted mean of the views that act there.

    Any average of the views is then one of those that act. Where none does, all stay as they are.

    Args:
        predictions: N tensors (batch, …, height, width) in the canonical frame.
        extents: N tensors of true and false that fit them; None is everywhere.
        weights: how much each view counts, ≥ 0.
    """
    if all(where is None for where in extents):
        return list(predictions)
    share = torch.stack(
        [
            weight * (torch.ones_like(x) if where is None else where.to(x).expand_as(x))
            for x, where, weight in zip(predictions, extents, weights, strict=True)
        ]
    )
    total = share.sum(0)
    others = (share * torch.stack(list(predictions))).sum(0) / total.clamp(min=torch.finfo(total.dtype).tiny)
    return [
        x if where is None else torch.where(where | (total == 0), x, others)
        for x, where in zip(predictions, extents, strict=True)
    ]
