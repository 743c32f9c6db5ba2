"""Regions: where in the picture each concept goes, drawn by hand or taken from boxes and masks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from comfy_api.latest import io, ui

from ..host.schema import schema, with_widget
from ..methods.drawing import box_of_pixels, parse_drawing
from ..methods.linked_list import in_order
from ..methods.region_picture import cover, picture
from ..methods.regions import Region, coverage
from .concept import ConceptList
from .wires import BoundingBoxes, Concepts, Regions

CATEGORY = "concepts/regions"
MOST_LINKED = 64  # boxes or masks taken from other nodes


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


def _boxes(boxes: Any) -> Iterator[Any]:
    """Single bounding boxes out of the lists of lists that hosts and packs hand on."""
    if isinstance(boxes, (list, tuple)):
        for box in boxes:
            yield from _boxes(box)
    elif boxes is not None:
        yield boxes


def regions_of(boxes: Any, mask: torch.Tensor | None, height: int, width: int, feather: float) -> list[Region]:
    """Regions of what other nodes hand in: one for each bounding box, one for each mask of a batch."""
    taken = list(_boxes(boxes))
    masks = [] if mask is None else list(mask.reshape(-1, *mask.shape[-2:]).clamp(0, 1))
    if len(taken) + len(masks) > MOST_LINKED:
        raise ValueError(
            f"{len(taken)} boxes and {len(masks)} masks are connected; at most {MOST_LINKED} can be taken."
        )
    found = [Region(f"box {n}", (box_of_pixels(b, height, width),), None, feather) for n, b in enumerate(taken, 1)]
    return found + [Region(f"mask {n}", (), m, feather) for n, m in enumerate(masks, 1)]


def _colours(regions: list[Region], concepts: ConceptList | None) -> list[int]:
    """The colour of each region: of the concept it is named after, else of its place behind them (as in colours.js)."""
    listed = [] if concepts is None else concepts.in_order()
    return [
        next((at for at, c in enumerate(listed) if region.label.strip().lower() in c.labels), len(listed) + place)
        for place, region in enumerate(regions)
    ]


class ConceptsRegionEditor(io.ComfyNode):
    """Draws regions on a canvas."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptsRegionEditor",
            display_name="Region Editor",
            category=CATEGORY,
            description="Draw where each concept goes: boxes and brush strokes on a canvas with the picture's proportions. "
            "Later regions lie on top of earlier ones.",
            search_aliases=["box", "mask", "area", "regional prompt", "layout", "bounding box"],
            inputs=[
                with_widget(
                    io.String.Input(
                        "regions", default="",
                        tooltip="The regions as the editor keeps them. Drag to draw a box; B, M, E choose box, brush and "
                        "eraser; N draws over another box; Ctrl+Z undoes. Start with one box a concept.",
                    ),
                    "CONCEPTS_REGIONS",
                ),
                io.Int.Input(
                    "width", default=512, min=16, max=8192, step=8,
                    tooltip="Width of the picture in pixels; the canvas takes its proportions. Set it as on your empty "
                    "latent; start with 512 (the demo model: 128).",
                ),
                io.Int.Input(
                    "height", default=512, min=16, max=8192, step=8,
                    tooltip="Height of the picture in pixels. Start with 512 (the demo model: 128).",
                ),
                io.Float.Input(
                    "feather", default=0.0, min=0.0, max=0.5, step=0.01,
                    tooltip="How far the edges fade, as a fraction of the shorter side; 0 is sharp. Start with 0.",
                ),
                io.Image.Input(
                    "background", optional=True,
                    tooltip="A picture to draw on, cut to the canvas's proportions; it changes nothing in the regions.",
                ),
                BoundingBoxes.Input(
                    "boxes", optional=True,
                    tooltip="Bounding boxes in pixels from another node; each becomes a region on top of the drawn ones.",
                ),
                io.Mask.Input(
                    "mask", optional=True,
                    tooltip="Masks from another node; each of a batch becomes a region on top of the drawn ones.",
                ),
                Regions.Input("below", optional=True, tooltip="Regions that lie under the drawn ones."),
                Concepts.Input(
                    "concepts", optional=True,
                    tooltip="The concepts that go into the regions; new regions are named after them and have their colours.",
                ),
            ],
            outputs=[
                Regions.Output("region_list", display_name="regions", tooltip="All regions, bottom to top."),
                io.Mask.Output("masks", display_name="masks", tooltip="One mask a region, of width × height."),
                io.Image.Output("preview", display_name="preview", tooltip="The regions with their names over the background."),
                io.Int.Output("canvas_width", display_name="width", tooltip="The width, for the empty latent."),
                io.Int.Output("canvas_height", display_name="height", tooltip="The height, for the empty latent."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, regions, width, height, feather=0.0, background=None, boxes=None, mask=None, below=None, concepts=None
    ) -> io.NodeOutput:
        drawn = [shape.region(height, width, feather) for shape in parse_drawing(regions)]
        every = linked([*drawn, *regions_of(boxes, mask, height, width, feather)], below)
        if every is None:
            raise ValueError("There are no regions yet; drag on the canvas of Region Editor to draw one.")
        listed = every.in_order()
        masks = coverage(listed, height, width)
        under = None if background is None else cover(background[0], height, width)
        shown = picture(listed, masks, _colours(listed, concepts), under)
        return io.NodeOutput(
            every, masks, shown[None], width, height, ui=cls._shown_in_editor(width, height, background)
        )

    @classmethod
    def _shown_in_editor(cls, width: int, height: int, background: torch.Tensor | None) -> dict[str, list]:
        """What the editor on the node learns from a run: the canvas's size and where the background's file lies."""
        told: dict[str, list] = {"concepts_canvas": [{"width": width, "height": height}]}
        if background is not None:
            told["concepts_background"] = ui.PreviewImage(background[:1], cls=cls).as_dict()["images"]
        return told


class ConceptsRegionMask(io.ComfyNode):
    """One region as a mask."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptsRegionMask",
            display_name="Region Mask",
            category=CATEGORY,
            description="The mask of one region, by its label, for any node that takes a MASK: Conditioning (Set Mask), "
            "inpainting, ControlNet.",
            search_aliases=["box to mask", "area to mask"],
            inputs=[
                Regions.Input("regions", tooltip="Regions, from Region Editor."),
                io.String.Input(
                    "label", default="",
                    tooltip="The label of the region, as written in the editor; empty takes all regions together.",
                ),
                io.Int.Input(
                    "width", default=512, min=16, max=8192, step=8,
                    tooltip="Width of the mask in pixels; connect the editor's width.",
                ),
                io.Int.Input(
                    "height", default=512, min=16, max=8192, step=8,
                    tooltip="Height of the mask in pixels; connect the editor's height.",
                ),
            ],
            outputs=[io.Mask.Output("mask", display_name="mask", tooltip="The region, 1 inside and 0 outside.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, regions, label, width, height) -> io.NodeOutput:
        wanted = label.strip().lower()
        chosen = [r for r in regions.in_order() if not wanted or r.label.strip().lower() == wanted]
        if not chosen:
            known = ", ".join(f"'{r.label}'" for r in regions.in_order())
            raise ValueError(f"There is no region '{label}'; there are {known}. Write its label as in the editor.")
        return io.NodeOutput(coverage(chosen, height, width).amax(0, keepdim=True))


NODES: tuple[type[io.ComfyNode], ...] = (ConceptsRegionEditor, ConceptsRegionMask)
