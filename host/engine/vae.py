"""Decoding and encoding with a VAE that the host has loaded."""

from __future__ import annotations

from typing import Protocol

import torch

from ..types import VAE

PIXEL_CHANNELS = 3
"""The number of channels of a latent that is the picture itself."""


class LatentView(Protocol):
    """A view, and whether it has a meaning on latents."""

    @property
    def name(self) -> str: ...
    @property
    def latent(self) -> str: ...
    def check(self, height: int, width: int) -> None: ...


def cell_side(vae: VAE) -> int:
    """The side of one latent cell in pixels; 1 for models that work on pixels."""
    return int(vae.spacial_compression_encode())


def decoded_pictures(vae: VAE, latent: torch.Tensor) -> torch.Tensor:
    """Pictures (batch · frames, height, width, 3), as the host's VAE Decode returns them. Frames if there is a time
    axis."""
    pictures = vae.decode(latent)
    return pictures.flatten(0, -4) if pictures.ndim > 4 else pictures


def encoded_latents(vae: VAE, pictures: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The latents of pictures (batch, height, width, 3), with the axes, dtype and device of ``like``.

    With a time axis each picture is encoded alone, because a VAE of films takes a batch for the frames of one.
    """
    latents = torch.cat([vae.encode(one) for one in pictures.split(1)]) if like.ndim > 4 else vae.encode(pictures)
    return latents.to(like)


def check_turned_latent(view: LatentView, latent: torch.Tensor) -> None:
    """Refuses a view in which a latent (batch, channels, …, height, width) cannot be decoded.

    Raises:
        ValueError: the view is for pixels, or resampled; the canvas is not square, or its parts do not divide it.
    """
    pixels = latent.shape[1] == PIXEL_CHANNELS
    if view.latent == "finished pixels" or (view.latent == "pixels only" and not pixels):
        raise ValueError(
            f"The view '{view.name}' has no meaning on latents, so there is nothing to decode in it; take VAE Decode "
            "for the result of Anagram Pixel Guider."
        )
    view.check(*latent.shape[-2:])
