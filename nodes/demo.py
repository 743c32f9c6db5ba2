"""The bundled demo model, for trying every node without downloading anything."""

from __future__ import annotations

from comfy_api.latest import io

from ..demo.files import LORAS
from ..demo.loader import load_demo_model
from ..host.folders import offer_loras
from ..host.schema import schema

offer_loras(LORAS)  # the demo model's LoRAs appear in the host's Load LoRA, as any other


class ConceptsDemoModel(io.ComfyNode):
    """Loads the bundled tiny model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptsDemoModel",
            display_name="Concepts Demo Model",
            category="concepts",
            description="A tiny text-to-image model of emoji that comes with the pack: nothing to download, seconds on "
            "a CPU. Canvas 128 × 128 (or 192 × 128); prompts such as 'on the left a cat and on the right a dog, blue "
            "background'. Works with the ordinary nodes: CLIP Text Encode, KSampler, VAE Decode, Load LoRA.",
            search_aliases=["tiny model", "emoji", "load checkpoint"],
            inputs=[],
            outputs=[
                io.Model.Output(
                    "model", display_name="MODEL", tooltip="The diffusion model; v-prediction, SD 1 family."
                ),
                io.Clip.Output("clip", display_name="CLIP", tooltip="The text encoder, for CLIP Text Encode."),
                io.Vae.Output("vae", display_name="VAE", tooltip="For VAE Decode and VAE Encode."),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(*load_demo_model())


NODES: tuple[type[io.ComfyNode], ...] = (ConceptsDemoModel,)
