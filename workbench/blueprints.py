"""The blueprints: parts of our graphs as subgraphs, which the page lists among the nodes.

``BLUEPRINTS`` says which part of which graph of ``workflows/api`` a blueprint is. What its nodes take from those left
out becomes an input, what they give to those an output. ``dev.py workflows`` writes ``subgraphs/NAME.json``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .gallery import API, ROOT
from .registry import core_origin
from .twin import without
from .ui_graph import COLUMN, ROW, Graph, identity_of, inputs_of, parts

FOLDER = ROOT / "subgraphs"
_ENTRY, _EXIT = -10, -20  # the ids the page gives to the two edges of a subgraph
_EDGE = [120, 60]  # px
_AWAY = 200  # px between an edge and the boxes
_CATEGORY = "Concepts"
_LINK = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")  # a link, as a subgraph has it
_LONG = 90  # px more for a prompt on the blueprint's node


@dataclass(frozen=True)
class Blueprint:
    """A part of a graph.

    Attributes:
        source: the graph.
        left_out: its nodes that stay outside.
        widgets: by label on the blueprint, the node and input that are set there.
        description: what the page says of it.
        values: by node and input, what is set there in place of a link from outside.
    """

    source: str
    left_out: tuple[str, ...]
    widgets: dict[str, tuple[str, str]]
    description: str
    values: dict[tuple[str, str], Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Port:
    """An input: its label, its type, and the inputs inside that take it."""

    label: str
    kind: str
    targets: tuple[tuple[str, str], ...]
    is_widget: bool = False


BLUEPRINTS = {
    "Two Concepts in Boxes": Blueprint(
        "compose_regions",
        ("1", "6", "15"),
        {
            "prompt": ("2", "text"),
            "first lora": ("4", "lora"),
            "first phrase": ("4", "phrase"),
            "first prompt": ("4", "prompt"),
            "second lora": ("5", "lora"),
            "second phrase": ("5", "phrase"),
            "second prompt": ("5", "prompt"),
            "width": ("9", "width"),
            "height": ("9", "height"),
            "seed": ("10", "noise_seed"),
        },
        "Draws two concept LoRAs in one picture, each in its own box. Connect a Region Editor, and name each box like "
        "the phrase of its concept. Set width and height to what your model was trained at.",
        {("9", "width"): 128, ("9", "height"): 128},
    ),
    "Anagram": Blueprint(
        "anagram_turn",
        ("1", "15"),
        {
            "upright": ("2", "text"),
            "in the view": ("3", "text"),
            "view": ("6", "view"),
            "width": ("11", "width"),
            "height": ("11", "height"),
            "seed": ("8", "noise_seed"),
        },
        "Draws one picture that shows one prompt upright and another in the chosen view. "
        "Set width and height to what your model was trained at.",
    ),
    "Erased Model": Blueprint(
        "erase_before_after",
        ("1", "2", "3", "4", "9", "10", "11", "12", "13", "14", "15"),
        {"erase": ("5", "concept"), "becomes": ("5", "anchor"), "preserve": ("6", "prompts")},
        "Takes a concept out of a model in seconds, without training. The file of the model stays as it is.",
    ),
}


def _edge_links(graph: Graph, spec: Blueprint) -> dict[tuple[str, int], list[tuple[str, str]]]:
    """By output of a node left out, the inputs inside that take it."""
    links: dict[tuple[str, int], list[tuple[str, str]]] = {}
    for identity, node in graph.items():
        for name, value in node["inputs"].items():
            outside = identity not in spec.left_out and isinstance(value, list) and value[0] in spec.left_out
            if outside and (identity, name) not in spec.values:
                links.setdefault((value[0], value[1]), []).append((identity, name))
    return dict(sorted(links.items()))


def _entries(graph: Graph, spec: Blueprint, object_info: dict[str, Any]) -> list[_Port]:
    """The inputs of the blueprint: first the sockets, then the widgets."""
    sockets = [
        _Port(object_info[graph[node]["class_type"]]["output_name"][slot].lower(), kind, tuple(targets))
        for (node, slot), targets in _edge_links(graph, spec).items()
        for kind in [object_info[graph[node]["class_type"]]["output"][slot]]
    ]
    kinds = {
        (node, name): kind for node in graph for name, kind, _ in inputs_of(object_info[graph[node]["class_type"]])
    }
    return sockets + [_Port(label, kinds[at], (at,), True) for label, at in spec.widgets.items()]


def _exits(graph: Graph, spec: Blueprint) -> list[tuple[str, int]]:
    """The outputs of the blueprint: what nodes inside give to nodes left out, each once, and the last node's first."""
    outer = (v for n in spec.left_out for v in graph[n]["inputs"].values() if isinstance(v, list))
    given = {(value[0], value[1]) for value in outer if value[0] not in spec.left_out}
    return sorted(given, key=lambda output: (-int(output[0]), output[1]))


def _entered(graph: Graph, entries: list[_Port]) -> Graph:
    """The graph with every input of the blueprint linked to its edge."""
    linked = {identity: node | {"inputs": dict(node["inputs"])} for identity, node in graph.items()}
    for slot, port in enumerate(entries):
        for node, name in port.targets:
            linked[node]["inputs"][name] = [str(_ENTRY), slot]
    return linked


def _end(name: str, label: str, kind: str, links: Iterable[int]) -> dict[str, Any]:
    """An input or output as the definition of a subgraph has it."""
    return {"id": identity_of(f"{name}/{label}"), "name": label, "type": kind, "linkIds": list(links)}


def _inside(graph: Graph, spec: Blueprint) -> Graph:
    """The nodes of the blueprint, without links from outside."""
    inside = without(spec.left_out, graph)
    for (node, name), value in spec.values.items():
        inside[node]["inputs"][name] = value
    return inside


def _outputs(name: str, exits: list[tuple[str, int]], nodes: Graph, rows: list[list[Any]]) -> list[dict[str, Any]]:
    """The outputs of the definition; their links are entered in ``nodes`` and ``rows``."""
    outputs = []
    for slot, (node, given) in enumerate(exits):
        output = nodes[node]["outputs"][given]
        rows.append([len(rows) + 1, int(node), given, _EXIT, slot, output["type"]])
        output["links"].append(len(rows))
        outputs.append(_end(f"{name}/out", output["name"], output["type"], [len(rows)]))
    return outputs


def _definition(name: str, spec: Blueprint, object_info: dict[str, Any]) -> dict[str, Any]:
    """The subgraph: what the blueprint's node stands for."""
    graph = json.loads((API / f"{spec.source}.json").read_text())
    inside, entries = _inside(graph, spec), _entries(graph, spec, object_info)
    nodes, boxes, rows = parts(_entered(inside, entries), object_info)
    for identity, plain in parts(inside, object_info)[0].items():
        nodes[identity]["widgets_values"] = plain["widgets_values"]
    taken = [[row[0] for row in rows if row[1:3] == [_ENTRY, slot]] for slot in range(len(entries))]
    inputs = [_end(f"{name}/in", port.label, port.kind, links) for port, links in zip(entries, taken, strict=True)]
    outputs = _outputs(name, _exits(graph, spec), nodes, rows)
    return {
        "id": identity_of(f"subgraphs/{name}"),
        "name": name,
        "category": _CATEGORY,
        "description": spec.description,
        **_frame(boxes, max(map(int, nodes)), len(rows)),
        "inputs": inputs,
        "outputs": outputs,
        "nodes": list(nodes.values()),
        "groups": boxes,
        "links": [dict(zip(_LINK, row, strict=True)) for row in rows],
    }


def _frame(boxes: list[dict[str, Any]], last_node: int, last_link: int) -> dict[str, Any]:
    """What a definition has around its nodes: the two edges, and the numbers it has used."""
    right = max(box["bounding"][0] + box["bounding"][2] for box in boxes) + _AWAY - _EDGE[0]
    return {
        "version": 1,
        "revision": 0,
        "config": {},
        "extra": {},
        "widgets": [],
        "state": {"lastGroupId": len(boxes), "lastNodeId": last_node, "lastLinkId": last_link, "lastRerouteId": 0},
        "inputNode": {"id": _ENTRY, "bounding": [-_AWAY, 0, *_EDGE]},
        "outputNode": {"id": _EXIT, "bounding": [right, 0, *_EDGE]},
    }


def _socket(end: dict[str, Any], is_widget: bool) -> dict[str, Any]:
    """An input of the blueprint's node."""
    socket = {"name": end["name"], "type": end["type"], "link": None}
    return socket | ({"widget": {"name": end["name"]}} if is_widget else {})


def _node(name: str, spec: Blueprint, definition: dict[str, Any]) -> dict[str, Any]:
    """The node that stands for the subgraph."""
    long = sum(widget in ("text", "prompt", "prompts") for _, widget in spec.widgets.values())
    return {
        "id": definition["state"]["lastNodeId"] + 1,
        "type": definition["id"],
        "pos": [0, 0],
        "size": [COLUMN + 80, 60 + ROW * len(definition["inputs"]) + _LONG * long],
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": [_socket(end, end["name"] in spec.widgets) for end in definition["inputs"]],
        "outputs": [{"name": end["name"], "type": end["type"], "links": []} for end in definition["outputs"]],
        "title": name,
        "properties": core_origin(),
        "widgets_values": [],
    }


def blueprint(name: str, object_info: dict[str, Any]) -> dict[str, Any]:
    """The workflow that holds the blueprint's one node.

    Raises:
        KeyError: no such blueprint, or a class or an input the host does not have.
    """
    definition = _definition(name, BLUEPRINTS[name], object_info)
    node = _node(name, BLUEPRINTS[name], definition)
    state = {"id": identity_of(f"blueprints/{name}"), "revision": 0, "last_node_id": node["id"], "last_link_id": 0}
    return state | {"nodes": [node], "links": [], "version": 0.4, "definitions": {"subgraphs": [definition]}}


def text_of_blueprint(name: str, object_info: dict[str, Any]) -> str:
    """The file of a blueprint."""
    return json.dumps(blueprint(name, object_info), indent=1, ensure_ascii=False) + "\n"


def write_blueprints(object_info: dict[str, Any]) -> list[Path]:
    """Writes every blueprint into ``subgraphs`` and returns the files."""
    for name in BLUEPRINTS:
        (FOLDER / f"{name}.json").write_text(text_of_blueprint(name, object_info))
    return [FOLDER / f"{name}.json" for name in BLUEPRINTS]
