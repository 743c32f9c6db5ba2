"""Each blueprint is a part of a graph: put in place of its nodes, it leaves the graph what it was."""

from __future__ import annotations

import asyncio
import copy
import io
import json
from pathlib import Path

import pytest
from comfyui_concepts.workbench.blueprints import BLUEPRINTS, text_of_blueprint
from comfyui_concepts.workbench.client import run_graph
from comfyui_concepts.workbench.templates import to_api
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent.parent
ENTRY, EXIT = -10, -20
SHORT = {"steps": 4, "batch_size": 1}
each_blueprint = pytest.mark.parametrize("name", BLUEPRINTS)


def _blueprint(name):
    return json.loads((ROOT / "subgraphs" / f"{name}.json").read_text())


def _definition(name):
    (definition,) = _blueprint(name)["definitions"]["subgraphs"]
    return definition


def _source(name):
    return json.loads((ROOT / "workflows" / "api" / f"{BLUEPRINTS[name].source}.json").read_text())


def _expanded(name, given, object_info):
    """The nodes inside as an API graph, with the links given for its sockets: by label, a node and an output."""
    definition = copy.deepcopy(_definition(name))
    edges = {link["id"]: link["origin_slot"] for link in definition["links"] if link["origin_id"] == ENTRY}
    taken = []
    for node in definition["nodes"]:
        for socket in node["inputs"]:
            if socket["link"] in edges:
                label = definition["inputs"][edges[socket["link"]]]["name"]
                taken += [(str(node["id"]), socket["name"], given[label])] if label in given else []
                socket["link"] = None
    rows = [
        [*link.values()] for link in definition["links"] if link["origin_id"] != ENTRY and link["target_id"] != EXIT
    ]
    graph = to_api({"nodes": definition["nodes"], "links": rows}, object_info)
    for node, socket, value in taken:
        graph[node]["inputs"][socket] = value
    return graph


def _sockets(name):
    """By label, the type of each input that is no widget."""
    return {s["name"]: s["type"] for s in _blueprint(name)["nodes"][0]["inputs"] if "widget" not in s}


def _whole(name, object_info):
    """The source again: the nodes outside, and the blueprint in place of the others."""
    spec, source = BLUEPRINTS[name], _source(name)
    given = {
        label: next([n, slot] for n in spec.left_out for slot, made in _outputs(source, n, object_info) if made == kind)
        for label, kind in _sockets(name).items()
    }
    outside = {node: what for node, what in source.items() if node in spec.left_out}
    return outside | _expanded(name, given, object_info)


def _outputs(graph, node, object_info):
    return enumerate(object_info[graph[node]["class_type"]]["output"])


@each_blueprint
def test_a_blueprint_is_made_from_its_graph(name, object_info):
    made = text_of_blueprint(name, object_info)
    assert (ROOT / "subgraphs" / f"{name}.json").read_text() == made, "make it anew with: python3 dev.py workflows"


def test_there_is_no_blueprint_that_is_not_made():
    assert {path.stem for path in (ROOT / "subgraphs").iterdir()} == set(BLUEPRINTS)


@each_blueprint
def test_a_blueprint_in_place_of_its_nodes_leaves_the_graph_what_it_was(name, object_info):
    expected = _source(name)
    for (node, widget), value in BLUEPRINTS[name].values.items():
        expected[node]["inputs"][widget] = value
    assert _whole(name, object_info) == expected


@each_blueprint
def test_every_link_of_a_blueprint_is_known_at_both_ends(name):
    """The page follows links by their ids and by the places of sockets."""
    definition = _definition(name)
    nodes = {node["id"]: node for node in definition["nodes"]}
    assert [link["id"] for link in definition["links"]] == list(range(1, definition["state"]["lastLinkId"] + 1))
    for link in definition["links"]:
        if link["origin_id"] == ENTRY:
            assert link["id"] in definition["inputs"][link["origin_slot"]]["linkIds"]
        else:
            assert link["id"] in nodes[link["origin_id"]]["outputs"][link["origin_slot"]]["links"]
        if link["target_id"] == EXIT:
            assert definition["outputs"][link["target_slot"]]["linkIds"] == [link["id"]]
        else:
            socket = nodes[link["target_id"]]["inputs"][link["target_slot"]]
            assert (socket["link"], socket["type"]) == (link["id"], link["type"])


@each_blueprint
def test_a_blueprint_shows_what_a_newcomer_sets_and_says_what_it_is(name):
    (node,) = _blueprint(name)["nodes"]
    definition = _definition(name)
    assert (node["title"], node["type"]) == (name, definition["id"])
    assert definition["description"].endswith(".")
    widgets = [socket["name"] for socket in node["inputs"] if "widget" in socket]
    assert widgets == list(BLUEPRINTS[name].widgets)
    assert 3 <= len(widgets) <= 10
    assert all(inside["properties"]["cnr_id"] for inside in definition["nodes"])


def test_the_host_offers_the_blueprints(server):
    offered = {entry["name"]: number for number, entry in server.get("/global_subgraphs").items()}
    assert set(BLUEPRINTS) <= set(offered)
    for name in BLUEPRINTS:
        assert json.loads(server.get(f"/global_subgraphs/{offered[name]}")["data"]) == _blueprint(name)


@pytest.mark.slow
@each_blueprint
def test_a_graph_with_a_blueprint_makes_a_picture(name, server, object_info):
    """In a short run: its length is not what is tested."""
    graph = _whole(name, object_info)
    for node in graph.values():
        node["inputs"] |= {widget: value for widget, value in SHORT.items() if widget in node["inputs"]}
    pictures = asyncio.run(run_graph(server.url, graph))
    assert pictures
    for picture in pictures:
        assert len(Image.open(io.BytesIO(picture.data)).convert("RGB").getcolors(1 << 20)) > 100
