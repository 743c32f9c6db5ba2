"""The demo model's autoencoder: an analytic encoder and a learned decoder.

The encoder is a fixed convolution. Its kernels are symmetric under the square's eight symmetries, and
``encode(turn(x)) == turn(encode(x))`` holds exactly for flips and quarter turns. The decoder learns the same from
augmented data. Anagrams on latents need both.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .architecture import LATENTS, Latents

COLOUR_GAIN, COLOUR_OFFSET = 1.5, 0.3  # z = gain · (mean − offset): near zero mean, unit spread on the demo pictures
DETAIL_GAIN = 6.0
WIDTHS = {8: (160, 80, 40), 4: (96, 48)}
"""Channels of the decoder's stages, by px per cell: each stage doubles the resolution."""
_LUMA = (0.299, 0.587, 0.114)


def encoder_kernel(latents: Latents) -> torch.Tensor:
    """The encoder's weights, (4, 3, f, f): three cell means and a luma centre-surround."""
    f = latents.factor
    kernel = torch.zeros(latents.channels, 3, f, f)
    for channel in range(3):
        kernel[channel, channel] = COLOUR_GAIN / f**2
    surround = torch.full((f, f), -1 / f**2)
    surround[f // 4 : -f // 4, f // 4 : -f // 4] += 1 / (f // 2) ** 2
    for channel, luma in enumerate(_LUMA):
        kernel[3, channel] = DETAIL_GAIN * luma * surround
    return kernel


def latent_rgb_factors() -> tuple[list[list[float]], list[float]]:
    """(4 × 3 factors, 3 biases) that turn a latent into RGB in [-1, 1]: the host's latent preview uses them."""
    factors = [[1 / COLOUR_GAIN if row == column else 0.0 for column in range(3)] for row in range(4)]
    return factors, [COLOUR_OFFSET] * 3


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.second(F.silu(self.first(F.silu(x))))


class _Decoder(nn.Module):
    """Latent (b, 4, h, w) to the detail that the enlarged cell colours lack, (b, 3, f·h, f·w)."""

    def __init__(self, latents: Latents, depth: int = 3) -> None:
        super().__init__()
        widths = WIDTHS[latents.factor]
        layers: list[nn.Module] = [nn.Conv2d(latents.channels, widths[0], 3, padding=1)]
        for stage, width in enumerate(widths):
            layers += [_Residual(width) for _ in range(depth)]
            out = widths[stage + 1] if stage + 1 < len(widths) else 12
            if stage + 1 < len(widths):
                layers.append(nn.Upsample(scale_factor=2, mode="nearest"))
            layers += [nn.SiLU(), nn.Conv2d(width, out, 3, padding=1)]
        self.layers = nn.Sequential(*layers, nn.PixelShuffle(2))

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.layers(z)


class Autoencoder(nn.Module):
    """Pictures in [-1, 1], (b, 3, f·h, f·w), to latents (b, 4, h, w) and back. Deterministic both ways."""

    kernel: torch.Tensor

    def __init__(self, kind: str = "unet") -> None:
        super().__init__()
        latents = LATENTS[kind]
        self.factor = latents.factor
        self.register_buffer("kernel", encoder_kernel(latents))
        self.decoder = _Decoder(latents)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        bias = x.new_tensor([-COLOUR_GAIN * COLOUR_OFFSET] * 3 + [0.0])
        return F.conv2d(x, self.kernel.to(x), bias, stride=self.factor)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        coarse = F.interpolate(
            z[:, :3] / COLOUR_GAIN + COLOUR_OFFSET, scale_factor=self.factor, mode="bilinear", align_corners=False
        )
        return coarse + self.decoder(z)
