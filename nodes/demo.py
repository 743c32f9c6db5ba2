"""The bundled demo model, for trying every node without downloading anything."""

from __future__ import annotations

import torch

from ..demo.files import LORAS
from ..demo.judge import CLASSES, Judge
from ..demo.loader import empty_latent, load_demo_model
from ..host.anagram.pictures import upright_pictures, views_on
from ..host.folders import offer_loras
from ..host.schema import io, schema, ui
from ..host.types import VAE
from ..methods.anagram.score import Readings
from ..methods.choices import chosen
from ..methods.colours import colours_of
from .anagram.views import AnagramView, lines_of
from .wires import AnagramScores, AnagramViews

offer_loras(LORAS)  # the demo model's LoRAs appear in the host's Load LoRA, as any other


UNET = "UNet"
ARCHITECTURES = {UNET: "unet", "diffusion transformer": "dit"}
"""What the widget offers, and the kind of demo model it stands for."""


class ConceptsDemoModel(io.ComfyNode):
    """Loads the bundled tiny model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptsDemoModel",
            display_name="Concepts Demo Model",
            category="concepts",
            description="A tiny text-to-image model of emoji that comes with the pack: nothing to download, seconds on "
            "a CPU. A UNet as Stable Diffusion has, or a diffusion transformer as Z-Image is. Canvas 128 × 128 (or "
            "192 × 128); prompts such as 'on the left a cat and on the right a dog, blue background'. Works "
            "with the ordinary nodes: CLIP Text Encode, KSampler, VAE Decode, Load LoRA.",
            search_aliases=["tiny model", "emoji", "load checkpoint"],
            inputs=[
                io.Combo.Input(
                    "architecture",
                    options=list(ARCHITECTURES),
                    default=UNET,
                    optional=True,
                    tooltip="UNet: v-prediction, SD 1 family; KSampler with 20 steps, cfg 3, euler, normal. Diffusion "
                    "transformer: flow matching, Z-Image family; 12 steps, cfg 3, euler, simple.",
                ),
            ],
            outputs=[
                io.Model.Output("model", display_name="MODEL", tooltip="The diffusion model."),
                io.Clip.Output("clip", display_name="CLIP", tooltip="The text encoder, for CLIP Text Encode."),
                io.Vae.Output("vae", display_name="VAE", tooltip="For VAE Decode and VAE Encode."),
                io.Latent.Output(
                    "latent",
                    display_name="LATENT",
                    tooltip="An empty canvas of 128 × 128 for this model; Repeat Latent Batch makes several. The "
                    "transformer's latent cells are 4 pixels wide, and Empty Latent Image makes cells of 8.",
                ),
            ],
        )

    @classmethod
    def execute(cls, architecture: str = UNET) -> io.NodeOutput:
        kind = chosen(ARCHITECTURES, architecture, "architecture")
        return io.NodeOutput(*load_demo_model(kind=kind), {"samples": empty_latent(kind)})


JUDGE_TEMPERATURE = 0.25  # probabilities, not cosines: with this the concealment of a sure reading is 0.98


class ConceptsDemoJudge(io.ComfyNode):
    """What the bundled judge recognises."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptsDemoJudge",
            display_name="Demo Judge",
            category="concepts",
            description="Says which emoji a picture of the demo model shows, by the small classifier that comes with "
            "the pack. With views: how well each view of an anagram reads.",
            search_aliases=["classifier", "score", "emoji"],
            is_output_node=True,
            inputs=[
                io.Image.Input("image", tooltip="Pictures made by the demo model."),
                io.String.Input(
                    "concepts",
                    multiline=True,
                    default="",
                    tooltip="With views: the concept each view must show, one line per view, such as heart. Without: "
                    "leave empty.",
                ),
                AnagramViews.Input("views", optional=True, tooltip="The views of an anagram."),
                io.Vae.Input("vae", optional=True, tooltip="The demo model's VAE: pieces then end at latent cells."),
            ],
            outputs=[
                io.String.Output("report", display_name="report", tooltip="What it recognises, one line per picture."),
                AnagramScores.Output(
                    "scores", display_name="scores", tooltip="For Anagram Contact Sheet; empty without views."
                ),
            ],
        )

    @classmethod
    def execute(
        cls, image: torch.Tensor, concepts: str = "", views: AnagramView | None = None, vae: VAE | None = None
    ) -> io.NodeOutput:
        judge, image = Judge.load(), colours_of(image)
        if views is None:
            report = "\n".join(judge.describe(picture) for picture in image)
            return io.NodeOutput(report, None, ui=ui.PreviewText(report))
        listed = views_on(image, views.all_at_cells(), vae)
        names = lines_of(concepts, len(listed), "concepts")
        unknown = [name for name in names if name not in CLASSES]
        if unknown:
            raise ValueError(f"The judge does not know '{unknown[0]}'; it knows {', '.join(CLASSES)}.")
        shown = upright_pictures(image, listed)
        chance = torch.stack([judge.probabilities(shown[:, view]) for view in range(len(listed))], 1)
        readings = Readings(chance[..., [CLASSES.index(name) for name in names]], JUDGE_TEMPERATURE)
        return io.NodeOutput(readings.report(), readings, ui=ui.PreviewText(readings.report()))


NODES: tuple[type[io.ComfyNode], ...] = (ConceptsDemoModel, ConceptsDemoJudge)
