"""Anagrams, judged: how well each view reads, after the sampling and in the middle of it, and the sheet to choose from."""

from __future__ import annotations

from dataclasses import replace

import torch
from comfy_api.latest import io, ui

from ...host.engine.auxiliary_models import keep_model_loaded
from ...host.engine.vae import decoded_pictures
from ...host.schema import schema
from ...host.text.clip_score import compared, similarities, text_embeddings
from ...methods.anagram.balance import Reader
from ...methods.anagram.combine import AVERAGING
from ...methods.anagram.score import Readings
from ...methods.anagram.sheet import contact_sheet
from ..wires import AnagramOptions, AnagramScores, AnagramViews
from .pictures import upright, vae_input, views_on
from .views import CATEGORY, lines_of


def _reader_inputs() -> list[io.Input]:
    """What reads the views, and what it should find in them."""
    return [
        io.ClipVision.Input("clip_vision", tooltip="A CLIP Vision with its projection, such as ViT-L/14."),
        io.Clip.Input("clip", tooltip="The text encoder of the same CLIP, loaded from a file that has its projection."),
        io.String.Input(
            "prompts", multiline=True, default="",
            tooltip="What each view shows, one line a view, in the order of the views.",
        ),
    ]  # fmt: skip


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
                AnagramViews.Input("views", tooltip="The views they were made with."),
                *_reader_inputs(),
                vae_input(),
            ],
            outputs=[
                AnagramScores.Output("scores", display_name="scores", tooltip="For Anagram Contact Sheet."),
                io.String.Output("report", display_name="report", tooltip="A line a picture, best first."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, image, views, clip_vision, clip, prompts, vae=None) -> io.NodeOutput:
        listed = views_on(image, views, vae)
        lines = lines_of(prompts, len(listed), "prompts")
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
                vae_input(optional=False),
                AnagramViews.Input("views", tooltip="The views, the same list as for Anagram Guider."),
                *_reader_inputs(),
                AnagramOptions.Input("options", optional=True, tooltip="The other options; empty is plain averaging."),
                io.Float.Input(
                    "start_percent", default=Reader.start, min=0.0, max=1.0, step=0.01, optional=True,
                    tooltip="From where in the sampling CLIP looks; before, the picture is mush to it. Start with 0.15.",
                ),
                io.Float.Input(
                    "smoothing", default=Reader.smoothing, min=0.0, max=0.95, step=0.05, optional=True,
                    tooltip="How much of what CLIP read before counts beside what it reads now, so that one slip does not "
                    "turn the weights. Start with 0, the reading of the step alone: weights that come late miss their moment.",
                ),
                io.Float.Input(
                    "least", default=Reader.least, min=0.0, max=0.5, step=0.01, optional=True,
                    tooltip="Of the whole weight, what no view gets less than; 0.5 leaves all views even. Start with 0.15.",
                ),
            ],
            outputs=[AnagramOptions.Output("anagram_options", display_name="options", tooltip="For Anagram Guider.")],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model, vae, views, clip_vision, clip, prompts, options=None,
        start_percent=Reader.start, smoothing=Reader.smoothing, least=Reader.least,
    ) -> io.NodeOutput:  # fmt: skip
        words = text_embeddings(clip, lines_of(prompts, len(views.in_order()), "prompts"))
        to_wire = model.get_model_object("latent_format").process_out

        def score(latents: torch.Tensor) -> torch.Tensor:
            with keep_model_loaded(model.model, latents):
                pictures = decoded_pictures(vae, to_wire(latents))
                shown = upright(pictures, views_on(pictures, views, vae))
                matches = compared(clip_vision, shown.flatten(0, 1), words).unflatten(0, shown.shape[:2])
            frames = matches.diagonal(dim1=1, dim2=2)  # more than one a latent in films alone
            return frames.unflatten(0, (len(latents), -1)).mean(1)

        reader = Reader(score, start_percent, smoothing, least)
        return io.NodeOutput(replace(options or AVERAGING, reader=reader))


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
                AnagramViews.Input("views", tooltip="The views they were made with."),
                AnagramScores.Input(
                    "scores", optional=True, tooltip="From Score Anagram or Demo Judge; sorts and labels the rows."
                ),
                vae_input(),
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
    ConceptsAnagramScore,
    ConceptsAnagramClipBalance,
    ConceptsAnagramContactSheet,
)
