"""Views whose prompts act on a part of the canvas, or in a part of the sampling: they have no say elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def within_extents(
    predictions: Sequence[torch.Tensor], extents: Sequence[torch.Tensor | None], *weights: torch.Tensor
) -> list[torch.Tensor]:
    """Each prediction inside its view's extent, and outside of it the weighted mean of the views that act there.

    An average with these weights is then one of those that act. Where none does, all stay as they are.

    Args:
        predictions: N tensors (batch, …, height, width) in the canonical frame.
        extents: N tensors of true and false that fit them; None is everywhere.
        weights: how much each view counts, ≥ 0, (batch or 1, N). Further ones count where no view of those before does.
    """
    if all(where is None for where in extents):
        return list(predictions)
    every = torch.stack(list(predictions))  # (views, batch, …)
    acts = [torch.ones_like(x) if w is None else w.to(x).expand_as(x) for x, w in zip(every, extents, strict=True)]
    acting, share = torch.stack(acts), torch.zeros_like(every)
    for given in weights:
        by_view = given.T.reshape(*given.T.shape, *[1] * (every.ndim - 2)).to(every)
        share = torch.where(share.sum(0) > 0, share, by_view * acting)
    total = share.sum(0)
    others = (share * every).sum(0) / total.clamp(min=torch.finfo(total.dtype).tiny)
    return [
        x if where is None else torch.where(where | (total == 0), x, others)
        for x, where in zip(predictions, extents, strict=True)
    ]
