"""Anagrams: how the readings are combined."""

from __future__ import annotations

from dataclasses import replace

from comfy_api.latest import io

from ...host.schema import schema
from ...methods.anagram.balance import BALANCES
from ...methods.anagram.combine import AVERAGING, MULTI_TASK_FAST, MULTI_TASK_FULL, Combination
from ...methods.anagram.overlap import AntiSegregation
from ...methods.anagram.rectify import GAINS
from ...methods.anagram.schedule import EXAMPLE, schedule_from
from ...methods.choices import chosen
from ..wires import AnagramOptions
from .views import CATEGORY

PRESETS = {
    "averaging": AVERAGING,
    "multi-task (fast, no gradient)": MULTI_TASK_FAST,
    "custom": None,
    "multi-task (full)": MULTI_TASK_FULL,
}
EDITS = {"auto": None, "latent": True, "prediction": False}


def _rectification_inputs() -> list[io.Input]:
    """Its form, its strength, and its window."""
    return [
        io.Combo.Input(
            "rectification", options=["off", *GAINS], default="match",
            tooltip="Gives back the power that averaging takes from the noise. 'match' restores what the views have "
            "on average; 'unit' restores unit variance, as the paper. Start with match.",
        ),
        io.Float.Input(
            "strength", default=1.0, min=0.0, max=1.0, step=0.05,
            tooltip="How much of the rectification is applied; 0 is off. Start with 1.0.",
        ),
        io.Float.Input(
            "start_percent", default=0.05, min=0.0, max=1.0, step=0.01,
            tooltip="From where in the sampling the rectification works. Start with 0.05.",
        ),
        io.Float.Input(
            "end_percent", default=0.92, min=0.0, max=1.0, step=0.01,
            tooltip="Up to where in the sampling the rectification works; the last steps only sharpen. Start with 0.92.",
        ),
    ]  # fmt: skip


class ConceptsAnagramOptions(io.ComfyNode):
    """How the views are combined."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptsAnagramOptions",
            display_name="Anagram Options",
            category=CATEGORY,
            description="How the answers of the views become one picture: remedies for one reading winning over the "
            "others, and for the contrast that averaging takes away.",
            search_aliases=["visual anagram", "variance rectification", "balance"],
            inputs=[
                io.Combo.Input(
                    "preset", options=list(PRESETS), default="multi-task (fast, no gradient)",
                    tooltip="'averaging' is the plain mean; 'multi-task (fast, no gradient)' adds variance rectification and a contrast of 0.5; "
                    "'multi-task (full)' also pulls the concepts onto the same place, by gradients; 'custom' reads the widgets "
                    "below, which the others ignore. Start with multi-task (fast, no gradient).",
                ),
                io.Combo.Input(
                    "balance", options=list(BALANCES), default="manual",
                    tooltip="'manual' takes each view's own weight; 'prioritise first' gives the last fifth of the steps to "
                    "the first view; 'alternate' lets one view a step count; 'guidance norm' raises the view whose prompt is "
                    "less satisfied (experimental). Start with manual.",
                ),
                *_rectification_inputs(),
            ],
            outputs=[AnagramOptions.Output("anagram_options", display_name="options", tooltip="For Anagram Guider.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, preset, balance, rectification, strength, start_percent, end_percent) -> io.NodeOutput:
        custom = Combination(balance, rectification, strength, start_percent, end_percent)
        return io.NodeOutput(chosen(PRESETS, preset, "preset") or custom)


class ConceptsAnagramRectification(io.ComfyNode):
    """What averaging takes from the noise, given back."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        form, share, *window = _rectification_inputs()
        return schema(
            node_id="ConceptsAnagramRectification",
            display_name="Anagram Rectification",
            category=CATEGORY,
            description="Cures the dullness that averaging views brings: the noise of their mean is made as strong as that of "
            "each of them, whatever the other options are, and not stronger than a bound. Costs nothing.",
            search_aliases=["visual anagram", "variance rectification", "washed out"],
            inputs=[
                form,
                share,
                io.Float.Input(
                    "largest", default=0.0, min=0.0, max=10.0, step=0.05,
                    tooltip="By how much the noise is multiplied at most. 0 takes the root of the number of views, 1.41 for two, "
                    "which views need that share nothing; lower it, 1.1 say, where the picture gets too harsh. Start with 0.",
                ),
                *window,
                AnagramOptions.Input("options", optional=True, tooltip="The other options; empty is plain averaging."),
            ],
            outputs=[AnagramOptions.Output("anagram_options", display_name="options", tooltip="For Anagram Guider.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, rectification, strength, largest, start_percent, end_percent, options=None) -> io.NodeOutput:
        given = {"strength": strength, "start": start_percent, "end": end_percent, "largest": largest}
        return io.NodeOutput(replace(options or AVERAGING, rectification=rectification, **given))


class ConceptsAnagramSchedule(io.ComfyNode):
    """Weights that change in the course of the sampling."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptsAnagramSchedule",
            display_name="Anagram Weight Schedule",
            category=CATEGORY,
            description="Lets the views count differently early and late: the first steps settle what is where, the last ones "
            "only sharpen. Costs nothing.",
            search_aliases=["visual anagram", "balance", "prioritise", "ramp"],
            inputs=[
                io.String.Input(
                    "schedule", multiline=True, default=EXAMPLE,
                    tooltip="A line for each moment: where in the sampling (0 to 1), a colon, and the weight of every view in "
                    "order. Between the lines weights go straight from one to the next; two lines of one moment jump. Start "
                    "with '0: 1, 1', '0.8: 1, 1', '0.8: 1, 0': the last fifth is the first view's.",
                ),
                AnagramOptions.Input("options", optional=True, tooltip="The other options; empty is plain averaging."),
            ],
            outputs=[AnagramOptions.Output("anagram_options", display_name="options", tooltip="For Anagram Guider.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, schedule, options=None) -> io.NodeOutput:
        return io.NodeOutput(replace(options or AVERAGING, schedule=schedule_from(schedule)))


class ConceptsAnagramContrast(io.ComfyNode):
    """Each view away from what the others show."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptsAnagramContrast",
            display_name="Anagram Contrast",
            category=CATEGORY,
            description="Cures anagrams in which one reading wins, or both melt into a third thing: in each view, what the other "
            "views show counts as something not to show. Costs two rows more for every pair of views and step, in the same "
            "batch.",
            search_aliases=["visual anagram", "domination", "negative prompt"],
            inputs=[
                io.Float.Input(
                    "contrast", default=0.5, min=0.0, max=5.0, step=0.05,
                    tooltip="How much the other readings count against each view's negative, which counts 1; 0 is off. More "
                    "keeps the readings apart and makes the picture harsher. Start with 0.5.",
                ),
                AnagramOptions.Input("options", optional=True, tooltip="The other options; empty is plain averaging."),
            ],
            outputs=[AnagramOptions.Output("anagram_options", display_name="options", tooltip="For Anagram Guider.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, contrast, options=None) -> io.NodeOutput:
        return io.NodeOutput(replace(options or AVERAGING, contrast=contrast))


class ConceptsAnagramAntiSegregation(io.ComfyNode):
    """The gradient step that pulls the concepts together."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptsAnagramAntiSegregation",
            display_name="Anagram Anti-Segregation",
            category=CATEGORY,
            description="Cures anagrams in which each reading is painted in a corner of its own: before each step, the places "
            "the concepts' words look at are pulled onto each other. Every view's prompt must come from Encode Concept Phrase.",
            search_aliases=["visual anagram", "attend and excite", "overlap"],
            inputs=[
                AnagramOptions.Input("options", optional=True, tooltip="The other options; empty is plain averaging."),
                io.Float.Input(
                    "strength", default=0.03, min=0.0, max=0.5, step=0.005, round=0.001,
                    tooltip="How far each step goes, of the noisy picture's own size; 0 is off. Start with 0.03.",
                ),
                io.Int.Input(
                    "iterations", default=1, min=1, max=10,
                    tooltip="How many steps at each noise level; each costs part of a model pass of a view, and its gradient. Start with 1.",
                ),
                io.Float.Input(
                    "start_percent", default=0.0, min=0.0, max=1.0, step=0.01,
                    tooltip="From where in the sampling it works. Start with 0.",
                ),
                io.Float.Input(
                    "end_percent", default=0.7, min=0.0, max=1.0, step=0.01,
                    tooltip="Up to where in the sampling it works; later the places are settled. Start with 0.7.",
                ),
                io.Combo.Input(
                    "edit", options=list(EDITS), default="auto", optional=True,
                    tooltip="'latent' writes each step into the picture the sampler goes on with; 'prediction' shows it to the "
                    "model alone, the same in every sampler and weaker in most; 'auto' is 'latent' where the sampler keeps "
                    "it. Start with auto.",
                ),
            ],
            outputs=[AnagramOptions.Output("anagram_options", display_name="options", tooltip="For Anagram Guider.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, strength, iterations, start_percent, end_percent, options=None, edit="auto") -> io.NodeOutput:
        together = AntiSegregation(strength, start_percent, end_percent, iterations, EDITS[edit])
        return io.NodeOutput(replace(options or AVERAGING, together=together))


NODES: tuple[type[io.ComfyNode], ...] = (
    ConceptsAnagramOptions,
    ConceptsAnagramSchedule,
    ConceptsAnagramContrast,
    ConceptsAnagramAntiSegregation,
    ConceptsAnagramRectification,
)
