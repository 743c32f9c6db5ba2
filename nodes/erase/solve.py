"""Solving an edit in closed form, and the numbers of the solvers."""

from __future__ import annotations

from ...host.erase.solve import SolveRequest, solve_erasure
from ...host.schema import io, schema
from ...host.types import CLIP, ModelPatcher
from ...methods.choices import check_choice, chosen
from ...methods.erase.problem import SolverSettings
from ...methods.erase.report import PROMISE, report_picture, report_text
from ...methods.erase.solvers import SOLVERS
from ...methods.erase.spec import Erased, Preserved
from ..wires import Edits, EraseList, EraseOptions, PreserveList
from .shared import CATEGORY, report_preview

PROJECTIONS = {"keys and values": ("k", "v"), "keys": ("k",), "values": ("v",)}


class ConceptsEraseOptions(io.ComfyNode):
    """Numbers of the solvers."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptsEraseOptions",
            display_name="Erase Options",
            category=CATEGORY,
            description="The numbers behind Solve Erasure. Without this node every solver uses its own.",
            search_aliases=["UCE", "RECE", "lambda", "regularisation"],
            inputs=[
                io.Float.Input(
                    "ridge",
                    default=0.0,
                    min=0.0,
                    max=1000.0,
                    step=0.01,
                    round=0.0001,
                    tooltip="λ: how much every weight resists changing. Lower erases more. Start with 0, the solver's "
                    "own (uce and realera 0.5, rece 0.1, null-space and speed 0.05). double-projections has none.",
                ),
                io.Float.Input(
                    "keep",
                    default=0.0,
                    min=0.0,
                    max=10000.0,
                    step=0.1,
                    round=0.0001,
                    tooltip="Multiplies the weight of everything preserved, the empty prompt too. Start with 0, the "
                    "solver's own (rece 6, rece-sequential 0.1, else 1). null-space, speed and double-projections "
                    "use 'threshold' instead.",
                ),
                io.Int.Input(
                    "epochs",
                    default=3,
                    min=0,
                    max=10,
                    tooltip="How often rece looks for what brings the concept back and erases it. Start with 3.",
                ),
                io.Float.Input(
                    "regeneration",
                    default=0.1,
                    min=1e-5,
                    max=100.0,
                    step=0.001,
                    round=0.00001,
                    tooltip="λ of the embedding rece looks for: higher finds shorter ones. Start with 0.1 for unsafe "
                    "words and easy things, 0.001 for styles and stubborn things.",
                ),
                io.Float.Input(
                    "reach",
                    default=1.0,
                    min=0.1,
                    max=5.0,
                    step=0.1,
                    tooltip="How far from the concept realera erases; 1 reaches its farthest other name or sentence. "
                    "Start with 1.",
                ),
                io.Float.Input(
                    "threshold",
                    default=0.1,
                    min=1e-6,
                    max=100.0,
                    step=0.01,
                    round=0.000001,
                    tooltip="null-space and speed change a direction only if preserved prompts use it less than this, "
                    "relative to the empty prompt. Higher erases more and preserves less. Start with 0.1. "
                    "double-projections takes 15 times this, shared by the concepts, and only if preserved prompts "
                    "use more than half of all directions.",
                ),
            ],
            outputs=[EraseOptions.Output("erase_options", display_name="options", tooltip="For Solve Erasure.")],
        )

    @classmethod
    def execute(
        cls, ridge: float, keep: float, epochs: int, regeneration: float, reach: float, threshold: float
    ) -> io.NodeOutput:
        return io.NodeOutput(
            SolverSettings(
                ridge=ridge or None,
                preserve_weight=keep or None,
                epochs=epochs,
                regeneration=regeneration,
                reach=reach,
                threshold=threshold,
            )
        )


class ConceptsSolveErasure(io.ComfyNode):
    """Solves an edit."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptsSolveErasure",
            display_name="Solve Erasure",
            category=CATEGORY,
            description=f"Finds in seconds how a model must change to no longer draw the listed concepts. {PROMISE}",
            search_aliases=["unlearn", "UCE", "RECE", "RealEra", "SPEED", "Double Projections", "concept erasure"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model to edit, with the LoRAs it is used with. It is not changed."
                ),
                io.Clip.Input("clip", tooltip="Its text encoder, with the CLIP skip it is used with."),
                EraseList.Input("concepts", tooltip="The concepts to erase, from Erase Concept."),
                io.Combo.Input(
                    "solver",
                    options=list(SOLVERS),
                    default="uce",
                    tooltip="uce: one solve. rece: also erases what would bring the concept back. rece-sequential: "
                    "in the published order, which forgets the first edit. rece-published: on the published rows too. "
                    "realera: also erases the neighbourhood. "
                    "null-space: for many concepts. double-projections: for several concepts, and moves no preserved "
                    "token. speed: null-space, where only prompts count that would suffer. Start with uce.",
                ),
                io.Combo.Input(
                    "projections",
                    options=list(PROJECTIONS),
                    default="keys and values",
                    tooltip="Which weights change. 'values' changes the layout less and erases less. Start with keys "
                    "and values.",
                ),
                io.Boolean.Input(
                    "pooled",
                    default=False,
                    tooltip="SDXL, Flux.1, SD 3: also edits the pooled embedding, which sets the style of the whole "
                    "picture. Start with off for things, on for styles.",
                ),
                io.Int.Input(
                    "rank",
                    default=-1,
                    min=-1,
                    max=4096,
                    tooltip="Largest rank of the edit, which sets the size of its LoRA. -1 drops what hardly matters "
                    "(leaves at most 32), 0 keeps all. Start with -1.",
                ),
                PreserveList.Input("kept", optional=True, tooltip="The prompts to preserve, from Preserve Concepts."),
                EraseOptions.Input(
                    "options", optional=True, tooltip="From Erase Options; leave empty for the solver's own numbers."
                ),
            ],
            outputs=[
                Edits.Output(
                    "edit", display_name="edit", tooltip="For Apply Erasure, Save Edit, Save Erasure as LoRA."
                ),
                io.String.Output("report", display_name="report", tooltip="What it does, in numbers."),
                io.Image.Output(
                    "picture",
                    display_name="report picture",
                    tooltip="Bars: what is left of each concept, how far preserved prompts move. Short is good.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        clip: CLIP,
        concepts: Erased,
        solver: str,
        projections: str,
        pooled: bool,
        rank: int,
        kept: Preserved | None = None,
        options: SolverSettings | None = None,
    ) -> io.NodeOutput:
        check_choice(SOLVERS, solver, "solver")  # before any prompt is encoded
        targets = chosen(PROJECTIONS, projections, "choice of projections")
        request = SolveRequest(solver, options or SolverSettings(), targets, pooled=pooled, rank=rank)
        edit = solve_erasure(model, clip, concepts, kept, request)
        report, picture = report_text(edit.report, edit.spec), report_picture(edit.report)
        return io.NodeOutput(edit, report, picture, ui=report_preview(report, picture, cls))


NODES: tuple[type[io.ComfyNode], ...] = (ConceptsSolveErasure, ConceptsEraseOptions)
