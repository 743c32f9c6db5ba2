"""The templates and their API twins are one graph, and a client nobody here wrote reads and runs both."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import uuid
from pathlib import Path
from types import SimpleNamespace

import pytest
from comfyui_concepts.workbench import thumbnails
from comfyui_concepts.workbench.client import Picture
from comfyui_concepts.workbench.gallery import CHECKPOINTS
from comfyui_concepts.workbench.templates import render, to_api
from comfyui_concepts.workbench.thumbnails import SIDE, outdated, thumbnail
from comfyui_concepts.workbench.twin import text_of, twin_graph
from comfyui_concepts.workbench.twins import TWINS
from comfyui_concepts.workbench.ui_graph import inputs_of
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent.parent
API = sorted((ROOT / "workflows" / "api").rglob("*.json"))


def by_name(path):
    return path.stem


def _comfy_cli(*arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"DO_NOT_TRACK": "1", "COMFY_NO_WATCH": "1"}
    command = [str(Path(sys.executable).parent / "comfy"), "--skip-prompt", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def _without_titles(graph: dict) -> dict:
    return {k: {"class_type": n["class_type"], "inputs": n["inputs"]} for k, n in graph.items()}


def test_there_are_graphs_and_each_has_its_template():
    assert len(API) >= 4
    assert {p.stem for p in API} == {p.stem for p in (ROOT / "workflows").glob("*.json")}


@pytest.mark.parametrize("path", API, ids=by_name)
def test_the_template_is_made_from_its_twin(path, object_info):
    made = render(path, object_info)
    assert (ROOT / "workflows" / path.name).read_text() == made, (
        "make the templates anew with: python3 dev.py workflows"
    )


@pytest.mark.parametrize("path", API, ids=by_name)
def test_the_template_queues_as_its_twin(path, object_info):
    template = json.loads((ROOT / "workflows" / path.name).read_text())
    assert to_api(template, object_info) == json.loads(path.read_text())
    assert str(uuid.UUID(template["id"])) == template["id"]  # the editor refuses any other kind of id


@pytest.mark.parametrize("path", API, ids=by_name)
def test_another_client_reads_the_template_as_its_twin(path, server):
    """comfy-cli has a converter of its own."""
    template = ROOT / "workflows" / path.name
    done = _comfy_cli(
        "run", "--workflow", str(template), "--host", "127.0.0.1", "--port", str(server.port), "--print-prompt"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    converted = json.loads(done.stdout)["data"]["prompt"]
    assert _without_titles(converted) == _without_titles(json.loads(path.read_text()))


@pytest.mark.parametrize("path", API, ids=by_name)
def test_every_value_is_one_the_host_offers(path, object_info):
    for node in json.loads(path.read_text()).values():
        info = object_info[node["class_type"]]
        declared = {name: (kind, options) for name, kind, options in inputs_of(info)}
        assert set(node["inputs"]) <= set(declared)
        assert set(info["input"].get("required") or {}) <= set(node["inputs"])
        for name, value in node["inputs"].items():
            kind, options = declared[name]
            if isinstance(value, list):
                assert kind not in ("COMBO", "STRING")
            elif kind == "COMBO" and path.parent.name == "checkpoints" and str(value).endswith(".safetensors"):
                continue  # a file of the user's own
            elif path.stem in TWINS and value in TWINS[path.stem].model.newer:
                continue  # for a newer host
            elif kind == "COMBO":
                section = "required" if name in (info["input"].get("required") or {}) else "optional"
                offered = info["input"][section][name]
                assert value in (offered[0] if isinstance(offered[0], list) else options["options"])
            elif kind in ("INT", "FLOAT"):
                assert options["min"] <= value <= options["max"]


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["api", "."], ids=["api format", "template"])
def test_another_client_runs_our_graphs(folder, server):
    before = set((server.base / "output").rglob("*.png"))
    workflow = ROOT / "workflows" / folder / "anagram_turn.json"
    done = _comfy_cli(
        "run",
        "--workflow",
        str(workflow),
        "--host",
        "127.0.0.1",
        "--port",
        str(server.port),
        "--wait",
        "--timeout",
        "200",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    if folder == "api":  # the second run finds everything in the host's cache
        assert len(set((server.base / "output").rglob("*.png")) - before) == 8


def test_the_host_offers_the_templates(server):
    offered = server.get("/workflow_templates")
    names = next(names for pack, names in offered.items() if "concepts" in pack)
    assert {p.stem for p in API} <= set(names)
    for path in API:
        assert server.get(f"/api/workflow_templates/comfyui-concepts/{path.stem}.json")["nodes"]


@pytest.mark.parametrize("name", TWINS)
def test_a_twin_for_checkpoints_is_made_from_its_source(name):
    made = text_of(TWINS[name])
    assert (CHECKPOINTS / f"{name}.json").read_text() == made, "make the twins anew with: python3 dev.py workflows"
    own = {n["class_type"] for n in json.loads(made).values()}
    assert own & {"CheckpointLoaderSimple", "UNETLoader"}
    assert {node["class_type"] for node in TWINS[name].model.nodes.values()} <= own
    assert not any(kind.startswith("ConceptsDemo") for kind in own)
    for (node, value), given in TWINS[name].values.items():
        assert json.loads(made)[node]["inputs"][value] == given


def test_every_graph_has_a_twin_for_checkpoints():
    sources = {twin.source for twin in TWINS.values()}
    lacking = [path.stem for path in API if path.parent != CHECKPOINTS and path.stem not in sources]
    assert not lacking, f"give them a twin in workbench/twins.py: {', '.join(lacking)}"


def test_the_twin_of_a_judged_graph_leaves_the_judge_out_and_says_so():
    twins = {name: twin for name, twin in TWINS.items() if twin.left_out}
    assert twins
    for name, twin in twins.items():
        links = [v[0] for n in twin_graph(twin).values() for v in n["inputs"].values() if isinstance(v, list)]
        assert not set(links) & set(twin.left_out)
        assert "without" in (ROOT / "workflows" / "notes" / f"{name}.md").read_text()


@pytest.mark.parametrize("path", API, ids=by_name)
def test_a_template_has_a_note_and_a_thumbnail(path):
    note = (ROOT / "workflows" / "notes" / f"{path.stem}.md").read_text().strip()
    written = [
        n for n in json.loads((ROOT / "workflows" / path.name).read_text())["nodes"] if n["type"] == "MarkdownNote"
    ]
    assert [n["widgets_values"] for n in written] == [[note]]
    assert ("What to choose" in note) == (path.parent.name == "checkpoints")
    with Image.open(ROOT / "workflows" / f"{path.stem}.jpg") as picture:
        assert picture.size == (SIDE, SIDE)
        assert len(picture.getcolors(1 << 20)) > 100


def test_pictures_show_what_the_graphs_make_now():
    changed = outdated()
    command = f"python3 dev.py workflows --thumbnails {' '.join(changed)}"
    assert not changed, f"these graphs have changed since their pictures were made; make them anew with: {command}"


def test_a_graph_is_outdated_once_it_changes_until_its_pictures_are_made(tmp_path, monkeypatch):
    async def run_graph(url, graph):
        picture = io.BytesIO()
        Image.new("RGB", (40, 40), "red").save(picture, "PNG")
        return [Picture("3", "one.png", picture.getvalue())]

    monkeypatch.setattr(thumbnails, "run_graph", run_graph)
    for folder in ("API", "CHECKPOINTS", "UI", "DOCS"):
        monkeypatch.setattr(thumbnails, folder, tmp_path / folder)
        (tmp_path / folder).mkdir()
    monkeypatch.setattr(thumbnails, "RECORD", tmp_path / "record.json")
    graph = {"3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "size": 1}, "_meta": {"title": "first"}}}

    def write(name):
        (tmp_path / "API" / f"{name}.json").write_text(json.dumps(graph))

    nowhere = SimpleNamespace(url="")
    for name in ("one", "two"):
        write(name)
    thumbnails.make(nowhere, [])
    assert outdated() == []
    graph["3"]["_meta"]["title"] = "second"
    write("one")
    assert outdated() == []  # a title changes no picture
    graph["3"]["inputs"]["size"] = 2
    write("one")
    write("three")
    (tmp_path / "API" / "two.json").unlink()
    assert outdated() == ["one", "three"]
    thumbnails.make(nowhere, ["one"])
    assert outdated() == ["three"]
    assert list(json.loads(thumbnails.RECORD.read_text())) == ["one"]


def test_every_verb_has_templates_that_run_as_they_are():
    assert len(list((ROOT / "workflows" / "api").glob("*.json"))) >= 8


def test_a_thumbnail_shows_up_to_four_pictures_and_no_long_sheet():
    def png(colour, size=(40, 40)):
        target = io.BytesIO()
        Image.new("RGB", size, colour).save(target, "PNG")
        return target.getvalue()

    made = Image.open(io.BytesIO(thumbnail([png("red"), png("lime"), png("blue", (10, 90))])))
    red, lime, below = (made.getpixel(at) for at in ((60, 128), (200, 128), (60, 230)))
    assert [max(range(3), key=colour.__getitem__) for colour in (red, lime)] == [0, 1]
    assert max(below) < 40  # the sheet is left out, and the two stand in the middle
    with pytest.raises(ValueError, match="Save Image"):
        thumbnail([])
