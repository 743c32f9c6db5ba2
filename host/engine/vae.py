"""Facts about a VAE the host has loaded."""

from __future__ import annotations

from typing import Any

import torch

PIXEL_CHANNELS = 3
"""How many channels a latent has that is the picture itself."""


def cell_side(vae: Any) -> int:
    """How many pixels a side of one latent cell covers; 1 for models that work on pixels."""
    return int(vae.spacial_compression_encode())


def decoded_pictures(vae: Any, latent: torch.Tensor) -> torch.Tensor:
    """Pictures (batch · frames, height, width, 3), as the host's VAE Decode gives them, of a latent with a time axis too."""
    pictures = vae.decode(latent)
    return pictures.flatten(0, -4) if pictures.ndim > 4 else pictures


def encoded_latents(vae: Any, pictures: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The latents of pictures (batch, height, width, 3), with the axes, dtype and device of ``like``. With a time axis each
    goes by itself: a VAE of films takes a batch for the frames of one."""
    latents = torch.cat([vae.encode(one) for one in pictures.split(1)]) if like.ndim > 4 else vae.encode(pictures)
    return latents.to(like)


def check_turned_latent(view: Any, latent: torch.Tensor) -> None:
    """Refuses a view in which a latent (batch, channels, …, height, width) cannot be decoded.

    Raises:
        ValueError: the view is for pixels, or resampled; the canvas is not square, or its parts do not divide it.
    """
    pixels = latent.shape[1] == PIXEL_CHANNELS
    if view.latent == "finished pixels" or (view.latent == "pixels only" and not pixels):
        raise ValueError(
            f"The view '{view.name}' has no meaning on latents, so there is nothing to decode in it; take VAE Decode for what "
            "Anagram Pixel Guider has sampled."
        )
    view.check(*latent.shape[-2:])
