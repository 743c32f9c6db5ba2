"""Erasure by training: the numbers behind it."""

from __future__ import annotations

from dataclasses import replace

from ...host.lora.adapters import TARGET_MODULES
from ...host.schema import io, schema
from ...methods.choices import check_choice, chosen
from ...methods.erase.trained.plan import TrainOptions
from ..wires import TrainingOptions
from .shared import CATEGORY

ON_CANCEL = {"keep what is learned": True, "stop the run": False}


def _options_output() -> io.Output:
    return TrainingOptions.Output("options", display_name="options", tooltip="For Train Erasure.")


def _unless_negative(value: float) -> float | None:
    """None for a number below zero, which means the method's own."""
    return None if value < 0 else value


class ConceptsTrainOptions(io.ComfyNode):
    """What is trained, and how hard."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptsTrainOptions",
            display_name="Training Options",
            category=CATEGORY,
            description="The numbers behind Train Erasure, for those who want to change them.",
            search_aliases=["ESD", "learning rate", "rank", "eta"],
            inputs=[
                io.Int.Input(
                    "iterations",
                    default=0,
                    min=0,
                    max=100000,
                    tooltip="Number of training steps; 0 uses the budget's own number. Start with 0.",
                ),
                io.Float.Input(
                    "rate",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.0001,
                    round=0.0000001,
                    tooltip="Learning rate; 0 uses the method's own, found on the demo model. Large models need less: "
                    "start with 0.0002 for SD 1.5 and SDXL.",
                ),
                io.Int.Input(
                    "rank",
                    default=16,
                    min=1,
                    max=256,
                    tooltip="Rank of the change in every layer. It sets the size of the saved LoRA. Start with 16.",
                ),
                io.Combo.Input(
                    "layers",
                    options=list(TARGET_MODULES),
                    default="cross k/v",
                    tooltip="Which layers of the model learn. 'cross k/v': how words are read, best for names and "
                    "styles. 'outside cross': what things look like, whatever the prompt. Start with cross k/v. The "
                    "text encoder has its own layers.",
                ),
                io.Float.Input(
                    "eta",
                    default=-1.0,
                    min=-1.0,
                    max=10.0,
                    step=0.1,
                    tooltip="How far to push beyond the anchor, as the papers count: 0 ends at the anchor (without "
                    "one: at nothing), 1 is as far on the other side. -1 uses the method's own (All but One 0.5, or 0 "
                    "without an anchor, else 1). Start with -1.",
                ),
                io.Float.Input(
                    "keep",
                    default=-1.0,
                    min=-1.0,
                    max=1000.0,
                    step=0.1,
                    tooltip="Weight of the preserved prompts' drift against erasing. Raise it if they suffer. -1 uses "
                    "the method's own (3 for ESD, Co-Erasing and RealEra, else 1). Start with -1.",
                ),
                TrainingOptions.Input("train_options", optional=True, tooltip="From Training States, to set both."),
            ],
            outputs=[_options_output()],
        )

    @classmethod
    def execute(
        cls,
        iterations: int,
        rate: float,
        rank: int,
        layers: str,
        eta: float,
        keep: float,
        train_options: TrainOptions | None = None,
    ) -> io.NodeOutput:
        check_choice(TARGET_MODULES, layers, "choice of layers")
        return io.NodeOutput(
            replace(
                train_options or TrainOptions(),
                iterations=iterations or None,
                rate=rate or None,
                rank=rank,
                target_modules=layers,
                eta=_unless_negative(eta),
                preserve_weight=_unless_negative(keep),
            )
        )


class ConceptsTrainStates(io.ComfyNode):
    """What it is trained at."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptsTrainStates",
            display_name="Training States",
            category=CATEGORY,
            description="Which unfinished pictures Train Erasure learns from, how many at once, what is shown, and "
            "what a cancel does.",
            search_aliases=["trajectory", "batch", "preview"],
            inputs=[
                io.Int.Input(
                    "trajectories",
                    default=0,
                    min=0,
                    max=512,
                    tooltip="How many pictures of the concept are sampled before the training, with every step kept. 0 "
                    "uses the budget's own number (8, 12, 24). Start with 0.",
                ),
                io.Int.Input(
                    "steps",
                    default=0,
                    min=0,
                    max=100,
                    tooltip="Sampling steps of each; 0 uses the budget's own number (10, 12, 20). Start with 0.",
                ),
                io.Float.Input(
                    "cfg",
                    default=3.0,
                    min=1.0,
                    max=30.0,
                    step=0.1,
                    tooltip="Guidance they are sampled with. Start with 3 (2 for SDXL).",
                ),
                io.Int.Input(
                    "batch",
                    default=4,
                    min=1,
                    max=64,
                    tooltip="States of the concept per training step, and as many that must not move. Lower it when "
                    "memory is short. Start with 4 (1 for SDXL on 16 GB).",
                ),
                io.Int.Input(
                    "preview_every",
                    default=25,
                    min=0,
                    max=10000,
                    tooltip="Draw a preview picture after this many training steps; 0 draws none. Start with 25.",
                ),
                io.Combo.Input(
                    "on_cancel",
                    options=list(ON_CANCEL),
                    default="keep what is learned",
                    tooltip="What Cancel does during the training. 'keep what is learned' ends the training and "
                    "continues with the best edit so far; 'stop the run' ends everything.",
                ),
                TrainingOptions.Input("train_options", optional=True, tooltip="From Training Options, to set both."),
            ],
            outputs=[_options_output()],
        )

    @classmethod
    def execute(
        cls,
        trajectories: int,
        steps: int,
        cfg: float,
        batch: int,
        preview_every: int,
        on_cancel: str,
        train_options: TrainOptions | None = None,
    ) -> io.NodeOutput:
        return io.NodeOutput(
            replace(
                train_options or TrainOptions(),
                trajectories=trajectories or None,
                steps=steps or None,
                cfg=cfg,
                batch=batch,
                preview_every=preview_every,
                keep_on_cancel=chosen(ON_CANCEL, on_cancel, "answer to a cancel"),
            )
        )


class ConceptsTrainEnd(io.ComfyNode):
    """When it ends early."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptsTrainEnd",
            display_name="Training End",
            category=CATEGORY,
            description="When Train Erasure and Unlearn in Text Encoder end before all their training steps are done: "
            "enough is erased, or what must be preserved has moved too far.",
            search_aliases=["early stop", "preserve budget", "convergence"],
            inputs=[
                io.Float.Input(
                    "erased",
                    default=-1.0,
                    min=-1.0,
                    max=1.0,
                    step=0.01,
                    tooltip="End when what is left to erase, smoothed, is below this share of its first value. 0 never "
                    "ends early, -1 uses the method's own (0.02 in Unlearn in Text Encoder, else 0). Start with -1.",
                ),
                io.Float.Input(
                    "moved",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.01,
                    tooltip="End when the preserved prompts have moved by more than this share of the first erase "
                    "loss, with the last edit within it. 0 never ends early. Start with 0; 0.05 if neighbours suffer.",
                ),
                TrainingOptions.Input(
                    "train_options", optional=True, tooltip="From Training Options or Training States, to set all."
                ),
            ],
            outputs=[_options_output()],
        )

    @classmethod
    def execute(cls, erased: float, moved: float, train_options: TrainOptions | None = None) -> io.NodeOutput:
        return io.NodeOutput(
            replace(train_options or TrainOptions(), erased_below=_unless_negative(erased), max_drift=moved or None)
        )


NODES: tuple[type[io.ComfyNode], ...] = (ConceptsTrainOptions, ConceptsTrainStates, ConceptsTrainEnd)
