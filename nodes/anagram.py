"""Anagrams: one picture that reads differently when it is flipped or turned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from comfy_api.latest import io

from ..host.anti_segregation import Pull
from ..host.contrast import contrasted
from ..host.guider import ViewPrompt, ViewsGuider
from ..host.phrases import encode_with_phrase
from ..host.pixel_sync import PixelSyncGuider
from ..host.schema import schema
from ..host.time_travel import travelling
from ..host.view_patch import with_views
from ..methods.anagram.balance import BALANCES
from ..methods.anagram.blend import blend
from ..methods.anagram.combine import AVERAGING, MULTI_TASK_FAST, MULTI_TASK_FULL, Combination, combiner
from ..methods.anagram.overlap import AntiSegregation, segregation, step
from ..methods.anagram.prediction import Predictions
from ..methods.anagram.rectify import GAINS
from ..methods.anagram.schedule import EXAMPLE, schedule_from
from ..methods.anagram.views import COMPONENTS, RESAMPLED, VIEWS, Settings, View, view_named
from ..methods.anagram.views.from_image import from_image

CATEGORY = "concepts/anagram"
PREVIEWS = ("every view", "as the host")


class AnagramView(NamedTuple):
    """One view of an anagram on a wire: a linked list, newest first.

    ``at_cells(f)`` is the view as it is seen on a picture whose latent has cells of f × f pixels, for views whose pieces have
    outlines. ``cfg`` is the view's own
    guidance scale, 0 for the guider's. ``known`` is a clean latent that stands in for a prompt.
    """

    at_cells: Callable[[int], View]
    positive: Any | None
    negative: Any | None
    weight: float
    previous: AnagramView | None
    cfg: float = 0.0
    known: Any | None = None

    @property
    def view(self) -> View:
        return self.at_cells(1)

    def in_order(self) -> list[AnagramView]:
        """All views of the list, first to last."""
        views: list[AnagramView] = []
        link: AnagramView | None = self
        while link is not None:
            views.append(link)
            link = link.previous
        return views[::-1]


def _at_cells(name: str, parts: int, seed: int, angle: float, cell: int) -> View:
    return view_named(name, Settings(parts, seed, cell, angle))


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
                    "view", options=[*VIEWS, *COMPONENTS, *RESAMPLED], default="identity",
                    tooltip="How the picture is turned before this prompt describes it. 'identity' leaves it as it is, "
                    "'flip' mirrors it upside down, 'rotate_180' turns it round, 'jigsaw' and 'patch_permute' cut it up; "
                    "'disc' turns the middle by any angle, with Anagram Pixel Guider. "
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
                io.Float.Input(
                    "cfg", default=0.0, min=0.0, max=100.0, step=0.1, round=0.01, optional=True,
                    tooltip="How strictly this view's prompt is followed; 0 takes the guider's cfg. Raise it for the reading "
                    "that is hard to see. Start with 0.",
                ),
                io.Float.Input(
                    "angle", default=135.0, min=-360.0, max=360.0, step=1.0, round=0.01, optional=True,
                    tooltip="By how many degrees clockwise 'disc' turns the middle of the picture; other views ignore it. "
                    "Start with 135.",
                ),
            ],
            outputs=[Views.Output("all_views", display_name="views", tooltip="The list with this view at its end.")],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, positive, view, weight, parts=0, arrangement=0, views=None, negative=None, cfg=0.0, angle=135.0
    ) -> io.NodeOutput:
        at_cells = partial(_at_cells, view, parts, arrangement, angle)
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
            description="Adds a reading of the picture after its pixels have been rearranged as a painted map says: red is "
            "the column a place is filled from, green the row.",
            search_aliases=["uv map", "permutation", "visual anagram"],
            inputs=[
                io.Conditioning.Input("positive", tooltip="What the picture shows in this view."),
                io.Image.Input(
                    "image", tooltip="The map: red 0 to 1 from left to right and green 0 to 1 from top to bottom leave all as "
                    "it is. It is read at the size of the latent, so paint areas, not pixels.",
                ),
                io.Float.Input(
                    "weight", default=1.0, min=0.0, max=10.0, step=0.05,
                    tooltip="How much this view counts against the others. Start with 1.0.",
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
    def execute(cls, positive, image, weight, views=None, negative=None) -> io.NodeOutput:
        view = from_image(image[0])
        return io.NodeOutput(AnagramView(lambda _cell: view, positive, negative, weight, views))


class ConceptsAnagramReference(io.ComfyNode):
    """Adds a component that is taken from a given picture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptsAnagramReference",
            display_name="Anagram Reference",
            category=CATEGORY,
            description="Keeps one component of a picture that exists, so that the prompts fill in the rest: a photo seen "
            "from afar that is something else from near.",
            search_aliases=["hybrid image", "inverse problem", "factorized diffusion"],
            inputs=[
                io.Latent.Input("latent", tooltip="The picture, through VAE Encode, at the size of the canvas."),
                io.Combo.Input(
                    "component", options=list(COMPONENTS), default="low_pass",
                    tooltip="Which part is kept; the rest of its family must be in the list, from Anagram View. 'low_pass' is "
                    "what is seen from afar. Start with low_pass, and high_pass for the prompt.",
                ),
                Views.Input("views", optional=True, tooltip="The views so far; leave empty for the first."),
            ],
            outputs=[Views.Output("all_views", display_name="views", tooltip="The list with this part at its end.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, latent, component, views=None) -> io.NodeOutput:
        at_cells = partial(_at_cells, component, 0, 0, 0.0)
        return io.NodeOutput(AnagramView(at_cells, None, None, 1.0, views, known=latent["samples"]))


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
                io.Combo.Input(
                    "preview", options=list(PREVIEWS), default=PREVIEWS[0], optional=True,
                    tooltip="What the sampler shows while it works: 'every view' upright, side by side, or 'as the host' for "
                    "the picture as it is, if previews are switched on there. Start with every view.",
                ),
            ],
            outputs=[io.Guider.Output("guider", display_name="guider", tooltip="For SamplerCustomAdvanced.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, model, views, negative, cfg, options=None, preview=PREVIEWS[0]) -> io.NodeOutput:
        prompts, combine = combination(views, negative, options)
        guider = ViewsGuider(model, prompts, combine, cfg, pull_of(options))
        guider.shows_views = preview == PREVIEWS[0]
        return io.NodeOutput(guider)


def combination(views: AnagramView, negative: Any, options: Combination | None) -> tuple[list[ViewPrompt], Any]:
    """The views as the host's side takes them, and the function that combines their predictions."""
    listed = views.in_order()
    combine = combiner(
        options or AVERAGING, [v.weight for v in listed], [v.view for v in listed], [v.cfg or None for v in listed]
    )
    prompts = [
        ViewPrompt(
            v.view,
            negative if v.positive is None else v.positive,
            negative if v.negative is None else v.negative,
            v.known,
        )
        for v in listed
    ]
    prompts = contrasted(prompts, (options or AVERAGING).contrast)
    return prompts, lambda **known: combine(Predictions(**known))


class ConceptsAnagramPixelGuider(io.ComfyNode):
    """Views that mean something on pictures alone, on latent models."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptsAnagramPixelGuider",
            display_name="Anagram Pixel Guider",
            category=CATEGORY,
            description="Anagram Guider for views that have no meaning on latents: negate, skew, pixel_permute, fine jigsaws. "
            "Samples a latent for each view and brings them together as pictures. Slow: at each step a VAE Decode and two "
            "VAE Encodes a view.",
            search_aliases=["visual anagram", "looking glass", "negative", "pixel sync"],
            inputs=[
                io.Model.Input("model", tooltip="The model to sample with."),
                io.Vae.Input("vae", tooltip="The model's VAE. A fast one, such as TAESD, saves most of the time."),
                Views.Input("views", tooltip="What the picture shows in each view; the first must be 'identity'."),
                io.Conditioning.Input("negative", tooltip="What no view may show; an empty prompt is a good start."),
                io.Float.Input(
                    "cfg", default=5.0, min=0.0, max=100.0, step=0.1, round=0.01,
                    tooltip="How strictly the prompts are followed. Start with 5.0.",
                ),
                io.Int.Input(
                    "every", default=1, min=1, max=10,
                    tooltip="Bring the views together at every so many steps. More is faster and lets them drift. Start with 1.",
                ),
            ],
            outputs=[io.Guider.Output("guider", display_name="guider", tooltip="For SamplerCustomAdvanced.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, model, vae, views, negative, cfg, every) -> io.NodeOutput:
        prompts, _ = combination(views, negative, None)
        return io.NodeOutput(PixelSyncGuider(model, prompts, cfg, vae, blend, every))


def pull_of(options: Combination | None) -> Pull | None:
    """The gradient step of the options, if there is one."""
    together = (options or AVERAGING).together
    if together.strength == 0:
        return None
    return Pull(
        segregation, partial(step, strength=together.strength), together.start, together.end, together.iterations
    )


class ConceptsAnagramModel(io.ComfyNode):
    """Anagrams for the stock KSampler."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptsAnagramModel",
            display_name="Anagram for KSampler",
            category=CATEGORY,
            description="Makes the ordinary KSampler sample an anagram: connect all three outputs to it. Does what Anagram "
            "Guider does for SamplerCustomAdvanced.",
            search_aliases=["visual anagram", "illusion", "ksampler"],
            inputs=[
                io.Model.Input("model", tooltip="The model to sample with."),
                Views.Input("views", tooltip="What the picture shows in each view, from Anagram View."),
                io.Conditioning.Input("negative", tooltip="What no view may show; an empty prompt is a good start."),
                Options.Input(
                    "options", optional=True,
                    tooltip="How the views are combined, from Anagram Options; empty is the plain mean.",
                ),
            ],
            outputs=[
                io.Model.Output("patched", display_name="MODEL", tooltip="The model that knows the views."),
                io.Conditioning.Output("positive", display_name="positive", tooltip="All views' prompts, for KSampler."),
                io.Conditioning.Output(
                    "all_negative", display_name="negative", tooltip="All views' negatives, for KSampler."
                ),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, model, views, negative, options=None) -> io.NodeOutput:
        prompts, combine = combination(views, negative, options)
        return io.NodeOutput(*with_views(model, prompts, combine, pull_of(options)))


class ConceptsAnagramSchedule(io.ComfyNode):
    """Weights that change in the course of the sampling."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptsAnagramSchedule",
            display_name="Anagram Weight Schedule",
            category=CATEGORY,
            description="Lets the views count differently early and late: the first steps settle what is where, the last ones "
            "only sharpen. Costs nothing.",
            search_aliases=["visual anagram", "balance", "prioritise", "ramp"],
            inputs=[
                io.String.Input(
                    "schedule", multiline=True, default=EXAMPLE,
                    tooltip="A line for each moment: where in the sampling (0 to 1), a colon, and the weight of every view in "
                    "order. Between the lines weights go straight from one to the next; two lines of one moment jump. Start "
                    "with '0: 1, 1', '0.8: 1, 1', '0.8: 1, 0': the last fifth is the first view's.",
                ),
                Options.Input("options", optional=True, tooltip="The other options; empty is plain averaging."),
            ],
            outputs=[Options.Output("anagram_options", display_name="options", tooltip="For Anagram Guider.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, schedule, options=None) -> io.NodeOutput:
        return io.NodeOutput(replace(options or AVERAGING, schedule=schedule_from(schedule)))


class ConceptsAnagramContrast(io.ComfyNode):
    """Each view away from what the others show."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptsAnagramContrast",
            display_name="Anagram Contrast",
            category=CATEGORY,
            description="Cures anagrams in which one reading wins, or both melt into a third thing: in each view, what the other "
            "views show counts as something not to show. Costs a model pass more for every pair of views and step, in the same "
            "batch.",
            search_aliases=["visual anagram", "domination", "negative prompt"],
            inputs=[
                io.Float.Input(
                    "contrast", default=0.5, min=0.0, max=5.0, step=0.05,
                    tooltip="How much the other readings count against each view's negative, which counts 1; 0 is off. More "
                    "keeps the readings apart and makes the picture harsher. Start with 0.5.",
                ),
                Options.Input("options", optional=True, tooltip="The other options; empty is plain averaging."),
            ],
            outputs=[Options.Output("anagram_options", display_name="options", tooltip="For Anagram Guider.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, contrast, options=None) -> io.NodeOutput:
        return io.NodeOutput(replace(options or AVERAGING, contrast=contrast))


class ConceptsAnagramAntiSegregation(io.ComfyNode):
    """The gradient step that pulls the concepts together."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptsAnagramAntiSegregation",
            display_name="Anagram Anti-Segregation",
            category=CATEGORY,
            description="Cures anagrams in which each reading is painted in a corner of its own: before each step, the places "
            "the concepts' words look at are pulled onto each other. Every view's prompt must come from Encode Concept Phrase.",
            search_aliases=["visual anagram", "attend and excite", "overlap"],
            inputs=[
                Options.Input("options", optional=True, tooltip="The other options; empty is plain averaging."),
                io.Float.Input(
                    "strength", default=0.03, min=0.0, max=0.5, step=0.005, round=0.001,
                    tooltip="How far each step goes, of the noisy picture's own size; 0 is off. Start with 0.03.",
                ),
                io.Int.Input(
                    "iterations", default=1, min=1, max=10,
                    tooltip="How many steps at each noise level; each costs about two model passes a view. Start with 1.",
                ),
                io.Float.Input(
                    "start_percent", default=0.0, min=0.0, max=1.0, step=0.01,
                    tooltip="From where in the sampling it works. Start with 0.",
                ),
                io.Float.Input(
                    "end_percent", default=0.7, min=0.0, max=1.0, step=0.01,
                    tooltip="Up to where in the sampling it works; later the places are settled. Start with 0.7.",
                ),
            ],
            outputs=[Options.Output("anagram_options", display_name="options", tooltip="For Anagram Guider.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, strength, iterations, start_percent, end_percent, options=None) -> io.NodeOutput:
        together = AntiSegregation(strength, start_percent, end_percent, iterations)
        return io.NodeOutput(replace(options or AVERAGING, together=together))


class ConceptsEncodePhrase(io.ComfyNode):
    """A prompt that knows which of its words are the concept."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptsEncodePhrase",
            display_name="Encode Concept Phrase",
            category="concepts",
            description="CLIP Text Encode that also marks which words of the prompt are the concept, for what looks at their "
            "attention.",
            search_aliases=["clip text encode", "prompt", "token"],
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder."),
                io.String.Input("text", multiline=True, default="", tooltip="The prompt."),
                io.String.Input(
                    "phrase", default="",
                    tooltip="The words of the prompt that are the concept, such as 'old man'; empty takes the whole prompt.",
                ),
            ],
            outputs=[io.Conditioning.Output("conditioning", display_name="CONDITIONING", tooltip="The encoded prompt.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, clip, text, phrase) -> io.NodeOutput:
        return io.NodeOutput(encode_with_phrase(clip, text, phrase))


class ConceptsTimeTravelSampler(io.ComfyNode):
    """A sampler that takes the middle steps several times."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptsTimeTravelSampler",
            display_name="Time Travel Sampler",
            category=CATEGORY,
            description="Takes every step of the middle of the sampling several times, going back up in noise in between, so "
            "that readings that lie on top of each other grow together. Costs the repeated steps once more each.",
            search_aliases=["repaint", "resampling", "looking glass"],
            inputs=[
                io.Sampler.Input("sampler", tooltip="The sampler to take the steps with, from KSamplerSelect; euler is good."),
                io.Int.Input(
                    "repeats", default=2, min=1, max=10,
                    tooltip="How often each step of the window is taken; 1 is the plain sampler. More fuses more and costs "
                    "more. Start with 2.",
                ),
                io.Float.Input(
                    "start_percent", default=0.2, min=0.0, max=1.0, step=0.01,
                    tooltip="From where in the sampling steps are repeated. Start with 0.2.",
                ),
                io.Float.Input(
                    "end_percent", default=0.8, min=0.0, max=1.0, step=0.01,
                    tooltip="Up to where in the sampling steps are repeated. Start with 0.8.",
                ),
            ],
            outputs=[io.Sampler.Output("travelling", display_name="SAMPLER", tooltip="For SamplerCustomAdvanced.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, sampler, repeats, start_percent, end_percent) -> io.NodeOutput:
        return io.NodeOutput(travelling(sampler, start_percent, end_percent, repeats))


PRESETS = {
    "averaging": AVERAGING,
    "multi-task (fast, no gradient)": MULTI_TASK_FAST,
    "custom": None,
    "multi-task (full)": MULTI_TASK_FULL,
}


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
                    tooltip="'averaging' is the plain mean; 'multi-task (fast, no gradient)' adds variance rectification and a contrast of 0.5; "
                    "'multi-task (full)' also pulls the concepts onto the same place, by gradients; 'custom' reads the widgets "
                    "below, which the others ignore. Start with multi-task (fast, no gradient).",
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


NODES: tuple[type[io.ComfyNode], ...] = (
    ConceptsAnagramView,
    ConceptsAnagramViewFromImage,
    ConceptsAnagramReference,
    ConceptsAnagramGuider,
    ConceptsAnagramPixelGuider,
    ConceptsAnagramModel,
    ConceptsAnagramOptions,
    ConceptsAnagramAntiSegregation,
    ConceptsAnagramSchedule,
    ConceptsAnagramContrast,
    ConceptsTimeTravelSampler,
    ConceptsEncodePhrase,
)
