"""A node schema that loads on every supported host."""

from __future__ import annotations

import dataclasses

from comfy_api.latest import io

_FIELDS = {field.name for field in dataclasses.fields(io.Schema)}


def schema(**fields: object) -> io.Schema:
    """``io.Schema`` of the fields this host knows; newer ones, such as ``search_aliases``, are dropped on older hosts."""
    return io.Schema(**{name: value for name, value in fields.items() if name in _FIELDS})
