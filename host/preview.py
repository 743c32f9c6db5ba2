"""Small pictures of latents while something works, whatever preview method the host was started with."""

from __future__ import annotations

from typing import Any

import latent_preview
import torch
from PIL import Image


def shown(model: Any, latents: torch.Tensor) -> torch.Tensor | None:
    """The first of clean latents as a small picture (h, w, 3) in 0..1, or None where the model's format has no colours.

    Args:
        latents: as the host's sampler returns them, (batch, channels, h, w).
    """
    latent_format = model.get_model_object("latent_format")
    factors = getattr(latent_format, "latent_rgb_factors", None)
    previewer = latent_preview.get_previewer(model.load_device, latent_format)
    if previewer is None and factors is not None:
        previewer = latent_preview.Latent2RGBPreviewer(factors, getattr(latent_format, "latent_rgb_factors_bias", None))
    if previewer is None:
        return None
    picture = previewer.decode_latent_to_preview(latent_format.process_in(latents[:1].float()))
    return torch.frombuffer(bytearray(picture.convert("RGB").tobytes()), dtype=torch.uint8).reshape(
        picture.height, picture.width, 3
    ) / 255  # fmt: skip


def preview_message(picture: torch.Tensor) -> tuple[str, Image.Image, int]:
    """The picture as the host's progress bar takes it."""
    pixels = (picture.clamp(0, 1) * 255).byte().cpu().numpy()
    return "JPEG", Image.fromarray(pixels), latent_preview.MAX_PREVIEW_RESOLUTION
