"""The host's node API in one version, and a node schema that loads on every supported host.

Nodes take ``io`` and ``ui`` from here: ``latest`` changes with every host, a numbered version should not.
"""

from __future__ import annotations

import dataclasses

try:
    from comfy_api.v0_0_2 import ComfyExtension, io, ui
except ImportError:  # a host to come that no longer has this version
    from comfy_api.latest import ComfyExtension, io, ui

__all__ = ["ComfyExtension", "io", "schema", "ui", "with_widget"]

_FIELDS = {field.name for field in dataclasses.fields(io.Schema)}


def schema(**fields: object) -> io.Schema:
    """``io.Schema`` of the fields this host knows; newer ones, such as ``search_aliases``, are dropped on older
    hosts."""
    return io.Schema(**{name: value for name, value in fields.items() if name in _FIELDS})


def with_widget(wire: io.Input, widget: str) -> io.Input:
    """The input, edited in the page by the widget of that name; its type, and what an API graph holds, stay as they
    are.

    The host sends the option of this name to the page for every input, but lets only its own inputs set it.
    """
    described = wire.as_dict
    wire.as_dict = lambda: described() | {"widgetType": widget}
    return wire
