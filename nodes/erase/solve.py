"""Erasure: which concepts go and which stay, and solving the edit."""

from __future__ import annotations

import torch
from comfy_api.latest import io, ui

from ...host.erase.solve import SolveRequest, solve_erasure
from ...host.schema import schema
from ...methods.choices import chosen
from ...methods.erase.problem import SolverSettings
from ...methods.erase.report import PROMISE, report_picture, report_text
from ...methods.erase.solvers import SOLVERS
from ...methods.erase.spec import SCOPES, TEMPLATES, UNSAFE_WORDS, Erased, Preserved, check_erased
from ..wires import Edits, EraseList, EraseOptions, PreserveList

CATEGORY = "concepts/erase"
TARGETS = {"keys and values": ("k", "v"), "keys": ("k",), "values": ("v",)}


def _lines(text: str) -> tuple[str, ...]:
    """Words or prompts, one a line or apart by semicolons."""
    return tuple(part.strip() for line in text.splitlines() for part in line.split(";") if part.strip())


def shown(report: str, pictures: torch.Tensor, cls: type[io.ComfyNode]) -> dict:
    """Text and pictures for the node itself to show."""
    return ui.PreviewText(report).as_dict() | ui.PreviewImage(pictures, cls=cls).as_dict()


class ConceptsEraseConcept(io.ComfyNode):
    """Adds a concept to what is erased."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptsEraseConcept",
            display_name="Erase Concept",
            category=CATEGORY,
            description="Names a concept to take out of a model, and what it shall become. Chain one for each concept, then "
            "Solve Erasure.",
            search_aliases=["unlearn", "remove concept", "UCE", "RECE", "safety", "nudity"],
            inputs=[
                io.String.Input(
                    "concept", default="",
                    tooltip="The word or name as it stands in prompts: 'cat', 'Van Gogh'. Several, apart by ';', are erased each. "
                    "With the template set 'unsafe words', empty means its own list of eleven words.",
                ),
                io.String.Input(
                    "anchor", default="",
                    tooltip="What the concept shall become: 'dog', 'art', 'person'. A broader or neighbouring word keeps "
                    "pictures whole. Start empty: then the prompt acts as if the concept were not in it.",
                ),
                io.Combo.Input(
                    "templates", options=list(TEMPLATES), default="object",
                    tooltip="The sentences the concept is erased in, since it never stands alone in prompts. Start with object "
                    "for things and persons, artist for styles; scene for things with a place and a background (the demo model).",
                ),
                io.Combo.Input(
                    "scope", options=list(SCOPES), default=SCOPES[0],
                    tooltip="Which tokens of each sentence change. Start with 'subject to end'; 'last subject token' changes "
                    "least, 'end tokens' only the mood of the whole prompt.",
                ),
                io.Float.Input(
                    "weight", default=1.0, min=0.01, max=100.0, step=0.05,
                    tooltip="How much this concept counts against what is kept. Raise it when something is left. Start with 1.",
                ),
                io.String.Input(
                    "other_names", default="",
                    tooltip="What else it is called, one a line or apart by ';': 'kitten; kitty'. They are erased with it. "
                    "Start empty.",
                ),
                EraseList.Input("erase_list", optional=True, tooltip="The concepts so far; leave empty for the first."),
            ],
            outputs=[
                EraseList.Output("all_concepts", display_name="concepts", tooltip="The list with this concept at its end.")
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, concept, anchor, templates, scope, weight, other_names="", erase_list=None) -> io.NodeOutput:
        sentences = chosen(TEMPLATES, templates, "template set")
        words = _lines(concept) or (UNSAFE_WORDS if templates == "unsafe words" else ("",))
        for word in words:
            names = _lines(other_names) if len(words) == 1 else ()
            erase_list = Erased(word, anchor.strip(), sentences, scope, weight, names, erase_list)
            check_erased(erase_list)
        return io.NodeOutput(erase_list)


class ConceptsPreserveConcepts(io.ComfyNode):
    """Adds prompts that must not change."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptsPreserveConcepts",
            display_name="Preserve Concepts",
            category=CATEGORY,
            description="Names what an erasure must leave as it is. The empty prompt is always preserved. The neighbours of an "
            "erased concept are worth listing: other animals, other painters.",
            search_aliases=["retain", "keep concept", "unlearn"],
            inputs=[
                io.String.Input(
                    "prompts", default="", multiline=True,
                    tooltip="Words or prompts to keep, one a line or apart by ';'. Start with ten neighbours of what is erased.",
                ),
                io.Float.Input(
                    "weight", default=1.0, min=0.0, max=1000.0, step=0.1,
                    tooltip="How much each counts. Raise it when they change, lower it when the concept stays. Start with 1.",
                ),
                io.Combo.Input(
                    "tokens", options=["last word and end", "all"], default="last word and end",
                    tooltip="Which tokens of each prompt are held. Start with 'last word and end'; 'all' for whole sentences.",
                ),
                PreserveList.Input("keep_list", optional=True, tooltip="The prompts so far; leave empty for the first."),
            ],
            outputs=[PreserveList.Output("all_kept", display_name="kept", tooltip="The list with these prompts at its end.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, prompts, weight, tokens, keep_list=None) -> io.NodeOutput:
        whole = chosen({"last word and end": False, "all": True}, tokens, "choice of tokens")
        return io.NodeOutput(Preserved(_lines(prompts), weight, whole, keep_list))


class ConceptsEraseOptions(io.ComfyNode):
    """Numbers of the solvers."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptsEraseOptions",
            display_name="Erase Options",
            category=CATEGORY,
            description="The numbers behind Solve Erasure, for those who want to turn them. Without this node every solver "
            "uses its own.",
            search_aliases=["UCE", "RECE", "lambda", "regularisation"],
            inputs=[
                io.Float.Input(
                    "ridge", default=0.0, min=0.0, max=1000.0, step=0.01, round=0.0001,
                    tooltip="λ: how much every weight resists changing. Lower erases more. Start with 0, the solver's own (uce "
                    "and realera 0.5, rece 0.1, null-space 0.05).",
                ),
                io.Float.Input(
                    "keep", default=0.0, min=0.0, max=10000.0, step=0.1, round=0.0001,
                    tooltip="Multiplies the weight of all that is preserved, the empty prompt too. Start with 0, the solver's own "
                    "(rece 6, rece-sequential 0.1, else 1). null-space goes by 'threshold' instead.",
                ),
                io.Int.Input(
                    "epochs", default=3, min=0, max=10,
                    tooltip="How often rece looks for what brings the concept back and erases it. Start with 3.",
                ),
                io.Float.Input(
                    "regeneration", default=0.1, min=1e-5, max=100.0, step=0.001, round=0.00001,
                    tooltip="λ of the embedding rece looks for: higher finds shorter ones. Start with 0.1 for unsafe words and "
                    "easy things, 0.001 for styles and stubborn things.",
                ),
                io.Float.Input(
                    "reach", default=1.0, min=0.1, max=5.0, step=0.1,
                    tooltip="How far from the concept realera erases; 1 reaches its farthest other name or sentence. "
                    "Start with 1.",
                ),
                io.Float.Input(
                    "threshold", default=0.1, min=1e-6, max=100.0, step=0.01, round=0.000001,
                    tooltip="How little a direction must be used by what is kept for null-space to change it, relative to the "
                    "empty prompt. Higher erases more and keeps less. Start with 0.1.",
                ),
            ],
            outputs=[EraseOptions.Output("erase_options", display_name="options", tooltip="For Solve Erasure.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, ridge, keep, epochs, regeneration, reach, threshold) -> io.NodeOutput:
        return io.NodeOutput(
            SolverSettings(
                ridge or None, keep or None, epochs, regeneration, reach=reach, threshold=threshold,
            )
        )  # fmt: skip


class ConceptsSolveErasure(io.ComfyNode):
    """Solves an edit."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptsSolveErasure",
            display_name="Solve Erasure",
            category=CATEGORY,
            description=f"Works out in seconds how a model must change so that it no longer draws the listed concepts. {PROMISE}",
            search_aliases=["unlearn", "UCE", "RECE", "RealEra", "SPEED", "concept erasure"],
            inputs=[
                io.Model.Input("model", tooltip="The model to edit, with the LoRAs it is used with. It is not changed."),
                io.Clip.Input("clip", tooltip="Its text encoder, with the CLIP skip it is used with."),
                EraseList.Input("concepts", tooltip="What goes, from Erase Concept."),
                io.Combo.Input(
                    "solver", options=list(SOLVERS), default="uce",
                    tooltip="uce: one solve. rece: also erases what would bring the concept back. rece-sequential: the same as "
                    "published, which forgets the first edit. realera: also erases the neighbourhood. null-space: for "
                    "many concepts. Start with uce.",
                ),
                io.Combo.Input(
                    "projections", options=list(TARGETS), default="keys and values",
                    tooltip="What changes. 'values' leaves the layout more as it was and erases less. Start with keys and values.",
                ),
                io.Boolean.Input(
                    "pooled", default=False,
                    tooltip="SDXL: also edits the pooled embedding, which sets the style of the whole picture. Start with off "
                    "for things, on for styles.",
                ),
                io.Int.Input(
                    "rank", default=-1, min=-1, max=4096,
                    tooltip="Largest rank of the edit, which is the size of its LoRA. -1 drops what hardly matters (at most 32 "
                    "are kept), 0 keeps all. Start with -1.",
                ),
                PreserveList.Input("kept", optional=True, tooltip="What stays, from Preserve Concepts."),
                EraseOptions.Input("options", optional=True, tooltip="From Erase Options; empty is the solver's own numbers."),
            ],
            outputs=[
                Edits.Output("edit", display_name="edit", tooltip="For Apply Erasure, Save Edit, Save Erasure as LoRA."),
                io.String.Output("report", display_name="report", tooltip="What it does, in numbers."),
                io.Image.Output(
                    "picture", display_name="report picture",
                    tooltip="Bars: what is left of each concept, how far kept prompts move. Short is good.",
                ),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model, clip, concepts, solver, projections, pooled, rank, kept=None, options=None
    ) -> io.NodeOutput:
        chosen(SOLVERS, solver, "solver")
        targets = chosen(TARGETS, projections, "choice of projections")
        request = SolveRequest(solver, options or SolverSettings(), targets, pooled=pooled, rank=rank)
        edit = solve_erasure(model, clip, concepts, kept, request)
        report, picture = report_text(edit.report, edit.spec), report_picture(edit.report)
        return io.NodeOutput(edit, report, picture, ui=shown(report, picture, cls))


NODES: tuple[type[io.ComfyNode], ...] = (
    ConceptsEraseConcept,
    ConceptsPreserveConcepts,
    ConceptsSolveErasure,
    ConceptsEraseOptions,
)
