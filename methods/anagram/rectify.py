"""Noise variance rectification: gives back the power that averaging takes from the noise.

The mean of predictions that disagree has less power than each of them, and the sampler then removes too little noise
("Diffusion-based Visual Anagram as Multi-task Learning", 2412.02693, section 3.4).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .prediction import Predictions


def gram(noises: torch.Tensor) -> torch.Tensor:
    """Mean products of the views' noises, (batch, views, views), from (batch, views, …), in float32."""
    flat = noises.float().flatten(2)
    return flat @ flat.transpose(1, 2) / flat.shape[-1]


def gain_match(products: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """√(Σ αᵢ Gᵢᵢ / αᵀGα): the power the views have on average. At least 1 by convexity, 1 where all agree.

    Differs from the paper: its form below also cancels the power that guidance adds.
    """
    mixed = torch.einsum("bi,bij,bj->b", weights, products, weights)
    single = (weights * products.diagonal(dim1=1, dim2=2)).sum(-1)
    return (single / mixed.clamp(min=1e-12)).sqrt()


def gain_unit(products: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """(αᵀGα)^-½: unit variance, the paper's intent (its code takes the diagonal of G as 1)."""
    mixed = torch.einsum("bi,bij,bj->b", weights, products, weights)
    return mixed.clamp(min=1e-12).rsqrt()


GAINS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {"match": gain_match, "unit": gain_unit}


def gain(p: Predictions, weights: torch.Tensor, form: str, strength: float, max_gain: float = 0.0) -> torch.Tensor:
    """The factor for the noise of the mix, (batch,), between 1 and ``max_gain``.

    Args:
        weights: (batch, views).
        form: a name of ``GAINS``.
        strength: 0 is off, 1 the whole correction.
        max_gain: 0 is √views.
    """
    noises = torch.stack([p.as_noise(x0) for x0 in p.guided()], 1)
    full = GAINS[form](gram(noises), weights.float())
    return (1 + strength * (full - 1)).clamp(1.0, max(1.0, max_gain or len(p.positive) ** 0.5))


def with_gain(p: Predictions, denoised: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """The denoised picture whose implied noise is γ (``factor``) times as strong: x0 − (γ − 1) · (sigma / signal) ·
    eps."""
    extra = (factor - 1).view(-1, *[1] * (denoised.ndim - 1)).to(denoised.dtype)
    return denoised - extra * (p.sigma / p.signal) * p.as_noise(denoised)
