"""The UNet's loss: the v-prediction error, and a small term that asks the cross-attention of each noun to stay on its
object (TokenCompose, Wang et al. 2312.03626, eq. 4). It is what teaches "left" and "right" early."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from .. import architecture
from .batches import Batch
from .networks import Tokenizer

TOKEN_LOSS = 0.02


def alphas_and_sigmas() -> tuple[torch.Tensor, torch.Tensor]:
    """Signal and noise levels of the 1000 training steps, variance preserving: a² + s² = 1."""
    schedule = architecture.SCHEDULE
    roots = torch.linspace(schedule["linear_start"] ** 0.5, schedule["linear_end"] ** 0.5, schedule["timesteps"])
    signal = torch.cumprod(1 - roots.double() ** 2, 0)
    return signal.sqrt().float(), (1 - signal).sqrt().float()


class AttentionMaps:
    """The attention of one forward pass, differentiable, with the cross-attention maps of each noun kept."""

    def __init__(self, nouns: torch.Tensor) -> None:
        self.nouns = nouns  # (batch, objects): token position of each object's noun
        self.maps: list[torch.Tensor] = []  # each (batch, objects, pixels), a distribution over pixels

    def __call__(
        self, _original: object, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, **_: object
    ) -> torch.Tensor:
        b, pixels, _width = q.shape
        q, k, v = (t.view(b, t.shape[1], heads, -1).transpose(1, 2) for t in (q, k, v))
        weights = ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(-1)  # (batch, heads, pixels, keys)
        if k.shape[2] == Tokenizer.LENGTH and pixels >= 64:
            columns = self.nouns[:, None, None].expand(-1, heads, pixels, -1)
            noun = weights.gather(3, columns).float().mean(1).transpose(1, 2)
            self.maps.append(noun / noun.sum(-1, keepdim=True).clamp(min=1e-8))
        return (weights @ v).transpose(1, 2).reshape(b, pixels, -1)

    def loss(self, masks: torch.Tensor) -> torch.Tensor:
        """Mean of (1 − mass inside the object's mask)²; ``masks`` is (batch, objects, h, w) at latent size."""
        total = masks.new_zeros(())
        for noun in self.maps:
            factor = round((masks.shape[-2] * masks.shape[-1] / noun.shape[-1]) ** 0.5)
            inside = F.max_pool2d(masks, factor).flatten(2)
            total = total + ((1 - (noun * inside).sum(-1)) ** 2).mean()
        return total / max(len(self.maps), 1)


def training_loss(
    unet: torch.nn.Module,
    text: torch.nn.Module,
    encode: Callable[[torch.Tensor], torch.Tensor],
    batch: Batch,
    levels: tuple[torch.Tensor, torch.Tensor],
    generator: torch.Generator,
) -> torch.Tensor:
    """The loss of one batch at random noise levels."""
    pictures, tokens, nouns, masks = batch
    alphas, sigmas = levels
    z = encode(pictures)
    t = torch.randint(0, len(alphas), (len(z),), generator=generator)
    a, s = alphas[t].view(-1, 1, 1, 1), sigmas[t].view(-1, 1, 1, 1)
    noise = torch.randn(z.shape, generator=generator)
    maps = AttentionMaps(nouns)
    context = text(tokens)[0]
    with torch.autocast("cpu", torch.bfloat16):
        v = unet(a * z + s * noise, t, context, transformer_options={"optimized_attention_override": maps})
    return F.mse_loss(v.float(), a * noise - s * z) + TOKEN_LOSS * maps.loss(masks)
