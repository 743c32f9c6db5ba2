"""Concepts: the LoRAs that go into one picture, each with its phrase."""

from __future__ import annotations

from typing import NamedTuple

from ..host.folders import lora_file, lora_names
from ..host.lora.concept import Concept, make_concept
from ..host.lora.files import read_lora
from ..host.schema import io, schema
from ..host.types import CLIP
from ..methods.linked_list import in_order
from .wires import Concepts

CATEGORY = "concepts"


class ConceptList(NamedTuple):
    """One concept on a wire: a linked list, newest first."""

    concept: Concept
    previous: ConceptList | None

    def in_order(self) -> list[Concept]:
        """All concepts of the list, first to last."""
        return [link.concept for link in in_order(self)]


class ConceptsConcept(io.ComfyNode):
    """Adds a concept to the list of a picture's concepts."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptsConcept",
            display_name="Concept",
            category=CATEGORY,
            description="Adds a concept: a LoRA and the prompt in which it appears. Chain one node per concept of the "
            "picture; the first concept goes into the first region, and so on. The LoRA stays out of the MODEL.",
            search_aliases=["lora", "character", "multi lora", "regional lora"],
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder of the checkpoint, without this LoRA."),
                io.Combo.Input(
                    "lora",
                    options=lora_names(),
                    tooltip="The LoRA file: kohya, diffusers, PEFT, LyCORIS (LoCon, LoHa, LoKr) or ED-LoRA.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-4.0,
                    max=4.0,
                    step=0.05,
                    tooltip="How strongly the LoRA acts, on the model and on the text. 0 is the plain model. Start "
                    "with 1.0; lower it if the concept looks overcooked.",
                ),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    default="",
                    dynamic_prompts=True,
                    tooltip="The prompt for this concept's own model. For Concept Conductor, the whole scene with this "
                    "concept in every place: 'on the left a lion and on the right a lion, yellow background'.",
                ),
                io.String.Input(
                    "phrase",
                    default="",
                    tooltip="The words of the prompt that are the concept, such as 'a lion'. Empty takes the LoRA's "
                    "own phrase if the file names one, else the whole prompt.",
                ),
                io.String.Input(
                    "negative",
                    multiline=True,
                    default="",
                    dynamic_prompts=True,
                    tooltip="What this concept must not look like. Start empty.",
                ),
                Concepts.Input("concepts", optional=True, tooltip="The concepts so far; leave empty for the first."),
            ],
            outputs=[Concepts.Output("concept_list", display_name="concepts", tooltip="All concepts, first to last.")],
        )

    @classmethod
    def execute(
        cls,
        clip: CLIP,
        lora: str,
        strength: float,
        prompt: str,
        phrase: str = "",
        negative: str = "",
        concepts: ConceptList | None = None,
    ) -> io.NodeOutput:
        concept = make_concept(read_lora(lora_file(lora)), strength, clip, prompt, phrase, negative)
        return io.NodeOutput(ConceptList(concept, concepts))


NODES: tuple[type[io.ComfyNode], ...] = (ConceptsConcept,)
