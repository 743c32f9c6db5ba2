"""One picture from several decodings of the same anagram, one per view ("LookingGlass", 2504.08902, section 4.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

LEVELS = 4
DETAIL = 0.25  # the paper's 0.25 to 0.5; 1 over-sharpens


def blend(pictures: torch.Tensor, detail: float = DETAIL) -> torch.Tensor:
    """The mean of pictures that keeps more of the strongest details than a plain mean.

    Every band of a Laplacian pyramid is averaged to its mean m. Fine bands lean by ``detail`` from m to the mean
    weighted by magnitude: m + detail · (v − m), v = Σ|aᵢ|aᵢ / Σ|aᵢ|.

    Args:
        pictures: (views, batch, channels, height, width).

    Returns:
        (batch, channels, height, width). Equal pictures come back as they are, up to rounding.
    """
    if len(pictures) == 1:
        return pictures[0]
    levels = min(LEVELS, min(pictures.shape[-2:]).bit_length() - 1)
    bands, rest = [], pictures
    for _ in range(levels):
        low = _half(rest)
        bands.append(rest - _back(low, rest))
        rest = low
    out = rest.mean(0)
    for band in reversed(bands):
        out = _back(out.unsqueeze(0), band)[0] + _lean(band, detail)
    return out


def _half(pictures: torch.Tensor) -> torch.Tensor:
    return F.avg_pool2d(pictures.flatten(0, 1), 2, ceil_mode=True).unflatten(0, pictures.shape[:2])


def _back(low: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    grown = F.interpolate(low.flatten(0, 1), size=like.shape[-2:], mode="bilinear", align_corners=False)
    return grown.unflatten(0, low.shape[:2])


def _lean(band: torch.Tensor, detail: float) -> torch.Tensor:
    mean, strength = band.mean(0), band.abs()
    weighted = (strength * band).sum(0) / strength.sum(0).clamp(min=1e-8)
    return mean + detail * (weighted - mean)
