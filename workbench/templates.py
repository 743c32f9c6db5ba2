"""The templates in UI format, made from the graphs in API format: the two cannot drift.

``workflows/api/NAME.json`` is the source. ``workflows/NAME.json`` is the same graph as the editor stores it. The
positions of its widget values come from the host's ``/object_info``.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .apps import APPS, as_app
from .blueprints import write_blueprints
from .gallery import API, CHECKPOINTS, UI
from .groups import GAP
from .registry import core_origin
from .server import HostServer
from .thumbnails import make
from .twins import write_all
from .ui_graph import has_control, inputs_of, is_widget, to_ui

_NOTE = [340, 360]
_UNQUEUED = ("MarkdownNote",)


def completed(graph: dict[str, Any], object_info: dict[str, Any]) -> dict[str, Any]:
    """The graph with the default of every widget it leaves out, as the editor would queue it."""

    def inputs(node: dict[str, Any]) -> dict[str, Any]:
        missing = {
            name: options["default"]
            for name, kind, options in inputs_of(object_info[node["class_type"]])
            if is_widget(kind, options) and name not in node["inputs"] and "default" in options
        }
        return node["inputs"] | missing

    return {identity: node | {"inputs": inputs(node)} for identity, node in graph.items()}


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
            if is_widget(kind, options):
                inputs[name] = next(values)
                if has_control(name, kind, options):
                    next(values)
        inputs |= {s["name"]: sources[s["link"]] for s in node["inputs"] if s["link"] is not None}
        graph[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
        if "title" in node:
            graph[str(node["id"])]["_meta"] = {"title": node["title"]}
    return graph


def _with_note(workflow: dict[str, Any], text: str) -> dict[str, Any]:
    """The template with a note to the left of its nodes, which the editor shows and never queues."""
    note = {
        "id": workflow["last_node_id"] + 1,
        "type": "MarkdownNote",
        "title": "What this is",
        "pos": [-(_NOTE[0] + GAP), 0],
        "size": _NOTE,
        "flags": {},
        "order": len(workflow["nodes"]),
        "mode": 0,
        "inputs": [],
        "outputs": [],
        "properties": core_origin(),
        "widgets_values": [text],
        "color": "#232",
        "bgcolor": "#353",
    }
    return workflow | {"last_node_id": note["id"], "nodes": [*workflow["nodes"], note]}


def render(path: Path, object_info: dict[str, Any]) -> str:
    """The text of the template for one graph in API format, with its note if there is one."""
    workflow = to_ui(path.stem, json.loads(path.read_text()), object_info)
    if path.stem in APPS:
        workflow = as_app(workflow, APPS[path.stem])
    note = UI / "notes" / f"{path.stem}.md"
    if note.exists():
        workflow = _with_note(workflow, note.read_text().strip())
    return json.dumps(workflow, indent=1, ensure_ascii=False) + "\n"


def main(arguments: list[str]) -> int:
    """``dev.py workflows``: makes all templates and blueprints again, with ``--thumbnails [NAME …]`` pictures too."""
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
    print(*write_blueprints(object_info), sep="\n")
    return 0
