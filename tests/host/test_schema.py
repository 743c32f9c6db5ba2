"""Which version of the host's node API the nodes are written against."""

from __future__ import annotations

import importlib.util
import sys

import comfy_api.latest
import comfy_api.v0_0_2
from comfyui_concepts.host import schema


def test_the_nodes_use_the_pinned_version():
    assert schema.ComfyExtension is comfy_api.v0_0_2.ComfyExtension
    assert (schema.io, schema.ui) == (comfy_api.v0_0_2.io, comfy_api.v0_0_2.ui)


def test_a_host_without_that_version_is_used_with_its_latest(monkeypatch):
    monkeypatch.setitem(sys.modules, "comfy_api.v0_0_2", None)  # what Python looks at first; None means: not there
    spec = importlib.util.spec_from_file_location("schema_on_a_host_to_come", schema.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (module.io, module.ui) == (comfy_api.latest.io, comfy_api.latest.ui)
    assert module.schema(node_id="A", outputs=[], of_no_host=1).node_id == "A"
