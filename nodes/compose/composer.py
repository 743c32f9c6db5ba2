"""LoRA-Composer: several concepts in regions of one picture, at nearly the price of one sampling."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from comfy_api.latest import io

from ...host.compose.guider import ComposeGuider
from ...host.schema import schema
from ...methods.assignment import assigned_concepts
from ...methods.compose.settings import Compose, LossWeights
from ...methods.region_picture import picture
from ...methods.regions import Region, coverage
from ..region import linked
from ..wires import ComposerOptions, Concepts, Regions

CATEGORY = "concepts/compose"
_CELL = 8  # px of the picture for each cell of the latent


def _covered(regions: Sequence[Region], height: int, width: int) -> torch.Tensor:
    return coverage(regions, height, width)


class ConceptsComposer(io.ComfyNode):
    """A guider that draws each concept in its region."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptsComposer",
            display_name="LoRA Composer",
            category=CATEGORY,
            description="Draws several concepts, each with its own LoRA in its own region, on the one path of the base model. "
            "For SamplerCustomAdvanced, with any sampler.",
            search_aliases=["multi lora", "regional lora", "lora composer", "mix of show", "attention couple"],
            inputs=[
                io.Model.Input("model", tooltip="A UNet model (SD 1.x, SD 2.x, SDXL) without the concepts' LoRAs."),
                Concepts.Input("concepts", tooltip="The concepts, from Concept; each one's prompt describes what its region shows."),
                io.Conditioning.Input(
                    "positive", tooltip="What the whole picture shows, in words the base model knows; it rules outside of regions."
                ),
                io.Conditioning.Input("negative", tooltip="What the picture must not show. Start empty."),
                io.Float.Input(
                    "cfg", default=7.0, min=0.0, max=100.0, step=0.1, round=0.01,
                    tooltip="How strictly the prompts are followed. Start with 7.0 (the demo model: 3.0).",
                ),
                Regions.Input(
                    "regions", optional=True,
                    tooltip="Where the concepts stand, one region a concept in order, or labelled with their phrases. Without "
                    "any they are found where the concepts look in the first steps, once for all pictures of a batch.",
                ),
                ComposerOptions.Input("options", optional=True, tooltip="From Composer Options; empty takes its starting values."),
                io.Float.Input(
                    "automatic_percent", default=0.2, min=0.05, max=0.8, step=0.05, optional=True,
                    tooltip="Without regions: up to where in the sampling the base model draws alone, before they are found. "
                    "Start with 0.2.",
                ),
            ],
            outputs=[io.Guider.Output("guider", display_name="GUIDER", tooltip="For SamplerCustomAdvanced.")],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model, concepts, positive, negative, cfg, regions=None, options=None, automatic_percent=0.2
    ) -> io.NodeOutput:
        listed = concepts.in_order()
        settings = (options or Compose()).at(automatic_percent)
        if regions is None:
            return io.NodeOutput(ComposeGuider(model, positive, negative, cfg, listed, None, settings))
        drawn = regions.in_order()
        soft = any(region.feather > 0 for region in drawn)
        covered = partial(_covered, drawn)
        return io.NodeOutput(
            ComposeGuider(model, positive, negative, cfg, assigned_concepts(listed, drawn), covered, settings, soft)
        )


class ConceptsComposerOptions(io.ComfyNode):
    """How the concepts are kept in their regions."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptsComposerOptions",
            display_name="Composer Options",
            category=CATEGORY,
            description="Which of LoRA-Composer's remedies work, and how strongly.",
            search_aliases=["lora composer", "concept isolation", "concept enhancement"],
            inputs=[
                io.Boolean.Input(
                    "isolation", default=True,
                    tooltip="Regions do not see each other in self-attention, so that concepts do not mix. Start with on.",
                ),
                io.Combo.Input(
                    "first_noise", options=["swap", "copy", "off"], default="swap",
                    tooltip="'swap' brings the noise a concept likes best into its region, and what was there to its place; "
                    "'copy' doubles it, as the reference does; 'off' leaves the noise. Start with swap.",
                ),
                io.Float.Input(
                    "enhancement", default=0.01, min=0.0, max=100.0, step=0.01,
                    tooltip="How far each gradient step pulls the concepts into their regions, as a share of the picture's own "
                    "size; 0 takes no gradients, which is fastest. From 1 on it is the paper's learning rate (20). Start with 0.01.",
                ),
                io.Float.Input(
                    "end_percent", default=0.5, min=0.0, max=1.0, step=0.01,
                    tooltip="Up to where in the sampling gradient steps are taken. Start with 0.5.",
                ),
                io.Combo.Input(
                    "stop", options=["patience", "rise", "never"], default="patience",
                    tooltip="When they end before that: 'patience' when the loss has not fallen for some steps, 'rise' when it "
                    "first rises, as the reference. Start with patience.",
                ),
                io.Boolean.Input(
                    "token_lora", default=True,
                    tooltip="The whole LoRA acts on its region: self-attention, queries and feed-forward too. Off takes its part "
                    "in cross-attention alone, as the paper; enough for ED-LoRAs. Start with on.",
                ),
            ],
            outputs=[ComposerOptions.Output("composer_options", display_name="options", tooltip="For LoRA Composer.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, isolation, first_noise, enhancement, end_percent, stop, token_lora) -> io.NodeOutput:
        return io.NodeOutput(
            Compose(
                isolation, first_noise, enhancement, enhancement < 1, 0.0, end_percent, stop, LossWeights(), token_lora
            )
        )


class ConceptsComposerRegions(io.ComfyNode):
    """The regions a composer has found."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptsComposerRegions",
            display_name="Composer Regions",
            category=CATEGORY,
            description="The regions LoRA Composer has worked with in the run that made this latent: to look at, and to hand "
            "back to it when they are good. Edit them with Region Editor's 'below'.",
            search_aliases=["automatic regions", "masks"],
            inputs=[
                io.Guider.Input("guider", tooltip="The guider from LoRA Composer."),
                io.Latent.Input("latent", tooltip="The latent it has sampled, so that this node waits for it."),
            ],
            outputs=[
                Regions.Output("region_list", display_name="regions", tooltip="One region a concept, for LoRA Composer."),
                io.Mask.Output("masks", display_name="masks", tooltip="One mask a concept."),
                io.Image.Output("preview", display_name="preview", tooltip="The regions with the concepts' names."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, guider, latent) -> io.NodeOutput:
        found = getattr(guider, "regions", None)
        if found is None:
            raise ValueError("This guider has no regions; connect LoRA Composer's, and the latent it has sampled.")
        labels = [concept.phrase for concept in guider.concepts]
        regions = [Region(label, (), mask.cpu().float()) for label, mask in zip(labels, found, strict=True)]
        # what is found has the grid of an attention, which is coarser than the latent
        height, width = (side * _CELL for side in latent["samples"].shape[-2:])
        masks = coverage(regions, height, width)
        return io.NodeOutput(linked(regions), masks, picture(regions, masks, range(len(regions)), None)[None])


NODES: tuple[type[io.ComfyNode], ...] = (ConceptsComposer, ConceptsComposerOptions, ConceptsComposerRegions)
