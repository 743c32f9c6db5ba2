"""The boxes of a template: each node stands in the box of its role, and the boxes follow one another to the right."""

from __future__ import annotations

from graphlib import TopologicalSorter
from typing import Any

Graph = dict[str, Any]
GAP = 40  # px between nodes, and between boxes
COLUMN = 320  # px, the width of a node
_PADDING = 20  # px between a box and its nodes
_TITLE = 80  # px above a box's first node: its own title and the node's
_COLOUR = "#3f789e"  # what the page gives a new group

ROLES: dict[str, tuple[str, ...]] = {
    "Model and prompts": (
        "ConceptsDemoModel", "CheckpointLoaderSimple", "UNETLoader", "CLIPLoader", "DualCLIPLoader", "VAELoader",
        "CLIPVisionLoader", "LoraLoader", "ModelSamplingAuraFlow",
        "CLIPTextEncode", "ConceptsEncodePhrase", "ConceptsEncodeObjects", "ConceptsCorrectObjects",
    ),
    "Concepts": ("ConceptsConcept",),
    "Regions": ("ConceptsRegionEditor", "ConceptsRegionMask", "ConditioningSetMask", "ConditioningCombine"),
    "The map": ("SolidMask", "FeatherMask", "InvertMask", "MaskToImage", "EmptyImage", "ImageBlend"),
    "Views": ("ConceptsAnagramView", "ConceptsAnagramViewFromImage", "ConceptsAnagramReference"),
    "Erasing": (
        "ConceptsEraseConcept", "ConceptsPreserveConcepts", "ConceptsPreserveCaptions", "ConceptsEraseOptions",
        "ConceptsSolveErasure", "ConceptsTrainStates", "ConceptsTrainOptions", "ConceptsTrainEnd",
        "ConceptsTrainErasure", "ConceptsUnlearnInTextEncoder", "ConceptsApplyErasure",
        "ConceptsEraseFromConditioning", "ConceptsLoadEdit",
    ),
    "Sampling": (
        "ConceptsAnagramOptions", "ConceptsAnagramSchedule", "ConceptsAnagramRectification", "ConceptsAnagramContrast",
        "ConceptsAnagramAntiSegregation", "ConceptsAnagramClipBalance", "ConceptsAnagramModel", "ConceptsAnagramGuider",
        "ConceptsAnagramPixelGuider", "ConceptsComposer", "ConceptsComposerOptions", "ConceptsConductorGuider",
        "ConceptsConductorOptions", "ConceptsConductorMoreOptions", "ConceptsConductorBlocks",
        "ConceptsLayoutReference", "ConceptsKeepObjectsApart", "ConceptsTimeTravelSampler",
        "EmptyLatentImage", "EmptySD3LatentImage", "EmptyFlux2LatentImage", "RepeatLatentBatch",
        "RandomNoise", "KSamplerSelect", "BasicScheduler", "SamplerCustomAdvanced", "KSampler",
    ),
    "Result": (
        "VAEDecode", "ConceptsAnagramDecode", "ConceptsAnagramShowViews", "ConceptsAnagramContactSheet",
        "ConceptsAnagramAnimate", "ConceptsAnagramScore", "ConceptsDemoJudge", "ConceptsComposerRegions",
        "ConceptsConceptMasks", "ConceptsProbeErasure", "ConceptsSaveEdit", "ConceptsSaveErasureLora",
        "ImageBatch", "SaveImage", "SaveAnimatedWEBP", "PreviewImage",
    ),
}  # fmt: skip
"""By title of a box, from left to right, the classes that belong into it."""
_TITLES = tuple(ROLES)
_RANKS = {kind: rank for rank, kinds in enumerate(ROLES.values()) for kind in kinds}


def _sources(graph: Graph, node: str) -> list[str]:
    """The nodes of the graph that a node takes something from."""
    linked = (value[0] for value in graph[node]["inputs"].values() if isinstance(value, list))
    return [source for source in linked if source in graph]


def _sources_first(graph: Graph) -> list[str]:
    return list(TopologicalSorter({node: _sources(graph, node) for node in graph}).static_order())


def ranks(graph: Graph) -> dict[str, int]:
    """Each node's box, by number: that of its role, or the one it takes something from if that stands further right.

    Raises:
        ValueError: a class without a role.
    """
    ranked: dict[str, int] = {}
    for node in _sources_first(graph):
        kind = graph[node]["class_type"]
        if kind not in _RANKS:
            raise ValueError(f"No box of a template is for {kind}; enter it in ROLES of workbench/groups.py.")
        ranked[node] = max([_RANKS[kind], *(ranked[source] for source in _sources(graph, node))])
    return ranked


def _columns(graph: Graph, ranked: dict[str, int]) -> dict[str, int]:
    """Each node's column in its box: one more than the furthest node in there that it takes something from.

    Nodes of one class that follow one another, as concepts and views do, stand below one another.
    """
    columns: dict[str, int] = {}
    for node in _sources_first(graph):
        near = [source for source in _sources(graph, node) if ranked[source] == ranked[node]]
        beside = (columns[s] + (graph[s]["class_type"] != graph[node]["class_type"]) for s in near)
        columns[node] = max(beside, default=0)
    return columns


def in_order(graph: Graph) -> list[str]:
    """The nodes box by box and column by column: none stands before what it takes something from."""
    ranked = ranks(graph)
    columns = _columns(graph, ranked)
    return sorted(graph, key=lambda node: (ranked[node], columns[node], int(node)))


def place(graph: Graph, nodes: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Gives each node of the editor its position, and returns the boxes around them.

    Args:
        graph: in API format.
        nodes: the same nodes as the editor stores them, in the order of ``in_order``, with their sizes.
    """
    ranked = ranks(graph)
    columns = _columns(graph, ranked)
    boxes: list[dict[str, Any]] = []
    left = 0
    for rank in sorted(set(ranked.values())):
        inside = {identity: node for identity, node in nodes.items() if ranked[identity] == rank}
        width, height = _stack(inside, columns, left)
        box = {"id": len(boxes) + 1, "title": _TITLES[rank], "bounding": [left, 0, width, height]}
        boxes.append(box | {"color": _COLOUR, "font_size": 24, "flags": {}})
        left += width + GAP
    return boxes


def _stack(nodes: dict[str, dict[str, Any]], columns: dict[str, int], left: int) -> tuple[int, int]:
    """Puts the nodes of a box below one another, column by column; returns the box's width and height in px."""
    bottoms: dict[int, int] = {}
    for identity, node in nodes.items():
        column = columns[identity]
        top = bottoms.get(column, _TITLE - GAP) + GAP
        node["pos"] = [left + _PADDING + column * (COLUMN + GAP), top]
        bottoms[column] = top + node["size"][1]
    across = (max(bottoms) + 1) * (COLUMN + GAP) - GAP
    return across + 2 * _PADDING, max(bottoms.values()) + _PADDING
