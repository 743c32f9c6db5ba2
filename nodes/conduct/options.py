"""The settings of Concept Conductor, in three nodes that chain."""

from __future__ import annotations

from dataclasses import replace

from ...host.schema import io, schema
from ...methods.conduct.settings import Conduct
from ..wires import ConductorOptions

CATEGORY = "concepts/conduct"


class ConceptsConductorOptions(io.ComfyNode):
    """The settings that are changed most."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        paper = Conduct()
        return schema(
            node_id="ConceptsConductorOptions",
            display_name="Concept Conductor Options",
            category=CATEGORY,
            description="How strongly the layout is aligned, and when masks follow the shapes. Without this node the "
            "paper's values are used.",
            search_aliases=["guidance", "mask refinement"],
            inputs=[
                io.Float.Input(
                    "guidance_weight",
                    default=paper.guidance_weight,
                    min=0.0,
                    max=1.0,
                    step=0.0001,
                    tooltip="How far each step moves the latent towards the reference's layout, per token. 0 is off. "
                    "Start with 0.0391, the paper's; raise it if the layout is not taken, lower it if pictures look "
                    "burnt.",
                ),
                io.Float.Input(
                    "guidance_end",
                    default=paper.guidance_end,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Up to which part of the sampling the layout is aligned (0 to 1). Start with 0.3.",
                ),
                io.Int.Input(
                    "iterations",
                    default=paper.iterations,
                    min=0,
                    max=100,
                    tooltip="Gradient steps before each sampling step while the layout is aligned. 0 makes about 61 in "
                    "all, as the paper does in 200 steps. Start with 0; lower it for speed.",
                ),
                io.Float.Input(
                    "refine_start",
                    default=paper.refine_start,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="From which part of the sampling the masks follow the shapes that appear. Start with 0.25.",
                ),
                io.Float.Input(
                    "refine_end",
                    default=paper.refine_end,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Until when they do; at or below refine_start it is off, and regions stay as drawn. Start "
                    "with 0.4.",
                ),
                io.Float.Input(
                    "least_overlap",
                    default=paper.least_overlap,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="A shape that overlaps less than this with the mask so far is not trusted; the mask's "
                    "rectangle is taken then. 0 trusts every shape. Start with 0.7.",
                ),
            ],
            outputs=[
                ConductorOptions.Output("conductor_options", display_name="options", tooltip="For Concept Conductor.")
            ],
        )

    @classmethod
    def execute(
        cls,
        guidance_weight: float,
        guidance_end: float,
        iterations: int,
        refine_start: float,
        refine_end: float,
        least_overlap: float,
    ) -> io.NodeOutput:
        return io.NodeOutput(
            Conduct(
                guidance_weight=guidance_weight,
                guidance_end=guidance_end,
                iterations=iterations,
                refine_start=refine_start,
                refine_end=refine_end,
                least_overlap=least_overlap,
            )
        )


class ConceptsConductorMoreOptions(io.ComfyNode):
    """The other settings."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        paper = Conduct()
        return schema(
            node_id="ConceptsConductorMoreOptions",
            display_name="Concept Conductor More Options",
            category=CATEGORY,
            description="When alignment of the layout begins, when concepts are put in, and details of how masks "
            "follow the shapes. Goes behind Concept Conductor Options or alone; without it the paper's values are "
            "used.",
            search_aliases=["injection window", "mask refinement", "advanced"],
            inputs=[
                io.Float.Input(
                    "guidance_start",
                    default=paper.guidance_start,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="From which part of the sampling the layout is aligned (0 to 1). If it begins later, the "
                    "noise decides more of the layout. Start with 0.",
                ),
                io.Float.Input(
                    "injection_start",
                    default=paper.injection_start,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="From which part of the sampling the concepts are put into their regions; before it, the "
                    "base draws alone, at its own cost. Start with 0.",
                ),
                io.Float.Input(
                    "injection_end",
                    default=paper.injection_end,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Until when they are; after it the base finishes the picture at its own cost, smoother at "
                    "the seams and less like the concepts. Start with 1.",
                ),
                io.Float.Input(
                    "refine_every",
                    default=paper.refine_every,
                    min=0.001,
                    max=1.0,
                    step=0.005,
                    tooltip="The smallest part of the sampling between two refinements of the masks. Start with 0.025; "
                    "raise it for speed.",
                ),
                io.Float.Input(
                    "concept_share",
                    default=paper.concept_share,
                    min=0.0,
                    max=10.0,
                    step=0.05,
                    tooltip="How much the concepts' own predictions count against the base's when the layout is "
                    "aligned. 0 aligns the base only. Start with 1.",
                ),
                io.Boolean.Input(
                    "rectangles",
                    default=paper.rectangles,
                    tooltip="Masks are always rectangles around the shapes. Start with off; on if masks fray.",
                ),
                ConductorOptions.Input(
                    "options", optional=True, tooltip="From Concept Conductor Options. Empty: the paper's values."
                ),
            ],
            outputs=[
                ConductorOptions.Output("conductor_options", display_name="options", tooltip="For Concept Conductor.")
            ],
        )

    @classmethod
    def execute(
        cls,
        guidance_start: float,
        injection_start: float,
        injection_end: float,
        refine_every: float,
        concept_share: float,
        rectangles: bool,
        options: Conduct | None = None,
    ) -> io.NodeOutput:
        return io.NodeOutput(
            replace(
                options or Conduct(),
                guidance_start=guidance_start,
                injection_start=injection_start,
                injection_end=injection_end,
                refine_every=refine_every,
                concept_share=concept_share,
                rectangles=rectangles,
            )
        )


class ConceptsConductorBlocks(io.ComfyNode):
    """The part of the network that takes the concepts in."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        paper = Conduct()
        return schema(
            node_id="ConceptsConductorBlocks",
            display_name="Concept Conductor Blocks",
            category=CATEGORY,
            description="In which blocks of the network concepts are put in, as shares of its depth, so that it means "
            "the same on every model. Goes behind the other options of Concept Conductor or alone; without it all "
            "blocks are used.",
            search_aliases=["layers", "block weights", "injection depth"],
            inputs=[
                io.Float.Input(
                    "block_start",
                    default=paper.block_start,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="From which block of the network on concepts are put in, as a share of its depth: of the "
                    "decoder in a UNet, of all blocks in a transformer. Start with 0.",
                ),
                io.Float.Input(
                    "block_end",
                    default=paper.block_end,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Up to which block they are; the base's own layers after it blend the seams and weaken the "
                    "concepts. At or below block_start no concept is put in. Start with 1.",
                ),
                ConductorOptions.Input(
                    "options", optional=True, tooltip="From the other options. Empty: the paper's values."
                ),
            ],
            outputs=[
                ConductorOptions.Output("conductor_options", display_name="options", tooltip="For Concept Conductor.")
            ],
        )

    @classmethod
    def execute(cls, block_start: float, block_end: float, options: Conduct | None = None) -> io.NodeOutput:
        return io.NodeOutput(replace(options or Conduct(), block_start=block_start, block_end=block_end))
