"""The English of every node as a language of its own: ``locales/en/nodeDefs.json``, made from what the host says of it.

The other languages hold the same entries. ComfyUI's page does not need the file: it has the English from the nodes
themselves. A translator starts from it, and translation tools expect it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .server import HostServer
from .ui_graph import inputs_of

ENGLISH = Path(__file__).resolve().parent.parent / "locales" / "en" / "nodeDefs.json"


def _text(name: str, tooltip: str | None) -> dict[str, str]:
    """What the page shows of an input or output."""
    return {"name": name, "tooltip": tooltip or ""}


def _node(info: dict[str, Any]) -> dict[str, Any]:
    """The texts of one node, as the page looks them up; a part without any is left out."""
    texts: dict[str, Any] = {"display_name": info["display_name"], "description": info["description"]}
    outputs = enumerate(zip(info["output_name"], info["output_tooltips"], strict=True))
    sockets = {
        "inputs": {
            name: _text(options.get("display_name") or name, options.get("tooltip"))
            for name, _, options in inputs_of(info)
        },
        "outputs": {str(at): _text(name, tooltip) for at, (name, tooltip) in outputs},
    }
    return texts | {part: held for part, held in sockets.items() if held}


def english(object_info: dict[str, Any]) -> dict[str, Any]:
    """Every text of every node of ours by node id, in the host's order."""
    return {name: _node(info) for name, info in object_info.items() if name.startswith("Concepts")}


def main(arguments: list[str]) -> None:
    """Writes the file; it takes no arguments."""
    if arguments:
        raise SystemExit("languages takes no arguments: it writes locales/en/nodeDefs.json from the host's nodes.")
    with HostServer(Path(os.environ["COMFYUI_PATH"])) as server:
        server.wait()
        made = english(server.get("/object_info"))
    ENGLISH.parent.mkdir(parents=True, exist_ok=True)
    ENGLISH.write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n")
