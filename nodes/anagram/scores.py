"""Anagrams, scored: how well each view reads, during the sampling and after it, and a sheet to choose from."""

from __future__ import annotations

import torch

from ...host.anagram.pictures import clip_score_of, upright_pictures, views_on
from ...host.schema import io, schema, ui
from ...host.text.clip_score import similarities, text_embeddings
from ...host.types import CLIP, VAE, ClipVision, ModelPatcher
from ...methods.anagram.balance import ViewScorer
from ...methods.anagram.combine import AVERAGING, Combination
from ...methods.anagram.score import Readings
from ...methods.anagram.sheet import contact_sheet
from ...methods.colours import colours_of
from ..wires import AnagramOptions, AnagramScores, AnagramViews
from .pictures import vae_input
from .views import CATEGORY, AnagramView, lines_of


def _scorer_inputs() -> list[io.Input]:
    """What scores the views, and what it should find in them."""
    return [
        io.ClipVision.Input("clip_vision", tooltip="A CLIP Vision with its projection, such as ViT-L/14."),
        io.Clip.Input("clip", tooltip="The text encoder of the same CLIP, loaded from a file that has its projection."),
        io.String.Input(
            "prompts",
            multiline=True,
            default="",
            tooltip="What each view shows, one line per view, in the order of the views.",
        ),
    ]


class ConceptsAnagramScore(io.ComfyNode):
    """Alignment and concealment by CLIP."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptsAnagramScore",
            display_name="Score Anagram",
            category=CATEGORY,
            description="Measures how well each view of each picture shows its own prompt (alignment: the worst view) "
            "and no other (concealment), by a CLIP and CLIP Vision that belong together.",
            search_aliases=["clip score", "visual anagram"],
            is_output_node=True,
            inputs=[
                io.Image.Input("image", tooltip="The finished pictures."),
                AnagramViews.Input("views", tooltip="The views they were made with."),
                *_scorer_inputs(),
                vae_input(),
            ],
            outputs=[
                AnagramScores.Output("scores", display_name="scores", tooltip="For Anagram Contact Sheet."),
                io.String.Output("report", display_name="report", tooltip="One line per picture, best first."),
            ],
        )

    @classmethod
    def execute(
        cls,
        image: torch.Tensor,
        views: AnagramView,
        clip_vision: ClipVision,
        clip: CLIP,
        prompts: str,
        vae: VAE | None = None,
    ) -> io.NodeOutput:
        image = colours_of(image)
        listed = views_on(image, views.all_at_cells(), vae)
        lines = lines_of(prompts, len(listed), "prompts")
        shown = upright_pictures(image, listed)
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
            description="Cures anagrams in which one reading wins: at each step CLIP scores the half-finished picture "
            "in every view, and the view that reads worst gets more weight.",
            search_aliases=["visual anagram", "domination", "noise vector balancing"],
            inputs=[
                io.Model.Input("model", tooltip="The model that is sampled, the same as for Anagram Guider."),
                vae_input(optional=False),
                AnagramViews.Input("views", tooltip="The views, the same list as for Anagram Guider."),
                *_scorer_inputs(),
                AnagramOptions.Input("options", optional=True, tooltip="The other options; empty is plain averaging."),
                io.Float.Input(
                    "start_percent",
                    default=ViewScorer.start,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    tooltip="Where in the sampling CLIP begins to score; earlier pictures are too blurred for it. "
                    "Start with 0.15.",
                ),
                io.Float.Input(
                    "smoothing",
                    default=ViewScorer.smoothing,
                    min=0.0,
                    max=0.95,
                    step=0.05,
                    optional=True,
                    tooltip="Share of earlier scores in each score; it keeps one outlier from turning the weights. "
                    "Start with 0, which uses the score of the step only: weights that come late miss their moment.",
                ),
                io.Float.Input(
                    "least",
                    default=ViewScorer.min_weight,
                    min=0.0,
                    max=0.5,
                    step=0.01,
                    optional=True,
                    tooltip="Smallest share of the total weight a view can get; 0.5 keeps all views equal. Start with "
                    "0.15.",
                ),
            ],
            outputs=[AnagramOptions.Output("anagram_options", display_name="options", tooltip="For Anagram Guider.")],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        vae: VAE,
        views: AnagramView,
        clip_vision: ClipVision,
        clip: CLIP,
        prompts: str,
        options: Combination | None = None,
        start_percent: float = ViewScorer.start,
        smoothing: float = ViewScorer.smoothing,
        least: float = ViewScorer.min_weight,
    ) -> io.NodeOutput:
        at_cells = views.all_at_cells()
        texts = text_embeddings(clip, lines_of(prompts, len(at_cells), "prompts"))
        score = clip_score_of(model, vae, at_cells, clip_vision, texts)
        scorer = ViewScorer(score, start_percent, smoothing, min_weight=least)
        return io.NodeOutput((options or AVERAGING).weighed_by(scorer))


class ConceptsAnagramContactSheet(io.ComfyNode):
    """All pictures with all their views on one sheet, best first."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptsAnagramContactSheet",
            display_name="Anagram Contact Sheet",
            category=CATEGORY,
            description="Lays out a batch for choosing the best seed: one row per picture, all its views side by side, "
            "best first where scores are given.",
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
    def execute(
        cls, image: torch.Tensor, views: AnagramView, scores: Readings | None = None, vae: VAE | None = None
    ) -> io.NodeOutput:
        image = colours_of(image)
        listed = views_on(image, views.all_at_cells(), vae)
        if scores is not None and scores.similarity.shape[:2] != (len(image), len(listed)):
            raise ValueError(
                f"The scores are of {scores.similarity.shape[0]} pictures in {scores.similarity.shape[1]} views, and "
                f"here are {len(image)} in {len(listed)}; score the same batch with the same views."
            )
        order = list(range(len(image))) if scores is None else scores.ranking()
        captions = [
            f"picture {i + 1}" + ("" if scores is None else f"   alignment {scores.alignment[i]:.2f}") for i in order
        ]
        sheet = contact_sheet(upright_pictures(image, listed)[order], captions, [view.name for view in listed])
        return io.NodeOutput(sheet, image[order[:1]], ui=ui.PreviewImage(sheet, cls=cls))


NODES: tuple[type[io.ComfyNode], ...] = (
    ConceptsAnagramScore,
    ConceptsAnagramClipBalance,
    ConceptsAnagramContactSheet,
)
