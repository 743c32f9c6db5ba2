"""Applying an erasure: to a model, or to prompts."""

from __future__ import annotations

from ...host.erase.apply import AUTOMATIC, DELIVERIES, apply_edit, apply_to_clip, change_conditioning
from ...host.schema import io, schema
from ...host.types import CLIP, Conditioning, ModelPatcher
from ...methods.erase.edit import Edit
from ..wires import Edits
from .shared import CATEGORY


class ConceptsApplyErasure(io.ComfyNode):
    """Applies an edit to a model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptsApplyErasure",
            display_name="Apply Erasure",
            category=CATEGORY,
            description="The model without the concepts. Loaded weights are never written: bypass the node or set the "
            "strength to 0, and the model is as before, bit for bit.",
            search_aliases=["unlearn", "UCE", "concept erasure"],
            inputs=[
                io.Model.Input("model", tooltip="The model; best the one the edit was solved on."),
                Edits.Input("edit", tooltip="From Solve Erasure or Load Edit."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=1.5,
                    step=0.05,
                    tooltip="1 is the edit as solved, 0 the plain model, above 1 a stronger edit. Start with 1.",
                ),
                io.Combo.Input(
                    "delivery",
                    options=list(DELIVERIES),
                    default=AUTOMATIC,
                    tooltip="weights: an exact low-rank patch. full weights: the same as a whole difference. text: "
                    "changes the text embedding instead, which fp8 weights and later LoRAs cannot spoil. Start with "
                    "automatic (text for fp8 and quantised models, else weights).",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="Only trained edits change the text encoder; otherwise it is passed on. Its CLIP skip must "
                    "be the edit's.",
                ),
            ],
            outputs=[
                io.Model.Output("edited_model", display_name="MODEL", tooltip="A clone with the edit."),
                io.Clip.Output(
                    "edited_clip",
                    display_name="CLIP",
                    tooltip="The text encoder, edited if the edit has a part for it.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls, model: ModelPatcher, edit: Edit, strength: float, delivery: str, clip: CLIP | None = None
    ) -> io.NodeOutput:
        check_strength(strength)
        edited_clip = None if clip is None else apply_to_clip(clip, edit, strength)
        return io.NodeOutput(apply_edit(model, edit, strength, delivery), edited_clip)


def check_strength(strength: float) -> None:
    """Refuses strengths outside the widget's range; a linked value can have any."""
    if not 0 <= strength <= 1.5:
        raise ValueError(f"The strength is {strength}, and an edit takes 0 to 1.5; start with 1.")


class ConceptsEraseFromConditioning(io.ComfyNode):
    """Applies an edit to prompts."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptsEraseFromConditioning",
            display_name="Erase from Conditioning",
            category=CATEGORY,
            description="Applies the edit to the prompt instead of the model and gives the same pictures. For models "
            "whose weights cannot be patched, and for ControlNets that read the prompt. Use one node for the positive "
            "and one for the negative prompt.",
            search_aliases=["unlearn", "UCE", "concept erasure", "GGUF"],
            inputs=[
                io.Conditioning.Input("conditioning", tooltip="The encoded prompt."),
                Edits.Input("edit", tooltip="From Solve Erasure or Load Edit."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=1.5,
                    step=0.05,
                    tooltip="1 is the edit as solved, 0 the plain prompt. Start with 1.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    "edited", display_name="CONDITIONING", tooltip="The prompt without the concepts."
                )
            ],
        )

    @classmethod
    def execute(cls, conditioning: Conditioning, edit: Edit, strength: float) -> io.NodeOutput:
        check_strength(strength)
        return io.NodeOutput(change_conditioning(conditioning, edit, strength))


NODES: tuple[type[io.ComfyNode], ...] = (ConceptsApplyErasure, ConceptsEraseFromConditioning)
