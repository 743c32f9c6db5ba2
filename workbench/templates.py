"""The templates in UI format, made from the graphs in API format so that the two cannot drift.

``workflows/api/NAME.json`` is the source. ``workflows/NAME.json`` is the same graph as the editor stores it: nodes with
places, links as rows, and widget values by position, which only the host's ``/object_info`` can tell.
"""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any

from .gallery import API, CHECKPOINTS, UI
from .server import HostServer
from .thumbnails import make
from .twins import write_all

_WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
_SEEDS = ("seed", "noise_seed")
_COLUMN, _GAP, _ROW = 320, 40, 26  # px
_NOTE = [340, 360]
_UNQUEUED = ("MarkdownNote",)


def _type_of(declared: list[Any]) -> str:
    """A socket's or widget's type as the editor names it; an old-style combo is a list of its options."""
    return "COMBO" if isinstance(declared[0], list) else str(declared[0])


def inputs_of(info: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """Name, type and options of every input of a class, in the order the host declares them."""
    sections = info["input"]
    return [
        (name, _type_of(declared), declared[1] if len(declared) > 1 else {})
        for section in ("required", "optional")
        for name, declared in (sections.get(section) or {}).items()
    ]


def _is_widget(kind: str, options: dict[str, Any]) -> bool:
    return kind in _WIDGETS and not options.get("forceInput")


def _columns(graph: dict[str, Any]) -> dict[str, int]:
    """Each node's column: one more than the furthest node it takes something from."""
    columns: dict[str, int] = {}

    def column(node: str) -> int:
        if node not in columns:
            sources = [v[0] for v in graph[node]["inputs"].values() if isinstance(v, list)]
            columns[node] = 1 + max((column(s) for s in sources), default=-1)
        return columns[node]

    for node in graph:
        column(node)
    return columns


def _widget_values(inputs: list[tuple[str, str, dict[str, Any]]], given: dict[str, Any]) -> list[Any]:
    """Widget values by position; after a seed the editor stores what happens to it between runs."""
    values: list[Any] = []
    for name, kind, options in inputs:
        if not _is_widget(kind, options):
            continue
        values.append(given[name] if name in given and not isinstance(given[name], list) else options.get("default"))
        if options.get("control_after_generate") or (kind == "INT" and name in _SEEDS):
            values.append("fixed")
    return values


def to_ui(name: str, graph: dict[str, Any], object_info: dict[str, Any]) -> dict[str, Any]:
    """The graph in UI format.

    Raises:
        KeyError: a class or an input the host does not have.
    """
    links: list[list[Any]] = []
    nodes: dict[str, dict[str, Any]] = {}
    heights: dict[int, int] = {}
    columns = _columns(graph)
    for order, (identity, node) in enumerate(sorted(graph.items(), key=lambda item: (columns[item[0]], int(item[0])))):
        info = object_info[node["class_type"]]
        inputs = inputs_of(info)
        widgets = _widget_values(inputs, node["inputs"])
        sockets: list[tuple[str, str, dict[str, Any]]] = [(n, k, {}) for n, k, o in inputs if not _is_widget(k, o)]
        sockets += [  # a widget that takes its value from a link has a socket too
            (n, k, {"widget": {"name": n}})
            for n, k, o in inputs
            if _is_widget(k, o) and isinstance(node["inputs"].get(n), list)
        ]
        multiline = any(o.get("multiline") for _, k, o in inputs if k == "STRING")
        height = 60 + _ROW * (max(len(sockets), len(info["output"])) + len(widgets)) + (80 if multiline else 0)
        if info["output_node"]:
            height += 220  # room for the preview
        if any("widgetType" in o for _, _, o in inputs):
            height += 400  # room for a widget of ours
        top = heights.get(columns[identity], 0)
        heights[columns[identity]] = top + height + _GAP
        nodes[identity] = {
            "id": int(identity),
            "type": node["class_type"],
            "pos": [columns[identity] * (_COLUMN + _GAP), top],
            "size": [_COLUMN, height],
            "flags": {},
            "order": order,
            "mode": 0,
            "inputs": [{"name": n, "type": k, "link": None} | more for n, k, more in sockets],
            "outputs": [
                {"name": name, "type": kind, "links": []}
                for name, kind in zip(info["output_name"], info["output"], strict=True)
            ],
            "properties": {"Node name for S&R": node["class_type"]},
            "widgets_values": widgets,
        }
        if title := node.get("_meta", {}).get("title"):
            nodes[identity]["title"] = title
    for identity, node in graph.items():
        for socket, declared in enumerate(nodes[identity]["inputs"]):
            source = node["inputs"].get(declared["name"])
            if not isinstance(source, list):
                continue
            link = len(links) + 1
            links.append([link, int(source[0]), source[1], int(identity), socket, declared["type"]])
            declared["link"] = link
            nodes[source[0]]["outputs"][source[1]]["links"].append(link)
    return {
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"comfyui-concepts/{name}")), "revision": 0,
        "last_node_id": max(map(int, nodes)), "last_link_id": len(links),
        "nodes": list(nodes.values()), "links": links, "groups": [], "config": {}, "extra": {}, "version": 0.4,
    }  # fmt: skip


def completed(graph: dict[str, Any], object_info: dict[str, Any]) -> dict[str, Any]:
    """The graph with the default of every widget it leaves out, as the editor would queue it: widgets come with time."""
    return {
        identity: node
        | {
            "inputs": node["inputs"]
            | {
                name: options["default"]
                for name, kind, options in inputs_of(object_info[node["class_type"]])
                if _is_widget(kind, options) and name not in node["inputs"] and "default" in options
            }
        }
        for identity, node in graph.items()
    }


def _complete(path: Path, object_info: dict[str, Any]) -> None:
    graph = json.loads(path.read_text())
    if (whole := completed(graph, object_info)) != graph:
        path.write_text(json.dumps(whole, indent=2, ensure_ascii=False) + "\n")


def to_api(workflow: dict[str, Any], object_info: dict[str, Any]) -> dict[str, Any]:
    """The graph in API format, as the editor would queue it."""
    sources = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    graph: dict[str, Any] = {}
    for node in workflow["nodes"]:
        if node["type"] in _UNQUEUED:
            continue
        inputs: dict[str, Any] = {}
        values = iter(node["widgets_values"])
        for name, kind, options in inputs_of(object_info[node["type"]]):
            if _is_widget(kind, options):
                inputs[name] = next(values)
                if options.get("control_after_generate") or (kind == "INT" and name in _SEEDS):
                    next(values)
        inputs |= {s["name"]: sources[s["link"]] for s in node["inputs"] if s["link"] is not None}
        graph[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
        if "title" in node:
            graph[str(node["id"])]["_meta"] = {"title": node["title"]}
    return graph


def _with_note(workflow: dict[str, Any], text: str) -> dict[str, Any]:
    """The template with a note to the left of its nodes, which the editor shows and never queues."""
    note = {
        "id": workflow["last_node_id"] + 1, "type": "MarkdownNote", "title": "What this is",
        "pos": [-(_NOTE[0] + _GAP), 0], "size": _NOTE, "flags": {}, "order": len(workflow["nodes"]), "mode": 0, "inputs": [], "outputs": [],
        "properties": {}, "widgets_values": [text], "color": "#232", "bgcolor": "#353",
    }  # fmt: skip
    return workflow | {"last_node_id": note["id"], "nodes": [*workflow["nodes"], note]}


def render(path: Path, object_info: dict[str, Any]) -> str:
    """The text of the template for one graph in API format, with its note if there is one."""
    workflow = to_ui(path.stem, json.loads(path.read_text()), object_info)
    note = UI / "notes" / f"{path.stem}.md"
    if note.exists():
        workflow = _with_note(workflow, note.read_text().strip())
    return json.dumps(workflow, indent=1, ensure_ascii=False) + "\n"


def main(arguments: list[str]) -> int:
    """``dev.py workflows``: makes every template anew; with ``--thumbnails [NAME …]`` runs graphs for their pictures too."""
    with HostServer(Path(os.environ["COMFYUI_PATH"])) as server:
        server.wait()
        object_info = server.get("/object_info")
        for path in [*API.glob("*.json"), *CHECKPOINTS.glob("*.json")]:
            _complete(path, object_info)
        write_all()
        if arguments[:1] == ["--thumbnails"]:
            for made in make(server, arguments[1:]):
                print(made)
    for path in sorted([*API.glob("*.json"), *CHECKPOINTS.glob("*.json")]):
        (UI / path.name).write_text(render(path, object_info))
        print(UI / path.name)
    return 0
