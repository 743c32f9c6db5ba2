"""Anagrams, finished: every view upright, the fair decoding, and the film."""

from __future__ import annotations

import numpy as np
import torch

from ...host.anagram.pictures import cell_in, decode_in_views, upright_pictures, views_at, views_on
from ...host.schema import io, schema, ui
from ...host.types import VAE, Options
from ...methods.anagram.film_size import film_size
from ...methods.anagram.motion import film
from ...methods.anagram.views import View
from ...methods.colours import colours_of
from ..wires import AnagramViews
from .views import CATEGORY, AnagramView, lines_of

FRAMES_PER_SECOND = 20


def vae_input(optional: bool = True) -> io.Input:
    """The input for the VAE by which pieces are cut at cells."""
    return io.Vae.Input(
        "vae",
        optional=optional,
        tooltip="The VAE the picture was decoded with. With it, the pieces of jigsaw, hinge and circle end where the "
        "latent's cells end, as they did while sampling.",
    )


class ConceptsAnagramShowViews(io.ComfyNode):
    """Shows a picture in every view, upright."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptsAnagramShowViews",
            display_name="Show Anagram Views",
            category=CATEGORY,
            description="Turns the finished picture into each of its views, with every reading upright.",
            search_aliases=["visual anagram", "illusion", "contact sheet"],
            is_output_node=True,
            inputs=[
                io.Image.Input("image", tooltip="The finished picture."),
                AnagramViews.Input("views", tooltip="The views it was made with."),
                vae_input(),
            ],
            outputs=[
                io.Image.Output(
                    "upright",
                    display_name="views",
                    tooltip="Each view of every picture of the batch, in order, as one batch.",
                )
            ],
        )

    @classmethod
    def execute(cls, image: torch.Tensor, views: AnagramView, vae: VAE | None = None) -> io.NodeOutput:
        image = colours_of(image)
        shown = upright_pictures(image, views_on(image, views.all_at_cells(), vae)).flatten(0, 1).contiguous()
        return io.NodeOutput(shown, ui=ui.PreviewImage(shown, cls=cls))


class ConceptsAnagramDecode(io.ComfyNode):
    """Decodes an anagram fairly to all its views."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptsAnagramDecode",
            display_name="Anagram Decode",
            category=CATEGORY,
            description="Decodes the latent once in every view and blends the pictures. The strokes that the VAE "
            "paints then favour no view. Costs one VAE Decode per view.",
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
    def execute(cls, samples: Options, vae: VAE, views: AnagramView) -> io.NodeOutput:
        return io.NodeOutput(decode_in_views(vae, samples["samples"], views.all_at_cells()))


class ConceptsAnagramAnimate(io.ComfyNode):
    """The picture turning from view to view."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptsAnagramAnimate",
            display_name="Animate Anagram",
            category=CATEGORY,
            description="Shows the first picture of the batch moving from view to view: still, moving, still. It plays "
            "while you point at the node; a click or an arrow key turns it. Save it with Save Animated WEBP, or Create "
            "Video and Save Video, at 20 frames per second.",
            search_aliases=["visual anagram", "video", "gif", "webp"],
            is_output_node=True,
            inputs=[
                io.Image.Input("image", tooltip="The finished picture; the first of a batch is shown."),
                AnagramViews.Input("views", tooltip="The views it was made with."),
                io.Int.Input(
                    "still_frames",
                    default=20,
                    min=1,
                    max=200,
                    tooltip="How long each view stays still, in frames of 1/20 s. Start with 20.",
                ),
                io.Int.Input(
                    "moving_frames",
                    default=24,
                    min=2,
                    max=200,
                    tooltip="How long each movement takes, in frames of 1/20 s. Start with 24.",
                ),
                io.Boolean.Input(
                    "loop", default=True, tooltip="Whether the film runs back to its start. Start with on."
                ),
                io.Int.Input(
                    "largest_side",
                    default=512,
                    min=64,
                    max=4096,
                    step=8,
                    tooltip="Larger pictures are made smaller for the film, to save memory: a frame of 512 px takes 7 "
                    "MB. Start with 512.",
                ),
                vae_input(),
                io.String.Input(
                    "captions",
                    multiline=True,
                    default="",
                    optional=True,
                    tooltip="Words under each view while it is still, one line per view, in Latin letters. Empty is "
                    "none.",
                ),
            ],
            outputs=[io.Image.Output("frames", display_name="frames", tooltip="The frames, with even sides.")],
        )

    @classmethod
    def execute(
        cls,
        image: torch.Tensor,
        views: AnagramView,
        still_frames: int,
        moving_frames: int,
        loop: bool,
        largest_side: int,
        vae: VAE | None = None,
        captions: str = "",
    ) -> io.NodeOutput:
        image = colours_of(image[:1])
        cell, at_cells = cell_in(image, vae), views.all_at_cells()
        parts = [view.parts for view in views_at(image, at_cells, cell)]
        size = film_size(*image.shape[1:3], cell, largest_side, parts)
        picture = _resized(image, size.height, size.width)
        listed = views_at(picture, at_cells, size.cell)
        pixels = (picture[0] * 255).round().clamp(0, 255).byte().cpu().numpy()
        words = lines_of(captions, len(listed), "captions") if captions.strip() else []
        shots = film(pixels, listed, still_frames, moving_frames, loop, words)
        frames = torch.from_numpy(shots.astype(np.float32) / 255)
        return io.NodeOutput(frames, ui=_flipping(frames, upright_pictures(picture, listed)[0], listed, cls))


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
