"""Regions: where in the picture each concept goes, drawn by hand or taken from boxes and masks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from ..host.schema import io, schema, ui, with_widget
from ..methods.assignment import as_label
from ..methods.boxes import bounding_boxes, layout_elements, regions_from
from ..methods.colours import colours_of
from ..methods.drawing import parse_drawing
from ..methods.linked_list import in_order
from ..methods.region_picture import colour_indices, cover, picture
from ..methods.regions import Region, coverage
from .concept import ConceptList
from .wires import BoundingBoxes, Concepts, Elements, Regions

CATEGORY = "concepts/regions"


class RegionList(NamedTuple):
    """One region on a wire: a linked list, newest first."""

    region: Region
    previous: RegionList | None

    def in_order(self) -> list[Region]:
        """All regions of the list, bottom to top."""
        return [link.region for link in in_order(self)]


def linked(regions: Iterable[Region], previous: RegionList | None = None) -> RegionList | None:
    """Regions bottom to top as a list on a wire, on top of what another list holds."""
    for region in regions:
        previous = RegionList(region, previous)
    return previous


def _colours(regions: Sequence[Region], concepts: ConceptList | None) -> list[int]:
    listed = [] if concepts is None else concepts.in_order()
    return colour_indices([region.label for region in regions], [concept.labels for concept in listed])


class ConceptsRegionEditor(io.ComfyNode):
    """Draws regions on a canvas."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptsRegionEditor",
            display_name="Region Editor",
            category=CATEGORY,
            description="Draw where each concept goes: boxes and brush strokes on a canvas with the picture's "
            "proportions. Later regions lie on top of earlier ones.",
            search_aliases=["box", "mask", "area", "regional prompt", "layout", "bounding box"],
            inputs=[
                with_widget(
                    io.String.Input(
                        "regions",
                        default="",
                        tooltip="The regions as the editor stores them. Drag to draw a box; B, M, E choose box, brush "
                        "and eraser; N draws over another box; Ctrl+Z undoes. Start with one box per concept.",
                    ),
                    "CONCEPTS_REGIONS",
                ),
                io.Int.Input(
                    "width",
                    default=512,
                    min=16,
                    max=8192,
                    step=8,
                    tooltip="Width of the picture in pixels; the canvas has its proportions. Use the width of your "
                    "empty latent. Start with 512 (the demo model: 128).",
                ),
                io.Int.Input(
                    "height",
                    default=512,
                    min=16,
                    max=8192,
                    step=8,
                    tooltip="Height of the picture in pixels. Start with 512 (the demo model: 128).",
                ),
                io.Float.Input(
                    "feather",
                    default=0.0,
                    min=0.0,
                    max=0.5,
                    step=0.01,
                    tooltip="How far the edges fade, as a fraction of the shorter side; 0 is sharp. Start with 0.",
                ),
                io.Image.Input(
                    "background",
                    optional=True,
                    tooltip="A picture to draw on, cut to the canvas's proportions. It does not change the regions.",
                ),
                BoundingBoxes.Input(
                    "boxes",
                    optional=True,
                    tooltip="Bounding boxes in pixels from another node; each becomes a region on top of the drawn "
                    "ones. Give that node this node's width and height.",
                    extra_dict={"forceInput": True},  # newer pages have a widget for the type: a box in every graph
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Masks from another node; each of a batch becomes a region on top of the drawn ones.",
                ),
                Regions.Input("below", optional=True, tooltip="Regions that lie under the drawn ones."),
                Concepts.Input(
                    "concepts",
                    optional=True,
                    tooltip="The concepts for the regions. New regions get their names and colours.",
                ),
                io.MultiType.Input(
                    "elements",
                    [Elements, io.String],
                    optional=True,
                    tooltip="Elements of Create Bounding Boxes, or their JSON text; each becomes a region on top, with "
                    "its description as the label. Connect the boxes or the elements of a node, not both.",
                ),
            ],
            outputs=[
                Regions.Output("region_list", display_name="regions", tooltip="All regions, bottom to top."),
                io.Mask.Output("masks", display_name="masks", tooltip="One mask per region, of width × height."),
                io.Image.Output(
                    "preview", display_name="preview", tooltip="The regions with their names over the background."
                ),
                io.Int.Output("canvas_width", display_name="width", tooltip="The width, for the empty latent."),
                io.Int.Output("canvas_height", display_name="height", tooltip="The height, for the empty latent."),
                BoundingBoxes.Output(
                    "bounding_boxes",
                    display_name="boxes",
                    tooltip="One bounding box per region, in whole pixels, with its label. A region of several boxes "
                    "or of paint has one box around all of it.",
                ),
                Elements.Output(
                    "element_list",
                    display_name="elements",
                    tooltip="One element per region, for layout nodes such as Build JSON Prompt: its box from 0 to "
                    "1000 and its label as the description.",
                ),
                io.Mask.Output(
                    "mask_list",
                    display_name="mask per region",
                    is_output_list=True,
                    tooltip="The same masks with the same feather, but one by one: a node connected here runs once "
                    "per region.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        regions: str,
        width: int,
        height: int,
        feather: float = 0.0,
        background: torch.Tensor | None = None,
        boxes: object = None,
        mask: torch.Tensor | None = None,
        below: RegionList | None = None,
        concepts: ConceptList | None = None,
        elements: object = None,
    ) -> io.NodeOutput:
        drawn = [shape.region(height, width, feather) for shape in parse_drawing(regions)]
        every = linked([*drawn, *regions_from([boxes, elements], mask, height, width, feather)], below)
        if every is None:
            raise ValueError("There are no regions yet; drag on the canvas of Region Editor to draw one.")
        listed = every.in_order()
        masks = coverage(listed, height, width)
        background = None if background is None else colours_of(background[:1])
        under = None if background is None else cover(background[0], height, width)
        shown = picture(listed, masks, _colours(listed, concepts), under)
        return io.NodeOutput(
            every,
            masks,
            shown[None],
            width,
            height,
            bounding_boxes(listed, height, width),
            layout_elements(listed),
            list(masks.split(1)),
            ui=cls._shown_in_editor(width, height, background),
        )

    @classmethod
    def _shown_in_editor(cls, width: int, height: int, background: torch.Tensor | None) -> dict[str, list]:
        """The message of a run to the editor on the node: the canvas's size and the background's file."""
        message: dict[str, list] = {"concepts_canvas": [{"width": width, "height": height}]}
        if background is not None:
            message["concepts_background"] = ui.PreviewImage(background, cls=cls).as_dict()["images"]
        return message


class ConceptsRegionMask(io.ComfyNode):
    """One region as a mask."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptsRegionMask",
            display_name="Region Mask",
            category=CATEGORY,
            description="The mask of one region, by its label, for any node that takes a MASK: Conditioning (Set "
            "Mask), inpainting, ControlNet.",
            search_aliases=["box to mask", "area to mask"],
            inputs=[
                Regions.Input("regions", tooltip="Regions, from Region Editor."),
                io.String.Input(
                    "label",
                    default="",
                    tooltip="The region's label, as in the editor. Empty: all regions together.",
                ),
                io.Int.Input(
                    "width",
                    default=512,
                    min=16,
                    max=8192,
                    step=8,
                    tooltip="Width of the mask in pixels; connect the editor's width.",
                ),
                io.Int.Input(
                    "height",
                    default=512,
                    min=16,
                    max=8192,
                    step=8,
                    tooltip="Height of the mask in pixels; connect the editor's height.",
                ),
            ],
            outputs=[io.Mask.Output("mask", display_name="mask", tooltip="The region, 1 inside and 0 outside.")],
        )

    @classmethod
    def execute(cls, regions: RegionList, label: str, width: int, height: int) -> io.NodeOutput:
        wanted = as_label(label)
        chosen = [r for r in regions.in_order() if not wanted or as_label(r.label) == wanted]
        if not chosen:
            known = ", ".join(f"'{r.label}'" for r in regions.in_order())
            raise ValueError(f"There is no region '{label}'; there are {known}. Write its label as in the editor.")
        return io.NodeOutput(coverage(chosen, height, width).amax(0, keepdim=True))


NODES: tuple[type[io.ComfyNode], ...] = (ConceptsRegionEditor, ConceptsRegionMask)
