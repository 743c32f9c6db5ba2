"""LoRA-Composer: several concepts in regions of one picture, at nearly the price of one sampling."""

from __future__ import annotations

from functools import partial

import torch

from ...host.compose.cross import CrossGuider
from ...host.compose.guider import ComposeGuider
from ...host.compose.joint import JointGuider
from ...host.engine.base_prompts import BasePrompts
from ...host.registry import attends_across, attends_jointly
from ...host.schema import io, schema
from ...host.types import Conditioning, ModelPatcher
from ...methods.assignment import assigned_concepts
from ...methods.compose.settings import Compose, LossWeights
from ...methods.region_picture import picture
from ...methods.regions import Region, coverage
from ..concept import ConceptList
from ..region import RegionList, linked
from ..wires import ComposerOptions, Concepts, Regions

CATEGORY = "concepts/compose"
_CELL = 8  # px of the picture for each cell of the latent


def _guider_of(model: ModelPatcher) -> type[JointGuider | CrossGuider | ComposeGuider]:
    """LoRA Composer in the form of the model's network."""
    if attends_jointly(model):
        return JointGuider
    return CrossGuider if attends_across(model) else ComposeGuider


class ConceptsComposer(io.ComfyNode):
    """A guider that draws each concept in its region."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptsComposer",
            display_name="LoRA Composer",
            category=CATEGORY,
            description="Draws several concepts, each with its own LoRA in its own region, in one pass of the base "
            "model. For SamplerCustomAdvanced, with any sampler.",
            search_aliases=["multi lora", "regional lora", "lora composer", "mix of show", "attention couple"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="A UNet (SD 1.x, SD 2.x, SDXL) or a transformer (Flux, Z-Image, Qwen-Image, Wan, Anima, "
                    "…), without the concepts' LoRAs.",
                ),
                Concepts.Input(
                    "concepts",
                    tooltip="The concepts, from Concept: connect the last of the chain. Each one's prompt is the whole "
                    "scene with this concept in its place.",
                ),
                io.Conditioning.Input(
                    "positive",
                    tooltip="What the whole picture shows, in words the base model knows. It applies outside of "
                    "regions.",
                ),
                io.Conditioning.Input("negative", tooltip="What the picture must not show. Start empty."),
                io.Float.Input(
                    "cfg",
                    default=7.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="How strictly the prompts are followed. Start with 7.0 (the demo model: 3.0).",
                ),
                Regions.Input(
                    "regions",
                    optional=True,
                    tooltip="Where the concepts go: one region per concept in order, or labelled with their phrases. "
                    "Without regions they are found in the concepts' attention in the first steps, once per batch.",
                ),
                ComposerOptions.Input(
                    "options", optional=True, tooltip="From Composer Options. Not connected: its starting values."
                ),
                io.Float.Input(
                    "automatic_percent",
                    default=0.2,
                    min=0.05,
                    max=0.8,
                    step=0.05,
                    optional=True,
                    tooltip="Without regions: the share of the sampling before they are found. Until then the base "
                    "model draws alone. Start with 0.2.",
                ),
            ],
            outputs=[io.Guider.Output("guider", display_name="GUIDER", tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        concepts: ConceptList,
        positive: Conditioning,
        negative: Conditioning,
        cfg: float,
        regions: RegionList | None = None,
        options: Compose | None = None,
        automatic_percent: float = 0.2,
    ) -> io.NodeOutput:
        base, listed = BasePrompts(positive, negative, cfg), concepts.in_order()
        settings = (options or Compose()).at(automatic_percent)
        guider = _guider_of(model)
        if regions is None:
            return io.NodeOutput(guider(model, base, listed, None, settings))
        drawn = regions.in_order()
        soft = any(region.feather > 0 for region in drawn)
        ordered, coverage_at = assigned_concepts(listed, drawn), partial(coverage, drawn)
        return io.NodeOutput(guider(model, base, ordered, coverage_at, settings, soft))


class ConceptsComposerOptions(io.ComfyNode):
    """Settings that decide how concepts stay in their regions."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptsComposerOptions",
            display_name="Composer Options",
            category=CATEGORY,
            description="Which parts of LoRA-Composer are on, and how strong they are.",
            search_aliases=["lora composer", "concept isolation", "concept enhancement"],
            inputs=[
                io.Boolean.Input(
                    "isolation",
                    default=True,
                    tooltip="Regions do not attend to each other, so concepts do not mix. Start with on.",
                ),
                io.Combo.Input(
                    "first_noise",
                    options=["swap", "copy", "off"],
                    default="swap",
                    tooltip="'swap' exchanges each region's noise with the noise that suits its concept best; 'copy' "
                    "copies it there, as the reference does; 'off' leaves the noise. Start with swap.",
                ),
                io.Float.Input(
                    "enhancement",
                    default=0.01,
                    min=0.0,
                    max=100.0,
                    step=0.01,
                    tooltip="How far each gradient step pulls the concepts into their regions, as a share of the "
                    "latent's size. 0 takes no gradients and is fastest. From 1 on it is the paper's learning rate "
                    "(20). Start with 0.01.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Gradient steps end at this share of the sampling. Start with 0.5.",
                ),
                io.Combo.Input(
                    "stop",
                    options=["patience", "rise", "never"],
                    default="patience",
                    tooltip="When gradient steps end earlier: 'patience' if the loss has not fallen for some steps, "
                    "'rise' at its first rise, as in the reference. Start with patience.",
                ),
                io.Boolean.Input(
                    "token_lora",
                    default=True,
                    tooltip="The whole LoRA acts on its region: self-attention, queries and feed-forward too. Off "
                    "uses only its cross-attention, as in the paper; that is enough for ED-LoRAs. Start with on.",
                ),
            ],
            outputs=[ComposerOptions.Output("composer_options", display_name="options", tooltip="For LoRA Composer.")],
        )

    @classmethod
    def execute(
        cls, isolation: bool, first_noise: str, enhancement: float, end_percent: float, stop: str, token_lora: bool
    ) -> io.NodeOutput:
        return io.NodeOutput(
            Compose(
                isolation, first_noise, enhancement, enhancement < 1, 0.0, end_percent, stop, LossWeights(), token_lora
            )
        )


class ConceptsComposerRegions(io.ComfyNode):
    """The regions that a composer has used."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptsComposerRegions",
            display_name="Composer Regions",
            category=CATEGORY,
            description="Shows the regions LoRA Composer used in the run that made this latent. If they are good, "
            "connect them to it. To edit them, use Region Editor's 'below'.",
            search_aliases=["automatic regions", "masks"],
            inputs=[
                io.Guider.Input("guider", tooltip="The guider from LoRA Composer."),
                io.Latent.Input("latent", tooltip="The latent that the guider sampled. This node waits for it."),
            ],
            outputs=[
                Regions.Output(
                    "region_list", display_name="regions", tooltip="One region per concept, for LoRA Composer."
                ),
                io.Mask.Output("masks", display_name="masks", tooltip="One mask per concept."),
                io.Image.Output("preview", display_name="preview", tooltip="The regions with the concepts' names."),
            ],
        )

    @classmethod
    def execute(cls, guider: object, latent: dict[str, torch.Tensor]) -> io.NodeOutput:
        found = getattr(guider, "regions", None)
        if found is None:
            raise ValueError("This guider has no regions; connect LoRA Composer's guider and the latent it sampled.")
        labels = [concept.phrase for concept in getattr(guider, "concepts", ())]
        regions = [Region(label, (), mask.cpu().float()) for label, mask in zip(labels, found, strict=True)]
        # regions that were found have the grid of an attention, which is coarser than the latent
        height, width = (side * _CELL for side in latent["samples"].shape[-2:])
        masks = coverage(regions, height, width)
        return io.NodeOutput(linked(regions), masks, picture(regions, masks, range(len(regions)), None)[None])


NODES: tuple[type[io.ComfyNode], ...] = (ConceptsComposer, ConceptsComposerOptions, ConceptsComposerRegions)
