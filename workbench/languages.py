"""The English of every node as a language of its own: ``locales/en/nodeDefs.json``, made from the schemas.

The other languages hold the same entries. ComfyUI's page does not need the file: it has the English from the nodes
themselves. A translator starts from it, and translation tools expect it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..host.schema import io
from ..nodes import NODES

ENGLISH = Path(__file__).resolve().parent.parent / "locales" / "en" / "nodeDefs.json"


def _socket(socket: io.Input | io.Output) -> dict[str, str]:
    """What the page shows of an input or output."""
    return {"name": socket.display_name or socket.id, "tooltip": socket.tooltip or ""}


def _node(schema: io.Schema) -> dict[str, Any]:
    """The texts of one node, as the page looks them up; a part without any is left out."""
    texts: dict[str, Any] = {"display_name": schema.display_name, "description": schema.description}
    sockets = {
        "inputs": {socket.id: _socket(socket) for socket in schema.inputs},
        "outputs": {str(at): _socket(socket) for at, socket in enumerate(schema.outputs)},
    }
    return texts | {part: held for part, held in sockets.items() if held}


def english() -> dict[str, Any]:
    """Every text of every node by node id, in menu order."""
    return {schema.node_id: _node(schema) for schema in (node.GET_SCHEMA() for node in NODES)}


def main(arguments: list[str]) -> None:
    """Writes the file; it takes no arguments."""
    if arguments:
        raise SystemExit("languages takes no arguments: it writes locales/en/nodeDefs.json from the nodes' schemas.")
    ENGLISH.parent.mkdir(parents=True, exist_ok=True)
    ENGLISH.write_text(json.dumps(english(), indent=1, ensure_ascii=False) + "\n")
