"""Anagrams: what samples all the readings at once."""

from __future__ import annotations

from functools import partial
from typing import Any

from comfy_api.latest import io

from ...host.anagram.anti_segregation import Pull
from ...host.anagram.contrast import contrasted
from ...host.anagram.guider import ViewPrompt, ViewsGuider
from ...host.anagram.model_patch import with_views
from ...host.anagram.pixel_sync import PixelSyncGuider
from ...host.engine.time_travel import travelling_sampler
from ...host.schema import schema
from ...methods.anagram.blend import blend
from ...methods.anagram.combine import AVERAGING, Combination, combiner
from ...methods.anagram.overlap import segregation, step
from ...methods.anagram.prediction import Predictions
from ..wires import AnagramOptions, AnagramViews
from .views import CATEGORY, AnagramView

PREVIEWS = ("every view", "as the host")


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
                AnagramViews.Input("views", tooltip="What the picture shows in each view, from Anagram View."),
                io.Conditioning.Input("negative", tooltip="What no view may show; an empty prompt is a good start."),
                io.Float.Input(
                    "cfg", default=5.0, min=0.0, max=100.0, step=0.1, round=0.01,
                    tooltip="How strictly the prompts are followed. Anagrams want a little more than usual: start with 5.0.",
                ),
                AnagramOptions.Input(
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
            v.cfg or None,
            v.weight > 0,
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
                AnagramViews.Input("views", tooltip="What the picture shows in each view; the first must be 'identity'."),
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
        segregation, partial(step, strength=together.strength), together.start, together.end, together.iterations,
        together.lasting,
    )  # fmt: skip


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
                AnagramViews.Input("views", tooltip="What the picture shows in each view, from Anagram View."),
                io.Conditioning.Input("negative", tooltip="What no view may show; an empty prompt is a good start."),
                AnagramOptions.Input(
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
        return io.NodeOutput(travelling_sampler(sampler, start_percent, end_percent, repeats))


NODES: tuple[type[io.ComfyNode], ...] = (
    ConceptsAnagramGuider,
    ConceptsAnagramPixelGuider,
    ConceptsAnagramModel,
    ConceptsTimeTravelSampler,
)
