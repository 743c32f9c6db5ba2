"""What both training nodes share: their widgets, and what their outputs show."""

from __future__ import annotations

from dataclasses import replace

import torch

from ...host.engine.vae import cell_side
from ...host.erase.session import Trained
from ...host.erase.train import latents_of
from ...host.schema import io
from ...host.types import VAE
from ...methods.erase.curve import curve_of
from ...methods.erase.edit import Edit
from ...methods.erase.trained import BUDGETS
from ...methods.erase.trained.plan import TrainOptions

CELL = 8  # pixels per latent cell if no VAE says otherwise: SD 1, SD 2, SDXL


def shared_widgets() -> list[io.Input]:
    """Budget, seed, and the size of the pictures."""
    return [*_run_widgets(), *_size_widgets()]


def _run_widgets() -> list[io.Input]:
    return [
        io.Combo.Input(
            "budget",
            options=list(BUDGETS),
            default="standard",
            tooltip="How long to train: 'draft' to see whether it goes the right way, 'standard' to use, 'thorough' "
            "for stubborn concepts (four times as long). Start with draft.",
        ),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=2**31 - 1,
            tooltip="The same seed on the same machine gives the same edit, to the last bit. Start with 0.",
        ),
    ]


def _size_widgets() -> list[io.Input]:
    return [
        io.Int.Input(
            "width",
            default=512,
            min=64,
            max=4096,
            step=8,
            tooltip="Width of the pictures in training, in pixels. Smaller is faster. Start with 512 for SD 1.5, 768 "
            "for SDXL (the demo model: 128).",
        ),
        io.Int.Input(
            "height",
            default=512,
            min=64,
            max=4096,
            step=8,
            tooltip="Height of the pictures in training, in pixels. Start with the width.",
        ),
    ]


def shared_outputs() -> list[io.Output]:
    """Report, loss curve and previews."""
    return [
        io.String.Output(
            "report", display_name="report", tooltip="How the training went: why it ended, and both losses."
        ),
        io.Image.Output(
            "loss_curve",
            display_name="loss curve",
            tooltip="What is left to erase (red) and how far the rest has moved (blue). Red should fall, blue stay "
            "below it.",
        ),
        io.Image.Output(
            "previews",
            display_name="previews",
            tooltip="Small pictures of the concept's prompt during the training, first to last.",
        ),
    ]


def with_run(
    options: TrainOptions | None, seed: int, canvas: tuple[int, int], vae: VAE | None, start: Edit | None
) -> TrainOptions:
    """The options with what the training node itself sets. ``canvas``: height and width in pixels."""
    side = CELL if vae is None else cell_side(vae)
    size = canvas[0] // side, canvas[1] // side
    return replace(options or TrainOptions(), seed=seed, size=size, start=start or Edit())


def latents(vae: VAE | None, images: torch.Tensor | None, height: int, width: int) -> torch.Tensor | None:
    """The connected pictures as latents of the canvas, or None if there are none.

    Raises:
        ValueError: there are pictures but no VAE, or the batch of pictures is empty.
    """
    if images is None:
        return None
    if vae is None:
        raise ValueError("Pictures are connected but no VAE to read them with; connect the checkpoint's VAE.")
    return latents_of(vae, images, height, width)


def pictures_of(trained: Trained, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss curve, and the previews at the size of the canvas."""
    curve = curve_of(trained.outcome.erase, trained.outcome.preserve)
    if trained.previews is None:
        return curve, torch.zeros(1, height, width, 3)
    previews = torch.nn.functional.interpolate(trained.previews.movedim(-1, 1), (height, width), mode="nearest")
    return curve, previews.movedim(1, -1)
