"""Anagrams: the list of what a picture shows, and how it is turned for each reading."""

from __future__ import annotations

from functools import cache, partial
from typing import NamedTuple

import torch

from ...host.anagram.pictures import ViewAtCells
from ...host.anagram.views import ViewPrompt
from ...host.schema import io, schema
from ...host.types import Conditioning, Options
from ...methods.anagram.views import COMPONENTS, RESAMPLED, VIEWS, Settings, View, view_named
from ...methods.anagram.views.from_image import from_image
from ...methods.colours import check_pictures
from ...methods.linked_list import in_order
from ..wires import AnagramViews

CATEGORY = "concepts/anagram"


class AnagramView(NamedTuple):
    """One view of an anagram on a wire: a linked list, newest first.

    Attributes:
        at_cells: the view on a picture whose latent has cells of so many pixels a side, for views whose pieces have
            outlines. It is the same one each time, since a view keeps the places it has worked out.
        cfg: the view's own guidance scale, 0 for the guider's.
        reference_latent: a clean latent that takes the place of the prompt.
    """

    at_cells: ViewAtCells
    positive: Conditioning | None
    negative: Conditioning | None
    weight: float
    previous: AnagramView | None
    cfg: float = 0.0
    reference_latent: torch.Tensor | None = None

    @property
    def view(self) -> View:
        return self.at_cells(1)

    def in_order(self) -> list[AnagramView]:
        """All views of the list, first to last."""
        return in_order(self)

    def all_at_cells(self) -> list[ViewAtCells]:
        """``at_cells`` of all views of the list, first to last."""
        return [link.at_cells for link in in_order(self)]

    def prompts(self, negative: Conditioning) -> list[ViewPrompt]:
        """All views of the list with their prompts; ``negative`` is for views without their own."""
        return [
            ViewPrompt(
                link.view,
                negative if link.positive is None else link.positive,
                negative if link.negative is None else link.negative,
                link.reference_latent,
                link.cfg or None,
                link.weight,
            )
            for link in in_order(self)
        ]


def _at_cells(name: str, parts: int, seed: int, angle: float, cell: int) -> View:
    return view_named(name, Settings(parts, seed, cell, angle))


def lines_of(text: str, views: int, what: str) -> list[str]:
    """One line per view.

    Args:
        what: the lines' name in a refusal.

    Raises:
        ValueError: another number of views than of lines.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) != views:
        raise ValueError(
            f"There are {views} views and {len(lines)} lines of {what}; write one line per view, in "
            "the order of the views."
        )
    return lines


def _own_cfg() -> io.Input:
    return io.Float.Input(
        "cfg",
        default=0.0,
        min=0.0,
        max=100.0,
        step=0.1,
        round=0.01,
        optional=True,
        tooltip="How strictly this view's prompt is followed; 0 takes the guider's cfg. Raise it for a reading that is "
        "hard to see. Start with 0.",
    )


class ConceptsAnagramView(io.ComfyNode):
    """Adds a view to the list of what a picture must show."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptsAnagramView",
            display_name="Anagram View",
            category=CATEGORY,
            description="Adds one reading of the picture: what it must show when it is turned this way. "
            "Chain one for each reading.",
            search_aliases=["visual anagram", "illusion", "multi view"],
            inputs=[
                io.Conditioning.Input("positive", tooltip="What the picture shows in this view."),
                io.Combo.Input(
                    "view",
                    options=[*VIEWS, *COMPONENTS, *RESAMPLED],
                    default="identity",
                    tooltip="How the picture is turned before this prompt describes it. 'identity' leaves it as it is, "
                    "'flip' mirrors it upside down, 'rotate_180' turns it round, 'jigsaw' and 'patch_permute' cut it "
                    "up; 'disc' turns the middle by any angle, with Anagram Pixel Guider. "
                    "Start with identity and rotate_180.",
                ),
                io.Float.Input(
                    "weight",
                    default=1.0,
                    min=0.0,
                    max=10.0,
                    step=0.05,
                    tooltip="How much this view counts against the others. Raise it when this reading is the weaker "
                    "one. Start with 1.0.",
                ),
                io.Int.Input(
                    "parts",
                    default=0,
                    min=0,
                    max=64,
                    tooltip="Number of tiles, stripes or rings per side for views that cut the picture; other views "
                    "ignore it. 0 takes the view's own number (patch_permute 8, stripes 8, tile_transpose 4, rings 3). "
                    "Start with 0.",
                ),
                io.Int.Input(
                    "arrangement",
                    default=0,
                    min=0,
                    max=2**31 - 1,
                    tooltip="Which of the random arrangements jigsaw, patch_permute and pixel_permute use; other views "
                    "ignore it. The same number always cuts the same way. Start with 0.",
                ),
                AnagramViews.Input("views", optional=True, tooltip="The views so far; leave empty for the first."),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="What this view must not show; without it the guider's negative is used.",
                ),
                _own_cfg(),
                io.Float.Input(
                    "angle",
                    default=135.0,
                    min=-360.0,
                    max=360.0,
                    step=1.0,
                    round=0.01,
                    optional=True,
                    tooltip="The angle, in degrees clockwise, by which 'disc' turns the middle of the picture; other "
                    "views ignore it. Start with 135.",
                ),
            ],
            outputs=[
                AnagramViews.Output("all_views", display_name="views", tooltip="The list with this view at its end.")
            ],
        )

    @classmethod
    def execute(
        cls,
        positive: Conditioning,
        view: str,
        weight: float,
        parts: int = 0,
        arrangement: int = 0,
        views: AnagramView | None = None,
        negative: Conditioning | None = None,
        cfg: float = 0.0,
        angle: float = 135.0,
    ) -> io.NodeOutput:
        at_cells = cache(partial(_at_cells, view, parts, arrangement, angle))
        at_cells(1)  # an unknown view is refused here, not in the middle of the sampling
        return io.NodeOutput(AnagramView(at_cells, positive, negative, weight, views, cfg))


class ConceptsAnagramViewFromImage(io.ComfyNode):
    """Adds a view that a picture describes."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptsAnagramViewFromImage",
            display_name="Anagram View from Image",
            category=CATEGORY,
            description="Adds a reading of the picture after its pixels have been rearranged as a painted map says: "
            "red is the column a place is filled from, green the row.",
            search_aliases=["uv map", "permutation", "visual anagram"],
            inputs=[
                io.Conditioning.Input("positive", tooltip="What the picture shows in this view."),
                io.Image.Input(
                    "image",
                    tooltip="The map: red 0 to 1 from left to right and green 0 to 1 from top to bottom leave all as "
                    "it is. It is read at the size of the latent, so paint areas, not pixels.",
                ),
                io.Float.Input(
                    "weight",
                    default=1.0,
                    min=0.0,
                    max=10.0,
                    step=0.05,
                    tooltip="How much this view counts against the others. Start with 1.0.",
                ),
                AnagramViews.Input("views", optional=True, tooltip="The views so far; leave empty for the first."),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="What this view must not show; without it the guider's negative is used.",
                ),
                _own_cfg(),
            ],
            outputs=[
                AnagramViews.Output("all_views", display_name="views", tooltip="The list with this view at its end.")
            ],
        )

    @classmethod
    def execute(
        cls,
        positive: Conditioning,
        image: torch.Tensor,
        weight: float,
        views: AnagramView | None = None,
        negative: Conditioning | None = None,
        cfg: float = 0.0,
    ) -> io.NodeOutput:
        check_pictures(image)
        at_cells = cache(partial(from_image, image[0]))
        at_cells(1)  # a map that cannot be read is refused here
        return io.NodeOutput(AnagramView(at_cells, positive, negative, weight, views, cfg))


class ConceptsAnagramReference(io.ComfyNode):
    """Adds a component that is taken from a given picture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptsAnagramReference",
            display_name="Anagram Reference",
            category=CATEGORY,
            description="Keeps one component of an existing picture; the prompts fill in the rest. Example: a photo "
            "seen from afar that is something else up close.",
            search_aliases=["hybrid image", "inverse problem", "factorized diffusion"],
            inputs=[
                io.Latent.Input("latent", tooltip="The picture, through VAE Encode, at the size of the canvas."),
                io.Combo.Input(
                    "component",
                    options=list(COMPONENTS),
                    default="low_pass",
                    tooltip="Which part is kept; the rest of its family must be in the list, from Anagram View. "
                    "'low_pass' is what is seen from afar. Start with low_pass, and high_pass for the prompt.",
                ),
                AnagramViews.Input("views", optional=True, tooltip="The views so far; leave empty for the first."),
            ],
            outputs=[
                AnagramViews.Output("all_views", display_name="views", tooltip="The list with this part at its end.")
            ],
        )

    @classmethod
    def execute(cls, latent: Options, component: str, views: AnagramView | None = None) -> io.NodeOutput:
        at_cells = cache(partial(_at_cells, component, 0, 0, 0.0))
        return io.NodeOutput(AnagramView(at_cells, None, None, 1.0, views, reference_latent=latent["samples"]))


NODES: tuple[type[io.ComfyNode], ...] = (
    ConceptsAnagramView,
    ConceptsAnagramViewFromImage,
    ConceptsAnagramReference,
)
