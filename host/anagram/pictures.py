"""Finished pictures of an anagram in its views: upright, decoded fairly to all of them, and scored by CLIP."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ...methods.anagram.blend import blend
from ...methods.anagram.views import View
from ..engine.auxiliary_models import keep_model_loaded
from ..engine.vae import cell_side, check_turned_latent, decoded_pictures
from ..text.clip_score import cosine_similarities
from ..types import VAE, ClipVision, ModelPatcher

ViewAtCells = Callable[[int], View]
"""A view on pictures whose latent has cells of so many pixels a side; its pieces end where cells end."""


def cell_in(pictures: torch.Tensor, vae: VAE | None) -> int:
    """The side of a latent cell in px; 1 without a VAE, or for pictures (b, h, w, 3) that cells do not divide."""
    cell = 1 if vae is None else cell_side(vae)
    return 1 if any(length % cell for length in pictures.shape[1:3]) else cell


def views_at(pictures: torch.Tensor, views: Sequence[ViewAtCells], cell: int) -> list[View]:
    """The views at cells of that size.

    Raises:
        ValueError: a view that these pictures cannot take.
    """
    listed = [at_cells(cell) for at_cells in views]
    for view in listed:
        view.check(*pictures.shape[1:3])
    return listed


def views_on(pictures: torch.Tensor, views: Sequence[ViewAtCells], vae: VAE | None) -> list[View]:
    """The views as they look on these pictures (b, h, w, 3); with a VAE, pieces end where its latent cells end."""
    return views_at(pictures, views, cell_in(pictures, vae))


def upright_pictures(pictures: torch.Tensor, views: Sequence[View]) -> torch.Tensor:
    """Every picture in every view, (b, views, h, w, 3)."""
    channels_first = pictures.movedim(-1, 1)
    return torch.stack([view.show(channels_first) for view in views], 1).movedim(2, -1).clamp(0, 1)


def decode_in_views(vae: VAE, latent: torch.Tensor, views: Sequence[ViewAtCells]) -> torch.Tensor:
    """The latent decoded once per view and blended, (batch, h, w, 3): the VAE's strokes do not favour the first view.

    Raises:
        ValueError: a view in which this latent cannot be decoded.
    """
    on_latent, on_picture = ([at_cells(cell) for at_cells in views] for cell in (1, cell_side(vae)))
    for view in on_latent:
        check_turned_latent(view, latent)
    pictures = [
        shown.unshow(decoded_pictures(vae, view.forward(latent).contiguous()).movedim(-1, 1))
        for view, shown in zip(on_latent, on_picture, strict=True)
    ]
    return blend(torch.stack(pictures)).movedim(1, -1).clamp(0, 1).contiguous()


def clip_score_of(
    model: ModelPatcher, vae: VAE, views: Sequence[ViewAtCells], clip_vision: ClipVision, texts: torch.Tensor
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function that scores denoised latents, (batch, …), by CLIP in each view, (batch, views).

    Args:
        texts: the embedding of each view's prompt, (views, numbers).
    """
    to_wire = model.get_model_object("latent_format").process_out

    def score(latents: torch.Tensor) -> torch.Tensor:
        with keep_model_loaded(model.model, latents):
            pictures = decoded_pictures(vae, to_wire(latents))
            upright = upright_pictures(pictures, views_on(pictures, views, vae))
            cosines = cosine_similarities(clip_vision, upright.flatten(0, 1), texts).unflatten(0, upright.shape[:2])
        frames = cosines.diagonal(dim1=1, dim2=2)  # more than one per latent in films only
        return frames.unflatten(0, (len(latents), -1)).mean(1)

    return score
