"""Erasure by training: slower than solving, and further-reaching."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from ...host.engine.vae import cell_side
from ...host.erase.apply import apply_to_clip
from ...host.erase.train import Choices, Request, latents_of, train_erasure, unlearn_in_text
from ...host.schema import schema
from ...methods.choices import chosen
from ...methods.erase.curve import curve_of
from ...methods.erase.edit import Edit
from ...methods.erase.report import report_text
from ...methods.erase.trained import BUDGETS, METHODS
from ..wires import Edits, EraseList, PreserveList, TrainingOptions
from .shared import CATEGORY, report_preview

CELL = 8  # px a latent cell covers where no VAE says otherwise: SD 1, SD 2, SDXL


def _seed_widget() -> io.Int.Input:
    return io.Int.Input(
        "seed", default=0, min=0, max=2**31 - 1,
        tooltip="The same seed on the same machine gives the same edit, to the last bit. Start with 0.",
    )  # fmt: skip


def _budget_widget() -> io.Combo.Input:
    return io.Combo.Input(
        "budget", options=list(BUDGETS), default="standard",
        tooltip="How long to train: draft to see whether it goes the right way, standard to use, thorough for stubborn "
        "concepts (four times as long). Start with draft.",
    )  # fmt: skip


def _size_widgets() -> list[io.Int.Input]:
    return [
        io.Int.Input(
            "width", default=512, min=64, max=4096, step=8,
            tooltip="Width of the pictures it is trained on, in pixels; smaller is faster. Start with 512 for SD 1.5, 768 for "
            "SDXL (the demo model: 128).",
        ),
        io.Int.Input(
            "height", default=512, min=64, max=4096, step=8,
            tooltip="Height of the pictures it is trained on, in pixels. Start with the width.",
        ),
    ]  # fmt: skip


def _outputs() -> list[io.Output]:
    return [
        io.String.Output("report", display_name="report", tooltip="How it went: why it ended, and both losses."),
        io.Image.Output(
            "loss_curve", display_name="loss curve",
            tooltip="What is left to erase (red) and how far the rest has moved (blue). Red should fall, blue stay below it.",
        ),
        io.Image.Output(
            "previews", display_name="previews", tooltip="What the concept's prompt drew along the way, coarse, first to last."
        ),
    ]  # fmt: skip


def _pictures(trained, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss curve, and the previews at the size of the canvas."""
    curve = curve_of(trained.outcome.erase, trained.outcome.preserve)
    if trained.previews is None:
        return curve, torch.zeros(1, height, width, 3)
    shown = torch.nn.functional.interpolate(trained.previews.movedim(-1, 1), (height, width), mode="nearest")
    return curve, shown.movedim(1, -1)


def _latents(vae, images, height: int, width: int) -> torch.Tensor | None:
    if images is None:
        return None
    if vae is None:
        raise ValueError("Pictures are connected but no VAE to read them with; connect the checkpoint's VAE.")
    return latents_of(vae, images, height, width)


def _cells(vae, height: int, width: int) -> tuple[int, int]:
    side = CELL if vae is None else cell_side(vae)
    return height // side, width // side


class ConceptsTrainErasure(io.ComfyNode):
    """Trains an edit of the model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptsTrainErasure",
            display_name="Train Erasure",
            category=CATEGORY,
            description="Takes concepts out of a model by a few minutes of training: it learns to draw something else where "
            "they are asked for. Harder to get round than a solved edit, and slower to make. It reduces the "
            "model's ability to draw them; it does not guarantee removal.",
            search_aliases=["unlearn", "ESD", "Co-Erasing", "DoCo", "RealEra", "All but One", "concept erasure"],
            inputs=[
                io.Model.Input("model", tooltip="The model to learn from. It is not changed, whatever happens."),
                io.Clip.Input("clip", tooltip="Its text encoder."),
                EraseList.Input("concepts", tooltip="What goes, and what it becomes, from Erase Concept."),
                io.Combo.Input(
                    "method", options=list(METHODS), default="ESD",
                    tooltip="ESD: away from the concept; the one to start with. All but One: keeps everything unconditional, and "
                    "with an anchor the layout. Co-Erasing: also against pictures of it. RealEra: also its neighbourhood. DoCo "
                    "(heavy): against a discriminator, slow.",
                ),
                _budget_widget(),
                _seed_widget(),
                *_size_widgets(),
                PreserveList.Input(
                    "kept", optional=True,
                    tooltip="What must go on as before, from Preserve Concepts. Ten to twenty neighbours make a clear difference.",
                ),
                io.Image.Input(
                    "images", optional=True,
                    tooltip="Pictures of the concept, for Co-Erasing; without them the model draws its own.",
                ),
                io.Vae.Input("vae", optional=True, tooltip="Reads the pictures; needed only with them."),
                Edits.Input("start", optional=True, tooltip="A trained edit to go on from; its changes are kept and added to."),
                TrainingOptions.Input("options", optional=True, tooltip="From Training Options; empty is the method's own numbers."),
            ],
            outputs=[
                Edits.Output("edit", display_name="edit", tooltip="For Apply Erasure, Save Edit, Save Erasure as LoRA."),
                *_outputs(),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model, clip, concepts, method, budget, seed, width, height, kept=None, images=None, vae=None, start=None,
        options=None,
    ) -> io.NodeOutput:  # fmt: skip
        chosen(BUDGETS, budget, "budget")
        request = Request(method, budget, seed, _cells(vae, height, width), options or Choices(), start or Edit())
        latents = _latents(vae, images, height, width)
        edit, trained = train_erasure(model, clip, concepts, kept, request, latents)
        report = report_text(edit.report, edit.spec)
        pictures = _pictures(trained, height, width)
        return io.NodeOutput(edit, report, *pictures, ui=report_preview(report, pictures[0], cls))


class ConceptsUnlearnInTextEncoder(io.ComfyNode):
    """Trains an edit of the text encoder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptsUnlearnInTextEncoder",
            display_name="Unlearn in Text Encoder",
            category=CATEGORY,
            description="Makes a text encoder forget what a concept looks like, from a handful of pictures of it, in about a "
            "minute. Every model that reads this CLIP forgets with it. It reduces the response to the concept; it does not "
            "guarantee removal.",
            search_aliases=["few-shot unlearning", "forget", "CLIP", "concept erasure"],
            inputs=[
                io.Model.Input("model", tooltip="A model that reads this CLIP; it is only asked, never changed."),
                io.Clip.Input("clip", tooltip="The text encoder, with the CLIP skip it is used with. It is not changed."),
                EraseList.Input("concepts", tooltip="What goes, from Erase Concept."),
                _budget_widget(),
                _seed_widget(),
                *_size_widgets(),
                io.Image.Input(
                    "images", optional=True,
                    tooltip="Pictures of the concept, four are enough; without them the model draws its own.",
                ),
                io.Vae.Input("vae", optional=True, tooltip="Reads the pictures; needed only with them."),
                PreserveList.Input("kept", optional=True, tooltip="Prompts whose embeddings are held; list many, they cost little."),
                TrainingOptions.Input("options", optional=True, tooltip="From Training Options; empty is the method's own numbers."),
                Edits.Input("start", optional=True, tooltip="A trained edit to go on from; its changes are kept and added to."),
            ],
            outputs=[
                io.Clip.Output("edited_clip", display_name="CLIP", tooltip="A clone that has forgotten the concept."),
                Edits.Output("edit", display_name="edit", tooltip="The same as an edit, for Save Edit and Save Erasure as LoRA."),
                *_outputs(),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model, clip, concepts, budget, seed, width, height, images=None, vae=None, kept=None, options=None,
        start=None,
    ) -> io.NodeOutput:  # fmt: skip
        chosen(BUDGETS, budget, "budget")
        request = Request("few-shot", budget, seed, _cells(vae, height, width), options or Choices(), start or Edit())
        latents = _latents(vae, images, height, width)
        edit, trained = unlearn_in_text(model, clip, concepts, kept, request, latents)
        report = report_text(edit.report, edit.spec)
        pictures = _pictures(trained, height, width)
        return io.NodeOutput(
            apply_to_clip(clip, edit), edit, report, *pictures, ui=report_preview(report, pictures[0], cls)
        )


NODES: tuple[type[io.ComfyNode], ...] = (ConceptsTrainErasure, ConceptsUnlearnInTextEncoder)
