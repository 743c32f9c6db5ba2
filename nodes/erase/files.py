"""Erasures as files, as LoRAs, and under attack."""

from __future__ import annotations

from ...host.erase.export import export_lora
from ...host.erase.probe import OTHER_SENTENCES, probe
from ...host.folders import edit_file, edit_names, new_output, offer_edits
from ...host.lora.export import STYLES
from ...host.schema import io, schema, ui
from ...host.types import CLIP, ModelPatcher
from ...methods.choices import check_choice, chosen
from ...methods.erase.edit import Edit, chain
from ...methods.erase.edit_file import load_edit, save_edit
from ...methods.erase.probe import findings_text
from ...methods.erase.report import LATER, PROMISE, report_text
from ..wires import Edits
from .shared import CATEGORY, listed_texts

offer_edits()
_NONE = "none"
PRECISIONS = {"fp16": True, "fp32": False}
"""The precisions of a LoRA, and whether they are half precision."""


class ConceptsSaveEdit(io.ComfyNode):
    """Saves an edit."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptsSaveEdit",
            display_name="Save Edit",
            category=CATEGORY,
            description="Saves an erasure independently of the model. Load Edit loads it for other checkpoints of the "
            "family. For other programs use Save Erasure as LoRA.",
            search_aliases=["unlearn", "export", "save erasure"],
            inputs=[
                Edits.Input("edit", tooltip="From Solve Erasure."),
                io.String.Input(
                    "filename_prefix",
                    default="concepts_edits/edit",
                    tooltip="Folder and name within the output folder; a number is added. Start with "
                    "concepts_edits/NAME, which Load Edit lists.",
                ),
            ],
            outputs=[io.String.Output("file", display_name="file", tooltip="The name Load Edit lists it under.")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, edit: Edit, filename_prefix: str) -> io.NodeOutput:
        path = new_output(filename_prefix)
        save_edit(edit, path)
        return io.NodeOutput(path.name, ui=ui.PreviewText(f"saved as {path.name}"))


class ConceptsLoadEdit(io.ComfyNode):
    """Loads an edit."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptsLoadEdit",
            display_name="Load Edit",
            category=CATEGORY,
            description="Loads an erasure that Save Edit wrote, from models/concepts_edits or output/concepts_edits.",
            search_aliases=["unlearn", "import", "load erasure"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=[_NONE, *edit_names()],
                    default=_NONE,
                    tooltip="The saved edit; reload the page after saving a new one. 'none' is an edit that changes "
                    "nothing.",
                ),
                Edits.Input(
                    "edit",
                    optional=True,
                    tooltip="An edit to apply before this one; the output is both as one edit.",
                ),
            ],
            outputs=[
                Edits.Output("loaded", display_name="edit", tooltip="For Apply Erasure."),
                io.String.Output(
                    "report", display_name="report", tooltip="What was measured when it was solved or trained."
                ),
            ],
        )

    @classmethod
    def execute(cls, file: str, edit: Edit | None = None) -> io.NodeOutput:
        loaded = Edit() if file == _NONE else load_edit(edit_file(file))
        report = report_text(loaded.report, loaded.spec) if loaded.report else "no report in this file"
        return io.NodeOutput(loaded if edit is None else chain(edit, loaded), report)


class ConceptsSaveErasureLora(io.ComfyNode):
    """Saves an edit as a LoRA."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptsSaveErasureLora",
            display_name="Save Erasure as LoRA",
            category=CATEGORY,
            description="Writes the edit as an ordinary LoRA for this checkpoint. Load LoRA, web UIs and diffusers "
            "load it; use strength 1.",
            search_aliases=["export", "kohya", "diffusers"],
            inputs=[
                io.Model.Input("model", tooltip="The model the LoRA is for, with the LoRAs the edit was solved with."),
                Edits.Input("edit", tooltip="From Solve Erasure or Load Edit."),
                io.String.Input(
                    "filename_prefix",
                    default="loras/erase",
                    tooltip="Folder and name within the output folder; a number is added. Start with loras/NAME, which "
                    "Load LoRA lists.",
                ),
                io.Combo.Input(
                    "naming",
                    options=list(STYLES),
                    default=STYLES[0],
                    tooltip="kohya: for ComfyUI, web UIs and diffusers. diffusers: peft's names, for scripts. Start "
                    "with kohya.",
                ),
                io.Combo.Input(
                    "precision",
                    options=list(PRECISIONS),
                    default="fp16",
                    tooltip="fp16 is half the size, with a relative error of 3e-4. Start with fp16.",
                ),
                io.Clip.Input(
                    "clip", optional=True, tooltip="Needed only for trained edits that change the text encoder."
                ),
            ],
            outputs=[io.String.Output("file", display_name="file", tooltip="The file's name, as Load LoRA lists it.")],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        edit: Edit,
        filename_prefix: str,
        naming: str,
        precision: str,
        clip: CLIP | None = None,
    ) -> io.NodeOutput:
        check_choice(STYLES, naming, "naming")
        path = new_output(filename_prefix)
        half = chosen(PRECISIONS, precision, "precision")
        size = export_lora(model, clip, edit, path, naming, half=half)
        return io.NodeOutput(path.name, ui=ui.PreviewText(f"saved as {path.name}, {size / 1e6:.1f} MB"))


class ConceptsProbeErasure(io.ComfyNode):
    """Attacks an edit without pictures."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptsProbeErasure",
            display_name="Probe Erasure",
            category=CATEGORY,
            description="Attacks an edit in the space of embeddings, without pictures: other sentences, harmless "
            f"prompts pushed towards the concept, and how far an embedding must go to bring it back. {PROMISE}",
            search_aliases=["attack", "Ring-A-Bell", "red team", "unlearn"],
            inputs=[
                io.Model.Input("model", tooltip="The model the edit is for, unedited."),
                io.Clip.Input("clip", tooltip="Its text encoder."),
                Edits.Input("edit", tooltip="From Solve Erasure or Load Edit."),
                io.String.Input(
                    "sentences",
                    default="\n".join(OTHER_SENTENCES),
                    multiline=True,
                    tooltip="Sentences to try, one per line, with a pair of braces for the concept. Start with these, "
                    "then write your own.",
                ),
            ],
            outputs=[io.String.Output("report", display_name="report", tooltip="What gets through, for each concept.")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model: ModelPatcher, clip: CLIP, edit: Edit, sentences: str) -> io.NodeOutput:
        findings = probe(model, clip, edit, listed_texts(sentences) or OTHER_SENTENCES)
        report = f"{findings_text(findings)}\n{LATER} {PROMISE}"
        return io.NodeOutput(report, ui=ui.PreviewText(report))


NODES: tuple[type[io.ComfyNode], ...] = (
    ConceptsSaveEdit,
    ConceptsLoadEdit,
    ConceptsSaveErasureLora,
    ConceptsProbeErasure,
)
