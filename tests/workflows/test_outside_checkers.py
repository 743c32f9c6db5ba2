"""Our graphs in the hands of others: a linter against the host's own list of nodes, and another converter.

``requirements-checkers.txt`` has the versions.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from comfyui_concepts.workbench.checkers import checkers
from comfyui_concepts.workbench.twins import TWINS

ROOT = Path(__file__).resolve().parent.parent.parent
API = sorted((ROOT / "workflows" / "api").rglob("*.json"))
NEWER = {value for twin in TWINS.values() for value in twin.model.newer}
CONVERT = """
import json, pathlib, sys
from autograph.convert import convert
info, target = json.loads(pathlib.Path(sys.argv[1]).read_text()), pathlib.Path(sys.argv[2])
for name in sys.argv[3:]:
    path = pathlib.Path(name)
    (target / path.name).write_text(json.dumps(convert(json.loads(path.read_text()), node_info=info)))
"""


@pytest.fixture(scope="module")
def schema(object_info, tmp_path_factory):
    """The host's list of nodes in a file, as if it were new enough for every graph and had every file they name."""
    known = json.loads(json.dumps(object_info))
    for path in API:
        for node in json.loads(path.read_text()).values():
            for name, value in node["inputs"].items():
                if str(value).endswith(".safetensors") or str(value) in NEWER:
                    _offer(known[node["class_type"]]["input"], name, value)
    file = tmp_path_factory.mktemp("checkers") / "object_info.json"
    file.write_text(json.dumps(known))
    return file


def _offer(sections: dict, name: str, value: str) -> None:
    """Adds a file to the choices of a combo."""
    for section in sections.values():
        if name in section:
            choices = section[name][0] if isinstance(section[name][0], list) else section[name][1]["options"]
            choices += [] if value in choices else [value]


def _lint(schema: Path, *graphs: Path) -> subprocess.CompletedProcess:
    command = [checkers() / "comfy-lint", *graphs, "--schema-cache", schema, "--strict"]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_linter_has_nothing_against_our_graphs(schema):
    done = _lint(schema, *API)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("name", "value", "rule"), [("steps", None, "missing-required"), ("sampler_name", "nonsense", "invalid-enum")]
)
def test_the_linter_sees_what_is_wrong(name, value, rule, schema, tmp_path):
    graph = json.loads((ROOT / "workflows" / "api" / "demo_first_picture.json").read_text())
    node = next(node for node in graph.values() if name in node["inputs"])
    node["inputs"][name] = value
    if value is None:
        del node["inputs"][name]
    (tmp_path / "graph.json").write_text(json.dumps(graph))
    done = _lint(schema, tmp_path / "graph.json")
    assert done.returncode != 0
    assert rule in done.stdout + done.stderr


@pytest.fixture(scope="module")
def converted(schema, tmp_path_factory):
    """The folder with every template as the other converter queues it."""
    target = tmp_path_factory.mktemp("converted")
    templates = [ROOT / "workflows" / path.name for path in API]
    command = [checkers() / "python", "-c", CONVERT, schema, target, *templates]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return target


@pytest.mark.parametrize("path", API, ids=lambda path: path.stem)
def test_another_converter_queues_the_template_as_its_twin(path, converted):
    queued = json.loads((converted / path.name).read_text())
    ours = json.loads(path.read_text())
    assert {k: (n["class_type"], n["inputs"]) for k, n in queued.items()} == {
        k: (n["class_type"], n["inputs"]) for k, n in ours.items()
    }
