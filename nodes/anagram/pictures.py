"""Anagrams, finished: every view upright, the fair decoding, and the film."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from comfy_api.latest import io, ui

from ...host.engine.vae import cell_side, check_turned_latent, decoded_pictures
from ...host.schema import schema
from ...methods.anagram.blend import blend
from ...methods.anagram.film_size import film_size
from ...methods.anagram.motion import film
from ...methods.anagram.views import View
from ..wires import AnagramViews
from .views import CATEGORY, AnagramView, lines_of

FRAMES_PER_SECOND = 20


def views_on(pictures: torch.Tensor, views: AnagramView, vae: Any | None) -> list[View]:
    """The views as they look on these pictures (b, h, w, 3); with a VAE, pieces end where its latent cells end."""
    return _views_at(pictures, views, _cell_of(pictures, vae))


def _cell_of(pictures: torch.Tensor, vae: Any | None) -> int:
    """The side of a latent cell in px; 1 without a VAE, or for pictures that are no whole number of its cells."""
    cell = 1 if vae is None else cell_side(vae)
    return 1 if any(side % cell for side in pictures.shape[1:3]) else cell


def _views_at(pictures: torch.Tensor, views: AnagramView, cell: int) -> list[View]:
    listed = [link.at_cells(cell) for link in views.in_order()]
    for view in listed:
        view.check(*pictures.shape[1:3])
    return listed


def upright(pictures: torch.Tensor, listed: list[View]) -> torch.Tensor:
    """Every picture in every view, (b, views, h, w, 3)."""
    channels_first = pictures.movedim(-1, 1)
    return torch.stack([view.show(channels_first) for view in listed], 1).movedim(2, -1).clamp(0, 1)


def vae_input(optional: bool = True) -> io.Input:
    """The socket for the VAE by which pieces are cut at cells."""
    return io.Vae.Input(
        "vae", optional=optional,
        tooltip="The VAE the picture was decoded with. With it, the pieces of jigsaw, hinge and circle end where the "
        "latent's cells end, as they did while sampling.",
    )  # fmt: skip


class ConceptsAnagramShowViews(io.ComfyNode):
    """Shows a picture in every view, upright."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptsAnagramShowViews",
            display_name="Show Anagram Views",
            category=CATEGORY,
            description="Turns the finished picture into each of its views, so that every reading stands upright.",
            search_aliases=["visual anagram", "illusion", "contact sheet"],
            is_output_node=True,
            inputs=[
                io.Image.Input("image", tooltip="The finished picture."),
                AnagramViews.Input("views", tooltip="The views it was made with."),
                vae_input(),
            ],
            outputs=[
                io.Image.Output(
                    "upright", display_name="views",
                    tooltip="For every picture of the batch, each of its views in order, as one batch.",
                )
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, image, views, vae=None) -> io.NodeOutput:
        shown = upright(image, views_on(image, views, vae)).flatten(0, 1).contiguous()
        return io.NodeOutput(shown, ui=ui.PreviewImage(shown, cls=cls))


class ConceptsAnagramDecode(io.ComfyNode):
    """Decodes an anagram fairly to all its views."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptsAnagramDecode",
            display_name="Anagram Decode",
            category=CATEGORY,
            description="Decodes the latent once in every view and blends the pictures, so that the strokes the VAE paints "
            "do not favour the first view. Costs one VAE Decode a view.",
            search_aliases=["vae decode", "visual anagram"],
            inputs=[
                io.Latent.Input("samples", tooltip="The sampled latent."),
                vae_input(optional=False),
                AnagramViews.Input("views", tooltip="The views it was made with."),
            ],
            outputs=[
                io.Image.Output("image", display_name="IMAGE", tooltip="The picture, as first view and all others.")
            ],
        )

    @classmethod
    def execute(cls, samples, vae, views) -> io.NodeOutput:
        latent, cell = samples["samples"], cell_side(vae)
        for link in views.in_order():
            check_turned_latent(link.view, latent)
        pictures = []
        for link in views.in_order():
            picture = decoded_pictures(vae, link.view.forward(latent).contiguous()).movedim(-1, 1)
            pictures.append(link.at_cells(cell).unshow(picture))
        return io.NodeOutput(blend(torch.stack(pictures)).movedim(1, -1).clamp(0, 1).contiguous())


class ConceptsAnagramAnimate(io.ComfyNode):
    """The picture turning from view to view."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptsAnagramAnimate",
            display_name="Animate Anagram",
            category=CATEGORY,
            description="Shows the first picture of the batch moving from view to view: still, moving, still. Plays on the "
            "node while you point at it; a click or an arrow key turns it. Save it with Save Animated WEBP, or Create Video and Save Video, at 20 frames a second.",
            search_aliases=["visual anagram", "video", "gif", "webp"],
            is_output_node=True,
            inputs=[
                io.Image.Input("image", tooltip="The finished picture; the first of a batch is shown."),
                AnagramViews.Input("views", tooltip="The views it was made with."),
                io.Int.Input(
                    "still_frames", default=20, min=1, max=200,
                    tooltip="How long each view stands still, in frames of 1/20 s. Start with 20.",
                ),
                io.Int.Input(
                    "moving_frames", default=24, min=2, max=200,
                    tooltip="How long each movement takes, in frames of 1/20 s. Start with 24.",
                ),
                io.Boolean.Input("loop", default=True, tooltip="Whether the film runs back to its start. Start with on."),
                io.Int.Input(
                    "largest_side", default=512, min=64, max=4096, step=8,
                    tooltip="Larger pictures are made smaller for the film, to spare memory: a frame of 512 px takes 7 MB. "
                    "Start with 512.",
                ),
                vae_input(),
                io.String.Input(
                    "captions", multiline=True, default="", optional=True,
                    tooltip="Words under each view while it stands still, a line a view, in Latin letters; empty is none.",
                ),
            ],
            outputs=[io.Image.Output("frames", display_name="frames", tooltip="The frames, with even sides.")],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, image, views, still_frames, moving_frames, loop, largest_side, vae=None, captions=""
    ) -> io.NodeOutput:
        cell = _cell_of(image, vae)
        parts = [view.parts for view in _views_at(image, views, cell)]
        size = film_size(*image.shape[1:3], cell, largest_side, parts)
        picture = _resized(image[:1], size.height, size.width)
        listed = _views_at(picture, views, size.cell)
        pixels = (picture[0] * 255).round().clamp(0, 255).byte().cpu().numpy()
        words = lines_of(captions, len(listed), "captions") if captions.strip() else []
        shots = film(pixels, listed, still_frames, moving_frames, loop, words)
        frames = torch.from_numpy(shots.astype(np.float32) / 255)
        return io.NodeOutput(frames, ui=_flipping(frames, upright(picture, listed)[0], listed, cls))


def _resized(picture: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The picture (b, h, w, 3) at that size, itself if it has it."""
    if picture.shape[1:3] == (height, width):
        return picture
    return torch.nn.functional.interpolate(picture.movedim(-1, 1), size=(height, width), mode="area").movedim(1, -1)


def _flipping(
    frames: torch.Tensor, stills: torch.Tensor, listed: list[View], cls: type[io.ComfyNode]
) -> dict[str, list]:
    """The film and each view's picture in the host's folder of passing files, for the node to play and turn."""
    saved = ui.ImageSaveHelper.save_animated_webp(
        frames, "concepts_anagram", io.FolderType.temp, cls, FRAMES_PER_SECOND, False, 85, 2
    )
    files = ui.PreviewImage(stills, cls=cls).as_dict()["images"]
    views = [{**file, "name": view.name} for file, view in zip(files, listed, strict=True)]
    return {"concepts_flip": [{"film": saved, "views": views}]}


NODES: tuple[type[io.ComfyNode], ...] = (
    ConceptsAnagramShowViews,
    ConceptsAnagramDecode,
    ConceptsAnagramAnimate,
)
