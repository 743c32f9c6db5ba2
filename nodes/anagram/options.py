"""Anagrams: how the readings are combined."""

from __future__ import annotations

from dataclasses import replace

from ...host.schema import io, schema
from ...methods.anagram.balance import BALANCES
from ...methods.anagram.combine import AVERAGING, PRESETS, Combination
from ...methods.anagram.overlap import AntiSegregation
from ...methods.anagram.rectify import GAINS
from ...methods.anagram.schedule import EXAMPLE, schedule_from
from ...methods.choices import chosen
from ..wires import AnagramOptions
from .views import CATEGORY

EDITS = {"auto": None, "latent": True, "prediction": False}


def _window(start: float, end: float, what: str, why: str) -> list[io.Input]:
    """From where to where something acts."""
    limits = {"min": 0.0, "max": 1.0, "step": 0.01}
    begins, ends = f"Where in the sampling {what} begins.", f"Where in the sampling {what} ends; {why}."
    return [
        io.Float.Input("start_percent", default=start, tooltip=f"{begins} Start with {start:g}.", **limits),
        io.Float.Input("end_percent", default=end, tooltip=f"{ends} Start with {end:g}.", **limits),
    ]


def _rectification() -> list[io.Input]:
    """Its form and its strength."""
    return [
        io.Combo.Input(
            "rectification",
            options=["off", *GAINS],
            default="match",
            tooltip="Gives back the power that averaging takes from the noise. 'match' restores what the views have on "
            "average; 'unit' restores unit variance, as in the paper. Start with match.",
        ),
        io.Float.Input(
            "strength",
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.05,
            tooltip="How much of the rectification is applied; 0 is off. Start with 1.0.",
        ),
    ]


def _rectification_window() -> list[io.Input]:
    return _window(0.05, 0.92, "the rectification", "the last steps only sharpen")


class ConceptsAnagramOptions(io.ComfyNode):
    """How the views are combined."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptsAnagramOptions",
            display_name="Anagram Options",
            category=CATEGORY,
            description="How the predictions of the views become one picture. Holds the remedies for one reading "
            "winning over the others, and for the contrast that averaging takes away.",
            search_aliases=["visual anagram", "variance rectification", "balance"],
            inputs=[
                io.Combo.Input(
                    "preset",
                    options=list(PRESETS),
                    default="multi-task (fast, no gradient)",
                    tooltip="'averaging' is the plain mean. 'multi-task (fast, no gradient)' adds variance "
                    "rectification and a contrast of 0.5. 'multi-task (full)' also pulls the concepts onto the same "
                    "place, by gradients. 'custom' uses the widgets below; the other presets ignore them. Start with "
                    "multi-task (fast, no gradient).",
                ),
                io.Combo.Input(
                    "balance",
                    options=list(BALANCES),
                    default="manual",
                    tooltip="'manual' takes each view's own weight. 'prioritise first' gives the last fifth of the "
                    "steps to the first view. 'alternate' uses one view per step, in turn. 'guidance norm' raises the "
                    "view whose prompt is less satisfied (experimental). Start with manual.",
                ),
                *_rectification(),
                *_rectification_window(),
            ],
            outputs=[AnagramOptions.Output("anagram_options", display_name="options", tooltip="For Anagram Guider.")],
        )

    @classmethod
    def execute(
        cls,
        preset: str,
        balance: str,
        rectification: str,
        strength: float,
        start_percent: float,
        end_percent: float,
    ) -> io.NodeOutput:
        custom = Combination(balance, rectification, strength, start_percent, end_percent)
        return io.NodeOutput(chosen(PRESETS, preset, "preset") or custom)


class ConceptsAnagramRectification(io.ComfyNode):
    """What averaging takes from the noise, given back."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        form, share = _rectification()
        return schema(
            node_id="ConceptsAnagramRectification",
            display_name="Anagram Rectification",
            category=CATEGORY,
            description="Cures the dullness that averaging views brings: it makes the noise of their mean as strong as "
            "the noise of each view, up to a limit. Works with all other options. Costs nothing.",
            search_aliases=["visual anagram", "variance rectification", "washed out"],
            inputs=[
                form,
                share,
                io.Float.Input(
                    "largest",
                    default=0.0,
                    min=0.0,
                    max=10.0,
                    step=0.05,
                    tooltip="Upper limit of the noise gain. 0 uses √(number of views), 1.41 for two: enough even for "
                    "unrelated views. Lower it to 1.1 if the picture looks harsh. Start with 0.",
                ),
                *_rectification_window(),
                AnagramOptions.Input("options", optional=True, tooltip="The other options; empty is plain averaging."),
            ],
            outputs=[AnagramOptions.Output("anagram_options", display_name="options", tooltip="For Anagram Guider.")],
        )

    @classmethod
    def execute(
        cls,
        rectification: str,
        strength: float,
        largest: float,
        start_percent: float,
        end_percent: float,
        options: Combination | None = None,
    ) -> io.NodeOutput:
        rectified = replace(
            options or AVERAGING,
            rectification=rectification,
            strength=strength,
            start=start_percent,
            end=end_percent,
            max_gain=largest,
        )
        return io.NodeOutput(rectified)


class ConceptsAnagramSchedule(io.ComfyNode):
    """Weights that change in the course of the sampling."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptsAnagramSchedule",
            display_name="Anagram Weight Schedule",
            category=CATEGORY,
            description="Lets the views count differently early and late: the first steps settle what is where, the "
            "last ones only sharpen. Costs nothing.",
            search_aliases=["visual anagram", "balance", "prioritise", "ramp"],
            inputs=[
                io.String.Input(
                    "schedule",
                    multiline=True,
                    default=EXAMPLE,
                    tooltip="One line per moment: where in the sampling (0 to 1), a colon, and the weight of every "
                    "view in order. Between two lines the weights change evenly; two lines with the same moment make a "
                    "jump. Start with '0: 1, 1', '0.8: 1, 1', '0.8: 1, 0', which gives the last fifth to the first "
                    "view.",
                ),
                AnagramOptions.Input("options", optional=True, tooltip="The other options; empty is plain averaging."),
            ],
            outputs=[AnagramOptions.Output("anagram_options", display_name="options", tooltip="For Anagram Guider.")],
        )

    @classmethod
    def execute(cls, schedule: str, options: Combination | None = None) -> io.NodeOutput:
        return io.NodeOutput((options or AVERAGING).weighed_by(schedule_from(schedule)))


class ConceptsAnagramContrast(io.ComfyNode):
    """Each view away from what the others show."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptsAnagramContrast",
            display_name="Anagram Contrast",
            category=CATEGORY,
            description="Cures anagrams in which one reading wins, or both melt into a third thing: each view is "
            "guided away from what the other views show. Costs two more rows in the batch for every pair of views.",
            search_aliases=["visual anagram", "domination", "negative prompt"],
            inputs=[
                io.Float.Input(
                    "contrast",
                    default=0.5,
                    min=0.0,
                    max=5.0,
                    step=0.05,
                    tooltip="How much the other readings count against each view's negative, which counts 1; 0 is off. "
                    "More keeps the readings apart and makes the picture harsher. Start with 0.5.",
                ),
                AnagramOptions.Input("options", optional=True, tooltip="The other options; empty is plain averaging."),
            ],
            outputs=[AnagramOptions.Output("anagram_options", display_name="options", tooltip="For Anagram Guider.")],
        )

    @classmethod
    def execute(cls, contrast: float, options: Combination | None = None) -> io.NodeOutput:
        return io.NodeOutput(replace(options or AVERAGING, contrast=contrast))


class ConceptsAnagramAntiSegregation(io.ComfyNode):
    """The gradient step that pulls the concepts together."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptsAnagramAntiSegregation",
            display_name="Anagram Anti-Segregation",
            category=CATEGORY,
            description="Cures anagrams in which each reading gets its own corner of the picture: before each step, "
            "the places where the concepts' words attend are pulled onto each other. Every view's prompt must come "
            "from Encode Concept Phrase.",
            search_aliases=["visual anagram", "attend and excite", "overlap"],
            inputs=[
                AnagramOptions.Input("options", optional=True, tooltip="The other options; empty is plain averaging."),
                io.Float.Input(
                    "strength",
                    default=0.03,
                    min=0.0,
                    max=0.5,
                    step=0.005,
                    round=0.001,
                    tooltip="How far each step goes, as a share of the noisy picture's size; 0 is off. Start with "
                    "0.03.",
                ),
                io.Int.Input(
                    "iterations",
                    default=1,
                    min=1,
                    max=10,
                    tooltip="How many steps per noise level. Each costs part of a model pass per view, and its "
                    "gradient. Start with 1.",
                ),
                *_window(0.0, 0.7, "it", "later the places are settled"),
                io.Combo.Input(
                    "edit",
                    options=list(EDITS),
                    default="auto",
                    optional=True,
                    tooltip="'latent' writes each step into the latent that the sampler goes on with. 'prediction' "
                    "shows it to the model only: this is the same in every sampler, and weaker in most. 'auto' is "
                    "'latent' where the sampler keeps its latent. Start with auto.",
                ),
            ],
            outputs=[AnagramOptions.Output("anagram_options", display_name="options", tooltip="For Anagram Guider.")],
        )

    @classmethod
    def execute(
        cls,
        strength: float,
        iterations: int,
        start_percent: float,
        end_percent: float,
        options: Combination | None = None,
        edit: str = "auto",
    ) -> io.NodeOutput:
        settings = AntiSegregation(strength, start_percent, end_percent, iterations, EDITS[edit])
        return io.NodeOutput(replace(options or AVERAGING, anti_segregation=settings))


NODES: tuple[type[io.ComfyNode], ...] = (
    ConceptsAnagramOptions,
    ConceptsAnagramSchedule,
    ConceptsAnagramContrast,
    ConceptsAnagramAntiSegregation,
    ConceptsAnagramRectification,
)
