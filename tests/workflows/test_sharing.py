"""What a template tells a person who does not have everything it needs, and how it looks when it opens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tomllib
from comfyui_concepts.workbench.groups import ROLES, ranks
from comfyui_concepts.workbench.ui_graph import inputs_of

ROOT = Path(__file__).resolve().parent.parent.parent
TEMPLATES = sorted((ROOT / "workflows").glob("*.json"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TITLE = 30  # px above a node's position
each_template = pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)


def _template(path):
    return json.loads(path.read_text())


def _nodes(path):
    """The nodes without the note."""
    return [node for node in _template(path)["nodes"] if node["type"] != "MarkdownNote"]


def _area(node):
    (left, top), (width, height) = node["pos"], node["size"]
    return left, top - TITLE, left + width, top + height


def _box_area(box):
    left, top, width, height = box["bounding"]
    return left, top, left + width, top + height


def _holds(outer, inner):
    return all(a <= b for a, b in zip(outer[:2], inner[:2], strict=True)) and all(
        a >= b for a, b in zip(outer[2:], inner[2:], strict=True)
    )


LOADERS = {
    "CheckpointLoaderSimple": "checkpoints",
    "UNETLoader": "diffusion_models",
    "CLIPLoader": "text_encoders",
    "DualCLIPLoader": "text_encoders",
    "VAELoader": "vae",
}
"""By class, the folder of what it loads."""


def _touch(one, other):
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


@each_template
def test_every_node_says_which_pack_and_version_it_is_of(path, object_info):
    ours = {"cnr_id": PROJECT["project"]["name"], "ver": PROJECT["project"]["version"]}
    core = {"cnr_id": "comfy-core", "ver": PROJECT["tool"]["comfy"]["requires-comfyui"].removeprefix(">=")}
    for node in _template(path)["nodes"]:
        info = object_info.get(node["type"], {"python_module": "nodes"})  # the note is the page's own
        expected = core if info["python_module"].split(".")[0] in ("nodes", "comfy_extras") else ours
        assert node["properties"] | expected == node["properties"], node["type"]


@each_template
def test_a_public_file_comes_with_its_address_and_no_other_file_does(path, object_info):
    for node in _nodes(path):
        links = node["properties"].get("models", [])
        files = [v for v in node["widgets_values"] if isinstance(v, str) and v.endswith(".safetensors")]
        for link in links:
            assert link["name"] in files
            assert link["url"].startswith("https://huggingface.co/")
            _hub, _, path = link["url"].partition("/resolve/main/")
            inside = f"{link['directory']}/{link['name']}"
            assert path in (link["name"], inside, f"split_files/{inside}")
        linked = {link["name"]: link["directory"] for link in links}
        if node["type"] in LOADERS:
            assert linked == dict.fromkeys(files, LOADERS[node["type"]])
        assert not any(name.startswith(("concepts-demo", "my_")) for name in linked)


@each_template
def test_every_node_stands_in_one_box_and_nothing_overlaps(path):
    nodes, boxes = _nodes(path), _template(path)["groups"]
    assert {box["title"] for box in boxes} <= set(ROLES)
    areas, box_areas = [_area(node) for node in nodes], [_box_area(box) for box in boxes]
    for area in areas:
        assert [_holds(box, area) for box in box_areas].count(True) == 1
    for same in (areas, box_areas):
        assert not any(_touch(one, other) for at, one in enumerate(same) for other in same[:at])
    assert all(any(_holds(box, area) for area in areas) for box in box_areas)
    (note,) = (node for node in _template(path)["nodes"] if node["type"] == "MarkdownNote")
    assert not any(_touch(_area(note), box) for box in box_areas)


@each_template
def test_no_link_leads_back_to_a_box_further_left(path):
    nodes = {node["id"]: node for node in _nodes(path)}
    boxes = [_box_area(box) for box in _template(path)["groups"]]

    def box_of(node):
        return next(at for at, box in enumerate(boxes) if _holds(box, _area(nodes[node])))

    links = _template(path)["links"]
    assert links
    assert all(box_of(source) <= box_of(target) for _, source, _, target, _, _ in links)
    assert all(nodes[source]["order"] < nodes[target]["order"] for _, source, _, target, _, _ in links)


@each_template
def test_every_prompt_node_has_a_title(path, object_info):
    for node in _nodes(path):
        info = object_info[node["type"]]
        writes = any(options.get("multiline") for _, kind, options in inputs_of(info) if kind == "STRING")
        if writes and "CONDITIONING" in info["output"]:
            assert node.get("title"), f"{node['type']} {node['id']}"


def test_a_class_without_a_box_is_refused_with_what_to_do():
    graph = {"1": {"class_type": "SomethingNew", "inputs": {}}}
    with pytest.raises(ValueError, match="SomethingNew.*ROLES of workbench/groups.py"):
        ranks(graph)


def test_a_node_stands_no_further_left_than_what_it_takes():
    """A prompt read by a CLIP that has forgotten comes behind the forgetting."""
    graph = json.loads((ROOT / "workflows" / "api" / "erase_text_encoder.json").read_text())
    ranked = ranks(graph)
    assert ranked["10"] == ranked["9"] > ranked["3"]
