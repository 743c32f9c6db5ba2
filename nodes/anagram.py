"""Anagrams: one picture that reads differently when it is flipped or turned."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from comfy_api.latest import io, ui

from ..host.guider import ViewPrompt, ViewsGuider
from ..host.schema import schema
from ..methods.anagram.balance import BALANCES
from ..methods.anagram.combine import AVERAGING, MULTI_TASK_FAST, Combination, combiner
from ..methods.anagram.prediction import Predictions
from ..methods.anagram.rectify import GAINS
from ..methods.anagram.views import VIEWS, Settings, View, view_named

CATEGORY = "concepts/anagram"


class AnagramView(NamedTuple):
    """One view of an anagram on a wire: a linked list, newest first."""

    view: View
    positive: Any
    negative: Any | None
    weight: float
    previous: AnagramView | None

    def in_order(self) -> list[AnagramView]:
        """All views of the list, first to last."""
        views: list[AnagramView] = []
        link: AnagramView | None = self
        while link is not None:
            views.append(link)
            link = link.previous
        return views[::-1]


Views = io.Custom("CONCEPTS_VIEW")
Options = io.Custom("CONCEPTS_ANAGRAM_OPTIONS")


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
                    "view", options=list(VIEWS), default="identity",
                    tooltip="How the picture is turned before this prompt describes it. 'identity' leaves it as it is, "
                    "'flip' mirrors it upside down, 'rotate_180' turns it round, 'jigsaw' and 'patch_permute' cut it up. "
                    "Start with identity and rotate_180.",
                ),
                io.Float.Input(
                    "weight", default=1.0, min=0.0, max=10.0, step=0.05,
                    tooltip="How much this view counts against the others. Raise it when this reading is the weaker one. "
                    "Start with 1.0.",
                ),
                io.Int.Input(
                    "parts", default=0, min=0, max=64,
                    tooltip="Into how many tiles, stripes or rings a cut-up view divides each side; other views ignore it. "
                    "0 takes the view's own number (patch_permute 8, stripes 8, tile_transpose 4, rings 3). Start with 0.",
                ),
                io.Int.Input(
                    "arrangement", default=0, min=0, max=2**31 - 1,
                    tooltip="Which of the random arrangements jigsaw, patch_permute and pixel_permute use; other views "
                    "ignore it. The same number always cuts the same way. Start with 0.",
                ),
                Views.Input("views", optional=True, tooltip="The views so far; leave empty for the first."),
                io.Conditioning.Input(
                    "negative", optional=True,
                    tooltip="What this view must not show; without it the guider's negative is used.",
                ),
            ],
            outputs=[Views.Output("all_views", display_name="views", tooltip="The list with this view at its end.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, positive, view, weight, parts=0, arrangement=0, views=None, negative=None) -> io.NodeOutput:
        chosen = view_named(view, Settings(parts=parts, seed=arrangement))
        return io.NodeOutput(AnagramView(chosen, positive, negative, weight, views))


class ConceptsAnagramGuider(io.ComfyNode):
    """A guider that denoises every view and averages them."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptsAnagramGuider",
            display_name="Anagram Guider",
            category=CATEGORY,
            description="Guides the sampling so that every view shows its own prompt. "
            "Goes into 'guider' of SamplerCustomAdvanced; any sampler and scheduler. "
            "Cost: one model pass a view and step, all in one batch.",
            search_aliases=["visual anagram", "illusion"],
            inputs=[
                io.Model.Input("model", tooltip="The model to sample with."),
                Views.Input("views", tooltip="What the picture shows in each view, from Anagram View."),
                io.Conditioning.Input("negative", tooltip="What no view may show; an empty prompt is a good start."),
                io.Float.Input(
                    "cfg", default=5.0, min=0.0, max=100.0, step=0.1, round=0.01,
                    tooltip="How strictly the prompts are followed. Anagrams want a little more than usual: start with 5.0.",
                ),
                Options.Input(
                    "options", optional=True,
                    tooltip="How the views are combined, from Anagram Options; empty is the plain mean.",
                ),
            ],
            outputs=[io.Guider.Output("guider", display_name="guider", tooltip="For SamplerCustomAdvanced.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, model, views, negative, cfg, options=None) -> io.NodeOutput:
        listed = views.in_order()
        combine = combiner(options or AVERAGING, [v.weight for v in listed])
        prompts = [ViewPrompt(v.view, v.positive, negative if v.negative is None else v.negative) for v in listed]
        return io.NodeOutput(ViewsGuider(model, prompts, lambda **known: combine(Predictions(**known)), cfg))


PRESETS = {"averaging": AVERAGING, "multi-task (fast, no gradient)": MULTI_TASK_FAST, "custom": None}


class ConceptsAnagramOptions(io.ComfyNode):
    """How the views are combined."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptsAnagramOptions",
            display_name="Anagram Options",
            category=CATEGORY,
            description="How the answers of the views become one picture: remedies for one reading winning over the "
            "others, and for the contrast that averaging takes away.",
            search_aliases=["visual anagram", "variance rectification", "balance"],
            inputs=[
                io.Combo.Input(
                    "preset", options=list(PRESETS), default="multi-task (fast, no gradient)",
                    tooltip="'averaging' is the plain mean; 'multi-task (fast, no gradient)' adds variance rectification; "
                    "'custom' reads the widgets below, which the others ignore. Start with multi-task.",
                ),
                io.Combo.Input(
                    "balance", options=list(BALANCES), default="manual",
                    tooltip="'manual' takes each view's own weight; 'prioritise first' gives the last fifth of the steps to "
                    "the first view; 'alternate' asks one view a step; 'guidance norm' raises the view whose prompt is "
                    "less satisfied (experimental). Start with manual.",
                ),
                io.Combo.Input(
                    "rectification", options=["off", *GAINS], default="match",
                    tooltip="Gives back the power that averaging takes from the noise. 'match' restores what the views have "
                    "on average; 'unit' restores unit variance, as the paper. Start with match.",
                ),
                io.Float.Input(
                    "strength", default=1.0, min=0.0, max=1.0, step=0.05,
                    tooltip="How much of the rectification is applied; 0 is off. Start with 1.0.",
                ),
                io.Float.Input(
                    "start_percent", default=0.05, min=0.0, max=1.0, step=0.01,
                    tooltip="From where in the sampling the rectification works. Start with 0.05.",
                ),
                io.Float.Input(
                    "end_percent", default=0.92, min=0.0, max=1.0, step=0.01,
                    tooltip="Up to where in the sampling the rectification works; the last steps only sharpen. Start with 0.92.",
                ),
            ],
            outputs=[Options.Output("anagram_options", display_name="options", tooltip="For Anagram Guider.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, preset, balance, rectification, strength, start_percent, end_percent) -> io.NodeOutput:
        if preset not in PRESETS:
            raise ValueError(f"There is no preset '{preset}'; try one of {', '.join(PRESETS)}.")
        custom = Combination(balance, rectification, strength, start_percent, end_percent)
        return io.NodeOutput(PRESETS[preset] or custom)


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
            ],
            outputs=[
                io.Image.Output(
                    "upright", display_name="views",
                    tooltip="For every picture of the batch, each of its views in order, as one batch.",
                )
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, image, views) -> io.NodeOutput:
        pictures = image.movedim(-1, 1)  # (batch, 3, height, width)
        turned = []  # a signed view (the negative) of a picture in 0..1 is one more than its value
        for link in views.in_order():
            link.view.check(*pictures.shape[-2:])
            turned.append(1 + link.view.forward(pictures) if link.view.signed else link.view.forward(pictures))
        upright = torch.stack(turned, 1).flatten(0, 1).movedim(1, -1).contiguous()
        return io.NodeOutput(upright, ui=ui.PreviewImage(upright, cls=cls))


NODES: tuple[type[io.ComfyNode], ...] = (
    ConceptsAnagramView,
    ConceptsAnagramGuider,
    ConceptsAnagramOptions,
    ConceptsAnagramShowViews,
)
