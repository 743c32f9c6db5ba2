"""Erasure by training: slower than solving, and harder to get round."""

from __future__ import annotations

import torch

from ...host.erase.apply import apply_to_clip
from ...host.erase.solve import lists_without_weights
from ...host.erase.train import train_erasure
from ...host.schema import io, schema
from ...host.types import CLIP, VAE, ModelPatcher
from ...methods.choices import chosen
from ...methods.erase.edit import Edit
from ...methods.erase.report import report_text
from ...methods.erase.spec import Erased, Preserved
from ...methods.erase.trained import FEW_SHOT, METHODS
from ...methods.erase.trained.plan import TrainOptions, plan_of
from ..wires import Edits, EraseList, PreserveList, TrainingOptions
from .shared import CATEGORY, report_preview
from .training_widgets import latents, pictures_of, shared_outputs, shared_widgets, with_run

_START = "A trained edit to continue from. Its changes stay, and the training adds to them."
_OPTIONS = "From Training Options. Not connected: the method's own numbers."
_VAE = "Reads the pictures. Needed only with them."


class ConceptsTrainErasure(io.ComfyNode):
    """Trains an edit of the model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptsTrainErasure",
            display_name="Train Erasure",
            category=CATEGORY,
            description="Takes concepts out of a model by a few minutes of training: it learns to draw something else "
            "for their prompts. The edit is harder to get round than a solved one, and slower to make. It reduces the "
            "model's ability to draw them; it does not guarantee removal.",
            search_aliases=["unlearn", "ESD", "Co-Erasing", "DoCo", "RealEra", "All but One", "concept erasure"],
            inputs=[
                io.Model.Input("model", tooltip="The model to learn from. It is not changed, whatever happens."),
                io.Clip.Input("clip", tooltip="Its text encoder."),
                EraseList.Input("concepts", tooltip="What to erase, and what it becomes, from Erase Concept."),
                io.Combo.Input(
                    "method",
                    options=list(METHODS),
                    default="ESD",
                    tooltip="ESD: away from the concept; start with it. All but One: preserves everything "
                    "unconditional, and with an anchor the layout. Co-Erasing: also against pictures of it. RealEra: "
                    "also its neighbourhood. DoCo (heavy): against a discriminator, slow.",
                ),
                *shared_widgets(),
                PreserveList.Input(
                    "kept",
                    optional=True,
                    tooltip="What must not change, from Preserve Concepts. Ten to twenty neighbours make a clear "
                    "difference.",
                ),
                io.Image.Input(
                    "images",
                    optional=True,
                    tooltip="Pictures of the concept, for Co-Erasing. Without them the model draws its own.",
                ),
                io.Vae.Input("vae", optional=True, tooltip=_VAE),
                Edits.Input("start", optional=True, tooltip=_START),
                TrainingOptions.Input("options", optional=True, tooltip=_OPTIONS),
            ],
            outputs=[
                Edits.Output(
                    "edit", display_name="edit", tooltip="For Apply Erasure, Save Edit, Save Erasure as LoRA."
                ),
                *shared_outputs(),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        clip: CLIP,
        concepts: Erased,
        method: str,
        budget: str,
        seed: int,
        width: int,
        height: int,
        kept: Preserved | None = None,
        images: torch.Tensor | None = None,
        vae: VAE | None = None,
        start: Edit | None = None,
        options: TrainOptions | None = None,
    ) -> io.NodeOutput:
        recipe, options = chosen(METHODS, method, "method"), with_run(options, seed, (height, width), vae, start)
        plan = plan_of(recipe, budget, *lists_without_weights(concepts, kept), options)
        edit, trained = train_erasure(model, clip, plan, latents(vae, images, height, width))
        report, pictures = report_text(edit.report, edit.spec), pictures_of(trained, height, width)
        return io.NodeOutput(edit, report, *pictures, ui=report_preview(report, pictures[0], cls))


class ConceptsUnlearnInTextEncoder(io.ComfyNode):
    """Trains an edit of the text encoder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptsUnlearnInTextEncoder",
            display_name="Unlearn in Text Encoder",
            category=CATEGORY,
            description="Makes a text encoder forget what a concept looks like, from a handful of pictures of it, in "
            "about a minute. Every model that reads this CLIP forgets with it. It reduces the response to the "
            "concept; it does not guarantee removal.",
            search_aliases=["few-shot unlearning", "forget", "CLIP", "concept erasure"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="A model that reads this CLIP. It makes predictions and is not changed."
                ),
                io.Clip.Input("clip", tooltip="The text encoder, with its CLIP skip. It is not changed."),
                EraseList.Input("concepts", tooltip="What to erase, from Erase Concept."),
                *shared_widgets(),
                io.Image.Input(
                    "images",
                    optional=True,
                    tooltip="Pictures of the concept, four are enough. Without them the model draws its own.",
                ),
                io.Vae.Input("vae", optional=True, tooltip=_VAE),
                PreserveList.Input(
                    "kept",
                    optional=True,
                    tooltip="Prompts whose embeddings must not change. List many, they cost little.",
                ),
                TrainingOptions.Input("options", optional=True, tooltip=_OPTIONS),
                Edits.Input("start", optional=True, tooltip=_START),
            ],
            outputs=[
                io.Clip.Output("edited_clip", display_name="CLIP", tooltip="A clone that has forgotten the concept."),
                Edits.Output(
                    "edit", display_name="edit", tooltip="The same as an edit, for Save Edit and Save Erasure as LoRA."
                ),
                *shared_outputs(),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        clip: CLIP,
        concepts: Erased,
        budget: str,
        seed: int,
        width: int,
        height: int,
        images: torch.Tensor | None = None,
        vae: VAE | None = None,
        kept: Preserved | None = None,
        options: TrainOptions | None = None,
        start: Edit | None = None,
    ) -> io.NodeOutput:
        options = with_run(options, seed, (height, width), vae, start)
        plan = plan_of(FEW_SHOT, budget, *lists_without_weights(concepts, kept), options)
        edit, trained = train_erasure(model, clip, plan, latents(vae, images, height, width))
        report, pictures = report_text(edit.report, edit.spec), pictures_of(trained, height, width)
        return io.NodeOutput(
            apply_to_clip(clip, edit), edit, report, *pictures, ui=report_preview(report, pictures[0], cls)
        )


NODES: tuple[type[io.ComfyNode], ...] = (ConceptsTrainErasure, ConceptsUnlearnInTextEncoder)
