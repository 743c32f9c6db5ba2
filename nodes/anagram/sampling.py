"""Anagrams: what samples all the readings at once."""

from __future__ import annotations

from ...host.anagram.guider import ViewsGuider
from ...host.anagram.model_patch import with_views
from ...host.anagram.pixel_sync import PixelSyncGuider
from ...host.anagram.request import anagram_request
from ...host.engine.time_travel import travelling_sampler
from ...host.schema import io, schema
from ...host.types import VAE, Conditioning, ModelPatcher, Sampler
from ...methods.anagram.blend import blend
from ...methods.anagram.combine import AVERAGING, Combination
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
            description="Guides the sampling: every view shows its own prompt. Goes into 'guider' of "
            "SamplerCustomAdvanced; works with any sampler and scheduler. Cost: one model pass per view and step, all "
            "in one batch.",
            search_aliases=["visual anagram", "illusion"],
            inputs=[
                io.Model.Input("model", tooltip="The model to sample with."),
                AnagramViews.Input("views", tooltip="What the picture shows in each view, from Anagram View."),
                io.Conditioning.Input("negative", tooltip="What no view may show; an empty prompt is a good start."),
                io.Float.Input(
                    "cfg",
                    default=5.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="How strictly the prompts are followed. Anagrams want a little more than usual: start with "
                    "5.0.",
                ),
                AnagramOptions.Input(
                    "options",
                    optional=True,
                    tooltip="How the views are combined, from Anagram Options; empty is the plain mean.",
                ),
                io.Combo.Input(
                    "preview",
                    options=list(PREVIEWS),
                    default=PREVIEWS[0],
                    optional=True,
                    tooltip="What the sampler shows while it works: 'every view' upright, side by side, or 'as the "
                    "host' for the picture as it is, if previews are switched on in ComfyUI. Start with every view.",
                ),
            ],
            outputs=[io.Guider.Output("guider", display_name="guider", tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        views: AnagramView,
        negative: Conditioning,
        cfg: float,
        options: Combination | None = None,
        preview: str = PREVIEWS[0],
    ) -> io.NodeOutput:
        request = anagram_request(views.prompts(negative), options or AVERAGING)
        guider = ViewsGuider(model, request.prompts, request.combine, cfg, request.gradient_step)
        guider.shows_panels = preview == PREVIEWS[0]
        return io.NodeOutput(guider)


class ConceptsAnagramPixelGuider(io.ComfyNode):
    """Views that mean something on pictures alone, on latent models."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptsAnagramPixelGuider",
            display_name="Anagram Pixel Guider",
            category=CATEGORY,
            description="Anagram Guider for views that have no meaning on latents: negate, skew, pixel_permute, fine "
            "jigsaws. Samples one latent per view and synchronises them as pictures. Slow: each step costs one VAE "
            "Decode and two VAE Encodes per view.",
            search_aliases=["visual anagram", "looking glass", "negative", "pixel sync"],
            inputs=[
                io.Model.Input("model", tooltip="The model to sample with."),
                io.Vae.Input("vae", tooltip="The model's VAE. A fast one, such as TAESD, saves most of the time."),
                AnagramViews.Input(
                    "views", tooltip="What the picture shows in each view; the first must be 'identity'."
                ),
                io.Conditioning.Input("negative", tooltip="What no view may show; an empty prompt is a good start."),
                io.Float.Input(
                    "cfg",
                    default=5.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="How strictly the prompts are followed. Start with 5.0.",
                ),
                io.Int.Input(
                    "every",
                    default=1,
                    min=1,
                    max=10,
                    tooltip="Synchronise the views every so many steps. More is faster and lets them drift apart. "
                    "Start with 1.",
                ),
            ],
            outputs=[io.Guider.Output("guider", display_name="guider", tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(
        cls, model: ModelPatcher, vae: VAE, views: AnagramView, negative: Conditioning, cfg: float, every: int
    ) -> io.NodeOutput:
        prompts = anagram_request(views.prompts(negative)).prompts
        return io.NodeOutput(PixelSyncGuider(model, prompts, cfg, vae, blend, every))


class ConceptsAnagramModel(io.ComfyNode):
    """Anagrams for the stock KSampler."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptsAnagramModel",
            display_name="Anagram for KSampler",
            category=CATEGORY,
            description="Makes the ordinary KSampler sample an anagram: connect all three outputs to it. Does what "
            "Anagram Guider does for SamplerCustomAdvanced.",
            search_aliases=["visual anagram", "illusion", "ksampler"],
            inputs=[
                io.Model.Input("model", tooltip="The model to sample with."),
                AnagramViews.Input("views", tooltip="What the picture shows in each view, from Anagram View."),
                io.Conditioning.Input("negative", tooltip="What no view may show; an empty prompt is a good start."),
                AnagramOptions.Input(
                    "options",
                    optional=True,
                    tooltip="How the views are combined, from Anagram Options; empty is the plain mean.",
                ),
            ],
            outputs=[
                io.Model.Output("patched", display_name="MODEL", tooltip="The model that knows the views."),
                io.Conditioning.Output(
                    "positive", display_name="positive", tooltip="All views' prompts, for KSampler."
                ),
                io.Conditioning.Output(
                    "all_negative", display_name="negative", tooltip="All views' negatives, for KSampler."
                ),
            ],
        )

    @classmethod
    def execute(
        cls, model: ModelPatcher, views: AnagramView, negative: Conditioning, options: Combination | None = None
    ) -> io.NodeOutput:
        request = anagram_request(views.prompts(negative), options or AVERAGING)
        return io.NodeOutput(*with_views(model, request.prompts, request.combine, request.gradient_step))


class ConceptsTimeTravelSampler(io.ComfyNode):
    """A sampler that takes the middle steps several times."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptsTimeTravelSampler",
            display_name="Time Travel Sampler",
            category=CATEGORY,
            description="Takes every step in the middle of the sampling several times, adding noise again in between. "
            "Readings that lie on top of each other can then grow together. Costs the repeated steps.",
            search_aliases=["repaint", "resampling", "looking glass"],
            inputs=[
                io.Sampler.Input(
                    "sampler", tooltip="The sampler to take the steps with, from KSamplerSelect; euler is good."
                ),
                io.Int.Input(
                    "repeats",
                    default=2,
                    min=1,
                    max=10,
                    tooltip="How often each step in the window is taken; 1 is the plain sampler. More fuses more and "
                    "costs more. Start with 2.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.2,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Where in the sampling the repeated steps begin. Start with 0.2.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=0.8,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Where in the sampling the repeated steps end. Start with 0.8.",
                ),
            ],
            outputs=[io.Sampler.Output("travelling", display_name="SAMPLER", tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(cls, sampler: Sampler, repeats: int, start_percent: float, end_percent: float) -> io.NodeOutput:
        return io.NodeOutput(travelling_sampler(sampler, start_percent, end_percent, repeats))


NODES: tuple[type[io.ComfyNode], ...] = (
    ConceptsAnagramGuider,
    ConceptsAnagramPixelGuider,
    ConceptsAnagramModel,
    ConceptsTimeTravelSampler,
)
