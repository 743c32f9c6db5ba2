"""A node schema that loads on every supported host."""

from __future__ import annotations

import dataclasses

from comfy_api.latest import io

_FIELDS = {field.name for field in dataclasses.fields(io.Schema)}


def schema(**fields: object) -> io.Schema:
    """``io.Schema`` of the fields this host knows; newer ones, such as ``search_aliases``, are dropped on older
    hosts."""
    return io.Schema(**{name: value for name, value in fields.items() if name in _FIELDS})


def with_widget(socket: io.Input, widget: str) -> io.Input:
    """The socket, edited in the page by the widget of that name; its type, and what an API graph holds, stay as they
    are.

    The host sends the option of this name to the page for every input, but lets only its own inputs set it.
    """
    described = socket.as_dict
    socket.as_dict = lambda: described() | {"widgetType": widget}
    return socket
