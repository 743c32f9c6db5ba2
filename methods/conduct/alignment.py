"""Layout alignment: gradient steps bring the latent's self-attention keys to those of the reference."""

from __future__ import annotations

import torch


def alignment_loss(features: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """The squared distance of the keys from the reference's (2408.03632), per picture.

    Differs from the paper: the paper takes the mean over tokens and channels. Its gradient per latent cell shrinks with
    the number of tokens, so its weight grows with it. This sum over tokens has one weight for all sizes.

    Args:
        features: (batch, tokens, channels); ``reference``: (1 or batch, tokens, channels).

    Returns:
        (batch,), float32 at least.
    """
    precise = torch.promote_types(features.dtype, torch.float32)
    return (features.to(precise) - reference.to(precise)).square().mean(-1).sum(-1)


def moved_latent(x: torch.Tensor, gradient: torch.Tensor, levels: tuple[float, float], weight: float) -> torch.Tensor:
    """One step: z ← z − w ∂L/∂z of the latent at unit variance, written for x = signal · picture + noise · ε.

    There z = x / √(signal² + noise²): the variance-preserving latent of a UNet, whose signal is 1.

    Args:
        levels: signal and noise.
    """
    signal, noise = levels
    return x - weight * (signal**2 + noise**2) * gradient


def inverted_step(x: torch.Tensor, eps: torch.Tensor, sigma: float, next_sigma: float) -> torch.Tensor:
    """One step of deterministic inversion in sigma space: x' = x + (σ' − σ) ε (DDIM, 2010.02502, eq. 13).

    ``eps`` is the slope (x − denoised) / σ. On flow models it is the velocity, and the step is Euler's.
    """
    return x + (next_sigma - sigma) * eps
