"""Concept Conductor: several concepts in one picture, each in its region or in the layout of a reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ...host.conduct.guider import ConductGuider
from ...host.conduct.layout import LayoutReference
from ...host.engine.base_prompts import BasePrompts
from ...host.lora.concept import Concept
from ...host.schema import io, schema, ui
from ...host.types import VAE, Conditioning, ModelPatcher
from ...methods.assignment import assigned_concepts
from ...methods.choices import check_choice
from ...methods.colours import colours_of
from ...methods.conduct.points import check_points, parse_points
from ...methods.conduct.settings import Conduct
from ...methods.region_picture import cover, picture
from ...methods.regions import Region
from ..concept import ConceptList
from ..region import RegionList
from ..wires import Concepts, ConductorOptions, Layouts, Regions
from .options import CATEGORY, ConceptsConductorBlocks, ConceptsConductorMoreOptions, ConceptsConductorOptions

INJECTIONS = ("attentions", "transformers")
TRAJECTORIES = ("inverted", "noised", "inverted closely")
_CLOSE_PASSES = 2
"""Further model calls per step of a close inversion: over 10 levels of a flow the error falls from .085 to .034."""


class ConceptsLayoutReference(io.ComfyNode):
    """A picture whose layout the concepts take."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptsLayoutReference",
            display_name="Layout Reference",
            category=CATEGORY,
            description="A picture of ordinary things in the layout that the concepts take: a photo, a collage, or the "
            "latent of an earlier sampler. It is computed at every noise level once per schedule, and kept for later "
            "runs.",
            search_aliases=["inversion", "layout", "composition", "pose"],
            inputs=[
                io.Conditioning.Input(
                    "positive",
                    tooltip="What the reference shows, in words the model knows: 'on the left a cat and on the right a "
                    "dog'.",
                ),
                io.Combo.Input(
                    "trajectory",
                    options=list(TRAJECTORIES),
                    default="inverted",
                    tooltip="How the reference gets to each noise level. 'inverted' runs the sampler backwards: as "
                    "many model calls as there are steps, once. 'noised' adds noise: no calls, a looser layout. "
                    "'inverted closely' is nearer with few steps, for three calls a step. Start with inverted, on Flux "
                    "and other transformers with noised.",
                ),
                io.String.Input(
                    "points",
                    default="",
                    tooltip="Without regions: one point on each concept in the reference, as x,y in fractions, in the "
                    "order of the concepts: 0.25,0.5; 0.75,0.5. The masks then follow the shapes. Start empty and draw "
                    "regions.",
                ),
                io.Latent.Input(
                    "latent", optional=True, tooltip="The reference as a clean latent, of the picture's size."
                ),
                io.Image.Input(
                    "image", optional=True, tooltip="The reference as a picture of the picture's size; needs the VAE."
                ),
                io.Vae.Input("vae", optional=True, tooltip="Encodes the image."),
            ],
            outputs=[Layouts.Output("layout", display_name="layout", tooltip="For Concept Conductor.")],
        )

    @classmethod
    def execute(
        cls,
        positive: Conditioning,
        trajectory: str = "inverted",
        points: str = "",
        latent: dict[str, torch.Tensor] | None = None,
        image: torch.Tensor | None = None,
        vae: VAE | None = None,
    ) -> io.NodeOutput:
        check_choice(TRAJECTORIES, trajectory, "trajectory")
        if latent is not None:
            clean = latent["samples"]
        elif image is not None and vae is not None:
            clean = vae.encode(colours_of(image[:1]))
        else:
            raise ValueError(
                "The layout reference has no picture; connect a latent, or an image together with its VAE."
            )
        passes = _CLOSE_PASSES if trajectory == "inverted closely" else 0
        marked = parse_points(points)
        return io.NodeOutput(LayoutReference(positive, clean[:1], trajectory == "noised", marked, passes=passes))


class ConceptsConductorGuider(io.ComfyNode):
    """Samples several concepts in one picture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptsConductorGuider",
            display_name="Concept Conductor",
            category=CATEGORY,
            description="Several concepts in one picture, each with its whole LoRA in its own region, in one model "
            "call per step. For SamplerCustomAdvanced, any sampler and scheduler. Best with a layout reference; works "
            "with regions alone.",
            search_aliases=["multi lora", "regional lora", "concept conductor", "characters"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="The checkpoint, without the concepts' LoRAs. Other LoRAs on it act everywhere."
                ),
                io.Conditioning.Input(
                    "positive",
                    tooltip="The whole scene in words the model knows: 'on the left a cat and on the right a cat'.",
                ),
                io.Conditioning.Input("negative", tooltip="What the picture must not show; may be an empty prompt."),
                Concepts.Input("concepts", tooltip="The concepts, from Concept."),
                io.Float.Input(
                    "cfg",
                    default=7.5,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="How strictly the prompts are followed. Start with 7.5 (the demo model: 3).",
                ),
                io.Combo.Input(
                    "inject",
                    options=list(INJECTIONS),
                    default="attentions",
                    tooltip="What of a concept goes into the picture: 'attentions' as in the paper, for LoRAs on "
                    "attention alone; 'transformers' whole blocks of the decoder, for LoRAs that act on more (most "
                    "files). Start with attentions; take transformers if a concept only half appears.",
                ),
                Regions.Input(
                    "regions",
                    optional=True,
                    tooltip="Where the concepts go: one region per concept in order, or regions labelled with their "
                    "phrases. Leave empty only with a layout that has points.",
                ),
                Layouts.Input(
                    "layout", optional=True, tooltip="A picture whose layout is taken. Empty: the regions alone decide."
                ),
                ConductorOptions.Input(
                    "options",
                    optional=True,
                    tooltip="From Concept Conductor Options or More Options. Empty: the paper's values.",
                ),
            ],
            outputs=[io.Guider.Output("guider", display_name="GUIDER", tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        positive: Conditioning,
        negative: Conditioning,
        concepts: ConceptList,
        cfg: float,
        inject: str = "attentions",
        regions: RegionList | None = None,
        layout: LayoutReference | None = None,
        options: Conduct | None = None,
    ) -> io.NodeOutput:
        check_choice(INJECTIONS, inject, "injection")
        listed = concepts.in_order()
        drawn = None if regions is None else regions.in_order()
        if drawn is None:
            check_points(len(listed), 0 if layout is None else len(layout.points))
        else:
            listed = assigned_concepts(listed, drawn)
        settings = replace(options or Conduct(), whole_transformers=inject == "transformers")
        base = BasePrompts(positive, negative, cfg)
        return io.NodeOutput(ConductGuider(model, base, listed, drawn, settings, layout))


class ConceptsConceptMasks(io.ComfyNode):
    """The masks a sampling ended with."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptsConceptMasks",
            display_name="Concept Masks",
            category=CATEGORY,
            description="Shows where each concept ended up: the masks of the last sampling with this Concept "
            "Conductor, after refinement, over the picture.",
            search_aliases=["mask preview", "segmentation"],
            inputs=[
                io.Guider.Input("guider", tooltip="The Concept Conductor that sampled."),
                io.Image.Input(
                    "image", tooltip="The decoded picture: the masks are brought to its size and shown over it."
                ),
            ],
            outputs=[
                io.Mask.Output(
                    "masks", display_name="masks", tooltip="One mask per concept, for each picture of the batch."
                ),
                io.Image.Output("preview", display_name="preview", tooltip="The masks over the pictures."),
            ],
        )

    @classmethod
    def execute(cls, guider: ConductGuider, image: torch.Tensor) -> io.NodeOutput:
        masks = getattr(guider, "masks", None)  # another pack's stand-in for the guider will do
        if masks is None:
            raise ValueError("This guider has no masks; connect a Concept Conductor that has sampled this image.")
        image = colours_of(image)
        height, width = image.shape[1:3]
        large = torch.nn.functional.interpolate(masks[:, 1:], (height, width), mode="nearest")
        named = guider.concepts or guider.listed
        shown = torch.stack([_over(background, mask, named) for background, mask in zip(image, large, strict=False)])
        return io.NodeOutput(large.flatten(0, 1), shown, ui=ui.PreviewImage(shown, cls=cls))


def _over(background: torch.Tensor, masks: torch.Tensor, concepts: Sequence[Concept]) -> torch.Tensor:
    """The masks with the concepts' names over a picture, (height, width, 3)."""
    named = [Region(concept.phrase, (), torch.ones(1, 1)) for concept in concepts]
    return picture(named, masks, range(len(named)), cover(background, *masks.shape[-2:]))


NODES: tuple[type[io.ComfyNode], ...] = (
    ConceptsLayoutReference,
    ConceptsConductorGuider,
    ConceptsConductorOptions,
    ConceptsConductorMoreOptions,
    ConceptsConceptMasks,
    ConceptsConductorBlocks,
)
