"""A graph in API format as the editor stores it: nodes in boxes, links as rows, widget values by position."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

from .groups import COLUMN, in_order, place
from .registry import models_of, origin_of

Graph = dict[str, Any]
InputOf = tuple[str, str, dict[str, Any]]
"""Name, type and options of an input."""
_WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
_SEEDS = ("seed", "noise_seed")
ROW = 26  # px
_MULTILINE, _PREVIEW, _OWN_WIDGET = 80, 220, 400  # px of extra height


def _type_of(declared: list[Any]) -> str:
    """A socket's or widget's type as the editor names it; an old-style combo is a list of its options."""
    return "COMBO" if isinstance(declared[0], list) else str(declared[0])


def inputs_of(info: dict[str, Any]) -> list[InputOf]:
    """Name, type and options of every input of a class, in the order the host declares them."""
    sections = info["input"]
    return [
        (name, _type_of(declared), declared[1] if len(declared) > 1 else {})
        for section in ("required", "optional")
        for name, declared in (sections.get(section) or {}).items()
    ]


def is_widget(kind: str, options: dict[str, Any]) -> bool:
    return kind in _WIDGETS and not options.get("forceInput")


def has_control(name: str, kind: str, options: dict[str, Any]) -> bool:
    """Whether the editor stores behind the value what happens to it between runs, as with a seed."""
    return bool(options.get("control_after_generate")) or (kind == "INT" and name in _SEEDS)


def _widget_values(inputs: list[InputOf], given: dict[str, Any]) -> list[Any]:
    """Widget values by position, a seed's with its control."""
    values: list[Any] = []
    for name, kind, options in inputs:
        if not is_widget(kind, options):
            continue
        values.append(given[name] if name in given and not isinstance(given[name], list) else options.get("default"))
        if has_control(name, kind, options):
            values.append("fixed")
    return values


def _sockets(inputs: list[InputOf]) -> list[dict[str, Any]]:
    """The inputs as the page saves them: those that only take links, then the widgets, which can take one instead."""
    sockets = [{"name": n, "type": k, "link": None} for n, k, o in inputs if not is_widget(k, o)]
    widgets = [(n, k) for n, k, o in inputs if is_widget(k, o)]
    return sockets + [{"name": n, "type": k, "link": None, "widget": {"name": n}} for n, k in widgets]


def _height(info: dict[str, Any], inputs: list[InputOf], widgets: int) -> int:
    """The height of a node with so many values of widgets."""
    sockets = sum(not is_widget(kind, options) for _, kind, options in inputs)
    height = 60 + ROW * (max(sockets, len(info["output"])) + widgets)
    height += _MULTILINE if any(options.get("multiline") for _, kind, options in inputs if kind == "STRING") else 0
    height += _PREVIEW if info["output_node"] else 0
    return height + (_OWN_WIDGET if any("widgetType" in options for _, _, options in inputs) else 0)


def _properties(kind: str, info: dict[str, Any], widgets: list[Any]) -> dict[str, Any]:
    """What the page needs to find a node that is missing, its pack and its model files."""
    models = models_of(widgets)
    return {"Node name for S&R": kind} | origin_of(info) | ({"models": models} if models else {})


def _outputs(info: dict[str, Any]) -> list[dict[str, Any]]:
    """The outputs that every supported host has. Newer hosts let their own nodes that save or show pass on pictures."""
    if info["output_node"] and not info["python_module"].startswith("custom_nodes."):
        return []
    return [{"name": n, "type": k, "links": []} for n, k in zip(info["output_name"], info["output"], strict=True)]


def _ui_node(identity: str, node: dict[str, Any], info: dict[str, Any], order: int) -> dict[str, Any]:
    """One node at the top left corner."""
    inputs = inputs_of(info)
    widgets, sockets = _widget_values(inputs, node["inputs"]), _sockets(inputs)
    made = {
        "id": int(identity),
        "type": node["class_type"],
        "pos": [0, 0],
        "size": [COLUMN, _height(info, inputs, len(widgets))],
        "flags": {},
        "order": order,
        "mode": 0,
        "inputs": sockets,
        "outputs": _outputs(info),
        "properties": _properties(node["class_type"], info, widgets),
        "widgets_values": widgets,
    }
    title = node.get("_meta", {}).get("title")
    return made | ({"title": title} if title else {})


def _nodes(graph: Graph, object_info: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """All nodes in the order of the boxes, each at the top left corner."""
    kinds = {identity: object_info[graph[identity]["class_type"]] for identity in in_order(graph)}
    return {
        identity: _ui_node(identity, graph[identity], info, order)
        for order, (identity, info) in enumerate(kinds.items())
    }


def _links(graph: Graph, nodes: dict[str, dict[str, Any]]) -> Iterator[list[Any]]:
    """Every link as a row; it is entered in the two nodes it connects."""
    number = 0
    for identity, node in graph.items():
        for socket, declared in enumerate(nodes[identity]["inputs"]):
            source = node["inputs"].get(declared["name"])
            if not isinstance(source, list):
                continue
            number += 1
            declared["link"] = number
            if source[0] in nodes:  # else it comes from the edge of a subgraph
                nodes[source[0]]["outputs"][source[1]]["links"].append(number)
            yield [number, int(source[0]), source[1], int(identity), socket, declared["type"]]


def identity_of(name: str) -> str:
    """The id of what has this name: the same in every making."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"comfyui-concepts/{name}"))


def parts(graph: Graph, object_info: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]], list[list[Any]]]:
    """The nodes by id, the boxes around them, and the links as rows.

    Raises:
        KeyError: a class or an input the host does not have.
    """
    nodes = _nodes(graph, object_info)
    return nodes, place(graph, nodes), list(_links(graph, nodes))


def to_ui(name: str, graph: Graph, object_info: dict[str, Any]) -> dict[str, Any]:
    """The graph in UI format.

    Raises:
        KeyError: a class or an input the host does not have.
    """
    nodes, groups, links = parts(graph, object_info)
    return {
        "id": identity_of(name),
        "revision": 0,
        "last_node_id": max(map(int, nodes)),
        "last_link_id": len(links),
        "nodes": list(nodes.values()),
        "links": links,
        "groups": groups,
        "config": {},
        "extra": {},
        "version": 0.4,
    }
