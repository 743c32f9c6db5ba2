"""Concept Conductor: several concepts in one picture, each in its region or in the layout of a reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from comfy_api.latest import io, ui

from ...host.conduct.guider import ConductGuider
from ...host.conduct.layout import LayoutReference
from ...host.schema import schema
from ...methods.choices import check_choice
from ...methods.conduct.settings import Conduct
from ...methods.region_picture import cover, picture
from ...methods.regions import Region, coverage
from ..concept import assigned
from ..wires import Concepts, ConductorOptions, Layouts, Regions
from .options import CATEGORY, ConceptsConductorMoreOptions, ConceptsConductorOptions

INJECTIONS = ("attentions", "transformers")
TRAJECTORIES = ("inverted", "noised")


def parse_points(text: str) -> tuple[tuple[float, float], ...]:
    """Points ``x,y; x,y`` in fractions of the canvas.

    Raises:
        ValueError: something else stands there.
    """
    points = []
    for part in filter(None, (p.strip() for p in text.split(";"))):
        try:
            x, y = (float(number) for number in part.split(","))
        except ValueError:
            x = y = -1.0
        if not (0 <= x <= 1 and 0 <= y <= 1):
            raise ValueError(f"'{part}' is no point; write one as x,y in fractions of the canvas: 0.25,0.5; 0.75,0.5")
        points.append((x, y))
    return tuple(points)


class ConceptsLayoutReference(io.ComfyNode):
    """A picture whose layout the concepts shall take."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptsLayoutReference",
            display_name="Layout Reference",
            category=CATEGORY,
            description="A picture of ordinary things in the layout that the concepts shall take: a photo, a collage, or the "
            "latent of an earlier sampler. It is brought to every noise level once for a schedule, and kept for later runs.",
            search_aliases=["inversion", "layout", "composition", "pose"],
            inputs=[
                io.Conditioning.Input(
                    "positive", tooltip="What the reference shows, in words the model knows: 'on the left a cat and on the right a dog'."
                ),
                io.Combo.Input(
                    "trajectory", options=list(TRAJECTORIES), default="inverted",
                    tooltip="How the reference gets to each noise level. 'inverted' runs the sampler backwards: as many model "
                    "calls as there are steps, once. 'noised' adds noise: no calls, a looser hold. Start with inverted.",
                ),
                io.String.Input(
                    "points", default="",
                    tooltip="Without regions: a click on each concept's place in the reference, as x,y in fractions, in the order "
                    "of the concepts: 0.25,0.5; 0.75,0.5. Masks are then found by the shapes. Start empty and draw regions.",
                ),
                io.Latent.Input("latent", optional=True, tooltip="The reference as a clean latent, of the picture's size."),
                io.Image.Input("image", optional=True, tooltip="The reference as a picture of the picture's size; needs the VAE."),
                io.Vae.Input("vae", optional=True, tooltip="Encodes the image."),
            ],
            outputs=[Layouts.Output("layout", display_name="layout", tooltip="For Concept Conductor.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, positive, trajectory="inverted", points="", latent=None, image=None, vae=None) -> io.NodeOutput:
        check_choice(TRAJECTORIES, trajectory, "trajectory")
        if latent is None and (image is None or vae is None):
            raise ValueError(
                "The layout reference has no picture; connect a latent, or an image together with its VAE."
            )
        clean = latent["samples"] if latent is not None else vae.encode(image[:1, :, :, :3])
        return io.NodeOutput(LayoutReference(positive, clean[:1], trajectory == "noised", parse_points(points)))


class ConceptsConductorGuider(io.ComfyNode):
    """Samples several concepts in one picture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptsConductorGuider",
            display_name="Concept Conductor",
            category=CATEGORY,
            description="Several concepts in one picture, each with its whole LoRA in its own region, in one model call a step. "
            "For SamplerCustomAdvanced, any sampler and scheduler. Best with a layout reference; works with regions alone.",
            search_aliases=["multi lora", "regional lora", "concept conductor", "characters"],
            inputs=[
                io.Model.Input("model", tooltip="The checkpoint, without the concepts' LoRAs. Other LoRAs on it act everywhere."),
                io.Conditioning.Input(
                    "positive", tooltip="The whole scene in words the model knows: 'on the left a cat and on the right a cat'."
                ),
                io.Conditioning.Input("negative", tooltip="What the picture must not show; may be an empty prompt."),
                Concepts.Input("concepts", tooltip="The concepts, from Concept."),
                io.Float.Input(
                    "cfg", default=7.5, min=0.0, max=100.0, step=0.1, round=0.01,
                    tooltip="How strictly prompts are followed. Start with 7.5 (the demo model: 3).",
                ),
                io.Combo.Input(
                    "inject", options=list(INJECTIONS), default="attentions",
                    tooltip="What of a concept goes into the picture: 'attentions' as in the paper, for LoRAs on attention alone; "
                    "'transformers' whole blocks of the decoder, for LoRAs that act on more (most files). Start with "
                    "attentions; take transformers if a concept only half appears.",
                ),
                Regions.Input(
                    "regions", optional=True,
                    tooltip="Where the concepts stand, one region a concept in order, or labelled with their phrases. Leave empty only "
                    "with a layout that has points.",
                ),
                Layouts.Input("layout", optional=True, tooltip="A picture whose layout is taken. Empty: the regions alone decide."),
                ConductorOptions.Input(
                    "options", optional=True,
                    tooltip="From Concept Conductor Options or More Options. Empty: the paper's values.",
                ),
            ],
            outputs=[io.Guider.Output("guider", display_name="GUIDER", tooltip="For SamplerCustomAdvanced.")],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model, positive, negative, concepts, cfg, inject="attentions", regions=None, layout=None, options=None
    ) -> io.NodeOutput:
        check_choice(INJECTIONS, inject, "injection")
        listed = concepts.in_order()
        places = None if regions is None else regions.in_order()
        if places is None:
            _check_points(len(listed), layout)
        else:
            listed = assigned(listed, places)
        covered_for = None if places is None else lambda height, width: coverage(places, height, width)
        soft = places is not None and any(region.feather > 0 for region in places)
        settings = replace(options or Conduct(), whole_transformers=inject == "transformers")
        return io.NodeOutput(ConductGuider(model, positive, negative, cfg, listed, covered_for, settings, layout, soft))


def _check_points(concepts: int, layout: LayoutReference | None) -> None:
    points = 0 if layout is None else len(layout.points)
    if not points:
        raise ValueError("Nobody says where the concepts are; connect regions, or a layout reference with points.")
    if points != concepts:
        raise ValueError(
            f"There are {concepts} concepts and {points} points; give one to each concept, in the order of the concepts."
        )


class ConceptsConceptMasks(io.ComfyNode):
    """The masks a sampling ended with."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptsConceptMasks",
            display_name="Concept Masks",
            category=CATEGORY,
            description="Shows where each concept ended up: the masks of the last sampling with this Concept Conductor, after "
            "refinement, over the picture.",
            search_aliases=["mask preview", "segmentation"],
            inputs=[
                io.Guider.Input("guider", tooltip="The Concept Conductor that sampled."),
                io.Image.Input("image", tooltip="The decoded picture: the masks are brought to its size and shown over it."),
            ],
            outputs=[
                io.Mask.Output("masks", display_name="masks", tooltip="One mask a concept, for each picture of the batch."),
                io.Image.Output("preview", display_name="preview", tooltip="The masks over the pictures."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, guider, image) -> io.NodeOutput:
        masks = getattr(guider, "masks", None)
        if masks is None:
            raise ValueError("This guider has no masks; connect a Concept Conductor that has sampled this image.")
        height, width = image.shape[1:3]
        large = torch.nn.functional.interpolate(masks[:, 1:], (height, width), mode="nearest")
        shown = [_over(picture_, mask, guider) for picture_, mask in zip(image, large, strict=False)]
        return io.NodeOutput(large.flatten(0, 1), torch.stack(shown), ui=ui.PreviewImage(torch.stack(shown), cls=cls))


def _over(background: torch.Tensor, masks: torch.Tensor, guider: Any) -> torch.Tensor:
    named = [Region(concept.phrase, (), torch.ones(1, 1)) for concept in guider.concepts or guider.listed]
    return picture(named, masks, range(len(named)), cover(background, *masks.shape[-2:]))


NODES: tuple[type[io.ComfyNode], ...] = (
    ConceptsLayoutReference,
    ConceptsConductorGuider,
    ConceptsConductorOptions,
    ConceptsConductorMoreOptions,
    ConceptsConceptMasks,
)
