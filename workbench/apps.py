"""The apps: templates that newer pages open as a form with a Run button, and page 1.32.9 in an early kind of form.

The page keeps an app in the workflow's ``extra``: ``linearMode`` says to open it as one, ``linearData`` which widgets
the form has and which nodes' pictures it shows. A widget's label on the form is that of its socket.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class App:
    """What the form has.

    Attributes:
        inputs: by label on the form, the node and the widget.
        outputs: the nodes that save what it shows.
    """

    inputs: dict[str, tuple[str, str]]
    outputs: tuple[str, ...]


_TWO_BOXES = {"boxes": ("4", "regions"), "left": ("2", "text"), "right": ("3", "text"), "seed": ("12", "seed")}

APPS = {
    "app_two_boxes": App(_TWO_BOXES, ("14",)),
    "app_two_boxes_sd15": App({"checkpoint": ("1", "ckpt_name")} | _TWO_BOXES, ("14",)),
}
"""By the name of its template."""


def as_app(workflow: dict[str, Any], app: App) -> dict[str, Any]:
    """The workflow as one that opens as a form.

    Raises:
        KeyError: a node or a widget the workflow does not have.
    """
    nodes = {str(node["id"]): node for node in workflow["nodes"]}
    for label, (node, widget) in app.inputs.items():
        sockets = {socket["name"]: socket for socket in nodes[node]["inputs"]}
        sockets[widget]["label"] = label
    data = {"inputs": [list(at) for at in app.inputs.values()], "outputs": list(app.outputs)}
    return workflow | {"extra": workflow["extra"] | {"linearMode": True, "linearData": data}}
