"""A twin of a graph for the user's own checkpoints: the same graph with another loader, canvas and prompts.

It says what it changes. The rest comes from its source, so the two cannot drift.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .gallery import API
from .public_models import DEMO, DEMO_SIDE, PublicModel

_LENGTHS = ("width", "height", "left", "top", "right", "bottom")


@dataclass(frozen=True)
class Twin:
    """What a twin does differently.

    Attributes:
        source: the graph it is the twin of.
        model: a public one; the person chooses their own of the same family.
        values: by node and input.
        left_out: nodes that know the demo model alone; what they are linked to does without.
    """

    source: str
    model: PublicModel
    values: dict[tuple[str, str], Any]
    left_out: tuple[str, ...] = ()


def twin_graph(twin: Twin) -> dict[str, Any]:
    """The twin in API format.

    Raises:
        KeyError: a node or an input its source does not have.
    """
    model = twin.model
    graph = without(twin.left_out, json.loads((API / f"{twin.source}.json").read_text()))
    for node in graph.values():
        for name, value in node["inputs"].items():
            if isinstance(value, list) and value[0] == DEMO:
                node["inputs"][name] = list(model.outputs[value[1]])
            elif name in _LENGTHS and isinstance(value, int):
                node["inputs"][name] = value * model.side // DEMO_SIDE
    graph = {DEMO: {}} | graph | dict(model.nodes)
    for (node_id, name), value in twin.values.items():
        inputs = graph[node_id]["inputs"]
        inputs[name] = value if name in inputs else inputs[name]
    return graph


def without(nodes: Sequence[str], graph: dict[str, Any]) -> dict[str, Any]:
    """The graph without some nodes and without the links from them."""
    return {
        identity: node
        | {"inputs": {k: v for k, v in node["inputs"].items() if not (isinstance(v, list) and v[0] in nodes)}}
        for identity, node in graph.items()
        if identity not in nodes
    }


def text_of(twin: Twin) -> str:
    """The file of a twin."""
    return json.dumps(twin_graph(twin), indent=2, ensure_ascii=False) + "\n"
