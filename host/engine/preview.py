"""Small pictures of a running sampling on its node, through the host's own channel of previews.

A guider calls ``with_previews`` once: its result adds a picture to the host's callback, after every step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import comfy.utils
import latent_preview
import torch
from PIL import Image

from ...methods.panels import Panel, side_by_side
from ..types import ModelPatcher, StepCallback

Painter = Callable[[torch.Tensor], torch.Tensor]
"""The first of clean latents (batch, channels, …, h, w), as the model sees them, to a small picture (h, w, 3) in
0..1."""

Panels = Callable[[torch.Tensor, Painter], Sequence[Panel]]
"""The panels of a step, from its clean latents, as the model sees them, and a painter of latents."""


def painter(model: ModelPatcher) -> Painter | None:
    """A painter of this model's latents, for any preview method of the host. None for a latent format without
    colours, or whose colours are for another number of channels (0.33.0 has one): a preview must not end a run."""
    latent_format = model.get_model_object("latent_format")
    factors = getattr(latent_format, "latent_rgb_factors", None)
    reshaped = getattr(latent_format, "latent_rgb_factors_reshape", None) is not None
    if factors is not None and not reshaped and len(factors) != latent_format.latent_channels:
        return None
    previewer = latent_preview.get_previewer(model.load_device, latent_format)
    if previewer is None and factors is not None:
        others = (getattr(latent_format, f"latent_rgb_factors_{name}", None) for name in ("bias", "reshape"))
        previewer = latent_preview.Latent2RGBPreviewer(factors, *others)
    if previewer is None:
        return None

    def paint(latents: torch.Tensor) -> torch.Tensor:
        picture = previewer.decode_latent_to_preview(latents[:1].float())
        pixels = torch.frombuffer(bytearray(picture.convert("RGB").tobytes()), dtype=torch.uint8)
        return pixels.reshape(picture.height, picture.width, 3) / 255

    return paint


def small_picture(model: ModelPatcher, latents: torch.Tensor) -> torch.Tensor | None:
    """The first of clean latents as a small picture (h, w, 3) in 0..1. None for a latent format without colours.

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
    """Shows pictures side by side on the running node, with its bar at this step. A cancelled run raises here."""
    comfy.utils.ProgressBar(steps).update_absolute(step, steps, preview_message(side_by_side(panels)))


def with_previews(callback: StepCallback | None, model: ModelPatcher, panels: Panels) -> StepCallback | None:
    """A sampler's callback that also shows panels after each step. Without a painter, the callback as it was.

    The host's own callback runs first, so our picture stays. A run without a callback has no viewer.
    """
    paint = None if callback is None else painter(model)
    if callback is None or paint is None:
        return callback

    def show_step(step: int, x0: torch.Tensor, x: torch.Tensor, steps: int) -> None:
        callback(step, x0, x, steps)
        show_panels(panels(x0, paint), step + 1, steps)

    return show_step
