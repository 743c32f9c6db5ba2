"""The transformer's loss: the error of its velocity, by flow matching (Lipman et al. 2210.02747)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.model_management
import torch
import torch.nn.functional as F
from comfy.ldm.modules.attention import attention_pytorch

from ...host.engine.gradients import temporarily_set
from .. import architecture
from .batches import Batch

LEVEL_MEAN, LEVEL_SPREAD = 0.9, 1.0
"""Of the logit of the noise level. The mean is 0.2 for cells of 8 px; noise hides less of a picture that has four times
as many cells, and log 2 more restores that (Esser et al. 2403.03206, section 5.3.2)."""


def _attend(_original: object, *args: Any, **kwargs: Any) -> torch.Tensor:
    """The attention of a training step. On a CPU the host would cut it into parts, which is slower at this size."""
    return attention_pytorch(*args, **kwargs)


def velocity_of(dit: Callable[..., torch.Tensor], x: torch.Tensor, t: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """A trainable transformer's velocity at latents (b, 4, h, w) of noise levels (b,), for text rows (b, rows, d)."""
    with temporarily_set(comfy.model_management, "in_training", True):  # newer hosts fuse what has no backward pass
        return dit(x, t, rows, rows.shape[1], transformer_options={"optimized_attention_override": _attend})


def velocity_loss(
    dit: Callable[..., torch.Tensor],
    text: torch.nn.Module,
    encode: Callable[[torch.Tensor], torch.Tensor],
    batch: Batch,
    generator: torch.Generator,
) -> torch.Tensor:
    """The loss of one batch at random noise levels. ``text`` is frozen."""
    pictures, tokens, _nouns, _masks = batch
    with torch.no_grad():
        z, context = encode(pictures), text(tokens)[0]
    t = torch.sigmoid(LEVEL_MEAN + LEVEL_SPREAD * torch.randn(len(z), generator=generator))
    noise = torch.randn(z.shape, generator=generator)
    level = t.view(-1, 1, 1, 1)
    rows = context[:, : architecture.TEXT_ROWS]
    return F.mse_loss(velocity_of(dit, (1 - level) * z + level * noise, t, rows), noise - z)
