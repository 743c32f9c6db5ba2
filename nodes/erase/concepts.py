"""The two lists of an erasure: which concepts are erased, and which prompts are preserved."""

from __future__ import annotations

from collections.abc import Callable

from ...host.schema import io, schema
from ...methods.choices import chosen
from ...methods.erase.captions import everyday_captions
from ...methods.erase.spec import SCOPES, TEMPLATES, UNSAFE_WORDS, Erased, Preserved, check_erased
from ..wires import EraseList, PreserveList
from .shared import CATEGORY, listed_texts

CAPTIONS: dict[str, Callable[[], tuple[str, ...]]] = {"everyday": everyday_captions, "own": tuple}
"""The sets of captions of Preserve Captions."""
TOKENS = {"last word and end": False, "all": True}
"""The choices of Preserve Concepts, and whether every token of a prompt is preserved."""


class ConceptsEraseConcept(io.ComfyNode):
    """Adds a concept to the list of what is erased."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptsEraseConcept",
            display_name="Erase Concept",
            category=CATEGORY,
            description="Names a concept to take out of a model, and what it becomes. Chain one node per concept, then "
            "connect Solve Erasure.",
            search_aliases=["unlearn", "remove concept", "UCE", "RECE", "safety", "nudity"],
            inputs=[
                io.String.Input(
                    "concept",
                    default="",
                    tooltip="The word or name as prompts use it: 'cat', 'Van Gogh'. Separate several with ';' to erase "
                    "each of them. Leave it empty with the template set 'unsafe words' for its built-in list of eleven "
                    "words.",
                ),
                io.String.Input(
                    "anchor",
                    default="",
                    tooltip="What the concept becomes: 'dog', 'art', 'person'. A broader or neighbouring word keeps "
                    "pictures whole. Start empty: the prompt then acts as if the concept were not in it.",
                ),
                io.Combo.Input(
                    "templates",
                    options=list(TEMPLATES),
                    default="object",
                    tooltip="The sentences the concept is erased in, since prompts rarely consist of the bare word. "
                    "Start with object for things and persons, artist for styles; scene for things with a position and "
                    "a background (the demo model).",
                ),
                io.Combo.Input(
                    "scope",
                    options=list(SCOPES),
                    default=SCOPES[0],
                    tooltip="Which tokens of each sentence change. Start with 'subject to end'. 'last subject token' "
                    "changes least, 'end tokens' only the mood of the whole prompt.",
                ),
                io.Float.Input(
                    "weight",
                    default=1.0,
                    min=0.01,
                    max=100.0,
                    step=0.05,
                    tooltip="How much this concept counts against what is preserved. Raise it if something is left. "
                    "Start with 1.",
                ),
                io.String.Input(
                    "other_names",
                    default="",
                    tooltip="Other words for the concept, one per line or separated by ';': 'kitten; kitty'. They are "
                    "erased with it. Start empty.",
                ),
                EraseList.Input("erase_list", optional=True, tooltip="The concepts so far; leave empty for the first."),
            ],
            outputs=[
                EraseList.Output(
                    "all_concepts", display_name="concepts", tooltip="The list with this concept at its end."
                )
            ],
        )

    @classmethod
    def execute(
        cls,
        concept: str,
        anchor: str,
        templates: str,
        scope: str,
        weight: float,
        other_names: str = "",
        erase_list: Erased | None = None,
    ) -> io.NodeOutput:
        sentences = chosen(TEMPLATES, templates, "template set")
        words = listed_texts(concept) or (UNSAFE_WORDS if templates == "unsafe words" else ("",))
        for word in words:
            names = listed_texts(other_names) if len(words) == 1 else ()
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
            description="Names what an erasure must not change. The empty prompt is always preserved. List the "
            "neighbours of an erased concept: other animals, other painters.",
            search_aliases=["retain", "keep concept", "unlearn"],
            inputs=[
                io.String.Input(
                    "prompts",
                    default="",
                    multiline=True,
                    tooltip="Words or prompts to preserve, one per line or separated by ';'. Start with ten neighbours "
                    "of what is erased.",
                ),
                io.Float.Input(
                    "weight",
                    default=1.0,
                    min=0.0,
                    max=1000.0,
                    step=0.1,
                    tooltip="How much each counts. Raise it if they change, lower it if the concept stays. Start with "
                    "1.",
                ),
                io.Combo.Input(
                    "tokens",
                    options=list(TOKENS),
                    default="last word and end",
                    tooltip="Which tokens of each prompt are preserved. Start with 'last word and end'; choose 'all' "
                    "for whole sentences.",
                ),
                PreserveList.Input(
                    "keep_list", optional=True, tooltip="The prompts so far; leave empty for the first."
                ),
            ],
            outputs=[
                PreserveList.Output("all_kept", display_name="kept", tooltip="The list with these prompts at its end.")
            ],
        )

    @classmethod
    def execute(cls, prompts: str, weight: float, tokens: str, keep_list: Preserved | None = None) -> io.NodeOutput:
        whole = chosen(TOKENS, tokens, "choice of tokens")
        return io.NodeOutput(Preserved(listed_texts(prompts), weight, whole, keep_list))


class ConceptsPreserveCaptions(io.ComfyNode):
    """Adds captions that must not change on average."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptsPreserveCaptions",
            display_name="Preserve Captions",
            category=CATEGORY,
            description="Preserves what everyday prompts use, on average. Concepts that nobody listed then survive an "
            "erasure too. Connect it behind Preserve Concepts.",
            search_aliases=["retain", "COCO", "Gram matrix", "statistics", "OCE", "unlearn"],
            inputs=[
                io.Combo.Input(
                    "captions",
                    options=list(CAPTIONS),
                    default="everyday",
                    tooltip="everyday: 440 ordinary captions, and those below. own: those below alone. Start with "
                    "everyday.",
                ),
                io.String.Input(
                    "own",
                    default="",
                    multiline=True,
                    tooltip="Further captions, one per line or separated by ';'. They may name what is erased. Start "
                    "empty; a few hundred prompts of the kind you use are better. The demo model needs its own words.",
                ),
                io.Float.Input(
                    "weight",
                    default=100.0,
                    min=0.0,
                    max=100000.0,
                    step=10.0,
                    tooltip="How many prompts of Preserve Concepts all captions together count as. Lower it if the "
                    "concept stays. Start with 100.",
                ),
                PreserveList.Input(
                    "keep_list", optional=True, tooltip="The prompts so far; leave empty for the first."
                ),
            ],
            outputs=[
                PreserveList.Output("all_kept", display_name="kept", tooltip="The list with these captions at its end.")
            ],
        )

    @classmethod
    def execute(cls, captions: str, own: str, weight: float, keep_list: Preserved | None = None) -> io.NodeOutput:
        listed = (*chosen(CAPTIONS, captions, "set of captions")(), *listed_texts(own))
        if not listed:
            raise ValueError("There are no captions; write some into 'own', or choose 'everyday'.")
        return io.NodeOutput(Preserved(listed, weight, True, keep_list, averaged=True))


NODES: tuple[type[io.ComfyNode], ...] = (ConceptsEraseConcept, ConceptsPreserveConcepts, ConceptsPreserveCaptions)
