"""Small pictures while something works, on the node that works, through the host's own channel of previews.

A guider calls ``watched`` once; what it adds to the host's callback is a picture after every step. Nothing outlives the run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import comfy.utils
import latent_preview
import torch
from PIL import Image

from ...methods.panels import Panel, side_by_side

Painter = Callable[[torch.Tensor], torch.Tensor]
"""The first of clean latents (batch, channels, …, h, w), as the model sees them, to a small picture (h, w, 3) in 0..1."""

Panels = Callable[[torch.Tensor, Painter], Sequence[Panel]]
"""What to show of a step: called with its clean latents, as the model sees them, and with what paints latents."""


def painter(model: Any) -> Painter | None:
    """What paints this model's latents, whatever preview method the host was started with; None where its format has no
    colours."""
    latent_format = model.get_model_object("latent_format")
    factors = getattr(latent_format, "latent_rgb_factors", None)
    previewer = latent_preview.get_previewer(model.load_device, latent_format)
    if previewer is None and factors is not None:
        previewer = latent_preview.Latent2RGBPreviewer(factors, getattr(latent_format, "latent_rgb_factors_bias", None))
    if previewer is None:
        return None

    def paint(latents: torch.Tensor) -> torch.Tensor:
        picture = previewer.decode_latent_to_preview(latents[:1].float())
        return torch.frombuffer(bytearray(picture.convert("RGB").tobytes()), dtype=torch.uint8).reshape(
            picture.height, picture.width, 3
        ) / 255  # fmt: skip

    return paint


def small_picture(model: Any, latents: torch.Tensor) -> torch.Tensor | None:
    """The first of clean latents as a small picture (h, w, 3) in 0..1, or None where the model's format has no colours.

    Args:
        latents: as the host's sampler returns them, (batch, channels, h, w).
    """
    paint = painter(model)
    return None if paint is None else paint(model.get_model_object("latent_format").process_in(latents[:1].float()))


def preview_message(picture: torch.Tensor) -> tuple[str, Image.Image, int]:
    """The picture as the host's progress bar takes it."""
    pixels = (picture.clamp(0, 1) * 255).byte().cpu().numpy()
    return "JPEG", Image.fromarray(pixels), latent_preview.MAX_PREVIEW_RESOLUTION


def show_panels(panels: Sequence[Panel], step: int, steps: int) -> None:
    """Shows pictures side by side on the node that is working, whose bar stands at this step; raises if the run was cancelled."""
    comfy.utils.ProgressBar(steps).update_absolute(step, steps, preview_message(side_by_side(panels)))


def with_previews(callback: Any, model: Any, panels: Panels) -> Any:
    """A sampler's callback that also shows panels after each step; where latents cannot be painted, the callback as it was.

    The host's own callback goes first: ours is the picture that stays. A run without a callback has nobody who watches.
    """
    paint = None if callback is None else painter(model)
    if paint is None:
        return callback

    def watching(step: int, x0: torch.Tensor, x: torch.Tensor, steps: int) -> None:
        callback(step, x0, x, steps)
        show_panels(panels(x0, paint), step + 1, steps)

    return watching
