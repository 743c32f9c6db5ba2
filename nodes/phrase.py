"""A prompt that knows which of its words are the concept."""

from __future__ import annotations

from ..host.schema import io, schema
from ..host.text.tokens import encode_with_phrase
from ..host.types import CLIP


class ConceptsEncodePhrase(io.ComfyNode):
    """A prompt that knows which of its words are the concept."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptsEncodePhrase",
            display_name="Encode Concept Phrase",
            category="concepts",
            description="CLIP Text Encode that also marks which words of the prompt are the concept, for nodes that "
            "use the attention of those words.",
            search_aliases=["clip text encode", "prompt", "token"],
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder."),
                io.String.Input("text", multiline=True, default="", dynamic_prompts=True, tooltip="The prompt."),
                io.String.Input(
                    "phrase",
                    default="",
                    tooltip="The words of the prompt that are the concept, such as 'old man'. Empty takes the whole "
                    "prompt.",
                ),
            ],
            outputs=[
                io.Conditioning.Output("conditioning", display_name="CONDITIONING", tooltip="The encoded prompt.")
            ],
        )

    @classmethod
    def execute(cls, clip: CLIP, text: str, phrase: str) -> io.NodeOutput:
        return io.NodeOutput(encode_with_phrase(clip, text, phrase))


NODES: tuple[type[io.ComfyNode], ...] = (ConceptsEncodePhrase,)
