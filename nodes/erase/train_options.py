"""Erasure by training: the numbers behind it."""

from __future__ import annotations

from dataclasses import replace

from comfy_api.latest import io

from ...host.erase.train import Choices
from ...host.lora.adapters import PLACES
from ...host.schema import schema
from ...methods.choices import chosen
from ..wires import TrainingOptions
from .shared import CATEGORY

ON_CANCEL = {"keep what is learned": True, "stop the run": False}


class ConceptsTrainOptions(io.ComfyNode):
    """What is trained, and how hard."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptsTrainOptions",
            display_name="Training Options",
            category=CATEGORY,
            description="The numbers behind Train Erasure, for those who want to turn them.",
            search_aliases=["ESD", "learning rate", "rank", "eta"],
            inputs=[
                io.Int.Input(
                    "iterations", default=0, min=0, max=100000,
                    tooltip="How often it learns; 0 is the budget's own number. Start with 0.",
                ),
                io.Float.Input(
                    "rate", default=0.0, min=0.0, max=1.0, step=0.0001, round=0.0000001,
                    tooltip="Learning rate. 0 is the method's own, found on the demo model; large models take less: start with "
                    "0.0002 for SD 1.5 and SDXL.",
                ),
                io.Int.Input(
                    "rank", default=16, min=1, max=256,
                    tooltip="Rank of the change in every layer, which is the size of its LoRA. Start with 16.",
                ),
                io.Combo.Input(
                    "layers", options=list(PLACES), default="cross k/v",
                    tooltip="Which layers of the model learn. 'cross k/v': how words are read, best for names and styles. "
                    "'outside cross': what things look like, whatever asks for them. Start with cross k/v. The text encoder "
                    "has its own.",
                ),
                io.Float.Input(
                    "eta", default=-1.0, min=-1.0, max=10.0, step=0.1,
                    tooltip="How far beyond the anchor to push, as the papers count: 0 ends at the anchor (without one: at "
                    "nothing), 1 is as far on the other side. -1 is the method's own (All but One 0.5, or 0 without an anchor, else 1). Start with -1.",
                ),
                io.Float.Input(
                    "keep", default=-1.0, min=-1.0, max=1000.0, step=0.1,
                    tooltip="What drift of the preserved prompts counts against erasing. Raise it when they suffer. -1 is the "
                    "method's own (3 for ESD, Co-Erasing and RealEra, else 1). Start with -1.",
                ),
                TrainingOptions.Input("train_options", optional=True, tooltip="From Training States, to set both."),
            ],
            outputs=[TrainingOptions.Output("options", display_name="options", tooltip="For Train Erasure.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, iterations, rate, rank, layers, eta, keep, train_options=None) -> io.NodeOutput:
        chosen(PLACES, layers, "choice of layers")
        before = train_options or Choices()
        return io.NodeOutput(
            replace(before, iterations=iterations, rate=rate, rank=rank, layers=layers, eta=eta, keep=keep)
        )


class ConceptsTrainStates(io.ComfyNode):
    """What it is trained at."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptsTrainStates",
            display_name="Training States",
            category=CATEGORY,
            description="Which half-finished pictures Train Erasure learns at, how many at once, what is shown, and what a "
            "cancel does.",
            search_aliases=["trajectory", "batch", "preview"],
            inputs=[
                io.Int.Input(
                    "trajectories", default=0, min=0, max=512,
                    tooltip="How many pictures of the concept are sampled before the training, every step of them kept. 0 is "
                    "the budget's own number (8, 12, 24). Start with 0.",
                ),
                io.Int.Input(
                    "steps", default=0, min=0, max=100,
                    tooltip="Sampling steps of each; 0 is the budget's own number (10, 12, 20). Start with 0.",
                ),
                io.Float.Input(
                    "cfg", default=3.0, min=1.0, max=30.0, step=0.1,
                    tooltip="Guidance they are sampled with. Start with 3 (2 for SDXL).",
                ),
                io.Int.Input(
                    "batch", default=4, min=1, max=64,
                    tooltip="States of the concept an iteration, and as many that must not move. Lower it when memory is short. "
                    "Start with 4 (1 for SDXL on 16 GB).",
                ),
                io.Int.Input(
                    "preview_every", default=25, min=0, max=10000,
                    tooltip="After how many iterations a picture is drawn to look at; 0 never. Start with 25.",
                ),
                io.Combo.Input(
                    "on_cancel", options=list(ON_CANCEL), default="keep what is learned",
                    tooltip="What Cancel does while it trains: 'keep what is learned' ends the training there and goes on with the "
                    "best edit so far, 'stop the run' ends everything.",
                ),
                TrainingOptions.Input("train_options", optional=True, tooltip="From Training Options, to set both."),
            ],
            outputs=[TrainingOptions.Output("options", display_name="options", tooltip="For Train Erasure.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, trajectories, steps, cfg, batch, preview_every, on_cancel, train_options=None) -> io.NodeOutput:
        return io.NodeOutput(
            replace(
                train_options or Choices(), trajectories=trajectories, steps=steps, cfg=cfg, batch=batch,
                preview_every=preview_every, keep_on_cancel=chosen(ON_CANCEL, on_cancel, "answer to a cancel"),
            )
        )  # fmt: skip


class ConceptsTrainEnd(io.ComfyNode):
    """When it ends early."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptsTrainEnd",
            display_name="Training End",
            category=CATEGORY,
            description="When Train Erasure and Unlearn in Text Encoder end before all their iterations are done: enough is "
            "erased, or what must be kept has moved too far.",
            search_aliases=["early stop", "preserve budget", "convergence"],
            inputs=[
                io.Float.Input(
                    "erased", default=-1.0, min=-1.0, max=1.0, step=0.01,
                    tooltip="Ends when what is left to erase, smoothed, is below this share of what it was at first. 0 never does, "
                    "-1 is the method's own (0.02 in Unlearn in Text Encoder, else never). Start with -1.",
                ),
                io.Float.Input(
                    "moved", default=0.0, min=0.0, max=100.0, step=0.01,
                    tooltip="Ends, with the last edit that was still within it, when the preserved prompts have moved by more than "
                    "this share of the first erase loss. 0 never does. Start with 0; 0.05 where neighbours suffer.",
                ),
                TrainingOptions.Input("train_options", optional=True, tooltip="From Training Options or Training States, to set all."),
            ],
            outputs=[TrainingOptions.Output("options", display_name="options", tooltip="For Train Erasure.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, erased, moved, train_options=None) -> io.NodeOutput:
        return io.NodeOutput(replace(train_options or Choices(), enough=erased, budget=moved))


NODES: tuple[type[io.ComfyNode], ...] = (ConceptsTrainOptions, ConceptsTrainStates, ConceptsTrainEnd)
