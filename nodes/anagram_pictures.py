"""Anagrams, finished: every view upright, the film, the scores, and the sheet to choose from."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from comfy_api.latest import io, ui

from ..host.beside import sampled_stays_loaded
from ..host.clip_score import compared, similarities, text_embeddings
from ..host.schema import schema
from ..host.vae import cell_side
from ..methods.anagram.blend import blend
from ..methods.anagram.combine import AVERAGING
from ..methods.anagram.motion import film
from ..methods.anagram.score import Readings
from ..methods.anagram.sheet import contact_sheet
from ..methods.anagram.views import View
from .anagram import CATEGORY, AnagramView, Options, Views

FRAMES_PER_SECOND = 20

Scores = io.Custom("CONCEPTS_SCORES")


def views_on(pictures: torch.Tensor, views: AnagramView, vae: Any | None) -> list[View]:
    """The views as they look on these pictures (b, h, w, 3); with a VAE, pieces end where its latent cells end."""
    cell = 1 if vae is None else cell_side(vae)
    fits = not any(side % cell for side in pictures.shape[1:3])
    listed = [link.at_cells(cell if fits else 1) for link in views.in_order()]
    for view in listed:
        view.check(*pictures.shape[1:3])
    return listed


def upright(pictures: torch.Tensor, listed: list[View]) -> torch.Tensor:
    """Every picture in every view, (b, views, h, w, 3)."""
    channels_first = pictures.movedim(-1, 1)
    return torch.stack([view.show(channels_first) for view in listed], 1).movedim(2, -1).clamp(0, 1)


def _vae_input(optional: bool = True) -> io.Input:
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
                Views.Input("views", tooltip="The views it was made with."),
                _vae_input(),
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
                _vae_input(optional=False),
                Views.Input("views", tooltip="The views it was made with."),
            ],
            outputs=[
                io.Image.Output("image", display_name="IMAGE", tooltip="The picture, as first view and all others.")
            ],
        )

    @classmethod
    def execute(cls, samples, vae, views) -> io.NodeOutput:
        latent, cell = samples["samples"], cell_side(vae)
        decoded = []
        for link in views.in_order():
            picture = vae.decode(link.view.forward(latent).contiguous()).movedim(-1, 1)
            decoded.append(link.at_cells(cell).inverse(picture))
        return io.NodeOutput(blend(torch.stack(decoded)).movedim(1, -1).clamp(0, 1).contiguous())


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
                Views.Input("views", tooltip="The views it was made with."),
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
                _vae_input(),
            ],
            outputs=[io.Image.Output("frames", display_name="frames", tooltip="The frames, with even sides.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, image, views, still_frames, moving_frames, loop, largest_side, vae=None) -> io.NodeOutput:
        picture = smaller(image[:1], largest_side)
        if picture.shape != image[:1].shape:
            vae = None  # its cells no longer fit
        pixels = (picture[0] * 255).round().clamp(0, 255).byte().cpu().numpy()
        listed = views_on(picture, views, vae)
        shots = film(pixels, listed, still_frames, moving_frames, loop)
        frames = torch.from_numpy(shots.astype(np.float32) / 255)
        return io.NodeOutput(frames, ui=_flipping(frames, upright(picture, listed)[0], listed, cls))


def smaller(picture: torch.Tensor, largest_side: int) -> torch.Tensor:
    """The picture (b, h, w, 3) with no side over ``largest_side`` px, and sides that are multiples of 8 if it had to shrink."""
    shrink = max(picture.shape[1:3]) / largest_side
    if shrink <= 1:
        return picture
    sides = [max(8, int(side / shrink) // 8 * 8) for side in picture.shape[1:3]]
    return torch.nn.functional.interpolate(picture.movedim(-1, 1), size=sides, mode="area").movedim(1, -1)


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


class ConceptsAnagramScore(io.ComfyNode):
    """Alignment and concealment by CLIP."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptsAnagramScore",
            display_name="Score Anagram",
            category=CATEGORY,
            description="Measures how well each view of each picture shows its own prompt (alignment: the worst view) and no "
            "other (concealment), by a CLIP and CLIP Vision that belong together.",
            search_aliases=["clip score", "visual anagram"],
            is_output_node=True,
            inputs=[
                io.Image.Input("image", tooltip="The finished pictures."),
                Views.Input("views", tooltip="The views they were made with."),
                io.ClipVision.Input("clip_vision", tooltip="A CLIP Vision with its projection, such as ViT-L/14."),
                io.Clip.Input("clip", tooltip="The text encoder of the same CLIP, loaded from a file that has its projection."),
                io.String.Input(
                    "prompts", multiline=True, default="",
                    tooltip="What each view shows, one line a view, in the order of the views.",
                ),
                _vae_input(),
            ],
            outputs=[
                Scores.Output("scores", display_name="scores", tooltip="For Anagram Contact Sheet."),
                io.String.Output("report", display_name="report", tooltip="A line a picture, best first."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, image, views, clip_vision, clip, prompts, vae=None) -> io.NodeOutput:
        listed = views_on(image, views, vae)
        lines = prompt_lines(prompts, len(listed))
        shown = upright(image, listed)
        matches = similarities(clip_vision, clip, shown.flatten(0, 1), lines)
        readings = Readings(matches.unflatten(0, shown.shape[:2]))
        return io.NodeOutput(readings, readings.report(), ui=ui.PreviewText(readings.report()))


class ConceptsAnagramClipBalance(io.ComfyNode):
    """Weights of the views by how well each reads."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptsAnagramClipBalance",
            display_name="Anagram CLIP Balance",
            category=CATEGORY,
            description="Cures anagrams in which one reading wins: at each step CLIP looks at the half-finished picture in every "
            "view, and the view that reads worst gets more weight.",
            search_aliases=["visual anagram", "domination", "noise vector balancing"],
            inputs=[
                io.Model.Input("model", tooltip="The model that is sampled, the same as for Anagram Guider."),
                _vae_input(optional=False),
                Views.Input("views", tooltip="The views, the same list as for Anagram Guider."),
                io.ClipVision.Input("clip_vision", tooltip="A CLIP Vision with its projection, such as ViT-L/14."),
                io.Clip.Input("clip", tooltip="The text encoder of the same CLIP, loaded from a file that has its projection."),
                io.String.Input(
                    "prompts", multiline=True, default="",
                    tooltip="What each view shows, one line a view, in the order of the views.",
                ),
                Options.Input("options", optional=True, tooltip="The other options; empty is plain averaging."),
            ],
            outputs=[Options.Output("anagram_options", display_name="options", tooltip="For Anagram Guider.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, model, vae, views, clip_vision, clip, prompts, options=None) -> io.NodeOutput:
        words = text_embeddings(clip, prompt_lines(prompts, len(views.in_order())))
        to_wire = model.get_model_object("latent_format").process_out

        def score(latents: torch.Tensor) -> torch.Tensor:
            with sampled_stays_loaded(model.model, latents):
                pictures = vae.decode(to_wire(latents))
                shown = upright(pictures, views_on(pictures, views, vae))
                matches = compared(clip_vision, shown.flatten(0, 1), words).unflatten(0, shown.shape[:2])
            return matches.diagonal(dim1=1, dim2=2)

        return io.NodeOutput(replace(options or AVERAGING, score=score))


def prompt_lines(prompts: str, views: int) -> list[str]:
    """A prompt for each view.

    Raises:
        ValueError: another number of lines than of views.
    """
    lines = [line.strip() for line in prompts.splitlines() if line.strip()]
    if len(lines) != views:
        raise ValueError(
            f"There are {views} views and {len(lines)} lines of prompts; write what each view shows on a line of its own, in "
            "the order of the views."
        )
    return lines


class ConceptsAnagramContactSheet(io.ComfyNode):
    """All pictures with all their views on one sheet, best first."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptsAnagramContactSheet",
            display_name="Anagram Contact Sheet",
            category=CATEGORY,
            description="Lays out a batch, a picture a row with all its views side by side, best first where scores are "
            "given, so that the best seed can be chosen.",
            search_aliases=["grid", "visual anagram", "choose best"],
            is_output_node=True,
            inputs=[
                io.Image.Input("image", tooltip="The finished pictures, a batch of several seeds."),
                Views.Input("views", tooltip="The views they were made with."),
                Scores.Input(
                    "scores", optional=True, tooltip="From Score Anagram or Demo Judge; sorts and labels the rows."
                ),
                _vae_input(),
            ],
            outputs=[
                io.Image.Output("sheet", display_name="sheet", tooltip="The sheet, one picture."),
                io.Image.Output(
                    "best", display_name="best", tooltip="The best picture alone (the first without scores)."
                ),
            ],
        )

    @classmethod
    def execute(cls, image, views, scores=None, vae=None) -> io.NodeOutput:
        listed = views_on(image, views, vae)
        if scores is not None and scores.similarity.shape[:2] != (len(image), len(listed)):
            raise ValueError(
                f"The scores are of {scores.similarity.shape[0]} pictures in {scores.similarity.shape[1]} views, and here are "
                f"{len(image)} in {len(listed)}; score the same batch with the same views."
            )
        order = list(range(len(image))) if scores is None else scores.ranking()
        captions = [
            f"picture {i + 1}" + ("" if scores is None else f"   alignment {scores.alignment[i]:.2f}") for i in order
        ]
        sheet = contact_sheet(upright(image, listed)[order], captions, [view.name for view in listed])
        return io.NodeOutput(sheet, image[order[:1]], ui=ui.PreviewImage(sheet, cls=cls))


NODES: tuple[type[io.ComfyNode], ...] = (
    ConceptsAnagramShowViews,
    ConceptsAnagramDecode,
    ConceptsAnagramAnimate,
    ConceptsAnagramScore,
    ConceptsAnagramClipBalance,
    ConceptsAnagramContactSheet,
)
