"""Pictures as other nodes hand them on: with an alpha channel, or with a single channel for grey."""

from __future__ import annotations

import torch

COLOURS = 3


def check_pictures(image: torch.Tensor) -> None:
    """Refuses what is no IMAGE (batch, height, width, channels), and an empty one.

    Raises:
        ValueError: what it is, and what to connect.
    """
    if image.ndim != 4 or not image.shape[-1]:
        raise ValueError(
            f"A picture has the shape {tuple(image.shape)}, which is no IMAGE (batch, height, width, channels); for a "
            "mask, put Convert Mask to Image in between."
        )
    if not image.numel():
        raise ValueError("The batch of pictures is empty; connect at least one picture.")


def colours_of(image: torch.Tensor) -> torch.Tensor:
    """The colours of an IMAGE (batch, height, width, channels), (batch, height, width, 3); itself if it has no more.

    One channel is grey, and so is the first of two. What follows the colours is alpha, which is left out.

    Raises:
        ValueError: as ``check_pictures``.
    """
    check_pictures(image)
    if image.shape[-1] == COLOURS:
        return image
    return image[..., :COLOURS] if image.shape[-1] > COLOURS else image[..., :1].expand(-1, -1, -1, COLOURS)
