"""The transformer's loss: the error of its velocity, by flow matching (Lipman et al. 2210.02747).

Its target comes from the bundled UNet, where that knows the noise level: the UNet's prediction at the same level is the
mean of what the picture's own velocity would be, without the noise of a single picture.
"""

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
from .unet_loss import alphas_and_sigmas

LEVEL_MEAN, LEVEL_SPREAD = 0.2, 1.0  # of the logit of the noise level


def _attend(_original: object, *args: Any, **kwargs: Any) -> torch.Tensor:
    """The attention of a training step. On a CPU the host would cut it into parts, which is slower at this size."""
    return attention_pytorch(*args, **kwargs)


def velocity_of(dit: torch.nn.Module, x: torch.Tensor, t: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """A trainable transformer's velocity at latents (b, 4, h, w) of noise levels (b,), for text rows (b, rows, d)."""
    with temporarily_set(comfy.model_management, "in_training", True):  # newer hosts fuse what has no backward pass
        return dit(x, t, rows, rows.shape[1], transformer_options={"optimized_attention_override": _attend})


class Teacher:
    """A v-prediction UNet that answers as a flow model: x = (1 − t)·picture + t·noise, velocity = noise − picture."""

    def __init__(self, unet: torch.nn.Module) -> None:
        self.unet = unet
        self.alphas, self.sigmas = alphas_and_sigmas()
        self.levels = self.sigmas / (self.alphas + self.sigmas)
        """The UNet's noise levels as a flow's, rising; beyond the last one it knows nothing."""

    def nearest(self, t: torch.Tensor) -> torch.Tensor:
        """The index of the UNet's level nearest to each noise level (b,)."""
        return (self.levels - t[:, None]).abs().argmin(1)

    @torch.no_grad()
    def velocity(self, x: torch.Tensor, index: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """The velocity at latents (b, 4, h, w) whose noise level is the UNet's at ``index``."""
        a, s = (table[index].view(-1, 1, 1, 1) for table in (self.alphas, self.sigmas))
        x = x * (a + s)  # both ways of mixing differ by a factor
        return (a + s) * self.unet(x, index, context) + (s - a) * x


def velocity_loss(
    dit: torch.nn.Module,
    text: torch.nn.Module,
    teacher: Teacher | None,
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
    if teacher is not None:
        index = teacher.nearest(t)
        taught = t <= teacher.levels[-1]
        t = torch.where(taught, teacher.levels[index], t)
    level = t.view(-1, 1, 1, 1)
    x, target = (1 - level) * z + level * noise, noise - z
    if teacher is not None:
        target = torch.where(taught.view(-1, 1, 1, 1), teacher.velocity(x, index, context), target)
    rows = context[:, : architecture.TEXT_ROWS]
    return F.mse_loss(velocity_of(dit, x, t, rows), target)
