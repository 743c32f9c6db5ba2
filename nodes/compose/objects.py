"""Several objects of one prompt, without any LoRA: Multi-Concept T2I-Zero."""

from __future__ import annotations

from ...host.compose.objects import correct_objects, encode_with_objects
from ...host.compose.suppression import with_suppression
from ...host.schema import io, schema
from ...host.types import CLIP, Conditioning, ModelPatcher

CATEGORY = "concepts/compose"


class ConceptsEncodeObjects(io.ComfyNode):
    """A prompt with its objects marked."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptsEncodeObjects",
            display_name="Encode Objects",
            category=CATEGORY,
            description="CLIP Text Encode that also marks which words of the prompt are its objects, for Correct "
            "Objects and Keep Objects Apart.",
            search_aliases=["clip text encode", "prompt", "several objects", "t2i-zero"],
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder."),
                io.String.Input(
                    "text",
                    multiline=True,
                    default="",
                    dynamic_prompts=True,
                    tooltip="The prompt, such as 'a cat, a dog and an owl'.",
                ),
                io.String.Input(
                    "objects",
                    multiline=True,
                    default="",
                    tooltip="The objects, one per line or separated by commas, written as in the prompt: 'cat, dog, "
                    "owl'. Two objects cannot share a word.",
                ),
            ],
            outputs=[
                io.Conditioning.Output("conditioning", display_name="CONDITIONING", tooltip="The encoded prompt.")
            ],
        )

    @classmethod
    def execute(cls, clip: CLIP, text: str, objects: str) -> io.NodeOutput:
        phrases = [phrase.strip() for line in objects.splitlines() for phrase in line.split(",")]
        return io.NodeOutput(encode_with_objects(clip, text, [p for p in phrases if p]))


class ConceptsCorrectObjects(io.ComfyNode):
    """Correction by Similarities."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptsCorrectObjects",
            display_name="Correct Objects",
            category=CATEGORY,
            description="Correction by Similarities: restores each object's own meaning where a dominant object has "
            "spread to its neighbours. Costs nothing while sampling.",
            search_aliases=["t2i-zero", "missing object", "attribute leakage"],
            inputs=[
                io.Conditioning.Input("conditioning", tooltip="A prompt from Encode Objects."),
                io.Float.Input(
                    "strength",
                    default=0.2,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="How much of each object's meaning is restored; 0 is off. Start with 0.2.",
                ),
                io.Int.Input(
                    "window",
                    default=3,
                    min=1,
                    max=75,
                    tooltip="How many words to either side are compared. Start with 3.",
                ),
                io.Float.Input(
                    "threshold",
                    default=0.6,
                    min=-1.0,
                    max=1.0,
                    step=0.05,
                    tooltip="How similar a word must be to count; at 1 only the word itself counts. Start with 0.6.",
                ),
            ],
            outputs=[io.Conditioning.Output("corrected", display_name="CONDITIONING", tooltip="The corrected prompt.")],
        )

    @classmethod
    def execute(cls, conditioning: Conditioning, strength: float, window: int, threshold: float) -> io.NodeOutput:
        return io.NodeOutput(correct_objects(conditioning, strength, window, threshold))


class ConceptsKeepObjectsApart(io.ComfyNode):
    """Cross-Token Non-Maximum Suppression."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptsKeepObjectsApart",
            display_name="Keep Objects Apart",
            category=CATEGORY,
            description="Cross-Token Non-Maximum Suppression: each place of the picture goes to its strongest object, "
            "and the other objects lose attention there. For prompts from Encode Objects, with any sampler.",
            search_aliases=["t2i-zero", "missing object", "attention", "semantic leakage"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="A UNet model (SD 1.x, SD 2.x, SDXL) or a transformer (Flux, Z-Image, Qwen-Image and "
                    "others).",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="How much the weaker objects lose at a place. 1 leaves one object there, 0 is the plain "
                    "model. Start with 1.0.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Works from this share of the sampling on. Start with 0.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Works up to this share of the sampling; later costs a little more time. Start with 0.5.",
                ),
                io.Boolean.Input(
                    "renormalise",
                    default=False,
                    tooltip="The attention that weaker objects lose goes to the other words. Start with off.",
                ),
            ],
            outputs=[io.Model.Output("patched", display_name="MODEL", tooltip="The model, for any sampler or guider.")],
        )

    @classmethod
    def execute(
        cls, model: ModelPatcher, strength: float, start_percent: float, end_percent: float, renormalise: bool = False
    ) -> io.NodeOutput:
        return io.NodeOutput(with_suppression(model, strength, start_percent, end_percent, renormalise=renormalise))


NODES: tuple[type[io.ComfyNode], ...] = (ConceptsEncodeObjects, ConceptsCorrectObjects, ConceptsKeepObjectsApart)
